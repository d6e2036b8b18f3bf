//! Connections over a unix socket are observed, as those over TCP are, and what fails there says where.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Bouncer, EPSILON, Namespace, PoolMode, Proxy, SOON, Server, alone, assert_no_threads_of, beside_others, ms,
    skipped, slack, wait_until, within,
};
use millpond::postgres::{Pool, PooledConnection, PostgresManager};
use millpond::{Builder, Cause, Validate};
use postgres::NoTls;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tempfile::TempDir;

/// A pool that is made without a try whether the server is there.
fn untried(builder: Builder<PostgresManager<NoTls>>, params: &str) -> Pool {
    builder.connection_timeout(SOON).build_unchecked(PostgresManager::parse(params, NoTls).unwrap())
}

fn builder(params: &str) -> Builder<PostgresManager<NoTls>> {
    PostgresManager::parse(params, NoTls).unwrap().builder().connection_timeout(SOON)
}

fn shared(app: &str) -> String {
    Server::shared().unix_conninfo(app)
}

/// The pool ends with nothing left on the server.
#[track_caller]
fn assert_ends(pool: &Pool, app: &str) {
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(Server::shared().wait_for(app, 0, within(SOON)), 0);
}

fn answers(client: &mut PooledConnection) -> bool {
    client.query_one("SELECT 42", &[]).is_ok_and(|row| row.get::<_, i32>(0) == 42)
}

// ---------------------------------------------------------------------------------------------------- as over TCP

#[test]
fn a_connection_is_observed_and_a_clean_return_asks_nothing() {
    let _beside = beside_others();
    let bouncer = Bouncer::start(Server::shared(), PoolMode::Session, &[]);
    for (params, app) in [(shared("unix-seen"), "unix-seen"), (bouncer.unix_conninfo("unix-pooled"), "unix-pooled")] {
        let pool = builder(&params).max_size(1).open().unwrap();
        for _ in 0..20 {
            let mut client = pool.get().unwrap();
            assert!(client.is_observed() && answers(&mut client));
            drop(client);
            assert_eq!(pool.stats().idle, 1, "back at once, on this thread");
        }
        // A transaction that is left open is rolled back.
        pool.get().unwrap().batch_execute("BEGIN").unwrap();
        assert!(answers(&mut pool.get().unwrap()));
        assert_eq!(pool.stats().opens, 1);

        let mut client = pool.get().unwrap();
        let canceller = client.canceller();
        thread::scope(|scope| {
            let sleeper = scope.spawn(|| client.batch_execute("SELECT pg_sleep(60)").unwrap_err());
            // A cancel that comes before the query has no effect, so it is sent until the query ends.
            assert!(wait_until(within(SOON), || {
                canceller.cancel().unwrap();
                sleeper.is_finished()
            }));
            assert_eq!(sleeper.join().unwrap().code().map(|code| code.code()), Some("57014"), "{app}");
        });
        drop(client);
        assert!(answers(&mut pool.get().unwrap()));
        assert!(pool.close(SOON).is_complete());
    }
}

/// As many threads as are busy at once need as many connections, and no more.
#[test]
fn a_steady_load_of_four_threads_keeps_four_connections() {
    let _beside = beside_others();
    let app = "unix-steady";
    let pool = builder(&shared(app)).max_size(16).open().unwrap();
    let four: Vec<_> = (0..4).map(|_| pool.get().unwrap()).collect();
    assert_eq!(pool.stats().opens, 4, "{}", pool.stats());
    drop(four);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..1000 {
                    let mut client = pool.get().unwrap();
                    // (After a cached `SELECT` nothing would be asked if it were not observed.)
                    assert!(client.query_one("SELECT $1::int4", &[&i]).unwrap().get::<_, i32>(0) == i);
                }
            });
        }
    });
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.idle), (4, 4), "{stats}");
    assert_ends(&pool, app);
}

