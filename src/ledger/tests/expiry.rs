//! What falls due with time: idleness, lifetime, keepalive, leaks and limits.

use super::world::*;

#[test]
fn seventeen_idle_connections_are_evicted_at_once() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    w.burst(17);
    assert_eq!(w.counts().idle, 17);
    w.run(ms(1_999));
    assert_eq!(w.counts().idle, 17, "not a moment too early");
    w.run(ms(1));
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Idle)), (0, 17));
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
    w.run(secs(10)); // past the limits of the jobs
    assert_eq!(w.ledger.alarm(), Moment::NEVER, "an empty pool sets no alarm");
}

#[test]
fn a_trickle_of_checkouts_keeps_one_connection() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    w.burst(17);
    for _ in 0..20 {
        w.run(ms(100));
        w.use_once(ms(1));
    }
    assert_eq!(w.server.len(), 1);
}

#[test]
fn the_floor_is_not_opened_and_closed_over_and_over() {
    for trickle in [false, true] {
        let mut w = World::new(Settings { min_idle: 4, max_idle: Some(secs(2)), ..settings() });
        w.ledger.set_min_idle(w.now, 4);
        w.apply();
        for _ in 0..600_000 / 100 {
            w.run(ms(100));
            if trickle {
                w.use_once(ms(1));
            }
        }
        assert!(w.dials.len() <= 5, "{} opens in ten minutes", w.dials.len());
        assert!(w.counts().idle >= 4);
    }
}

#[test]
fn the_floor_stays_when_the_others_are_evicted() {
    let mut w = World::new(Settings { min_idle: 2, max_idle: Some(secs(2)), ..settings() });
    w.burst(6);
    w.run(secs(3));
    assert_eq!(w.counts().idle, 2);
    w.run(secs(600));
    assert_eq!(w.counts().idle, 2);
}

#[test]
fn with_max_idle_zero_nothing_is_kept() {
    let mut w = World::new(Settings { max_idle: Some(Duration::ZERO), ..settings() });
    w.use_once(ms(5));
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Idle)), (0, 1));
    // But a waiter gets the connection.
    w = World::new(Settings { max_idle: Some(Duration::ZERO), max_size: 1, ..settings() });
    let (a, b) = (w.get(), w.get());
    w.returned(a);
    assert!(w.has(b));
}

#[test]
fn with_max_idle_none_everything_is_kept() {
    let mut w = World::new(Settings { max_idle: None, ..settings() });
    w.burst(17);
    w.run(secs(1_000_000));
    assert_eq!(w.counts().idle, 17);
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
}

#[test]
fn expired_connections_are_closed_on_time() {
    let mut w = World::new(Settings { max_lifetime: Some(secs(3)), ..settings() });
    w.takes.open = ms(10);
    w.burst(3);
    let kept = w.get();
    w.run_to(Moment::BIRTH.plus(secs(3)));
    assert_eq!(w.server.len(), 1, "the idle ones at the deadline, which counts from before the connect");
    w.run(secs(10));
    w.returned(kept);
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Lifetime)), (0, 3), "the one in use on return");
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
}

#[test]
fn jitter_is_subtracted_from_the_lifetime() {
    let mut w = World::new(Settings { max_lifetime: Some(secs(100)), lifetime_jitter: 0.1, ..settings() });
    w.use_once(ms(1)); // the world draws the greatest jitter
    w.run_to(Moment::BIRTH.plus(ms(89_999)));
    assert_eq!(w.server.len(), 1);
    w.run(ms(1));
    assert_eq!(w.server.len(), 0);
}

#[test]
fn the_resolution_of_the_clock_hands_nothing_out_late() {
    let mut w = World::with_resolution(Settings { max_lifetime: Some(secs(3)), ..settings() }, ms(4));
    w.use_once(ms(1));
    w.run_to(Moment::BIRTH.plus(ms(2_996)));
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Nothing), "the true time may be 3,000 ms");
    w.apply();
    w.run(ms(1));
    assert_eq!(w.closed_for(CloseReason::Lifetime), 1);
}

