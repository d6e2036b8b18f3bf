//! All promises at once, at random: threads that check out, return, discard, panic, time out; a manager whose every
//! call fails, hangs or panics now and then; resize, recycle, close. Whatever comes together, the promises hold, and
//! when it is over the pool is as good as new.
//!
//! The manager counts the living, and knows who uses what. What it sees is judged; of the pool's own numbers only
//! `lost`, for which a server may see more than the bound.
//!
//! Each run has seeds of its own, which it prints if it fails. `MILLPOND_STRESS_SEED=7` runs that one (threads being
//! what they are, it may take a few attempts to see the same again), `MILLPOND_STRESS_SEEDS=30` so many.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::io::{Write, stderr};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc;
use std::sync::{Arc, Once};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{alone, ms, threads_named, wait_until};
use millpond::event::{AcquireEvent, CheckinEvent, CheckoutEvent, HandleEvent, ReleaseEvent, TimeoutEvent};
use millpond::{
    Cause, CustomizeConnection, ErrorKind, HandleError, Manage, Opening, Pool, PooledConnection, Returned, Stats,
    Validate,
};
use parking_lot::{Condvar, Mutex, MutexGuard};

/// How many seeds are tried, unless told.
const SEEDS: u64 = 8;
/// For how long everything goes wrong.
const CHAOS: Duration = ms(400);
/// Threads that use the pool.
const USERS: u64 = 6;
/// Within what time a pool whose server is well serves everybody: far more than it takes, far less than for ever.
/// Nobody waits for longer than a second for a back-off.
const LONG: Duration = Duration::from_secs(10);
/// What a `get` may take beyond its timeout on a machine that does other things as well.
const LATE: Duration = Duration::from_secs(1);
/// One seed takes half a second.
const PATIENCE: Duration = Duration::from_secs(60);

const NAME: &str = "wild";

#[test]
fn whatever_comes_together_the_promises_hold() {
    let _alone = alone();
    listen_for_panics();
    let number =
        |name: &str| std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{name}: a number")));
    let seeds = match (number("MILLPOND_STRESS_SEED"), number("MILLPOND_STRESS_SEEDS")) {
        (Some(seed), n) => vec![seed; n.unwrap_or(1) as usize],
        (None, n) => {
            let first = RandomState::new().hash_one(0u8) % 1_000_000_000;
            (first..first + n.unwrap_or(SEEDS)).collect()
        }
    };
    let mut failed = Vec::new();
    for (n, seed) in seeds.into_iter().enumerate() {
        SEED.store(seed, SeqCst);
        let (done, ended) = mpsc::channel();
        let begun = Instant::now();
        let life = move || {
            let _ = done.send(live(seed));
        };
        thread::Builder::new().name("life".into()).spawn(life).unwrap();
        let flaws = match ended.recv_timeout(PATIENCE) {
            Ok(flaws) => flaws,
            Err(mpsc::RecvTimeoutError::Timeout) => vec!["it hangs".into()],
            Err(mpsc::RecvTimeoutError::Disconnected) => vec!["the test itself panicked".into()],
        };
        if !flaws.is_empty() {
            let took = begun.elapsed();
            eprintln!("MILLPOND_STRESS_SEED={seed} (the {n}th, {took:.1?}): {flaws:#?}");
            failed.push(seed);
            // What one has left behind is no flaw of the next.
            if !wait_until(Instant::now() + LONG, || threads_named(NAME).is_empty()) {
                break;
            }
        }
    }
    assert!(failed.is_empty(), "failed with these seeds, of which MILLPOND_STRESS_SEED repeats one: {failed:?}");
}

// -------------------------------------------------------------------------------------------------- panics

/// What threads of pools have panicked with. (The panics that this test makes do not come here.)
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The one that is tried.
static SEED: AtomicU64 = AtomicU64::new(0);

fn listen_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = thread::current();
            if let Some(name) = thread.name().filter(|name| name.starts_with(NAME)) {
                let text = format!("{name} panicked: {info}");
                // At once, and past the harness: a defect may end the process.
                let _ = writeln!(stderr(), "MILLPOND_STRESS_SEED={}: {text}", SEED.load(SeqCst));
                PANICS.lock().push(text);
            }
            before(info);
        }));
    });
}

