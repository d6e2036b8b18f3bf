//! A pool in test transactions commits nothing, whatever its callers do. What others see is asked on a connection
//! outside of the pool.

use std::io::Write;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Instant;

use crate::support::{Bouncer, Logged, PoolMode, SOON, Server, beside_others, capture, logged, ms, wait_until, within};
use log::Level;
use millpond::postgres::{Connection, Pool, PostgresManager, Reset};
use millpond::{CloseReason, CustomizeConnection, PooledConnection, Validate};
use postgres::{Client, GenericClient, IsolationLevel, NoTls};

/// How a connection reaches the server, and whether it is observed on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Tcp,
    TcpUnobserved,
    Unix,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::TcpUnobserved, Way::Unix];

fn manager(app: &str, way: Way) -> PostgresManager<NoTls> {
    let server = Server::shared();
    let params = match way {
        Way::Unix => server.unix_conninfo(app),
        Way::Tcp | Way::TcpUnobserved => server.conninfo(app),
    };
    let manager = PostgresManager::parse(&params, NoTls).unwrap();
    manager.observe(way != Way::TcpUnobserved).test_transaction(true)
}

/// A pool of one, with this name in its log and at its server.
fn pool(app: &str, way: Way) -> Pool {
    manager(app, way).builder().name(app).max_size(1).connection_timeout(SOON).open().unwrap()
}

/// A table that everybody sees, and nobody may fill. It fails the test when it is dropped and has a row.
struct Table {
    name: String,
    outside: Client,
}

impl Table {
    fn new(name: impl AsRef<str>) -> Table {
        let name = name.as_ref().to_lowercase().replace('-', "_");
        let mut outside = Server::shared().connect();
        let sql = format!("DROP TABLE IF EXISTS {name}; CREATE TABLE {name} (n int PRIMARY KEY)");
        outside.batch_execute(&sql).unwrap();
        Table { name, outside }
    }

    fn insert(&self, client: &mut impl GenericClient, n: i32) -> Result<(), postgres::Error> {
        insert(client, &self.name, n)
    }

    /// What this caller sees.
    #[track_caller]
    fn assert_inside(&self, client: &mut impl GenericClient, expected: &[i32]) {
        let rows = client.query(&format!("SELECT n FROM {} ORDER BY n", self.name), &[]).unwrap();
        assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), expected);
    }

    /// When the server last answered the pool's connection.
    fn last_seen(&mut self, app: &str) -> String {
        let sql = "SELECT state_change::text FROM pg_stat_activity WHERE application_name = $1";
        self.outside.query_one(sql, &[&app]).unwrap().get(0)
    }

    /// Nobody else sees a row.
    #[track_caller]
    fn assert_nothing_outside(&mut self) {
        let row = self.outside.query_one(&format!("SELECT count(*) FROM {}", self.name), &[]).unwrap();
        assert_eq!(row.get::<_, i64>(0), 0, "rows were committed");
    }
}

fn insert(client: &mut impl GenericClient, table: &str, n: i32) -> Result<(), postgres::Error> {
    client.execute(&format!("INSERT INTO {table} VALUES ($1)"), &[&n]).map(drop)
}

impl Drop for Table {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.assert_nothing_outside();
            // It waits for whoever has not ended his transaction.
            let sql = format!("SET lock_timeout = '20s'; DROP TABLE {}", self.name);
            self.outside.batch_execute(&sql).unwrap();
        }
    }
}

/// The pool ends, its server has no connection of it any more, and the table is as it was.
#[track_caller]
fn ends(pool: &Pool, table: &mut Table) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(Server::shared().wait_for(pool.name(), 0, within(SOON)), 0);
    table.assert_nothing_outside();
}

fn code(e: &postgres::Error) -> &str {
    e.code().map_or("none", |code| code.code())
}

/// Waits for a warning of this pool that has these words.
#[track_caller]
fn warned(app: &str, words: &str) -> Logged {
    let find = || logged(|r| r.level == Level::Warn && r.text.contains(app) && r.text.contains(words)).pop();
    let warnings = || logged(|r| r.level == Level::Warn && r.text.contains(app));
    assert!(wait_until(within(SOON), || find().is_some()), "no \"{words}\" in {:?}", warnings());
    find().unwrap()
}

// ------------------------------------------------------------------------------------------------- as it is meant

#[test]
fn rows_go_from_checkout_to_checkout_and_to_nobody_else() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-rows-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        for n in 1..=5 {
            let mut client = pool.get().unwrap();
            table.insert(&mut **client, n).unwrap();
            table.assert_nothing_outside();
            drop(client);
            table.assert_nothing_outside();
            table.assert_inside(&mut **pool.get().unwrap(), &(1..=n).collect::<Vec<_>>());
        }
        assert_eq!(pool.stats().opens, 1, "{way:?}: {}", pool.stats());
        ends(&pool, &mut table);
    }
}

