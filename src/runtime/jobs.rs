//! What the crew does: everything that may block, panic, or run a user's code.
//!
//! Each [`Job`] that has a [`Permit`] gives it back to the ledger, in so many words or, if a panic comes in between, by
//! dropping it.

use crate::error::Cause;
use crate::event::{AcquireEvent, ReleaseEvent};
use crate::leaf::clock::Moment;
use crate::leaf::in_hand;
use crate::leaf::shield::{Panic, catch, shielded};
use crate::leaf::text::Short;
use crate::leaf::text::{CAUSE, brief};
use crate::ledger::{Caller, Token};
use crate::manage::{Manage, Opening, Start};
use crate::pool::connection::{Conn, Link};
use crate::runtime::defect;
use crate::runtime::executor::{Crew, Kind, Task, Work};
use crate::runtime::shared::{Shared, by};
use crate::stats::CloseReason;
use log::Level;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Something for the crew to do.
pub(crate) enum Job<M: Manage> {
    Open(Permit<M>),
    Check(Permit<M>, Box<Conn<M>>),
    /// With who had it last.
    Reset(Permit<M>, Box<Conn<M>>, Option<Caller>),
    Close(Permit<M>, Box<Conn<M>>, CloseReason),
    /// Abort what this connection is doing, after asking the server to cancel it if `true`.
    Cut(Arc<Opening>, bool),
    /// Drop a cause: what it was made of may be the user's.
    Drop(Cause),
    Notice(Notice),
}

impl<M: Manage> Task for Job<M> {
    fn kind(&self) -> Kind {
        match self {
            Job::Open(..) => Kind::Open,
            Job::Check(..) | Job::Reset(..) => Kind::Check,
            Job::Close(..) => Kind::Close,
            Job::Cut(..) | Job::Drop(..) => Kind::Cut,
            Job::Notice(..) => Kind::Notice,
        }
    }

    fn permit(&self) -> Option<u64> {
        match self {
            Job::Open(permit) | Job::Check(permit, _) | Job::Reset(permit, ..) | Job::Close(permit, ..) => {
                Some(permit.id())
            }
            Job::Cut(..) | Job::Drop(..) | Job::Notice(..) => None,
        }
    }
}

/// A log record.
pub(crate) struct Notice {
    pub(crate) level: Level,
    pub(crate) text: String,
}

/// A permit of the pool in the hands of a job. Dropped, it is freed: no path, panics included, can forget it. Never dropped
/// under the ledger's lock, which it takes.
pub(crate) struct Permit<M: Manage> {
    shared: Arc<Shared<M>>,
    token: Option<Token>,
}

impl<M: Manage> Work for Shared<M> {
    type Job = Job<M>;

    fn crew(&self) -> &Crew<Job<M>> {
        &self.crew
    }

    fn run(self: &Arc<Self>, job: Job<M>) {
        let _here = in_hand::on_the_crew(self.address());
        // A user's code was caught where it was called.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job.run(self))) {
            defect::tell(self, "a job", panic);
        }
    }

    fn left(&self) {
        self.changed.ring();
    }
}

impl<M: Manage> Job<M> {
    pub(crate) fn run(self, shared: &Arc<Shared<M>>) {
        let _here = self.permit().map(|id| in_hand::with(shared.address(), id));
        match self {
            Job::Open(permit) => open(shared, permit),
            Job::Check(permit, conn) => check(shared, permit, conn, None),
            Job::Reset(permit, conn, caller) => check(shared, permit, conn, Some(caller)),
            Job::Close(permit, conn, reason) => close(shared, permit, *conn, reason),
            Job::Cut(opening, cancel) => {
                if cancel {
                    shielded(|| opening.cancel());
                }
                shielded(|| opening.abort());
                shielded(|| drop(opening));
            }
            Job::Drop(cause) => shielded(|| drop(cause)),
            Job::Notice(Notice { level, text }) => shielded(|| log::log!(target: "millpond", level, "{text}")),
        }
    }
}

// -------------------------------------------------------------------------------------------------- the jobs

fn open<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>) {
    let Some(permit) = permit.begin() else { return };
    let (id, limit) = (permit.id(), shared.settings.open_timeout);
    let begun = shared.clock.precise();
    let opening = Arc::new(Opening::new(Arc::clone(&shared.name), limit));
    shared.openings.lock().insert(id, Arc::clone(&opening));
    let mut conn = match catch(|| shared.manager.open(&opening)) {
        Ok(Ok(conn)) => conn,
        Ok(Err(error)) => return failed(shared, permit, error),
        Err(panic) => return failed_with(shared, permit, panic),
    };
    let mut acquired = false;
    if let Some(customizer) = &shared.hooks.customizer {
        match catch(|| customizer.on_acquire(&mut conn)) {
            Ok(Ok(())) => acquired = true,
            Ok(Err(error)) => {
                shielded(|| shared.manager.close(conn, shared.settings.close_timeout));
                return failed(shared, permit, error);
            }
            Err(panic) => {
                shielded(|| shared.manager.close(conn, shared.settings.close_timeout));
                return failed_with(shared, permit, panic);
            }
        }
    }
    let conn = Box::new(Conn::new(Link { shared: Arc::clone(shared), id, born: begun }, conn, acquired));
    start(shared, permit, conn, &opening, begun)
}

