//! The queue of waiters, and the hand-off: who gets a connection that is returned or opened.
//!
//! A connection goes to the first waiter (*hand-off*), or to the idle stack, where running threads may take it first
//! (*barging*) while the next waiters are *notified* to come and take what is there. The README of this folder says
//! why, and proves that no waiter is forgotten.

use std::time::Duration;

use super::Ledger;
use super::values::{Caller, Join, Outcome, Take, Ticket, Token};
use crate::leaf::clock::Moment;
use crate::stats::CloseReason;

/// Protects a waiter from starving: the first one is handed what comes back once it was barged so often...
pub(super) const MAX_BARGES: u32 = 4;
/// ... and has been the first for so long. Protects the running threads: a waiter that became the first a moment ago
/// would hold up the connection for as long as a thread takes to wake.
pub(super) const HANDED_OFF_AFTER: Duration = Duration::from_micros(20);

pub(super) struct Waiter<W> {
    handle: W,
    caller: Caller,
    since: Moment,
}

/// The first waiter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Front {
    pub(super) ticket: Ticket,
    /// Since when it waits.
    pub(super) since: Moment,
    /// When it became the first.
    first_since: Moment,
    /// How often other callers got a connection since then.
    pub(super) barged: u32,
}

impl<C, W: Clone> Ledger<C, W> {
    /// How many wait, notified or not.
    pub(crate) fn waiting(&self) -> u32 {
        (self.queue.len() + self.notified.len()) as u32
    }

    /// Queues for a connection, at `ticket` if the caller has had a place before. Asks for what it takes to serve it.
    /// `hurried`: the caller may not have the time to wait for a check, and takes a connection that was checked for a
    /// caller like it.
    pub(crate) fn join(
        &mut self,
        now: Moment,
        caller: Caller,
        ticket: Option<Ticket>,
        hurried: bool,
        handle: W,
    ) -> (Join<C>, Option<W>) {
        self.step(now, |l, now| {
            if l.closed {
                return (Join::Closed, Some(handle));
            }
            if let Take::Ready(token, conn) = l.take_idle(now, caller, false) {
                return (Join::Ready(token, conn), Some(handle));
            }
            if hurried && l.front.is_none() {
                if let Some((token, conn)) = l.take_checked(now, caller) {
                    return (Join::Ready(token, conn), Some(handle));
                }
            }
            if l.is_refused(now) {
                return (Join::Refused, Some(handle));
            }
            let waiting = l.waiting();
            if l.settings.max_waiting.is_some_and(|max| waiting >= max) {
                if waiting == 0 {
                    // Where no caller may wait, none waits for a check.
                    if let Some((token, conn)) = l.take_checked(now, caller) {
                        return (Join::Ready(token, conn), Some(handle));
                    }
                    l.note_asked(now);
                }
                l.tally.rejected += 1;
                l.ask();
                return (Join::TooMany(waiting), Some(handle));
            }
            if waiting == 0 {
                l.shorten_back_off(now);
            }
            // (A hurried caller that comes again and again wants one connection, not one more each time.)
            l.asked &= !hurried;
            let ticket = ticket.unwrap_or_else(|| l.ticket(now));
            l.queue.insert(ticket, Waiter { handle, caller, since: ticket.since });
            if l.front.is_none_or(|front| ticket < front.ticket) {
                l.front = Some(Front { ticket, since: ticket.since, first_since: now, barged: 0 });
            }
            l.tally.waits += 1;
            (Join::Queued(ticket), None)
        })
    }

    /// The next place in the queue.
    pub(super) fn ticket(&mut self, now: Moment) -> Ticket {
        self.next_ticket += 1;
        Ticket { number: self.next_ticket, since: now }
    }

    /// A notified waiter has come. `None`: another caller was faster, or the waiter was not notified, or it no longer
    /// waits. A waiter that still waits keeps its place.
    pub(crate) fn take_notified(&mut self, now: Moment, ticket: Ticket) -> Option<(Token, C)> {
        self.step(now, |l, now| {
            let waiter = l.notified.remove(&ticket)?;
            let caller = waiter.caller;
            l.queue.insert(ticket, waiter);
            let is_first = l.front.is_some_and(|front| front.ticket == ticket);
            // If two connections are there the first waiter is not barged by one that takes the other.
            if !is_first && !l.may_barge(now) && l.idle.len() <= 1 {
                return None;
            }
            let Some((index, false)) = l.next_idle(0, now) else { return None };
            let conn = l.pop_idle();
            let waiter = l.unqueue(now, ticket).expect("the waiter has its place");
            if let Some(front) = l.front.as_mut().filter(|_| !is_first) {
                front.barged += 1;
            }
            l.tally.wait_time.record(now.nanos_since(waiter.since));
            l.check_out(index, now, caller);
            Some((l.token(index), conn))
        })
    }

