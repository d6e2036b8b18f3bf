//! Events, for a program that counts for itself: r2d2's method names, with types of this crate's own (r2d2's have no
//! public constructors).

use std::fmt;
use std::time::Duration;

use crate::stats::CloseReason;

/// Is told of what happens in a pool. Every method does nothing by default.
///
/// `handle_acquire` and `handle_release` run on the pool's own threads, the others on the thread that uses the pool:
/// they should be quick. A panic in one of them costs nothing but the panic's message.
pub trait HandleEvent: fmt::Debug + Send + Sync + 'static {
    /// A connection was opened.
    fn handle_acquire(&self, _event: AcquireEvent) {}

    /// A connection is about to be closed.
    fn handle_release(&self, _event: ReleaseEvent) {}

    /// A connection was checked out.
    fn handle_checkout(&self, _event: CheckoutEvent) {}

    /// No connection came in time.
    fn handle_timeout(&self, _event: TimeoutEvent) {}

    /// A connection is returned. Called before it is available again.
    fn handle_checkin(&self, _event: CheckinEvent) {}
}

/// A `HandleEvent` that does nothing.
#[derive(Clone, Copy, Debug)]
pub struct NopEventHandler;

impl HandleEvent for NopEventHandler {}

macro_rules! event {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident as $method:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            $(pub(crate) $field: $type,)*
        }

        impl $name {
            $($(#[$field_doc])*
            pub fn $method(&self) -> $type {
                self.$field
            })*
        }
    };
}

event! {
    /// A connection was opened.
    AcquireEvent {
        /// The number of the connection, unique within its pool.
        id as connection_id: u64,
        /// How long that took, hooks included.
        duration as duration: Duration,
    }
}

event! {
    /// A connection is about to be closed.
    ReleaseEvent {
        /// The number of the connection.
        id as connection_id: u64,
        /// The time since its opening began.
        age as age: Duration,
        /// Why.
        reason as reason: CloseReason,
    }
}

event! {
    /// A connection was checked out.
    CheckoutEvent {
        /// The number of the connection.
        id as connection_id: u64,
        /// How long the caller waited for it; zero if it did not have to.
        duration as duration: Duration,
    }
}

event! {
    /// No connection came in time.
    TimeoutEvent {
        /// How long the caller was ready to wait.
        timeout as timeout: Duration,
    }
}

event! {
    /// A connection is returned.
    CheckinEvent {
        /// The number of the connection.
        id as connection_id: u64,
        /// How long it was checked out, in steps of the system's coarse clock (4 ms on most Linux systems).
        duration as duration: Duration,
    }
}
