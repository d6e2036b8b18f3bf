//! What the executor reports of its jobs. A job that was abandoned comes back with a token that is no longer current.
//! The ledger then changes no slot, and the job closes the connection that it brings.

use super::Ledger;
use super::demand::{FailedOpen, Failure};
use super::slots::{CHECK_PATIENCE, Check, Close, State};
use super::values::{OpenError, Order, Reach, Token};
use crate::leaf::clock::Moment;
use crate::leaf::failures::ErrorType;
use crate::leaf::sync::sometimes;
use crate::stats::{CloseReason, ConnectionState};
use std::time::Duration;

/// How long a close counts among those that run side by side. A close takes a millisecond or two. One that takes longer
/// may hang, and must not delay the next by more than scheduling noise. (The executor runs one more close beside each
/// such one. So even if all hang, twice as many begin after every such pause.)
pub(super) const CLOSE_PATIENCE: Duration = Duration::from_millis(3);

impl<C, W: Clone> Ledger<C, W> {
    /// An open, check or reset starts to run: its limit counts from now. `None`: the job was an open that is no longer
    /// wanted, and its slot is free.
    pub(crate) fn begin(&mut self, now: Moment, token: Token, jitter: f64) -> Option<Token> {
        self.step(now, |l, now| {
            let index = token.index;
            debug_assert_eq!(l.slots[index as usize].id, token.id, "a job begins with the slot it was given");
            match l.slots[index as usize].state {
                State::Opening(job) => {
                    if l.closed || !l.wants_open(l.demand(now), Some(job.slow)) {
                        sometimes!("an open is no longer wanted when it begins");
                        l.release(index);
                        return None;
                    }
                    l.dial(index, now, jitter);
                }
                State::Checking(check, job) => {
                    l.restart_check(index);
                    l.start_limit(index, now.plus(l.limit_of(check)));
                    if !job.slow {
                        l.count_on(index, now.plus(CHECK_PATIENCE));
                    }
                }
                _ => unreachable!("no open, check or reset has this slot"),
            }
            Some(token)
        })
    }

    /// An open dials now.
    fn dial(&mut self, index: u32, now: Moment, jitter: f64) {
        self.last_dial = now;
        let dies = match self.rules.max_lifetime {
            None => Moment::NEVER,
            Some(whole) => {
                let off = whole.mul_f64(self.rules.lifetime_jitter.clamp(0.0, 1.0) * jitter.clamp(0.0, 1.0));
                now.plus(whole.saturating_sub(off))
            }
        };
        let generation = self.generation;
        let slot = &mut self.slots[index as usize];
        (slot.born, slot.proven, slot.dies, slot.generation) = (now, now, dies, generation);
        self.restart_open(index, now);
        self.start_limit(index, now.plus(self.rules.open_timeout));
        self.count_on(index, now.plus(self.open_patience()));
    }

    /// A close starts to run, within a limit of its own. It runs in a job of its own, or in the job whose open, check
    /// or reset failed.
    pub(crate) fn begin_close(&mut self, now: Moment, token: &Token) {
        self.step(now, |l, now| {
            if l.is_current(token) {
                l.close_begins(token.index, now);
            }
        });
    }

    fn close_begins(&mut self, index: u32, now: Moment) {
        match self.slots[index as usize].state {
            State::Closing(Close::Ordered { due }, _) => {
                if due != Moment::NEVER {
                    self.tally.evicted_late(now.since(due));
                }
                self.start_closing(index, now);
                self.count_on(index, now.plus(CLOSE_PATIENCE));
            }
            State::Closing(Close::Runs, _) => self.start_limit(index, now.plus(self.rules.close_timeout)),
            _ => {}
        }
    }

