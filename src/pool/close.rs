//! The end of a pool: [`Pool::close`], and what it reports.

use crate::leaf::in_hand;
use crate::leaf::sync::Instant;
use crate::leaf::sync::sometimes;
use crate::leaf::text::{Short, Shown};
use crate::ledger::Slot;
use crate::manage::Manage;
use crate::pool::Pool;
use crate::runtime::executor::Kind;
use crate::runtime::lifecycle::{VainWait, Within};
use crate::runtime::shared::Shared;
use crate::stats::{ConnectionState, Connections};
use log::Level;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

impl<M: Manage> Pool<M> {
    /// Closes the pool, and waits until it is closed, but for at most `grace`.
    ///
    /// From the start of the call, waiters get [`Closed`](crate::ErrorKind::Closed), and no connection is checked out
    /// any more. Idle connections are closed; those in use as they are returned; those being opened when they arrive.
    ///
    /// Called from a hook, `close` does not wait for the job or the connection with which the hook was called. But for
    /// a connection that this thread has checked out, and has not returned, it waits until the grace is over: return it
    /// first. (The pool knows which thread checked a connection out, and not which thread has it now.)
    ///
    /// When the grace is over, the calls of connections in use are cancelled and aborted, where the manager can do
    /// that. All else that is left ends by itself, and the report lists it. Zero: waits for nothing. A second call has
    /// a grace of its own; what the first one aborted may be gone when the second one reports.
    #[track_caller]
    pub fn close(&self, grace: Duration) -> CloseReport {
        let closer = Closer::new("`close` was called", Location::caller(), grace);
        close(self.shared(), closer)
    }
}

/// What `close` has done, and what is left.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CloseReport {
    /// The name of the pool.
    pub pool: String,
    /// How long the call took.
    pub elapsed: Duration,
    /// How many callers waited for a connection, and were told that the pool is closed.
    pub waiters: u32,
    /// Connections that are not closed yet: still in use, or in a job that has not ended.
    pub left: Connections,
    /// The numbers of those among them that were aborted when the grace was over.
    pub aborted: Vec<u64>,
    /// Jobs that had been abandoned before and have not ended.
    pub abandoned: u32,
    /// Threads of the pool that have not ended: each is in a call of the manager, a hook or the logger.
    pub threads: usize,
    /// Whether the workers that a guard owned have finished; `true` if it owned none.
    pub workers_finished: bool,
    /// This process was forked from the one that built the pool.
    forked: bool,
}

impl CloseReport {
    /// The report in a forked child, in which nothing is done.
    fn of_another_process(pool: String, elapsed: Duration) -> Self {
        let left = Connections::default();
        let (waiters, abandoned, threads) = (0, 0, 0);
        CloseReport {
            pool,
            elapsed,
            waiters,
            left,
            aborted: Vec::new(),
            abandoned,
            threads,
            workers_finished: false,
            forked: true,
        }
    }

    /// Whether nothing is left: no connection, no thread, no worker. In a forked child, which cannot close its parent's
    /// pool: `false`.
    pub fn is_complete(&self) -> bool {
        !self.forked && self.left.is_empty() && self.abandoned == 0 && self.threads == 0 && self.workers_finished
    }
}

impl fmt::Display for CloseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool '{}' {}", Shown(&self.pool), self.outcome())
    }
}

