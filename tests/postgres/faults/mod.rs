//! The rows of `docs/faults.md` that have no test elsewhere: what users, the server and the pool see of a fault that is
//! made on purpose, under load, and within which time it is over.
//!
//! Users ask over and over for a connection and run a short query on it. Of each row is asserted that no user sees an
//! error beyond those whose query was in flight; that every user is served again within a bound; how many logins and
//! attempts that took; and that the server has as many connections as the pool says, and in the end none.

mod host;
mod network;
mod server;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::{EPSILON, SOON, Server, assert_no_threads, ms, wait_until, within};
use millpond::Builder;
use millpond::postgres::{Pool, PostgresManager};
use parking_lot::{Mutex, MutexGuard};
use postgres::NoTls;

/// The pool tries to log in at least this often while a user waits.
const BACKOFF: Duration = Duration::from_secs(1);
/// The same while nobody listens, and once more as soon as the server, which starts, has said so.
const NOBODY: Duration = ms(200 + 50);
/// How long a connect with its first queries takes at most, beside other tests that load the machine.
const CONNECT: Duration = Duration::from_secs(1);
/// Within what time every user is served again once the server can be reached.
const SERVED: Duration = BACKOFF.saturating_add(CONNECT);
/// The limit of a check, and what a check that hangs costs.
const VALIDATION: Duration = ms(300);
const USERS: usize = 8;
const SIZE: u32 = 4;
/// How many opens may be under way when the first of them fails.
const PARALLEL_OPENS: u64 = 4;

/// A server that tests stop, damage and start again, one after the other: each leaves it running.
fn unsettled() -> MutexGuard<'static, Server> {
    static UNSETTLED: OnceLock<Mutex<Server>> = OnceLock::new();
    let settings =
        [("log_connections", "on"), ("wal_level", "replica"), ("max_wal_senders", "8"), ("hot_standby", "off")];
    UNSETTLED.get_or_init(|| Mutex::new(Server::with(&settings))).lock()
}

/// A pool of [`SIZE`] connections for [`USERS`] users, who wait for as long as any fault here lasts.
fn builder(params: &str, name: &str) -> Builder<PostgresManager<NoTls>> {
    let manager = PostgresManager::parse(params, NoTls).expect("an address");
    let builder = manager.builder().name(name).max_size(SIZE).connection_timeout(SOON);
    builder.validation_timeout(VALIDATION).close_timeout(ms(500))
}

/// As many idle connections as the pool may have.
#[track_caller]
fn fill(pool: &Pool) {
    let all: Vec<_> = (0..SIZE).map(|_| pool.get().expect("a connection")).collect();
    drop(all);
    assert!(wait_until(within(SOON), || pool.stats().idle == SIZE), "{}", pool.stats());
}

/// How often somebody has logged in under the name of `app`, on a server with `log_connections`.
fn logins(server: &Server, app: &str) -> usize {
    let name = format!("application_name={app}");
    let log = server.log();
    log.lines().filter(|line| line.contains("connection authorized") && line.ends_with(&name)).count()
}

/// How many attempts may fail while nobody listens for so long, and a user waits: pauses of 50 and 100 ms and then of
/// 200 ms, each shortened by a fifth at most, beside the opens that were under way. And some while the server starts.
fn attempts_in(down: Duration) -> u64 {
    PARALLEL_OPENS + 5 + (down.as_secs_f64() / 0.16) as u64
}

// ---------------------------------------------------------------------------------------------------- users

/// One turn of a user's.
#[derive(Debug)]
struct Turn {
    /// When the user had its connection.
    got: Option<Instant>,
    ended: Instant,
    error: Option<String>,
}

/// Threads that each ask for a connection and use it, over and over.
struct Users {
    pool: Pool,
    over: Arc<AtomicBool>,
    /// When each was served last.
    served: Arc<Mutex<Vec<Instant>>>,
    threads: Vec<JoinHandle<Vec<Turn>>>,
}

/// What all users have seen: a list for each.
struct Account(Vec<Vec<Turn>>);

impl Users {
    fn start(pool: &Pool) -> Users {
        Users::running(pool, USERS, "SELECT pg_sleep(0.004)")
    }

    fn running(pool: &Pool, users: usize, query: &'static str) -> Users {
        let over = Arc::new(AtomicBool::new(false));
        let served = Arc::new(Mutex::new(vec![Instant::now(); users]));
        let user = |n| {
            let (pool, over, served) = (pool.clone(), Arc::clone(&over), Arc::clone(&served));
            thread::spawn(move || {
                let mut turns = Vec::new();
                while !over.load(SeqCst) {
                    let turn = turn(&pool, query);
                    if turn.error.is_none() {
                        served.lock()[n] = turn.ended;
                    }
                    turns.push(turn);
                    thread::sleep(ms(2));
                }
                turns
            })
        };
        Users { threads: (0..users).map(user).collect(), over, served, pool: pool.clone() }
    }

