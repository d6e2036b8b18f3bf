//! The queue, the hand-off, barging, and notified waiters.

use super::world::*;

#[test]
fn waiters_are_served_in_order() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    let first = w.get();
    let threads: Vec<_> = (0..5_000).map(|_| w.get()).collect();
    for thread in threads.iter().step_by(3) {
        assert!(w.leave(*thread));
    }
    w.returned(first);
    for (i, thread) in threads.iter().enumerate() {
        if i % 3 != 0 {
            w.returned(*thread); // panics if this thread was not served next
        }
    }
    assert_eq!(w.ledger.tally.timeouts, 1_667);
}

#[test]
fn with_fair_after_zero_no_caller_barges() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    let (a, b) = (w.get(), w.get());
    w.returned(a);
    let c = w.get();
    assert!(w.has(b) && !w.has(c));
}

#[test]
fn no_more_callers_wait_than_max_waiting() {
    let mut w = World::new(Settings { max_size: 1, max_waiting: Some(2), ..settings() });
    let _in_use = w.get();
    let (b, c) = (w.get(), w.get());
    let d = w.get();
    assert_eq!(w.refused, [d]);
    assert!(w.leave(b) && w.leave(c));
    assert_eq!(w.ledger.tally.rejected, 1);
}

/// A pool of `size`, all of it in use by the threads returned, and threads that take a while to wake.
fn all_in_use(size: u32) -> (World, Vec<Thread>) {
    let mut w = World::new(Settings { max_size: size, fair_after: ms(1), ..settings() });
    let threads = (0..size).map(|_| w.get()).collect();
    w.wake_time = us(30);
    (w, threads)
}

#[test]
fn a_running_thread_may_barge_four_times_in_twenty_microseconds() {
    let (mut w, threads) = all_in_use(1);
    let first = w.get();
    let mut running = threads[0];
    for barged in 0..MAX_BARGES {
        assert_eq!(w.ledger.front.unwrap().barged, barged);
        w.run(us(1));
        w.returned(running);
        assert!(!w.has(first), "left to the running thread, {barged}");
        running = w.get();
        assert!(w.has(running));
    }
    assert_eq!(w.awake.len(), 1, "notified once, however often a connection was there");
    w.returned(running);
    assert!(!w.has(first), "barged often enough, but in no time");
    running = w.get();
    w.run(HANDED_OFF_AFTER - us(u64::from(MAX_BARGES)));
    w.returned(running);
    assert!(w.has(first), "barged often enough, and first for long enough");
    assert_eq!(w.in_vain, 0);
}

#[test]
fn barges_are_counted_anew_for_the_next_first_waiter() {
    let (mut w, threads) = all_in_use(1);
    let (first, second) = (w.get(), w.get());
    let mut running = threads[0];
    for _ in 0..MAX_BARGES {
        w.run(us(10));
        w.returned(running);
        running = w.get();
    }
    w.returned(running);
    w.returned(first);
    assert!(!w.has(second), "no caller has barged the second since it became the first");
    for _ in 0..MAX_BARGES {
        running = w.get();
        w.run(us(3));
        w.returned(running);
        assert!(!w.has(second), "the second has not been the first for long");
    }
    running = w.get();
    w.run(us(8));
    w.returned(running);
    assert!(w.has(second));
}

#[test]
fn no_caller_barges_a_waiter_after_fair_after() {
    let (mut w, threads) = all_in_use(2);
    w.wake_time = secs(1); // as good as never
    let first = w.get();
    w.run(us(999));
    w.returned(threads[0]);
    let faster = w.get();
    assert!(w.has(faster), "at the last moment");
    w.returned(faster);
    w.run(us(1));
    let later = w.get();
    assert!(!w.has(later), "though a connection is idle");
    assert_eq!(w.counts().idle, 1);
    w.returned(threads[1]);
    assert!(w.has(first), "what is returned is handed off");
    // And the idle connection is for the next waiter, though it has not waited for so long.
    w.run(secs(1));
    assert!(w.has(later));
}

#[test]
fn what_would_be_evicted_within_fair_after_is_handed_to_the_first_waiter() {
    // A connection that lasts lies idle until the waiter has come for it; another thread may be faster.
    for (max_idle, lasts) in [(None, true), (Some(us(1001)), true), (Some(ms(1)), false), (Some(us(1)), false)] {
        let mut w = World::new(Settings { max_size: 1, fair_after: ms(1), max_idle, ..settings() });
        let user = w.get();
        w.run(ms(1));
        assert!(w.has(user));
        w.wake_time = us(30);
        let first = w.get();
        w.returned(user);
        assert_eq!((w.has(first), w.counts().idle == 1), (!lasts, lasts), "{max_idle:?}");
    }
}

#[test]
fn a_waiter_notified_in_vain_keeps_its_place_and_is_notified_again() {
    let (mut w, threads) = all_in_use(1);
    let first = w.get();
    w.returned(threads[0]);
    let faster = w.get();
    w.run(us(30));
    assert_eq!((w.in_vain, w.awake.len(), w.counts().waiting), (1, 0, 1));
    let second = w.get();
    w.returned(faster);
    w.run(us(30));
    assert!(w.has(first) && !w.has(second));
}

