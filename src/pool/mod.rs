//! [`Pool`]: what its users hold.

pub(crate) mod builder;
pub(crate) mod connection;
pub(crate) mod guard;

use crate::error::{Error, ErrorKind, Timeout, TooManyWaiting};
use crate::event::{CheckoutEvent, TimeoutEvent};
use crate::leaf::clock::Moment;
use crate::leaf::in_hand;
use crate::leaf::shield::{Panic, catch, shielded};
use crate::leaf::text::Short;
use crate::leaf::text::Shown;
use crate::leaf::threads;
use crate::ledger::{Caller, Counts, Join, Outcome, Slot, Take, Ticket, Token};
use crate::manage::Manage;
use crate::pool::builder::{Builder, Hooks};
use crate::pool::connection::{Conn, PooledConnection};
use crate::pool::guard::PoolGuard;
use crate::runtime::jobs::{Job, Permit, refused};
use crate::runtime::reaper;
use crate::runtime::shared::{Book, Ended, Shared, WaitingSeat};
use crate::runtime::waiter::News;
use crate::settings::{Settings, check_floor};
use crate::stats::{CloseReason, ConnectionState, Connections, State, Stats, Tally};
use log::Level;
use std::cmp::Reverse;
use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A pool of connections: a handle to it, to be cloned and given to every thread.
///
/// The pool is open until one of them is told to [`close`](Pool::close), a [`PoolGuard`] is dropped, or the last handle
/// and guard is. Borrowed connections do not keep it open.
pub struct Pool<M: Manage>(Arc<Handle<M>>);

/// What the handles have in common and the pool's own threads have not.
struct Handle<M: Manage> {
    shared: Arc<Shared<M>>,
}

impl<M: Manage> Drop for Handle<M> {
    fn drop(&mut self) {
        end(&self.shared, "its last handle was dropped", None);
    }
}

impl<M: Manage> Clone for Pool<M> {
    fn clone(&self) -> Self {
        Pool(Arc::clone(&self.0))
    }
}

impl<M: Manage> Pool<M> {
    /// A pool with the default settings. See [`Builder::build`].
    ///
    /// # Errors
    ///
    /// As [`Builder::build`].
    pub fn new(manager: M) -> Result<Pool<M>, Error> {
        Pool::builder().build(manager)
    }

    /// The settings of a pool to be.
    pub fn builder() -> Builder<M> {
        Builder::new()
    }

    /// A pool with a thread that keeps time, and no connection yet.
    pub(crate) fn start(settings: Settings, hooks: Hooks<M>, manager: M) -> Result<Pool<M>, Error> {
        let shared = Shared::new(settings, hooks, manager);
        reaper::start(&shared).map_err(|e| Error::config("pool", format!("its thread cannot be started: {e}")))?;
        shared.notice(Level::Info, || {
            let s = &shared.settings;
            let or_never = |d: Option<Duration>| d.map_or("never".into(), |d| Short(d).to_string());
            let (idle, life) = (or_never(s.max_idle), or_never(s.max_lifetime));
            format!("open (max_size {}, min_idle {}, max_idle {idle}, max_lifetime {life})", s.max_size, s.min_idle)
        });
        Ok(Pool(Arc::new(Handle { shared })))
    }

    /// Opens what `build` promises, or says why not. Nothing of it is lent.
    pub(crate) fn fill(&self) -> Result<(), Error> {
        let shared = &self.0.shared;
        let timeout = shared.settings.connection_timeout;
        let deadline = shared.clock.instant(shared.clock.precise().plus(timeout));
        let wait_until = |fact: fn(&Book<M>) -> bool| {
            let found = shared.watch(deadline, || {
                let ledger = shared.lock();
                if ledger.is_closed() || fact(&ledger) {
                    return Some(Ok(()));
                }
                ledger.is_refusing().then_some(Err(()))
            });
            match found {
                Some(Ok(())) => Ok(()),
                Some(Err(())) => Err(shared.refused_error()),
                None => Err(self.timeout_error(timeout)),
            }
        };
        // One alone, to be looked at before there are others: a floor of one brings it.
        shared.starting.store(true, Ordering::Release);
        let now = shared.clock.precise();
        shared.with(|l| l.set_min_idle(now, 1));
        wait_until(|l| l.tally.opens > 0)?;
        self.lay_floor();
        wait_until(|l| l.floor_stands())
    }

