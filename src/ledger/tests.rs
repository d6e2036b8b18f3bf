//! The rules, on virtual time.
//!
//! [`World`] is a server, a crew and a reaper without threads: it carries out the ledger's orders after the times it is
//! told, at exactly the moments they are due, and holds everything the ledger says against a naive account of its own.

use super::*;
use crate::runtime::executor::Kind;
use std::collections::{HashMap, VecDeque};

type Conn = u64;
type Seat = u64;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[track_caller]
fn here() -> Caller {
    Caller { at: Location::caller(), thread: 1 }
}

fn rules() -> Rules {
    Rules {
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
        resolution: Duration::ZERO,
    }
}

/// What happens to a job when its time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// It was ordered, and a thread takes it up.
    Begin(Task),
    /// The server has answered to the connect.
    Opened,
    /// The connection has answered to a check.
    Checked,
    /// The connection has been reset.
    Reset,
    /// The user's handlers of a failure have run, and if `true` there is a connection left to close.
    Handled(bool),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Open,
    Check,
    Reset,
    Close,
}

impl Task {
    fn kind(self) -> Kind {
        match self {
            Task::Open => Kind::Open,
            Task::Check | Task::Reset => Kind::Check,
            Task::Close => Kind::Close,
        }
    }
}

/// A job that the world's crew carries out.
struct Job {
    token: Token,
    conn: Conn,
    begun: Moment,
    /// The event with which it began.
    event: u64,
    /// Whether it is the crew's: not if it waits for a thread, nor if it is a close on a thread that is not the crew's.
    counted: bool,
}

/// A check that a worker makes for itself.
struct Own {
    seat: Seat,
    token: Token,
    conn: Conn,
    ticket: Ticket,
    begun: Moment,
    event: u64,
}

/// How long the world takes for each part of a job. `Duration::MAX`: for ever.
#[derive(Clone, Copy, Debug)]
struct Takes {
    /// From an order until a thread takes it up.
    start: Duration,
    open: Duration,
    check: Duration,
    /// What the user's handler does with an error.
    handler: Duration,
    close: Duration,
}

const QUICK: Takes = Takes {
    start: Duration::ZERO,
    open: Duration::ZERO,
    check: Duration::ZERO,
    handler: Duration::ZERO,
    close: Duration::ZERO,
};

struct World {
    ledger: Ledger<Conn, Seat>,
    now: Moment,
    jobs: BTreeMap<(Moment, u64), (Event, Job)>,
    own: BTreeMap<(Moment, u64), Own>,
    serial: u64,
    /// What the server sees: every connection dialled and not yet closed, with its birth and its last use.
    server: BTreeMap<Conn, (Moment, Moment)>,
    /// Connection connections, and to whom.
    out: HashMap<Seat, (Token, Conn)>,
    /// Who waits, in order of arrival, and since when.
    waiting: VecDeque<(Seat, Ticket, Moment)>,
    /// Who has been called, and is on the way.
    awake: BTreeMap<(Moment, u64), Seat>,
    /// How often somebody came and found nothing.
    in_vain: u32,
    refused: Vec<Seat>,
    turned_out: Vec<Seat>,
    closes: Vec<(Moment, Conn, CloseReason)>,
    written_off: u32,
    leaks: Vec<u64>,
    dials: Vec<Moment>,
    next_seat: Seat,
    takes: Takes,
    /// How long one who is called takes to come.
    wake_time: Duration,
    /// How far behind the true time is what the ledger is told, except by the reaper.
    skew: Duration,
    most_skew: Duration,
    /// Whether a thread can be started.
    spawns: bool,
    /// `Some(permanent)`: opens fail.
    refuse: Option<bool>,
    /// An open that fails leaves a connection behind, which its own job closes (what the first one of a build, or one that
    /// a customizer turns down, comes to).
    leaves_one: bool,
    /// What is drawn for the pause after that.
    jitter: f64,
    /// Connections that fail their next check.
    dead: Vec<Conn>,
    /// Whether one can look at a connection without asking the server.
    sees: bool,
    /// Counts what proves a connection well, at its beginning, and what finds one dead: by which of these each connection
    /// was last proven, and one was last found dead.
    events: u64,
    proven: HashMap<Conn, u64>,
    suspect: u64,
    /// With which event each connection was dialled, and the last that replaces what was dialled before.
    dialled: HashMap<Conn, u64>,
    replaced: u64,
    /// The greatest size there ever was.
    greatest: u32,
    most: usize,
    /// What was given to the crew, has not ended, and is not written off.
    posted: BTreeMap<u64, Kind>,
    /// Those of the closes among them that count as running side by side, and the closes that wait for one to end.
    closers: BTreeSet<u64>,
    backlog: VecDeque<(Token, Conn)>,
    /// The slots in use after the last call, and how many of the orders in the effects were there then.
    total: u32,
    seen: usize,
    /// The longest that an open took which succeeded.
    slowest_open: Duration,
    /// On the reaper's thread, which runs no job.
    reaping: bool,
    /// Whether it is held against the ledger if somebody is forgotten.
    strict: bool,
    /// Whether every job was taken up by a thread as soon as it was given to the crew.
    starts_at_once: bool,
}

/// How long a thread waits that cannot be started, until it is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// How many closes run side by side that do not take longer than usual.
const CLOSERS: usize = 4;

const STUCK: State = State::Closing(Close::Stuck);

impl Counts {
    fn total(&self) -> u32 {
        self.idle + self.in_use + self.checking + self.opening + self.closing
    }
}

impl World {
    fn new(rules: Rules) -> World {
        World {
            ledger: Ledger::new(rules),
            now: Moment::BIRTH,
            jobs: BTreeMap::new(),
            own: BTreeMap::new(),
            serial: 0,
            server: BTreeMap::new(),
            out: HashMap::new(),
            waiting: VecDeque::new(),
            awake: BTreeMap::new(),
            in_vain: 0,
            refused: Vec::new(),
            turned_out: Vec::new(),
            closes: Vec::new(),
            written_off: 0,
            leaks: Vec::new(),
            dials: Vec::new(),
            next_seat: 0,
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
            strict: false,
            starts_at_once: true,
        }
    }

    /// What a thread reads off its clock: it may tell the ledger later, when others have told it of later times.
    fn read(&self) -> Moment {
        self.now.minus(self.skew)
    }

    fn event(&mut self) -> u64 {
        self.events += 1;
        self.events
    }

    fn set_skew(&mut self, skew: Duration) {
        self.skew = skew;
        self.most_skew = self.most_skew.max(skew);
    }

    /// After each call of the ledger: what it has ordered in that call never went beyond the bound, at no moment of it.
    fn watch_the_bound(&mut self) {
        let l = &self.ledger;
        let (before, after, max) = (i64::from(self.total), i64::from(l.counts().total()), i64::from(l.rules.max_size));
        let orders = &l.effects.orders[self.seen..];
        let gave_up = |order: &Order<Conn>| match order {
            Order::Abandon { id, .. } => !l.slots().any(|slot| slot.id == *id),
            _ => false,
        };
        let opens = orders.iter().filter(|order| matches!(order, Order::Open(_))).count() as i64;
        let given_up = orders.iter().filter(|order| gave_up(order)).count() as i64;
        // What was freed, but not by giving up a job, was freed before anything was ordered.
        let freed = before + opens - after - given_up;
        assert!(freed >= 0, "{} slots in use that nobody ordered", -freed);
        let mut total = before - freed;
        for order in orders {
            if let Order::Open(token) = order {
                total += 1;
                assert!(total <= max, "#{} was ordered as number {total} of {max}", token.id());
            } else if gave_up(order) {
                total -= 1;
            }
        }
        assert!(after <= max.max(before), "{after} of {max}: {:?}", l.counts());
        self.total = after as u32;
        self.seen = l.effects.orders.len();
    }

    /// Carries out what the ledger has in its effects.
    fn settle(&mut self) {
        self.watch_the_bound();
        while !self.ledger.effects.is_empty() {
            self.ledger.effects.wake_reaper = false;
            self.ledger.effects.changed = false;
            for (seat, outcome) in std::mem::take(&mut self.ledger.effects.served) {
                // First come, first served, whatever is granted.
                let (first, ..) = self.waiting.pop_front().expect("a outcome without a waiter");
                assert_eq!(first, seat, "barged over");
                match outcome {
                    Outcome::Connection(token, conn) => self.lent(seat, token, conn),
                    Outcome::Closed => self.turned_out.push(seat),
                    Outcome::Refused => self.refused.push(seat),
                }
            }
            for seat in std::mem::take(&mut self.ledger.effects.notified) {
                self.serial += 1;
                self.awake.insert((self.now.plus(self.wake_time), self.serial), seat);
            }
            self.seen = 0;
            for order in std::mem::take(&mut self.ledger.effects.orders) {
                self.carry_out(order);
            }
        }
        self.most = self.most.max(self.server.len());
        self.audit();
    }

    fn lent(&mut self, seat: Seat, token: Token, conn: Conn) {
        let (_, used) = self.server.get_mut(&conn).expect("lent, but not on the server");
        *used = self.now;
        let slot = &self.ledger.slots[token.index as usize];
        assert!(slot.dies > self.now, "handed out past its lifetime");
        assert!(self.dialled[&conn] > self.replaced, "replaced, and lent");
        // P9: what proves this one well began after any other was found dead.
        assert!(
            self.proven[&conn] > self.suspect || self.ledger.rules.validate == Validate::Never,
            "suspect, and lent"
        );
        assert!(self.out.insert(seat, (token, conn)).is_none());
    }

    fn carry_out(&mut self, order: Order<Conn>) {
        let (task, token, conn) = match order {
            Order::Open(token) => {
                let id = token.id();
                (Task::Open, token, id)
            }
            Order::Check(token, conn) => (Task::Check, token, conn),
            Order::Reset(token, conn, _) => (Task::Reset, token, conn),
            Order::Close(token, conn, reason) => {
                self.closes.push((self.now, conn, reason));
                (Task::Close, token, conn)
            }
            Order::Abandon { id, .. } => {
                self.written_off += 1;
                return self.over(id);
            }
            Order::Slow { id } => {
                self.closers.remove(&id);
                return self.take_up();
            }
            Order::Leak { id, .. } => return self.leaks.push(id),
        };
        self.post(task, token, conn);
    }

    /// As `Shared::post` has it.
    fn post(&mut self, task: Task, token: Token, conn: Conn) {
        if task == Task::Close && !self.may_close() {
            return self.backlog.push_back((token, conn));
        }
        let mut job = Job { token, conn, begun: self.now, event: 0, counted: false };
        if self.spawns {
            self.count(&mut job, task.kind());
            if self.takes.start > Duration::ZERO {
                return self.later(self.takes.start, Event::Begin(task), job);
            }
        } else {
            match task {
                Task::Open => {
                    self.ledger.open_failed(self.read(), &job.token, false, self.jitter);
                    self.watch_the_bound();
                    self.ledger.free(self.read(), job.token);
                    return self.watch_the_bound();
                }
                // On the thread that ordered it, where it counts as nothing.
                Task::Close if self.posted.is_empty() && !self.reaping => {}
                _ => return self.later(AGAIN, Event::Begin(task), job),
            }
        }
        self.begin(task, job);
    }

