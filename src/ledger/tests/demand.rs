//! Which connections are opened and checked, and when: demand, back-off, patience, and the bound of abandoned jobs.

use super::world::*;

#[test]
fn opens_are_parallel_up_to_the_limit() {
    let mut w = World::new(Settings { max_size: 17, ..settings() });
    w.takes.open = ms(100);
    let threads: Vec<_> = (0..17).map(|_| w.get()).collect();
    w.run(ms(499));
    assert_eq!(w.in_use.len(), 16);
    w.run(ms(1));
    assert_eq!(w.in_use.len(), threads.len(), "ceil(17 / 4) x 100 ms");
}

#[test]
fn connections_that_are_closing_count_against_max_size() {
    let mut w = World::new(Settings { max_size: 10, ..settings() });
    w.takes.close = secs(3);
    w.burst(10);
    for thread in (0..10).map(|_| w.get()).collect::<Vec<_>>() {
        w.returned_as(thread, Condition::Discard(CloseReason::Discarded));
    }
    let threads: Vec<_> = (0..10).map(|_| w.get()).collect();
    assert!(w.in_use.is_empty(), "there is no room");
    // (Four begin at once, and at least four more each time that those before take longer than usual.)
    w.run(secs(3) + CLOSE_PATIENCE * 2);
    assert_eq!((w.in_use.len(), w.most), (threads.len(), 10));
}

#[test]
fn demand_that_is_gone_is_not_dialled() {
    // Two wait at once, one open is under way at most; a return serves the second before its open is ordered.
    let mut w = World::new(Settings { parallel_opens: 1, ..settings() });
    w.takes.open = ms(150);
    w.burst(1);
    let a = w.get();
    let (b, c) = (w.get(), w.get());
    w.run(ms(2));
    w.returned(a);
    assert!(w.has(b));
    w.returned(b);
    assert!(w.has(c));
    w.returned(c);
    w.run(secs(1));
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn an_ordered_open_asks_again_before_it_dials() {
    let mut l: Ledger<Conn, Thread> = Ledger::new(settings(), Duration::ZERO);
    let (Join::Queued(ticket), _) = l.join(Moment::BIRTH, here(), None, false, 1) else { panic!() };
    let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
    assert!(l.leave(Moment::BIRTH, ticket).is_some());
    assert!(l.begin(Moment::BIRTH, token, 0.0).is_none(), "no caller wants it any longer");
    assert_eq!(l.counts().total(), 0);
}

#[test]
fn an_ordered_open_may_serve_a_caller_that_does_not_wait() {
    let mut l: Ledger<Conn, Thread> = Ledger::new(settings(), Duration::ZERO);
    let (Join::Queued(ticket), _) = l.join(Moment::BIRTH, here(), None, false, 1) else { panic!() };
    assert!(l.leave(Moment::BIRTH, ticket).is_some());
    l.prepare(Moment::BIRTH);
    let [Order::Job(SlotJob::Open(_))] = l.effects.orders[..] else { panic!("{:?}", l.effects.orders) };
    let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(Moment::BIRTH, token, 0.0).expect("asked for since");
    assert!(l.opened(Moment::BIRTH, token, 1).is_ok());
    assert!(matches!(l.take(Moment::BIRTH, here(), false), Take::Ready(..)));
}

#[test]
fn after_transient_failures_opens_back_off_and_recover() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    let a = w.get();
    w.run(secs(10));
    // 0, 50, 150, 350, 750, then every second.
    assert_eq!(w.dials.len(), 5 + 9);
    assert!(w.refused.is_empty());
    w.refuse = None;
    w.run(secs(1));
    assert!(w.has(a), "within a second of the server's return");
}

#[test]
fn whatever_the_jitter_no_pause_is_longer_than_a_second_while_a_caller_waits() {
    for jitter in [0.0, 0.5, 1.0] {
        let mut w = World::new(settings());
        w.refuse = Some(Reach::Server);
        w.jitter = jitter;
        w.get();
        w.run(secs(60));
        let pauses = w.dials.windows(2).map(|d| d[1].since(d[0]));
        assert!(pauses.clone().all(|pause| (BACKOFF_FIRST..=secs(1)).contains(&pause)), "{jitter}");
        assert_eq!(pauses.max(), Some(ms(1_000 - (200.0 * jitter) as u64)), "not all pools in step");
    }
}

