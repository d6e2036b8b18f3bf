//! The goals, in under two minutes, for every change: `cargo bench --bench track [-- words of a scenario]`.
//!
//! Each figure is a ratio within this run, against r2d2 without its test unless it says otherwise: the median over
//! rounds in which the rivals take turns, so that a noisy machine is noisy for all of them. What lies in brackets is the
//! least and the greatest of the rounds; "cpu" is the same ratio of processor time.
//!
//! "Same build" compares what is the same. While it is missed, no other row of the run says anything about a few percent.
//! It compares within one process; what differs from one process to the next only several runs can show.
//!
//! `-- outages` measures instead how soon a user is served again after a server was gone for 2 and 8 s, and beside it how
//! often the pools tried to connect meanwhile; `-- outages long` adds 60 s.
//!
//! A query has two speeds, for seconds at a time, by whether a processor falls asleep between a question and its answer.
//! Where one thread asks, it and the server therefore share a processor, which then never sleeps. (A thread of the system's
//! idle class that spins on each processor was tried, and is not there: it made the rounds differ more.)

mod common;
#[path = "track/outages.rs"]
mod outages;
#[path = "../tests/support/mod.rs"]
mod support;

use common::peers;
use common::processors::pin_process;
use common::report::Part;
use common::{Load, Outcome, Subject, Usage, is_picked, median, ms, rounds, sessions, short, us};
use millpond::event::NopEventHandler;
use outages::Outage;
use postgres::Config;
use std::time::{Duration, Instant};
use support::Server;

const ROUNDS: usize = 7;
/// Where nobody sleeps, many short rounds: most of them then meet no other process.
const MANY: usize = 301;
const BRIEF: Duration = ms(2);
/// The like for queries, which take a thousand times as long as a checkout.
const QUERIES: usize = 151;
const BRIEF_QUERIES: Duration = ms(6);
/// With more threads than connections: long enough for a quantile.
const CROWDS: usize = 11;
const CROWD: Duration = ms(150);
/// For fairness: in less than a second even the system's scheduler, which shares out the processors in slices of some
/// milliseconds, is not fair.
const LONG_ROUNDS: usize = 3;
const SECOND: Duration = Duration::from_secs(1);

fn main() {
    if !common::is_bench() {
        return;
    }
    let begun = Instant::now();
    let mut goals = Goals { rows: Vec::new() };
    if is_given("outages") {
        after_outages(&mut goals);
    } else {
        same(&mut goals);
        uncontended(&mut goals);
        knobs(&mut goals);
        sizes(&mut goals);
        contended(&mut goals);
        select_one(&mut goals);
    }

    let mut part = Part::new("track", "Goals");
    part.say(
        "Ratios to r2d2 without its test in the same run, unless it says otherwise; medians of interleaved rounds. \"Bests\" is \
         the ratio of the best rounds of both, which tells on a machine that others use; \"cpu\" is that of processor time, of \
         the threads that check out. On PostgreSQL millpond has its own \
         manager and keeps the statement by `query_one_cached`; \"stock\" is millpond with that of `r2d2_postgres`.\n",
    );
    let head = ["scenario", "what", "goal", "measured", "least", "most", "bests", "cpu", "rival", "millpond", ""];
    part.table(&head, &goals.rows);
    let judged = |verdict: &str| goals.rows.iter().filter(|row| row.last().is_some_and(|last| last == verdict)).count();
    let (met, missed) = (judged("ok"), judged("MISSED"));
    part.say(&format!("{missed} of {} goals missed, in {} s.", met + missed, begun.elapsed().as_secs()));
    part.finish();
}

fn is_given(word: &str) -> bool {
    std::env::args().any(|a| a == word)
}

struct Goals {
    rows: Vec<Vec<String>>,
}

impl Goals {
    /// Each round's figure of `mine` over that of `theirs`, at most `goal`.
    fn at_most(&mut self, row: (&str, &str), goal: f64, mine: &[Outcome], theirs: &[Outcome], f: fn(&Outcome) -> f64) {
        let ratios = ratios(mine, theirs, f);
        let measured = median(ratios.iter().copied());
        let (bests, cpu) = (bests(mine, theirs, f), cpu(mine, theirs));
        let met = measured <= goal;
        self.row(
            row,
            &format!("<= {goal}"),
            measured,
            &ratios,
            [bests, cpu],
            met,
            absolute(theirs, f),
            absolute(mine, f),
        );
    }

