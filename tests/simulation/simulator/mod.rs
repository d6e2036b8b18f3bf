//! The simulator: one pool's life, from one seed, on virtual time, on one thread.
//!
//! What runs is the pool itself: ledger, reaper, executor, waiters, `close`. Its threads, its users, the one who makes
//! trouble and the server are tasks of one [`Order`]. A [`Plan`] says what each of them does. [`run`] carries a plan
//! out, and tells which [promise](promises) was broken, if one was; [`shorten`] leaves out of such a plan what the
//! failure does not need.

#![allow(dead_code, unreachable_pub, reason = "compiled into each test and example, none of which uses all of it")]

pub mod order;
pub mod plan;
pub mod promises;
pub mod server;
pub mod users;

use millpond::model::{self, thread, time};
use order::Order;
use plan::Plan;
use server::Server;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Its name, such as "P3", or "panic".
    pub promise: &'static str,
    pub text: String,
    /// When, since the beginning of the execution.
    pub at: Duration,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:?}: {}", self.promise, self.at, self.text)
    }
}

/// What one execution came to.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// How much time passed in it.
    pub time: Duration,
    /// How often the scheduler chose.
    pub choices: u64,
    /// Of the choices: the same for the same plan.
    pub hash: u64,
    pub sometimes: BTreeMap<&'static str, u64>,
    pub broken: Option<Broken>,
    /// The last happenings, where they were asked for.
    pub trace: Vec<String>,
}

#[derive(Default)]
struct Notes {
    broken: Option<Broken>,
    trace: Option<Vec<String>>,
    choices: u64,
    hash: u64,
}

thread_local! {
    static NOTES: RefCell<Notes> = RefCell::default();
}

/// A promise is broken. The first one counts; the execution ends at the scheduler's next choice.
pub fn broken(promise: &'static str, text: impl Into<String>) {
    let at = model::world(|world| world.elapsed());
    NOTES.with_borrow_mut(|notes| {
        notes.broken.get_or_insert(Broken { promise, text: text.into(), at });
    });
}

pub fn is_broken() -> bool {
    NOTES.with_borrow(|notes| notes.broken.is_some())
}

/// Notes a happening, where a trace was asked for.
pub fn note(text: impl FnOnce() -> String) {
    let wanted = NOTES.with_borrow(|notes| notes.trace.is_some());
    if wanted {
        let text = format!("{:>18.9} {}", model::world(|world| world.elapsed()).as_secs_f64(), text());
        NOTES.with_borrow_mut(|notes| notes.trace.get_or_insert_default().push(text));
    }
}

/// Counts a choice of the scheduler's.
fn count(choice: usize) {
    NOTES.with_borrow_mut(|notes| {
        notes.choices += 1;
        notes.hash = (notes.hash.rotate_left(5) ^ choice as u64).wrapping_mul(0x517c_c1b7_2722_0a95);
    });
}

/// Carries out a plan.
pub fn run(plan: &Plan, trace: bool) -> Account {
    NOTES.set(Notes { trace: trace.then(Vec::new), ..Notes::default() });
    model::begin(plan.seed);
    model::world(|world| world.tick = plan.tick);
    let order = Order::new(plan.seed, plan.stay, plan.haste);
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    config.failure_persistence = shuttle::FailurePersistence::None;
    config.max_steps = shuttle::MaxSteps::FailAfter(10_000_000);
    config.silence_warnings = true;
    let carried_out = plan.clone();
    let runner = shuttle::Runner::new(order, config);
    let result = catch_unwind(AssertUnwindSafe(|| runner.run(move || live(&carried_out))));
    if let Err(panic) = result {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        broken("panic", text.unwrap_or_else(|| "without a message".into()));
    }
    let notes = NOTES.take();
    let world = model::end();
    Account {
        time: world.as_ref().map(|world| world.elapsed()).unwrap_or_default(),
        choices: notes.choices,
        hash: notes.hash ^ world.as_ref().map_or(0, |world| world.elapsed().as_nanos() as u64),
        sometimes: world.map(|world| world.sometimes).unwrap_or_default(),
        broken: notes.broken,
        trace: notes.trace.unwrap_or_default(),
    }
}

