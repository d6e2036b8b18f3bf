//! Other processes: stopping them for a while, and seeing what they do.

use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::wait::{SOON, wait_until};

/// Processes that are stopped, as by Ctrl-Z, and go on when this is dropped.
#[must_use = "they go on when it is dropped"]
#[derive(Default)]
pub struct Stopped(Vec<Pid>);

impl Stopped {
    /// Returns when each of their threads stands still: after the signal alone they go on for a while, the longer the
    /// busier the machine is, and a thread may still answer.
    ///
    /// # Panics
    ///
    /// If there is no such process.
    #[track_caller]
    pub fn stop(pids: impl IntoIterator<Item = Pid>) -> Stopped {
        let mut stopped = Stopped::default();
        for pid in pids {
            kill_process(pid, Signal::STOP).expect("a process of our own");
            stopped.0.push(pid);
        }
        let stand_still = wait_until(Instant::now() + SOON, || stopped.0.iter().all(|&pid| stands_still(pid)));
        assert!(stand_still, "they run after SIGSTOP: {:?}", stopped.0);
        stopped
    }

    /// By the numbers that a server says.
    ///
    /// # Panics
    ///
    /// As [`stop`](Stopped::stop), and if one is no process's number.
    #[track_caller]
    pub fn stop_numbers(pids: impl IntoIterator<Item = i32>) -> Stopped {
        Stopped::stop(pids.into_iter().map(|pid| Pid::from_raw(pid).expect("a process's number")))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for &pid in &self.0 {
            // It may be gone.
            let _ = kill_process(pid, Signal::CONT);
        }
    }
}

/// Linux tells who is whose child in `/proc`; a bare Debian has no `ps`.
#[cfg(target_os = "linux")]
pub(super) fn children_of(parent: u32) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    pids.filter(|&pid| stat(&own_stat(pid)).is_some_and(|(_, of)| of == parent)).collect()
}

#[cfg(target_os = "linux")]
pub(super) fn is_alive(pid: Pid) -> bool {
    // A zombie is a matter between it and its parent.
    stat(&own_stat(pid)).is_some_and(|(state, _)| state != "Z" && state != "X")
}

/// Whether no thread of it runs: all are stopped, or it has ended.
#[cfg(target_os = "linux")]
pub(super) fn stands_still(pid: Pid) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else { return true };
    let states = threads.flatten().filter_map(|thread| stat(thread.path().join("stat").to_str()?));
    states.into_iter().all(|(state, _)| ["T", "Z", "X"].contains(&state.as_str()))
}

#[cfg(target_os = "linux")]
fn own_stat(pid: Pid) -> String {
    format!("/proc/{}/stat", pid.as_raw_nonzero())
}

/// A process's or thread's state and its process's parent.
#[cfg(target_os = "linux")]
fn stat(file: &str) -> Option<(String, u32)> {
    let stat = std::fs::read_to_string(file).ok()?;
    // The name before it, in brackets, may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn children_of(parent: u32) -> Vec<Pid> {
    let output = std::process::Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output().expect("ps");
    let lines = String::from_utf8_lossy(&output.stdout);
    let pairs = lines.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace();
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse::<u32>().ok()?))
    });
    pairs.filter(|&(_, of)| of == parent).filter_map(|(pid, _)| Pid::from_raw(pid)).collect()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn is_alive(pid: Pid) -> bool {
    rustix::process::test_kill_process(pid).is_ok()
}

/// Not to be told here.
#[cfg(not(target_os = "linux"))]
pub(super) fn stands_still(_: Pid) -> bool {
    true
}
