//! [`audit`](audit()): the server's view of an application's backends, joined with the pool's own.
//!
//! Whom a backend belongs to is known in two ways: by its pid, which the pool's own rows have, and by the process id in its
//! `application_name`, which every pool with this manager sets. To call a process dead is to invite its backends to be
//! ended, so it takes proof: see [`Place::is_here`] and [`Place::owner`].

use super::host::Host;
use super::manager::application_name;
use super::{Connector, Error, Pool, PostgresManager};
use crate::stats::{Connections, Short, write_table};
use crate::text::{CAUSE, Shown, brief};
use crate::{ConnectionInfo, ConnectionState, Manage, Opening};
use ::postgres::Client;
use ::postgres::error::SqlState;
use ::postgres::types::Type;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::collections::BTreeMap;
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
/// audit of pool 'orders', app on database shop: 4 backends: 2 of this pool, 1 of another process, 1 orphaned
/// pid   state                for      age       in tx    waiting on          whose
/// 4711  active               1.20 s   12.0 min  1.20 s   Lock transactionid  #3 out by 'worker-1' at src/main.rs:12:5
/// 4712  idle                 40.0 s   11.8 min  -        -                   #4 idle
/// 4720  idle                 3.10 s   2.00 min  -        -                   process 4242
/// 4690  active               17.0 min 17.1 min  17.0 min Timeout PgSleep     ORPHANED: process 4100 is dead
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
    /// The process id of its client, by its `application_name`, on the client's host.
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

/// Whose a backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Owner {
    /// This pool's: its own row is in [`Backend::connection`].
    Pool,
    /// The connection that the audit itself was made on.
    Audit,
    /// This process's, but not in the pool: detached, being opened or closed, given up, or of another pool of the same name;
    /// or that of an earlier process with the same number.
    ThisProcess,
    /// Another process's, [`Backend::process`], of which is not proven that it is dead.
    Process,
    /// Nobody's: the process that opened it is dead, was on this host, and nobody else holds the connection.
    Orphaned,
    /// Its `application_name` does not say.
    Unnamed,
}

/// Looks at the server for the backends of this application, and at the pool for its own: same role, same database, and an
/// `application_name` of the pool's name with any process id. (If you set `application_name` yourself: that very name; then
/// whose the others are cannot be known. If yours ends in the process id as ` [4711]`, it can.)
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
/// # What cannot be known
///
/// A backend is called [orphaned](Owner::Orphaned) if all of this holds, and otherwise [`note`](Backend::note) says which
/// does not:
///
/// * its client was on this host: it came over loopback (or a unix socket), and so did the audit, with nothing in between;
/// * no process with the number in its name lives, by Linux's `/proc` (elsewhere nothing can be known), be it in a
///   container;
/// * it is busy: an idle one would have noticed at once that its client is gone, so somebody holds the connection, such as
///   a proxy, a pooler, or a child of the dead process;
/// * no process holds the client's end of the connection. Of unix sockets this cannot be known; so there it takes a process
///   that sees all others of the machine: not one in a container.
///
/// A process on another host cannot be looked at from here: run the audit there, or let
/// [`ServerGuards`](super::ServerGuards) do the work. A dead process whose number another process has by now passes for
/// alive.
///
/// Behind a pooler the pids that the pool has are the pooler's: nothing can be joined, and nobody is called orphaned. With
/// several hosts in the configuration only one of them is asked.
///
/// # Errors
///
/// If no connection can be had, or the server cannot be asked.
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
/// If the server cannot be asked.
pub fn audit_with<T: Connector>(pool: &Pool<T>, client: &mut Client) -> Result<Audit, Error> {
    let config = pool.manager().config();
    let role = config.get_user();
    look(pool, client, None, role.map(|role| (role, config.get_dbname().unwrap_or(role))))
}

