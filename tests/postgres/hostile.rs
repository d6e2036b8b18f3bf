//! Servers that answer with what they should not: the pool gives nothing away, takes no harm, and says what it heard in
//! a form that does none.

use crate::support::{SEEN, SOON, Server, capture, in_a_process, logged, wait_until};
use crate::tls::Identity;
use log::Level;
use millpond::postgres::{Connector, Error, PostgresManager};
use millpond::{Pool, Validate};
use parking_lot::Mutex;
use postgres::NoTls;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Far less than any limit of the pool's, and more than any noise.
const PROMPTLY: Duration = Duration::from_secs(5);
/// A control sequence that clears a terminal, and the beginning of a record that nobody made.
const HARMFUL: &str = "\x1b[2J\x1b[H\r\n[ERROR] forged\u{202e}\u{0}"; // a NUL ends a text of the protocol
/// What must not be seen of it.
const RAW: [char; 5] = ['\x1b', '\r', '\n', '\u{202e}', '\u{0}'];

// ---------------------------------------------------------------------------------------------- the server

type Script = dyn Fn(&mut TcpStream, &Liar) + Send + Sync;

/// A server that does with each connection what a script says, and remembers what it was told.
struct Liar {
    script: Box<Script>,
    heard: Mutex<Vec<String>>,
    /// Bytes that the clients took.
    taken: AtomicU64,
    over: AtomicBool,
}

/// Dropped, it ends the server.
struct Running {
    liar: Arc<Liar>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn new(script: impl Fn(&mut TcpStream, &Liar) + Send + Sync + 'static) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let liar = Arc::new(Liar {
            script: Box::new(script),
            heard: Mutex::default(),
            taken: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let serves = Arc::clone(&liar);
        let thread = thread::spawn(move || {
            thread::scope(|s| {
                for stream in listener.incoming() {
                    if serves.over.load(Ordering::SeqCst) {
                        return;
                    }
                    let mut stream = stream.unwrap();
                    let serves = &serves;
                    s.spawn(move || {
                        stream.set_read_timeout(Some(SOON)).unwrap();
                        stream.set_write_timeout(Some(SOON)).unwrap();
                        (serves.script)(&mut stream, serves);
                    });
                }
            });
        });
        Running { liar, address, thread: Some(thread) }
    }

    fn heard(&self) -> Vec<String> {
        self.liar.heard.lock().clone()
    }

    fn params(&self, more: &str) -> String {
        format!("host=db.test hostaddr=127.0.0.1 port={} user=alice password=secret {more}", self.address.port())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.liar.over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        let _ = self.thread.take().expect("joined once").join();
    }
}

impl Liar {
    /// The next message: `ssl?`, `tls`, `startup`, or the tag of another one. `None` at the end.
    fn hear(&self, stream: &mut TcpStream) -> Option<String> {
        self.hear_wholly(stream).map(|(said, _)| said)
    }

    /// The same, and its body.
    fn hear_wholly(&self, stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
        let mut head = [0; 5];
        stream.read_exact(&mut head).ok()?;
        let (kind, length) = match head[0] {
            0 => ("startup", u32::from_be_bytes(head[..4].try_into().unwrap()) as usize - 5),
            0x16 => ("tls", u16::from_be_bytes(head[3..].try_into().unwrap()) as usize),
            _ => ("tagged", u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4),
        };
        let mut body = vec![0; length];
        stream.read_exact(&mut body).ok()?;
        let said = match kind {
            "startup" if length == 3 => "ssl?".to_owned(),
            "tagged" => char::from(head[0]).to_string(),
            kind => kind.to_owned(),
        };
        self.heard.lock().push(said.clone());
        Some((said, body))
    }

    /// Says this, as far as the client takes it.
    fn say(&self, stream: &mut TcpStream, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match stream.write(bytes) {
                Ok(n) => {
                    self.taken.fetch_add(n as u64, Ordering::SeqCst);
                    bytes = &bytes[n..];
                }
                Err(_) => return false,
            }
        }
        true
    }
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

fn fatal(code: &str, text: &str) -> Vec<u8> {
    message(b'E', format!("SFATAL\0VFATAL\0C{code}\0M{text}\0\0").as_bytes())
}

