//! `r2d2_sqlite`, on a file. There is no server to ask: the system tells who has the file open.

use millpond::{Builder, CustomizeConnection, Pool};
use r2d2_sqlite::SqliteConnectionManager;
use r2d2_sqlite::rusqlite::{Connection, Error, Transaction, TransactionBehavior};

use crate::promises;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// A database in a folder of its own.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn make() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { folder };
        // Readers and a writer do not hold each other up.
        place.open().execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE turns (n INTEGER PRIMARY KEY)").unwrap();
        place
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("mill.db")
    }

    pub(crate) fn open(&self) -> Connection {
        Connection::open(self.file()).unwrap()
    }

    /// How many connections of this process have written, or waited to write: by their descriptors of the write-ahead log.
    /// (Those of the database itself stay open for a while: SQLite closes none while another connection of the same
    /// process has the file locked.)
    pub(crate) fn count(&self) -> usize {
        let log = self.folder.path().join("mill.db-wal");
        let descriptors = fs::read_dir("/proc/self/fd").expect("descriptors are listed in /proc, on Linux only");
        descriptors.flatten().filter(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == log)).count()
    }
}

fn manager(place: &Place) -> SqliteConnectionManager {
    SqliteConnectionManager::file(place.file())
}

/// Waits for whoever has the file locked, and needs to write as soon as it is opened.
#[derive(Debug)]
struct Writes;

impl CustomizeConnection<Connection, Error> for Writes {
    fn on_acquire(&self, connection: &mut Connection) -> Result<(), Error> {
        connection.execute_batch("PRAGMA busy_timeout = 20000; BEGIN IMMEDIATE; COMMIT")
    }
}

fn builder() -> Builder<SqliteConnectionManager> {
    Pool::builder().connection_customizer(Box::new(Writes))
}

#[test]
fn idle_ones_go_in_time() {
    let place = Place::make();
    promises::idle_ones_go_in_time(builder(), manager(&place), || place.count());
}

#[test]
fn get_keeps_its_deadline_while_an_open_hangs() {
    let place = Place::make();
    let other = place.open();
    let freeze = || Transaction::new_unchecked(&other, TransactionBehavior::Immediate).unwrap();
    // But for the one of the test's own.
    let count = || place.count() - 1;
    promises::get_keeps_its_deadline_while_an_open_hangs(builder(), manager(&place), count, freeze);
}

#[test]
fn a_panic_closes_the_pool() {
    let place = Place::make();
    promises::a_panic_closes_the_pool(builder(), manager(&place), || place.count());
}

#[test]
fn the_file_is_open_max_size_times_at_most() {
    let place = Place::make();
    let work = |connection: &mut Connection, n| {
        connection.execute("INSERT INTO turns VALUES (?)", [n]).unwrap();
    };
    promises::the_server_sees_max_size_at_most(builder(), manager(&place), || place.count(), work);
    let turns = place.open().query_row("SELECT count(*) FROM turns", [], |row| row.get(0));
    assert_eq!(turns, Ok(120));
}
