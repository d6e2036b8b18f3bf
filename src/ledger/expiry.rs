//! What falls due with time: [`reap`](Ledger::reap) closes connections that were idle for too long or are too old, has
//! idle connections kept alive, reports leaks and abandons jobs past their limits.

use std::ops::Bound;
use std::time::Duration;

use super::Ledger;
use super::demand::FailedOpen;
use super::slots::{Check, State};
use super::values::{OpenError, Order, Reach, SlotJob};
use crate::leaf::clock::Moment;
use crate::leaf::failures::ErrorType;
use crate::leaf::sync::sometimes;
use crate::stats::{CloseReason, ConnectionState};

/// How long before the end of its life a floor connection is replaced: a twentieth of its life, at most this. An open
/// rarely takes longer.
const MAX_REPLACEMENT_LEAD: Duration = Duration::from_secs(5);

/// How many connections one look of the reaper closes, or reports as leaks, at least, if more are due. The rest comes at
/// the next look, which follows at once. So no caller waits for the lock for much longer than a tenth of a millisecond.
pub(super) const LEAST_BATCH: usize = 256;
/// In a stack of many connections one look closes this part of them, since each look moves those that stay: so all looks
/// together move each connection 32 times at most, and not once for every 256 that are closed.
const BATCH_PART: usize = 32;

impl<C, W: Clone> Ledger<C, W> {
    /// Does what is due, and sets the next alarm.
    pub(crate) fn reap(&mut self, now: Moment, jitter: f64) {
        let now = self.tick(now);
        self.alarm = Moment::NEVER;
        // Floor connections near their end are marked first, so that their replacements are ordered before they are
        // closed.
        self.mark_expiring_soon(now);
        self.plan(now);
        self.expire_idle(now);
        self.evict_idle(now);
        while let Some(&(limit, index)) = self.limits.first() {
            if limit > now {
                break;
            }
            self.abandon(index, now, jitter);
        }
        let mut looks = self.least_batch;
        self.keep_alive(now, &mut looks);
        self.report_leaks(now, &mut looks);
        self.plan(now);
        self.alarm = self.alarm.min(self.next_deadline(&mut looks));
        // The reaper itself calls this, and is going to sleep until the alarm just set.
        self.effects.wake_reaper = false;
    }

    /// How many connections one step closes at most because they are due. If there are more, the next deadline is over,
    /// and the reaper looks again at once. Meanwhile no expired connection is handed out: `next_idle` sees to that.
    pub(super) fn batch(&self) -> usize {
        self.least_batch.max(self.idle.len() / BATCH_PART)
    }

    /// When `reap` will next have something to do, apart from the alarms of the plan. `looks`: as for
    /// [`Earliest::first`](super::earliest::Earliest::first).
    fn next_deadline(&mut self, looks: &mut usize) -> Moment {
        let mut next = self.idle_deadline();
        if let Some(&(dies, _)) = self.lifetimes.first() {
            next = next.min(dies);
        }
        if self.rules.min_idle > 0 {
            let after = (Bound::Excluded((self.marked_until, u32::MAX)), Bound::Unbounded);
            if let Some(&(dies, _)) = self.lifetimes.range(after).next() {
                next = next.min(dies.minus(self.lead()));
            }
        }
        if let Some(&(limit, _)) = self.limits.first() {
            next = next.min(limit);
        }
        next.min(self.keepalive_due(looks).0).min(self.leak_due(looks).0)
    }

    // ---------------------------------------------------------------------------------------------- idle

