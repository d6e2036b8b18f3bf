//! Millpond.

#[cfg(feature = "postgres")]
mod postgres;
