//! PostgreSQL's own manager behind PgBouncer, whose every word may mean something else.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::PoolMode::{Session, Transaction};
use crate::support::{
    Bouncer, EPSILON, SEEN, SOON, Server, alone, assert_no_threads, beside_others, ms, slack, wait_until, within,
};
use crossbeam_channel::bounded;
use millpond::postgres::{Error, Pool, PostgresManager, Reset};
use millpond::{Builder, PooledConnection, Validate};
use postgres::{Client, NoTls, SimpleQueryMessage};

const VALIDATION: Duration = ms(300);
const OPEN: Duration = ms(600);
const CLOSE: Duration = ms(400);
/// How long a request to cancel may take before the connection is cut without.
const CANCEL: Duration = Duration::from_secs(1);
/// PgBouncer looks at its clients' timeouts three times a second, and counts in whole seconds.
const BOUNCER: Duration = ms(1_500);

fn manager(params: &str) -> PostgresManager<NoTls> {
    PostgresManager::parse(params, NoTls).unwrap()
}

/// A pool that checks whatever it hands out, with limits that a test can wait for.
fn impatient(bouncer: &Bouncer, name: &str) -> Builder<PostgresManager<NoTls>> {
    let builder = manager(&bouncer.conninfo(name)).builder().name(name).max_size(4).validate(Validate::Always);
    builder.validation_timeout(VALIDATION).open_timeout(OPEN).close_timeout(CLOSE)
}

/// The first column of the first row. By the simple protocol: behind a transaction pooler a prepared statement may be
/// looked for on another server.
fn ask(client: &mut Client, question: &str) -> Result<String, postgres::Error> {
    let answer = client.simple_query(question)?;
    let first = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(String::from),
        _ => None,
    });
    Ok(first.unwrap_or_default())
}

#[track_caller]
fn assert_works(pool: &Pool) {
    assert_eq!(ask(&mut pool.get_timeout(SOON).unwrap(), "SELECT 6 * 7").unwrap(), "42");
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

/// The pool ends with nothing left, neither here nor at the bouncer.
#[track_caller]
fn assert_ends(pool: &Pool, bouncer: &Bouncer) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_no_threads(pool.name());
    assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
}

// ---------------------------------------------------------------------------------------------------- at work

#[test]
fn many_threads_share_few() {
    let _alone = alone();
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[("default_pool_size", "4")]);
        let pool = manager(&bouncer.conninfo("bouncer-share")).builder().name("bshare").max_size(4).open().unwrap();
        thread::scope(|scope| {
            for n in 0..8 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..50 {
                        let mut client = pool.get().unwrap();
                        assert!(client.is_observed());
                        let question = format!("SELECT {n} * 1000 + {round}");
                        assert_eq!(ask(&mut client, &question).unwrap(), (n * 1000 + round).to_string());
                        let mut transaction = client.transaction().unwrap();
                        transaction.batch_execute("CREATE TEMP TABLE t (i int) ON COMMIT DROP").unwrap();
                        if round % 2 == 0 {
                            transaction.commit().unwrap();
                        }
                    }
                });
            }
        });
        let stats = pool.stats();
        assert_eq!((stats.checkouts, stats.closes), (400, 0), "{mode:?}: {stats}");
        assert!(bouncer.clients() <= 4);
        assert_ends(&pool, &bouncer);
    }
}

#[test]
fn an_open_transaction_does_not_reach_the_next() {
    let _beside = beside_others();
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[]);
        for (name, reset) in [("brollback", Reset::Rollback), ("bdiscard", Reset::DiscardAll)] {
            let manager = manager(&bouncer.conninfo("bouncer-handover")).reset(reset);
            let pool = manager.builder().name(name).max_size(1).open().unwrap();
            for left in ["BEGIN", "BEGIN; SELECT 1", "BEGIN; SELECT nonsense", "SET statement_timeout = '7s'"] {
                let _ = pool.get().unwrap().batch_execute(left);
                let mut client = pool.get().unwrap();
                let clean = ask(&mut client, "SELECT now() = statement_timestamp()").unwrap();
                assert_eq!(clean, "t", "{mode:?}, {reset:?}: {left}");
                if reset == Reset::DiscardAll {
                    assert_eq!(ask(&mut client, "SHOW statement_timeout").unwrap(), "0");
                }
            }
            assert_eq!(pool.stats().opens, 1, "{mode:?}, {reset:?}: cleaned, not replaced");
            assert_ends(&pool, &bouncer);
        }
    }
}

