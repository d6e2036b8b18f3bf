//! How long a checkout waits when there are more threads than connections, as distributions, and how evenly checkouts are
//! shared out: `cargo bench --bench waits [-- --quick] [words of a scenario]`.
//!
//! Throughput alone rewards starvation: a thread that returns the connection takes it again without a context switch.
//! Each wait counts once, so a pool that starves a few threads shows it in the last of its quantiles, in the greatest wait,
//! and in the fairness (fewest over most checkouts per thread, within one second) rather than in the middle.
//!
//! The last scenario is on a private PostgreSQL server, whose processes share the machine.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::peers;
use common::plot::{self, Axis};
use common::report::Part;
use common::{Load, Outcome, Subject, Usage, Waits, is_picked, is_quick, median, ms, rounds, sessions, short, us};
use support::Server;

fn main() {
    if !common::is_bench() {
        return;
    }
    let (n, time) = if is_quick() { (1, ms(300)) } else { (5, ms(1000)) };
    let mut part = Part::new("waits", "Waiting for a connection");
    part.say(&format!(
        "{n} interleaved rounds of {} ms. Costs are per checkout and return, all threads together, the ratio to r2d2 without its \
         test; medians of rounds. Waits of all rounds together, the clock read around each checkout.\n",
        time.as_millis()
    ));
    let scenarios: [(&str, &str, usize, Usage); 5] = [
        ("nothing", "16 threads on 4, no work", 16, Usage::Nothing),
        ("work", "16 threads on 4, 20 us of work", 16, Usage::Spin(us(20))),
        ("asleep", "16 threads on 4, 50 us asleep", 16, Usage::Sleep(us(50))),
        ("crowd", "64 threads on 4, 50 us asleep", 64, Usage::Sleep(us(50))),
        ("longer", "16 threads on 4, 1 ms asleep", 16, Usage::Sleep(ms(1))),
    ];
    for (name, title, threads, usage) in scenarios {
        if !is_picked(title) {
            continue;
        }
        let load = Load { threads, usage };
        compare(&mut part, name, title, &peers::everybody(4), |list| rounds(&load, list, n, time, true));
    }
    const QUERY: &str = "16 threads on 4, a prepared SELECT 1 each";
    if is_picked(QUERY) {
        let server = Server::start();
        let config = server.config("waits");
        let mut subjects = vec![sessions::millpond(&config, 4), sessions::r2d2(&config, 4, false)];
        subjects.extend([sessions::r2d2(&config, 4, true), sessions::stock(&config, 4, true)]);
        let load = Load { threads: 16, usage: Usage::Use };
        compare(&mut part, "query", QUERY, &subjects, |list| rounds(&load, list, n, time, true));
    }
    part.finish();
}

/// r2d2 without its test must be where [`peers::R2D2`] says.
fn compare(
    part: &mut Part,
    name: &str,
    title: &str,
    subjects: &[Box<dyn Subject>],
    run: impl FnOnce(&[&dyn Subject]) -> Vec<Vec<Outcome>>,
) {
    let list: Vec<&dyn Subject> = subjects.iter().map(|s| &**s).collect();
    let outcomes = run(&list);
    show(part, name, title, &list, &outcomes);
}

fn show(part: &mut Part, name: &str, title: &str, subjects: &[&dyn Subject], outcomes: &[Vec<Outcome>]) {
    let r2d2 = &outcomes[peers::R2D2];
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (subject, mine) in subjects.iter().zip(outcomes) {
        let mut waits = Waits::new();
        mine.iter().for_each(|outcome| waits.add(&outcome.waits));
        let ratio = median(mine.iter().zip(r2d2).map(|(m, t)| m.cost() / t.cost()));
        rows.push(vec![
            subject.name().to_owned(),
            short(median(mine.iter().map(Outcome::cost))),
            format!("{ratio:.2}"),
            short(waits.quantile(0.5)),
            short(waits.quantile(0.99)),
            short(waits.quantile(0.999)),
            short(waits.max()),
            format!("{:.2}", median(mine.iter().map(Outcome::fairness))),
        ]);
        lines.push((subject.name().to_owned(), curve(&waits)));
    }
    part.say(&format!("### {title}\n"));
    part.table(&["", "cost", "to r2d2", "p50", "p99", "p99.9", "max", "fairness"], &rows);

    let greatest = lines.iter().flat_map(|(_, points)| points.last()).map(|p| p.1).fold(0.0, f64::max);
    let x = Axis { name: "part of the checkouts", range: plot::tail(5), show: percent };
    let y = Axis { name: "waited at most", range: plot::log(LEAST, greatest), show: |&s| short(s) };
    part.plot(name, &format!("Waiting times: {title}"), &plot::lines(title, x, y, &lines, false));
}

/// The shortest wait that a plot shows, in seconds.
const LEAST: f64 = 1e-8;

/// What is not in a tail of `0.01` is 99 %.
fn percent(tail: &f64) -> String {
    format!("{} %", (1e5 * (1.0 - tail)).round() / 1e3)
}

/// A distribution, ten points per power of ten of its tail, as far as there are enough checkouts to tell.
fn curve(waits: &Waits) -> Vec<(f64, f64)> {
    let tails = (0..=50).map(|i| 10f64.powf(-f64::from(i) / 10.0));
    let tails = tails.filter(|tail| 1.0 / tail <= waits.count() as f64);
    tails.map(|tail| (tail, waits.quantile(1.0 - tail).max(LEAST))).collect()
}
