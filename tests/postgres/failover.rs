//! A primary with a streaming standby: when the standby takes over, writes go on without a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::{Proxy, SOON, Server, alone, assert_no_threads, beside_others, ms, wait_until, within};
use millpond::postgres::{Pool, PostgresManager};
use millpond::{Builder, CloseReason};
use postgres::NoTls;

/// The pool looks for a server at least this often while somebody waits.
const BACKOFF: Duration = Duration::from_secs(1);
/// How long a connect with its queries and the first write take on a loaded machine.
const CONNECT: Duration = ms(500);
/// How long a thread waits for a connection before it asks again.
const PATIENCE: Duration = Duration::from_secs(5);
const WRITERS: usize = 8;

struct Pair {
    primary: Server,
    standby: Server,
}

impl Pair {
    fn start() -> Pair {
        let primary = Server::with(Server::STREAMING);
        primary.connect().batch_execute("CREATE TABLE t (n serial)").unwrap();
        let standby = Server::standby_of(&primary);
        Pair { primary, standby }
    }

    fn pool(&self, first: u16, name: &str) -> Builder<PostgresManager<NoTls>> {
        let params = format!(
            "host=127.0.0.1,127.0.0.1 port={first},{} user=postgres dbname=postgres application_name={name} \
             target_session_attrs=read-write",
            self.standby.port()
        );
        let manager = PostgresManager::parse(&params, NoTls).unwrap();
        manager
            .builder()
            .name(name)
            .max_size(WRITERS as u32)
            .open_timeout(Duration::from_secs(2))
            .close_timeout(ms(500))
    }
}

/// What one thread has done: when each write ended, and how.
type Writes = Vec<(Instant, Result<(), String>)>;

/// Threads that write one row after the other.
struct Load {
    over: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Writes>>,
}

impl Load {
    fn start(pool: &Pool) -> Load {
        let over = Arc::new(AtomicBool::new(false));
        let writer = |_| {
            let (pool, over) = (pool.clone(), Arc::clone(&over));
            thread::spawn(move || {
                let mut writes = Vec::new();
                while !over.load(SeqCst) {
                    let write = match pool.get_timeout(PATIENCE) {
                        Ok(mut client) => client.execute("INSERT INTO t DEFAULT VALUES", &[]).map(drop).map_err(|e| {
                            let code = e.code().map_or_else(String::new, |code| code.code().to_owned());
                            format!("{code} {e}")
                        }),
                        Err(e) => Err(e.to_string()),
                    };
                    writes.push((Instant::now(), write));
                    thread::sleep(ms(2));
                }
                writes
            })
        };
        Load { writers: (0..WRITERS).map(writer).collect(), over }
    }

    fn end(self) -> Vec<Writes> {
        self.over.store(true, SeqCst);
        self.writers.into_iter().map(|writer| writer.join().expect("a writer")).collect()
    }
}

/// Every thread writes again at `by`, and none fails after that.
#[track_caller]
fn assert_writes_again(all: &[Writes], from: Instant, by: Instant) {
    for writes in all {
        let first = writes.iter().find(|(at, write)| *at > from && write.is_ok());
        let (at, _) = first.unwrap_or_else(|| panic!("never again: {:?}", writes.last()));
        assert!(*at <= by, "not for {:?}, and should have within {:?}", *at - from, by - from);
        let late = writes.iter().filter(|(at, write)| *at > by && write.is_err()).collect::<Vec<_>>();
        assert!(late.is_empty(), "{} still fail: {:?}", late.len(), late[0]);
    }
}

#[track_caller]
fn assert_ends(pool: &Pool, servers: &[&Server]) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_no_threads(pool.name());
    for server in servers {
        assert_eq!(server.wait_for(pool.name(), 0, within(SOON)), 0);
    }
}

