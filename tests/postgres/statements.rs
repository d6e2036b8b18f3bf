//! The statement cache on a real server: what it saves, and what it survives.

use crate::support::{Bouncer, EPSILON, PoolMode, Proxy, SOON, Server, alone, beside_others, ms, wait_until};

use millpond::postgres::{Pool, PooledConnection, PostgresManager, Reset};
use postgres::types::private::BytesMut;
use postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use postgres::{NoTls, SimpleQueryMessage};
use std::error::Error;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How a connection reaches the server, which decides what is known of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Observed,
    Unobserved,
    Unix,
}

const WAYS: [Way; 3] = [Way::Observed, Way::Unobserved, Way::Unix];

impl Way {
    fn manager(self, app: &str) -> PostgresManager<NoTls> {
        let server = Server::shared();
        let params = if self == Way::Unix { server.unix_conninfo(app) } else { server.conninfo(app) };
        PostgresManager::parse(&params, NoTls).unwrap().observe(self != Way::Unobserved)
    }

    /// One connection, with the default cache.
    fn pool(self, app: &str) -> Emptied {
        pool(self.manager(app))
    }
}

fn pool(manager: PostgresManager<NoTls>) -> Emptied {
    Emptied(manager.builder().max_size(1).open().unwrap())
}

/// A pool, of which the server has nothing left when a test ends well.
struct Emptied(Pool);

impl Deref for Emptied {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.0
    }
}

impl Drop for Emptied {
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        let backends: Vec<_> =
            self.0.connections().iter().filter_map(|row| row.server_id).map(|id| id as i32).collect();
        let report = self.0.close(SOON);
        assert!(report.is_complete(), "{report}");
        let mut observer = Server::shared().connect();
        let mut left = || -> i64 {
            let count = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)";
            observer.query_one(count, &[&backends]).unwrap().get(0)
        };
        assert!(wait_until(Instant::now() + SOON, || left() == 0), "{} left of {backends:?}", left());
    }
}

/// Through a proxy that counts round trips.
fn through(proxy: &Proxy, way: Way, app: &str) -> PostgresManager<NoTls> {
    assert_ne!(way, Way::Unix);
    PostgresManager::parse(&proxy.conninfo(app), NoTls).unwrap().observe(way == Way::Observed)
}

/// Somebody else, who changes things meanwhile.
fn meanwhile(sql: &str) {
    Server::shared().connect().batch_execute(&format!("SET client_min_messages = error; {sql}")).unwrap();
}

/// How many round trips something takes.
fn trips<T>(proxy: &Proxy, what: impl FnOnce() -> T) -> (usize, T) {
    let before = proxy.turns();
    let result = what();
    (proxy.turns() - before, result)
}

/// As [`trips`], where a `Close` goes ahead for whose answer nobody waits: it comes too late to be mistaken for one.
fn trips_from_afar<T>(proxy: &Proxy, what: impl FnOnce() -> T) -> (usize, T) {
    proxy.latency(EPSILON);
    let result = trips(proxy, what);
    proxy.latency(Duration::ZERO);
    result
}

/// What the server keeps for this connection; asked without preparing anything.
fn prepared(client: &mut PooledConnection) -> usize {
    let answer = client.simple_query("SELECT statement FROM pg_prepared_statements").unwrap();
    answer.iter().filter(|m| matches!(m, SimpleQueryMessage::Row(_))).count()
}

fn code(e: &postgres::Error) -> &str {
    e.code().map_or("none", |code| code.code())
}

