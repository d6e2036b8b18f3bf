// A program as it is written for r2d2: millers take turns from a queue in SQLite. It names whatever r2d2 has at its root.

use r2d2::event::{AcquireEvent, CheckinEvent, CheckoutEvent, ReleaseEvent, TimeoutEvent};
use r2d2::{
    Builder, CustomizeConnection, Error, Extensions, HandleError, HandleEvent, LoggingErrorHandler, ManageConnection,
    NopConnectionCustomizer, NopErrorHandler, NopEventHandler, Pool, PooledConnection, State,
};
use r2d2_sqlite::SqliteConnectionManager;
use r2d2_sqlite::rusqlite::{self, Connection};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// What goes wrong here.
#[derive(Debug)]
pub(crate) enum Trouble {
    NoConnection(Error),
    Sql(rusqlite::Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::NoConnection(error)
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Self {
        Trouble::Sql(error)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::NoConnection(error) => write!(f, "no connection: {error}"),
            Trouble::Sql(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Trouble {}

#[derive(Debug)]
struct Patient;

impl CustomizeConnection<Connection, rusqlite::Error> for Patient {
    fn on_acquire(&self, connection: &mut Connection) -> Result<(), rusqlite::Error> {
        connection.execute_batch("PRAGMA busy_timeout = 10000")
    }
}

#[derive(Debug)]
struct Complain;

impl HandleError<rusqlite::Error> for Complain {
    fn handle_error(&self, error: rusqlite::Error) {
        eprintln!("{error}");
    }
}

#[derive(Clone, Debug, Default)]
struct Counter {
    checkouts: Arc<AtomicU64>,
}

impl HandleEvent for Counter {
    fn handle_acquire(&self, event: AcquireEvent) {
        let _ = event.connection_id();
    }

    fn handle_release(&self, event: ReleaseEvent) {
        let _ = (event.connection_id(), event.age());
    }

    fn handle_checkout(&self, event: CheckoutEvent) {
        let _ = (event.connection_id(), event.duration());
        self.checkouts.fetch_add(1, Ordering::Relaxed);
    }

    fn handle_timeout(&self, event: TimeoutEvent) {
        let _ = event.timeout();
    }

    fn handle_checkin(&self, event: CheckinEvent) {
        let _ = (event.connection_id(), event.duration());
    }
}

/// How often a connection was used, which stays with it.
#[derive(Clone, Copy)]
struct Uses(u32);

fn used<M: ManageConnection>(connection: &mut PooledConnection<M>) -> u32 {
    let extensions: &mut Extensions = PooledConnection::extensions_mut(connection);
    let uses = extensions.get::<Uses>().map_or(1, |uses| uses.0 + 1);
    extensions.insert(Uses(uses));
    PooledConnection::extensions(connection).get::<Uses>().map_or(0, |uses| uses.0)
}

struct Mill {
    pool: Pool<SqliteConnectionManager>,
    counter: Counter,
}

impl Mill {
    fn open(file: &str) -> Result<Mill, Trouble> {
        let counter = Counter::default();
        let pool = Pool::builder()
            .max_size(3)
            .min_idle(Some(1))
            .max_lifetime(Some(Duration::from_secs(1800)))
            .idle_timeout(Some(Duration::from_secs(60)))
            .connection_timeout(Duration::from_secs(20))
            .test_on_check_out(true)
            .connection_customizer(Box::new(Patient))
            .error_handler(Box::new(Complain))
            .event_handler(Box::new(counter.clone()))
            .build(SqliteConnectionManager::file(file))?;
        Ok(Mill { pool, counter })
    }

    fn turn(&self, n: u32) -> Result<u32, Trouble> {
        let mut connection = self.pool.get()?;
        let transaction = connection.transaction()?;
        transaction.execute("INSERT INTO turns VALUES (?)", [n])?;
        transaction.commit()?;
        Ok(used(&mut connection))
    }
}

/// How many turns were made, how often a connection was checked out, and what the pool holds.
pub(crate) fn run(file: &str) -> Result<(u32, u64, u32), Trouble> {
    let mill = Mill::open(file)?;
    mill.pool.get_timeout(Duration::from_secs(20))?.execute_batch("CREATE TABLE turns (n INTEGER)")?;
    thread::scope(|scope| {
        let millers: Vec<_> = (0..6).map(|n| (n, &mill)).map(|(n, mill)| scope.spawn(move || mill.turn(n))).collect();
        millers.into_iter().try_for_each(|miller| {
            assert!(miller.join().expect("a miller")? >= 1);
            Ok::<_, Trouble>(())
        })
    })?;
    let turns = mill.pool.get()?.query_row("SELECT count(*) FROM turns", [], |row| row.get(0))?;
    let State { connections, idle_connections, .. } = mill.pool.state();
    assert!(idle_connections <= connections && connections <= mill.pool.max_size());
    Ok((turns, mill.counter.checkouts.load(Ordering::Relaxed), connections))
}

/// What r2d2 has for who wants nothing done.
pub(crate) fn plain() -> Result<bool, Trouble> {
    let builder: Builder<SqliteConnectionManager> = Builder::new();
    let pool = builder
        .max_size(1)
        .connection_customizer(Box::new(NopConnectionCustomizer))
        .error_handler(Box::new(NopErrorHandler))
        .event_handler(Box::new(NopEventHandler))
        .build(SqliteConnectionManager::memory())?;
    let used = pool.get()?;
    let none = pool.try_get().is_none() && pool.get_timeout(Duration::from_millis(1)).is_err();
    drop((used, pool));
    let builder = Pool::builder().error_handler(Box::new(LoggingErrorHandler));
    let pool = builder.build_unchecked(SqliteConnectionManager::memory());
    let limits = (pool.max_lifetime(), pool.idle_timeout(), pool.connection_timeout());
    assert_eq!(limits.2, Duration::from_secs(30), "{limits:?}");
    Ok(none && pool.get().is_ok() && Pool::new(SqliteConnectionManager::memory()).is_ok())
}
