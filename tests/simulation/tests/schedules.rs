//! The shell under a model checker: the real hand-off, reaper, executor and `close`, in many orders of their threads.
//!
//! Each scenario is short, and is run under two of shuttle's schedulers: one that chooses at random, and PCT, which finds
//! with a known probability what needs few switches at the right places. A wait with a deadline ends in two ways. Where
//! the clock is *idle*, it moves when every thread waits: so a wake-up that is lost is a timeout, and a failure. Where
//! it is *free*, it is a thread like every other, and deadlines come at any moment.
//!
//! `MILLPOND_SCHEDULES` says how many orders each scenario is run in, for each scheduler and clock.

use millpond::model::lock::{Condvar, Mutex};
use millpond::model::thread;
use millpond::model::time::{self, now};
use millpond::model::{self, world};
use millpond::{CloseReport, Manage, Opening, Pool, PooledConnection, Returned, Validate};
use shuttle::current::TaskId;
use shuttle::scheduler::{PctScheduler, RandomScheduler, Schedule, Scheduler, Task};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

const CLOCK: usize = 1;

/// Another scheduler, of which this one keeps the clock while somebody can run, if the clock is idle.
struct Clocked<S> {
    inner: S,
    free: bool,
}

impl<S: Scheduler> Scheduler for Clocked<S> {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.inner.new_execution()
    }

    fn next_task(&mut self, tasks: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        let is_clock = |task: &Task| usize::from(task.id()) == CLOCK;
        let ready: Vec<&Task> = tasks.iter().copied().filter(|task| task.runnable()).collect();
        let others: Vec<&Task> = ready.iter().copied().filter(|task| !is_clock(task)).collect();
        match ready.iter().find(|task| is_clock(task)) {
            Some(clock) if others.is_empty() => {
                world(|world| world.note_alone());
                Some(clock.id())
            }
            Some(_) if self.free => self.inner.next_task(&ready, current, is_yielding),
            _ => self.inner.next_task(&others, current, is_yielding),
        }
    }

    fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }
}

fn schedules() -> usize {
    std::env::var("MILLPOND_SCHEDULES").map_or(1_500, |n| n.parse().expect("MILLPOND_SCHEDULES is a number"))
}

/// Runs a scenario in many orders.
fn explore(name: &str, scenario: fn()) {
    let seed = std::env::var("MILLPOND_SCHEDULE_SEED").map_or(1, |n| n.parse().expect("a number"));
    let n = schedules();
    let mut all = 0;
    for free in [false, true] {
        all += with(RandomScheduler::new_from_seed(seed, n), free, scenario);
        all += with(PctScheduler::new_from_seed(seed, 3, n), free, scenario);
    }
    println!("{name}: {all} schedules");
}

fn with(inner: impl Scheduler + 'static, free: bool, scenario: fn()) -> usize {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    config.silence_warnings = true;
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    shuttle::Runner::new(Clocked { inner, free }, config).run(move || {
        model::begin(NUMBER.fetch_add(1, Ordering::Relaxed));
        let clock = shuttle::thread::spawn(time::run_clock);
        scenario();
        // The pool's threads end: those that linger after 5 seconds.
        let patience = now() + Duration::from_secs(600);
        while world(|world| world.alive) > 0 {
            assert!(now() < patience, "{} threads are left", world(|world| world.alive));
            thread::sleep(Duration::from_secs(1));
        }
        time::over();
        clock.join().unwrap();
        model::end();
    })
}

macro_rules! explored {
    ($($name:ident)*) => {
        mod explored {
            $(#[test]
            fn $name() {
                super::explore(stringify!($name), super::$name);
            })*
        }
    };
}

explored! {
    each_of_three_gets_the_only_connection
    a_waiter_that_gives_up_takes_nothing_with_it
    a_close_beside_gets_and_returns
    an_eviction_beside_gets
    a_resize_and_a_recycle_beside_gets
    two_closes_and_a_guard_at_once
    a_return_after_the_end_of_the_reaper
    a_close_that_hangs_after_the_end_of_the_reaper_has_its_limit
    a_return_after_the_end_of_the_reaper_when_no_thread_can_be_started
    an_open_that_hangs_is_abandoned_and_comes_late
    the_last_handle_goes_while_an_open_runs
    no_thread_can_be_started_for_a_while
    a_callers_own_check_beside_a_death
}

// -------------------------------------------------------------------------------------------------- the manager

/// Connections that are numbers, and are counted. The first `hangs` opens hang until they are released, and so do the first
/// `closes_hang` closes.
struct Numbers(Arc<Counted>);

#[derive(Default)]
struct Counted {
    alive: AtomicU32,
    opened: AtomicU32,
    hangs: u32,
    closed: AtomicU32,
    closes_hang: u32,
    keeps_limits: bool,
    dead: Mutex<Vec<u32>>,
    released: Mutex<bool>,
    changed: Condvar,
}

impl Counted {
    fn alive(&self) -> u32 {
        self.alive.load(Ordering::Relaxed)
    }