/// Lets everybody in, the transaction status being `status`.
fn welcome(status: u8) -> Vec<u8> {
    [message(b'R', &[0; 4]), message(b'K', &[0, 0, 0, 7, 1, 2, 3, 4]), message(b'Z', &[status])].concat()
}

/// Answers empty queries until the client goes, and after each answer says `more`.
fn serve(stream: &mut TcpStream, liar: &Liar, more: &[u8]) {
    while let Some(said) = liar.hear(stream) {
        let answer = match said.as_str() {
            "Q" => [message(b'I', b""), message(b'Z', b"I"), more.to_vec()].concat(),
            "S" => [message(b'Z', b"I"), more.to_vec()].concat(),
            "X" => return,
            _ => continue,
        };
        if !liar.say(stream, &answer) {
            return;
        }
    }
}

// ---------------------------------------------------------------------------------------------- the pool

fn manager<T: Connector>(server: &Running, terms: &str, tls: T) -> PostgresManager<T> {
    PostgresManager::parse(&server.params(terms), tls).unwrap()
}

fn plain(server: &Running) -> PostgresManager<NoTls> {
    manager(server, "sslmode=disable", NoTls)
}

/// What the pool says of its first attempt to open a connection, which fails.
#[track_caller]
fn failure<T: Connector>(name: &str, manager: PostgresManager<T>) -> millpond::Error {
    let pool = Pool::builder().name(name).min_idle(1).build_unchecked(manager);
    assert!(wait_until(Instant::now() + SOON, || pool.stats().failed_opens > 0), "{}", pool.stats());
    let error = pool.get_timeout(Duration::ZERO).map(drop).expect_err("nobody is let in");
    pool.close(SOON);
    error
}

// ---------------------------------------------------------------------------------------------- the log

/// The records of the pool `name` of which one, at least, contains `text`.
#[track_caller]
fn records(name: &str, text: &str) -> Vec<String> {
    let of =
        || logged(|r| r.level <= Level::Debug && r.text.contains(name)).into_iter().map(|r| r.text).collect::<Vec<_>>();
    assert!(wait_until(Instant::now() + SOON, || of().iter().any(|r| r.contains(text))), "{:?}", of());
    of()
}

#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.contains(RAW), "{text:?}");
    assert!(text.len() < 4096, "{} bytes: {:?}...", text.len(), text.chars().take(300).collect::<String>());
}

// ---------------------------------------------------------------------------------------------- TLS and forks

/// What PostgreSQL says, in the words of its second protocol, when it has no process for a client.
const CANNOT_FORK: &[u8] = b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0";

/// A server that cannot fork: whatever it hears first, it answers with this and hangs up.
fn cannot_fork() -> Running {
    Running::new(|stream, liar| {
        if liar.hear(stream).is_some() {
            liar.say(stream, CANNOT_FORK);
        }
    })
}

#[test]
fn a_server_that_cannot_fork_refuses_nobody_for_good() {
    let _beside = crate::support::beside_others();
    let server = cannot_fork();
    for (terms, observed) in [
        ("sslmode=disable", true),
        ("sslmode=prefer", true),
        ("sslmode=require", true),
        ("sslmode=require sslnegotiation=direct", true),
        ("sslmode=disable", false),
        ("sslmode=prefer", false),
        ("sslmode=require", false),
        ("sslmode=require sslnegotiation=direct", false),
    ] {
        for has_tls in [true, false] {
            let error = match has_tls {
                true => failure("fork", manager(&server, terms, Identity::get().trusting()).observe(observed)),
                false => failure("fork", manager(&server, terms, NoTls).observe(observed)),
            };
            let case = format!("{terms}, TLS {has_tls}, observed {observed}: {error}");
            if terms.ends_with("direct") && !has_tls {
                // That is for the user to mend: there is no TLS to be direct with.
                assert!(error.is_connect(), "{case}");
                continue;
            }
            assert!(error.is_timeout(), "{case}");
            assert_harmless(&error.to_string());
            if observed && !terms.ends_with("direct") {
                assert!(error.to_string().contains("could not fork new process for connection"), "{case}");
            }
        }
    }
    // Where the user asked for TLS nothing but the wish for it went out.
    drop(server);
    let server = cannot_fork();
    for terms in ["sslmode=prefer", "sslmode=require", "sslmode=require sslnegotiation=direct"] {
        failure("fork", manager(&server, terms, Identity::get().trusting()));
    }
    let heard = server.heard();
    assert!(heard.iter().all(|said| said == "ssl?" || said == "tls"), "{heard:?}");
}

