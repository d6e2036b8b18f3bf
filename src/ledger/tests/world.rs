//! [`World`]: a server, an executor and a reaper without threads, on virtual time. The world carries out the ledger's
//! orders, each part after the time that a test sets. After every step it compares what the ledger says with an account
//! of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::panic::Location;

use super::watch::Beat;
pub(super) use crate::leaf::clock::Moment;
pub(super) use crate::leaf::failures::ErrorType;
pub(super) use crate::ledger::demand::{BACKOFF_FIRST, FailedOpen, PROBE_PERIOD};
pub(super) use crate::ledger::queue::{HANDED_OFF_AFTER, MAX_BARGES};
pub(super) use crate::ledger::reports::CLOSE_PATIENCE;
pub(super) use crate::ledger::slots::{CHECK_PATIENCE, Check, Close, Slot, State, StateCounts};
pub(super) use crate::ledger::values::{
    Caller, Condition, Join, OpenError, Order, Outcome, Reach, SlotJob, Take, Ticket, Token,
};
pub(super) use crate::ledger::{Effects, Ledger};
pub(super) use crate::settings::{Settings, Validate};
pub(super) use crate::stats::Counts;
pub(super) use crate::stats::{CloseReason, ConnectionState};
pub(super) use std::time::Duration;

pub(super) type Conn = u64;
pub(super) type Thread = u64;

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(super) fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

pub(super) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(super) fn error(reach: Reach) -> OpenError {
    OpenError { reach, error_type: ErrorType::OTHER }
}

#[track_caller]
pub(super) fn here() -> Caller {
    Caller { at: Location::caller(), thread: 1 }
}

pub(super) fn settings() -> Settings {
    Settings {
        max_size: 20,
        min_idle: 0,
        max_idle: Some(secs(600)),
        max_lifetime: None,
        lifetime_jitter: 0.0,
        validate: Validate::Never,
        validation_timeout: secs(2),
        open_timeout: secs(10),
        close_timeout: secs(5),
        parallel_opens: 4,
        max_waiting: None,
        keepalive: None,
        leak_threshold: None,
        fair_after: Duration::ZERO,
        ..Settings::default()
    }
}

/// What happens to a job next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The job was ordered, and a thread takes it up.
    Begin(Task),
    /// The server has answered to the connect.
    Opened,
    /// The connection has answered to a check.
    Checked,
    /// The connection has been reset.
    Reset,
    /// The user's handlers of a failure have run. `true`: a connection is left to close.
    Handled(bool),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Open,
    Check,
    Reset,
    Close,
}

/// A job that the world's executor carries out.
pub(super) struct Job {
    pub(super) token: Token,
    pub(super) conn: Conn,
    pub(super) begun: Moment,
    /// The number of the event with which the job began.
    pub(super) event: u64,
    /// Whether a thread of the executor runs the job: not if it waits for a thread, nor if a close runs on the thread
    /// that ordered it.
    pub(super) counted: bool,
}

/// A check that a caller makes for itself.
pub(super) struct Own {
    pub(super) thread: Thread,
    pub(super) token: Token,
    pub(super) conn: Conn,
    pub(super) ticket: Ticket,
    pub(super) begun: Moment,
    pub(super) event: u64,
}

/// How long each part of a job takes. `Duration::MAX`: the part hangs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Takes {
    /// From an order until a thread takes it up.
    pub(super) start: Duration,
    pub(super) open: Duration,
    pub(super) check: Duration,
    /// What the user's handler does with an error.
    pub(super) handler: Duration,
    pub(super) close: Duration,
}

pub(super) const QUICK: Takes = Takes {
    start: Duration::ZERO,
    open: Duration::ZERO,
    check: Duration::ZERO,
    handler: Duration::ZERO,
    close: Duration::ZERO,
};

