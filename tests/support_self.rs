//! The support itself: what the other tests take on trust.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use support::{Backend, Database, EPSILON, Proxy, Server, Silent, ms, threads_named, wait_until};

/// For what another process does in its own time.
const SOON: Duration = Duration::from_secs(10);

fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

fn connect(conninfo: &str) -> Client {
    Client::connect(conninfo, NoTls).expect("a connection")
}

/// The processes that work in a folder, as all of a server's do.
fn processes_in(dir: &Path) -> Vec<PathBuf> {
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let works_there = |process: &PathBuf| std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
    processes.map(|process| process.path()).filter(works_there).collect()
}

/// Runs one test of this file in a process of its own, as which it finds `CHILD` set, and returns what it printed.
fn in_a_process(test: &str, environment: &[(&str, &str)], kill_after: Option<&str>) -> String {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", test, "--nocapture"])
        .env("CHILD", "1")
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program again");
    let mut printed = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().expect("its output"));
    if let Some(line) = kill_after {
        use std::io::BufRead;
        while !printed.contains(line) && stdout.read_line(&mut printed).expect("text") > 0 {}
        child.kill().expect("a process to kill");
    }
    // Ends with the process: a watchdog that kept the pipe would be found out here.
    let end = Instant::now();
    stdout.read_to_string(&mut printed).expect("text");
    let status = child.wait().expect("a child");
    assert!(kill_after.is_some() || status.success(), "{test}, in its own process: {printed}");
    assert!(kill_after.is_none() || end.elapsed() < ms(500), "somebody kept the output of a dead process open");
    printed
}

fn is_child() -> bool {
    std::env::var_os("CHILD").is_some()
}

/// The value that a child printed as `name=value`.
fn told<'a>(printed: &'a str, name: &str) -> &'a str {
    let from = printed.find(&format!("{name}=")).unwrap_or_else(|| panic!("no {name} in: {printed}"));
    printed[from + name.len() + 1..].split_whitespace().next().expect("a value")
}

#[test]
fn smoke() {
    let server = Server::start();
    assert_eq!(server.count("smoke"), 0);

    let mut over_tcp = connect(&server.conninfo("smoke"));
    let mut over_socket = connect(&server.unix_conninfo("smoke"));
    assert_eq!(over_tcp.query_one("SELECT 1", &[]).unwrap().get::<_, i32>(0), 1);
    over_socket.simple_query("BEGIN").unwrap();
    let backends = server.backends("smoke");
    let states: Vec<&str> = backends.iter().map(|Backend { state, .. }| state.as_str()).collect();
    assert_eq!(states, ["idle", "idle in transaction"]);
    assert!(backends[0].age >= backends[1].age && backends[0].age < SOON && backends[0].since < SOON, "{backends:?}");
    assert_eq!(backends[1].query, "BEGIN");
    assert_eq!(server.count("smok"), 0);

    drop(over_tcp);
    assert_eq!(server.wait_for("smoke", 1, within(SOON)), 1);
    assert_eq!(server.terminate("smoke"), 1);
    assert_eq!(server.wait_for("smoke", 0, within(SOON)), 0);
    assert!(over_socket.simple_query("COMMIT").is_err());

    let mut observer = connect(&server.url());
    assert_eq!(observer.query_one("SHOW fsync", &[]).unwrap().get::<_, &str>(0), "off");
    assert_eq!(server.connect().query_one("SHOW application_name", &[]).unwrap().get::<_, &str>(0), "observer");
}

#[test]
fn settings_are_the_callers() {
    let server = Server::with(&[("max_connections", "17")]);
    assert_eq!(server.connect().query_one("SHOW max_connections", &[]).unwrap().get::<_, &str>(0), "17");
}

