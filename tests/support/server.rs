//! A private PostgreSQL server, made for one test and gone with it.
//!
//! Two processes belong to a server: the postmaster, and a watchdog that reads from a pipe whose other end only this
//! process holds. However this process ends, by return, by panic or by SIGKILL, the pipe ends with it; the watchdog
//! then stops the postmaster and removes the folder. So a server in a `static`, which nothing ever drops, goes too.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::{Client, NoTls};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::database::{Database, with_name};
use super::programs::{self, User};
use super::wait::wait_until;

/// Far longer than a start or a stop takes anywhere.
const PATIENCE: Duration = Duration::from_secs(30);

/// Quick instead of durable: the data is thrown away. Quiet: nothing in the background disturbs a measurement.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("max_connections", "200"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    ("wal_level", "minimal"),
    ("max_wal_senders", "0"),
    ("shared_buffers", "16MB"),
    ("autovacuum", "off"),
    ("jit", "off"),
    ("logging_collector", "off"),
    // In the data folder, so that it goes with it when the server is killed.
    ("dynamic_shared_memory_type", "mmap"),
];

/// Told the postmaster's pid, one per line, the last one counts; an empty line: none runs. Then nothing, until the
/// pipe ends. A postmaster that was killed leaves its pid file and, named on its line 7, a piece of shared memory.
const WATCHDOG: &str = r#"
    trap '' HUP INT TERM
    while read -r line; do pid=$line; done
    cd /
    file=$1/data/postmaster.pid
    if [ -n "$pid" ]; then
        kill -QUIT "$pid"
        n=0
        while [ -e "$file" ] && kill -0 "$pid" && [ $n -lt 100 ]; do sleep 0.05; n=$((n + 1)); done
        kill -KILL "$pid"
    fi
    if [ -e "$file" ]; then
        set -- "$1" $(sed -n 7p "$file")
        ipcrm -m "$3"
    fi
    rm -rf "$1" || { sleep 1; rm -rf "$1"; }
"#;

/// A private server on a loopback port and a unix socket, with one superuser, `postgres`, who needs no password.
///
/// All that can be asked of a [`Database`] can be asked of it. Its methods take `&self`, so that one thread may stop
/// the server while others use it.
pub struct Server {
    database: Database,
    port: u16,
    programs: PathBuf,
    user: Option<User>,
    settings: Vec<(String, String)>,
    postmaster: Mutex<Option<Child>>,
    watchdog: Mutex<Child>,
    /// Removed by the watchdog; a second time here, in case somebody killed that.
    dir: TempDir,
}

impl Server {
    /// Starts a server.
    pub fn start() -> Server {
        Server::with(&[])
    }

    /// Starts a server with these settings in its configuration, such as `("max_connections", "20")`.
    ///
    /// # Panics
    ///
    /// If there is no PostgreSQL, or it does not start: with the reason, the server's own words included.
    pub fn with(settings: &[(&str, &str)]) -> Server {
        let arguments =
            ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--pgdata=data"];
        Server::made_by("initdb", &arguments, SETTINGS.iter().chain(settings))
    }

    /// Starts a streaming standby of a server that was started with [`STREAMING`](Server::STREAMING), with the same
    /// settings.
    ///
    /// # Panics
    ///
    /// As [`with`](Server::with).
    pub fn standby_of(primary: &Server) -> Server {
        let from = format!("--dbname={}", address(primary.port));
        let arguments = ["--no-sync", "--checkpoint=fast", "--write-recovery-conf", "--pgdata=data", &from];
        let settings: Vec<_> = primary.settings.iter().map(|(k, v)| (&**k, &**v)).collect();
        Server::made_by("pg_basebackup", &arguments, settings.iter())
    }

    /// What a server needs to have standbys.
    pub const STREAMING: &[(&str, &str)] = &[("wal_level", "replica"), ("max_wal_senders", "8")];

    /// Makes a primary of a standby. Returns when it is one.
    pub fn promote(&self) {
        let row = self.connect().query_one("SELECT pg_promote()", &[]).expect("an answer to the order to promote");
        assert!(row.get::<_, bool>(0), "not promoted:\n{}", self.log());
    }