pub(super) struct World {
    pub(super) ledger: Ledger<Conn, Thread>,
    pub(super) now: Moment,
    pub(super) jobs: BTreeMap<(Moment, u64), (Event, Job)>,
    pub(super) own: BTreeMap<(Moment, u64), Own>,
    pub(super) serial: u64,
    /// What the server sees: every connection dialled and not yet closed, with the moments of its connect and of its
    /// last use.
    pub(super) server: BTreeMap<Conn, (Moment, Moment)>,
    /// The connections in use, and by which thread.
    pub(super) in_use: HashMap<Thread, (Token, Conn)>,
    /// The waiters, in order of arrival, and since when.
    pub(super) waiting: VecDeque<(Thread, Ticket, Moment)>,
    /// The waiters that are notified, and when each will come.
    pub(super) awake: BTreeMap<(Moment, u64), Thread>,
    /// How often a waiter was notified in vain.
    pub(super) in_vain: u32,
    pub(super) refused: Vec<Thread>,
    pub(super) dismissed: Vec<Thread>,
    pub(super) closes: Vec<(Moment, Conn, CloseReason)>,
    pub(super) abandoned: u32,
    /// How long each of them had run, as it is told.
    pub(super) abandoned_after: Vec<Duration>,
    pub(super) leaks: Vec<u64>,
    pub(super) recoveries: Vec<(Duration, u64)>,
    pub(super) dials: Vec<Moment>,
    pub(super) next_thread: Thread,
    pub(super) takes: Takes,
    /// How long a notified waiter takes to come.
    pub(super) wake_time: Duration,
    /// How far behind the true time is what the ledger is told, other than by the reaper.
    pub(super) skew: Duration,
    pub(super) most_skew: Duration,
    /// Whether a thread can be started.
    pub(super) spawns: bool,
    /// `Some(permanent)`: opens fail.
    pub(super) refuse: Option<Reach>,
    /// An open that fails leaves a connection behind, which its own job closes. So it is if a customizer refuses a
    /// connection, or `started` the first.
    pub(super) leaves_one: bool,
    /// The jitter of the pause after a failed open.
    pub(super) jitter: f64,
    /// Connections that fail their next check.
    pub(super) dead: Vec<Conn>,
    /// Whether a caller can see that a connection is well without asking the server.
    pub(super) sees: bool,
    /// Numbers the events in their order: the beginning of each open and check, each connection found dead, each
    /// `recycle`.
    pub(super) events: u64,
    /// The beginning of the open or check that last proved each connection well.
    pub(super) proven: HashMap<Conn, u64>,
    /// The last event that found a connection dead.
    pub(super) suspect: u64,
    /// The event with which each connection was dialled.
    pub(super) dialled: HashMap<Conn, u64>,
    /// The last event that replaced all connections dialled before.
    pub(super) replaced: u64,
    /// The greatest `max_size` there was.
    pub(super) greatest: u32,
    /// The most connections that the server has seen.
    pub(super) most: usize,
    /// The jobs that the executor runs, and that are not abandoned.
    pub(super) posted: BTreeMap<u64, Task>,
    /// The closes among them that count as running side by side.
    pub(super) closers: BTreeSet<u64>,
    /// The closes that wait for another close to end.
    pub(super) backlog: VecDeque<(Token, Conn)>,
    /// How many slots were taken after the last call of the ledger...
    pub(super) total: u32,
    /// ... and how many orders stood in the effects then.
    pub(super) seen: usize,
    /// The longest time that a successful open took.
    pub(super) slowest_open: Duration,
    /// Whether the world acts for the reaper, whose thread runs no job.
    pub(super) reaping: bool,
    /// Until when the reaper sleeps: the alarm to which it was woken last. `NEVER`, too, once it has ended.
    pub(super) sleeps_until: Moment,
    /// How often it has woken.
    pub(super) reaps: u32,
    /// Whether the world fails if a waiter is forgotten.
    pub(super) strict: bool,
    /// Whether every job was taken up by a thread as soon as the executor had it.
    pub(super) starts_at_once: bool,
    beat: Beat,
}

/// How long a job waits if its thread cannot be started, until it is tried again.
pub(super) const AGAIN: Duration = Duration::from_millis(50);

/// How much may happen at one moment, so that a world in which time stands still fails, and does not hang.
const MOST_AT_ONCE: u32 = 100_000;

/// How many closes run side by side that do not take longer than usual.
pub(super) const CLOSERS: usize = 4;

/// Whether the close of the connection in this slot is past its limit.
pub(super) fn is_stuck(slot: &Slot) -> bool {
    matches!(slot.state, State::Closing(Close::Stuck, _))
}

impl Counts {
    pub(super) fn total(&self) -> u32 {
        self.idle + self.in_use + self.checking + self.opening + self.closing
    }
}

impl World {
    /// A pool whose warm-up has set the floor already, with a clock that is exact.
    pub(super) fn new(settings: Settings) -> World {
        World::with_resolution(settings, Duration::ZERO)
    }

    pub(super) fn with_resolution(settings: Settings, resolution: Duration) -> World {
        let floor = settings.min_idle;
        let mut ledger = Ledger::new(settings, resolution);
        ledger.rules.change(|s| s.min_idle = floor);
        World {
            ledger,
            now: Moment::BIRTH,
            jobs: BTreeMap::new(),
            own: BTreeMap::new(),
            serial: 0,
            server: BTreeMap::new(),
            in_use: HashMap::new(),
            waiting: VecDeque::new(),
            awake: BTreeMap::new(),
            in_vain: 0,
            refused: Vec::new(),
            dismissed: Vec::new(),
            closes: Vec::new(),
            abandoned: 0,
            abandoned_after: vec![],
            leaks: Vec::new(),
            recoveries: Vec::new(),
            dials: Vec::new(),
            next_thread: 0,
            takes: QUICK,
            wake_time: Duration::ZERO,
            skew: Duration::ZERO,
            most_skew: Duration::ZERO,
            spawns: true,
            refuse: None,
            leaves_one: false,
            jitter: 0.0,
            dead: Vec::new(),
            sees: false,
            events: 0,
            proven: HashMap::new(),
            suspect: 0,
            dialled: HashMap::new(),
            replaced: 0,
            greatest: 0,
            most: 0,
            posted: BTreeMap::new(),
            closers: BTreeSet::new(),
            backlog: VecDeque::new(),
            total: 0,
            seen: 0,
            slowest_open: Duration::ZERO,
            reaping: false,
            sleeps_until: Moment::BIRTH,
            reaps: 0,
            strict: false,
            starts_at_once: true,
            beat: Beat::new(),
        }
    }