/// A panic on purpose, which prints nothing.
fn panic_quietly() -> ! {
    resume_unwind(Box::new("a panic on purpose"))
}

// -------------------------------------------------------------------------------------------------- chance

/// Good enough to stir.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Dice {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1));
        dice.roll(2);
        dice
    }

    fn roll(&mut self, sides: u64) -> u64 {
        // Knuth's multiplier.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }

    /// One of `sides`.
    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }

    fn between(&mut self, from: u64, to: u64) -> Duration {
        ms(from + self.roll(to - from + 1))
    }
}

// -------------------------------------------------------------------------------------------------- the server

/// What a call comes to.
enum Act {
    Succeed,
    /// And whether for good.
    Fail(bool),
    Panic,
    Last(Duration),
    /// For so long, or until all is calm, or until it is cut; and whether it fails then.
    Hang(Duration, bool),
}

/// The other side, and all that it has seen.
struct Server {
    state: Mutex<State>,
    changed: Condvar,
    /// To compare notes. Emptied before the end, for it keeps the pool open.
    pool: Mutex<Option<Pool<Wild>>>,
    keeps_limits: bool,
    /// Of a hundred calls so many do not simply succeed.
    trouble: u64,
    /// And of a hundred of these so many hang.
    hangs: u64,
}

struct State {
    dice: Dice,
    /// Nothing goes wrong any more.
    calm: bool,
    attempts: u64,
    living: HashMap<u64, Life>,
    /// As many connections as there may be.
    bound: u32,
    /// What was dialled up to this number must not be handed out any more.
    stale: u64,
    /// Counts what happens to proofs.
    events: u64,
    /// The event at which the last one came back dead.
    dead: u64,
    flaws: Vec<String>,
}

impl State {
    /// Notes what is wrong: the first two of a kind.
    fn flaw(&mut self, what: String) {
        let kind = |flaw: &str| flaw.chars().filter(|c| !c.is_ascii_digit()).take(14).collect::<String>();
        if self.flaws.iter().filter(|flaw| kind(flaw) == kind(&what)).count() < 2 {
            self.flaws.push(what);
        }
    }
}

/// What is known of a connection from its dial to the end of its drop.
#[derive(Default)]
struct Life {
    /// Who is at it.
    user: Option<&'static str>,
    /// Why it must not be handed out again.
    spoilt: Option<&'static str>,
    /// Since which event it is known to be well.
    proven: u64,
    cut: bool,
}

#[derive(Clone, Copy)]
struct Marks {
    stale: u64,
    dead: u64,
}

thread_local! {
    /// What `returned` said last on this thread.
    static VERDICT: Cell<Option<Returned>> = const { Cell::new(None) };
}

impl Server {
    fn flaw(&self, what: String) {
        self.state.lock().flaw(what);
    }

    fn calm_down(&self) {
        self.state.lock().calm = true;
        self.changed.notify_all();
    }

    /// Waits until nothing is left, and says what was wrong; if anything, with `what` kind of pool.
    fn flaws(&self, what: &str) -> Vec<String> {
        let all_gone = || self.state.lock().living.is_empty() && threads_named(NAME).is_empty();
        if !wait_until(Instant::now() + LONG, all_gone) {
            let living: Vec<u64> = self.state.lock().living.keys().copied().collect();
            self.flaw(format!("left behind: {living:?}, {:?}", threads_named(NAME)));
        }
        let mut flaws = std::mem::take(&mut *PANICS.lock());
        flaws.append(&mut self.state.lock().flaws);
        if !flaws.is_empty() {
            flaws.push(what.to_owned());
        }
        flaws
    }

    fn event(&self) -> u64 {
        let mut state = self.state.lock();
        state.events += 1;
        state.events
    }

    fn stats(&self) -> Option<Stats> {
        let pool = self.pool.lock().clone()?;
        Some(pool.stats())
    }

    /// Somebody begins to do something with a connection: nobody else does, and it lives.
    fn enter(&self, id: u64, user: &'static str) {
        let mut state = self.state.lock();
        let flaw = match state.living.get_mut(&id) {
            None => Some(format!("#{id} is dead, and {user}")),
            Some(life) => life.user.replace(user).map(|other| format!("#{id} is {other}, and {user}")),
        };
        flaw.into_iter().for_each(|flaw| state.flaw(flaw));
    }

