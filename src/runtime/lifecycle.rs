//! [`Lifecycle`]: the beginning and the end of a pool.

use crate::leaf::clock::Moment;
use parking_lot::Mutex;
use std::panic::Location;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Where a pool stands between its beginning and its end.
#[derive(Default)]
pub(crate) struct Lifecycle {
    /// Whether `build` still waits for the first connection, which is shown to
    /// [`Manage::started`](crate::Manage::started).
    pub(crate) is_starting: AtomicBool,
    /// Who closed the pool.
    pub(crate) ended: OnceLock<Ended>,
    /// Those who close the pool from within a call that it makes.
    pub(crate) within: Mutex<Vec<Within>>,
    /// What `close` and guards have waited for in vain.
    pub(crate) vain: Mutex<Option<VainWait>>,
}

/// Who closed the pool.
pub(crate) struct Ended {
    pub(crate) by: &'static str,
    pub(crate) at: Option<&'static Location<'static>>,
    pub(crate) thread: u64,
    pub(crate) when: Moment,
}

/// A thread that closes the pool from within a call that the pool makes: what it has in hand ends only when it has
/// closed. Of two such threads neither waits for what the other has in hand.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Within {
    /// Whether it is a thread of the executor.
    pub(crate) on_the_executor: bool,
    /// The numbers of the connections.
    pub(crate) in_hand: Vec<u64>,
}

/// A wait whose deadline came first.
#[derive(Clone)]
pub(crate) struct VainWait {
    /// When it began: what changed its state later was not waited for from the beginning.
    pub(crate) since: Moment,
    /// How long it was.
    pub(crate) waited: Duration,
    /// Threads and aborted connections when it was over.
    pub(crate) threads: usize,
    pub(crate) aborted: Vec<u64>,
}
