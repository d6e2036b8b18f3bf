//! The beginning of a pool: [`Builder`], with every setting, its default and which values are refused; and the warm-up.

use crate::error::Error;
use crate::event::HandleEvent;
use crate::hooks::Hooks;
use crate::leaf::text::Short;
use crate::manage::Manage;
use crate::pool::Pool;
use crate::runtime::shared::{PoolLedger, Shared};
use crate::settings::{Settings, Validate};
use log::Level;
use r2d2::{CustomizeConnection, HandleError};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Makes a [`Pool`].
///
/// ```
/// use millpond::Pool;
/// use std::time::Duration;
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/example_manager.rs")); }
/// # use doc::DocManager;
///
/// let pool = Pool::builder()
///     .name("orders")
///     .max_size(16)
///     .min_idle(2)
///     .max_idle(Duration::from_secs(60))
///     .max_lifetime(Duration::from_secs(1800))
///     .connection_timeout(Duration::from_secs(5))
///     .build(DocManager)?;
/// # Ok::<(), millpond::Error>(())
/// ```
///
/// Durations too long for the clock mean "never". [`build`](Builder::build) refuses a value that cannot be, and changes
/// none in silence.
pub struct Builder<M: Manage> {
    name: Option<String>,
    settings: Settings,
    hooks: Hooks<M>,
    manager: Option<M>,
}

impl<M: Manage> Default for Builder<M> {
    fn default() -> Self {
        Builder::new()
    }
}

impl<M: Manage> Builder<M> {
    /// A builder with the default of every setting.
    pub fn new() -> Builder<M> {
        Builder { name: None, manager: None, settings: Settings::default(), hooks: Hooks::none() }
    }

    /// What the pool is called in errors, log records and thread names (which the system cuts to 15 bytes).
    ///
    /// Default: `millpond-N`, counted up within the process.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The greatest number of connections: idle, in use, being checked, opened and closed, all together.
    ///
    /// Default 10. Zero is refused.
    #[must_use]
    pub fn max_size(mut self, max_size: u32) -> Self {
        self.settings.max_size = max_size;
        self
    }

    /// The floor: as many unused connections are kept ready, `max_idle` or not, and opened ahead of demand. Those in
    /// use do not count: with a floor of 1 and one connection in use there is a second.
    ///
    /// Default 0; `None` is 0 as well. (r2d2's default is `max_size`: its pool never shrinks.) More than `max_size` is
    /// refused.
    #[must_use]
    pub fn min_idle(mut self, min_idle: impl Into<Option<u32>>) -> Self {
        self.settings.min_idle = min_idle.into().unwrap_or(0);
        self
    }

    /// How long a connection may be unused before it is closed, unless [`min_idle`](Builder::min_idle) keeps it.
    ///
    /// Default 10 minutes. `None`: for ever. Zero: a connection that no caller waits for is closed as it is returned
    /// (refused together with a `min_idle`). A very short one has the same effect, except that a `min_idle` is kept.
    #[must_use]
    pub fn max_idle(mut self, max_idle: impl Into<Option<Duration>>) -> Self {
        self.settings.max_idle = max_idle.into();
        self
    }

    /// [`max_idle`](Builder::max_idle) by r2d2's name.
    #[must_use]
    pub fn idle_timeout(self, idle_timeout: impl Into<Option<Duration>>) -> Self {
        self.max_idle(idle_timeout)
    }

    /// How old a connection may get: it is not handed out past this age. An idle connection is closed at this age, one
    /// in use when it is returned. The age counts from the moment its opening began.
    ///
    /// Default 30 minutes. `None`: without limit. Less than 10 ms is refused.
    #[must_use]
    pub fn max_lifetime(mut self, max_lifetime: impl Into<Option<Duration>>) -> Self {
        self.settings.max_lifetime = max_lifetime.into();
        self
    }

    /// The greatest part of `max_lifetime` by which the life of a connection is shortened, at random, so that
    /// connections opened together do not end together.
    ///
    /// Default 0.1. 0: none. Outside of 0 to 1 is refused.
    #[must_use]
    pub fn lifetime_jitter(mut self, part: f64) -> Self {
        self.settings.lifetime_jitter = part;
        self
    }

    /// How long [`Pool::get`] waits, and [`build`](Builder::build) for the first connections.
    ///
    /// Default 30 seconds. Zero is refused. With a very short one `get` finds only a connection that is ready, and
    /// `build` fails: see [`build_unchecked`](Builder::build_unchecked).
    #[must_use]
    pub fn connection_timeout(mut self, timeout: Duration) -> Self {
        self.settings.connection_timeout = timeout;
        self
    }

