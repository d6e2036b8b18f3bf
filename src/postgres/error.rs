//! [`Error`]: what went wrong with a connection. The table of permanent errors stands here, and nowhere else.
//!
//! No error shows a part of a connection string, since any part may be the password.

use super::wire::{ConnectError, NegotiationError, Watch, is_answer_in_clear};
use crate::error::nobody_listens;
use crate::leaf::failures::ErrorType;
use crate::leaf::text::{self, Brief};
use crate::ledger::Reach;
use ::postgres::error::{DbError, SqlState};
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::sync::Arc;

/// What went wrong with a PostgreSQL connection.
///
/// An error can be cloned, so every thread that waited for the same attempt to connect can look at it:
///
/// ```
/// # fn f(e: millpond::Error) {
/// use millpond::postgres::Error;
///
/// if let Some(e) = e.cause().and_then(|cause| cause.downcast_ref::<Error>()) {
///     println!("SQLSTATE {:?}: {e}", e.code());
/// }
/// # }
/// ```
///
/// Its text is escaped and shortened like a [`Cause`](crate::Cause). The error that [`as_postgres`](Error::as_postgres)
/// returns is as it came.
#[derive(Clone)]
pub struct Error(Arc<Kind>);

enum Kind {
    /// An error of the `postgres` crate, and what was being done, where the error does not say it.
    Postgres(::postgres::Error, Option<String>),
    /// An error of the server without an error of the `postgres` crate. The crate may have seen the end of the
    /// connection before the server's last error; or the error was longer than is kept.
    Server { code: SqlState, text: String },
    /// An error of this crate's own.
    Own { text: String, reach: Reach, error_type: ErrorType },
}

impl Error {
    pub(super) fn own(text: impl Into<String>, permanent: bool) -> Error {
        Error::reaching(text, if permanent { Reach::Refusal } else { Reach::Server }, ErrorType::OTHER)
    }

    fn reaching(text: impl Into<String>, reach: Reach, error_type: ErrorType) -> Error {
        Error(Arc::new(Kind::Own { text: text.into(), reach, error_type }))
    }

    /// The error that ended the connection of `watch`: the server's own, if it sent one, or else `error`.
    pub(super) fn of(error: ::postgres::Error, watch: &Watch) -> Error {
        match watch.fatal_error() {
            Some((code, text)) if error.code().is_none() => {
                let text = text::brief(format_args!("FATAL: {text} (SQLSTATE {})", code.code()), text::CAUSE);
                Error(Arc::new(Kind::Server { code, text }))
            }
            _ => error.into(),
        }
    }

