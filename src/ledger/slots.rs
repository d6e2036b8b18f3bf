//! Slots, their states and their counts, and the stack of idle connections. This is the only file in which a slot
//! changes its state, and [`Ledger::set`] the only function that does it: it changes the state and the counts together.
//!
//! `README.md`, beside this file, has the table of all transitions. The caller or job that has the slot's [`Token`]
//! may ask for a transition. So may the reaper for an idle connection, and, at a job's limit, for the slot of that job.

use std::ops::{Index, IndexMut};
use std::time::Duration;

use super::Ledger;
use super::values::{Caller, Order, SlotJob, Token};
use crate::leaf::clock::Moment;
use crate::stats::{CloseReason, ConnectionState};

/// How long waiters count on a check or a reset that runs. One that takes longer may hang. Then another connection is
/// checked or opened for the waiters beside it, where there is room. A check that works usually takes far less.
pub(super) const CHECK_PATIENCE: Duration = Duration::from_millis(100);

/// What the ledger knows of one slot.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The number of the connection, or of the attempt to open one. 0: the slot is free.
    pub(crate) id: u64,
    pub(super) state: State,
    /// The index in [`StateCounts`] under which the slot is counted.
    counted: u8,
    /// When the slot took its state; for an idle connection, `unused_since`.
    pub(crate) since: Moment,
    /// When the connection was last returned, or, before its first return, when it arrived. (A keepalive check is not
    /// use, and does not change this.) Valid from the arrival on.
    pub(super) unused_since: Moment,
    /// When the connect began; until then, when it was ordered. The four fields that follow are valid from the connect
    /// on.
    pub(crate) born: Moment,
    /// The end of life: the connection is not handed out from this moment on.
    pub(super) dies: Moment,
    /// When the connection was last known to be well...
    pub(super) proven: Moment,
    /// ... and how many connections had been found dead when the job that proved it began.
    pub(super) proven_after: u64,
    /// The ledger's generation when the connect began.
    pub(super) generation: u64,
    /// How often the connection was checked out.
    pub(crate) uses: u64,
}

impl Slot {
    /// The state as users know it.
    pub(crate) fn as_seen(&self) -> ConnectionState {
        match self.state {
            State::Idle { .. } => ConnectionState::Idle,
            State::InUse { .. } => ConnectionState::InUse,
            State::Checking(..) => ConnectionState::Checking,
            State::Opening(_) => ConnectionState::Opening,
            State::Closing(..) | State::Free => ConnectionState::Closing,
        }
    }

    /// The caller that has the connection: in use, or checking it for itself.
    pub(crate) fn caller(&self) -> Option<Caller> {
        match self.state {
            State::InUse { caller, .. } | State::Checking(Check::Own(caller), _) => Some(caller),
            _ => None,
        }
    }

    /// Whether the connection is idle and near the end of its life, so that the floor does not count on it.
    pub(super) fn expires_soon(&self) -> bool {
        matches!(self.state, State::Idle { expiring_soon: true })
    }

    /// Since when the idle connection was neither used nor known to be well.
    #[inline]
    pub(super) fn unproven_since(&self) -> Moment {
        self.since.max(self.proven)
    }

    /// The job that has this slot, if one has.
    pub(super) fn job(&self) -> Option<&Job> {
        match &self.state {
            State::Opening(job) | State::Checking(_, job) | State::Closing(_, job) => Some(job),
            State::Free | State::Idle { .. } | State::InUse { .. } => None,
        }
    }

    fn job_mut(&mut self) -> Option<&mut Job> {
        match &mut self.state {
            State::Opening(job) | State::Checking(_, job) | State::Closing(_, job) => Some(job),
            State::Free | State::Idle { .. } | State::InUse { .. } => None,
        }
    }
}

/// The slots, by index. For the tests, which ask how much one step looks at, every look is counted.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    #[cfg(test)]
    pub(super) looks: std::cell::Cell<usize>,
}

impl Slots {
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Slot> {
        self.count(self.slots.len());
        self.slots.iter()
    }