#[test]
fn a_transaction_is_a_savepoint() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-save-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        let mut client = pool.get().unwrap();

        let mut tx = client.transaction().unwrap();
        table.insert(&mut *tx, 1).unwrap();
        let mut inner = tx.transaction().unwrap();
        table.insert(&mut *inner, 2).unwrap();
        inner.commit().unwrap();
        let mut inner = tx.begin().unwrap();
        table.insert(&mut *inner, 3).unwrap();
        inner.rollback().unwrap();
        tx.commit().unwrap();
        table.assert_nothing_outside();
        table.assert_inside(&mut **client, &[1, 2]);

        let mut tx = client.begin().unwrap();
        table.insert(&mut *tx, 4).unwrap();
        tx.rollback().unwrap();
        let mut tx = client.begin().unwrap();
        table.insert(&mut *tx, 5).unwrap();
        drop(tx);
        table.assert_inside(&mut **client, &[1, 2]);

        // An error ends the transaction that it is in, and no other.
        let mut tx = client.begin().unwrap();
        table.insert(&mut *tx, 6).unwrap();
        assert_eq!(code(&table.insert(&mut *tx, 1).unwrap_err()), "23505");
        assert_eq!(code(&tx.commit().unwrap_err()), "25P02");
        table.insert(&mut **client, 7).unwrap();
        let mut tx = client.begin().unwrap();
        assert_eq!(code(&table.insert(&mut *tx, 1).unwrap_err()), "23505");
        drop(tx);
        drop(client);

        table.assert_inside(&mut **pool.get().unwrap(), &[1, 2, 7]);
        assert_eq!(pool.stats().opens, 1, "{way:?}: {}", pool.stats());
        ends(&pool, &mut table);
    }
}

#[test]
fn a_forgotten_transaction_is_rolled_back_and_told_of() {
    let _beside = beside_others();
    let _log = capture();
    for way in WAYS {
        let app = format!("tt-forgot-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        table.insert(&mut **pool.get().unwrap(), 1).unwrap();
        let mut client = pool.get().unwrap();
        table.insert(&mut **client, 2).unwrap();
        for n in [3, 4] {
            let mut tx = client.begin().unwrap();
            table.insert(&mut *tx, n).unwrap();
            forget(tx);
        }
        drop(client);
        table.assert_inside(&mut **pool.get().unwrap(), &[1, 2]);
        warned(&app, "came back inside a transaction, which was rolled back");
        assert_eq!(pool.stats().opens, 1);
        ends(&pool, &mut table);
    }
}

#[test]
fn a_read_only_transaction_ends_with_itself() {
    let _beside = beside_others();
    let mut table = Table::new("tt-read-only");
    let pool = pool("tt-read-only", Way::Tcp);
    let mut client = pool.get().unwrap();
    for commit in [true, false] {
        let mut tx = client.begin_with(|c| c.build_transaction().read_only(true).start()).unwrap();
        table.assert_inside(&mut *tx, &[]);
        if commit {
            tx.commit().unwrap();
        } else {
            assert_eq!(code(&table.insert(&mut *tx, 1).unwrap_err()), "25006");
        }
    }
    table.insert(&mut **client, 1).unwrap();
    ends_after(client, &pool, &mut table);
}

/// The level of the test transaction cannot be changed any more: `postgres` answers that with a `ROLLBACK`. It is that of
/// the session, and to ask for this one does no harm.
#[test]
fn an_isolation_level_is_that_of_the_session() {
    let _beside = beside_others();
    let _log = capture();
    let mut table = Table::new("tt-isolation");
    let serializable = |client: &mut PooledConnection<PostgresManager<NoTls>>| {
        let tx = client.begin_with(|c| c.build_transaction().isolation_level(IsolationLevel::Serializable).start());
        tx.and_then(|tx| tx.commit())
    };
    let pool = pool("tt-isolation", Way::Tcp);
    table.insert(&mut **pool.get().unwrap(), 1).unwrap();
    assert_eq!(code(&serializable(&mut pool.get().unwrap()).unwrap_err()), "25001");
    table.assert_inside(&mut **pool.get().unwrap(), &[]);
    warned("tt-isolation", "had ended its test transaction");
    ends(&pool, &mut table);

    let params = Server::shared().conninfo("tt-isolation") + " options='-c default_transaction_isolation=serializable'";
    let manager = PostgresManager::parse(&params, NoTls).unwrap().test_transaction(true);
    let pool = manager.builder().name("tt-isolation").max_size(1).open().unwrap();
    serializable(&mut pool.get().unwrap()).unwrap();
    ends(&pool, &mut table);
}

#[track_caller]
fn ends_after(client: PooledConnection<PostgresManager<NoTls>>, pool: &Pool, table: &mut Table) {
    drop(client);
    ends(pool, table);
}

#[test]
fn statements_are_remembered() {
    let _beside = beside_others();
    for way in WAYS {
        for cache in [256, 0] {
            let app = format!("tt-cache-{way:?}");
            let mut table = Table::new(&app);
            let manager = manager(&app, way).statement_cache(cache);
            let pool = manager.builder().name(&*app).max_size(1).connection_timeout(SOON).open().unwrap();
            let insert = format!("INSERT INTO {} VALUES ($1)", table.name);
            for n in 0..6 {
                let mut client = pool.get().unwrap();
                client.execute_cached(&insert, &[&(2 * n)]).unwrap();
                let mut tx = client.begin().unwrap();
                tx.execute_cached(&insert, &[&(2 * n + 1)]).unwrap();
                tx.commit().unwrap();
                // The next one's statements are those of this one, whose failure has cost its rows alone.
                if n == 3 {
                    client.execute_cached(&insert, &[&0]).unwrap_err();
                }
            }
            let mut client = pool.get().unwrap();
            table.assert_inside(&mut **client, &[0, 1, 2, 3, 4, 5, 8, 9, 10, 11]);
            let stats = client.statement_cache_stats();
            assert_eq!((stats.misses, stats.hits), (1, 12), "{way:?}, {cache}: {stats:?}");
            assert_eq!(pool.stats().opens, 1, "{way:?}, {cache}");
            ends_after(client, &pool, &mut table);
        }
    }
}

#[test]
fn checks_and_keepalives_leave_the_rows_alone() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-check-{way:?}");
        let mut table = Table::new(&app);
        let builder = manager(&app, way).builder().name(&*app).max_size(1).connection_timeout(SOON);
        let pool = builder.validate(Validate::Always).keepalive(ms(20)).open().unwrap();
        for n in 0..3 {
            table.insert(&mut **pool.get().unwrap(), n).unwrap();
            // Each keepalive shows at the server.
            for _ in 0..3 {
                let last = table.last_seen(&app);
                assert!(wait_until(within(SOON), || table.last_seen(&app) != last));
            }
        }
        table.assert_inside(&mut **pool.get().unwrap(), &[0, 1, 2]);
        assert_eq!(pool.stats().opens, 1, "{way:?}");
        ends(&pool, &mut table);
    }
}

