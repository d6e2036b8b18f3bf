//! The promises, as predicates: what is looked at when everybody waits, at a checkout, at an error, and at the end. Their
//! numbers are those of ARCHITECTURE.md.

use super::broken;
use super::plan::{Act, Limits, Plan};
use super::server::{Conn, Fake, Server};
use millpond::model::thread;
use millpond::model::time::{self, Instant, now};
use millpond::{ConnectionInfo, ConnectionState, Error, Pool, Validate};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How late a thing may be in a world where no thread is slow: what a few looks at the clock take.
const EPSILON: Duration = Duration::from_micros(50);

/// The same where eight threads run.
const CROWD: Duration = Duration::from_millis(1);

/// A waiter that was barged four times must also have been the first for so long.
const FIRST_FOR: Duration = Duration::from_micros(20);

/// What the users know of each other.
pub struct Judge {
    limits: Limits,
    tick: Duration,
    /// The server refuses a connect for good, now and then.
    refuses: bool,
    /// For a while no thread can be started, so that a job may not begin.
    without_threads: bool,
    state: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    waiting: BTreeMap<usize, Wait>,
    in_use: usize,
    /// How many slots there may be: after a resize down as many as there were, until those that are too many are gone.
    most: u32,
    /// The greatest of it.
    largest: u32,
    /// When `close` was called.
    closing: Option<Instant>,
    /// When `recycle` was called last, and when it had returned.
    recycled: Option<(Instant, Instant)>,
    gets: u64,
}

#[derive(Clone, Copy)]
struct Wait {
    begun: Instant,
    deadline: Instant,
    /// How many that came later were handed a connection since this one could no longer be barged.
    passed: u32,
}