    fn push(&mut self, slot: Slot) {
        self.slots.push(slot);
    }

    #[inline]
    fn count(&self, _looks: usize) {
        #[cfg(test)]
        self.looks.set(self.looks.get() + _looks);
    }
}

impl Index<usize> for Slots {
    type Output = Slot;

    #[inline]
    fn index(&self, index: usize) -> &Slot {
        self.count(1);
        &self.slots[index]
    }
}

impl IndexMut<usize> for Slots {
    #[inline]
    fn index_mut(&mut self, index: usize) -> &mut Slot {
        self.count(1);
        &mut self.slots[index]
    }
}

/// The state of a slot, with what is true in that state only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Idle {
        /// The connection ends within the replacement lead, so the floor no longer counts on it.
        expiring_soon: bool,
    },
    InUse {
        caller: Caller,
        /// A leak was reported for this checkout.
        warned: bool,
    },
    Checking(Check, Job),
    Opening(Job),
    Closing(Close, Job),
}

/// A job that has a slot: an open, a check, a reset or a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    /// The job takes so long that it is no longer counted on.
    pub(super) slow: bool,
    /// How many connections had been found dead when the job began. (A close proves nothing and has 0.)
    pub(super) begun_after: u64,
    /// When the job is abandoned. `NEVER` until it begins. A caller's own check has no limit here, and is never `slow`.
    pub(super) limit: Moment,
    /// Until when the job is counted on. `NEVER` once it is slow.
    pub(super) patience: Moment,
}

impl Job {
    /// A job that is yet to begin, after `found_dead` connections were found dead.
    pub(super) const fn ordered(found_dead: u64) -> Job {
        Job { slow: false, begun_after: found_dead, limit: Moment::NEVER, patience: Moment::NEVER }
    }
}

/// What is done to a connection in [`State::Checking`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// The caller validates it, for itself.
    Own(Caller),
    /// The executor validates it, for the first waiter or the idle stack.
    Executor,
    /// The executor resets it.
    Reset,
}

/// How far a close is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    /// The close was ordered. `due`: when the connection's time was over; `NEVER` if it was not.
    Ordered { due: Moment },
    /// The close runs; or the job whose open, check or reset failed runs the handlers that come before the close.
    Runs,
    /// The job is past its limit, and its slot could not be freed.
    Stuck,
}

/// How many slots are in each state. Changed by [`Ledger::set`] and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StateCounts([u32; 11]);

impl StateCounts {
    const FREE: usize = 0;
    const IDLE: usize = 1;
    const EXPIRING_SOON: usize = 2;
    const IN_USE: usize = 3;
    const OWN_CHECK: usize = 4;
    // From here on the executor has a job for the slot.
    const CHECK: usize = 5;
    const SLOW_CHECK: usize = 6;
    const OPENING: usize = 7;
    const SLOW_OPENING: usize = 8;
    const CLOSE_ORDERED: usize = 9;
    const CLOSING: usize = 10;

    #[inline]
    fn of(state: &State) -> usize {
        match state {
            State::Free => Self::FREE,
            State::Idle { expiring_soon: false } => Self::IDLE,
            State::Idle { expiring_soon: true } => Self::EXPIRING_SOON,
            State::InUse { .. } => Self::IN_USE,
            State::Checking(Check::Own(_), _) => Self::OWN_CHECK,
            State::Checking(_, Job { slow: false, .. }) => Self::CHECK,
            State::Checking(_, Job { slow: true, .. }) => Self::SLOW_CHECK,
            State::Opening(Job { slow: false, .. }) => Self::OPENING,
            State::Opening(Job { slow: true, .. }) => Self::SLOW_OPENING,
            State::Closing(Close::Ordered { .. }, _) => Self::CLOSE_ORDERED,
            State::Closing(Close::Runs | Close::Stuck, _) => Self::CLOSING,
        }
    }

