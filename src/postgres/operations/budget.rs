//! [`budget`]: how many connections the server allows, and whether all processes together stay below that number.
//!
//! The comparison only warns, unless it is asked to refuse; behind a pooler it never refuses.

use crate::leaf::text::Shown;
use crate::postgres::error::Error;
use crate::postgres::session::column;
use crate::{Cause, Start};
use ::postgres::Client;
use std::fmt;

/// What `build` does if all processes together may open more connections than the server allows. See
/// [`PostgresManager::processes`](crate::postgres::PostgresManager::processes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Budget {
    /// `build` logs a warning. The default, since the limit may be about to be raised, or the processes may not be busy
    /// all together.
    #[default]
    Warn,
    /// `build` fails, for good, with the sum in the error's text. It also fails if the server does not say what it
    /// allows.
    Refuse,
}

/// How many connections the server allows one role in one database, and why. Made by [`budget`].
///
/// The number counts as if no other client were there: `max_connections` is shared by all roles and databases, and
/// the limit of a database by all roles. [`Display`](fmt::Display) prints it in one line:
/// `app 97 (max_connections 100 less 3 reserved)`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Allowance {
    /// The role that logged in (`session_user`).
    pub role: String,
    /// The database.
    pub database: String,
    /// Whether the role is a superuser, to which neither reserves nor limits apply.
    pub superuser: bool,
    /// All connections the server can have at all: `max_connections`.
    pub max_connections: u32,
    /// How many of them are kept for superusers: `superuser_reserved_connections`. 0 if the role is a superuser.
    pub superuser_reserved: u32,
    /// How many more are kept for members of `pg_use_reserved_connections`: `reserved_connections`, since PostgreSQL
    /// 16. 0 before, and if the role is a member.
    pub reserved: u32,
    /// `CONNECTION LIMIT` of the role; `None` if it has no limit, or is a superuser.
    pub role_limit: Option<u32>,
    /// `CONNECTION LIMIT` of the database; `None` if it has no limit, or the role is a superuser.
    pub database_limit: Option<u32>,
}

impl Allowance {
    /// How many connections all limits together leave.
    pub fn connections(&self) -> u32 {
        let open = self.max_connections.saturating_sub(self.superuser_reserved).saturating_sub(self.reserved);
        [self.role_limit, self.database_limit].into_iter().flatten().fold(open, u32::min)
    }

    /// Whether `processes`, each with a pool of `max_size`, stay within that number.
    pub fn suffices_for(&self, processes: u32, max_size: u32) -> bool {
        u64::from(processes) * u64::from(max_size) <= u64::from(self.connections())
    }
}

impl fmt::Display for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} (max_connections {}", Shown(&self.role), self.connections(), self.max_connections)?;
        match (self.superuser_reserved, self.reserved) {
            (0, 0) => {}
            (n, 0) | (0, n) => write!(f, " less {n} reserved")?,
            (a, b) => write!(f, " less {a} + {b} reserved")?,
        }
        if let Some(n) = self.role_limit {
            write!(f, ", limit of the role {n}")?;
        }
        if let Some(n) = self.database_limit {
            write!(f, ", limit of database {} {n}", Shown(&self.database))?;
        }
        if self.superuser {
            write!(f, ", for superusers without reserves and limits")?;
        }
        write!(f, ")")
    }
}

/// Asks the server how many connections it allows the role and database of this client. One round trip.
///
/// Through a pooler such as PgBouncer the numbers are still the server's: what the pooler may open there. The pooler's
/// own limits for its clients (`max_client_conn`, `default_pool_size`) only its administrators can see.
///
/// ```no_run
/// # fn f(pool: millpond::postgres::Pool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = pool.get()?;
/// let allowance = millpond::postgres::budget(&mut client)?;
/// println!("the server allows {allowance}");
/// assert!(allowance.suffices_for(8, pool.max_size()));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// If the server cannot be asked, or answers something else.
pub fn budget(client: &mut Client) -> Result<Allowance, Error> {
    Ok(ask(client)?.0)
}

