//! [`Fake`]: a manager whose every call can be made to fail, block or panic, and whose connections are counted from
//! outside of the pool.
//!
//! ```ignore
//! let fake = Fake::new();                          // keep it: its drop releases whatever it blocks
//! let pool = Pool::builder().build(fake.direct())?; // or `fake.r2d2()`, which the pool knows less of
//! fake.set(Call::Validate, Act::Block);            // from now on
//! fake.next(Call::Open, [Act::Fail, Act::Panic]);  // the next two, before what is set
//! fake.wait_inside(Call::Validate, 1);             // somebody hangs in it
//! fake.release(Call::Validate);                    // goes on, and blocks no more
//! assert_eq!((fake.alive(), fake.most_alive()), (1, 1));
//! ```
//!
//! Make the `Fake` before the pool, so that it is dropped after it. Panics made here print nothing.

#![allow(dead_code, unreachable_pub, reason = "compiled into each test on its own, none of which uses all of it")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millpond::event::{AcquireEvent, CheckinEvent, CheckoutEvent, HandleEvent, ReleaseEvent, TimeoutEvent};
use millpond::{
    Cause, CustomizeConnection, HandleError, Manage, ManageConnection, Opening, Pool, PooledConnection, Returned, Start,
};
use parking_lot::{Condvar, Mutex};

/// Every call that a pool makes to what is not its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `open`, r2d2's `connect`.
    Open,
    /// `validate`, r2d2's `is_valid`.
    Validate,
    /// `peek`, where [`Fake::peeks`] says that there is something to see.
    Peek,
    /// `returned`, r2d2's `has_broken`. `Fail`: the connection is broken.
    Returned,
    Reset,
    /// `Manage::close`; the connection is dropped after it. Not called with r2d2's kind, nor with a customizer.
    Close,
    /// The drop of a connection.
    Drop,
    Explain,
    Started,
    ServerId,
    Abort,
    Cancel,
    /// Of `CustomizeConnection`.
    OnAcquire,
    OnRelease,
    /// Of `HandleError`.
    HandleError,
    /// Of `HandleEvent`.
    HandleAcquire,
    HandleRelease,
    HandleCheckout,
    HandleTimeout,
    HandleCheckin,
}

/// What a call does.
#[derive(Clone)]
pub enum Act {
    Succeed,
    /// An error that may go away. Where a call cannot fail, this is `Succeed`.
    Fail,
    /// An error that will not go away (r2d2's kind cannot tell).
    Refuse,
    /// Waits until [`Fake::release`] or the `Fake`'s drop, then succeeds. With [`Fake::abortable`], until it is
    /// aborted as well, and then fails.
    Block,
    /// Takes so long, then succeeds.
    Last(Duration),
    /// Takes so long, then fails.
    FailAfter(Duration),
    Panic,
    /// Does this, then succeeds.
    Run(Arc<dyn Fn() + Send + Sync>),
}

/// [`Act::Run`].
pub fn run(code: impl Fn() + Send + Sync + 'static) -> Act {
    Act::Run(Arc::new(code))
}

/// The text that every [`Act::Panic`] panics with.
pub const PANIC: &str = "a panic on purpose";

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// So many connections, all in use at the same time.
pub fn take<M: Manage>(pool: &Pool<M>, n: usize) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get_timeout(PATIENCE).unwrap()).collect()
}

/// Closes a pool whose faults are over: everything ends.
#[track_caller]
pub fn ends_well<M: Manage>(pool: Pool<M>, fake: &Fake) {
    let report = pool.close(PATIENCE);
    assert!(report.is_complete(), "{report}");
    assert_eq!(fake.alive(), 0);
}

/// A test's hold of a faulty manager and its connections. Dropped, it opens every gate for good, so that no thread
/// stays behind.
pub struct Fake(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    set: HashMap<Call, Act>,
    next: HashMap<Call, VecDeque<Act>>,
    calls: HashMap<Call, u64>,
    inside: HashMap<Call, usize>,
    /// How often each call was released: a blocked one goes on when the number changes.
    releases: HashMap<Call, u64>,
    over: bool,
    abortable: bool,
    aborted: HashSet<u64>,
    keeps_limits: bool,
    peeks: bool,
    verdict: Option<Returned>,
    attempts: u64,
    opened: u64,
    dropped: u64,
    most_alive: u64,
}

impl State {
    fn alive(&self) -> u64 {
        self.opened - self.dropped
    }
}

impl Fake {
    /// All calls succeed.
    #[allow(clippy::new_without_default, reason = "it is made by tests, by name")]
    pub fn new() -> Fake {
        Fake(Arc::new(Inner { state: Mutex::default(), changed: Condvar::new() }))
    }

