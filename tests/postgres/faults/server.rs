//! Faults of the server and of what stands before it.

use std::fs;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use super::{
    BACKOFF, CONNECT, EPSILON, NOBODY, PARALLEL_OPENS, SERVED, SIZE, Users, assert_closes, assert_ends, attempts_in,
    builder, fill, logins, unsettled,
};
use crate::support::PoolMode::{Session, Transaction};
use crate::support::picky::{picky, refused_logins, set_password, with_password};
use crate::support::{Bouncer, SEEN, SOON, Server, alone, beside_others, ms, wait_until, within};
use millpond::postgres::PostgresManager;
use millpond::{CloseReason, Validate};
use postgres::NoTls;
use rustix::process::{Pid, Signal, kill_process};

const LOGS: (&str, &str) = ("log_connections", "on");

/// The server stops under load, stays away for so long, and comes back.
fn outage(server: &Server, row: &str, app: &str, stop: impl Fn(&Server), down: Duration) {
    outage_at(&server.conninfo(app), server, row, app, stop, down);
}

fn outage_at(params: &str, server: &Server, row: &str, app: &str, stop: impl Fn(&Server), down: Duration) {
    let pool = builder(params, app).open().unwrap();
    let users = Users::start(&pool);
    assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
    // (One may be under way: the server has told of it, and the pool has not.)
    let told = || pool.stats().opens == logins(server, app) as u64;
    assert!(wait_until(within(SOON), told), "the server's log tells of every login: {}", pool.stats());

    let stopped = Instant::now();
    stop(server);
    let before = logins(server, app);
    thread::sleep(down);
    server.start_again();
    let back = Instant::now();
    let account = users.end_after(back, NOBODY + CONNECT);

    let stats = pool.stats();
    let again = logins(server, app) - before;
    account.tell(row, back, again, stats.failed_opens);
    account.assert_only_in_flight(SIZE as usize);
    account.assert_served(back, NOBODY + CONNECT);
    assert!(again <= SIZE as usize, "{again} logins for {SIZE} connections: {stats}");
    let attempts = attempts_in(back - stopped);
    assert!(stats.failed_opens <= attempts, "more than {attempts} attempts in {:?}: {stats}", back - stopped);
    assert_ends(&pool, server, app);
}

#[test]
fn stopped_fast_and_back_after_200_ms_and_2_s_and_8_s() {
    let _beside = beside_others();
    let server = Server::with(&[LOGS]);
    outage(&server, "stopped fast, 0.2 s", "f-fast-02", Server::stop_fast, ms(200));
    outage(&server, "stopped fast, 2 s", "f-fast-2", Server::stop_fast, Duration::from_secs(2));
    outage(&server, "stopped fast, 8 s", "f-fast-8", Server::stop_fast, Duration::from_secs(8));
}

#[test]
fn stopped_at_once_and_back_after_200_ms_and_2_s_and_8_s() {
    let _beside = beside_others();
    let server = Server::with(&[LOGS]);
    outage(&server, "stopped at once, 0.2 s", "f-once-02", Server::stop_immediate, ms(200));
    outage(&server, "stopped at once, 2 s", "f-once-2", Server::stop_immediate, Duration::from_secs(2));
    outage(&server, "stopped at once, 8 s", "f-once-8", Server::stop_immediate, Duration::from_secs(8));
}

#[test]
fn stopped_behind_a_unix_socket_and_back_after_2_s() {
    let _beside = beside_others();
    let server = Server::with(&[LOGS]);
    let app = "f-unix-2";
    let folder = server.socket_dir().display().to_string();
    let params = server.conninfo(app).replace("127.0.0.1", &folder);
    assert!(params.contains(&folder), "{params}");
    outage_at(&params, &server, "stopped, unix socket, 2 s", app, Server::stop_fast, Duration::from_secs(2));
}

