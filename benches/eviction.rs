//! How late a pool closes what it promised to close, as the server sees it: `cargo bench --bench eviction [-- --quick]`.
//!
//! | scenario | what is done | what is promised |
//! |---|---|---|
//! | silence | 17 connections used at once, then none | each closed once unused for `max_idle` |
//! | trickle | the same, then one query per 100 ms | all but the one that is needed, too |
//! | steady | 4 threads, each a query every 5 ms | each closed once as old as `max_lifetime` |
//!
//! All pools and scenarios run side by side on one private server, whose `pg_stat_activity` is looked at every few
//! milliseconds; they do next to nothing, and so do not disturb each other. A pool that acts on a tick is late by where
//! in its tick it was caught: with `--quick` anywhere, otherwise just after one of r2d2's, which come every 30 s. Where a
//! Python with `psycopg_pool` is found (`pip install "psycopg[binary]" psycopg_pool`; `PYTHON` may name it), its pool
//! takes part.
//!
//! Millpond runs with its own manager, r2d2 with the stock one, both with their defaults but for what is promised.
//!
//! Times are the server's: a connection is born when its backend started, which is a little after the pool began to
//! open it, unused since its last query ended, and gone when its backend is, which is a little after the pool closed it.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::plot::{self, Axis};
use common::report::Part;
use common::{Store, is_quick, ms, short};
use millpond::postgres::PostgresManager;
use postgres::{Client, NoTls};
use r2d2_postgres::PostgresConnectionManager;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};
use support::Server;

const SIZE: u32 = 17;
const MAX_IDLE: Duration = Duration::from_secs(2);
const MAX_LIFETIME: Duration = Duration::from_secs(3);
/// Between two looks at the server.
const STEP: Duration = ms(5);
/// Between the starts of the scenarios, so that their bursts do not disturb each other.
const STAGGER: Duration = ms(200);
/// What a close may be late without being called late.
const EPSILON: f64 = 0.050;

/// When the load begins, counted from when the first pool was built; all are built by then.
const QUICK_START: Duration = ms(2_000);
/// The bursts' `max_idle` then ends just after r2d2's first tick, which comes 30 s after each pool was built.
const WORST_START: Duration = ms(28_900);
/// How long is watched from then on: psycopg needs 17 times `max_idle` and more, r2d2 31.6 s.
const WATCHED: Duration = Duration::from_secs(38);

#[derive(Clone, Copy, PartialEq)]
enum Scenario {
    Silence,
    Trickle,
    Steady,
}

impl Scenario {
    const ALL: [Scenario; 3] = [Scenario::Silence, Scenario::Trickle, Scenario::Steady];

    fn name(self) -> &'static str {
        match self {
            Scenario::Silence => "silence",
            Scenario::Trickle => "trickle",
            Scenario::Steady => "steady",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Scenario::Silence => "Silence: 17 connections used once, then nothing (max_idle 2 s)",
            Scenario::Trickle => "Trickle: 17 connections used once, then one query per 100 ms (max_idle 2 s)",
            Scenario::Steady => "Steady: 4 threads, a query every 5 ms each (max_lifetime 3 s)",
        }
    }

    /// What is set; everything else is each pool's default.
    fn limits(self) -> (Option<Duration>, Option<Duration>) {
        match self {
            Scenario::Silence | Scenario::Trickle => (Some(MAX_IDLE), None),
            Scenario::Steady => (None, Some(MAX_LIFETIME)),
        }
    }

    /// After the start of the whole.
    fn delay(self) -> Duration {
        STAGGER * self as u32
    }

    /// How many connections the load needs once the burst is over, give or take.
    fn needed(self) -> usize {
        match self {
            Scenario::Silence => 0,
            Scenario::Trickle => 1,
            Scenario::Steady => 4,
        }
    }
}

/// The pools, by what the server calls them.
const MILLPOND: &str = "millpond";
const R2D2: &str = "r2d2";
/// r2d2 with the floor it has by default: all of them.
const R2D2_DEFAULT: &str = "r2d2-default";
const PSYCOPG: &str = "psycopg";

fn described(pool: &str) -> &'static str {
    match pool {
        MILLPOND => "millpond",
        R2D2 => "r2d2, min_idle 0",
        R2D2_DEFAULT => "r2d2, default floor (17)",
        _ => "psycopg_pool",
    }
}

