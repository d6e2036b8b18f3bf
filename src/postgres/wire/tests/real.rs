//! The observer against real PostgreSQL servers, compared with the plain crate.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use ::postgres::fallible_iterator::FallibleIterator;
use ::postgres::types::Type;

use super::support::{Server, ms, wait_until};
use super::tls::{Identity, wary, with_tls};
use super::*;

/// How long a test waits for what must end. No test measures a time by it.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A server without TLS.
pub(super) fn without_tls() -> &'static Server {
    Server::shared()
}

/// A connection string for this server, without a host name.
pub(super) fn to(server: &Server) -> String {
    format!("hostaddr=127.0.0.1 port={} user=postgres dbname=postgres", server.port())
}

/// A connection in clear text, one over a unix socket, and an encrypted one.
fn every_way() -> [(Client, Arc<Watch>); 3] {
    let plain = connected(&to(without_tls()), NoTls);
    let unix = connected(&without_tls().unix_conninfo("every-way"), NoTls);
    let encrypted = connected(&format!("host=db.test {} sslmode=require", to(with_tls())), Identity::get().trusting());
    [plain, unix, encrypted]
}

fn is_encrypted(client: &mut Client) -> bool {
    let ssl = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    client.query_typed_one(ssl, &[]).unwrap().get(0)
}

/// Whether the connection is encrypted, or why there is none.
pub(super) fn outcome<T: Connector>(text: &str, tls: T, observed: bool) -> Result<bool, String> {
    let watch = Watch::new();
    let client = match observed {
        true => observer(text, tls).connect(&watch).map_err(ConnectError::of_postgres),
        false => config(text).connect(tls),
    };
    let mut client = client.map_err(|error| chain(&error))?;
    assert_eq!(watch.pid().is_some(), observed, "{text}");
    Ok(is_encrypted(&mut client))
}

#[test]
fn every_sslmode_ends_as_with_the_plain_crate() {
    const PLAINTEXT: Result<bool, &str> = Ok(false);
    const ENCRYPTED: Result<bool, &str> = Ok(true);
    const UNCONFIGURED: Result<bool, &str> = Err("no TLS implementation configured");
    const DECLINED: Result<bool, &str> = Err("server does not support TLS");
    const UNTRUSTED: Result<bool, &str> = Err("invalid peer certificate: UnknownIssuer");
    const WRONG_NAME: Result<bool, &str> = Err("certificate not valid for name");
    const NAMELESS: Result<bool, &str> = Err("no hostname provided for TLS handshake");
    const WEAK: Result<bool, &str> = Err("weak sslmode");
    // PostgreSQL learnt direct TLS in 17; whatever happens, happens to both.
    const ANY: Result<bool, &str> = Err("");

    let trusting = || Some(Identity::get().trusting());
    // The terms, the connector (`None`: NoTls), the outcome at a server with TLS and at one without.
    for (terms, tls, on, off) in [
        ("host=db.test sslmode=disable", None, PLAINTEXT, PLAINTEXT),
        ("host=db.test sslmode=disable", trusting(), PLAINTEXT, PLAINTEXT),
        ("host=db.test sslmode=prefer", None, PLAINTEXT, PLAINTEXT),
        ("host=db.test sslmode=prefer", trusting(), ENCRYPTED, PLAINTEXT),
        ("host=db.test sslmode=prefer", Some(wary()), UNTRUSTED, PLAINTEXT),
        ("host=other.test sslmode=prefer", trusting(), WRONG_NAME, PLAINTEXT),
        ("host=db.test sslmode=require", None, UNCONFIGURED, DECLINED),
        ("host=db.test sslmode=require", trusting(), ENCRYPTED, DECLINED),
        ("host=db.test sslmode=require", Some(wary()), UNTRUSTED, DECLINED),
        ("host=other.test sslmode=require", trusting(), WRONG_NAME, DECLINED),
        ("host=db.test sslmode=prefer sslnegotiation=direct", trusting(), WEAK, WEAK),
        ("host=db.test sslmode=prefer sslnegotiation=direct", None, PLAINTEXT, PLAINTEXT),
        ("host=db.test sslmode=require sslnegotiation=direct", trusting(), ANY, ANY),
        ("sslmode=disable", trusting(), PLAINTEXT, PLAINTEXT),
        ("sslmode=prefer", None, PLAINTEXT, PLAINTEXT),
        ("sslmode=prefer", trusting(), NAMELESS, PLAINTEXT),
        ("sslmode=require", trusting(), NAMELESS, DECLINED),
    ] {
        for (server, expected) in [(with_tls(), on), (without_tls(), off)] {
            let text = format!("{terms} {}", to(server));
            let try_it = |observed| match &tls {
                Some(tls) => outcome(&text, tls.clone(), observed),
                None => outcome(&text, NoTls, observed),
            };
            let (plain, observed) = (try_it(false), try_it(true));
            assert_eq!(observed, plain, "{text}, TLS {}", tls.is_some());
            let as_expected = match (&observed, expected) {
                _ if expected == ANY => true,
                (Ok(encrypted), Ok(expected)) => *encrypted == expected,
                (Err(error), Err(expected)) => error.contains(expected),
                _ => false,
            };
            assert!(as_expected, "{text}, TLS {}: {observed:?}, not {expected:?}", tls.is_some());
        }
    }
}