#[test]
fn a_floor_connection_is_replaced_before_it_expires() {
    let mut w = World::new(Settings { min_idle: 4, max_lifetime: Some(secs(3)), max_idle: None, ..settings() });
    w.takes.open = ms(20);
    w.ledger.set_min_idle(w.now, 4);
    w.apply();
    w.run(secs(1));
    for _ in 0..6000 {
        w.run(ms(10));
        assert!(w.counts().idle >= 4, "at {:?}", w.now);
        assert!(w.server.values().all(|(born, _)| w.now.since(*born) <= secs(3)));
    }
    assert!(w.dials.len() as u64 <= 4 * (61 / 2), "{} opens: replaced once each, not over and over", w.dials.len());
}

#[test]
fn the_replacement_of_a_floor_connection_is_not_evicted_for_the_one_that_it_replaces() {
    let settings = Settings {
        min_idle: 2,
        max_idle: Some(secs(1)),
        max_lifetime: Some(secs(100)),
        lifetime_jitter: 0.0,
        ..settings()
    };
    let mut w = World::new(settings);
    w.ledger.set_min_idle(w.now, 2);
    w.apply();
    // From 95 s on each has a replacement, which is idle for longer than `max_idle` before the first ones expire.
    w.run(secs(99));
    assert_eq!((w.dials.len(), w.counts().idle), (4, 2), "each was replaced once, and those that expire are gone");
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
}

#[test]
fn a_floor_that_fills_the_pool_expires_before_it_is_replaced() {
    let mut w =
        World::new(Settings { min_idle: 4, max_size: 4, max_lifetime: Some(secs(3)), max_idle: None, ..settings() });
    w.takes.open = ms(20);
    w.ledger.set_min_idle(w.now, 4);
    w.apply();
    w.run(secs(60));
    assert_eq!(w.most, 4);
    assert!(w.dials.len() >= 4 * 19);
}

#[test]
fn keepalive_checks_one_at_a_time_and_keeps_its_place() {
    let mut w = World::new(Settings { keepalive: Some(secs(10)), max_idle: Some(secs(25)), ..settings() });
    w.takes.check = ms(100);
    w.burst(3);
    let order: Vec<_> = w.ledger.idle.iter().map(|i| i.1).collect();
    w.run(secs(10));
    assert_eq!(w.counts().checking, 1);
    w.run(ms(50));
    assert_eq!((w.counts().checking, w.counts().idle), (1, 2));
    w.run(secs(1));
    assert_eq!(w.ledger.idle.iter().map(|i| i.1).collect::<Vec<_>>(), order);
    w.run_to(Moment::BIRTH.plus(secs(25)));
    assert_eq!(w.server.len(), 0, "maintenance is not use");
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
}

/// A check without a limit ends like any other, however long it took.
#[test]
fn keepalive_goes_on_after_a_slow_check_without_a_limit() {
    let never = Duration::MAX;
    let mut w = World::new(Settings { keepalive: Some(secs(10)), validation_timeout: never, ..settings() });
    w.takes.check = secs(1);
    w.burst(1);
    w.run(secs(1));
    for _ in 0..3 {
        w.run(secs(9));
        assert_eq!(w.counts().checking, 1);
        w.run(ms(500));
        // The reaper looks again, for whatever reason. By now the check is slow.
        w.ledger.reap(w.now, 0.0);
        w.run(ms(500));
        assert_eq!((w.counts().checking, w.counts().idle), (0, 1));
    }
}

#[test]
fn an_abandoned_job_no_longer_has_its_slot() {
    let mut w = World::new(Settings { max_size: 3, ..settings() });
    w.takes.open = secs(60);
    let a = w.get();
    w.run(secs(10));
    assert_eq!((w.abandoned, w.counts().abandoned), (1, 1));
    w.takes.open = ms(1);
    w.run(secs(2));
    assert!(w.has(a), "the next attempt came through");
    assert_eq!((w.server.len(), w.counts().abandoned), (3, 2), "the abandoned opens still dial");
    w.run(secs(60));
    assert_eq!((w.server.len(), w.counts().abandoned), (1, 0), "what they brought was closed");
}

