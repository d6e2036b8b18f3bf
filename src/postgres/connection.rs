//! [`Connection`]: a `postgres::Client` with what the pool knows of it.

use super::marked::Marked;
use super::observer::{self, Status, Watch};
use super::statements::Statements;
use super::{Error, Reset};
use ::postgres::error::SqlState;
use ::postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A PostgreSQL connection: it derefs to [`postgres::Client`](::postgres::Client).
///
/// For what is generic over [`postgres::GenericClient`](::postgres::GenericClient), hand over the client itself: of a
/// [`PooledConnection`](super::PooledConnection) named `client` that is `&mut **client`, of a
/// [`Transaction`](super::Transaction) `&mut *tx`.
///
/// To drop one (that was [detached](crate::PooledConnection::detach), say) takes a moment, where the drop of a
/// `postgres::Client` waits for whatever is unanswered: a query that still runs is cancelled, and, if it is
/// [observed](super#the-observer), cut if that does not help within a second.
pub struct Connection {
    /// Goes before the statements, which therefore have nobody left to tell. What a statement leaves that is dropped later
    /// goes out before the next request, and does no harm.
    pub(super) client: Marked,
    pub(super) statements: Statements,
    /// `None` if it is not observed: over a unix socket, or by choice.
    watch: Option<Arc<Watch>>,
    pid: Option<i32>,
    cancel: SendCancel,
    /// How long a user waits for a request to cancel.
    cancel_patience: Duration,
    /// Of the present checkout, if anybody has asked for a [`Canceller`] in it.
    lease: OnceLock<Arc<Lease>>,
    /// How long what is left of an answer may take to be read: no longer than a new connection takes.
    drain: Duration,
    /// It was seen, once, that the server has the statement with which `postgres` looks up types. See [`Lookup`].
    lookup: Lookup,
    /// What the last reset found.
    remark: Option<&'static str>,
}

/// Asks the server to cancel what one connection is doing; gives up at the limit.
pub(super) type SendCancel = Arc<dyn Fn(Duration) -> Result<(), Error> + Send + Sync>;

/// A client that has logged in, and what its manager knows of it.
pub(super) struct Opened {
    pub(super) client: Client,
    pub(super) watch: Option<Arc<Watch>>,
    pub(super) cancel: SendCancel,
    pub(super) cancel_patience: Duration,
    /// How long that took.
    pub(super) took: Duration,
}

/// How long the pool waits for a cancel request of its own to be sent and to have its effect.
pub(super) const CANCEL_LIMIT: Duration = Duration::from_secs(1);

/// How long what is left of an answer is read before it is cancelled, if to connect is quicker than this. (A cancelled
/// connection is closed, so that costs a cancel, which is a connect, and a connect.)
const DRAIN: Duration = Duration::from_millis(50);

/// Where nobody watches it is not known that an answer is left at all: silence may also be that of a network or server which
/// is busy, and is not to be given more work.
const DRAIN_UNOBSERVED: Duration = Duration::from_millis(500);

/// Whether the server has the statement with which `postgres` looks up types: as far as is known where nobody watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lookup {
    /// There may be none yet, or no longer.
    Unknown,
    /// It was there.
    Seen,
    /// This server cannot be asked.
    Hidden,
}

/// What `DISCARD ALL` does, as PostgreSQL documents it, but for `DEALLOCATE ALL`: the `postgres` crate keeps statements of
/// its own, by which it looks up types, and does not notice when they are gone. A type that it has not met before would
/// fail from then on.
const DISCARD: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES";

impl Connection {
    pub(super) fn new(opened: Opened, statement_cache: usize) -> Result<Connection, Error> {
        let Opened { mut client, watch, cancel, cancel_patience, took } = opened;
        let pid = match &watch {
            Some(watch) => watch.pid(),
            None => ask_for_pid(&mut client)?,
        };
        Ok(Connection {
            client: Marked::new(client),
            statements: Statements::new(statement_cache, watch.clone()),
            pid,
            cancel,
            cancel_patience,
            lease: OnceLock::new(),
            drain: took.max(if watch.is_some() { DRAIN } else { DRAIN_UNOBSERVED }),
            lookup: Lookup::Unknown,
            watch,
            remark: None,
        })
    }

