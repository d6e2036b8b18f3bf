//! A private PgBouncer in front of a server, made for one test and gone with it.
//!
//! As with a [`Server`], a watchdog reads from a pipe that only this process holds, so the bouncer goes however this
//! process ends.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::{Client, NoTls, SimpleQueryMessage, SimpleQueryRow};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::Server;
use super::database::with_name;
use super::programs::{self, User};
use super::server::{address, listen};
use super::wait::wait_until;

/// Far longer than a start or a stop takes anywhere.
const PATIENCE: Duration = Duration::from_secs(30);

/// When a server connection is given to the next client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    Session,
    Transaction,
}

/// Told the bouncer's pid, one per line; the last one counts, an empty line: none runs.
const WATCHDOG: &str = r#"
    trap '' HUP INT TERM
    while read -r line; do pid=$line; done
    [ -n "$pid" ] && kill -KILL "$pid"
    cd /
    rm -rf "$1"
"#;

/// A PgBouncer on a loopback port and a unix socket, for everybody who says that he is `postgres`, who is also its administrator.
pub struct Bouncer {
    program: PathBuf,
    user: Option<User>,
    port: u16,
    process: Mutex<Option<Child>>,
    watchdog: Mutex<Child>,
    /// Removed by the watchdog; a second time here, in case somebody killed that.
    dir: TempDir,
}

impl Bouncer {
    /// Starts one, with these settings in its configuration, such as `("default_pool_size", "2")`.
    ///
    /// # Panics
    ///
    /// If there is no PgBouncer, or it does not start: with the reason, its own words included.
    pub fn start(server: &Server, mode: PoolMode, settings: &[(&str, &str)]) -> Bouncer {
        Bouncer::reaching(server, "127.0.0.1", mode, settings)
    }

    /// Starts one that reaches the server through its unix socket, as PgBouncer does if no host is named.
    ///
    /// # Panics
    ///
    /// As [`start`](Bouncer::start).
    pub fn start_on_unix(server: &Server, mode: PoolMode, settings: &[(&str, &str)]) -> Bouncer {
        Bouncer::reaching(server, &server.socket_dir().display().to_string(), mode, settings)
    }

    fn reaching(server: &Server, host: &str, mode: PoolMode, settings: &[(&str, &str)]) -> Bouncer {
        let program = find();
        // Like PostgreSQL, it refuses to be run by root.
        let user = User::for_server();
        let parent = user.map_or_else(std::env::temp_dir, |_| PathBuf::from("/tmp"));
        let dir = tempfile::Builder::new().prefix("millpond-").tempdir_in(parent).expect("a folder for the bouncer");
        if let Some(User { uid, gid }) = user {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).expect("a folder for the bouncer's user");
        }
        let watchdog = programs::command("/bin/sh", dir.path(), user)
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the watchdog");

        let mode = if mode == PoolMode::Session { "session" } else { "transaction" };
        let mut config = format!(
            "[databases]\n* = host={host} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nunix_socket_dir = {}\n\
             auth_type = trust\nauth_file = users\nadmin_users = postgres\npool_mode = {mode}\n",
            server.port(),
            dir.path().display()
        );
        for (name, value) in settings {
            config += &format!("{name} = {value}\n");
        }
        fs::write(dir.path().join("users"), "\"postgres\" \"\"\n").expect("a list of users");
        // Made before anything can go wrong, so that its `Drop` cleans up.
        let mut bouncer =
            Bouncer { program, user, port: 0, process: Mutex::new(None), watchdog: Mutex::new(watchdog), dir };
        // Between finding a port free and listening on it somebody else may take it.
        let mut attempts = 5;
        loop {
            bouncer.port = listen().local_addr().expect("a listener's address").port();
            let port = format!("listen_port = {}\n", bouncer.port);
            fs::write(bouncer.dir.path().join("config"), config.clone() + &port).expect("a configuration");
            match bouncer.launch() {
                Ok(()) => return bouncer,
                Err(log) if log.contains("ddress already in use") && attempts > 0 => attempts -= 1,
                Err(log) => panic!("PgBouncer does not start:\n{log}"),
            }
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens, for a proxy in front of it.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// How to connect to the server through it, under the name of `app`.
    pub fn conninfo(&self, app: &str) -> String {
        with_name(&address(self.port), app)
    }

    /// The same through its unix socket.
    pub fn unix_conninfo(&self, app: &str) -> String {
        self.conninfo(app).replace("127.0.0.1", &self.dir.path().display().to_string())
    }

    /// Gives the administrator's command, such as `PAUSE` or `SHOW CLIENTS`, and returns the rows of the answer.
    pub fn admin(&self, command: &str) -> Vec<SimpleQueryRow> {
        let answer = self.console().and_then(|mut console| console.simple_query(command));
        let messages = answer.unwrap_or_else(|e| panic!("`{command}` fails: {e:?}\n{}", self.log()));
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        };
        messages.into_iter().filter_map(row).collect()
    }

