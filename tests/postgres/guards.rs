//! What the server does on its own when a client is gone.

use crate::support::{Again, Server, ms, wait_until};
use millpond::postgres::{Error, Pool, PostgresManager, Reset, ServerGuards};
use postgres::NoTls;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

fn manager(params: &str) -> PostgresManager<NoTls> {
    PostgresManager::parse(params, NoTls).unwrap()
}

fn params() -> String {
    format!("host=127.0.0.1 port={} user=postgres dbname=postgres", Server::shared().port())
}

fn show(pool: &Pool, name: &str) -> String {
    pool.get().unwrap().query_one(&format!("SHOW {name}"), &[]).unwrap().get(0)
}

#[test]
fn all_are_set_and_stay_set() {
    let _beside = crate::support::beside_others();
    let guards = ServerGuards {
        idle_session_timeout: Some(Duration::from_secs(3600)),
        idle_in_transaction_session_timeout: Some(Duration::from_secs(60)),
        tcp_keepalives_idle: Some(Duration::from_secs(61)),
        tcp_keepalives_interval: Some(Duration::from_secs(11)),
        tcp_keepalives_count: Some(4),
        tcp_user_timeout: Some(Duration::from_secs(62)),
        client_connection_check_interval: Some(ms(1500)),
        ..ServerGuards::default()
    };
    for reset in [Reset::Rollback, Reset::DiscardAll] {
        let manager = manager(&params()).reset(reset).server_guards(guards);
        let pool = manager.builder().max_size(1).open().unwrap();
        for time in ["first", "second"] {
            for (name, value) in [
                ("idle_session_timeout", "1h"),
                ("idle_in_transaction_session_timeout", "1min"),
                // What the socket has, by the server's own account.
                ("tcp_keepalives_idle", "61"),
                ("tcp_keepalives_interval", "11"),
                ("tcp_keepalives_count", "4"),
                ("tcp_user_timeout", "62000"),
                ("client_connection_check_interval", "1500ms"),
            ] {
                assert_eq!(show(&pool, name), value, "{name}, {time} use, {reset:?}");
            }
        }
        assert_eq!(pool.stats().opens, 1);
    }
}

#[test]
fn off_by_default() {
    let _beside = crate::support::beside_others();
    let pool = manager(&params()).builder().open().unwrap();
    for name in ["idle_session_timeout", "idle_in_transaction_session_timeout", "client_connection_check_interval"] {
        assert_eq!(show(&pool, name), "0", "{name}");
    }
}

#[test]
fn one_that_the_server_does_not_know_is_named() {
    let _beside = crate::support::beside_others();
    let guards = ServerGuards { transaction_timeout: Some(Duration::from_secs(60)), ..ServerGuards::default() };
    let pool = manager(&params()).server_guards(guards).builder().open();
    if Server::shared().version() >= 17 {
        return assert_eq!(show(&pool.unwrap(), "transaction_timeout"), "1min");
    }
    let e = pool.unwrap_err();
    assert!(e.is_connect(), "for good: {e:?}");
    assert!(e.to_string().contains("unrecognized configuration parameter \"transaction_timeout\""), "{e}");
    assert!(e.to_string().contains("cannot set the server guards"), "{e}");
    let typed = e.cause().unwrap().downcast_ref::<Error>().unwrap();
    assert_eq!(typed.code().unwrap().code(), "42704");
}

#[test]
fn what_would_end_the_pool_s_own_is_refused() {
    let _beside = crate::support::beside_others();
    let guards = ServerGuards { idle_session_timeout: Some(Duration::from_secs(60)), ..ServerGuards::default() };
    let manager = manager(&params()).server_guards(guards);
    let e = manager.clone().builder().open().unwrap_err();
    assert!(e.is_connect(), "{e:?}");
    assert!(e.to_string().contains("idle_session_timeout is 60.0 s"), "{e}");
    assert!(e.to_string().contains("unused for 10.0 min (max_idle)"), "{e}");
    assert!(manager.builder().max_idle(Duration::from_secs(30)).open().is_ok());
}

#[test]
fn an_idle_session_is_ended() {
    let _beside = crate::support::beside_others();
    let name = format!("forgetful [{}]", std::process::id());
    let guards = ServerGuards { idle_session_timeout: Some(ms(1500)), ..ServerGuards::default() };
    let manager = manager(&params()).server_guards(guards);
    let pool = manager.builder().name("forgetful").max_idle(ms(100)).open().unwrap();
    let _in_use = pool.get().unwrap();
    // (One that went idle before this was checked out may not be quite gone.)
    assert_eq!(Server::shared().wait_for(&name, 1, Instant::now() + PATIENCE), 1);
    assert_eq!(Server::shared().wait_for(&name, 0, Instant::now() + PATIENCE), 0, "a forgotten one goes too");
}

/// Not a test of its own: what [`the_server_looks_after_the_killed`] runs as another process.
#[test]
#[ignore = "the work of a process that another test starts"]
fn busy_process() {
    let task = Again::task();
    let (guarded, params) = task.split_once(' ').unwrap();
    let interval = (guarded == "guarded").then_some(ms(200));
    let guards = ServerGuards { client_connection_check_interval: interval, ..ServerGuards::default() };
    let pool = manager(params).server_guards(guards).builder().name(guarded).open().unwrap();
    pool.get().unwrap().batch_execute("SELECT pg_sleep(600)").unwrap();
}

#[test]
fn the_server_looks_after_the_killed() {
    let _beside = crate::support::beside_others();
    let server = Server::shared();
    for guarded in ["guarded", "unguarded"] {
        let mut child = Again::run("guards::busy_process", &format!("{guarded} {}", params()));
        let name = format!("{guarded} [{}]", child.id());
        let busy = || server.backends(&name).iter().any(|b| b.state == "active" && b.query.contains("pg_sleep"));
        assert!(wait_until(Instant::now() + PATIENCE, busy), "{:?}", server.backends(&name));
        child.end();
        let left = server.wait_for(&name, 0, Instant::now() + if guarded == "guarded" { PATIENCE } else { ms(1000) });
        assert_eq!(left, i64::from(guarded == "unguarded"), "{guarded}");
        server.terminate(&name);
    }
}