    pub(crate) fn lay_floor(&self) {
        let shared = &self.0.shared;
        let now = shared.clock.precise();
        shared.with(|l| l.set_min_idle(now, shared.settings.min_idle));
    }

    // ---------------------------------------------------------------------------------------------- getting

    /// Borrows a connection, waiting for one for at most `connection_timeout`.
    ///
    /// The one used last is taken first. If none is idle, waits in order of arrival for one to be returned or opened,
    /// whichever comes first; so it does if the first of those who wait has the
    /// [right of way](Builder::fair_after).
    ///
    /// # Errors
    ///
    /// * [`Timeout`](crate::ErrorKind::Timeout): none came in time. Says who holds them, or why none could be opened.
    /// * [`Connect`](crate::ErrorKind::Connect): the server refuses for good, and no connection is alive. At once.
    /// * [`Closed`](crate::ErrorKind::Closed): the pool is closed. At once, to those who wait as well.
    /// * [`TooManyWaiting`](crate::ErrorKind::TooManyWaiting): `max_waiting` others wait. At once.
    /// * [`Config`](crate::ErrorKind::Config): this process was forked from the one that built the pool.
    #[track_caller]
    #[inline]
    pub fn get(&self) -> Result<PooledConnection<M>, Error> {
        self.get_timeout(self.0.shared.settings.connection_timeout)
    }

    /// [`get`](Pool::get) with a deadline of its own: `timeout` covers everything, queueing, opening and validation.
    ///
    /// Zero: takes what can be had at once, by the rules of [`try_get`](Pool::try_get), and fails otherwise. A short timeout
    /// does no harm to a connection that is being opened or validated: it goes to the next.
    ///
    /// # Errors
    ///
    /// As [`get`](Pool::get).
    #[track_caller]
    #[inline]
    pub fn get_timeout(&self, timeout: Duration) -> Result<PooledConnection<M>, Error> {
        let shared = &self.0.shared;
        let caller = Caller { at: Location::caller(), thread: threads::tag() };
        let here = shared.keeps_limits && shared.settings.validation_timeout <= timeout;
        let now = shared.now();
        if shared.seems_forked(now) {
            return Err(shared.forked_error());
        }
        match shared.with_at_home(|l| l.take(now, caller, here)) {
            Some(Take::Ready(token, conn)) => Ok(self.lend(token, conn, now, false)),
            Some(other) => self.get_slowly(other, caller, timeout),
            None => Err(shared.forked_error()),
        }
    }

    /// Borrows a connection if one can be had at once. Waits for nothing, neither for a connection nor for the network;
    /// but asks for one to be made ready, so that a later call finds it.
    ///
    /// What would be [validated](Builder::validate) because it was unused for a while is had after a
    /// [look](Manage::peek) at it, if the manager can look (`PostgresManager` can, except
    /// over a unix socket). Otherwise it is had if it was used or validated since the last such call, however long ago
    /// that is: what one call had validated in vain serves the next. So it may be found dead by its user. What is under
    /// suspicion, since another connection was found dead, is had only after it was validated; and with
    /// [`Validate::Always`](crate::Validate) each use has a validation of its own.
    ///
    /// `None` as well if the pool is closed, or others wait.
    #[track_caller]
    pub fn try_get(&self) -> Option<PooledConnection<M>> {
        let shared = &self.0.shared;
        let caller = Caller { at: Location::caller(), thread: threads::tag() };
        let now = shared.now();
        if shared.seems_forked(now) {
            return None;
        }
        if let Some((token, conn)) = self.take_at_once(now, caller) {
            return Some(self.lend(token, conn, now, false));
        }
        if !shared.is_forked() {
            shared.with(|l| l.prepare(now));
        }
        None
    }

