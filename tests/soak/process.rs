//! What this process has only so much of.

use std::fs;

/// Threads, file descriptors and memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) threads: usize,
    pub(crate) files: usize,
    /// Memory of its own, not that of files such as its program, in kB.
    pub(crate) resident: u64,
}

impl Process {
    pub(crate) fn now() -> Process {
        let entries = |folder: &str| fs::read_dir(folder).expect("/proc").count();
        let status = fs::read_to_string("/proc/self/status").expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("the resident memory");
        let resident = line.trim_end_matches("kB").trim().parse().expect("a number");
        Process { threads: entries("/proc/self/task"), files: entries("/proc/self/fd"), resident }
    }
}
