//! The log of this process, kept for the tests that ask.

use std::thread;
use std::time::Instant;

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

/// One record.
#[derive(Clone, Debug)]
pub struct Logged {
    pub level: Level,
    pub target: String,
    pub text: String,
    /// The name of the thread that logged it.
    pub thread: String,
    pub at: Instant,
}

/// While this is held everything is kept that this crate or `postgres` logs, at any level.
#[must_use = "when it is dropped, nothing is kept any more"]
pub struct Capture(());

/// How many tests listen, and what they have heard.
static KEPT: Mutex<(usize, Vec<Logged>)> = Mutex::new((0, Vec::new()));

struct Keeper;

impl Log for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("millpond") || metadata.target().starts_with("postgres")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            let (target, text) = (record.target().to_owned(), record.args().to_string());
            KEPT.lock().1.push(Logged { level: record.level(), target, text, thread, at: Instant::now() });
        }
    }

    fn flush(&self) {}
}

/// Begins to keep the log. Tests that run side by side share it: each looks for what names its own pools.
pub fn capture() -> Capture {
    let mut kept = KEPT.lock();
    if kept.0 == 0 {
        kept.1.clear();
        // The first test of the process sets it; it stays.
        let _ = log::set_logger(&Keeper);
        log::set_max_level(LevelFilter::Trace);
    }
    kept.0 += 1;
    Capture(())
}

impl Drop for Capture {
    fn drop(&mut self) {
        let mut kept = KEPT.lock();
        kept.0 -= 1;
        if kept.0 == 0 {
            log::set_max_level(LevelFilter::Off);
        }
    }
}

/// The records kept so far of which this is true, in order.
pub fn logged(wanted: impl Fn(&Logged) -> bool) -> Vec<Logged> {
    KEPT.lock().1.iter().filter(|logged| wanted(logged)).cloned().collect()
}