/// Longer than users wait: they are told why, each at its deadline, and not before.
#[test]
fn stopped_and_back_after_60_s() {
    const NAME: &str = "faults::server::stopped_and_back_after_60_s";
    const PATIENCE: Duration = Duration::from_secs(25);
    // Not `skipped`: it can be made everywhere, and is only too long for every run.
    if std::env::var_os("MILLPOND_LONG_FAULTS").is_none() {
        let _ =
            writeln!(std::io::stderr(), "LEFT OUT {NAME}: it waits for minutes, and MILLPOND_LONG_FAULTS is not set");
        return;
    }
    let _beside = beside_others();
    for stop in [Server::stop_fast, Server::stop_immediate] {
        let (server, app) = (Server::with(&[LOGS]), "f-minute");
        let pool = builder(&server.conninfo(app), app).connection_timeout(PATIENCE).open().unwrap();
        let users = Users::start(&pool);
        assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
        let stopped = Instant::now();
        stop(&server);
        let before = logins(&server, app);
        thread::sleep(Duration::from_secs(60));
        server.start_again();
        let back = Instant::now();
        let account = users.end_after(back, NOBODY + CONNECT);
        let stats = pool.stats();
        let again = logins(&server, app) - before;
        account.tell("stopped, 60 s", back, again, stats.failed_opens);
        for turns in &account.0 {
            let unserved: Vec<_> = turns.iter().filter(|turn| turn.got.is_none()).collect();
            // One deadline after the other, and nothing in between.
            assert!(unserved.len() as u64 <= 60 / PATIENCE.as_secs(), "{unserved:?}");
            for turn in unserved {
                let error = turn.error.as_deref().unwrap_or_default();
                assert!(error.to_lowercase().contains("connection refused"), "{error}");
            }
        }
        let in_flight = account.failed().iter().filter(|turn| turn.got.is_some()).count();
        assert!(in_flight <= SIZE as usize, "{in_flight}");
        account.assert_served(back, NOBODY + CONNECT);
        assert!(again <= SIZE as usize, "{again} logins");
        assert!(stats.failed_opens <= attempts_in(back - stopped), "{stats}");
        assert_ends(&pool, &server, app);
    }
}

/// As a server that has much to recover: for seconds it says that it starts up (57P03).
#[test]
fn in_recovery_for_seconds() {
    let _beside = beside_others();
    let server = unsettled();
    let refusals = || server.log().matches("FATAL:  the database system is").count();
    let before = refusals();
    let data = server.socket_dir().join("data");
    let conf = data.join("postgresql.auto.conf");
    let settings = fs::read_to_string(&conf).unwrap();
    let stop = |server: &Server| {
        server.stop_fast();
        fs::write(&conf, settings.clone() + "restore_command = 'sleep 1; false'\n").unwrap();
        fs::write(data.join("recovery.signal"), "").unwrap();
    };
    outage(&server, "57P03 for seconds", "f-recovery", stop, Duration::ZERO);
    let heard = refusals() - before;
    assert!(heard > 20, "who started it asked every few milliseconds, and heard it {heard} times only");
    fs::write(&conf, settings).unwrap();
}

/// The server takes the end of one backend for damage, ends all others and recovers.
#[test]
fn a_backend_killed_and_so_all_of_them() {
    let _beside = beside_others();
    let (server, app) = (unsettled(), "f-kill");
    let noticed = || server.log().matches("terminating any other active server processes").count();
    let noticed_before = noticed();
    let pool = builder(&server.conninfo(app), app).open().unwrap();
    fill(&pool);
    let users = Users::start(&pool);
    assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
    let before = logins(&server, app);
    let pids: Vec<_> = server.backends(app).iter().map(|backend| backend.pid).collect();
    let killed = Instant::now();
    kill_process(Pid::from_raw(pids[0]).unwrap(), Signal::KILL).unwrap();
    assert!(wait_until(within(SOON), || noticed() > noticed_before));
    // It asks until there is an answer.
    assert!(wait_until(within(SOON), || !server.backends(app).iter().any(|backend| pids.contains(&backend.pid))));
    let back = Instant::now();
    let account = users.end_after(back, SERVED);
    let stats = pool.stats();
    let again = logins(&server, app) - before;
    account.tell("a backend killed", back, again, stats.failed_opens);
    account.assert_only_in_flight(SIZE as usize);
    account.assert_served(back, SERVED);
    // Until the postmaster has noticed, it lets in those who come in place of the first that died.
    assert!(again <= 2 * SIZE as usize, "{again} logins: {stats}");
    assert!(stats.failed_opens <= attempts_in(back - killed), "{stats}");
    assert_ends(&pool, &server, app);
}

fn terminated(row: &str, app: &str, most: i64) {
    let server = picky(); // for its log
    let pool = builder(&server.conninfo(app), app).open().unwrap();
    fill(&pool);
    let users = Users::start(&pool);
    assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
    let before = logins(server, app);
    let ended = server.connect().query(
        "SELECT pg_terminate_backend(pid) FROM \
         (SELECT pid FROM pg_stat_activity WHERE application_name = $1 ORDER BY pid LIMIT $2) AS chosen",
        &[&app, &most],
    );
    let ended = ended.unwrap().len();
    assert_eq!(ended as i64, most.min(i64::from(SIZE)));
    let back = Instant::now();
    let account = users.end_after(back, CONNECT);
    let stats = pool.stats();
    let again = logins(server, app) - before;
    account.tell(row, back, again, stats.failed_opens);
    account.assert_only_in_flight(ended);
    // The server is there all the time: no back-off.
    account.assert_served(back, CONNECT);
    assert!(again <= ended, "{again} logins for {ended} that were ended: {stats}");
    assert_eq!(stats.failed_opens, 0, "{stats}");
    assert_ends(&pool, server, app);
}

