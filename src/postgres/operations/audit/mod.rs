//! [`audit`](audit()): the server's view of an application's backends, joined with the pool's own.
//!
//! To call a backend orphaned is to invite an operator to end it. So each word but "unknown" takes proof: the kernel's,
//! on both ends of that very connection ([`Host::holder`](super::host::Host::holder)), or that of a connection of this
//! process's own. The process id in an `application_name` is a hint for human beings, and proves nothing: in each
//! container it may be 1, and a pooler passes on that of a client on another machine.

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
