//! What a pool can know when the other side is PostgreSQL.

#![forbid(unsafe_code)]

// Nothing outside its tests uses it until the manager does.
#[allow(dead_code)]
mod observer;
mod scanner;
