//! What [`Pool::stats`] says, as metrics by OpenTelemetry's names: [`Pools`].
//!
//! Metrics are **pulled**. A pool counts whether or not anybody looks, so a checkout costs the same with them and without
//! them; who scrapes pays for the scrape. [`Pools`] holds what is shown, and does not keep a pool open: a pool that is gone is
//! shown no more.
//!
//! # `prometheus-client`
//!
//! With the feature `prometheus-client`, [`Pools`] is a `Collector` of that crate:
//!
//! ```
//! # #[cfg(feature = "prometheus-client")]
//! # fn show(pool: &millpond::Pool<impl millpond::Manage>) -> Result<String, std::fmt::Error> {
//! let pools = millpond::metrics::Pools::of(pool);
//! let mut registry = prometheus_client::registry::Registry::default();
//! registry.register_collector(Box::new(pools.clone())); // `pools.add` shows another pool as well
//! let mut page = String::new();
//! prometheus_client::encoding::text::encode(&mut page, &registry)?; // for each scrape
//! # Ok(page)
//! # }
//! ```
//!
//! Serve the page as `application/openmetrics-text; version=1.0.0; charset=utf-8`. Register one collector for all pools: a
//! family of metrics may stand there only once.
//!
//! # The facade
//!
//! With the feature `metrics`, `Pools::report` tells the recorder of the facade `metrics` what has happened since the last
//! report. With `metrics-exporter-prometheus` (without its default features it needs neither tokio nor hyper):
//!
//! ```
//! # #[cfg(feature = "metrics")]
//! # fn show(pool: &millpond::Pool<impl millpond::Manage>) -> Result<String, Box<dyn std::error::Error>> {
//! # use metrics_exporter_prometheus::PrometheusBuilder;
//! let builder = PrometheusBuilder::new().with_recommended_naming(true).set_buckets(&millpond::metrics::BUCKETS)?;
//! let handle = builder.install_recorder()?;
//! let pools = millpond::metrics::Pools::of(pool);
//! pools.report(); // before each scrape
//! let page = handle.render();
//! # Ok(page)
//! # }
//! ```
//!
//! The facade can only be told of single values. So a report tells it of each checkout since the last one, up to a bound, and the
//! usual recorders keep them all until the scrape: see `Pools::report`, and `benches/scrape.rs` for what that costs. A collector
//! has no such cost and no bound; take it where a pool serves more than a hundred thousand checkouts between two scrapes.
//!
//! # Names
//!
//! The first nine are those of OpenTelemetry's [semantic conventions for connection pools][otel], as of version 1.42, where all
//! of them are in development. Names and labels are given to the facade with dots. In Prometheus dots become underscores,
//! a unit becomes a suffix, and so does `_total` for counters, by the [rules of OpenTelemetry][mapping]; what is counted (in
//! braces) becomes none. The convention's instrument for what goes up and down, `UpDownCounter`, is a gauge.
//!
//! | name | kind, unit | from |
//! |---|---|---|
//! | `db.client.connection.count` | gauge, `{connection}` | `idle` and `in_use`, as `db.client.connection.state` = `idle`, `used` |
//! | `db.client.connection.idle.max` | gauge, `{connection}` | `max_size`: all may be idle |
//! | `db.client.connection.idle.min` | gauge, `{connection}` | `min_idle` |
//! | `db.client.connection.max` | gauge, `{connection}` | `max_size` |
//! | `db.client.connection.pending_requests` | gauge, `{request}` | `waiting` |
//! | `db.client.connection.timeouts` | counter, `{timeout}` | `timeouts` |
//! | `db.client.connection.create_time` | histogram, `s` | `open_time` |
//! | `db.client.connection.wait_time` | histogram, `s` | `wait_time` without `left_time`; 0 for the other `checkouts` |
//! | `db.client.connection.use_time` | histogram, `s` | `usage_time` |
//! | `millpond.connections` | gauge, `{connection}` | `opening`, `checking`, `closing`, as `state` |
//! | `millpond.connections.opened` | counter, `{connection}` | `opens` |
//! | `millpond.connections.open_failures` | counter, `{attempt}` | `failed_opens_by_type`, as `error.type` |
//! | `millpond.connections.closed` | counter, `{connection}` | `closed_for(reason)`, as `reason` |
//! | `millpond.connections.detached` | counter, `{connection}` | `detached` |
//! | `millpond.checkouts` | counter, `{checkout}` | `checkouts` |
//! | `millpond.checkouts.waited` | counter, `{checkout}` | `waits` |
//! | `millpond.checkouts.rejected` | counter, `{checkout}` | `rejected` |
//! | `millpond.checkouts.barged` | counter, `{checkout}` | `barged` |
//! | `millpond.checkouts.leaked` | counter, `{checkout}` | `leaks` |
//! | `millpond.eviction.lateness` | histogram, `s` | `lateness` |
//! | `millpond.eviction.lateness.max` | gauge, `s` | `max_lateness` |
//! | `millpond.evictions.late` | counter, `{eviction}` | `lateness`: those a second late or more |
//! | `millpond.jobs.abandoned` | counter, `{job}` | `abandonments` |
//! | `millpond.jobs.hanging` | gauge, `{job}` | `abandoned` |
//! | `millpond.health` | gauge, `{state}` | `health`: 1 for what it is, 0 for the others, as `state` = `ready`, `busy`, `stuck`, `down`, `closed` |
//! | `millpond.failing.time` | gauge, `s` | `failing`: for how long |
//! | `millpond.log.records.dropped` | counter, `{record}` | `dropped_records` |
//!
//! The types of error are those of [`Cause::error_type`](crate::Cause::error_type). `_OTHER` is there from the beginning, the
//! others from their first failure.
//!
//! The reasons are `idle`, `lifetime`, `broken`, `invalid`, `reset_failed`, `discarded`, `panicked`, `recycled`, `outdated`,
//! `resized`, `pool_closed` and `abandoned`.
//!
//! Every point carries `db.client.connection.pool.name`: the [name](crate::Builder::name) of the pool. (A pool without a name
//! is called by the order of building, `millpond-1`. Name it, or its series change with the order.)
//!
//! Histograms have the bounds [`BUCKETS`], in seconds. A pool's own histogram has finer ones, each an eighth above the one
//! before it. A time that lies less than that below a bound may therefore be counted in the next bucket.
//!
//! [otel]: https://opentelemetry.io/docs/specs/semconv/db/database-metrics/#connection-pools
//! [mapping]: https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/

