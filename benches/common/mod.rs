//! What every bench stands on: one trait in front of all pools, so that each scenario is written once and everybody is
//! measured on the same work.
//!
//! A [`Store`] is what connections are checked out from; that is all a pool has to do here. A [`Subject`] is a store that
//! can be kept in a list with others: whole loops run behind its virtual calls, never one `get`, so the list costs the
//! measured loop nothing.

#![allow(dead_code, unreachable_pub, reason = "compiled into each bench on its own, none of which uses all of it")]

pub mod peers;
pub mod plot;
pub mod processors;
pub mod report;
pub mod sessions;

use std::hint::black_box;
use std::ops::DerefMut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Whether cargo asks for a measurement (`cargo bench`); `cargo test --benches` only wants to see that this builds.
pub fn is_bench() -> bool {
    let given = |arg: &str| std::env::args().any(|a| a == arg);
    given("--bench") && !given("--test")
}

/// Whether the command line asks for a short run.
pub fn is_quick() -> bool {
    std::env::args().any(|a| a == "--quick")
}

/// Whether the words of the command line, if there are any, pick what is called `name`.
pub fn is_picked(name: &str) -> bool {
    let mut words = std::env::args().skip(1).filter(|a| !a.starts_with('-')).peekable();
    words.peek().is_none() || words.any(|word| name.contains(&word))
}

/// `ms(200)` reads better than its long form.
pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// And so does `us(50)`.
pub const fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

// -------------------------------------------------------------------------------------------------- the seam

/// A pool, or what takes the place of one.
pub trait Store: Send + Sync {
    /// What is in it.
    type Conn;
    /// A connection in use, which is returned when this is dropped.
    type CheckedOut<'a>: DerefMut<Target = Self::Conn>
    where
        Self: 'a;

    /// Waits for a connection. `worker` counts the threads from 0, for a store that gives each its own.
    fn get(&self, worker: usize) -> Self::CheckedOut<'_>;
}

/// What a worker does with a connection between checkout and return.
#[derive(Clone, Copy)]
pub enum Usage {
    /// Nothing.
    Nothing,
    /// Work on the processor that takes so long on an undisturbed core. Counted, not timed: a preempted worker still
    /// has all of its work to do, as in real life.
    Spin(Duration),
    /// Sleep, as a worker that waits for a server. (The system adds its slack, 50 us on Linux, for everybody alike.)
    Sleep(Duration),
    /// Use it, as its subject was told to: see [`using`].
    Use,
}

/// A store by its name, whatever its type and that of its connections.
pub trait Subject: Send + Sync {
    fn name(&self) -> &str;

    /// Checks out and returns `n` times.
    fn cycles(&self, worker: usize, n: u64, usage: Usage);

    /// Checks out and returns until told to stop, and says how often it did before that. With `waits`, reads the clock
    /// around each checkout.
    fn work(&self, worker: usize, usage: Usage, stop: &AtomicBool, waits: Option<&mut Waits>) -> u64;

    /// Has `n` connections in use at once, uses and returns them, so that as many are there and warm from now on.
    fn fill(&self, n: usize);
}

struct Named<S: Store> {
    name: String,
    store: S,
    /// What [`Usage::Use`] does.
    what: fn(&mut S::Conn),
}

/// A store with a name to be listed under.
pub fn named<S: Store + 'static>(name: impl Into<String>, store: S) -> Box<dyn Subject> {
    using(name, store, |_| {})
}

/// [`named`], and what its connections are used for. Connections of different types can so do the same work.
pub fn using<S: Store + 'static>(name: impl Into<String>, store: S, what: fn(&mut S::Conn)) -> Box<dyn Subject> {
    Box::new(Named { name: name.into(), store, what })
}

impl<S: Store> Subject for Named<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn cycles(&self, worker: usize, n: u64, usage: Usage) {
        let usage = usage.prepare(self.what);
        for _ in 0..n {
            usage.with(&mut self.store.get(worker));
        }
    }

    fn work(&self, worker: usize, usage: Usage, stop: &AtomicBool, waits: Option<&mut Waits>) -> u64 {
        let usage = usage.prepare(self.what);
        let mut gets = 0;
        match waits {
            None => loop {
                usage.with(&mut self.store.get(worker));
                if stop.load(Ordering::Relaxed) {
                    break gets;
                }
                gets += 1;
            },
            Some(waits) => loop {
                let asked = Instant::now();
                let mut conn = self.store.get(worker);
                waits.record(asked.elapsed());
                usage.with(&mut conn);
                drop(conn);
                if stop.load(Ordering::Relaxed) {
                    break gets;
                }
                gets += 1;
            },
        }
    }

    fn fill(&self, n: usize) {
        let mut in_use: Vec<_> = (0..n).map(|worker| self.store.get(worker)).collect();
        in_use.iter_mut().for_each(|conn| (self.what)(conn));
        drop(in_use);
    }
}

