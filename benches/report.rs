//! One page of what the benches found: `cargo bench --bench report [-- all | names of benches] [--quick]
//! [--to=docs/evidence]`.
//!
//! The page is `target/report/README.md`, with its plots beside it. The benches named are run first, one after the other
//! (`all` takes minutes, and the page says how many); of the others the last results are taken, with the date of each.
//!
//! Where `PYTHON` (or `python3`) has `psycopg_pool`, that takes part in `eviction`. A page made again differs from the
//! last in its figures only, and in the parts that were run.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::report::{Agenda, Part, command, folder, utc};
use common::{is_bench, short};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

/// In the order of the page.
const BENCHES: [&str; 8] = ["track", "eviction", "waits", "curve", "checkout", "postgres", "statements", "rest"];

fn main() {
    if !is_bench() {
        return;
    }
    let begun = Instant::now();
    let named = |word: &str| std::env::args().skip(1).any(|a| a == word);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    for bench in BENCHES.into_iter().filter(|bench| named("all") || named(bench)) {
        run(bench);
    }
    collect("checkout", "A checkout");
    let page = page(&load, begun.elapsed());
    let path = folder().join("README.md");
    fs::write(&path, page).expect("the page");
    println!("\nwritten: {}", path.display());
    if let Some(to) = std::env::args().find_map(|a| a.strip_prefix("--to=").map(PathBuf::from)) {
        copy(&to);
    }
}

fn run(bench: &'static str) {
    println!("\n== {bench}");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["bench", "--bench", bench]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if common::is_quick() {
        command.args(["--", "--quick"]);
    }
    let status = command.status().expect("cargo");
    assert!(status.success(), "{bench} has failed");
}

/// Makes a part of what criterion has remembered of a bench, in the order of its agenda.
fn collect(bench: &'static str, title: &str) {
    let Some((command, groups)) = Agenda::read(bench) else { return };
    let root = folder().parent().expect("the target folder").join("criterion");
    let found: BTreeMap<(String, String), ([f64; 3], SystemTime)> =
        estimates(&root).into_iter().map(|(group, name, figures, when)| ((group, name), (figures, when))).collect();
    let look = |group: &str, name: &str| found.get(&(group.to_owned(), name.to_owned()));
    let times = groups.iter().flat_map(|(group, names)| names.iter().filter_map(|name| look(group, name)));
    let times: Vec<SystemTime> = times.map(|(_, when)| *when).collect();
    let (Some(first), Some(last)) = (times.iter().min(), times.iter().max()) else { return };
    let mut part = Part::new(bench, title);
    part.made(format!("{command}, {} to {}", utc(*first), utc(*last)));
    part.say("Per get and return, all threads together, as criterion finds it: the median and its 95 % interval.\n");
    for (group, names) in groups {
        // Whom the others are compared with.
        let (one, against) = match names.iter().find(|name| ["r2d2 untested", "off"].contains(&name.as_str())) {
            Some(name) if name == "off" => (look(&group, name), "to off"),
            Some(name) => (look(&group, name), "to r2d2"),
            None => (None, ""),
        };
        let row = |name: &String| match look(&group, name) {
            None => [name, "-", "-", "-"].map(str::to_owned).into(),
            Some(([median, from, to], _)) => {
                let ratio = one.map_or("-".into(), |(one, _)| format!("{:.2}", median / one[0]));
                let interval = format!("{:>7} - {:>7}", short(*from), short(*to));
                vec![name.clone(), short(*median), interval, ratio]
            }
        };
        part.say(&format!("### {group}\n"));
        part.table(&["", "median", "interval", against], &names.iter().map(row).collect::<Vec<_>>());
    }
    part.finish();
}

/// Group, name, seconds (the median, and the ends of its interval) and when, of everything criterion has measured.
fn estimates(folder: &Path) -> Vec<(String, String, [f64; 3], SystemTime)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.file_name().is_some_and(|name| name == "new") {
            let read = |file: &str| fs::read_to_string(path.join(file)).ok();
            let found = (|| {
                let (what, numbers) = (read("benchmark.json")?, read("estimates.json")?);
                let median = &numbers[numbers.find("\"median\":")?..];
                let ns = |key| Some(after(median, key)?.parse::<f64>().ok()? / 1e9);
                let figures = [ns("point_estimate")?, ns("lower_bound")?, ns("upper_bound")?];
                let when = path.join("estimates.json").metadata().and_then(|m| m.modified()).ok()?;
                Some((after(&what, "group_id")?, after(&what, "function_id")?, figures, when))
            })();
            all.extend(found);
        } else if path.is_dir() {
            all.extend(estimates(&path));
        }
    }
    all
}