/// The second half of an open: the connection is there, and shown around.
fn start<M: Manage>(
    shared: &Arc<Shared<M>>,
    permit: Permit<M>,
    mut conn: Box<Conn<M>>,
    opening: &Opening,
    begun: Moment,
) {
    if shared.starting.load(Ordering::Acquire) {
        let record = |level, text| shared.notice(level, || text);
        let start = Start::new(&shared.settings, &record);
        let verdict = catch(|| shared.manager.started(conn.get_mut(), &start));
        if let Err(cause) = verdict.unwrap_or_else(|panic| Err(panic.into())) {
            shared.set_cause(cause);
            permit.report_failure(true);
            return close(shared, permit, *conn, CloseReason::Discarded);
        }
        shared.starting.store(false, Ordering::Release);
    }
    opening.set_server_id(catch(|| shared.manager.server_id(conn.get())).ok().flatten());
    let (id, took) = (permit.id(), shared.clock.precise().since(begun));
    if let Some(events) = &shared.hooks.events {
        shielded(|| events.handle_acquire(AcquireEvent { id, duration: took }));
    }
    match permit.settle(|l, now, token| l.opened(now, token, conn)) {
        Ok(false) => {
            let life = shared.settings.max_lifetime.map_or(Short(took).to_string(), |life| Short(life).to_string());
            shared.set_cause(Cause::message(format!(
                "connected in {}, when its life of at most {life} was over or about to be",
                Short(took)
            )));
        }
        Ok(true) => {
            shared.notice(Level::Debug, || {
                let server = opening.server_id().map(|id| format!(" (server id {id})")).unwrap_or_default();
                format!("opened #{id}{server} in {}", Short(took))
            });
        }
        Err((permit, conn)) => close(shared, permit, *conn, CloseReason::Abandoned),
    }
}

/// An open failed with the manager's own error.
fn failed<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, error: M::Error) {
    let cause = explain(shared, &error);
    report(shared, &permit, cause);
    handle(shared, error);
    gone(shared, permit);
}

/// An open failed without an error of the manager's.
fn failed_with<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, panic: Panic) {
    report(shared, &permit, panic.into());
    gone(shared, permit);
}

fn report<M: Manage>(shared: &Arc<Shared<M>>, permit: &Permit<M>, cause: Cause) {
    let (id, permanent) = (permit.id(), cause.is_permanent());
    shared.notice(Level::Warn, || {
        format!("cannot open #{id}: {cause}{}", if permanent { " (will not be tried again soon)" } else { "" })
    });
    shared.set_cause(cause);
    permit.report_failure(permanent);
}

/// Validates, or resets what `reset` had last.
fn check<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, mut conn: Box<Conn<M>>, reset: Option<Option<Caller>>) {
    let Some(permit) = permit.begin() else { return };
    let begun = shared.clock.precise();
    let result = if let Some(caller) = reset {
        let result = catch(|| shared.manager.reset(conn.get_mut(), shared.settings.close_timeout));
        if let Ok(Some(remark)) = catch(|| shared.manager.remark(conn.get_mut())) {
            let remark = brief(remark, CAUSE);
            shared.notice(Level::Warn, || format!("#{}, checked out{}, {remark}", permit.id(), by(caller)));
        }
        match (&shared.hooks.customizer, &result) {
            (Some(customizer), Ok(Ok(()))) if shared.manager.undoes_on_acquire() => {
                catch(|| customizer.on_acquire(conn.get_mut()))
            }
            _ => result,
        }
    } else {
        catch(|| shared.manager.validate(conn.get_mut(), shared.settings.validation_timeout))
    };
    let reason = match (&result, reset.is_some()) {
        (Err(_), _) => CloseReason::Panicked,
        (Ok(Err(_)), true) => CloseReason::ResetFailed,
        (Ok(Err(_)), false) => CloseReason::Invalid,
        (Ok(Ok(())), _) => {
            return match permit.settle(|l, now, token| l.checked(now, begun, token, conn)) {
                Ok(()) => {}
                Err((permit, conn)) => close(shared, permit, *conn, CloseReason::Abandoned),
            };
        }
    };
    permit.report_check(reason);
    refused(shared, permit.id(), reason, result);
    close(shared, permit, *conn, reason);
}

