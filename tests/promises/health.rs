//! P8: what a probe is told. A full pool is busy, one in a black hole is stuck, one without a server is down, and each is
//! said within a second of its beginning.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, ends_well, take};
use crate::support::{Proxy, SEEN, SOON, Server, alone, beside_others, capture, logged, ms, slack, wait_until, within};
use log::Level;
use millpond::{Health, Pool, Validate};

/// Within what time a probe is right.
const RIGHT: Duration = ms(1_000);

#[track_caller]
fn becomes(pool: &Pool<impl millpond::Manage>, what: &str) {
    let begun = Instant::now();
    let is = wait_until(begun + RIGHT + slack(), || pool.health().as_str() == what);
    assert!(is, "{} and not {what}, after {:?}", pool.health(), begun.elapsed());
}

/// 64 threads on 4 connections: healthy, then in a black hole, then without a server, and then all of them gone.
#[cfg(feature = "postgres")]
#[test]
fn a_pool_on_its_way_through_faults() {
    let _alone = alone();
    let (server, app) = (Server::start(), "health-faults");
    let proxy = Proxy::to(server.addr());
    let pool = millpond::postgres::builder(&proxy.conninfo(app)).unwrap();
    let pool =
        pool.name("health").max_size(4).validate(Validate::AfterIdle(ms(100))).open_timeout(ms(5_000)).open().unwrap();
    assert!(matches!(pool.health(), Health::Ready), "{}", pool.health());
    let (over, pool) = (AtomicBool::new(false), &pool);
    thread::scope(|s| {
        for _ in 0..64 {
            s.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if let Ok(mut c) = pool.get_timeout(SOON) {
                        let _ = c.simple_query("SELECT pg_sleep(0.005)");
                    } else {
                        thread::sleep(ms(10));
                    }
                }
            });
        }
        becomes(pool, "busy");
        // Whatever is read while all is well, it is no reason to take the traffic away.
        let until = Instant::now() + ms(2_000);
        while Instant::now() < until {
            let health = pool.health();
            assert!(health.serves(), "{health}");
            thread::sleep(ms(1));
        }
        // Nothing gets through, and nobody is told.
        proxy.silent(true);
        proxy.pause();
        becomes(pool, "stuck");
        proxy.silent(false);
        proxy.resume();
        becomes(pool, "busy");
        // The server is gone.
        server.stop_fast();
        becomes(pool, "down");
        let Health::Down { cause, attempts, since, .. } = pool.health() else { panic!("{}", pool.health()) };
        assert!(attempts > 0 && since < RIGHT + slack(), "{attempts} in {since:?}");
        assert!(!cause.to_string().is_empty());
        server.start_again();
        becomes(pool, "busy");
        over.store(true, Ordering::Relaxed);
    });
    becomes(pool, "ready");
    let stats = pool.stats();
    assert!(stats.failing.is_none() && stats.last_error.is_some(), "{stats}");
    assert!(pool.close(SOON).is_complete());
    assert!(matches!(pool.health(), Health::Closed));
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

/// A probe that finds the pool down takes the traffic away. Then nobody wants a connection, and the probe itself has the
/// pool try again.
#[test]
fn a_probe_brings_a_pool_back_of_which_nobody_wants_anything() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().build_unchecked(fake.direct());
    fake.set(Call::Open, Act::Fail);
    let error = pool.get_timeout(ms(1)).unwrap_err();
    assert!(error.is_unavailable() && !error.is_exhausted(), "{error}");
    becomes(&pool, "down");
    fake.set(Call::Open, Act::Succeed);
    becomes(&pool, "ready");
    assert_eq!(pool.stats().checkouts, 0);
    ends_well(pool, &fake);
}

/// To look at the stats is to look.
#[test]
fn the_stats_ask_for_nothing() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().build_unchecked(fake.direct());
    fake.set(Call::Open, Act::Refuse);
    assert!(pool.get_timeout(SOON).unwrap_err().is_connect());
    let stats = pool.stats();
    assert!(!stats.health.serves() && stats.failing.is_some_and(|f| f.attempts == 1), "{stats}");
    assert_eq!(stats.failing.unwrap().next_try, None, "{stats}");
    assert_eq!(pool.stats().opening, 0);
    // The probe asks, and a refusal is not tried again before its time.
    assert!(!pool.health().serves());
    let failing = pool.stats().failing.unwrap();
    assert!(failing.next_try.is_some_and(|next| next > ms(1_000)), "{failing}");
    assert_eq!(fake.calls(Call::Open), 1);
    ends_well(pool, &fake);
}

#[test]
fn a_recovery_is_a_record() {
    let _beside = beside_others();
    let kept = capture();
    let fake = Fake::new();
    let pool = Pool::builder().name("recovers").build_unchecked(fake.direct());
    fake.next(Call::Open, [Act::Fail, Act::Fail]);
    drop(pool.get_timeout(SOON).unwrap());
    let recovered = || logged(|r| r.text.contains("'recovers'") && r.text.contains("connects again"));
    assert!(wait_until(within(SOON), || !recovered().is_empty()));
    let records = recovered();
    assert!(records.len() == 1 && records[0].level == Level::Info, "{records:?}");
    assert!(records[0].text.ends_with("and 2 failed attempts"), "{records:?}");
    drop(kept);
    ends_well(pool, &fake);
}

/// The p99 of what happened since, and not of the pool's life.
#[test]
fn what_happened_between_two_looks() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(2).build(fake.direct()).unwrap();
    fake.next(Call::Open, [Act::Last(ms(100))]);
    let all = take(&pool, 2);
    assert!(pool.get_timeout(ms(1)).unwrap_err().is_exhausted());
    drop(all);
    let before = pool.stats();
    assert_eq!((before.timeouts, before.left_time.count()), (1, 1), "{before}");
    drop(pool.get().unwrap());
    let recent = pool.stats().since(&before);
    assert_eq!((recent.checkouts, recent.timeouts, recent.opens, recent.waits), (1, 0, 0, 0), "{recent}");
    assert_eq!((recent.wait_time.count(), recent.usage_time.count(), recent.left_time.count()), (0, 1, 0));
    assert!(recent.idle == 2 && recent.age < pool.stats().age, "{recent}");
    assert_eq!(before.since(&pool.stats()).checkouts, 0, "the wrong way round");
    ends_well(pool, &fake);
}

/// A probe, however often it comes, costs the server no logins.
#[test]
fn many_looks_are_no_callers() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().build_unchecked(fake.direct());
    fake.set(Call::Open, Act::Refuse);
    assert!(pool.get_timeout(SOON).unwrap_err().is_connect());
    for _ in 0..10_000 {
        assert!(!pool.health().serves());
    }
    assert_eq!(fake.calls(Call::Open), 1, "a refusal is not tried again before its time");
    ends_well(pool, &fake);
}
