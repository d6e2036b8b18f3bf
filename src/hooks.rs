//! [`Hooks`]: the user's own code that the pool calls, beside the manager.

use crate::event::HandleEvent;
use crate::leaf::shield::shielded;
use crate::manage::Manage;
use r2d2::{CustomizeConnection, HandleError};
use std::fmt;

/// The customizer, the error handler and the event handler of a pool. A drop of them that panics is caught.
pub(crate) struct Hooks<M: Manage> {
    pub(crate) customizer: Option<Box<dyn CustomizeConnection<M::Connection, M::Error>>>,
    pub(crate) errors: Option<Box<dyn HandleError<M::Error>>>,
    pub(crate) events: Option<Box<dyn HandleEvent>>,
}

impl<M: Manage> Hooks<M> {
    pub(crate) fn none() -> Self {
        Hooks { customizer: None, errors: None, events: None }
    }
}

impl<M: Manage> Drop for Hooks<M> {
    fn drop(&mut self) {
        // Each is dropped by itself: if two panicked in one drop, the second would end the process.
        let Hooks { customizer, errors, events } = self;
        let (customizer, errors, events) = (customizer.take(), errors.take(), events.take());
        shielded(|| drop(customizer));
        shielded(|| drop(errors));
        shielded(|| drop(events));
    }
}

impl<M: Manage> fmt::Debug for Hooks<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Hooks { customizer, errors, events } = self;
        f.debug_struct("Hooks").field("customizer", customizer).field("errors", errors).field("events", events).finish()
    }
}
