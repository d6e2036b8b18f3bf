//! [`Connection`]: a `postgres::Client` with what the pool knows of it, and how the pool looks after it.

use super::cancel::{CANCEL_LIMIT, CancelScope, Canceller, SendCancel};
use super::marked::Marked;
use super::question::{Standing, ask_for_pid, ask_standing};
use super::reset::Reset;
use super::statements::Statements;
use super::test_transaction::TestTransaction;
use super::verdict::{AtRest, Facts, verdict};
use crate::Returned;
use crate::postgres::error::Error;
use crate::postgres::wire::{self, Status, Watch};
use ::postgres::Client;
use ::postgres::error::SqlState;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A PostgreSQL connection: it derefs to [`postgres::Client`].
///
/// Code that is generic over [`postgres::GenericClient`] takes the client itself: of a
/// [`PooledConnection`](crate::postgres::PooledConnection) named `client` that is `&mut **client`, of a
/// [`Transaction`](super::Transaction) `&mut *tx`.
///
/// The drop of a connection (one that was [detached](crate::PooledConnection::detach), say) takes a moment, where the
/// drop of a `postgres::Client` waits for every missing answer. A query that still runs is cancelled. If that does not
/// help within a second the connection is aborted, where it is [observed](crate::postgres#the-observer).
pub struct Connection {
    /// The client is dropped before the statements: then their drops send nothing. (If a statement is dropped earlier,
    /// the next request closes it, which does no harm.)
    pub(super) client: Marked,
    pub(super) statements: Statements,
    /// `None` if the connection is not observed, by choice or since it cannot be.
    pub(super) watch: Option<Arc<Watch>>,
    /// `None` unless everything on this connection happens inside one transaction that is never committed.
    pub(super) test: Option<TestTransaction>,
    pid: Option<i32>,
    cancel: SendCancel,
    /// How long a caller waits for a request to cancel.
    cancel_limit: Duration,
    /// The scope of the present checkout, if a [`Canceller`] was made in it.
    cancel_scope: OnceLock<Arc<CancelScope>>,
    /// How long the rest of an answer is read before its query is cancelled: about as long as a new connection takes.
    pub(super) drain: Duration,
    lookup: Lookup,
    /// What the last reset found, to be logged.
    pub(super) remark: Option<String>,
}

/// A client that has logged in, and what its manager knows of it.
pub(in crate::postgres) struct Opened {
    pub(in crate::postgres) client: Client,
    pub(in crate::postgres) watch: Option<Arc<Watch>>,
    pub(in crate::postgres) cancel: SendCancel,
    pub(in crate::postgres) cancel_limit: Duration,
    /// How long the login took.
    pub(in crate::postgres) took: Duration,
}

/// The least time for which the rest of an answer is read before its query is cancelled. (A cancel costs two connects:
/// its own, and that of a replacement, since a cancelled connection is closed. So to read for as long as a connect
/// takes is no loss.)
const DRAIN: Duration = Duration::from_millis(50);

/// The same on a connection that is not observed. There it is not known whether an answer is missing at all: a busy
/// network or server is silent too, and should not get more work.
const DRAIN_UNOBSERVED: Duration = Duration::from_millis(500);

/// Whether the server has the statement with which `postgres` looks up types, as far as is known on a connection that
/// is not observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lookup {
    /// The statement may not have been prepared yet, or may be gone.
    Unknown,
    /// The statement was there, once.
    Seen,
    /// This server does not show the statement.
    Hidden,
}

/// What `DISCARD ALL` does, as PostgreSQL documents it, without `DEALLOCATE ALL`. The `postgres` crate keeps statements
/// of its own, with which it looks up types, and does not notice when they are gone. Every type that it has not met
/// before would fail from then on.
const DISCARD: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES";

impl Connection {
    pub(in crate::postgres) fn new(opened: Opened, statement_cache: usize) -> Result<Connection, Error> {
        let Opened { mut client, watch, cancel, cancel_limit, took } = opened;
        let pid = match &watch {
            Some(watch) => watch.pid(),
            None => ask_for_pid(&mut client)?,
        };
        Ok(Connection {
            client: Marked::new(client),
            statements: Statements::new(statement_cache, watch.clone()),
            pid,
            cancel,
            cancel_limit,
            cancel_scope: OnceLock::new(),
            drain: took.max(if watch.is_some() { DRAIN } else { DRAIN_UNOBSERVED }),
            lookup: Lookup::Unknown,
            watch,
            test: None,
            remark: None,
        })
    }

