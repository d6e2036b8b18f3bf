//! The metrics of pools: their names, held against the convention; what they say; and that alerts and dashboard, as they stand in
//! `monitoring/`, work with a real Prometheus.

#[path = "../fake/mod.rs"]
mod fake;
#[path = "../support/mod.rs"]
mod support;

mod alerts;
mod causes;
mod monitoring;
mod names;
mod page;
mod prometheus;
mod shown;
