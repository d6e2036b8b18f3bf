//! P6: nothing is lost to a panic.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, FakeConn, FakeError, PANIC, run};
use crate::support::{EPSILON, SOON, alone, ms, slack, threads_named, wait_until, within};
use millpond::{Builder, CloseReason, Manage, Pool, PooledConnection, Validate};

const MAX_SIZE: u32 = 3;
const MAX_IDLE: Duration = ms(100);

/// Panics as a user's code would, and prints nothing.
fn panic_quietly() -> ! {
    resume_unwind(Box::new("a user's panic on purpose"))
}

fn builder<M: Manage>() -> Builder<M> {
    // Everything that can happen to a connection happens soon.
    Pool::builder().name("p6").max_size(MAX_SIZE).max_idle(MAX_IDLE).validate(Validate::Always)
}

/// The pool is as good as new.
#[track_caller]
fn nothing_is_lost<M: Manage<Connection = FakeConn, Error = FakeError>>(pool: Pool<M>, fake: &Fake) {
    let checked_out: Vec<_> = (0..MAX_SIZE).map(|_| pool.get_timeout(SOON).unwrap()).collect();
    assert!(wait_until(within(SOON), || fake.alive() == u64::from(MAX_SIZE)), "{} alive", fake.alive());
    let stats = pool.stats();
    assert_eq!((stats.in_use, stats.size(), stats.waiting, stats.abandoned), (MAX_SIZE, MAX_SIZE, 0, 0), "{stats}");
    assert!(pool.get_timeout(ms(1)).unwrap_err().is_exhausted());
    drop(checked_out);
    let last_use = Instant::now();
    let gone = wait_until(last_use + MAX_IDLE + EPSILON, || pool.stats().size() == 0);
    assert!(gone, "evictions do not go on: {}", pool.connections());
    assert!(pool.stats().max_lateness < slack(), "{}", pool.stats());
    assert_eq!((fake.alive(), fake.most_alive()), (0, u64::from(MAX_SIZE)));
    // One, as soon as that of an earlier test, which a connection returned late had called back, has gone.
    let reapers = || threads_named("p6-reaper").len();
    assert!(wait_until(within(EPSILON), || reapers() == 1), "{} reapers", reapers());
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert!(wait_until(within(EPSILON), || threads_named("p6").is_empty()), "{:?}", threads_named("p6"));
}

/// A pool in which this call always panics lives on, and is well as soon as it does not.
#[track_caller]
fn survives<M: Manage<Connection = FakeConn, Error = FakeError>>(
    call: Call,
    fake: &Fake,
    builder: Builder<M>,
    manager: M,
) {
    let pool = builder.build(manager).unwrap();
    let before = fake.calls(call);
    fake.set(call, Act::Panic);
    fake.live(&pool);
    assert!(fake.calls(call) > before, "{call:?} did not happen");
    let came = pool.stats().checkouts + pool.stats().waits;
    thread::scope(|s| {
        // More than there may be connections, so that some wait.
        let waiters: Vec<_> = (0..5).map(|_| s.spawn(|| pool.get_timeout(SOON).map(drop))).collect();
        // Each has come to the pool: it waits, or it was served or refused.
        let arrived = || pool.stats().checkouts + pool.stats().waits - came;
        assert!(wait_until(within(SOON), || arrived() >= 5), "{} of 5: {}", arrived(), pool.stats());
        fake.set(call, Act::Succeed);
        for waiter in waiters {
            waiter.join().unwrap().unwrap();
        }
    });
    nothing_is_lost(pool, fake);
}

#[test]
fn in_a_manager_of_r2d2s() {
    let _alone = alone();
    for call in [Call::Open, Call::Validate, Call::Returned, Call::Drop] {
        println!("{call:?}");
        let fake = Fake::new();
        survives(call, &fake, builder(), fake.r2d2());
    }
}

#[test]
fn in_a_manager_of_its_own() {
    let _alone = alone();
    use Call::*;
    for call in [Open, Validate, Returned, Reset, Close, Drop, Explain, ServerId] {
        println!("{call:?}");
        let fake = Fake::new();
        survives(call, &fake, builder(), fake.direct());
    }
}

