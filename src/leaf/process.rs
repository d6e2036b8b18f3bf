//! Which process: a forked child has its parent's memory and none of its other threads. What one of these had locked at
//! that moment is locked for ever there, so a thread that may be in a child looks at the process before it waits for a
//! lock.

use std::cell::Cell;
use std::process;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

thread_local! {
    /// When this thread looked at its process last, and what it saw. (Without a destructor, so that it can be read to
    /// the very end of its thread.)
    static PROCESS: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

/// How long a thread relies on what it saw. To look is a system call, which takes longer than a checkout.
const LOOK_AGAIN: u64 = 1_000_000;

/// The process in which something was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home(u32);

impl Home {
    pub(crate) fn here() -> Home {
        Home(process::id())
    }

    pub(crate) fn pid(self) -> u32 {
        self.0
    }

    /// Whether this is another process: a child forked from it.
    pub(crate) fn is_elsewhere(self) -> bool {
        process::id() != self.0
    }

    /// The same, for next to nothing: of a thread that has looked within the last millisecond (and one step of the
    /// coarse clock) it relies on that. `at` is the time in nanoseconds since the [`origin`].
    #[inline]
    pub(crate) fn seems_elsewhere(self, at: u64) -> bool {
        let (looked, seen) = PROCESS.get();
        // (What is before the last look was read off a clock that lies behind the one then: nothing is relied on.)
        (at.wrapping_sub(looked) >= LOOK_AGAIN || seen != self.0) && self.look(at)
    }

    #[cold]
    fn look(self, at: u64) -> bool {
        let pid = process::id();
        PROCESS.set((at, pid));
        pid != self.0
    }

    /// Locks. `None`: this is a child, in which nobody will unlock it.
    pub(crate) fn lock<T>(self, mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) if self.is_elsewhere() => None,
            Err(TryLockError::WouldBlock) => Some(mutex.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// The nanoseconds since some moment that is the same for the whole process, at this one.
pub(crate) fn origin() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    // Far from zero, at which nobody has looked yet.
    let since = ORIGIN.get_or_init(Instant::now).elapsed() + Duration::from_secs(1);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
