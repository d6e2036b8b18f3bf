//! Faults of a machine: processes that are stopped, file descriptors, names and disks that are missing, and a clock that
//! jumps. What would befall the other tests as well is made in a process of its own.

use std::fs::File;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::{
    Account, CONNECT, EPSILON, SERVED, SIZE, Users, assert_closes, assert_ends, attempts_in, builder, fill, logins,
    unsettled,
};
use crate::support::{
    Again, Cable, SEEN, SOON, Server, Stopped, beside_others, ms, skipped, slack, sleep_until, threads_named,
    wait_until, within,
};
use millpond::PooledConnection;
use millpond::postgres::PostgresManager;
use postgres::NoTls;

// ---------------------------------------------------------------------------------------------------- SIGSTOP

/// Stops the postmaster, and its backends of this name.
fn stop(server: &Server, app: &str) -> Stopped {
    let backends: Vec<_> = server.backends(app).iter().map(|backend| backend.pid).collect();
    Stopped::stop_numbers([server.pid() as i32].into_iter().chain(backends))
}

/// Nothing is lost while the server stands still, and nobody is told: queries end late.
#[test]
fn a_server_stopped_by_a_signal() {
    let _beside = beside_others();
    let (server, app) = (unsettled(), "f-srvstop");
    let pool = builder(&server.conninfo(app), app).open().unwrap();
    fill(&pool);
    let users = Users::start(&pool);
    assert!(wait_until(within(SOON), || pool.stats().checkouts > 50), "{}", pool.stats());
    let stopped = stop(&server, app);
    thread::sleep(ms(1_500));
    let back = Instant::now();
    drop(stopped);
    let account = users.end_after(back, CONNECT);
    let stats = pool.stats();
    account.tell("server stopped by a signal", back, logins(&server, app) - SIZE as usize, stats.failed_opens);
    account.assert_only_in_flight(0);
    account.assert_served(back, CONNECT);
    assert_eq!((stats.opens, stats.failed_opens), (u64::from(SIZE), 0), "{stats}");
    assert_ends(&pool, &server, app);
}

/// How long a pool in a process of its own keeps what is idle, and what it keeps at all.
const IDLE: Duration = ms(500);
const LIFE: Duration = ms(1_500);

/// Run by the tests that follow, on a server at the address that is its task, until it has seen time go by without it.
#[test]
#[ignore = "the work of a process that another test starts"]
fn stands_still() {
    let pool = builder(&Again::task(), "f-still").max_idle(IDLE).max_lifetime(LIFE).open().unwrap();
    fill(&pool);
    let too_old = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    let account = thread::scope(|scope| {
        // Looks at each connection that it is given; the users keep two more busy, and one idle.
        scope.spawn(|| {
            while !over.load(SeqCst) {
                let begun = Instant::now();
                let client = pool.get().expect("a connection");
                // The process may be stopped between the two.
                let age = PooledConnection::info(&client).age.saturating_sub(begun.elapsed());
                too_old.fetch_or(age > LIFE, SeqCst);
                drop(client);
                thread::sleep(ms(5));
            }
        });
        let users = Users::running(&pool, 2, "SELECT pg_sleep(0.004)");
        let mut before = Instant::now();
        let deadline = within(SOON);
        while before.elapsed() < Duration::from_secs(1) {
            assert!(Instant::now() < deadline, "nobody stopped this process");
            before = Instant::now();
            thread::sleep(ms(20));
        }
        let back = Instant::now();
        let account = users.end_after(back, SERVED);
        over.store(true, SeqCst);
        account.assert_served(back, SERVED);
        account
    });
    account.assert_only_in_flight(0);
    assert!(!too_old.load(SeqCst), "one was handed out past its life");
    let quiet = Instant::now();
    // The rest of its idle time.
    assert!(wait_until(quiet + IDLE + EPSILON * 4, || pool.stats().size() == 0), "{}", pool.stats());
    assert_closes(&pool);
}

fn stopped_process(server: &Server, and_the_server: bool) {
    let mut child = Again::run("faults::host::stands_still", &server.conninfo("f-still"));
    assert!(wait_until(within(SOON), || server.count("f-still") == i64::from(SIZE)), "{}", server.count("f-still"));
    let at_work = || server.backends("f-still").iter().any(|backend| backend.query.contains("pg_sleep"));
    assert!(wait_until(within(SOON), at_work));
    let the_server = and_the_server.then(|| stop(server, "f-still"));
    let the_process = Stopped::stop_numbers([child.id() as i32]);
    // Longer than anything in the pool may live.
    thread::sleep(LIFE + ms(700));
    drop(the_process);
    thread::sleep(ms(200));
    drop(the_server);
    assert!(child.finish(), "see what the process said");
    assert_eq!(server.wait_for("f-still", 0, within(SOON)), 0);
}

