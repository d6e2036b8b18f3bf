//! The examples of threaded servers, each run as its users run it, to its clean end: one file for each kind of end.
//!
//! A program under test is a process of its own. All of them end with their test, and so do those that they start.

#![cfg(all(feature = "postgres", target_os = "linux"))]

#[path = "../support/mod.rs"]
mod support;

mod corner;
mod program;

mod finite;
mod pair;
mod serving;
mod supervised;
