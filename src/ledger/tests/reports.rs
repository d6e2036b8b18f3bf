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
    assert!((2..=5).contains(&w.ledger.tally.failed_opens), "with a back-off between: {}", w.dials.len());
    // The counts balance: a connection that was not counted as opened is not counted as closed.
    assert_eq!(w.ledger.tally.closes.iter().sum::<u64>(), 0);
    assert_eq!(w.closed_for(CloseReason::Lifetime), w.ledger.tally.failed_opens as usize);
}

#[test]
fn a_connection_that_arrives_too_old_to_be_handed_out_is_a_failed_open() {
    // The connection dies at 10 ms, and with this resolution may not be handed out after 2.
    let mut w = World::with_resolution(Settings { max_lifetime: Some(ms(10)), ..settings() }, ms(8));
    w.takes.open = ms(5);
    w.get();
    w.run(ms(500));
    assert_eq!((w.ledger.tally.checkouts, w.ledger.tally.opens), (0, 0));
    assert!((2..=5).contains(&w.ledger.tally.failed_opens), "with a back-off between: {}", w.dials.len());
}

#[test]
fn closes_that_hang_delay_no_other() {
    let mut w = World::new(Settings { max_idle: Some(secs(2)), ..settings() });
    w.burst(9);
    w.takes.close = Duration::MAX;
    w.run(secs(2) + CLOSE_PATIENCE * 2);
    assert_eq!(w.ledger.counted.begun_closes(), 9, "each has begun");
    assert_eq!(w.ledger.tally.max_lateness, CLOSE_PATIENCE, "counted to the moment the last one began");
}
