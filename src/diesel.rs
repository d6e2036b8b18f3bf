//! Diesel: a [`PooledConnection`] is a Diesel connection if what is pooled is one.
//!
//! `&mut pool.get()?` goes wherever Diesel asks for a connection, as r2d2's pooled connection does. So a program that
//! uses `diesel::r2d2` moves by its `use` line: the manager stays Diesel's own, and the pool is this crate's.
//!
//! ```
//! use diesel::prelude::*;
//! use diesel::r2d2::ConnectionManager;
//! use millpond::Pool; // was: use diesel::r2d2::{ConnectionManager, Pool};
//!
//! diesel::table! {
//!     wheels (id) {
//!         id -> Integer,
//!         name -> Text,
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let manager = ConnectionManager::<SqliteConnection>::new(":memory:");
//! let pool = Pool::builder().max_size(1).build(manager)?;
//! let _guard = pool.guard();
//!
//! let mut connection = pool.get()?;
//! diesel::sql_query("CREATE TABLE wheels (id INTEGER PRIMARY KEY, name TEXT NOT NULL)").execute(&mut connection)?;
//! connection.transaction(|connection| {
//!     diesel::insert_into(wheels::table).values(wheels::name.eq("overshot")).execute(connection)
//! })?;
//! let names: Vec<String> = wheels::table.select(wheels::name).load(&mut connection)?;
//! assert_eq!(names, ["overshot"]);
//! # Ok(())
//! # }
//! ```
//!
//! Any [`Manage`] will do whose connections are Diesel's. The `r2d2` feature of Diesel is needed for its
//! `ConnectionManager` only.
//!
//! # Transactions
//!
//! * A transaction that is still open when its connection is returned, or that Diesel could not end, does not reach the
//!   next user: `ConnectionManager` calls such a connection broken, and the pool closes it. The server rolls back. That
//!   is Diesel's own account of its transactions. A `BEGIN` in a query is not in it: use `transaction`, or `discard`
//!   the connection. (After `BEGIN` by `batch_execute` the next user finds an open transaction, as with r2d2.)
//! * A connection that a panic returns is closed, whatever its state.
//! * A test transaction (`begin_test_transaction`) stays open when its connection is returned, and is never committed.
//!   On a pool of one connection, each checkout of a test sees what the one before has written, and no other test does.
//!   `diesel::r2d2::TestCustomizer` begins it for each connection:
//!
//! ```
//! use diesel::prelude::*;
//! use diesel::r2d2::{ConnectionManager, TestCustomizer};
//! use millpond::Pool;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = Pool::builder()
//!     .max_size(1)
//!     .max_idle(None) // as long as the pool lives, so does the transaction
//!     .max_lifetime(None)
//!     .connection_customizer(Box::new(TestCustomizer))
//!     .build(ConnectionManager::<SqliteConnection>::new(":memory:"))?;
//!
//! diesel::sql_query("CREATE TABLE gone_tomorrow (id INTEGER)").execute(&mut pool.get()?)?;
//! diesel::sql_query("INSERT INTO gone_tomorrow VALUES (1)").execute(&mut pool.get()?)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Limits
//!
//! * PostgreSQL's `COPY` (`copy_from`, `copy_to`) is implemented by Diesel for its own connections and for r2d2's pooled
//!   ones. Pass the connection within: `.execute(&mut *connection)`.
//! * Diesel lets other crates implement its traits only together with the promise to follow it from one minor version
//!   to the next. This feature stands on Diesel 2.3.

use ::diesel::connection::{
    CacheSize, Connection, ConnectionSealed, Instrumentation, LoadConnection, SimpleConnection, TransactionManager,
    TransactionManagerStatus,
};
use ::diesel::expression::QueryMetadata;
use ::diesel::migration::MigrationConnection;
use ::diesel::query_builder::{Query, QueryFragment, QueryId};
use ::diesel::query_dsl::UpdateAndFetchResults;
use ::diesel::{ConnectionError, ConnectionResult, QueryResult};
use std::marker::PhantomData;

use crate::manage::Manage;
use crate::pool::connection::PooledConnection;

/// The transaction manager of a [`PooledConnection`]: that of the connection within, which also keeps the state.
#[derive(Debug)]
pub struct PooledTransactionManager<T>(PhantomData<T>);

