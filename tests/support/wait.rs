//! Waiting for facts outside this process, and looking at the threads inside it.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The slack of every assertion on real time: what the scheduler of a loaded two-core machine may cost.
pub const EPSILON: Duration = Duration::from_millis(50);

/// Within what time the server shows what is due in the pool at a moment: [`EPSILON`] until the pool begins with it, and
/// the rest for the crew, the network and the server's own processes, which get no processor at once on a busy machine,
/// to see it through.
pub const SEEN: Duration = EPSILON.saturating_mul(4);

/// Short enough to see what happened within [`EPSILON`], long enough to leave the machine to what is being watched.
pub(super) const STEP: Duration = Duration::from_millis(5);

/// `ms(200)` reads better in a test than its long form.
pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Waits until `fact` holds, and says whether it did before the deadline. It is asked at least once.
///
/// For facts that nobody can wake us for: what the server sees, what the system counts. What happens inside this
/// process has a channel or a condition variable.
#[must_use = "a fact that never came true must fail the test"]
pub fn wait_until(deadline: Instant, mut fact: impl FnMut() -> bool) -> bool {
    loop {
        if fact() {
            return true;
        }
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        thread::sleep(STEP.min(deadline - now));
    }
}

/// For a load that keeps its own time, and for looking at what lies ahead.
pub fn sleep_until(at: Instant) {
    thread::sleep(at.saturating_duration_since(Instant::now()));
}

/// The tests of one process run side by side and share the machine.
static MACHINE: RwLock<()> = RwLock::new(());

/// While this is held no other test that asks has the machine: for one that loads it, or that a load would disturb.
#[must_use = "a lock that is not bound to a name is released at once"]
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write()
}

/// While this is held no test is [`alone`]: for one that asserts on time, and mostly sleeps.
#[must_use = "a lock that is not bound to a name is released at once"]
pub fn beside_others() -> RwLockReadGuard<'static, ()> {
    MACHINE.read()
}

/// The names of this process's live threads that begin with `prefix`. The system keeps 15 bytes of a name.
///
/// # Panics
///
/// Where there is no `/proc` to ask.
pub fn threads_named(prefix: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("threads are listed in /proc, on Linux only");
    let mut names: Vec<String> = tasks
        // A thread that ends while the list is read has no name any more.
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort();
    names
}

/// Runs a test [`alone`], on a thread of its own, and fails if it does not end: for what could deadlock.
///
/// A thread that hangs stays behind, with all that it holds.
#[track_caller]
pub fn watched(test: impl FnOnce() + Send + 'static) {
    /// Longer than all that a test waits for.
    const PATIENCE: Duration = Duration::from_secs(60);

    let _alone = alone();
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let name = thread::current().name().unwrap_or("test").to_owned();
    let test = thread::Builder::new().name(name).spawn(move || {
        let _done = done;
        test();
    });
    if ended.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
        panic!("it hangs");
    }
    if let Err(panic) = test.expect("a thread for the test").join() {
        std::panic::resume_unwind(panic);
    }
}

/// Says that a test was not made, and why, past the harness, which shows the output of failed tests only.
pub fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