    /// What can be had without waiting, not even for a check.
    fn take_at_once(&self, now: Moment, caller: Caller) -> Option<(Token, Box<Conn<M>>)> {
        let shared = &self.0.shared;
        match shared.with_at_home(|l| l.take_at_once(now, caller))? {
            Take::Ready(token, conn) => Some((token, conn)),
            Take::Nothing => None,
            Take::Check(_, conn, _) if shared.is_forked() => {
                // It is the parent's.
                std::mem::forget(conn);
                None
            }
            Take::Check(token, mut conn, _) => {
                let here = in_hand::with(shared.address(), token.id());
                let seen = catch(|| shared.manager.peek(conn.get_mut()));
                drop(here);
                let result = match seen {
                    Ok(Some(Err(error))) => Ok(Err(error)),
                    Err(panic) => Err(panic),
                    Ok(seen) => {
                        let now = shared.clock.precise();
                        return shared.with(|l| l.looked_at(now, token, conn, caller, seen.is_some()));
                    }
                };
                self.refuse_here(token, conn, result);
                None
            }
        }
    }

    /// A connection that was asked for at that moment has been won, at once or not.
    #[inline]
    fn lend(&self, token: Token, conn: Box<Conn<M>>, asked: Moment, waited: bool) -> PooledConnection<M> {
        let shared = &self.0.shared;
        let mut now = asked;
        if let Some(events) = &shared.hooks.events {
            if waited {
                now = shared.clock.precise();
            }
            let (id, duration) = (token.id(), now.since(asked));
            let _here = in_hand::with(shared.address(), id);
            shielded(|| events.handle_checkout(CheckoutEvent { id, duration }));
        }
        PooledConnection::new(token, conn, now)
    }

    #[cold]
    fn get_slowly(
        &self,
        first: Take<Box<Conn<M>>>,
        caller: Caller,
        timeout: Duration,
    ) -> Result<PooledConnection<M>, Error> {
        let shared = &self.0.shared;
        if shared.is_forked() {
            // What it has in hand is the parent's.
            std::mem::forget(first);
            return Err(shared.forked_error());
        }
        let begun = shared.clock.precise();
        let deadline = begun.plus(timeout);
        // Too short for a check, perhaps.
        let hurried = timeout < shared.settings.validation_timeout;
        let mut place = None;
        if timeout.is_zero() {
            if let Some((token, conn)) = self.take_at_once(begun, caller) {
                return Ok(self.lend(token, conn, begun, false));
            }
        }
        if let Take::Check(token, conn, ticket) = first {
            if let Some((token, conn)) = self.check_here(token, conn, caller) {
                return Ok(self.lend(token, conn, begun, true));
            }
            place = Some(ticket);
        }
        let seat = Arc::new(WaitingSeat::<M>::new(shared.home));
        let now = shared.clock.precise();
        let (joined, unused) = shared.with(|l| {
            let joined = l.join(now, caller, place, hurried, Arc::clone(&seat));
            shared.note_crowd(l);
            joined
        });
        drop(unused);
        let outcome = match joined {
            Join::Ready(token, conn) => Outcome::Connection(token, conn),
            Join::Closed => Outcome::Closed,
            Join::Refused => Outcome::Refused,
            Join::TooMany(waiting) => {
                let max_waiting = shared.settings.max_waiting.unwrap_or(u32::MAX);
                let crowd = TooManyWaiting { pool: shared.name.to_string(), waiting, max_waiting };
                return Err(Error::new(ErrorKind::TooManyWaiting(crowd)));
            }
            Join::Queued(ticket) => match self.wait(&seat, ticket, deadline) {
                Some(outcome) => outcome,
                None => {
                    if hurried {
                        let now = shared.clock.precise();
                        shared.with(|l| l.prepare_for_the_next(now, timeout < BLINK));
                    }
                    if let Some(events) = &shared.hooks.events {
                        shielded(|| events.handle_timeout(TimeoutEvent { timeout }));
                    }
                    return Err(self.timeout_error(timeout));
                }
            },
        };
        match outcome {
            Outcome::Connection(token, conn) => Ok(self.lend(token, conn, begun, true)),
            Outcome::Closed => Err(shared.closed_error()),
            Outcome::Refused => Err(shared.refused_error()),
        }
    }