    /// Whether the pool watches the bytes of this connection. See [the module](super#the-observer).
    pub fn is_observed(&self) -> bool {
        self.watch.is_some()
    }

    /// Something that can cancel what this connection does, to be given to another thread: a watchdog, say.
    ///
    /// It works until the connection is returned. From then on it does nothing, and says so: the next user's query is none
    /// of its business. If it was used before, the connection is closed when it is returned, since the request may arrive
    /// late; if not, that somebody had it costs nothing.
    ///
    /// (Of `cancel_token()`, which is the `postgres` crate's own, the pool learns nothing: it may cancel the next user's
    /// query.)
    pub fn canceller(&self) -> Canceller {
        let lease = self.lease.get_or_init(Arc::default);
        Canceller { lease: Arc::clone(lease), send: Arc::clone(&self.cancel), patience: self.cancel_patience }
    }

    /// The process id of its backend. Behind a pooler it is the pooler's own, if anything.
    pub fn backend_pid(&self) -> Option<i32> {
        self.pid
    }

    // ---------------------------------------------------------------------------------------------- for the manager

    /// How it comes back. Does not block: it reads nothing that somebody left unread, and waits for nobody.
    pub(super) fn state(&mut self, reset: Reset, writes: bool) -> crate::Returned {
        use crate::Returned;
        // Before anything else: from here on it is nobody's to cancel.
        let cancelled = self.end_lease();
        if self.client.peek().is_closed() {
            return Returned::Broken;
        }
        if cancelled || self.statements.is_spoilt() {
            return Returned::Discard;
        }
        // They were for whoever had it until now, and also come with calls that leave nothing else behind.
        self.client.forget_notifications();
        let Some(watch) = &self.watch else {
            return if reset == Reset::None { Returned::Keep } else { Returned::Reset };
        };
        let kept_if_clean = reset != Reset::DiscardAll;
        if kept_if_clean && !self.client.is_marked() && watch.is_clean() {
            return Returned::Keep;
        }
        // To read what is left of an answer may take long.
        if watch.is_waiting() {
            return if watch.in_copy() { Returned::Discard } else { Returned::Reset };
        }
        // What is queued and not yet written (the end of a COPY that the server refused, say) is not seen.
        if observer::flush(self.client.reach()).is_err() {
            return Returned::Broken;
        }
        self.client.unmark();
        if watch.is_idle() {
            watch.forgive();
        }
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
            _ if watch.is_lost() || watch.in_copy() || watch.has_missed_a_statement() => Returned::Discard,
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
        self.client.whole(|client| client.is_valid(limit))?;
        match &self.watch {
            Some(watch) if watch.is_half_told() => {
                let left = limit.saturating_sub(begun.elapsed());
                let left = left.max(Duration::from_millis(1)); // zero is never long enough
                self.client.whole(|client| client.is_valid(left))
            }
            _ => Ok(()),
        }
    }

    /// Looks whether it is alive, without a word to the server. `None`: that cannot be seen.
    pub(super) fn peek(&mut self) -> Option<Result<(), Error>> {
        let watch = self.watch.as_ref()?;
        match self.client.whole(|client| observer::look(client, watch)) {
            Ok(true) => Some(Ok(())),
            Ok(false) if watch.is_lost() => Some(Err(Error::own("the server has ended the connection", false))),
            Ok(false) => None,
            Err(error) => Some(Err(Error::of(error, watch))),
        }
    }

