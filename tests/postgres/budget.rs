//! How many connections the server allows, and what `build` makes of it.

use crate::support::{Server, capture, logged, wait_until};
use log::Level;
use millpond::postgres::{Budget, Error, PostgresManager, budget};
use postgres::NoTls;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A server with 20 connections, 3 of them for superusers; on it each test has roles and databases of its own.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::with(&[("max_connections", "20"), ("superuser_reserved_connections", "3")]))
}

/// Within what time the pool logs, and the server shows, what is due.
const SOON: Duration = Duration::from_secs(5);

fn manager(role: &str, database: &str) -> PostgresManager<NoTls> {
    let params = format!("host=127.0.0.1 port={} user={role} dbname={database}", server().port());
    PostgresManager::parse(&params, NoTls).unwrap()
}

fn sql(text: &str) {
    // One by one: a database is not created in a transaction.
    let mut client = server().connect();
    text.split(';').for_each(|statement| client.batch_execute(statement).unwrap());
}

fn allowance(role: &str, database: &str) -> millpond::postgres::Allowance {
    let params = format!("host=127.0.0.1 port={} user={role} dbname={database}", server().port());
    budget(&mut postgres::Client::connect(&params, NoTls).unwrap()).unwrap()
}

/// What was logged of this pool and the sum.
fn sums(pool: &str) -> Vec<String> {
    let pool = format!("pool '{pool}'");
    let told = logged(|r| r.level <= Level::Info && r.text.contains(&pool) && r.text.contains(" x "));
    told.into_iter().map(|r| format!("{} {} {}", r.level, r.target, r.text)).collect()
}

/// The same, once the pool has logged it, which it does on a thread of its own.
fn sums_soon(pool: &str) -> Vec<String> {
    assert!(wait_until(Instant::now() + SOON, || !sums(pool).is_empty()), "nothing of '{pool}'");
    sums(pool)
}

fn is_logged_soon(text: &str) -> bool {
    wait_until(Instant::now() + SOON, || !logged(|r| r.text.contains(text)).is_empty())
}

#[test]
fn too_much_is_refused_with_the_sum() {
    let _beside = crate::support::beside_others();
    sql("CREATE ROLE refused LOGIN");
    let manager = manager("refused", "postgres").processes(8).budget(Budget::Refuse);
    let begun = Instant::now();
    let e = manager.builder().name("refused").max_size(17).open().unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "for good, so at once: {:?}", begun.elapsed());
    assert!(e.is_connect(), "{e:?}");
    let sum = "8 processes x 17 = 136, but the server allows refused 17 (max_connections 20 less 3 reserved)";
    assert!(e.to_string().contains(sum), "{e}");
    assert!(e.cause().unwrap().downcast_ref::<Error>().unwrap().is_permanent());
    let name = format!("refused [{}]", std::process::id());
    assert_eq!(server().wait_for(&name, 0, Instant::now() + SOON), 0);
}

#[test]
fn too_much_is_warned_of() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    sql("CREATE ROLE warned LOGIN");
    let pool = manager("warned", "postgres").processes(2).builder().name("warned").max_size(9).open().unwrap();
    let sum = "2 processes x 9 = 18, but the server allows warned 17 (max_connections 20 less 3 reserved)";
    assert_eq!(sums_soon("warned"), [format!("WARN millpond pool 'warned': {sum}")]);
    assert!(pool.get().is_ok());
}

#[test]
fn exactly_enough_is_enough() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    sql("CREATE ROLE enough LOGIN");
    let manager = manager("enough", "postgres").processes(1).budget(Budget::Refuse);
    let _pool = manager.clone().builder().name("enough").max_size(17).open().unwrap();
    let sums = sums_soon("enough");
    assert!(sums[0].starts_with("INFO millpond pool 'enough': 1 process x 17 = 17, and"), "{sums:?}");
    let e = manager.builder().name("enough").max_size(18).open().unwrap_err();
    assert!(e.to_string().contains("1 process x 18 = 18, but"), "{e}");
}

#[test]
fn nothing_is_compared_unasked() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    let pool =
        manager("postgres", "postgres").budget(Budget::Refuse).builder().name("unasked").max_size(500).open().unwrap();
    // The pool logs in order, so what it logs of its end comes last.
    drop(pool);
    assert!(is_logged_soon("pool 'unasked': closing"));
    assert_eq!(sums("unasked"), [""; 0]);
}

#[test]
fn no_process_is_no_number() {
    let _beside = crate::support::beside_others();
    let e = manager("postgres", "postgres").processes(0).builder().open().unwrap_err();
    assert!(e.to_string().contains("processes is 0"), "{e}");
}