    /// There is no password to log in with.
    pub(super) fn no_password(error: &(dyn StdError + 'static)) -> Error {
        let text = format!("cannot get a password: {}", crate::Cause::text(error));
        Error::reaching(text, Reach::Server, ErrorType::named("no_password"))
    }

    /// The server, or what stands for it, was silent for too long.
    pub(super) fn timeout(text: impl Into<String>) -> Error {
        Error::reaching(text, Reach::Server, ErrorType::TIMEOUT)
    }

    pub(super) fn doing(what: impl Into<String>, e: ::postgres::Error) -> Error {
        Error::postgres(e, Some(what.into()))
    }

    fn postgres(e: ::postgres::Error, doing: Option<String>) -> Error {
        match e.as_db_error().filter(|db| weight(db) > KEPT).map(|db| text::brief(db.code().code(), text::NAME)) {
            Some(code) => {
                Error(Arc::new(Kind::Server { code: SqlState::from_code(&code), text: words(&e, doing.as_deref()) }))
            }
            None => Error(Arc::new(Kind::Postgres(e, doing))),
        }
    }

    /// The error of the `postgres` crate, if there is one. Of an error of the server that is longer than 64 KiB only
    /// the SQLSTATE and the beginning are kept.
    pub fn as_postgres(&self) -> Option<&::postgres::Error> {
        match &*self.0 {
            Kind::Postgres(e, _) => Some(e),
            Kind::Server { .. } | Kind::Own { .. } => None,
        }
    }

    /// The SQLSTATE, if the server gave one.
    pub fn code(&self) -> Option<&SqlState> {
        match &*self.0 {
            Kind::Server { code, .. } => Some(code),
            _ => self.as_postgres()?.code(),
        }
    }

    /// The server's error, if it sent one.
    pub fn as_db_error(&self) -> Option<&DbError> {
        self.as_postgres()?.as_db_error()
    }

    /// Whether it is useless to try the same again soon: the server or the configuration refuses, and a person must
    /// change that. The pool then fails all waiters at once. It tries again slowly, since a password may be corrected
    /// or a database created.
    pub fn is_permanent(&self) -> bool {
        match &*self.0 {
            Kind::Own { reach, .. } => *reach == Reach::Refusal,
            Kind::Server { code, .. } => is_permanent_state(code),
            Kind::Postgres(e, _) => is_permanent(e),
        }
    }

    /// See [`Cause::error_type`](crate::Cause::error_type).
    pub(super) fn error_type(&self) -> ErrorType {
        match &*self.0 {
            Kind::Own { error_type, .. } => error_type.clone(),
            Kind::Server { code, .. } => ErrorType::of_other(code.code()),
            Kind::Postgres(e, _) => error_type(e),
        }
    }

    /// Whether the system refused the connect, since nobody listens there.
    pub(super) fn says_that_nobody_listens(&self) -> bool {
        match &*self.0 {
            Kind::Own { reach, .. } => *reach == Reach::Nobody,
            Kind::Server { .. } => false,
            Kind::Postgres(e, _) => nobody_listens(e),
        }
    }
}

impl From<::postgres::Error> for Error {
    fn from(e: ::postgres::Error) -> Self {
        Error::postgres(e, None)
    }
}

impl From<ConnectError> for Error {
    fn from(e: ConnectError) -> Self {
        match e {
            ConnectError::Postgres(e) => e.into(),
            ConnectError::NoWay(_, ref system) => {
                let reach = if nobody_listens(system) { Reach::Nobody } else { Reach::Server };
                Error::reaching(e.to_string(), reach, ErrorType::of_system(system))
            }
            ConnectError::NoLoopback => Error::own(e.to_string(), false),
        }
    }
}

/// How much of one error of a server is kept, in bytes. A cause lives until the next one, and each waiter gets it, so
/// its size must have a bound; errors of PostgreSQL are far shorter.
const KEPT: usize = 64 * 1024;

/// How long an error of a server is, in bytes.
fn weight(db: &DbError) -> usize {
    let rest = [db.detail(), db.hint(), db.where_(), db.schema(), db.table(), db.column(), db.datatype()];
    let rest = rest.into_iter().chain([db.constraint(), db.file(), db.routine()]);
    [db.severity(), db.code().code(), db.message()].map(str::len).iter().sum::<usize>()
        + rest.flatten().map(str::len).sum::<usize>()
}

/// How much of a cause's length is left for the text around the server's message, so that a long message does not cost
/// the SQLSTATE.
const ROOM: usize = 128;

/// The text of an error of the `postgres` crate. The crate's own text leaves out all that matters ("db error").
fn words(e: &::postgres::Error, doing: Option<&str>) -> String {
    let mut text = Brief::new(text::CAUSE);
    if let Some(doing) = doing {
        text.push(format_args!("{doing}: "));
    }
    match e.as_db_error() {
        Some(db) => {
            text.push(format_args!("{}: {}", db.severity(), text::brief(db.message(), text::CAUSE - ROOM)));
            text.push(format_args!(" (SQLSTATE {})", db.code().code()));
            if let Some(detail) = db.detail() {
                text.push(format_args!("; {detail}"));
            }
        }
        None => text.push(crate::Cause::text(e)),
    }
    text.finish()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Kind::Own { text, .. } => f.write_str(&text::brief(text, text::CAUSE)),
            Kind::Server { text, .. } => f.write_str(text),
            Kind::Postgres(e, doing) => f.write_str(&words(e, doing.as_deref())),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Kind::Own { text, .. } => f.debug_tuple("Error").field(text).finish(),
            Kind::Server { code, text } => f.debug_tuple("Error").field(code).field(text).finish(),
            Kind::Postgres(e, _) => e.fmt(f),
        }
    }
}

