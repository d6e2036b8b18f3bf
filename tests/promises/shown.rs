//! P8: what comes from outside (a pool's name, a thread's, the words of a manager or of a panic) is shown escaped, and
//! cut at a length.

use crate::support::{SOON, alone, capture, logged, ms, threads_named, wait_until};
use log::Level;
use millpond::{Cause, Manage, Opening, Pool, Returned};
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

/// A control sequence that clears a terminal, a record that nobody made, and a change of direction.
const HARMFUL: &str = "\x1b[2J\r\n[ERROR] forged\u{202e}\u{7}";
/// What must not be seen of it.
const RAW: [char; 5] = ['\x1b', '\r', '\n', '\u{202e}', '\u{7}'];

/// What a call of the manager's does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Succeed,
    Fail,
    Panic,
}

/// A manager with something to say.
struct Rude {
    open: Act,
    validate: Act,
    words: String,
}

#[derive(Debug)]
struct Words(String);

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Words {}

impl Rude {
    fn act(&self, act: Act) -> Result<(), Words> {
        match act {
            Act::Succeed => Ok(()),
            Act::Fail => Err(Words(self.words.clone())),
            // Without the hook, which would print it.
            Act::Panic => std::panic::resume_unwind(Box::new(self.words.clone())),
        }
    }
}

impl Manage for Rude {
    type Connection = ();
    type Error = Words;

    fn open(&self, _: &Opening) -> Result<(), Words> {
        self.act(self.open)
    }

    fn validate(&self, _: &mut (), _: Duration) -> Result<(), Words> {
        self.act(self.validate)
    }

    fn returned(&self, _: &mut ()) -> Returned {
        Returned::Reset
    }

    fn remark(&self, _: &mut ()) -> Option<String> {
        Some(self.words.clone())
    }
}

fn rude(open: Act, words: &str) -> Rude {
    Rude { open, validate: Act::Succeed, words: words.into() }
}

// ---------------------------------------------------------------------------------------------- the log

/// The records of the pool whose name begins with `name`, of which one, at least, contains `text`.
#[track_caller]
fn records(name: &str, text: &str) -> Vec<String> {
    let of = || {
        logged(|r| r.target == "millpond" && r.level <= Level::Debug && r.text.contains(name))
            .into_iter()
            .map(|r| r.text)
            .collect::<Vec<_>>()
    };
    assert!(wait_until(Instant::now() + SOON, || of().iter().any(|r| r.contains(text))), "{:?}", of());
    of()
}

#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.contains(RAW), "{text:?}");
    assert!(text.len() < 4096, "{} bytes: {:?}...", text.len(), text.chars().take(300).collect::<String>());
}

/// The same of what has lines of its own.
#[track_caller]
fn assert_lines_harmless(text: &str) {
    text.lines().for_each(assert_harmless);
    assert!(!text.contains("\n[ERROR]"), "{text:?}");
}

// ---------------------------------------------------------------------------------------------- the tests

#[test]
fn a_pools_name_is_escaped_wherever_it_is_shown() {
    let _alone = alone();
    let _log = capture();
    let name = format!("named{HARMFUL}");
    let pool = Pool::builder().name(&*name).max_size(1).max_waiting(1).build(rude(Act::Succeed, "")).unwrap();
    let client = pool.get().unwrap();
    let timeout = pool.get_timeout(ms(1)).map(drop).unwrap_err();
    let too_many = thread::scope(|s| {
        let waits = s.spawn(|| pool.get_timeout(SOON).map(drop));
        assert!(wait_until(Instant::now() + SOON, || pool.stats().waiting == 1));
        let error = pool.get_timeout(ms(1)).map(drop).unwrap_err();
        drop(client);
        waits.join().unwrap().unwrap();
        error
    });
    assert!(timeout.is_timeout() && too_many.is_too_many_waiting(), "{timeout}, {too_many}");
    assert_lines_harmless(&pool.stats().to_string());
    assert_harmless(&format!("{pool:?}").replace("\\n", ""));
    assert_eq!(pool.stats().name, name, "for programs it is as it was given");
    let threads = threads_named("named");
    assert!(!threads.is_empty());
    threads.iter().for_each(|t| assert_harmless(t));
    let report = pool.close(SOON);
    let closed = pool.get().map(drop).unwrap_err();
    assert!(closed.is_closed());
    for text in [timeout.to_string(), too_many.to_string(), closed.to_string(), report.to_string()] {
        assert!(text.contains("pool 'named\\u{1b}[2J\\r\\n[ERROR] forged\\u{202e}\\u{7}'"), "{text}");
        assert_harmless(&text);
    }
    records("named", "closed").iter().for_each(|r| assert_harmless(r));
}

