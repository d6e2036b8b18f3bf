//! P1 and P2: the floor stands: `min_idle` connections are ready, whatever `max_idle` is; keeping them costs no opens;
//! and those that are closed are replaced unasked.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::stock::{Manager, SEEN, SOON, Use, burst, finish, manager, pid, take, use_one};
use crate::support::{Database, EPSILON, beside_others, ms, slack, sleep_until, wait_until};
use millpond::{Builder, CloseReason, Pool, PooledConnection, Validate};

const FLOOR: u32 = 4;
const MAX_IDLE: Duration = ms(300);

fn pool() -> Builder<Manager> {
    Pool::builder().max_size(10).min_idle(FLOOR).max_idle(MAX_IDLE)
}

/// The backends that the server has under this name.
fn pids(app: &str) -> BTreeSet<i32> {
    Database::get().backends(app).iter().map(|backend| backend.pid).collect()
}

#[test]
fn no_churn_in_silence() {
    let _beside = beside_others();
    let pool = pool().build(manager("floor-silence")).unwrap();
    let watch = Database::get().watch("floor-silence");
    assert_eq!(pool.state().idle_connections, FLOOR, "`build` returns when the floor stands");
    let start = Instant::now();
    sleep_until(start + MAX_IDLE * 10 + EPSILON);

    let seen = watch.end();
    assert!(seen.0.iter().all(|sample| sample.count() == 4), "{}", seen.counts(start));
    assert_eq!(seen.pids().len(), 4, "the same ones all the time");
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes), (4, 0), "{stats}");
    finish(pool, "floor-silence");
}

#[test]
fn no_churn_under_a_trickle() {
    let _beside = beside_others();
    let pool = pool().build(manager("floor-trickle")).unwrap();
    let watch = Database::get().watch("floor-trickle");
    let start = Instant::now();
    let mut last = use_one(&pool);
    for tick in 1..=(MAX_IDLE * 10).as_millis() as u32 / 50 {
        sleep_until(start + ms(50) * tick);
        last = use_one(&pool);
    }
    assert!(pool.stats().opens <= 5, "{}", pool.stats());

    // Then silence: of the five the floor stays.
    sleep_until(last.after + MAX_IDLE + EPSILON);
    assert_eq!(Database::get().wait_for("floor-trickle", 4, last.after + MAX_IDLE + SEEN), 4);
    sleep_until(last.after + MAX_IDLE * 3);

    let seen = watch.end();
    assert!(seen.0.iter().all(|sample| (4..=5).contains(&sample.count())), "{}", seen.counts(start));
    assert!(seen.pids().len() <= 5, "{}", seen.counts(start));
    let stats = pool.stats();
    assert!(stats.opens <= 5 && stats.closes <= 1 && stats.idle == 4, "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "floor-trickle");
}

#[test]
fn a_burst_goes_back_to_the_floor() {
    let _beside = beside_others();
    let pool = pool().build(manager("floor-burst")).unwrap();
    let watch = Database::get().watch("floor-burst");
    let uses = burst(&pool, 10);
    let last = uses[9].after;
    assert_eq!(Database::get().count("floor-burst"), 10);
    sleep_until(last + MAX_IDLE * 3);

    let seen = watch.end();
    let early = |one: &Use| one.before + MAX_IDLE - EPSILON;
    assert!(seen.between(last, early(&uses[0])).all(|sample| sample.count() == 10), "{}", seen.counts(last));
    assert!(seen.after(last + MAX_IDLE + SEEN).all(|sample| sample.count() == 4), "{}", seen.counts(last));
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes, stats.closed_for(CloseReason::Idle)), (10, 6, 6), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "floor-burst");
}

#[test]
fn what_is_checked_out_is_replaced() {
    let _beside = crate::support::beside_others();
    let pool = pool().build(manager("floor-taken")).unwrap();
    let stands_without = |backend: i32| {
        let now = pids("floor-taken");
        now.len() == 4 && !now.contains(&backend) && pool.state().idle_connections == FLOOR
    };

    let mut conn = pool.get().unwrap();
    let gone = pid(&mut conn);
    PooledConnection::discard(conn);
    assert!(wait_until(Instant::now() + SOON, || stands_without(gone)), "{}", pool.stats());

    let mut own = PooledConnection::detach(pool.get().unwrap());
    let gone = pid(&mut own);
    assert!(wait_until(Instant::now() + SOON, || pool.state().idle_connections == FLOOR), "{}", pool.stats());
    assert!(pids("floor-taken").contains(&gone), "it lives on, on its own");
    drop(own);
    assert!(wait_until(Instant::now() + SOON, || stands_without(gone)), "{}", pool.stats());
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes, stats.detached), (6, 1, 1), "{stats}");
    finish(pool, "floor-taken");
}

#[test]
fn the_killed_are_found_and_replaced_unasked() {
    let _beside = beside_others();
    let pool = pool().keepalive(ms(100)).build(manager("floor-killed")).unwrap();
    let server = Database::get();
    let before = pids("floor-killed");
    assert_eq!(server.terminate("floor-killed"), 4);
    // Nobody asks for a connection: keepalive finds the dead, and the floor is refilled.
    let restored = || {
        let now = pids("floor-killed");
        now.len() == 4 && now.is_disjoint(&before) && pool.state().idle_connections == 4
    };
    assert!(wait_until(Instant::now() + SOON, restored), "{}", pool.stats());
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Invalid), stats.checkouts), (8, 4, 0), "{stats}");
    finish(pool, "floor-killed");
}

#[test]
fn the_killed_are_replaced_before_anybody_gets_one() {
    let _beside = crate::support::beside_others();
    let pool = Pool::builder().max_size(FLOOR).min_idle(FLOOR).validate(Validate::Always);
    let pool = pool.build(manager("floor-checked")).unwrap();
    let server = Database::get();
    for _ in 0..3 {
        let before = pids("floor-checked");
        assert_eq!(server.terminate("floor-checked"), 4);
        assert_eq!(server.wait_for("floor-checked", 0, Instant::now() + SOON), 0);
        // All of them are asked for, so all of them are found.
        let now: BTreeSet<i32> = take(&pool, 4).iter_mut().map(|conn| pid(conn)).collect();
        assert!(now.is_disjoint(&before));
        assert!(wait_until(Instant::now() + SOON, || pids("floor-checked") == now));
    }
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Invalid), stats.idle), (16, 12, 4), "{stats}");
    finish(pool, "floor-checked");
}
