//! Which connections may be handed out: validation and suspicion.

use super::world::*;

#[test]
fn a_broken_connection_makes_its_siblings_suspect() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(5);
    let a = w.get();
    w.run(ms(1));
    w.returned_as(a, Condition::Broken);
    for (conn, _) in w.server.clone() {
        w.dead.push(conn);
    }
    let b = w.get();
    w.run(Duration::ZERO);
    assert!(w.has(b) && !w.dead.contains(&w.in_use[&b].1), "a new connection");
}

#[test]
fn a_connection_returned_later_is_suspect_too() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
    w.takes.check = ms(1);
    let (a, b) = (w.get(), w.get());
    let c = w.get();
    w.run(ms(1));
    w.returned_as(a, Condition::Broken);
    assert!(w.has(c), "newly opened");
    let d = w.get();
    w.returned(b);
    assert!(!w.has(d), "proven before the other broke: checked first");
    w.run(ms(1));
    assert!(w.has(d));
}

#[test]
fn a_pool_that_never_validates_does_not_on_suspicion_either() {
    let mut w = World::new(Settings { validate: Validate::Never, max_size: 2, ..settings() });
    w.burst(2);
    let broken = w.get();
    w.returned_as(broken, Condition::Broken);
    assert!(matches!(w.ledger.take(w.now, here(), true), Take::Ready(..)));
}

#[test]
fn validation_follows_its_policy() {
    for (validate, idle, expected) in [
        (Validate::Never, secs(100), false),
        (Validate::Always, Duration::ZERO, true),
        (Validate::AfterIdle(secs(1)), ms(999), false),
        (Validate::AfterIdle(secs(1)), ms(1_000), true),
        (Validate::AfterIdle(Duration::ZERO), Duration::ZERO, true),
    ] {
        let mut w = World::new(Settings { validate, ..settings() });
        w.burst(1);
        w.run(idle);
        match w.ledger.take(w.now, here(), true) {
            Take::Ready(..) => assert!(!expected, "{validate:?} after {idle:?}"),
            Take::Check(..) => assert!(expected, "{validate:?} after {idle:?}"),
            Take::Nothing => panic!(),
        }
    }
}

#[test]
fn a_connection_checked_for_one_try_get_serves_the_next_until_another_is_found_dead() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_idle: None, ..settings() });
    w.burst(3);
    for found in [false, true] {
        w.run(secs(100));
        let dead = w.get();
        w.run(secs(2));
        assert_eq!(w.try_get(), None);
        w.run(secs(200));
        w.returned_as(dead, if found { Condition::Broken } else { Condition::Keep });
        let served = w.try_get();
        assert_eq!(served.is_some(), !found, "checked, 200 s ago");
        served.into_iter().for_each(|thread| w.returned(thread));
    }
}

#[test]
fn a_connection_checked_for_one_caller_serves_the_next() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.takes.check = ms(100);
    w.burst(1);
    w.run(secs(5));
    // Checked for a `try_get`, which does not wait for it.
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Nothing));
    w.ledger.prepare(w.now);
    w.apply();
    w.run(ms(100));
    let Take::Ready(token, conn) = w.ledger.take(w.now, here(), false) else { panic!("the check served no caller") };
    w.checked_out(1, token, conn);
    w.returned(1);
    // Checked for a waiter that left.
    w.run(secs(5));
    let impatient = w.get();
    assert!(w.leave(impatient));
    w.run(ms(1_100));
    let next = w.get();
    assert!(!w.has(next), "a second after that check began, the connection is checked again");
    w.run(ms(100));
    assert!(w.has(next));
    w.returned(next);
    // The connection is evicted by its last use: a check is not use.
    w.run(secs(600));
    assert_eq!(w.counts().idle, 0);
}