    /// Sits until there is a connection, or an end. `None`: the deadline came first.
    fn wait(&self, seat: &WaitingSeat<M>, ticket: Ticket, deadline: Moment) -> Option<Outcome<Box<Conn<M>>>> {
        let shared = &self.0.shared;
        let until = shared.clock.instant(deadline);
        loop {
            let over = match seat.wait(until) {
                News::Full(outcome) => return Some(outcome),
                News::Called => false,
                News::None => true,
            };
            let now = shared.clock.precise();
            let (claimed, left) = shared.with(|l| {
                let claimed = l.take_notified(now, ticket);
                // Even at the last moment: what it was called for is there, perhaps.
                let left = if over && claimed.is_none() { l.leave(now, ticket) } else { None };
                shared.note_crowd(l);
                (claimed, left)
            });
            match (claimed, left) {
                (Some((token, conn)), _) => return Some(Outcome::Connection(token, conn)),
                (None, Some(_)) => return None,
                // No longer queued: then its seat was filled, under the same lock.
                (None, None) if over => return seat.take(),
                (None, None) => {}
            }
        }
    }

    /// Validates on this thread. `None`: it failed, or the connection may not be had after all.
    fn check_here(&self, token: Token, mut conn: Box<Conn<M>>, caller: Caller) -> Option<(Token, Box<Conn<M>>)> {
        let shared = &self.0.shared;
        let begun = shared.clock.precise();
        let here = in_hand::with(shared.address(), token.id());
        let result = catch(|| shared.manager.validate(conn.get_mut(), shared.settings.validation_timeout));
        drop(here);
        if let Ok(Ok(())) = result {
            let now = shared.clock.precise();
            return shared.with(|l| l.own_check_passed(now, begun, token, conn, caller));
        }
        self.refuse_here(token, conn, result);
        None
    }

    /// A check or a look on this thread has failed: closes the connection, and says so.
    fn refuse_here(&self, token: Token, conn: Box<Conn<M>>, result: Result<Result<(), M::Error>, Panic>) {
        let shared = &self.0.shared;
        let reason = if result.is_ok() { CloseReason::Invalid } else { CloseReason::Panicked };
        let id = token.id();
        let permit = Permit::new(Arc::clone(shared), token);
        permit.report_check(reason);
        shared.post(Job::Close(permit, conn, reason));
        refused(shared, id, reason, result);
    }

    fn timeout_error(&self, timeout: Duration) -> Error {
        let shared = &self.0.shared;
        let (counts, max_size, failing) = {
            let ledger = shared.lock();
            (ledger.counts(), ledger.rules().max_size, ledger.is_failing())
        };
        let mut out = shared.rows(|row| row.as_seen() == ConnectionState::InUse);
        let me = threads::tag();
        let checked_out_here = out.iter().filter(|row| row.caller().is_some_and(|h| h.thread == me)).count() as u32;
        out.sort_by_key(|row| row.since);
        out.truncate(Timeout::MOST_SHOWN);
        let mut longest_in_use = shared.describe(out);
        longest_in_use.sort_by_key(|row| Reverse(row.since));
        Error::new(ErrorKind::Timeout(Timeout {
            pool: shared.name.to_string(),
            timeout,
            max_size,
            in_use: counts.in_use,
            opening: counts.opening,
            checking: counts.checking,
            closing: counts.closing,
            abandoned: counts.abandoned,
            waiting: counts.waiting,
            longest_in_use,
            checked_out_here,
            cause: if failing { shared.cause() } else { None },
        }))
    }

    // ---------------------------------------------------------------------------------------------- changing

    /// Sets the greatest number of connections.
    ///
    /// Down: what is too many is closed, idle ones at once (the longest unused first) and lent ones as they come back.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for zero, and for less than `min_idle`. Nothing has changed then. (In a forked
    /// child nothing changes either.)
    pub fn resize(&self, max_size: u32) -> Result<(), Error> {
        if max_size == 0 {
            return Err(Error::config("max_size", "is 0, and must be at least 1"));
        }
        let shared = &self.0.shared;
        check_floor(shared.settings.min_idle, max_size)?;
        if shared.is_forked() {
            return Ok(());
        }
        let now = shared.clock.precise();
        shared.with(|l| l.resize(now, max_size));
        Ok(())
    }