#[test]
fn channel_binding_is_kept_and_never_pretended() {
    let text = |sslmode| {
        let place = to(with_tls()).replace("user=postgres", "user=scrammed password=secret");
        format!("host=db.test {place} sslmode={sslmode} channel_binding=require")
    };
    let (mut client, _) = connected(&text("require"), Identity::get().trusting());
    assert!(is_encrypted(&mut client));
    let error = chain(&refused(&text("disable"), Identity::get().trusting()));
    assert_eq!(error, "authentication error: server did not use channel binding");
}

#[test]
fn hosts_in_every_form() {
    let server = without_tls();
    let port = server.port();
    // Nobody listens on port 1.
    for text in [
        format!("host=127.0.0.1 port={port}"),
        format!("host=no.such.host.test hostaddr=127.0.0.1 port={port}"),
        format!("hostaddr=127.0.0.1,127.0.0.1 port=1,{port}"),
        format!("host=127.0.0.1,127.0.0.1 port=1,{port}"),
        format!("host=a.test,b.test hostaddr=127.0.0.1,127.0.0.1 port=1,{port}"),
        format!("host=127.0.0.1,127.0.0.1 port=1,{port} target_session_attrs=read-write"),
        format!("host=127.0.0.1,127.0.0.1 port={port} load_balance_hosts=random"),
    ] {
        let (mut client, watch) = connected(&format!("{text} user=postgres"), NoTls);
        let pid: i32 = client.query_typed_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        assert_eq!(watch.pid(), Some(pid), "{text}");
        assert!(watch.is_idle(), "{text}");
    }
    let read_only = format!("host=127.0.0.1 port={port} user=postgres target_session_attrs=read-only");
    assert_eq!(chain(&refused(&read_only, NoTls)), "error connecting to server: database is not read only");
}

