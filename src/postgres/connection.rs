//! [`Connection`]: a `postgres::Client` with what the pool knows of it.

use super::observer::{self, Status, Watch};
use super::statements::Statements;
use super::{Error, Reset};
use ::postgres::{CancelToken, Client, SimpleQueryMessage};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A PostgreSQL connection: it derefs to [`postgres::Client`](::postgres::Client).
pub struct Connection {
    /// Goes before the statements, which therefore have nobody left to tell.
    pub(super) client: Client,
    pub(super) statements: Statements,
    /// Whether the client itself was in anybody's hands since it was last looked after: only then something may be queued
    /// that is not yet written. What a statement leaves that is dropped later goes out before the next request, and does
    /// no harm.
    touched: bool,
    /// `None` if it is not observed: over a unix socket, or by choice.
    watch: Option<Arc<Watch>>,
    pid: Option<i32>,
    /// Set when anybody has asked the server to cancel what this connection does: that may hit a later query.
    cancelled: Arc<AtomicBool>,
    /// What the last reset found.
    remark: Option<&'static str>,
}

/// What `DISCARD ALL` does, as PostgreSQL documents it, but for `DEALLOCATE ALL`: the `postgres` crate keeps statements of
/// its own, by which it looks up types, and does not notice when they are gone. A type that it has not met before would
/// fail from then on.
const DISCARD: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
    SELECT pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES";

impl Connection {
    pub(super) fn new(
        mut client: Client,
        watch: Option<Arc<Watch>>,
        statement_cache: usize,
    ) -> Result<Connection, Error> {
        let pid = match &watch {
            Some(watch) => watch.pid(),
            None => ask_for_pid(&mut client)?,
        };
        let statements = Statements::new(statement_cache, watch.clone());
        Ok(Connection { client, statements, touched: false, watch, pid, cancelled: Arc::default(), remark: None })
    }

    /// Whether the pool watches the bytes of this connection. See [the module](super#the-observer).
    pub fn is_observed(&self) -> bool {
        self.watch.is_some()
    }

    /// What [`PostgresManager::cancel`](super::PostgresManager::cancel) needs, to be given to another thread.
    ///
    /// A connection for which this was called is closed when it is returned: a cancel request may arrive late, and must
    /// not hit the next user's query.
    pub fn canceller(&self) -> Canceller {
        Canceller { token: self.client.cancel_token(), cancelled: Arc::clone(&self.cancelled) }
    }

    /// The process id of its backend. Behind a pooler it is the pooler's own, if anything.
    pub fn backend_pid(&self) -> Option<i32> {
        self.pid
    }

    // ---------------------------------------------------------------------------------------------- for the manager

    /// How it comes back. Does not block.
    pub(super) fn state(&mut self, reset: Reset, writes: bool) -> crate::Returned {
        use crate::Returned;
        if self.client.is_closed() {
            return Returned::Broken;
        }
        if self.cancelled.load(Ordering::Relaxed) || self.statements.is_spoilt() {
            return Returned::Discard;
        }
        let Some(watch) = &self.watch else {
            return if reset == Reset::None { Returned::Keep } else { Returned::Reset };
        };
        let kept_if_clean = reset != Reset::DiscardAll;
        if kept_if_clean && !self.touched && watch.is_clean() {
            return Returned::Keep;
        }
        // What is queued and not yet written (the end of a COPY that the server refused, say) is not seen.
        if observer::flush(&mut self.client).is_err() {
            return Returned::Broken;
        }
        self.touched = false;
        if kept_if_clean && watch.is_clean() {
            return Returned::Keep;
        }
        if watch.fatal().is_some() {
            return Returned::Broken;
        }
        if writes && watch.take_refused_write() && !watch.takes_writes() {
            return Returned::Outdated;
        }
        match reset {
            _ if watch.is_lost() || watch.in_copy() => Returned::Discard,
            Reset::DiscardAll => Returned::Reset,
            Reset::None => Returned::Keep,
            Reset::Rollback if watch.is_idle() => Returned::Keep,
            Reset::Rollback => Returned::Reset,
        }
    }

