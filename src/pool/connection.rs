//! [`PooledConnection`]: a borrowed connection, and the box it travels in.

use crate::event::CheckinEvent;
use crate::leaf::clock::Moment;
use crate::leaf::in_hand;
use crate::leaf::shield::{catch, shielded};
use crate::ledger::{Condition, Token};
use crate::manage::{Manage, Returned};
use crate::runtime::kept;
use crate::runtime::shared::Shared;
use crate::stats::{CloseReason, ConnectionInfo, ConnectionState};
use r2d2::Extensions;
use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread;

/// A connection in its box, which is made at its birth and moved from then on.
pub(crate) struct Conn<M: Manage> {
    link: Link<M>,
    conn: M::Connection,
    extensions: Extensions,
    /// Whether a customizer's `on_acquire` has succeeded: only then `on_release` is called.
    acquired: bool,
    /// The permit, while it is lent.
    token: Option<Token>,
    /// Whether the thread that took it was panicking already.
    panicking: bool,
    /// When it was lent, if there are events to tell it.
    lent: Moment,
}

/// What does not change in the life of a connection.
pub(crate) struct Link<M: Manage> {
    pub(crate) shared: Arc<Shared<M>>,
    pub(crate) id: u64,
    pub(crate) born: Moment,
}

impl<M: Manage> Link<M> {
    /// What can be said of a connection without the pool's books, which in a forked child are the parent's.
    fn info(&self) -> ConnectionInfo {
        let age = self.shared.clock.precise().since(self.born);
        let state = ConnectionState::InUse;
        ConnectionInfo { id: self.id, server_id: None, state, since: age, age, uses: 1, location: None, thread: None }
    }
}

impl<M: Manage> Conn<M> {
    pub(crate) fn new(link: Link<M>, conn: M::Connection, acquired: bool) -> Self {
        Conn { link, conn, extensions: Extensions::new(), acquired, token: None, panicking: false, lent: Moment::BIRTH }
    }

    pub(crate) fn get(&self) -> &M::Connection {
        &self.conn
    }

    pub(crate) fn get_mut(&mut self) -> &mut M::Connection {
        &mut self.conn
    }

    pub(crate) fn link(&self) -> &Link<M> {
        &self.link
    }

    pub(crate) fn into_parts(self) -> (M::Connection, Extensions, bool) {
        let Conn { conn, extensions, acquired, .. } = self;
        (conn, extensions, acquired)
    }
}

/// A connection borrowed from a [`Pool`](crate::Pool), which gets it back when this is dropped.
///
/// It derefs to the connection itself, so what can be done with it as a borrowed one are associated functions:
/// `PooledConnection::discard(c)`, not `c.discard()`.
///
/// It does not keep the pool open, and may outlive it. Dropped by a panic that began after it was taken, the connection
/// is closed: it may be in the middle of something. [Forgotten](std::mem::forget), it takes its permit with it for good.
#[must_use = "a connection that is not bound to a name goes back to the pool at once"]
pub struct PooledConnection<M: Manage> {
    conn: Option<Box<Conn<M>>>,
}

const TAKEN: &str = "a borrowed connection is there until it is dropped";

impl<M: Manage> PooledConnection<M> {
    #[inline]
    pub(crate) fn new(token: Token, mut conn: Box<Conn<M>>, lent: Moment) -> Self {
        conn.token = Some(token);
        conn.lent = lent;
        conn.panicking = thread::panicking();
        PooledConnection { conn: Some(conn) }
    }

    #[inline]
    fn conn(&self) -> &Conn<M> {
        self.conn.as_deref().expect(TAKEN)
    }

    #[inline]
    fn conn_mut(&mut self) -> &mut Conn<M> {
        self.conn.as_deref_mut().expect(TAKEN)
    }

    /// Closes the connection instead of returning it: for one whose state you do not trust.
    pub fn discard(this: Self) {
        this.give_back(Some(Condition::Discard(CloseReason::Discarded)));
    }

