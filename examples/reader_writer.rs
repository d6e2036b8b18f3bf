//! A pool for the primary and one for its standbys: writes go to the one, reads to the others, and a reader sees what it
//! has written itself.
//!
//! ```sh
//! cargo run --example reader_writer -- 'host=db1,db2 user=app dbname=shop'   # or the address in DATABASE_URL
//! ```
//!
//! The address names all hosts. Which of them takes writes the pools find out by themselves: after a failover too.
//!
//! A standby is behind by some milliseconds. So a write says up to where in the primary's log it stands, and whoever
//! reads after it waits for the standby to get there, for a moment; if it does not, or if there is no standby, the primary
//! answers.

use millpond::postgres::{Pool, PostgresManager};
use postgres::config::TargetSessionAttrs;
use postgres::types::PgLsn;
use postgres::{Config, NoTls};
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, thread};

type Failure = Box<dyn Error + Send + Sync>;

const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS entries (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, entry text NOT NULL)";
const READ: &str = "SELECT entry FROM entries WHERE id = $1";
/// How long a reader waits for a standby to catch up.
const PATIENCE: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

struct Pools {
    writer: Pool,
    reader: Pool,
}

fn run() -> Result<(), Failure> {
    let address = env::args().nth(1).or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let manager = |attrs| -> Result<_, Failure> {
        let mut config: Config = address.parse()?;
        Ok(PostgresManager::new(config.target_session_attrs(attrs).clone(), NoTls))
    };
    let writer = manager(TargetSessionAttrs::ReadWrite)?.builder().name("writer").max_size(4).open()?;
    let writer_guard = writer.guard();
    // Without a check that a standby is there: the program works without one as well.
    let reader = millpond::Pool::builder().name("reader").max_size(8).connection_timeout(Duration::from_secs(1));
    let reader = reader.build_unchecked(manager(TargetSessionAttrs::ReadOnly)?);
    let reader_guard = reader.guard();
    let pools = Pools { writer, reader };
    pools.writer.get()?.batch_execute(SCHEMA)?;

    let mut from_standby = 0;
    for n in 1..=20 {
        let (id, at) = pools.write(&format!("entry {n}"))?;
        let (entry, standby) = pools.read(id, at)?;
        if entry != format!("entry {n}") {
            return Err(format!("entry {n} is '{entry}'").into());
        }
        from_standby += u32::from(standby);
    }
    println!("20 written, and 20 read: {from_standby} of them from a standby");

    let closed = [reader_guard.close(), writer_guard.close()];
    closed.iter().for_each(|report| println!("{report}"));
    if closed.iter().all(|report| report.is_complete()) { Ok(()) } else { Err("a pool is not wholly closed".into()) }
}

impl Pools {
    /// Writes an entry. Returns its number, and up to where a standby has to be to show it.
    fn write(&self, entry: &str) -> Result<(i64, PgLsn), Failure> {
        let mut client = self.writer.get()?;
        let id = client.query_one_cached("INSERT INTO entries (entry) VALUES ($1) RETURNING id", &[&entry])?.get(0);
        Ok((id, client.query_one_cached("SELECT pg_current_wal_lsn()", &[])?.get(0)))
    }

    /// Reads an entry that was written by then, and says whether it comes from a standby.
    fn read(&self, id: i64, at: PgLsn) -> Result<(String, bool), Failure> {
        // Without a connection to a standby, or one that breaks, as with one that is behind.
        if let Ok(Some(entry)) = self.read_from_standby(id, at) {
            return Ok((entry, true));
        }
        Ok((self.writer.get()?.query_one_cached(READ, &[&id])?.get(0), false))
    }

    /// `None`: there is no standby, or none has got that far.
    fn read_from_standby(&self, id: i64, at: PgLsn) -> Result<Option<String>, Failure> {
        if !self.reader.health().serves() {
            return Ok(None);
        }
        let mut client = self.reader.get()?;
        if !caught_up(&mut client, at)? {
            return Ok(None);
        }
        Ok(Some(client.query_one_cached(READ, &[&id])?.get(0)))
    }
}

fn caught_up(standby: &mut millpond::postgres::Connection, at: PgLsn) -> Result<bool, postgres::Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let question = "SELECT coalesce(pg_last_wal_replay_lsn() >= $1, false)";
        if standby.query_one_cached(question, &[&at])?.get(0) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(2));
    }
}