#[test]
fn where_nobody_listens_opens_are_tried_every_200_ms_while_a_caller_waits() {
    for jitter in [0.0, 1.0] {
        let mut w = World::new(settings());
        (w.refuse, w.jitter) = (Some(Reach::Nobody), jitter);
        let a = w.get();
        w.run(secs(60));
        let pauses: Vec<Duration> = w.dials.windows(2).map(|d| d[1].since(d[0])).collect();
        let longest = ms(200 - (40.0 * jitter) as u64);
        assert!(pauses.iter().all(|pause| (BACKOFF_FIRST..=longest).contains(pause)), "{jitter}");
        assert!(pauses[5..].iter().all(|&pause| pause == longest), "{jitter}");
        w.refuse = None;
        w.run(longest);
        assert!(w.has(a), "{jitter}");
    }
}

#[test]
fn a_server_that_begins_to_answer_is_logged_in_to_slower_and_slower() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Nobody);
    w.get();
    w.run(secs(60));
    let away = w.dials.len();
    w.refuse = Some(Reach::Server);
    w.run(secs(10));
    let pauses: Vec<Duration> = w.dials[away..].windows(2).map(|d| d[1].since(d[0])).collect();
    assert_eq!(pauses[..6], [50, 100, 200, 400, 800, 1_000].map(ms));
}

#[test]
fn a_server_that_is_sometimes_there_is_not_logged_in_to_more_often() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Nobody);
    w.get();
    let mut logins = 0;
    for n in 0..2_000 {
        let reach = if n % 2 == 0 { Reach::Server } else { Reach::Nobody };
        let before = w.dials.len();
        w.refuse = Some(reach);
        while w.dials.len() == before && w.now < Moment::BIRTH.plus(secs(60)) {
            w.run(ms(1));
        }
        logins += usize::from(reach == Reach::Server);
        if w.now >= Moment::BIRTH.plus(secs(60)) {
            // 50, 100, 200, 400, 800, then every second, and as long as the attempts between them take.
            assert!((45..=60).contains(&logins), "{logins} logins in a minute");
            return;
        }
    }
    panic!("{logins} logins in {:?}", w.now);
}

#[test]
fn while_no_caller_waits_the_pause_grows_and_the_first_waiter_ends_it() {
    let mut w = World::new(Settings { min_idle: 1, ..settings() });
    w.refuse = Some(Reach::Server);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(300));
    let before = w.dials.len();
    assert!(before < 25, "{before} dials in five minutes with no caller");
    w.refuse = None;
    let a = w.get();
    assert!(w.has(a), "the waiter shortened the back-off");
}

#[test]
fn build_counts_as_a_waiter_for_the_back_off() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    w.ledger.watchers = 1;
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(10));
    // 0, 50, 150, 350, 750, then every second.
    assert_eq!(w.dials.len(), 5 + 9);
}

#[test]
fn a_back_off_that_is_shortened_keeps_its_least_pause() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    for _ in 0..100 {
        let thread = w.get();
        w.run(ms(1));
        w.leave(thread);
    }
    assert!(w.dials.len() <= 3, "{} dials in 100 ms", w.dials.len());
    assert!(w.dials.windows(2).all(|d| d[1].since(d[0]) >= BACKOFF_FIRST));
}

#[test]
fn a_permanent_refusal_fails_all_waiters_at_once_and_is_remembered() {
    let mut w = World::new(Settings { min_idle: 1, ..settings() });
    w.refuse = Some(Reach::Refusal);
    w.takes.open = ms(3);
    let threads: Vec<_> = (0..8).map(|_| w.get()).collect();
    w.run(ms(3));
    assert_eq!(w.refused, threads, "one round trip, every waiter");
    let dialled = w.dials.len();
    for _ in 0..490 {
        w.run(ms(10));
        let thread = w.get();
        assert_eq!(w.refused.last(), Some(&thread));
    }
    assert_eq!(w.dials.len(), dialled, "no further login, however many ask");
    w.run(secs(1));
    assert_eq!(w.dials.len(), dialled + 1, "one at a time while it fails");
    w.refuse = None;
    w.run(secs(60));
    let thread = w.get();
    w.run(ms(3));
    assert!(w.has(thread), "passwords are mended");
}

