//! Health: how the pool is, from what the ledger counts, and the two notes that it needs beside them: who came in vain, and how long
//! checkouts last. No other rule reads these.

use std::time::Duration;

use super::Ledger;
use super::demand::FailedOpen;
use crate::leaf::clock::Moment;

/// How long nothing has come back, at least, before the pool is called stuck.
const QUIET_LEAST: Duration = Duration::from_millis(500);
/// ... and at least this many times as long as the longest of the recent checkouts: long jobs are no fault.
const QUIET_USES: u64 = 2;
/// The least while connections are in use and none has come back yet, so that it is not known how long a checkout lasts.
const QUIET_FIRST: Duration = Duration::from_secs(5);
/// The first so many checkouts are taken for usual, however long they last.
const FEW: u64 = 16;
/// A long checkout counts for less with each later one: by one part in two to the power of this.
const FORGETTING: u32 = 10;
/// A caller that came in vain, and that no other has followed for so long, says nothing any more.
const STARVED_FOR: Duration = Duration::from_secs(30);

/// How the pool is. (Why opens fail the runtime has in words.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Ready,
    Busy,
    Stuck { since: Duration },
    Down(FailedRun),
    Closed,
}

/// The present run of failed opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FailedRun {
    pub(crate) since: Duration,
    pub(crate) attempts: u64,
    /// Zero while an attempt is under way. `None`: no attempt is wanted.
    pub(crate) next_try: Option<Duration>,
    pub(crate) why: FailedOpen,
}

impl<C, W: Clone> Ledger<C, W> {
    pub(crate) fn health(&self, now: Moment) -> Health {
        if self.closed {
            return Health::Closed;
        }
        let now = now.max(self.now);
        let quiet = self.quiet(now);
        match (self.failed_run(now), quiet) {
            (Some(run), _) if self.counted.alive() == 0 => Health::Down(run),
            (Some(run), Some(_)) => Health::Down(run),
            (None, Some(since)) => Health::Stuck { since },
            _ if self.front.is_some() || self.is_full() => Health::Busy,
            _ => Health::Ready,
        }
    }

    /// The present run of failed opens.
    pub(crate) fn failed_run(&self, now: Moment) -> Option<FailedRun> {
        let (failure, why) = (self.failure.as_ref()?, self.failing()?);
        let now = now.max(self.now);
        let next_try = if self.counted.opens() > 0 {
            Some(Duration::ZERO)
        } else if self.closed || !self.wants_open(self.demand(now), None) {
            None
        } else {
            Some(self.dial_at(now)).filter(|&at| at != Moment::NEVER).map(|at| at.since(now))
        };
        Some(FailedRun { since: now.since(failure.since), attempts: failure.attempts, next_try, why })
    }

    /// How long ago the last open failed that did, and why.
    pub(crate) fn last_failed(&self, now: Moment) -> Option<(Duration, FailedOpen)> {
        self.last_failed.map(|(at, why)| (now.max(self.now).since(at), why))
    }

    /// A checkout is over that lasted so long.
    #[inline]
    pub(super) fn used_for(&mut self, nanos: u64, now: Moment) {
        self.tally.usage_time.record(nanos);
        if nanos <= self.recent_use {
            self.recent_use -= self.recent_use >> FORGETTING;
        } else {
            self.used_for_longer(nanos, now);
        }
    }

    /// A checkout lasted longer than those before it. What is usual doubles at most, and checkouts that ran side by side count as
    /// one: those that hung in one fault must not hide the next.
    #[cold]
    fn used_for_longer(&mut self, nanos: u64, now: Moment) {
        if self.tally.usage_time.count() <= FEW {
            self.recent_use = nanos;
        } else if self.recent_use_grew.plus_nanos(nanos) <= now {
            let least = QUIET_LEAST.as_nanos() as u64 / QUIET_USES;
            self.recent_use = nanos.min((self.recent_use * 2).max(least));
            self.recent_use_grew = now;
        }
    }

    /// A caller has come and got nothing at once.
    pub(super) fn note_starved(&mut self, now: Moment) {
        if self.starved_at <= self.last_progress {
            self.starved_at = now;
        }
        self.last_starved = now;
    }

    /// No connection is idle, and there is no room for another.
    fn is_full(&self) -> bool {
        self.idle.is_empty() && self.counted.total() >= self.rules.max_size
    }

    /// For how long nothing has come back although callers came for it, if that is longer than is usual.
    fn quiet(&self, now: Moment) -> Option<Duration> {
        // (Callers with short deadlines come and go. Between two of them the pool is as stuck as before.)
        let counts = self.front.is_some() || now.since(self.last_starved) < STARVED_FOR;
        let since = if counts && self.starved_at > self.last_progress && (self.is_full() || self.counted.opens() > 0) {
            self.starved_at
        } else {
            self.front?.since.max(self.last_progress)
        };
        let quiet = now.since(since);
        let is_known = self.tally.usage_time.count() > 0 || self.counted.in_use() == 0;
        let is_long = quiet >= if is_known { QUIET_LEAST } else { QUIET_FIRST }
            && quiet >= self.open_patience()
            && quiet >= Duration::from_nanos(self.recent_use.saturating_mul(QUIET_USES));
        is_long.then_some(quiet)
    }
}
