//! P10: at rest the pool is one sleeping thread.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Call, Fake, R2d2Fake};
use crate::support::{EPSILON, SOON, beside_others, ms, threads_named, wait_until, within};
use millpond::{Builder, Pool, Validate};

/// How long the threads that may block stay when they have nothing to do, and then some.
const LINGER: Duration = Duration::from_millis(5_500);

fn builder(name: &str) -> Builder<R2d2Fake> {
    Pool::builder().name(name).max_size(4).max_idle(None).max_lifetime(None).validate(Validate::Never)
}

/// How often the one thread of this name has gone to sleep since it began, which it does once per wake-up. (Not how
/// often it was interrupted, which says more of the machine.)
#[track_caller]
fn sleeps(name: &str) -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc").flatten().map(|task| task.path());
    let is_it = |task: &std::path::PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let its: Vec<_> = tasks.filter(is_it).collect();
    let [task] = &its[..] else { panic!("{} threads are called {name}", its.len()) };
    let status = fs::read_to_string(task.join("status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    line.expect("a count").trim().parse().expect("a number")
}

#[track_caller]
fn at_rest(name: &str) {
    let reaper = [format!("{name}-reaper")];
    assert!(wait_until(within(LINGER), || threads_named(name) == reaper), "{:?}", threads_named(name));
}

#[track_caller]
fn nothing_is_left(name: &str) {
    assert!(wait_until(within(EPSILON), || threads_named(name).is_empty()), "{:?}", threads_named(name));
}

/// Several at a time: it takes a while until their crews have left.
#[test]
fn a_pool_with_nothing_to_do_is_one_thread_that_sleeps() {
    let _beside = beside_others();
    let fake = Fake::new();
    // Empty after it was used, with every deadline that a pool can have.
    let busy = builder("empty").max_idle(ms(50)).max_lifetime(ms(500)).keepalive(ms(20)).leak_threshold(ms(20));
    let empty = busy.build(fake.r2d2()).unwrap();
    let take = || [empty.get().unwrap(), empty.get().unwrap(), empty.get().unwrap()];
    drop(take());
    fake.wait_alive(0);
    // Never used at all.
    let unused = builder("unused").build_unchecked(fake.r2d2());
    // With a floor that stands.
    let floor = builder("floor").min_idle(4).max_idle(ms(50)).build(fake.r2d2()).unwrap();
    // With connections whose time has not come.
    let far = builder("far").max_idle(SOON).max_lifetime(SOON).build(fake.r2d2()).unwrap();

    const NAMES: [&str; 4] = ["empty", "unused", "floor", "far"];
    NAMES.iter().for_each(|name| at_rest(name));
    // The last thread of an executor may just have woken its reaper.
    NAMES.iter().for_each(|name| at_rest_but_for_the_executor(name));
    let all = || NAMES.map(|name| sleeps(&format!("{name}-reaper")));
    let before = all();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(all(), before);
    assert_eq!((floor.state().idle_connections, far.state().idle_connections, fake.opened()), (4, 1, 3 + 4 + 1));

    // What is ready is checked out and returned without anybody else.
    for _ in 0..10_000 {
        drop(far.get().unwrap());
        drop(floor.get().unwrap());
    }
    assert_eq!(all()[3], before[3]);
    NAMES.iter().for_each(|name| at_rest(name));
    assert!([empty, unused, floor, far].iter().all(|pool| pool.close(SOON).is_complete()));
    NAMES.iter().for_each(|name| nothing_is_left(name));
}

#[test]
fn a_full_pool_wakes_the_reaper_once_per_max_idle() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = builder("full").max_idle(ms(200)).build(fake.r2d2()).unwrap();
    let take = || [pool.get().unwrap(), pool.get().unwrap(), pool.get().unwrap(), pool.get().unwrap()];
    drop(take());
    at_rest_but_for_the_executor("full");
    let before = sleeps("full-reaper");
    let (begun, mut rounds) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(3) {
        drop(take());
        rounds += 1;
        thread::sleep(ms(1));
    }
    let (times, periods) = (sleeps("full-reaper") - before, begun.elapsed().div_duration_f64(ms(200)));
    assert!(rounds > 100 && fake.opened() == 4, "{rounds} rounds, {} opened", fake.opened());
    assert!((1.0..periods * 1.5 + 2.0).contains(&(times as f64)), "{times} wake-ups in {periods:.1} periods");
    assert!(pool.close(SOON).is_complete());
    nothing_is_left("full");
}