#[test]
fn follows_a_session() {
    for (mut client, watch) in every_way() {
        let pid: i32 = client.query_typed_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        assert_eq!(watch.pid(), Some(pid));
        assert_eq!((watch.in_hot_standby(), watch.read_only_by_default()), (Some(false), Some(false)));
        assert!(watch.is_idle());

        client.batch_execute("BEGIN").unwrap();
        assert_eq!(watch.status(), Status::InTransaction);
        assert!(!watch.is_idle() && !watch.is_busy());
        client.batch_execute("SELECT 1/0").unwrap_err();
        client.is_valid(PATIENCE).unwrap();
        assert_eq!(watch.status(), Status::Failed);
        client.batch_execute("ROLLBACK").unwrap();
        assert!(watch.is_idle());

        let mut transaction = client.transaction().unwrap();
        transaction.query("SELECT 1", &[]).unwrap();
        assert_eq!(watch.status(), Status::InTransaction);
        drop(transaction);
        assert!(watch.is_idle());

        assert!(!watch.take_refused_write());
        client.batch_execute("SET default_transaction_read_only = on").unwrap();
        assert_eq!(watch.read_only_by_default(), Some(true));
        client.batch_execute("CREATE TABLE refused ()").unwrap_err();
        client.is_valid(PATIENCE).unwrap();
        assert!(watch.take_refused_write() && watch.is_idle());

        client.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").unwrap_err();
        assert_eq!(watch.fatal(), Some(SqlState::ADMIN_SHUTDOWN));
        assert!(watch.is_lost() && !watch.is_idle());
    }
}

#[test]
fn a_connection_that_ends_without_a_word_is_lost() {
    let server = Server::start();
    let (mut client, watch) = connected(&to(&server), NoTls);
    server.kill();
    assert!(!watch.is_lost());
    client.is_valid(PATIENCE).unwrap_err();
    assert!(watch.is_lost() && !watch.is_poisoned());
    assert_eq!(watch.fatal(), None);
}

#[test]
fn sees_what_is_left_unfinished() {
    for (mut client, watch) in every_way() {
        let rows = "SELECT generate_series(1, 100000)";
        let mut result = client.query_typed_raw(rows, Vec::<(i32, Type)>::new()).unwrap();
        result.next().unwrap().unwrap();
        drop(result);
        assert!(watch.is_busy());
        client.is_valid(PATIENCE).unwrap();
        assert!(watch.is_idle());

        client.batch_execute("CREATE TEMP TABLE half (n int)").unwrap();
        let copy = client.copy_out(&format!("COPY ({rows}) TO STDOUT")).unwrap();
        drop(copy);
        flush(&mut client).unwrap();
        assert!(watch.is_busy());
        client.is_valid(PATIENCE).unwrap();
        assert!(watch.is_idle());

        let mut copy = client.copy_in("COPY half FROM STDIN").unwrap();
        copy.write_all(b"1\n").unwrap();
        assert!(watch.in_copy() && watch.is_busy());
        copy.finish().unwrap();
        flush(&mut client).unwrap();
        assert!(watch.is_idle());

        // No end of this COPY will ever be sent.
        client.batch_execute("COPY half FROM STDIN").unwrap_err();
        assert!(watch.in_copy() && watch.is_busy());
        client.is_valid(ms(100)).unwrap_err();
        assert!(watch.is_busy() || watch.is_lost());
        watch.abort();
    }
}