/// The loopback ports on which this process listens, but for these.
fn listening(but: &[u16]) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let is_own = |inode: &str| {
        let socket = format!("socket:[{inode}]");
        let mut fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
        fds.any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*socket))
    };
    let table = fs::read_to_string("/proc/self/net/tcp").unwrap_or_default();
    let port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state, inode) = (fields.next()?, fields.nth(1)?, fields.nth(5)?);
        let (address, port) = local.split_once(':')?;
        let port = (state == LISTEN && address == "0100007F").then(|| u16::from_str_radix(port, 16).ok())??;
        (!but.contains(&port) && is_own(inode)).then_some(port)
    };
    table.lines().filter_map(port).collect()
}

/// Strangers connect to whatever listens, and get nothing; the pool opens as if they were not there, and leaves no file
/// descriptor behind.
#[test]
fn eighty_at_once_among_strangers() {
    let _alone = alone();
    let app = "unix-many";
    assert_eq!(Server::shared().count(app), 0);
    let fds = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (before, known) = (fds(), listening(&[]));
    let (over, met) = (AtomicBool::new(false), AtomicUsize::new(0));
    let stranger = || {
        while !over.load(SeqCst) {
            for port in listening(&known) {
                let Ok(mut stranger) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                met.fetch_add(1, SeqCst);
                stranger.set_read_timeout(Some(SOON)).unwrap();
                let mut got = Vec::new();
                let ended = stranger.read_to_end(&mut got);
                assert!(got.is_empty(), "{got:?}, {ended:?}");
            }
        }
    };
    let pool = builder(&shared(app)).max_size(80).open().unwrap();
    let user = || {
        let mut client = pool.get()?;
        assert!(client.is_observed() && answers(&mut client));
        Ok::<_, millpond::Error>(client)
    };
    thread::scope(|scope| {
        let strangers: Vec<_> = (0..2).map(|_| scope.spawn(stranger)).collect();
        for _ in 0..3 {
            let users: Vec<_> = (0..80).map(|_| scope.spawn(user)).collect();
            let clients: Vec<_> = users.into_iter().map(|user| user.join().unwrap()).collect();
            let clients: Vec<_> = clients.into_iter().map(Result::unwrap).collect();
            assert_eq!(Server::shared().count(app), 80);
            clients.into_iter().for_each(PooledConnection::discard);
        }
        over.store(true, SeqCst);
        strangers.into_iter().for_each(|stranger| stranger.join().unwrap());
    });
    assert_eq!(listening(&known), [], "nothing listens while the pool is at rest");
    println!("{} strangers were there in time", met.load(SeqCst));
    assert_ends(&pool, app);
    assert!(wait_until(within(SOON), || fds() <= before), "{} fds, {before} before", fds());
}

// ---------------------------------------------------------------------------------------------------- what fails

/// A folder in which a socket for port 5432 may stand.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join(".s.PGSQL.5432")
    }

    fn conninfo(&self, app: &str) -> String {
        let dir = self.0.path().display();
        format!("host={dir} user=postgres dbname=postgres application_name={app}")
    }
}

/// A socket on which so many connections fit that nobody accepts.
fn bind(path: &Path, backlog: i32) -> OwnedFd {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, backlog).unwrap();
    socket
}

/// Connects until no more connection fits.
fn fill(path: &Path) -> Vec<OwnedFd> {
    let mut held = Vec::new();
    loop {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        match rustix::net::connect(socket.as_fd(), &SocketAddrUnix::new(path).unwrap()) {
            Ok(()) => held.push(socket),
            Err(rustix::io::Errno::AGAIN) => return held,
            Err(e) => panic!("{e}"),
        }
    }
}