impl Judge {
    pub fn new(plan: &Plan) -> Arc<Judge> {
        let state = Known { most: plan.limits.max_size, ..Known::default() };
        let faults =
            plan.steps.iter().filter_map(|step| if let Act::Faults(faults) = &step.act { Some(faults) } else { None });
        Arc::new(Judge {
            refuses: faults.chain([&plan.faults]).any(|faults| faults.open.refuse > 0),
            without_threads: plan.steps.iter().any(|step| matches!(step.act, Act::NoThreads(_))),
            limits: plan.limits.clone(),
            tick: Duration::from_nanos(plan.tick),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, Known> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begins_to_wait(&self, who: usize, timeout: Duration) {
        let begun = now();
        self.state().waiting.insert(who, Wait { begun, deadline: begun + timeout, passed: 0 });
    }

    /// Once `close` was called, nothing that was asked for later is handed out.
    pub fn is_closing(&self) {
        let now = now();
        self.state().closing.get_or_insert(now);
    }

    pub fn was_recycled(&self, called: Instant) {
        self.state().recycled = Some((called, now()));
    }

    pub fn is_resized(&self, max_size: u32) {
        let mut known = self.state();
        known.most = known.most.max(max_size);
    }

    pub fn is_closed(&self) -> bool {
        self.state().closing.is_some()
    }

    pub fn returns(&self, server: &Server, conn: &Conn) {
        if let Some(link) = server.state().links.get_mut(&conn.id) {
            link.user = None;
        }
        self.state().in_use -= 1;
    }

    /// How late a thread may be: others ran before it, and their looks at the clock took time.
    fn slack(&self, since: Instant) -> Duration {
        CROWD + stalls(since)
    }

    /// P3: nobody waits past the deadline.
    pub fn ends_to_wait(&self, who: usize) -> Option<Instant> {
        let wait = self.state().waiting.remove(&who)?;
        let late = now().saturating_duration_since(wait.deadline);
        if late > self.slack(wait.begun) && !known_hook() {
            broken("P3", format!("user {who} came back {late:?} past the deadline"));
        }
        Some(wait.begun)
    }

    /// P2, P4, P5, P9: what is handed out may be.
    pub fn is_handed(&self, server: &Server, who: usize, begun: Instant, conn: &Conn) {
        let mut known = self.state();
        known.in_use += 1;
        known.gets += 1;
        let (closing, recycled) = (known.closing, known.recycled);
        // P7: nobody is passed for long. (One that was served, and did not run since, still stands among those that
        // wait: so a few are nothing. And one may wait for a check of its own.)
        let few = 2 * (known.most + self.limits.max_size);
        for (other, wait) in known.waiting.iter_mut().filter(|(_, wait)| wait.begun < begun) {
            let waited = now() - wait.begun;
            if waited > self.limits.fair_after + self.slack(wait.begun) + FIRST_FOR && !server.manager.keeps_limits {
                wait.passed += 1;
                if wait.passed > few {
                    broken("P7", format!("user {other}, who waits for {waited:?}, was passed {} times", wait.passed));
                }
            }
        }
        drop(known);
        let slack = self.slack(begun);
        let mut state = server.state();
        let told_dead = state.told_dead;
        let Some(link) = state.links.get_mut(&conn.id) else {
            return broken("P9", format!("user {who} got {}, which is closed", conn.id));
        };
        if let Some(other) = link.user.replace(who) {
            broken("P5", format!("users {who} and {other} both have {}", conn.id));
        }
        if closing.is_some_and(|at| at < begun) {
            broken("P4", format!("user {who} got {} after the close", conn.id));
        }
        let age = now() - link.born;
        if self.limits.max_lifetime.is_some_and(|max| age > max + slack) {
            broken("P2", format!("user {who} got {}, which is {age:?} old", conn.id));
        }
        // A recycle beside the get may come a moment too late for it.
        if recycled.is_some_and(|(called, returned)| returned < begun && link.born < called) {
            broken("P2", format!("user {who} got {}, which was opened before the recycle", conn.id));
        }
        if link.told {
            broken("P9", format!("user {who} got {}, of which the pool knows that it is dead", conn.id));
        }
        let checks = !matches!(self.limits.validate, Validate::Never);
        // (Between the call that found it dead and the pool's note of it the thread may have been slow.)
        if checks && told_dead.is_some_and(|at| link.proven < at && at + self.slack(at) < begun) {
            broken("P9", format!("user {who} got {}, unproven since another was found dead", conn.id));
        }
    }

    /// P8: an error fits what happened.
    pub fn is_told(&self, who: usize, begun: Instant, error: &Error) {
        let closing = self.state().closing.is_some();
        let fits =
            error.is_timeout() || error.is_connect() || error.is_too_many_waiting() || (error.is_closed() && closing);
        if !fits {
            broken("P8", format!("user {who} was told {error} after {:?}", now() - begun));
        }
        if error.is_too_many_waiting() && self.limits.max_waiting.is_none() {
            broken("P8", format!("user {who} was told {error}, and there is no such limit"));
        }
    }

    /// What holds whenever everybody waits. `haste`: some are slow, so that what is due may not have begun.
    pub fn look(&self, server: &Server, pool: &Pool<Fake>, haste: bool) {
        let stats = pool.stats();
        let mut known = self.state();
        // P3: nobody sleeps past the deadline.
        for (who, wait) in &known.waiting {
            let late = now().saturating_duration_since(wait.deadline);
            if late > EPSILON + stalls(wait.begun) && !known_hook() {
                broken("P3", format!("user {who} sleeps {late:?} past the deadline"));
            }
        }
        // P5: the bound.
        let most = known.most;
        if stats.size() > most {
            broken("P5", format!("{} slots, and no more than {most} may be", stats.size()));
        }
        if stats.size() <= stats.max_size {
            known.most = stats.max_size;
        }
        // With so many abandoned one attempt is made, and one more per minute: each may hang.
        let attempts = 1 + (stats.age.as_secs() / 60) as u32;
        let bound = known.largest.max(most);
        known.largest = bound;
        if stats.abandoned > bound + attempts {
            broken("P5", format!("{} jobs are abandoned, and max_size was never above {bound}", stats.abandoned));
        }
        // P6: every slot in use is a user's.
        if stats.in_use as usize != known.in_use && !known_hook() {
            broken("P6", format!("{} in use, by the pool's count {}", known.in_use, stats.in_use));
        }
        let alive = server.state().links.len();
        let counted = (stats.size() + stats.abandoned) as usize + known_detached();
        if alive > counted {
            broken("P5", format!("{alive} connections on the server, {counted} in the pool's count"));
        }
        if known.closing.is_some() && pool.is_closed() && (stats.idle > 0 || stats.waiting > 0) {
            broken("P4", format!("closed, and {} are idle, {} wait", stats.idle, stats.waiting));
        }
        drop(known);
        if haste {
            return;
        }
        // P3: nobody is forgotten.
        if stats.waiting > 0 && stats.opening + stats.checking == 0 && stats.idle > 0 && !pool.is_closed() {
            let can_open = stats.size() < stats.max_size;
            broken("P3", format!("{} wait beside {} idle; room: {can_open}", stats.waiting, stats.idle));
        }
        // P5: what is too many after a resize goes as it is returned.
        if stats.idle > 0 && stats.idle + stats.in_use + stats.checking > stats.max_size {
            broken("P5", format!("{} are idle, and they are too many: {stats}", stats.idle));
        }
        // P3: an open past its limit is not counted on any more.
        let limit = self.limits.open_timeout + EPSILON;
        let is_over = |row: &ConnectionInfo| row.state == ConnectionState::Opening && row.since > limit;
        if !self.without_threads && !pool.is_closed() && pool.connections().iter().any(is_over) {
            broken("P3", format!("an open goes on past its limit: {}", pool.connections()));
        }
        // P1, P2: what is due has gone.
        let (mut over, at) = (0, now());
        for row in pool.connections().iter().filter(|row| row.state == ConnectionState::Idle) {
            if self.limits.max_lifetime.is_some_and(|max| row.age > max + EPSILON) {
                broken("P2", format!("#{} is idle at the age of {:?}, at {at:?}", row.id, row.age));
            }
            if self.limits.max_idle.is_some_and(|max| row.since > max + EPSILON + self.tick * 2) {
                over += 1;
            }
        }
        if over > self.limits.min_idle {
            broken("P1", format!("{over} are idle for longer than max_idle, and min_idle is {}", self.limits.min_idle));
        }
    }

    /// After the faults have stopped: everybody is served, every slot is back, the floor stands.
    pub fn comes_back(&self, pool: &Pool<Fake>) {
        // What was abandoned has come back. Then the pause between two opens is at most 1 s, but after a refusal up to 30 s.
        let bound = Duration::from_secs(if self.refuses { 31 } else { 2 });
        let begun = now();
        let max_size = pool.max_size();
        let mut all = Vec::new();
        while all.len() < max_size as usize {
            let left = (begun + bound).saturating_duration_since(now());
            match pool.get_timeout(left) {
                Ok(conn) => {
                    self.state().in_use += 1;
                    all.push(conn);
                }
                // Told at once; who asks again soon finds what was made ready.
                Err(error) if (error.is_connect() || error.is_too_many_waiting()) && !left.is_zero() => {
                    thread::sleep(Duration::from_millis(5));
                }
                // A hook that began to close the pool while there were faults goes on.
                Err(error) if error.is_closed() && known_hook() => break,
                Err(error) => {
                    broken(
                        "liveness",
                        format!("{} of {max_size} slots are back {bound:?} after the faults: {error}", all.len()),
                    );
                    break;
                }
            }
        }
        for conn in all {
            self.state().in_use -= 1;
            drop(conn);
        }
        if super::is_broken() || pool.is_closed() {
            return;
        }
        // The floor stands when what the faults left behind is over: two times, since a replacement may be under way.
        let quiet = self.limits.max_idle.unwrap_or_default().min(Duration::from_secs(7200)) + Duration::from_secs(61);
        let moves = || millpond::model::world(|world| world.steps);
        let before = moves();
        thread::sleep(quiet);
        // P10: what happens in a silence is what the periods ask for: each life twice, each keepalive, and the calls and
        // the lingering threads that go with them.
        let times = |period: Option<Duration>| period.map_or(0.0, |period| quiet.as_secs_f64() / period.as_secs_f64());
        let shortest = self.limits.max_lifetime.map(|life| life.mul_f64(1.0 - self.limits.lifetime_jitter));
        let each = 8.0 * (2.0 + times(shortest)) + 6.0 * times(self.limits.keepalive);
        let most = 40.0 + f64::from(max_size) * each;
        if (moves() - before) as f64 > most {
            broken("P10", format!("{} things happened in a silence of {quiet:?}, {most} may", moves() - before));
        }
        // Each connection of the floor is replaced now and then, so at a given moment one may be missing.
        let floor = self.limits.min_idle;
        let stands = (0..2000).any(|_| {
            thread::sleep(Duration::from_millis(1));
            pool.stats().idle >= floor
        });
        if !stands {
            broken("liveness", format!("the floor is {floor}: {}", pool.stats()));
        }
        let stats = pool.stats();
        if stats.abandoned > 0 || stats.in_use > 0 || stats.waiting > 0 {
            broken("liveness", format!("something is left: {stats}"));
        }
    }
}

/// Whether a hook closes the pool, which takes its time on whatever thread it runs: a user's that waits, too.
fn known_hook() -> bool {
    super::users::hook_closes()
}

fn known_detached() -> usize {
    super::users::detached()
}

/// How long threads were slow since then.
pub fn stalls(since: Instant) -> Duration {
    millpond::model::world(|world| world.stalled_since(since))
}

/// P4: `close` comes back within its grace, and 20 ms for its report, and 2 ms for each of its cancels, of which there may be so
/// many.
pub fn close_was_in_time(begun: Instant, grace: Duration, most_cancels: u32) {
    let took = time::now() - begun;
    let last = Duration::from_millis(20) + Duration::from_millis(2) * most_cancels;
    if took > grace + last + EPSILON + stalls(begun) {
        broken("P4", format!("a close with the grace {grace:?} took {took:?}"));
    }
}