    /// The costs of two that are the same.
    fn equal(&mut self, row: (&str, &str), these: &[Outcome], those: &[Outcome]) {
        let ratios = ratios(these, those, Outcome::cost);
        let measured = median(ratios.iter().copied());
        let columns = [bests(these, those, Outcome::cost), cpu(these, those)];
        let costs = [those, these].map(|outcomes| absolute(outcomes, Outcome::cost));
        let [those, these] = costs;
        self.row(row, "0.97-1.03", measured, &ratios, columns, (0.97..=1.03).contains(&measured), those, these);
    }

    /// A figure that needs no rival, at least `goal`, or at most if that is `less`.
    fn alone(
        &mut self,
        row: (&str, &str),
        less: bool,
        goal: f64,
        mine: &[Outcome],
        theirs: &[Outcome],
        f: fn(&Outcome) -> f64,
    ) {
        let figures: Vec<f64> = mine.iter().map(f).collect();
        let measured = median(figures.iter().copied());
        let absolute = |outcomes: &[Outcome]| match outcomes {
            [] => NONE.into(),
            _ => format!("{:.2}", median(outcomes.iter().map(f))),
        };
        let (sign, met) = if less { ("<=", measured <= goal) } else { (">=", measured >= goal) };
        let columns = [NONE, NONE].map(String::from);
        self.row(row, &format!("{sign} {goal}"), measured, &figures, columns, met, absolute(theirs), absolute(mine));
    }

    /// Seconds, at most `goal`; and counts, to be seen beside it.
    fn outage(&mut self, name: &str, goal: f64, [mine, theirs]: [Outage; 2]) {
        let first = |outage: Outage| outage.first.as_secs_f64();
        let (measured, met) = (first(mine), first(mine) <= goal);
        let columns = [NONE, NONE].map(String::from);
        let row = (name, "first success in s");
        self.row(
            row,
            &format!("<= {goal}"),
            measured,
            &[measured],
            columns,
            met,
            short(first(theirs)),
            short(measured),
        );
        let [mine, theirs] = [mine, theirs].map(|outage| outage.attempts.to_string());
        println!("{:>6}  {name:<28} {:<20} {mine:>17}  (r2d2 {theirs})", "", "failed connects");
        let mut cells = [NONE; 11].map(String::from);
        [cells[0], cells[1], cells[8], cells[9]] = [name.to_owned(), "failed connects".to_owned(), theirs, mine];
        self.rows.push(cells.into());
    }

    /// No goal of its own, but to be seen beside one.
    fn beside(&mut self, row: (&str, &str), these: &[Outcome], theirs: &[Outcome]) {
        let ratios = ratios(these, theirs, Outcome::cost);
        let (ratio, cpu) = (median(ratios.iter().copied()), cpu(these, theirs));
        println!("{:>6}  {:<28} {:<20} {ratio:>17.3}  (cpu {cpu})", "", row.0, row.1);
        let (least, most) = ratios.iter().fold((f64::INFINITY, 0.0f64), |(l, m), &r| (l.min(r), m.max(r)));
        let [ratio, least, most] = [ratio, least, most].map(|r| format!("{r:.3}"));
        let [rival, mine] = [theirs, these].map(|outcomes| absolute(outcomes, Outcome::cost));
        let none = || NONE.to_owned();
        let cells = [row.0.into(), row.1.into(), none(), ratio, least, most, none(), cpu, rival, mine, none()];
        self.rows.push(cells.into());
    }

    #[allow(clippy::too_many_arguments, reason = "one per column")]
    fn row(
        &mut self,
        row: (&str, &str),
        goal: &str,
        measured: f64,
        all: &[f64],
        [bests, cpu]: [String; 2],
        met: bool,
        theirs: String,
        mine: String,
    ) {
        let least = all.iter().copied().fold(f64::INFINITY, f64::min);
        let most = all.iter().copied().fold(0.0, f64::max);
        let verdict = if met { "ok" } else { "MISSED" };
        println!(
            "{verdict:>6}  {:<28} {:<20} {goal:<9} {measured:>7.3}  ({least:.3}-{most:.3}, bests {bests}, cpu {cpu})",
            row.0, row.1
        );
        self.rows.push(vec![
            row.0.into(),
            row.1.into(),
            goal.into(),
            format!("{measured:.3}"),
            format!("{least:.3}"),
            format!("{most:.3}"),
            bests,
            cpu,
            theirs,
            mine,
            verdict.into(),
        ]);
    }
}

