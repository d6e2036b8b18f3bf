//! P1, P3 and P5: whatever hangs holds up nobody else: an open, a check, a close, the user's own error whose drop takes
//! long.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, ends_well, take};
use crate::support::{EPSILON, SOON, ms, slack, wait_until, watched, watched_alone};
use millpond::{Cause, Manage, Opening, Pool, PooledConnection, Returned, Validate};

const HOUR: Duration = Duration::from_secs(3600);

/// The pool closes what it is given, more at a time than may be closed at once.
#[track_caller]
fn closes_go_on<M: Manage>(pool: &Pool<M>) {
    for _ in 0..3 {
        take(pool, 3).into_iter().for_each(PooledConnection::discard);
        let quiet = || pool.stats().closing == 0;
        assert!(wait_until(Instant::now() + SOON, quiet), "{}", pool.stats());
    }
    assert_eq!(pool.stats().abandoned, 0, "{}", pool.stats());
}

/// A check that fails closes what it has, within its own job: a close that outlasts its limit there is abandoned as
/// that job.
#[test]
fn a_failed_check_whose_close_outlasts_its_limit_keeps_no_later_close_from_running() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(3).close_timeout(ms(100)).validate(Validate::Always);
        let pool = builder.build(fake.r2d2()).unwrap();
        for n in 1..=3 {
            fake.next(Call::Validate, [Act::Fail]);
            fake.next(Call::Drop, [Act::Last(ms(300))]);
            drop(pool.get_timeout(SOON).unwrap());
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + SOON, over), "{}", pool.stats());
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
            drop(pool.get_timeout(SOON).unwrap());
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + SOON, over), "{}", pool.stats());
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
            let checked_out = pool.get_timeout(SOON).unwrap();
            let over = || pool.stats().abandonments == n && pool.stats().abandoned == 0;
            assert!(wait_until(Instant::now() + SOON, over), "{}", pool.stats());
            PooledConnection::discard(checked_out);
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
        let checked_out = pool.get().unwrap();
        assert!(pool.get_timeout(ms(100)).is_err(), "there is no other yet");
        fake.wait_inside(Call::Open, 1);
        drop(checked_out);
        for _ in 0..3 {
            thread::sleep(ms(60)); // what is idle needs a check by now
            assert!(pool.get_timeout(ms(100)).is_ok(), "{}", pool.stats());
            thread::sleep(ms(60));
            // (Of two calls the first has it checked for the second.)
            let got = || pool.try_get().is_some();
            assert!(wait_until(Instant::now() + SOON, got), "{}", pool.stats());
        }
        assert_eq!(pool.stats().opens, 1);
        fake.release(Call::Open);
        ends_well(pool, &fake);
    });
}

#[test]
fn a_waiter_for_an_open_that_hangs_gets_another() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).open_timeout(HOUR).build_unchecked(fake.r2d2());
        fake.next(Call::Open, [Act::Block]);
        let begun = Instant::now();
        let got = pool.get_timeout(SOON).unwrap();
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(1) + slack(), "{took:?}");
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
        let mut checked_out = take(&pool, 12);
        fake.next(Call::Drop, (0..8).map(|_| Act::Block));
        checked_out.drain(..8).for_each(PooledConnection::discard);
        fake.wait_inside(Call::Drop, 8);
        drop(checked_out);
        let returned = Instant::now();
        assert!(wait_until(returned + max_idle + EPSILON, || fake.dropped() == 4), "{}", pool.connections());
        let late = pool.stats().max_lateness;
        assert!(late < slack(), "{late:?} late");
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
        // Twenty at once, all of which hang: four begin, eight when these have taken longer than usual (3 ms), then the
        // rest.
        drop(take(&pool, 20));
        fake.wait_inside(Call::Drop, 20);
        let late = pool.stats().max_lateness;
        assert!(late >= ms(6) && late < slack(), "{late:?}");
        fake.release(Call::Drop);
        ends_well(pool, &fake);
    });
}

/// `recycle` is for a server that failed: to close what led there may hang, and waiters need its place.
#[test]
fn after_a_recycle_whose_closes_hang_there_is_a_connection_soon() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).close_timeout(Duration::from_secs(5)).build(fake.r2d2()).unwrap();
        drop(take(&pool, 2));
        fake.set(Call::Drop, Act::Block);
        let begun = Instant::now();
        pool.recycle();
        let got = pool.get_timeout(SOON).unwrap();
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
        let checked_out = pool.get_timeout(SOON).unwrap();
        // The second open fails with the heavy error, the third hangs and is abandoned, which is the news then.
        let error = thread::scope(|s| {
            let waiter = s.spawn(|| pool.get_timeout(ms(150)).expect_err("fails, then hangs"));
            waiter.join().unwrap()
        });
        let dialled = || pool.manager().opens.load(Ordering::SeqCst) == 3;
        assert!(wait_until(Instant::now() + SOON, dialled));
        thread::spawn(move || drop(error)); // the pool has the last of it
        drop(checked_out);
        let returned = Instant::now();
        let evicted = || pool.state().idle_connections == 0;
        assert!(wait_until(returned + max_idle + EPSILON, evicted), "{}", pool.connections());
        assert!(pool.stats().max_lateness < slack(), "{}", pool.stats());
        assert!(pool.stats().abandonments > 0, "{}", pool.stats());
        over.store(true, Ordering::SeqCst);
        let report = pool.close(SOON);
        assert!(report.is_complete(), "{report}");
    });
}