#[test]
fn the_limits_of_role_and_database() {
    let _beside = crate::support::beside_others();
    sql(
        "CREATE ROLE limited LOGIN CONNECTION LIMIT 5; CREATE ROLE free LOGIN; CREATE DATABASE limited CONNECTION LIMIT 7; \
         CREATE ROLE god LOGIN SUPERUSER CONNECTION LIMIT 1",
    );
    let role = allowance("limited", "postgres");
    assert_eq!((role.connections(), role.role_limit, role.database_limit), (5, Some(5), None));
    assert_eq!(role.to_string(), "limited 5 (max_connections 20 less 3 reserved, limit of the role 5)");
    let database = allowance("free", "limited");
    assert_eq!((database.connections(), database.role_limit, database.database_limit), (7, None, Some(7)));
    assert_eq!(database.to_string(), "free 7 (max_connections 20 less 3 reserved, limit of database limited 7)");
    let both = allowance("limited", "limited");
    assert_eq!(both.connections(), 5);
    let god = allowance("god", "limited");
    assert_eq!((god.connections(), god.superuser), (20, true));
    assert_eq!(god.to_string(), "god 20 (max_connections 20, for superusers without reserves and limits)");

    let e =
        manager("limited", "postgres").processes(2).budget(Budget::Refuse).builder().max_size(3).open().unwrap_err();
    assert!(e.to_string().contains("2 processes x 3 = 6, but the server allows limited 5"), "{e}");
}

/// The numbers are the server's own: it refuses one more than is said.
#[test]
fn what_is_said_is_what_the_server_does() {
    let _beside = crate::support::beside_others();
    sql("CREATE ROLE counted LOGIN CONNECTION LIMIT 4");
    let said = allowance("counted", "postgres").connections();
    let config = server().config("counted").user("counted").clone();
    // The client that was asked may not be quite gone.
    let mut clients = Vec::new();
    let filled = wait_until(Instant::now() + SOON, || {
        clients.extend(config.connect(NoTls).ok());
        clients.len() == said as usize
    });
    assert!(filled, "{} of {said}", clients.len());
    let e = config.connect(NoTls).err().unwrap();
    assert_eq!(e.code().unwrap().code(), "53300", "{e:?}");
}

/// The limits are those of who logged in, whatever role a session takes on.
#[test]
fn whoever_logged_in_counts() {
    let _beside = crate::support::beside_others();
    sql(
        "CREATE ROLE other; CREATE ROLE masked LOGIN CONNECTION LIMIT 6; GRANT other TO masked; ALTER ROLE masked SET role = 'other'",
    );
    let masked = allowance("masked", "postgres");
    assert_eq!((masked.role.as_str(), masked.connections()), ("masked", 6));
}

/// Who cannot be asked is refused only if that was wanted.
#[test]
fn a_server_that_does_not_say() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    sql("CREATE ROLE blind LOGIN; CREATE DATABASE mute");
    let mut owner = server().config("observer").dbname("mute").connect(NoTls).unwrap();
    owner.batch_execute("REVOKE SELECT ON pg_roles FROM PUBLIC").unwrap();
    drop(owner);
    let manager = manager("blind", "mute").processes(1);
    assert!(manager.clone().builder().name("mute").open().is_ok());
    assert!(is_logged_soon("'mute': cannot tell how many connections the server allows: ERROR"));
    let e = manager.budget(Budget::Refuse).builder().open().unwrap_err();
    assert!(e.to_string().contains("permission denied for view pg_roles"), "{e}");
}

/// Not every server that speaks like PostgreSQL answers like one. As if the server had no such limits, or kept them as
/// text.
#[test]
fn a_server_that_answers_something_else() {
    let _beside = crate::support::beside_others();
    let _log = capture();
    sql("CREATE ROLE odd LOGIN");
    for (database, columns) in [
        ("odd_null", "rolname, rolsuper, NULL::int AS rolconnlimit, oid"),
        ("odd_type", "rolname, rolsuper::text AS rolsuper, rolconnlimit, oid"),
    ] {
        sql(&format!("CREATE DATABASE {database}"));
        let mut owner = server().config("observer").dbname(database).connect(NoTls).unwrap();
        owner
            .batch_execute(&format!(
                "SET allow_system_table_mods = on; ALTER VIEW pg_catalog.pg_roles RENAME TO real_roles; \
                 CREATE VIEW pg_catalog.pg_roles AS SELECT {columns} FROM pg_catalog.real_roles; \
                 GRANT SELECT ON pg_catalog.pg_roles TO PUBLIC"
            ))
            .unwrap();
        drop(owner);
        let manager = manager("odd", database).processes(1);
        let pool = manager.clone().builder().name(database).open().unwrap();
        assert!(pool.get().is_ok());
        let warning = format!("'{database}': cannot tell how many connections the server allows: the server's answer");
        assert!(is_logged_soon(&warning));
        let e = manager.budget(Budget::Refuse).builder().open().unwrap_err();
        assert!(e.to_string().contains("the server's answer is not what was asked for"), "{e}");
        let e = budget(&mut pool.get().unwrap()).unwrap_err();
        assert!(e.to_string().contains("the server's answer is not what was asked for"), "{e}");
    }
}
