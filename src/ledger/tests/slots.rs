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
