//! What falls due with time: [`reap`](Ledger::reap) closes connections that were idle for too long or are too old, has
//! idle connections kept alive, reports leaks and abandons jobs past their limits.

use std::time::Duration;

use super::Ledger;
use super::demand::FailedOpen;
use super::slots::{Check, State};
use super::values::{Order, SlotJob};
use crate::leaf::clock::Moment;
use crate::leaf::sync::sometimes;
use crate::stats::{CloseReason, ConnectionState};

/// How long before the end of its life a floor connection is replaced: a twentieth of its life, at most this. An open
/// rarely takes longer.
const MAX_REPLACEMENT_LEAD: Duration = Duration::from_secs(5);

impl<C, W: Clone> Ledger<C, W> {
    /// Does what is due, and sets the next alarm.
    pub(crate) fn reap(&mut self, now: Moment, jitter: f64) {
        let now = self.tick(now);
        self.alarm = Moment::NEVER;
        // Floor connections near their end are marked first, so that their replacements are ordered before they are
        // closed.
        self.mark_expiring_soon(now);
        self.plan(now);
        while let Some(&(dies, index)) = self.lifetimes.first() {
            if dies > now {
                break;
            }
            self.lifetimes.pop_first();
            if self.slots[index as usize].as_seen() == ConnectionState::Idle {
                let conn = self.remove_idle(index);
                sometimes!("a life is over");
                self.close_due(index, conn, CloseReason::Lifetime, now, dies);
            }
        }
        self.evict_idle(now);
        while let Some(&(limit, index)) = self.limits.first() {
            if limit > now {
                break;
            }
            self.abandon(index, now, jitter);
        }
        self.keep_alive(now);
        self.report_leaks(now);
        self.plan(now);
        self.alarm = self.alarm.min(self.next_deadline());
        // The reaper itself calls this, and is going to sleep until the alarm just set.
        self.effects.wake_reaper = false;
    }

    /// When `reap` will next have something to do, apart from the alarms of the plan.
    fn next_deadline(&self) -> Moment {
        let mut next = self.idle_deadline();
        if let Some(&(dies, _)) = self.lifetimes.first() {
            next = next.min(dies);
        }
        if self.settings.min_idle > 0 {
            if let Some(&(dies, _)) =
                self.lifetimes.range((self.marked_until, 0)..).find(|&&(dies, _)| dies > self.marked_until)
            {
                next = next.min(dies.minus(self.lead()));
            }
        }
        if let Some(&(limit, _)) = self.limits.first() {
            next = next.min(limit);
        }
        next.min(self.keepalive_due().0).min(self.leak_due())
    }

    // ---------------------------------------------------------------------------------------------- idle

    /// Evicts all connections that were idle for too long, at once. The `min_idle` at the bottom of the stack stay. But
    /// of those the connections that expire soon go first: their replacements are further up, and would be evicted and
    /// opened anew until the end of such a life.
    pub(super) fn evict_idle(&mut self, now: Moment) {
        let Some(max) = self.settings.max_idle else { return };
        if self.idle_deadline() > now {
            return;
        }
        let floor = self.settings.min_idle as usize;
        let end = self.idle.partition_point(|&(index, _)| self.slots[index as usize].since.plus(max) <= now);
        // Each place above the floor falls due, whichever connection goes for it.
        let slot = |&(index, _): &(u32, C)| &self.slots[index as usize];
        let due: Vec<Moment> = self.idle[floor..end].iter().map(|at| slot(at).since.plus(max)).collect();
        let expiring = (0..floor).filter(|&at| slot(&self.idle[at]).expires_soon());
        let expiring: Vec<usize> = expiring.take(due.len()).collect();
        sometimes!(!expiring.is_empty(), "one of the floor goes for its replacement");
        let mut evicted = self.drain_idle(floor + expiring.len(), end);
        evicted.extend(expiring.into_iter().rev().map(|at| self.idle.remove(at)));
        for ((index, conn), due) in evicted.into_iter().zip(due) {
            self.close_due(index, conn, CloseReason::Idle, now, due.max(self.stack_changed_at));
        }
    }