impl Audit {
    /// The backends of dead processes.
    pub fn orphans(&self) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(|b| b.owner == Owner::Orphaned)
    }

    /// Ends the [orphaned](Owner::Orphaned) backends that this audit has found, with `pg_terminate_backend`, on a connection
    /// got as [`audit`](audit()) gets its own. What they were doing is rolled back.
    ///
    /// Each is looked at again before: this host, whether its process is still dead and its connection nobody's; and the
    /// server, in the statement that ends it, whether the pid is still that backend (`backend_start`,
    /// `application_name`) and busy. It waits for at most 2 seconds until they are gone.
    ///
    /// # Errors
    ///
    /// If no connection can be had, or it is lost. That the server refuses one of them is told in the account.
    #[track_caller]
    pub fn terminate_orphans<T: Connector>(&self, pool: &Pool<T>) -> Result<Terminations, Error> {
        on_a_connection(pool, |connection, _| self.terminate_orphans_with(connection))
    }

    /// [`terminate_orphans`](Audit::terminate_orphans) with a connection of yours, to the same server.
    ///
    /// # Errors
    ///
    /// If the connection is lost. That the server refuses one of them is told in the account.
    pub fn terminate_orphans_with(&self, client: &mut Client) -> Result<Terminations, Error> {
        let host = Host::look();
        let mut done = Vec::new();
        for backend in self.orphans() {
            let (Some(process), Some(start)) = (backend.process, backend.backend_start) else { continue };
            let outcome = match &host {
                Err(why) => Outcome::Spared((*why).into()),
                Ok(host) if host.lives(process) => Outcome::Spared(format!("process {process} lives")),
                Ok(host) if backend.client.is_some_and(|near| host.is_held(near)) => Outcome::Spared(HELD.into()),
                Ok(_) => terminate(client, backend, start)?,
            };
            done.push((start, Termination { pid: backend.pid, process, outcome }));
        }
        let deadline = Instant::now() + GONE_WITHIN;
        for (start, done) in &mut done {
            while done.outcome == Outcome::Signalled {
                if !is_there(client, done.pid, *start)? {
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

/// Why a dead process's backend is not an orphan.
const HELD: &str = "somebody holds the connection: a proxy, a pooler or a child of the process";

/// What was done about the orphans of an audit. [`Display`](fmt::Display) prints a line for each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Terminations {
    /// The name of the pool.
    pub pool: String,
    /// One for each orphan.
    pub done: Vec<Termination>,
}

/// What was done about one orphan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Termination {
    /// The process id of the backend.
    pub pid: i32,
    /// The process id of its dead client.
    pub process: u32,
    /// What has come of it.
    pub outcome: Outcome,
}

/// What has come of an orphan.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// It was told to end, and has.
    Ended,
    /// It was told to end, and was still there after 2 seconds.
    Signalled,
    /// It was no longer there, or no longer busy: nothing was done.
    Gone,
    /// It turned out not to be an orphan, for this reason: nothing was done.
    Spared(String),
    /// The server refused, in these words.
    Refused(String),
}

fn terminate(client: &mut Client, backend: &Backend, start: SystemTime) -> Result<Outcome, Error> {
    const STATEMENT: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
        WHERE pid = $1 AND backend_start = $2 AND application_name = $3 AND state NOT LIKE 'idle%'";
    fresh(client)?;
    let name = &backend.application_name;
    let parameters: [(&(dyn ::postgres::types::ToSql + Sync), Type); 3] =
        [(&backend.pid, Type::INT4), (&start, Type::TIMESTAMPTZ), (name, Type::TEXT)];
    match client.query_typed_opt(STATEMENT, &parameters) {
        Ok(Some(row)) if row.get(0) => Ok(Outcome::Signalled),
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
    let found =
        client.query_typed_opt("SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2", &parameters)?;
    Ok(found.is_some())
}

/// Within a transaction the server would repeat what it saw first.
fn fresh(client: &mut Client) -> Result<(), Error> {
    Ok(client.batch_execute("SELECT pg_stat_clear_snapshot()")?)
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
                       pg_backend_pid() AS pid, inet_client_addr() AS address, inet_client_port() AS port) \
    SELECT me.role, me.database, me.pid, me.address, me.port, \
           a.pid, a.application_name, a.client_addr, a.client_port, a.backend_start, \
           extract(epoch FROM clock_timestamp() - a.backend_start)::float8, a.state, \
           extract(epoch FROM clock_timestamp() - a.state_change)::float8, \
           extract(epoch FROM clock_timestamp() - a.xact_start)::float8, \
           a.wait_event_type, a.wait_event \
    FROM me LEFT JOIN pg_stat_activity a \
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
    fresh(client)?;
    // What the pool opens or closes meanwhile is in one of the two.
    let before = pool.connections();
    let (role, database) = whose.unzip();
    let rows = client.query_typed(QUESTION, &[(&role, Type::TEXT), (&database, Type::TEXT)])?;
    let after = pool.connections();
    let first = rows.first().ok_or_else(|| Error::own("the server did not answer the audit", false))?;

    let place = Place {
        peer: socket_address(first.get(3), first.get(4)),
        backend: first.get(2),
        pooled: pid.is_some_and(|pid| pid != first.get::<_, i32>(2)),
        host: Host::look(),
    };
    let known = |pid: i32| {
        let has = |c: &&ConnectionInfo| !place.pooled && c.server_id == u64::try_from(pid).ok();
        after.iter().find(has).or_else(|| before.iter().find(has)).cloned()
    };
    let mut backends = Vec::new();
    for row in rows.iter().filter(|row| row.get::<_, Option<i32>>(5).is_some()) {
        let (pid, name): (i32, String) = (row.get(5), row.get::<_, Option<String>>(6).unwrap_or_default());
        let process = process(&name).map(|(_, pid)| pid).filter(|_| names.matches(&name));
        // An unseen pooler may lend the same backend to others.
        let connection = known(pid).filter(|_| process.is_none_or(|pid| pid == std::process::id()));
        if connection.is_none() && pid != place.backend && !names.matches(&name) {
            continue;
        }
        // The server's clock may step back.
        let time = |i| row.get::<_, Option<f64>>(i).map(|s: f64| Duration::try_from_secs_f64(s).unwrap_or_default());
        let event = |i| row.get::<_, Option<String>>(i);
        let mut backend = Backend {
            pid,
            process,
            application_name: name,
            client: socket_address(row.get(7), row.get(8)),
            backend_start: row.get(9),
            age: time(10),
            state: row.get(11),
            since: time(12),
            in_transaction_for: time(13),
            waiting_on: event(14).map(|kind| format!("{kind} {}", event(15).unwrap_or_default())),
            owner: Owner::Pool,
            connection,
            note: None,
        };
        if backend.connection.is_none() {
            (backend.owner, backend.note) = place.owner(&backend);
        }
        backends.push(backend);
    }

    let still = |c: &ConnectionInfo| before.iter().any(|b| b.id == c.id && b.server_id == c.server_id);
    let there = |c: &ConnectionInfo| backends.iter().any(|b| u64::try_from(b.pid).ok() == c.server_id);
    let settled = |c: &ConnectionInfo| !matches!(c.state, ConnectionState::Opening | ConnectionState::Closing);
    let missing: Vec<_> = after.iter().filter(|c| settled(c) && still(c) && !there(c)).cloned().collect();
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
    let hidden = backends.iter().filter(|b| b.backend_start.is_none()).count();
    if hidden > 0 {
        notes.push(format!("the state of {hidden} is hidden from this role: grant it pg_read_all_stats to see it"));
    }
    let config = manager.config();
    if config.get_hosts().len().max(config.get_hostaddrs().len()) > 1 {
        notes.push("the configuration names several hosts: only the server that answered was asked".into());
    }
    if let Names::These(_) = names {
        notes.push(format!(
            "the application_name '{own_name}' is your own and names no process: whose another's backend is cannot be known"
        ));
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
        role: first.get(0),
        database: first.get(1),
        application_name: own_name,
        backends,
        missing: Connections(if place.pooled { Vec::new() } else { missing }),
        notes,
    })
}