/// A [`Usage`] whose work has been counted.
enum Ready<C> {
    Nothing,
    Spin(u64),
    Sleep(Duration),
    Use(fn(&mut C)),
}

impl Usage {
    fn prepare<C>(self, what: fn(&mut C)) -> Ready<C> {
        match self {
            Usage::Nothing => Ready::Nothing,
            Usage::Spin(time) => Ready::Spin((time.as_secs_f64() * spins_per_second()) as u64),
            Usage::Sleep(time) => Ready::Sleep(time),
            Usage::Use => Ready::Use(what),
        }
    }
}

impl<C> Ready<C> {
    #[inline]
    fn with(&self, conn: &mut C) {
        let conn = black_box(conn);
        match *self {
            Ready::Nothing => {}
            Ready::Spin(n) => spin(n),
            Ready::Sleep(time) => thread::sleep(time),
            Ready::Use(what) => what(conn),
        }
    }
}

#[inline(never)]
fn spin(n: u64) {
    let mut x = n;
    for _ in 0..n {
        x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    black_box(x);
}

/// How much work an undisturbed core does: the best of many tries, for the others were disturbed.
fn spins_per_second() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        const N: u64 = 50_000;
        let best = (0..50).map(|_| {
            let begun = Instant::now();
            spin(N);
            begun.elapsed()
        });
        N as f64 / best.min().expect("fifty of them").as_secs_f64()
    })
}

// -------------------------------------------------------------------------------------------------- scenarios

/// So many threads do the same to one subject, each on the processor of its number: see [`processors::pin`].
pub struct Load {
    pub threads: usize,
    pub usage: Usage,
}

/// What came of a run.
pub struct Outcome {
    pub time: Duration,
    /// For which the threads ran, all together. Zero where that is not known.
    pub processor_time: Duration,
    /// How often each thread got a connection.
    pub gets: Vec<u64>,
    /// How long they waited; empty if that was not timed.
    pub waits: Waits,
}

impl Outcome {
    /// Seconds per checkout and return, all threads together.
    pub fn cost(&self) -> f64 {
        self.time.as_secs_f64() / self.gets.iter().sum::<u64>().max(1) as f64
    }

    /// Seconds of processor time per checkout and return: other than [`cost`](Outcome::cost), it does not grow while
    /// others use the machine, nor while a thread waits. The server's time is not in it.
    pub fn processor_cost(&self) -> f64 {
        self.processor_time.as_secs_f64() / self.gets.iter().sum::<u64>().max(1) as f64
    }

    /// Fewest over most checkouts per thread: 1 is even, 0 says that one thread got nothing.
    pub fn fairness(&self) -> f64 {
        let most = self.gets.iter().copied().max().unwrap_or(0).max(1);
        self.gets.iter().copied().min().unwrap_or(0) as f64 / most as f64
    }
}

impl Load {
    /// Runs for `time`. `timed`: with a look at the clock around each checkout, 50 ns or so.
    pub fn run(&self, subject: &dyn Subject, time: Duration, timed: bool) -> Outcome {
        let stop = AtomicBool::new(false);
        let start = Barrier::new(self.threads + 1);
        thread::scope(|s| {
            let (stop, start) = (&stop, &start);
            let usage = self.usage;
            let worker = |worker: usize| {
                s.spawn(move || {
                    let mut waits = Waits::new();
                    processors::pin(worker);
                    start.wait();
                    let begun = processors::processor_time();
                    let gets = subject.work(worker, usage, stop, timed.then_some(&mut waits));
                    (gets, waits, processors::processor_time() - begun)
                })
            };
            let workers: Vec<_> = (0..self.threads).map(worker).collect();
            start.wait();
            let begun = Instant::now();
            thread::sleep(time);
            stop.store(true, Ordering::Relaxed);
            let time = begun.elapsed();
            let mut outcome = Outcome { time, processor_time: Duration::ZERO, gets: Vec::new(), waits: Waits::new() };
            for worker in workers {
                let (gets, waits, processor_time) = worker.join().expect("a worker");
                outcome.processor_time += processor_time;
                outcome.gets.push(gets);
                outcome.waits.add(&waits);
            }
            outcome
        })
    }