#[test]
fn repeated_sql_takes_one_round_trip() {
    let _beside = beside_others();
    for way in [Way::Observed, Way::Unobserved] {
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "trips"));
        let mut client = pool.get().unwrap();
        let (plain, _) = trips(&proxy, || client.query("SELECT 1 + $1::int", &[&1]).unwrap());
        assert_eq!(plain, 2, "what it is to be compared with");
        client.check_connection().unwrap(); // and the rest of it
        let (first, _) = trips(&proxy, || client.query_cached("SELECT $1::int", &[&1]).unwrap());
        assert_eq!(first, 2);
        for i in 0..20 {
            let (again, rows) = trips(&proxy, || client.query_cached("SELECT $1::int", &[&i]).unwrap());
            assert_eq!((again, rows[0].get::<_, i32>(0)), (1, i), "{way:?}");
        }
        let (one, row) = trips(&proxy, || client.query_one_cached("SELECT $1::int", &[&7]).unwrap());
        assert_eq!((one, row.get::<_, i32>(0)), (1, 7));
        let (opt, row) = trips(&proxy, || client.query_opt_cached("SELECT $1::int", &[&8]).unwrap());
        assert_eq!((opt, row.unwrap().get::<_, i32>(0)), (1, 8));
        let (execute, n) = trips(&proxy, || client.execute_cached("SELECT $1::int", &[&9]).unwrap());
        assert_eq!((execute, n), (1, 1));
        let (prepare, _) = trips(&proxy, || client.prepare_cached("SELECT $1::int").unwrap());
        assert_eq!(prepare, 0);
        let stats = client.statement_cache_stats();
        assert_eq!((stats.hits, stats.misses, stats.statements, stats.capacity), (24, 1, 1, 256));

        // It stays with the connection.
        drop(client);
        let mut client = pool.get().unwrap();
        let (later, _) = trips(&proxy, || client.query_cached("SELECT $1::int", &[&1]).unwrap());
        assert_eq!(later, 1, "{way:?}");
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn within_a_transaction_too() {
    let _beside = beside_others();
    for way in [Way::Observed, Way::Unobserved] {
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "trips-tx"));
        let mut client = pool.get().unwrap();
        client.query_cached("SELECT 1", &[]).unwrap();
        let mut tx = client.begin().unwrap();
        assert_eq!(trips(&proxy, || tx.query_cached("SELECT 1", &[]).unwrap()).0, 1);
        assert_eq!(trips(&proxy, || tx.query_one_cached("SELECT 1", &[]).unwrap()).0, 1);
        assert_eq!(trips(&proxy, || tx.query_opt_cached("SELECT 1", &[]).unwrap()).0, 1);
        assert_eq!(trips(&proxy, || tx.execute_cached("SELECT 2", &[]).unwrap()).0, 2);
        let mut inner = tx.begin().unwrap();
        assert_eq!(trips(&proxy, || inner.execute_cached("SELECT 2", &[]).unwrap()).0, 1);
        inner.rollback().unwrap();
        // All else that a transaction can do.
        tx.batch_execute("SELECT 3").unwrap();
        tx.commit().unwrap();
        assert_eq!(trips(&proxy, || client.execute_cached("SELECT 2", &[]).unwrap()).0, 1);
        let mut tx = client.begin_with(|c| c.build_transaction().read_only(true).start()).unwrap();
        let e = tx.execute_cached("CREATE TEMP SEQUENCE nothing", &[]).err();
        let e = e.or_else(|| tx.execute_cached("CREATE TABLE nothing ()", &[]).err()).unwrap();
        assert_eq!(code(&e), "25006");
    }
}

#[test]
fn a_changed_table_does_not_show() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("changed_{way:?}");
        meanwhile(&format!(
            "DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int); INSERT INTO {table} VALUES (1)"
        ));
        let pool = way.pool("ddl");
        let mut client = pool.get().unwrap();
        let by_id = format!("SELECT * FROM {table} WHERE id = $1");
        let all = format!("SELECT * FROM {table}");
        assert_eq!(client.query_one_cached(&by_id, &[&1]).unwrap().len(), 1);
        assert_eq!(client.query_cached(&all, &[]).unwrap()[0].len(), 1);
        for columns in 2..5 {
            meanwhile(&format!("ALTER TABLE {table} ADD COLUMN c{columns} int"));
            assert_eq!(client.query_one_cached(&by_id, &[&1]).unwrap().len(), columns, "{way:?}");
            assert_eq!(client.query_cached(&all, &[]).unwrap()[0].len(), columns, "{way:?}");
        }
        // Another table under the same name.
        meanwhile(&format!("DROP TABLE {table}; CREATE TABLE {table} (id int, name text)"));
        assert!(client.query_opt_cached(&by_id, &[&1]).unwrap().is_none());
        assert_eq!(client.execute_cached(&all, &[]).unwrap(), 0);
        assert_eq!(client.statement_cache_stats().statements, 2);
        assert_eq!(prepared(&mut client), 2, "what was forgotten was closed");
        drop(client);
        assert!(pool.get().is_ok());
        assert_eq!(pool.stats().opens, 1);
    }
}

