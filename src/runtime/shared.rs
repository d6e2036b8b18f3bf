//! What the parts of one pool share, and the one way to use its lock: [`Shared::with`].
//!
//! Under the lock run methods of the [`Ledger`] and nothing else. The thread that had the lock applies their effects:
//! it serves waiters before it releases the lock, and wakes threads and posts jobs after that.

use crate::error::Cause;
use crate::hooks::Hooks;
use crate::leaf::clock::Moment;
use crate::leaf::failures::ErrorType;
use crate::leaf::process::Home;
use crate::leaf::shield::{drop_payload, shielded};
use crate::leaf::sync::{self, Instant, Mutex, MutexGuard};
use crate::leaf::text::{Short, Shown};
use crate::leaf::time::PoolTime;
use crate::leaf::{defect, threads};
use crate::ledger::{Caller, Condition, Ledger, Order, Outcome, Slot, SlotJob, Token};
use crate::manage::Manage;
use crate::runtime::conn::Conn;
use crate::runtime::event_count::EventCount;
use crate::runtime::executor::{Executor, Host};
use crate::runtime::job::Job;
use crate::runtime::lifecycle::{Ended, Lifecycle};
use crate::runtime::openings::Openings;
use crate::runtime::reaper::{Next, Reaper, Timed};
use crate::runtime::user::User;
use crate::runtime::waiter::Waiter;
use crate::settings::Settings;
use crate::stats::{ConnectionInfo, ConnectionState, Counts};
use log::Level;
use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, Weak};

/// One of `M`'s connections, in a pool.
pub(crate) type PoolConn<M> = Conn<M, Arc<Shared<M>>>;

/// A thread that waits for one of `M`'s connections.
pub(crate) type PoolWaiter<M> = Waiter<Outcome<Box<PoolConn<M>>>>;

/// The ledger of a pool of `M`'s connections.
pub(crate) type PoolLedger<M> = Ledger<Box<PoolConn<M>>, Arc<PoolWaiter<M>>>;

/// What the parts of one pool share. Handles, connections in use and the pool's threads keep it alive.
pub(crate) struct Shared<M: Manage> {
    pub(crate) name: Arc<str>,
    pub(crate) settings: Settings,
    pub(crate) user: User<M>,
    pub(crate) time: PoolTime,
    pub(crate) core: Arc<Core<M>>,
    pub(crate) executor: Executor<Job<Box<PoolConn<M>>>>,
    pub(crate) reaper: Reaper,
    /// What `build` and `close` sleep on.
    pub(crate) changed: EventCount,
    pub(crate) openings: Openings,
    pub(crate) life: Lifecycle,
}

/// The lock and what it guards. It may outlive the pool: see [`kept`](crate::leaf::kept).
pub(crate) struct Core<M: Manage> {
    home: Home,
    ledger: Mutex<PoolLedger<M>>,
    pool: Weak<Shared<M>>,
}

/// How often a thread tries a lock that another has, before it looks at its process and sleeps. The lock is as a rule free
/// again after tens of nanoseconds, and both are system calls, which take longer.
const TRIES: u32 = 4;
/// How many pauses of the processor a thread makes before each try. A thread that tries again at once takes the memory of the
/// lock from the one that has it, and both then wait for memory most of the time (docs/performance.md, "Leaving the lock
/// alone").
const PAUSES: u32 = 40;
/// The same while there are waiters. Then a thread that comes late finds no connection, and must sleep.
const PAUSES_BESIDE_WAITERS: u32 = 1;

fn pauses(has_waiters: bool) -> u32 {
    if has_waiters { PAUSES_BESIDE_WAITERS } else { PAUSES }
}

// -------------------------------------------------------------------------------------------------- the lock

