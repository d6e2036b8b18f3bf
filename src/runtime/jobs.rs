//! The jobs that the executor runs: everything that may block, panic, or run a user's code.
//!
//! Each job that has a slot has it as a [`Permit`]. The job reports its outcome with the permit. Whatever happens, a
//! panic too, the drop of the permit frees the slot.

use crate::error::Cause;
use crate::event::{AcquireEvent, ReleaseEvent};
use crate::leaf::in_hand;
use crate::leaf::shield::{Panic, catch, drop_payload, shielded};
use crate::leaf::sync::atomic::Ordering;
use crate::leaf::text::{CAUSE, Short, brief};
use crate::ledger::{Caller, OpenError, Reach, SlotJob};
use crate::manage::{Manage, Opening, Start};
use crate::runtime::conn::Conn;
use crate::runtime::executor::{Executor, Host, Task};
use crate::runtime::job::Job;
use crate::runtime::permit::Permit;
use crate::runtime::shared::{PoolConn, Shared, by};
use crate::stats::CloseReason;
use log::Level;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

impl<M: Manage> Host for Shared<M> {
    type Job = Job<Box<PoolConn<M>>>;

    fn executor(&self) -> &Executor<Self::Job> {
        &self.executor
    }

    fn run(self: &Arc<Self>, job: Self::Job) {
        let _in_hand = in_hand::on_the_executor(self.address());
        // A panic of the user's code was caught where that code was called, so this one is a defect.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(self, job))) {
            self.tell_defect("a job", &*panic);
            drop_payload(panic);
        }
    }

    fn run_on_caller(self: &Arc<Self>, job: Self::Job) {
        run(self, job);
    }

    fn left(&self) {
        self.changed.notify();
    }
}

fn run<M: Manage>(shared: &Arc<Shared<M>>, job: Job<Box<PoolConn<M>>>) {
    let _in_hand = job.slot().map(|id| in_hand::with(shared.address(), id));
    let permit = |token| Permit::new(Arc::clone(shared), token);
    match job {
        Job::Slot(SlotJob::Open(token)) => open(shared, permit(token)),
        Job::Slot(SlotJob::Check(token, conn)) => check(shared, permit(token), conn, None),
        Job::Slot(SlotJob::Reset(token, conn, caller)) => check(shared, permit(token), conn, Some(caller)),
        Job::Slot(SlotJob::Close(token, conn, reason)) => close(shared, permit(token), *conn, reason),
        Job::Abort(opening, cancel) => {
            if cancel {
                shielded(|| opening.cancel());
            }
            shielded(|| opening.abort());
            shielded(|| drop(opening));
        }
        Job::Drop(cause) => shielded(|| drop(cause)),
        Job::Record(level, text) => shielded(|| log::log!(target: "millpond", level, "{text}")),
    }
}

// -------------------------------------------------------------------------------------------------- open

fn open<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>) {
    let Some(permit) = permit.begin() else { return };
    let (id, limit) = (permit.id(), shared.settings.open_timeout);
    let begun = shared.time.precise();
    let opening = Arc::new(Opening::new(Arc::clone(&shared.name), limit));
    shared.openings.insert(id, Arc::clone(&opening));
    let mut conn = match catch(|| shared.user.manager.open(&opening)) {
        Ok(Ok(conn)) => conn,
        Ok(Err(error)) => return open_failed(shared, permit, error),
        Err(panic) => return open_panicked(shared, permit, panic),
    };
    let mut acquired = false;
    if let Some(customizer) = &shared.user.hooks.customizer {
        match catch(|| customizer.on_acquire(&mut conn)) {
            Ok(Ok(())) => acquired = true,
            Ok(Err(error)) => {
                shielded(|| shared.user.manager.close(conn, shared.settings.close_timeout));
                return open_failed(shared, permit, error);
            }
            Err(panic) => {
                shielded(|| shared.user.manager.close(conn, shared.settings.close_timeout));
                return open_panicked(shared, permit, panic);
            }
        }
    }
    let conn = Box::new(Conn::new(Arc::clone(shared), id, begun, conn, acquired));
    opened(shared, permit, conn, &opening)
}

/// The second half of an open: the new connection is shown to the manager and the event handler, and goes to the
/// ledger.
fn opened<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, mut conn: Box<PoolConn<M>>, opening: &Opening) {
    if shared.life.is_starting.load(Ordering::Acquire) {
        let record = |level, text| shared.record(level, || text);
        let start = Start::new(&shared.settings, &record);
        let verdict = catch(|| shared.user.manager.started(&mut conn.inner, &start));
        if let Err(cause) = verdict.unwrap_or_else(|panic| Err(panic.into())) {
            let error = OpenError { reach: Reach::Refusal, ..cause.open_error() };
            shared.set_cause(cause);
            permit.report_open_failed(error);
            return close(shared, permit, *conn, CloseReason::Discarded);
        }
        shared.life.is_starting.store(false, Ordering::Release);
    }
    opening.set_server_id(catch(|| shared.user.manager.server_id(&conn.inner)).ok().flatten());
    let (id, took) = (permit.id(), shared.time.precise().since(conn.born));
    if let Some(events) = &shared.user.hooks.events {
        shielded(|| events.handle_acquire(AcquireEvent { id, duration: took }));
    }
    match permit.report_success(|l, now, token| l.opened(now, token, conn)) {
        // The connection's life was over when it arrived. The ledger says so if it is asked why the open failed.
        Ok(false) => {}
        Ok(true) => {
            shared.record(Level::Debug, || {
                let server = opening.server_id().map(|id| format!(" (server id {id})")).unwrap_or_default();
                format!("opened #{id}{server} in {}", Short(took))
            });
        }
        Err((permit, conn)) => close(shared, permit, *conn, CloseReason::Abandoned),
    }
}

