//! Watches a connection from outside the `postgres` crate, and can cut it.
//!
//! What `postgres::Client` does not tell, its bytes do: the transaction status, the backend's pid, whether a request is
//! unanswered, whether requests and answers still match. And whoever holds the stream can end it: a [`Watch`] can
//! [`cut`](Watch::cut) a handshake, a login, a query or a drop that would otherwise wait for a silent server.
//!
//! # How
//!
//! The only door to the stream is the TLS connector. [`Observer`] wraps the user's, and on a private copy of the user's
//! configuration always asks for `sslmode=require sslnegotiation=direct`: then `postgres` sends no `SSLRequest` of its own
//! and hands the bare socket to the connector. The observer negotiates in its place, by the *user's* sslmode
//! ([`negotiate`]), and returns a [`Tap`]: the socket or the user's TLS stream, with a [`Scanner`] beside it. A test fails
//! should `postgres` ever stop working this way.
//!
//! # What it must never do
//!
//! `postgres` believes that the stream is encrypted, so nothing behind this file would notice a mistake in it.
//!
//! * Plaintext comes out only of `disable`, or of `prefer` when the connector has no TLS or the server declined it, in so
//!   many words (`N`); never after an error, never after the server said yes.
//! * One byte is read before the TLS handshake, not more: what a man in the middle slips in behind it must fail the
//!   handshake, not be believed.
//! * Channel binding is the TLS stream's own; plaintext has none.
//! * `postgres` reserves as much memory as a message claims to be long, and keeps all that comes. So until the login is over
//!   what is too long or too much is refused here, before it is passed on ([`Scanner::intolerable`]).
//! * The rewritten configuration stays in here.
//!
//! # Limits
//!
//! A unix socket does not pass through the connector. TCP's own connect and the name lookup happen before it: the former
//! is bounded by `connect_timeout` for each address, and only then is a cut seen; the latter by the system's resolver.
//! `cancel_token().cancel_query(NoTls)` fails on an observed client; [`Observer::cancel`] does it.

use std::any::TypeId;
use std::error::Error as StdError;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use ::postgres::config::{Host, SslMode, SslNegotiation};
use ::postgres::error::SqlState;
use ::postgres::fallible_iterator::FallibleIterator;
use ::postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use ::postgres::{CancelToken, Client, Config, NoTls, Socket};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Sleep, sleep, timeout};

use super::scanner::Scanner;
pub(crate) use super::scanner::Status;
use crate::leaf::text::{self, Shown};

mod probe;
#[cfg(test)]
mod tests;

pub(crate) use probe::look;

type BoxError = Box<dyn StdError + Send + Sync>;

/// What a TLS connector must be: any [`MakeTlsConnect`] that can be cloned and sent to other threads, which the usual ones
/// can. The bounds are those of `r2d2_postgres`; there is nothing to implement.
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
pub(crate) struct Observer<T> {
    /// Rewritten, and therefore private: no one may take its `sslmode` for the user's.
    config: Config,
    tls: T,
    terms: Terms,
}

/// What the user asked for.
#[derive(Clone, Copy, Debug)]
struct Terms {
    mode: SslMode,
    negotiation: SslNegotiation,
    /// The configuration names addresses only. A host was made up, since without one `postgres` does not call the
    /// connector; no certificate may be compared with it.
    nameless: bool,
    /// Of several hosts, how long each may take to let us in once its kernel has: `connect_timeout`, as in libpq. (To
    /// `postgres` that covers TCP's connect only, and a node that hangs would keep the next from being tried for ever.)
    patience: Option<Duration>,
}

