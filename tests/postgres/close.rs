//! P4: close closes, under all that can be the matter with a server, and from wherever it is called.
//!
//! Every trouble is met by every way to close. Each time the close takes no longer than its grace, says what is left,
//! and later nothing is: no thread of the pool, no connection at the server.

use crate::guide::Process;
use crate::support::{
    Database, Proxy, SEEN, SOON, Server, alone, beside_others, ms, threads_named, wait_until, within,
};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use millpond::event::{HandleEvent, ReleaseEvent};
use millpond::postgres::{Pool, PooledConnection, PostgresManager};
use millpond::{CloseReport, ConnectionState, ErrorKind};
use parking_lot::Mutex;
use postgres::NoTls;
use std::fmt;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What is the matter when the pool is closed. In each case two connections are in use, of which one is returned as
/// soon as its caller sees that the pool is closed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    /// Nothing: the other one is returned as well.
    Nothing,
    /// Nothing passes between the pool and the server, and the other one waits for an answer.
    BlackHole,
    /// The other one is returned as well; a connect hangs, for which a caller waits.
    HungConnect,
    /// The other one runs a query that has no end.
    StuckQuery,
    /// The other one is kept, and 64 callers wait for it.
    Waiters,
}

/// Who closes the pool.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Caller,
    /// A guard, dropped by a panic.
    Unwinding,
    /// A hook, on a thread of the pool's own.
    OwnThread,
    /// Two callers at the same time.
    Twice,
    /// A caller, while others check out, resize and recycle, and the network comes and goes.
    Beside,
}

const WAYS: [Way; 5] = [Way::Caller, Way::Unwinding, Way::OwnThread, Way::Twice, Way::Beside];
const GRACE: Duration = ms(300);

/// Closes the pool when it hears that a connection was closed, once, and tells of it.
struct Closes(Mutex<Option<Pool>>, Sender<CloseReport>);

impl HandleEvent for Closes {
    fn handle_release(&self, _: ReleaseEvent) {
        // Not under the lock: the next connection's release asks as well.
        let pool = self.0.lock().take();
        if let Some(pool) = pool {
            let _ = self.1.send(pool.close(GRACE));
        }
    }
}

impl fmt::Debug for Closes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closes")
    }
}

/// The handler, shared between the pool and the test, which gives it the pool.
#[derive(Debug)]
struct Shared(Arc<Closes>);

impl HandleEvent for Shared {
    fn handle_release(&self, event: ReleaseEvent) {
        self.0.handle_release(event);
    }
}

/// Callers of the pool, which hear when the pool is closed.
struct Callers {
    /// When each waiter was told that the pool is closed.
    waiters: Vec<JoinHandle<Instant>>,
    others: Vec<JoinHandle<()>>,
}

fn is_closed(error: &millpond::Error) -> bool {
    matches!(error.kind(), ErrorKind::Closed(_))
}

fn wait_for_close(pool: &Pool) {
    assert!(wait_until(within(SOON), || pool.is_closed()));
}

/// A caller that has a connection until the pool is closed.
fn returns(pool: &Pool, connection: PooledConnection) -> JoinHandle<()> {
    let pool = pool.clone();
    thread::spawn(move || {
        wait_for_close(&pool);
        drop(connection);
    })
}

/// A caller that does this with a connection, which ends in an error.
fn fails_at(mut connection: PooledConnection, query: &'static str) -> JoinHandle<()> {
    thread::spawn(move || drop(connection.batch_execute(query).expect_err("an end of what has none")))
}

/// Callers that wait until the pool is closed.
fn wait(pool: &Pool, n: usize) -> Vec<JoinHandle<Instant>> {
    let wait = |pool: Pool| {
        move || {
            let error = pool.get().map(drop).expect_err("a connection out of nowhere");
            assert!(is_closed(&error), "{error}");
            Instant::now()
        }
    };
    let waiters = (0..n).map(|_| thread::spawn(wait(pool.clone()))).collect();
    assert!(wait_until(within(SOON), || pool.stats().waiting as usize == n), "{}", pool.stats());
    waiters
}

