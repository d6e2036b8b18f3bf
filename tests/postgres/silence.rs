//! A PostgreSQL server that stops answering: whatever waits for it ends within its limit, and no thread is left.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Cable, EPSILON, Proxy, SOON, Server, Stopped, alone, assert_no_threads_of, ms, skipped, slack, threads_named,
    wait_until, within,
};
use crossbeam_channel::{Receiver, bounded};
use millpond::postgres::{Pool, PostgresManager};
use millpond::{Builder, CloseReport, PooledConnection, Validate};
use postgres::NoTls;

const VALIDATION: Duration = ms(300);
const OPEN: Duration = ms(600);
const CLOSE: Duration = ms(400);
const GRACE: Duration = ms(300);
/// How long a cancel request may take before the connection is cut without.
const CANCEL: Duration = Duration::from_secs(1);

/// A pool that checks whatever it hands out, with limits that a test can wait for.
fn impatient(params: &str, name: &str) -> Builder<PostgresManager<NoTls>> {
    let manager = PostgresManager::parse(params, NoTls).unwrap();
    let builder = manager.builder().name(name).max_size(4).validate(Validate::Always);
    builder.validation_timeout(VALIDATION).open_timeout(OPEN).close_timeout(CLOSE)
}

#[track_caller]
fn assert_within(what: Duration, from: Duration, to: Duration) {
    assert!(from <= what && what <= to, "{what:?} is not within {from:?} and {to:?}");
}

/// Nothing is under way, and nothing is abandoned that has not come back.
#[track_caller]
fn assert_at_rest(pool: &Pool, deadline: Instant) {
    let rest = || {
        let s = pool.stats();
        s.checking + s.opening + s.closing + s.abandoned == 0
    };
    assert!(wait_until(deadline, rest), "{}", pool.stats());
}

/// Neither the pool's threads nor those that cancel.
#[track_caller]
fn assert_no_threads(name: &str) {
    assert_no_threads_of(&[&format!("{name}-"), "millpond-cance"]);
}

#[track_caller]
fn assert_works(pool: &Pool) {
    let mut client = pool.get_timeout(SOON).unwrap();
    assert_eq!(client.query_one("SELECT 42", &[]).unwrap().get::<_, i32>(0), 42);
}

/// The pool ends with nothing left, here and on the server.
#[track_caller]
fn assert_ends(pool: &Pool, server: &Server, app: &str) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_no_threads(pool.name());
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
}

/// A thread in a query that takes a minute. How it ended, and when.
struct Sleeper {
    id: u64,
    ended: Receiver<(Instant, postgres::Error)>,
}

impl Sleeper {
    fn start(pool: &Pool, is_active: impl Fn() -> bool) -> Sleeper {
        // The thread's own: a close does not wait for what its own thread has checked out.
        let (pool, (begin, begun), (end, ended)) = (pool.clone(), bounded(1), bounded(1));
        thread::spawn(move || {
            let mut client = pool.get().unwrap();
            begin.send(PooledConnection::info(&client).id).unwrap();
            let error = client.batch_execute("SELECT pg_sleep(60)").expect_err("a minute has not passed");
            end.send((Instant::now(), error)).unwrap();
        });
        let id = begun.recv_timeout(SOON).unwrap();
        assert!(wait_until(within(SOON), is_active), "the query does not run");
        Sleeper { id, ended }
    }

    /// Asserts that the report has it as cut, and that it ended before `deadline`.
    #[track_caller]
    fn ended(&self, report: &CloseReport, deadline: Instant) -> postgres::Error {
        assert_eq!(report.left.iter().map(|row| row.id).collect::<Vec<_>>(), [self.id], "{report}");
        assert_eq!(report.aborted, [self.id], "{report}");
        assert!(report.to_string().contains("(aborted)"), "{report}");
        let (at, error) = self.ended.recv_timeout(SOON).expect("the query still runs");
        assert!(at <= deadline, "{:?} late", at - deadline);
        error
    }
}

fn sleeps(server: &Server, app: &str) -> bool {
    server.backends(app).iter().any(|b| b.state == "active" && b.query.contains("pg_sleep"))
}

// ---------------------------------------------------------------------------------------------------- a silent server

#[test]
fn a_validation_ends_at_its_limit() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "silent-validation");
    let proxy = Proxy::to(server.addr());
    let pool = impatient(&proxy.conninfo(app), "silval").open().unwrap();
    drop([pool.get().unwrap(), pool.get().unwrap()]);

    proxy.pause();
    let begun = Instant::now();
    let error = pool.get_timeout(ms(1_000)).unwrap_err();
    assert_within(begun.elapsed(), ms(1_000), ms(1_000) + slack());
    assert!(error.is_timeout(), "{error}");
    assert!(error.to_string().contains("no answer to an attempt to connect"), "{error}");
    assert_at_rest(&pool, within(OPEN + EPSILON));
    assert_eq!(pool.state().connections, 0, "both were tried, and cut");

    // A deadline that comes before the limit costs the caller no more.
    proxy.resume();
    assert_works(&pool);
    proxy.pause();
    let begun = Instant::now();
    assert!(pool.get_timeout(ms(100)).unwrap_err().is_timeout());
    assert_within(begun.elapsed(), ms(100), ms(100) + slack());
    assert_at_rest(&pool, within(OPEN + EPSILON));

    proxy.resume();
    assert_works(&pool);
    assert_ends(&pool, server, app);
}

