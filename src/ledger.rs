//! The [`Ledger`]: every rule of the pool, and nothing else.
//!
//! A plain value. Each method is told the time (`now`) and says what is to be done; none reads a clock, takes a lock,
//! starts a thread, does I/O, draws a random number or calls a user's code. So a year of a pool's life runs in a test in
//! seconds, and each rule stands in one place:
//!
//! | rule | where |
//! |---|---|
//! | who gets a connection next | [`supply`](Ledger::supply): the first in the queue, or the idle stack |
//! | who may pass those who wait | [`has_right_of_way`](Ledger::has_right_of_way), [`is_passable`](Ledger::is_passable) |
//! | what is opened, and when | [`provision`](Ledger::provision): for those who wait, then for the floor |
//! | whether the server may be dialled | [`dial_at`](Ledger::dial_at): the bound, the back-off, the jobs written off |
//! | what is closed for idleness | [`idle_deadline`](Ledger::idle_deadline): what lies above the floor in the stack |
//! | what is too old | [`Row::dies`], looked at on checkout, on return and by [`reap`](Ledger::reap) |
//! | what must be checked first | [`needs_check`](Ledger::needs_check) |
//!
//! What is to be done comes out in two ways: as the return value, where it concerns the caller alone, and in the
//! [`Outbox`], for everybody else (grants to waiters, orders to the crew, a bell for the reaper). The caller empties the
//! outbox before it lets go of the lock, so a waiter is at any time either queued or granted, never in between.
//!
//! # Those who wait, and those who run
//!
//! To hand every connection that comes back to the first in the queue is fair, and slow where connections are held
//! for less time than it takes to wake a thread: each then lies unused until its new holder runs. To let whoever runs
//! take it is fast, and starves those who sleep. The rule here lies between. A connection that comes back is **handed
//! over** if the first in the queue has the right of way: it was passed [`passes`](Rules::passes) times and has been first
//! for [`first_for`](Rules::first_for), or it has waited for [`right_of_way`](Rules::right_of_way). Otherwise the
//! connection goes to the idle stack and the next waiter is **called**: it keeps its place, is woken, and comes to
//! [`claim`](Ledger::claim) what is there. Not more of them are called than there are connections for, so whoever is
//! woken in vain is so because others were faster. Meanwhile a running thread may take the connection, unless the first has waited for
//! `right_of_way`. Zero is strict: everything is handed over, nobody passes.
//!
//! One who is called and gives up, or gets another connection before it came, leaves the call to the next.
//!
//! A slot of the pool is a linear [`Token`]: made by an order to open, not cloneable, and spent by exactly one of
//! `checkin`, `detach`, `opened`, `checked` or `free`. A job that took too long loses its slot; the token it comes back
//! with is then stale, which the ledger sees by the id.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;
use std::time::Duration;

use crate::clock::Moment;
use crate::stats::{CloseReason, ConnectionState as State, Tally};

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
    pub(crate) right_of_way: Duration,
    /// Before that, it has the right of way once it was passed so often...
    pub(crate) passes: u32,
    /// ... and has been first for so long.
    pub(crate) first_for: Duration,
    /// How far behind the true time a `now` may be. Folded into every test for age, so that nothing is served late.
    pub(crate) resolution: Duration,
}

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
/// The least time between two dials once as many jobs as the pool has slots are written off and have not come back.
const PROBE_PERIOD: Duration = Duration::from_secs(60);

/// Who holds a connection: where in the user's code it was checked out, and on which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
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
pub(crate) struct Ticket(u64);

/// What the ledger knows of one slot.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// 0: the slot is free.
    pub(crate) id: u64,
    pub(crate) state: State,
    /// When it took this state; for an idle connection since when it is unused.
    pub(crate) since: Moment,
    /// While `Checking`: the `since` it goes back to in the idle stack, for maintenance is not use.
    unused_since: Moment,
    /// When `connect` began.
    pub(crate) born: Moment,
    /// Not handed out from this moment on.
    dies: Moment,
    /// When it was last known to be well.
    proven: Moment,
    /// How often `recycle` had been called when `connect` began.
    generation: u64,
    pub(crate) uses: u64,
    pub(crate) holder: Option<Holder>,
    /// When the job that has this slot is written off.
    limit: Moment,
    /// Whether a leak was reported for this checkout.
    warned: bool,
    /// Whether it ends within the replacement lead: the floor no longer counts on it.
    fading: bool,
    /// While `Checking`: who does what.
    check: Check,
    /// Ordered by `prepare`, for a caller that does not wait.
    unawaited: bool,
    /// A job past its limit whose slot could not be given up.
    stuck: bool,
}

/// What is done to a connection in `State::Checking`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// A worker validates it, for itself.
    Own,
    /// The crew validates it, for whoever comes first.
    Crew,
    /// The crew resets it.
    Reset,
}

/// What becomes of a waiter.
#[derive(Debug)]
pub(crate) enum Grant<C> {
    /// A connection, lent to it.
    Lent(Token, C),
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
    Reset(Token, C, Option<Holder>),
    Close(Token, C, CloseReason),
    /// The job that has this slot is past its limit: abort it if that can be done, and replace its thread.
    WriteOff {
        id: u64,
        job: State,
        limit: Duration,
    },
    /// A connection was out for longer than `leak_threshold`.
    Leak {
        id: u64,
        holder: Option<Holder>,
        held: Duration,
    },
}

/// What is to be done for others than the caller. To be emptied before the lock is released.
#[derive(Debug)]
pub(crate) struct Outbox<C, W> {
    pub(crate) grants: Vec<(W, Grant<C>)>,
    /// Those who are called to [`claim`](Ledger::claim) a connection.
    pub(crate) calls: Vec<W>,
    pub(crate) orders: Vec<Order<C>>,
    /// The reaper sleeps too long: wake it.
    pub(crate) bell: bool,
    /// Something changed that `build` or `close` may wait for.
    pub(crate) changed: bool,
}

impl<C, W> Outbox<C, W> {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // One test instead of five: asked after every checkout and checkin, and hardly ever not.
        (self.calls.len() | self.grants.len() | self.orders.len() | usize::from(self.bell | self.changed)) == 0
    }

    #[inline]
    pub(crate) fn is_empty_but_for_calls(&self) -> bool {
        (self.grants.len() | self.orders.len() | usize::from(self.bell | self.changed)) == 0
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
    Crowded(u32),
}

/// How a connection comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
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
    holder: Holder,
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
    passed: u32,
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

/// The counts of slots by state; the idle ones are counted by their stack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) idle: u32,
    pub(crate) out: u32,
    pub(crate) checking: u32,
    pub(crate) opening: u32,
    pub(crate) closing: u32,
    pub(crate) waiting: u32,
    pub(crate) lost: u32,
}

impl Counts {
    /// All slots in use: what `max_size` bounds.
    pub(crate) fn total(&self) -> u32 {
        self.live() + self.closing
    }

    fn live(&self) -> u32 {
        self.idle + self.out + self.checking + self.opening
    }

    /// Connections that will or may come to the next in the queue.
    fn alive(&self) -> u32 {
        self.idle + self.out + self.checking
    }
}