    /// The counts as they must be, for the tests.
    #[cfg(test)]
    pub(super) fn recount(slots: &Slots) -> StateCounts {
        let mut counted = StateCounts::default();
        slots.iter().for_each(|slot| counted.0[StateCounts::of(&slot.state)] += 1);
        counted
    }

    pub(super) fn in_use(&self) -> u32 {
        self.0[Self::IN_USE]
    }

    pub(super) fn own_checks(&self) -> u32 {
        self.0[Self::OWN_CHECK]
    }

    /// Checks and resets by the executor that do not take longer than usual.
    pub(super) fn quick_checks(&self) -> u32 {
        self.0[Self::CHECK]
    }

    /// Checks and resets by the executor.
    pub(super) fn checks(&self) -> u32 {
        self.0[Self::CHECK] + self.0[Self::SLOW_CHECK]
    }

    pub(super) fn quick_opens(&self) -> u32 {
        self.0[Self::OPENING]
    }

    pub(super) fn slow_opens(&self) -> u32 {
        self.0[Self::SLOW_OPENING]
    }

    pub(super) fn opens(&self) -> u32 {
        self.quick_opens() + self.slow_opens()
    }

    pub(super) fn ordered_closes(&self) -> u32 {
        self.0[Self::CLOSE_ORDERED]
    }

    /// Closes that run, or are stuck.
    pub(super) fn begun_closes(&self) -> u32 {
        self.0[Self::CLOSING]
    }

    pub(super) fn closes(&self) -> u32 {
        self.ordered_closes() + self.begun_closes()
    }

    pub(super) fn idle(&self) -> u32 {
        self.lasting() + self.0[Self::EXPIRING_SOON]
    }

    /// The idle connections that end within the replacement lead.
    pub(super) fn expiring_soon(&self) -> u32 {
        self.0[Self::EXPIRING_SOON]
    }

    /// The idle connections that do not end within the replacement lead.
    pub(super) fn lasting(&self) -> u32 {
        self.0[Self::IDLE]
    }

    /// All slots that `max_size` bounds.
    pub(super) fn total(&self) -> u32 {
        self.0[1..].iter().sum()
    }

    /// Connections that a waiter may get: idle, in use, or being checked.
    pub(super) fn alive(&self) -> u32 {
        self.total() - self.closes() - self.opens()
    }
}

impl<C, W: Clone> Ledger<C, W> {
    // ---------------------------------------------------------------------------------------------- states

    /// Sets the state of a slot, which it has since `since`, and with it the counts. (Inlined: a checkout and a return know the state that they
    /// set, so the compiler knows where it is counted.)
    #[inline(always)]
    fn set(&mut self, index: u32, state: State, since: Moment) {
        let after = StateCounts::of(&state);
        let slot = &mut self.slots[index as usize];
        let before = std::mem::replace(&mut slot.counted, after as u8);
        slot.state = state;
        slot.since = since;
        self.counted.0[before as usize] -= 1;
        self.counted.0[after] += 1;
    }

    /// A slot takes another state, which it has since `since`. The limit, the patience or the lifetime that belonged to
    /// the state before ends with it.
    #[inline(always)]
    fn change(&mut self, index: u32, state: State, since: Moment) {
        if self.slots[index as usize].counted >= StateCounts::CHECK as u8 {
            self.end_job(index);
        }
        self.set(index, state, since);
        match state {
            State::Idle { .. } | State::InUse { .. } => {}
            State::Checking(..) | State::Opening(_) => self.dirty = true,
            State::Closing(..) | State::Free => self.end_life(index),
        }
    }

    /// The executor's job no longer has the slot. Not inlined: a plain checkout and return never come here.
    #[inline(never)]
    fn end_job(&mut self, index: u32) {
        self.dirty = true;
        self.end_limit(index);
        self.end_patience(index);
        let slot = &self.slots[index as usize];
        match slot.state {
            State::Closing(Close::Runs, _) => _ = self.replaced.remove(&(slot.since, index)),
            State::Closing(Close::Stuck, _) => _ = self.stuck.remove(&index),
            _ => {}
        }
        if self.keepalive == Some(self.slots[index as usize].id) {
            self.keepalive = None;
            // The next keepalive may be due already: the reaper is to look.
            self.arm(self.now);
        }
    }

