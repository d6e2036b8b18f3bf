//! The reaper: the thread that keeps time, and does nothing else.
//!
//! It sleeps until the ledger's alarm, has the ledger do what is due, and posts what comes of it to the crew. It runs
//! no manager's code, no hook, no log record and no drop of a connection, so nothing of that can stop the clock.

use crate::leaf::threads::thread_name;
use crate::manage::Manage;
use crate::runtime::defect;
use crate::runtime::shared::Shared;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, thread};

/// How soon to try again to start a thread that could not be started, or to keep time after a panic.
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
        // A panic in here is a defect of the pool's. It costs what was being done, not the clock.
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| keep_time(&reaper))) {
            defect::tell(&reaper, "the reaper", panic);
            // What panics each time does not take a whole processor.
            thread::sleep(RETRY);
        }
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
        #[cfg(test)]
        tests::strike();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doc_manager::DocManager;
    use crate::{Pool, Validate};
    use parking_lot::Mutex;
    use std::process::{Command, Output};
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    static STRIKE: AtomicBool = AtomicBool::new(false);

    /// Panics once when it is told to.
    pub(super) fn strike() {
        if STRIKE.swap(false, Ordering::SeqCst) {
            panic!("a defect on purpose");
        }
    }

    /// A process of its own, for what ends one, and for the pool of which the reaper panics to be the only one.
    fn pool_whose_reaper_panics(aborts: bool) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let module = module_path!().split_once("::").unwrap().1;
        command.args(["--exact", &format!("{module}::its_reaper_panics"), "--ignored"]).env("RUST_BACKTRACE", "0");
        match aborts {
            true => command.env("MILLPOND_ABORT_ON_DEFECT", "1"),
            false => command.env_remove("MILLPOND_ABORT_ON_DEFECT"),
        };
        command.output().unwrap()
    }

    struct Log(Mutex<Vec<String>>);

    impl log::Log for Log {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().push(format!("{} {}", record.level(), record.args()));
        }

        fn flush(&self) {}
    }

    static LOG: Log = Log(Mutex::new(Vec::new()));

    #[test]
    #[ignore = "a part of the others, in a process of its own"]
    fn its_reaper_panics() {
        log::set_logger(&LOG).unwrap();
        log::set_max_level(log::LevelFilter::Error);
        let pool =
            Pool::builder().name("p").max_idle(Duration::from_millis(100)).validate(Validate::Never).build(DocManager);
        let pool = pool.unwrap();
        drop(pool.get().unwrap());
        STRIKE.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(20);
        while pool.stats().size() > 0 || STRIKE.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "nothing is evicted any more");
            thread::sleep(Duration::from_millis(5));
        }
        assert!(pool.close(Duration::from_secs(20)).is_complete());
        let told = "ERROR pool 'p': the reaper panicked, a defect of millpond's: a defect on purpose";
        assert_eq!(*LOG.0.lock(), [told]);
    }

    #[test]
    fn a_panic_does_not_stop_the_clock() {
        let output = pool_whose_reaper_panics(false);
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    }

    #[test]
    fn a_panic_ends_what_cargo_runs_in_this_repository() {
        assert!(std::env::var_os("MILLPOND_ABORT_ON_DEFECT").is_some(), "see .cargo/config.toml");
        let output = pool_whose_reaper_panics(true);
        assert!(!output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("the reaper panicked: a defect on purpose"), "{text}");
    }
}