/// A customizer's work is inside the test transaction, and an error of a caller's does not undo it.
#[test]
fn what_on_acquire_does_is_there_after_an_error() {
    #[derive(Debug)]
    struct Fixture(String);

    impl CustomizeConnection<Connection, millpond::postgres::Error> for Fixture {
        fn on_acquire(&self, c: &mut Connection) -> Result<(), millpond::postgres::Error> {
            Ok(c.batch_execute(&self.0)?)
        }
    }

    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-fixture-{way:?}");
        let mut table = Table::new(&app);
        let fixture = Fixture(format!("BEGIN; INSERT INTO {} VALUES (1); SET work_mem = '123kB'", table.name));
        let builder = manager(&app, way).builder().name(&*app).max_size(1).connection_timeout(SOON);
        let pool = builder.connection_customizer(Box::new(fixture)).open().unwrap();
        for n in 0..4 {
            let mut client = pool.get().unwrap();
            table.assert_inside(&mut **client, &[1]);
            assert_eq!(client.query_one("SHOW work_mem", &[]).unwrap().get::<_, String>(0), "123kB", "{way:?}, {n}");
            table.insert(&mut **client, 1).unwrap_err();
        }
        ends(&pool, &mut table);
    }
}

// -------------------------------------------------------------------------------------------------- what goes wrong

/// Each way out of the test transaction, and the SQLSTATE with which it fails.
type WayOut = (&'static str, Result<(), &'static str>);

const WAYS_OUT: [WayOut; 10] = [
    ("COMMIT", Err("2D000")),
    ("END", Err("2D000")),
    ("COMMIT AND CHAIN", Err("2D000")),
    ("PREPARE TRANSACTION 'tt'", Err("2D000")),
    ("SET CONSTRAINTS ALL IMMEDIATE; COMMIT", Err("2D000")),
    ("SET session_replication_role = replica; COMMIT", Err("2D000")),
    ("SET session_replication_role = replica; SET CONSTRAINTS ALL IMMEDIATE; COMMIT", Err("2D000")),
    ("BEGIN; COMMIT; BEGIN", Err("2D000")),
    ("ROLLBACK", Ok(())),
    ("ABORT", Ok(())),
];

