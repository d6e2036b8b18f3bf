//! What the users of a pool see of a fault, beside its peers: `cargo bench --bench faults [-- ROWS] [--all] [--errors]
//! [--markdown]`.
//!
//! Eight users share a pool of four connections: each checks one out, asks one question, returns it, pauses, and so on.
//! Then something breaks and, as a rule, is mended. In each row every pool has a server of its own (and a proxy, or a
//! PgBouncer), and all of them meet the fault at the same time. ROWS are parts of names; `--all` adds the rows that take
//! more than a minute; `--errors` prints what the users were told, and when; `--markdown` writes `docs/faults-peers.md`.
//!
//! Each pool is as it comes, but for its size and how long a checkout may wait. No limit for connects, queries or
//! keepalives is set in any connection string.
//!
//! Where Python is found, psycopg's pool takes part. If it lacks `psycopg_pool` (`PYTHON` may name one that has it), that
//! is installed in a folder below `target`.

mod common;
#[path = "faults/pools.rs"]
mod pools;
#[path = "faults/rows.rs"]
mod rows;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "faults/users.rs"]
mod users;
#[path = "faults/world.rs"]
mod world;

use common::report::{Part, command, utc};
use common::{is_bench, is_picked, ms, short};
use pools::{Python, Rival};
use rows::{ROWS, Row};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use std::{env, fs};
use support::{Server, wait_until, within};
use users::{Call, Habit, Notes, Party, Stage};
use world::World;

const USERS: usize = 8;
const SIZE: u32 = 4;
/// How long a checkout may wait.
const TIMEOUT: Duration = Duration::from_secs(5);
/// From the first calls to the fault.
const BEFORE: Duration = Duration::from_secs(1);
/// A call that took longer was disturbed, even if it succeeded.
const SLOW: Duration = Duration::from_secs(1);
/// Undisturbed for so long, a pool has recovered, and is watched no further.
const STEADY: Duration = Duration::from_secs(3);
/// From the close to the count of what is left.
const CLOSED: Duration = Duration::from_secs(2);
/// Far longer than a server takes for anything.
const PATIENCE: Duration = Duration::from_secs(30);

// -------------------------------------------------------------------------------------------------- a row

/// What came of one pool in one row.
struct Outcome {
    notes: Notes,
    struck: Instant,
    healed: Option<Instant>,
    /// When the users were watched no longer.
    ended: Instant,
    logins: (usize, usize),
    left: Option<usize>,
    /// For the next row.
    server: Option<Arc<Server>>,
}

/// One pool in one row, ready to go.
struct Lane {
    world: World,
    party: Box<dyn Party>,
}

impl Lane {
    fn new(row: &Row, rival: Rival, python: Option<&Python>, server: Option<Arc<Server>>) -> Lane {
        let world = World::new(row, server);
        let habit = Habit {
            users: USERS,
            size: SIZE,
            timeout: TIMEOUT,
            pause: row.crowd.pause(),
            stagger: row.crowd.stagger(USERS),
            query: row.query,
        };
        let party = rival.start(&world.conninfo(), &habit, python);
        Lane { world, party }
    }

    fn run(self, row: &Row) -> Outcome {
        let Lane { world, mut party } = self;
        party.go();
        thread::sleep(BEFORE);
        let logins = world.logins();
        let struck = Instant::now();
        (row.strike)(&world);
        thread::sleep((struck + row.lasts).saturating_duration_since(Instant::now()));
        let healed = row.heal.map(|heal| {
            heal(&world);
            Instant::now()
        });
        if let Some(healed) = healed {
            let _ = wait_until(healed + row.watch, || {
                // Looking at all notes costs something.
                thread::sleep(ms(200));
                healed.elapsed() > STEADY + row.crowd.pause() && is_steady(&party.notes(), row.crowd.pause())
            });
        }
        let notes = party.notes();
        let ended = Instant::now();
        party.stop();
        // Who is in a call gets a moment to leave it.
        let _ = wait_until(within(SLOW), || party.notes().under_way.iter().all(Option::is_none));
        let closed = Instant::now();
        party.close();
        thread::sleep((closed + CLOSED).saturating_duration_since(Instant::now()));
        let left = world.left();
        let after = world.logins();
        let server = world.retire(row);
        party.end();
        Outcome { notes, struck, healed, ended, logins: (after.0 - logins.0, after.1 - logins.1), left, server }
    }
}

