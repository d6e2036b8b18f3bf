//! A pool at work, and its metrics for Prometheus:
//! `cargo run --example metrics --features prometheus-client -- postgres://user@host/database`, or the address in
//! `DATABASE_URL`; a port may follow. Then `curl http://127.0.0.1:9187/metrics`. Ends when its input does: Ctrl-D.
//!
//! The server is a loop over sockets, so that nothing else has to be looked at here. In a program that serves HTTP already,
//! `/metrics` is one more page: what [`encode`] writes.

use millpond::{Health, metrics::Pools, postgres};
use prometheus_client::{encoding::text::encode, registry::Registry};
use std::io::{BufRead, BufReader, Read, Write, stdin};
use std::net::{TcpListener, TcpStream};
use std::{env, error::Error, thread, time::Duration};

fn main() {
    if let Err(e) = run() {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut given = env::args().skip(1);
    let address = given.next().or(env::var("DATABASE_URL").ok()).ok_or("which database?")?;
    let port = given.next().map_or(Ok(9187), |port| port.parse())?;

    let pool = postgres::builder(&address)?.name("orders").max_size(4).max_idle(Duration::from_millis(500));
    let pool = pool.connection_timeout(Duration::from_secs(5)).open()?;
    let _guard = pool.guard(); // closes the pool when this function returns or unwinds

    // These three lines are all that it takes. The registry keeps no pool open.
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Pools::of(&pool)));
    let page = move || encoded(&registry);

    // Six workers share four connections for a moment every second. In between the connections are idle for too long.
    for _ in 0..6 {
        let pool = pool.clone();
        thread::spawn(move || {
            while !matches!(pool.health(), Health::Closed) {
                if let Err(e) = pool.get().map(|mut client| client.simple_query("SELECT pg_sleep(0.02)")) {
                    eprintln!("{e}");
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
    }

    let listener = TcpListener::bind(("127.0.0.1", port))?;
    println!("listening on http://{}/metrics", listener.local_addr()?);
    thread::spawn(move || {
        for stream in listener.incoming() {
            // One at a time: Prometheus asks once in a while.
            if let Err(e) = stream.and_then(|stream| answer(stream, &page)) {
                eprintln!("{e}");
            }
        }
    });

    stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn encoded(registry: &Registry) -> String {
    let mut page = String::new();
    encode(&mut page, registry).expect("a string takes everything");
    page
}

fn answer(mut stream: TcpStream, page: impl Fn() -> String) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let head = BufReader::new(&stream).take(8192).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let asked = head.collect::<Vec<_>>();
    let (status, body) = match asked.first().and_then(|line| line.split(' ').nth(1)) {
        Some("/metrics") => ("200 OK", page()),
        _ => ("404 Not Found", String::new()),
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: {kind}\r\n")?;
    write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len())
}