#[test]
fn beyond_the_bound_a_stuck_close_keeps_its_slot() {
    let mut w = World::new(Settings { max_size: 2, ..settings() });
    w.burst(2);
    w.takes.close = secs(1_000);
    for thread in [w.get(), w.get()] {
        w.returned_as(thread, Condition::Discard(CloseReason::Discarded));
    }
    w.run(secs(5));
    assert_eq!((w.counts().abandoned, w.counts().closing), (2, 0));
    let probe = w.get();
    w.run(secs(60));
    w.returned_as(probe, Condition::Discard(CloseReason::Discarded));
    w.run(secs(5));
    assert_eq!((w.counts().abandoned, w.counts().closing, w.abandoned), (2, 1, 3));
    w.run(secs(2_000));
    assert_eq!((w.counts().abandoned, w.counts().closing, w.server.len()), (0, 0, 0));
}

#[test]
fn a_leak_is_reported_once_per_checkout() {
    let mut w = World::new(Settings { leak_threshold: Some(secs(5)), ..settings() });
    let a = w.get();
    let id = w.in_use[&a].1;
    w.run(ms(4_999));
    assert!(w.leaks.is_empty());
    w.run(ms(1));
    assert_eq!(w.leaks, [id]);
    w.run(secs(60));
    assert_eq!(w.leaks, [id]);
    w.returned(a);
    assert_eq!(w.ledger.tally.usage_time.max(), secs(65), "since the checkout, not since the report");
    let b = w.get();
    w.run(secs(5));
    assert_eq!(w.leaks, [id, id]);
    w.returned(b);
}

#[test]
fn after_the_grace_an_open_that_hangs_has_no_limit() {
    let mut w = World::new(Settings { max_size: 3, ..settings() });
    w.burst(1);
    let (a, b) = (w.get(), w.get());
    w.returned_as(b, Condition::Discard(CloseReason::Discarded));
    w.takes.open = secs(60);
    w.takes.close = secs(2);
    w.get();
    w.ledger.close(w.now);
    w.apply();
    w.run(secs(1));
    assert!(!w.ledger.is_over(), "an open and a close have limits");
    w.returned(a);
    w.ledger.abandon_opens(w.now);
    w.apply();
    assert!(!w.ledger.is_over(), "the close still has a limit");
    w.run(secs(2));
    assert!(w.ledger.is_over());
    assert_eq!((w.counts().opening, w.counts().total(), w.abandoned), (1, 1, 0));
    w.run(secs(60));
    assert_eq!((w.counts().total(), w.server.len()), (0, 0), "closed when it arrived");
    assert_eq!(w.abandoned, 0);
}

/// When the reaper is to look next, after it has looked at this moment.
fn next_look(w: &mut World) -> Duration {
    w.ledger.reap(w.now, 0.0);
    assert!(!w.ledger.effects.wake_reaper, "the reaper itself has looked");
    w.apply();
    w.ledger.alarm().since(Moment::BIRTH)
}

#[test]
fn the_reaper_sleeps_until_what_is_due_first() {
    let two = |w: &mut World| {
        let a = w.get();
        w.run(secs(3));
        let b = w.get();
        w.run(secs(1));
        (a, b)
    };
    let max_idle = None;
    let mut w = World::new(Settings { max_idle, max_lifetime: Some(secs(100)), ..settings() });
    two(&mut w);
    assert_eq!(next_look(&mut w), secs(100));

    w = World::new(Settings { max_idle, leak_threshold: Some(secs(5)), ..settings() });
    two(&mut w);
    assert_eq!(next_look(&mut w), secs(5));

    w = World::new(Settings { max_idle, keepalive: Some(secs(10)), ..settings() });
    let (a, b) = two(&mut w);
    w.returned(a);
    w.run(secs(1));
    w.returned(b);
    assert_eq!(next_look(&mut w), secs(14));

    // While a caller waits: until the open is no longer counted on.
    w = World::new(settings());
    w.takes.open = Duration::MAX;
    w.get();
    assert_eq!(next_look(&mut w), secs(1));
}

#[test]
fn a_floor_of_one_is_replaced_a_twentieth_of_its_life_before_its_end_and_at_most_five_seconds() {
    for (whole, dialled) in [(secs(40), secs(38)), (secs(1_000), secs(995))] {
        let mut w = World::new(Settings { min_idle: 1, max_lifetime: Some(whole), max_idle: None, ..settings() });
        w.ledger.set_min_idle(w.now, 1);
        w.apply();
        w.run(secs(1));
        assert_eq!(next_look(&mut w), dialled);
        w.run_to(Moment::BIRTH.plus(whole));
        assert_eq!(w.dials, [Moment::BIRTH, Moment::BIRTH.plus(dialled)]);
    }
}

