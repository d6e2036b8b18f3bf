//! [`audit`](audit()): the server's view of an application's backends, joined with the pool's own.
//!
//! To call a backend orphaned is to invite somebody to end it. So each word but "unknown" takes proof: the kernel's, on both
//! ends of that very connection ([`Host::holder`]), or that of a connection of this process's own. The process id in an
//! `application_name` is a hint for human beings, and proves nothing: in each container it may be 1, and a pooler passes on
//! that of a client on another machine.

use super::host::{Holder, Host};
use super::manager::application_name;
use super::{Connector, Error, Pool, PostgresManager};
use crate::leaf::text::{CAUSE, Shown, brief};
use crate::leaf::text::{Short, write_table};
use crate::stats::Connections;
use crate::{ConnectionInfo, ConnectionState, Manage, Opening};
use ::postgres::error::SqlState;
use ::postgres::types::{FromSql, Type};
use ::postgres::{Client, Row};
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// What the server knows of the backends of this application, and what the pool knows of them. Made by [`audit`](audit()).
///
/// [`Display`](fmt::Display) prints a table:
///
/// ```text
/// audit of pool 'orders', app on database shop: 4 backends: 2 of this pool, 1 of another process here, 1 orphaned
/// pid   state   for       age       in tx     waiting on       whose
/// 4711  active  1.20 s    12.0 min  1.20 s    Lock tuple       #3 out by 'worker-1' at src/main.rs:12:5
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
    /// The database in which.
    pub database: String,
    /// The `application_name` of this process's connections, by which others were looked for. If it ends in this process's
    /// id in brackets, as that of this manager does, others may have theirs there; otherwise it must be the same.
    pub application_name: String,
    /// What the server has, the oldest first.
    pub backends: Vec<Backend>,
    /// Connections of the pool of which the server knows nothing: they were ended and the pool has not noticed yet, or lead
    /// to another server.
    pub missing: Connections,
    /// What could not be known, and why.
    pub notes: Vec<String>,
}

/// One backend, as `pg_stat_activity` has it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Backend {
    /// The process id of the backend, on the server's host.
    pub pid: i32,
    /// As its client set it.
    pub application_name: String,
    /// The process id of its client, as its `application_name` has it. A hint: the process may be on another machine, or in
    /// a container with numbers of its own, and a pooler passes on its client's.
    pub process: Option<u32>,
    /// Its client's address, as the server sees it. `None`: a unix socket, or hidden.
    pub client: Option<SocketAddr>,
    /// When the server started it. `None`: hidden from the role that asked.
    pub backend_start: Option<SystemTime>,
    /// Since then, by the server's clock. `None`: hidden.
    pub age: Option<Duration>,
    /// `active`, `idle`, `idle in transaction`, ... `None`: hidden.
    pub state: Option<String>,
    /// How long it has been in that state. `None`: hidden.
    pub since: Option<Duration>,
    /// How long it has been in a transaction, if it is.
    pub in_transaction_for: Option<Duration>,
    /// What it waits for: type and name of the wait event, if any. An idle one waits for its client.
    pub waiting_on: Option<String>,
    /// Whose it is.
    pub owner: Owner,
    /// The pool's own row for it, if it has one.
    pub connection: Option<ConnectionInfo>,
    /// Why no more can be said of whose it is.
    pub note: Option<String>,
}

impl Backend {
    /// How long it has been idle, be it in a transaction or not, if it is.
    pub fn idle_for(&self) -> Option<Duration> {
        if self.is_idle() { self.since } else { None }
    }

    fn is_idle(&self) -> bool {
        self.state.as_ref().is_some_and(|state| state.starts_with("idle"))
    }
}

/// Whose a backend is: who holds the client's end of its connection.
///
/// Every word but [`Unknown`](Owner::Unknown) is proven. The process id in an `application_name` proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Owner {
    /// This pool's: its own row is in [`Backend::connection`]. The server told the pool this very pid for it, and this
    /// process holds the client's end. Where the kernel cannot be asked (a unix socket, a tunnel, another network behind
    /// translated addresses), the backend must be as old as the connection. (A pooler in transaction mode may have lent it
    /// on since; where connections are not [observed](super#the-observer), that there is one cannot be seen, and a
    /// [note](Audit::notes) says so.)
    Pool,
    /// The connection that the audit itself was made on.
    Audit,
    /// This process's, but not in the pool: detached, being opened or closed, given up, or of another pool of the same name;
    /// or of a proxy or tunnel within this process, whoever is behind it.
    ThisProcess,
    /// Another process's, on this host: a pool of the same name, a pooler, or the end of a tunnel. Somebody holds it.
    Other,
    /// Nobody's: it is busy, and the client's end of its connection is closed. Nobody can ever read its answer.
    Orphaned,
    /// Not to be known from here: [`Backend::note`] says why.
    Unknown,
}

