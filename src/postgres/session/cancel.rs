//! How a query is cancelled: by the caller, with a [`Canceller`] that ends with the checkout, and by the pool.

use crate::leaf::text::Short;
use crate::postgres::error::Error;
use crate::postgres::wire::Watch;
use crossbeam_channel::bounded;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Asks the server to cancel what one connection is doing. Fails at the limit.
pub(in crate::postgres) type SendCancel = Arc<dyn Fn(Duration) -> Result<(), Error> + Send + Sync>;

/// How long the pool waits for a cancel request of its own to be sent and to have its effect.
pub(in crate::postgres) const CANCEL_LIMIT: Duration = Duration::from_secs(1);
/// How long a server takes to act on a cancel request, at best.
const REACTION: Duration = Duration::from_millis(1);

/// The time from a checkout to its return, in which the caller may cancel what the connection does. A canceller marks
/// the scope before it sends anything, and the return of the connection ends the scope. One of the two comes first, and
/// neither waits for the other.
#[derive(Debug, Default)]
pub(super) struct CancelScope(AtomicU8);

/// A scope begins as 0: neither cancelled nor over.
impl CancelScope {
    const CANCELLED: u8 = 1;
    const OVER: u8 = 2;

    /// Marks the scope as cancelled. `false`: the scope is over.
    fn cancel(&self) -> bool {
        let mark = |now| (now != CancelScope::OVER).then_some(CancelScope::CANCELLED);
        self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, mark).is_ok()
    }

    /// Ends the scope. `true`: a caller has cancelled, and the request may still be on its way.
    pub(super) fn end(&self) -> bool {
        self.0.swap(CancelScope::OVER, Ordering::SeqCst) == CancelScope::CANCELLED
    }
}

/// Asks the server to cancel what one connection is doing, from any thread. Made by
/// [`Connection::canceller`](super::Connection::canceller). It works until that connection is returned.
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
    scope: Arc<CancelScope>,
    send: SendCancel,
    limit: Duration,
}

impl Canceller {
    pub(super) fn new(scope: Arc<CancelScope>, send: SendCancel, limit: Duration) -> Canceller {
        Canceller { scope, send, limit }
    }

    /// Asks the server to cancel what the connection is doing. The query fails with SQLSTATE 57014, or ends before the
    /// request arrives. The connection is closed when it is returned.
    ///
    /// Waits until the server has taken the request, for at most `connect_timeout`, or 10 s. (Where connections are not
    /// observed the request is sent by the `postgres` crate, which hangs up at once instead. PgBouncer 1.18 then does
    /// not pass the request on, and may end itself.)
    ///
    /// # Errors
    ///
    /// If the connection has been returned: nothing was done. If the request could not be sent. Success does not say
    /// that the request had an effect.
    pub fn cancel(&self) -> Result<(), Error> {
        if !self.scope.cancel() {
            return Err(Error::own("nothing was cancelled: the connection has been returned", false));
        }
        (self.send)(self.limit)
    }
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").field("scope", &self.scope).finish_non_exhaustive()
    }
}

/// Asks the server to cancel what the connection behind `watch` is doing, and waits until it is done or the limit is
/// over. The pool does this before it aborts a connection: an abort must not wait for a server that is silent.
pub(in crate::postgres) fn cancel_within(limit: Duration, send: &SendCancel, watch: &Watch) {
    if !watch.is_waiting() {
        return;
    }
    let begun = Instant::now();
    let _ = send(limit);
    // The server's own error ("canceling statement due to user request") is to come before the abort.
    while watch.is_waiting() && begun.elapsed() < limit {
        thread::sleep(REACTION);
    }
    // The answer that has arrived needs a moment to reach the caller that waits for it.
    thread::sleep(REACTION);
}

/// Sends a cancel request on a thread of its own, since a TCP connect cannot be aborted, and waits for it. At the limit
/// the request is abandoned, by `abandon`.
pub(in crate::postgres) fn send_within(
    limit: Duration,
    send: impl FnOnce() -> Result<(), Error> + Send + 'static,
    abandon: impl FnOnce(),
) -> Result<(), Error> {
    let (done, wait) = bounded(1);
    let send = move || {
        let _ = done.send(send());
    };
    if let Err(e) = thread::Builder::new().name("millpond-cancel".into()).spawn(send) {
        return Err(Error::own(format!("cannot start a thread to cancel on: {e}"), false));
    }
    match wait.recv_timeout(limit) {
        Ok(sent) => sent,
        Err(_) => {
            abandon();
            Err(Error::own(format!("no answer to a request to cancel within {}", Short(limit)), false))
        }
    }
}
