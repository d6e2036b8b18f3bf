//! [`Marked`]: a client that remembers whether anybody has reached it.

use super::observer;
use ::postgres::Client;

/// A `Client`, marked by whatever reaches it: what is queued and not yet written (the end of a COPY that the server
/// refused, say), or written and not yet answered, nobody can ask it for. Every way to it marks, so that none need remember
/// to; who claims to leave nothing behind has to say so, and to succeed ([`whole`](Marked::whole)).
pub(super) struct Marked {
    client: Client,
    marked: bool,
}

impl Marked {
    /// A client with which nothing is under way.
    pub(super) fn new(client: Client) -> Marked {
        Marked { client, marked: false }
    }

    /// Marks it.
    pub(super) fn reach(&mut self) -> &mut Client {
        self.marked = true;
        &mut self.client
    }

    /// Runs a call that leaves nothing behind when it succeeds. If it fails or panics the client is marked.
    pub(super) fn whole<R, E>(&mut self, call: impl FnOnce(&mut Client) -> Result<R, E>) -> Result<R, E> {
        let before = std::mem::replace(&mut self.marked, true);
        let result = call(&mut self.client);
        if result.is_ok() {
            self.marked = before;
        }
        result
    }

    pub(super) fn is_marked(&self) -> bool {
        self.marked
    }

    /// It was looked after: nothing is queued, and what is under way is known.
    pub(super) fn unmark(&mut self) {
        self.marked = false;
    }

    /// Drops the notifications that it has read, which leaves nothing behind.
    pub(super) fn forget_notifications(&mut self) {
        observer::forget_notifications(&mut self.client);
    }

    /// What is read of it without a mark.
    pub(super) fn peek(&self) -> &Client {
        &self.client
    }
}
