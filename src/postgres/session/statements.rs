//! The statement cache: a connection remembers the statements it has prepared, so that the same SQL takes one round
//! trip the next time.
//!
//! A prepared statement may end without notice: by DDL, by `DISCARD ALL`, by a pooler that changes the server. Its next
//! use then fails, and two questions decide what is done about that. *Had it begun to run?* Only a statement that was
//! refused before it ran may be tried again ([`Statements::take_refusal`]). *Was it in a transaction?* Then the
//! transaction has failed, and no part of it may be repeated. In every case the statement is forgotten, so that the
//! next call prepares it again.
//!
//! A dropped [`Statement`] sends a `Close` with the next request. So room is made before a statement is prepared, not
//! after. Then no `Close` is left queued when the call returns, for which the drop of the connection would have to
//! wait.

use super::lru::Lru;
use super::question::ask_for_transaction;
use crate::postgres::wire::{Status, Watch};
use ::postgres::error::SqlState;
use ::postgres::types::{ToSql, Type, WrongType};
use ::postgres::{Client, Error, GenericClient, Row, Statement, ToStatement};
use std::error::Error as StdError;
use std::sync::Arc;

/// How many statements a connection remembers by default: psycopg keeps 100, JDBC 256.
pub(in crate::postgres) const DEFAULT_CAPACITY: usize = 256;

