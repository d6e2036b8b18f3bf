//! Nobody is called an orphan, or this process's own, who is not: through poolers and tunnels, from other namespaces,
//! in thousands of audits.

use crate::support::{Again, Bouncer, Cable, Namespace, PoolMode, Proxy, Server, skipped, wait_until};
use millpond::postgres::{Audit, Backend, Outcome, Owner, Pool, PostgresManager, audit, audit_with};
use postgres::{Client, NoTls};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// More than any system gives to a process, as far as this machine's own goes: nobody's.
const NOBODY: u32 = 3_999_999_999;

/// Each test has a pool name of its own.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::with(&[("max_connections", "100")]))
}

fn tcp(port: u16) -> String {
    format!("host=127.0.0.1 port={port} user=postgres dbname=postgres")
}

fn unix() -> String {
    format!("host={} port={} user=postgres dbname=postgres", server().socket_dir().display(), server().port())
}

fn pool(params: &str, name: &str) -> Pool {
    PostgresManager::parse(params, NoTls).unwrap().builder().name(name).max_size(2).open().unwrap()
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn rows<'a>(audit: &'a Audit, application_name: &str) -> Vec<&'a Backend> {
    audit.backends.iter().filter(|b| b.application_name == application_name).collect()
}

/// A client with a query that runs until the server is told to end it, under this name.
struct Sleeper {
    name: String,
    pid: i32,
    thread: Option<JoinHandle<()>>,
}

impl Sleeper {
    fn start(params: &str, name: &str) -> Sleeper {
        let mut client = Client::connect(&format!("{params} application_name='{name}'"), NoTls).unwrap();
        let pid = client.query_typed_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
        let thread = thread::spawn(move || drop(client.batch_execute("SELECT pg_sleep(600)")));
        let sleeper = Sleeper { name: name.into(), pid, thread: Some(thread) };
        assert!(wait_until(soon(), || sleeper.sleeps()), "{:?}", server().backends(name));
        sleeper
    }