#[test]
fn the_stock_manager_works_too() {
    let _beside = beside_others();
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[]);
        let manager = manager(&bouncer.conninfo("bouncer-stock")).into_r2d2();
        let pool =
            millpond::Pool::builder().name("bstock").max_size(2).validate(Validate::Always).build(manager).unwrap();
        for _ in 0..20 {
            assert_eq!(ask(&mut pool.get().unwrap(), "SELECT 42").unwrap(), "42");
        }
        assert_eq!(pool.stats().closes, 0, "{}", pool.stats());
        let report = pool.close(SOON);
        assert!(report.is_complete(), "{report}");
        assert_no_threads("bstock");
        assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
    }
}

/// They are random bits. Some are negative before 1.24, and are left out.
#[test]
fn process_ids_are_the_bouncers_own() {
    let _beside = beside_others();
    let bouncer = Bouncer::start(Server::shared(), Transaction, &[]);
    let pool = manager(&bouncer.conninfo("bouncer-pids")).builder().name("bpids").max_size(24).open().unwrap();
    let mut clients: Vec<_> = (0..24).map(|_| pool.get().unwrap()).collect();
    for client in &mut clients {
        assert_ne!(ask(client, "SELECT pg_backend_pid()").unwrap().parse().ok(), client.backend_pid());
        let (pid, info) = (client.backend_pid(), PooledConnection::info(client));
        assert_eq!(info.server_id, u64::try_from(pid.unwrap()).ok(), "{pid:?}");
    }
    let negative = clients.iter().filter(|client| client.backend_pid().is_some_and(|pid| pid < 0)).count();
    let nameless = pool.connections().iter().filter(|row| row.server_id.is_none()).count();
    assert_eq!(nameless, negative, "{}", pool.connections());
    assert!(pool.connections().to_string().contains("bouncer.rs"), "{}", pool.connections());
    drop(clients);
    assert_ends(&pool, &bouncer);
}

// ---------------------------------------------------------------------------------------------------- refused

/// PgBouncer says 08P01 to this as it does to nearly everything: the pool goes on trying, and gives the reason.
#[test]
fn options_are_refused_but_not_for_good() {
    let _beside = beside_others();
    let bouncer = Bouncer::start(Server::shared(), Session, &[]);
    let params = bouncer.conninfo("bouncer-options") + " options='-c statement_timeout=7000'";
    let begun = Instant::now();
    let builder = manager(&params).builder().name("boptions").connection_timeout(ms(700));
    let error = builder.open().unwrap_err();
    assert_within(begun.elapsed(), ms(700), ms(700) + slack());
    assert!(error.is_timeout(), "{error}");
    // Since 1.20 it reads them, and takes the parameters that it tracks.
    let says = match bouncer.version() {
        (1, ..20) => "unsupported startup parameter: options (SQLSTATE 08P01)",
        _ => "unsupported startup parameter in options: statement_timeout (SQLSTATE 08P01)",
    };
    assert!(error.to_string().contains(says), "{error}");
    assert!(!error.cause().unwrap().downcast_ref::<Error>().unwrap().is_permanent());
    assert_no_threads("boptions");
    assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
}

// ---------------------------------------------------------------------------------------------------- stuck

