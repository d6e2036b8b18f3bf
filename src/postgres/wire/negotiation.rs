//! The choice between clear text and TLS, by the user's terms. It is made between the connect and the startup packet.
//!
//! `postgres` believes that the stream is encrypted, so no other code would notice a mistake in this file.
//!
//! * The stream is in clear text only with `disable`, or with `prefer` if the connector has no TLS or the server
//!   answered `N`. It is never in clear text after an error, or after the server said yes.
//! * Only one byte is read before the TLS handshake. Whatever a man in the middle sends behind it makes the handshake
//!   fail, and is not believed.

use crate::leaf::failures::ErrorType;
use crate::leaf::text::{self, Shown};
use ::postgres::config::{SslMode, SslNegotiation};
use ::postgres::tls::TlsConnect;
use ::postgres::{NoTls, Socket};
use std::any::TypeId;
use std::error::Error as StdError;
use std::fmt;
use std::io;
#[cfg(unix)]
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio::time::timeout;

type BoxError = Box<dyn StdError + Send + Sync>;

/// What the user asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) mode: SslMode,
    pub(super) negotiation: SslNegotiation,
    /// The configuration names addresses only. A host was made up, since without a host `postgres` does not call the
    /// connector. No certificate may be compared with it.
    pub(super) nameless: bool,
    /// How long each of several hosts may take from the TCP connect to the end of the login: `connect_timeout`, as in
    /// libpq. (In `postgres` it covers the TCP connect only, and a node that hangs would keep it from the next one for
    /// ever.)
    pub(super) host_limit: Option<Duration>,
}

/// The stream that the bytes really travel over.
pub(super) enum Transport<S> {
    Raw(Socket),
    /// Always in clear text: the other end is on the same machine.
    #[cfg(unix)]
    Unix(UnixStream),
    Tls(S),
}

/// What both sides want.
enum Agreed {
    ClearText,
    Tls,
}

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Does what `postgres` does between the TCP connect and the startup packet, by the user's terms.
pub(super) async fn negotiate<C>(
    mut socket: Socket,
    tls: Result<C, NegotiationError>,
    terms: Terms,
) -> Result<Transport<C::Stream>, NegotiationError>
where
    C: TlsConnect<Socket> + 'static,
{
    match agree::<C>(&mut socket, terms).await? {
        Agreed::ClearText => return Ok(Transport::Raw(socket)),
        Agreed::Tls => {}
    }
    let direct = terms.negotiation == SslNegotiation::Direct;
    match tls?.connect(socket).await {
        Ok(stream) => Ok(Transport::Tls(stream)),
        Err(error) => {
            let error: BoxError = error.into();
            let in_clear = direct && is_answer_in_clear(&*error);
            Err(if in_clear { NegotiationError::InClear(error) } else { NegotiationError::Handshake(error) })
        }
    }
}

/// The same over a unix socket, where there is no TLS in `postgres`. It asks for TLS nevertheless, if the terms say so.
#[cfg(unix)]
pub(super) async fn negotiate_unix<C>(
    mut stream: UnixStream,
    terms: Terms,
) -> Result<Transport<C::Stream>, NegotiationError>
where
    C: TlsConnect<Socket> + 'static,
{
    match agree::<C>(&mut stream, terms).await? {
        Agreed::ClearText => Ok(Transport::Unix(stream)),
        Agreed::Tls => Err(NegotiationError::NoHostName),
    }
}

/// Asks the server for TLS, if it is to be asked. A mode that is not known here counts as the strictest.
async fn agree<C: 'static>(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    terms: Terms,
) -> Result<Agreed, NegotiationError> {
    let direct = terms.negotiation == SslNegotiation::Direct;
    match terms.mode {
        SslMode::Disable => return Ok(Agreed::ClearText),
        SslMode::Prefer if TypeId::of::<C>() == TypeId::of::<NoTls>() => return Ok(Agreed::ClearText),
        SslMode::Prefer if direct => return Err(NegotiationError::Weak),
        _ => {}
    }
    if direct {
        return Ok(Agreed::Tls);
    }
    let mut answer = [0];
    stream.write_all(&SSL_REQUEST).await.map_err(NegotiationError::Io)?;
    stream.read_exact(&mut answer).await.map_err(NegotiationError::Io)?;
    match &answer {
        b"S" => Ok(Agreed::Tls),
        b"N" if terms.mode == SslMode::Prefer => Ok(Agreed::ClearText),
        b"N" => Err(NegotiationError::Declined),
        b"E" => Err(NegotiationError::Failed(error_text(stream).await)),
        &[other] => Err(NegotiationError::NoAnswer(other)),
    }
}

