//! The statement cache: what is prepared is remembered, so that the same SQL next time takes one round trip.
//!
//! A prepared statement dies without a word: by DDL, by `DISCARD ALL`, by a pooler that changes the server. Its next use
//! then fails, and two things decide what is done about that. *Had it begun to run?* Only what was refused before may be
//! tried again ([`Statements::take_refusal`]). *Was it in a transaction?* Then that is lost, and with it the right to
//! repeat a part of it. In every case what failed is forgotten, so that the next call begins anew.
//!
//! A dropped [`Statement`] sends a `Close` with the next request. So room is made before a statement is prepared, not
//! after: nothing is left queued when the call returns, which the drop of the connection would have to wait for.

use super::connection::{Connection, answer_to, ask_for_transaction, nonce};
use super::observer::{Status, Watch};
use ::postgres::error::SqlState;
use ::postgres::types::private::BytesMut;
use ::postgres::types::{IsNull, ToSql, Type, WrongType, to_sql_checked};
use ::postgres::{Client, Error, GenericClient, Row, Statement, ToStatement};
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// How many statements a connection remembers, unless it is said: psycopg keeps 100, JDBC 256.
pub(super) const DEFAULT_CAPACITY: usize = 256;

type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// What one connection has prepared.
pub(super) struct Statements {
    /// The capacity that was asked for.
    capacity: usize,
    prepared: Lru<Statement>,
    /// With the cache off, what is remembered of a statement is the types of its parameters. They are all that is needed to
    /// run it in one message, and they are true on every server behind a pooler.
    types: Lru<Arc<[Type]>>,
    watch: Option<Arc<Watch>>,
    hits: u64,
    misses: u64,
    /// `postgres` has lost the statements with which it looks up types, and will not prepare them again.
    spoilt: bool,
}

impl Statements {
    pub(super) fn new(capacity: usize, watch: Option<Arc<Watch>>) -> Statements {
        Statements {
            capacity,
            prepared: Lru::new(capacity),
            types: Lru::new(DEFAULT_CAPACITY),
            watch,
            hits: 0,
            misses: 0,
            spoilt: false,
        }
    }

    /// Nothing is left on the server.
    pub(super) fn clear(&mut self) {
        self.prepared.clear();
    }

    pub(super) fn is_spoilt(&self) -> bool {
        self.spoilt
    }

    pub(super) fn is_off(&self) -> bool {
        self.capacity == 0
    }

    fn stats(&self) -> StatementCacheStats {
        StatementCacheStats {
            hits: self.hits,
            misses: self.misses,
            statements: self.prepared.len(),
            capacity: self.capacity,
        }
    }

    fn prepare<C: GenericClient>(&mut self, client: &mut C, sql: &str, types: &[Type]) -> Result<Statement, Error> {
        // Somebody ran a statement of ours behind our back, and it was refused: which one, only they know.
        if self.watch.as_ref().is_some_and(|watch| watch.take_refused_statement()) {
            self.clear();
        }
        if let Some(statement) = self.prepared.get(sql, types) {
            self.hits += 1;
            return Ok(statement);
        }
        self.misses += 1;
        self.prepared.make_room();
        let statement = self.ask(client, sql, types)?;
        self.prepared.insert(sql, types, statement.clone());
        Ok(statement)
    }