/// The value of the first `key` in a text of JSON whose strings have no quotes in them.
fn after(json: &str, key: &str) -> Option<String> {
    let rest = json.split_once(&format!("\"{key}\":"))?.1;
    let value = match rest.strip_prefix('"') {
        Some(text) => text.split('"').next(),
        None => rest.split([',', '}']).next(),
    };
    value.map(str::to_owned)
}

// -------------------------------------------------------------------------------------------------- the page

fn page(load: &str, took: Duration) -> String {
    let mut page = String::from("# Millpond beside its peers: what was measured\n\n");
    let output = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|text| !text.is_empty())
    };
    let mut fact = |name: &str, text: Option<String>| {
        let _ = writeln!(page, "* {name}: {}", text.unwrap_or_else(|| "unknown".into()));
    };
    fact("Date", Some(utc(SystemTime::now())));
    fact("Command", Some(format!("{}, {} s", command("report"), took.as_secs())));
    fact("Machine", machine());
    fact(
        "Load before the run (1, 5, 15 minutes)",
        load.split(' ').take(3).map(str::to_owned).reduce(|a, b| a + ", " + &b),
    );
    let revision = output("git", &["describe", "--always", "--dirty"]).map_or(String::new(), |r| format!(", {r}"));
    fact("Revision", Some(format!("millpond {}{revision}", env!("CARGO_PKG_VERSION"))));
    fact("Compiler", output("rustc", &["-V"]));
    let postgres = support::programs::find().join("postgres");
    fact("Server", output(&postgres.to_string_lossy(), &["--version"]));
    fact("Peers", peers());
    page += "\nThe whole page is made again by `cargo bench --bench report -- all`, and copied with its plots to a \
             folder by `--to=FOLDER`. Each part says by which command it was made, and when. Only figures of one run compare.\n\n";
    for bench in BENCHES {
        let path = folder().join(format!("{bench}.part.md"));
        match fs::read_to_string(&path) {
            Ok(part) => page += &format!("{part}\n"),
            Err(_) => {
                let _ = writeln!(page, "## {bench}\n\nNot run.\n");
            }
        }
    }
    page
}

fn machine() -> Option<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo").ok()?;
    // Not everywhere: ARM's have no name there.
    let model = cpus.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ").map(|x| x.1));
    let model = model.unwrap_or(std::env::consts::ARCH);
    let cores = std::thread::available_parallelism().ok()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let virtual_ = if cpus.contains("hypervisor") { ", virtual" } else { "" };
    Some(format!("{model}{virtual_}, {cores} cores, Linux {}", kernel.trim()))
}

/// Whom it is compared with, in the versions of the lock file.
fn peers() -> Option<String> {
    let lock = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).ok()?;
    let version = |name: &str| {
        let rest = lock.split_once(&format!("name = \"{name}\"\nversion = \""))?.1;
        Some(format!("{name} {}", rest.split('"').next()?))
    };
    let pools = ["r2d2", "scheduled-thread-pool", "r2d2_postgres", "bb8", "deadpool"];
    let below = ["postgres", "tokio-postgres", "tokio", "parking_lot", "criterion"];
    let mut all: Vec<String> = pools.into_iter().chain(below).filter_map(version).collect();
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let ask = "import psycopg, psycopg_pool, sys; \
               print('psycopg', psycopg.__version__ + ', psycopg_pool', psycopg_pool.__version__ + ', Python', sys.version.split()[0])";
    if let Ok(output) = Command::new(python).args(["-c", ask]).output() {
        all.extend(Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|s| !s.is_empty()));
    }
    Some(all.join(", "))
}

/// Copies the page and its plots, and nothing else.
fn copy(to: &Path) {
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join(to);
    fs::create_dir_all(&to).expect("the folder to copy to");
    for entry in fs::read_dir(folder()).expect("the report").flatten() {
        let name = entry.file_name();
        if name == "README.md" || Path::new(&name).extension().is_some_and(|e| e == "svg") {
            fs::copy(entry.path(), to.join(&name)).expect("a copy");
        }
    }
    println!("copied to: {}", to.display());
}
