//! Whether a connection may be handed out or kept: its age, what is known of its health, and what the pool has become
//! since it was opened.

use super::Ledger;
use super::slots::Slot;
use crate::leaf::clock::Moment;
use crate::settings::Validate;
use crate::stats::{CloseReason, ConnectionState};

impl<C, W: Clone> Ledger<C, W> {
    /// Whether a connection is too old to be handed out. The resolution of the clock counts against it.
    #[inline]
    pub(super) fn is_expired(&self, slot: &Slot, now: Moment) -> bool {
        slot.dies <= now.plus(self.resolution) && slot.dies != Moment::NEVER
    }

    /// Whether a connection must be checked before it is handed out.
    #[inline]
    pub(super) fn needs_check(&self, slot: &Slot, now: Moment) -> bool {
        match self.settings.validate {
            Validate::Never => false,
            Validate::Always => true,
            // A check that was made for a caller that did not wait for it, or for keepalive, serves the next as well.
            Validate::AfterIdle(limit) => {
                self.is_suspect(slot) || slot.unused_since.max(slot.proven).plus(limit) <= now
            }
        }
    }

    /// Why a connection that changes hands may not be kept, if so.
    #[inline]
    pub(super) fn unfit(&self, index: u32, now: Moment) -> Option<CloseReason> {
        let slot = &self.slots[index as usize];
        if self.closed {
            Some(CloseReason::Closed)
        } else if self.is_expired(slot, now) {
            Some(CloseReason::Lifetime)
        } else if slot.generation != self.generation {
            Some(CloseReason::Recycled)
        } else if self.free.len() + (self.settings.max_size as usize) < self.slots.len()
            && self.counted.alive() + u32::from(slot.as_seen() == ConnectionState::Opening) > self.settings.max_size
        {
            Some(CloseReason::Resized)
        } else {
            None
        }
    }

    /// Whether a connection that needs a check may do without for a caller that cannot wait for one: it was found well
    /// since the last such caller asked, and nothing has been found dead since.
    pub(super) fn serves_who_asked(&self, index: u32) -> bool {
        let slot = &self.slots[index as usize];
        !self.is_suspect(slot)
            && match self.settings.validate {
                Validate::Never => true,
                // Every use wants a check of its own: the connection was not used since this one.
                Validate::Always => {
                    slot.proven >= self.asked_at && (slot.uses == 0 || slot.proven >= slot.unused_since)
                }
                Validate::AfterIdle(_) => slot.unused_since.max(slot.proven) >= self.asked_at,
            }
    }

    /// Whether another connection was found dead after the job began that last proved this one to be well.
    #[inline]
    pub(super) fn is_suspect(&self, slot: &Slot) -> bool {
        slot.proven_after < self.found_dead && self.settings.validate != Validate::Never
    }

    /// A connection was found dead: whatever was proven before is suspect.
    pub(super) fn suspect(&mut self) {
        self.found_dead += 1;
    }

    /// A check has found a connection dead.
    pub(super) fn suspect_after_check(&mut self) {
        self.suspect();
        self.check_failures = self.check_failures.saturating_add(1);
    }

    /// The job that has this slot has proved that the connection was well at `at`, when the job began. `false`: another was
    /// found dead since, so this proves nothing.
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
