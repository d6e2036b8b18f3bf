//! The way of a `get`: an idle connection at once, or one that the caller validates itself, or a place in the queue.
//!
//! One absolute deadline covers all of it. The caller waits on the pool and on nothing else: it never connects, and
//! never drops a connection.

use crate::error::{Error, ErrorKind, TooManyWaiting};
use crate::event::{CheckoutEvent, TimeoutEvent};
use crate::leaf::clock::Moment;
use crate::leaf::shield::{Panic, catch, shielded};
use crate::leaf::{in_hand, threads};
use crate::ledger::{Caller, Join, Outcome, SlotJob, Take, Ticket, Token};
use crate::manage::Manage;
use crate::pool::Pool;
use crate::pool::connection::PooledConnection;
use crate::runtime::job::Job;
use crate::runtime::jobs::tell_check_failed;
use crate::runtime::permit::Permit;
use crate::runtime::shared::{PoolConn, PoolWaiter};
use crate::runtime::waiter::Signal;
use crate::stats::CloseReason;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

/// A timeout so short that on a busy machine a job may not even begin within it.
const BLINK: Duration = Duration::from_millis(10);

impl<M: Manage> Pool<M> {
    /// Checks out a connection, waiting for one for at most `connection_timeout`.
    ///
    /// The connection used last is taken first. If none is idle, the caller waits in order of arrival for one to be
    /// returned or opened, whichever comes first; so it does if the first waiter has waited for as long as
    /// [`fair_after`](crate::Builder::fair_after).
    ///
    /// # Errors
    ///
    /// * [`Timeout`](crate::ErrorKind::Timeout): no connection came in time. The error says which threads use the
    ///   connections, or why none could be opened.
    /// * [`Connect`](crate::ErrorKind::Connect): the server refuses for good, and no connection is alive. At once.
    /// * [`Closed`](crate::ErrorKind::Closed): the pool is closed. At once, to waiters as well.
    /// * [`TooManyWaiting`](crate::ErrorKind::TooManyWaiting): `max_waiting` others wait. At once.
    /// * [`Config`](crate::ErrorKind::Config): this process was forked from the one that built the pool.
    #[track_caller]
    #[inline]
    pub fn get(&self) -> Result<PooledConnection<M>, Error> {
        self.get_timeout(self.shared().settings.connection_timeout)
    }

    /// [`get`](Pool::get) with a deadline of its own: `timeout` covers everything, queueing, opening and validation.
    ///
    /// Zero: takes a connection that can be had at once, by the rules of [`try_get`](Pool::try_get), and fails
    /// otherwise. A short timeout does no harm to a connection that is being opened or validated: the next caller gets
    /// it.
    ///
    /// # Errors
    ///
    /// As [`get`](Pool::get).
    #[track_caller]
    #[inline]
    pub fn get_timeout(&self, timeout: Duration) -> Result<PooledConnection<M>, Error> {
        let shared = self.shared();
        let caller = Caller { at: Location::caller(), thread: threads::id() };
        let now = shared.time.now();
        if shared.time.seems_forked(now) {
            return Err(shared.forked_error());
        }
        let checks_here = shared.user.keeps_limits && shared.settings.validation_timeout <= timeout;
        let mut other = Take::Nothing;
        let ready = shared.with_at_home(|l| match l.take(now, caller, checks_here) {
            // One pointer leaves the lock. A larger answer is copied just before the lock is released, and the
            // processor would wait for what it has only just written.
            Take::Ready(token, conn) => Some(conn.checked_out(token)),
            what => {
                other = what;
                None
            }
        });
        match ready {
            Some(Some(conn)) => {
                // What is still `Nothing` is not dropped, for that is a call.
                debug_assert!(matches!(other, Take::Nothing));
                std::mem::forget(other);
                Ok(self.check_out(conn, now, false))
            }
            Some(None) => self.get_slowly(other, caller, timeout),
            None => Err(shared.forked_error()),
        }
    }

