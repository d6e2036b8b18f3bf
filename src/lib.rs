//! Millpond.
#![forbid(unsafe_code)]

mod clock;
mod ledger;
mod stats;
