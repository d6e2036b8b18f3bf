//! The server of notes, over HTTP.

use crate::support::{SOON, Server, ms, wait_until};
use crate::{Corner, GRACE, Notes, example, soon};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

/// For statements that are to hang for as long as the test likes.
const LONG: (&str, &str) = ("STATEMENT_TIMEOUT", "600");

#[test]
fn notes_are_kept() {
    let corner = Corner::new("examples_kept");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);

    assert_eq!(notes.get("/notes").body, "");
    let created = notes.post("Grease the wheel");
    assert_eq!((created.status, created.body.as_str()), (201, "1"));
    assert!(created.head.contains("location: /notes/1"), "{}", created.head);
    assert_eq!(notes.post("Mind the sluice\nat night").body, "2");
    let read = notes.get("/notes/2?really");
    assert_eq!((read.status, read.body.as_str()), (200, "Mind the sluice\nat night"));
    assert_eq!(notes.get("/notes").body, "2: Mind the sluice\n1: Grease the wheel");
    (0..20).for_each(|_| assert_eq!(notes.post("more").status, 201));
    let list = notes.get("/notes").body;
    assert_eq!((list.lines().count(), list.lines().next()), (20, Some("22: more")));

    // Where the example was built with the feature.
    let metrics = notes.get("/metrics");
    if cfg!(feature = "prometheus-client") {
        assert!(
            metrics.body.contains("db_client_connection_count{db_client_connection_pool_name=\"notes\""),
            "{}",
            metrics.body
        );
    } else {
        assert_eq!(metrics.status, 404);
    }
    let pool = notes.get("/pool");
    assert!(pool.status == 200 && pool.body.contains("pool 'notes'") && pool.body.contains("idle"), "{}", pool.body);
    assert_eq!(corner.connections(), 1);
}

#[test]
fn refusals() {
    let corner = Corner::new("examples_refusals");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    for path in ["/note", "/notes/1", "/notes/x", "/notes/1/2", "/notes/99999999999999999999"] {
        assert_eq!(notes.get(path).status, 404, "{path}");
    }
    let refused = notes.send("DELETE", "/notes", "", "");
    assert!(refused.status == 405 && refused.head.contains("allow: get, head, post"), "{}", refused.head);
    if cfg!(feature = "prometheus-client") {
        assert_eq!(notes.send("POST", "/metrics", "", "").status, 405);
    }
    // A body that breaks off is the client's fault.
    let mut client = TcpStream::connect(notes.addr).unwrap();
    client.write_all(b"POST /notes HTTP/1.1\r\nContent-Length: 4\r\n\r\nfo").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    // HEAD is answered as GET is, without the body.
    for path in ["/live", "/notes", "/note"] {
        let (get, head) = (notes.get(path), notes.send("HEAD", path, "", ""));
        assert_eq!((head.status, head.head, head.body.as_str()), (get.status, get.head, ""), "{path}");
    }
    for path in ["/", "/pool", "/ready", "/live", "/status"] {
        assert_eq!(notes.send("POST", path, "", "").status, 405, "{path}");
    }
    for body in ["", "a\0b"] {
        assert_eq!(notes.post(body).status, 400, "{body:?}");
    }

    let large = "x".repeat(16 * 1024);
    assert_eq!(notes.post(&large).status, 201);
    assert_eq!(notes.post(&(large.clone() + "x")).status, 413);
    // It need not be sent to be refused.
    let expecting = "Content-Length: 20000\r\nExpect: 100-continue\r\n";
    assert_eq!(notes.send("POST", "/notes", expecting, "").status, 413);
    // And what may be sent is asked for.
    let mut client = TcpStream::connect(notes.addr).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"POST /notes HTTP/1.1\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n").unwrap();
    let mut go_on = [0; 25];
    client.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"more").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");

    // What only the database knows to be wrong costs that request, and its words stay in the log.
    corner.database.connect().batch_execute("ALTER TABLE examples_refusals.notes ADD CHECK (body <> 'no')").unwrap();
    let failed = notes.post("no");
    assert_eq!((failed.status, failed.body.as_str()), (500, "something went wrong here"));
    assert_eq!(notes.post("yes").status, 201);
}

