//! Many pools in one process: opened and closed, idle side by side, and used by one thread.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Call, Fake, R2d2Fake, run};
use crate::support::{SOON, in_a_process, ms, threads_named, wait_until, watched, within};
use millpond::{Builder, Error, ErrorKind, Pool, PooledConnection, Validate};

/// How long a thread of the executor stays when it has nothing to do, and then some.
const LINGER: Duration = ms(5_500);

// ---------------------------------------------------------------------------------------------- a process of its own

/// Runs a test of this file again, in a process of its own, whose threads, files and memory are this test's alone. `true`:
/// this is that process. What it measures is printed with `--nocapture`.
fn measured(test: &str) -> bool {
    // One arena of the allocator's instead of one for each of many threads, which grow for long before they stay.
    in_a_process(test, &[("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "131072")])
}

/// The memory of this process that is not a file's, in kB.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

fn files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn tasks() -> Vec<PathBuf> {
    fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path()).collect()
}

/// How often these threads have gone to sleep, which each does once per wake-up.
fn sleeps(tasks: &[PathBuf]) -> u64 {
    let of = |task: &PathBuf| -> u64 {
        let status = fs::read_to_string(task.join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse().unwrap()
    };
    tasks.iter().map(of).sum()
}

// ---------------------------------------------------------------------------------------------- opened and closed

#[cfg(feature = "postgres")]
#[test]
fn two_hundred_pools_are_opened_and_closed_and_nothing_is_left() {
    const TOGETHER: usize = 40;
    const TIMES: usize = 5;
    /// What the allocator may keep of one batch that it did not keep of the one before, in kB.
    const KEPT: u64 = 1024;
    if !measured("many::two_hundred_pools_are_opened_and_closed_and_nothing_is_left") {
        return;
    }
    let server = crate::support::Server::start();
    let conninfo = server.conninfo("many");
    let batch = |n: usize| {
        let open = |i: usize| {
            let pool = millpond::postgres::builder(&conninfo).unwrap().name(format!("many-{n}-{i}"));
            pool.max_size(3).connection_timeout(SOON).open().unwrap()
        };
        let pools: Vec<_> = (0..TOGETHER).map(open).collect();
        for pool in &pools {
            let mut connection = pool.get().unwrap();
            let row = connection.query_one("SELECT $1::text", &[&pool.name()]).unwrap();
            assert_eq!(row.get::<_, String>(0), pool.name());
        }
        let at_most = (tasks().len(), files(), resident());
        for (i, pool) in pools.into_iter().enumerate() {
            match i % 3 {
                0 => assert!(pool.close(SOON).is_complete()),
                1 => assert!(pool.guard().close().is_complete()),
                _ => drop(pool),
            }
        }
        assert_eq!(server.wait_for("many", 0, within(SOON)), 0);
        assert!(wait_until(within(SOON), || threads_named("many-").is_empty()), "{:?}", threads_named("many-"));
        at_most
    };
    // What a process has once and for all.
    batch(0);
    let (threads, open, before) = (tasks().len(), files(), resident());
    for n in 1..=TIMES {
        let begun = Instant::now();
        let (most_threads, most_files, most) = batch(n);
        eprintln!(
            "{TOGETHER} pools in {:.0?}: {most_threads} threads, {most_files} files, {most} kB; \
             after: {} threads, {} files, {} kB",
            begun.elapsed(),
            tasks().len(),
            files(),
            resident()
        );
        let mut now = (0, 0);
        let as_before = wait_until(within(SOON), || {
            now = (tasks().len(), files());
            now == (threads, open)
        });
        assert!(as_before, "{now:?} threads and files, before {:?}", (threads, open));
    }
    assert!(resident() <= before + KEPT, "{} kB, before {before} kB", resident());
}

// ---------------------------------------------------------------------------------------------- idle side by side

#[test]
fn a_thousand_idle_pools_are_a_thousand_threads_that_sleep() {
    const POOLS: usize = 1000;
    /// What a pool with one idle connection may take, its thread's stack included, in kB.
    const EACH: u64 = 64;
    if !measured("many::a_thousand_idle_pools_are_a_thousand_threads_that_sleep") {
        return;
    }
    let fake = Fake::new();
    let (threads, open, before) = (tasks().len(), files(), resident());
    let begun = Instant::now();
    let build = |n: usize| {
        // With deadlines, which are far, and without.
        let far = (n % 2 == 0).then_some(SOON * 60);
        let builder = builder(&format!("idle-{n}"), 4).max_idle(far).max_lifetime(far);
        builder.build(fake.r2d2()).unwrap()
    };
    let pools: Vec<_> = (0..POOLS).map(build).collect();
    let built = begun.elapsed();
    let alone_now = wait_until(within(LINGER + SOON), || tasks().len() == threads + POOLS);
    assert!(alone_now, "{} threads for {POOLS} pools", tasks().len() - threads);
    assert_eq!((fake.alive(), files()), (POOLS as u64, open));
    let its = resident() - before;
    // The reaper of each may just have been told that its executor has ended.
    let all = tasks();
    let (mut last, mut seen) = (0, sleeps(&all));
    let at_rest = wait_until(within(SOON), || {
        last = std::mem::replace(&mut seen, sleeps(&all));
        thread::sleep(ms(50));
        // (This thread's own are among them.)
        seen.abs_diff(last) <= 2
    });
    assert!(at_rest, "the pools do not come to rest");
    let reapers: Vec<PathBuf> = all.into_iter().filter(|task| name_of(task).starts_with("idle-")).collect();
    let (slept, watched_for) = (sleeps(&reapers), Duration::from_secs(2));
    thread::sleep(watched_for);
    let wake_ups = sleeps(&reapers) - slept;
    eprintln!(
        "{POOLS} idle pools: built in {built:.0?}, {} threads, {its} kB ({:.1} kB each), {wake_ups} wake-ups in {watched_for:?}",
        reapers.len(),
        its as f64 / POOLS as f64
    );
    assert_eq!((reapers.len(), wake_ups), (POOLS, 0));
    assert!(its < EACH * POOLS as u64, "{its} kB");
    // Each is as good as new.
    let connections: Vec<_> = pools.iter().map(|pool| pool.try_get().expect("an idle one")).collect();
    drop(connections);
    assert_eq!(fake.opened(), POOLS as u64);
    let begun = Instant::now();
    pools.iter().for_each(|pool| assert!(pool.close(SOON).is_complete()));
    eprintln!("closed in {:.0?}", begun.elapsed());
    drop(pools);
    fake.wait_alive(0);
    assert!(wait_until(within(SOON), || tasks().len() == threads), "{} threads", tasks().len());
}

fn name_of(task: &std::path::Path) -> String {
    fs::read_to_string(task.join("comm")).unwrap_or_default()
}

// ---------------------------------------------------------------------------------------------- two in one thread

fn builder(name: &str, max_size: u32) -> Builder<R2d2Fake> {
    Pool::builder().name(name).max_size(max_size).max_idle(None).max_lifetime(None).validate(Validate::Never)
}

fn gone(name: &str, fake: &Fake) {
    fake.wait_alive(0);
    assert!(wait_until(within(SOON), || threads_named(name).is_empty()), "{:?}", threads_named(name));
}

#[test]
fn one_thread_uses_a_connection_of_each_of_two_pools_in_either_order() {
    watched(|| {
        let fake = Fake::new();
        let pools = ["pair-a", "pair-b"].map(|name| builder(name, 1).build(fake.r2d2()).unwrap());
        let [a, b] = &pools;
        for (first, second) in [(a, b), (b, a)] {
            for n in 0..100 {
                let (one, two) = (first.get().unwrap(), second.get().unwrap());
                // Neither pool takes the other's connection for its own.
                assert!(first.get_timeout(ms(0)).unwrap_err().is_timeout());
                assert_eq!((first.stats().in_use, second.stats().in_use), (1, 1));
                match n % 3 {
                    0 => drop((one, two)),
                    1 => drop((two, one)),
                    // Returned by another thread, in whichever order.
                    _ => thread::scope(|scope| drop([scope.spawn(|| drop(one)), scope.spawn(|| drop(two))])),
                }
                assert_eq!((first.stats().idle, second.stats().idle), (1, 1));
            }
        }
        assert_eq!(fake.opened(), 2);
        // One is closed while this thread has a connection of each; the other one serves on.
        let (one, two) = (a.get().unwrap(), b.get().unwrap());
        drop(a.close(ms(0)));
        drop(two);
        drop(b.get().unwrap());
        drop(one);
        fake.wait_alive(1);
        assert!(a.close(SOON).is_complete() && b.close(SOON).is_complete());
        gone("pair-", &fake);
    });
}

#[test]
fn threads_that_use_two_pools_in_opposite_orders_all_come_through_where_there_is_one_for_each() {
    const THREADS: u32 = 6;
    watched(|| {
        let fake = Fake::new();
        let pools = ["both-a", "both-b"].map(|name| builder(name, THREADS).build(fake.r2d2()).unwrap());
        let [a, b] = &pools;
        thread::scope(|scope| {
            for n in 0..THREADS {
                let (first, second) = if n % 2 == 0 { (a, b) } else { (b, a) };
                scope.spawn(move || {
                    for _ in 0..500 {
                        let one = first.get_timeout(SOON).unwrap();
                        let two = second.get_timeout(SOON).unwrap();
                        drop((one, two));
                    }
                });
            }
        });
        assert!(pools.iter().all(|pool| pool.close(SOON).is_complete() && pool.stats().timeouts == 0));
        gone("both-", &fake);
    });
}

/// A deadlock of the users' own making: it ends at the deadline, with an error that says who has what.
#[test]
fn two_threads_that_wait_for_each_others_pool_are_told_so_at_the_deadline() {
    watched(|| {
        let fake = Fake::new();
        let pools = ["cross-a", "cross-b"].map(|name| builder(name, 1).build(fake.r2d2()).unwrap());
        let [a, b] = &pools;
        let both_have_one = std::sync::Barrier::new(2);
        let cross = |first: &Pool<R2d2Fake>, second: &Pool<R2d2Fake>, timeout: Duration| {
            let one = first.get().unwrap();
            both_have_one.wait();
            let second = second.get_timeout(timeout);
            drop(one);
            second.map(drop)
        };
        let (hasty, patient) = thread::scope(|scope| {
            let hasty = thread::Builder::new().name("hasty".into()).spawn_scoped(scope, || cross(a, b, ms(100)));
            let patient = thread::Builder::new().name("patient".into()).spawn_scoped(scope, || cross(b, a, SOON));
            (hasty.unwrap().join().unwrap(), patient.unwrap().join().unwrap())
        });
        let error: Error = hasty.unwrap_err();
        let ErrorKind::Timeout(timeout) = error.kind() else { panic!("{error}") };
        assert_eq!((timeout.in_use, timeout.longest_in_use.len()), (1, 1), "{error}");
        assert!(error.is_exhausted() && error.to_string().contains("'patient'"), "{error}");
        assert!(patient.is_ok(), "what the hasty one had returned");
        assert!(pools.iter().all(|pool| pool.close(SOON).is_complete()));
        gone("cross-", &fake);
    });
}

/// One pool's manager and hooks use the other pool, on that pool's own threads, and close it.
#[test]
fn a_pool_may_be_used_and_closed_by_the_manager_of_another() {
    watched(|| {
        let (inner_fake, outer_fake) = (Fake::new(), Fake::new());
        let inner = builder("base", 1).build(inner_fake.r2d2()).unwrap();
        let (used, closes) = (inner.clone(), inner.clone());
        outer_fake.set(Call::Open, run(move || drop(used.get_timeout(SOON).unwrap())));
        let outer =
            builder("upper", 4).connection_customizer(outer_fake.customizer()).build(outer_fake.r2d2()).unwrap();
        // Four opens, side by side, share the one connection.
        let connections: Vec<PooledConnection<_>> = (0..4).map(|_| outer.get_timeout(SOON).unwrap()).collect();
        assert_eq!(inner.stats().checkouts, 4);
        // A caller that has the inner connection keeps the outer pool from opening, and not from its deadline.
        let held = inner.get().unwrap();
        connections.into_iter().for_each(PooledConnection::discard);
        let begun = Instant::now();
        let error = outer.get_timeout(ms(50)).unwrap_err();
        assert!(error.is_timeout() && begun.elapsed() < SOON, "{error}");
        drop(held);
        drop(outer.get_timeout(SOON).unwrap());
        // The end of the outer one closes the inner one.
        let report = Arc::new(parking_lot::Mutex::new(None));
        let told = Arc::clone(&report);
        outer_fake.next(Call::OnRelease, [run(move || *told.lock() = Some(closes.close(SOON).is_complete()))]);
        assert!(outer.close(SOON).is_complete());
        assert_eq!(*report.lock(), Some(true));
        assert!(inner.is_closed());
        gone("base", &inner_fake);
        gone("upper", &outer_fake);
    });
}