#[test]
fn a_query_ends_when_the_pool_has_closed() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "silent-query");
    let proxy = Proxy::to(server.addr());
    for silent in [false, true] {
        let pool = impatient(&proxy.conninfo(app), "silquery").open().unwrap();
        let sleeper = Sleeper::start(&pool, || sleeps(server, app));
        if silent {
            proxy.pause();
        }
        let begun = Instant::now();
        let report = pool.close(GRACE);
        assert_within(begun.elapsed(), GRACE, GRACE + slack());
        if silent {
            // The request to cancel meets the same silence, and is abandoned.
            sleeper.ended(&report, begun + GRACE + CANCEL + EPSILON);
        } else {
            let error = sleeper.ended(&report, begun + GRACE + EPSILON);
            assert_eq!(error.code().map(|code| code.code()), Some("57014"), "cancelled before it was cut: {error}");
        }
        assert_no_threads("silquery");
        proxy.resume();
        assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    }
}

#[test]
fn a_drop_ends_at_its_limit() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "silent-drop");
    let proxy = Proxy::to(server.addr());
    let pool = impatient(&proxy.conninfo(app), "sildrop").open().unwrap();
    let get = || {
        proxy.resume();
        pool.get_timeout(SOON).unwrap()
    };
    let quick = |what: &str, drop: &mut dyn FnMut()| {
        let begun = Instant::now();
        drop();
        assert!(begun.elapsed() < slack(), "{what} took {:?}", begun.elapsed());
    };

    // The end of the statement is under way, and a `Client`'s drop waits for the answer.
    let mut client = get();
    client.query("SELECT 1", &[]).unwrap();
    proxy.pause();
    let mut client = Some(client);
    quick("a return", &mut || drop(client.take()));
    assert_eq!(pool.state().idle_connections, 1);
    pool.recycle();
    assert_at_rest(&pool, within(CLOSE + EPSILON));

    // So it does for that to a ping that was not answered in time.
    for discard in [false, true] {
        let mut client = get();
        proxy.pause();
        client.is_valid(ms(100)).unwrap_err();
        assert!(!client.is_closed());
        let mut client = Some(client);
        let given_back = Instant::now();
        quick("a return", &mut || match discard {
            true => client.take().into_iter().for_each(PooledConnection::discard),
            false => drop(client.take()),
        });
        // An effort to read the answer, and one to have it cancelled.
        assert_at_rest(&pool, given_back + CLOSE + EPSILON);
        assert_eq!(pool.state().connections, 0);
    }

    // A transaction is to be rolled back.
    let mut client = get();
    client.batch_execute("BEGIN").unwrap();
    proxy.pause();
    let mut client = Some(client);
    quick("a return", &mut || drop(client.take()));
    assert_at_rest(&pool, within(CLOSE + EPSILON));
    assert_eq!(pool.state().connections, 0);

    proxy.resume();
    assert_works(&pool);
    assert_ends(&pool, server, app);
}

#[test]
fn a_storm_of_attempts_leaves_no_thread() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "silent-open");
    let proxy = Proxy::to(server.addr());
    let pool = impatient(&proxy.conninfo(app), "silopen").open_timeout(ms(200)).open().unwrap();
    proxy.silent(true);
    pool.recycle();
    let over = Arc::new(AtomicBool::new(false));
    let most = thread::spawn({
        let over = Arc::clone(&over);
        move || {
            let mut most = Vec::new();
            while !over.load(SeqCst) {
                let seen = threads_named("silopen-");
                if seen.len() > most.len() {
                    most = seen;
                }
                thread::sleep(ms(5));
            }
            most
        }
    });
    let waiters: Vec<_> = (0..10)
        .map(|_| {
            let pool = pool.clone();
            thread::spawn(move || {
                let begun = Instant::now();
                let error = pool.get_timeout(ms(1_500)).unwrap_err();
                (begun.elapsed(), error.to_string())
            })
        })
        .collect();
    for waiter in waiters {
        let (took, error) = waiter.join().unwrap();
        assert_within(took, ms(1_500), ms(1_500) + slack());
        assert!(error.contains("no answer to an attempt to connect"), "{error}");
    }
    over.store(true, SeqCst);
    let most = most.join().unwrap();
    // The reaper, four that open, as many that cut them, one that logs.
    assert!((2..=10).contains(&most.len()), "{most:?}");
    assert!(pool.stats().failed_opens > 4, "one after the other was abandoned: {}", pool.stats());
    assert_at_rest(&pool, within(ms(200) + EPSILON));

    proxy.silent(false);
    assert_works(&pool);
    assert_ends(&pool, server, app);
}

