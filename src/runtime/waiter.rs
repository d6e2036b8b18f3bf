//! One [`Waiter`]: a thread that waits for a connection.
//!
//! A waiter is served under the ledger's lock, and woken after that lock is released. So at its deadline the thread
//! asks the ledger, and is either still queued, and leaves, or has been served. A notification promises nothing, and
//! may come to a waiter at any time.

use crate::leaf::process::Home;
use crate::leaf::sync::Instant;
use crate::leaf::sync::blocking::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;

/// A thread that waits for one `T`. (It uses the standard library's lock, for the reason that
/// [`event_count`](crate::runtime::event_count) gives.)
pub(crate) struct Waiter<T> {
    home: Home,
    signal: Mutex<Signal<T>>,
    wake_up: Condvar,
}

/// What a waiter is told.
#[derive(Debug)]
pub(crate) enum Signal<T> {
    /// Nothing yet; from [`Waiter::wait`]: the deadline came first.
    None,
    /// There may be a connection to take, unless another thread is faster.
    Notified,
    /// The waiter was served with this.
    Served(T),
}

impl<T> Waiter<T> {
    /// A waiter of the process `home`: in a forked child of it nothing is done to the waiter.
    pub(crate) fn new(home: Home) -> Self {
        Waiter { home, signal: Mutex::new(Signal::None), wake_up: Condvar::new() }
    }

    /// Serves the waiter with `what`. Does not wake its thread.
    pub(crate) fn serve(&self, what: T) {
        let Some(mut signal) = self.home.lock(&self.signal) else { return std::mem::forget(what) };
        let before = std::mem::replace(&mut *signal, Signal::Served(what));
        drop(signal);
        debug_assert!(!matches!(before, Signal::Served(_)), "a waiter is served once");
    }

    pub(crate) fn wake(&self) {
        self.wake_up.notify_one();
    }

    /// Tells the thread that there may be a connection to take, and wakes it.
    pub(crate) fn notify(&self) {
        let Some(mut signal) = self.home.lock(&self.signal) else { return };
        if let Signal::None = *signal {
            *signal = Signal::Notified;
            drop(signal);
            self.wake();
        }
    }

    /// Sleeps until there is a signal or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Signal<T> {
        let mut signal = self.lock();
        while let Signal::None = *signal {
            signal = match deadline {
                None => self.wake_up.wait(signal).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.wake_up.wait_timeout(signal, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::replace(&mut *signal, Signal::None)
    }

    /// What the waiter was served.
    pub(crate) fn take(&self) -> Option<T> {
        match std::mem::replace(&mut *self.lock(), Signal::None) {
            Signal::Served(what) => Some(what),
            Signal::None | Signal::Notified => None,
        }
    }

    /// The lock, even if it is poisoned: a panic cannot leave a signal half changed.
    fn lock(&self) -> MutexGuard<'_, Signal<T>> {
        self.signal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
