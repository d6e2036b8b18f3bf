//! The stock manager of `r2d2_postgres`, with everything r2d2 lets one hang onto a pool, on a real server.

use crate::stock::{Manager, SOON, finish, manager, take};
use crate::support::{Database, ms, wait_until};
use millpond::event::{AcquireEvent, CheckinEvent, CheckoutEvent, HandleEvent, ReleaseEvent, TimeoutEvent};
use millpond::{CloseReason, CustomizeConnection, HandleError, Pool, PooledConnection};
use postgres::error::SqlState;
use postgres::{Client, NoTls, Statement};
use r2d2_postgres::PostgresConnectionManager;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

fn soon() -> Instant {
    Instant::now() + SOON
}

#[test]
fn threads_write_and_read_back() {
    let pool: Pool<Manager> = Pool::builder().max_size(3).build(manager("compat-pg-threads")).unwrap();
    pool.get().unwrap().batch_execute("DROP TABLE IF EXISTS compat_pg; CREATE TABLE compat_pg (n int)").unwrap();
    thread::scope(|scope| {
        for n in 0..40 {
            let pool = &pool;
            scope.spawn(move || pool.get().unwrap().execute("INSERT INTO compat_pg VALUES ($1)", &[&n]).unwrap());
        }
    });
    let row = pool.get().unwrap().query_one("SELECT count(DISTINCT n), max(n) FROM compat_pg", &[]).unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1)), (40, 39));
    let seen = Database::get().count("compat-pg-threads");
    assert!((1..=3).contains(&seen), "the server sees {seen}");
    pool.get().unwrap().batch_execute("DROP TABLE compat_pg").unwrap();
    finish(pool, "compat-pg-threads");
}

#[test]
fn a_broken_one_is_not_checked_out_again() {
    const APP: &str = "compat-pg-broken";
    let pool = Pool::builder().max_size(2).build(manager(APP)).unwrap();
    let (mut first, second) = (pool.get().unwrap(), pool.get().unwrap());
    drop(second);
    assert_eq!(Database::get().terminate(APP), 2);
    assert_eq!(Database::get().wait_for(APP, 0, soon()), 0);

    let error = first.query_one("SELECT 1", &[]).unwrap_err();
    assert!(first.is_closed(), "{error}");
    drop(first);
    // Its sibling is not asked for its age: it is suspect from now on, found dead, and replaced.
    assert_eq!(pool.get().unwrap().query_one("SELECT 1", &[]).unwrap().get::<_, i32>(0), 1);
    let stats = pool.stats();
    let closed = [CloseReason::Broken, CloseReason::Invalid].map(|reason| stats.closed_for(reason));
    assert_eq!(closed, [1, 1], "{stats}");
    finish(pool, APP);
}

#[test]
fn tested_on_check_out() {
    const APP: &str = "compat-pg-tested";
    let pool = Pool::builder().max_size(1).test_on_check_out(true).build(manager(APP)).unwrap();
    assert_eq!(Database::get().terminate(APP), 1);
    assert_eq!(Database::get().wait_for(APP, 0, soon()), 0);
    pool.get().unwrap().query_one("SELECT 1", &[]).unwrap();
    assert_eq!(pool.stats().closed_for(CloseReason::Invalid), 1, "{}", pool.stats());
    finish(pool, APP);

    let pool = Pool::builder().max_size(1).test_on_check_out(false).build(manager(APP)).unwrap();
    assert_eq!(Database::get().terminate(APP), 1);
    assert_eq!(Database::get().wait_for(APP, 0, soon()), 0);
    pool.get().unwrap().query_one("SELECT 1", &[]).unwrap_err();
    finish(pool, APP);
}

/// Sets the time zone, and counts.
#[derive(Clone, Debug, Default)]
struct InTokyo {
    acquired: Arc<AtomicU32>,
    released: Arc<AtomicU32>,
}

