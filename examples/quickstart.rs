//! `cargo run --example quickstart -- postgres://user@host/database`, or the address in `DATABASE_URL`.

use millpond::Pool;
use postgres::NoTls;
use r2d2_postgres::PostgresConnectionManager;
use std::process::ExitCode;
use std::{env, error::Error, thread, time::Duration};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}"); // its text; a `main` that returns a `Result` prints its `Debug`
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let manager = PostgresConnectionManager::new(address.parse()?, NoTls);
    let pool = Pool::builder().max_size(4).max_idle(Duration::from_secs(60));
    let pool = pool.connection_timeout(Duration::from_secs(5)).build(manager)?;
    let _guard = pool.guard(); // closes the pool when `main` returns or panics

    thread::scope(|threads| {
        for n in 1..=8 {
            let pool = pool.clone();
            threads.spawn(move || {
                let mut client = pool.get().expect("a connection"); // waits until one is free
                let row = client.query_one("SELECT $1::int4 * $1", &[&n]).expect("an answer");
                println!("{n} * {n} = {}", row.get::<_, i32>(0));
            }); // here the connection is returned
        }
    });
    println!("{}", pool.stats());
    Ok(())
}