/// A unix socket has no address, and the port -1.
fn socket_address(ip: Option<IpAddr>, port: Option<i32>) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip?.to_canonical(), u16::try_from(port?).ok()?))
}

/// From where the audit was made.
struct Place {
    /// The near end of the connection that asked, as the server sees it. `None`: a unix socket.
    peer: Option<SocketAddr>,
    /// The pid of the backend that answered.
    backend: i32,
    /// Whether there is a pooler in between.
    pooled: bool,
    host: Result<Host, &'static str>,
}

impl Place {
    /// Whose a backend is that the pool does not have, and why no more can be said.
    fn owner(&self, backend: &Backend) -> (Owner, Option<String>) {
        if backend.pid == self.backend {
            return (Owner::Audit, None);
        }
        let Some(process) = backend.process else { return (Owner::Unnamed, None) };
        if process == std::process::id() && self.may_be_ours(backend.client) {
            return (Owner::ThisProcess, None);
        }
        let host = match self.is_here(backend) {
            Ok(host) => host,
            Err(why) => return (Owner::Process, Some(format!("whether its process lives cannot be known: {why}"))),
        };
        if host.lives(process) {
            return (Owner::Process, None);
        }
        // An idle one reads from its connection: it would have noticed the end, and be gone.
        if backend.is_idle() || backend.client.is_some_and(|near| host.is_held(near)) {
            return (Owner::Process, Some(format!("its process is dead, but {HELD}")));
        }
        (Owner::Orphaned, None)
    }

