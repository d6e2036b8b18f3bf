//! The observer against servers that lie ([`guards`]) or fall silent ([`switch`]), and against PostgreSQL, compared
//! with the plain crate ([`real`], and [`sockets`] over unix sockets).

mod fake;
mod fuzz;
mod guards;
mod real;
#[cfg(unix)]
mod sockets;
#[path = "../../../../tests/support/mod.rs"]
mod support;
mod switch;
#[path = "../../../../tests/support/tls.rs"]
mod tls;

use super::*;
use ::postgres::config::Config;
use ::postgres::error::SqlState;
use ::postgres::tls::{MakeTlsConnect, TlsConnect};
use ::postgres::{Client, NoTls, Socket};
use parking_lot::Mutex;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// The text of an error and of all its sources.
fn chain(error: &(dyn StdError + 'static)) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn config(text: &str) -> Config {
    text.parse().unwrap_or_else(|error| panic!("{text}: {}", chain(&error)))
}

fn observer<T: Connector>(text: &str, tls: T) -> Observer<T> {
    Observer::new(&config(text), tls, &Arc::default()).expect("no unix socket with an address")
}

impl ConnectError {
    /// The error of `postgres`, which it must be.
    fn of_postgres(self) -> ::postgres::Error {
        match self {
            ConnectError::Postgres(error) => error,
            other => panic!("{other}"),
        }
    }
}

/// Opens a connection, which must succeed.
fn connected<T: Connector>(text: &str, tls: T) -> (Client, Arc<Watch>) {
    let watch = Watch::new();
    match observer(text, tls).connect(&watch) {
        Ok(client) => (client, watch),
        Err(error) => panic!("{text}: {}", chain(&error.of_postgres())),
    }
}

/// Tries to open a connection, which must fail.
fn refused<T: Connector>(text: &str, tls: T) -> ::postgres::Error {
    match observer(text, tls).connect(&Watch::new()) {
        Ok(_) => panic!("{text}: connected"),
        Err(error) => error.of_postgres(),
    }
}