/// The server then mentions the parameters in each error, wherever it came from. Only the order of the messages tells.
#[test]
fn it_is_careful_where_an_error_does_not_tell() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("careful_{way:?}");
        meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
        let pool = way.pool("careful");
        let mut client = pool.get().unwrap();
        client.batch_execute("SET log_parameter_max_length_on_error = -1").unwrap();
        let sql = format!("SELECT * FROM {table} WHERE id = $1");
        client.query_cached(&sql, &[&1]).unwrap();
        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN name text"));
        let shows = client.query_cached(&sql, &[&1]).is_err();
        assert_eq!(shows, way == Way::Unobserved, "{way:?}");
        client.query_cached(&sql, &[&1]).unwrap();
    }
}

#[test]
fn a_changed_table_costs_what_it_must() {
    let _beside = beside_others();
    for (way, expected) in [(Way::Observed, 3), (Way::Unobserved, 4)] {
        let table = format!("cost_{way:?}");
        meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "ddl-cost"));
        let mut client = pool.get().unwrap();
        let sql = format!("SELECT * FROM {table}");
        client.query_cached(&sql, &[]).unwrap();
        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN name text"));
        // Refused, (asked about a transaction,) prepared, run.
        assert_eq!(trips_from_afar(&proxy, || client.query_cached(&sql, &[]).unwrap()).0, expected, "{way:?}");
        assert_eq!(trips(&proxy, || client.query_cached(&sql, &[]).unwrap()).0, 1, "{way:?}");
    }
}

/// A value that does not fit the type that was remembered was not sent.
#[test]
fn a_changed_parameter_does_not_show() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        for cache in [256, 0] {
            let table = format!("parameter_{way:?}");
            meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
            let pool = pool(way.manager("ddl-params").statement_cache(cache));
            let mut client = pool.get().unwrap();
            let sql = format!("SELECT 1 FROM {table} WHERE id = $1");
            client.query_cached(&sql, &[&1_i32]).unwrap();
            meanwhile(&format!("ALTER TABLE {table} ALTER COLUMN id TYPE text"));
            client.query_cached(&sql, &[&"1"]).unwrap_or_else(|e| panic!("{way:?}, {cache}: {e:?}"));
            // Where the server says so it shows once.
            meanwhile(&format!("ALTER TABLE {table} ALTER COLUMN id TYPE bigint USING 1"));
            assert_eq!(code(&client.query_cached(&sql, &[&"1"]).unwrap_err()), "42883", "bigint = text");
            client.query_cached(&sql, &[&1_i64]).unwrap();
            // In a transaction as well: nothing of it has failed.
            meanwhile(&format!("ALTER TABLE {table} ALTER COLUMN id TYPE int"));
            let mut tx = client.begin().unwrap();
            tx.query_cached(&sql, &[&1_i32]).unwrap_or_else(|e| panic!("{way:?}, {cache}: {e:?}"));
            tx.commit().unwrap();
            // No need to forget it for what it finds, nor for what was never right.
            let before = client.statement_cache_stats().misses;
            assert!(client.query_one_cached(&sql, &[&1_i32]).is_err(), "no row");
            client.query_cached(&sql, &[&1_i32]).unwrap();
            assert_eq!(client.statement_cache_stats().misses, before, "{way:?}, {cache}");
            assert!(client.query_cached(&sql, &[&"1"]).is_err());
            client.query_cached(&sql, &[&1_i32]).unwrap();
            assert_eq!(client.statement_cache_stats().misses, before + 1, "{way:?}, {cache}: to make sure");
        }
    }
}

/// What a portal meets says nothing of the statement that made it, and still less of others; nor does what was never
/// one.
#[test]
fn a_portal_that_fails_costs_no_statement() {
    let _beside = crate::support::beside_others();
    let pool = Way::Observed.pool("portal");
    let mut client = pool.get().unwrap();
    client.query_cached("SELECT 1", &[]).unwrap();
    let refused = client.query_typed("SELECT count(*) FROM pg_class FOR UPDATE", &[]).unwrap_err();
    assert_eq!(code(&refused), "0A000");
    client.query_cached("SELECT 1", &[]).unwrap();
    client
        .batch_execute(
            "CREATE OR REPLACE FUNCTION pg_temp.fails(n int) RETURNS int LANGUAGE plpgsql AS $$
         BEGIN IF n > 1 THEN RAISE EXCEPTION 'x' USING ERRCODE = '0A000'; END IF; RETURN n; END $$",
        )
        .unwrap();
    let mut tx = client.begin().unwrap();
    let statement = tx.prepare_cached("SELECT pg_temp.fails(n) FROM generate_series(1, 2) n").unwrap();
    let portal = tx.bind(&statement, &[]).unwrap();
    assert_eq!(tx.query_portal(&portal, 1).unwrap().len(), 1);
    assert_eq!(code(&tx.query_portal(&portal, 1).unwrap_err()), "0A000");
    drop(tx);
    client.query_cached("SELECT 1", &[]).unwrap();
    let stats = client.statement_cache_stats();
    assert_eq!((stats.hits, stats.statements), (2, 2), "{stats:?}");
}

