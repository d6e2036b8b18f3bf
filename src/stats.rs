//! What a pool counts: [`Stats`], its [`Distribution`]s of times, and why connections are closed.

use std::fmt;
use std::time::Duration;

/// Why the pool closed a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloseReason {
    /// Unused for `max_idle`, and not needed for `min_idle`.
    Idle,
    /// Its `max_lifetime` had passed.
    Lifetime,
    /// Found broken when it was returned.
    Broken,
    /// Failed a validation.
    Invalid,
    /// Could not be reset after its return.
    ResetFailed,
    /// Discarded by the user, or by the manager when it was returned.
    Discarded,
    /// Returned by a panic, or met one in the manager or a hook.
    Panicked,
    /// Opened before the last `recycle`.
    Recycled,
    /// Its manager called it outdated, and with it all that are older.
    Outdated,
    /// One too many after `resize`.
    Resized,
    /// The pool was closed.
    Closed,
    /// A check of it did not end within its limit.
    WrittenOff,
}

impl CloseReason {
    /// Every reason, in the order in which [`Stats`] shows them.
    pub const ALL: [CloseReason; 12] = [
        CloseReason::Idle,
        CloseReason::Lifetime,
        CloseReason::Broken,
        CloseReason::Invalid,
        CloseReason::ResetFailed,
        CloseReason::Discarded,
        CloseReason::Panicked,
        CloseReason::Recycled,
        CloseReason::Outdated,
        CloseReason::Resized,
        CloseReason::Closed,
        CloseReason::WrittenOff,
    ];

    /// The reason in one or two words, as it stands in log records.
    pub fn as_str(self) -> &'static str {
        match self {
            CloseReason::Idle => "idle too long",
            CloseReason::Lifetime => "lifetime over",
            CloseReason::Broken => "broken",
            CloseReason::Invalid => "failed validation",
            CloseReason::ResetFailed => "failed reset",
            CloseReason::Discarded => "discarded",
            CloseReason::Panicked => "panicked",
            CloseReason::Recycled => "recycled",
            CloseReason::Outdated => "outdated",
            CloseReason::Resized => "pool resized",
            CloseReason::Closed => "pool closed",
            CloseReason::WrittenOff => "check timed out",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

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
    sum: Duration,
    max: Duration,
    buckets: [u64; BUCKETS],
}

impl Default for Distribution {
    fn default() -> Self {
        Distribution { count: 0, sum: Duration::ZERO, max: Duration::ZERO, buckets: [0; BUCKETS] }
    }
}

impl Distribution {
    #[inline]
    pub(crate) fn record(&mut self, d: Duration) {
        self.count += 1;
        self.sum = self.sum.saturating_add(d);
        self.max = self.max.max(d);
        self.buckets[bucket(d)] += 1;
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All of them together.
    pub fn sum(&self) -> Duration {
        self.sum
    }

    /// The longest; zero if there was none.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// The mean; zero if there was none.
    pub fn mean(&self) -> Duration {
        if self.count == 0 { Duration::ZERO } else { self.sum.div_f64(self.count as f64) }
    }

    /// The time that a part `q` of them, between 0 and 1, did not exceed: `quantile(0.99)` is the 99th percentile. Zero if
    /// there was none; a `q` outside of 0 to 1 counts as the nearer end.
    pub fn quantile(&self, q: f64) -> Duration {
        let rank = (q.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }
}

fn bucket(d: Duration) -> usize {
    let ns = u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
    if ns < u64::from(STEPS) {
        return ns as usize;
    }
    let octave = ns.ilog2();
    let step = (ns >> (octave - STEP_BITS)) as u32 & (STEPS - 1);
    (((octave - STEP_BITS + 1) * STEPS + step) as usize).min(BUCKETS - 1)
}

/// The greatest time that falls into bucket `i`.
fn upper(i: usize) -> Duration {
    let (octave, step) = (i as u32 / STEPS, i as u64 % u64::from(STEPS));
    let ns = match octave {
        0 => step,
        o => ((u64::from(STEPS) + step + 1) << (o - 1)) - 1,
    };
    if i == BUCKETS - 1 { Duration::MAX } else { Duration::from_nanos(ns) }
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
        write!(f, "{} times, mean {}, p50 {}", self.count, Short(self.mean()), Short(self.quantile(0.5)))?;
        write!(f, ", p99 {}, max {}", Short(self.quantile(0.99)), Short(self.max))
    }
}

/// A duration in three digits and one unit, as one would say it.
pub(crate) struct Short(pub(crate) Duration);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs_f64();
        let text = match s {
            0.0 => "0".to_string(),
            _ if s < 1e-6 => format!("{} ns", self.0.as_nanos()),
            _ if s < 1e-3 => format!("{} us", digits(s * 1e6)),
            _ if s < 1.0 => format!("{} ms", digits(s * 1e3)),
            _ if s < 120.0 => format!("{} s", digits(s)),
            _ if s < 7200.0 => format!("{} min", digits(s / 60.0)),
            _ if s < 172_800.0 => format!("{} h", digits(s / 3600.0)),
            _ => format!("{} d", digits(s / 86_400.0)),
        };
        f.pad(&text)
    }
}

