//! Why there is no connection: [`Error`], in the words an operator needs, and [`Cause`], in the words of the other
//! side.

use crate::leaf::failures::ErrorType;
use crate::leaf::shield::Panic;
use crate::leaf::text::Short;
use crate::leaf::text::{self, Brief, Escaping};
use crate::ledger::{OpenError, Reach};
use crate::stats::ConnectionInfo;
use std::error::Error as StdError;
use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind as IoErrorKind};
use std::iter::successors;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

/// Why a pool could not be built, or gave no connection.
///
/// An error is one word wide, so that a `Result` with it costs nothing to move; [`kind`](Error::kind) has the details.
pub struct Error(Box<ErrorKind>);

/// What went wrong, with the details.
#[derive(Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No connection came in time.
    Timeout(Timeout),
    /// The other side refuses, for a reason that will not go away by trying again: a wrong password, say.
    Connect(Connect),
    /// The pool is closed.
    Closed(Closed),
    /// As many wait already as `max_waiting` allows.
    TooManyWaiting(TooManyWaiting),
    /// A setting that cannot be.
    Config(Config),
}

/// [`ErrorKind::Timeout`]: what the pool looked like when the deadline came.
#[derive(Debug)]
#[non_exhaustive]
pub struct Timeout {
    /// The name of the pool.
    pub pool: String,
    /// How long the caller was ready to wait.
    pub timeout: Duration,
    /// The greatest number of connections, as set then.
    pub max_size: u32,
    /// Connections in use.
    pub in_use: u32,
    /// Connections that were being opened.
    pub opening: u32,
    /// Connections that were being checked or reset.
    pub checking: u32,
    /// Connections that were being closed.
    pub closing: u32,
    /// Abandoned jobs (those past their limit) that have not ended. With as many as `max_size` of them the pool opens
    /// no more than one connection a minute, unless the last attempt came through.
    pub abandoned: u32,
    /// Other callers that waited.
    pub waiting: u32,
    /// The connections that were in use for the longest time, each with the thread and line that had checked it out:
    /// [`MOST_SHOWN`](Timeout::MOST_SHOWN) of them at most, the longest first.
    pub longest_in_use: Vec<ConnectionInfo>,
    /// How many of the connections in use the very thread that got this error had checked out. (It may have moved
    /// them to other threads since.)
    pub checked_out_here: u32,
    /// The last failure to open a connection, if none has been opened since.
    pub cause: Option<Cause>,
}

impl Timeout {
    /// How many connections are named at most.
    pub const MOST_SHOWN: usize = 5;
}

/// [`ErrorKind::Connect`]: a permanent refusal.
#[derive(Debug)]
#[non_exhaustive]
pub struct Connect {
    /// The name of the pool.
    pub pool: String,
    /// What the other side said.
    pub cause: Cause,
}

/// [`ErrorKind::Closed`]: who closed the pool.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Closed {
    /// The name of the pool.
    pub pool: String,
    /// What closed it, such as `close` or the drop of a guard.
    pub by: &'static str,
    /// Where in the source that was called or made; `None` if only its handles were dropped.
    pub at: Option<&'static Location<'static>>,
    /// The thread on which that happened.
    pub thread: String,
    /// How long ago.
    pub ago: Duration,
}

/// [`ErrorKind::TooManyWaiting`].
#[derive(Debug)]
#[non_exhaustive]
pub struct TooManyWaiting {
    /// The name of the pool.
    pub pool: String,
    /// How many wait.
    pub waiting: u32,
    /// The limit.
    pub max_waiting: u32,
}

