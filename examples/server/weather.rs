//! Weather for the pool: threads that use it in the ways in which a day does.

use crate::database::Private;
use crate::{Client, Db, Failure};
use log::{error, info, warn};
use millpond::Cause;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long the weather waits for a connection: longer than the server is away when it restarts, on any machine.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a thread waits for a connection at once, before it looks whether there is silence.
const SLICE: Duration = Duration::from_millis(250);

/// ... and for the others of its burst.
const MEET_SLICE: Duration = Duration::from_millis(50);

/// How long those of a burst wait for each other.
const MEET: Duration = Duration::from_secs(2);

/// The most threads: whoever clicks on and on shall not take the machine.
const MOST: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 17 threads use a connection each, for a second.
    Burst,
    /// A short query now and then, for a minute: one connection is enough for it.
    Trickle,
    /// Six threads that hardly pause, for half a minute.
    Steady,
    /// A worker that forgets its connection within a transaction.
    Stuck,
    /// The server stops, and starts again after three seconds.
    Restart,
    /// The role gets another password, of which the pool is told eight seconds later.
    Rotate,
    /// All of it ends.
    Silence,
}

impl Kind {
    pub(crate) const ALL: [Kind; 7] =
        [Kind::Burst, Kind::Trickle, Kind::Steady, Kind::Stuck, Kind::Restart, Kind::Rotate, Kind::Silence];

    /// Its name in addresses and in the environment.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Kind::Burst => "burst",
            Kind::Trickle => "trickle",
            Kind::Steady => "steady",
            Kind::Stuck => "stuck",
            Kind::Restart => "restart",
            Kind::Rotate => "rotate",
            Kind::Silence => "silence",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == name)
    }

    /// Whether it is done to the server, and not only to the pool.
    pub(crate) fn needs_private(self) -> bool {
        matches!(self, Kind::Restart | Kind::Rotate)
    }

    fn threads(self) -> usize {
        match self {
            Kind::Burst => 17,
            Kind::Steady => 6,
            Kind::Silence => 0,
            Kind::Trickle | Kind::Stuck | Kind::Restart | Kind::Rotate => 1,
        }
    }

    /// How long it lasts at most.
    fn lasts(self) -> Duration {
        Duration::from_secs(match self {
            Kind::Burst => 1,
            Kind::Trickle | Kind::Stuck => 60,
            Kind::Steady => 30,
            Kind::Restart => 3,
            Kind::Rotate => 8,
            Kind::Silence => 0,
        })
    }
}

/// What became of the requests that the weather made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Requests {
    pub(crate) served: u64,
    /// All connections were in use for too long.
    pub(crate) exhausted: u64,
    /// The server could not be reached in time.
    pub(crate) unavailable: u64,
    /// The server said no: a wrong password, say.
    pub(crate) refused: u64,
    /// A query failed.
    pub(crate) failed: u64,
}

#[derive(Default)]
struct Counters {
    served: AtomicU64,
    exhausted: AtomicU64,
    unavailable: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// Why weather was not made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It needs a server of this program's own.
    NotOurServer,
    /// This very thing goes on already.
    Already,
    TooMuch,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NotOurServer => "only on a database of its own: DATABASE_URL names another's",
            Refusal::Already => "that goes on already",
            Refusal::TooMuch => "enough weather for now",
        })
    }
}

/// Cheap to clone: all have the same weather.
#[derive(Clone)]
pub(crate) struct Weather(Arc<Shared>);

struct Shared {
    pool: Db,
    private: Option<Arc<Private>>,
    counters: Counters,
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Default)]
struct Now {
    /// Each silence counts one up, and ends what began before it.
    silences: u64,
    /// No more, for ever.
    over: bool,
    threads: Vec<(Kind, JoinHandle<()>)>,
    /// What happened, for the page to tell: when, and what.
    journal: Vec<(Instant, String)>,
}

