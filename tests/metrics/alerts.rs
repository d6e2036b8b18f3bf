//! Six programs under one real Prometheus: one for each fault, which is made, and the example, which is well. Each alert fires for
//! its own and for no other.

use crate::monitoring::queries;
use crate::page::{Page, collected, recorder, reported};
use crate::prometheus::{Endpoint, Prometheus, fetch, file, find};
use crate::support::programs::example;
use crate::support::{Database, SOON, Server, Stopped, alone, ms, skipped, sleep_until, wait_until, within};
use millpond::metrics::Pools;
use millpond::{Manage, Pool, postgres};
use rustix::process::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// For how long the program that is late leaves a connection idle.
const MAX_IDLE: Duration = Duration::from_secs(2);

/// Serves a pool's metrics by the collector.
fn by_collector(pool: &Pool<impl Manage>) -> Endpoint {
    let pools = Pools::of(pool);
    Endpoint::serve(OPEN_METRICS, move || collected(&pools))
}

/// ... and by the facade.
fn by_facade(pool: &Pool<impl Manage>) -> Endpoint {
    let (pools, recorder) = (Pools::of(pool), recorder());
    Endpoint::serve(TEXT, move || reported(&pools, &recorder))
}

/// A program that says where it listens. It ends when its input does, and with this.
struct Program {
    child: Child,
    stdout: BufReader<ChildStdout>,
    addr: SocketAddr,
}

impl Program {
    fn start(command: &mut Command) -> Program {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut program = Program { child, stdout, addr: SocketAddr::from(([0; 4], 0)) };
        let line = program.says("listening on http://");
        program.addr = line.trim_end_matches("/metrics").parse().unwrap();
        program
    }

