//! [`Distribution`]: how long things took. The histogram is a fixed array, made by hand: the pool writes it under its
//! lock at every return, and the histograms on crates.io allocate there, or count in atomics.

use crate::leaf::clock::nanos;
use crate::leaf::text::{Short, Times};
use std::fmt;
use std::time::Duration;

/// Buckets per power of two: a quantile is at most an eighth above the true value.
const STEPS: u32 = 8;
/// `log2(STEPS)`.
const STEP_BITS: u32 = 3;
/// The greatest power of two, in nanoseconds, that has buckets of its own: 2^43 ns are 2.4 hours.
const OCTAVES: u32 = 43;
const BUCKETS: usize = ((OCTAVES - STEP_BITS + 1) * STEPS) as usize;

/// How long something took: count, sum, greatest, and quantiles. Over the whole life of the pool, or
/// [between two looks](Distribution::since).
///
/// Quantiles come from a histogram whose buckets are an eighth of a power of two wide: what [`quantile`] says is at
/// most 12.5 % above the true value, and never above [`max`].
///
/// [`quantile`]: Distribution::quantile
/// [`max`]: Distribution::max
#[derive(Clone)]
pub struct Distribution {
    count: u64,
    /// In nanoseconds, as is `max`.
    sum: u64,
    max: u64,
    buckets: [u64; BUCKETS],
}

impl Default for Distribution {
    fn default() -> Self {
        Distribution { count: 0, sum: 0, max: 0, buckets: [0; BUCKETS] }
    }
}

impl Distribution {
    #[inline]
    pub(crate) fn record(&mut self, nanos: u64) {
        self.count += 1;
        self.sum = self.sum.saturating_add(nanos);
        self.max = self.max.max(nanos);
        self.buckets[bucket(nanos)] += 1;
    }

    /// How many times were recorded.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of all.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum)
    }

    /// The longest; zero if none was recorded.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The mean; zero if none was recorded.
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.sum.checked_div(self.count).unwrap_or(0))
    }

    /// The time that a share `q` of all, between 0 and 1, did not exceed: `quantile(0.99)` is the 99th percentile. Zero
    /// if none was recorded; a `q` outside of 0 to 1 counts as the nearer end.
    pub fn quantile(&self, q: f64) -> Duration {
        let rank = (q.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return Duration::from_nanos(upper(i).min(self.max));
            }
        }
        self.max()
    }
}

impl Distribution {
    /// What was recorded after `earlier`, an older look at the same distribution. The greatest is then that of its bucket, at most
    /// 12.5 % above the true one, unless it is the greatest of all. What `earlier` has more of counts as none.
    #[must_use]
    pub fn since(&self, earlier: &Distribution) -> Distribution {
        let buckets: [u64; BUCKETS] = std::array::from_fn(|i| self.buckets[i].saturating_sub(earlier.buckets[i]));
        let max = match buckets.iter().rposition(|&n| n > 0) {
            Some(_) if self.max > earlier.max => self.max,
            Some(last) => upper(last).min(self.max),
            None => 0,
        };
        let count = self.count.saturating_sub(earlier.count);
        Distribution { count, sum: self.sum.saturating_sub(earlier.sum), max, buckets }
    }

    /// The buckets that have anything in them, the shortest first: the greatest time that falls into it, and how many did. The
    /// last bucket has no bound, and shows [`max`](Distribution::max).
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let bound = |i| Duration::from_nanos(if i == BUCKETS - 1 { self.max } else { upper(i) });
        self.buckets.iter().enumerate().filter(|&(_, &n)| n > 0).map(move |(i, &n)| (bound(i), n))
    }

    /// How many were certainly not longer than `limit`: those in the buckets that end there or before. For exporters with
    /// bounds of their own: what is recorded later never makes it less. What lies in the same bucket as `limit`, which is an
    /// eighth wide, is not counted. [`Duration::MAX`] counts all.
    pub fn at_most(&self, limit: Duration) -> u64 {
        let limit = nanos(limit);
        self.buckets.iter().enumerate().take_while(|&(i, _)| upper(i) <= limit).map(|(_, n)| n).sum()
    }
}

