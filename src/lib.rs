//! A synchronous, blocking connection pool for threaded servers, above all for PostgreSQL.
//!
//! One worker, one thread, one connection at a time. The pool closes idle and aged connections exactly when it said it
//! would, keeps the deadline of every [`get`](Pool::get), and closes wholly when its [guard](PoolGuard) drops.
//!
//! ```no_run
//! # #[cfg(feature = "postgres")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! let pool = millpond::postgres::builder("host=127.0.0.1 user=app")?
//!     .name("orders")
//!     .max_size(16)
//!     .max_idle(Duration::from_secs(60))
//!     .open()?; // opens one connection, or says why not
//! let _guard = pool.guard(); // closes the pool when main returns or unwinds
//!
//! let mut client = pool.get()?;
//! let row = client.query_one("SELECT 40 + 2", &[])?;
//! println!("{}", row.get::<_, i32>(0));
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "postgres"))]
//! # fn main() {}
//! ```
//!
//! The [guide] has what does not belong to one type: choosing the numbers, shutting down, TLS, migrations, reading the
//! stats, troubleshooting by text, and the names of other pools' settings beside ours.
//!
//! # What it pools
//!
//! Whatever a [`Manage`] manages. Every [`r2d2::ManageConnection`] is a `Manage`, so the managers, customizers and
//! error handlers of r2d2's ecosystem work as they are; [coming_from_r2d2] says what changes. This crate is built on
//! r2d2's traits, not around its pool. `r2d2::Pool` can neither look at its idle connections nor take out any but the
//! newest, cannot close or wake its waiters, evicts no more after one panicking callback, and blocks its callers in
//! `is_valid` and in `drop`.
//!
//! # How it works
//!
//! ```text
//!  callers                             reaper (1 thread)              executor (0..k threads, on demand)
//!  ───────                             ─────────────────              ──────────────────────────────────
//!  get ─► Ledger::take, join           sleeps until the ledger's      everything that can block:
//!         ready │ check │ wait         next alarm                     open, validate, reset, keep alive, close
//!  drop ► Ledger::returned             Ledger::reap ─► orders ──────► (crossbeam-channel)
//!         handed off │ idle │ closed
//!                 └─────────── parking_lot::Mutex<Ledger> ──────────────┘
//! ```
//!
//! * The **ledger** decides and does nothing else. It is a plain value whose methods are told the time and say what is
//!   to be done. It has no clock, lock, thread, I/O or randomness in it, so all rules of the pool stand in one place
//!   and are tested on virtual time.
//! * The **reaper** keeps time. It runs no manager's code, no hook, no log record and no drop of a connection, so
//!   none of these can delay an eviction.
//! * The **executor** does what may block. Its threads appear when there is work and leave 5 seconds after the last
//!   job. A job past its limit (`open_timeout`, `validation_timeout`, `close_timeout`) is abandoned: its slot is freed,
//!   its thread replaced, and a connection that it still brings is closed. Before that, a job that takes longer than
//!   usual is not counted on. Beside an open that hangs one more is dialled: after three times the usual time to open,
//!   at least 250 ms, or after 1 s while none has come. Beside a check that has taken 100 ms another one is made. Of
//!   the closes four run side by side, and one more for each that has taken 3 ms, so that closes that hang delay no
//!   other.
//! * **Callers** wait on the pool and on nothing else. They never connect, and never run a connection's drop. A
//!   validation runs on the caller's thread only if the manager promises to [keep its limit](Manage::keeps_limits).
//! * A **waiter** is a caller that waits. It is served under the ledger's lock: at its deadline it is either still
//!   queued, and leaves, or has its connection. Waiters are served in order of arrival. To hand off every returned
//!   connection would make each return a context switch. So a thread that runs may take it first (barge), but only
//!   while the first waiter has waited less than [`fair_after`](Builder::fair_after).
//!
//! Handles ([`Pool`], [`PoolGuard`]) keep the pool open; connections in use and the pool's threads do not.
//!
//! # Times
//!
//! Times are measured with the monotonic clock, which stands still while the machine is suspended. While there is no
//! waiter, a checkout reads the coarse clock (on Linux `CLOCK_MONOTONIC_COARSE`, in steps of a few milliseconds). Its
//! resolution counts against a connection's lifetime, so that no connection is handed out late. Everything the reaper
//! does is timed precisely.
//!
//! # Logging
//!
//! The pool logs through [`log`], with the target `millpond`, from a thread of its own that the logger may block. The
//! opening and closing of a pool, and that it connects again after failures, are logged at info; the opening and closing of
//! each connection (with the reason) at debug; failures, leaks and abandoned jobs at warn.
//!
//! # Features
//!
//! * `postgres` (default): `millpond::postgres`, what a pool can do when it knows that the other side is PostgreSQL.
//! * `diesel`: `millpond::diesel`, a [`PooledConnection`] is a Diesel connection. Needs Rust 1.86, as Diesel 2.3 does.
//! * `prometheus-client`, `metrics`: `millpond::metrics`, a pool's metrics by OpenTelemetry's names, as a collector of the
//!   crate `prometheus-client` or for the recorders of the facade `metrics`.
//!
//! # Limits
//!
//! * After a `fork` the child has none of the pool's threads. There [`get`](Pool::get) fails with an error that says
//!   so, [`try_get`](Pool::try_get) finds nothing, and all else does nothing, without waiting for anything. No
//!   connection is closed, since all belong to the parent process. In one case a child may take itself for its parent
//!   for a moment: if the thread that forked had used a pool in the same tick of the coarse clock (4 ms on most Linux
//!   systems), until the next tick. Build a pool after the fork.
//! * A [forgotten](std::mem::forget) connection keeps its slot. [`Builder::leak_threshold`] names the line and the
//!   thread that checked it out.
#![forbid(unsafe_code)]