    /// Goes on until every user was served after `back`, or should have been, and a little longer.
    fn end_after(self, back: Instant, limit: Duration) -> Account {
        let _ = wait_until(back + limit, || self.served.lock().iter().all(|&served| served > back));
        thread::sleep(ms(200));
        self.end()
    }

    /// Has the users end. A query that hangs ends with the pool, and its user fails.
    fn stop(&self) {
        self.over.store(true, SeqCst);
        if !wait_until(within(SOON * 2), || self.threads.iter().all(JoinHandle::is_finished)) {
            let _ = self.pool.close(Duration::ZERO);
        }
    }

    fn end(mut self) -> Account {
        self.stop();
        let threads = std::mem::take(&mut self.threads);
        Account(threads.into_iter().map(|user| user.join().expect("a user")).collect())
    }
}

/// A test that fails leaves no user behind.
impl Drop for Users {
    fn drop(&mut self) {
        self.stop();
        for user in self.threads.drain(..) {
            let _ = user.join();
        }
    }
}

/// By the simple protocol, for a pooler's sake.
fn turn(pool: &Pool, query: &str) -> Turn {
    match pool.get() {
        Ok(mut client) => {
            let got = Some(Instant::now());
            let error = client.simple_query(query).err().map(|e| format!("{e:?}"));
            Turn { got, ended: Instant::now(), error }
        }
        Err(e) => Turn { got: None, ended: Instant::now(), error: Some(e.to_string()) },
    }
}

impl Account {
    fn failed(&self) -> Vec<&Turn> {
        self.0.iter().flatten().filter(|turn| turn.error.is_some()).collect()
    }

    /// No user has failed but those whose query a fault met: one for each of so many connections. Whoever waited for a
    /// connection got one.
    #[track_caller]
    fn assert_only_in_flight(&self, connections: usize) {
        let failed = self.failed();
        let unserved: Vec<_> = failed.iter().filter(|turn| turn.got.is_none()).collect();
        assert!(unserved.is_empty(), "{} got no connection: {:?}", unserved.len(), unserved[0]);
        assert!(failed.len() <= connections, "{} for {connections} in flight: {failed:?}", failed.len());
    }

    /// Every user is served within `limit` of `back`, and no user fails after that.
    #[track_caller]
    fn assert_served(&self, back: Instant, limit: Duration) {
        for turns in &self.0 {
            let first = turns.iter().find(|turn| turn.ended > back && turn.error.is_none());
            let first = first.unwrap_or_else(|| panic!("never again: {:?}", turns.last()));
            let took = first.ended - back;
            assert!(took <= limit, "not for {took:?}, and should have been within {limit:?}");
            let late = turns.iter().find(|turn| turn.ended > back + limit && turn.error.is_some());
            assert!(late.is_none(), "still fails: {late:?}");
        }
    }

    /// The longest time from `back` until a user was served.
    fn recovery(&self, back: Instant) -> Duration {
        let first = |turns: &Vec<Turn>| {
            turns.iter().find(|turn| turn.ended > back && turn.error.is_none()).map(|turn| turn.ended - back)
        };
        self.0.iter().filter_map(first).max().unwrap_or(Duration::MAX)
    }

    /// For who reads the figures: `cargo test -- --nocapture`.
    fn tell(&self, row: &str, back: Instant, logins: usize, attempts: u64) {
        let turns = self.0.iter().map(Vec::len).sum::<usize>();
        println!(
            "FAULT {row}: {} errors in {turns} turns, served again after {:.3?}, {logins} logins, {attempts} failed attempts",
            self.failed().len(),
            self.recovery(back),
        );
    }
}

// ---------------------------------------------------------------------------------------------------- the end

/// The server has the pool's connections and no others. When the pool is closed nothing is left, here or there.
#[track_caller]
fn assert_ends(pool: &Pool, server: &Server, app: &str) {
    let mut seen = (0, 0);
    let agree = wait_until(within(SOON), || {
        let stats = pool.stats();
        seen = (server.count(app), i64::from(stats.size()));
        seen.0 == seen.1 && stats.opening + stats.closing + stats.checking + stats.abandoned == 0
    });
    assert!(agree, "the server has {} and the pool {}: {}", seen.0, seen.1, pool.stats());
    assert!(seen.0 <= i64::from(pool.max_size()), "{}", pool.stats());
    assert_closes(pool);
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
}

#[track_caller]
fn assert_closes(pool: &Pool) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_no_threads(pool.name());
}