    fn leave(&self, id: u64) {
        if let Some(life) = self.state.lock().living.get_mut(&id) {
            life.user = None;
        }
    }

    fn spoil(&self, id: u64, why: &'static str) {
        if let Some(life) = self.state.lock().living.get_mut(&id) {
            life.spoilt = Some(why);
        }
    }

    /// Does what comes up. `id`: the connection that it is done to. `limit`: past which it would be a lie to go on.
    fn call(&self, id: Option<u64>, limit: Option<Duration>) -> Result<(), Failed> {
        let state = self.state.lock();
        let act = self.act(state);
        match act {
            Act::Succeed => Ok(()),
            Act::Fail(for_good) => Err(Failed::new(for_good)),
            // Not while one is under way: that would end the process.
            Act::Panic if thread::panicking() => Ok(()),
            Act::Panic => panic_quietly(),
            Act::Last(time) => {
                thread::sleep(time);
                Ok(())
            }
            Act::Hang(time, fails) => {
                let deadline = Instant::now() + limit.map_or(time, |limit| limit.min(time));
                let mut state = self.state.lock();
                loop {
                    if id.is_some_and(|id| state.living.get(&id).is_some_and(|life| life.cut)) {
                        return Err(Failed::new(false));
                    }
                    if state.calm || Instant::now() >= deadline {
                        break;
                    }
                    self.changed.wait_until(&mut state, deadline);
                }
                if fails || limit.is_some_and(|limit| limit <= time) { Err(Failed::new(false)) } else { Ok(()) }
            }
        }
    }

    /// Panics now and then.
    fn strike(&self) {
        let strikes = {
            let mut state = self.state.lock();
            !state.calm && state.dice.one_in(50)
        };
        if strikes && !thread::panicking() {
            panic_quietly();
        }
    }

    fn act(&self, mut state: MutexGuard<'_, State>) -> Act {
        if state.calm || state.dice.roll(100) >= self.trouble {
            return Act::Succeed;
        }
        let dice = &mut state.dice;
        if dice.roll(100) < self.hangs {
            return Act::Hang(dice.between(60, 400), dice.one_in(2));
        }
        match dice.roll(10) {
            0..3 => Act::Fail(dice.one_in(20)),
            3 => Act::Panic,
            _ => Act::Last(dice.between(0, 4)),
        }
    }

    /// What is true of every connection that is handed out after this.
    fn marks(&self) -> Marks {
        let state = self.state.lock();
        Marks { stale: state.stale, dead: state.dead }
    }

    /// A connection was handed out to somebody who asked when `marks` held.
    fn handed_out(&self, id: u64, marks: Marks, validate: Validate) {
        self.enter(id, "in use");
        let mut state = self.state.lock();
        let Some(life) = state.living.get(&id) else { return };
        let mut flaws = Vec::new();
        if let Some(why) = life.spoilt {
            flaws.push(format!("#{id} was {why}, and is handed out"));
        }
        if id <= marks.stale {
            flaws.push(format!("#{id} is older than a recycle after #{}, and is handed out", marks.stale));
        }
        if life.proven < marks.dead && validate != Validate::Never {
            flaws.push(format!("#{id} was proven at {}, one was dead at {}: handed out", life.proven, marks.dead));
        }
        flaws.into_iter().for_each(|flaw| state.flaw(flaw));
    }
}

// -------------------------------------------------------------------------------------------------- the manager

struct Wild(Arc<Server>);

/// A connection, from its dial on.
struct Wire {
    id: u64,
    server: Arc<Server>,
}

/// An error that stays on its thread, as a manager's may.
#[derive(Debug)]
struct Failed {
    /// Whether it will not go away.
    for_good: bool,
    _stays: PhantomData<*const ()>,
}

impl Failed {
    fn new(for_good: bool) -> Failed {
        Failed { for_good, _stays: PhantomData }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("failed on purpose")
    }
}

impl std::error::Error for Failed {}