    fn ask<C: GenericClient>(&mut self, client: &mut C, sql: &str, types: &[Type]) -> Result<Statement, Error> {
        client.prepare_typed(sql, types).inspect_err(|e| {
            // What is missing is none of ours, but one of `postgres`'s own.
            self.spoilt |= e.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME);
            self.take_refusal(e, sql);
        })
    }

    /// The types of a statement's parameters, with the cache off.
    fn types(&mut self, sql: &str) -> Option<Arc<[Type]>> {
        let types = self.types.get(sql, &[])?;
        self.hits += 1;
        Some(types)
    }

    /// Prepares a statement for a moment, to learn the types of its parameters. Where a pooler may change the server
    /// between transactions, this belongs inside one.
    fn learn<C: GenericClient>(&mut self, client: &mut C, sql: &str) -> Result<Arc<[Type]>, Error> {
        self.misses += 1;
        let types: Arc<[Type]> = self.ask(client, sql, &[])?.params().into();
        self.types.make_room();
        self.types.insert(sql, &[], Arc::clone(&types));
        Ok(types)
    }

    /// Runs it on a connection of which it is not known whether a transaction is open, and again if it was refused for its
    /// statement alone.
    fn run_outside<O: Operation>(
        &mut self,
        client: &mut Client,
        sql: &str,
        params: Params<'_>,
    ) -> Result<O::Output, Error> {
        if self.is_off() {
            return self.run_typed::<O, _>(client, sql, params, |statements, client| {
                if in_transaction(client, statements.watch.as_deref())? {
                    return statements.learn(client, sql);
                }
                // It keeps the server until the statement is closed.
                let mut transaction = client.transaction()?;
                let types = statements.learn(&mut transaction, sql)?;
                transaction.commit()?;
                Ok(types)
            });
        }
        let error = match self.run::<O, _>(client, sql, params) {
            Ok(output) => return Ok(output),
            Err(error) => error,
        };
        if !self.take_refusal(&error, sql) {
            return Err(error);
        }
        // A transaction that was open has failed by now. Either shows: what came before the refusal has been answered.
        let in_transaction = match &self.watch {
            Some(watch) => watch.status() != Status::Idle,
            None => ask_for_transaction(client).unwrap_or(true),
        };
        if in_transaction {
            return Err(error);
        }
        self.run::<O, _>(client, sql, params)
    }

    /// Runs it in a transaction, which a refusal ends.
    fn run_inside<O: Operation, C: GenericClient>(
        &mut self,
        client: &mut C,
        sql: &str,
        params: Params<'_>,
    ) -> Result<O::Output, Error> {
        if self.is_off() {
            return self.run_typed::<O, _>(client, sql, params, |statements, client| statements.learn(client, sql));
        }
        self.run::<O, _>(client, sql, params).inspect_err(|e| {
            self.take_refusal(e, sql);
        })
    }

    /// Runs it once, with a statement.
    fn run<O: Operation, C: GenericClient>(
        &mut self,
        client: &mut C,
        sql: &str,
        params: Params<'_>,
    ) -> Result<O::Output, Error> {
        let misses = self.misses;
        let statement = self.prepare(client, sql, &[])?;
        let remembered = self.misses == misses;
        let mut result = O::run(client, &statement, params);
        if remembered && result.as_ref().is_err_and(does_not_fit) {
            drop(statement);
            self.forget(sql);
            let statement = self.prepare(client, sql, &[])?;
            result = O::run(client, &statement, params);
        }
        result.inspect_err(|e| self.forget_what(e, sql))
    }

    /// Runs it once, in one message, with types that are remembered or else learned.
    fn run_typed<O: Operation, C: GenericClient>(
        &mut self,
        client: &mut C,
        sql: &str,
        params: Params<'_>,
        learn: impl Fn(&mut Self, &mut C) -> Result<Arc<[Type]>, Error>,
    ) -> Result<O::Output, Error> {
        let run = |client: &mut C, types: &[Type]| {
            if types.len() != params.len() {
                // It can only fail, and says so in the words of `postgres`.
                return O::run(client, sql, params);
            }
            let typed: Vec<_> = params.iter().copied().zip(types.iter().cloned()).collect();
            O::run_typed(client, sql, &typed)
        };
        let result = match self.types(sql) {
            Some(types) => match run(client, &types) {
                Err(e) if does_not_fit(&e) => {
                    self.forget(sql);
                    let types = learn(self, client)?;
                    run(client, &types)
                }
                result => result,
            },
            None => {
                let types = learn(self, client)?;
                run(client, &types)
            }
        };
        result.inspect_err(|e| self.forget_what(e, sql))
    }

    /// Forgets what may be the reason for this error. To forget one too many costs a round trip.
    fn forget_what(&mut self, e: &Error, sql: &str) {
        match e.code() {
            // As a rule nobody knows its name, and all went together.
            Some(code) if *code == SqlState::INVALID_SQL_STATEMENT_NAME => self.clear(),
            Some(code) if is_about_statements(code) => self.forget(sql),
            _ => {}
        }
    }

    fn forget(&mut self, sql: &str) {
        self.prepared.remove(sql);
        self.types.remove(sql);
    }

    /// Whether the call that just failed failed because of its statement, before anything of it ran: the server had no such
    /// statement, or one whose result has changed.
    fn take_refusal(&self, e: &Error, sql: &str) -> bool {
        match &self.watch {
            // The order of its messages says so.
            Some(watch) => watch.take_refused_statement(),
            None => is_refusal(e, sql),
        }
    }
}

