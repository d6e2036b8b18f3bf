//! An async server: its handlers use the pool on threads that may block, and end with the pool in the right order.
//!
//! ```sh
//! DATABASE_URL=postgres://user@host/database cargo run --example async_server
//! curl -d 'Grease the wheel' localhost:3000/notes      # in a second terminal: the number of the note
//! curl localhost:3000/notes/1
//! curl localhost:3000/ready                            # for a balancer
//! ```
//!
//! `pool.get()` blocks its thread, which a task of the runtime must not do: so `spawn_blocking`. A connection stays within
//! that closure. One that were kept across an `.await` would be in use for as long as a slow client likes.
//!
//! Ctrl-C and SIGTERM end it: what has begun is answered, then the threads of the runtime end, then the pool closes.
//! `PORT` changes the port.

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use millpond::postgres::{Connection, Pool, PostgresManager, ServerGuards};
use postgres::NoTls;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

type Failure = Box<dyn Error + Send + Sync>;

const SCHEMA: &str =
    "CREATE TABLE IF NOT EXISTS notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text NOT NULL)";

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
    // A request waits for a second. Beyond 64 that wait, one more is told so at once: each takes a thread.
    let pool = manager.builder().name("notes").max_size(4).max_waiting(64);
    let pool = pool.connection_timeout(Duration::from_secs(1)).open()?;
    let guard = pool.guard();
    pool.get()?.batch_execute(SCHEMA)?;
    let mut signals = Signals::new([SIGTERM, SIGINT])?;

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let port = env::var("PORT").map_or(Ok(3000), |port| port.parse())?;
    let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", port)))?;
    let address = listener.local_addr()?;
    let app = Router::new().route("/notes", post(create)).route("/notes/{id}", get(read));
    let app = app.route("/ready", get(ready)).with_state(pool);
    let (stop, stopped) = oneshot::channel::<()>();
    let until = async { drop(stopped.await) };
    let server = runtime.spawn(async { axum::serve(listener, app).with_graceful_shutdown(until).await });

    let guard = guard.owning_with(Some((runtime, server, stop)), |parts, deadline| {
        let Some((runtime, server, stop)) = parts.take() else { return true };
        drop(stop);
        let left = || deadline.saturating_duration_since(Instant::now());
        let answered = runtime.block_on(async { timeout(left(), server).await });
        // A task that is dropped leaves its closure running: this waits for the threads.
        runtime.shutdown_timeout(left());
        answered.is_ok() && Instant::now() < deadline
    });

    println!("listening on http://{address}");
    signals.forever().next();
    let report = guard.close();
    println!("{report}");
    if report.is_complete() { Ok(()) } else { Err("not all is finished".into()) }
}

/// Runs `work` with a connection, on a thread that may block.
async fn with<T: Send + 'static>(
    pool: Pool,
    work: impl FnOnce(&mut Connection) -> Result<T, postgres::Error> + Send + 'static,
) -> Result<T, Refusal> {
    let result = spawn_blocking(move || Ok::<T, Failure>(work(&mut *pool.get()?)?)).await;
    match result {
        Ok(result) => result.map_err(Refusal),
        Err(panicked) => Err(Refusal(panicked.into())),
    }
}

async fn create(State(pool): State<Pool>, body: String) -> Result<Response, Refusal> {
    let id: i64 = with(pool, move |client| {
        Ok(client.query_one_cached("INSERT INTO notes (body) VALUES ($1) RETURNING id", &[&body])?.get(0))
    })
    .await?;
    Ok((StatusCode::CREATED, format!("{id}\n")).into_response())
}

async fn read(State(pool): State<Pool>, Path(id): Path<i64>) -> Result<Response, Refusal> {
    let row = with(pool, move |client| client.query_opt_cached("SELECT body FROM notes WHERE id = $1", &[&id])).await?;
    Ok(match row {
        Some(row) => format!("{}\n", row.get::<_, &str>(0)).into_response(),
        None => (StatusCode::NOT_FOUND, "no such note\n").into_response(),
    })
}

/// For a balancer. "All in use" is no reason to send clients elsewhere; "the server is down" is.
async fn ready(State(pool): State<Pool>) -> (StatusCode, String) {
    let health = pool.health();
    let status = if health.serves() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{health}\n"))
}

/// What a client is told instead; the error's own words stay in the log.
struct Refusal(Failure);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        eprintln!("{}", millpond::Cause::text(&*self.0));
        match self.0.downcast_ref::<millpond::Error>() {
            Some(e) if e.is_exhausted() => {
                (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], "too busy, come again\n").into_response()
            }
            Some(e) if e.is_unavailable() => (StatusCode::SERVICE_UNAVAILABLE, "no database here\n").into_response(),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "something went wrong here\n").into_response(),
        }
    }
}
