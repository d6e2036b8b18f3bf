//! What users see of a pool at work: [`Stats`], [`Connections`], and why connections are closed ([`CloseReason`]).

use crate::health::{Failing, Health, LastError};
use crate::leaf::clock::nanos;
use crate::leaf::failures::{ErrorType, Failures};
use crate::leaf::histogram::Distribution;
use crate::leaf::text::{Escaping, Short, Shown, Times, write_table};
use std::fmt::{self, Write as _};
use std::ops::Deref;
use std::panic::Location;
use std::time::Duration;

/// How many connections a pool has, as r2d2's `Pool::state` says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct State {
    /// All that are open: idle, checked out, or being checked.
    pub connections: u32,
    /// Those that are ready to be handed out.
    pub idle_connections: u32,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Being opened.
    Opening,
    /// In the pool, ready to be handed out.
    Idle,
    /// In use: checked out.
    InUse,
    /// Being validated, kept alive or reset: neither idle nor in use.
    Checking,
    /// Being closed.
    Closing,
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ConnectionState::Opening => "opening",
            ConnectionState::Idle => "idle",
            ConnectionState::InUse => "in use",
            ConnectionState::Checking => "checking",
            ConnectionState::Closing => "closing",
        })
    }
}

/// One connection of a pool, as it was when somebody asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectionInfo {
    /// The number of the connection: unique within its pool, counted up with every attempt to open one.
    pub id: u64,
    /// The server's own number for it, where the manager can tell: for PostgreSQL the process id of the backend.
    pub server_id: Option<u64>,
    /// What it is doing.
    pub state: ConnectionState,
    /// How long it has been in this state.
    pub since: Duration,
    /// The time since its opening began.
    pub age: Duration,
    /// How often it was checked out.
    pub uses: u64,
    /// The line that called `get`, while the connection is in use, or is being validated for the caller.
    pub location: Option<&'static Location<'static>>,
    /// The thread that called `get`, at the same times.
    pub thread: Option<String>,
}

impl ConnectionInfo {
    /// How long it has been unused, if it is idle.
    pub fn idle_for(&self) -> Option<Duration> {
        (self.state == ConnectionState::Idle).then_some(self.since)
    }

    /// How long it has been checked out, if it is.
    pub fn in_use_for(&self) -> Option<Duration> {
        (self.state == ConnectionState::InUse).then_some(self.since)
    }

    /// `#7 for 1.50 s by 'worker-3' at src/main.rs:12:5`.
    pub(crate) fn in_use(&self) -> impl fmt::Display + '_ {
        struct InUse<'a>(&'a ConnectionInfo);
        impl fmt::Display for InUse<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut f = Escaping(f);
                write!(f, "#{} for {}", self.0.id, Short(self.0.since))?;
                if let Some(thread) = &self.0.thread {
                    write!(f, " by {thread}")?;
                }
                match self.0.location {
                    Some(at) => write!(f, " at {at}"),
                    None => Ok(()),
                }
            }
        }
        InUse(self)
    }
}

/// One line: `#7 (server id 4711) in use for 1.50 s, age 12.0 min, used 40 times, by 'worker-3' at src/main.rs:12:5`.
impl fmt::Display for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaping(f);
        write!(f, "#{}", self.id)?;
        if let Some(id) = self.server_id {
            write!(f, " (server id {id})")?;
        }
        write!(f, " {} for {}, age {}", self.state, Short(self.since), Short(self.age))?;
        write!(f, ", used {}", Times(self.uses))?;
        if let Some(thread) = &self.thread {
            write!(f, ", by {thread}")?;
        }
        match self.location {
            Some(at) => write!(f, " at {at}"),
            None => Ok(()),
        }
    }
}

/// The connections of a pool, by number. [`Display`](fmt::Display) prints a table.
#[derive(Clone, Debug, Default)]
pub struct Connections(pub(crate) Vec<ConnectionInfo>);

impl Deref for Connections {
    type Target = [ConnectionInfo];

    fn deref(&self) -> &[ConnectionInfo] {
        &self.0
    }
}

impl IntoIterator for Connections {
    type Item = ConnectionInfo;
    type IntoIter = std::vec::IntoIter<ConnectionInfo>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "no connections");
        }
        let head = ["id", "server id", "state", "for", "age", "uses", "thread", "checked out at"].map(String::from);
        let rows = self.0.iter().map(|c| {
            let or = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            [
                c.id.to_string(),
                or(c.server_id.map(|id| id.to_string())),
                c.state.to_string(),
                Short(c.since).to_string(),
                Short(c.age).to_string(),
                c.uses.to_string(),
                or(c.thread.clone()),
                or(c.location.map(Location::to_string)),
            ]
        });
        write_table(f, std::iter::once(head).chain(rows))
    }
}