impl Wire {
    /// One more is there: the bound is held, or was until a moment ago.
    fn dial(server: &Arc<Server>) -> Wire {
        let before = server.stats();
        let (id, living, bound) = {
            let mut state = server.state.lock();
            state.attempts += 1;
            state.events += 1;
            let (id, life) = (state.attempts, Life { user: Some("dialled"), proven: state.events, ..Life::default() });
            state.living.insert(id, life);
            (id, state.living.len() as u64, u64::from(state.bound))
        };
        if let (Some(before), Some(after)) = (before, server.stats()) {
            // All that may have been lost at that moment.
            let lost = u64::from(before.abandoned) + after.abandonments - before.abandonments;
            if living > bound + lost {
                let (before, after) = (brief(&before), brief(&after));
                server.flaw(format!("{living} of {bound} are alive, {lost} lost at most: {before}; {after}"));
            }
        }
        Wire { id, server: Arc::clone(server) }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        struct Gone<'a>(&'a Wire);
        impl Drop for Gone<'_> {
            fn drop(&mut self) {
                self.0.server.state.lock().living.remove(&self.0.id);
            }
        }
        let _gone = Gone(self);
        let _ = self.server.call(Some(self.id), None);
    }
}

/// Somebody is at a connection.
struct At<'a>(&'a Wire);

impl<'a> At<'a> {
    fn new(wire: &'a Wire, what: &'static str) -> At<'a> {
        wire.server.enter(wire.id, what);
        At(wire)
    }
}

impl Drop for At<'_> {
    fn drop(&mut self) {
        self.0.server.leave(self.0.id);
    }
}

impl Manage for Wild {
    type Connection = Wire;
    type Error = Failed;

    fn open(&self, opening: &Opening) -> Result<Wire, Failed> {
        let wire = Wire::dial(&self.0);
        let (id, server) = (wire.id, Arc::downgrade(&self.0));
        if id % 3 > 0 {
            opening.on_abort(move || {
                if let Some(server) = server.upgrade() {
                    if let Some(life) = server.state.lock().living.get_mut(&id) {
                        life.cut = true;
                    }
                    server.changed.notify_all();
                }
            });
        }
        self.0.call(Some(id), None)?;
        self.0.leave(id);
        Ok(wire)
    }

    fn validate(&self, wire: &mut Wire, limit: Duration) -> Result<(), Failed> {
        let begun = self.0.event();
        let _at = At::new(wire, "validated");
        let result = self.0.call(Some(wire.id), self.0.keeps_limits.then_some(limit));
        self.proven(wire.id, begun, &result);
        result
    }

    fn keeps_limits(&self) -> bool {
        self.0.keeps_limits
    }

    fn returned(&self, wire: &mut Wire) -> Returned {
        let _at = At::new(wire, "returned");
        VERDICT.set(None);
        let verdict = {
            let mut state = self.0.state.lock();
            match state.dice.roll(100) {
                roll if state.calm => {
                    if roll < 10 {
                        Returned::Reset
                    } else {
                        Returned::Keep
                    }
                }
                0..10 => Returned::Reset,
                10..13 => Returned::Discard,
                13..16 => Returned::Broken,
                16..21 => Returned::Outdated,
                21 => {
                    drop(state);
                    self.0.spoil(wire.id, "in a panic while it was looked at");
                    panic_quietly();
                }
                _ => Returned::Keep,
            }
        };
        match verdict {
            Returned::Discard => self.0.spoil(wire.id, "found unfit"),
            Returned::Broken => self.0.spoil(wire.id, "found broken"),
            Returned::Outdated => self.0.spoil(wire.id, "outdated"),
            _ => {}
        }
        VERDICT.set(Some(verdict));
        verdict
    }

    fn reset(&self, wire: &mut Wire, _: Duration) -> Result<(), Failed> {
        let begun = self.0.event();
        let _at = At::new(wire, "reset");
        let result = self.0.call(Some(wire.id), None);
        self.proven(wire.id, begun, &result);
        result
    }

    fn close(&self, wire: Wire, _: Duration) {
        self.0.spoil(wire.id, "closed");
        let _ = {
            let _at = At::new(&wire, "closed");
            self.0.call(Some(wire.id), None)
        };
    }

    fn server_id(&self, wire: &Wire) -> Option<u64> {
        Some(wire.id)
    }

    fn explain(&self, error: &Failed) -> Cause {
        let cause = Cause::text(error);
        if error.for_good { cause.permanent() } else { cause }
    }
}

impl Wild {
    fn proven(&self, id: u64, begun: u64, result: &Result<(), Failed>) {
        if let Some(life) = self.0.state.lock().living.get_mut(&id) {
            match result {
                Ok(()) => life.proven = begun,
                Err(_) => life.spoilt = Some("found to be no good"),
            }
        }
    }
}

