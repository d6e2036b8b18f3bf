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