    /// Replaces every connection whose opening began before now: idle ones at once, lent ones as they come back.
    ///
    /// Where such a connection takes more than a tenth of `close_timeout` to close, and somebody waits for its place, it is
    /// given up like one past that limit: what it leads to may be the server that failed.
    ///
    /// For after a failover, or when a password was changed. What the pool remembers of a permanent refusal is
    /// forgotten: the next attempt is made soon.
    pub fn recycle(&self) {
        let shared = &self.0.shared;
        if shared.is_forked() {
            return;
        }
        let now = shared.clock.precise();
        shared.with(|l| l.recycle(now));
        shared.notice(Level::Info, || "recycled: every connection is replaced".into());
    }

    // ---------------------------------------------------------------------------------------------- ending

    /// Closes the pool, and waits until it is closed, but for at most `grace`.
    ///
    /// From the start of the call, those who wait for a connection get [`Closed`](crate::ErrorKind::Closed), and nothing
    /// new is handed out. Idle connections are closed; lent ones as they come back; those being opened when they arrive.
    /// Called from a hook, it does not wait for the job or the connection with which the hook was called. But what
    /// this thread has checked out, and still holds, it waits for until the grace is over: return it first. (The pool
    /// knows who checked a connection out, and not who has it now.)
    ///
    /// When the grace is over, what is still lent is cancelled and cut where the manager can do that, the rest is
    /// left to end by itself, and the report says what. Zero: waits for nothing. A second call has a grace of its own.
    #[track_caller]
    pub fn close(&self, grace: Duration) -> CloseReport {
        let closer = Closer::new("`close` was called", Location::caller(), grace);
        close(&self.0.shared, closer)
    }

    /// Whether the pool is closed.
    pub fn is_closed(&self) -> bool {
        !self.0.shared.is_forked() && self.0.shared.lock().is_closed()
    }

    /// A guard that closes the pool when it is dropped. See [`PoolGuard`].
    #[track_caller]
    pub fn guard(&self) -> PoolGuard {
        PoolGuard::new(Arc::new(self.clone()), Location::caller())
    }

    // ---------------------------------------------------------------------------------------------- looking

    /// How many connections there are, as r2d2 says it: all that are open, and the idle ones among them.
    pub fn state(&self) -> State {
        let shared = &self.0.shared;
        let counts = if shared.is_forked() { Counts::default() } else { shared.counts() };
        State { connections: counts.idle + counts.in_use + counts.checking, idle_connections: counts.idle }
    }

    /// What the pool is doing and has done. For a gauge every few seconds: it takes the pool's lock for a moment.
    pub fn stats(&self) -> Stats {
        let shared = &self.0.shared;
        let (dropped_records, counts, max_size, closed, tally) = if shared.is_forked() {
            (0, Counts::default(), shared.settings.max_size, false, Tally::default())
        } else {
            let dropped_records = shared.crew.dropped_notices();
            let ledger = shared.lock();
            let tally = ledger.tally.clone();
            (dropped_records, ledger.counts(), ledger.rules().max_size, ledger.is_closed(), tally)
        };
        Stats {
            name: shared.name.to_string(),
            age: shared.clock.precise().since(Moment::BIRTH),
            closed,
            max_size,
            idle: counts.idle,
            in_use: counts.in_use,
            checking: counts.checking,
            opening: counts.opening,
            closing: counts.closing,
            waiting: counts.waiting,
            abandoned: counts.abandoned,
            checkouts: tally.checkouts,
            waits: tally.waits,
            timeouts: tally.timeouts,
            rejected: tally.rejected,
            opens: tally.opens,
            failed_opens: tally.failed_opens,
            closes: tally.closes.iter().sum(),
            detached: tally.detached,
            abandonments: tally.abandonments,
            leaks: tally.leaks,
            dropped_records,
            wait_time: tally.wait,
            usage_time: tally.hold,
            open_time: tally.open,
            max_lateness: tally.max_lateness,
            closes_by: tally.closes,
        }
    }

    /// Every connection, one row each: what it is doing, how old it is, who has it.
    pub fn connections(&self) -> Connections {
        let shared = &self.0.shared;
        if shared.is_forked() {
            return Connections::default();
        }
        Connections(shared.describe(shared.rows(|_| true)))
    }

    /// Has a record logged about this pool, from a thread that the logger may block.
    #[cfg(feature = "postgres")]
    pub(crate) fn record(&self, level: Level, text: impl FnOnce() -> String) {
        self.0.shared.notice(level, text);
    }

