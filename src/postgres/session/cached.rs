//! The shortcuts of a [`Connection`] that use its statement cache. See [the module](crate::postgres#statements).

use super::connection::Connection;
use super::plain::is_plain;
use super::statements::{Execute, Operation, Params, Query, QueryOne, QueryOpt, StatementCacheStats};
use ::postgres::types::{ToSql, Type};
use ::postgres::{Client, Error, Row, Statement};

/// Prepared statements, remembered. See [the module](crate::postgres#statements).
impl Connection {
    /// [`Client::prepare`], unless this connection has prepared the same SQL before: then nothing is sent.
    ///
    /// The shortcuts, such as [`query_cached`](Connection::query_cached), do this by themselves, and renew a statement
    /// that has gone stale. A statement that you keep cannot be renewed: a stale one fails with SQLSTATE 0A000 or
    /// 26000, and is forgotten if the connection is [observed](Connection::is_observed); if not, call
    /// [`clear_statement_cache`](Connection::clear_statement_cache). With the cache off every call prepares.
    ///
    /// # Errors
    ///
    /// As [`Client::prepare`].
    pub fn prepare_cached(&mut self, sql: &str) -> Result<Statement, Error> {
        self.prepare_typed_cached(sql, &[])
    }

    /// [`Client::prepare_typed`], as [`prepare_cached`](Connection::prepare_cached) does it. The same SQL with other
    /// types is another statement.
    ///
    /// # Errors
    ///
    /// As [`Client::prepare_typed`].
    pub fn prepare_typed_cached(&mut self, sql: &str, types: &[Type]) -> Result<Statement, Error> {
        let statements = &mut self.statements;
        self.client.completed(|client| statements.prepare(client, sql, types))
    }

    /// [`Client::query`] with a statement from the cache: one round trip, where that takes two each time.
    ///
    /// ```no_run
    /// # fn f(mut client: millpond::postgres::PooledConnection) -> Result<(), postgres::Error> {
    /// for row in client.query_cached("SELECT id, total FROM orders WHERE paid = $1", &[&false])? {
    ///     println!("{}: {}", row.get::<_, i64>(0), row.get::<_, i64>(1));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Client::query`], with one exception. A statement that the server no longer has, or whose result has
    /// changed, is prepared and run again, if that is outside a transaction, and it is certain that nothing of it ran.
    pub fn query_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.run_cached::<Query>(sql, params)
    }

    /// [`Client::query_one`], as [`query_cached`](Connection::query_cached) does it.
    ///
    /// # Errors
    ///
    /// As [`query_cached`](Connection::query_cached), and if there is not exactly one row.
    pub fn query_one_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
        self.run_cached::<QueryOne>(sql, params)
    }

    /// [`Client::query_opt`], as [`query_cached`](Connection::query_cached) does it.
    ///
    /// # Errors
    ///
    /// As [`query_cached`](Connection::query_cached), and if there is more than one row.
    pub fn query_opt_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, Error> {
        self.run_cached::<QueryOpt>(sql, params)
    }

    /// [`Client::execute`], as [`query_cached`](Connection::query_cached) does it. Returns the number of rows it
    /// changed.
    ///
    /// # Errors
    ///
    /// As [`query_cached`](Connection::query_cached).
    pub fn execute_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        self.run_cached::<Execute>(sql, params)
    }

    /// How well the cache does, since the connection was opened.
    pub fn statement_cache_stats(&self) -> StatementCacheStats {
        self.statements.stats()
    }

    /// Forgets all statements. The server closes them with the next request. If types were dropped and made again, call
    /// [`Client::clear_type_cache`] first.
    pub fn clear_statement_cache(&mut self) {
        self.client.reach();
        self.statements.clear_all();
    }

    fn run_cached<O: Operation>(&mut self, sql: &str, params: Params<'_>) -> Result<O::Output, Error> {
        if !self.is_observed() && !is_plain(sql) {
            self.client.unsettle();
        }
        let statements = &mut self.statements;
        self.client.completed(|client: &mut Client| statements.run_outside::<O>(client, sql, params))
    }
}
