//! The reaper: the thread that keeps time, and does nothing else.
//!
//! The reaper sleeps until the ledger's alarm, and then has the ledger decide what is due. It runs no code of a
//! manager, no hook, no log record and no drop of a connection, so none of these can delay an eviction.

use crate::leaf::sync::atomic::{AtomicBool, Ordering};
use crate::leaf::sync::{Instant, sometimes, thread, thread_local};
use crate::leaf::threads::thread_name;
use crate::runtime::event_count::EventCount;
use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// How soon the reaper tries again: to start a thread that could not be started, or to keep time after a panic. Soon
/// enough for a waiter, and rare enough to cost nothing.
const RETRY: Duration = Duration::from_millis(50);

thread_local! {
    /// On a reaper's thread: the address of that reaper.
    static THIS: Cell<usize> = const { Cell::new(0) };
}

/// The reaper of one pool, whether its thread runs or not.
pub(crate) struct Reaper {
    alarm: EventCount,
    runs: AtomicBool,
}

/// The pool that a reaper keeps time for.
pub(crate) trait Timed: Send + Sync + 'static {
    fn reaper(&self) -> &Reaper;

    /// For the name of the thread.
    fn name(&self) -> &str;

    /// Does what is due. `stays`: the reaper has a backlog to run, and must not end.
    fn keep_time(self: &Arc<Self>, stays: bool) -> Next;

    /// Tries again to start threads for the jobs in the backlog. Whether none is left that lacks a thread.
    fn run_backlog(self: &Arc<Self>) -> bool;

    /// The reaper has panicked: a defect.
    fn panicked(self: &Arc<Self>, panic: &(dyn Any + Send));

    /// The thread ends.
    fn ended(&self);

    /// The thread was to start anew after its end, and could not. Does what cannot wait for another.
    fn lacks_reaper(self: &Arc<Self>);
}

/// What the reaper does next.
pub(crate) enum Next {
    /// Something was due: the reaper looks again.
    Look,
    /// The reaper sleeps until this instant; `None`: until it is woken.
    Sleep(Option<Instant>),
    /// The reaper ends: nothing will be due any longer. [`Reaper::ends`] was called under the ledger's lock.
    End,
}

impl Reaper {
    pub(crate) fn new() -> Self {
        Reaper { alarm: EventCount::new(), runs: AtomicBool::new(false) }
    }

    /// Whether there is a thread that keeps time.
    pub(crate) fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }

    /// The thread is about to end. Called under the ledger's lock, so that the next step of the ledger that needs the
    /// reaper sees it and starts it anew.
    pub(crate) fn ends(&self) {
        self.runs.store(false, Ordering::SeqCst);
    }

    /// Whether this is the reaper's thread.
    pub(crate) fn is_this_thread(&self) -> bool {
        THIS.get() == self.address()
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Starts the thread.
    pub(crate) fn start<H: Timed>(host: &Arc<H>) -> io::Result<()> {
        host.reaper().runs.store(true, Ordering::SeqCst);
        let for_thread = Arc::clone(host);
        let started = thread::Builder::new().name(thread_name(host.name(), "-reaper")).spawn(move || {
            let host = for_thread;
            THIS.set(host.reaper().address());
            // A panic in here is a defect of the pool. The reaper goes on after it.
            while let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&host))) {
                host.panicked(&*panic);
                crate::leaf::shield::drop_payload(panic);
                // If every look panics, the reaper does not take up a whole processor.
                thread::sleep(RETRY);
            }
            host.ended();
        });
        if started.is_err() {
            host.reaper().ends();
        }
        started.map(drop)
    }

    /// Has the reaper look again, since the alarm was set to an earlier time. Starts its thread anew if that has ended:
    /// the pool is closed, and a connection was returned late.
    pub(crate) fn wake<H: Timed>(host: &Arc<H>, may_start: impl FnOnce() -> bool) {
        let reaper = host.reaper();
        if reaper.runs() {
            reaper.alarm.notify();
        } else if may_start() && !reaper.runs.swap(true, Ordering::SeqCst) {
            sometimes!("the reaper is started anew for a late return");
            if Reaper::start(host).is_err() {
                host.lacks_reaper();
            }
        }
    }
}

/// Keeps time until nothing will be due any longer.
fn run<H: Timed>(host: &Arc<H>) {
    let alarm = &host.reaper().alarm;
    // Whether the backlog has jobs for which no thread could be started.
    let mut backlog = false;
    loop {
        // Read before the look, so that no change after it is missed.
        let seen = alarm.count();
        #[cfg(test)]
        tests::strike();
        match host.keep_time(backlog) {
            Next::End => return,
            Next::Look => backlog = !host.run_backlog(),
            Next::Sleep(until) => {
                let soon = backlog.then(|| Instant::now() + RETRY);
                alarm.wait(seen, until.into_iter().chain(soon).min());
                if backlog {
                    backlog = !host.run_backlog();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
