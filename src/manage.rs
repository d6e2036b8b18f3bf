//! [`Manage`]: the seam between the pool and what it pools.

use crate::error::Cause;
use crate::leaf::sync::Mutex;
use crate::leaf::sync::atomic::{AtomicU64, Ordering};
use crate::settings::Settings;
use log::Level;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How a pool opens, checks, resets and closes one kind of connection.
///
/// Every [`r2d2::ManageConnection`] is a `Manage` (this crate implements it for all of them), so a manager made for
/// r2d2 works as it is. Implement `Manage` directly where more is known than r2d2's three methods can say: a validation
/// with a limit, the state in which a connection was returned, which errors will not go away by trying again. A type
/// cannot be both an r2d2 manager and a direct implementation: the compiler refuses the second as a conflict (E0119).
///
/// `open`, `validate`, `reset` and `close` may block: they run on threads of the pool's own, each within a limit past
/// which the pool goes on without them. (`validate` runs on the thread that calls `get` if
/// [`keeps_limits`](Manage::keeps_limits) says that it may.) Any of them may panic: that costs one connection.
///
/// ```
/// use millpond::{Cause, Manage, Opening, Pool, Returned};
/// use std::net::{TcpStream, ToSocketAddrs};
/// use std::time::Duration;
///
/// /// Plain TCP connections to one address.
/// struct Tcp(String);
///
/// impl Manage for Tcp {
///     type Connection = TcpStream;
///     type Error = std::io::Error;
///
///     fn open(&self, opening: &Opening) -> Result<TcpStream, std::io::Error> {
///         let addr = self.0.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
///         TcpStream::connect_timeout(&addr, opening.limit())
///     }
///
///     fn validate(&self, c: &mut TcpStream, _limit: Duration) -> Result<(), std::io::Error> {
///         c.take_error()?.map_or(Ok(()), Err)
///     }
///
///     fn keeps_limits(&self) -> bool {
///         true // `take_error` does not wait
///     }
///
///     fn returned(&self, _: &mut TcpStream) -> Returned {
///         Returned::Keep
///     }
/// }
///
/// let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// let pool = Pool::builder().build(Tcp(listener.local_addr()?.to_string()))?;
/// assert!(pool.get()?.peer_addr().is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Manage: Send + Sync + 'static {
    /// What is pooled.
    type Connection: Send + 'static;

    /// What can go wrong. It need not be `Send`: it is [explained](Manage::explain) on the thread where it came up.
    type Error: std::error::Error + 'static;

    /// Opens a connection, within [`Opening::limit`] if it can: an attempt that takes longer is abandoned.
    ///
    /// # Errors
    ///
    /// Whatever the other side says. What [`explain`](Manage::explain) calls permanent fails all waiters at once.
    fn open(&self, opening: &Opening) -> Result<Self::Connection, Self::Error>;

    /// Finds out whether the connection still works.
    ///
    /// # Errors
    ///
    /// If it does not: the connection is then closed, and its siblings are checked before they are handed out.
    fn validate(&self, connection: &mut Self::Connection, limit: Duration) -> Result<(), Self::Error>;

    /// Whether [`validate`](Manage::validate) always ends within its limit, whatever the network does. Then it may run
    /// on the thread that calls `get`, which saves two context switches; otherwise it runs on the pool's.
    fn keeps_limits(&self) -> bool {
        false
    }

    /// Looks at a connection without asking the other side anything: whether news of its end has arrived. For callers
    /// that cannot wait for a [`validate`](Manage::validate): [`Pool::try_get`](crate::Pool::try_get) and a timeout of
    /// zero. Runs on the thread of the caller, and must not block.
    ///
    /// `Some(Ok(()))`: as far as can be seen from here it is well. It may then be handed out although it was unused for
    /// a while, but not if it is under suspicion, for a server that is merely silent is not seen. `Some(Err(_))`: it is
    /// dead, with the consequences of a failed `validate`. `None`, the default: nothing can be seen.
    fn peek(&self, _connection: &mut Self::Connection) -> Option<Result<(), Self::Error>> {
        None
    }

    /// Looks at a connection as it is returned, on the thread that returns it. Must not block.
    fn returned(&self, connection: &mut Self::Connection) -> Returned;

    /// Cleans a connection that was [`Returned::Reset`]. Runs on the pool's own threads, within `close_timeout`.
    ///
    /// # Errors
    ///
    /// If that cannot be done: the connection is then closed.
    fn reset(&self, _connection: &mut Self::Connection, _limit: Duration) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Whether a [`reset`](Manage::reset) that succeeds has undone what a customizer's `on_acquire` set. If so
    /// `on_acquire` runs again after each, as part of it: if it fails, so has the reset. By default `false`: it runs
    /// once for each connection.
    fn undoes_on_acquire(&self) -> bool {
        false
    }

    /// What is to be said of the state in which a connection was returned for a reset. It goes to the log as a warning,
    /// with the thread and the line of source that had checked the connection out. Asked once, after `reset`.
    ///
    /// It completes the sentence "#7, checked out by thread 'worker' at src/main.rs:12:5, ...".
    fn remark(&self, _connection: &mut Self::Connection) -> Option<String> {
        None
    }

    /// Closes a connection; by default by dropping it.
    fn close(&self, connection: Self::Connection, _limit: Duration) {
        drop(connection);
    }

    /// Looks at the first connection of a pool, before `build` returns: for what needs the server to be answered.
    ///
    /// # Errors
    ///
    /// If the pool should not start: `build` fails with this cause.
    fn started(&self, _connection: &mut Self::Connection, _start: &Start<'_>) -> Result<(), Cause> {
        Ok(())
    }

    /// The server's own number for this connection, such as the process id of a PostgreSQL backend.
    fn server_id(&self, _connection: &Self::Connection) -> Option<u64> {
        None
    }

    /// Says in words what went wrong, and whether trying again can help.
    fn explain(&self, error: &Self::Error) -> Cause {
        Cause::text(error)
    }
}

