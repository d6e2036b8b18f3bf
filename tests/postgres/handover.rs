//! Nobody ever receives another's transaction, nor another's answers.

use crate::support::{Fault, Proxy, Server, capture, logged, ms, wait_until};
use log::Level;
use millpond::postgres::{Connector, Pool, PostgresManager, Reset};
use millpond::{CloseReason, PooledConnection};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, NoTls, SimpleQueryMessage};
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

/// How a connection reaches the server, and whether it is observed on its way.
#[derive(Clone, Copy, Debug)]
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
    let server = Server::shared();
    let params = match way {
        Way::Unix => server.unix_conninfo(app),
        Way::Tcp | Way::TcpUnobserved => server.conninfo(app),
    };
    PostgresManager::parse(&params, NoTls).unwrap().observe(way.is_observed())
}

fn pool(app: &str, way: Way) -> Pool {
    manager(app, way).builder().max_size(1).connection_timeout(Duration::from_secs(20)).open().unwrap()
}

/// Fails unless each question gets its own answer, outside of a transaction.
fn assert_clean(client: &mut Client, what: &str) {
    for n in [7, 8, 9] {
        let row = client.query_one("SELECT $1::int4", &[&n]).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!(row.get::<_, i32>(0), n, "{what}: another's answer");
    }
    let answer = client.simple_query("SELECT now() = statement_timestamp()").unwrap();
    let idle = |m: &SimpleQueryMessage| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"));
    assert!(answer.iter().any(idle), "{what}: inside a transaction");
}

