//! What a pool connects to, and how that is broken.

use super::PATIENCE;
use super::rows::{END_ALL, Front, Row};
use crate::support::{Bouncer, PoolMode, Proxy, Server, Stopped, wait_until, within};
use parking_lot::Mutex;
use postgres::{Client, Config, NoTls};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, chown};
use std::sync::Arc;

/// What one pool has to itself in one row. Gone when dropped.
pub(crate) struct World {
    front: Front,
    /// Whoever takes the pool's place until a row is healed.
    pub(crate) others: Mutex<Vec<Client>>,
    frozen: Mutex<Option<Stopped>>,
    /// New connections come here once the first proxy's are forgotten.
    second: Mutex<Option<Proxy>>,
    proxy: Option<Proxy>,
    bouncer: Option<Bouncer>,
    pub(crate) standby: Option<Server>,
    pub(crate) server: Arc<Server>,
}

impl World {
    /// On the server of an earlier row, where that will do.
    pub(crate) fn new(row: &Row, server: Option<Arc<Server>>) -> World {
        let server = server.filter(|_| row.is_plain()).unwrap_or_else(|| Arc::new(serve(row)));
        let standby = (row.front == Front::Pair).then(|| Server::standby_of(&server));
        let bouncer = matches!(row.front, Front::Bouncer | Front::ProxiedBouncer).then(|| {
            let bouncer = Bouncer::start(&server, PoolMode::Transaction, &[("max_client_conn", "20")]);
            let users = "\"postgres\" \"\"\n\"app\" \"\"\n\"others\" \"\"\n";
            fs::write(bouncer.dir().join("users"), users).expect("a list of users");
            bouncer.admin("RELOAD");
            bouncer
        });
        let proxy = match row.front {
            Front::Proxy => Some(Proxy::to(server.addr())),
            Front::ProxiedBouncer => bouncer.as_ref().map(|bouncer| Proxy::to(bouncer.addr())),
            _ => None,
        };
        let world = World {
            front: row.front,
            others: Mutex::default(),
            frozen: Mutex::default(),
            second: Mutex::default(),
            proxy,
            bouncer,
            standby,
            server,
        };
        if let Some(prepare) = row.prepare {
            prepare(&world);
        }
        world
    }

    /// Ends it, and with it whatever still hangs on it. The server is left for another row, where it is fit for that.
    pub(crate) fn retire(self, row: &Row) -> Option<Arc<Server>> {
        row.is_plain().then(|| {
            self.admin(END_ALL);
            Arc::clone(&self.server)
        })
    }

