//! In which process the code runs. A forked child has its parent's memory, and of its threads only the one that forked.
//! A mutex that another thread had locked at that moment stays locked in the child for ever. So code that may run in a
//! child looks at the process before it waits for a lock.

use crate::leaf::sync::blocking::{Mutex, MutexGuard};
use crate::leaf::sync::{Instant, thread_local};
use std::cell::Cell;
use std::process;
use std::sync::{OnceLock, PoisonError, TryLockError};
use std::time::Duration;

thread_local! {
    /// When this thread looked at its process last, and the process id that it saw. It has no destructor, so that it
    /// can be read to the very end of its thread.
    static PROCESS: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

/// How long a thread relies on the process id that it saw, in nanoseconds: a millisecond. To look is a system call,
/// which takes longer than a checkout.
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

    /// Whether the code runs in another process now: in a child forked from this one.
    pub(crate) fn is_elsewhere(self) -> bool {
        process::id() != self.0
    }

    /// The same, without a system call if this thread has looked within the last millisecond (and one step of the
    /// coarse clock). `at` is the time in nanoseconds since the [`origin`].
    #[inline]
    pub(crate) fn seems_elsewhere(self, at: u64) -> bool {
        let (looked, seen) = PROCESS.get();
        // If `at` lies before the last look, it was read off a clock that lags behind. The difference then wraps around
        // to a great number, and the thread looks again.
        (at.wrapping_sub(looked) >= LOOK_AGAIN || seen != self.0) && self.look(at)
    }

    #[cold]
    fn look(self, at: u64) -> bool {
        let pid = process::id();
        PROCESS.set((at, pid));
        pid != self.0
    }

    /// Locks `mutex`. `None`: the mutex is locked and this is a child, in which no thread will unlock it.
    pub(crate) fn lock<T>(self, mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) if self.is_elsewhere() => None,
            Err(TryLockError::WouldBlock) => Some(mutex.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// The nanoseconds from an origin, which is the same for the whole process, until now.
pub(crate) fn origin() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    // A second more, since zero stands for a thread that has not looked yet.
    let since = ORIGIN.get_or_init(Instant::now).elapsed() + Duration::from_secs(1);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