fn main() {
    if !common::is_bench() {
        return;
    }
    let server = Server::with(&[("max_connections", "400")]);
    let python = python();
    let built = Instant::now();
    let start = built + if is_quick() { QUICK_START } else { WORST_START };
    let end = start + WATCHED;
    let stop = Arc::new(AtomicBool::new(false));

    let (mut players, mut snakes, mut millponds) = (Vec::new(), Vec::new(), Vec::new());
    for scenario in Scenario::ALL {
        let start = start + scenario.delay();
        let config = |pool: &str| server.config(&format!("{}-{pool}", scenario.name()));
        let (idle, life) = scenario.limits();

        // No jitter, which would end lives earlier than promised and hide a delay.
        let builder = PostgresManager::new(config(MILLPOND), NoTls).builder().max_size(SIZE).lifetime_jitter(0.0);
        let builder = if idle.is_some() { builder.max_idle(idle) } else { builder };
        let builder = if life.is_some() { builder.max_lifetime(life) } else { builder };
        let pool = builder.open().expect("a pool");
        millponds.push((scenario, pool.clone()));
        players.push(play(scenario, pool, |connection| query(connection), start, &stop));

        for (pool, floor) in [(R2D2, Some(0)), (R2D2_DEFAULT, None)] {
            let builder = r2d2::Pool::builder().max_size(SIZE).min_idle(floor);
            let builder = if idle.is_some() { builder.idle_timeout(idle) } else { builder };
            let builder = if life.is_some() { builder.max_lifetime(life) } else { builder };
            let manager = PostgresConnectionManager::new(config(pool), NoTls);
            players.push(play(scenario, builder.build(manager).expect("a pool"), query, start, &stop));
        }
        if let Some(python) = &python {
            let conninfo = server.conninfo(&format!("{}-{PSYCOPG}", scenario.name()));
            snakes.push(Snake::start(python, &conninfo, scenario));
        }
    }
    println!("watching for {} s", (end - Instant::now()).as_secs());
    let seen = thread::scope(|s| {
        s.spawn(|| {
            for (scenario, snake) in Scenario::ALL.into_iter().zip(&mut snakes) {
                thread::sleep((start + scenario.delay()).saturating_duration_since(Instant::now()));
                snake.go();
            }
        });
        watch(&server, built, end)
    });
    stop.store(true, Ordering::Relaxed);
    drop(snakes);
    let own = millponds.iter().map(|(scenario, pool)| {
        let late = pool.stats().max_lateness.as_secs_f64();
        format!("{} {}", scenario.name(), short(late))
    });
    let own = own.collect::<Vec<_>>().join(", ");
    drop(millponds);
    for player in players {
        player.join().expect("a player");
    }
    report(&seen, &own, (start - built).as_secs_f64(), python.is_some());
}

// -------------------------------------------------------------------------------------------------- the load

fn query(client: &mut Client) {
    client.simple_query("SELECT 1").expect("an answer");
}

/// Plays a scenario on a pool, from `start` until told to stop.
fn play<S: Store + 'static>(
    scenario: Scenario,
    pool: S,
    query: fn(&mut S::Conn),
    start: Instant,
    stop: &Arc<AtomicBool>,
) -> thread::JoinHandle<()> {
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        thread::sleep(start.saturating_duration_since(Instant::now()));
        let repeat = |pause: Duration| {
            while !stop.load(Ordering::Relaxed) {
                query(&mut pool.get(0));
                thread::sleep(pause);
            }
        };
        if scenario == Scenario::Steady {
            return thread::scope(|s| (0..4).for_each(|_| drop(s.spawn(|| repeat(ms(5))))));
        }
        let everybody = Barrier::new(SIZE as usize);
        let worker = || {
            let mut client = pool.get(0);
            query(&mut client);
            everybody.wait();
        };
        thread::scope(|s| (0..SIZE).for_each(|_| drop(s.spawn(worker))));
        if scenario == Scenario::Trickle {
            return repeat(ms(100));
        }
        while !stop.load(Ordering::Relaxed) {
            thread::sleep(ms(100));
        }
    })
}

/// A Python that has psycopg's pool.
fn python() -> Option<String> {
    let given = std::env::var("PYTHON").ok();
    given.into_iter().chain(["python3".to_owned()]).find(|python| {
        let asked = Command::new(python).args(["-c", "import psycopg_pool"]).stderr(Stdio::null()).status();
        asked.is_ok_and(|status| status.success())
    })
}

/// `eviction.py` on one scenario. Ends when dropped.
struct Snake {
    child: Child,
    /// Its closing would be the signal to end.
    input: ChildStdin,
}