#[test]
fn what_is_no_plain_request_is_refused() {
    let corner = Corner::new("examples_plain");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), ("WORKERS", "1")]);
    let status = |headers: &str| notes.send("POST", "/notes", headers, "four").status;
    assert_eq!(status("Content-Length: 4\r\n"), 201);
    // Where a request ends must be no matter of opinion.
    assert_eq!(status("Content-Length: 4\r\nContent-Length: 4\r\n"), 400);
    assert_eq!(status("Content-Length: +4\r\n"), 400);
    assert_eq!(status("Content-Length: 4, 4\r\n"), 400);
    assert_eq!(status("Content-Length: \r\n"), 400);
    assert_eq!(status("Content-Length: 99999999999999999999999\r\n"), 400);
    assert_eq!(status("Transfer-Encoding: chunked\r\n"), 411);
    assert_eq!(status("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n"), 411);
    assert_eq!(status("Content-Length : 4\r\n"), 400);
    assert_eq!(notes.send("no method", "/", "", "").status, 400);
    assert_eq!(status(&"X: y\r\n".repeat(100)), 431);
    assert_eq!(status(&format!("X: {}\r\n", "y".repeat(20_000))), 431);

    // The threads that read are not kept by clients that say nothing, or half of something, or leave.
    let silent = [(); 4].map(|()| TcpStream::connect(notes.addr).unwrap());
    let mut slow = TcpStream::connect(notes.addr).unwrap();
    slow.write_all(b"GET /notes HT").unwrap();
    drop(TcpStream::connect(notes.addr).unwrap());
    assert_eq!(notes.get("/notes").status, 200);
    drop((silent, slow));
}

#[test]
fn unreachable_is_told_from_exhausted() {
    let server = Server::start();
    let notes = Notes::start(&[("DATABASE_URL", &server.url())]);
    assert_eq!((notes.post("before").status, notes.get("/ready").body.as_str()), (201, "ready"));

    server.stop_fast();
    // The connection that was there, used a moment ago and not looked at again, costs the first request.
    let _ = notes.post("unlucky");
    let refused = notes.post("during");
    assert_eq!((refused.status, refused.body.as_str()), (503, "the database cannot be reached"));
    assert!(!refused.head.contains("retry-after"), "{}", refused.head);
    let ready = notes.get("/ready");
    assert!(ready.status == 503 && ready.body.contains("down"), "{}: {}", ready.status, ready.body);
    assert_eq!(notes.get("/live").status, 200);
    let status = || serde_json::from_str::<serde_json::Value>(&notes.get("/status").body).unwrap();
    let down = status();
    assert!(down["failing"]["attempts"].as_u64() > Some(0), "{}", down["failing"]);
    assert!(down["last_error"]["text"].as_str().is_some_and(|text| text.contains("refused")), "{}", down["last_error"]);

    server.start_again();
    assert!(wait_until(soon(), || notes.get("/ready").status == 200), "{}", notes.get("/ready").body);
    assert_eq!(notes.post("after").status, 201);
    let up = status();
    assert!(up["failing"].is_null() && up["last_error"]["text"].is_string(), "{} {}", up["failing"], up["last_error"]);

    // The weather waits longer for a connection than a program may take to end.
    server.stop_fast();
    assert_eq!(notes.send("POST", "/weather/burst", "", "").status, 202);
    assert!(wait_until(soon(), || status()["counts"]["waiting"].as_u64() > Some(0)));
    notes.signal(Signal::TERM);
    let (status, words) = notes.end();
    assert!(status.success() && words.contains("nothing is left"), "{status}: {words}");
}