    fn count(&mut self, job: &mut Job, kind: Kind) {
        job.counted = true;
        self.posted.insert(job.token.id(), kind);
        if kind == Kind::Close {
            self.closers.insert(job.token.id());
        }
    }

    /// A job is over, or is given up.
    fn over(&mut self, id: u64) {
        self.posted.remove(&id);
        self.closers.remove(&id);
        self.take_up();
    }

    /// Whether another close may run: four side by side, and one more for each that takes longer than usual.
    fn may_close(&self) -> bool {
        let slow = self.posted.values().filter(|&&kind| kind == Kind::Close).count() - self.closers.len();
        self.closers.len() < CLOSERS + slow
    }

    /// Closes what waited for another close.
    fn take_up(&mut self) {
        while self.may_close() {
            let Some((token, conn)) = self.backlog.pop_front() else { return };
            self.post(Task::Close, token, conn);
        }
    }

    fn later(&mut self, after: Duration, event: Event, job: Job) {
        self.serial += 1;
        self.jobs.insert((self.now.plus(after), self.serial), (event, job));
    }

    fn begin(&mut self, task: Task, mut job: Job) {
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

    /// P5: with those that are lost and those that are dialled the server sees as many more as the pool has slots, at
    /// most; and one more, if the last that was dialled came through. Beyond that one is dialled in a minute.
    fn assert_a_dial_is_due(&self) {
        let dialled = self.jobs.values().filter(|(event, job)| *event == Event::Opened && self.is_counted_on(job));
        let others = self.counts().abandoned + dialled.count() as u32;
        let probe = self.dials.last().is_none_or(|last| self.now.since(*last) + self.most_skew >= PROBE_PERIOD);
        let most = self.greatest.max(self.ledger.rules.max_size) + u32::from(self.ledger.failure.is_none());
        assert!(others < most || probe, "{others} may be lost, and one more is dialled");
    }

    /// Whether the job has its slot.
    fn is_counted_on(&self, job: &Job) -> bool {
        self.ledger.is_current(&job.token) && self.ledger.slots[job.token.index as usize].state != STUCK
    }

    /// What a job has come to.
    fn report(&mut self, event: Event, mut job: Job) {
        let (now, id, conn) = (self.read(), job.token.id(), job.conn);
        match event {
            Event::Begin(_) if !job.counted && !self.spawns => self.later(AGAIN, event, job),
            Event::Begin(task) => {
                if !job.counted {
                    self.count(&mut job, task.kind());
                }
                self.begin(task, job);
            }
            Event::Opened if self.refuse.is_some() => {
                if !self.leaves_one {
                    self.server.remove(&conn);
                }
                self.ledger.open_failed(now, &job.token, self.refuse == Some(true), self.jitter);
                self.settle();
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
                let was_written_off =
                    !self.ledger.is_current(&job.token) || self.ledger.slots[job.token.index as usize].state == STUCK;
                if reason == CloseReason::Invalid && !was_written_off {
                    self.suspect = self.event(); // or it was written off, which was the news
                }
                self.ledger.check_failed(now, &job.token, reason);
                self.settle();
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
                self.settle();
                self.next(self.takes.close, Event::Closed, job);
            }
            Event::Handled(false) | Event::Closed => {
                self.server.remove(&conn);
                self.ledger.free(now, job.token);
                self.over(id);
            }
        }
        self.settle();
    }

    /// A job goes on.
    fn next(&mut self, takes: Duration, event: Event, job: Job) {
        if takes == Duration::ZERO { self.report(event, job) } else { self.later(takes, event, job) }
    }

    /// What a job brings that was written off is closed by that very job.
    fn close_late(&mut self, job: Job) {
        self.settle();
        self.report(Event::Handled(true), job);
    }

    /// A worker's own check has come to its end.
    fn own_check(&mut self, own: Own) {
        let Own { seat, token, conn, ticket, begun, event } = own;
        let now = self.read();
        let limit = self.ledger.rules.validation_timeout;
        if self.dead.contains(&conn) || self.now.since(begun) >= limit {
            self.server.remove(&conn);
            self.suspect = self.event();
            self.ledger.check_failed(now, &token, CloseReason::Invalid);
            self.settle();
            self.closes.push((self.now, conn, CloseReason::Invalid));
            self.post(Task::Close, token, conn);
        } else {
            self.proven.insert(conn, event);
            if let Some((token, conn)) = self.ledger.own_check_passed(now, begun.minus(self.skew), token, conn, here())
            {
                self.lent(seat, token, conn);
                return self.settle();
            }
        }
        self.settle();
        self.join(seat, Some(ticket));
        self.settle();
    }

    fn join(&mut self, seat: Seat, place: Option<Ticket>) {
        match self.ledger.join(self.read(), here(), place, false, seat).0 {
            Join::Ready(token, conn) => self.lent(seat, token, conn),
            Join::Queued(ticket) => {
                let at = self.waiting.partition_point(|w| w.1 < ticket);
                self.waiting.insert(at, (seat, ticket, ticket.since));
            }
            Join::Refused | Join::TooMany(_) => self.refused.push(seat),
            Join::Closed => self.turned_out.push(seat),
        }
    }

    /// Lets time pass, with everything that falls due on the way.
    fn run_to(&mut self, until: Moment) {
        loop {
            let job = self.jobs.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let own = self.own.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let alarm = self.ledger.alarm();
            let wake = self.awake.first_key_value().map_or(Moment::NEVER, |(&(at, _), _)| at);
            let next = job.min(alarm).min(wake).min(own).max(self.now);
            if next > self.now {
                self.check_nobody_is_forgotten();
            }
            if next > until || next == Moment::NEVER {
                break;
            }
            self.now = next;
            if wake <= next {
                let (_, seat) = self.awake.pop_first().unwrap();
                self.come(seat);
            } else if own <= next {
                let (_, own) = self.own.pop_first().unwrap();
                self.own_check(own);
            } else if job <= alarm {
                let (_, (event, job)) = self.jobs.pop_first().unwrap();
                self.report(event, job);
            } else {
                self.ledger.reap(next, 0.0);
                self.reaping = true;
                self.settle();
                self.reaping = false;
            }
        }
        self.now = until;
    }

    fn run(&mut self, d: Duration) {
        self.run_to(self.now.plus(d));
    }

    /// Whatever hangs goes on.
    fn release(&mut self) {
        for (at, event) in self.jobs.split_off(&(Moment::NEVER, 0)) {
            self.jobs.insert((self.now, at.1), event);
        }
        for (at, own) in self.own.split_off(&(Moment::NEVER, 0)) {
            self.own.insert((self.now, at.1), own);
        }
    }

    /// One who was called comes, if it has not been served or given up since.
    fn come(&mut self, seat: Seat) {
        if let Some(at) = self.waiting.iter().position(|w| w.0 == seat) {
            match self.ledger.take_notified(self.read(), self.waiting[at].1) {
                Some((token, conn)) => {
                    self.waiting.remove(at);
                    // Not if it took from the first what there is: that one was first when it came.
                    if at > 0 && self.ledger.idle.is_empty() {
                        self.assert_passable();
                    }
                    self.lent(seat, token, conn);
                }
                None => self.in_vain += 1,
            }
            self.settle();
        }
    }

    /// One who was called comes only after `time`.
    fn oversleeps(&mut self, seat: Seat, time: Duration) {
        self.awake.retain(|_, &mut called| called != seat);
        self.serial += 1;
        self.awake.insert((self.now.plus(time), self.serial), seat);
    }

    /// P7: nobody is served before one who has waited for longer than that.
    fn assert_passable(&self) {
        if let Some(&(first, _, since)) = self.waiting.front() {
            let waited = self.ledger.now.since(since);
            assert!(waited < self.ledger.rules.fair_after, "{first} was barged after {waited:?}");
        }
    }

    /// One thread asks for a connection: it has one at once (and is then in `out`), or waits, or is turned away.
    fn get(&mut self) -> Seat {
        self.get_or_check(false)
    }

    /// The same; `here`: it can check one for itself.
    fn get_or_check(&mut self, here: bool) -> Seat {
        self.next_seat += 1;
        let seat = self.next_seat;
        match self.ledger.take(self.read(), self::here(), here) {
            Take::Ready(token, conn) => {
                self.assert_passable();
                self.lent(seat, token, conn);
            }
            Take::Check(token, conn, ticket) => {
                assert!(here, "it did not offer to");
                self.serial += 1;
                let event = self.event();
                let until = self.now.plus(self.takes.check.min(self.ledger.rules.validation_timeout));
                self.own.insert((until, self.serial), Own { seat, token, conn, ticket, begun: self.now, event });
            }
            Take::Nothing => self.join(seat, None),
        }
        self.settle();
        self.run(Duration::ZERO);
        seat
    }

    /// One thread asks for a connection, and waits for none.
    fn try_get(&mut self) -> Option<Seat> {
        let taken = match self.ledger.take_at_once(self.read(), here()) {
            Take::Ready(token, conn) => Some((token, conn)),
            Take::Check(token, conn, _) => self.ledger.looked_at(self.read(), token, conn, here(), self.sees),
            Take::Nothing => None,
        };
        let lent = match taken {
            Some((token, conn)) => {
                self.next_seat += 1;
                self.assert_passable();
                self.lent(self.next_seat, token, conn);
                Some(self.next_seat)
            }
            None => {
                self.ledger.prepare(self.read());
                self.check_that_one_is_prepared();
                None
            }
        };
        self.settle();
        self.run(Duration::ZERO);
        lent
    }

    fn put(&mut self, seat: Seat) {
        self.put_back(seat, Condition::Keep);
    }

    fn put_back(&mut self, seat: Seat, back: Condition) {
        let (token, conn) = self.out.remove(&seat).unwrap_or_else(|| panic!("{seat} has none"));
        let now = self.read().max(self.ledger.now);
        self.server.get_mut(&conn).unwrap().1 = now;
        match back {
            Condition::Broken => self.suspect = self.event(),
            // Once for all that are as old.
            Condition::Outdated if self.dialled[&conn] > self.replaced => self.replaced = self.event(),
            _ => {}
        }
        self.ledger.returned(self.read(), token, conn, back);
        self.settle();
        self.run(Duration::ZERO);
    }

    /// Whether the waiter was still queued when it gave up.
    fn leave(&mut self, seat: Seat) -> bool {
        let at = self.waiting.iter().position(|w| w.0 == seat);
        let left = at.and_then(|at| {
            let (_, ticket, _) = self.waiting.remove(at).unwrap();
            self.ledger.leave(self.read(), ticket)
        });
        self.settle();
        left.is_some()
    }

    fn use_once(&mut self, hold: Duration) {
        let seat = self.get();
        self.run(hold);
        self.put(seat);
    }

    /// `n` at once, then all of them back.
    fn burst(&mut self, n: u64) {
        let seats: Vec<_> = (0..n).map(|_| self.get()).collect();
        self.run(self.takes.open.saturating_mul(n as u32));
        for seat in seats {
            self.put(seat);
        }
    }

    fn counts(&self) -> Counts {
        self.ledger.counts()
    }

    fn closed_for(&self, reason: CloseReason) -> usize {
        self.closes.iter().filter(|c| c.2 == reason).count()
    }

    // ------------------------------------------------------------------------------------------ who waits for what

    /// How long those who wait count on an open that has begun. (Nobody could blame them for it: three times as long as
    /// any has taken.)
    fn open_patience(&self) -> Duration {
        secs(1).max(self.slowest_open.saturating_mul(3))
    }

    /// The jobs that may bring a connection any moment: opens and checks by the crew that have not begun, or not long ago.
    fn coming(&self) -> u32 {
        let is_coming = |(event, job): &&(Event, Job)| {
            let patience = match event {
                Event::Begin(Task::Close) | Event::Handled(_) | Event::Closed => return false,
                Event::Begin(_) => Duration::MAX,
                Event::Opened => self.open_patience(),
                Event::Checked | Event::Reset => CHECK_PATIENCE,
            };
            let slot = &self.ledger.slots[job.token.index as usize];
            self.ledger.is_current(&job.token) && slot.state != STUCK && job.begun.plus(patience) > self.now
        };
        self.jobs.values().filter(is_coming).count() as u32
    }

    /// Whether another connection may be dialled at that moment, by the bound, the limit of parallel opens, the back-off, and
    /// the bound of those written off.
    fn has_room(&self, now: Moment) -> bool {
        let (l, counts) = (&self.ledger, self.counts());
        let alone = counts.opening == 0;
        counts.total() < l.rules.max_size
            && counts.opening < l.rules.parallel_opens
            && l.failure.is_none_or(|f| alone && f.retry <= now)
            && (counts.abandoned + counts.opening < l.rules.max_size || alone && l.last_dial.plus(PROBE_PERIOD) <= now)
    }

    /// At rest, when whatever is due has been done. One who waits has been called and is on its way, or has something
    /// under way that may come any moment, one for each who waits. Or else there is nothing that could be done for it:
    /// no idle connection to check or to hand over, no room to open another.
    fn check_nobody_is_forgotten(&self) {
        if !self.strict || self.ledger.closed || self.waiting.is_empty() {
            return;
        }
        let (l, counts) = (&self.ledger, self.counts());
        let on_the_way = self.awake.values().filter(|&seat| self.waiting.iter().any(|w| w.0 == *seat)).count();
        let unserved = self.waiting.len() - on_the_way.min(l.idle.len());
        // One more than are waited for is dialled, not one after another.
        let slow = l.counted.0[StateCounts::SLOW_OPENING].saturating_sub(1);
        let coming = self.coming() + slow;
        if coming as usize >= unserved {
            return;
        }
        let hope = format!("{unserved} wait, {coming} come: {counts:?} at {:?}", self.now);
        // (One who comes has first choice: what it leaves is seen to when it has come.)
        assert!(on_the_way > 0 || l.idle.is_empty(), "somebody waits beside an idle connection: {hope}");
        assert!(!self.has_room(self.now), "somebody waits beside room for another: {hope}");
    }

    /// After one who does not wait has asked for a connection to be made ready.
    fn check_that_one_is_prepared(&self) {
        let l = &self.ledger;
        let ordered = l.effects.orders.iter().any(|order| matches!(order, Order::Open(_) | Order::Check(..)));
        if !self.strict
            || l.closed
            || ordered
            || self.coming() + l.counted.0[StateCounts::SLOW_OPENING].saturating_sub(1)
                > l.waiting() - l.notified.len().min(l.ready(l.now)) as u32
        {
            return;
        }
        let suspect = l.idle.last().is_some_and(|&(top, _)| l.needs_check(&l.slots[top as usize], l.now));
        let what = format!("{} come: {:?} at {:?}", self.coming(), l.counts(), self.now);
        assert!(!suspect, "an idle connection that needs a check is not made ready: {what}");
        assert!(!l.idle.is_empty() || !self.has_room(l.now), "nothing is made ready though there is room: {what}");
    }

    // ------------------------------------------------------------------------------------------ what must hold

    /// What must hold after every step. (With many connections not looked at after every single one.)
    fn audit(&self) {
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
        assert_eq!(counts.in_use as usize, self.out.len());
        assert_eq!(counts.waiting as usize, self.waiting.len());
        let mut counted = StateCounts::default();
        l.slots.iter().for_each(|r| counted.0[StateCounts::of(r.state)] += 1);
        assert_eq!(counted.0, l.counted.0, "counted where they are set, and where they are");
        assert_eq!(counts.idle as usize, l.idle.len());
        assert_eq!(counts.total() as usize + l.free.len(), l.slots.len());
        assert!(
            self.server.len() <= (counts.total() + counts.abandoned) as usize,
            "the server sees more than is counted"
        );
        assert_eq!(l.patience.len(), l.slots().filter(|r| r.patience != Moment::NEVER).count());
        // The stack is sorted, and where somebody waits beside it, they are called, or something is under way for each.
        let since: Vec<_> = l.idle.iter().map(|&(i, _)| l.slots[i as usize].since).collect();
        assert!(since.is_sorted());
        assert_eq!(
            l.front.map(|f| (f.ticket, f.since)),
            self.waiting.front().map(|&(_, ticket, since)| (ticket, since))
        );
        if counts.waiting > 0 && !l.idle.is_empty() {
            let called = l.notified.len() as u32;
            assert!(
                called > 0 || l.counted.opens() + l.counted.checks() >= counts.waiting,
                "idle, while somebody waits"
            );
        }
        for ticket in l.notified.keys() {
            let seat = self.waiting.iter().find(|w| w.1 == *ticket).map(|w| w.0);
            assert!(self.awake.values().any(|&s| Some(s) == seat), "called, and nobody comes");
        }
        // What is due has an alarm not later than itself.
        assert!(l.alarm <= l.idle_deadline(), "an idle deadline without an alarm");
        for slot in l.slots() {
            if slot.as_seen() == ConnectionState::Idle {
                assert!(l.alarm <= slot.dies || slot.dies <= now, "a lifetime without an alarm");
            }
            assert!(l.alarm <= slot.limit);
            assert_eq!(slot.limit != Moment::NEVER, l.limits.iter().any(|&(_, i)| l.slots[i as usize].id == slot.id));
            let own_check = matches!(slot.state, State::Checking { by: Check::Own, .. });
            assert_eq!(slot.caller.is_some(), slot.as_seen() == ConnectionState::InUse || own_check);
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

// ---------------------------------------------------------------------------------------------------- P1: idle

#[test]
fn seventeen_go_at_once() {
    let mut w = World::new(Rules { max_idle: Some(secs(2)), ..rules() });
    w.burst(17);
    assert_eq!(w.counts().idle, 17);
    w.run(ms(1_999));
    assert_eq!(w.counts().idle, 17, "not a moment too early");
    w.run(ms(1));
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Idle)), (0, 17));
    assert_eq!(w.ledger.tally.max_lateness, Duration::ZERO);
    w.run(secs(10)); // past the limits of the jobs
    assert_eq!(w.ledger.alarm(), Moment::NEVER, "an empty pool wakes nobody");
}

#[test]
fn a_trickle_keeps_one() {
    let mut w = World::new(Rules { max_idle: Some(secs(2)), ..rules() });
    w.burst(17);
    for _ in 0..20 {
        w.run(ms(100));
        w.use_once(ms(1));
    }
    assert_eq!(w.server.len(), 1);
}

#[test]
fn the_floor_does_not_churn() {
    for trickle in [false, true] {
        let mut w = World::new(Rules { min_idle: 4, max_idle: Some(secs(2)), ..rules() });
        w.ledger.set_min_idle(w.now, 4);
        w.settle();
        for _ in 0..600_000 / 100 {
            w.run(ms(100));
            if trickle {
                w.use_once(ms(1));
            }
        }
        assert!(w.dials.len() <= 5, "{} opens in ten minutes", w.dials.len());
        assert!(w.counts().idle >= 4);
    }
}

#[test]
fn of_the_unused_the_floor_stays() {
    let mut w = World::new(Rules { min_idle: 2, max_idle: Some(secs(2)), ..rules() });
    w.burst(6);
    w.run(secs(3));
    assert_eq!(w.counts().idle, 2);
    w.run(secs(600));
    assert_eq!(w.counts().idle, 2);
}

#[test]
fn max_idle_zero_keeps_nothing() {
    let mut w = World::new(Rules { max_idle: Some(Duration::ZERO), ..rules() });
    w.use_once(ms(5));
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Idle)), (0, 1));
    // But the one who waits gets it.
    w = World::new(Rules { max_idle: Some(Duration::ZERO), max_size: 1, ..rules() });
    let (a, b) = (w.get(), w.get());
    w.put(a);
    assert!(w.out.contains_key(&b));
}

