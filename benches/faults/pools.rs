//! The pools that are compared.

use super::TIMEOUT;
use super::users::{Failure, Habit, Party, Program, Stage, Threads, Use};
use millpond::Validate;
use millpond::postgres::PostgresManager;
use postgres::NoTls;
use r2d2_postgres::PostgresConnectionManager;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Each as it comes, but for its size and how long a checkout may wait.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Rival {
    /// With its own manager.
    Millpond,
    /// Checks each connection before it is handed out, as r2d2 does by default.
    MillpondChecking,
    /// With the stock manager.
    R2d2,
    Psycopg,
    /// As [`MillpondChecking`](Rival::MillpondChecking).
    PsycopgChecking,
}

impl Rival {
    pub(crate) const ALL: [Rival; 5] =
        [Rival::Millpond, Rival::MillpondChecking, Rival::R2d2, Rival::Psycopg, Rival::PsycopgChecking];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Rival::Millpond => "millpond",
            Rival::MillpondChecking => "millpond, Always",
            Rival::R2d2 => "r2d2",
            Rival::Psycopg => "psycopg_pool",
            Rival::PsycopgChecking => "psycopg_pool, check",
        }
    }

    /// Returns when its pool stands.
    pub(crate) fn start(self, conninfo: &str, habit: &Habit, python: Option<&Python>) -> Box<dyn Party> {
        let query = habit.query;
        match self {
            Rival::Millpond | Rival::MillpondChecking => {
                let manager = PostgresManager::parse(conninfo, NoTls).expect("a connection string");
                let builder = manager.builder().max_size(habit.size).connection_timeout(habit.timeout);
                let is_checking = self == Rival::MillpondChecking;
                let builder = if is_checking { builder.validate(Validate::Always) } else { builder };
                let pool = builder.open().expect("a pool");
                let closed = pool.clone();
                let call: Use = Box::new(move || {
                    let mut client = pool.get().map_err(|e| Failure::at(Stage::Checkout)(&e))?;
                    client.simple_query(query).map(drop).map_err(|e| Failure::at(Stage::Query)(&e))
                });
                Box::new(Threads::new(habit, call, move || drop(closed.close(TIMEOUT))))
            }
            Rival::R2d2 => {
                let manager = PostgresConnectionManager::new(conninfo.parse().expect("a connection string"), NoTls);
                let builder = r2d2::Pool::builder().max_size(habit.size).connection_timeout(habit.timeout);
                let pool = builder.build(manager).expect("a pool");
                let closed = pool.clone();
                let call: Use = Box::new(move || {
                    let mut client = pool.get().map_err(|e| Failure::at(Stage::Checkout)(&e))?;
                    client.simple_query(query).map(drop).map_err(|e| Failure::at(Stage::Query)(&e))
                });
                // It has no close; it ends with its last user.
                Box::new(Threads::new(habit, call, move || drop(closed)))
            }
            Rival::Psycopg | Rival::PsycopgChecking => {
                let seconds = |d: Duration| d.as_secs_f64().to_string();
                let (users, size) = (habit.users.to_string(), habit.size.to_string());
                let mut command = python.expect("a Python").command();
                command
                    .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/faults.py"))
                    .args([conninfo, &users, &size, &seconds(habit.timeout), &seconds(habit.pause)])
                    .args([&seconds(habit.stagger), query])
                    .arg(if self == Rival::PsycopgChecking { "check" } else { "-" });
                Box::new(Program::start(command, habit.users))
            }
        }
    }
}

/// A Python that has psycopg's pool.
pub(crate) struct Python {
    program: String,
    /// The folder with psycopg's pool, if that is not among the Python's own packages.
    packages: Option<PathBuf>,
    /// Of psycopg's pool, of psycopg and of Python itself.
    pub(crate) versions: String,
}

impl Python {
    /// Finds one; or makes one; or says why there is none.
    pub(crate) fn find() -> Result<Python, String> {
        let program = env::var("PYTHON").unwrap_or_else(|_| "python3".into());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("psycopg");
        let with = |packages: Option<&PathBuf>| {
            let python = Python { program: program.clone(), packages: packages.cloned(), versions: String::new() };
            let ask = "import psycopg, psycopg_pool, sys; print(f'psycopg_pool {psycopg_pool.__version__}, psycopg \
                       {psycopg.__version__} ({psycopg.pq.__impl__}), Python {sys.version.split()[0]}')";
            let output = python.command().args(["-c", ask]).stderr(Stdio::null()).output().ok()?;
            let versions = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            output.status.success().then_some(Python { versions, ..python })
        };
        if let Some(python) = with(None).or_else(|| with(Some(&folder))) {
            return Ok(python);
        }
        println!("installing psycopg_pool in {}", folder.display());
        let mut pip = Command::new(&program);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]).arg(&folder);
        let output =
            pip.args(["psycopg[binary]", "psycopg_pool"]).output().map_err(|e| format!("no {program}: {e}"))?;
        let said = String::from_utf8_lossy(&output.stderr).trim().lines().last().unwrap_or_default().to_owned();
        with(Some(&folder)).ok_or(format!("{program} has no psycopg_pool, and pip cannot install it: {said}"))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(packages) = &self.packages {
            command.env("PYTHONPATH", packages);
        }
        command
    }
}
