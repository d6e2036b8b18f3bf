//! What only newer servers can do. On an older one each test asserts what happens there instead; `docs/versions.md` says
//! on which versions they were run.

use crate::support::{SOON, Server, beside_others, ms, wait_until, within};
use crate::tls::{Identity, with_tls};
use millpond::PooledConnection;
use millpond::postgres::{Pool, PostgresManager, budget};
use postgres::{Client, NoTls, SimpleQueryMessage};
use std::thread;

fn code(e: &postgres::Error) -> &str {
    e.code().map_or("none", |code| code.code())
}

/// PostgreSQL 17 takes a TLS handshake without being asked for one before, from clients that say what they will speak.
#[test]
fn direct_tls() {
    let _beside = beside_others();
    let server = with_tls();
    let text = format!(
        "host=db.test hostaddr=127.0.0.1 port={} user=postgres dbname=postgres sslmode=require sslnegotiation=direct",
        server.port()
    );
    let open = |tls, patience| {
        let manager = PostgresManager::parse(&text, tls).unwrap();
        manager.builder().name("directly").max_size(1).connection_timeout(patience).open()
    };
    open(Identity::get().trusting(), ms(500)).expect_err("it does not say what it will speak");
    if server.version() < 17 {
        open(Identity::get().trusting_directly(), ms(500)).expect_err("the server waits for a question first");
        return;
    }

    let pool = open(Identity::get().trusting_directly(), SOON).unwrap();
    let mut client = pool.get().unwrap();
    let encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert!(client.query_one(encrypted, &[]).unwrap().get::<_, bool>(0));
    // A request to cancel takes the same way.
    let canceller = client.canceller();
    thread::scope(|scope| {
        let sleeper = scope.spawn(|| client.batch_execute("SELECT pg_sleep(60)").unwrap_err());
        // One that comes before the query has no effect, so it is sent until the query ends.
        assert!(wait_until(within(SOON), || {
            pool.manager().cancel(&canceller).unwrap();
            sleeper.is_finished()
        }));
        assert_eq!(code(&sleeper.join().unwrap()), "57014");
    });
    drop(client);
    // It is observed: what is left open is seen, and a clean return asks nothing.
    pool.get().unwrap().batch_execute("BEGIN").unwrap();
    let mut client = pool.get().unwrap();
    let answer = client.simple_query("SELECT now() = statement_timestamp()").unwrap();
    let is_outside = |m: &SimpleQueryMessage| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"));
    assert!(answer.iter().any(is_outside), "in a transaction");
    // (The one whose query was cancelled is not used again.)
    assert_eq!(pool.stats().opens, 2, "{}", pool.stats());
    assert!(PooledConnection::info(&client).server_id.is_some());
    drop(client);
    assert!(pool.close(SOON).is_complete());
}

/// From PostgreSQL 16 on some connections may be kept for roles that are no superusers. The budget is what can be opened.
#[test]
fn the_budget_is_what_can_be_opened() {
    /// The connection on which the test itself looks at the server.
    const WATCHER: usize = 1;

    let _beside = beside_others();
    let keeps = Server::shared().version() >= 16;
    let kept = [("max_connections", "16"), ("superuser_reserved_connections", "3"), ("reserved_connections", "5")];
    let server = Server::with(&kept[..if keeps { 3 } else { 2 }]);
    server.connect().batch_execute("CREATE ROLE worker LOGIN; CREATE ROLE chosen LOGIN").unwrap();
    if keeps {
        server.connect().batch_execute("GRANT pg_use_reserved_connections TO chosen").unwrap();
    }
    for (role, expected) in [("worker", if keeps { 8 } else { 13 }), ("chosen", 13)] {
        let mut config = server.config(role);
        config.user(role);
        // Whoever was here before has left.
        assert_eq!(server.wait_for("observer", 0, within(SOON)), 0);
        let mut first = config.connect(NoTls).unwrap();
        let allowance = budget(&mut first).unwrap();
        assert_eq!(allowance.connections(), expected, "{allowance}");
        let mut clients = vec![first];
        let error = loop {
            match config.connect(NoTls) {
                Ok(client) => clients.push(client),
                Err(error) => break error,
            }
        };
        assert_eq!((clients.len() + WATCHER, code(&error)), (expected as usize, "53300"), "{allowance}: {error:?}");
        drop(clients);
        assert_eq!(server.wait_for(role, 0, within(SOON)), 0);
    }
}

/// From PostgreSQL 17 on `transaction_timeout` ends the session of a transaction, whether it works or not.
#[test]
fn a_session_that_a_transaction_timeout_ended_is_replaced() {
    let _beside = beside_others();
    let server = Server::shared();
    if server.version() < 17 {
        let error = server.connect().batch_execute("SET transaction_timeout = 300").unwrap_err();
        assert_eq!(code(&error), "42704", "{error:?}");
        return;
    }
    for (name, observe) in [("tt-observed", true), ("tt-unobserved", false)] {
        let manager = PostgresManager::parse(&server.conninfo(name), NoTls).unwrap().observe(observe);
        let pool = manager.builder().name(name).max_size(1).connection_timeout(SOON).open().unwrap();
        let begin = |client: &mut Client| client.batch_execute("SET transaction_timeout = 300; BEGIN").unwrap();

        let mut client = pool.get().unwrap();
        begin(&mut client);
        let error = client.batch_execute("SELECT pg_sleep(60)").unwrap_err();
        // The `postgres` crate may see the end of the connection before the reason.
        assert!(code(&error) == "25P04" || error.is_closed(), "{name}: {error:?}");
        drop(client);
        assert_is_another(&pool, 2);

        // One that does nothing is told of it by its next word.
        let mut client = pool.get().unwrap();
        begin(&mut client);
        let pid = client.backend_pid();
        let gone = || server.backends(name).iter().all(|backend| Some(backend.pid) != pid);
        assert!(wait_until(within(SOON), gone), "{name}");
        drop(client);
        assert_is_another(&pool, 3);
    }
}

/// Works, and is the connection that was opened as the `opens`th.
#[track_caller]
fn assert_is_another(pool: &Pool, opens: u64) {
    pool.get().unwrap().batch_execute("SELECT 1").unwrap();
    assert_eq!(pool.stats().opens, opens, "{}", pool.stats());
}
