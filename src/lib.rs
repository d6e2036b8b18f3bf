//! Millpond.
#![forbid(unsafe_code)]

mod builder;
mod clock;
mod connection;
mod crew;
mod error;
pub mod event;
mod guard;
mod jobs;
mod ledger;
mod manage;
mod pool;
mod reaper;
mod shared;
mod stats;
mod waiter;
mod who;

pub use crate::builder::{Builder, Settings, Validate};
pub use crate::connection::PooledConnection;
pub use crate::error::{Cause, Closed, Config, Connect, Error, ErrorKind, Timeout, TooManyWaiting};
pub use crate::guard::{PoolGuard, Workers};
pub use crate::manage::{Manage, Opening, Returned};
pub use crate::pool::{CloseReport, Pool};
pub use crate::stats::{CloseReason, ConnectionInfo, ConnectionState, Connections, Distribution, State, Stats};
pub use r2d2::{self, CustomizeConnection, Extensions, HandleError, ManageConnection};

#[doc(hidden)]
pub mod doc {
    //! What the examples in the documentation pool.

    use crate::{Manage, Opening, Returned};
    use std::convert::Infallible;
    use std::time::Duration;

    /// A manager whose connections are nothing.
    #[derive(Debug)]
    pub struct DocManager;

    impl Manage for DocManager {
        type Connection = ();
        type Error = Infallible;

        fn open(&self, _: &Opening) -> Result<(), Infallible> {
            Ok(())
        }

        fn validate(&self, _: &mut (), _: Duration) -> Result<(), Infallible> {
            Ok(())
        }

        fn returned(&self, _: &mut ()) -> Returned {
            Returned::Keep
        }
    }
}
