//! The stream and the observer against hostile servers, by `bolero`. See [`scanner::fuzz`](super::super::scanner) for
//! how to go on for longer.

use super::fake::{Fake, message, read_message};
use super::*;
use crate::postgres::wire::negotiation::Transport;
use crate::postgres::wire::tap::Tap;
use crate::postgres::wire::watch::Watched;
use std::collections::VecDeque;
use std::io::Write;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How long each of these tests goes on, unless the environment says otherwise.
const TIME: Duration = Duration::from_secs(2);
/// The notification that a stream makes up.
const MADE_UP: [u8; 11] = *b"A\0\0\0\x0a\0\0\0\0\0\0";

/// The choices that a case is made of; all are 0 once they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let [first, rest @ ..] = self.0 else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, most: u8) -> Vec<u8> {
        let n = usize::from(self.byte() % most).min(self.0.len());
        let (piece, rest) = self.0.split_at(n);
        self.0 = rest;
        piece.to_vec()
    }
}

// ---------------------------------------------------------------------------------------------- the stream

/// What a stream has to give, one after the other: bytes, nothing for now (`None`), and at last an end or an error.
struct Scripted {
    gives: VecDeque<Option<Vec<u8>>>,
    fails: bool,
    takes: usize,
}

impl AsyncRead for Scripted {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.gives.pop_front() {
            Some(Some(mut bytes)) => {
                let rest = bytes.split_off(bytes.len().min(buf.remaining()));
                buf.put_slice(&bytes);
                if !rest.is_empty() {
                    self.gives.push_front(Some(rest));
                }
                Poll::Ready(Ok(()))
            }
            Some(None) => Poll::Pending,
            None if self.fails => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len().min(self.takes)))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl ::postgres::tls::TlsStream for Scripted {
    fn channel_binding(&self) -> ::postgres::tls::ChannelBinding {
        ::postgres::tls::ChannelBinding::none()
    }
}

/// How often a made-up notification was seen.
static MADE: AtomicUsize = AtomicUsize::new(0);

/// Takes the made-up notifications out of what a client has read. They stand between two messages, and nowhere else.
fn without_the_made_up(mut read: &[u8]) -> Vec<u8> {
    let mut rest = Vec::new();
    while let [_, a, b, c, d, ..] = read {
        let length = i32::from_be_bytes([*a, *b, *c, *d]);
        let Some(end) = usize::try_from(length).ok().filter(|&n| n >= 4).map(|n| n + 1) else { break };
        let (message, after) = read.split_at(end.min(read.len()));
        if message == MADE_UP {
            MADE.fetch_add(1, Relaxed);
        } else {
            rest.extend(message);
        }
        read = after;
    }
    rest.extend(read);
    rest
}

/// What the server says reaches the client as it is, in the same order, whatever pieces it comes in and whenever the
/// pool looks; after a fault, and after an abort, nothing does.
#[test]
fn a_stream_passes_on_what_the_server_says_and_nothing_else() {
    let cx = &mut Context::from_waker(Waker::noop());
    let startup = &message(0, b"\0\x03\0\0user\0alice\0\0")[1..];
    let run = |bytes: &[u8]| {
        let mut choices = Choices(bytes);
        let mut gives = VecDeque::new();
        let welcome = [message(b'R', &[0; 4]), message(b'K', b"\0\0\0\x07keys"), message(b'Z', b"I")].concat();
        if choices.byte() % 4 != 0 {
            gives.push_back(Some(welcome));
        }
        let (fails, takes, ends) = (choices.byte() % 2 == 0, usize::from(choices.byte()) + 1, choices.byte());
        let mut moves = Vec::new();
        while !choices.0.is_empty() {
            moves.push(choices.byte());
            match choices.byte() % 8 {
                0..3 => gives.push_back(None),
                3 => gives.push_back(Some(choices.bytes(40)).filter(|bytes| !bytes.is_empty())),
                kind => {
                    let mut whole = message(b"NASDCZAE"[usize::from(kind)], &choices.bytes(30));
                    // Half of it first.
                    let half = whole.split_off(usize::from(choices.byte()) % whole.len());
                    gives.extend([Some(whole), None, Some(half)].into_iter().filter(|give| *give != Some(vec![])));
                }
            }
        }
        let said: Vec<u8> = gives.iter().flatten().flatten().copied().collect();

        let watch = Watch::new();
        let transport = Transport::Tls(Scripted { gives, fails, takes });
        let watched = Watched::begin(Arc::clone(&watch));
        let mut tap = Tap { transport, watched, login_timer: None, lingers: false };
        let mut rest = startup;
        while !rest.is_empty() {
            let Poll::Ready(Ok(n)) = Pin::new(&mut tap).poll_write(cx, rest) else { panic!("it takes {takes}") };
            rest = &rest[n..];
        }
        let mut read = Vec::new();
        let mut moves = moves.into_iter().cycle();
        let (mut at_abort, mut ended_well) = (None, false);
        for step in 0..4 * said.len() + 100 {
            let action = moves.next().unwrap_or(0xff);
            match action % 8 {
                0 => watch.probe.begin(),
                1 => watch.probe.end(),
                2 if usize::from(ends) == step => {
                    watch.abort();
                    at_abort = Some(read.len());
                }
                _ => {}
            }
            let mut buffer = vec![0; usize::from(action / 8) + 1];
            let mut buf = ReadBuf::new(&mut buffer);
            let polled = Pin::new(&mut tap).poll_read(cx, &mut buf);
            let ended = matches!(polled, Poll::Ready(Ok(()))) && buf.filled().is_empty();
            match polled {
                Poll::Ready(Err(_)) => assert!(buf.filled().is_empty(), "bytes beside an error"),
                Poll::Pending => assert!(buf.filled().is_empty(), "bytes beside nothing"),
                Poll::Ready(Ok(())) => {}
            }
            read.extend(buf.filled());
            // Of a notification that it has begun with, it makes up the rest.
            assert!(at_abort.is_none_or(|n| read.len() - n < MADE_UP.len()), "bytes after an abort");
            if ended || matches!(polled, Poll::Ready(Err(_))) {
                assert!(watch.is_lost() && !watch.is_clean(), "{watch:?}");
                ended_well = ended;
                break;
            }
        }
        let (read, said) = (without_the_made_up(&read), without_the_made_up(&said));
        // The last one that was made up may be half read.
        let mut ends = (0..MADE_UP.len()).filter_map(|n| read.strip_suffix(&MADE_UP[..n]));
        let right = |read: &[u8]| if ended_well { said == read } else { said.starts_with(read) };
        assert!(ends.any(right), "the client reads {read:?} of {said:?}");
        drop(tap);
        assert!(!watch.has_waker(), "a waker is kept");
    };
    bolero::check!().with_max_len(600).with_test_time(TIME).for_each(run);
    assert!(MADE.load(Relaxed) > 0, "it was never looked at: {MADE:?}");
}