#[test]
fn whoever_ends_the_transaction_finds_a_session_that_reads_only() {
    let _beside = beside_others();
    let _log = capture();
    for way in WAYS {
        let app = format!("tt-out-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        for (opens, (out, expected)) in (1..).zip(WAYS_OUT) {
            table.insert(&mut **pool.get().unwrap(), 1).unwrap();
            let line = line!() + 1;
            let mut client = pool.get().unwrap();
            let id = PooledConnection::info(&client).id;
            table.insert(&mut **client, 2).unwrap();
            let said = client.batch_execute(out);
            assert_eq!(said.as_ref().map(|_| ()).map_err(code), expected, "{way:?}, {out}");
            if let Err(e) = said {
                let e = e.as_db_error().unwrap();
                assert_eq!(e.message(), "test_transaction: nothing is committed");
            }
            table.assert_nothing_outside();
            // By itself, in a transaction, and in one of the pool's.
            assert_eq!(code(&table.insert(&mut **client, 3).unwrap_err()), "25006", "{way:?}, {out}");
            let sql = format!("BEGIN; INSERT INTO {} VALUES (4); COMMIT", table.name);
            assert_eq!(code(&client.batch_execute(&sql).unwrap_err()), "25006", "{way:?}, {out}");
            client.batch_execute("ROLLBACK").unwrap();
            assert_eq!(code(&client.begin().unwrap_err()), "25P01", "{way:?}, {out}");
            drop(client);
            let warning = warned(&app, &format!("#{id}, ")).text;
            assert!(warning.contains("had ended its test transaction"), "{warning}");
            assert!(warning.contains(&format!("test_transaction.rs:{line}:")), "{warning}");
            // The next one begins anew.
            table.assert_inside(&mut **pool.get().unwrap(), &[]);
            let stats = pool.stats();
            assert_eq!((stats.opens, stats.closed_for(CloseReason::ResetFailed)), (opens + 1, opens), "{stats}");
        }
        ends(&pool, &mut table);
    }
}

/// A transaction of the caller's own making is not taken for the test's, which it has ended.
#[test]
fn another_transaction_in_its_place_is_found_out() {
    let _beside = beside_others();
    let _log = capture();
    for way in WAYS {
        for ends_by in ["ROLLBACK; BEGIN", "ROLLBACK AND CHAIN", "ROLLBACK; BEGIN; SELECT 1; SAVEPOINT mine"] {
            let app = format!("tt-other-{way:?}");
            let mut table = Table::new(&app);
            let pool = pool(&app, way);
            let mut client = pool.get().unwrap();
            client.batch_execute(ends_by).unwrap();
            drop(client);
            table.insert(&mut **pool.get().unwrap(), 1).unwrap();
            warned(&app, "had ended its test transaction");
            assert_eq!(pool.stats().opens, 2, "{way:?}, {ends_by}");
            ends(&pool, &mut table);
        }
    }
}

/// What `postgres` does by itself the pool does not see. Its commit fails, and says what to do.
#[test]
fn a_transaction_of_the_bare_client_cannot_commit() {
    fn generic(client: &mut impl GenericClient, table: &Table) -> Result<(), postgres::Error> {
        let mut tx = client.transaction()?;
        table.insert(&mut tx, 1)?;
        tx.commit()
    }

    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-bare-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        let e = generic(&mut **pool.get().unwrap(), &table).unwrap_err();
        assert_eq!(code(&e), "2D000");
        assert!(e.as_db_error().unwrap().hint().unwrap().contains("transaction()"), "{e:?}");
        // From a transaction of the pool's on, all is well.
        let mut client = pool.get().unwrap();
        let mut tx = client.begin().unwrap();
        generic(&mut *tx, &table).unwrap();
        tx.commit().unwrap();
        table.assert_inside(&mut **client, &[1]);
        ends_after(client, &pool, &mut table);
    }
}

/// What users do with constraints, roles and temporary tables does neither disarm the guard nor set it off.
#[test]
fn the_guard_outlives_what_users_do() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-guard-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        let mut client = pool.get().unwrap();
        let role = table.name.clone() + "_role";
        for sql in [
            "SET CONSTRAINTS ALL IMMEDIATE".to_owned(),
            "SET CONSTRAINTS ALL IMMEDIATE".to_owned(),
            "SET CONSTRAINTS ALL DEFERRED".to_owned(),
            "SAVEPOINT a; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO a; RELEASE a".to_owned(),
            format!("CREATE ROLE {role}; SET ROLE {role}; SET CONSTRAINTS ALL IMMEDIATE"),
            "SET CONSTRAINTS ALL IMMEDIATE; RESET ROLE".to_owned(),
            "CREATE TEMP TABLE mine (n int) ON COMMIT DROP; DROP TABLE mine".to_owned(),
            "SET search_path = nowhere; SET CONSTRAINTS ALL IMMEDIATE".to_owned(),
            "RESET ALL".to_owned(),
        ] {
            client.batch_execute(&sql).unwrap_or_else(|e| panic!("{way:?}, {sql}: {e:?}"));
        }
        table.insert(&mut **client, 1).unwrap();
        for refused in [
            "DISCARD ALL",
            "DISCARD TEMP",
            "DROP TABLE pg_temp.millpond_test_transaction",
            "DO $$ BEGIN COMMIT; END $$",
        ] {
            let mut tx = client.begin().unwrap();
            tx.batch_execute(refused).expect_err(refused);
        }
        assert_eq!(code(&client.batch_execute("COMMIT").unwrap_err()), "2D000", "{way:?}");
        assert_eq!(code(&table.insert(&mut **client, 1).unwrap_err()), "25006", "{way:?}");
        ends_after(client, &pool, &mut table);
    }
}

