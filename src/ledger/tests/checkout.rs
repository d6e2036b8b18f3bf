//! Checkout, and the checks that a caller makes for itself.

use super::world::*;

#[test]
fn the_last_connection_returned_is_the_first_checked_out() {
    let mut w = World::new(settings());
    let (a, b) = (w.get(), w.get());
    let (ca, cb) = (w.in_use[&a].1, w.in_use[&b].1);
    w.returned(a);
    w.run(ms(1));
    w.returned(b);
    let c = w.get();
    assert_eq!(w.in_use[&c].1, cb);
    let d = w.get();
    assert_eq!(w.in_use[&d].1, ca);
}

#[test]
fn a_caller_whose_own_check_failed_keeps_its_place() {
    let mut w = World::new(Settings { validate: Validate::Always, max_size: 1, ..settings() });
    w.takes.close = ms(10);
    w.burst(1);
    let Take::Check(token, conn, ticket) = w.ledger.take(w.now, here(), true) else { panic!() };
    w.apply();
    let later = w.get();
    w.ledger.check_failed(w.now, &token, CloseReason::Invalid);
    w.jobs.insert(
        (w.now.plus(ms(10)), u64::MAX),
        (Event::Closed, Job { token, conn, begun: w.now, event: 0, counted: false }),
    );
    let (Join::Queued(got), _) = w.ledger.join(w.now, here(), Some(ticket), false, 77) else { panic!() };
    assert_eq!(got, ticket);
    w.waiting.push_front((77, ticket, w.now)); // the world's own account: ahead of `later`
    w.apply();
    w.run(ms(10));
    assert!(w.has(77) && !w.has(later));
}

#[test]
fn the_caller_of_an_own_check_is_known() {
    let mut l: Ledger<Conn, Thread> =
        Ledger::new(Settings { validate: Validate::Always, ..settings() }, Duration::ZERO);
    l.prepare(Moment::BIRTH);
    let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(Moment::BIRTH, token, 0.0).unwrap();
    assert!(l.opened(Moment::BIRTH, token, 1).is_ok());
    let Take::Check(token, conn, _) = l.take(Moment::BIRTH, here(), true) else { panic!() };
    let checking = |slot: &Slot| (slot.as_seen(), slot.caller().map(|caller| caller.thread));
    assert_eq!(l.slots().map(checking).collect::<Vec<_>>(), [(ConnectionState::Checking, Some(1))]);
    let (token, _) = l.own_check_passed(Moment::BIRTH, Moment::BIRTH, token, conn, here()).unwrap();
    l.returned(Moment::BIRTH, token, conn, Condition::Keep);
    assert_eq!(l.slots().map(checking).collect::<Vec<_>>(), [(ConnectionState::Idle, None)]);
}

/// A caller that waits for nothing: what it takes, or the connection that it is to look at.
fn look(w: &mut World) -> Option<(Token, Conn)> {
    let taken = w.ledger.take_at_once(w.now, here());
    let Take::Check(token, conn, _) = taken else { panic!("{taken:?}") };
    w.apply();
    Some((token, conn))
}

#[test]
fn a_connection_that_was_only_unused_for_long_is_looked_at_by_a_caller_that_waits_for_nothing() {
    for well in [true, false] {
        let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
        w.burst(1);
        w.run(secs(5));
        let (token, conn) = look(&mut w).unwrap();
        assert_eq!((w.counts().checking, w.counts().idle), (1, 0));
        assert!(w.ledger.slots().all(|slot| slot.caller() == Some(Caller { thread: 1, ..slot.caller().unwrap() })));
        let taken = w.ledger.looked_at(w.now, token, conn, here(), well);
        assert_eq!(taken.is_some(), well);
        if let Some((token, conn)) = taken {
            assert_eq!((w.counts().checking, w.counts().in_use), (0, 1));
            w.checked_out(1, token, conn);
        }
        w.apply();
        w.run(Duration::ZERO);
        // Nothing could be seen, so the executor has checked the connection, for the next such caller.
        assert_eq!(w.counts().idle, u32::from(!well));
        assert_eq!(w.try_get().is_some(), !well);
    }
}

#[test]
fn a_connection_that_must_be_checked_is_not_only_looked_at() {
    // Since every use wants a check, or since another was found dead.
    for always in [true, false] {
        let validate = if always { Validate::Always } else { Validate::AfterIdle(secs(1)) };
        let mut w = World::new(Settings { validate, ..settings() });
        w.burst(2);
        if !always {
            let dead = w.get();
            w.returned_as(dead, Condition::Broken);
        }
        let taken = w.ledger.take_at_once(w.now, here());
        assert!(matches!(taken, Take::Nothing), "{taken:?}");
        w.apply();
    }
}

#[test]
fn a_caller_that_waits_for_nothing_takes_nothing_while_others_wait() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), fair_after: ms(1), ..settings() });
    w.burst(2);
    w.run(secs(5));
    w.takes.check = ms(10);
    w.get();
    assert_eq!((w.counts().waiting, w.counts().idle, w.counts().checking), (1, 1, 1));
    let taken = w.ledger.take_at_once(w.now, here());
    assert!(matches!(taken, Take::Nothing), "{taken:?}");
    w.apply();
}

