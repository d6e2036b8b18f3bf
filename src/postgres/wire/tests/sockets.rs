//! Unix sockets under the observer, on real PostgreSQL servers, compared with the plain crate.

use std::io::Read;
use std::net::TcpStream;
use std::sync::mpsc;

use super::real::{PATIENCE, outcome, to, without_tls};
use super::tls::{Identity, with_tls};
use super::*;

/// In `postgres` there is no TLS over a unix socket.
#[test]
fn every_sslmode_ends_as_with_the_plain_crate() {
    const DECLINED: &str = "error performing TLS handshake: server does not support TLS";
    const NAMELESS: &str = "error performing TLS handshake: no hostname provided for TLS handshake";
    const WEAK: &str = "error performing TLS handshake: weak sslmode";
    // The server with TLS lets nobody in over its unix socket, and says that he came in clear text.
    let kept_out = "db error: FATAL: no pg_hba.conf entry for host \"[local]\", user \"postgres\", database \"postgres\", \
        no encryption";
    for (server, in_clear) in [(with_tls(), Err(kept_out.to_owned())), (without_tls(), Ok(false))] {
        // The terms, and the error without TLS in the connector, and with it.
        for (terms, without, with) in [
            ("sslmode=disable", None, None),
            ("sslmode=prefer", None, None),
            ("sslmode=prefer sslnegotiation=direct", None, Some(WEAK)),
            ("sslmode=require", Some(DECLINED), Some(DECLINED)),
            ("sslmode=require sslnegotiation=direct", Some(NAMELESS), Some(NAMELESS)),
        ] {
            let text = format!("{} {terms}", server.unix_conninfo("over-unix"));
            let tls = || Identity::get().trusting();
            let plain = [outcome(&text, NoTls, false), outcome(&text, tls(), false)];
            let observed = [outcome(&text, NoTls, true), outcome(&text, tls(), true)];
            assert_eq!(observed, plain, "{terms}");
            for (observed, expected) in observed.iter().zip([without, with]) {
                match expected {
                    None => assert_eq!(observed, &in_clear, "{terms}"),
                    Some(error) => assert!(observed.as_ref().is_err_and(|e| e.starts_with(error)), "{observed:?}"),
                }
            }
        }
    }
}

/// The hosts are tried as `postgres` tries them, each at its port.
#[test]
fn hosts_in_every_form() {
    let server = without_tls();
    let (dir, port) = (server.socket_dir().display(), server.port());
    let unknown = "x".repeat(300);
    // Whether the connection comes over the unix socket. Nobody listens on port 1.
    for (text, over_unix) in [
        (format!("host={dir} port={port}"), true),
        (format!("host={dir},127.0.0.1 port={port}"), true),
        (format!("host={dir},{unknown} port={port}"), true),
        (format!("host=127.0.0.1,{dir} port={port}"), false),
        (format!("host=127.0.0.1,{dir} port=1,{port}"), true),
        (format!("host={unknown},{dir} port={port}"), true),
        (format!("host={dir},127.0.0.1 port=1,{port}"), false),
        (format!("host={dir},localhost port=1,{port}"), false),
        (format!("host=/nowhere,{dir} port={port}"), true),
        (format!("host=/nowhere,127.0.0.1,{dir} port=1,1,{port}"), true),
        (format!("host={dir} port={port} connect_timeout=2 target_session_attrs=read-write"), true),
        (format!("host=/nowhere,127.0.0.1 port={port} target_session_attrs=read-write"), false),
    ] {
        let (mut client, watch) = connected(&format!("{text} user=postgres"), NoTls);
        let asked = "SELECT pg_backend_pid(), inet_server_addr() IS NULL";
        let row = client.query_typed_one(asked, &[]).unwrap();
        assert_eq!((watch.pid(), over_unix), (Some(row.get(0)), row.get(1)), "{text}");
        assert!(watch.is_idle(), "{text}");
    }

    let random = format!("host={dir},127.0.0.1 port={port} user=postgres load_balance_hosts=random");
    let mut met = [false; 2];
    for _ in 0..100 {
        let (_client, watch) = connected(&random, NoTls);
        met[usize::from(watch.socket().is_some())] = true;
    }
    assert_eq!(met, [true; 2]);

    let read_only = format!("host={dir} port={port} user=postgres target_session_attrs=read-only");
    assert_eq!(chain(&refused(&read_only, NoTls)), "error connecting to server: database is not read only");
    // The error is that of the last host.
    let unknown = format!("/nowhere,{unknown}");
    for (hosts, says) in [
        ("127.0.0.1,/nowhere", "error connecting to server: /nowhere/.s.PGSQL.1: No such file"),
        ("/nowhere,127.0.0.1", "error connecting to server: Connection refused"),
        (&unknown, "error connecting to server: failed to lookup address information"),
    ] {
        let error =
            observer(&format!("host={hosts} port=1 user=postgres"), NoTls).connect(&Watch::new()).err().unwrap();
        let error = match error {
            ConnectError::Postgres(error) => chain(&error),
            error => error.to_string(),
        };
        assert!(error.starts_with(says), "{hosts}: {error}");
    }
}

