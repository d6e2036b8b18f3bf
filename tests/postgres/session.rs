//! What a session leaves behind ends with its checkout: a cancel that comes late, an answer that nobody waited for, a
//! query that nobody reads, a transaction that has failed.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{EPSILON, Proxy, SOON, Server, alone, beside_others, ms, slack, wait_until};
use millpond::postgres::{Connection, Pool, PostgresManager, Reset};
use millpond::{CloseReason, CustomizeConnection, PooledConnection, Validate};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{Client, NoTls, SimpleQueryMessage};

/// How a connection reaches the server, and whether it is observed on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Tcp,
    TcpUnobserved,
    Unix,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::TcpUnobserved, Way::Unix];

impl Way {
    fn is_observed(self) -> bool {
        !matches!(self, Way::TcpUnobserved)
    }
}

fn manager(app: &str, way: Way) -> PostgresManager<NoTls> {
    let server = Server::shared();
    let params = match way {
        Way::Unix => server.unix_conninfo(app),
        Way::Tcp | Way::TcpUnobserved => server.conninfo(app),
    };
    PostgresManager::parse(&params, NoTls).unwrap().observe(way.is_observed())
}

fn pool(app: &str, way: Way) -> Pool {
    manager(app, way).builder().max_size(1).connection_timeout(SOON).open().unwrap()
}

fn code(e: &postgres::Error) -> &str {
    e.code().map_or("none", |code| code.code())
}

/// Fails unless each question gets its own answer, outside of a transaction.
#[track_caller]
fn assert_clean(client: &mut Client, what: &str) {
    for n in [7, 8, 9] {
        let row = client.query_one("SELECT $1::int4", &[&n]).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!(row.get::<_, i32>(0), n, "{what}: another's answer");
    }
    let answer = client.simple_query("SELECT now() = statement_timestamp()").unwrap();
    let idle = |m: &SimpleQueryMessage| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"));
    assert!(answer.iter().any(idle), "{what}: inside a transaction");
}

// ------------------------------------------------------------------------------------------------ notifications

/// A connection that listens keeps its place, however many notifications have come for it that nobody has read.
#[test]
fn a_long_backlog_of_notifications_costs_no_connection() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        for reset in [Reset::Rollback, Reset::DiscardAll] {
            let pool = manager("backlog", way).reset(reset).builder().max_size(1).validate(Validate::Always);
            let pool = pool.connection_timeout(SOON).open().unwrap();
            let mut client = pool.get().unwrap();
            let id = PooledConnection::info(&client).id;
            client.batch_execute("LISTEN backlog").unwrap();
            let notify = || {
                let mut other = Client::connect(&Server::shared().conninfo("notifier"), NoTls).unwrap();
                // More bytes than a first answer may have, but few messages: the pool reads them for a moment only.
                let many = "SELECT pg_notify('backlog', repeat('x', 7900) || n) FROM generate_series(1, 200) n";
                other.query(many, &[]).unwrap();
            };
            // In use, and idle.
            notify();
            drop(client);
            notify();
            let mut client = pool.get().unwrap();
            assert_clean(&mut client, &format!("{way:?}"));
            assert_eq!(PooledConnection::info(&client).id, id, "{way:?}, {reset:?}: {}", pool.stats());
        }
    }
}

// ---------------------------------------------------------------------------------------------------- cancelling

#[test]
fn a_cancel_after_the_return_reaches_nobody() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("late-cancel", way);
        let client = pool.get().unwrap();
        let (canceller, backend) = (client.canceller(), client.backend_pid());
        drop(client);
        let mut next = pool.get().unwrap();
        assert_eq!(next.backend_pid(), backend, "{way:?}: asking for a canceller costs nothing");
        let sleeper = thread::scope(|s| {
            let sleeper = s.spawn(|| next.batch_execute("SELECT pg_sleep(0.5)"));
            let mut observer = Server::shared().connect();
            let asleep = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'PgSleep'";
            assert!(wait_until(Instant::now() + SOON, || observer.query_opt(asleep, &[&backend]).unwrap().is_some()));
            let refused = canceller.cancel().expect_err("it says that it has done nothing");
            assert!(refused.to_string().contains("returned"), "{refused}");
            sleeper.join().unwrap()
        });
        assert!(sleeper.is_ok(), "{way:?}: {sleeper:?}");
        assert_eq!(pool.stats().opens, 1);
    }
}

