//! The support itself: what the other tests take on trust.

mod support;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use support::{
    Backend, Bouncer, Database, EPSILON, End, Fault, PoolMode, Proxy, SOON, Server, Silent, Stops, alone,
    beside_others, ms, slack, threads_named, wait_until, within,
};

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
    let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
    if let Some(line) = kill_after {
        while !printed.contains(line) && stdout.read_line(&mut printed).expect("text") > 0 {}
        child.kill().expect("a process to kill");
    }
    stdout.read_to_string(&mut printed).expect("text");
    let status = child.wait().expect("a child");
    assert!(kill_after.is_some() || status.success(), "{test}, in its own process: {printed}");
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
    let _beside = beside_others();
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
    let _beside = beside_others();
    let server = Server::with(&[("max_connections", "17")]);
    assert_eq!(server.connect().query_one("SHOW max_connections", &[]).unwrap().get::<_, &str>(0), "17");
}

#[test]
fn waiting_ends_at_its_deadline() {
    let _alone = alone();
    let start = Instant::now();
    assert!(!wait_until(start + ms(100), || false));
    assert!((ms(100)..ms(100) + EPSILON).contains(&start.elapsed()), "{:?}", start.elapsed());
    assert!(wait_until(start, || true), "asked at least once");
}

#[test]
fn restart_keeps_the_port_and_the_data() {
    let _beside = beside_others();
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
    let _beside = beside_others();
    let server = Server::start();
    let dir = server.socket_dir().to_owned();
    // A backend that does not look up from its work, and so does not see its postmaster die.
    let busy = server.conninfo("busy");
    let busy = std::thread::spawn(move || {
        let mut client = connect(&busy);
        client.batch_execute("SET statement_timeout = '60s'").unwrap();
        client.batch_execute("DO $$ BEGIN LOOP END LOOP; END $$")
    });
    let works = || server.backends("busy").iter().any(|backend| backend.state == "active");
    assert!(wait_until(within(SOON), works));
    let running = processes_in(&dir).len();
    assert!(running > 4, "the watchdog, the postmaster, its auxiliary processes, a backend; seen: {running}");

    server.kill();
    assert_eq!(processes_in(&dir).len(), 1, "only the watchdog is left");
    assert!(busy.join().unwrap().is_err());

    drop(server);
    assert_eq!(processes_in(&dir), [] as [PathBuf; 0]);
    assert!(!dir.exists());
}

#[test]
fn a_killed_server_leaves_no_shared_memory() {
    let _beside = beside_others();
    let server = Server::start();
    let file = std::fs::read_to_string(server.socket_dir().join("data/postmaster.pid")).unwrap();
    let id = file.lines().nth(6).and_then(|key_and_id| key_and_id.split_whitespace().nth(1)).expect("its id");
    let exists = || {
        let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
        segments.lines().any(|line| line.split_whitespace().nth(1) == Some(id))
    };
    server.kill();
    assert!(exists(), "the kernel keeps it for the next postmaster");
    drop(server);
    assert!(!exists());
}

/// The processes that this one started and has not waited for.
fn children() -> Vec<String> {
    let parent = std::process::id().to_string();
    let stats = std::fs::read_dir("/proc").expect("/proc").flatten();
    let stats = stats.filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok());
    let ours = |stat: &String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.split(' ').nth(1) == Some(&parent));
    stats.filter(ours).collect()
}

#[test]
fn drop_after_a_panic_leaves_nothing() {
    let _beside = beside_others();
    if !is_child() {
        // Alone in its process: other tests have children, too.
        in_a_process("drop_after_a_panic_leaves_nothing", &[], None);
        return;
    }
    let mut dir = PathBuf::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let server = Server::start();
        dir = server.socket_dir().to_owned();
        assert!(processes_in(&dir).len() > 4);
        assert_eq!(children().len(), 2);
        let _client = connect(&server.conninfo("panic"));
        std::panic::resume_unwind(Box::new("quietly"));
    }));
    assert!(panicked.is_err());
    assert_eq!(processes_in(&dir), [] as [PathBuf; 0]);
    assert_eq!(children(), [] as [String; 0], "not even a zombie");
    assert!(!dir.exists());
}

