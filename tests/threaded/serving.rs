//! Programs that run until they are told to end.

use crate::corner::Corner;
use crate::program::Program;
use crate::support::{SOON, Server, beside_others, wait_until, within};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;

/// The main thread panics when all else runs: what it prints first it cannot print.
#[test]
fn a_panic_of_the_main_thread_closes_the_pool() {
    let _beside = beside_others();
    let corner = Corner::new("threaded_main_panics");
    for name in ["accept_loop", "job_worker", "async_server"] {
        Program::panics(name, &corner.address());
        assert_eq!(corner.left(), 0, "{name}");
    }
}

// ---------------------------------------------------------------------------------------------- the accept loop

/// A client that sends lines.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        Client(BufReader::new(stream))
    }

    fn send(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).expect("to be heard");
    }

    /// The next answer; empty at the end.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer, or an end");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.send(line);
        self.answer()
    }
}

#[test]
fn an_accept_loop() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_accept");
    let mut program = Program::start("accept_loop", &corner.address());
    let address = program.address();
    let mut clients = [Client::connect(address), Client::connect(address)];
    assert_eq!(clients[0].ask("grease the wheel"), "1");
    assert_eq!(clients[1].ask("mind the sluice"), "2");
    drop(Client::connect(address)); // says nothing, and goes

    // One client waits for its answer when the end comes, the other says nothing.
    let lock = corner.lock("lines");
    clients[1].send("last");
    assert!(wait_until(within(SOON), || corner.waiting("lines") == 1));
    program.signal(Signal::TERM);
    assert_eq!(clients[0].answer(), "", "who says nothing is hung up on");
    drop(lock);
    assert_eq!((clients[1].answer(), clients[1].answer()), ("3".into(), String::new()));
    program.ends_cleanly();
    assert_eq!(corner.ask("SELECT count(*) FROM lines"), 3);
    assert_eq!(corner.left(), 0);
}

#[test]
fn an_accept_loop_outlives_the_panic_of_a_client_s_thread() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_accept_panics");
    let mut program = Program::start("accept_loop", &corner.address());
    let address = program.address();
    assert_eq!(Client::connect(address).ask("one"), "1");
    // Not what the program expects of a row. The first hears that its statement is outdated, and it is prepared anew.
    corner.client.batch_execute("ALTER TABLE lines ALTER id TYPE int").unwrap();
    assert_eq!(Client::connect(address).ask("two"), "", "its thread panics, which ends the connection");
    corner.client.batch_execute("ALTER TABLE lines ALTER id TYPE bigint").unwrap();
    assert_eq!(Client::connect(address).ask("three"), "3");
    program.signal(Signal::TERM);
    let words = program.ends_cleanly();
    assert!(words.contains("panicked"), "{words}");
    assert_eq!(corner.left(), 0);
}

/// Both the statement and the client's thread hang past the grace: the pool has the statement cancelled, and the program
/// says that not all has ended as it should.
#[test]
fn an_accept_loop_does_not_wait_for_ever() {
    let _beside = beside_others();
    let corner = Corner::new("threaded_accept_hangs");
    let mut program = Program::start("accept_loop", &corner.address());
    let mut client = Client::connect(program.address());
    assert_eq!(client.ask("one"), "1");
    let lock = corner.lock("lines");
    client.send("two");
    assert!(wait_until(within(SOON), || corner.waiting("lines") == 1));
    program.signal(Signal::TERM);
    let (status, words) = program.end();
    assert!(status.code() == Some(1) && words.contains("workers still run"), "{status}:\n{words}");
    assert_eq!(corner.left(), 0);
    drop(lock);
}

// ---------------------------------------------------------------------------------------------- jobs