#[test]
fn a_check_that_began_before_another_was_found_dead_proves_nothing() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
    w.burst(2);
    let dead = w.get();
    w.run(secs(2));
    w.takes.check = ms(10);
    let a = w.get();
    w.run(ms(5));
    w.returned_as(dead, Condition::Broken);
    w.takes.open = Duration::MAX;
    w.run(ms(5));
    assert!(!w.has(a), "the checked connection may have died with the other");
    w.run(ms(10));
    assert!(w.has(a), "it was checked again");
}

#[test]
fn an_own_check_that_began_before_another_was_found_dead_proves_nothing() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
    w.burst(2);
    let dead = w.get();
    w.run(secs(2));
    w.takes.check = ms(10);
    let a = w.get_or_check(true);
    w.run(ms(5));
    w.returned_as(dead, Condition::Broken);
    w.takes.open = Duration::MAX;
    w.run(ms(5));
    assert!(!w.has(a));
    w.run(ms(10));
    assert!(w.has(a));
}

#[test]
fn a_connection_is_in_excess_only_beside_max_size_others_that_are_alive() {
    let mut w = World::new(Settings { max_size: 3, ..settings() });
    let (a, b) = (w.get(), w.get());
    w.takes.open = ms(10);
    w.get();
    w.ledger.resize(w.now, 2);
    w.apply();
    assert_eq!((w.counts().in_use, w.counts().opening), (2, 1));
    // (The connection under way may never arrive.)
    w.returned(a);
    assert!(w.closes.is_empty(), "two are alive, and two may be");
    let a = w.in_use.keys().copied().find(|thread| *thread != b).expect("it went to the waiter");
    w.run(ms(10));
    assert_eq!(w.closed_for(CloseReason::Resized), 1, "the third");
    assert!(w.has(a) && w.has(b));
}

#[test]
fn after_each_failed_check_twice_as_many_are_checked() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(16);
    w.run(secs(5));
    w.dead = w.server.keys().copied().collect();
    (w.takes.check, w.takes.open) = (ms(10), secs(1));
    w.get();
    // The first waiter wants one. With the nth check that fails 2^(n - 1) more are checked than are wanted.
    for checking in [1, 2, 5, 8] {
        // Beside checks that fail there is one open.
        assert_eq!((w.counts().checking, w.counts().opening), (checking, u32::from(checking > 1)));
        w.run(ms(10));
    }
    assert_eq!((w.counts().total(), w.counts().opening), (1, 1), "beside all that one open");
    w.run(secs(1));
    assert_eq!(w.ledger.check_failures, 0, "the server answers");
}

#[test]
fn after_a_check_that_succeeds_only_what_is_wanted_is_checked() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 9, ..settings() });
    w.burst(9);
    w.run(secs(5));
    w.dead = vec![w.ledger.idle.last().unwrap().1];
    (w.takes.check, w.takes.open) = (ms(10), Duration::MAX);
    let first = w.get();
    w.run(ms(20));
    assert!(w.has(first));
    w.run(secs(5));
    w.get();
    assert_eq!(w.counts().checking, 1);
}

#[test]
fn a_check_of_a_caller_s_own_that_began_before_another_was_found_dead_ends_no_run_of_failures() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 9, ..settings() });
    w.burst(9);
    w.run(secs(5));
    let top = w.ledger.idle.last().unwrap().1;
    w.takes.check = ms(15);
    w.get_or_check(true);
    w.takes.check = ms(10);
    w.takes.open = secs(1);
    w.dead = w.server.keys().copied().filter(|conn| *conn != top).collect();
    w.get();
    w.run(ms(10));
    let failures = w.ledger.check_failures;
    assert!(failures > 0);
    w.run(ms(5));
    assert_eq!(w.ledger.check_failures, failures, "that check proves nothing");
}

#[test]
fn a_refusal_is_told_from_a_failure() {
    for refuse in [None, Some(Reach::Nobody), Some(Reach::Server), Some(Reach::Refusal)] {
        let mut w = World::new(settings());
        w.refuse = refuse;
        assert!(!w.ledger.is_refusing());
        w.get();
        assert_eq!(w.ledger.is_refusing(), refuse == Some(Reach::Refusal), "{refuse:?}");
    }
}