/// One open fails (the server restarts), the next hangs (its packet is lost), and from then on the server is well.
#[test]
fn a_waiter_for_an_open_that_hangs_after_one_that_failed_gets_another() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).open_timeout(HOUR).build_unchecked(fake.r2d2());
        fake.next(Call::Open, [Act::Fail, Act::Block]);
        let begun = Instant::now();
        let got = pool.get_timeout(Duration::from_secs(5));
        let took = begun.elapsed();
        let stats = pool.stats();
        fake.release(Call::Open);
        assert!(got.is_ok(), "after {took:?}: {stats}");
        assert!(took < Duration::from_secs(2), "{took:?}");
    });
}

/// Sixty-four due at once, and the close of each hangs.
#[test]
fn however_many_closes_hang_all_that_are_due_begin_in_time() {
    watched_alone(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(64).parallel_opens(64).max_idle(ms(500)).close_timeout(SOON);
        let pool = builder.build(fake.r2d2()).unwrap();
        let checked_out = take(&pool, 64);
        fake.set(Call::Drop, Act::Block);
        drop(checked_out);
        fake.wait_inside(Call::Drop, 64);
        let late = pool.stats().max_lateness;
        fake.release(Call::Drop);
        assert!(late < slack(), "{late:?} late");
    });
}

/// None hangs, but each takes 5 ms, as a close over TLS does on a busy machine.
#[test]
fn however_many_are_due_at_once_the_closes_begin_in_time() {
    watched_alone(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(100).parallel_opens(64).max_idle(ms(500)).close_timeout(SOON);
        let pool = builder.build(fake.r2d2()).unwrap();
        let checked_out = take(&pool, 100);
        fake.set(Call::Drop, Act::Last(ms(5)));
        drop(checked_out);
        assert!(wait_until(Instant::now() + SOON, || fake.dropped() == 100));
        let late = pool.stats().max_lateness;
        assert!(late < slack(), "{late:?} late");
    });
}

/// The server behind all of them is gone, their closes hang, nobody waits; a minute later (here: at once) the new one
/// is well, and the pool as large as ever.
#[test]
fn after_a_recycle_whose_closes_were_all_abandoned_the_pool_is_whole() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(3).close_timeout(ms(200)).build(fake.r2d2()).unwrap();
        drop(take(&pool, 3));
        fake.set(Call::Drop, Act::Block);
        pool.recycle();
        assert!(wait_until(Instant::now() + SOON, || pool.stats().closing == 0));
        let begun = Instant::now();
        let checked_out: Vec<_> = (0..3).map(|_| pool.get_timeout(Duration::from_secs(5)).ok()).collect();
        let (n, stats) = (checked_out.iter().flatten().count(), pool.stats());
        drop(checked_out);
        fake.release(Call::Drop);
        assert_eq!(n, 3, "after {:?}: {stats}", begun.elapsed());
    });
}

/// Three checks hang at once (a short black-out), and are abandoned; then all is well.
#[test]
fn after_checks_that_hung_were_all_abandoned_the_pool_is_whole() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(3).validation_timeout(ms(300)).validate(Validate::Always);
        let pool = builder.build(fake.r2d2()).unwrap();
        drop(take(&pool, 3));
        fake.next(Call::Validate, [Act::Block, Act::Block, Act::Block]);
        let waiters: Vec<_> = (0..3).map(|_| (pool.clone(), ms(50))).collect();
        let waiters: Vec<_> = waiters.into_iter().map(|(p, t)| thread::spawn(move || drop(p.get_timeout(t)))).collect();
        waiters.into_iter().for_each(|w| w.join().unwrap());
        assert!(wait_until(Instant::now() + SOON, || pool.stats().abandoned >= 2 || pool.stats().checking == 0));
        thread::sleep(ms(400));
        let begun = Instant::now();
        let checked_out: Vec<_> = (0..3).map(|_| pool.get_timeout(Duration::from_secs(5)).ok()).collect();
        let (n, stats) = (checked_out.iter().flatten().count(), pool.stats());
        drop(checked_out);
        fake.release(Call::Validate);
        assert_eq!(n, 3, "after {:?}: {stats}", begun.elapsed());
    });
}

