//! The fake server, and the manager of its connections. It knows the truth that the promises are held against.

use super::plan::{Closer, Faults, Manager, Odds, Plan};
use super::promises::{Judge, stalls};
use super::{broken, note};
use fastrand::Rng;
use millpond::event::{AcquireEvent, CheckoutEvent, HandleEvent, ReleaseEvent};
use millpond::model::lock::{Condvar, Mutex};
use millpond::model::thread::{self, panic_in_a_call};
use millpond::model::time::{Instant, now};
use millpond::{Cause, CustomizeConnection, HandleError, Manage, Opening, Pool, Returned};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

pub struct Server {
    pub manager: Manager,
    validation_timeout: Duration,
    // Of the standard library: no task is switched while it is locked.
    state: std::sync::Mutex<State>,
    /// For calls that hang.
    gate: Mutex<()>,
    changed: Condvar,
}

pub struct State {
    dice: Rng,
    faults: Faults,
    /// The faults have stopped for good.
    pub calm: bool,
    pub down: bool,
    next: u64,
    pub links: BTreeMap<u64, Link>,
    /// When the pool was last told that a connection is dead.
    pub told_dead: Option<Instant>,
    /// The pool, for a hook that closes it.
    pub pool: Option<Pool<Fake>>,
    pub hook_closes: Option<(Duration, Arc<Judge>)>,
}

/// The server's end of a connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// When its opening began.
    pub born: Instant,
    /// When the last thing that proved it well began.
    pub proven: Instant,
    pub alive: bool,
    /// The pool was told that it is dead.
    pub told: bool,
    /// A user of it has found it dead.
    pub found: bool,
    pub user: Option<usize>,
    aborted: Arc<AtomicBool>,
}

/// The pool's end of a connection.
pub struct Conn {
    server: Arc<Server>,
    pub id: u64,
}

