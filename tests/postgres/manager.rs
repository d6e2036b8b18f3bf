//! PostgreSQL's own manager on a real server.

use crate::support::{Database, ms};
use millpond::postgres::{Error, PostgresManager};
use postgres::NoTls;
use std::time::Duration;

fn manager(params: &str) -> PostgresManager<NoTls> {
    PostgresManager::parse(params, NoTls).unwrap()
}

/// Whether no transaction is open: in one, time stands still.
fn is_clean(client: &mut postgres::Client) -> bool {
    let answer = client.simple_query("SELECT now() = statement_timestamp()").unwrap();
    answer.iter().any(|m| matches!(m, postgres::SimpleQueryMessage::Row(row) if row.get(0) == Some("t")))
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
                let _ = client.batch_execute(left);
                drop(client);
                let mut client = pool.get().unwrap();
                assert!(is_clean(&mut client), "{left}, observed: {observe}");
            }
            assert_eq!(pool.stats().opens, 1, "rolled back, not replaced");
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
