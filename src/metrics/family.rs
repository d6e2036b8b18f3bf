//! The one list of metric families: what each is called, and which part of [`Stats`] it shows. What exposes them adds nothing.

#[cfg(any(test, feature = "prometheus-client"))]
use super::BUCKETS;
use crate::leaf::failures::ErrorType;
use crate::leaf::histogram::Distribution;
use crate::stats::{CloseReason, Stats};
use std::borrow::Cow;
use std::time::Duration;

/// The attribute that names the pool, on every point of every family.
pub(super) const POOL: &str = "db.client.connection.pool.name";
/// The convention's attribute for what a connection does.
const STATE: &str = "db.client.connection.state";

/// Metrics of one name.
pub(super) struct Family {
    /// With dots, as OpenTelemetry has it.
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// In the notation of the convention (UCUM): `s`, or what is counted, in braces.
    pub(super) unit: &'static str,
    pub(super) help: &'static str,
    pub(super) points: fn(&Stats) -> Vec<Point>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    /// The convention's `UpDownCounter`.
    Gauge,
    Histogram,
}

/// One value of a family, apart from the others by a label.
pub(super) struct Point {
    pub(super) label: Option<(&'static str, Cow<'static, str>)>,
    pub(super) value: Value,
}

pub(super) enum Value {
    Count(u64),
    Level(f64),
    Times(Box<Times>),
}

impl Family {
    pub(super) fn is_in_seconds(&self) -> bool {
        self.unit == "s"
    }
}

/// A histogram: what was recorded, and how many took no time at all.
pub(super) struct Times {
    pub(super) zeros: u64,
    pub(super) recorded: Distribution,
}

impl Times {
    pub(super) fn count(&self) -> u64 {
        self.zeros + self.recorded.count()
    }

    /// How many lie below each bound of [`BUCKETS`] and above the one before it, by the end of their bucket in the pool's own
    /// histogram. (Not by [`Distribution::at_most`]: it knows the greatest of all, and so a later one may make it smaller.)
    #[cfg(any(test, feature = "prometheus-client"))]
    pub(super) fn by_bucket(&self) -> [u64; BUCKETS.len() + 1] {
        let mut counts = [0; BUCKETS.len() + 1];
        counts[0] = self.zeros;
        for (end, n) in self.recorded.buckets() {
            counts[BUCKETS.partition_point(|&bound| bound < end.as_secs_f64())] += n;
        }
        counts
    }
}

// -------------------------------------------------------------------------------------------------- how they are written

const fn counter(name: &'static str, unit: &'static str, help: &'static str, of: fn(&Stats) -> Vec<Point>) -> Family {
    Family { name, kind: Kind::Counter, unit, help, points: of }
}

const fn gauge(name: &'static str, unit: &'static str, help: &'static str, of: fn(&Stats) -> Vec<Point>) -> Family {
    Family { name, kind: Kind::Gauge, unit, help, points: of }
}

const fn histogram(name: &'static str, help: &'static str, of: fn(&Stats) -> Vec<Point>) -> Family {
    Family { name, kind: Kind::Histogram, unit: "s", help, points: of }
}

fn one(value: Value) -> Vec<Point> {
    vec![Point { label: None, value }]
}

fn count(n: u64) -> Vec<Point> {
    one(Value::Count(n))
}

fn level(n: impl Into<f64>) -> Vec<Point> {
    one(Value::Level(n.into()))
}

fn seconds(time: Option<Duration>) -> Vec<Point> {
    level(time.unwrap_or_default().as_secs_f64())
}

fn times(recorded: &Distribution) -> Vec<Point> {
    one(Value::Times(Box::new(Times { zeros: 0, recorded: recorded.clone() })))
}