/// A watchdog that fires about when the connection is returned: the next user never notices.
#[test]
fn a_cancel_that_races_with_the_return_reaches_nobody() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("race-cancel", way);
        let (fire, fired) = crossbeam_channel::bounded::<millpond::postgres::Canceller>(0);
        let watchdog = {
            let pool = pool.clone();
            thread::spawn(move || fired.iter().filter(|canceller| pool.manager().cancel(canceller).is_ok()).count())
        };
        for round in 0..60 {
            let client = pool.get().unwrap();
            fire.send(client.canceller()).unwrap();
            // From before the cancel to after it.
            let until = Instant::now() + Duration::from_micros(round * 10);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            drop(client);
            let mut next = pool.get().unwrap();
            next.batch_execute("SELECT pg_sleep(0.02)").unwrap_or_else(|e| panic!("{way:?}, {round}: {e:?}"));
        }
        drop(fire);
        println!("{way:?}: {} of 60 were sent", watchdog.join().unwrap());
    }
}

// ---------------------------------------------------------------------------------------------------- others' answers

fn refused_copy(c: &mut Client) {
    assert!(c.copy_in("COPY nowhere FROM STDIN").is_err());
}

/// After a COPY that the server refused each call gets the answer to the one before, and a ping says that all is well.
#[test]
fn another_calls_answer_reaches_nobody_where_nobody_watches() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("shifted", way);
        for calls in 0..4 {
            for left in ["", "SELECT 1", "BEGIN", "SELECT nonsense"] {
                for _ in 0..10 {
                    let mut client = pool.get().unwrap();
                    refused_copy(&mut client);
                    for _ in 0..calls {
                        let _ = client.batch_execute("");
                    }
                    let _ = client.batch_execute(left);
                    drop(client);
                    assert_clean(&mut pool.get().unwrap(), &format!("{way:?}, {calls} calls and '{left}'"));
                }
            }
        }
    }
}

/// The answer that comes may look like the one that is waited for: it answers another question all the same.
#[test]
fn an_answer_that_looks_right_is_not_taken_for_the_right_one() {
    let _beside = crate::support::beside_others();
    let ends: [&[&str]; 4] = [
        &["SELECT 'millpond 0', true, true"],
        &["SELECT '1', true, true", "SELECT '2', true, true", "SELECT '3', true, true"],
        // Whatever is asked in a failed transaction is answered alike.
        &["BEGIN", "SELECT nonsense", "SELECT 1", "SELECT 1", "SELECT 1"],
        &["", "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '25P02'; END $$"],
    ];
    for way in WAYS {
        let pool = pool("alike", way);
        for copies in 1..4 {
            for end in ends {
                for _ in 0..10 {
                    let mut client = pool.get().unwrap();
                    let copy = client.prepare("COPY nowhere FROM STDIN").unwrap();
                    for _ in 0..copies {
                        assert!(client.copy_in(&copy).is_err());
                    }
                    for sql in end {
                        let _ = client.simple_query(sql);
                    }
                    drop(client);
                    assert_clean(&mut pool.get().unwrap(), &format!("{way:?}, {copies} copies and {end:?}"));
                }
            }
        }
    }
}

/// What becomes of a COPY that fails before its first row is a matter of the moment.
#[test]
fn a_copy_that_a_trigger_stops_spoils_nobodys_answers() {
    let _beside = crate::support::beside_others();
    let sql = "CREATE TABLE IF NOT EXISTS guarded (n int);
        CREATE OR REPLACE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'stop'; END $$;
        CREATE OR REPLACE TRIGGER stop BEFORE INSERT ON guarded EXECUTE FUNCTION stop()";
    Server::shared().connect().batch_execute(sql).unwrap();
    for way in WAYS {
        let pool = pool("stopped", way);
        for round in 0..60 {
            let mut client = pool.get().unwrap();
            let copy = client.copy_in("COPY guarded FROM STDIN");
            if round % 2 == 0 {
                assert!(!matches!(copy.map(|copy| copy.finish()), Ok(Ok(_))));
            } else {
                drop(copy);
            }
            for _ in 0..round % 3 {
                let _ = client.batch_execute("SELECT 1");
            }
            drop(client);
            assert_clean(&mut pool.get().unwrap(), &format!("{way:?}, {round}"));
        }
    }
}

