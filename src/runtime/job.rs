//! [`Job`]: what the executor can be given to do.

use crate::error::Cause;
use crate::ledger::SlotJob;
use crate::manage::Opening;
use crate::runtime::executor::{Kind, Task};
use log::Level;
use std::sync::Arc;

/// Something for the executor to do. `C` is a connection.
pub(crate) enum Job<C> {
    /// The ledger has ordered it.
    Slot(SlotJob<C>),
    /// Abort what this connection is doing, after asking the server to cancel it if `true`.
    Abort(Arc<Opening>, bool),
    /// Drop a cause: what it was made of may be the user's.
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
