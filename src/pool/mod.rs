//! [`Pool`] and the other types that users have in their hands:
//!
//! | file | |
//! |---|---|
//! | `mod` | the handle: what it shows of the pool, and what it changes while the pool is open |
//! | `checkout` | the way of a `get` |
//! | `connection` | a connection in use, and the way of its return |
//! | `refusals` | the errors: why there is no connection |
//! | `close`, `guard` | the end of a pool |
//! | `builder` | its beginning |

pub(crate) mod builder;
mod checkout;
pub(crate) mod close;
pub(crate) mod connection;
pub(crate) mod guard;
mod refusals;

use crate::error::Error;
use crate::health::{Failing, Health, LastError};
use crate::leaf::clock::Moment;
use crate::ledger;
use crate::manage::Manage;
use crate::runtime::shared::Shared;
use crate::settings::{Settings, check_floor};
use crate::stats::{Connections, Counts, Facts, State, Stats, Tally};
use log::Level;
use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::time::Duration;

/// A handle to a pool of connections. Clone it and give a clone to every thread.
///
/// The pool is open until [`close`](Pool::close) is called on a handle, a [`PoolGuard`](crate::PoolGuard) is dropped,
/// or the last handle is dropped. A guard counts as a handle; connections in use do not keep the pool open.
pub struct Pool<M: Manage>(Arc<Handle<M>>);

/// What the handles share with each other and not with the pool's own threads: its drop is that of the last handle.
struct Handle<M: Manage> {
    shared: Arc<Shared<M>>,
}

impl<M: Manage> Drop for Handle<M> {
    fn drop(&mut self) {
        self.shared.end("its last handle was dropped", None);
    }
}

/// A panic costs the connection that it meets, and leaves the pool as it is. So a `Pool` may be used on both sides of a
/// [`catch_unwind`](std::panic::catch_unwind).
impl<M: Manage> UnwindSafe for Pool<M> {}
impl<M: Manage> RefUnwindSafe for Pool<M> {}

impl<M: Manage> Clone for Pool<M> {
    fn clone(&self) -> Self {
        Pool(Arc::clone(&self.0))
    }
}

impl<M: Manage> Pool<M> {
    fn of(shared: Arc<Shared<M>>) -> Self {
        Pool(Arc::new(Handle { shared }))
    }

    #[inline]
    fn shared(&self) -> &Arc<Shared<M>> {
        &self.0.shared
    }

    // ---------------------------------------------------------------------------------------------- changing

    /// Sets the greatest number of connections.
    ///
    /// Down: the connections that are too many are closed, idle ones at once (the longest unused first), others when
    /// they are returned.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for zero, and for less than `min_idle`. Nothing has changed then. (In a
    /// forked child nothing changes either.)
    pub fn resize(&self, max_size: u32) -> Result<(), Error> {
        if max_size == 0 {
            return Err(Error::config("max_size", "is 0, and must be at least 1"));
        }
        let shared = self.shared();
        check_floor(shared.settings.min_idle, max_size)?;
        if shared.is_forked() {
            return Ok(());
        }
        let now = shared.time.precise();
        shared.with(|l| l.resize(now, max_size));
        Ok(())
    }

    /// Replaces every connection whose opening began before now: idle ones at once, others when they are returned.
    ///
    /// If the close of such a connection takes more than a tenth of `close_timeout` while a caller waits for its place,
    /// it is abandoned like a close past that limit: the server at the other end may be the one that failed.
    ///
    /// Call it after a failover, or when a password was changed. The pool forgets a permanent refusal, that of an attempt
    /// under way as well, and makes the next attempt soon. (If it is called more often than a login takes, no caller is
    /// told of a refusal before its deadline.)
    pub fn recycle(&self) {
        let shared = self.shared();
        if shared.is_forked() {
            return;
        }
        let now = shared.time.precise();
        shared.with(|l| l.recycle(now));
        shared.record(Level::Info, || "recycled: every connection is replaced".into());
    }

    // ---------------------------------------------------------------------------------------------- looking

    /// Whether the pool is closed.
    pub fn is_closed(&self) -> bool {
        !self.shared().is_forked() && self.shared().lock().is_closed()
    }

    /// How many connections there are, as r2d2 says it: all that are open, and the idle ones among them.
    pub fn state(&self) -> State {
        let shared = self.shared();
        let counts = if shared.is_forked() { Counts::default() } else { shared.counts() };
        State { connections: counts.idle + counts.in_use + counts.checking, idle_connections: counts.idle }
    }

    /// What the pool is doing and has done. Made to be called every few seconds: it takes the pool's lock for a moment.
    pub fn stats(&self) -> Stats {
        Self::stats_of(self.shared())
    }

