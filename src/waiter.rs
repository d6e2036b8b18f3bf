//! One waiting thread's [`Seat`].
//!
//! It is filled under the ledger's lock, by whoever has something for this thread, and woken after that lock is
//! released. So at its deadline the thread asks the ledger, and is either still queued, and leaves, or its seat is full.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where one thread waits for one `T`. (On the standard library's lock, for the reason that [`Bell`](crate::bell) gives.)
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
        let before = self.lock().replace(what);
        debug_assert!(before.is_none(), "a seat is filled once");
    }

    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    /// Sleeps until the seat is full or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<T> {
        let mut full = self.lock();
        while full.is_none() {
            full = match deadline {
                None => self.bell.wait(full).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero())?;
                    self.bell.wait_timeout(full, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        full.take()
    }

    /// What the seat holds.
    pub(crate) fn take(&self) -> Option<T> {
        self.lock().take()
    }

    /// It is either full or not, whatever its last holder came to.
    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
