//! The server's view of an application's backends, joined with the pool's own.

use crate::support::{Again, Bouncer, PoolMode, Proxy, Server, Silent, ms, threads_named, wait_until};
use millpond::postgres::{Audit, Backend, Budget, Outcome, Owner, Pool, PostgresManager, audit, audit_with};
use millpond::{ConnectionState, PooledConnection};
use postgres::NoTls;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

const PATIENCE: Duration = Duration::from_secs(10);

/// Each test has a pool name, and where it matters a role, of its own.
fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::with(&[("max_connections", "60")]))
}

fn params(role: &str) -> String {
    format!("host=127.0.0.1 port={} user={role} dbname=postgres", server().port())
}

fn manager(params: &str) -> PostgresManager<NoTls> {
    PostgresManager::parse(params, NoTls).unwrap()
}

fn pool(name: &str, max_size: u32) -> Pool {
    manager(&params("postgres")).builder().name(name).max_size(max_size).open().unwrap()
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn of(audit: &Audit, owner: Owner) -> Vec<&Backend> {
    audit.backends.iter().filter(|b| b.owner == owner).collect()
}

fn row(audit: &Audit, pid: Option<i32>) -> &Backend {
    audit.backends.iter().find(|b| Some(b.pid) == pid).unwrap_or_else(|| panic!("no {pid:?} in\n{audit}"))
}

/// An audit with so many orphans: that an end is closed may take the kernel a moment.
fn audit_with_orphans(n: usize, mut audit: impl FnMut() -> Audit) -> Audit {
    let mut found = audit();
    let complete = wait_until(soon(), || {
        found = audit();
        found.orphans().count() == n
    });
    assert!(complete, "{found}");
    found
}

/// Not a test of its own: a process with a pool that has `busy` connections with a query and `idle` without, until it
/// is killed. See [`process`].
#[test]
#[ignore = "the work of a process that another test starts"]
fn other_process() {
    let task = Again::task();
    let task: Vec<_> = task.splitn(4, ' ').collect();
    let [name, busy, idle, params] = task[..] else { panic!("{task:?}") };
    let (busy, idle): (u32, usize) = (busy.parse().unwrap(), idle.parse().unwrap());
    let pool = manager(params).builder().name(name).max_size(busy + idle as u32).open().unwrap();
    let idle: Vec<PooledConnection<_>> = (0..idle).map(|_| pool.get().unwrap()).collect();
    std::thread::scope(|scope| {
        for _ in 0..busy {
            scope.spawn(|| pool.get().unwrap().batch_execute("SELECT pg_sleep(600)"));
        }
    });
    drop(idle);
}

/// Starts such a process, and waits until the server has its backends.
fn process(name: &str, busy: usize, idle: usize, params: &str) -> Again {
    let child = Again::run("audit::other_process", &format!("{name} {busy} {idle} {params}"));
    let known = format!("{name} [{}]", child.id());
    let there = wait_until(soon(), || {
        let backends = server().backends(&known);
        let working = backends.iter().filter(|b| b.state == "active" && b.query.contains("pg_sleep")).count();
        // A pooler may use one more, for what the pool asks when it opens.
        working == busy && backends.iter().filter(|b| b.state == "idle").count() >= idle
    });
    assert!(there, "{:?}", server().backends(&known));
    child
}

#[test]
fn the_pool_s_own_are_joined() {
    let _beside = crate::support::beside_others();
    let pool = pool("joined", 5);
    let mut locks = server().connect();
    locks.batch_execute("SELECT pg_advisory_lock(4711)").unwrap();

    let mut checked_out = [pool.get().unwrap(), pool.get().unwrap(), pool.get().unwrap(), pool.get().unwrap()];
    let [waiting, open, idle, detached] = &mut checked_out;
    let pids = [waiting.backend_pid(), open.backend_pid(), idle.backend_pid(), detached.backend_pid()];
    open.batch_execute("BEGIN").unwrap();
    let [mut waiting, open, idle, detached] = checked_out;
    drop(idle);
    let detached = PooledConnection::detach(detached);
    let waiter = std::thread::Builder::new().name("waiter".into());
    let waiter = waiter.spawn(move || waiting.batch_execute("SELECT pg_advisory_lock(4711)")).unwrap();
    let known = format!("joined [{}]", std::process::id());
    // It is active a moment before it waits.
    let mut observer = server().connect();
    let stuck = "SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event_type = 'Lock'";
    assert!(wait_until(soon(), || observer.query_opt(stuck, &[&pids[0]]).unwrap().is_some()));
    // And the other one has been idle in its transaction for as long as is asserted below, by the server's clock.
    let long = "SELECT FROM pg_stat_activity WHERE pid = $1 AND clock_timestamp() - state_change >= interval '20 ms'";
    assert!(wait_until(soon(), || observer.query_opt(long, &[&pids[1]]).unwrap().is_some()));

    let audit = audit(&pool).unwrap();
    let text = audit.to_string();
    assert!(text.contains(
        "audit of pool 'joined', postgres on database postgres: 5 backends: 3 of this pool, 1 of this process"
    ));
    assert_eq!(
        (audit.role.as_str(), audit.database.as_str(), &*audit.application_name),
        ("postgres", "postgres", &*known)
    );
    assert_eq!(audit.backends.len(), 5, "{text}");
    assert!(audit.notes.is_empty() && audit.missing.is_empty(), "{text}");

    let waiting = row(&audit, pids[0]);
    assert_eq!((waiting.owner, waiting.state.as_deref()), (Owner::Pool, Some("active")));
    assert_eq!(waiting.waiting_on.as_deref(), Some("Lock advisory"));
    let own = waiting.connection.as_ref().unwrap();
    assert_eq!((own.state, own.server_id), (ConnectionState::InUse, pids[0].map(|pid| pid as u64)));
    let line = text.lines().find(|l| l.starts_with(&pids[0].unwrap().to_string())).unwrap();
    assert!(line.contains("active") && line.contains("Lock advisory") && line.contains(" in use by "), "{line}");
    assert!(line.contains("tests/postgres/audit.rs:"), "{line}");

    let open = (row(&audit, pids[1]), open);
    assert_eq!((open.0.owner, open.0.state.as_deref()), (Owner::Pool, Some("idle in transaction")));
    assert!(open.0.in_transaction_for.is_some_and(|d| d >= ms(20) && d < PATIENCE), "{text}");
    assert!(open.0.idle_for().is_some_and(|d| d >= ms(20) && d < PATIENCE), "{text}");

    let idle = row(&audit, pids[2]);
    assert_eq!(idle.connection.as_ref().unwrap().state, ConnectionState::Idle);
    assert_eq!((idle.state.as_deref(), idle.in_transaction_for), (Some("idle"), None));
    assert!(idle.age.unwrap() >= idle.idle_for().unwrap());
    assert!(idle.backend_start.unwrap() < SystemTime::now() + PATIENCE);

    assert!(!text.contains("ClientRead"), "what idle means: {text}");

    assert_eq!(row(&audit, pids[3]).owner, Owner::ThisProcess, "detached");
    assert_eq!(of(&audit, Owner::Audit).len(), 1);
    assert_eq!(audit.orphans().count(), 0);

    locks.batch_execute("SELECT pg_advisory_unlock_all()").unwrap();
    waiter.join().unwrap().unwrap();
    drop((open, detached, pool));
    assert_eq!(server().wait_for(&known, 0, soon()), 0, "the audit's own has gone as well");
}

#[test]
fn others_are_not_of_this_application() {
    let _beside = crate::support::beside_others();
    let params = params("postgres");
    server().connect().batch_execute("CREATE ROLE stranger LOGIN SUPERUSER; ").unwrap();
    server().connect().batch_execute("CREATE DATABASE strange").unwrap();
    let stranger = |params: &str, name: &str| {
        postgres::Client::connect(&format!("{params} application_name='{name}'"), NoTls).unwrap()
    };
    let _others = [
        stranger(&params, "mine [7]x"),
        stranger(&params, "not mine [7]"),
        stranger(&params.replace("user=postgres", "user=stranger"), "mine [7]"),
        stranger(&params.replace("dbname=postgres", "dbname=strange"), "mine [7]"),
    ];
    let pool = pool("mine", 1);
    let audit = audit(&pool).unwrap();
    assert_eq!(audit.backends.len(), 2, "{audit}");
}

#[test]
fn an_exhausted_pool_can_be_audited() {
    let _beside = crate::support::beside_others();
    let pool = manager(&params("postgres")).builder().name("exhausted").max_size(1).connection_timeout(ms(1000)).open();
    let pool = pool.unwrap();
    let in_use = pool.get().unwrap();
    assert!(pool.get().is_err());
    let audit = audit(&pool).unwrap();
    assert_eq!(of(&audit, Owner::Pool)[0].pid, in_use.backend_pid().unwrap());
}

/// With a role that may have two connections, both of which the pool has.
#[test]
fn a_full_server_is_audited_on_the_pool_s_own() {
    let _beside = crate::support::beside_others();
    server().connect().batch_execute("CREATE ROLE full_role LOGIN CONNECTION LIMIT 2").unwrap();
    let builder = manager(&params("full_role")).builder().name("full").max_size(2).connection_timeout(ms(1000));
    let pool = builder.open().unwrap();
    let (one, two) = (pool.get().unwrap(), pool.get().unwrap());
    let pid = two.backend_pid();
    drop(two);
    let found = audit(&pool).unwrap();
    assert_eq!(of(&found, Owner::Pool).len(), 2, "{found}");
    let asking = row(&found, pid);
    assert_eq!((asking.owner, asking.state.as_deref()), (Owner::Pool, Some("active")));
    let _two = pool.get().unwrap();
    let e = audit(&pool).unwrap_err().to_string();
    assert!(e.contains("too many connections for role") && e.contains("all 2 are in use"), "{e}");
    drop(one);
}

#[test]
fn the_backends_of_a_killed_process_are_found_and_ended() {
    let _beside = crate::support::beside_others();
    let pool = pool("orders", 2);
    let in_use = pool.get().unwrap();
    let mut killed = process("orders", 2, 1, &params("postgres"));
    let survivor = process("orders", 1, 0, &params("postgres"));

    let alive = audit(&pool).unwrap();
    let processes: Vec<_> = of(&alive, Owner::Other).iter().map(|b| b.process.unwrap()).collect();
    assert_eq!(processes.iter().filter(|&&pid| pid == killed.id()).count(), 3, "{alive}");
    assert_eq!(processes.len(), 4, "{alive}");
    assert_eq!(alive.orphans().count(), 0, "{alive}");
    assert!(alive.notes.is_empty(), "{alive}");
    assert!(alive.terminate_orphans(&pool).unwrap().done.is_empty());

    // Not waited for yet: a zombie is dead enough.
    killed.kill();
    let mut found = audit(&pool).unwrap();
    assert!(
        wait_until(soon(), || {
            found = audit(&pool).unwrap();
            // The idle one goes by itself, in its own time.
            found.orphans().count() == 2 && found.backends.iter().all(|b| b.owner != Owner::Unknown)
        }),
        "{found}"
    );
    killed.end();
    let found = audit(&pool).unwrap();
    assert_eq!(found.orphans().count(), 2, "{found}");
    assert!(found.orphans().all(|b| b.process == Some(killed.id())), "{found}");
    let said = format!("ORPHANED ({} by its name): its client has closed", killed.id());
    assert!(found.to_string().contains(&said), "{found}");
    assert!(found.to_string().contains("2 orphaned"), "{found}");
    assert_eq!(of(&found, Owner::Other).len(), 1, "the survivor's; the idle one went by itself: {found}");

    let account = found.terminate_orphans(&pool).unwrap();
    assert_eq!(account.done.len(), 2, "{account}");
    for done in &account.done {
        assert_eq!((done.process, &done.outcome), (Some(killed.id()), &Outcome::Ended), "{account}");
        assert!(found.orphans().any(|b| b.pid == done.pid));
    }
    assert!(account.to_string().contains("ended 2 of 2 backends"), "{account}");
    assert_eq!(server().count(&format!("orders [{}]", killed.id())), 0);
    assert_eq!(server().count(&format!("orders [{}]", survivor.id())), 1, "left alone");
    assert!(row(&audit(&pool).unwrap(), in_use.backend_pid()).owner == Owner::Pool, "left alone");

    // What is gone is not hit again.
    let again = found.terminate_orphans(&pool).unwrap();
    assert!(again.done.iter().all(|done| done.outcome == Outcome::Gone), "{again}");
}

/// Between the audit and the end of an orphan, its pid may become another's, or somebody turn out to hold its
/// connection.
#[test]
fn each_is_looked_at_again() {
    let _beside = crate::support::beside_others();
    let pool = pool("again", 1);
    let mut killed = process("again", 1, 0, &params("postgres"));
    let _alive = process("again", 1, 0, &params("postgres"));
    killed.end();
    let found = audit_with_orphans(1, || audit(&pool).unwrap());
    let orphan = found.orphans().next().unwrap().clone();
    let living = of(&found, Owner::Other)[0].clone();
    let only = |backend: Backend| {
        let mut changed = found.clone();
        changed.backends = vec![backend];
        changed.terminate_orphans(&pool).unwrap().done.remove(0).outcome
    };

    let mut other = orphan.clone();
    other.backend_start = other.backend_start.map(|start| start - ms(1));
    assert_eq!(only(other), Outcome::Gone, "another backend with its pid");
    let mut other = orphan.clone();
    other.application_name += "x";
    assert_eq!(only(other), Outcome::Gone, "a backend of another's");
    for checked_out in [&living, of(&found, Owner::Pool)[0]] {
        let mut other = checked_out.clone();
        // Whatever was written down of it, this host is asked again.
        (other.owner, other.process, other.client) = (Owner::Orphaned, orphan.process, orphan.client);
        assert_eq!(only(other), Outcome::Spared("somebody holds its connection".into()));
    }
    assert!(pool.get().unwrap().batch_execute("").is_ok(), "and alive");
    assert_eq!(server().count(&orphan.application_name) + server().count(&living.application_name), 2);

    assert_eq!(only(orphan), Outcome::Ended);
}

/// Through a unix socket nothing is proven, so nothing is ended; unless an operator who knows better names it.
#[test]
fn what_is_unknown_ends_only_by_its_pid() {
    let _beside = crate::support::beside_others();
    let unix =
        format!("host={} port={} user=postgres dbname=postgres", server().socket_dir().display(), server().port());
    let mut killed = process("named", 2, 0, &unix);
    killed.end();
    let theirs = format!("named [{}]", killed.id());
    let ways = [(unix.clone(), true), (params("postgres"), true), (unix, false)];
    let open =
        |(params, observe): &(String, bool)| manager(params).observe(*observe).builder().name("named").open().unwrap();
    let pools = ways.each_ref().map(open);
    let theirs_in = |audit: &Audit| {
        let theirs: Vec<_> = audit.backends.iter().filter(|b| b.process == Some(killed.id())).cloned().collect();
        assert_eq!((theirs.len(), audit.orphans().count()), (2, 0), "{audit}");
        assert!(theirs.iter().all(|b| b.owner == Owner::Unknown), "{audit}");
        theirs
    };
    for (pool, (_, observed)) in pools.iter().zip(&ways) {
        let found = audit(pool).unwrap();
        theirs_in(&found);
        assert!(found.notes.iter().any(|note| note.contains("a unix socket")), "{found}");
        let unseen = found.notes.iter().any(|note| note.contains("1 of the pool are known by pid and age alone"));
        assert_eq!(unseen, !observed, "{found}");
        assert!(found.terminate_orphans(pool).unwrap().done.is_empty());
        assert_eq!(server().count(&theirs), 2);
    }

    let found = audit(&pools[0]).unwrap();
    let [pid, other] = [0, 1].map(|i| theirs_in(&found)[i].pid);
    let outcomes = |audit: &Audit, pids: &[i32]| {
        let account = audit.terminate(&pools[0], pids).unwrap();
        account.done.into_iter().map(|done| (done.pid, done.outcome)).collect::<Vec<_>>()
    };
    assert_eq!(outcomes(&found, &[]), []);
    let unheard = Outcome::Spared("the audit has no such backend".into());
    assert_eq!(outcomes(&found, &[pid, pid, -1]), [(pid, Outcome::Ended), (-1, unheard)]);
    assert_eq!(outcomes(&found, &[pid]), [(pid, Outcome::Gone)]);
    assert_eq!(server().count(&theirs), 1, "the other was not named");

    // Another backend that has its pid by now is not hit, nor is the connection that asks.
    let mut earlier = found.clone();
    for backend in &mut earlier.backends {
        backend.backend_start = backend.backend_start.map(|start| start - ms(1));
    }
    assert_eq!(outcomes(&earlier, &[other]), [(other, Outcome::Gone)]);
    let mut own = pools[1].get().unwrap();
    let pid = own.backend_pid().unwrap();
    let found = audit(&pools[1]).unwrap();
    let account = found.terminate_with(&mut own, &[pid]).unwrap();
    assert_eq!(account.done[0].outcome, Outcome::Spared("it is the connection that asks".into()), "{account}");
    assert!(own.batch_execute("").is_ok());
    server().terminate(&theirs);
}

/// Through a proxy that has not noticed yet: the server's side of the connection is well.
#[test]
fn what_somebody_holds_is_not_orphaned() {
    let _beside = crate::support::beside_others();
    let proxy = Proxy::to(server().addr());
    let pool = pool("held", 1);
    let through = params("postgres").replace(&format!("port={}", server().port()), &format!("port={}", proxy.port()));
    let mut killed = process("held", 1, 1, &through);
    proxy.pause();
    killed.end();
    let audit = audit(&pool).unwrap();
    let theirs: Vec<_> = audit.backends.iter().filter(|b| b.process == Some(killed.id())).collect();
    assert_eq!(theirs.len(), 2, "{audit}");
    for backend in theirs {
        assert_eq!((backend.owner, &backend.note), (Owner::ThisProcess, &None), "the proxy is here: {audit}");
    }
    assert_eq!(audit.orphans().count(), 0, "{audit}");
    server().terminate(&format!("held [{}]", killed.id()));
}

#[test]
fn what_the_server_does_not_know_is_missing() {
    let _beside = crate::support::beside_others();
    let pool = pool("missing", 2);
    let (one, two) = (pool.get().unwrap(), pool.get().unwrap());
    let gone = one.backend_pid().unwrap();
    let end = format!("SELECT pg_terminate_backend({gone})");
    server().connect().batch_execute(&end).unwrap();
    assert_eq!(server().wait_for(&format!("missing [{}]", std::process::id()), 1, soon()), 1);
    let audit = audit(&pool).unwrap();
    assert_eq!(audit.missing.len(), 1, "{audit}");
    assert_eq!(audit.missing[0].server_id, Some(gone as u64));
    assert_eq!(of(&audit, Owner::Pool)[0].pid, two.backend_pid().unwrap());
    assert!(
        audit.to_string().contains(&format!("the server knows nothing of #1 (server id {gone}) in use for")),
        "{audit}"
    );
}

#[test]
fn a_name_of_one_s_own() {
    let _beside = crate::support::beside_others();
    let own = params("postgres") + " application_name=fixed";
    let pool = manager(&own).builder().name("ignored").max_size(1).open().unwrap();
    let _other = postgres::Client::connect(&own, NoTls).unwrap();
    let fixed = audit(&pool).unwrap();
    assert_eq!(fixed.application_name, "fixed");
    assert_eq!(of(&fixed, Owner::Pool).len(), 1, "{fixed}");
    assert_eq!(of(&fixed, Owner::ThisProcess).len(), 1, "{fixed}");
    assert!(fixed.notes[0].contains("'fixed' is your own"), "{fixed}");

    let own = params("postgres") + &format!(" application_name='mixed [{}]'", std::process::id());
    let pool = manager(&own).builder().name("ignored").max_size(1).open().unwrap();
    let other = params("postgres") + " application_name='mixed [1]'";
    let _other = postgres::Client::connect(&other, NoTls).unwrap();
    let mixed = audit(&pool).unwrap();
    assert_eq!(of(&mixed, Owner::ThisProcess)[0].process, Some(1), "whatever its name says: {mixed}");
    assert!(mixed.notes.is_empty(), "{mixed}");
}

/// Names that are not ASCII are changed by the server.
#[test]
fn any_name_can_be_found_again() {
    let _beside = crate::support::beside_others();
    for name in ["fähre", &"ä".repeat(70), "a [b", "tab\tand [12]"] {
        let pool = pool(name, 1);
        let audit = audit(&pool).unwrap();
        assert_eq!((of(&audit, Owner::Pool).len(), of(&audit, Owner::Audit).len()), (1, 1), "{audit}");
        assert_eq!(of(&audit, Owner::Audit)[0].process, Some(std::process::id()), "{audit}");
    }
}

#[test]
fn what_a_role_cannot_see_or_do_is_said() {
    let _beside = crate::support::beside_others();
    server()
        .connect()
        .batch_execute(
            "CREATE ROLE worker LOGIN; CREATE ROLE nosy LOGIN; CREATE ROLE seer LOGIN; GRANT pg_read_all_stats TO seer",
        )
        .unwrap();
    let pool = manager(&params("worker")).builder().name("shy").max_size(1).open().unwrap();
    let mut killed = process("shy", 1, 0, &params("worker"));
    killed.end();

    let mut nosy = postgres::Client::connect(&params("nosy"), NoTls).unwrap();
    let hidden = audit_with(&pool, &mut nosy).unwrap();
    assert_eq!((hidden.role.as_str(), hidden.backends.len()), ("worker", 2), "{hidden}");
    assert_eq!(hidden.orphans().count(), 0, "{hidden}");
    let unknown = of(&hidden, Owner::Unknown);
    assert_eq!(unknown.len(), 2, "a pid alone proves nothing: {hidden}");
    let other = unknown[0];
    assert_eq!((&other.state, other.age, other.backend_start), (&None, None, None));
    let account = hidden.terminate_with(&mut server().connect(), &[other.pid]).unwrap();
    assert!(matches!(&account.done[0].outcome, Outcome::Spared(why) if why.contains("hid it")), "{account}");
    assert!(hidden.to_string().contains("(hidden)") && hidden.to_string().contains("pg_read_all_stats"), "{hidden}");

    let mut seer = postgres::Client::connect(&params("seer"), NoTls).unwrap();
    let seen = audit_with_orphans(1, || audit_with(&pool, &mut seer).unwrap());
    let account = seen.terminate_orphans_with(&mut seer).unwrap();
    // The words differ from version to version; the role that it takes is in all of them.
    let refused = |outcome: &Outcome| matches!(outcome, Outcome::Refused(why) if why.contains("pg_signal_backend"));
    assert!(refused(&account.done[0].outcome) && account.to_string().contains("pg_signal_backend"), "{account}");
    // The role itself may.
    assert_eq!(seen.terminate_orphans(&pool).unwrap().done[0].outcome, Outcome::Ended);
}

/// In a transaction the server repeats what it saw first.
#[test]
fn a_client_in_a_transaction_sees_the_present() {
    let _beside = crate::support::beside_others();
    let pool = pool("present", 2);
    let mut client = server().connect();
    client.batch_execute("BEGIN; SELECT * FROM pg_stat_activity").unwrap();
    assert_eq!(of(&audit_with(&pool, &mut client).unwrap(), Owner::Pool).len(), 1);
    let _both = (pool.get().unwrap(), pool.get().unwrap());
    assert_eq!(of(&audit_with(&pool, &mut client).unwrap(), Owner::Pool).len(), 2);
}

/// Not every server that speaks like PostgreSQL answers like one.
#[test]
fn a_server_that_answers_something_else() {
    let _beside = crate::support::beside_others();
    for (database, columns) in
        [("odd_port", "client_port::text AS client_port, state"), ("odd_state", "client_port, 7 AS state")]
    {
        server().connect().batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
        let mut owner = server().config("observer").dbname(database).connect(NoTls).unwrap();
        owner
            .batch_execute(&format!(
                "SET allow_system_table_mods = on; ALTER VIEW pg_catalog.pg_stat_activity RENAME TO real_activity; \
                 CREATE VIEW pg_catalog.pg_stat_activity AS SELECT {columns}, pid, usename, datname, application_name, \
                 client_addr, backend_type, backend_start, state_change, xact_start, wait_event_type, wait_event \
                 FROM pg_catalog.real_activity"
            ))
            .unwrap();
        drop(owner);
        let params = params("postgres").replace("dbname=postgres", &format!("dbname={database}"));
        let pool = manager(&params).builder().name("odd").max_size(1).open().unwrap();
        let e = audit(&pool).unwrap_err().to_string();
        assert!(e.contains("the server's answer is not what was asked for"), "{e}");
    }
}

/// A server that is silent holds up an audit for `open_timeout`, and its thread no longer.
#[test]
fn an_audit_keeps_its_limit() {
    let _beside = crate::support::beside_others();
    let proxy = Proxy::to(server().addr());
    let through = params("postgres").replace(&format!("port={}", server().port()), &format!("port={}", proxy.port()));
    let pool = manager(&through).builder().name("silent").open_timeout(ms(300)).open().unwrap();
    proxy.silent(true);
    let (done, wait) = std::sync::mpsc::channel();
    let begun = Instant::now();
    std::thread::spawn(move || done.send(audit(&pool).is_err()));
    assert_eq!(wait.recv_timeout(PATIENCE), Ok(true), "it hangs");
    assert!(begun.elapsed() >= ms(250) && begun.elapsed() < ms(2000), "{:?}", begun.elapsed());
}

/// However close the answer of an abort and the limit come: what an audit has begun ends with it.
#[test]
fn an_audit_that_comes_to_its_limit_leaves_no_thread() {
    let _alone = crate::support::alone();
    let silent = Silent::listen();
    let manager = manager(&silent.conninfo("silent-audits"));
    let pool = millpond::Pool::builder().open_timeout(ms(50)).build_unchecked(manager);
    for _ in 0..20 {
        let error = audit(&pool).unwrap_err();
        assert!(error.to_string().contains("no answer to an attempt to connect"), "{error}");
    }
    let errands = || threads_named("millpond-errand").len();
    assert!(wait_until(soon(), || errands() == 0), "{} threads are left", errands());
    assert!(wait_until(soon(), || silent.open() == 0), "{} sockets are left", silent.open());
}

// ---------------------------------------------------------------------------------------------- a pooler

/// How a pool reaches the server through this pooler.
fn through(pooler: &Bouncer) -> String {
    format!("host=127.0.0.1 port={} user=postgres dbname=postgres", pooler.port())
}

#[test]
fn behind_a_pooler_nothing_is_joined_refused_or_orphaned() {
    let _beside = crate::support::beside_others();
    for (mode, name) in [(PoolMode::Session, "session"), (PoolMode::Transaction, "transaction")] {
        let pooler = Bouncer::start(server(), mode, &[]);
        let manager = manager(&through(&pooler));
        // 10 000 clients of a pooler are none of the server's business.
        let pool = manager.clone().processes(1000).budget(Budget::Refuse).builder().name(name).open().unwrap();
        let unobserved = manager.observe(false).builder().name(name).open().unwrap();
        let mut killed = process(name, 1, 0, &through(&pooler));
        killed.end();
        let found = audit(&pool).unwrap();
        assert!(found.notes[0].contains("through a pooler"), "{found}");
        assert_eq!((of(&found, Owner::Pool).len(), found.missing.len()), (0, 0), "{found}");
        assert_eq!(found.orphans().count(), 0, "{found}");
        // That there is a pooler is not known then; but that this is not the server's host, or seems not to be.
        let found = audit(&unobserved).unwrap();
        let theirs = found.backends.iter().filter(|b| b.process == Some(killed.id())).collect::<Vec<_>>();
        assert!(theirs.iter().all(|b| b.note.as_ref().unwrap().contains("something stands in between")), "{found}");
        assert!(!theirs.is_empty() && found.orphans().count() == 0, "{found}");
        assert!(found.terminate_orphans(&unobserved).unwrap().done.is_empty());
        server().terminate(&format!("{name} [{}]", killed.id()));
    }
}

/// A pooler that cannot be seen gives one backend to many: the pid that the pool has been told is anybody's.
#[test]
fn a_backend_under_another_s_name_is_not_the_pool_s() {
    let _beside = crate::support::beside_others();
    let pooler = Bouncer::start(server(), PoolMode::Transaction, &[("default_pool_size", "1")]);
    let pool = manager(&through(&pooler)).observe(false).builder().name("pooled").open().unwrap();
    let pid = pool.connections()[0].server_id.unwrap();
    let mut other =
        postgres::Client::connect(&format!("{} application_name='pooled [1]'", through(&pooler)), NoTls).unwrap();
    let mut other = other.transaction().unwrap();
    assert_eq!(other.query_typed_one("SELECT pg_backend_pid()", &[]).unwrap().get::<_, i32>(0) as u64, pid);
    let audit = audit_with(&pool, &mut server().connect()).unwrap();
    let backend = row(&audit, Some(pid as i32));
    assert_eq!((backend.owner, backend.process), (Owner::Other, Some(1)), "{audit}");
}
