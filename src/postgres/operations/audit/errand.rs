//! A connection for one errand: to make an audit, or to end backends.

use crate::leaf::shield::catch;
use crate::leaf::text::Short;
use crate::postgres::error::Error;
use crate::postgres::operations::manager::{Pool, PostgresManager};
use crate::postgres::session::Connection;
use crate::postgres::wire::Connector;
use crate::{Manage, Opening};
use ::postgres::Client;
use ::postgres::error::SqlState;
use crossbeam_channel::{RecvTimeoutError, SendError, Sender, bounded};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Runs `ask` on a connection of its own, or on one of the pool's if the server has no room for one more. `ask` also
/// gets the backend's pid as the login gave it to the connection, if that is known.
#[track_caller]
pub(super) fn on_a_connection<T: Connector, R>(
    pool: &Pool<T>,
    ask: impl FnOnce(&mut Client, Option<i32>) -> Result<R, Error>,
) -> Result<R, Error> {
    let limit = pool.settings().open_timeout;
    let opening = Arc::new(Opening::new(pool.name().into(), limit));
    let _timer = Timer::start(Arc::clone(&opening), limit);
    match open_within(limit, pool.manager().clone(), &opening) {
        Ok(mut connection) => {
            let pid = connection.backend_pid().filter(|_| connection.is_observed());
            let answer = ask(&mut connection, pid);
            PostgresManager::<T>::close(pool.manager(), connection, limit);
            // Not the words of a connection that was aborted.
            answer.map_err(|e| if opening.is_aborted() { no_answer(limit) } else { e })
        }
        Err(e) if e.code() == Some(&SqlState::TOO_MANY_CONNECTIONS) => {
            let mut connection = pool.get().map_err(|other| Error::own(format!("{e}; and {other}"), false))?;
            let pid = connection.backend_pid().filter(|_| connection.is_observed());
            ask(&mut connection, pid)
        }
        Err(e) => Err(e),
    }
}

/// Opens a connection on a thread of its own: not all that an open does can be aborted, such as what gets the password.
fn open_within<T: Connector>(
    limit: Duration,
    manager: PostgresManager<T>,
    opening: &Arc<Opening>,
) -> Result<Connection, Error> {
    // (Without a place in between, a connection is either taken or comes back to who opened it.)
    let (done, opened) = bounded(0);
    let for_thread = Arc::clone(opening);
    let open = move || {
        let opening = for_thread;
        let result = catch(|| manager.open(&opening)).unwrap_or_else(|panic| Err(Error::own(panic.to_string(), false)));
        // Nobody waits for it any longer.
        if let Err(SendError(Ok(connection))) = done.send(result) {
            PostgresManager::<T>::close(&manager, connection, limit);
        }
    };
    if let Err(e) = thread::Builder::new().name("millpond-errand".into()).spawn(open) {
        return Err(Error::own(format!("cannot start a thread to connect on: {e}"), false));
    }
    opened.recv_timeout(limit).unwrap_or_else(|_| {
        abort(opening);
        Err(no_answer(limit))
    })
}

/// Has the thread that opens it end, as far as it can.
fn abort(opening: &Opening) {
    opening.abort_from_now_on();
    opening.abort();
}

fn no_answer(limit: Duration) -> Error {
    Error::timeout(format!("no answer to an attempt to connect within {}", Short(limit)))
}

/// Aborts a connection at its limit, unless the timer is dropped before.
struct Timer(Option<(Sender<()>, JoinHandle<()>)>);

impl Timer {
    fn start(opening: Arc<Opening>, limit: Duration) -> Timer {
        let (stop, stopped) = bounded::<()>(0);
        let thread = thread::Builder::new().name("millpond-audit".into()).spawn(move || {
            if stopped.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                abort(&opening);
            }
        });
        Timer(thread.ok().map(|thread| (stop, thread)))
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}
