//! [`Marked`]: a client that remembers whether a call may have left something behind on it.

use crate::postgres::wire;
use ::postgres::Client;

/// A `Client`, marked by every call that reaches it. A client does not tell which messages are queued and not yet
/// written (the end of a COPY that the server refused, say), or written and not yet answered. So every way to the
/// client marks it, and no function can forget to. A call that leaves nothing behind goes through
/// [`completed`](Marked::completed), and must succeed.
pub(super) struct Marked {
    client: Client,
    marked: bool,
    /// A call that leaves no message behind may have begun a transaction, or ended one.
    unsettled: bool,
    /// A call has panicked, or goes on.
    unwound: bool,
}

impl Marked {
    /// A client with which nothing is under way.
    pub(super) fn new(client: Client) -> Marked {
        Marked { client, marked: false, unsettled: false, unwound: false }
    }

    /// The client, for any use. Marks it.
    pub(super) fn reach(&mut self) -> &mut Client {
        self.marked = true;
        &mut self.client
    }

    /// Makes a call that leaves nothing behind if it succeeds. If the call fails or panics, the client is marked. If it
    /// panics (in a parameter's `to_sql`, say), half a message may stay in the client, to go out before the next one.
    pub(super) fn completed<R, E>(&mut self, call: impl FnOnce(&mut Client) -> Result<R, E>) -> Result<R, E> {
        let before = std::mem::replace(&mut self.marked, true);
        self.unwound = true;
        let result = call(&mut self.client);
        self.unwound = false;
        if result.is_ok() {
            self.marked = before;
        }
        result
    }

    /// Whether a call has panicked that went through [`completed`](Marked::completed).
    pub(super) fn has_unwound(&self) -> bool {
        self.unwound
    }

    pub(super) fn is_marked(&self) -> bool {
        self.marked
    }

    /// A call that goes through [`completed`](Marked::completed) may begin a transaction, or end one. Where the
    /// connection is observed its bytes show that, and nobody looks at this.
    pub(super) fn unsettle(&mut self) {
        self.unsettled = true;
    }

    /// No call has left anything behind, nor can one have begun a transaction.
    pub(super) fn is_settled(&self) -> bool {
        !self.marked && !self.unsettled
    }

    /// It is known, by the connection's own answer, that no transaction is open.
    pub(super) fn settle(&mut self) {
        self.unsettled = false;
    }

    /// Removes the mark. To be called when nothing is queued, and it is known which answers are missing.
    pub(super) fn unmark(&mut self) {
        self.marked = false;
    }

    /// Drops the notifications that the client has read. This leaves nothing behind, and does not mark it.
    pub(super) fn drop_notifications(&mut self) {
        wire::drop_notifications(&mut self.client);
    }

    /// The client, for reading. Does not mark it.
    pub(super) fn peek(&self) -> &Client {
        &self.client
    }
}
