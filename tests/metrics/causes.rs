//! Why a pool is down, by its metrics alone: each fault has a type of its own.

use crate::page::{Page, collected, recorder, reported};
use crate::support::picky::{picky, with_password};
use crate::support::{Proxy, SOON, Server, alone, ms, wait_until, within};
use millpond::metrics::Pools;
use millpond::postgres::PostgresManager;
use millpond::{Pool, Stats};
use postgres::{Config, NoTls};

/// The types of error that a page shows, and how many of each.
fn types(page: &Page) -> Vec<(String, f64)> {
    let failures = page.samples.iter().filter(|(name, ..)| name == "millpond_connections_open_failures_total");
    let typed = failures.map(|(_, labels, n)| (labels["error_type"].clone(), *n));
    typed.filter(|&(_, n)| n > 0.0).collect()
}

/// What both pages, and the stats, say of a pool that cannot connect so.
fn down(config: Config) -> Stats {
    let pool = Pool::builder().open_timeout(ms(300)).build_unchecked(PostgresManager::new(config, NoTls));
    let pools = Pools::of(&pool);
    assert!(types(&Page::parse(&collected(&pools))).is_empty(), "nothing has happened yet");
    assert!(pool.get_timeout(ms(400)).is_err());
    assert!(wait_until(within(SOON), || pool.stats().failed_opens > 0), "{}", pool.stats());
    // Nothing more happens to it.
    assert!(pool.close(SOON).is_complete());
    let stats = pool.stats();
    let expected: Vec<_> = stats.failed_opens_by_type().map(|(t, n)| (t.to_string(), n as f64)).collect();
    assert_eq!(types(&Page::parse(&collected(&pools))), expected);
    assert_eq!(types(&Page::parse(&reported(&pools, &recorder()))), expected);
    stats
}

#[test]
fn each_fault_has_a_type_of_its_own() {
    let _alone = alone();
    let server = picky();
    let config = || with_password(server, "metrics-causes", "right");
    let behind = |proxy: &Proxy| {
        let mut config = Config::new();
        config.host("127.0.0.1").port(proxy.addr().port()).user("postgres").dbname("postgres");
        config
    };
    let (refuses, silent) = (Proxy::to(server.addr()), Proxy::to(server.addr()));
    refuses.refuse();
    silent.silent(true);
    let full = Server::with(&[("max_connections", "4"), ("superuser_reserved_connections", "0")]);
    // Who saw that it is up may not be quite gone.
    assert_eq!(full.wait_for("starter", 0, within(SOON)), 0);
    let mut others = Vec::new();
    while let Ok(client) = full.config("others").connect(NoTls) {
        others.push(client);
    }
    let mut read_only = config();
    read_only.target_session_attrs(postgres::config::TargetSessionAttrs::ReadWrite);
    read_only.options("-c default_transaction_read_only=on");
    let mut no_socket = Config::new();
    no_socket.host_path("/no/such/folder").user("postgres");
    for (fault, config, error_type) in [
        ("nobody listens", behind(&refuses), "connection_refused"),
        ("no answer", behind(&silent), "timeout"),
        ("a wrong password", config().password("wrong").clone(), "28P01"),
        ("no such database", config().dbname("nowhere").clone(), "3D000"),
        ("a full server", full.config("metrics-causes"), "53300"),
        ("no unix socket", no_socket, "not_found"),
        ("no TLS", config().ssl_mode(postgres::config::SslMode::Require).clone(), "tls"),
        ("a NUL in the user's name", config().user("pic\0ky").clone(), "invalid_configuration"),
        ("a node that only reads", read_only.clone(), "target_session_attrs"),
    ] {
        let stats = down(config);
        assert_eq!(stats.failed_opens_of(error_type), stats.failed_opens, "{fault}: {stats}");
        assert!(stats.to_string().contains(&format!(" failed: {} {error_type}\n", stats.failed_opens)), "{stats}");
        let last = stats.last_error.as_ref().expect(fault);
        assert!(last.cause.error_type() == error_type, "{fault}: {last}");
    }
}
