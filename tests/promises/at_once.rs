//! P3: `try_get` and a timeout of zero wait for nothing: at low traffic they are served as well, and they never get a
//! connection that is suspect.

use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, FakeConn, FakeError, ends_well, run, take};
use crate::support::{EPSILON, SOON, ms, wait_until, watched, watched_alone, within};
use millpond::{Builder, CloseReason, Manage, Pool, PooledConnection, Validate};

/// How long an unused connection is trusted here.
const WINDOW: Duration = ms(100);

/// Until nothing is trusted any more, by a clock that is behind as well.
fn pause() {
    thread::sleep(WINDOW + EPSILON);
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    TryGet,
    ZeroTimeout,
    NobodyWaits,
}

const WAYS: [Way; 3] = [Way::TryGet, Way::ZeroTimeout, Way::NobodyWaits];

impl Way {
    fn builder<M: Manage>(self) -> Builder<M> {
        let builder = Pool::builder().validate(Validate::AfterIdle(WINDOW));
        if self == Way::NobodyWaits { builder.max_waiting(0) } else { builder }
    }

    fn get<M: Manage>(self, pool: &Pool<M>) -> Option<PooledConnection<M>> {
        match self {
            Way::TryGet => pool.try_get(),
            Way::ZeroTimeout => pool.get_timeout(Duration::ZERO).ok(),
            Way::NobodyWaits => pool.get_timeout(SOON).ok(),
        }
    }
}

/// A pool of so many connections, all idle and not trusted any more.
fn stale<M: Manage>(builder: Builder<M>, manager: M, size: u32) -> Pool<M> {
    let pool = builder.max_size(size).min_idle(size).build(manager).unwrap();
    pause();
    pool
}

/// Connections that take longer to open and to check than a call that waits for nothing takes to look around.
fn slow() -> Fake {
    let fake = Fake::new();
    fake.set(Call::Open, Act::Last(ms(20)));
    fake.set(Call::Validate, Act::Last(ms(20)));
    fake
}

/// Calls six times, at a pace at which all that is idle has become stale before the next. How many were served?
fn six_calls<M: Manage<Connection = FakeConn, Error = FakeError>>(way: Way, pool: &Pool<M>) -> usize {
    let size = pool.max_size();
    let served = (0..6).map(|_| {
        let served = way.get(pool).is_some();
        // What was ordered is done.
        assert!(wait_until(within(SOON), || pool.stats().idle == size), "{}", pool.connections());
        pause();
        served
    });
    served.filter(|served| *served).count()
}

/// With a manager that can only ask the server, the first call finds nothing: it has a check made, which serves the
/// next.
#[test]
fn what_one_call_had_checked_serves_the_next_however_late() {
    let _beside = crate::support::beside_others();
    thread::scope(|s| {
        for way in WAYS {
            for (size, validate) in [(8, Validate::AfterIdle(WINDOW)), (1, Validate::AfterIdle(WINDOW))] {
                s.spawn(move || {
                    let fake = slow();
                    let pool = stale(way.builder().validate(validate), fake.r2d2(), size);
                    assert_eq!(six_calls(way, &pool), 5, "{way:?}, {size}: {}", pool.stats());
                    assert_eq!(fake.opened(), u64::from(size), "no other was opened for it");
                    ends_well(pool, &fake);
                });
            }
            // Every checkout is to have had a check of its own: by the call before, in vain.
            s.spawn(move || {
                let fake = slow();
                let pool = stale(way.builder().validate(Validate::Always), fake.r2d2(), 1);
                assert_eq!(six_calls(way, &pool), 3, "{way:?}, always: {}", pool.stats());
                assert_eq!(fake.calls(Call::Validate), 3);
                ends_well(pool, &fake);
            });
        }
    });
}

/// Those who can wait take nothing away from those who cannot.
#[test]
fn beside_callers_that_wait() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    let pool = stale(Way::TryGet.builder(), fake.r2d2(), 2);
    assert!(pool.try_get().is_none());
    for _ in 0..3 {
        assert!(wait_until(within(SOON), || pool.stats().idle == 2));
        drop(pool.get().unwrap());
        pause();
        assert!(pool.try_get().is_some(), "{}", pool.connections());
    }
    ends_well(pool, &fake);
}