/// [`ErrorKind::Config`]: which setting, and why not.
#[derive(Debug)]
#[non_exhaustive]
pub struct Config {
    /// The setting's name.
    pub setting: &'static str,
    /// What is wrong, with the value and the limit.
    pub problem: String,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind) -> Error {
        Error(Box::new(kind))
    }

    pub(crate) fn config(setting: &'static str, problem: impl Into<String>) -> Error {
        Error::new(ErrorKind::Config(Config { setting, problem: problem.into() }))
    }

    /// What went wrong, with the details.
    pub fn kind(&self) -> &ErrorKind {
        &self.0
    }

    /// Whether no connection came in time.
    pub fn is_timeout(&self) -> bool {
        matches!(*self.0, ErrorKind::Timeout(_))
    }

    /// Whether no connection came in time although the pool was not full: the server could not be reached, or took too
    /// long. A server that answers 503 does so for this as well as for [`is_exhausted`](Error::is_exhausted), but with no
    /// `Retry-After`, since the pool cannot know when. The [cause](Error::cause) says why, if an attempt to connect failed.
    pub fn is_unavailable(&self) -> bool {
        self.is_timeout() && !self.is_exhausted()
    }

    /// Whether the other side refuses for a reason that will not go away by trying again: a wrong password, say.
    pub fn is_connect(&self) -> bool {
        matches!(*self.0, ErrorKind::Connect(_))
    }

    /// Whether the pool is closed.
    pub fn is_closed(&self) -> bool {
        matches!(*self.0, ErrorKind::Closed(_))
    }

    /// Whether too many wait already.
    pub fn is_too_many_waiting(&self) -> bool {
        matches!(*self.0, ErrorKind::TooManyWaiting(_))
    }

    /// Whether a setting was refused.
    pub fn is_config(&self) -> bool {
        matches!(*self.0, ErrorKind::Config(_))
    }

    /// Whether the pool has all it may have and all of it is in use: a server that answers 503 with `Retry-After` does so for
    /// this. (`false` while a connection is being opened, for then it is the other side that takes its time: see
    /// [`is_unavailable`](Error::is_unavailable).)
    pub fn is_exhausted(&self) -> bool {
        match &*self.0 {
            ErrorKind::Timeout(t) => t.in_use > 0 && t.opening == 0 && t.in_use + t.checking + t.closing >= t.max_size,
            ErrorKind::TooManyWaiting(_) => true,
            _ => false,
        }
    }

    /// What the other side said, if the error has to do with it.
    pub fn cause(&self) -> Option<&Cause> {
        match &*self.0 {
            ErrorKind::Timeout(t) => t.cause.as_ref(),
            ErrorKind::Connect(c) => Some(&c.cause),
            _ => None,
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One line: what comes from outside, the pool's name too, is escaped.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaping(f);
        match &*self.0 {
            ErrorKind::Timeout(t) => write!(f, "{t}"),
            ErrorKind::Connect(c) => write!(f, "pool '{}' cannot connect: {}", c.pool, c.cause),
            ErrorKind::Closed(c) => write!(f, "{c}"),
            ErrorKind::TooManyWaiting(t) => {
                write!(f, "pool '{}': {} wait already, and max_waiting is {}", t.pool, t.waiting, t.max_waiting)
            }
            ErrorKind::Config(c) => write!(f, "{}: {}", c.setting, c.problem),
        }
    }
}

/// The text of the cause stands in `Display`, so there is no `source` that would say it twice; see [`Error::cause`].
impl StdError for Error {}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaping(f);
        write!(f, "pool '{}': no connection within {}", self.pool, Short(self.timeout))?;
        match &self.cause {
            Some(cause) if self.in_use == 0 => write!(f, ": none can be opened: {cause}")?,
            _ if self.in_use >= self.max_size => write!(f, ": all {} are in use", self.max_size)?,
            _ => {
                write!(f, ": {} of {} in use", self.in_use, self.max_size)?;
                for (n, what) in
                    [(self.opening, "being opened"), (self.checking, "being checked"), (self.closing, "being closed")]
                {
                    if n > 0 {
                        write!(f, ", {n} {what}")?;
                    }
                }
                if self.abandoned > 0 {
                    write!(f, "; {} abandoned and not back", self.abandoned)?;
                }
            }
        }
        if self.checked_out_here > 0 {
            write!(f, "; {} of them checked out by this very thread", self.checked_out_here)?;
        }
        for (i, row) in self.longest_in_use.iter().enumerate() {
            let lead = if i == 0 { "; in use the longest: " } else { ", " };
            write!(f, "{lead}{}", row.in_use())?;
        }
        if self.waiting > 0 {
            write!(f, "; {} more wait", self.waiting)?;
        }
        match &self.cause {
            Some(cause) if self.in_use > 0 => write!(f, "; the last attempt to open one failed: {cause}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaping(f);
        write!(f, "pool '{}' is closed: {}", self.pool, self.by)?;
        if let Some(at) = self.at {
            write!(f, " ({at})")?;
        }
        write!(f, " on thread {}, {} ago", self.thread, Short(self.ago))
    }
}

