//! The [`Ledger`]: every rule of the pool, and nothing else.
//!
//! A plain value. Each method is told the time (`now`) and says what is to be done; none reads a clock, takes a lock,
//! starts a thread, does I/O, draws a random number or calls a user's code. So a year of a pool's life runs in a test in
//! seconds, and each rule stands in one place:
//!
//! | rule | where |
//! |---|---|
//! | who gets a connection next | [`supply`](Ledger::supply): the first in the queue, or the idle stack |
//! | who may pass those who wait | [`is_handed_off`](Ledger::is_handed_off), [`may_barge`](Ledger::may_barge) |
//! | what is checked and opened, and when | [`plan`](Ledger::plan), at the end of every step: for those who wait, then for the floor |
//! | whether another open is wanted | [`wants_open`](Ledger::wants_open), asked by `plan`, and again before it dials |
//! | whether the server may be dialled | [`dial_at`](Ledger::dial_at): the bound, the back-off, the jobs written off |
//! | who is no longer counted on | [`stop_counting_on`](Ledger::stop_counting_on): an open, check or close that takes longer than usual |
//! | what is closed for idleness | [`idle_deadline`](Ledger::idle_deadline): what lies above the floor in the stack |
//! | what is too old | [`Slot::dies`], looked at on checkout, on return and by [`reap`](Ledger::reap) |
//! | what must be checked first | [`needs_check`](Ledger::needs_check) |
//!
//! Every public method that changes something is one [`step`](Ledger::step): it ends with the plan, so that none can
//! forget somebody who waits. Every slot is in one [`State`], which carries what is true in that state only; the slots
//! are counted by state where the state is set ([`set`](Ledger::set)), and nowhere else, so that no slot is ever counted
//! twice or not at all.
//!
//! What is to be done comes out in two ways: as the return value, where it concerns the caller alone, and in the
//! [`Effects`], for everybody else (served to waiters, orders to the crew, a bell for the reaper). The caller empties the
//! effects before it lets go of the lock, so a waiter is at any time either queued or granted, never in between.
//!
//! # Those who wait, and those who run
//!
//! To hand every connection that comes back to the first in the queue is fair, and slow where connections are held
//! for less time than it takes to wake a thread: each then lies unused until its new caller runs. To let whoever runs
//! take it is fast, and starves those who sleep. The rule here lies between. A connection that comes back is **handed
//! over** if the first in the queue has the right of way: it was barged four times and has been first
//! for 20 us, or it has waited for [`fair_after`](Rules::fair_after). Otherwise the
//! connection goes to the idle stack and the next waiter is **called**: it keeps its place, is woken, and comes to
//! [`take_notified`](Ledger::take_notified) what is there. Not more of them are called than there are connections for, so whoever is
//! woken in vain is so because others were faster. Meanwhile a running thread may take the connection, unless the first has waited for
//! `fair_after`. Zero is strict: everything is handed over, nobody passes.
//!
//! One who is called and gives up, or gets another connection before it came, leaves the call to the next.
//!
//! A slot of the pool is a linear [`Token`]: made by an order to open, not cloneable, and spent by exactly one of
//! `checkin`, `detach`, `opened`, `checked` or `free`. A job that took too long loses its slot; the token it comes back
//! with is then stale, which the ledger sees by the id.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;
use std::time::Duration;

use crate::leaf::clock::Moment;
use crate::stats::{CloseReason, ConnectionState, Tally};

/// When a connection is checked before it is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validate {
    /// Before every checkout, as r2d2's `test_on_check_out(true)` does.
    Always,
    /// When it was neither used nor checked for at least this long, or when another connection has been found dead since
    /// it was last known to be well. The default, with one second. Zero is the same as `Always`.
    AfterIdle(Duration),
    /// Never, not even on suspicion.
    Never,
}

/// The limits a ledger keeps. Durations too long to be added to a moment mean "never".
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) max_size: u32,
    pub(crate) min_idle: u32,
    pub(crate) max_idle: Option<Duration>,
    pub(crate) max_lifetime: Option<Duration>,
    /// The greatest part of `max_lifetime` that is taken off at a connection's birth, 0 to 1.
    pub(crate) lifetime_jitter: f64,
    pub(crate) validate: Validate,
    pub(crate) validation_timeout: Duration,
    pub(crate) open_timeout: Duration,
    pub(crate) close_timeout: Duration,
    pub(crate) parallel_opens: u32,
    pub(crate) max_waiting: Option<u32>,
    pub(crate) keepalive: Option<Duration>,
    pub(crate) leak_threshold: Option<Duration>,
    /// Once the first in the queue has waited for so long nobody passes it. Zero: nobody ever does.
    pub(crate) fair_after: Duration,
    /// How far behind the true time a `now` may be. Folded into every test for age, so that nothing is served late.
    pub(crate) resolution: Duration,
}

/// The first in the queue is handed what comes back once it was barged so often...
const BARGES: u32 = 4;
/// ... and has been first for so long.
const FIRST_FOR: Duration = Duration::from_micros(20);
/// How long before the end of its life a floor connection is replaced: a twentieth of it, at most this.
const MAX_REPLACEMENT_LEAD: Duration = Duration::from_secs(5);

/// The shortest pause after a failed open, and the first of those that double.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// The longest pause between opens while somebody waits.
const BACKOFF_WAITED_FOR: Duration = Duration::from_secs(1);
/// The longest pause between opens while nobody does.
const BACKOFF_LONGEST: Duration = Duration::from_secs(30);
/// The first pause after a permanent refusal. A password is not mended in milliseconds, and a server may lock the
/// account of those who hammer it.
const BACKOFF_REFUSED: Duration = Duration::from_secs(5);
/// How long those who wait count on a check or a reset that goes on. One that takes longer may hang: then another
/// connection is checked or opened for them beside it, where there is room.
const CHECK_PATIENCE: Duration = Duration::from_millis(100);
/// How long they count on an open: so many times as long as it usually takes...
const OPEN_PATIENCE: u32 = 3;
/// ... but at least so long, for a server that has much to do is not helped by being dialled again...
const OPEN_PATIENCE_LEAST: Duration = Duration::from_millis(250);
/// ... and so long while nothing is known of what is usual.
const OPEN_PATIENCE_FIRST: Duration = Duration::from_secs(1);
/// How long a close counts among those that run side by side. It takes a millisecond or two; one that takes longer may
/// hang, and must not hold up the next by more than what is scheduling noise anyway. (The crew runs one more for each that
/// takes longer, so that with every such pause twice as many have begun.)
const CLOSE_PATIENCE: Duration = Duration::from_millis(3);
/// The part of `close_timeout` that a connection which was replaced (`recycle`) may take to close if somebody waits for
/// its place: the server it leads to may be the one that failed.
const REPLACED_PATIENCE: u32 = 10;
/// The least time between two dials once as many jobs as the pool has slots are written off and have not come back, and the
/// last dial did not come through; or more than as many.
const PROBE_PERIOD: Duration = Duration::from_secs(60);

/// Who holds a connection: where in the user's code it was checked out, and on which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) at: &'static Location<'static>,
    pub(crate) thread: u64,
}

/// One slot of the pool in the hands of whoever has this. Spent by handing it back to the ledger.
#[derive(Debug)]
#[must_use = "a token that is dropped takes its slot with it"]
pub(crate) struct Token {
    index: u32,
    id: u64,
}

impl Token {
    /// The number of the connection, or of the attempt to open one. Never used again within a pool.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

/// A place in the queue. Lower is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket {
    number: u64,
    /// When it was drawn: who leaves the queue for a check of its own and comes back has waited all the while.
    since: Moment,
}

/// What the ledger knows of one slot.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// 0: the slot is free.
    pub(crate) id: u64,
    state: State,
    /// Where it is counted for that: its index in the counted.
    counted: u8,
    /// When it took its state; for an idle connection since when it is unused.
    pub(crate) since: Moment,
    /// Since when it is unused, while it is idle, and while it is checked for maintenance, which is not use.
    unused_since: Moment,
    /// When `connect` began.
    pub(crate) born: Moment,
    /// Not handed out from this moment on.
    dies: Moment,
    /// When it was last known to be well.
    proven: Moment,
    /// How many had been found dead when what proved that began...
    proven_after: u64,
    /// ... and when what goes on now did.
    begun_after: u64,
    /// How often `recycle` had been called when `connect` began.
    generation: u64,
    pub(crate) uses: u64,
    pub(crate) caller: Option<Caller>,
    /// When the job that has this slot is written off.
    limit: Moment,
    /// Until when the job that has this slot is counted on.
    patience: Moment,
}

impl Slot {
    /// The state as users know it.
    pub(crate) fn as_seen(&self) -> ConnectionState {
        match self.state {
            State::Idle { .. } => ConnectionState::Idle,
            State::InUse { .. } => ConnectionState::InUse,
            State::Checking { .. } => ConnectionState::Checking,
            State::Opening { .. } => ConnectionState::Opening,
            State::Closing { .. } | State::Free => ConnectionState::Closing,
        }
    }
}

