//! What the guide says (`docs/guide`) and no other test shows.

use crate::support::{Bouncer, Database, PoolMode, SEEN, SOON, Server, alone, beside_others, wait_until, within};
use millpond::postgres::PostgresManager;
use millpond::{Pool, PoolGuard};
use postgres::{Client, NoTls};
use std::io::{BufRead, stdin};
use std::mem::forget;
use std::process::{Child, Command, Stdio, abort, exit};
use std::sync::{Barrier, Mutex};
use std::{env, thread};

// ---------------------------------------------------------------------------------------------------- migrations

/// As in docs/guide/migrations.md, in a schema of its own.
fn migrate(client: &mut Client, schema: &str) -> Result<(), postgres::Error> {
    let migrations = [
        (1, "CREATE TABLE orders (id bigint PRIMARY KEY)"),
        (2, "ALTER TABLE orders ADD COLUMN paid boolean NOT NULL DEFAULT false"),
    ];
    let mut tx = client.transaction()?;
    tx.batch_execute("SELECT pg_advisory_xact_lock(20261129)")?;
    tx.batch_execute(&format!("SET LOCAL client_min_messages = warning; CREATE SCHEMA IF NOT EXISTS {schema}"))?;
    tx.batch_execute(&format!("SET LOCAL search_path = {schema}"))?;
    tx.batch_execute("CREATE TABLE IF NOT EXISTS schema_version (version int PRIMARY KEY)")?;
    let row = tx.query_typed_one("SELECT coalesce(max(version), 0) FROM schema_version", &[])?;
    let current: i32 = row.get(0);
    for (version, sql) in migrations.iter().filter(|(version, _)| *version > current) {
        tx.batch_execute(sql)?;
        tx.batch_execute(&format!("INSERT INTO schema_version VALUES ({version})"))?;
    }
    tx.commit()
}

/// Eight programs start at the same time, each with a pool of its own, and each migrates before it does anything else.
fn eight_migrate(params: &str, schema: &str) {
    let at_once = Barrier::new(8);
    thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| {
                let manager = PostgresManager::parse(params, NoTls).unwrap().statement_cache(0);
                let pool = manager.builder().name("guide").max_size(1).open().unwrap();
                at_once.wait();
                migrate(&mut pool.get().unwrap(), schema).unwrap();
                // Whoever comes here finds the schema as it should be.
                pool.get().unwrap().batch_execute(&format!("SELECT id, paid FROM {schema}.orders")).unwrap();
                assert!(pool.close(SOON).is_complete());
            });
        }
    });
    let mut server = Server::shared().connect();
    let versions = server.query(&format!("SELECT version FROM {schema}.schema_version ORDER BY 1"), &[]).unwrap();
    assert_eq!(versions.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), [1, 2]);
    server.batch_execute(&format!("DROP SCHEMA {schema} CASCADE")).unwrap();
}

#[test]
fn eight_that_start_at_once_migrate_once() {
    let _beside = beside_others();
    eight_migrate(&Server::shared().conninfo("guide"), "guide_direct");
}

#[test]
#[cfg(target_os = "linux")]
fn eight_that_start_at_once_migrate_once_behind_a_transaction_pooler() {
    let _beside = beside_others();
    let bouncer = Bouncer::start(Server::shared(), PoolMode::Transaction, &[("default_pool_size", "2")]);
    eight_migrate(&bouncer.conninfo("guide"), "guide_bounced");
}

// ---------------------------------------------------------------------------------------------------- where `Drop` does not run

/// A process, killed if it is still there when the test is over.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const END: &str = "MILLPOND_TEST_END";

/// The process that ends: three connections are idle, and its guard's drop will not run.
fn end_without_a_drop(how: &str) {
    static FOREVER: Mutex<Option<PoolGuard>> = Mutex::new(None);
    let manager = PostgresManager::parse(&Database::get().conninfo(&app(how)), NoTls).unwrap();
    let pool: Pool<_> = manager.builder().name("ends").max_size(3).min_idle(3).open().unwrap();
    let guard = pool.guard();
    // Until the test has seen the three, and closes the pipe.
    for _ in stdin().lock().lines() {}
    match how {
        "exit" => exit(0),
        "abort" => abort(),
        "static" => *FOREVER.lock().unwrap() = Some(guard),
        "forget" => forget(guard),
        other => panic!("{other}?"),
    }
}

fn app(how: &str) -> String {
    format!("guide-{how}")
}

#[test]
fn however_a_process_ends_its_idle_connections_go() {
    if let Ok(how) = env::var(END) {
        return end_without_a_drop(&how);
    }
    let _alone = alone();
    let server = Server::shared();
    for how in ["exit", "abort", "static", "forget"] {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "guide::however_a_process_ends_its_idle_connections_go", "--test-threads=1"]);
        command.env(END, how).env("DATABASE_URL", server.url()).env("RUST_BACKTRACE", "0");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process(command.spawn().unwrap());
        assert_eq!(server.wait_for(&app(how), 3, within(SOON)), 3, "{how}: it has its connections");
        drop(process.0.stdin.take());
        let mut status = None;
        assert!(
            wait_until(within(SOON), || {
                status = process.0.try_wait().unwrap();
                status.is_some()
            }),
            "{how}: it does not end"
        );
        assert_eq!(status.unwrap().success(), how != "abort", "{how}: {status:?}");
        assert_eq!(server.wait_for(&app(how), 0, within(SEEN)), 0, "{how}");
    }
}