#[test]
fn waiting_gives_up_at_its_deadline() {
    let start = Instant::now();
    assert!(!wait_until(start + ms(100), || false));
    assert!((ms(100)..ms(100) + EPSILON).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(wait_until(start, || true), "asked at least once");
}

#[test]
fn restart_keeps_the_port_and_the_data() {
    let server = Server::start();
    let port = server.port();
    server.connect().batch_execute("CREATE TABLE kept AS SELECT 42 AS n").unwrap();
    let mut client = connect(&server.conninfo("restart"));
    assert_eq!(server.count("restart"), 1);

    for stop in [Server::stop_fast, Server::stop_immediate, Server::kill] {
        stop(&server);
        assert!(client.simple_query("SELECT 1").is_err(), "its server is gone");
        assert!(Client::connect(&server.conninfo("restart"), NoTls).is_err(), "nobody listens");
        server.start_again();
        assert_eq!(server.port(), port);
        // The watcher of before is dead, too.
        assert_eq!(server.count("restart"), 0);
        client = connect(&server.conninfo("restart"));
        assert_eq!(server.count("restart"), 1);
    }
    // `kill` came last and saved nothing, but the stop before it did.
    assert_eq!(client.query_one("SELECT n FROM kept", &[]).unwrap().get::<_, i32>(0), 42);
}

#[test]
fn kill_leaves_no_process() {
    let server = Server::start();
    let dir = server.socket_dir().to_owned();
    // A backend that does not look up from its work, and so does not see its postmaster die.
    let busy = server.conninfo("busy");
    let busy = std::thread::spawn(move || {
        connect(&busy).batch_execute("DO $$ BEGIN FOR i IN 1..2000000000 LOOP END LOOP; END $$")
    });
    let works = || server.backends("busy").iter().any(|backend| backend.state == "active");
    assert!(wait_until(within(SOON), works));
    let running = processes_in(&dir).len();
    assert!(running > 4, "the watchdog, the postmaster, its helpers, a backend; seen: {running}");

    server.kill();
    assert_eq!(processes_in(&dir).len(), 1, "only the watchdog is left");
    assert!(busy.join().unwrap().is_err());

    drop(server);
    assert_eq!(processes_in(&dir), [] as [PathBuf; 0]);
    assert!(!dir.exists());
}

/// The pieces of System V shared memory that nobody uses and nobody removed.
fn orphaned_shared_memory() -> usize {
    let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    // The seventh column is the number of processes that use it.
    segments.lines().skip(1).filter(|line| line.split_whitespace().nth(6) == Some("0")).count()
}

#[test]
fn drop_after_a_panic_leaves_nothing() {
    let mut dir = PathBuf::new();
    let mut postmaster = 0;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let server = Server::start();
        dir = server.socket_dir().to_owned();
        postmaster = server.pid();
        assert!(processes_in(&dir).len() > 4);
        let _client = connect(&server.conninfo("panic"));
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(processes_in(&dir), [] as [PathBuf; 0]);
    assert!(!dir.exists());
    assert!(!Path::new(&format!("/proc/{postmaster}")).exists(), "not even a zombie");
}

#[test]
fn a_killed_server_leaves_no_shared_memory() {
    let server = Server::start();
    let before = orphaned_shared_memory();
    server.kill();
    assert!(orphaned_shared_memory() > before, "the kernel keeps it for the next postmaster");
    drop(server);
    // Other tests kill their servers, too.
    assert!(wait_until(within(SOON), || orphaned_shared_memory() <= before));
}

#[test]
fn the_shared_server_ends_with_its_process() {
    if is_child() {
        let server = Server::shared();
        assert!(std::ptr::eq(server, Server::shared()));
        println!("dir={} pid={} up", server.socket_dir().display(), server.pid());
        if std::env::var_os("HANG").is_some() {
            std::thread::sleep(SOON * 2);
        }
        return;
    }
    // By return, and by SIGKILL.
    for (environment, kill_after) in [(&[][..], None), (&[("HANG", "1")][..], Some(" up"))] {
        let printed = in_a_process("the_shared_server_ends_with_its_process", environment, kill_after);
        let dir = PathBuf::from(told(&printed, "dir"));
        let gone = || processes_in(&dir).is_empty() && !dir.exists();
        assert!(wait_until(within(SOON), gone), "left over of {printed}: {:?}", processes_in(&dir));
    }
}

#[test]
fn a_database_of_the_users_serves_instead() {
    if is_child() {
        let database = Database::get();
        let mut client = connect(&database.conninfo("given"));
        let port: i32 = client.query_one("SELECT inet_server_port()", &[]).unwrap().get(0);
        println!("seen={} port={port}", database.count("given"));
        return;
    }
    let server = Server::start();
    for address in [server.url(), format!("{}?connect_timeout=5", server.url()), server.conninfo("replaced")] {
        let printed = in_a_process("a_database_of_the_users_serves_instead", &[("DATABASE_URL", &address)], None);
        assert_eq!(told(&printed, "seen"), "1");
        assert_eq!(told(&printed, "port"), server.port().to_string());
        assert_eq!(server.wait_for("given", 0, within(SOON)), 0);
    }
}

#[test]
fn no_postgresql_is_one_clear_message() {
    let nowhere = [PathBuf::from("/nowhere"), PathBuf::from("/usr")];
    let panic = catch_unwind(|| support::programs::find_in(&nowhere)).expect_err("there is none");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("apt-get install postgresql") && message.contains("in: /nowhere, /usr"), "{message}");
}

