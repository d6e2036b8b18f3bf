//! [`Transaction`]: the statement cache within a transaction, and a commit that succeeds only if the server committed.

use super::connection::Connection;
use super::question::{answer_to, nonce};
use super::statements::{Execute, Operation, Params, Query, QueryOne, QueryOpt, Statements};
use super::test_transaction::{RELEASE, SAVEPOINT, TestTransaction, UNDO};
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
    /// In a [test transaction](crate::postgres::PostgresManager::test_transaction) it is a savepoint.
    ///
    /// # Errors
    ///
    /// As [`Client::transaction`].
    pub fn begin(&mut self) -> Result<Transaction<'_>, Error> {
        self.begin_with(Client::transaction)
    }

    /// [`begin`](Connection::begin), under the name it has in the `postgres` crate. (That crate's own function is
    /// `(**client).transaction()`.)
    ///
    /// # Errors
    ///
    /// As [`begin`](Connection::begin).
    pub fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        self.begin()
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
    /// Those of `start`. In a [test transaction](crate::postgres::PostgresManager::test_transaction) another isolation
    /// level than the session's fails (SQLSTATE 25001), and ends the test transaction.
    pub fn begin_with<'a>(
        &'a mut self,
        start: impl FnOnce(&'a mut Client) -> Result<::postgres::Transaction<'a>, Error>,
    ) -> Result<Transaction<'a>, Error> {
        let client = self.client.reach();
        let scope = match &mut self.test {
            Some(test) => {
                client.batch_execute(SAVEPOINT)?;
                test.open += 1;
                Scope::Test(test)
            }
            None => Scope::Outermost,
        };
        Ok(Transaction { transaction: Some(start(client)?), statements: &mut self.statements, scope })
    }
}

/// A transaction with the connection's statement cache at hand, begun by [`Connection::begin`]. It derefs to
/// [`postgres::Transaction`], and like that it rolls back when it is dropped.
///
/// A statement that has gone stale (see [the module](crate::postgres#statements)) fails and is forgotten. It is not
/// tried again, since its failure has ended the transaction. Roll back, or back to a savepoint, and the next try works.
pub struct Transaction<'a> {
    /// `None` when it has ended.
    transaction: Option<::postgres::Transaction<'a>>,
    statements: &'a mut Statements,
    scope: Scope<'a>,
}

/// What ends together with a [`Transaction`].
enum Scope<'a> {
    /// The server's transaction.
    Outermost,
    /// A savepoint of the `postgres` crate's.
    Savepoint,
    /// A savepoint of the pool's, in the place of the server's transaction, which is a test's and goes on. To the
    /// `postgres` crate it is the outermost one. (Its `BEGIN` makes the server warn that there is one already.)
    Test(&'a mut TestTransaction),
}

impl<'a> Transaction<'a> {
    /// Commits the transaction. One round trip.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::commit`](::postgres::Transaction::commit). It also fails, with SQLSTATE 25P02, if
    /// nothing is committed because a statement of the transaction has failed, even if the caller ignored that error.
    /// (`postgres` itself returns `Ok` then, since to PostgreSQL the `COMMIT` of a failed transaction is a successful
    /// `ROLLBACK`.) The transaction has ended in any case.
    pub fn commit(mut self) -> Result<(), Error> {
        let Some(mut transaction) = self.transaction.take() else { return Ok(()) };
        match (&mut self.scope, &self.statements.watch) {
            // The release of a savepoint reports its own failure. Whether it is kept shows at the outermost commit.
            (Scope::Savepoint, _) => transaction.commit(),
            (Scope::Test(test), _) => {
                let released = release(&mut transaction);
                if released.is_err() {
                    undo(transaction, test)?;
                } else {
                    test.open -= 1;
                    std::mem::forget(transaction);
                }
                released
            }
            (_, Some(watch)) if watch.has_failed_request() => ask_and_commit(transaction),
            // The transaction is known not to have failed.
            (_, Some(watch)) if !watch.is_busy() => transaction.commit(),
            _ => commit_and_see(transaction),
        }
    }

    /// Rolls the transaction back.
    ///
    /// # Errors
    ///
    /// As [`postgres::Transaction::rollback`](::postgres::Transaction::rollback).
    pub fn rollback(mut self) -> Result<(), Error> {
        match (self.transaction.take(), &mut self.scope) {
            (Some(transaction), Scope::Test(test)) => undo(transaction, test),
            (Some(transaction), _) => transaction.rollback(),
            (None, _) => Ok(()),
        }
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
        let (transaction, statements) = self.parts();
        statements.prepare(transaction, sql, types)
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
        let (transaction, statements) = self.parts();
        Ok(Transaction { transaction: Some(transaction.transaction()?), statements, scope: Scope::Savepoint })
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
        let (transaction, statements) = self.parts();
        Ok(Transaction { transaction: Some(transaction.savepoint(name)?), statements, scope: Scope::Savepoint })
    }

    fn run_cached<O: Operation>(&mut self, sql: &str, params: Params<'_>) -> Result<O::Output, Error> {
        let (transaction, statements) = self.parts();
        statements.run_inside::<O, _>(transaction, sql, params)
    }

    fn parts(&mut self) -> (&mut ::postgres::Transaction<'a>, &mut Statements) {
        (self.transaction.as_mut().expect(IS_OPEN), self.statements)
    }
}

/// Only what takes the whole [`Transaction`] ends it.
const IS_OPEN: &str = "the transaction is open";

/// In a test transaction `postgres` must not roll back by itself, which would be all of it.
impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if let (Some(transaction), Scope::Test(test)) = (self.transaction.take(), &mut self.scope) {
            // The pool finds out when the connection is returned.
            let _ = undo(transaction, test);
        }
    }
}

impl<'a> Deref for Transaction<'a> {
    type Target = ::postgres::Transaction<'a>;

    fn deref(&self) -> &::postgres::Transaction<'a> {
        self.transaction.as_ref().expect(IS_OPEN)
    }
}

impl<'a> DerefMut for Transaction<'a> {
    fn deref_mut(&mut self) -> &mut ::postgres::Transaction<'a> {
        self.transaction.as_mut().expect(IS_OPEN)
    }
}

/// What takes the place of a `COMMIT` in a test transaction.
fn release(transaction: &mut ::postgres::Transaction<'_>) -> Result<(), Error> {
    let nonce = nonce();
    let answer = transaction.simple_query(&format!("{RELEASE}; SELECT '{nonce}'"))?;
    match answer_to(&answer, &nonce) {
        Some(_) => Ok(()),
        None => Err(local_error(transaction, UNKNOWN)),
    }
}

/// What takes the place of a `ROLLBACK` in a test transaction.
fn undo(mut transaction: ::postgres::Transaction<'_>, test: &mut TestTransaction) -> Result<(), Error> {
    let result = transaction.batch_execute(UNDO);
    if result.is_ok() {
        test.open -= 1;
    }
    // The drop would end the test transaction.
    std::mem::forget(transaction);
    result
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
