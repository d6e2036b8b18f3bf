//! P1: idle means idle. A connection unused for `max_idle` is closed then, not at some tick after it; all of them, not
//! one at a time; and a trickle of work keeps one of them, not all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::stock::{Manager, SEEN, SOON, Use, assert_gone, burst, finish, manager, pid, take, use_one};
use crate::support::{Database, EPSILON, History, alone, beside_others, ms, slack, sleep_until, wait_until};
use millpond::{Builder, CloseReason, Pool};

const MAX_IDLE: Duration = Duration::from_secs(2);

fn pool(max_size: u32) -> Builder<Manager> {
    Pool::builder().max_size(max_size).max_idle(MAX_IDLE)
}

/// Each of these went `max_idle` after its last use: not before, and not later than ε.
fn assert_each_in_time(seen: &History, uses: &[Use], max_idle: Duration) {
    for one in uses {
        let (there, gone) = seen.gone(one.pid);
        let late = there.saturating_duration_since(one.after + max_idle);
        assert!(late < SEEN, "backend {} is still there {late:?} after its time", one.pid);
        let early = (one.before + max_idle).saturating_duration_since(gone);
        assert!(early < slack(), "backend {} is gone {early:?} before its time", one.pid);
    }
}

#[test]
fn a_burst_then_silence() {
    let _beside = beside_others();
    let pool = pool(17).build(manager("silence")).unwrap();
    let watch = Database::get().watch("silence");

    let uses = burst(&pool, 17);
    let last = uses[16].after;
    assert_eq!(Database::get().count("silence"), 17);
    assert!(wait_until(last + MAX_IDLE + EPSILON, || pool.state().connections == 0), "{}", pool.stats());
    assert_eq!(Database::get().wait_for("silence", 0, last + MAX_IDLE + SEEN), 0);

    let seen = watch.end();
    assert_eq!(seen.pids().len(), 17);
    assert_each_in_time(&seen, &uses, MAX_IDLE);
    // In one pass: the last of them right behind the first.
    let first_gone = uses.iter().map(|one| seen.gone(one.pid).0).min().unwrap();
    let last_seen = uses.iter().map(|one| seen.gone(one.pid).0).max().unwrap();
    let spread = last.duration_since(uses[0].before);
    assert!(last_seen - first_gone < spread + SEEN, "{}", seen.counts(last));
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes, stats.closed_for(CloseReason::Idle)), (17, 17, 17), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "silence");
}

#[test]
fn each_at_its_own_time() {
    let _beside = beside_others();
    const SHORT: Duration = ms(700);
    let pool = pool(5).max_idle(SHORT).build(manager("staggered")).unwrap();
    let mut conns = take(&pool, 5);
    let pids: Vec<i32> = conns.iter_mut().map(|conn| pid(conn)).collect();
    let watch = Database::get().watch("staggered");

    let start = Instant::now();
    let mut uses = Vec::new();
    for (i, (conn, pid)) in conns.into_iter().zip(pids).enumerate() {
        sleep_until(start + ms(130) * i as u32);
        let before = Instant::now();
        drop(conn);
        uses.push(Use { pid, before, after: Instant::now() });
    }
    assert!(wait_until(uses[4].after + SHORT + EPSILON, || pool.state().connections == 0), "{}", pool.stats());
    assert_gone("staggered");
    assert_each_in_time(&watch.end(), &uses, SHORT);
    assert!(pool.stats().max_lateness < slack(), "{}", pool.stats());
    finish(pool, "staggered");
}

#[test]
fn a_burst_then_a_trickle() {
    let _beside = beside_others();
    let pool = pool(17).build(manager("trickle")).unwrap();
    let watch = Database::get().watch("trickle");

    let uses = burst(&pool, 17);
    let last = uses[16].after;
    let mut trickle = vec![];
    for tick in 1..=26 {
        sleep_until(last + ms(100) * tick);
        trickle.push(use_one(&pool));
    }
    assert!(Instant::now() > last + MAX_IDLE + EPSILON * 4, "it went on for longer than the others lived");
    let kept = trickle[0].pid;
    assert!(trickle.iter().all(|one| one.pid == kept), "the one used last is used next: {trickle:?}");

    let seen = watch.end();
    let others: Vec<Use> = uses.into_iter().filter(|one| one.pid != kept).collect();
    assert_each_in_time(&seen, &others, MAX_IDLE);
    for sample in seen.after(last + MAX_IDLE + SEEN) {
        assert_eq!(sample.pids().into_iter().collect::<Vec<_>>(), [kept], "{}", seen.counts(last));
    }
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Idle), stats.idle), (17, 16, 1), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "trickle");
}

