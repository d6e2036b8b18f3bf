//! `resize`, `recycle` and `close`.

use super::world::*;

#[test]
fn recycle_replaces_every_connection_opened_before() {
    let mut w = World::new(settings());
    w.takes.open = ms(10);
    w.burst(2);
    let used = w.get();
    w.ledger.recycle(w.now);
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!(w.closed_for(CloseReason::Recycled), 1, "the idle one at once");
    w.returned(used);
    assert_eq!(w.closed_for(CloseReason::Recycled), 2, "the one in use on return");
    let a = w.get();
    w.run(ms(5));
    w.ledger.recycle(w.now);
    w.apply();
    w.run(secs(1));
    assert_eq!(w.closed_for(CloseReason::Recycled), 3, "and the one that was under way");
    w.returned(a); // panics if `a` has no connection
    assert_eq!((w.counts().idle, w.closes.len()), (1, 3));
}

#[test]
fn an_outdated_connection_replaces_its_generation_once() {
    let mut w = World::new(settings());
    w.burst(3);
    let (a, b) = (w.get(), w.get());
    w.returned_as(a, Condition::Outdated);
    assert_eq!(w.server.len(), 1, "the idle one went with it");
    let fresh = w.get();
    w.returned(fresh);
    w.returned_as(b, Condition::Outdated);
    assert_eq!(w.counts().idle, 1, "the new one stays");
}

#[test]
fn resize_closes_the_longest_unused_at_once_and_those_in_use_on_return() {
    let mut w = World::new(settings());
    w.burst(10);
    let threads: Vec<_> = (0..6).map(|_| w.get()).collect();
    w.ledger.resize(w.now, 5);
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!((w.counts().idle, w.counts().in_use), (0, 6));
    let waits = w.get();
    w.returned(threads[0]);
    assert!(!w.has(waits), "the excess goes as it returns, even though a caller waits");
    w.returned(threads[1]);
    assert!(w.has(waits));
    assert_eq!(w.closed_for(CloseReason::Resized), 5);
}

#[test]
fn close_dismisses_every_waiter_and_keeps_nothing() {
    let mut w = World::new(Settings { max_size: 3, ..settings() });
    w.takes.open = ms(100);
    w.burst(2);
    let (a, b) = (w.get(), w.get());
    w.returned(b);
    let c = w.get();
    let waiters: Vec<_> = (0..8).map(|_| w.get()).collect();
    assert_eq!(w.ledger.close(w.now), Some(8));
    w.apply();
    assert_eq!(w.dismissed, waiters);
    let late = w.get();
    assert_eq!(w.dismissed.last(), Some(&late));
    w.returned(a);
    w.run(ms(100)); // a connect that was under way
    assert_eq!(w.counts().total(), 1);
    w.returned(c);
    assert_eq!((w.counts().total(), w.server.len()), (0, 0));
    assert_eq!(w.ledger.close(w.now), None);
    w.run(secs(10));
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
}

#[test]
fn resize_that_leaves_room_closes_nothing() {
    let mut w = World::new(settings());
    w.burst(10);
    w.ledger.resize(w.now, 15);
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!(w.counts().idle, 10);
}

#[test]
fn what_a_lower_floor_no_longer_keeps_is_closed_at_once() {
    let mut w = World::new(Settings { min_idle: 3, max_idle: Some(secs(2)), ..settings() });
    w.burst(3);
    w.run(secs(10));
    assert_eq!(w.counts().idle, 3);
    w.ledger.set_min_idle(w.now, 1);
    assert_eq!((w.counts().idle, w.ledger.alarm()), (1, w.now));
    w.apply();
    w.run(Duration::ZERO);
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO, "due since now");
}

#[test]
fn recycle_ends_a_refusal_and_its_back_off() {
    let mut w = World::new(settings());
    w.refuse = Some(Reach::Refusal);
    w.get();
    w.run(ms(10));
    w.replaced = w.event();
    w.ledger.recycle(w.now);
    w.apply();
    assert!(!w.ledger.is_refusing());
    w.refuse = None;
    let a = w.get();
    w.run(ms(39));
    assert!(!w.has(a), "50 ms after the last failure, no sooner");
    w.run(ms(1));
    assert!(w.has(a));
    // And long after the failure at once, but not before now.
    w = World::new(settings());
    w.refuse = Some(Reach::Refusal);
    w.get();
    w.run(secs(3));
    w.ledger.recycle(w.now);
    assert_eq!(w.ledger.failure.unwrap().retry, w.now);
}

#[test]
fn a_refusal_that_was_under_way_at_a_recycle_is_forgotten_as_well() {
    let mut w = World::new(settings());
    w.takes.open = ms(20);
    let a = w.get();
    w.run(ms(10));
    w.replaced = w.event();
    w.ledger.recycle(w.now);
    w.apply();
    w.refuse = Some(Reach::Refusal);
    w.run(ms(10));
    assert_eq!((w.ledger.tally.failed_opens.total(), w.ledger.is_refusing()), (1, false));
    w.refuse = None;
    w.run(ms(70));
    assert!(w.has(a), "it was not told of the refusal, and the next attempt was 50 ms later");
}

#[test]
fn close_tells_the_reaper_and_who_watches() {
    let mut w = World::new(settings());
    w.burst(1);
    w.ledger.close(w.now);
    assert_eq!((w.ledger.effects.changed, w.ledger.alarm(), w.ledger.is_closed()), (true, w.now, true));
}