/// What a slot is in, with what is true in it only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// `expiring_soon`: it ends within the replacement lead, so the floor no longer counts on it.
    Idle {
        expiring_soon: bool,
    },
    /// `warned`: a leak was reported for this checkout.
    InUse {
        warned: bool,
    },
    /// `slow`: it takes so long that those who wait no longer count on it. So for an open.
    Checking {
        by: Check,
        slow: bool,
    },
    Opening {
        slow: bool,
    },
    Closing(Close),
}

/// What is done to a connection in [`State::Checking`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// A worker validates it, for itself.
    Own,
    /// The crew validates it, for whoever comes first.
    Crew,
    /// The crew resets it.
    Reset,
}

/// How far a close is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Close {
    /// Ordered, and due since then if it is an eviction.
    Ordered { due: Moment },
    /// It runs, or the job in which the open, check or reset failed runs what comes before it.
    Runs,
    /// Past its limit, and its slot could not be given up.
    Stuck,
}

/// How many slots are in each state. Changed by [`Ledger::set`] and nothing else.
#[derive(Clone, Debug, Default)]
struct StateCounts([u32; 11]);

impl StateCounts {
    const FREE: usize = 0;
    const IDLE: usize = 1;
    const EXPIRING_SOON: usize = 2;
    const IN_USE: usize = 3;
    const OWN_CHECK: usize = 4;
    const CHECK: usize = 5;
    const SLOW_CHECK: usize = 6;
    const OPENING: usize = 7;
    const SLOW_OPENING: usize = 8;
    const CLOSE_ORDERED: usize = 9;
    const CLOSING: usize = 10;

    #[inline]
    fn of(state: State) -> usize {
        match state {
            State::Free => Self::FREE,
            State::Idle { expiring_soon: false } => Self::IDLE,
            State::Idle { expiring_soon: true } => Self::EXPIRING_SOON,
            State::InUse { .. } => Self::IN_USE,
            State::Checking { by: Check::Own, .. } => Self::OWN_CHECK,
            State::Checking { slow: false, .. } => Self::CHECK,
            State::Checking { slow: true, .. } => Self::SLOW_CHECK,
            State::Opening { slow: false } => Self::OPENING,
            State::Opening { slow: true } => Self::SLOW_OPENING,
            State::Closing(Close::Ordered { .. }) => Self::CLOSE_ORDERED,
            State::Closing(Close::Runs | Close::Stuck) => Self::CLOSING,
        }
    }

    /// Checks and resets by the crew, slow ones included.
    fn checks(&self) -> u32 {
        self.0[Self::CHECK] + self.0[Self::SLOW_CHECK]
    }

    fn opens(&self) -> u32 {
        self.0[Self::OPENING] + self.0[Self::SLOW_OPENING]
    }

    fn closes(&self) -> u32 {
        self.0[Self::CLOSE_ORDERED] + self.0[Self::CLOSING]
    }

    fn idle(&self) -> u32 {
        self.0[Self::IDLE] + self.0[Self::EXPIRING_SOON]
    }

    /// All that `max_size` bounds.
    fn total(&self) -> u32 {
        self.0[1..].iter().sum()
    }

    /// Connections that will or may come to the next in the queue.
    fn alive(&self) -> u32 {
        self.total() - self.closes() - self.opens()
    }
}

/// What becomes of a waiter.
#[derive(Debug)]
pub(crate) enum Outcome<C> {
    /// A connection, lent to it.
    Connection(Token, C),
    /// The pool was closed.
    Closed,
    /// The server refuses for a reason that will not go away by waiting, and no connection is alive.
    Refused,
}

/// What the crew is to do.
#[derive(Debug)]
pub(crate) enum Order<C> {
    Open(Token),
    Check(Token, C),
    /// With who had it last.
    Reset(Token, C, Option<Caller>),
    Close(Token, C, CloseReason),
    /// The job that has this slot is past its limit: abort it if that can be done, and replace its thread. `was`: what
    /// it was doing, for words only.
    Abandon {
        id: u64,
        was: ConnectionState,
        limit: Duration,
        /// Whether the server may be at work for it, and is to be asked to stop.
        cancel: bool,
    },
    /// The close of this connection takes longer than usual: it is no longer one of those that run side by side.
    Slow {
        id: u64,
    },
    /// A connection was out for longer than `leak_threshold`.
    Leak {
        id: u64,
        caller: Option<Caller>,
        held: Duration,
    },
}

/// What is to be done for others than the caller. To be emptied before the lock is released.
#[derive(Debug)]
pub(crate) struct Effects<C, W> {
    pub(crate) served: Vec<(W, Outcome<C>)>,
    /// Those who are called to [`take_notified`](Ledger::take_notified) a connection.
    pub(crate) notified: Vec<W>,
    pub(crate) orders: Vec<Order<C>>,
    /// The reaper sleeps too long: wake it.
    pub(crate) wake_reaper: bool,
    /// Something changed that `build` or `close` may wait for.
    pub(crate) changed: bool,
}

impl<C, W> Effects<C, W> {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // One test instead of five: asked after every checkout and checkin, and hardly ever not.
        (self.notified.len() | self.served.len() | self.orders.len() | usize::from(self.wake_reaper | self.changed))
            == 0
    }

    #[inline]
    pub(crate) fn is_empty_but_for_notified(&self) -> bool {
        (self.served.len() | self.orders.len() | usize::from(self.wake_reaper | self.changed)) == 0
    }
}

/// What an attempt to take an idle connection came to.
#[derive(Debug)]
pub(crate) enum Take<C> {
    Ready(Token, C),
    /// To be validated by the caller itself, which has said that it can, and which holds this place in the queue.
    Check(Token, C, Ticket),
    Nothing,
}

/// What a wish to wait came to.
#[derive(Debug)]
pub(crate) enum Join<C> {
    Ready(Token, C),
    Queued(Ticket),
    Closed,
    Refused,
    /// As many wait as may.
    TooMany(u32),
}

/// How a connection comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Keep,
    /// To be cleaned by the crew before anyone gets it.
    Reset,
    /// To be closed, for this reason; says nothing of others.
    Discard(CloseReason),
    /// Found dead: its siblings are suspect.
    Broken,
    /// Everything that is older than now is to be replaced, itself included.
    Outdated,
}

struct Waiter<W> {
    seat: W,
    caller: Caller,
    since: Moment,
}

/// The first in the queue.
#[derive(Clone, Copy, Debug)]
struct Front {
    ticket: Ticket,
    /// When it joined.
    since: Moment,
    /// When it became the first.
    first_since: Moment,
    /// How often others got a connection since then.
    barged: u32,
}

/// A run of failed opens.
#[derive(Clone, Copy, Debug)]
struct Failure {
    count: u32,
    last: Moment,
    permanent: bool,
    /// Not dialled before.
    retry: Moment,
}

/// The counts of slots by state, and what else there is to be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) idle: u32,
    pub(crate) in_use: u32,
    pub(crate) checking: u32,
    pub(crate) opening: u32,
    pub(crate) closing: u32,
    pub(crate) waiting: u32,
    pub(crate) abandoned: u32,
}

/// The rules of the pool; see the module. `C` is a connection, `W` the seat of a waiting thread: it looks into neither.
pub(crate) struct Ledger<C, W> {
    rules: Rules,
    /// The latest time it was told. Readings of a clock may arrive out of order; time here does not go back.
    now: Moment,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Unused connections, the longest unused at the bottom. Sorted by `since`.
    idle: Vec<(u32, C)>,
    /// The slots by state.
    counted: StateCounts,
    /// Those who wait and are not called.
    queue: BTreeMap<Ticket, Waiter<W>>,
    /// Those who wait and are called.
    notified: BTreeMap<Ticket, Waiter<W>>,
    /// The first of both, if anybody waits.
    front: Option<Front>,
    /// The end of life of every connection that has one, touched at its birth and death only.
    lifetimes: BTreeSet<(Moment, u32)>,
    /// When the stack last changed other than at its top: what is due for that reason only is due since then.
    stack_changed_at: Moment,
    /// Up to which end of life connections have been marked as `expiring_soon`.
    marked_until: Moment,
    /// The limit of every job that runs.
    limits: BTreeSet<(Moment, u32)>,
    /// Until when each job is counted on that still is.
    patience: BTreeSet<(Moment, u32)>,
    /// How long an open usually takes.
    usual_open: Option<Duration>,
    /// Somebody who does not wait has asked for a connection to be made ready.
    asked: bool,
    /// A slot has changed its state, other than between idle and out, since the last plan.
    dirty: bool,
    /// Jobs written off that have not come back.
    abandoned: u32,
    /// Checks that failed since the last connection was known to be well.
    check_failures: u32,
    failure: Option<Failure>,
    last_dial: Moment,
    next_id: u64,
    next_ticket: u64,
    generation: u64,
    /// How many connections were found dead. What was proven before the last of them is suspect. (Counted, not dated: what
    /// came before what is known by the order of the steps, and by no clock.)
    found_dead: u64,
    /// When one who does not wait last asked for a connection. What was used or checked since serves the next, however
    /// late it comes. `NEVER`: nobody has asked.
    asked_at: Moment,
    /// The slot whose keepalive goes on.
    keepalive: Option<u64>,
    /// When the reaper means to look again.
    alarm: Moment,
    closed: bool,
    /// Threads in `build` and `close` that want to know of changes.
    pub(crate) watchers: u32,
    pub(crate) effects: Effects<C, W>,
    pub(crate) tally: Tally,
}

