//! A prepared `SELECT 1` through each pool: `cargo bench --bench postgres`.
//!
//! Beside a client per thread, which is what there would be without a pool; with 16 threads that is 16 connections where
//! the pools have 4. Times are per query, all threads together. The server is private and on this machine, so it takes
//! its share of the processors. Who keeps the statement, and why bb8 and deadpool are missing, says `common/sessions.rs`.
//!
//! A unix socket cannot be observed: there Millpond asks each connection that comes back whether it is in a transaction.
//! That is one round trip more, unless it is told not to ("no reset").

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::report::Agenda;
use common::{Hold, Load, ms, sessions};
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
    let mut agenda = Agenda::default();
    let server = Server::start();
    let unix = server.unix_conninfo("bench").parse().expect("an address");
    for (network, config) in [("TCP", server.config("bench")), ("unix socket", unix)] {
        for threads in [1, 4, 16] {
            let load = Load { threads, hold: Hold::Use };
            let title = format!("SELECT 1, {network}, {threads} threads on 4");
            let mut group = criterion.benchmark_group(&title);
            group.sampling_mode(SamplingMode::Flat);
            let mut subjects = vec![sessions::bare(&config, threads)];
            subjects.extend(sessions::millponds(&config, 4, network == "TCP"));
            subjects.extend([true, false].map(|test| sessions::stock(&config, 4, test)));
            subjects.extend([true, false].map(|test| sessions::r2d2(&config, 4, test)));
            for subject in &subjects {
                agenda.add(&title, subject.name());
                group.bench_function(subject.name(), |b| b.iter_custom(|n| load.time(&**subject, n)));
            }
        }
    }
    criterion.final_summary();
    agenda.finish("postgres");
}
