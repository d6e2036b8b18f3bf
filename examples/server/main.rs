//! A server of notes: one thread per worker, one PostgreSQL table, and one pool between them. And a page that shows the
//! pool at work. Other threads answer what needs no connection, so that slow statements silence neither page nor probe.
//!
//! ```sh
//! bash .ci/setup && cargo run --example server      # then open http://127.0.0.1:8080/
//! ```
//!
//! It makes a database of its own, which goes when it ends; `DATABASE_URL` names another. In a second terminal:
//!
//! ```sh
//! curl -i -d 'Grease the wheel' localhost:8080/notes   # 201, and the number of the note
//! curl localhost:8080/notes/1
//! curl localhost:8080/notes                            # the newest first
//! curl localhost:8080/pool                             # what the pool is doing, and what is in use
//! curl -i localhost:8080/ready                         # for a probe: 503 takes the traffic away (/live does not)
//! curl -X POST localhost:8080/weather/burst            # what the page's buttons do
//! ```
//!
//! A request that gets no connection is told why: 503 with `Retry-After` if all are in use, 503 if the database cannot be
//! reached, 500 if it refuses (a wrong password, say), for then it does not help to come again. And 503 as well if as many
//! requests wait as are served, or if its statement takes too long.
//!
//! Ctrl-C and SIGTERM end it: what it has begun is served, then the pool closes and says what came of it.
//!
//! With `--features prometheus-client`, `/metrics` is for Prometheus.
//!
//! `PORT` (or the first argument), `WORKERS`, `POOL_SIZE` and `STATEMENT_TIMEOUT` (in seconds) change the defaults below,
//! and `WEATHER` what it begins with (`WEATHER=burst,trickle`; empty: nothing).
//!
//! The folder can be copied. Beside `millpond` it needs `env_logger`, `httparse`, `log`, `postgres`, `rustix` (with its
//! feature `process`), `serde_json` and `signal-hook`.
//!
//! HTTP is read with `httparse`, in a file of this example, because none of the synchronous servers will do: `oxhttp`
//! (0.3.3) cannot be ended, `touche` (0.0.15) allocates whatever length a client claims for a chunk, and `rouille` and
//! `tiny_http` (0.12) have open advisories, and stop to listen when one client leaves too early. It listens on the loopback
//! interface only: there is no TLS and no login, and the page can stop the private database.

// A package that this folder is copied to need not have the feature.
#![allow(unexpected_cfgs)]

mod database;
mod history;
mod http;
mod weather;

use database::Private;
use history::History;
use http::{Listener, Reply, Request};
use log::{error, info};
use millpond::postgres::PostgresManager;
use millpond::{Cause, CustomizeConnection, Workers};
use postgres::NoTls;
use postgres::error::SqlState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::env::{self, VarError};
use std::error::Error;
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use weather::{Kind, Refusal, Weather};

type Db = millpond::postgres::Pool;
type Client = millpond::postgres::PooledConnection;
type Failure = Box<dyn Error + Send + Sync>;

/// How long a request waits for a connection before it is told to come again.
const PATIENCE: Duration = Duration::from_secs(1);

/// The threads that read requests, and answer those that need no connection.
const FRONTS: usize = 4;

/// The longest note, in bytes.
const MAX_BODY: usize = 16 * 1024;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS notes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    body text NOT NULL
)";

