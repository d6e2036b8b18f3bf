//! Worker processes with a pool each: what a killed one leaves, its replacement, and one more than the server bears.

use crate::program::Program;
use crate::support::{SOON, Server, beside_others, wait_until, within};
use postgres::Client;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// What the four workers and their supervisor need.
const ENOUGH: u32 = 4 * 4 + 1;

/// A server on which the role of the workers may have so many connections.
struct Mill {
    server: Server,
    client: Client,
}

impl Mill {
    fn allowing(connections: u32) -> Mill {
        let server = Server::with(&[("max_connections", "40")]);
        let mut client = server.connect();
        let sql = format!("CREATE ROLE app LOGIN CONNECTION LIMIT {connections}; GRANT CREATE ON SCHEMA public TO app");
        client.batch_execute(&sql).expect("a role");
        Mill { server, client }
    }

    fn start(&self) -> Program {
        let port = self.server.port();
        Program::start("supervisor", &format!("host=127.0.0.1 port={port} user=app dbname=postgres"))
    }

    fn ask(&mut self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).expect("an answer").get(0)
    }

    #[track_caller]
    fn wait_for(&mut self, n: i64, sql: &str) {
        let mut seen = 0;
        let so = wait_until(within(SOON), || {
            seen = self.ask(sql);
            seen == n
        });
        assert!(so, "{seen} instead of {n}: {sql}");
    }

    #[track_caller]
    fn works(&mut self, worker: u32) {
        let sql = format!("SELECT least(count(*), 1) FROM turns WHERE worker = {worker}");
        self.wait_for(1, &sql);
    }

    /// Has all that the workers do wait, with all the connections that they may have.
    fn lock(&mut self, workers: i64) -> Client {
        let mut lock = self.server.connect();
        lock.batch_execute("BEGIN; LOCK TABLE turns").expect("the lock");
        self.wait_for(workers * 4, WAITING);
        lock
    }
}

const ALL: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND wait_event_type = 'Lock'";

/// The process of the worker that is started next.
#[track_caller]
fn started(program: &mut Program) -> u32 {
    let line = program.line(" started by ");
    let pid = line.strip_prefix("worker ").and_then(|line| line.split(' ').next()?.parse().ok());
    pid.unwrap_or_else(|| panic!("no worker in `{line}`"))
}

fn pid(process: u32) -> Pid {
    Pid::from_raw(process as i32).expect("a process")
}

#[track_caller]
fn assert_gone(workers: &[u32]) {
    let left = || workers.iter().copied().filter(|&worker| test_kill_process(pid(worker)).is_ok()).collect::<Vec<_>>();
    assert!(wait_until(within(SOON), || left().is_empty()), "left of {workers:?}: {:?}", left());
}

#[test]
fn a_killed_worker_is_cleared_up_after_and_replaced_and_a_fifth_is_refused() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let mut program = mill.start();
    let mut workers: Vec<u32> = (0..4).map(|_| started(&mut program)).collect();
    workers.iter().for_each(|&worker| mill.works(worker));

    // Its backends wait for a lock when it is killed: they do not notice.
    let lock = mill.lock(4);
    kill_process(pid(workers[1]), Signal::KILL).expect("a worker to kill");
    program.line(&format!("worker {} has ended: signal: 9", workers[1]));
    program.line("audit of pool 'mill', app on database postgres");
    let orphan = format!("ORPHANED ({} by its name): its client has closed", workers[1]);
    (0..4).for_each(|_| drop(program.line(&orphan)));
    program.line("ended 4 of 4 backends");
    workers.push(started(&mut program));
    // All together are as many as before, and as many as are allowed. So one more is refused, with the sum.
    mill.wait_for(16, WAITING);
    program.signal(Signal::USR1);
    let refused = program.line("refused: ");
    assert!(refused.contains("5 workers x 4 + 1 = 21, but the server allows app 17 ("), "{refused}");

    // Once the server bears it, it is started.
    mill.client.batch_execute("ALTER ROLE app CONNECTION LIMIT 21").unwrap();
    program.signal(Signal::USR1);
    workers.push(started(&mut program));
    mill.wait_for(20, WAITING);
    drop(lock);
    workers[4..].iter().for_each(|&worker| mill.works(worker));

    program.signal(Signal::TERM);
    let words = program.ends_cleanly();
    assert_eq!(words.matches(" has ended").count(), 1, "one was killed, and no other died:\n{words}");
    assert_eq!(words.matches(" started").count(), 6, "{words}");
    assert_gone(&workers);
    mill.wait_for(0, ALL);
}

/// The supervisor's own connections are refused when its worker dies: what that one has left is ended later.
#[test]
fn an_audit_that_fails_is_made_again() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let mut program = mill.start();
    let workers: Vec<u32> = (0..4).map(|_| started(&mut program)).collect();
    workers.iter().for_each(|&worker| mill.works(worker));
    let lock = mill.lock(4);
    mill.client.batch_execute("ALTER ROLE app NOLOGIN").unwrap();
    kill_process(pid(workers[1]), Signal::KILL).expect("a worker to kill");
    program.line("no audit: ");
    mill.client.batch_execute("ALTER ROLE app LOGIN").unwrap();
    program.line(&format!("ORPHANED ({} by its name): its client has closed", workers[1]));
    started(&mut program);
    drop(lock);
    program.signal(Signal::TERM);
    program.ends_cleanly();
    mill.wait_for(0, ALL);
}

#[test]
fn four_are_refused_where_three_fit() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH - 1);
    let (status, words) = mill.start().end();
    let sum = "4 workers x 4 + 1 = 17, but the server allows app 16 (";
    assert!(status.code() == Some(1) && words.contains(sum), "{status}:\n{words}");
    assert!(!words.contains(" started"), "{words}");
    mill.wait_for(0, ALL);
}

#[test]
fn workers_end_with_a_supervisor_that_is_killed() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let mut program = mill.start();
    let workers: Vec<u32> = (0..4).map(|_| started(&mut program)).collect();
    workers.iter().for_each(|&worker| mill.works(worker));
    program.signal(Signal::KILL);
    let (status, _) = program.end();
    assert!(!status.success());
    assert_gone(&workers);
    mill.wait_for(0, ALL);
}

/// The workers hang longer than their guards wait.
#[test]
fn workers_that_hang_end_as_well() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let mut program = mill.start();
    let workers: Vec<u32> = (0..4).map(|_| started(&mut program)).collect();
    workers.iter().for_each(|&worker| mill.works(worker));
    let _lock = mill.lock(4);
    program.signal(Signal::INT);
    let (status, words) = program.end();
    assert!(status.code() == Some(1) && words.contains("workers still run"), "{status}:\n{words}");
    assert_gone(&workers);
    mill.wait_for(0, ALL);
}

/// The supervisor panics once its first worker is started, since nobody reads what it prints.
#[test]
fn workers_end_with_a_supervisor_that_panics() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let port = mill.server.port();
    Program::panics("supervisor", &format!("host=127.0.0.1 port={port} user=app dbname=postgres"));
    mill.wait_for(0, ALL);
}

/// Those that wait for the database do so for less than the time they have to end.
#[test]
fn a_mill_whose_server_is_away_ends_cleanly() {
    let _beside = beside_others();
    let mut mill = Mill::allowing(ENOUGH);
    let mut program = mill.start();
    let workers: Vec<u32> = (0..4).map(|_| started(&mut program)).collect();
    workers.iter().for_each(|&worker| mill.works(worker));
    mill.server.stop_fast();
    program.line("none can be opened: ");
    program.signal(Signal::TERM);
    program.ends_cleanly();
    assert_gone(&workers);
}