impl<M> SimpleConnection for PooledConnection<M>
where
    M: Manage,
    M::Connection: SimpleConnection,
{
    fn batch_execute(&mut self, query: &str) -> QueryResult<()> {
        M::Connection::batch_execute(self, query)
    }
}

impl<M> ConnectionSealed for PooledConnection<M>
where
    M: Manage,
    M::Connection: ConnectionSealed,
{
}

/// What the connection within can do. All but `establish`, which fails: only a pool makes pooled connections.
impl<M> Connection for PooledConnection<M>
where
    M: Manage,
    M::Connection: Connection,
{
    type Backend = <M::Connection as Connection>::Backend;
    type TransactionManager = PooledTransactionManager<<M::Connection as Connection>::TransactionManager>;

    fn establish(_: &str) -> ConnectionResult<Self> {
        Err(ConnectionError::BadConnection("a pooled connection comes from `Pool::get`".into()))
    }

    fn begin_test_transaction(&mut self) -> QueryResult<()> {
        M::Connection::begin_test_transaction(self)
    }

    fn execute_returning_count<T>(&mut self, source: &T) -> QueryResult<usize>
    where
        T: QueryFragment<Self::Backend> + QueryId,
    {
        M::Connection::execute_returning_count(self, source)
    }

    fn transaction_state(
        &mut self,
    ) -> &mut <Self::TransactionManager as TransactionManager<Self>>::TransactionStateData {
        M::Connection::transaction_state(self)
    }

    fn instrumentation(&mut self) -> &mut dyn Instrumentation {
        M::Connection::instrumentation(self)
    }

    fn set_instrumentation(&mut self, instrumentation: impl Instrumentation) {
        M::Connection::set_instrumentation(self, instrumentation);
    }

    fn set_prepared_statement_cache_size(&mut self, size: CacheSize) {
        M::Connection::set_prepared_statement_cache_size(self, size);
    }
}

impl<M, T> TransactionManager<PooledConnection<M>> for PooledTransactionManager<T>
where
    M: Manage,
    M::Connection: Connection<TransactionManager = T>,
    T: TransactionManager<M::Connection>,
{
    type TransactionStateData = T::TransactionStateData;

    fn begin_transaction(connection: &mut PooledConnection<M>) -> QueryResult<()> {
        T::begin_transaction(connection)
    }

    fn rollback_transaction(connection: &mut PooledConnection<M>) -> QueryResult<()> {
        T::rollback_transaction(connection)
    }

    fn commit_transaction(connection: &mut PooledConnection<M>) -> QueryResult<()> {
        T::commit_transaction(connection)
    }

    fn transaction_manager_status_mut(connection: &mut PooledConnection<M>) -> &mut TransactionManagerStatus {
        T::transaction_manager_status_mut(connection)
    }
}

impl<M, B> LoadConnection<B> for PooledConnection<M>
where
    M: Manage,
    M::Connection: LoadConnection<B>,
{
    type Cursor<'conn, 'query> = <M::Connection as LoadConnection<B>>::Cursor<'conn, 'query>;
    type Row<'conn, 'query> = <M::Connection as LoadConnection<B>>::Row<'conn, 'query>;

    fn load<'conn, 'query, T>(&'conn mut self, source: T) -> QueryResult<Self::Cursor<'conn, 'query>>
    where
        T: Query + QueryFragment<Self::Backend> + QueryId + 'query,
        Self::Backend: QueryMetadata<T::SqlType>,
    {
        M::Connection::load(self, source)
    }
}

impl<M> MigrationConnection for PooledConnection<M>
where
    M: Manage,
    M::Connection: MigrationConnection,
{
    fn setup(&mut self) -> QueryResult<usize> {
        M::Connection::setup(self)
    }
}

/// For `save_changes`.
impl<M, Changes, Output> UpdateAndFetchResults<Changes, Output> for PooledConnection<M>
where
    M: Manage,
    M::Connection: UpdateAndFetchResults<Changes, Output>,
{
    fn update_and_fetch(&mut self, changes: Changes) -> QueryResult<Output> {
        M::Connection::update_and_fetch(self, changes)
    }
}