    /// Whether the pool watches the bytes of this connection. See [the module](crate::postgres#the-observer).
    pub fn is_observed(&self) -> bool {
        self.watch.is_some()
    }

    /// Something that can cancel what this connection does, to be given to another thread: a watchdog, say.
    ///
    /// It works until the connection is returned. From then on it only fails, since it must not cancel the next
    /// caller's query. If it was used, the connection is closed when it is returned, since the request may arrive late.
    /// If it was not used, it costs nothing.
    ///
    /// (The pool does not know of `cancel_token()`, which is the `postgres` crate's own: that may cancel the next
    /// caller's query.)
    pub fn canceller(&self) -> Canceller {
        let scope = self.cancel_scope.get_or_init(Arc::default);
        Canceller::new(Arc::clone(scope), Arc::clone(&self.cancel), self.cancel_limit)
    }

    /// The process id of its backend. Behind a pooler it is a number of the pooler's, or `None`.
    pub fn backend_pid(&self) -> Option<i32> {
        self.pid
    }

    // ---------------------------------------------------------------------------------------------- for the manager

    /// What is to be done with a connection that is returned. `writes`: a node that takes writes was asked for. Does
    /// not block: it does not read an answer that the caller left unread, and does not ask the server.
    pub(in crate::postgres) fn state(&mut self, reset: Reset, writes: bool) -> Returned {
        if self.test.is_some() {
            // With `DiscardAll` no shortcut is taken. A refused write says nothing of the node: outside of the test transaction all
            // writes are refused.
            let facts = self.facts(Reset::DiscardAll, false);
            return self.test_state(facts);
        }
        verdict(self.facts(reset, writes), reset)
    }

    /// Gathers the facts about a connection that is returned, and ends the cancel scope of its checkout.
    fn facts(&mut self, reset: Reset, writes: bool) -> Facts {
        // This comes first: from here on the caller cannot cancel what the connection does.
        let cancelled = self.end_cancel_scope();
        if self.client.peek().is_closed() {
            return Facts::Dead;
        }
        if self.client.has_unwound() {
            return Facts::Unwound;
        }
        if cancelled {
            return Facts::CancelSent;
        }
        if self.statements.has_lost_lookups() {
            return Facts::LookupsLost;
        }
        // Notifications were for the caller. They are dropped here, since even a call that leaves nothing else behind
        // may have read some.
        self.client.drop_notifications();
        let Some(watch) = &self.watch else {
            return if self.client.is_settled() { Facts::Clean } else { Facts::Unobserved };
        };
        // The usual case, which needs no flush. With `DiscardAll` a reset follows in any case.
        if reset != Reset::DiscardAll && !self.client.is_marked() && watch.is_clean() {
            return Facts::Clean;
        }
        if watch.is_waiting() {
            return Facts::Answering { in_copy: watch.in_copy() };
        }
        // The watch does not see messages that are queued and not yet written (the end of a COPY that the server
        // refused, say).
        if wire::flush(self.client.reach()).is_err() {
            return Facts::Dead;
        }
        self.client.unmark();
        let idle = watch.is_idle();
        if idle {
            watch.forget_failures();
        }
        let ended = watch.fatal().is_some();
        // `take_refused_write` forgets the refusal, so it is asked only where the answer counts.
        let read_only_node = !ended && writes && {
            let refused_write = watch.take_refused_write();
            refused_write && !watch.takes_writes()
        };
        let unusable = watch.is_lost() || watch.in_copy() || watch.has_missed_a_statement();
        Facts::AtRest(AtRest { ended, read_only_node, unusable, idle })
    }

    /// Asks the server whether it is there, and makes sure that the answer is the one to this question.
    pub(in crate::postgres) fn ping(&mut self, limit: Duration) -> Result<(), Error> {
        if let Err(error) = self.ask(limit) {
            // The drop of the connection would wait for the missing answer.
            self.abort();
            return Err(match &self.watch {
                Some(watch) => Error::of(error, watch),
                None => error.into(),
            });
        }
        match &self.watch {
            Some(watch) if watch.is_lost() || watch.is_busy() => {
                self.abort();
                Err(Error::own("its answers no longer match its questions", false))
            }
            _ => Ok(()),
        }
    }