#[test]
fn max_idle_none_keeps_all() {
    let mut w = World::new(Rules { max_idle: None, ..rules() });
    w.burst(17);
    w.run(secs(1_000_000));
    assert_eq!(w.counts().idle, 17);
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
}

#[test]
fn last_in_first_out() {
    let mut w = World::new(rules());
    let (a, b) = (w.get(), w.get());
    let (ca, cb) = (w.out[&a].1, w.out[&b].1);
    w.put(a);
    w.run(ms(1));
    w.put(b);
    let c = w.get();
    assert_eq!(w.out[&c].1, cb);
    let d = w.get();
    assert_eq!(w.out[&d].1, ca);
}

// ---------------------------------------------------------------------------------------------------- P2: lifetime

#[test]
fn aged_connections_go_on_time() {
    let mut w = World::new(Rules { max_lifetime: Some(secs(3)), ..rules() });
    w.takes.open = ms(10);
    w.burst(3);
    let kept = w.get();
    w.run_to(Moment::BIRTH.plus(secs(3)));
    assert_eq!(w.server.len(), 1, "the idle ones at the deadline, which counts from before the connect");
    w.run(secs(10));
    w.put(kept);
    assert_eq!((w.server.len(), w.closed_for(CloseReason::Lifetime)), (0, 3), "the busy one when it came back");
    assert_eq!(w.ledger.tally.max_lateness, Duration::ZERO);
}

#[test]
fn jitter_is_taken_off() {
    let mut w = World::new(Rules { max_lifetime: Some(secs(100)), lifetime_jitter: 0.1, ..rules() });
    w.use_once(ms(1)); // the world draws the greatest jitter
    w.run_to(Moment::BIRTH.plus(ms(89_999)));
    assert_eq!(w.server.len(), 1);
    w.run(ms(1));
    assert_eq!(w.server.len(), 0);
}

