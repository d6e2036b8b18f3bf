//! What the ledger is told, and what it answers: values only, without a rule.

use std::panic::Location;
use std::time::Duration;

use crate::leaf::clock::Moment;
use crate::stats::{CloseReason, ConnectionState};

/// The caller of a checkout: where in the user's code it called `get`, and on which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) at: &'static Location<'static>,
    pub(crate) thread: u64,
}

/// One slot of the pool, in the hands of the caller or the job that has this value. Spent by passing it back to the
/// ledger.
#[derive(Debug)]
#[must_use = "a token that is dropped takes its slot with it"]
pub(crate) struct Token {
    pub(super) index: u32,
    pub(super) id: u64,
}

impl Token {
    /// The number of the connection, or of the attempt to open one. Never used again within a pool.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

/// A place in the queue. A lower one is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket {
    pub(super) number: u64,
    /// When it was drawn. A caller that leaves the queue for a check of its own and comes back has waited all the
    /// while.
    pub(super) since: Moment,
}

/// What becomes of a waiter.
#[derive(Debug)]
pub(crate) enum Outcome<C> {
    /// The waiter has this connection.
    Connection(Token, C),
    /// The pool was closed.
    Closed,
    /// The server refuses for a reason that waiting does not change, and no connection is alive.
    Refused,
}

/// A job of the executor's that has a slot.
#[derive(Debug)]
pub(crate) enum SlotJob<C> {
    Open(Token),
    Check(Token, C),
    /// With the caller that had it last.
    Reset(Token, C, Option<Caller>),
    Close(Token, C, CloseReason),
}

impl<C> SlotJob<C> {
    /// The number of the connection, or of the attempt to open one.
    pub(crate) fn id(&self) -> u64 {
        match self {
            SlotJob::Open(token) | SlotJob::Check(token, _) | SlotJob::Reset(token, ..) | SlotJob::Close(token, ..) => {
                token.id
            }
        }
    }
}

/// What is to be done about jobs, and told.
#[derive(Debug)]
pub(crate) enum Order<C> {
    /// The executor is to do this.
    Job(SlotJob<C>),
    /// The job that has this slot is past its limit: abort it if that can be done, and replace its thread. `was`: what
    /// the job was doing, for words only.
    Abandon {
        id: u64,
        was: ConnectionState,
        limit: Duration,
        /// Whether the server may be at work for the job, and is to be asked to stop.
        cancel: bool,
    },
    /// The close of this connection takes longer than usual: it no longer counts among the closes that run side by
    /// side.
    Slow { id: u64 },
    /// A connection was in use for longer than `leak_threshold`.
    Leak { id: u64, caller: Option<Caller>, in_use_for: Duration },
}

/// What an attempt to take an idle connection came to.
#[derive(Debug)]
pub(crate) enum Take<C> {
    Ready(Token, C),
    /// The caller is to validate the connection itself, as it said it can. It has this place in the queue.
    Check(Token, C, Ticket),
    Nothing,
}

/// What the wish to wait came to.
#[derive(Debug)]
pub(crate) enum Join<C> {
    Ready(Token, C),
    Queued(Ticket),
    Closed,
    Refused,
    /// This many wait, and no more may.
    TooMany(u32),
}

/// How a connection is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Keep,
    /// The executor is to clean it before any caller gets it.
    Reset,
    /// It is to be closed for this reason, which says nothing of others.
    Discard(CloseReason),
    /// It was found dead: its siblings are suspect.
    Broken,
    /// Every connection that is older than now is to be replaced, itself included.
    Outdated,
}