/// The pool says what is wrong, and where, and goes on trying.
#[test]
fn a_socket_that_is_away_is_named_and_tried_again() {
    let _beside = beside_others();
    type Trouble = (&'static str, fn(&Path) -> Vec<OwnedFd>, &'static str);
    let troubles: [Trouble; 4] = [
        ("missing", |_| vec![], "No such file or directory"),
        ("stale", |path| drop_all(UnixListener::bind(path).unwrap()), "Connection refused"),
        ("no socket", |path| fs::write(path, "").map(|()| vec![]).unwrap(), "Connection refused"),
        (
            "full",
            |path| {
                let mut held = vec![bind(path, 0)];
                held.extend(fill(path));
                held
            },
            "Resource temporarily unavailable",
        ),
    ];
    for (what, trouble, says) in troubles {
        let (folder, app) = (Folder::new(), "unix-away");
        let held = trouble(&folder.socket());
        let pool = untried(Pool::builder().max_size(1), &folder.conninfo(app));
        let begun = Instant::now();
        let error = pool.get_timeout(ms(300)).unwrap_err();
        assert!(error.is_timeout() && begun.elapsed() >= ms(300), "{what}: {error}");
        let cause = error.cause().map(Cause::to_string).unwrap_or_default();
        let path = folder.socket().display().to_string();
        assert!(cause.contains("error connecting to server") && cause.contains(&path), "{what}: {cause}");
        assert!(cause.contains(says), "{what}: {cause}");

        drop(held);
        let _ = fs::remove_file(folder.socket());
        symlink(Server::shared().socket_dir().join(format!(".s.PGSQL.{}", Server::shared().port())), folder.socket())
            .unwrap();
        assert!(answers(&mut pool.get_timeout(SOON).unwrap()), "{what}");
        assert_ends(&pool, app);
    }
}

fn drop_all<T>(_: T) -> Vec<OwnedFd> {
    vec![]
}

/// A server that goes and comes back.
#[test]
fn a_server_that_is_down_is_named_and_found_again() {
    let _beside = beside_others();
    let server = Server::start();
    let pool = builder(&server.unix_conninfo("unix-down")).max_size(1).validate(Validate::Always).open().unwrap();
    assert!(answers(&mut pool.get().unwrap()));
    server.stop_fast();
    let error = pool.get_timeout(ms(500)).unwrap_err();
    let path = server.socket_dir().join(format!(".s.PGSQL.{}", server.port())).display().to_string();
    assert!(error.is_timeout() && error.to_string().contains(&path), "{error}");
    server.start_again();
    let mut client = pool.get().unwrap();
    assert!(client.is_observed() && answers(&mut client));
    drop(client);
    assert!(pool.close(SOON).is_complete());
}

/// One that accepts and says nothing costs its limit, and no thread.
#[test]
fn a_silent_socket_costs_its_limit() {
    const OPEN: Duration = ms(400);
    let _alone = alone();
    let (folder, app) = (Folder::new(), "unix-silent");
    let silent = bind(&folder.socket(), 100);
    let pool = untried(Pool::builder().name("silsock").max_size(2).open_timeout(OPEN), &folder.conninfo(app));
    let begun = Instant::now();
    let error = pool.get_timeout(ms(600)).unwrap_err();
    let took = begun.elapsed();
    assert!(took >= ms(600) && took <= ms(600) + slack(), "{took:?}");
    assert!(error.to_string().contains("no answer to an attempt to connect"), "{error}");
    let quiet = || pool.stats().opening + pool.stats().abandoned == 0;
    assert!(wait_until(begun + ms(600) + OPEN + 2 * EPSILON, quiet), "{}", pool.stats());
    assert!(pool.close(SOON).is_complete());
    assert_no_threads_of(&["silsock-"]);

    // As one of several it costs its `connect_timeout`.
    let hosts = folder.conninfo(app).replace(" user", &format!(",{} user", Server::shared().socket_dir().display()));
    let hosts = format!("{hosts} port=5432,{} connect_timeout=1", Server::shared().port());
    let pool = untried(Pool::builder().max_size(1), &hosts);
    let begun = Instant::now();
    assert!(answers(&mut pool.get().unwrap()));
    let took = begun.elapsed();
    assert!(took >= ms(1000) && took <= ms(1500) + slack(), "{took:?}");
    assert_ends(&pool, app);
    drop(silent);
}

