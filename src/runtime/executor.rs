//! The [`Crew`]: the threads that may block.
//!
//! Threads appear when there is work, linger, and leave. Each kind of job has its own limit of threads, so that no kind
//! uses up those of another; what is over the limit waits in a backlog of its kind. A job that takes longer than usual
//! may be told to count [no longer](Crew::discount) against that limit. A thread whose job is written off is
//! [replaced](Crew::replace): it leaves when that job ends.
//!
//! What counts is what stands in the [list of running jobs](Roster::running), each under the kind it was started as. So
//! a job that runs elsewhere (on its caller, where no thread can be started) or that goes on to do something else (a
//! failed check closes what it has) counts as what it is: nothing, and a check.
//!
//! A thread that cannot be started loses nothing: an `Open` comes back to the caller, what else there is waits for
//! another thread of the crew, and if there is none a `Close` comes back too and the others wait to be tried again.

use crate::leaf::shield::drop_payload;
use crate::leaf::threads::thread_name;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(5);
/// How many close at once, of those that do not take longer than usual. Closes are many at a time: a burst that went idle.
const CLOSERS: usize = 4;
/// How many of the other kinds run at once, of each. A process that has no thread left for others ends; what is over the
/// limit waits, in a pool of more than as many connections.
const MOST: usize = 1024;
/// How many log records may wait for a logger that blocks. What comes on top is dropped, and counted.
const MAX_NOTICES: usize = 1024;

/// The kinds of jobs. The ledger bounds the first two by itself: one per permit, and opens by `parallel_opens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Open,
    /// Validate, keep alive, reset.
    Check,
    Close,
    /// Cancel and abort what is stuck: one per permit.
    Cut,
    /// Log records: one thread, which a logger that blocks may have for itself.
    Notice,
}

const KINDS: usize = 5;

impl Kind {
    fn limit(self) -> usize {
        match self {
            Kind::Open | Kind::Check | Kind::Cut => MOST,
            Kind::Close => CLOSERS,
            Kind::Notice => 1,
        }
    }
}

/// What there is to do.
pub(crate) trait Task: Send + 'static {
    fn kind(&self) -> Kind;

    /// The permit that it has, by whose number it may be discounted and replaced.
    fn permit(&self) -> Option<u64>;
}

/// What a crew works for.
pub(crate) trait Work: Send + Sync + 'static {
    type Job: Task;

    fn crew(&self) -> &Crew<Self::Job>;

    fn run(self: &Arc<Self>, job: Self::Job);

    /// A thread has left the crew.
    fn left(&self);
}

pub(crate) struct Crew<J> {
    name: String,
    roster: Mutex<Roster<J>>,
    /// To the threads that linger: a job, or the word to leave.
    send: Sender<Option<Started<J>>>,
    receive: Receiver<Option<Started<J>>>,
    spawn: Spawn,
}

/// How a thread is started.
type Spawn = fn(thread::Builder, Box<dyn FnOnce() + Send>) -> io::Result<()>;

/// A job that stands in the list of running jobs, under this number.
struct Started<J> {
    number: u64,
    job: J,
}

/// What the list of running jobs says of one.
struct Running {
    kind: Kind,
    permit: Option<u64>,
    /// Whether it counts against the limit of its kind.
    counts: bool,
}

struct Roster<J> {
    /// Threads that have not left, those that were replaced among them.
    threads: usize,
    /// Threads that linger and to which nothing has been sent.
    idle: usize,
    /// The jobs that were given to a thread which was not replaced, in the order in which they were.
    running: BTreeMap<u64, Running>,
    started: u64,
    backlog: [VecDeque<J>; KINDS],
    dropped_notices: u64,
    closed: bool,
}

impl<J: Task> Crew<J> {
    pub(crate) fn new(name: String) -> Self {
        Self::with_spawn(name, |builder, body| builder.spawn(body).map(drop))
    }