/// Whatever begins within a transaction has the cache at hand.
#[test]
fn a_savepoint_keeps_the_cache() {
    let _beside = crate::support::beside_others();
    let pool = Way::Observed.pool("savepoints");
    let mut client = pool.get().unwrap();
    let mut tx = client.begin().unwrap();
    let mut named = tx.savepoint("named").unwrap();
    named.query_cached("SELECT 1", &[]).unwrap();
    let mut inner = named.transaction().unwrap();
    inner.query_cached("SELECT 1", &[]).unwrap();
    let mut innermost = inner.begin().unwrap();
    innermost.query_cached("SELECT 1", &[]).unwrap();
    innermost.commit().unwrap();
    inner.commit().unwrap();
    named.rollback().unwrap();
    tx.commit().unwrap();
    let stats = client.statement_cache_stats();
    assert_eq!((stats.hits, stats.misses), (2, 1));
}

#[test]
fn a_discard_does_not_show() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = way.pool("discard");
        let mut client = pool.get().unwrap();
        for discard in ["DISCARD ALL", "DEALLOCATE ALL"] {
            for i in 0..3 {
                client.query_cached(&format!("SELECT {i}"), &[]).unwrap();
            }
            client.batch_execute(discard).unwrap();
            let row = client.query_one_cached("SELECT 1", &[]).unwrap();
            assert_eq!(row.get::<_, i32>(0), 1);
            assert_eq!(client.statement_cache_stats().statements, 1, "all went together");
            assert_eq!(prepared(&mut client), 1);
        }
    }
}

#[test]
fn within_a_transaction_it_shows_and_is_over() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("within_{way:?}");
        meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
        let pool = way.pool("ddl-tx");
        let mut client = pool.get().unwrap();
        let sql = format!("SELECT * FROM {table}");
        client.query_cached(&sql, &[]).unwrap();
        client.query_cached("SELECT 1", &[]).unwrap();

        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN a int"));
        let mut tx = client.begin().unwrap();
        assert_eq!(code(&tx.query_cached(&sql, &[]).unwrap_err()), "0A000", "{way:?}");
        drop(tx);
        let mut tx = client.begin().unwrap();
        tx.query_cached(&sql, &[]).unwrap();
        tx.commit().unwrap();

        assert_eq!(client.statement_cache_stats().statements, 2, "{way:?}: it alone was forgotten");

        // Back to a savepoint is enough.
        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN b int"));
        let mut tx = client.begin().unwrap();
        let mut inner = tx.begin().unwrap();
        assert_eq!(code(&inner.query_cached(&sql, &[]).unwrap_err()), "0A000", "{way:?}");
        inner.rollback().unwrap();
        tx.query_cached(&sql, &[]).unwrap();
        tx.batch_execute("DEALLOCATE ALL").unwrap();
        assert_eq!(code(&tx.query_cached(&sql, &[]).unwrap_err()), "26000", "{way:?}");
        drop(tx);

        // In one that nobody told us of.
        client.query_cached(&sql, &[]).unwrap();
        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN c int"));
        client.batch_execute("BEGIN").unwrap();
        assert_eq!(code(&client.query_cached(&sql, &[]).unwrap_err()), "0A000", "{way:?}");
        client.batch_execute("ROLLBACK").unwrap();
        assert_eq!(client.query_cached(&sql, &[]).unwrap().len(), 0);
    }
}

