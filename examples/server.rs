//! A server of notes: one thread per worker, one PostgreSQL table, and one pool between them.
//!
//! ```sh
//! bash .ci/setup && cargo run --example server
//! ```
//!
//! It makes a database of its own, which goes when it ends; `DATABASE_URL` names another. In a second terminal:
//!
//! ```sh
//! curl -i -d 'Grease the wheel' localhost:8080/notes   # 201, and the number of the note
//! curl localhost:8080/notes/1
//! curl localhost:8080/notes                            # the newest first
//! curl localhost:8080/pool                             # what the pool is doing, and what is in use
//!
//! # A session locks the table, four requests wait with all four connections in use, and a fifth is rejected:
//! psql "$ADDRESS" -c 'BEGIN; LOCK TABLE notes; SELECT pg_sleep(5)' &   # the address that the server printed
//! sleep 1; for i in 1 2 3 4; do curl -s localhost:8080/notes & done; sleep 1
//! curl -i localhost:8080/notes                         # 503, with Retry-After
//! ```
//!
//! Ctrl-C and SIGTERM end it: what it has begun is served, then the pool closes and says what came of it.
//!
//! `PORT` (or the first argument), `WORKERS` and `POOL_SIZE` change the defaults below. On a public address let it stand
//! behind a proxy: `tiny_http` itself has no limits, neither to the time nor to the size of a request.

#[path = "../tests/support/mod.rs"]
mod support; // the private database

use log::{error, info};
use millpond::{Cause, Pool, Workers};
use postgres::NoTls;
use r2d2_postgres::PostgresConnectionManager;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::error::Error;
use std::io::{Cursor, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, thread};
use tiny_http::{Header, Method, Request, Response, Server};

type Db = Pool<PostgresConnectionManager<NoTls>>;
type Reply = Response<Cursor<Vec<u8>>>;
type Failure = Box<dyn Error + Send + Sync>;

/// How long a request waits for a connection before it is told to come again.
const PATIENCE: Duration = Duration::from_secs(1);

/// The longest note, in bytes.
const MAX_BODY: usize = 16 * 1024;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS notes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body text NOT NULL
)";