/// A paused bouncer lets everybody in and then says nothing.
#[test]
fn a_pause_is_ridden_through() {
    let _alone = alone();
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[]);
        let pool = impatient(&bouncer, "bpause").open().unwrap();
        if mode == Session {
            // It would wait for the pool to hang up.
            pool.recycle();
            assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
        } else {
            drop([pool.get().unwrap(), pool.get().unwrap()]);
        }
        bouncer.admin("PAUSE");

        let begun = Instant::now();
        let error = pool.get_timeout(ms(1_500)).unwrap_err();
        assert_within(begun.elapsed(), ms(1_500), ms(1_500) + slack());
        assert!(error.is_timeout(), "{error}");
        assert!(error.to_string().contains("no answer"), "{mode:?}: {error}");
        assert_at_rest(&pool, within(OPEN + EPSILON));
        assert_eq!(pool.state().connections, 0);
        // (PgBouncer itself notices only when it resumes that those it keeps waiting have hung up.)

        // A caller that is ready to wait gets through.
        thread::scope(|scope| {
            let (waits, waiting) = bounded(0);
            let pool = &pool;
            let waiter = scope.spawn(move || {
                waits.send(()).unwrap();
                let mut client = pool.get_timeout(SOON).unwrap();
                ask(&mut client, "SELECT 6 * 7").unwrap()
            });
            waiting.recv().unwrap();
            thread::sleep(ms(300));
            assert!(!waiter.is_finished());
            bouncer.admin("RESUME");
            assert_eq!(waiter.join().unwrap(), "42");
        });
        assert_works(&pool);
        assert_ends(&pool, &bouncer);
    }
}

/// Without the observer the connection cannot be cut, but it is never handed out either.
#[test]
fn a_pause_is_ridden_through_unobserved() {
    let _alone = alone();
    let bouncer = Bouncer::start(Server::shared(), Transaction, &[]);
    let manager = manager(&bouncer.conninfo("bblind")).observe(false);
    let builder = manager.builder().name("bblind").max_size(2).validate(Validate::Always);
    let pool = builder.validation_timeout(VALIDATION).open_timeout(OPEN).close_timeout(CLOSE).open().unwrap();
    drop(pool.get().unwrap());
    // Each return is looked at.
    assert_at_rest(&pool, within(SOON));
    bouncer.admin("PAUSE");
    let begun = Instant::now();
    let error = pool.get_timeout(ms(1_500)).unwrap_err();
    assert_within(begun.elapsed(), ms(1_500), ms(1_500) + slack());
    assert!(error.is_timeout(), "{error}");
    bouncer.admin("RESUME");
    assert_works(&pool);
    assert_ends(&pool, &bouncer);
}

/// The bouncer has one server connection, and somebody sits on it.
#[test]
fn an_exhausted_bouncer_is_ridden_through() {
    let _alone = alone();
    let settings = [("default_pool_size", "1"), ("query_wait_timeout", "1")];
    let bouncer = Bouncer::start(Server::shared(), Transaction, &settings);
    for observe in [true, false] {
        let manager = manager(&bouncer.conninfo("bfull")).observe(observe);
        let pool = manager.builder().name("bfull").max_size(2).open_timeout(SOON).open().unwrap();
        let mut early = pool.get().unwrap();
        let mut sitter =
            bouncer.conninfo("bouncer-sitter").parse::<postgres::Config>().unwrap().connect(NoTls).unwrap();
        sitter.batch_execute("BEGIN").unwrap();

        let begun = Instant::now();
        let error = pool.get_timeout(ms(3_500)).unwrap_err();
        assert_within(begun.elapsed(), ms(3_500), ms(3_500) + slack());
        // The `postgres` crate may see the end of the connection before the reason. So may the observer before 1.16: that
        // the error ends the connection is not said with it.
        let says = error.to_string().contains("query_wait_timeout (SQLSTATE 08P01)");
        let may_miss_it = !observe || bouncer.version() < (1, 16);
        assert!(says || may_miss_it && error.to_string().contains("connection closed"), "{observe}: {error}");

        // It says the same to those who were there before.
        let begun = Instant::now();
        early.simple_query("SELECT 1").unwrap_err();
        assert_within(begun.elapsed(), ms(900), BOUNCER + slack());
        drop(early);
        assert!(wait_until(within(SEEN), || pool.state().connections == 0), "it is of no use to anybody");

        sitter.batch_execute("COMMIT").unwrap();
        assert_works(&pool);
        assert_at_rest(&pool, within(EPSILON));
        drop(sitter);
        assert_ends(&pool, &bouncer);
    }
}