    /// Its version, such as (1, 18), for what differs between versions.
    pub fn version(&self) -> (u32, u32) {
        let rows = self.admin("SHOW VERSION");
        let text = rows.first().and_then(|row| row.get(0)).unwrap_or_default();
        let mut numbers = text.trim_start_matches("PgBouncer ").split('.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
            _ => panic!("no version: {text}"),
        }
    }

    /// How many prepared statements it keeps for each server connection: `None` if it does not know the setting, as
    /// before 1.21.
    pub fn prepared_statements(&self) -> Option<u32> {
        let rows = self.admin("SHOW CONFIG");
        let row = rows.iter().find(|row| row.get("key") == Some("max_prepared_statements"))?;
        Some(row.get("value").and_then(|value| value.parse().ok()).expect("a number"))
    }

    /// How many clients it has that mean the server, rather than its own console.
    pub fn clients(&self) -> usize {
        self.admin("SHOW CLIENTS").iter().filter(|row| row.get("database") != Some("pgbouncer")).count()
    }

    /// Waits until it has `n` [`clients`](Bouncer::clients), and returns the last count seen.
    #[must_use = "the count may not be the one waited for"]
    pub fn wait_for(&self, n: usize, deadline: Instant) -> usize {
        let mut seen = 0;
        let _ = wait_until(deadline, || {
            seen = self.clients();
            seen == n
        });
        seen
    }

    /// The folder with its configuration and its log.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it wrote to its log, since its first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Ends it at once. Its clients are not told; the kernel closes the sockets.
    pub fn kill(&self) {
        if let Some(mut process) = self.process.lock().take() {
            let _ = kill_process(Pid::from_child(&process), Signal::KILL);
            let _ = process.wait();
            self.tell_watchdog("");
        }
    }

    /// Starts it again, on the same port.
    ///
    /// # Panics
    ///
    /// If it runs already or does not start.
    pub fn start_again(&self) {
        self.launch().unwrap_or_else(|log| panic!("PgBouncer does not start again:\n{log}"));
    }

    fn console(&self) -> Result<Client, postgres::Error> {
        let mut config = postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname("pgbouncer").connect_timeout(PATIENCE);
        config.connect(NoTls)
    }

    /// Starts the process and waits until it answers. Or says what it wrote to its log instead.
    fn launch(&self) -> Result<(), String> {
        let mut running = self.process.lock();
        assert!(running.is_none(), "the bouncer runs already");
        let path = self.dir.path().join("log");
        let log = fs::File::options().create(true).append(true).open(path).expect("a log");
        let before = self.log().len();
        let process = programs::command(&self.program, self.dir.path(), self.user)
            .arg("config")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle on the log"))
            .stderr(log)
            .spawn();
        let process = running.insert(process.map_err(|e| format!("cannot run it: {e}"))?);
        self.tell_watchdog(&process.id().to_string());

        let mut ended = false;
        let up = wait_until(Instant::now() + PATIENCE, || {
            ended = process.try_wait().expect("the bouncer is our child").is_some();
            ended || self.console().is_ok()
        });
        if up && !ended {
            return Ok(());
        }
        let _ = process.kill();
        let _ = process.wait();
        *running = None;
        self.tell_watchdog("");
        Err(self.log().split_off(before))
    }

    fn tell_watchdog(&self, line: &str) {
        let mut watchdog = self.watchdog.lock();
        let pipe = watchdog.stdin.as_mut().expect("the watchdog's pipe");
        // A watchdog that was killed has no ear; then there is only `Drop`.
        let _ = writeln!(pipe, "{line}");
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        self.kill();
        let watchdog = self.watchdog.get_mut();
        drop(watchdog.stdin.take());
        let _ = watchdog.wait();
    }
}

/// Names the program, for tests on another version than the one that is installed.
pub const PGBOUNCER: &str = "MILLPOND_PGBOUNCER";

/// The program that [`PGBOUNCER`] names, or else the first of the usual ones. Debian keeps it out of an ordinary user's
/// PATH.
fn find() -> PathBuf {
    if let Some(program) = programs::named(PGBOUNCER) {
        assert!(program.is_file(), "{PGBOUNCER} names no program: {}", program.display());
        return program;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin"];
    let candidates = std::env::split_paths(&path).chain(folders.map(PathBuf::from));
    let mut programs = candidates.map(|folder| folder.join("pgbouncer"));
    programs.find(|program| Path::is_file(program)).unwrap_or_else(|| {
        panic!(
            "no PgBouncer found. Install it, on Debian and Ubuntu with\n\n    apt-get install pgbouncer\n\n\
             Looked for `pgbouncer` in PATH and in: {}",
            folders.join(", ")
        )
    })
}