// ---------------------------------------------------------------------------------------------- before the login ends

/// A server that, when asked to let somebody in, says `first` and then `again`, over and over, until the client hangs
/// up; and how much it got rid of.
fn gush(first: Vec<u8>, again: Vec<u8>) -> Running {
    Running::new(move |stream, liar| {
        liar.hear(stream);
        liar.say(stream, &first);
        // The pool has all the time it wants; a client that takes this much has no bound.
        while liar.taken.load(Ordering::SeqCst) < 64 << 20 && liar.say(stream, &again) {}
    })
}

#[test]
fn what_is_too_long_before_the_login_ends_is_refused_at_once() {
    let _beside = crate::support::beside_others();
    let two_gigabytes = [&[b'E'][..], &i32::MAX.to_be_bytes()].concat();
    let a_key = [message(b'R', &[0; 4]), [&[b'K'][..], &i32::MAX.to_be_bytes()].concat()].concat();
    let notice = message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Mso it goes\0\0");
    let parameter = message(b'S', b"a\0b\0");
    let padding = vec![b'x'; 1 << 16];
    for (what, first, again) in [
        ("an error of 2 GB", two_gigabytes, padding.clone()),
        ("a key of 2 GB", a_key, padding),
        ("notices without end", message(b'R', &[0; 4]), notice.repeat(1000)),
        ("parameters without end", message(b'R', &[0; 4]), parameter.repeat(1000)),
    ] {
        let server = gush(first, again);
        let pool = Pool::builder().name("gush").max_size(1).min_idle(1).build_unchecked(manager(
            &server,
            "sslmode=disable",
            NoTls,
        ));
        let began = Instant::now();
        let seen = wait_until(began + PROMPTLY, || pool.stats().failed_opens > 0);
        assert!(seen, "{what}: it is still listening; {} bytes so far", server.liar.taken.load(Ordering::SeqCst));
        let error = pool.get_timeout(Duration::ZERO).map(drop).unwrap_err();
        assert!(error.is_timeout() && error.to_string().contains("before the login"), "{what}: {error}");
        assert_harmless(&error.to_string());
        // As much as lies in the buffers of two sockets.
        let taken = server.liar.taken.load(Ordering::SeqCst);
        assert!(taken < 32 << 20, "{what}: {taken} bytes");
        pool.close(SOON);
    }
}

#[test]
fn an_error_of_100_mb_is_neither_logged_nor_kept_as_a_whole() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    let long = fatal("57P03", &"x".repeat(100 << 20));
    let server = Running::new(move |stream, liar| {
        liar.hear(stream);
        liar.say(stream, &long);
        liar.hear(stream);
    });
    let error = failure("verbose-login", plain(&server));
    assert!(error.is_timeout(), "{}", error.to_string().len());
    assert_harmless(&error.to_string());
    records("verbose-login", "cannot open").iter().for_each(|r| assert_harmless(r));
}

#[test]
fn a_long_error_after_the_login_is_cut_and_not_kept() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    let long = [message(b'E', format!("SERROR\0VERROR\0CP0001\0M{}\0\0", "y".repeat(1 << 19)).as_bytes())].concat();
    for observed in [true, false] {
        let long = long.clone();
        let server = Running::new(move |stream, liar| {
            liar.hear(stream);
            liar.say(stream, &[welcome(b'I'), message(b'S', b"k\0v\0")].concat());
            while let Some(said) = liar.hear(stream) {
                if said == "Q" || said == "S" {
                    liar.say(stream, &[&long[..], &message(b'Z', b"I")].concat());
                }
            }
        });
        let name = format!("verbose-{observed}");
        let error = failure(&name, plain(&server).observe(observed));
        assert_harmless(&error.to_string());
        assert!(error.to_string().contains("yyy") && error.to_string().contains("cut"), "{error}");
        let typed = error.cause().unwrap().downcast_ref::<Error>().expect("its own type");
        assert_eq!(typed.code().map(|c| c.code()), Some("P0001"), "the code is known all the same");
        assert!(typed.as_db_error().is_none() && format!("{typed:?}").len() < 4096, "the whole of it is kept");
        records(&name, "cannot open").iter().for_each(|r| assert_harmless(r));
    }
}