impl<M: Manage> Core<M> {
    /// A connection is returned. The owner of the pool that it carries moves into the ledger with it.
    #[inline]
    pub(crate) fn returned(
        &self,
        now: Moment,
        token: Token,
        conn: Box<PoolConn<M>>,
        condition: Condition,
        has_waiters: bool,
    ) {
        let Some(mut ledger) = self.lock_at_home(has_waiters) else {
            // This is a forked child, and the connection belongs to the parent: not even its drop may run here.
            return std::mem::forget((token, conn));
        };
        ledger.returned(now, token, conn, condition);
        if !ledger.effects.is_empty() {
            self.apply(ledger);
        }
    }

    /// The lock. `None`: this is a forked child, and the thread that has the lock is the parent's.
    #[inline]
    fn lock_at_home(&self, has_waiters: bool) -> Option<MutexGuard<'_, PoolLedger<M>>> {
        self.ledger.try_lock().or_else(|| self.lock_slowly(has_waiters))
    }

    #[cold]
    fn lock_slowly(&self, has_waiters: bool) -> Option<MutexGuard<'_, PoolLedger<M>>> {
        self.spin(has_waiters).or_else(|| if self.home.is_elsewhere() { None } else { Some(self.ledger.lock()) })
    }

    /// The lock, for a thread that is not in a forked child.
    #[inline]
    fn lock(&self, has_waiters: bool) -> MutexGuard<'_, PoolLedger<M>> {
        self.ledger.try_lock().or_else(|| self.spin(has_waiters)).unwrap_or_else(|| self.ledger.lock())
    }

    /// Tries the lock for a few microseconds.
    #[cold]
    fn spin(&self, has_waiters: bool) -> Option<MutexGuard<'_, PoolLedger<M>>> {
        for _ in 0..TRIES {
            for _ in 0..pauses(has_waiters) {
                std::hint::spin_loop();
            }
            if let Some(ledger) = self.ledger.try_lock() {
                return Some(ledger);
            }
        }
        None
    }

    #[cold]
    fn apply(&self, mut ledger: MutexGuard<'_, PoolLedger<M>>) {
        if let Some(waiter) = only_notified(&mut ledger) {
            drop(ledger);
            return waiter.notify();
        }
        // The connection, which keeps the pool alive, is in the ledger or its effects, and both are locked. So the pool
        // is still there.
        if let Some(pool) = self.pool.upgrade() {
            pool.apply(ledger);
        }
    }
}

/// The waiter that is to be notified, if the effects have nothing else. In a busy pool this is the usual case.
fn only_notified<M: Manage>(ledger: &mut PoolLedger<M>) -> Option<Arc<PoolWaiter<M>>> {
    let alone = ledger.effects.is_empty_but_for_notified() && ledger.effects.notified.len() == 1;
    // Popped, so that the list keeps its memory.
    if alone { ledger.effects.notified.pop() } else { None }
}

impl<M: Manage> Shared<M> {
    pub(crate) fn new(settings: Settings, hooks: Hooks<M>, manager: M) -> Arc<Self> {
        let time = PoolTime::new();
        Arc::new_cyclic(|pool| Shared {
            name: settings.name.as_str().into(),
            executor: Executor::new(settings.name.clone()),
            core: Arc::new(Core {
                home: time.home(),
                ledger: Mutex::new(Ledger::new(settings.clone(), time.resolution())),
                pool: Weak::clone(pool),
            }),
            reaper: Reaper::new(),
            changed: EventCount::new(),
            openings: Openings::default(),
            life: Lifecycle::default(),
            user: User::new(manager, hooks),
            time,
            settings,
        })
    }

    /// A number for this pool. No other pool has it as long as this one exists.
    #[inline]
    pub(crate) fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Asks the ledger, and applies the effects.
    #[inline]
    pub(crate) fn with<R>(self: &Arc<Self>, ask: impl FnOnce(&mut PoolLedger<M>) -> R) -> R {
        let mut ledger = self.lock();
        let answer = ask(&mut ledger);
        if !ledger.effects.is_empty() {
            self.apply(ledger);
        }
        answer
    }