    /// The settings the pool was built with.
    pub fn settings(&self) -> &Settings {
        &self.0.shared.settings
    }

    /// The manager.
    pub fn manager(&self) -> &M {
        &self.0.shared.manager
    }

    /// The name of the pool.
    pub fn name(&self) -> &str {
        &self.0.shared.name
    }

    /// The greatest number of connections, as it is set now.
    pub fn max_size(&self) -> u32 {
        let shared = &self.0.shared;
        if shared.is_forked() { shared.settings.max_size } else { shared.lock().rules().max_size }
    }

    /// The floor. (r2d2's returns an `Option`, in which `None` stands for `max_size`.)
    pub fn min_idle(&self) -> u32 {
        self.settings().min_idle
    }

    /// See [`Builder::max_idle`].
    pub fn max_idle(&self) -> Option<Duration> {
        self.settings().max_idle
    }

    /// [`max_idle`](Pool::max_idle) by r2d2's name.
    pub fn idle_timeout(&self) -> Option<Duration> {
        self.settings().max_idle
    }

    /// See [`Builder::max_lifetime`].
    pub fn max_lifetime(&self) -> Option<Duration> {
        self.settings().max_lifetime
    }

    /// See [`Builder::connection_timeout`].
    pub fn connection_timeout(&self) -> Duration {
        self.settings().connection_timeout
    }
}

impl<M: Manage> fmt::Debug for Pool<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.name())
            .field("state", &self.state())
            .field("settings", self.settings())
            .finish_non_exhaustive()
    }
}

// -------------------------------------------------------------------------------------------------- the end

/// What `close` has done, and what it had to leave.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CloseReport {
    /// The name of the pool.
    pub pool: String,
    /// How long it took.
    pub elapsed: Duration,
    /// How many waited for a connection, and were told that the pool is closed.
    pub waiters: u32,
    /// Connections that are not closed yet: still lent, or in a job that has not ended.
    pub left: Connections,
    /// The numbers of those among them that were aborted when the grace was over.
    pub aborted: Vec<u64>,
    /// Jobs that had been abandoned before and have not ended.
    pub abandoned: u32,
    /// Threads of the pool that have not ended: each is in a call of the manager's, a hook's or the logger's.
    pub threads: usize,
    /// Whether the workers that a guard owned have finished; `true` if it owned none.
    pub workers_finished: bool,
    /// This process was forked from the one that built the pool.
    forked: bool,
}

impl CloseReport {
    /// What is reported in a forked child, in which nothing is done.
    fn of_another_process(pool: String, elapsed: Duration) -> Self {
        let left = Connections::default();
        let (waiters, abandoned, threads) = (0, 0, 0);
        CloseReport {
            pool,
            elapsed,
            waiters,
            left,
            aborted: Vec::new(),
            abandoned,
            threads,
            workers_finished: false,
            forked: true,
        }
    }

    /// Whether nothing is left: no connection, no thread, no worker. In a forked child, which cannot close its parent's
    /// pool: `false`.
    pub fn is_complete(&self) -> bool {
        !self.forked && self.left.is_empty() && self.abandoned == 0 && self.threads == 0 && self.workers_finished
    }
}

impl fmt::Display for CloseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pool '{}' {}", Shown(&self.pool), self.outcome())
    }
}

impl CloseReport {
    /// What a record says after the pool's name.
    fn outcome(&self) -> impl fmt::Display + '_ {
        struct Outcome<'a>(&'a CloseReport);
        impl fmt::Display for Outcome<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let report = self.0;
                if report.forked {
                    return f.write_str("is another process's, of which this one is a fork: nothing was done");
                }
                let how = if report.is_complete() { "closed in" } else { "not wholly closed after" };
                write!(f, "{how} {}", Short(report.elapsed))?;
                if report.waiters > 0 {
                    write!(f, "; waiters told so: {}", report.waiters)?;
                }
                if report.is_complete() {
                    return write!(f, "; nothing is left");
                }
                if !report.workers_finished {
                    write!(f, "; workers still run")?;
                }
                if report.abandoned > 0 {
                    write!(f, "; jobs abandoned before and not back: {}", report.abandoned)?;
                }
                if report.threads > 0 {
                    write!(f, "; threads that have not ended: {}", report.threads)?;
                }
                for (i, row) in report.left.iter().enumerate() {
                    let aborted = if report.aborted.contains(&row.id) { " (aborted)" } else { "" };
                    write!(f, "{}{row}{aborted}", if i == 0 { "; left: " } else { ", " })?;
                }
                Ok(())
            }
        }
        Outcome(self)
    }
}

