//! The queue of waiters, and the hand-off: who gets a connection that is returned or opened.
//!
//! A connection goes to the first waiter (*hand-off*), or to the idle stack. In the stack a running thread may take it
//! first (*barging*), while the next waiters are *notified* to come and take it. The README of this folder says why,
//! and proves that no waiter is forgotten.

use std::time::Duration;

use super::Ledger;
use super::values::{Caller, Join, Outcome, Take, Ticket, Token};
use super::waiters::Waiter;
use crate::leaf::clock::Moment;
use crate::leaf::sync::sometimes;
use crate::stats::CloseReason;

/// Protects waiters from starving: a returned connection is handed off to the first waiter once it was barged so
/// often...
pub(super) const MAX_BARGES: u32 = 4;
/// ... and has been the first for so long. Protects the running threads: a connection that is handed off to a waiter
/// lies unused for as long as its thread takes to wake.
pub(super) const HANDED_OFF_AFTER: Duration = Duration::from_micros(20);

/// The first waiter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Front {
    pub(super) ticket: Ticket,
    /// When the waiter began to wait.
    pub(super) since: Moment,
    /// When the waiter became the first.
    pub(super) first_since: Moment,
    /// How often other callers got a connection since then.
    pub(super) barged: u32,
}

impl<C, W: Clone> Ledger<C, W> {
    /// The number of waiters, notified or not.
    pub(crate) fn waiting(&self) -> u32 {
        self.queue.len() as u32
    }

