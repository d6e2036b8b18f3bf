//! [`ServerGuards`]: settings of a session with which the server cleans up after a client that is gone.

use crate::Settings;
use crate::error::Cause;
use crate::leaf::text::Short;
use std::time::Duration;

/// What the server is to do if this client dies or vanishes, set when a connection is opened. The guards are for the
/// ends against which no guard in this process helps: SIGKILL, a power failure, a network that is gone.
///
/// Every guard is off by default (`None`): the server's own setting, or the role's, holds. `Some(Duration::ZERO)` is
/// the server's own zero: off for the timeouts, the system's default for TCP. Fractions are rounded up to the unit of
/// the server (milliseconds, for keepalives seconds). A duration too long for the server becomes its longest (for
/// milliseconds 24.8 days).
///
/// | guard | what it reaches | since PostgreSQL |
/// |---|---|---|
/// | `client_connection_check_interval` | a **killed** client whose query still runs or waits for a lock | 14 |
/// | `tcp_keepalives_*` | a **vanished** client (power, network) while its session is idle | |
/// | `tcp_user_timeout` | a vanished client while the server has something to send | 12 |
/// | `idle_in_transaction_session_timeout` | a hung client that holds locks | 9.6 |
/// | `idle_session_timeout` | a hung client that holds nothing but a connection | 14 |
/// | `transaction_timeout` | a transaction without end, whatever it does | 17 |
///
/// The idle backend of a killed client needs no guard: its socket is closed with the process, and the server notices at
/// once. A busy one is noticed when its query ends, or has something to send; `client_connection_check_interval` does
/// not wait for that. It works wherever the client was, in a container or behind a tunnel, where
/// [`audit`](crate::postgres::audit()) can prove nothing.
///
/// ```
/// use millpond::postgres::ServerGuards;
/// use std::time::Duration;
///
/// let guards = ServerGuards {
///     client_connection_check_interval: Some(Duration::from_secs(10)),
///     tcp_keepalives_idle: Some(Duration::from_secs(60)),
///     tcp_keepalives_interval: Some(Duration::from_secs(10)),
///     tcp_keepalives_count: Some(3),
///     ..ServerGuards::default()
/// };
/// ```
///
/// # Poolers
///
/// The guards are set with `SET`, since PgBouncer refuses them in `options=`, and hold for the session. Where the pool itself
/// discards session state ([`Reset::DiscardAll`](crate::postgres::Reset::DiscardAll)) they are set again. A `RESET ALL`
/// or `DISCARD ALL` of your own removes them. Behind PgBouncer:
///
/// * `pool_mode=session`: kept, on the connection between pooler and server, as long as the session lasts.
/// * `pool_mode=transaction` or `statement`: **do not use them.** A `SET` stays on the server connection on which it
///   ran, which other clients get next. Give the role its settings instead: `ALTER ROLE app SET
///   client_connection_check_interval = '10s'`.
/// * In both, the server's client is the pooler: the guards of TCP watch the pooler and not this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerGuards {
    /// Ends a session that has been idle outside of a transaction for this long.
    ///
    /// It also ends a connection that the pool keeps idle, and one that a caller has checked out and does not use for
    /// as long. `build` fails if it is not longer than the pool itself leaves a connection unused and unchecked: the
    /// least of `max_idle` (which does not count with a `min_idle`), `max_lifetime` and `keepalive`.
    pub idle_session_timeout: Option<Duration>,
    /// Ends a session that has been idle inside of a transaction for this long.
    pub idle_in_transaction_session_timeout: Option<Duration>,
    /// Ends a session whose transaction lasts longer than this. PostgreSQL 17 or later.
    pub transaction_timeout: Option<Duration>,
    /// How long a TCP connection may be silent before the server's system asks whether the client lives. Not for unix
    /// sockets.
    pub tcp_keepalives_idle: Option<Duration>,
    /// How long the system waits for an answer before it asks again.
    pub tcp_keepalives_interval: Option<Duration>,
    /// How many times the system asks in vain before the connection counts as dead.
    pub tcp_keepalives_count: Option<u32>,
    /// How long sent data may stay unacknowledged.
    pub tcp_user_timeout: Option<Duration>,
    /// How often the server looks, while a query runs, whether the client has hung up. PostgreSQL 14 or later, not on
    /// Windows.
    pub client_connection_check_interval: Option<Duration>,
}

