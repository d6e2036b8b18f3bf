//! What the server saw over time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use postgres::{Config, NoTls};

use super::Backend;
use super::database::look;
use super::wait::STEP;

/// A thread that asks the server again and again, until [`end`](Watch::end).
#[must_use = "it watches until it is dropped"]
pub struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Sample>>>,
}

/// One answer of the server's. What it shows was so at some moment between the two.
#[derive(Clone, Debug)]
pub struct Sample {
    pub asked: Instant,
    pub answered: Instant,
    /// The oldest first.
    pub backends: Vec<Backend>,
}

/// All that a [`Watch`] has seen, in order; at least one sample.
#[derive(Debug)]
pub struct History(pub Vec<Sample>);

impl Watch {
    /// Returns when the first sample is taken.
    pub(super) fn begin(config: Config, app: &str) -> Watch {
        let over = Arc::new(AtomicBool::new(false));
        let (enough, app) = (Arc::clone(&over), app.to_owned());
        let (begun, first) = std::sync::mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("watch".into()).spawn(move || {
            let mut client = config.connect(NoTls).expect("a connection to watch on");
            let mut seen = Vec::new();
            loop {
                // Before it asks: there is a sample from after the word to end.
                let last = enough.load(SeqCst);
                let asked = Instant::now();
                let backends = look(&mut client, &app).expect("an answer");
                seen.push(Sample { asked, answered: Instant::now(), backends });
                let _ = begun.try_send(());
                if last {
                    return seen;
                }
                thread::sleep(STEP);
            }
        });
        let watch = Watch { over, thread: Some(thread.expect("a thread to watch on")) };
        first.recv().expect("a first look");
        watch
    }

    /// Takes one last look.
    pub fn end(mut self) -> History {
        self.over.store(true, SeqCst);
        let thread = self.thread.take().expect("ended once");
        History(thread.join().expect("it watched to the end"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Sample {
    pub fn count(&self) -> usize {
        self.backends.len()
    }

    pub fn has(&self, pid: i32) -> bool {
        self.backends.iter().any(|backend| backend.pid == pid)
    }

    pub fn pids(&self) -> BTreeSet<i32> {
        self.backends.iter().map(|backend| backend.pid).collect()
    }
}

impl History {
    /// What was certainly so after `at`.
    pub fn after(&self, at: Instant) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.asked > at)
    }

    /// What was certainly so between these.
    pub fn between(&self, from: Instant, to: Instant) -> impl Iterator<Item = &Sample> {
        self.after(from).filter(move |sample| sample.answered < to)
    }

    /// Every backend that was ever seen.
    pub fn pids(&self) -> BTreeSet<i32> {
        self.0.iter().flat_map(Sample::pids).collect()
    }

    /// Between which moments this backend went: it was there after the first, and was not before the second.
    ///
    /// # Panics
    ///
    /// If it was never seen, or did not go.
    pub fn gone(&self, pid: i32) -> (Instant, Instant) {
        let last = self.0.iter().rposition(|sample| sample.has(pid)).expect("a backend that was seen");
        let next = self.0.get(last + 1).unwrap_or_else(|| panic!("backend {pid} is still there"));
        (self.0[last].asked, next.answered)
    }

    /// The count over time, each with when it was first seen, relative to `zero`: for messages.
    pub fn counts(&self, zero: Instant) -> String {
        let mut text = String::new();
        let mut before = None;
        for sample in &self.0 {
            if before != Some(sample.count()) {
                let at = sample.asked.saturating_duration_since(zero);
                text += &format!("{} after {at:.3?}, ", sample.count());
                before = Some(sample.count());
            }
        }
        text
    }
}
