//! Hard use, each with what it must not come to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, run};
use crate::support::{EPSILON, ms, wait_until, watched};
use millpond::{Manage, Pool, PooledConnection, Validate};

const HOUR: Duration = Duration::from_secs(3600);
const LONG: Duration = Duration::from_secs(10);

#[track_caller]
fn ends_well<M: Manage>(pool: Pool<M>, fake: &Fake) {
    let report = pool.close(LONG);
    assert!(report.is_complete(), "{report}");
    assert_eq!(fake.alive(), 0);
}

fn take<M: Manage>(pool: &Pool<M>, n: usize) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get_timeout(LONG).unwrap()).collect()
}

/// One open fails (the server restarts), the next hangs (its packet is lost), and from then on the server is well.
#[test]
fn who_waits_for_an_open_that_hangs_after_one_that_failed_gets_another() {
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

/// A ping takes longer than a caller at low traffic waits: what one had checked in vain serves the next.
#[test]
fn what_a_short_wait_had_checked_serves_the_next() {
    watched(|| {
        for validate in [Validate::AfterIdle(ms(50)), Validate::Always] {
            let fake = Fake::new();
            let builder = Pool::builder().max_size(4).max_idle(None).max_lifetime(None).validate(validate);
            let pool = builder.build(fake.r2d2()).unwrap();
            fake.set(Call::Validate, Act::Last(ms(20)));
            let mut ok = 0;
            for _ in 0..8 {
                thread::sleep(ms(150));
                ok += u32::from(pool.get_timeout(ms(5)).is_ok());
            }
            assert!(ok >= 3, "{validate:?}: {ok} of 8, {}", pool.stats());
        }
    });
}

/// Sixty-four due at once, and the close of each hangs.
#[test]
fn however_many_closes_hang_all_that_are_due_begin_in_time() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(64).parallel_opens(64).max_idle(ms(500)).close_timeout(LONG);
        let pool = builder.build(fake.r2d2()).unwrap();
        let held = take(&pool, 64);
        fake.set(Call::Drop, Act::Block);
        drop(held);
        fake.wait_inside(Call::Drop, 64);
        let late = pool.stats().max_lateness;
        fake.release(Call::Drop);
        assert!(late < EPSILON, "{late:?} late");
    });
}

/// None hangs, but each takes 5 ms, as a close over TLS does on a busy machine.
#[test]
fn however_many_are_due_at_once_the_closes_begin_in_time() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(100).parallel_opens(64).max_idle(ms(500)).close_timeout(LONG);
        let pool = builder.build(fake.r2d2()).unwrap();
        let held = take(&pool, 100);
        fake.set(Call::Drop, Act::Last(ms(5)));
        drop(held);
        assert!(wait_until(Instant::now() + LONG, || fake.dropped() == 100));
        let late = pool.stats().max_lateness;
        assert!(late < EPSILON, "{late:?} late");
    });
}

/// Two hooks on two threads of the crew, each of which closes the pool.
#[test]
fn two_hooks_that_close_do_not_wait_for_each_other() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).customizer(&fake).build(fake.r2d2()).unwrap();
        let held = take(&pool, 2);
        let gate = Arc::new(std::sync::Barrier::new(2));
        let reports = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (p, g, r) = (pool.clone(), gate, Arc::clone(&reports));
        fake.set(
            Call::OnRelease,
            run(move || {
                g.wait();
                let report = p.close(Duration::from_secs(3));
                r.lock().unwrap().push(report);
            }),
        );
        held.into_iter().for_each(PooledConnection::discard);
        assert!(wait_until(Instant::now() + LONG, || reports.lock().unwrap().len() == 2));
        fake.release(Call::OnRelease);
        let reports = reports.lock().unwrap();
        assert!(reports.iter().all(|r| r.elapsed < Duration::from_secs(1)), "{reports:#?}");
    });
}

trait Hook<M: Manage> {
    fn customizer(self, fake: &Fake) -> Self;
}

