//! PostgreSQL.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use millpond::{CloseReason, Pool};

use super::{MIGRATIONS, Manager, count_wheels, wheel, wheels};
use crate::promises;
use crate::support::{Proxy, SOON, Server, within};
use diesel_migrations::MigrationHarness;
use std::sync::atomic::{AtomicU32, Ordering};

#[path = "both.rs"]
mod both;

type Inner = diesel::pg::PgConnection;

/// A schema of its own, on the server of all tests.
struct Place {
    name: String,
}

impl Place {
    fn make() -> Place {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("diesel-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Server::shared().connect().batch_execute(&format!("CREATE SCHEMA \"{name}\"")).unwrap();
        Place { name }
    }

    fn manager(&self) -> Manager<Inner> {
        self.through(&Server::shared().conninfo(&self.name))
    }

    fn through(&self, conninfo: &str) -> Manager<Inner> {
        Manager::new(format!("{conninfo} options='-c search_path={}'", self.name))
    }

    fn count(&self) -> usize {
        Server::shared().count(&self.name) as usize
    }
}

#[test]
fn idle_ones_go_in_time() {
    let place = Place::make();
    promises::idle_ones_go_in_time(Pool::builder(), place.manager(), || place.count());
}

/// Nothing passes, until this is dropped.
struct Paused<'a>(&'a Proxy);

impl Paused<'_> {
    fn pause(proxy: &Proxy) -> Paused<'_> {
        proxy.pause();
        Paused(proxy)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

#[test]
fn get_keeps_its_deadline_while_an_open_hangs() {
    let place = Place::make();
    let proxy = Proxy::to(Server::shared().addr());
    let manager = place.through(&proxy.conninfo(&place.name));
    let freeze = || Paused::pause(&proxy);
    promises::get_keeps_its_deadline_while_an_open_hangs(Pool::builder(), manager, || place.count(), freeze);
}

#[test]
fn get_keeps_its_deadline_while_a_check_hangs() {
    let place = Place::make();
    let proxy = Proxy::to(Server::shared().addr());
    let manager = place.through(&proxy.conninfo(&place.name));
    let freeze = || Paused::pause(&proxy);
    promises::get_keeps_its_deadline_while_a_check_hangs(Pool::builder(), manager, || place.count(), freeze);
}

#[test]
fn a_panic_closes_the_pool() {
    let place = Place::make();
    promises::a_panic_closes_the_pool(Pool::builder(), place.manager(), || place.count());
}

#[test]
fn the_server_sees_max_size_at_most() {
    let place = Place::make();
    let manager = place.manager();
    Inner::establish(&manager_url(&place)).unwrap().run_pending_migrations(MIGRATIONS).unwrap();
    let work = |connection: &mut Inner, id| {
        diesel::insert_into(wheels::table).values(wheel(id)).execute(connection).unwrap();
    };
    promises::the_server_sees_max_size_at_most(Pool::builder(), manager, || place.count(), work);
    assert_eq!(count_wheels(&mut Inner::establish(&manager_url(&place)).unwrap()), 120);
}

/// As [`Place::manager`], under another name.
fn manager_url(place: &Place) -> String {
    format!("{} options='-c search_path={}'", Server::shared().conninfo("diesel-test"), place.name)
}

/// The server ends a connection in the middle of a transaction, so that Diesel cannot.
#[test]
fn a_transaction_that_cannot_be_ended_reaches_nobody() {
    let place = Place::make();
    let pool = Pool::builder().max_size(2).build(place.manager()).unwrap();
    let mut connection = pool.get().unwrap();
    let result: QueryResult<()> = connection.transaction(|connection| {
        connection.batch_execute("SELECT 1")?;
        assert_eq!(Server::shared().terminate(&place.name), 1);
        assert_eq!(Server::shared().wait_for(&place.name, 0, within(SOON)), 0);
        connection.batch_execute("SELECT 2")
    });
    result.unwrap_err();
    drop(connection);
    assert_eq!(pool.stats().closed_for(CloseReason::Broken), 1, "{}", pool.stats());
    pool.get_timeout(SOON).unwrap().batch_execute("SELECT 3").unwrap();
}

/// Diesel's account of transactions does not see a `BEGIN` in a query. (So with r2d2, too.)
#[test]
fn a_begin_in_a_query_is_not_seen() {
    let place = Place::make();
    let pool = Pool::builder().max_size(1).build(place.manager()).unwrap();
    pool.get().unwrap().batch_execute("BEGIN").unwrap();
    assert_eq!(pool.stats().closes, 0, "{}", pool.stats());
    let states = Server::shared().backends(&place.name);
    assert!(states.iter().all(|backend| backend.state == "idle in transaction"), "{states:?}");
}

/// Diesel has `COPY` for its own connections only: they are borrowed from the pool's.
#[test]
fn copy_needs_the_connection_within() {
    let place = Place::make();
    let pool = Pool::builder().max_size(1).build(place.manager()).unwrap();
    let mut connection = pool.get().unwrap();
    connection.run_pending_migrations(MIGRATIONS).unwrap();
    let rows = (1..=3).map(wheel).collect::<Vec<_>>();
    let copied = diesel::copy_from(wheels::table).from_insertable(rows).execute(&mut *connection);
    assert_eq!((copied, count_wheels(&mut connection)), (Ok(3), 3));
}