/// Looks at the server for the backends of this application, and at the pool for its own: same role, same database, and an
/// `application_name` of the pool's name with any process id. (If you set `application_name` yourself: that very name,
/// whoever has it. If yours ends in the process id as ` [4711]`: with any process id.)
///
/// It opens a connection of its own, with the pool's manager and within its `open_timeout`, which covers the questions as
/// well: a pool that is exhausted is exactly when one wants to know. Only if the server has no room for one more it borrows
/// one from the pool, waiting as [`get`](crate::Pool::get) does.
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
/// A backend is called [orphaned](Owner::Orphaned) if it is busy and this host's kernel (Linux, by its `/proc`) says of both
/// ends of its connection that nobody can use it any more. All of this has to hold; otherwise [`note`](Backend::note) says
/// what does not:
///
/// * the server runs on this host, in the same namespaces of network and processes, and the audit reached it over TCP with
///   nothing in between: the other end of the audit's own connection is held by the very backend that answered;
/// * this process may see what the server's processes hold, which takes root or the server's user;
/// * the backend came over TCP, holds the server's end of its connection, and that end has been told that the other closed;
/// * the client's end is on this host, and closed: no process holds it. (The kernel forgets a closed end after a minute;
///   later on, only for loopback addresses, its absence counts, as long as `route_localnet` is off.)
///
/// So nothing is ever called orphaned that came through a unix socket, whose ends cannot be joined; nor from a container or
/// a machine that is not the server's. A backend that a pooler or a tunnel on this host holds is
/// [another process's](Owner::Other), whoever is behind it.
///
/// Without an audit nothing is lost for good: the server itself notices a client that is gone, at the latest when its query
/// ends. [`client_connection_check_interval`](super::ServerGuards::client_connection_check_interval) has it look while the
/// query runs, from wherever the client came: set that, and there is little left to end.
///
/// Behind a pooler the pids that the pool has are the pooler's: nothing can be joined. With several hosts in the
/// configuration only one of them is asked.
///
/// # Errors
///
/// If no connection can be had, or the server cannot be asked or answers something else.
#[track_caller]
pub fn audit<T: Connector>(pool: &Pool<T>) -> Result<Audit, Error> {
    on_a_connection(pool, |connection, pid| look(pool, connection, pid, None))
}

/// [`audit`](audit()) with a connection of yours, which can be a borrowed one, or that of an administrator, who sees more. It
/// must lead to the same server, and past any pooler.
///
/// It looks for the role and database of the manager's configuration; for those of `client`, if that names none.
///
/// # Errors
///
/// If the server cannot be asked, or answers something else.
pub fn audit_with<T: Connector>(pool: &Pool<T>, client: &mut Client) -> Result<Audit, Error> {
    let config = pool.manager().config();
    let role = config.get_user();
    look(pool, client, None, role.map(|role| (role, config.get_dbname().unwrap_or(role))))
}

impl Audit {
    /// The backends that are proven to be nobody's. See [`audit`](audit()) for what that takes.
    pub fn orphans(&self) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(|b| b.owner == Owner::Orphaned)
    }

    /// Ends the [orphaned](Owner::Orphaned) backends that this audit has found, and no others, with `pg_terminate_backend`,
    /// on a connection got as [`audit`](audit()) gets its own. What they were doing is rolled back.
    ///
    /// Each is proven once more before, from that connection; and the server, in the statement that ends it, looks whether
    /// the pid is still that backend (`backend_start`, `application_name`) and busy. It waits for at most 2 seconds until
    /// they are gone.
    ///
    /// # Errors
    ///
    /// If no connection can be had, or it is lost. That the server refuses one of them is told in the account.
    #[track_caller]
    pub fn terminate_orphans<T: Connector>(&self, pool: &Pool<T>) -> Result<Terminations, Error> {
        on_a_connection(pool, |connection, _| self.terminate_orphans_with(connection))
    }

    /// [`terminate_orphans`](Audit::terminate_orphans) with a connection of yours, to the same server, over TCP.
    ///
    /// # Errors
    ///
    /// If the connection is lost. That the server refuses one of them is told in the account.
    pub fn terminate_orphans_with(&self, client: &mut Client) -> Result<Terminations, Error> {
        let pids: Vec<i32> = self.orphans().map(|b| b.pid).collect();
        if pids.is_empty() {
            return self.end(client, &[], |_| None, BUSY);
        }
        let (now, rows) = Place::look(client, None, Some((&self.role, &self.database)), |row| pids.contains(&row.pid))?;
        let again = |backend: &Backend| {
            let Some(row) = rows.iter().find(|row| row.is(backend)) else { return Some(Outcome::Gone) };
            match now.owner(row) {
                (Owner::Orphaned, _) => None,
                (_, Some(why)) => Some(Outcome::Spared(why)),
                (Owner::Audit, None) => Some(Outcome::Spared(ASKING.into())),
                (_, None) => Some(Outcome::Spared("somebody holds its connection".into())),
            }
        };
        self.end(client, &pids, again, BUSY)
    }

    /// Ends those backends of this audit that you name by their pids, whatever is known of them: for what is
    /// [unknown](Owner::Unknown) to the audit and not to you. Otherwise as [`terminate_orphans`](Audit::terminate_orphans):
    /// the server looks whether each is still the backend that the audit saw, but neither whether it is busy nor whose it is.
    ///
    /// ```no_run
    /// # fn f(pool: millpond::postgres::Pool) -> Result<(), millpond::postgres::Error> {
    /// let audit = millpond::postgres::audit(&pool)?;
    /// println!("{audit}");
    /// println!("{}", audit.terminate(&pool, &[4690])?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If no connection can be had, or it is lost. That the server refuses one of them, or that the audit has no such
    /// backend, is told in the account.
    #[track_caller]
    pub fn terminate<T: Connector>(&self, pool: &Pool<T>, pids: &[i32]) -> Result<Terminations, Error> {
        on_a_connection(pool, |connection, _| self.terminate_with(connection, pids))
    }

    /// [`terminate`](Audit::terminate) with a connection of yours, to the same server.
    ///
    /// # Errors
    ///
    /// If the connection is lost. That the server refuses one of them, or that the audit has no such backend, is told in the
    /// account.
    pub fn terminate_with(&self, client: &mut Client, pids: &[i32]) -> Result<Terminations, Error> {
        let own: i32 = column(&client.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[])?, 0)?;
        let spared = |backend: &Backend| (backend.pid == own).then(|| Outcome::Spared(ASKING.into()));
        self.end(client, pids, spared, "")
    }

    /// Ends these, but for those of which something speaks against it; and only if `condition` holds.
    fn end(
        &self,
        client: &mut Client,
        pids: &[i32],
        against: impl Fn(&Backend) -> Option<Outcome>,
        condition: &str,
    ) -> Result<Terminations, Error> {
        let mut done = Vec::new();
        let mut named = HashSet::new();
        for &pid in pids.iter().filter(|&&pid| named.insert(pid)) {
            let backend = self.backends.iter().find(|b| b.pid == pid);
            let outcome = match backend.map(|backend| (backend, backend.backend_start)) {
                None => Outcome::Spared("the audit has no such backend".into()),
                // Another backend with its number could not be told from it.
                Some((_, None)) => Outcome::Spared("the server hid it from the role that made the audit".into()),
                Some((backend, Some(start))) => match against(backend) {
                    Some(outcome) => outcome,
                    None => terminate(client, backend, start, condition)?,
                },
            };
            let start = backend.and_then(|backend| backend.backend_start);
            done.push((start, Termination { pid, process: backend.and_then(|b| b.process), outcome }));
        }
        let deadline = Instant::now() + GONE_WITHIN;
        for (start, done) in &mut done {
            let Some(start) = *start else { continue };
            while done.outcome == Outcome::Signalled {
                if !is_there(client, done.pid, start)? {
                    done.outcome = Outcome::Ended;
                } else if Instant::now() < deadline {
                    thread::sleep(Duration::from_millis(10));
                } else {
                    break;
                }
            }
        }
        let done = Terminations { pool: self.pool.clone(), done: done.into_iter().map(|(_, done)| done).collect() };
        if !done.done.is_empty() {
            log::warn!(target: "millpond", "{done}");
        }
        Ok(done)
    }
}