impl<T: Connector> Observer<T> {
    /// `None` if the configuration names a unix socket, even as one host of several: it cannot be observed.
    pub(crate) fn new(config: &Config, tls: T) -> Option<Observer<T>> {
        if !config.get_hosts().iter().all(|host| matches!(host, Host::Tcp(_))) {
            return None;
        }
        let terms = Terms {
            mode: config.get_ssl_mode(),
            negotiation: config.get_ssl_negotiation(),
            nameless: config.get_hosts().is_empty(),
            patience: match config.get_hosts().len().max(config.get_hostaddrs().len()) {
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

    /// Opens a connection that `watch` sees and can cut, already while this call is under way. One watch serves one
    /// connection.
    ///
    /// # Errors
    ///
    /// As `Config::connect`; failures of the negotiation carry a [`NegotiationError`].
    pub(crate) fn connect(&self, watch: &Arc<Watch>) -> Result<Client, ::postgres::Error> {
        self.config.connect(self.watched_by(watch))
    }

    /// Asks the server to cancel what the token's connection is doing, over a connection of its own: `watch` must be a new
    /// one, and can cut this call. Returns when the server has hung up, by which it says that it has taken the request.
    ///
    /// # Errors
    ///
    /// As `CancelToken::cancel_query`.
    pub(crate) fn cancel(&self, token: &CancelToken, watch: &Arc<Watch>) -> Result<(), ::postgres::Error> {
        token.cancel_query(Observed { lingers: true, ..self.watched_by(watch) })
    }

    fn watched_by(&self, watch: &Arc<Watch>) -> Observed<T> {
        Observed { tls: self.tls.clone(), terms: self.terms, watch: watch.clone(), lingers: false }
    }
}

/// Sends what `client` has queued but not yet written, without waiting for anything. A dropped statement or COPY leaves
/// such a message, and before it is written its [`Watch`] cannot know of it. It reads, once, what has arrived: not to be
/// called where that may be much. Notifications are dropped: they were for whoever used the client until now.
///
/// # Errors
///
/// If the connection is found dead; that it is alive is not said.
pub(crate) fn flush(client: &mut Client) -> Result<(), ::postgres::Error> {
    forget_notifications(client);
    client.notifications().iter().next()?;
    forget_notifications(client);
    Ok(())
}

/// Drops the notifications that `client` has read. Looks for no others.
pub(crate) fn forget_notifications(client: &mut Client) {
    while !client.notifications().is_empty() {
        // With something there it does not look at the stream.
        let _ = client.notifications().iter().next();
    }
}

/// What is known of one connection, and the switch that cuts it. Shared between the stream and whoever cares.
#[derive(Debug)]
pub(crate) struct Watch {
    scanner: Mutex<Scanner>,
    cut: AtomicBool,
    /// Wakes the thread that waits for the stream. It keeps that thread's runtime alive, so it goes when the stream goes.
    waker: Mutex<Option<Waker>>,
    probe: probe::Probe,
}

impl Watch {
    pub(crate) fn new() -> Arc<Watch> {
        Arc::new(Watch {
            scanner: Mutex::new(Scanner::new()),
            cut: AtomicBool::new(false),
            waker: Mutex::new(None),
            probe: probe::Probe::default(),
        })
    }

    /// Ends the connection, for good: whatever waits for it now or later fails at once with `ConnectionAborted`.
    pub(crate) fn cut(&self) {
        // In this order: see [`Line::pass`].
        self.cut.store(true, Ordering::SeqCst);
        let waker = self.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }

    /// See [`Status`].
    pub(crate) fn status(&self) -> Status {
        self.scanner.lock().status()
    }

    /// See [`Scanner::pid`].
    pub(crate) fn pid(&self) -> Option<i32> {
        self.scanner.lock().pid()
    }

    /// See [`Scanner::outstanding`].
    pub(crate) fn outstanding(&self) -> usize {
        self.scanner.lock().outstanding()
    }

    /// See [`Scanner::in_copy`].
    pub(crate) fn in_copy(&self) -> bool {
        self.scanner.lock().in_copy()
    }

    /// See [`Scanner::is_poisoned`].
    pub(crate) fn is_poisoned(&self) -> bool {
        self.scanner.lock().is_poisoned()
    }

    /// See [`Scanner::is_busy`]. Not a fault: after an error the answer's end is often still under way. A ping that is
    /// answered in time settles it.
    pub(crate) fn is_busy(&self) -> bool {
        self.scanner.lock().is_busy()
    }

    /// See [`Scanner::is_half_told`]. Not a fault either: the rest is on its way, and comes before the next answer.
    pub(crate) fn is_half_told(&self) -> bool {
        self.scanner.lock().is_half_told()
    }

    /// Somebody may be waiting for an answer of which nothing decisive has come. (Of a failed request the end may remain
    /// unread while nobody uses the connection.)
    pub(crate) fn is_waiting(&self) -> bool {
        let scanner = self.scanner.lock();
        scanner.is_asked() && !scanner.is_failing() && !scanner.is_lost() && !self.is_cut()
    }

    /// The connection can only be thrown away.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_cut() || self.scanner.lock().is_lost()
    }

    /// Ready for anybody: nothing under way, no transaction, not lost. Of what is queued and not yet written it cannot know:
    /// [`flush`] first.
    pub(crate) fn is_idle(&self) -> bool {
        let scanner = self.scanner.lock();
        scanner.status() == Status::Idle && !scanner.is_busy() && !scanner.is_lost() && !self.is_cut()
    }

    /// As it is after most uses: [idle](Watch::is_idle), and nothing else to be said of it.
    pub(crate) fn is_clean(&self) -> bool {
        let scanner = self.scanner.lock();
        let idle = scanner.status() == Status::Idle && !scanner.is_busy() && !scanner.is_lost() && !self.is_cut();
        idle && !scanner.has_refused_write() && !scanner.has_missed_a_statement()
    }

    /// See [`Scanner::has_erred`].
    pub(crate) fn has_erred(&self) -> bool {
        self.scanner.lock().has_erred()
    }

    /// It was made sure that questions and answers match.
    pub(crate) fn forgive(&self) {
        self.scanner.lock().forgive();
    }

    /// See [`Scanner::fatal`].
    pub(crate) fn fatal(&self) -> Option<SqlState> {
        let code = self.scanner.lock().fatal()?;
        std::str::from_utf8(&code).ok().map(SqlState::from_code)
    }

    /// With which SQLSTATE, and in which words, the server ended the connection.
    pub(crate) fn last_words(&self) -> Option<(SqlState, String)> {
        let code = self.fatal()?;
        Some((code, self.scanner.lock().last_words().unwrap_or_default().to_owned()))
    }

    /// See [`Scanner::take_refused_write`].
    pub(crate) fn take_refused_write(&self) -> bool {
        self.scanner.lock().take_refused_write()
    }

    /// See [`Scanner::has_missed_a_statement`].
    pub(crate) fn has_missed_a_statement(&self) -> bool {
        self.scanner.lock().has_missed_a_statement()
    }

    /// See [`Scanner::take_refused_statement`].
    pub(crate) fn take_refused_statement(&self) -> bool {
        self.scanner.lock().take_refused_statement()
    }

    /// The node says that it takes writes, as of the last answer: what refused one was the transaction. Servers before 14
    /// and poolers say nothing.
    pub(crate) fn takes_writes(&self) -> bool {
        let scanner = self.scanner.lock();
        let says = (scanner.in_hot_standby(), scanner.read_only_by_default());
        says == (Some(false), Some(false)) && !scanner.is_busy()
    }

    /// See [`Scanner::in_hot_standby`].
    pub(crate) fn in_hot_standby(&self) -> Option<bool> {
        self.scanner.lock().in_hot_standby()
    }

    /// See [`Scanner::read_only_by_default`].
    pub(crate) fn read_only_by_default(&self) -> Option<bool> {
        self.scanner.lock().read_only_by_default()
    }
}

/// A stream's hold on its watch: holding one means that this stream is the one being watched.
struct Line(Arc<Watch>);

impl Line {
    /// Begins a new stream. One `connect` may try several addresses, and what was known of the last one is void.
    fn begin(watch: Arc<Watch>) -> Line {
        *watch.scanner.lock() = Scanner::new();
        Line(watch)
    }

    /// Stands before every poll. The waker is left first, and then the switch is looked at; who cuts does it the other way
    /// round. So a cut is seen either here or by being woken.
    fn pass(&self, cx: &Context<'_>) -> io::Result<()> {
        match &mut *self.0.waker.lock() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        if self.0.is_cut() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the connection was cut"));
        }
        Ok(())
    }

    fn scanner(&self) -> parking_lot::MutexGuard<'_, Scanner> {
        self.0.scanner.lock()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let waker = self.0.waker.lock().take();
        drop(waker);
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
        // An error here is kept until TLS is really wanted.
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
            let line = Line::begin(self.watch);
            let mut patience = self.terms.patience.map(|limit| Box::pin(sleep(limit)));
            let mut negotiation = pin!(negotiate(socket, self.tls, self.terms));
            let transport = poll_fn(|cx| match line.pass(cx) {
                Err(_) => Poll::Ready(Err(NegotiationError::Cut)),
                Ok(()) if is_over(&mut patience, cx) => Poll::Ready(Err(NegotiationError::Io(too_slow()))),
                Ok(()) => negotiation.as_mut().poll(cx),
            })
            .await?;
            Ok(Tap { transport, line, patience, lingers: self.lingers })
        })
    }
}