/// One that was broken off, or failed, is healthy.
#[test]
fn where_nobody_watches_a_failed_copy_costs_no_connection() {
    let _beside = crate::support::beside_others();
    let pool = pool("copies", Way::TcpUnobserved);
    let mut client = pool.get().unwrap();
    client.batch_execute("CREATE TABLE IF NOT EXISTS copies (n int4)").unwrap();
    drop(client);
    for _ in 0..10 {
        let mut client = pool.get().unwrap();
        let mut into = client.copy_in("COPY copies FROM STDIN").unwrap();
        into.write_all(b"1\n").unwrap();
        drop(into);
        drop(client);
        let mut client = pool.get().unwrap();
        let mut into = client.copy_in("COPY copies FROM STDIN").unwrap();
        into.write_all(b"no number\n").unwrap();
        assert!(into.finish().is_err());
        drop(client);
        assert_clean(&mut pool.get().unwrap(), "a failed COPY");
    }
    assert_eq!(pool.stats().opens, 1);
}

/// Each gives the `Client` into a user's hands.
#[test]
fn whatever_reaches_the_client_is_looked_after() {
    let _beside = crate::support::beside_others();
    type Reach = (&'static str, fn(&mut Connection));
    let ways_in: [Reach; 3] = [
        ("begin_with", |c| {
            let begun = c.begin_with(|c| {
                c.copy_in("COPY nowhere FROM STDIN")?;
                c.transaction()
            });
            assert!(begun.is_err());
        }),
        ("begin", |c| {
            let mut tx = c.begin().unwrap();
            assert!(tx.copy_in("COPY nowhere FROM STDIN").is_err());
        }),
        ("the client", |c| refused_copy(c)),
    ];
    for way in WAYS {
        let pool = pool("reached", way);
        for (what, reach) in ways_in {
            for _ in 0..40 {
                reach(&mut pool.get().unwrap());
                assert_clean(&mut pool.get().unwrap(), what);
            }
        }
    }
}

#[test]
fn what_was_notified_reaches_nobody_else() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("notified", way);
        let mut client = pool.get().unwrap();
        let channel = format!("notified_{way:?}").to_lowercase();
        client.execute_cached(&format!("LISTEN {channel}"), &[]).unwrap();
        let notify =
            format!("DO $$ BEGIN FOR i IN 1..2000 LOOP PERFORM pg_notify('{channel}', i::text); END LOOP; END $$");
        Server::shared().connect().batch_execute(&notify).unwrap();
        // They come before an answer, at the latest of the second call.
        for _ in 0..2 {
            client.query_cached("SELECT 1", &[]).unwrap();
        }
        drop(client);
        let mut next = pool.get().unwrap();
        assert_eq!(next.notifications().len(), 0, "{way:?}");
        assert_eq!(pool.stats().opens, 1);
    }
}

// ---------------------------------------------------------------------------------------------------- transactions

