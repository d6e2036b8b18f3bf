//! P5: the bound is a bound: whatever breaks, panics, is resized or recycled, the pool has at most `max_size`
//! connections, those being opened and closed among them; and every slot becomes free again.

use crate::fake::{Act, Call, Fake};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::stock::{Account, Counting, SEEN, SOON, finish, manager, pid, take};
use crate::support::{Database, EPSILON, History, Sample, alone, ms, sleep_until, wait_until, watched};
use millpond::{CloseReason, Pool, PooledConnection};

/// What happens to be decided: good enough to stir, and the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // Knuth's multiplier.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Never more than `bound` on the server, except those that were closed on this side before it answered: how soon it
/// notices (a millisecond or two after the socket is gone, when it is given a processor) is its own affair. Returns the
/// most that were there.
fn assert_bound_on_server(seen: &History, account: &Account, bound: usize) -> usize {
    let count = |sample: &Sample| {
        let lives = |&pid: &i32| account.closed(pid).is_none_or(|closed| closed > sample.answered);
        let (alive, dying): (Vec<i32>, Vec<i32>) = sample.pids().into_iter().partition(lives);
        assert!(alive.len() <= bound, "{} alive, {} dying", alive.len(), dying.len());
        alive.len()
    };
    seen.0.iter().map(count).max().expect("a sample")
}

/// Tells everybody when it goes, on return and on panic alike.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_storm() {
    let _alone = alone();
    const BOUND: u32 = 5;
    let server = Database::get();
    let manager = Counting::new("storm");
    let account = Arc::clone(&manager.account);
    let pool = Pool::builder().max_size(BOUND).max_idle(ms(20)).max_lifetime(ms(500)).connection_timeout(SOON);
    let pool = pool.build(manager).unwrap();
    let watch = server.watch("storm");
    let (start, over) = (Instant::now(), AtomicBool::new(false));
    let (uses, panics, discards) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let mut most_slots = 0;

    let work = |seed: u64| {
        let mut dice = Dice(seed);
        while !over.load(Ordering::Relaxed) {
            // Everybody gets one, though every one there is may be broken at this moment.
            let mut conn = pool.get().unwrap_or_else(|e| panic!("lost: {e}"));
            uses.fetch_add(1, Ordering::Relaxed);
            match dice.roll(20) {
                0 => {
                    let _ = conn.client().batch_execute("SELECT pg_terminate_backend(pg_backend_pid())");
                }
                1 => {
                    discards.fetch_add(1, Ordering::Relaxed);
                    PooledConnection::discard(conn);
                }
                2 => {
                    panics.fetch_add(1, Ordering::Relaxed);
                    let panic = catch_unwind(AssertUnwindSafe(|| {
                        let _conn = conn;
                        resume_unwind(Box::new("quietly"));
                    }));
                    assert!(panic.is_err());
                }
                // One that an administrator ended meanwhile answers with an error.
                3..10 => drop(conn.client().simple_query("SELECT 1")),
                10 => thread::sleep(ms(5)),
                _ => {}
            }
        }
    };
    // For some seconds, and on a busy machine for as long as it takes to be a storm.
    let was_a_storm = || {
        let stats = pool.stats();
        uses.load(Ordering::Relaxed) > 1000
            && [&panics, &discards].iter().all(|n| n.load(Ordering::Relaxed) > 20)
            && [CloseReason::Broken, CloseReason::Resized, CloseReason::Recycled]
                .iter()
                .all(|&r| stats.closed_for(r) > 9)
    };
    thread::scope(|scope| {
        for seed in 0..64 {
            let work = &work;
            scope.spawn(move || work(seed));
        }
        // Whatever goes wrong here, the others are told to stop.
        let _over = OnDrop(&over);
        // Meanwhile, the operators.
        let mut dice = Dice(4711);
        let mut admin = server.connect();
        while start.elapsed() < Duration::from_secs(3) || !was_a_storm() {
            assert!(start.elapsed() < SOON * 6, "not much of a storm: {}", pool.stats());
            match dice.roll(6) {
                0 | 1 => pool.resize(1 + dice.roll(BOUND.into()) as u32).unwrap(),
                2 => pool.recycle(),
                _ => {
                    let open = account.open();
                    if !open.is_empty() {
                        let victim = open[dice.roll(open.len() as u64) as usize];
                        admin.execute("SELECT pg_terminate_backend($1)", &[&victim]).unwrap();
                    }
                }
            }
            let stats = pool.stats();
            most_slots = most_slots.max(stats.size());
            assert_eq!(stats.abandoned, 0, "nothing takes that long: {stats}");
            thread::sleep(ms(5));
        }
        pool.resize(BOUND).unwrap();
    });

    // Never over the bound: by the manager's account, which is exact; by the pool's own; on the server.
    let seen = watch.end();
    assert_eq!(account.most(), BOUND as usize, "it did come to the bound");
    assert!(most_slots <= BOUND, "{most_slots}");
    let most = assert_bound_on_server(&seen, &account, BOUND as usize);
    assert!(most > 1, "a watch that saw no more than {most} has seen nothing");

    // No slot, and no connection of doubtful state, came out of a panic.
    let stats = pool.stats();
    assert_eq!(stats.closed_for(CloseReason::Panicked), panics.into_inner(), "{stats}");
    assert_eq!(stats.closed_for(CloseReason::Discarded), discards.into_inner(), "{stats}");

    // No waiter was lost, and every slot is back: all can be had at once, and no more.
    assert_eq!((stats.waiting, stats.timeouts, stats.in_use), (0, 0, 0), "{stats}");
    let at_rest = || {
        let stats = pool.stats();
        stats.checking + stats.opening + stats.closing == 0
    };
    assert!(wait_until(Instant::now() + SOON, at_rest), "{}", pool.stats());
    let all = take(&pool, BOUND as usize);
    assert!(pool.get_timeout(ms(20)).is_err());
    assert_eq!(account.now(), BOUND as usize);
    drop(all);
    let stats = pool.stats();
    assert_eq!(stats.opens - stats.closes, u64::from(stats.idle + stats.checking), "{stats}");
    assert_eq!(account.opened() as u64, stats.opens + stats.failed_opens);
    finish(pool, "storm");
    assert_eq!(account.now(), 0);
}

