//! The join of the server's view with the pool's own: [`audit`] and [`audit_with`].

use super::backend::{Audit, Backend, Log, Owner};
use super::errand::on_a_connection;
use super::question::still_busy;
use super::viewpoint::Viewpoint;
use crate::postgres::error::Error;
use crate::postgres::operations::host::Holder;
use crate::postgres::operations::manager::Pool;
use crate::postgres::operations::names::Names;
use crate::postgres::wire::Connector;
use crate::stats::Connections;
use crate::{ConnectionInfo, ConnectionState};
use ::postgres::Client;
use std::collections::{BTreeMap, HashSet};

/// Looks at the server for the backends of this application, and at the pool for its own: same role, same database, and
/// an `application_name` of the pool's name with any process id. (If you set `application_name` yourself: that very
/// name, whoever has it. If yours ends in the process id as ` [4711]`: with any process id.)
///
/// It opens a connection of its own, since the pool may be exhausted at the very time when an audit is needed. It uses
/// the pool's manager and its `open_timeout`, which covers the questions as well. Only if the server has no room for
/// one more does it check a connection out of the pool, and waits as [`get`](crate::Pool::get) does.
///
/// Give your pools names: `millpond-1`, the default, is the same in every application.
///
/// ```no_run
/// # fn f(pool: millpond::postgres::Pool) -> Result<(), millpond::postgres::Error> {
/// let audit = millpond::postgres::audit(&pool)?;
/// println!("{audit}");
/// if audit.orphans().count() > 0 {
///     println!("{}", audit.terminate_orphans(&pool)?);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # What an orphan is, and what cannot be known
///
/// A backend is called [orphaned](Owner::Orphaned) if it is busy and this host's kernel (Linux, by its `/proc`) says of
/// both ends of its connection that no process can use it any more. All of this has to hold; otherwise
/// [`note`](Backend::note) says what does not:
///
/// * the server runs on this host, in the same namespaces of network and processes, and the audit reached it over TCP
///   with nothing in between: the other end of the audit's own connection is held by the very backend that answered;
/// * this process may see what the server's processes hold, which takes root or the server's user;
/// * the backend came over TCP, holds the server's end of its connection, and that end knows that the other closed;
/// * the client's end is on this host, and closed: no process holds it. (The kernel forgets a closed end after a
///   minute; later on, only for loopback addresses, its absence counts, as long as `route_localnet` is off.)
///
/// So a backend is never called orphaned if its client came through a unix socket, whose ends cannot be joined, or from
/// a container or machine that is not the server's. If a pooler or a tunnel on this host holds the client's end, the
/// backend is [another process's](Owner::Other).
///
/// Even without an audit every such backend ends: the server itself notices a client that is gone, at the latest when
/// its query ends. With
/// [`client_connection_check_interval`](crate::postgres::ServerGuards::client_connection_check_interval) it looks while
/// the query runs, wherever the client was. Set that, and there is little left to end.
///
/// Behind a pooler the pids that the pool has are the pooler's: nothing can be joined. With several hosts in the
/// configuration only one of them is asked.
///
/// # Errors
///
/// If no connection is to be had, or the server cannot be asked or answers something else.
#[track_caller]
pub fn audit<T: Connector>(pool: &Pool<T>) -> Result<Audit, Error> {
    on_a_connection(pool, |connection, pid| look(pool, connection, pid, None))
}

/// [`audit`](audit()) with a connection of yours, which can be one of the pool's, or an administrator's, who sees more.
/// It must lead to the same server, and past any pooler.
///
/// It looks for the role and database of the manager's configuration, or for those of `client` if that names none.
///
/// # Errors
///
/// If the server cannot be asked, or answers something else.
pub fn audit_with<T: Connector>(pool: &Pool<T>, client: &mut Client) -> Result<Audit, Error> {
    let config = pool.manager().config();
    let role = config.get_user();
    look(pool, client, None, role.map(|role| (role, config.get_dbname().unwrap_or(role))))
}