#[test]
fn a_refusal_is_told_from_both() {
    let mut corner = Corner::new("examples_refused");
    let role = "examples_refused";
    let drop_role = format!("DROP OWNED BY {role}; DROP ROLE {role}");
    let _ = corner.client.batch_execute(&drop_role); // of a run that was interrupted
    corner
        .client
        .batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT ALL ON SCHEMA {role} TO {role}"))
        .unwrap();
    let mut config: postgres::Config = corner.address().parse().unwrap();
    let address = format!(
        "host=127.0.0.1 port={} user={role} password=x dbname={} application_name={role} options='-c search_path={role}'",
        config.get_ports().first().copied().unwrap_or(5432),
        config.user(role).get_dbname().unwrap_or("postgres"),
    );
    let notes = Notes::start(&[("DATABASE_URL", &address)]);
    assert_eq!(notes.post("before").status, 201);

    corner.client.batch_execute(&format!("ALTER ROLE {role} NOLOGIN")).unwrap();
    corner.database.terminate(role);
    let begun = Instant::now();
    let answers = [(); 3].map(|()| notes.post("during"));
    let last = &answers[2];
    assert_eq!((last.status, last.body.as_str()), (500, "the database refuses this server"));
    assert!(begun.elapsed() < ms(3000), "it was waited for: {:?}", begun.elapsed());
    corner.client.batch_execute(&format!("ALTER ROLE {role} LOGIN")).unwrap();
    assert!(wait_until(soon(), || notes.post("after").status == 201));
    drop(notes);
    assert_eq!(corner.left(), 0);
    corner.client.batch_execute(&drop_role).unwrap();
}

#[test]
fn exhausted() {
    let corner = Corner::new("examples_exhausted");
    let size = [("POOL_SIZE", "2"), ("WORKERS", "4"), LONG];
    let address = corner.address();
    let notes = Notes::start(&[&[("DATABASE_URL", address.as_str())], &size[..]].concat());

    let lock = corner.lock();
    let hanging = [(), ()].map(|()| notes.in_background("GET", "", ""));
    assert!(wait_until(soon(), || corner.hanging() == 2), "two hold all there are");
    let begun = Instant::now();
    let refused = notes.get("/notes");
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert!(begun.elapsed() >= ms(1000), "it was not even tried for: {:?}", begun.elapsed());
    // What needs no connection goes on, and says who has them.
    let pool = notes.get("/pool").body;
    assert!(pool.contains("2 in use") && pool.matches("examples/server/main.rs:").count() == 2, "{pool}");
    assert_eq!(corner.connections(), 2);

    drop(lock);
    hanging.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap().status, 200));
    assert_eq!(notes.get("/notes").status, 200);
}

#[test]
fn slow_statements_do_not_silence_the_rest() {
    let corner = Corner::new("examples_slow");
    let size = [("POOL_SIZE", "2"), ("WORKERS", "2"), ("STATEMENT_TIMEOUT", "5")];
    let address = corner.address();
    let notes = Notes::start(&[&[("DATABASE_URL", address.as_str())], &size[..]].concat());

    let lock = corner.lock();
    let mut sent = vec![notes.in_background("GET", "", ""), notes.in_background("GET", "", "")];
    assert!(wait_until(soon(), || corner.hanging() == 2), "two are served");
    sent.extend((0..4).map(|_| notes.in_background("GET", "", "")));
    assert!(wait_until(soon(), || sent.iter().filter(|thread| thread.is_finished()).count() == 2), "two had no room");
    for path in ["/", "/live", "/ready", "/pool", "/status"] {
        assert_eq!(notes.get(path).status, 200, "{path}");
    }
    assert_eq!(corner.hanging(), 2, "all that was answered meanwhile");
    // And those that hang are ended, and those that waited for them.
    let answers: Vec<_> = sent.into_iter().map(|thread| thread.join().unwrap()).collect();
    let told = |what: &str| answers.iter().filter(|a| a.status == 503 && a.body == what).count();
    assert_eq!((told("too busy, come again"), told("the database takes too long")), (2, 4));
    drop(lock);
    assert_eq!(notes.get("/notes").status, 200);
}

