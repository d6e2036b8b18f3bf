//! The questions of an audit to the server: which backends it has, and which are still busy.

use super::backend::{Backend, Owner};
use crate::postgres::error::Error;
use crate::postgres::operations::names::process;
use crate::postgres::session::column;
use ::postgres::types::Type;
use ::postgres::{Client, Row};
use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

/// The condition that a backend is busy. Only a busy backend can be an orphan: an idle one notices at once that its
/// client is gone. A backend whose state is not tracked does not count as busy.
pub(super) const BUSY: &str = "AND state IN ('active', 'fastpath function call')";

pub(super) const LEAVING: &str = "its client has closed, and it is about to end";

pub(super) const QUESTION: &str = "\
    WITH me AS (SELECT coalesce($1, session_user::text) AS role, coalesce($2, current_database()::text) AS database, \
                       pg_catalog.pg_backend_pid() AS pid, \
                       pg_catalog.inet_client_addr() AS address, pg_catalog.inet_client_port() AS port, \
                       pg_catalog.inet_server_addr() AS server, pg_catalog.inet_server_port() AS server_port) \
    SELECT me.role, me.database, me.pid, me.address, me.port, me.server, me.server_port, \
           (SELECT backend_start FROM pg_catalog.pg_stat_activity WHERE pid = me.pid), \
           a.pid, a.application_name, a.client_addr, a.client_port, a.backend_start, \
           extract(epoch FROM pg_catalog.clock_timestamp() - a.backend_start)::float8, a.state, \
           extract(epoch FROM pg_catalog.clock_timestamp() - a.state_change)::float8, \
           extract(epoch FROM pg_catalog.clock_timestamp() - a.xact_start)::float8, \
           a.wait_event_type, a.wait_event \
    FROM me LEFT JOIN pg_catalog.pg_stat_activity a \
      ON a.usename::text = me.role AND a.datname::text = me.database \
     AND (a.backend_type = 'client backend' OR a.backend_type IS NULL) \
    ORDER BY a.backend_start, a.pid";

/// Has the server look anew: within a transaction it would repeat its first answer.
pub(super) fn fresh(client: &mut Client) -> Result<(), Error> {
    Ok(client.batch_execute("SELECT pg_catalog.pg_stat_clear_snapshot()")?)
}

impl Backend {
    /// A row of the answer to [`QUESTION`]; `None` if there is no backend in it.
    pub(super) fn read(row: &Row) -> Result<Option<Backend>, Error> {
        let Some(pid) = column::<Option<i32>>(row, 8)? else { return Ok(None) };
        let application_name: String = column::<Option<String>>(row, 9)?.unwrap_or_default();
        // The times are negative if the server's clock has stepped back: then zero.
        let time = |i| -> Result<Option<Duration>, Error> {
            Ok(column::<Option<f64>>(row, i)?.map(|s| Duration::try_from_secs_f64(s).unwrap_or_default()))
        };
        let (kind, event): (Option<String>, Option<String>) = (column(row, 17)?, column(row, 18)?);
        Ok(Some(Backend {
            pid,
            process: process(&application_name).map(|(_, pid)| pid),
            application_name,
            client: socket_address(column(row, 10)?, column(row, 11)?),
            backend_start: column(row, 12)?,
            age: time(13)?,
            state: column(row, 14)?,
            since: time(15)?,
            in_transaction_for: time(16)?,
            waiting_on: kind.map(|kind| format!("{kind} {}", event.unwrap_or_default())),
            owner: Owner::Unknown,
            connection: None,
            note: None,
        }))
    }
}

/// `None` for a unix socket, which has no address, and the port -1.
pub(super) fn socket_address(ip: Option<IpAddr>, port: Option<i32>) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip?.to_canonical(), u16::try_from(port?).ok()?))
}

/// Asks once more whether the orphans are busy. A backend may have been about to end: it was busy when the server was
/// asked, and its client had closed when the host was looked at. A closed end stays closed. So if the backend is busy
/// even now, both are true at the same time.
pub(super) fn still_busy(client: &mut Client, backends: &mut [Backend]) -> Result<(), Error> {
    let orphans: Vec<i32> = backends.iter().filter(|b| b.owner == Owner::Orphaned).map(|b| b.pid).collect();
    if orphans.is_empty() {
        return Ok(());
    }
    fresh(client)?;
    let question = format!("SELECT pid, backend_start FROM pg_catalog.pg_stat_activity WHERE pid = ANY($1) {BUSY}");
    let mut busy = HashSet::new();
    for row in client.query_typed(&question, &[(&orphans, Type::INT4_ARRAY)])? {
        busy.insert((column::<i32>(&row, 0)?, column::<Option<SystemTime>>(&row, 1)?));
    }
    unless_leaving(backends, &busy);
    Ok(())
}

/// A backend that is not among the `busy` when the server is asked again is no longer called orphaned.
fn unless_leaving(backends: &mut [Backend], busy: &HashSet<(i32, Option<SystemTime>)>) {
    for backend in backends.iter_mut().filter(|b| b.owner == Owner::Orphaned) {
        if !busy.contains(&(backend.pid, backend.backend_start)) {
            (backend.owner, backend.note) = (Owner::Unknown, Some(LEAVING.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::backend::staged::{CLIENT, START, backend};
    use super::*;

    /// The backend's last query ended, and its client hung up, while the audit was made.
    #[test]
    fn a_backend_about_to_end_is_no_orphan() {
        let orphan = Backend { owner: Owner::Orphaned, ..backend(Some(CLIENT), "active") };
        let owner = |busy: &[(i32, Option<SystemTime>)]| {
            let mut backends = [orphan.clone()];
            unless_leaving(&mut backends, &busy.iter().copied().collect());
            backends[0].owner
        };
        assert_eq!(owner(&[(7, Some(START))]), Owner::Orphaned);
        assert_eq!(owner(&[]), Owner::Unknown);
        assert_eq!(owner(&[(7, Some(START + Duration::from_secs(1)))]), Owner::Unknown, "another with its pid");
    }
}