/// What the other side said, in a form that travels between threads: the text of the whole chain of sources, whether
/// trying again can help, and the error itself where the manager could hand it on.
///
/// The text is for people: control characters, line breaks and what else would do something to a terminal or a log are
/// escaped (`\n`, `\u{1b}`), and what is longer than 1 KiB is cut and says so. The error itself is as it came.
#[derive(Clone)]
pub struct Cause {
    text: Arc<str>,
    reach: Reach,
    error_type: ErrorType,
    error: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Cause {
    /// The text of `error` and of all its sources. (An error's own text often leaves out the sources: that of
    /// `postgres::Error` for a wrong password is "db error".)
    pub fn text(error: &(dyn StdError + 'static)) -> Cause {
        let mut text = Brief::new(text::CAUSE);
        text.push(error);
        let mut source = error.source();
        while let Some(next) = source.filter(|_| !text.is_cut()) {
            let part = text::brief(next, text::CAUSE);
            // Some errors' own text has that of their source in it.
            if !text.as_str().contains(&part) {
                text.push(format_args!(": {part}"));
            }
            source = next.source();
        }
        let reach = if nobody_listens(error) { Reach::Nobody } else { Reach::Server };
        Cause { reach, error_type: ErrorType::of(error), ..Cause::shown(text.finish()) }
    }

    /// A cause in the manager's own words.
    pub fn message(text: impl Into<String>) -> Cause {
        Cause::shown(text::brief(text.into(), text::CAUSE))
    }

    fn shown(text: String) -> Cause {
        Cause { text: text.into(), reach: Reach::Server, error_type: ErrorType::OTHER, error: None }
    }

    /// A cause with the error itself, for [`downcast_ref`](Cause::downcast_ref).
    pub fn of<E: StdError + Send + Sync + 'static>(error: E) -> Cause {
        Cause { error: Some(Arc::new(error) as Arc<dyn StdError + Send + Sync>), ..Cause::message("") }.with_own_text()
    }

    /// Whether it has an error of the manager's own, whose drop is the manager's code.
    pub(crate) fn is_typed(&self) -> bool {
        self.error.is_some()
    }

    fn with_own_text(mut self) -> Cause {
        if let Some(error) = &self.error {
            Cause { text: self.text, reach: self.reach, error_type: self.error_type, .. } = Cause::text(&**error);
        }
        self
    }

    /// What the ledger has to know of an open that failed with this cause.
    pub(crate) fn open_error(&self) -> OpenError {
        OpenError { reach: self.reach, error_type: self.error_type.clone() }
    }

    /// The same cause, of an attempt that got so far.
    #[cfg(feature = "postgres")]
    pub(crate) fn reaching(self, reach: Reach) -> Cause {
        Cause { reach, ..self }
    }

    /// The same cause, with this as its [`error_type`](Cause::error_type): for a manager whose errors have a code. Take it
    /// from few: a pool keeps sixteen apart. It is escaped, and cut after 64 bytes. An empty one is `_OTHER`.
    ///
    /// ```
    /// let cause = millpond::Cause::message("access denied").with_error_type("1045");
    /// assert_eq!(cause.error_type(), "1045");
    /// ```
    #[must_use]
    pub fn with_error_type(mut self, error_type: impl AsRef<str>) -> Cause {
        self.error_type = ErrorType::of_other(error_type.as_ref());
        self
    }

    /// The same cause, of a type that is known to be harmless.
    pub(crate) fn of_type(self, error_type: ErrorType) -> Cause {
        Cause { error_type, ..self }
    }

    /// A short name of the kind of error, by which [`Stats::failed_opens_of`](crate::Stats::failed_opens_of) and the metrics count.
    ///
    /// That of an error of the operating system, which may be a source of the error, is its kind: `connection_refused`,
    /// `connection_reset`, `connection_aborted`, `broken_pipe`, `unexpected_eof`, `host_unreachable`, `network_unreachable`,
    /// `network_down`, `not_found` (a unix socket), `permission_denied`, `address_not_available` (no port is free),
    /// `name_not_resolved`, `timeout`; or `os_error_24`, by its number, if it has no kind. `panic`: the manager panicked.
    /// `no_thread`: none could be started to connect on. `too_old`: connected when the connection's life was over. An error of
    /// a PostgreSQL server has its SQLSTATE: `28P01`. What has no name is `_OTHER`, as OpenTelemetry has it for its attribute
    /// `error.type`.
    pub fn error_type(&self) -> &str {
        self.error_type.as_str()
    }

    /// The same cause, marked as one that will not go away by trying again soon: it fails all waiters at once.
    #[must_use]
    pub fn permanent(mut self) -> Cause {
        self.reach = Reach::Refusal;
        self
    }

    /// Whether trying again soon is useless.
    pub fn is_permanent(&self) -> bool {
        self.reach == Reach::Refusal
    }

    /// The error itself, if the manager handed it on and it is an `E`.
    pub fn downcast_ref<E: StdError + 'static>(&self) -> Option<&E> {
        self.error.as_ref().and_then(|e| e.downcast_ref())
    }
}