#[test]
fn a_process_stopped_by_a_signal() {
    let _beside = beside_others();
    stopped_process(Server::shared(), false);
}

#[test]
fn a_process_and_its_server_stopped_by_a_signal() {
    let _beside = beside_others();
    stopped_process(&unsettled(), true);
}

// ---------------------------------------------------------------------------------------------------- descriptors

/// A process that may have no more file descriptors than it has.
#[test]
#[ignore = "the work of a process that another test starts"]
fn without_descriptors() {
    // The `postgres` crate panics where it cannot make its runtime. That costs the attempt and no more, and is not to
    // fill the screen.
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if thread::current().name() != Some("f-files-exec") {
            tell(panic);
        }
    }));
    let pool = builder(&Again::task(), "f-files").open().unwrap();
    drop([pool.get().unwrap(), pool.get().unwrap()]);
    let mut files = Vec::new();
    let refused = loop {
        match File::open("/dev/null") {
            Ok(file) => files.push(file),
            Err(e) => break e,
        }
    };
    // What is connected serves all users.
    let account = {
        let begun = Instant::now();
        Users::start(&pool).end_after(begun, ms(300))
    };
    account.assert_only_in_flight(0);
    assert_eq!(pool.stats().opens, 2, "{}", pool.stats());
    // With nothing left, they hear why.
    let held = [pool.get().unwrap(), pool.get().unwrap()];
    let begun = Instant::now();
    let error = pool.get_timeout(ms(500)).unwrap_err();
    assert!(begun.elapsed() <= ms(500) + slack(), "{:?}", begun.elapsed());
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::MFILE.raw_os_error()), "{refused}");
    let words = "Too many open files";
    assert!(error.to_string().contains(words), "\"{words}\" is not in: {error}");
    let users = Users::start(&pool);
    thread::sleep(ms(300));
    drop(files);
    let back = Instant::now();
    drop(held);
    let account = users.end_after(back, SERVED);
    account.assert_only_in_flight(0);
    account.assert_served(back, SERVED);
    let stats = pool.stats();
    assert!(stats.failed_opens <= attempts_in(Duration::from_secs(2)), "{stats}");
    assert_closes(&pool);
}

#[test]
fn file_descriptors_used_up() {
    let _beside = beside_others();
    let server = Server::shared();
    let runner = ["prlimit", "--nofile=80", "--"];
    let mut child = Again::run_by(&runner, "faults::host::without_descriptors", &server.conninfo("f-files"));
    assert!(child.finish(), "see what the process said");
    assert_eq!(server.wait_for("f-files", 0, within(SOON)), 0);
    let socket = server.unix_conninfo("f-files");
    let mut child = Again::run_by(&runner, "faults::host::with_a_few_descriptors", &socket);
    assert!(child.finish(), "see what the process said");
    assert_eq!(server.wait_for("f-files", 0, within(SOON)), 0);
}

/// However many file descriptors are left for an attempt over a unix socket: it is the attempt that fails, and the next
/// connection is observed.
#[test]
#[ignore = "the work of a process that another test starts"]
fn with_a_few_descriptors() {
    std::panic::set_hook(Box::new(|_| {}));
    let manager = PostgresManager::parse(&Again::task(), NoTls).unwrap();
    let pool = || millpond::Pool::builder().name("f-files").max_size(1).build_unchecked(manager.clone());
    let mut outcomes = Vec::new();
    for left in 0..16 {
        let pool = pool();
        let mut files: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        files.truncate(files.len() - left);
        outcomes.push(pool.get_timeout(ms(300)).map(|client| client.is_observed()).ok());
        drop(files);
        assert_closes(&pool);
    }
    assert!(outcomes.contains(&None) && outcomes.contains(&Some(true)), "{outcomes:?}");
    assert!(!outcomes.contains(&Some(false)), "{outcomes:?}");
}

// ---------------------------------------------------------------------------------------------------- the clock

/// Takes the wall clock of a process an hour back or forth with each look at it. (A time namespace moves only the clock
/// that never jumps, and to set the machine's own would set everybody's.)
const JUMPS: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static _Atomic long looks;
static long jump(void) { return (looks++ % 3 - 1) * 3600; }
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) at->tv_sec += jump();
    return result;
}
time_t time(time_t *out) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (out) *out = at.tv_sec;
    return at.tv_sec;
}
"#;