/// The text has the whole chain in it, so there is no `source` that would repeat it; see [`Error::as_postgres`].
impl StdError for Error {}

/// The table. Everything that is not in it is transient: starting up (57P03), shutting down (57P01), too many
/// connections (53300), a database that does not accept connections at the moment (55000), refused, reset, timed out,
/// unknown. 08P01 is never permanent by its code: behind PgBouncer it means almost anything.
fn is_permanent_state(code: &SqlState) -> bool {
    [
        SqlState::INVALID_PASSWORD, // 28P01: or an unknown role, or an expired password
        SqlState::INVALID_AUTHORIZATION_SPECIFICATION, // 28000: pg_hba.conf, NOLOGIN, an unknown role
        SqlState::INVALID_CATALOG_NAME, // 3D000: no such database
        SqlState::UNDEFINED_OBJECT, // 42704: no such parameter in `options`
        SqlState::INVALID_PARAMETER_VALUE, // 22023: a bad value for one
        SqlState::INSUFFICIENT_PRIVILEGE, // 42501: no CONNECT, or a superuser's parameter
        SqlState::CANT_CHANGE_RUNTIME_PARAM, // 55P02: a parameter that is set at server start only
        SqlState::FEATURE_NOT_SUPPORTED, // 0A000: a protocol version the server does not speak
    ]
    .contains(code)
}