/// Whether the attempt that ended with this error was refused by the system, since nobody listens there: by the first
/// error of the system's in the chain of sources.
pub(crate) fn nobody_listens(error: &(dyn StdError + 'static)) -> bool {
    let mut chain = successors(Some(error), |&error| error.source());
    let system = chain.find_map(|error| error.downcast_ref::<io::Error>());
    // (A unix socket that is missing is not found; one that is left behind refuses.)
    system.is_some_and(|error| matches!(error.kind(), IoErrorKind::ConnectionRefused | IoErrorKind::NotFound))
}

impl From<Panic> for Cause {
    fn from(panic: Panic) -> Cause {
        Cause::message(panic.to_string()).of_type(ErrorType::named("panic"))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cause").field("text", &self.text).field("permanent", &self.is_permanent()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl StdError for Layer {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            self.1.as_deref().map(|l| l as _)
        }
    }

    #[test]
    fn one_word_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert_eq!(size_of::<Result<(), Error>>(), size_of::<usize>());
        fn travels<T: Send + Sync + 'static>() {}
        travels::<Error>();
        travels::<Cause>();
    }

    #[test]
    fn the_whole_chain_once() {
        let e = Layer("db error", Some(Box::new(Layer("FATAL: no", Some(Box::new(Layer("no", None)))))));
        assert_eq!(Cause::text(&e).to_string(), "db error: FATAL: no");
        let cause = Cause::of(e).permanent();
        assert_eq!(cause.to_string(), "db error: FATAL: no");
        assert!(cause.is_permanent() && cause.downcast_ref::<Layer>().is_some());
        assert!(cause.downcast_ref::<fmt::Error>().is_none());
    }

    #[test]
    fn where_nobody_listens() {
        #[derive(Debug)]
        struct Wrapped(io::Error);

        impl fmt::Display for Wrapped {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("wrapped")
            }
        }

        impl StdError for Wrapped {
            fn source(&self) -> Option<&(dyn StdError + 'static)> {
                Some(&self.0)
            }
        }

        let of = |kind: IoErrorKind| Cause::of(Wrapped(kind.into())).open_error().reach;
        assert_eq!(of(IoErrorKind::ConnectionRefused), Reach::Nobody);
        assert_eq!(of(IoErrorKind::NotFound), Reach::Nobody);
        assert_eq!(of(IoErrorKind::ConnectionReset), Reach::Server);
        assert_eq!(of(IoErrorKind::TimedOut), Reach::Server);
        assert_eq!(Cause::text(&io::Error::from(IoErrorKind::ConnectionRefused)).open_error().reach, Reach::Nobody);
        assert_eq!(Cause::text(&Layer("refused", None)).open_error().reach, Reach::Server);
        assert_eq!(Cause::message("refused").open_error().reach, Reach::Server);
        assert_eq!(Cause::message("refused").permanent().open_error().reach, Reach::Refusal);
    }
}