#[test]
fn a_commit_that_failed_is_not_called_a_success() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("commit_{way:?}");
        meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
        let pool = way.pool("commit");
        let mut client = pool.get().unwrap();
        client.execute_cached("BEGIN", &[]).unwrap();
        client.execute_cached("COMMIT", &[]).unwrap();
        client.execute_cached("BEGIN", &[]).unwrap();
        client.batch_execute(&format!("INSERT INTO {table} VALUES (1); DEALLOCATE ALL")).unwrap();
        // A second try would be answered with success, and mean that the transaction was rolled back.
        assert_eq!(code(&client.execute_cached("COMMIT", &[]).unwrap_err()), "26000", "{way:?}");
    }
}

#[test]
fn what_may_have_run_is_not_run_again() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let s = format!("ran_{way:?}").to_lowercase();
        meanwhile(&format!(
            "DROP SEQUENCE IF EXISTS {s}_seq; CREATE SEQUENCE {s}_seq;
             DROP TABLE IF EXISTS {s}_table; CREATE TABLE {s}_table (id bigint);
             CREATE OR REPLACE FUNCTION {s}(way text) RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 PERFORM nextval('{s}_seq');
                 CASE way
                     WHEN 'missing' THEN EXECUTE 'EXECUTE nosuch';
                     WHEN '26000' THEN RAISE EXCEPTION 'x' USING ERRCODE = '26000';
                     WHEN '0A000' THEN RAISE EXCEPTION 'x' USING ERRCODE = '0A000';
                     WHEN 'plan' THEN EXECUTE 'EXECUTE by_id(1)';
                     ELSE NULL;
                 END CASE;
                 RETURN 1;
             END $$"
        ));
        let pool = way.pool("twice");
        let mut client = pool.get().unwrap();
        client.batch_execute(&format!("PREPARE by_id(bigint) AS SELECT * FROM {s}_table WHERE id = $1")).unwrap();
        let call = format!("SELECT {s}($1)");
        let execute = format!("EXPLAIN EXECUTE by_id(nextval('{s}_seq'))");
        client.query_cached(&call, &[&"nothing"]).unwrap();
        client.query_cached(&execute, &[]).unwrap();
        meanwhile(&format!("ALTER TABLE {s}_table ADD COLUMN name text"));
        let mut runs = 2_i64;
        let mut failed = |e: postgres::Error, expected: &str| {
            runs += 1;
            assert_eq!(code(&e), expected, "{way:?}");
            let mut server = Server::shared().connect();
            let row = server.query_one(&format!("SELECT last_value FROM {s}_seq"), &[]).unwrap();
            assert_eq!(row.get::<_, i64>(0), runs, "{way:?}, {expected}");
        };
        failed(client.query_cached(&execute, &[]).unwrap_err(), "0A000");
        for (how, expected) in [("missing", "26000"), ("26000", "26000"), ("0A000", "0A000"), ("plan", "0A000")] {
            failed(client.query_cached(&call, &[&how]).unwrap_err(), expected);
        }
    }
}

#[test]
fn the_least_used_is_closed_and_nothing_is_left_behind() {
    let _beside = beside_others();
    for way in [Way::Observed, Way::Unobserved] {
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "evict").statement_cache(2));
        let mut client = pool.get().unwrap();
        for i in 0..10 {
            let (n, _) = trips_from_afar(&proxy, || client.query_cached(&format!("SELECT {i}"), &[]).unwrap());
            assert_eq!(n, 2, "the Close goes along with what follows");
            client.prepare_cached(&format!("SELECT -{i}")).unwrap();
            assert_eq!(client.statement_cache_stats().statements, 2.min(2 * (i + 1)));
            assert_eq!(prepared(&mut client), 2, "{way:?}");
        }
        drop(client);
        if way == Way::Observed {
            assert_eq!(pool.state().idle_connections, 1, "neither checked nor reset");
        }
        let mut client = pool.get().unwrap();
        assert_eq!(trips(&proxy, || client.query_cached("SELECT 9", &[]).unwrap()).0, 1);
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn its_end_does_not_wait_for_the_server() {
    let _beside = beside_others();
    for way in [Way::Observed, Way::Unobserved] {
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "end").statement_cache(8));
        let mut client = pool.get().unwrap();
        for i in 0..20 {
            client.query_cached(&format!("SELECT {i}"), &[]).unwrap();
        }
        client.prepare_cached("SELECT 20").unwrap();
        proxy.pause();
        let (done, wait) = mpsc::channel();
        let ending = thread::spawn(move || {
            drop(PooledConnection::detach(client));
            done.send(()).unwrap();
        });
        let ended = wait.recv_timeout(ms(1_000));
        proxy.resume();
        ending.join().unwrap();
        assert!(ended.is_ok(), "{way:?}: the drop waited");
    }
}

