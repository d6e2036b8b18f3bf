//! Checkout and return: which connection a caller may take from the idle stack, what becomes of a connection that it
//! returns, and whether a connection is fit to be handed out or kept.

use super::Ledger;
use super::slots::{Check, Slot};
use super::values::{Caller, Condition, Order, SlotJob, Take, Token};
use crate::leaf::clock::Moment;
use crate::leaf::sync::sometimes;
use crate::settings::Validate;
use crate::stats::{CloseReason, ConnectionState};

impl<C, W: Clone> Ledger<C, W> {
    /// Takes an idle connection if one may be handed out at this moment. A connection that needs a check comes as
    /// [`Take::Check`] to a caller that can check it `here`, on its own thread, and not at all to another.
    #[inline]
    pub(crate) fn take(&mut self, now: Moment, caller: Caller, here: bool) -> Take<C> {
        self.step(now, |l, now| l.take_idle(now, caller, here))
    }

    #[inline]
    pub(super) fn take_idle(&mut self, now: Moment, caller: Caller, here: bool) -> Take<C> {
        if self.closed || !self.may_barge(now) {
            return Take::Nothing;
        }
        let Some((index, check)) = self.next_idle(0, now) else { return Take::Nothing };
        // While others wait, a caller that came later does not take a connection out of the stack for a check of its
        // own.
        if check && (!here || self.front.is_some()) {
            sometimes!(self.front.is_some(), "a caller leaves what needs a check to those who wait");
            return Take::Nothing;
        }
        let conn = self.pop_idle();
        let token = self.token(index);
        if check {
            self.start_check(index, now, Check::Own(caller));
            Take::Check(token, conn, self.ticket(now))
        } else {
            if let Some(front) = &mut self.front {
                sometimes!("a running caller barges");
                front.barged += 1;
                self.tally.barged += 1;
            }
            self.check_out(index, now, caller);
            Take::Ready(token, conn)
        }
    }

    /// [`take`](Ledger::take) for a caller that can wait for nothing, not even a check. A connection that was only
    /// unused for long comes as [`Take::Check`]. The caller is to look at it without asking the server, and to report
    /// to [`looked_at`](Ledger::looked_at).
    pub(crate) fn take_at_once(&mut self, now: Moment, caller: Caller) -> Take<C> {
        self.step(now, |l, now| {
            if let Take::Ready(token, conn) = l.take_idle(now, caller, false) {
                l.asked_at = now;
                return Take::Ready(token, conn);
            }
            if !l.closed && l.front.is_none() {
                if let Some((index, _)) = l.next_idle(0, now) {
                    let is_suspect = l.is_suspect(&l.slots[index as usize]);
                    if matches!(l.rules.validate, Validate::AfterIdle(_)) && !is_suspect {
                        let conn = l.pop_idle();
                        l.start_check(index, now, Check::Own(caller));
                        return Take::Check(l.token(index), conn, l.ticket(now));
                    }
                }
                if let Some((token, conn)) = l.take_checked(now, caller) {
                    return Take::Ready(token, conn);
                }
            }
            l.note_asked(now);
            Take::Nothing
        })
    }

    /// Takes a connection although it needs a check, if one was made for an earlier caller that asked in vain.
    pub(super) fn take_checked(&mut self, now: Moment, caller: Caller) -> Option<(Token, C)> {
        let (index, _) = self.next_idle(0, now)?;
        if !self.serves_without_check(index) {
            return None;
        }
        sometimes!("a caller that cannot wait gets what was checked for another");
        let conn = self.pop_idle();
        self.asked_at = now;
        self.check_out(index, now, caller);
        Some((self.token(index), conn))
    }

