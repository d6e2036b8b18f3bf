//! How backends that an audit has found are ended: each is proven once more just before.

use super::backend::{Audit, Backend, Owner};
use super::errand::on_a_connection;
use super::question::{BUSY, fresh};
use super::viewpoint::Viewpoint;
use crate::leaf::text::{CAUSE, Shown, brief};
use crate::postgres::error::Error;
use crate::postgres::operations::manager::Pool;
use crate::postgres::session::column;
use crate::postgres::wire::Connector;
use ::postgres::Client;
use ::postgres::types::Type;
use std::collections::HashSet;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

impl Audit {
    /// Ends the [orphaned](Owner::Orphaned) backends that this audit has found, and no others, with
    /// `pg_terminate_backend`. It uses a connection as [`audit`](crate::postgres::audit()) does. The server rolls back
    /// what the backends were doing.
    ///
    /// Each backend is proven once more just before, from that connection. And in the statement that ends it the server
    /// looks whether the pid is still that backend (`backend_start`, `application_name`) and busy. The call waits for
    /// at most 2 seconds until the backends are gone.
    ///
    /// # Errors
    ///
    /// If no connection is to be had, or it breaks. If the server refuses to end a backend, that backend's
    /// [outcome](Termination::outcome) says so.
    #[track_caller]
    pub fn terminate_orphans<T: Connector>(&self, pool: &Pool<T>) -> Result<Terminations, Error> {
        on_a_connection(pool, |connection, _| self.terminate_orphans_with(connection))
    }

    /// [`terminate_orphans`](Audit::terminate_orphans) with a connection of yours, to the same server, over TCP.
    ///
    /// # Errors
    ///
    /// If the connection breaks. If the server refuses to end a backend, that backend's [outcome](Termination::outcome)
    /// says so.
    pub fn terminate_orphans_with(&self, client: &mut Client) -> Result<Terminations, Error> {
        let pids: Vec<i32> = self.orphans().map(|b| b.pid).collect();
        if pids.is_empty() {
            return self.end(client, &[], |_| None, BUSY);
        }
        let (now, rows) =
            Viewpoint::look(client, None, Some((&self.role, &self.database)), |row| pids.contains(&row.pid))?;
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

    /// Ends the backends of this audit that you name by their pids, whatever their owner. Use it for backends that are
    /// [unknown](Owner::Unknown) to the audit and not to you. Otherwise as
    /// [`terminate_orphans`](Audit::terminate_orphans): the server looks whether each is still the backend that the
    /// audit saw, but neither whether it is busy nor whose it is.
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
    /// If no connection is to be had, or it breaks. If the server refuses to end a backend, or the audit has no such
    /// backend, its [outcome](Termination::outcome) says so.
    #[track_caller]
    pub fn terminate<T: Connector>(&self, pool: &Pool<T>, pids: &[i32]) -> Result<Terminations, Error> {
        on_a_connection(pool, |connection, _| self.terminate_with(connection, pids))
    }

    /// [`terminate`](Audit::terminate) with a connection of yours, to the same server.
    ///
    /// # Errors
    ///
    /// If the connection breaks. If the server refuses to end a backend, or the audit has no such backend, its
    /// [outcome](Termination::outcome) says so.
    pub fn terminate_with(&self, client: &mut Client, pids: &[i32]) -> Result<Terminations, Error> {
        let own: i32 = column(&client.query_typed_one("SELECT pg_catalog.pg_backend_pid()", &[])?, 0)?;
        let spared = |backend: &Backend| (backend.pid == own).then(|| Outcome::Spared(ASKING.into()));
        self.end(client, pids, spared, "")
    }

    /// Ends these backends, except where `against` gives an outcome instead, and only where the server finds
    /// `condition` true.
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
                // A later backend with the same pid could not be told from this one.
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
            self.log.warn(done.line());
        }
        Ok(done)
    }
}

/// How long a termination waits for the backends to be gone. The documentation above promises it.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// Why the backend of the very connection that asks is not ended.
const ASKING: &str = "it is the connection that asks";

/// What was done about the backends of an audit. [`Display`](fmt::Display) prints a line for each.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Terminations {
    /// The name of the pool.
    pub pool: String,
    /// One for each orphan, or for each backend that was named.
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
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The backend was signalled to end, and has ended.
    Ended,
    /// The backend was signalled to end, and was still there after 2 seconds.
    Signalled,
    /// The backend was no longer there, or, if it was an orphan, no longer busy: nothing was done.
    Gone,
    /// The backend was left alone, for this reason: it was not proven to be an orphan, or the audit has no such
    /// backend.
    Spared(String),
    /// The server refused, in these words: its message, and its detail, if it sent one. From PostgreSQL 16 on only the
    /// detail says which role may do it.
    Refused(String),
}

/// Signals one backend to end.
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
            Some(db) if !client.is_closed() => Ok(Outcome::Refused(match db.detail() {
                Some(detail) => format!("{}: {detail}", db.message()),
                None => db.message().into(),
            })),
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

impl fmt::Display for Terminations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool '{}': {}", Shown(&self.pool), self.sum())?;
        self.done.iter().try_for_each(|one| write!(f, "\n  {}", one.line()))
    }
}

impl Terminations {
    /// All outcomes in one line, for the log.
    fn line(&self) -> String {
        let all = std::iter::once(self.sum()).chain(self.done.iter().map(Termination::line));
        all.collect::<Vec<_>>().join("; ")
    }

    fn sum(&self) -> String {
        let ended = self.done.iter().filter(|t| t.outcome == Outcome::Ended).count();
        match self.done.len() {
            0 => "nothing to end".into(),
            all => format!("ended {ended} of {all} backends"),
        }
    }
}

impl Termination {
    fn line(&self) -> String {
        let Termination { pid, process, outcome } = self;
        let hint = process.map(|process| format!(" ({process} by its name)")).unwrap_or_default();
        let outcome = match outcome {
            Outcome::Ended => "ended".into(),
            Outcome::Signalled => "told to end, and still there".into(),
            Outcome::Gone => "was gone already, or busy no more".into(),
            Outcome::Spared(why) => format!("left alone: {}", Shown(why)),
            Outcome::Refused(why) => format!("the server refuses: {}", brief(why, CAUSE)),
        };
        format!("{pid}{hint}: {outcome}")
    }
}
