//! What must not share its process: tests that measure the processor time, the memory or the threads of the process, that
//! fork it, or that set its logger or its panic hook. Each holds `alone()`, so that they run one after the other.

#[path = "../direct/mod.rs"]
mod direct;
#[path = "../fake/mod.rs"]
mod fake;
#[path = "../support/mod.rs"]
mod support;

mod burn;
#[cfg(target_os = "linux")]
mod fork;
mod hard_use_still;
#[cfg(target_os = "linux")]
mod hard_use_too;
mod quiet;
mod reentrant;
mod stress;