#[test]
fn while_a_connection_is_alive_waiters_keep_waiting() {
    let mut w = World::new(settings());
    w.burst(1);
    let alive = w.get();
    w.refuse = Some(Reach::Refusal);
    let b = w.get();
    w.run(secs(1));
    assert!(w.refused.is_empty());
    w.returned(alive);
    assert!(w.has(b));
    let c = w.get();
    w.returned_as(b, Condition::Broken);
    assert_eq!(w.refused, [c], "now no connection is alive");
}

#[test]
fn six_dead_connections_cost_one_connect() {
    let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), max_size: 6, ..settings() });
    w.burst(6);
    w.run(secs(10));
    w.dead = w.server.keys().copied().collect();
    w.takes.check = secs(1); // each a full timeout
    let a = w.get();
    w.run(secs(1));
    assert!(w.has(a), "with the first found dead, a new one is opened in its place");
}

#[test]
fn a_silent_server_costs_no_more_jobs_than_max_size_and_a_probe_a_minute() {
    let mut w = World::new(Settings { max_size: 3, open_timeout: secs(1), ..settings() });
    w.takes.open = Duration::MAX;
    let a = w.get();
    w.run(secs(30));
    assert_eq!(w.counts().abandoned, 3);
    w.run(secs(600));
    assert!(w.counts().abandoned <= 3 + 11, "{}", w.counts().abandoned);
    w.takes.open = ms(1);
    w.run(secs(61));
    assert!(w.has(a), "a probe came through");
}

#[test]
fn a_reset_or_a_keepalive_that_hangs_delays_no_caller() {
    for reset in [true, false] {
        let mut w = World::new(Settings { keepalive: (!reset).then_some(secs(10)), ..settings() });
        w.takes.open = ms(10);
        w.burst(1);
        w.takes.check = Duration::MAX;
        if reset {
            let a = w.get();
            w.returned_as(a, Condition::Reset);
        } else {
            w.run(secs(10));
        }
        assert_eq!(w.counts().checking, 1);
        w.run(ms(30));
        let b = w.get();
        w.run(ms(69));
        assert!(!w.has(b) && w.dials.len() == 1, "it may come any moment");
        w.run(ms(11));
        assert!(w.has(b), "there is room for another open");
        assert_eq!(w.counts().checking, 1, "the check goes on, and is not abandoned");
        w.returned(b);
    }
}

#[test]
fn wishes_of_callers_that_do_not_wait_prepare_one_connection_at_a_time() {
    let mut w = World::new(settings());
    w.takes.open = ms(100);
    for _ in 0..10 {
        w.ledger.prepare(w.now);
        w.apply();
    }
    assert_eq!(w.dials.len(), 1);
    w.run(ms(100));
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Ready(..)));
}

#[test]
fn an_open_that_hangs_keeps_no_caller_from_an_idle_connection() {
    for waits in [true, false] {
        let mut w = World::new(Settings { validate: Validate::AfterIdle(secs(1)), ..settings() });
        w.burst(1);
        let a = w.get();
        w.takes.open = Duration::MAX;
        let b = w.get(); // dials, and hangs
        w.returned(a);
        w.returned(b);
        w.run(secs(2)); // the idle connection needs a check by now
        assert_eq!((w.counts().idle, w.counts().opening), (1, 1));
        if waits {
            let c = w.get();
            assert!(w.has(c), "served after the check, and no open");
        } else {
            assert!(w.try_get().is_none());
            assert!(w.try_get().is_some(), "the connection was checked meanwhile");
        }
    }
}

