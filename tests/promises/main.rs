//! What the pool promises, whatever the database: one file for each promise, which begins with the promise.
//!
//! All tests of one program share its threads, its server and its log. A test that loads the machine, or that a load
//! would disturb, holds `alone()`; every other one holds `beside_others()`, so that nothing runs beside one that is
//! alone.

#[path = "../direct/mod.rs"]
mod direct;
#[path = "../fake/mod.rs"]
mod fake;
#[path = "../stock/mod.rs"]
mod stock;
#[path = "../support/mod.rs"]
mod support;

mod at_once;
mod behaviours;
mod bound;
mod broken;
mod build;
mod close;
mod deadline;
mod errors;
mod fair;
mod floor;
mod hang;
mod health;
mod idle;
mod lifetime;
mod panic;
mod shown;
mod stats;
