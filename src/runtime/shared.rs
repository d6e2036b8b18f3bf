//! What the parts of one pool share, and the one way to use its lock: [`Shared::with`].
//!
//! Under the lock run methods of the [`Ledger`] and nothing else. What they leave in the effects is settled by whoever
//! held the lock: seats are filled before it is released, and after it threads are woken and jobs posted.

use crate::error::{Cause, Closed, Error, ErrorKind};
use crate::leaf::clock::{Clock, Moment};
use crate::leaf::process::{Home, origin};
use crate::leaf::shield::{Shielded, shielded};
use crate::leaf::text::Short;
use crate::leaf::text::Shown;
use crate::leaf::threads;
use crate::ledger::{Caller, Condition, Counts, Ledger, Order, Outcome, Slot, Token};
use crate::manage::{Manage, Opening};
use crate::pool::builder::Hooks;
use crate::pool::connection::Conn;
use crate::pool::{Vain, Within};
use crate::runtime::defect;
use crate::runtime::event_count::Bell;
use crate::runtime::executor::Crew;
use crate::runtime::jobs::{Job, Notice, Permit};
use crate::runtime::reaper;
use crate::runtime::waiter::Seat;
use crate::settings::Settings;
use crate::stats::{ConnectionInfo, ConnectionState};
use log::Level;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

/// The ledger of a pool of `M`'s connections.
pub(crate) type Book<M> = Ledger<Box<Conn<M>>, Arc<WaitingSeat<M>>>;

/// Where a thread waits for one of `M`'s connections.
pub(crate) type WaitingSeat<M> = Seat<Outcome<Box<Conn<M>>>>;

/// What the parts of one pool share.
pub(crate) struct Shared<M: Manage> {
    pub(crate) name: Arc<str>,
    pub(crate) clock: Clock,
    pub(crate) settings: Settings,
    pub(crate) manager: Shielded<M>,
    pub(crate) hooks: Hooks<M>,
    pub(crate) crew: Crew<Job<M>>,
    /// [`Manage::keeps_limits`], asked once.
    pub(crate) keeps_limits: bool,
    pub(crate) core: Arc<Core<M>>,
    /// What the reaper sleeps on.
    pub(crate) alarm: Bell,
    pub(crate) reaper_lives: AtomicBool,
    /// What `build` and `close` sleep on.
    pub(crate) changed: Bell,
    /// Why the last open failed. Not in the ledger: a cause is not to be dropped under its lock.
    cause: Mutex<Option<Cause>>,
    /// Every connection that is open or being opened, by number: what can be done about it from outside.
    pub(crate) openings: Mutex<HashMap<u64, Arc<Opening>>>,
    pub(crate) ended: OnceLock<Ended>,
    /// Who closes the pool from within a call that it makes.
    pub(crate) within: Mutex<Vec<Within>>,
    /// What `close` and guards have waited for in vain.
    pub(crate) vain: Mutex<Option<Vain>>,
    /// Whether `build` still waits for the first connection, which is shown to [`Manage::started`].
    pub(crate) starting: AtomicBool,
    /// The process that built the pool.
    pub(crate) home: Home,
    /// When the pool was built, see [`origin`](threads::origin).
    born: u64,
}

/// The lock and what it guards. It may outlive the pool: see [`keep`](crate::runtime::kept).
pub(crate) struct Core<M: Manage> {
    home: Home,
    ledger: Mutex<Book<M>>,
    /// How many wait, as of the last time it changed: while somebody does, the clock is read precisely.
    crowd: AtomicU32,
    pool: Weak<Shared<M>>,
}

/// How often a lock is tried before the process is looked at.
const SPINS: u32 = 10;

impl<M: Manage> Core<M> {
    /// Returns a connection. What owns the pool on its behalf has moved into the ledger with it.
    #[inline]
    pub(crate) fn returned(&self, now: Moment, token: Token, conn: Box<Conn<M>>, back: Condition) {
        let Some(mut ledger) = self.lock_at_home() else {
            // It is the parent's: whatever is done to it here is done to that.
            return std::mem::forget((token, conn));
        };
        ledger.returned(now, token, conn, back);
        if !ledger.effects.is_empty() {
            self.settle(ledger);
        }
    }