#[test]
fn beside_an_open_that_hangs_one_more_is_dialled() {
    let mut w = World::new(settings());
    w.takes.open = Duration::MAX;
    let a = w.get();
    w.run(ms(999));
    assert_eq!(w.dials.len(), 1, "it may come any moment");
    w.takes.open = ms(10);
    w.run(ms(11));
    assert!(w.has(a), "long before the first is abandoned");
    assert_eq!((w.abandoned, w.dials.len()), (0, 2));
}

/// `build` orders the first open, and then begins to wait for it.
#[test]
fn an_open_that_hangs_already_is_noticed_when_build_begins_to_wait() {
    for begun in [0, 1, 500] {
        let mut w = World::new(settings());
        w.takes.open = Duration::MAX;
        w.ledger.set_min_idle(w.now, 1);
        w.apply();
        w.run(ms(begun));
        w.ledger.watch_begins();
        w.apply();
        w.run(ms(1_001 - begun));
        assert_eq!(w.dials.len(), 2, "{begun}");
    }
}

#[test]
fn how_long_an_open_is_counted_on_depends_on_what_is_usual() {
    for (usual, patience) in [(ms(10), ms(250)), (ms(500), ms(1_500))] {
        let mut w = World::new(settings());
        w.takes.open = usual;
        w.burst(1);
        w.get();
        w.takes.open = Duration::MAX;
        let a = w.get();
        w.run(patience - ms(1));
        assert_eq!(w.dials.len(), 2);
        w.takes.open = usual;
        w.run(usual + ms(1));
        assert!(w.has(a));
        assert_eq!((w.abandoned, w.dials.len()), (0, 3));
    }
}

#[test]
fn a_server_that_answers_no_connect_is_not_dialled_a_third_time() {
    let mut w = World::new(settings());
    w.takes.open = Duration::MAX;
    w.get();
    w.run(secs(9));
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn the_close_of_a_recycled_connection_that_hangs_is_abandoned_for_a_waiter() {
    let mut w = World::new(Settings { max_size: 3, ..settings() });
    w.burst(3);
    w.takes.close = Duration::MAX;
    w.ledger.recycle(w.now);
    w.apply();
    let threads: Vec<_> = (0..2).map(|_| w.get()).collect();
    w.run(ms(499));
    assert!(w.in_use.is_empty() && w.abandoned == 0, "the closes may end any moment");
    w.run(ms(1));
    assert!(threads.iter().all(|thread| w.has(*thread)), "a tenth of the limit of a close");
    assert_eq!((w.abandoned, w.counts().abandoned, w.counts().closing), (2, 2, 1), "no more than are waited for");
    assert_eq!(w.abandoned_after, [ms(500); 2], "that long, and not the limit, is what is told");
    // No caller waits for the third.
    w.run(secs(4));
    assert_eq!(w.abandoned, 2);
}

#[test]
fn no_close_is_abandoned_for_a_place_that_cannot_be_dialled() {
    // `max_size` jobs would then be abandoned: while opens fail, the next dial is a minute after the last.
    for fails in [true, false] {
        let mut w = World::new(Settings { max_size: 2, ..settings() });
        w.burst(1);
        w.takes.close = secs(2);
        let kept = w.get();
        if fails {
            w.refuse = Some(Reach::Server);
            w.ledger.prepare(w.now);
            w.apply();
        }
        w.run(secs(40));
        w.refuse = None;
        w.ledger.resize(w.now, 1);
        w.returned_as(kept, Condition::Outdated);
        let a = w.get();
        w.run(ms(500));
        assert_eq!(w.has(a), !fails);
        assert_eq!(w.abandoned, u32::from(!fails));
        w.run(ms(1_500));
        assert!(w.has(a), "the close has ended");
    }
}

#[test]
fn a_reset_that_hangs_does_not_block_a_pool_of_one_for_a_minute() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    w.takes.check = Duration::MAX;
    let (a, b) = (w.get(), w.get());
    w.returned_as(a, Condition::Reset);
    w.run(secs(5));
    assert!(w.has(b), "the server answers to connects");
    assert_eq!((w.counts().abandoned, w.counts().total()), (1, 1));
    // A second reset keeps its slot: no more jobs may be abandoned.
    let c = w.get();
    w.returned_as(b, Condition::Reset);
    w.run(secs(5));
    assert!(!w.has(c));
    assert_eq!((w.counts().abandoned, w.counts().total()), (1, 1));
}

