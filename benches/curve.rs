//! What the bound of barging costs, and what it buys: `cargo bench --bench curve [-- --quick] [words of a
//! scenario]`.
//!
//! A connection that is returned while threads wait is handed off to the first waiter, or a running thread may take it
//! (barging). The more is handed off, the shorter are the longest waits, and the longer a connection is idle until the
//! waiter runs. `fair_after` sets how much of each. Its default is one point of a curve. Here are others.
//!
//! Costs and waits are from runs of their own: the clock around a checkout costs more than some of the checkouts.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::plot::{self, Axis, Dot};
use common::report::Part;
use common::{Load, Outcome, Subject, Usage, is_picked, is_quick, median, ms, peers, rounds, sessions, short, us};
use millpond::{Builder, Manage};
use std::time::{Duration, Instant};
use support::Server;

const SIZE: u32 = 4;

fn main() {
    if !common::is_bench() {
        return;
    }
    let begun = Instant::now();
    let plan = if is_quick() { Plan(3, ms(25), ms(150)) } else { Plan(7, ms(60), ms(500)) };
    let Plan(n, short, long) = plan;
    let mut part = Part::new("curve", "What the bound of barging costs");
    part.say(&format!(
        "Millpond with other values of `fair_after`: until when the first waiter may be barged. Costs are per checkout \
         and return, all threads together, and their ratio to r2d2 without its test; medians of {n} interleaved rounds of \
         {} ms in which nobody looks at the clock. Waits and fairness are of one more run of {} ms. Where some threads \
         starve while the others check out thousands of times, p99.9 does not show it, but the greatest wait and the \
         fairness do.\n",
        short.as_millis(),
        long.as_millis()
    ));
    let scenarios = [
        ("nothing", "16 on 4, no work", Usage::Nothing),
        ("work", "16 on 4, 20 us of work", Usage::Spin(us(20))),
        ("asleep", "16 on 4, 50 us asleep", Usage::Sleep(us(50))),
    ];
    let settings = settings();
    for (name, title, usage) in scenarios.into_iter().filter(|(_, title, _)| is_picked(title)) {
        let r2d2 = peers::r2d2("r2d2 untested", SIZE, false);
        r2d2.fill(SIZE as usize);
        let millpond = |setting: &Setting| {
            let pool = peers::millpond(&setting.name(), SIZE, |b| setting.apply(b));
            pool.fill(SIZE as usize);
            pool
        };
        let millponds = settings.iter().map(millpond).collect();
        compare(&mut part, name, title, usage, &plan, &settings, r2d2, millponds);
    }
    const QUERY: &str = "SELECT 1, 16 threads on 4";
    if is_picked(QUERY) {
        let server = Server::start();
        let config = server.config("curve");
        let r2d2 = sessions::r2d2(&config, SIZE, false);
        let millpond = |s: &Setting| sessions::millpond_with(&s.name(), &config, SIZE, |b| s.apply(b));
        let millponds = settings.iter().map(millpond).collect();
        compare(&mut part, "query", QUERY, Usage::Use, &plan, &settings, r2d2, millponds);
    }
    part.say(&format!("In {} s.", begun.elapsed().as_secs()));
    part.finish();
}

/// So many rounds of so long for the costs, and so long for the waits.
struct Plan(usize, Duration, Duration);

/// A value of `fair_after`.
struct Setting(Duration);

/// In the order of the table.
fn settings() -> Vec<Setting> {
    [Duration::ZERO, us(100), us(300), us(700), ms(2), ms(10)].map(Setting).into()
}

impl Setting {
    fn apply<M: Manage>(&self, builder: Builder<M>) -> Builder<M> {
        builder.fair_after(self.0)
    }

    /// Whether it changes nothing.
    fn is_default(&self) -> bool {
        let builder = Builder::<peers::Nils>::new;
        format!("{:?}", self.apply(builder())) == format!("{:?}", builder())
    }

    fn name(&self) -> String {
        let name = format!("fair after {}", brief(self.0));
        if self.is_default() { format!("{name} (default)") } else { name }
    }
}

fn brief(time: Duration) -> String {
    match time.as_micros() {
        0 => "0".into(),
        us if us % 1000 == 0 => format!("{} ms", us / 1000),
        us => format!("{us} us"),
    }
}

#[allow(clippy::too_many_arguments, reason = "a scenario, and its subjects")]
fn compare(
    part: &mut Part,
    name: &str,
    title: &str,
    usage: Usage,
    &Plan(n, short_time, long_time): &Plan,
    settings: &[Setting],
    r2d2: Box<dyn Subject>,
    millponds: Vec<Box<dyn Subject>>,
) {
    let load = Load { threads: 16, usage };
    let subjects: Vec<&dyn Subject> = [&r2d2].into_iter().chain(&millponds).map(|s| &**s).collect();
    let untimed = rounds(&load, &subjects, n, short_time, false);
    let timed = rounds(&load, &subjects, 1, long_time, true);

    let mut rows = Vec::new();
    // Of the dots: r2d2's first.
    let mut places = Vec::new();
    for ((subject, costs), long) in subjects.iter().zip(&untimed).zip(timed.iter().flatten()) {
        let ratio = median(costs.iter().zip(&untimed[0]).map(|(mine, theirs)| mine.cost() / theirs.cost()));
        let waits = &long.waits;
        rows.push(vec![
            subject.name().to_owned(),
            short(median(costs.iter().map(Outcome::cost))),
            format!("{ratio:.2}"),
            short(waits.quantile(0.5)),
            short(waits.quantile(0.99)),
            short(waits.quantile(0.999)),
            short(waits.max()),
            format!("{:.2}", long.fairness()),
        ]);
        places.push((waits.quantile(0.999), ratio));
    }
    part.say(&format!("### {title}\n"));
    part.table(&["", "cost", "to r2d2", "p50", "p99", "p99.9", "max", "fairness"], &rows);

    let ends = |of: fn(&(f64, f64)) -> f64| {
        let all = || places.iter().map(of);
        plot::log(all().fold(f64::INFINITY, f64::min) * 0.95, all().fold(0.0, f64::max) * 1.05)
    };
    let x = Axis { name: "p99.9 of the waits", range: ends(|p| p.0), show: |&s| short(s) };
    let y = Axis { name: "cost, to r2d2", range: ends(|p| p.1), show: |v| format!("{v}") };
    let millponds = settings.iter().zip(&places[1..]);
    let millponds = millponds.map(|(s, &at)| Dot { at, name: s.name(), marked: s.is_default() });
    let r2d2 = Dot { at: places[0], name: subjects[0].name().into(), marked: false };
    let dots: Vec<Dot> = millponds.chain([r2d2]).collect();
    let title = format!("{title} (large dot: the default)");
    let svg = plot::dots(&title, x, y, &dots, settings.len());
    part.plot(name, &format!("Cost against the longest waits: {title}"), &svg);
}