/// Four threads that do one query after the other, while `meanwhile` runs.
fn steady_load<R>(pool: &Pool<Manager>, meanwhile: impl FnOnce() -> R) -> R {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    use_one(pool);
                }
            });
        }
        let result = meanwhile();
        over.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn a_steady_load_of_four_opens_at_most_four() {
    let _alone = alone();
    let pool = pool(17).build(manager("steady-cold")).unwrap();
    let watch = Database::get().watch("steady-cold");
    let uses = || pool.stats().checkouts;
    steady_load(&pool, || assert!(wait_until(Instant::now() + SOON, || uses() >= 1000)));
    let seen = watch.end();
    assert!(seen.pids().len() <= 4, "{}", seen.counts(seen.0[0].asked));
    let stats = pool.stats();
    assert!(stats.opens <= 4 && stats.closes == 0, "{stats}");
    finish(pool, "steady-cold");
}

#[test]
fn a_steady_load_of_four_keeps_at_most_four() {
    let _alone = alone();
    let pool = pool(17).build(manager("steady")).unwrap();
    let watch = Database::get().watch("steady");
    let last = burst(&pool, 17)[16].after;
    let end = last + MAX_IDLE + EPSILON * 8;
    steady_load(&pool, || sleep_until(end));

    let seen = watch.end();
    let later: Vec<usize> = seen.between(last + MAX_IDLE + SEEN, end).map(|sample| sample.count()).collect();
    assert!(!later.is_empty() && later.iter().all(|n| (1..=4).contains(n)), "{}", seen.counts(last));
    let stats = pool.stats();
    assert_eq!(stats.opens, 17, "{stats}");
    assert!((13..=16).contains(&stats.closed_for(CloseReason::Idle)), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "steady");
}

#[test]
fn the_last_used_is_the_next() {
    let _beside = crate::support::beside_others();
    let pool = pool(3).build(manager("lifo")).unwrap();
    let mut conns = take(&pool, 3);
    let pids: Vec<i32> = conns.iter_mut().map(|conn| pid(conn)).collect();
    conns.into_iter().for_each(drop);
    let again: Vec<i32> = take(&pool, 3).iter_mut().map(|conn| pid(conn)).collect();
    assert_eq!(again, [pids[2], pids[1], pids[0]]);
    finish(pool, "lifo");
}

#[test]
fn zero_keeps_nothing_idle() {
    let _beside = beside_others();
    let pool = pool(1).max_idle(Duration::ZERO).build(manager("zero")).unwrap();
    assert_eq!(pool.state().connections, 0, "not the one that `build` opened to see that it can");
    assert_gone("zero");

    // Handed off to a waiter, it was not idle.
    let mut first = pool.get().unwrap();
    let (first_pid, server) = (pid(&mut first), Database::get());
    let second = std::thread::scope(|scope| {
        let waiter = scope.spawn(|| use_one(&pool));
        assert!(wait_until(Instant::now() + SOON, || pool.stats().waiting == 1));
        assert_eq!(server.count("zero"), 1);
        drop(first);
        waiter.join().unwrap()
    });
    assert_eq!(second.pid, first_pid);

    // Nobody waited for it this time.
    assert_eq!(server.wait_for("zero", 0, second.after + SEEN), 0);
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Idle)), (2, 2), "{stats}");
    finish(pool, "zero");
}

#[test]
fn none_keeps_all() {
    let _beside = beside_others();
    const SHORT: Duration = ms(300);
    let server = Database::get();
    let some = pool(5).max_idle(SHORT).build(manager("some")).unwrap();
    let none = pool(5).max_idle(None).build(manager("none")).unwrap();
    let before = burst(&none, 5);
    let last = burst(&some, 5)[4].after;
    assert_eq!((server.count("some"), server.count("none")), (5, 5));

    assert_eq!(server.wait_for("some", 0, last + SHORT + SEEN), 0);
    sleep_until(last + SHORT * 3);
    assert_eq!(server.count("none"), 5);
    let mut pids: Vec<i32> = take(&none, 5).iter_mut().map(|conn| pid(conn)).collect();
    let mut before: Vec<i32> = before.iter().map(|one| one.pid).collect();
    pids.sort_unstable();
    before.sort_unstable();
    assert_eq!(pids, before);
    assert_eq!(none.stats().closes, 0, "{}", none.stats());
    finish(some, "some");
    finish(none, "none");
}

#[test]
fn to_be_kept_alive_is_not_to_be_used() {
    let _beside = beside_others();
    const SHORT: Duration = ms(700);
    let pool = pool(3).max_idle(SHORT).keepalive(ms(150)).build(manager("keepalive")).unwrap();
    let watch = Database::get().watch("keepalive");
    let uses = burst(&pool, 3);
    // Its query, not the use's, is the last one: it was kept alive.
    let checked = || Database::get().backends("keepalive").iter().filter(|b| b.since < ms(200)).count() == 3;
    assert!(wait_until(uses[2].after + ms(600), || Instant::now() > uses[2].after + ms(300) && checked()));
    assert!(wait_until(uses[2].after + SHORT + EPSILON, || pool.state().connections == 0), "{}", pool.stats());
    assert_gone("keepalive");
    assert_each_in_time(&watch.end(), &uses, SHORT);
    finish(pool, "keepalive");
}