fn main() -> Result<ExitCode, Failure> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();

    let address = env::var("DATABASE_URL").unwrap_or_else(|_| {
        let private = support::Server::shared().url();
        println!("database at {private}");
        private
    });
    let mut config: postgres::Config = address.parse()?;
    if config.get_application_name().is_none() {
        config.application_name("notes");
    }

    // Fewer connections than workers: not all of a request is work for the database.
    let pool: Db = Pool::builder()
        .name("notes")
        .max_size(number("POOL_SIZE", 4)?)
        .max_idle(Duration::from_secs(60))
        .leak_threshold(Duration::from_secs(30))
        .build(PostgresConnectionManager::new(config, NoTls))?;
    // From here on the pool is closed however `main` ends: by its last line, a `?` or a panic.
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;

    // Before a client can connect: a signal from now on waits until it is asked for, below.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;

    let port: u16 = match env::args().nth(1) {
        Some(port) => port.parse()?,
        None => number("PORT", 8080)?,
    };
    let http = Arc::new(Server::http(("127.0.0.1", port))?);
    let workers = (0..number("WORKERS", 8)?).map(|i| {
        let (http, pool) = (Arc::clone(&http), pool.clone());
        // Each worker learns of the end by an error, after the requests that came before it.
        let work = move || {
            while let Ok(request) = http.recv() {
                serve(request, &pool);
            }
        };
        thread::Builder::new().name(format!("worker-{i}")).spawn(work)
    });
    let workers: Vec<_> = workers.collect::<Result<_, _>>()?;

    // The guard finishes the workers before it closes the pool they use.
    let told = Arc::clone(&http);
    let guard = guard.owning_with(workers, move |workers, deadline| {
        workers.iter().for_each(|_| told.unblock());
        workers.finish(deadline)
    });

    println!("listening on http://{}", http.server_addr());
    if let Some(signal) = signals.forever().next() {
        info!("signal {signal}: finishing");
    }
    let report = guard.close();
    println!("{report}");
    Ok(if report.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The environment's value for `name`.
fn number<T: std::str::FromStr<Err: Error>>(name: &str, default: T) -> Result<T, Failure> {
    match env::var(name) {
        Ok(value) => value.parse().map_err(|e| format!("{name}={value}: {e}").into()),
        Err(_) => Ok(default),
    }
}

/// Answers one request. Never panics, and returns its connection before it writes: a slow client keeps none in use.
fn serve(mut request: Request, pool: &Db) {
    let begun = Instant::now();
    // A panic costs this request, and the connection it had; the worker and the pool go on.
    let answer =
        catch_unwind(AssertUnwindSafe(|| answer(&mut request, pool))).unwrap_or_else(|_| Err("panicked".into()));
    let reply = answer.unwrap_or_else(|e| {
        // `Cause` has the error's sources as well: that of PostgreSQL calls itself "db error".
        error!("{} {}: {}", request.method(), request.url(), Cause::text(&*e));
        match e.downcast_ref::<millpond::Error>() {
            Some(e) if e.is_exhausted() => text(503, "too busy, come again").with_header(header("Retry-After: 1")),
            _ => text(500, "something went wrong here"),
        }
    });
    info!("{} {}: {} in {:.1?}", request.method(), request.url(), reply.status_code().0, begun.elapsed());
    if let Err(e) = request.respond(reply) {
        info!("the client has gone: {e}");
    }
}

fn answer(request: &mut Request, pool: &Db) -> Result<Reply, Failure> {
    let path = request.url().split('?').next().unwrap_or_default().to_owned();
    let path: Vec<&str> = path.trim_matches('/').split('/').collect();
    match (request.method(), path.as_slice()) {
        (Method::Post, ["notes"]) => create(request, pool),
        (Method::Get, ["notes"]) => list(pool),
        (Method::Get, ["notes", id]) => read(id, pool),
        (Method::Get, ["pool"]) => Ok(text(200, &format!("{}\n{}", pool.stats(), pool.connections()))),
        (_, ["notes"]) => Ok(text(405, "GET or POST").with_header(header("Allow: GET, POST"))),
        (_, ["notes", _] | ["pool"]) => Ok(text(405, "GET").with_header(header("Allow: GET"))),
        _ => Ok(text(404, "no such page")),
    }
}

fn create(request: &mut Request, pool: &Db) -> Result<Reply, Failure> {
    // A client that says that its note is too large need not send it.
    if request.body_length().is_some_and(|length| length > MAX_BODY) {
        return Ok(text(413, "too large"));
    }
    // Read to its end before the checkout: a slow client keeps no connection in use.
    let mut body = Vec::new();
    request.as_reader().take(MAX_BODY as u64 + 1).read_to_end(&mut body)?;
    if body.len() > MAX_BODY {
        return Ok(text(413, "too large"));
    }
    match String::from_utf8(body) {
        // PostgreSQL's text has no NUL in it.
        Ok(body) if !body.is_empty() && !body.contains('\0') => {
            let mut client = pool.get_timeout(PATIENCE)?;
            let row = client.query_one("INSERT INTO notes (body) VALUES ($1) RETURNING id", &[&body])?;
            let id: i64 = row.get(0);
            Ok(text(201, &id.to_string()).with_header(header(&format!("Location: /notes/{id}"))))
        }
        _ => Ok(text(400, "a note is some text in UTF-8")),
    }
}

fn read(id: &str, pool: &Db) -> Result<Reply, Failure> {
    let Ok(id) = id.parse::<i64>() else { return Ok(text(404, "no such note")) };
    let row = pool.get_timeout(PATIENCE)?.query_opt("SELECT body FROM notes WHERE id = $1", &[&id])?;
    Ok(match row {
        Some(row) => text(200, row.get(0)),
        None => text(404, "no such note"),
    })
}

fn list(pool: &Db) -> Result<Reply, Failure> {
    let rows = pool.get_timeout(PATIENCE)?.query("SELECT id, body FROM notes ORDER BY id DESC LIMIT 20", &[])?;
    let line = |row: &postgres::Row| {
        let (id, body): (i64, &str) = (row.get(0), row.get(1));
        format!("{id}: {}\n", body.lines().next().unwrap_or_default())
    };
    Ok(text(200, rows.iter().map(line).collect::<String>().trim_end()))
}

fn text(status: u16, text: &str) -> Reply {
    Response::from_string(format!("{text}\n")).with_status_code(status)
}

fn header(line: &str) -> Header {
    line.parse().expect("a header")
}
