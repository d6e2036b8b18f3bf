//! Whatever hangs holds up nobody else: an open, a check, a close, the user's own error that takes its time to go.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake};
use crate::support::{EPSILON, ms, wait_until, watched};
use millpond::{Cause, Manage, Opening, Pool, PooledConnection, Returned, Validate};

const HOUR: Duration = Duration::from_secs(3600);

/// Far longer than what it is given to takes anywhere.
const LONG: Duration = Duration::from_secs(10);

fn take<M: Manage>(pool: &Pool<M>, n: usize) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get_timeout(LONG).unwrap()).collect()
}

/// With the fault over, everything ends.
#[track_caller]
fn ends_well<M: Manage>(pool: Pool<M>, fake: &Fake) {
    let report = pool.close(LONG);
    assert!(report.is_complete(), "{report}");
    assert_eq!(fake.alive(), 0);
}

/// The pool closes what it is given, more at a time than may be closed at once.
#[track_caller]
fn closes_go_on<M: Manage>(pool: &Pool<M>) {
    for _ in 0..3 {
        take(pool, 3).into_iter().for_each(PooledConnection::discard);
        let quiet = || pool.stats().closing == 0;
        assert!(wait_until(Instant::now() + LONG, quiet), "{}", pool.stats());
    }
    assert_eq!(pool.stats().abandoned, 0, "{}", pool.stats());
}

/// A check that fails closes what it has, within its own job: a close that outlasts its limit there is given up as that job.
#[test]
fn a_failed_check_whose_close_outlasts_its_limit_keeps_no_later_close_from_running() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(3).close_timeout(ms(100)).validate(Validate::Always);
        let pool = builder.build(fake.r2d2()).unwrap();
        for n in 1..=3 {
            fake.next(Call::Validate, [Act::Fail]);
            fake.next(Call::Drop, [Act::Last(ms(300))]);
            drop(pool.get_timeout(LONG).unwrap());
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + LONG, over), "{}", pool.stats());
        }
        closes_go_on(&pool);
        ends_well(pool, &fake);
    });
}

/// The same of a reset that failed.
#[test]
fn a_failed_reset_whose_close_outlasts_its_limit_keeps_no_later_close_from_running() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(3).close_timeout(ms(100)).build(fake.direct()).unwrap();
        fake.verdict(Returned::Reset);
        for n in 1..=3 {
            fake.next(Call::Reset, [Act::Fail]);
            fake.next(Call::Close, [Act::Last(ms(300))]);
            drop(pool.get_timeout(LONG).unwrap());
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + LONG, over), "{}", pool.stats());
        }
        fake.verdict(Returned::Keep);
        closes_go_on(&pool);
        ends_well(pool, &fake);
    });
}

/// The same of an open that failed, and whose error handler takes its time.
#[test]
fn a_failed_open_whose_handler_outlasts_its_limit_keeps_no_later_close_from_running() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(3).open_timeout(ms(100)).close_timeout(ms(100));
        let pool = builder.error_handler(fake.error_handler()).build_unchecked(fake.r2d2());
        for n in 1..=3 {
            fake.next(Call::Open, [Act::Fail]);
            fake.next(Call::HandleError, [Act::Last(ms(400))]);
            let held = pool.get_timeout(LONG).unwrap();
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + LONG, over), "{}", pool.stats());
            PooledConnection::discard(held);
        }
        closes_go_on(&pool);
        ends_well(pool, &fake);
    });
}

#[test]
fn an_open_that_hangs_keeps_nobody_from_what_is_idle() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).open_timeout(HOUR).validate(Validate::AfterIdle(ms(50)));
        let pool = builder.build(fake.r2d2()).unwrap();
        fake.set(Call::Open, Act::Block);
        let held = pool.get().unwrap();
        assert!(pool.get_timeout(ms(100)).is_err(), "there is no other yet");
        fake.wait_inside(Call::Open, 1);
        drop(held);
        for _ in 0..3 {
            thread::sleep(ms(60)); // what is idle needs a check by now
            assert!(pool.get_timeout(ms(100)).is_ok(), "{}", pool.stats());
            thread::sleep(ms(60));
            // (Of two calls the first has it checked for the second.)
            let got = || pool.try_get().is_some();
            assert!(wait_until(Instant::now() + LONG, got), "{}", pool.stats());
        }
        assert_eq!(pool.stats().opens, 1);
        fake.release(Call::Open);
        ends_well(pool, &fake);
    });
}

#[test]
fn who_waits_for_an_open_that_hangs_gets_another() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).open_timeout(HOUR).build_unchecked(fake.r2d2());
        fake.next(Call::Open, [Act::Block]);
        let begun = Instant::now();
        let got = pool.get_timeout(LONG).unwrap();
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(1) + EPSILON, "{took:?}");
        drop(got);
        fake.release(Call::Open);
        ends_well(pool, &fake);
    });
}