#[test]
fn one_open_at_a_time_that_hangs_keeps_nobody_from_another() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).parallel_opens(1).open_timeout(HOUR);
        let pool = builder.build_unchecked(fake.r2d2());
        fake.next(Call::Open, [Act::Block]);
        let got = pool.get_timeout(Duration::from_secs(5));
        let stats = pool.stats();
        fake.release(Call::Open);
        assert!(got.is_ok(), "{stats}");
    });
}

/// The first connect of the pool's life hangs, the second would not.
#[test]
fn a_build_whose_first_open_hangs_gets_another() {
    watched(|| {
        let fake = Fake::new();
        fake.next(Call::Open, [Act::Block]);
        let begun = Instant::now();
        let pool = Pool::builder().max_size(4).connection_timeout(Duration::from_secs(5)).build(fake.r2d2());
        fake.release(Call::Open);
        let took = begun.elapsed();
        assert!(pool.is_ok(), "after {took:?}: {}", pool.unwrap_err());
        assert!(took < Duration::from_secs(2), "{took:?}");
    });
}

/// Whatever of the user's hangs, what is idle goes in time.
#[test]
fn whatever_hangs_evictions_are_in_time() {
    watched_alone(|| {
        let calls = [
            Call::Open,
            Call::Validate,
            Call::Reset,
            Call::Close,
            Call::Drop,
            Call::HandleError,
            Call::HandleAcquire,
            Call::HandleRelease,
            Call::Explain,
            Call::ServerId,
            Call::Abort,
            Call::Cancel,
        ];
        for call in calls {
            let fake = Fake::new();
            fake.abortable(matches!(call, Call::Abort | Call::Cancel));
            let builder = Pool::builder().max_size(8).max_idle(ms(250)).validate(Validate::Always);
            let builder = builder.open_timeout(ms(100)).close_timeout(ms(100)).validation_timeout(ms(100));
            let builder = builder.error_handler(fake.error_handler()).event_handler(fake.event_handler());
            let pool = builder.build(fake.direct()).unwrap();
            let mut checked_out = take(&pool, 6);
            match call {
                Call::HandleError | Call::Explain => fake.next(Call::Validate, [Act::Fail]),
                Call::Abort => fake.next(Call::Validate, [Act::Block]),
                Call::Cancel => {
                    fake.verdict(millpond::Returned::Reset);
                    fake.next(Call::Reset, [Act::Block]);
                }
                Call::Reset => fake.verdict(millpond::Returned::Reset),
                _ => {}
            }
            fake.next(call, [Act::Block]);
            drop(checked_out.pop());
            fake.verdict(millpond::Returned::Keep);
            drop(pool.try_get());
            if matches!(call, Call::Close | Call::Drop | Call::HandleRelease) {
                PooledConnection::discard(checked_out.pop().unwrap());
            }
            if matches!(call, Call::Open | Call::HandleAcquire | Call::ServerId) {
                fake.next(Call::Validate, [Act::Fail]);
                drop(pool.get_timeout(ms(20)));
            }
            thread::sleep(ms(150));
            drop(checked_out);
            let begun = Instant::now();
            let gone = wait_until(begun + ms(250) + EPSILON, || pool.stats().idle == 0);
            let late = pool.stats().max_lateness;
            eprintln!("{call:?}: {late:?}, inside {}", fake.inside(call));
            assert!(gone && late < slack(), "{call:?}: {late:?} {}", pool.stats());
            fake.release(call);
            let report = pool.close(SOON);
            assert!(report.is_complete(), "{call:?}: {report}");
        }
    });
}

/// Beside closes that hang, of which as many were abandoned as there are slots, each connection that breaks is
/// replaced.
#[test]
fn beside_closes_that_hang_what_breaks_is_replaced() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(4).close_timeout(ms(300)).build(fake.r2d2()).unwrap();
    let checked_out: Vec<_> = (0..4).map(|_| pool.get().unwrap()).collect();
    drop(checked_out);
    fake.next(Call::Drop, (0..4).map(|_| Act::Block));
    pool.recycle();
    let until = Instant::now() + Duration::from_secs(3);
    let users: Vec<_> = (0..4)
        .map(|n| {
            let pool = pool.clone();
            thread::spawn(move || {
                let (mut ok, mut bad) = (0, 0);
                while Instant::now() < until {
                    match pool.get_timeout(ms(700)) {
                        Ok(c) => {
                            ok += 1;
                            thread::sleep(ms(5));
                            if n == 0 && ok % 50 == 0 {
                                PooledConnection::discard(c);
                            }
                        }
                        Err(_) => bad += 1,
                    }
                }
                (ok, bad)
            })
        })
        .collect();
    let served: Vec<(u32, u32)> = users.into_iter().map(|u| u.join().unwrap()).collect();
    let stats = pool.stats();
    fake.release(Call::Drop);
    assert!(served.iter().all(|s| s.1 == 0) && stats.size() == 4, "{served:?} {stats}");
}
