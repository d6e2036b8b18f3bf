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

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS levels (pond text PRIMARY KEY, level int NOT NULL)";
const WRITE: &str = "INSERT INTO levels VALUES ($1, $2) ON CONFLICT (pond) DO UPDATE SET level = excluded.level";
const READ: &str = "SELECT level FROM levels WHERE pond = $1";
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
        // Not in the error's own words: they may be those of a password.
        let mut config: Config = address.parse().map_err(|_| "that is no address of a database")?;
        Ok(PostgresManager::new(config.target_session_attrs(attrs).clone(), NoTls))
    };
    let writer = manager(TargetSessionAttrs::ReadWrite)?.builder().name("writer").max_size(4);
    let writer = writer.connection_timeout(Duration::from_secs(5)).open()?;
    let writer_guard = writer.guard();
    // Without a check that a standby is there: the program works without one as well.
    let reader = millpond::Pool::builder().name("reader").max_size(8).connection_timeout(Duration::from_secs(1));
    let reader = reader.build_unchecked(manager(TargetSessionAttrs::ReadOnly)?);
    let reader_guard = reader.guard();
    let pools = Pools { writer, reader };
    pools.writer.get()?.batch_execute(SCHEMA)?;

    let mut from_standby = 0;
    for level in 1..=20 {
        let at = pools.write("upper", level)?;
        let (read, standby) = pools.read("upper", at)?;
        if read != level {
            return Err(format!("wrote {level}, and read {read}").into());
        }
        from_standby += u32::from(standby);
    }
    println!("20 written, and 20 read: {from_standby} of them from a standby");

    let closed = [reader_guard.close(), writer_guard.close()];
    closed.iter().for_each(|report| println!("{report}"));
    if closed.iter().all(|report| report.is_complete()) { Ok(()) } else { Err("a pool is not wholly closed".into()) }
}

impl Pools {
    /// Writes the level of a pond, and returns up to where a standby has to be to show it.
    fn write(&self, pond: &str, level: i32) -> Result<PgLsn, Failure> {
        let mut client = self.writer.get()?;
        client.execute_cached(WRITE, &[&pond, &level])?;
        Ok(client.query_one_cached("SELECT pg_current_wal_lsn()", &[])?.get(0))
    }

    /// Reads what was written by then, and says whether it comes from a standby.
    fn read(&self, pond: &str, at: PgLsn) -> Result<(i32, bool), Failure> {
        match self.read_from_standby(pond, at) {
            Ok(Some(level)) => return Ok((level, true)),
            Ok(None) => {}
            Err(e) => eprintln!("the primary answers instead: {}", millpond::Cause::text(&*e)),
        }
        Ok((self.writer.get()?.query_one_cached(READ, &[&pond])?.get(0), false))
    }

    /// `None`: there is no standby, or none has got that far.
    fn read_from_standby(&self, pond: &str, at: PgLsn) -> Result<Option<i32>, Failure> {
        if !self.reader.health().serves() {
            return Ok(None);
        }
        let mut client = self.reader.get()?;
        if !caught_up(&mut client, at)? {
            return Ok(None);
        }
        Ok(Some(client.query_one_cached(READ, &[&pond])?.get(0)))
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