#[test]
fn a_commit_that_keeps_nothing_is_an_error() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let table = format!("kept_{way:?}");
        let mut server = Server::shared().connect();
        let sql = format!(
            "DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)"
        );
        server.batch_execute(&format!("SET client_min_messages = error; {sql}")).unwrap();
        let mut kept = || server.query_one(&format!("SELECT count(*) FROM {table}"), &[]).unwrap().get::<_, i64>(0);
        let insert = format!("INSERT INTO {table} VALUES ($1)");
        let pool = pool("commit", way);
        let mut client = pool.get().unwrap();
        // Of a failure the server's last word may still be under way.
        for late in [true, false] {
            for _ in 0..20 {
                let mut tx = client.begin().unwrap();
                tx.execute_cached(&insert, &[&1]).unwrap();
                tx.batch_execute("SELECT nonsense").unwrap_err();
                if !late {
                    tx.batch_execute("SELECT 1").unwrap_err();
                    thread::sleep(ms(1));
                    tx.batch_execute("SELECT 1").unwrap_err();
                }
                let error = tx.commit().expect_err("nothing is kept");
                assert_eq!(code(&error), "25P02", "{way:?}: {error:?}");
                assert_clean(&mut client, "after a commit that failed");
            }
        }
        assert_eq!(kept(), 0, "{way:?}");

        // Begun by the user's own words.
        let mut tx = client.begin_with(|c| c.build_transaction().read_only(true).start()).unwrap();
        tx.execute_cached(&insert, &[&1]).unwrap_err();
        assert_eq!(code(&tx.commit().unwrap_err()), "25P02");
        // What fails at the very end.
        let mut tx = client.begin().unwrap();
        for _ in 0..2 {
            tx.execute_cached(&insert, &[&1]).unwrap();
        }
        assert_eq!(code(&tx.commit().unwrap_err()), "23505", "{way:?}");
        assert_clean(&mut client, "after a constraint");
        assert_eq!(kept(), 0);
        // Within another.
        let mut tx = client.begin().unwrap();
        tx.execute_cached(&insert, &[&1]).unwrap();
        let mut inner = tx.begin().unwrap();
        inner.batch_execute("SELECT nonsense").unwrap_err();
        assert_eq!(code(&inner.commit().unwrap_err()), "25P02");
        assert_eq!(code(&tx.commit().unwrap_err()), "25P02", "{way:?}");
        // And all that goes well.
        let mut tx = client.begin().unwrap();
        let mut inner = tx.begin().unwrap();
        inner.execute_cached(&insert, &[&1]).unwrap();
        inner.commit().unwrap();
        tx.commit().unwrap();
        let mut tx = client.begin().unwrap();
        let mut inner = tx.begin().unwrap();
        inner.batch_execute("SELECT nonsense").unwrap_err();
        inner.rollback().unwrap();
        tx.execute_cached(&insert, &[&2]).unwrap();
        tx.commit().unwrap();
        assert_eq!(kept(), 2, "{way:?}");
        drop(client);
        assert_clean(&mut pool.get().unwrap(), "after all");
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn a_commit_takes_one_round_trip() {
    let _beside = beside_others();
    for observe in [true, false] {
        let proxy = Proxy::to(Server::shared().addr());
        let manager = PostgresManager::parse(&proxy.conninfo("commit-trips"), NoTls).unwrap().observe(observe);
        let pool = manager.builder().max_size(1).open().unwrap();
        let mut client = pool.get().unwrap();
        for _ in 0..5 {
            let mut tx = client.begin().unwrap();
            tx.execute_cached("SELECT 1", &[]).unwrap();
            let before = proxy.turns();
            tx.commit().unwrap();
            assert_eq!(proxy.turns() - before, 1, "observed: {observe}");
        }
    }
}

/// The server writes a warning to its log where there is no transaction to be ended.
#[test]
fn a_commit_that_failed_leaves_no_word_in_the_servers_log() {
    let _beside = crate::support::beside_others();
    let server = Server::start();
    for observe in [true, false] {
        let manager = PostgresManager::parse(&server.conninfo("quiet"), NoTls).unwrap().observe(observe);
        let pool = manager.builder().max_size(1).open().unwrap();
        let mut client = pool.get().unwrap();
        client.batch_execute("CREATE TEMP TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)").unwrap();
        let mut tx = client.begin().unwrap();
        tx.batch_execute("INSERT INTO t VALUES (1), (1)").unwrap();
        assert_eq!(code(&tx.commit().unwrap_err()), "23505");
        let mut tx = client.begin().unwrap();
        tx.batch_execute("SELECT nonsense").unwrap_err();
        assert_eq!(code(&tx.commit().unwrap_err()), "25P02");
    }
    assert!(!server.log().contains("no transaction in progress"), "{}", server.log());
}

// ---------------------------------------------------------------------------------------------------- what still runs

/// Its first rows come at once, and then it runs for a minute.
const ENDLESS: &str =
    "SELECT CASE WHEN n > 4000 THEN pg_sleep(60)::text ELSE repeat('x', 100) END FROM generate_series(1, 5000) n";

/// Leaves a query behind that goes on in its backend.
fn half_read(client: &mut Client, sql: &str) {
    let mut rows = client.query_raw(sql, Vec::<i32>::new()).unwrap();
    assert!(rows.next().unwrap().is_some());
}

/// What the backend with this pid is doing; `None` if it is gone.
fn state(observer: &mut Client, pid: Option<i32>) -> Option<String> {
    let row = observer.query_opt("SELECT coalesce(state, '') FROM pg_stat_activity WHERE pid = $1", &[&pid]).unwrap();
    row.map(|row| row.get(0))
}