#[test]
fn a_login_that_ends_in_an_unknown_status_gives_no_connection() {
    let _beside = crate::support::beside_others();
    for status in *b"?TE" {
        let server = Running::new(move |stream, liar| {
            liar.hear(stream);
            liar.say(stream, &welcome(status));
            serve(stream, liar, b"");
        });
        let error = failure("status", plain(&server));
        assert!(error.is_timeout() && error.to_string().contains("transaction status"), "{error}");
        assert_harmless(&error.to_string());
    }
    // And if it is the answer to the first question that ends so.
    let server = Running::new(|stream, liar| {
        liar.hear(stream);
        liar.say(stream, &welcome(b'I'));
        while liar.hear(stream).is_some_and(|said| said != "X") {
            liar.say(stream, &[message(b'I', b""), message(b'Z', b"?")].concat());
        }
    });
    let error = failure("status", plain(&server));
    assert!(error.is_timeout() && error.to_string().contains("transaction status"), "{error}");
}

// ---------------------------------------------------------------------------------------------- what has no end

/// How much a server here says at most, to a client that takes all of it.
const FLOOD: u64 = 64 << 20;
/// What that may cost the process, with all that this test has itself.
#[cfg(target_os = "linux")]
const MEMORY: u64 = 64 << 20;
/// And of the processors' time: a SCRAM of 2^31 rounds takes hours.
#[cfg(target_os = "linux")]
const WORK: Duration = Duration::from_secs(10);

/// A server that lets everybody in, answers so many questions, and answers the next one without an end: with this, of
/// which it says the first, the second, and so on. If it answers any, it lets only the first one in.
fn flood(questions: usize, piece: impl Fn(u64) -> Vec<u8> + Send + Sync + 'static) -> Running {
    Running::new(move |stream, liar| {
        liar.hear(stream);
        let logins = liar.heard.lock().iter().filter(|said| *said == "startup").count();
        if questions > 0 && logins > 1 {
            return;
        }
        liar.say(stream, &welcome(b'I'));
        let mut left = questions;
        while liar.hear(stream).is_some_and(|said| said != "X") {
            if left == 0 {
                // Until a piece is empty.
                let mut pieces = (0..).map(&piece).take_while(|piece| !piece.is_empty());
                while liar.taken.load(Ordering::SeqCst) < FLOOD {
                    let Some(true) = pieces.next().map(|piece| liar.say(stream, &piece)) else { break };
                }
            } else {
                left -= 1;
                liar.say(stream, &[message(b'I', b""), message(b'Z', b"I")].concat());
            }
        }
    })
}

/// A server that answers so many questions, and behind the last answer says `begun`, the beginning of a message. When
/// the next question has come, it says `rest` and then this without an end. It lets only the first one in.
#[cfg(target_os = "linux")]
fn begins_before(questions: usize, begun: Vec<u8>, rest: Vec<u8>, piece: Vec<u8>) -> Running {
    Running::new(move |stream, liar| {
        liar.hear(stream);
        if liar.heard.lock().iter().filter(|said| *said == "startup").count() > 1 {
            return;
        }
        liar.say(stream, &welcome(b'I'));
        for question in 1..=questions {
            liar.hear(stream);
            let more = if question == questions { &begun[..] } else { b"" };
            liar.say(stream, &[&message(b'I', b""), &message(b'Z', b"I"), more].concat());
        }
        liar.hear(stream);
        liar.say(stream, &rest);
        while liar.taken.load(Ordering::SeqCst) < FLOOD && liar.say(stream, &piece) {}
    })
}

