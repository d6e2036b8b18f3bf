//! The `threadpool` crate: what stands in its queue when `main` ends is done before the pool closes.
//!
//! ```sh
//! cargo run --example thread_pool -- postgres://user@host/database   # or the address in DATABASE_URL
//! ```
//!
//! The drop of a `threadpool::ThreadPool` waits for nothing, and its `join` waits for ever. So `join` runs on a thread
//! of its own, and the guard waits for that one, until its deadline.
//!
//! A job that panics costs its connection and nothing else: `threadpool` replaces the thread, the pool the connection.

use millpond::Workers;
use millpond::postgres::{Pool, builder};
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, thread};
use threadpool::ThreadPool;

type Failure = Box<dyn Error + Send + Sync>;

/// How long a thread waits for a connection, and the start for the database.
const WAIT: Duration = Duration::from_secs(5);

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS squares (n bigint PRIMARY KEY, square bigint NOT NULL)";

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let pool = builder(&address)?.name("threadpool").max_size(2).connection_timeout(WAIT).open()?;
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;

    let workers = guard.owning_with(ThreadPool::new(4), |workers, deadline| {
        let workers = workers.clone();
        thread::spawn(move || workers.join()).finish(deadline)
    });
    for n in 1..=100 {
        let pool = pool.clone();
        workers.execute(move || {
            if let Err(e) = keep(&pool, n) {
                eprintln!("the square of {n}: {}", millpond::Cause::text(&*e));
            }
        });
    }

    let report = workers.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("the pool is not wholly closed".into()) }
}

fn keep(pool: &Pool, n: i64) -> Result<(), Failure> {
    let sql = "INSERT INTO squares VALUES ($1::bigint, $1 * $1) ON CONFLICT (n) DO UPDATE SET square = excluded.square \
               RETURNING square";
    let square: i64 = pool.get()?.query_one_cached(sql, &[&n])?.get(0);
    if square != n * n { Err(format!("not {square}").into()) } else { Ok(()) }
}
