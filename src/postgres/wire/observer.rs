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
//! # Unix sockets
//!
//! `postgres` calls the connector for TCP alone. So a loopback listener of this process stands in for a unix socket
//! (see [`unix`](super::unix)), and the connector connects to the socket itself.
//!
//! Where a list of hosts has a unix socket in it, the observer goes through the list in the place of `postgres`: it
//! calls `connect` once for each host, and looks its name up before. So it knows for which host the connector is called.
//! It cannot take hosts off the copy of the configuration (nor make a new one: a notice callback cannot be copied). So
//! it gives all hosts that are there an address to which no TCP connection can be made, and appends the one it means.
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
//! The name lookup and the TCP connect happen before the connector is called, so an abort is seen only after them. The
//! system's resolver bounds the lookup; `connect_timeout` bounds the connect, for each address.
//! `cancel_token().cancel_query(NoTls)` fails on an observed client; use [`Observer::cancel`].
//!
//! A unix socket is not observed if its host has a `hostaddr` as well (`postgres` then connects by TCP), nor where this
//! process cannot connect to itself over the loopback interface.

#[cfg(unix)]
use super::negotiation::negotiate_unix;
use super::negotiation::{NegotiationError, Terms, negotiate};
use super::tap::{Tap, is_over, too_slow};
#[cfg(unix)]
use super::unix::{self, STAND_IN_LIMIT, StandIn, socket_in};
use super::watch::{Watch, Watched};
#[cfg(unix)]
use crate::leaf::sync::jitter;
#[cfg(unix)]
use ::postgres::config::LoadBalanceHosts;
use ::postgres::config::{Host, SslMode, SslNegotiation};
use ::postgres::tls::{MakeTlsConnect, TlsConnect};
use ::postgres::{CancelToken, Client, Config, Socket};
use parking_lot::Mutex;
#[cfg(unix)]
use std::error::Error as _;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
#[cfg(unix)]
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
#[cfg(unix)]
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};
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
    /// The hosts that the observer itself goes through, if there is a unix socket among them.
    #[cfg(unix)]
    hosts: Option<Hosts>,
    #[cfg(unix)]
    loopback: Arc<Loopback>,
}

/// A list of hosts with a unix socket in it.
#[cfg(unix)]
#[derive(Clone)]
struct Hosts {
    /// Each with its port.
    list: Vec<(Host, u16)>,
    /// They are tried in a random order, and so are the addresses of each.
    shuffled: bool,
}

/// Whether this process can connect to itself. Where it cannot, unix sockets are not observed.
#[derive(Debug, Default)]
pub(in crate::postgres) struct Loopback {
    failed: Mutex<Option<Instant>>,
}

impl Loopback {
    /// How long after a failure it is not tried again. A filter may make each attempt take [`STAND_IN_LIMIT`].
    const PAUSE: Duration = Duration::from_secs(60);

    fn is_usable(&self) -> bool {
        self.failed.lock().is_none_or(|at| at.elapsed() >= Loopback::PAUSE)
    }

    #[cfg(unix)]
    fn failed(&self) {
        *self.failed.lock() = Some(Instant::now());
    }
}

/// Why there is no connection.
#[derive(Debug)]
#[cfg_attr(not(unix), allow(dead_code))]
pub(in crate::postgres) enum ConnectError {
    Postgres(::postgres::Error),
    /// There is no way to the server: no unix socket at this path, or one that refuses; `None`: no address for a name.
    NoWay(Option<PathBuf>, io::Error),
    /// This process cannot connect to itself, so a connection over a unix socket could not be observed. Whether the
    /// server is there was not tried.
    NoLoopback,
}

impl From<::postgres::Error> for ConnectError {
    fn from(error: ::postgres::Error) -> ConnectError {
        ConnectError::Postgres(error)
    }
}

/// In the words of `postgres`, which does not show the path.
impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::Postgres(error) => error.fmt(f),
            ConnectError::NoWay(Some(path), error) => {
                write!(f, "error connecting to server: {}: {error}", path.display())
            }
            ConnectError::NoWay(None, error) => write!(f, "error connecting to server: {error}"),
            ConnectError::NoLoopback => f.write_str("this process cannot connect to itself"),
        }
    }
}

/// An address to which no TCP connection can be made: a multicast one. The system refuses at once, and sends nothing.
#[cfg(unix)]
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0));

