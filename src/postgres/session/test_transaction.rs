//! The transaction of a connection that commits nothing: how it begins, how it guards itself, and what is done to it
//! between two checkouts. See [`test_transaction`](crate::postgres::PostgresManager::test_transaction).
//!
//! Everything on such a connection happens inside one transaction, that of [`BEGIN`]. What must always hold:
//!
//! * A `COMMIT` fails. A deferred trigger raises at the end of the transaction, and the server rolls it back.
//! * What follows the end of the transaction, whoever has ended it, finds a session that is read-only by default.
//! * Each checkout begins with the savepoint [`CHECKOUT`]. It exists in this transaction alone, so a connection that has
//!   another one, or none, is found out when it is returned, and closed.

use super::connection::Connection;
use super::question::{answer_to, nonce};
use super::verdict::{AtRest, Facts};
use crate::Returned;
use crate::postgres::error::Error;
use crate::postgres::wire::{self, Status};
use ::postgres::SimpleQueryMessage;
use ::postgres::error::SqlState;
use std::time::Duration;

/// The transaction, its guard, and the savepoint of the first checkout. Before it the session is set to read only, in a
/// transaction of its own, so that the end of the test transaction does not undo that. All of it is one message, so that
/// a pooler has no occasion to send its parts to several servers.
///
/// The trigger must raise at a commit and at no other time. A `SET CONSTRAINTS ALL IMMEDIATE` of the user's runs it as
/// well, and then it only makes the next row, whose turn comes later. At a commit that turn comes within the same
/// message to the server, and this is how the trigger tells them apart. It runs with `session_replication_role =
/// replica` too (`ENABLE ALWAYS`), and for a user that another one has become by `SET ROLE` (`SECURITY DEFINER`).
///
/// The table also keeps the server from preparing the transaction (`PREPARE TRANSACTION`). The row that awaits its
/// trigger keeps the table from being dropped, but neither the trigger nor the function: who drops these can commit.
const BEGIN: &str = "BEGIN; SET default_transaction_read_only = on; COMMIT; \
    BEGIN READ WRITE; \
    CREATE TEMP TABLE millpond_test_transaction (at pg_catalog.timestamptz); \
    CREATE FUNCTION pg_temp.millpond_test_transaction() RETURNS pg_catalog.trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ \
    BEGIN \
        IF NEW.at OPERATOR(pg_catalog.=) pg_catalog.statement_timestamp() THEN \
            RAISE EXCEPTION USING ERRCODE = '2D000', MESSAGE = 'test_transaction: nothing is committed', \
            HINT = 'In a test transaction use transaction() or begin() of the pooled connection, which make a savepoint.'; \
        END IF; \
        SET CONSTRAINTS pg_temp.millpond_test_transaction DEFERRED; \
        INSERT INTO pg_temp.millpond_test_transaction VALUES (pg_catalog.statement_timestamp()); \
        RETURN NULL; \
    END $$; \
    CREATE CONSTRAINT TRIGGER millpond_test_transaction AFTER INSERT ON pg_temp.millpond_test_transaction \
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION pg_temp.millpond_test_transaction(); \
    ALTER TABLE pg_temp.millpond_test_transaction ENABLE ALWAYS TRIGGER millpond_test_transaction; \
    INSERT INTO pg_temp.millpond_test_transaction VALUES (NULL); \
    SAVEPOINT millpond_checkout; \
    SELECT pg_catalog.current_setting('default_transaction_read_only')";

/// From the savepoint of the last checkout to that of the next.
const CHECKOUT: &str = "RELEASE SAVEPOINT millpond_checkout; SAVEPOINT millpond_checkout";
/// Undoes a checkout.
const UNDO_CHECKOUT: &str = "ROLLBACK TO SAVEPOINT millpond_checkout";

/// In the place of the `BEGIN` of a caller's transaction.
pub(super) const SAVEPOINT: &str = "SAVEPOINT millpond_transaction";
/// In the place of its `COMMIT`.
pub(super) const RELEASE: &str = "RELEASE SAVEPOINT millpond_transaction";
/// In the place of its `ROLLBACK`.
pub(super) const UNDO: &str = "ROLLBACK TO SAVEPOINT millpond_transaction; RELEASE SAVEPOINT millpond_transaction";

/// What is known of the test transaction of a connection.
#[derive(Debug)]
pub(super) struct TestTransaction {
    /// How many of the callers' transactions have begun and not ended: 1 at most, unless some are forgotten.
    pub(super) open: u32,
    /// No caller has used it yet. What `on_acquire` did stands behind the savepoint of the first checkout, so this
    /// cannot be undone without that.
    is_new: bool,
    /// Why the connection cannot be used again, as found when it was returned.
    lost: Option<&'static str>,
}