#[test]
fn some_backends_terminated() {
    let _beside = beside_others();
    terminated("some terminated", "f-some", 2);
}

#[test]
fn all_backends_terminated() {
    let _beside = beside_others();
    terminated("all terminated", "f-all", i64::from(SIZE));
}

/// What the server ends for its idleness no user ever meets, whichever of three settings sees to it.
#[test]
fn idle_session_timeout() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let _beside = beside_others();
    let server = picky(); // for its log
    let params = |app: &str| server.conninfo(app) + " options='-c idle_session_timeout=1000'";
    let base = |app: &str| builder(&params(app), app).validate(Validate::AfterIdle(SOON));
    let pools = [
        ("f-idle-close", base("f-idle-close").max_idle(ms(500))),
        ("f-idle-check", base("f-idle-check").validate(Validate::AfterIdle(ms(500)))),
        ("f-idle-alive", base("f-idle-alive").keepalive(ms(200))),
    ];
    let pools = pools.map(|(app, builder)| (app, builder.open().unwrap()));
    for (_, pool) in &pools {
        fill(pool);
    }
    for round in 0..2 {
        thread::sleep(TIMEOUT + ms(300));
        for (app, pool) in &pools {
            let begun = Instant::now();
            let mut client = pool.get().unwrap_or_else(|e| panic!("{app}, {round}: {e}"));
            client.simple_query("SELECT 1").unwrap_or_else(|e| panic!("{app}, {round}: {e:?}"));
            assert!(begun.elapsed() < CONNECT, "{app}, {round}: {:?}", begun.elapsed());
        }
    }
    let ended = server.log().matches("terminating connection due to idle-session timeout").count();
    let [(_, closed), (_, checked), (_, kept)] = &pools;
    assert!(ended >= SIZE as usize, "it does end them: {ended}");
    assert_eq!(closed.stats().closed_for(CloseReason::Invalid) + closed.stats().closed_for(CloseReason::Broken), 0);
    assert!(checked.stats().closed_for(CloseReason::Invalid) >= u64::from(SIZE), "{}", checked.stats());
    assert_eq!((kept.stats().opens, kept.stats().closes), (u64::from(SIZE), 0), "{}", kept.stats());
    for (app, pool) in &pools {
        assert_eq!(pool.stats().closed_for(CloseReason::Broken), 0, "{app}: {}", pool.stats());
        let logins = logins(server, app);
        // In each round the server ends all of them, and at most so many come again.
        assert!(logins <= 3 * SIZE as usize, "{app}: {logins} logins");
        assert_closes(pool);
        assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    }
}

/// Users who wait while others have all places are served when these go.
#[test]
fn max_connections_used_up_by_others() {
    const FULL: Duration = ms(1_500);
    let _beside = beside_others();
    let (server, app) =
        (Server::with(&[LOGS, ("max_connections", "8"), ("superuser_reserved_connections", "0")]), "f-full");
    // The observer has its place before all others.
    assert_eq!(server.wait_for("starter", 0, within(SOON)), 0);
    let mut squatters = Vec::new();
    while let Ok(client) = server.config("squatter").connect(NoTls) {
        squatters.push(client);
    }
    let begun = Instant::now();
    let manager = PostgresManager::parse(&server.conninfo(app), NoTls).unwrap();
    let pool = manager.builder().name(app).max_size(SIZE).connection_timeout(SOON);
    let pool = pool.build_unchecked(PostgresManager::parse(&server.conninfo(app), NoTls).unwrap());
    let users = Users::start(&pool);
    thread::sleep(FULL);
    assert_eq!((pool.stats().opens, pool.stats().timeouts), (0, 0), "{}", pool.stats());
    let back = Instant::now();
    drop(squatters);
    let account = users.end_after(back, SERVED);
    let stats = pool.stats();
    let logins = logins(&server, app);
    account.tell("max_connections", back, logins, stats.failed_opens);
    assert_eq!(stats.failed_opens_of("53300"), stats.failed_opens, "{stats}");
    account.assert_only_in_flight(0);
    account.assert_served(back, SERVED);
    assert!(logins <= SIZE as usize, "{logins} logins: {stats}");
    assert!(stats.failed_opens <= attempts_in(back - begun), "{stats}");
    assert_ends(&pool, &server, app);
}