    fn stats_of(shared: &Shared<M>) -> Stats {
        let (name, now) = (shared.name.to_string(), shared.time.precise());
        let mut facts = Facts {
            name,
            age: now.since(Moment::BIRTH),
            closed: false,
            health: if shared.is_forked() { Health::Closed } else { Health::Ready },
            failing: None,
            last_error: None,
            max_size: shared.settings.max_size,
            min_idle: shared.settings.min_idle,
            dropped_records: 0,
        };
        if shared.is_forked() {
            return Stats::new(facts, Counts::default(), Tally::default());
        }
        let (health, run, failed, counts, tally) = {
            let ledger = shared.lock();
            (facts.closed, facts.max_size) = (ledger.is_closed(), ledger.rules().max_size);
            (ledger.health(now), ledger.failed_run(now), ledger.last_failed(now), ledger.counts(), ledger.tally.clone())
        };
        facts.dropped_records = shared.executor.dropped_records();
        facts.health = shared.health_in_words(health);
        facts.failing = run.map(Failing::from);
        facts.last_error = failed.and_then(|(ago, why)| Some(LastError { cause: shared.why_failed(why)?, ago }));
        Stats::new(facts, counts, tally)
    }

    /// How the pool is: whether it serves, is full, is stuck or cannot reach its server. For readiness probes: see
    /// [`Health`].
    ///
    /// It looks at counters, takes the pool's lock for a moment, and opens no connection. But a pool that is down and of which
    /// nobody wants a connection would never learn that its server is back. So if the pool is down, it is asked to try again
    /// once a second has passed since the last attempt (after a refusal once its back-off is over): a probe that takes the traffic
    /// away brings it back. [`Stats::health`] asks for nothing.
    pub fn health(&self) -> Health {
        let shared = self.shared();
        if shared.is_forked() {
            return Health::Closed;
        }
        let now = shared.time.precise();
        let health = shared.lock().health(now);
        if let ledger::Health::Down(run) = &health {
            if run.next_try.is_none() {
                shared.with(|l| l.probe(now));
            }
        }
        shared.health_in_words(health)
    }

    /// Every connection, one row each: what it is doing, how old it is, who has it.
    pub fn connections(&self) -> Connections {
        let shared = self.shared();
        if shared.is_forked() {
            return Connections::default();
        }
        Connections(shared.describe(shared.slots(|_| true)))
    }

    /// A number that no other pool has while this one or an [`observer`](Pool::observer) of it is there.
    #[cfg(any(feature = "prometheus-client", feature = "metrics"))]
    pub(crate) fn id(&self) -> usize {
        Arc::as_ptr(self.shared()).cast::<()>() as usize
    }

    /// Looks at this pool for as long as it is there, and does not keep it open. If the pool is down and nobody wants a
    /// connection, the look asks it to try again, as [`health`](Pool::health) does.
    #[cfg(any(feature = "prometheus-client", feature = "metrics"))]
    pub(crate) fn observer(&self) -> impl Fn() -> Option<Stats> + Send + Sync + 'static {
        let shared = Arc::downgrade(self.shared());
        move || {
            // (In a forked child it is the parent's pool.)
            let shared = shared.upgrade().filter(|shared| !shared.is_forked())?;
            let stats = Self::stats_of(&shared);
            if matches!(stats.health, Health::Down { next_try: None, .. }) {
                let now = shared.time.precise();
                shared.with(|l| l.probe(now));
            }
            Some(stats)
        }
    }

    /// Logs records about this pool, from a thread of the pool that the logger may block. It does not keep the pool
    /// alive. Once the pool is gone it logs on the thread that calls it.
    #[cfg(feature = "postgres")]
    pub(crate) fn recorder(&self) -> impl Fn(Level, String) + Send + Sync + 'static {
        let (shared, name) = (Arc::downgrade(self.shared()), self.name().to_string());
        move |level, text| match shared.upgrade() {
            Some(shared) => shared.record(level, || text),
            None => {
                log::log!(target: "millpond", level, "{}", crate::leaf::text::Shown(format_args!("pool '{name}': {text}")))
            }
        }
    }

    /// The settings the pool was built with.
    pub fn settings(&self) -> &Settings {
        &self.shared().settings
    }

    /// The manager.
    pub fn manager(&self) -> &M {
        &self.shared().user.manager
    }

    /// The name of the pool.
    pub fn name(&self) -> &str {
        &self.shared().name
    }

    /// The greatest number of connections, as it is set now.
    pub fn max_size(&self) -> u32 {
        let shared = self.shared();
        if shared.is_forked() { shared.settings.max_size } else { shared.lock().rules().max_size }
    }

    /// The floor. (r2d2's returns an `Option`, in which `None` stands for `max_size`.)
    pub fn min_idle(&self) -> u32 {
        self.settings().min_idle
    }

    /// See [`Builder::max_idle`](crate::Builder::max_idle).
    pub fn max_idle(&self) -> Option<Duration> {
        self.settings().max_idle
    }

    /// [`max_idle`](Pool::max_idle) by r2d2's name.
    pub fn idle_timeout(&self) -> Option<Duration> {
        self.settings().max_idle
    }

    /// See [`Builder::max_lifetime`](crate::Builder::max_lifetime).
    pub fn max_lifetime(&self) -> Option<Duration> {
        self.settings().max_lifetime
    }

    /// See [`Builder::connection_timeout`](crate::Builder::connection_timeout).
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