/// HikariCP has twice its maximum open while closes take long; a slot is taken until the close has ended.
#[test]
fn closes_that_take_long_count() {
    let _alone = alone();
    let manager = Counting::new("slow-close");
    let account = Arc::clone(&manager.account);
    *account.close_time.lock() = ms(100);
    let pool = Pool::builder().max_size(3).build(manager).unwrap();
    let watch = Database::get().watch("slow-close");
    for _ in 0..3 {
        let conns = take(&pool, 3);
        let start = Instant::now();
        conns.into_iter().for_each(PooledConnection::discard);
        assert_eq!((pool.stats().closing, account.now()), (3, 3));
        drop(pool.get().unwrap());
        let waited = start.elapsed();
        assert!(waited >= ms(100), "a slot is free when its close has ended, not after {waited:?}");
        take(&pool, 3).into_iter().for_each(drop);
        pool.recycle();
        assert!(account.now() <= 3);
    }
    take(&pool, 3).into_iter().for_each(drop);
    assert_eq!(account.most(), 3);
    assert_eq!(assert_bound_on_server(&watch.end(), &account, 3), 3);
    finish(pool, "slow-close");
}

#[test]
fn resize_down_takes_the_longest_unused_at_once() {
    let _alone = alone();
    let server = Database::get();
    let pool = Pool::builder().max_size(5).build(manager("resize-idle")).unwrap();
    let mut conns = take(&pool, 5);
    let pids: Vec<i32> = conns.iter_mut().map(|conn| pid(conn)).collect();
    conns.into_iter().for_each(drop);

    pool.resize(3).unwrap();
    assert_eq!(server.wait_for("resize-idle", 3, Instant::now() + SEEN), 3);
    let left: BTreeSet<i32> = server.backends("resize-idle").iter().map(|backend| backend.pid).collect();
    assert_eq!(left, pids[2..].iter().copied().collect());
    assert_eq!((pool.max_size(), pool.stats().closed_for(CloseReason::Resized)), (3, 2));
    finish(pool, "resize-idle");
}

