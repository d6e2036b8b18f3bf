//! What the pool's sources use in place of threads, locks and clock when they run in a model.
//!
//! All threads of an execution are tasks of `shuttle` on one thread of the system, in an order that its scheduler
//! chooses. Time is a number. It moves when the clock's task runs: to the next moment at which somebody wakes. While the
//! scheduler keeps the clock's task back until every other task waits, time stands still for those that run, and a wait
//! with a deadline ends exactly at it. Where the scheduler lets the clock run earlier, threads are slow, as on a busy
//! machine.
//!
//! The names and types are those of the standard library, `parking_lot` and `crossbeam-channel`, as far as the pool uses
//! them.

#![allow(missing_debug_implementations, unreachable_pub, reason = "no user sees it")]

pub mod channel;
pub mod local;
pub mod lock;
pub mod thread;
pub mod time;

pub use time::{World, begin, end, world};

/// Notes that this line was reached, for the simulator's list of what a run must have met.
#[track_caller]
pub fn sometimes(what: &'static str) {
    time::with(|world| *world.sometimes.entry(what).or_default() += 1);
}
