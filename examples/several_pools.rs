//! Several pools in one program: reports may take as long as they like, and no order waits for them.
//!
//! ```sh
//! cargo run --example several_pools -- postgres://user@host/database   # or the address in DATABASE_URL
//! ```
//!
//! With one pool for both, three reports would have all its connections, and every order would wait for one of them.
//! With two pools each kind of work has its own bound, its own patience and its own line in the log. Their sum is what
//! the server has to bear: see `millpond::postgres::choosing_the_numbers`.
//!
//! What is declared last is dropped first. So the guard that owns the threads, which use both pools, comes last.

use millpond::postgres::{Pool, builder};
use std::error::Error;
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, io};

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    // For work that people wait for: some connections, and little patience.
    let orders = builder(&address)?.name("orders").max_size(3).connection_timeout(Duration::from_secs(2)).open()?;
    let orders_guard = orders.guard();
    // For work that nobody waits for: one at a time, and what is idle for a second is closed.
    let reports = builder(&address)?.name("reports").max_size(1).max_idle(Duration::from_secs(1)).open()?;
    let reports_guard = reports.guard();

    let (done, results) = channel();
    let mut threads = Vec::new();
    for n in 0..3 {
        let reports = reports.clone();
        threads.push(start(format!("report-{n}"), &done, move || report(&reports))?);
    }
    for n in 0..6 {
        let orders = orders.clone();
        threads.push(start(format!("clerk-{n}"), &done, move || (0..50).try_for_each(|_| order(&orders)))?);
    }
    drop(done);
    // If `main` returns early from here on, the guard still lets the threads finish what they do.
    let guard = reports_guard.owning(threads);

    let mut finished = 0;
    for (name, result) in results {
        result.map_err(|e| format!("{name}: {}", millpond::Cause::text(&*e)))?;
        println!("{name} has finished");
        finished += 1;
    }
    if finished < guard.len() {
        return Err("a thread has panicked".into());
    }
    println!("{}\n{}", orders.stats(), reports.stats());

    let closed = [guard.close(), orders_guard.close()];
    closed.iter().for_each(|report| println!("{report}"));
    if closed.iter().all(|report| report.is_complete()) { Ok(()) } else { Err("a pool is not wholly closed".into()) }
}

/// Starts a thread that says what came of its work.
fn start(
    name: String,
    done: &Sender<(String, Result<(), Failure>)>,
    work: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let done = done.clone();
    thread::Builder::new().name(name.clone()).spawn(move || drop(done.send((name, work()))))
}

fn order(pool: &Pool) -> Result<(), Failure> {
    pool.get()?.query_one_cached("SELECT 1", &[])?;
    Ok(())
}

fn report(pool: &Pool) -> Result<(), Failure> {
    pool.get()?.batch_execute("SELECT pg_sleep(0.3)")?;
    Ok(())
}