#[test]
fn the_shared_server_ends_with_its_process() {
    let _beside = beside_others();
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
fn a_bouncer_bounces_and_ends_with_its_process() {
    let _beside = beside_others();
    if is_child() {
        let bouncer = Bouncer::start(Server::shared(), PoolMode::Transaction, &[("default_pool_size", "1")]);
        let mut client = connect(&bouncer.conninfo("bounced"));
        client.simple_query("SELECT 1").expect("an answer");
        assert_eq!(Server::shared().count("bounced"), 1);
        assert_eq!(bouncer.clients(), 1);
        let pools = bouncer.admin("SHOW POOLS");
        assert!(pools.iter().any(|row| row.get("pool_mode") == Some("transaction")), "{pools:?}");

        bouncer.kill();
        assert!(client.simple_query("SELECT 1").is_err());
        bouncer.start_again();
        connect(&bouncer.conninfo("bounced")).simple_query("SELECT 1").expect("an answer");
        assert_eq!(bouncer.wait_for(0, within(SOON)), 0);

        println!("dir={} port={} up", bouncer.dir().display(), bouncer.port());
        match std::env::var("END").as_deref() {
            Ok("drop") => drop(bouncer),
            Ok("panic") => {
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    let _bouncer = bouncer;
                    std::panic::resume_unwind(Box::new("quietly"));
                }));
                assert!(panicked.is_err());
            }
            _ => return std::thread::sleep(SOON * 2),
        }
        // The shared server and its watchdog are left.
        assert_eq!(children().len(), 2);
        return;
    }
    for (end, kill_after) in [("drop", None), ("panic", None), ("kill", Some(" up"))] {
        let printed = in_a_process("a_bouncer_bounces_and_ends_with_its_process", &[("END", end)], kill_after);
        let (dir, port) = (PathBuf::from(told(&printed, "dir")), told(&printed, "port").parse().unwrap());
        let gone =
            || processes_in(&dir).is_empty() && !dir.exists() && TcpStream::connect(("127.0.0.1", port)).is_err();
        assert!(wait_until(within(SOON), gone), "left over of {printed}: {:?}", processes_in(&dir));
    }
}

#[test]
fn a_standby_follows_and_is_promoted() {
    let _beside = beside_others();
    let primary = Server::with(Server::STREAMING);
    let standby = Server::standby_of(&primary);
    let mut client = connect(&primary.conninfo("standby"));
    client.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (42)").unwrap();
    let mut there = connect(&standby.conninfo("standby"));
    let arrived =
        || there.query("SELECT i FROM t", &[]).is_ok_and(|rows| rows.len() == 1 && rows[0].get::<_, i32>(0) == 42);
    assert!(wait_until(within(SOON), arrived));
    assert!(there.batch_execute("INSERT INTO t VALUES (43)").is_err());
    standby.promote();
    there.batch_execute("INSERT INTO t VALUES (43)").unwrap();
    primary.kill();
    assert_eq!(there.query_one("SELECT sum(i) FROM t", &[]).unwrap().get::<_, i64>(0), 85);
}

