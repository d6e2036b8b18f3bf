//! Watches that every step of a ledger ends: a loop without an end fails its test, and does not hang it.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

/// How often the watch looks, and how many looks in a row may find no step. A step takes microseconds.
const LOOK: Duration = Duration::from_millis(250);
const MOST_LOOKS: u32 = 80;

/// Counts the steps of one world. The world is watched until its beat is dropped.
pub(super) struct Beat(Arc<AtomicU64>);

/// A world that is watched.
struct Watched {
    test: String,
    beat: Weak<AtomicU64>,
    seen: u64,
    looks: u32,
}

/// The worlds that are watched. The watch runs while there is any.
struct Watch {
    worlds: Vec<Watched>,
    runs: bool,
}

static WATCH: Mutex<Watch> = Mutex::new(Watch { worlds: Vec::new(), runs: false });

impl Beat {
    pub(super) fn new() -> Beat {
        let beat = Arc::new(AtomicU64::new(0));
        let test = thread::current().name().unwrap_or("a test").to_owned();
        let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
        watch.worlds.push(Watched { test, beat: Arc::downgrade(&beat), seen: 0, looks: 0 });
        if !watch.runs {
            watch.runs = true;
            thread::Builder::new().name("watch".into()).spawn(run).expect("a thread to watch on");
        }
        Beat(beat)
    }

    /// The world has ended a step.
    pub(super) fn step(&self) {
        self.0.fetch_add(1, Relaxed);
    }
}

fn run() {
    loop {
        thread::sleep(LOOK);
        let mut watch = WATCH.lock().unwrap_or_else(PoisonError::into_inner);
        watch.worlds.retain_mut(|world| {
            let Some(beat) = world.beat.upgrade().map(|beat| beat.load(Relaxed)) else { return false };
            world.looks = if beat == world.seen { world.looks + 1 } else { 0 };
            world.seen = beat;
            if world.looks > MOST_LOOKS {
                // Not `eprintln!`, which the harness keeps until the test ends.
                let _ = writeln!(std::io::stderr(), "{}: a step of the ledger does not end", world.test);
                std::process::exit(101);
            }
            true
        });
        if watch.worlds.is_empty() {
            watch.runs = false;
            return;
        }
    }
}