    /// What a thread reads off its clock. The ledger may have been told a later time by another thread since.
    pub(super) fn read(&self) -> Moment {
        self.now.minus(self.skew)
    }

    pub(super) fn event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    pub(super) fn set_skew(&mut self, skew: Duration) {
        self.skew = skew;
        self.most_skew = self.most_skew.max(skew);
    }

    /// To be called after each call of the ledger: its orders never went beyond `max_size`, at no moment of that call.
    pub(super) fn watch_the_bound(&mut self) {
        let l = &self.ledger;
        let (before, after, max) = (i64::from(self.total), i64::from(l.counts().total()), i64::from(l.rules.max_size));
        let orders = &l.effects.orders[self.seen..];
        let frees_slot = |order: &Order<Conn>| match order {
            Order::Abandon { id, .. } => !l.slots().any(|slot| slot.id == *id),
            _ => false,
        };
        let opens = orders.iter().filter(|order| matches!(order, Order::Job(SlotJob::Open(_)))).count() as i64;
        let abandoned = orders.iter().filter(|order| frees_slot(order)).count() as i64;
        // A slot that was freed without abandoning a job was freed before anything was ordered.
        let freed = before + opens - after - abandoned;
        assert!(freed >= 0, "{} slots are occupied that no step ordered", -freed);
        let mut total = before - freed;
        for order in orders {
            if let Order::Job(SlotJob::Open(token)) = order {
                total += 1;
                assert!(total <= max, "#{} was ordered as number {total} of {max}", token.id());
            } else if frees_slot(order) {
                total -= 1;
            }
        }
        assert!(after <= max.max(before), "{after} of {max}: {:?}", l.counts());
        self.total = after as u32;
        self.seen = l.effects.orders.len();
    }

    /// Applies the effects of the ledger.
    pub(super) fn apply(&mut self) {
        self.beat.step();
        self.watch_the_bound();
        while !self.ledger.effects.is_empty() {
            if std::mem::take(&mut self.ledger.effects.wake_reaper) {
                self.sleeps_until = self.ledger.alarm();
            }
            self.ledger.effects.changed = false;
            for (thread, outcome) in std::mem::take(&mut self.ledger.effects.served) {
                // First come, first served, whatever the outcome.
                let (first, ..) = self.waiting.pop_front().expect("an outcome without a waiter");
                assert_eq!(first, thread, "served out of turn");
                match outcome {
                    Outcome::Connection(token, conn) => self.checked_out(thread, token, conn),
                    Outcome::Closed => self.dismissed.push(thread),
                    Outcome::Refused => self.refused.push(thread),
                }
            }
            for thread in std::mem::take(&mut self.ledger.effects.notified) {
                self.serial += 1;
                self.awake.insert((self.now.plus(self.wake_time), self.serial), thread);
            }
            self.seen = 0;
            for order in std::mem::take(&mut self.ledger.effects.orders) {
                self.carry_out(order);
            }
        }
        self.most = self.most.max(self.server.len());
        self.audit();
    }

    pub(super) fn checked_out(&mut self, thread: Thread, token: Token, conn: Conn) {
        let (_, used) = self.server.get_mut(&conn).expect("checked out, but not on the server");
        *used = self.now;
        let slot = &self.ledger.slots[token.index as usize];
        assert!(slot.dies > self.now, "handed out past its lifetime");
        assert!(self.dialled[&conn] > self.replaced, "replaced, and checked out");
        // P9: the open or check that proved this connection well began after every other was found dead.
        assert!(
            self.proven[&conn] > self.suspect || self.ledger.rules.validate == Validate::Never,
            "suspect, and checked out"
        );
        assert!(self.in_use.insert(thread, (token, conn)).is_none());
    }

    pub(super) fn carry_out(&mut self, order: Order<Conn>) {
        let (task, token, conn) = match order {
            Order::Job(SlotJob::Open(token)) => {
                let id = token.id();
                (Task::Open, token, id)
            }
            Order::Job(SlotJob::Check(token, conn)) => (Task::Check, token, conn),
            Order::Job(SlotJob::Reset(token, conn, _)) => (Task::Reset, token, conn),
            Order::Job(SlotJob::Close(token, conn, reason)) => {
                self.closes.push((self.now, conn, reason));
                (Task::Close, token, conn)
            }
            Order::Abandon { id, limit, .. } => {
                self.abandoned += 1;
                self.abandoned_after.push(limit);
                return self.over(id);
            }
            Order::Slow { id } => {
                self.closers.remove(&id);
                return self.take_up();
            }
            Order::Leak { id, .. } => return self.leaks.push(id),
            Order::Recovered { after, attempts } => return self.recoveries.push((after, attempts)),
        };
        self.post(task, token, conn);
    }

