//! [`Lifecycle`]: whether a pool is still being built, who closed it, and who waits for its end.

use crate::leaf::clock::Moment;
use crate::leaf::sync::Mutex;
use crate::leaf::sync::atomic::AtomicBool;
use std::panic::Location;
use std::sync::OnceLock;
use std::time::Duration;

/// Where a pool stands between its beginning and its end.
#[derive(Default)]
pub(crate) struct Lifecycle {
    /// Whether `build` still waits for the first connection, which is shown to
    /// [`Manage::started`](crate::Manage::started).
    pub(crate) is_starting: AtomicBool,
    /// Who closed the pool.
    pub(crate) ended: OnceLock<Ended>,
    /// The threads that close the pool from within a call that the pool makes.
    pub(crate) within: Mutex<Vec<Within>>,
    /// The last wait of a `close` or a guard that ended at its deadline.
    pub(crate) vain: Mutex<Option<VainWait>>,
}

/// Who closed the pool.
pub(crate) struct Ended {
    pub(crate) by: &'static str,
    pub(crate) at: Option<&'static Location<'static>>,
    pub(crate) thread: u64,
    pub(crate) when: Moment,
}

/// A thread that closes the pool from within a call that the pool makes. The work it has [in
/// hand](crate::leaf::in_hand) ends only after its `close`. So no such thread waits for what another one has in hand,
/// or both would wait for ever.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Within {
    /// Whether it is a thread of the executor.
    pub(crate) on_the_executor: bool,
    /// The numbers of the connections that it has in hand.
    pub(crate) in_hand: Vec<u64>,
}

/// A wait for the end of a pool that ended at its deadline.
#[derive(Clone)]
pub(crate) struct VainWait {
    /// When the wait began. A connection that changed its state later was not waited for from the beginning.
    pub(crate) since: Moment,
    /// How long the wait was.
    pub(crate) waited: Duration,
    /// How many threads the executor had at its end.
    pub(crate) threads: usize,
    /// The connections that had been aborted by its end.
    pub(crate) aborted: Vec<u64>,
}