#[test]
fn a_lost_connection_costs_one_request() {
    let corner = Corner::new("examples_lost");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    assert_eq!(notes.post("before").status, 201);
    assert_eq!(corner.database.terminate(corner.name), 1);
    assert_eq!(corner.left(), 0);
    assert!([201, 500].contains(&notes.post("unlucky, unless it was checked").status));
    assert_eq!(notes.post("after").status, 201);
}

#[test]
fn a_panic_costs_one_request() {
    let mut corner = Corner::new("examples_panic");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), ("WORKERS", "1")]);
    // Not what the program expects of a row, which it has while it holds the connection.
    corner.client.batch_execute("ALTER TABLE examples_panic.notes ALTER id TYPE int").unwrap();
    assert_eq!(notes.post("unlucky").status, 500);
    corner.client.batch_execute("ALTER TABLE examples_panic.notes ALTER id TYPE bigint").unwrap();
    assert_eq!(notes.post("lucky").status, 201);
    let pool = notes.get("/pool").body;
    assert!(pool.contains("1 panicked"), "{pool}");
}

#[test]
fn sigterm_while_a_request_is_served() {
    let mut corner = Corner::new("examples_sigterm");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), LONG]);
    assert_eq!(notes.get("/notes").status, 200);
    assert!(wait_until(soon(), || notes.workers() == 8), "{} workers have begun", notes.workers());

    let lock = corner.lock();
    let hanging = notes.in_background("POST", "Content-Length: 4\r\n", "last");
    assert!(wait_until(soon(), || corner.hanging() == 1));
    notes.signal(Signal::TERM);
    // All others leave, and this one stays.
    assert!(wait_until(soon(), || notes.workers() == 1), "{} workers are left", notes.workers());
    thread::sleep(ms(200));
    assert_eq!(notes.workers(), 1);
    drop(lock);

    assert_eq!(hanging.join().unwrap().status, 201);
    let (status, words) = notes.end();
    assert!(status.success() && words.contains("nothing is left"), "{status}: {words}");
    assert_eq!((corner.left(), corner.notes()), (0, 1));
}

#[test]
fn sigterm_while_a_request_hangs_for_ever() {
    let corner = Corner::new("examples_hanging");
    let notes = Notes::start(&[("DATABASE_URL", &corner.address()), LONG]);
    let lock = corner.lock();
    let hanging = notes.in_background("GET", "", "");
    assert!(wait_until(soon(), || corner.hanging() == 1));

    let begun = Instant::now();
    notes.signal(Signal::TERM);
    let (status, words) = notes.end();
    assert!(begun.elapsed() < GRACE, "it took {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(1), "{words}");
    assert!(words.contains("workers still run") && words.contains("examples/server/main.rs:"), "{words}");
    // The query was cancelled. Whether the program is there long enough to say so is a matter of milliseconds.
    assert!(!hanging.join().is_ok_and(|answer| answer.status == 200), "it cannot have been served");
    drop(lock);
    assert_eq!(corner.left(), 0);
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let (corner, other) = (Corner::new("examples_first"), Corner::new("examples_second"));
    let notes = Notes::start(&[("DATABASE_URL", &corner.address())]);
    let port = notes.addr.port().to_string();
    let second =
        example("server").arg(&port).env("DATABASE_URL", other.address()).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && error.contains("Address already in use"), "{}: {error}", second.status);
    assert_eq!((other.left(), corner.connections()), (0, 1));

    // What is there but cannot be read does not count as nothing.
    let odd = std::ffi::OsString::from_vec(b"host=\xff".to_vec());
    let second = example("server").env("DATABASE_URL", odd).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && error.contains("not UTF-8"), "{}: {error}", second.status);

    // A database that is away is not waited for as long as the pool would: no signal is heard meanwhile.
    let begun = Instant::now();
    let nobody = "postgres://nobody@127.0.0.1:1/nothing";
    let second = example("server").env("DATABASE_URL", nobody).stderr(Stdio::piped()).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && error.contains("refused"), "{}: {error}", second.status);
    assert!(begun.elapsed() < SOON, "it took {:?}", begun.elapsed());
}

