//! A silent server, at every stage, and the switch that ends the wait.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use ::postgres::tls::{ChannelBinding, TlsStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::fake::{Fake, let_in, message, read_message};
use super::support::ms;
use super::tls::Identity;
use super::*;
use crate::postgres::wire::negotiation::Transport;
use crate::postgres::wire::tap::Tap;
use crate::postgres::wire::watch::Watched;

/// How soon an aborted call must end: long after any scheduling noise, and before any other limit.
const PROMPTLY: Duration = Duration::from_secs(2);

/// A server that runs `script`, reports its end, and is silent until the client hangs up.
fn silent_after(script: impl FnOnce(&mut TcpStream) + Send + 'static) -> (Fake<()>, mpsc::Receiver<()>) {
    let (silent, reached) = mpsc::channel();
    let fake = Fake::new(move |mut stream| {
        script(&mut stream);
        let _ = silent.send(());
        let _ = stream.read_to_end(&mut Vec::new());
    });
    (fake, reached)
}

/// Aborts once the server has gone silent, and returns the instant of the abort.
fn abort_when(reached: mpsc::Receiver<()>, watch: &Arc<Watch>) -> thread::JoinHandle<Instant> {
    let watch = watch.clone();
    thread::spawn(move || {
        reached.recv().unwrap();
        // The client has something to wait for now; let it begin to wait.
        thread::sleep(ms(20));
        watch.abort();
        Instant::now()
    })
}

fn was_aborted(error: &::postgres::Error) -> bool {
    let io = error.source().and_then(|error| error.downcast_ref::<io::Error>());
    io.map(io::Error::kind) == Some(io::ErrorKind::ConnectionAborted)
}

/// A watch whose stream is gone keeps no thread's runtime alive.
fn assert_lets_go(watch: &Watch) {
    assert!(!watch.has_waker());
}

/// What a server does until it falls silent.
type Script = fn(&mut TcpStream);

#[test]
fn aborts_a_connect_at_every_stage() {
    let reads_the_request_for_tls: Script = |stream| drop(read_message(stream));
    let agrees_to_tls: Script = |stream| {
        read_message(stream);
        stream.write_all(b"S").unwrap();
        read_message(stream);
    };
    let declines_tls: Script = |stream| {
        read_message(stream);
        stream.write_all(b"N").unwrap();
        read_message(stream);
    };
    let reads_hello: Script = |stream| drop(read_message(stream));
    let reads_the_startup: Script = |stream| drop(read_message(stream));
    let takes_the_password: Script = |stream| {
        read_message(stream);
        stream.write_all(&message(b'R', &[0, 0, 0, 3])).unwrap();
        read_message(stream);
    };
    for (stage, terms, script, negotiating) in [
        ("request for TLS", "sslmode=require", reads_the_request_for_tls, true),
        ("handshake", "sslmode=require", agrees_to_tls, true),
        ("direct handshake", "sslmode=require sslnegotiation=direct", reads_hello, true),
        ("startup after N", "sslmode=prefer", declines_tls, false),
        ("startup", "sslmode=disable", reads_the_startup, false),
        ("password", "sslmode=disable", takes_the_password, false),
    ] {
        let (fake, reached) = silent_after(script);
        let watch = Watch::new();
        let aborter = abort_when(reached, &watch);
        let error =
            observer(&fake.config(terms), Identity::get().trusting()).connect(&watch).err().unwrap().of_postgres();
        assert!(aborter.join().unwrap().elapsed() < PROMPTLY, "{stage}");
        match NegotiationError::of(&error) {
            Some(error) => {
                assert!(negotiating && matches!(error, NegotiationError::Aborted), "{stage}: {error}");
                assert!(error.is_transient());
            }
            None => assert!(!negotiating && was_aborted(&error), "{stage}: {}", chain(&error)),
        }
        assert!(watch.is_aborted() && watch.is_lost());
        assert_lets_go(&watch);
        fake.result();
    }
}

#[test]
fn a_watch_that_is_aborted_stays_aborted() {
    let (fake, _reached) = silent_after(|_| ());
    let watch = Watch::new();
    watch.abort();
    let error = observer(&fake.config("sslmode=disable"), NoTls).connect(&watch).err().unwrap().of_postgres();
    assert!(matches!(NegotiationError::of(&error), Some(NegotiationError::Aborted)));
    assert_lets_go(&watch);
    fake.result();
}

