//! Demand: which connections are checked and opened, and when. [`plan`](Ledger::plan) decides it at the end of a step.

use std::time::Duration;

use super::Ledger;
use super::slots::{Check, State};
use super::values::{OpenError, Order, Outcome, Reach, SlotJob};
use crate::leaf::clock::Moment;
use crate::leaf::sync::sometimes;

/// The shortest pause after a failed open, and the first of those that double.
pub(super) const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// The longest pause between opens while a caller waits, after one that may have reached a login.
const BACKOFF_WAITED_FOR: Duration = Duration::from_secs(1);
/// The same while nobody listens: such an attempt costs the server nothing, and the first one that does not fail ends the
/// outage for all who wait.
const BACKOFF_NOBODY: Duration = Duration::from_millis(200);
/// The longest pause between opens while no caller waits.
const BACKOFF_LONGEST: Duration = Duration::from_secs(30);
/// The first pause after a permanent refusal. Nobody repairs a password in milliseconds, and a server may lock an
/// account after many failed logins.
const BACKOFF_REFUSED: Duration = Duration::from_secs(5);
/// The greatest part of a pause that jitter takes off, so that many pools do not dial in step.
const BACKOFF_JITTER: f64 = 0.2;

/// How long waiters count on an open: this many times the usual time to open...
const OPEN_PATIENCE: u32 = 3;
/// ... but at least so long, since more dials do not help a busy server...
const OPEN_PATIENCE_LEAST: Duration = Duration::from_millis(250);
/// ... and so long while no open has succeeded, so that the usual time is not known.
const OPEN_PATIENCE_FIRST: Duration = Duration::from_secs(1);
/// If a caller waits for the place of a connection that `recycle` replaced, its close may take a tenth of
/// `close_timeout`. The server that it leads to may be the one that failed.
const REPLACED_PATIENCE: u32 = 10;

/// How many more connections are checked than are wanted, at most, however many checks have failed: no more run at
/// once.
const MOST_AHEAD: u32 = 1024;

/// Protects a server that answers no dial: the least time between two dials while more than `max_size` jobs are
/// abandoned, or exactly `max_size` and the last open failed.
pub(super) const PROBE_PERIOD: Duration = Duration::from_secs(60);

/// A run of failed opens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    /// How many of them got as far as the last one.
    count: u32,
    /// How many of them got to the server, or to nobody: the other of the two.
    other: u32,
    pub(super) last: Moment,
    pub(super) reach: Reach,
    /// The server is not dialled before this moment.
    pub(super) retry: Moment,
    /// When the first open of the run failed, and how many have failed since, this one included.
    pub(super) since: Moment,
    pub(super) attempts: u64,
}

/// Why the last open failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailedOpen {
    /// The open came back with a cause, which the runtime noted before it told the ledger.
    AsReported,
    /// The open was abandoned at its limit.
    NoAnswer,
    /// The open took so long that the connection's life was over when it arrived.
    TooOld { took: Duration },
}

impl<C, W: Clone> Ledger<C, W> {
    /// Why the last open failed, if opens fail at present.
    pub(crate) fn failing(&self) -> Option<FailedOpen> {
        self.failure.and(self.last_failed).map(|(_, why)| why)
    }

    /// An open that was abandoned has come back with a cause, which says more than that it was abandoned.
    pub(super) fn reported_late(&mut self) {
        if let (Some(_), Some((_, why))) = (self.failure, &mut self.last_failed) {
            *why = FailedOpen::AsReported;
        }
    }

    /// Whether the server has refused for good, as far as is known.
    pub(crate) fn is_refusing(&self) -> bool {
        self.failure.is_some_and(|failure| failure.reach == Reach::Refusal)
    }

    // ---------------------------------------------------------------------------------------------- the plan

    /// Orders the checks and opens that the waiters and the floor need, as far as the rules allow at this moment. Sets
    /// the alarm for the moment when the rules will allow more.
    pub(super) fn plan(&mut self, now: Moment) {
        self.dirty = false;
        self.stop_counting_on(now);
        if !self.closed {
            if self.front.is_some() && self.is_refused(now) {
                sometimes!("all waiters are told of a refusal");
                self.dismiss_queue(now, || Outcome::Refused);
            }
            let demand = self.plan_checks(now);
            self.plan_opens(now, demand);
            if demand > 0 || self.watchers > 0 {
                self.arm_for_patience();
            }
        }
        if self.counted.ordered_closes() > 0 {
            self.arm_for_patience();
        }
    }