    /// When a connection is validated before it is handed out.
    ///
    /// Default: [`Validate::AfterIdle`] with one second.
    #[must_use]
    pub fn validate(mut self, validate: Validate) -> Self {
        self.settings.validate = validate;
        self
    }

    /// r2d2's way to say [`Validate::Always`] (`true`, r2d2's default) or [`Validate::Never`] (`false`).
    #[must_use]
    pub fn test_on_check_out(self, test: bool) -> Self {
        self.validate(if test { Validate::Always } else { Validate::Never })
    }

    /// How long a validation may take. One that takes longer has failed.
    ///
    /// Default 2 seconds. Less than 1 ms is refused.
    #[must_use]
    pub fn validation_timeout(mut self, timeout: Duration) -> Self {
        self.settings.validation_timeout = timeout;
        self
    }

    /// How long an attempt to open a connection may take, hooks included, before it is abandoned: its slot is freed,
    /// and a connection that it still brings is closed.
    ///
    /// Default 10 seconds. Less than 1 ms is refused.
    #[must_use]
    pub fn open_timeout(mut self, timeout: Duration) -> Self {
        self.settings.open_timeout = timeout;
        self
    }

    /// How long closing or resetting a connection may take before it is abandoned.
    ///
    /// Default 5 seconds. Less than 1 ms is refused.
    #[must_use]
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.settings.close_timeout = timeout;
        self
    }

    /// How many connections may be opened at the same time; one more while one of them takes longer than usual. Each
    /// takes a thread of the pool until it is open.
    ///
    /// Default 4. Zero is refused, and so is more than 1024.
    #[must_use]
    pub fn parallel_opens(mut self, n: u32) -> Self {
        self.settings.parallel_opens = n;
        self
    }

    /// How many threads may wait for a connection; one more fails at once.
    ///
    /// Default `None`: any number. 0: no caller waits, not even for a connection to be opened, nor (with a manager that
    /// does not [keep its limits](Manage::keeps_limits)) to be checked. Such a call fails, and the connection that is
    /// opened or checked for it serves the next.
    #[must_use]
    pub fn max_waiting(mut self, n: impl Into<Option<u32>>) -> Self {
        self.settings.max_waiting = n.into();
        self
    }

    /// Bounds barging: once the first waiter has waited for so long, no other caller takes a connection before it.
    ///
    /// Until then a returned connection is handed off to the first waiter only if others have barged four times and it
    /// has been the first for 20 µs. Otherwise any thread that runs may take the connection, and the waiter is notified
    /// that it may. The reason: a thread takes microseconds to wake, and a connection that is handed off lies unused
    /// meanwhile.
    ///
    /// Default 0.7 ms. Zero, or a `max_idle` that is not longer: every returned connection is handed off, strictly in
    /// order of arrival, which is slower where connections are in use for microseconds. (`cargo bench --bench curve`
    /// shows what other values cost, and what they buy.)
    #[must_use]
    pub fn fair_after(mut self, limit: Duration) -> Self {
        self.settings.fair_after = limit;
        self
    }

    /// How often an idle connection is validated, to keep firewalls and servers from forgetting it. This does not count
    /// as use. Connections are validated one at a time.
    ///
    /// Default `None`: not at all. Less than 10 ms is refused.
    #[must_use]
    pub fn keepalive(mut self, period: impl Into<Option<Duration>>) -> Self {
        self.settings.keepalive = period.into();
        self
    }

    /// How long a connection may be checked out before the pool warns of a leak: once per checkout, with the line of
    /// source that called `get` and the thread. The connection stays where it is.
    ///
    /// Default `None`: no warnings. Less than 1 ms is refused.
    #[must_use]
    pub fn leak_threshold(mut self, threshold: impl Into<Option<Duration>>) -> Self {
        self.settings.leak_threshold = threshold.into();
        self
    }

    /// Prepares each connection after it is opened, and takes care of it when it is closed, as in r2d2.
    ///
    /// Both methods run on the pool's own threads, within `open_timeout` and `close_timeout`. `on_release` is called
    /// only if `on_acquire` succeeded, and takes the place of [`Manage::close`]. `on_acquire` runs again after a reset
    /// that [undid what it set](Manage::undoes_on_acquire), as part of it.
    #[must_use]
    pub fn connection_customizer(mut self, c: Box<dyn CustomizeConnection<M::Connection, M::Error>>) -> Self {
        self.hooks.customizer = Some(c);
        self
    }

    /// The handler gets every error of the manager, on the thread where it came up: r2d2's `error_handler`.
    ///
    /// Default: none. (r2d2 logs them as errors; this pool logs failures at warn by itself.)
    #[must_use]
    pub fn error_handler(mut self, handler: Box<dyn HandleError<M::Error>>) -> Self {
        self.hooks.errors = Some(handler);
        self
    }

    /// The handler is told of what happens in the pool. Default: none.
    #[must_use]
    pub fn event_handler(mut self, handler: Box<dyn HandleEvent>) -> Self {
        self.hooks.events = Some(handler);
        self
    }

    /// The manager, for [`open`](Builder::open).
    #[must_use]
    pub fn manager(mut self, manager: M) -> Self {
        self.manager = Some(manager);
        self
    }

    /// [`build`](Builder::build) with the manager that the builder has been given.
    ///
    /// # Errors
    ///
    /// As [`build`](Builder::build); and [`Config`](crate::ErrorKind::Config) if it was given no manager.
    pub fn open(mut self) -> Result<Pool<M>, Error> {
        match self.manager.take() {
            Some(manager) => self.build(manager),
            None => Err(Error::config("manager", "is missing: give it with `manager`, or use `build`")),
        }
    }

    /// Builds the pool and opens `max(1, min_idle)` connections, trying again until `connection_timeout` has passed.
    ///
    /// None of them is checked out for that. So no event tells of a checkout or a return, and the first caller finds a
    /// connection as `on_acquire` left it. With a `max_idle` of zero the first connection is closed at once.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for a setting that cannot be, [`Connect`](crate::ErrorKind::Connect) at
    /// once if the server refuses for good, [`Timeout`](crate::ErrorKind::Timeout) with the last failure otherwise.
    pub fn build(self, manager: M) -> Result<Pool<M>, Error> {
        let (settings, hooks) = self.checked()?;
        let pool = Pool::start(settings, hooks, manager)?;
        pool.warm_up()?;
        Ok(pool)
    }

    /// Builds the pool without waiting for a connection. `min_idle` of them are opened in the background.
    ///
    /// # Panics
    ///
    /// If a setting cannot be, or the pool's thread cannot be started. (r2d2's panics for settings as well.)
    pub fn build_unchecked(self, manager: M) -> Pool<M> {
        let built = self.checked().and_then(|(settings, hooks)| Pool::start(settings, hooks, manager));
        match built {
            Ok(pool) => {
                pool.set_floor();
                pool
            }
            Err(e) => panic!("cannot build the pool: {e}"),
        }
    }

    fn checked(mut self) -> Result<(Settings, Hooks<M>), Error> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.settings.check()?;
        self.settings.name = self.name.unwrap_or_else(|| format!("millpond-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        Ok((self.settings, self.hooks))
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

    /// A builder with the default of every setting.
    pub fn builder() -> Builder<M> {
        Builder::new()
    }

    /// A pool with a reaper, and no connection yet.
    fn start(settings: Settings, hooks: Hooks<M>, manager: M) -> Result<Pool<M>, Error> {
        let shared = Shared::new(settings, hooks, manager);
        shared.start_reaper().map_err(|e| Error::config("pool", format!("its thread cannot be started: {e}")))?;
        shared.record(Level::Info, || {
            let s = &shared.settings;
            let or_never = |d: Option<Duration>| d.map_or("never".into(), |d| Short(d).to_string());
            let (idle, life) = (or_never(s.max_idle), or_never(s.max_lifetime));
            format!("open (max_size {}, min_idle {}, max_idle {idle}, max_lifetime {life})", s.max_size, s.min_idle)
        });
        Ok(Pool::of(shared))
    }

    /// Opens the connections that `build` promises, or says why not. None of them is checked out for that.
    fn warm_up(&self) -> Result<(), Error> {
        let shared = self.shared();
        let timeout = shared.settings.connection_timeout;
        let deadline = shared.time.instant(shared.time.precise().plus(timeout));
        let wait_until = |fact: fn(&PoolLedger<M>) -> bool| {
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
                None => Err(shared.timeout_error(timeout)),
            }
        };
        // A floor of one brings the first connection alone, so that the manager looks at it before there are others.
        shared.life.is_starting.store(true, Ordering::Release);
        let now = shared.time.precise();
        shared.with(|l| l.set_min_idle(now, 1));
        wait_until(|l| l.tally.opens > 0)?;
        self.set_floor();
        wait_until(|l| l.floor_stands())
    }

    /// Sets the floor to `min_idle`: it is 0 until the warm-up.
    fn set_floor(&self) {
        let shared = self.shared();
        let now = shared.time.precise();
        shared.with(|l| l.set_min_idle(now, shared.settings.min_idle));
    }
}

impl<M: Manage> fmt::Debug for Builder<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Builder { name, settings, hooks, manager: _ } = self;
        f.debug_struct("Builder")
            .field("name", name)
            .field("settings", settings)
            .field("hooks", hooks)
            .finish_non_exhaustive()
    }
}