/// A parameter does not fit its type, for which reason nothing was sent. The type may be another by now than when the
/// statement was prepared.
fn does_not_fit(e: &Error) -> bool {
    e.source().is_some_and(|source| source.is::<WrongType>())
}

/// 0A000 (a cached plan's result has changed, or something else), class 42 (no such table, column, function, type...) and
/// XX000 (a type that was dropped and made again).
fn is_about_statements(code: &SqlState) -> bool {
    *code == SqlState::FEATURE_NOT_SUPPORTED || *code == SqlState::INTERNAL_ERROR || code.code().starts_with("42")
}

/// As far as an error tells. The same two errors may come from inside something that already runs: a function, which leaves
/// its trace in the context, or SQL's own `EXECUTE`, which has computed its arguments by then and leaves none.
fn is_refusal(e: &Error, sql: &str) -> bool {
    let Some(db) = e.as_db_error() else { return false };
    let by_us = match db.routine() {
        Some("FetchPreparedStatement") => *db.code() == SqlState::INVALID_SQL_STATEMENT_NAME,
        Some("RevalidateCachedQuery") => *db.code() == SqlState::FEATURE_NOT_SUPPORTED,
        _ => false,
    };
    by_us && db.where_().is_none() && !sql.to_ascii_uppercase().contains("EXECUTE")
}

/// What the shortcuts do, with a statement or in one message.
trait Operation {
    type Output;

    fn run<C: GenericClient, S: ?Sized + ToStatement>(
        client: &mut C,
        statement: &S,
        params: Params<'_>,
    ) -> Result<Self::Output, Error>;

    fn run_typed<C: GenericClient>(
        client: &mut C,
        sql: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Self::Output, Error>;
}

macro_rules! operation {
    ($name:ident, $output:ty, $run:ident, $run_typed:ident) => {
        struct $name;

        impl Operation for $name {
            type Output = $output;

            fn run<C: GenericClient, S: ?Sized + ToStatement>(
                client: &mut C,
                statement: &S,
                params: Params<'_>,
            ) -> Result<$output, Error> {
                client.$run(statement, params)
            }

            fn run_typed<C: GenericClient>(
                client: &mut C,
                sql: &str,
                params: &[(&(dyn ToSql + Sync), Type)],
            ) -> Result<$output, Error> {
                client.$run_typed(sql, params)
            }
        }
    };
}

operation!(Query, Vec<Row>, query, query_typed);
operation!(QueryOne, Row, query_one, query_typed_one);
operation!(QueryOpt, Option<Row>, query_opt, query_typed_opt);
operation!(Execute, u64, execute, execute_typed);

/// Prepared statements, remembered. See [the module](super#statements).
impl Connection {
    /// [`Client::prepare`], unless this connection has prepared the same SQL before: then nothing is sent.
    ///
    /// The shortcuts, such as [`query_cached`](Connection::query_cached), do this by themselves, and renew a statement that
    /// has gone stale, which nobody can do for one that you hold. A stale one fails with SQLSTATE 0A000 or 26000, and is
    /// forgotten if the connection is [observed](Connection::is_observed); if not, call
    /// [`clear_statement_cache`](Connection::clear_statement_cache). With the cache off every call prepares.
    ///
    /// # Errors
    ///
    /// As [`Client::prepare`].
    pub fn prepare_cached(&mut self, sql: &str) -> Result<Statement, Error> {
        self.prepare_typed_cached(sql, &[])
    }

    /// [`Client::prepare_typed`], as [`prepare_cached`](Connection::prepare_cached) does it. The same SQL with other types is
    /// another statement.
    ///
    /// # Errors
    ///
    /// As [`Client::prepare_typed`].
    pub fn prepare_typed_cached(&mut self, sql: &str, types: &[Type]) -> Result<Statement, Error> {
        let statements = &mut self.statements;
        self.client.whole(|client| statements.prepare(client, sql, types))
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
    /// As [`Client::query`], except that a statement that the server has lost, or whose result has changed, is prepared
    /// again and run once more if it is certain that nothing of it ran, and outside a transaction.
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

    /// [`Client::execute`], as [`query_cached`](Connection::query_cached) does it. Returns the number of rows it changed.
    ///
    /// # Errors
    ///
    /// As [`query_cached`](Connection::query_cached).
    pub fn execute_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        self.run_cached::<Execute>(sql, params)
    }