    /// Starts a job, as the runtime does in `Shared::post`.
    pub(super) fn post(&mut self, task: Task, token: Token, conn: Conn) {
        if task == Task::Close && !self.may_close() {
            return self.backlog.push_back((token, conn));
        }
        let mut job = Job { token, conn, begun: self.now, event: 0, counted: false };
        if self.spawns {
            self.count(&mut job, task);
            if self.takes.start > Duration::ZERO {
                return self.later(self.takes.start, Event::Begin(task), job);
            }
        } else {
            match task {
                Task::Open => {
                    self.ledger.open_failed(self.read(), &job.token, error(Reach::Server), self.jitter);
                    self.watch_the_bound();
                    self.ledger.free(self.read(), job.token);
                    return self.watch_the_bound();
                }
                // A close runs on the thread that ordered it, and is not one of the executor's.
                Task::Close if self.posted.is_empty() && !self.reaping => {}
                _ => return self.later(AGAIN, Event::Begin(task), job),
            }
        }
        self.begin(task, job);
    }

    pub(super) fn count(&mut self, job: &mut Job, task: Task) {
        job.counted = true;
        self.posted.insert(job.token.id(), task);
        if task == Task::Close {
            self.closers.insert(job.token.id());
        }
    }

    /// A job is over, or abandoned.
    pub(super) fn over(&mut self, id: u64) {
        self.posted.remove(&id);
        self.closers.remove(&id);
        self.take_up();
    }

    /// Whether another close may run: four side by side, and one more for each that takes longer than usual.
    pub(super) fn may_close(&self) -> bool {
        let slow = self.posted.values().filter(|&&task| task == Task::Close).count() - self.closers.len();
        self.closers.len() < CLOSERS + slow
    }

    /// Starts closes of the backlog, as far as they may run.
    pub(super) fn take_up(&mut self) {
        while self.may_close() {
            let Some((token, conn)) = self.backlog.pop_front() else { return };
            self.post(Task::Close, token, conn);
        }
    }

    pub(super) fn later(&mut self, after: Duration, event: Event, job: Job) {
        self.serial += 1;
        self.jobs.insert((self.now.plus(after), self.serial), (event, job));
    }

    pub(super) fn begin(&mut self, task: Task, mut job: Job) {
        let id = job.token.id();
        let (event, takes) = match task {
            Task::Open => (Event::Opened, self.takes.open),
            Task::Check => (Event::Checked, self.takes.check),
            Task::Reset => (Event::Reset, self.takes.check),
            Task::Close => (Event::Closed, self.takes.close),
        };
        if task == Task::Close {
            self.ledger.begin_close(self.read(), &job.token);
        } else {
            let Some(token) = self.ledger.begin(self.read(), job.token, 1.0) else {
                self.watch_the_bound();
                return self.over(id);
            };
            job.token = token;
        }
        self.watch_the_bound();
        job.begun = self.now;
        job.event = self.event();
        if task == Task::Open {
            self.server.insert(job.conn, (self.now, self.now));
            self.dialled.insert(job.conn, job.event);
            self.assert_a_dial_is_due();
            self.dials.push(self.now);
        }
        self.later(takes, event, job);
    }

    /// P5: at most `max_size` jobs are abandoned or dial, and one more if the last dial came through. Beyond that the
    /// server is dialled once a minute.
    pub(super) fn assert_a_dial_is_due(&self) {
        let dialled = self.jobs.values().filter(|(event, job)| *event == Event::Opened && self.is_counted_on(job));
        let others = self.counts().abandoned + dialled.count() as u32;
        let probe = self.dials.last().is_none_or(|last| self.now.since(*last) + self.most_skew >= PROBE_PERIOD);
        let most = self.greatest.max(self.ledger.rules.max_size) + u32::from(self.ledger.failure.is_none());
        assert!(others < most || probe, "{others} may be abandoned, and one more is dialled");
    }

    /// Whether the job has its slot.
    pub(super) fn is_counted_on(&self, job: &Job) -> bool {
        self.ledger.is_current(&job.token) && !is_stuck(&self.ledger.slots[job.token.index as usize])
    }