/// What a pool is doing, and has done since it was built.
///
/// [`Display`](fmt::Display) prints it in a few lines for a human being. A snapshot: it does not change.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// The name of the pool.
    pub name: String,
    /// The time since it was built.
    pub age: Duration,
    /// Whether it is closed.
    pub closed: bool,
    /// How it is, as [`Pool::health`](crate::Pool::health) says it. (To read it here asks for no attempt to connect.)
    pub health: Health,
    /// The present run of failed attempts to open a connection: since when, how many, and when the next is made.
    /// `None`: the last attempt came through, or there was none.
    pub failing: Option<Failing>,
    /// Why the last open failed that did, and how long ago. It stays when later ones succeed.
    pub last_error: Option<LastError>,

    /// The greatest number of connections, as it is set now.
    pub max_size: u32,
    /// The floor, as it is set.
    pub min_idle: u32,
    /// Connections ready to be handed out.
    pub idle: u32,
    /// Connections that are checked out.
    pub in_use: u32,
    /// Connections being validated, kept alive or reset.
    pub checking: u32,
    /// Connections being opened.
    pub opening: u32,
    /// Connections being closed.
    pub closing: u32,
    /// Threads that wait for a connection.
    pub waiting: u32,
    /// Abandoned jobs that have not ended: the server may see as many connections more.
    pub abandoned: u32,

    /// How often a connection was checked out.
    pub checkouts: u64,
    /// How often a caller had to wait for one.
    pub waits: u64,
    /// How often none came in time.
    pub timeouts: u64,
    /// How often `max_waiting` made a checkout fail.
    pub rejected: u64,
    /// How often a caller got a connection past one that had waited for longer: see
    /// [`fair_after`](crate::Builder::fair_after).
    pub barged: u64,
    /// Connections opened.
    pub opens: u64,
    /// Attempts to open one that failed. [`failed_opens_by_type`](Stats::failed_opens_by_type) has them apart.
    pub failed_opens: u64,
    /// Connections closed, all reasons together. [`closed_for`](Stats::closed_for) has them apart.
    pub closes: u64,
    /// Connections taken out of the pool with `detach`.
    pub detached: u64,
    /// Jobs (opens, checks, closes) abandoned because they took longer than their limit.
    pub abandonments: u64,
    /// Checkouts that lasted longer than `leak_threshold`.
    pub leaks: u64,
    /// Log records dropped because the logger blocked.
    pub dropped_records: u64,

    /// How long the waiters waited, until they had a connection or left.
    pub wait_time: Distribution,
    /// How long those waited who left without a connection, at their deadline or because the pool refused or closed.
    /// These are in `wait_time` as well: `wait_time.since(&left_time)` is of those who got one.
    pub left_time: Distribution,
    /// How long connections were checked out, in steps of the coarse clock (4 ms on most Linux systems).
    pub usage_time: Distribution,
    /// How long it took to open a connection.
    pub open_time: Distribution,
    /// By how much the pool was late in closing idle and aged connections, counted from the deadline to the moment the
    /// close began to run.
    pub lateness: Distribution,
    /// The greatest of these: `lateness.max()`.
    pub max_lateness: Duration,

    pub(crate) closes_by: [u64; CloseReason::ALL.len()],
    pub(crate) failures: Failures,
}

/// What the stats of a pool say beside its counts.
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) age: Duration,
    pub(crate) closed: bool,
    pub(crate) health: Health,
    pub(crate) failing: Option<Failing>,
    pub(crate) last_error: Option<LastError>,
    pub(crate) max_size: u32,
    pub(crate) min_idle: u32,
    pub(crate) dropped_records: u64,
}

impl Stats {
    pub(crate) fn new(facts: Facts, counts: Counts, tally: Tally) -> Stats {
        let Facts { name, age, closed, health, failing, last_error, max_size, min_idle, dropped_records } = facts;
        let Counts { idle, in_use, checking, opening, closing, waiting, abandoned } = counts;
        Stats {
            name,
            age,
            closed,
            health,
            failing,
            last_error,
            max_size,
            min_idle,
            idle,
            in_use,
            checking,
            opening,
            closing,
            waiting,
            abandoned,
            checkouts: tally.checkouts,
            waits: tally.waits,
            timeouts: tally.timeouts,
            rejected: tally.rejected,
            barged: tally.barged,
            opens: tally.opens,
            failed_opens: tally.failed_opens.total(),
            failures: tally.failed_opens,
            closes: tally.closes.iter().sum(),
            detached: tally.detached,
            abandonments: tally.abandonments,
            leaks: tally.leaks,
            dropped_records,
            wait_time: tally.wait_time,
            left_time: tally.left_time,
            usage_time: tally.usage_time,
            open_time: tally.open_time,
            max_lateness: tally.lateness.max(),
            lateness: tally.lateness,
            closes_by: tally.closes,
        }
    }