/// As an operator changes over: the old primary is told to write no more, and lives on. Its connections stay healthy to
/// all appearance.
#[test]
fn connections_to_a_node_that_turned_read_only_are_replaced() {
    let _alone = alone();
    let pair = Pair::start();
    let pool = pair.pool(pair.primary.port(), "fo-readonly").open().unwrap();
    let load = Load::start(&pool);
    assert!(wait_until(within(SOON), || pair.primary.count("fo-readonly") > 1), "{}", pool.stats());
    thread::sleep(ms(300));
    assert_eq!(pair.standby.count("fo-readonly"), 0);
    assert_eq!(pool.stats().closed_for(CloseReason::Outdated), 0);

    let demoted = Instant::now();
    let mut admin = pair.primary.connect();
    admin.batch_execute("ALTER SYSTEM SET default_transaction_read_only = on").unwrap();
    admin.batch_execute("SELECT pg_reload_conf()").unwrap();
    // For a moment nobody takes writes.
    thread::sleep(ms(300));
    pair.standby.promote();
    let promoted = Instant::now();
    thread::sleep(BACKOFF + CONNECT + ms(500));
    let stats = pool.stats();
    let writes = load.end();

    assert_writes_again(&writes, promoted, promoted + BACKOFF + CONNECT);
    let refused = writes.iter().flatten().filter(|(_, write)| write.as_ref().is_err_and(|e| e.starts_with("25006")));
    let refused: Vec<_> = refused.collect();
    assert!(!refused.is_empty());
    assert!(refused.len() <= 2 * WRITERS, "each connection should find out once, not {} times", refused.len());
    assert!(refused.iter().all(|(at, _)| *at > demoted));
    assert!(stats.closed_for(CloseReason::Outdated) > 0, "{stats}");
    assert_eq!(pair.primary.wait_for("fo-readonly", 0, within(SOON)), 0, "none is left on the old primary");
    assert_ends(&pool, &[&pair.primary, &pair.standby]);
}

#[test]
fn a_primary_that_is_gone_is_replaced() {
    let _alone = alone();
    let pair = Pair::start();
    let pool = pair.pool(pair.primary.port(), "fo-gone").open().unwrap();
    let load = Load::start(&pool);
    assert!(wait_until(within(SOON), || pair.primary.count("fo-gone") > 1), "{}", pool.stats());
    thread::sleep(ms(300));
    let opens = pool.stats().opens;

    let killed = Instant::now();
    pair.primary.kill();
    thread::sleep(ms(300));
    pair.standby.promote();
    let promoted = Instant::now();
    thread::sleep(BACKOFF + CONNECT + ms(500));
    let (stats, down) = (pool.stats(), promoted - killed);
    let writes = load.end();

    assert_writes_again(&writes, promoted, promoted + BACKOFF + CONNECT);
    let failed = writes.iter().flatten().filter(|(_, write)| write.is_err()).count();
    assert!(failed <= WRITERS, "each connection should find out once, not {failed} times");
    assert!(stats.opens - opens <= WRITERS as u64, "more logins than connections: {stats}");
    // Four may be under way at first; then pauses of 50, 100, 200, 400 and 800 ms, and of a second, a fifth shorter at
    // most.
    let attempts = 4 + 6 + (down.as_secs_f64() / 0.8) as u64;
    assert!(stats.failed_opens <= attempts, "more than {attempts} attempts in {down:?}: {stats}");
    assert_ends(&pool, &[&pair.standby]);
}

/// A primary that accepts connections and says nothing: its machine lives and it does not, or a balancer before it.
#[test]
fn a_primary_that_is_silent_is_passed_over() {
    let _alone = alone();
    let pair = Pair::start();
    let proxy = Proxy::to(pair.primary.addr());
    let pool = pair.pool(proxy.port(), "fo-silent").validation_timeout(ms(300)).open().unwrap();
    // A connection for each, not in use at the moment.
    let all: Vec<_> = (0..WRITERS).map(|_| pool.get().unwrap()).collect();
    assert_eq!(pair.primary.count("fo-silent"), WRITERS as i64);
    drop(all);

    proxy.pause();
    pair.standby.promote();
    // `Validate::AfterIdle`.
    thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    let load = Load::start(&pool);
    // The old connections are found silent, and each new one tries the silent node first, for its share of the limit.
    let (validation, share) = (ms(300), Duration::from_secs(1));
    let limit = validation + share + BACKOFF + CONNECT;
    thread::sleep(limit + ms(500));
    let writes = load.end();
    assert_writes_again(&writes, begun, begun + limit);
    proxy.resume();
    assert_ends(&pool, &[&pair.primary, &pair.standby]);
}

/// A transaction may be read-only on a node that is not: that is no reason to replace anything.
#[test]
fn a_read_only_transaction_says_nothing_of_the_node() {
    let _beside = beside_others();
    let server = Server::shared();
    let params = server.conninfo("fo-own") + " target_session_attrs=read-write";
    let pool = PostgresManager::parse(&params, NoTls).unwrap().builder().name("fo-own").max_size(2).open().unwrap();
    drop([pool.get().unwrap(), pool.get().unwrap()]);
    for _ in 0..20 {
        let mut client = pool.get().unwrap();
        let mut transaction = client.build_transaction().read_only(true).start().unwrap();
        let error = transaction.batch_execute("CREATE TABLE never (i int)").unwrap_err();
        assert_eq!(error.code().map(|code| code.code()), Some("25006"));
    }
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Outdated)), (2, 0), "{stats}");
    assert_ends(&pool, &[server]);
}