/// One execution: the pool's life, from `build` to the end of its last thread.
fn live(plan: &Plan) {
    let clock = shuttle::thread::spawn(time::run_clock);
    let server = Server::new(plan);
    let ends = users::live(plan, &server);
    if !is_broken() {
        ends.check(plan, &server);
    }
    // Dropped without the world: the last handle of the pool may be in it.
    let at_rest = model::world(|world| world.at_rest.take());
    drop(at_rest);
    // A thread that lingers leaves after 5 seconds.
    let patience = time::now() + Duration::from_secs(6);
    while model::world(|world| world.alive) > 0 {
        if time::now() > patience {
            let left = model::world(|world| world.alive);
            broken("P4", format!("{left} threads are left 6 s after the pool's end"));
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    if Arc::strong_count(&server) > 1 {
        broken("P4", format!("the manager is still there: {} owners", Arc::strong_count(&server) - 1));
    }
    time::over();
    let _ = clock.join();
}

/// The plan without whatever its failure does not need: fewer runs than `tries` are made. The promise that is broken
/// stays the same.
pub fn shorten(plan: &Plan, promise: &'static str, mut tries: usize) -> Plan {
    let mut best = plan.clone();
    let mut chunk = best.steps.len().div_ceil(2).max(1);
    loop {
        let (mut from, mut cut) = (0, false);
        while from < best.steps.len() && tries > 0 {
            let mut shorter = best.clone();
            shorter.steps.drain(from..(from + chunk).min(best.steps.len()));
            tries -= 1;
            if run(&shorter, false).broken.is_some_and(|broken| broken.promise == promise) {
                (best, cut) = (shorter, true);
            } else {
                from += chunk;
            }
        }
        if tries == 0 || (chunk == 1 && !cut) {
            return best;
        }
        chunk = chunk.div_ceil(2).max(1);
    }
}

/// The commit of the sources, to print beside a seed.
pub fn commit() -> String {
    let git = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    git.ok().and_then(|out| String::from_utf8(out.stdout).ok()).map_or("unknown".into(), |text| text.trim().to_owned())
}

/// Everything that somebody needs who is to mend it.
pub fn report(plan: &Plan, broken: &Broken) -> String {
    let short = shorten(plan, broken.promise, 400);
    let again = run(&short, true);
    let kept: Vec<String> = short.steps.iter().map(|step| step.number.to_string()).collect();
    let tail = again.trace.len().saturating_sub(120);
    format!(
        "seed {}, commit {}: {broken}\n\nshortened to {} of {} steps, it still fails: {}\n{short}\n\nthe end of it:\n{}\n\nto replay \
         it:\nMILLPOND_SIMULATION_SEED={} MILLPOND_SIMULATION_STEPS={} cargo test --manifest-path tests/simulation/Cargo.toml replay -- \
         --nocapture\n",
        plan.seed,
        commit(),
        short.steps.len(),
        plan.steps.len(),
        again.broken.map_or("no longer".into(), |broken| broken.to_string()),
        again.trace[tail..].join("\n"),
        plan.seed,
        if kept.is_empty() { "none".into() } else { kept.join(",") },
    )
}

/// What many executions came to.
#[derive(Default)]
pub struct Sum {
    pub runs: u64,
    pub time: Duration,
    pub choices: u64,
    pub sometimes: BTreeMap<&'static str, u64>,
}

impl Sum {
    pub fn add(&mut self, account: &Account) {
        self.runs += 1;
        self.time += account.time;
        self.choices += account.choices;
        for (what, times) in &account.sometimes {
            *self.sometimes.entry(what).or_default() += times;
        }
    }
}

impl Sum {
    /// The time that passed in all lives, in years.
    pub fn years(&self) -> f64 {
        self.time.as_secs_f64() / (365.25 * 86_400.0)
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let years = self.years();
        writeln!(f, "{} lives, {years:.2} pool-years, {} choices of the scheduler", self.runs, self.choices)?;
        for (what, times) in &self.sometimes {
            writeln!(f, "  {times:>10} {what}")?;
        }
        Ok(())
    }
}