    /// Checks out a connection if one can be had at once. Waits for nothing, neither for a connection nor for the
    /// network; but asks for one to be made ready, so that a later call finds it.
    ///
    /// What it does with an idle connection depends on [`Validate`](crate::Validate), since a validation could wait:
    ///
    /// | | unused for less than `t` | unused for longer | suspect (another was found dead since) |
    /// |---|---|---|---|
    /// | `AfterIdle(t)`, the default with 1 s | handed out | looked at, see below | `None`, and validated for a later call |
    /// | `Always` | handed out if it was validated for an earlier call, and not used since; else `None` | the same | the same |
    /// | `Never` | handed out | handed out | handed out |
    ///
    /// Looked at: if the manager can [look](Manage::peek) (`PostgresManager` can at what it observes), the connection is handed
    /// out unless the look sees its end. If the manager cannot, it is handed out if it was used or validated since the last
    /// such call, however long ago that is; else the answer is `None`, and it is validated for the next call. So the caller
    /// may find the connection dead: one whose server is merely silent is not seen.
    ///
    /// `None` as well if the pool is closed, or others wait.
    #[track_caller]
    pub fn try_get(&self) -> Option<PooledConnection<M>> {
        let shared = self.shared();
        let caller = Caller { at: Location::caller(), thread: threads::id() };
        let now = shared.time.now();
        if shared.time.seems_forked(now) {
            return None;
        }
        if let Some((token, conn)) = self.take_at_once(now, caller) {
            return Some(self.check_out(conn.checked_out(token), now, false));
        }
        if !shared.is_forked() {
            shared.with(|l| l.prepare(now));
        }
        None
    }

    /// A connection that can be had without waiting, not even for a check.
    fn take_at_once(&self, now: Moment, caller: Caller) -> Option<(Token, Box<PoolConn<M>>)> {
        let shared = self.shared();
        match shared.with_at_home(|l| l.take_at_once(now, caller))? {
            Take::Ready(token, conn) => Some((token, conn)),
            Take::Nothing => None,
            Take::Check(_, conn, _) if shared.is_forked() => {
                // The connection belongs to the parent process: not even its drop may run here.
                std::mem::forget(conn);
                None
            }
            Take::Check(token, mut conn, _) => {
                let in_hand = in_hand::with(shared.address(), token.id());
                let seen = catch(|| shared.user.manager.peek(&mut conn.inner));
                drop(in_hand);
                let result = match seen {
                    Ok(Some(Err(error))) => Ok(Err(error)),
                    Err(panic) => Err(panic),
                    Ok(seen) => {
                        let now = shared.time.precise();
                        return shared.with(|l| l.looked_at(now, token, conn, caller, seen.is_some()));
                    }
                };
                self.check_failed_here(token, conn, result);
                None
            }
        }
    }

    /// The last step of every checkout. `asked`: when the caller asked for it. `waited`: that may be a while ago.
    #[inline]
    fn check_out(&self, conn: Box<PoolConn<M>>, asked: Moment, waited: bool) -> PooledConnection<M> {
        let shared = self.shared();
        let mut now = asked;
        if let Some(events) = &shared.user.hooks.events {
            if waited {
                now = shared.time.precise();
            }
            let (id, duration) = (conn.id, now.since(asked));
            let _in_hand = in_hand::with(shared.address(), id);
            shielded(|| events.handle_checkout(CheckoutEvent { id, duration }));
        }
        PooledConnection::new(conn, now)
    }