#[cfg(feature = "prometheus-client")]
mod collector;
mod family;
#[cfg(feature = "metrics")]
mod recorder;

use crate::manage::Manage;
use crate::pool::Pool;
use crate::stats::Stats;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
#[cfg(feature = "metrics")]
use std::sync::atomic::{AtomicBool, Ordering};

/// The bounds of the histograms, in seconds: from 100 µs to 60 s.
pub const BUCKETS: [f64; 18] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// The pools whose metrics are shown. See [the module](self).
///
/// It is a handle: a clone shows the same pools. It keeps no pool open, and shows none that is gone. (A closed pool is there,
/// and its metrics say that it is closed, until the last of its handles and connections is dropped.) A forked child has none of
/// its parent's pools, and shows none of them.
///
/// A look is [`Pool::stats`]: it takes the lock of each pool for a moment. If a pool is down and nobody wants a connection of it,
/// the look asks it to try again, as [`Pool::health`] does, so that what says "down" does not say so for ever.
#[derive(Clone, Default)]
pub struct Pools(Arc<Mutex<Vec<Arc<Shown>>>>);

/// A pool that is shown.
struct Shown {
    /// The pool's name, unless another had it already.
    name: String,
    /// Of no other pool, for as long as `look` is there.
    id: usize,
    look: Box<dyn Fn() -> Option<Stats> + Send + Sync>,
    /// What was reported last, of a pool whose end the facade has to be told. Locked from the look until the recorder knows.
    #[cfg(feature = "metrics")]
    reported: Mutex<Option<Stats>>,
    /// Whether `reported` holds a report. It is read without the lock of that one, which this very thread may hold: a look may
    /// drop the pool's manager, and that drop may look again.
    #[cfg(feature = "metrics")]
    is_reported: AtomicBool,
}