#[test]
fn one_that_arrives_expired_is_a_failed_open() {
    let mut w = World::new(Rules { max_lifetime: Some(ms(50)), ..rules() });
    w.takes.open = ms(60);
    let a = w.get();
    w.run(ms(500));
    assert!(!w.out.contains_key(&a));
    assert_eq!(w.ledger.tally.opens, 0);
    assert!((2..=5).contains(&w.ledger.tally.failed_opens), "with a back-off between: {}", w.dials.len());
    // The books balance: what was not opened is not closed.
    assert_eq!(w.ledger.tally.closes.iter().sum::<u64>(), 0);
    assert_eq!(w.closed_for(CloseReason::Lifetime), w.ledger.tally.failed_opens as usize);
}

#[test]
fn one_that_arrives_too_old_to_be_served_is_a_failed_open() {
    // It dies at 10 ms, and may not be served after 2.
    let mut w = World::new(Rules { max_lifetime: Some(ms(10)), resolution: ms(8), ..rules() });
    w.takes.open = ms(5);
    w.get();
    w.run(ms(500));
    assert_eq!((w.ledger.tally.checkouts, w.ledger.tally.opens), (0, 0));
    assert!((2..=5).contains(&w.ledger.tally.failed_opens), "with a back-off between: {}", w.dials.len());
}

#[test]
fn the_resolution_of_the_clock_serves_nothing_late() {
    let mut w = World::new(Rules { max_lifetime: Some(secs(3)), resolution: ms(4), ..rules() });
    w.use_once(ms(1));
    w.run_to(Moment::BIRTH.plus(ms(2_996)));
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Nothing), "it may be 3,000 in truth");
    w.settle();
    w.run(ms(1));
    assert_eq!(w.closed_for(CloseReason::Lifetime), 1);
}

#[test]
fn a_floor_is_replaced_before_it_goes() {
    let mut w = World::new(Rules { min_idle: 4, max_lifetime: Some(secs(3)), max_idle: None, ..rules() });
    w.takes.open = ms(20);
    w.ledger.set_min_idle(w.now, 4);
    w.settle();
    w.run(secs(1));
    for _ in 0..6000 {
        w.run(ms(10));
        assert!(w.counts().idle >= 4, "at {:?}", w.now);
        assert!(w.server.values().all(|(born, _)| w.now.since(*born) <= secs(3)));
    }
    assert!(w.dials.len() as u64 <= 4 * (61 / 2), "{} opens: replaced once each, not over and over", w.dials.len());
}

#[test]
fn a_full_floor_is_released_first() {
    let mut w = World::new(Rules { min_idle: 4, max_size: 4, max_lifetime: Some(secs(3)), max_idle: None, ..rules() });
    w.takes.open = ms(20);
    w.ledger.set_min_idle(w.now, 4);
    w.settle();
    w.run(secs(60));
    assert_eq!(w.most, 4);
    assert!(w.dials.len() >= 4 * 19);
}

#[test]
fn recycle_replaces_what_was_opened_before() {
    let mut w = World::new(rules());
    w.takes.open = ms(10);
    w.burst(2);
    let busy = w.get();
    w.ledger.recycle(w.now);
    w.settle();
    w.run(Duration::ZERO);
    assert_eq!(w.closed_for(CloseReason::Recycled), 1, "the idle one at once");
    w.put(busy);
    assert_eq!(w.closed_for(CloseReason::Recycled), 2, "the busy one on return");
    let a = w.get();
    w.run(ms(5));
    w.ledger.recycle(w.now);
    w.settle();
    w.run(secs(1));
    assert_eq!(w.closed_for(CloseReason::Recycled), 3, "and the one that was under way");
    w.put(a); // has one all the same
    assert_eq!((w.counts().idle, w.closes.len()), (1, 3));
}

#[test]
fn outdated_replaces_once() {
    let mut w = World::new(rules());
    w.burst(3);
    let (a, b) = (w.get(), w.get());
    w.put_back(a, Condition::Outdated);
    assert_eq!(w.server.len(), 1, "the idle one went with it");
    let fresh = w.get();
    w.put(fresh);
    w.put_back(b, Condition::Outdated);
    assert_eq!(w.counts().idle, 1, "the new one stays");
}

// ---------------------------------------------------------------------------------------------------- P5: the bound

#[test]
fn opens_are_parallel_up_to_the_limit() {
    let mut w = World::new(Rules { max_size: 17, ..rules() });
    w.takes.open = ms(100);
    let seats: Vec<_> = (0..17).map(|_| w.get()).collect();
    w.run(ms(499));
    assert_eq!(w.out.len(), 16);
    w.run(ms(1));
    assert_eq!(w.out.len(), seats.len(), "ceil(17 / 4) x 100 ms");
}

#[test]
fn closing_counts() {
    let mut w = World::new(Rules { max_size: 10, ..rules() });
    w.takes.close = secs(3);
    w.burst(10);
    for seat in (0..10).map(|_| w.get()).collect::<Vec<_>>() {
        w.put_back(seat, Condition::Discard(CloseReason::Discarded));
    }
    let seats: Vec<_> = (0..10).map(|_| w.get()).collect();
    assert!(w.out.is_empty(), "there is no room");
    // (Four begin at once, and four more each time that those before take longer than usual.)
    w.run(secs(3) + CLOSE_PATIENCE * 2);
    assert_eq!((w.out.len(), w.most), (seats.len(), 10));
}

#[test]
fn resize_down_takes_the_longest_unused_first_and_the_busy_on_return() {
    let mut w = World::new(rules());
    w.burst(10);
    let seats: Vec<_> = (0..6).map(|_| w.get()).collect();
    w.ledger.resize(w.now, 5);
    w.settle();
    w.run(Duration::ZERO);
    assert_eq!((w.counts().idle, w.counts().in_use), (0, 6));
    let waits = w.get();
    w.put(seats[0]);
    assert!(!w.out.contains_key(&waits), "the excess goes as it returns, even though somebody waits");
    w.put(seats[1]);
    assert!(w.out.contains_key(&waits));
    assert_eq!(w.closed_for(CloseReason::Resized), 5);
}