    /// Starts a server in the folder `data` that this program makes.
    fn made_by<'a>(
        program: &str,
        arguments: &[&str],
        settings: impl Iterator<Item = &'a (&'a str, &'a str)>,
    ) -> Server {
        let programs = programs::find();
        let user = User::for_server();
        // The server's user may not get into a TMPDIR of root's.
        let parent = user.map_or_else(std::env::temp_dir, |_| PathBuf::from("/tmp"));
        let dir = tempfile::Builder::new().prefix("millpond-").tempdir_in(parent).expect("a folder for the server");
        if let Some(User { uid, gid }) = user {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).expect("a folder for the server's user");
        }

        let watchdog = programs::command("/bin/sh", dir.path(), user)
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            // Nobody who waits for the end of our output shall wait for the watchdog's.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the watchdog");

        let made = programs::command(programs::beside(&programs, program), dir.path(), user)
            .args(arguments)
            .stdin(Stdio::null())
            .output();
        // Made before anything can go wrong, so that its `Drop` cleans up.
        let mut server = Server {
            database: Database::at(String::new()),
            port: 0,
            programs,
            user,
            settings: settings.map(|(k, v)| (String::from(*k), String::from(*v))).collect(),
            postmaster: Mutex::new(None),
            watchdog: Mutex::new(watchdog),
            dir,
        };
        let made = made.unwrap_or_else(|e| panic!("cannot run {program} in {}: {e}", server.programs.display()));
        assert!(
            made.status.success(),
            "{program} failed: {}{}",
            String::from_utf8_lossy(&made.stdout),
            String::from_utf8_lossy(&made.stderr)
        );

        // Between finding a port free and listening on it somebody else may take it.
        let mut attempts = 5;
        loop {
            server.port = listen().local_addr().expect("a listener's address").port();
            server.database = Database::at(address(server.port));
            match server.launch() {
                Ok(()) => return server,
                Err(log) if log.contains("could not bind") && attempts > 0 => attempts -= 1,
                Err(log) => panic!("PostgreSQL does not start:\n{log}"),
            }
        }
    }

    /// The server shared by all tests of one process, for those that never stop it. It ends with the process.
    pub fn shared() -> &'static Server {
        static SHARED: OnceLock<Server> = OnceLock::new();
        SHARED.get_or_init(Server::start)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens for TCP, for a proxy in front of it.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// The folder of its unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// How to connect through the unix socket under the name of `app`.
    pub fn unix_conninfo(&self, app: &str) -> String {
        let socket = format!("host={} port={} user=postgres dbname=postgres", self.socket_dir().display(), self.port);
        with_name(&socket, app)
    }

    /// Has the server accept everybody from this network, such as `192.0.2.0/24`. It must listen there.
    pub fn trust(&self, network: &str) {
        let path = self.dir.path().join("data/pg_hba.conf");
        let mut hba = fs::File::options().append(true).open(path).expect("the server's pg_hba.conf");
        writeln!(hba, "host all all {network} trust").expect("a line in pg_hba.conf");
        self.connect().batch_execute("SELECT pg_reload_conf()").expect("a reload");
    }

    /// The postmaster's process.
    ///
    /// # Panics
    ///
    /// While the server is stopped.
    pub fn pid(&self) -> u32 {
        self.postmaster.lock().as_ref().expect("the server is stopped").id()
    }

    /// What the server wrote to its log, since its first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Stops it as an operator would: clients are told ("terminating connection due to administrator command"), data
    /// is saved. Returns when it is gone.
    pub fn stop_fast(&self) {
        self.stop(Signal::INT);
    }

    /// Stops it as an emergency would: clients are told and cut off, nothing is saved. Returns when it is gone.
    pub fn stop_immediate(&self) {
        self.stop(Signal::QUIT);
    }

    /// As a machine that loses its power, except for its kernel, which still closes the sockets. Returns when the
    /// postmaster and all of its children are gone.
    pub fn kill(&self) {
        if let Some(mut postmaster) = self.postmaster.lock().take() {
            kill_wholly(&mut postmaster);
            self.tell_watchdog("");
        }
    }

    /// Starts a stopped server, on the same port, with the same settings and what data it saved.
    ///
    /// # Panics
    ///
    /// If it runs already or does not start.
    pub fn start_again(&self) {
        self.launch().unwrap_or_else(|log| panic!("PostgreSQL does not start again:\n{log}"));
    }

    /// Starts the postmaster and waits until it answers. Or says what it wrote to its log instead.
    fn launch(&self) -> Result<(), String> {
        let mut running = self.postmaster.lock();
        assert!(running.is_none(), "the server runs already");
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("log")).expect("a log");
        let before = self.log().len();
        let mut command = programs::command(self.programs.join("postgres"), self.dir.path(), self.user);
        command.args(["-D", "data", "-p", &self.port.to_string()]).arg("-k").arg(self.dir.path());
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle on the log")).stderr(log);
        let postmaster = running.insert(command.spawn().map_err(|e| format!("cannot run it: {e}"))?);
        self.tell_watchdog(&postmaster.id().to_string());

        let deadline = Instant::now() + PATIENCE;
        let config = self.config("starter");
        let mut ended = false;
        let up = wait_until(deadline, || {
            ended = postmaster.try_wait().expect("the postmaster is our child").is_some();
            ended || config.connect(NoTls).is_ok()
        });
        if up && !ended {
            return Ok(());
        }
        kill_wholly(postmaster);
        *running = None;
        self.tell_watchdog("");
        Err(self.log().split_off(before))
    }

    fn stop(&self, signal: Signal) {
        let Some(mut postmaster) = self.postmaster.lock().take() else { return };
        let _ = kill_process(Pid::from_child(&postmaster), signal);
        // The postmaster outlives its children.
        if !wait_until(Instant::now() + PATIENCE, || matches!(postmaster.try_wait(), Ok(Some(_)))) {
            kill_wholly(&mut postmaster);
        }
        self.tell_watchdog("");
    }

    fn tell_watchdog(&self, line: &str) {
        let mut watchdog = self.watchdog.lock();
        let pipe = watchdog.stdin.as_mut().expect("the watchdog's pipe");
        // A watchdog that was killed has no ear; then there is only `Drop`.
        let _ = writeln!(pipe, "{line}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_immediate();
        let watchdog = self.watchdog.get_mut();
        drop(watchdog.stdin.take());
        let _ = watchdog.wait();
    }
}