    /// Queues the caller for a connection, at `ticket` if it has had a place before. The plan then checks or opens what
    /// it needs. `hurried`: the caller may not have the time to wait for a check, and takes a connection that was
    /// checked for an earlier hurried caller.
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
                sometimes!("a caller is refused at once");
                return (Join::Refused, Some(handle));
            }
            let waiting = l.waiting();
            l.note_starved(now);
            if waiting == 0 {
                l.shorten_back_off(now);
            }
            if l.rules.max_waiting.is_some_and(|max| waiting >= max) {
                if waiting == 0 {
                    // Where no caller may wait, none can wait for a check either.
                    if let Some((token, conn)) = l.take_checked(now, caller) {
                        return (Join::Ready(token, conn), Some(handle));
                    }
                    l.note_asked(now);
                }
                sometimes!("too many wait");
                l.tally.rejected += 1;
                l.ask();
                return (Join::TooMany(waiting), Some(handle));
            }
            // (A hurried caller waits in place of the wish that an earlier one left. So a caller that comes again and
            // again wants one connection, not one more each time.)
            l.asked &= !hurried;
            sometimes!(ticket.is_some(), "a caller takes its place again after a check of its own");
            let ticket = ticket.unwrap_or_else(|| l.ticket(now));
            l.queue.insert(Waiter::new(ticket, handle, caller));
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
            let caller = l.queue.has_come(ticket)?;
            let is_first = l.front.is_some_and(|front| front.ticket == ticket);
            // If two connections are idle, one is left for the first waiter, and a later waiter may take the other.
            if !is_first && !l.may_barge(now) && l.idle.len() <= 1 {
                sometimes!("a later waiter leaves the only connection to the first");
                return None;
            }
            sometimes!(l.idle.is_empty(), "another was faster than the notified waiter");
            let Some((index, false)) = l.next_idle(0, now) else { return None };
            let conn = l.pop_idle();
            l.unqueue(now, ticket).expect("the waiter has its place");
            if let Some(front) = l.front.as_mut().filter(|_| !is_first) {
                sometimes!("a later waiter passes the first");
                front.barged += 1;
                l.tally.barged += 1;
            }
            l.tally.wait_time.record(now.nanos_since(ticket.since));
            l.check_out(index, now, caller);
            Some((l.token(index), conn))
        })
    }

    /// A waiter leaves. `Some`: the waiter was still queued, and this is its handle. `None`: it has been served.
    pub(crate) fn leave(&mut self, now: Moment, ticket: Ticket) -> Option<W> {
        self.step(now, |l, now| {
            let waiter = l.unqueue(now, ticket)?;
            l.tally.timeouts += 1;
            l.tally.left_after(now.nanos_since(ticket.since));
            Some(waiter.handle)
        })
    }

    /// Takes a waiter out of the queue. If it was notified, the plan notifies another.
    fn unqueue(&mut self, now: Moment, ticket: Ticket) -> Option<Waiter<W>> {
        let waiter = self.queue.remove(ticket)?;
        if self.front.is_some_and(|front| front.ticket == ticket) {
            let first = self.queue.first().map(|waiter| waiter.ticket);
            self.front = first.map(|ticket| Front { ticket, since: ticket.since, first_since: now, barged: 0 });
        }
        Some(waiter)
    }

    /// Empties the queue: all waiters get this outcome.
    pub(super) fn dismiss_queue(&mut self, now: Moment, outcome: impl Fn() -> Outcome<C>) {
        while let Some(waiter) = self.front.and_then(|front| self.unqueue(now, front.ticket)) {
            self.tally.left_after(now.nanos_since(waiter.ticket.since));
            self.effects.served.push((waiter.handle, outcome()));
        }
    }

    // ---------------------------------------------------------------------------------------------- the hand-off

    /// Whether a connection that is returned now is handed off to the first waiter.
    #[inline]
    fn is_handed_off(&self, front: Front, now: Moment) -> bool {
        let was_barged = front.barged >= MAX_BARGES && now.since(front.first_since) >= HANDED_OFF_AFTER;
        sometimes!(was_barged, "handed off to a waiter that was barged too often");
        was_barged || now.since(front.since) >= self.rules.fair_after
    }

    /// Whether a caller that came later may take what is idle.
    #[inline]
    pub(super) fn may_barge(&self, now: Moment) -> bool {
        self.front.is_none_or(|front| now.since(front.since) < self.rules.fair_after)
    }

    /// Hands a connection off to the first waiter, or makes it idle. `fresh`: it was proven well just now. If it
    /// becomes idle while there are waiters, the plan notifies one of them, or has the connection checked first.
    #[inline]
    pub(super) fn supply(&mut self, index: u32, conn: C, now: Moment, fresh: bool) {
        if let Some(front) = self.front {
            return self.supply_queue(front, index, conn, now, fresh);
        }
        let floor = self.rules.min_idle as usize;
        let since = self.slots[index as usize].unused_since;
        if self.idle.len() >= floor && since.plus_nanos(self.rules.max_idle()) <= now {
            sometimes!("what comes back is evicted at once");
            return self.close_connection(index, conn, CloseReason::Idle, now);
        }
        self.push_idle(index, conn, now);
    }

    fn supply_queue(&mut self, front: Front, index: u32, conn: C, now: Moment, fresh: bool) {
        // A connection that the executor brings was made for the waiters, so the first waiter gets it. The first waiter
        // also gets a connection that would be evicted before `fair_after` is over.
        let lasts = self.rules.max_idle.is_none_or(|max| max > self.rules.fair_after);
        let well = fresh || !self.needs_check(&self.slots[index as usize], now);
        if well && (fresh || !lasts || self.is_handed_off(front, now)) {
            if let Some(waiter) = self.unqueue(now, front.ticket) {
                let token = self.token(index);
                self.tally.wait_time.record(now.nanos_since(waiter.ticket.since));
                self.check_out(index, now, waiter.caller);
                sometimes!("a waiter is handed a connection");
                return self.effects.served.push((waiter.handle, Outcome::Connection(token, conn)));
            }
        }
        self.push_idle(index, conn, now);
    }

    /// How many of the idle connections, from the top, could be handed out as they are. Looks at no more connections
    /// than there are waiters.
    pub(super) fn ready(&self, now: Moment) -> usize {
        self.ready_from(0, now)
    }

    /// [`ready`](Ledger::ready), where so many are known to be.
    pub(super) fn ready_from(&self, known: usize, now: Moment) -> usize {
        let wanted = (self.waiting() as usize).max(1);
        let slots = self.idle.iter().rev().take(wanted).skip(known).map(|&(index, _)| &self.slots[index as usize]);
        known + slots.take_while(|slot| !self.is_expired(slot, now) && !self.needs_check(slot, now)).count()
    }

    /// Notifies the next waiters, if more connections are ready than waiters are notified.
    pub(super) fn notify(&mut self, ready: usize) {
        while self.queue.notified() < ready {
            let Some(handle) = self.queue.notify_next() else { return };
            self.effects.notified.push(handle.clone());
        }
    }
}
