//! The reaper: the thread that keeps time, and does nothing else.
//!
//! It sleeps until the ledger's alarm, has the ledger do what is due, and posts what comes of it to the crew. It runs
//! no manager's code, no hook, no log record and no drop of a connection, so nothing of that can stop the clock.

use crate::crew::thread_name;
use crate::manage::Manage;
use crate::shared::Shared;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, thread};

/// How soon to try again to start a thread that could not be started.
const RETRY: Duration = Duration::from_millis(50);

thread_local! {
    /// On a reaper: which pool's, by the address of its `Shared`.
    static REAPER: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread is `shared`'s reaper.
pub(crate) fn is_this<M: Manage>(shared: &Arc<Shared<M>>) -> bool {
    REAPER.get() == Arc::as_ptr(shared) as usize
}

/// Starts the thread.
pub(crate) fn start<M: Manage>(shared: &Arc<Shared<M>>) -> io::Result<()> {
    shared.reaper_lives.store(true, Ordering::SeqCst);
    let reaper = Arc::clone(shared);
    let started = thread::Builder::new().name(thread_name(&shared.name, "-reaper")).spawn(move || {
        REAPER.set(Arc::as_ptr(&reaper) as usize);
        // A panic in here is a defect of the ledger's. It costs what was being done, not the clock.
        while catch_unwind(AssertUnwindSafe(|| keep_time(&reaper))).is_err() {}
        reaper.changed.ring();
    });
    if started.is_err() {
        shared.reaper_lives.store(false, Ordering::SeqCst);
    }
    started.map(drop)
}

/// Has it look again: the alarm was set to an earlier time. Starts it anew if it had left (the pool is closed, and a
/// connection came back late).
pub(crate) fn wake<M: Manage>(shared: &Arc<Shared<M>>) {
    if shared.reaper_lives.load(Ordering::SeqCst) {
        shared.alarm.ring();
    } else if !shared.is_forked() && !shared.reaper_lives.swap(true, Ordering::SeqCst) {
        // Without it the close of that connection has no limit; there is nobody left to wait for it.
        let _ = start(shared);
    }
}

/// Until the pool is closed and nothing that runs has a limit any longer.
fn keep_time<M: Manage>(shared: &Arc<Shared<M>>) {
    let mut stranded = false;
    loop {
        // Before the look: a ring after it is heard.
        let heard = shared.alarm.count();
        // Both before the lock, under which nothing but the ledger runs.
        let (now, chance) = (shared.clock.precise(), shared.chance());
        let mut ledger = shared.lock();
        if ledger.is_over() && !stranded {
            // Under the lock: whoever needs it from now on sees that it is gone.
            shared.reaper_lives.store(false, Ordering::SeqCst);
            return;
        }
        if ledger.alarm() <= now {
            ledger.reap(now, chance);
            shared.settle(ledger);
            stranded = !shared.crew.nudge(shared);
            continue;
        }
        // Until the alarm, or, if there are jobs that no thread could be started for, to try that again.
        let until = shared.clock.instant(ledger.alarm());
        let soon = stranded.then(|| std::time::Instant::now() + RETRY);
        drop(ledger);
        shared.alarm.wait(heard, until.into_iter().chain(soon).min());
        if stranded {
            stranded = !shared.crew.nudge(shared);
        }
    }
}