#[test]
fn a_discarding_reset_empties_it() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool(way.manager("reset").reset(Reset::DiscardAll));
        for i in 0..3 {
            let mut client = pool.get().unwrap();
            assert_eq!(client.statement_cache_stats().statements, 0, "{way:?}");
            for _ in 0..2 {
                client.query_cached("SELECT 1", &[]).unwrap();
            }
            let stats = client.statement_cache_stats();
            assert_eq!((stats.hits, stats.misses), (i + 1, i + 1), "{way:?}");
        }
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn off_a_discarding_reset_takes_nothing_from_it() {
    let _beside = crate::support::beside_others();
    let pool = pool(Way::Observed.manager("reset-off").reset(Reset::DiscardAll).statement_cache(0));
    for i in 0..3 {
        let mut client = pool.get().unwrap();
        client.query_cached("SELECT $1::int", &[&1]).unwrap();
        assert_eq!(client.statement_cache_stats().hits, i, "the types are what they were");
    }
}

#[test]
fn types_make_another_statement() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = way.pool("typed");
        let mut client = pool.get().unwrap();
        let wide = client.prepare_typed_cached("SELECT $1", &[Type::INT8]).unwrap();
        let text = client.prepare_cached("SELECT $1").unwrap();
        assert_eq!((wide.params(), text.params()), (&[Type::INT8][..], &[Type::TEXT][..]));
        assert_eq!(client.query_one(&wide, &[&5_i64]).unwrap().get::<_, i64>(0), 5);
        client.prepare_typed_cached("SELECT $1", &[Type::INT8]).unwrap();
        let stats = client.statement_cache_stats();
        assert_eq!((stats.hits, stats.misses, stats.statements), (1, 2, 2));
        client.clear_statement_cache();
        assert_eq!(client.statement_cache_stats().statements, 0);
        assert_eq!(client.query_one(&wide, &[&6_i64]).unwrap().get::<_, i64>(0), 6, "yours is yours");
    }
}

/// A statement that the user holds fails, and the cache cannot see whose it was.
#[test]
fn an_observed_connection_notices_what_fails_elsewhere() {
    let _beside = crate::support::beside_others();
    meanwhile("DROP TABLE IF EXISTS elsewhere; CREATE TABLE elsewhere (id int)");
    let pool = Way::Observed.pool("elsewhere");
    let mut client = pool.get().unwrap();
    let statement = client.prepare_cached("SELECT * FROM elsewhere").unwrap();
    client.query(&statement, &[]).unwrap();
    meanwhile("ALTER TABLE elsewhere ADD COLUMN name text");
    assert_eq!(code(&client.query(&statement, &[]).unwrap_err()), "0A000");
    let statement = client.prepare_cached("SELECT * FROM elsewhere").unwrap();
    client.query(&statement, &[]).unwrap();
}

#[test]
fn what_cannot_be_prepared_costs_no_other() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = way.pool("unprepared");
        let mut client = pool.get().unwrap();
        client.query_cached("SELECT 1", &[]).unwrap();
        for (sql, expected) in [("SELECT count(*) FROM pg_class FOR UPDATE", "0A000"), ("SELECT nonsense", "42703")] {
            assert_eq!(code(&client.query_cached(sql, &[]).unwrap_err()), expected);
            client.query_cached("SELECT 1", &[]).unwrap();
        }
        let stats = client.statement_cache_stats();
        assert_eq!((stats.hits, stats.misses, stats.statements), (2, 3, 1), "{way:?}");
    }
}

/// `postgres` keeps statements of its own, to look up types, and does not notice that they are gone.
#[test]
fn a_connection_that_cannot_look_up_types_is_replaced() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let name = format!("spoilt_{way:?}");
        meanwhile(&format!(
            "DROP TYPE IF EXISTS {name}_a, {name}_b; CREATE TYPE {name}_a AS ENUM ('x'); CREATE TYPE {name}_b AS ENUM ('x')"
        ));
        let pool = way.pool("spoilt");
        let mut client = pool.get().unwrap();
        client.query_cached(&format!("SELECT 'x'::{name}_a"), &[]).unwrap();
        client.batch_execute("DISCARD ALL").unwrap();
        client.query_cached(&format!("SELECT 'x'::{name}_a"), &[]).unwrap();
        let e = client.query_cached(&format!("SELECT 'x'::{name}_b"), &[]).unwrap_err();
        assert_eq!(code(&e), "26000", "{way:?}: if `postgres` has learned it, all the better");
        drop(client);
        let mut client = pool.get().unwrap();
        client.query_cached(&format!("SELECT 'x'::{name}_b"), &[]).unwrap();
        assert_eq!(pool.stats().opens, 2);
    }
}

