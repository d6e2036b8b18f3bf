//! The crate's own PostgreSQL manager, on real servers: one file for each subject.
//!
//! All tests of one program share its server and its log. A test that loads the machine, or that a load would disturb,
//! holds `alone()`; every other one holds `beside_others()`, so that nothing runs beside one that is alone.

#![cfg(feature = "postgres")]

#[path = "../support/mod.rs"]
mod support;
#[path = "../support/tls.rs"]
mod tls;

#[cfg(target_os = "linux")]
mod at_once;
mod audit;
mod behaviours;
#[cfg(target_os = "linux")]
mod bouncer;
mod budget;
mod close;
#[cfg(target_os = "linux")]
mod failover;
#[cfg(target_os = "linux")]
mod faults;
mod guards;
mod guide;
mod handover;
mod hostile;
mod manager;
#[cfg(target_os = "linux")]
mod orphans;
mod password;
mod refusals;
mod session;
#[cfg(target_os = "linux")]
mod silence;
mod statements;
mod test_transaction;
mod transactions;
#[cfg(target_os = "linux")]
mod unix;
mod versions;
