//! [`Reset`]: how much of a session is undone between two callers.

/// What is done to a connection that is returned, before it is handed out again.
///
/// The next caller that gets the connection finds what is left of the session. Only [`DiscardAll`](Reset::DiscardAll)
/// leaves nothing:
///
/// | left by a caller | `Rollback` | `DiscardAll` | `None` |
/// |---|---|---|---|
/// | an open or failed transaction, with its `SET LOCAL` and cursors | rolled back | rolled back | stays |
/// | `SET ROLE`, `SET SESSION AUTHORIZATION` | **stays** | undone | stays |
/// | `SET`: `search_path`, `statement_timeout`, `client_encoding`, `default_transaction_read_only`, ... | **stays** | undone | stays |
/// | advisory locks of the session | **stay held** | released | stay held |
/// | cursors `WITH HOLD`, temporary tables, `LISTEN` | **stay** | gone | stay |
/// | statements made with SQL's `PREPARE` | **stay** | stay, see there | stay |
/// | notifications that were read | dropped | dropped | dropped |
/// | a long answer half read, a query that still runs | cancelled, closed | cancelled, closed | cancelled, closed |
///
/// A connection is closed and not handed out again, though it might be healthy, if
///
/// * a `COPY ... FROM STDIN` on it was refused, failed or was broken off, where it is
///   [observed](crate::postgres#the-observer). (Where not, a question to it finds out.)
/// * [`Canceller::cancel`](super::Canceller::cancel) was called for it: the request may arrive late.
/// * more was left of an answer than can be read within 50 ms (500 ms where it is not observed), or the time it took to
///   connect if that is longer. The query is cancelled, and the connection's slot is free when that is done.
/// * the server no longer had one of its prepared statements (SQLSTATE 26000), after a `DISCARD ALL` or `DEALLOCATE
///   ALL` of the caller's. Then the statements with which the `postgres` crate looks up types may be gone as well, and
///   it could never look one up again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reset {
    /// An open or failed transaction is rolled back. The default. A connection that is returned clean costs nothing, if
    /// it is [observed](crate::postgres#the-observer). If it is not, it is asked on a thread of the pool, in one round
    /// trip, or in two if more than the `_cached` functions was used; or not at all, if only such statements were run
    /// as cannot begin a transaction.
    ///
    /// Outside of a transaction nothing is undone. **The next caller finds** what this one has set: a role (`SET ROLE`, `SET
    /// SESSION AUTHORIZATION`), every `SET` (`search_path`, `statement_timeout`, `default_transaction_read_only`), advisory
    /// locks of the session, temporary tables, `LISTEN`s, cursors `WITH HOLD`, statements made with `PREPARE`
    /// (`tests/postgres/session.rs::what_a_session_has_set_stays_or_goes_as_documented`). A caller that sets what others must
    /// not inherit uses `SET LOCAL` in a transaction, or [`DiscardAll`](Reset::DiscardAll).
    #[default]
    Rollback,
    /// `ROLLBACK` where needed, and what `DISCARD ALL` does at every return: session settings, temporary tables,
    /// advisory locks, `LISTEN`s and cached statements do not survive. (Statements made with SQL's `PREPARE` do: the
    /// `postgres` crate breaks when its own are deallocated.) One more round trip each time, on a thread of the pool's.
    ///
    /// What a customizer's `on_acquire` has set does not survive it either, so `on_acquire` runs again after each
    /// reset, before the connection is handed out. If it fails, the connection is closed. The [server
    /// guards](crate::postgres::PostgresManager::server_guards) are set again as well.
    DiscardAll,
    /// Nothing is done, except that a query that still runs is cancelled where that can be seen. For applications that
    /// clean up themselves. Where connections are not [observed](crate::postgres#the-observer), the pool does not even
    /// ask whether answers match their questions.
    None,
}