/// The second of two who call side by side finds the check of the first under way, which is for both.
#[test]
fn two_calls_in_a_row_ask_once() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    let pool = stale(Way::TryGet.builder(), fake.r2d2(), 1);
    fake.set(Call::Validate, Act::Block);
    assert!(pool.try_get().is_none());
    fake.wait_inside(Call::Validate, 1);
    thread::sleep(EPSILON);
    assert!(pool.try_get().is_none());
    fake.release(Call::Validate);
    assert!(wait_until(within(SOON), || pool.stats().idle == 1));
    pause();
    assert!(pool.try_get().is_some());
    assert_eq!(fake.calls(Call::Validate), 1);
    ends_well(pool, &fake);
}

/// After a finding nothing of the past counts, whatever was asked for and by whom.
#[test]
fn what_was_checked_before_a_finding_serves_nobody() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let fake = slow();
        let pool = way.builder().max_size(2).min_idle(2).build(fake.r2d2()).unwrap();
        let other = pool.get().unwrap();
        pause();
        assert!(way.get(&pool).is_none(), "{way:?}: it has one checked");
        assert!(wait_until(within(SOON), || pool.stats().idle == 1));
        assert_eq!(fake.calls(Call::Validate), 1);
        fake.next(Call::Returned, [Act::Fail]);
        drop(other);
        assert_eq!(pool.stats().closed_for(CloseReason::Broken), 1);
        assert!(way.get(&pool).is_none(), "{way:?}: it was proven before its sibling was found dead");
        ends_well(pool, &fake);
    }
}

/// A manager that can look at a connection without asking the server: every call is served, and nothing is asked.
#[test]
fn a_look_is_enough_for_what_is_only_stale() {
    let _beside = crate::support::beside_others();
    thread::scope(|s| {
        for way in [Way::TryGet, Way::ZeroTimeout] {
            s.spawn(move || {
                let fake = slow();
                fake.peeks(true);
                let pool = stale(way.builder(), fake.direct(), 8);
                assert_eq!(six_calls(way, &pool), 6, "{way:?}: {}", pool.stats());
                assert_eq!((fake.calls(Call::Peek), fake.calls(Call::Validate)), (6, 0));
                // Not so where every checkout is to be preceded by a check...
                let strict = stale(way.builder().validate(Validate::Always), fake.direct(), 1);
                assert!(way.get(&strict).is_none());
                ends_well(strict, &Fake::new());
                // ... nor for what is under suspicion.
                fake.next(Call::Returned, [Act::Fail]);
                drop(pool.get().unwrap());
                assert!(way.get(&pool).is_none(), "{way:?}: a look proves nothing of a server that is silent");
                assert_eq!(fake.calls(Call::Peek), 6);
                ends_well(pool, &fake);
            });
        }
    });
}

#[test]
fn one_that_is_seen_to_be_dead_goes_and_its_siblings_are_suspect() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    fake.peeks(true);
    let builder = Way::TryGet.builder().error_handler(fake.error_handler());
    // Without a floor, which would open another at once.
    let pool = builder.build(fake.direct()).unwrap();
    drop([0; 3].map(|_| pool.get().unwrap()));
    pause();
    fake.next(Call::Peek, [Act::Fail]);
    fake.set(Call::Validate, Act::Block);
    fake.set(Call::Open, Act::Block); // one that is newly opened would serve
    assert!(pool.try_get().is_none());
    assert_eq!((pool.stats().closed_for(CloseReason::Invalid), fake.calls(Call::HandleError)), (1, 1));
    // After one that failed two are checked where one is wanted.
    fake.wait_inside(Call::Validate, 2);
    assert!(pool.try_get().is_none());
    assert_eq!(fake.calls(Call::Peek), 1, "the others are asked, not looked at");
    fake.release(Call::Validate);
    fake.release(Call::Open);
    assert!(wait_until(within(SOON), || pool.try_get().is_some()), "{}\n{}", pool.stats(), pool.connections());

    // A panic in it costs that one.
    pause();
    let before = pool.stats().closed_for(CloseReason::Panicked);
    fake.next(Call::Peek, [Act::Panic]);
    assert!(wait_until(within(SOON), || {
        drop(pool.try_get());
        pool.stats().closed_for(CloseReason::Panicked) == before + 1
    }));
    ends_well(pool, &fake);
}

/// It is called without the pool's lock: it may use the pool, and take its time.
#[test]
fn a_look_may_use_the_pool() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    fake.peeks(true);
    let pool = stale(Way::TryGet.builder(), fake.direct(), 1);
    let of_hook = pool.clone();
    fake.next(Call::Peek, [run(move || assert_eq!(of_hook.stats().checking, 1))]);
    assert!(pool.try_get().is_some());
    // Meanwhile the pool is closed: then it is not had.
    pause();
    let of_hook = pool.clone();
    fake.next(Call::Peek, [run(move || drop(of_hook.close(SOON)))]);
    assert!(pool.try_get().is_none());
    ends_well(pool, &fake);
}