/// How long the account waits for backends to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// An idle backend that has lost its client notices at once. One whose state is not tracked may be idle.
const BUSY: &str = "AND state IN ('active', 'fastpath function call')";

/// Why a backend is not ended.
const ASKING: &str = "it is the connection that asks";

/// What was done about the backends of an audit. [`Display`](fmt::Display) prints a line for each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Terminations {
    /// The name of the pool.
    pub pool: String,
    /// One for each orphan, or for each that was named.
    pub done: Vec<Termination>,
}

/// What was done about one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Termination {
    /// The process id of the backend.
    pub pid: i32,
    /// The process id of its client, as its `application_name` has it.
    pub process: Option<u32>,
    /// What has come of it.
    pub outcome: Outcome,
}

/// What has come of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It was told to end, and has.
    Ended,
    /// It was told to end, and was still there after 2 seconds.
    Signalled,
    /// It was no longer there; or, an orphan, no longer busy: nothing was done.
    Gone,
    /// It was left alone, for this reason: it was not proven to be an orphan, or the audit has no such backend.
    Spared(String),
    /// The server refused, in these words.
    Refused(String),
}

fn terminate(client: &mut Client, backend: &Backend, start: SystemTime, condition: &str) -> Result<Outcome, Error> {
    let statement = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
         WHERE pid = $1 AND backend_start = $2 AND application_name = $3 {condition}"
    );
    fresh(client)?;
    let name = &backend.application_name;
    let parameters: [(&(dyn ::postgres::types::ToSql + Sync), Type); 3] =
        [(&backend.pid, Type::INT4), (&start, Type::TIMESTAMPTZ), (name, Type::TEXT)];
    match client.query_typed_opt(&statement, &parameters) {
        Ok(Some(row)) if column(&row, 0)? => Ok(Outcome::Signalled),
        Ok(_) => Ok(Outcome::Gone),
        Err(e) => match e.as_db_error() {
            Some(db) if !client.is_closed() => Ok(Outcome::Refused(db.message().into())),
            _ => Err(e.into()),
        },
    }
}

fn is_there(client: &mut Client, pid: i32, start: SystemTime) -> Result<bool, Error> {
    fresh(client)?;
    let parameters: [(&(dyn ::postgres::types::ToSql + Sync), Type); 2] =
        [(&pid, Type::INT4), (&start, Type::TIMESTAMPTZ)];
    let question = "SELECT 1 FROM pg_catalog.pg_stat_activity WHERE pid = $1 AND backend_start = $2";
    Ok(client.query_typed_opt(question, &parameters)?.is_some())
}

/// Within a transaction the server would repeat what it saw first.
fn fresh(client: &mut Client) -> Result<(), Error> {
    Ok(client.batch_execute("SELECT pg_catalog.pg_stat_clear_snapshot()")?)
}

// ---------------------------------------------------------------------------------------------- a connection

/// Does something on a connection of its own, or on one of the pool's if the server has no room. `ask` is also told the pid
/// that a connection of its own was given when it was opened, if that is known.
#[track_caller]
fn on_a_connection<T: Connector, R>(
    pool: &Pool<T>,
    ask: impl FnOnce(&mut Client, Option<i32>) -> Result<R, Error>,
) -> Result<R, Error> {
    let limit = pool.settings().open_timeout;
    let opening = Arc::new(Opening::new(pool.name().into(), limit));
    let _timer = Timer::start(Arc::clone(&opening), limit);
    match pool.manager().open(&opening) {
        Ok(mut connection) => {
            let pid = connection.backend_pid().filter(|_| connection.is_observed());
            let answer = ask(&mut connection, pid);
            PostgresManager::<T>::close(pool.manager(), connection, limit);
            answer
        }
        Err(e) if e.code() == Some(&SqlState::TOO_MANY_CONNECTIONS) => {
            let borrowed = pool.get();
            let mut connection = borrowed.map_err(|other| Error::own(format!("{e}; and {other}"), false))?;
            let pid = connection.backend_pid().filter(|_| connection.is_observed());
            ask(&mut connection, pid)
        }
        Err(e) => Err(e),
    }
}