/// The page, which loads nothing: the browser is told to hold it to that.
const PAGE: &str = include_str!("page.html");
const PAGE_MAY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; \
                        connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                        require-trusted-types-for 'script'; trusted-types 'none'";

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    match run() {
        Ok(code) => code,
        Err(e) => {
            // `Cause` has the error's sources as well: that of PostgreSQL calls itself "db error".
            eprintln!("error: {}", Cause::text(&*e));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Failure> {
    // Before anything is begun: a signal from now on waits until it is asked for, below.
    let mut signals = Signals::new([SIGTERM, SIGINT])?;

    // Declared before the pool, and so dropped after it.
    let (private, address) = match variable("DATABASE_URL")? {
        Some(address) => (None, address),
        None => {
            let private = Private::start()?;
            let address = private.url();
            println!("database at {address}");
            (Some(Arc::new(private)), address)
        }
    };

    let mut manager = PostgresManager::parse(&address, NoTls)?;
    if let Some(private) = &private {
        // It changes: see the weather. (A service would ask its store of secrets.)
        manager = manager.password_with(private.secrets());
    }
    let pool: Db = manager
        .builder()
        .name("notes")
        .max_size(number("POOL_SIZE", 20)?)
        .max_idle(Duration::from_secs(10)) // short, for those who watch
        .leak_threshold(Duration::from_secs(5))
        // A signal that comes while a database is waited for that is not there is answered after this.
        .connection_timeout(Duration::from_secs(5))
        .connection_customizer(Box::new(Bounded { seconds: number("STATEMENT_TIMEOUT", 5)? }))
        .open()?;
    // From here on the pool is closed however `run` ends: by its last line, a `?` or a panic.
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;

    let port: u16 = match env::args().nth(1) {
        Some(port) => port.parse().map_err(|e| format!("port {port}: {e}"))?,
        None => number("PORT", 8080)?,
    };
    let listener = Listener::bind(port).map_err(|e| format!("cannot listen on port {port}: {e}"))?;
    let addr = listener.addr()?;

    let weather = Weather::new(pool.clone(), private.clone());
    let (history, watchers) = History::start(pool.clone(), weather.clone())?;
    let app = Arc::new(App { listener, pool, weather: weather.clone(), history });
    // As many requests wait as are served. More would only wait in vain.
    let most: usize = number("WORKERS", 8)?;
    let (queue, requests) = sync_channel(most);
    let requests = Arc::new(Mutex::new(requests));
    let mut threads = Vec::new();
    for i in 0..FRONTS {
        let (app, queue) = (Arc::clone(&app), queue.clone());
        threads.push(thread::Builder::new().name(format!("front-{i}")).spawn(move || app.receive(&queue))?);
    }
    // Only the fronts have it now: a worker learns of the end by a request that does not come.
    drop(queue);
    for i in 0..most {
        let (app, requests) = (Arc::clone(&app), Arc::clone(&requests));
        threads.push(thread::Builder::new().name(format!("worker-{i}")).spawn(move || app.work(&requests))?);
    }

    // The guard has all finish that use the pool, before it closes it.
    let guard =
        guard.owning_with((threads, watchers, weather.clone()), move |(threads, watchers, weather), deadline| {
            app.listener.stop(FRONTS);
            app.history.stop();
            weather.stop();
            // Each of them, whether or not the one before has finished.
            let finished = [threads.finish(deadline), watchers.finish(deadline), weather.finish(deadline)];
            finished == [true; 3]
        });

    println!("listening on http://{addr}");
    let default = if private.is_some() { "burst,trickle" } else { "" };
    let begin = variable("WEATHER")?.unwrap_or_else(|| default.to_owned());
    for name in begin.split(',').filter(|name| !name.is_empty()) {
        let kind = Kind::named(name).ok_or_else(|| format!("WEATHER={begin}: there is no {name}"))?;
        weather.make(kind).map_err(|e| format!("WEATHER={begin}: {e}"))?;
    }
    if let Some(signal) = signals.forever().next() {
        info!("signal {signal}: finishing");
    }
    let report = guard.close();
    println!("{report}");
    Ok(if report.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The environment's value for `name`.
fn number<T: std::str::FromStr<Err: Error>>(name: &str, default: T) -> Result<T, Failure> {
    match variable(name)? {
        Some(value) => value.parse().map_err(|e| format!("{name}={value}: {e}").into()),
        None => Ok(default),
    }
}

fn variable(name: &str) -> Result<Option<String>, Failure> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => Err(format!("{name} is not UTF-8").into()),
    }
}

/// Bounds every statement: a worker that waits for the server for ever would serve nobody else.
#[derive(Debug)]
struct Bounded {
    seconds: u32,
}

impl CustomizeConnection<millpond::postgres::Connection, millpond::postgres::Error> for Bounded {
    fn on_acquire(&self, client: &mut millpond::postgres::Connection) -> Result<(), millpond::postgres::Error> {
        Ok(client.batch_execute(&format!("SET statement_timeout = '{}s'", self.seconds))?)
    }
}

/// What all workers share.
struct App {
    listener: Listener,
    pool: Db,
    weather: Weather,
    history: History,
}

impl App {
    /// Reads requests, and answers those that need no connection. The others are the workers'.
    fn receive(&self, queue: &SyncSender<Request>) {
        while let Some(request) = self.listener.next() {
            let needs_connection = request.path.trim_matches('/').split('/').next() == Some("notes");
            if !needs_connection {
                self.serve(request);
            } else if let Err(TrySendError::Full(request) | TrySendError::Disconnected(request)) =
                queue.try_send(request)
            {
                self.finish(request, busy(), Instant::now());
            }
        }
    }

    /// Answers the requests that need a connection.
    fn work(&self, requests: &Mutex<Receiver<Request>>) {
        loop {
            // One worker waits for the request, and the others for their turn to wait.
            let request = requests.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(request) = request else { return };
            self.serve(request);
        }
    }

    /// Answers one request. Never panics, and returns its connection before it writes: a slow client keeps none in use.
    fn serve(&self, mut request: Request) {
        let begun = Instant::now();
        // A panic costs this request, and the connection it had; the worker and the pool go on.
        let answer =
            catch_unwind(AssertUnwindSafe(|| self.answer(&mut request))).unwrap_or_else(|_| Err("panicked".into()));
        let reply = answer.unwrap_or_else(|e| {
            error!("{} {}: {}", request.method, request.path, Cause::text(&*e));
            sorry(&*e)
        });
        self.finish(request, reply, begun);
    }

    fn finish(&self, request: Request, reply: Reply, begun: Instant) {
        let (method, path, status) = (&request.method, &request.path, reply.status);
        // A page that asks twice a second would fill the log.
        let level = if path == "/status" { log::Level::Debug } else { log::Level::Info };
        log::log!(level, "{method} {path}: {status} in {:.1?}", begun.elapsed());
        if let Err(e) = request.respond(reply) {
            info!("the client has gone: {e}");
        }
    }

    fn answer(&self, request: &mut Request) -> Result<Reply, Failure> {
        if let Some(refusal) = stranger(request) {
            return Ok(refusal);
        }
        let path = request.path.clone();
        let path: Vec<&str> = path.trim_matches('/').split('/').collect();
        // The answer to HEAD is that to GET, whose body is not sent.
        let method = if request.method == "HEAD" { "GET" } else { request.method.as_str() };
        match (method, path.as_slice()) {
            ("POST", ["notes"]) => self.create(request),
            ("GET", ["notes"]) => self.list(),
            ("GET", ["notes", id]) => self.read(id),
            ("GET", ["pool"]) => Ok(Reply::text(200, &format!("{}\n{}", self.pool.stats(), self.pool.connections()))),
            // A full pool is no reason to take the traffic away: the others are as full.
            ("GET", ["ready"]) => {
                let health = self.pool.health();
                Ok(Reply::text(if health.serves() { 200 } else { 503 }, &health.to_string()))
            }
            // Whatever the database does: to start this program anew repairs no other.
            ("GET", ["live"]) => Ok(Reply::text(200, "alive")),
            ("GET", [""]) => {
                Ok(Reply::new(200, "text/html; charset=utf-8", PAGE).with("Content-Security-Policy", PAGE_MAY))
            }
            ("GET", ["status"]) => {
                let after = request.query.strip_prefix("after=").and_then(|n| n.parse().ok()).unwrap_or(0);
                Ok(Reply::new(200, "application/json", self.history.status(after)))
            }
            #[cfg(feature = "prometheus-client")]
            ("GET", ["metrics"]) => self.metrics(),
            ("POST", ["weather", kind]) => Ok(self.make(kind)),
            (_, ["notes"]) => Ok(Reply::text(405, "GET or POST").with("Allow", "GET, HEAD, POST")),
            (_, [""] | ["notes", _] | ["pool" | "ready" | "live" | "status"]) => {
                Ok(Reply::text(405, "GET").with("Allow", "GET, HEAD"))
            }
            #[cfg(feature = "prometheus-client")]
            (_, ["metrics"]) => Ok(Reply::text(405, "GET").with("Allow", "GET, HEAD")),
            (_, ["weather", _]) => Ok(Reply::text(405, "POST").with("Allow", "POST")),
            _ => Ok(Reply::text(404, "no such page")),
        }
    }

    /// What the pool's stats say, for Prometheus.
    #[cfg(feature = "prometheus-client")]
    fn metrics(&self) -> Result<Reply, Failure> {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(millpond::metrics::Pools::of(&self.pool)));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(Reply::new(200, "application/openmetrics-text; version=1.0.0; charset=utf-8", text))
    }

    fn make(&self, kind: &str) -> Reply {
        let Some(kind) = Kind::named(kind) else { return Reply::text(404, "no such weather") };
        match self.weather.make(kind) {
            Ok(()) => Reply::text(202, kind.as_str()),
            Err(why) => {
                let status = if why == Refusal::TooMuch { 429 } else { 409 };
                Reply::text(status, &why.to_string())
            }
        }
    }

    fn create(&self, request: &mut Request) -> Result<Reply, Failure> {
        // Read to its end before the checkout: a slow client keeps no connection in use.
        let body = match request.body(MAX_BODY) {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(Reply::text(413, "too large")),
            // The client's fault, and none of this server's.
            Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {
                return Ok(Reply::text(408, "the note takes too long"));
            }
            Err(_) => return Ok(Reply::text(400, "the note breaks off")),
        };
        match String::from_utf8(body) {
            // PostgreSQL's text has no NUL in it.
            Ok(body) if !body.is_empty() && !body.contains('\0') => {
                let mut client = self.pool.get_timeout(PATIENCE)?;
                let row = client.query_one_cached("INSERT INTO notes (body) VALUES ($1) RETURNING id", &[&body])?;
                let id: i64 = row.get(0);
                Ok(Reply::text(201, &id.to_string()).with("Location", &format!("/notes/{id}")))
            }
            _ => Ok(Reply::text(400, "a note is some text in UTF-8")),
        }
    }

    fn read(&self, id: &str) -> Result<Reply, Failure> {
        let Ok(id) = id.parse::<i64>() else { return Ok(Reply::text(404, "no such note")) };
        let mut client = self.pool.get_timeout(PATIENCE)?;
        Ok(match client.query_opt_cached("SELECT body FROM notes WHERE id = $1", &[&id])? {
            Some(row) => Reply::text(200, row.get(0)),
            None => Reply::text(404, "no such note"),
        })
    }

    fn list(&self) -> Result<Reply, Failure> {
        let mut client = self.pool.get_timeout(PATIENCE)?;
        let rows = client.query_cached("SELECT id, body FROM notes ORDER BY id DESC LIMIT 20", &[])?;
        let line = |row: &postgres::Row| {
            let (id, body): (i64, &str) = (row.get(0), row.get(1));
            format!("{id}: {}\n", body.lines().next().unwrap_or_default())
        };
        Ok(Reply::text(200, rows.iter().map(line).collect::<String>().trim_end()))
    }
}

/// The refusal of what another site's page asks for, even under a name that it has lead to this machine. A program that
/// is no browser may leave out both headers.
fn stranger(request: &Request) -> Option<Reply> {
    let host = request.header("Host");
    let here = host.is_none_or(|host| {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        ["127.0.0.1", "localhost"].contains(&name)
    });
    if !here {
        return Some(Reply::text(403, "this is 127.0.0.1, or localhost"));
    }
    let reads = ["GET", "HEAD"].contains(&request.method.as_str());
    let ours =
        request.header("Origin").is_none_or(|origin| host.is_some_and(|host| origin == format!("http://{host}")));
    (!reads && !ours).then(|| Reply::text(403, "from this page only"))
}

fn busy() -> Reply {
    Reply::text(503, "too busy, come again").with("Retry-After", "1")
}

/// What a client is told of a failure. The words of the database are for the log.
fn sorry(error: &(dyn Error + 'static)) -> Reply {
    let code = error.downcast_ref::<postgres::Error>().and_then(postgres::Error::code);
    if code == Some(&SqlState::QUERY_CANCELED) {
        return Reply::text(503, "the database takes too long");
    }
    match error.downcast_ref::<millpond::Error>() {
        Some(e) if e.is_exhausted() => busy(),
        Some(e) if e.is_unavailable() => Reply::text(503, "the database cannot be reached"),
        Some(e) if e.is_closed() => Reply::text(503, "this server is about to end"),
        Some(e) if e.is_connect() => Reply::text(500, "the database refuses this server"),
        _ => Reply::text(500, "something went wrong here"),
    }
}