impl<T: Connector> Observer<T> {
    /// `None` if connections of this configuration cannot be observed: see [the module](self).
    pub(in crate::postgres) fn new(config: &Config, tls: T, loopback: &Arc<Loopback>) -> Option<Observer<T>> {
        let is_tcp = config.get_hosts().iter().all(|host| matches!(host, Host::Tcp(_)));
        if !is_tcp && (!config.get_hostaddrs().is_empty() || !loopback.is_usable()) {
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
        Some(Observer {
            #[cfg(unix)]
            hosts: if is_tcp { None } else { Some(Hosts::take_from(&mut config)?) },
            #[cfg(unix)]
            loopback: Arc::clone(loopback),
            config,
            tls,
            terms,
        })
    }

    /// Opens a connection that `watch` sees and can abort, already while this call is under way. One watch serves one
    /// connection.
    ///
    /// # Errors
    ///
    /// As `Config::connect`; failures of the negotiation carry a [`NegotiationError`]. Those of a unix socket are
    /// [`ConnectError::NoWay`].
    pub(in crate::postgres) fn connect(&self, watch: &Arc<Watch>) -> Result<Client, ConnectError> {
        #[cfg(unix)]
        if let Some(hosts) = &self.hosts {
            return self.connect_to_one_of(hosts, watch);
        }
        Ok(self.config.connect(self.watched_by(watch))?)
    }

    /// Asks the server to cancel what a connection is doing, over a connection of its own. The connection is that of
    /// the token and of `watch`. `abort` must be a new watch, and can abort this call. Returns when the server has hung
    /// up, which means that it has taken the request.
    ///
    /// # Errors
    ///
    /// As `CancelToken::cancel_query`.
    pub(in crate::postgres) fn cancel(
        &self,
        token: &CancelToken,
        #[cfg_attr(not(unix), allow(unused_variables))] watch: &Watch,
        abort: &Arc<Watch>,
    ) -> Result<(), ConnectError> {
        #[cfg(unix)]
        if let Some(path) = watch.socket() {
            let no_key = || io::Error::other("the server has not said how its queries are cancelled");
            let sent = watch.key().ok_or_else(no_key).and_then(|key| unix::cancel(&path, key, abort));
            return sent.map_err(|error| ConnectError::NoWay(Some(path), error));
        }
        Ok(token.cancel_query(Observed { lingers: true, ..self.watched_by(abort) })?)
    }

    fn watched_by(&self, watch: &Arc<Watch>) -> Observed<T> {
        Observed {
            tls: self.tls.clone(),
            terms: self.terms,
            watch: watch.clone(),
            lingers: false,
            #[cfg(unix)]
            stand_in: None,
        }
    }
}

/// How the observer goes through a list of hosts in the place of `postgres`.
#[cfg(unix)]
impl<T: Connector> Observer<T> {
    /// Fails with the error of the host that was tried last, as `postgres` does.
    fn connect_to_one_of(&self, hosts: &Hosts, watch: &Arc<Watch>) -> Result<Client, ConnectError> {
        let mut list: Vec<_> = hosts.list.iter().collect();
        if hosts.shuffled {
            shuffle(&mut list);
        }
        let mut result = Err(ConnectError::NoLoopback);
        for (host, port) in list {
            result = match host {
                Host::Tcp(name) => self.connect_over_tcp(name, *port, hosts.shuffled, watch),
                Host::Unix(folder) => self.connect_over_unix(socket_in(folder, *port), watch),
            };
            if matches!(result, Ok(_) | Err(ConnectError::NoLoopback)) || watch.is_aborted() {
                break;
            }
        }
        result
    }

    fn connect_over_tcp(
        &self,
        name: &str,
        port: u16,
        shuffled: bool,
        watch: &Arc<Watch>,
    ) -> Result<Client, ConnectError> {
        let no_way = |error| ConnectError::NoWay(None, error);
        let mut addresses: Vec<_> = (name, port).to_socket_addrs().map_err(no_way)?.map(|at| at.ip()).collect();
        if addresses.is_empty() {
            return Err(no_way(io::Error::new(io::ErrorKind::InvalidInput, "could not resolve any addresses")));
        }
        if shuffled {
            shuffle(&mut addresses);
        }
        let mut config = self.config.clone();
        for address in addresses {
            config.host(name).hostaddr(address).port(port);
        }
        Ok(config.connect(self.watched_by(watch))?)
    }

    fn connect_over_unix(&self, path: PathBuf, watch: &Arc<Watch>) -> Result<Client, ConnectError> {
        match StandIn::new(path.clone()).and_then(|stand_in| Ok((stand_in.port()?, stand_in))) {
            Ok((port, stand_in)) => self.connect_behind(stand_in, port, watch),
            Err(error) if unix::is_shortage(&error) => Err(ConnectError::NoWay(Some(path), error)),
            Err(_) => Err(ConnectError::NoLoopback),
        }
    }