/// Cuts a connection at its limit, unless it is dropped before.
struct Timer(Option<(Sender<()>, JoinHandle<()>)>);

impl Timer {
    fn start(opening: Arc<Opening>, limit: Duration) -> Timer {
        let (stop, stopped) = bounded::<()>(0);
        let thread = thread::Builder::new().name("millpond-audit".into()).spawn(move || {
            if stopped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                opening.condemn();
                opening.abort();
            }
        });
        Timer(thread.ok().map(|thread| (stop, thread)))
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

// ---------------------------------------------------------------------------------------------- looking

/// The process id at the end of an `application_name`, and what stands before it.
fn process(name: &str) -> Option<(&str, u32)> {
    let (prefix, digits) = name.strip_suffix(']')?.rsplit_once(" [")?;
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    Some((prefix, digits.parse().ok().filter(|_| plain)?))
}

/// Which `application_name`s are this application's.
enum Names {
    /// This one, with any process id.
    Any(String),
    /// One of these, which the server may make of the same name.
    These(Vec<String>),
}

impl Names {
    /// `own` is this process's, `pool` the name of the pool.
    fn new(own: &str, pool: &str) -> Names {
        let me = std::process::id();
        match process(own) {
            _ if own == application_name(pool, me) => Names::Any(pool.into()),
            Some((prefix, pid)) if pid == me => Names::Any(prefix.into()),
            _ => Names::These(as_servers_say(own)),
        }
    }

    /// Where there is no room for all of the name, how much of it is left depends on the process id.
    fn matches(&self, name: &str) -> bool {
        match self {
            Names::Any(full) => process(name).is_some_and(|(_, pid)| application_name(full, pid) == name),
            Names::These(names) => names.iter().any(|n| n == name),
        }
    }
}

/// What servers make of bytes in a name that are not printable ASCII: `?` until PostgreSQL 15, `\xc3` since; then they cut.
fn as_servers_say(name: &str) -> Vec<String> {
    let cut = |mut name: String| {
        name.truncate(63);
        name
    };
    let printable = |b: u8| (b == b' ' || b.is_ascii_graphic()).then(|| char::from(b).to_string());
    vec![
        cut(name.bytes().map(|b| printable(b).unwrap_or("?".into())).collect()),
        cut(name.bytes().map(|b| printable(b).unwrap_or_else(|| format!("\\x{b:02x}"))).collect()),
    ]
}

const QUESTION: &str = "\
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

/// `pid` is what `client` was told of its backend when it was opened, `whose` the role and database to look for, if they are
/// not those of `client`.
fn look<T: Connector>(
    pool: &Pool<T>,
    client: &mut Client,
    pid: Option<i32>,
    whose: Option<(&str, &str)>,
) -> Result<Audit, Error> {
    let manager = pool.manager();
    let own_name = manager.application_name(pool.name());
    let names = Names::new(&own_name, pool.name());
    // What the pool opens or closes meanwhile is in one of the two.
    let before = pool.connections();
    let numbers =
        |all: &Connections| all.iter().filter_map(|c| i32::try_from(c.server_id?).ok()).collect::<HashSet<_>>();
    let known = numbers(&before);
    let wanted = |row: &Backend| known.contains(&row.pid) || names.matches(&row.application_name);
    let (place, mut rows) = Place::look(client, pid, whose, wanted)?;
    let after = pool.connections();

    let connection_of = |pid: i32| {
        let has = |c: &&ConnectionInfo| !place.pooled && c.server_id == u64::try_from(pid).ok();
        after.iter().find(has).or_else(|| before.iter().find(has))
    };
    let mut backends = Vec::new();
    for row in &mut rows {
        let named = names.matches(&row.application_name);
        row.process = row.process.filter(|_| named);
        // An unseen pooler may lend the same backend to others.
        let connection = connection_of(row.pid).filter(|_| row.process.is_none_or(|pid| pid == std::process::id()));
        (row.owner, row.note) = match connection {
            Some(connection) => place.owner_of_pooled(row, connection, pool.settings().open_timeout),
            None if named || row.pid == place.backend => place.owner(row),
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
    if place.pooled {
        notes.push(
            "the pool reaches the server through a pooler: the pids it knows are the pooler's, so nothing can be joined, \
             and nobody is called orphaned"
                .into(),
        );
    } else if !unnumbered.is_empty() {
        notes.push(format!("of {} of the pool's connections the server's pid is not known", unnumbered.len()));
    }
    // Only an observed connection has been told by what is at its other end, be it a pooler, who that is.
    let by_age = |b: &&Backend| b.owner == Owner::Pool && place.holder(b) != Ok(Holder::Us);
    let unproven = backends.iter().filter(by_age).count();
    if unproven > 0 && pid.is_none() && whose.is_none() {
        notes.push(format!(
            "{unproven} of the pool are known by pid and age alone: the connections are not observed, and a pooler in \
             transaction mode, were there one in between, might have lent them on"
        ));
    }
    let hidden = backends.iter().filter(|b| b.backend_start.is_none()).count();
    if hidden > 0 {
        notes.push(format!("the state of {hidden} is hidden from this role: grant it pg_read_all_stats to see it"));
    }
    let config = manager.config();
    if config.get_hosts().len().max(config.get_hostaddrs().len()) > 1 {
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
        role: place.role,
        database: place.database,
        application_name: own_name,
        backends,
        missing: Connections(if place.pooled { Vec::new() } else { missing }),
        notes,
    })
}

/// What looked like an orphan may have been about to end: busy when the server was asked, closed when the host was. Closed
/// is closed for ever; so if it is busy still, both are true at once.
fn still_busy(client: &mut Client, backends: &mut [Backend]) -> Result<(), Error> {
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
    spare_the_leaving(backends, &busy);
    Ok(())
}

/// `busy` are those that were so when the server was asked again.
fn spare_the_leaving(backends: &mut [Backend], busy: &HashSet<(i32, Option<SystemTime>)>) {
    for backend in backends.iter_mut().filter(|b| b.owner == Owner::Orphaned) {
        if !busy.contains(&(backend.pid, backend.backend_start)) {
            (backend.owner, backend.note) = (Owner::Unknown, Some(LEAVING.into()));
        }
    }
}

const LEAVING: &str = "its client has closed, and it is about to end";

/// A column of an answer, which may not be what was asked for: not every server that speaks like PostgreSQL is one.
pub(super) fn column<'a, T: FromSql<'a>>(row: &'a Row, i: usize) -> Result<T, Error> {
    row.try_get(i).map_err(|e| Error::doing("the server's answer is not what was asked for", e))
}

/// A unix socket has no address, and the port -1.
fn socket_address(ip: Option<IpAddr>, port: Option<i32>) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip?.to_canonical(), u16::try_from(port?).ok()?))
}