    fn may_be_ours(&self, client: Option<SocketAddr>) -> bool {
        let (Some(near), Some(peer)) = (client, self.peer) else { return true };
        near.ip() == peer.ip() || self.host.as_ref().is_ok_and(|host| host.is_ours(near))
    }

    /// Whether the backend's client runs, or ran, on this host, so that it would be seen if it lived.
    ///
    /// Over loopback: if the server sees the very port that this process holds, it is in the same network namespace, and so
    /// is everybody whom it sees over loopback: a process in any container of it shows in the same table of connections. Over
    /// a unix socket a container can reach the server as well, and does not show; so there one must see all processes.
    fn is_here(&self, backend: &Backend) -> Result<&Host, &'static str> {
        if backend.backend_start.is_none() {
            return Err("the server hides it from this role");
        }
        if self.pooled {
            return Err("there is a pooler in between");
        }
        let host = self.host.as_ref().map_err(|why| *why)?;
        let direct = self.peer.is_some_and(|peer| peer.ip().is_loopback() && host.is_ours(peer));
        match backend.client {
            Some(near) if !near.ip().is_loopback() => Err("its client is not seen to be on this host"),
            Some(_) if self.peer.is_none() => Err("it came over TCP, and the audit through a unix socket"),
            Some(_) if !direct => Err("the server is not on this host, or something stands in between"),
            Some(_) => Ok(host),
            None if !host.sees_everybody() => Err("it came through a unix socket, and this process is in a container"),
            None if direct => Ok(host),
            // The server, then, is on a machine that has this socket: on this one, if its process is.
            None if self.peer.is_none() && u32::try_from(self.backend).is_ok_and(|pid| host.lives(pid)) => Ok(host),
            None => Err("the server is not on this host, or something stands in between"),
        }
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
            (count(Owner::Process), "of other processes"),
            (count(Owner::Unnamed), "unnamed"),
            (count(Owner::Orphaned), "orphaned"),
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
        let process = self.process.map_or("?".into(), |pid| pid.to_string());
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
            Owner::Process => match self.client.filter(|near| !near.ip().is_loopback()) {
                Some(near) => format!("process {process} at {}", near.ip()),
                None => format!("process {process}"),
            },
            Owner::Orphaned => format!("ORPHANED: process {process} is dead"),
            Owner::Unnamed => "?".into(),
        }
    }
}

