//! The guide: what does not belong to one type.
//!
//! To begin with:
//!
//! * [`choosing_the_numbers`]: which settings deserve a thought, and which numbers they take.
//! * [`life_of_a_connection`]: the states, as a picture.
//! * [`shutting_down`]: systemd, Kubernetes, and where `Drop` does not run.
//!
//! In operation:
//!
//! * [`reading_the_stats`]: what each number means, and what to do when it moves.
//! * [`troubleshooting`]: each text that the pool can print, what it means, and where to look.
//! * [`metrics`]: the names, for Prometheus and others; alerts, and a dashboard.
//! * [`logging`]: the records, their levels, and `tracing`.
#![cfg_attr(
    feature = "postgres",
    doc = "",
    doc = "With PostgreSQL:",
    doc = "",
    doc = "* [`tls`]: from `cargo add` to `verify-full`.",
    doc = "* [`many_processes`]: one process, many, and many machines, with PgBouncer, HAProxy and hosts of a failover.",
    doc = "* [`migrations`]: on which connection, and what if eight processes start at once.",
    doc = "* [`rolled_back_tests`]: tests that leave the database as it was."
)]
//!
//! From another pool:
//!
//! * [`coming_from_r2d2`](crate::coming_from_r2d2): by the `use` line.
//! * [`coming_from_psycopg`], [`coming_from_hikaricp`]: names beside names.
//!
//! A name in code font such as `tests/promises/idle.rs::a_burst_then_silence` is the test that shows what was said before it.
//! The files are those of the repository. `bash docs/check` looks whether each such test exists.

#[doc = include_str!("../docs/guide/choosing_the_numbers.md")]
pub mod choosing_the_numbers {}

#[doc = include_str!("../docs/guide/life_of_a_connection.md")]
pub mod life_of_a_connection {}

#[doc = include_str!("../docs/guide/shutting_down.md")]
pub mod shutting_down {}

#[doc = include_str!("../docs/guide/reading_the_stats.md")]
pub mod reading_the_stats {}

#[doc = include_str!("../docs/guide/troubleshooting.md")]
pub mod troubleshooting {}

#[doc = include_str!("../docs/guide/metrics.md")]
pub mod metrics {}

#[doc = include_str!("../docs/guide/logging.md")]
pub mod logging {}

#[cfg(feature = "postgres")]
#[doc = include_str!("../docs/guide/tls.md")]
pub mod tls {}

#[cfg(feature = "postgres")]
#[doc = include_str!("../docs/guide/many_processes.md")]
pub mod many_processes {}

#[cfg(feature = "postgres")]
#[doc = include_str!("../docs/guide/migrations.md")]
pub mod migrations {}

#[cfg(feature = "postgres")]
#[doc = include_str!("../docs/guide/rolled_back_tests.md")]
pub mod rolled_back_tests {}

#[doc = include_str!("../docs/guide/coming_from_psycopg.md")]
pub mod coming_from_psycopg {}

#[doc = include_str!("../docs/guide/coming_from_hikaricp.md")]
pub mod coming_from_hikaricp {}
