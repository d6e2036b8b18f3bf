//! What a scrape costs, and that a checkout does not pay for it: `cargo bench --all-features --bench scrape [-- --quick]`.
//!
//! The first rows are ratios within this run, of one pool to itself: rounds of a second take turns, and in one of three there is a
//! scrape. (Two pools differ by some percent, by where they lie in memory.) "Same" compares the rounds without: while it is off by
//! some percent, the row below it says nothing about less. The last rows time a scrape itself, on the thread that makes it.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::peers::{self, Nils};
use common::{Load, Outcome, Usage, is_quick, median, named, short};
use metrics_exporter_prometheus::PrometheusBuilder;
use millpond::Pool;
use millpond::metrics::{BUCKETS, Pools};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

/// A scrape a second.
const SECOND: Duration = Duration::from_secs(1);
const CONNECTIONS: u32 = 4;

fn main() {
    if !common::is_bench() {
        return;
    }
    let rounds = if is_quick() { 5 } else { 31 };
    for threads in [1, 2] {
        checkouts(threads, rounds);
    }
    scrapes();
}

fn pool() -> Pool<Nils> {
    peers::millpond_pool(CONNECTIONS, |builder| builder)
}

/// A page for Prometheus.
fn scrape(registry: &Registry) -> usize {
    let mut page = String::new();
    encode(&mut page, registry).expect("a string takes everything");
    black_box(page).len()
}

fn checkouts(threads: usize, rounds: usize) {
    let pool = pool();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Pools::of(&pool)));
    let subject = named("scraped", pool);
    subject.fill(CONNECTIONS as usize);
    let load = Load { threads, usage: Usage::Nothing };
    let mut costs: [Vec<f64>; 3] = Default::default();
    for round in 0..rounds {
        let mut order = [0, 1, 2];
        order.rotate_left(round % 3);
        for i in order {
            let outcome = thread::scope(|scope| {
                if i == 0 {
                    scope.spawn(|| {
                        thread::sleep(SECOND / 2);
                        scrape(&registry)
                    });
                }
                load.run(&*subject, SECOND, false)
            });
            costs[i].push(Outcome::cost(&outcome));
        }
    }
    let row = |name: &str, i: usize| {
        let ratios: Vec<_> = costs[i].iter().zip(&costs[1]).map(|(a, b)| a / b).collect();
        let (least, most) = ratios.iter().fold((f64::MAX, 0f64), |(l, m), &r| (l.min(r), m.max(r)));
        let cost = short(median(costs[i].iter().copied()));
        println!("{name:30} {:.3} [{least:.2} {most:.2}]  {cost} a checkout", median(ratios));
    };
    row(&format!("{threads} thread(s), same"), 2);
    row(&format!("{threads} thread(s), a scrape a second"), 0);
}

fn scrapes() {
    let pool = pool();
    let pools = Pools::of(&pool);
    let mut registry = Registry::default();
    registry.register_collector(Box::new(pools.clone()));
    let time = |what: &mut dyn FnMut()| {
        let begun = Instant::now();
        what();
        begun.elapsed().as_secs_f64()
    };
    let collected = median((0..301).map(|_| time(&mut || _ = scrape(&registry))));
    println!("a scrape of one pool, by the collector: {}, {} bytes", short(collected), scrape(&registry));

    let builder = PrometheusBuilder::new().with_recommended_naming(true).set_buckets(&BUCKETS).expect("bounds");
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    for checkouts in [0, 1_000, 10_000, 100_000, 1_000_000] {
        let (mut reports, mut pages) = (Vec::new(), Vec::new());
        for _ in 0..if checkouts > 10_000 { 5 } else { 51 } {
            (0..checkouts).for_each(|_| drop(black_box(pool.get().expect("a connection"))));
            reports.push(time(&mut || metrics::with_local_recorder(&recorder, || pools.report())));
            pages.push(time(&mut || drop(black_box(handle.render()))));
        }
        let [report, page] = [reports, pages].map(|times| short(median(times)));
        println!("... by the facade, after {checkouts} checkouts: {report} to report, {page} to render");
    }
}
