//! How long the machine stood still, which no pool can help.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// When a processor did not get to a thread that was due, from and to: apart from each other, in their order.
#[derive(Default)]
pub struct Stops {
    recent: VecDeque<(Instant, Instant)>,
    pub longest: Duration,
}

/// How long a thread of the heart sleeps.
const PERIOD: Duration = Duration::from_millis(5);

/// What the threads of the heart have seen.
struct Seen {
    /// When each was last awake.
    beats: Vec<Instant>,
    stops: Stops,
}

impl Seen {
    /// This one has been asleep until now, or still is: what is too long for that is a stop.
    fn look(&mut self, thread: usize, now: Instant) {
        let last = self.beats[thread];
        if now.saturating_duration_since(last) > PERIOD * 2 {
            self.stops.note(last + PERIOD, now);
        }
    }
}

impl Stops {
    /// How many are remembered. Each is longer than 10 ms, so they reach back for 40 s at least.
    const REMEMBERED: usize = 4096;

    /// Stops at the same time, of two processors, are one.
    pub fn note(&mut self, mut from: Instant, mut to: Instant) {
        self.longest = self.longest.max(to - from);
        while let Some(&(begun, ended)) = self.recent.back().filter(|(_, ended)| *ended >= from) {
            (from, to) = (from.min(begun), to.max(ended));
            self.recent.pop_back();
        }
        if self.recent.len() == Self::REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((from, to));
    }

    /// For how long altogether since then.
    pub fn since(&self, from: Instant) -> Duration {
        let recent = self.recent.iter().rev().take_while(|(_, ended)| *ended > from);
        recent.map(|(begun, ended)| *ended - from.max(*begun)).sum()
    }
}

/// A thread for each processor that sleeps for a moment, again and again: by how much it oversleeps, the machine stood
/// still.
pub struct Heart {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Heart {
    pub fn beat() -> Heart {
        let processors = processors();
        let seen = Seen { beats: vec![Instant::now(); processors.len()], stops: Stops::default() };
        let (seen, over) = (Arc::new(Mutex::new(seen)), Arc::new(AtomicBool::new(false)));
        let threads = processors.into_iter().enumerate().map(|(n, processor)| {
            let (seen, over) = (Arc::clone(&seen), Arc::clone(&over));
            let thread = thread::Builder::new().name("heart".into());
            thread.spawn(move || beat(n, processor, &seen, &over)).expect("a thread for the heart")
        });
        Heart { threads: threads.collect(), seen, over }
    }

    /// For how long the machine stood still since then.
    pub fn stood_still_since(&self, from: Instant) -> Duration {
        let (now, mut seen) = (Instant::now(), self.seen.lock());
        // Whoever asks may be awake again before the heart is.
        (0..seen.beats.len()).for_each(|thread| seen.look(thread, now));
        seen.stops.since(from)
    }

    pub fn longest(&self) -> Duration {
        self.seen.lock().stops.longest
    }
}

fn beat(thread: usize, processor: Option<usize>, seen: &Mutex<Seen>, over: &AtomicBool) {
    stay_on(processor);
    while !over.load(SeqCst) {
        thread::sleep(PERIOD);
        let (now, mut seen) = (Instant::now(), seen.lock());
        seen.look(thread, now);
        seen.beats[thread] = now;
    }
}

/// Those that this process may run on; `None` is any.
#[cfg(target_os = "linux")]
fn processors() -> Vec<Option<usize>> {
    let Ok(mine) = rustix::thread::sched_getaffinity(None) else { return vec![None] };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|&n| mine.is_set(n)).map(Some).collect()
}

#[cfg(target_os = "linux")]
fn stay_on(processor: Option<usize>) {
    let Some(processor) = processor else { return };
    let mut only = rustix::thread::CpuSet::new();
    only.set(processor);
    let _ = rustix::thread::sched_setaffinity(None, &only);
}

#[cfg(not(target_os = "linux"))]
fn processors() -> Vec<Option<usize>> {
    vec![None]
}

#[cfg(not(target_os = "linux"))]
fn stay_on(_: Option<usize>) {}

impl Drop for Heart {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}
