//! [`PoolTime`]: the clock of a pool, and the process in which the pool was built.

use crate::leaf::clock::{Clock, Moment};
use crate::leaf::process::{Home, origin};
use crate::leaf::sync::Instant;
use crate::leaf::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A pool's clock and process.
pub(crate) struct PoolTime {
    clock: Clock,
    home: Home,
    /// When the pool was built, see [`origin`].
    born: u64,
    /// The number of waiters. While there is one, the clock is read precisely.
    waiting: AtomicU32,
}

impl PoolTime {
    pub(crate) fn new() -> Self {
        PoolTime { clock: Clock::new(), home: Home::here(), born: origin(), waiting: AtomicU32::new(0) }
    }

    /// The process that built the pool.
    pub(crate) fn home(&self) -> Home {
        self.home
    }

    /// How far the coarse clock may lie behind.
    pub(crate) fn resolution(&self) -> Duration {
        self.clock.resolution()
    }

    /// Sets the number of waiters.
    pub(crate) fn set_waiting(&self, waiting: u32) {
        self.waiting.store(waiting, Ordering::Relaxed);
    }

    /// Whether there is a waiter.
    #[inline]
    pub(crate) fn has_waiters(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) != 0
    }

    /// The time: coarse, and precise while there is a waiter.
    #[inline]
    pub(crate) fn now(&self) -> Moment {
        if self.has_waiters() { self.clock.precise() } else { self.clock.coarse() }
    }

    /// The time to the nanosecond.
    pub(crate) fn precise(&self) -> Moment {
        self.clock.precise()
    }

    /// The `Instant` of a moment, to sleep until; `None` for a moment too far away to be one.
    pub(crate) fn instant(&self, at: Moment) -> Option<Instant> {
        self.clock.instant(at)
    }

    /// Whether this process is a child of the one that built the pool, forked from it: it has the pool's memory and
    /// sockets, and none of its threads.
    pub(crate) fn is_forked(&self) -> bool {
        self.home.is_elsewhere()
    }

    /// The same, as a rule without a system call. Wrong only if this very thread looked at its process a moment ago,
    /// and was forked since.
    #[inline]
    pub(crate) fn seems_forked(&self, now: Moment) -> bool {
        // Always by the coarse clock. A look at the time of the precise one would lie ahead of the coarse clock, and
        // would be taken for a fresh one until the coarse clock has caught up.
        let now = if self.has_waiters() { self.clock.coarse() } else { now };
        self.home.seems_elsewhere(self.born + now.nanos_since(Moment::BIRTH))
    }
}