/// The user's hooks, which are no better than the server.
struct Hooks(Arc<Server>);

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooks")
    }
}

impl CustomizeConnection<Wire, Failed> for Hooks {
    fn on_acquire(&self, wire: &mut Wire) -> Result<(), Failed> {
        let _at = At::new(wire, "customized");
        let result = self.0.call(Some(wire.id), None);
        if result.is_err() {
            self.0.spoil(wire.id, "turned down");
        }
        result
    }

    fn on_release(&self, wire: Wire) {
        self.0.spoil(wire.id, "released");
        let _ = self.0.call(Some(wire.id), None);
    }
}

impl HandleError<Failed> for Hooks {
    fn handle_error(&self, _: Failed) {
        let _ = self.0.call(None, None);
        // It uses the pool itself, as a handler that writes to a table would.
        let pool = if self.0.event() % 4 == 0 { self.0.pool.lock().clone() } else { None };
        drop(pool.and_then(|pool| pool.get_timeout(ms(1)).ok()));
    }
}

impl HandleEvent for Hooks {
    fn handle_acquire(&self, _: AcquireEvent) {
        self.0.strike();
    }

    fn handle_release(&self, _: ReleaseEvent) {
        self.0.strike();
    }

    fn handle_checkout(&self, _: CheckoutEvent) {
        self.0.strike();
    }

    fn handle_timeout(&self, _: TimeoutEvent) {
        self.0.strike();
    }

    fn handle_checkin(&self, _: CheckinEvent) {
        self.0.strike();
    }
}

// -------------------------------------------------------------------------------------------------- the users

/// What all users share.
struct Crowd {
    pool: Pool<Wild>,
    server: Arc<Server>,
    validate: Validate,
    /// Connections that somebody else is to return.
    shelf: Mutex<Vec<PooledConnection<Wild>>>,
}

impl Crowd {
    /// Uses the pool until `end`, or until it is closed.
    fn use_it(&self, mut dice: Dice, end: Instant) {
        while Instant::now() < end {
            let marks = self.server.marks();
            let begun = Instant::now();
            let timeout = match dice.roll(4) {
                0 => None,
                1 => Some(Duration::ZERO),
                2 => Some(Duration::from_micros(dice.roll(3_000))),
                _ => Some(dice.between(5, 120)),
            };
            let got = match timeout {
                None => self.pool.try_get(),
                Some(timeout) => self.pool.get_timeout(timeout).ok(),
            };
            let took = begun.elapsed();
            if took > timeout.unwrap_or_default() + LATE {
                self.server.flaw(format!("a get of {timeout:?} took {took:?}"));
            }
            if let Some(conn) = got {
                let id = conn.id;
                self.server.handed_out(id, marks, self.validate);
                match dice.roll(4) {
                    0 => thread::yield_now(),
                    1 => thread::sleep(dice.between(0, 10)),
                    _ => {}
                }
                self.server.leave(id);
                self.end_use(conn, &mut dice);
            } else if self.pool.is_closed() {
                return;
            }
            if dice.one_in(3) {
                let other = self.shelf.lock().pop();
                self.give_back(other);
            }
        }
    }

    fn end_use(&self, conn: PooledConnection<Wild>, dice: &mut Dice) {
        let id = conn.id;
        match dice.roll(40) {
            0 => {
                self.server.spoil(id, "discarded");
                PooledConnection::discard(conn);
            }
            1 => {
                // It lives on, and is none of the pool's.
                self.server.state.lock().living.remove(&id);
                let wire = PooledConnection::detach(conn);
                let _ = catch_unwind(AssertUnwindSafe(|| drop(wire)));
            }
            2 => {
                self.server.spoil(id, "in use during a panic");
                let panic = catch_unwind(AssertUnwindSafe(|| {
                    let _conn = conn;
                    panic_quietly();
                }));
                drop(panic);
            }
            3..6 => self.shelf.lock().push(conn),
            _ => self.give_back(Some(conn)),
        }
    }

    fn give_back(&self, conn: Option<PooledConnection<Wild>>) {
        let Some(conn) = conn else { return };
        let id = conn.id;
        // What was proven before this moment was proven before the pool hears what it hears now.
        let event = self.server.event();
        VERDICT.set(None);
        drop(conn);
        let mut state = self.server.state.lock();
        match VERDICT.take() {
            Some(Returned::Outdated) => state.stale = state.stale.max(id),
            Some(Returned::Broken) => state.dead = state.dead.max(event),
            _ => {}
        }
    }

