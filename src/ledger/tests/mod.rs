//! The rules, on virtual time. One file for each subject of the ledger; the [`World`](world::World) that they run in;
//! and the property test, which holds all of them together.

mod checkout;
mod demand;
mod expiry;
mod fitness;
mod orders;
mod property;
mod queue;
mod reports;
mod slots;
mod world;
