//! [`Tap`]: the stream that `postgres` gets. A [`Scanner`](super::scanner::Scanner) sees every byte that passes.

use super::negotiation::Transport;
use super::scanner::Status;
use super::watch::Watched;
use ::postgres::tls::{ChannelBinding, TlsStream};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Runs out if a host does not end the login in time; `None` once the login has ended, or if there is no such limit.
pub(super) type LoginTimer = Option<Pin<Box<Sleep>>>;

pub(super) fn is_over(timer: &mut LoginTimer, cx: &mut Context<'_>) -> bool {
    timer.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready())
}

pub(super) fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the server accepts connections and does not answer")
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}

/// A stream that is watched.
pub(super) struct Tap<S> {
    pub(super) transport: Transport<S>,
    pub(super) watched: Watched,
    pub(super) login_timer: LoginTimer,
    /// Hang up only after the other side has hung up: for a request to cancel. libpq does so, `postgres` does not.
    /// PgBouncer 1.18 forgets such a request when its sender is gone, or ends itself (pgbouncer #801).
    pub(super) lingers: bool,
}

impl<S: TlsStream + Unpin> Tap<S> {
    /// The stream, unless it was aborted.
    #[inline]
    fn stream(&mut self, cx: &mut Context<'_>) -> io::Result<Pin<&mut (dyn Duplex + '_)>> {
        self.watched.check()?;
        if self.login_timer.is_some() {
            self.look_at_login_timer(cx)?;
        }
        Ok(match &mut self.transport {
            Transport::Raw(socket) => Pin::new(socket),
            #[cfg(unix)]
            Transport::Unix(stream) => Pin::new(stream),
            Transport::Tls(stream) => Pin::new(stream),
        })
    }

    #[cold]
    fn look_at_login_timer(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.watched.scanner().status() != Status::Unknown {
            self.login_timer = None;
        } else if is_over(&mut self.login_timer, cx) {
            return Err(too_slow());
        }
        Ok(())
    }

    /// `Pending`, after which an abort wakes this thread.
    fn pending<T>(&self, cx: &Context<'_>) -> Poll<io::Result<T>> {
        match self.watched.wake_on_abort(cx) {
            Ok(()) => Poll::Pending,
            Err(aborted) => Poll::Ready(Err(aborted)),
        }
    }
}

impl<S: TlsStream + Unpin> AsyncRead for Tap<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (before, room) = (buf.filled().len(), buf.remaining());
        if self.watched.probe().feed(buf) {
            return Poll::Ready(Ok(()));
        }
        let Poll::Ready(result) = self.stream(cx)?.poll_read(cx, buf) else {
            if self.watched.probe().is_under_way() {
                let between = !self.watched.scanner().is_mid_message();
                if self.watched.probe().on_nothing(cx, between) && self.watched.probe().feed(buf) {
                    return Poll::Ready(Ok(()));
                }
            }
            return self.pending(cx);
        };
        let read = &buf.filled()[before..];
        let mut scanner = self.watched.scanner();
        scanner.received(read);
        if let Some(fault) = scanner.fault().cloned() {
            scanner.ended();
            drop(scanner);
            buf.set_filled(before);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault)));
        }
        if result.is_err() || (read.is_empty() && room > 0) {
            scanner.ended();
        }
        Poll::Ready(result)
    }
}

impl<S: TlsStream + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Poll::Ready(result) = self.stream(cx)?.poll_write(cx, buf) else { return self.pending(cx) };
        match result {
            Ok(written) => self.watched.scanner().sent(&buf[..written]),
            Err(_) => self.watched.scanner().ended(),
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Poll::Ready(result) = self.stream(cx)?.poll_flush(cx) else { return self.pending(cx) };
        Poll::Ready(result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingers {
            let mut ignored = [0; 64];
            loop {
                let mut buf = ReadBuf::new(&mut ignored);
                match self.stream(cx)?.poll_read(cx, &mut buf) {
                    Poll::Pending => return self.pending(cx),
                    Poll::Ready(Ok(())) if !buf.filled().is_empty() => {}
                    // The other side has hung up, in good order or by a reset, so there is nothing to shut down.
                    Poll::Ready(_) => return Poll::Ready(Ok(())),
                }
            }
        }
        let Poll::Ready(result) = self.stream(cx)?.poll_shutdown(cx) else { return self.pending(cx) };
        Poll::Ready(result)
    }
}

impl<S: TlsStream + Unpin> TlsStream for Tap<S> {
    fn channel_binding(&self) -> ChannelBinding {
        match &self.transport {
            Transport::Raw(_) => ChannelBinding::none(),
            #[cfg(unix)]
            Transport::Unix(_) => ChannelBinding::none(),
            Transport::Tls(stream) => stream.channel_binding(),
        }
    }
}
