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