/// From where the server was asked, and what this host says of it.
struct Place {
    role: String,
    database: String,
    /// The near end of the connection that asked, as the server sees it. `None`: a unix socket.
    peer: Option<SocketAddr>,
    /// The server's end of it, as the server sees it.
    server: Option<SocketAddr>,
    /// The pid of the backend that answered, and when the server started it.
    backend: i32,
    start: Option<SystemTime>,
    /// Whether there is a pooler in between.
    pooled: bool,
    host: Result<Host, &'static str>,
}

impl Place {
    /// Asks the server for the backends of a role in a database (`client`'s own, if `None`), of which only those that are
    /// `wanted`, and the one that answers, count; and then this host for their connections. Whose they are is not said yet.
    fn look(
        client: &mut Client,
        pid: Option<i32>,
        whose: Option<(&str, &str)>,
        wanted: impl Fn(&Backend) -> bool,
    ) -> Result<(Place, Vec<Backend>), Error> {
        fresh(client)?;
        let (role, database) = whose.unzip();
        let answer = client.query_typed(QUESTION, &[(&role, Type::TEXT), (&database, Type::TEXT)])?;
        let first = answer.first().ok_or_else(|| Error::own("the server did not answer the audit", false))?;
        let backend = column(first, 2)?;
        let mut rows = Vec::new();
        for row in &answer {
            if let Some(row) = Backend::read(row)?.filter(|row| row.pid == backend || wanted(row)) {
                rows.push(row);
            }
        }
        let asked = rows.iter().map(|row| row.pid).chain([backend]);
        let place = Place {
            role: column(first, 0)?,
            database: column(first, 1)?,
            peer: socket_address(column(first, 3)?, column(first, 4)?),
            server: socket_address(column(first, 5)?, column(first, 6)?),
            backend,
            start: column(first, 7)?,
            pooled: pid.is_some_and(|pid| pid != backend),
            host: Host::look(asked),
        };
        Ok((place, rows))
    }

    /// Whose a backend is that the pool does not have, and why no more can be said.
    fn owner(&self, backend: &Backend) -> (Owner, Option<String>) {
        if backend.pid == self.backend {
            return (Owner::Audit, None);
        }
        match self.holder(backend) {
            Ok(Holder::Us) => (Owner::ThisProcess, None),
            Ok(Holder::Others) => (Owner::Other, None),
            Ok(Holder::Nobody) if backend.is_busy() => (Owner::Orphaned, None),
            Ok(Holder::Nobody) => (Owner::Unknown, Some(LEAVING.into())),
            Err(why) => (Owner::Unknown, Some(format!("whose it is cannot be known: {why}"))),
        }
    }

    /// The same of one whose pid the pool has been told for a connection: by this server, or by another one.
    ///
    /// The kernel's word goes first. Without it the backend must have begun when the pool opened the connection: two
    /// servers may give the same number, and containers the same name.
    fn owner_of_pooled(&self, backend: &Backend, own: &ConnectionInfo, limit: Duration) -> (Owner, Option<String>) {
        match self.holder(backend) {
            Ok(Holder::Us) => return (Owner::Pool, None),
            Ok(Holder::Others) => return self.owner(backend),
            // Closed meanwhile.
            Ok(Holder::Nobody) => {}
            Err(_) if self.is_another_s(backend) => return self.owner(backend),
            Err(_) => {}
        }
        let Some(age) = backend.age else { return self.owner(backend) };
        // Clocks differ a little, and more the longer they run.
        let slack = (age / 1000).saturating_add(Duration::from_secs(1));
        if age <= own.age.saturating_add(slack) && own.age <= age.saturating_add(limit).saturating_add(slack) {
            return (Owner::Pool, None);
        }
        let why = format!("it has the number of the pool's #{}, and is not as old as that: of another server?", own.id);
        (Owner::Unknown, Some(why))
    }

