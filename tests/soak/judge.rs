//! What the server sees of the pools, beside what they say themselves.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

use crate::lane::Lane;
use crate::support::ms;
use crate::world::{LATE, World};
use millpond::{ConnectionInfo, ConnectionState};

/// How often it looks.
const PERIOD: Duration = ms(20);

/// One backend, as the server has it.
struct Backend {
    pid: u64,
    lane: String,
    age: Duration,
    /// Since it last began or ended a query.
    quiet: Duration,
}

/// What must not be so for long, and of which pool or backend: since when it is, at which look it was seen last.
#[derive(Default)]
struct Lasting {
    since: HashMap<(&'static str, String), (Instant, u64)>,
    look: u64,
}

impl Lasting {
    /// For how long this has been so, at every look.
    fn lasts(&mut self, what: &'static str, of: impl ToString, is_so: bool, now: Instant) -> Duration {
        if !is_so {
            return Duration::ZERO;
        }
        let (since, look) = self.since.entry((what, of.to_string())).or_insert((now, self.look));
        *look = self.look;
        now - *since
    }

    /// A look is over: what was not seen in it is not so any more.
    fn looked(&mut self) {
        self.since.retain(|_, (_, look)| *look == self.look);
        self.look += 1;
    }
}

/// Looks at all pools until it is over.
pub(crate) fn watch(world: &World, lanes: &[Lane], over: &AtomicBool) {
    let mut client = None;
    let mut lasting = Lasting::default();
    while !over.load(SeqCst) && !world.journal.is_flawed() {
        thread::sleep(PERIOD);
        let before: Vec<_> = lanes.iter().map(|lane| lane.look(world)).collect();
        let asked = Instant::now();
        let Some(backends) = look(world, &mut client) else {
            // With the server all of its backends went.
            lasting = Lasting::default();
            continue;
        };
        world.journal.count("looks at the server", 1);
        for (lane, before) in lanes.iter().zip(before) {
            let Some((before, pool)) = before.zip(lane.pool()) else { continue };
            let rows = pool.connections();
            let Some(after) = lane.look(world) else { continue };
            let judged = Judged { world, lane, asked };
            let mine: Vec<&Backend> = backends.iter().filter(|backend| backend.lane == lane.name).collect();
            let abandoned = before.abandoned.max(after.abandoned);
            // P5: with so many abandoned jobs, or opens that may yet be abandoned, the slot of one more is not freed.
            let may_be_abandoned = abandoned + before.opening.max(after.opening);
            judged.rows(&rows, may_be_abandoned >= before.max_size.min(after.max_size));
            judged.backends(&mut lasting, &mine, &rows, abandoned as usize, before.size().max(after.size()) as usize);
        }
        lasting.looked();
    }
}

struct Judged<'a> {
    world: &'a World,
    lane: &'a Lane,
    asked: Instant,
}

