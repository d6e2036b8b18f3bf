//! The feature `metrics`: [`Pools::report`] to the facade's recorder.

use super::Pools;
use super::family::{FAMILIES, Family, Kind, POOL, Point, Value};
use crate::stats::Stats;
use ::metrics::{Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use std::sync::atomic::Ordering;

/// How many samples one report adds to a histogram at most: recorders keep each of them until the next scrape.
const MOST_SAMPLES: u64 = 100_000;

impl Pools {
    /// Tells the recorder of the facade `metrics` what has happened since the last report. Call it before each scrape.
    ///
    /// Counters are incremented by what came since, gauges set to what is now. A histogram gets one sample for each checkout,
    /// open and eviction since the last report, with the end of its bucket in the pool's own histogram as its time: at most
    /// 12.5 % above the true one, and so is the sum. Recorders keep each sample until the next scrape. So of more than 100,000 in
    /// one report only a share is told, the same of each bucket: quantiles stay what they are, and the histogram's count falls
    /// behind. `millpond.checkouts` counts them all.
    ///
    /// When a pool is gone, its gauges are set to zero, once: the facade cannot take a metric back.
    ///
    /// Nothing is reported while no recorder is installed, and it is lost to the next one.
    pub fn report(&self) {
        FAMILIES.iter().for_each(describe);
        let all = self.0.lock().clone();
        let mut gone = Vec::new();
        for shown in &all {
            // Of two reports at once, the second looks when the first has told. So nothing is counted twice, and the gauges
            // are those of the later look.
            let mut reported = shown.reported.lock();
            let now = (shown.look)();
            if now.is_none() {
                gone.push(shown);
            }
            let (earlier, stays) = (std::mem::replace(&mut *reported, now.clone()), now.is_some());
            // Before it is told, so that it is not forgotten meanwhile.
            shown.is_reported.fetch_or(stays, Ordering::SeqCst);
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
            shown.is_reported.store(stays, Ordering::SeqCst);
        }
        self.forget(gone);
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
                    let (histogram, all) = (histogram!(family.name, labels), times.count());
                    let record = |seconds: f64, n| histogram.record_many(seconds, share(n, all));
                    record(0.0, times.zeros);
                    times.recorded.buckets().for_each(|(end, n)| record(end.as_secs_f64(), n));
                }
            }
        }
    }
}

/// How many of `n` are told, where there are so many in all: never none of some.
fn share(n: u64, all: u64) -> usize {
    let told = if all > MOST_SAMPLES {
        (u128::from(n) * u128::from(MOST_SAMPLES)).div_ceil(u128::from(all))
    } else {
        n.into()
    };
    usize::try_from(told).unwrap_or(usize::MAX)
}

fn labels(pool: &str, point: &Point) -> Vec<Label> {
    let of = point.label.as_ref().map(|(key, value)| Label::new(*key, value.clone()));
    [Some(Label::new(POOL, pool.to_string())), of].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_a_bound_and_keeps_the_proportions() {
        assert_eq!([0, 1, MOST_SAMPLES].map(|n| share(n, MOST_SAMPLES)), [0, 1, MOST_SAMPLES as usize]);
        let all = 50 * MOST_SAMPLES;
        assert_eq!([0, 1, 50, 5000, all].map(|n| share(n, all)), [0, 1, 1, 100, MOST_SAMPLES as usize]);
        assert_eq!(share(u64::MAX, u64::MAX), MOST_SAMPLES as usize);
    }
}