    #[cold]
    fn get_slowly(
        &self,
        first: Take<Box<PoolConn<M>>>,
        caller: Caller,
        timeout: Duration,
    ) -> Result<PooledConnection<M>, Error> {
        let shared = self.shared();
        if shared.is_forked() {
            // The connection belongs to the parent process: not even its drop may run here.
            std::mem::forget(first);
            return Err(shared.forked_error());
        }
        let begun = shared.time.precise();
        let deadline = begun.plus(timeout);
        // The timeout may be too short for a check.
        let hurried = timeout < shared.settings.validation_timeout;
        let mut place = None;
        if timeout.is_zero() {
            if let Some((token, conn)) = self.take_at_once(begun, caller) {
                return Ok(self.check_out(conn.checked_out(token), begun, false));
            }
        }
        if let Take::Check(token, conn, ticket) = first {
            if let Some((token, conn)) = self.check_here(token, conn, caller) {
                return Ok(self.check_out(conn.checked_out(token), begun, true));
            }
            place = Some(ticket);
        }
        let waiter = Arc::new(PoolWaiter::<M>::new(shared.time.home()));
        let now = shared.time.precise();
        let (joined, unused) = shared.with(|l| {
            let joined = l.join(now, caller, place, hurried, Arc::clone(&waiter));
            shared.note_waiting(l);
            joined
        });
        drop(unused);
        let outcome = match joined {
            Join::Ready(token, conn) => Outcome::Connection(token, conn),
            Join::Closed => Outcome::Closed,
            Join::Refused => Outcome::Refused,
            Join::TooMany(waiting) => {
                let max_waiting = shared.settings.max_waiting.unwrap_or(u32::MAX);
                let error = TooManyWaiting { pool: shared.name.to_string(), waiting, max_waiting };
                return Err(Error::new(ErrorKind::TooManyWaiting(error)));
            }
            Join::Queued(ticket) => match self.wait(&waiter, ticket, deadline) {
                Some(outcome) => outcome,
                None => {
                    if hurried {
                        let now = shared.time.precise();
                        shared.with(|l| l.prepare_for_the_next(now, timeout < BLINK));
                    }
                    if let Some(events) = &shared.user.hooks.events {
                        shielded(|| events.handle_timeout(TimeoutEvent { timeout }));
                    }
                    return Err(shared.timeout_error(timeout));
                }
            },
        };
        match outcome {
            Outcome::Connection(token, conn) => Ok(self.check_out(conn.checked_out(token), begun, true)),
            Outcome::Closed => Err(shared.closed_error()),
            Outcome::Refused => Err(shared.refused_error()),
        }
    }

    /// Waits for a connection, a permanent refusal or the end of the pool. `None`: the deadline came first.
    fn wait(&self, waiter: &PoolWaiter<M>, ticket: Ticket, deadline: Moment) -> Option<Outcome<Box<PoolConn<M>>>> {
        let shared = self.shared();
        let until = shared.time.instant(deadline);
        loop {
            let is_over = match waiter.wait(until) {
                Signal::Served(outcome) => return Some(outcome),
                Signal::Notified => false,
                Signal::None => true,
            };
            let now = shared.time.precise();
            let (taken, left) = shared.with(|l| {
                let taken = l.take_notified(now, ticket);
                // The waiter leaves only if it cannot take a connection even now: it may have been notified meanwhile.
                let left = if is_over && taken.is_none() { l.leave(now, ticket) } else { None };
                shared.note_waiting(l);
                (taken, left)
            });
            match (taken, left) {
                (Some((token, conn)), _) => return Some(Outcome::Connection(token, conn)),
                (None, Some(_)) => return None,
                // The waiter is no longer queued, so it was served, under the same lock.
                (None, None) if is_over => return waiter.take(),
                (None, None) => {}
            }
        }
    }

    /// Validates on this thread. `None`: the validation failed, or the caller may not have the connection after all.
    fn check_here(
        &self,
        token: Token,
        mut conn: Box<PoolConn<M>>,
        caller: Caller,
    ) -> Option<(Token, Box<PoolConn<M>>)> {
        let shared = self.shared();
        let begun = shared.time.precise();
        let in_hand = in_hand::with(shared.address(), token.id());
        let result = catch(|| shared.user.manager.validate(&mut conn.inner, shared.settings.validation_timeout));
        drop(in_hand);
        if let Ok(Ok(())) = result {
            let now = shared.time.precise();
            return shared.with(|l| l.own_check_passed(now, begun, token, conn, caller));
        }
        self.check_failed_here(token, conn, result);
        None
    }

    /// A check or a look on this thread has failed: has the connection closed, and tells the log and the error handler.
    fn check_failed_here(&self, token: Token, conn: Box<PoolConn<M>>, result: Result<Result<(), M::Error>, Panic>) {
        let shared = self.shared();
        let reason = if result.is_ok() { CloseReason::Invalid } else { CloseReason::Panicked };
        let id = token.id();
        let permit = Permit::new(Arc::clone(shared), token);
        permit.report_check_failed(reason);
        if let Some(token) = permit.into_token() {
            shared.post(Job::Slot(SlotJob::Close(token, conn, reason)));
        }
        tell_check_failed(shared, id, reason, result);
    }
}