/// The reaper is asleep, and the executor lingers at most.
#[track_caller]
fn at_rest_but_for_the_executor(name: &str) {
    let reaper = format!("{name}-reaper");
    // A thread gives itself its name.
    assert!(wait_until(within(SOON), || !threads_named(&reaper).is_empty()));
    let mut last = sleeps(&reaper);
    let still = wait_until(within(SOON), || {
        thread::sleep(ms(20));
        let before = std::mem::replace(&mut last, sleeps(&reaper));
        before == last
    });
    assert!(still, "the reaper of {name} does not come to rest");
}

#[test]
fn a_lifetime_is_one_or_two_wake_ups() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = builder("life").max_lifetime(Duration::from_secs(1)).lifetime_jitter(0.0).build(fake.r2d2()).unwrap();
    at_rest_but_for_the_executor("life");
    let before = sleeps("life-reaper");
    fake.wait_alive(0);
    at_rest_but_for_the_executor("life");
    let times = sleeps("life-reaper") - before;
    // That of the lifetime, and to note the limit that the close has.
    assert!((1..=2).contains(&times), "{times} wake-ups");
    assert!(pool.close(SOON).is_complete());
    nothing_is_left("life");
}

/// What a setting repeats by itself has a period, however short a one was wanted.
#[test]
fn the_shortest_limits_do_not_keep_a_processor_busy() {
    let _beside = beside_others();
    const PERIODS: f64 = 100.0;
    let watched = |name: &str, builder: Builder<R2d2Fake>| {
        let fake = Fake::new();
        let pool = builder.build(fake.r2d2()).unwrap();
        assert!(wait_until(within(SOON), || threads_named(name).contains(&format!("{name}-reaper"))));
        let (begun, before) = (Instant::now(), sleeps(&format!("{name}-reaper")));
        let calls = || fake.calls(Call::Validate) + fake.calls(Call::Open);
        let calls_before = calls();
        for _ in 0..50 {
            drop(pool.get_timeout(SOON).unwrap());
            thread::sleep(ms(20));
        }
        let (times, calls) = (sleeps(&format!("{name}-reaper")) - before, calls() - calls_before);
        let seconds = begun.elapsed().as_secs_f64();
        assert!(pool.close(SOON).is_complete());
        (times as f64 / seconds, calls as f64 / seconds)
    };
    // Two connections, each of which is asked or replaced as often as it may be; some wake-ups for each.
    for (name, builder) in [
        ("kept", builder("kept").min_idle(2).keepalive(ms(10))),
        ("aged", builder("aged").min_idle(2).max_lifetime(ms(10))),
        ("idle", builder("idle").min_idle(2).max_idle(Duration::from_nanos(1))),
        ("none", builder("none").max_idle(Duration::from_nanos(1))),
        ("leak", builder("leak").leak_threshold(ms(1))),
    ] {
        let (wake_ups, calls) = watched(name, builder.max_size(4));
        assert!(calls <= 3.0 * PERIODS && wake_ups <= 12.0 * PERIODS, "{name}: {calls} calls, {wake_ups} wake-ups");
    }
}

#[test]
fn a_closed_pool_has_no_threads_at_once() {
    let _beside = beside_others();
    let fake = Fake::new();
    for n in 0..20 {
        let pool = builder("gone").build(fake.r2d2()).unwrap();
        let checked_out = [pool.get().unwrap(), pool.get().unwrap()];
        drop(checked_out);
        // The executor lingers when the end comes.
        match n % 3 {
            0 => assert!(pool.close(SOON).is_complete()),
            1 => assert!(pool.guard().close().is_complete()),
            _ => drop(pool),
        }
        // In this order: a thread that has just been started does not bear its name yet.
        assert!(wait_until(within(EPSILON), || fake.alive() == 0), "{} alive", fake.alive());
        nothing_is_left("gone");
    }
}

#[test]
fn one_returned_after_the_end_leaves_no_threads_either() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = builder("late").build(fake.r2d2()).unwrap();
    let checked_out = pool.get().unwrap();
    drop(pool);
    // Nobody need wait for it.
    nothing_is_left("late");
    drop(checked_out);
    fake.wait_alive(0);
    nothing_is_left("late");
}