    /// The slot no longer has a connection that can be used. Not inlined: a plain checkout and return never come here.
    #[inline(never)]
    fn end_life(&mut self, index: u32) {
        self.dirty = true;
        let dies = self.slots[index as usize].dies;
        if dies != Moment::NEVER {
            self.lifetimes.remove(&(dies, index));
        }
    }

    /// The idle connection ends within the replacement lead.
    pub(super) fn set_expiring_soon(&mut self, index: u32) {
        self.set(index, State::Idle { expiring_soon: true }, self.slots[index as usize].since);
    }

    /// A leak was reported for this checkout.
    pub(super) fn set_warned(&mut self, index: u32) {
        let Slot { state, since, .. } = self.slots[index as usize];
        if let State::InUse { caller, .. } = state {
            self.set(index, State::InUse { caller, warned: true }, since);
        }
    }

    /// The job that has the slot is no longer counted on. Its patience must have ended.
    pub(super) fn set_slow(&mut self, index: u32) {
        let Slot { mut state, since, .. } = self.slots[index as usize];
        match &mut state {
            State::Opening(job) | State::Checking(_, job) | State::Closing(_, job) => job.slow = true,
            State::Free | State::Idle { .. } | State::InUse { .. } => unreachable!("only jobs are counted on"),
        }
        self.set(index, state, since);
    }

    /// An ordered open begins: it has no limit yet, and is counted on anew.
    pub(super) fn restart_open(&mut self, index: u32, now: Moment) {
        self.end_limit(index);
        self.end_patience(index);
        self.set(index, State::Opening(Job::ordered(self.found_dead)), now);
    }

    // ---------------------------------------------------------------------------------------------- slots

    /// The one token of a slot, for the caller or the job that has the slot next.
    #[inline]
    pub(super) fn token(&self, index: u32) -> Token {
        Token { index, id: self.slots[index as usize].id }
    }

    /// Whether the slot is still the one for which the token was made. It is not if the token's job was abandoned.
    pub(super) fn is_current(&self, token: &Token) -> bool {
        self.slots[token.index as usize].id == token.id
    }

    #[inline]
    pub(super) fn debug_assert_in_use(&self, token: &Token) {
        let slot = &self.slots[token.index as usize];
        debug_assert!(
            slot.id == token.id && slot.as_seen() == ConnectionState::InUse,
            "a token out of place: {slot:?}"
        );
    }