/// The allowance, and the backend's pid as the server itself gives it.
fn ask(client: &mut Client) -> Result<(Allowance, i32), Error> {
    // Neither `reserved_connections` nor its role exists before PostgreSQL 16. The server compares the limits with the
    // role that logged in, whatever `SET ROLE` has made of it.
    const QUESTION: &str = "\
        SELECT session_user::text, current_database()::text, r.rolsuper, r.rolconnlimit, d.datconnlimit, \
               pg_catalog.current_setting('max_connections')::int, \
               pg_catalog.current_setting('superuser_reserved_connections')::int, \
               coalesce(nullif(pg_catalog.current_setting('reserved_connections', true), ''), '0')::int, \
               coalesce((SELECT pg_catalog.pg_has_role(session_user, oid, 'USAGE') FROM pg_catalog.pg_roles \
                         WHERE rolname = 'pg_use_reserved_connections'), false), \
               pg_catalog.pg_backend_pid() \
        FROM pg_catalog.pg_roles r, pg_catalog.pg_database d WHERE r.rolname = session_user AND d.datname = current_database()";
    let row = client.query_typed_one(QUESTION, &[])?;
    // -1 means no limit; other negative values are states of the database.
    let limit = |i| column::<i32>(&row, i).map(|n| u32::try_from(n).ok());
    let number = |i| limit(i).map(Option::unwrap_or_default);
    let (superuser, may_use_reserved): (bool, bool) = (column(&row, 2)?, column(&row, 8)?);
    let allowance = Allowance {
        role: column(&row, 0)?,
        database: column(&row, 1)?,
        superuser,
        max_connections: number(5)?,
        superuser_reserved: if superuser { 0 } else { number(6)? },
        reserved: if superuser || may_use_reserved { 0 } else { number(7)? },
        role_limit: if superuser { None } else { limit(3)? },
        database_limit: if superuser { None } else { limit(4)? },
    };
    Ok((allowance, column(&row, 9)?))
}

/// Compares what all processes may open with what the server allows, when a pool starts. `pid` is the backend's pid as
/// the login gave it: a pooler gives a number of its own.
pub(super) fn compare(
    client: &mut Client,
    pid: Option<i32>,
    processes: u32,
    budget: Budget,
    start: &Start<'_>,
) -> Result<(), Cause> {
    if processes == 0 {
        return Err(Cause::message("processes is 0, and must be at least 1").permanent());
    }
    let max_size = start.settings().max_size;
    let (allowance, real_pid) = match ask(client) {
        Ok(answer) => answer,
        Err(e) if budget == Budget::Refuse => return Err(Cause::of(e)),
        Err(e) => {
            start.warn(format_args!("cannot tell how many connections the server allows: {e}"));
            return Ok(());
        }
    };
    let sum = sum(processes, max_size);
    if pid.is_some_and(|pid| pid != real_pid) {
        start.info(format_args!(
            "{sum} connections to a pooler, which has limits of its own; the server behind it allows {allowance}"
        ));
        return Ok(());
    }
    if allowance.suffices_for(processes, max_size) {
        start.info(format_args!("{sum}, and the server allows {allowance}"));
        return Ok(());
    }
    let text = format!("{sum}, but the server allows {allowance}");
    if budget == Budget::Refuse {
        return Err(Cause::of(Error::own(text, true)).permanent());
    }
    start.warn(text);
    Ok(())
}

fn sum(processes: u32, max_size: u32) -> String {
    let s = if processes == 1 { "process" } else { "processes" };
    format!("{processes} {s} x {max_size} = {}", u64::from(processes) * u64::from(max_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowance() -> Allowance {
        Allowance {
            role: "app".into(),
            database: "shop".into(),
            superuser: false,
            max_connections: 100,
            superuser_reserved: 3,
            reserved: 0,
            role_limit: None,
            database_limit: None,
        }
    }

    #[test]
    fn the_smallest_counts() {
        let says = |a: Allowance, n, text: &str| assert_eq!((a.connections(), &*a.to_string()), (n, text));
        says(allowance(), 97, "app 97 (max_connections 100 less 3 reserved)");
        let sixteen = Allowance { reserved: 5, ..allowance() };
        says(sixteen, 92, "app 92 (max_connections 100 less 3 + 5 reserved)");
        let limited = Allowance { role_limit: Some(20), database_limit: Some(30), ..allowance() };
        says(
            limited,
            20,
            "app 20 (max_connections 100 less 3 reserved, limit of the role 20, limit of database shop 30)",
        );
        let none = Allowance { role_limit: Some(0), ..allowance() };
        says(none, 0, "app 0 (max_connections 100 less 3 reserved, limit of the role 0)");
        let absurd = Allowance { superuser_reserved: 200, ..allowance() };
        says(absurd, 0, "app 0 (max_connections 100 less 200 reserved)");
    }

    #[test]
    fn exactly_enough_is_enough() {
        assert!(allowance().suffices_for(1, 97) && !allowance().suffices_for(2, 49));
        assert!(!allowance().suffices_for(u32::MAX, u32::MAX));
        assert_eq!(sum(8, 17), "8 processes x 17 = 136");
        assert_eq!(sum(1, 17), "1 process x 17 = 17");
    }
}
