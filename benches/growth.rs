//! How a pool grows: `cargo bench --bench growth [-- --quick] [words of a table]`. What a checkout costs beside many idle
//! connections, how long one is delayed while all others are evicted, and what becomes of many more threads than
//! connections. (How long the lock is held for each kind of step is a table of its own:
//! `cargo test --profile bench --lib growth -- --ignored --nocapture`.)

mod common;

use common::peers::{self, Nils};
use common::report::Part;
use common::{Load, Outcome, Store, Usage, Waits, is_picked, is_quick, median, ms, rounds, short, us};
use millpond::{Pool, Validate};
use std::time::{Duration, Instant};

fn main() {
    if !common::is_bench() {
        return;
    }
    let mut part = Part::new("growth", "Growth");
    if is_picked("connections") {
        connections(&mut part);
    }
    if is_picked("threads") {
        threads(&mut part);
    }
    part.finish();
}

/// A pool of `n` idle connections, and how long its connections may be idle.
fn idle(n: usize, with: impl FnOnce(millpond::Builder<Nils>) -> millpond::Builder<Nils>) -> Pool<Nils> {
    let builder = Pool::builder().max_size(n as u32).parallel_opens(64).connection_timeout(Duration::from_secs(120));
    let builder = builder.max_idle(None).max_lifetime(None).validate(Validate::Never);
    let pool = with(builder).build(Nils).expect("a pool");
    let in_use: Vec<_> = (0..n).map(|worker| Store::get(&pool, worker)).collect();
    drop(in_use);
    pool
}

/// One thread checks out and returns, for so long or until nothing else is idle: the cost of each, and the greatest delay.
fn alone(pool: &Pool<Nils>, time: Duration) -> (f64, Duration) {
    let (begun, mut greatest, mut n) = (Instant::now(), Duration::ZERO, 0u32);
    let mut last = begun;
    while last < begun + time && (n % 1024 != 0 || n == 0 || pool.stats().idle > 1) {
        drop(Store::get(pool, 0));
        let now = Instant::now();
        greatest = greatest.max(now - last);
        (last, n) = (now, n + 1);
    }
    (begun.elapsed().as_secs_f64() / f64::from(n), greatest)
}

fn connections(part: &mut Part) {
    let sizes = if is_quick() { vec![10, 1_000, 10_000] } else { vec![10, 100, 1_000, 10_000, 100_000] };
    let time = if is_quick() { ms(200) } else { ms(1_000) };
    let far = Duration::from_secs(3_600);
    let mut rows = Vec::new();
    for n in sizes {
        let (at_rest, _) = alone(&idle(n, |b| b), time);
        let watched = idle(n, |b| b.keepalive(far).leak_threshold(far).max_lifetime(far).max_idle(far));
        let (with_limits, _) = alone(&watched, time);
        drop(watched);
        // (While the connections are opened none may be evicted.)
        let evicted = |with: &dyn Fn(millpond::Builder<Nils>) -> millpond::Builder<Nils>| {
            let pool = idle(n, with);
            let (_, greatest) = alone(&pool, Duration::from_secs(30));
            (greatest, pool.stats().max_lateness)
        };
        let limit = Duration::from_secs(1 + n as u64 / 20_000);
        let (by_idle, late) = evicted(&|b| b.max_idle(limit));
        let (by_age, _) = evicted(&|b| b.max_lifetime(limit * 2).lifetime_jitter(0.0));
        let seconds = |time: Duration| short(time.as_secs_f64());
        rows.push(vec![
            n.to_string(),
            short(at_rest),
            short(with_limits),
            seconds(by_idle),
            seconds(by_age),
            seconds(late),
        ]);
    }
    part.say(
        "A checkout and its return by one thread, beside so many idle connections; the same with `keepalive`, leak detection and \
         limits; how long one took at most while all others were evicted, by `max_idle` and by `max_lifetime`; and how late the \
         last of them began to close.\n",
    );
    part.table(&["connections", "cost", "with limits", "max, idle", "max, lifetime", "late"], &rows);
}

fn threads(part: &mut Part) {
    let (n, time) = if is_quick() { (1, ms(300)) } else { (5, ms(1_000)) };
    let mut rows = Vec::new();
    for (threads, usage, what) in [
        (16, Usage::Nothing, "no work"),
        (200, Usage::Nothing, "no work"),
        (2_000, Usage::Nothing, "no work"),
        (2_000, Usage::Sleep(us(50)), "50 us asleep"),
    ] {
        let subjects = [peers::millpond("millpond", 10, |b| b), peers::r2d2("r2d2 untested", 10, false)];
        subjects.iter().for_each(|subject| subject.fill(10));
        let load = Load { threads, usage };
        let list = [&*subjects[0], &*subjects[1]];
        for (subject, outcomes) in list.iter().zip(rounds(&load, &list, n, time, true)) {
            let mut waits = Waits::new();
            outcomes.iter().for_each(|outcome| waits.add(&outcome.waits));
            let fewest = outcomes.iter().flat_map(|outcome| &outcome.gets).min().copied().unwrap_or(0);
            rows.push(vec![
                format!("{threads} on 10, {what}: {}", subject.name()),
                short(median(outcomes.iter().map(Outcome::cost))),
                short(waits.quantile(0.5)),
                short(waits.quantile(0.99)),
                short(waits.max()),
                fewest.to_string(),
            ]);
        }
    }
    part.say(&format!(
        "Threads that share ten connections: {n} interleaved rounds of {} ms. The cost of a checkout and its return, all \
         threads together; the waits; and how often the thread that was served least often was served in one round.\n",
        time.as_millis()
    ));
    part.table(&["", "cost", "p50", "p99", "max", "fewest"], &rows);
}
