//! `try_get` and a timeout of zero on PostgreSQL: a look at what has arrived tells a connection that is well from one
//! that the server has ended, without a word to the server.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Database, EPSILON, Proxy, SOON, Server, alone, ms, slack, wait_until, within};
use millpond::postgres::{Pool, PostgresManager};
use millpond::{CloseReason, Validate};
use postgres::NoTls;

/// How long an unused connection is trusted here.
const WINDOW: Duration = ms(50);

/// Until nothing is trusted any more, by a clock that is behind as well.
fn pause() {
    thread::sleep(WINDOW + EPSILON);
}

/// A pool of so many connections, all idle and not trusted any more.
fn stale(params: &str, observe: bool, size: u32) -> Pool {
    let manager = PostgresManager::parse(params, NoTls).unwrap().observe(observe);
    let pool = manager.builder().max_size(size).validate(Validate::AfterIdle(WINDOW)).open().unwrap();
    let all: Vec<_> = (0..size).map(|_| pool.get().unwrap()).collect();
    drop(all);
    assert!(wait_until(within(SOON), || pool.stats().idle == size));
    pause();
    pool
}

fn number(pool: &Pool) -> Option<i32> {
    let mut client = pool.try_get()?;
    Some(client.query_one("SELECT 42", &[]).expect("a connection that works").get(0))
}

#[test]
fn every_call_is_served_and_the_server_hears_nothing_of_it() {
    let _alone = alone();
    let app = "at-once-served";
    let proxy = Proxy::to(Server::shared().addr());
    let pool = stale(&proxy.conninfo(app), true, 8);
    for _ in 0..6 {
        assert_eq!(number(&pool), Some(42), "{}", pool.stats());
        pause();
    }
    // Nothing comes back from there any more, and nobody waits for it.
    proxy.pause();
    let began = Instant::now();
    let some = [pool.try_get(), pool.get_timeout(Duration::ZERO).ok()];
    let took = began.elapsed();
    assert!(some.iter().all(Option::is_some) && took <= slack(), "{took:?}: {}", pool.stats());
    proxy.resume();
    drop(some);
    assert!(pool.close(SOON).is_complete());
    assert_eq!(Server::shared().wait_for(app, 0, within(SOON)), 0);
}

#[test]
fn one_that_the_server_has_ended_is_not_handed_out() {
    let _beside = crate::support::beside_others();
    let app = "at-once-ended";
    let unix = Server::shared();
    for (params, server) in [(Database::get().conninfo(app), Database::get()), (unix.unix_conninfo(app), &**unix)] {
        let pool = stale(&params, true, 3);
        assert_eq!(server.terminate(app), 3);
        assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
        assert!(pool.try_get().is_none(), "the first is seen to be dead, and the others are suspect");
        // (And looked at for the next call, on other threads.)
        assert!(pool.stats().closed_for(CloseReason::Invalid) >= 1);
        let mut served = None;
        assert!(wait_until(within(SOON), || {
            served = number(&pool);
            served.is_some()
        }));
        assert_eq!(served, Some(42));
        assert!(pool.close(SOON).is_complete());
    }
}

/// However often one looks at a healthy connection, it is healthy, whatever it hears meanwhile, and works as before.
#[test]
fn looking_does_no_harm() {
    let _beside = crate::support::beside_others();
    looks_often(&Database::get().conninfo("at-once-often"), Database::get());
    looks_often(&Server::shared().unix_conninfo("at-once-often"), Server::shared());
}

fn looks_often(params: &str, server: &Database) {
    let manager = PostgresManager::parse(params, NoTls).unwrap();
    // So short that it has passed whenever one looks again, but not zero, which is always.
    let builder = manager.builder().max_size(1).validate(Validate::AfterIdle(Duration::from_nanos(1)));
    let pool = builder.open().unwrap();
    pool.get().unwrap().batch_execute("LISTEN at_once").unwrap();
    let mut other = server.connect();
    let began = Instant::now();
    for i in 0..3000 {
        let served = pool.try_get();
        assert!(served.is_some(), "the {i}th time: {}", pool.stats());
        drop(served);
        if i % 100 == 0 {
            other.batch_execute("NOTIFY at_once, 'something'; NOTIFY at_once, 'more'").unwrap();
            assert_eq!(number(&pool), Some(42));
        }
    }
    println!("{:?} each", began.elapsed() / 3000);
    assert_eq!((pool.stats().opens, pool.stats().closes), (1, 0), "{}", pool.stats());
    assert!(pool.close(SOON).is_complete());
}

/// Where nothing can be seen, one call has a check made that serves the next.
#[test]
fn unobserved_the_next_call_is_served() {
    let _beside = crate::support::beside_others();
    let pool = stale(&format!("{}?application_name=at-once-blind", Server::shared().url()), false, 2);
    assert_eq!(number(&pool), None);
    for _ in 0..3 {
        assert!(wait_until(within(SOON), || pool.stats().idle == 2));
        pause();
        assert_eq!(number(&pool), Some(42), "{}", pool.stats());
    }
    assert!(pool.close(SOON).is_complete());
}