    /// Makes it fit for the next user, by `reset`.
    pub(super) fn clean(&mut self, reset: Reset, limit: Duration) -> Result<(), Error> {
        self.remark = None;
        if self.may_be_at_work() && !self.stop(limit) {
            self.remark = Some("came back in the middle of an answer, which was cancelled");
            return Err(Error::own("there was more left of an answer than can be read in a moment", false));
        }
        let in_transaction = match self.watch.clone() {
            Some(watch) => {
                // What is queued and not yet written is not seen; what is not yet answered is not known.
                observer::flush(self.client.reach())?;
                if !watch.is_idle() {
                    self.ping(limit)?;
                }
                self.client.unmark();
                watch.status() != Status::Idle && reset != Reset::None
            }
            None => self.ask_who_answers()?,
        };
        if in_transaction {
            self.remark = Some("came back inside a transaction, which was rolled back");
            self.client.whole(|client| client.batch_execute("ROLLBACK"))?;
            // What was refused in the failed transaction says nothing of whose answers they are.
            if self.watch.is_none() && self.ask_who_answers()? {
                return Err(Error::own("its transaction could not be rolled back", false));
            }
        }
        if reset == Reset::DiscardAll {
            // First, so that what this says to the server goes along.
            self.statements.clear();
            self.client.whole(|client| client.batch_execute(DISCARD))?;
        }
        // What came with these answers was not for the next.
        self.client.forget_notifications();
        match &self.watch {
            Some(watch) if reset == Reset::None && !watch.is_lost() && !watch.is_busy() => Ok(()),
            Some(watch) if !watch.is_idle() => {
                self.cut();
                Err(Error::own("it could not be brought to rest", false))
            }
            Some(watch) => {
                watch.forgive();
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) fn take_remark(&mut self) -> Option<String> {
        self.remark.take().map(String::from)
    }

    /// Closes it, within the limit where that can be done.
    pub(super) fn close(mut self, limit: Duration) {
        self.finish(limit);
    }

    /// Before it is dropped. What its backend still does is cancelled first, for that would go on without it. Then, if it is
    /// still in the middle of something, it is cut: to end in good order it would wait for an answer.
    fn finish(&mut self, limit: Duration) {
        self.end_lease();
        if self.may_be_at_work() {
            self.stop(limit);
        }
        if self.watch.as_ref().is_some_and(|watch| !watch.is_idle()) {
            self.cut();
        }
        self.client.unmark();
    }

    /// From now on those who could cancel what it does cannot. Whether somebody has.
    fn end_lease(&mut self) -> bool {
        self.lease.take().is_some_and(|lease| lease.end())
    }

    /// Whether its backend may be at work for somebody who has gone. (In a COPY to the server that is the one who waits.)
    fn may_be_at_work(&self) -> bool {
        match &self.watch {
            Some(watch) => watch.is_waiting() && !watch.in_copy(),
            // Whatever is unmarked has been answered wholly.
            None => self.client.is_marked() && !self.client.peek().is_closed(),
        }
    }

    /// Brings what it does to an end, by reading for a moment what is left of an answer, and where that does not help by
    /// having the server cancel it. Takes three quarters of `limit` at most, and not much more than a second.
    ///
    /// `false`: it was cancelled, or is beyond that, and can only be closed.
    fn stop(&mut self, limit: Duration) -> bool {
        let drain = self.drain.min(limit / 4);
        if let Some(watch) = &self.watch {
            // Much of what is unread is short, and has arrived.
            let _ = observer::flush(self.client.reach());
            if !watch.is_waiting() {
                return !watch.is_lost();
            }
        }
        let answer = self.client.reach().is_valid(drain);
        if answer.is_ok() {
            return self.watch.as_ref().is_none_or(|watch| !watch.is_waiting());
        }
        // Unless it is dead, or has answered another question than this one, to which there is no error.
        if !self.client.peek().is_closed() && answer.is_err_and(|e| e.code().is_none()) {
            let (begun, limit) = (Instant::now(), CANCEL_LIMIT.min(limit / 2));
            if (self.cancel)(limit).is_ok() {
                // Until the server's own word for it has come, with what it had said before.
                let _ = self.client.reach().is_valid(limit.saturating_sub(begun.elapsed()));
            }
        }
        // Tried once is enough.
        self.client.unmark();
        if self.watch.as_ref().is_some_and(|watch| !watch.is_idle()) {
            self.cut();
        }
        false
    }

    /// Where nobody watches: whether a transaction is open or has failed, and that the answer is the one to that question.
    fn ask_who_answers(&mut self) -> Result<bool, Error> {
        // Also what somebody did to the statements that are not his, if anybody may have.
        let lookup = self.client.is_marked() && self.lookup != Lookup::Hidden && !self.statements.is_off();
        let answer = self.client.whole(|client| ask_who(client, lookup))?;
        self.client.unmark();
        match answer {
            Answer::Failed => Ok(true),
            Answer::Another => Err(Error::own("its answers no longer match its questions", false)),
            Answer::Open => Ok(true),
            Answer::Idle { lookups } => {
                if lookup {
                    self.look_for_lookup(lookups)?;
                }
                Ok(false)
            }
        }
    }

    /// Where nobody watches a `DISCARD ALL` of the user's does not show, nor that `postgres` fails from then on to look up
    /// types. But the statement with which it does is there, or not; and if it was never seen, `postgres` is made to use it.
    fn look_for_lookup(&mut self, there: bool) -> Result<(), Error> {
        match (there, self.lookup) {
            (true, _) => self.lookup = Lookup::Seen,
            (false, Lookup::Seen) => return Err(lookup_is_gone()),
            (false, _) => {
                self.client.peek().clear_type_cache();
                match self.client.whole(|client| client.prepare(FOREIGN_TYPE)) {
                    Err(e) if e.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME) => return Err(lookup_is_gone()),
                    Err(e) if e.code().is_none() => return Err(e.into()),
                    // No such type, or a `postgres` that asks in other words: it will not be seen.
                    _ => self.lookup = Lookup::Hidden,
                }
                if let Answer::Idle { lookups: true } = self.client.whole(|client| ask_who(client, true))? {
                    self.lookup = Lookup::Seen;
                }
            }
        }
        Ok(())
    }

    fn cut(&self) {
        if let Some(watch) = &self.watch {
            watch.cut();
        }
    }
}

/// A type that is not built in, which every database has. (Of a column the server would say what it is made of.)
const FOREIGN_TYPE: &str = "SELECT $1::information_schema.cardinal_number";

fn lookup_is_gone() -> Error {
    Error::own("somebody removed the statements with which the postgres crate looks up types (DISCARD ALL?)", false)
}

/// What a connection says of itself.
enum Answer {
    /// No transaction is open. Whether the statement is there with which `postgres` looks up types, if that was asked.
    Idle {
        lookups: bool,
    },
    Open,
    /// By the error that everything meets in a failed transaction: an answer to whatever question.
    Failed,
    /// Not to this question.
    Another,
}

/// In one round trip, and without a word in the server's log: in a transaction time stands still. Each question is another,
/// and its answer says which it answers: after a COPY that the server refused, `postgres` may return each call's predecessor's
/// (rust-postgres #789).
fn ask_who(client: &mut Client, lookup: bool) -> Result<Answer, ::postgres::Error> {
    let nonce = nonce();
    let lookups = match lookup {
        true => {
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements \
             WHERE statement OPERATOR(pg_catalog.~~) 'SELECT t.typname, t.typtype, t.typelem%')"
        }
        false => "NULL",
    };
    // Somebody's `search_path` may lead to a function of another kind by one of these names first: one that stops the time.
    let still = "pg_catalog.now() OPERATOR(pg_catalog.=) pg_catalog.statement_timestamp()";
    let question = format!("SELECT '{nonce}', {still}, {lookups}");
    let answer = match client.simple_query(&question) {
        Ok(answer) => answer,
        Err(e) if e.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => return Ok(Answer::Failed),
        Err(e) => return Err(e),
    };
    let row = answer_to(&answer, &nonce);
    let is = |column| row.and_then(|row| row.try_get(column).ok().flatten()) == Some("t");
    Ok(match row {
        None => Answer::Another,
        Some(_) if is(1) => Answer::Idle { lookups: is(2) },
        Some(_) => Answer::Open,
    })
}

