//! [`Observer`]: opens connections that are watched from outside the `postgres` crate, and can be aborted.
//!
//! The bytes show what `postgres::Client` does not: the transaction status, the backend's pid, whether a request is
//! unanswered, whether requests and answers still match. And the owner of the stream can end it: a [`Watch`] can
//! [`abort`](Watch::abort) a handshake, a login, a query or a drop that would otherwise wait for a silent server.
//!
//! # How
//!
//! The only way to the stream is the TLS connector. [`Observer`] wraps the user's connector. On a private copy of the
//! user's configuration it always asks for `sslmode=require sslnegotiation=direct`: then `postgres` sends no
//! `SSLRequest` of its own and gives the bare socket to the connector. The observer negotiates in its place, by the
//! *user's* sslmode ([`negotiate`]), and returns a [`Tap`]: the socket or the user's TLS stream, with a scanner beside
//! it. The test `postgres_hands_the_bare_socket_to_the_connector` fails if `postgres` ever stops working this way.
//!
//! # What must always hold
//!
//! * Clear text and TLS: what [`negotiation`](super::negotiation) promises.
//! * Channel binding is that of the TLS stream; a stream in clear text has none.
//! * `postgres` reserves as much memory as a message claims to be long, and keeps all that comes. So until the login is
//!   over [`Tap`] refuses a message that is too long, and too many messages, before it passes them on. So it does until
//!   a question of the pool's own is answered. (What a caller asks for may have any length.)
//! * The rewritten configuration does not leave this file.
//!
//! # Limits
//!
//! A unix socket does not pass through the connector. The name lookup and the TCP connect happen before it, so an abort
//! is seen only after them. The system's resolver bounds the lookup; `connect_timeout` bounds the connect, for each
//! address. `cancel_token().cancel_query(NoTls)` fails on an observed client; use [`Observer::cancel`].

use super::negotiation::{NegotiationError, Terms, negotiate};
use super::tap::{Tap, is_over, too_slow};
use super::watch::{Watch, Watched};
use ::postgres::config::{Host, SslMode, SslNegotiation};
use ::postgres::tls::{MakeTlsConnect, TlsConnect};
use ::postgres::{CancelToken, Client, Config, Socket};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use tokio::time::sleep;

/// What a TLS connector must be: any [`MakeTlsConnect`] that can be cloned and sent to other threads, which the usual
/// ones can. The bounds are those of `r2d2_postgres`; there is nothing to implement.
pub trait Connector:
    MakeTlsConnect<Socket, TlsConnect: TlsConnect<Socket, Future: Send> + Send, Stream: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<T> Connector for T
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
}

/// Opens connections that are watched.
#[derive(Clone)]
pub(in crate::postgres) struct Observer<T> {
    /// Rewritten, and therefore private: no other code may take its `sslmode` for the user's.
    config: Config,
    tls: T,
    terms: Terms,
}

impl<T: Connector> Observer<T> {
    /// `None` if the configuration names a unix socket, even as one host of several: it cannot be observed.
    pub(in crate::postgres) fn new(config: &Config, tls: T) -> Option<Observer<T>> {
        if !config.get_hosts().iter().all(|host| matches!(host, Host::Tcp(_))) {
            return None;
        }
        let terms = Terms {
            mode: config.get_ssl_mode(),
            negotiation: config.get_ssl_negotiation(),
            nameless: config.get_hosts().is_empty(),
            host_limit: match config.get_hosts().len().max(config.get_hostaddrs().len()) {
                0 | 1 => None,
                _ => config.get_connect_timeout().copied(),
            },
        };
        let mut config = config.clone();
        if terms.nameless {
            for address in config.get_hostaddrs().to_vec() {
                config.host(&address.to_string());
            }
        }
        config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        Some(Observer { config, tls, terms })
    }

    /// Opens a connection that `watch` sees and can abort, already while this call is under way. One watch serves one
    /// connection.
    ///
    /// # Errors
    ///
    /// As `Config::connect`; failures of the negotiation carry a [`NegotiationError`].
    pub(in crate::postgres) fn connect(&self, watch: &Arc<Watch>) -> Result<Client, ::postgres::Error> {
        self.config.connect(self.watched_by(watch))
    }

    /// Asks the server to cancel what the token's connection is doing, over a connection of its own. `watch` must be a
    /// new one, and can abort this call. Returns when the server has hung up, which means that it has taken the
    /// request.
    ///
    /// # Errors
    ///
    /// As `CancelToken::cancel_query`.
    pub(in crate::postgres) fn cancel(&self, token: &CancelToken, watch: &Arc<Watch>) -> Result<(), ::postgres::Error> {
        token.cancel_query(Observed { lingers: true, ..self.watched_by(watch) })
    }

    fn watched_by(&self, watch: &Arc<Watch>) -> Observed<T> {
        Observed { tls: self.tls.clone(), terms: self.terms, watch: watch.clone(), lingers: false }
    }
}

/// The user's connector, wrapped for one connection.
struct Observed<T> {
    tls: T,
    terms: Terms,
    watch: Arc<Watch>,
    /// See [`Tap`].
    lingers: bool,
}

impl<T: Connector> MakeTlsConnect<Socket> for Observed<T> {
    type Stream = Tap<T::Stream>;
    type TlsConnect = Negotiator<T::TlsConnect>;
    type Error = NegotiationError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, NegotiationError> {
        // The error is kept and counts only if the negotiation comes to TLS.
        let tls = if self.terms.nameless {
            Err(NegotiationError::NoHostName)
        } else {
            self.tls.make_tls_connect(host).map_err(|error| NegotiationError::Connector(error.into()))
        };
        Ok(Negotiator { tls, terms: self.terms, watch: self.watch.clone(), lingers: self.lingers })
    }
}

/// Turns one socket into a [`Tap`].
struct Negotiator<C> {
    tls: Result<C, NegotiationError>,
    terms: Terms,
    watch: Arc<Watch>,
    lingers: bool,
}

impl<C> TlsConnect<Socket> for Negotiator<C>
where
    C: TlsConnect<Socket, Future: Send, Stream: Send> + Send + 'static,
{
    type Stream = Tap<C::Stream>;
    type Error = NegotiationError;
    type Future = Pin<Box<dyn Future<Output = Result<Tap<C::Stream>, NegotiationError>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move {
            let watched = Watched::begin(self.watch);
            let mut login_timer = self.terms.host_limit.map(|limit| Box::pin(sleep(limit)));
            let mut negotiation = pin!(negotiate(socket, self.tls, self.terms));
            let transport = poll_fn(|cx| match watched.check(cx) {
                Err(_) => Poll::Ready(Err(NegotiationError::Aborted)),
                Ok(()) if is_over(&mut login_timer, cx) => Poll::Ready(Err(NegotiationError::Io(too_slow()))),
                Ok(()) => negotiation.as_mut().poll(cx),
            })
            .await?;
            Ok(Tap { transport, watched, login_timer, lingers: self.lingers })
        })
    }
}