    /// Evicts the connections that were idle for too long, at once. The `min_idle` at the bottom of the stack stay. But
    /// of those the connections that expire soon go first: their replacements are further up, and would be evicted and
    /// opened anew until the end of such a life.
    pub(super) fn evict_idle(&mut self, now: Moment) {
        if self.idle_deadline() > now {
            return;
        }
        let floor = self.rules.min_idle as usize;
        let end = self
            .idle
            .partition_point(|&(index, _)| self.slots[index as usize].since.plus_nanos(self.rules.max_idle()) <= now);
        let end = end.min(floor.saturating_add(self.batch()));
        // Each place above the floor falls due, whichever connection goes for it.
        let slot = |&(index, _): &(u32, C)| &self.slots[index as usize];
        let due: Vec<Moment> =
            self.idle[floor..end].iter().map(|at| slot(at).since.plus_nanos(self.rules.max_idle())).collect();
        // (As a rule none expires soon, and the floor is not looked through.)
        let expiring = due.len().min(self.counted.expiring_soon() as usize);
        let expiring = self.idle[..floor].iter().filter(|at| slot(at).expires_soon()).take(expiring);
        let expiring: Vec<u32> = expiring.map(|&(index, _)| index).collect();
        let mut evicted = self.drain_idle(floor + expiring.len(), end);
        if !expiring.is_empty() {
            sometimes!("one of the floor goes for its replacement");
            evicted.extend(self.remove_all_idle(&expiring));
        }
        for ((index, conn), due) in evicted.into_iter().zip(due) {
            self.close_due(index, conn, CloseReason::Idle, now, due.max(self.stack_changed_at));
        }
    }

    // ---------------------------------------------------------------------------------------------- lifetime

    /// How long before the end of its life a floor connection is replaced.
    pub(super) fn lead(&self) -> Duration {
        self.rules.max_lifetime.map_or(Duration::ZERO, |whole| (whole / 20).min(MAX_REPLACEMENT_LEAD))
    }

    /// Closes idle connections whose life is over.
    fn expire_idle(&mut self, now: Moment) {
        let mut expired = Vec::new();
        for _ in 0..self.batch() {
            let Some(&(_, index)) = self.lifetimes.first().filter(|&&(dies, _)| dies <= now) else { break };
            self.lifetimes.pop_first();
            if self.slots[index as usize].as_seen() == ConnectionState::Idle {
                expired.push(index);
            }
        }
        if expired.is_empty() {
            return;
        }
        for (index, conn) in self.remove_all_idle(&expired) {
            sometimes!("a life is over");
            let dies = self.slots[index as usize].dies;
            self.close_due(index, conn, CloseReason::Lifetime, now, dies);
        }
    }

    /// Marks the idle connections that end within the replacement lead.
    fn mark_expiring_soon(&mut self, now: Moment) {
        if self.rules.min_idle == 0 {
            return;
        }
        let until = now.plus(self.lead());
        let due: Vec<u32> =
            self.lifetimes.range((self.marked_until, 0)..=(until, u32::MAX)).map(|&(_, index)| index).collect();
        for index in due {
            if self.slots[index as usize].as_seen() == ConnectionState::Idle {
                sometimes!("one of the floor expires soon");
                self.set_expiring_soon(index);
            }
        }
        self.marked_until = self.marked_until.max(until);
    }

    // ---------------------------------------------------------------------------------------------- keepalive

    /// The idle connection whose keepalive is due first, and when. `NEVER` while a keepalive check runs: they run one
    /// at a time.
    fn keepalive_due(&mut self, looks: &mut usize) -> (Moment, Option<u32>) {
        match self.rules.keepalive {
            Some(period) if self.keepalive.is_none() && !self.closed => {
                let slots = &self.slots;
                let (since, index) = self.unproven_since.first(looks, |index| {
                    let slot = &slots[index as usize];
                    matches!(slot.state, State::Idle { .. }).then(|| slot.unproven_since())
                });
                (since.plus(period), index)
            }
            _ => (Moment::NEVER, None),
        }
    }

    fn keep_alive(&mut self, now: Moment, looks: &mut usize) {
        if let (due, Some(index)) = self.keepalive_due(looks) {
            if due > now {
                return;
            }
            let conn = self.remove_idle(index);
            self.start_check(index, now, Check::Executor);
            let token = self.token(index);
            sometimes!("a connection is kept alive");
            self.keepalive = Some(token.id);
            self.effects.orders.push(Order::Job(SlotJob::Check(token, conn)));
        }
    }