/// Begins the end, if it has not begun. Returns how many waited.
fn end<M: Manage>(shared: &Arc<Shared<M>>, by: &'static str, at: Option<&'static Location<'static>>) -> u32 {
    if shared.is_forked() {
        return 0;
    }
    let now = shared.clock.precise();
    // Before the ledger is told: whoever hears that the pool is closed can read who did it.
    let _ = shared.ended.set(Ended { by, at, thread: threads::tag(), when: now });
    let waiters = shared.with(|l| {
        let waiters = l.close(now);
        shared.note_crowd(l);
        waiters
    });
    if waiters.is_some() {
        let place = at.map(|at| format!(" ({at})")).unwrap_or_default();
        shared.notice(Level::Info, || format!("closing: {by}{place}"));
    }
    shared.crew.close();
    waiters.unwrap_or(0)
}

/// A timeout in which a job may not even begin, on a busy machine.
const BLINK: Duration = Duration::from_millis(10);

/// How long `close` waits, even past its grace, for its report to reach the log: the process may end right after it.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// One who closes the pool.
pub(crate) struct Closer {
    pub(crate) by: &'static str,
    pub(crate) at: &'static Location<'static>,
    pub(crate) begun: Instant,
    pub(crate) grace: Duration,
    /// Whether the workers of a guard have finished, which had a part of the grace for it.
    pub(crate) workers_finished: bool,
    /// Whether what others have waited for in vain counts against the grace.
    pub(crate) joins: bool,
}

impl Closer {
    pub(crate) fn new(by: &'static str, at: &'static Location<'static>, grace: Duration) -> Self {
        Closer { by, at, begun: Instant::now(), grace, workers_finished: true, joins: false }
    }
}

/// One who closes the pool from within a call that the pool makes: what it has in hand ends only when it has closed. Of two
/// of them neither waits for what the other has in hand.
#[derive(Clone)]
pub(crate) struct Within {
    on_the_crew: bool,
    in_hand: Vec<u64>,
}

/// While it closes.
struct Entered<'a, M: Manage> {
    shared: &'a Arc<Shared<M>>,
    on_the_crew: bool,
    /// Whether it is within a call at all: who is not waits for those who are.
    is_within: bool,
}

impl Within {
    fn enter<M: Manage>(shared: &Arc<Shared<M>>) -> Entered<'_, M> {
        let (on_the_crew, in_hand) = in_hand::of(shared.address());
        let is_within = on_the_crew || !in_hand.is_empty();
        if is_within {
            shared.within.lock().push(Within { on_the_crew, in_hand });
            // Who came before waits for one thing less.
            shared.changed.ring();
        }
        Entered { shared, on_the_crew, is_within }
    }
}

impl<M: Manage> Entered<'_, M> {
    /// The numbers of the connections, and how many threads of the crew.
    fn not_waited_for(&self) -> (Vec<u64>, usize) {
        if !self.is_within {
            return (Vec::new(), 0);
        }
        let within = self.shared.within.lock();
        let threads = within.iter().filter(|one| one.on_the_crew).count();
        (within.iter().flat_map(|one| one.in_hand.iter().copied()).collect(), threads)
    }
}

impl<M: Manage> Drop for Entered<'_, M> {
    fn drop(&mut self) {
        if self.is_within {
            let (on_the_crew, in_hand) = in_hand::of(self.shared.address());
            let mut within = self.shared.within.lock();
            let at = within.iter().position(|one| (one.on_the_crew, &one.in_hand) == (on_the_crew, &in_hand));
            at.map(|at| within.swap_remove(at));
        }
    }
}

