//! Time as the pool sees it: [`Moment`], and the one place that reads a clock.
//!
//! A `Moment` is a number. So the [`Ledger`](crate::ledger::Ledger), which is only ever told a moment, runs on virtual
//! time in a test and on the monotonic clock in a pool.

use crate::leaf::sync::Instant;
use std::time::Duration;

/// Nanoseconds since the pool's birth. Arithmetic saturates: what is too far away to add is [`Moment::NEVER`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The pool's birth.
    pub(crate) const BIRTH: Moment = Moment(0);
    /// Later than every other moment: a deadline that does not come.
    pub(crate) const NEVER: Moment = Moment(u64::MAX);

    /// This moment and `d` after it; `NEVER` stays `NEVER`.
    #[inline]
    pub(crate) fn plus(self, d: Duration) -> Moment {
        Moment(self.0.saturating_add(nanos(d)))
    }

    /// [`plus`](Moment::plus) for a number of nanoseconds.
    #[inline]
    pub(crate) fn plus_nanos(self, nanos: u64) -> Moment {
        Moment(self.0.saturating_add(nanos))
    }

    /// This moment less `d`, but not before the pool's birth; `NEVER` stays `NEVER`.
    #[inline]
    pub(crate) fn minus(self, d: Duration) -> Moment {
        if self == Moment::NEVER { self } else { Moment(self.0.saturating_sub(nanos(d))) }
    }

    /// The time from `earlier` to this moment; zero if this moment is the earlier one.
    #[inline]
    pub(crate) fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.nanos_since(earlier))
    }

    /// [`since`](Moment::since) as a number of nanoseconds, which the histograms count in.
    #[inline]
    pub(crate) fn nanos_since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A duration in the clock's unit. One that is too long for it is `u64::MAX`, which added to a moment makes it `NEVER`.
#[inline]
pub(crate) fn nanos(d: Duration) -> u64 {
    d.as_secs().saturating_mul(1_000_000_000).saturating_add(u64::from(d.subsec_nanos()))
}

/// A pool's clock. It stands still while the machine is suspended, as `CLOCK_MONOTONIC` does.
#[derive(Debug)]
pub(crate) struct Clock {
    birth: Instant,
    coarse: coarse::Source,
}

impl Clock {
    /// A clock that reads `Moment::BIRTH` now.
    pub(crate) fn new() -> Clock {
        // The coarse clock is made second. So its origin is the later one, and it never runs ahead of the precise
        // clock.
        let birth = Instant::now();
        Clock { birth, coarse: coarse::Source::new() }
    }

    /// The time to the nanosecond. To read it costs a few tens of nanoseconds.
    pub(crate) fn precise(&self) -> Moment {
        Moment(nanos(self.birth.elapsed()))
    }

    /// The time as of the system's last tick. It is never ahead of [`precise`](Clock::precise), and behind it by less
    /// than [`resolution`](Clock::resolution), unless a busy kernel ticks late. To read it costs a few nanoseconds.
    #[inline]
    pub(crate) fn coarse(&self) -> Moment {
        match self.coarse.elapsed() {
            Some(nanos) => Moment(nanos),
            None => self.precise(),
        }
    }

    /// How far the coarse clock may lie behind: two ticks. At each tick the system advances it by whole periods only.
    /// So the clock is up to one tick behind after a tick, and up to two before the next (`coarse_is_not_far_behind`).
    pub(crate) fn resolution(&self) -> Duration {
        self.coarse.resolution() * 2
    }

    /// The `Instant` of a moment, to sleep until; `None` for a moment too far away to be one.
    pub(crate) fn instant(&self, at: Moment) -> Option<Instant> {
        if at == Moment::NEVER { None } else { self.birth.checked_add(at.since(Moment::BIRTH)) }
    }
}

#[cfg(all(any(target_os = "linux", target_os = "android"), not(millpond_model)))]
mod coarse {
    use rustix::time::{ClockId, Timespec, clock_getres, clock_gettime};
    use std::time::Duration;

    #[derive(Debug)]
    pub(super) struct Source {
        origin: u64,
        resolution: Duration,
    }

    impl Source {
        pub(super) fn new() -> Source {
            let origin = nanos(clock_gettime(ClockId::Monotonic));
            Source { origin, resolution: Duration::from_nanos(nanos(clock_getres(ClockId::MonotonicCoarse))) }
        }

        /// Nanoseconds since the origin.
        #[inline]
        pub(super) fn elapsed(&self) -> Option<u64> {
            Some(nanos(clock_gettime(ClockId::MonotonicCoarse)).saturating_sub(self.origin))
        }

        pub(super) fn resolution(&self) -> Duration {
            self.resolution
        }
    }

    #[inline]
    fn nanos(t: Timespec) -> u64 {
        // A monotonic clock is never negative, and 584 years from its overflow.
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

#[cfg(all(not(any(target_os = "linux", target_os = "android")), not(millpond_model)))]
mod coarse {
    use std::time::Duration;

    /// Such a system has no coarse clock: the precise one serves.
    #[derive(Debug)]
    pub(super) struct Source;

    impl Source {
        pub(super) fn new() -> Source {
            Source
        }

        #[inline]
        pub(super) fn elapsed(&self) -> Option<u64> {
            None
        }

        pub(super) fn resolution(&self) -> Duration {
            Duration::ZERO
        }
    }
}

#[cfg(millpond_model)]
mod coarse {
    use crate::model::time;
    use std::time::Duration;

    /// The model's.
    #[derive(Debug)]
    pub(super) struct Source(u64);

    impl Source {
        pub(super) fn new() -> Source {
            Source(time::precise())
        }

        pub(super) fn elapsed(&self) -> Option<u64> {
            Some(time::coarse().saturating_sub(self.0))
        }

        pub(super) fn resolution(&self) -> Duration {
            time::tick()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_far_is_never() {
        assert_eq!(Moment::BIRTH.plus(Duration::MAX), Moment::NEVER);
        assert_eq!(Moment::NEVER.plus(Duration::from_secs(1)), Moment::NEVER);
        assert_eq!(Moment::NEVER.minus(Duration::from_secs(1)), Moment::NEVER);
        assert_eq!(Moment::BIRTH.minus(Duration::from_secs(1)), Moment::BIRTH);
        assert_eq!(Moment::BIRTH.since(Moment::NEVER), Duration::ZERO);
    }

    #[test]
    fn coarse_is_never_ahead() {
        let clock = Clock::new();
        let mut last = Moment::BIRTH;
        for _ in 0..100_000 {
            let coarse = clock.coarse();
            assert!(coarse <= clock.precise());
            assert!(coarse >= last, "and never goes back");
            last = coarse;
        }
    }

    #[test]
    fn coarse_is_not_far_behind() {
        let clock = Clock::new();
        // The precise clock is read first, so that a pause between the two readings does not count as lag.
        let lag = || {
            let precise = clock.precise();
            precise.since(clock.coarse())
        };
        // A busy machine ticks late now and then.
        let (mut all, mut late) = (0, 0);
        while clock.precise() < Moment::BIRTH.plus(Duration::from_millis(100)) {
            let lag = lag();
            assert!(lag <= clock.resolution() + Duration::from_millis(50), "{lag:?}");
            all += 1;
            late += u32::from(lag > clock.resolution());
        }
        assert!(late * 2 < all, "{late} of {all} readings are too far behind");
    }

    #[test]
    fn a_moment_is_an_instant() {
        let clock = Clock::new();
        assert_eq!(clock.instant(Moment::NEVER), None);
        let at = clock.precise();
        assert!(clock.instant(at).unwrap() <= Instant::now());
    }
}
