//! What the statement cache saves: `cargo bench --bench statements [-- --quick]`.
//!
//! The same SQL text, with a parameter, again and again on one connection, by everything that a user may write. All are
//! compared with a statement prepared by hand on a bare client. Over TCP, once directly and once along a line on which each
//! answer is under way for a millisecond, and where the round trips are counted.

mod common;
#[path = "../tests/support/mod.rs"]
mod support;

use common::peers::PerThread;
use common::report::Part;
use common::{Load, Outcome, Subject, Usage, is_quick, median, ms, rounds, short, using};
use millpond::postgres::{PooledConnection, PostgresManager};
use parking_lot::Mutex;
use postgres::{Client, Config, NoTls, Row, Statement};
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use support::Server;

/// What is asked, and how it is called. More and more of it is planning.
const TEXTS: [(&str, &str); 3] = [
    ("Nothing to look up", "SELECT $1::bigint"),
    ("A row by its key", "SELECT name FROM item WHERE id = $1"),
    (
        "A join of four tables",
        "SELECT o.id, c.name, i.name, l.n FROM orders o JOIN customer c ON c.id = o.customer \
         JOIN line l ON l.orders = o.id JOIN item i ON i.id = l.item WHERE o.id = $1",
    ),
];

const TABLES: &str = "
    CREATE TABLE item (id bigint PRIMARY KEY, name text NOT NULL);
    CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL);
    CREATE TABLE orders (id bigint PRIMARY KEY, customer bigint NOT NULL REFERENCES customer);
    CREATE TABLE line (orders bigint REFERENCES orders, item bigint REFERENCES item, n int, PRIMARY KEY (orders, item));
    INSERT INTO item SELECT n, 'item ' || n FROM generate_series(1, 10000) n;
    INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, 1000) n;
    INSERT INTO orders SELECT n, 1 + n % 1000 FROM generate_series(1, 10000) n;
    INSERT INTO line SELECT n, 1 + (n + m) % 10000, m FROM generate_series(1, 10000) n, generate_series(1, 3) m;
    VACUUM ANALYZE";

/// What is looked for.
const KEY: i64 = 4711;
/// How long an answer is under way on a [`Line`].
const AWAY: Duration = ms(1);

fn main() {
    if !common::is_bench() {
        return;
    }
    let (near, far, time) = if is_quick() { (3, 3, ms(40)) } else { (15, 5, ms(100)) };
    let server = Server::start();
    let mut client = server.connect();
    // `VACUUM` cannot share its message with others.
    TABLES.split(';').for_each(|sql| client.batch_execute(sql).expect("the tables"));

    let mut part = Part::new("statements", "The same SQL again");
    part.say(&format!(
        "One thread, one connection in use all the time, TCP. Times per call and the ratios to a statement prepared by hand: \
         medians of {near} interleaved rounds of {} ms; {far} rounds where each answer is under way for {} ms more. \
         Round trips are counted per call.\n",
        time.as_millis(),
        AWAY.as_millis(),
    ));
    let config = server.config("statements");
    let to = server.addr();
    show(&mut part, TEXTS[0], |lines| subjects::<0>(&config, to, lines), [near, far], time);
    show(&mut part, TEXTS[1], |lines| subjects::<1>(&config, to, lines), [near, far], time);
    show(&mut part, TEXTS[2], |lines| subjects::<2>(&config, to, lines), [near, far], time);
    part.finish();
}

fn show(
    part: &mut Part,
    (title, sql): (&str, &str),
    subjects: impl Fn(Option<&mut Vec<Line>>) -> Vec<Box<dyn Subject>>,
    [near, far]: [usize; 2],
    time: Duration,
) {
    const CALLS: u64 = 20;
    let load = Load { threads: 1, usage: Usage::Use };
    let run = |subjects: &[Box<dyn Subject>], n| {
        subjects.iter().for_each(|subject| subject.fill(1));
        let list: Vec<&dyn Subject> = subjects.iter().map(|s| &**s).collect();
        rounds(&load, &list, n, time, false)
    };
    let direct = subjects(None);
    let mut lines = Vec::new();
    let distant = subjects(Some(&mut lines));
    let (direct_times, distant_times) = (run(&direct, near), run(&distant, far));
    let ratio = |mine: &[Outcome], by_hand: &[Outcome]| {
        let ratio = median(mine.iter().zip(by_hand).map(|(m, h)| m.cost() / h.cost()));
        format!("{ratio:.2}")
    };
    let row = |i: usize| {
        let before = lines[i].turns();
        distant[i].cycles(0, CALLS, Usage::Use);
        let turns = (lines[i].turns() - before) as f64 / CALLS as f64;
        let (here, there) = (&direct_times[i], &distant_times[i]);
        vec![
            distant[i].name().to_owned(),
            short(median(here.iter().map(Outcome::cost))),
            ratio(here, &direct_times[0]),
            short(median(there.iter().map(Outcome::cost))),
            ratio(there, &distant_times[0]),
            format!("{turns:.1}"),
        ]
    };
    let rows: Vec<_> = (0..distant.len()).map(row).collect();
    part.say(&format!("### {title}\n\n`{sql}`\n"));
    let away = format!("{} ms away", AWAY.as_millis());
    part.table(&["", "time", "to by hand", &away, "to by hand", "round trips"], &rows);
}