#[test]
fn a_restart_is_ridden_through() {
    let _alone = alone();
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[]);
        let pool = impatient(&bouncer, "brestart").open().unwrap();
        drop([pool.get().unwrap(), pool.get().unwrap()]);
        let mut checked_out = pool.get().unwrap();

        bouncer.kill();
        let begun = Instant::now();
        let error = pool.get_timeout(ms(500)).unwrap_err();
        assert_within(begun.elapsed(), ms(500), ms(500) + slack());
        assert!(error.to_string().to_lowercase().contains("connection refused"), "{error}");
        checked_out.simple_query("SELECT 1").unwrap_err();
        drop(checked_out);
        assert_at_rest(&pool, within(EPSILON));
        assert_eq!(pool.state().connections, 0, "all were found dead");

        bouncer.start_again();
        assert_works(&pool);
        assert_ends(&pool, &bouncer);
    }
}

/// PgBouncer 1.18 ends itself when the sender of a request to cancel hangs up before it has passed that on.
#[test]
fn a_close_leaves_nothing_on_the_bouncer() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "bclose");
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(server, mode, &[]);
        let pool = impatient(&bouncer, app).open().unwrap();
        drop([pool.get().unwrap(), pool.get().unwrap(), pool.get().unwrap()]);
        let (end, ended) = bounded(1);
        thread::spawn({
            let pool = pool.clone();
            move || {
                let error = pool.get().unwrap().batch_execute("SELECT pg_sleep(60)").unwrap_err();
                end.send((Instant::now(), error)).unwrap();
            }
        });
        let sleeps = || server.backends(app).iter().any(|b| b.state == "active" && b.query.contains("pg_sleep"));
        assert!(wait_until(within(SOON), sleeps), "{:?}", server.backends(app));
        assert_eq!(bouncer.clients(), 3);

        let (begun, grace) = (Instant::now(), ms(300));
        let report = pool.close(grace);
        assert_within(begun.elapsed(), grace, grace + slack());
        assert_eq!((report.left.len(), report.aborted.len()), (1, 1), "{report}");
        let (at, error) = ended.recv_timeout(SOON).expect("the query still runs");
        assert_eq!(error.code().map(|code| code.code()), Some("57014"), "cancelled before it was cut: {error}");
        assert!(at < begun + grace + CANCEL + slack(), "{:?}", at - begun);
        assert_no_threads(app);
        assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
        drop(bouncer);
        assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    }
}

#[test]
fn a_user_can_cancel() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "bcancel");
    for mode in [Session, Transaction] {
        let bouncer = Bouncer::start(server, mode, &[]);
        let pool = impatient(&bouncer, app).open().unwrap();
        for round in 0..10 {
            let mut client = pool.get().unwrap();
            let canceller = client.canceller();
            // The server shows the last query for a moment after its error was heard.
            let query = format!("SELECT pg_sleep(60), {round}");
            let is_it = query.clone();
            let sleeper = thread::spawn(move || client.batch_execute(&query).unwrap_err());
            let sleeps = || server.backends(app).iter().any(|b| b.state == "active" && b.query == is_it);
            assert!(wait_until(within(SOON), sleeps), "{:?}", server.backends(app));
            pool.manager().cancel(&canceller).unwrap();
            assert_eq!(sleeper.join().unwrap().code().map(|code| code.code()), Some("57014"));
        }
        assert_ends(&pool, &bouncer);
    }
}
