//! A background worker: jobs stand in a table, and each is done once, by whichever thread of whichever process is free.
//!
//! ```sh
//! DATABASE_URL=postgres://user@host/database cargo run --example job_worker
//! psql "$DATABASE_URL" -c "INSERT INTO jobs (recipient) VALUES ('ada'), ('grace')"   # in a second terminal
//! ```
//!
//! A job is locked, done and marked as done in one transaction, with `SKIP LOCKED`: a worker that is killed leaves its
//! job to the others. A job that fails, or panics, is marked with its error and not tried again.
//!
//! Ctrl-C and SIGTERM end it: the jobs that have begun are done, then the pool closes.

use millpond::Workers;
use millpond::postgres::{Pool, PostgresManager, ServerGuards, Transaction};
use postgres::NoTls;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use std::{env, thread};

type Failure = Box<dyn Error + Send + Sync>;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS jobs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, recipient text NOT NULL,
                                     done_at timestamptz, error text);
    CREATE INDEX IF NOT EXISTS jobs_to_do ON jobs (id) WHERE done_at IS NULL;
    CREATE TABLE IF NOT EXISTS letters (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, letter text NOT NULL)";
const NEXT: &str = "SELECT id, recipient FROM jobs WHERE done_at IS NULL ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED";

const WORKERS: usize = 4;
/// How long a worker waits for the database, and the start as well.
const WAIT: Duration = Duration::from_secs(5);
/// How long a worker that found nothing to do, or could not look, waits before it looks again.
const PAUSE: Duration = Duration::from_millis(500);

static OVER: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::var("DATABASE_URL").or(Err("which database? DATABASE_URL names none"))?;
    // A statement that still hangs when the program has ended is ended by the server, which looks this often.
    let check = Some(Duration::from_secs(2));
    let guards = ServerGuards { client_connection_check_interval: check, ..ServerGuards::default() };
    let manager = PostgresManager::parse(&address, NoTls)?.server_guards(guards);
    let pool = manager.builder().name("jobs").max_size(WORKERS as u32).connection_timeout(WAIT).open()?;
    let guard = pool.guard().grace(Duration::from_secs(20)); // longer than a job takes
    pool.get()?.batch_execute(SCHEMA)?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;

    let mut guard = guard.owning_with(Vec::new(), |workers: &mut Vec<thread::JoinHandle<()>>, deadline| {
        OVER.store(true, SeqCst);
        workers.iter().for_each(|worker| worker.thread().unpark());
        workers.finish(deadline)
    });
    for n in 0..WORKERS {
        let pool = pool.clone();
        guard.push(thread::Builder::new().name(format!("worker-{n}")).spawn(move || work(&pool))?);
    }
    println!("working");
    signals.forever().next();

    let report = guard.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("not all is finished".into()) }
}

fn work(pool: &Pool) {
    while !OVER.load(SeqCst) {
        // Whatever panics costs one connection and a pause, and no worker.
        let next =
            catch_unwind(AssertUnwindSafe(|| do_next(pool))).unwrap_or_else(|_| Err("a worker has panicked".into()));
        match next {
            Ok(true) => {}
            Ok(false) => thread::park_timeout(PAUSE),
            Err(e) => {
                eprintln!("{}", millpond::Cause::text(&*e));
                thread::park_timeout(PAUSE);
            }
        }
    }
}

/// Does the next job, if there is one.
fn do_next(pool: &Pool) -> Result<bool, Failure> {
    let mut client = pool.get()?;
    let mut tx = client.begin()?;
    let Some(job) = tx.query_opt_cached(NEXT, &[])? else { return Ok(false) };
    let (id, recipient): (i64, String) = (job.get(0), job.get(1));
    // What a failed job has written is undone; its mark is not, so that it is not done again and again.
    let mut inner = tx.begin()?;
    let error = match catch_unwind(AssertUnwindSafe(|| write_letter(&mut inner, &recipient))) {
        Ok(Ok(())) => inner.commit().map(|()| None)?,
        Ok(Err(e)) => inner.rollback().map(|()| Some(millpond::Cause::text(&*e).to_string()))?,
        Err(_) => inner.rollback().map(|()| Some("it panicked".to_owned()))?,
    };
    tx.execute_cached("UPDATE jobs SET done_at = clock_timestamp(), error = $2 WHERE id = $1", &[&id, &error])?;
    tx.commit()?;
    println!("job {id}: {}", error.as_deref().unwrap_or("done"));
    Ok(true)
}

fn write_letter(tx: &mut Transaction<'_>, recipient: &str) -> Result<(), Failure> {
    assert!(!recipient.is_empty(), "a letter to nobody");
    let letter = format!("Dear {recipient}, the pond is full.");
    tx.execute_cached("INSERT INTO letters (letter) VALUES ($1)", &[&letter])?;
    Ok(())
}
