//! The [`Executor`]: the threads that may block.
//!
//! Threads appear when there is work, linger, and leave. Each kind of job has its own limit of threads, so that no kind
//! uses up those of another; what is over the limit waits in a backlog of its kind. A job that takes longer than usual
//! may be told to [count no longer](Executor::stop_counting) against that limit. The thread of an [abandoned
//! job](Executor::abandon) is abandoned: it leaves when that job ends.
//!
//! What counts is what stands in the [list of running jobs](Inner::running), each under the kind it was started as. So
//! a job that runs elsewhere (on its caller, where no thread can be started) or that goes on to do something else (a
//! failed check closes what it has) counts as what it is: nothing, and a check.
//!
//! A thread that cannot be started loses nothing: an open comes back to the thread that posted it, another job waits
//! for another thread of the executor; if there is none, a close comes back too and the others wait to be tried again.
//!
//! No thread pool of the ecosystem does this: theirs cannot abandon a job that hangs, nor limit by kind.

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
/// How many closes run at once, of those that do not take longer than usual. Closes come many at a time: after a burst
/// all that is surplus is evicted together.
const CLOSERS: usize = 4;
/// How many jobs of each other kind run at once. A process that has no thread left for others ends; in a pool of more
/// than as many connections a job over this limit waits.
const MOST: usize = 1024;
/// How many log records may wait for a logger that blocks. A record beyond them is dropped, and counted.
const MAX_RECORDS: usize = 1024;

/// The kinds of jobs. The ledger bounds the first two by itself: one check per slot, and opens by `parallel_opens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Open,
    /// Validate, keep alive, reset.
    Check,
    Close,
    /// Cancel and abort what is stuck: one per slot.
    Abort,
    /// Log records: one thread, which a logger that blocks may keep.
    Record,
}

const KINDS: usize = 5;

impl Kind {
    fn limit(self) -> usize {
        match self {
            Kind::Open | Kind::Check | Kind::Abort => MOST,
            Kind::Close => CLOSERS,
            Kind::Record => 1,
        }
    }
}

/// A job, as the executor sees it.
pub(crate) trait Task: Send + 'static {
    fn kind(&self) -> Kind;

    /// The number of the connection whose slot the job has: by it the job may be counted no longer, or abandoned.
    fn slot(&self) -> Option<u64>;
}

/// Whom an executor works for.
pub(crate) trait Host: Send + Sync + 'static {
    type Job: Task;

    fn executor(&self) -> &Executor<Self::Job>;

    /// Runs a job, on a thread of the executor.
    fn run(self: &Arc<Self>, job: Self::Job);

    /// Runs a job on the thread that has posted it: there is no thread for it.
    fn run_on_caller(self: &Arc<Self>, job: Self::Job);

    /// A thread has left the executor.
    fn left(&self);
}

pub(crate) struct Executor<J> {
    name: String,
    inner: Mutex<Inner<J>>,
    /// To the threads that linger: a job, or `None` to leave.
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
    slot: Option<u64>,
    /// Whether it counts against the limit of its kind.
    counts: bool,
}

struct Inner<J> {
    /// Threads that have not left, those of abandoned jobs among them.
    threads: usize,
    /// Threads that linger and to which nothing has been sent.
    idle: usize,
    /// The jobs that run and were not abandoned, in the order in which they were started.
    running: BTreeMap<u64, Running>,
    started: u64,
    backlog: [VecDeque<J>; KINDS],
    dropped_records: u64,
    closed: bool,
}

impl<J: Task> Executor<J> {
    pub(crate) fn new(name: String) -> Self {
        Self::with_spawn(name, |builder, body| builder.spawn(body).map(drop))
    }

    /// An executor that starts its threads with `spawn`.
    fn with_spawn(name: String, spawn: Spawn) -> Self {
        let (send, receive) = unbounded();
        let inner = Inner {
            threads: 0,
            idle: 0,
            running: BTreeMap::new(),
            started: 0,
            backlog: std::array::from_fn(|_| VecDeque::new()),
            dropped_records: 0,
            closed: false,
        };
        Executor { name, inner: Mutex::new(inner), send, receive, spawn }
    }

    /// Threads that have not left.
    pub(crate) fn threads(&self) -> usize {
        self.inner.lock().threads
    }

    /// Log records that were dropped because the logger had blocked for too long, or no thread could be started for
    /// them.
    pub(crate) fn dropped_records(&self) -> u64 {
        self.inner.lock().dropped_records
    }