/// Asks the server over `client`, and joins its answer with the pool's connections. `pid` is the backend's pid as the
/// login gave it to `client`. `whose`: the role and database to look for, if they are not those of `client`.
fn look<T: Connector>(
    pool: &Pool<T>,
    client: &mut Client,
    pid: Option<i32>,
    whose: Option<(&str, &str)>,
) -> Result<Audit, Error> {
    let manager = pool.manager();
    let own_name = manager.application_name(pool.name());
    let names = Names::new(&own_name, pool.name());
    // The pool is asked before and after the server, so that a connection that is opened or closed meanwhile is in one
    // of the two lists.
    let before = pool.connections();
    let numbers =
        |all: &Connections| all.iter().filter_map(|c| i32::try_from(c.server_id?).ok()).collect::<HashSet<_>>();
    let known = numbers(&before);
    let wanted = |row: &Backend| known.contains(&row.pid) || names.matches(&row.application_name);
    let (viewpoint, mut rows) = Viewpoint::look(client, pid, whose, wanted)?;
    let after = pool.connections();

    let connection_of = |pid: i32| {
        let has = |c: &&ConnectionInfo| !viewpoint.pooled && c.server_id == u64::try_from(pid).ok();
        after.iter().find(has).or_else(|| before.iter().find(has))
    };
    let mut backends = Vec::new();
    for row in &mut rows {
        let named = names.matches(&row.application_name);
        row.process = row.process.filter(|_| named);
        // A pooler that was not noticed may use the same backend for other processes.
        let connection = connection_of(row.pid).filter(|_| row.process.is_none_or(|pid| pid == std::process::id()));
        (row.owner, row.note) = match connection {
            Some(connection) => viewpoint.owner_of_pooled(row, connection, pool.settings().open_timeout),
            None if named || row.pid == viewpoint.backend => viewpoint.owner(row),
            None => continue,
        };
        row.connection = connection.filter(|_| row.owner == Owner::Pool).cloned();
        backends.push(row.clone());
    }
    still_busy(client, &mut backends)?;

    let still = |c: &ConnectionInfo| before.iter().any(|b| b.id == c.id && b.server_id == c.server_id);
    let seen: HashSet<_> = backends.iter().map(|b| u64::try_from(b.pid).ok()).collect();
    let settled = |c: &ConnectionInfo| !matches!(c.state, ConnectionState::Opening | ConnectionState::Closing);
    let missing: Vec<_> =
        after.iter().filter(|c| settled(c) && !seen.contains(&c.server_id) && still(c)).cloned().collect();
    let (unnumbered, missing): (Vec<_>, Vec<_>) = missing.into_iter().partition(|c| c.server_id.is_none());

    let mut notes = Vec::new();
    if viewpoint.pooled {
        notes.push(
            "the pool reaches the server through a pooler: the pids it knows are the pooler's, so nothing can be joined, \
             and no backend is called orphaned"
                .into(),
        );
    } else if !unnumbered.is_empty() {
        notes.push(format!("of {} of the pool's connections the server's pid is not known", unnumbered.len()));
    }
    // The login shows whether a pooler is at the other end only on an observed connection.
    let by_age = |b: &&Backend| b.owner == Owner::Pool && viewpoint.holder(b) != Ok(Holder::Us);
    let unproven = backends.iter().filter(by_age).count();
    if unproven > 0 && pid.is_none() && whose.is_none() {
        notes.push(format!(
            "{unproven} of the pool are known by pid and age alone: the connections are not observed, and a pooler in \
             transaction mode, were there one in between, might have passed them on"
        ));
    }
    let hidden = backends.iter().filter(|b| b.backend_start.is_none()).count();
    if hidden > 0 {
        notes.push(format!("the state of {hidden} is hidden from this role: grant it pg_read_all_stats to see it"));
    }
    if manager.hosts() > 1 {
        notes.push("the configuration names several hosts: only the server that answered was asked".into());
    }
    if let Names::These(_) = names {
        notes.push(format!("the application_name '{own_name}' is your own: whoever else has it is here as well"));
    }
    let mut reasons = BTreeMap::<&str, Vec<String>>::new();
    for backend in &backends {
        if let Some(note) = &backend.note {
            reasons.entry(note).or_default().push(backend.pid.to_string());
        }
    }
    notes.extend(reasons.into_iter().map(|(why, pids)| format!("{}: {why}", pids.join(", "))));

    Ok(Audit {
        pool: pool.name().into(),
        role: viewpoint.role,
        database: viewpoint.database,
        application_name: own_name,
        backends,
        missing: Connections(if viewpoint.pooled { Vec::new() } else { missing }),
        notes,
        log: Log::of(pool),
    })
}
