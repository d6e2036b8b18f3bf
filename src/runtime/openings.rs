//! [`Openings`]: the hooks that abort each connection, and why the last open failed. They are not in the ledger, since
//! nothing of the user's may be dropped under its lock.

use crate::error::Cause;
use crate::leaf::sync::Mutex;
use crate::manage::Opening;
use std::collections::HashMap;
use std::sync::Arc;

/// The openings of all connections that are open or being opened, by number.
#[derive(Default)]
pub(crate) struct Openings {
    by_id: Mutex<HashMap<u64, Arc<Opening>>>,
    cause: Mutex<Option<Cause>>,
}

impl Openings {
    pub(crate) fn insert(&self, id: u64, opening: Arc<Opening>) {
        self.by_id.lock().insert(id, opening);
    }

    pub(crate) fn get(&self, id: u64) -> Option<Arc<Opening>> {
        self.by_id.lock().get(&id).cloned()
    }

    /// Removes an opening. The calling function drops it, without a lock, since the hooks in it are the user's.
    #[must_use]
    pub(crate) fn remove(&self, id: u64) -> Option<Arc<Opening>> {
        self.by_id.lock().remove(&id)
    }

    /// The server's number of each of these connections.
    pub(crate) fn server_ids(&self, ids: impl Iterator<Item = u64>) -> Vec<Option<u64>> {
        let by_id = self.by_id.lock();
        ids.map(|id| by_id.get(&id).and_then(|opening| opening.server_id())).collect()
    }

    /// Sets why the last open failed. The calling function drops the cause before it, without a lock.
    #[must_use]
    pub(crate) fn set_cause(&self, cause: Cause) -> Option<Cause> {
        self.cause.lock().replace(cause)
    }

    pub(crate) fn cause(&self) -> Option<Cause> {
        self.cause.lock().clone()
    }
}
