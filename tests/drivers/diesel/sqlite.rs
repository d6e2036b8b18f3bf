//! SQLite.

use diesel::connection::SimpleConnection;
use diesel::r2d2::{CustomizeConnection, Error};
use millpond::{Builder, Pool};

use super::{MIGRATIONS, Manager, count_wheels, wheel, wheels};
use crate::{promises, sqlite};
use diesel::prelude::*;
use diesel_migrations::MigrationHarness;
use r2d2_sqlite::rusqlite::{Transaction, TransactionBehavior};

#[path = "both.rs"]
mod both;

type Inner = diesel::sqlite::SqliteConnection;

struct Place(sqlite::Place);

impl Place {
    fn make() -> Place {
        Place(sqlite::Place::make())
    }

    fn url(&self) -> String {
        self.0.file().to_str().unwrap().to_owned()
    }

    fn manager(&self) -> Manager<Inner> {
        Manager::new(self.url())
    }
}

/// Waits for whoever has the file locked, and needs to write as soon as it is opened. The same customizer as for r2d2.
#[derive(Debug)]
struct Writes;

impl CustomizeConnection<Inner, Error> for Writes {
    fn on_acquire(&self, connection: &mut Inner) -> Result<(), Error> {
        connection.batch_execute("PRAGMA busy_timeout = 20000; BEGIN IMMEDIATE; COMMIT").map_err(Error::QueryError)
    }
}

fn builder() -> Builder<Manager<Inner>> {
    Pool::builder().connection_customizer(Box::new(Writes))
}

#[test]
fn idle_ones_go_in_time() {
    let place = Place::make();
    promises::idle_ones_go_in_time(builder(), place.manager(), || place.0.count());
}

#[test]
fn get_keeps_its_deadline_while_an_open_hangs() {
    let place = Place::make();
    let other = place.0.open();
    let freeze = || Transaction::new_unchecked(&other, TransactionBehavior::Immediate).unwrap();
    // But for the one of the test's own.
    let count = || place.0.count() - 1;
    promises::get_keeps_its_deadline_while_an_open_hangs(builder(), place.manager(), count, freeze);
}

#[test]
fn a_panic_closes_the_pool() {
    let place = Place::make();
    promises::a_panic_closes_the_pool(builder(), place.manager(), || place.0.count());
}

#[test]
fn the_file_is_open_max_size_times_at_most() {
    let place = Place::make();
    Inner::establish(&place.url()).unwrap().run_pending_migrations(MIGRATIONS).unwrap();
    let work = |connection: &mut Inner, id| {
        diesel::insert_into(wheels::table).values(wheel(id)).execute(connection).unwrap();
    };
    promises::the_server_sees_max_size_at_most(builder(), place.manager(), || place.0.count(), work);
    assert_eq!(count_wheels(&mut Inner::establish(&place.url()).unwrap()), 120);
}
