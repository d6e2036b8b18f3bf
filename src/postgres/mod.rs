//! What a pool can do for its user when it knows that the other side is PostgreSQL.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! let pool = millpond::postgres::builder("host=127.0.0.1 user=app password=secret")?
//!     .name("orders")
//!     .max_size(16)
//!     .max_idle(Duration::from_secs(60))
//!     .open()?;
//! let _guard = pool.guard();
//!
//! let mut client = pool.get()?;
//! let rows = client.query("SELECT id FROM orders WHERE paid = $1", &[&false])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A borrowed [`Connection`] derefs to [`postgres::Client`]. The [`PostgresManager`] is better than the
//! stock `r2d2_postgres` one, which keeps working, in these ways:
//!
//! * **Refusals are told from failures.** A wrong password, a missing database, an untrusted certificate fail within one
//!   round trip, in the server's words, and are not hammered at; a server that starts up, is full or away is tried again
//!   until the deadline. See [`Error`].
//! * **Clean hand-over.** Nobody receives another's transaction: a connection that comes back inside one is rolled back
//!   before anyone gets it, with a warning that names the line that had borrowed it; one in the middle of a COPY, or whose
//!   answers no longer match its questions, is closed. See [`Reset`].
//! * **Nothing hangs.** Validation keeps its limit, and a connect, query or close that is stuck in a dead network can be
//!   cut from outside, so that no thread stays behind.
//! * **An operator sees whose backend it is.** `application_name` is the pool's name and the process id, unless you set it.
//!
//! # The observer
//!
//! All but the first rests on watching the bytes of the connection, in a TLS connector of this crate's own around yours,
//! which negotiates by your `sslmode` exactly as `postgres` does. It costs no measurable time. It cannot see **unix
//! sockets**: there a connection is asked with one query when it comes back, and nothing can be cut.
//! [`PostgresManager::observe`] switches it off. With it on, `client.cancel_token()` works with
//! [`PostgresManager::cancel`] only, not with `cancel_query(NoTls)`.

mod connection;
mod error;
mod manager;
// What the pool's own manager does not use, tests do.
#[allow(dead_code)]
mod observer;
mod scanner;

pub use connection::{Canceller, Connection};
pub use error::Error;
pub use manager::{PostgresManager, Reset};
pub use observer::Connector;

use crate::Builder;
use ::postgres::NoTls;

/// A pool of PostgreSQL connections.
pub type Pool<T = NoTls> = crate::Pool<PostgresManager<T>>;

/// A borrowed PostgreSQL connection.
pub type PooledConnection<T = NoTls> = crate::PooledConnection<PostgresManager<T>>;

/// The shortest start: a connection string in (`host=... user=...` or `postgres://...`), a builder out, to be
/// [`open`](Builder::open)ed. Without TLS; for TLS make a [`PostgresManager`] with your connector.
///
/// # Errors
///
/// If the string is not one. Says which part is wrong, and never what it says: it may be the password.
pub fn builder(params: &str) -> Result<Builder<PostgresManager<NoTls>>, Error> {
    Ok(Builder::new().manager(PostgresManager::parse(params, NoTls)?))
}