#[test]
fn resize_down_takes_the_busy_as_they_come_back() {
    let _alone = alone();
    let server = Database::get();
    let pool = Pool::builder().max_size(5).build(manager("resize-busy")).unwrap();
    let mut conns = take(&pool, 5);
    pool.resize(2).unwrap();
    for left in [4, 3, 2] {
        assert_eq!(server.count("resize-busy"), left + 1);
        drop(conns.remove(0));
        assert_eq!(server.wait_for("resize-busy", left, Instant::now() + SEEN), left);
        assert_eq!(pool.state().idle_connections, 0);
        // There is none for anybody else until then.
        assert!(pool.get_timeout(Duration::ZERO).is_err());
    }
    drop(conns);
    let stats = pool.stats();
    assert_eq!((stats.idle, stats.closed_for(CloseReason::Resized), stats.opens), (2, 3, 5), "{stats}");
    sleep_until(Instant::now() + EPSILON);
    assert_eq!(server.count("resize-busy"), 2, "these two stay");
    finish(pool, "resize-busy");
}

#[test]
fn resize_up_serves_the_waiters() {
    let _beside = crate::support::beside_others();
    let server = Database::get();
    let pool = Pool::builder().max_size(1).min_idle(1).build(manager("resize-up")).unwrap();
    assert!(pool.resize(0).is_err() && pool.max_size() == 1);
    let checked_out = pool.get().unwrap();
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let conn = pool.get().unwrap();
                assert!(wait_until(Instant::now() + SOON, || enough.load(Ordering::Relaxed)));
                drop(conn);
            });
        }
        assert!(wait_until(Instant::now() + SOON, || pool.stats().waiting == 3));
        for size in 2..=4 {
            pool.resize(size).unwrap();
            assert_eq!(server.wait_for("resize-up", size.into(), Instant::now() + SOON), i64::from(size));
            assert!(wait_until(Instant::now() + SOON, || pool.stats().waiting == 4 - size));
        }
        enough.store(true, Ordering::Relaxed);
    });
    drop(checked_out);
    assert_eq!(pool.stats().opens, 4, "{}", pool.stats());
    finish(pool, "resize-up");
}

#[test]
fn the_detached_are_not_counted() {
    let _beside = crate::support::beside_others();
    let server = Database::get();
    let pool = Pool::builder().max_size(2).build(manager("detached")).unwrap();
    let mut own = PooledConnection::detach(pool.get().unwrap());
    assert_eq!(pool.state().connections, 0);

    let two = take(&pool, 2);
    assert_eq!(server.count("detached"), 3);
    assert!(pool.get_timeout(Duration::ZERO).is_err());
    drop(two);
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");

    // The pool is gone, the connection is not.
    assert_eq!(server.wait_for("detached", 1, Instant::now() + SOON), 1);
    assert_eq!(own.query_one("SELECT 42", &[]).unwrap().get::<_, i32>(0), 42);
    drop(own);
    assert_eq!(server.wait_for("detached", 0, Instant::now() + SOON), 0);
}

/// What hangs keeps nobody from what is idle, not even if there are to be fewer.
#[test]
fn a_smaller_pool_keeps_what_it_has_rather_than_what_hangs() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).build(fake.r2d2()).unwrap();
        let checked_out = pool.get().unwrap();
        fake.set(Call::Open, Act::Block);
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let pool = pool.clone();
                thread::spawn(move || drop(pool.get_timeout(ms(100))))
            })
            .collect();
        waiters.into_iter().for_each(|w| w.join().unwrap());
        fake.wait_inside(Call::Open, 3);
        drop(checked_out);
        pool.resize(1).unwrap();
        let got = pool.get_timeout(Duration::from_secs(3));
        let stats = pool.stats();
        fake.release(Call::Open);
        assert!(got.is_ok(), "{stats}");
    });
}
