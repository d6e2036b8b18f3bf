//! Diesel's own `ConnectionManager`, here for SQLite, on a file.

#![allow(missing_docs, reason = "Diesel's macro writes public items without any")]

use crate::support::SOON;
use diesel::connection::{AnsiTransactionManager, SimpleConnection, TransactionManager};
use diesel::prelude::*;
use diesel::r2d2::ConnectionManager;
use millpond::{CloseReason, CustomizeConnection, Pool};
use std::thread;

type Manager = ConnectionManager<SqliteConnection>;

diesel::table! {
    wheel (id) {
        id -> Integer,
        name -> Text,
    }
}

/// Diesel re-exports r2d2's trait, so the same customizer serves both.
#[derive(Debug)]
struct Patient;

impl CustomizeConnection<SqliteConnection, diesel::r2d2::Error> for Patient {
    fn on_acquire(&self, connection: &mut SqliteConnection) -> Result<(), diesel::r2d2::Error> {
        connection.batch_execute("PRAGMA busy_timeout = 10000").map_err(diesel::r2d2::Error::QueryError)
    }
}

fn pool(folder: &tempfile::TempDir) -> Pool<Manager> {
    let manager = Manager::new(folder.path().join("mill.db").to_str().unwrap());
    let pool = Pool::builder().max_size(4).connection_customizer(Box::new(Patient)).build(manager).unwrap();
    pool.get().unwrap().batch_execute("CREATE TABLE wheel (id INTEGER PRIMARY KEY, name TEXT NOT NULL)").unwrap();
    pool
}

fn names(connection: &mut SqliteConnection) -> Vec<String> {
    wheel::table.select(wheel::name).order(wheel::id).load(connection).unwrap()
}

#[test]
fn threads_write_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    thread::scope(|scope| {
        for id in 0..12 {
            let pool = &pool;
            scope.spawn(move || {
                let mut connection = pool.get().unwrap();
                let row = (wheel::id.eq(id), wheel::name.eq(format!("wheel {id}")));
                // Diesel implements its traits for r2d2's own borrowed connection; here one borrows from ours.
                diesel::insert_into(wheel::table).values(row).execute(&mut *connection).unwrap();
            });
        }
    });
    let mut connection = pool.get().unwrap();
    let all = names(&mut connection);
    assert_eq!((all.len(), all[11].as_str()), (12, "wheel 11"));
    drop(connection);
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
}

#[test]
fn a_transaction_is_rolled_back() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    let mut connection = pool.get().unwrap();
    let undone = connection.transaction(|connection| {
        diesel::insert_into(wheel::table).values((wheel::id.eq(1), wheel::name.eq("undone"))).execute(connection)?;
        Err::<(), _>(diesel::result::Error::RollbackTransaction)
    });
    assert!(undone.is_err());
    assert_eq!(names(&mut connection), [""; 0]);
    drop(connection);
    assert_eq!(pool.stats().closes, 0, "{}", pool.stats());
}

#[test]
fn an_open_transaction_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    let mut connection = pool.get().unwrap();
    AnsiTransactionManager::begin_transaction(&mut *connection).unwrap();
    diesel::insert_into(wheel::table)
        .values((wheel::id.eq(1), wheel::name.eq("forgotten")))
        .execute(&mut *connection)
        .unwrap();
    drop(connection);
    assert_eq!(pool.stats().closed_for(CloseReason::Broken), 1, "{}", pool.stats());
    // Nor does it hold the file's lock any longer.
    let mut connection = pool.get().unwrap();
    diesel::insert_into(wheel::table)
        .values((wheel::id.eq(2), wheel::name.eq("next")))
        .execute(&mut *connection)
        .unwrap();
    assert_eq!(names(&mut connection), ["next"]);
}

#[test]
fn a_panic_costs_that_connection() {
    let folder = tempfile::tempdir().unwrap();
    let pool = pool(&folder);
    let user = pool.clone();
    let thread = thread::spawn(move || {
        let mut connection = user.get().unwrap();
        connection.batch_execute("BEGIN").unwrap();
        panic!("in the middle of something (this panic is part of the test)");
    });
    assert!(thread.join().is_err());
    pool.get().unwrap().batch_execute("BEGIN; COMMIT").unwrap();
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1, "{}", pool.stats());
}