#[test]
fn threads_are_found_by_name() {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::Builder::new().name("looked-for-very-long".into());
    let thread = thread.spawn(move || ended.recv()).unwrap();
    assert!(wait_until(within(SOON), || threads_named("looked-for") == ["looked-for-very"]));
    drop(end);
    let _ = thread.join();
    assert!(wait_until(within(SOON), || threads_named("looked-for").is_empty()));
}

/// A server that sends back what it gets, for as many connections as a test wants.
fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || std::io::copy(&mut &client, &mut &client));
        }
    });
    addr
}

/// Whether what is sent comes back, within `limit`.
fn echoes(client: &mut TcpStream, limit: Duration) -> bool {
    client.set_read_timeout(Some(limit)).unwrap();
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    match client.read_exact(&mut answer) {
        Ok(()) => answer == *b"hello",
        Err(e) if e.kind() == ErrorKind::WouldBlock => false,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn a_proxy_forwards_pauses_and_resumes() {
    let server = Server::start();
    let proxy = Proxy::to(server.addr());
    let mut client = connect(&proxy.conninfo("paused"));
    client.simple_query("SELECT 1").unwrap();
    assert_eq!((proxy.accepted(), proxy.open(), server.count("paused")), (1, 1, 1));

    proxy.pause();
    let (answered, answer) = std::sync::mpsc::channel();
    let query = std::thread::spawn(move || {
        answered.send(client.simple_query("SELECT 2").is_ok()).unwrap();
        client
    });
    let (connected, late) = std::sync::mpsc::channel();
    let conninfo = proxy.conninfo("paused");
    let connecting = std::thread::spawn(move || connected.send(Client::connect(&conninfo, NoTls)).unwrap());
    assert!(answer.recv_timeout(ms(300)).is_err(), "no answer while paused, and no error either");
    assert!(late.try_recv().is_err(), "no connection either");
    assert_eq!((proxy.accepted(), proxy.open(), server.count("paused")), (2, 2, 1));

    proxy.resume();
    assert!(answer.recv_timeout(SOON).unwrap());
    let late = late.recv_timeout(SOON).unwrap().unwrap();
    connecting.join().unwrap();
    assert_eq!(server.count("paused"), 2);

    drop((late, query.join().unwrap()));
    assert!(wait_until(within(SOON), || proxy.open() == 0));
    assert_eq!(server.wait_for("paused", 0, within(SOON)), 0);
}

#[test]
fn a_proxy_carries_much_both_ways() {
    let proxy = Proxy::to(echo());
    let client = TcpStream::connect(proxy.addr()).unwrap();
    let much: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&client).write_all(&much).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        (&client).read_to_end(&mut back).unwrap();
    });
    assert!(back == much);
    assert!(wait_until(within(SOON), || proxy.open() == 0));
}