#[test]
fn jobs_are_done_once_each() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_jobs");
    // Two processes share them.
    let mut programs = [(); 2].map(|()| {
        let mut program = Program::start("job_worker", &corner.address());
        program.line("working");
        program
    });
    let sql = "INSERT INTO jobs (recipient) SELECT 'ada ' || n FROM generate_series(1, 200) n";
    corner.client.batch_execute(sql).unwrap();
    // One fails for the server, another panics in the program: neither is tried again, nor keeps others waiting.
    let sql = "ALTER TABLE letters ADD CHECK (letter NOT LIKE '%nobody%'); \
               INSERT INTO jobs (recipient) VALUES ('nobody'), (''), ('grace')";
    corner.client.batch_execute(sql).unwrap();
    assert!(wait_until(within(SOON), || corner.ask("SELECT count(*) FROM jobs WHERE done_at IS NULL") == 0));
    assert_eq!(corner.ask("SELECT count(*) FROM letters"), 201);
    assert_eq!(corner.ask("SELECT count(DISTINCT letter) FROM letters"), 201);
    assert_eq!(corner.ask("SELECT count(*) FROM jobs WHERE error LIKE '%violates check constraint%'"), 1);
    assert_eq!(corner.ask("SELECT count(*) FROM jobs WHERE error = 'it panicked'"), 1);
    programs.iter_mut().for_each(|program| program.signal(Signal::TERM));
    programs.into_iter().for_each(|program| drop(program.ends_cleanly()));
    assert_eq!(corner.left(), 0);
}

/// A panic outside of a job: the worker goes on, and does the job when it can.
#[test]
fn a_worker_outlives_a_panic() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_jobs_panic");
    let mut program = Program::start("job_worker", &corner.address());
    program.line("working");
    // Not what the program expects of a row.
    let sql = "ALTER TABLE jobs ALTER id TYPE int; INSERT INTO jobs (recipient) VALUES ('ada')";
    corner.client.batch_execute(sql).unwrap();
    (0..5).for_each(|_| drop(program.line("a worker has panicked")));
    assert_eq!(corner.ask("SELECT count(*) FROM jobs WHERE done_at IS NULL"), 1);
    corner.client.batch_execute("ALTER TABLE jobs ALTER id TYPE bigint").unwrap();
    program.line("job 1: done");
    program.signal(Signal::TERM);
    program.ends_cleanly();
    assert_eq!(corner.left(), 0);
}

#[test]
fn a_job_that_has_begun_is_done_before_the_end() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_jobs_end");
    let mut program = Program::start("job_worker", &corner.address());
    program.line("working");
    let lock = corner.lock("letters");
    corner.client.batch_execute("INSERT INTO jobs (recipient) SELECT 'ada' FROM generate_series(1, 9)").unwrap();
    assert!(wait_until(within(SOON), || corner.waiting("letters") == 4), "four workers, a job each");
    program.signal(Signal::TERM);
    drop(lock);
    program.ends_cleanly();
    let done = corner.ask("SELECT count(*) FROM jobs WHERE done_at IS NOT NULL");
    assert_eq!((done, corner.ask("SELECT count(*) FROM letters")), (done, done));
    assert!(done >= 4, "{done}");
    assert_eq!(corner.left(), 0);
}

/// The job of a worker that is killed is free again, whole.
#[test]
fn a_killed_worker_leaves_its_job_to_others() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_jobs_killed");
    let mut program = Program::start("job_worker", &corner.address());
    program.line("working");
    let lock = corner.lock("letters");
    corner.client.batch_execute("INSERT INTO jobs (recipient) VALUES ('ada')").unwrap();
    assert!(wait_until(within(SOON), || corner.waiting("letters") == 1));
    program.signal(Signal::KILL);
    drop(program);
    drop(lock);
    let mut program = Program::start("job_worker", &corner.address());
    assert!(wait_until(within(SOON), || corner.ask("SELECT count(*) FROM jobs WHERE done_at IS NOT NULL") == 1));
    assert_eq!(corner.ask("SELECT count(*) FROM letters"), 1);
    program.line("working");
    program.signal(Signal::INT);
    program.ends_cleanly();
    assert_eq!(corner.left(), 0);
}

// ---------------------------------------------------------------------------------------------- the async server

/// Sends a request, and returns the reply's status, its head and its body.
fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).expect("to be heard");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("a reply");
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {reply:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    (status, head.to_ascii_lowercase(), body.trim_end().to_owned())
}

