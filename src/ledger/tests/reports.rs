//! What the executor reports of its jobs.

use super::world::*;

#[test]
fn a_connection_that_arrives_expired_is_a_failed_open() {
    let mut w = World::new(Settings { max_lifetime: Some(ms(50)), ..settings() });
    w.takes.open = ms(60);
    let a = w.get();
    w.run(ms(500));
    assert!(!w.has(a));
    assert_eq!(w.ledger.tally.opens, 0);
    assert!((2..=5).contains(&w.ledger.tally.failed_opens.total()), "with a back-off between: {}", w.dials.len());
    // The counts balance: a connection that was not counted as opened is not counted as closed.
    assert_eq!(w.ledger.tally.closes.iter().sum::<u64>(), 0);
    assert_eq!(w.closed_for(CloseReason::Lifetime), w.ledger.tally.failed_opens.total() as usize);
}

#[test]
fn a_connection_that_arrives_too_old_to_be_handed_out_is_a_failed_open() {
    // The connection dies at 10 ms, and with this resolution may not be handed out after 2.
    let mut w = World::with_resolution(Settings { max_lifetime: Some(ms(10)), ..settings() }, ms(8));
    w.takes.open = ms(5);
    w.get();
    w.run(ms(500));
    assert_eq!((w.ledger.tally.checkouts, w.ledger.tally.opens), (0, 0));
    assert!((2..=5).contains(&w.ledger.tally.failed_opens.total()), "with a back-off between: {}", w.dials.len());
}

#[test]
fn closes_that_hang_delay_no_other() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    w.burst(9);
    w.takes.close = Duration::MAX;
    w.run(secs(2) + CLOSE_PATIENCE * 2);
    assert_eq!(w.ledger.counted.begun_closes(), 9, "each has begun");
    assert_eq!(w.ledger.tally.lateness.max(), CLOSE_PATIENCE, "counted to the moment the last one began");
}

#[test]
fn a_check_or_an_open_proves_what_holds_from_its_beginning() {
    // The job was ordered before another connection was found dead, and begins after that.
    for check in [true, false] {
        let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..settings() });
        w.burst(if check { 2 } else { 1 });
        let dead = w.get();
        w.run(secs(2));
        w.takes.start = ms(10);
        let a = w.get();
        w.run(ms(5));
        w.returned_as(dead, Condition::Discard(CloseReason::Discarded));
        w.suspect = w.event();
        w.ledger.suspect();
        (w.takes.check, w.takes.open) = (ms(1), ms(1));
        w.run(ms(6));
        assert!(w.has(a), "{check}");
    }
}

#[test]
fn a_check_is_counted_on_anew_when_it_begins() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(1);
    w.run(secs(2));
    (w.takes.start, w.takes.check) = (ms(60), Duration::MAX);
    w.get();
    w.run(ms(61));
    w.takes.start = Duration::ZERO;
    w.run(ms(98));
    assert_eq!(w.dials.len(), 1);
    w.run(ms(1));
    assert_eq!(w.dials.len(), 2, "100 ms after the check began");
}

#[test]
fn the_jitter_takes_its_part_off_a_life() {
    let settings = Settings { max_lifetime: Some(secs(100)), lifetime_jitter: 0.1, ..settings() };
    let mut l: Ledger<Conn, Thread> = Ledger::new(settings, Duration::ZERO);
    l.prepare(Moment::BIRTH);
    let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(Moment::BIRTH, token, 0.5).unwrap();
    assert_eq!(l.slots[token.index as usize].dies, Moment::BIRTH.plus(secs(95)));
}

#[test]
fn a_close_after_a_failure_has_its_whole_limit_after_the_handlers() {
    let mut w = World::new(settings());
    (w.refuse, w.leaves_one) = (Some(Reach::Server), true);
    (w.takes.handler, w.takes.close) = (secs(3), secs(4));
    let a = w.get();
    assert_eq!((w.counts().opening, w.counts().closing), (0, 1), "the handlers run");
    assert!(w.leave(a));
    w.run(secs(7));
    assert_eq!((w.abandoned, w.counts().total()), (0, 0));
    assert_eq!((w.ledger.tally.failed_opens.total(), w.ledger.tally.opens), (1, 0));
}

#[test]
fn a_connection_that_arrives_is_idle_since_then() {
    let mut w = World::new(Settings { max_idle: Some(secs(5)), ..settings() });
    w.takes.open = ms(900);
    w.ledger.prepare(w.now);
    w.apply();
    w.run(ms(5_899));
    assert_eq!(w.counts().idle, 1);
    w.run(ms(1));
    assert_eq!(w.closed_for(CloseReason::Idle), 1);
    let tally = &w.ledger.tally;
    assert_eq!((tally.opens, tally.failed_opens.total(), tally.open_time.max()), (1, 0, ms(900)));
}

#[test]
fn one_open_moves_the_usual_time_by_a_quarter() {
    for (first, second, usual) in [(100, 1_000, 125), (1_000, 10, 750), (100, 110, 110)] {
        let mut w = World::new(settings());
        for open in [first, second] {
            w.takes.open = ms(open);
            w.get();
            w.run(ms(open));
        }
        assert_eq!(w.ledger.usual_open, Some(ms(usual)));
    }
}

