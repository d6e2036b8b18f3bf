//! The stock manager of `r2d2_sqlite`, on a file.

use crate::support::SOON;
use millpond::{CustomizeConnection, Pool, PooledConnection};
use r2d2_sqlite::SqliteConnectionManager;
use r2d2_sqlite::rusqlite::{self, Connection};
use std::thread;
use std::time::Duration;

/// What SQLite forgets with each connection.
#[derive(Debug)]
struct Pragmas;

impl CustomizeConnection<Connection, rusqlite::Error> for Pragmas {
    fn on_acquire(&self, connection: &mut Connection) -> Result<(), rusqlite::Error> {
        connection.busy_timeout(SOON)?;
        connection.execute_batch("PRAGMA foreign_keys = ON")
    }
}

fn pool(folder: &tempfile::TempDir) -> Pool<SqliteConnectionManager> {
    let manager = SqliteConnectionManager::file(folder.path().join("mill.db"));
    let pool = Pool::builder().max_size(4).connection_customizer(Box::new(Pragmas)).build(manager).unwrap();
    let tables = "CREATE TABLE wheel (id INTEGER PRIMARY KEY);
                  CREATE TABLE blade (wheel INTEGER NOT NULL REFERENCES wheel, n INTEGER NOT NULL);
                  INSERT INTO wheel VALUES (1)";
    pool.get().unwrap().execute_batch(tables).unwrap();
    pool
}

#[test]
fn threads_write_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    thread::scope(|scope| {
        for n in 0..20 {
            let pool = &pool;
            scope.spawn(move || pool.get().unwrap().execute("INSERT INTO blade VALUES (1, ?)", [n]).unwrap());
        }
    });
    let sum = pool.get().unwrap().query_row("SELECT count(*) * 1000 + sum(n) FROM blade", [], |row| row.get(0));
    assert_eq!(sum, Ok(20_190));
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    // The file is nobody's any more.
    let after = Connection::open(folder.path().join("mill.db")).unwrap();
    after.execute_batch("BEGIN EXCLUSIVE; DROP TABLE blade; COMMIT").unwrap();
}

#[test]
fn every_connection_is_customized() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    let mut all: Vec<_> = (0..4).map(|_| pool.get().unwrap()).collect();
    for connection in &mut all {
        let error = connection.execute("INSERT INTO blade VALUES (7, 7)", []).unwrap_err();
        assert!(error.to_string().contains("FOREIGN KEY"), "{error}");
    }
    // A transaction borrows from it, and a forgotten one is the next user's trouble: `discard` is there for that.
    let transaction = all[0].transaction().unwrap();
    transaction.execute("INSERT INTO blade VALUES (1, 7)", []).unwrap();
    transaction.commit().unwrap();
    all[1].execute_batch("BEGIN").unwrap();
    PooledConnection::discard(all.swap_remove(1));
    drop(all);
    let all: Vec<_> = (0..4).map(|_| pool.get().unwrap()).collect();
    assert!(all.iter().all(|connection| connection.is_autocommit()));
}

#[test]
fn one_in_memory_is_shared() {
    let pool = Pool::new(SqliteConnectionManager::memory()).unwrap();
    let (one, two) = (pool.get().unwrap(), pool.get().unwrap());
    one.execute_batch("CREATE TABLE t AS SELECT 42 AS n").unwrap();
    assert_eq!(two.query_row("SELECT n FROM t", [], |row| row.get(0)), Ok(42));
}

#[test]
fn what_sqlite_says_is_the_cause() {
    let manager = SqliteConnectionManager::file("/no/such/folder/mill.db");
    let error = Pool::builder().connection_timeout(Duration::from_secs(1)).build(manager).unwrap_err();
    assert!(error.is_timeout() && error.to_string().contains("unable to open database file"), "{error}");
}
