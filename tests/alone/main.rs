//! What must not share its process: tests that measure the processor time, the memory or the threads of the process,
//! that fork it, or that set its logger or its panic hook. A test that loads the machine, or that a load would disturb,
//! holds
//! `alone()`; those that mostly sleep, or start a process of their own that does, hold `beside_others()`.

#[path = "../direct/mod.rs"]
mod direct;
#[path = "../fake/mod.rs"]
mod fake;
#[path = "../support/mod.rs"]
mod support;

mod allocations;
mod burn;
mod crowd;
#[cfg(target_os = "linux")]
mod fork;
#[cfg(target_os = "linux")]
mod many;
#[cfg(target_os = "linux")]
mod process;
mod quiet;
mod reentrant;
mod stress;
mod waits;