#[test]
fn off_it_leaves_nothing_on_the_server_and_takes_one_round_trip() {
    let _beside = beside_others();
    for (way, first) in [(Way::Observed, 4), (Way::Unobserved, 5)] {
        let proxy = Proxy::to(Server::shared().addr());
        let pool = pool(through(&proxy, way, "off").statement_cache(0));
        let mut client = pool.get().unwrap();
        let sql = "SELECT $1::int, $2";
        let (n, _) = trips_from_afar(&proxy, || client.query_cached(sql, &[&1, &"a"]).unwrap());
        assert_eq!(n, first, "{way:?}: BEGIN, prepare, COMMIT, run");
        for i in 0..10 {
            let (n, rows) = trips(&proxy, || client.query_cached(sql, &[&i, &"b"]).unwrap());
            assert_eq!((n, rows[0].get(0), rows[0].get(1)), (1, i, "b"), "{way:?}");
            assert_eq!(prepared(&mut client), 0, "{way:?}");
        }
        assert_eq!(trips(&proxy, || client.query_one_cached(sql, &[&1, &"a"]).unwrap()).0, 1);
        assert!(trips(&proxy, || client.query_opt_cached(sql, &[&1, &"a"]).unwrap()).1.is_some());
        assert_eq!(trips(&proxy, || client.execute_cached(sql, &[&1, &"a"]).unwrap()), (1, 1));
        let stats = client.statement_cache_stats();
        assert_eq!((stats.hits, stats.misses, stats.statements, stats.capacity), (13, 1, 0, 0), "{way:?}");

        let e = client.query_cached(sql, &[&1]).unwrap_err();
        assert!(e.to_string().contains("expected 2 parameters but got 1"), "{e}");
        assert!(client.query_cached(sql, &[&"no number", &"a"]).is_err());
        assert_eq!(code(&client.query_cached("SELECT nonsense", &[]).unwrap_err()), "42703");
        client.query_cached(sql, &[&1, &"a"]).unwrap();
        assert_eq!(prepared(&mut client), 0);

        let mut tx = client.begin().unwrap();
        assert_eq!(trips(&proxy, || tx.query_cached(sql, &[&1, &"a"]).unwrap()).0, 1);
        assert_eq!(trips_from_afar(&proxy, || tx.query_cached("SELECT 5", &[]).unwrap()).0, 2);
        tx.commit().unwrap();
        assert_eq!(prepared(&mut client), 0, "{way:?}");
        drop(client);
        assert!(pool.get().is_ok());
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn off_it_keeps_out_of_transactions_of_others() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("off_{way:?}");
        meanwhile(&format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int)"));
        let pool = pool(way.manager("off-tx").statement_cache(0));
        let mut client = pool.get().unwrap();
        let count = format!("SELECT count(*) FROM {table}");
        client.batch_execute("BEGIN").unwrap();
        client.execute_cached(&format!("INSERT INTO {table} VALUES ($1)"), &[&1]).unwrap();
        assert_eq!(client.query_one_cached(&count, &[]).unwrap().get::<_, i64>(0), 1);
        client.batch_execute("ROLLBACK").unwrap();
        assert_eq!(client.query_one_cached(&count, &[]).unwrap().get::<_, i64>(0), 0, "{way:?}: it was committed");
        // One that failed, and of which the last word may still be under way.
        client.batch_execute("BEGIN").unwrap();
        assert!(client.batch_execute("SELECT nonsense").is_err());
        assert_eq!(code(&client.query_cached("SELECT 'new'", &[]).unwrap_err()), "25P02", "{way:?}");
        client.batch_execute("ROLLBACK").unwrap();
        client.query_cached("SELECT 'new'", &[]).unwrap();
    }
}