#[test]
fn in_a_validation_on_the_callers_thread() {
    let _alone = alone();
    let fake = Fake::new();
    fake.keeps_limits(true);
    survives(Call::Validate, &fake, builder().validation_timeout(ms(10)), fake.direct());

    // The same on this very thread: the validation fits into what this caller may wait.
    let fake = Fake::new();
    fake.keeps_limits(true);
    let pool = builder().validation_timeout(ms(10)).build(fake.direct()).unwrap();
    let (tell, told) = crossbeam_channel::unbounded();
    fake.next(
        Call::Validate,
        [run(move || {
            tell.send(thread::current().id()).unwrap();
            panic_quietly();
        })],
    );
    drop(pool.get_timeout(SOON).unwrap());
    assert_eq!(told.try_recv(), Ok(thread::current().id()), "the validation that panicked ran on the caller");
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1, "{}", pool.stats());
    nothing_is_lost(pool, &fake);
}

#[test]
fn in_a_hook_or_handler() {
    let _alone = alone();
    use Call::*;
    let handlers = [HandleError, HandleAcquire, HandleRelease, HandleCheckout, HandleTimeout, HandleCheckin];
    for call in [OnAcquire, OnRelease].into_iter().chain(handlers) {
        println!("{call:?}");
        let fake = Fake::new();
        let builder = builder().connection_customizer(fake.customizer());
        let builder = builder.error_handler(fake.error_handler()).event_handler(fake.event_handler());
        survives(call, &fake, builder, fake.r2d2());
    }
}

#[test]
fn in_all_of_them() {
    let _alone = alone();
    use Call::*;
    let fake = Fake::new();
    let builder = builder().error_handler(fake.error_handler()).event_handler(fake.event_handler());
    let pool = builder.build_unchecked(fake.direct());
    let handlers = [HandleError, HandleAcquire, HandleRelease, HandleCheckout, HandleTimeout, HandleCheckin];
    // Not `Close` and `Drop` in one: that is a panic in the unwinding of another.
    let calls = [Open, Validate, Returned, Reset, Close, Explain, ServerId].into_iter().chain(handlers);
    for call in calls.clone() {
        fake.set(call, Act::Panic);
    }
    fake.live(&pool);
    // Now everything but what makes a connection impossible, so that there are some to lose.
    fake.set(Open, Act::Succeed);
    fake.set(Validate, Act::Succeed);
    fake.live(&pool);
    calls.for_each(|call| fake.set(call, Act::Succeed));
    nothing_is_lost(pool, &fake);
}

#[test]
fn in_started() {
    let _alone = alone();
    let fake = Fake::new();
    fake.set(Call::Started, Act::Panic);
    let begun = Instant::now();
    let error = builder().build(fake.direct()).unwrap_err();
    assert!(error.is_connect() && begun.elapsed() < slack(), "{error}, after {:?}", begun.elapsed());
    assert!(error.to_string().contains(PANIC), "{error}");
    fake.wait_alive(0);
    assert!(wait_until(within(EPSILON), || threads_named("p6").is_empty()), "{:?}", threads_named("p6"));
}

#[test]
fn says_what_it_was() {
    let _alone = alone();
    let fake = Fake::new();
    fake.set(Call::Open, Act::Panic);
    let pool = builder().build_unchecked(fake.r2d2());
    let error = pool.get_timeout(ms(100)).unwrap_err();
    assert!(error.is_timeout() && error.to_string().contains(&format!("panicked: {PANIC}")), "{error}");
    fake.set(Call::Open, Act::Succeed);
    nothing_is_lost(pool, &fake);
}

#[test]
fn in_an_abort_or_a_cancel() {
    let _alone = alone();
    let fake = Fake::new();
    fake.abortable(true);
    fake.set(Call::Abort, Act::Panic);
    fake.set(Call::Cancel, Act::Panic);
    fake.set(Call::Open, Act::Block);
    let pool = builder().open_timeout(ms(50)).build_unchecked(fake.direct());
    assert!(pool.get_timeout(ms(60)).unwrap_err().is_timeout());
    fake.wait_calls(Call::Abort, 1);
    fake.release(Call::Open);
    drop(pool.get_timeout(SOON).unwrap());
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());

    // One that is in use when the grace of a close is over: a cancel that panics is followed by the abort all the same.
    let aborts = fake.calls(Call::Abort);
    let checked_out = thread::scope(|s| s.spawn(|| pool.get_timeout(SOON).unwrap()).join().unwrap());
    let report = pool.close(ms(50));
    assert_eq!((report.left.len(), report.aborted.len()), (1, 1), "{report}");
    fake.wait_calls(Call::Cancel, 1);
    fake.wait_calls(Call::Abort, aborts + 1);
    drop(checked_out);
    // In this order: a thread that has just been started does not bear its name yet.
    assert!(wait_until(within(SOON), || fake.alive() == 0));
    assert!(wait_until(within(SOON), || threads_named("p6").is_empty()), "{:?}", threads_named("p6"));
}