/// Whether every user was served lately and none was disturbed.
fn is_steady(notes: &Notes, pause: Duration) -> bool {
    let now = Instant::now();
    let recent: Vec<_> = notes.calls.iter().rev().take_while(|call| now - call.ended < STEADY + pause).collect();
    let is_served = |user| recent.iter().any(|call| call.user == user);
    let hangs = notes.under_way.iter().flatten().any(|&begun| now - begun > SLOW);
    !hangs && (0..USERS).all(is_served) && !recent.iter().any(|call| disturbed(call))
}

fn disturbed(call: &Call) -> bool {
    call.failure.is_some() || call.ended - call.begun > SLOW
}

impl Outcome {
    /// For how long each user has been in a call that has not ended.
    fn under_way(&self) -> impl Iterator<Item = Duration> {
        self.notes.under_way.iter().flatten().map(|&begun| self.ended - begun)
    }

    /// How many users are in a call that is beyond the limit of a checkout, and that nothing ends.
    fn hanging(&self) -> usize {
        self.under_way().filter(|&time| time > TIMEOUT + SLOW).count()
    }

    fn failed(&self, stage: Stage) -> usize {
        self.notes.calls.iter().filter(|call| call.failure.as_ref().is_some_and(|f| f.stage == stage)).count()
    }

    fn errors(&self) -> usize {
        self.failed(Stage::Checkout) + self.failed(Stage::Query)
    }

    /// The longest that a user was in a call, from the fault on.
    fn longest(&self) -> String {
        let ended = self.notes.calls.iter().filter(|call| call.ended >= self.struck);
        let ended = ended.map(|call| call.ended - call.begun).max().unwrap_or_default();
        let open = self.under_way().max().unwrap_or_default();
        if open > ended { format!("> {}", seconds(open)) } else { seconds(ended) }
    }

    /// From the heal to the end of the first call that went well.
    fn first(&self) -> String {
        let Some(healed) = self.healed else { return "-".into() };
        let well = self.notes.calls.iter().filter(|call| call.failure.is_none() && call.ended >= healed);
        let first = well.map(|call| call.ended - healed).min();
        first.map_or_else(|| format!("> {}", seconds(self.ended - healed)), seconds)
    }

    /// From the heal to the end of the last call that was disturbed.
    fn steady(&self) -> String {
        let Some(healed) = self.healed else { return "-".into() };
        if self.hanging() > 0 {
            return format!("{} hang", self.hanging());
        }
        // Whoever waits even now is disturbed even now.
        if self.under_way().any(|time| time > SLOW) {
            return format!("> {}", seconds(self.ended - healed));
        }
        let last = self.notes.calls.iter().filter(|call| disturbed(call)).map(|call| call.ended).max();
        let Some(last) = last.filter(|&last| last > healed) else { return "0 s".into() };
        let sign = if self.ended - last < STEADY { "> " } else { "" };
        format!("{sign}{}", seconds(last - healed))
    }

    fn logins(&self) -> String {
        match self.logins {
            (all, 0) => all.to_string(),
            (all, refused) => format!("{all} ({refused} refused)"),
        }
    }

    /// What the users were told, and in which calls: how often, and when they began and ended, from the fault on.
    fn texts(&self) -> Vec<String> {
        let mut texts: BTreeMap<String, Vec<&Call>> = BTreeMap::new();
        for call in &self.notes.calls {
            if let Some(failure) = &call.failure {
                let text: String = failure.text.lines().next().unwrap_or_default().chars().take(160).collect();
                texts.entry(format!("{:?}: {text}", failure.stage)).or_default().push(call);
            }
        }
        let since = |at: Instant| {
            let before = self.struck.saturating_duration_since(at).as_secs_f64();
            at.saturating_duration_since(self.struck).as_secs_f64() - before
        };
        let told = |(text, calls): (String, Vec<&Call>)| {
            let times =
                calls.iter().take(8).map(|call| format!("{:.3} to {:.3}", since(call.begun), since(call.ended)));
            format!("{} x {text} ({} s)", calls.len(), times.collect::<Vec<_>>().join(", "))
        };
        texts.into_iter().map(told).collect()
    }
}