    /// Has a job done. `Ok(false)`: it waits in the backlog, and somebody must call
    /// [`run_backlog`](Executor::run_backlog). `Err`: no thread could be started, and the job is one that must not wait
    /// for one.
    pub(crate) fn post<S: Host<Job = J>>(&self, host: &Arc<S>, job: J) -> Result<bool, (io::Error, J)> {
        let mut inner = self.inner.lock();
        let kind = job.kind();
        if !inner.has_room(kind) {
            inner.defer(job);
            return Ok(true);
        }
        let started = inner.start(job);
        if inner.idle > 0 {
            inner.idle -= 1;
            drop(inner);
            self.tell(Some(started));
            return Ok(true);
        }
        inner.threads += 1;
        drop(inner);
        match self.start(host) {
            Ok(()) => {
                self.tell(Some(started));
                Ok(true)
            }
            Err(e) => {
                let mut inner = self.inner.lock();
                inner.threads -= 1;
                inner.running.remove(&started.number);
                match kind {
                    Kind::Open => Err((e, started.job)),
                    Kind::Close if inner.threads == 0 => Err((e, started.job)),
                    _ => {
                        inner.defer(started.job);
                        Ok(false)
                    }
                }
            }
        }
    }

    /// Starts threads for the jobs in the backlog for which there is room: after a thread could not be started, or a
    /// job no longer counts. `false`: a job still waits for which there is no thread.
    pub(crate) fn run_backlog<S: Host<Job = J>>(&self, host: &Arc<S>) -> bool {
        loop {
            let mut inner = self.inner.lock();
            let Some(started) = inner.next_in_backlog(None) else { return true };
            let due = if inner.idle > 0 {
                inner.idle -= 1;
                true
            } else {
                inner.threads += 1;
                drop(inner);
                let started = self.start(host).is_ok();
                inner = self.inner.lock();
                if !started {
                    inner.threads -= 1;
                }
                started
            };
            if !due {
                inner.running.remove(&started.number);
                inner.backlog[started.job.kind() as usize].push_front(started.job);
                return false;
            }
            drop(inner);
            self.tell(Some(started));
        }
    }

    /// Puts a job in the backlog, for the next [`run_backlog`](Executor::run_backlog).
    pub(crate) fn defer(&self, job: J) {
        self.inner.lock().defer(job);
    }

    /// The job that has this slot takes longer than usual: it counts no longer against the limit of its kind, and the
    /// jobs behind it run. Nothing happens if it does not run here.
    pub(crate) fn stop_counting<S: Host<Job = J>>(&self, host: &Arc<S>, slot: u64) -> bool {
        {
            let mut inner = self.inner.lock();
            if let Some(number) = inner.find(slot) {
                inner.running.entry(number).and_modify(|job| job.counts = false);
            }
        }
        self.run_backlog(host)
    }

    /// The job that has this slot is abandoned: its thread leaves when the job ends, and the jobs behind it run.
    /// Nothing happens if it does not run here.
    pub(crate) fn abandon<S: Host<Job = J>>(&self, host: &Arc<S>, slot: u64) -> bool {
        {
            let mut inner = self.inner.lock();
            if let Some(number) = inner.find(slot) {
                inner.running.remove(&number);
            }
        }
        self.run_backlog(host)
    }

    /// From now on no thread lingers. Jobs are still done.
    pub(crate) fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        for _ in 0..std::mem::take(&mut inner.idle) {
            self.tell(None);
        }
    }

    fn tell(&self, what: Option<Started<J>>) {
        // The receiver lives as long as `self`, so this cannot fail.
        let _ = self.send.send(what);
    }

    fn start<S: Host<Job = J>>(&self, host: &Arc<S>) -> io::Result<()> {
        let host = Arc::clone(host);
        let builder = thread::Builder::new().name(thread_name(&self.name, "-exec"));
        (self.spawn)(
            builder,
            Box::new(move || {
                host.executor().serve(&host);
                host.left();
            }),
        )
    }

    /// The life of a thread: it runs jobs, until none comes for a while.
    fn serve<S: Host<Job = J>>(&self, host: &Arc<S>) {
        loop {
            let mut next = match self.receive.recv_timeout(LINGER) {
                Ok(Some(started)) => Some(started),
                Ok(None) => break,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let mut inner = self.inner.lock();
                    if inner.idle > 0 {
                        // No job is on its way to a thread that lingers.
                        inner.idle -= 1;
                        break;
                    }
                    continue;
                }
            };
            while let Some(Started { number, job }) = next.take() {
                // A panic that was not caught may end its job, and not the thread.
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| host.run(job))) {
                    drop_payload(payload);
                }
                let mut inner = self.inner.lock();
                let Some(Running { kind, .. }) = inner.running.remove(&number) else {
                    // The job was abandoned: another thread has its place.
                    inner.threads -= 1;
                    return;
                };
                next = inner.next_in_backlog(Some(kind));
                if next.is_none() {
                    if inner.closed {
                        inner.threads -= 1;
                        return;
                    }
                    inner.idle += 1;
                }
            }
        }
        self.inner.lock().threads -= 1;
    }
}

