//! An accept loop with a thread for each client: every line that a client sends is kept, and answered with its number.
//!
//! ```sh
//! DATABASE_URL=postgres://user@host/database cargo run --example accept_loop
//! nc 127.0.0.1 7878      # in a second terminal: a line, Enter
//! ```
//!
//! Ctrl-C and SIGTERM end it: no client is accepted any more, the lines at work are answered, and then the pool closes.
//! `PORT` changes the port.

use millpond::Workers;
use millpond::postgres::{Pool, PostgresManager, ServerGuards};
use postgres::NoTls;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, io};

type Failure = Box<dyn Error + Send + Sync>;

const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS lines (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, line text NOT NULL)";
/// How many clients are served at a time: each takes a thread, whatever it does.
const MAX_CLIENTS: usize = 64;
/// The longest line, in bytes.
const MAX_LINE: u64 = 4096;
/// How long the start waits for the database.
const WAIT: Duration = Duration::from_secs(5);
/// How long a client may leave an answer unread.
const PATIENCE: Duration = Duration::from_secs(2);

static OVER: AtomicBool = AtomicBool::new(false);

/// The thread that serves a client, and the connection with it, which ends with the thread.
struct Client(Weak<TcpStream>, JoinHandle<()>);

fn main() -> ExitCode {
    let Err(e) = run() else { return ExitCode::SUCCESS };
    eprintln!("{}", millpond::Cause::text(&*e)); // with its sources: PostgreSQL's error alone is "db error"
    ExitCode::FAILURE
}

fn run() -> Result<(), Failure> {
    let address = env::var("DATABASE_URL").or(Err("which database? DATABASE_URL names none"))?;
    // A statement that still hangs when the program has ended is ended by the server, which looks this often.
    let check = Some(Duration::from_secs(2));
    let guards = ServerGuards { client_connection_check_interval: check, ..ServerGuards::default() };
    let manager = PostgresManager::parse(&address, NoTls)?.server_guards(guards);
    let pool = manager.builder().name("lines").max_size(4).connection_timeout(WAIT).open()?;
    // On return and on panic: all clients are told first, then the guard waits for their threads.
    let mut clients = pool.guard().owning_with(Vec::<Client>::new(), |clients, deadline| {
        OVER.store(true, SeqCst);
        // To a thread that reads its client has nothing more to say. One that works can still answer.
        clients.iter().filter_map(|client| client.0.upgrade()).for_each(|it| drop(it.shutdown(Shutdown::Read)));
        clients.iter_mut().filter_map(|client| (!client.1.finish(deadline)).then_some(())).count() == 0
    });
    pool.get()?.batch_execute(SCHEMA)?;

    let port = env::var("PORT").map_or(Ok(7878), |port| port.parse())?;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    let address = listener.local_addr()?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    thread::spawn(move || {
        signals.forever().next();
        OVER.store(true, SeqCst);
        let _ = TcpStream::connect(address); // `accept` waits for a client: here is one
    });

    println!("listening on {address}");
    for stream in listener.incoming() {
        if OVER.load(SeqCst) {
            break;
        }
        clients.retain(|client| !client.1.is_finished());
        match stream {
            Ok(stream) if clients.len() < MAX_CLIENTS => {
                let (stream, pool) = (Arc::new(stream), pool.clone());
                let weak = Arc::downgrade(&stream);
                let thread = thread::Builder::new().spawn(move || match serve(&stream, &pool) {
                    Ok(()) => {}
                    Err(e) => eprintln!("a client has gone: {e}"),
                });
                match thread {
                    Ok(thread) => clients.push(Client(weak, thread)),
                    Err(e) => eprintln!("no thread for a client: {e}"),
                }
            }
            Ok(mut stream) => drop(writeln!(stream, "too many clients, come again")),
            // A client that left before it was accepted ends no server. And if files are short, a pause helps.
            Err(e) => {
                eprintln!("cannot accept: {e}");
                thread::sleep(Duration::from_millis(50));
            }
        }
    }

    let report = clients.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("not all is finished".into()) }
}

fn serve(mut stream: &TcpStream, pool: &Pool) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut lines = BufReader::new(stream);
    let mut line = String::new();
    while !OVER.load(SeqCst) && lines.by_ref().take(MAX_LINE).read_line(&mut line)? > 0 {
        // A connection is in use for the time of one statement, not while a client thinks or an answer is sent.
        match keep(pool, line.trim_end()) {
            Ok(id) => writeln!(stream, "{id}")?,
            Err(e) => {
                eprintln!("a line is not kept: {}", millpond::Cause::text(&*e));
                writeln!(stream, "not kept, come again")?;
            }
        }
        line.clear();
    }
    Ok(())
}

fn keep(pool: &Pool, line: &str) -> Result<i64, Failure> {
    let mut client = pool.get_timeout(PATIENCE)?;
    Ok(client.query_one_cached("INSERT INTO lines (line) VALUES ($1) RETURNING id", &[&line])?.get(0))
}
