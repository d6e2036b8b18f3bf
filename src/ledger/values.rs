//! The values that the ledger's methods take and return. No rule stands here.

use std::panic::Location;
use std::time::Duration;

use crate::leaf::clock::Moment;
use crate::leaf::failures::ErrorType;
use crate::stats::{CloseReason, ConnectionState};

/// The caller of a checkout: where in the user's code it called `get`, and on which thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) at: &'static Location<'static>,
    pub(crate) thread: u64,
}

/// The proof that a caller or a job has the slot. It is spent by passing it back to the ledger.
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
    /// When the ticket was drawn. A caller that joins the queue after a check of its own has waited since then.
    pub(super) since: Moment,
}

/// How the wait of a waiter ends.
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
    /// With the caller that had the connection last.
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

/// How far a failed open got: the next is dialled the sooner the less this one cost the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Nobody listens there: a refused connect, or a missing socket.
    Nobody,
    /// A server, or no one knows what: it failed or said nothing.
    Server,
    /// The server refuses for a reason that waiting does not change.
    Refusal,
}

/// What is known of an open that came back with an error.
#[derive(Clone, Debug)]
pub(crate) struct OpenError {
    pub(crate) reach: Reach,
    pub(crate) error_type: ErrorType,
}

/// What the ledger wants done about jobs, or reported.
#[derive(Debug)]
pub(crate) enum Order<C> {
    /// The executor is to run this job.
    Job(SlotJob<C>),
    /// The job that has this slot is past its limit: abort it if that can be done, and replace its thread.
    Abandon {
        id: u64,
        /// What the job was doing, for the log.
        was: ConnectionState,
        limit: Duration,
        /// Whether the server may be at work for the job, and is to be asked to stop.
        cancel: bool,
    },
    /// The close of this connection takes longer than usual: it no longer counts among the closes that run side by
    /// side.
    Slow { id: u64 },
    /// A connection was opened after this many failed attempts, the first of them so long ago.
    Recovered { after: Duration, attempts: u64 },
    /// A connection was in use for longer than `leak_threshold`.
    Leak { id: u64, caller: Option<Caller>, in_use_for: Duration },
}

/// The outcome of an attempt to take an idle connection.
#[derive(Debug)]
pub(crate) enum Take<C> {
    Ready(Token, C),
    /// The caller is to validate the connection itself, as it offered to. It has this place in the queue.
    Check(Token, C, Ticket),
    Nothing,
}

/// The outcome of an attempt to join the queue.
#[derive(Debug)]
pub(crate) enum Join<C> {
    Ready(Token, C),
    Queued(Ticket),
    Closed,
    Refused,
    /// This many wait, and no more may.
    TooMany(u32),
}

/// The condition in which a connection is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Keep,
    /// The executor is to reset the connection before another caller gets it.
    Reset,
    /// The connection is to be closed for this reason, which says nothing of other connections.
    Discard(CloseReason),
    /// The connection was found dead: its siblings are suspect.
    Broken,
    /// Every connection that was opened before now is to be replaced, this one included.
    Outdated,
}
