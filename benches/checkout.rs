//! What a checkout and its return cost, on connections without I/O: `cargo bench --bench checkout`.
//!
//! Times are per checkout and return, all threads together: 4 threads that need 100 ns each at the same time show 25 ns.
//! Criterion runs one subject after the other. `track` has ratios from interleaved rounds, `waits` has the waiting times.

mod common;

use common::peers;
use common::report::Agenda;
use common::{Load, Subject, Usage, ms, us};
use criterion::{Criterion, SamplingMode};
use millpond::event::NopEventHandler;
use std::time::Duration;

fn main() {
    if !common::is_bench() {
        return;
    }
    let criterion = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(ms(200))
        .measurement_time(ms(600))
        .configure_from_args();
    let mut bench = Bench { criterion, agenda: Agenda::default() };
    threads(&mut bench);
    sizes(&mut bench);
    knobs(&mut bench);
    bench.criterion.final_summary();
    bench.agenda.finish("checkout");
}

struct Bench {
    criterion: Criterion,
    agenda: Agenda,
}

fn measure(bench: &mut Bench, title: &str, load: &Load, subjects: &[Box<dyn Subject>]) {
    let mut group = bench.criterion.benchmark_group(title);
    if load.threads > 1 {
        group.sampling_mode(SamplingMode::Flat);
    }
    for subject in subjects {
        bench.agenda.add(title, subject.name());
        group.bench_function(subject.name(), |b| b.iter_custom(|n| load.time(&**subject, n)));
    }
}

/// So many threads on so many connections, which use them for nothing, for work and for waiting.
fn threads(bench: &mut Bench) {
    let mut one = peers::everybody(1);
    one.push(peers::bare(1));
    one.push(peers::accounted(1));
    one.push(peers::swapped());
    one.push(peers::entering());
    measure(bench, "1 thread", &Load { threads: 1, usage: Usage::Nothing }, &one);

    let nothing = ("", Usage::Nothing);
    let work = (", 20 us of work", Usage::Spin(us(20)));
    let asleep = (", 50 us asleep", Usage::Sleep(us(50)));
    let longer = (", 1 ms asleep", Usage::Sleep(ms(1)));
    let shapes: [(usize, u32, &[_]); 4] = [
        (2, 2, &[nothing, work, asleep]),
        (4, 4, &[nothing, work, asleep]),
        (16, 4, &[nothing, work, asleep, longer]),
        (64, 4, &[asleep]),
    ];
    for (threads, size, usages) in shapes {
        let mut subjects = peers::everybody(size);
        if threads <= size as usize {
            subjects.push(peers::bare(size));
        }
        for &(what, usage) in usages {
            measure(bench, &format!("{threads} threads on {size}{what}"), &Load { threads, usage }, &subjects);
        }
    }
}

/// One thread, and so many idle connections under the one that it uses.
fn sizes(bench: &mut Bench) {
    for size in [1, 100, 10_000] {
        let subjects = [peers::millpond("millpond", size, |b| b), peers::r2d2("r2d2 untested", size, false)];
        subjects.iter().for_each(|subject| subject.fill(size as usize));
        measure(bench, &format!("size {size}"), &Load { threads: 1, usage: Usage::Nothing }, &subjects);
    }
}

/// What observation costs Millpond. Its counts cannot be turned off; what can be turned on is a reader of them.
fn knobs(bench: &mut Bench) {
    let subjects = [
        peers::millpond("off", 4, |b| b),
        peers::millpond("leak detection", 4, |b| b.leak_threshold(Duration::from_secs(30))),
        peers::millpond("events", 4, |b| b.event_handler(Box::new(NopEventHandler))),
        peers::millpond("a floor", 4, |b| b.min_idle(4)),
        peers::millpond("keepalive", 4, |b| b.keepalive(Duration::from_secs(30))),
        peers::millpond("no limits", 4, |b| b.max_idle(None).max_lifetime(None)),
        peers::millpond("always tested", 4, |b| b.test_on_check_out(true)),
    ];
    subjects.iter().for_each(|subject| subject.fill(4));
    for threads in [1, 4] {
        let title = if threads == 1 { "knobs, 1 thread" } else { "knobs, 4 threads" };
        let load = Load { threads, usage: Usage::Nothing };
        measure(bench, title, &load, &subjects);

        let pool = peers::millpond_pool(4, |b| b);
        let subject = [common::named("stats read every 10 ms", pool.clone())];
        peers::watched(&pool, || measure(bench, title, &load, &subject));
    }
}