impl ServerGuards {
    /// The statements that set all guards that are given, for one round trip. `None`: no guard is given.
    pub(super) fn sql(&self) -> Option<String> {
        let milliseconds = |d: Duration| format!("'{}ms'", d.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128));
        let seconds = |d: Duration| format!("'{}s'", d.as_nanos().div_ceil(1_000_000_000).min(i32::MAX as u128));
        let count = |n: u32| n.min(i32::MAX as u32).to_string();
        let set = [
            ("idle_session_timeout", self.idle_session_timeout.map(milliseconds)),
            ("idle_in_transaction_session_timeout", self.idle_in_transaction_session_timeout.map(milliseconds)),
            ("transaction_timeout", self.transaction_timeout.map(milliseconds)),
            ("tcp_keepalives_idle", self.tcp_keepalives_idle.map(seconds)),
            ("tcp_keepalives_interval", self.tcp_keepalives_interval.map(seconds)),
            ("tcp_keepalives_count", self.tcp_keepalives_count.map(count)),
            ("tcp_user_timeout", self.tcp_user_timeout.map(milliseconds)),
            ("client_connection_check_interval", self.client_connection_check_interval.map(milliseconds)),
        ];
        let set = set.into_iter().filter_map(|(name, value)| Some(format!("SET {name} = {}", value?)));
        Some(set.collect::<Vec<_>>().join("; ")).filter(|sql| !sql.is_empty())
    }

    /// Fails if the server would end connections that the pool means to keep.
    pub(super) fn check(&self, settings: &Settings) -> Result<(), Cause> {
        let Some(timeout) = self.idle_session_timeout.filter(|d| !d.is_zero()) else { return Ok(()) };
        // The connections that `min_idle` keeps are not closed for idleness.
        let max_idle = settings.max_idle.filter(|_| settings.min_idle == 0);
        let longest =
            [("max_idle", max_idle), ("max_lifetime", settings.max_lifetime), ("keepalive", settings.keepalive)];
        let longest = longest.into_iter().filter_map(|(name, d)| Some((d?, name))).min();
        let problem = match longest {
            Some((longest, _)) if longest < timeout => return Ok(()),
            Some((longest, name)) => format!("{} ({name})", Short(longest)),
            None => "ever".into(),
        };
        let timeout = Short(timeout);
        Err(Cause::message(format!(
            "the server guard idle_session_timeout is {timeout}, and would end connections that the pool leaves unused for \
             {problem}"
        ))
        .permanent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Pool;
    use crate::doc_manager::DocManager;

    #[test]
    fn units_round_up_and_stop_at_the_longest() {
        assert_eq!(ServerGuards::default().sql(), None);
        let guards = ServerGuards {
            idle_session_timeout: Some(Duration::from_micros(1)),
            tcp_keepalives_idle: Some(Duration::from_millis(1500)),
            tcp_user_timeout: Some(Duration::MAX),
            client_connection_check_interval: Some(Duration::ZERO),
            ..ServerGuards::default()
        };
        assert_eq!(
            guards.sql().unwrap(),
            "SET idle_session_timeout = '1ms'; SET tcp_keepalives_idle = '2s'; SET tcp_user_timeout = '2147483647ms'; \
             SET client_connection_check_interval = '0ms'"
        );
    }

    #[test]
    fn the_pool_must_be_quicker_than_the_server() {
        let secs = Duration::from_secs;
        let guards = ServerGuards { idle_session_timeout: Some(secs(60)), ..ServerGuards::default() };
        let check = |build: fn(crate::Builder<DocManager>) -> crate::Builder<DocManager>| {
            let pool = build(Pool::builder()).build(DocManager).unwrap();
            guards.check(pool.settings()).map_err(|e| e.to_string())
        };
        assert_eq!(check(|b| b.max_idle(Duration::from_secs(59))), Ok(()));
        assert!(check(|b| b.max_idle(Duration::from_secs(60))).unwrap_err().ends_with("unused for 60.0 s (max_idle)"));
        assert!(check(|b| b).unwrap_err().ends_with("unused for 10.0 min (max_idle)"));
        let floor = check(|b| b.max_idle(Duration::from_secs(59)).min_idle(1));
        assert!(floor.unwrap_err().ends_with("unused for 30.0 min (max_lifetime)"));
        assert_eq!(check(|b| b.min_idle(1).keepalive(Duration::from_secs(30))), Ok(()));
        assert!(check(|b| b.max_idle(None).max_lifetime(None)).unwrap_err().ends_with("unused for ever"));
        let off = ServerGuards { idle_session_timeout: Some(Duration::ZERO), ..guards };
        let pool = Pool::builder().build(DocManager).unwrap();
        assert!(off.check(pool.settings()).is_ok(), "zero is off");
    }
}
