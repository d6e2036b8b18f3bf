//! The examples, run as their users run them: as programs, over HTTP, ended by signals.

mod support;

use postgres::Client;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::{Database, SOON, ms, wait_until};

/// The grace of the example's guard, and what the end of a process takes on a loaded machine.
const GRACE: Duration = Duration::from_secs(5 + 2);

fn soon() -> Instant {
    Instant::now() + SOON
}

/// An example, which `cargo test` has built beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().expect("this program");
    let folder = test.ancestors().nth(2).expect("target/debug").join("examples");
    let program = folder.join(name);
    let again = "`cargo test` builds the examples, `cargo test --test examples` does not: run `cargo build --examples`";
    let built = |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified());
    let when = built(&program).unwrap_or_else(|e| panic!("{}: {e}. {again}", program.display()));
    // An old one would be tested in vain. Beside a program cargo leaves the list of what it was built from.
    let sources = fs::read_to_string(folder.join(format!("{name}.d"))).unwrap_or_default();
    for source in sources.split_whitespace().skip(1).map(PathBuf::from) {
        assert!(!built(&source).is_ok_and(|t| t > when), "{} is newer than {name}. {again}", source.display());
    }
    let mut command = Command::new(program);
    for variable in ["DATABASE_URL", "PORT", "WORKERS", "POOL_SIZE"] {
        command.env_remove(variable);
    }
    command.env("RUST_LOG", "off").env("RUST_BACKTRACE", "0").stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// A corner of the database for one test, with a `notes` of its own.
struct Corner {
    /// The name of its schema, and of the connections made with its address.
    name: &'static str,
    database: &'static Database,
    client: Client,
}

impl Corner {
    fn new(name: &'static str) -> Corner {
        let database = Database::get();
        let mut client = database.connect();
        client
            .batch_execute(&format!(
                "SET lock_timeout = '5s'; DROP SCHEMA IF EXISTS {name} CASCADE; CREATE SCHEMA {name}"
            ))
            .expect("a schema");
        Corner { name, database, client }
    }

    fn address(&self) -> String {
        let address = self.database.conninfo(self.name);
        match address.contains("://") {
            true => format!("{address}&options=-c%20search_path%3D{}", self.name),
            false => format!("{address} options='-c search_path={}'", self.name),
        }
    }

    /// Makes whoever uses the table wait, until this is dropped.
    fn lock(&self) -> Client {
        let mut client = self.database.connect();
        client.batch_execute(&format!("BEGIN; LOCK TABLE {}.notes", self.name)).expect("the lock");
        client
    }

    fn notes(&mut self) -> i64 {
        self.client.query_one(&format!("SELECT count(*) FROM {}.notes", self.name), &[]).expect("a count").get(0)
    }

    /// How many of the pool's connections wait for that lock.
    fn hanging(&self) -> usize {
        let hangs = |b: &&support::Backend| b.state == "active" && b.query.contains("notes");
        self.database.backends(self.name).iter().filter(hangs).count()
    }

    fn connections(&self) -> i64 {
        self.database.count(self.name)
    }

    /// How many the server still has of those that were closed, given the moment it needs to notice.
    fn left(&self) -> i64 {
        self.database.wait_for(self.name, 0, soon())
    }
}

impl Drop for Corner {
    fn drop(&mut self) {
        let _ = self.client.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.name));
    }
}

/// The server, which does not survive its test.
struct Notes {
    child: Child,
    stdout: BufReader<ChildStdout>,
    addr: SocketAddr,
}

impl Notes {
    fn start(environment: &[(&str, &str)]) -> Notes {
        let mut child =
            example("server").env("PORT", "0").envs(environment.iter().copied()).spawn().expect("the server");
        let stdout = BufReader::new(child.stdout.take().expect("its output"));
        let mut notes = Notes { child, stdout, addr: SocketAddr::from(([0; 4], 0)) };
        let mut line = String::new();
        while !line.starts_with("listening on http://") {
            line.clear();
            assert!(notes.stdout.read_line(&mut line).expect("text") > 0, "it ended before it listened");
        }
        notes.addr = line["listening on http://".len()..].trim().parse().expect("an address");
        notes
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        request(self.addr, method, path, headers, body)
    }

    fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", "")
    }

    fn post(&self, body: &str) -> Reply {
        self.send("POST", "/notes", &format!("Content-Length: {}\r\n", body.len()), body)
    }

    /// Sends a request that others will see hanging.
    fn in_background(&self, method: &'static str, headers: &'static str, body: &'static str) -> JoinHandle<Reply> {
        let addr = self.addr;
        thread::spawn(move || request(addr, method, "/notes", headers, body))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a process to signal");
    }

    /// Its threads that wait for requests or serve one.
    fn workers(&self) -> usize {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("its threads, on Linux").flatten();
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        tasks.map(name).filter(|name| name.starts_with("worker-")).count()
    }

    /// Waits for its end: with which status, and after which last words.
    fn end(mut self) -> (ExitStatus, String) {
        let mut status = None;
        let ended = wait_until(soon(), || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        assert!(ended, "it does not end");
        let mut words = String::new();
        self.stdout.read_to_string(&mut words).expect("text");
        (status.expect("it has ended"), words)
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

fn request(addr: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Reply {
    let mut stream = TcpStream::connect(addr).expect("the server listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).expect("to be heard");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {reply:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    Reply { status, head: head.to_ascii_lowercase(), body: body.trim_end().to_owned() }
}

#[test]
fn notes_are_kept() {
    let corner = Corner::new("examples_kept");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);

    assert_eq!(notes.get("/notes").body, "");
    let created = notes.post("Grease the wheel");
    assert_eq!((created.status, created.body.as_str()), (201, "1"));
    assert!(created.head.contains("location: /notes/1"), "{}", created.head);
    assert_eq!(notes.post("Mind the sluice\nat night").body, "2");
    let read = notes.get("/notes/2?really");
    assert_eq!((read.status, read.body.as_str()), (200, "Mind the sluice\nat night"));
    assert_eq!(notes.get("/notes").body, "2: Mind the sluice\n1: Grease the wheel");
    (0..20).for_each(|_| assert_eq!(notes.post("more").status, 201));
    let list = notes.get("/notes").body;
    assert_eq!((list.lines().count(), list.lines().next()), (20, Some("22: more")));

    let pool = notes.get("/pool");
    assert!(pool.status == 200 && pool.body.contains("pool 'notes'") && pool.body.contains("idle"), "{}", pool.body);
    assert_eq!(corner.connections(), 1);
}

#[test]
fn refusals() {
    let corner = Corner::new("examples_refusals");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    for path in ["/", "/note", "/notes/1", "/notes/x", "/notes/1/2", "/notes/99999999999999999999"] {
        assert_eq!(notes.get(path).status, 404, "{path}");
    }
    let refused = notes.send("DELETE", "/notes", "", "");
    assert!(refused.status == 405 && refused.head.contains("allow: get, post"), "{}", refused.head);
    assert_eq!(notes.send("POST", "/pool", "", "").status, 405);
    for body in ["", "a\0b"] {
        assert_eq!(notes.post(body).status, 400, "{body:?}");
    }

    let large = "x".repeat(16 * 1024);
    assert_eq!(notes.post(&large).status, 201);
    assert_eq!(notes.post(&(large.clone() + "x")).status, 413);
    // It need not be sent to be refused.
    let expecting = "Content-Length: 20000\r\nExpect: 100-continue\r\n";
    assert_eq!(notes.send("POST", "/notes", expecting, "").status, 413);
    // Nor need it end.
    let chunked = format!("5000\r\n{}\r\n", "x".repeat(0x5000));
    assert_eq!(notes.send("POST", "/notes", "Transfer-Encoding: chunked\r\n", &chunked).status, 413);

    // What only the database knows to be wrong costs that request, and its words stay in the log.
    corner.database.connect().batch_execute("ALTER TABLE examples_refusals.notes ADD CHECK (body <> 'no')").unwrap();
    let failed = notes.post("no");
    assert_eq!((failed.status, failed.body.as_str()), (500, "something went wrong here"));
    assert_eq!(notes.post("yes").status, 201);
}

#[test]
fn exhausted() {
    let corner = Corner::new("examples_exhausted");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), ("POOL_SIZE", "2"), ("WORKERS", "4")]);

    let lock = corner.lock();
    let hanging = [(), ()].map(|()| notes.in_background("GET", "", ""));
    assert!(wait_until(soon(), || corner.hanging() == 2), "two hold all there are");
    let begun = Instant::now();
    let refused = notes.get("/notes");
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert!(begun.elapsed() >= ms(1000), "it was not even tried for: {:?}", begun.elapsed());
    // What needs no connection goes on, and says who has them.
    let pool = notes.get("/pool").body;
    assert!(pool.contains("2 in use") && pool.matches("examples/server.rs:").count() == 2, "{pool}");
    assert_eq!(corner.connections(), 2);

    drop(lock);
    hanging.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap().status, 200));
    assert_eq!(notes.get("/notes").status, 200);
}