    /// Asks the server. If half a message came behind the answer (a notification on its way), asks once more: the other
    /// half comes before the second answer.
    fn ask(&mut self, limit: Duration) -> Result<(), ::postgres::Error> {
        let begun = Instant::now();
        self.expecting_little();
        self.client.completed(|client| client.is_valid(limit))?;
        match &self.watch {
            Some(watch) if watch.is_mid_message() => {
                let left = limit.saturating_sub(begun.elapsed());
                let left = left.max(Duration::from_millis(1)); // zero is never long enough
                self.expecting_little();
                self.client.completed(|client| client.is_valid(left))
            }
            _ => Ok(()),
        }
    }

    /// Looks whether the connection is alive, without asking the server. `None`: it cannot be seen.
    pub(in crate::postgres) fn peek(&mut self) -> Option<Result<(), Error>> {
        let watch = self.watch.as_ref()?;
        match self.client.completed(|client| wire::look(client, watch)) {
            Ok(true) => Some(Ok(())),
            Ok(false) if watch.is_lost() => Some(Err(Error::own("the server has ended the connection", false))),
            Ok(false) => None,
            Err(error) => Some(Err(Error::of(error, watch))),
        }
    }

    /// Makes the connection fit for the next caller, as far as `reset` wants.
    pub(in crate::postgres) fn clean(&mut self, reset: Reset, limit: Duration) -> Result<(), Error> {
        self.remark = None;
        if self.may_be_at_work() && !self.stop(limit) {
            self.remark = Some("came back in the middle of an answer, which was cancelled".into());
            return Err(Error::own("there was more left of an answer than can be read in a moment", false));
        }
        let in_transaction = match self.watch.clone() {
            Some(watch) => {
                // A queued request is seen only once it is written, and its effect known only once it is answered.
                wire::flush(self.client.reach())?;
                if !watch.is_idle() {
                    self.ping(limit)?;
                }
                self.client.unmark();
                watch.status() != Status::Idle && reset != Reset::None
            }
            None => self.ask_unobserved()?,
        };
        if in_transaction {
            self.remark = Some("came back inside a transaction, which was rolled back".into());
            self.expecting_little();
            self.client.completed(|client| client.batch_execute("ROLLBACK"))?;
            // In the failed transaction every question was refused, so it is not known yet whether answers match their
            // questions.
            if self.watch.is_none() && self.ask_unobserved()? {
                return Err(Error::own("its transaction could not be rolled back", false));
            }
        }
        if reset == Reset::DiscardAll {
            // The statements are dropped first, so that the messages that close them go along with the request below.
            self.statements.clear();
            self.expecting_little();
            self.client.completed(|client| client.batch_execute(DISCARD))?;
        }
        // Notifications that came with these answers were not for the next caller.
        self.client.drop_notifications();
        match &self.watch {
            Some(watch) if reset == Reset::None && !watch.is_lost() && !watch.is_busy() => Ok(()),
            Some(watch) if !watch.is_idle() => {
                self.abort();
                Err(Error::own("it could not be brought to rest", false))
            }
            Some(watch) => {
                watch.forget_failures();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The remark of the last [`clean`](Connection::clean), if it made one.
    pub(in crate::postgres) fn take_remark(&mut self) -> Option<String> {
        self.remark.take()
    }

    /// Closes the connection, within the limit where that can be done.
    pub(in crate::postgres) fn close(mut self, limit: Duration) {
        self.finish(limit);
    }

    /// Until the next answer has come to its end the server may not send much, where the connection is observed.
    pub(in crate::postgres) fn expecting_little(&mut self) -> &mut Self {
        if let Some(watch) = &self.watch {
            watch.expect_little();
        }
        self
    }

    /// Prepares the connection for its drop. A query that still runs is cancelled, since the backend would go on with
    /// it. If an answer is still missing then, the connection is aborted: its drop would wait for that answer.
    fn finish(&mut self, limit: Duration) {
        self.end_cancel_scope();
        if self.may_be_at_work() {
            self.stop(limit);
        }
        // The drop of a client at rest waits for nothing, and in a test transaction it is at rest as well.
        let is_at_rest = |watch: &Arc<Watch>| match self.test {
            Some(_) => !watch.is_busy() && !watch.is_lost(),
            None => watch.is_idle(),
        };
        if !self.watch.as_ref().is_none_or(is_at_rest) {
            self.abort();
        }
        self.client.unmark();
    }

    /// From now on the checkout's cancellers do nothing. `true`: one of them was used.
    fn end_cancel_scope(&mut self) -> bool {
        self.cancel_scope.take().is_some_and(|scope| scope.end())
    }

    /// Whether the backend may still be at work for the last caller. (In a COPY to the server it is the backend that
    /// waits.)
    pub(super) fn may_be_at_work(&self) -> bool {
        match &self.watch {
            Some(watch) => watch.is_waiting() && !watch.in_copy(),
            // On an unmarked client every request has been answered to its end.
            None => self.client.is_marked() && !self.client.peek().is_closed(),
        }
    }

    /// Ends the query that runs: reads the rest of its answer for a moment, and if that does not help has the server
    /// cancel it. Takes three quarters of `limit` at most, and as a rule not much more than a second. (`postgres` looks at
    /// the time when nothing has come. So an answer that comes faster than it is read is read until the close's limit.)
    ///
    /// `false`: the query was cancelled, or could not be, and the connection can only be closed.
    pub(super) fn stop(&mut self, limit: Duration) -> bool {
        let drain = self.drain.min(limit / 4);
        if let Some(watch) = &self.watch {
            // As a rule the rest of an answer is short, and has arrived.
            let _ = wire::flush(self.client.reach());
            if !watch.is_waiting() {
                return !watch.is_lost();
            }
        }
        let answer = self.client.reach().is_valid(drain);
        if answer.is_ok() {
            return self.watch.as_ref().is_none_or(|watch| !watch.is_waiting());
        }
        // Nothing is cancelled if the connection is dead, or if an error came, which can only be the answer to another
        // question.
        if !self.client.peek().is_closed() && answer.is_err_and(|e| e.code().is_none()) {
            let (begun, limit) = (Instant::now(), CANCEL_LIMIT.min(limit / 2));
            if (self.cancel)(limit).is_ok() {
                // Reads until the server's own error has come, with what was sent before it.
                let _ = self.client.reach().is_valid(limit.saturating_sub(begun.elapsed()));
            }
        }
        // Unmarked, so that the drop does not try once more.
        self.client.unmark();
        if self.watch.as_ref().is_some_and(|watch| !watch.is_idle()) {
            self.abort();
        }
        false
    }

    /// On a connection that is not observed: whether a transaction is open or has failed. Fails if the answer is not
    /// the one to this question.
    fn ask_unobserved(&mut self) -> Result<bool, Error> {
        // If the caller may have removed the statements of the `postgres` crate, the question includes them.
        let lookup = self.client.is_marked() && self.lookup != Lookup::Hidden && !self.statements.is_off();
        let answer = self.client.completed(|client| ask_standing(client, lookup))?;
        self.client.unmark();
        match answer {
            Standing::Failed | Standing::InTransaction => Ok(true),
            Standing::Desynchronised => Err(Error::own("its answers no longer match its questions", false)),
            Standing::Idle { lookups } => {
                self.client.settle();
                if lookup {
                    self.check_lookup(lookups)?;
                }
                Ok(false)
            }
        }
    }

    /// Fails if the statement is gone with which `postgres` looks up types. On a connection that is not observed this
    /// is the only sign of a caller's `DISCARD ALL`. If the statement was never seen, `postgres` is made to use it.
    fn check_lookup(&mut self, there: bool) -> Result<(), Error> {
        match (there, self.lookup) {
            (true, _) => self.lookup = Lookup::Seen,
            (false, Lookup::Seen) => return Err(lookup_is_gone()),
            (false, _) => {
                self.client.peek().clear_type_cache();
                match self.client.completed(|client| client.prepare(FOREIGN_TYPE)) {
                    Err(e) if e.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => return Err(lookup_is_gone()),
                    Err(e) if e.code().is_none() => return Err(e.into()),
                    // There is no such type here, or this version of `postgres` has another text in its statement.
                    _ => self.lookup = Lookup::Hidden,
                }
                if let Standing::Idle { lookups: true } = self.client.completed(|client| ask_standing(client, true))? {
                    self.lookup = Lookup::Seen;
                }
            }
        }
        Ok(())
    }

    fn abort(&self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

/// A question with a type that is not built in, and that every database has. (It must be the type of a parameter: for a
/// column the server would name the type below it.)
const FOREIGN_TYPE: &str = "SELECT $1::information_schema.cardinal_number";

fn lookup_is_gone() -> Error {
    Error::own("somebody removed the statements with which the postgres crate looks up types (DISCARD ALL?)", false)
}

/// For a connection that the pool does not close: one that was detached, or passed to a customizer's `on_release`.
impl Drop for Connection {
    fn drop(&mut self) {
        self.finish(2 * CANCEL_LIMIT);
    }
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        self.client.peek()
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut Client {
        self.client.reach()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("observed", &self.is_observed()).finish_non_exhaustive()
    }
}