#[test]
fn the_reaper_is_to_look_at_the_end_of_a_life_and_not_before() {
    let mut w = World::new(Settings { max_lifetime: Some(secs(40)), max_idle: None, ..settings() });
    w.use_once(ms(1));
    w.run(secs(11)); // past the limits of the jobs
    assert_eq!(w.ledger.alarm(), Moment::BIRTH.plus(secs(40)));
}

#[test]
fn a_check_of_a_caller_s_own_that_fails_waits_for_its_close_and_is_counted() {
    for (reason, suspect) in [(CloseReason::Invalid, true), (CloseReason::Panicked, false)] {
        let mut w = World::new(Settings { validate: Validate::Always, ..settings() });
        w.burst(1);
        let Take::Check(token, _, _) = w.ledger.take(w.now, here(), true) else { panic!() };
        w.ledger.check_failed(w.now, &token, reason);
        assert_eq!((w.ledger.counted.ordered_closes(), w.ledger.counted.begun_closes()), (1, 0));
        assert_eq!(w.ledger.tally.closes[reason as usize], 1);
        assert_eq!(w.ledger.found_dead, u64::from(suspect), "{reason}");
        w.ledger.begin_close(w.now, &token);
        assert_eq!((w.ledger.counted.ordered_closes(), w.ledger.counted.begun_closes()), (0, 1));
    }
}

#[test]
fn a_check_of_the_executor_s_that_fails_is_a_close_while_the_handlers_run() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(1);
    w.run(secs(2));
    w.dead = w.server.keys().copied().collect();
    w.takes.handler = secs(1);
    w.get();
    assert_eq!((w.counts().checking, w.counts().closing), (0, 1));
}

/// An open that was abandoned, and whose slot has another open by now.
fn abandoned_open() -> (Ledger<Conn, Thread>, Token, Moment) {
    let mut l: Ledger<Conn, Thread> = Ledger::new(Settings { max_size: 1, ..settings() }, Duration::ZERO);
    let now = Moment::BIRTH;
    l.prepare(now);
    let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(now, token, 0.0).unwrap();
    let later = now.plus(secs(10));
    l.reap(later, 0.0);
    assert_eq!(l.counts().abandoned, 1);
    l.effects.orders.clear();
    let again = later.plus(secs(60));
    l.prepare(again);
    let Some(Order::Job(SlotJob::Open(other))) = l.effects.orders.pop() else { panic!() };
    assert_eq!(other.index, token.index);
    assert!(l.begin(again, other, 0.0).is_some());
    (l, token, again)
}

#[test]
fn an_abandoned_job_changes_no_slot() {
    let opening = |l: &Ledger<Conn, Thread>| {
        assert_eq!((l.counts().opening, l.counts().total(), l.tally.failed_opens.total()), (1, 1, 1));
    };
    let (mut l, token, now) = abandoned_open();
    l.open_failed(now, &token, error(Reach::Server), 0.0);
    opening(&l);
    l.begin_close(now, &token);
    opening(&l);
    l.check_failed(now, &token, CloseReason::Invalid);
    opening(&l);
    l.free(now, token);
    opening(&l);
    assert_eq!(l.counts().abandoned, 0);

    let (mut l, token, now) = abandoned_open();
    assert!(l.checked(now, now, token, 1).is_err());
    opening(&l);
    let (mut l, token, now) = abandoned_open();
    assert!(l.opened(now, token, 1).is_err());
    opening(&l);
}

#[test]
fn an_abandoned_check_changes_no_slot_that_is_checked_again() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 1, ..settings() });
    w.burst(1);
    w.run(secs(2));
    w.takes.check = Duration::MAX;
    let a = w.get();
    w.suspect = w.event();
    w.run(secs(3));
    assert!(w.has(a), "a new connection, in the slot of the abandoned check");
    w.returned(a);
    w.run(secs(2));
    let Take::Check(token, ..) = w.ledger.take(w.now, here(), true) else { panic!() };
    let (index, old) = (token.index, token.id - 1);
    w.ledger.check_failed(w.now, &Token { index, id: old }, CloseReason::Invalid);
    assert!(w.ledger.checked(w.now, w.now, Token { index, id: old }, 1).is_err());
    assert_eq!(w.ledger.counts().checking, 1);
}

#[test]
fn the_reaper_is_to_look_at_the_end_of_the_life_of_what_is_in_use() {
    for (floor, alarm) in [(0, secs(40)), (1, secs(38))] {
        let settings = Settings { max_lifetime: Some(secs(40)), max_idle: None, open_timeout: secs(90), ..settings() };
        let mut l: Ledger<Conn, Thread> = Ledger::new(settings, Duration::ZERO);
        l.prepare(Moment::BIRTH);
        let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
        let token = l.begin(Moment::BIRTH, token, 0.0).unwrap();
        l.alarm = Moment::NEVER;
        l.rules.change(|s| s.min_idle = floor);
        assert!(l.opened(Moment::BIRTH, token, 1).is_ok());
        assert_eq!(l.alarm(), Moment::BIRTH.plus(alarm), "a floor of {floor}");
    }
}