    /// Who holds the client's end of a backend's connection; or why that cannot be known.
    fn holder(&self, backend: &Backend) -> Result<Holder, &'static str> {
        if backend.backend_start.is_none() {
            return Err("the server hides it from this role");
        }
        if self.pooled {
            return Err("there is a pooler in between");
        }
        let host = self.host.as_ref().map_err(|why| *why)?;
        let client = backend.client.ok_or("it came through a unix socket")?;
        let peer = self.peer.ok_or("the audit came through a unix socket")?;
        match host.has_server(self.backend, self.start, peer) {
            Ok(()) => host.holder(backend.pid, client),
            Err(_) if self.is_direct() && self.server.is_some_and(|server| host.is_ours(client, server)) => {
                Ok(Holder::Us)
            }
            Err(why) => Err(why),
        }
    }

    /// Whether the server is another host, and sees this process as this process sees itself: then nothing translates
    /// addresses in between, and what it says of a client's address can be compared with this process's own.
    ///
    /// Not over loopback: there the far side of a tunnel has the same addresses.
    fn is_direct(&self) -> bool {
        let (Ok(host), Some(peer), Some(server)) = (&self.host, self.peer, self.server) else { return false };
        !self.pooled && !peer.ip().is_loopback() && peer.ip() != server.ip() && host.is_ours(peer, server)
    }

    /// Whether the server, which is another host, sees a client that is not this process.
    fn is_another_s(&self, backend: &Backend) -> bool {
        let (Ok(host), Some(client)) = (&self.host, backend.client) else { return false };
        self.is_direct() && !host.is_from_us(client)
    }
}

impl Backend {
    /// A row of the answer to [`QUESTION`]; `None` where there is no backend in it.
    fn read(row: &Row) -> Result<Option<Backend>, Error> {
        let Some(pid) = column::<Option<i32>>(row, 8)? else { return Ok(None) };
        let application_name: String = column::<Option<String>>(row, 9)?.unwrap_or_default();
        // The server's clock may step back.
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

    /// Whether it is the same as one that was seen before.
    fn is(&self, earlier: &Backend) -> bool {
        (self.pid, self.backend_start, &self.application_name)
            == (earlier.pid, earlier.backend_start, &earlier.application_name)
    }

    /// Known to be, not just not known not to be.
    fn is_busy(&self) -> bool {
        matches!(self.state.as_deref(), Some("active" | "fastpath function call"))
    }
}

// ---------------------------------------------------------------------------------------------- showing

impl fmt::Display for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Audit { pool, role, database, backends, .. } = self;
        let s = if backends.len() == 1 { "" } else { "s" };
        let (pool, role, database) = (Shown(pool), Shown(role), Shown(database));
        write!(f, "audit of pool '{pool}', {role} on database {database}: {} backend{s}", backends.len())?;
        let count = |owner| backends.iter().filter(|b| b.owner == owner).count();
        let counts = [
            (count(Owner::Pool), "of this pool"),
            (count(Owner::ThisProcess), "of this process, but not in the pool"),
            (count(Owner::Other), "of other processes here"),
            (count(Owner::Orphaned), "orphaned"),
            (count(Owner::Unknown), "unknown"),
            (count(Owner::Audit), "to ask"),
        ];
        for (i, (n, what)) in counts.into_iter().filter(|(n, _)| *n > 0).enumerate() {
            write!(f, "{}{n} {what}", if i == 0 { ": " } else { ", " })?;
        }
        writeln!(f)?;
        let head = ["pid", "state", "for", "age", "in tx", "waiting on", "whose"].map(String::from);
        let rows = backends.iter().map(|b| {
            let or = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let time = |d: Option<Duration>| or(d.map(|d| Short(d).to_string()));
            [
                b.pid.to_string(),
                b.state.clone().unwrap_or_else(|| "(hidden)".into()),
                time(b.since),
                time(b.age),
                time(b.in_transaction_for),
                // That an idle one waits for its client is what idle means.
                or(b.waiting_on.clone().filter(|_| !b.is_idle())),
                b.whose(),
            ]
        });
        if !backends.is_empty() {
            write_table(f, std::iter::once(head).chain(rows))?;
        }
        for row in self.missing.iter() {
            writeln!(f, "the server knows nothing of {row}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {}", Shown(note))?;
        }
        Ok(())
    }
}

impl Backend {
    fn whose(&self) -> String {
        let far = self.client.map(|client| client.ip()).filter(|ip| !ip.is_loopback());
        let hint = match (self.process, far) {
            (Some(process), Some(ip)) => format!(" ({process} by its name, at {ip})"),
            (Some(process), None) => format!(" ({process} by its name)"),
            (None, Some(ip)) => format!(" (at {ip})"),
            (None, None) => String::new(),
        };
        match self.owner {
            Owner::Pool => match &self.connection {
                Some(c) => {
                    let thread = c.thread.as_ref().map(|t| format!(" by {t}")).unwrap_or_default();
                    let place = c.location.map(|at| format!(" at {at}")).unwrap_or_default();
                    format!("#{} {}{thread}{place}", c.id, c.state)
                }
                None => "this pool".into(),
            },
            Owner::Audit => "this audit".into(),
            Owner::ThisProcess => "this process, not in the pool".into(),
            Owner::Other => format!("another process here{hint}"),
            Owner::Orphaned => format!("ORPHANED{hint}: its client has closed"),
            Owner::Unknown => format!("unknown{hint}"),
        }
    }
}

