//! What hard use finds between a transaction and its end, and between one user of a session and the next.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use crate::support::{SOON, Server, ms};
use millpond::postgres::{Pool, PostgresManager};
use postgres::NoTls;
use postgres::fallible_iterator::FallibleIterator;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Tcp,
    TcpUnobserved,
    Unix,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::TcpUnobserved, Way::Unix];

impl Way {
    fn is_observed(self) -> bool {
        !matches!(self, Way::TcpUnobserved)
    }
}

fn manager(app: &str, way: Way) -> PostgresManager<NoTls> {
    manager_on(Server::shared(), app, way)
}

fn manager_on(server: &Server, app: &str, way: Way) -> PostgresManager<NoTls> {
    let params = match way {
        Way::Unix => server.unix_conninfo(app),
        Way::Tcp | Way::TcpUnobserved => server.conninfo(app),
    };
    PostgresManager::parse(&params, NoTls).unwrap().observe(way.is_observed())
}

fn pool(app: &str, way: Way) -> Pool {
    manager(app, way).builder().max_size(1).connection_timeout(SOON).open().unwrap()
}

fn rows(table: &str) -> i64 {
    Server::shared().connect().query_one(&format!("SELECT count(*) FROM {table}"), &[]).unwrap().get(0)
}

/// After a COPY that the server refused `postgres` gives each call the answer to the one before, to a COMMIT that of
/// what was asked before it.
#[test]
fn a_commit_behind_a_refused_copy_says_what_became_of_it() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("behind_{way:?}").to_lowercase();
        Server::shared().connect().batch_execute(&format!("CREATE TABLE {table} (n int)")).unwrap();
        let insert = format!("INSERT INTO {table} VALUES (1)");
        let pool = pool("behind", way);
        let mut failures = Vec::new();
        for copies in 1..4 {
            for savepoint in [false, true] {
                for calls in 0..3 {
                    for before in [false, true] {
                        for round in 0..5 {
                            let before_rows = rows(&table);
                            let mut client = pool.get().unwrap();
                            if before {
                                for _ in 0..copies {
                                    let _ = client.copy_in("COPY nowhere FROM STDIN").map(drop);
                                }
                            }
                            let Ok(mut tx) = client.begin() else { continue };
                            let _ = tx.batch_execute(&insert);
                            if !before {
                                if savepoint {
                                    if let Ok(mut inner) = tx.begin() {
                                        for _ in 0..copies {
                                            let _ = inner.copy_in("COPY nowhere FROM STDIN").map(drop);
                                        }
                                        let _ = inner.rollback();
                                    }
                                } else {
                                    for _ in 0..copies {
                                        let _ = tx.copy_in("COPY nowhere FROM STDIN").map(drop);
                                    }
                                }
                            }
                            for _ in 0..calls {
                                let _ = tx.batch_execute("");
                            }
                            let said = tx.commit();
                            drop(client);
                            drop(pool.get().unwrap());
                            let kept = rows(&table) > before_rows;
                            // Where nobody watches `postgres` may end the connection over it, and then that is all that
                            // is known.
                            let unknown = !way.is_observed() && said.as_ref().is_err_and(|e| e.code().is_none());
                            if said.is_ok() != kept && !unknown {
                                failures.push(format!("{way:?}: {copies} copies, savepoint {savepoint}, {calls} calls, before {before} ({round}): said {said:?}, kept {kept}"));
                            }
                        }
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{} failures, the first: {}", failures.len(), failures.join("\n"));
    }
}

/// A schema in front of `pg_catalog` with functions of its own is how tests stop the time.
#[test]
fn functions_of_a_users_own_do_not_confuse_the_pool() {
    let _beside = crate::support::beside_others();
    let sql = "CREATE SCHEMA frozen; CREATE FUNCTION frozen.now() RETURNS timestamptz LANGUAGE sql AS
        $$ SELECT '2020-01-01'::timestamptz $$;
        CREATE FUNCTION frozen.statement_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '2021-01-01'::timestamptz $$";
    Server::shared().connect().batch_execute(sql).unwrap();
    for way in WAYS {
        let pool = pool("frozen", way);
        for _ in 0..3 {
            let mut client = pool.get().unwrap();
            client.batch_execute("SET search_path = frozen, pg_catalog, public").unwrap();
        }
        drop(pool.get().unwrap());
        assert_eq!(pool.stats().opens, 1, "{way:?}");
    }
}

/// Its sender is never dropped, so that `postgres` waits for its rows for ever.
#[test]
fn a_copy_that_is_forgotten_holds_up_nobody() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let app = format!("forgotten-{way:?}").to_lowercase();
        let pool =
            manager(&app, way).builder().max_size(1).connection_timeout(SOON).close_timeout(ms(500)).open().unwrap();
        pool.get().unwrap().batch_execute("CREATE TABLE IF NOT EXISTS forgotten (n int)").unwrap();
        for rows in [0, 1, 100_000] {
            if !way.is_observed() {
                continue;
            }
            let mut client = pool.get().unwrap();
            let mut into = client.copy_in("COPY forgotten FROM STDIN").unwrap();
            for _ in 0..rows {
                into.write_all(b"1\n").unwrap();
            }
            if rows > 1 {
                into.flush().unwrap();
            }
            std::mem::forget(into);
            let begun = Instant::now();
            drop(client);
            let dropped = begun.elapsed();
            let mut next = pool.get().unwrap_or_else(|e| panic!("{way:?}, {rows}: {e}"));
            println!("{way:?} {rows}: drop {dropped:?}, next after {:?}", begun.elapsed());
            next.batch_execute("SELECT 1").unwrap();
            drop(next);
            let seen = Server::shared().wait_for(&app, 1, Instant::now() + Duration::from_secs(3));
            if seen != 1 {
                println!("{way:?} {rows}: {seen} backends: {:?}", Server::shared().backends(&app));
            }
        }
        println!("{:?}", pool.close(ms(2000)));
        let seen = Server::shared().wait_for(&app, 0, Instant::now() + Duration::from_secs(3));
        if seen != 0 {
            println!("{way:?}: {seen} backends after close: {:?}", Server::shared().backends(&app));
        }
        println!("threads: {:?}", crate::support::threads_named("millpond"));
    }
}

