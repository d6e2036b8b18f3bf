//! The [`Crew`]: the threads that may block.
//!
//! Threads appear when there is work, linger, and leave. Each kind of job has its own limit of threads, so that no kind
//! uses up those of another; what is over the limit waits in a backlog of its kind. A thread whose job is written off
//! no longer counts: another takes its place, and it leaves when that job ends.
//!
//! A thread that cannot be started loses nothing: an `Open` comes back to the caller, what else there is waits for
//! another thread of the crew, and if there is none a `Close` comes back too and the others wait to be tried again.

use crate::text::is_harmful;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(5);
/// How many close at once. Closes are many at a time (a burst that went idle) and may each take long.
const CLOSERS: usize = 4;
/// How many of the other kinds run at once, of each. A process that has no thread left for others ends; what is over the
/// limit waits, in a pool of more than as many connections.
const MOST: usize = 1024;
/// How many log records may wait for a logger that blocks. What comes on top is dropped, and counted.
const MAX_NOTICES: usize = 1024;

/// The kinds of jobs. The ledger bounds the first two by itself: one per slot, and opens by `parallel_opens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Open,
    /// Validate, keep alive, reset.
    Check,
    Close,
    /// Cancel and abort what is stuck: one per slot.
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

/// What a crew works for.
pub(crate) trait Work: Send + Sync + 'static {
    type Job: Send;

    fn crew(&self) -> &Crew<Self::Job>;

    /// Does a job. `true`: it was written off meanwhile, so its thread has been replaced.
    fn run(self: &Arc<Self>, job: Self::Job) -> bool;

    /// A thread has left the crew.
    fn left(&self);
}

pub(crate) struct Crew<J> {
    name: String,
    roster: Mutex<Roster<J>>,
    /// To the threads that linger: a job, or the word to leave.
    send: Sender<Option<(Kind, J)>>,
    receive: Receiver<Option<(Kind, J)>>,
    spawn: Spawn,
}

/// How a thread is started.
type Spawn = fn(thread::Builder, Box<dyn FnOnce() + Send>) -> io::Result<()>;

struct Roster<J> {
    /// Threads that have not left, those with a job that was written off among them.
    threads: usize,
    /// Threads that linger and to which nothing has been sent.
    idle: usize,
    running: [usize; KINDS],
    backlog: [VecDeque<J>; KINDS],
    dropped_notices: u64,
    closed: bool,
}