impl<J: Task> Inner<J> {
    /// Beside those that may run, one more runs for each that counts no longer: so of many jobs that hang the last
    /// begins soon.
    fn has_room(&self, kind: Kind) -> bool {
        let (mut counted, mut slow) = (0, 0);
        for job in self.running.values().filter(|job| job.kind == kind) {
            if job.counts { counted += 1 } else { slow += 1 }
        }
        counted < kind.limit() + slow && counted + slow < MOST
    }

    /// Enters a job in the list of running jobs.
    fn start(&mut self, job: J) -> Started<J> {
        let number = self.started;
        self.started += 1;
        self.running.insert(number, Running { kind: job.kind(), slot: job.slot(), counts: true });
        Started { number, job }
    }

    /// The job that has this slot: of two the later, for the earlier has passed the slot on and is about to end.
    fn find(&self, slot: u64) -> Option<u64> {
        self.running.iter().rev().find(|(_, job)| job.slot == Some(slot)).map(|(&number, _)| number)
    }

    /// Puts a job in the backlog of its kind.
    fn defer(&mut self, job: J) {
        let kind = job.kind();
        if kind == Kind::Record && self.backlog[kind as usize].len() >= MAX_RECORDS {
            self.dropped_records += 1;
        } else {
            self.backlog[kind as usize].push_back(job);
        }
    }

    /// A job from the backlog for which there is room, of the kind `first` if there is one, entered as running.
    fn next_in_backlog(&mut self, first: Option<Kind>) -> Option<Started<J>> {
        let all = [Kind::Open, Kind::Check, Kind::Close, Kind::Abort, Kind::Record];
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

        fn slot(&self) -> Option<u64> {
            self.1
        }
    }

    struct TestHost {
        executor: Executor<Job>,
        left: Sender<()>,
    }

    impl Host for TestHost {
        type Job = Job;

        fn executor(&self) -> &Executor<Job> {
            &self.executor
        }

        fn run(self: &Arc<Self>, job: Job) {
            (job.2)()
        }

        fn run_on_caller(self: &Arc<Self>, job: Job) {
            (job.2)()
        }

        fn left(&self) {
            let _ = self.left.send(());
        }
    }

    fn host() -> (Arc<TestHost>, Receiver<()>) {
        let (left, gone) = unbounded();
        (Arc::new(TestHost { executor: Executor::new("host".into()), left }), gone)
    }

    impl TestHost {
        fn post(self: &Arc<Self>, kind: Kind, slot: impl Into<Option<u64>>, job: impl FnOnce() + Send + 'static) {
            self.executor.post(self, Job(kind, slot.into(), Box::new(job))).map_err(|e| e.0).unwrap();
        }
    }

    const SOON: Duration = Duration::from_secs(20);

    /// Posts a close that tells when it begins.
    fn seen_by(host: &Arc<TestHost>, slot: u64) -> Receiver<()> {
        let (done, seen) = unbounded();
        host.post(Kind::Close, slot, move || done.send(()).unwrap());
        seen
    }

    #[test]
    fn closes_are_limited_and_do_not_hold_up_an_open() {
        let (host, gone) = host();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..6 {
            let (wait, done) = (wait.clone(), done.clone());
            host.post(Kind::Close, n, move || {
                let _ = wait.recv();
                done.send(n).unwrap();
            });
        }
        assert_eq!(host.executor.threads(), CLOSERS);
        let open = done.clone();
        host.post(Kind::Open, 100, move || open.send(100).unwrap());
        assert_eq!(seen.recv_timeout(SOON), Ok(100), "while every closer is busy");
        drop(go);
        let mut closed: Vec<u64> = (0..6).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        closed.sort();
        assert_eq!(closed, [0, 1, 2, 3, 4, 5]);
        host.executor.close();
        for _ in 0..5 {
            gone.recv_timeout(SOON).expect("a thread stays behind");
        }
        assert_eq!(host.executor.threads(), 0);
    }