#[cfg(target_os = "linux")]
#[test]
fn a_cut_cable_loses_packets_and_nobody_is_told() {
    let _beside = beside_others();
    let cable = match support::Cable::lay() {
        Ok(cable) => cable,
        Err(why) => return support::skipped("a_cut_cable_loses_packets_and_nobody_is_told", &why),
    };
    let listener = cable.far.run(|| TcpListener::bind((cable.far.address, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    let mut near = cable.near.run(|| TcpStream::connect_timeout(&addr, SOON)).expect("a cable");
    let mut far = listener.accept().unwrap().0;
    far.write_all(b"1").unwrap();
    let mut byte = [0];
    near.read_exact(&mut byte).unwrap();

    cable.cut();
    for socket in [&near, &far] {
        socket.set_read_timeout(Some(ms(300))).unwrap();
    }
    far.write_all(b"2").expect("the kernel takes it");
    near.write_all(b"3").expect("the kernel takes it");
    assert_eq!(near.read(&mut byte).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(far.read(&mut byte).unwrap_err().kind(), ErrorKind::WouldBlock);
    let error = cable.near.run(|| TcpStream::connect_timeout(&addr, ms(300))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "neither refused nor unreachable");

    cable.mend();
    near.set_read_timeout(Some(SOON)).unwrap();
    near.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"2", "sent again until it arrived");
}

#[test]
fn a_database_of_the_users_serves_instead() {
    let _beside = beside_others();
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
    let _beside = beside_others();
    let half = tempfile::tempdir().unwrap();
    std::fs::write(half.path().join("initdb"), "").unwrap();
    let nowhere = [PathBuf::from("/nowhere"), half.path().to_owned()];
    let panic = catch_unwind(|| support::programs::find_in(&nowhere)).expect_err("there is none");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("apt-get install postgresql") && message.contains("in: /nowhere, "), "{message}");
}

/// A test of one version that ran on another would say nothing.
#[test]
fn programs_that_are_named_are_the_only_ones() {
    let _beside = beside_others();
    if is_child() {
        let panic = catch_unwind(support::programs::find).expect_err("there is none");
        return println!("{}", panic.downcast_ref::<String>().expect("a message"));
    }
    let environment = [(support::programs::POSTGRES, "/nowhere")];
    let printed = in_a_process("programs_that_are_named_are_the_only_ones", &environment, None);
    assert!(printed.contains("in: /nowhere\n"), "{printed}");
}

#[test]
fn threads_are_found_by_name() {
    let _beside = beside_others();
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
    let _beside = beside_others();
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
    assert!(wait_until(within(SOON), || (proxy.accepted(), proxy.open()) == (2, 2)));
    assert_eq!(server.count("paused"), 1);

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
    let _beside = beside_others();
    let proxy = Proxy::to(echo());
    let client = TcpStream::connect(proxy.addr()).unwrap();
    let much: Vec<u8> = (0..40_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&client).write_all(&much).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        // Until nobody on the way can take any more.
        std::thread::sleep(ms(300));
        (&client).read_to_end(&mut back).unwrap();
    });
    assert!(back == much);
    assert!(wait_until(within(SOON), || proxy.open() == 0));
}

