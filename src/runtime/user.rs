//! [`User`]: the manager and the hooks of a pool, and how errors are shown to them.

use crate::error::Cause;
use crate::hooks::Hooks;
use crate::leaf::shield::{Shielded, catch, shielded};
use crate::manage::Manage;

/// The user's manager and hooks.
pub(crate) struct User<M: Manage> {
    // The hooks stand before the manager, so that they are dropped before it: they may use what it owns.
    pub(crate) hooks: Hooks<M>,
    pub(crate) manager: Shielded<M>,
    /// [`Manage::keeps_limits`], asked once.
    pub(crate) keeps_limits: bool,
}

impl<M: Manage> User<M> {
    pub(crate) fn new(manager: M, hooks: Hooks<M>) -> Self {
        User { keeps_limits: manager.keeps_limits(), manager: Shielded::new(manager), hooks }
    }

    /// The manager's explanation of an error.
    pub(crate) fn explain(&self, error: &M::Error) -> Cause {
        catch(|| self.manager.explain(error)).unwrap_or_else(Cause::from)
    }

    /// Hands an error to the user's handler, if there is one.
    pub(crate) fn handle(&self, error: M::Error) {
        match &self.hooks.errors {
            Some(handler) => shielded(|| handler.handle_error(error)),
            None => shielded(|| drop(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doc_manager::DocManager;
    use crate::event::HandleEvent;
    use crate::{Opening, Returned};
    use parking_lot::Mutex;
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::time::Duration;

    /// Enters its name in a list when it is dropped.
    #[derive(Debug)]
    struct Named(&'static str, Arc<Mutex<Vec<&'static str>>>);

    impl Drop for Named {
        fn drop(&mut self) {
            self.1.lock().push(self.0);
        }
    }

    impl HandleEvent for Named {}

    impl Manage for Named {
        type Connection = ();
        type Error = Infallible;

        fn open(&self, opening: &Opening) -> Result<(), Infallible> {
            DocManager.open(opening)
        }

        fn validate(&self, conn: &mut (), limit: Duration) -> Result<(), Infallible> {
            DocManager.validate(conn, limit)
        }

        fn returned(&self, conn: &mut ()) -> Returned {
            DocManager.returned(conn)
        }
    }

    #[test]
    fn the_hooks_are_dropped_before_the_manager() {
        let dropped = Arc::default();
        let named = |name| Named(name, Arc::clone(&dropped));
        let mut hooks = Hooks::none();
        hooks.events = Some(Box::new(named("hooks")));
        drop(User::new(named("manager"), hooks));
        assert_eq!(*dropped.lock(), ["hooks", "manager"]);
    }
}