    /// Notifies the waiters for which a connection is ready. For the others it has the idle connections checked that
    /// need a check. Returns how many connections are then wanted beside those that are ready.
    fn plan_checks(&mut self, now: Moment) -> u32 {
        let mut ready = 0;
        loop {
            ready = self.ready_from(ready, now);
            self.notify(ready);
            self.asked &= ready == 0;
            let demand = self.demand_beside(ready);
            // After a failed check more connections are checked than are wanted, twice as many after each further
            // failure.
            let ahead = if self.check_failures == 0 {
                0
            } else {
                1u32.checked_shl(self.check_failures - 1).unwrap_or(u32::MAX).min(MOST_AHEAD)
            };
            sometimes!(ahead > 0 && demand > 0, "more is checked than is wanted, after a failed check");
            let enough = self.counted.quick_checks() >= demand.saturating_add(ahead);
            if demand == 0 || enough || !self.start_next_check(ready, now) {
                return demand;
            }
        }
    }

    /// Orders opens, as long as another open is wanted and may be dialled.
    fn plan_opens(&mut self, now: Moment, demand: u32) {
        while self.wants_open(demand, None) {
            let at = self.dial_at(now);
            if at <= now {
                self.order_open(now);
            } else if demand == 0 || !self.make_room(now) {
                sometimes!("a dial has to wait");
                return self.arm(at);
            }
        }
    }

    /// Whether another open is wanted for this demand. The waiters count on every check and open that does not take
    /// longer than usual. The floor counts on the idle connections that last, and on all under way that no waiter
    /// needs. This is the one rule for refill and for replacement. `beside`: the open that asks is not counted; whether
    /// it is slow.
    pub(super) fn wants_open(&self, demand: u32, beside: Option<bool>) -> bool {
        let mut quick = self.counted.quick_opens();
        let mut slow = self.counted.slow_opens();
        match beside {
            Some(true) => slow -= 1,
            Some(false) => quick -= 1,
            None => {}
        }
        // The first slow open is not counted on, and every further one is. So one more open is dialled beside an open
        // that hangs, and not one after another: more dials do not help such a server, and opens that hang take slots.
        let counted_on = quick + slow.saturating_sub(1) + self.counted.quick_checks();
        // After a failed check an open is always under way beside the further checks: six dead connections cost one
        // connect, not six timeouts in a row.
        let checks_fail = self.check_failures > 0 && quick + slow == 0;
        sometimes!(checks_fail && demand > 0, "an open goes beside the checks that fail");
        let users = demand > 0 && (checks_fail || counted_on < demand);
        // (While `build` waits for the floor, one more open is dialled beside an open that hangs for the floor as
        // well.)
        let slow = slow.saturating_sub(u32::from(self.watchers > 0));
        let coming = quick + slow + self.counted.checks();
        users || self.counted.lasting() + coming.saturating_sub(demand) < self.rules.min_idle
    }

    /// How many connections are wanted beside those that are ready: one for each waiter, and one for a caller that
    /// asked.
    pub(super) fn demand(&self, now: Moment) -> u32 {
        self.demand_beside(self.ready(now))
    }

    fn demand_beside(&self, ready: usize) -> u32 {
        self.waiting() - self.queue.notified().min(ready) as u32 + u32::from(self.asked && ready == 0)
    }

    /// Has the executor check the idle connection that would be handed out after those that are `ready`. `false`: there
    /// is no such connection.
    fn start_next_check(&mut self, ready: usize, now: Moment) -> bool {
        let Some((index, _)) = self.next_idle(ready, now) else { return false };
        let (_, conn) = self.idle.remove(self.idle.len() - 1 - ready);
        let token = self.token(index);
        self.start_check(index, now, Check::Executor);
        self.effects.orders.push(Order::Job(SlotJob::Check(token, conn)));
        true
    }

    fn order_open(&mut self, now: Moment) {
        let token = self.occupy(now);
        self.count_on(token.index, now.plus(self.open_patience()));
        self.effects.orders.push(Order::Job(SlotJob::Open(token)));
    }

    /// Stops counting on the jobs that take longer than usual.
    fn stop_counting_on(&mut self, now: Moment) {
        while let Some(&(until, index)) = self.patience.first() {
            if until > now {
                return;
            }
            self.end_patience(index);
            self.set_slow(index);
            sometimes!("a job is no longer counted on");
            let slot = &self.slots[index as usize];
            if let State::Closing(..) = slot.state {
                let id = slot.id;
                self.effects.orders.push(Order::Slow { id });
            }
        }
    }