#[test]
#[ignore = "the work of a process that another test starts"]
fn in_jumping_time() {
    const IDLE: Duration = ms(400);
    let hour = Duration::from_secs(3_600);
    let looks: Vec<_> = (0..3).map(|_| SystemTime::now()).collect();
    let apart = looks.iter().max().unwrap().duration_since(*looks.iter().min().unwrap()).unwrap();
    assert!(apart >= hour, "the clock does not jump: {apart:?}");

    let pool = builder(&Again::task(), "f-clock").max_idle(IDLE).max_lifetime(hour).open().unwrap();
    fill(&pool);
    let account = {
        let begun = Instant::now();
        Users::start(&pool).end_after(begun, ms(500))
    };
    account.assert_only_in_flight(0);
    // One is in use all the time, and the others go, neither before nor after their time.
    let held = pool.get().unwrap();
    drop([pool.get().unwrap(), pool.get().unwrap()]);
    let returned = Instant::now();
    sleep_until(returned + IDLE - EPSILON);
    assert!(pool.stats().idle >= 2 || returned.elapsed() >= IDLE, "evicted too early: {}", pool.stats());
    assert!(wait_until(returned + IDLE + SEEN, || pool.stats().size() == 1), "{}", pool.stats());
    // A deadline is kept, too.
    pool.resize(1).unwrap();
    let begun = Instant::now();
    assert!(pool.get_timeout(ms(300)).unwrap_err().is_timeout());
    assert!((ms(300)..ms(300) + SEEN).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    drop(held);
    assert_closes(&pool);
}

#[test]
fn a_wall_clock_that_jumps() {
    const NAME: &str = "faults::host::a_wall_clock_that_jumps";
    let _beside = beside_others();
    let dir = tempfile::tempdir().unwrap();
    let (source, shim) = (dir.path().join("jumps.c"), dir.path().join("jumps.so"));
    std::fs::write(&source, JUMPS).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&shim, &source]).arg("-ldl").output();
    match made {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(e) if e.kind() == ErrorKind::NotFound => return skipped(NAME, "there is no C compiler"),
        Err(e) => panic!("{e}"),
    }
    let server = Server::shared();
    let preload = format!("LD_PRELOAD={}", shim.display());
    let runner = ["env", preload.as_str()];
    let mut child = Again::run_by(&runner, "faults::host::in_jumping_time", &server.conninfo("f-clock"));
    assert!(child.finish(), "see what the process said");
    assert_eq!(server.wait_for("f-clock", 0, within(SOON)), 0);
}

// ---------------------------------------------------------------------------------------------------- names

/// A shell that runs its arguments where this folder's `resolv.conf` and `nsswitch.conf` are the system's.
const WITH_NAMES_FROM: &str = r#"
    mount --make-rprivate / && mount --bind "$0/resolv.conf" /etc/resolv.conf &&
    { [ ! -e /etc/nsswitch.conf ] || mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf; } && exec "$@"
"#;

/// The server's name is asked for, and nobody answers: the system's resolver keeps its thread for ten seconds. Callers
/// wait no longer than they said, and who has an address is served.
#[test]
#[ignore = "the work of a process that another test starts"]
fn without_names() {
    let params = format!("host=nobody.invalid. port=5432 user=postgres dbname=postgres {}", Again::task());
    let limit = ms(300);
    let pool = builder(&params, "f-names")
        .open_timeout(limit)
        .build_unchecked(PostgresManager::parse(&params, NoTls).unwrap());
    let most = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    let begun = Instant::now();
                    let error = pool.get_timeout(ms(500)).unwrap_err();
                    let took = begun.elapsed();
                    assert!((ms(500)..ms(500) + SEEN).contains(&took), "{took:?}: {error}");
                    assert!(error.to_string().contains("no answer to an attempt to connect"), "{error}");
                    let threads = threads_named("f-names-").len();
                    // The reaper, those that hang, one that is about to, those that abort them, and the log's.
                    most.fetch_or(threads > 2 * SIZE as usize + 3, SeqCst);
                }
            });
        }
    });
    assert!(!most.load(SeqCst), "threads without end");
    let stats = pool.stats();
    assert!(stats.abandoned <= SIZE, "{stats}");
    let begun = Instant::now();
    let report = pool.close(ms(300));
    assert!(begun.elapsed() <= ms(300) + SEEN, "{:?}", begun.elapsed());
    assert_eq!((report.abandoned, report.left.len()), (stats.abandoned, 0), "{report}");
    // The resolver asks twice, five seconds each: then the threads end.
    assert!(wait_until(within(SOON), || threads_named("f-names-").is_empty()), "{:?}", threads_named("f-names-"));
}