/// A word that was never said before, by which an answer shows that it answers the question that had it.
pub(super) fn nonce() -> String {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    format!("millpond {}", ASKED.fetch_add(1, Ordering::Relaxed))
}

/// The row that begins with `nonce`, if it is there.
pub(super) fn answer_to<'a>(answer: &'a [SimpleQueryMessage], nonce: &str) -> Option<&'a SimpleQueryRow> {
    answer.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) if row.try_get(0).is_ok_and(|n| n == Some(nonce)) => Some(row),
        _ => None,
    })
}

/// Whether a transaction is open or has failed; "yes" as well if it is not known.
pub(super) fn ask_for_transaction(client: &mut Client) -> Result<bool, ::postgres::Error> {
    Ok(!matches!(ask_who(client, false)?, Answer::Idle { .. }))
}

fn ask_for_pid(client: &mut Client) -> Result<Option<i32>, ::postgres::Error> {
    let answer = client.simple_query("SELECT pg_catalog.pg_backend_pid()")?;
    Ok(answer.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.try_get(0).ok()??.parse().ok(),
        _ => None,
    }))
}

// ---------------------------------------------------------------------------------------------------- cancelling

/// The time from a checkout to its return, in which what the connection does may be cancelled. Who cancels marks it before
/// anything is sent, and who returns the connection ends it: one of the two is first, and nobody waits for the other.
#[derive(Debug, Default)]
struct Lease(AtomicU8);