fn seconds(d: Duration) -> String {
    if d < ms(1) { "0 s".into() } else { short(d.as_secs_f64()) }
}

/// Every pool in one row. `Err`: what could not be made. `servers`: of an earlier row, one for each pool.
fn run(
    row: &Row,
    rivals: &[Rival],
    python: Option<&Python>,
    servers: &mut [Option<Arc<Server>>],
) -> Result<Vec<Outcome>, String> {
    let text = |panic: Box<dyn std::any::Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "it panicked".into(), |text| text.to_string()),
    };
    // All are made before any is used, so that the making of one does not disturb what is measured on another.
    let lanes: Vec<_> = thread::scope(|scope| {
        let make = |(&rival, server): (&Rival, &mut Option<Arc<Server>>)| {
            let server = if row.is_plain() { server.take() } else { None };
            scope.spawn(move || catch_unwind(AssertUnwindSafe(|| Lane::new(row, rival, python, server))))
        };
        let making: Vec<_> = rivals.iter().zip(&mut *servers).map(make).collect();
        making.into_iter().map(|lane| lane.join().and_then(|lane| lane).map_err(text)).collect()
    });
    let lanes = lanes.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut outcomes: Vec<Outcome> = thread::scope(|scope| {
        let running: Vec<_> = lanes.into_iter().map(|lane| scope.spawn(move || lane.run(row))).collect();
        running.into_iter().map(|lane| lane.join().map_err(text)).collect::<Result<_, _>>()
    })?;
    for (server, outcome) in servers.iter_mut().zip(&mut outcomes) {
        *server = outcome.server.take().or(server.take());
    }
    Ok(outcomes)
}

// -------------------------------------------------------------------------------------------------- the table

fn main() {
    if !is_bench() {
        return;
    }
    let given = |word: &str| env::args().any(|a| a == word);
    let python = Python::find();
    let rivals: Vec<Rival> = match &python {
        Ok(_) => Rival::ALL.into(),
        Err(reason) => {
            println!("psycopg_pool is left out: {reason}");
            vec![Rival::Millpond, Rival::MillpondChecking, Rival::R2d2]
        }
    };
    let is_named = |row: &Row| env::args().any(|word| word == row.name);
    let picked = |row: &&Row| is_picked(row.name) && (!row.is_long || given("--all") || is_named(row));

    let mut part = Part::new("faults", "What users see of a fault, beside r2d2 and psycopg's pool");
    part.say(EXPLAINED);
    let head = head(python.as_ref().map(|python| python.versions.as_str()).map_err(String::as_str));
    println!("{head}");
    let begun = Instant::now();
    let mut servers: Vec<Option<Arc<Server>>> = rivals.iter().map(|_| None).collect();
    let mut overview: Vec<Vec<String>> = Vec::new();
    for row in ROWS.iter().filter(picked) {
        part.say(&format!("### {}\n\n{}.\n", row.name, capitalized(row.what)));
        let outcomes: Vec<_> = match run(row, &rivals, python.as_ref().ok(), &mut servers) {
            Ok(outcomes) => rivals.iter().zip(outcomes).collect(),
            Err(reason) => {
                part.say(&format!("SKIPPED, because it cannot be made here: {reason}\n"));
                let cells = rivals.iter().map(|_| "SKIPPED".to_owned());
                overview.push([row.name.to_owned()].into_iter().chain(cells).collect());
                continue;
            }
        };
        let line = |(rival, o): &(&Rival, Outcome)| {
            vec![
                rival.name().to_owned(),
                format!("{} of {}", o.errors(), o.notes.calls.len()),
                o.failed(Stage::Checkout).to_string(),
                o.failed(Stage::Query).to_string(),
                o.longest(),
                o.first(),
                o.steady(),
                o.logins(),
                o.left.map_or("-".into(), |left| left.to_string()),
            ]
        };
        let head = ["", "errors", "in get", "in query", "longest", "first", "steady", "logins", "left"];
        part.table(&head, &outcomes.iter().map(line).collect::<Vec<_>>());
        if given("--errors") {
            for (rival, outcome) in &outcomes {
                for text in outcome.texts() {
                    println!("    {}: {text}", rival.name());
                }
            }
        }
        let cell = |(_, o): &(&Rival, Outcome)| format!("{} / {} / {}", o.errors(), o.longest(), o.steady());
        overview.push([row.name.to_owned()].into_iter().chain(outcomes.iter().map(cell)).collect());
    }
    part.say("### All rows\n\nErrors / longest / steady.\n");
    let names: Vec<&str> = [""].into_iter().chain(rivals.iter().map(|rival| rival.name())).collect();
    part.table(&names, &overview);
    let head = format!("{head}* Took: {} s\n", begun.elapsed().as_secs());
    if given("--markdown") {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/faults-peers.md");
        fs::write(&path, part.page(&head)).expect("the page");
        println!("written: {}", path.display());
    }
    part.finish();
}