/// In a cell that has no figure.
const NONE: &str = "-";

/// Round by round.
fn ratios(mine: &[Outcome], theirs: &[Outcome], f: fn(&Outcome) -> f64) -> Vec<f64> {
    mine.iter().zip(theirs).map(|(m, t)| f(m) / f(t)).collect()
}

/// Of the best round of each.
fn bests(mine: &[Outcome], theirs: &[Outcome], f: fn(&Outcome) -> f64) -> String {
    let best = |outcomes: &[Outcome]| outcomes.iter().map(f).fold(f64::INFINITY, f64::min);
    format!("{:.3}", best(mine) / best(theirs))
}

/// The ratio of the processor times, where they are known.
fn cpu(mine: &[Outcome], theirs: &[Outcome]) -> String {
    let ratio = median(ratios(mine, theirs, Outcome::processor_cost));
    if ratio.is_finite() { format!("{ratio:.3}") } else { NONE.into() }
}

fn absolute(outcomes: &[Outcome], f: fn(&Outcome) -> f64) -> String {
    short(median(outcomes.iter().map(f)))
}

fn rivals(size: u32) -> [Box<dyn Subject>; 2] {
    let rivals = [peers::millpond("millpond", size, |b| b), peers::r2d2("r2d2 untested", size, false)];
    rivals.iter().for_each(|subject| subject.fill(size as usize));
    rivals
}

fn p99(outcome: &Outcome) -> f64 {
    outcome.waits.quantile(0.99)
}

fn p999(outcome: &Outcome) -> f64 {
    outcome.waits.quantile(0.999)
}

const SAME: &str = "same build";

/// What is the same must cost the same, or the machine is too noisy for the others. On PostgreSQL: in [`select_one`].
fn same(goals: &mut Goals) {
    if is_picked(SAME) {
        let load = Load { threads: 1, usage: Usage::Nothing };
        let twins = [(); 2].map(|()| peers::millpond("millpond", 1, |b| b));
        let [these, those] = &rounds(&load, &[&*twins[0], &*twins[1]], MANY, BRIEF, false)[..] else {
            unreachable!("two subjects")
        };
        goals.equal((SAME, "cost, 1 thread"), these, those);
    }
}

/// More connections than threads need.
fn uncontended(goals: &mut Goals) {
    for (threads, name, goal) in [(1, "1 thread", 0.18), (4, "4 threads on 4", 0.25)] {
        if !is_picked(name) {
            continue;
        }
        let load = Load { threads, usage: Usage::Nothing };
        let size = threads as u32;
        let ([millpond, r2d2], least) = (rivals(size), [peers::bare(size), peers::accounted(size)]);
        let list = [&*millpond, &*r2d2, &*least[0], &*least[1]];
        let [mine, theirs, bare, accounted] = &rounds(&load, &list, MANY, BRIEF, false)[..] else {
            unreachable!("four subjects")
        };
        goals.at_most((name, "cost"), goal, mine, theirs, Outcome::cost);
        // How much of it a pool can save at all.
        goals.beside((name, "lock and list"), bare, theirs);
        goals.beside((name, "and accounts"), accounted, theirs);
    }
}

/// What observation costs, against Millpond itself.
fn knobs(goals: &mut Goals) {
    let load = Load { threads: 1, usage: Usage::Nothing };
    let pools = [
        peers::millpond("leak detection on", 4, |b| b.leak_threshold(Duration::from_secs(30))),
        peers::millpond("events on", 4, |b| b.event_handler(Box::new(NopEventHandler))),
    ];
    for on in pools.iter().filter(|pool| is_picked(pool.name())) {
        let off = peers::millpond("off", 4, |b| b);
        let both = rounds(&load, &[&**on, &*off], MANY, BRIEF, false);
        goals.at_most((on.name(), "cost, to off"), 1.15, &both[0], &both[1], Outcome::cost);
    }
    const WATCHED: &str = "stats read every 10 ms";
    if is_picked(WATCHED) {
        let pool = peers::millpond_pool(4, |b| b);
        let (on, off) = (common::named("on", pool.clone()), peers::millpond("off", 4, |b| b));
        let both = peers::watched(&pool, || rounds(&load, &[&*on, &*off], MANY, BRIEF, false));
        goals.at_most((WATCHED, "cost, to off"), 1.15, &both[0], &both[1], Outcome::cost);
    }
}