    /// [`Client::transaction`], with the statement cache at hand, and with a [`commit`](Transaction::commit) that fails if
    /// nothing is kept.
    ///
    /// ```no_run
    /// # fn f(mut client: millpond::postgres::PooledConnection) -> Result<(), postgres::Error> {
    /// let mut tx = client.begin()?;
    /// tx.execute_cached("UPDATE accounts SET balance = balance - $1 WHERE id = $2", &[&100_i64, &1_i64])?;
    /// tx.execute_cached("UPDATE accounts SET balance = balance + $1 WHERE id = $2", &[&100_i64, &2_i64])?;
    /// tx.commit()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Client::transaction`].
    pub fn begin(&mut self) -> Result<Transaction<'_>, Error> {
        self.begin_with(Client::transaction)
    }

    /// [`begin`](Connection::begin), with what a transaction builder can say.
    ///
    /// ```no_run
    /// # fn f(mut client: millpond::postgres::PooledConnection) -> Result<(), postgres::Error> {
    /// use postgres::IsolationLevel;
    ///
    /// let mut tx = client.begin_with(|c| c.build_transaction().isolation_level(IsolationLevel::Serializable).start())?;
    /// let row = tx.query_one_cached("SELECT sum(total)::bigint FROM orders", &[])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of `start`.
    pub fn begin_with<'a>(
        &'a mut self,
        start: impl FnOnce(&'a mut Client) -> Result<::postgres::Transaction<'a>, Error>,
    ) -> Result<Transaction<'a>, Error> {
        Ok(Transaction { transaction: start(self.client.reach())?, statements: &mut self.statements, nested: false })
    }

    /// How well the cache does, since the connection was opened.
    pub fn statement_cache_stats(&self) -> StatementCacheStats {
        self.statements.stats()
    }

    /// Forgets all statements; the server is told with the next request. Where types were dropped and made again, call
    /// [`Client::clear_type_cache`] first.
    pub fn clear_statement_cache(&mut self) {
        self.client.reach();
        self.statements.clear();
        self.statements.types.clear();
    }

    fn run_cached<O: Operation>(&mut self, sql: &str, params: Params<'_>) -> Result<O::Output, Error> {
        let statements = &mut self.statements;
        self.client.whole(|client| statements.run_outside::<O>(client, sql, params))
    }
}

/// Whether a transaction is open or has failed; "yes" if it is not known.
fn in_transaction(client: &mut Client, watch: Option<&Watch>) -> Result<bool, Error> {
    let Some(watch) = watch else { return ask_for_transaction(client) };
    if watch.is_busy() {
        // The server's last word is still under way.
        client.check_connection()?;
    }
    Ok(watch.status() != Status::Idle)
}

/// A transaction with the connection's statement cache at hand, begun by [`Connection::begin`]. It derefs to
/// [`postgres::Transaction`](::postgres::Transaction), and like that rolls back when dropped.
///
/// A statement that has gone stale (see [the module](super#statements)) fails and is forgotten, but not tried again: its
/// failure has ended the transaction. Roll back, or back to a savepoint, and the next try works.
pub struct Transaction<'a> {
    transaction: ::postgres::Transaction<'a>,
    statements: &'a mut Statements,
    /// It is a savepoint.
    nested: bool,
}

