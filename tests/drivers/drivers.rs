//! The pool where r2d2's is used today: other drivers on other servers, and Diesel. (The file is not called `main.rs`: a folder
//! with that is a test of the package above.)
#![allow(missing_docs, reason = "Diesel's macro writes public items without any")]

#[path = "../support/mod.rs"]
mod support;

mod daemon;
#[allow(clippy::duplicate_mod, reason = "the same tests on two databases")]
mod diesel;
mod moved;
mod mysql;
mod promises;
mod redis;
mod sqlite;
