//! What has happened, what was wrong, and how long the machine itself stood still.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::support::ms;

/// How many happenings a failure shows.
const SHOWN: usize = 50;
/// How many flaws it shows: the later ones follow from the first.
const FLAWS: usize = 12;

/// The account of one soak.
pub(crate) struct Journal {
    pub(crate) seed: u64,
    begun: Instant,
    kept: Mutex<Kept>,
    flawed: AtomicBool,
}

#[derive(Default)]
struct Kept {
    /// Faults, and what is done to pools.
    events: VecDeque<(Duration, String)>,
    /// What the users do. Kept apart, since they do hundreds of things between two faults.
    turns: VecDeque<(Duration, String)>,
    counts: BTreeMap<String, u64>,
    most: BTreeMap<&'static str, Duration>,
    flaws: Vec<String>,
}

impl Journal {
    pub(crate) fn new(seed: u64) -> Arc<Journal> {
        let kept = Mutex::new(Kept::default());
        Arc::new(Journal { seed, begun: Instant::now(), kept, flawed: AtomicBool::new(false) })
    }

    /// Notes a fault, or what is done to a pool, and counts it by its first word.
    pub(crate) fn event(&self, text: impl fmt::Display) {
        let (at, text) = (self.begun.elapsed(), text.to_string());
        let kind = text.split(' ').next().unwrap_or_default().to_owned();
        let mut kept = self.kept.lock();
        *kept.counts.entry(kind).or_default() += 1;
        push(&mut kept.events, (at, text));
    }

    /// Notes what a user does, and counts it by its kind.
    pub(crate) fn turn(&self, user: &str, kind: &str, outcome: impl fmt::Display) {
        let (at, text) = (self.begun.elapsed(), format!("{user}: {kind}: {outcome}"));
        let mut kept = self.kept.lock();
        *kept.counts.entry(format!("use/{kind}")).or_default() += 1;
        push(&mut kept.turns, (at, text));
    }

    pub(crate) fn count(&self, what: &str, n: u64) {
        *self.kept.lock().counts.entry(what.to_owned()).or_default() += n;
    }

    /// Keeps the greatest.
    pub(crate) fn most(&self, what: &'static str, time: Duration) {
        let mut kept = self.kept.lock();
        let most = kept.most.entry(what).or_default();
        *most = time.max(*most);
    }

    /// Notes what should not be.
    pub(crate) fn flaw(&self, text: impl fmt::Display) {
        let at = self.begun.elapsed();
        let mut kept = self.kept.lock();
        if kept.flaws.len() < FLAWS {
            kept.flaws.push(format!("at {:.3} s: {text}", at.as_secs_f64()));
        }
        self.flawed.store(true, SeqCst);
    }

    pub(crate) fn is_flawed(&self) -> bool {
        self.flawed.load(SeqCst)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The counts and the maxima.
    pub(crate) fn account(&self) -> String {
        let kept = self.kept.lock();
        let mut text = String::new();
        for (what, n) in &kept.counts {
            let _ = writeln!(text, "  {n:>8} {what}");
        }
        for (what, time) in &kept.most {
            let _ = writeln!(text, "  at most {time:.1?}: {what}");
        }
        text
    }

    /// Flaws, seed, second and the last happenings, past the harness: the process may be about to end.
    pub(crate) fn show(&self) {
        let kept = self.kept.lock();
        let mut text = format!("MILLPOND_SOAK_SEED={} at {:.1} s\n", self.seed, self.begun.elapsed().as_secs_f64());
        for flaw in &kept.flaws {
            let _ = writeln!(text, "FLAW {flaw}");
        }
        for (what, happenings) in [("faults and orders", &kept.events), ("uses", &kept.turns)] {
            let _ = writeln!(text, "the last {what}:");
            for (at, happening) in happenings {
                let _ = writeln!(text, "  {:9.3} {happening}", at.as_secs_f64());
            }
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

fn push(ring: &mut VecDeque<(Duration, String)>, happening: (Duration, String)) {
    if ring.len() == SHOWN {
        ring.pop_front();
    }
    ring.push_back(happening);
}

/// Good enough to stir, and the same for the same seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Dice {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1));
        dice.roll(2);
        dice
    }

    /// Dice for somebody else.
    pub(crate) fn other(&mut self) -> Dice {
        Dice::new(self.roll(u64::MAX >> 33))
    }

    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        // Knuth's multiplier.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    pub(crate) fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    /// So many milliseconds.
    pub(crate) fn between(&mut self, from: u64, to: u64) -> Duration {
        ms(from + self.roll(to - from + 1))
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize]
    }
}