fn digits(x: f64) -> String {
    match x {
        _ if x < 9.995 => format!("{x:.2}"),
        _ if x < 99.95 => format!("{x:.1}"),
        _ => format!("{x:.0}"),
    }
}

/// What the ledger counts as it goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) checkouts: u64,
    pub(crate) waits: u64,
    pub(crate) timeouts: u64,
    pub(crate) turned_away: u64,
    pub(crate) opens: u64,
    pub(crate) failed_opens: u64,
    pub(crate) closes: [u64; CloseReason::ALL.len()],
    pub(crate) detached: u64,
    pub(crate) written_off: u64,
    pub(crate) leaks: u64,
    pub(crate) wait: Distribution,
    pub(crate) hold: Distribution,
    pub(crate) open: Distribution,
    pub(crate) max_lateness: Duration,
}

impl Tally {
    pub(crate) fn closed(&mut self, reason: CloseReason) {
        self.closes[reason as usize] += 1;
    }

    /// An idle or aged connection is closed now, `late` after it should have been.
    pub(crate) fn evicted_late(&mut self, late: Duration) {
        self.max_lateness = self.max_lateness.max(late);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_stand_in_their_order() {
        for (i, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, i, "{reason}");
        }
    }

    #[test]
    fn buckets_are_an_eighth_wide() {
        for ns in (0..5000).chain((10..43).flat_map(|o| [(1u64 << o) - 1, 1 << o, (1 << o) + (1 << (o - 2)) + 7])) {
            let up = upper(bucket(Duration::from_nanos(ns))).as_nanos() as u64;
            assert!(up >= ns, "{ns} is not above its bucket's end {up}");
            assert!(up - ns <= ns / 8, "{ns} may be said to be {up}");
        }
        assert_eq!(upper(bucket(Duration::MAX)), Duration::MAX);
    }

    #[test]
    fn quantiles() {
        let mut d = Distribution::default();
        assert_eq!((d.quantile(0.5), d.mean(), d.max()), (Duration::ZERO, Duration::ZERO, Duration::ZERO));
        for ms in 1..=1000 {
            d.record(Duration::from_millis(ms));
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
    fn short() {
        let cases = [
            (0, "0"),
            (999, "999 ns"),
            (1_500, "1.50 us"),
            (23_456_000, "23.5 ms"),
            (1_000_000_000, "1.00 s"),
            (600_000_000_000, "10.0 min"),
            (7_200_000_000_000, "2.00 h"),
            (259_200_000_000_000, "3.00 d"),
        ];
        for (ns, text) in cases {
            assert_eq!(Short(Duration::from_nanos(ns)).to_string(), text);
        }
    }
}
