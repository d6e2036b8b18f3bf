//! Many lives of a pool, each from a seed. See the README of this package.

#[path = "../simulator/mod.rs"]
mod simulator;

use simulator::plan::Plan;
use simulator::{Sum, report, run};
use std::env;
use std::time::{Duration, Instant};

fn number<T: std::str::FromStr>(name: &str) -> Option<T> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is '{text}', and must be a number")))
}

/// Each thread of the test harness simulates for so long.
fn seconds() -> Duration {
    Duration::from_secs(number("MILLPOND_SIMULATION_SECONDS").unwrap_or(30))
}

#[test]
fn lives() {
    let first: u64 = number("MILLPOND_SIMULATION_SEED").unwrap_or(1);
    let until = Instant::now() + seconds();
    let mut sum = Sum::default();
    for seed in first.. {
        let plan = Plan::draw(seed);
        let account = run(&plan, false);
        if let Some(broken) = &account.broken {
            panic!("{}", report(&plan, broken));
        }
        sum.add(&account);
        if Instant::now() > until {
            break;
        }
    }
    println!("{sum}");
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
