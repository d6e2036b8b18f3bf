//! How the pool is: ready, busy, stuck or down.

use super::world::*;
use crate::ledger::{FailedRun, Health};

impl World {
    fn health(&self) -> Health {
        self.ledger.health(self.now)
    }

    fn is_stuck(&self) -> bool {
        matches!(self.health(), Health::Stuck { .. })
    }

    fn down(&self) -> FailedRun {
        match self.health() {
            Health::Down(run) => run,
            other => panic!("{other:?}"),
        }
    }

    /// As many callers as that, each of whom waits unless there is a connection.
    fn callers(&mut self, n: u64) -> Vec<Thread> {
        (0..n).map(|_| self.get()).collect()
    }
}

fn four() -> World {
    let mut w = World::new(Settings { max_size: 4, ..settings() });
    w.takes.open = ms(3);
    w
}

/// A sequence without end that looks like chance and is the same in every run.
fn chance(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn where_nobody_is_the_pool_is_ready() {
    let mut w = four();
    assert_eq!(w.health(), Health::Ready, "none was opened");
    w.burst(4);
    assert_eq!(w.health(), Health::Ready);
    w.run(secs(3600));
    assert_eq!((w.health(), w.counts().total()), (Health::Ready, 0));
}

#[test]
fn a_full_pool_is_busy() {
    let mut w = four();
    let callers = w.callers(4);
    w.run(ms(10));
    assert_eq!(w.health(), Health::Busy, "nobody waits");
    w.run(secs(3600));
    assert_eq!(w.health(), Health::Busy, "and nobody came in vain");
    w.returned(callers[0]);
    assert_eq!(w.health(), Health::Ready);
}

#[test]
fn in_ten_minutes_of_chance_it_is_never_called_stuck_or_down() {
    for seed in [1, 2, 10] {
        let (mut w, mut dice) = (four(), seed);
        let (mut ready, mut busy, mut until) = (0, 0, Vec::new());
        while w.now < Moment::BIRTH.plus(secs(600)) {
            // Uses of 1 to 100 ms, and one in a hundred of up to a second; at times hardly anybody comes, and at times 64 wait.
            let crowd = if w.now.since(Moment::BIRTH).as_secs() / 20 % 2 == 0 { 64 } else { 2 };
            if (w.waiting.len() as u64) < crowd && chance(&mut dice) % 4 > 0 {
                w.get();
            }
            let most = if chance(&mut dice) % 100 == 0 { 1000 } else { 100 };
            for &thread in w.in_use.keys() {
                if until.iter().all(|&(t, _)| t != thread) {
                    until.push((thread, w.now.plus(ms(1 + chance(&mut dice) % most))));
                }
            }
            w.run(ms(1 + chance(&mut dice) % 10));
            let (now, w) = (w.now, &mut w);
            until.retain(|&(thread, at)| {
                if at <= now {
                    w.returned(thread);
                }
                at > now
            });
            match w.health() {
                Health::Ready => ready += 1,
                Health::Busy => busy += 1,
                other => panic!("{other:?} at {now:?} with seed {seed}"),
            }
        }
        assert!(ready > 1000 && busy > 1000, "{ready} {busy}");
    }
}

#[test]
fn what_does_not_come_back_is_stuck() {
    let mut w = four();
    w.burst(4);
    let callers = w.callers(64);
    w.run(ms(499));
    assert_eq!(w.health(), Health::Busy);
    w.run(ms(1));
    assert_eq!(w.health(), Health::Stuck { since: ms(500) });
    w.run(secs(9));
    assert_eq!(w.health(), Health::Stuck { since: ms(9_500) });
    w.returned(callers[0]);
    assert_eq!(w.health(), Health::Busy, "one is back");
    w.run(ms(499));
    assert_eq!(w.health(), Health::Busy);
}

#[test]
fn callers_with_short_deadlines_find_the_pool_stuck_as_well() {
    let mut w = four();
    w.burst(4);
    let users = w.callers(4);
    w.run(ms(1));
    for round in 0..20 {
        let caller = w.get();
        w.run(ms(100));
        assert!(w.leave(caller));
        // Looked at while nobody waits.
        assert_eq!(w.is_stuck(), round >= 4, "{round}");
    }
    // A caller that waits for nothing counts as well.
    w.returned(users[0]);
    assert!(!w.is_stuck());
    assert!(w.try_get().is_some());
    w.run(ms(1));
    assert!(w.try_get().is_none());
    w.run(secs(5));
    assert!(w.is_stuck());
}

#[test]
fn long_jobs_are_not_stuck() {
    let mut w = four();
    for _ in 0..100 {
        w.use_once(secs(3));
    }
    let _callers = w.callers(8);
    w.run(ms(5_999));
    assert_eq!(w.health(), Health::Busy);
    w.run(ms(4));
    assert!(w.is_stuck(), "twice as long as usual");
}

#[test]
fn a_long_job_of_long_ago_is_no_longer_usual() {
    let mut w = four();
    w.use_once(secs(60));
    for _ in 0..20_000 {
        w.use_once(ms(1));
    }
    let _callers = w.callers(8);
    w.run(ms(510));
    assert!(w.is_stuck(), "{:?}", w.health());
}

#[test]
fn who_came_in_vain_is_forgotten_once_a_connection_is_back() {
    let mut w = four();
    let users = w.callers(4);
    w.run(ms(10));
    let caller = w.get();
    w.leave(caller);
    w.run(secs(6));
    assert!(w.is_stuck());
    users.into_iter().for_each(|user| w.returned(user));
    assert_eq!(w.health(), Health::Ready);
    w.run(secs(1000));
    assert_eq!((w.health(), w.counts().total()), (Health::Ready, 0), "also when it is empty");
    let _users = w.callers(4);
    w.run(secs(1000));
    assert_eq!(w.health(), Health::Busy, "and when it is full again");
}

#[test]
fn a_server_that_is_not_there_is_down() {
    let mut w = four();
    w.refuse = Some(Reach::Nobody);
    w.get();
    assert_eq!(w.health(), Health::Busy, "the first attempt is under way");
    w.run(ms(3));
    let run = w.down();
    assert_eq!((run.attempts, run.since, run.next_try), (1, Duration::ZERO, Some(BACKOFF_FIRST)));
    w.run(ms(50));
    assert_eq!(w.down().next_try, Some(Duration::ZERO), "the second is under way");
    w.run(secs(10));
    let run = w.down();
    assert_eq!((run.attempts, run.why), (w.ledger.tally.failed_opens.total(), FailedOpen::AsReported));
    assert_eq!(run.since, secs(10) + ms(50));
    w.refuse = None;
    w.run(ms(300));
    assert_eq!(w.health(), Health::Ready, "its only caller is served");
    let (after, attempts) = w.recoveries[0];
    assert_eq!((w.recoveries.len(), attempts), (1, w.ledger.tally.failed_opens.total()));
    assert!(after >= secs(10) + ms(50), "{after:?}");
    // What was last wrong can still be read.
    assert!(w.ledger.last_failed(w.now).is_some_and(|(ago, _)| ago < ms(600)), "{:?}", w.ledger.last_failed(w.now));
    assert_eq!(w.ledger.failed_run(w.now), None);
}

#[test]
fn without_callers_the_next_attempt_waits_for_one() {
    let mut w = four();
    w.refuse = Some(Reach::Server);
    let caller = w.get();
    w.run(ms(3));
    w.leave(caller);
    w.run(secs(3600));
    let dials = w.dials.len();
    assert_eq!(w.down().next_try, None);
    // A probe asks, as `Pool::health` does.
    w.ledger.probe(w.now);
    w.apply();
    w.run(ms(1));
    assert_eq!((w.dials.len(), w.down().next_try), (dials + 1, Some(Duration::ZERO)));
    w.run(ms(5));
    assert_eq!(w.down().next_try, None, "it failed, and nobody asks");
    w.refuse = None;
    w.ledger.probe(w.now);
    w.apply();
    w.run(secs(1));
    assert_eq!((w.health(), w.counts().idle), (Health::Ready, 1));
}

#[test]
fn connections_that_come_back_are_not_down() {
    let mut w = four();
    w.burst(2);
    let users = w.callers(2);
    w.refuse = Some(Reach::Server);
    let _waiters = w.callers(4);
    w.run(ms(100));
    assert_eq!(w.health(), Health::Busy, "two serve, though no third can be opened");
    w.returned(users[0]);
    w.run(ms(300));
    assert_eq!(w.health(), Health::Busy);
    w.run(ms(300));
    assert!(w.down().attempts > 2, "nothing comes back, and none can be opened");
}

#[test]
fn an_open_that_hangs_is_stuck_and_then_down() {
    let mut w = four();
    w.burst(1);
    w.run(secs(700));
    w.takes.open = Duration::MAX;
    w.get();
    w.run(ms(499));
    assert_eq!(w.health(), Health::Busy);
    w.run(ms(1));
    assert!(w.is_stuck(), "{:?}", w.health());
    w.run(secs(10));
    assert_eq!(w.down().why, FailedOpen::NoAnswer);
}

#[test]
fn a_server_that_takes_a_second_to_connect_to_is_not_stuck() {
    let mut w = four();
    w.takes.open = secs(1);
    w.get();
    w.run(ms(999));
    assert_eq!(w.health(), Health::Busy, "how long an open takes is not known yet");
    w.run(secs(1));
    let _more = w.callers(4);
    w.run(ms(999));
    assert_eq!(w.health(), Health::Busy);
}

#[test]
fn a_closed_pool_is_closed() {
    let mut w = four();
    let _callers = w.callers(8);
    w.ledger.close(w.now);
    w.apply();
    w.run(secs(2));
    assert_eq!(w.health(), Health::Closed);
}

#[test]
fn one_fault_does_not_hide_the_next() {
    let mut w = four();
    for _ in 0..20 {
        w.use_once(ms(20));
    }
    // All four hang for 8 s, and come back.
    let callers = w.callers(8);
    w.run(secs(8));
    assert!(w.is_stuck());
    w.leave(callers[7]);
    callers[..4].iter().for_each(|&user| w.returned(user));
    w.run(ms(10));
    callers[4..7].iter().for_each(|&user| w.returned(user));
    for _ in 0..10 {
        w.use_once(ms(20));
    }
    let _callers = w.callers(8);
    w.run(secs(1) + ms(10));
    assert!(w.is_stuck(), "{:?}", w.health());
}

#[test]
fn the_first_jobs_of_a_pool_may_be_long() {
    let mut w = four();
    for round in 0..10 {
        let callers = w.callers(12);
        for part in callers.chunks(4) {
            for step in 0..30 {
                w.run(ms(100));
                assert_eq!(w.health(), Health::Busy, "round {round}, step {step}");
            }
            part.iter().for_each(|&user| w.returned(user));
        }
    }
    // But what never comes back is stuck.
    let mut w = four();
    let _callers = w.callers(8);
    w.run(ms(4_990));
    assert_eq!(w.health(), Health::Busy);
    w.run(ms(20));
    assert!(w.is_stuck());
}

#[test]
fn who_came_in_vain_long_ago_does_not_count() {
    let mut w = four();
    w.burst(4);
    let _users = w.callers(4);
    w.run(ms(10));
    let caller = w.get();
    w.run(ms(10));
    w.leave(caller);
    w.run(secs(1));
    assert!(w.is_stuck());
    w.run(secs(30));
    assert_eq!(w.health(), Health::Busy, "nobody else has come");
}

#[test]
fn many_probes_dial_no_more_often_than_a_waiter_would() {
    for (reach, most) in [(Reach::Server, 15), (Reach::Nobody, 15), (Reach::Refusal, 2)] {
        let mut w = four();
        w.refuse = Some(reach);
        let caller = w.get();
        w.run(ms(10));
        w.leave(caller);
        let dials = w.dials.len();
        for _ in 0..1_000 {
            w.ledger.probe(w.now);
            w.apply();
            w.run(ms(10));
        }
        let more = w.dials.len() - dials;
        assert!(more <= most && (more >= 1), "{reach:?}: {more}");
    }
}