impl fmt::Display for Terminations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool '{}': ", Shown(&self.pool))?;
        if self.done.is_empty() {
            return write!(f, "no orphans");
        }
        let ended = self.done.iter().filter(|t| t.outcome == Outcome::Ended).count();
        write!(f, "ended {ended} of {} orphaned backends", self.done.len())?;
        for Termination { pid, process, outcome } in &self.done {
            write!(f, "\n  {pid} of dead process {process}: ")?;
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

    /// A backend of process 42, which does not live.
    fn backend(client: Option<&str>, state: &str) -> Backend {
        Backend {
            pid: 7,
            application_name: "orders [42]".into(),
            process: Some(42),
            client: client.map(|c| c.parse().unwrap()),
            backend_start: Some(SystemTime::UNIX_EPOCH),
            age: Some(Duration::ZERO),
            state: Some(state.into()),
            since: Some(Duration::ZERO),
            in_transaction_for: None,
            waiting_on: None,
            owner: Owner::Pool,
            connection: None,
            note: None,
        }
    }

    const PEER: &str = "127.0.0.1:1000";

    fn place(peer: Option<&str>, host: Host) -> Place {
        Place { peer: peer.map(|p| p.parse().unwrap()), backend: 99, pooled: false, host: Ok(host) }
    }

    /// Sees everybody, holds the peer, and the server's backend lives here.
    fn host() -> Host {
        Host::with(&[PEER], &[PEER], &[99], true)
    }

    #[test]
    fn to_be_dead_takes_proof() {
        let tcp = Some("127.0.0.1:2000");
        let judge = |place: &Place, backend: &Backend| {
            let (owner, note) = place.owner(backend);
            (owner, note.unwrap_or_default())
        };
        let orphaned = (Owner::Orphaned, String::new());
        assert_eq!(judge(&place(Some(PEER), host()), &backend(tcp, "active")), orphaned);
        assert_eq!(judge(&place(Some(PEER), host()), &backend(None, "active")), orphaned);
        assert_eq!(judge(&place(None, host()), &backend(None, "active")), orphaned);

        let not = |place: &Place, backend: &Backend, why: &str| {
            let (owner, note) = judge(place, backend);
            assert_eq!(owner, Owner::Process, "{why}");
            assert!(note.contains(why), "{note}");
        };
        let here = || place(Some(PEER), host());
        not(&here(), &backend(tcp, "idle"), "dead, but somebody holds");
        not(&here(), &backend(tcp, "idle in transaction"), "dead, but somebody holds");
        not(&here(), &backend(Some("10.0.0.7:2000"), "active"), "not seen to be on this host");
        let held = Host::with(&[PEER, "127.0.0.1:2000"], &[PEER], &[99], true);
        not(&place(Some(PEER), held), &backend(tcp, "active"), "dead, but somebody holds");
        let tunnel = Host::with(&[PEER], &[], &[99], true);
        not(&place(Some(PEER), tunnel), &backend(tcp, "active"), "something stands in between");
        let far = Host::with(&["10.0.0.1:1000"], &["10.0.0.1:1000"], &[99], true);
        not(&place(Some("10.0.0.1:1000"), far), &backend(tcp, "active"), "the server is not on this host");
        not(&place(None, host()), &backend(tcp, "active"), "the audit through a unix socket");
        let container = Host::with(&[PEER], &[PEER], &[99], false);
        not(&place(Some(PEER), container), &backend(None, "active"), "in a container");
        let elsewhere = Host::with(&[], &[], &[], true);
        not(&place(None, elsewhere), &backend(None, "active"), "the server is not on this host");
        not(&Place { pooled: true, ..here() }, &backend(tcp, "active"), "a pooler in between");
        not(&Place { host: Err("no /proc"), ..here() }, &backend(tcp, "active"), "no /proc");
        not(&here(), &Backend { backend_start: None, ..backend(tcp, "active") }, "hides it");
        let alive = Host::with(&[PEER], &[PEER], &[99, 42], true);
        assert_eq!(judge(&place(Some(PEER), alive), &backend(tcp, "active")), (Owner::Process, String::new()));
    }

    #[test]
    fn our_own_number_elsewhere_is_not_us() {
        let ours = |client| Backend { process: Some(std::process::id()), ..backend(client, "active") };
        let here = place(Some(PEER), host());
        assert_eq!(here.owner(&ours(Some("127.0.0.1:2000"))).0, Owner::ThisProcess);
        assert_eq!(here.owner(&ours(Some("10.0.0.7:2000"))).0, Owner::Process);
        assert_eq!(here.owner(&Backend { pid: 99, ..ours(Some(PEER)) }).0, Owner::Audit);
        assert_eq!(here.owner(&Backend { process: None, ..ours(Some(PEER)) }).0, Owner::Unnamed);
    }
}
