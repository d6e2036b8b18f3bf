//! Threads and locks: what carries out what the [ledger](crate::ledger) decides.

pub(crate) mod defect;
pub(crate) mod event_count;
pub(crate) mod executor;
pub(crate) mod jobs;
pub(crate) mod kept;
pub(crate) mod reaper;
pub(crate) mod shared;
pub(crate) mod waiter;