    pub(crate) fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().expect("a row with a proxy")
    }

    pub(crate) fn bouncer(&self) -> &Bouncer {
        self.bouncer.as_ref().expect("a row with a PgBouncer")
    }

    /// Where the pool connects to.
    fn port(&self) -> u16 {
        match (&self.proxy, &self.bouncer) {
            (Some(proxy), _) => proxy.port(),
            (None, Some(bouncer)) => bouncer.port(),
            (None, None) => self.server.port(),
        }
    }

    pub(crate) fn conninfo(&self) -> String {
        let rest = "user=app password=old dbname=postgres application_name=faults";
        match &self.standby {
            None => format!("host=127.0.0.1 port={} {rest}", self.port()),
            Some(standby) => format!(
                "host=127.0.0.1,127.0.0.1 port={},{} {rest} target_session_attrs=read-write",
                self.server.port(),
                standby.port()
            ),
        }
    }

    /// Has the server do something, as its administrator.
    pub(crate) fn admin(&self, order: &str) {
        self.server.connect().batch_execute(order).expect("an order to the server");
    }

    /// Has the server ask its users for passwords from now on, but for its administrator.
    pub(crate) fn require_password(&self) {
        let path = self.server.socket_dir().join("data/pg_hba.conf");
        let hba = fs::read_to_string(&path).expect("the server's pg_hba.conf");
        fs::write(&path, format!("host all app 127.0.0.1/32 scram-sha-256\n{hba}")).expect("a line in pg_hba.conf");
        self.admin("SELECT pg_reload_conf()");
    }

    /// Ends the pool's connections, and has others take every place there is before the pool can connect again.
    pub(crate) fn crowd_out(&self, port: u16) {
        let proxy = self.proxy();
        proxy.refuse();
        proxy.cut();
        let mut config = Config::new();
        config.host("127.0.0.1").port(port).user("others").dbname("postgres").connect_timeout(PATIENCE);
        let mut others = self.others.lock();
        let is_full = wait_until(within(PATIENCE), || {
            while let Ok(client) = config.connect(NoTls) {
                others.push(client);
            }
            // The last of the pool's may just have been on its way out.
            self.behind() == 0 && config.connect(NoTls).map(|client| others.push(client)).is_err()
        });
        assert!(is_full, "there is always room for one more");
        proxy.accept();
    }

    /// How many of the pool's connections what is behind the proxy still has.
    fn behind(&self) -> usize {
        match &self.bouncer {
            // A full PgBouncer has no place for a question, and forgets a reset connection at once.
            Some(_) => 0,
            None => self.on(&self.server),
        }
    }

    /// From now on the connections that there are lead nowhere, and newer ones work.
    pub(crate) fn forget_flows(&self) {
        let proxy = self.proxy();
        proxy.refuse();
        proxy.pause();
        let listener = TcpListener::bind(proxy.addr()).expect("the proxy's own port");
        *self.second.lock() = Some(Proxy::between(listener, self.server.addr()));
    }

    /// Stops the postmaster and the pool's backends by SIGSTOP, until [`thaw`](World::thaw).
    pub(crate) fn freeze(&self) {
        let mut admin = self.server.connect();
        let rows = admin.query("SELECT pid FROM pg_stat_activity WHERE usename = 'app'", &[]).expect("backends");
        let mut pids: Vec<Pid> = rows.iter().filter_map(|row| Pid::from_raw(row.get(0))).collect();
        pids.extend(Pid::from_raw(self.server.pid() as i32));
        *self.frozen.lock() = Some(Stopped::stop(pids));
    }

    pub(crate) fn thaw(&self) {
        drop(self.frozen.lock().take());
    }

    /// How many connections of the pool's a server has.
    fn on(&self, server: &Server) -> usize {
        let question = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
        server.connect().query_one(question, &[]).map_or(0, |row| row.get::<_, i64>(0) as usize)
    }

    /// How many connections are left, as what the pool connects to sees it. Where a proxy hides from that how a
    /// connection ended, this process's and the others' own ends are counted, of which the system knows.
    pub(crate) fn left(&self) -> Option<usize> {
        match self.front {
            Front::Server => Some(self.on(&self.server)),
            Front::Bouncer => {
                let clients = self.bouncer().admin("SHOW CLIENTS");
                Some(clients.iter().filter(|row| row.get("user") == Some("app")).count())
            }
            Front::Proxy | Front::ProxiedBouncer => established(self.proxy().addr()),
            Front::Pair => {
                // A primary that was killed has none.
                let primary = self.server.config("observer").connect(NoTls).map_or(0, |_| self.on(&self.server));
                Some(primary + self.standby.as_ref().map_or(0, |standby| self.on(standby)))
            }
        }
    }

    /// How often the pool has logged in, and how often it was refused.
    pub(crate) fn logins(&self) -> (usize, usize) {
        if self.proxy.is_some() {
            let second = self.second.lock().as_ref().map_or(0, Proxy::accepted);
            return (self.proxy().accepted() + second, 0);
        }
        if let Some(bouncer) = &self.bouncer {
            let is_login = |line: &&str| line.contains("login attempt") && line.contains("user=app");
            return (bouncer.log().lines().filter(is_login).count(), 0);
        }
        let logs = [Some(&*self.server), self.standby.as_ref()].into_iter().flatten().map(Server::log);
        let (mut made, mut refused) = (0, 0);
        for line in logs.collect::<String>().lines().filter(|line| line.starts_with("app|")) {
            made += usize::from(line.contains("connection authorized"));
            refused += usize::from(line.contains("FATAL:") && !line.contains("terminating connection"));
        }
        (made + refused, refused)
    }

    /// The server ends all others, and recovers. Returns when it answers again.
    pub(crate) fn kill_one_backend(&self) {
        let mut client = self.server.connect();
        let row = client.query_one("SELECT pid FROM pg_stat_activity WHERE usename = 'app' LIMIT 1", &[]);
        let pid = Pid::from_raw(row.expect("a backend of the pool's").get(0)).expect("a process");
        kill_process(pid, Signal::KILL).expect("a backend that runs");
        // It ends all others, this one too, and then begins anew.
        assert!(wait_until(within(PATIENCE), || client.is_closed() || client.simple_query("").is_err()), "unmoved");
        assert!(
            wait_until(within(PATIENCE), || self.server.config("observer").connect(NoTls).is_ok()),
            "down for good"
        );
    }

    /// Returns when the server answers again.
    pub(crate) fn start_slowly(&self) {
        let data = self.server.socket_dir().join("data");
        self.server.stop_fast();
        // Asked for a file from an archive, the server waits for it, and tells everybody meanwhile that it is starting up.
        let config = "hot_standby = off\nrestore_command = 'test -e slow && rm slow && sleep 2; false'\n";
        let path = data.join("postgresql.conf");
        let before = fs::read_to_string(&path).expect("the server's configuration");
        fs::write(path, before + config).expect("the server's configuration");
        for name in ["slow", "recovery.signal"] {
            let path = data.join(name);
            fs::write(&path, "").expect("a file for the server");
            let owner = fs::metadata(&data).expect("the server's folder");
            chown(path, Some(owner.uid()), Some(owner.gid())).expect("a file of the server's");
        }
        self.server.start_again();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What is stopped cannot end.
        self.thaw();
    }
}

/// A server that counts logins in its log, with the roles of the pool and of whoever is in its way.
fn serve(row: &Row) -> Server {
    let mut settings = vec![("log_connections", "on"), ("log_line_prefix", "%u|")];
    settings.extend(row.settings);
    let server = Server::with(&settings);
    let made = server.connect().batch_execute(
        "CREATE ROLE app LOGIN; CREATE ROLE others LOGIN; CREATE TABLE t (n serial); \
         GRANT ALL ON ALL TABLES IN SCHEMA public TO app; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app",
    );
    made.expect("roles and a table");
    server
}

/// How many connections to `addr` the system counts that their own end has not closed.
fn established(addr: SocketAddr) -> Option<usize> {
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    // The loopback, as the table writes it.
    let proxy = format!("0100007F:{:04X}", addr.port());
    let is_ours = |line: &&str| {
        let mut fields = line.split_whitespace().skip(2);
        let (to, state) = (fields.next().unwrap_or_default(), fields.next());
        // Established, or closed by the other end only.
        to == proxy && matches!(state, Some("01" | "08"))
    };
    Some(table.lines().filter(is_ours).count())
}