#[test]
fn a_proxy_cuts_with_a_reset() {
    let _beside = beside_others();
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
    let _beside = beside_others();
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
    let _beside = beside_others();
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
    let _beside = beside_others();
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
    // A thread gives itself its name, some time after it began.
    assert!(
        wait_until(within(SOON), || threads_named("proxy-").len() == 1 + 2 * 5 + 1),
        "{:?}",
        threads_named("proxy-")
    );

    let start = Instant::now();
    drop(proxy);
    assert!(start.elapsed() < SOON);
    // A thread that was joined is in the system's list for a moment yet.
    assert!(wait_until(within(SOON), || threads_named("proxy-").is_empty()), "{:?}", threads_named("proxy-"));
    assert_eq!(TcpStream::connect(addr).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

/// A proxy, and clients of it which have each had one answer, and so have the numbers from 0 on.
fn answered_clients(n: usize) -> (Proxy, Vec<TcpStream>) {
    let proxy = Proxy::to(echo());
    let client = |_| {
        let mut client = TcpStream::connect(proxy.addr()).unwrap();
        assert!(echoes(&mut client, SOON));
        client
    };
    let clients = (0..n).map(client).collect();
    (proxy, clients)
}

/// The next bytes that come, up to `most`, until none comes for a while.
fn bytes_of(client: &mut TcpStream, most: usize) -> Vec<u8> {
    client.set_read_timeout(Some(ms(200))).unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    while seen.len() < most && matches!(client.read(&mut byte), Ok(1)) {
        seen.push(byte[0]);
    }
    seen
}

#[test]
fn a_fault_befalls_the_connections_that_were_named() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(3);
    proxy.fault(1..2, Fault::Pause);
    assert!(echoes(&mut clients[0], SOON) && echoes(&mut clients[2], SOON));
    assert!(!echoes(&mut clients[1], ms(200)));
    proxy.heal();
    assert_eq!(bytes_of(&mut clients[1], 5), b"hello", "it was kept back");

    // As a firewall does that forgets its flows: what is there hears no more, and what comes is served.
    proxy.fault(..proxy.accepted(), Fault::Pause);
    assert!(!echoes(&mut clients[0], ms(100)) && !echoes(&mut clients[2], ms(100)));
    let mut late = TcpStream::connect(proxy.addr()).unwrap();
    assert!(echoes(&mut late, SOON));

    // The other way round; and the last fault of a connection counts.
    proxy.fault(..proxy.accepted(), Fault::Pass);
    proxy.fault(proxy.accepted().., Fault::Pause);
    assert!(echoes(&mut late, SOON));
    let mut later = TcpStream::connect(proxy.addr()).unwrap();
    assert!(!echoes(&mut later, ms(200)), "accepted, and not served");
    proxy.heal();
    assert_eq!(bytes_of(&mut later, 5), b"hello");
}

#[test]
fn a_proxy_resets_what_is_there_and_what_comes() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(2);
    proxy.fault(1.., Fault::Reset);
    assert_eq!(clients[1].read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(echoes(&mut clients[0], SOON));
    // The port is there, unlike after `refuse`. Whoever is quick sees the reset when it connects already.
    if let Ok(mut next) = TcpStream::connect(proxy.addr()) {
        assert_eq!(next.read(&mut [0; 5]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert!(wait_until(within(SOON), || (proxy.accepted(), proxy.open()) == (3, 1)));
    proxy.heal();
    assert!(echoes(&mut TcpStream::connect(proxy.addr()).unwrap(), SOON));
}

#[test]
fn a_proxy_swallows_answers_and_requests() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(2);
    proxy.fault(0..1, Fault::SwallowAnswers);
    proxy.fault(1..2, Fault::SwallowRequests);
    assert!(!echoes(&mut clients[0], ms(200)) && !echoes(&mut clients[1], ms(200)));
    proxy.heal();
    for client in &mut clients {
        client.write_all(b"later").unwrap();
        assert_eq!(bytes_of(client, 5), b"later", "what was swallowed is lost");
    }
}

#[test]
fn a_proxy_stalls_and_resets_in_mid_message() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(2);
    proxy.fault(0..1, Fault::StallAfter(2));
    clients[0].write_all(b"hello").unwrap();
    assert_eq!(bytes_of(&mut clients[0], 5), b"he");
    proxy.heal();
    assert_eq!(bytes_of(&mut clients[0], 3), b"llo");

    proxy.fault(1..2, Fault::ResetAfter(7));
    assert!(echoes(&mut clients[1], SOON));
    clients[1].write_all(b"world").unwrap();
    clients[1].set_read_timeout(Some(SOON)).unwrap();
    let (mut seen, mut byte) = (Vec::new(), [0]);
    let end = loop {
        match clients[1].read(&mut byte) {
            Ok(1) => seen.push(byte[0]),
            Ok(_) => panic!("an orderly end after {seen:?}"),
            Err(e) => break e.kind(),
        }
    };
    assert_eq!((seen.as_slice(), end), (&b"wo"[..], ErrorKind::ConnectionReset));
}

#[test]
fn a_proxy_closes_one_half() {
    let _beside = beside_others();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::to(server.local_addr().unwrap());
    for end in [End::Client, End::Server] {
        let mut client = TcpStream::connect(proxy.addr()).unwrap();
        let mut served = server.accept().unwrap().0;
        client.write_all(b"1").unwrap();
        served.read_exact(&mut [0]).unwrap();
        proxy.fault(proxy.accepted() - 1.., Fault::CloseHalf(end));
        let (told, other) = if end == End::Client { (&mut client, &mut served) } else { (&mut served, &mut client) };
        assert_eq!(told.read(&mut [0]).unwrap(), 0, "{end:?} is told that no more comes");
        told.write_all(b"2").unwrap();
        let mut byte = [0];
        other.set_read_timeout(Some(SOON)).unwrap();
        other.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"2", "the other half is open");
        other.write_all(b"3").expect("it is not told");
        assert_eq!(told.read(&mut byte).unwrap(), 0);
        proxy.heal();
    }
}

#[test]
fn a_proxy_delays_and_trickles() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(1);
    proxy.fault(.., Fault::Latency(ms(200)));
    let start = Instant::now();
    assert!(echoes(&mut clients[0], SOON));
    assert!(start.elapsed() >= ms(200));
    proxy.fault(.., Fault::Trickle(2, ms(100)));
    let start = Instant::now();
    assert!(echoes(&mut clients[0], SOON));
    // "he", "ll", "o".
    assert!(start.elapsed() >= ms(200), "{:?}", start.elapsed());
    proxy.heal();
    let start = Instant::now();
    assert!(echoes(&mut clients[0], SOON));
    assert!(start.elapsed() < ms(200), "{:?}", start.elapsed());
}