/// A pool with nothing in it: what was asked for is opened, though nobody waits for it.
#[test]
fn what_a_zero_timeout_had_opened_serves_the_next() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let fake = slow();
        let pool = way.builder().build_unchecked(fake.r2d2());
        for _ in 0..5 {
            assert!(way.get(&pool).is_none());
            assert!(wait_until(within(SOON), || pool.stats().idle == 1), "{way:?}: {}", pool.stats());
            pause();
            let client = way.get(&pool).unwrap_or_else(|| panic!("{way:?}: {}", pool.stats()));
            PooledConnection::discard(client);
            assert!(wait_until(within(SOON), || pool.stats().size() == 0));
        }
        ends_well(pool, &fake);
    }
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

/// "Zero is the same as `Always`": "with `Validate::Always` each use has a validation of its own".
#[test]
fn after_idle_for_no_time_is_always() {
    watched(|| {
        for validate in [Validate::Always, Validate::AfterIdle(Duration::ZERO)] {
            let fake = Fake::new();
            let pool = Pool::builder().max_size(1).validate(validate).build(fake.r2d2()).unwrap();
            for _ in 0..20 {
                let mut got = None;
                assert!(wait_until(Instant::now() + SOON, || {
                    got = pool.try_get();
                    got.is_some()
                }));
            }
            let (uses, checks) = (pool.stats().checkouts, fake.calls(Call::Validate));
            assert!(checks + 1 >= uses, "{validate:?}: {uses} uses, {checks} checks");
        }
    });
}

/// Sixty-four that wait for a millisecond each, for one connection that needs a check.
#[test]
fn many_that_wait_for_a_millisecond_lose_nothing() {
    watched_alone(|| {
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

/// At low traffic, for callers that cannot wait, and for all.
#[test]
fn low_traffic_is_served_at_once() {
    watched(|| {
        for validate in [Validate::AfterIdle(ms(50)), Validate::Never, Validate::Always] {
            for way in ["try_get", "zero", "1 ms", "mixed"] {
                let fake = Fake::new();
                let builder = Pool::builder().max_size(8).validate(validate).max_idle(None).max_lifetime(None);
                let pool = builder.build(fake.r2d2()).unwrap();
                drop(take(&pool, 8));
                let mut ok = 0;
                for i in 0..8 {
                    thread::sleep(ms(120));
                    ok += u32::from(match (way, i % 3) {
                        ("try_get", _) | ("mixed", 0) => pool.try_get().is_some(),
                        ("zero", _) | ("mixed", 1) => pool.get_timeout(Duration::ZERO).is_ok(),
                        _ => pool.get_timeout(ms(1)).is_ok(),
                    });
                }
                eprintln!("{validate:?}, {way}: {ok} of 8");
                assert!(ok >= if validate == Validate::Always { 3 } else { 6 }, "{validate:?} {way}: {ok}");
            }
        }
    });
}

/// Nobody may wait, each use needs a check: a caller that comes again and again is served.
#[test]
fn where_nobody_waits_everybody_is_served_in_time() {
    let _beside = crate::support::beside_others();
    for validate in [Validate::AfterIdle(ms(1)), Validate::Always, Validate::Never] {
        for (users, way) in [(1, "get"), (6, "get"), (1, "try_get"), (6, "try_get"), (6, "zero")] {
            let fake = Fake::new();
            let mut builder = Pool::builder().max_size(3).validate(validate);
            if way == "get" {
                builder = builder.max_waiting(0);
            }
            let pool = builder.build(fake.r2d2()).unwrap();
            fake.set(Call::Validate, Act::Last(ms(1)));
            let until = Instant::now() + ms(1000);
            let threads: Vec<_> = (0..users)
                .map(|_| {
                    let pool = pool.clone();
                    thread::spawn(move || {
                        let mut n = 0;
                        while Instant::now() < until {
                            let got = match way {
                                "get" => pool.get().ok(),
                                "try_get" => pool.try_get(),
                                _ => pool.get_timeout(Duration::ZERO).ok(),
                            };
                            n += u32::from(got.is_some());
                            drop(got);
                            thread::sleep(ms(2));
                        }
                        n
                    })
                })
                .collect();
            let served: Vec<u32> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            // (Who does not wait has no place in a queue: of several that come again and again each gets what it
            // meets.)
            let all: u32 = served.iter().sum();
            assert!(all > 5 * users, "{validate:?} {way} {users}: {served:?} {}", pool.stats());
        }
    }
}