#[test]
fn an_error_costs_what_its_checkout_has_done() {
    let _beside = beside_others();
    let _log = capture();
    for way in WAYS {
        let app = format!("tt-error-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        table.insert(&mut **pool.get().unwrap(), 1).unwrap();
        let line = line!() + 1;
        let mut client = pool.get().unwrap();
        table.insert(&mut **client, 2).unwrap();
        assert_eq!(code(&table.insert(&mut **client, 1).unwrap_err()), "23505");
        assert_eq!(code(&table.insert(&mut **client, 3).unwrap_err()), "25P02", "as in any transaction");
        drop(client);
        table.assert_inside(&mut **pool.get().unwrap(), &[1]);
        let warning = warned(&app, "which was rolled back to where this checkout began").text;
        assert!(warning.contains(&format!("test_transaction.rs:{line}:")), "{warning}");
        assert_eq!(pool.stats().opens, 1, "{way:?}: {}", pool.stats());
        // Again, with nothing between.
        for n in [4, 5] {
            let mut client = pool.get().unwrap();
            table.insert(&mut **client, n).unwrap();
            table.insert(&mut **client, 1).unwrap_err();
        }
        table.assert_inside(&mut **pool.get().unwrap(), &[1]);
        assert_eq!(pool.stats().opens, 1, "{way:?}: {}", pool.stats());
        ends(&pool, &mut table);
    }
}

/// What a checkout leaves behind that the pool cannot clean costs the rows, and nothing is committed.
#[test]
fn what_cannot_be_used_again_is_replaced_and_told_of() {
    let _beside = beside_others();
    let _log = capture();
    let mut table = Table::new("tt-replaced");
    type Mess = (&'static str, fn(&mut Connection));
    let messes: [Mess; 4] = [
        ("request to cancel", |c| {
            let canceller = c.canceller();
            thread::scope(|s| {
                let sleeper = s.spawn(|| c.batch_execute("SELECT pg_sleep(600)"));
                let asleep = || Server::shared().backends("tt-replaced").iter().any(|b| b.query.contains("pg_sleep"));
                assert!(wait_until(within(SOON), asleep));
                canceller.cancel().unwrap();
                assert_eq!(code(&sleeper.join().unwrap().unwrap_err()), "57014");
            });
        }),
        ("COPY", |c| {
            c.batch_execute("CREATE TEMP TABLE copied (n int)").unwrap();
            let mut rows = c.copy_in("COPY copied FROM STDIN").unwrap();
            rows.write_all(b"1\n").unwrap();
            rows.flush().unwrap();
            forget(rows);
        }),
        ("panicked", |c| {
            #[derive(Debug)]
            struct Explosive;
            impl postgres::types::ToSql for Explosive {
                fn to_sql(
                    &self,
                    _: &postgres::types::Type,
                    _: &mut postgres::types::private::BytesMut,
                ) -> Result<postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
                    panic!("a parameter that panics")
                }
                fn accepts(_: &postgres::types::Type) -> bool {
                    true
                }
                postgres::types::to_sql_checked!();
            }
            let call = AssertUnwindSafe(|| c.query_cached("SELECT $1::int", &[&Explosive]).map(drop));
            assert!(catch_unwind(call).is_err());
        }),
        ("an answer, which was cancelled", |c| {
            let sql = "SELECT pg_sleep(n * 0), repeat('x', 1000) FROM generate_series(1, 100000000) n";
            let rows = c.query_raw(sql, std::iter::empty::<i32>());
            drop(rows);
        }),
    ];
    for (words, mess) in messes {
        let pool = pool("tt-replaced", Way::Tcp);
        table.insert(&mut **pool.get().unwrap(), 1).unwrap();
        mess(&mut pool.get().unwrap());
        table.assert_inside(&mut **pool.get().unwrap(), &[]);
        let warning = warned("tt-replaced", words).text;
        assert!(warning.contains("The rows of its test transaction are gone"), "{warning}");
        ends(&pool, &mut table);
    }
}

#[test]
fn a_panic_costs_the_connection_and_its_rows() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-panic-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            let mut client = pool.get().unwrap();
            let mut tx = client.begin().unwrap();
            table.insert(&mut *tx, 1).unwrap();
            panic!("in the middle of a test");
        }));
        assert!(panic.is_err());
        table.assert_inside(&mut **pool.get().unwrap(), &[]);
        assert_eq!(pool.stats().closed_for(CloseReason::Panicked), 1, "{way:?}: {}", pool.stats());
        ends(&pool, &mut table);
    }
}