/// The rules of the pool; see the module. `C` is a connection, `W` the seat of a waiting thread: it looks into neither.
pub(crate) struct Ledger<C, W> {
    rules: Rules,
    /// The latest time it was told. Readings of a clock may arrive out of order; time here does not go back.
    now: Moment,
    rows: Vec<Row>,
    free: Vec<u32>,
    /// Unused connections, the longest unused at the bottom. Sorted by `since`.
    idle: Vec<(u32, C)>,
    /// How many of the idle are `fading`.
    fading: u32,
    /// Those who wait and are not called.
    queue: BTreeMap<Ticket, Waiter<W>>,
    /// Those who wait and are called.
    called: BTreeMap<Ticket, Waiter<W>>,
    /// The first of both, if anybody waits.
    front: Option<Front>,
    /// The end of life of every connection that has one, touched at its birth and death only.
    lifetimes: BTreeSet<(Moment, u32)>,
    /// When the stack last changed other than at its top: what is due for that reason only is due since then.
    restacked: Moment,
    /// Up to which end of life connections have been marked as `fading`.
    faded: Moment,
    /// The limit of every job that runs.
    limits: BTreeSet<(Moment, u32)>,
    out: u32,
    checking: u32,
    /// Those of `checking` that the crew checks; the others a worker checks for itself.
    crew_checking: u32,
    opening: u32,
    closing: u32,
    /// Jobs written off that have not come back.
    lost: u32,
    /// Checks that failed since the last connection was known to be well.
    misses: u32,
    failure: Option<Failure>,
    last_dial: Moment,
    next_id: u64,
    next_ticket: u64,
    generation: u64,
    /// What was proven before is suspect.
    suspect: Moment,
    /// When one who does not wait last asked for a connection. What was used or checked since serves the next, however
    /// late it comes. `NEVER`: nobody has asked.
    asked: Moment,
    /// The slot whose keepalive goes on.
    keepalive: Option<u64>,
    /// When the reaper means to look again.
    alarm: Moment,
    closed: bool,
    /// Threads in `build` and `close` that want to know of changes.
    pub(crate) watchers: u32,
    pub(crate) outbox: Outbox<C, W>,
    pub(crate) tally: Tally,
}

impl<C, W: Clone> Ledger<C, W> {
    pub(crate) fn new(rules: Rules) -> Self {
        Ledger {
            rules,
            now: Moment::BIRTH,
            rows: Vec::new(),
            free: Vec::new(),
            idle: Vec::new(),
            fading: 0,
            queue: BTreeMap::new(),
            called: BTreeMap::new(),
            front: None,
            lifetimes: BTreeSet::new(),
            restacked: Moment::BIRTH,
            faded: Moment::BIRTH,
            limits: BTreeSet::new(),
            out: 0,
            checking: 0,
            crew_checking: 0,
            opening: 0,
            closing: 0,
            lost: 0,
            misses: 0,
            failure: None,
            last_dial: Moment::BIRTH,
            next_id: 1,
            next_ticket: 0,
            generation: 0,
            suspect: Moment::BIRTH,
            asked: Moment::NEVER,
            keepalive: None,
            alarm: Moment::NEVER,
            closed: false,
            watchers: 0,
            outbox: Outbox { grants: Vec::new(), calls: Vec::new(), orders: Vec::new(), bell: false, changed: false },
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
            idle: self.idle.len() as u32,
            out: self.out,
            checking: self.checking,
            opening: self.opening,
            closing: self.closing,
            waiting: self.waiting(),
            lost: self.lost,
        }
    }

    /// How many wait, called or not.
    pub(crate) fn waiting(&self) -> u32 {
        (self.queue.len() + self.called.len()) as u32
    }