#[test]
fn a_looked_at_connection_that_the_pool_no_longer_keeps_is_closed() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(1);
    w.run(secs(5));
    let (token, conn) = look(&mut w).unwrap();
    w.ledger.recycle(w.now);
    w.replaced = w.event();
    assert!(w.ledger.looked_at(w.now, token, conn, here(), true).is_none());
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!((w.closed_for(CloseReason::Recycled), w.counts().total()), (1, 0));
}

#[test]
fn a_looked_at_connection_that_became_suspect_is_not_handed_out() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
    w.burst(2);
    let dead = w.get();
    w.run(secs(5));
    let (token, conn) = look(&mut w).unwrap();
    w.returned_as(dead, Condition::Broken);
    assert!(w.ledger.looked_at(w.now, token, conn, here(), true).is_none(), "seen to be well, and suspect since");
    w.apply();
    w.run(Duration::ZERO);
    assert!(w.try_get().is_some(), "checked meanwhile");
}

#[test]
fn a_looked_at_connection_is_left_to_a_waiter_after_fair_after() {
    let validate = Validate::AfterIdle(secs(1));
    let mut w = World::new(Settings { validate, max_size: 1, fair_after: ms(1), ..settings() });
    w.burst(1);
    w.run(secs(5));
    let (token, conn) = look(&mut w).unwrap();
    let waiter = w.get();
    w.run(ms(2));
    assert!(w.ledger.looked_at(w.now, token, conn, here(), true).is_none());
    w.apply();
    w.run(Duration::ZERO);
    assert!(w.has(waiter), "the executor has checked it for the waiter");
}

#[test]
fn what_was_used_since_the_last_such_caller_asked_serves_one_more() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
    let (a, b) = (w.get(), w.get());
    assert_eq!(w.try_get(), None);
    w.returned(a);
    w.returned(b);
    w.run(secs(5));
    assert!(w.try_get().is_some(), "though nothing can be seen: it was used since the other asked");
    // `take_at_once` by itself, so that nothing is checked for this caller.
    let (token, conn) = look(&mut w).unwrap();
    assert!(w.ledger.looked_at(w.now, token, conn, here(), false).is_none(), "it was not used since the last asked");
    w.apply();
    w.run(secs(5));
    assert!(w.try_get().is_some(), "it was checked for the last one, though not used since");
}

#[test]
fn where_every_use_wants_a_check_a_new_connection_serves_one_caller_that_waits_for_nothing() {
    let mut w = World::new(Settings { validate: Validate::Always, min_idle: 1, ..settings() });
    w.takes.open = ms(10);
    assert_eq!(w.try_get(), None);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(ms(10));
    assert_eq!(w.counts().idle, 2, "one for the caller that asked, one for the floor");

    w.run(secs(1));
    assert!(w.try_get().is_some(), "opened since the caller asked, and never used");
    assert!(matches!(w.ledger.take_at_once(w.now, here()), Take::Nothing), "not opened since the last asked");
    w.apply();
}

#[test]
fn where_every_use_wants_a_check_one_check_serves_one_caller_that_waits_for_nothing() {
    let mut w = World::new(Settings { validate: Validate::Always, ..settings() });
    w.burst(1);
    assert_eq!(w.try_get(), None);
    let first = w.try_get().expect("checked since, at the same moment");
    w.run(ms(1));
    w.returned(first);
    assert_eq!(w.try_get(), None, "used since that check");
    w.run(secs(1));
    assert!(w.try_get().is_some(), "checked for the one before");
}

#[test]
fn a_detached_connection_is_counted_and_its_place_is_free() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    let a = w.get();
    w.run(ms(7));
    let waiter = w.get();
    let (token, conn) = w.in_use.remove(&a).unwrap();
    w.server.remove(&conn);
    w.ledger.detach(w.now, token);
    w.apply();
    assert_eq!((w.ledger.tally.detached, w.ledger.tally.usage_time.max()), (1, ms(7)));
    w.run(Duration::ZERO);
    assert!(w.has(waiter));
}

#[test]
fn the_time_in_use_is_recorded() {
    let mut w = World::new(settings());
    w.use_once(ms(3));
    w.run(secs(1));
    w.use_once(ms(4));
    let usage = &w.ledger.tally.usage_time;
    assert_eq!((usage.count(), usage.sum(), usage.max()), (2, ms(7), ms(4)));
}

#[test]
fn a_connection_that_is_not_kept_is_not_reset_first() {
    let mut w = World::new(Settings { max_lifetime: Some(secs(3)), ..settings() });
    w.takes.check = Duration::MAX;
    let a = w.get();
    w.run(secs(4));
    w.returned_as(a, Condition::Reset);
    assert_eq!((w.closed_for(CloseReason::Lifetime), w.counts().total()), (1, 0));
}

#[test]
fn a_connection_is_idle_since_its_return_and_not_since_its_reset() {
    let mut w = World::new(Settings { max_idle: Some(secs(10)), ..settings() });
    let a = w.get();
    w.run(secs(5));
    w.takes.check = secs(1);
    w.returned_as(a, Condition::Reset);
    w.run_to(Moment::BIRTH.plus(ms(14_999)));
    assert_eq!(w.counts().idle, 1);
    w.run(ms(1));
    assert_eq!(w.closed_for(CloseReason::Idle), 1);
}
