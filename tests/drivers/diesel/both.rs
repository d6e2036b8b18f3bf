//! What holds on both. Who includes this says what an `Inner` connection is and has a `Place` for the tables.

use diesel::connection::{CacheSize, DefaultLoadingMode, InstrumentationEvent, SimpleConnection, TransactionManager};
use diesel::prelude::*;
use diesel::r2d2::TestCustomizer;
use diesel::result::{DatabaseErrorKind, Error};
use diesel_migrations::MigrationHarness;
use millpond::{Builder, CloseReason, Pool, PooledConnection};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;

use super::super::{MIGRATIONS, Manager, Wheel, count_wheels, wheel, wheels};
use super::{Inner, Place};
use crate::support::SOON;

type Pooled = PooledConnection<Manager<Inner>>;
type Transactions = <Pooled as diesel::Connection>::TransactionManager;

fn builder() -> Builder<Manager<Inner>> {
    Pool::builder().max_size(1).max_idle(None).max_lifetime(None)
}

/// A pool of one connection, to tables made by a migration.
fn pool(place: &Place) -> Pool<Manager<Inner>> {
    let pool = builder().build(place.manager()).unwrap();
    pool.get().unwrap().run_pending_migrations(MIGRATIONS).unwrap();
    pool
}

fn insert(connection: &mut Pooled, id: i32) -> QueryResult<usize> {
    diesel::insert_into(wheels::table).values(wheel(id)).execute(connection)
}

#[test]
fn a_pooled_connection_is_a_connection() {
    let place = Place::make();
    let pool = pool(&place);
    let connection = &mut pool.get().unwrap();
    for id in 1..=3 {
        assert_eq!(insert(connection, id), Ok(1));
    }
    diesel::update(wheels::table.find(2)).set(wheels::turns.eq(7)).execute(connection).unwrap();
    let all: Vec<Wheel> = wheels::table.order(wheels::id).select(Wheel::as_select()).load(connection).unwrap();
    assert_eq!(all, [wheel(1), Wheel { turns: 7, ..wheel(2) }, wheel(3)]);
    // Row by row.
    let turns = wheels::table.select(wheels::turns).load_iter::<i32, DefaultLoadingMode>(connection).unwrap();
    assert_eq!(turns.map(Result::unwrap).sum::<i32>(), 7);

    let saved: Wheel = Wheel { turns: 9, ..wheel(3) }.save_changes(connection).unwrap();
    assert_eq!(saved.turns, 9);
    diesel::sql_query("DELETE FROM wheels WHERE id = 1").execute(connection).unwrap();
    connection.batch_execute("UPDATE wheels SET turns = 0; DELETE FROM wheels WHERE id = 2").unwrap();
    assert_eq!(count_wheels(connection), 1);
    let twice = insert(connection, 3).unwrap_err();
    assert!(matches!(twice, Error::DatabaseError(DatabaseErrorKind::UniqueViolation, _)), "{twice}");

    let again = <Pooled as diesel::Connection>::establish("anywhere").err().unwrap();
    assert!(again.to_string().contains("Pool::get"), "{again}");
}

#[test]
fn what_watches_and_what_is_kept_belongs_to_the_connection_within() {
    let place = Place::make();
    let pool = pool(&place);
    let seen: Arc<Mutex<Vec<&str>>> = Arc::default();
    let diary = Arc::clone(&seen);
    let mut connection = pool.get().unwrap();
    connection.set_instrumentation(move |event: InstrumentationEvent<'_>| match event {
        InstrumentationEvent::StartQuery { .. } => diary.lock().unwrap().push("query"),
        InstrumentationEvent::CacheQuery { .. } => diary.lock().unwrap().push("cached"),
        _ => {}
    });
    connection.set_prepared_statement_cache_size(CacheSize::Disabled);
    drop(connection);
    // Of the next checkout.
    assert_eq!(count_wheels(&mut pool.get().unwrap()), 0);
    pool.get().unwrap().set_prepared_statement_cache_size(CacheSize::Unbounded);
    assert_eq!(count_wheels(&mut pool.get().unwrap()), 0);
    assert_eq!(*seen.lock().unwrap(), ["query", "query", "cached"]);
}

