//! [`Direct`]: PostgreSQL through a direct implementation of `Manage`, which knows what r2d2's traits cannot say: which
//! refusals are for good, how to stop a query from outside, and the backend's own number.

#![allow(dead_code, unreachable_pub, reason = "compiled into each test on its own, none of which uses all of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use millpond::{Cause, Manage, Opening, Returned};
use postgres::error::SqlState;
use postgres::{Client, Config, Error, NoTls};

pub struct Direct {
    config: Config,
    /// How often a connection was aborted, after it was cancelled.
    pub aborts: Arc<AtomicU32>,
}

impl Direct {
    pub fn new(config: Config) -> Direct {
        Direct { config, aborts: Arc::default() }
    }
}

impl Manage for Direct {
    /// With the backend's number.
    type Connection = (Client, u64);
    type Error = Error;

    fn open(&self, opening: &Opening) -> Result<(Client, u64), Error> {
        let mut client = self.config.connect(NoTls)?;
        let cancel = client.cancel_token();
        opening.on_cancel(move || drop(cancel.cancel_query(NoTls)));
        let aborts = Arc::clone(&self.aborts);
        opening.on_abort(move || {
            aborts.fetch_add(1, Ordering::SeqCst);
        });
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[])?.get(0);
        Ok((client, pid as u64))
    }

    fn validate(&self, c: &mut (Client, u64), limit: Duration) -> Result<(), Error> {
        c.0.is_valid(limit)
    }

    fn keeps_limits(&self) -> bool {
        true
    }

    fn returned(&self, c: &mut (Client, u64)) -> Returned {
        if c.0.is_closed() { Returned::Broken } else { Returned::Keep }
    }

    fn server_id(&self, c: &(Client, u64)) -> Option<u64> {
        Some(c.1)
    }

    fn explain(&self, e: &Error) -> Cause {
        let cause = Cause::text(e);
        match e.code() {
            Some(&SqlState::INVALID_PASSWORD | &SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => cause.permanent(),
            _ => cause,
        }
    }
}