fn levels<const N: usize>(key: &'static str, levels: [(&'static str, u32); N]) -> Vec<Point> {
    let point =
        |(value, n): (&'static str, u32)| Point { label: Some((key, value.into())), value: Value::Level(f64::from(n)) };
    levels.map(point).into()
}

/// Of each checkout that was served, how long it waited: nothing, most of the time, and that only `checkouts` counts.
fn wait_time(s: &Stats) -> Vec<Point> {
    let recorded = s.wait_time.since(&s.left_time);
    one(Value::Times(Box::new(Times { zeros: s.checkouts.saturating_sub(recorded.count()), recorded })))
}

fn closed(s: &Stats) -> Vec<Point> {
    let point = |reason: CloseReason| Point {
        label: Some(("reason", key(reason).into())),
        value: Value::Count(s.closed_for(reason)),
    };
    CloseReason::ALL.map(point).into()
}

/// By the convention's attribute for errors. What has no type is always there, so that there is a point.
fn failed(s: &Stats) -> Vec<Point> {
    let point = |error_type: &ErrorType, n| Point {
        label: Some(("error.type", error_type.as_str().to_owned().into())),
        value: Value::Count(n),
    };
    let typed = s.failures.iter().filter(|&(t, _)| *t != ErrorType::OTHER).map(|(t, n)| point(t, n));
    std::iter::once(point(&ErrorType::OTHER, s.failures.of(&ErrorType::OTHER))).chain(typed).collect()
}

/// By how much an eviction is late that counts as late.
const LATE: Duration = Duration::from_secs(1);

/// How many were longer, by the end of their bucket.
fn longer_than(recorded: &Distribution, limit: Duration) -> u64 {
    recorded.buckets().filter(|&(end, _)| end > limit).map(|(_, n)| n).sum()
}

/// The reason as a label, which stays what it is when the words of log records change.
fn key(reason: CloseReason) -> &'static str {
    match reason {
        CloseReason::Idle => "idle",
        CloseReason::Lifetime => "lifetime",
        CloseReason::Broken => "broken",
        CloseReason::Invalid => "invalid",
        CloseReason::ResetFailed => "reset_failed",
        CloseReason::Discarded => "discarded",
        CloseReason::Panicked => "panicked",
        CloseReason::Recycled => "recycled",
        CloseReason::Outdated => "outdated",
        CloseReason::Resized => "resized",
        CloseReason::Closed => "pool_closed",
        CloseReason::Abandoned => "abandoned",
    }
}

fn health(s: &Stats) -> Vec<Point> {
    let now = s.health.as_str();
    levels("state", ["ready", "busy", "stuck", "down", "closed"].map(|state| (state, u32::from(state == now))))
}

// -------------------------------------------------------------------------------------------------- the list

