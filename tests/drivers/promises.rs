//! What the pool promises, on any driver and any server: written once, and called with a manager, a way to count the
//! pool's connections that asks the server, and a way to silence it, until what that
//! gives is dropped: by a panic as well, so that nothing that hangs keeps the pool, or the test, from ending.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use millpond::{Builder, CloseReason, Manage, Pool, PooledConnection, Validate};

use crate::support::{SEEN, SOON, beside_others, ms, slack, wait_until, within};

fn take<M: Manage>(pool: &Pool<M>, n: u32) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get().unwrap()).collect()
}

/// Closes the pool, and the server has none of its connections left.
#[track_caller]
fn finish<M: Manage>(pool: Pool<M>, count: impl Fn() -> usize) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_gone(count);
}

#[track_caller]
fn assert_gone(count: impl Fn() -> usize) {
    assert!(wait_until(within(SOON), || count() == 0), "the server has {}", count());
}

/// The reaper: all that are idle go when they have been so for `max_idle`, but for `min_idle` of them.
pub(crate) fn idle_ones_go_in_time<M: Manage>(builder: Builder<M>, manager: M, count: impl Fn() -> usize) {
    const MAX_IDLE: Duration = ms(700);
    let _beside = beside_others();
    let pool = builder.max_size(5).min_idle(1).max_idle(MAX_IDLE).max_lifetime(None).build(manager).unwrap();
    let all = take(&pool, 5);
    assert_eq!(count(), 5);

    let before = Instant::now();
    drop(all);
    let after = Instant::now();
    let mut fell = None;
    let gone = wait_until(after + MAX_IDLE + SEEN, || {
        let n = count();
        if n < 5 {
            fell.get_or_insert_with(Instant::now);
        }
        n == 1
    });
    assert!(gone, "the server has {} after {:?}: {}", count(), after.elapsed(), pool.stats());
    let early = (before + MAX_IDLE).saturating_duration_since(fell.unwrap());
    assert!(early < slack(), "the first went {early:?} before its time");
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes, stats.closed_for(CloseReason::Idle)), (5, 4, 4), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, count);
}

/// The deadline of `get`, while the opening that it needs hangs; and while another user's return hangs, if it does.
/// Returns whether it does.
pub(crate) fn get_keeps_its_deadline_while_an_open_hangs<M: Manage, F>(
    builder: Builder<M>,
    manager: M,
    count: impl Fn() -> usize,
    freeze: impl FnOnce() -> F,
) -> bool {
    let _beside = beside_others();
    let pool = builder.max_size(3).build(manager).unwrap();
    let used = take(&pool, 1);
    let frozen = freeze();
    times_out_in_time(&pool);
    assert_eq!((pool.stats().opens, count_in_use(&pool)), (1, 1), "{}", pool.stats());

    // A manager whose `has_broken` asks the server holds up who returns a connection, and nobody else.
    let hangs = thread::scope(|scope| {
        let frozen = frozen;
        let returns = scope.spawn(move || drop(used));
        times_out_or_is_served(&pool);
        let hangs = !returns.is_finished();
        drop(frozen);
        hangs
    });
    drop(pool.get_timeout(SOON).expect("the server answers again"));
    finish(pool, count);
    hangs
}

/// The deadline of `get`, while the check of the connection that it would get hangs.
pub(crate) fn get_keeps_its_deadline_while_a_check_hangs<M: Manage, F>(
    builder: Builder<M>,
    manager: M,
    count: impl Fn() -> usize,
    freeze: impl FnOnce() -> F,
) {
    let _beside = beside_others();
    let pool = builder.max_size(2).validate(Validate::Always).build(manager).unwrap();
    drop(take(&pool, 2));
    let frozen = freeze();
    times_out_in_time(&pool);
    times_out_in_time(&pool);
    drop(frozen);
    drop(pool.get_timeout(SOON).expect("the server answers again"));
    finish(pool, count);
}

fn count_in_use<M: Manage>(pool: &Pool<M>) -> usize {
    pool.connections().iter().filter(|one| one.state == millpond::ConnectionState::InUse).count()
}

const TIMEOUT: Duration = ms(300);

#[track_caller]
fn times_out_in_time<M: Manage>(pool: &Pool<M>) {
    let begun = Instant::now();
    let error = pool.get_timeout(TIMEOUT).expect_err("nothing can come");
    let took = begun.elapsed();
    assert!(error.is_timeout() && took >= TIMEOUT && took < TIMEOUT + slack(), "{took:?}: {error}");
}

#[track_caller]
fn times_out_or_is_served<M: Manage>(pool: &Pool<M>) {
    let begun = Instant::now();
    // What is returned meanwhile may be handed out, if its return does not hang.
    let served = pool.get_timeout(TIMEOUT);
    let took = begun.elapsed();
    assert!(took < TIMEOUT + slack(), "{took:?}: {served:?}");
    // Returned only when the server is there again, for the same reason.
    if let Ok(served) = served {
        PooledConnection::discard(served);
    }
}

/// The guard: a panic closes the pool, whoever else has a handle on it.
pub(crate) fn a_panic_closes_the_pool<M: Manage>(builder: Builder<M>, manager: M, count: impl Fn() -> usize) {
    let pool = builder.max_size(3).build(manager).unwrap();
    let user = pool.clone();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _guard = user.guard();
        let mut all = take(&user, 3);
        let _used = all.pop();
        drop(all);
        assert_eq!(count(), 3);
        panic!("in the middle of something (this panic is part of the test)");
    }));
    assert!(panicked.is_err_and(|payload| payload.is::<&str>()));
    assert_gone(count);
    assert!(pool.get().is_err_and(|error| error.is_closed()), "{}", pool.stats());
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1, "{}", pool.stats());
}

/// The bound: under four times as many threads as connections the server never has more than `max_size`. Each of them
/// works, and then looks.
pub(crate) fn the_server_sees_max_size_at_most<M: Manage>(
    builder: Builder<M>,
    manager: M,
    count: impl Fn() -> usize + Sync,
    work: impl Fn(&mut M::Connection, i32) + Sync,
) {
    const MAX_SIZE: u32 = 3;
    let pool = builder.max_size(MAX_SIZE).build(manager).unwrap();
    thread::scope(|scope| {
        for n in 0..4 * MAX_SIZE as i32 {
            let (pool, count, work) = (&pool, &count, &work);
            scope.spawn(move || {
                for i in 0..10 {
                    let mut connection = pool.get().unwrap();
                    work(&mut connection, 10 * n + i);
                    let seen = count();
                    assert!(seen <= MAX_SIZE as usize, "the server sees {seen}");
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.failed_opens, stats.checkouts), (0, 40 * u64::from(MAX_SIZE)), "{stats}");
    assert!(stats.opens <= u64::from(MAX_SIZE), "{stats}");
    finish(pool, count);
}
