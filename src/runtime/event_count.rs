//! [`EventCount`]: what the reaper, `build` and `close` sleep on.
//!
//! It uses the standard library's lock and not `parking_lot`'s. `parking_lot` keeps every sleeping thread in a table of
//! the process. A forked child inherits that table without the threads, and may hang when it sleeps on such a lock
//! itself. Since long sleeps are not in the table, a process may fork at any time, and the child may build a pool of
//! its own.

use crate::leaf::process::Home;
use crate::leaf::sync::Instant;
use crate::leaf::sync::blocking::{Condvar, Mutex, MutexGuard};
use std::sync::PoisonError;

/// Counts events. A thread that waits for the next event reads the count first, then looks at the state that an event
/// would change, and then waits. So it misses no event, and needs no lock in between.
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

    /// The number of events until now.
    pub(crate) fn count(&self) -> u64 {
        *self.lock()
    }

    /// Counts one more event, and wakes all sleeping threads. (A forked child has no such thread, nor perhaps the one
    /// that has the lock. There nothing is done.)
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

    /// The lock, even if it is poisoned: a panic cannot leave a number half changed.
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    /// How long a test waits for an event that is to come at once.
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