#[test]
fn a_lost_connection_costs_one_request() {
    let corner = Corner::new("examples_lost");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    assert_eq!(notes.post("before").status, 201);
    assert_eq!(corner.database.terminate(corner.name), 1);
    assert_eq!(corner.left(), 0);
    assert!([201, 500].contains(&notes.post("unlucky, unless it was checked").status));
    assert_eq!(notes.post("after").status, 201);
}

#[test]
fn a_panic_costs_one_request() {
    let mut corner = Corner::new("examples_panic");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), ("WORKERS", "1")]);
    // Not what the program expects of a row, which it has while it holds the connection.
    corner.client.batch_execute("ALTER TABLE examples_panic.notes ALTER id TYPE int").unwrap();
    assert_eq!(notes.post("unlucky").status, 500);
    corner.client.batch_execute("ALTER TABLE examples_panic.notes ALTER id TYPE bigint").unwrap();
    assert_eq!(notes.post("lucky").status, 201);
    let pool = notes.get("/pool").body;
    assert!(pool.contains("1 panicked"), "{pool}");
}

#[test]
fn sigterm_while_a_request_is_served() {
    let mut corner = Corner::new("examples_sigterm");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    assert_eq!(notes.get("/notes").status, 200);
    assert!(wait_until(soon(), || notes.workers() == 8), "{} workers have begun", notes.workers());

    let lock = corner.lock();
    let hanging = notes.in_background("POST", "Content-Length: 4\r\n", "last");
    assert!(wait_until(soon(), || corner.hanging() == 1));
    notes.signal(Signal::TERM);
    // All others leave, and this one stays.
    assert!(wait_until(soon(), || notes.workers() == 1), "{} workers are left", notes.workers());
    thread::sleep(ms(200));
    assert_eq!(notes.workers(), 1);
    drop(lock);

    assert_eq!(hanging.join().unwrap().status, 201);
    let (status, words) = notes.end();
    assert!(status.success() && words.contains("nothing is left"), "{status}: {words}");
    assert_eq!((corner.left(), corner.notes()), (0, 1));
}

#[test]
fn sigterm_while_a_request_hangs_for_ever() {
    let corner = Corner::new("examples_hanging");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    let lock = corner.lock();
    let hanging = notes.in_background("GET", "", "");
    assert!(wait_until(soon(), || corner.hanging() == 1));

    let begun = Instant::now();
    notes.signal(Signal::TERM);
    let (status, words) = notes.end();
    assert!(begun.elapsed() < GRACE, "it took {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(1), "{words}");
    assert!(words.contains("workers still run") && words.contains("examples/server.rs:"), "{words}");
    assert!(hanging.join().is_err(), "nobody was left to answer");
    drop(lock);
    assert_eq!(corner.left(), 0);
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let (corner, other) = (Corner::new("examples_first"), Corner::new("examples_second"));
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    let port = notes.addr.port().to_string();
    let second =
        example("server").arg(&port).env("DATABASE_URL", other.address()).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && error.contains("AddrInUse"), "{}: {error}", second.status);
    assert_eq!((other.left(), corner.connections()), (0, 1));
}

/// Everything that stems from `pid`, itself included.
fn family(pid: u32) -> Vec<Pid> {
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    let processes = fs::read_dir("/proc").expect("processes, on Linux").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children = pids.filter(|&child| parent(child) == Some(pid)).flat_map(family);
    Pid::from_raw(pid as i32).into_iter().chain(children).collect()
}

#[test]
fn a_private_database_goes_with_the_server() {
    let notes = Notes::start(&[]);
    assert_eq!(notes.post("for nobody else").body, "1");
    let family = family(notes.child.id());
    // Itself, the postmaster with its children, and who cleans up.
    assert!(family.len() > 4, "{family:?}");
    // As Ctrl-C does.
    notes.signal(Signal::INT);
    let (status, words) = notes.end();
    assert!(status.success() && words.contains("nothing is left"), "{status}: {words}");
    let gone = |pid: &Pid| test_kill_process(*pid).is_err();
    assert!(wait_until(soon(), || family.iter().all(gone)), "left of {family:?}");
}

#[test]
fn quickstart() {
    let corner = Corner::new("examples_quickstart");
    for command in
        [example("quickstart").arg(corner.address()), example("quickstart").env("DATABASE_URL", corner.address())]
    {
        let output = command.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("7 * 7 = 49\n"), "{printed}");
        assert_eq!(printed.matches(" * ").count(), 8, "{printed}");
        assert_eq!(corner.left(), 0);
    }
    let output = example("quickstart").stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && error.contains("which database?"), "{error}");
}
