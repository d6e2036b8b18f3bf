//! [`Job`]: what the executor can be given to do.

use crate::error::Cause;
use crate::ledger::{Caller, Token};
use crate::manage::Opening;
use crate::runtime::executor::{Kind, Task};
use crate::stats::CloseReason;
use log::Level;
use std::sync::Arc;

/// Something for the executor to do. `C` is a connection.
pub(crate) enum Job<C> {
    Open(Token),
    Check(Token, C),
    /// With the last caller.
    Reset(Token, C, Option<Caller>),
    Close(Token, C, CloseReason),
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
            Job::Open(..) => Kind::Open,
            Job::Check(..) | Job::Reset(..) => Kind::Check,
            Job::Close(..) => Kind::Close,
            Job::Abort(..) | Job::Drop(..) => Kind::Abort,
            Job::Record(..) => Kind::Record,
        }
    }

    fn slot(&self) -> Option<u64> {
        match self {
            Job::Open(token) | Job::Check(token, _) | Job::Reset(token, ..) | Job::Close(token, ..) => Some(token.id()),
            Job::Abort(..) | Job::Drop(..) | Job::Record(..) => None,
        }
    }
}