    /// A waiter leaves the queue. `Some`: it was still queued, and this is its handle. `None`: it has been served.
    pub(crate) fn leave(&mut self, now: Moment, ticket: Ticket) -> Option<W> {
        self.step(now, |l, now| {
            let waiter = l.unqueue(now, ticket)?;
            l.tally.timeouts += 1;
            l.tally.wait_time.record(now.nanos_since(waiter.since));
            Some(waiter.handle)
        })
    }

    /// Takes a waiter out of the queue. If it was notified, the plan notifies another.
    fn unqueue(&mut self, now: Moment, ticket: Ticket) -> Option<Waiter<W>> {
        let waiter = self.queue.remove(&ticket).or_else(|| self.notified.remove(&ticket))?;
        if self.front.is_some_and(|front| front.ticket == ticket) {
            let first = [self.queue.first_key_value(), self.notified.first_key_value()];
            let first = first.into_iter().flatten().min_by_key(|&(ticket, _)| ticket);
            self.front =
                first.map(|(&ticket, waiter)| Front { ticket, since: waiter.since, first_since: now, barged: 0 });
        }
        Some(waiter)
    }

    /// Empties the queue.
    pub(super) fn dismiss_queue(&mut self, now: Moment, outcome: impl Fn() -> Outcome<C>) {
        while let Some(waiter) = self.front.and_then(|front| self.unqueue(now, front.ticket)) {
            self.tally.wait_time.record(now.nanos_since(waiter.since));
            self.effects.served.push((waiter.handle, outcome()));
        }
    }

    // ---------------------------------------------------------------------------------------------- the hand-off

    /// Whether the first waiter gets what comes back now.
    #[inline]
    fn is_handed_off(&self, front: Front, now: Moment) -> bool {
        let was_barged = front.barged >= MAX_BARGES && now.since(front.first_since) >= HANDED_OFF_AFTER;
        was_barged || now.since(front.since) >= self.settings.fair_after
    }

    /// Whether a caller that came later may take what is idle.
    #[inline]
    pub(super) fn may_barge(&self, now: Moment) -> bool {
        self.front.is_none_or(|front| now.since(front.since) < self.settings.fair_after)
    }

    /// Gives a connection to the first waiter, or keeps it. `fresh`: it was proven well just now. For what is kept
    /// while others wait, the plan notifies them, or has it checked first.
    #[inline]
    pub(super) fn supply(&mut self, index: u32, conn: C, now: Moment, fresh: bool) {
        if let Some(front) = self.front {
            return self.supply_queue(front, index, conn, now, fresh);
        }
        let floor = self.settings.min_idle as usize;
        let since = self.slots[index as usize].unused_since;
        if self.idle.len() >= floor && self.settings.max_idle.is_some_and(|max| since.plus(max) <= now) {
            return self.close_connection(index, conn, CloseReason::Idle, now);
        }
        self.push_idle(index, conn, now);
    }

    fn supply_queue(&mut self, front: Front, index: u32, conn: C, now: Moment, fresh: bool) {
        // What the executor brings was made for the waiters, so they get it. They also get what would be evicted before
        // their time of being barged is over.
        let lasts = self.settings.max_idle.is_none_or(|max| max > self.settings.fair_after);
        let well = fresh || !self.needs_check(&self.slots[index as usize], now);
        if well && (fresh || !lasts || self.is_handed_off(front, now)) {
            if let Some(waiter) = self.unqueue(now, front.ticket) {
                let token = self.token(index);
                self.tally.wait_time.record(now.nanos_since(waiter.since));
                self.check_out(index, now, waiter.caller);
                return self.effects.served.push((waiter.handle, Outcome::Connection(token, conn)));
            }
        }
        self.push_idle(index, conn, now);
    }

    /// How many of the idle connections, from the top, could be handed out as they are. Looks at no more than are
    /// waited for.
    pub(super) fn ready(&self, now: Moment) -> usize {
        let wanted = (self.waiting() as usize).max(1);
        let slots = self.idle.iter().rev().take(wanted).map(|&(index, _)| &self.slots[index as usize]);
        slots.take_while(|slot| !self.is_expired(slot, now) && !self.needs_check(slot, now)).count()
    }

    /// Notifies the next waiters, if more connections are ready than waiters are notified.
    pub(super) fn notify(&mut self, ready: usize) {
        while self.notified.len() < ready {
            let Some((ticket, waiter)) = self.queue.pop_first() else { return };
            self.effects.notified.push(waiter.handle.clone());
            self.notified.insert(ticket, waiter);
        }
    }
}