#[inline]
fn bucket(ns: u64) -> usize {
    if ns < u64::from(STEPS) {
        return ns as usize;
    }
    let octave = ns.ilog2();
    let step = (ns >> (octave - STEP_BITS)) as u32 & (STEPS - 1);
    (((octave - STEP_BITS + 1) * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The greatest time that falls into bucket `i`.
fn upper(i: usize) -> u64 {
    let (octave, step) = (i as u32 / STEPS, i as u64 % u64::from(STEPS));
    match octave {
        _ if i == BUCKETS - 1 => u64::MAX,
        0 => step,
        o => ((u64::from(STEPS) + step + 1) << (o - 1)) - 1,
    }
}

impl fmt::Debug for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// One line: `1234 times, mean 1.2ms, p50 1.0ms, p99 8.0ms, max 11ms`.
impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.count == 0 {
            return f.write_str("never");
        }
        write!(f, "{}, mean {}, p50 {}", Times(self.count), Short(self.mean()), Short(self.quantile(0.5)))?;
        write!(f, ", p99 {}, max {}", Short(self.quantile(0.99)), Short(self.max()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_an_eighth_wide() {
        for ns in (0..5000).chain((10..43).flat_map(|o| [(1u64 << o) - 1, 1 << o, (1 << o) + (1 << (o - 2)) + 7])) {
            let up = upper(bucket(ns));
            assert!(up >= ns, "{ns} is not above its bucket's end {up}");
            assert!(up - ns <= ns / 8, "{ns} may be said to be {up}");
        }
        assert_eq!(upper(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn quantiles() {
        let mut d = Distribution::default();
        assert_eq!((d.quantile(0.5), d.mean(), d.max()), (Duration::ZERO, Duration::ZERO, Duration::ZERO));
        for ms in 1..=1000 {
            d.record(ms * 1_000_000);
        }
        assert_eq!(d.count(), 1000);
        assert_eq!(d.mean(), Duration::from_micros(500_500));
        for (q, ms) in [(0.0, 1), (0.5, 500), (0.99, 990), (1.0, 1000)] {
            let (got, exact) = (d.quantile(q), Duration::from_millis(ms));
            assert!(got >= exact && got <= exact.mul_f64(1.125), "{q}: {got:?}");
        }
        assert_eq!(d.quantile(1.0), d.max());
    }

    #[test]
    fn between_two_looks() {
        let (ms, mut d) = (|n: u64| n * 1_000_000, Distribution::default());
        d.record(ms(100));
        let first = d.clone();
        for n in 1..=9 {
            d.record(ms(n));
        }
        let recent = d.since(&first);
        assert_eq!((recent.count(), recent.sum()), (9, Duration::from_millis(45)));
        // The greatest of the nine is known by its bucket, and no hundred milliseconds are among them.
        assert!((9..11).contains(&recent.max().as_millis()) && recent.quantile(1.0) == recent.max(), "{recent}");
        d.record(ms(500));
        assert_eq!(d.since(&first).max(), Duration::from_millis(500), "the greatest of all is exact");
        assert_eq!(d.since(&d).to_string(), "never");
        assert_eq!(first.since(&d).count(), 0, "the wrong way round");
    }

    #[test]
    fn buckets_and_bounds() {
        let mut d = Distribution::default();
        for ns in [3, 3, 1_000, 50_000_000, u64::MAX] {
            d.record(ns);
        }
        let buckets: Vec<_> = d.buckets().collect();
        assert_eq!(buckets.iter().map(|&(_, n)| n).sum::<u64>(), d.count());
        assert!(buckets.is_sorted() && buckets.len() == 4, "{buckets:?}");
        assert_eq!((buckets[0], buckets[3].0), ((Duration::from_nanos(3), 2), d.max()));
        for (limit, n) in [(2, 0), (3, 2), (900, 2), (1_150, 3), (50_000_000, 3), (60_000_000, 4), (u64::MAX, 5)] {
            assert_eq!(d.at_most(Duration::from_nanos(limit)), n, "{limit}");
        }
        assert_eq!(d.at_most(Duration::MAX), 5);
    }
}