    /// A part of a job has ended: the job reports it and goes on.
    pub(super) fn report(&mut self, event: Event, mut job: Job) {
        let (now, id, conn) = (self.read(), job.token.id(), job.conn);
        match event {
            Event::Begin(_) if !job.counted && !self.spawns => self.later(AGAIN, event, job),
            Event::Begin(task) => {
                if !job.counted {
                    self.count(&mut job, task);
                }
                self.begin(task, job);
            }
            Event::Opened if self.refuse.is_some() => {
                if !self.leaves_one {
                    self.server.remove(&conn);
                }
                self.ledger.open_failed(now, &job.token, error(self.refuse.expect("it is refused")), self.jitter);
                self.apply();
                self.next(self.takes.handler, Event::Handled(self.leaves_one), job);
            }
            Event::Opened => {
                self.proven.insert(conn, job.event);
                let begun = self.now.since(job.begun);
                match self.ledger.opened(now, job.token, conn) {
                    Ok(_) => {
                        self.slowest_open = self.slowest_open.max(begun);
                        self.over(id);
                    }
                    Err((token, _)) => return self.close_late(Job { token, ..job }),
                }
                let used = self.ledger.now;
                if let Some(at) = self.server.get_mut(&conn) {
                    at.1 = used;
                }
            }
            Event::Checked | Event::Reset if self.dead.contains(&conn) => {
                self.server.remove(&conn);
                let reason = if event == Event::Reset { CloseReason::ResetFailed } else { CloseReason::Invalid };
                let was_abandoned = !self.is_counted_on(&job);
                if reason == CloseReason::Invalid && !was_abandoned {
                    self.suspect = self.event(); // (that it was abandoned was an event before)
                }
                self.ledger.check_failed(now, &job.token, reason);
                self.apply();
                self.next(self.takes.handler, Event::Handled(true), job);
            }
            Event::Checked | Event::Reset => {
                self.proven.insert(conn, job.event);
                match self.ledger.checked(now, job.begun.minus(self.skew), job.token, conn) {
                    Ok(()) => self.over(id),
                    Err((token, _)) => return self.close_late(Job { token, ..job }),
                }
            }
            Event::Handled(true) => {
                self.ledger.begin_close(now, &job.token);
                self.apply();
                self.next(self.takes.close, Event::Closed, job);
            }
            Event::Handled(false) | Event::Closed => {
                self.server.remove(&conn);
                self.ledger.free(now, job.token);
                self.over(id);
            }
        }
        self.apply();
    }

    /// A job goes on with its next part.
    pub(super) fn next(&mut self, takes: Duration, event: Event, job: Job) {
        if takes == Duration::ZERO { self.report(event, job) } else { self.later(takes, event, job) }
    }

    /// An abandoned job closes the connection that it brings.
    pub(super) fn close_late(&mut self, job: Job) {
        self.apply();
        self.report(Event::Handled(true), job);
    }

    /// A caller's own check has come to its end.
    pub(super) fn own_check(&mut self, own: Own) {
        let Own { thread, token, conn, ticket, begun, event } = own;
        let now = self.read();
        let limit = self.ledger.rules.validation_timeout;
        if self.dead.contains(&conn) || self.now.since(begun) >= limit {
            self.server.remove(&conn);
            self.suspect = self.event();
            self.ledger.check_failed(now, &token, CloseReason::Invalid);
            self.apply();
            self.closes.push((self.now, conn, CloseReason::Invalid));
            self.post(Task::Close, token, conn);
        } else {
            self.proven.insert(conn, event);
            if let Some((token, conn)) = self.ledger.own_check_passed(now, begun.minus(self.skew), token, conn, here())
            {
                self.checked_out(thread, token, conn);
                return self.apply();
            }
        }
        self.apply();
        self.join(thread, Some(ticket));
        self.apply();
    }

    pub(super) fn join(&mut self, thread: Thread, place: Option<Ticket>) {
        match self.ledger.join(self.read(), here(), place, false, thread).0 {
            Join::Ready(token, conn) => self.checked_out(thread, token, conn),
            Join::Queued(ticket) => {
                let at = self.waiting.partition_point(|w| w.1 < ticket);
                self.waiting.insert(at, (thread, ticket, ticket.since));
            }
            Join::Refused | Join::TooMany(_) => self.refused.push(thread),
            Join::Closed => self.dismissed.push(thread),
        }
    }

    /// Lets time go on, and does everything that falls due on the way.
    pub(super) fn run_to(&mut self, until: Moment) {
        let mut standing = 0;
        loop {
            let job = self.jobs.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let own = self.own.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let alarm = self.sleeps_until;
            let wake = self.awake.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let next = job.min(alarm).min(wake).min(own).max(self.now);
            if next > self.now {
                self.check_no_waiter_is_forgotten();
            }
            if next > until || next == Moment::NEVER {
                break;
            }
            standing = if next > self.now { 0 } else { standing + 1 };
            assert!(standing < MOST_AT_ONCE, "time stands still at {next:?}: {:?}", self.counts());
            self.now = next;
            if wake <= next {
                let (_, thread) = self.awake.pop_first().unwrap();
                self.come(thread);
            } else if own <= next {
                let (_, own) = self.own.pop_first().unwrap();
                self.own_check(own);
            } else if job <= alarm {
                let (_, (event, job)) = self.jobs.pop_first().unwrap();
                self.report(event, job);
            } else if self.ledger.reaper_ends() {
                self.sleeps_until = Moment::NEVER;
            } else {
                self.ledger.reap(next, 0.0);
                self.reaps += 1;
                self.reaping = true;
                self.apply();
                self.reaping = false;
                self.sleeps_until = self.ledger.alarm();
            }
        }
        self.now = until;
    }

    pub(super) fn run(&mut self, d: Duration) {
        self.run_to(self.now.plus(d));
    }