    /// A thread, in `build` or `close`, wants to know of changes from now on. It waits for opens and checks as a caller does, so
    /// those that take longer than usual are noticed, those under way as well.
    pub(crate) fn watch_begins(&mut self) {
        self.watchers += 1;
        self.arm_for_patience();
    }

    pub(crate) fn watch_ends(&mut self) {
        self.watchers -= 1;
    }

    fn arm_for_patience(&mut self) {
        if let Some(&(until, _)) = self.patience.first() {
            self.arm(until);
        }
    }

    /// How long an open is counted on.
    pub(super) fn open_patience(&self) -> Duration {
        match self.usual_open {
            Some(usual) => usual.saturating_mul(OPEN_PATIENCE).max(OPEN_PATIENCE_LEAST),
            None => OPEN_PATIENCE_FIRST,
        }
    }

    // ---------------------------------------------------------------------------------------------- callers that do
    // not wait

    /// Asks for one connection to be made ready, for a caller that does not wait for it.
    pub(crate) fn prepare(&mut self, now: Moment) {
        self.step(now, |l, now| {
            if !l.closed {
                l.note_starved(now);
                l.shorten_back_off(now);
                l.ask();
            }
        });
    }

    /// A probe has found that opens fail and that nobody wants a connection. One is dialled, a second after the last failed, so
    /// that however often it is probed a server is not dialled more often than for a waiter.
    pub(crate) fn probe(&mut self, now: Moment) {
        self.step(now, |l, now| {
            if let Some(failure) = l.failure.as_mut().filter(|failure| failure.reach != Reach::Refusal) {
                failure.retry = failure.retry.min(now.max(failure.last.plus(BACKOFF_WAITED_FOR)));
            }
            if !l.closed {
                l.ask();
            }
        });
    }

    /// A [hurried](Ledger::join) caller has left. What was ordered for it is to serve the next one. `even_now`: the
    /// caller may have left before anything was ordered, so it is ordered now.
    pub(crate) fn prepare_for_the_next(&mut self, now: Moment, even_now: bool) {
        self.step(now, |l, now| {
            if !l.closed {
                l.note_asked(now);
                if even_now {
                    l.shorten_back_off(now);
                    l.ask();
                }
            }
        });
    }

    /// One connection is to be made ready. The wish ends when a connection is ready. It also ends when an open fails,
    /// since no caller waits for another attempt.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// A caller that does not wait has found nothing. The checks and opens under way that are counted on will serve the
    /// next such caller, so it counts as having asked when the oldest of them began.
    pub(super) fn note_asked(&mut self, now: Moment) {
        self.asked_at = self.under_way.first().map_or(now, |&(since, _)| since);
    }

    // ---------------------------------------------------------------------------------------------- dialling

    /// The earliest moment at which another connection may be dialled as things stand. `NEVER`: only an event can make
    /// room.
    pub(super) fn dial_at(&self, now: Moment) -> Moment {
        if self.counted.total() >= self.rules.max_size { Moment::NEVER } else { self.dial_with_room_at(now) }
    }

    /// The earliest moment at which another connection could be dialled if there were room.
    fn dial_with_room_at(&self, now: Moment) -> Moment {
        let opening = self.counted.opens();
        // One open that takes longer than usual does not count, so that an open that hangs does not stop all others.
        let hangs = u32::from(self.counted.slow_opens() > 0);
        if self.closed || opening >= self.rules.parallel_opens.saturating_add(hangs) {
            return Moment::NEVER;
        }
        let mut at = now;
        if let Some(failure) = &self.failure {
            // While opens fail, one at a time is enough to learn when they no longer do. One more may run beside an
            // open that hangs.
            if self.counted.quick_opens() > 0 || opening > 1 {
                return Moment::NEVER;
            }
            at = at.max(failure.retry);
            sometimes!(failure.retry > now, "a dial is put off by a back-off");
        }
        if self.abandoned + opening >= self.rules.max_size {
            if opening > 0 {
                return Moment::NEVER;
            }
            // At the bound the next open may be dialled at once if the last came through: then connects do not hang.
            if self.failure.is_some() || self.abandoned > self.rules.max_size {
                at = at.max(self.last_dial.plus(PROBE_PERIOD));
                sometimes!("with so many abandoned one is dialled per minute");
            }
        }
        at
    }

