//! Scoped threads: they borrow the pool instead of cloning it, and have ended before the guard closes it.
//!
//! ```sh
//! cargo run --example scoped_threads -- postgres://user@host/database   # or the address in DATABASE_URL
//! ```
//!
//! Eight threads share three connections, and each has one only while it asks. If one of them fails or panics, the
//! others end what they do, `main` passes it on, and the guard closes the pool all the same.

use millpond::postgres::{Pool, builder};
use std::error::Error;
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, thread};

type Failure = Box<dyn Error + Send + Sync>;

/// How long a thread waits for a connection, and the start for the database.
const WAIT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let pool = builder(&address)?.name("scoped").max_size(3).connection_timeout(WAIT).open()?;
    let guard = pool.guard();

    let sums: Result<Vec<i64>, Failure> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|part| {
                let pool = &pool;
                scope.spawn(move || sum(pool, part * 1000 + 1, (part + 1) * 1000))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    println!("1 + 2 + ... + 8000 = {}", sums?.iter().sum::<i64>());

    let report = guard.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("the pool is not wholly closed".into()) }
}

fn sum(pool: &Pool, from: i64, to: i64) -> Result<i64, Failure> {
    let mut client = pool.get()?; // waits until one of the three is free
    let row =
        client.query_one_cached("SELECT sum(n)::int8 FROM generate_series($1::int8, $2::int8) n", &[&from, &to])?;
    Ok(row.get(0))
}