#[test]
fn demand_that_is_gone_is_not_dialled() {
    // Two wait at once, one open is under way at most; a return serves the second before its open is ordered.
    let mut w = World::new(Rules { parallel_opens: 1, ..rules() });
    w.takes.open = ms(150);
    w.burst(1);
    let a = w.get();
    let (b, c) = (w.get(), w.get());
    w.run(ms(2));
    w.put(a);
    assert!(w.out.contains_key(&b));
    w.put(b);
    assert!(w.out.contains_key(&c));
    w.put(c);
    w.run(secs(1));
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn an_order_is_asked_again_before_it_dials() {
    let mut l: Ledger<Conn, Seat> = Ledger::new(rules());
    let (Join::Queued(ticket), _) = l.join(Moment::BIRTH, here(), None, false, 1) else { panic!() };
    let Some(Order::Open(token)) = l.effects.orders.pop() else { panic!() };
    assert!(l.leave(Moment::BIRTH, ticket).is_some());
    assert!(l.begin(Moment::BIRTH, token, 0.0).is_none(), "nobody wants it any longer");
    assert_eq!(l.counts().total(), 0);
}

#[test]
fn an_order_is_wanted_again_by_one_who_does_not_wait() {
    let mut l: Ledger<Conn, Seat> = Ledger::new(rules());
    let (Join::Queued(ticket), _) = l.join(Moment::BIRTH, here(), None, false, 1) else { panic!() };
    assert!(l.leave(Moment::BIRTH, ticket).is_some());
    l.prepare(Moment::BIRTH);
    let [Order::Open(_)] = l.effects.orders[..] else { panic!("{:?}", l.effects.orders) };
    let Some(Order::Open(token)) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(Moment::BIRTH, token, 0.0).expect("asked for since");
    assert!(l.opened(Moment::BIRTH, token, 1).is_ok());
    assert!(matches!(l.take(Moment::BIRTH, here(), false), Take::Ready(..)));
}

// ---------------------------------------------------------------------------------------------------- P7: the queue

#[test]
fn first_come_first_served() {
    let mut w = World::new(Rules { max_size: 1, ..rules() });
    let first = w.get();
    let seats: Vec<_> = (0..5_000).map(|_| w.get()).collect();
    for seat in seats.iter().step_by(3) {
        assert!(w.leave(*seat));
    }
    w.put(first);
    for (i, seat) in seats.iter().enumerate() {
        if i % 3 != 0 {
            w.put(*seat); // panics if it is not this one's change
        }
    }
    assert_eq!(w.ledger.tally.timeouts, 1_667);
}

#[test]
fn nobody_overtakes() {
    let mut w = World::new(Rules { max_size: 1, ..rules() });
    let (a, b) = (w.get(), w.get());
    w.put(a);
    let c = w.get();
    assert!(w.out.contains_key(&b) && !w.out.contains_key(&c));
}

#[test]
fn max_waiting() {
    let mut w = World::new(Rules { max_size: 1, max_waiting: Some(2), ..rules() });
    let _out = w.get();
    let (b, c) = (w.get(), w.get());
    let d = w.get();
    assert_eq!(w.refused, [d]);
    assert!(w.leave(b) && w.leave(c));
    assert_eq!(w.ledger.tally.rejected, 1);
}

/// A pool of `size`, all lent to the first of the seats, and threads that take a while to wake.
fn busy(size: u32) -> (World, Vec<Seat>) {
    let mut w = World::new(Rules { max_size: size, fair_after: ms(1), ..rules() });
    let seats = (0..size).map(|_| w.get()).collect();
    w.wake_time = us(30);
    (w, seats)
}

#[test]
fn one_who_runs_may_pass_until_the_first_has_the_right_of_way() {
    let (mut w, seats) = busy(1);
    let first = w.get();
    let mut running = seats[0];
    for barged in 0..BARGES {
        assert_eq!(w.ledger.front.unwrap().barged, barged);
        w.run(us(1));
        w.put(running);
        assert!(!w.out.contains_key(&first), "left to whoever runs, {barged}");
        running = w.get();
        assert!(w.out.contains_key(&running));
    }
    assert_eq!(w.awake.len(), 1, "called once, however often it was there");
    w.put(running);
    assert!(!w.out.contains_key(&first), "barged often enough, but in no time");
    running = w.get();
    w.run(FIRST_FOR - us(u64::from(BARGES)));
    w.put(running);
    assert!(w.out.contains_key(&first), "barged often enough, and first for long enough");
    assert_eq!(w.in_vain, 0);
}

#[test]
fn being_passed_is_counted_anew_by_the_next() {
    let (mut w, seats) = busy(1);
    let (first, second) = (w.get(), w.get());
    let mut running = seats[0];
    for _ in 0..BARGES {
        w.run(us(10));
        w.put(running);
        running = w.get();
    }
    w.put(running);
    w.put(first);
    assert!(!w.out.contains_key(&second), "nobody has barged it since it became the first");
    for _ in 0..BARGES {
        running = w.get();
        w.run(us(3));
        w.put(running);
        assert!(!w.out.contains_key(&second), "nor has it been the first for long");
    }
    running = w.get();
    w.run(us(8));
    w.put(running);
    assert!(w.out.contains_key(&second));
}

#[test]
fn nobody_passes_one_who_has_waited_for_long() {
    let (mut w, seats) = busy(2);
    w.wake_time = secs(1); // as good as never
    let first = w.get();
    w.run(us(999));
    w.put(seats[0]);
    let faster = w.get();
    assert!(w.out.contains_key(&faster), "at the last moment");
    w.put(faster);
    w.run(us(1));
    let later = w.get();
    assert!(!w.out.contains_key(&later), "though one is idle");
    assert_eq!(w.counts().idle, 1);
    w.put(seats[1]);
    assert!(w.out.contains_key(&first), "what comes back is handed over");
    // And the idle one is for the next, who has not waited for so long.
    w.run(secs(1));
    assert!(w.out.contains_key(&later));
}

#[test]
fn who_comes_in_vain_keeps_its_place_and_is_called_again() {
    let (mut w, seats) = busy(1);
    let first = w.get();
    w.put(seats[0]);
    let faster = w.get();
    w.run(us(30));
    assert_eq!((w.in_vain, w.awake.len(), w.counts().waiting), (1, 0, 1));
    let second = w.get();
    w.put(faster);
    w.run(us(30));
    assert!(w.out.contains_key(&first) && !w.out.contains_key(&second));
}

#[test]
fn not_more_are_called_than_there_are_connections_for() {
    let (mut w, seats) = busy(3);
    let waiting: Vec<_> = (0..10).map(|_| w.get()).collect();
    for seat in &seats {
        w.put(*seat);
        let again = w.get();
        w.put(again);
    }
    assert_eq!((w.awake.len(), w.counts().idle), (3, 3));
    w.run(us(30));
    assert!(waiting[..3].iter().all(|seat| w.out.contains_key(seat)), "in order");
    assert_eq!((w.in_vain, w.counts().waiting), (0, 7));
}

#[test]
fn a_call_to_one_who_gives_up_goes_to_the_next() {
    let (mut w, seats) = busy(1);
    let (first, second) = (w.get(), w.get());
    w.put(seats[0]);
    w.run(us(10));
    assert!(w.leave(first));
    w.run(us(30));
    assert!(w.out.contains_key(&second));
}

#[test]
fn a_call_to_one_who_was_served_meanwhile_goes_to_the_next() {
    let (mut w, seats) = busy(2);
    let (first, second) = (w.get(), w.get());
    w.run(us(990));
    w.put(seats[0]);
    w.run(us(10));
    w.put(seats[1]);
    assert!(w.out.contains_key(&first), "handed over, on its way to the other one");
    w.run(us(30));
    assert!(w.out.contains_key(&second));
    assert_eq!(w.in_vain, 0);
}

#[test]
fn one_who_is_called_later_does_not_pass_the_first_either() {
    let (mut w, seats) = busy(2);
    let (first, second) = (w.get(), w.get());
    w.run(us(995));
    // Both are called, and somebody is faster than both.
    w.put(seats[0]);
    w.put(seats[1]);
    let faster = [w.get(), w.get()];
    w.run(us(2));
    w.put(faster[0]);
    w.oversleeps(first, ms(5));
    w.run(ms(1));
    assert_eq!((w.in_vain, w.counts().idle), (1, 1), "the second has left it to the first");
    w.run(ms(5));
    assert!(w.out.contains_key(&first) && !w.out.contains_key(&second));
}

#[test]
fn what_is_left_to_the_first_it_is_called_for() {
    let (mut w, seats) = busy(2);
    let (first, second) = (w.get(), w.get());
    w.put(seats[0]);
    w.put(seats[1]);
    w.oversleeps(second, ms(2));
    let faster = [w.get(), w.get()];
    w.run(us(30));
    assert_eq!(w.in_vain, 1, "the first was called in vain, and is asleep again");
    w.put(faster[0]);
    w.run(ms(2));
    assert_eq!(w.in_vain, 2, "the second came, and the first had the right of way");
    assert!(w.out.contains_key(&first) && !w.out.contains_key(&second));
}

#[test]
fn with_one_left_for_the_first_it_is_not_passed() {
    let (mut w, seats) = busy(2);
    w.wake_time = ms(2);
    let (first, second) = (w.get(), w.get());
    w.put(seats[1]);
    w.put(seats[0]);
    w.oversleeps(first, ms(5));
    w.run(ms(2));
    assert!(w.out.contains_key(&second) && !w.out.contains_key(&first));
    assert_eq!((w.in_vain, w.counts().idle, w.ledger.front.unwrap().barged), (0, 1, 1));
    w.run(ms(3));
    assert!(w.out.contains_key(&first));
}

#[test]
fn what_became_suspect_is_checked_for_those_who_were_called() {
    let (mut w, seats) = busy(2);
    w.ledger.rules.validate = Validate::AfterIdle(secs(1));
    w.takes.check = us(5);
    let first = w.get();
    w.put(seats[0]);
    w.run(us(1));
    w.put_back(seats[1], Condition::Broken);
    assert!(matches!(w.ledger.take(w.now, here(), true), Take::Nothing), "nor taken out by one who came later");
    w.run(us(4));
    assert!(!w.out.contains_key(&first), "called, and it must not be had");
    w.run(us(1));
    assert!(w.out.contains_key(&first), "checked at once, not when it comes and finds nothing");
}

#[test]
fn those_who_are_called_are_turned_out_in_order() {
    let (mut w, seats) = busy(2);
    let waiting: Vec<_> = (0..4).map(|_| w.get()).collect();
    w.put(seats[0]);
    assert_eq!(w.ledger.close(w.now), Some(4));
    w.settle();
    assert_eq!(w.turned_out, waiting);
    w.run(ms(1));
}

#[test]
fn what_would_not_stay_is_handed_over() {
    let (mut w, seats) = busy(1);
    w.ledger.rules.max_idle = Some(Duration::ZERO);
    let first = w.get();
    w.put(seats[0]);
    assert!(w.out.contains_key(&first) && w.closes.is_empty());
}

#[test]
fn try_get_takes_nothing_out_that_others_are_called_for() {
    let (mut w, seats) = busy(1);
    w.ledger.rules.validate = Validate::AfterIdle(secs(1));
    let first = w.get();
    w.put(seats[0]);
    w.ledger.prepare(w.now);
    w.settle();
    assert_eq!((w.counts().idle, w.counts().checking), (1, 0));
    w.run(us(30));
    assert!(w.out.contains_key(&first));
}

// ---------------------------------------------------------------------------------------------------- P8: back-off

#[test]
fn transient_failures_back_off_and_recover() {
    let mut w = World::new(rules());
    w.refuse = Some(false);
    let a = w.get();
    w.run(secs(10));
    // 0, 50, 150, 350, 750, then every second.
    assert_eq!(w.dials.len(), 5 + 9);
    assert!(w.refused.is_empty());
    w.refuse = None;
    w.run(secs(1));
    assert!(w.out.contains_key(&a), "within a second of the server's return");
}

#[test]
fn whatever_is_drawn_no_pause_is_longer_than_a_second_while_somebody_waits() {
    for jitter in [0.0, 0.5, 1.0] {
        let mut w = World::new(rules());
        w.refuse = Some(false);
        w.jitter = jitter;
        w.get();
        w.run(secs(60));
        let pauses = w.dials.windows(2).map(|d| d[1].since(d[0]));
        assert!(pauses.clone().all(|pause| (BACKOFF_FIRST..=secs(1)).contains(&pause)), "{jitter}");
        assert_eq!(pauses.max(), Some(ms(1_000 - (200.0 * jitter) as u64)), "not all pools in step");
    }
}

#[test]
fn with_nobody_waiting_the_pause_grows_and_the_first_waiter_ends_it() {
    let mut w = World::new(Rules { min_idle: 1, ..rules() });
    w.refuse = Some(false);
    w.ledger.set_min_idle(w.now, 1);
    w.settle();
    w.run(secs(300));
    let before = w.dials.len();
    assert!(before < 25, "{before} dials in five minutes with nobody asking");
    w.refuse = None;
    let a = w.get();
    assert!(w.out.contains_key(&a), "kicked");
}

#[test]
fn build_waits_too_though_not_in_the_queue() {
    let mut w = World::new(rules());
    w.refuse = Some(false);
    w.ledger.watchers = 1;
    w.ledger.set_min_idle(w.now, 1);
    w.settle();
    w.run(secs(10));
    // 0, 50, 150, 350, 750, then every second.
    assert_eq!(w.dials.len(), 5 + 9);
}

#[test]
fn a_kick_keeps_its_distance() {
    let mut w = World::new(rules());
    w.refuse = Some(false);
    for _ in 0..100 {
        let seat = w.get();
        w.run(ms(1));
        w.leave(seat);
    }
    assert!(w.dials.len() <= 3, "{} dials in 100 ms", w.dials.len());
    assert!(w.dials.windows(2).all(|d| d[1].since(d[0]) >= BACKOFF_FIRST));
}

#[test]
fn a_permanent_refusal_fails_all_at_once_and_is_remembered() {
    let mut w = World::new(Rules { min_idle: 1, ..rules() });
    w.refuse = Some(true);
    w.takes.open = ms(3);
    let seats: Vec<_> = (0..8).map(|_| w.get()).collect();
    w.run(ms(3));
    assert_eq!(w.refused, seats, "one round trip, everybody");
    let dialled = w.dials.len();
    for _ in 0..490 {
        w.run(ms(10));
        let seat = w.get();
        assert_eq!(w.refused.last(), Some(&seat));
    }
    assert_eq!(w.dials.len(), dialled, "no further login, however many ask");
    w.run(secs(1));
    assert_eq!(w.dials.len(), dialled + 1, "one at a time while it fails");
    w.refuse = None;
    w.run(secs(60));
    let seat = w.get();
    w.run(ms(3));
    assert!(w.out.contains_key(&seat), "passwords are mended");
}

#[test]
fn while_one_is_alive_waiters_keep_waiting() {
    let mut w = World::new(rules());
    w.burst(1);
    let alive = w.get();
    w.refuse = Some(true);
    let b = w.get();
    w.run(secs(1));
    assert!(w.refused.is_empty());
    w.put(alive);
    assert!(w.out.contains_key(&b));
    let c = w.get();
    w.put_back(b, Condition::Broken);
    assert_eq!(w.refused, [c], "now none is");
}

// ---------------------------------------------------------------------------------------------------- P9: suspicion

#[test]
fn a_broken_one_makes_its_siblings_suspect() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), ..rules() });
    w.burst(5);
    let a = w.get();
    w.run(ms(1));
    w.put_back(a, Condition::Broken);
    for (conn, _) in w.server.clone() {
        w.dead.push(conn);
    }
    let b = w.get();
    w.run(Duration::ZERO);
    assert!(w.out.contains_key(&b) && !w.dead.contains(&w.out[&b].1), "a new one");
}