    /// The caller has looked at the connection that it took [at once](Ledger::take_at_once). `well`: the connection
    /// seems well; otherwise nothing could be seen. `None`: the caller may not have the connection, and the executor
    /// checks it for the next caller.
    pub(crate) fn looked_at(
        &mut self,
        now: Moment,
        token: Token,
        conn: C,
        caller: Caller,
        well: bool,
    ) -> Option<(Token, C)> {
        self.step(now, |l, now| {
            let index = token.index;
            if let Some(reason) = l.unfit(index, now) {
                l.close_connection(index, conn, reason, now);
                return None;
            }
            let well = well && !l.is_suspect(&l.slots[index as usize]);
            if l.may_barge(now) && (well || l.serves_without_check(index)) {
                l.asked_at = now;
                l.check_out(index, now, caller);
                return Some((token, conn));
            }
            sometimes!("a look at a connection was not enough");
            l.note_asked(now);
            l.supply(index, conn, now, false);
            l.ask();
            None
        })
    }

    /// The idle connection that would be handed out after `others` of them, and whether it needs a check. Expired
    /// connections at that place are closed first.
    #[inline]
    pub(super) fn next_idle(&mut self, others: usize, now: Moment) -> Option<(u32, bool)> {
        loop {
            let at = self.idle.len().checked_sub(others + 1)?;
            let index = self.idle[at].0;
            let slot = &self.slots[index as usize];
            if !self.is_expired(slot, now) {
                return Some((index, self.needs_check(slot, now)));
            }
            if !self.expire(others, now) {
                return None;
            }
        }
    }

    /// Closes the connections below `others` of the stack that have expired before the reaper looked. `false`: these
    /// are too many for one step. Then the reaper looks at once, so that the next step follows.
    #[cold]
    fn expire(&mut self, others: usize, now: Moment) -> bool {
        for _ in 0..self.batch() {
            let Some(at) = self.idle.len().checked_sub(others + 1) else { return true };
            let index = self.idle[at].0;
            if !self.is_expired(&self.slots[index as usize], now) {
                return true;
            }
            sometimes!("an expired connection is found before the reaper looks");
            let (_, conn) = self.idle.remove(at);
            let due = self.slots[index as usize].dies;
            self.close_due(index, conn, CloseReason::Lifetime, now, due);
        }
        self.arm(now);
        false
    }

    /// The caller's own check has succeeded. `None`: the caller may not have the connection after all. Either the pool
    /// no longer keeps it, or another was found dead meanwhile, so that the check proves nothing.
    pub(crate) fn own_check_passed(
        &mut self,
        now: Moment,
        begun: Moment,
        token: Token,
        conn: C,
        caller: Caller,
    ) -> Option<(Token, C)> {
        self.step(now, |l, now| {
            let index = token.index;
            let fresh = l.proved(index, begun);
            sometimes!(!fresh, "a check proves nothing, since another was found dead meanwhile");
            match l.unfit(index, now) {
                Some(reason) => l.close_connection(index, conn, reason, now),
                None if !fresh => l.supply(index, conn, now, false),
                None => {
                    l.check_out(index, now, caller);
                    return Some((token, conn));
                }
            }
            None
        })
    }

    // ---------------------------------------------------------------------------------------------- return

    /// A connection is returned.
    #[inline]
    pub(crate) fn returned(&mut self, now: Moment, token: Token, conn: C, condition: Condition) {
        self.step(now, |l, now| {
            let index = token.index;
            l.debug_assert_in_use(&token);
            l.used_for(now.nanos_since(l.slots[index as usize].since), now);
            let mut reason = l.unfit(index, now);
            match condition {
                Condition::Keep => {}
                Condition::Reset if reason.is_none() => {
                    let slot = &mut l.slots[index as usize];
                    slot.unused_since = now;
                    let caller = slot.caller();
                    l.start_check(index, now, Check::Reset);
                    return l.effects.orders.push(Order::Job(SlotJob::Reset(token, conn, caller)));
                }
                Condition::Reset => {}
                Condition::Discard(why) => reason = Some(why),
                Condition::Broken => {
                    sometimes!("a user finds a connection dead");
                    l.suspect();
                    reason = Some(CloseReason::Broken);
                }
                Condition::Outdated => {
                    // Only the first of a generation outdates the pool. Another of the same generation says nothing of
                    // the connections that were opened since.
                    if l.slots[index as usize].generation == l.generation {
                        sometimes!("a connection of the past outdates all");
                        l.outdate(now);
                    }
                    reason = Some(CloseReason::Outdated);
                }
            }
            match reason {
                Some(reason) => l.close_connection(index, conn, reason, now),
                None => {
                    l.slots[index as usize].unused_since = now;
                    l.supply(index, conn, now, false);
                }
            }
        });
    }