// ---------------------------------------------------------------------------------------------- the observer

/// A server says anything, from the answer to the request for TLS on, and hangs up. The client is let in only if it
/// was told so, and what follows does no harm either.
#[test]
fn a_server_that_says_anything_does_no_harm() {
    static LET_IN: AtomicUsize = AtomicUsize::new(0);
    bolero::check!().with_max_len(400).with_test_time(TIME).for_each(|bytes: &[u8]| {
        let mut choices = Choices(bytes);
        let terms = ["sslmode=disable", "sslmode=prefer", "sslmode=require"][usize::from(choices.byte() % 3)];
        let has_tls = choices.byte() % 2 == 0;
        let greeting = b"NNNSEX"[usize::from(choices.byte() % 6)];
        let welcome = [message(b'R', &[0; 4]), message(b'K', b"\0\0\0\x07keys"), message(b'Z', b"I")].concat();
        // One answer to each message of the client's.
        let mut answers = Vec::new();
        let mut login = [choices.bytes(3), welcome].concat();
        if choices.byte() % 2 == 0 {
            let at = usize::from(choices.byte()) % login.len();
            login[at] ^= choices.byte();
        }
        answers.push(login);
        while !choices.0.is_empty() {
            let tag = b"RKZNASEDCTI123"[usize::from(choices.byte() % 14)];
            let body = choices.bytes(60);
            answers.push(if choices.byte() % 4 == 0 { body } else { message(tag, &body) });
        }
        let may_be_in = answers.concat().windows(5).any(|bytes| bytes == b"\0\0\0\x05I");
        let server = Fake::new(move |mut stream| {
            // A client that waits for the rest of a message says nothing.
            stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let mut answers = answers.into_iter();
            while let Some(said) = read_message(&mut stream) {
                let answer = if said == "ssl?" { Some(vec![greeting]) } else { answers.next() };
                let Some(true) = answer.map(|answer| stream.write_all(&answer).is_ok()) else { break };
            }
            let _ = stream.shutdown(Shutdown::Both);
        });
        let watch = Watch::new();
        let client = match has_tls {
            true => observer(&server.config(terms), tls::Identity::get().trusting()).connect(&watch),
            false => observer(&server.config(terms), NoTls).connect(&watch),
        };
        if let Ok(mut client) = client {
            LET_IN.fetch_add(1, Relaxed);
            assert!(may_be_in && watch.status() != Status::Unknown, "{watch:?}");
            watch.expect_little();
            let answered = client.is_valid(Duration::from_secs(5)).is_ok();
            if !answered {
                watch.abort();
            }
            let _ = look(&mut client, &watch);
            assert!(answered || !watch.is_clean(), "{watch:?}");
        }
        server.result();
    });
    assert!(LET_IN.load(Relaxed) > 0, "nobody was let in: {LET_IN:?}");
}
