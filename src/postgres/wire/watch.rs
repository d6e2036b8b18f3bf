//! [`Watch`]: what is known of one connection, and the switch that aborts it. The stream and the pool share it.
//!
//! Its methods block on nothing but a short lock, so any thread may call them at any time.

use super::probe::Probe;
#[cfg(unix)]
use super::scanner::Key;
use super::scanner::{Scanner, Status};
use ::postgres::error::SqlState;
use parking_lot::{Mutex, MutexGuard};
use std::io;
#[cfg(unix)]
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

/// What is known of one connection, and the switch that aborts it.
#[derive(Debug)]
pub(in crate::postgres) struct Watch {
    scanner: Mutex<Scanner>,
    aborted: AtomicBool,
    /// Wakes the thread that waits for the stream. A waker keeps that thread's runtime alive, so it is dropped with the
    /// stream.
    waker: Mutex<Option<Waker>>,
    pub(super) probe: Probe,
    /// The unix socket that the stream is connected to; `None`: it is TCP.
    #[cfg(unix)]
    socket: Mutex<Option<PathBuf>>,
}

impl Watch {
    pub(in crate::postgres) fn new() -> Arc<Watch> {
        Arc::new(Watch {
            scanner: Mutex::new(Scanner::new()),
            aborted: AtomicBool::new(false),
            waker: Mutex::new(None),
            probe: Probe::default(),
            #[cfg(unix)]
            socket: Mutex::new(None),
        })
    }

    /// Ends the connection for good: every call that waits for it, now or later, fails at once with
    /// `ConnectionAborted`.
    pub(in crate::postgres) fn abort(&self) {
        // The switch is set before the waker is taken: see [`Watched::wake_on_abort`].
        self.aborted.store(true, Ordering::SeqCst);
        let waker = self.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(in crate::postgres) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }

    /// See [`Status`].
    pub(in crate::postgres) fn status(&self) -> Status {
        self.scanner.lock().status()
    }

    /// See [`Scanner::pid`].
    pub(in crate::postgres) fn pid(&self) -> Option<i32> {
        self.scanner.lock().pid()
    }

    /// The unix socket that the stream is connected to; `None`: it is TCP.
    #[cfg(unix)]
    pub(super) fn socket(&self) -> Option<PathBuf> {
        self.socket.lock().clone()
    }

    /// See [`Scanner::key`].
    #[cfg(unix)]
    pub(super) fn key(&self) -> Option<Key> {
        self.scanner.lock().key()
    }

    /// See [`Scanner::expect_little`].
    pub(in crate::postgres) fn expect_little(&self) {
        self.scanner.lock().expect_little();
    }

    /// See [`Scanner::in_copy`].
    pub(in crate::postgres) fn in_copy(&self) -> bool {
        self.scanner.lock().in_copy()
    }

    /// See [`Scanner::is_busy`]. To be busy is no fault: after an error the answer's end is often still under way, and
    /// comes before the answer to a ping.
    pub(in crate::postgres) fn is_busy(&self) -> bool {
        self.scanner.lock().is_busy()
    }

    /// See [`Scanner::is_mid_message`]. This is no fault either: the rest is on its way, and comes before the next
    /// answer.
    pub(in crate::postgres) fn is_mid_message(&self) -> bool {
        self.scanner.lock().is_mid_message()
    }

    /// A caller may be waiting for an answer, and the backend at work for it. (A request that has failed does not
    /// count: its end may remain unread while the connection is not used.)
    pub(in crate::postgres) fn is_waiting(&self) -> bool {
        let scanner = self.scanner.lock();
        scanner.has_unanswered() && !scanner.has_oldest_failed() && !scanner.is_lost() && !self.is_aborted()
    }

    /// The connection can only be closed.
    pub(in crate::postgres) fn is_lost(&self) -> bool {
        self.is_aborted() || self.scanner.lock().is_lost()
    }

    /// The connection is fit for any caller: nothing is under way, no transaction is open, and it is not lost. A
    /// request that is queued and not yet written is not seen: [`flush`](super::flush) first.
    pub(in crate::postgres) fn is_idle(&self) -> bool {
        self.scanner.lock().is_idle() && !self.is_aborted()
    }

    /// See [`Scanner::is_clean`]. As [`is_idle`](Watch::is_idle), it does not see what is queued.
    pub(in crate::postgres) fn is_clean(&self) -> bool {
        self.scanner.lock().is_clean() && !self.is_aborted()
    }

