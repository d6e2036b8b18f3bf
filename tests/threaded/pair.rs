//! A primary and its streaming standby, and a program with a pool for each.

use crate::program::Program;
use crate::support::{History, SOON, Server, alone, wait_until, within};

/// All of them in one list, as a program is told where its database is. A primary sends on what it has flushed, and
/// these flush late unless they are told otherwise.
fn address(servers: &[&Server]) -> String {
    let ports: Vec<_> = servers.iter().map(|server| server.port().to_string()).collect();
    let hosts = vec!["127.0.0.1"; servers.len()].join(",");
    let ports = ports.join(",");
    format!(
        "host={hosts} port={ports} user=postgres dbname=postgres application_name=pair \
         options='-c synchronous_commit=local'"
    )
}

/// What was written last, as far as this server knows, which may not even know the table yet.
fn level(server: &Server) -> Option<i32> {
    Some(server.connect().query_opt("SELECT level FROM levels", &[]).ok()??.get(0))
}

/// How many of its 20 reads the program had from a standby.
fn from_standby(words: &str) -> u32 {
    let rest = words.split("20 written, and 20 read: ").nth(1).unwrap_or_else(|| panic!("{words}"));
    rest.split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
}

/// Whether the program asked here for a level.
fn was_read(history: &History) -> bool {
    let mut backends = history.0.iter().flat_map(|sample| &sample.backends);
    backends.any(|backend| backend.query.contains("SELECT level FROM levels"))
}

#[test]
fn a_reader_and_a_writer() {
    let _alone = alone();
    let primary = Server::with(Server::STREAMING);
    let standby = Server::standby_of(&primary);
    // Each in its turn is the first in the list: the roles decide, and not the order.
    for order in [[&primary, &standby], [&standby, &primary]] {
        let watch = standby.watch("pair");
        let words = Program::start("reader_writer", &address(&order)).ends_cleanly();
        // All of them, unless the machine stands still.
        assert!(from_standby(&words) > 10 && was_read(&watch.end()), "{words}");
        assert_eq!(words.matches("nothing is left").count(), 2, "{words}");
        assert_eq!(level(&primary), Some(20));
        for server in [&primary, &standby] {
            assert_eq!(server.wait_for("pair", 0, within(SOON)), 0);
        }
    }
}

#[test]
fn a_standby_that_is_behind_is_not_believed() {
    let _alone = alone();
    let primary = Server::with(Server::STREAMING);
    let standby = Server::standby_of(&primary);
    let program = || Program::start("reader_writer", &address(&[&primary, &standby])).ends_cleanly();
    program();
    // From here on it shows the end of that, and nothing that comes later.
    assert!(wait_until(within(SOON), || level(&standby) == Some(20)));
    standby.connect().batch_execute("SELECT pg_wal_replay_pause()").unwrap();
    let watch = standby.watch("pair");
    let words = program();
    assert_eq!(from_standby(&words), 0, "{words}");
    assert!(watch.end().0.iter().any(|sample| sample.count() > 0), "it was asked how far it is");
    assert!(!words.contains("instead"), "{words}");
    for server in [&primary, &standby] {
        assert_eq!(server.wait_for("pair", 0, within(SOON)), 0);
    }
}

#[test]
fn without_a_standby_the_primary_answers() {
    let _alone = alone();
    let primary = Server::with(Server::STREAMING);
    let words = Program::start("reader_writer", &address(&[&primary])).ends_cleanly();
    assert_eq!(from_standby(&words), 0, "{words}");
    assert_eq!(primary.wait_for("pair", 0, within(SOON)), 0);
}
