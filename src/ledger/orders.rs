//! What a user may ask of the pool at any time: `resize`, `set_min_idle`, `recycle`, `close`.

use super::Ledger;
use super::demand::BACKOFF_FIRST;
use super::slots::{Close, State};
use super::values::{Outcome, Reach};
use crate::leaf::clock::Moment;
use crate::leaf::sync::sometimes;
use crate::stats::CloseReason;

impl<C, W: Clone> Ledger<C, W> {
    /// Sets the greatest number of connections. The excess is closed: the longest unused at once, the others on return.
    pub(crate) fn resize(&mut self, now: Moment, max_size: u32) {
        self.step(now, |l, now| {
            l.rules.set_max_size(max_size);
            // (Connections that are being opened are no excess yet: they may never arrive.)
            let excess = l.counted.alive().saturating_sub(max_size).min(l.idle.len() as u32);
            sometimes!(excess > 0, "a resize closes what is idle");
            for (index, conn) in l.drain_idle(0, excess as usize) {
                l.close_connection(index, conn, CloseReason::Resized, now);
            }
        });
    }

    /// Sets the floor. A connection that the floor no longer keeps, and that is due, is closed at once.
    pub(crate) fn set_min_idle(&mut self, now: Moment, min_idle: u32) {
        self.step(now, |l, now| {
            l.rules.set_min_idle(min_idle);
            l.stack_changed_at = now;
            l.evict_idle(now);
            l.arm(now);
        });
    }

    /// Replaces every connection whose opening began before now: the idle ones at once, the others on return.
    pub(crate) fn recycle(&mut self, now: Moment) {
        self.step(now, |l, now| l.outdate(now));
    }

    pub(super) fn outdate(&mut self, now: Moment) {
        self.generation += 1;
        for &(_, index) in &self.limits {
            let slot = &self.slots[index as usize];
            if let State::Closing(Close::Runs, _) = slot.state {
                self.replaced.insert((slot.since, index));
            }
        }
        for (index, conn) in self.drain_idle(0, self.idle.len()) {
            self.close_connection(index, conn, CloseReason::Recycled, now);
        }
        // The server may have been repaired, so it is dialled again before the back-off ends.
        if let Some(failure) = &mut self.failure {
            failure.retry = now.max(failure.last.plus(BACKOFF_FIRST));
            sometimes!("a recycle ends a back-off");
            if failure.reach == Reach::Refusal {
                failure.reach = Reach::Server;
            }
        }
    }

    /// Closes the pool: no caller waits any longer, and no connection is kept. Returns how many callers waited; `None`
    /// if the pool was closed before.
    pub(crate) fn close(&mut self, now: Moment) -> Option<u32> {
        self.step(now, |l, now| {
            if l.closed {
                return None;
            }
            l.closed = true;
            l.asked = false;
            let waiting = l.waiting();
            sometimes!(waiting > 0, "a close finds waiters");
            l.dismiss_queue(now, || Outcome::Closed);
            for (index, conn) in l.drain_idle(0, l.idle.len()) {
                l.close_connection(index, conn, CloseReason::Closed, now);
            }
            l.arm(now);
            l.effects.changed = true;
            Some(waiting)
        })
    }
}