impl Pools {
    /// Shows this pool. [`add`](Pools::add) shows others beside it.
    pub fn of<M: Manage>(pool: &Pool<M>) -> Pools {
        let pools = Pools::default();
        pools.add(pool);
        pools
    }

    /// Shows this pool as well, under its name. (Once: to add it again changes nothing.)
    ///
    /// Names tell pools apart. If a pool that is not closed has the name already, this one is shown with a number behind
    /// it: `orders-2`. It takes the place of a closed pool of its name.
    pub fn add<M: Manage>(&self, pool: &Pool<M>) {
        let (look, id) = (Box::new(pool.observer()), pool.id());
        loop {
            let looks = self.look();
            let present: Vec<_> = looks.iter().filter_map(|(shown, stats)| Some((shown, stats.as_ref()?))).collect();
            let is_free = |name: &String| !present.iter().any(|(shown, stats)| shown.name == *name && !stats.closed);
            let numbered = (2..).map(|n| format!("{}-{n}", pool.name()));
            let mut names = std::iter::once(pool.name().to_string()).chain(numbered);
            let name = names.find(is_free).expect("one of so many names is free");
            let mut all = self.0.lock();
            if all.iter().any(|shown| shown.id == id) {
                return;
            }
            // Another thread has added one since the look, and it may have this name.
            if all.iter().any(|shown| !looks.iter().any(|(s, _)| Arc::ptr_eq(s, shown))) {
                continue;
            }
            // (A closed pool whose name it takes stays until it is gone: the facade is told what that counted. It stands before
            // this one, which then has the last word.)
            all.push(Arc::new(Shown {
                name,
                id,
                look,
                #[cfg(feature = "metrics")]
                reported: Mutex::new(None),
                #[cfg(feature = "metrics")]
                is_reported: AtomicBool::new(false),
            }));
            return;
        }
    }

    /// The pools and what they say, without those that are gone: these are forgotten, unless the facade has to be told.
    fn look(&self) -> Vec<(Arc<Shown>, Option<Stats>)> {
        // The list's lock is not held while a pool is asked: its last reference may be dropped here, and with it a manager.
        let all = self.0.lock().clone();
        let looks: Vec<_> =
            all.into_iter().map(|shown| ((shown.look)(), shown)).map(|(stats, shown)| (shown, stats)).collect();
        self.forget(looks.iter().filter(|(_, stats)| stats.is_none()).map(|(shown, _)| shown));
        looks
    }

    /// Forgets these, which are gone, except where the facade has to be told.
    fn forget<'a>(&self, gone: impl IntoIterator<Item = &'a Arc<Shown>>) {
        let gone: Vec<_> = gone.into_iter().filter(|shown| !shown.was_reported()).collect();
        if !gone.is_empty() {
            self.0.lock().retain(|shown| !gone.iter().any(|s| Arc::ptr_eq(s, shown)));
        }
    }

    #[cfg(feature = "prometheus-client")]
    fn present(&self) -> Vec<(String, Stats)> {
        let looks = self.look().into_iter().filter_map(|(shown, stats)| Some((shown.name.clone(), stats?)));
        let mut present: Vec<(String, Stats)> = Vec::new();
        for (name, stats) in looks {
            // Of two with one name the first is closed, and the other one has taken its place.
            present.retain(|(other, _)| *other != name);
            present.push((name, stats));
        }
        present
    }
}

impl Shown {
    #[cfg(feature = "metrics")]
    fn was_reported(&self) -> bool {
        self.is_reported.load(Ordering::SeqCst)
    }

    #[cfg(not(feature = "metrics"))]
    fn was_reported(&self) -> bool {
        false
    }
}

impl fmt::Debug for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.lock().iter().map(|shown| &shown.name)).finish()
    }
}