/// A server that asks for a password by SCRAM, to be hashed so many times.
fn scram(iterations: u64) -> Running {
    Running::new(move |stream, liar| {
        liar.hear(stream);
        liar.say(stream, &message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0"));
        let Some((_, body)) = liar.hear_wholly(stream) else { return };
        let text = String::from_utf8_lossy(&body).into_owned();
        let nonce = text.rsplit_once("r=").unwrap().1;
        let text = format!("\0\0\0\x0br={nonce}more,s=c2FsdA==,i={iterations}");
        liar.say(stream, &message(b'R', text.as_bytes()));
        liar.hear(stream);
    })
}

/// A server that asks again and again for what it has been told.
fn asks_again(request: &'static [u8]) -> Running {
    Running::new(move |stream, liar| while liar.hear(stream).is_some() && liar.say(stream, &message(b'R', request)) {})
}

/// The most memory that this process ever had, in bytes.
#[cfg(target_os = "linux")]
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a high-water mark");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The time that the processors have spent on this process.
#[cfg(target_os = "linux")]
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How long a caller waits for a connection to such a server, and how long an attempt may take.
#[cfg(target_os = "linux")]
const WAIT: Duration = Duration::from_secs(2);
#[cfg(target_os = "linux")]
const ATTEMPT: Duration = Duration::from_secs(1);

/// Tries to get a connection, in vain, and closes the pool: both in time. Then nothing of it is left. Returns the
/// error's text. `late`: one connection was opened before, and is idle.
#[cfg(target_os = "linux")]
fn in_vain(name: &str, server: &Running, late: bool) -> String {
    let builder = Pool::builder().name(name).max_size(1).open_timeout(ATTEMPT).validation_timeout(ATTEMPT);
    let builder = builder.validate(Validate::Always);
    // One that is idle is validated; one that has just been opened is not.
    let pool = if late { builder.build(plain(server)).unwrap() } else { builder.build_unchecked(plain(server)) };
    let began = Instant::now();
    let error = pool.get_timeout(WAIT).map(drop).expect_err("a connection is handed on");
    assert!(began.elapsed() < WAIT + SEEN, "{name}: {:?}", began.elapsed());
    let report = pool.close(ATTEMPT);
    assert!(report.elapsed < ATTEMPT + SEEN, "{name}: {report}");
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{name}: {report}");
    assert_harmless(&error.to_string());
    error.to_string()
}

/// Messages of which each says another name.
#[cfg(target_os = "linux")]
fn parameters(piece: u64) -> Vec<u8> {
    (0..100).flat_map(|n| message(b'S', format!("{:0500}\0\0", piece * 100 + n).as_bytes())).collect()
}

#[cfg(target_os = "linux")]
#[test]
fn what_has_no_end_costs_a_bounded_time_and_memory() {
    if !in_a_process("hostile::what_has_no_end_costs_a_bounded_time_and_memory", &[]) {
        return;
    }
    // Each is long enough that a million bytes of them are read in a fraction of an attempt, by a debug build too.
    let text = "so it goes ".repeat(100);
    let notices = message(b'N', format!("SNOTICE\0VNOTICE\0C00000\0M{text}\0\0").as_bytes()).repeat(100);
    let notifications = message(b'A', format!("\0\0\0\x07a\0{text}\0").as_bytes()).repeat(100);
    let rows = message(b'D', &[0; 2]).repeat(1000);
    let endless = |n| if n == 0 { [&[b'D'][..], &i32::MAX.to_be_bytes()].concat() } else { vec![b'x'; 1 << 16] };
    let first = |n| if n == 0 { vec![b'N', 0, 0] } else { vec![] };
    let (again, too_much, gone) = (notifications.clone(), "a question of the pool's", "closed");
    let (notices_again, rows_again) = (notices.clone(), rows.clone());
    let a_gb = [&[b'A'][..], &(1i32 << 30).to_be_bytes(), b"\0\0\0\x07a\0"].concat();
    // The validation is answered, but half a message is behind the answer, so the pool asks once more.
    let (half, rest) = (b"A\0\0\0\x11\0\0".to_vec(), b"\0\x07channel\0\0".to_vec());
    let again_and_again = notifications.clone();
    let cases = [
        ("scram-most", scram(u64::from(u32::MAX)), "iteration count"),
        ("scram-signed", scram(1 << 31), "iteration count"),
        ("scram-more", scram(u64::MAX), "number too large"),
        ("md5-again", asks_again(b"\0\0\0\x05salt"), "unexpected message"),
        ("clear-again", asks_again(b"\0\0\0\x03"), "unexpected message"),
        // In answer to the first question, which is the pool's.
        ("notices", flood(0, move |_| notices.clone()), too_much),
        ("parameters", flood(0, parameters), too_much),
        ("notifications", flood(0, move |_| notifications.clone()), too_much),
        ("rows", flood(0, move |_| rows.clone()), "unexpected message"),
        ("2-gb", flood(0, endless), too_much),
        ("half", flood(0, first), "no answer"),
        // In answer to the second one, by which it is validated. The error is that of the next attempt.
        ("late-notices", flood(1, move |_| notices_again.clone()), gone),
        ("late-parameters", flood(1, parameters), gone),
        ("late-notifications", flood(1, move |_| again.clone()), gone),
        ("late-rows", flood(1, move |_| rows_again.clone()), gone),
        ("late-2-gb", flood(1, endless), gone),
        ("late-begun-before", begins_before(1, a_gb, vec![], vec![b'x'; 1 << 16]), gone),
        ("late-asked-again", begins_before(2, half, rest, again_and_again), gone),
    ];
    let (before, worked) = (most_memory(), processor_time());
    for beside in cases.chunks(4) {
        thread::scope(|s| {
            for (name, server, words) in beside {
                s.spawn(move || {
                    let error = in_vain(name, server, name.starts_with("late"));
                    eprintln!("{name}: {} bytes; {error}", server.liar.taken.load(Ordering::SeqCst));
                    assert!(error.contains(words), "{name}: {error}");
                });
            }
        });
    }
    let (memory, worked) = (most_memory() - before, processor_time() - worked);
    eprintln!("{} KiB, {worked:?}", memory >> 10);
    assert!(memory < MEMORY, "{memory} bytes of memory");
    assert!(worked < WORK, "{worked:?} of work");
}

// ---------------------------------------------------------------------------------------------- what is shown

#[test]
fn a_servers_words_are_escaped_wherever_they_are_shown() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    for (code, permanent) in [("57P03", false), ("28P01", true)] {
        for observed in [true, false] {
            let server = Running::new(move |stream, liar| {
                liar.hear(stream);
                liar.say(stream, &fatal(code, &format!("go away{HARMFUL}").replace('\0', "")));
                liar.hear(stream);
            });
            let name = format!("rude-{code}-{observed}");
            let error = failure(&name, plain(&server).observe(observed));
            assert_eq!(error.is_connect(), permanent, "{error}");
            assert!(error.to_string().contains("go away\\u{1b}[2J"), "{error}");
            for text in [error.to_string(), format!("{error:?}"), error.cause().unwrap().to_string()] {
                assert_harmless(&text);
            }
            // The typed source is as it came.
            let typed = error.cause().unwrap().downcast_ref::<Error>().unwrap();
            assert!(typed.as_db_error().unwrap().message().contains("\x1b[2J"));
            assert_harmless(&typed.to_string());
            records(&name, "cannot open").iter().for_each(|r| assert_harmless(r));
        }
    }
}

