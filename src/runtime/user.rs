//! [`User`]: the code that is not the pool's own, and how it is told of errors.

use crate::error::Cause;
use crate::hooks::Hooks;
use crate::leaf::shield::{Shielded, catch, shielded};
use crate::manage::Manage;

/// The user's manager and hooks.
pub(crate) struct User<M: Manage> {
    pub(crate) manager: Shielded<M>,
    /// [`Manage::keeps_limits`], asked once.
    pub(crate) keeps_limits: bool,
    pub(crate) hooks: Hooks<M>,
}

impl<M: Manage> User<M> {
    pub(crate) fn new(manager: M, hooks: Hooks<M>) -> Self {
        User { keeps_limits: manager.keeps_limits(), manager: Shielded::new(manager), hooks }
    }

    /// An error in words.
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