    /// A connection has arrived. `Err`: the open was abandoned before; the job is to close the connection, and to
    /// [`free`](Ledger::free) its token then. `Ok(false)`: the connection's life was over when it arrived.
    pub(crate) fn opened(&mut self, now: Moment, token: Token, conn: C) -> Result<bool, (Token, C)> {
        self.step(now, |l, now| {
            let index = token.index;
            if !l.is_current(&token) {
                sometimes!("an abandoned open comes late");
                return Err((token, conn));
            }
            let slot = &mut l.slots[index as usize];
            slot.unused_since = now;
            let (dies, born) = (slot.dies, slot.born);
            let took = now.since(born);
            l.tally.open_time.record(now.nanos_since(born));
            if l.is_expired(&l.slots[index as usize], now) {
                sometimes!("a connection arrives when its life is over");
                let error = OpenError { reach: Reach::Server, error_type: ErrorType::TOO_OLD };
                l.failed(now, born, FailedOpen::TooOld { took }, error, 0.5);
                // It is not counted as closed, since it was not counted as opened.
                l.order_close(index, conn, CloseReason::Lifetime, now, Moment::NEVER);
                return Ok(false);
            }
            // A single open moves the usual time by a quarter at most, since it says little of what is usual.
            l.usual_open = Some(l.usual_open.map_or(took, |usual| took.clamp(usual * 3 / 4, usual * 5 / 4)));
            if let Some(Failure { since, attempts, .. }) = l.failure.take() {
                l.effects.orders.push(Order::Recovered { after: now.since(since), attempts });
            }
            // (The run of failed checks ends even if this connection is suspect by now: the server answers.)
            l.check_failures = 0;
            l.tally.opens += 1;
            if dies != Moment::NEVER {
                l.lifetimes.insert((dies, index));
                l.arm(dies);
                if l.rules.min_idle > 0 {
                    l.arm(dies.minus(l.lead()));
                }
            }
            l.proven(index, born, now, conn);
            Ok(true)
        })
    }

    /// An open has failed, with a cause that the runtime noted before. The slot stays taken until
    /// [`free`](Ledger::free), since the job still has handlers to run.
    pub(crate) fn open_failed(&mut self, now: Moment, token: &Token, mut error: OpenError, jitter: f64) {
        self.step(now, |l, now| {
            let index = token.index;
            if !l.is_current(token) || l.slots[index as usize].as_seen() != ConnectionState::Opening {
                // The open was abandoned. Its cause says more than that it was.
                sometimes!("an abandoned open fails late");
                return l.reported_late();
            }
            let born = l.slots[index as usize].born;
            // A recycle forgets a refusal, also one that was under way: it may be of the old password.
            let is_old = l.slots[index as usize].generation < l.generation;
            if is_old && error.reach == Reach::Refusal {
                error.reach = Reach::Server;
            }
            l.start_closing(index, now);
            l.failed(now, born, FailedOpen::AsReported, error, jitter);
        });
    }

    /// The executor's check or reset has succeeded. `Err`: the job was abandoned before; it is to close the connection,
    /// and to free its token then.
    pub(crate) fn checked(&mut self, now: Moment, begun: Moment, token: Token, conn: C) -> Result<(), (Token, C)> {
        self.step(now, |l, now| {
            if !l.is_current(&token) || l.slots[token.index as usize].as_seen() != ConnectionState::Checking {
                sometimes!("an abandoned check comes late");
                return Err((token, conn));
            }
            l.proven(token.index, begun, now, conn);
            Ok(())
        })
    }

    /// The executor brings a connection that was well at `at`.
    fn proven(&mut self, index: u32, at: Moment, now: Moment, conn: C) {
        let fresh = self.proved(index, at);
        match self.unfit(index, now) {
            Some(reason) => self.close_connection(index, conn, reason, now),
            None => {
                // The wish of a caller that asked is met, unless the connection goes to a waiter.
                self.asked &= !fresh || self.front.is_some();
                self.supply(index, conn, now, fresh);
            }
        }
    }

    /// A check or reset has failed, the executor's or a caller's own. The slot stays taken until
    /// [`free`](Ledger::free). A failed check makes the siblings suspect; a failed reset says nothing of them.
    pub(crate) fn check_failed(&mut self, now: Moment, token: &Token, reason: CloseReason) {
        self.step(now, |l, now| {
            let index = token.index;
            let State::Checking(check, _) = l.slots[index as usize].state else { return };
            if !l.is_current(token) {
                return;
            }
            if let Check::Own(_) = check {
                // The connection is closed by a job that is yet to begin.
                l.await_close(index, now, Moment::NEVER);
            } else {
                l.start_closing(index, now);
            }
            l.tally.closed(reason);
            if reason == CloseReason::Invalid {
                l.suspect_after_check();
            }
        });
    }

    /// A job has ended, and its connection is closed: the slot is free.
    pub(crate) fn free(&mut self, now: Moment, token: Token) {
        self.step(now, |l, _| {
            if !l.is_current(&token) {
                sometimes!("an abandoned job is over");
                return l.came_back();
            }
            // An open or a check ends without a report if it panicked outside of the shield, or never ran.
            debug_assert!(
                !matches!(l.slots[token.index as usize].as_seen(), ConnectionState::Idle | ConnectionState::InUse),
                "freed while idle or in use"
            );
            l.release(token.index);
        });
    }
}