/// Callers that do all that can be done with a pool, until it is closed.
fn busy(pool: &Pool, proxy: &Arc<Proxy>, pausing: bool) -> Vec<JoinHandle<()>> {
    let (gets, resizes, pauses) = (pool.clone(), pool.clone(), pool.clone());
    let proxy = Arc::clone(proxy);
    let get = move || {
        loop {
            let was_closed = gets.is_closed();
            match gets.get_timeout(ms(2)) {
                Ok(_) => assert!(!was_closed, "handed out by a closed pool"),
                Err(error) if is_closed(&error) => return,
                Err(_) => {}
            }
        }
    };
    let resize = move || {
        for n in (2..6).cycle().take_while(|_| !resizes.is_closed()) {
            resizes.resize(n).expect("a size");
            resizes.recycle();
            thread::yield_now();
        }
    };
    let pause = move || {
        while pausing && !pauses.is_closed() {
            proxy.pause();
            thread::yield_now();
            proxy.resume();
            thread::sleep(ms(5));
        }
    };
    vec![thread::spawn(get.clone()), thread::spawn(get), thread::spawn(resize), thread::spawn(pause)]
}

/// Closes the pool in this way. Returns when that began, when it ended, and the reports.
fn close(
    way: Way,
    pool: &Pool,
    closes: &Closes,
    reported: &Receiver<CloseReport>,
    spare: PooledConnection,
    callers: &mut Callers,
) -> (Instant, Instant, Vec<CloseReport>) {
    if way == Way::OwnThread {
        *closes.0.lock() = Some(pool.clone());
        let began = Instant::now();
        PooledConnection::discard(spare);
        let report = reported.recv_timeout(SOON).expect("a report from the hook");
        return (began, Instant::now(), vec![report]);
    }
    callers.others.push(returns(pool, spare));
    let began = Instant::now();
    let reports = match way {
        Way::Caller | Way::Beside => vec![pool.close(GRACE)],
        Way::Twice => thread::scope(|s| {
            let closers = [(); 2].map(|()| s.spawn(|| pool.close(GRACE)));
            closers.map(|closer| closer.join().unwrap()).into()
        }),
        Way::Unwinding => {
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                let _guard = pool.guard().grace(GRACE);
                resume_unwind(Box::new("on purpose"));
            }));
            assert!(unwound.is_err());
            vec![]
        }
        Way::OwnThread => unreachable!(),
    };
    (began, Instant::now(), reports)
}