    fn hang(&self) {
        let mut released = self.released.lock();
        while !*released {
            released = self.changed.wait(released).unwrap();
        }
    }

    fn release(&self) {
        *self.released.lock() = true;
        self.changed.notify_all();
    }
}

struct Number(Arc<Counted>, u32);

impl Drop for Number {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Dead;

impl std::fmt::Display for Dead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("dead")
    }
}

impl std::error::Error for Dead {}

impl Manage for Numbers {
    type Connection = Number;
    type Error = Dead;

    fn open(&self, _: &Opening) -> Result<Number, Dead> {
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed) + 1;
        if number <= self.0.hangs {
            self.0.hang();
        }
        self.0.alive.fetch_add(1, Ordering::Relaxed);
        Ok(Number(Arc::clone(&self.0), number))
    }

    fn validate(&self, conn: &mut Number, _: Duration) -> Result<(), Dead> {
        if self.0.dead.lock().contains(&conn.1) { Err(Dead) } else { Ok(()) }
    }

    fn keeps_limits(&self) -> bool {
        self.0.keeps_limits
    }

    fn returned(&self, _: &mut Number) -> Returned {
        Returned::Keep
    }

    fn close(&self, conn: Number, _: Duration) {
        if self.0.closed.fetch_add(1, Ordering::Relaxed) < self.0.closes_hang {
            self.0.hang();
        }
        drop(conn);
    }
}

fn pool(
    counted: &Arc<Counted>,
    set: impl FnOnce(millpond::Builder<Numbers>) -> millpond::Builder<Numbers>,
) -> Pool<Numbers> {
    let builder = Pool::builder().name("modelled").max_size(1).validate(Validate::Never);
    set(builder).build_unchecked(Numbers(Arc::clone(counted)))
}

/// So long nobody waits in vain, where the clock is idle; where it is free, a deadline may come first.
const LONG: Duration = Duration::from_secs(3600);

fn get(pool: &Pool<Numbers>) -> PooledConnection<Numbers> {
    pool.get_timeout(LONG).unwrap()
}

fn is_whole(report: &CloseReport) {
    assert!(report.is_complete(), "{report}");
}

fn together(bodies: Vec<Box<dyn FnOnce() + Send>>) {
    let all: Vec<_> = bodies.into_iter().map(thread::spawn).collect();
    all.into_iter().for_each(|thread| thread.join().unwrap());
}

// -------------------------------------------------------------------------------------------------- the scenarios

fn each_of_three_gets_the_only_connection() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.fair_after(Duration::ZERO));
    let one = |pool: Pool<Numbers>| {
        Box::new(move || {
            drop(get(&pool));
            drop(get(&pool));
        }) as Box<dyn FnOnce() + Send>
    };
    together((0..3).map(|_| one(pool.clone())).collect());
    assert_eq!((counted.alive(), pool.stats().checkouts), (1, 6));
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}

fn a_waiter_that_gives_up_takes_nothing_with_it() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b);
    let (first, second) = (pool.clone(), pool.clone());
    let held = get(&pool);
    together(vec![
        Box::new(move || drop(first.get_timeout(Duration::from_micros(1)))),
        Box::new(move || drop(get(&second))),
        Box::new(move || drop(held)),
    ]);
    drop(get(&pool));
    is_whole(&pool.close(LONG));
}

fn a_close_beside_gets_and_returns() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b);
    let (first, second, third) = (pool.clone(), pool.clone(), pool.clone());
    let told = |result: Result<PooledConnection<Numbers>, millpond::Error>| {
        if let Err(error) = result {
            assert!(error.is_closed(), "{error}");
        }
    };
    together(vec![
        Box::new(move || told(first.get_timeout(LONG))),
        Box::new(move || told(second.get_timeout(LONG))),
        Box::new(move || is_whole(&third.close(LONG))),
    ]);
    assert_eq!(counted.alive(), 0);
    assert!(pool.try_get().is_none());
}

fn an_eviction_beside_gets() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.max_size(2).max_idle(Duration::from_millis(1)));
    let one = |pool: Pool<Numbers>| {
        Box::new(move || {
            drop(get(&pool));
            thread::sleep(Duration::from_millis(1));
            drop(get(&pool));
        }) as Box<dyn FnOnce() + Send>
    };
    together((0..2).map(|_| one(pool.clone())).collect());
    thread::sleep(LONG);
    assert_eq!((counted.alive(), pool.stats().size()), (0, 0));
    is_whole(&pool.close(LONG));
}

fn a_resize_and_a_recycle_beside_gets() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.max_size(2));
    let (first, second, third) = (pool.clone(), pool.clone(), pool.clone());
    together(vec![
        Box::new(move || drop((get(&first), get(&first)))),
        Box::new(move || drop(get(&second))),
        Box::new(move || {
            third.recycle();
            third.resize(1).unwrap();
            third.resize(2).unwrap();
        }),
    ]);
    drop((get(&pool), get(&pool)));
    assert_eq!(counted.alive(), 2);
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}

