//! Threads.

use super::local;
use super::time::{Instant, Sleeper, with};
use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use shuttle::thread::current;

/// `std::thread::Builder`.
#[derive(Debug, Default)]
pub struct Builder(Option<String>);

impl Builder {
    pub fn new() -> Builder {
        Builder(None)
    }

    pub fn name(self, name: String) -> Builder {
        Builder(Some(name))
    }

    /// Starts a thread, unless the machine has none left.
    pub fn spawn<T: Send + 'static>(self, body: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
        if !with(|world| world.threads) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "no thread is left"));
        }
        self.start(body)
    }

    fn start<T: Send + 'static>(self, body: impl FnOnce() -> T + Send + 'static) -> io::Result<JoinHandle<T>> {
        let builder = shuttle::thread::Builder::new();
        let builder = match self.0 {
            Some(name) => builder.name(name),
            None => builder,
        };
        let finished = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&finished);
        with(|world| world.alive += 1);
        let inner = builder.spawn(move || {
            let result = body();
            local::forget_mine();
            with(|world| world.alive -= 1);
            tell.store(true, Ordering::Relaxed);
            result
        })?;
        Ok(JoinHandle { inner, finished })
    }
}

/// `std::thread::JoinHandle`.
#[derive(Debug)]
pub struct JoinHandle<T> {
    inner: shuttle::thread::JoinHandle<T>,
    finished: Arc<AtomicBool>,
}

impl<T> JoinHandle<T> {
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    pub fn join(self) -> std::thread::Result<T> {
        self.inner.join()
    }
}

/// Starts a thread of a user's, for which there is always room.
pub fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    Builder::new().start(body).expect("it always starts")
}

pub fn sleep(d: Duration) {
    // A sleep of nothing also lets others run.
    let until = super::time::now().checked_add(d);
    Sleeper::new().sleep(until);
}

/// Sleeps until `at`.
pub fn sleep_until(at: Instant) {
    Sleeper::new().sleep(Some(at));
}

super::local::task_local! {
    static PANICKING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this task unwinds. (`std::thread::panicking` speaks of all tasks together, since one thread of the system
/// runs them all.)
pub fn panicking() -> bool {
    PANICKING.get()
}

/// Runs `body`. The panics in it are made with [`panic_now`].
pub fn catch<T>(body: impl FnOnce() -> T) -> std::thread::Result<T> {
    let before = PANICKING.get();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    PANICKING.set(before);
    result
}

/// A panic on purpose: one that prints nothing.
pub fn panic_now() -> ! {
    PANICKING.set(true);
    std::panic::resume_unwind(Box::new(PANIC))
}

/// A panic on purpose in code that the pool calls, and whose panics the pool catches.
pub fn panic_in_a_call() -> ! {
    std::panic::resume_unwind(Box::new(PANIC))
}

/// What every panic on purpose says.
pub const PANIC: &str = "a panic on purpose";

pub(super) fn who_waits() -> String {
    with(|world| format!("{} threads beside the main one", world.alive))
}
