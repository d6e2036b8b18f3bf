//! [`audit`](audit()): the server's view of an application's backends, joined with the pool's own.
//!
//! If a backend is called orphaned, an operator may end it. So every owner but "unknown" needs a proof: the kernel's
//! word on both ends of that very connection ([`Host::holder`](super::host::Host::holder)), or a connection of this
//! process's own. The process id in an `application_name` is a hint for people, and proves nothing: it may be 1 in each
//! container, and a pooler passes on the name of a client on another machine.

mod backend;
mod display;
mod errand;
mod join;
mod question;
mod termination;
mod viewpoint;

pub use backend::{Audit, Backend, Owner};
pub use join::{audit, audit_with};
pub use termination::{Outcome, Termination, Terminations};