#[test]
fn a_wish_that_shortens_the_pause_is_carried_out() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    for _ in 0..6 {
        w.run(secs(60));
        w.ledger.prepare(w.now);
        w.apply();
    }
    let dials = w.dials.len();
    w.run(ms(1));
    w.refuse = None;
    w.ledger.prepare(w.now);
    w.apply();
    w.run(ms(50));
    assert_eq!((w.dials.len(), w.counts().idle), (dials + 1, 1), "50 ms after the last failure");
}

#[test]
fn the_ledger_says_why_the_last_open_failed() {
    let mut w = World::new(settings());
    assert_eq!(w.ledger.failing(), None);
    w.refuse = Some(Reach::Server);
    w.get();
    assert_eq!(w.ledger.failing(), Some(FailedOpen::AsReported));
    w.refuse = None;
    w.run(ms(50));
    assert_eq!(w.ledger.failing(), None, "the next open has succeeded");

    w = World::new(Settings { max_lifetime: Some(secs(5)), ..settings() });
    w.takes.open = secs(6);
    w.get();
    w.run(secs(6));
    assert_eq!(w.ledger.failing(), Some(FailedOpen::TooOld { took: secs(6) }));

    w = World::new(settings());
    w.takes.open = Duration::MAX;
    w.get();
    w.run(secs(10));
    assert_eq!(w.ledger.failing(), Some(FailedOpen::NoAnswer));

    w = World::new(Settings { max_size: 1, ..settings() });
    (w.takes.open, w.refuse) = (secs(15), Some(Reach::Server));
    w.get();
    w.run(secs(10));
    assert_eq!(w.ledger.failing(), Some(FailedOpen::NoAnswer));
    w.run(secs(5));
    assert_eq!(w.ledger.failing(), Some(FailedOpen::AsReported), "the abandoned open came back with a cause");
}

#[test]
fn a_failed_open_is_counted_once_by_the_type_of_its_error() {
    let counts = |w: &World| {
        let of = |error_type| w.ledger.tally.failed_opens.of(&error_type);
        [ErrorType::OTHER, ErrorType::TIMEOUT, ErrorType::TOO_OLD].map(of)
    };
    // Refused, and then one that is abandoned and comes back with an error of its own.
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    w.refuse = Some(Reach::Server);
    w.get();
    assert_eq!(counts(&w), [1, 0, 0]);
    w.takes.open = secs(15);
    w.run(secs(11));
    assert_eq!(counts(&w), [1, 1, 0]);
    w.run(secs(5));
    assert_eq!((counts(&w), w.ledger.tally.failed_opens.total()), ([1, 1, 0], 2));

    w = World::new(Settings { max_lifetime: Some(secs(5)), ..settings() });
    w.takes.open = secs(6);
    w.get();
    w.run(secs(6));
    let total = w.ledger.tally.failed_opens.total();
    assert!(total > 0 && counts(&w) == [0, 0, total], "{:?}", counts(&w));
}

#[test]
fn an_alarm_for_a_slow_open_is_set_only_if_something_waits_for_it() {
    for (watchers, alarm) in [(0, secs(10)), (1, secs(1))] {
        let mut w = World::new(Settings { min_idle: 1, ..settings() });
        w.takes.open = Duration::MAX;
        w.ledger.watchers = watchers;
        w.ledger.set_min_idle(w.now, 1);
        w.apply();
        w.run(Duration::ZERO);
        assert_eq!(w.ledger.alarm(), Moment::BIRTH.plus(alarm));
        w.run(secs(2));
        assert_eq!(w.dials.len(), 1 + watchers as usize, "`build` has one more open dialled beside one that hangs");
    }
}

