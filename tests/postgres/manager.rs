//! PostgreSQL's own manager on a real server.

use crate::support::{Database, SOON, ms};
use millpond::postgres::{Error, Pool, PostgresManager};
use postgres::NoTls;
use postgres::error::SqlState;
use std::time::{Duration, Instant};

fn manager(params: &str) -> PostgresManager<NoTls> {
    PostgresManager::parse(params, NoTls).unwrap()
}

/// Whether no transaction is open, in the server's words: outside of one there are no savepoints.
fn is_clean(client: &mut postgres::Client) -> bool {
    client.batch_execute("SAVEPOINT probe").is_err_and(|e| e.code() == Some(&SqlState::NO_ACTIVE_SQL_TRANSACTION))
}

/// Closes the pool. The server has nothing left of it.
fn ends(pool: Pool, app: &str) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(Database::get().wait_for(app, 0, Instant::now() + SOON), 0, "{app}");
}

#[test]
fn a_line_starts_it() {
    let _beside = crate::support::beside_others();
    let db = Database::get();
    let pool = millpond::postgres::builder(&db.conninfo("start")).unwrap().name("start").open().unwrap();
    let mut client = pool.get().unwrap();
    let row = client.query_one("SELECT 40 + 2, pg_backend_pid()", &[]).unwrap();
    assert_eq!(row.get::<_, i32>(0), 42);
    assert!(client.is_observed());
    assert_eq!(client.backend_pid(), Some(row.get(1)));
    assert_eq!(pool.connections()[0].server_id, Some(row.get::<_, i32>(1) as u64));
    drop(client);
    ends(pool, "start");
}

#[test]
fn an_open_transaction_does_not_reach_the_next() {
    let _beside = crate::support::beside_others();
    let db = Database::get();
    for params in [db.conninfo("handover"), db.conninfo("handover") + " sslmode=disable"] {
        for observe in [true, false] {
            let pool = manager(&params).observe(observe).builder().max_size(1).open().unwrap();
            for left in ["BEGIN", "BEGIN; SELECT 1", "BEGIN; SELECT nonsense"] {
                let mut client = pool.get().unwrap();
                let result = client.batch_execute(left);
                assert_eq!(result.is_err(), left.contains("nonsense"), "{left}: {result:?}");
                assert!(!is_clean(&mut client), "{left} leaves a transaction open");
                drop(client);
                let mut client = pool.get().unwrap();
                assert!(is_clean(&mut client), "{left}, observed: {observe}");
            }
            assert_eq!(pool.stats().opens, 1, "rolled back, not replaced");
            ends(pool, "handover");
        }
    }
}

#[test]
fn a_clean_return_costs_nothing() {
    let _beside = crate::support::beside_others();
    let db = Database::get();
    let pool = millpond::postgres::builder(&db.conninfo("clean")).unwrap().max_size(1).open().unwrap();
    for _ in 0..100 {
        let mut client = pool.get_timeout(ms(5_000)).unwrap();
        client.query("SELECT 1", &[]).unwrap();
        drop(client);
        assert_eq!(pool.state().idle_connections, 1, "neither checked nor reset");
    }
    ends(pool, "clean");
}

#[test]
fn no_such_database_fails_at_once() {
    let _beside = crate::support::beside_others();
    let db = Database::get();
    let begun = std::time::Instant::now();
    let params = db.conninfo("nodb").replace("dbname=postgres", "dbname=nosuch");
    let e = millpond::postgres::builder(&params).unwrap().open().unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(e.is_connect(), "{e:?}");
    assert!(e.to_string().contains("database \"nosuch\" does not exist"), "{e}");
    let typed = e.cause().unwrap().downcast_ref::<Error>().unwrap();
    assert_eq!(typed.code().unwrap().code(), "3D000");
}
