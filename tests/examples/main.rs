//! The examples, run as their users run them: as programs, over HTTP, ended by signals.

mod browser;
mod notes;
mod page;
#[path = "../support/mod.rs"]
mod support;

use postgres::Client;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::{Database, SOON, wait_until};

/// The grace of the example's guard, and what the end of a process takes on a loaded machine.
const GRACE: Duration = Duration::from_secs(5 + 2);

fn soon() -> Instant {
    Instant::now() + SOON
}

/// An example, without what may be set around the tests.
fn example(name: &str) -> Command {
    let mut command = Command::new(support::programs::example(name));
    for variable in ["DATABASE_URL", "PORT", "WORKERS", "POOL_SIZE", "STATEMENT_TIMEOUT"] {
        command.env_remove(variable);
    }
    command
        .env("WEATHER", "")
        .env("RUST_LOG", "off")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
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

    /// How many of the pool's connections are within a transaction.
    fn in_transaction(&self) -> usize {
        self.database.backends(self.name).iter().filter(|b| b.state.contains("in transaction")).count()
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
