//! A prepared `SELECT 1` through each pool: `cargo bench --bench postgres [-- --quick] [words of a scenario]`.
//!
//! Beside a client per thread, which is what there would be without a pool; with 16 threads that is 16 connections
//! where the pools have 4. Times are per query, all threads together; ratios are medians over rounds in which the
//! rivals take turns. The server is private and on this machine, so it takes its share of the processors. Where the
//! statement is kept, and why bb8 and deadpool are missing, says `common/sessions.rs`.
//!
//! A connection that is not observed would be asked when it is returned whether it is in a transaction, unless the pool
//! is told not to ask ("no reset"). After a cached `SELECT`, as here, it is not asked either.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::report::Part;
use common::{Load, Outcome, Subject, Usage, is_picked, is_quick, median, ms, rounds, sessions, short};
use support::Server;

const SIZE: u32 = 4;

fn main() {
    if !common::is_bench() {
        return;
    }
    let (n, time) = if is_quick() { (3, ms(40)) } else { (9, ms(120)) };
    let server = Server::start();
    let unix = server.unix_conninfo("bench").parse().expect("an address");
    let mut part = Part::new("postgres", "A query");
    part.say(&format!(
        "A prepared `SELECT 1` per checkout and return. Costs are per query, all threads together: medians of {n} \
         interleaved rounds of {} ms, the ratios to a client per thread and to r2d2 without its test.\n",
        time.as_millis()
    ));
    for (network, config) in [("TCP", server.config("bench")), ("unix socket", unix)] {
        for threads in [1, 4, 16] {
            let plural = if threads == 1 { "" } else { "s" };
            let title = format!("{network}, {threads} thread{plural} on {SIZE}");
            if !is_picked(&title) {
                continue;
            }
            let mut subjects = vec![sessions::bare(&config, threads), sessions::r2d2(&config, SIZE, false)];
            subjects.push(sessions::r2d2(&config, SIZE, true));
            subjects.extend(sessions::millponds(&config, SIZE));
            subjects.extend([true, false].map(|test| sessions::stock(&config, SIZE, test)));
            let list: Vec<&dyn Subject> = subjects.iter().map(|s| &**s).collect();
            let outcomes = rounds(&Load { threads, usage: Usage::Use }, &list, n, time, false);
            part.say(&format!("### {title}\n"));
            part.table(&["", "cost", "to bare", "to r2d2"], &rows(&list, &outcomes));
        }
    }
    part.finish();
}

/// The first two are whom all are compared with.
fn rows(subjects: &[&dyn Subject], outcomes: &[Vec<Outcome>]) -> Vec<Vec<String>> {
    let row = |(subject, mine): (&&dyn Subject, &Vec<Outcome>)| {
        let to =
            |theirs: &[Outcome]| format!("{:.2}", median(mine.iter().zip(theirs).map(|(m, t)| m.cost() / t.cost())));
        let cost = short(median(mine.iter().map(Outcome::cost)));
        vec![subject.name().to_owned(), cost, to(&outcomes[0]), to(&outcomes[1])]
    };
    subjects.iter().zip(outcomes).map(row).collect()
}
