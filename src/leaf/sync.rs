//! Threads, locks, channels and the clock: the one door through which the pool has them. A model checker puts its own
//! behind it (`tests/simulation`), and so runs the very code that users run.

#[cfg(not(millpond_model))]
mod primitives {
    pub(crate) use crossbeam_channel as channel;
    pub(crate) use parking_lot::{Mutex, MutexGuard};
    pub(crate) use std::sync::atomic;
    pub(crate) use std::thread;
    pub(crate) use std::thread_local;
    pub(crate) use std::time::Instant;

    /// The standard library's. Its sleeping threads are in no table of the process: see
    /// [`event_count`](crate::runtime::event_count).
    pub(crate) mod blocking {
        pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
    }

    /// A number between 0 and 1, at random.
    pub(crate) fn jitter() -> f64 {
        use std::hash::{BuildHasher, RandomState};
        RandomState::new().hash_one(0u8) as f64 / u64::MAX as f64
    }
}

#[cfg(millpond_model)]
mod primitives {
    pub(crate) use crate::model::local::task_local as thread_local;
    pub(crate) use crate::model::lock::{Mutex, MutexGuard};
    pub(crate) use crate::model::time::{Instant, jitter};
    pub(crate) use crate::model::{channel, lock::std_like as blocking, thread};
    pub(crate) use shuttle::sync::atomic;
}

pub(crate) use primitives::*;

/// Notes that a rare branch was taken, or that something rare holds: the simulator counts it. In a user's pool it is
/// nothing.
macro_rules! sometimes {
    ($what:literal) => {
        #[cfg(millpond_model)]
        $crate::model::sometimes($what);
    };
    ($holds:expr, $what:literal) => {
        #[cfg(millpond_model)]
        if $holds {
            $crate::model::sometimes($what);
        }
    };
}
pub(crate) use sometimes;