/// Ten thousand connections that are not needed, against Millpond itself.
fn sizes(goals: &mut Goals) {
    const NAME: &str = "size 10,000";
    if !is_picked(NAME) {
        return;
    }
    let pools = [10_000, 1].map(|size| {
        let pool = peers::millpond("millpond", size, |b| b);
        pool.fill(size as usize);
        pool
    });
    let load = Load { threads: 1, usage: Usage::Nothing };
    let [large, small] = &rounds(&load, &[&*pools[0], &*pools[1]], MANY, BRIEF, false)[..] else {
        unreachable!("two subjects")
    };
    goals.at_most((NAME, "cost, to size 1"), 1.1, large, small, Outcome::cost);
}

/// One scenario of [`contended`], and its goals.
struct Contended {
    name: &'static str,
    load: Load,
    /// At most this part of r2d2's.
    cost: f64,
    /// A quantile of the waits: at most this part of r2d2's.
    tail: (&'static str, fn(&Outcome) -> f64, f64),
    /// Over one second, at least.
    fairness: f64,
}

/// More threads than connections.
fn contended(goals: &mut Goals) {
    const NOTHING: &str = "16 on 4, no work";
    if is_picked(NOTHING) {
        let load = Load { threads: 16, usage: Usage::Nothing };
        let [millpond, r2d2] = rivals(4);
        let pair: [&dyn Subject; 2] = [&*millpond, &*r2d2];
        // The clock around a checkout costs more than the checkout: not while costs are compared.
        let [mine, theirs] = &rounds(&load, &pair, ROUNDS, ms(120), false)[..] else { unreachable!("two subjects") };
        goals.at_most((NOTHING, "cost"), 0.5, mine, theirs, Outcome::cost);
        let (mine, theirs) = long_rounds(&load, pair);
        let in_ms = |outcome: &Outcome| p999(outcome) * 1e3;
        goals.alone((NOTHING, "p99.9 in ms"), true, 0.5, &mine, &theirs, in_ms);
        goals.alone((NOTHING, "fairness over 1 s"), false, 0.7, &mine, &theirs, Outcome::fairness);
    }

    let scenarios = [
        Contended {
            name: "16 on 4, 20 us of work",
            load: Load { threads: 16, usage: Usage::Spin(us(20)) },
            cost: 1.05,
            tail: ("p99.9", p999, 1.0 / 8.0),
            fairness: 0.85,
        },
        Contended {
            name: "16 on 4, 50 us asleep",
            load: Load { threads: 16, usage: Usage::Sleep(us(50)) },
            cost: 0.98,
            tail: ("p99", p99, 0.35),
            fairness: 0.9,
        },
        Contended {
            name: "64 on 4, 50 us asleep",
            load: Load { threads: 64, usage: Usage::Sleep(us(50)) },
            cost: 1.10,
            tail: ("p99", p99, 0.3),
            fairness: 0.9,
        },
        Contended {
            name: "16 on 4, 1 ms asleep",
            load: Load { threads: 16, usage: Usage::Sleep(ms(1)) },
            cost: 1.02,
            tail: ("p99", p99, 0.25),
            fairness: 0.95,
        },
    ];
    for Contended { name, load, cost, tail: (quantile, of, part), fairness } in scenarios {
        if !is_picked(name) {
            continue;
        }
        let [millpond, r2d2] = rivals(4);
        let pair: [&dyn Subject; 2] = [&*millpond, &*r2d2];
        let [mine, theirs] = &rounds(&load, &pair, ROUNDS, ms(200), true)[..] else { unreachable!("two subjects") };
        goals.at_most((name, "cost"), cost, mine, theirs, Outcome::cost);
        goals.at_most((name, quantile), part, mine, theirs, of);
        let (mine, theirs) = long_rounds(&load, pair);
        goals.alone((name, "fairness over 1 s"), false, fairness, &mine, &theirs, Outcome::fairness);
    }
}

/// One round of the rival, to stand beside.
fn long_rounds(load: &Load, [mine, theirs]: [&dyn Subject; 2]) -> (Vec<Outcome>, Vec<Outcome>) {
    let once = load.run(theirs, SECOND, true);
    ((0..LONG_ROUNDS).map(|_| load.run(mine, SECOND, true)).collect(), vec![once])
}

/// On a real server, each pool with its defaults: Millpond as its README begins, and with the stock manager.
fn select_one(goals: &mut Goals) {
    const PLENTY: [(usize, &str); 2] = [(1, "SELECT 1, 1 thread"), (4, "SELECT 1, 4 on 4")];
    const FEW: &str = "SELECT 1, 16 on 4";
    const UNIX_PLENTY: &str = "SELECT 1, unix, 4 on 4";
    const UNIX_FEW: &str = "SELECT 1, unix, 16 on 4";
    let names = [SAME, PLENTY[0].1, PLENTY[1].1, FEW, UNIX_PLENTY, UNIX_FEW];
    if !names.iter().any(|name| is_picked(name)) {
        return;
    }
    let server = Server::start();
    let tcp = server.config("track");
    let unix: Config = server.unix_conninfo("track").parse().expect("an address");
    let load = |threads| Load { threads, usage: Usage::Use };

    // For the connections that are opened from now on.
    pin_process(server.pid(), Some(0));
    if is_picked(SAME) {
        let twins = [(); 2].map(|()| sessions::bare(&tcp, 1));
        let list = [&*twins[0], &*twins[1]];
        let [these, those] = &rounds(&load(1), &list, QUERIES, BRIEF_QUERIES, false)[..] else {
            unreachable!("two subjects")
        };
        goals.equal((SAME, "a bare client"), these, those);
    }
    for (threads, name) in PLENTY.into_iter().filter(|(_, name)| is_picked(name)) {
        pin_process(server.pid(), (threads == 1).then_some(0));
        let (own, stock) = (sessions::millpond(&tcp, 4), sessions::stock(&tcp, 4, true));
        let bare = sessions::bare(&tcp, threads);
        let list = [&*own, &*stock, &*bare];
        let [mine, on_stock, theirs] = &rounds(&load(threads), &list, QUERIES, BRIEF_QUERIES, false)[..] else {
            unreachable!("three subjects")
        };
        goals.at_most((name, "cost, to bare"), 1.03, mine, theirs, Outcome::cost);
        goals.at_most((name, "stock: cost, to bare"), 1.05, on_stock, theirs, Outcome::cost);
    }
    pin_process(server.pid(), None);
    if is_picked(FEW) {
        let (own, stock) = (sessions::millpond(&tcp, 4), sessions::stock(&tcp, 4, true));
        let (r2d2, bare) = (sessions::r2d2(&tcp, 4, false), sessions::bare(&tcp, 16));
        let list = [&*own, &*stock, &*r2d2, &*bare];
        let [mine, on_stock, theirs, unpooled] = &rounds(&load(16), &list, CROWDS, CROWD, true)[..] else {
            unreachable!("four subjects")
        };
        goals.at_most((FEW, "cost, to bare"), 1.18, mine, unpooled, Outcome::cost);
        goals.at_most((FEW, "stock: cost, to bare"), 1.18, on_stock, unpooled, Outcome::cost);
        goals.beside((FEW, "cost, to r2d2"), mine, theirs);
        goals.beside((FEW, "stock: cost, to r2d2"), on_stock, theirs);
        goals.at_most((FEW, "p99 of get"), 0.2, mine, theirs, p99);
        goals.at_most((FEW, "stock: p99 of get"), 0.2, on_stock, theirs, p99);
    }
    if is_picked(UNIX_PLENTY) {
        let (own, bare) = (sessions::millpond(&unix, 4), sessions::bare(&unix, 4));
        let [mine, theirs] = &rounds(&load(4), &[&*own, &*bare], QUERIES, BRIEF_QUERIES, false)[..] else {
            unreachable!("two subjects")
        };
        goals.at_most((UNIX_PLENTY, "cost, to bare"), 1.05, mine, theirs, Outcome::cost);
    }
    if is_picked(UNIX_FEW) {
        let (own, r2d2) = (sessions::millpond(&unix, 4), sessions::r2d2(&unix, 4, false));
        let [mine, theirs] = &rounds(&load(16), &[&*own, &*r2d2], CROWDS, CROWD, true)[..] else {
            unreachable!("two subjects")
        };
        goals.at_most((UNIX_FEW, "cost"), 1.0, mine, theirs, Outcome::cost);
        goals.at_most((UNIX_FEW, "p99 of get"), 0.3, mine, theirs, p99);
    }
}

/// The server is stopped while one user asks, and started again.
fn after_outages(goals: &mut Goals) {
    let long = is_given("long").then_some(60);
    for seconds in [2, 8].into_iter().chain(long) {
        let both = outages::both(Duration::from_secs(seconds));
        goals.outage(&format!("outage of {seconds} s"), 0.3, both);
    }
}
