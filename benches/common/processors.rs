//! What is done about the processors, so that all who are compared meet the same ones in the same state. On Linux; elsewhere
//! the system decides, and no processor time is told.

use std::time::Duration;

#[cfg(target_os = "linux")]
mod system {
    use super::Duration;
    use rustix::process::setpriority_process;
    use rustix::thread::{CpuSet, gettid, sched_getaffinity, sched_setaffinity};
    use rustix::time::{ClockId, clock_gettime};
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, OnceLock};
    use std::thread::{self, JoinHandle};

    /// Those that this process may use. Asked before any thread is pinned, for a pinned thread has only one.
    fn allowed() -> &'static [usize] {
        static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
        ALLOWED.get_or_init(|| {
            let set = sched_getaffinity(Some(rustix::process::getpid())).unwrap_or_default();
            (0..CpuSet::MAX_CPU).filter(|&i| set.is_set(i)).collect()
        })
    }

    pub fn pin(worker: usize) {
        let allowed = allowed();
        if let Some(&processor) = allowed.get(worker % allowed.len().max(1)) {
            let mut set = CpuSet::new();
            set.set(processor);
            // Where that is forbidden, all do without.
            let _ = sched_setaffinity(None, &set);
        }
    }

    pub fn processor_time() -> Duration {
        let t = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }

    /// See [`super::keep_awake`].
    #[must_use = "the processors may sleep again once it is dropped"]
    #[derive(Debug)]
    pub struct Awake {
        stop: Arc<AtomicBool>,
        spinners: Vec<JoinHandle<()>>,
    }

    pub fn keep_awake() -> Awake {
        let stop = Arc::new(AtomicBool::new(false));
        let spinner = |worker| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                pin(worker);
                if stand_back() {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                }
            })
        };
        let spinners = (0..allowed().len()).map(spinner).collect();
        Awake { stop, spinners }
    }

    /// Has this thread run only where no other wants to. There is no safe call for the system's class for that, but a
    /// program; without it the lowest priority has to do. Whether one of them worked.
    fn stand_back() -> bool {
        let me = gettid();
        let by_program = Command::new("chrt")
            .args(["--idle", "--pid", "0", &me.as_raw_nonzero().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        by_program.is_ok_and(|status| status.success()) || setpriority_process(Some(me), 19).is_ok()
    }

    impl Drop for Awake {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            for spinner in self.spinners.drain(..) {
                spinner.join().expect("a spinner");
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::Duration;

    pub fn pin(_: usize) {}

    pub fn processor_time() -> Duration {
        Duration::ZERO
    }

    /// See [`super::keep_awake`].
    #[derive(Debug)]
    pub struct Awake;

    pub fn keep_awake() -> Awake {
        Awake
    }
}

pub use system::Awake;

/// From now on this thread runs on one processor only: the allowed ones are dealt out by the workers' numbers, so that in
/// each round a worker of any rival has the one that its like has. What this thread starts inherits it; the pools have
/// started their threads before.
pub fn pin(worker: usize) {
    system::pin(worker);
}

/// How long this thread has run. Zero where that is not known.
pub fn processor_time() -> Duration {
    system::processor_time()
}

/// Keeps all processors awake, by a thread on each that spins when nobody else wants to run. Without it a query has two
/// speeds, for whole seconds at a time: a processor that falls asleep between a question and its answer takes several
/// times as long as the question to wake up, and whether it does depends on who else uses the machine.
pub fn keep_awake() -> Awake {
    system::keep_awake()
}
