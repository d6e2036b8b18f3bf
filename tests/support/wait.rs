//! Waiting for facts outside this process, and looking at the threads inside it.

use std::thread;
use std::time::{Duration, Instant};

/// The slack of every assertion on real time: what the scheduler of a loaded two-core machine may cost.
pub const EPSILON: Duration = Duration::from_millis(50);

/// Short enough to see what happened within [`EPSILON`], long enough to leave the machine to what is being watched.
const STEP: Duration = Duration::from_millis(5);

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