impl Judged<'_> {
    /// None in a state for longer than its limit allows. `stuck`: no job can be abandoned.
    fn rows(&self, rows: &[ConnectionInfo], stuck: bool) {
        let drawn = &self.lane.drawn;
        let mut too_idle = 0;
        for row in rows {
            let slack = LATE + self.world.heart.stood_still_since(self.asked - row.since.min(ms(20_000)));
            let limit = match row.state {
                ConnectionState::Opening => drawn.open_timeout,
                // Validated, kept alive, or reset.
                ConnectionState::Checking => drawn.validation_timeout.max(drawn.close_timeout),
                ConnectionState::Closing => drawn.close_timeout,
                _ => Duration::MAX,
            };
            if row.since > limit.saturating_add(slack) && (row.state == ConnectionState::Opening || !stuck) {
                self.flaw(format_args!("past its limit of {limit:?}: {row}"));
            }
            if row.state != ConnectionState::Idle {
                continue;
            }
            if drawn.max_lifetime.is_some_and(|life| row.age > life + slack) {
                self.flaw(format_args!("idle past its lifetime: {row}"));
            }
            if drawn.max_idle.is_some_and(|idle| row.since > idle + slack) {
                too_idle += 1;
            }
        }
        if too_idle > drawn.min_idle {
            self.flaw(format_args!("{too_idle} are idle for too long, of which {} may be", drawn.min_idle));
        }
    }

    fn backends(
        &self,
        lasting: &mut Lasting,
        backends: &[&Backend],
        rows: &[ConnectionInfo],
        abandoned: usize,
        slots: usize,
    ) {
        let drawn = &self.lane.drawn;
        let detached = self.lane.detached.lock().clone();
        let is_detached = |backend: &Backend| detached.contains(&(backend.pid as i32));
        let mine = backends.iter().filter(|backend| !is_detached(backend)).count();
        self.world.journal.count("backends seen", backends.len() as u64);
        // A backend notices its client's end when it is given a processor, and when the network lets it know.
        let bound = slots.max(*self.lane.ceiling.lock() as usize) + abandoned;
        let more = lasting.lasts("more", &self.lane.name, mine > bound, self.asked);
        let slack = LATE + self.world.heart.stood_still_since(self.asked - ms(5000));
        self.world.journal.most("more than the bound on the server for", more);
        if more.min(self.world.fair_for()) > slack {
            self.flaw(format_args!("{mine} on the server, at most {bound}, for {more:?}"));
        }
        let mut too_quiet = 0;
        for backend in backends.iter().filter(|backend| !is_detached(backend)) {
            let row = rows.iter().find(|row| row.server_id == Some(backend.pid));
            // It may be one that is being opened, or abandoned; these end as well.
            let orphan = lasting.lasts("orphan", backend.pid, row.is_none(), self.asked);
            let limit = drawn.open_timeout + drawn.close_timeout * 2 + slack;
            self.world.journal.most("on the server and not in the pool for", orphan);
            if orphan.min(self.world.fair_for()) > limit {
                self.flaw(format_args!("backend {} is nobody's, for {orphan:?}", backend.pid));
            }
            let in_use = row.is_some_and(|row| row.state == ConnectionState::InUse);
            let aged = drawn.max_lifetime.is_some_and(|life| backend.age > life + limit);
            let old = lasting.lasts("old", backend.pid, aged && !in_use, self.asked);
            if old.min(self.world.fair_for()) > limit {
                self.flaw(format_args!("backend {} is {:?} old", backend.pid, backend.age));
            }
            let quiet = drawn.max_idle.is_some_and(|idle| backend.quiet > idle + limit);
            too_quiet += u32::from(quiet && row.is_some_and(|row| row.state == ConnectionState::Idle));
        }
        let quiet = lasting.lasts("quiet", &self.lane.name, too_quiet > drawn.min_idle, self.asked);
        if quiet.min(self.world.fair_for()) > slack {
            self.flaw(format_args!("{too_quiet} backends are idle for too long, of which {} may be", drawn.min_idle));
        }
    }

    fn flaw(&self, text: impl std::fmt::Display) {
        self.world.journal.flaw(format_args!("{}: {text}", self.lane.name));
    }
}

/// Asks the server, beside the proxy.
fn look(world: &World, client: &mut Option<Client>) -> Option<Vec<Backend>> {
    const SQL: &str = "SELECT pid, split_part(application_name, ' ', 1), \
        extract(epoch FROM clock_timestamp() - backend_start)::float8, \
        extract(epoch FROM clock_timestamp() - coalesce(state_change, backend_start))::float8 \
        FROM pg_stat_activity WHERE application_name LIKE 'soak-%' AND backend_type = 'client backend'";
    if client.is_none() {
        *client = world.server.config("judge").connect(NoTls).ok();
    }
    match client.as_mut()?.query(SQL, &[]) {
        Ok(rows) => {
            // The server's clock may step back.
            let time = |seconds: f64| Duration::from_secs_f64(seconds.max(0.0));
            let backend = |row: &postgres::Row| Backend {
                pid: row.get::<_, i32>(0) as u64,
                lane: row.get(1),
                age: time(row.get(2)),
                quiet: time(row.get(3)),
            };
            Some(rows.iter().map(backend).collect())
        }
        Err(_) => {
            *client = None;
            None
        }
    }
}
