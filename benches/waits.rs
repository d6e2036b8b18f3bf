//! How long a get waits when there are more threads than connections, as distributions, beside how evenly it is shared
//! out: `cargo bench --bench waits [-- --quick] [words of a scenario]`.
//!
//! Throughput alone rewards starvation: whoever has the connection takes it again without a context switch. Each wait
//! counts once, so a pool that starves a few shows it in the last of its quantiles, in the greatest, and in the fairness
//! (fewest over most gets per thread, within one second) rather than in the middle.
//!
//! The last scenario is on a private PostgreSQL server, of whose processes the machine then has some more to run.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::peers;
use common::report::Part;
use common::svg::{Axis, plot};
use common::{Hold, Load, Outcome, Subject, Waits, is_picked, is_quick, median, ms, rounds, sessions, short, us};
use support::Server;

fn main() {
    if !common::is_bench() {
        return;
    }
    let (n, time) = if is_quick() { (1, ms(300)) } else { (5, ms(1000)) };
    let mut part = Part::new("waits", "Waiting for a connection");
    part.say(&format!(
        "{n} interleaved rounds of {} ms. Costs are per get and return, all threads together, the ratio to r2d2 without its \
         test; medians of rounds. Waits of all rounds together, the clock read around each get.\n",
        time.as_millis()
    ));
    let scenarios: [(&str, &str, usize, Hold); 5] = [
        ("nothing", "16 threads on 4, no hold", 16, Hold::Nothing),
        ("work", "16 threads on 4, 20 us of work", 16, Hold::Spin(us(20))),
        ("asleep", "16 threads on 4, 50 us asleep", 16, Hold::Sleep(us(50))),
        ("crowd", "64 threads on 4, 50 us asleep", 64, Hold::Sleep(us(50))),
        ("longer", "16 threads on 4, 1 ms asleep", 16, Hold::Sleep(ms(1))),
    ];
    for (name, title, threads, hold) in scenarios {
        if !is_picked(title) {
            continue;
        }
        let load = Load { threads, hold };
        compare(&mut part, name, title, &peers::everybody(4), |list| rounds(&load, list, n, time, true));
    }
    const QUERY: &str = "16 threads on 4, a prepared SELECT 1 each";
    if is_picked(QUERY) {
        let server = Server::start();
        let config = server.config("waits");
        let mut subjects = vec![sessions::millpond(&config, 4), sessions::r2d2(&config, 4, false)];
        subjects.extend([sessions::r2d2(&config, 4, true), sessions::stock(&config, 4, true)]);
        let load = Load { threads: 16, hold: Hold::Use };
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

    let highest = lines.iter().flat_map(|(_, points)| points.last()).map(|p| p.1).fold(0.0, f64::max);
    let nines = [(0.0, "0"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %"), (5.0, "99.999 %")];
    let x = Axis { label: "part of the gets".into(), ticks: nines.map(|(at, label)| (at, label.into())).into() };
    let y = Axis::log_seconds("waited at most", 1e-8, 10f64.powf(highest));
    part.plot(name, &format!("Waiting times: {title}"), &plot(title, &x, &y, &lines, false));
}

/// A distribution, one point per tenth of a nine, as far as there are enough to tell.
fn curve(waits: &Waits) -> Vec<(f64, f64)> {
    let points = (0..=50).map(|i| f64::from(i) / 10.0).filter(|nines| 10f64.powf(*nines) <= waits.count() as f64);
    points.map(|nines| (nines, waits.quantile(1.0 - 10f64.powf(-nines)).max(1e-8).log10())).collect()
}