// ---------------------------------------------------------------------------------------------------- one silent
// backend

#[test]
fn a_stopped_backend_costs_its_connection_only() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "silent-backend");
    let pool = impatient(&server.conninfo(app), "silback").open().unwrap();
    let pid = pool.get().unwrap().backend_pid().unwrap();
    let stopped = Stopped::stop_numbers([pid]);

    let begun = Instant::now();
    let mut client = pool.get_timeout(SOON).unwrap();
    // Its validation, and a connect.
    assert_within(begun.elapsed(), VALIDATION, VALIDATION + OPEN);
    assert_ne!(client.backend_pid(), Some(pid));
    assert!(client.query_one("SELECT 1", &[]).is_ok());
    drop(client);
    assert_at_rest(&pool, within(EPSILON));
    assert_eq!(pool.state().connections, 1);
    drop(stopped);
    assert_eq!(server.wait_for(app, 1, within(SOON)), 1, "it was hung up on");

    // A query in a stopped backend: the cancel request goes to the postmaster, and reaches nobody.
    let sleeper = Sleeper::start(&pool, || sleeps(server, app));
    let stopped = Stopped::stop_numbers([server.backends(app)[0].pid]);
    let begun = Instant::now();
    let report = pool.close(GRACE);
    assert_within(begun.elapsed(), GRACE, GRACE + slack());
    sleeper.ended(&report, begun + GRACE + CANCEL + EPSILON);
    assert_no_threads("silback");
    drop(stopped);
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
}

// ---------------------------------------------------------------------------------------------------- a black hole

/// A server at the far end of a cable, and how to reach it from the near end.
fn beyond(cable: &Cable, app: &str) -> (Server, String) {
    let server = cable.far.run(|| {
        let server = Server::with(&[("listen_addresses", &format!("127.0.0.1,{}", cable.far.address))]);
        server.trust("192.0.2.0/24");
        server
    });
    let params = server.conninfo(app).replace("127.0.0.1", cable.far.address);
    let reachable = || params.parse::<postgres::Config>().unwrap().connect(NoTls).is_ok();
    assert!(cable.near.run(|| wait_until(within(SOON), reachable)), "{params}: no way there");
    (server, params)
}

#[test]
fn a_black_hole() {
    let _alone = alone();
    let cable = match Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return skipped("a_black_hole", &why),
    };
    let (server, params) = beyond(&cable, "hole");
    cable.near.run(|| {
        let pool = impatient(&params, "hole").open().unwrap();
        let [mut idle, mut dropped] = [pool.get().unwrap(), pool.get().unwrap()];
        let sleeper = Sleeper::start(&pool, || cable.far.run(|| sleeps(&server, "hole")));
        for client in [&mut idle, &mut dropped] {
            client.query("SELECT 1", &[]).unwrap();
        }
        drop(idle);
        cable.cut();

        let begun = Instant::now();
        let error = pool.get_timeout(ms(1_000)).unwrap_err();
        assert_within(begun.elapsed(), ms(1_000), ms(1_000) + slack());
        assert!(error.is_timeout(), "{error}");
        assert_at_rest(&pool, within(OPEN + EPSILON));
        assert_eq!(pool.state().connections, 2, "the one that was idle was cut");

        let begun = Instant::now();
        drop(dropped);
        assert!(begun.elapsed() < slack(), "{:?}", begun.elapsed());
        pool.recycle();
        assert_at_rest(&pool, within(CLOSE + EPSILON));
        assert_eq!(pool.state().connections, 1);

        let begun = Instant::now();
        let report = pool.close(GRACE);
        assert_within(begun.elapsed(), GRACE, GRACE + slack());
        sleeper.ended(&report, begun + GRACE + CANCEL + EPSILON);
        assert_no_threads("hole");
    });

    cable.mend();
    cable.near.run(|| {
        let pool = impatient(&params, "hole2").open().unwrap();
        assert_works(&pool);
        assert!(pool.close(SOON).is_complete());
        assert_no_threads("hole2");
    });
}

#[test]
fn tcp_user_timeout_ends_a_query_in_a_black_hole() {
    /// The kernel looks at the time when it sends again, which it does after 0.2, 0.6, 1.4 and 3.0 seconds.
    const KERNEL: Duration = ms(1_500);
    let _alone = alone();
    let cable = match Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return skipped("tcp_user_timeout_ends_a_query_in_a_black_hole", &why),
    };
    let (_server, params) = beyond(&cable, "hole");
    cable.near.run(|| {
        let pool = impatient(&(params + " tcp_user_timeout=2"), "usertime").open().unwrap();
        let mut client = pool.get().unwrap();
        cable.cut();
        let begun = Instant::now();
        client.query("SELECT 1", &[]).unwrap_err();
        assert_within(begun.elapsed(), ms(2_000), ms(2_000) + KERNEL + slack());
        drop(client);
        assert_at_rest(&pool, within(EPSILON));
        assert_eq!(pool.state().connections, 0);
        assert!(pool.close(SOON).is_complete());
        assert_no_threads("usertime");
    });
}
