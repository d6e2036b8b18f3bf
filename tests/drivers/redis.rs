//! `redis`, with its `r2d2` feature, on Redis.

use parking_lot::Mutex;
use redis::{Client, Commands, Connection};

use crate::daemon::Daemon;
use crate::promises;
use millpond::Pool;

/// A private Redis that accepts one connection of the test's own and so many of the pool's.
struct Server {
    daemon: Daemon,
    observer: Mutex<Connection>,
}

/// What the pool's connections select, to be told from the observer's.
const DATABASE: u32 = 3;

impl Server {
    fn start(pooled: u32) -> Option<Server> {
        let arguments = |port: u16| {
            let fixed = "--bind 127.0.0.1 --appendonly no --dir .".split(' ').map(String::from);
            let chosen = [("--port", port.to_string()), ("--maxclients", (pooled + 1).to_string())];
            // One word, as a line of its configuration: nothing is saved.
            let save = ["--save".to_owned(), String::new()];
            fixed.chain(chosen.into_iter().flat_map(|(name, value)| [name.to_owned(), value])).chain(save).collect()
        };
        let daemon = Daemon::start("redis-server", arguments, |port| client(port, 0).get_connection().is_ok())?;
        let observer = client(daemon.port(), 0).get_connection().unwrap();
        Some(Server { daemon, observer: Mutex::new(observer) })
    }

    fn manager(&self) -> Client {
        client(self.daemon.port(), DATABASE)
    }

    /// How many connections it has that selected the pool's database.
    fn count(&self) -> usize {
        let list: String = redis::cmd("CLIENT").arg("LIST").query(&mut self.observer.lock()).unwrap();
        let selected = format!(" db={DATABASE} ");
        list.lines().filter(|line| line.contains(&selected)).count()
    }
}

fn client(port: u16, database: u32) -> Client {
    Client::open(format!("redis://127.0.0.1:{port}/{database}")).unwrap()
}

#[test]
fn idle_ones_go_in_time() {
    let Some(server) = Server::start(5) else { return };
    promises::idle_ones_go_in_time(Pool::builder(), server.manager(), || server.count());
}

#[test]
fn get_keeps_its_deadline_while_an_open_hangs() {
    let Some(server) = Server::start(20) else { return };
    let freeze = || server.daemon.freeze();
    let count = || server.count();
    promises::get_keeps_its_deadline_while_an_open_hangs(Pool::builder(), server.manager(), count, freeze);
}

#[test]
fn get_keeps_its_deadline_while_a_check_hangs() {
    let Some(server) = Server::start(20) else { return };
    let freeze = || server.daemon.freeze();
    let count = || server.count();
    promises::get_keeps_its_deadline_while_a_check_hangs(Pool::builder(), server.manager(), count, freeze);
}

#[test]
fn a_panic_closes_the_pool() {
    let Some(server) = Server::start(3) else { return };
    promises::a_panic_closes_the_pool(Pool::builder(), server.manager(), || server.count());
}

#[test]
fn the_server_sees_max_size_at_most() {
    // One more than `max_size` would be refused.
    let Some(server) = Server::start(3) else { return };
    let work = |connection: &mut Connection, n| connection.sadd::<_, _, ()>("turns", n).unwrap();
    promises::the_server_sees_max_size_at_most(Pool::builder(), server.manager(), || server.count(), work);

    let mut observer = server.observer.lock();
    redis::cmd("SELECT").arg(DATABASE).exec(&mut observer).unwrap();
    assert_eq!(observer.scard::<_, u32>("turns").unwrap(), 120);
    let info: String = redis::cmd("INFO").arg("stats").query(&mut observer).unwrap();
    assert!(info.lines().any(|line| line == "rejected_connections:0"), "{info}");
}
