//! [`EventCount`]: what the threads of a pool sleep on for long.
//!
//! It stands on the standard library's lock, not on `parking_lot`'s: the latter keeps every sleeping thread in a table
//! of the process, which a forked child inherits without those threads, and trips over when it comes to sleep itself.
//! With what sleeps long out of that table, a child may fork at any time and build a pool of its own.

use crate::leaf::process::Home;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Counts events. A thread that waits for the next event takes the count first, then looks at what the event would
/// change, and then waits: so it misses none, and need not hold a lock in between.
#[derive(Debug)]
pub(crate) struct EventCount {
    home: Home,
    count: Mutex<u64>,
    sleepers: Condvar,
}

impl EventCount {
    pub(crate) fn new() -> Self {
        EventCount { home: Home::here(), count: Mutex::new(0), sleepers: Condvar::new() }
    }

    /// How many events there were.
    pub(crate) fn count(&self) -> u64 {
        *self.lock()
    }

    /// Counts one more event, and wakes all who wait. (In a forked child nobody waits, and the thread that holds the
    /// lock may not be there.)
    pub(crate) fn notify(&self) {
        let Some(mut count) = self.home.lock(&self.count) else { return };
        *count += 1;
        drop(count);
        self.sleepers.notify_all();
    }

    /// Sleeps until there were more events than `seen`, or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, seen: u64, deadline: Option<Instant>) {
        let mut count = self.lock();
        while *count == seen {
            count = match deadline {
                None => self.sleepers.wait(count).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                        return;
                    };
                    self.sleepers.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// A number cannot be left half changed.
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    /// How long a test waits for what is to come at once.
    const SOON: Duration = Duration::from_secs(20);

    /// Waits, and says whether the event came before the deadline.
    fn wait(events: &EventCount, seen: u64) -> bool {
        let deadline = Instant::now() + SOON;
        events.wait(seen, Some(deadline));
        Instant::now() < deadline
    }

    #[test]
    fn an_event_before_the_wait_is_not_missed() {
        let events = EventCount::new();
        let seen = events.count();
        events.notify();
        assert!(wait(&events, seen));
    }

    #[test]
    fn an_event_wakes_all() {
        let events = EventCount::new();
        let seen = events.count();
        thread::scope(|s| {
            let sleepers: Vec<_> = (0..3).map(|_| s.spawn(|| wait(&events, seen))).collect();
            events.notify();
            assert!(sleepers.into_iter().all(|t| t.join().unwrap()));
        });
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let events = EventCount::new();
        let deadline = Instant::now() + Duration::from_millis(20);
        events.wait(events.count(), Some(deadline));
        assert!(Instant::now() >= deadline);
    }
}