#[test]
fn names_that_nobody_resolves() {
    const NAME: &str = "faults::host::names_that_nobody_resolves";
    let _beside = beside_others();
    let cable = match Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return skipped(NAME, &why),
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("resolv.conf"), "nameserver 127.0.0.1\noptions timeout:2 attempts:2\n").unwrap();
    std::fs::write(dir.path().join("nsswitch.conf"), "hosts: files dns\n").unwrap();
    if let Err(why) = may_mount() {
        return skipped(NAME, &why);
    }
    cable.near.run(|| {
        // It hears every question.
        let nameserver = UdpSocket::bind("127.0.0.1:53").expect("a port of our own network");
        let dir = dir.path().to_str().unwrap();
        let runner = ["unshare", "--mount", "/bin/sh", "-c", WITH_NAMES_FROM, dir];
        let mut child = Again::run_by(&runner, "faults::host::without_names", "application_name=f-names");
        assert!(child.finish(), "see what the process said");
        nameserver.set_nonblocking(true).unwrap();
        assert!(nameserver.recv(&mut [0; 512]).is_ok(), "it was asked");
    });
}

/// Whether a process may have mounts of its own; or why not.
fn may_mount() -> Result<(), String> {
    let tried = Command::new("unshare").args(["--mount", "/bin/sh", "-c", "mount -t tmpfs none /mnt"]).output();
    let tried = tried.map_err(|e| format!("cannot run unshare: {e}"))?;
    let said = String::from_utf8_lossy(&tried.stderr);
    if tried.status.success() { Ok(()) } else { Err(said.trim().to_owned()) }
}

// ---------------------------------------------------------------------------------------------------- the disk

/// A server on whose tablespace nothing more can be written: who writes hears it, who reads does not, and no connection
/// is lost. When there is room, all is well at once. The small disk goes with the mounts of this process.
#[test]
#[ignore = "the work of a process that another test starts"]
fn on_a_small_disk() {
    let disk = Path::new("/mnt");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "none", "/mnt"]).status().unwrap();
    assert!(mounted.success());
    std::fs::set_permissions(disk, std::fs::Permissions::from_mode(0o777)).unwrap();
    let (server, app) = (Server::start(), "f-disk");
    // The server wants a folder of its own.
    let folder = disk.join("space");
    let made =
        server.connect().batch_execute(&format!("COPY (SELECT 1) TO PROGRAM 'mkdir -m 700 {0}'; ", folder.display()));
    made.unwrap();
    let mut admin = server.connect();
    admin.batch_execute(&format!("CREATE TABLESPACE small LOCATION '{}'", folder.display())).unwrap();
    // Plain, so that a text takes the room that it should: no compression.
    let table = "CREATE TABLE t (text text) TABLESPACE small; ALTER TABLE t ALTER text SET STORAGE PLAIN";
    admin.batch_execute(table).unwrap();

    let pool = builder(&server.conninfo(app), app).open().unwrap();
    fill(&pool);
    let write = "INSERT INTO t SELECT repeat('x', 7000) FROM generate_series(1, 100)";
    let full = || {
        let error = pool.get().unwrap().simple_query(write).err()?;
        Some(error.code().map(|code| code.code().to_owned()))
    };
    let first = (0..50).find_map(|_| full()).expect("a full disk");
    assert_eq!(first.as_deref(), Some("53100"), "disk full");
    let readers = Users::start(&pool);
    for _ in 0..20 {
        assert_eq!(full().flatten().as_deref(), Some("53100"));
    }
    let begun = Instant::now();
    // (What the failed writes have taken is not given back without room to work in.)
    assert!(Command::new("mount").args(["-o", "remount,size=20m", "/mnt"]).status().unwrap().success());
    assert!(full().is_none(), "there is room");
    let account: Account = readers.end_after(begun, CONNECT);
    account.assert_only_in_flight(0);
    account.assert_served(begun, CONNECT);
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes), (u64::from(SIZE), 0), "no connection is at fault: {stats}");
    drop(admin);
    assert_ends(&pool, &server, app);
}

#[test]
fn a_disk_full_on_the_server() {
    const NAME: &str = "faults::host::a_disk_full_on_the_server";
    let _beside = beside_others();
    if let Err(why) = may_mount() {
        return skipped(NAME, &why);
    }
    let runner = ["unshare", "--mount"];
    let mut child = Again::run_by(&runner, "faults::host::on_a_small_disk", "a disk");
    assert!(child.finish(), "see what the process said");
}