type Mess = (&'static str, fn(&mut Client));

/// What a user may leave behind.
const MESSES: [Mess; 14] = [
    ("BEGIN", |c| c.batch_execute("BEGIN").unwrap()),
    ("BEGIN and work", |c| c.batch_execute("BEGIN; CREATE TEMP TABLE t (n int4); INSERT INTO t VALUES (1)").unwrap()),
    ("a failed transaction", |c| drop(c.batch_execute("BEGIN; SELECT nonsense"))),
    ("a forgotten Transaction", |c| std::mem::forget(c.transaction().unwrap())),
    ("a dropped Transaction", |c| drop(c.transaction().unwrap())),
    ("an SQL error", |c| drop(c.query("SELECT 1 / 0", &[]))),
    ("a dropped statement", |c| drop(c.prepare("SELECT 1").unwrap())),
    ("a half-read result", |c| {
        let mut rows = c.query_raw("SELECT generate_series(1, 100000)", Vec::<i32>::new()).unwrap();
        assert!(rows.next().unwrap().is_some());
    }),
    ("a half-read COPY", |c| {
        let mut out = c.copy_out("COPY (SELECT generate_series(1, 100000)) TO STDOUT").unwrap();
        out.read_exact(&mut [0; 10]).unwrap();
    }),
    ("an abandoned COPY FROM", |c| {
        c.batch_execute("CREATE TABLE IF NOT EXISTS bin (n int4)").unwrap();
        let mut into = c.copy_in("COPY bin FROM STDIN").unwrap();
        into.write_all(b"1\n").unwrap();
    }),
    ("a forgotten COPY FROM", |c| {
        c.batch_execute("CREATE TABLE IF NOT EXISTS bin (n int4)").unwrap();
        std::mem::forget(c.copy_in("COPY bin FROM STDIN").unwrap());
    }),
    ("a failed COPY FROM", |c| {
        c.batch_execute("CREATE TABLE IF NOT EXISTS bin (n int4)").unwrap();
        let mut into = c.copy_in("COPY bin FROM STDIN").unwrap();
        into.write_all(b"no number\n").unwrap();
        assert!(into.finish().is_err());
    }),
    ("a refused COPY FROM", |c| assert!(c.copy_in("COPY nowhere FROM STDIN").is_err())),
    ("a refused COPY FROM and a query", |c| {
        assert!(c.copy_in("COPY nowhere FROM STDIN").is_err());
        let _ = c.simple_query("SELECT 1");
    }),
];

/// The caller has its answer, and the end of it is still under way.
#[test]
fn a_copy_whose_end_comes_late_costs_no_connection() {
    let proxy = Proxy::to(Server::shared().addr());
    let manager = PostgresManager::parse(&proxy.conninfo("latecopy"), NoTls).unwrap();
    let pool = manager.builder().max_size(1).connection_timeout(Duration::from_secs(20)).open().unwrap();
    let mut client = pool.get().unwrap();
    client.batch_execute("CREATE TEMP TABLE late (n int4)").unwrap();
    let mut rows = client.copy_in("COPY late FROM STDIN").unwrap();
    rows.write_all(b"1\n").unwrap();
    // That a row was copied comes through, and that the server is ready does not.
    proxy.fault(.., Fault::StallAfter(b"C0000COPY 1\0".len()));
    assert_eq!(rows.finish().unwrap(), 1);
    drop(client);
    proxy.heal();
    assert_clean(&mut pool.get().unwrap(), "a copy");
    let stats = pool.stats();
    assert_eq!((stats.opens, proxy.accepted()), (1, 1), "{stats}");
    assert!(pool.close(Duration::from_secs(20)).is_complete());
}

/// `often`: how many times what depends on chance is tried.
fn cleans_up<T: Connector>(manager: PostgresManager<T>, messes: &[Mess], often: usize) {
    let pool = manager.builder().max_size(1).connection_timeout(Duration::from_secs(20)).open().unwrap();
    for (what, mess) in messes {
        // What is seen of a refusal when the connection comes back is a matter of chance: whether all of it has
        // arrived.
        for _ in 0..if what.contains("refused") { often } else { 3 } {
            mess(&mut pool.get().unwrap());
            assert_clean(&mut pool.get().unwrap(), what);
        }
    }
    assert!(pool.close(Duration::from_secs(10)).is_complete());
}

#[test]
fn over_tcp_nothing_reaches_the_next() {
    let _beside = crate::support::beside_others();
    cleans_up(manager("mess-tcp", Way::Tcp), &MESSES, 100);
}

#[test]
fn over_a_unix_socket_nothing_reaches_the_next() {
    let _beside = crate::support::beside_others();
    cleans_up(manager("mess-unix", Way::Unix), &MESSES, 100);
}

#[test]
fn over_tls_nothing_reaches_the_next() {
    let _beside = crate::support::beside_others();
    let server = crate::tls::with_tls();
    let params = format!("host=db.test hostaddr=127.0.0.1 port={} user=scrammed password=secret", server.port());
    let params = params + " dbname=postgres sslmode=require channel_binding=require";
    server.connect().batch_execute("GRANT ALL ON SCHEMA public TO scrammed").unwrap();
    let connector = crate::tls::Identity::get().trusting();
    cleans_up(PostgresManager::parse(&params, connector).unwrap(), &MESSES, 25);
}

/// What nobody observes cannot be told from a healthy connection after a COPY FROM that went wrong: see the manual.
#[test]
fn unobserved_no_transaction_reaches_the_next() {
    let _beside = crate::support::beside_others();
    let known: Vec<Mess> = MESSES.into_iter().filter(|(what, _)| !what.contains("COPY FROM")).collect();
    cleans_up(manager("mess-unobserved", Way::TcpUnobserved), &known, 100);
}

#[test]
fn a_clean_return_is_neither_asked_nor_replaced() {
    let _beside = crate::support::beside_others();
    for way in [Way::Tcp, Way::Unix] {
        let pool = pool("mess-none", way);
        for _ in 0..50 {
            let mut client = pool.get().unwrap();
            client.query("SELECT 1", &[]).unwrap();
            client.batch_execute("BEGIN; SELECT 1; COMMIT").unwrap();
            drop(client);
            assert_eq!(pool.stats().idle, 1, "{way:?}: back at once, on this thread");
        }
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn resets() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        for (reset, kept) in [(Reset::Rollback, "17s"), (Reset::DiscardAll, "0"), (Reset::None, "17s")] {
            let pool = manager("resets", way).reset(reset).builder().max_size(1).open().unwrap();
            pool.get().unwrap().batch_execute("SET statement_timeout = '17s'").unwrap();
            let mut client = pool.get().unwrap();
            let row = client.query_one("SHOW statement_timeout", &[]).unwrap();
            assert_eq!(row.get::<_, String>(0), kept, "{reset:?}, {way:?}");
            assert_eq!(pool.stats().opens, 1);
        }
    }
}

/// The `postgres` crate looks up a type it has not met with statements of its own, which a reset must leave alone.
#[test]
fn after_a_reset_types_are_still_found() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = manager("types", way).reset(Reset::DiscardAll).builder().max_size(1).open().unwrap();
        for name in ["mood", "weather", "tide"] {
            let mut client = pool.get().unwrap();
            let suffix = format!("{way:?}_{name}").to_lowercase();
            client.batch_execute(&format!("CREATE TYPE {suffix} AS ENUM ('good', 'bad')")).unwrap();
            client.query_one(&format!("SELECT 'good'::{suffix}"), &[]).unwrap_or_else(|e| panic!("{suffix}: {e:?}"));
        }
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn what_a_session_had_is_discarded() {
    let _beside = crate::support::beside_others();
    let pool = manager("session", Way::Tcp).reset(Reset::DiscardAll).builder().max_size(1).open().unwrap();
    let sql = "SET work_mem = '123kB'; CREATE TEMP TABLE mine (n int4); LISTEN me; SELECT pg_advisory_lock(4711)";
    pool.get().unwrap().batch_execute(sql).unwrap();
    let mut client = pool.get().unwrap();
    let left = "SELECT current_setting('work_mem') = '123kB', to_regclass('mine') IS NOT NULL,
        EXISTS (SELECT pg_listening_channels()), EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711)";
    let row = client.query_one(left, &[]).unwrap();
    assert_eq!((0..4).map(|i| row.get(i)).collect::<Vec<bool>>(), [false; 4]);
    assert_eq!(pool.stats().opens, 1);
}