/// All families. Those of the convention come first, in its order.
pub(super) static FAMILIES: &[Family] = &[
    gauge("db.client.connection.count", "{connection}", "Connections that are idle, or used (checked out)", |s| {
        levels(STATE, [("idle", s.idle), ("used", s.in_use)])
    }),
    gauge(
        "db.client.connection.idle.max",
        "{connection}",
        "The greatest number of idle connections: as many as there may be of all",
        |s| level(s.max_size),
    ),
    gauge(
        "db.client.connection.idle.min",
        "{connection}",
        "The number of connections that are kept although nobody uses them",
        |s| level(s.min_idle),
    ),
    gauge("db.client.connection.max", "{connection}", "The greatest number of connections", |s| level(s.max_size)),
    gauge("db.client.connection.pending_requests", "{request}", "Callers that wait for a connection", |s| {
        level(s.waiting)
    }),
    counter("db.client.connection.timeouts", "{timeout}", "Callers that got no connection in time", |s| {
        count(s.timeouts)
    }),
    histogram("db.client.connection.create_time", "How long it took to open a connection", |s| times(&s.open_time)),
    histogram(
        "db.client.connection.wait_time",
        "How long callers waited that got a connection, zero where one was there",
        wait_time,
    ),
    histogram("db.client.connection.use_time", "How long connections were checked out", |s| times(&s.usage_time)),
    // What only this pool knows.
    gauge(
        "millpond.connections",
        "{connection}",
        "Connections that are neither idle nor used: being opened, checked (validated, reset) or closed",
        |s| levels("state", [("opening", s.opening), ("checking", s.checking), ("closing", s.closing)]),
    ),
    counter("millpond.connections.opened", "{connection}", "Connections that were opened", |s| count(s.opens)),
    counter(
        "millpond.connections.open_failures",
        "{attempt}",
        "Attempts to open a connection that failed, by the type of the error",
        failed,
    ),
    counter("millpond.connections.closed", "{connection}", "Connections that were closed, by the reason", closed),
    counter("millpond.connections.detached", "{connection}", "Connections that users took out of the pool", |s| {
        count(s.detached)
    }),
    counter("millpond.checkouts", "{checkout}", "Connections that were checked out", |s| count(s.checkouts)),
    counter("millpond.checkouts.waited", "{checkout}", "Callers that had to wait", |s| count(s.waits)),
    counter("millpond.checkouts.rejected", "{checkout}", "Callers refused because too many waited already", |s| {
        count(s.rejected)
    }),
    counter("millpond.checkouts.barged", "{checkout}", "Checkouts that were served past a caller that waited", |s| {
        count(s.barged)
    }),
    counter("millpond.checkouts.leaked", "{checkout}", "Checkouts that lasted longer than the leak threshold", |s| {
        count(s.leaks)
    }),
    histogram(
        "millpond.eviction.lateness",
        "By how much the pool was late in closing idle and aged connections",
        |s| times(&s.lateness),
    ),
    gauge("millpond.eviction.lateness.max", "s", "The greatest lateness since the pool was built", |s| {
        seconds(Some(s.max_lateness))
    }),
    counter("millpond.evictions.late", "{eviction}", "Idle and aged connections closed a second late or more", |s| {
        count(longer_than(&s.lateness, LATE))
    }),
    counter("millpond.jobs.abandoned", "{job}", "Opens, checks and closes abandoned past their limit", |s| {
        count(s.abandonments)
    }),
    gauge("millpond.jobs.hanging", "{job}", "Abandoned jobs that have not ended", |s| level(s.abandoned)),
    gauge("millpond.health", "{state}", "1 for the state the pool is in, 0 for the others", health),
    gauge("millpond.failing.time", "s", "For how long attempts to open have failed, 0 while they do not", |s| {
        seconds(s.failing.map(|failing| failing.since))
    }),
    counter("millpond.log.records.dropped", "{record}", "Log records dropped because the logger blocked", |s| {
        count(s.dropped_records)
    }),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_family_is_there_once_and_says_what_it_is() {
        let names: HashSet<_> = FAMILIES.iter().map(|family| family.name).collect();
        assert_eq!(names.len(), FAMILIES.len());
        for family in FAMILIES {
            assert!(family.name.starts_with("db.client.connection.") || family.name.starts_with("millpond."));
            assert!(!family.help.is_empty() && !family.help.contains(['\n', '\\', '"']), "{}", family.name);
            assert!(family.unit == "s" || family.unit.starts_with('{'), "{}", family.name);
        }
    }

    #[test]
    fn a_reason_has_a_label_of_its_own() {
        let keys: HashSet<_> = CloseReason::ALL.map(key).into();
        assert_eq!(keys.len(), CloseReason::ALL.len());
        assert!(keys.iter().all(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '_')), "{keys:?}");
    }

    #[test]
    fn a_bucket_never_loses_what_it_had() {
        let mut recorded = Distribution::default();
        let mut before = [0; BUCKETS.len() + 1];
        // Each is longer than the one before, and most of them lie near a bound.
        for ns in (0..40).flat_map(|octave| [9, 10, 11].map(|n| n << octave)) {
            recorded.record(ns);
            let now = Times { zeros: 0, recorded: recorded.clone() }.by_bucket();
            assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "{ns}: {before:?}, {now:?}");
            before = now;
        }
        assert_eq!(before.iter().sum::<u64>(), recorded.count());
        assert!(before.iter().all(|&n| n > 0), "{before:?}");
    }

    #[test]
    fn a_time_is_at_most_an_eighth_away_from_its_bucket() {
        for (i, bound) in BUCKETS.into_iter().enumerate() {
            let mut recorded = Distribution::default();
            let ns = bound * 1e9;
            recorded.record((ns * 0.87) as u64);
            assert_eq!(Times { zeros: 0, recorded: recorded.clone() }.by_bucket()[i], 1, "{bound}");
            recorded.record((ns * 1.001) as u64);
            assert_eq!(Times { zeros: 3, recorded }.by_bucket()[i + 1], 1, "{bound}");
        }
    }
}