#[test]
fn a_returned_one_is_suspect_too() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..rules() });
    w.takes.check = ms(1);
    let (a, b) = (w.get(), w.get());
    let c = w.get();
    w.run(ms(1));
    w.put_back(a, Condition::Broken);
    assert!(w.out.contains_key(&c), "newly opened");
    let d = w.get();
    w.put(b);
    assert!(!w.out.contains_key(&d), "proven before the other broke: checked first");
    w.run(ms(1));
    assert!(w.out.contains_key(&d));
}

#[test]
fn six_dead_ones_cost_one_connect() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), max_size: 6, ..rules() });
    w.burst(6);
    w.run(secs(10));
    w.dead = w.server.keys().copied().collect();
    w.takes.check = secs(1); // each a full timeout
    let a = w.get();
    w.run(secs(1));
    assert!(w.out.contains_key(&a), "with the first found dead, a new one is opened in its place");
}

#[test]
fn validation_follows_its_policy() {
    for (validate, idle, expected) in [
        (Validate::Never, secs(100), false),
        (Validate::Always, Duration::ZERO, true),
        (Validate::AfterIdle(secs(1)), ms(999), false),
        (Validate::AfterIdle(secs(1)), ms(1_000), true),
        (Validate::AfterIdle(Duration::ZERO), Duration::ZERO, true),
    ] {
        let mut w = World::new(Rules { validate, ..rules() });
        w.burst(1);
        w.run(idle);
        match w.ledger.take(w.now, here(), true) {
            Take::Ready(..) => assert!(!expected, "{validate:?} after {idle:?}"),
            Take::Check(..) => assert!(expected, "{validate:?} after {idle:?}"),
            Take::Nothing => panic!(),
        }
    }
}

#[test]
fn one_who_checked_in_vain_keeps_its_place() {
    let mut w = World::new(Rules { validate: Validate::Always, max_size: 1, ..rules() });
    w.takes.close = ms(10);
    w.burst(1);
    let Take::Check(token, conn, ticket) = w.ledger.take(w.now, here(), true) else { panic!() };
    w.settle();
    let later = w.get();
    w.ledger.check_failed(w.now, &token, CloseReason::Invalid);
    w.jobs.insert(
        (w.now.plus(ms(10)), u64::MAX),
        (Event::Closed, Job { token, conn, begun: w.now, event: 0, counted: false }),
    );
    let (Join::Queued(got), _) = w.ledger.join(w.now, here(), Some(ticket), false, 77) else { panic!() };
    assert_eq!(got, ticket);
    w.waiting.push_front((77, ticket, w.now)); // the naive account: ahead of `later`
    w.settle();
    w.run(ms(10));
    assert!(w.out.contains_key(&77) && !w.out.contains_key(&later));
}

#[test]
fn who_checks_for_itself_is_known() {
    let mut l: Ledger<Conn, Seat> = Ledger::new(Rules { validate: Validate::Always, ..rules() });
    l.prepare(Moment::BIRTH);
    let Some(Order::Open(token)) = l.effects.orders.pop() else { panic!() };
    let token = l.begin(Moment::BIRTH, token, 0.0).unwrap();
    assert!(l.opened(Moment::BIRTH, token, 1).is_ok());
    let Take::Check(token, conn, _) = l.take(Moment::BIRTH, here(), true) else { panic!() };
    let checking = |slot: &Slot| (slot.as_seen(), slot.caller.map(|h| h.thread));
    assert_eq!(l.slots().map(checking).collect::<Vec<_>>(), [(ConnectionState::Checking, Some(1))]);
    let (token, _) = l.own_check_passed(Moment::BIRTH, Moment::BIRTH, token, conn, here()).unwrap();
    l.returned(Moment::BIRTH, token, conn, Condition::Keep);
    assert_eq!(l.slots().map(checking).collect::<Vec<_>>(), [(ConnectionState::Idle, None)]);
}

#[test]
fn keepalive_one_at_a_time_and_back_in_place() {
    let mut w = World::new(Rules { keepalive: Some(secs(10)), max_idle: Some(secs(25)), ..rules() });
    w.takes.check = ms(100);
    w.burst(3);
    let order: Vec<_> = w.ledger.idle.iter().map(|i| i.1).collect();
    w.run(secs(10));
    assert_eq!(w.counts().checking, 1);
    w.run(ms(50));
    assert_eq!((w.counts().checking, w.counts().idle), (1, 2));
    w.run(secs(1));
    assert_eq!(w.ledger.idle.iter().map(|i| i.1).collect::<Vec<_>>(), order);
    w.run_to(Moment::BIRTH.plus(secs(25)));
    assert_eq!(w.server.len(), 0, "maintenance is not use");
    assert_eq!(w.ledger.tally.max_lateness, Duration::ZERO);
}

// ---------------------------------------------------------------------------------------------------- limits

#[test]
fn a_job_past_its_limit_loses_its_slot() {
    let mut w = World::new(Rules { max_size: 3, ..rules() });
    w.takes.open = secs(60);
    let a = w.get();
    w.run(secs(10));
    assert_eq!((w.written_off, w.counts().abandoned), (1, 1));
    w.takes.open = ms(1);
    w.run(secs(2));
    assert!(w.out.contains_key(&a), "the next attempt came through");
    assert_eq!((w.server.len(), w.counts().abandoned), (3, 2), "the lost ones are still there");
    w.run(secs(60));
    assert_eq!((w.server.len(), w.counts().abandoned), (1, 0), "and gone when it came back");
}

#[test]
fn a_silent_server_loses_no_more_than_max_size_and_a_probe_a_minute() {
    let mut w = World::new(Rules { max_size: 3, open_timeout: secs(1), ..rules() });
    w.takes.open = Duration::MAX;
    let a = w.get();
    w.run(secs(30));
    assert_eq!(w.counts().abandoned, 3);
    w.run(secs(600));
    assert!(w.counts().abandoned <= 3 + 11, "{}", w.counts().abandoned);
    w.takes.open = ms(1);
    w.run(secs(61));
    assert!(w.out.contains_key(&a), "a probe came through");
}

#[test]
fn beyond_the_bound_a_stuck_close_keeps_its_slot() {
    let mut w = World::new(Rules { max_size: 2, ..rules() });
    w.burst(2);
    w.takes.close = secs(1_000);
    for seat in [w.get(), w.get()] {
        w.put_back(seat, Condition::Discard(CloseReason::Discarded));
    }
    w.run(secs(5));
    assert_eq!((w.counts().abandoned, w.counts().closing), (2, 0));
    let probe = w.get();
    w.run(secs(60));
    w.put_back(probe, Condition::Discard(CloseReason::Discarded));
    w.run(secs(5));
    assert_eq!((w.counts().abandoned, w.counts().closing, w.written_off), (2, 1, 3));
    w.run(secs(2_000));
    assert_eq!((w.counts().abandoned, w.counts().closing, w.server.len()), (0, 0, 0));
}

#[test]
fn a_leak_is_reported_once_per_checkout() {
    let mut w = World::new(Rules { leak_threshold: Some(secs(5)), ..rules() });
    let a = w.get();
    let id = w.out[&a].1;
    w.run(ms(4_999));
    assert!(w.leaks.is_empty());
    w.run(ms(1));
    assert_eq!(w.leaks, [id]);
    w.run(secs(60));
    assert_eq!(w.leaks, [id]);
    w.put(a);
    let b = w.get();
    w.run(secs(5));
    assert_eq!(w.leaks, [id, id]);
    w.put(b);
}

#[test]
fn a_reset_or_a_keepalive_that_hangs_holds_up_nobody() {
    for reset in [true, false] {
        let mut w = World::new(Rules { keepalive: (!reset).then_some(secs(10)), ..rules() });
        w.takes.open = ms(10);
        w.burst(1);
        w.takes.check = Duration::MAX;
        if reset {
            let a = w.get();
            w.put_back(a, Condition::Reset);
        } else {
            w.run(secs(10));
        }
        assert_eq!(w.counts().checking, 1);
        w.run(ms(30));
        let b = w.get();
        w.run(ms(69));
        assert!(!w.out.contains_key(&b) && w.dials.len() == 1, "it may come any moment");
        w.run(ms(11));
        assert!(w.out.contains_key(&b), "there is room for another");
        assert_eq!(w.counts().checking, 1, "which is not written off for that");
        w.put(b);
    }
}

#[test]
fn what_one_try_get_had_checked_serves_the_next_until_another_is_found_dead() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), ..rules() });
    w.burst(3);
    for found in [false, true] {
        w.run(secs(100));
        let dead = w.get();
        w.run(secs(2));
        assert_eq!(w.try_get(), None);
        w.run(secs(200));
        w.put_back(dead, if found { Condition::Broken } else { Condition::Keep });
        let served = w.try_get();
        assert_eq!(served.is_some(), !found, "checked, 200 s ago");
        served.into_iter().for_each(|seat| w.put(seat));
    }
}

#[test]
fn try_get_prepares_one_at_a_time() {
    let mut w = World::new(rules());
    w.takes.open = ms(100);
    for _ in 0..10 {
        w.ledger.prepare(w.now);
        w.settle();
    }
    assert_eq!(w.dials.len(), 1);
    w.run(ms(100));
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Ready(..)));
}

#[test]
fn what_was_checked_for_one_serves_the_next() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), ..rules() });
    w.takes.check = ms(100);
    w.burst(1);
    w.run(secs(5));
    // By `try_get`, which does not wait for it.
    assert!(matches!(w.ledger.take(w.now, here(), false), Take::Nothing));
    w.ledger.prepare(w.now);
    w.settle();
    w.run(ms(100));
    let Take::Ready(token, conn) = w.ledger.take(w.now, here(), false) else { panic!("checked in vain") };
    w.lent(1, token, conn);
    w.put(1);
    // By somebody who gave up.
    w.run(secs(5));
    let impatient = w.get();
    assert!(w.leave(impatient));
    w.run(ms(1_100));
    let next = w.get();
    assert!(!w.out.contains_key(&next), "a second after that check began, there is another");
    w.run(ms(100));
    assert!(w.out.contains_key(&next));
    w.put(next);
    // Of those that are unused for as long, it stays where it was: a check is no use of it.
    w.run(secs(600));
    assert_eq!(w.counts().idle, 0);
}

// ---------------------------------------------------------------------------------------------------- P4: close

#[test]
fn close_turns_everybody_out() {
    let mut w = World::new(Rules { max_size: 3, ..rules() });
    w.takes.open = ms(100);
    w.burst(2);
    let (a, b) = (w.get(), w.get());
    w.put(b);
    let c = w.get();
    let waiters: Vec<_> = (0..8).map(|_| w.get()).collect();
    assert_eq!(w.ledger.close(w.now), Some(8));
    w.settle();
    assert_eq!(w.turned_out, waiters);
    let late = w.get();
    assert_eq!(w.turned_out.last(), Some(&late));
    w.put(a);
    w.run(ms(100)); // a connect that was under way
    assert_eq!(w.counts().total(), 1);
    w.put(c);
    assert_eq!((w.counts().total(), w.server.len()), (0, 0));
    assert_eq!(w.ledger.close(w.now), None);
    w.run(secs(10));
    assert_eq!(w.ledger.alarm(), Moment::NEVER);
}

