//! A server that lies learns nothing more from an observed connection than from the plain `postgres` crate.

use std::io::{Read, Write};
use std::net::TcpListener;

use super::fake::{Fake, interrogate, let_in, message, read_message};
use super::tls::Identity;
use super::*;

/// A connector whose certificates do not matter: the fakes have none.
fn tls() -> tokio_postgres_rustls::MakeRustlsConnect {
    Identity::get().trusting()
}

/// What `connect` gives away to a server that answers the request for TLS with `reply`, and how it fails.
fn given_away<T: Connector>(terms: &str, tls: T, reply: &'static [u8], observed: bool) -> (Vec<String>, String, bool) {
    let fake = Fake::new(move |stream| interrogate(stream, reply));
    let text = fake.config(terms);
    let result = match observed {
        true => observer(&text, tls).connect(&Watch::new()).map_err(ConnectError::of_postgres),
        false => config(&text).connect(tls),
    };
    let error = result.err().expect("the fakes let nobody in");
    let io = matches!(NegotiationError::of(&error), Some(NegotiationError::Io(_)));
    (fake.result(), chain(&error), io)
}

#[test]
fn a_lying_server_gets_what_the_plain_crate_would_give_it() {
    let in_clear: &[&str] = &["startup alice", "password secret"];
    let declined: &[&str] = &["ssl?", "startup alice", "password secret"];
    let mut table: Vec<(&str, bool, &[u8], &[&str])> = Vec::new();
    // The terms, whether the connector has TLS, what the server replies to the request for it, what it receives.
    // What is neither yes nor no has a test of its own: there the plain crate gives away more.
    for reply in [&b"N"[..], b"S", b""] {
        table.push(("sslmode=disable", false, reply, in_clear));
        table.push(("sslmode=disable", true, reply, in_clear));
        table.push(("sslmode=disable sslnegotiation=direct", true, reply, in_clear));
        table.push(("sslmode=prefer", false, reply, in_clear));
        table.push(("sslmode=prefer sslnegotiation=direct", false, reply, in_clear));
        table.push(("sslmode=prefer sslnegotiation=direct", true, reply, &[]));
        table.push(("sslmode=require", false, reply, &["ssl?"]));
        table.push(("sslmode=require sslnegotiation=direct", false, reply, &[]));
        table.push(("sslmode=require sslnegotiation=direct", true, reply, &["tls"]));
        let (prefer, require): (&[&str], &[&str]) = match reply {
            b"S" => (&["ssl?", "tls"], &["ssl?", "tls"]),
            b"" => (&["ssl?"], &["ssl?"]),
            _ => (declined, &["ssl?"]),
        };
        table.push(("sslmode=prefer", true, reply, prefer));
        table.push(("sslmode=require", true, reply, require));
    }
    for (terms, has_tls, reply, expected) in table {
        let try_it = |observed| match has_tls {
            true => given_away(terms, tls(), reply, observed),
            false => given_away(terms, NoTls, reply, observed),
        };
        let (received, error, io) = try_it(true);
        let (plain_received, plain_error, _) = try_it(false);
        let case = format!("{terms}, TLS {has_tls}, reply {:?}", String::from_utf8_lossy(reply));
        assert_eq!(received, expected, "{case}");
        assert_eq!(received, plain_received, "{case}");
        // The plain crate calls a socket that fails during negotiation an I/O error; a connector can only fail as TLS.
        let kind = |error: &str| error.split_once(": ").map(|(_, cause)| cause.to_owned());
        match io {
            true => assert_eq!(kind(&error), kind(&plain_error), "{case}"),
            false => assert_eq!(error, plain_error, "{case}"),
        }
    }
}

/// Every answer but yes and no. The text of an error is shown: of the second version of the protocol, which PostgreSQL
/// speaks when it has no process for a client, and of the third.
#[test]
fn an_answer_neither_yes_nor_no_to_tls_is_a_failure_and_gives_nothing_away() {
    let cannot_fork = b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0";
    let full = message(b'E', b"SFATAL\0C53300\0Mtoo many\x1b[2J clients\0\0");
    let long = [b"E", &b"x\n".repeat(5000)[..]].concat();
    let replies: [(&[u8], &str); 7] = [
        (
            cannot_fork,
            "with an error, unverified: could not fork new process for connection: Resource temporarily unav",
        ),
        (&full, "with an error, unverified: too many\\u{1b}[2J clients"),
        (&long, " ... (cut)"),
        (b"E", "with an error, unverified: "),
        (b"E\0\0\0\x08", "with an error, unverified: "),
        (b"X", "with 'X', which is no answer"),
        (b"\x1b", "with '\\u{1b}', which is no answer"),
    ];
    for (reply, words) in replies {
        for (terms, has_tls) in [("sslmode=prefer", true), ("sslmode=require", true), ("sslmode=require", false)] {
            let case =
                format!("{terms}, TLS {has_tls}, reply {:?}", String::from_utf8_lossy(&reply[..reply.len().min(80)]));
            let reply = reply.to_vec();
            let fake = Fake::new(move |mut stream| {
                let mut received = vec![read_message(&mut stream)];
                stream.write_all(&reply).unwrap();
                // The server sends nothing more, and the client must not wait for ever.
                received.extend(std::iter::from_fn(|| Some(read_message(&mut stream))).take_while(Option::is_some));
                received
            });
            let began = std::time::Instant::now();
            let error = match has_tls {
                true => refused(&fake.config(terms), tls()),
                false => refused(&fake.config(terms), NoTls),
            };
            assert!(began.elapsed() < Duration::from_secs(8), "{case}");
            let negotiation = NegotiationError::of(&error).unwrap_or_else(|| panic!("{case}: {}", chain(&error)));
            assert!(negotiation.is_transient(), "{case}: {negotiation}");
            let text = negotiation.to_string();
            assert!(text.contains(words) && text.len() < 700 && !text.contains(['\n', '\x1b']), "{case}: {text}");
            assert_eq!(fake.result(), [Some("ssl?".to_owned())], "{case}");
        }
    }
}

