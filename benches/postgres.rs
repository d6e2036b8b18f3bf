//! A prepared `SELECT 1` through each pool: `cargo bench --bench postgres`.
//!
//! Beside a client per thread, which is what there would be without a pool; with 16 threads that is 16 connections where
//! the pools have 4. Times are per query, all threads together. The server is private and on this machine, so it takes
//! its share of the processors.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::sessions::{self, SELECT_ONE};
use common::{Load, ms};
use criterion::{Criterion, SamplingMode};
use support::Server;

fn main() {
    if !common::is_bench() {
        return;
    }
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(ms(200))
        .measurement_time(ms(800))
        .configure_from_args();
    let server = Server::start();
    let unix = server.unix_conninfo("bench").parse().expect("an address");
    for (network, config) in [("tcp", server.config("bench")), ("unix", unix)] {
        for threads in [1, 4, 16] {
            let load = Load { threads, hold: SELECT_ONE };
            let mut group = criterion.benchmark_group(format!("SELECT 1, {network}, {threads} threads on 4"));
            group.sampling_mode(SamplingMode::Flat);
            let subjects = [
                sessions::bare(&config, threads),
                sessions::millpond(&config, 4, true),
                sessions::millpond(&config, 4, false),
                sessions::r2d2(&config, 4, true),
                sessions::r2d2(&config, 4, false),
            ];
            for subject in &subjects {
                group.bench_function(subject.name(), |b| b.iter_custom(|n| load.time(&**subject, n)));
            }
        }
    }
    criterion.final_summary();
}
