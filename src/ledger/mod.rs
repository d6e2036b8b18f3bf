#![doc = include_str!("README.md")]

use std::collections::BTreeSet;
use std::time::Duration;

use crate::leaf::clock::Moment;
use crate::settings::Settings;
use crate::stats::{Counts, Tally};

// Each file uses types and constants only of files above it in this list. A rule that needs a rule of another file
// calls a method of `Ledger`. All files add methods to it, so the struct stands here.
mod rules;
mod values;

mod earliest;
mod effects;
mod slots;
mod waiters;

mod queue;

mod demand;

mod checkout;
mod expiry;
mod health;
mod orders;
mod reports;

#[cfg(test)]
mod tests;

pub(crate) use demand::FailedOpen;
pub(crate) use health::{FailedRun, Health};
pub(crate) use slots::Slot;
pub(crate) use values::{Caller, Condition, Join, OpenError, Order, Outcome, Reach, SlotJob, Take, Ticket, Token};

use demand::Failure;
use earliest::Earliest;
use effects::Effects;
use queue::Front;
use rules::Rules;
use slots::{Slots, StateCounts};
use waiters::Waiters;

/// The rules of the pool; see the module. `C` is a connection and `W` the handle by which a waiter is woken. The ledger
/// looks into neither.
pub(crate) struct Ledger<C, W> {
    /// The settings as they are now: `resize` and `set_min_idle` change them.
    rules: Rules,
    /// The latest time the ledger was told. Readings of a clock may arrive out of order, but the ledger's time never
    /// goes back.
    now: Moment,
    slots: Slots,
    /// The indexes of the free slots.
    free: Vec<u32>,
    /// The idle connections, the longest unused at the bottom. Sorted by `since`.
    idle: Vec<(u32, C)>,
    /// How many slots are in each state.
    counted: StateCounts,
    /// The waiters, notified or not.
    queue: Waiters<W>,
    /// The first waiter, if there is any.
    front: Option<Front>,
    /// The end of life of every connection that has one. Touched only when a connection is opened and when it is
    /// closed.
    lifetimes: BTreeSet<(Moment, u32)>,
    /// When the idle stack last changed other than at its top. A connection that such a change left without a place in
    /// the floor is due since then, and no longer.
    stack_changed_at: Moment,
    /// Connections that end up to this moment have been marked as `expiring_soon`.
    marked_until: Moment,
    /// The limit of every job that runs and has one.
    limits: BTreeSet<(Moment, u32)>,
    /// Until when each job is counted on. A job that is no longer counted on is not in it.
    patience: BTreeSet<(Moment, u32)>,
    /// The checks and opens of the executor's that are counted on, and since when they are under way.
    under_way: BTreeSet<(Moment, u32)>,
    /// The closes that run, and since when, of connections that `recycle` replaced.
    replaced: BTreeSet<(Moment, u32)>,
    /// The slots of stuck jobs.
    stuck: BTreeSet<u32>,
    /// Since when each checkout lasts for which no leak was reported. Empty without a `leak_threshold`.
    in_use_since: Earliest,
    /// Since when each idle connection was neither used nor known to be well. Empty without `keepalive`.
    unproven_since: Earliest,
    /// The least of what one look of the reaper does, if so much is due: see `batch`.
    least_batch: usize,
    /// How long an open usually takes. `None`: no open has succeeded yet.
    usual_open: Option<Duration>,
    /// A caller that does not wait has asked for a connection to be made ready.
    asked: bool,
    /// Since the last plan a slot has changed its state, other than between idle and in use.
    dirty: bool,
    /// How many jobs were abandoned and have not come back. Changed by `release_abandoned` and `came_back`.
    abandoned: u32,
    /// How many checks have failed since a connection was last known to be well.
    check_failures: u32,
    /// The present run of failed opens.
    failure: Option<Failure>,
    /// When the last open failed that did, and why. Kept when the run of failures is over.
    last_failed: Option<(Moment, FailedOpen)>,
    /// About the longest of the last thousand checkouts, in nanoseconds, and when that last grew.
    recent_use: u64,
    recent_use_grew: Moment,
    /// When a connection was last checked out or became idle: what waiters wait for.
    last_progress: Moment,
    /// When the first caller came since then that got nothing at once. Before `last_progress`: none has.
    starved_at: Moment,
    /// When the last such caller came.
    last_starved: Moment,
    /// When the server was last dialled.
    last_dial: Moment,
    next_id: u64,
    next_ticket: u64,
    /// How often all connections were declared outdated. Changed by `outdate`.
    generation: u64,
    /// How many connections were found dead; not counted by a pool that never checks. A connection that was last proven
    /// well before the last of them is suspect.
    /// (The ledger counts instead of comparing times, since the order of the steps is certain and a clock's is not.)
    found_dead: u64,
    /// When a caller that does not wait last asked for a connection. A connection that was used or checked since serves
    /// the next such caller, however late that comes. `NEVER`: no caller has asked.
    asked_at: Moment,
    /// The connection whose keepalive check goes on.
    keepalive: Option<u64>,
    /// When the reaper means to look again.
    alarm: Moment,
    closed: bool,
    /// How many threads, in `build` and `close`, want to know of changes.
    watchers: u32,
    pub(crate) effects: Effects<C, W>,
    pub(crate) tally: Tally,
}

