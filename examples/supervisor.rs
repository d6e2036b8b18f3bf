//! Four worker processes, each with a pool of its own, and a supervisor that knows what the server can bear.
//!
//! ```sh
//! DATABASE_URL=postgres://user@127.0.0.1/database cargo run --example supervisor
//! # In a second terminal, with the numbers that the first one shows:
//! kill -9 WORKER          # what it left is shown and ended, and it is replaced
//! kill -USR1 SUPERVISOR   # one worker more, if the server allows as many connections; else it is refused
//! ```
//!
//! A worker that is killed closes nothing. The server notices that an idle connection's client is gone; a backend that
//! works or waits for a lock keeps its place and its locks until it has finished. So the supervisor has an audit made: what
//! is proven to be an orphan it ends, which makes room for the next worker. (That takes the server's own host and the
//! rights of root or of the server's user. Elsewhere `client_connection_check_interval` ends it, 10 seconds later.)
//!
//! Ctrl-C and SIGTERM end it: the workers finish, then the supervisor. If it is killed itself, its workers read the end
//! of their input, and finish as well.

use millpond::Workers;
use millpond::postgres::{Budget, Owner, Pool, PostgresManager, ServerGuards, audit, budget};
use postgres::NoTls;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::error::Error;
use std::io::Read;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, io};

type Failure = Box<dyn Error + Send + Sync>;

const WORKERS: u32 = 4;
/// How many connections each of them may have.
const CONNECTIONS: u32 = 4;
/// One that fails, or ends at once, is not started again at once.
const PAUSE: Duration = Duration::from_secs(1);
/// Longer than the grace of a worker's guard.
const GRACE: Duration = Duration::from_secs(10);

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS turns (worker int NOT NULL, at timestamptz NOT NULL DEFAULT now())";

static OVER: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let result = match env::args().nth(1) {
        None => supervise(),
        Some(processes) => processes.parse().map_err(Failure::from).and_then(work),
    };
    let Err(e) = result else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

/// The pools of one name: an audit finds what all processes have under it.
fn manager() -> Result<PostgresManager<NoTls>, Failure> {
    let check = Some(Duration::from_secs(10));
    let guards = ServerGuards { client_connection_check_interval: check, ..ServerGuards::default() };
    Ok(PostgresManager::parse(&env::var("DATABASE_URL").or(Err("which database? DATABASE_URL names none"))?, NoTls)?
        .server_guards(guards))
}

// ---------------------------------------------------------------------------------------------- a worker

fn work(processes: u32) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let manager = manager()?.processes(processes).budget(Budget::Refuse);
    // A worker that is to end does not wait for a database that is away.
    let pool =
        manager.builder().name("mill").max_size(CONNECTIONS).connection_timeout(Duration::from_secs(2)).open()?;
    let mut guard = pool.guard().owning_with(Vec::<JoinHandle<()>>::new(), |threads, deadline| {
        OVER.store(true, SeqCst);
        threads.iter().for_each(|thread| thread.thread().unpark());
        threads.finish(deadline)
    });
    for _ in 0..CONNECTIONS {
        let pool = pool.clone();
        guard.push(thread::Builder::new().spawn(move || {
            while !OVER.load(SeqCst) {
                if let Err(e) = turn(&pool) {
                    eprintln!("worker {}: {}", std::process::id(), millpond::Cause::text(&*e));
                }
                thread::park_timeout(Duration::from_millis(100));
            }
        })?);
    }

    // The supervisor holds the other end of our input, and lets go of it to end us, or by its own end.
    let handle = signals.handle();
    thread::spawn(move || {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        handle.close();
    });
    signals.forever().next();
    let report = guard.close();
    if report.is_complete() { Ok(()) } else { Err(report.to_string().into()) }
}

fn turn(pool: &Pool) -> Result<(), Failure> {
    let worker = std::process::id() as i32;
    pool.get()?.execute_cached("INSERT INTO turns (worker) VALUES ($1)", &[&worker])?;
    Ok(())
}

// ---------------------------------------------------------------------------------------------- the supervisor

struct Mill {
    /// Of one connection, which is kept only while something is asked.
    pool: Pool,
    workers: Vec<(Child, Instant)>,
    /// Those that have ended since the last audit that was made.
    dead: Vec<u32>,
    /// When the next one may be started.
    next: Instant,
}