#[test]
fn no_more_waiters_are_notified_than_connections_are_ready() {
    let (mut w, threads) = all_in_use(3);
    let waiting: Vec<_> = (0..10).map(|_| w.get()).collect();
    for thread in &threads {
        w.returned(*thread);
        let again = w.get();
        w.returned(again);
    }
    assert_eq!((w.awake.len(), w.counts().idle), (3, 3));
    w.run(us(30));
    assert!(waiting[..3].iter().all(|thread| w.has(*thread)), "in order");
    assert_eq!((w.in_vain, w.counts().waiting), (0, 7));
}

#[test]
fn when_a_notified_waiter_leaves_the_next_is_notified() {
    let (mut w, threads) = all_in_use(1);
    let (first, second) = (w.get(), w.get());
    w.returned(threads[0]);
    w.run(us(10));
    assert!(w.leave(first));
    w.run(us(30));
    assert!(w.has(second));
}

#[test]
fn when_a_notified_waiter_is_handed_a_connection_the_next_is_notified() {
    let (mut w, threads) = all_in_use(2);
    let (first, second) = (w.get(), w.get());
    w.run(us(990));
    w.returned(threads[0]);
    w.run(us(10));
    w.returned(threads[1]);
    assert!(w.has(first), "handed off, while the first was on its way to the other connection");
    w.run(us(30));
    assert!(w.has(second));
    assert_eq!(w.in_vain, 0);
}

#[test]
fn a_notified_waiter_does_not_barge_the_first_after_fair_after() {
    let (mut w, threads) = all_in_use(2);
    let (first, second) = (w.get(), w.get());
    w.run(us(995));
    // Both waiters are notified, and other threads are faster.
    w.returned(threads[0]);
    w.returned(threads[1]);
    let faster = [w.get(), w.get()];
    w.run(us(2));
    w.returned(faster[0]);
    w.oversleeps(first, ms(5));
    w.run(ms(1));
    assert_eq!((w.in_vain, w.counts().idle), (1, 1), "the second has left the connection to the first");
    w.run(ms(5));
    assert!(w.has(first) && !w.has(second));
}

#[test]
fn the_first_waiter_is_notified_again_for_the_connection_left_to_it() {
    let (mut w, threads) = all_in_use(2);
    let (first, second) = (w.get(), w.get());
    w.returned(threads[0]);
    w.returned(threads[1]);
    w.oversleeps(second, ms(2));
    let faster = [w.get(), w.get()];
    w.run(us(30));
    assert_eq!(w.in_vain, 1, "the first was notified in vain, and is asleep again");
    w.returned(faster[0]);
    w.run(ms(2));
    assert_eq!(w.in_vain, 2, "the second came, and the first had waited for `fair_after`");
    assert!(w.has(first) && !w.has(second));
}

#[test]
fn a_notified_waiter_may_take_a_connection_if_one_is_left_for_the_first() {
    let (mut w, threads) = all_in_use(2);
    w.wake_time = ms(2);
    let (first, second) = (w.get(), w.get());
    w.returned(threads[1]);
    w.returned(threads[0]);
    w.oversleeps(first, ms(5));
    w.run(ms(2));
    assert!(w.has(second) && !w.has(first));
    assert_eq!((w.in_vain, w.counts().idle, w.ledger.front.unwrap().barged), (0, 1, 1));
    w.run(ms(3));
    assert!(w.has(first));
}

#[test]
fn a_connection_that_became_suspect_is_checked_for_notified_waiters() {
    let (mut w, threads) = all_in_use(2);
    w.ledger.rules.change(|s| s.validate = Validate::AfterIdle(secs(1)));
    w.takes.check = us(5);
    let first = w.get();
    w.returned(threads[0]);
    w.run(us(1));
    w.returned_as(threads[1], Condition::Broken);
    assert!(
        matches!(w.ledger.take(w.now, here(), true), Take::Nothing),
        "a caller that came later does not take it for a check of its own"
    );
    w.run(us(4));
    assert!(!w.has(first), "the first is notified, and must not get a suspect connection");
    w.run(us(1));
    assert!(w.has(first), "the connection was checked at once, not when the first came and found nothing");
}

#[test]
fn close_dismisses_notified_waiters_in_order() {
    let (mut w, threads) = all_in_use(2);
    let waiting: Vec<_> = (0..4).map(|_| w.get()).collect();
    w.returned(threads[0]);
    assert_eq!(w.ledger.close(w.now), Some(4));
    w.apply();
    assert_eq!(w.dismissed, waiting);
    w.run(ms(1));
}

#[test]
fn a_connection_that_would_be_evicted_is_handed_off() {
    let (mut w, threads) = all_in_use(1);
    w.ledger.rules.change(|s| s.max_idle = Some(Duration::ZERO));
    let first = w.get();
    w.returned(threads[0]);
    assert!(w.has(first) && w.closes.is_empty());
}