// -------------------------------------------------------------------------------------------------- the ways to ask

/// No pool, and nothing to look up: the least that can be done.
struct Prepared {
    client: Client,
    statement: Statement,
}

/// All ways to ask, the statement prepared by hand first, each directly or along a line of its own.
fn subjects<const TEXT: usize>(
    config: &Config,
    to: SocketAddr,
    mut lines: Option<&mut Vec<Line>>,
) -> Vec<Box<dyn Subject>> {
    let mut config = || match &mut lines {
        None => config.clone(),
        Some(lines) => {
            let line = Line::to(to);
            let conninfo = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", line.port);
            lines.push(line);
            conninfo.parse().expect("an address")
        }
    };
    let mut client = config().connect(NoTls).expect("the server");
    let statement = client.prepare(TEXTS[TEXT].1).expect("a statement");
    let by_hand = |p: &mut Prepared| check(p.client.query(&p.statement, &[&KEY]));
    let mut all = vec![using("prepared by hand, no pool", one(Prepared { client, statement }), by_hand)];
    let mut add = |name: &str, cache: Option<usize>, what: fn(&mut PooledConnection)| {
        let manager = PostgresManager::new(config(), NoTls);
        let manager = match cache {
            Some(statements) => manager.statement_cache(statements),
            None => manager,
        };
        let pool = manager.builder().max_size(1).open().expect("a pool");
        all.push(using(name, one(pool.get().expect("a connection")), what));
    };
    add("query_cached", None, |c| check(c.query_cached(TEXTS[TEXT].1, &[&KEY])));
    add("prepare_cached, then query", None, |c| {
        let statement = c.prepare_cached(TEXTS[TEXT].1).expect("a statement");
        check(c.query(&statement, &[&KEY]));
    });
    add("query_cached, cache off", Some(0), |c| check(c.query_cached(TEXTS[TEXT].1, &[&KEY])));
    add("query with the text", None, |c| check(c.query(TEXTS[TEXT].1, &[&KEY])));
    all
}

/// In use for the whole time.
fn one<C>(connection: C) -> PerThread<C> {
    PerThread(vec![Mutex::new(connection)])
}

fn check(rows: Result<Vec<Row>, postgres::Error>) {
    assert!(!black_box(rows.expect("an answer")).is_empty(), "nothing was found");
}

// -------------------------------------------------------------------------------------------------- the line

/// A way to the server for one connection, on which answers overtake nobody and take their time, each on its own: an
/// answer that comes while another is under way is not later for it.
struct Line {
    port: u16,
    turns: Arc<AtomicUsize>,
}

impl Line {
    /// Its threads end with the connection.
    fn to(server: SocketAddr) -> Line {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        thread::spawn(move || {
            let (client, _) = listener.accept().expect("the client");
            let server = TcpStream::connect(server).expect("the server");
            for socket in [&client, &server] {
                socket.set_nodelay(true).expect("a socket");
            }
            let answered = AtomicBool::new(false);
            let (send, under_way) = mpsc::channel::<(Instant, Vec<u8>)>();
            thread::scope(|s| {
                s.spawn(|| {
                    let send = send;
                    carry(&server, |bytes| drop(send.send((Instant::now() + AWAY, bytes.to_vec()))));
                });
                s.spawn(|| {
                    for (due, bytes) in under_way {
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        answered.store(true, Ordering::SeqCst);
                        let _ = (&client).write_all(&bytes);
                    }
                });
                carry(&client, |bytes| {
                    if answered.swap(false, Ordering::SeqCst) {
                        counted.fetch_add(1, Ordering::SeqCst);
                    }
                    let _ = (&server).write_all(bytes);
                });
                let _ = server.shutdown(Shutdown::Both);
            });
        });
        Line { port, turns }
    }

    /// How often the client has sent something after an answer.
    fn turns(&self) -> usize {
        self.turns.load(Ordering::SeqCst)
    }
}

/// Until the other side hangs up.
fn carry(mut from: &TcpStream, mut to: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        to(&buffer[..n]);
    }
}
