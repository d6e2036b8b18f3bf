//! What PostgreSQL refuses for good fails at once, in its own words; what it refuses for now is tried again.

use crate::support::picky::{picky, refused_logins, set_password, with_password};
use crate::support::{Proxy, Server, alone, ms, slack, wait_until};
use millpond::postgres::{Error, PostgresManager};
use millpond::{Builder, Pool};
use postgres::{Config, NoTls};
use std::thread;
use std::time::{Duration, Instant};

/// The promise, and some for a machine that does more than this.
const AT_ONCE: Duration = ms(100);

fn builder(config: Config) -> Builder<PostgresManager<NoTls>> {
    PostgresManager::new(config, NoTls).builder().connection_timeout(Duration::from_secs(20))
}

/// The SQLSTATE that a pool's error carries.
fn state(e: &millpond::Error) -> String {
    let cause = e.cause().unwrap_or_else(|| panic!("no cause: {e}"));
    let typed = cause.downcast_ref::<Error>().unwrap_or_else(|| panic!("no type: {e}"));
    typed.code().unwrap_or_else(|| panic!("no code: {e}")).code().to_owned()
}

#[test]
fn what_is_for_good_fails_at_once_in_the_servers_words() {
    let _alone = alone();
    let server = picky();
    server.connect().batch_execute("CREATE DATABASE walled").unwrap();
    server.connect().batch_execute("REVOKE CONNECT ON DATABASE walled FROM PUBLIC").unwrap();
    let config = |change: fn(&mut Config) -> &mut Config| {
        let mut config = with_password(server, "refusals", "right");
        change(&mut config);
        config
    };
    for (what, config, code, words) in [
        ("wrong password", config(|c| c.password("wrong")), "28P01", "password authentication failed"),
        ("no such role", config(|c| c.user("nobody-here").password("x")), "28000", "role \"nobody-here\""),
        ("no such database", config(|c| c.dbname("nowhere")), "3D000", "database \"nowhere\" does not exist"),
        ("no permission", config(|c| c.dbname("walled")), "42501", "permission denied for database \"walled\""),
        ("misspelt option", config(|c| c.options("-c wrok_mem=1")), "42704", "wrok_mem"),
        ("bad value", config(|c| c.options("-c work_mem=much")), "22023", "work_mem"),
    ] {
        let began = Instant::now();
        let e = builder(config).build_error();
        let took = began.elapsed();
        assert!(e.is_connect() && e.to_string().contains(words), "{what}: {e}");
        assert_eq!(state(&e), code, "{what}");
        assert!(took <= AT_ONCE + slack(), "{what}: {took:?}");
    }
}

trait BuildError {
    fn build_error(self) -> millpond::Error;
}

impl BuildError for Builder<PostgresManager<NoTls>> {
    fn build_error(self) -> millpond::Error {
        self.open().map(drop).expect_err("it came to be")
    }
}

#[test]
fn nobody_hammers_the_server_and_everybody_is_told() {
    let _alone = alone();
    let server = picky();
    let before = refused_logins(server);
    let manager = PostgresManager::new(with_password(server, "refusals-hammer", "wrong"), NoTls);
    // A floor asks without anybody asking.
    let pool = Pool::builder().min_idle(2).parallel_opens(1).build_unchecked(manager);
    let asked = Instant::now();
    thread::scope(|s| {
        let waiters: Vec<_> = (0..8).map(|_| s.spawn(|| pool.get().map(drop).unwrap_err())).collect();
        for e in waiters.into_iter().map(|w| w.join().unwrap()) {
            assert!(e.is_connect(), "{e}");
            assert_eq!(state(&e), "28P01", "every waiter can look at it");
        }
    });
    assert!(asked.elapsed() <= AT_ONCE + slack(), "{:?}", asked.elapsed());
    // For five seconds some ask, over and over.
    while asked.elapsed() < Duration::from_secs(5) {
        assert!(pool.get().unwrap_err().is_connect());
        thread::sleep(ms(10));
    }
    let logins = refused_logins(server) - before;
    assert!(logins <= 2, "{logins} logins in five seconds");
}

#[test]
fn passwords_are_mended() {
    let _alone = alone();
    let server = picky();
    let manager = PostgresManager::new(with_password(server, "refusals-mended", "new"), NoTls);
    let pool = Pool::builder().build_unchecked(manager);
    assert!(pool.get().unwrap_err().is_connect());
    set_password(server, "new");
    pool.recycle(); // or after the back-off
    let mended = pool.get().map(drop);
    set_password(server, "right");
    mended.unwrap();
}

#[test]
fn of_several_hosts_it_is_the_last_one_s_word_that_counts() {
    let _alone = alone();
    // The first refuses for good; the second is away for a moment.
    let (first, second) = (Server::shared(), picky());
    second.connect().batch_execute("CREATE DATABASE only_there").unwrap();
    for observe in [true, false] {
        let away = Proxy::to(second.addr());
        away.refuse();
        let mut config = Config::new();
        config.host("127.0.0.1").port(first.port()).host("127.0.0.1").port(away.addr().port());
        config.user("postgres").dbname("only_there").application_name("refusals-hosts");
        let manager = PostgresManager::new(config, NoTls).observe(observe);
        let pool = Pool::builder().build_unchecked(manager);
        let error = pool.get_timeout(ms(300)).map(drop).unwrap_err();
        assert!(error.is_timeout(), "observed: {observe}: {error}");
        assert_eq!(error.cause().unwrap().error_type(), "connection_refused", "observed: {observe}: {error}");
        away.accept();
        // Not after a back-off as after a refusal.
        drop(pool.get_timeout(Duration::from_secs(3)).unwrap());
        assert_eq!(pool.stats().failed_opens_of("3D000"), 0, "observed: {observe}: {}", pool.stats());
        drop(pool);
    }
    assert_eq!(second.wait_for("refusals-hosts", 0, Instant::now() + Duration::from_secs(20)), 0);
    second.connect().batch_execute("DROP DATABASE only_there").unwrap();
}

#[test]
fn a_full_server_is_tried_again() {
    // To start a server is a load, and others assert on time.
    let _alone = alone();
    let server = Server::with(&[("max_connections", "5"), ("superuser_reserved_connections", "0")]);
    let mut config = server.config("refusals-full");
    config.user("postgres");
    // Who saw that it is up may not be quite gone, and would leave room when all seem to be taken.
    assert_eq!(server.wait_for("starter", 0, Instant::now() + Duration::from_secs(20)), 0);
    // As many as are left when the test's own observer is connected.
    let mut squatters = Vec::new();
    while let Ok(client) = server.config("squatter").connect(NoTls) {
        squatters.push(client);
    }
    let pool = builder(config.clone()).connection_timeout(ms(300)).open();
    let e = pool.map(drop).unwrap_err();
    assert!(e.is_timeout() && e.to_string().contains("too many clients already"), "{e}");
    assert_eq!(state(&e), "53300");

    let pool = Pool::builder().build_unchecked(PostgresManager::new(config, NoTls));
    thread::scope(|s| {
        let waiter = s.spawn(|| pool.get().map(drop));
        assert!(wait_until(Instant::now() + Duration::from_secs(20), || pool.stats().failed_opens > 0));
        drop(squatters.pop());
        waiter.join().unwrap().expect("served once there is room");
    });
}
