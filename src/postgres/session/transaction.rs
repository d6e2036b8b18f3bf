//! [`Transaction`]: the statement cache within a transaction, and a commit that succeeds only if the server committed.

use super::connection::Connection;
use super::question::{answer_to, nonce};
use super::statements::{Execute, Operation, Params, Query, QueryOne, QueryOpt, Statements};
use ::postgres::error::SqlState;
use ::postgres::types::private::BytesMut;
use ::postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use ::postgres::{Client, Error, Row, Statement};
use std::error::Error as StdError;
use std::fmt;
use std::ops::{Deref, DerefMut};

/// Transactions with the statement cache at hand.
impl Connection {
    /// [`Client::transaction`], with the statement cache at hand, and with a [`commit`](Transaction::commit) that fails
    /// if nothing is kept.
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

    /// [`begin`](Connection::begin), with the options of a transaction builder.
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
}

/// A transaction with the connection's statement cache at hand, begun by [`Connection::begin`]. It derefs to
/// [`postgres::Transaction`], and like that it rolls back when it is dropped.
///
/// A statement that has gone stale (see [the module](crate::postgres#statements)) fails and is forgotten. It is not
/// tried again, since its failure has ended the transaction. Roll back, or back to a savepoint, and the next try works.
pub struct Transaction<'a> {
    transaction: ::postgres::Transaction<'a>,
    statements: &'a mut Statements,
    /// Whether it is a savepoint.
    nested: bool,
}

impl Transaction<'_> {
    /// Commits the transaction. One round trip.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::commit`](::postgres::Transaction::commit). It also fails, with SQLSTATE 25P02, if
    /// nothing is committed because a statement of the transaction has failed, even if the caller ignored that error.
    /// (`postgres` itself returns `Ok` then, since to PostgreSQL the `COMMIT` of a failed transaction is a successful
    /// `ROLLBACK`.) The transaction has ended in any case.
    pub fn commit(self) -> Result<(), Error> {
        match &self.statements.watch {
            // The release of a savepoint reports its own failure. Whether it is kept shows at the outermost commit.
            _ if self.nested => self.transaction.commit(),
            Some(watch) if watch.has_failed_request() => ask_and_commit(self.transaction),
            // The transaction is known not to have failed.
            Some(watch) if !watch.is_busy() => self.transaction.commit(),
            _ => commit_and_see(self.transaction),
        }
    }

    /// Rolls the transaction back.
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

/// A `COMMIT` where a request has failed before. After a COPY that the server refused, `postgres` returns to each call
/// the answer to the call before, or ends the connection (rust-postgres #789), and the outcome of a commit would not be
/// known. So the commit is sent only when it is certain that the next answer will be the commit's.
fn ask_and_commit(mut transaction: ::postgres::Transaction<'_>) -> Result<(), Error> {
    let nonce = nonce();
    let answer = transaction.simple_query(&format!("SELECT '{nonce}'"))?;
    if answer_to(&answer, &nonce).is_some() {
        return transaction.commit();
    }
    Err(local_error(&mut transaction, "nothing is committed: its answers no longer match its questions"))
}

const UNKNOWN: &str = "it is not known whether it was committed: its answers no longer match its questions";

/// How many answers to other questions may come before the expected one. There is one for each COPY that was refused,
/// which are a few as a rule: the number only gives the loop an end.
const MOST_STALE_ANSWERS: usize = 1000;

/// A `COMMIT` where it is not known whether a request has failed before. It is sent together with a question in front
/// of it, which fails if the transaction has failed, and whose answer shows which answer is the commit's. After any
/// other answer it asks again, until the outcome of the commit is certain, or `postgres` ends the connection. As a rule
/// this takes one round trip.
fn commit_and_see(mut transaction: ::postgres::Transaction<'_>) -> Result<(), Error> {
    let (nonce, end) = (nonce(), nonce());
    let mut asked = format!("SELECT '{nonce}'; COMMIT");
    let (mut failure, mut rolled_back) = (None, false);
    for _ in 0..MOST_STALE_ANSWERS {
        let answer = transaction.simple_query(&asked);
        asked = format!("SELECT '{end}'");
        match answer {
            Ok(answer) if answer_to(&answer, &nonce).is_some() => {
                // The transaction has been committed, so there is nothing left to be rolled back.
                std::mem::forget(transaction);
                return Ok(());
            }
            Ok(answer) if answer_to(&answer, &end).is_some() => {
                // The answer to the commit came before this answer, and was an error. The transaction has ended.
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

/// An error of the `postgres` crate with this text. It is made by a parameter that cannot be sent.
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
