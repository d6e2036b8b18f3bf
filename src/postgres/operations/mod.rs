//! What a pool and its operator do with connections: open, check and close them (manager), fit pools to the server's
//! limit (budget), have the server clean up (guards), and find and end backends that are left there (audit).
//!
//! The manager stands here since it uses budget and guards, and the audit uses it.

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