#[test]
fn what_closes_a_connection_rolls_back() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-closed-{way:?}");
        let mut table = Table::new(&app);
        let pool = pool(&app, way);
        table.insert(&mut **pool.get().unwrap(), 1).unwrap();
        pool.recycle();
        table.assert_inside(&mut **pool.get().unwrap(), &[]);
        table.insert(&mut **pool.get().unwrap(), 2).unwrap();
        PooledConnection::discard(pool.get().unwrap());
        table.assert_inside(&mut **pool.get().unwrap(), &[]);
        // In use when the pool ends; and its lock goes with it.
        let mut client = pool.get().unwrap();
        table.insert(&mut **client, 3).unwrap();
        assert!(!pool.close(ms(1)).is_complete());
        drop(client);
        ends(&pool, &mut table);
    }
}

/// The end of a transaction in a drop is as quiet as that of any connection.
#[test]
fn a_close_says_goodbye_to_the_server() {
    let _beside = beside_others();
    let server = Server::with(&[("log_disconnections", "on")]);
    for observe in [true, false] {
        let manager = PostgresManager::parse(&server.conninfo("tt-goodbye"), NoTls).unwrap();
        let pool = manager.observe(observe).test_transaction(true).builder().max_size(1).open().unwrap();
        pool.get().unwrap().batch_execute("SELECT 1").unwrap();
        assert!(pool.close(SOON).is_complete());
        assert_eq!(server.wait_for("tt-goodbye", 0, within(SOON)), 0);
    }
    let log = server.log();
    assert!(!log.contains("unexpected EOF"), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
}

// ------------------------------------------------------------------------------------------------------- of many

#[test]
fn of_many_connections_each_has_its_own_rows() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-many-{way:?}");
        let mut table = Table::new(&app);
        let pool = manager(&app, way).builder().name(&*app).max_size(2).connection_timeout(SOON).open().unwrap();
        let (mut a, mut b) = (pool.get().unwrap(), pool.get().unwrap());
        table.insert(&mut **a, 1).unwrap();
        table.insert(&mut **b, 2).unwrap();
        table.assert_inside(&mut **a, &[1]);
        table.assert_inside(&mut **b, &[2]);
        // They wait for each other's locks.
        b.batch_execute("SET LOCAL lock_timeout = '50ms'").unwrap();
        assert_eq!(code(&table.insert(&mut **b, 1).unwrap_err()), "55P03");
        drop((a, b));
        ends(&pool, &mut table);
    }
}

#[test]
fn many_threads_commit_nothing() {
    const THREADS: i32 = 8;
    const ROUNDS: i32 = 15;
    let _beside = beside_others();
    for way in WAYS {
        for size in [1, 4] {
            let app = format!("tt-threads-{way:?}");
            let mut table = Table::new(&app);
            let builder = manager(&app, way).builder().name(&*app).max_size(size).connection_timeout(SOON);
            let pool = builder.open().unwrap();
            thread::scope(|s| {
                for thread in 0..THREADS {
                    let (pool, table) = (&pool, &*table.name);
                    s.spawn(move || {
                        for round in 0..ROUNDS {
                            let n = thread * ROUNDS + round;
                            let mut client = pool.get().unwrap();
                            let mut tx = client.begin().unwrap();
                            // No two threads insert the same row, so nobody waits for a lock.
                            insert(&mut *tx, table, n).unwrap();
                            if round % 3 == 0 { tx.rollback().unwrap() } else { tx.commit().unwrap() }
                        }
                    });
                }
                for _ in 0..10 {
                    let mut outside = Server::shared().connect();
                    let count = outside.query_one(&format!("SELECT count(*) FROM {}", table.name), &[]).unwrap();
                    assert_eq!(count.get::<_, i64>(0), 0);
                }
            });
            if size == 1 {
                let kept = (0..THREADS * ROUNDS).filter(|n| n % ROUNDS % 3 != 0).collect::<Vec<_>>();
                table.assert_inside(&mut **pool.get().unwrap(), &kept);
                assert_eq!(pool.stats().opens, 1, "{way:?}");
            }
            ends(&pool, &mut table);
        }
    }
}