/// Runs until a host has let us in.
type Patience = Option<Pin<Box<Sleep>>>;

fn is_over(patience: &mut Patience, cx: &mut Context<'_>) -> bool {
    patience.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready())
}

fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server accepts connections and does not answer")
}

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Does what `postgres` does between the TCP connect and the startup packet, by the user's terms. A mode that is not
/// known here is taken as the strictest.
async fn negotiate<C>(
    mut socket: Socket,
    tls: Result<C, NegotiationError>,
    terms: Terms,
) -> Result<Transport<C::Stream>, NegotiationError>
where
    C: TlsConnect<Socket> + 'static,
{
    let direct = terms.negotiation == SslNegotiation::Direct;
    match terms.mode {
        SslMode::Disable => return Ok(Transport::Raw(socket)),
        SslMode::Prefer if TypeId::of::<C>() == TypeId::of::<NoTls>() => {
            return Ok(Transport::Raw(socket));
        }
        SslMode::Prefer if direct => return Err(NegotiationError::Weak),
        _ => {}
    }
    if !direct {
        let mut answer = [0];
        socket.write_all(&SSL_REQUEST).await.map_err(NegotiationError::Io)?;
        socket.read_exact(&mut answer).await.map_err(NegotiationError::Io)?;
        match &answer {
            b"S" => {}
            b"N" if terms.mode == SslMode::Prefer => return Ok(Transport::Raw(socket)),
            b"N" => return Err(NegotiationError::Declined),
            b"E" => return Err(NegotiationError::Failed(error_text(&mut socket).await)),
            &[other] => return Err(NegotiationError::Senseless(other)),
        }
    }
    match tls?.connect(socket).await {
        Ok(stream) => Ok(Transport::Tls(stream)),
        Err(error) => {
            let error: BoxError = error.into();
            let in_clear = direct && is_answer_in_clear(&*error);
            Err(if in_clear { NegotiationError::InClear(error) } else { NegotiationError::Handshake(error) })
        }
    }
}

