//! What every test, bench and example stands on: a private PostgreSQL, a faulty network, and waiting for facts.
//!
//! Included with `mod support;` by tests and with `#[path = "../tests/support/mod.rs"] mod support;` by benches and
//! examples. It knows PostgreSQL and nothing of millpond, so that it cannot share a mistake with what it looks at.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "compiled into each test, bench and example on its own, none of which uses all of it"
)]

mod again;
mod bouncer;
mod database;
mod heart;
mod log;
#[cfg(target_os = "linux")]
mod netns;
pub mod picky;
mod process;
pub mod programs;
mod proxy;
mod server;
mod wait;
mod watch;

pub use again::Again;
pub use bouncer::{Bouncer, PoolMode};
pub use database::{Backend, Database};
pub use heart::{Heart, Stops};
pub use log::{Capture, Logged, capture, logged};
#[cfg(target_os = "linux")]
pub use netns::{Cable, Namespace};
pub use process::Stopped;
pub use proxy::{End, Fault, Proxy, Silent};
pub use server::{Server, listen};
pub use wait::{
    EPSILON, SEEN, SOON, alone, assert_no_threads, assert_no_threads_of, beside_others, in_a_process, ms, skipped,
    slack, sleep_until, threads_named, wait_until, watched, watched_alone, within,
};
pub use watch::{History, Sample, Watch};
