//! [`Conn`]: a connection in its box, with what belongs to it.

use crate::leaf::clock::Moment;
use crate::ledger::Token;
use crate::manage::Manage;
use r2d2::Extensions;

/// A connection, and its owner: what keeps the pool's memory alive while the connection is in use. Its box is made when
/// it is opened, and moved from then on.
pub(crate) struct Conn<M: Manage, O> {
    pub(crate) owner: O,
    pub(crate) id: u64,
    pub(crate) born: Moment,
    pub(crate) inner: M::Connection,
    pub(crate) extensions: Extensions,
    /// Whether a customizer's `on_acquire` has succeeded: only then `on_release` is called.
    pub(crate) acquired: bool,
    /// What is true of it in use only.
    pub(crate) checkout: Checkout,
}

/// One checkout.
pub(crate) struct Checkout {
    /// The slot. `None`: the connection is not in use.
    pub(crate) token: Option<Token>,
    /// Whether the thread that took the connection was panicking already.
    pub(crate) panicking: bool,
    /// When it began, if there are events to tell.
    pub(crate) begun: Moment,
}

impl<M: Manage, O> Conn<M, O> {
    pub(crate) fn new(owner: O, id: u64, born: Moment, inner: M::Connection, acquired: bool) -> Self {
        let checkout = Checkout { token: None, panicking: false, begun: Moment::BIRTH };
        Conn { owner, id, born, inner, extensions: Extensions::new(), acquired, checkout }
    }
}
