//! [`Job`]: everything that the executor may be asked to do.

use crate::error::Cause;
use crate::ledger::SlotJob;
use crate::manage::Opening;
use crate::runtime::executor::{Kind, Task};
use log::Level;
use std::sync::Arc;

/// A job of the executor's. `C` is a connection.
pub(crate) enum Job<C> {
    /// A job with a slot, which the ledger has ordered.
    Slot(SlotJob<C>),
    /// Abort what this connection is doing. `true`: ask the server to cancel it first.
    Abort(Arc<Opening>, bool),
    /// Drop a cause, since the error in it may be the user's.
    Drop(Cause),
    /// Write a log record.
    Record(Level, String),
}

impl<C: Send + 'static> Task for Job<C> {
    fn kind(&self) -> Kind {
        match self {
            Job::Slot(SlotJob::Open(..)) => Kind::Open,
            Job::Slot(SlotJob::Check(..) | SlotJob::Reset(..)) => Kind::Check,
            Job::Slot(SlotJob::Close(..)) => Kind::Close,
            Job::Abort(..) | Job::Drop(..) => Kind::Abort,
            Job::Record(..) => Kind::Record,
        }
    }

    fn slot(&self) -> Option<u64> {
        match self {
            Job::Slot(job) => Some(job.id()),
            Job::Abort(..) | Job::Drop(..) | Job::Record(..) => None,
        }
    }
}