#[test]
fn what_is_abandoned_is_cancelled_before_its_slot_is_free() {
    let _beside = crate::support::beside_others();
    type Leave = (&'static str, fn(PooledConnection<PostgresManager<NoTls>>));
    let leaves: [Leave; 4] = [
        ("returned", drop),
        ("discarded", PooledConnection::discard),
        ("lost to a panic", |client| {
            let panic = catch_unwind(AssertUnwindSafe(move || {
                let _client = client;
                std::panic::resume_unwind(Box::new("on purpose"));
            }));
            assert!(panic.is_err());
        }),
        ("detached and dropped", |client| drop(PooledConnection::detach(client))),
    ];
    let mut observer = Server::shared().connect();
    for way in WAYS {
        for reset in [Reset::Rollback, Reset::DiscardAll, Reset::None] {
            // Unobserved and not to be reset, it goes to the next as it is.
            for (what, leave) in leaves.into_iter().skip(usize::from(reset == Reset::None && !way.is_observed())) {
                let mut builder = manager("abandoned", way).reset(reset).builder().max_size(1);
                if reset == Reset::DiscardAll {
                    // Then it is the customizer who drops it.
                    builder = builder.connection_customizer(Box::new(Nothing));
                }
                let pool = builder.connection_timeout(SOON).close_timeout(SOON).open().unwrap();
                let mut client = pool.get().unwrap();
                let pid = client.backend_pid();
                half_read(&mut client, ENDLESS);
                assert_eq!(state(&mut observer, pid).as_deref(), Some("active"));
                let begun = Instant::now();
                leave(client);
                let mut next = pool.get().unwrap();
                // A limit, an effort to read it, a cancel, a connect.
                assert!(begun.elapsed() < Duration::from_secs(4), "{way:?}, {what}: {:?}", begun.elapsed());
                let left = state(&mut observer, pid);
                assert_ne!(left.as_deref(), Some("active"), "{way:?}, {what}");
                assert_ne!(next.backend_pid(), pid, "cancelled, so never checked out again");
                assert_clean(&mut next, what);
            }
        }
    }
}

/// What a customizer does when a connection goes takes longer than it may.
#[derive(Debug)]
struct Lingers;

impl CustomizeConnection<Connection, millpond::postgres::Error> for Lingers {
    fn on_release(&self, mut c: Connection) {
        let _ = c.batch_execute("SELECT pg_sleep(60)");
    }
}

#[test]
fn what_takes_longer_than_its_limit_is_cancelled() {
    let _beside = crate::support::beside_others();
    let mut observer = Server::shared().connect();
    for way in WAYS {
        let builder = manager("lingers", way).builder().max_size(1).close_timeout(ms(300));
        let pool = builder.connection_customizer(Box::new(Lingers)).open().unwrap();
        let client = pool.get().unwrap();
        let pid = client.backend_pid();
        PooledConnection::discard(client);
        let asleep = |observer: &mut Client| state(observer, pid).as_deref() == Some("active");
        assert!(wait_until(Instant::now() + SOON, || asleep(&mut observer)), "{way:?}");
        assert!(wait_until(Instant::now() + SOON, || state(&mut observer, pid).is_none()), "{way:?}");
        assert!(wait_until(Instant::now() + SOON, || pool.stats().abandoned == 0), "{way:?}: {}", pool.stats());
    }
}

/// The default: `on_release` drops the connection.
#[derive(Debug)]
struct Nothing;

impl CustomizeConnection<Connection, millpond::postgres::Error> for Nothing {}

#[test]
fn a_little_that_is_left_to_read_costs_no_connection() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = pool("little", way);
        for _ in 0..10 {
            half_read(&mut pool.get().unwrap(), "SELECT generate_series(1, 1000)");
            assert_clean(&mut pool.get().unwrap(), "a little");
        }
        // On a busy machine even that may take long.
        assert!(pool.stats().opens <= 3, "{way:?}: {}", pool.stats());
    }
}