#[derive(Debug)]
pub struct Fault(pub &'static str, bool);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Fault {}

enum Fate {
    Well,
    Fail,
    Refuse,
    Panic,
    Hang,
    Late,
}

impl Server {
    pub fn new(plan: &Plan) -> Arc<Server> {
        let state = State {
            dice: Rng::with_seed(plan.seed ^ 0x5e7e7),
            faults: plan.faults.clone(),
            calm: false,
            down: false,
            next: 0,
            links: BTreeMap::new(),
            told_dead: None,
            pool: None,
            hook_closes: None,
        };
        Arc::new(Server {
            manager: plan.manager.clone(),
            validation_timeout: plan.limits.validation_timeout,
            state: std::sync::Mutex::new(state),
            gate: Mutex::new(()),
            changed: Condvar::new(),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// The faults stop: whatever hangs goes on.
    pub fn calm_down(&self) {
        {
            let mut state = self.state();
            state.faults = Faults::default();
            state.calm = true;
            state.down = false;
        }
        let gate = self.gate.lock();
        drop(gate);
        self.changed.notify_all();
    }

    /// So many connections die, from the oldest.
    pub fn kill(&self, n: usize) {
        for link in self.state().links.values_mut().filter(|link| link.alive).take(n) {
            link.alive = false;
        }
    }

    pub fn set_down(&self, down: bool) {
        if down {
            self.kill(usize::MAX);
        }
        self.state().down = down;
    }

    /// How many connections there are on the server, dead ones aside.
    pub fn alive(&self) -> usize {
        self.state().links.values().filter(|link| link.alive).count()
    }

    fn abort(&self, aborted: &AtomicBool) {
        let gate = self.gate.lock();
        aborted.store(true, Ordering::Relaxed);
        drop(gate);
        self.changed.notify_all();
    }

    /// Hangs until aborted, until the faults stop, or until `limit` has passed. Whether it was aborted.
    fn hang(&self, aborted: &AtomicBool, limit: Option<Duration>) -> bool {
        let until = limit.map(|limit| now() + limit);
        let mut gate = self.gate.lock();
        while !self.state().calm && !aborted.load(Ordering::Relaxed) {
            gate = match until {
                None => self.changed.wait(gate).expect("no poison"),
                Some(until) if until <= now() => break,
                Some(until) => self.changed.wait_timeout(gate, until - now()).expect("no poison").0,
            };
        }
        aborted.load(Ordering::Relaxed)
    }

    /// What becomes of a call, after the time that it takes. `limit`: what the call was given; it keeps it if `keeps`.
    fn call(
        &self,
        which: impl Fn(&Faults) -> &Odds,
        aborted: &AtomicBool,
        limit: Duration,
        keeps: bool,
    ) -> Result<(), Fault> {
        let (fate, takes) = {
            let state = &mut *self.state();
            let odds = which(&state.faults).clone();
            let slow = if odds.slow.is_zero() { Duration::from_micros(50) } else { odds.slow };
            let takes = slow.mul_f64(state.dice.f64());
            let drawn = state.dice.u32(0..1000);
            let fates = [
                (odds.fail, Fate::Fail),
                (odds.refuse, Fate::Refuse),
                (odds.panic, Fate::Panic),
                (odds.hang, Fate::Hang),
                (odds.late, Fate::Late),
            ];
            let mut sum = 0;
            let fate = fates.into_iter().find(|(odds, _)| {
                sum += odds;
                drawn < sum
            });
            (fate.map_or(Fate::Well, |(_, fate)| fate), takes)
        };
        let cut = Err(Fault("aborted", false));
        match fate {
            Fate::Well if keeps && takes >= limit => {
                thread::sleep(limit);
                return Err(Fault("took too long", false));
            }
            Fate::Well => thread::sleep(takes),
            Fate::Fail => {
                thread::sleep(if keeps { takes.min(limit) } else { takes });
                return Err(Fault("failed", false));
            }
            Fate::Refuse => {
                thread::sleep(if keeps { takes.min(limit) } else { takes });
                return Err(Fault("refused", true));
            }
            Fate::Panic => {
                thread::sleep(if keeps { takes.min(limit) } else { takes });
                panic_in_a_call()
            }
            Fate::Hang | Fate::Late if keeps => {
                self.hang(aborted, Some(limit));
                return Err(Fault("took too long", false));
            }
            Fate::Hang => {
                if self.hang(aborted, None) {
                    return cut;
                }
            }
            Fate::Late => {
                if self.hang(aborted, Some(limit.mul_f64(1.5))) {
                    return cut;
                }
            }
        }
        Ok(())
    }

    fn hook(&self) {
        let (panics, closes) = {
            let state = &mut *self.state();
            let panics = state.dice.u32(0..1000) < state.faults.hooks.panic;
            (panics, state.hook_closes.take().zip(state.pool.clone()))
        };
        if let Some(((grace, judge), pool)) = closes {
            note(|| format!("a hook closes the pool, grace {grace:?}"));
            judge.is_closing();
            super::users::close(&pool, grace, Closer::Hook);
        }
        if panics {
            panic_in_a_call();
        }
    }

    fn link<R>(&self, id: u64, look: impl FnOnce(&mut Link) -> R) -> R {
        look(self.state().links.get_mut(&id).expect("a connection that is not closed"))
    }
}

/// The manager.
pub struct Fake(pub Arc<Server>);

impl Manage for Fake {
    type Connection = Conn;
    type Error = Fault;

    fn open(&self, opening: &Opening) -> Result<Conn, Fault> {
        let server = &self.0;
        let (born, aborted) = (now(), Arc::new(AtomicBool::new(false)));
        if server.manager.abortable {
            let (server, aborted) = (Arc::downgrade(server), Arc::clone(&aborted));
            opening.on_abort(move || {
                if let Some(server) = server.upgrade() {
                    server.abort(&aborted);
                }
            });
        }
        server.call(|faults| &faults.open, &aborted, opening.limit(), false)?;
        let mut state = server.state();
        if state.down {
            return Err(Fault("the server is down", false));
        }
        state.next += 1;
        let id = state.next;
        let link = Link { born, proven: born, alive: true, told: false, found: false, user: None, aborted };
        state.links.insert(id, link);
        note(|| format!("server: {id} is open, asked for {:?} ago", now() - born));
        Ok(Conn { server: Arc::clone(server), id })
    }

    fn validate(&self, conn: &mut Conn, limit: Duration) -> Result<(), Fault> {
        let (server, begun) = (&self.0, now());
        let aborted = server.link(conn.id, |link| Arc::clone(&link.aborted));
        let mut result = server.call(|faults| &faults.validate, &aborted, limit, server.manager.keeps_limits);
        let mut state = server.state();
        let link = state.links.get_mut(&conn.id).expect("a connection that is not closed");
        if !link.alive {
            result = Err(Fault("dead", false));
        }
        match &result {
            Ok(()) => link.proven = begun,
            Err(_) => (link.alive, link.told) = (false, true),
        }
        // (At its limit the check is abandoned: then the pool has counted it as dead by itself, before. Its limit began when
        // a thread was asked for, and that may have been slow.)
        let late = Duration::from_millis(1) + stalls(now() - limit);
        let in_time = now() - begun + late < limit && !aborted.load(Ordering::Relaxed);
        if result.is_err() && in_time {
            state.told_dead = Some(now());
        }
        note(|| format!("server: {} validated, {result:?}", conn.id));
        result
    }

    fn keeps_limits(&self) -> bool {
        self.0.manager.keeps_limits
    }

    fn peek(&self, conn: &mut Conn) -> Option<Result<(), Fault>> {
        let alive = self.0.link(conn.id, |link| link.alive);
        self.0.manager.peeks.then_some(if alive { Ok(()) } else { Err(Fault("dead", false)) })
    }

    fn returned(&self, conn: &mut Conn) -> Returned {
        let mut state = self.0.state();
        let found = state.links.get(&conn.id).is_some_and(|link| link.found);
        if found {
            state.told_dead = Some(now());
            if let Some(link) = state.links.get_mut(&conn.id) {
                link.told = true;
            }
            return Returned::Broken;
        }
        let [reset, discard, outdated] = state.faults.returned;
        let drawn = state.dice.u32(0..1000);
        if drawn < reset {
            Returned::Reset
        } else if drawn < reset + discard {
            Returned::Discard
        } else if drawn < reset + discard + outdated {
            Returned::Outdated
        } else {
            Returned::Keep
        }
    }

    fn reset(&self, conn: &mut Conn, limit: Duration) -> Result<(), Fault> {
        let begun = now();
        let aborted = self.0.link(conn.id, |link| Arc::clone(&link.aborted));
        let result = self.0.call(|faults| &faults.reset, &aborted, limit, false);
        self.0.link(conn.id, |link| {
            if result.is_ok() && link.alive {
                link.proven = begun;
            }
            // A reset of a dead connection cannot succeed.
            if link.alive { result } else { Err(Fault("dead", false)) }
        })
    }

    fn undoes_on_acquire(&self) -> bool {
        self.0.manager.undoes_on_acquire
    }

    fn close(&self, conn: Conn, limit: Duration) {
        let aborted = self.0.link(conn.id, |link| Arc::clone(&link.aborted));
        let _ = self.0.call(|faults| &faults.close, &aborted, limit, false);
        drop(conn);
    }

    fn server_id(&self, conn: &Conn) -> Option<u64> {
        Some(conn.id)
    }

    fn explain(&self, fault: &Fault) -> Cause {
        let cause = Cause::message(fault.0);
        if fault.1 { cause.permanent() } else { cause }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        note(|| format!("server: {} is closed", self.id));
        if self.server.state().links.remove(&self.id).is_none() {
            broken("P9", format!("connection {} was closed twice", self.id));
        }
    }
}

/// The hooks: each may panic, and one closes the pool.
pub struct Hooks(pub Arc<Server>);

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooks")
    }
}

impl CustomizeConnection<Conn, Fault> for Hooks {
    fn on_acquire(&self, _: &mut Conn) -> Result<(), Fault> {
        self.0.hook();
        Ok(())
    }

    fn on_release(&self, conn: Conn) {
        drop(conn);
        self.0.hook();
    }
}

impl HandleError<Fault> for Hooks {
    fn handle_error(&self, _: Fault) {
        self.0.hook();
    }
}

impl HandleEvent for Hooks {
    fn handle_acquire(&self, _: AcquireEvent) {
        self.0.hook();
    }

    fn handle_release(&self, _: ReleaseEvent) {
        self.0.hook();
    }

    fn handle_checkout(&self, _: CheckoutEvent) {
        self.0.hook();
    }
}