impl Weather {
    pub(crate) fn new(pool: Db, private: Option<Arc<Private>>) -> Weather {
        Weather(Arc::new(Shared {
            pool,
            private,
            counters: Counters::default(),
            now: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    pub(crate) fn is_private(&self) -> bool {
        self.0.private.is_some()
    }

    /// What goes on.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let now = self.0.now();
        Kind::ALL.into_iter().filter(|&kind| now.goes_on(kind)).collect()
    }

    pub(crate) fn requests(&self) -> Requests {
        let c = &self.0.counters;
        let [served, exhausted, unavailable, refused, failed] =
            [&c.served, &c.exhausted, &c.unavailable, &c.refused, &c.failed].map(|n| n.load(Ordering::Relaxed));
        Requests { served, exhausted, unavailable, refused, failed }
    }

    /// Takes what has happened since it was last taken.
    pub(crate) fn take_journal(&self) -> Vec<(Instant, String)> {
        std::mem::take(&mut self.0.now().journal)
    }

    pub(crate) fn make(&self, kind: Kind) -> Result<(), Refusal> {
        let mut now = self.0.now();
        if kind == Kind::Silence {
            now.silences += 1;
            now.tell("silence");
            self.0.changed.notify_all();
            return Ok(());
        }
        if kind.needs_private() && self.0.private.is_none() {
            return Err(Refusal::NotOurServer);
        }
        now.threads.retain(|(_, thread)| !thread.is_finished());
        // These two would undo each other.
        if kind.needs_private() && (now.goes_on(Kind::Restart) || now.goes_on(Kind::Rotate)) {
            return Err(Refusal::Already);
        }
        if now.over || now.threads.len() + kind.threads() > MOST {
            return Err(Refusal::TooMuch);
        }
        let burst = Arc::new((Mutex::new(0), Condvar::new()));
        for i in 1..=kind.threads() {
            let shower = Shower {
                shared: Arc::clone(&self.0),
                silence: now.silences,
                until: Instant::now() + kind.lasts(),
                burst: Arc::clone(&burst),
            };
            let name = format!("{}-{i}", kind.as_str());
            let thread = thread::Builder::new().name(name).spawn(move || {
                if let Err(e) = shower.run(kind) {
                    // `Cause` has the error's sources as well.
                    let what = format!("{}: {}", kind.as_str(), Cause::text(&*e));
                    error!("{what}");
                    shower.shared.now().tell(&what);
                }
            });
            // Without a thread there is less weather.
            match thread {
                Ok(thread) => now.threads.push((kind, thread)),
                Err(e) => warn!("no thread: {e}"),
            }
        }
        if !kind.needs_private() {
            now.tell(match kind {
                Kind::Burst => "a burst of 17",
                Kind::Trickle => "a trickle begins",
                Kind::Steady => "a steady load begins",
                _ => "a worker is stuck",
            });
        }
        Ok(())
    }

    /// Ends all weather, and makes no more.
    pub(crate) fn stop(&self) {
        let mut now = self.0.now();
        now.over = true;
        now.silences += 1;
        self.0.changed.notify_all();
    }
}

impl millpond::Workers for Weather {
    fn finish(&mut self, deadline: Instant) -> bool {
        let mut threads: Vec<_> = self.0.now().threads.drain(..).map(|(_, thread)| thread).collect();
        threads.finish(deadline)
    }
}

impl Shared {
    fn now(&self) -> MutexGuard<'_, Now> {
        // Nothing in it is left half done by a panic.
        self.now.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Now {
    fn goes_on(&self, kind: Kind) -> bool {
        self.threads.iter().any(|(k, thread)| *k == kind && !thread.is_finished())
    }

    fn tell(&mut self, what: &str) {
        info!("weather: {what}");
        self.journal.push((Instant::now(), what.to_owned()));
    }
}

/// One thread's part of the weather.
struct Shower {
    shared: Arc<Shared>,
    silence: u64,
    until: Instant,
    /// How many of its burst have a connection.
    burst: Arc<(Mutex<usize>, Condvar)>,
}

impl Shower {
    fn run(&self, kind: Kind) -> Result<(), Failure> {
        match kind {
            Kind::Burst => self.request("SELECT pg_sleep(1)", || self.meet()),
            Kind::Trickle => {
                while self.pause(Duration::from_millis(400)) {
                    self.request("SELECT count(*) FROM notes", || true);
                }
            }
            Kind::Steady => {
                while self.pause(Duration::from_millis(20)) {
                    self.request("SELECT pg_sleep(0.04)", || true);
                }
            }
            Kind::Stuck => self.forget()?,
            Kind::Restart => self.restart()?,
            Kind::Rotate => self.rotate()?,
            Kind::Silence => {}
        }
        Ok(())
    }

    /// Waits, and says whether to go on.
    fn pause(&self, pause: Duration) -> bool {
        let now = self.shared.now();
        let (now, _) = self
            .shared
            .changed
            .wait_timeout_while(now, pause, |now| now.silences == self.silence)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        now.silences == self.silence && Instant::now() < self.until
    }

    /// Waits for a connection, unless there is silence.
    fn get(&self) -> Result<Client, millpond::Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shared.pool.get_timeout(left.min(SLICE)) {
                Err(e) if e.is_timeout() && left > SLICE && self.shared.now().silences == self.silence => {}
                result => return result,
            }
        }
    }

    /// Gets a connection, does `before`, and then asks, unless that says no.
    fn request(&self, sql: &str, before: impl FnOnce() -> bool) {
        let c = &self.shared.counters;
        let counter = match self.get() {
            Ok(mut client) if before() => match client.query_cached(sql, &[]) {
                Ok(_) => &c.served,
                Err(_) => &c.failed,
            },
            Ok(_) => return,
            Err(e) if e.is_exhausted() => &c.exhausted,
            Err(e) if e.is_connect() => &c.refused,
            Err(_) => &c.unavailable,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until all of this burst have a connection: even if it takes a while to open them, they are in use at once.
    /// Whether there is no silence meanwhile.
    fn meet(&self) -> bool {
        *self.burst.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
        self.burst.1.notify_all();
        let all = Kind::Burst.threads().min(self.shared.pool.max_size() as usize);
        let over = Instant::now() + MEET;
        loop {
            let met = self.burst.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let waited = self.burst.1.wait_timeout_while(met, MEET_SLICE, |met| *met < all);
            let have_met = *waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0 >= all;
            if self.shared.now().silences != self.silence {
                return false;
            }
            if have_met || Instant::now() >= over {
                return true;
            }
        }
    }

    fn forget(&self) -> Result<(), Failure> {
        let mut client = self.get()?;
        client.batch_execute("BEGIN; SELECT count(*) FROM notes")?;
        self.pause(Kind::Stuck.lasts());
        // The pool rolls back what it finds begun.
        Ok(())
    }

    fn restart(&self) -> Result<(), Failure> {
        let Some(private) = &self.shared.private else { return Ok(()) };
        self.some_requests();
        self.shared.now().tell("the server stops");
        private.stop()?;
        self.pause(Kind::Restart.lasts());
        private.start_again()?;
        self.shared.now().tell("the server has started again");
        Ok(())
    }

    fn rotate(&self) -> Result<(), Failure> {
        let Some(private) = &self.shared.private else { return Ok(()) };
        self.some_requests();
        let password = private.rotate_password()?;
        // Sessions outlive their password. Without this nothing would be seen until one is replaced.
        self.shared.pool.recycle();
        self.shared.now().tell("the password is another one; all connections are replaced");
        self.pause(Kind::Rotate.lasts());
        private.tell_password(password);
        // And the refusal is forgotten, which the pool would remember for a while.
        self.shared.pool.recycle();
        self.shared.now().tell("the pool was told the new password");
        Ok(())
    }

    /// An outage is seen by those who ask for connections.
    fn some_requests(&self) {
        let weather = Weather(Arc::clone(&self.shared));
        if !weather.kinds().contains(&Kind::Trickle) {
            let _ = weather.make(Kind::Trickle);
        }
    }
}