/// Names are anybody's who may create one.
#[test]
fn the_names_of_roles_databases_and_pools_are_escaped_in_audits_and_budgets() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    let name = format!("audited{HARMFUL}").replace('\0', "");
    let server = Server::shared();
    let mut admin = server.connect();
    let quoted = format!("\"{name}\"");
    admin.batch_execute(&format!("CREATE ROLE {quoted} LOGIN CONNECTION LIMIT 50")).unwrap();
    admin.batch_execute(&format!("CREATE DATABASE {quoted} CONNECTION LIMIT 40")).unwrap();
    let mut config = server.config("audited");
    config.user(&name).dbname(&name).application_name(&name);
    for processes in [1, 1000] {
        let manager = PostgresManager::new(config.clone(), NoTls).processes(processes);
        let pool = manager.builder().name(&*name).open().unwrap();
        let audit = millpond::postgres::audit(&pool).unwrap();
        let allowance = millpond::postgres::budget(&mut pool.get().unwrap()).unwrap();
        for text in [audit.to_string(), allowance.to_string(), pool.stats().to_string()] {
            text.lines().for_each(assert_harmless);
            assert!(!text.contains("\n[ERROR]") && text.contains("audited\\u{1b}[2J"), "{text}");
        }
        assert_eq!((audit.pool.as_str(), audit.role.as_str()), (name.as_str(), name.as_str()));
        records("audited", "the server allows").iter().for_each(|r| assert_harmless(r));
        pool.close(SOON);
    }
    admin.batch_execute(&format!("DROP DATABASE {quoted} WITH (FORCE)")).unwrap();
    admin.batch_execute(&format!("DROP ROLE {quoted}")).unwrap();
}