/// The start of a pool, as [`Manage::started`] sees it.
pub struct Start<'a> {
    settings: &'a Settings,
    record: &'a dyn Fn(Level, String),
}

impl<'a> Start<'a> {
    pub(crate) fn new(settings: &'a Settings, record: &'a dyn Fn(Level, String)) -> Self {
        Start { settings, record }
    }

    /// The settings of the pool.
    pub fn settings(&self) -> &Settings {
        self.settings
    }

    /// Logs something at info, as the pool logs: from a thread that the logger may block.
    pub fn info(&self, text: impl fmt::Display) {
        (self.record)(Level::Info, text.to_string());
    }

    /// The same at warn.
    pub fn warn(&self, text: impl fmt::Display) {
        (self.record)(Level::Warn, text.to_string());
    }
}

impl fmt::Debug for Start<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start").field("settings", self.settings).finish_non_exhaustive()
    }
}

impl<M: r2d2::ManageConnection> Manage for M {
    type Connection = <M as r2d2::ManageConnection>::Connection;
    type Error = <M as r2d2::ManageConnection>::Error;

    fn open(&self, _: &Opening) -> Result<Self::Connection, Self::Error> {
        self.connect()
    }

    fn validate(&self, connection: &mut Self::Connection, _: Duration) -> Result<(), Self::Error> {
        self.is_valid(connection)
    }

    fn returned(&self, connection: &mut Self::Connection) -> Returned {
        if self.has_broken(connection) { Returned::Broken } else { Returned::Keep }
    }
}

/// The state in which a connection is returned, as [`Manage::returned`] sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Returned {
    /// Fit to be handed out again.
    Keep,
    /// To be [reset](Manage::reset) before anyone else gets it.
    Reset,
    /// To be closed. Says nothing of other connections.
    Discard,
    /// Dead. Other connections are suspect: each is validated before it is handed out again.
    Broken,
    /// Of the past (a node that is no longer the primary, say): every connection opened before now is replaced.
    Outdated,
}

type Hook = Arc<dyn Fn() + Send + Sync>;

/// One attempt to open a connection, and what the manager lets the pool do about it from outside.
///
/// What is registered here stays valid for the connection that comes of it, as long as that lives.
pub struct Opening {
    pool: Arc<str>,
    limit: Duration,
    hooks: Mutex<Hooks>,
    server_id: AtomicU64,
}

#[derive(Default)]
struct Hooks {
    abort: Option<Hook>,
    cancel: Option<Hook>,
    aborted: bool,
}

impl Opening {
    pub(crate) fn new(pool: Arc<str>, limit: Duration) -> Self {
        Opening { pool, limit, hooks: Mutex::default(), server_id: AtomicU64::new(u64::MAX) }
    }

    /// The name of the pool.
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// How long the attempt may take.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Registers what makes a call that is stuck in this connection (`open` itself, `validate`, `reset`, `close`, or a
    /// user's own) fail at once. The pool calls it on one of its own threads when a job is abandoned, and when the
    /// grace of a `close` is over. It must not block, and may be called at any time and more than once.
    ///
    /// Called at once if the attempt was abandoned before this was registered.
    pub fn on_abort(&self, abort: impl Fn() + Send + Sync + 'static) {
        let abort: Hook = Arc::new(abort);
        let mut hooks = self.hooks.lock();
        hooks.abort = Some(Arc::clone(&abort));
        let late = hooks.aborted;
        drop(hooks);
        if late {
            abort();
        }
    }

    /// Registers what asks the server to stop what this connection is doing. The pool calls it on one of its own
    /// threads when the grace of a `close` is over and the connection is still in use, and aborts it then. It may
    /// block.
    pub fn on_cancel(&self, cancel: impl Fn() + Send + Sync + 'static) {
        self.hooks.lock().cancel = Some(Arc::new(cancel));
    }

    pub(crate) fn abort(&self) {
        let abort = self.hooks.lock().abort.clone();
        if let Some(abort) = abort {
            abort();
        }
    }

    /// From now on [`on_abort`](Opening::on_abort) calls what it registers at once. Returns whether anything is
    /// registered already, to abort or to cancel.
    pub(crate) fn abort_from_now_on(&self) -> bool {
        let mut hooks = self.hooks.lock();
        hooks.aborted = true;
        hooks.abort.is_some() || hooks.cancel.is_some()
    }

    /// Whether the attempt was abandoned.
    #[cfg(feature = "postgres")]
    pub(crate) fn is_aborted(&self) -> bool {
        self.hooks.lock().aborted
    }

    pub(crate) fn cancel(&self) {
        let cancel = self.hooks.lock().cancel.clone();
        if let Some(cancel) = cancel {
            cancel();
        }
    }

    pub(crate) fn set_server_id(&self, id: Option<u64>) {
        self.server_id.store(id.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn server_id(&self) -> Option<u64> {
        Some(self.server_id.load(Ordering::Relaxed)).filter(|&id| id != u64::MAX)
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("pool", &self.pool).field("limit", &self.limit).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaf::sync::atomic::AtomicU32;

    #[test]
    fn an_abort_before_on_abort_is_not_missed() {
        let opening = Opening::new("p".into(), Duration::from_secs(1));
        let aborts = Arc::new(AtomicU32::new(0));
        assert!(!opening.abort_from_now_on());
        let seen = Arc::clone(&aborts);
        opening.on_abort(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(aborts.load(Ordering::Relaxed), 1);
        opening.abort();
        assert_eq!(aborts.load(Ordering::Relaxed), 2);
    }
}
