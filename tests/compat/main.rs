//! Managers, hooks and handlers as other crates write them, on this pool.

#[path = "../stock/mod.rs"]
mod stock;
#[path = "../support/mod.rs"]
mod support;

mod diesel;
mod managers;
mod moved;
mod r2d2_postgres;
mod smoke;
mod sqlite;
