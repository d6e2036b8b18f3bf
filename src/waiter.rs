//! One waiting thread's [`Seat`].
//!
//! It is filled under the ledger's lock, by whoever has something for this thread, and woken after that lock is
//! released. So at its deadline the thread asks the ledger, and is either still queued, and leaves, or its seat is full.

use parking_lot::{Condvar, Mutex};
use std::time::Instant;

/// Where one thread waits for one `T`.
pub(crate) struct Seat<T> {
    full: Mutex<Option<T>>,
    bell: Condvar,
}

impl<T> Seat<T> {
    pub(crate) fn new() -> Self {
        Seat { full: Mutex::new(None), bell: Condvar::new() }
    }

    /// Puts `what` there for the thread to find. Does not wake it.
    pub(crate) fn fill(&self, what: T) {
        let before = self.full.lock().replace(what);
        debug_assert!(before.is_none(), "a seat is filled once");
    }

    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    /// Sleeps until the seat is full or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<T> {
        let mut full = self.full.lock();
        loop {
            if full.is_some() {
                return full.take();
            }
            match deadline {
                None => self.bell.wait(&mut full),
                Some(deadline) => {
                    if self.bell.wait_until(&mut full, deadline).timed_out() {
                        return full.take();
                    }
                }
            }
        }
    }

    /// What the seat holds.
    pub(crate) fn take(&self) -> Option<T> {
        self.full.lock().take()
    }
}