    /// Turns all the knobs, and looks at the bound, until `end`.
    fn rule(&self, mut dice: Dice, end: Instant, max: u32, floor: u32) {
        // A bound that will hold as soon as what is too much has gone.
        let mut lower = None;
        while Instant::now() < end {
            let before = self.server.state.lock().bound;
            let stats = self.pool.stats();
            // (Nobody else changes it.)
            if stats.size() > before {
                self.server.flaw(format!("{} of {before}: {}", stats.size(), brief(&stats)));
            }
            if let Some(bound) = lower.filter(|&bound| stats.size() <= bound) {
                self.server.state.lock().bound = bound;
                lower = None;
            }
            match dice.roll(60) {
                0 => {
                    let size = 1 + dice.roll(u64::from(max)) as u32;
                    if size >= floor {
                        let mut state = self.server.state.lock();
                        lower = (size < state.bound).then_some(size);
                        state.bound = state.bound.max(size);
                        drop(state);
                        self.pool.resize(size).expect("a size like any other");
                    }
                }
                1 => {
                    let upto = self.server.state.lock().attempts;
                    self.pool.recycle();
                    let mut state = self.server.state.lock();
                    state.stale = state.stale.max(upto);
                }
                _ => thread::sleep(Duration::from_micros(dice.roll(2_000))),
            }
        }
    }
}

/// How a pool ends.
#[derive(Clone, Copy, Debug)]
enum End {
    Close,
    Guard,
    LastHandle,
    /// While everything goes wrong.
    Early,
}

/// One life of a pool. Returns what was wrong.
fn live(seed: u64) -> Vec<String> {
    let mut dice = Dice::new(seed);
    let max = 1 + dice.roll(5) as u32;
    let floor = if dice.one_in(2) { 0 } else { dice.roll(u64::from(max) + 1) as u32 };
    let validate = match dice.roll(4) {
        0 => Validate::Never,
        1 => Validate::Always,
        _ => Validate::AfterIdle(dice.between(1, 30)),
    };
    let server = Arc::new(Server {
        state: Mutex::new(State {
            dice: dice.clone(),
            calm: false,
            attempts: 0,
            living: HashMap::new(),
            bound: max,
            stale: 0,
            events: 0,
            dead: 0,
            flaws: Vec::new(),
        }),
        changed: Condvar::new(),
        pool: Mutex::new(None),
        keeps_limits: dice.one_in(3),
        trouble: 5 + dice.roll(40),
        hangs: dice.roll(40),
    });
    let mut builder = Pool::builder()
        .name(NAME)
        .max_size(max)
        .min_idle(floor)
        .max_idle(if dice.one_in(4) { None } else { Some(dice.between(5, 100)) })
        .max_lifetime(if dice.one_in(3) { None } else { Some(dice.between(30, 300)) })
        .validate(validate)
        .open_timeout(dice.between(30, 80))
        .validation_timeout(dice.between(20, 60))
        .close_timeout(dice.between(30, 80))
        .parallel_opens(1 + dice.roll(4) as u32)
        // Not 0: where whatever is idle needs a check each time, nobody would get anything, for a check is waited for.
        .max_waiting(if dice.one_in(4) { Some(1 + dice.roll(5) as u32) } else { None })
        .keepalive(if dice.one_in(3) { Some(dice.between(10, 60)) } else { None })
        .leak_threshold(if dice.one_in(3) { Some(dice.between(10, 60)) } else { None })
        .error_handler(Box::new(Hooks(Arc::clone(&server))));
    if dice.one_in(2) {
        builder = builder.connection_customizer(Box::new(Hooks(Arc::clone(&server))));
    }
    if dice.one_in(3) {
        builder = builder.event_handler(Box::new(Hooks(Arc::clone(&server))));
    }
    if dice.one_in(4) {
        builder = builder.fair_after(Duration::ZERO);
    }
    let waits_for_one = dice.one_in(4);
    let end = [End::Close, End::Guard, End::LastHandle, End::Early][dice.roll(4) as usize];
    let pool = if waits_for_one {
        match builder.connection_timeout(ms(200)).build(Wild(Arc::clone(&server))) {
            Ok(pool) => pool,
            // Nor does one that could not be built leave anything behind.
            Err(_) => {
                server.calm_down();
                return server.flaws("not built");
            }
        }
    } else {
        builder.build_unchecked(Wild(Arc::clone(&server)))
    };
    *server.pool.lock() = Some(pool.clone());
    let settings = pool.settings().clone();
    let crowd = Crowd { pool, server: Arc::clone(&server), validate, shelf: Mutex::default() };

    let until = Instant::now() + CHAOS;
    thread::scope(|s| {
        for n in 0..USERS {
            let (crowd, dice) = (&crowd, Dice::new(seed ^ (n + 1) << 32));
            thread::Builder::new().name("user".into()).spawn_scoped(s, move || crowd.use_it(dice, until)).unwrap();
        }
        let (crowd, dice) = (&crowd, dice.clone());
        thread::Builder::new()
            .name("ruler".into())
            .spawn_scoped(s, move || crowd.rule(dice, until, max, floor))
            .unwrap();
        if let End::Early = end {
            thread::sleep(CHAOS / 2);
            let begun = Instant::now();
            let grace = CHAOS / 8;
            let report = crowd.pool.close(grace);
            if begun.elapsed() > grace + LATE {
                crowd.server.flaw(format!("closed late: {report}"));
            }
            if crowd.pool.get().is_ok() {
                crowd.server.flaw("handed out after the close".into());
            }
        }
    });

    // From here on all is well.
    server.calm_down();
    let Crowd { pool, shelf, .. } = crowd;
    shelf.into_inner().into_iter().for_each(drop);
    if !pool.is_closed() {
        // What was refused for good is forgotten, or there would be no other attempt for seconds.
        pool.recycle();
        is_as_good_as_new(&pool, &server);
    }
    *server.pool.lock() = None;
    match end {
        End::Close | End::Early => {
            let report = pool.close(LONG);
            if !report.is_complete() {
                server.flaw(format!("not complete: {report}"));
            }
            let stats = pool.stats();
            if stats.opens != stats.closes + stats.detached {
                server.flaw(format!("the books do not balance: {stats}"));
            }
        }
        End::Guard => {
            let guard = pool.guard();
            drop(pool);
            drop(guard);
        }
        End::LastHandle => drop(pool),
    }
    server.flaws(&format!("{end:?}, trouble {}, hangs {}, {settings:?}", server.trouble, server.hangs))
}

