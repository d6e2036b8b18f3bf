//! [`PooledConnection`]: a connection in use, and the way of its return.

use crate::event::CheckinEvent;
use crate::leaf::clock::Moment;
use crate::leaf::shield::{catch, shielded};
use crate::leaf::sync::thread;
use crate::leaf::{in_hand, kept};
use crate::ledger::Condition;
use crate::manage::{Manage, Returned};
use crate::runtime::conn::Conn;
use crate::runtime::shared::PoolConn;
use crate::stats::{CloseReason, ConnectionInfo, ConnectionState};
use r2d2::Extensions;
use std::fmt;
use std::mem;
use std::ops::{Deref, DerefMut};

/// A connection checked out of a [`Pool`](crate::Pool), to which it is returned when this is dropped.
///
/// It derefs to the connection itself, so its own methods are associated functions: `PooledConnection::discard(c)`, not
/// `c.discard()`.
///
/// It does not keep the pool open, and may outlive it. If a panic that began after the checkout drops it, the
/// connection is closed: it may be in the middle of something. If it is [forgotten](std::mem::forget), its slot stays
/// taken for good.
#[must_use = "a connection that is not bound to a name is returned to the pool at once"]
pub struct PooledConnection<M: Manage> {
    /// `None` once it is returned.
    conn: Option<Box<PoolConn<M>>>,
}

const IN_USE: &str = "a connection in use is there until it is dropped";

impl<M: Manage> PooledConnection<M> {
    #[inline]
    pub(crate) fn new(mut conn: Box<PoolConn<M>>, begun: Moment) -> Self {
        conn.checkout.panicking = thread::panicking();
        conn.checkout.begun = begun;
        PooledConnection { conn: Some(conn) }
    }

    #[inline]
    fn conn(&self) -> &PoolConn<M> {
        self.conn.as_deref().expect(IN_USE)
    }

    #[inline]
    fn conn_mut(&mut self) -> &mut PoolConn<M> {
        self.conn.as_deref_mut().expect(IN_USE)
    }

    /// Closes the connection instead of returning it. Use it if you do not trust the connection's state.
    pub fn discard(mut this: Self) {
        this.return_as(Some(Condition::Discard(CloseReason::Discarded)));
    }

    /// Takes the connection out of the pool for good: it is yours. The pool no longer counts it, and may open another
    /// in its place. A customizer's `on_release` is not called for it, and its extensions are dropped.
    pub fn detach(mut this: Self) -> M::Connection {
        let mut conn = this.conn.take().expect(IN_USE);
        let token = conn.checkout.token.take();
        // (In a forked child the ledger belongs to the parent.)
        let shared = &conn.owner;
        if let Some(token) = token.filter(|_| !shared.is_forked()) {
            let now = shared.time.now();
            shared.with(|l| l.detach(now, token));
            let opening = shared.openings.remove(conn.id);
            shielded(|| drop(opening));
        }
        let Conn { owner, inner, extensions, .. } = *conn;
        drop(owner);
        shielded(|| drop(extensions));
        inner
    }

    /// What the pool knows of this connection: number, age, uses, where it was checked out.
    pub fn info(this: &Self) -> ConnectionInfo {
        let Conn { owner: shared, id, born, .. } = this.conn();
        if shared.is_forked() {
            // The info is made without the ledger, which belongs to the parent process.
            let age = shared.time.precise().since(*born);
            let state = ConnectionState::InUse;
            return ConnectionInfo {
                id: *id,
                server_id: None,
                state,
                since: age,
                age,
                uses: 1,
                location: None,
                thread: None,
            };
        }
        let slots = shared.slots(|slot| slot.id == *id);
        shared.describe(slots).pop().expect("a connection in use has a slot")
    }

    /// What was attached to this connection. It stays with the connection from one checkout to the next.
    pub fn extensions(this: &Self) -> &Extensions {
        &this.conn().extensions
    }

    /// The same, to be changed: attach prepared statements, say.
    pub fn extensions_mut(this: &mut Self) -> &mut Extensions {
        &mut this.conn_mut().extensions
    }

    /// Returns the connection in this condition. `None`: in the condition that the manager finds.
    #[inline]
    fn return_as(&mut self, condition: Option<Condition>) {
        let Some(mut conn) = self.conn.take() else { return };
        let Some(token) = conn.checkout.token.take() else { return };
        let shared = &conn.owner;
        // From now on the connection is unused.
        let now = shared.time.now();
        if shared.time.seems_forked(now) {
            // The connection belongs to the parent process: a look at it would read bytes that are meant for the
            // parent.
            return mem::forget((token, conn));
        }
        // Taken early: the comparison within waits for what it has only just written, which costs nothing where there is
        // other work to do meanwhile.
        let core = kept::take(&shared.core);
        let in_hand = in_hand::with(shared.address(), conn.id);
        let condition = match condition {
            Some(condition) => condition,
            None if thread::panicking() && !conn.checkout.panicking => Condition::Discard(CloseReason::Panicked),
            None => match catch(|| shared.user.manager.returned(&mut conn.inner)) {
                Ok(Returned::Keep) => Condition::Keep,
                Ok(Returned::Reset) => Condition::Reset,
                Ok(Returned::Discard) => Condition::Discard(CloseReason::Discarded),
                Ok(Returned::Broken) => Condition::Broken,
                Ok(Returned::Outdated) => Condition::Outdated,
                Err(_) => Condition::Discard(CloseReason::Panicked),
            },
        };
        if let Some(events) = &shared.user.hooks.events {
            let (id, duration) = (token.id(), now.since(conn.checkout.begun));
            shielded(|| events.handle_checkin(CheckinEvent { id, duration }));
        }
        drop(in_hand);
        // A connection was found dead at the end of the look above, not at the beginning of the return.
        let now = if condition == Condition::Keep { now } else { shared.time.now() };
        let has_waiters = shared.time.has_waiters();
        core.returned(now, token, conn, condition, has_waiters);
        kept::keep(core);
    }
}

impl<M: Manage> Drop for PooledConnection<M> {
    #[inline]
    fn drop(&mut self) {
        self.return_as(None);
    }
}

impl<M: Manage> Deref for PooledConnection<M> {
    type Target = M::Connection;

    #[inline]
    fn deref(&self) -> &M::Connection {
        &self.conn().inner
    }
}

impl<M: Manage> DerefMut for PooledConnection<M> {
    #[inline]
    fn deref_mut(&mut self) -> &mut M::Connection {
        &mut self.conn_mut().inner
    }
}

/// Shows the pool's name and the connection's number, whatever the connection is.
impl<M: Manage> fmt::Debug for PooledConnection<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conn = self.conn();
        f.debug_struct("PooledConnection").field("pool", &conn.owner.name).field("id", &conn.id).finish_non_exhaustive()
    }
}