#[test]
fn under_require_a_server_without_tls_sees_eight_bytes() {
    let fake = Fake::new(|mut stream| {
        let mut bytes = vec![0; 8];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(b"N").unwrap();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let error = refused(&fake.config("sslmode=require"), tls());
    assert_eq!(fake.result(), [0, 0, 0, 8, 4, 210, 22, 47]);
    let declined = NegotiationError::of(&error).unwrap();
    assert!(matches!(declined, NegotiationError::Declined) && !declined.is_transient());
}

/// Says yes to TLS and sends `more` together with that; then does TLS, and lets the client in.
fn yes_and(more: &'static [u8]) -> Fake<bool> {
    Fake::new(move |mut stream| {
        assert_eq!(read_message(&mut stream).as_deref(), Some("ssl?"));
        stream.write_all(&[b"S", more].concat()).unwrap();
        let mut tls = Identity::get().server();
        if tls.complete_io(&mut stream).is_err() {
            return false;
        }
        let_in(&mut rustls::Stream::new(&mut tls, &mut stream), 1, b'I');
        read_message(&mut stream);
        true
    })
}

#[test]
fn plaintext_slipped_in_before_the_handshake_fails_it() {
    let honest = yes_and(b"");
    drop(connected(&honest.config("sslmode=require"), tls()));
    assert!(honest.result());

    for terms in ["sslmode=prefer", "sslmode=require"] {
        let liar = yes_and(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I");
        let error = refused(&liar.config(terms), tls());
        assert!(matches!(NegotiationError::of(&error), Some(NegotiationError::Handshake(_))), "{}", chain(&error));
        assert!(!liar.result());
    }
}

#[test]
fn a_broken_handshake_is_told_from_a_refused_one() {
    let hangs_up = Fake::new(|stream| interrogate(stream, b"S"));
    let error = refused(&hangs_up.config("sslmode=require"), tls());
    let handshake = NegotiationError::of(&error).unwrap();
    assert!(matches!(handshake, NegotiationError::Handshake(_)) && handshake.is_transient(), "{handshake}");

    let stranger = yes_and(b"");
    let error = refused(&stranger.config("sslmode=require"), super::tls::wary());
    let handshake = NegotiationError::of(&error).unwrap();
    assert!(matches!(handshake, NegotiationError::Handshake(_)) && !handshake.is_transient(), "{handshake}");

    // A server that has no process for a client, where TLS begins without a request for it.
    let in_clear = Fake::new(|mut stream| {
        let received = read_message(&mut stream);
        stream.write_all(b"Ecould not fork new process for connection\n\0").unwrap();
        received
    });
    let error = refused(&in_clear.config("sslmode=require sslnegotiation=direct"), tls());
    let handshake = NegotiationError::of(&error).unwrap();
    assert!(matches!(handshake, NegotiationError::InClear(_)) && handshake.is_transient(), "{handshake}");
    assert_eq!(in_clear.result().as_deref(), Some("tls"));

    let silent = Fake::new(|stream| interrogate(stream, b""));
    let error = refused(&silent.config("sslmode=require"), tls());
    assert!(NegotiationError::of(&error).unwrap().is_transient());
}

/// A connector that notes the names it is asked for, and connects to none.
#[derive(Clone, Default)]
struct Notary(Arc<Mutex<Vec<String>>>);

#[derive(Debug)]
struct Never;

impl MakeTlsConnect<Socket> for Notary {
    type Stream = ::postgres::tls::NoTlsStream;
    type TlsConnect = Never;
    type Error = &'static str;

    fn make_tls_connect(&mut self, host: &str) -> Result<Never, &'static str> {
        self.0.lock().push(host.into());
        Err("no name is good enough")
    }
}

impl TlsConnect<Socket> for Never {
    type Stream = ::postgres::tls::NoTlsStream;
    type Error = &'static str;
    type Future = std::future::Ready<Result<Self::Stream, &'static str>>;

    fn connect(self, _: Socket) -> Self::Future {
        unreachable!("nobody could make one")
    }
}

#[test]
fn a_made_up_host_never_reaches_tls() {
    let notary = Notary::default();
    for (terms, received, words) in [
        ("sslmode=require", &["ssl?"][..], "no hostname provided for TLS handshake"),
        ("sslmode=require sslnegotiation=direct", &[], "no hostname provided for TLS handshake"),
        ("sslmode=prefer", &["ssl?"], "no hostname provided for TLS handshake"),
    ] {
        let fake = Fake::new(|stream| interrogate(stream, b"S"));
        let text = format!("hostaddr=127.0.0.1 port={} user=alice password=secret {terms}", fake.port());
        let error = refused(&text, notary.clone());
        assert_eq!(chain(&error), format!("error performing TLS handshake: {words}"));
        assert_eq!(fake.result(), received);
    }
    assert_eq!(*notary.0.lock(), [""; 0]);

    let fake = Fake::new(|stream| interrogate(stream, b"S"));
    let error = refused(&fake.config("sslmode=require"), notary.clone());
    assert!(matches!(NegotiationError::of(&error), Some(NegotiationError::Connector(_))));
    assert_eq!(chain(&error), "error performing TLS handshake: no name is good enough");
    assert_eq!(*notary.0.lock(), ["db.test"]);
}

#[test]
fn a_connector_that_will_not_begin_does_not_matter_without_tls() {
    let fake = Fake::new(|stream| interrogate(stream, b"N"));
    refused(&fake.config("sslmode=prefer"), Notary::default());
    assert_eq!(fake.result(), ["ssl?", "startup alice", "password secret"]);
}

#[test]
fn all_that_was_known_of_one_host_is_forgotten_at_the_next() {
    let dying = Fake::new(|mut stream| {
        read_message(&mut stream);
        let last_words = b"SFATAL\0VFATAL\0C57P03\0Mnot now\0\0";
        let words = [(b'R', &[0; 4][..]), (b'K', b"\0\0\0\x01keys"), (b'G', &[0; 3]), (b'E', last_words)];
        stream.write_all(&words.map(|(tag, body)| message(tag, body)).concat()).unwrap();
        read_message(&mut stream)
    });
    let good = Fake::new(|mut stream| {
        let_in(&mut stream, 2, b'I');
        read_message(&mut stream)
    });
    let text = format!(
        "host=a,b hostaddr=127.0.0.1,127.0.0.1 port={},{} user=alice sslmode=disable",
        dying.port(),
        good.port()
    );
    let (client, watch) = connected(&text, NoTls);
    dying.result();
    assert_eq!((watch.pid(), watch.status()), (Some(2), Status::Idle));
    assert!(watch.is_idle() && !watch.is_lost() && !watch.in_copy());
    assert_eq!((watch.outstanding(), watch.fatal()), (0, None));
    drop(client);
    good.result();
}

/// The whole observer relies on this: with `require` and `direct`, `postgres` gives the bare socket to the connector,
/// without sending anything itself, and takes the stream that the connector returns for encrypted.
#[test]
fn postgres_hands_the_bare_socket_to_the_connector() {
    let fake = Fake::new(|mut stream| {
        let_in(&mut stream, -77, b'I');
        read_message(&mut stream)
    });
    let (client, watch) = connected(&fake.config("sslmode=disable"), NoTls);
    assert_eq!(watch.pid(), Some(-77), "the stream was not watched");
    drop(client);
    assert_eq!(fake.result().as_deref(), Some("X"));
}

/// With an address `postgres` connects by TCP. And what it refuses, it refuses in its own words.
#[test]
fn a_unix_socket_with_an_address_or_the_wrong_ports_is_not_observed() {
    for (hosts, observed) in [
        ("host=/run/postgresql", true),
        ("host=db.test,/run/postgresql", true),
        ("host=/run/postgresql,db.test port=1,2", true),
        ("host=/run/postgresql hostaddr=127.0.0.1", false),
        ("host=/run/postgresql,db.test port=1,2,3", false),
    ] {
        let observer = Observer::new(&config(&format!("{hosts} user=alice")), NoTls, &Arc::default());
        assert_eq!(observer.is_some(), observed, "{hosts}");
    }
}

#[test]
fn a_configuration_that_the_plain_crate_refuses_is_refused_in_the_same_words() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for text in [
        "user=alice".to_owned(),
        "host=a,b hostaddr=127.0.0.1 user=alice".to_owned(),
        "hostaddr=127.0.0.1,127.0.0.1 port=1,2,3 user=alice".to_owned(),
        format!("host=db.test hostaddr=127.0.0.1 port={port} user=alice"),
        format!("hostaddr=127.0.0.1 port={port} user=alice"),
    ] {
        let plain = config(&text).connect(NoTls).err().unwrap();
        assert_eq!(chain(&refused(&text, NoTls)), chain(&plain), "{text}");
    }
}