#[test]
fn after_the_grace_nobody_keeps_time_for_an_open_that_hangs() {
    let mut w = World::new(Rules { max_size: 3, ..rules() });
    w.burst(1);
    let (a, b) = (w.get(), w.get());
    w.put_back(b, Condition::Discard(CloseReason::Discarded));
    w.takes.open = secs(60);
    w.takes.close = secs(2);
    w.get();
    w.ledger.close(w.now);
    w.settle();
    w.run(secs(1));
    assert!(!w.ledger.is_over(), "an open and a close have limits");
    w.put(a);
    w.ledger.abandon_opens(w.now);
    w.settle();
    assert!(!w.ledger.is_over(), "the close still has one");
    w.run(secs(2));
    assert!(w.ledger.is_over());
    assert_eq!((w.counts().opening, w.counts().total(), w.written_off), (1, 1, 0));
    w.run(secs(60));
    assert_eq!((w.counts().total(), w.server.len()), (0, 0), "closed when it arrived");
    assert_eq!(w.written_off, 0);
}

// ---------------------------------------------------------------------------------------------------- what hangs

#[test]
fn an_open_that_hangs_keeps_nobody_from_what_is_idle() {
    for waits in [true, false] {
        let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), ..rules() });
        w.burst(1);
        let a = w.get();
        w.takes.open = Duration::MAX;
        let b = w.get(); // dials, and hangs
        w.put(a);
        w.put(b);
        w.run(secs(2)); // what is idle needs a check by now
        assert_eq!((w.counts().idle, w.counts().opening), (1, 1));
        if waits {
            let c = w.get();
            assert!(w.out.contains_key(&c), "it needs no more than its check");
        } else {
            assert!(w.try_get().is_none());
            assert!(w.try_get().is_some(), "it was checked for it");
        }
    }
}

#[test]
fn beside_an_open_that_hangs_one_more_is_dialled() {
    let mut w = World::new(rules());
    w.takes.open = Duration::MAX;
    let a = w.get();
    w.run(ms(999));
    assert_eq!(w.dials.len(), 1, "it may come any moment");
    w.takes.open = ms(10);
    w.run(ms(11));
    assert!(w.out.contains_key(&a), "long before the first is given up");
    assert_eq!((w.written_off, w.dials.len()), (0, 2));
}

#[test]
fn how_long_an_open_is_counted_on_depends_on_what_is_usual() {
    for (usual, patience) in [(ms(10), ms(250)), (ms(500), ms(1_500))] {
        let mut w = World::new(rules());
        w.takes.open = usual;
        w.burst(1);
        w.get();
        w.takes.open = Duration::MAX;
        let a = w.get();
        w.run(patience - ms(1));
        assert_eq!(w.dials.len(), 2);
        w.takes.open = usual;
        w.run(usual + ms(1));
        assert!(w.out.contains_key(&a));
        assert_eq!((w.written_off, w.dials.len()), (0, 3));
    }
}

#[test]
fn a_server_that_answers_no_connect_is_not_dialled_a_third_time() {
    let mut w = World::new(rules());
    w.takes.open = Duration::MAX;
    w.get();
    w.run(secs(9));
    assert_eq!(w.dials.len(), 2);
}

#[test]
fn what_comes_back_outdated_keeps_its_slot_until_it_is_closed() {
    let mut w = World::new(Rules { max_size: 1, ..rules() });
    w.takes.close = ms(5);
    let (a, b) = (w.get(), w.get());
    w.put_back(a, Condition::Outdated); // (the world holds every order against the bound)
    assert_eq!((w.counts().closing, w.dials.len()), (1, 1));
    w.run(ms(5));
    assert!(w.out.contains_key(&b));
}

#[test]
fn what_was_recycled_and_hangs_gives_its_place_to_one_who_waits() {
    let mut w = World::new(Rules { max_size: 3, ..rules() });
    w.burst(3);
    w.takes.close = Duration::MAX;
    w.ledger.recycle(w.now);
    w.settle();
    let seats: Vec<_> = (0..2).map(|_| w.get()).collect();
    w.run(ms(499));
    assert!(w.out.is_empty() && w.written_off == 0, "its close may end any moment");
    w.run(ms(1));
    assert!(seats.iter().all(|seat| w.out.contains_key(seat)), "a tenth of the limit of a close");
    assert_eq!((w.written_off, w.counts().abandoned, w.counts().closing), (2, 2, 1), "no more than are waited for");
    // Nobody waits for the third.
    w.run(secs(4));
    assert_eq!(w.written_off, 2);
}

#[test]
fn what_was_recycled_is_not_given_up_for_a_place_that_is_of_no_use() {
    // As many would be lost as the pool has slots: while opens fail, the next dial is a minute after the last.
    for fails in [true, false] {
        let mut w = World::new(Rules { max_size: 2, ..rules() });
        w.burst(1);
        w.takes.close = secs(2);
        let held = w.get();
        if fails {
            w.refuse = Some(false);
            w.ledger.prepare(w.now);
            w.settle();
        }
        w.run(secs(40));
        w.refuse = None;
        w.ledger.resize(w.now, 1);
        w.put_back(held, Condition::Outdated);
        let a = w.get();
        w.run(ms(500));
        assert_eq!(w.out.contains_key(&a), !fails);
        assert_eq!(w.written_off, u32::from(!fails));
        w.run(ms(1_500));
        assert!(w.out.contains_key(&a), "its close has ended");
    }
}

#[test]
fn one_that_hangs_in_a_pool_of_one_does_not_close_it_for_a_minute() {
    let mut w = World::new(Rules { max_size: 1, ..rules() });
    w.takes.check = Duration::MAX;
    let (a, b) = (w.get(), w.get());
    w.put_back(a, Condition::Reset);
    w.run(secs(5));
    assert!(w.out.contains_key(&b), "the server answers to connects");
    assert_eq!((w.counts().abandoned, w.counts().total()), (1, 1));
    // A second one keeps its slot: as many are lost as may be.
    let c = w.get();
    w.put_back(b, Condition::Reset);
    w.run(secs(5));
    assert!(!w.out.contains_key(&c));
    assert_eq!((w.counts().abandoned, w.counts().total()), (1, 1));
}

#[test]
fn closes_that_hang_hold_up_no_other() {
    let mut w = World::new(Rules { max_idle: Some(secs(2)), ..rules() });
    w.burst(9);
    w.takes.close = Duration::MAX;
    w.run(secs(2) + CLOSE_PATIENCE * 2);
    assert_eq!(w.ledger.counted.0[StateCounts::CLOSING], 9, "each has begun");
    assert_eq!(w.ledger.tally.max_lateness, CLOSE_PATIENCE, "counted to the moment the last one did");
}

// ---------------------------------------------------------------------------------------------------- the order of things

#[test]
fn a_check_that_began_before_another_was_found_dead_proves_nothing() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..rules() });
    w.burst(2);
    let dead = w.get();
    w.run(secs(2));
    w.takes.check = ms(10);
    let a = w.get();
    w.run(ms(5));
    w.put_back(dead, Condition::Broken);
    w.takes.open = Duration::MAX;
    w.run(ms(5));
    assert!(!w.out.contains_key(&a), "what it brought may have died with the other");
    w.run(ms(10));
    assert!(w.out.contains_key(&a), "and was checked again");
}

#[test]
fn one_who_checked_for_itself_gets_nothing_that_became_suspect_meanwhile() {
    let mut w = World::new(Rules { validate: Validate::AfterIdle(secs(1)), max_size: 2, ..rules() });
    w.burst(2);
    let dead = w.get();
    w.run(secs(2));
    w.takes.check = ms(10);
    let a = w.get_or_check(true);
    w.run(ms(5));
    w.put_back(dead, Condition::Broken);
    w.takes.open = Duration::MAX;
    w.run(ms(5));
    assert!(!w.out.contains_key(&a));
    w.run(ms(10));
    assert!(w.out.contains_key(&a));
}

#[test]
fn one_who_comes_back_from_its_own_check_has_waited_all_the_while() {
    let mut w = World::new(Rules { validate: Validate::Always, fair_after: us(700), max_size: 2, ..rules() });
    w.burst(1);
    w.takes.check = ms(1);
    w.takes.open = ms(5);
    w.takes.close = secs(1);
    w.dead = w.server.keys().copied().collect();
    let begun = w.now;
    w.get_or_check(true);
    w.run(us(10));
    w.get();
    w.run(ms(1));
    assert_eq!(w.ledger.front.map(|front| front.since), Some(begun), "so nobody passes it, nor those behind it");
}

#[test]
fn a_wish_that_shortens_the_pause_is_not_left_to_chance() {
    let mut w = World::new(rules());
    w.refuse = Some(false);
    for _ in 0..6 {
        w.run(secs(60));
        w.ledger.prepare(w.now);
        w.settle();
    }
    let dials = w.dials.len();
    w.run(ms(1));
    w.refuse = None;
    w.ledger.prepare(w.now);
    w.settle();
    w.run(ms(50));
    assert_eq!((w.dials.len(), w.counts().idle), (dials + 1, 1), "50 ms after the last failure");
}

// ---------------------------------------------------------------------------------------------------- a year

#[test]
fn a_year_with_two_thousand_connections() {
    let mut w = World::new(Rules {
        max_size: 2_000,
        min_idle: 10,
        max_idle: Some(secs(600)),
        max_lifetime: Some(secs(1_800)),
        lifetime_jitter: 0.1,
        validate: Validate::AfterIdle(secs(1)),
        parallel_opens: 100,
        ..rules()
    });
    w.takes.open = ms(3);
    w.takes.check = ms(1);
    w.ledger.set_min_idle(w.now, 10);
    w.settle();
    let day = secs(86_400);
    for n in 0..365u64 {
        // A rush in the morning, a trickle until the evening, silence at night.
        let rush: Vec<_> = (0..if n % 73 == 0 { 2_000 } else { 60 }).map(|_| w.get()).collect();
        w.run(secs(1));
        rush.into_iter().for_each(|seat| w.put(seat));
        for _ in 0..36 {
            w.run(secs(1_200));
            let seat = w.get();
            w.run(secs(1));
            w.put(seat);
        }
        w.run_to(Moment::BIRTH.plus(day.saturating_mul(n as u32 + 1)));
        assert!((10..=11).contains(&w.counts().idle), "{:?} on day {n}", w.counts());
    }
    assert_eq!(w.ledger.tally.max_lateness, Duration::ZERO);
    assert!(w.most <= 2_000);
}

// ---------------------------------------------------------------------------------------------------- anything