    /// See [`Scanner::has_failed_request`].
    pub(in crate::postgres) fn has_failed_request(&self) -> bool {
        self.scanner.lock().has_failed_request()
    }

    /// To be called when it is certain that questions and answers match.
    pub(in crate::postgres) fn forget_failures(&self) {
        self.scanner.lock().forget_failures();
    }

    /// See [`Scanner::fatal`].
    pub(in crate::postgres) fn fatal(&self) -> Option<SqlState> {
        let code = self.scanner.lock().fatal()?;
        std::str::from_utf8(&code).ok().map(SqlState::from_code)
    }

    /// The SQLSTATE and the text with which the server ended the connection.
    pub(in crate::postgres) fn fatal_error(&self) -> Option<(SqlState, String)> {
        let code = self.fatal()?;
        Some((code, self.scanner.lock().fatal_text().unwrap_or_default().to_owned()))
    }

    /// See [`Scanner::take_refused_write`].
    pub(in crate::postgres) fn take_refused_write(&self) -> bool {
        self.scanner.lock().take_refused_write()
    }

    /// See [`Scanner::has_missed_a_statement`].
    pub(in crate::postgres) fn has_missed_a_statement(&self) -> bool {
        self.scanner.lock().has_missed_a_statement()
    }

    /// See [`Scanner::take_refused_statement`].
    pub(in crate::postgres) fn take_refused_statement(&self) -> bool {
        self.scanner.lock().take_refused_statement()
    }

    /// The node says that it takes writes, as of the last answer. So if a write was refused, it was for its
    /// transaction. Servers before PostgreSQL 14 and poolers say nothing.
    pub(in crate::postgres) fn takes_writes(&self) -> bool {
        let scanner = self.scanner.lock();
        let node = (scanner.in_hot_standby(), scanner.read_only_by_default());
        node == (Some(false), Some(false)) && !scanner.is_busy()
    }
}

#[cfg(test)]
impl Watch {
    /// See [`Scanner::is_poisoned`].
    pub(super) fn is_poisoned(&self) -> bool {
        self.scanner.lock().is_poisoned()
    }

    /// See [`Scanner::outstanding`].
    pub(super) fn outstanding(&self) -> usize {
        self.scanner.lock().outstanding()
    }

    /// See [`Scanner::in_hot_standby`].
    pub(super) fn in_hot_standby(&self) -> Option<bool> {
        self.scanner.lock().in_hot_standby()
    }

    /// See [`Scanner::read_only_by_default`].
    pub(super) fn read_only_by_default(&self) -> Option<bool> {
        self.scanner.lock().read_only_by_default()
    }

    /// Whether a stream's thread, and with it its runtime, is kept to be woken.
    pub(super) fn has_waker(&self) -> bool {
        self.waker.lock().is_some()
    }
}

/// A stream's half of its watch. The stream that has this is the one that is watched.
pub(super) struct Watched(Arc<Watch>);

impl Watched {
    /// Begins a new stream. One `connect` may try several addresses, so all that was known of the last stream is
    /// forgotten.
    pub(super) fn begin(watch: Arc<Watch>) -> Watched {
        *watch.scanner.lock() = Scanner::new();
        #[cfg(unix)]
        drop(watch.socket.lock().take());
        Watched(watch)
    }

    /// The stream is connected to this unix socket.
    #[cfg(unix)]
    pub(super) fn over(&self, socket: &Path) {
        *self.0.socket.lock() = Some(socket.to_owned());
    }

    /// Fails if the connection was aborted. It is called before every poll.
    #[inline]
    pub(super) fn check(&self) -> io::Result<()> {
        if self.0.is_aborted() { Err(aborted()) } else { Ok(()) }
    }

    /// Has an abort wake the thread that polls, and fails if the connection was aborted already. Whatever polls a stream
    /// calls this before it says `Pending`. It stores the waker first, and then reads the switch; [`Watch::abort`] sets
    /// the switch first, and then takes the waker. So a stream either sees the abort here, or is woken by it.
    pub(super) fn wake_on_abort(&self, cx: &Context<'_>) -> io::Result<()> {
        match &mut *self.0.waker.lock() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        self.check()
    }

    pub(super) fn scanner(&self) -> MutexGuard<'_, Scanner> {
        self.0.scanner.lock()
    }

    pub(super) fn probe(&self) -> &Probe {
        &self.0.probe
    }
}

#[cold]
fn aborted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was aborted")
}

impl Drop for Watched {
    fn drop(&mut self) {
        let waker = self.0.waker.lock().take();
        drop(waker);
    }
}
