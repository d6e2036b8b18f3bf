//! A look at a connection without a word to its server: what has arrived by now, the end of it above all.
//!
//! A `postgres::Client` reads what the system has told its runtime, and the runtime asks the system only when it has
//! nothing else to do, which is when somebody waits. So somebody waits: for a notification, which the [`Tap`](super::Tap)
//! makes up once there is nothing (more) to be read. Before that, its first "nothing" wakes the runtime at once, which
//! makes it ask. All of that takes a few microseconds.

use super::Watch;
use ::postgres::Client;
use ::postgres::fallible_iterator::FallibleIterator;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Context;
use std::time::Duration;
use tokio::io::ReadBuf;

/// A notification that no server sends, for its channel has no name.
const MADE_UP: [u8; 11] = *b"A\0\0\0\x0a\0\0\0\0\0\0";

/// How long a look may take in the worst case: when half a message has arrived, whose other half does not come.
const PATIENCE: Duration = Duration::from_millis(1);
/// How many notifications a look takes, which come as long as it looks.
const MANY: usize = 1000;

/// How far a look has come.
#[derive(Debug, Default)]
pub(super) struct Probe(AtomicU8);

const NONE: u8 = 0;
/// Nothing was read yet.
const BEGUN: u8 = 1;
/// There was nothing to be read, and the runtime is asked to ask the system.
const ASKED: u8 = 2;
/// There is nothing to be read. So much of what is made up is to come: this and its length.
const TOLD: u8 = 3;

impl Probe {
    /// Puts what is left of the made-up message into `buf`; `false`: there is nothing left.
    pub(super) fn feed(&self, buf: &mut ReadBuf<'_>) -> bool {
        let state = self.0.load(Ordering::Relaxed);
        if state <= TOLD {
            return false;
        }
        let left = usize::from(state - TOLD);
        let piece = &MADE_UP[MADE_UP.len() - left..];
        let n = piece.len().min(buf.remaining());
        buf.put_slice(&piece[..n]);
        let left = left - n;
        self.0.store(if left == 0 { NONE } else { TOLD + left as u8 }, Ordering::Relaxed);
        true
    }

    /// There is nothing to be read at the moment. `true`: but there is something to be [fed](Probe::feed). `between`: no
    /// message has come half.
    pub(super) fn nothing(&self, cx: &Context<'_>, between: bool) -> bool {
        match self.0.load(Ordering::Relaxed) {
            BEGUN => {
                self.0.store(ASKED, Ordering::Relaxed);
                cx.waker().wake_by_ref();
                false
            }
            ASKED if between => {
                self.0.store(TOLD + MADE_UP.len() as u8, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    fn begin(&self) {
        self.0.store(BEGUN, Ordering::Relaxed);
    }

    /// Unless something made up is half read: then the rest must follow.
    fn end(&self) {
        for state in [BEGUN, ASKED] {
            let _ = self.0.compare_exchange(state, NONE, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

/// Looks whether `client` is alive, as far as can be seen from here. Sends what it has queued, and drops the notifications
/// that have arrived. `Ok(false)`: it cannot be told, or the stream has ended.
///
/// # Errors
///
/// If the connection is found dead.
pub(crate) fn look(client: &mut Client, watch: &Watch) -> Result<bool, ::postgres::Error> {
    super::flush(client)?;
    if !watch.is_idle() {
        return Ok(false);
    }
    watch.probe.begin();
    let result = wait_for_what_is_made_up(client);
    watch.probe.end();
    Ok(result? && watch.is_idle())
}

fn wait_for_what_is_made_up(client: &mut Client) -> Result<bool, ::postgres::Error> {
    let mut notifications = client.notifications();
    let mut coming = notifications.timeout_iter(PATIENCE);
    for _ in 0..MANY {
        match coming.next()? {
            Some(notification) if notification.channel().is_empty() => return Ok(true),
            Some(_) => {}
            None => return Ok(false),
        }
    }
    Ok(false)
}
