//! Rayon: jobs that nobody waits for are finished before the pool closes.
//!
//! ```sh
//! cargo run --example rayon_pool -- postgres://user@host/database   # or the address in DATABASE_URL
//! ```
//!
//! The drop of a `rayon::ThreadPool` tells its threads to end when no job is left, and does not wait for them. Rayon
//! lets its user start the threads; so the guard gets their handles, drops the rayon pool and waits for the threads.
//!
//! Without a handler for them, a panic in a job that nobody waits for ends the whole process, and no guard is dropped.
//!
//! A connection is checked out within one job, and returned before the job waits for others (`join`, `scope`,
//! `par_iter`): a thread of rayon's that waits takes up another job meanwhile, which may want a connection as well.

use millpond::postgres::{Pool, builder};
use rayon::prelude::*;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, thread};

type Failure = Box<dyn Error + Send + Sync>;

/// How long a thread waits for a connection, and the start for the database.
const WAIT: Duration = Duration::from_secs(5);

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS walks (start bigint PRIMARY KEY, steps bigint NOT NULL)";

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let pool = builder(&address)?.name("rayon").max_size(2).connection_timeout(WAIT).open()?;
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;

    let mut threads = Vec::new();
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(4).panic_handler(|_| eprintln!("a job has panicked"));
    let rayon = rayon.spawn_handler(|thread| {
        threads.push(thread::Builder::new().name(format!("rayon-{}", thread.index())).spawn(|| thread.run())?);
        Ok(())
    });
    let rayon = rayon.build()?;
    let guard = guard.owning_with((Some(rayon), threads), |(rayon, threads), deadline| {
        drop(rayon.take());
        millpond::Workers::finish(threads, deadline)
    });
    let (Some(rayon), _) = &*guard else { unreachable!("the guard takes it when it closes") };

    // In parallel, and waited for: half of them, in one statement each.
    rayon.install(|| (1..=50).into_par_iter().try_for_each(|start| keep(&pool, start)))?;
    // In parallel, and not waited for: the other half.
    for start in 51..=100 {
        let pool = pool.clone();
        rayon.spawn(move || {
            if let Err(e) = keep(&pool, start) {
                eprintln!("the walk from {start}: {}", millpond::Cause::text(&*e));
            }
        });
    }

    let report = guard.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("the pool is not wholly closed".into()) }
}

/// Takes a walk, and only then a connection to keep its length with.
fn keep(pool: &Pool, start: i64) -> Result<(), Failure> {
    let next = |&n: &i64| (n != 1).then(|| if n % 2 == 0 { n / 2 } else { 3 * n + 1 });
    let steps = std::iter::successors(Some(start), next).count() as i64 - 1;
    let sql = "INSERT INTO walks VALUES ($1, $2) ON CONFLICT (start) DO UPDATE SET steps = excluded.steps \
               RETURNING steps";
    let kept: i64 = pool.get()?.query_one_cached(sql, &[&start, &steps])?.get(0);
    if kept != steps { Err(format!("not {kept}").into()) } else { Ok(()) }
}
