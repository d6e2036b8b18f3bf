//! [`Probe`]: a stream's part in a look at its connection, which sends the server nothing. See [`look`](super::look()).
//!
//! While a look is under way, the stream makes up one notification as soon as there is nothing more to read.

use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Context;
use tokio::io::ReadBuf;

/// A notification that no server sends, since its channel has no name.
const MADE_UP: [u8; 11] = *b"A\0\0\0\x0a\0\0\0\0\0\0";

/// How far a look has come.
#[derive(Debug, Default)]
pub(super) struct Probe(AtomicU8);

/// No look is under way.
const NONE: u8 = 0;
/// Nothing was read yet.
const BEGUN: u8 = 1;
/// There was nothing to read, and the runtime was woken so that it asks the system.
const ASKED: u8 = 2;
/// There is nothing to read. The state is this number plus the number of bytes of the made-up message that are left.
const FED: u8 = 3;

impl Probe {
    /// Puts what is left of the made-up message into `buf`; `false`: there is nothing left.
    #[inline]
    pub(super) fn feed(&self, buf: &mut ReadBuf<'_>) -> bool {
        let state = self.0.load(Ordering::Relaxed);
        if state <= FED {
            return false;
        }
        let left = usize::from(state - FED);
        let piece = &MADE_UP[MADE_UP.len() - left..];
        let n = piece.len().min(buf.remaining());
        buf.put_slice(&piece[..n]);
        let left = left - n;
        self.0.store(if left == 0 { NONE } else { FED + left as u8 }, Ordering::Relaxed);
        true
    }

    /// Whether a look is under way.
    #[inline]
    pub(super) fn is_under_way(&self) -> bool {
        self.0.load(Ordering::Relaxed) != NONE
    }

    /// To be called when the stream has nothing to read; `between_messages`: whether it stands between two messages.
    /// `true`: the made-up message is to be [fed](Probe::feed) now.
    pub(super) fn on_nothing(&self, cx: &Context<'_>, between_messages: bool) -> bool {
        match self.0.load(Ordering::Relaxed) {
            BEGUN => {
                self.0.store(ASKED, Ordering::Relaxed);
                cx.waker().wake_by_ref();
                false
            }
            ASKED if between_messages => {
                self.0.store(FED + MADE_UP.len() as u8, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    /// Begins a look, unless the made-up message of the last one is half read: then the rest must follow.
    pub(super) fn begin(&self) {
        if self.0.load(Ordering::Relaxed) <= FED {
            self.0.store(BEGUN, Ordering::Relaxed);
        }
    }

    /// Ends a look, unless the made-up message is half read: then the rest must follow.
    pub(super) fn end(&self) {
        for state in [BEGUN, ASKED] {
            let _ = self.0.compare_exchange(state, NONE, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}