#[test]
fn an_ordered_close_that_waits_gets_its_thread_when_those_before_take_long() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    w.burst(5);
    w.takes.close = Duration::MAX;
    w.run(secs(2));
    assert_eq!((w.ledger.counted.begun_closes(), w.ledger.counted.ordered_closes()), (4, 1));
    assert_eq!(w.ledger.alarm(), w.now.plus(CLOSE_PATIENCE));
    w.run(CLOSE_PATIENCE);
    assert_eq!(w.ledger.counted.ordered_closes(), 0);
    w.run(CLOSE_PATIENCE);
    assert!(w.ledger.alarm() > w.now.plus(secs(4)), "no close waits for another any longer");
}

#[test]
fn a_wish_ends_when_a_connection_is_ready() {
    let mut w = World::new(settings());
    w.burst(1);
    w.ledger.prepare(w.now);
    w.apply();
    w.get();
    w.run(secs(1));
    assert_eq!(w.dials.len(), 1);
}

#[test]
fn an_open_for_the_floor_that_waits_long_for_its_thread_is_dialled() {
    let mut w = World::new(Settings { min_idle: 1, ..settings() });
    w.takes.start = secs(2);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(ms(1_500));
    w.ledger.reap(w.now, 0.0); // for whatever reason: the open is slow by now
    w.apply();
    assert_eq!(w.ledger.counted.slow_opens(), 1);
    w.run(ms(500));
    assert_eq!((w.dials.len(), w.counts().idle), (1, 1));
}

#[test]
fn a_failed_check_has_no_connection_opened_that_no_caller_wants() {
    let mut w = World::new(Settings { keepalive: Some(secs(10)), ..settings() });
    w.burst(2);
    w.dead = w.server.keys().copied().collect();
    w.run(secs(30));
    assert_eq!((w.dials.len(), w.counts().total()), (2, 0));
}

#[test]
fn the_floor_does_not_count_on_what_waiters_need() {
    let mut w = World::new(Settings { min_idle: 1, ..settings() });
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(Duration::ZERO);
    w.takes.open = ms(10);
    w.get();
    assert_eq!((w.counts().in_use, w.counts().opening), (1, 1), "for the floor");
    w.get();
    assert_eq!((w.counts().waiting, w.counts().opening), (1, 2), "one for the waiter, one for the floor");
}

#[test]
fn nothing_is_opened_for_a_waiter_that_is_on_its_way_to_a_connection() {
    let mut w = World::new(Settings { max_size: 5, fair_after: ms(1), ..settings() });
    w.wake_time = us(30);
    let a = w.get();
    w.takes.open = secs(1);
    w.get();
    assert_eq!((w.counts().waiting, w.dials.len()), (1, 2));
    w.returned(a);
    assert_eq!((w.counts().waiting, w.awake.len(), w.dials.len()), (1, 1, 2));
}

#[test]
fn beside_a_ready_connection_the_one_below_it_is_checked() {
    let validate = Validate::AfterIdle(secs(1));
    let mut w = World::new(Settings { validate, max_size: 3, fair_after: ms(1), ..settings() });
    w.burst(3);
    let a = w.get();
    w.run(secs(5));
    (w.wake_time, w.takes.check) = (secs(1), secs(1));
    w.get();
    w.returned(a);
    assert_eq!((w.awake.len(), w.counts().idle, w.counts().checking), (1, 2, 1), "left to running threads");
    w.run(ms(2));
    w.get();
    let third = w.get();
    assert!(!w.has(third));
    assert_eq!((w.counts().idle, w.counts().checking), (1, 2), "for three waiters: one is ready, two are checked");
}

#[test]
fn the_open_that_began_first_is_the_first_not_counted_on() {
    let mut w = World::new(settings());
    w.takes.open = Duration::MAX;
    w.get();
    w.run(ms(500));
    w.get();
    assert_eq!(w.ledger.alarm(), Moment::BIRTH.plus(secs(1)));
    w.run(ms(500));
    assert_eq!(w.dials.len(), 3, "one more beside the first");
}