#[test]
fn a_wish_to_prepare_checks_nothing_that_waiters_are_notified_for() {
    let (mut w, threads) = all_in_use(1);
    w.ledger.rules.change(|s| s.validate = Validate::AfterIdle(secs(1)));
    let first = w.get();
    w.returned(threads[0]);
    w.ledger.prepare(w.now);
    w.apply();
    assert_eq!((w.counts().idle, w.counts().checking), (1, 0));
    w.run(us(30));
    assert!(w.has(first));
}

#[test]
fn a_caller_has_waited_since_its_own_check_began() {
    let mut w = World::new(Settings { validate: Validate::Always, fair_after: us(700), max_size: 2, ..settings() });
    w.burst(1);
    w.takes.check = ms(1);
    w.takes.open = ms(5);
    w.takes.close = secs(1);
    w.dead = w.server.keys().copied().collect();
    let begun = w.now;
    w.get_or_check(true);
    w.run(us(10));
    w.get();
    w.run(ms(1));
    assert_eq!(w.ledger.front.map(|front| front.since), Some(begun), "so it is protected from barging in time");
}

#[test]
fn every_wait_is_counted_and_its_time_recorded() {
    let mut w = World::new(Settings { max_size: 1, ..settings() });
    let a = w.get();
    let (b, c, d) = (w.get(), w.get(), w.get());
    assert_eq!(w.ledger.tally.waits, 1 + 3, "the first waited for an open");
    let before = w.ledger.tally.wait_time.sum();
    w.run(ms(2));
    w.returned(a);
    assert!(w.has(b));
    assert_eq!(w.ledger.tally.wait_time.sum(), before + ms(2), "handed off");
    w.run(ms(2));
    assert!(w.leave(c));
    assert_eq!(w.ledger.tally.wait_time.sum(), before + ms(6), "left");
    w.run(ms(1));
    w.ledger.close(w.now);
    w.apply();
    assert_eq!(w.dismissed, [d]);
    assert_eq!((w.ledger.tally.wait_time.sum(), w.ledger.tally.wait_time.count()), (before + ms(11), 4), "dismissed");

    let (mut w, threads) = all_in_use(1);
    let before = w.ledger.tally.wait_time.sum();
    let first = w.get();
    w.returned(threads[0]);
    w.run(us(30));
    assert!(w.has(first));
    assert_eq!(w.ledger.tally.wait_time.sum(), before + us(30), "notified");
}

#[test]
fn a_refused_caller_does_not_join_the_queue() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Refusal);
    w.get();
    let (join, handle) = w.ledger.join(w.now, here(), None, false, 9);
    assert!(matches!(join, Join::Refused) && handle == Some(9));
    assert!(w.ledger.effects.served.is_empty());
}

#[test]
fn where_no_caller_may_wait_what_was_checked_for_one_serves_the_next() {
    let mut w = World::new(Settings { validate: Validate::Always, max_waiting: Some(0), ..settings() });
    let join = |w: &mut World| {
        let (join, _) = w.ledger.join(w.now, here(), None, false, 9);
        if let Join::Ready(..) = join {
            return true;
        }
        assert!(matches!(join, Join::TooMany(0)), "{join:?}");
        w.apply();
        w.run(ms(1));
        false
    };
    assert!(!join(&mut w), "nothing is open");
    assert!(join(&mut w), "opened for the one before");
    assert_eq!((w.dials.len(), w.ledger.tally.rejected), (1, 1));
}

#[test]
fn where_all_may_wait_that_may_a_rejected_caller_takes_nothing() {
    let mut w = World::new(Settings { validate: Validate::Always, max_waiting: Some(1), max_size: 2, ..settings() });
    w.burst(2);
    w.takes.check = secs(1);
    w.get();
    assert_eq!(w.counts().idle, 1);
    let asked_at = w.ledger.asked_at;
    let (join, _) = w.ledger.join(w.now, here(), None, false, 9);
    assert!(matches!(join, Join::TooMany(1)), "{join:?}");
    assert_eq!(w.ledger.asked_at, asked_at);
}

#[test]
fn the_next_first_waiter_was_not_barged_yet() {
    let (mut w, threads) = all_in_use(1);
    let (first, second) = (w.get(), w.get());
    w.returned(threads[0]);
    w.get();
    assert_eq!(w.ledger.front.unwrap().barged, 1);
    assert!(w.leave(first));
    assert_eq!(w.ledger.front.unwrap().barged, 0);
    assert!(!w.has(second));
}

#[test]
fn what_is_not_to_be_idle_is_closed_in_the_same_step() {
    let mut w = World::new(Settings { max_idle: Some(Duration::ZERO), ..settings() });
    let a = w.get();
    let (token, conn) = w.in_use.remove(&a).unwrap();
    w.ledger.returned(w.now, token, conn, Condition::Keep);
    assert_eq!((w.ledger.counts().idle, w.ledger.counts().closing), (0, 1));
    w.apply();
}

#[test]
fn a_later_waiter_that_leaves_leaves_the_first_in_its_place() {
    let (mut w, _) = all_in_use(1);
    w.get();
    w.run(us(10));
    let second = w.get();
    let front = w.ledger.front.unwrap();
    w.run(us(10));
    assert!(w.leave(second));
    assert_eq!(w.ledger.front.unwrap().first_since, front.first_since);
}
