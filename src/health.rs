//! [`Health`]: how a pool is, for probes and pages, and what is known of failed opens.

use crate::error::Cause;
use crate::leaf::text::{Escaping, Short};
use crate::ledger::FailedRun;
use std::fmt::{self, Write as _};
use std::time::Duration;

/// How a pool is, from its counters. See [`Pool::health`](crate::Pool::health).
///
/// A readiness probe answers "yes" while [`serves`](Health::serves): a full pool is no reason to take the traffic away, since
/// the other processes are as full. A liveness probe does not ask a pool at all: to restart a process repairs no server.
///
/// | | waiters | connections |
/// |---|---|---|
/// | `Ready` | none | one is idle, or may be opened |
/// | `Busy` | some, or none and all connections are in use | come back |
/// | `Stuck` | came, and none was served | none has come back for a while |
/// | `Down` | | attempts to open one fail, and none is there that comes back |
///
/// "A while" is half a second, or twice what the longest of the last thousand checkouts lasted, or three times the usual time to
/// open a connection: the longest of these. So a pool of long jobs is not called stuck for being one. While connections are in use
/// and none has ever come back, it is at least five seconds. One checkout that lasts much longer than all before makes a while at
/// most twice as long, so that one fault does not hide the next. Who came in vain counts for 30 s, if nobody else comes.
///
/// Where one or two connections serve checkouts of which a few last a hundred times as long as the others, a healthy pool may be
/// called stuck for a moment: let a probe ask twice before it takes the traffic away.
///
/// The pool looks at nothing but itself. That the server of an idle pool is gone it learns from the next caller, or from
/// [`keepalive`](crate::Builder::keepalive).
///
/// ```
/// # fn probe(pool: &millpond::Pool<impl millpond::Manage>) -> (u16, String) {
/// let health = pool.health();
/// (if health.serves() { 200 } else { 503 }, health.to_string())
/// # }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Health {
    /// A checkout is served at once, or as soon as a connection is opened.
    Ready,
    /// All connections are in use, or callers wait; and connections come back.
    Busy,
    /// Callers have come, and nothing has come back.
    Stuck {
        /// For how long.
        since: Duration,
    },
    /// Connections cannot be opened.
    Down {
        /// Why the last attempt failed.
        cause: Cause,
        /// How long ago the first attempt of this run failed.
        since: Duration,
        /// How many have failed since then.
        attempts: u64,
        /// In what time the next attempt is made, zero while one is under way. `None`: when somebody asks.
        next_try: Option<Duration>,
    },
    /// The pool is closed, or another process's, of which this one is a fork.
    Closed,
}

impl Health {
    /// Whether to send callers here: `Ready` and `Busy`.
    pub fn serves(&self) -> bool {
        matches!(self, Health::Ready | Health::Busy)
    }

    /// `ready`, `busy`, `stuck`, `down` or `closed`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Health::Ready => "ready",
            Health::Busy => "busy",
            Health::Stuck { .. } => "stuck",
            Health::Down { .. } => "down",
            Health::Closed => "closed",
        }
    }
}

/// One line: `down for 12.0 s, 7 attempts, the next in 150 ms: connection refused`.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Health::Ready | Health::Busy | Health::Closed => f.pad(self.as_str()),
            Health::Stuck { since } => write!(f, "stuck: nothing has come back for {}", Short(*since)),
            Health::Down { cause, since, attempts, next_try } => {
                let failing = Failing { since: *since, attempts: *attempts, next_try: *next_try };
                write!(Escaping(f), "down for {failing}: {cause}")
            }
        }
    }
}

/// The present run of failed attempts to open a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failing {
    /// How long ago the first attempt of the run failed.
    pub since: Duration,
    /// How many have failed since then.
    pub attempts: u64,
    /// In what time the next attempt is made, zero while one is under way. `None`: when somebody asks for a connection.
    pub next_try: Option<Duration>,
}

impl From<FailedRun> for Failing {
    fn from(run: FailedRun) -> Failing {
        Failing { since: run.since, attempts: run.attempts, next_try: run.next_try }
    }
}

/// `12.0 s, 7 attempts, the next in 150 ms`.
impl fmt::Display for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.attempts == 1 { "" } else { "s" };
        write!(f, "{}, {} attempt{s}, the next ", Short(self.since), self.attempts)?;
        match self.next_try {
            Some(Duration::ZERO) => f.write_str("under way"),
            Some(next) => write!(f, "in {}", Short(next)),
            None => f.write_str("when somebody asks"),
        }
    }
}

/// Why the last open failed that did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LastError {
    /// What the other side said, or the pool in its place.
    pub cause: Cause,
    /// How long ago.
    pub ago: Duration,
}

/// `12.0 s ago: connection refused`.
impl fmt::Display for LastError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{} ago: {}", Short(self.ago), self.cause)
    }
}