impl CloseReport {
    /// The text after the pool's name, which a log record has by itself.
    fn outcome(&self) -> impl fmt::Display + '_ {
        struct Outcome<'a>(&'a CloseReport);
        impl fmt::Display for Outcome<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let report = self.0;
                if report.forked {
                    return f.write_str("is another process's, of which this one is a fork: nothing was done");
                }
                let how = if report.is_complete() { "closed in" } else { "not wholly closed after" };
                write!(f, "{how} {}", Short(report.elapsed))?;
                if report.waiters > 0 {
                    write!(f, "; waiters told so: {}", report.waiters)?;
                }
                if report.is_complete() {
                    return write!(f, "; nothing is left");
                }
                if !report.workers_finished {
                    write!(f, "; workers still run")?;
                }
                if report.abandoned > 0 {
                    write!(f, "; jobs abandoned before and not back: {}", report.abandoned)?;
                }
                if report.threads > 0 {
                    write!(f, "; threads that have not ended: {}", report.threads)?;
                }
                for (i, row) in report.left.iter().enumerate() {
                    let aborted = if report.aborted.contains(&row.id) { " (aborted)" } else { "" };
                    write!(f, "{}{row}{aborted}", if i == 0 { "; left: " } else { ", " })?;
                }
                Ok(())
            }
        }
        Outcome(self)
    }
}

/// How long `close` waits, even past its grace, for its report to reach the log and its cancels to reach the server: the
/// process may end right after it.
const LAST_GRACE: Duration = Duration::from_millis(20);
/// ... and so much longer for each cancel, which is a connect of its own.
const GRACE_OF_CANCEL: Duration = Duration::from_millis(2);

/// Who closes the pool, from where, and with which grace.
pub(crate) struct Closer {
    pub(crate) by: &'static str,
    pub(crate) at: &'static Location<'static>,
    pub(crate) begun: Instant,
    pub(crate) grace: Duration,
    /// Whether the workers of a guard have finished. They had a part of the grace for it.
    pub(crate) workers_finished: bool,
    /// Whether an earlier wait that ended at its deadline counts against the grace.
    pub(crate) joins: bool,
}

impl Closer {
    pub(crate) fn new(by: &'static str, at: &'static Location<'static>, grace: Duration) -> Self {
        Closer { by, at, begun: Instant::now(), grace, workers_finished: true, joins: false }
    }
}

/// A thread that is in `close`. It is entered in the pool's list of such threads until this is dropped.
struct Entered<'a, M: Manage> {
    shared: &'a Arc<Shared<M>>,
    /// `None`: this thread is not within a call that the pool makes, and is not in the list.
    within: Option<Within>,
}

impl<'a, M: Manage> Entered<'a, M> {
    fn new(shared: &'a Arc<Shared<M>>) -> Self {
        let (on_the_executor, in_hand) = in_hand::of(shared.address());
        let within = Within { on_the_executor, in_hand };
        if !on_the_executor && within.in_hand.is_empty() {
            return Entered { shared, within: None };
        }
        shared.life.within.lock().push(within.clone());
        // The threads in the list no longer wait for what this one has in hand.
        shared.changed.notify();
        Entered { shared, within: Some(within) }
    }

    fn on_the_executor(&self) -> bool {
        self.within.as_ref().is_some_and(|within| within.on_the_executor)
    }

    /// What this thread does not wait for: the numbers of connections, and how many threads of the executor.
    fn not_waited_for(&self) -> (Vec<u64>, usize) {
        if self.within.is_none() {
            return (Vec::new(), 0);
        }
        let all = self.shared.life.within.lock();
        let threads = all.iter().filter(|one| one.on_the_executor).count();
        (all.iter().flat_map(|one| one.in_hand.iter().copied()).collect(), threads)
    }
}

impl<M: Manage> Drop for Entered<'_, M> {
    fn drop(&mut self) {
        if let Some(within) = &self.within {
            let mut all = self.shared.life.within.lock();
            let at = all.iter().position(|one| one == within);
            at.map(|at| all.swap_remove(at));
        }
    }
}

