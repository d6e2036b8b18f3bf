//! How soon a user is served once a server is back: the faults of `faults` that matter most, without the table.

use crate::support::Server;
use millpond::postgres::PostgresManager;
use postgres::{Client, NoTls};
use r2d2_postgres::PostgresConnectionManager;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u32 = 4;
/// How long a checkout may wait.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Between two calls.
const PAUSE: Duration = Duration::from_millis(20);
/// From the first calls to the outage.
const BEFORE: Duration = Duration::from_millis(300);

/// What came of one pool in one outage.
#[derive(Clone, Copy)]
pub(crate) struct Outage {
    /// From when the server accepts connections to the end of the first call that went well.
    pub(crate) first: Duration,
    /// Connects that failed, from the stop to that.
    pub(crate) attempts: u64,
}

/// Millpond's and r2d2's, each on a server of its own, at the same time.
pub(crate) fn both(lasts: Duration) -> [Outage; 2] {
    thread::scope(|s| {
        let mine = s.spawn(|| millpond(lasts));
        let theirs = r2d2(lasts);
        [mine.join().expect("an outage"), theirs]
    })
}

fn millpond(lasts: Duration) -> Outage {
    let server = Server::start();
    let manager = PostgresManager::new(server.config("millpond"), NoTls);
    let pool = manager.builder().max_size(SIZE).connection_timeout(TIMEOUT).open().expect("a pool");
    let call = || -> Result<(), Box<dyn Error>> {
        pool.get()?.simple_query("SELECT 1")?;
        Ok(())
    };
    strike(&server, lasts, call, || pool.stats().failed_opens)
}

/// With the stock manager, and its test, by which alone it sees that a server is gone.
fn r2d2(lasts: Duration) -> Outage {
    let server = Server::start();
    let failed = Arc::new(AtomicU64::new(0));
    let stock = PostgresConnectionManager::new(server.config("r2d2"), NoTls);
    let manager = Counting { stock, failed: Arc::clone(&failed) };
    // It would log each of them.
    let handler = Box::new(r2d2::NopErrorHandler);
    let builder = r2d2::Pool::builder().max_size(SIZE).connection_timeout(TIMEOUT).error_handler(handler);
    let pool = builder.build(manager).expect("a pool");
    let call = || -> Result<(), Box<dyn Error>> {
        pool.get()?.simple_query("SELECT 1")?;
        Ok(())
    };
    strike(&server, lasts, call, || failed.load(Ordering::Relaxed))
}

/// One user asks again and again while the server is stopped and, `lasts` later, started again.
fn strike(
    server: &Server,
    lasts: Duration,
    call: impl Fn() -> Result<(), Box<dyn Error>>,
    failed: impl Fn() -> u64,
) -> Outage {
    let ask_until = |end: Instant| {
        while Instant::now() < end {
            let _ = call();
            thread::sleep(PAUSE);
        }
    };
    ask_until(Instant::now() + BEFORE);
    server.stop_fast();
    let (stopped, failed_before) = (Instant::now(), failed());
    thread::scope(|s| {
        let operator = s.spawn(move || {
            thread::sleep((stopped + lasts).saturating_duration_since(Instant::now()));
            server.start_again();
            Instant::now()
        });
        // Until a success that no stopped server can have given.
        let first = loop {
            if call().is_ok() {
                break Instant::now();
            }
            thread::sleep(PAUSE);
        };
        let attempts = failed() - failed_before;
        let up = operator.join().expect("a server that starts again");
        Outage { first: first.saturating_duration_since(up), attempts }
    })
}

/// The stock manager, and how many of its connects failed.
struct Counting {
    stock: PostgresConnectionManager<NoTls>,
    failed: Arc<AtomicU64>,
}

impl r2d2::ManageConnection for Counting {
    type Connection = Client;
    type Error = postgres::Error;

    fn connect(&self) -> Result<Client, postgres::Error> {
        let connected = self.stock.connect();
        self.failed.fetch_add(u64::from(connected.is_err()), Ordering::Relaxed);
        connected
    }

    fn is_valid(&self, client: &mut Client) -> Result<(), postgres::Error> {
        self.stock.is_valid(client)
    }

    fn has_broken(&self, client: &mut Client) -> bool {
        self.stock.has_broken(client)
    }
}