    /// [`with`](Shared::with) for a thread that may be in a forked child. `None`: this is a child, and the lock is not
    /// free. (A free lock is taken: the thread asks [`seems_forked`](PoolTime::seems_forked) before.)
    #[inline]
    pub(crate) fn with_at_home<R>(self: &Arc<Self>, ask: impl FnOnce(&mut PoolLedger<M>) -> R) -> Option<R> {
        let mut ledger = self.core.lock_at_home(self.time.has_waiters())?;
        let answer = ask(&mut ledger);
        if !ledger.effects.is_empty() {
            self.apply(ledger);
        }
        Some(answer)
    }

    /// The lock itself, to look.
    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, PoolLedger<M>> {
        self.core.lock(self.time.has_waiters())
    }

    /// Applies the effects: serves waiters, releases the lock, wakes threads and posts jobs.
    #[cold]
    fn apply(self: &Arc<Self>, mut ledger: MutexGuard<'_, PoolLedger<M>>) {
        if let Some(waiter) = only_notified(&mut ledger) {
            drop(ledger);
            return waiter.notify();
        }
        let mut effects = ledger.effects.take();
        for (waiter, outcome) in effects.served.iter_mut() {
            // (The list is freed without the lock, so it keeps something in place of the outcome.)
            waiter.serve(std::mem::replace(outcome, Outcome::Closed));
        }
        self.note_waiting(&ledger);
        drop(ledger);
        effects.served.into_iter().for_each(|(waiter, _)| waiter.wake());
        effects.notified.into_iter().for_each(|waiter| waiter.notify());
        if effects.wake_reaper {
            Reaper::wake(self, || !self.is_forked());
        }
        if effects.changed {
            self.changed.notify();
        }
        let mut orders = effects.orders.into_iter().peekable();
        if orders.peek().is_none() {
            return;
        }
        if self.is_forked() {
            // This is a forked child, and the connections belong to the parent: not even their drop may run here.
            return orders.for_each(std::mem::forget);
        }
        // If one order panics, the others are carried out all the same.
        for order in orders {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.carry_out(order))) {
                self.tell_defect("an order", &*panic);
                drop_payload(panic);
            }
        }
    }

    /// Calls `look` after each change of the pool until it returns `Some`. `None`: the deadline came first.
    pub(crate) fn watch<R>(
        self: &Arc<Self>,
        deadline: Option<Instant>,
        mut look: impl FnMut() -> Option<R>,
    ) -> Option<R> {
        self.with(|l| l.watch_begins());
        let found = loop {
            // Read before the look, so that no change after it is missed.
            let seen = self.changed.count();
            let found = look();
            if found.is_some() || deadline.is_some_and(|at| Instant::now() >= at) {
                break found;
            }
            self.changed.wait(seen, deadline);
        };
        self.with(|l| l.watch_ends());
        found
    }

    /// Tells the clock the number of waiters, after the queue has changed.
    pub(crate) fn note_waiting(&self, ledger: &PoolLedger<M>) {
        self.time.set_waiting(ledger.counts().waiting);
    }

    /// A number between 0 and 1, at random.
    pub(crate) fn jitter(&self) -> f64 {
        sync::jitter()
    }

    /// Whether this process is a child of the one that built the pool, forked from it.
    pub(crate) fn is_forked(&self) -> bool {
        self.time.is_forked()
    }

    // ---------------------------------------------------------------------------------------------- orders

    fn carry_out(self: &Arc<Self>, order: Order<Box<PoolConn<M>>>) {
        match order {
            Order::Job(job) => self.post(Job::Slot(job)),
            Order::Slow { id } => {
                if !self.executor.stop_counting(self, id) {
                    self.with(|l| l.look_again());
                }
            }
            Order::Abandon { id, was, limit, cancel } => {
                let what = match was {
                    ConnectionState::Opening => "opening",
                    ConnectionState::Checking => "checking",
                    _ => "closing",
                };
                if !self.executor.abandon(self, id) {
                    self.with(|l| l.look_again());
                }
                self.abort(id, cancel);
                self.record(Level::Warn, || format!("abandoned {what} #{id}, which took longer than {}", Short(limit)));
            }
            Order::Recovered { after, attempts } => self.record(Level::Info, || {
                let attempts =
                    if attempts == 1 { "1 failed attempt".into() } else { format!("{attempts} failed attempts") };
                format!("connects again, after {} and {attempts}", Short(after))
            }),
            Order::Leak { id, caller, in_use_for } => self.record(Level::Warn, || {
                format!("#{id} has been checked out for {}{}: a leak?", Short(in_use_for), by(caller))
            }),
        }
    }

    pub(crate) fn post(self: &Arc<Self>, job: Job<Box<PoolConn<M>>>) {
        match self.executor.post(self, job) {
            Ok(true) => {}
            // The job is in the backlog, which the reaper runs after each look.
            Ok(false) => self.with(|l| l.look_again()),
            Err((error, Job::Slot(SlotJob::Open(token)))) => {
                let cause = Cause::message(format!("cannot start a thread to connect on: {error}"));
                let cause = cause.of_type(ErrorType::NO_THREAD);
                let failed = cause.open_error();
                self.set_cause(cause);
                let (now, jitter) = (self.time.precise(), self.jitter());
                self.with(|l| l.open_failed(now, &token, failed, jitter));
                self.with(|l| l.free(now, token));
            }
            // The reaper runs no job: it leaves this one in the backlog. Another thread runs it itself.
            Err((_, job)) if self.reaper.is_this_thread() => self.executor.defer(job),
            Err((_, job)) => self.run_on_caller(job),
        }
    }

    /// Has the calls of a connection fail. `cancel`: the server is asked first to stop what it does. Returns whether
    /// the manager has registered anything to abort or cancel with.
    pub(crate) fn abort(self: &Arc<Self>, id: u64, cancel: bool) -> bool {
        let Some(opening) = self.openings.get(id) else { return false };
        let can_be_aborted = opening.abort_from_now_on();
        if can_be_aborted {
            // The job also drops the opening, since the hooks in it are the user's. (If there are none, it is dropped
            // here.)
            self.post(Job::Abort(opening, cancel));
        }
        can_be_aborted
    }

    /// Writes a log record, from a thread that the logger may block.
    pub(crate) fn record(self: &Arc<Self>, level: Level, text: impl FnOnce() -> String) {
        // A forked child has no such thread, and what it does does not concern the parent's pool.
        if level <= log::max_level() && !self.is_forked() {
            // One record is one line, whatever characters are in names and causes.
            let text = Shown(format_args!("pool '{}': {}", self.name, text())).to_string();
            self.post(Job::Record(level, text));
        }
    }

    /// Logs that `what`, which is the pool's own code, has panicked.
    pub(crate) fn tell_defect(self: &Arc<Self>, what: &str, panic: &(dyn Any + Send)) {
        let text = defect::describe(&self.name, what, panic);
        // The panic may have come from this very logging.
        shielded(|| self.record(Level::Error, || text));
    }

    /// Stores why the last open failed, before the ledger is told that it did. The cause stays when a later open
    /// succeeds, since the threads may come here in another order. Whether opens fail at present the ledger says
    /// ([`failing`](Ledger::failing)).
    pub(crate) fn set_cause(self: &Arc<Self>, cause: Cause) {
        match self.openings.set_cause(cause) {
            // The error in the cause before may be the user's, and its drop may block. So the reaper leaves it to a
            // job.
            Some(before) if before.is_typed() && self.reaper.is_this_thread() => self.post(Job::Drop(before)),
            before => shielded(|| drop(before)),
        }
    }

    /// Closes the pool, if it is not closed. Returns how many callers waited.
    pub(crate) fn end(self: &Arc<Self>, by: &'static str, at: Option<&'static Location<'static>>) -> u32 {
        if self.is_forked() {
            return 0;
        }
        let now = self.time.precise();
        // Set before the ledger is told, so that every thread that finds the pool closed can read who closed it.
        let _ = self.life.ended.set(Ended { by, at, thread: threads::id(), when: now });
        let waiters = self.with(|l| {
            let waiters = l.close(now);
            self.note_waiting(l);
            waiters
        });
        if waiters.is_some() {
            let place = at.map(|at| format!(" ({at})")).unwrap_or_default();
            self.record(Level::Info, || format!("closing: {by}{place}"));
        }
        self.executor.close();
        waiters.unwrap_or(0)
    }

    /// Starts the thread that keeps time.
    pub(crate) fn start_reaper(self: &Arc<Self>) -> io::Result<()> {
        Reaper::start(self)
    }

    // ---------------------------------------------------------------------------------------------- looking

    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts()
    }

    /// Copies of the slots that `pick` picks. Their text, such as the names of threads, is made later, without the
    /// lock.
    pub(crate) fn slots(&self, pick: impl Fn(&Slot) -> bool) -> Vec<Slot> {
        self.lock().slots().filter(|slot| pick(slot)).cloned().collect()
    }

    /// The slots as the user sees them, by number.
    pub(crate) fn describe(&self, mut slots: Vec<Slot>) -> Vec<ConnectionInfo> {
        slots.sort_by_key(|slot| slot.id);
        let now = self.time.precise();
        let server_ids = self.openings.server_ids(slots.iter().map(|slot| slot.id));
        let describe = |(slot, server_id): (Slot, Option<u64>)| ConnectionInfo {
            id: slot.id,
            server_id,
            state: slot.as_seen(),
            since: now.since(slot.since),
            age: now.since(slot.born),
            uses: slot.uses,
            location: slot.caller().map(|caller| caller.at),
            thread: slot.caller().map(|caller| threads::name(caller.thread)),
        };
        slots.into_iter().zip(server_ids).map(describe).collect()
    }
}