#[test]
fn in_the_drop_of_an_extension() {
    struct Sour;
    impl Drop for Sour {
        fn drop(&mut self) {
            panic_quietly();
        }
    }

    let _alone = alone();
    let fake = Fake::new();
    let pool = builder().build(fake.r2d2()).unwrap();
    for _ in 0..10 {
        let mut conn = pool.get_timeout(SOON).unwrap();
        PooledConnection::extensions_mut(&mut conn).insert(Sour);
        match conn.id % 2 {
            0 => PooledConnection::discard(conn),
            _ => drop(PooledConnection::detach(conn)),
        }
    }
    nothing_is_lost(pool, &fake);
}

// -------------------------------------------------------------------------------------------------- user's code

#[test]
fn of_the_user_costs_that_connection() {
    let _alone = alone();
    let fake = Fake::new();
    let builder = builder().validate(Validate::Never).event_handler(fake.event_handler());
    let pool = builder.build(fake.direct()).unwrap();
    let before = fake.calls(Call::Returned);
    thread::scope(|s| {
        let kept = pool.get().unwrap();
        let unlucky = pool.get().unwrap();
        let (kept_id, unlucky_id) = (kept.id, unlucky.id);
        let last = pool.get().unwrap();
        let waiter = s.spawn(|| pool.get_timeout(SOON).map(|c| c.id));
        assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
        // What a handler does on the way makes no difference.
        fake.set(Call::HandleCheckin, Act::Panic);
        fake.set(Call::HandleRelease, Act::Panic);
        let user = s.spawn(move || {
            let _holds = unlucky;
            panic_quietly();
        });
        assert!(user.join().is_err());
        let served = waiter.join().unwrap().unwrap();
        assert!(served != unlucky_id && served != kept_id && served != last.id, "a new one, not #{served}");
        drop((kept, last));
    });
    assert_eq!((pool.stats().closed_for(CloseReason::Panicked), fake.dropped()), (1, 1));
    assert_eq!(fake.calls(Call::Returned) - before, 3, "nobody is asked about one that is discarded");
    fake.release(Call::HandleCheckin);
    nothing_is_lost(pool, &fake);
}

#[test]
fn of_the_user_spares_what_was_taken_during_it() {
    /// Uses a connection when dropped, to write the end of something, say.
    struct AtTheEnd<'a, M: Manage>(&'a Pool<M>);
    impl<M: Manage> Drop for AtTheEnd<'_, M> {
        fn drop(&mut self) {
            assert!(thread::panicking());
            drop(self.0.get().unwrap());
        }
    }

    let _alone = alone();
    let fake = Fake::new();
    let pool = builder().validate(Validate::Never).build(fake.r2d2()).unwrap();
    let before = fake.calls(Call::Returned);
    for _ in 0..10 {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let _last_words = AtTheEnd(&pool);
            panic_quietly();
        }));
        assert!(caught.is_err());
    }
    assert_eq!((pool.stats().checkouts, fake.calls(Call::Returned) - before), (10, 10));
    assert_eq!((fake.opened(), fake.dropped()), (1, 0));
    // Before it and during it, in one.
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let _last_words = AtTheEnd(&pool);
        let _held = pool.get().unwrap();
        panic_quietly();
    }));
    assert!(caught.is_err());
    fake.wait_calls(Call::Drop, 1);
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1);
    nothing_is_lost(pool, &fake);
}

/// `catch_unwind` takes a closure that uses a pool as it is: a panic leaves the pool well.
#[test]
fn a_pool_is_unwind_safe() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = builder().build(fake.direct()).unwrap();
    let caught = catch_unwind(|| {
        let _in_use = pool.get().unwrap();
        panic_quietly();
    });
    assert!(caught.is_err());
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1);
    nothing_is_lost(pool, &fake);
}