    /// Jobs and checks that hang end now.
    pub(super) fn release(&mut self) {
        for (at, event) in self.jobs.split_off(&(Moment::NEVER, 0)) {
            self.jobs.insert((self.now, at.1), event);
        }
        for (at, own) in self.own.split_off(&(Moment::NEVER, 0)) {
            self.own.insert((self.now, at.1), own);
        }
    }

    /// A notified waiter comes, if it has not been served, and has not left, since.
    pub(super) fn come(&mut self, thread: Thread) {
        if let Some(at) = self.waiting.iter().position(|w| w.0 == thread) {
            match self.ledger.take_notified(self.read(), self.waiting[at].1) {
                Some((token, conn)) => {
                    self.waiting.remove(at);
                    // (If a connection is left, the first waiter can have that one.)
                    if at > 0 && self.ledger.idle.is_empty() {
                        self.assert_may_barge();
                    }
                    self.checked_out(thread, token, conn);
                }
                None => self.in_vain += 1,
            }
            self.apply();
        }
    }

    /// The notified waiter comes only after `time`.
    pub(super) fn oversleeps(&mut self, thread: Thread, time: Duration) {
        self.awake.retain(|_, &mut notified| notified != thread);
        self.serial += 1;
        self.awake.insert((self.now.plus(time), self.serial), thread);
    }

    /// P7: no caller is served before a waiter that has waited for `fair_after`.
    pub(super) fn assert_may_barge(&self) {
        if let Some(&(first, _, since)) = self.waiting.front() {
            let waited = self.ledger.now.since(since);
            assert!(waited < self.ledger.rules.fair_after, "{first} was barged after {waited:?}");
        }
    }

    /// A thread asks for a connection: it has one at once (and is then in `in_use`), or waits, or is rejected.
    pub(super) fn get(&mut self) -> Thread {
        self.get_or_check(false)
    }

    /// The same; `here`: the thread can check a connection for itself.
    pub(super) fn get_or_check(&mut self, here: bool) -> Thread {
        self.next_thread += 1;
        let thread = self.next_thread;
        match self.ledger.take(self.read(), self::here(), here) {
            Take::Ready(token, conn) => {
                self.assert_may_barge();
                self.checked_out(thread, token, conn);
            }
            Take::Check(token, conn, ticket) => {
                assert!(here, "the caller did not offer to check");
                self.serial += 1;
                let event = self.event();
                let until = self.now.plus(self.takes.check.min(self.ledger.rules.validation_timeout));
                self.own.insert((until, self.serial), Own { thread, token, conn, ticket, begun: self.now, event });
            }
            Take::Nothing => self.join(thread, None),
        }
        self.apply();
        self.run(Duration::ZERO);
        thread
    }

    /// A thread asks for a connection, and does not wait.
    pub(super) fn try_get(&mut self) -> Option<Thread> {
        let taken = match self.ledger.take_at_once(self.read(), here()) {
            Take::Ready(token, conn) => Some((token, conn)),
            Take::Check(token, conn, _) => self.ledger.looked_at(self.read(), token, conn, here(), self.sees),
            Take::Nothing => None,
        };
        let checked_out = match taken {
            Some((token, conn)) => {
                self.next_thread += 1;
                self.assert_may_barge();
                self.checked_out(self.next_thread, token, conn);
                Some(self.next_thread)
            }
            None => {
                self.ledger.prepare(self.read());
                self.check_that_one_is_prepared();
                None
            }
        };
        self.apply();
        self.run(Duration::ZERO);
        checked_out
    }

    pub(super) fn returned(&mut self, thread: Thread) {
        self.returned_as(thread, Condition::Keep);
    }

    pub(super) fn returned_as(&mut self, thread: Thread, condition: Condition) {
        let (token, conn) = self.in_use.remove(&thread).unwrap_or_else(|| panic!("{thread} has none"));
        let now = self.read().max(self.ledger.now);
        self.server.get_mut(&conn).unwrap().1 = now;
        match condition {
            Condition::Broken => self.suspect = self.event(),
            // Only the first of a generation replaces it.
            Condition::Outdated if self.dialled[&conn] > self.replaced => self.replaced = self.event(),
            _ => {}
        }
        self.ledger.returned(self.read(), token, conn, condition);
        self.apply();
        self.run(Duration::ZERO);
    }

    /// A waiter leaves. Whether it was still queued.
    pub(super) fn leave(&mut self, thread: Thread) -> bool {
        let at = self.waiting.iter().position(|w| w.0 == thread);
        let left = at.and_then(|at| {
            let (_, ticket, _) = self.waiting.remove(at).unwrap();
            self.ledger.leave(self.read(), ticket)
        });
        self.apply();
        left.is_some()
    }

    pub(super) fn use_once(&mut self, time: Duration) {
        let thread = self.get();
        self.run(time);
        self.returned(thread);
    }

    /// Checks out `n` connections at once, and returns them all.
    pub(super) fn burst(&mut self, n: u64) {
        let threads: Vec<_> = (0..n).map(|_| self.get()).collect();
        self.run(self.takes.open.saturating_mul(n as u32));
        for thread in threads {
            self.returned(thread);
        }
    }

