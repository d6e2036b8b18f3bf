//! Questions of the pool's own to a server. Their answers cannot be taken for the answers to other questions.
//!
//! After a COPY that the server refused, `postgres` may return to each call the answer to the call before
//! (rust-postgres #789). So where it matters a question has a word in it that no other question had, and its answer
//! repeats that word.

use crate::postgres::error::Error;
use ::postgres::error::SqlState;
use ::postgres::types::FromSql;
use ::postgres::{Client, Row, SimpleQueryMessage, SimpleQueryRow};
use std::sync::atomic::{AtomicU64, Ordering};

/// Where a connection stands, by its own answer.
pub(super) enum Standing {
    /// No transaction is open. `lookups`: the statement is there with which `postgres` looks up types, if that was
    /// asked.
    Idle { lookups: bool },
    /// A transaction is open.
    InTransaction,
    /// A transaction has failed. The answer is the error that every question gets there. So it may be the answer to
    /// another question.
    Failed,
    /// The answer was to another question.
    Desynchronised,
}

/// Asks a connection where it stands, in one round trip, and without an error in the server's log. (Within a
/// transaction `now()` stands still.) With `lookup` it also asks for the statement with which `postgres` looks up
/// types.
pub(super) fn ask_standing(client: &mut Client, lookup: bool) -> Result<Standing, ::postgres::Error> {
    let nonce = nonce();
    let lookups = match lookup {
        true => {
            "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements \
             WHERE statement OPERATOR(pg_catalog.~~) 'SELECT t.typname, t.typtype, t.typelem%')"
        }
        false => "NULL",
    };
    // All names are qualified, since a caller's `search_path` may lead to other functions of the same names.
    let still = "pg_catalog.now() OPERATOR(pg_catalog.=) pg_catalog.statement_timestamp()";
    let question = format!("SELECT '{nonce}', {still}, {lookups}");
    let answer = match client.simple_query(&question) {
        Ok(answer) => answer,
        Err(e) if e.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => return Ok(Standing::Failed),
        Err(e) => return Err(e),
    };
    let row = answer_to(&answer, &nonce);
    let is = |column| row.and_then(|row| row.try_get(column).ok().flatten()) == Some("t");
    Ok(match row {
        None => Standing::Desynchronised,
        Some(_) if is(1) => Standing::Idle { lookups: is(2) },
        Some(_) => Standing::InTransaction,
    })
}

/// Whether a transaction is open or has failed; `true` as well if it is not known.
pub(super) fn ask_for_transaction(client: &mut Client) -> Result<bool, ::postgres::Error> {
    Ok(!matches!(ask_standing(client, false)?, Standing::Idle { .. }))
}

pub(super) fn ask_for_pid(client: &mut Client) -> Result<Option<i32>, ::postgres::Error> {
    let answer = client.simple_query("SELECT pg_catalog.pg_backend_pid()")?;
    Ok(answer.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.try_get(0).ok()??.parse().ok(),
        _ => None,
    }))
}

/// A word that no question has had before.
pub(super) fn nonce() -> String {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    format!("millpond {}", ASKED.fetch_add(1, Ordering::Relaxed))
}

/// The row that begins with `nonce`, if it is there.
pub(super) fn answer_to<'a>(answer: &'a [SimpleQueryMessage], nonce: &str) -> Option<&'a SimpleQueryRow> {
    answer.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) if row.try_get(0).is_ok_and(|n| n == Some(nonce)) => Some(row),
        _ => None,
    })
}

/// A column of an answer, which may not be what was asked for: not every server that speaks like PostgreSQL is one.
pub(in crate::postgres) fn column<'a, T: FromSql<'a>>(row: &'a Row, i: usize) -> Result<T, Error> {
    row.try_get(i).map_err(|e| Error::doing("the server's answer is not what was asked for", e))
}
