//! [`Distribution`]: how long things took. The histogram is a fixed array, made by hand: the pool writes it under its
//! lock at every return, and the histograms on crates.io allocate there, or count in atomics.

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

/// How long something took, over the whole life of the pool: count, sum, greatest, and quantiles.
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
}