#[test]
fn a_cancelled_connection_is_never_checked_out_again() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("cancelled", way);
        let mut client = pool.get().unwrap();
        let canceller = client.canceller();
        let backend = client.backend_pid();
        thread::scope(|s| {
            let sleeper = s.spawn(|| {
                let began = Instant::now();
                let e = client.batch_execute("SELECT pg_sleep(60)").unwrap_err();
                assert_eq!(e.code().map(|c| c.code()), Some("57014"), "{e:?}");
                assert!(began.elapsed() < Duration::from_secs(50));
                drop(client);
            });
            let mut observer = Server::shared().connect();
            let asleep = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
            let until = Instant::now() + Duration::from_secs(20);
            assert!(wait_until(until, || observer.query_opt(asleep, &[&backend]).unwrap().is_some()));
            pool.manager().cancel(&canceller).unwrap();
            sleeper.join().unwrap();
        });
        let mut next = pool.get().unwrap();
        assert_ne!(next.backend_pid(), backend, "{way:?}");
        assert_clean(&mut next, "after a cancel");
        assert_eq!(pool.stats().closed_for(CloseReason::Discarded), 1);
    }
}

#[test]
fn a_transaction_left_open_is_told_of_with_the_line_that_left_it() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    for way in WAYS {
        let app = format!("told-{way:?}");
        let pool = manager(&app, way).builder().name(&*app).max_size(1).open().unwrap();
        let line = line!() + 1;
        let mut client = pool.get().unwrap();
        client.batch_execute("BEGIN").unwrap();
        let id = PooledConnection::info(&client).id;
        drop(client);
        let warnings = || logged(|r| r.level <= Level::Warn && r.text.contains(&*app));
        let told = || warnings().into_iter().find(|r| r.text.contains("transaction"));
        assert!(wait_until(Instant::now() + Duration::from_secs(20), || told().is_some()), "{:?}", warnings());
        let told = told().unwrap();
        assert_eq!(told.level, Level::Warn);
        let told = told.text;
        assert!(told.contains(&format!("#{id}")), "{told}");
        assert!(told.contains(&format!("handover.rs:{line}:")), "{told}");
        // And a clean one is not worth a word.
        pool.get_timeout(ms(20_000)).unwrap().batch_execute("SELECT 1").unwrap();
        assert!(pool.close(Duration::from_secs(10)).is_complete());
        assert_eq!(warnings().len(), 1, "{:?}", warnings());
    }
}