/// A notice callback is the one part of a configuration that cannot be read, and so could not be copied.
#[test]
fn the_whole_configuration_counts() {
    let mut config = config(&without_tls().unix_conninfo("whole-config"));
    let (notices, heard) = mpsc::channel();
    let notices = Mutex::new(notices);
    let callback = move |notice: ::postgres::error::DbError| drop(notices.lock().send(notice.message().to_owned()));
    config.options("-c work_mem=123kB").notice_callback(callback);
    let watch = Watch::new();
    let mut client = Observer::new(&config, NoTls, &Arc::default()).unwrap().connect(&watch).unwrap();
    let set = "SELECT current_setting('work_mem'), current_setting('application_name')";
    let row = client.query_typed_one(set, &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), ("123kB", "whole-config"));
    client.batch_execute("DO $$ BEGIN RAISE NOTICE 'heard'; END $$").unwrap();
    assert_eq!(heard.try_recv().as_deref(), Ok("heard"));
}

/// Whoever comes to a stand-in beside the one connection that it is made for gets nothing, and hinders nobody.
#[test]
fn strangers_at_a_stand_in_get_nothing() {
    let observer = observer(&without_tls().unix_conninfo("strangers"), NoTls);
    let path = unix::socket_in(without_tls().socket_dir(), without_tls().port());
    for round in 0..20 {
        let stand_in = unix::StandIn::new(path.clone()).unwrap();
        let port = stand_in.port().unwrap();
        let strangers: Vec<_> = (0..50).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
        let watch = Watch::new();
        let mut client = observer.connect_behind(stand_in, port, &watch).unwrap();
        assert!(watch.is_idle() && watch.socket().is_some(), "{round}");
        client.batch_execute("").unwrap();
        for mut stranger in strangers {
            stranger.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut got = Vec::new();
            let error = stranger.read_to_end(&mut got).unwrap_err();
            assert_eq!((error.kind(), got.len()), (io::ErrorKind::ConnectionReset, 0));
        }
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "nobody listens while the connection lives");
    }
}

/// Where this process cannot connect to itself, that is told from a server that is away, and not tried again for a
/// while.
#[test]
fn without_a_loopback_nothing_is_observed() {
    let (text, loopback) = (without_tls().unix_conninfo("no-loopback"), Arc::default());
    let observer = || Observer::new(&config(&text), NoTls, &loopback);
    let stand_in = unix::StandIn::new(unix::socket_in(without_tls().socket_dir(), without_tls().port())).unwrap();
    // Nobody listens on port 1.
    let failed = observer().unwrap().connect_behind(stand_in, 1, &Watch::new());
    assert!(matches!(failed, Err(ConnectError::NoLoopback)));
    assert!(observer().is_none());
    let tcp = config(&format!("host=127.0.0.1 {}", to(without_tls())));
    assert!(Observer::new(&tcp, NoTls, &loopback).is_some());
}

/// Nobody who sees a watch sees the secret with which its queries can be cancelled.
#[test]
fn the_secret_of_a_backend_is_never_shown() {
    let secret = b"keys".map(|byte| byte.to_string()).join(", ");
    let fake = super::fake::Fake::new(|mut stream| {
        super::fake::let_in(&mut stream, 1, b'I');
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let (client, watch) = connected(&fake.config("sslmode=disable"), NoTls);
    assert_eq!(watch.key().map(|key| key.cancel_request()[12..].to_vec()).as_deref(), Some(&b"keys"[..]));
    drop(client);
    fake.result();
    // Nor while it is being told.
    let mut scanner = scanner::Scanner::new();
    scanner.received(&super::fake::message(b'K', b"\0\0\0\x01keys"));
    for shown in [format!("{watch:?}"), format!("{:?}", watch.key()), format!("{scanner:?}")] {
        assert!(!shown.contains(&secret) && !shown.contains("keys"), "{shown}");
    }
}