mod property {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Get,
        /// By a worker that checks for itself what needs it.
        GetHere,
        TryGet,
        /// Return the nth that is out.
        Put(usize, Condition),
        Detach(usize),
        /// The nth that waits gives up.
        Leave(usize),
        Run(u64),
        /// Microseconds pass, in which those who are called come or do not come yet.
        Blink(u64),
        /// How long those who are called take to come, in microseconds.
        Sleepy(u64),
        Resize(u32),
        Recycle,
        Close,
        /// The grace of a close is over.
        Abandon,
        /// From now on the server takes connections, is away, or refuses.
        Server(Option<bool>),
        /// Whether an open that fails leaves a connection behind, for its job to close.
        Leaves(bool),
        /// How long the parts of jobs take that begin from now on.
        Network(Takes),
        /// What hangs goes on.
        Release,
        /// How far behind their time threads tell the ledger what they do, in microseconds.
        Skew(u64),
        /// Whether the system starts threads.
        Threads(bool),
        /// The nth connection dies without a word.
        Kill(usize),
    }

    /// Up to `most` milliseconds, often hardly any time, sometimes for ever.
    fn takes(most: u64) -> impl Strategy<Value = Duration> {
        prop_oneof![3 => (0..20u64).prop_map(ms), 3 => (0..most).prop_map(ms), 1 => Just(Duration::MAX)]
    }

    fn op() -> impl Strategy<Value = Op> {
        let back = prop_oneof![
            12 => Just(Condition::Keep),
            2 => Just(Condition::Reset),
            1 => Just(Condition::Broken),
            1 => Just(Condition::Outdated),
            1 => Just(Condition::Discard(CloseReason::Discarded)),
            1 => Just(Condition::Discard(CloseReason::Panicked)),
        ];
        let start =
            prop_oneof![3 => Just(Duration::ZERO), 3 => (0..200u64).prop_map(ms), 1 => (0..3_000u64).prop_map(ms)];
        let network = (start, takes(12_000), takes(3_000), takes(15_000), takes(8_000))
            .prop_map(|(start, open, check, handler, close)| Takes { start, open, check, handler, close });
        let one_of_each = prop_oneof![
            1 => (1u32..8).prop_map(Op::Resize),
            1 => Just(Op::Recycle),
            1 => prop_oneof![4 => Just(None), 1 => Just(Some(false)), 1 => Just(Some(true))].prop_map(Op::Server),
            1 => any::<bool>().prop_map(Op::Leaves),
            1 => (0u64..4_000).prop_map(Op::Skew),
            1 => (0u64..3_000).prop_map(Op::Sleepy),
            1 => prop::bool::weighted(0.7).prop_map(Op::Threads),
            1 => Just(Op::Release),
        ];
        let the_end = prop_oneof![1 => Just(Op::Close), 2 => Just(Op::Abandon)];
        prop_oneof![
            100 => Just(Op::Get),
            50 => Just(Op::GetHere),
            30 => Just(Op::TryGet),
            120 => (any::<usize>(), back).prop_map(|(n, back)| Op::Put(n, back)),
            10 => any::<usize>().prop_map(Op::Detach),
            30 => any::<usize>().prop_map(Op::Leave),
            80 => (0u64..3_000).prop_map(Op::Run),
            60 => (0u64..2_000).prop_map(Op::Blink),
            80 => one_of_each,
            40 => network.prop_map(Op::Network),
            30 => any::<usize>().prop_map(Op::Kill),
            1 => the_end,
        ]
    }

    fn some_rules() -> impl Strategy<Value = Rules> {
        let validate = prop_oneof![
            Just(Validate::Never),
            Just(Validate::Always),
            Just(Validate::AfterIdle(Duration::from_secs(1)))
        ];
        let some = |range| prop_oneof![1 => Just(None), 3 => Strategy::prop_map(range, |n| Some(ms(n)))];
        let fair_after = prop_oneof![Just(0), Just(1_000), 1u64..50_000];
        let limits = (1u32..8, 0u32..8, some(0u64..10_000), some(1u64..20_000));
        (limits, validate, 1u32..5, some(1u64..5_000), fair_after).prop_map(
            |((max_size, min_idle, max_idle, max_lifetime), validate, parallel_opens, keepalive, fair_after)| Rules {
                max_size,
                min_idle: if max_idle == Some(Duration::ZERO) { 0 } else { min_idle.min(max_size) },
                max_idle,
                max_lifetime,
                validate,
                parallel_opens,
                keepalive,
                leak_threshold: Some(secs(2)),
                fair_after: us(fair_after),
                ..rules()
            },
        )
    }

    impl World {
        /// The idle connections as a naive pool would reckon them: all that the server sees and nobody has, by last use.
        fn naive_idle(&self) -> Vec<Moment> {
            let at_work = self.jobs.values().map(|(_, job)| job.conn).chain(self.own.values().map(|own| own.conn));
            let at_work = at_work.chain(self.backlog.iter().map(|&(_, conn)| conn));
            let busy: Vec<Conn> = self.out.values().map(|o| o.1).chain(at_work).collect();
            let mut used: Vec<_> =
                self.server.iter().filter(|(conn, _)| !busy.contains(conn)).map(|(_, &(_, used))| used).collect();
            used.sort();
            used
        }

        fn check_against_naive(&self) {
            let (l, rules) = (&self.ledger, &self.ledger.rules);
            let idle: Vec<_> = l.idle.iter().map(|&(i, _)| l.slots[i as usize].since).collect();
            let naive = self.naive_idle();
            assert_eq!(idle, naive, "the stack, by last use");
            // P1: above the floor nothing is left that is due.
            if let Some(max) = rules.max_idle {
                let due = naive.iter().skip(rules.min_idle as usize).filter(|used| used.plus(max) <= self.now);
                assert_eq!(due.count(), 0, "idle for too long");
            }
            // P2: nothing idle is past its end.
            assert!(l.slots().all(|r| r.as_seen() != ConnectionState::Idle || r.dies > self.now), "too old");
            // P5: the server sees what is counted, and `lost` at most; those are bounded.
            let counts = self.counts();
            assert!(self.server.len() <= (counts.total() + counts.abandoned) as usize);
            // Whoever waits has something to wait for: room that will come back, a job, or a time to dial.
            if counts.waiting > 0 {
                let hope = counts.total() > 0 || l.alarm < Moment::NEVER;
                assert!(hope, "waiting for nothing: {counts:?}");
            }
            // P1, to the moment a close begins: four at once, and four more each time that those before take long.
            if self.starts_at_once {
                let late = self.most_skew + CLOSE_PATIENCE * (l.slots.len() / CLOSERS) as u32;
                assert!(l.tally.max_lateness <= late, "{:?} late, of {late:?}", l.tally.max_lateness);
            }
        }
    }

    fn nth<T: Copy + Ord>(mut of: Vec<T>, n: usize) -> Option<T> {
        of.sort();
        if of.is_empty() { None } else { Some(of[n % of.len()]) }
    }

    /// One life of a pool, after which its server is well again.
    fn live(rules: Rules, ops: Vec<Op>) {
        let max = rules.max_size;
        let floor = rules.min_idle;
        let mut w = World::new(Rules { resolution: ms(4), ..rules });
        w.strict = true;
        w.ledger.set_min_idle(w.now, floor);
        w.settle();
        for op in ops {
            match op {
                Op::Get => {
                    w.get();
                }
                Op::GetHere => {
                    w.get_or_check(true);
                }
                Op::TryGet => {
                    w.sees = !w.sees;
                    w.try_get();
                }
                Op::Put(n, back) => {
                    if let Some(seat) = nth(w.out.keys().copied().collect(), n) {
                        w.put_back(seat, back);
                    }
                }
                Op::Detach(n) => {
                    if let Some(seat) = nth(w.out.keys().copied().collect(), n) {
                        let (token, conn) = w.out.remove(&seat).unwrap();
                        w.server.remove(&conn);
                        w.ledger.detach(w.read(), token);
                    }
                }
                Op::Leave(n) => {
                    if let Some(seat) = nth(w.waiting.iter().map(|x| x.0).collect(), n) {
                        assert!(w.leave(seat));
                    }
                }
                Op::Run(n) => w.run(ms(n)),
                Op::Blink(n) => w.run(us(n)),
                Op::Sleepy(n) => w.wake_time = us(n),
                Op::Resize(n) if n >= floor => {
                    w.greatest = w.greatest.max(w.ledger.rules.max_size);
                    w.ledger.resize(w.read(), n);
                }
                Op::Resize(_) => {}
                Op::Recycle => {
                    w.replaced = w.event();
                    w.ledger.recycle(w.read());
                }
                Op::Close => {
                    w.ledger.close(w.read());
                }
                Op::Abandon if w.ledger.closed => w.ledger.abandon_opens(w.read()),
                Op::Abandon => {}
                Op::Server(refuse) => w.refuse = refuse,
                Op::Leaves(one) => w.leaves_one = one,
                Op::Network(takes) => {
                    w.takes = takes;
                    w.starts_at_once &= takes.start == Duration::ZERO;
                }
                Op::Release => w.release(),
                Op::Skew(n) => w.set_skew(us(n)),
                Op::Threads(spawns) => {
                    w.spawns = spawns;
                    w.starts_at_once &= spawns;
                }
                Op::Kill(n) => {
                    if let Some(conn) = nth(w.server.keys().copied().collect(), n) {
                        w.dead.push(conn);
                    }
                }
            }
            w.settle();
            w.run(Duration::ZERO);
            w.check_against_naive();
            w.check_nobody_is_forgotten();
        }
        // The server is well again, nothing takes long, what hung goes on, and everybody returns what they have.
        (w.refuse, w.leaves_one, w.spawns, w.skew) = (None, false, true, Duration::ZERO);
        w.takes = Takes { open: ms(1), ..QUICK };
        w.release();
        w.ledger.rules.max_lifetime = Some(secs(1_000_000));
        for _ in 0..200 {
            for seat in w.out.keys().copied().collect::<Vec<_>>() {
                w.put(seat);
            }
            w.run(secs(1));
        }
        assert_eq!(w.counts().waiting, 0, "somebody was forgotten");
        assert!(w.counts().total() <= max.max(w.ledger.rules.max_size));
        assert!(w.ledger.closed || w.counts().idle >= floor.min(w.ledger.rules.max_size));
        w.ledger.close(w.now);
        w.settle();
        w.run(secs(60));
        assert_eq!(w.counts().total(), 0, "every slot comes back");
        assert_eq!(w.counts().abandoned, 0);
        assert!(w.server.is_empty());
        assert_eq!(w.ledger.lifetimes.len() + w.ledger.limits.len(), 0);
        assert!(w.posted.is_empty() && w.closers.is_empty() && w.backlog.is_empty(), "the crew has nothing left to do");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

        /// Whatever happens, in whatever order: the rules hold after each step, every slot comes back, nobody is
        /// forgotten, and a pool whose server is well again serves all who wait.
        #[test]
        fn anything_goes(rules in some_rules(), ops in prop::collection::vec(op(), 1..120)) {
            live(rules, ops);
        }
    }
}
