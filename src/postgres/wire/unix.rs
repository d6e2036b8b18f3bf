//! Unix sockets: how a connection over one comes to the connector, and how its query is cancelled.
//!
//! `postgres` calls the connector for TCP alone. So the observer lets it connect to a [`StandIn`], a loopback listener
//! of this process. The connector closes that connection unused, connects to the unix socket itself, and returns that
//! stream. Nothing is ever sent to the listener or read from it. It lives for the microseconds between `bind` and
//! `connect`; whoever else connects to it meanwhile gets a reset.

use super::negotiation::NegotiationError;
use super::scanner::Key;
use super::watch::{Watch, Watched};
use std::future::{Future, poll_fn};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How long the connect to a stand-in may take. It takes microseconds, unless something filters the loopback interface.
pub(super) const STAND_IN_LIMIT: Duration = Duration::from_secs(1);

/// What stands in for a unix socket as the host that `postgres` connects to.
#[derive(Debug)]
pub(super) struct StandIn {
    listener: TcpListener,
    /// The unix socket.
    path: PathBuf,
    reached: Arc<AtomicBool>,
}

impl StandIn {
    /// # Errors
    ///
    /// If there is no loopback interface, or this process may not use it.
    pub(super) fn new(path: PathBuf) -> io::Result<StandIn> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        Ok(StandIn { listener, path, reached: Arc::default() })
    }

    pub(super) fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Turns true when `postgres` has connected to the stand-in.
    pub(super) fn reached(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.reached)
    }

    /// To be called when `postgres` has connected.
    pub(super) fn on_reached(&self) {
        self.reached.store(true, Ordering::Relaxed);
    }

    /// Connects to the unix socket. The listener is closed before: then both ends of the loopback connection are gone
    /// at once, without a `TIME_WAIT`.
    pub(super) async fn connect(self) -> Result<UnixStream, NegotiationError> {
        let StandIn { listener, path, .. } = self;
        drop(listener);
        UnixStream::connect(&path).await.map_err(|error| NegotiationError::Socket { path, error })
    }
}

/// Whether the process or the system has too little of something for a connection, whichever way it goes.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    error.kind() == io::ErrorKind::OutOfMemory || matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// The unix socket of a server, in the folder that is its host.
pub(super) fn socket_in(folder: &Path, port: u16) -> PathBuf {
    folder.join(format!(".s.PGSQL.{port}"))
}

/// Asks the server at `path` to cancel what the connection with this key is doing. `watch` can abort this call. Returns
/// when the server has hung up, which means that it has taken the request.
pub(super) fn cancel(path: &Path, key: Key, watch: &Arc<Watch>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let watched = Watched::begin(Arc::clone(watch));
    let mut request = pin!(async {
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(&key.cancel_request()).await?;
        let mut ignored = [0; 64];
        // The server hangs up in good order or by a reset.
        while stream.read(&mut ignored).await.is_ok_and(|n| n > 0) {}
        Ok(())
    });
    runtime.block_on(poll_fn(|cx| match watched.wake_on_abort(cx) {
        Err(aborted) => Poll::Ready(Err(aborted)),
        Ok(()) => request.as_mut().poll(cx),
    }))
}