/// Whether a handshake failed because the answer was no TLS at all, by the error texts of rustls and OpenSSL. A server
/// that has no process for a client answers in clear text, whatever it was asked.
pub(in crate::postgres) fn is_answer_in_clear(error: &(dyn StdError + 'static)) -> bool {
    let text = error.to_string();
    ["InvalidContentType", "wrong version number", "packet length too long"].iter().any(|words| text.contains(words))
        || error.source().is_some_and(is_answer_in_clear)
}

/// How much is read of an error that comes instead of TLS, in bytes: as much as is shown of a cause.
const LONGEST_ERROR: usize = 1024;
/// How long to wait for the rest of that error: as a rule it comes with the first byte.
const ERROR_LIMIT: Duration = Duration::from_secs(1);

/// The text of an error that came in answer to the request for TLS, whose tag has been read. Anybody on the way may
/// have sent it, so it is shown to people, and nothing is concluded from it.
///
/// A server that has no process for a client sends an error of the second version of the protocol: a text that ends
/// with a NUL. Others might send an error of the third version: fields behind a length. A length begins with a zero
/// byte, and no text does.
async fn error_text(socket: &mut (impl AsyncRead + Unpin)) -> String {
    let (mut received, mut piece) = (Vec::new(), [0; LONGEST_ERROR]);
    let is_whole = |error: &[u8]| match error {
        [0, a, b, c, ..] => error.len() >= u32::from_be_bytes([0, *a, *b, *c]) as usize,
        _ => error.contains(&0) && error[0] != 0,
    };
    let read = async {
        while received.len() < LONGEST_ERROR && !is_whole(&received) {
            match socket.read(&mut piece).await {
                Ok(n) if n > 0 => received.extend_from_slice(&piece[..n]),
                _ => break,
            }
        }
    };
    // After the limit the part that has come is enough.
    let _ = timeout(ERROR_LIMIT, read).await;
    let text = match &*received {
        [0, _, _, _, fields @ ..] => fields.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(b"M")),
        text => text.split(|&byte| byte == 0).next(),
    };
    text::brief(String::from_utf8_lossy(text.unwrap_or_default()).trim_end(), text::CAUSE / 2)
}

/// Why there was no stream to log in over. Where `postgres` has the same case, the text is the same.
#[derive(Debug)]
pub(in crate::postgres) enum NegotiationError {
    /// [`Watch::abort`](super::Watch::abort) was called.
    Aborted,
    /// The unix socket could not be connected to.
    #[cfg(unix)]
    Socket { path: PathBuf, error: io::Error },
    /// The socket failed before the server had answered the request for TLS.
    Io(io::Error),
    /// The user's terms require TLS, and the server has none.
    Declined,
    /// The server answered the request for TLS with an error, of this text.
    Failed(String),
    /// The server answered the request for TLS with this byte, which is no answer.
    NoAnswer(u8),
    /// TLS was begun without a request for it (`direct`), and the answer was no TLS.
    InClear(BoxError),
    /// The user's terms are `prefer` with `direct`.
    Weak,
    /// TLS was needed, and the configuration has addresses only.
    NoHostName,
    /// The connector refused to begin, for an invalid host name, say.
    Connector(BoxError),
    /// The handshake failed: the certificate is not trusted or not this host's, or the server broke off.
    Handshake(BoxError),
}

impl NegotiationError {
    /// The negotiation's error within `error`, if there is one.
    pub(in crate::postgres) fn of(error: &::postgres::Error) -> Option<&NegotiationError> {
        error.source()?.downcast_ref()
    }

    /// Whether the same attempt may succeed in a moment: the connection failed, and not the agreement. A failed
    /// handshake counts as a disagreement unless an I/O error in it says that the stream ended.
    pub(in crate::postgres) fn is_transient(&self) -> bool {
        match self {
            #[cfg(unix)]
            NegotiationError::Socket { .. } => true,
            NegotiationError::Aborted
            | NegotiationError::Io(_)
            | NegotiationError::Failed(_)
            | NegotiationError::NoAnswer(_)
            | NegotiationError::InClear(_) => true,
            NegotiationError::Handshake(error) => {
                let mut next: Option<&(dyn StdError + 'static)> = Some(&**error);
                while let Some(error) = next {
                    match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                        // Connectors wrap their own verdicts in these kinds.
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

impl NegotiationError {
    /// A disagreement about TLS has a type of its own; what the system says is the system's.
    pub(in crate::postgres) fn error_type(&self) -> ErrorType {
        match self {
            #[cfg(unix)]
            NegotiationError::Socket { error, .. } => ErrorType::of_system(error),
            NegotiationError::Io(error) => ErrorType::of_system(error),
            NegotiationError::Handshake(error) if self.is_transient() => ErrorType::of(&**error),
            NegotiationError::Aborted | NegotiationError::Failed(_) | NegotiationError::NoAnswer(_) => ErrorType::OTHER,
            NegotiationError::Declined
            | NegotiationError::InClear(_)
            | NegotiationError::Weak
            | NegotiationError::NoHostName
            | NegotiationError::Connector(_)
            | NegotiationError::Handshake(_) => ErrorType::named("tls"),
        }
    }
}

impl fmt::Display for NegotiationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NegotiationError::Aborted => "the connection was aborted",
            NegotiationError::Declined => "server does not support TLS",
            NegotiationError::Weak => {
                "weak sslmode \"prefer\" may not be used with sslnegotiation=direct (use \"require\")"
            }
            NegotiationError::NoHostName => "no hostname provided for TLS handshake",
            NegotiationError::Failed(text) => {
                return write!(f, "the server answered the request for TLS with an error, unverified: {}", Shown(text));
            }
            NegotiationError::NoAnswer(answer) => {
                let answer = char::from(*answer).escape_default();
                return write!(f, "the server answered the request for TLS with '{answer}', which is no answer");
            }
            #[cfg(unix)]
            NegotiationError::Socket { path, error } => return write!(f, "{}: {error}", path.display()),
            NegotiationError::Io(error) => return error.fmt(f),
            NegotiationError::Connector(error)
            | NegotiationError::Handshake(error)
            | NegotiationError::InClear(error) => return error.fmt(f),
        })
    }
}

// Its text is that of the error inside it, so its source is the source of that error.
impl StdError for NegotiationError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            #[cfg(unix)]
            NegotiationError::Socket { error, .. } => error.source(),
            NegotiationError::Io(error) => error.source(),
            NegotiationError::Connector(error)
            | NegotiationError::Handshake(error)
            | NegotiationError::InClear(error) => error.source(),
            _ => None,
        }
    }
}