#[test]
fn a_proxy_cuts_with_a_reset() {
    let proxy = Proxy::to(echo());
    for paused in [false, true] {
        let mut client = TcpStream::connect(proxy.addr()).unwrap();
        assert!(echoes(&mut client, SOON));
        if paused {
            proxy.pause();
            assert!(!echoes(&mut client, ms(50)));
        }
        proxy.cut();
        assert_eq!(proxy.open(), 0);
        assert_eq!(client.read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        proxy.resume();
    }
    let mut client = TcpStream::connect(proxy.addr()).unwrap();
    assert!(echoes(&mut client, SOON), "new connections are served");

    // One that writes and never reads, so that the proxy cannot get rid of what the server sends back.
    let mut stuffed = TcpStream::connect(proxy.addr()).unwrap();
    stuffed.set_write_timeout(Some(ms(200))).unwrap();
    while stuffed.write(&[7; 65536]).is_ok() {}
    let start = Instant::now();
    proxy.cut();
    assert!(start.elapsed() < SOON);
    assert_eq!(proxy.open(), 0);
}

#[test]
fn a_proxy_refuses_and_accepts_on_the_same_port() {
    let proxy = Proxy::to(echo());
    let mut old = TcpStream::connect(proxy.addr()).unwrap();
    assert!(echoes(&mut old, SOON));

    proxy.refuse();
    assert_eq!(TcpStream::connect(proxy.addr()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(echoes(&mut old, SOON), "older connections are served");

    proxy.accept();
    assert!(echoes(&mut TcpStream::connect(proxy.addr()).unwrap(), SOON));
    assert_eq!(proxy.accepted(), 2);
}

#[test]
fn a_silent_proxy_never_answers_and_a_delayed_one_late() {
    let proxy = Proxy::to(echo());
    proxy.silent(true);
    let mut silent = TcpStream::connect(proxy.addr()).unwrap();
    assert!(!echoes(&mut silent, ms(100)));
    proxy.silent(false);
    assert!(!echoes(&mut silent, ms(100)), "not even later");

    proxy.delay(ms(200));
    let start = Instant::now();
    assert!(echoes(&mut TcpStream::connect(proxy.addr()).unwrap(), SOON));
    assert!(start.elapsed() >= ms(200));

    let listener = Silent::listen();
    let mut clients: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(listener.addr()).unwrap()).collect();
    assert!(wait_until(within(SOON), || listener.accepted() == 200));
    assert!(!echoes(&mut clients[199], ms(100)));
    clients.pop();
    assert!(wait_until(within(SOON), || listener.open() == 199));
    drop(listener);
    assert_eq!(clients[0].read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_dropped_proxy_leaves_no_thread_and_no_port() {
    if !is_child() {
        // Alone in its process: other tests have proxies, too.
        in_a_process("a_dropped_proxy_leaves_no_thread_and_no_port", &[], None);
        return;
    }
    let proxy = Proxy::to(echo());
    let addr = proxy.addr();
    let mut clients: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(addr).unwrap()).collect();
    assert!(clients.iter_mut().all(|client| echoes(client, SOON)));
    proxy.pause();
    proxy.delay(SOON * 6);
    let _late = TcpStream::connect(addr).unwrap();
    assert!(wait_until(within(SOON), || proxy.open() == 6));
    assert_eq!(threads_named("proxy-").len(), 1 + 2 * 5 + 1);

    let start = Instant::now();
    drop(proxy);
    assert!(start.elapsed() < SOON);
    assert_eq!(threads_named("proxy-"), [] as [String; 0]);
    assert_eq!(TcpStream::connect(addr).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}
