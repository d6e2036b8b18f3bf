//! A private PostgreSQL server, made for one test and gone with it.
//!
//! Two processes belong to a server: the postmaster, and a watchdog that reads from a pipe whose other end only this
//! process holds. However this process ends, by return, by panic or by SIGKILL, the pipe ends with it; the watchdog
//! then stops the postmaster and removes the folder. So a server in a `static`, which nothing ever drops, goes too.

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Deref;
use std::os::unix::fs::DirBuilderExt;
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
use super::process::{children_of, is_alive, stands_still};
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
        Server::made_by(SETTINGS.iter().chain(settings), |programs, dir, user| {
            let mut initdb = programs::command(programs.join("initdb"), dir, user);
            let made = initdb.args(arguments).stdin(Stdio::null()).output();
            let made = made.map_err(|e| format!("cannot run initdb in {}: {e}", programs.display()))?;
            let said = String::from_utf8_lossy(&made.stdout) + String::from_utf8_lossy(&made.stderr);
            if made.status.success() { Ok(()) } else { Err(format!("initdb failed: {said}")) }
        })
    }

    /// Starts a streaming standby of a server that was started with [`STREAMING`](Server::STREAMING), with the same
    /// settings. The server itself makes the copy, for `pg_basebackup` is missing where there are only its own programs.
    ///
    /// # Panics
    ///
    /// As [`with`](Server::with).
    pub fn standby_of(primary: &Server) -> Server {
        let settings: Vec<_> = primary.settings.iter().map(|(k, v)| (&**k, &**v)).collect();
        Server::made_by(settings.iter(), |_, dir, user| {
            let data = dir.join("data");
            let label = primary.backed_up(|| copy(&primary.dir.path().join("data"), &data, user))?;
            let connection = format!("primary_conninfo = '{}'\n", address(primary.port));
            for (name, content) in
                [("backup_label", &label), ("standby.signal", &String::new()), ("postgresql.auto.conf", &connection)]
            {
                fs::write(data.join(name), content).map_err(|e| format!("cannot write {name}: {e}"))?;
                own(&data.join(name), user).map_err(|e| format!("cannot give {name} away: {e}"))?;
            }
            Ok(())
        })
    }

    /// Has the data folder copied while the server knows of it. Returns the file that belongs to the copy.
    fn backed_up(&self, copy: impl FnOnce() -> io::Result<()>) -> Result<String, String> {
        let mut client = self.connect();
        // Renamed in 15.
        let (start, stop) = match self.version() >= 15 {
            true => ("pg_backup_start('standby', true)", "pg_backup_stop(false)"),
            false => ("pg_start_backup('standby', true, false)", "pg_stop_backup(false, false)"),
        };
        client.batch_execute(&format!("SELECT {start}")).map_err(|e| format!("no backup starts: {e:?}"))?;
        copy().map_err(|e| format!("cannot copy the primary: {e}"))?;
        let stopped = client.query_one(&format!("SELECT labelfile FROM {stop}"), &[]);
        Ok(stopped.map_err(|e| format!("the backup does not end: {e:?}"))?.get(0))
    }

    /// What a server needs to have standbys.
    pub const STREAMING: &[(&str, &str)] = &[("wal_level", "replica"), ("max_wal_senders", "8")];

    /// Makes a primary of a standby. Returns when it is one.
    pub fn promote(&self) {
        let row = self.connect().query_one("SELECT pg_promote()", &[]).expect("an answer to the order to promote");
        assert!(row.get::<_, bool>(0), "not promoted:\n{}", self.log());
    }

    /// Starts a server in the folder `data`, which `make` makes.
    fn made_by<'a>(
        settings: impl Iterator<Item = &'a (&'a str, &'a str)>,
        make: impl FnOnce(&Path, &Path, Option<User>) -> Result<(), String>,
    ) -> Server {
        let programs = programs::find();
        let user = User::for_server();
        // The server's user may not get into a TMPDIR of root's.
        let parent = user.map_or_else(std::env::temp_dir, |_| PathBuf::from("/tmp"));
        let dir = tempfile::Builder::new().prefix("millpond-").tempdir_in(parent).expect("a folder for the server");
        own(dir.path(), user).expect("a folder for the server's user");

        let watchdog = programs::command("/bin/sh", dir.path(), user)
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            // Nobody who waits for the end of our output shall wait for the watchdog's.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the watchdog");

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
        if let Err(why) = make(&server.programs, server.dir.path(), user) {
            panic!("{why}");
        }

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

/// Copies a data folder that is in use, without what a running server keeps for itself.
fn copy(from: &Path, to: &Path, user: Option<User>) -> io::Result<()> {
    const NOT_THESE: &[&str] = &["postmaster.pid", "postmaster.opts"];
    const EMPTY: &[&str] = &[
        "pg_dynshmem",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
        "pg_wal",
    ];
    fs::DirBuilder::new().mode(0o700).create(to)?;
    own(to, user)?;
    if from.file_name().is_some_and(|name| EMPTY.iter().any(|empty| name == *empty)) {
        return Ok(());
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let copied = to.join(entry.file_name());
        if NOT_THESE.iter().any(|not| entry.file_name() == *not) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &copied, user)?;
            continue;
        }
        match fs::copy(entry.path(), &copied) {
            Ok(_) => own(&copied, user)?,
            // The server removed it since; then its log says so, and the copy's recovery reads that.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Gives it to the server's user.
fn own(path: &Path, user: Option<User>) -> io::Result<()> {
    user.map_or(Ok(()), |User { uid, gid }| std::os::unix::fs::chown(path, Some(uid), Some(gid)))
}

/// Ends a postmaster and all of its children by SIGKILL, and waits until they are gone.
fn kill_wholly(postmaster: &mut Child) {
    // It has ended, and its number may be somebody else's by now.
    if !matches!(postmaster.try_wait(), Ok(None)) {
        return;
    }
    // Stopped first, so that it has no more children while they are counted.
    let _ = kill_process(Pid::from_child(postmaster), Signal::STOP);
    let _ = wait_until(Instant::now() + PATIENCE, || stands_still(Pid::from_child(postmaster)));
    let children = children_of(postmaster.id());
    for &child in &children {
        let _ = kill_process(child, Signal::KILL);
    }
    let _ = kill_process(Pid::from_child(postmaster), Signal::KILL);
    let _ = postmaster.wait();
    let gone = wait_until(Instant::now() + PATIENCE, || !children.iter().any(|&child| is_alive(child)));
    assert!(gone, "processes of the server survive SIGKILL: {children:?}");
}
