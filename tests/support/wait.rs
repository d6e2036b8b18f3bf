//! Waiting for facts outside this process, and looking at the threads inside it.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::heart::Heart;

/// The slack of every assertion on real time: what the scheduler of a loaded two-core machine may cost. See [`slack`].
pub const EPSILON: Duration = Duration::from_millis(50);

/// Within what time the server shows what is due in the pool at a moment: [`EPSILON`] until the pool begins with it,
/// and the rest for the executor, the network and the server's own processes, which get no processor at once on a busy
/// machine, to see it through.
pub const SEEN: Duration = EPSILON.saturating_mul(4);

/// Short enough to see what happened within [`EPSILON`], long enough to leave the machine to what is being watched.
pub(super) const STEP: Duration = Duration::from_millis(5);

/// `ms(200)` reads better in a test than its long form.
pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Within what time everything happens that happens at all: for what is due, where its time is not what is measured.
pub const SOON: Duration = Duration::from_secs(20);

/// The moment when this time is over.
pub fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

/// [`EPSILON`], and for how long the machine stood still lately, as a [`Heart`] saw it: what was due then is late, and no
/// pool can help it.
pub fn slack() -> Duration {
    /// Longer than what most tests measure.
    const LATELY: Duration = Duration::from_secs(5);
    Instant::now().checked_sub(LATELY).map_or(EPSILON, |lately| EPSILON + stood_still_since(lately))
}

/// For how long the machine stood still since then.
fn stood_still_since(from: Instant) -> Duration {
    let users = MACHINE.users.lock();
    users.heart.as_ref().map_or(Duration::ZERO, |heart| heart.stood_still_since(from))
}

/// Waits until `fact` holds, and says whether it did before the deadline. It is asked at least once. While the machine
/// stands still the deadline waits as well, as in [`slack`].
///
/// For facts that nobody can wake us for: what the server sees, what the system counts. What happens inside this
/// process has a channel or a condition variable.
#[must_use = "a fact that never came true must fail the test"]
pub fn wait_until(deadline: Instant, mut fact: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        if fact() {
            return true;
        }
        let now = Instant::now();
        if now >= deadline && now >= deadline + stood_still_since(begun) {
            return false;
        }
        thread::sleep(deadline.saturating_duration_since(now).clamp(Duration::from_millis(1), STEP));
    }
}

/// For a load that keeps its own time, and for looking at what lies ahead.
pub fn sleep_until(at: Instant) {
    thread::sleep(at.saturating_duration_since(Instant::now()));
}

/// The tests of one process run side by side and share the machine.
struct Machine {
    users: Mutex<Users>,
    changed: Condvar,
}

struct Users {
    /// It beats while there is one of them.
    heart: Option<Heart>,
    alone: bool,
    beside: usize,
    /// Those who would run beside others. They go first, all of them: what mostly sleeps takes the time of its longest
    /// only if it is not split up by those who run alone.
    wait_beside: usize,
}

static MACHINE: Machine = Machine {
    users: Mutex::new(Users { heart: None, alone: false, beside: 0, wait_beside: 0 }),
    changed: Condvar::new(),
};

/// How many tests run beside each other at most: as many as leave two processors time to be on time.
const BESIDE: usize = 4;

/// A test's part of the machine.
#[must_use = "what is not bound to a name is released at once"]
pub struct Share {
    alone: bool,
}

/// While this is held no other test that asks has the machine: for one that loads it, or that a load would disturb.
pub fn alone() -> Share {
    let mut users = MACHINE.users.lock();
    MACHINE.changed.wait_while(&mut users, |u| u.alone || u.beside + u.wait_beside > 0);
    users.alone = true;
    users.heart.get_or_insert_with(Heart::beat);
    Share { alone: true }
}

/// While this is held no test is [`alone`]: for one that asserts on time, and mostly sleeps.
pub fn beside_others() -> Share {
    let mut users = MACHINE.users.lock();
    users.wait_beside += 1;
    MACHINE.changed.wait_while(&mut users, |u| u.alone || u.beside == BESIDE);
    users.wait_beside -= 1;
    users.beside += 1;
    users.heart.get_or_insert_with(Heart::beat);
    Share { alone: false }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut users = MACHINE.users.lock();
        if self.alone {
            users.alone = false;
        } else {
            users.beside -= 1;
        }
        let heart = if users.beside == 0 { users.heart.take() } else { None };
        MACHINE.changed.notify_all();
        drop(users);
        drop(heart);
    }
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

/// Within [`SEEN`] no thread's name begins with the pool's name and a hyphen.
#[track_caller]
pub fn assert_no_threads(pool: &str) {
    assert_no_threads_of(&[&format!("{pool}-")]);
}

/// Within [`SEEN`] no thread's name begins with one of these.
#[track_caller]
pub fn assert_no_threads_of(prefixes: &[&str]) {
    let mut seen = Vec::new();
    let gone = wait_until(within(SEEN), || {
        seen = prefixes.iter().flat_map(|prefix| threads_named(prefix)).collect();
        seen.is_empty()
    });
    assert!(gone, "threads are left: {seen:?}");
}

/// Runs a test of this program again, in a process of its own, with this in its environment, [`alone`]. `true`: this is
/// that process. What it prints is printed with `--nocapture`.
pub fn in_a_process(test: &str, environment: &[(&str, &str)]) -> bool {
    if std::env::var_os("MILLPOND_TEST_CHILD").is_some() {
        return true;
    }
    let _alone = alone();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env("MILLPOND_TEST_CHILD", "1");
    let output = command.env("RUST_BACKTRACE", "0").envs(environment.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    eprintln!("{text}");
    assert!(output.status.success(), "{:?}: {text}", output.status);
    false
}

/// Runs a test [`beside_others`], on a thread of its own, and fails if it does not end: for what could deadlock.
///
/// A thread that hangs stays behind, with all that it holds.
#[track_caller]
pub fn watched(test: impl FnOnce() + Send + 'static) {
    let _beside = beside_others();
    watch(test);
}

/// As [`watched`], but [`alone`].
#[track_caller]
pub fn watched_alone(test: impl FnOnce() + Send + 'static) {
    let _alone = alone();
    watch(test);
}

#[track_caller]
fn watch(test: impl FnOnce() + Send + 'static) {
    /// Longer than all that a test waits for.
    const PATIENCE: Duration = Duration::from_secs(60);

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
///
/// # Panics
///
/// If no test may be skipped: with `MILLPOND_TESTS_MAY_SKIP=0` in the environment, as the hosted workflow has it.
#[track_caller]
pub fn skipped(test: &str, why: &str) {
    let may = std::env::var("MILLPOND_TESTS_MAY_SKIP").map_or(true, |may| may != "0");
    assert!(may, "{test} cannot be made here, and MILLPOND_TESTS_MAY_SKIP is 0: {why}");
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