/// ` by thread 'worker' at src/main.rs:12:5`, or nothing.
pub(crate) fn by(caller: Option<Caller>) -> String {
    caller.map(|c| format!(" by thread {} at {}", threads::name(c.thread), c.at)).unwrap_or_default()
}

/// Keeps the ledger's time.
impl<M: Manage> Timed for Shared<M> {
    fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn keep_time(self: &Arc<Self>, stays: bool) -> Next {
        // Both are read before the lock is taken, since nothing but the ledger runs under it.
        let (now, jitter) = (self.time.precise(), self.jitter());
        let mut ledger = self.lock();
        if !stays && ledger.reaper_ends() {
            self.reaper.ends();
            return Next::End;
        }
        if ledger.alarm() <= now {
            ledger.reap(now, jitter);
            self.apply(ledger);
            return Next::Look;
        }
        Next::Sleep(self.time.instant(ledger.alarm()))
    }

    fn run_backlog(self: &Arc<Self>) -> bool {
        self.executor.run_backlog(self)
    }

    fn panicked(self: &Arc<Self>, panic: &(dyn Any + Send)) {
        self.tell_defect("the reaper", panic);
    }

    fn ended(&self) {
        self.changed.notify();
    }

    fn lacks_reaper(self: &Arc<Self>) {
        // First, so that whoever puts a job in the backlog after the loop starts the reaper, or comes here.
        self.with(|l| l.lacks_reaper());
        // Nobody looks at the backlog again. (The closes have no limit then, nor has one that another thread has begun
        // meanwhile. No caller is left to wait for them.)
        while let Some(job) = self.executor.take_close() {
            self.run_on_caller(job);
        }
    }
}