impl Connection {
    /// Begins the test transaction, once, when the connection is opened.
    pub(in crate::postgres) fn begin_test_transaction(&mut self) -> Result<(), Error> {
        self.expecting_little();
        let answer = self.client.completed(|client| client.simple_query(BEGIN));
        let answer = answer.map_err(|e| Error::doing("cannot begin the test transaction", e))?;
        let reads_only = answer.iter().any(|m| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("on")));
        if !reads_only {
            let text = "cannot begin the test transaction: the session does not become read-only outside of it";
            return Err(Error::own(text, true));
        }
        // A server that takes its time costs no rows: the rest of an answer is waited for as long as a reset allows.
        self.drain = Duration::MAX;
        self.test = Some(TestTransaction { open: 0, is_new: true, lost: None });
        Ok(())
    }

    /// What is to be done with a connection in a test transaction that is returned: it needs a new savepoint, or it is
    /// closed. That is done by [`renew`](Connection::renew), since only a reset can say why in the log.
    pub(super) fn test_state(&mut self, facts: Facts) -> Returned {
        let lost = match facts {
            Facts::Dead | Facts::AtRest(AtRest { ended: true, .. }) => return Returned::Broken,
            Facts::Unwound => Some("came back from a call that had panicked"),
            Facts::CancelSent => Some("came back with a request to cancel on its way"),
            Facts::LookupsLost => Some("came back without its prepared statements"),
            Facts::Answering { in_copy: true } => Some("came back in the middle of a COPY"),
            Facts::AtRest(AtRest { unusable: true, .. }) => {
                Some("came back from a COPY that had failed, or without its prepared statements")
            }
            Facts::Answering { in_copy: false } | Facts::Unobserved | Facts::Clean | Facts::AtRest(_) => None,
        };
        if let Some(test) = &mut self.test {
            test.lost = lost;
        }
        Returned::Reset
    }

    /// Makes a connection in a test transaction fit for the next caller. What this caller has done stays, unless a
    /// statement has failed.
    pub(in crate::postgres) fn renew(&mut self, limit: Duration) -> Result<(), Error> {
        self.remark = None;
        let Some(test) = &mut self.test else { return Ok(()) };
        let (is_new, open, lost) = (test.is_new, std::mem::take(&mut test.open), test.lost.take());
        if lost.is_some() {
            return self.end_test_transaction(lost);
        }
        if self.may_be_at_work() && !self.stop(limit) {
            return self.end_test_transaction(Some("came back in the middle of an answer, which was cancelled"));
        }
        let mut has_failed = false;
        if let Some(watch) = self.watch.clone() {
            wire::flush(self.client.reach())?;
            if watch.is_busy() || watch.is_lost() {
                self.ping(limit)?;
            }
            self.client.unmark();
            has_failed = watch.status() == Status::Failed;
        }
        if !has_failed {
            let forgotten = format!("{UNDO}; ").repeat(open as usize);
            has_failed = match self.tell(&format!("{forgotten}{CHECKOUT}")) {
                Ok(()) => false,
                Err(e) if e.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => true,
                // There is no transaction, or it is another one.
                Err(e) if is_elsewhere(&e) => {
                    return self
                        .end_test_transaction(Some("had ended its test transaction (by a COMMIT or ROLLBACK?)"));
                }
                Err(e) => return Err(e),
            };
            if !has_failed && open > 0 {
                self.remark = Some("came back inside a transaction, which was rolled back".into());
            }
        }
        if has_failed {
            if is_new {
                return self.end_test_transaction(Some("came back with a failed test transaction"));
            }
            self.tell(UNDO_CHECKOUT)?;
            self.remark = Some(
                "came back with a failed test transaction, which was rolled back to where this checkout began".into(),
            );
        }
        if let Some(test) = &mut self.test {
            test.is_new = false;
        }
        self.client.settle();
        self.client.drop_notifications();
        match &self.watch {
            Some(watch) if watch.is_busy() || watch.is_lost() || watch.status() != Status::InTransaction => {
                Err(Error::own("its test transaction could not be brought to rest", false))
            }
            Some(watch) => {
                watch.forget_failures();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Runs this, and makes sure that the answer is the one to this.
    fn tell(&mut self, sql: &str) -> Result<(), Error> {
        let nonce = nonce();
        self.expecting_little();
        let answer = self.client.completed(|client| client.simple_query(&format!("{sql}; SELECT '{nonce}'")))?;
        match answer_to(&answer, &nonce) {
            Some(_) => {
                self.client.unmark();
                Ok(())
            }
            None => Err(Error::own("its answers no longer match its questions", false)),
        }
    }

    /// The connection is closed, and with it goes what was written on it.
    fn end_test_transaction(&mut self, why: Option<&str>) -> Result<(), Error> {
        self.remark = why.map(|why| format!("{why}. The rows of its test transaction are gone"));
        if self.watch.as_ref().is_some_and(|watch| watch.is_idle()) {
            // A pooler in transaction mode may give its server to others.
            let _ = self.client.completed(|client| client.batch_execute("RESET default_transaction_read_only"));
        }
        Err(Error::own("its test transaction is over", false))
    }
}

/// Whether the savepoint of the checkout does not exist.
fn is_elsewhere(e: &Error) -> bool {
    e.code().is_some_and(|code| {
        *code == SqlState::NO_ACTIVE_SQL_TRANSACTION || *code == SqlState::S_E_INVALID_SPECIFICATION
    })
}
