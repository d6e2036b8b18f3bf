//! Simulates for as long as it is told, on as many threads as it is told, and tells of every life in which a promise was
//! broken: `cargo run --manifest-path tests/simulation/Cargo.toml --example hours -- 3600 2 1` (seconds, threads, first seed).

#[path = "../simulator/mod.rs"]
mod simulator;

use simulator::plan::Plan;
use simulator::{Sum, report, run};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a number"));
    let seconds = arguments.next().unwrap_or(60);
    let threads = arguments.next().unwrap_or(1);
    let next = AtomicU64::new(arguments.next().unwrap_or(1));
    let until = Instant::now() + Duration::from_secs(seconds);
    let (sum, failed) = (Mutex::new(Sum::default()), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while Instant::now() < until && failed.load(Ordering::Relaxed) < 20 {
                    let plan = Plan::draw(next.fetch_add(1, Ordering::Relaxed));
                    let account = run(&plan, false);
                    if let Some(broken) = &account.broken {
                        failed.fetch_add(1, Ordering::Relaxed);
                        println!("{}", report(&plan, broken));
                    }
                    sum.lock().expect("no panic").add(&account);
                }
            });
        }
    });
    println!("commit {}, {seconds} s on {threads} threads, up to seed {}", simulator::commit(), next.into_inner() - 1);
    println!("{}{} lives broke a promise", sum.into_inner().expect("no panic"), failed.into_inner());
}