/// Whether a handshake failed since what came back was no TLS at all, in the words of rustls and of OpenSSL. A server that
/// has no process for a client says so in clear, whatever it was asked.
pub(super) fn is_answer_in_clear(error: &(dyn StdError + 'static)) -> bool {
    let text = error.to_string();
    ["InvalidContentType", "wrong version number", "packet length too long"].iter().any(|words| text.contains(words))
        || error.source().is_some_and(is_answer_in_clear)
}

/// How much of an error is read that comes instead of TLS, in bytes, and for how long at most it is waited for.
const ERROR: usize = 1024;
const ERROR_PATIENCE: Duration = Duration::from_secs(1);

/// The words of an error that came in answer to the request for TLS, of which the tag has been read. Anybody on the way may
/// have said them: they are for people, and nothing is concluded from them.
///
/// A server that has no process for a client says it by the second version of the protocol, in a text that ends with a NUL;
/// others might by the third, in fields behind a length. No text begins as such a length does.
async fn error_text(socket: &mut Socket) -> String {
    let (mut said, mut piece) = (Vec::new(), [0; ERROR]);
    let end = |said: &[u8]| match said {
        [0, a, b, c, ..] => said.len() >= u32::from_be_bytes([0, *a, *b, *c]) as usize,
        _ => said.contains(&0) && said[0] != 0,
    };
    let read = async {
        while said.len() < ERROR && !end(&said) {
            match socket.read(&mut piece).await {
                Ok(n) if n > 0 => said.extend_from_slice(&piece[..n]),
                _ => break,
            }
        }
    };
    // What has come until then will do.
    let _ = timeout(ERROR_PATIENCE, read).await;
    let text = match &*said {
        [0, _, _, _, fields @ ..] => fields.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(b"M")),
        text => text.split(|&byte| byte == 0).next(),
    };
    text::brief(String::from_utf8_lossy(text.unwrap_or_default()).trim_end(), text::CAUSE / 2)
}