impl<C, W: Clone> Ledger<C, W> {
    /// A pool that has no connection yet. Its floor is 0 until the warm-up calls
    /// [`set_min_idle`](Ledger::set_min_idle), once the first connection is known to work.
    pub(crate) fn new(settings: Settings, resolution: Duration) -> Self {
        Ledger {
            rules: Rules::new(Settings { min_idle: 0, ..settings }, resolution),
            now: Moment::BIRTH,
            slots: Slots::default(),
            free: Vec::new(),
            idle: Vec::new(),
            counted: StateCounts::default(),
            queue: Waiters::new(),
            front: None,
            lifetimes: BTreeSet::new(),
            stack_changed_at: Moment::BIRTH,
            marked_until: Moment::BIRTH,
            limits: BTreeSet::new(),
            patience: BTreeSet::new(),
            under_way: BTreeSet::new(),
            replaced: BTreeSet::new(),
            stuck: BTreeSet::new(),
            in_use_since: Earliest::new(),
            unproven_since: Earliest::new(),
            least_batch: expiry::LEAST_BATCH,
            usual_open: None,
            asked: false,
            dirty: false,
            abandoned: 0,
            check_failures: 0,
            failure: None,
            last_failed: None,
            recent_use: 0,
            recent_use_grew: Moment::BIRTH,
            last_progress: Moment::BIRTH,
            starved_at: Moment::BIRTH,
            last_starved: Moment::BIRTH,
            last_dial: Moment::BIRTH,
            next_id: 1,
            next_ticket: 0,
            generation: 0,
            found_dead: 0,
            asked_at: Moment::NEVER,
            keepalive: None,
            alarm: Moment::NEVER,
            closed: false,
            watchers: 0,
            effects: Effects::default(),
            tally: Tally::default(),
        }
    }

    // ---------------------------------------------------------------------------------------------- looking

    /// The settings as they are now.
    pub(crate) fn rules(&self) -> &Settings {
        &self.rules
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            idle: self.counted.idle(),
            in_use: self.counted.in_use(),
            checking: self.counted.own_checks() + self.counted.checks(),
            opening: self.counted.opens(),
            closing: self.counted.closes(),
            waiting: self.waiting(),
            abandoned: self.abandoned,
        }
    }

    /// The slots that are not free.
    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.id != 0)
    }

    /// Whether as many connections are idle as `min_idle` asks for.
    pub(crate) fn floor_stands(&self) -> bool {
        self.idle.len() as u32 >= self.rules.min_idle.min(self.rules.max_size)
    }

    /// Whether the pool is closed and nothing will be due, so that the reaper can end. If a job's limit begins later,
    /// it sets an alarm of its own.
    pub(crate) fn is_over(&self) -> bool {
        let counts = self.counts();
        self.closed && counts.checking + counts.closing == 0 && self.limits.is_empty()
    }

    /// The reaper asks whether it can end. If so, the alarm that woke it is over, so that whatever sets a later one wakes it
    /// again.
    pub(crate) fn reaper_ends(&mut self) -> bool {
        let ends = self.is_over();
        if ends {
            self.alarm = Moment::NEVER;
        }
        ends
    }

    /// The reaper was woken after its end, and has not come. The alarm that woke it is over as well.
    pub(crate) fn lacks_reaper(&mut self) {
        self.alarm = Moment::NEVER;
    }

    /// When the reaper is to call [`reap`](Ledger::reap) next.
    pub(crate) fn alarm(&self) -> Moment {
        self.alarm
    }

    // ---------------------------------------------------------------------------------------------- one step

    /// One step: `act`, and then the plan, unless it would find nothing to do.
    #[inline]
    fn step<R>(&mut self, now: Moment, act: impl FnOnce(&mut Self, Moment) -> R) -> R {
        let now = self.tick(now);
        let answer = act(self, now);
        if self.dirty || self.asked || self.front.is_some() || self.may_open_for_the_floor() {
            self.plan(now);
        }
        answer
    }

    /// Whether the plan could order an open for the floor: the floor is short of one, and there is room for it.
    #[inline]
    fn may_open_for_the_floor(&self) -> bool {
        self.rules.min_idle > 0
            && self.slots.len() - self.free.len() < self.rules.max_size as usize
            && self.wants_open(0, None)
    }

    #[inline]
    fn tick(&mut self, now: Moment) -> Moment {
        if now > self.now {
            self.now = now;
        }
        self.now
    }

    /// Has the reaper look again at once.
    pub(crate) fn look_again(&mut self) {
        self.arm(self.now);
    }

    /// Has the reaper look again at `at`, if it means to sleep longer.
    #[inline]
    fn arm(&mut self, at: Moment) {
        if at < self.alarm {
            self.alarm = at;
            self.effects.wake_reaper = true;
        }
    }

    /// Wakes the reaper if it is no longer needed, so that it ends.
    fn note_if_over(&mut self) {
        if self.is_over() {
            self.arm(self.now);
        }
    }
}