impl<M: Manage<Connection = crate::fake::FakeConn, Error = crate::fake::FakeError>> Hook<M> for millpond::Builder<M> {
    fn customizer(self, fake: &Fake) -> Self {
        self.connection_customizer(fake.customizer())
    }
}

/// The shortest lifetime that is accepted, of which a coarse clock leaves nothing, and a server that takes 3 ms to answer.
#[test]
fn one_that_is_too_old_when_it_arrives_says_so() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).max_lifetime(ms(10)).connection_timeout(Duration::from_secs(2));
        fake.set(Call::Open, Act::Last(ms(3)));
        let pool = builder.build_unchecked(fake.r2d2());
        let got = pool.get();
        let error = got.unwrap_err().to_string();
        assert!(error.contains("when its life of at most 10.0 ms was over or about to be"), "{error}");
    });
}

/// "Zero is the same as `Always`": "with `Validate::Always` each use has a validation of its own".
#[test]
fn after_idle_for_no_time_is_always() {
    watched(|| {
        for validate in [Validate::Always, Validate::AfterIdle(Duration::ZERO)] {
            let fake = Fake::new();
            let pool = Pool::builder().max_size(1).validate(validate).build(fake.r2d2()).unwrap();
            for _ in 0..20 {
                let mut got = None;
                assert!(wait_until(Instant::now() + LONG, || {
                    got = pool.try_get();
                    got.is_some()
                }));
            }
            let (uses, checks) = (pool.stats().checkouts, fake.calls(Call::Validate));
            assert!(checks + 1 >= uses, "{validate:?}: {uses} uses, {checks} checks");
        }
    });
}

/// As short as they come, on an empty pool: some day there is a connection.
#[test]
fn the_shortest_waits_get_a_connection_opened() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).build_unchecked(fake.r2d2());
        for n in 0.. {
            if pool.get_timeout(Duration::from_nanos(1)).is_ok() {
                eprintln!("after {n}");
                break;
            }
            assert!(n < 200, "{}", pool.stats());
            thread::sleep(ms(10));
        }
    });
}

/// The server behind all of them is gone, their closes hang, nobody waits; a minute later (here: at once) the new one is
/// well, and the pool as large as ever.
#[test]
fn after_a_recycle_whose_closes_were_all_given_up_the_pool_is_whole() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(3).close_timeout(ms(200)).build(fake.r2d2()).unwrap();
        drop(take(&pool, 3));
        fake.set(Call::Drop, Act::Block);
        pool.recycle();
        assert!(wait_until(Instant::now() + LONG, || pool.stats().closing == 0));
        let begun = Instant::now();
        let held: Vec<_> = (0..3).map(|_| pool.get_timeout(Duration::from_secs(5)).ok()).collect();
        let (n, stats) = (held.iter().flatten().count(), pool.stats());
        drop(held);
        fake.release(Call::Drop);
        assert_eq!(n, 3, "after {:?}: {stats}", begun.elapsed());
    });
}

/// Three checks hang at once (a short black-out), and are given up; then all is well.
#[test]
fn after_checks_that_hung_were_all_given_up_the_pool_is_whole() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(3).validation_timeout(ms(300)).validate(Validate::Always);
        let pool = builder.build(fake.r2d2()).unwrap();
        drop(take(&pool, 3));
        fake.next(Call::Validate, [Act::Block, Act::Block, Act::Block]);
        let waiters: Vec<_> = (0..3).map(|_| (pool.clone(), ms(50))).collect();
        let waiters: Vec<_> = waiters.into_iter().map(|(p, t)| thread::spawn(move || drop(p.get_timeout(t)))).collect();
        waiters.into_iter().for_each(|w| w.join().unwrap());
        assert!(wait_until(Instant::now() + LONG, || pool.stats().abandoned >= 2 || pool.stats().checking == 0));
        thread::sleep(ms(400));
        let begun = Instant::now();
        let held: Vec<_> = (0..3).map(|_| pool.get_timeout(Duration::from_secs(5)).ok()).collect();
        let (n, stats) = (held.iter().flatten().count(), pool.stats());
        drop(held);
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

