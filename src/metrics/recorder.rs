//! The feature `metrics`: [`Pools::report`] to the facade's recorder.

use super::Pools;
use super::family::{FAMILIES, Family, Kind, POOL, Point, Value};
use crate::stats::Stats;
use ::metrics::{Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

impl Pools {
    /// Tells the recorder of the facade `metrics` what has happened since the last report. Call it before each scrape.
    ///
    /// Counters are incremented by what came since, gauges set to what is now. A histogram gets one sample for each checkout,
    /// open and eviction since the last report, with the end of its bucket in the pool's own histogram as its time: at most
    /// 12.5 % above the true one, and so is the sum. The usual recorders keep each sample until the next scrape (of
    /// `metrics-exporter-prometheus`: see [the module](super#the-facade)).
    ///
    /// When a pool is gone, its gauges are set to zero, once: the facade cannot take a metric back.
    ///
    /// Nothing is reported while no recorder is installed, and it is lost to the next one.
    pub fn report(&self) {
        FAMILIES.iter().for_each(describe);
        for (shown, now) in self.look() {
            let earlier = std::mem::replace(&mut *shown.reported.lock(), now.clone());
            match (now, earlier) {
                (Some(now), None) => tell(&shown.name, &now, &now),
                (Some(now), Some(earlier)) => tell(&shown.name, &now, &now.since(&earlier)),
                (None, Some(last)) => {
                    for family in FAMILIES.iter().filter(|family| family.kind == Kind::Gauge) {
                        for point in (family.points)(&last) {
                            gauge!(family.name, labels(&shown.name, &point)).set(0.0);
                        }
                    }
                }
                (None, None) => {}
            }
        }
    }
}

fn describe(family: &Family) {
    let unit = if family.is_in_seconds() { Unit::Seconds } else { Unit::Count };
    match family.kind {
        Kind::Counter => describe_counter!(family.name, unit, family.help),
        Kind::Gauge => describe_gauge!(family.name, unit, family.help),
        Kind::Histogram => describe_histogram!(family.name, unit, family.help),
    }
}

/// Levels are those of `now`, and what is counted that of `recent`.
fn tell(pool: &str, now: &Stats, recent: &Stats) {
    for family in FAMILIES {
        for point in (family.points)(if family.kind == Kind::Gauge { now } else { recent }) {
            let labels = labels(pool, &point);
            match point.value {
                // (A zero as well: the series is there from the beginning.)
                Value::Count(n) => counter!(family.name, labels).increment(n),
                Value::Level(level) => gauge!(family.name, labels).set(level),
                Value::Times(times) => {
                    let histogram = histogram!(family.name, labels);
                    let record = |seconds: f64, n| histogram.record_many(seconds, usize::try_from(n).unwrap_or(0));
                    record(0.0, times.zeros);
                    times.recorded.buckets().for_each(|(end, n)| record(end.as_secs_f64(), n));
                }
            }
        }
    }
}

fn labels(pool: &str, point: &Point) -> Vec<Label> {
    let of = point.label.map(|(key, value)| Label::from_static_parts(key, value));
    [Some(Label::new(POOL, pool.to_string())), of].into_iter().flatten().collect()
}