    /// The lock. `None`: this is a forked child, where whoever holds it is not.
    #[inline]
    fn lock_at_home(&self) -> Option<MutexGuard<'_, Book<M>>> {
        self.ledger.try_lock().or_else(|| self.lock_slowly())
    }

    #[cold]
    fn lock_slowly(&self) -> Option<MutexGuard<'_, Book<M>>> {
        // What holds it holds it for tens of nanoseconds; to look at the process takes longer.
        for _ in 0..SPINS {
            std::hint::spin_loop();
            if let Some(ledger) = self.ledger.try_lock() {
                return Some(ledger);
            }
        }
        if self.home.is_elsewhere() { None } else { Some(self.ledger.lock()) }
    }

    #[cold]
    fn settle(&self, mut ledger: MutexGuard<'_, Book<M>>) {
        if let Some(seat) = only_notified(&mut ledger) {
            drop(ledger);
            return seat.call();
        }
        // The connection is in the ledger or in its effects, and both are locked: so it is there.
        if let Some(pool) = self.pool.upgrade() {
            pool.settle(ledger);
        }
    }
}

/// The seat of the one who is to be called, if there is nothing else to be done: what a busy pool does all the time.
fn only_notified<M: Manage>(ledger: &mut Book<M>) -> Option<Arc<WaitingSeat<M>>> {
    let alone = ledger.effects.is_empty_but_for_notified() && ledger.effects.notified.len() == 1;
    // Popped, so that the list keeps its memory.
    if alone { ledger.effects.notified.pop() } else { None }
}

impl<M: Manage> Drop for Shared<M> {
    fn drop(&mut self) {
        // Each by itself: of two that panic the second would end the process.
        let Hooks { customizer, errors, events } = &mut self.hooks;
        let (customizer, errors, events) = (customizer.take(), errors.take(), events.take());
        shielded(|| drop(customizer));
        shielded(|| drop(errors));
        shielded(|| drop(events));
    }
}

/// Who closed the pool.
pub(crate) struct Ended {
    pub(crate) by: &'static str,
    pub(crate) at: Option<&'static Location<'static>>,
    pub(crate) thread: u64,
    pub(crate) when: Moment,
}

/// ` by thread 'worker' at src/main.rs:12:5`, or nothing.
pub(crate) fn by(caller: Option<Caller>) -> String {
    caller.map(|h| format!(" by thread {} at {}", threads::name(h.thread), h.at)).unwrap_or_default()
}

impl<M: Manage> Shared<M> {
    pub(crate) fn new(settings: Settings, hooks: Hooks<M>, manager: M) -> Arc<Self> {
        let (clock, home) = (Clock::new(), Home::here());
        Arc::new_cyclic(|pool| Shared {
            name: settings.name.as_str().into(),
            crew: Crew::new(settings.name.clone()),
            keeps_limits: manager.keeps_limits(),
            core: Arc::new(Core {
                home,
                ledger: Mutex::new(Ledger::new(settings.clone(), clock.resolution())),
                crowd: AtomicU32::new(0),
                pool: Weak::clone(pool),
            }),
            alarm: Bell::new(),
            reaper_lives: AtomicBool::new(false),
            changed: Bell::new(),
            cause: Mutex::new(None),
            openings: Mutex::new(HashMap::new()),
            ended: OnceLock::new(),
            within: Mutex::new(Vec::new()),
            vain: Mutex::new(None),
            starting: AtomicBool::new(false),
            home,
            born: origin(),
            clock,
            settings,
            hooks,
            manager: Shielded::new(manager),
        })
    }

    /// Which pool this is, for as long as there is anything of it.
    #[inline]
    pub(crate) fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    // ---------------------------------------------------------------------------------------------- the lock

    /// Asks the ledger, and settles what it leaves to be done.
    #[inline]
    pub(crate) fn with<R>(self: &Arc<Self>, ask: impl FnOnce(&mut Book<M>) -> R) -> R {
        let mut ledger = self.core.ledger.lock();
        let answer = ask(&mut ledger);
        if !ledger.effects.is_empty() {
            self.settle(ledger);
        }
        answer
    }

    /// [`with`](Shared::with) for whoever may be in a forked child: `None` there, if it can be told at all. (It can, as a
    /// rule, by [`seems_forked`](Shared::seems_forked), and certainly when the lock is not free.)
    #[inline]
    pub(crate) fn with_at_home<R>(self: &Arc<Self>, ask: impl FnOnce(&mut Book<M>) -> R) -> Option<R> {
        let mut ledger = self.core.lock_at_home()?;
        let answer = ask(&mut ledger);
        if !ledger.effects.is_empty() {
            self.settle(ledger);
        }
        Some(answer)
    }