    /// What follows these words, when it says them.
    fn says(&mut self, words: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "it ended and never said: {words}");
            if let Some(rest) = line.trim_end().strip_prefix(words) {
                return rest.to_string();
            }
        }
    }

    fn page(&self) -> Page {
        Page::parse(&fetch(self.addr, "/metrics").unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is stopped for longer than its connection may be idle.
#[test]
#[ignore = "a program of its own, for the test below"]
fn the_program_that_is_stopped() {
    let address = std::env::var("MILLPOND_METRICS_DATABASE").expect("the test below starts this one");
    let pool = postgres::builder(&address).unwrap().name("late").max_idle(MAX_IDLE).open().unwrap();
    let endpoint = by_collector(&pool);
    // (In a line of its own, whatever the harness has written.)
    println!("\nlistening on http://{}", endpoint.addr);
    for _ in std::io::stdin().lines() {
        drop(pool.get().unwrap());
        println!("\nused");
    }
}

/// The rules with times that a test can wait for.
fn rules() -> String {
    let mut rules = fs::read_to_string(file("monitoring/millpond.rules.yml")).unwrap();
    for (long, short) in [
        ("[2m]", "[10s]"),
        ("offset 2m", "offset 10s"),
        ("[5m]", "[10s]"),
        ("[15m]", "[10s]"),
        ("for: 3m", "for: 3s"),
        ("for: 30s", "for: 3s"),
    ] {
        assert!(rules.contains(long), "{long}");
        rules = rules.replace(long, short);
    }
    assert!(!rules.contains("m]") && !rules.contains("0s\n        labels"), "a time that is not replaced: {rules}");
    rules
}

#[test]
fn each_alert_fires_in_its_fault_and_in_no_other() {
    let program = match find("prometheus") {
        Ok(program) => program,
        Err(why) => return skipped("each_alert_fires_in_its_fault_and_in_no_other", &why),
    };
    let _alone = alone();
    let (database, server) = (Database::get(), Server::start());
    let open = |database: &Database, name: &str| {
        postgres::builder(&database.conninfo(&format!("metrics-{name}"))).unwrap().name(name).max_size(2)
    };
    let exhausted = open(database, "exhausted").open().unwrap();
    let down = open(&server, "down").open().unwrap();
    let stuck = open(database, "stuck").open().unwrap();
    let leaking = open(database, "leaking").leak_threshold(ms(200)).open().unwrap();
    let pages = [by_collector(&exhausted), by_collector(&down), by_facade(&stuck), by_facade(&leaking)];

    let well = Program::start(Command::new(example("metrics")).arg(database.conninfo("metrics-well")).arg("0"));
    let mut late = Program::start(
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "alerts::the_program_that_is_stopped", "--nocapture", "--test-threads=1"])
            .env("MILLPOND_METRICS_DATABASE", database.conninfo("metrics-late")),
    );
    let targets: Vec<_> =
        ["exhausted", "down", "stuck", "leaking"].into_iter().zip(pages.iter().map(|p| p.addr)).collect();
    let targets = [&targets[..], &[("late", late.addr), ("well", well.addr)]].concat();
    let prometheus = Prometheus::start(&program, &rules(), &targets);

    // An increase can be seen by who has looked before.
    let is_scraped = || prometheus.series("count_over_time(millpond_health{state=\"down\"}[1m]) >= 2") == targets.len();
    assert!(wait_until(within(SOON), is_scraped), "{}", prometheus.complaints());
    assert_eq!(prometheus.alerts(), [], "nothing has happened yet");

    let over = AtomicBool::new(false);
    let mut fired = BTreeSet::new();
    let goes_on = || !over.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let _over = Over(&over);
        // Five want one of two connections, which all of them return after 20 ms.
        for _ in 0..5 {
            scope.spawn(|| {
                while goes_on() {
                    if let Ok(mut client) = exhausted.get_timeout(ms(10)) {
                        client.simple_query("SELECT pg_sleep(0.02)").unwrap();
                    }
                }
            });
        }
        server.stop_fast();
        scope.spawn(|| {
            while goes_on() {
                if let Ok(mut client) = down.get_timeout(ms(200)) {
                    assert!(client.simple_query("SELECT").is_err(), "the server has stopped");
                }
            }
        });
        // Two users keep what they have, and a third wants a connection. (After a first checkout the pool knows how long one lasts.)
        drop(stuck.get().unwrap());
        let held = [stuck.get().unwrap(), stuck.get().unwrap()];
        scope.spawn(|| {
            while goes_on() {
                drop(stuck.get_timeout(ms(100)));
            }
        });
        let leaked = leaking.get().unwrap();
        // As a machine that is overloaded does. Should the connection have been evicted before the stop, once more.
        let is_late = (0..5).any(|_| {
            writeln!(late.child.stdin.as_mut().unwrap(), "use").unwrap();
            late.says("used");
            let stopped = Stopped::stop([Pid::from_child(&late.child)]);
            sleep_until(within(MAX_IDLE + ms(1500)));
            drop(stopped);
            let idle = || late.page().value("millpond_connections_closed_total", &[("reason", "idle")]);
            assert!(wait_until(within(SOON), || idle() > 0.0), "it is evicted");
            late.page().value("millpond_evictions_late_total", &[]) > 0.0
        });
        assert!(is_late);

        let expected = ["Exhausted", "Down", "Stuck", "Leaking", "Late"];
        let expected: BTreeSet<_> = expected.map(|name| (format!("Millpond{name}"), name.to_lowercase())).into();
        let all_fired = wait_until(within(SOON), || {
            fired.extend(prometheus.alerts());
            fired.len() >= expected.len()
        });
        let said = prometheus.descriptions("MillpondDown");
        // (Of others first, if it was asked while it stopped.)
        let why =
            |said: &str| said.split('.').next().is_some_and(|first| first.contains(" fail with connection_refused"));
        assert!(matches!(&said[..], [said] if why(said)), "{said:?}");
        // For a while more, in which nothing else may fire.
        let more = within(ms(2000));
        while std::time::Instant::now() < more {
            fired.extend(prometheus.alerts());
            thread::sleep(ms(200));
        }
        assert_eq!(fired, expected, "all fired: {all_fired}. {}", prometheus.complaints());

        // The dashboard finds what it asks for.
        for query in queries("well", "orders") {
            assert!(wait_until(within(SOON), || prometheus.series(&query) > 0), "no series: {query}");
        }
        drop((held, leaked));
    });

    drop(pages);
    for mut program in [well, late] {
        drop(program.child.stdin.take());
        assert!(wait_until(within(SOON), || program.child.try_wait().unwrap().is_some()), "it does not end");
        assert!(program.child.wait().unwrap().success());
    }
    for pool in [exhausted, down, stuck, leaking] {
        assert!(pool.close(SOON).is_complete());
    }
    for name in ["exhausted", "stuck", "leaking", "late", "well"] {
        assert_eq!(database.wait_for(&format!("metrics-{name}"), 0, within(SOON)), 0, "{name}");
    }
}

/// Says that it is over, when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