fn brief(stats: &Stats) -> String {
    let Stats { idle, in_use, checking, opening, closing, waiting, abandoned, .. } = stats;
    format!(
        "{idle} idle, {in_use} in use, {checking} checking, {opening} opening, {closing} closing, {waiting} waiting, {abandoned} abandoned"
    )
}

/// Every slot is there, and everybody is served.
fn is_as_good_as_new(pool: &Pool<Wild>, server: &Server) {
    let max = pool.max_size();
    let begun = Instant::now();
    let failed = AtomicBool::new(false);
    let get = || {
        // One failure is enough.
        while !failed.load(SeqCst) {
            match pool.get_timeout(LONG) {
                Ok(conn) => return Some(conn),
                // A caller that was refused because too many wait comes again.
                Err(e) if matches!(e.kind(), ErrorKind::TooManyWaiting(_)) && begun.elapsed() < LONG => {
                    thread::sleep(ms(1));
                }
                Err(e) => {
                    failed.store(true, SeqCst);
                    let (took, stats, all) = (begun.elapsed(), brief(&pool.stats()), pool.connections());
                    server.flaw(format!("no get succeeds any more, after {took:.1?}: {e}; {stats}; {all}"));
                }
            }
        }
        None
    };
    thread::scope(|s| {
        for _ in 0..2 * max {
            s.spawn(|| (0..3).for_each(|_| drop(get())));
        }
    });
    let checked_out: Vec<_> = (0..max).filter_map(|_| get()).collect();
    let stats = pool.stats();
    if stats.in_use != max || stats.size() != max {
        server.flaw(format!("{} of {max} can be had: {}", checked_out.len(), brief(&stats)));
    }
    if !wait_until(Instant::now() + LONG, || pool.stats().abandoned == 0) {
        server.flaw(format!("jobs do not come back: {}", brief(&pool.stats())));
    }
}