/// Closes the pool, waits until the deadline for its connections and threads, and reports.
fn close<M: Manage>(shared: &Arc<Shared<M>>, closer: Closer) -> CloseReport {
    let Closer { by, at, begun, grace, workers_finished, joins } = closer;
    if shared.is_forked() {
        return CloseReport::of_another_process(shared.name.to_string(), begun.elapsed());
    }
    let waiters = shared.end(by, Some(at));
    let since = shared.time.precise();
    // (An abandoned job of this very thread has no slot any longer.)
    let mine = Entered::new(shared);
    let my_thread = usize::from(mine.on_the_executor());
    let deadline = begun.checked_add(grace);

    let is_over = |vain: Option<&VainWait>| {
        let threads = shared.executor.threads();
        let (in_hand, my_threads) = mine.not_waited_for();
        let ledger = shared.lock();
        let skipped = |slot: &Slot| in_hand.contains(&slot.id) || vain.is_some_and(|vain| slot.since <= vain.since);
        let others = ledger.slots().any(|slot| !skipped(slot));
        // The reaper stays as long as a job has a limit, or this thread validates a connection.
        let at_work = ledger.slots().any(|slot| skipped(slot) && slot.as_seen() != ConnectionState::InUse);
        let reaper = shared.reaper.runs() && !at_work;
        (!others && !reaper && threads <= my_threads + vain.map_or(0, |vain| vain.threads)).then_some(threads)
    };
    let vain = shared.life.vain.lock().clone();
    let threads = match vain.as_ref().filter(|_| joins) {
        None => shared.watch(deadline, || is_over(None)),
        Some(vain) => {
            let early = begun.checked_add(grace.saturating_sub(vain.waited));
            shared.watch(early, || is_over(None)).or_else(|| shared.watch(deadline, || is_over(Some(vain))))
        }
    };
    let abandoned = shared.counts().abandoned;
    // Counted at the look that ended the wait, since another closer may have logged since then, and its thread is none
    // that was waited for. After a wait in vain counted now, before threads are started to abort.
    let threads = threads.unwrap_or_else(|| shared.executor.threads()).saturating_sub(my_thread);

    let left = Connections(shared.describe(shared.slots(|_| true)));
    let over = deadline.is_some_and(|at| Instant::now() >= at);
    let mut aborted = vain.as_ref().map_or(Vec::new(), |vain| vain.aborted.clone());
    aborted.retain(|id| left.iter().any(|row| row.id == *id));
    let mut awaited = false;
    if over {
        sometimes!(!left.is_empty(), "a grace is over and something is left");
        for row in left.iter() {
            let in_use = row.state == ConnectionState::InUse;
            if shared.abort(row.id, in_use) {
                awaited = true;
                if !aborted.contains(&row.id) {
                    aborted.push(row.id);
                }
            }
        }
        let now = shared.time.precise();
        shared.with(|l| l.abandon_opens(now));
        let (since, waited) = vain.map_or((since, grace), |vain| (vain.since, vain.waited.max(grace)));
        *shared.life.vain.lock() = Some(VainWait { since, waited, threads, aborted: aborted.clone() });
    }
    let mut report = CloseReport {
        pool: shared.name.to_string(),
        elapsed: begun.elapsed(),
        waiters,
        left,
        aborted,
        abandoned,
        threads,
        workers_finished,
        forked: false,
    };
    let level = if report.is_complete() { Level::Info } else { Level::Warn };
    if level <= log::max_level() {
        shared.record(level, || report.outcome().to_string());
        awaited = true;
    }
    if awaited {
        // (Not by the number of threads: those that have nothing to do leave at the same time.)
        let until = Instant::now() + LAST_GRACE + GRACE_OF_CANCEL * report.aborted.len() as u32;
        shared.watch(Some(until), || (!shared.executor.is_at_work(&[Kind::Abort, Kind::Record])).then_some(()));
    }
    report.elapsed = begun.elapsed();
    report
}

/// A pool as a guard has it, which does not know the manager's type.
pub(crate) trait Close: Send + Sync {
    fn name(&self) -> &str;
    fn is_forked(&self) -> bool;
    fn close_by(&self, closer: Closer) -> CloseReport;
}

impl<M: Manage> Close for Pool<M> {
    fn name(&self) -> &str {
        Pool::name(self)
    }

    fn is_forked(&self) -> bool {
        self.shared().is_forked()
    }

    fn close_by(&self, closer: Closer) -> CloseReport {
        close(self.shared(), closer)
    }
}