    /// How long `n` checkouts and returns take, shared out evenly: for criterion, which counts. One thread has no others
    /// to wait for.
    pub fn time(&self, subject: &dyn Subject, n: u64) -> Duration {
        if self.threads == 1 {
            let alone = || {
                processors::pin(0);
                let begun = Instant::now();
                subject.cycles(0, n, self.usage);
                begun.elapsed()
            };
            return thread::scope(|s| s.spawn(alone).join().expect("a worker"));
        }
        let each = n.div_ceil(self.threads as u64);
        let start = Barrier::new(self.threads + 1);
        let time = thread::scope(|s| {
            let start = &start;
            let usage = self.usage;
            let worker = |worker: usize| {
                s.spawn(move || {
                    processors::pin(worker);
                    start.wait();
                    subject.cycles(worker, each, usage);
                    Instant::now()
                })
            };
            let workers: Vec<_> = (0..self.threads).map(worker).collect();
            let begun = Instant::now();
            start.wait();
            let ends = workers.into_iter().map(|w| w.join().expect("a worker"));
            ends.max().expect("at least one").saturating_duration_since(begun)
        });
        time.mul_f64(n as f64 / (each * self.threads as u64) as f64)
    }
}

// -------------------------------------------------------------------------------------------------- distributions

/// Buckets per power of two: a quantile is at most 1/32 above the true value.
const STEPS: u64 = 32;

/// How long something took: a histogram of nanoseconds, and the exact greatest.
#[derive(Clone)]
pub struct Waits {
    buckets: Vec<u64>,
    count: u64,
    max: u64,
}

impl Waits {
    pub fn new() -> Self {
        Waits { buckets: vec![0; (64 * STEPS) as usize], count: 0, max: 0 }
    }

    #[inline]
    pub fn record(&mut self, time: Duration) {
        let ns = time.as_nanos() as u64;
        let octave = u64::from((ns | STEPS).ilog2() - STEPS.ilog2());
        self.buckets[(octave * STEPS + (ns >> octave)) as usize] += 1;
        self.count += 1;
        self.max = self.max.max(ns);
    }

    pub fn add(&mut self, other: &Waits) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.max = self.max.max(other.max);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// In seconds.
    pub fn max(&self) -> f64 {
        self.max as f64 / 1e9
    }

    /// The time that a part `q` of them did not exceed, in seconds.
    pub fn quantile(&self, q: f64) -> f64 {
        let rank = (q * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                let (octave, step) = match i as u64 / STEPS {
                    0 => (0, i as u64),
                    o => (o - 1, i as u64 - (o - 1) * STEPS),
                };
                let upper = ((step + 1) << octave) - 1;
                return upper.min(self.max) as f64 / 1e9;
            }
        }
        self.max()
    }
}

// -------------------------------------------------------------------------------------------------- rounds

/// Runs each subject once per round, in turn, forwards and backwards by turns, so that what disturbs the machine for a
/// while disturbs all of them. The outcomes by subject, then by round.
pub fn rounds(load: &Load, subjects: &[&dyn Subject], rounds: usize, time: Duration, timed: bool) -> Vec<Vec<Outcome>> {
    let mut outcomes: Vec<Vec<Outcome>> = subjects.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        let mut order: Vec<usize> = (0..subjects.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for i in order {
            outcomes[i].push(load.run(subjects[i], time, timed));
        }
    }
    outcomes
}

pub fn median(of: impl IntoIterator<Item = f64>) -> f64 {
    let mut of: Vec<f64> = of.into_iter().collect();
    of.sort_by(f64::total_cmp);
    match of.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => of[n / 2],
        n => (of[n / 2 - 1] + of[n / 2]) / 2.0,
    }
}

/// Seconds in three digits and a unit.
pub fn short(seconds: f64) -> String {
    let (x, unit) = match seconds.abs() {
        s if !s.is_finite() => return "-".into(),
        0.0 => return "0".into(),
        s if s < 1e-6 => (seconds * 1e9, "ns"),
        s if s < 1e-3 => (seconds * 1e6, "us"),
        s if s < 1.0 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    let digits = match x.abs() {
        x if x < 9.995 => 2,
        x if x < 99.95 => 1,
        _ => 0,
    };
    format!("{x:.digits$} {unit}")
}