#[test]
fn a_connection_in_use_near_its_end_stays_in_use() {
    let mut w = World::new(Settings { min_idle: 1, max_lifetime: Some(secs(40)), ..settings() });
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(1));
    let a = w.get();
    w.run(secs(38));
    assert_eq!(w.counts().in_use, 1);
    w.returned(a);
}

#[test]
fn only_what_is_due_is_evicted() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    let (a, b) = (w.get(), w.get());
    w.returned(a);
    w.run(secs(1));
    w.returned(b);
    w.run(secs(1));
    assert_eq!((w.counts().idle, w.closed_for(CloseReason::Idle)), (1, 1));
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
}

#[test]
fn what_is_abandoned_is_counted() {
    let mut w = World::new(Settings { leak_threshold: Some(secs(5)), ..settings() });
    w.takes.open = Duration::MAX;
    let a = w.get();
    w.run(ms(10_999));
    let tally = &w.ledger.tally;
    assert_eq!((tally.abandonments, tally.failed_opens.total(), tally.leaks), (1, 1, 0));
    w.takes.open = ms(1);
    w.run(secs(30));
    assert!(w.has(a));
    assert_eq!(w.ledger.tally.leaks, 1);
}

#[test]
fn an_abandoned_check_makes_its_siblings_suspect_and_an_abandoned_reset_does_not() {
    for reset in [true, false] {
        let validate = Validate::AfterIdle(secs(8));
        let mut w = World::new(Settings { validate, keepalive: (!reset).then_some(secs(5)), ..settings() });
        w.burst(2);
        w.takes.check = Duration::MAX;
        if reset {
            let a = w.get();
            w.returned_as(a, Condition::Reset);
            w.run(secs(5));
        } else {
            w.run(secs(7));
            w.suspect = w.event();
        }
        assert_eq!((w.ledger.tally.abandonments, w.ledger.tally.closes[CloseReason::Abandoned as usize]), (1, 1));
        let top = w.ledger.idle.last().map(|&(index, _)| w.ledger.is_suspect(&w.ledger.slots[index as usize]));
        assert!(top.is_none_or(|suspect| suspect != reset), "{top:?}");
        assert_eq!(w.ledger.check_failures, u32::from(!reset));
    }
}

#[test]
fn after_the_grace_of_a_close_the_reaper_is_told_that_it_is_over() {
    let mut w = World::new(settings());
    w.takes.open = Duration::MAX;
    w.get();
    w.ledger.close(w.now);
    w.apply();
    w.run(secs(1));
    assert!(!w.ledger.is_over());
    w.ledger.abandon_opens(w.now);
    assert_eq!((w.ledger.is_over(), w.ledger.alarm()), (true, w.now));
}

#[test]
fn a_connection_that_was_idle_for_too_long_while_it_was_reset_is_kept_for_the_floor_only() {
    for floor in [0, 1] {
        let mut w = World::new(Settings { max_idle: Some(secs(1)), min_idle: floor, max_size: 1, ..settings() });
        let a = w.get();
        w.takes.check = secs(2);
        w.returned_as(a, Condition::Reset);
        w.run(ms(1_999));
        w.ledger.rules.change(|s| s.min_idle = floor);
        w.run(ms(1));
        assert_eq!((w.counts().idle, w.closed_for(CloseReason::Idle)), (floor, 1 - floor as usize));
    }
}

#[test]
fn the_reaper_sleeps_until_a_keepalive_is_due() {
    let mut w = World::new(Settings { keepalive: Some(secs(10)), max_size: 1, ..settings() });
    w.burst(1);
    w.run(secs(1));
    let woken = w.reaps;
    for _ in 0..30 {
        w.use_once(ms(1));
        w.run(secs(1));
    }
    assert!(w.reaps - woken <= 3, "it looks when a keepalive would have been due, and the connection was used since");
}

#[test]
fn a_close_does_not_wake_the_reaper_of_a_pool_that_is_open() {
    let mut w = World::new(Settings { max_size: 2, ..settings() });
    w.burst(2);
    w.run(secs(1));
    let woken = w.reaps;
    let broken = w.get();
    w.returned_as(broken, Condition::Broken);
    w.run(secs(1));
    assert_eq!((w.reaps, w.counts().idle), (woken, 1));
}