    /// The slots in use.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|r| r.id != 0)
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
        self.closed && self.checking + self.closing == 0 && self.limits.is_empty()
    }

    /// When the reaper is to call [`reap`](Ledger::reap) next.
    pub(crate) fn alarm(&self) -> Moment {
        self.alarm
    }

    /// Whether the server has refused for good, as far as is known.
    pub(crate) fn is_refusing(&self) -> bool {
        self.failure.is_some_and(|f| f.permanent)
    }

    // ---------------------------------------------------------------------------------------------- checkout

    /// Takes an idle connection if one may be handed out at this moment. One that needs a check comes as
    /// [`Take::Check`] to a caller that can check `here`, and not at all to another.
    #[inline]
    pub(crate) fn take(&mut self, now: Moment, holder: Holder, here: bool) -> Take<C> {
        let now = self.tick(now);
        if self.closed || !self.is_passable(now) {
            return Take::Nothing;
        }
        let Some((index, check)) = self.top(now) else { return Take::Nothing };
        // What others wait for is not taken out for a check by one who came later.
        if check && (!here || self.front.is_some()) {
            return Take::Nothing;
        }
        let conn = self.pop_idle();
        let token = Token { index, id: self.rows[index as usize].id };
        let taken = if check {
            self.start_check(index, now, Check::Own);
            self.rows[index as usize].holder = Some(holder);
            Take::Check(token, conn, self.ticket())
        } else {
            if let Some(front) = &mut self.front {
                front.passed += 1;
            }
            self.lend(index, now, holder);
            Take::Ready(token, conn)
        };
        if self.rules.min_idle > 0 {
            self.provision(now);
        }
        taken
    }

    /// [`take`](Ledger::take) for a caller that can wait for nothing, not even a check. What is only stale comes as
    /// [`Take::Check`], to be looked at without asking the server, and then [`seen`](Ledger::seen).
    pub(crate) fn take_at_once(&mut self, now: Moment, holder: Holder) -> Take<C> {
        let now = self.tick(now);
        if let Take::Ready(token, conn) = self.take(now, holder, false) {
            self.asked = now;
            return Take::Ready(token, conn);
        }
        if !self.closed && self.front.is_none() {
            if let Some((index, _)) = self.top(now) {
                let is_suspect = self.rows[index as usize].proven < self.suspect;
                if matches!(self.rules.validate, Validate::AfterIdle(_)) && !is_suspect {
                    let conn = self.pop_idle();
                    self.start_check(index, now, Check::Own);
                    let row = &mut self.rows[index as usize];
                    row.holder = Some(holder);
                    return Take::Check(Token { index, id: row.id }, conn, self.ticket());
                }
            }
            if let Some((token, conn)) = self.take_checked(now, holder) {
                return Take::Ready(token, conn);
            }
        }
        self.note_asked(now);
        Take::Nothing
    }

    /// Takes what needs a check, if one that was made since somebody asked in vain serves for it.
    fn take_checked(&mut self, now: Moment, holder: Holder) -> Option<(Token, C)> {
        let (index, _) = self.top(now)?;
        if !self.serves_who_asked(index) {
            return None;
        }
        let conn = self.pop_idle();
        self.asked = now;
        self.lend(index, now, holder);
        self.provision(now);
        Some((Token { index, id: self.rows[index as usize].id }, conn))
    }

    /// The caller has looked at what it took [at once](Ledger::take_at_once), which seems `well`, or of which nothing is to
    /// be seen. `None`: it may not have it; then the crew checks it, for the next.
    pub(crate) fn seen(
        &mut self,
        now: Moment,
        token: Token,
        conn: C,
        holder: Holder,
        well: bool,
    ) -> Option<(Token, C)> {
        let now = self.tick(now);
        let index = token.index;
        self.end_check(index);
        if let Some(reason) = self.unfit(index, now) {
            self.doom(index, conn, reason, now);
            self.provision(now);
            return None;
        }
        let is_suspect = self.rows[index as usize].proven < self.suspect;
        if self.is_passable(now) && ((well && !is_suspect) || self.serves_who_asked(index)) {
            self.asked = now;
            self.lend(index, now, holder);
            self.provision(now);
            return Some((token, conn));
        }
        self.note_asked(now);
        if self.front.is_some() || self.opening + self.crew_checking > self.unserved() {
            // Somebody has come to wait meanwhile, or one is made ready already.
            self.supply(index, conn, now, false);
        } else {
            self.start_check(index, now, Check::Crew);
            self.outbox.orders.push(Order::Check(token, conn));
        }
        self.provision(now);
        None
    }

    /// One who does not wait has found nothing. What is under way by now was ordered for one like it.
    fn note_asked(&mut self, now: Moment) {
        let under_way = self.rows().filter(|r| matches!(r.state, State::Checking | State::Opening)).map(|r| r.since);
        self.asked = under_way.min().unwrap_or(now);
    }

    /// Whether a connection that needs a check may do without for one who cannot wait for it: it was found well since the
    /// last of them asked, and nothing has been found dead since.
    fn serves_who_asked(&self, index: u32) -> bool {
        let row = &self.rows[index as usize];
        row.proven >= self.suspect
            && match self.rules.validate {
                Validate::Never => true,
                // A check for every use: it was not used since.
                Validate::Always => row.proven >= self.asked && (row.uses == 0 || row.proven >= row.unused_since),
                Validate::AfterIdle(_) => row.unused_since.max(row.proven) >= self.asked,
            }
    }

    /// The idle connection that would be handed out next, and whether it needs a check. Those before it that have
    /// expired are closed.
    #[inline]
    fn top(&mut self, now: Moment) -> Option<(u32, bool)> {
        while let Some(&(index, _)) = self.idle.last() {
            let row = &self.rows[index as usize];
            if !self.is_expired(row, now) {
                return Some((index, self.needs_check(row, now)));
            }
            self.bury_expired(index, now);
        }
        None
    }

    /// Queues for a connection, at `ticket` if the caller has held a place before. Asks for what it takes to serve it.
    pub(crate) fn join(
        &mut self,
        now: Moment,
        holder: Holder,
        ticket: Option<Ticket>,
        seat: W,
    ) -> (Join<C>, Option<W>) {
        let now = self.tick(now);
        if self.closed {
            return (Join::Closed, Some(seat));
        }
        if let Take::Ready(token, conn) = self.take(now, holder, false) {
            return (Join::Ready(token, conn), Some(seat));
        }
        if self.is_refused(now) {
            return (Join::Refused, Some(seat));
        }
        let waiting = self.waiting();
        if self.rules.max_waiting.is_some_and(|max| waiting >= max) {
            if waiting == 0 {
                // Where nobody waits, nobody waits for a check.
                if let Some((token, conn)) = self.take_checked(now, holder) {
                    return (Join::Ready(token, conn), Some(seat));
                }
                self.note_asked(now);
            }
            self.tally.turned_away += 1;
            self.prepare(now);
            return (Join::Crowded(waiting), Some(seat));
        }
        if waiting == 0 {
            self.kick(now);
        }
        let ticket = ticket.unwrap_or_else(|| self.ticket());
        self.queue.insert(ticket, Waiter { seat, holder, since: now });
        if self.front.is_none_or(|front| ticket < front.ticket) {
            self.front = Some(Front { ticket, since: now, first_since: now, passed: 0 });
        }
        self.tally.waits += 1;
        self.provision(now);
        (Join::Queued(ticket), None)
    }

    /// The next place in the queue.
    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// One who was called has come. `None`: somebody was faster, or it was not called, or no longer waits; if it still
    /// does, it has its place.
    pub(crate) fn claim(&mut self, now: Moment, ticket: Ticket) -> Option<(Token, C)> {
        let now = self.tick(now);
        let waiter = self.called.remove(&ticket)?;
        let holder = waiter.holder;
        self.queue.insert(ticket, waiter);
        let is_first = self.front.is_some_and(|front| front.ticket == ticket);
        // With two there the first is not passed by one who takes one.
        if is_first || self.is_passable(now) || self.idle.len() > 1 {
            if let Some((index, false)) = self.top(now) {
                let conn = self.pop_idle();
                let (waiter, _) = self.unqueue(now, ticket).expect("it has its place");
                if let Some(front) = self.front.as_mut().filter(|_| !is_first) {
                    front.passed += 1;
                }
                self.tally.wait.record(now.nanos_since(waiter.since));
                self.lend(index, now, holder);
                if self.rules.min_idle > 0 {
                    self.provision(now);
                }
                return Some((Token { index, id: self.rows[index as usize].id }, conn));
            }
        }
        self.provision(now);
        None
    }

    /// Gives up a place. `Some`: it was still queued, and this is its seat. `None`: its seat is filled.
    pub(crate) fn leave(&mut self, now: Moment, ticket: Ticket) -> Option<W> {
        let now = self.tick(now);
        let (waiter, was_called) = self.unqueue(now, ticket)?;
        self.tally.timeouts += 1;
        self.tally.wait.record(now.nanos_since(waiter.since));
        if was_called {
            self.call(now);
        }
        Some(waiter.seat)
    }

    /// Takes one out of the queue; with whether it was called.
    fn unqueue(&mut self, now: Moment, ticket: Ticket) -> Option<(Waiter<W>, bool)> {
        let removed = match self.queue.remove(&ticket) {
            Some(waiter) => (waiter, false),
            None => (self.called.remove(&ticket)?, true),
        };
        if self.front.is_some_and(|front| front.ticket == ticket) {
            let first = [self.queue.first_key_value(), self.called.first_key_value()];
            let first = first.into_iter().flatten().min_by_key(|&(ticket, _)| ticket);
            self.front =
                first.map(|(&ticket, waiter)| Front { ticket, since: waiter.since, first_since: now, passed: 0 });
        }
        Some(removed)
    }

    /// Asks for one connection to be made ready, for a caller that does not wait for it.
    pub(crate) fn prepare(&mut self, now: Moment) {
        let now = self.tick(now);
        if self.closed {
            return;
        }
        // One at a time: what is under way and not spoken for is the one. It may have been ordered for somebody who
        // gave up, and not have dialled: it is wanted again.
        if self.opening + self.crew_checking > self.unserved() {
            self.rows.iter_mut().filter(|r| r.id != 0 && r.state == State::Opening).for_each(|r| r.unawaited = true);
            return;
        }
        self.kick(now);
        if !self.start_next_check(now) && self.dial_at(now) <= now {
            let index = self.order_open(now);
            self.rows[index as usize].unawaited = true;
        }
    }

    /// The caller's own check has succeeded. `None`: it may not have the connection after all, which is on its way out.
    pub(crate) fn cleared(
        &mut self,
        now: Moment,
        begun: Moment,
        token: Token,
        conn: C,
        holder: Holder,
    ) -> Option<(Token, C)> {
        let now = self.tick(now);
        let index = token.index;
        self.end_check(index);
        self.proved(index, begun);
        match self.unfit(index, now) {
            Some(reason) => {
                self.doom(index, conn, reason, now);
                self.provision(now);
                None
            }
            None => {
                self.lend(index, now, holder);
                Some((token, conn))
            }
        }
    }

    // ---------------------------------------------------------------------------------------------- return

    /// Takes a connection back.
    #[inline]
    pub(crate) fn checkin(&mut self, now: Moment, token: Token, conn: C, back: Back) {
        let now = self.tick(now);
        let index = token.index;
        let row = &self.rows[index as usize];
        debug_assert!(row.id == token.id && row.state == State::Out, "a token out of place: {row:?}");
        self.tally.hold.record(now.nanos_since(row.since));
        self.out -= 1;
        let mut reason = self.unfit(index, now);
        match back {
            Back::Keep => {}
            Back::Reset if reason.is_none() => {
                let row = &mut self.rows[index as usize];
                row.unused_since = now;
                let holder = row.holder;
                self.start_check(index, now, Check::Reset);
                self.outbox.orders.push(Order::Reset(token, conn, holder));
                return self.provision(now);
            }
            Back::Reset => {}
            Back::Discard(why) => reason = Some(why),
            Back::Broken => {
                self.suspect(now);
                reason = Some(CloseReason::Broken);
            }
            Back::Outdated => {
                // Once for all that are as old: those opened since are not the ones that were meant.
                if self.rows[index as usize].generation == self.generation {
                    self.recycle(now);
                }
                reason = Some(CloseReason::Outdated);
            }
        }
        match reason {
            Some(reason) => {
                self.doom(index, conn, reason, now);
                self.provision(now);
            }
            None => {
                self.rows[index as usize].unused_since = now;
                self.supply(index, conn, now, false);
            }
        }
    }

    /// Lets a connection go its own way: the pool no longer counts it.
    pub(crate) fn detach(&mut self, now: Moment, token: Token) {
        let now = self.tick(now);
        let row = &self.rows[token.index as usize];
        debug_assert!(row.id == token.id && row.state == State::Out, "a token out of place: {row:?}");
        self.tally.hold.record(now.nanos_since(row.since));
        self.out -= 1;
        self.forget_lifetime(token.index);
        self.tally.detached += 1;
        self.release(token.index);
        self.provision(now);
    }

    // ---------------------------------------------------------------------------------------------- the crew's reports

    /// A job starts to run: its limit counts from now. `None`: an open that nobody wants any longer, whose slot is free.
    pub(crate) fn begin(&mut self, now: Moment, token: Token, jitter: f64) -> Option<Token> {
        let now = self.tick(now);
        let index = token.index;
        let row = &self.rows[index as usize];
        debug_assert_eq!(row.id, token.id, "a job begins with the slot it was given");
        let limit = match row.state {
            State::Opening if self.closed || !self.is_wanted(index, now) => {
                self.opening -= 1;
                self.release(index);
                return None;
            }
            State::Opening => {
                self.last_dial = now;
                let generation = self.generation;
                let dies = match self.rules.max_lifetime {
                    None => Moment::NEVER,
                    Some(whole) => {
                        let off = whole.mul_f64(self.rules.lifetime_jitter.clamp(0.0, 1.0) * jitter.clamp(0.0, 1.0));
                        now.plus(whole.saturating_sub(off))
                    }
                };
                let row = &mut self.rows[index as usize];
                (row.born, row.proven, row.since, row.dies, row.generation) = (now, now, now, dies, generation);
                self.limit_of(&self.rows[index as usize])
            }
            _ => self.limit_of(row),
        };
        if self.rows[index as usize].state == State::Checking && self.front.is_some() {
            self.arm(now.plus(CHECK_PATIENCE));
        }
        self.start_limit(index, now.plus(limit));
        Some(token)
    }

    /// A job goes on to close what it has, for which there is a limit of its own.
    pub(crate) fn begin_close(&mut self, now: Moment, token: &Token) {
        let now = self.tick(now);
        let row = &self.rows[token.index as usize];
        if row.id == token.id && row.state == State::Closing && !row.stuck {
            self.start_limit(token.index, now.plus(self.rules.close_timeout));
        }
    }

    /// A connection has arrived. `Err`: too late, it was written off; to be closed, and then [`free`](Ledger::free)d.
    pub(crate) fn opened(&mut self, now: Moment, token: Token, conn: C) -> Result<(), (Token, C)> {
        let now = self.tick(now);
        let index = token.index;
        if !self.is_current(&token) {
            return Err((token, conn));
        }
        self.end_limit(index);
        self.opening -= 1;
        let row = &mut self.rows[index as usize];
        row.unused_since = now;
        self.tally.open.record(now.nanos_since(row.born));
        if self.is_expired(&self.rows[index as usize], now) {
            let born = self.rows[index as usize].born;
            self.tally.failed_opens += 1;
            self.failed(now, born, false, 0.5);
            // Not counted among the closed, for it is not among the opened.
            self.send_off(index, conn, CloseReason::Lifetime, now);
            self.provision(now);
            return Ok(());
        }
        let Row { dies, born, .. } = self.rows[index as usize];
        self.failure = None;
        self.misses = 0;
        self.tally.opens += 1;
        if dies != Moment::NEVER {
            self.lifetimes.insert((dies, index));
            self.arm(dies);
            if self.rules.min_idle > 0 {
                self.arm(dies.minus(self.lead()));
            }
        }
        self.proved(index, born);
        match self.unfit(index, now) {
            Some(reason) => self.doom(index, conn, reason, now),
            None => self.supply(index, conn, now, true),
        }
        self.provision(now);
        Ok(())
    }

    /// An open has failed. The slot stays in use until [`free`](Ledger::free), for the job still has handlers to run.
    pub(crate) fn open_failed(&mut self, now: Moment, token: &Token, permanent: bool, jitter: f64) {
        let now = self.tick(now);
        if !self.is_current(token) || self.rows[token.index as usize].state != State::Opening {
            return;
        }
        let born = self.rows[token.index as usize].born;
        self.opening -= 1;
        self.close_row(token.index, now);
        self.tally.failed_opens += 1;
        self.failed(now, born, permanent, jitter);
        self.provision(now);
    }

    /// A check or reset by the crew has succeeded. `Err`: too late, it was written off; to be closed and freed.
    pub(crate) fn checked(&mut self, now: Moment, begun: Moment, token: Token, conn: C) -> Result<(), (Token, C)> {
        let now = self.tick(now);
        let index = token.index;
        if !self.is_current(&token) || self.rows[index as usize].stuck {
            return Err((token, conn));
        }
        self.end_limit(index);
        self.end_check(index);
        self.proved(index, begun);
        match self.unfit(index, now) {
            Some(reason) => self.doom(index, conn, reason, now),
            None => self.supply(index, conn, now, true),
        }
        self.provision(now);
        Ok(())
    }

    /// A check or reset has failed, the crew's or a worker's own. The slot stays in use until [`free`](Ledger::free).
    /// A failed `check` makes the siblings suspect; a failed reset says nothing of them.
    pub(crate) fn check_failed(&mut self, now: Moment, token: &Token, reason: CloseReason) {
        let now = self.tick(now);
        if !self.is_current(token) || self.rows[token.index as usize].state != State::Checking {
            return;
        }
        self.end_check(token.index);
        self.forget_lifetime(token.index);
        self.close_row(token.index, now);
        self.tally.closed(reason);
        if reason == CloseReason::Invalid {
            self.suspect(now);
            self.misses = self.misses.saturating_add(1);
        }
        self.provision(now);
    }

    /// What had this slot is gone. `true`: the job was written off meanwhile, so its thread has been replaced.
    pub(crate) fn free(&mut self, now: Moment, token: Token) -> bool {
        let now = self.tick(now);
        if !self.is_current(&token) {
            self.lost -= 1;
            self.outbox.changed |= self.watchers > 0;
            self.provision(now);
            return true;
        }
        let index = token.index;
        self.end_limit(index);
        match self.rows[index as usize].state {
            State::Closing => self.closing -= 1,
            // A job that ended without a word: it panicked where nothing could catch it, or was never run.
            State::Opening => self.opening -= 1,
            State::Checking => {
                self.end_check(index);
                self.forget_lifetime(index);
            }
            State::Idle | State::Out => unreachable!("freed while in use"),
        }
        let stuck = self.rows[index as usize].stuck;
        self.release(index);
        self.provision(now);
        stuck
    }

    // ---------------------------------------------------------------------------------------------- time

    /// Does what is due, and sets the next alarm.
    pub(crate) fn reap(&mut self, now: Moment, jitter: f64) {
        let now = self.tick(now);
        self.alarm = Moment::NEVER;
        // Floor connections near their end: marked first, so that what replaces them is ordered before they go.
        self.mark_fading(now);
        self.provision(now);
        while let Some(&(dies, index)) = self.lifetimes.first() {
            if dies > now {
                break;
            }
            self.lifetimes.pop_first();
            if self.rows[index as usize].state == State::Idle {
                self.tally.evicted_late(now.since(dies));
                let conn = self.remove_idle(index);
                self.doom(index, conn, CloseReason::Lifetime, now);
            }
        }
        self.evict_idle(now);
        while let Some(&(limit, index)) = self.limits.first() {
            if limit > now {
                break;
            }
            self.write_off(index, now, jitter);
        }
        self.keep_alive(now);
        self.report_leaks(now);
        self.provision(now);
        self.alarm = self.alarm.min(self.next_deadline(now));
        // Whoever calls this sleeps until the alarm just set.
        self.outbox.bell = false;
    }

    /// When something will be due, as far as can be known now.
    fn next_deadline(&self, now: Moment) -> Moment {
        let mut next = self.idle_deadline();
        if let Some(&(dies, _)) = self.lifetimes.first() {
            next = next.min(dies);
        }
        if self.rules.min_idle > 0 {
            if let Some(&(dies, _)) = self.lifetimes.range((self.faded, 0)..).find(|&&(dies, _)| dies > self.faded) {
                next = next.min(dies.minus(self.lead()));
            }
        }
        if let Some(&(limit, _)) = self.limits.first() {
            next = next.min(limit);
        }
        if self.has_demand(now) {
            next = next.min(self.dial_at(now));
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
            self.outbox.bell = true;
        }
    }

    #[inline]
    fn tick(&mut self, now: Moment) -> Moment {
        if now > self.now {
            self.now = now;
        }
        self.now
    }

    // ---------------------------------------------------------------------------------------------- orders from above

    /// Sets the greatest number of connections. What is too many goes: the longest unused at once, others on return.
    pub(crate) fn resize(&mut self, now: Moment, max_size: u32) {
        let now = self.tick(now);
        self.rules.max_size = max_size;
        let excess = self.counts().live().saturating_sub(max_size).min(self.idle.len() as u32);
        for (index, conn) in self.drain_idle(0, excess as usize) {
            self.doom(index, conn, CloseReason::Resized, now);
        }
        self.provision(now);
    }

    /// Sets the floor.
    pub(crate) fn set_min_idle(&mut self, now: Moment, min_idle: u32) {
        let now = self.tick(now);
        self.rules.min_idle = min_idle;
        self.restacked = now;
        self.arm(now);
        self.provision(now);
    }

    /// Replaces every connection whose opening began before now: the idle ones at once, the others on return.
    pub(crate) fn recycle(&mut self, now: Moment) {
        let now = self.tick(now);
        self.generation += 1;
        for (index, conn) in self.drain_idle(0, self.idle.len()) {
            self.doom(index, conn, CloseReason::Recycled, now);
        }
        // A server that was mended deserves a look before the back-off ends.
        if let Some(failure) = &mut self.failure {
            failure.retry = now.max(failure.last.plus(BACKOFF_FIRST));
            failure.permanent = false;
        }
        self.provision(now);
    }

    /// Ends the pool: nobody waits any longer, nothing is kept. Returns how many waited; `None` if it was closed before.
    pub(crate) fn close(&mut self, now: Moment) -> Option<u32> {
        let now = self.tick(now);
        if self.closed {
            return None;
        }
        self.closed = true;
        let waiting = self.waiting();
        self.turn_out(now, || Grant::Closed);
        for (index, conn) in self.drain_idle(0, self.idle.len()) {
            self.doom(index, conn, CloseReason::Closed, now);
        }
        self.arm(now);
        self.outbox.changed = true;
        Some(waiting)
    }

    /// The grace of a close is over: opens that still hang have no limit any longer. It would do nothing for them that
    /// was not done by now, and no other open takes their place.
    pub(crate) fn abandon_opens(&mut self, now: Moment) {
        self.tick(now);
        let opens = self.limits.iter().filter(|&&(_, index)| self.rows[index as usize].state == State::Opening);
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
    fn is_expired(&self, row: &Row, now: Moment) -> bool {
        row.dies <= now.plus(self.rules.resolution) && row.dies != Moment::NEVER
    }

    /// Whether a connection must be checked before it is handed out.
    #[inline]
    fn needs_check(&self, row: &Row, now: Moment) -> bool {
        match self.rules.validate {
            Validate::Never => false,
            Validate::Always => true,
            // A check that was made for somebody who did not wait for it, or to keep it alive, serves the next as well.
            Validate::AfterIdle(limit) => {
                row.proven < self.suspect || row.unused_since.max(row.proven).plus(limit) <= now
            }
        }
    }

    /// Why a connection that is in nobody's hands may not be kept, if so.
    #[inline]
    fn unfit(&self, index: u32, now: Moment) -> Option<CloseReason> {
        let row = &self.rows[index as usize];
        if self.closed {
            Some(CloseReason::Closed)
        } else if self.is_expired(row, now) {
            Some(CloseReason::Lifetime)
        } else if row.generation != self.generation {
            Some(CloseReason::Recycled)
        } else if self.free.len() + (self.rules.max_size as usize) < self.rows.len() && {
            // The connection itself is counted nowhere at this moment.
            self.counts().live() + 1 > self.rules.max_size
        } {
            Some(CloseReason::Resized)
        } else {
            None
        }
    }

    /// Whether the first in the queue gets what comes back now.
    #[inline]
    fn has_right_of_way(&self, front: Front, now: Moment) -> bool {
        let was_passed = front.passed >= self.rules.passes && now.since(front.first_since) >= self.rules.first_for;
        was_passed || now.since(front.since) >= self.rules.right_of_way
    }

    /// Whether one who came later may take what is idle.
    #[inline]
    fn is_passable(&self, now: Moment) -> bool {
        self.front.is_none_or(|front| now.since(front.since) < self.rules.right_of_way)
    }

    /// Calls those who come next, if more connections are ready than are called for.
    fn call(&mut self, now: Moment) {
        // (Those above it in the stack were proven or used later.)
        while let Some(next) = self.idle.len().checked_sub(self.called.len() + 1) {
            let row = &self.rows[self.idle[next].0 as usize];
            if self.queue.is_empty() || self.is_expired(row, now) || self.needs_check(row, now) {
                return;
            }
            if let Some((ticket, waiter)) = self.queue.pop_first() {
                self.outbox.calls.push(waiter.seat.clone());
                self.called.insert(ticket, waiter);
            }
        }
    }

    /// How many wait for whom nothing is ready.
    fn unserved(&self) -> u32 {
        self.waiting() - self.called.len().min(self.idle.len()) as u32
    }

    /// Gives a connection to the first in the queue, or keeps it. `fresh`: it was proven well just now.
    #[inline]
    fn supply(&mut self, index: u32, conn: C, now: Moment, fresh: bool) {
        if let Some(front) = self.front {
            return self.supply_those_who_wait(front, index, conn, now, fresh);
        }
        let floor = self.rules.min_idle as usize;
        let since = self.rows[index as usize].unused_since;
        if self.idle.len() >= floor && self.rules.max_idle.is_some_and(|max| since.plus(max) <= now) {
            return self.doom(index, conn, CloseReason::Idle, now);
        }
        self.push_idle(index, conn, now);
    }

    fn supply_those_who_wait(&mut self, front: Front, index: u32, conn: C, now: Moment, fresh: bool) {
        if !fresh && self.needs_check(&self.rows[index as usize], now) {
            let token = Token { index, id: self.rows[index as usize].id };
            self.start_check(index, now, Check::Crew);
            self.outbox.orders.push(Order::Check(token, conn));
            return;
        }
        // What the crew brings, it brings for them. What would not stay for as long as they may be passed, they get.
        let lasts = self.rules.max_idle.is_none_or(|max| max > self.rules.right_of_way);
        if fresh || !lasts || self.has_right_of_way(front, now) {
            if let Some((waiter, was_called)) = self.unqueue(now, front.ticket) {
                let token = Token { index, id: self.rows[index as usize].id };
                self.tally.wait.record(now.nanos_since(waiter.since));
                self.lend(index, now, waiter.holder);
                self.outbox.grants.push((waiter.seat, Grant::Lent(token, conn)));
                if was_called {
                    self.call(now);
                }
            }
            return;
        }
        self.push_idle(index, conn, now);
        self.call(now);
    }

    #[inline]
    fn lend(&mut self, index: u32, now: Moment, holder: Holder) {
        let row = &mut self.rows[index as usize];
        row.state = State::Out;
        row.since = now;
        row.holder = Some(holder);
        row.uses += 1;
        row.warned = false;
        self.out += 1;
        self.tally.checkouts += 1;
        if let Some(threshold) = self.rules.leak_threshold {
            self.arm(now.plus(threshold));
        }
    }

    /// Sees to it that those who wait are served and the floor stands, as far as the rules allow at this moment.
    fn provision(&mut self, now: Moment) {
        if self.closed {
            return;
        }
        if self.front.is_some() && self.is_refused(now) {
            self.turn_out(now, || Grant::Refused);
        }
        self.call(now);
        // Those who wait. After a check that failed more is under way than there are waiters, doubling with every
        // further failure, and an open among it: six dead connections cost one connect, not six timeouts in a row.
        let (slow, next_slow) = self.slow_checks(now);
        self.arm(next_slow);
        while self.unserved() > 0 {
            let ahead = if self.misses == 0 { 0 } else { 1u32.checked_shl(self.misses - 1).unwrap_or(u32::MAX) };
            let wanted = self.unserved().saturating_add(ahead);
            if self.misses > 0 && self.opening == 0 && self.dial_at(now) <= now {
                self.order_open(now);
                continue;
            }
            if self.opening + self.crew_checking - slow >= wanted {
                break;
            }
            if !self.start_next_check(now) {
                if self.opening >= self.unserved() || self.dial_at(now) > now {
                    break;
                }
                self.order_open(now);
            }
        }
        // The floor: what is idle and stays, and what comes unasked for.
        while self.floor_is_short() && self.dial_at(now) <= now {
            self.order_open(now);
        }
        if (self.failure.is_some() || self.lost > 0) && self.has_demand(now) {
            self.arm(self.dial_at(now));
        }
    }

    /// How many checks and resets go on for so long that those who wait do not count on them any longer, and when the next
    /// of them does.
    fn slow_checks(&self, now: Moment) -> (u32, Moment) {
        if self.front.is_none() || self.crew_checking == 0 {
            return (0, Moment::NEVER);
        }
        let (mut slow, mut next) = (0, Moment::NEVER);
        for &(_, index) in &self.limits {
            let row = &self.rows[index as usize];
            if row.state == State::Checking {
                match row.since.plus(CHECK_PATIENCE) {
                    until if until <= now => slow += 1,
                    until => next = next.min(until),
                }
            }
        }
        (slow, next)
    }

    /// Idle connections that outlive the replacement lead, and those that come without anybody waiting for them, are
    /// fewer than `min_idle`. The one rule for refill and for replacement.
    fn floor_is_short(&self) -> bool {
        let coming = (self.opening + self.crew_checking).saturating_sub(self.unserved());
        !self.closed && self.idle.len() as u32 - self.fading + coming < self.rules.min_idle
    }

    fn has_demand(&self, now: Moment) -> bool {
        let coming = self.opening + self.crew_checking - self.slow_checks(now).0;
        !self.closed && (coming < self.unserved() || self.floor_is_short())
    }

    /// Whether an open that has been ordered is still needed: asked right before it dials.
    fn is_wanted(&self, index: u32, now: Moment) -> bool {
        let others = self.opening - 1 + self.crew_checking - self.slow_checks(now).0;
        let wanted = self.waiting() + self.rules.min_idle;
        let wanted = if self.rows[index as usize].unawaited { wanted.max(1) } else { wanted };
        let ahead = self.misses > 0 && self.front.is_some();
        ahead || self.idle.len() as u32 - self.fading + others < wanted
    }

    /// How long the job that has this slot may take.
    fn limit_of(&self, row: &Row) -> Duration {
        match (row.state, row.check) {
            (State::Opening, _) => self.rules.open_timeout,
            (State::Checking, Check::Own | Check::Crew) => self.rules.validation_timeout,
            (State::Checking, Check::Reset) | (State::Closing, _) => self.rules.close_timeout,
            (State::Idle | State::Out, _) => unreachable!("no job has an idle or lent connection"),
        }
    }

    /// The earliest moment at which another connection may be dialled as things stand; `NEVER` if only an event can
    /// make room.
    fn dial_at(&self, now: Moment) -> Moment {
        if self.closed || self.counts().total() >= self.rules.max_size || self.opening >= self.rules.parallel_opens {
            return Moment::NEVER;
        }
        let mut at = now;
        if let Some(failure) = &self.failure {
            // While opens fail, one at a time is enough to learn that they no longer do.
            if self.opening > 0 {
                return Moment::NEVER;
            }
            at = at.max(failure.retry);
        }
        if self.lost + self.opening >= self.rules.max_size {
            if self.opening > 0 {
                return Moment::NEVER;
            }
            at = at.max(self.last_dial.plus(PROBE_PERIOD));
        }
        at
    }

    /// Whether to wait is hopeless at this moment.
    fn is_refused(&self, now: Moment) -> bool {
        let refused = self.failure.is_some_and(|f| f.permanent && now < f.retry);
        refused && self.counts().alive() == 0
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
        self.outbox.changed |= self.watchers > 0;
    }

    /// The first to wait does not sit out a back-off that began when nobody did, unless the refusal was permanent.
    fn kick(&mut self, now: Moment) {
        if let Some(failure) = &mut self.failure {
            if !failure.permanent {
                failure.retry = failure.retry.min(now.max(failure.last.plus(BACKOFF_FIRST)));
            }
        }
    }

    /// A connection was found dead: whatever was proven before now is suspect.
    fn suspect(&mut self, now: Moment) {
        self.suspect = now.plus(Duration::from_nanos(1));
    }

    /// A connection was known to be well at `at`.
    fn proved(&mut self, index: u32, at: Moment) {
        self.rows[index as usize].proven = at;
        self.misses = 0;
    }

    /// Empties the queue.
    fn turn_out(&mut self, now: Moment, grant: impl Fn() -> Grant<C>) {
        while let Some((waiter, _)) = self.front.and_then(|front| self.unqueue(now, front.ticket)) {
            self.tally.wait.record(now.nanos_since(waiter.since));
            self.outbox.grants.push((waiter.seat, grant()));
        }
    }

    /// When the next connection has been idle for too long: the lowest one above the floor. A return can only bring
    /// one that lies ahead.
    #[inline]
    fn idle_deadline(&self) -> Moment {
        match (self.rules.max_idle, self.idle.get(self.rules.min_idle as usize)) {
            (Some(max), Some(&(index, _))) => self.rows[index as usize].since.plus(max),
            _ => Moment::NEVER,
        }
    }

    /// Closes all that were idle for too long, at once. Of the unused, the `min_idle` at the bottom stay.
    fn evict_idle(&mut self, now: Moment) {
        let Some(max) = self.rules.max_idle else { return };
        let due = self.idle_deadline();
        if due > now {
            return;
        }
        self.tally.evicted_late(now.since(due.max(self.restacked)));
        let floor = self.rules.min_idle as usize;
        let end = self.idle.partition_point(|&(index, _)| self.rows[index as usize].since.plus(max) <= now);
        for (index, conn) in self.drain_idle(floor, end) {
            self.doom(index, conn, CloseReason::Idle, now);
        }
    }

    fn lead(&self) -> Duration {
        self.rules.max_lifetime.map_or(Duration::ZERO, |whole| (whole / 20).min(MAX_REPLACEMENT_LEAD))
    }

    /// Marks the idle that end within the replacement lead.
    fn mark_fading(&mut self, now: Moment) {
        if self.rules.min_idle == 0 {
            return;
        }
        let until = now.plus(self.lead());
        for &(_, index) in self.lifetimes.range((self.faded, 0)..=(until, u32::MAX)) {
            let row = &mut self.rows[index as usize];
            if row.state == State::Idle && !row.fading {
                row.fading = true;
                self.fading += 1;
            }
        }
        self.faded = self.faded.max(until);
    }

    /// The idle connection whose keepalive is due first, and when. One at a time: `NEVER` while one goes on.
    fn keepalive_due(&self) -> (Moment, u32) {
        let never = (Moment::NEVER, 0);
        match self.rules.keepalive {
            Some(period) if self.keepalive.is_none() && !self.closed => {
                // The first of equals lies lowest.
                let due = |&(index, _): &(u32, C)| {
                    let row = &self.rows[index as usize];
                    (row.since.max(row.proven).plus(period), index)
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
            let id = self.rows[index as usize].id;
            self.keepalive = Some(id);
            self.outbox.orders.push(Order::Check(Token { index, id }, conn));
        }
    }

    /// When the next checkout will have lasted too long.
    fn leak_due(&self) -> Moment {
        let Some(threshold) = self.rules.leak_threshold else { return Moment::NEVER };
        let out = self.rows().filter(|r| r.state == State::Out && !r.warned);
        out.map(|r| r.since.plus(threshold)).min().unwrap_or(Moment::NEVER)
    }

    fn report_leaks(&mut self, now: Moment) {
        let Some(threshold) = self.rules.leak_threshold else { return };
        for row in self.rows.iter_mut().filter(|r| r.id != 0 && r.state == State::Out && !r.warned) {
            if row.since.plus(threshold) <= now {
                row.warned = true;
                self.tally.leaks += 1;
                self.outbox.orders.push(Order::Leak { id: row.id, holder: row.holder, held: now.since(row.since) });
            }
        }
    }

    /// Gives up on a job past its limit. Its slot is freed, unless as many jobs are lost already as the pool has slots:
    /// then an open still is (dialling stops by itself), but a connection that may be alive keeps its slot.
    fn write_off(&mut self, index: u32, now: Moment, jitter: f64) {
        let row = &self.rows[index as usize];
        let (id, job, reset, limit) = (row.id, row.state, row.check == Check::Reset, self.limit_of(row));
        self.end_limit(index);
        self.outbox.orders.push(Order::WriteOff { id, job, limit });
        self.tally.written_off += 1;
        match job {
            State::Opening => {
                self.opening -= 1;
                self.tally.failed_opens += 1;
                let born = self.rows[index as usize].born;
                self.failed(now, born, false, jitter);
            }
            State::Checking => {
                self.end_check(index);
                self.forget_lifetime(index);
                self.tally.closed(CloseReason::WrittenOff);
                if !reset {
                    self.suspect(now);
                    self.misses = self.misses.saturating_add(1);
                }
                self.close_row(index, now);
                self.closing -= 1;
            }
            State::Closing => self.closing -= 1,
            State::Idle | State::Out => unreachable!("only jobs have limits"),
        }
        if job == State::Opening || self.lost < self.rules.max_size {
            self.lost += 1;
            self.release(index);
        } else {
            self.rows[index as usize].stuck = true;
            self.closing += 1;
        }
    }

    // ---------------------------------------------------------------------------------------------- slots and stacks

    fn is_current(&self, token: &Token) -> bool {
        self.rows[token.index as usize].id == token.id
    }

    fn order_open(&mut self, now: Moment) -> u32 {
        let id = self.next_id;
        self.next_id += 1;
        let row = Row {
            id,
            state: State::Opening,
            since: now,
            unused_since: now,
            born: now,
            dies: Moment::NEVER,
            proven: now,
            generation: self.generation,
            uses: 0,
            holder: None,
            limit: Moment::NEVER,
            warned: false,
            fading: false,
            check: Check::Own,
            unawaited: false,
            stuck: false,
        };
        let index = match self.free.pop() {
            Some(index) => {
                self.rows[index as usize] = row;
                index
            }
            None => {
                self.rows.push(row);
                (self.rows.len() - 1) as u32
            }
        };
        self.opening += 1;
        self.outbox.orders.push(Order::Open(Token { index, id }));
        index
    }

    /// Frees a slot whose count has been taken back.
    fn release(&mut self, index: u32) {
        let row = &mut self.rows[index as usize];
        row.id = 0;
        row.holder = None;
        self.free.push(index);
        self.outbox.changed |= self.watchers > 0;
        self.note_if_over();
    }

    fn start_limit(&mut self, index: u32, at: Moment) {
        self.end_limit(index);
        self.rows[index as usize].limit = at;
        if at != Moment::NEVER {
            self.limits.insert((at, index));
            self.arm(at);
        }
    }

    fn end_limit(&mut self, index: u32) {
        let limit = std::mem::replace(&mut self.rows[index as usize].limit, Moment::NEVER);
        if limit != Moment::NEVER {
            self.limits.remove(&(limit, index));
        }
    }

    fn forget_lifetime(&mut self, index: u32) {
        let dies = self.rows[index as usize].dies;
        if dies != Moment::NEVER {
            self.lifetimes.remove(&(dies, index));
        }
    }

    /// Turns to `Closing`.
    fn close_row(&mut self, index: u32, now: Moment) {
        let row = &mut self.rows[index as usize];
        row.state = State::Closing;
        row.since = now;
        row.holder = None;
        self.closing += 1;
    }

    /// Sends a connection off to be closed.
    fn doom(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment) {
        self.forget_lifetime(index);
        self.tally.closed(reason);
        self.send_off(index, conn, reason, now);
    }

    /// Has the crew close it.
    fn send_off(&mut self, index: u32, conn: C, reason: CloseReason, now: Moment) {
        self.close_row(index, now);
        let token = Token { index, id: self.rows[index as usize].id };
        self.outbox.orders.push(Order::Close(token, conn, reason));
    }

    /// Closes the connection at the top of the stack, which a checkout found expired before the reaper did.
    #[cold]
    fn bury_expired(&mut self, index: u32, now: Moment) {
        self.tally.evicted_late(now.since(self.rows[index as usize].dies));
        let conn = self.pop_idle();
        self.doom(index, conn, CloseReason::Lifetime, now);
        self.provision(now);
    }

    fn start_check(&mut self, index: u32, now: Moment, check: Check) {
        let row = &mut self.rows[index as usize];
        row.state = State::Checking;
        row.since = now;
        row.holder = None;
        row.check = check;
        self.checking += 1;
        self.crew_checking += u32::from(check != Check::Own);
    }

    fn end_check(&mut self, index: u32) {
        let row = &self.rows[index as usize];
        self.checking -= 1;
        self.crew_checking -= u32::from(row.check != Check::Own);
        if self.keepalive == Some(row.id) {
            self.keepalive = None;
            // The next one may be due already: the reaper is to look.
            self.arm(self.now);
        }
    }

    /// Has the crew check the idle connection that would be handed out next. `false`: there is none that needs it.
    fn start_next_check(&mut self, now: Moment) -> bool {
        while let Some(&(index, _)) = self.idle.last() {
            let row = &self.rows[index as usize];
            if self.is_expired(row, now) {
                self.tally.evicted_late(now.since(row.dies));
                let conn = self.pop_idle();
                self.doom(index, conn, CloseReason::Lifetime, now);
                continue;
            }
            if !self.needs_check(row, now) {
                return false;
            }
            let conn = self.pop_idle();
            self.start_check(index, now, Check::Crew);
            let token = Token { index, id: self.rows[index as usize].id };
            self.outbox.orders.push(Order::Check(token, conn));
            return true;
        }
        false
    }

    #[inline]
    fn push_idle(&mut self, index: u32, conn: C, now: Moment) {
        let fading = self.rules.min_idle > 0 && {
            let dies = self.rows[index as usize].dies;
            dies != Moment::NEVER && dies <= now.plus(self.lead())
        };
        let row = &mut self.rows[index as usize];
        let since = row.unused_since;
        row.state = State::Idle;
        row.since = since;
        row.holder = None;
        row.fading = fading;
        self.fading += u32::from(fading);
        match self.idle.last() {
            Some(&(top, _)) if self.rows[top as usize].since > since => {
                self.restacked = now;
                let at = self.idle.partition_point(|&(i, _)| self.rows[i as usize].since <= since);
                self.idle.insert(at, (index, conn));
            }
            _ => self.idle.push((index, conn)),
        }
        let due = self.idle_deadline();
        self.arm(due);
        if let Some(period) = self.rules.keepalive {
            if self.keepalive.is_none() {
                let row = &self.rows[index as usize];
                self.arm(row.since.max(row.proven).plus(period));
            }
        }
        self.outbox.changed |= self.watchers > 0;
    }

    /// Takes the top of the stack, which there must be.
    #[inline]
    fn pop_idle(&mut self) -> C {
        let (index, conn) = self.idle.pop().expect("looked at before");
        self.fading -= u32::from(std::mem::take(&mut self.rows[index as usize].fading));
        conn
    }

    /// Takes one out of the middle of the stack.
    fn remove_idle(&mut self, index: u32) -> C {
        let since = self.rows[index as usize].since;
        let from = self.idle.partition_point(|&(i, _)| self.rows[i as usize].since < since);
        let at = from + self.idle[from..].iter().position(|&(i, _)| i == index).expect("an idle row is in the stack");
        self.fading -= u32::from(std::mem::take(&mut self.rows[index as usize].fading));
        self.idle.remove(at).1
    }

    fn drain_idle(&mut self, from: usize, to: usize) -> Vec<(u32, C)> {
        let out: Vec<_> = self.idle.drain(from..to.max(from)).collect();
        for &(index, _) in &out {
            self.fading -= u32::from(std::mem::take(&mut self.rows[index as usize].fading));
        }
        out
    }
}

#[cfg(test)]
mod tests;