#[test]
fn a_queued_message_is_seen_after_a_flush() {
    for (mut client, watch) in every_way() {
        drop(client.prepare("SELECT 1").unwrap());
        assert_eq!(watch.outstanding(), 0);
        flush(&mut client).unwrap();
        // Or answered already, if the answer was quick.
        assert!(watch.outstanding() <= 1);
        assert!(watch.is_idle());
        client.batch_execute("LISTEN news; NOTIFY news").unwrap();
        flush(&mut client).unwrap();
        assert!(client.notifications().is_empty());
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Healthy,
    /// `postgres` may, depending on the moment, answer each later call with the answer to the one before.
    Desynchronised,
    /// The server waits for rows that the client cannot send.
    Stuck,
}

use After::{Desynchronised, Healthy, Stuck};

type Use = fn(&mut Client);

/// What a user may do to a connection.
const USES: &[(&str, After, Use)] = &[
    ("COPY into a missing table", Desynchronised, |client| drop(client.copy_in("COPY missing FROM STDIN"))),
    ("COPY into a missing column", Desynchronised, |client| drop(client.copy_in("COPY rows (missing) FROM STDIN"))),
    ("COPY into a view", Desynchronised, |client| drop(client.copy_in("COPY seen FROM STDIN"))),
    ("COPY that is none", Desynchronised, |client| drop(client.copy_in("SELECT 1"))),
    ("COPY of nonsense", Desynchronised, |client| {
        let mut copy = client.copy_in("COPY rows FROM STDIN").unwrap();
        copy.write_all(b"nonsense\n").unwrap();
        copy.finish().unwrap_err();
    }),
    ("COPY of nonsense, unfinished", Desynchronised, |client| {
        let mut copy = client.copy_in("COPY rows FROM STDIN").unwrap();
        copy.write_all(b"nonsense\n").unwrap();
        copy.flush().unwrap();
    }),
    ("COPY that a trigger stops", Desynchronised, |client| {
        let copy = client.copy_in("COPY guarded FROM STDIN").map(|copy| copy.finish());
        assert!(!matches!(copy, Ok(Ok(_))));
    }),
    ("COPY that a trigger stops, unfinished", Desynchronised, |client| drop(client.copy_in("COPY guarded FROM STDIN"))),
    ("COPY unfinished", Desynchronised, |client| {
        let mut copy = client.copy_in("COPY rows FROM STDIN").unwrap();
        copy.write_all(b"1\n").unwrap();
    }),
    ("COPY not begun", Desynchronised, |client| drop(client.copy_in("COPY rows FROM STDIN"))),
    ("COPY by batch_execute", Stuck, |client| drop(client.batch_execute("COPY rows FROM STDIN").unwrap_err())),
    ("COPY finished", Healthy, |client| {
        let mut copy = client.copy_in("COPY rows FROM STDIN").unwrap();
        copy.write_all(b"1\n2\n3\n").unwrap();
        assert_eq!(copy.finish().unwrap(), 3);
    }),
    ("COPY of nothing", Healthy, |client| {
        assert_eq!(client.copy_in("COPY rows FROM STDIN").unwrap().finish().unwrap(), 0)
    }),
    ("COPY out", Healthy, |client| {
        let mut out = Vec::new();
        io::Read::read_to_end(&mut client.copy_out("COPY (SELECT 1) TO STDOUT").unwrap(), &mut out).unwrap();
    }),
    ("COPY out, abandoned", Healthy, |client| {
        drop(client.copy_out("COPY (SELECT generate_series(1, 9999)) TO STDOUT"))
    }),
    ("COPY out of a missing table", Healthy, |client| drop(client.copy_out("COPY missing TO STDOUT"))),
    ("a syntax error", Healthy, |client| drop(client.batch_execute("SELEKT").unwrap_err())),
    ("a syntax error, prepared", Healthy, |client| drop(client.query("SELEKT", &[]).unwrap_err())),
    ("an error at run time", Healthy, |client| drop(client.query("SELECT 1 / $1::int", &[&0i32]).unwrap_err())),
    ("an error in a transaction", Healthy, |client| {
        client.transaction().unwrap().batch_execute("SELECT 1/0").unwrap_err();
    }),
    ("a COPY refused in a transaction", Desynchronised, |client| {
        drop(client.transaction().unwrap().copy_in("COPY missing FROM STDIN"));
    }),
    ("too many rows", Healthy, |client| {
        client.query_opt("SELECT repeat('x', 1000) FROM generate_series(1, 300)", &[]).unwrap_err();
    }),
    // More than the socket takes at once.
    ("a very long query", Healthy, |client| {
        client.batch_execute(&format!("SELECT '{}'", "x".repeat(8 << 20))).unwrap();
    }),
    ("a portal", Healthy, |client| {
        let mut transaction = client.transaction().unwrap();
        let portal = transaction.bind("SELECT generate_series(1, 100)", &[]).unwrap();
        assert_eq!(transaction.query_portal(&portal, 10).unwrap().len(), 10);
    }),
    ("statements dropped", Healthy, |client| {
        let statements: Vec<_> = (0..20).map(|n| client.prepare(&format!("SELECT {n}")).unwrap()).collect();
        drop(statements);
    }),
    ("nothing", Healthy, |_| ()),
];

/// What the user may do next.
const FOLLOW_UPS: &[(&str, Use)] = &[
    ("nothing", |_| ()),
    ("check_connection", |client| drop(client.check_connection())),
    ("batch_execute(\"\")", |client| drop(client.batch_execute(""))),
    ("ROLLBACK", |client| drop(client.batch_execute("ROLLBACK"))),
    ("simple_query", |client| drop(client.simple_query("SELECT 'stale'"))),
    ("query", |client| drop(client.query("SELECT 'stale'", &[]))),
];

/// Whether a connection may be handed out again, by the steps that a pool takes when it is returned.
fn is_fit(client: &mut Client, watch: &Watch, limit: Duration) -> bool {
    if flush(client).is_err() {
        return false;
    }
    if watch.is_busy() && !watch.is_lost() && client.is_valid(limit).is_err() {
        return false;
    }
    watch.is_idle()
}

/// Whether the client gives the answers to other questions.
fn is_shifted(client: &mut Client) -> bool {
    (0..5).any(|n: i32| match client.query_typed_one(&format!("SELECT {n}"), &[]) {
        Ok(row) => row.get::<_, i32>(0) != n,
        Err(_) => true,
    })
}

#[test]
fn a_desynchronised_connection_is_never_fit_and_a_healthy_one_always() {
    let server = without_tls();
    server
        .connect()
        .batch_execute(
            "CREATE TABLE rows (n int); CREATE VIEW seen AS SELECT 1; CREATE TABLE guarded (n int); \
             CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'stop'; END $$; \
             CREATE TRIGGER stop BEFORE INSERT ON guarded EXECUTE FUNCTION stop();",
        )
        .unwrap();
    for &(one, after, use_it) in USES {
        for &(other, use_it_again) in FOLLOW_UPS {
            if after == Stuck && other == "check_connection" {
                continue; // for ever
            }
            // The outcome depends on the moment, so each pair is tried five times.
            for _ in 0..5 {
                let (mut client, watch) = connected(&to(server), NoTls);
                use_it(&mut client);
                use_it_again(&mut client);
                let limit = if after == Stuck { ms(100) } else { PATIENCE };
                let fit = is_fit(&mut client, &watch, limit);
                assert_eq!(fit, after == Healthy, "{one}, then {other}: {watch:?}");
                match fit {
                    true => assert!(!is_shifted(&mut client), "{one}, then {other}: another's answers"),
                    false => watch.abort(),
                }
            }
        }
    }
}

#[test]
fn cancels() {
    let text = format!("host=db.test {} sslmode=require", to(with_tls()));
    let encrypted = observer(&text, Identity::get().trusting());
    let plain = observer(&to(without_tls()), NoTls);
    fn try_it<T: Connector>(observer: &Observer<T>) {
        let watch = Watch::new();
        let mut client = observer.connect(&watch).unwrap();
        let token = client.cancel_token();
        thread::scope(|scope| {
            let sleeper = scope.spawn(|| client.batch_execute("SELECT pg_sleep(60)").unwrap_err());
            // A cancel that comes before the query has no effect, so it is sent until the query ends.
            assert!(wait_until(Instant::now() + PATIENCE, || {
                observer.cancel(&token, &watch, &Watch::new()).unwrap();
                sleeper.is_finished()
            }));
            assert_eq!(sleeper.join().unwrap().code(), Some(&SqlState::QUERY_CANCELED));
        });
        // The client's own watch does not see the cancel requests.
        assert!(watch.pid().is_some() && !watch.is_lost());
    }
    try_it(&plain);
    try_it(&observer(&without_tls().unix_conninfo("cancels"), NoTls));
    try_it(&encrypted);
}