/// One user whose connections all come back broken, and others that work.
#[test]
fn one_whose_connections_all_break_does_not_starve_the_others() {
    watched(|| {
        for validate in [Validate::AfterIdle(Duration::from_secs(1)), Validate::Always] {
            let fake = Arc::new(Fake::new());
            let builder = Pool::builder().max_size(4).validate(validate);
            let pool = builder.build(fake.direct()).unwrap();
            fake.set(Call::Open, Act::Last(ms(3)));
            fake.set(Call::Validate, Act::Last(ms(3)));
            let stop = Arc::new(AtomicBool::new(false));
            let spoilers: Vec<_> = (0..2)
                .map(|_| {
                    let (pool, stop, broken) = (pool.clone(), Arc::clone(&stop), Arc::clone(&fake));
                    thread::spawn(move || {
                        while !stop.load(SeqCst) {
                            if let Ok(c) = pool.get_timeout(ms(200)) {
                                // (Another's may get it: one is as good as the other.)
                                broken.next(Call::Returned, [Act::Fail]);
                                drop(c);
                            }
                        }
                    })
                })
                .collect();
            let users: Vec<_> = (0..4)
                .map(|_| {
                    let (pool, stop) = (pool.clone(), Arc::clone(&stop));
                    thread::spawn(move || {
                        let (mut ok, mut bad) = (0, 0);
                        while !stop.load(SeqCst) {
                            match pool.get_timeout(ms(500)) {
                                Ok(_) => {
                                    ok += 1;
                                    thread::sleep(ms(1));
                                }
                                Err(_) => bad += 1,
                            }
                        }
                        (ok, bad)
                    })
                })
                .collect();
            thread::sleep(Duration::from_secs(2));
            stop.store(true, SeqCst);
            let served: Vec<(u32, u32)> = users.into_iter().map(|u| u.join().unwrap()).collect();
            spoilers.into_iter().for_each(|s| s.join().unwrap());
            eprintln!("{validate:?}: {served:?} {}", pool.stats());
            assert!(served.iter().all(|&(ok, bad)| ok > 20 && bad == 0), "{served:?}");
            ends_well(pool, &fake);
        }
    });
}

/// Sixty-four that wait for a millisecond each, for one connection that needs a check.
#[test]
fn many_that_wait_for_a_millisecond_lose_nothing() {
    watched(|| {
        for (validate, takes) in [
            (Validate::Always, ms(0)),
            (Validate::Always, ms(2)),
            (Validate::AfterIdle(ms(1)), ms(2)),
            (Validate::Never, ms(0)),
        ] {
            for size in [1, 3] {
                let fake = Fake::new();
                let pool = Pool::builder().max_size(size).validate(validate).build(fake.r2d2()).unwrap();
                fake.set(Call::Validate, Act::Last(takes));
                let until = Instant::now() + ms(300);
                let users: Vec<_> = (0..64)
                    .map(|_| {
                        let pool = pool.clone();
                        thread::spawn(move || {
                            let (mut ok, mut late) = (0u32, Duration::ZERO);
                            while Instant::now() < until {
                                let begun = Instant::now();
                                ok += u32::from(pool.get_timeout(ms(1)).is_ok());
                                late = late.max(begun.elapsed());
                            }
                            (ok, late)
                        })
                    })
                    .collect();
                let all: Vec<_> = users.into_iter().map(|u| u.join().unwrap()).collect();
                let served: u32 = all.iter().map(|a| a.0).sum();
                let late = all.iter().map(|a| a.1).max().unwrap();
                assert!(served > 20, "{late:?} the longest: {}", pool.stats());
                let stats = pool.stats();
                assert!(stats.waiting == 0 && stats.in_use == 0 && fake.most_alive() <= u64::from(size), "{stats}");
                drop(take(&pool, size as usize));
                ends_well(pool, &fake);
            }
        }
    });
}