impl<C, W: Clone> Ledger<C, W> {
    pub(crate) fn new(rules: Rules) -> Self {
        Ledger {
            rules,
            now: Moment::BIRTH,
            slots: Vec::new(),
            free: Vec::new(),
            idle: Vec::new(),
            counted: StateCounts::default(),
            queue: BTreeMap::new(),
            notified: BTreeMap::new(),
            front: None,
            lifetimes: BTreeSet::new(),
            stack_changed_at: Moment::BIRTH,
            marked_until: Moment::BIRTH,
            limits: BTreeSet::new(),
            patience: BTreeSet::new(),
            usual_open: None,
            asked: false,
            dirty: false,
            abandoned: 0,
            check_failures: 0,
            failure: None,
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
            effects: Effects {
                served: Vec::new(),
                notified: Vec::new(),
                orders: Vec::new(),
                wake_reaper: false,
                changed: false,
            },
            tally: Tally::default(),
        }
    }

    // ---------------------------------------------------------------------------------------------- looking

    pub(crate) fn rules(&self) -> &Rules {
        &self.rules
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            idle: self.counted.idle(),
            in_use: self.counted.0[StateCounts::IN_USE],
            checking: self.counted.0[StateCounts::OWN_CHECK] + self.counted.checks(),
            opening: self.counted.opens(),
            closing: self.counted.closes(),
            waiting: self.waiting(),
            abandoned: self.abandoned,
        }
    }

    /// How many wait, called or not.
    pub(crate) fn waiting(&self) -> u32 {
        (self.queue.len() + self.notified.len()) as u32
    }

    /// The slots in use.
    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|r| r.id != 0)
    }

    /// Whether opens fail at present.
    pub(crate) fn is_failing(&self) -> bool {
        self.failure.is_some()
    }

    /// Whether the floor stands: as many idle as `min_idle` asks for.
    pub(crate) fn floor_stands(&self) -> bool {
        self.idle.len() as u32 >= self.rules.min_idle.min(self.rules.max_size)
    }

    /// Whether the pool is closed and nothing will be due, so that nobody need keep time. A limit that begins later sets
    /// an alarm of its own.
    pub(crate) fn is_over(&self) -> bool {
        let counts = self.counts();
        self.closed && counts.checking + counts.closing == 0 && self.limits.is_empty()
    }

    /// When the reaper is to call [`reap`](Ledger::reap) next.
    pub(crate) fn alarm(&self) -> Moment {
        self.alarm
    }

    /// Whether the server has refused for good, as far as is known.
    pub(crate) fn is_refusing(&self) -> bool {
        self.failure.is_some_and(|f| f.permanent)
    }

    // ---------------------------------------------------------------------------------------------- one step

    /// One step: what `act` changes, then the plan for what has become of it.
    #[inline]
    fn step<R>(&mut self, now: Moment, act: impl FnOnce(&mut Self, Moment) -> R) -> R {
        let now = self.tick(now);
        let answer = act(self, now);
        if self.dirty || self.asked || self.front.is_some() || self.rules.min_idle > 0 {
            self.plan(now);
        }
        answer
    }

    #[inline]
    fn tick(&mut self, now: Moment) -> Moment {
        if now > self.now {
            self.now = now;
        }
        self.now
    }

    /// Sees to it that those who wait are served and the floor stands, as far as the rules allow at this moment; and that
    /// the reaper looks again when they will allow more.
    fn plan(&mut self, now: Moment) {
        self.dirty = false;
        self.stop_counting_on(now);
        if !self.closed {
            if self.front.is_some() && self.is_refused(now) {
                self.dismiss_queue(now, || Outcome::Refused);
            }
            let demand = self.plan_checks(now);
            self.plan_opens(now, demand);
            if demand > 0 || self.watchers > 0 {
                self.arm_for_patience();
            }
        }
        if self.counted.0[StateCounts::CLOSE_ORDERED] > 0 {
            self.arm_for_patience();
        }
    }

    /// Calls those for whom something is ready, and has checked for the others what is idle and needs it. Returns how many
    /// connections are then wanted beside what is ready.
    fn plan_checks(&mut self, now: Moment) -> u32 {
        loop {
            let ready = self.ready(now);
            self.notify(ready);
            self.asked &= ready == 0;
            let demand = self.demand_beside(ready);
            // After a check that failed more are checked than are wanted, doubling with every further failure.
            let ahead = if self.check_failures == 0 {
                0
            } else {
                1u32.checked_shl(self.check_failures - 1).unwrap_or(u32::MAX)
            };
            let enough = self.counted.0[StateCounts::CHECK] >= demand.saturating_add(ahead);
            if demand == 0 || enough || !self.start_next_check(ready, now) {
                return demand;
            }
        }
    }

    /// Orders opens, as long as one is wanted and may be dialled.
    fn plan_opens(&mut self, now: Moment, demand: u32) {
        while self.wants_open(demand, None) {
            let at = self.dial_at(now);
            if at <= now {
                self.order_open(now);
            } else if demand == 0 || !self.make_room(now) {
                return self.arm(at);
            }
        }
    }

    /// Whether another open is wanted for this demand: for those who wait, who count on every check and open that does not
    /// take longer than usual; and for the floor, which counts on what is idle and lasts and on all that comes without
    /// anybody waiting for it. The one rule for refill and for replacement. `beside`: this one, slow or not, is not counted.
    fn wants_open(&self, demand: u32, beside: Option<bool>) -> bool {
        let mut quick = self.counted.0[StateCounts::OPENING];
        let mut slow = self.counted.0[StateCounts::SLOW_OPENING];
        match beside {
            Some(true) => slow -= 1,
            Some(false) => quick -= 1,
            None => {}
        }
        // One more is dialled than is waited for, not one after another: a server that answers to none is not helped, and
        // those that hang take slots.
        let counted_on = quick + slow.saturating_sub(1) + self.counted.0[StateCounts::CHECK];
        // After a check that failed an open is among what is under way: six dead connections cost one connect, not six
        // timeouts in a slot.
        let missed = self.check_failures > 0 && quick + slow == 0;
        let users = demand > 0 && (missed || counted_on < demand);
        // (`build` waits for the floor.)
        let slow = slow.saturating_sub(u32::from(self.watchers > 0));
        let coming = quick + slow + self.counted.checks();
        users || self.counted.0[StateCounts::IDLE] + coming.saturating_sub(demand) < self.rules.min_idle
    }

    /// How many wait, or have asked, for whom nothing is ready.
    fn demand(&self, now: Moment) -> u32 {
        self.demand_beside(self.ready(now))
    }

    fn demand_beside(&self, ready: usize) -> u32 {
        self.waiting() - self.notified.len().min(ready) as u32 + u32::from(self.asked && ready == 0)
    }

    /// How many of the idle, from the top, could be handed out as they are. Looks at no more than are waited for.
    fn ready(&self, now: Moment) -> usize {
        let wanted = (self.waiting() as usize).max(1);
        let slots = self.idle.iter().rev().take(wanted).map(|&(index, _)| &self.slots[index as usize]);
        slots.take_while(|slot| !self.is_expired(slot, now) && !self.needs_check(slot, now)).count()
    }

    /// Calls those who come next, if more connections are ready than are called for.
    fn notify(&mut self, ready: usize) {
        while self.notified.len() < ready {
            let Some((ticket, waiter)) = self.queue.pop_first() else { return };
            self.effects.notified.push(waiter.seat.clone());
            self.notified.insert(ticket, waiter);
        }
    }

    /// Has the crew check the idle connection that would be handed out after those that are `ready`. `false`: there is none.
    fn start_next_check(&mut self, ready: usize, now: Moment) -> bool {
        while let Some(at) = self.idle.len().checked_sub(ready + 1) {
            let (index, conn) = self.idle.remove(at);
            let slot = &self.slots[index as usize];
            if self.is_expired(slot, now) {
                let due = slot.dies;
                self.close_due(index, conn, CloseReason::Lifetime, now, due);
                continue;
            }
            let token = Token { index, id: slot.id };
            self.start_check(index, now, Check::Crew);
            self.effects.orders.push(Order::Check(token, conn));
            return true;
        }
        false
    }

    /// Whatever takes longer than usual is no longer counted on.
    fn stop_counting_on(&mut self, now: Moment) {
        while let Some(&(until, index)) = self.patience.first() {
            if until > now {
                return;
            }
            self.patience.pop_first();
            let slot = &mut self.slots[index as usize];
            slot.patience = Moment::NEVER;
            let (id, state) = (slot.id, slot.state);
            match state {
                State::Opening { .. } => self.set(index, State::Opening { slow: true }),
                State::Checking { by, .. } => self.set(index, State::Checking { by, slow: true }),
                State::Closing(_) => self.effects.orders.push(Order::Slow { id }),
                State::Free | State::Idle { .. } | State::InUse { .. } => unreachable!("only jobs are counted on"),
            }
        }
    }

    fn arm_for_patience(&mut self) {
        if let Some(&(until, _)) = self.patience.first() {
            self.arm(until);
        }
    }

    /// Counts on the job that has this slot until then.
    fn count_on(&mut self, index: u32, until: Moment) {
        self.end_patience(index);
        if until != Moment::NEVER {
            self.slots[index as usize].patience = until;
            self.patience.insert((until, index));
        }
    }

    fn end_patience(&mut self, index: u32) {
        let until = std::mem::replace(&mut self.slots[index as usize].patience, Moment::NEVER);
        if until != Moment::NEVER {
            self.patience.remove(&(until, index));
        }
    }

    /// How long an open is counted on.
    fn open_patience(&self) -> Duration {
        match self.usual_open {
            Some(usual) => usual.saturating_mul(OPEN_PATIENCE).max(OPEN_PATIENCE_LEAST),
            None => OPEN_PATIENCE_FIRST,
        }
    }

    // ---------------------------------------------------------------------------------------------- checkout

    /// Takes an idle connection if one may be handed out at this moment. One that needs a check comes as
    /// [`Take::Check`] to a caller that can check `here`, and not at all to another.
    #[inline]
    pub(crate) fn take(&mut self, now: Moment, caller: Caller, here: bool) -> Take<C> {
        self.step(now, |l, now| l.take_idle(now, caller, here))
    }

    #[inline]
    fn take_idle(&mut self, now: Moment, caller: Caller, here: bool) -> Take<C> {
        if self.closed || !self.may_barge(now) {
            return Take::Nothing;
        }
        let Some((index, check)) = self.top(now) else { return Take::Nothing };
        // What others wait for is not taken out for a check by one who came later.
        if check && (!here || self.front.is_some()) {
            return Take::Nothing;
        }
        let conn = self.pop_idle();
        let token = Token { index, id: self.slots[index as usize].id };
        if check {
            self.start_check(index, now, Check::Own);
            self.slots[index as usize].caller = Some(caller);
            Take::Check(token, conn, self.ticket(now))
        } else {
            if let Some(front) = &mut self.front {
                front.barged += 1;
            }
            self.check_out(index, now, caller);
            Take::Ready(token, conn)
        }
    }

    /// [`take`](Ledger::take) for a caller that can wait for nothing, not even a check. What is only stale comes as
    /// [`Take::Check`], to be looked at without asking the server, and then [`seen`](Ledger::looked_at).
    pub(crate) fn take_at_once(&mut self, now: Moment, caller: Caller) -> Take<C> {
        self.step(now, |l, now| {
            if let Take::Ready(token, conn) = l.take_idle(now, caller, false) {
                l.asked_at = now;
                return Take::Ready(token, conn);
            }
            if !l.closed && l.front.is_none() {
                if let Some((index, _)) = l.top(now) {
                    let is_suspect = l.is_suspect(&l.slots[index as usize]);
                    if matches!(l.rules.validate, Validate::AfterIdle(_)) && !is_suspect {
                        let conn = l.pop_idle();
                        l.start_check(index, now, Check::Own);
                        let slot = &mut l.slots[index as usize];
                        slot.caller = Some(caller);
                        return Take::Check(Token { index, id: slot.id }, conn, l.ticket(now));
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

    /// Takes what needs a check, if one that was made since somebody asked in vain serves for it.
    fn take_checked(&mut self, now: Moment, caller: Caller) -> Option<(Token, C)> {
        let (index, _) = self.top(now)?;
        if !self.serves_who_asked(index) {
            return None;
        }
        let conn = self.pop_idle();
        self.asked_at = now;
        self.check_out(index, now, caller);
        Some((Token { index, id: self.slots[index as usize].id }, conn))
    }

    /// The caller has looked at what it took [at once](Ledger::take_at_once), which seems `well`, or of which nothing is to
    /// be seen. `None`: it may not have it; then the crew checks it, for the next.
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
            if l.may_barge(now) && (well || l.serves_who_asked(index)) {
                l.asked_at = now;
                l.check_out(index, now, caller);
                return Some((token, conn));
            }
            l.note_asked(now);
            l.supply(index, conn, now, false);
            l.ask();
            None
        })
    }

    /// One who does not wait has found nothing. What is under way by now, and counted on, was ordered for one like it.
    fn note_asked(&mut self, now: Moment) {
        let under_way = self.slots().filter(|slot| match slot.state {
            State::Checking { by, slow } => by != Check::Own && !slow,
            State::Opening { slow } => !slow,
            _ => false,
        });
        self.asked_at = under_way.map(|slot| slot.since).min().unwrap_or(now);
    }

    /// Whether a connection that needs a check may do without for one who cannot wait for it: it was found well since the
    /// last of them asked, and nothing has been found dead since.
    fn serves_who_asked(&self, index: u32) -> bool {
        let slot = &self.slots[index as usize];
        !self.is_suspect(slot)
            && match self.rules.validate {
                Validate::Never => true,
                // A check for every use: it was not used since.
                Validate::Always => {
                    slot.proven >= self.asked_at && (slot.uses == 0 || slot.proven >= slot.unused_since)
                }
                Validate::AfterIdle(_) => slot.unused_since.max(slot.proven) >= self.asked_at,
            }
    }

    /// The idle connection that would be handed out next, and whether it needs a check. Those before it that have
    /// expired are closed.
    #[inline]
    fn top(&mut self, now: Moment) -> Option<(u32, bool)> {
        while let Some(&(index, _)) = self.idle.last() {
            let slot = &self.slots[index as usize];
            if !self.is_expired(slot, now) {
                return Some((index, self.needs_check(slot, now)));
            }
            self.expire_top(index, now);
        }
        None
    }

    /// Queues for a connection, at `ticket` if the caller has held a place before. Asks for what it takes to serve it.
    /// `hurried`: it may not have the time to wait for a check, and takes one that was made for one like it.
    pub(crate) fn join(
        &mut self,
        now: Moment,
        caller: Caller,
        ticket: Option<Ticket>,
        hurried: bool,
        seat: W,
    ) -> (Join<C>, Option<W>) {
        self.step(now, |l, now| {
            if l.closed {
                return (Join::Closed, Some(seat));
            }
            if let Take::Ready(token, conn) = l.take_idle(now, caller, false) {
                return (Join::Ready(token, conn), Some(seat));
            }
            if hurried && l.front.is_none() {
                if let Some((token, conn)) = l.take_checked(now, caller) {
                    return (Join::Ready(token, conn), Some(seat));
                }
            }
            if l.is_refused(now) {
                return (Join::Refused, Some(seat));
            }
            let waiting = l.waiting();
            if l.rules.max_waiting.is_some_and(|max| waiting >= max) {
                if waiting == 0 {
                    // Where nobody waits, nobody waits for a check.
                    if let Some((token, conn)) = l.take_checked(now, caller) {
                        return (Join::Ready(token, conn), Some(seat));
                    }
                    l.note_asked(now);
                }
                l.tally.rejected += 1;
                l.ask();
                return (Join::TooMany(waiting), Some(seat));
            }
            if waiting == 0 {
                l.shorten_back_off(now);
            }
            // (One that comes again and again wants one, not one more each time.)
            l.asked &= !hurried;
            let ticket = ticket.unwrap_or_else(|| l.ticket(now));
            l.queue.insert(ticket, Waiter { seat, caller, since: ticket.since });
            if l.front.is_none_or(|front| ticket < front.ticket) {
                l.front = Some(Front { ticket, since: ticket.since, first_since: now, barged: 0 });
            }
            l.tally.waits += 1;
            (Join::Queued(ticket), None)
        })
    }

    /// The next place in the queue.
    fn ticket(&mut self, now: Moment) -> Ticket {
        self.next_ticket += 1;
        Ticket { number: self.next_ticket, since: now }
    }

    /// One who was called has come. `None`: somebody was faster, or it was not called, or no longer waits; if it still
    /// does, it has its place.
    pub(crate) fn take_notified(&mut self, now: Moment, ticket: Ticket) -> Option<(Token, C)> {
        self.step(now, |l, now| {
            let waiter = l.notified.remove(&ticket)?;
            let caller = waiter.caller;
            l.queue.insert(ticket, waiter);
            let is_first = l.front.is_some_and(|front| front.ticket == ticket);
            // With two there the first is not barged by one who takes one.
            if !is_first && !l.may_barge(now) && l.idle.len() <= 1 {
                return None;
            }
            let Some((index, false)) = l.top(now) else { return None };
            let conn = l.pop_idle();
            let waiter = l.unqueue(now, ticket).expect("it has its place");
            if let Some(front) = l.front.as_mut().filter(|_| !is_first) {
                front.barged += 1;
            }
            l.tally.wait.record(now.nanos_since(waiter.since));
            l.check_out(index, now, caller);
            Some((Token { index, id: l.slots[index as usize].id }, conn))
        })
    }

    /// Gives up a place. `Some`: it was still queued, and this is its seat. `None`: its seat is filled.
    pub(crate) fn leave(&mut self, now: Moment, ticket: Ticket) -> Option<W> {
        self.step(now, |l, now| {
            let waiter = l.unqueue(now, ticket)?;
            l.tally.timeouts += 1;
            l.tally.wait.record(now.nanos_since(waiter.since));
            Some(waiter.seat)
        })
    }

    /// Takes one out of the queue. If it was called, the plan calls another.
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

    /// One who was [hurried](Ledger::join) has given up: what was ordered for it is to be there for the next. `even_now`: it
    /// was gone, perhaps, before that had begun, which is wanted all the same.
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

    /// Asks for one connection to be made ready, for a caller that does not wait for it.
    pub(crate) fn prepare(&mut self, now: Moment) {
        self.step(now, |l, now| {
            if !l.closed {
                l.shorten_back_off(now);
                l.ask();
            }
        });
    }

    /// One connection is to be made ready. Until it is, or an open fails: nobody waits to see it tried again.
    fn ask(&mut self) {
        self.asked = true;
    }

    /// The caller's own check has succeeded. `None`: it may not have the connection after all: that is on its way out, or
    /// another was found dead while it was checked, so that the check proves nothing.
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

    /// Takes a connection back.
    #[inline]
    pub(crate) fn returned(&mut self, now: Moment, token: Token, conn: C, back: Condition) {
        self.step(now, |l, now| {
            let index = token.index;
            l.debug_assert_out(&token);
            l.tally.hold.record(now.nanos_since(l.slots[index as usize].since));
            let mut reason = l.unfit(index, now);
            match back {
                Condition::Keep => {}
                Condition::Reset if reason.is_none() => {
                    let slot = &mut l.slots[index as usize];
                    slot.unused_since = now;
                    let caller = slot.caller;
                    l.start_check(index, now, Check::Reset);
                    return l.effects.orders.push(Order::Reset(token, conn, caller));
                }
                Condition::Reset => {}
                Condition::Discard(why) => reason = Some(why),
                Condition::Broken => {
                    l.suspect();
                    reason = Some(CloseReason::Broken);
                }
                Condition::Outdated => {
                    // Once for all that are as old: those opened since are not the ones that were meant.
                    if l.slots[index as usize].generation == l.generation {
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

    /// Lets a connection go its own way: the pool no longer counts it.
    pub(crate) fn detach(&mut self, now: Moment, token: Token) {
        self.step(now, |l, now| {
            l.debug_assert_out(&token);
            l.tally.hold.record(now.nanos_since(l.slots[token.index as usize].since));
            l.tally.detached += 1;
            l.release(token.index);
        });
    }

    #[inline]
    fn debug_assert_out(&self, token: &Token) {
        let slot = &self.slots[token.index as usize];
        debug_assert!(
            slot.id == token.id && slot.as_seen() == ConnectionState::InUse,
            "a token out of place: {slot:?}"
        );
    }

    // ---------------------------------------------------------------------------------------------- the crew's reports

    /// An open, check or reset starts to run: its limit counts from now. `None`: an open that nobody wants any longer, whose slot is free.
    pub(crate) fn begin(&mut self, now: Moment, token: Token, jitter: f64) -> Option<Token> {
        self.step(now, |l, now| {
            let index = token.index;
            debug_assert_eq!(l.slots[index as usize].id, token.id, "a job begins with the slot it was given");
            match l.slots[index as usize].state {
                State::Opening { slow } => {
                    if l.closed || !l.wants_open(l.demand(now), Some(slow)) {
                        l.release(index);
                        return None;
                    }
                    l.dial(index, now, jitter);
                }
                State::Checking { by, slow } => {
                    l.slots[index as usize].begun_after = l.found_dead;
                    l.start_limit(index, now.plus(l.limit_of(by)));
                    if !slow {
                        l.count_on(index, now.plus(CHECK_PATIENCE));
                    }
                }
                _ => unreachable!("no open, check or reset has this slot"),
            }
            Some(token)
        })
    }

    /// An open dials now.
    fn dial(&mut self, index: u32, now: Moment, jitter: f64) {
        self.last_dial = now;
        let dies = match self.rules.max_lifetime {
            None => Moment::NEVER,
            Some(whole) => {
                let off = whole.mul_f64(self.rules.lifetime_jitter.clamp(0.0, 1.0) * jitter.clamp(0.0, 1.0));
                now.plus(whole.saturating_sub(off))
            }
        };
        let generation = self.generation;
        let slot = &mut self.slots[index as usize];
        (slot.born, slot.proven, slot.since, slot.dies, slot.generation) = (now, now, now, dies, generation);
        slot.begun_after = self.found_dead;
        self.set(index, State::Opening { slow: false });
        self.start_limit(index, now.plus(self.rules.open_timeout));
        self.count_on(index, now.plus(self.open_patience()));
    }

    /// A close starts to run, in a job of its own or in one that goes on to close what it has: it has a limit of its own.
    pub(crate) fn begin_close(&mut self, now: Moment, token: &Token) {
        self.step(now, |l, now| {
            if l.is_current(token) {
                l.close_begins(token.index, now);
            }
        });
    }

    fn close_begins(&mut self, index: u32, now: Moment) {
        match self.slots[index as usize].state {
            State::Closing(Close::Ordered { due }) => {
                if due != Moment::NEVER {
                    self.tally.evicted_late(now.since(due));
                }
                self.change(index, State::Closing(Close::Runs), now);
                self.count_on(index, now.plus(CLOSE_PATIENCE));
            }
            State::Closing(Close::Runs) => {}
            _ => return,
        }
        self.start_limit(index, now.plus(self.rules.close_timeout));
    }

    /// A connection has arrived. `Err`: too late, it was written off; to be closed, and then [`free`](Ledger::free)d.
    /// `Ok(false)`: it has arrived at the end of its life.
    pub(crate) fn opened(&mut self, now: Moment, token: Token, conn: C) -> Result<bool, (Token, C)> {
        self.step(now, |l, now| {
            let index = token.index;
            if !l.is_current(&token) {
                return Err((token, conn));
            }
            let Slot { dies, born, .. } = l.slots[index as usize];
            let took = now.since(born);
            l.slots[index as usize].unused_since = now;
            l.tally.open.record(now.nanos_since(born));
            if l.is_expired(&l.slots[index as usize], now) {
                l.tally.failed_opens += 1;
                l.failed(now, born, false, 0.5);
                // Not counted among the closed, for it is not among the opened.
                l.order_close(index, conn, CloseReason::Lifetime, now, Moment::NEVER);
                return Ok(false);
            }
            // No single one says much of what is usual.
            l.usual_open = Some(l.usual_open.map_or(took, |usual| took.clamp(usual * 3 / 4, usual * 5 / 4)));
            l.failure = None;
            // (Even if it is suspect by now: the server is there.)
            l.check_failures = 0;
            l.tally.opens += 1;
            if dies != Moment::NEVER {
                l.lifetimes.insert((dies, index));
                l.arm(dies);
                if l.rules.min_idle > 0 {
                    l.arm(dies.minus(l.lead()));
                }
            }
            l.proven(index, born, now, conn);
            Ok(true)
        })
    }

    /// An open has failed. The slot stays in use until [`free`](Ledger::free), for the job still has handlers to run.
    pub(crate) fn open_failed(&mut self, now: Moment, token: &Token, permanent: bool, jitter: f64) {
        self.step(now, |l, now| {
            let index = token.index;
            if !l.is_current(token) || l.slots[index as usize].as_seen() != ConnectionState::Opening {
                return;
            }
            let born = l.slots[index as usize].born;
            l.change(index, State::Closing(Close::Runs), now);
            l.start_limit(index, now.plus(l.rules.close_timeout));
            l.tally.failed_opens += 1;
            l.failed(now, born, permanent, jitter);
        });
    }

    /// A check or reset by the crew has succeeded. `Err`: too late, it was written off; to be closed and freed.
    pub(crate) fn checked(&mut self, now: Moment, begun: Moment, token: Token, conn: C) -> Result<(), (Token, C)> {
        self.step(now, |l, now| {
            if !l.is_current(&token) || l.slots[token.index as usize].as_seen() != ConnectionState::Checking {
                return Err((token, conn));
            }
            l.proven(token.index, begun, now, conn);
            Ok(())
        })
    }

    /// What the crew brings was well at `at`.
    fn proven(&mut self, index: u32, at: Moment, now: Moment, conn: C) {
        let fresh = self.proved(index, at);
        match self.unfit(index, now) {
            Some(reason) => self.close_connection(index, conn, reason, now),
            None => {
                // It is there for whoever asked, unless it goes to one who waits.
                self.asked &= !fresh || self.front.is_some();
                self.supply(index, conn, now, fresh);
            }
        }
    }

    /// A check or reset has failed, the crew's or a worker's own. The slot stays in use until [`free`](Ledger::free).
    /// A failed `check` makes the siblings suspect; a failed reset says nothing of them.
    pub(crate) fn check_failed(&mut self, now: Moment, token: &Token, reason: CloseReason) {
        self.step(now, |l, now| {
            let index = token.index;
            let State::Checking { by, .. } = l.slots[index as usize].state else { return };
            if !l.is_current(token) {
                return;
            }
            if by == Check::Own {
                // It is closed by a job that is yet to begin.
                l.change(index, State::Closing(Close::Ordered { due: Moment::NEVER }), now);
            } else {
                l.change(index, State::Closing(Close::Runs), now);
                l.start_limit(index, now.plus(l.rules.close_timeout));
            }
            l.tally.closed(reason);
            if reason == CloseReason::Invalid {
                l.suspect();
                l.check_failures = l.check_failures.saturating_add(1);
            }
        });
    }

    /// What had this slot is gone.
    pub(crate) fn free(&mut self, now: Moment, token: Token) {
        self.step(now, |l, _| {
            if !l.is_current(&token) {
                l.abandoned -= 1;
                l.effects.changed |= l.watchers > 0;
                return;
            }
            // An open or a check ends without a word if it panicked where nothing could catch it, or was never run.
            debug_assert!(
                !matches!(l.slots[token.index as usize].as_seen(), ConnectionState::Idle | ConnectionState::InUse),
                "freed while in use"
            );
            l.release(token.index);
        });
    }

    // ---------------------------------------------------------------------------------------------- time

    /// Does what is due, and sets the next alarm.
    pub(crate) fn reap(&mut self, now: Moment, jitter: f64) {
        let now = self.tick(now);
        self.alarm = Moment::NEVER;
        // Floor connections near their end: marked first, so that what replaces them is ordered before they go.
        self.mark_expiring_soon(now);
        self.plan(now);
        while let Some(&(dies, index)) = self.lifetimes.first() {
            if dies > now {
                break;
            }
            self.lifetimes.pop_first();
            if self.slots[index as usize].as_seen() == ConnectionState::Idle {
                let conn = self.remove_idle(index);
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
        // Whoever calls this sleeps until the alarm just set.
        self.effects.wake_reaper = false;
    }

    /// When something will be due, beside what the plan has armed for.
    fn next_deadline(&self) -> Moment {
        let mut next = self.idle_deadline();
        if let Some(&(dies, _)) = self.lifetimes.first() {
            next = next.min(dies);
        }
        if self.rules.min_idle > 0 {
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

    // ---------------------------------------------------------------------------------------------- orders from above

    /// Sets the greatest number of connections. What is too many goes: the longest unused at once, others on return.
    pub(crate) fn resize(&mut self, now: Moment, max_size: u32) {
        self.step(now, |l, now| {
            l.rules.max_size = max_size;
            // (Those that are being opened may never arrive.)
            let excess = l.counted.alive().saturating_sub(max_size).min(l.idle.len() as u32);
            for (index, conn) in l.drain_idle(0, excess as usize) {
                l.close_connection(index, conn, CloseReason::Resized, now);
            }
        });
    }

    /// Sets the floor. What it no longer keeps and is due goes at once.
    pub(crate) fn set_min_idle(&mut self, now: Moment, min_idle: u32) {
        self.step(now, |l, now| {
            l.rules.min_idle = min_idle;
            l.stack_changed_at = now;
            l.evict_idle(now);
            l.arm(now);
        });
    }

    /// Replaces every connection whose opening began before now: the idle ones at once, the others on return.
    pub(crate) fn recycle(&mut self, now: Moment) {
        self.step(now, |l, now| l.outdate(now));
    }

    fn outdate(&mut self, now: Moment) {
        self.generation += 1;
        for (index, conn) in self.drain_idle(0, self.idle.len()) {
            self.close_connection(index, conn, CloseReason::Recycled, now);
        }
        // A server that was mended deserves a look before the back-off ends.
        if let Some(failure) = &mut self.failure {
            failure.retry = now.max(failure.last.plus(BACKOFF_FIRST));
            failure.permanent = false;
        }
    }

    /// Ends the pool: nobody waits any longer, nothing is kept. Returns how many waited; `None` if it was closed before.
    pub(crate) fn close(&mut self, now: Moment) -> Option<u32> {
        self.step(now, |l, now| {
            if l.closed {
                return None;
            }
            l.closed = true;
            l.asked = false;
            let waiting = l.waiting();
            l.dismiss_queue(now, || Outcome::Closed);
            for (index, conn) in l.drain_idle(0, l.idle.len()) {
                l.close_connection(index, conn, CloseReason::Closed, now);
            }
            l.arm(now);
            l.effects.changed = true;
            Some(waiting)
        })
    }

    /// The grace of a close is over: opens that still hang have no limit any longer. It would do nothing for them that
    /// was not done by now, and no other open takes their place.
    pub(crate) fn abandon_opens(&mut self, now: Moment) {
        self.tick(now);
        let opens =
            self.limits.iter().filter(|&&(_, index)| self.slots[index as usize].as_seen() == ConnectionState::Opening);
        for index in opens.map(|&(_, index)| index).collect::<Vec<_>>() {
            self.end_limit(index);
        }
        self.note_if_over();
    }

    /// The reaper is to see that it is no longer needed.
    fn note_if_over(&mut self) {
        if self.is_over() {
            self.arm(self.now);
        }
    }

    // ---------------------------------------------------------------------------------------------- the rules

    /// Whether a connection may not be handed out for its age. The resolution of the clock counts against it.
    #[inline]
    fn is_expired(&self, slot: &Slot, now: Moment) -> bool {
        slot.dies <= now.plus(self.rules.resolution) && slot.dies != Moment::NEVER
    }

    /// Whether a connection must be checked before it is handed out.
    #[inline]
    fn needs_check(&self, slot: &Slot, now: Moment) -> bool {
        match self.rules.validate {
            Validate::Never => false,
            Validate::Always => true,
            // A check that was made for somebody who did not wait for it, or to keep it alive, serves the next as well.
            Validate::AfterIdle(limit) => {
                self.is_suspect(slot) || slot.unused_since.max(slot.proven).plus(limit) <= now
            }
        }
    }

    /// Why a connection that changes hands may not be kept, if so.
    #[inline]
    fn unfit(&self, index: u32, now: Moment) -> Option<CloseReason> {
        let slot = &self.slots[index as usize];
        if self.closed {
            Some(CloseReason::Closed)
        } else if self.is_expired(slot, now) {
            Some(CloseReason::Lifetime)
        } else if slot.generation != self.generation {
            Some(CloseReason::Recycled)
        } else if self.free.len() + (self.rules.max_size as usize) < self.slots.len()
            && self.counted.alive() + u32::from(slot.as_seen() == ConnectionState::Opening) > self.rules.max_size
        {
            Some(CloseReason::Resized)
        } else {
            None
        }
    }

    /// Whether the first in the queue gets what comes back now.
    #[inline]
    fn is_handed_off(&self, front: Front, now: Moment) -> bool {
        let was_passed = front.barged >= BARGES && now.since(front.first_since) >= FIRST_FOR;
        was_passed || now.since(front.since) >= self.rules.fair_after
    }

    /// Whether one who came later may take what is idle.
    #[inline]
    fn may_barge(&self, now: Moment) -> bool {
        self.front.is_none_or(|front| now.since(front.since) < self.rules.fair_after)
    }

    /// Gives a connection to the first in the queue, or keeps it. `fresh`: it was proven well just now. What is kept and
    /// somebody waits for, the plan calls for, or has checked first.
    #[inline]
    fn supply(&mut self, index: u32, conn: C, now: Moment, fresh: bool) {
        if let Some(front) = self.front {
            return self.supply_queue(front, index, conn, now, fresh);
        }
        let floor = self.rules.min_idle as usize;
        let since = self.slots[index as usize].unused_since;
        if self.idle.len() >= floor && self.rules.max_idle.is_some_and(|max| since.plus(max) <= now) {
            return self.close_connection(index, conn, CloseReason::Idle, now);
        }
        self.push_idle(index, conn, now);
    }

    fn supply_queue(&mut self, front: Front, index: u32, conn: C, now: Moment, fresh: bool) {
        // What the crew brings, it brings for them. What would not stay for as long as they may be barged, they get.
        let lasts = self.rules.max_idle.is_none_or(|max| max > self.rules.fair_after);
        let well = fresh || !self.needs_check(&self.slots[index as usize], now);
        if well && (fresh || !lasts || self.is_handed_off(front, now)) {
            if let Some(waiter) = self.unqueue(now, front.ticket) {
                let token = Token { index, id: self.slots[index as usize].id };
                self.tally.wait.record(now.nanos_since(waiter.since));
                self.check_out(index, now, waiter.caller);
                return self.effects.served.push((waiter.seat, Outcome::Connection(token, conn)));
            }
        }
        self.push_idle(index, conn, now);
    }

    #[inline]
    fn check_out(&mut self, index: u32, now: Moment, caller: Caller) {
        self.change(index, State::InUse { warned: false }, now);
        let slot = &mut self.slots[index as usize];
        slot.caller = Some(caller);
        slot.uses += 1;
        self.tally.checkouts += 1;
        if let Some(threshold) = self.rules.leak_threshold {
            self.arm(now.plus(threshold));
        }
    }

    /// How long a check or reset may take.
    fn limit_of(&self, by: Check) -> Duration {
        match by {
            Check::Own | Check::Crew => self.rules.validation_timeout,
            Check::Reset => self.rules.close_timeout,
        }
    }

    /// The earliest moment at which another connection may be dialled as things stand; `NEVER` if only an event can
    /// make room.
    fn dial_at(&self, now: Moment) -> Moment {
        if self.counted.total() >= self.rules.max_size { Moment::NEVER } else { self.dial_with_room_at(now) }
    }

    /// The same, if there were room.
    fn dial_with_room_at(&self, now: Moment) -> Moment {
        let opening = self.counted.opens();
        // One that takes longer than usual does not count: those that hang keep nobody from another.
        let hangs = u32::from(self.counted.0[StateCounts::SLOW_OPENING] > 0);
        if self.closed || opening >= self.rules.parallel_opens.saturating_add(hangs) {
            return Moment::NEVER;
        }
        let mut at = now;
        if let Some(failure) = &self.failure {
            // While opens fail, one at a time is enough to learn that they no longer do; and one beside one that hangs.
            if self.counted.0[StateCounts::OPENING] > 0 || opening > 1 {
                return Moment::NEVER;
            }
            at = at.max(failure.retry);
        }
        if self.abandoned + opening >= self.rules.max_size {
            if opening > 0 {
                return Moment::NEVER;
            }
            // At the bound the next may be dialled if the last came through, for then it was no connect that hung.
            if self.failure.is_some() || self.abandoned > self.rules.max_size {
                at = at.max(self.last_dial.plus(PROBE_PERIOD));
            }
        }
        at
    }

    /// Gives up on the close of a connection that was replaced, and hangs, or of one that was stuck, if its place is all that
    /// is missing.
    fn make_room(&mut self, now: Moment) -> bool {
        let full = self.counted.total() >= self.rules.max_size && self.counted.0[StateCounts::CLOSING] > 0;
        if !full || !self.may_abandon() || self.dial_with_room_at(now) > now {
            return false;
        }
        // The one that is lost must leave a dial, or its place is of no use. (There is no failure: it could be dialled.)
        if self.abandoned + self.counted.opens() + 1 >= self.rules.max_size
            && (self.counted.opens() > 0 || self.failure.is_some())
        {
            return false;
        }
        if let Some(stuck) = self.slots.iter().position(|slot| slot.state == State::Closing(Close::Stuck)) {
            // It could not be given up before.
            self.abandoned += 1;
            self.release(stuck as u32);
            return true;
        }
        let hangs = |slot: &&Slot| slot.state == State::Closing(Close::Runs) && slot.generation < self.generation;
        let slots = self.limits.iter().map(|&(_, index)| (index, &self.slots[index as usize]));
        let oldest = slots.filter(|(_, slot)| hangs(slot)).min_by_key(|&(_, slot)| slot.since);
        match oldest.map(|(index, slot)| (index, slot.since.plus(self.rules.close_timeout / REPLACED_PATIENCE))) {
            Some((index, until)) if until <= now => {
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

    /// Whether to wait is hopeless at this moment.
    fn is_refused(&self, now: Moment) -> bool {
        let refused = self.failure.is_some_and(|f| f.permanent && now < f.retry);
        refused && self.counted.alive() == 0
    }

    /// Notes a failed open, and when to try again.
    fn failed(&mut self, now: Moment, begun: Moment, permanent: bool, jitter: f64) {
        let count = match self.failure {
            // Dialled side by side with the last one that failed: the same news.
            Some(f) if f.permanent == permanent && begun < f.last => f.count,
            Some(f) if f.permanent == permanent => f.count.saturating_add(1),
            _ => 1,
        };
        let first = if permanent { BACKOFF_REFUSED } else { BACKOFF_FIRST };
        // (`build` waits as well, though not in the queue.)
        let waited_for = self.front.is_some() || self.watchers > 0;
        let longest = if permanent || !waited_for { BACKOFF_LONGEST } else { BACKOFF_WAITED_FOR };
        let whole = first.saturating_mul(1u32.checked_shl(count - 1).unwrap_or(u32::MAX)).min(longest);
        // Up to a fifth is taken off, so that many pools do not come back in step.
        let retry = now.plus(whole.mul_f64(1.0 - 0.2 * jitter.clamp(0.0, 1.0)).max(first));
        self.failure = Some(Failure { count, last: now, permanent, retry });
        self.asked = false;
        self.effects.changed |= self.watchers > 0;
    }

    /// The first to wait does not sit out a back-off that began when nobody did, unless the refusal was permanent.
    fn shorten_back_off(&mut self, now: Moment) {
        if let Some(failure) = &mut self.failure {
            if !failure.permanent {
                failure.retry = failure.retry.min(now.max(failure.last.plus(BACKOFF_FIRST)));
            }
        }
    }

    /// A connection was found dead: whatever was proven before is suspect.
    fn suspect(&mut self) {
        self.found_dead += 1;
    }

    /// Whether another was found dead since the last proof that this one is well began.
    #[inline]
    fn is_suspect(&self, slot: &Slot) -> bool {
        slot.proven_after < self.found_dead && self.rules.validate != Validate::Never
    }

    /// A connection was known to be well at `at`, by what began then. `false`: another was found dead since, so this says
    /// nothing.
    fn proved(&mut self, index: u32, at: Moment) -> bool {
        let slot = &mut self.slots[index as usize];
        slot.proven = at;
        slot.proven_after = slot.begun_after;
        let fresh = !self.is_suspect(&self.slots[index as usize]);
        if fresh {
            self.check_failures = 0;
        }
        fresh
    }

    /// Empties the queue.
    fn dismiss_queue(&mut self, now: Moment, outcome: impl Fn() -> Outcome<C>) {
        while let Some(waiter) = self.front.and_then(|front| self.unqueue(now, front.ticket)) {
            self.tally.wait.record(now.nanos_since(waiter.since));
            self.effects.served.push((waiter.seat, outcome()));
        }
    }

    /// When the next connection has been idle for too long: the lowest one above the floor. A return can only bring
    /// one that lies ahead.
    #[inline]
    fn idle_deadline(&self) -> Moment {
        match (self.rules.max_idle, self.idle.get(self.rules.min_idle as usize)) {
            (Some(max), Some(&(index, _))) => self.slots[index as usize].since.plus(max),
            _ => Moment::NEVER,
        }
    }

    /// Closes all that were idle for too long, at once. Of the unused, the `min_idle` at the bottom stay.
    fn evict_idle(&mut self, now: Moment) {
        let Some(max) = self.rules.max_idle else { return };
        if self.idle_deadline() > now {
            return;
        }
        let floor = self.rules.min_idle as usize;
        let end = self.idle.partition_point(|&(index, _)| self.slots[index as usize].since.plus(max) <= now);
        for (index, conn) in self.drain_idle(floor, end) {
            let due = self.slots[index as usize].since.plus(max).max(self.stack_changed_at);
            self.close_due(index, conn, CloseReason::Idle, now, due);
        }
    }

    fn lead(&self) -> Duration {
        self.rules.max_lifetime.map_or(Duration::ZERO, |whole| (whole / 20).min(MAX_REPLACEMENT_LEAD))
    }

    /// Marks the idle that end within the replacement lead.
    fn mark_expiring_soon(&mut self, now: Moment) {
        if self.rules.min_idle == 0 {
            return;
        }
        let until = now.plus(self.lead());
        let due: Vec<u32> =
            self.lifetimes.range((self.marked_until, 0)..=(until, u32::MAX)).map(|&(_, index)| index).collect();
        for index in due {
            if self.slots[index as usize].as_seen() == ConnectionState::Idle {
                self.set(index, State::Idle { expiring_soon: true });
            }
        }
        self.marked_until = self.marked_until.max(until);
    }

    /// The idle connection whose keepalive is due first, and when. One at a time: `NEVER` while one goes on.
    fn keepalive_due(&self) -> (Moment, u32) {
        let never = (Moment::NEVER, 0);
        match self.rules.keepalive {
            Some(period) if self.keepalive.is_none() && !self.closed => {
                // The first of equals lies lowest.
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
            self.start_check(index, now, Check::Crew);
            let id = self.slots[index as usize].id;
            self.keepalive = Some(id);
            self.effects.orders.push(Order::Check(Token { index, id }, conn));
        }
    }

    /// When the next checkout will have lasted too long.
    fn leak_due(&self) -> Moment {
        let Some(threshold) = self.rules.leak_threshold else { return Moment::NEVER };
        let out = self.slots.iter().filter(|r| r.state == State::InUse { warned: false });
        out.map(|r| r.since.plus(threshold)).min().unwrap_or(Moment::NEVER)
    }

    fn report_leaks(&mut self, now: Moment) {
        let Some(threshold) = self.rules.leak_threshold else { return };
        for index in 0..self.slots.len() as u32 {
            let slot = &self.slots[index as usize];
            if slot.state == (State::InUse { warned: false }) && slot.since.plus(threshold) <= now {
                let leak = Order::Leak { id: slot.id, caller: slot.caller, held: now.since(slot.since) };
                self.effects.orders.push(leak);
                self.tally.leaks += 1;
                self.set(index, State::InUse { warned: true });
            }
        }
    }

    /// Whether the slot of a connection that may be alive can be given up: not if as many jobs are lost already, or may yet
    /// be, as the pool has slots.
    fn may_abandon(&self) -> bool {
        self.abandoned + self.counted.opens() < self.rules.max_size
    }

    /// Gives up on a job past its limit. An open frees its slot (dialling stops by itself); so does another job, if the pool
    /// [may lose](Ledger::may_abandon) one more.
    fn abandon(&mut self, index: u32, now: Moment, jitter: f64) {
        let slot = &self.slots[index as usize];
        let (id, was, state, born) = (slot.id, slot.as_seen(), slot.state, slot.born);
        self.tally.abandonments += 1;
        let limit = match state {
            State::Opening { .. } => {
                self.tally.failed_opens += 1;
                self.failed(now, born, false, jitter);
                self.rules.open_timeout
            }
            State::Checking { by, .. } => {
                self.tally.closed(CloseReason::Abandoned);
                if by != Check::Reset {
                    self.suspect();
                    self.check_failures = self.check_failures.saturating_add(1);
                }
                self.limit_of(by)
            }
            // (It may be given up before its limit, for its place.)
            State::Closing(_) => now.since(slot.since).min(self.rules.close_timeout),
            State::Free | State::Idle { .. } | State::InUse { .. } => unreachable!("only jobs have limits"),
        };
        let cancel = matches!(state, State::Checking { by: Check::Reset, .. } | State::Closing(_));
        self.effects.orders.push(Order::Abandon { id, was, limit, cancel });
        if was == ConnectionState::Opening || self.may_abandon() {
            self.abandoned += 1;
            self.release(index);
        } else {
            self.change(index, State::Closing(Close::Stuck), now);
        }
    }

    // ---------------------------------------------------------------------------------------------- slots and stacks

    fn is_current(&self, token: &Token) -> bool {
        self.slots[token.index as usize].id == token.id
    }

    /// Sets the state of a slot, and with it the counts. (Inlined, so that a checkout and a return, which know the state
    /// they set, need not look up where it is counted.)
    #[inline(always)]
    fn set(&mut self, index: u32, state: State) {
        let slot = &mut self.slots[index as usize];
        let before = std::mem::replace(&mut slot.counted, StateCounts::of(state) as u8);
        slot.state = state;
        self.counted.0[before as usize] -= 1;
        self.counted.0[StateCounts::of(state)] += 1;
    }

    /// A slot takes another state, since then. What belonged to the one before ends with it.
    #[inline(always)]
    fn change(&mut self, index: u32, state: State, since: Moment) {
        self.set(index, state);
        let slot = &mut self.slots[index as usize];
        slot.since = since;
        slot.caller = None;
        if !matches!(state, State::Idle { .. } | State::InUse { .. }) || slot.limit.min(slot.patience) != Moment::NEVER
        {
            self.change_job(index, state);
        }
    }

    /// The part of a change that concerns jobs.
    #[inline(never)]
    fn change_job(&mut self, index: u32, state: State) {
        self.dirty = true;
        self.end_limit(index);
        self.end_patience(index);
        let slot = &self.slots[index as usize];
        if self.keepalive == Some(slot.id) && !matches!(state, State::Checking { .. }) {
            self.keepalive = None;
            // The next one may be due already: the reaper is to look.
            self.arm(self.now);
        }
        let dies = self.slots[index as usize].dies;
        if matches!(state, State::Closing(_) | State::Free) && dies != Moment::NEVER {
            self.lifetimes.remove(&(dies, index));
        }
    }

    fn order_open(&mut self, now: Moment) {
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
            begun_after: 0,
            generation: self.generation,
            uses: 0,
            caller: None,
            limit: Moment::NEVER,
            patience: Moment::NEVER,
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
        self.change(index, State::Opening { slow: false }, now);
        self.count_on(index, now.plus(self.open_patience()));
        self.effects.orders.push(Order::Open(Token { index, id }));
    }

    /// Frees a slot.
    fn release(&mut self, index: u32) {
        self.change(index, State::Free, self.now);
        self.slots[index as usize].id = 0;
        self.free.push(index);
        self.effects.changed |= self.watchers > 0;
        self.note_if_over();
    }

    fn start_limit(&mut self, index: u32, at: Moment) {
        self.end_limit(index);
        self.slots[index as usize].limit = at;
        if at != Moment::NEVER {
            self.limits.insert((at, index));
            self.arm(at);
        }
    }

    fn end_limit(&mut self, index: u32) {
        let limit = std::mem::replace(&mut self.slots[index as usize].limit, Moment::NEVER);
        if limit != Moment::NEVER {
            self.limits.remove(&(limit, index));
        }
    }

    /// Sends a connection off to be closed.
    fn close_connection(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment) {
        self.close_due(index, conn, reason, now, Moment::NEVER);
    }

    /// Sends off a connection whose time was over at `due`.
    fn close_due(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment, due: Moment) {
        self.tally.closed(reason);
        self.order_close(index, conn, reason, now, due);
    }

    /// Has the crew close it.
    fn order_close(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment, due: Moment) {
        self.change(index, State::Closing(Close::Ordered { due }), now);
        let token = Token { index, id: self.slots[index as usize].id };
        self.effects.orders.push(Order::Close(token, conn, reason));
    }

    /// Closes the connection at the top of the stack, which a checkout found expired before the reaper did.
    #[cold]
    fn expire_top(&mut self, index: u32, now: Moment) {
        let due = self.slots[index as usize].dies;
        let conn = self.pop_idle();
        self.close_due(index, conn, CloseReason::Lifetime, now, due);
    }

    fn start_check(&mut self, index: u32, now: Moment, by: Check) {
        self.change(index, State::Checking { by, slow: false }, now);
        self.slots[index as usize].begun_after = self.found_dead;
        if by != Check::Own {
            self.count_on(index, now.plus(CHECK_PATIENCE));
        }
    }

    #[inline]
    fn push_idle(&mut self, index: u32, conn: C, now: Moment) {
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
            if self.keepalive.is_none() {
                let slot = &self.slots[index as usize];
                self.arm(slot.since.max(slot.proven).plus(period));
            }
        }
        self.effects.changed |= self.watchers > 0;
    }

    /// Takes the top of the stack, which there must be. Its state is the caller's to change.
    #[inline]
    fn pop_idle(&mut self) -> C {
        self.idle.pop().expect("looked at before").1
    }

    /// Takes one out of the middle of the stack.
    fn remove_idle(&mut self, index: u32) -> C {
        let since = self.slots[index as usize].since;
        let from = self.idle.partition_point(|&(i, _)| self.slots[i as usize].since < since);
        let at = from + self.idle[from..].iter().position(|&(i, _)| i == index).expect("an idle slot is in the stack");
        self.idle.remove(at).1
    }

    fn drain_idle(&mut self, from: usize, to: usize) -> Vec<(u32, C)> {
        self.idle.drain(from..to.max(from)).collect()
    }
}

#[cfg(test)]
mod tests;