/// The thread that returns a connection reads nothing of what it left.
#[test]
fn a_return_does_not_wait_for_what_was_left() {
    let _alone = alone();
    let pool = pool("left", Way::Tcp);
    let round = || {
        let returned = |_| {
            let mut client = pool.get().unwrap();
            half_read(&mut client, "SELECT generate_series(1, 3000000)");
            thread::sleep(ms(20));
            let begun = Instant::now();
            drop(client);
            begun.elapsed()
        };
        let mut took: Vec<_> = (0..15).map(returned).collect();
        took.sort();
        took
    };
    // A few may meet a busy machine, and so may a round. To read on took ten times as long in every second one.
    let mut rounds = vec![];
    while rounds.last().is_none_or(|took: &Vec<_>| took[11] >= ms(2)) {
        assert!(rounds.len() < 3, "{rounds:?}");
        rounds.push(round());
    }
}

/// Where they do not survive the checkout, what comes with the answer to that does not either.
#[test]
fn what_is_notified_between_checkouts_reaches_nobody() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let pool = manager("between", way).reset(Reset::DiscardAll).builder().max_size(1).open().unwrap();
        let mut client = pool.get().unwrap();
        let channel = format!("between_{way:?}").to_lowercase();
        client.execute_cached(&format!("LISTEN {channel}"), &[]).unwrap();
        let notify =
            format!("DO $$ BEGIN FOR i IN 1..50 LOOP PERFORM pg_notify('{channel}', i::text); END LOOP; END $$");
        Server::shared().connect().batch_execute(&notify).unwrap();
        drop(client);
        let mut next = pool.get().unwrap();
        next.query_cached("SELECT 1", &[]).unwrap();
        assert_eq!(next.notifications().len(), 0, "{way:?}");
    }
}

/// A server that is silent as well: nothing waits longer than the limits.
#[test]
fn what_cannot_be_cancelled_is_aborted() {
    let _alone = alone();
    let proxy = Proxy::to(Server::shared().addr());
    let manager = PostgresManager::parse(&proxy.conninfo("mute"), NoTls).unwrap();
    for discard in [true, false] {
        proxy.resume();
        let pool =
            manager.clone().builder().max_size(1).close_timeout(ms(600)).connection_timeout(SOON).open().unwrap();
        let mut client = pool.get().unwrap();
        half_read(&mut client, ENDLESS);
        proxy.pause();
        let begun = Instant::now();
        if discard {
            PooledConnection::discard(client)
        } else {
            drop(client)
        }
        assert!(begun.elapsed() < slack());
        let gone =
            wait_until(begun + ms(600) + 2 * EPSILON, || pool.state().connections == 0 && pool.stats().abandoned == 0);
        assert!(gone, "{}", pool.stats());
        proxy.resume();
        assert!(pool.close(SOON).is_complete());
    }
    // Nobody was there to be told.
    Server::shared().terminate("mute");
}

// ---------------------------------------------------------------------------------------------------- DISCARD ALL

/// Sets a session up, as a customizer does, and counts how often.
#[derive(Debug)]
struct SetUp {
    times: Arc<AtomicUsize>,
    /// Fails from this time on.
    fails_from: usize,
}

impl CustomizeConnection<Connection, millpond::postgres::Error> for SetUp {
    fn on_acquire(&self, c: &mut Connection) -> Result<(), millpond::postgres::Error> {
        let fails = self.times.fetch_add(1, SeqCst) + 1 >= self.fails_from;
        c.batch_execute(if fails { "SELECT nonsense" } else { "SET search_path = nowhere; SET ROLE pg_monitor" })?;
        Ok(())
    }
}

#[test]
fn what_a_customizer_set_is_there_at_every_checkout() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        for reset in [Reset::Rollback, Reset::DiscardAll] {
            let times = Arc::new(AtomicUsize::new(0));
            let set_up = SetUp { times: Arc::clone(&times), fails_from: usize::MAX };
            let builder = manager("custom", way).reset(reset).builder().max_size(1);
            let pool = builder.connection_customizer(Box::new(set_up)).open().unwrap();
            for checkout in 0..4 {
                let mut client = pool.get().unwrap();
                let row = client.query_one("SELECT current_user::text, current_setting('search_path')", &[]).unwrap();
                let set = (row.get::<_, String>(0), row.get::<_, String>(1));
                assert_eq!(set, ("pg_monitor".into(), "nowhere".into()), "{way:?}, {reset:?}, {checkout}");
            }
            assert_eq!(pool.stats().opens, 1);
            if reset == Reset::Rollback {
                assert_eq!(times.load(SeqCst), 1, "once for each connection");
            }
        }
    }
}

