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
//! A checked-out [`Connection`] derefs to [`postgres::Client`]. The [`PostgresManager`] is better than the stock
//! `r2d2_postgres` one, which keeps working, in these ways:
//!
//! * **Refusals differ from failures.** A wrong password, a missing database, an untrusted certificate fail within one
//!   round trip, in the server's words, and are not tried again soon. A server that starts up, is full or away is tried
//!   again until the deadline. See [`Error`].
//! * **No caller gets the transaction of another.** A connection that is returned inside a transaction is rolled back
//!   before it is handed out again, with a warning that names the line that had checked it out. A connection in the
//!   middle of a COPY, or whose answers no longer match its questions, is closed. What a session has set stays, unless
//!   you choose otherwise: see [`Reset`].
//! * **A query ends with its checkout.** If its caller has returned the connection, or does not read the rest of the
//!   answer, the query is cancelled before the connection's place is taken by another. A [`Canceller`] ends with its
//!   checkout: a watchdog that fires late does not cancel the next caller's query.
//! * **A commit that keeps nothing is an error.** See [`Transaction::commit`].
//! * **Nothing hangs.** Validation keeps its limit, and a connect, query or close that is stuck in a dead network can
//!   be aborted from outside, so that no thread stays behind.
//! * **An operator sees whose backend it is.** `application_name` is the pool's name and the process id, unless you set
//!   it. [`audit`](audit()) joins the server's view of this application's backends with the pool's own. It finds the
//!   backends that are proven to have no client any more, and can end them. What it cannot prove it calls unknown, and
//!   leaves alone.
//! * **The same SQL takes one round trip, not two.** See [Statements](#statements).
//! * **Many processes share one server.** [`PostgresManager::processes`] has `build` compare what all of them may open
//!   with what the server allows: see [how to choose the numbers](choosing_the_numbers). [`ServerGuards`] have the
//!   server clean up after a process that was killed.
//! * **Tests are rolled back.** With [`PostgresManager::test_transaction`] nothing is committed.
//!
//! # Statements
//!
//! `client.query("SELECT ...", ..)` asks the server twice: to prepare the statement, and to run it. `query_cached`,
//! `query_one_cached`, `query_opt_cached` and `execute_cached` do the same and remember the statement, on this
//! connection and beyond this checkout: from the second call on they ask once, and the server need not parse and plan
//! again.
//!
//! ```no_run
//! # fn f(pool: &millpond::postgres::Pool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut client = pool.get()?;
//! let row = client.query_opt_cached("SELECT total FROM orders WHERE id = $1", &[&42_i64])?;
//!
//! let mut tx = client.begin()?; // `transaction()`, with the cache at hand
//! tx.execute_cached("UPDATE orders SET paid = true WHERE id = $1", &[&42_i64])?;
//! tx.commit()?;
//! # Ok(())
//! # }
//! ```
//!
//! Write values as parameters, not into the SQL: each text is a statement of its own. A connection remembers
//! [256](PostgresManager::statement_cache), least recently used first out.
//!
//! A statement that an `ALTER TABLE` has outdated (SQLSTATE 0A000) or a `DISCARD ALL` removed (26000) is forgotten.
//! Outside a transaction it is prepared again and run: the call works as if nothing had happened. This is done only if
//! the server refused the statement before anything of it ran, so nothing ever runs twice. (On a connection that is not
//! observed the error itself must prove that. It cannot where `log_parameter_max_length_on_error` is set, and then the
//! next call works.) Inside a transaction the call fails: the transaction has failed with it, and works when you repeat
//! it.
//!
//! # Transaction poolers
//!
//! PgBouncer in transaction mode may send each transaction to another server, where a statement that was prepared
//! before does not exist (26000), or another program's has its name (42P05). Set
//! [`statement_cache(0)`](PostgresManager::statement_cache), unless the pooler tracks prepared statements itself
//! (PgBouncer since 1.21, `max_prepared_statements`). Then the `_cached` functions use no statement that outlives a
//! transaction: the first time a connection meets an SQL text they learn the types of its parameters, in a short
//! transaction (three round trips; four if not observed), and from then on send text and parameters in one message, in
//! one round trip.
//!
//! Two things do *not* work there, whatever this crate does. One is `query` with a text instead of a statement, outside
//! a transaction: use `query_cached` or `query_typed`. The other are, at times, types that are not built in: `postgres`
//! looks each up, once, with a statement of its own. Where that is gone the call fails with 26000, and the pool
//! replaces the connection.
//!
//! # The observer
//!
//! To know in which state a connection is returned, and to abort calls that hang, the pool watches the bytes of the
//! connection. It does so in a TLS connector of its own around yours, which negotiates by your `sslmode` as `postgres`
//! does. (But only a plain no is taken for a no. After any other answer nothing is sent in clear text, and the attempt
//! is made again.) Beside a round trip the observer costs little (`cargo bench --bench postgres`). While it is on,
//! `client.cancel_token()` does not work with `cancel_query(NoTls)`: [`Connection::canceller`] does, on any connection.
//!
//! `postgres` calls a TLS connector for TCP alone. So while it connects over a **unix socket**, the pool listens on a
//! loopback port for some microseconds, on which nothing is sent or served. In a list of hosts the pool then looks up
//! the names, each in its turn.
//!
//! Not observed are: connections with [`PostgresManager::observe`] switched off; a unix socket whose host has a
//! `hostaddr` as well; and unix sockets where this process cannot connect to itself over the loopback interface.
//!
//! A connection that is not observed is asked with one query when it is returned (and is pinged before, if more than
//! the `_cached` functions was used). That costs as much as a small query. It is not asked if nothing was run but
//! `SELECT`, `INSERT`, `UPDATE`, `DELETE`, `VALUES` and `WITH` by the `_cached` functions of the connection, without an
//! error: none of these can begin a transaction. Nothing can be aborted where nothing is observed. Nor is there a
//! bound to what a server may send before the login is over (observed, 64 KiB in one message and 1 MiB in all):
//! `postgres` takes as much memory as a message claims to be long, until its sender hangs up. And a server that
//! declines TLS is taken for one that fails, and tried again: `postgres` does not tell them apart. (With
//! `sslmode=prefer` it takes both for a no, and logs in in clear text.)
//!
//! # Code that is generic over `GenericClient`
//!
//! ```no_run
//! fn total(client: &mut impl postgres::GenericClient) -> Result<i64, postgres::Error> {
//!     Ok(client.query_one("SELECT coalesce(sum(total), 0)::bigint FROM orders", &[])?.get(0))
//! }
//!
//! # fn f(pool: &millpond::postgres::Pool) -> Result<(), Box<dyn std::error::Error>> {
//! let mut client = pool.get()?;
//! total(&mut **client)?; // through the pool's connection to the `Client` itself
//! let mut tx = client.begin()?;
//! total(&mut *tx)?;
//! # Ok(())
//! # }
//! ```

mod error;
mod operations;
mod session;
mod wire;

pub use error::Error;
pub use operations::{
    Allowance, Audit, Backend, Budget, Outcome, Owner, Pool, PostgresManager, ServerGuards, Termination, Terminations,
    audit, audit_with, budget,
};
pub use session::{Canceller, Connection, Reset, StatementCacheStats, Transaction};
pub use wire::Connector;

use crate::Builder;
use ::postgres::NoTls;

#[cfg(any(doc, doctest))]
#[doc = include_str!("../../docs/postgres-budget.md")]
pub mod choosing_the_numbers {}

/// A PostgreSQL connection that is checked out of a pool.
pub type PooledConnection<T = NoTls> = crate::PooledConnection<PostgresManager<T>>;

/// The shortest start: makes a builder from a connection string (`host=... user=...` or `postgres://...`). Call
/// [`open`](Builder::open) on it. Without TLS; for TLS make a [`PostgresManager`] with your connector.
///
/// # Errors
///
/// If the text is no connection string. The error says which part is wrong, and never its text: it may be the password.
pub fn builder(params: &str) -> Result<Builder<PostgresManager<NoTls>>, Error> {
    Ok(Builder::new().manager(PostgresManager::parse(params, NoTls)?))
}