#[test]
fn a_close_after_the_end_of_the_reaper_has_its_limit() {
    let mut w = World::new(Settings { close_timeout: secs(5), ..settings() });
    let a = w.get();
    w.run(ms(20));
    assert!(w.has(a));
    w.ledger.close(w.now);
    w.apply();
    // Nothing is due any longer, and the reaper ends.
    w.run(secs(100));
    assert_eq!((w.ledger.is_over(), w.sleeps_until), (true, Moment::NEVER));
    w.takes.close = secs(1_000);
    w.returned(a);
    w.run(secs(5));
    assert_eq!((w.counts().closing, w.counts().abandoned), (0, 1), "the close hangs");
}

#[test]
fn a_pool_is_over_when_it_is_closed_and_its_last_close_has_ended() {
    let mut w = World::new(settings());
    w.burst(1);
    assert!(!w.ledger.is_over() && !w.ledger.is_closed());
    w.takes.start = secs(10);
    w.ledger.close(w.now);
    w.apply();
    w.run(secs(5));
    assert!(!w.ledger.is_over(), "the close was ordered, and waits for a thread");
    w.run(ms(4_999));
    assert!(w.ledger.alarm() > w.now);
    w.run(ms(1));
    assert!(w.ledger.is_over());
}

#[test]
fn the_floor_stands_when_min_idle_or_max_size_are_idle() {
    for (min_idle, max_size) in [(2, 5), (5, 2)] {
        let mut w = World::new(Settings { max_size: 5, ..settings() });
        for idle in 0..3 {
            if idle > 0 {
                let threads: Vec<_> = (0..idle).map(|_| w.get()).collect();
                threads.into_iter().for_each(|thread| w.returned(thread));
            }
            w.ledger.rules.change(|s| (s.min_idle, s.max_size) = (min_idle, max_size));
            assert_eq!(w.ledger.floor_stands(), idle == 2, "{idle} idle");
            w.ledger.rules.change(|s| (s.min_idle, s.max_size) = (0, 5));
        }
    }
    let l: Ledger<Conn, Thread> = Ledger::new(Settings { min_idle: 5, ..settings() }, Duration::ZERO);
    assert_eq!(l.rules().min_idle, 0, "until the warm-up");
}

#[test]
fn the_reaper_is_woken_only_to_look_sooner() {
    let mut l: Ledger<Conn, Thread> = Ledger::new(settings(), Duration::ZERO);
    assert!(l.effects.is_empty());
    l.look_again();
    assert_eq!((l.alarm(), l.effects.wake_reaper), (Moment::BIRTH, true));
    l.effects.wake_reaper = false;
    l.look_again();
    assert!(!l.effects.wake_reaper, "it means to look then");
    // Nor does the ledger's time go back.
    let later = Moment::BIRTH.plus(secs(2));
    l.prepare(later);
    l.prepare(Moment::BIRTH.plus(secs(1)));
    assert_eq!(l.now, later);
}

#[test]
fn effects_are_empty_only_if_nothing_is_to_be_done() {
    type Of = Effects<Conn, Thread>;
    let parts: [fn(&mut Of); 5] = [
        |e| e.served.push((1, Outcome::Closed)),
        |e| e.orders.push(Order::Slow { id: 1 }),
        |e| e.wake_reaper = true,
        |e| e.changed = true,
        |e| e.notified.push(1),
    ];
    // Each part by itself, and each two.
    for (i, one) in parts.iter().enumerate() {
        for (j, other) in parts.iter().enumerate() {
            let mut effects = Of::default();
            assert!(effects.is_empty() && effects.is_empty_but_for_notified());
            one(&mut effects);
            if i != j {
                other(&mut effects);
            }
            assert!(!effects.is_empty());
            assert_eq!(effects.is_empty_but_for_notified(), (i, j) == (4, 4));
        }
    }
}

#[test]
fn who_watches_is_told_of_changes_and_nothing_is_told_if_no_thread_watches() {
    for watchers in [0, 1] {
        let mut l: Ledger<Conn, Thread> = Ledger::new(settings(), Duration::ZERO);
        l.watchers = watchers;
        let now = Moment::BIRTH;
        let changed = |l: &mut Ledger<Conn, Thread>, what: &str| {
            assert_eq!(std::mem::take(&mut l.effects.changed), watchers > 0, "{what}");
        };
        let open = |l: &mut Ledger<Conn, Thread>| {
            l.failure = None;
            l.prepare(now);
            let Some(Order::Job(SlotJob::Open(token))) = l.effects.orders.pop() else { panic!() };
            l.effects.changed = false;
            l.begin(now, token, 0.0).unwrap()
        };
        let token = open(&mut l);
        l.open_failed(now, &token, error(Reach::Server), 0.0);
        changed(&mut l, "an open has failed");
        l.free(now, token);
        changed(&mut l, "a slot is free");
        let token = open(&mut l);
        assert!(l.opened(now, token, 1).is_ok());
        changed(&mut l, "a connection is idle");
        let token = {
            l.take(now, here(), false);
            open(&mut l)
        };
        l.reap(now.plus(secs(10)), 0.0);
        l.effects.orders.clear();
        l.effects.changed = false;
        l.free(now, token);
        changed(&mut l, "an abandoned job came back");
    }
}
