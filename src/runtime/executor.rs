//! The [`Executor`]: the threads that may block.
//!
//! Threads appear when there is work, linger, and leave. Each kind of job has its own limit of threads, so that no kind
//! uses up the threads of another. A job over that limit waits in the backlog of its kind. A job that takes longer than
//! usual may [stop counting](Executor::stop_counting) against the limit. A job past its limit is
//! [abandoned](Executor::abandon): another thread may take its place, and its own leaves when the job ends.
//!
//! A job counts as long as it stands in the [list of running jobs](Inner::running), under the kind it was started as.
//! So a close that runs on the thread that posted it, since no thread could be started, does not count. A failed check
//! that goes on to close its connection counts as a check.
//!
//! No job is lost if a thread cannot be started. An open is returned to the thread that posted it. A close is returned
//! as well, if the executor has no thread at all. Every other job waits in the backlog for a thread. If nobody looks at
//! the backlog again, a thread can [take](Executor::take_close) the closes from it.
//!
//! No thread pool on crates.io does this: those can neither abandon a job that hangs nor limit jobs by kind.

use crate::leaf::shield::drop_payload;
use crate::leaf::sync::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use crate::leaf::sync::{Mutex, sometimes, thread};
use crate::leaf::threads::thread_name;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(5);
/// How many closes run at once, of those that do not take longer than usual. Several, since after a burst all surplus
/// connections are evicted together; few, since each takes only a millisecond or two.
const CLOSERS: usize = 4;
/// How many jobs of each other kind run at once, so that a pool cannot use up the threads of its process. In a pool of
/// more connections than this a job over the limit waits.
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
    /// Cancel and abort stuck calls: one per slot.
    Abort,
    /// Log records: they have one thread, which the logger may block.
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

    /// The number of the connection whose slot the job has. By it [`stop_counting`](Executor::stop_counting) and
    /// [`abandon`](Executor::abandon) find the job.
    fn slot(&self) -> Option<u64>;
}

/// The pool that an executor works for.
pub(crate) trait Host: Send + Sync + 'static {
    type Job: Task;

    fn executor(&self) -> &Executor<Self::Job>;

    /// Runs a job, on a thread of the executor.
    fn run(self: &Arc<Self>, job: Self::Job);

    /// Runs a job on the thread that posted it, since the executor has no thread for it.
    fn run_on_caller(self: &Arc<Self>, job: Self::Job);

    /// A thread has left the executor.
    fn left(&self);
}

pub(crate) struct Executor<J> {
    name: String,
    inner: Mutex<Inner<J>>,
    /// Sends a job to a thread that lingers; `None`: it is to leave.
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

/// A job in the list of running jobs.
struct Running {
    kind: Kind,
    slot: Option<u64>,
    /// Whether it counts against the limit of its kind.
    counts: bool,
}

struct Inner<J> {
    /// Threads that have not left, those of abandoned jobs among them.
    threads: usize,
    /// Threads that linger and to which no job was sent.
    idle: usize,
    /// The jobs that run and were not abandoned, in the order in which they were started.
    running: BTreeMap<u64, Running>,
    /// The running job that has a slot. If there are two, it is the later one: the earlier has handed its slot to the
    /// ledger, and is about to end.
    by_slot: HashMap<u64, u64>,
    /// How many running jobs of each kind count against its limit...
    counted: [usize; KINDS],
    /// ... and how many do not any longer.
    slow: [usize; KINDS],
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
            by_slot: HashMap::new(),
            counted: [0; KINDS],
            slow: [0; KINDS],
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

    /// Whether a job of one of these kinds runs or waits for a thread.
    pub(crate) fn is_at_work(&self, kinds: &[Kind]) -> bool {
        let inner = self.inner.lock();
        let waits = kinds.iter().any(|&kind| !inner.backlog[kind as usize].is_empty());
        waits || inner.running.values().any(|running| kinds.contains(&running.kind))
    }

