//! The rules, on virtual time. One file for each subject of the ledger; the [`World`](world::World) in which the tests
//! run; and the property test of all rules together.

mod checkout;
mod demand;
mod expiry;
mod fitness;
mod growth;
mod health;
mod orders;
mod property;
mod queue;
mod reports;
mod slots;
mod watch;
mod world;