    /// A crew that starts its threads with `spawn`.
    fn with_spawn(name: String, spawn: Spawn) -> Self {
        let (send, receive) = unbounded();
        let roster = Roster {
            threads: 0,
            idle: 0,
            running: BTreeMap::new(),
            started: 0,
            backlog: std::array::from_fn(|_| VecDeque::new()),
            dropped_notices: 0,
            closed: false,
        };
        Crew { name, roster: Mutex::new(roster), send, receive, spawn }
    }

    /// Threads that have not left.
    pub(crate) fn threads(&self) -> usize {
        self.roster.lock().threads
    }

    /// Log records that were dropped because the logger had blocked for too long, or no thread could be started for them.
    pub(crate) fn dropped_notices(&self) -> u64 {
        self.roster.lock().dropped_notices
    }

    /// Has a job done. `Ok(false)`: it waits, and somebody must [`nudge`](Crew::nudge). `Err`: no thread could be
    /// started, and the job is one that must not wait for one.
    pub(crate) fn post<S: Work<Job = J>>(&self, work: &Arc<S>, job: J) -> Result<bool, (io::Error, J)> {
        let mut roster = self.roster.lock();
        let kind = job.kind();
        if !roster.has_room(kind) {
            roster.put_off(job);
            return Ok(true);
        }
        let started = roster.start(job);
        if roster.idle > 0 {
            roster.idle -= 1;
            drop(roster);
            self.tell(Some(started));
            return Ok(true);
        }
        roster.threads += 1;
        drop(roster);
        match self.start(work) {
            Ok(()) => {
                self.tell(Some(started));
                Ok(true)
            }
            Err(e) => {
                let mut roster = self.roster.lock();
                roster.threads -= 1;
                roster.running.remove(&started.number);
                match kind {
                    Kind::Open => Err((e, started.job)),
                    Kind::Close if roster.threads == 0 => Err((e, started.job)),
                    _ => {
                        roster.put_off(started.job);
                        Ok(false)
                    }
                }
            }
        }
    }

    /// Starts threads for what waits though there is room: after a thread could not be started, or no longer counts.
    /// `false`: something still waits that no thread will come for.
    pub(crate) fn nudge<S: Work<Job = J>>(&self, work: &Arc<S>) -> bool {
        loop {
            let mut roster = self.roster.lock();
            let Some(started) = roster.next_in_backlog(None) else { return true };
            let due = if roster.idle > 0 {
                roster.idle -= 1;
                true
            } else {
                roster.threads += 1;
                drop(roster);
                let started = self.start(work).is_ok();
                roster = self.roster.lock();
                if !started {
                    roster.threads -= 1;
                }
                started
            };
            if !due {
                roster.running.remove(&started.number);
                roster.backlog[started.job.kind() as usize].push_front(started.job);
                return false;
            }
            drop(roster);
            self.tell(Some(started));
        }
    }

    /// Leaves a job for the next [`nudge`](Crew::nudge).
    pub(crate) fn strand(&self, job: J) {
        self.roster.lock().put_off(job);
    }

    /// The job that has this permit takes long: it counts no longer against the limit of its kind, and what waits behind it
    /// goes on. Nothing happens if it does not run here.
    pub(crate) fn discount<S: Work<Job = J>>(&self, work: &Arc<S>, permit: u64) -> bool {
        {
            let mut roster = self.roster.lock();
            if let Some(number) = roster.find(permit) {
                roster.running.entry(number).and_modify(|job| job.counts = false);
            }
        }
        self.nudge(work)
    }

    /// The job that has this permit is given up: its thread leaves when it ends, and what waits behind it goes on. Nothing
    /// happens if it does not run here.
    pub(crate) fn replace<S: Work<Job = J>>(&self, work: &Arc<S>, permit: u64) -> bool {
        {
            let mut roster = self.roster.lock();
            if let Some(number) = roster.find(permit) {
                roster.running.remove(&number);
            }
        }
        self.nudge(work)
    }

    /// Nobody lingers from now on. Jobs are still done.
    pub(crate) fn close(&self) {
        let mut roster = self.roster.lock();
        roster.closed = true;
        for _ in 0..std::mem::take(&mut roster.idle) {
            self.tell(None);
        }
    }

