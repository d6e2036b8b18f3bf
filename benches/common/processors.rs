//! What is done about the processors, so that all who are compared meet the same ones in the same state. On Linux; elsewhere
//! the system decides, and no processor time is told.

use std::time::Duration;

#[cfg(target_os = "linux")]
mod system {
    use super::Duration;
    use rustix::process::{Pid, getpid};
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    use rustix::time::{ClockId, clock_gettime};
    use std::sync::OnceLock;

    /// Those that this process may use. Asked before any thread is pinned, for a pinned thread has only one.
    fn allowed() -> &'static [usize] {
        static ALLOWED: OnceLock<Vec<usize>> = OnceLock::new();
        ALLOWED.get_or_init(|| {
            let set = sched_getaffinity(Some(getpid())).unwrap_or_default();
            (0..CpuSet::MAX_CPU).filter(|&i| set.is_set(i)).collect()
        })
    }

    /// The processor of `worker`, or all of them.
    fn set(worker: Option<usize>) -> CpuSet {
        let of = |n: usize| worker.is_none_or(|worker| worker % allowed().len() == n);
        let mut set = CpuSet::new();
        allowed().iter().enumerate().filter(|&(n, _)| of(n)).for_each(|(_, &processor)| set.set(processor));
        set
    }

    pub fn pin(worker: usize) {
        // Where that is forbidden, all do without.
        let _ = sched_setaffinity(None, &set(Some(worker)));
    }

    pub fn pin_process(pid: u32, worker: Option<usize>) {
        let _ = sched_setaffinity(Pid::from_raw(pid as i32), &set(worker));
    }

    pub fn processor_time() -> Duration {
        let t = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::Duration;

    pub fn pin(_: usize) {}

    pub fn pin_process(_: u32, _: Option<usize>) {}

    pub fn processor_time() -> Duration {
        Duration::ZERO
    }
}

/// From now on this thread runs on one processor only: the allowed ones are dealt out by the workers' numbers, so that in
/// each round a worker of any rival has the one that its like has. What this thread starts inherits it; the pools have
/// started their threads before.
pub fn pin(worker: usize) {
    system::pin(worker);
}

/// Has this process, and what it starts from now on, run beside that worker, or anywhere: see [`pin`].
pub fn pin_process(pid: u32, worker: Option<usize>) {
    system::pin_process(pid, worker);
}

/// How long this thread has run. Zero where that is not known.
pub fn processor_time() -> Duration {
    system::processor_time()
}
