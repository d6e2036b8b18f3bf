//! [`Conn`]: a connection in its box, with what belongs to it.

use crate::leaf::clock::Moment;
use crate::ledger::Token;
use crate::manage::Manage;
use r2d2::Extensions;

/// A connection, and `owner`: what keeps the pool's memory alive while the connection is in use. The box of a `Conn` is
/// made once, when the connection is opened: a checkout or return moves the box and allocates nothing.
pub(crate) struct Conn<M: Manage, O> {
    pub(crate) owner: O,
    pub(crate) id: u64,
    pub(crate) born: Moment,
    pub(crate) inner: M::Connection,
    pub(crate) extensions: Extensions,
    /// Whether a customizer's `on_acquire` has succeeded: only then `on_release` is called.
    pub(crate) acquired: bool,
    /// What is true only while the connection is in use.
    pub(crate) checkout: Checkout,
}

/// One checkout.
pub(crate) struct Checkout {
    /// The slot's token. `None`: the connection is not in use.
    pub(crate) token: Option<Token>,
    /// Whether the caller's thread was panicking already when the checkout began.
    pub(crate) panicking: bool,
    /// When the checkout began. Set only if there is an event handler.
    pub(crate) begun: Moment,
}

impl<M: Manage, O> Conn<M, O> {
    pub(crate) fn new(owner: O, id: u64, born: Moment, inner: M::Connection, acquired: bool) -> Self {
        let checkout = Checkout { token: None, panicking: false, begun: Moment::BIRTH };
        Conn { owner, id, born, inner, extensions: Extensions::new(), acquired, checkout }
    }

    /// The connection with its token: a caller has it from now on.
    #[inline]
    pub(crate) fn checked_out(mut self: Box<Self>, token: Token) -> Box<Self> {
        self.checkout.token = Some(token);
        self
    }
}