fn closes_under(trouble: Trouble, way: Way) {
    println!("{trouble:?}, {way:?}");
    let (server, app) = (Server::shared(), format!("close-{trouble:?}-{way:?}"));
    let proxy = Arc::new(Proxy::to(server.addr()));
    let name = format!("{}{}close", trouble as u8, way as u8);
    let manager = PostgresManager::parse(&proxy.conninfo(&app), NoTls).unwrap();
    let (report, reported) = unbounded();
    let closes = Arc::new(Closes(Mutex::new(None), report));
    let builder = manager.builder().name(&name).event_handler(Box::new(Shared(Arc::clone(&closes))));
    let pool = builder.max_size(if trouble == Trouble::HungConnect { 3 } else { 2 }).open().unwrap();
    // If this test panics, all who use the pool hear that it is closed.
    let _guard = pool.guard().grace(Duration::ZERO);
    let (used, spare) = (pool.get().unwrap(), pool.get().unwrap());
    let [used_id, spare_id] = [&used, &spare].map(|connection| PooledConnection::info(connection).id);

    // ---- the trouble
    let (end, at_end) = bounded::<()>(0);
    let mut callers = Callers { waiters: vec![], others: vec![] };
    match trouble {
        Trouble::Nothing => callers.others.push(returns(&pool, used)),
        Trouble::BlackHole => {
            proxy.pause();
            callers.others.push(fails_at(used, "SELECT 1"));
        }
        Trouble::HungConnect => {
            proxy.silent(true);
            callers.others.push(returns(&pool, used));
            callers.waiters = wait(&pool, 1);
            assert!(wait_until(within(SOON), || proxy.accepted() == 3), "{}", pool.stats());
        }
        Trouble::StuckQuery => {
            callers.others.push(fails_at(used, "SELECT pg_sleep(60)"));
            let runs = || server.backends(&app).iter().any(|backend| backend.state == "active");
            assert!(wait_until(within(SOON), runs));
        }
        Trouble::Waiters => {
            callers.others.push(thread::spawn(move || {
                assert!(at_end.recv().is_err());
                drop(used);
            }));
            callers.waiters = wait(&pool, 64);
        }
    }
    if way == Way::Beside {
        callers.others.extend(busy(&pool, &proxy, trouble != Trouble::BlackHole));
    }

    // ---- the close
    let (began, ended, reports) = close(way, &pool, &closes, &reported, spare, &mut callers);
    assert!(ended - began <= GRACE + SEEN, "it took {:?}: {reports:#?}", ended - began);
    for waiter in callers.waiters {
        let late = waiter.join().unwrap().saturating_duration_since(began);
        assert!(late <= SEEN, "a waiter was told only after {late:?}");
    }
    let error = pool.get().map(drop).unwrap_err();
    assert!(is_closed(&error), "{error}");
    let left = match trouble {
        Trouble::Nothing => None,
        Trouble::HungConnect => Some((ConnectionState::Opening, 3)),
        Trouble::BlackHole | Trouble::StuckQuery | Trouble::Waiters => Some((ConnectionState::InUse, used_id)),
    };
    // The hook does not wait for the close that it is part of, and it says so.
    let own = (way == Way::OwnThread).then_some((ConnectionState::Closing, spare_id));
    let mut expected: Vec<_> = left.into_iter().chain(own).collect();
    expected.sort_by_key(|row| row.1);
    let rows_of = |report: &CloseReport| report.left.iter().map(|row| (row.state, row.id)).collect::<Vec<_>>();
    let named = reports.iter().filter(|report| rows_of(report) == expected).count();
    for report in &reports {
        let rows = rows_of(report);
        // Of two closes the first one to end aborts what is left: that may be gone when the other one looks, which may
        // have begun later, and so has not used up its own grace.
        if way == Way::Twice && left.is_some() && rows.is_empty() && named == 1 {
            assert!(report.aborted.is_empty(), "{report}");
            continue;
        }
        if way == Way::Beside {
            // What the others had opened is there as well.
            assert!(expected.iter().all(|row| rows.contains(row)), "{report}, expected {expected:?}");
        } else {
            assert_eq!(rows, expected, "{report}");
        }
        match left {
            Some((_, id)) => {
                // The other of two closes may have aborted it between this one's look and its own abort.
                let by_any = way == Way::Twice && reports.iter().any(|report| report.aborted.contains(&id));
                let aborted = by_any || report.aborted.contains(&id);
                assert!(report.elapsed >= GRACE && aborted && !report.is_complete(), "{report}");
            }
            None if way == Way::Beside => {}
            None => {
                assert_eq!(report.is_complete(), own.is_none(), "{report}");
                assert!(report.elapsed < GRACE, "{report}");
            }
        }
    }
    if way == Way::Twice {
        let told: u32 = reports.iter().map(|report| report.waiters).sum();
        let waited = match trouble {
            Trouble::Waiters => 64,
            Trouble::HungConnect => 1,
            _ => 0,
        };
        assert_eq!(told, waited, "each waiter is told once: {reports:#?}");
    }

    // ---- and later nothing: what was aborted ends by itself
    drop(end);
    callers.others.into_iter().for_each(|caller| caller.join().unwrap());
    let report = pool.close(SOON);
    assert!(report.is_complete() && report.waiters == 0, "{report}");
    let mut threads = vec![];
    let gone = wait_until(within(SEEN), || {
        threads = threads_named(&format!("{name}-"));
        threads.is_empty()
    });
    assert!(gone, "{threads:?}");
    // What the proxy keeps back for the server passes now, and with it the end of each connection.
    proxy.resume();
    assert_eq!(server.wait_for(&app, 0, within(SOON)), 0, "connections at the server");
}

