//! Virtual time, and those who sleep.

use super::thread;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, AddAssign, Sub};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// When an execution begins. Not zero, so that a moment before it can be named.
const BEGINNING: u64 = 1_000_000_000_000;

/// How long threads that could run are kept from it at most.
const STALL: u64 = 20_000_000;

/// A moment of virtual time, with the methods of `std::time::Instant`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The time. To look at it takes a moment, as it does on a machine.
    pub fn now() -> Instant {
        Instant(read())
    }

    pub fn elapsed(&self) -> Duration {
        Instant::now().saturating_duration_since(*self)
    }

    pub fn checked_add(&self, d: Duration) -> Option<Instant> {
        u64::try_from(d.as_nanos()).ok().and_then(|d| self.0.checked_add(d)).map(Instant)
    }

    pub fn checked_duration_since(&self, earlier: Instant) -> Option<Duration> {
        self.0.checked_sub(earlier.0).map(Duration::from_nanos)
    }

    pub fn saturating_duration_since(&self, earlier: Instant) -> Duration {
        self.checked_duration_since(earlier).unwrap_or_default()
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;

    fn add(self, d: Duration) -> Instant {
        self.checked_add(d).expect("a moment that can be named")
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, d: Duration) {
        *self = *self + d;
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;

    fn sub(self, earlier: Instant) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;

    fn sub(self, d: Duration) -> Instant {
        Instant(self.0 - d.as_nanos() as u64)
    }
}

/// One who sleeps.
pub(super) struct Sleeper {
    task: shuttle::thread::Thread,
    woken: AtomicBool,
}

impl Sleeper {
    pub(super) fn new() -> Arc<Sleeper> {
        Arc::new(Sleeper { task: shuttle::thread::current(), woken: AtomicBool::new(false) })
    }

    /// Whether this call woke it: it sleeps, and nobody else has.
    pub(super) fn wake(&self) -> bool {
        let first = !self.woken.swap(true, Ordering::Relaxed);
        if first {
            self.task.unpark();
        }
        first
    }

    pub(super) fn is_woken(&self) -> bool {
        self.woken.load(Ordering::Relaxed)
    }

    /// Sleeps until it is woken, or `until` has come.
    pub(super) fn sleep(self: &Arc<Self>, until: Option<Instant>) {
        let alarm = until.map(|at| with(|world| world.set_alarm(at, self)));
        while !self.is_woken() {
            shuttle::thread::park();
        }
        if let Some(alarm) = alarm {
            with(|world| world.alarms.remove(&alarm));
        }
    }
}

/// One execution's time, and what goes with it.
pub struct World {
    now: u64,
    alarms: BTreeMap<(u64, u64), Arc<Sleeper>>,
    numbers: u64,
    /// For what the machine decides: how long a look at the clock takes, the pool's jitter.
    pub dice: fastrand::Rng,
    /// The coarse clock's step, in nanoseconds.
    pub tick: u64,
    /// Whether a thread can be started.
    pub threads: bool,
    /// How many threads the pool and its users have.
    pub alive: usize,
    /// Every other task waits.
    alone: bool,
    over: bool,
    /// The times by which the clock ran although somebody could run, and when.
    stalls: Vec<(u64, u64)>,
    /// Called by the clock when every other task waits.
    pub at_rest: Option<Arc<dyn Fn()>>,
    /// How often each was reached.
    pub sometimes: BTreeMap<&'static str, u64>,
    /// How often the clock moved.
    pub steps: u64,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Begins an execution, in the thread of the system that it runs on.
pub fn begin(seed: u64) {
    renew(seed);
    // The first look at the process's origin is one more look at the clock: not in the first execution only.
    crate::leaf::process::origin();
    renew(seed);
}

fn renew(seed: u64) {
    let world = World {
        now: BEGINNING,
        alarms: BTreeMap::new(),
        numbers: 0,
        dice: fastrand::Rng::with_seed(seed),
        tick: 4_000_000,
        threads: true,
        alive: 0,
        alone: false,
        over: false,
        stalls: Vec::new(),
        at_rest: None,
        sometimes: BTreeMap::new(),
        steps: 0,
    };
    // The one before is dropped after the borrow has ended.
    let before = WORLD.with(|w| w.borrow_mut().replace(world));
    drop(before);
}

/// Ends an execution: what it had is dropped.
pub fn end() -> Option<World> {
    let world = WORLD.with(|w| w.borrow_mut().take());
    super::local::forget_all();
    world
}

pub(super) fn with<R>(look: impl FnOnce(&mut World) -> R) -> R {
    WORLD.with(|w| look(w.borrow_mut().as_mut().expect("an execution has begun")))
}

/// The world of this execution.
pub fn world<R>(look: impl FnOnce(&mut World) -> R) -> R {
    with(look)
}

impl World {
    /// The time since the beginning.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.now - BEGINNING)
    }

    /// For how long, since `earlier`, time went on beside threads that could have run.
    pub fn stalled_since(&self, earlier: Instant) -> Duration {
        let stalls = self.stalls.iter().rev().take_while(|(at, _)| *at >= earlier.0);
        Duration::from_nanos(stalls.map(|(_, length)| length).sum())
    }

    /// Every other task waits: for the scheduler to tell, as it picks the clock.
    pub fn note_alone(&mut self) {
        self.alone = true;
    }

    fn set_alarm(&mut self, at: Instant, sleeper: &Arc<Sleeper>) -> (u64, u64) {
        self.numbers += 1;
        let alarm = (at.0, self.numbers);
        self.alarms.insert(alarm, Arc::clone(sleeper));
        alarm
    }
}

/// The time, without a look that takes some.
pub fn now() -> Instant {
    with(|world| Instant(world.now))
}

fn read() -> u64 {
    with(|world| {
        world.now += world.dice.u64(20..400);
        world.now
    })
}

/// The precise clock, without a look that takes some.
pub fn precise() -> u64 {
    with(|world| world.now)
}

/// The coarse clock: nanoseconds since its origin, in steps.
pub fn coarse() -> u64 {
    with(|world| world.now - world.now % world.tick)
}

pub fn tick() -> Duration {
    with(|world| Duration::from_nanos(world.tick))
}

/// A number between 0 and 1, at random.
pub fn jitter() -> f64 {
    with(|world| world.dice.f64())
}

/// From now on the clock ends as soon as it is alone.
pub fn over() {
    with(|world| world.over = true);
}

/// The clock's task.
pub fn run_clock() {
    loop {
        let alone = with(|world| std::mem::take(&mut world.alone));
        if alone {
            let look = with(|world| world.at_rest.clone());
            if let Some(look) = look {
                look();
            }
            if with(|world| world.over) {
                return;
            }
        }
        let next = with(|world| {
            let ((at, number), sleeper) = world.alarms.pop_first()?;
            if at > world.now {
                if !alone {
                    let length = (at - world.now).min(world.dice.u64(1..STALL));
                    world.stalls.push((world.now + length, length));
                    if world.now + length < at {
                        world.now += length;
                        world.alarms.insert((at, number), sleeper);
                        return None;
                    }
                }
                world.steps += 1;
                world.now = at;
            }
            Some(sleeper)
        });
        match next {
            Some(sleeper) => {
                sleeper.wake();
            }
            None => assert!(!alone, "every thread waits, and none for a time: {}", thread::who_waits()),
        }
        // Whoever chose the clock in the middle of the above knew only half of it.
        with(|world| world.alone = false);
        shuttle::thread::yield_now();
    }
}
