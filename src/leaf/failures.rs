//! [`ErrorType`]: a short name of a kind of error, for metrics; and [`Failures`], which counts by it.

use super::text;
use std::borrow::Cow;
use std::error::Error;
use std::io::{self, ErrorKind};
use std::iter::successors;

/// The name of a kind of error, `connection_refused` say. A clone costs little, and its drop runs nobody's code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ErrorType(Cow<'static, str>);

impl ErrorType {
    /// What has no name of its own: the word of OpenTelemetry's attribute `error.type`.
    pub(crate) const OTHER: ErrorType = ErrorType::named("_OTHER");
    /// No answer in time, by whoever's clock.
    pub(crate) const TIMEOUT: ErrorType = ErrorType::named("timeout");
    /// Connected when the connection's life was over.
    pub(crate) const TOO_OLD: ErrorType = ErrorType::named("too_old");
    /// No thread could be started to connect on.
    pub(crate) const NO_THREAD: ErrorType = ErrorType::named("no_thread");

    pub(crate) const fn named(name: &'static str) -> ErrorType {
        ErrorType(Cow::Borrowed(name))
    }

    /// A name of somebody else's. It is escaped and shortened. An empty one is none.
    pub(crate) fn of_other(name: &str) -> ErrorType {
        match text::brief(name, text::NAME) {
            name if name.is_empty() => ErrorType::OTHER,
            name => ErrorType(Cow::Owned(name)),
        }
    }

    /// By the first error of the system's in the chain of sources that has a name.
    pub(crate) fn of(error: &(dyn Error + 'static)) -> ErrorType {
        let chain = successors(Some(error), |&error| error.source());
        let mut types = chain.filter_map(|error| error.downcast_ref()).map(ErrorType::of_system);
        types.find(|error_type| *error_type != ErrorType::OTHER).unwrap_or(ErrorType::OTHER)
    }

    pub(crate) fn of_system(error: &io::Error) -> ErrorType {
        ErrorType::named(match error.kind() {
            ErrorKind::ConnectionRefused => "connection_refused",
            ErrorKind::ConnectionReset => "connection_reset",
            ErrorKind::ConnectionAborted => "connection_aborted",
            ErrorKind::BrokenPipe => "broken_pipe",
            ErrorKind::UnexpectedEof => "unexpected_eof",
            ErrorKind::HostUnreachable => "host_unreachable",
            ErrorKind::NetworkUnreachable => "network_unreachable",
            ErrorKind::NetworkDown => "network_down",
            ErrorKind::NotFound => "not_found",
            ErrorKind::PermissionDenied => "permission_denied",
            ErrorKind::AddrNotAvailable => "address_not_available",
            ErrorKind::TimedOut => return ErrorType::TIMEOUT,
            // It has no kind, and the resolver's numbers are not the system's. The text is the standard library's.
            _ if text::brief(error, text::NAME).starts_with("failed to lookup address information") => {
                "name_not_resolved"
            }
            _ => match (error.raw_os_error(), error.get_ref()) {
                (Some(n), _) => return ErrorType(format!("os_error_{n}").into()),
                // (An error that is wrapped is not among the sources of the one around it.)
                (None, Some(within)) => return ErrorType::of(within),
                (None, None) => return ErrorType::OTHER,
            },
        })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// How many names are kept apart, beside the others. A manager may make up names without end.
const MOST_TYPES: usize = 16;

/// How many attempts failed, by the type of their error, in the order of their first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failures(Vec<(ErrorType, u64)>);

impl Failures {
    /// One more. Beyond [`MOST_TYPES`] names it is one of the others.
    pub(crate) fn count(&mut self, error_type: ErrorType) {
        let named = self.0.iter().filter(|(t, _)| *t != ErrorType::OTHER).count();
        let error_type = if self.of(&error_type) == 0 && named >= MOST_TYPES { ErrorType::OTHER } else { error_type };
        match self.0.iter_mut().find(|(t, _)| *t == error_type) {
            Some((_, n)) => *n += 1,
            None => self.0.push((error_type, 1)),
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|(_, n)| n).sum()
    }

    pub(crate) fn of(&self, error_type: &ErrorType) -> u64 {
        self.0.iter().find(|(t, _)| t == error_type).map_or(0, |&(_, n)| n)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ErrorType, u64)> {
        self.0.iter().map(|(t, n)| (t, *n))
    }

    /// Those that `earlier` has not.
    pub(crate) fn since(&self, earlier: &Failures) -> Failures {
        let since = self.iter().map(|(t, n)| (t.clone(), n.saturating_sub(earlier.of(t))));
        Failures(since.filter(|&(_, n)| n > 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_system() {
        for (kind, name) in [
            (ErrorKind::ConnectionRefused, "connection_refused"),
            (ErrorKind::TimedOut, "timeout"),
            (ErrorKind::NotFound, "not_found"),
            (ErrorKind::InvalidData, "_OTHER"),
        ] {
            assert_eq!(ErrorType::of(&io::Error::from(kind)).as_str(), name);
            assert_eq!(ErrorType::of(&io::Error::other(io::Error::from(kind))).as_str(), name, "wrapped");
        }
        assert_eq!(ErrorType::of(&io::Error::from_raw_os_error(24)).as_str(), "os_error_24", "too many open files");
        assert_eq!(ErrorType::of(&std::fmt::Error), ErrorType::OTHER);
        // Of an error's text no more is made than is looked at.
        struct Endless;
        impl std::fmt::Display for Endless {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                loop {
                    f.write_str("on and on ")?;
                }
            }
        }
        impl std::fmt::Debug for Endless {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("Endless")
            }
        }
        impl Error for Endless {}
        assert_eq!(ErrorType::of(&io::Error::other(Endless)), ErrorType::OTHER);
    }

    #[test]
    fn a_name_of_somebody_else_s_is_made_harmless() {
        assert_eq!(ErrorType::of_other("28P01").as_str(), "28P01");
        assert_eq!(ErrorType::of_other("a\nb").as_str(), "a\\nb");
        assert!(ErrorType::of_other(&"x".repeat(1000)).as_str().len() < 100);
        assert_eq!(ErrorType::of_other(""), ErrorType::OTHER);
    }

    #[test]
    fn no_name_too_many_and_none_lost() {
        let mut failures = Failures::default();
        for n in 0..100 {
            failures.count(ErrorType::of_other(&n.to_string()));
            failures.count(ErrorType::TIMEOUT);
        }
        assert_eq!((failures.0.len(), failures.total()), (MOST_TYPES + 1, 200));
        assert_eq!(failures.of(&ErrorType::TIMEOUT), 100);
        assert_eq!(failures.of(&ErrorType::OTHER), 100 - (MOST_TYPES as u64 - 1));
        assert_eq!(failures.of(&ErrorType::of_other("3")), 1);

        let earlier = failures.clone();
        failures.count(ErrorType::of_other("3"));
        let since = failures.since(&earlier);
        assert_eq!((since.0.len(), since.total(), since.of(&ErrorType::of_other("3"))), (1, 1, 1));
        assert_eq!(earlier.since(&failures), Failures::default());
    }
}