    /// How many connections were closed for this reason.
    pub fn closed_for(&self, reason: CloseReason) -> u64 {
        self.closes_by[reason as usize]
    }

    /// How many attempts to open a connection failed with an error of this type: see [`Cause::error_type`](crate::Cause::error_type).
    pub fn failed_opens_of(&self, error_type: &str) -> u64 {
        self.failures.of(&ErrorType::of_other(error_type))
    }

    /// The types of error with which attempts to open a connection failed, and how many did, in the order of their first.
    ///
    /// At most sixteen types, and `_OTHER`: that of a seventeenth, and of what has no type.
    pub fn failed_opens_by_type(&self) -> impl Iterator<Item = (&str, u64)> {
        self.failures.iter().map(|(error_type, n)| (error_type.as_str(), n))
    }

    /// What happened between `earlier`, an older look at the same pool, and this one: the p99 of the last minute
    /// instead of that of the pool's life.
    ///
    /// Counts and distributions are the difference of the two, and `age` is the time between them. What is a level
    /// (`idle`, `waiting`, `health` and so on) stays as it is now. If `earlier` is the later of the two, all is zero.
    ///
    /// ```
    /// # fn watch(pool: &millpond::Pool<impl millpond::Manage>) {
    /// let before = pool.stats();
    /// std::thread::sleep(std::time::Duration::from_millis(10));
    /// let recent = pool.stats().since(&before);
    /// println!("{} checkouts, p99 of the waits {:?}", recent.checkouts, recent.wait_time.quantile(0.99));
    /// # }
    /// ```
    #[must_use]
    pub fn since(&self, earlier: &Stats) -> Stats {
        let lateness = self.lateness.since(&earlier.lateness);
        let failures = self.failures.since(&earlier.failures);
        let closes_by = std::array::from_fn(|i| self.closes_by[i].saturating_sub(earlier.closes_by[i]));
        Stats {
            age: self.age.saturating_sub(earlier.age),
            checkouts: self.checkouts.saturating_sub(earlier.checkouts),
            waits: self.waits.saturating_sub(earlier.waits),
            timeouts: self.timeouts.saturating_sub(earlier.timeouts),
            rejected: self.rejected.saturating_sub(earlier.rejected),
            barged: self.barged.saturating_sub(earlier.barged),
            opens: self.opens.saturating_sub(earlier.opens),
            failed_opens: failures.total(),
            failures,
            closes: self.closes.saturating_sub(earlier.closes),
            detached: self.detached.saturating_sub(earlier.detached),
            abandonments: self.abandonments.saturating_sub(earlier.abandonments),
            leaks: self.leaks.saturating_sub(earlier.leaks),
            dropped_records: self.dropped_records.saturating_sub(earlier.dropped_records),
            wait_time: self.wait_time.since(&earlier.wait_time),
            left_time: self.left_time.since(&earlier.left_time),
            usage_time: self.usage_time.since(&earlier.usage_time),
            open_time: self.open_time.since(&earlier.open_time),
            max_lateness: lateness.max(),
            lateness,
            closes_by,
            ..self.clone()
        }
    }

    /// All slots in use: what `max_size` bounds.
    pub fn size(&self) -> u32 {
        self.idle + self.in_use + self.checking + self.opening + self.closing
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = if self.closed { ", closed" } else { "" };
        write!(f, "pool '{}': {} of {} connections", Shown(&self.name), self.size(), self.max_size)?;
        writeln!(f, ", built {} ago{closed}", Short(self.age))?;
        if !self.closed {
            writeln!(f, "  health     {}", self.health)?;
        }
        write!(f, "  now        {} idle, {} in use", self.idle, self.in_use)?;
        let between = [
            (self.checking, "checking"),
            (self.opening, "opening"),
            (self.closing, "closing"),
            (self.abandoned, "abandoned"),
        ];
        some(f, ", ", between.map(|(n, what)| (u64::from(n), what)))?;
        write!(f, "; {} waiting", self.waiting)?;
        write!(f, "\n  checkouts  {}; {} had to wait, {} timed out", self.checkouts, self.waits, self.timeouts)?;
        some(f, ", ", [(self.rejected, "rejected"), (self.leaks, "in use for too long")])?;
        write!(f, "\n  opened     {}; {} failed", self.opens, self.failed_opens)?;
        some(f, ": ", self.failed_opens_by_type().map(|(error_type, n)| (n, error_type)))?;
        write!(f, "\n  closed     {}", self.closes)?;
        some(f, ": ", CloseReason::ALL.map(|reason| (self.closed_for(reason), reason.as_str())))?;
        some(f, "\n  detached   ", [(self.detached, "by their users")])?;
        some(f, "\n  abandoned  ", [(self.abandonments, "past their limit")])?;
        some(f, "\n  log        ", [(self.dropped_records, "dropped: the logger blocked")])?;
        write!(f, "\n  waited     {}", self.wait_time)?;
        write!(f, "\n  in use     {}", self.usage_time)?;
        write!(f, "\n  to open    {}", self.open_time)?;
        if let Some(error) = self.last_error.as_ref().filter(|_| !matches!(self.health, Health::Down { .. })) {
            write!(f, "\n  last error {error}")?;
        }
        match self.max_lateness {
            Duration::ZERO => writeln!(f, "\n  evictions  never late"),
            late => writeln!(f, "\n  evictions  at most {} late", Short(late)),
        }
    }
}