#[test]
fn closes_that_hang_hold_up_no_eviction() {
    watched(|| {
        let fake = Fake::new();
        let max_idle = ms(300);
        let pool = Pool::builder().max_size(12).max_idle(max_idle).build(fake.r2d2()).unwrap();
        let mut held = take(&pool, 12);
        fake.next(Call::Drop, (0..8).map(|_| Act::Block));
        held.drain(..8).for_each(PooledConnection::discard);
        fake.wait_inside(Call::Drop, 8);
        drop(held);
        let returned = Instant::now();
        assert!(wait_until(returned + max_idle + EPSILON, || fake.dropped() == 4), "{}", pool.connections());
        let late = pool.stats().max_lateness;
        assert!(late < EPSILON, "{late:?} late");
        fake.release(Call::Drop);
        ends_well(pool, &fake);
    });
}

/// An eviction is as late as its close begins to run: what it waits for counts.
#[test]
fn lateness_is_counted_until_the_close_runs() {
    watched(|| {
        let fake = Fake::new();
        let max_idle = ms(200);
        let pool = Pool::builder().max_size(24).max_idle(max_idle).build(fake.r2d2()).unwrap();
        fake.set(Call::Drop, Act::Block);
        // Twenty at once, all of which hang: four begin, eight when these have taken longer than usual (3 ms), then the rest.
        drop(take(&pool, 20));
        fake.wait_inside(Call::Drop, 20);
        let late = pool.stats().max_lateness;
        assert!(late >= ms(6) && late < EPSILON, "{late:?}");
        fake.release(Call::Drop);
        ends_well(pool, &fake);
    });
}

/// `recycle` is for a server that failed: to close what led there may hang, and those who wait need its place.
#[test]
fn after_a_recycle_whose_closes_hang_there_is_a_connection_soon() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).close_timeout(Duration::from_secs(5)).build(fake.r2d2()).unwrap();
        drop(take(&pool, 2));
        fake.set(Call::Drop, Act::Block);
        let begun = Instant::now();
        pool.recycle();
        let got = pool.get_timeout(LONG).unwrap();
        let took = begun.elapsed();
        assert!(took < ms(500) + EPSILON * 2, "{took:?}");
        assert!(got.id > 2);
        let stats = pool.stats();
        assert!(stats.abandoned == 1 && stats.closing == 1, "{stats}");
        drop(got);
        fake.release(Call::Drop);
        ends_well(pool, &fake);
    });
}

// -------------------------------------------------------------------------------------------------- the clock

/// Opens one connection, then fails once, then hangs.
struct Fickle {
    opens: AtomicU32,
    over: Arc<AtomicBool>,
}

/// A user's error whose drop takes its time.
#[derive(Debug)]
struct Heavy(Option<Duration>);

impl fmt::Display for Heavy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("heavy")
    }
}

impl std::error::Error for Heavy {}

impl Drop for Heavy {
    fn drop(&mut self) {
        if let Some(takes) = self.0 {
            thread::sleep(takes);
        }
    }
}

impl Manage for Fickle {
    type Connection = ();
    type Error = Heavy;

    fn open(&self, _: &Opening) -> Result<(), Heavy> {
        match self.opens.fetch_add(1, Ordering::SeqCst) {
            0 => Ok(()),
            1 => Err(Heavy(None)),
            _ => {
                let _ = wait_until(Instant::now() + HOUR, || self.over.load(Ordering::SeqCst));
                Ok(())
            }
        }
    }

    fn validate(&self, (): &mut (), _: Duration) -> Result<(), Heavy> {
        Ok(())
    }

    fn returned(&self, (): &mut ()) -> Returned {
        Returned::Keep
    }

    fn explain(&self, _: &Heavy) -> Cause {
        Cause::of(Heavy(Some(Duration::from_secs(1))))
    }
}

#[test]
fn an_error_whose_drop_takes_long_does_not_stop_the_clock() {
    watched(|| {
        let over = Arc::new(AtomicBool::new(false));
        let manager = Fickle { opens: AtomicU32::new(0), over: Arc::clone(&over) };
        let max_idle = ms(300);
        let builder = Pool::builder().max_size(3).max_idle(max_idle).open_timeout(ms(200));
        let pool = builder.build_unchecked(manager);
        let held = pool.get_timeout(LONG).unwrap();
        // The second open fails with the heavy error, the third hangs and is given up, which is the news then.
        let error = thread::scope(|s| {
            let waiter = s.spawn(|| pool.get_timeout(ms(150)).expect_err("fails, then hangs"));
            waiter.join().unwrap()
        });
        let dialled = || pool.manager().opens.load(Ordering::SeqCst) == 3;
        assert!(wait_until(Instant::now() + LONG, dialled));
        thread::spawn(move || drop(error)); // the pool has the last of it
        drop(held);
        let returned = Instant::now();
        let evicted = || pool.state().idle_connections == 0;
        assert!(wait_until(returned + max_idle + EPSILON, evicted), "{}", pool.connections());
        assert!(pool.stats().max_lateness < EPSILON, "{}", pool.stats());
        assert!(pool.stats().abandonments > 0, "{}", pool.stats());
        over.store(true, Ordering::SeqCst);
        let report = pool.close(LONG);
        assert!(report.is_complete(), "{report}");
    });
}
