//! [`Bell`]: what the threads of a pool sleep on for long.
//!
//! It stands on the standard library's lock, not on `parking_lot`'s: the latter keeps every sleeping thread in a table of
//! the process, which a forked child inherits without those threads, and trips over when it comes to sleep itself. With
//! what sleeps long out of that table, a child may fork at any time and build a pool of its own.

use crate::leaf::process::Home;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Counts how often it was rung. Whoever wants to hear the next ring takes the count first, then looks at what the bell
/// is rung for, and then waits: so none is missed, and no lock need be held in between.
#[derive(Debug)]
pub(crate) struct Bell {
    home: Home,
    rung: Mutex<u64>,
    sleepers: Condvar,
}

impl Bell {
    pub(crate) fn new() -> Self {
        Bell { home: Home::here(), rung: Mutex::new(0), sleepers: Condvar::new() }
    }

    /// How often it was rung.
    pub(crate) fn count(&self) -> u64 {
        *self.lock()
    }

    /// Wakes all who wait. (In a forked child nobody does, and whoever held the lock is not there.)
    pub(crate) fn ring(&self) {
        let Some(mut rung) = self.home.lock(&self.rung) else { return };
        *rung += 1;
        drop(rung);
        self.sleepers.notify_all();
    }

    /// Sleeps until it has been rung more often than `heard`, or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, heard: u64, deadline: Option<Instant>) {
        let mut rung = self.lock();
        while *rung == heard {
            rung = match deadline {
                None => self.sleepers.wait(rung).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                        return;
                    };
                    self.sleepers.wait_timeout(rung, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// A number cannot be left half changed.
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_ring_before_the_wait_is_heard() {
        let bell = Bell::new();
        let heard = bell.count();
        bell.ring();
        bell.wait(heard, None);
    }

    #[test]
    fn a_ring_wakes_all() {
        let bell = Bell::new();
        let heard = bell.count();
        thread::scope(|s| {
            let sleepers: Vec<_> = (0..3).map(|_| s.spawn(|| bell.wait(heard, None))).collect();
            bell.ring();
            sleepers.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let bell = Bell::new();
        let deadline = Instant::now() + Duration::from_millis(20);
        bell.wait(bell.count(), Some(deadline));
        assert!(Instant::now() >= deadline);
    }
}