    #[test]
    fn the_thread_of_an_abandoned_job_leaves_in_the_end() {
        let (host, gone) = host();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..CLOSERS as u64 {
            let wait = wait.clone();
            host.post(Kind::Close, n, move || _ = wait.recv());
        }
        host.post(Kind::Close, 4, move || done.send(()).unwrap());
        assert!(seen.is_empty());
        assert!(host.executor.abandon(&host, 0));
        seen.recv_timeout(SOON).expect("the fifth close goes on");
        drop(go); // the stuck ones return, one of them to leave
        host.executor.close();
        for _ in 0..CLOSERS + 1 {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(host.executor.threads(), 0);
    }

    #[test]
    fn one_that_takes_long_holds_up_nobody_and_its_thread_stays() {
        let (host, gone) = host();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..CLOSERS as u64 {
            let wait = wait.clone();
            host.post(Kind::Close, n, move || _ = wait.recv());
        }
        for n in 4..6 {
            let (wait, done) = (wait.clone(), done.clone());
            host.post(Kind::Close, n, move || {
                done.send(n).unwrap();
                _ = wait.recv();
            });
        }
        assert!(seen.is_empty());
        assert!(host.executor.stop_counting(&host, 2));
        let mut begun: Vec<u64> = (0..2).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        begun.sort();
        assert_eq!(begun, [4, 5], "one in its place, and one more beside it");
        assert!(host.executor.stop_counting(&host, 2), "a second time it is not counted down again");
        let done = seen_by(&host, 6);
        assert!(done.is_empty());
        drop(go);
        done.recv_timeout(SOON).unwrap();
        host.executor.close();
        for _ in 0..CLOSERS + 2 {
            gone.recv_timeout(SOON).unwrap();
        }
    }

    #[test]
    fn what_does_not_run_here_counts_nothing_down() {
        let (host, gone) = host();
        let (go, wait) = bounded::<()>(0);
        // A check that failed, and goes on to close what it has.
        let hangs = wait.clone();
        host.post(Kind::Check, 1, move || _ = hangs.recv());
        assert!(host.executor.abandon(&host, 1));
        // A close that ran on its caller.
        assert!(host.executor.abandon(&host, 2));
        for n in 10..10 + CLOSERS as u64 {
            let wait = wait.clone();
            host.post(Kind::Close, n, move || _ = wait.recv());
        }
        let (done, seen) = unbounded();
        host.post(Kind::Close, 20, move || done.send(()).unwrap());
        assert_eq!(host.executor.threads(), 1 + CLOSERS, "as many closes run as may, and no more");
        assert!(seen.is_empty());
        drop(go);
        seen.recv_timeout(SOON).expect("the last close is done");
        host.executor.close();
        for _ in 0..1 + CLOSERS {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(host.executor.threads(), 0);
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
        let (host, _gone) = host();
        let (done, seen) = unbounded();
        for n in 0..3 {
            let done = done.clone();
            host.post(Kind::Record, None, move || {
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
        let executor = Executor::with_spawn("host".into(), |_, body| {
            drop(body);
            Ok(())
        });
        let host = Arc::new(TestHost { executor, left });
        for _ in 0..3000 {
            for kind in [Kind::Open, Kind::Check, Kind::Abort] {
                host.post(kind, None, || {});
            }
        }
        assert!(host.executor.threads() <= 3 * 1024, "{} threads", host.executor.threads());
    }

    #[test]
    fn a_blocked_logger_drops_what_is_too_much() {
        let (host, _gone) = host();
        let (go, wait) = bounded::<()>(0);
        host.post(Kind::Record, None, move || _ = wait.recv());
        for _ in 0..MAX_RECORDS + 7 {
            host.post(Kind::Record, None, || {});
        }
        assert_eq!(host.executor.dropped_records(), 7);
        drop(go);
    }

    static SPAWNS: AtomicBool = AtomicBool::new(true);
    static RUN: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn no_thread_to_be_had_loses_nothing() {
        let (left, gone) = unbounded();
        let executor = Executor::with_spawn("host".into(), |builder, body| {
            if SPAWNS.load(Ordering::SeqCst) {
                builder.spawn(body).map(drop)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            }
        });
        let host = Arc::new(TestHost { executor, left });
        let run = || {
            RUN.fetch_add(1, Ordering::SeqCst);
        };
        let job = |kind| Job(kind, None, Box::new(run));
        SPAWNS.store(false, Ordering::SeqCst);
        assert!(host.executor.post(&host, job(Kind::Open)).is_err(), "an open fails, to be tried again");
        assert!(host.executor.post(&host, job(Kind::Close)).is_err(), "a close runs on the caller if there is nobody");
        assert!(host.executor.post(&host, job(Kind::Check)).is_ok_and(|ok| !ok), "a check waits");
        assert!(!host.executor.run_backlog(&host), "and still does");
        for _ in 0..MAX_RECORDS + 7 {
            assert!(host.executor.post(&host, job(Kind::Record)).is_ok_and(|ok| !ok));
        }
        assert_eq!(host.executor.dropped_records(), 7, "log records do not pile up without bound");
        SPAWNS.store(true, Ordering::SeqCst);
        assert!(host.executor.run_backlog(&host));
        host.executor.close();
        while host.executor.threads() > 0 {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(RUN.load(Ordering::SeqCst), 1 + MAX_RECORDS);
    }
}