    fn sleeps(&self) -> bool {
        let backends = server().backends(&self.name);
        backends.iter().any(|b| b.pid == self.pid && b.state == "active" && b.query.contains("pg_sleep"))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        server().connect().query_one("SELECT pg_terminate_backend($1)", &[&self.pid]).unwrap();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Forwards a unix socket, as `ssh -L` does, or a proxy beside a container.
struct Forward {
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Forward {
    fn start(dir: &Path, port: u16, to: PathBuf) -> Forward {
        let path = dir.join(format!(".s.PGSQL.{port}"));
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || {
            thread::scope(|scope| {
                for near in listener.incoming() {
                    let near = near.unwrap();
                    // Whoever has nothing to say wakes it for its end.
                    let mut first = [0; 1];
                    if !matches!(std::io::Read::read(&mut (&near), &mut first), Ok(1)) {
                        return;
                    }
                    let far = UnixStream::connect(&to).unwrap();
                    std::io::Write::write_all(&mut (&far), &first).unwrap();
                    scope.spawn(move || {
                        thread::scope(|both| {
                            both.spawn(|| pump(&far, &near));
                            pump(&near, &far);
                        });
                    });
                }
            });
        });
        Forward { path, thread: Some(thread) }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        drop(UnixStream::connect(&self.path));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn pump(mut from: &UnixStream, mut to: &UnixStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

// ---------------------------------------------------------------------------------------------- poolers

#[test]
fn a_living_client_of_a_pooler_on_a_unix_socket_is_not_orphaned() {
    let _beside = crate::support::beside_others();
    for (mode, name) in [(PoolMode::Session, "upstream"), (PoolMode::Transaction, "upstream2")] {
        let pooler = Bouncer::start_on_unix(server(), mode, &[]);
        let remote = Sleeper::start(&tcp(pooler.port()), &format!("{name} [{NOBODY}]"));
        for params in [tcp(server().port()), unix()] {
            let pool = pool(&params, name);
            let audit = audit(&pool).unwrap();
            assert_eq!(rows(&audit, &remote.name).len(), 1, "{audit}");
            assert_eq!(audit.orphans().count(), 0, "{audit}");
            assert!(audit.terminate_orphans(&pool).unwrap().done.is_empty());
        }
        assert!(remote.sleeps());
    }
}

#[test]
fn a_living_client_of_a_forwarded_unix_socket_is_not_orphaned() {
    let _beside = crate::support::beside_others();
    let dir = tempfile::tempdir().unwrap();
    let real = server().socket_dir().join(format!(".s.PGSQL.{}", server().port()));
    let _forward = Forward::start(dir.path(), server().port(), real);
    let forwarded = unix().replace(&server().socket_dir().display().to_string(), &dir.path().display().to_string());
    let remote = Sleeper::start(&forwarded, &format!("forwarded [{NOBODY}]"));
    for params in [tcp(server().port()), unix(), forwarded] {
        let pool = pool(&params, "forwarded");
        let audit = audit(&pool).unwrap();
        assert_eq!(rows(&audit, &remote.name).len(), 1, "{audit}");
        assert_eq!(audit.orphans().count(), 0, "{audit}");
        assert!(audit.terminate_orphans(&pool).unwrap().done.is_empty());
    }
    assert!(remote.sleeps());
}

#[test]
fn what_a_pooler_holds_is_another_s_until_the_pooler_dies() {
    let _beside = crate::support::beside_others();
    let pooler = Bouncer::start(server(), PoolMode::Session, &[]);
    let remote = Sleeper::start(&tcp(pooler.port()), &format!("downstream [{NOBODY}]"));
    let pool = pool(&tcp(server().port()), "downstream");
    let before = audit(&pool).unwrap();
    let [row] = rows(&before, &remote.name)[..] else { panic!("{before}") };
    assert_eq!((row.owner, &row.note), (Owner::Other, &None), "{before}");
    assert!(before.to_string().contains(&format!("another process here ({NOBODY} by its name)")), "{before}");
    let beside = audit(&self::pool(&unix(), "downstream")).unwrap();
    assert_eq!(rows(&beside, &remote.name)[0].owner, Owner::Unknown, "{beside}");
    assert!(before.terminate_orphans(&pool).unwrap().done.is_empty() && remote.sleeps());

    // Its client lives, and will never have an answer.
    pooler.kill();
    // That its end is closed may take the kernel a moment.
    let mut after = audit(&pool).unwrap();
    let orphaned = wait_until(soon(), || {
        after = audit(&pool).unwrap();
        rows(&after, &remote.name)[0].owner == Owner::Orphaned
    });
    assert!(orphaned, "{after}");
    let account = after.terminate_orphans(&pool).unwrap();
    let [done] = &account.done[..] else { panic!("{account}") };
    assert_eq!((done.pid, done.process, &done.outcome), (remote.pid, Some(NOBODY), &Outcome::Ended), "{account}");
}

// ---------------------------------------------------------------------------------------------- a closed end

/// Not a test of its own: a process with a query, until it is killed.
#[test]
#[ignore = "the work of a process that another test starts"]
fn client() {
    let params = Again::task();
    drop(Client::connect(&params, NoTls).unwrap().batch_execute("SELECT pg_sleep(600)"));
}

/// The kernel keeps a closed end for `tcp_fin_timeout`, here a second. Orphans mostly are older than that.
#[test]
fn an_orphan_remains_one_when_its_client_s_end_is_forgotten() {
    let _beside = crate::support::beside_others();
    let cable = match Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return skipped("an_orphan_remains_one_when_its_client_s_end_is_forgotten", &why),
    };
    let set = |setting: &str, value: &str| std::fs::write(format!("/proc/sys/net/ipv4/{setting}"), value).unwrap();
    cable.near.run(|| {
        set("tcp_fin_timeout", "1");
        let server = Server::start();
        let params = tcp(server.port());
        let mut client = Again::run("orphans::client", &format!("{params} application_name='forgotten [{NOBODY}]'"));
        let name = format!("forgotten [{NOBODY}]");
        let busy = || server.backends(&name).iter().any(|b| b.state == "active" && b.query.contains("pg_sleep"));
        assert!(wait_until(soon(), busy));
        let pool = pool(&params, "forgotten");
        let owner = || {
            let audit = audit(&pool).unwrap();
            let [row] = rows(&audit, &name)[..] else { panic!("{audit}") };
            (row.owner, row.client.unwrap())
        };
        let (checked_out, client_s_end) = owner();
        assert_eq!(checked_out, Owner::Other);
        client.end();
        assert!(wait_until(soon(), || owner().0 == Owner::Orphaned), "{:?}", owner());
        let near = format!(" 0100007F:{:04X} ", client_s_end.port());
        let known = || {
            std::fs::read_to_string("/proc/thread-self/net/tcp")
                .unwrap()
                .lines()
                .any(|l| l.split_once(':').is_some_and(|(_, ends)| ends.starts_with(&near)))
        };
        assert!(wait_until(soon(), || !known()));
        assert_eq!(owner().0, Owner::Orphaned);
        // Where loopback addresses may come from other machines, what is not here may be there.
        set("conf/all/route_localnet", "1");
        assert_eq!(owner().0, Owner::Unknown);
        set("conf/all/route_localnet", "0");
        let account = audit(&pool).unwrap().terminate_orphans(&pool).unwrap();
        assert!(matches!(&account.done[..], [done] if done.outcome == Outcome::Ended), "{account}");
        assert_eq!(server.count(&name), 0);
    });
}

// ---------------------------------------------------------------------------------------------- thousands

/// Not a test of its own: a process that connects, asks and hangs up, over and over, until it is killed.
#[test]
#[ignore = "the work of a process that another test starts"]
fn restless() {
    let params = Again::task();
    loop {
        once(&params);
    }
}

fn once(params: &str) {
    let mut client = Client::connect(params, NoTls).unwrap();
    // Not more often: each leaves a port behind that nobody can use for a minute.
    for _ in 0..3 {
        client.batch_execute("SELECT pg_sleep(0.01)").unwrap();
    }
}

/// Clients of every kind come and go, none of them dead, each under the name of another process; and whatever moment an
/// audit meets, no word of it is wrong. `MILLPOND_TEST_AUDITS` makes more of them than 200.
#[test]
fn of_thousands_of_words_none_is_wrong() {
    let _beside = crate::support::beside_others();
    let audits = std::env::var("MILLPOND_TEST_AUDITS").map_or(200, |n| n.parse().unwrap());
    let near = Bouncer::start(server(), PoolMode::Transaction, &[("default_pool_size", "3")]);
    let far = Bouncer::start_on_unix(server(), PoolMode::Session, &[("default_pool_size", "3")]);
    let direct = tcp(server().port());
    let pool = pool(&direct, "restless");
    let kinds = [
        (1, direct.clone(), vec![Owner::ThisProcess, Owner::Unknown]),
        (2, direct.clone(), vec![Owner::Other, Owner::Unknown]),
        (3, tcp(near.port()), vec![Owner::Other, Owner::Unknown]),
        (4, tcp(far.port()), vec![Owner::Unknown]),
        (5, unix(), vec![Owner::Unknown]),
    ];
    let named = |number: u32, params: &str| format!("{params} application_name='restless [{number}]'");
    let mut other = Again::run("orphans::restless", &named(2, &direct));
    let stop = AtomicBool::new(false);
    let mut said = BTreeMap::<(Option<u32>, String), usize>::new();
    thread::scope(|scope| {
        for (number, params, _) in kinds.iter().filter(|(number, ..)| *number != 2) {
            let (params, stop) = (named(*number, params), &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    once(&params);
                }
            });
        }
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut client = Client::connect(&direct, NoTls).unwrap();
            for n in 0..audits {
                let found = if n % 20 == 0 { audit(&pool) } else { audit_with(&pool, &mut client) }.unwrap();
                for backend in &found.backends {
                    let number = backend.process.unwrap_or_default();
                    let own = vec![Owner::Pool, Owner::Audit, Owner::ThisProcess, Owner::Unknown];
                    let right = kinds.iter().find(|(kind, ..)| *kind == number).map_or(&own, |(_, _, right)| right);
                    assert!(right.contains(&backend.owner), "{backend:?} in\n{found}");
                    *said.entry((backend.process, format!("{:?}", backend.owner))).or_default() += 1;
                }
                assert!(found.backends.iter().filter(|b| b.owner == Owner::Pool).count() <= 1, "{found}");
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = made {
            std::panic::resume_unwind(panic);
        }
    });
    other.end();
    eprintln!("{audits} audits, who said of whom: {said:?}");
    // (Which word each deserves when it holds still is told elsewhere. Here it depends on how long an audit takes, on a
    // busy machine longer than a client stays, and then it is "unknown" each time.)
    for (number, ..) in kinds {
        assert!(said.keys().any(|(process, _)| *process == Some(number)), "{number} was never met: {said:?}");
    }
}

// ---------------------------------------------------------------------------------------------- other namespaces

/// Not a test of its own: a process that makes audits until it has seen so many backends under a name that are not its
/// pool's, and writes down every word of them. See [`elsewhere`].
#[test]
#[ignore = "the work of a process that another test starts"]
fn auditor() {
    let task = Again::task();
    let task: Vec<_> = task.splitn(5, '\n').collect();
    let [path, name, audits, others, params] = task[..] else { panic!("{task:?}") };
    let (mut audits, others): (usize, usize) = (audits.parse().unwrap(), others.parse().unwrap());
    let pool = pool(params, name);
    let mut words = std::collections::BTreeSet::new();
    // That this process has a socket with a port means nothing: from the second audit on it has one with each that it
    // met.
    let mut ports = BTreeMap::new();
    let deadline = Instant::now() + 3 * PATIENCE; // all these audits, on a busy machine
    while audits > 0 && Instant::now() < deadline {
        let audit = audit(&pool).unwrap();
        let theirs = audit.backends.iter().filter(|b| !matches!(b.owner, Owner::Pool | Owner::Audit));
        if theirs.count() >= others {
            audits -= 1;
        }
        for client in audit.backends.iter().filter_map(|b| b.client) {
            ports.entry(client).or_insert_with(|| TcpListener::bind(client));
        }
        words.extend(
            audit.backends.iter().map(|b| format!("{}|{}|{:?}|{:?}", b.pid, b.application_name, b.owner, b.note)),
        );
    }
    assert_eq!(audits, 0, "{words:?}");
    std::fs::write(path, words.into_iter().collect::<Vec<_>>().join("\n")).unwrap();
}

struct Auditor {
    process: Again,
    dir: tempfile::TempDir,
}

impl Auditor {
    /// `runner` puts the process where it is to be.
    fn start(runner: &[&str], name: &str, audits: usize, others: usize, params: &str) -> Auditor {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words");
        // It may be another user's.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let task = format!("{}\n{name}\n{audits}\n{others}\n{params}", path.display());
        Auditor { process: Again::run_by(runner, "orphans::auditor", &task), dir }
    }

    /// What it said of whom.
    fn words(mut self) -> Vec<(i32, String, String, String)> {
        assert!(self.process.finish(), "the auditor failed");
        let text = std::fs::read_to_string(self.dir.path().join("words")).unwrap();
        let parse = |line: &str| {
            let mut fields = line.splitn(4, '|').map(String::from);
            let mut next = || fields.next().unwrap();
            (next().parse().unwrap(), next(), next(), next())
        };
        text.lines().map(parse).collect()
    }
}

/// As in containers, of which each has a process number one.
#[test]
fn what_has_our_number_in_another_pid_namespace_is_not_ours() {
    let _beside = crate::support::beside_others();
    let runner = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let tried = std::process::Command::new(runner[0]).args(&runner[1..]).arg("true").output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        return skipped("what_has_our_number_in_another_pid_namespace_is_not_ours", "unshare --pid is not permitted");
    }
    for params in [tcp(server().port()), unix()] {
        let name = "replica [1]";
        let remote = Sleeper::start(&params, name);
        let words = Auditor::start(&runner, "replica", 20, 1, &params).words();
        let said: Vec<_> = words.iter().filter(|(pid, ..)| *pid == remote.pid).collect();
        assert!(!said.is_empty() && said.iter().all(|(_, _, owner, _)| owner == "Unknown"), "{words:#?}");
        let owners = ["Pool", "Audit", "Unknown"];
        assert!(words.iter().all(|(_, _, owner, _)| owners.contains(&&**owner)), "{words:#?}");
        assert!(remote.sleeps());
    }
}

/// What the server's processes hold is not for everybody to see.
#[test]
fn whoever_may_not_look_does_not_know() {
    let _beside = crate::support::beside_others();
    let runner = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let program = std::env::current_exe().unwrap();
    let tried = std::process::Command::new(runner[0]).args(&runner[1..]).arg(program).arg("--list").output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        return skipped("whoever_may_not_look_does_not_know", "no other user may run this program");
    }
    let remote = Sleeper::start(&tcp(server().port()), &format!("shortsighted [{NOBODY}]"));
    let words = Auditor::start(&runner, "shortsighted", 3, 1, &tcp(server().port())).words();
    let said: Vec<_> = words.iter().filter(|(pid, ..)| *pid == remote.pid).collect();
    let right = |owner: &str, note: &str| owner == "Unknown" && note.contains("takes root, or the server's user");
    assert!(!said.is_empty() && said.iter().all(|(_, _, owner, note)| right(owner, note)), "{words:#?}");
    assert!(words.iter().any(|(_, _, owner, _)| owner == "Pool"), "its own are told by their pids: {words:#?}");
}

/// A proxy that listens in there. It ends in there as well, in a test that fails too: elsewhere its end would wait for ever.
struct Inside<'a>(&'a Namespace, Option<Proxy>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let proxy = self.1.take();
        self.0.run(|| drop(proxy));
    }
}

