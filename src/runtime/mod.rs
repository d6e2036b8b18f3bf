//! Threads and locks: they carry out what the [ledger](crate::ledger) decides. Each file imports only files above it:
//!
//! | file | |
//! |---|---|
//! | `event_count`, `waiter`, `executor` | what threads sleep on, and the threads that may block; none knows of pools |
//! | `reaper` | the thread that keeps time |
//! | `user`, `openings`, `lifecycle` | what the parts of a pool share |
//! | `conn`, `job` | what the parts hand to each other |
//! | `shared` | the lock, the one way to use it, and the effects that are then applied |
//! | `permit`, `jobs` | what the executor's threads do |

pub(crate) mod conn;
mod event_count;
pub(crate) mod executor;
pub(crate) mod job;
pub(crate) mod jobs;
pub(crate) mod lifecycle;
mod openings;
pub(crate) mod permit;
mod reaper;
pub(crate) mod shared;
mod user;
pub(crate) mod waiter;