impl Deref for Server {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.database
    }
}

/// A listener on a free loopback port that stays ours to come back to.
///
/// Below the range from which the system takes ports for outgoing connections: there, while we do not listen, another
/// connection could be given the port; or a client that keeps trying it could be given that very port, and so connect
/// to itself.
pub fn listen() -> TcpListener {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that run side by side begin at different places.
    let start = std::process::id().wrapping_mul(7919);
    (0..COUNT)
        .find_map(|_| {
            let offset = start.wrapping_add(u32::from(NEXT.fetch_add(1, Ordering::Relaxed))) % u32::from(COUNT);
            TcpListener::bind((Ipv4Addr::LOCALHOST, FIRST + offset as u16)).ok()
        })
        .expect("a free port on 127.0.0.1")
}

pub(super) fn address(port: u16) -> String {
    format!("host=127.0.0.1 port={port} user=postgres dbname=postgres")
}

/// Ends a postmaster and all of its children by SIGKILL, and waits until they are gone.
fn kill_wholly(postmaster: &mut Child) {
    // It has ended, and its number may be somebody else's by now.
    if !matches!(postmaster.try_wait(), Ok(None)) {
        return;
    }
    // Stopped first, so that it has no more children while they are counted. It may have one more before it obeys.
    let _ = kill_process(Pid::from_child(postmaster), Signal::STOP);
    let _ = wait_until(Instant::now() + PATIENCE, || !runs(Pid::from_child(postmaster)));
    let children = children_of(postmaster.id());
    for &child in &children {
        let _ = kill_process(child, Signal::KILL);
    }
    let _ = kill_process(Pid::from_child(postmaster), Signal::KILL);
    let _ = postmaster.wait();
    let gone = wait_until(Instant::now() + PATIENCE, || !children.iter().any(|&child| is_alive(child)));
    assert!(gone, "processes of the server survive SIGKILL: {children:?}");
}

/// Linux tells who is whose child in `/proc`; a bare Debian has no `ps`.
#[cfg(target_os = "linux")]
fn children_of(parent: u32) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    pids.filter(|&pid| stat(pid).is_some_and(|(_, of)| of == parent)).collect()
}

#[cfg(target_os = "linux")]
fn is_alive(pid: Pid) -> bool {
    // A zombie is a matter between it and its parent.
    stat(pid).is_some_and(|(state, _)| state != "Z" && state != "X")
}

#[cfg(target_os = "linux")]
fn runs(pid: Pid) -> bool {
    stat(pid).is_some_and(|(state, _)| !["T", "Z", "X"].contains(&state.as_str()))
}

/// A process's state and parent.
#[cfg(target_os = "linux")]
fn stat(pid: Pid) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The name before it, in brackets, may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

#[cfg(not(target_os = "linux"))]
fn children_of(parent: u32) -> Vec<Pid> {
    let output = std::process::Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output().expect("ps");
    let lines = String::from_utf8_lossy(&output.stdout);
    let pairs = lines.lines().filter_map(|line| {
        let mut numbers = line.split_whitespace();
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse::<u32>().ok()?))
    });
    pairs.filter(|&(_, of)| of == parent).filter_map(|(pid, _)| Pid::from_raw(pid)).collect()
}

#[cfg(not(target_os = "linux"))]
fn is_alive(pid: Pid) -> bool {
    rustix::process::test_kill_process(pid).is_ok()
}

/// Not to be told here.
#[cfg(not(target_os = "linux"))]
fn runs(_: Pid) -> bool {
    false
}