/// A node that refuses a write is taken for one that is no longer the primary, but not for a test transaction that has
/// ended: there it is the session that reads only.
#[test]
fn a_refused_write_says_nothing_of_the_node() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-node-{way:?}");
        let mut table = Table::new(&app);
        let params = Server::shared().conninfo(&app) + " target_session_attrs=read-write";
        let manager = PostgresManager::parse(&params, NoTls).unwrap().observe(way != Way::TcpUnobserved);
        let pool = manager.test_transaction(true).builder().name(&*app).max_size(2).open().unwrap();
        let (mut ended, mut other) = (pool.get().unwrap(), pool.get().unwrap());
        table.insert(&mut **other, 1).unwrap();
        ended.batch_execute("ROLLBACK").unwrap();
        assert_eq!(code(&table.insert(&mut **ended, 2).unwrap_err()), "25006");
        drop(ended);
        drop(other);
        assert!(wait_until(within(SOON), || pool.stats().closed_for(CloseReason::ResetFailed) == 1));
        table.assert_inside(&mut **pool.get().unwrap(), &[1]);
        assert_eq!(pool.stats().closes, 1, "{way:?}: {}", pool.stats());
        ends(&pool, &mut table);
    }
}

// ------------------------------------------------------------------------------------------------------ at the start

#[test]
fn another_reset_is_refused() {
    let _beside = beside_others();
    for reset in [Reset::DiscardAll, Reset::None] {
        let begun = Instant::now();
        let e = manager("tt-reset", Way::Tcp).reset(reset).builder().open().unwrap_err();
        assert!(e.is_connect() && begun.elapsed() < SOON, "for good: {e}");
        assert!(e.to_string().contains("test_transaction needs Reset::Rollback"), "{e}");
        let pool = manager("tt-reset", Way::Tcp).reset(reset).builder().build_unchecked_pool();
        assert!(pool.get().unwrap_err().to_string().contains("test_transaction needs"), "{reset:?}");
    }
    assert_eq!(Server::shared().wait_for("tt-reset", 0, within(SOON)), 0);
}

trait Unchecked {
    fn build_unchecked_pool(self) -> Pool;
}

impl Unchecked for millpond::Builder<PostgresManager<NoTls>> {
    fn build_unchecked_pool(self) -> Pool {
        self.build_unchecked(manager("tt-reset", Way::Tcp).reset(Reset::None))
    }
}

#[test]
fn a_role_that_may_not_make_the_guard_is_told_so() {
    let _beside = beside_others();
    let server = Server::start();
    let sql = "CREATE ROLE poor LOGIN; REVOKE TEMPORARY ON DATABASE postgres FROM PUBLIC";
    server.connect().batch_execute(sql).unwrap();
    let params = server.conninfo("tt-poor").replace("user=postgres", "user=poor");
    assert!(params.contains("user=poor"), "{params}");
    let e = PostgresManager::parse(&params, NoTls).unwrap().test_transaction(true).builder().open().unwrap_err();
    assert!(e.is_connect(), "{e}");
    let text = e.to_string();
    assert!(text.contains("cannot begin the test transaction") && text.contains("temporary"), "{text}");
}

#[test]
fn the_log_says_that_it_is_on() {
    let _beside = beside_others();
    let _log = capture();
    let pool = pool("tt-said", Way::Tcp);
    warned("tt-said", "nothing is committed");
    assert!(pool.close(SOON).is_complete());
}

// ------------------------------------------------------------------------------------------------- behind PgBouncer

#[cfg(target_os = "linux")]
#[test]
fn behind_a_pooler_nothing_is_committed() {
    let _beside = beside_others();
    let _log = capture();
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let bouncer = Bouncer::start(Server::shared(), mode, &[("default_pool_size", "2")]);
        for observe in [true, false] {
            let app = format!("tt-bouncer-{mode:?}-{observe}");
            let mut table = Table::new(&app);
            let manager = PostgresManager::parse(&bouncer.conninfo(&app), NoTls).unwrap().observe(observe);
            let builder = manager.test_transaction(true).builder().name(&*app).max_size(1).connection_timeout(SOON);
            // In transaction mode 1.18 keeps no statement beyond a transaction, and all of this is one.
            let pool = builder.open().unwrap();
            for n in 0..5 {
                let mut client = pool.get().unwrap();
                client.execute_cached(&format!("INSERT INTO {} VALUES ($1)", table.name), &[&n]).unwrap();
                let mut tx = client.begin().unwrap();
                table.insert(&mut *tx, 100 + n).unwrap();
                if n % 2 == 0 {
                    tx.rollback().unwrap()
                } else {
                    tx.commit().unwrap()
                }
                table.assert_nothing_outside();
            }
            table.assert_inside(&mut **pool.get().unwrap(), &[0, 1, 2, 3, 4, 101, 103]);
            assert_eq!(pool.stats().opens, 1);
            let mut client = pool.get().unwrap();
            assert_eq!(code(&client.batch_execute("COMMIT").unwrap_err()), "2D000");
            if mode == PoolMode::Session {
                assert_eq!(code(&table.insert(&mut **client, 1).unwrap_err()), "25006");
            }
            drop(client);
            warned(&app, "had ended its test transaction");
            table.assert_inside(&mut **pool.get().unwrap(), &[]);
            assert!(pool.close(SOON).is_complete());
            assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
        }
        // What was set for the test is not left to the next client.
        let mut next = Client::connect(&bouncer.conninfo("tt-next"), NoTls).unwrap();
        let answer = next.simple_query("SHOW default_transaction_read_only").unwrap();
        let is = |v| answer.iter().any(|m| matches!(m, postgres::SimpleQueryMessage::Row(r) if r.get(0) == Some(v)));
        assert!(is("off"), "{mode:?}: {answer:?}");
    }
}