    /// Whether the thread has a connection.
    pub(super) fn has(&self, thread: Thread) -> bool {
        self.in_use.contains_key(&thread)
    }

    pub(super) fn counts(&self) -> Counts {
        self.ledger.counts()
    }

    pub(super) fn closed_for(&self, reason: CloseReason) -> usize {
        self.closes.iter().filter(|c| c.2 == reason).count()
    }

    // ------------------------------------------------------------------------------------------ what waiters wait for

    /// The longest time that waiters may count on an open that has begun: three times the slowest successful open.
    pub(super) fn open_patience(&self) -> Duration {
        secs(1).max(self.slowest_open.saturating_mul(3))
    }

    /// The jobs that may bring a connection any moment, as of `at`: opens and checks by the executor that have not begun, or
    /// began not long ago.
    pub(super) fn coming(&self, at: Moment) -> u32 {
        let is_coming = |(event, job): &&(Event, Job)| {
            let patience = match event {
                Event::Begin(Task::Close) | Event::Handled(_) | Event::Closed => return false,
                Event::Begin(_) => Duration::MAX,
                Event::Opened => self.open_patience(),
                Event::Checked | Event::Reset => CHECK_PATIENCE,
            };
            let slot = &self.ledger.slots[job.token.index as usize];
            self.ledger.is_current(&job.token) && !is_stuck(slot) && job.begun.plus(patience) > at
        };
        self.jobs.values().filter(is_coming).count() as u32
    }

    /// Whether another connection may be dialled at that moment, by the bound, the limit of parallel opens, the
    /// back-off, and the bound of abandoned jobs.
    pub(super) fn has_room(&self, now: Moment) -> bool {
        let (l, counts) = (&self.ledger, self.counts());
        let alone = counts.opening == 0;
        counts.total() < l.rules.max_size
            && counts.opening < l.rules.parallel_opens
            && l.failure.is_none_or(|f| alone && f.retry <= now)
            && (counts.abandoned + counts.opening < l.rules.max_size || alone && l.last_dial.plus(PROBE_PERIOD) <= now)
    }

    /// To be called when everything that is due was done. Each waiter is notified and on its way, or a job that may
    /// bring a connection any moment is under way for it. Otherwise nothing can be done for it: there is no idle
    /// connection to check or to hand off, and no room to open another.
    pub(super) fn check_no_waiter_is_forgotten(&self) {
        if !self.strict || self.ledger.closed || self.waiting.is_empty() {
            return;
        }
        let (l, counts) = (&self.ledger, self.counts());
        let on_the_way = self.awake.values().filter(|&thread| self.waiting.iter().any(|w| w.0 == *thread)).count();
        let unserved = self.waiting.len() - on_the_way.min(l.idle.len());
        // The first slow open is not counted on, and every further one is: see `Ledger::wants_open`.
        let slow = l.counted.slow_opens().saturating_sub(1);
        let coming = self.coming(self.now) + slow;
        if coming as usize >= unserved {
            return;
        }
        let hope = format!("{unserved} wait, {coming} come: {counts:?} at {:?}", self.now);
        // (A notified waiter has first choice: the plan looks after the connection that it leaves.)
        assert!(on_the_way > 0 || l.idle.is_empty(), "a waiter waits beside an idle connection: {hope}");
        assert!(!self.has_room(self.now), "a waiter waits beside room for another: {hope}");
    }

    /// To be called after a caller that does not wait has asked: a connection is being made ready, if that is possible.
    pub(super) fn check_that_one_is_prepared(&self) {
        let l = &self.ledger;
        // By the time that the ledger was told, which may be behind that of the world.
        let coming = self.coming(l.now);
        let ordered = l
            .effects
            .orders
            .iter()
            .any(|order| matches!(order, Order::Job(SlotJob::Open(_)) | Order::Job(SlotJob::Check(..))));
        if !self.strict
            || l.closed
            || ordered
            || coming + l.counted.slow_opens().saturating_sub(1)
                > l.waiting() - l.queue.notified().min(l.ready(l.now)) as u32
        {
            return;
        }
        let suspect = l.idle.last().is_some_and(|&(top, _)| l.needs_check(&l.slots[top as usize], l.now));
        let what = format!("{coming} come: {:?} at {:?}", l.counts(), self.now);
        assert!(!suspect, "an idle connection that needs a check is not made ready: {what}");
        assert!(!l.idle.is_empty() || !self.has_room(l.now), "nothing is made ready though there is room: {what}");
    }

    // ------------------------------------------------------------------------------------------ what must hold