    // ---------------------------------------------------------------------------------------------- what a pool needs

    /// A manager of r2d2's kind. Any number of pools may have one: all calls and connections are counted together.
    pub fn r2d2(&self) -> R2d2Fake {
        R2d2Fake(Arc::clone(&self.0))
    }

    /// A direct implementation of `Manage`.
    pub fn direct(&self) -> DirectFake {
        DirectFake(Arc::clone(&self.0))
    }

    pub fn customizer(&self) -> Box<dyn CustomizeConnection<FakeConn, FakeError>> {
        Box::new(Hooks(Arc::clone(&self.0)))
    }

    pub fn error_handler(&self) -> Box<dyn HandleError<FakeError>> {
        Box::new(Hooks(Arc::clone(&self.0)))
    }

    pub fn event_handler(&self) -> Box<dyn HandleEvent> {
        Box::new(Hooks(Arc::clone(&self.0)))
    }

    // ---------------------------------------------------------------------------------------------- the script

    /// What this call does from now on.
    pub fn set(&self, call: Call, act: Act) {
        self.0.state.lock().set.insert(call, act);
    }

    /// What the next of these calls do, one after the other, before what is [`set`](Fake::set).
    pub fn next(&self, call: Call, acts: impl IntoIterator<Item = Act>) {
        self.0.state.lock().next.entry(call).or_default().extend(acts);
    }

    /// Lets go on the threads that block in this call; from now on, and in what was scripted for it, it succeeds.
    pub fn release(&self, call: Call) {
        let mut state = self.0.state.lock();
        *state.releases.entry(call).or_default() += 1;
        state.set.remove(&call);
        state.next.remove(&call);
        self.0.changed.notify_all();
    }

    /// What a direct manager's `keeps_limits` says. A pool asks once, when it is built.
    pub fn keeps_limits(&self, yes: bool) {
        self.0.state.lock().keeps_limits = yes;
    }

    /// Whether a direct manager's `peek` sees anything.
    pub fn peeks(&self, yes: bool) {
        self.0.state.lock().peeks = yes;
    }

    /// Whether a direct manager's `open` registers `on_abort` and `on_cancel`, the first of which ends [`Act::Block`]
    /// in any call to that connection (but not in hooks).
    pub fn abortable(&self, yes: bool) {
        self.0.state.lock().abortable = yes;
    }

    /// What a direct manager's `returned` says when it succeeds; [`Returned::Keep`] if not told.
    pub fn verdict(&self, verdict: Returned) {
        self.0.state.lock().verdict = Some(verdict);
    }