    /// Log records that were dropped because the logger had blocked for too long, or no thread could be started for
    /// them.
    pub(crate) fn dropped_records(&self) -> u64 {
        self.inner.lock().dropped_records
    }

    /// Has a job run. `Ok(false)`: no thread could be started. The job is in the backlog, and [`run_backlog`] must be
    /// called again later. `Err`: no thread could be started, and the job must not wait for one.
    ///
    /// [`run_backlog`]: Executor::run_backlog
    pub(crate) fn post<S: Host<Job = J>>(&self, host: &Arc<S>, job: J) -> Result<bool, (io::Error, J)> {
        let mut inner = self.inner.lock();
        let kind = job.kind();
        if !inner.has_room(kind) {
            sometimes!("a job waits for room");
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
                sometimes!("no thread could be started");
                inner.threads -= 1;
                inner.end(started.number);
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

    /// Gives threads to the jobs of the backlog for which there is room. There may be some after a thread could not be
    /// started, or after a running job no longer counts. `false`: there is room, but no thread could be started.
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
                inner.end(started.number);
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

    /// Takes a close from the backlog, if there is one, for a thread that will run it itself.
    pub(crate) fn take_close(&self) -> Option<J> {
        self.inner.lock().backlog[Kind::Close as usize].pop_front()
    }

    /// The job that has this slot takes longer than usual: it no longer counts against the limit of its kind, and jobs
    /// of the backlog run. Nothing changes if no thread of the executor runs the job. Returns as
    /// [`run_backlog`](Executor::run_backlog) does.
    pub(crate) fn stop_counting<S: Host<Job = J>>(&self, host: &Arc<S>, slot: u64) -> bool {
        {
            let mut inner = self.inner.lock();
            inner.stop_counting(slot);
        }
        self.run_backlog(host)
    }

    /// The job that has this slot is abandoned: its thread leaves when the job ends, and jobs of the backlog run.
    /// Nothing changes if no thread of the executor runs the job. Returns as [`run_backlog`](Executor::run_backlog)
    /// does.
    pub(crate) fn abandon<S: Host<Job = J>>(&self, host: &Arc<S>, slot: u64) -> bool {
        {
            let mut inner = self.inner.lock();
            if let Some(&number) = inner.by_slot.get(&slot) {
                inner.end(number);
            }
        }
        self.run_backlog(host)
    }

    /// From now on no thread lingers. Jobs still run.
    pub(crate) fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        for _ in 0..std::mem::take(&mut inner.idle) {
            self.tell(None);
        }
    }

    fn tell(&self, what: Option<Started<J>>) {
        // `self` has a receiver as well, so this cannot fail.
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

    /// The life of a thread: it runs jobs until none comes for [`LINGER`].
    fn serve<S: Host<Job = J>>(&self, host: &Arc<S>) {
        loop {
            let mut next = match self.receive.recv_timeout(LINGER) {
                Ok(Some(started)) => Some(started),
                Ok(None) => break,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let mut inner = self.inner.lock();
                    if inner.idle > 0 {
                        sometimes!("a thread has lingered long enough");
                        // A thread that lingers without a job on its way to it: this one leaves.
                        inner.idle -= 1;
                        break;
                    }
                    continue;
                }
            };
            while let Some(Started { number, job }) = next.take() {
                // A panic that nothing else caught ends the job, and not the thread.
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| host.run(job))) {
                    drop_payload(payload);
                }
                let mut inner = self.inner.lock();
                let Some(Running { kind, .. }) = inner.end(number) else {
                    sometimes!("the thread of an abandoned job leaves");
                    // The job was abandoned, and another thread has taken its place.
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
    /// Whether another job of this kind may run. One more may run for each that no longer counts, so that of many jobs
    /// that hang the last one still begins soon.
    fn has_room(&self, kind: Kind) -> bool {
        let (counted, slow) = (self.counted[kind as usize], self.slow[kind as usize]);
        counted < kind.limit() + slow && counted + slow < MOST
    }

    /// Enters a job in the list of running jobs.
    fn start(&mut self, job: J) -> Started<J> {
        let number = self.started;
        self.started += 1;
        self.running.insert(number, Running { kind: job.kind(), slot: job.slot(), counts: true });
        self.counted[job.kind() as usize] += 1;
        if let Some(slot) = job.slot() {
            self.by_slot.insert(slot, number);
        }
        Started { number, job }
    }

    /// Takes a job off the list of running jobs. `None`: it was abandoned.
    fn end(&mut self, number: u64) -> Option<Running> {
        let job = self.running.remove(&number)?;
        let counts = if job.counts { &mut self.counted } else { &mut self.slow };
        counts[job.kind as usize] -= 1;
        if let Some(slot) = job.slot.filter(|slot| self.by_slot.get(slot) == Some(&number)) {
            self.by_slot.remove(&slot);
        }
        Some(job)
    }

    /// The job that has this slot no longer counts against the limit of its kind.
    fn stop_counting(&mut self, slot: u64) {
        let number = self.by_slot.get(&slot);
        if let Some(job) = number.and_then(|number| self.running.get_mut(number)).filter(|job| job.counts) {
            job.counts = false;
            self.counted[job.kind as usize] -= 1;
            self.slow[job.kind as usize] += 1;
        }
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

    /// Posts a close. The receiver is told when it runs.
    fn post_close(host: &Arc<TestHost>, slot: u64) -> Receiver<()> {
        let (done, seen) = unbounded();
        host.post(Kind::Close, slot, move || done.send(()).unwrap());
        seen
    }

    #[test]
    fn closes_are_limited_and_do_not_delay_an_open() {
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
        host.executor.inner.lock().audit();
        seen.recv_timeout(SOON).expect("the fifth close goes on");
        drop(go); // the stuck jobs end, and the thread of the abandoned one leaves
        host.executor.close();
        for _ in 0..CLOSERS + 1 {
            gone.recv_timeout(SOON).unwrap();
        }
        assert_eq!(host.executor.threads(), 0);
    }

    #[test]
    fn a_close_that_takes_long_delays_no_other_and_its_thread_stays() {
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
        assert!(host.executor.stop_counting(&host, 2), "a second time this changes nothing");
        host.executor.inner.lock().audit();
        let done = post_close(&host, 6);
        assert!(done.is_empty());
        drop(go);
        done.recv_timeout(SOON).unwrap();
        host.executor.close();
        for _ in 0..CLOSERS + 2 {
            gone.recv_timeout(SOON).unwrap();
        }
    }

    #[test]
    fn a_job_that_does_not_run_here_frees_no_place() {
        let (host, gone) = host();
        let (go, wait) = bounded::<()>(0);
        // A check that failed, and goes on to close its connection.
        let hangs = wait.clone();
        host.post(Kind::Check, 1, move || _ = hangs.recv());
        assert!(host.executor.abandon(&host, 1));
        // A close that ran on the thread that posted it.
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
        // No thread ever runs: the test counts how many are started.
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
    fn beside_a_blocked_logger_surplus_records_are_dropped() {
        let (host, _gone) = host();
        let (go, wait) = bounded::<()>(0);
        host.post(Kind::Record, None, move || _ = wait.recv());
        for _ in 0..MAX_RECORDS + 7 {
            host.post(Kind::Record, None, || {});
        }
        assert_eq!(host.executor.dropped_records(), 7);
        drop(go);
    }

    impl<J> Inner<J> {
        /// The counts, and the job of each slot, are as the list of running jobs has them.
        fn audit(&self) {
            let (mut counted, mut slow) = ([0; KINDS], [0; KINDS]);
            for job in self.running.values() {
                if job.counts { counted[job.kind as usize] += 1 } else { slow[job.kind as usize] += 1 }
            }
            assert_eq!((self.counted, self.slow), (counted, slow));
            for (&slot, number) in &self.by_slot {
                let last = self.running.iter().rev().find(|(_, job)| job.slot == Some(slot));
                assert_eq!(last.map(|(number, _)| number), Some(number), "the job of slot {slot}");
            }
        }
    }

    impl TestHost {
        /// Waits until so many threads linger.
        fn wait_for_idle(&self, idle: usize) {
            self.executor.inner.lock().audit();
            let deadline = std::time::Instant::now() + SOON;
            while self.executor.inner.lock().idle != idle {
                assert!(std::time::Instant::now() < deadline, "{idle} threads do not linger");
                thread::yield_now();
            }
        }
    }

    #[test]
    fn a_thread_that_lingers_takes_the_next_job() {
        let (host, gone) = host();
        for n in 0..3 {
            post_close(&host, n).recv_timeout(SOON).expect("it runs");
            host.wait_for_idle(1);
            assert_eq!(host.executor.threads(), 1);
        }
        // The same from the backlog.
        let (done, seen) = unbounded();
        for n in 0..3 {
            let done = done.clone();
            host.executor.defer(Job(Kind::Check, None, Box::new(move || done.send(n).unwrap())));
            assert!(host.executor.run_backlog(&host));
            assert_eq!(seen.recv_timeout(SOON), Ok(n));
            host.wait_for_idle(1);
            assert_eq!(host.executor.threads(), 1);
        }
        host.executor.close();
        gone.recv_timeout(SOON).expect("the thread leaves");
        assert_eq!((host.executor.threads(), host.executor.inner.lock().idle), (0, 0));
    }

    /// Starts a thread, or fails as the system does when there are too many.
    fn spawn_if(spawns: &AtomicBool, builder: thread::Builder, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        if spawns.load(Ordering::SeqCst) {
            builder.spawn(body).map(drop)
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    #[test]
    fn what_no_thread_was_had_for_keeps_its_turn_and_is_not_counted_as_running() {
        static SPAWNS: AtomicBool = AtomicBool::new(false);
        let (left, gone) = unbounded();
        let executor = Executor::with_spawn("host".into(), |builder, body| spawn_if(&SPAWNS, builder, body));
        let host = Arc::new(TestHost { executor, left });
        let (done, seen) = unbounded();
        for n in 0..3 {
            let done = done.clone();
            let job = Job(Kind::Record, None, Box::new(move || done.send(n).unwrap()));
            assert!(host.executor.post(&host, job).is_ok_and(|ok| !ok));
            assert!(!host.executor.run_backlog(&host));
            host.executor.inner.lock().audit();
            assert!(host.executor.inner.lock().running.is_empty());
        }
        SPAWNS.store(true, Ordering::SeqCst);
        assert!(host.executor.run_backlog(&host));
        assert_eq!((0..3).map(|_| seen.recv_timeout(SOON).unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        host.wait_for_idle(1);
        host.executor.close();
        gone.recv_timeout(SOON).expect("the thread leaves");
    }

    static SPAWNS: AtomicBool = AtomicBool::new(true);
    static RUN: AtomicUsize = AtomicUsize::new(0);

    #[test]
    fn without_a_thread_no_job_is_lost() {
        let (left, gone) = unbounded();
        let executor = Executor::with_spawn("host".into(), |builder, body| spawn_if(&SPAWNS, builder, body));
        let host = Arc::new(TestHost { executor, left });
        let run = || {
            RUN.fetch_add(1, Ordering::SeqCst);
        };
        let job = |kind| Job(kind, None, Box::new(run));
        SPAWNS.store(false, Ordering::SeqCst);
        assert!(host.executor.post(&host, job(Kind::Open)).is_err(), "an open fails, to be tried again");
        assert!(host.executor.post(&host, job(Kind::Close)).is_err(), "a close is to run on the thread that posted it");
        assert!(host.executor.post(&host, job(Kind::Check)).is_ok_and(|ok| !ok), "a check waits");
        assert!(!host.executor.run_backlog(&host), "the check still waits");
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
