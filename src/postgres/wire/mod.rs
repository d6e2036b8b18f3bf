//! The bytes of one connection: how they are watched, what is known from them, and how the connection is aborted.
//!
//! It is made by hand, since `postgres` has no hook for any of this, and `postgres-protocol` parses whole messages out
//! of buffers.
//!
//! From the bottom up: [`frames`] cuts bytes into messages, [`scanner`] follows the protocol, and [`watch`] shares what
//! is known between the stream and the pool. [`negotiation`] and [`tap`] make the stream, and [`observer`] opens
//! connections over it. [`look`](mod@look) looks at a client without asking its server, and [`probe`] is the stream's
//! part in that.

mod frames;
mod look;
mod negotiation;
mod observer;
mod probe;
mod scanner;
mod tap;
#[cfg(test)]
mod tests;
#[cfg(unix)]
mod unix;
mod watch;

pub(super) use look::{drop_notifications, flush, look};
pub(super) use negotiation::{NegotiationError, is_answer_in_clear};
pub use observer::Connector;
pub(super) use observer::{ConnectError, Loopback, Observer};
pub(super) use scanner::Status;
pub(super) use watch::Watch;