#[test]
fn a_customizer_that_fails_after_a_reset_costs_the_connection() {
    let _beside = crate::support::beside_others();
    let times = Arc::new(AtomicUsize::new(0));
    let set_up = SetUp { times: Arc::clone(&times), fails_from: 2 };
    let builder = millpond::Pool::builder().max_size(1).connection_customizer(Box::new(set_up));
    let pool = builder.build_unchecked(manager("custom-fails", Way::Tcp).reset(Reset::DiscardAll));
    drop(pool.get().unwrap());
    let closed = || pool.stats().closed_for(CloseReason::ResetFailed) == 1;
    assert!(wait_until(Instant::now() + SOON, closed), "{}", pool.stats());
    assert!(times.load(SeqCst) >= 2);
}

/// The table in the documentation of `Reset`.
#[test]
fn what_a_session_has_set_stays_or_goes_as_documented() {
    let _beside = crate::support::beside_others();
    let left: [(&str, &str, bool); 10] = [
        ("SET ROLE pg_monitor", "SELECT current_user = 'pg_monitor'", false),
        ("SET search_path = nowhere", "SELECT current_setting('search_path') = 'nowhere'", false),
        (
            "SET default_transaction_read_only = on",
            "SELECT current_setting('default_transaction_read_only') = 'on'",
            false,
        ),
        ("SET client_encoding = 'LATIN1'", "SELECT current_setting('client_encoding') = 'LATIN1'", false),
        (
            "SELECT pg_advisory_lock(4712)",
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())",
            false,
        ),
        (
            "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT",
            "SELECT EXISTS (SELECT FROM pg_cursors WHERE name = 'held')",
            false,
        ),
        ("CREATE TEMP TABLE kept_for_later (n int)", "SELECT to_regclass('kept_for_later') IS NOT NULL", false),
        ("LISTEN to_me", "SELECT EXISTS (SELECT pg_listening_channels())", false),
        ("PREPARE mine AS SELECT 1", "SELECT EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'mine')", true),
        ("BEGIN; SET LOCAL work_mem = '123kB'", "SELECT current_setting('work_mem') = '123kB'", false),
    ];
    for way in WAYS {
        for reset in [Reset::Rollback, Reset::DiscardAll] {
            for (sql, is_there, survives_a_discard) in left {
                let pool = manager("table", way).reset(reset).builder().max_size(1).open().unwrap();
                pool.get().unwrap().batch_execute(sql).unwrap();
                let answer = pool.get().unwrap().simple_query(is_there).unwrap();
                let there =
                    |m: &SimpleQueryMessage| matches!(m, SimpleQueryMessage::Row(row) if row.get(0) == Some("t"));
                let expected = match reset {
                    Reset::Rollback => !sql.contains("SET LOCAL"),
                    _ => survives_a_discard,
                };
                assert_eq!(answer.iter().any(there), expected, "{way:?}, {reset:?}: {sql}");
                assert_eq!(pool.stats().opens, 1, "{way:?}, {reset:?}: {sql}");
            }
        }
    }
}

/// `postgres` looks up types with statements of its own, and does not notice when a `DISCARD ALL` has removed them.
#[test]
fn types_are_found_again_after_somebody_discarded_all() {
    let _beside = crate::support::beside_others();
    for way in WAYS {
        let name = format!("discarded_{way:?}").to_lowercase();
        let mut server = Server::shared().connect();
        for suffix in ["a", "b"] {
            let sql = format!("DROP TYPE IF EXISTS {name}_{suffix}; CREATE TYPE {name}_{suffix} AS ENUM ('x')");
            server.batch_execute(&format!("SET client_min_messages = error; {sql}")).unwrap();
        }
        let pool = pool("discarded", way);
        let mut client = pool.get().unwrap();
        client.query(&format!("SELECT 'x'::{name}_a"), &[]).unwrap();
        client.batch_execute("DISCARD ALL").unwrap();
        let e = client.query(&format!("SELECT 'x'::{name}_b"), &[]).unwrap_err();
        assert_eq!(code(&e), "26000", "{way:?}: if `postgres` has learned it, all the better");
        drop(client);
        let mut client = pool.get().unwrap();
        client.query(&format!("SELECT 'x'::{name}_b"), &[]).unwrap_or_else(|e| panic!("{way:?}: {e:?}"));
    }
}
