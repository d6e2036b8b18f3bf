//! What a soak's pools stand on: a server, a network, a machine, and the account.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use postgres::{Client, NoTls};

use crate::journal::Journal;
use crate::support::{Heart, Proxy, Server, ms, wait_until, within};

/// What anything may take beyond its limit, on a machine that does other things as well. For how long the machine
/// stood still altogether comes on top: see [`Heart`].
pub(crate) const LATE: Duration = Duration::from_secs(1);

/// The password that the pools have.
const PASSWORD: &str = "the-right-one";

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) proxy: Proxy,
    pub(crate) journal: Arc<Journal>,
    pub(crate) heart: Heart,
    /// Since when the network has passed everything on; `None`: it does not.
    clear: Mutex<Option<Instant>>,
    /// The password was wrong at some time in this round.
    pub(crate) refused: AtomicBool,
    admin: Mutex<Option<Client>>,
}

impl World {
    pub(crate) fn begin(journal: &Arc<Journal>) -> World {
        // Durable as long as the system lives: what is committed survives a crash of the server.
        let server = Server::with(&[
            ("max_connections", "60"),
            ("superuser_reserved_connections", "6"),
            ("synchronous_commit", "on"),
        ]);
        let proxy = Proxy::to(server.addr());
        let world = World {
            proxy,
            journal: Arc::clone(journal),
            heart: Heart::beat(),
            clear: Mutex::new(Some(Instant::now())),
            refused: AtomicBool::new(false),
            admin: Mutex::new(None),
            server,
        };
        world.order(&format!(
            "CREATE ROLE soak LOGIN PASSWORD '{PASSWORD}'; CREATE TABLE soak (lane text, kind text, token text); \
             GRANT ALL ON soak TO soak"
        ));
        // Before the line that trusts everybody.
        let hba = world.server.socket_dir().join("data/pg_hba.conf");
        let lines = fs::read_to_string(&hba).expect("the server's pg_hba.conf");
        fs::write(&hba, format!("host all soak 127.0.0.1/32 password\n{lines}")).expect("a line in pg_hba.conf");
        world.order("SELECT pg_reload_conf()");
        let mut stranger = world.server.config("stranger");
        stranger.user("soak").password("a-wrong-one");
        assert!(wait_until(within(ms(10_000)), || stranger.connect(NoTls).is_err()), "the password is asked for");
        world
    }

    /// How the pools connect, each under a name of its own.
    pub(crate) fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=soak password={PASSWORD} dbname=postgres", self.proxy.port())
    }

    /// How another program connects as the same role.
    pub(crate) fn user_beside_the_proxy(&self) -> postgres::Config {
        let mut config = self.server.config("others");
        config.user("soak").password(PASSWORD);
        config
    }

    /// Has the server know another password, or the right one again.
    pub(crate) fn password(&self, right: bool) {
        self.refused.store(true, SeqCst);
        let password = if right { PASSWORD } else { "another" };
        self.order(&format!("ALTER ROLE soak PASSWORD '{password}'"));
    }

    // ------------------------------------------------------------------------------------------ the network

    pub(crate) fn foul(&self) {
        *self.clear.lock() = None;
    }

    pub(crate) fn fair(&self) {
        *self.clear.lock() = Some(Instant::now());
    }

    /// For how long the network has passed everything on.
    pub(crate) fn fair_for(&self) -> Duration {
        self.clear.lock().map_or(Duration::ZERO, |since| since.elapsed())
    }

    // ------------------------------------------------------------------------------------------ the server

    pub(crate) fn order(&self, sql: &str) {
        self.ask(|client| client.batch_execute(sql));
    }

    /// The backends of this pool.
    pub(crate) fn backends(&self, pool: &str) -> Vec<u64> {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE $1 || ' [%'";
        let rows = self.ask(|client| client.query(sql, &[&pool]));
        rows.iter().map(|row| row.get::<_, i32>(0) as u64).collect()
    }

    /// What was committed by users of this pool.
    pub(crate) fn written(&self, pool: &str) -> Vec<String> {
        let rows = self.ask(|client| client.query("SELECT token FROM soak WHERE lane = $1", &[&pool]));
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Has the server end one of this pool's backends, or all of them.
    pub(crate) fn terminate(&self, pool: &str, one: bool) -> usize {
        let limit = if one { "LIMIT 1" } else { "" };
        let sql = format!(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity \
             WHERE application_name LIKE $1 || ' [%' ORDER BY random() {limit}) AS victims"
        );
        self.ask(|client| client.query(&sql, &[&pool])).len()
    }

    /// Asks on a connection beside the proxy, again and again while the server starts.
    fn ask<T>(&self, mut question: impl FnMut(&mut Client) -> Result<T, postgres::Error>) -> T {
        let mut admin = self.admin.lock();
        let deadline = within(Duration::from_secs(60));
        loop {
            let answer = match &mut *admin {
                Some(client) => question(client),
                None => self.server.config("admin").connect(NoTls).and_then(|client| question(admin.insert(client))),
            };
            match answer {
                Ok(answer) => return answer,
                Err(e) => {
                    *admin = None;
                    assert!(Instant::now() < deadline, "the server does not answer: {e:?}");
                    std::thread::sleep(ms(10));
                }
            }
        }
    }
}