    /// A connection leaves the pool with its caller: the pool no longer counts it.
    pub(crate) fn detach(&mut self, now: Moment, token: Token) {
        self.step(now, |l, now| {
            l.debug_assert_in_use(&token);
            l.used_for(now.nanos_since(l.slots[token.index as usize].since), now);
            l.tally.detached += 1;
            l.release(token.index);
        });
    }

    // ---------------------------------------------------------------------------------------------- fitness

    /// Whether a connection is too old to be handed out. The resolution of the clock counts against it.
    #[inline]
    pub(super) fn is_expired(&self, slot: &Slot, now: Moment) -> bool {
        slot.dies <= now.plus_nanos(self.rules.resolution()) && slot.dies != Moment::NEVER
    }

    /// Whether a connection must be checked before it is handed out.
    #[inline]
    pub(super) fn needs_check(&self, slot: &Slot, now: Moment) -> bool {
        // A check that was made for keepalive, or for a caller that did not wait for it, serves the next caller too.
        self.is_suspect(slot) || now.nanos_since(slot.unused_since.max(slot.proven)) >= self.rules.check_after()
    }

    /// Why a connection that was returned, opened or checked must be closed, if it must.
    #[inline]
    pub(super) fn unfit(&self, index: u32, now: Moment) -> Option<CloseReason> {
        let slot = &self.slots[index as usize];
        if self.closed {
            sometimes!("something comes back after the close");
            Some(CloseReason::Closed)
        } else if self.is_expired(slot, now) {
            sometimes!("what comes back is too old");
            Some(CloseReason::Lifetime)
        } else if slot.generation != self.generation {
            sometimes!("what was recycled comes back");
            Some(CloseReason::Recycled)
        } else if self.free.len() + (self.rules.max_size as usize) < self.slots.len()
            && self.counted.alive() + u32::from(slot.as_seen() == ConnectionState::Opening) > self.rules.max_size
        {
            sometimes!("what is too many after a resize is returned");
            Some(CloseReason::Resized)
        } else {
            None
        }
    }

    /// Whether a connection that needs a check may be handed out without one to a caller that cannot wait. It may if it
    /// was used or found well since the last such caller asked, and no connection has been found dead since.
    pub(super) fn serves_without_check(&self, index: u32) -> bool {
        let slot = &self.slots[index as usize];
        !self.is_suspect(slot)
            && match self.rules.validate {
                Validate::Never => true,
                // Every use wants a check of its own, so the connection must not have been used since the check.
                Validate::Always => {
                    slot.proven >= self.asked_at && (slot.uses == 0 || slot.proven >= slot.unused_since)
                }
                Validate::AfterIdle(_) => slot.unused_since.max(slot.proven) >= self.asked_at,
            }
    }

    /// Whether another connection was found dead after the job began that last proved this one to be well.
    #[inline]
    pub(super) fn is_suspect(&self, slot: &Slot) -> bool {
        slot.proven_after < self.found_dead
    }

    /// A connection was found dead: every connection that was proven well before is suspect, unless the pool never checks.
    pub(super) fn suspect(&mut self) {
        if self.rules.validate != Validate::Never {
            self.found_dead += 1;
        }
    }

    /// A check has found a connection dead.
    pub(super) fn suspect_after_check(&mut self) {
        self.suspect();
        self.check_failures = self.check_failures.saturating_add(1);
    }

    /// The job that has this slot has proved that the connection was well at `at`, when the job began. `false`: another
    /// connection was found dead since, so the job proves nothing.
    pub(super) fn proved(&mut self, index: u32, at: Moment) -> bool {
        let slot = &mut self.slots[index as usize];
        let Some(job) = slot.job() else { unreachable!("only a job proves anything") };
        (slot.proven, slot.proven_after) = (at, job.begun_after);
        let fresh = !self.is_suspect(&self.slots[index as usize]);
        if fresh {
            self.check_failures = 0;
        }
        fresh
    }
}