    /// Connects to the unix socket for which `stand_in` stands in, at this port.
    pub(super) fn connect_behind(
        &self,
        stand_in: StandIn,
        port: u16,
        watch: &Arc<Watch>,
    ) -> Result<Client, ConnectError> {
        let reached = stand_in.reached();
        let mut config = self.config.clone();
        config.host("unix").hostaddr(IpAddr::V4(Ipv4Addr::LOCALHOST)).port(port);
        // The user's limit for a connect to a unix socket is not needed: that connects or fails at once.
        let limit = config.get_connect_timeout().map_or(STAND_IN_LIMIT, |&limit| STAND_IN_LIMIT.min(limit / 4));
        config.connect_timeout(limit);
        let error = match config.connect(Observed { stand_in: Some(stand_in), ..self.watched_by(watch) }) {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        if !reached.load(Ordering::Relaxed) {
            let system = error.source().and_then(|source| source.downcast_ref::<io::Error>());
            if system.is_some_and(unix::is_shortage) {
                return Err(error.into());
            }
            self.loopback.failed();
            return Err(ConnectError::NoLoopback);
        }
        match NegotiationError::of(&error) {
            Some(NegotiationError::Socket { .. }) => {}
            _ => return Err(error.into()),
        }
        match error.into_source().and_then(|source| source.downcast().ok()).map(|source| *source) {
            Some(NegotiationError::Socket { path, error }) => Err(ConnectError::NoWay(Some(path), error)),
            _ => unreachable!("it was looked at"),
        }
    }
}

#[cfg(unix)]
impl Hosts {
    /// Takes the hosts out of a configuration, which from then on leads nowhere. `None`: its ports do not match its
    /// hosts, and `postgres` refuses it.
    fn take_from(config: &mut Config) -> Option<Hosts> {
        let (hosts, ports) = (config.get_hosts().to_vec(), config.get_ports().to_vec());
        let port = |i: usize| ports.get(i).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        if ports.len() > 1 && ports.len() != hosts.len() {
            return None;
        }
        let list: Vec<_> = hosts.into_iter().enumerate().map(|(i, host)| (host, port(i))).collect();
        for (i, &(_, port)) in list.iter().enumerate() {
            config.hostaddr(NOWHERE);
            if i >= ports.len() {
                config.port(port);
            }
        }
        let shuffled = config.get_load_balance_hosts() == LoadBalanceHosts::Random;
        config.load_balance_hosts(LoadBalanceHosts::Disable);
        Some(Hosts { list, shuffled })
    }
}

/// The port where a configuration names none.
#[cfg(unix)]
const DEFAULT_PORT: u16 = 5432;

#[cfg(unix)]
fn shuffle<V>(list: &mut [V]) {
    for i in (1..list.len()).rev() {
        // `jitter` may be 1.
        list.swap(i, ((i + 1) as f64 * jitter()).min(i as f64) as usize);
    }
}

/// The user's connector, wrapped for one connection.
struct Observed<T> {
    tls: T,
    terms: Terms,
    watch: Arc<Watch>,
    /// See [`Tap`].
    lingers: bool,
    /// The connection is to go over a unix socket.
    #[cfg(unix)]
    stand_in: Option<StandIn>,
}

impl<T: Connector> MakeTlsConnect<Socket> for Observed<T> {
    type Stream = Tap<T::Stream>;
    type TlsConnect = Negotiator<T::TlsConnect>;
    type Error = NegotiationError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, NegotiationError> {
        #[cfg(unix)]
        if let Some(stand_in) = &self.stand_in {
            stand_in.on_reached();
        }
        // The error is kept and counts only if the negotiation comes to TLS.
        let tls = if self.terms.nameless {
            Err(NegotiationError::NoHostName)
        } else {
            self.tls.make_tls_connect(host).map_err(|error| NegotiationError::Connector(error.into()))
        };
        Ok(Negotiator {
            tls,
            terms: self.terms,
            watch: self.watch.clone(),
            lingers: self.lingers,
            #[cfg(unix)]
            stand_in: self.stand_in.take(),
        })
    }
}

/// Turns one socket into a [`Tap`].
struct Negotiator<C> {
    tls: Result<C, NegotiationError>,
    terms: Terms,
    watch: Arc<Watch>,
    lingers: bool,
    #[cfg(unix)]
    stand_in: Option<StandIn>,
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
            #[cfg(unix)]
            if let Some(stand_in) = &self.stand_in {
                watched.over(stand_in.path());
            }
            let mut negotiation = pin!(async {
                #[cfg(unix)]
                if let Some(stand_in) = self.stand_in {
                    let stream = stand_in.connect().await?;
                    drop(socket);
                    return negotiate_unix::<C>(stream, self.terms).await;
                }
                negotiate(socket, self.tls, self.terms).await
            });
            let transport = poll_fn(|cx| match watched.wake_on_abort(cx) {
                Err(_) => Poll::Ready(Err(NegotiationError::Aborted)),
                Ok(()) if is_over(&mut login_timer, cx) => Poll::Ready(Err(NegotiationError::Io(too_slow()))),
                Ok(()) => negotiation.as_mut().poll(cx),
            })
            .await?;
            Ok(Tap { transport, watched, login_timer, lingers: self.lingers })
        })
    }
}