#[test]
fn off_a_changed_table_does_not_show() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("off_changed_{way:?}");
        meanwhile(&format!(
            "DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int); INSERT INTO {table} VALUES (1)"
        ));
        let pool = pool(way.manager("off-ddl").statement_cache(0));
        let mut client = pool.get().unwrap();
        let sql = format!("SELECT * FROM {table} WHERE id = $1");
        assert_eq!(client.query_one_cached(&sql, &[&1]).unwrap().len(), 1);
        meanwhile(&format!("ALTER TABLE {table} ADD COLUMN name text"));
        assert_eq!(client.query_one_cached(&sql, &[&1]).unwrap().len(), 2, "{way:?}");
        client.batch_execute("DISCARD ALL").unwrap();
        assert_eq!(client.query_one_cached(&sql, &[&1]).unwrap().len(), 2, "{way:?}");
    }
}

/// Many clients on two servers, in transaction mode.
#[test]
fn off_it_works_behind_a_transaction_pooler() {
    let _alone = alone();
    let settings = [("default_pool_size", "2"), ("max_prepared_statements", "0")];
    let bouncer = Bouncer::start(Server::shared(), PoolMode::Transaction, &settings[..1]);
    works_behind(&bouncer);
    // From 1.24 on it tracks prepared statements unless it is told not to.
    if bouncer.prepared_statements().is_some_and(|most| most > 0) {
        drop(bouncer);
        works_behind(&Bouncer::start(Server::shared(), PoolMode::Transaction, &settings));
    }
}

/// Without a cache everywhere; with one if the pooler tracks prepared statements.
fn works_behind(bouncer: &Bouncer) {
    let tracked = bouncer.prepared_statements().unwrap_or(0);
    for (way, cache) in [(Way::Observed, 0), (Way::Unobserved, 0), (Way::Observed, 256)] {
        let manager = PostgresManager::parse(&bouncer.conninfo("pooler"), NoTls).unwrap();
        let pool = manager.observe(way == Way::Observed).statement_cache(cache).builder().max_size(6).open().unwrap();
        let failures: usize = thread::scope(|scope| {
            let workers: Vec<_> = (0..6)
                .map(|worker| {
                    let pool = &pool;
                    scope.spawn(move || {
                        let mut failures = 0;
                        for i in 0..300 {
                            let mut client = pool.get().unwrap();
                            let sql = format!("SELECT $1::int, $2, {}", i % 10);
                            match client.query_one_cached(&sql, &[&worker, &"x"]) {
                                Ok(row) => assert_eq!((row.get(0), row.get(2)), (worker, i % 10)),
                                Err(_) => failures += 1,
                            }
                        }
                        failures
                    })
                })
                .collect();
            workers.into_iter().map(|w| w.join().unwrap()).sum()
        });
        println!("{way:?}, cache {cache}: {failures} of 1800 failed");
        let left = Server::shared().connect().query_one(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pooler' AND state LIKE 'idle in%'",
            &[],
        );
        assert_eq!(left.unwrap().get::<_, i64>(0), 0);
        let works = cache == 0 || tracked > 0;
        assert_eq!(works, failures == 0, "{way:?}, cache {cache}, {tracked} are tracked: {failures} failed");
    }
}

// ---------------------------------------------------------------------------------------------------- panics

/// A parameter that panics when it is to be written.
#[derive(Debug)]
struct Panics;

impl ToSql for Panics {
    fn to_sql(&self, _: &Type, _: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        panic!("on purpose");
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// The `postgres` crate keeps the half of the message that was written before the panic, and would send it before the next
/// caller's.
#[test]
fn a_panic_in_a_parameter_that_the_caller_catches_costs_that_connection() {
    let _beside = beside_others();
    for (n, way) in WAYS.into_iter().enumerate() {
        for cache in [256, 0] {
            let pool = pool(way.manager(&format!("panics-{n}-{cache}")).statement_cache(cache));
            let mut client = pool.get().unwrap();
            let caught =
                catch_unwind(AssertUnwindSafe(|| client.query_cached("SELECT $1::int4", &[&Panics]).map(drop)));
            assert!(caught.is_err());
            drop(client);
            let row =
                pool.get().unwrap().query_one("SELECT 42", &[]).unwrap_or_else(|e| panic!("{way:?}, {cache}: {e}"));
            assert_eq!(row.get::<_, i32>(0), 42);
            assert_eq!(pool.stats().opens, 2, "{way:?}, {cache}");
        }
    }
}