/// Why there was no stream to log in over. The words are those of `postgres` where it has the case.
#[derive(Debug)]
pub(crate) enum NegotiationError {
    /// By [`Watch::cut`].
    Cut,
    /// The socket failed before the server had answered the request for TLS.
    Io(io::Error),
    /// `require`, and the server does not do TLS.
    Declined,
    /// The server answered the request for TLS with an error, in these words.
    Failed(String),
    /// The server answered it with this, which is no answer.
    Senseless(u8),
    /// TLS without asking for it, and the answer was no TLS.
    InClear(BoxError),
    /// `prefer` with `direct`.
    Weak,
    /// TLS by address only.
    NoHostName,
    /// The connector would not begin, as with an invalid host name.
    Connector(BoxError),
    /// The handshake failed: the certificate is not trusted or not this host's, or the server broke off.
    Handshake(BoxError),
}

impl NegotiationError {
    /// The one that made `error`, if one did.
    pub(crate) fn of(error: &::postgres::Error) -> Option<&NegotiationError> {
        error.source()?.downcast_ref()
    }

    /// The same attempt may succeed in a moment: the connection failed, rather than an agreement. A failed handshake is
    /// taken for a disagreement unless an I/O error in it says that the stream ended.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            NegotiationError::Cut
            | NegotiationError::Io(_)
            | NegotiationError::Failed(_)
            | NegotiationError::Senseless(_)
            | NegotiationError::InClear(_) => true,
            NegotiationError::Handshake(error) => {
                let mut next: Option<&(dyn StdError + 'static)> = Some(&**error);
                while let Some(error) = next {
                    match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                        // Connectors wrap their own verdicts in these.
                        None
                        | Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::Other) => {}
                        Some(_) => return true,
                    }
                    next = error.source();
                }
                false
            }
            NegotiationError::Declined
            | NegotiationError::Weak
            | NegotiationError::NoHostName
            | NegotiationError::Connector(_) => false,
        }
    }
}