#[test]
fn a_managers_words_are_escaped_and_cut() {
    let _alone = alone();
    let _log = capture();
    let long = "x".repeat(10 << 20);
    for (name, words) in [("rude", HARMFUL), ("long", &long)] {
        for act in [Act::Fail, Act::Panic] {
            let name = format!("{name}-{act:?}-open");
            let pool = Pool::builder().name(&*name).min_idle(1).build_unchecked(rude(act, words));
            assert!(wait_until(Instant::now() + SOON, || pool.stats().failed_opens > 0), "{}", pool.stats());
            let error = pool.get_timeout(Duration::ZERO).map(drop).unwrap_err();
            assert!(error.is_timeout());
            pool.close(SOON);
            for text in [error.to_string(), error.cause().unwrap().to_string(), format!("{:?}", error.cause())] {
                assert_harmless(&text);
                assert!(text.contains("forged") || text.contains("xxx ... (cut)"), "{text}");
            }
            records(&name, "cannot open").iter().for_each(|r| assert_harmless(r));

            let name = format!("{name}-check");
            let manager = Rude { validate: act, ..rude(Act::Succeed, words) };
            let builder = Pool::builder().name(&*name).validate(millpond::Validate::Always);
            let pool = builder.connection_timeout(SOON).build_unchecked(manager);
            drop(pool.get());
            assert!(wait_until(Instant::now() + SOON, || pool.stats().idle == 1), "{}", pool.stats());
            drop(pool.get());
            pool.close(SOON);
            // That of a reset too: what there is to remark.
            let records = records(&name, if act == Act::Fail { "failed validation" } else { "panicked" });
            assert!(records.iter().any(|r| r.contains("checked out by")), "{records:?}");
            records.iter().for_each(|r| assert_harmless(r));
        }
    }
}

#[test]
fn a_cause_is_cut_at_a_kilobyte_and_keeps_what_it_was_made_of() {
    let _beside = crate::support::beside_others();
    #[derive(Debug)]
    struct Chain(usize, Option<Box<Chain>>);
    impl fmt::Display for Chain {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "layer {} of ä{HARMFUL}", self.0)
        }
    }
    impl std::error::Error for Chain {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_deref().map(|l| l as _)
        }
    }
    let chain = (0..1000).fold(None, |next, n| Some(Box::new(Chain(n, next))));
    let cause = Cause::of(*chain.unwrap());
    let text = cause.to_string();
    assert!(text.len() <= 1024 && text.ends_with(" ... (cut)"), "{} bytes: {text}", text.len());
    assert!(text.starts_with("layer 999 of ä\\u{1b}[2J") && text.contains(": layer 998 of"), "{text}");
    assert!(cause.downcast_ref::<Chain>().unwrap().to_string().contains(HARMFUL), "the error itself is as it came");
    assert_harmless(&Cause::message(format!("{HARMFUL}{}", "ä".repeat(10_000))).to_string());
}

#[test]
fn a_threads_name_is_escaped_and_cut() {
    let _alone = alone();
    let _log = capture();
    for (name, shown) in [(format!("worker{HARMFUL}"), "'worker\\u{1b}[2J"), ("w".repeat(100_000), "www ... (cut)'")] {
        let pool_name = format!("threads-{}", name.len());
        let builder = Pool::builder().name(&*pool_name).max_size(1).leak_threshold(ms(20));
        let pool = builder.build(rude(Act::Succeed, "")).unwrap();
        let worker = thread::Builder::new().name(name).spawn({
            let pool = pool.clone();
            move || std::mem::forget(pool.get().unwrap())
        });
        worker.unwrap().join().unwrap();
        let timeout = pool.get_timeout(ms(1)).map(drop).unwrap_err();
        let (table, row) = (pool.connections().to_string(), pool.connections()[0].to_string());
        assert_lines_harmless(&table);
        assert_eq!(table.lines().count(), 2, "{table}");
        let leak = records(&pool_name, "a leak?");
        let report = pool.close(ms(10));
        for text in [timeout.to_string(), table, row, report.to_string(), leak.last().unwrap().clone()] {
            assert!(text.contains(shown), "{text}");
            assert_lines_harmless(&text);
        }
    }
    // Who closed it.
    let pool = Pool::builder().name("closed-by").build(rude(Act::Succeed, "")).unwrap();
    let closes = pool.clone();
    let closer = thread::Builder::new().name(format!("closer{HARMFUL}"));
    closer.spawn(move || closes.close(SOON)).unwrap().join().unwrap();
    let error = pool.get().map(drop).unwrap_err().to_string();
    assert!(error.contains("on thread 'closer\\u{1b}[2J"), "{error}");
    assert_harmless(&error);
}
