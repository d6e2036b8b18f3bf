//! Why there is no connection: makes the errors of a pool.

use crate::error::{Cause, Closed, Connect, Error, ErrorKind, Timeout};
use crate::health::Health;
use crate::leaf::failures::ErrorType;
use crate::leaf::text::Short;
use crate::leaf::threads;
use crate::ledger::{self, FailedOpen, FailedRun};
use crate::manage::Manage;
use crate::runtime::shared::Shared;
use crate::stats::ConnectionState;
use std::cmp::Reverse;
use std::time::Duration;

impl<M: Manage> Shared<M> {
    /// No connection came in time.
    pub(crate) fn timeout_error(&self, timeout: Duration) -> Error {
        let me = threads::id();
        let (counts, max_size, failing, checked_out_here, in_use) = {
            let ledger = self.lock();
            let mut in_use: Vec<_> = ledger.slots().filter(|slot| slot.as_seen() == ConnectionState::InUse).collect();
            let here = in_use.iter().filter(|slot| slot.caller().is_some_and(|c| c.thread == me)).count() as u32;
            // Only those that are shown are copied.
            if in_use.len() > Timeout::MOST_SHOWN {
                in_use.select_nth_unstable_by_key(Timeout::MOST_SHOWN, |slot| slot.since);
                in_use.truncate(Timeout::MOST_SHOWN);
            }
            let in_use = in_use.into_iter().cloned().collect();
            (ledger.counts(), ledger.rules().max_size, ledger.failing(), here, in_use)
        };
        let mut longest_in_use = self.describe(in_use);
        longest_in_use.sort_by_key(|row| Reverse(row.since));
        Error::new(ErrorKind::Timeout(Timeout {
            pool: self.name.to_string(),
            timeout,
            max_size,
            in_use: counts.in_use,
            opening: counts.opening,
            checking: counts.checking,
            closing: counts.closing,
            abandoned: counts.abandoned,
            waiting: counts.waiting,
            longest_in_use,
            checked_out_here,
            cause: failing.and_then(|why| self.why_failed(why)),
        }))
    }

    /// How the pool is, with the words of the other side.
    pub(crate) fn health_in_words(&self, health: ledger::Health) -> Health {
        match health {
            ledger::Health::Ready => Health::Ready,
            ledger::Health::Busy => Health::Busy,
            ledger::Health::Stuck { since } => Health::Stuck { since },
            ledger::Health::Closed => Health::Closed,
            ledger::Health::Down(FailedRun { since, attempts, next_try, why }) => {
                let cause = self.why_failed(why).unwrap_or_else(|| Cause::message("an attempt to connect failed"));
                Health::Down { cause, since, attempts, next_try }
            }
        }
    }

    /// Why the last open failed, in words.
    pub(crate) fn why_failed(&self, why: FailedOpen) -> Option<Cause> {
        match why {
            // The runtime stored the cause before it told the ledger.
            FailedOpen::AsReported => self.openings.cause(),
            FailedOpen::NoAnswer => {
                let limit = Short(self.settings.open_timeout);
                let cause = Cause::message(format!("no answer to an attempt to connect within {limit}"));
                Some(cause.of_type(ErrorType::TIMEOUT))
            }
            FailedOpen::TooOld { took } => {
                let took = Short(took);
                let life = self.settings.max_lifetime.map_or(took.to_string(), |life| Short(life).to_string());
                let text = format!("connected in {took}, when its life of at most {life} was over or about to be");
                Some(Cause::message(text).of_type(ErrorType::TOO_OLD))
            }
        }
    }

    /// The server refuses for good.
    pub(crate) fn refused_error(&self) -> Error {
        let cause = self.openings.cause().unwrap_or_else(|| Cause::message("refused"));
        Error::new(ErrorKind::Connect(Connect { pool: self.name.to_string(), cause }))
    }

    /// The pool is closed.
    pub(crate) fn closed_error(&self) -> Error {
        let closed = match self.life.ended.get() {
            Some(ended) => Closed {
                pool: self.name.to_string(),
                by: ended.by,
                at: ended.at,
                thread: threads::name(ended.thread),
                ago: self.time.precise().since(ended.when),
            },
            None => Closed {
                pool: self.name.to_string(),
                by: "its last handle was dropped",
                at: None,
                thread: threads::name(threads::id()),
                ago: Duration::ZERO,
            },
        };
        Error::new(ErrorKind::Closed(closed))
    }

    /// This is a forked child.
    pub(crate) fn forked_error(&self) -> Error {
        let problem = format!(
            "'{}' belongs to process {}, of which this process ({}) is a fork: it has none of the pool's threads, and its \
             connections are the parent's. Build a pool after the fork",
            self.name,
            self.time.home().pid(),
            std::process::id()
        );
        Error::config("pool", problem)
    }
}