#[test]
fn a_proxy_corrupts_one_byte() {
    let _beside = beside_others();
    let (proxy, mut clients) = answered_clients(1);
    proxy.fault(.., Fault::Corrupt(6));
    assert!(echoes(&mut clients[0], SOON));
    clients[0].write_all(b"world").unwrap();
    assert_eq!(bytes_of(&mut clients[0], 5), [b'w', !b'o', b'r', b'l', b'd']);
    assert!(echoes(&mut clients[0], SOON), "one byte only");
}

#[test]
fn a_proxy_reorders_the_fates_of_two() {
    let _beside = beside_others();
    let proxy = Proxy::to(echo());
    proxy.fault(0..1, Fault::Behind(1));
    let mut first = TcpStream::connect(proxy.addr()).unwrap();
    assert!(!echoes(&mut first, ms(200)));
    let mut second = TcpStream::connect(proxy.addr()).unwrap();
    assert!(!echoes(&mut first, ms(100)), "that it came through is not enough");
    assert!(echoes(&mut second, SOON));
    assert_eq!(bytes_of(&mut first, 10), b"hellohello");
    assert!(echoes(&mut first, SOON));
}

#[test]
fn what_stands_still_at_once_counts_once() {
    let (start, at) = (Instant::now(), |ms: u64| Duration::from_millis(ms));
    let mut stops = Stops::default();
    stops.note(start + at(10), start + at(20));
    stops.note(start + at(30), start + at(50));
    stops.note(start + at(45), start + at(60));
    assert_eq!((stops.since(start), stops.since(start + at(40)), stops.longest), (at(40), at(20), at(20)));
    stops.note(start + at(15), start + at(70));
    assert_eq!((stops.since(start), stops.longest), (at(60), at(55)));
    assert_eq!(stops.since(start + at(70)), Duration::ZERO);
}

#[test]
fn a_deadline_waits_while_the_machine_stands_still() {
    if !support::in_a_process("a_deadline_waits_while_the_machine_stands_still", &[]) {
        return;
    }
    let _beside = beside_others();
    // The heart has begun to beat.
    assert!(wait_until(within(SOON), || !threads_named("heart").is_empty()));
    std::thread::sleep(ms(20));
    let stop = format!("sleep 0.1; kill -STOP {0}; sleep 0.5; kill -CONT {0}", std::process::id());
    let begun = Instant::now();
    let mut stopping = std::process::Command::new("sh").args(["-c", &stop]).spawn().unwrap();
    let mut looks = 0;
    let deadline = begun + ms(400);
    // Nobody is looking when the deadline is over, and then there are a few looks more.
    let there = wait_until(deadline, || {
        looks += usize::from(Instant::now() > deadline);
        looks == 5
    });
    assert!(there, "{looks} looks after the deadline, within {:?}", begun.elapsed());
    assert!(stopping.wait().unwrap().success());
    assert!(slack() > EPSILON + ms(300), "{:?}", slack());
}