/// Writes `lead`, and then the numbers that are not zero; nothing if all are zero.
fn some<'a>(f: &mut fmt::Formatter<'_>, lead: &str, numbers: impl IntoIterator<Item = (u64, &'a str)>) -> fmt::Result {
    for (i, (n, what)) in numbers.into_iter().filter(|&(n, _)| n > 0).enumerate() {
        write!(f, "{}{n} {what}", if i == 0 { lead } else { ", " })?;
    }
    Ok(())
}

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
    /// Its check or reset did not end within its limit.
    Abandoned,
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
        CloseReason::Abandoned,
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
            CloseReason::Abandoned => "check timed out",
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How many slots are in each state, how many callers wait, and how many jobs were abandoned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) idle: u32,
    pub(crate) in_use: u32,
    pub(crate) checking: u32,
    pub(crate) opening: u32,
    pub(crate) closing: u32,
    pub(crate) waiting: u32,
    pub(crate) abandoned: u32,
}

/// What the ledger has counted since the pool was built.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) checkouts: u64,
    pub(crate) waits: u64,
    pub(crate) timeouts: u64,
    pub(crate) rejected: u64,
    pub(crate) opens: u64,
    pub(crate) failed_opens: Failures,
    pub(crate) closes: [u64; CloseReason::ALL.len()],
    pub(crate) detached: u64,
    pub(crate) abandonments: u64,
    pub(crate) leaks: u64,
    pub(crate) barged: u64,
    pub(crate) wait_time: Distribution,
    pub(crate) left_time: Distribution,
    pub(crate) usage_time: Distribution,
    pub(crate) open_time: Distribution,
    pub(crate) lateness: Distribution,
}

impl Tally {
    pub(crate) fn closed(&mut self, reason: CloseReason) {
        self.closes[reason as usize] += 1;
    }

    /// The close of an idle or aged connection begins `late` after its deadline.
    pub(crate) fn evicted_late(&mut self, late: Duration) {
        self.lateness.record(nanos(late));
    }

    /// A waiter leaves without a connection, which it waited for so long.
    pub(crate) fn left_after(&mut self, nanos: u64) {
        self.wait_time.record(nanos);
        self.left_time.record(nanos);
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

    fn row(id: u64, thread: &str) -> ConnectionInfo {
        ConnectionInfo {
            id,
            server_id: None,
            state: ConnectionState::InUse,
            since: Duration::from_secs(1),
            age: Duration::from_secs(2),
            uses: 3,
            location: Some(Location::caller()),
            thread: Some(thread.into()),
        }
    }

    #[test]
    fn a_table_of_many_rows_takes_a_time_that_grows_with_them() {
        // A hundred times what the table takes, and a tenth of what it would take if each row looked at all rows.
        let limit = Duration::from_secs(20);
        let table = Connections((0..20_000).map(|id| row(id, "'worker'")).collect());
        let begun = std::time::Instant::now();
        assert_eq!(table.to_string().lines().count(), 20_001);
        assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_cell_has_an_end_and_no_line_of_its_own() {
        let table = Connections(vec![row(1, "short"), row(2, &"ä".repeat(100_000)), row(3, "a\nb\x1b[2J")]);
        let text = table.to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() == 4 && lines.iter().all(|line| line.len() < 400), "{text}");
        assert!(lines[2].contains("ä ... (cut)  ") && lines[3].contains(" a\\nb\\u{1b}[2J  "), "{text}");
        let place = lines[0].find("checked out at").unwrap();
        let column = |line: &str| line.chars().take(place).collect::<String>().ends_with("  ");
        assert!(lines.iter().all(|line| column(line)), "the columns are straight: {text}");
    }
}
