//! Many lives of a pool, each from a seed. See the README of this package.

#[path = "../simulator/mod.rs"]
mod simulator;

use simulator::plan::Plan;
use simulator::{Sum, report, run};
use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

fn number<T: FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is '{text}', and must be a number")))
}

/// How many lives there are, unless `MILLPOND_SIMULATION_LIVES` says another number; the first seed is 1, unless
/// `MILLPOND_SIMULATION_SEED` says another.
const LIVES: u64 = 5000;

#[test]
fn no_life_breaks_a_promise_and_together_they_reach_every_rare_branch() {
    let first = number("MILLPOND_SIMULATION_SEED").unwrap_or(1);
    let last = first + number("MILLPOND_SIMULATION_LIVES").unwrap_or(LIVES);
    let (next, failed, sum) = (AtomicU64::new(first), AtomicBool::new(false), Mutex::new(Sum::default()));
    let begun = Instant::now();
    let live = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last || failed.load(Ordering::Relaxed) {
                return;
            }
            let plan = Plan::draw(seed);
            let account = run(&plan, false);
            if let Some(broken) = &account.broken {
                failed.store(true, Ordering::Relaxed);
                // (Who tries many mutants wants no more than to know.)
                if env::var_os("MILLPOND_SIMULATION_BRIEF").is_some() {
                    panic!("seed {seed}: {broken}");
                }
                panic!("{}", report(&plan, broken));
            }
            sum.lock().unwrap().add(&account);
        }
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(live))));
    let sum = sum.into_inner().unwrap();
    let years_per_minute = sum.years() * 60.0 / begun.elapsed().as_secs_f64();
    println!("{sum}{years_per_minute:.1} pool-years per minute, on {threads} threads");
    // What the sources call rare has happened, or the lives are too tame.
    let reached: BTreeSet<&str> = sum.sometimes.keys().copied().collect();
    let missing: Vec<String> = rare().into_iter().filter(|what| !reached.contains(what.as_str())).collect();
    assert!(missing.is_empty() || last - first < LIVES, "never reached: {missing:#?}");
}

/// What the sources call rare: the texts of `sometimes!`.
fn rare() -> BTreeSet<String> {
    fn look(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                look(&entry, found);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&entry).unwrap();
                for (at, _) in text.match_indices("sometimes!(") {
                    let call = &text[at..at + text[at..].find(");").unwrap()];
                    found.extend(call.rsplit('"').nth(1).map(str::to_owned));
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    look(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../src")), &mut found);
    assert!(found.len() > 40, "{found:?}");
    found
}

#[test]
fn the_same_seed_lives_the_same_life() {
    for seed in 1..40 {
        let plan = Plan::draw(seed);
        let (one, other) = (run(&plan, false), run(&plan, false));
        assert_eq!((one.hash, one.choices, one.time), (other.hash, other.choices, other.time), "seed {seed}");
    }
}

/// One life again, as the report of a failure says.
#[test]
fn replay() {
    let Some(seed) = number("MILLPOND_SIMULATION_SEED") else { return };
    let mut plan = Plan::draw(seed);
    if let Ok(steps) = env::var("MILLPOND_SIMULATION_STEPS") {
        let numbers: Vec<usize> = steps.split(',').filter_map(|n| n.parse().ok()).collect();
        plan = plan.keep(&numbers);
    }
    let account = run(&plan, true);
    account.trace.iter().for_each(|line| println!("{line}"));
    assert!(account.broken.is_none(), "{}", account.broken.unwrap());
}