// ------------------------------------------------------------------------------------------- by hand, without this

/// A customizer that begins a transaction, as with r2d2.
#[derive(Debug)]
struct Begin;

impl<E: From<postgres::Error>> CustomizeConnection<Client, E> for Begin {
    fn on_acquire(&self, c: &mut Client) -> Result<(), E> {
        Ok(c.batch_execute("BEGIN")?)
    }
}

impl CustomizeConnection<Connection, millpond::postgres::Error> for Begin {
    fn on_acquire(&self, c: &mut Connection) -> Result<(), millpond::postgres::Error> {
        Ok(c.batch_execute("BEGIN")?)
    }
}

/// The rows that others see.
fn committed(table: &Table) -> Vec<i32> {
    let rows = Server::shared().connect().query(&format!("SELECT n FROM {} ORDER BY n", table.name), &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// With the stock manager the transaction goes from checkout to checkout, and nothing keeps a caller from ending it.
#[test]
fn begun_by_hand_the_stock_managers_transaction_stays_until_somebody_ends_it() {
    let _beside = beside_others();
    let mut table = Table::new("tt-stock");
    let manager = manager("tt-stock", Way::Tcp).into_r2d2();
    let builder = millpond::Pool::builder().name("tt-stock").max_size(1).connection_timeout(SOON);
    let pool = builder.connection_customizer(Box::new(Begin)).build(manager).unwrap();
    for n in [1, 2] {
        table.insert(&mut *pool.get().unwrap(), n).unwrap();
        assert_eq!(committed(&table), []);
    }
    // An error is handed on, to this caller and to the next.
    table.insert(&mut *pool.get().unwrap(), 1).unwrap_err();
    assert_eq!(code(&table.insert(&mut *pool.get().unwrap(), 3).unwrap_err()), "25P02");
    pool.recycle();
    // Any transaction commits it, and what follows commits by itself.
    let mut client = pool.get().unwrap();
    table.insert(&mut *client, 4).unwrap();
    client.transaction().unwrap().commit().unwrap();
    table.insert(&mut *client, 5).unwrap();
    drop(client);
    assert_eq!(committed(&table), [4, 5]);
    assert!(pool.close(SOON).is_complete());
    table.outside.batch_execute("TRUNCATE tt_stock").unwrap();
}

/// With the crate's own manager it ends with the first checkout, as every transaction that is left open does.
#[test]
fn begun_by_hand_the_own_managers_transaction_ends_with_the_first_checkout() {
    let _beside = beside_others();
    for way in WAYS {
        let app = format!("tt-hand-{way:?}");
        let mut table = Table::new(&app);
        let builder = manager(&app, way).test_transaction(false).builder().name(&*app).max_size(1);
        let pool = builder.connection_customizer(Box::new(Begin)).open().unwrap();
        for n in [1, 2] {
            table.insert(&mut **pool.get().unwrap(), n).unwrap();
        }
        assert_eq!(committed(&table), [2], "{way:?}");
        assert!(pool.close(SOON).is_complete());
        table.outside.batch_execute(&format!("TRUNCATE {}", table.name)).unwrap();

        // With `DiscardAll` the customizer begins anew for each checkout, and none sees the rows of another.
        let manager = manager(&app, way).test_transaction(false).reset(Reset::DiscardAll);
        let builder = manager.builder().name(&*app).max_size(1).connection_timeout(SOON);
        let pool = builder.connection_customizer(Box::new(Begin)).open().unwrap();
        for n in [1, 2] {
            let mut client = pool.get().unwrap();
            table.insert(&mut **client, n).unwrap();
            table.assert_inside(&mut **client, &[n]);
        }
        ends(&pool, &mut table);
    }
}