#[test]
fn what_was_ordered_for_a_hurried_caller_that_left_serves_the_next() {
    for even_now in [true, false] {
        let mut w = World::new(settings());
        w.ledger.prepare_for_the_next(w.now, even_now);
        w.apply();
        w.run(Duration::ZERO);
        assert_eq!(w.dials.len(), usize::from(even_now), "it is ordered now only if it is asked for");
    }
    // What is checked serves a hurried caller without another check, and no other.
    for hurried in [true, false] {
        let mut w = World::new(Settings { validate: Validate::Always, ..settings() });
        w.burst(1);
        w.ledger.prepare_for_the_next(w.now, true);
        w.apply();
        w.run(ms(1));
        let (join, _) = w.ledger.join(w.now, here(), None, hurried, 9);
        assert_eq!(matches!(join, Join::Ready(..)), hurried, "{join:?}");
    }
}

#[test]
fn a_hurried_caller_that_left_shortens_the_back_off() {
    let mut w = World::new(Settings { min_idle: 1, ..settings() });
    w.refuse = Some(Reach::Server);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(100));
    let dials = w.dials.len();
    w.run(ms(100));
    assert_eq!(w.dials.len(), dials);
    w.ledger.prepare_for_the_next(w.now, true);
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!(w.dials.len(), dials + 1);
}

#[test]
fn where_no_caller_may_wait_the_one_that_asks_shortens_the_back_off() {
    let mut w = World::new(Settings { min_idle: 1, max_waiting: Some(0), ..settings() });
    w.refuse = Some(Reach::Server);
    w.ledger.set_min_idle(w.now, 1);
    w.apply();
    w.run(secs(100));
    w.refuse = None;
    let (join, _) = w.ledger.join(w.now, here(), None, false, 9);
    assert!(matches!(join, Join::TooMany(0)), "{join:?}");
    w.apply();
    w.run(ms(1));
    assert_eq!(w.counts().idle, 1, "the server is back, and the next caller finds a connection");
}

#[test]
fn a_hurried_caller_that_finds_others_waiting_waits_behind_them() {
    let mut w = World::new(Settings { validate: Validate::Always, max_size: 2, fair_after: ms(1), ..settings() });
    w.burst(2);
    w.ledger.prepare_for_the_next(w.now, true);
    w.apply();
    w.run(ms(1));
    w.takes.check = secs(1);
    w.get();
    assert_eq!((w.counts().waiting, w.counts().idle), (1, 1));
    let (join, _) = w.ledger.join(w.now, here(), None, true, 9);
    assert!(matches!(join, Join::Queued(_)), "{join:?}");
}

#[test]
fn a_hurried_caller_waits_in_place_of_the_wish_before_it() {
    let mut w = World::new(settings());
    w.takes.open = secs(1);
    w.ledger.prepare(w.now);
    w.apply();
    w.run(ms(1));
    let (Join::Queued(ticket), _) = w.ledger.join(w.now, here(), None, true, 9) else { panic!() };
    w.waiting.push_back((9, ticket, w.now));
    w.apply();
    w.run(ms(1));
    assert_eq!(w.dials.len(), 1);
}

#[test]
fn a_caller_that_waits_for_nothing_has_asked_when_what_is_under_way_began() {
    for open in [true, false] {
        let mut w = World::new(Settings { validate: Validate::Always, ..settings() });
        if !open {
            w.burst(1);
        }
        (w.takes.check, w.takes.open) = (ms(10), ms(10));
        assert_eq!(w.try_get(), None);
        w.run(ms(5));
        assert_eq!(w.try_get(), None);
        w.run(ms(5));
        assert!(w.try_get().is_some(), "proven well when it began, for both");
        assert_eq!(w.dials.len(), 1);
    }
}

#[test]
fn a_caller_that_waits_for_nothing_has_asked_when_the_oldest_under_way_began() {
    let mut w = World::new(Settings { validate: Validate::Always, max_size: 2, ..settings() });
    w.burst(2);
    w.takes.check = ms(10);
    assert_eq!(w.try_get(), None);
    w.run(ms(4));
    let waiter = w.get();
    w.run(ms(2));
    assert_eq!(w.counts().checking, 2);
    assert_eq!(w.try_get(), None);
    assert!(w.leave(waiter));
    w.run(ms(5));
    assert_eq!((w.counts().idle, w.counts().checking), (1, 1));
    assert!(w.try_get().is_some());
}