impl Snake {
    /// Returns when its pool stands.
    fn start(python: &str, conninfo: &str, scenario: Scenario) -> Snake {
        let seconds = |d: Option<Duration>| d.map_or(0.0, |d| d.as_secs_f64()).to_string();
        let (idle, life) = scenario.limits();
        let mut child = Command::new(python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/eviction.py"))
            .args([conninfo, scenario.name(), &SIZE.to_string(), &seconds(idle), &seconds(life)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a Python that was there a moment ago");
        let input = child.stdin.take().expect("its input");
        let output = child.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a word from Python");
        assert_eq!(line.trim(), "ready", "Python has failed");
        Snake { child, input }
    }

    fn go(&mut self) {
        writeln!(self.input, "go").expect("Python listens");
    }
}

impl Drop for Snake {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

// -------------------------------------------------------------------------------------------------- the server's view

/// One backend, in seconds since the watch began, by the server's clock.
#[derive(Clone, Debug)]
struct Life {
    born: f64,
    /// When its last query ended.
    used: f64,
    /// When it was first missing.
    gone: Option<f64>,
}

struct Seen {
    /// By application name, and then by pid.
    lives: BTreeMap<String, BTreeMap<i32, Life>>,
    /// By application name: how many there were from a time on.
    counts: BTreeMap<String, Vec<(f64, f64)>>,
    /// The longest between two looks: what a figure may be too high by.
    coarsest: f64,
    end: f64,
}

/// Looks at the server until `end`. Time 0 is `built`.
fn watch(server: &Server, built: Instant, end: Instant) -> Seen {
    let mut client = server.connect();
    let looks = client
        .prepare(
            "SELECT application_name, pid, extract(epoch FROM clock_timestamp())::float8, \
                    extract(epoch FROM backend_start)::float8, \
                    extract(epoch FROM coalesce(state_change, backend_start))::float8 \
             FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name LIKE '%-%'",
        )
        .expect("a look at the server");
    let clock = "SELECT extract(epoch FROM clock_timestamp())::float8";
    let now: f64 = client.query_one(clock, &[]).expect("the server's clock").get(0);
    let origin = now - built.elapsed().as_secs_f64();

    let mut seen = Seen { lives: BTreeMap::new(), counts: BTreeMap::new(), coarsest: 0.0, end: 0.0 };
    let mut last = now - origin;
    while Instant::now() < end {
        let rows = client.query(&looks, &[]).expect("a look at the server");
        // A look at an empty server still has a time.
        let now: f64 = match rows.first() {
            Some(row) => row.get::<_, f64>(2) - origin,
            None => built.elapsed().as_secs_f64(),
        };
        seen.coarsest = seen.coarsest.max(now - last);
        last = now;
        seen.end = now;
        let mut present: BTreeMap<&str, Vec<i32>> = BTreeMap::new();
        for row in &rows {
            let (app, pid): (&str, i32) = (row.get(0), row.get(1));
            let (born, used) = (row.get::<_, f64>(3) - origin, row.get::<_, f64>(4) - origin);
            present.entry(app).or_default().push(pid);
            let life = Life { born, used, gone: None };
            seen.lives.entry(app.to_owned()).or_default().insert(pid, life);
        }
        for (app, lives) in &mut seen.lives {
            let here = present.get(app.as_str()).map_or(&[][..], |pids| pids);
            for (_, life) in lives.iter_mut().filter(|(pid, life)| life.gone.is_none() && !here.contains(pid)) {
                life.gone = Some(now);
            }
            let counts = seen.counts.entry(app.clone()).or_default();
            if counts.last().is_none_or(|&(_, n)| n != here.len() as f64) {
                counts.push((now, here.len() as f64));
            }
        }
        thread::sleep(STEP);
    }
    seen
}

// -------------------------------------------------------------------------------------------------- the report

fn report(seen: &Seen, own: &str, start: f64, psycopg: bool) {
    let mut part = Part::new("eviction", "How late promises are kept");
    part.say(&format!(
        "As the server sees it, looked at every {} ms (the longest gap was {}). The load begins {start:.1} s after the pools \
         were built{}. Lateness counts from the moment at which a connection had been unused for `max_idle`, or was as \
         old as `max_lifetime`; `>` means that it was still there at the end. \"Down to need\" is when no more connections \
         than the load needs were left for good, counted from the moment at which the burst was `max_idle` ago.\n",
        STEP.as_millis(),
        short(seen.coarsest),
        if is_quick() { "" } else { ", which is the worst moment for r2d2's tick" },
    ));
    let mut worst: BTreeMap<&str, (f64, bool)> = BTreeMap::new();
    let pools = [MILLPOND, R2D2, R2D2_DEFAULT, PSYCOPG];
    let pools = &pools[..if psycopg { 4 } else { 3 }];
    for scenario in Scenario::ALL {
        let (mut rows, mut lines) = (Vec::new(), Vec::new());
        for pool in pools {
            let app = format!("{}-{pool}", scenario.name());
            let (Some(lives), Some(counts)) = (seen.lives.get(&app), seen.counts.get(&app)) else {
                println!("the server never saw {app}");
                continue;
            };
            let lateness = lateness(scenario, pool, lives, seen.end);
            let entry = worst.entry(described(pool)).or_insert((f64::NEG_INFINITY, false));
            let (mut late, mut sum, mut open) = (f64::NEG_INFINITY, 0.0, false);
            for &(by, still) in &lateness {
                sum += by;
                if by > late {
                    (late, open) = (by, still);
                }
            }
            if late > entry.0 {
                *entry = (late, open);
            }
            let mean = if lateness.is_empty() { f64::NAN } else { sum / lateness.len() as f64 };
            let oldest = lives.values().map(|l| l.used - l.born).fold(0.0, f64::max);
            rows.push(vec![
                described(pool).to_owned(),
                lateness.len().to_string(),
                sign(open) + &short(mean),
                sign(open) + &short(late),
                match scenario {
                    Scenario::Steady => format!("{oldest:.2} s"),
                    _ => down_to_need(scenario, counts, start + scenario.delay().as_secs_f64(), seen.end),
                },
                lives.len().to_string(),
                format!("{}", counts.last().map_or(0.0, |c| c.1)),
            ]);
            let mut line = counts.clone();
            line.push((seen.end, line.last().map_or(0.0, |c| c.1)));
            lines.push((described(pool).to_owned(), line));
        }
        part.say(&format!("### {}\n", scenario.title()));
        let fifth = if scenario == Scenario::Steady { "oldest in use" } else { "down to need" };
        part.table(&["", "due", "late, mean", "late, worst", fifth, "opened", "left at the end"], &rows);
        let most = lines.iter().flat_map(|(_, l)| l).map(|p| p.1).fold(1.0, f64::max);
        let whole = |v: &f64| format!("{v}");
        let x = Axis { name: "seconds since the pools were built", range: 0.0..seen.end, show: whole };
        let y = Axis { name: "connections", range: 0.0..most * 1.05, show: whole };
        part.plot(scenario.name(), scenario.title(), &plot::lines(scenario.title(), x, y, &lines, true));
    }
    part.say("### Worst of the three\n");
    let verdict = |pool: &str, late: f64| match (pool, late <= EPSILON) {
        (MILLPOND, true) => "ok",
        (MILLPOND, false) => "MISSED",
        _ => "",
    };
    let rows: Vec<Vec<String>> = worst
        .iter()
        .map(|(pool, &(late, open))| vec![pool.to_string(), sign(open) + &short(late), verdict(pool, late).into()])
        .collect();
    part.table(&["", "late, worst", "at most 50 ms"], &rows);
    part.say(&format!("Millpond's own account, up to the moment at which it ordered a close: {own}.\n"));
    part.finish();
}

fn sign(open: bool) -> String {
    if open { "> ".into() } else { String::new() }
}

/// By how much each connection that was due was closed late, and whether it still is.
fn lateness(scenario: Scenario, pool: &str, lives: &BTreeMap<i32, Life>, end: f64) -> Vec<(f64, bool)> {
    let due = |life: &Life| match scenario {
        Scenario::Steady => life.born + MAX_LIFETIME.as_secs_f64(),
        _ => life.used + MAX_IDLE.as_secs_f64(),
    };
    let mut late: Vec<(f64, bool)> = Vec::new();
    let mut left = Vec::new();
    for life in lives.values() {
        match life.gone {
            // Closed before it was due, for another reason: nothing was promised.
            Some(gone) if gone < due(life) => {}
            Some(gone) => late.push((gone - due(life), false)),
            None if due(life) < end => left.push((end - due(life), true)),
            None => {}
        }
    }
    // A floor may stay, however long unused; those of it that the pool exchanged were counted above.
    let floor = if pool == R2D2_DEFAULT && scenario != Scenario::Steady { SIZE as usize } else { 0 };
    left.sort_by(|a, b| b.0.total_cmp(&a.0));
    late.extend(left.into_iter().skip(floor));
    late
}

/// When there were no more than the load needs, for good, after the burst should have been forgotten.
fn down_to_need(scenario: Scenario, counts: &[(f64, f64)], start: f64, end: f64) -> String {
    let needed = scenario.needed() as f64;
    // The burst's end is when the most were there; it takes far less than the sampling says.
    let promised = start + MAX_IDLE.as_secs_f64();
    match counts.iter().rposition(|&(_, n)| n > needed) {
        None => "-".into(),
        Some(last) => match counts.get(last + 1) {
            Some(&(at, _)) => format!("{:+.2} s", at - promised),
            None => format!("> {:.2} s", end - promised),
        },
    }
}