    fn tell(&self, what: Option<Started<J>>) {
        // The receiver lives as long as `self`, so this cannot fail.
        let _ = self.send.send(what);
    }

    fn start<S: Work<Job = J>>(&self, work: &Arc<S>) -> io::Result<()> {
        let work = Arc::clone(work);
        let builder = thread::Builder::new().name(thread_name(&self.name, "-crew"));
        (self.spawn)(
            builder,
            Box::new(move || {
                work.crew().serve(&work);
                work.left();
            }),
        )
    }

    /// The life of a thread: jobs, until nobody sends one for a while.
    fn serve<S: Work<Job = J>>(&self, work: &Arc<S>) {
        loop {
            let mut next = match self.receive.recv_timeout(LINGER) {
                Ok(Some(started)) => Some(started),
                Ok(None) => break,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let mut roster = self.roster.lock();
                    if roster.idle > 0 {
                        // Nothing is on its way to this thread, or to another that will then get it.
                        roster.idle -= 1;
                        break;
                    }
                    continue;
                }
            };
            while let Some(Started { number, job }) = next.take() {
                // What a job may do to its thread is to end it: nothing else is shared.
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| work.run(job))) {
                    drop_payload(payload);
                }
                let mut roster = self.roster.lock();
                let Some(Running { kind, .. }) = roster.running.remove(&number) else {
                    // It was replaced.
                    roster.threads -= 1;
                    return;
                };
                next = roster.next_in_backlog(Some(kind));
                if next.is_none() {
                    if roster.closed {
                        roster.threads -= 1;
                        return;
                    }
                    roster.idle += 1;
                }
            }
        }
        self.roster.lock().threads -= 1;
    }
}

impl<J: Task> Roster<J> {
    /// For each of them that counts no longer one more runs beside those that may: of many that hang the last begins soon.
    fn has_room(&self, kind: Kind) -> bool {
        let (mut counted, mut slow) = (0, 0);
        for job in self.running.values().filter(|job| job.kind == kind) {
            if job.counts { counted += 1 } else { slow += 1 }
        }
        counted < kind.limit() + slow && counted + slow < MOST
    }

    /// Enters a job in the list of those that run.
    fn start(&mut self, job: J) -> Started<J> {
        let number = self.started;
        self.started += 1;
        self.running.insert(number, Running { kind: job.kind(), permit: job.permit(), counts: true });
        Started { number, job }
    }

    /// The job that has this permit: of two the later, for the earlier has handed the permit on and is about to end.
    fn find(&self, permit: u64) -> Option<u64> {
        self.running.iter().rev().find(|(_, job)| job.permit == Some(permit)).map(|(&number, _)| number)
    }

    /// Puts a job in the backlog of its kind.
    fn put_off(&mut self, job: J) {
        let kind = job.kind();
        if kind == Kind::Notice && self.backlog[kind as usize].len() >= MAX_NOTICES {
            self.dropped_notices += 1;
        } else {
            self.backlog[kind as usize].push_back(job);
        }
    }