/// An open failed with the manager's own error.
fn open_failed<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, error: M::Error) {
    let cause = shared.user.explain(&error);
    report(shared, &permit, cause);
    shared.user.handle(error);
    gone(shared, permit);
}

/// An open failed without an error of the manager's.
fn open_panicked<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, panic: Panic) {
    report(shared, &permit, panic.into());
    gone(shared, permit);
}

fn report<M: Manage>(shared: &Arc<Shared<M>>, permit: &Permit<M>, cause: Cause) {
    let (id, error) = (permit.id(), cause.open_error());
    shared.record(Level::Warn, || {
        let note = if cause.is_permanent() { " (will not be tried again soon)" } else { "" };
        format!("cannot open #{id}: {cause}{note}")
    });
    shared.set_cause(cause);
    permit.report_open_failed(error);
}

// -------------------------------------------------------------------------------------------------- check and close

/// Validates a connection, or resets it. `reset`: it is a reset, and this was the last caller, if it is known.
fn check<M: Manage>(
    shared: &Arc<Shared<M>>,
    permit: Permit<M>,
    mut conn: Box<PoolConn<M>>,
    reset: Option<Option<Caller>>,
) {
    let Some(permit) = permit.begin() else { return };
    let begun = shared.time.precise();
    let is_reset = reset.is_some();
    let result = if let Some(caller) = reset {
        let result = catch(|| shared.user.manager.reset(&mut conn.inner, shared.settings.close_timeout));
        if let Ok(Some(remark)) = catch(|| shared.user.manager.remark(&mut conn.inner)) {
            let remark = brief(remark, CAUSE);
            shared.record(Level::Warn, || format!("#{}, checked out{}, {remark}", permit.id(), by(caller)));
        }
        match (&shared.user.hooks.customizer, &result) {
            (Some(customizer), Ok(Ok(()))) if shared.user.manager.undoes_on_acquire() => {
                catch(|| customizer.on_acquire(&mut conn.inner))
            }
            _ => result,
        }
    } else {
        catch(|| shared.user.manager.validate(&mut conn.inner, shared.settings.validation_timeout))
    };
    let reason = match &result {
        Ok(Ok(())) => {
            return match permit.report_success(|l, now, token| l.checked(now, begun, token, conn)) {
                Ok(()) => {}
                Err((permit, conn)) => close(shared, permit, *conn, CloseReason::Abandoned),
            };
        }
        Ok(Err(_)) if is_reset => CloseReason::ResetFailed,
        Ok(Err(_)) => CloseReason::Invalid,
        Err(_) => CloseReason::Panicked,
    };
    permit.report_check_failed(reason);
    tell_check_failed(shared, permit.id(), reason, result);
    close(shared, permit, *conn, reason);
}

/// Tells the log and the user's handler that a validation or reset has failed.
pub(crate) fn tell_check_failed<M: Manage>(
    shared: &Arc<Shared<M>>,
    id: u64,
    reason: CloseReason,
    result: Result<Result<(), M::Error>, Panic>,
) {
    let log = |cause: Cause| shared.record(Level::Warn, || format!("#{id} {reason}: {cause}"));
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            log(shared.user.explain(&error));
            shared.user.handle(error);
        }
        Err(panic) => log(panic.into()),
    }
}

/// Closes a connection and frees its slot.
fn close<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>, conn: PoolConn<M>, reason: CloseReason) {
    permit.begin_close();
    let (id, age) = (permit.id(), shared.time.precise().since(conn.born));
    if let Some(events) = &shared.user.hooks.events {
        shielded(|| events.handle_release(ReleaseEvent { id, age, reason }));
    }
    let Conn { inner, extensions, acquired, .. } = conn;
    match &shared.user.hooks.customizer {
        Some(customizer) if acquired => shielded(|| customizer.on_release(inner)),
        _ => shielded(|| shared.user.manager.close(inner, shared.settings.close_timeout)),
    }
    shielded(|| drop(extensions));
    shared.record(Level::Debug, || format!("closed #{id}: {reason}, age {}", Short(age)));
    gone(shared, permit);
}

/// The connection is closed, or none came: frees the slot.
fn gone<M: Manage>(shared: &Arc<Shared<M>>, permit: Permit<M>) {
    let opening = shared.openings.remove(permit.id());
    shielded(|| drop(opening));
    drop(permit);
}