#[cfg(feature = "diesel")]
pub mod diesel;
pub mod error;
pub mod event;
#[cfg(doc)]
pub mod guide;
mod health;
mod hooks;
mod leaf;
mod ledger;
mod manage;
#[cfg(any(feature = "prometheus-client", feature = "metrics"))]
pub mod metrics;
#[cfg(millpond_model)]
#[doc(hidden)]
#[path = "../tests/simulation/model/mod.rs"]
pub mod model;
mod pool;
#[cfg(feature = "postgres")]
pub mod postgres;
mod runtime;
mod settings;
mod stats;

pub use crate::error::{Cause, Error, ErrorKind};
pub use crate::event::{HandleEvent, NopEventHandler};
pub use crate::health::{Failing, Health, LastError};
pub use crate::leaf::histogram::Distribution;
pub use crate::manage::{Manage, Opening, Returned, Start};
pub use crate::pool::Pool;
pub use crate::pool::builder::Builder;
pub use crate::pool::close::CloseReport;
pub use crate::pool::connection::PooledConnection;
pub use crate::pool::guard::{PoolGuard, Workers};
pub use crate::settings::{Settings, Validate};
pub use crate::stats::{CloseReason, ConnectionInfo, ConnectionState, Connections, State, Stats};
pub use r2d2::{
    self, CustomizeConnection, Extensions, HandleError, LoggingErrorHandler, ManageConnection, NopConnectionCustomizer,
    NopErrorHandler,
};

#[cfg(doc)]
#[doc = include_str!("../docs/coming-from-r2d2.md")]
pub mod coming_from_r2d2 {}

/// Has the examples of the README compiled.
#[cfg(doctest)]
#[cfg(feature = "postgres")]
#[doc = include_str!("../README.md")]
mod readme {}

// The examples name the crate as users do.
#[cfg(test)]
extern crate self as millpond;
#[cfg(test)]
#[path = "../docs/example_manager.rs"]
mod doc_manager;