impl fmt::Display for Terminations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool '{}': ", Shown(&self.pool))?;
        if self.done.is_empty() {
            return write!(f, "nothing to end");
        }
        let ended = self.done.iter().filter(|t| t.outcome == Outcome::Ended).count();
        write!(f, "ended {ended} of {} backends", self.done.len())?;
        for Termination { pid, process, outcome } in &self.done {
            let hint = process.map(|process| format!(" ({process} by its name)")).unwrap_or_default();
            write!(f, "\n  {pid}{hint}: ")?;
            match outcome {
                Outcome::Ended => write!(f, "ended")?,
                Outcome::Signalled => write!(f, "told to end, and still there")?,
                Outcome::Gone => write!(f, "was gone already, or busy no more")?,
                Outcome::Spared(why) => write!(f, "left alone: {}", Shown(why))?,
                Outcome::Refused(why) => write!(f, "the server refuses: {}", brief(why, CAUSE))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::Staged;
    use super::*;

    #[test]
    fn a_process_in_a_name() {
        assert_eq!(process("orders [42]"), Some(("orders", 42)));
        assert_eq!(process("a [1] [42]"), Some(("a [1]", 42)));
        for name in ["orders", "orders [x]", "orders[42]", "orders [42] ", "orders [+42]", "orders [042]", "[42]", ""] {
            assert_eq!(process(name), None, "{name}");
        }
        assert_eq!(process("orders [99999999999]"), None);
    }

    #[test]
    fn names_of_one_application() {
        let me = std::process::id();
        let names = Names::new(&application_name("orders", me), "orders");
        assert!(names.matches("orders [1]") && names.matches(&format!("orders [{me}]")));
        assert!(!names.matches("orders") && !names.matches("orders2 [1]") && !names.matches("my orders [1]"));

        let long = "x".repeat(80);
        let names = Names::new(&application_name(&long, me), &long);
        assert!(names.matches(&application_name(&long, 1)) && names.matches(&application_name(&long, 4_000_000)));
        assert!(!names.matches("x [1]"));

        let own = Names::new(&format!("web [{me}]"), "orders");
        assert!(own.matches("web [1]") && !own.matches("orders [1]"));
        let fixed = Names::new("web", "orders");
        assert!(fixed.matches("web") && !fixed.matches("web [1]"));
        let umlaut = Names::new("wäb", "orders");
        assert!(umlaut.matches("w??b") && umlaut.matches("w\\xc3\\xa4b"));
    }

    const PEER: &str = "127.0.0.1:1000";
    const CLIENT: &str = "127.0.0.1:2000";
    const SERVER: &str = "127.0.0.1:5432";
    const START: SystemTime = SystemTime::UNIX_EPOCH;
    const OLD: Duration = Duration::from_secs(100);

    /// A backend under another's name.
    fn backend(client: Option<&str>, state: &str) -> Backend {
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

    fn place(peer: Option<&str>, host: Staged) -> Place {
        Place {
            role: "app".into(),
            database: "shop".into(),
            peer: peer.map(|p| p.parse().unwrap()),
            server: peer.map(|_| SERVER.parse().unwrap()),
            backend: 99,
            start: Some(START),
            pooled: false,
            host: Ok(host.host()),
        }
    }

    /// The server is here, and has a backend whose client's end is as given.
    fn host(servers_end: &str, clients_end: Option<(&str, u64)>) -> Staged {
        let staged = Staged::default().own(&[1, 2]).backend(99, START, &[990]).backend(7, START, &[70]);
        let staged = staged.socket(PEER, SERVER, "01", 1).socket(SERVER, PEER, "01", 990);
        let staged = staged.socket(SERVER, CLIENT, servers_end, 70);
        match clients_end {
            Some((state, inode)) => staged.socket(CLIENT, SERVER, state, inode),
            None => staged,
        }
    }

    fn closed() -> Staged {
        host("08", Some(("05", 0)))
    }

    #[test]
    fn orphaned_takes_the_kernel_s_word_on_both_ends() {
        let judge = |place: &Place, backend: &Backend| {
            let (owner, note) = place.owner(backend);
            (owner, note.unwrap_or_default())
        };
        let busy = || backend(Some(CLIENT), "active");
        let orphaned = (Owner::Orphaned, String::new());
        assert_eq!(judge(&place(Some(PEER), closed()), &busy()), orphaned);
        assert_eq!(judge(&place(Some(PEER), host("08", None)), &busy()), orphaned, "closed a minute ago");
        let unnamed = Backend { process: None, ..busy() };
        assert_eq!(judge(&place(Some(PEER), closed()), &unnamed), orphaned, "a name proves nothing");

        let unknown = |place: &Place, backend: &Backend, why: &str| {
            let (owner, note) = judge(place, backend);
            assert_eq!(owner, Owner::Unknown, "{why}");
            assert!(note.contains(why), "{note}");
        };
        let here = || place(Some(PEER), closed());
        unknown(&here(), &backend(Some(CLIENT), "idle"), "about to end");
        unknown(&here(), &backend(Some(CLIENT), "idle in transaction"), "about to end");
        unknown(&here(), &backend(Some(CLIENT), "disabled"), "about to end");
        unknown(&here(), &backend(None, "active"), "it came through a unix socket");
        unknown(&here(), &backend(Some("10.0.0.7:2000"), "active"), "not to be seen");
        unknown(&here(), &Backend { backend_start: None, ..busy() }, "hides it");
        unknown(&place(None, closed()), &busy(), "the audit came through a unix socket");
        unknown(&Place { pooled: true, ..here() }, &busy(), "a pooler in between");
        unknown(&Place { host: Err("no /proc"), ..here() }, &busy(), "no /proc");
        unknown(&Place { start: None, ..here() }, &busy(), "time");
        let relay = closed().socket(SERVER, PEER, "01", 3);
        unknown(&place(Some(PEER), relay), &busy(), "something stands in between");
        let other = closed().socket(PEER, SERVER, "01", 3);
        unknown(&place(Some(PEER), other), &busy(), "something stands in between");
        unknown(&place(Some(PEER), closed().hidden(99, "because")), &busy(), "because");
        unknown(&place(Some(PEER), closed().hidden(7, "because")), &busy(), "because");
        unknown(&place(Some(PEER), host("01", None)), &busy(), "not on this host");
    }

    /// Its last query ended, and its client hung up, while the audit was made.
    #[test]
    fn what_is_about_to_end_is_no_orphan() {
        let orphan = Backend { owner: Owner::Orphaned, ..backend(Some(CLIENT), "active") };
        let owner = |busy: &[(i32, Option<SystemTime>)]| {
            let mut backends = [orphan.clone()];
            spare_the_leaving(&mut backends, &busy.iter().copied().collect());
            backends[0].owner
        };
        assert_eq!(owner(&[(7, Some(START))]), Owner::Orphaned);
        assert_eq!(owner(&[]), Owner::Unknown);
        assert_eq!(owner(&[(7, Some(START + Duration::from_secs(1)))]), Owner::Unknown, "another with its pid");
    }

    #[test]
    fn whose_it_is_says_who_holds_it() {
        let owner = |clients_end, backend: &Backend| place(Some(PEER), host("01", Some(clients_end))).owner(backend);
        for name in [Some(42), Some(std::process::id()), None] {
            let backend = Backend { process: name, ..backend(Some(CLIENT), "active") };
            assert_eq!(owner(("01", 2), &backend), (Owner::ThisProcess, None));
            assert_eq!(owner(("01", 3), &backend), (Owner::Other, None));
        }
        let asking = Backend { pid: 99, ..backend(Some(PEER), "active") };
        assert_eq!(owner(("01", 2), &asking), (Owner::Audit, None));
    }

    #[test]
    fn what_the_pool_has_is_its_own_only_by_the_same_server_s_word() {
        let own = |age: Duration| ConnectionInfo {
            id: 3,
            server_id: Some(7),
            state: ConnectionState::Idle,
            since: Duration::ZERO,
            age,
            uses: 1,
            location: None,
            thread: None,
        };
        let limit = Duration::from_secs(10);
        let secs = Duration::from_secs;
        let busy = backend(Some(CLIENT), "active");
        let owner = |place: &Place, age| place.owner_of_pooled(&busy, &own(age), limit).0;
        // The kernel's word goes before the age.
        let here = |inode| place(Some(PEER), host("01", Some(("01", inode))));
        assert_eq!(owner(&here(2), OLD * 2), Owner::Pool);
        assert_eq!(owner(&here(3), OLD), Owner::Other);
        // Through a tunnel, say, there is no such word.
        let far = place(Some(PEER), Staged::default());
        for (age, expected) in [
            (OLD, Owner::Pool),
            (OLD + limit, Owner::Pool),
            (OLD + limit + secs(2), Owner::Unknown),
            (OLD - secs(2), Owner::Unknown),
        ] {
            assert_eq!(owner(&far, age), expected, "{age:?}");
        }
        assert_eq!(
            far.owner_of_pooled(&busy, &own(OLD * 9), Duration::MAX).0,
            Owner::Pool,
            "it may take for ever to open"
        );
        let odd = Backend { age: Some(Duration::MAX), ..busy.clone() };
        assert_eq!(far.owner_of_pooled(&odd, &own(OLD), limit).0, Owner::Unknown);
        let unix = place(None, Staged::default()).owner_of_pooled(&backend(None, "active"), &own(OLD), limit);
        assert_eq!(unix.0, Owner::Pool);
        let hidden = Backend { backend_start: None, age: None, ..busy.clone() };
        assert_eq!(far.owner_of_pooled(&hidden, &own(OLD), limit).0, Owner::Unknown);
    }

    #[test]
    fn a_server_on_another_host_that_sees_us_as_we_do() {
        let (near, server) = ("10.0.0.1:1000", "10.0.0.2:5432");
        let seen = |client: &str, server: &str| {
            let host = Staged::default().own(&[1, 2]).socket(near, server, "01", 1);
            let host = host.socket("10.0.0.1:2000", server, "01", 2).socket("10.0.0.1:3000", server, "01", 3);
            let place = Place { server: Some("10.0.0.2:5432".parse().unwrap()), ..place(Some(near), host) };
            (place.owner(&backend(Some(client), "active")).0, place.is_another_s(&backend(Some(client), "active")))
        };
        assert_eq!(seen("10.0.0.1:2000", server), (Owner::ThisProcess, false));
        assert_eq!(seen("10.0.0.1:3000", server), (Owner::Unknown, true));
        assert_eq!(seen("10.0.0.1:2000", "10.0.0.3:5432"), (Owner::Unknown, false), "through something in between");
        let tunnel = Staged::default().own(&[1, 2]).socket(PEER, SERVER, "01", 1).socket(CLIENT, SERVER, "01", 2);
        let beyond = place(Some(PEER), tunnel);
        assert_eq!(beyond.owner(&backend(Some(CLIENT), "active")).0, Owner::Unknown, "its loopback is not ours");
    }
}