/// It begins as 0.
impl Lease {
    const CANCELLED: u8 = 1;
    const OVER: u8 = 2;

    /// `false`: it is over.
    fn cancel(&self) -> bool {
        let mark = |now| (now != Lease::OVER).then_some(Lease::CANCELLED);
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, mark).is_ok()
    }

    /// Whether it was cancelled: then a request may still be on its way.
    fn end(&self) -> bool {
        self.0.swap(Lease::OVER, Ordering::SeqCst) == Lease::CANCELLED
    }
}

/// Asks the server to cancel what one connection is doing, from any thread. Made by [`Connection::canceller`]; of use until
/// that connection is returned.
///
/// ```no_run
/// # fn f(pool: &millpond::postgres::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// use std::thread;
/// use std::time::Duration;
///
/// let mut client = pool.get()?;
/// let canceller = client.canceller();
/// thread::spawn(move || {
///     thread::sleep(Duration::from_secs(5));
///     let _ = canceller.cancel(); // an error if the query is done, and the connection returned
/// });
/// client.batch_execute("CALL a_long_one()")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Canceller {
    lease: Arc<Lease>,
    send: SendCancel,
    patience: Duration,
}

impl Canceller {
    /// Asks the server to cancel what the connection is doing. The query fails with SQLSTATE 57014, or ends before the
    /// request arrives. The connection is closed when it is returned.
    ///
    /// Waits until the server has taken the request, for at most `connect_timeout`, or 10 s. (Where connections are not
    /// observed the request is sent as the `postgres` crate does it, which hangs up at once instead. PgBouncer 1.18 then does
    /// not pass it on, and may end itself.)
    ///
    /// # Errors
    ///
    /// If the connection has been returned: nothing was done. If the request could not be sent. That it had an effect is
    /// not said by success.
    pub fn cancel(&self) -> Result<(), Error> {
        if !self.lease.cancel() {
            return Err(Error::own("nothing was cancelled: the connection has been returned", false));
        }
        (self.send)(self.patience)
    }
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// What is dropped elsewhere than in the pool: detached, or given to a customizer's `on_release`.
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