/// What is connected works on. Only when it is lost users are told, at once, and after the mending all is well.
#[test]
fn a_password_changed() {
    let _alone = alone();
    let (server, app) = (picky(), "f-password");
    let manager = PostgresManager::new(with_password(server, app, "right"), NoTls);
    let pool = manager.builder().name(app).max_size(SIZE).connection_timeout(SOON).open().unwrap();
    fill(&pool);
    let refused = refused_logins(server);
    let users = Users::start(&pool);
    set_password(server, "other");
    thread::sleep(ms(300));
    let account = users.end();
    account.assert_only_in_flight(0);
    assert_eq!((pool.stats().opens, refused_logins(server)), (u64::from(SIZE), refused), "{}", pool.stats());

    assert_eq!(server.terminate(app), SIZE as usize);
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    let users = Users::start(&pool);
    thread::sleep(ms(500));
    let account = users.end();
    let failed = account.failed();
    let in_flight = failed.iter().filter(|turn| turn.got.is_some()).count();
    assert!(in_flight <= SIZE as usize, "{in_flight} of {SIZE} were handed out dead");
    let told = failed.iter().filter(|turn| turn.got.is_none()).collect::<Vec<_>>();
    assert!(told.len() >= super::USERS, "everybody is told, and nobody waits: {}", told.len());
    assert!(
        told.iter().all(|turn| turn.error.as_deref().unwrap().contains("password authentication failed")),
        "{told:?}"
    );
    let logins = refused_logins(server) - refused;
    assert!(logins as u64 <= PARALLEL_OPENS, "{logins} logins were refused");

    set_password(server, "right");
    let back = Instant::now();
    pool.recycle();
    let users = Users::start(&pool);
    let account = users.end_after(back, CONNECT);
    account.assert_only_in_flight(0);
    account.assert_served(back, CONNECT);
    assert_ends(&pool, server, app);
}

#[test]
fn a_bouncer_restarted_under_load() {
    let _beside = beside_others();
    for (mode, app) in [(Session, "f-brestart-s"), (Transaction, "f-brestart-t")] {
        let server = Server::shared();
        let bouncer = Bouncer::start(server, mode, &[]);
        let pool = builder(&bouncer.conninfo(app), app).open().unwrap();
        let users = Users::start(&pool);
        assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
        let opens = pool.stats().opens;
        let killed = Instant::now();
        bouncer.kill();
        thread::sleep(ms(700));
        bouncer.start_again();
        let back = Instant::now();
        let account = users.end_after(back, SERVED);
        let stats = pool.stats();
        account.tell("PgBouncer restarted", back, (stats.opens - opens) as usize, stats.failed_opens);
        account.assert_only_in_flight(SIZE as usize);
        account.assert_served(back, SERVED);
        assert!(stats.opens - opens <= u64::from(SIZE), "{stats}");
        assert!(stats.failed_opens <= attempts_in(back - killed), "{stats}");
        assert!(bouncer.clients() <= SIZE as usize);
        assert_closes(&pool);
        assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
        drop(bouncer);
        assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    }
}

/// Queries wait until the bouncer goes on. Nobody fails, and nobody logs in again.
#[test]
fn a_bouncer_paused_under_load() {
    let _beside = beside_others();
    let (server, app) = (Server::shared(), "f-bpause");
    let bouncer = Bouncer::start(server, Transaction, &[]);
    let pool = builder(&bouncer.conninfo(app), app).open().unwrap();
    fill(&pool);
    let users = Users::start(&pool);
    assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
    let paused = Instant::now();
    bouncer.admin("PAUSE");
    thread::sleep(ms(1_000));
    let during = pool.stats().checkouts;
    thread::sleep(ms(200));
    assert_eq!(pool.stats().checkouts, during, "it is paused: all connections are in use");
    let back = Instant::now();
    bouncer.admin("RESUME");
    let account = users.end_after(back, CONNECT);
    let stats = pool.stats();
    account.tell("PgBouncer paused", back, 0, stats.failed_opens);
    account.assert_only_in_flight(0);
    account.assert_served(back, CONNECT);
    assert_eq!((stats.opens, stats.failed_opens), (u64::from(SIZE), 0), "since {:?}: {stats}", paused.elapsed());
    assert_closes(&pool);
    assert_eq!(bouncer.wait_for(0, within(SOON)), 0);
    drop(bouncer);
    assert_eq!(server.wait_for(app, 0, within(SEEN + EPSILON + BACKOFF)), 0);
}