    /// Makes room for an open, if room is all it lacks: frees the slot of a stuck job, or abandons a close that takes
    /// long, of a connection that `recycle` replaced.
    fn make_room(&mut self, now: Moment) -> bool {
        let full = self.counted.total() >= self.rules.max_size && self.counted.begun_closes() > 0;
        if !full || !self.may_abandon() || self.dial_with_room_at(now) > now {
            return false;
        }
        // With one more job abandoned, the bound of abandoned jobs must still allow a dial, or the room would be of no
        // use. (If the last open failed, its back-off is over: that was asked above.)
        if self.abandoned + self.counted.opens() + 1 >= self.rules.max_size
            && (self.counted.opens() > 0 || self.failure.is_some())
        {
            return false;
        }
        if let Some(&stuck) = self.stuck.first() {
            // The slot could not be freed at the job's limit, and can be now.
            sometimes!("the slot of a stuck job makes room");
            self.release_abandoned(stuck);
            return true;
        }
        let oldest = self.replaced.first();
        match oldest.map(|&(since, index)| (index, since.plus(self.rules.close_timeout / REPLACED_PATIENCE))) {
            Some((index, until)) if until <= now => {
                sometimes!("a replaced connection whose close takes long makes room");
                self.abandon(index, now, 0.5);
                true
            }
            Some((_, until)) => {
                self.arm(until);
                false
            }
            None => false,
        }
    }

    // ---------------------------------------------------------------------------------------------- failed opens

    /// Whether it is useless to wait: the server refuses for good, and no connection is alive that could be returned.
    pub(super) fn is_refused(&self, now: Moment) -> bool {
        let refused = self.failure.is_some_and(|failure| failure.reach == Reach::Refusal && now < failure.retry);
        refused && self.counted.alive() == 0
    }

    /// Counts and notes a failed open, and when to try again: after 50 ms, and twice as long after each further one that
    /// got as far, up to 200 ms while nobody listens and 1 s otherwise (30 s while no caller waits); after a refusal 5 s
    /// to 30 s.
    pub(super) fn failed(&mut self, now: Moment, begun: Moment, why: FailedOpen, error: OpenError, jitter: f64) {
        let OpenError { reach, error_type } = error;
        self.tally.failed_opens.count(error_type);
        // A refusal begins a run of its own, and so does what follows it. Otherwise a server that is sometimes there is
        // not logged in to more often for the attempts at which it was not, nor less often.
        let (before, other) = match self.failure {
            // The open was dialled before the last one failed: its failure says nothing new.
            Some(f) if f.reach == reach && begun < f.last => (f.count - 1, f.other),
            Some(f) if f.reach == reach => (f.count, f.other),
            Some(f) if f.reach != Reach::Refusal && reach != Reach::Refusal => (f.other, f.count),
            _ => (0, 0),
        };
        let count = before.saturating_add(1);
        // (`build` waits too, though not in the queue.)
        let waited_for = self.front.is_some() || self.watchers > 0;
        let (first, longest) = match reach {
            Reach::Refusal => (BACKOFF_REFUSED, BACKOFF_LONGEST),
            _ if !waited_for => (BACKOFF_FIRST, BACKOFF_LONGEST),
            Reach::Server => (BACKOFF_FIRST, BACKOFF_WAITED_FOR),
            Reach::Nobody => (BACKOFF_FIRST, BACKOFF_NOBODY),
        };
        let whole = first.saturating_mul(1u32.checked_shl(count - 1).unwrap_or(u32::MAX)).min(longest);
        let retry = now.plus(whole.mul_f64(1.0 - BACKOFF_JITTER * jitter.clamp(0.0, 1.0)).max(first));
        let (since, attempts) = self.failure.map_or((now, 0), |before| (before.since, before.attempts));
        self.failure = Some(Failure { count, other, last: now, reach, retry, since, attempts: attempts + 1 });
        self.last_failed = Some((now, why));
        self.asked = false;
        self.effects.changed |= self.watchers > 0;
    }

    /// The first waiter does not sit out a back-off that began when no caller waited, unless the refusal was permanent.
    pub(super) fn shorten_back_off(&mut self, now: Moment) {
        if let Some(failure) = &mut self.failure {
            if failure.reach != Reach::Refusal {
                sometimes!(
                    failure.retry > now.max(failure.last.plus(BACKOFF_FIRST)),
                    "the first waiter shortens a back-off"
                );
                failure.retry = failure.retry.min(now.max(failure.last.plus(BACKOFF_FIRST)));
            }
        }
    }
}