#[test]
fn notices_are_logged_without_what_is_harmful_in_them() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    let manager = PostgresManager::parse(&Server::shared().url(), NoTls).unwrap();
    let pool = manager.builder().name("notices").open().unwrap();
    let mut client = pool.get().unwrap();
    let raise = |what: &str| format!("DO $do$ BEGIN RAISE NOTICE 'notices % ', {what}; END $do$");
    client.batch_execute(&raise("E'\\x1b[2J\\r\\n[ERROR] forged'")).unwrap();
    client.batch_execute(&raise("repeat('x', 1000000)")).unwrap();
    drop(client);
    let records = records("notices", "xxx ... (cut)");
    assert!(records.iter().any(|r| r.contains("NOTICE: notices \\u{1b}[2J\\r\\n[ERROR] forged")), "{records:?}");
    records.iter().for_each(|r| assert_harmless(r));
    pool.close(SOON);
}

/// Behind the answer to question number `at` comes half a notification, and the rest of it before the next answer.
fn half_a_message_behind(at: usize) -> Running {
    let whole = message(b'A', b"\0\0\0\x07channel\0hello\0");
    Running::new(move |stream, liar| {
        liar.hear(stream);
        liar.say(stream, &welcome(b'I'));
        let (begin, end) = whole.split_at(9);
        let (mut asked, mut rest) = (0, &b""[..]);
        while let Some(said) = liar.hear(stream) {
            let empty = if said == "Q" { message(b'I', b"") } else { vec![] };
            if said == "Q" || said == "S" {
                asked += 1;
                let more = if asked == at { begin } else { b"" };
                liar.say(stream, &[rest, &empty, &message(b'Z', b"I"), more].concat());
                rest = if asked == at { end } else { b"" };
            }
        }
    })
}

#[test]
fn half_a_message_is_not_idle_until_the_other_half_is_there() {
    let _beside = crate::support::beside_others();
    // The pool asks once when it opens a connection. Behind the answer to what the user asks:
    let server = half_a_message_behind(2);
    let asked = || server.heard().iter().filter(|said| *said == "Q" || *said == "S").count();
    let pool = plain(&server).builder().connection_timeout(SOON).name("half").max_size(1).open().unwrap();
    assert_eq!(asked(), 1);
    let mut client = pool.get().unwrap();
    client.simple_query("").unwrap();
    drop(client);
    let settled = || asked() == 3 && pool.stats().idle == 1;
    assert!(wait_until(Instant::now() + SOON, settled), "nobody asked: {}", pool.stats());
    assert_eq!((pool.stats().opens, pool.stats().closes), (1, 0), "it is as good as any");
    pool.close(SOON);

    // Behind the answer to the pool, which validates:
    let server = half_a_message_behind(2);
    let asked = || server.heard().iter().filter(|said| *said == "Q" || *said == "S").count();
    let builder = plain(&server).builder().connection_timeout(SOON).name("half-valid").max_size(1);
    let pool = builder.validate(Validate::Always).open().unwrap();
    drop(pool.get().unwrap());
    assert_eq!((asked(), pool.stats().opens, pool.stats().closes), (3, 1, 0), "asked again, and it is as good as any");
    pool.close(SOON);
}