#[test]
fn an_open_that_hangs_leaves_room_for_one_more_than_parallel_opens() {
    let mut w = World::new(Settings { parallel_opens: 1, ..settings() });
    w.takes.open = Duration::MAX;
    w.get();
    w.get();
    w.run(ms(999));
    assert_eq!(w.dials.len(), 1);
    w.run(ms(1));
    assert_eq!(w.dials.len(), 2);
    w.run(secs(5));
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn of_several_opens_that_hang_the_first_is_noticed_first() {
    let mut w = World::new(Settings { parallel_opens: 2, ..settings() });
    w.takes.open = Duration::MAX;
    w.get();
    w.run(ms(100));
    w.get();
    w.get();
    // The reaper looks, and sets its alarm anew.
    w.sleeps_until = w.now;
    w.run(ms(899));
    assert_eq!(w.dials.len(), 2);
    w.run(ms(1));
    assert_eq!(w.dials.len(), 3);
}

#[test]
fn while_opens_fail_one_is_dialled_at_a_time() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    w.takes.open = ms(10);
    for _ in 0..3 {
        w.get();
    }
    w.run(ms(20)); // the three that were dialled before the first failed
    for _ in 0..500 {
        w.run(ms(10));
        assert!(w.counts().opening <= 1);
    }
    assert!(w.dials.len() > 6);
}

#[test]
fn while_opens_fail_one_more_is_dialled_beside_an_open_that_hangs() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    w.get();
    for _ in 0..2 {
        w.get();
    }
    w.takes.open = Duration::MAX;
    let dials = w.dials.len();
    w.run(secs(1));
    assert_eq!(w.dials.len(), dials + 1);
    w.run(secs(5));
    assert_eq!(w.dials.len(), dials + 2);
}

#[test]
fn no_probe_is_made_beside_another() {
    let mut w = World::new(Settings { max_size: 2, open_timeout: secs(100), ..settings() });
    w.takes.open = Duration::MAX;
    for _ in 0..2 {
        w.get();
    }
    w.run(secs(101));
    assert_eq!((w.counts().abandoned, w.dials.len()), (2, 3));
    w.run(secs(94));
    assert_eq!(w.dials.len(), 3, "a minute and a half later the probe still hangs");
}

#[test]
fn of_the_closes_of_recycled_connections_the_oldest_is_abandoned_first() {
    let mut w = World::new(Settings { max_size: 2, ..settings() });
    let (a, b) = (w.get(), w.get());
    w.takes.close = Duration::MAX;
    w.replaced = w.event();
    w.ledger.recycle(w.now);
    w.apply();
    w.returned(b);
    w.run(ms(300));
    w.returned(a);
    let waiter = w.get();
    w.run(ms(199));
    assert!(!w.has(waiter));
    w.run(ms(1));
    assert!(w.has(waiter), "a tenth of the limit after the first close began");
}

#[test]
fn at_the_end_of_the_back_off_a_refusal_is_tried_again() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Refusal);
    w.get();
    w.run(secs(5));
    assert_eq!(w.dials.len(), 1);
    w.get();
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn the_back_off_of_a_refusal_does_not_count_the_failures_before_it() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    w.get();
    w.run(ms(300));
    w.refuse = Some(Reach::Refusal);
    w.run(ms(100));
    let dials = w.dials.len();
    w.run(secs(5));
    w.get();
    assert_eq!(w.dials.len(), dials + 1, "five seconds after the first refusal");
}

#[test]
fn a_wish_ends_when_an_open_fails() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    w.ledger.prepare(w.now);
    w.apply();
    w.run(secs(100));
    assert_eq!(w.dials.len(), 1);
}

#[test]
fn a_wish_does_not_shorten_the_back_off_of_a_refusal() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Refusal);
    for _ in 0..40 {
        w.ledger.prepare(w.now);
        w.apply();
        w.run(ms(100));
    }
    assert_eq!(w.dials.len(), 1);
}

#[test]
fn only_the_first_waiter_shortens_the_back_off() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Server);
    for _ in 0..70 {
        w.get();
        w.run(ms(10));
    }
    // 0, 50, 150, 350, 750.
    assert_eq!(w.dials.len(), 4);
}