/// The far side of a tunnel has a 127.0.0.1 of its own, and ports that this side has as well.
#[test]
fn what_has_our_address_beyond_a_tunnel_is_not_ours() {
    let _beside = crate::support::beside_others();
    let cable = match Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return skipped("what_has_our_address_beyond_a_tunnel_is_not_ours", &why),
    };
    // With the port that the server has on its side. (Which begins here, and not in there.)
    let port = server().port();
    let near = cable.near.run(|| TcpListener::bind(("127.0.0.1", port)).unwrap());
    let _tunnel = Inside(&cable.near, Some(Proxy::between(near, server().addr())));
    let auditor = cable.near.run(|| Auditor::start(&[], "tunnel", 100, 2, &tcp(port)));
    let same = Sleeper::start(&tcp(server().port()), &format!("tunnel [{}]", auditor.process.id()));
    let dead = Sleeper::start(&tcp(server().port()), &format!("tunnel [{NOBODY}]"));
    let words = auditor.words();
    for far in [same.pid, dead.pid] {
        let said: Vec<_> = words.iter().filter(|(pid, ..)| *pid == far).collect();
        assert!(!said.is_empty() && said.iter().all(|(_, _, owner, _)| owner == "Unknown"), "{words:#?}");
    }
    assert!(words.iter().all(|(_, _, owner, _)| ["Pool", "Audit", "Unknown"].contains(&&**owner)), "{words:#?}");
    assert!(same.sleeps() && dead.sleeps());
}