    /// A job from the backlog for which there is room, of the kind `first` if there is one, entered as running.
    fn next_in_backlog(&mut self, first: Option<Kind>) -> Option<Started<J>> {
        let all = [Kind::Open, Kind::Check, Kind::Close, Kind::Cut, Kind::Notice];
        for kind in first.into_iter().chain(all) {
            if !self.backlog[kind as usize].is_empty() && self.has_room(kind) {
                if let Some(job) = self.backlog[kind as usize].pop_front() {
                    return Some(self.start(job));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    struct Job(Kind, Option<u64>, Box<dyn FnOnce() + Send>);

    impl Task for Job {
        fn kind(&self) -> Kind {
            self.0
        }

        fn permit(&self) -> Option<u64> {
            self.1
        }
    }

    struct Yard {
        crew: Crew<Job>,
        left: Sender<()>,
    }

    impl Work for Yard {
        type Job = Job;

        fn crew(&self) -> &Crew<Job> {
            &self.crew
        }

        fn run(self: &Arc<Self>, job: Job) {
            (job.2)()
        }

        fn left(&self) {
            let _ = self.left.send(());
        }
    }

    fn yard() -> (Arc<Yard>, Receiver<()>) {
        let (left, gone) = unbounded();
        (Arc::new(Yard { crew: Crew::new("yard".into()), left }), gone)
    }

    impl Yard {
        fn post(self: &Arc<Self>, kind: Kind, permit: impl Into<Option<u64>>, job: impl FnOnce() + Send + 'static) {
            self.crew.post(self, Job(kind, permit.into(), Box::new(job))).map_err(|e| e.0).unwrap();
        }
    }

    const SOON: Duration = Duration::from_secs(20);

    /// Posts a close that tells when it begins.
    fn seen_by(yard: &Arc<Yard>, permit: u64) -> Receiver<()> {
        let (done, seen) = unbounded();
        yard.post(Kind::Close, permit, move || done.send(()).unwrap());
        seen
    }

    #[test]
    fn closes_are_limited_and_do_not_hold_up_an_open() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..6 {
            let (wait, done) = (wait.clone(), done.clone());
            yard.post(Kind::Close, n, move || {
                let _ = wait.recv();
                done.send(n).unwrap();
            });
        }
        assert_eq!(yard.crew.threads(), CLOSERS);
        let open = done.clone();
        yard.post(Kind::Open, 100, move || open.send(100).unwrap());
        assert_eq!(seen.recv_timeout(SOON), Ok(100), "while every closer is busy");
        drop(go);
        let mut closed: Vec<u64> = (0..6).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        closed.sort();
        assert_eq!(closed, [0, 1, 2, 3, 4, 5]);
        yard.crew.close();
        for _ in 0..5 {
            gone.recv_timeout(SOON).expect("a thread stays behind");
        }
        assert_eq!(yard.crew.threads(), 0);
    }

    #[test]
    fn a_thread_that_is_replaced_leaves_in_the_end() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..CLOSERS as u64 {
            let wait = wait.clone();
            yard.post(Kind::Close, n, move || _ = wait.recv());
        }
        yard.post(Kind::Close, 4, move || done.send(()).unwrap());
        assert!(seen.is_empty());
        assert!(yard.crew.replace(&yard, 0));
        seen.recv_timeout(SOON).expect("the fifth close goes on");
        drop(go); // the stuck ones return, one of them to leave
        yard.crew.close();
        for _ in 0..CLOSERS + 1 {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(yard.crew.threads(), 0);
    }

    #[test]
    fn one_that_takes_long_holds_up_nobody_and_its_thread_stays() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..CLOSERS as u64 {
            let wait = wait.clone();
            yard.post(Kind::Close, n, move || _ = wait.recv());
        }
        for n in 4..6 {
            let (wait, done) = (wait.clone(), done.clone());
            yard.post(Kind::Close, n, move || {
                done.send(n).unwrap();
                _ = wait.recv();
            });
        }
        assert!(seen.is_empty());
        assert!(yard.crew.discount(&yard, 2));
        let mut begun: Vec<u64> = (0..2).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        begun.sort();
        assert_eq!(begun, [4, 5], "one in its place, and one more beside it");
        assert!(yard.crew.discount(&yard, 2), "a second time it is not counted down again");
        let done = seen_by(&yard, 6);
        assert!(done.is_empty());
        drop(go);
        done.recv_timeout(SOON).unwrap();
        yard.crew.close();
        for _ in 0..CLOSERS + 2 {
            gone.recv_timeout(SOON).unwrap();
        }
    }

    #[test]
    fn what_does_not_run_here_counts_nothing_down() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        // A check that failed, and goes on to close what it has.
        let hangs = wait.clone();
        yard.post(Kind::Check, 1, move || _ = hangs.recv());
        assert!(yard.crew.replace(&yard, 1));
        // A close that ran on its caller.
        assert!(yard.crew.replace(&yard, 2));
        for n in 10..10 + CLOSERS as u64 {
            let wait = wait.clone();
            yard.post(Kind::Close, n, move || _ = wait.recv());
        }
        let (done, seen) = unbounded();
        yard.post(Kind::Close, 20, move || done.send(()).unwrap());
        assert_eq!(yard.crew.threads(), 1 + CLOSERS, "as many closes run as may, and no more");
        assert!(seen.is_empty());
        drop(go);
        seen.recv_timeout(SOON).expect("the last close is done");
        yard.crew.close();
        for _ in 0..1 + CLOSERS {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(yard.crew.threads(), 0);
    }

    #[test]
    fn a_panic_costs_nothing() {
        struct Worse;
        impl Drop for Worse {
            fn drop(&mut self) {
                std::panic::panic_any(Worst);
            }
        }
        struct Worst;
        impl Drop for Worst {
            fn drop(&mut self) {
                panic!("on purpose, for the third time");
            }
        }
        let (yard, _gone) = yard();
        let (done, seen) = unbounded();
        for n in 0..3 {
            let done = done.clone();
            yard.post(Kind::Notice, None, move || {
                done.send(n).unwrap();
                std::panic::panic_any(Worse)
            });
        }
        for n in 0..3 {
            assert_eq!(seen.recv_timeout(SOON), Ok(n));
        }
    }

    #[test]
    fn there_is_an_end_to_the_threads_of_each_kind() {
        // None of them ever runs: it is about how many are wanted.
        let (left, _gone) = unbounded();
        let crew = Crew::with_spawn("yard".into(), |_, body| {
            drop(body);
            Ok(())
        });
        let yard = Arc::new(Yard { crew, left });
        for _ in 0..3000 {
            for kind in [Kind::Open, Kind::Check, Kind::Cut] {
                yard.post(kind, None, || {});
            }
        }
        assert!(yard.crew.threads() <= 3 * 1024, "{} threads", yard.crew.threads());
    }

    #[test]
    fn a_blocked_logger_drops_what_is_too_much() {
        let (yard, _gone) = yard();
        let (go, wait) = bounded::<()>(0);
        yard.post(Kind::Notice, None, move || _ = wait.recv());
        for _ in 0..MAX_NOTICES + 7 {
            yard.post(Kind::Notice, None, || {});
        }
        assert_eq!(yard.crew.dropped_notices(), 7);
        drop(go);
    }

    static SPAWNS: AtomicBool = AtomicBool::new(true);
    static RUN: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn no_thread_to_be_had_loses_nothing() {
        let (left, gone) = unbounded();
        let crew = Crew::with_spawn("yard".into(), |builder, body| {
            if SPAWNS.load(Ordering::SeqCst) {
                builder.spawn(body).map(drop)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            }
        });
        let yard = Arc::new(Yard { crew, left });
        let run = || {
            RUN.fetch_add(1, Ordering::SeqCst);
        };
        let job = |kind| Job(kind, None, Box::new(run));
        SPAWNS.store(false, Ordering::SeqCst);
        assert!(yard.crew.post(&yard, job(Kind::Open)).is_err(), "an open fails, to be tried again");
        assert!(yard.crew.post(&yard, job(Kind::Close)).is_err(), "a close runs on the caller if there is nobody");
        assert!(yard.crew.post(&yard, job(Kind::Check)).is_ok_and(|ok| !ok), "a check waits");
        assert!(!yard.crew.nudge(&yard), "and still does");
        for _ in 0..MAX_NOTICES + 7 {
            assert!(yard.crew.post(&yard, job(Kind::Notice)).is_ok_and(|ok| !ok));
        }
        assert_eq!(yard.crew.dropped_notices(), 7, "log records do not pile up without bound");
        SPAWNS.store(true, Ordering::SeqCst);
        assert!(yard.crew.nudge(&yard));
        yard.crew.close();
        while yard.crew.threads() > 0 {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(RUN.load(Ordering::SeqCst), 1 + MAX_NOTICES);
    }
}
