//! What a pool and its operator do with connections: open, check and close them (the manager), size pools to the server
//! (budget), have the server clean up (guards), and find and end what is left there (audit).
//!
//! The manager stands here, between what it is configured with (budget, guards) and what asks it for connections
//! (audit).

mod audit;
mod budget;
mod guards;
mod host;
mod manager;
mod names;

pub use audit::{Audit, Backend, Outcome, Owner, Termination, Terminations, audit, audit_with};
pub use budget::{Allowance, Budget, budget};
pub use guards::ServerGuards;
pub use manager::{Pool, PostgresManager};