impl<J: Send + 'static> Crew<J> {
    pub(crate) fn new(name: String) -> Self {
        Self::with_spawn(name, |builder, body| builder.spawn(body).map(drop))
    }

    /// A crew that starts its threads with `spawn`.
    fn with_spawn(name: String, spawn: Spawn) -> Self {
        let (send, receive) = unbounded();
        let roster = Roster {
            threads: 0,
            idle: 0,
            running: [0; KINDS],
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

    /// Log records that were dropped because the logger had blocked for too long.
    pub(crate) fn dropped_notices(&self) -> u64 {
        self.roster.lock().dropped_notices
    }

    /// Has a job done. `Ok(false)`: it waits, and somebody must [`nudge`](Crew::nudge). `Err`: no thread could be
    /// started, and the job is one that must not wait for one.
    pub(crate) fn post<S: Work<Job = J>>(&self, work: &Arc<S>, kind: Kind, job: J) -> Result<bool, (io::Error, J)> {
        let mut roster = self.roster.lock();
        if roster.running[kind as usize] >= kind.limit() {
            if kind == Kind::Notice && roster.backlog[kind as usize].len() >= MAX_NOTICES {
                roster.dropped_notices += 1;
            } else {
                roster.backlog[kind as usize].push_back(job);
            }
            return Ok(true);
        }
        roster.running[kind as usize] += 1;
        if roster.idle > 0 {
            roster.idle -= 1;
            drop(roster);
            self.tell(Some((kind, job)));
            return Ok(true);
        }
        roster.threads += 1;
        drop(roster);
        match self.start(work) {
            Ok(()) => {
                self.tell(Some((kind, job)));
                Ok(true)
            }
            Err(e) => {
                let mut roster = self.roster.lock();
                roster.threads -= 1;
                roster.running[kind as usize] -= 1;
                match kind {
                    Kind::Open => Err((e, job)),
                    Kind::Close if roster.threads == 0 => Err((e, job)),
                    _ => {
                        roster.backlog[kind as usize].push_back(job);
                        Ok(false)
                    }
                }
            }
        }
    }

    /// Starts threads for what waits though there is room: after a thread could not be started, or was written off.
    /// `false`: something still waits that no thread will come for.
    pub(crate) fn nudge<S: Work<Job = J>>(&self, work: &Arc<S>) -> bool {
        loop {
            let mut roster = self.roster.lock();
            let Some((kind, job)) = roster.next_in_backlog(None) else { return true };
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
                roster.running[kind as usize] -= 1;
                roster.backlog[kind as usize].push_front(job);
                return false;
            }
            drop(roster);
            self.tell(Some((kind, job)));
        }
    }

    /// Leaves a job for the next [`nudge`](Crew::nudge).
    pub(crate) fn strand(&self, kind: Kind, job: J) {
        self.roster.lock().backlog[kind as usize].push_back(job);
    }

    /// A job of this kind is given up: its thread counts no longer, and what waits behind it goes on.
    pub(crate) fn write_off<S: Work<Job = J>>(&self, work: &Arc<S>, kind: Kind) -> bool {
        self.roster.lock().running[kind as usize] -= 1;
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

    fn tell(&self, what: Option<(Kind, J)>) {
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
                Ok(Some(job)) => Some(job),
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
            while let Some((kind, job)) = next.take() {
                // What a job may do to its thread is to end it: nothing else is shared.
                let replaced = catch_unwind(AssertUnwindSafe(|| work.run(job))).unwrap_or(false);
                let mut roster = self.roster.lock();
                if replaced {
                    roster.threads -= 1;
                    return;
                }
                roster.running[kind as usize] -= 1;
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

impl<J> Roster<J> {
    /// A job from the backlog for which there is room, of the kind `first` if there is one, and counts it as running.
    fn next_in_backlog(&mut self, first: Option<Kind>) -> Option<(Kind, J)> {
        let all = [Kind::Open, Kind::Check, Kind::Close, Kind::Cut, Kind::Notice];
        for kind in first.into_iter().chain(all) {
            if self.running[kind as usize] < kind.limit() {
                if let Some(job) = self.backlog[kind as usize].pop_front() {
                    self.running[kind as usize] += 1;
                    return Some((kind, job));
                }
            }
        }
        None
    }
}

/// The name of a thread of the pool `pool`: cut to what Linux shows (15 bytes), with its suffix kept, and with nothing in it
/// that does something to a terminal.
pub(crate) fn thread_name(pool: &str, suffix: &str) -> String {
    let mut end = pool.len().min(15 - suffix.len());
    while !pool.is_char_boundary(end) {
        end -= 1;
    }
    // A NUL would make `spawn` panic, and there is no room to escape the others.
    format!("{}{suffix}", &pool[..end]).replace(is_harmful, "?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    type Job = Box<dyn FnOnce() -> bool + Send>;

    struct Yard {
        crew: Crew<Job>,
        left: Sender<()>,
    }

    impl Work for Yard {
        type Job = Job;

        fn crew(&self) -> &Crew<Job> {
            &self.crew
        }

        fn run(self: &Arc<Self>, job: Job) -> bool {
            job()
        }

        fn left(&self) {
            let _ = self.left.send(());
        }
    }

    fn yard() -> (Arc<Yard>, Receiver<()>) {
        let (left, gone) = unbounded();
        (Arc::new(Yard { crew: Crew::new("yard".into()), left }), gone)
    }

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn names_fit_and_keep_their_suffix() {
        assert_eq!(thread_name("orders", "-crew"), "orders-crew");
        assert_eq!(thread_name("a-very-long-name", "-reaper"), "a-very-l-reaper");
        assert_eq!(thread_name("ääääääääää", "-crew"), "äääää-crew");
        assert_eq!(thread_name("a\0b", "-crew"), "a?b-crew");
        assert_eq!(thread_name("a\x1b[2J\n\u{202e}", "-crew"), "a?[2J??-crew");
    }

    #[test]
    fn closes_are_limited_and_do_not_hold_up_an_open() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for n in 0..6 {
            let (wait, done) = (wait.clone(), done.clone());
            let job: Job = Box::new(move || {
                let _ = wait.recv();
                done.send(n).is_err()
            });
            yard.crew.post(&yard, Kind::Close, job).map_err(|e| e.0).unwrap();
        }
        assert_eq!(yard.crew.threads(), CLOSERS);
        let open = done.clone();
        yard.crew.post(&yard, Kind::Open, Box::new(move || open.send(100).is_err())).map_err(|e| e.0).unwrap();
        assert_eq!(seen.recv_timeout(SOON), Ok(100), "while every closer is busy");
        drop(go);
        let mut closed: Vec<i32> = (0..6).map(|_| seen.recv_timeout(SOON).unwrap()).collect();
        closed.sort();
        assert_eq!(closed, [0, 1, 2, 3, 4, 5]);
        yard.crew.close();
        for _ in 0..5 {
            gone.recv_timeout(SOON).expect("a thread stays behind");
        }
        assert_eq!(yard.crew.threads(), 0);
    }

    #[test]
    fn a_thread_that_is_written_off_is_replaced_and_leaves_in_the_end() {
        let (yard, gone) = yard();
        let (go, wait) = bounded::<()>(0);
        let (done, seen) = unbounded();
        for _ in 0..CLOSERS {
            let wait = wait.clone();
            yard.crew.post(&yard, Kind::Close, Box::new(move || wait.recv().is_err())).map_err(|e| e.0).unwrap();
        }
        yard.crew.post(&yard, Kind::Close, Box::new(move || done.send(()).is_err())).map_err(|e| e.0).unwrap();
        assert!(seen.is_empty());
        assert!(yard.crew.write_off(&yard, Kind::Close));
        seen.recv_timeout(SOON).expect("the fifth close goes on");
        drop(go); // the stuck ones return, and are told that they were replaced
        yard.crew.close();
        for _ in 0..CLOSERS + 1 {
            gone.recv_timeout(SOON).unwrap();
        }
    }

    #[test]
    fn a_panic_costs_nothing() {
        let (yard, _gone) = yard();
        let (done, seen) = unbounded();
        for n in 0..3 {
            let done = done.clone();
            let job: Job = Box::new(move || {
                done.send(n).unwrap();
                panic!("on purpose")
            });
            yard.crew.post(&yard, Kind::Notice, job).map_err(|e| e.0).unwrap();
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
                yard.crew.post(&yard, kind, Box::new(|| false)).map_err(|e| e.0).unwrap();
            }
        }
        assert!(yard.crew.threads() <= 3 * 1024, "{} threads", yard.crew.threads());
    }

    #[test]
    fn a_blocked_logger_drops_what_is_too_much() {
        let (yard, _gone) = yard();
        let (go, wait) = bounded::<()>(0);
        yard.crew.post(&yard, Kind::Notice, Box::new(move || wait.recv().is_ok())).map_err(|e| e.0).unwrap();
        for _ in 0..MAX_NOTICES + 7 {
            yard.crew.post(&yard, Kind::Notice, Box::new(|| false)).map_err(|e| e.0).unwrap();
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
        let job = || -> Job {
            Box::new(|| {
                RUN.fetch_add(1, Ordering::SeqCst);
                false
            })
        };
        SPAWNS.store(false, Ordering::SeqCst);
        assert!(yard.crew.post(&yard, Kind::Open, job()).is_err(), "an open fails, to be tried again");
        assert!(yard.crew.post(&yard, Kind::Close, job()).is_err(), "a close runs on the caller if there is nobody");
        assert!(yard.crew.post(&yard, Kind::Check, job()).is_ok_and(|ok| !ok), "a check waits");
        assert!(!yard.crew.nudge(&yard), "and still does");
        SPAWNS.store(true, Ordering::SeqCst);
        assert!(yard.crew.nudge(&yard));
        yard.crew.close();
        gone.recv_timeout(SOON).unwrap();
        assert_eq!(RUN.load(Ordering::SeqCst), 1);
    }
}
