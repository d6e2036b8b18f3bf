//! One connection, from its login to its end: what callers can do with it, and how the pool checks, cleans and closes
//! it.

mod cached;
mod cancel;
mod connection;
mod lru;
mod marked;
mod plain;
mod question;
mod reset;
mod statements;
mod test_transaction;
mod transaction;
mod verdict;

pub use cancel::Canceller;
pub(super) use cancel::{CANCEL_LIMIT, SendCancel, cancel_within, send_within};
pub use connection::Connection;
pub(super) use connection::Opened;
pub(super) use question::column;
pub use reset::Reset;
pub(super) use statements::DEFAULT_CAPACITY;
pub use statements::StatementCacheStats;
pub use transaction::Transaction;
