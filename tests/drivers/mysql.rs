//! `r2d2_mysql` on MariaDB.

use mysql::prelude::Queryable;
use mysql::{Conn, Opts, OptsBuilder, Row};
use parking_lot::Mutex;
use r2d2_mysql::MySqlConnectionManager;

use crate::daemon::Daemon;
use crate::promises;
use crate::support::{SOON, wait_until, within};
use millpond::{CloseReason, Manage, ManageConnection, Opening, Pool, Returned, Validate};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A private MariaDB, with one database for the pool, and a connection of the test's own to it.
struct Server {
    daemon: Daemon,
    observer: Mutex<Conn>,
}

impl Server {
    fn start() -> Option<Server> {
        // In an empty folder it makes itself what it needs, except for the tables of who may do what.
        let arguments = |port: u16| {
            let fixed = "--no-defaults --skip-grant-tables --datadir=. --socket=socket --bind-address=127.0.0.1 \
                         --innodb-buffer-pool-size=8M --innodb-log-file-size=4M --innodb-flush-log-at-trx-commit=0";
            fixed.split_whitespace().map(String::from).chain([format!("--port={port}")]).collect()
        };
        let daemon = Daemon::start("mariadbd", arguments, |port| Conn::new(Opts::from(options(port))).is_ok())?;
        let mut observer = Conn::new(Opts::from(options(daemon.port()))).unwrap();
        observer.query_drop("CREATE DATABASE mill").unwrap();
        Some(Server { daemon, observer: Mutex::new(observer) })
    }

    fn manager(&self) -> MySqlConnectionManager {
        MySqlConnectionManager::new(options(self.daemon.port()).db_name(Some("mill")))
    }

    /// How many connections it has to the pool's database.
    fn count(&self) -> usize {
        // (Not from `information_schema`: MariaDB 10.11 dies now and then when it drops that answer's temporary table.)
        let rows: Result<Vec<Row>, _> = self.observer.lock().query("SHOW PROCESSLIST");
        let rows = rows.unwrap_or_else(|e| panic!("{e}, and its log says:\n{}", self.daemon.log()));
        rows.iter().filter(|row| row.get::<Option<String>, _>("db").flatten().as_deref() == Some("mill")).count()
    }
}

fn options(port: u16) -> OptsBuilder {
    // Otherwise it asks for the server's unix socket, and connects again.
    OptsBuilder::new().ip_or_hostname(Some("127.0.0.1")).tcp_port(port).prefer_socket(false)
}

#[test]
fn idle_ones_go_in_time() {
    let Some(server) = Server::start() else { return };
    promises::idle_ones_go_in_time(Pool::builder(), server.manager(), || server.count());
}

/// This manager's `has_broken` asks the server: whoever returns a connection to a server that is silent, waits.
#[test]
fn get_keeps_its_deadline_while_an_open_hangs() {
    let Some(server) = Server::start() else { return };
    let freeze = || server.daemon.freeze();
    let count = || server.count();
    let builder = Pool::builder();
    let hangs = promises::get_keeps_its_deadline_while_an_open_hangs(builder, server.manager(), count, freeze);
    assert!(hangs, "r2d2_mysql has changed: say so in docs/coming-from-r2d2.md");
}

/// The same manager, but a connection is looked at when it is checked out instead of when it is returned.
struct NotAsked(MySqlConnectionManager);

impl Manage for NotAsked {
    type Connection = Conn;
    type Error = mysql::Error;

    fn open(&self, _: &Opening) -> Result<Conn, mysql::Error> {
        self.0.connect()
    }

    fn validate(&self, conn: &mut Conn, _: Duration) -> Result<(), mysql::Error> {
        self.0.is_valid(conn)
    }

    fn returned(&self, _: &mut Conn) -> Returned {
        Returned::Keep
    }
}

#[test]
fn a_return_need_not_wait_for_the_server() {
    let Some(server) = Server::start() else { return };
    let pool = Pool::builder().max_size(1).validate(Validate::Always).build(NotAsked(server.manager())).unwrap();
    let conn = pool.get().unwrap();
    let id = conn.connection_id();
    let frozen = server.daemon.freeze();
    let (done, returned) = mpsc::channel();
    let thread = thread::spawn(move || {
        drop(conn);
        done.send(()).unwrap();
    });
    let returned = returned.recv_timeout(SOON);
    drop(frozen);
    thread.join().unwrap();
    assert_eq!(returned, Ok(()), "while the server is silent");

    // One that is dead is found before anybody gets it.
    server.observer.lock().query_drop(format!("KILL {id}")).unwrap();
    assert!(wait_until(within(SOON), || server.count() == 0));
    assert_ne!(pool.get_timeout(SOON).unwrap().query_first("SELECT CONNECTION_ID()").unwrap(), Some(id));
    assert_eq!(pool.stats().closed_for(CloseReason::Invalid), 1, "{}", pool.stats());
}

#[test]
fn get_keeps_its_deadline_while_a_check_hangs() {
    let Some(server) = Server::start() else { return };
    let freeze = || server.daemon.freeze();
    let count = || server.count();
    promises::get_keeps_its_deadline_while_a_check_hangs(Pool::builder(), server.manager(), count, freeze);
}

#[test]
fn a_panic_closes_the_pool() {
    let Some(server) = Server::start() else { return };
    promises::a_panic_closes_the_pool(Pool::builder(), server.manager(), || server.count());
}

#[test]
fn the_server_sees_max_size_at_most() {
    let Some(server) = Server::start() else { return };
    server.observer.lock().query_drop("CREATE TABLE mill.turns (n INT PRIMARY KEY)").unwrap();
    server.observer.lock().query_drop("FLUSH STATUS").unwrap();
    let work = |conn: &mut Conn, n| conn.exec_drop("INSERT INTO turns VALUES (?)", (n,)).unwrap();
    promises::the_server_sees_max_size_at_most(Pool::builder(), server.manager(), || server.count(), work);

    let mut observer = server.observer.lock();
    let turns: Option<(i64, i64)> = observer.query_first("SELECT COUNT(*), MAX(n) FROM mill.turns").unwrap();
    assert_eq!(turns, Some((120, 119)));
    // What it has seen between two looks, the observer's included.
    let most: Option<(String, u32)> = observer.query_first("SHOW STATUS LIKE 'Max_used_connections'").unwrap();
    assert_eq!(most.unwrap().1, 4);
}