/// Everything that stems from `pid`, itself included.
fn family(pid: u32) -> Vec<Pid> {
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    let processes = fs::read_dir("/proc").expect("processes, on Linux").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let children = pids.filter(|&child| parent(child) == Some(pid)).flat_map(family);
    Pid::from_raw(pid as i32).into_iter().chain(children).collect()
}

#[test]
fn a_private_database_goes_with_the_server() {
    let notes = Notes::start(&[]);
    assert_eq!(notes.post("for nobody else").body, "1");
    let family = family(notes.child.id());
    // Itself, the shell that keeps the server, the postmaster and its children.
    assert!(family.len() > 4, "{family:?}");
    // As Ctrl-C does.
    notes.signal(Signal::INT);
    let (status, words) = notes.end();
    assert!(status.success() && words.contains("nothing is left"), "{status}: {words}");
    let gone = |pid: &Pid| test_kill_process(*pid).is_err();
    assert!(wait_until(soon(), || family.iter().all(gone)), "left of {family:?}");
}

/// As long as nothing is older than a minute, all that has happened is of the last one.
#[test]
fn the_last_minute_begins_with_the_server() {
    let notes = Notes::start(&[("WEATHER", "burst")]);
    let mut status = serde_json::Value::Null;
    let is_over = wait_until(soon(), || {
        status = serde_json::from_str(&notes.get("/status").body).expect("JSON");
        status["weather"] == serde_json::json!([]) && status["minute"]["served"] == 17
    });
    assert!(is_over, "{status}");
    // What the pool has opened since it was built, the first for the schema.
    let stats = notes.get("/pool").body;
    let opened = stats.lines().find_map(|line| line.trim().strip_prefix("opened ")?.trim().split(';').next());
    assert_eq!(Some(status["minute"]["opens"].to_string().as_str()), opened, "{status}\n{stats}");
    assert!(status["minute"]["checkouts"].as_u64() >= Some(17 + 1), "{status}");
    notes.signal(Signal::TERM);
    assert!(notes.end().0.success());
}

/// Whatever of a burst has begun is served; nobody waits for the others of it.
#[test]
fn sigterm_in_the_middle_of_a_burst() {
    let notes = Notes::start(&[("WEATHER", "burst,burst")]);
    notes.signal(Signal::TERM);
    let (status, words) = notes.end();
    assert!(status.success(), "{status}: {words}");
}

/// However far it is: not even the system's kill can prevent this.
#[test]
fn a_private_database_that_is_being_made_goes_too() {
    for program in ["initdb", "postgres"] {
        let mut child = example("server").env("PORT", "0").spawn().expect("the server");
        let words = |pid: &Pid| {
            let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            String::from_utf8_lossy(&line).split('\0').map(str::to_owned).collect::<Vec<_>>()
        };
        let (mut making, mut folder) = (Vec::new(), None);
        // (`initdb` runs a `postgres` as well, without a socket.)
        let is_it = |words: Vec<String>| {
            words[0].ends_with(program) && (program == "initdb" || words.iter().any(|word| word == "-k"))
        };
        let began = wait_until(soon(), || {
            making = family(child.id());
            folder = making.iter().flat_map(words).find(|word| word.starts_with("/tmp/notes-"));
            folder.is_some() && making.iter().any(|pid| is_it(words(pid)))
        });
        child.kill().and_then(|()| child.wait()).expect("a child");
        assert!(began, "{making:?}");
        let folder = folder.expect("a folder");
        let gone = |pid: &Pid| test_kill_process(*pid).is_err();
        if !wait_until(soon(), || making.iter().all(gone)) {
            let left: Vec<_> = making.iter().filter(|pid| !gone(pid)).collect();
            for &&pid in &left {
                let _ = kill_process(pid, Signal::KILL);
            }
            panic!("{program}: {left:?} were left of {making:?}");
        }
        assert!(wait_until(soon(), || !fs::exists(&folder).unwrap()), "{program}: {folder} is left");
    }
}