/// A wait that was in vain.
#[derive(Clone)]
pub(crate) struct Vain {
    /// When it began: what changed its state later was not waited for from the beginning.
    since: Moment,
    /// How long it was.
    waited: Duration,
    /// Threads and cut connections when it was over.
    threads: usize,
    aborted: Vec<u64>,
}

/// Ends the pool, waits until the deadline for what there is, and reports.
fn close<M: Manage>(shared: &Arc<Shared<M>>, closer: Closer) -> CloseReport {
    let Closer { by, at, begun, grace, workers_finished, joins } = closer;
    if shared.is_forked() {
        return CloseReport::of_another_process(shared.name.to_string(), begun.elapsed());
    }
    let waiters = end(shared, by, Some(at));
    let since = shared.clock.precise();
    // (A job of this very thread's that was written off has no permit any longer.)
    let mine = Within::enter(shared);
    let my_thread = usize::from(mine.on_the_crew);
    let deadline = begun.checked_add(grace);

    let is_over = |vain: Option<&Vain>| {
        let threads = shared.crew.threads();
        let (in_hand, my_threads) = mine.not_waited_for();
        let ledger = shared.lock();
        let skipped = |row: &Slot| in_hand.contains(&row.id) || vain.is_some_and(|vain| row.since <= vain.since);
        let others = ledger.slots().any(|row| !skipped(row));
        // The reaper stays as long as a job has a limit, or this thread validates what it wants.
        let at_work = ledger.slots().any(|row| skipped(row) && row.as_seen() != ConnectionState::InUse);
        let reaper = shared.reaper_lives.load(Ordering::SeqCst) && !at_work;
        (!others && !reaper && threads <= my_threads + vain.map_or(0, |vain| vain.threads)).then_some(())
    };
    let vain = shared.vain.lock().clone();
    match vain.as_ref().filter(|_| joins) {
        None => _ = shared.watch(deadline, || is_over(None)),
        Some(vain) => {
            let early = begun.checked_add(grace.saturating_sub(vain.waited));
            if shared.watch(early, || is_over(None)).is_none() {
                shared.watch(deadline, || is_over(Some(vain)));
            }
        }
    }
    let abandoned = shared.counts().abandoned;
    // Before others are started that cut.
    let threads = shared.crew.threads().saturating_sub(my_thread);

    let left = Connections(shared.describe(shared.rows(|_| true)));
    let over = deadline.is_some_and(|at| Instant::now() >= at);
    let mut aborted = vain.as_ref().map_or(Vec::new(), |vain| vain.aborted.clone());
    aborted.retain(|id| left.iter().any(|row| row.id == *id));
    if over {
        for row in left.iter() {
            let lent = row.state == ConnectionState::InUse;
            if shared.cut(row.id, lent) && !aborted.contains(&row.id) {
                aborted.push(row.id);
            }
        }
        let now = shared.clock.precise();
        shared.with(|l| l.abandon_opens(now));
        let (since, waited) = vain.map_or((since, grace), |vain| (vain.since, vain.waited.max(grace)));
        *shared.vain.lock() = Some(Vain { since, waited, threads, aborted: aborted.clone() });
    }
    let mut report = CloseReport {
        pool: shared.name.to_string(),
        elapsed: begun.elapsed(),
        waiters,
        left,
        aborted,
        abandoned,
        threads,
        workers_finished,
        forked: false,
    };
    let level = if report.is_complete() { Level::Info } else { Level::Warn };
    if level <= log::max_level() {
        shared.notice(level, || report.outcome().to_string());
        let until = Instant::now() + LAST_WORDS;
        shared.watch(Some(until), || (shared.crew.threads() <= report.threads + my_thread).then_some(()));
    }
    report.elapsed = begun.elapsed();
    report
}

/// What a guard can do with a pool whose manager it does not know.
pub(crate) trait Closing: Send + Sync {
    fn name(&self) -> &str;
    fn is_forked(&self) -> bool;
    fn close_by(&self, closer: Closer) -> CloseReport;
}

impl<M: Manage> Closing for Pool<M> {
    fn name(&self) -> &str {
        Pool::name(self)
    }

    fn is_forked(&self) -> bool {
        self.0.shared.is_forked()
    }

    fn close_by(&self, closer: Closer) -> CloseReport {
        close(&self.0.shared, closer)
    }
}