impl fmt::Display for NegotiationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NegotiationError::Cut => "the connection was cut",
            NegotiationError::Declined => "server does not support TLS",
            NegotiationError::Weak => {
                "weak sslmode \"prefer\" may not be used with sslnegotiation=direct (use \"require\")"
            }
            NegotiationError::NoHostName => "no hostname provided for TLS handshake",
            NegotiationError::Failed(text) => {
                return write!(f, "the server answered the request for TLS with an error, unverified: {}", Shown(text));
            }
            NegotiationError::Senseless(answer) => {
                let answer = char::from(*answer).escape_default();
                return write!(f, "the server answered the request for TLS with '{answer}', which is no answer");
            }
            NegotiationError::Io(error) => return error.fmt(f),
            NegotiationError::Connector(error)
            | NegotiationError::Handshake(error)
            | NegotiationError::InClear(error) => return error.fmt(f),
        })
    }
}

// Transparent: it shows what it holds, so its source is what lies behind that.
impl StdError for NegotiationError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            NegotiationError::Io(error) => error.source(),
            NegotiationError::Connector(error)
            | NegotiationError::Handshake(error)
            | NegotiationError::InClear(error) => error.source(),
            _ => None,
        }
    }
}

/// What the bytes really travel over.
enum Transport<S> {
    Raw(Socket),
    Tls(S),
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}

/// A stream that is watched.
struct Tap<S> {
    transport: Transport<S>,
    line: Line,
    patience: Patience,
    /// Hang up only after the other side has: for a request to cancel. libpq does so, `postgres` does not, and PgBouncer
    /// 1.18 forgets the request when its sender is gone, or ends itself (pgbouncer #801).
    lingers: bool,
}

impl<S: TlsStream + Unpin> Tap<S> {
    /// The stream, unless it was cut.
    fn stream(&mut self, cx: &mut Context<'_>) -> io::Result<Pin<&mut (dyn Duplex + '_)>> {
        self.line.pass(cx)?;
        if self.patience.is_some() {
            if self.line.scanner().status() != Status::Unknown {
                self.patience = None;
            } else if is_over(&mut self.patience, cx) {
                return Err(too_slow());
            }
        }
        Ok(match &mut self.transport {
            Transport::Raw(socket) => Pin::new(socket),
            Transport::Tls(stream) => Pin::new(stream),
        })
    }
}

impl<S: TlsStream + Unpin> AsyncRead for Tap<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (before, room) = (buf.filled().len(), buf.remaining());
        if self.line.0.probe.feed(buf) {
            return Poll::Ready(Ok(()));
        }
        let Poll::Ready(result) = self.stream(cx)?.poll_read(cx, buf) else {
            let between = !self.line.scanner().is_half_told();
            if self.line.0.probe.nothing(cx, between) && self.line.0.probe.feed(buf) {
                return Poll::Ready(Ok(()));
            }
            return Poll::Pending;
        };
        let read = &buf.filled()[before..];
        let mut scanner = self.line.scanner();
        scanner.received(read);
        if let Some(intolerable) = scanner.intolerable().cloned() {
            scanner.ended();
            drop(scanner);
            buf.set_filled(before);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, intolerable)));
        }
        if result.is_err() || (read.is_empty() && room > 0) {
            scanner.ended();
        }
        Poll::Ready(result)
    }
}

impl<S: TlsStream + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(self.stream(cx)?.poll_write(cx, buf));
        match result {
            Ok(written) => self.line.scanner().sent(&buf[..written]),
            Err(_) => self.line.scanner().ended(),
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingers {
            let mut ignored = [0; 64];
            loop {
                let mut buf = ReadBuf::new(&mut ignored);
                match ready!(self.stream(cx)?.poll_read(cx, &mut buf)) {
                    Ok(()) if !buf.filled().is_empty() => {}
                    // By a reset as well as in good order, and then there is nobody left to say good-bye to.
                    _ => return Poll::Ready(Ok(())),
                }
            }
        }
        self.stream(cx)?.poll_shutdown(cx)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Tap<S> {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.transport {
            Transport::Raw(_) => ChannelBinding::none(),
            Transport::Tls(stream) => stream.channel_binding(),
        }
    }
}
