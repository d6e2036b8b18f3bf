//! A database to test on, and what its server sees of us.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::types::Type;
use postgres::{Client, NoTls};

use super::{Server, Watch, wait};

/// How long a question to the server is repeated: it may be starting again just now.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running database, seen from outside of the pool under test.
///
/// A pool's connections are known to the server by the application name that its test chose. Give each test its own,
/// because they run side by side.
pub struct Database {
    /// A URL or a list of `key=value`, without an application name.
    address: String,
    /// Stays connected between questions, and is replaced when the server went away in between.
    watcher: Mutex<Option<Client>>,
}

/// One connection, as `pg_stat_activity` has it.
#[derive(Clone, Debug)]
pub struct Backend {
    pub pid: i32,
    /// Since the server accepted it, by the server's clock.
    pub age: Duration,
    /// `active`, `idle`, `idle in transaction`, ...
    pub state: String,
    /// Since `state` last changed: how long an idle one has been idle.
    pub since: Duration,
    /// The query that runs, or ran last.
    pub query: String,
}

impl Database {
    pub(super) fn at(address: String) -> Database {
        Database { address, watcher: Mutex::new(None) }
    }

    /// The database named in `DATABASE_URL`, or [`Server::shared`]: for tests that never stop the server.
    pub fn get() -> &'static Database {
        static GIVEN: std::sync::OnceLock<Option<Database>> = std::sync::OnceLock::new();
        let given = GIVEN.get_or_init(|| {
            let url = std::env::var("DATABASE_URL").ok().filter(|url| !url.is_empty())?;
            Some(Database::at(url))
        });
        match given {
            Some(database) => database,
            None => Server::shared(),
        }
    }

    /// How to connect under the name of `app`, for whatever parses a connection string.
    pub fn conninfo(&self, app: &str) -> String {
        with_name(&self.address, app)
    }

    /// How to connect under the name of `app`.
    pub fn config(&self, app: &str) -> postgres::Config {
        self.conninfo(app).parse().unwrap_or_else(|e| panic!("`{}` is no address of a database: {e}", self.address))
    }

    /// A client of the test's own, which the server knows as `observer`.
    pub fn connect(&self) -> Client {
        self.config("observer").connect(NoTls).unwrap_or_else(|e| panic!("cannot connect to {}: {e:?}", self.address))
    }

    /// The server's version, such as 15, for what differs between versions.
    pub fn version(&self) -> u32 {
        let number: String = self.connect().query_one("SHOW server_version_num", &[]).expect("a version").get(0);
        number.parse::<u32>().expect("a number") / 10_000
    }

    /// The connections that the server has under this name, the oldest first.
    pub fn backends(&self, app: &str) -> Vec<Backend> {
        self.ask(|client| look(client, app))
    }

    /// Watches the connections under this name, on a connection of its own, until [`Watch::end`].
    pub fn watch(&self, app: &str) -> Watch {
        Watch::begin(self.config("watch"), app)
    }

    /// How many connections the server has under this name.
    pub fn count(&self, app: &str) -> i64 {
        let rows = self.ask(|client| {
            client.query_typed(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND backend_type = 'client backend'",
                &[(&app, Type::TEXT)],
            )
        });
        rows[0].get(0)
    }

    /// Waits until the server has `n` connections under this name, and returns the last count seen, so that
    /// `assert_eq!(server.wait_for("app", 0, deadline), 0)` says how many there were.
    #[must_use = "the count may not be the one waited for"]
    pub fn wait_for(&self, app: &str, n: i64, deadline: Instant) -> i64 {
        let mut seen = 0;
        let _ = wait::wait_until(deadline, || {
            seen = self.count(app);
            seen == n
        });
        seen
    }

    /// Has the server end every connection under this name, as an administrator would. Returns how many; they may
    /// take a moment to go.
    pub fn terminate(&self, app: &str) -> usize {
        let rows = self.ask(|client| {
            client.query_typed(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE application_name = $1 AND backend_type = 'client backend'",
                &[(&app, Type::TEXT)],
            )
        });
        rows.iter().filter(|row| row.get(0)).count()
    }

    /// Puts a question to the server, on a new connection if the old one died with a server that was restarted.
    fn ask<T>(&self, mut question: impl FnMut(&mut Client) -> Result<T, postgres::Error>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut watcher = self.watcher.lock();
        loop {
            let answer = match &mut *watcher {
                Some(client) => question(client),
                None => self
                    .config("watcher")
                    .connect_timeout(PATIENCE)
                    .connect(NoTls)
                    .and_then(|client| question(watcher.insert(client))),
            };
            match answer {
                Ok(answer) => return answer,
                Err(e) => {
                    *watcher = None;
                    assert!(Instant::now() < deadline, "the server at {} does not answer: {e:?}", self.address);
                    std::thread::sleep(wait::ms(10));
                }
            }
        }
    }
}

/// The connections that the server has under this name, the oldest first.
pub(super) fn look(client: &mut Client, app: &str) -> Result<Vec<Backend>, postgres::Error> {
    let rows = client.query_typed(
        "SELECT pid, coalesce(state, ''), coalesce(query, ''), \
                extract(epoch FROM clock_timestamp() - backend_start)::float8, \
                extract(epoch FROM clock_timestamp() - coalesce(state_change, backend_start))::float8 \
         FROM pg_stat_activity WHERE application_name = $1 AND backend_type = 'client backend' \
         ORDER BY backend_start",
        &[(&app, Type::TEXT)],
    )?;
    let backend = |row: &postgres::Row| Backend {
        pid: row.get(0),
        state: row.get(1),
        query: row.get(2),
        // The server's clock may step back.
        age: Duration::from_secs_f64(row.get::<_, f64>(3).max(0.0)),
        since: Duration::from_secs_f64(row.get::<_, f64>(4).max(0.0)),
    };
    Ok(rows.iter().map(backend).collect())
}

/// Adds an application name to an address, be it a URL or a list of `key=value`.
pub(super) fn with_name(address: &str, app: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    // A longer one is cut by the server, and then found by nobody.
    assert!((1..64).contains(&app.len()) && app.chars().all(plain), "`{app}` is no application name for a test");
    match address.contains("://") {
        true if address.contains('?') => format!("{address}&application_name={app}"),
        true => format!("{address}?application_name={app}"),
        false => format!("{address} application_name={app}"),
    }
}