    /// The lock itself: the effects must be empty, or [settled](Shared::settle), when it is released.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Book<M>> {
        self.core.ledger.lock()
    }

    /// Fills seats, releases the lock, wakes and posts.
    #[cold]
    pub(crate) fn settle(self: &Arc<Self>, mut ledger: MutexGuard<'_, Book<M>>) {
        if let Some(seat) = only_notified(&mut ledger) {
            drop(ledger);
            return seat.call();
        }
        let calls = std::mem::take(&mut ledger.effects.notified);
        let served = std::mem::take(&mut ledger.effects.served);
        let orders = std::mem::take(&mut ledger.effects.orders);
        let bell = std::mem::take(&mut ledger.effects.wake_reaper);
        let changed = std::mem::take(&mut ledger.effects.changed);
        let mut seats = Vec::with_capacity(served.len());
        for (seat, outcome) in served {
            seat.fill(outcome);
            seats.push(seat);
        }
        self.core.crowd.store(ledger.counts().waiting, Ordering::Relaxed);
        drop(ledger);
        seats.iter().for_each(|seat| seat.wake());
        calls.iter().for_each(|seat| seat.call());
        if bell {
            reaper::wake(self);
        }
        if changed {
            self.changed.ring();
        }
        if orders.is_empty() {
            return;
        }
        if self.is_forked() {
            // These connections are the parent's: whatever is done to them here is done to it.
            return orders.into_iter().for_each(std::mem::forget);
        }
        // One that panics takes none of the others with it.
        for order in orders {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.dispatch(order))) {
                defect::tell(self, "an order", panic);
            }
        }
    }

    /// Looks until `look` finds what it looks for, again after each change. `None`: the deadline came first.
    pub(crate) fn watch<R>(&self, deadline: Option<Instant>, mut look: impl FnMut() -> Option<R>) -> Option<R> {
        self.core.ledger.lock().watchers += 1;
        let found = loop {
            // Before the look: a change after it is heard.
            let heard = self.changed.count();
            let found = look();
            if found.is_some() || deadline.is_some_and(|at| Instant::now() >= at) {
                break found;
            }
            self.changed.wait(heard, deadline);
        };
        self.core.ledger.lock().watchers -= 1;
        found
    }

    /// Tells those who wait, and the clock, that the queue has changed.
    pub(crate) fn note_crowd(&self, ledger: &Book<M>) {
        self.core.crowd.store(ledger.counts().waiting, Ordering::Relaxed);
    }

    /// The time: coarse, and precise while somebody waits.
    #[inline]
    pub(crate) fn now(&self) -> Moment {
        if self.core.crowd.load(Ordering::Relaxed) == 0 { self.clock.coarse() } else { self.clock.precise() }
    }

    /// A number between 0 and 1, at random.
    pub(crate) fn chance(&self) -> f64 {
        RandomState::new().hash_one(0u8) as f64 / u64::MAX as f64
    }

    /// Whether this process is a child of the one that built the pool, forked from it: it has the pool's memory and
    /// sockets, and none of its threads.
    pub(crate) fn is_forked(&self) -> bool {
        self.home.is_elsewhere()
    }

    /// The same for next to nothing, unless this very thread looked a moment ago, and was forked since.
    #[inline]
    pub(crate) fn seems_forked(&self, now: Moment) -> bool {
        // By the coarse clock always: what was seen by the precise one would be relied on until the coarse one has come up.
        let now = if self.core.crowd.load(Ordering::Relaxed) == 0 { now } else { self.clock.coarse() };
        self.home.seems_elsewhere(self.born + now.nanos_since(Moment::BIRTH))
    }

    // ---------------------------------------------------------------------------------------------- orders

    fn dispatch(self: &Arc<Self>, order: Order<Box<Conn<M>>>) {
        let permit = |token: Token| Permit::new(Arc::clone(self), token);
        match order {
            Order::Open(token) => self.post(Job::Open(permit(token))),
            Order::Check(token, conn) => self.post(Job::Check(permit(token), conn)),
            Order::Reset(token, conn, caller) => self.post(Job::Reset(permit(token), conn, caller)),
            Order::Close(token, conn, reason) => self.post(Job::Close(permit(token), conn, reason)),
            Order::Slow { id } => {
                if !self.crew.discount(self, id) {
                    self.with(|l| l.look_again());
                }
            }
            Order::Abandon { id, was, limit, cancel } => {
                let what = match was {
                    ConnectionState::Opening => "opening",
                    ConnectionState::Checking => "checking",
                    _ => "closing",
                };
                if was == ConnectionState::Opening {
                    let within = Short(limit);
                    self.set_cause(Cause::message(format!("no answer to an attempt to connect within {within}")));
                }
                if !self.crew.replace(self, id) {
                    self.with(|l| l.look_again());
                }
                self.cut(id, cancel);
                self.notice(Level::Warn, || format!("abandoned {what} #{id}, which took longer than {}", Short(limit)));
            }
            Order::Leak { id, caller, held } => self.notice(Level::Warn, || {
                format!("#{id} has been checked out for {}{}: a leak?", Short(held), by(caller))
            }),
        }
    }

    pub(crate) fn post(self: &Arc<Self>, job: Job<M>) {
        match self.crew.post(self, job) {
            Ok(true) => {}
            // The reaper nudges the crew after each look.
            Ok(false) => self.with(|l| l.look_again()),
            Err((error, Job::Open(permit))) => {
                self.set_cause(Cause::message(format!("cannot start a thread to connect on: {error}")));
                permit.fail(false);
            }
            // The reaper runs no job; anybody else has nobody to leave it to.
            Err((_, job)) if reaper::is_this(self) => self.crew.strand(job),
            Err((_, job)) => job.run(self),
        }
    }

    /// Makes the calls of a connection fail, after asking the server to stop what it is doing if `cancel`.
    pub(crate) fn cut(self: &Arc<Self>, id: u64, cancel: bool) -> bool {
        let Some(opening) = self.openings.lock().get(&id).cloned() else { return false };
        let can_be_cut = opening.condemn();
        if can_be_cut {
            // It drops it, too: what it holds is the user's. (If there is nothing to be done, it holds nothing.)
            self.post(Job::Cut(opening, cancel));
        }
        can_be_cut
    }

    /// Leaves a record to a thread that the logger may block.
    pub(crate) fn notice(self: &Arc<Self>, level: Level, text: impl FnOnce() -> String) {
        // A forked child has no such thread, and what it does is no news of the parent's pool.
        if level <= log::max_level() && !self.is_forked() {
            // One record is one line, whatever there is in names and words.
            let text = Shown(format_args!("pool '{}': {}", self.name, text())).to_string();
            self.post(Job::Notice(Notice { level, text }));
        }
    }

    // ---------------------------------------------------------------------------------------------- causes, errors

    /// Remembers why the last open failed: before the ledger is told that it did. It stays when another succeeds, for that
    /// one may be slow to say so; whether it still tells anything is the ledger's to know.
    pub(crate) fn set_cause(self: &Arc<Self>, cause: Cause) {
        let before = self.cause.lock().replace(cause);
        match before {
            // What the one before was made of may be the user's, with a drop that takes its time.
            Some(before) if before.is_typed() && reaper::is_this(self) => self.post(Job::Drop(before)),
            before => shielded(|| drop(before)),
        }
    }

    pub(crate) fn cause(&self) -> Option<Cause> {
        self.cause.lock().clone()
    }

    pub(crate) fn refused_error(&self) -> Error {
        let cause = self.cause().unwrap_or_else(|| Cause::message("refused"));
        Error::new(ErrorKind::Connect(crate::error::Connect { pool: self.name.to_string(), cause }))
    }

    pub(crate) fn closed_error(&self) -> Error {
        let closed = match self.ended.get() {
            Some(ended) => Closed {
                pool: self.name.to_string(),
                by: ended.by,
                at: ended.at,
                thread: threads::name(ended.thread),
                ago: self.clock.precise().since(ended.when),
            },
            None => Closed {
                pool: self.name.to_string(),
                by: "its last handle was dropped",
                at: None,
                thread: threads::name(threads::tag()),
                ago: std::time::Duration::ZERO,
            },
        };
        Error::new(ErrorKind::Closed(closed))
    }

    /// What a forked child is told.
    pub(crate) fn forked_error(&self) -> Error {
        let problem = format!(
            "'{}' belongs to process {}, of which this process ({}) is a fork: it has none of the pool's threads, and its \
             connections are the parent's. Build a pool after the fork",
            self.name,
            self.home.pid(),
            std::process::id()
        );
        Error::config("pool", problem)
    }

    // ---------------------------------------------------------------------------------------------- looking

    pub(crate) fn counts(&self) -> Counts {
        self.core.ledger.lock().counts()
    }

    /// Copies of the rows that `pick` picks. What they say in words is looked up later, without the lock.
    pub(crate) fn rows(&self, pick: impl Fn(&Slot) -> bool) -> Vec<Slot> {
        self.core.ledger.lock().slots().filter(|row| pick(row)).cloned().collect()
    }

    /// The rows as the user sees them, by number.
    pub(crate) fn describe(&self, mut rows: Vec<Slot>) -> Vec<ConnectionInfo> {
        rows.sort_by_key(|row| row.id);
        let now = self.clock.precise();
        let openings = self.openings.lock();
        let describe = |row: Slot| ConnectionInfo {
            id: row.id,
            server_id: openings.get(&row.id).and_then(|o| o.server_id()),
            state: row.as_seen(),
            since: now.since(row.since),
            age: now.since(row.born),
            uses: row.uses,
            location: row.caller().map(|h| h.at),
            thread: row.caller().map(|h| threads::name(h.thread)),
        };
        rows.into_iter().map(describe).collect()
    }
}