#[test]
fn aborts_a_query_and_the_drop_after_it() {
    for terms in ["sslmode=disable", "sslmode=require"] {
        let (reached, stage) = mpsc::channel();
        let fake = Fake::new(move |mut stream| {
            let mut tls = Identity::get().server();
            let mut encrypted;
            let stream: &mut dyn ReadWrite = match terms {
                "sslmode=disable" => &mut stream,
                _ => {
                    read_message(&mut stream);
                    stream.write_all(b"S").unwrap();
                    encrypted = rustls::Stream::new(&mut tls, &mut stream);
                    &mut encrypted
                }
            };
            let_in(stream, 1, b'I');
            stream.read_exact(&mut [0; 5]).unwrap();
            reached.send(()).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let (mut client, watch) = connected(&fake.config(terms), Identity::get().trusting());
        assert!(watch.is_idle());
        let aborter = abort_when(stage, &watch);
        let error = client.simple_query("SELECT 1").unwrap_err();
        let aborted = aborter.join().unwrap();
        assert!(was_aborted(&error), "{}", chain(&error));
        assert!(watch.is_lost() && !watch.is_idle() && client.is_closed());
        drop(client);
        assert!(aborted.elapsed() < PROMPTLY);
        assert_lets_go(&watch);
        fake.result();
    }
}

trait ReadWrite: Read + Write {}

impl<S: Read + Write> ReadWrite for S {}

#[test]
fn aborts_a_drop_that_waits_for_an_answer() {
    let (fake, reached) = silent_after(|stream| {
        let_in(stream, 1, b'I');
        read_message(stream);
    });
    let (mut client, watch) = connected(&fake.config("sslmode=disable"), NoTls);
    client.is_valid(ms(50)).unwrap_err();
    assert!(watch.is_busy() && !watch.is_lost());
    let (gone, end) = mpsc::channel();
    let dropper = thread::spawn(move || {
        drop(client);
        gone.send(()).unwrap();
    });
    // Without the abort the drop waits.
    end.recv_timeout(ms(100)).unwrap_err();
    let aborted = abort_when(reached, &watch).join().unwrap();
    end.recv().unwrap();
    assert!(aborted.elapsed() < PROMPTLY);
    dropper.join().unwrap();
    assert_lets_go(&watch);
    fake.result();
}

#[test]
fn an_idle_connection_that_is_aborted_is_not_idle() {
    let (fake, _reached) = silent_after(|stream| let_in(stream, 1, b'I'));
    let (client, watch) = connected(&fake.config("sslmode=disable"), NoTls);
    assert!(watch.is_idle() && !watch.is_lost());
    watch.abort();
    assert!(!watch.is_idle() && watch.is_lost());
    drop(client);
    fake.result();
}

#[test]
fn a_watch_does_not_keep_a_finished_connection_alive() {
    let (fake, _reached) = silent_after(|stream| let_in(stream, 1, b'I'));
    let (client, watch) = connected(&fake.config("sslmode=disable"), NoTls);
    assert!(watch.has_waker());
    drop(client);
    assert!(!watch.is_aborted());
    assert_lets_go(&watch);
    fake.result();
}

/// A stream on which nothing ever happens but what `during` does at each poll.
struct Nothing<F>(F);

impl<F: FnMut() + Unpin> Nothing<F> {
    fn polled<T>(&mut self) -> Poll<T> {
        (self.0)();
        Poll::Pending
    }
}

impl<F: FnMut() + Unpin> AsyncRead for Nothing<F> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.polled()
    }
}

impl<F: FnMut() + Unpin> AsyncWrite for Nothing<F> {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        self.polled()
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.polled()
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.polled()
    }
}

impl<F: FnMut() + Unpin> TlsStream for Nothing<F> {
    fn channel_binding(&self) -> ChannelBinding {
        ChannelBinding::none()
    }
}

/// Counts how often its thread is woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Each way of a stream to wait, and the same with `lingers`, where a shutdown reads.
fn wait_in_each_way<F: FnMut() + Unpin>(during: impl Fn(&Arc<Watch>) -> F, see: impl Fn(&Watch, Poll<bool>, &Woken)) {
    for (way, lingers) in [(0, false), (1, false), (2, false), (3, false), (3, true)] {
        let watch = Watch::new();
        let transport = Transport::Tls(Nothing(during(&watch)));
        let mut tap = Tap { transport, watched: Watched::begin(Arc::clone(&watch)), login_timer: None, lingers };
        let mut poll = |cx: &mut Context<'_>| {
            let tap = Pin::new(&mut tap);
            match way {
                0 => tap.poll_read(cx, &mut ReadBuf::new(&mut [0; 8])).map(|result| result.is_err()),
                1 => tap.poll_write(cx, b"Q").map(|result| result.is_err()),
                2 => tap.poll_flush(cx).map(|result| result.is_err()),
                _ => tap.poll_shutdown(cx).map(|result| result.is_err()),
            }
        };
        // Another thread polled before.
        let _ = poll(&mut Context::from_waker(Waker::noop()));
        let woken = Arc::new(Woken::default());
        let polled = poll(&mut Context::from_waker(&Waker::from(Arc::clone(&woken))));
        see(&watch, polled, &woken);
    }
}

#[test]
fn an_abort_wakes_the_thread_that_polled_last() {
    wait_in_each_way(
        |_| || {},
        |watch, polled, woken| {
            assert!(polled.is_pending());
            watch.abort();
            assert_eq!(woken.0.load(Ordering::SeqCst), 1);
        },
    );
}

#[test]
fn an_abort_in_the_middle_of_a_poll_is_seen_before_the_thread_sleeps() {
    wait_in_each_way(
        |watch| {
            let (watch, mut polls) = (Arc::clone(watch), 0);
            move || {
                polls += 1;
                if polls == 2 {
                    watch.abort();
                }
            }
        },
        |_, polled, _| assert_eq!(polled, Poll::Ready(true)),
    );
}