fn supervise() -> Result<(), Failure> {
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGINT, SIGUSR1])?;
    let pool = manager()?.builder().name("mill").max_size(1).max_idle(Duration::ZERO);
    let pool = pool.connection_timeout(Duration::from_secs(5)).open()?;
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;

    // On return and on panic: the mill is dropped, and ends its workers, before the guard closes the pool.
    let mut mill = Mill { pool, workers: Vec::new(), dead: Vec::new(), next: Instant::now() };
    mill.allows(WORKERS)?;
    let mut wanted = WORKERS;
    let (sender, events) = channel();
    thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(signal)));
    loop {
        mill.clear_up();
        mill.fill(wanted);
        match events.recv_timeout(PAUSE) {
            Ok(SIGUSR1) => match mill.allows(wanted + 1) {
                Ok(()) => wanted += 1,
                Err(e) => println!("refused: {e}"),
            },
            Ok(SIGTERM | SIGINT) => break,
            _ => {}
        }
    }

    let well = mill.end();
    let report = guard.close();
    println!("{report}");
    if well && report.is_complete() { Ok(()) } else { Err("not all has ended by itself".into()) }
}

impl Mill {
    /// Whether the server bears so many workers, and the supervisor's own connection beside them.
    fn allows(&self, workers: u32) -> Result<(), Failure> {
        let sum = workers * CONNECTIONS + 1;
        let mut client = self.pool.get()?;
        let allowance = budget(&mut client)?;
        if sum <= allowance.connections() {
            return Ok(());
        }
        Err(format!("{workers} workers x {CONNECTIONS} + 1 = {sum}, but the server allows {allowance}").into())
    }

    /// Starts the workers that are missing.
    fn fill(&mut self, wanted: u32) {
        while self.workers.len() < wanted as usize && self.next <= Instant::now() {
            if let Err(e) = self.allows(wanted).and_then(|()| self.start(wanted)) {
                eprintln!("no worker can be started: {}", millpond::Cause::text(&*e));
                self.next = Instant::now() + PAUSE;
            }
        }
    }

    fn start(&mut self, processes: u32) -> Result<(), Failure> {
        let mut command = Command::new(env::current_exe()?);
        let child = command.arg(processes.to_string()).stdin(Stdio::piped()).spawn()?;
        let pid = child.id();
        self.workers.push((child, Instant::now()));
        println!("worker {pid} started by {}", std::process::id());
        Ok(())
    }

    /// Shows what dead workers have left on the server, and ends it.
    fn clear_up(&mut self) {
        self.workers.retain_mut(|(child, started)| {
            let Ok(Some(status)) = child.try_wait() else { return true };
            println!("worker {} has ended: {status}", child.id());
            self.dead.push(child.id());
            if started.elapsed() < PAUSE {
                self.next = Instant::now() + PAUSE;
            }
            false
        });
        match end_what_is_left_of(&self.pool, &self.dead) {
            Ok(()) => self.dead.clear(),
            // The next round tries again.
            Err(e) => eprintln!("no audit: {}", millpond::Cause::text(&*e)),
        }
    }

    /// Ends all workers, and says whether they have ended well.
    fn end(&mut self) -> bool {
        self.workers.iter_mut().for_each(|(child, _)| drop(child.stdin.take()));
        let (deadline, mut well) = (Instant::now() + GRACE, true);
        for (mut child, _) in self.workers.drain(..) {
            while let Ok(None) = child.try_wait() {
                if Instant::now() >= deadline {
                    let _ = child.kill();
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
            well &= child.wait().is_ok_and(|status| status.success());
        }
        well
    }
}

impl Drop for Mill {
    fn drop(&mut self) {
        self.end();
    }
}

fn end_what_is_left_of(pool: &Pool, dead: &[u32]) -> Result<(), Failure> {
    if dead.is_empty() {
        return Ok(());
    }
    // The server needs a moment to notice what it notices by itself, and the kernel to see what has closed.
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut found = audit(pool)?;
    let of_dead = |b: &millpond::postgres::Backend| b.process.is_some_and(|pid| dead.contains(&pid));
    while Instant::now() < deadline && found.backends.iter().any(|b| of_dead(b) && b.owner != Owner::Orphaned) {
        thread::sleep(Duration::from_millis(50));
        found = audit(pool)?;
    }
    print!("{found}");
    if found.orphans().count() > 0 {
        println!("{}", found.terminate_orphans(pool)?);
    }
    Ok(())
}