impl Transaction<'_> {
    /// Ends it, and keeps what it did. One round trip.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::commit`](::postgres::Transaction::commit). Also if nothing is kept because a statement of
    /// it has failed, even if that was overlooked: with SQLSTATE 25P02. (`postgres` itself says `Ok` then, since to PostgreSQL
    /// the `COMMIT` of a failed transaction is a successful `ROLLBACK`.) It has ended in any case.
    pub fn commit(self) -> Result<(), Error> {
        match &self.statements.watch {
            // The release of a savepoint fails by itself, and what became of it shows when the transaction is committed.
            _ if self.nested => self.transaction.commit(),
            Some(watch) if watch.has_erred() => ask_and_commit(self.transaction),
            // It is known not to have failed.
            Some(watch) if !watch.is_busy() => self.transaction.commit(),
            _ => commit_and_see(self.transaction),
        }
    }

    /// Ends it, as if it had not been.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::rollback`](::postgres::Transaction::rollback).
    pub fn rollback(self) -> Result<(), Error> {
        self.transaction.rollback()
    }

    /// As [`Connection::prepare_cached`].
    ///
    /// # Errors
    ///
    /// As [`Client::prepare`].
    pub fn prepare_cached(&mut self, sql: &str) -> Result<Statement, Error> {
        self.prepare_typed_cached(sql, &[])
    }

    /// As [`Connection::prepare_typed_cached`].
    ///
    /// # Errors
    ///
    /// As [`Client::prepare_typed`].
    pub fn prepare_typed_cached(&mut self, sql: &str, types: &[Type]) -> Result<Statement, Error> {
        self.statements.prepare(&mut self.transaction, sql, types)
    }

    /// [`Client::query`] with a statement from the cache.
    ///
    /// # Errors
    ///
    /// As [`Client::query`].
    pub fn query_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.run_cached::<Query>(sql, params)
    }

    /// [`Client::query_one`] with a statement from the cache.
    ///
    /// # Errors
    ///
    /// As [`Client::query_one`].
    pub fn query_one_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
        self.run_cached::<QueryOne>(sql, params)
    }

    /// [`Client::query_opt`] with a statement from the cache.
    ///
    /// # Errors
    ///
    /// As [`Client::query_opt`].
    pub fn query_opt_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, Error> {
        self.run_cached::<QueryOpt>(sql, params)
    }

    /// [`Client::execute`] with a statement from the cache. Returns the number of rows it changed.
    ///
    /// # Errors
    ///
    /// As [`Client::execute`].
    pub fn execute_cached(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        self.run_cached::<Execute>(sql, params)
    }

    /// Begins a transaction within this one: a savepoint.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::transaction`](::postgres::Transaction::transaction).
    pub fn begin(&mut self) -> Result<Transaction<'_>, Error> {
        Ok(Transaction { transaction: self.transaction.transaction()?, statements: self.statements, nested: true })
    }

    /// [`begin`](Transaction::begin), under the name it has in the `postgres` crate.
    ///
    /// # Errors
    ///
    /// As [`begin`](Transaction::begin).
    pub fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        self.begin()
    }

    /// [`begin`](Transaction::begin), with a name for the savepoint. It goes into the SQL as it is.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::savepoint`](::postgres::Transaction::savepoint).
    pub fn savepoint(&mut self, name: impl Into<String>) -> Result<Transaction<'_>, Error> {
        Ok(Transaction { transaction: self.transaction.savepoint(name)?, statements: self.statements, nested: true })
    }

    fn run_cached<O: Operation>(&mut self, sql: &str, params: Params<'_>) -> Result<O::Output, Error> {
        self.statements.run_inside::<O, _>(&mut self.transaction, sql, params)
    }
}

impl<'a> Deref for Transaction<'a> {
    type Target = ::postgres::Transaction<'a>;

    fn deref(&self) -> &::postgres::Transaction<'a> {
        &self.transaction
    }
}

impl<'a> DerefMut for Transaction<'a> {
    fn deref_mut(&mut self) -> &mut ::postgres::Transaction<'a> {
        &mut self.transaction
    }
}

/// A `COMMIT` where something has failed before, after which an answer may come that nobody waits for: of a COPY that the
/// server refused `postgres` returns to each call its predecessor's, or it ends the connection (rust-postgres #789). What
/// became of a commit would not be known then. So it is sent only when it is certain that its answer will be its own.
fn ask_and_commit(mut transaction: ::postgres::Transaction<'_>) -> Result<(), Error> {
    let nonce = nonce();
    let answer = transaction.simple_query(&format!("SELECT '{nonce}'"))?;
    if answer_to(&answer, &nonce).is_some() {
        return transaction.commit();
    }
    Err(local_error(&mut transaction, "nothing is committed: its answers no longer match its questions"))
}

const UNKNOWN: &str = "it is not known whether it was committed: its answers no longer match its questions";

/// How many answers to other questions may come before the one that is waited for: one for each COPY that was refused.
const BEHIND: usize = 1000;