    /// What must hold after every step. (In a large pool only some steps are looked at, for the test's time.)
    pub(super) fn audit(&self) {
        let (l, now) = (&self.ledger, self.now);
        if l.slots.len() > 100 && !self.serial.is_multiple_of(997) {
            return;
        }
        let counts = l.counts();
        let state = |s| l.slots().filter(|r| r.as_seen() == s).count() as u32;
        assert_eq!(counts.idle, state(ConnectionState::Idle));
        assert_eq!(counts.in_use, state(ConnectionState::InUse));
        assert_eq!(counts.checking, state(ConnectionState::Checking));
        assert_eq!(counts.opening, state(ConnectionState::Opening));
        assert_eq!(counts.closing, state(ConnectionState::Closing));
        assert_eq!(counts.in_use as usize, self.in_use.len());
        assert_eq!(counts.waiting as usize, self.waiting.len());
        assert_eq!(StateCounts::recount(&l.slots), l.counted, "a slot is counted under another state than it has");
        assert_eq!(counts.idle as usize, l.idle.len());
        assert_eq!(counts.total() as usize + l.free.len(), l.slots.len());
        assert!(
            self.server.len() <= (counts.total() + counts.abandoned) as usize,
            "the server sees more than is counted"
        );
        assert_eq!(
            l.patience.len(),
            l.slots().filter(|slot| slot.job().is_some_and(|job| job.patience != Moment::NEVER)).count()
        );
        // The stack is sorted. If callers wait beside idle connections, one is notified, or a job is under way for
        // each.
        let since: Vec<_> = l.idle.iter().map(|&(i, _)| l.slots[i as usize].since).collect();
        assert!(since.is_sorted());
        assert_eq!(
            l.front.map(|f| (f.ticket, f.since)),
            self.waiting.front().map(|&(_, ticket, since)| (ticket, since))
        );
        if counts.waiting > 0 && !l.idle.is_empty() {
            let notified = l.queue.notified() as u32;
            assert!(
                notified > 0 || l.counted.opens() + l.counted.checks() >= counts.waiting || l.alarm <= now,
                "idle, while a caller waits"
            );
        }
        let marked = l.queue.marked();
        let on_the_way = self.awake.values().filter(|&thread| self.waiting.iter().any(|w| w.0 == *thread)).count();
        assert_eq!((marked.len(), l.queue.notified()), (on_the_way, on_the_way), "the notified, counted anew");
        assert!(l.queue.tickets().iter().eq(self.waiting.iter().map(|w| &w.1)), "the queue, in order");
        for ticket in marked {
            let thread = self.waiting.iter().find(|w| w.1 == ticket).map(|w| w.0);
            assert!(self.awake.values().any(|&s| Some(s) == thread), "notified, and not on the way");
        }
        // What would be found by a look at every slot.
        let of = |pick: &dyn Fn(&Slot) -> Option<Moment>| l.slots().filter_map(pick).min().unwrap_or(Moment::NEVER);
        let under_way = of(&|slot| match slot.state {
            State::Checking(Check::Executor | Check::Reset, job) | State::Opening(job) if !job.slow => Some(slot.since),
            _ => None,
        });
        assert_eq!(l.under_way.first().map_or(Moment::NEVER, |&(since, _)| since), under_way);
        let stuck = (0..l.slots.len() as u32).filter(|&index| is_stuck(&l.slots[index as usize]));
        assert!(l.stuck.iter().copied().eq(stuck), "the stuck jobs");
        let replaced = of(&|slot| match slot.state {
            State::Closing(Close::Runs, _) if slot.generation < l.generation => Some(slot.since),
            _ => None,
        });
        assert_eq!(l.replaced.first().map_or(Moment::NEVER, |&(since, _)| since), replaced);
        if let Some(period) = l.rules.keepalive.filter(|_| l.keepalive.is_none() && !l.closed) {
            let due = of(&|slot| match slot.state {
                State::Idle { .. } => Some(slot.since.max(slot.proven).plus(period)),
                _ => None,
            });
            assert!(l.alarm <= due.max(now), "a keepalive without an alarm");
        }
        if let Some(threshold) = l.rules.leak_threshold.filter(|_| !l.closed) {
            let due = of(&|slot| match slot.state {
                State::InUse { warned: false, .. } => Some(slot.since.plus(threshold)),
                _ => None,
            });
            assert!(l.alarm <= due.max(now), "a leak without an alarm");
        }
        // For everything that falls due the alarm is set early enough.
        assert!(l.alarm <= l.idle_deadline(), "an idle deadline without an alarm");
        for slot in l.slots() {
            if slot.as_seen() == ConnectionState::Idle {
                assert!(l.alarm <= slot.dies || slot.dies <= now, "a lifetime without an alarm");
            }
            let limit = slot.job().map_or(Moment::NEVER, |job| job.limit);
            assert!(l.alarm <= limit);
            assert_eq!(limit != Moment::NEVER, l.limits.iter().any(|&(_, i)| l.slots[i as usize].id == slot.id));
            if let State::Checking(Check::Own(_), job) = slot.state {
                assert_eq!((job.limit, job.patience, job.slow), (Moment::NEVER, Moment::NEVER, false));
            }
        }
        for &(dies, index) in &l.lifetimes {
            let slot = &l.slots[index as usize];
            assert!(
                slot.id != 0
                    && slot.dies == dies
                    && slot.as_seen() != ConnectionState::Closing
                    && slot.as_seen() != ConnectionState::Opening
            );
        }
        if l.closed {
            assert!(counts.idle == 0 && counts.waiting == 0);
        }
    }
}