#[test]
fn an_async_server() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_async");
    let mut program = Program::start("async_server", &corner.address());
    let address = program.address();
    assert_eq!(request(address, "POST", "/notes", "grease the wheel").2, "1");
    let (status, _, body) = request(address, "GET", "/notes/1", "");
    assert_eq!((status, &*body), (200, "grease the wheel"));
    assert_eq!(request(address, "GET", "/notes/2", "").0, 404);
    let ready = request(address, "GET", "/ready", "");
    assert_eq!((ready.0, &*ready.2), (200, "ready"));

    // All connections are in use; one request more has to wait, and is told to come again.
    let lock = corner.lock("notes");
    let hanging: Vec<_> = (0..4).map(|_| thread::spawn(move || request(address, "POST", "/notes", "last"))).collect();
    assert!(wait_until(within(SOON), || corner.waiting("notes") == 4));
    let (status, head, body) = request(address, "GET", "/notes/1", "");
    assert!(status == 503 && head.contains("retry-after: 1"), "{head}\n{body}");

    // What has begun is answered, though the end has come.
    program.signal(Signal::TERM);
    assert!(wait_until(within(SOON), || TcpStream::connect(address).is_err()), "it accepts no more");
    drop(lock);
    hanging.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap().0, 201));
    program.ends_cleanly();
    assert_eq!(corner.ask("SELECT count(*) FROM notes"), 5);
    assert_eq!(corner.left(), 0);
}

#[test]
fn an_async_server_outlives_a_panic() {
    let _beside = beside_others();
    let mut corner = Corner::new("threaded_async_panics");
    let mut program = Program::start("async_server", &corner.address());
    let address = program.address();
    corner.client.batch_execute("ALTER TABLE notes ALTER id TYPE int").unwrap();
    assert_eq!(request(address, "POST", "/notes", "unlucky").0, 500);
    corner.client.batch_execute("ALTER TABLE notes ALTER id TYPE bigint").unwrap();
    assert_eq!(request(address, "POST", "/notes", "lucky").0, 201);
    program.signal(Signal::TERM);
    let words = program.ends_cleanly();
    assert!(words.contains("panicked"), "{words}");
    assert_eq!(corner.left(), 0);
}

#[test]
fn an_async_server_does_not_wait_for_ever() {
    let _beside = beside_others();
    let corner = Corner::new("threaded_async_hangs");
    let mut program = Program::start("async_server", &corner.address());
    let address = program.address();
    let lock = corner.lock("notes");
    let hanging = thread::spawn(move || std::panic::catch_unwind(|| request(address, "POST", "/notes", "never")));
    assert!(wait_until(within(SOON), || corner.waiting("notes") == 1));
    program.signal(Signal::TERM);
    let (status, words) = program.end();
    assert!(status.code() == Some(1) && words.contains("workers still run"), "{status}:\n{words}");
    assert_eq!(corner.left(), 0);
    let _ = hanging.join();
    drop(lock);
}

/// A balancer sends clients elsewhere while the database is down, and only then.
#[test]
fn an_async_server_says_that_its_database_is_down() {
    let _beside = beside_others();
    let server = Server::start();
    let mut program = Program::start("async_server", &server.conninfo("threaded_async_down"));
    let address = program.address();
    assert_eq!(request(address, "POST", "/notes", "before").0, 201);

    server.stop_fast();
    let mut ready = (0, String::new(), String::new());
    let down = wait_until(within(SOON), || {
        // It learns of it by its clients.
        let (status, head, _) = request(address, "POST", "/notes", "lost");
        assert!([500, 503].contains(&status) && !head.contains("retry-after"), "{head}");
        ready = request(address, "GET", "/ready", "");
        ready.0 == 503
    });
    assert!(down && ready.2.starts_with("down"), "{ready:?}");
    assert_eq!(request(address, "POST", "/notes", "lost").0, 503);

    server.start_again();
    // Nobody but the balancer asks.
    assert!(wait_until(within(SOON), || request(address, "GET", "/ready", "").0 == 200));
    assert_eq!(request(address, "POST", "/notes", "after").0, 201);
    program.signal(Signal::TERM);
    program.ends_cleanly();
    assert_eq!(server.wait_for("threaded_async_down", 0, within(SOON)), 0);
}
