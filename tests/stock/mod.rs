//! Pools of stock `r2d2_postgres` connections on the test's server, and how a test ends with one.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "compiled into each test on its own, none of which uses all of it"
)]

mod counted;

use std::sync::Barrier;
use std::time::{Duration, Instant};

use millpond::{Manage, Pool, PooledConnection};
use postgres::{Client, NoTls};
use r2d2_postgres::PostgresConnectionManager;

use crate::support::Database;

pub use crate::support::{SEEN, SOON};
pub use counted::{Account, Counting};

pub type Manager = PostgresConnectionManager<NoTls>;

/// The stock manager, whose connections the server knows as `app`.
pub fn manager(app: &str) -> Manager {
    PostgresConnectionManager::new(Database::get().config(app), NoTls)
}

/// The server's name for this connection, by a query on it.
pub fn pid(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).expect("a working connection").get(0)
}

/// One use of a connection, returned between the two moments.
#[derive(Clone, Copy, Debug)]
pub struct Use {
    pub pid: i32,
    pub before: Instant,
    pub after: Instant,
}

/// One query.
pub fn use_one(pool: &Pool<Manager>) -> Use {
    let mut conn = pool.get().expect("a connection");
    let pid = pid(&mut conn);
    let before = Instant::now();
    drop(conn);
    Use { pid, before, after: Instant::now() }
}

/// As many threads at once have a connection each, use it and return it. The uses in the order of their returns.
pub fn burst(pool: &Pool<Manager>, threads: usize) -> Vec<Use> {
    let all_have_one = Barrier::new(threads);
    let mut uses: Vec<Use> = std::thread::scope(|scope| {
        let spawn = |_| {
            scope.spawn(|| {
                let mut conn = pool.get().expect("a connection");
                let pid = pid(&mut conn);
                all_have_one.wait();
                let before = Instant::now();
                drop(conn);
                Use { pid, before, after: Instant::now() }
            })
        };
        let threads: Vec<_> = (0..threads).map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread of the burst")).collect()
    });
    uses.sort_by_key(|one| one.after);
    uses
}

/// The connections one after the other, the last used first, all in use at the same time.
pub fn take<M: Manage>(pool: &Pool<M>, n: usize) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get().expect("a connection")).collect()
}

/// Closes a pool of which nothing is in use: nothing may be left of it, here or on the server.
pub fn finish<M: Manage>(pool: Pool<M>, app: &str) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_gone(app);
}

/// The server has no connection of this name left, or has none when its processes have ended.
pub fn assert_gone(app: &str) {
    assert_eq!(Database::get().wait_for(app, 0, Instant::now() + SOON), 0, "{app}");
}