    /// Asks the server whether it is there, and makes sure that its answer is the one to that question.
    pub(super) fn ping(&mut self, limit: Duration) -> Result<(), Error> {
        if let Err(error) = self.ask(limit) {
            // What is left unanswered would hold up whoever drops it.
            self.cut();
            return Err(match &self.watch {
                Some(watch) => Error::of(error, watch),
                None => error.into(),
            });
        }
        match &self.watch {
            Some(watch) if watch.is_lost() || watch.is_busy() => {
                self.cut();
                Err(Error::own("its answers no longer match its questions", false))
            }
            _ => Ok(()),
        }
    }

    /// Asks, and once more if half a message came behind the answer: a notification on its way. What answers the second
    /// question comes behind its other half.
    fn ask(&mut self, limit: Duration) -> Result<(), ::postgres::Error> {
        let begun = Instant::now();
        self.client.is_valid(limit)?;
        match &self.watch {
            Some(watch) if watch.is_half_told() => {
                let left = limit.saturating_sub(begun.elapsed());
                self.client.is_valid(left.max(Duration::from_millis(1))) // zero is never long enough
            }
            _ => Ok(()),
        }
    }

    /// Looks whether it is alive, without a word to the server. `None`: that cannot be seen.
    pub(super) fn peek(&mut self) -> Option<Result<(), Error>> {
        let watch = self.watch.as_ref()?;
        match observer::look(&mut self.client, watch) {
            Ok(true) => Some(Ok(())),
            Ok(false) if watch.is_lost() => Some(Err(Error::own("the server has ended the connection", false))),
            Ok(false) => None,
            Err(error) => Some(Err(Error::of(error, watch))),
        }
    }

    /// Makes it fit for the next user, by `reset`.
    pub(super) fn clean(&mut self, reset: Reset, limit: Duration) -> Result<(), Error> {
        self.remark = None;
        let in_transaction = match self.watch.clone() {
            Some(watch) => {
                // What is queued and not yet written is not seen; what is not yet answered is not known.
                observer::flush(&mut self.client)?;
                if !watch.is_idle() {
                    self.ping(limit)?;
                }
                watch.status() != Status::Idle
            }
            None => ask_for_transaction(&mut self.client)?,
        };
        if in_transaction {
            self.remark = Some("came back inside a transaction, which was rolled back");
            self.client.batch_execute("ROLLBACK")?;
        }
        if reset == Reset::DiscardAll {
            // First, so that what this says to the server goes along.
            self.statements.clear();
            self.client.batch_execute(DISCARD)?;
        }
        match &self.watch {
            Some(watch) if !watch.is_idle() => {
                self.cut();
                Err(Error::own("it could not be brought to rest", false))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn take_remark(&mut self) -> Option<String> {
        self.remark.take().map(String::from)
    }

    /// Closes it. One that is in the middle of something is cut first: to end in good order it would wait for an answer.
    pub(super) fn close(self) {
        if self.watch.as_ref().is_some_and(|watch| !watch.is_idle()) {
            self.cut();
        }
        drop(self.client);
    }

    fn cut(&self) {
        if let Some(watch) = &self.watch {
            watch.cut();
        }
    }
}

/// Whether a transaction is open or has failed. In one round trip, and without a word in the server's log: in a
/// transaction time stands still.
pub(super) fn ask_for_transaction(client: &mut Client) -> Result<bool, ::postgres::Error> {
    match client.simple_query("SELECT now() = statement_timestamp()") {
        Ok(messages) => Ok(!messages.iter().any(|m| match m {
            SimpleQueryMessage::Row(row) => row.get(0) == Some("t"),
            _ => false,
        })),
        Err(e) if e.code() == Some(&::postgres::error::SqlState::IN_FAILED_SQL_TRANSACTION) => Ok(true),
        Err(e) => Err(e),
    }
}

fn ask_for_pid(client: &mut Client) -> Result<Option<i32>, ::postgres::Error> {
    let answer = client.simple_query("SELECT pg_backend_pid()")?;
    Ok(answer.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
        _ => None,
    }))
}

/// Asks the server to cancel what one connection is doing. Made by [`Connection::canceller`], used by
/// [`PostgresManager::cancel`](super::PostgresManager::cancel).
#[derive(Clone)]
pub struct Canceller {
    pub(super) token: CancelToken,
    pub(super) cancelled: Arc<AtomicBool>,
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").finish_non_exhaustive()
    }
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut Client {
        self.touched = true;
        &mut self.client
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("observed", &self.is_observed()).finish_non_exhaustive()
    }
}