impl CustomizeConnection<Client, postgres::Error> for InTokyo {
    fn on_acquire(&self, client: &mut Client) -> Result<(), postgres::Error> {
        client.batch_execute("SET timezone = 'Asia/Tokyo'")?;
        self.acquired.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn on_release(&self, mut client: Client) {
        // It is given the connection itself, while that still works.
        client.batch_execute("SELECT 1").unwrap();
        self.released.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn customized() {
    const APP: &str = "compat-pg-customized";
    let hook = InTokyo::default();
    let pool = Pool::builder().max_size(3).connection_customizer(Box::new(hook.clone())).build(manager(APP)).unwrap();
    let mut all = take(&pool, 3);
    for client in &mut all {
        assert_eq!(client.query_one("SHOW timezone", &[]).unwrap().get::<_, &str>(0), "Asia/Tokyo");
    }
    assert_eq!((hook.acquired.load(Ordering::SeqCst), hook.released.load(Ordering::SeqCst)), (3, 0));
    // A detached one is its user's.
    let mine = PooledConnection::detach(all.pop().unwrap());
    drop(all);
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(Database::get().wait_for(APP, 1, soon()), 1);
    assert_eq!((hook.acquired.load(Ordering::SeqCst), hook.released.load(Ordering::SeqCst)), (3, 2));
    drop(mine);
    assert_eq!(Database::get().wait_for(APP, 0, soon()), 0);
}

/// Fails, with the server's own error, the first time.
#[derive(Clone, Debug, Default)]
struct WrongAtFirst {
    acquired: Arc<AtomicU32>,
    released: Arc<AtomicU32>,
}

impl CustomizeConnection<Client, postgres::Error> for WrongAtFirst {
    fn on_acquire(&self, client: &mut Client) -> Result<(), postgres::Error> {
        match self.acquired.fetch_add(1, Ordering::SeqCst) {
            0 => client.batch_execute("SELECT wrong"),
            _ => Ok(()),
        }
    }

    fn on_release(&self, _: Client) {
        self.released.fetch_add(1, Ordering::SeqCst);
    }
}

/// Keeps the codes of the errors it is given.
#[derive(Clone, Debug, Default)]
struct Codes(Arc<Mutex<Vec<Option<SqlState>>>>);

impl HandleError<postgres::Error> for Codes {
    fn handle_error(&self, error: postgres::Error) {
        self.0.lock().unwrap().push(error.code().cloned());
    }
}

#[test]
fn errors_are_handed_on_as_they_are() {
    const APP: &str = "compat-pg-errors";
    let codes = Codes::default();
    let mut nowhere = Database::get().config(APP);
    nowhere.dbname("no_such_database");
    let error = Pool::builder()
        .connection_timeout(ms(1000))
        .error_handler(Box::new(codes.clone()))
        .build(PostgresConnectionManager::new(nowhere, NoTls))
        .unwrap_err();
    // r2d2 would say "db error"; the handler gets what the driver said, with its type.
    assert!(error.to_string().contains("\"no_such_database\" does not exist"), "{error}");
    assert_eq!(codes.0.lock().unwrap().first(), Some(&Some(SqlState::UNDEFINED_DATABASE)));

    let (codes, hook) = (Codes::default(), WrongAtFirst::default());
    let pool = Pool::builder()
        .max_size(1)
        .error_handler(Box::new(codes.clone()))
        .connection_customizer(Box::new(hook.clone()))
        .build(manager(APP))
        .unwrap();
    assert_eq!(*codes.0.lock().unwrap(), [Some(SqlState::UNDEFINED_COLUMN)]);
    assert_eq!((pool.stats().opens, pool.stats().failed_opens), (1, 1), "{}", pool.stats());
    finish(pool, APP);
    // Only what was acquired is released.
    assert_eq!((hook.acquired.load(Ordering::SeqCst), hook.released.load(Ordering::SeqCst)), (2, 1));
}

/// A statement that stays with the connection on which it was prepared.
struct Doubling(Statement);

#[test]
fn a_prepared_statement_stays_with_its_connection() {
    const APP: &str = "compat-pg-extensions";
    fn double(client: &mut PooledConnection<Manager>, n: i32) -> i32 {
        let known = PooledConnection::extensions(client).get::<Doubling>().map(|doubling| doubling.0.clone());
        let statement = known.unwrap_or_else(|| {
            let statement = client.prepare("SELECT $1::int4 * 2").unwrap();
            PooledConnection::extensions_mut(client).insert(Doubling(statement.clone()));
            statement
        });
        client.query_one(&statement, &[&n]).unwrap().get(0)
    }

    let pool = Pool::builder().max_size(2).build(manager(APP)).unwrap();
    for n in 0..10 {
        // One after the other, and two at a time: each connection has its own.
        let (mut one, mut two) = (pool.get().unwrap(), pool.get().unwrap());
        assert_eq!((double(&mut one, n), double(&mut two, n + 1)), (2 * n, 2 * n + 2));
        for client in [&mut one, &mut two] {
            let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%* 2'";
            assert_eq!(client.query_one(prepared, &[]).unwrap().get::<_, i64>(0), 1);
        }
    }
    PooledConnection::discard(pool.get().unwrap());
    let fresh = take(&pool, 2);
    let with = fresh.iter().filter(|client| PooledConnection::extensions(client).get::<Doubling>().is_some()).count();
    assert_eq!(with, 1, "what was attached went with the one that was discarded");
    drop(fresh);
    finish(pool, APP);
}

/// Writes down what happens, under r2d2's names.
#[derive(Clone, Debug, Default)]
struct Diary(Arc<Mutex<Vec<(&'static str, u64)>>>);

impl Diary {
    fn note(&self, what: &'static str, id: u64) {
        self.0.lock().unwrap().push((what, id));
    }

    fn so_far(&self) -> Vec<(&'static str, u64)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl HandleEvent for Diary {
    fn handle_acquire(&self, event: AcquireEvent) {
        self.note("acquire", event.connection_id());
    }

    fn handle_release(&self, event: ReleaseEvent) {
        assert!(event.age() < SOON);
        self.note("release", event.connection_id());
    }

    fn handle_checkout(&self, event: CheckoutEvent) {
        assert!(event.duration() < SOON);
        self.note("checkout", event.connection_id());
    }

    fn handle_timeout(&self, event: TimeoutEvent) {
        self.note("timeout", event.timeout().as_millis() as u64);
    }

    fn handle_checkin(&self, event: CheckinEvent) {
        assert!(event.duration() < SOON);
        self.note("checkin", event.connection_id());
    }
}

#[test]
fn events() {
    const APP: &str = "compat-pg-events";
    let diary = Diary::default();
    let pool = Pool::builder().max_size(1).event_handler(Box::new(diary.clone())).build(manager(APP)).unwrap();
    let client = pool.get().unwrap();
    let id = PooledConnection::info(&client).id;
    // `build` waits for its first connection, and checks nothing out.
    assert_eq!(diary.so_far(), [("acquire", id), ("checkout", id)]);
    assert!(pool.get_timeout(ms(20)).is_err_and(|error| error.is_exhausted()));
    assert_eq!(diary.so_far(), [("timeout", 20)]);
    drop(client);
    finish(pool, APP);
    assert_eq!(diary.so_far(), [("checkin", id), ("release", id)]);
}

#[test]
fn aged_and_idle_ones_go_by_themselves() {
    const APP: &str = "compat-pg-idle";
    let pool = Pool::builder()
        .max_size(3)
        .min_idle(Some(1))
        .idle_timeout(Some(ms(300)))
        .max_lifetime(None)
        .build(manager(APP))
        .unwrap();
    let all = take(&pool, 3);
    assert_eq!(Database::get().count(APP), 3);
    drop(all);
    assert_eq!(Database::get().wait_for(APP, 1, Instant::now() + ms(2000)), 1);
    assert!(wait_until(soon(), || pool.state().connections == 1), "{:?}", pool.state());
    finish(pool, APP);
}