fn two_closes_and_a_guard_at_once() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b);
    drop(get(&pool));
    let (first, second, guard) = (pool.clone(), pool.clone(), pool.guard().grace(LONG));
    together(vec![
        Box::new(move || is_whole(&first.close(LONG))),
        Box::new(move || is_whole(&second.close(LONG))),
        Box::new(move || is_whole(&guard.close())),
    ]);
    assert_eq!(counted.alive(), 0);
}

fn a_return_after_the_end_of_the_reaper() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.max_size(2));
    let (one, other) = (get(&pool), get(&pool));
    assert!(!pool.close(Duration::ZERO).is_complete());
    drop(pool);
    together(vec![Box::new(move || drop(one)), Box::new(move || drop(other))]);
    // The last of the pool's threads closes them.
    let patience = now() + LONG;
    while counted.alive() > 0 {
        assert!(now() < patience, "{} are alive", counted.alive());
        thread::sleep(Duration::from_millis(1));
    }
}

fn a_close_that_hangs_after_the_end_of_the_reaper_has_its_limit() {
    let counted = Arc::new(Counted { closes_hang: 1, ..Counted::default() });
    let pool = pool(&counted, |b| b.close_timeout(Duration::from_millis(5)));
    let conn = get(&pool);
    assert!(!pool.close(Duration::ZERO).is_complete());
    thread::sleep(LONG);
    drop(conn);
    thread::sleep(LONG);
    assert_eq!((pool.stats().closing, pool.stats().abandoned), (0, 1), "{}", pool.stats());
    counted.release();
    is_whole(&pool.close(LONG));
    assert_eq!((counted.alive(), pool.stats().abandoned), (0, 0));
}

fn a_return_after_the_end_of_the_reaper_when_no_thread_can_be_started() {
    let counted = Arc::new(Counted { closes_hang: 1, ..Counted::default() });
    let pool = pool(&counted, |b| b.max_size(3).close_timeout(Duration::from_millis(5)));
    let (first, second, third) = (get(&pool), get(&pool), get(&pool));
    assert!(!pool.close(Duration::ZERO).is_complete());
    // The only thread of the executor hangs, and is written off. Then the reaper ends.
    drop(first);
    thread::sleep(LONG);
    world(|world| world.threads = false);
    drop(second);
    drop(third);
    assert_eq!(counted.alive(), 1, "who returned them has closed them: {}", pool.connections());
    world(|world| world.threads = true);
    counted.release();
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}

fn an_open_that_hangs_is_abandoned_and_comes_late() {
    let counted = Arc::new(Counted { hangs: 1, ..Counted::default() });
    let pool = pool(&counted, |b| b.max_size(2).open_timeout(Duration::from_millis(5)));
    let (first, second) = (pool.clone(), Arc::clone(&counted));
    together(vec![
        Box::new(move || drop(get(&first))),
        Box::new(move || {
            thread::sleep(Duration::from_millis(5));
            second.release();
        }),
    ]);
    drop((get(&pool), get(&pool)));
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}

fn the_last_handle_goes_while_an_open_runs() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.min_idle(1));
    let other = pool.clone();
    together(vec![Box::new(move || drop(pool)), Box::new(move || drop(other.get_timeout(Duration::from_micros(1))))]);
    let patience = now() + LONG;
    while counted.alive() > 0 || Arc::strong_count(&counted) > 1 {
        assert!(now() < patience, "{} are alive, {} owners", counted.alive(), Arc::strong_count(&counted));
        thread::sleep(Duration::from_secs(1));
    }
}

fn no_thread_can_be_started_for_a_while() {
    let counted = Arc::<Counted>::default();
    let pool = pool(&counted, |b| b.max_size(2));
    let (first, second) = (pool.clone(), pool.clone());
    let told = |pool: Pool<Numbers>| {
        move || loop {
            match pool.get_timeout(LONG) {
                Ok(conn) => return drop(conn),
                Err(error) => assert!(error.is_connect(), "{error}"),
            }
        }
    };
    together(vec![
        Box::new(told(first)),
        Box::new(move || PooledConnection::discard(get(&second))),
        Box::new(|| {
            world(|world| world.threads = false);
            thread::sleep(Duration::from_millis(1));
            world(|world| world.threads = true);
        }),
    ]);
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}

fn a_callers_own_check_beside_a_death() {
    let counted = Arc::new(Counted { keeps_limits: true, ..Counted::default() });
    let pool = pool(&counted, |b| b.max_size(2).validate(Validate::Always));
    drop((get(&pool), get(&pool)));
    let (first, second, third) = (pool.clone(), pool.clone(), Arc::clone(&counted));
    together(vec![
        Box::new(move || drop(get(&first))),
        Box::new(move || drop(get(&second))),
        Box::new(move || third.dead.lock().push(1)),
    ]);
    let one = get(&pool);
    assert!(!counted.dead.lock().contains(&one.1), "it is checked before each use");
    drop(one);
    is_whole(&pool.close(LONG));
    assert_eq!(counted.alive(), 0);
}
