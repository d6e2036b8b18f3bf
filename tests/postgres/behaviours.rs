//! What the tests of other pools check on a real server, and what no other file here shows. `docs/behaviours.md` lists
//! their tests, each with the test that shows the same of this pool.

use std::thread;

use crate::support::{SOON, Server, beside_others, wait_until, watched, within};
use millpond::postgres::{Pool, PostgresManager, Reset};
use postgres::{Client, NoTls, SimpleQueryMessage};

fn manager(app: &str, observed: bool) -> PostgresManager<NoTls> {
    PostgresManager::parse(&Server::shared().conninfo(app), NoTls).unwrap().observe(observed)
}

fn pool(manager: PostgresManager<NoTls>) -> Pool {
    manager.builder().max_size(1).connection_timeout(SOON).open().unwrap()
}

fn backend(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// However a session took on another identity or another setting, `Reset::DiscardAll` undoes it before the next caller
/// gets the connection.
#[test]
fn an_identity_taken_on_goes_with_the_reset_however_it_was_taken_on() {
    let _beside = beside_others();
    let left = [
        ("SET SESSION AUTHORIZATION pg_monitor", "SELECT session_user = 'pg_monitor'"),
        ("BEGIN; SET ROLE pg_monitor; COMMIT", "SELECT current_user = 'pg_monitor'"),
        ("BEGIN; COMMIT; SET statement_timeout = 7777", "SELECT current_setting('statement_timeout') = '7777ms'"),
    ];
    for observed in [true, false] {
        for (reset, stays) in [(Reset::Rollback, true), (Reset::DiscardAll, false)] {
            for (sql, question) in left {
                let pool = pool(manager("identity", observed).reset(reset));
                pool.get().unwrap().batch_execute(sql).unwrap();
                let there: bool = pool.get().unwrap().query_one(question, &[]).unwrap().get(0);
                assert_eq!((there, pool.stats().opens), (stays, 1), "{reset:?}, observed {observed}: {sql}");
                assert!(pool.close(SOON).is_complete());
            }
        }
    }
}

/// Messages are cut by every buffer on their way: a login, a statement, its parameter and its answer.
#[test]
fn what_is_longer_than_any_buffer_comes_through() {
    const LONG: usize = 300_000;
    watched(|| {
        for observed in [true, false] {
            let path = "x".repeat(5_000);
            let params = format!("{} options='-c search_path={path}'", Server::shared().conninfo("long"));
            let pool = pool(PostgresManager::parse(&params, NoTls).unwrap().observe(observed));
            let mut client = pool.get().unwrap();
            let shown: String = client.query_one("SHOW search_path", &[]).unwrap().get(0);
            assert!(shown == path, "{} bytes", shown.len());
            let sql = format!("SELECT '{}', $1::text", "1".repeat(LONG));
            let parameter = "2".repeat(LONG * 10);
            // Prepared for this once; prepared and kept; taken from the cache.
            for way in ["query_one", "first", "cached"] {
                let row = match way {
                    "query_one" => client.query_one(&sql, &[&parameter]).unwrap(),
                    _ => client.query_cached(&sql, &[&parameter]).unwrap().remove(0),
                };
                let (literal, echo): (&str, &str) = (row.get(0), row.get(1));
                assert!(literal.len() == LONG && literal.bytes().all(|b| b == b'1'), "{way}: {} bytes", literal.len());
                assert!(echo == parameter, "{way}: {} bytes", echo.len());
            }
            drop(client);
            // A connection that is not observed is asked first whether it is clean.
            assert!(wait_until(within(SOON), || pool.state().idle_connections == 1), "{}", pool.stats());
            assert_eq!(pool.stats().opens, 1, "{}", pool.stats());
            assert!(pool.close(SOON).is_complete());
        }
    });
}

/// A transaction has failed, and before it can be rolled back the connection dies. The waiter gets another connection.
#[test]
fn a_rollback_that_cannot_be_made_costs_the_connection() {
    let _beside = beside_others();
    for observed in [true, false] {
        let pool = pool(manager("no-rollback", observed));
        let mut client = pool.get().unwrap();
        let pid = backend(&mut client);
        client.batch_execute("BEGIN; SELECT nonsense").unwrap_err();
        thread::scope(|s| {
            let waiter = s.spawn(|| {
                let mut client = pool.get().unwrap();
                // In one message: outside of a transaction both are the time of its arrival.
                let answer = client.simple_query("SELECT now() = statement_timestamp()").unwrap();
                let outside = |m: &SimpleQueryMessage| matches!(m, SimpleQueryMessage::Row(r) if r.get(0) == Some("t"));
                (backend(&mut client), answer.iter().any(outside))
            });
            let waits = || pool.stats().waiting == 1;
            assert!(wait_until(within(SOON), waits), "{}", pool.stats());
            assert_eq!(Server::shared().terminate("no-rollback"), 1);
            drop(client);
            let (other, outside) = waiter.join().unwrap();
            assert!(other != pid && outside, "observed {observed}: {other} after {pid}");
        });
        assert_eq!(pool.stats().opens, 2, "{}", pool.stats());
        assert!(pool.close(SOON).is_complete());
    }
}