#[test]
fn transactions_nest_and_roll_back() {
    let place = Place::make();
    let pool = pool(&place);
    let mut connection = pool.get().unwrap();
    let result = connection.transaction(|connection| {
        insert(connection, 1)?;
        let undone: QueryResult<()> = connection.transaction(|connection| {
            insert(connection, 2)?;
            Err(Error::RollbackTransaction)
        });
        assert_eq!(undone, Err(Error::RollbackTransaction));
        insert(connection, 3)
    });
    assert_eq!(result, Ok(1));
    assert_eq!(count_wheels(&mut connection), 2);
    let undone: QueryResult<()> = connection.transaction(|connection| {
        insert(connection, 4)?;
        Err(Error::RollbackTransaction)
    });
    assert!(undone.is_err());
    // `test_transaction` never commits.
    connection.test_transaction(|connection| insert(connection, 5));
    drop(connection);
    assert_eq!(count_wheels(&mut pool.get().unwrap()), 2);
    assert_eq!(pool.stats().closes, 0, "{}", pool.stats());
}

#[test]
fn migrations_run_and_are_reverted() {
    let place = Place::make();
    let pool = builder().build(place.manager()).unwrap();
    let mut connection = pool.get().unwrap();
    assert!(connection.has_pending_migration(MIGRATIONS).unwrap());
    assert_eq!(connection.run_pending_migrations(MIGRATIONS).unwrap().len(), 1);
    assert!(!connection.has_pending_migration(MIGRATIONS).unwrap());
    insert(&mut connection, 1).unwrap();
    assert_eq!(connection.revert_all_migrations(MIGRATIONS).unwrap().len(), 1);
    assert!(insert(&mut connection, 1).is_err(), "the table is gone");
}

#[test]
fn a_transaction_that_is_open_at_the_return_reaches_nobody() {
    let place = Place::make();
    let pool = pool(&place);
    let mut connection = pool.get().unwrap();
    Transactions::begin_transaction(&mut connection).unwrap();
    insert(&mut connection, 1).unwrap();
    drop(connection);
    assert_eq!(pool.stats().closed_for(CloseReason::Broken), 1, "{}", pool.stats());

    let mut connection = pool.get_timeout(SOON).unwrap();
    assert_eq!(count_wheels(&mut connection), 0);
    insert(&mut connection, 1).unwrap();
}

#[test]
fn a_panic_in_a_transaction_costs_the_connection_and_undoes_the_work() {
    let place = Place::make();
    let pool = pool(&place);
    let user = pool.clone();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        user.get().unwrap().transaction(|connection| -> QueryResult<()> {
            insert(connection, 1)?;
            panic!("in the middle of something (this panic is part of the test)");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1, "{}", pool.stats());
    assert_eq!(count_wheels(&mut pool.get_timeout(SOON).unwrap()), 0);
}

#[test]
fn a_test_transaction_outlives_each_checkout_and_is_never_committed() {
    let place = Place::make();
    // (Its own connection has the file locked for a moment while it closes.)
    assert!(pool(&place).close(SOON).is_complete());
    let tests = builder().connection_customizer(Box::new(TestCustomizer)).build(place.manager()).unwrap();
    for id in 1..=3 {
        let mut connection = tests.get().unwrap();
        insert(&mut connection, id).unwrap();
        // One of the test's own within it.
        let undone: QueryResult<()> = connection.transaction(|connection| {
            insert(connection, 100)?;
            Err(Error::RollbackTransaction)
        });
        assert!(undone.is_err());
    }
    // From another thread as well: it is in the connection, and there is one.
    let seen = thread::scope(|scope| scope.spawn(|| count_wheels(&mut tests.get().unwrap())).join().unwrap());
    assert_eq!((seen, tests.stats().closes), (3, 0), "{}", tests.stats());

    let report = tests.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(count_wheels(&mut pool(&place).get().unwrap()), 0);
}

#[test]
fn a_test_transaction_begun_by_hand_does_the_same() {
    let place = Place::make();
    let pool = pool(&place);
    let mut connection = pool.get().unwrap();
    connection.begin_test_transaction().unwrap();
    insert(&mut connection, 1).unwrap();
    drop(connection);
    let mut connection = pool.get().unwrap();
    assert_eq!((count_wheels(&mut connection), pool.stats().closes), (1, 0), "{}", pool.stats());
    PooledConnection::discard(connection);
    assert_eq!(count_wheels(&mut pool.get_timeout(SOON).unwrap()), 0);
}