    // ---------------------------------------------------------------------------------------------- lifetime

    /// How long before the end of its life a floor connection is replaced.
    pub(super) fn lead(&self) -> Duration {
        self.settings.max_lifetime.map_or(Duration::ZERO, |whole| (whole / 20).min(MAX_REPLACEMENT_LEAD))
    }

    /// Marks the idle connections that end within the replacement lead.
    fn mark_expiring_soon(&mut self, now: Moment) {
        if self.settings.min_idle == 0 {
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
    fn keepalive_due(&self) -> (Moment, u32) {
        let never = (Moment::NEVER, 0);
        match self.settings.keepalive {
            Some(period) if self.keepalive.is_none() && !self.closed => {
                // Among equals the lowest in the stack is the first.
                let due = |&(index, _): &(u32, C)| {
                    let slot = &self.slots[index as usize];
                    (slot.since.max(slot.proven).plus(period), index)
                };
                self.idle.iter().map(due).min_by_key(|&(at, _)| at).unwrap_or(never)
            }
            _ => never,
        }
    }

    fn keep_alive(&mut self, now: Moment) {
        let (due, index) = self.keepalive_due();
        if due <= now && due != Moment::NEVER {
            let conn = self.remove_idle(index);
            self.start_check(index, now, Check::Executor);
            let token = self.token(index);
            sometimes!("a connection is kept alive");
            self.keepalive = Some(token.id);
            self.effects.orders.push(Order::Job(SlotJob::Check(token, conn)));
        }
    }

    // ---------------------------------------------------------------------------------------------- leaks

    /// When the next checkout will have lasted too long.
    fn leak_due(&self) -> Moment {
        let Some(threshold) = self.settings.leak_threshold else { return Moment::NEVER };
        let in_use = self.slots.iter().filter(|slot| matches!(slot.state, State::InUse { warned: false, .. }));
        in_use.map(|slot| slot.since.plus(threshold)).min().unwrap_or(Moment::NEVER)
    }

    fn report_leaks(&mut self, now: Moment) {
        let Some(threshold) = self.settings.leak_threshold else { return };
        for index in 0..self.slots.len() as u32 {
            let slot = &self.slots[index as usize];
            if matches!(slot.state, State::InUse { warned: false, .. }) && slot.since.plus(threshold) <= now {
                let leak = Order::Leak { id: slot.id, caller: slot.caller(), in_use_for: now.since(slot.since) };
                self.effects.orders.push(leak);
                self.tally.leaks += 1;
                sometimes!("a leak is reported");
                self.set_warned(index);
            }
        }
    }

    // ---------------------------------------------------------------------------------------------- limits

    /// How long a check or reset may take.
    pub(super) fn limit_of(&self, check: Check) -> Duration {
        match check {
            Check::Own(_) | Check::Executor => self.settings.validation_timeout,
            Check::Reset => self.settings.close_timeout,
        }
    }

    /// Whether one more slot can be freed although its connection may be alive. It cannot if `max_size` jobs are
    /// abandoned already, or may yet be.
    pub(super) fn may_abandon(&self) -> bool {
        self.abandoned + self.counted.opens() < self.settings.max_size
    }

    /// Abandons a job past its limit. The slot of an open is always freed, since the bound of abandoned jobs limits the
    /// dials that follow. The slot of another job is freed if the pool [may abandon](Ledger::may_abandon) one more.
    pub(super) fn abandon(&mut self, index: u32, now: Moment, jitter: f64) {
        let slot = &self.slots[index as usize];
        let (id, was, state, born) = (slot.id, slot.as_seen(), slot.state, slot.born);
        self.tally.abandonments += 1;
        let limit = match state {
            State::Opening(_) => {
                self.tally.failed_opens += 1;
                sometimes!("an open is abandoned");
                self.failed(now, born, FailedOpen::NoAnswer, false, jitter);
                self.settings.open_timeout
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
            State::Closing(..) => now.since(slot.since).min(self.settings.close_timeout),
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