fn is_permanent(e: &::postgres::Error) -> bool {
    if let Some(code) = e.code() {
        return is_permanent_state(code);
    }
    if let Some(negotiation) = NegotiationError::of(e) {
        return !negotiation.is_transient();
    }
    // The connection is not observed, so `postgres` has asked for TLS. It says "does not support TLS" whatever the
    // answer was, and a server that has no process for a client answers with an error.
    let no_tls = |source: &(dyn StdError + 'static)| source.to_string() == "server does not support TLS";
    if e.source().is_some_and(|source| no_tls(source) || is_answer_in_clear(source)) {
        return false;
    }
    let io = e.source().and_then(|s| s.downcast_ref::<io::Error>());
    // `postgres::Error` has no public kind. These are its texts for errors that only a person can correct.
    let text = e.to_string();
    let by_hand = ["invalid connection string", "invalid configuration", "authentication error"];
    let disagreement = |io: &io::Error| matches!(io.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput);
    match io {
        None => by_hand.iter().chain(&["error performing TLS handshake"]).any(|t| text.starts_with(t)),
        Some(io) if text.starts_with("error performing TLS handshake") => disagreement(io),
        // A NUL in a user's name, say.
        Some(io) if text.starts_with("error encoding message") => disagreement(io),
        Some(_) => by_hand.iter().any(|t| text.starts_with(t)),
    }
}

fn error_type(e: &::postgres::Error) -> ErrorType {
    if let Some(code) = e.code() {
        return ErrorType::of_other(code.code());
    }
    if let Some(negotiation) = NegotiationError::of(e) {
        return negotiation.error_type();
    }
    // `postgres` says so that no host is what `target_session_attrs` asks for. It is not the system that says it.
    let io = e.source().and_then(|source| source.downcast_ref::<io::Error>());
    if io.is_some_and(|io| io.kind() == io::ErrorKind::PermissionDenied && io.raw_os_error().is_none()) {
        return ErrorType::named("target_session_attrs");
    }
    let by_system = ErrorType::of(e);
    if by_system != ErrorType::OTHER {
        return by_system;
    }
    if e.is_closed() {
        return ErrorType::named("connection_closed");
    }
    // See `is_permanent`.
    let text = e.to_string();
    [
        ("error performing TLS handshake", ErrorType::named("tls")),
        ("authentication error", ErrorType::named("authentication")),
        ("invalid configuration", ErrorType::named("invalid_configuration")),
        // A NUL in a user's name, say.
        ("error encoding message", ErrorType::named("invalid_configuration")),
    ]
    .into_iter()
    .find(|(begin, _)| text.starts_with(begin))
    .map_or(ErrorType::OTHER, |(_, error_type)| error_type)
}

/// Whether there was no connection on which the server could have said anything. (`postgres::Error` has no public kind.)
pub(super) fn was_not_connected(e: &::postgres::Error) -> bool {
    e.to_string().starts_with("error connecting to server")
}

/// The error of a connection string. It says which part is wrong, and shows none: any part may be the password.
pub(super) fn parse_error(params: &str, e: &::postgres::Error) -> Error {
    let reason = e.source().map(ToString::to_string).unwrap_or_default();
    // The constant texts of `postgres`: `invalid value for option `port``.
    let text = if let Some(option) = reason.strip_prefix("invalid value for option ") {
        format!("invalid connection string: invalid value for {}", option.trim_matches('`'))
    } else if let Some(option) = reason.strip_prefix("unknown option ") {
        unknown_option(params, option.trim_matches('`'))
    } else {
        let kind = if params.contains("://") { "URL" } else { "list of key=value pairs" };
        format!("invalid connection string: not a well-formed {kind} (values with spaces need quotes, in a URL %20)")
    };
    Error::own(text, true)
}

/// The error of an unknown option. It may be the second half of a password with a space or a `?` in it, so the error
/// says its place and not its name.
fn unknown_option(params: &str, option: &str) -> String {
    let is_it = |part: &str| part.split('=').next() == Some(option);
    let place = match params.split_once("://") {
        Some((_, rest)) => {
            let options = rest.split_once('?').map_or("", |(_, options)| options);
            let place = options.split('&').position(is_it);
            place.map(|n| format!(" (option {} of the URL)", n + 1))
        }
        None => {
            let place = params.split_whitespace().position(is_it);
            place.map(|n| format!(" (part {} of the string)", n + 1))
        }
    };
    format!("invalid connection string: unknown option{}", place.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(params: &str) -> String {
        let e = params.parse::<::postgres::Config>().expect_err(params);
        let e = parse_error(params, &e);
        assert!(e.is_permanent());
        e.to_string()
    }

    #[test]
    fn a_connection_string_is_never_repeated() {
        for (params, says) in [
            ("host=a prot=5432 password=hunter2", "unknown option (part 2 of the string)"),
            ("host=a port=hunter2", "invalid value for port"),
            ("host=a sslmode=hunter2", "invalid value for sslmode"),
            ("host=a password=my hunter2=1", "unknown option (part 3 of the string)"),
            ("host=a password=my hunter2", "not a well-formed list"),
            ("host=a password='hunter2", "not a well-formed list"),
            ("postgres://u:hunter2@h:port/db", "invalid value for port"),
            ("postgres://u:hunter2@h/db?sslmode=require&prot=1", "unknown option (option 2 of the URL)"),
        ] {
            let text = parse(params);
            assert!(text.contains(says), "{params}: {text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }

    #[test]
    fn the_table() {
        for (code, permanent) in [
            ("28P01", true),
            ("28000", true),
            ("3D000", true),
            ("42704", true),
            ("22023", true),
            ("42501", true),
            ("55P02", true),
            ("55000", false),
            ("53300", false),
            ("57P03", false),
            ("57P01", false),
            ("08P01", false),
            ("XX000", false),
        ] {
            assert_eq!(is_permanent_state(&SqlState::from_code(code)), permanent, "{code}");
        }
    }
}