    /// Takes a free slot, or makes a new one, for an open that is ordered now.
    pub(super) fn occupy(&mut self, now: Moment) -> Token {
        let id = self.next_id;
        self.next_id += 1;
        let slot = Slot {
            id,
            state: State::Free,
            counted: StateCounts::FREE as u8,
            since: now,
            unused_since: now,
            born: now,
            dies: Moment::NEVER,
            proven: now,
            proven_after: 0,
            generation: self.generation,
            uses: 0,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                self.counted.0[StateCounts::FREE] += 1;
                (self.slots.len() - 1) as u32
            }
        };
        self.change(index, State::Opening(Job::ordered(self.found_dead)), now);
        Token { index, id }
    }

    /// Frees a slot.
    pub(super) fn release(&mut self, index: u32) {
        self.change(index, State::Free, self.now);
        self.slots[index as usize].id = 0;
        self.free.push(index);
        self.effects.changed |= self.watchers > 0;
        self.note_if_over();
    }

    /// Frees the slot of a job that is abandoned. The job goes on, and counts as abandoned until it
    /// [comes back](Ledger::came_back).
    pub(super) fn release_abandoned(&mut self, index: u32) {
        self.abandoned += 1;
        self.release(index);
    }

    /// A job that was abandoned has come back.
    pub(super) fn came_back(&mut self) {
        self.abandoned -= 1;
        self.effects.changed |= self.watchers > 0;
    }

    // ---------------------------------------------------------------------------------------------- jobs

    /// The job that has the slot is abandoned at `at`, unless it ends before.
    pub(super) fn start_limit(&mut self, index: u32, at: Moment) {
        self.end_limit(index);
        let Some(job) = self.slots[index as usize].job_mut() else { unreachable!("only jobs have limits") };
        job.limit = at;
        if at != Moment::NEVER {
            self.limits.insert((at, index));
            self.arm(at);
        }
    }

    pub(super) fn end_limit(&mut self, index: u32) {
        let Some(job) = self.slots[index as usize].job_mut() else { return };
        let limit = std::mem::replace(&mut job.limit, Moment::NEVER);
        if limit != Moment::NEVER {
            self.limits.remove(&(limit, index));
        }
    }

    /// Counts on the job that has the slot until `until`.
    pub(super) fn count_on(&mut self, index: u32, until: Moment) {
        self.end_patience(index);
        let slot = &mut self.slots[index as usize];
        let (since, closes) = (slot.since, matches!(slot.state, State::Closing(..)));
        let Some(job) = slot.job_mut() else { unreachable!("only jobs are counted on") };
        job.patience = until;
        if until != Moment::NEVER {
            self.patience.insert((until, index));
        }
        if !closes {
            self.under_way.insert((since, index));
        }
    }

    pub(super) fn end_patience(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let (since, closes) = (slot.since, matches!(slot.state, State::Closing(..)));
        let Some(job) = slot.job_mut() else { return };
        let until = std::mem::replace(&mut job.patience, Moment::NEVER);
        if until != Moment::NEVER {
            self.patience.remove(&(until, index));
        }
        if !closes {
            self.under_way.remove(&(since, index));
        }
    }

    /// A check or reset by the executor begins: its success proves what holds from now on.
    pub(super) fn restart_check(&mut self, index: u32) {
        let found_dead = self.found_dead;
        if let Some(job) = self.slots[index as usize].job_mut() {
            job.begun_after = found_dead;
        }
    }

    // ---------------------------------------------------------------------------------------------- transitions

    /// The caller has the connection.
    #[inline]
    pub(super) fn check_out(&mut self, index: u32, now: Moment, caller: Caller) {
        self.slots[index as usize].uses += 1;
        self.change(index, State::InUse { caller, warned: false }, now);
        self.tally.checkouts += 1;
        self.last_progress = now;
        if let Some(threshold) = self.rules.leak_threshold {
            if self.in_use_since.note(index, now) {
                self.arm(now.plus(threshold));
            }
        }
    }

    /// The connection is to be checked or reset.
    pub(super) fn start_check(&mut self, index: u32, now: Moment, check: Check) {
        self.change(index, State::Checking(check, Job::ordered(self.found_dead)), now);
        if !matches!(check, Check::Own(_)) {
            self.count_on(index, now.plus(CHECK_PATIENCE));
        }
    }

    /// Has the connection closed.
    pub(super) fn close_connection(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment) {
        self.close_due(index, conn, reason, now, Moment::NEVER);
    }

    /// Has a connection closed whose time was over at `due`.
    pub(super) fn close_due(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment, due: Moment) {
        self.tally.closed(reason);
        self.order_close(index, conn, reason, now, due);
    }

    /// The same for a connection that was not counted as opened, and so is not counted as closed.
    pub(super) fn order_close(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment, due: Moment) {
        self.await_close(index, now, due);
        let token = self.token(index);
        self.effects.orders.push(Order::Job(SlotJob::Close(token, conn, reason)));
    }

    /// The connection is to be closed by a job that is yet to begin. Its time was over at `due`.
    pub(super) fn await_close(&mut self, index: u32, now: Moment, due: Moment) {
        self.change(index, State::Closing(Close::Ordered { due }, Job::ordered(0)), now);
    }

    /// The job is past its limit, and its slot cannot be freed.
    pub(super) fn set_stuck(&mut self, index: u32, now: Moment) {
        self.change(index, State::Closing(Close::Stuck, Job::ordered(0)), now);
        self.stuck.insert(index);
    }

    /// A job goes on to close its connection, if it has one, within a new limit.
    pub(super) fn start_closing(&mut self, index: u32, now: Moment) {
        self.change(index, State::Closing(Close::Runs, Job::ordered(0)), now);
        if self.slots[index as usize].generation < self.generation {
            self.replaced.insert((now, index));
        }
        self.start_limit(index, now.plus(self.rules.close_timeout));
    }

    // ---------------------------------------------------------------------------------------------- the idle stack

    /// Puts a connection into the idle stack, which is sorted by the time of the last use.
    #[inline]
    pub(super) fn push_idle(&mut self, index: u32, conn: C, now: Moment) {
        self.last_progress = now;
        let expiring_soon = self.rules.min_idle > 0 && {
            let dies = self.slots[index as usize].dies;
            dies != Moment::NEVER && dies <= now.plus(self.lead())
        };
        let since = self.slots[index as usize].unused_since;
        self.change(index, State::Idle { expiring_soon }, since);
        match self.idle.last() {
            Some(&(top, _)) if self.slots[top as usize].since > since => {
                self.stack_changed_at = now;
                let at = self.idle.partition_point(|&(i, _)| self.slots[i as usize].since <= since);
                self.idle.insert(at, (index, conn));
            }
            _ => self.idle.push((index, conn)),
        }
        let due = self.idle_deadline();
        self.arm(due);
        if let Some(period) = self.rules.keepalive {
            let unproven_since = self.slots[index as usize].unproven_since();
            if self.unproven_since.note(index, unproven_since) && self.keepalive.is_none() {
                self.arm(unproven_since.plus(period));
            }
        }
        self.effects.changed |= self.watchers > 0;
    }

    /// When the next connection has been idle for too long: the lowest one above the floor. A return can only add a
    /// deadline that lies ahead.
    #[inline]
    pub(super) fn idle_deadline(&self) -> Moment {
        match self.idle.get(self.rules.min_idle as usize) {
            Some(&(index, _)) => self.slots[index as usize].since.plus_nanos(self.rules.max_idle()),
            None => Moment::NEVER,
        }
    }

    /// Takes the connection at the top of the stack, which must not be empty. The calling function sets the slot's
    /// state.
    #[inline]
    pub(super) fn pop_idle(&mut self) -> C {
        self.idle.pop().expect("looked at before").1
    }

    /// Takes this connection out of the stack. The calling function sets the slot's state.
    pub(super) fn remove_idle(&mut self, index: u32) -> C {
        let since = self.slots[index as usize].since;
        let from = self.idle.partition_point(|&(i, _)| self.slots[i as usize].since < since);
        let at = from + self.idle[from..].iter().position(|&(i, _)| i == index).expect("an idle slot is in the stack");
        self.idle.remove(at).1
    }

    /// Takes the connections in these slots out of the stack, in one pass, whatever the order in which they are named.
    /// They come in another. The calling function sets the slots' states.
    pub(super) fn remove_all_idle(&mut self, indexes: &[u32]) -> Vec<(u32, C)> {
        let mut picked = vec![false; self.slots.len()];
        let mut first = Moment::NEVER;
        for &index in indexes {
            picked[index as usize] = true;
            first = first.min(self.slots[index as usize].since);
        }
        let first = self.idle.partition_point(|&(index, _)| self.slots[index as usize].since < first);
        let mut kept = first;
        for at in first..self.idle.len() {
            if !picked[self.idle[at].0 as usize] {
                self.idle.swap(kept, at);
                kept += 1;
            }
        }
        self.idle.split_off(kept)
    }

    /// Takes the connections at these places out of the stack. The calling function sets the slots' states.
    pub(super) fn drain_idle(&mut self, from: usize, to: usize) -> Vec<(u32, C)> {
        self.idle.drain(from..to.max(from)).collect()
    }
}
