//! Slots, states and counts.

use super::world::*;

#[test]
fn an_outdated_connection_keeps_its_slot_until_it_is_closed() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    w.takes.close = ms(5);
    let (a, b) = (w.get(), w.get());
    w.returned_as(a, Condition::Outdated); // (`World::watch_the_bound` fails if a slot is ordered too many)
    assert_eq!((w.counts().closing, w.dials.len()), (1, 1));
    w.run(ms(5));
    assert!(w.has(b));
}

#[test]
fn checkouts_and_uses_are_counted() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    (0..3).for_each(|_| w.use_once(ms(1)));
    assert_eq!((w.ledger.tally.checkouts, w.ledger.slots().next().unwrap().uses), (3, 3));
    w.run(secs(2));
    assert_eq!(w.ledger.tally.closes[CloseReason::Idle as usize], 1);
    assert_eq!(w.ledger.tally.closes.iter().sum::<u64>(), 1);
}

#[test]
fn a_checkout_sets_the_alarm_for_its_leak_and_a_return_for_its_keepalive() {
    let max_idle = None;
    let mut w = World::new(Settings { max_idle, leak_threshold: Some(secs(5)), ..settings() });
    w.use_once(ms(1));
    w.run(secs(60));
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
    w.get();
    assert_eq!(w.ledger.alarm(), w.now.plus(secs(5)));

    w = World::new(Settings { max_idle, keepalive: Some(secs(10)), ..settings() });
    let a = w.get();
    w.run(secs(60));
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
    w.returned(a);
    assert_eq!(w.ledger.alarm(), w.now.plus(secs(10)));
}

#[test]
fn a_check_that_waits_for_its_thread_is_not_counted_on_for_long() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
    w.burst(1);
    w.run(secs(2));
    w.takes.start = secs(10);
    w.get();
    w.run(ms(99));
    assert_eq!(w.counts().opening, 0);
    w.run(ms(1));
    assert_eq!(w.counts().opening, 1);
}

#[test]
fn a_connection_returned_near_its_end_does_not_count_for_the_floor() {
    let settings = Settings { min_idle: 1, max_size: 2, max_lifetime: Some(secs(40)), max_idle: None, ..settings() };
    let mut w = World::new(settings);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(1));
    let (a, b) = (w.get(), w.get());
    assert_eq!(w.dials.len(), 2);
    w.run_to(Moment::BIRTH.plus(secs(38)));
    w.returned(a);
    assert_eq!((w.counts().idle, w.dials.len()), (1, 2), "there is no room");
    w.returned_as(b, Condition::Discard(CloseReason::Discarded));
    assert_eq!((w.counts().idle, w.dials.len()), (2, 3), "replaced a twentieth of its life before its end");
}

#[test]
fn a_checked_connection_goes_back_to_its_place_in_the_stack() {
    let mut w = World::new(Settings { keepalive: Some(secs(10)), max_idle: Some(secs(12)), ..settings() });
    w.takes.check = ms(100);
    let threads = [w.get(), w.get(), w.get()];
    for thread in threads {
        w.returned(thread);
        w.run(secs(1));
    }
    let order: Vec<_> = w.ledger.idle.iter().map(|i| i.1).collect();
    w.run(ms(7_050));
    assert_eq!((w.counts().checking, w.counts().idle), (1, 2));
    w.run(ms(100));
    assert_eq!(w.ledger.idle.iter().map(|i| i.1).collect::<Vec<_>>(), order);
    w.run_to(Moment::BIRTH.plus(ms(12_000)));
    assert_eq!(w.closes, [(w.now, order[0], CloseReason::Idle)], "a check is not use");
}

#[test]
fn a_checkout_sets_no_alarm_that_is_over() {
    let mut w = World::new(Settings { max_idle: None, leak_threshold: Some(secs(5)), ..settings() });
    w.use_once(ms(1));
    w.run(secs(60));
    let (token, _) = match w.ledger.take(w.now, here(), false) {
        Take::Ready(token, conn) => (token, conn),
        other => panic!("{other:?}"),
    };
    assert_eq!(w.ledger.alarm(), w.now.plus(secs(5)));
    w.ledger.detach(w.now, token);
}

#[test]
fn what_becomes_idle_during_a_keepalive_sets_no_alarm_for_its_own() {
    let settings = Settings { keepalive: Some(secs(10)), max_idle: None, validation_timeout: secs(90), ..settings() };
    let mut w = World::new(settings);
    let (a, b) = (w.get(), w.get());
    w.returned(a);
    w.takes.check = secs(50);
    w.run(secs(15));
    assert_eq!(w.counts().checking, 1);
    w.returned(b);
    assert!(w.ledger.alarm() > w.now.plus(secs(10)), "they run one at a time");
}

#[test]
fn a_keepalive_counts_from_the_last_check() {
    let mut w = World::new(Settings { keepalive: Some(secs(10)), max_idle: None, ..settings() });
    w.use_once(ms(1));
    w.takes.check = secs(1);
    w.run(ms(10_500));
    assert_eq!(w.counts().checking, 1);
    w.ledger.alarm = Moment::NEVER;
    let (_, (_, job)) = w.jobs.pop_first().unwrap();
    assert!(w.ledger.checked(w.now, job.begun, job.token, job.conn).is_ok());
    w.ledger.reap(w.now, 0.0);
    assert_eq!(w.ledger.alarm(), job.begun.plus(secs(10)));
    w.over(job.conn);
}

#[test]
fn the_end_of_a_keepalive_has_the_reaper_look_and_the_end_of_another_check_does_not() {
    let settings = Settings { validate: Validate::AfterIdle(secs(1)), max_idle: Some(secs(600)), ..settings() };
    let mut w = World::new(settings);
    w.burst(1);
    w.run(secs(60));
    w.takes.check = ms(10);
    w.ledger.prepare(w.now);
    w.apply();
    w.run(ms(5));
    let (_, (_, job)) = w.jobs.pop_first().unwrap();
    assert!(w.ledger.checked(w.now, job.begun, job.token, job.conn).is_ok());
    assert!(w.ledger.alarm() > w.now);
    w.over(job.conn);
}

#[test]
fn a_stack_that_changes_at_its_top_only_changes_no_deadline() {
    let mut w = World::new(Settings { max_idle: Some(secs(10)), ..settings() });
    let (a, b) = (w.get(), w.get());
    w.returned(a);
    w.returned(b);
    assert_eq!(w.ledger.stack_changed_at, Moment::BIRTH);
    w.run(secs(1));
    w.use_once(ms(1));
    assert_eq!(w.ledger.stack_changed_at, Moment::BIRTH);
}

#[test]
fn what_is_alive_is_neither_opened_nor_closed() {
    let mut w = World::new(settings());
    w.burst(2);
    w.takes.close = secs(1);
    let a = w.get();
    w.returned_as(a, Condition::Discard(CloseReason::Discarded));
    w.takes.open = secs(1);
    w.get();
    w.get();
    assert_eq!((w.counts().idle, w.counts().in_use, w.counts().opening, w.counts().closing), (0, 1, 1, 1));
    assert_eq!(w.ledger.counted.alive(), 1);
}