fn closes_in_every_way_under(trouble: Trouble) {
    let _beside = beside_others();
    WAYS.into_iter().for_each(|way| closes_under(trouble, way));
}

#[test]
fn in_every_way_with_nothing_the_matter() {
    closes_in_every_way_under(Trouble::Nothing);
}

#[test]
fn in_every_way_in_a_black_hole() {
    closes_in_every_way_under(Trouble::BlackHole);
}

#[test]
fn in_every_way_with_a_connect_that_hangs() {
    closes_in_every_way_under(Trouble::HungConnect);
}

#[test]
fn in_every_way_with_a_query_that_is_stuck() {
    closes_in_every_way_under(Trouble::StuckQuery);
}

#[test]
fn in_every_way_with_64_waiters() {
    closes_in_every_way_under(Trouble::Waiters);
}

const AT_WORK: &str = "close-at-work";

/// The process that ends as soon as its pool is closed, while all its connections wait for answers.
fn end_at_work(how: &str) -> ! {
    let (size, observe) = match how {
        "one" => (1, true),
        "one, not observed" => (1, false),
        "thirty" => (30, true),
        other => panic!("{other}?"),
    };
    let manager = PostgresManager::parse(&Database::get().conninfo(AT_WORK), NoTls).unwrap().observe(observe);
    let pool: Pool = manager.builder().name("at work").max_size(size).open().unwrap();
    for _ in 0..size {
        let pool = pool.clone();
        thread::spawn(move || {
            let mut connection = pool.get().unwrap();
            let _ = connection.simple_query("SELECT pg_sleep(600)");
            thread::park();
        });
    }
    // Until the test has seen them all, and closes the pipe.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    let report = pool.close(Duration::ZERO);
    std::process::exit(if report.aborted.len() == size as usize { 0 } else { 1 })
}

/// A server whose client is gone works on for an answer that nobody reads. So what is at work is cancelled, and the
/// cancels have left before `close` returns, though no logger is there for which it would wait.
#[test]
fn what_is_at_work_is_cancelled_though_the_process_ends_at_once() {
    const TEST: &str = "close::what_is_at_work_is_cancelled_though_the_process_ends_at_once";
    const END: &str = "MILLPOND_TEST_END_AT_WORK";
    if let Ok(how) = std::env::var(END) {
        end_at_work(&how);
    }
    let _alone = alone();
    let server = Server::shared();
    // (Threads of the pool that have nothing to do linger for some seconds after an open, and leave when it is closed.)
    for (how, size) in [("one", 1), ("one, not observed", 1), ("thirty", 30)] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", TEST, "--test-threads=1"]).env(END, how).env("DATABASE_URL", server.url());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process(command.spawn().unwrap());
        let at_work = || server.backends(AT_WORK).iter().filter(|b| b.state == "active").count();
        assert!(wait_until(within(SOON), || at_work() == size), "{how}: {} are at work", at_work());
        drop(process.0.stdin.take());
        let mut status = None;
        assert!(
            wait_until(within(SOON), || {
                status = process.0.try_wait().unwrap();
                status.is_some()
            }),
            "{how}: it does not end"
        );
        assert!(status.unwrap().success(), "{how}: {status:?}");
        assert_eq!(server.wait_for(AT_WORK, 0, within(SEEN)), 0, "{how}");
    }
}