    // ---------------------------------------------------------------------------------------------- leaks

    /// When the next checkout will have lasted too long, and its slot.
    fn leak_due(&mut self, looks: &mut usize) -> (Moment, Option<u32>) {
        let Some(threshold) = self.rules.leak_threshold else { return (Moment::NEVER, None) };
        let slots = &self.slots;
        let (since, index) = self.in_use_since.first(looks, |index| {
            let slot = &slots[index as usize];
            matches!(slot.state, State::InUse { warned: false, .. }).then_some(slot.since)
        });
        (since.plus(threshold), index)
    }

    fn report_leaks(&mut self, now: Moment, looks: &mut usize) {
        while let (due, Some(index)) = self.leak_due(looks) {
            // (Each that was reported costs a look at the next: so there is an end to them.)
            if due > now {
                return;
            }
            let slot = &self.slots[index as usize];
            let leak = Order::Leak { id: slot.id, caller: slot.caller(), in_use_for: now.since(slot.since) };
            self.effects.orders.push(leak);
            self.tally.leaks += 1;
            sometimes!("a leak is reported");
            self.set_warned(index);
        }
    }

    // ---------------------------------------------------------------------------------------------- limits

    /// How long a check or reset may take.
    pub(super) fn limit_of(&self, check: Check) -> Duration {
        match check {
            Check::Own(_) | Check::Executor => self.rules.validation_timeout,
            Check::Reset => self.rules.close_timeout,
        }
    }

    /// Whether one more slot can be freed although its connection may be alive. It cannot if `max_size` jobs are
    /// abandoned already, or may yet be.
    pub(super) fn may_abandon(&self) -> bool {
        self.abandoned + self.counted.opens() < self.rules.max_size
    }

    /// Abandons a job past its limit. The slot of an open is always freed, since the bound of abandoned jobs limits the
    /// dials that follow. The slot of another job is freed if the pool [may abandon](Ledger::may_abandon) one more.
    pub(super) fn abandon(&mut self, index: u32, now: Moment, jitter: f64) {
        let slot = &self.slots[index as usize];
        let (id, was, state, born) = (slot.id, slot.as_seen(), slot.state, slot.born);
        self.tally.abandonments += 1;
        let limit = match state {
            State::Opening(_) => {
                sometimes!("an open is abandoned");
                let error = OpenError { reach: Reach::Server, error_type: ErrorType::TIMEOUT };
                self.failed(now, born, FailedOpen::NoAnswer, error, jitter);
                self.rules.open_timeout
            }
            State::Checking(check, _) => {
                self.tally.closed(CloseReason::Abandoned);
                if check != Check::Reset {
                    sometimes!("a check is abandoned");
                    self.suspect_after_check();
                }
                self.limit_of(check)
            }
            // (A close may be abandoned before its limit, to make room.)
            State::Closing(..) => now.since(slot.since).min(self.rules.close_timeout),
            State::Free | State::Idle { .. } | State::InUse { .. } => unreachable!("only jobs have limits"),
        };
        let cancel = matches!(state, State::Checking(Check::Reset, _) | State::Closing(..));
        self.effects.orders.push(Order::Abandon { id, was, limit, cancel });
        if was == ConnectionState::Opening || self.may_abandon() {
            self.release_abandoned(index);
        } else {
            sometimes!("a job is stuck: no more may be abandoned");
            self.set_stuck(index, now);
        }
    }

    /// The grace of a close is over: opens that still hang have no limit any longer. They were aborted by now, and no
    /// other open takes their place, so their limit would change nothing.
    pub(crate) fn abandon_opens(&mut self, now: Moment) {
        self.tick(now);
        let opens =
            self.limits.iter().filter(|&&(_, index)| self.slots[index as usize].as_seen() == ConnectionState::Opening);
        for index in opens.map(|&(_, index)| index).collect::<Vec<_>>() {
            self.end_limit(index);
        }
        self.note_if_over();
    }
}