const EXPLAINED: &str = "\
Eight users share a pool of four connections. Each checks one out (and waits at most 5 s for it), asks one question, returns
it, and pauses for 20 ms, unless a row says otherwise. After a second something breaks. Each pool has a server of its own;
all meet the fault at the same time. Each is as it comes, but for its size and that limit. \"Always\" is Millpond with
`Validate::Always`, which r2d2 does by default; \"check\" is psycopg's pool with `check=ConnectionPool.check_connection`.
No limit for connects or queries, and no keepalive, is set in a connection string.

| column | what it says |
|---|---|
| errors | calls that failed, of all; then those that got no connection (in get), and those whose query failed |
| longest | the longest time that one call took, checkout and query together; `>`: it had not ended |
| first | from the heal to the end of the first call that went well |
| steady | from the heal to the end of the last call that failed or took more than a second; `>`: it had not recovered when the watch ended; \"hang\": so many users never came back |
| logins | attempts to log in, from the fault to 2 s after the close, as the server, the PgBouncer or the proxy counts them |
| left | connections that are left 2 s after the close, as the server or the PgBouncer sees it; behind a proxy, those that their client has not closed |

How to read it:

* A query that is under way when its connection dies fails in every pool. A pool that checks each connection before it is
  handed out has half of its round trips in checks, whose failure no user sees. Without that, one more query is lost for
  each dead connection that is handed out before the first error is known. Millpond by default checks after a second without
  use and once a sibling has died, r2d2 always, psycopg's pool never.
* Recovery depends on when the next attempt to connect falls. While users wait, Millpond pauses for at most 1 s between
  attempts, r2d2 for half of the limit of a checkout (here 2.5 s), psycopg's pool for 1, 2, 4, 8 s and so on.
* Millpond tells its users of a wrong password at once, and does not log in again for 5 s. Who comes again after 20 ms is
  told again, so its errors are many and short. The others let their users wait, and log in meanwhile.
";

/// By what, when and with whom it was made.
fn head(psycopg: Result<&str, &str>) -> String {
    let mut head = String::new();
    let output = |program: &Path, args: &[&str]| {
        let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
    };
    let mut fact = |name: &str, text: Option<String>| {
        let _ = writeln!(head, "* {name}: {}", text.unwrap_or_else(|| "unknown".into()));
    };
    fact("Date", Some(utc(SystemTime::now())));
    fact("Command", Some(command("faults")));
    let revision = output(Path::new("git"), &["describe", "--always", "--dirty"]);
    fact("Millpond", revision.map(|r| format!("{} at {r}", env!("CARGO_PKG_VERSION"))));
    let lock = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap_or_default();
    let version = |name: &str| {
        let rest = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?.1;
        Some(format!("{name} {}", rest.split('"').next()?))
    };
    let peers = ["r2d2", "r2d2_postgres", "postgres", "tokio-postgres"].into_iter().filter_map(version);
    fact("Peers", Some(peers.collect::<Vec<_>>().join(", ")));
    fact("psycopg", Some(psycopg.map_or_else(|reason| format!("left out: {reason}"), str::to_owned)));
    fact("Server", output(&support::programs::find().join("postgres"), &["--version"]));
    fact("PgBouncer", output(Path::new("/usr/sbin/pgbouncer"), &["--version"]));
    let load = fs::read_to_string("/proc/loadavg").ok();
    let load = load.map(|load| load.split(' ').take(3).collect::<Vec<_>>().join(", "));
    fact("Load before the run (1, 5, 15 minutes)", load);
    fact("Processors", thread::available_parallelism().ok().map(|n| n.to_string()));
    head
}

fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
