//! The result of an audit: [`Audit`], its [`Backend`]s, and the [`Owner`] of each.

use crate::ConnectionInfo;
use crate::postgres::operations::manager::Pool;
use crate::postgres::wire::Connector;
use crate::stats::Connections;
use log::Level;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What the server knows of the backends of this application, and what the pool knows of them. Made by
/// [`audit`](crate::postgres::audit()).
///
/// [`Display`](std::fmt::Display) prints a table:
///
/// ```text
/// audit of pool 'orders', app on database shop: 4 backends: 2 of this pool, 1 of another process here, 1 orphaned
/// pid   state   for       age       in tx     waiting on       whose
/// 4711  active  1.20 s    12.0 min  1.20 s    Lock tuple       #3 in use by 'worker-1' at src/main.rs:12:5
/// 4712  idle    40.0 s    11.8 min  -         -                #4 idle
/// 4720  idle    3.10 s    2.00 min  -         -                another process here (4242 by its name)
/// 4690  active  17.0 min  17.1 min  17.0 min  Timeout PgSleep  ORPHANED (4100 by its name): its client has closed
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Audit {
    /// The name of the pool.
    pub pool: String,
    /// The role whose backends were looked for.
    pub role: String,
    /// The database in which they were looked for.
    pub database: String,
    /// The `application_name` of this process's connections, by which others were looked for. If it ends in this
    /// process's id in brackets, as that of this manager does, another process may have its own id there. Otherwise it
    /// must be the same.
    pub application_name: String,
    /// The server's backends, the oldest first.
    pub backends: Vec<Backend>,
    /// Connections of the pool that the server does not know: they were ended and the pool has not noticed yet, or lead
    /// to another server.
    pub missing: Connections,
    /// What could not be found out, and why.
    pub notes: Vec<String>,
    pub(super) log: Log,
}

impl Audit {
    /// The backends that are proven to have no client any more. See [`audit`](crate::postgres::audit()) for what that
    /// takes.
    pub fn orphans(&self) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(|b| b.owner == Owner::Orphaned)
    }
}

/// The log of the pool that was audited, which an audit may outlive.
#[derive(Clone)]
pub(super) struct Log(Arc<dyn Fn(Level, String) + Send + Sync>);

impl Log {
    pub(super) fn of<T: Connector>(pool: &Pool<T>) -> Log {
        Log(Arc::new(pool.recorder()))
    }

    pub(super) fn warn(&self, text: String) {
        (self.0)(Level::Warn, text);
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

/// One backend, as `pg_stat_activity` has it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Backend {
    /// The process id of the backend, on the server's host.
    pub pid: i32,
    /// Its `application_name`, as its client set it.
    pub application_name: String,
    /// The process id of its client, by its `application_name`. It is a hint only: the process may be on another
    /// machine, or in a container with numbers of its own, and a pooler passes on the name of its client.
    pub process: Option<u32>,
    /// Its client's address, as the server sees it. `None`: a unix socket, or hidden.
    pub client: Option<SocketAddr>,
    /// When the server started it. `None`: hidden from the role that asked.
    pub backend_start: Option<SystemTime>,
    /// The time since then, by the server's clock. `None`: hidden.
    pub age: Option<Duration>,
    /// `active`, `idle`, `idle in transaction`, ... `None`: hidden.
    pub state: Option<String>,
    /// How long it has been in that state. `None`: hidden.
    pub since: Option<Duration>,
    /// How long it has been in a transaction, if it is.
    pub in_transaction_for: Option<Duration>,
    /// What it waits for: type and name of the wait event, if any. An idle backend waits for its client.
    pub waiting_on: Option<String>,
    /// Whose it is.
    pub owner: Owner,
    /// The pool's own row for it, if it has one.
    pub connection: Option<ConnectionInfo>,
    /// Why its owner is not known, if it is not.
    pub note: Option<String>,
}

impl Backend {
    /// How long it has been idle, in a transaction or not, if it is idle.
    pub fn idle_for(&self) -> Option<Duration> {
        if self.is_idle() { self.since } else { None }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.starts_with("idle"))
    }

    /// Whether this is the same backend as `earlier`.
    pub(super) fn is(&self, earlier: &Backend) -> bool {
        (self.pid, self.backend_start, &self.application_name)
            == (earlier.pid, earlier.backend_start, &earlier.application_name)
    }

    /// Whether it is known to be busy.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.state.as_deref(), Some("active" | "fastpath function call"))
    }
}

/// Whose a backend is: who holds the client's end of its connection.
///
/// Every word but [`Unknown`](Owner::Unknown) is proven. The process id in an `application_name` proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Owner {
    /// This pool's: its row is in [`Backend::connection`]. The server gave the pool this very pid for it, and this
    /// process holds the client's end. Where the kernel cannot be asked (a unix socket, a tunnel, another network
    /// behind translated addresses), the backend must be as old as the connection. (A pooler in transaction mode may
    /// have passed the backend on since. Where connections are not [observed](crate::postgres#the-observer), a pooler
    /// cannot be seen, and a [note](Audit::notes) says so.)
    Pool,
    /// The connection on which the audit itself was made.
    Audit,
    /// This process's, but not in the pool: detached, being opened or closed, abandoned, or of another pool of the same
    /// name; or of a proxy or tunnel within this process, for any client.
    ThisProcess,
    /// Another process's, on this host: a pool of the same name, a pooler, or the end of a tunnel. That process holds
    /// the client's end.
    Other,
    /// No process's: the backend is busy, and the client's end of its connection is closed. No process can ever read
    /// its answer.
    Orphaned,
    /// The owner cannot be found out from here: [`Backend::note`] says why.
    Unknown,
}

/// Backends for the tests of an audit.
#[cfg(test)]
pub(super) mod staged {
    use super::*;

    pub(in super::super) const CLIENT: &str = "127.0.0.1:2000";
    pub(in super::super) const START: SystemTime = SystemTime::UNIX_EPOCH;
    pub(in super::super) const OLD: Duration = Duration::from_secs(100);

    /// A backend under another's name.
    pub(in super::super) fn backend(client: Option<&str>, state: &str) -> Backend {
        Backend {
            pid: 7,
            application_name: "orders [42]".into(),
            process: Some(42),
            client: client.map(|c| c.parse().unwrap()),
            backend_start: Some(START),
            age: Some(OLD),
            state: Some(state.into()),
            since: Some(Duration::ZERO),
            in_transaction_for: None,
            waiting_on: None,
            owner: Owner::Unknown,
            connection: None,
            note: None,
        }
    }
}