/// A request to cancel that nobody takes is abandoned at its limit, and leaves no thread.
#[test]
fn a_cancel_that_nobody_takes_ends_at_its_limit() {
    let _alone = alone();
    let (folder, app) = (Folder::new(), "unix-uncancelled");
    symlink(Server::shared().socket_dir().join(format!(".s.PGSQL.{}", Server::shared().port())), folder.socket())
        .unwrap();
    let pool = builder(&format!("{} connect_timeout=1", folder.conninfo(app))).max_size(1).open().unwrap();
    let mut client = pool.get().unwrap();
    fs::remove_file(folder.socket()).unwrap();
    let canceller = client.canceller();
    let error = canceller.cancel().unwrap_err();
    assert!(error.to_string().contains(&folder.socket().display().to_string()), "{error}");

    let silent = bind(&folder.socket(), 100);
    let begun = Instant::now();
    let error = canceller.cancel().unwrap_err();
    let took = begun.elapsed();
    assert!(took >= ms(1000) && took <= ms(1000) + slack(), "{took:?}");
    assert!(error.to_string().contains("no answer to a request to cancel"), "{error}");
    assert_no_threads_of(&["millpond-cance"]);
    assert!(answers(&mut client));
    drop((client, silent));
    assert_ends(&pool, app);
}

/// Where a process cannot connect to itself, it is served as before, unobserved.
#[test]
fn without_a_loopback_interface_nothing_is_observed() {
    let _beside = beside_others();
    let nowhere = match Namespace::without_network() {
        Ok(nowhere) => nowhere,
        Err(why) => return skipped("without_a_loopback_interface_nothing_is_observed", &why),
    };
    let app = "unix-bare";
    // The server is started out here.
    let shared = shared(app);
    nowhere.run(|| {
        let pool = builder(&shared).max_size(2).open().unwrap();
        let mut client = pool.get().unwrap();
        assert!(!client.is_observed() && answers(&mut client));
        client.batch_execute("BEGIN").unwrap();
        drop(client);
        assert!(answers(&mut pool.get().unwrap()));
        assert!(pool.close(SOON).is_complete());
    });
    assert_eq!(Server::shared().wait_for(app, 0, within(SOON)), 0);
}

// ---------------------------------------------------------------------------------------------------- unobserved

/// Without the observer, what cannot have begun a transaction is not asked about; and all else is.
#[test]
fn unobserved_a_cached_statement_needs_no_question() {
    let _beside = beside_others();
    let app = "unasked";
    let proxy = Proxy::to(Server::shared().addr());
    let manager = PostgresManager::parse(&proxy.conninfo(app), NoTls).unwrap().observe(false);
    let pool = manager.builder().max_size(1).connection_timeout(SOON).open().unwrap();
    let asked = |what: fn(&mut PooledConnection)| {
        let mut client = pool.get().unwrap();
        assert!(!client.is_observed());
        what(&mut client);
        let turns = proxy.turns();
        drop(client);
        drop(pool.get().unwrap());
        let states: Vec<_> = Server::shared().backends(app).into_iter().map(|backend| backend.state).collect();
        assert_eq!(states, ["idle"]);
        proxy.turns() > turns
    };
    // What `build` and the guards did is asked about at the first return.
    asked(|_| ());
    for (what, is_asked) in [
        ((|_| ()) as fn(&mut PooledConnection), false),
        (|c| drop(c.query_cached("SELECT 1", &[]).unwrap()), false),
        (|c| drop(c.query_cached("/* one */ with t as (values (1)) select * from t", &[]).unwrap()), false),
        (|c| drop(c.prepare_cached("SELECT 1").unwrap()), false),
        (|c| drop(c.query_cached("SELECT 1 / 0", &[]).unwrap_err()), true),
        (|c| drop(c.query_cached("SHOW work_mem", &[]).unwrap()), true),
        (|c| drop(c.query_cached("BEGIN", &[]).unwrap()), true),
        (|c| drop(c.query("SELECT 1", &[]).unwrap()), true),
        (
            |c| {
                c.batch_execute("BEGIN").unwrap();
                c.query_cached("SELECT 1", &[]).unwrap();
            },
            true,
        ),
        (
            |c| {
                c.execute_cached("BEGIN", &[]).unwrap();
                c.query_cached("SELECT 1", &[]).unwrap();
            },
            true,
        ),
        (|c| drop(c.query_cached("SELECT 1", &[]).unwrap()), false),
    ] {
        assert_eq!(asked(what), is_asked);
    }
    assert_eq!(pool.stats().opens, 1);
    assert_ends(&pool, app);
}