/// Says that a validation or reset has failed, to the log and the user's handler.
pub(crate) fn refused<M: Manage>(
    shared: &Arc<Shared<M>>,
    id: u64,
    reason: CloseReason,
    result: Result<Result<(), M::Error>, Panic>,
) {
    let log = |cause: Cause| shared.notice(Level::Warn, || format!("#{id} {reason}: {cause}"));
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            log(explain(shared, &error));
            handle(shared, error);
        }
        Err(panic) => log(panic.into()),
    }
}

/// Closes a connection and frees its permit.
fn close<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, conn: Conn<M>, reason: CloseReason) {
    permit.begin_close();
    let (id, age) = (permit.id(), shared.clock.precise().since(conn.link().born));
    if let Some(events) = &shared.hooks.events {
        shielded(|| events.handle_release(ReleaseEvent { id, age, reason }));
    }
    let (conn, extensions, acquired) = conn.into_parts();
    match &shared.hooks.customizer {
        Some(customizer) if acquired => shielded(|| customizer.on_release(conn)),
        _ => shielded(|| shared.manager.close(conn, shared.settings.close_timeout)),
    }
    shielded(|| drop(extensions));
    shared.notice(Level::Debug, || format!("closed #{id}: {reason}, age {}", Short(age)));
    gone(shared, permit);
}

fn gone<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>) {
    let opening = shared.openings.lock().remove(&permit.id());
    shielded(|| drop(opening));
    drop(permit);
}

// -------------------------------------------------------------------------------------------------- user's code

fn explain<M: Manage>(shared: &Shared<M>, error: &M::Error) -> Cause {
    catch(|| shared.manager.explain(error)).unwrap_or_else(Cause::from)
}

fn handle<M: Manage>(shared: &Shared<M>, error: M::Error) {
    match &shared.hooks.errors {
        Some(handler) => shielded(|| handler.handle_error(error)),
        None => shielded(|| drop(error)),
    }
}

// -------------------------------------------------------------------------------------------------- slots

type Late<M> = (Permit<M>, Box<Conn<M>>);

impl<M: Manage> Permit<M> {
    pub(crate) fn new(shared: Arc<Shared<M>>, token: Token) -> Self {
        Permit { shared, token: Some(token) }
    }

    fn id(&self) -> u64 {
        self.token.as_ref().map_or(0, Token::id)
    }

    /// The job starts: its limit counts from now. `None`: nobody wants it any longer.
    fn begin(mut self) -> Option<Self> {
        let token = self.token.take()?;
        let shared = Arc::clone(&self.shared);
        let (now, chance) = (shared.clock.precise(), shared.chance());
        let token = shared.with(|l| l.begin(now, token, chance))?;
        Some(Permit::new(shared, token))
    }

    /// What follows is the close: it has a limit of its own, if the job was not written off before.
    fn begin_close(&self) {
        if let Some(token) = &self.token {
            let now = self.shared.clock.precise();
            self.shared.with(|l| l.begin_close(now, token));
        }
    }

    /// Hands permit and connection to the ledger; gets them back if it comes too late.
    fn settle<R: Default>(
        mut self,
        hand_over: impl FnOnce(&mut crate::runtime::shared::Book<M>, Moment, Token) -> Result<R, (Token, Box<Conn<M>>)>,
    ) -> Result<R, Late<M>> {
        let Some(token) = self.token.take() else { return Ok(R::default()) };
        let shared = Arc::clone(&self.shared);
        let now = shared.clock.precise();
        shared.with(|l| hand_over(l, now, token)).map_err(|(token, conn)| (Permit::new(shared, token), conn))
    }

    fn report_failure(&self, permanent: bool) {
        if let Some(token) = &self.token {
            let (now, chance) = (self.shared.clock.precise(), self.shared.chance());
            self.shared.with(|l| l.open_failed(now, token, permanent, chance));
        }
    }

    pub(crate) fn report_check(&self, reason: CloseReason) {
        if let Some(token) = &self.token {
            let now = self.shared.clock.precise();
            self.shared.with(|l| l.check_failed(now, token, reason));
        }
    }

    /// An open that could not even begin.
    pub(crate) fn fail(self, permanent: bool) {
        self.report_failure(permanent);
    }
}

impl<M: Manage> Drop for Permit<M> {
    fn drop(&mut self) {
        let Some(token) = self.token.take() else { return };
        let now = self.shared.clock.precise();
        self.shared.with(|l| l.free(now, token));
    }
}