    /// A life in which every call is made, whatever becomes of it, on a pool of three with a short `max_idle` and
    /// [`Validate::Always`](millpond::Validate): with waiting, timeouts, a failed open, a reset, discards, a recycle.
    pub fn live<M: Manage<Connection = FakeConn, Error = FakeError>>(&self, pool: &Pool<M>) {
        let get = || pool.get_timeout(Duration::from_millis(20)).ok();
        for _ in 0..3 {
            let all = [get(), get(), get(), get()];
            drop(all);
        }
        self.verdict(Returned::Reset);
        // On a busy machine there may be none in time, and without one there is no reset.
        drop((0..10).find_map(|_| get()));
        self.verdict(Returned::Keep);
        drop(pool.try_get());
        self.next(Call::Open, [Act::Fail]);
        let checked_out = [get(), get(), get()];
        checked_out.into_iter().flatten().for_each(PooledConnection::discard);
        let checked_out = [get(), get()];
        pool.recycle();
        drop(checked_out);
        drop(get());
        // Until what is idle has gone.
        let deadline = Instant::now() + PATIENCE;
        while pool.state().idle_connections > 0 {
            assert!(Instant::now() < deadline, "nothing is evicted: {}", pool.connections());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    // ---------------------------------------------------------------------------------------------- what is seen

    /// Connections that exist: their `open` got as far as to make them, and their drop has not ended.
    pub fn alive(&self) -> u64 {
        self.0.state.lock().alive()
    }

    /// The most connections that ever existed at a time.
    pub fn most_alive(&self) -> u64 {
        self.0.state.lock().most_alive
    }

    /// Connections that were ever made.
    pub fn opened(&self) -> u64 {
        self.0.state.lock().opened
    }

    /// Connections whose drop has ended.
    pub fn dropped(&self) -> u64 {
        self.0.state.lock().dropped
    }

    /// How often this call has begun.
    pub fn calls(&self, call: Call) -> u64 {
        self.0.state.lock().calls.get(&call).copied().unwrap_or(0)
    }

    /// How many threads are in this call.
    pub fn inside(&self, call: Call) -> usize {
        self.0.state.lock().inside.get(&call).copied().unwrap_or(0)
    }

    /// Waits until `n` threads are in this call.
    #[track_caller]
    pub fn wait_inside(&self, call: Call, n: usize) {
        self.wait(|s| s.inside.get(&call).copied().unwrap_or(0) == n, || format!("{n} in {call:?}"));
    }

    /// Waits until this call has begun `n` times, or more.
    #[track_caller]
    pub fn wait_calls(&self, call: Call, n: u64) {
        self.wait(|s| s.calls.get(&call).copied().unwrap_or(0) >= n, || format!("{n} calls of {call:?}"));
    }

    /// Waits until `n` connections exist.
    #[track_caller]
    pub fn wait_alive(&self, n: u64) {
        self.wait(|s| s.alive() == n, || format!("{n} connections alive"));
    }

    #[track_caller]
    fn wait(&self, mut fact: impl FnMut(&State) -> bool, what: impl FnOnce() -> String) {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.state.lock();
        while !fact(&state) {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() && !fact(&state) {
                let (inside, calls, alive) = (&state.inside, &state.calls, state.alive());
                panic!("waited in vain for {}: inside {inside:?}, calls {calls:?}, alive {alive}", what());
            }
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.0.state.lock().over = true;
        self.0.changed.notify_all();
    }
}

impl Inner {
    /// Does what the script says of this call, to connection `id`; 0: to none.
    fn act(&self, call: Call, id: u64) -> Result<(), FakeError> {
        // Before the lock, so that it is dropped after it.
        let mut inside = Inside { fake: None, call };
        let mut state = self.state.lock();
        *state.calls.entry(call).or_default() += 1;
        *state.inside.entry(call).or_default() += 1;
        inside.fake = Some(self);
        self.changed.notify_all();
        let next = state.next.get_mut(&call).and_then(VecDeque::pop_front);
        let act = next.or_else(|| state.set.get(&call).cloned()).unwrap_or(Act::Succeed);
        if let Act::Block = act {
            let release = state.releases.get(&call).copied();
            while !state.over && state.releases.get(&call).copied() == release {
                if state.aborted.contains(&id) {
                    return Err(FakeError::new(call, false));
                }
                self.changed.wait(&mut state);
            }
        }
        drop(state);
        match act {
            Act::Succeed | Act::Block => Ok(()),
            Act::Fail => Err(FakeError::new(call, false)),
            Act::Refuse => Err(FakeError::new(call, true)),
            Act::Last(time) => {
                std::thread::sleep(time);
                Ok(())
            }
            Act::FailAfter(time) => {
                std::thread::sleep(time);
                Err(FakeError::new(call, false))
            }
            // Without the panic hook: no output.
            Act::Panic => std::panic::resume_unwind(Box::new(PANIC)),
            Act::Run(code) => {
                code();
                Ok(())
            }
        }
    }

    fn open(self: &Arc<Self>, opening: Option<&Opening>) -> Result<FakeConn, FakeError> {
        let id = {
            let mut state = self.state.lock();
            state.attempts += 1;
            state.attempts
        };
        if let Some(opening) = opening.filter(|_| self.state.lock().abortable) {
            let (abort, cancel) = (Arc::clone(self), Arc::clone(self));
            opening.on_abort(move || {
                abort.state.lock().aborted.insert(id);
                abort.changed.notify_all();
                let _ = abort.act(Call::Abort, 0);
            });
            opening.on_cancel(move || {
                let _ = cancel.act(Call::Cancel, 0);
            });
        }
        self.act(Call::Open, id)?;
        let mut state = self.state.lock();
        state.opened += 1;
        state.most_alive = state.most_alive.max(state.alive());
        self.changed.notify_all();
        Ok(FakeConn { id, fake: Arc::clone(self) })
    }
}

/// A thread in a call.
struct Inside<'a> {
    fake: Option<&'a Inner>,
    call: Call,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(fake) = self.fake {
            if let Some(n) = fake.state.lock().inside.get_mut(&self.call) {
                *n -= 1;
            }
            fake.changed.notify_all();
        }
    }
}

/// A connection to nothing.
pub struct FakeConn {
    /// Which attempt made it, counted from 1 for each [`Fake`].
    pub id: u64,
    fake: Arc<Inner>,
}

impl fmt::Debug for FakeConn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeConn({})", self.id)
    }
}