    /// Takes the connection out of the pool, for good: it is yours, the pool no longer counts it, and may open another
    /// in its place. A customizer's `on_release` is not called for it, and its extensions are dropped.
    pub fn detach(mut this: Self) -> M::Connection {
        let mut conn = this.conn.take().expect(TAKEN);
        let token = conn.token.take();
        // (In a forked child the books are the parent's.)
        let shared = &conn.link.shared;
        if let Some(token) = token.filter(|_| !shared.is_forked()) {
            let now = shared.now();
            shared.with(|l| l.detach(now, token));
            let opening = shared.openings.lock().remove(&conn.link.id);
            shielded(|| drop(opening));
        }
        let (conn, extensions, _) = conn.into_parts();
        shielded(|| drop(extensions));
        conn
    }

    /// What the pool knows of this connection: number, age, uses, where it was checked out.
    pub fn info(this: &Self) -> ConnectionInfo {
        let link = this.conn().link();
        if link.shared.is_forked() {
            return link.info();
        }
        let rows = link.shared.rows(|row| row.id == link.id);
        link.shared.describe(rows).pop().expect("a borrowed connection has a row")
    }

    /// What was attached to this connection. It stays with it from one checkout to the next.
    pub fn extensions(this: &Self) -> &Extensions {
        &this.conn().extensions
    }

    /// What is attached to this connection, to be changed: prepared statements, say.
    pub fn extensions_mut(this: &mut Self) -> &mut Extensions {
        &mut this.conn_mut().extensions
    }

    #[inline]
    fn give_back(mut self, back: Option<Condition>) {
        self.put_back(back);
    }

    /// Returns the connection, as `back` says or as the manager finds it.
    #[inline]
    fn put_back(&mut self, back: Option<Condition>) {
        let Some(mut conn) = self.conn.take() else { return };
        let Some(token) = conn.token.take() else { return };
        let shared = &conn.link.shared;
        // From now on it is unused.
        let now = shared.now();
        if shared.seems_forked(now) {
            // It is the parent's: to look at it is to read what is meant for that.
            return mem::forget((token, conn));
        }
        let here = in_hand::with(shared.address(), conn.link.id);
        let back = match back {
            Some(back) => back,
            None if thread::panicking() && !conn.panicking => Condition::Discard(CloseReason::Panicked),
            None => match catch(|| shared.manager.returned(&mut conn.conn)) {
                Ok(Returned::Keep) => Condition::Keep,
                Ok(Returned::Reset) => Condition::Reset,
                Ok(Returned::Discard) => Condition::Discard(CloseReason::Discarded),
                Ok(Returned::Broken) => Condition::Broken,
                Ok(Returned::Outdated) => Condition::Outdated,
                Err(_) => Condition::Discard(CloseReason::Panicked),
            },
        };
        if let Some(events) = &shared.hooks.events {
            let (id, duration) = (token.id(), shared.now().since(conn.lent));
            shielded(|| events.handle_checkin(CheckinEvent { id, duration }));
        }
        drop(here);
        // A finding is as late as it is.
        let now = if back == Condition::Keep { now } else { shared.now() };
        let core = kept::hold(&shared.core);
        core.returned(now, token, conn, back);
        kept::stow(core);
    }
}

impl<M: Manage> Drop for PooledConnection<M> {
    #[inline]
    fn drop(&mut self) {
        self.put_back(None);
    }
}

impl<M: Manage> Deref for PooledConnection<M> {
    type Target = M::Connection;

    #[inline]
    fn deref(&self) -> &M::Connection {
        &self.conn().conn
    }
}

impl<M: Manage> DerefMut for PooledConnection<M> {
    #[inline]
    fn deref_mut(&mut self) -> &mut M::Connection {
        &mut self.conn_mut().conn
    }
}

/// The pool and the number, whatever the connection is.
impl<M: Manage> fmt::Debug for PooledConnection<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = self.conn().link();
        f.debug_struct("PooledConnection")
            .field("pool", &link.shared.name)
            .field("id", &link.id)
            .finish_non_exhaustive()
    }
}