/// A `COMMIT`, behind something that fails in a transaction that has failed, and that shows whose answer comes. Whatever else
/// comes is followed by questions, until it is certain what became of it. (Unless `postgres` ends the connection over it.)
/// One round trip, where nobody knows whether something has failed before.
fn commit_and_see(mut transaction: ::postgres::Transaction<'_>) -> Result<(), Error> {
    let (nonce, end) = (nonce(), nonce());
    let mut asked = format!("SELECT '{nonce}'; COMMIT");
    let (mut failure, mut rolled_back) = (None, false);
    for _ in 0..BEHIND {
        let answer = transaction.simple_query(&asked);
        asked = format!("SELECT '{end}'");
        match answer {
            Ok(answer) if answer_to(&answer, &nonce).is_some() => {
                // It has been committed, so there is nothing left to be rolled back.
                std::mem::forget(transaction);
                return Ok(());
            }
            Ok(answer) if answer_to(&answer, &end).is_some() => {
                // The answer to the commit came before this one, and was an error. It has ended.
                let error = failure.unwrap_or_else(|| local_error(&mut transaction, UNKNOWN));
                std::mem::forget(transaction);
                return Err(error);
            }
            Ok(_) => {}
            Err(e) if e.is_closed() => return Err(failure.unwrap_or(e)),
            Err(e) => {
                if e.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) && !rolled_back {
                    rolled_back = true;
                    asked.insert_str(0, "ROLLBACK; ");
                }
                failure = failure.or(Some(e));
            }
        }
    }
    Err(failure.unwrap_or_else(|| local_error(&mut transaction, UNKNOWN)))
}

/// An error of `postgres`'s with this text, made by a parameter that cannot be sent.
fn local_error(transaction: &mut ::postgres::Transaction<'_>, text: &'static str) -> Error {
    #[derive(Debug)]
    struct Unsendable(&'static str);

    impl ToSql for Unsendable {
        fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
            Err(self.0.into())
        }
        fn accepts(_: &Type) -> bool {
            true
        }
        to_sql_checked!();
    }

    match transaction.execute_typed("", &[(&Unsendable(text), Type::TEXT)]) {
        Err(error) => error,
        Ok(_) => unreachable!("it cannot be sent"),
    }
}

impl fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transaction").finish_non_exhaustive()
    }
}

/// What [`Connection::statement_cache_stats`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StatementCacheStats {
    /// How often what was asked for was there. With the cache off: how often the types of the parameters were known.
    pub hits: u64,
    /// How often it was not, and had to be prepared.
    pub misses: u64,
    /// How many statements are remembered now.
    pub statements: usize,
    /// How many at most; 0: the cache is off.
    pub capacity: usize,
}

/// What was least recently used goes first.
struct Lru<V> {
    capacity: usize,
    map: HashMap<Key<'static>, Slot<V>>,
    /// The number of uses so far.
    uses: u64,
}

#[derive(PartialEq, Eq, Hash)]
struct Key<'a> {
    sql: Cow<'a, str>,
    types: Cow<'a, [Type]>,
}

struct Slot<V> {
    value: V,
    /// The number of its last use: no two are the same.
    used: Cell<u64>,
}

impl<V: Clone> Lru<V> {
    fn new(capacity: usize) -> Lru<V> {
        Lru { capacity, map: HashMap::new(), uses: 0 }
    }

    fn len(&self) -> usize {
        self.map.len()
    }

    fn slot<'a>(&'a self, sql: &'a str, types: &'a [Type]) -> Option<&'a Slot<V>> {
        // Keys that live shorter, to be compared with one that is not owned.
        let map: &HashMap<Key<'a>, Slot<V>> = &self.map;
        map.get(&Key { sql: sql.into(), types: types.into() })
    }

    fn get(&mut self, sql: &str, types: &[Type]) -> Option<V> {
        self.uses += 1;
        let slot = self.slot(sql, types)?;
        slot.used.set(self.uses);
        Some(slot.value.clone())
    }

    /// Drops one if all places are taken.
    fn make_room(&mut self) {
        if self.len() < self.capacity {
            return;
        }
        // A look at all of them is nothing beside the round trip that follows.
        if let Some(oldest) = self.map.values().map(|slot| slot.used.get()).min() {
            self.map.retain(|_, slot| slot.used.get() != oldest);
        }
    }

    /// There must be room for it.
    fn insert(&mut self, sql: &str, types: &[Type], value: V) {
        if self.capacity == 0 {
            return;
        }
        self.uses += 1;
        let key = Key { sql: sql.to_owned().into(), types: types.to_owned().into() };
        self.map.insert(key, Slot { value, used: self.uses.into() });
    }

    /// With whatever types.
    fn remove(&mut self, sql: &str) {
        self.map.retain(|key, _| key.sql != sql);
    }

    fn clear(&mut self) {
        self.map.clear();
    }
}