impl Drop for FakeConn {
    fn drop(&mut self) {
        struct Gone<'a>(&'a Inner);
        impl Drop for Gone<'_> {
            fn drop(&mut self) {
                self.0.state.lock().dropped += 1;
                self.0.changed.notify_all();
            }
        }
        let _gone = Gone(&self.fake);
        let _ = self.fake.act(Call::Drop, self.id);
    }
}

/// An error that stays on its thread, as a manager's may.
#[derive(Debug)]
pub struct FakeError {
    call: Call,
    permanent: bool,
    _stays: PhantomData<*const ()>,
}

impl FakeError {
    fn new(call: Call, permanent: bool) -> FakeError {
        FakeError { call, permanent, _stays: PhantomData }
    }
}

impl fmt::Display for FakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.call, if self.permanent { "refused on purpose" } else { "failed on purpose" })
    }
}

impl std::error::Error for FakeError {}

/// r2d2's view of a [`Fake`].
pub struct R2d2Fake(Arc<Inner>);

impl ManageConnection for R2d2Fake {
    type Connection = FakeConn;
    type Error = FakeError;

    fn connect(&self) -> Result<FakeConn, FakeError> {
        self.0.open(None)
    }

    fn is_valid(&self, c: &mut FakeConn) -> Result<(), FakeError> {
        self.0.act(Call::Validate, c.id)
    }

    fn has_broken(&self, c: &mut FakeConn) -> bool {
        self.0.act(Call::Returned, c.id).is_err()
    }
}

/// The whole of what a pool can be told by a [`Fake`].
pub struct DirectFake(Arc<Inner>);

impl Manage for DirectFake {
    type Connection = FakeConn;
    type Error = FakeError;

    fn open(&self, opening: &Opening) -> Result<FakeConn, FakeError> {
        self.0.open(Some(opening))
    }

    fn validate(&self, c: &mut FakeConn, _: Duration) -> Result<(), FakeError> {
        self.0.act(Call::Validate, c.id)
    }

    fn keeps_limits(&self) -> bool {
        self.0.state.lock().keeps_limits
    }

    fn peek(&self, c: &mut FakeConn) -> Option<Result<(), FakeError>> {
        let peeks = self.0.state.lock().peeks;
        peeks.then(|| self.0.act(Call::Peek, c.id))
    }

    fn returned(&self, c: &mut FakeConn) -> Returned {
        match self.0.act(Call::Returned, c.id) {
            Ok(()) => self.0.state.lock().verdict.unwrap_or(Returned::Keep),
            Err(_) => Returned::Broken,
        }
    }

    fn reset(&self, c: &mut FakeConn, _: Duration) -> Result<(), FakeError> {
        self.0.act(Call::Reset, c.id)
    }

    fn close(&self, c: FakeConn, _: Duration) {
        let _ = self.0.act(Call::Close, c.id);
    }

    fn started(&self, c: &mut FakeConn, _: &Start<'_>) -> Result<(), Cause> {
        self.0.act(Call::Started, c.id).map_err(|e| Cause::text(&e))
    }

    fn server_id(&self, c: &FakeConn) -> Option<u64> {
        self.0.act(Call::ServerId, c.id).ok().map(|()| c.id)
    }

    fn explain(&self, e: &FakeError) -> Cause {
        let _ = self.0.act(Call::Explain, 0);
        let cause = Cause::text(e);
        if e.permanent { cause.permanent() } else { cause }
    }
}

/// The hooks and handlers of a [`Fake`].
struct Hooks(Arc<Inner>);

impl Hooks {
    fn tell(&self, call: Call) {
        let _ = self.0.act(call, 0);
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooks")
    }
}

impl CustomizeConnection<FakeConn, FakeError> for Hooks {
    fn on_acquire(&self, _: &mut FakeConn) -> Result<(), FakeError> {
        self.0.act(Call::OnAcquire, 0)
    }

    fn on_release(&self, _: FakeConn) {
        self.tell(Call::OnRelease);
    }
}

impl HandleError<FakeError> for Hooks {
    fn handle_error(&self, _: FakeError) {
        self.tell(Call::HandleError);
    }
}

impl HandleEvent for Hooks {
    fn handle_acquire(&self, _: AcquireEvent) {
        self.tell(Call::HandleAcquire);
    }

    fn handle_release(&self, _: ReleaseEvent) {
        self.tell(Call::HandleRelease);
    }

    fn handle_checkout(&self, _: CheckoutEvent) {
        self.tell(Call::HandleCheckout);
    }

    fn handle_timeout(&self, _: TimeoutEvent) {
        self.tell(Call::HandleTimeout);
    }

    fn handle_checkin(&self, _: CheckinEvent) {
        self.tell(Call::HandleCheckin);
    }
}