#[test]
fn a_forgotten_row_iterator_and_copy_out() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("outs", way);
        for what in 0..6 {
            let mut client = pool.get().unwrap();
            let sql = "SELECT repeat('x', 1000) FROM generate_series(1, 1000000)";
            let mut small = [0; 10];
            if (what == 0 || what == 3) && !way.is_observed() {
                continue;
            }
            match what {
                0 => {
                    let mut it = client.query_raw(sql, std::iter::empty::<i32>()).unwrap();
                    it.next().unwrap();
                    std::mem::forget(it);
                }
                1 => {
                    let mut it = client.query_raw(sql, std::iter::empty::<i32>()).unwrap();
                    it.next().unwrap();
                }
                2 => {
                    let mut out = client.copy_out(&format!("COPY ({sql}) TO STDOUT")).unwrap();
                    out.read_exact(&mut small).unwrap();
                }
                3 => {
                    let mut out = client.copy_out(&format!("COPY ({sql}) TO STDOUT")).unwrap();
                    out.read_exact(&mut small).unwrap();
                    std::mem::forget(out);
                }
                4 => {
                    let mut tx = client.begin().unwrap();
                    let _ = tx.query_raw(sql, std::iter::empty::<i32>()).unwrap();
                    std::mem::forget(tx);
                }
                _ => {
                    let _ = client
                        .query_raw(
                            "SELECT pg_sleep(n * 0) FROM generate_series(1, 100000000) n",
                            std::iter::empty::<i32>(),
                        )
                        .unwrap();
                }
            }
            let begun = Instant::now();
            drop(client);
            let dropped = begun.elapsed();
            let mut next = pool.get().unwrap();
            println!("{way:?} {what}: drop {dropped:?}, next after {:?}", begun.elapsed());
            assert_eq!(next.query_one("SELECT 7", &[]).unwrap().get::<_, i32>(0), 7);
        }
    }
}

/// What a deferred constraint trigger raises may have any code.
#[test]
fn a_commit_that_fails_with_a_code_of_the_users_own() {
    let _beside = crate::support::beside_others();
    // Its log tells of this test alone.
    let server = Server::start();
    let sql = "CREATE TABLE deferred (n int);
        CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = 'P0001'; END $$;
        CREATE CONSTRAINT TRIGGER complain AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION complain()";
    server.connect().batch_execute(sql).unwrap();
    for way in WAYS {
        let pool = manager_on(&server, "deferred", way).builder().max_size(1).open().unwrap();
        let mut client = pool.get().unwrap();
        for erred in [false, true] {
            let mut tx = client.begin().unwrap();
            tx.batch_execute("INSERT INTO deferred VALUES (1)").unwrap();
            if erred {
                let mut sp = tx.begin().unwrap();
                assert!(sp.batch_execute("SELECT nonsense").is_err());
                sp.rollback().unwrap();
            }
            let e = tx.commit().unwrap_err();
            assert_eq!(e.code().unwrap().code(), "P0001", "{way:?}");
            let mut tx = client.begin().unwrap();
            tx.batch_execute("SELECT 1").unwrap();
            tx.commit().unwrap();
        }
    }
    let log = server.log();
    assert!(!log.contains("there is no transaction in progress"), "{}", log.matches("there is no transaction").count());
}