pub(super) type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// What one connection has prepared.
pub(super) struct Statements {
    /// The capacity that was asked for.
    capacity: usize,
    prepared: Lru<Statement>,
    /// With the cache off, only the types of a statement's parameters are remembered. They are all that is needed to
    /// run it in one message, and they are the same on every server behind a pooler.
    types: Lru<Arc<[Type]>>,
    pub(super) watch: Option<Arc<Watch>>,
    hits: u64,
    misses: u64,
    /// The server no longer has the statements with which `postgres` looks up types, and `postgres` will not prepare
    /// them again.
    lookups_lost: bool,
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
            lookups_lost: false,
        }
    }

    /// Forgets all statements.
    pub(super) fn clear(&mut self) {
        self.prepared.clear();
    }

    /// Forgets all statements, and the types of parameters.
    pub(super) fn clear_all(&mut self) {
        self.clear();
        self.types.clear();
    }

    pub(super) fn has_lost_lookups(&self) -> bool {
        self.lookups_lost
    }

    pub(super) fn is_off(&self) -> bool {
        self.capacity == 0
    }

    pub(super) fn stats(&self) -> StatementCacheStats {
        StatementCacheStats {
            hits: self.hits,
            misses: self.misses,
            statements: self.prepared.len(),
            capacity: self.capacity,
        }
    }

    pub(super) fn prepare<C: GenericClient>(
        &mut self,
        client: &mut C,
        sql: &str,
        types: &[Type],
    ) -> Result<Statement, Error> {
        // The caller ran a statement of the cache without the cache, and it was refused. It is not known here which
        // one.
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
            // The missing statement is not of this cache: it is one of the `postgres` crate's own.
            self.lookups_lost |= e.code() == Some(&SqlState::INVALID_SQL_STATEMENT_NAME);
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
    /// between transactions, this must be called inside a transaction.
    fn learn<C: GenericClient>(&mut self, client: &mut C, sql: &str) -> Result<Arc<[Type]>, Error> {
        self.misses += 1;
        let types: Arc<[Type]> = self.ask(client, sql, &[])?.params().into();
        self.types.make_room();
        self.types.insert(sql, &[], Arc::clone(&types));
        Ok(types)
    }

    /// Runs an operation. It is not known whether a transaction is open. Runs it again if it was refused for its
    /// statement alone, and no transaction is open.
    pub(super) fn run_outside<O: Operation>(
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
                // The transaction keeps the server until the statement is closed.
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
        // If a transaction was open it has failed by now. The status says whether one was, since all requests before
        // the refusal are answered.
        let in_transaction = match &self.watch {
            Some(watch) => watch.status() != Status::Idle,
            None => ask_for_transaction(client).unwrap_or(true),
        };
        if in_transaction {
            return Err(error);
        }
        self.run::<O, _>(client, sql, params)
    }

    /// Runs an operation in a transaction, in which a refusal is final.
    pub(super) fn run_inside<O: Operation, C: GenericClient>(
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

    /// Runs an operation once, with a prepared statement.
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

    /// Runs an operation once, in one message, with types that are remembered or else learned.
    fn run_typed<O: Operation, C: GenericClient>(
        &mut self,
        client: &mut C,
        sql: &str,
        params: Params<'_>,
        learn: impl Fn(&mut Self, &mut C) -> Result<Arc<[Type]>, Error>,
    ) -> Result<O::Output, Error> {
        let run = |client: &mut C, types: &[Type]| {
            if types.len() != params.len() {
                // This can only fail, and `postgres` says why in its own words.
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

    /// Forgets the statements that may be the reason for this error. To forget one too many costs a round trip.
    fn forget_what(&mut self, e: &Error, sql: &str) {
        match e.code() {
            // The error does not name the statement, and as a rule all were removed together.
            Some(code) if *code == SqlState::INVALID_SQL_STATEMENT_NAME => self.clear(),
            Some(code) if is_about_statements(code) => self.forget(sql),
            _ => {}
        }
    }

    fn forget(&mut self, sql: &str) {
        self.prepared.remove(sql);
        self.types.remove(sql);
    }

    /// Whether the call that just failed failed because of its statement, before anything of it ran: the server had no
    /// such statement, or one whose result has changed.
    fn take_refusal(&self, e: &Error, sql: &str) -> bool {
        match &self.watch {
            // The order of the server's messages shows it.
            Some(watch) => watch.take_refused_statement(),
            None => is_refusal(e, sql),
        }
    }
}

/// Whether a parameter does not fit its type, in which case nothing was sent. The type may have changed since the
/// statement was prepared.
fn does_not_fit(e: &Error) -> bool {
    e.source().is_some_and(|source| source.is::<WrongType>())
}

/// 0A000 (a cached plan's result has changed, or something else), class 42 (no such table, column, function, type...)
/// and XX000 (a type that was dropped and made again).
fn is_about_statements(code: &SqlState) -> bool {
    *code == SqlState::FEATURE_NOT_SUPPORTED || *code == SqlState::INTERNAL_ERROR || code.code().starts_with("42")
}

/// Whether a statement was refused before it ran, as far as the error shows. The same two errors may come from within a
/// statement that already runs: from a function, which leaves its trace in the error's context, or from SQL's own
/// `EXECUTE`, which leaves no trace and has computed its arguments by then.
fn is_refusal(e: &Error, sql: &str) -> bool {
    let Some(db) = e.as_db_error() else { return false };
    let of_protocol = match db.routine() {
        Some("FetchPreparedStatement") => *db.code() == SqlState::INVALID_SQL_STATEMENT_NAME,
        Some("RevalidateCachedQuery") => *db.code() == SqlState::FEATURE_NOT_SUPPORTED,
        _ => false,
    };
    of_protocol && db.where_().is_none() && !sql.to_ascii_uppercase().contains("EXECUTE")
}

/// One of the shortcuts, such as `query_cached`: how it runs with a statement, and how in one message.
pub(super) trait Operation {
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
        pub(super) struct $name;

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

/// Whether a transaction is open or has failed; `true` as well if it is not known.
fn in_transaction(client: &mut Client, watch: Option<&Watch>) -> Result<bool, Error> {
    let Some(watch) = watch else { return ask_for_transaction(client) };
    if watch.is_busy() {
        // The server's `ReadyForQuery` is still on its way, and this reads it.
        client.check_connection()?;
    }
    Ok(watch.status() != Status::Idle)
}

/// How well a connection's statement cache does: see
/// [`Connection::statement_cache_stats`](super::Connection::statement_cache_stats).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StatementCacheStats {
    /// How often a statement was found. With the cache off: how often the types of the parameters were known.
    pub hits: u64,
    /// How often a statement was not found, and had to be prepared.
    pub misses: u64,
    /// How many statements are remembered now.
    pub statements: usize,
    /// How many statements are remembered at most; 0: the cache is off.
    pub capacity: usize,
}
