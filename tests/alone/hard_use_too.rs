//! Hard use, second part: what ends processes, what grows, what comes at once.

use std::any::Any;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake};
use crate::support::{EPSILON, ms, threads_named, wait_until, watched};
use millpond::{ErrorKind, Manage, ManageConnection, Pool, PooledConnection, Validate};

const LONG: Duration = Duration::from_secs(10);

fn take<M: Manage>(pool: &Pool<M>, n: usize) -> Vec<PooledConnection<M>> {
    (0..n).map(|_| pool.get_timeout(LONG).unwrap()).collect()
}

// ---------------------------------------------------------------------------------------------- what ends a process

/// Runs a test of this file again, in a process of its own. `true`: this is that process.
fn in_a_process(test: &str) -> bool {
    if std::env::var_os("HARD_USE").is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env("HARD_USE", "1");
    let output = command.env("RUST_BACKTRACE", "0").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {text}", output.status);
    false
}

struct Bomb(u32);

impl Drop for Bomb {
    fn drop(&mut self) {
        if self.0 > 0 {
            std::panic::panic_any(Bomb(self.0 - 1));
        }
    }
}

struct Touchy {
    payload: fn() -> Box<dyn Any + Send>,
    wait: Duration,
}

impl Drop for Touchy {
    fn drop(&mut self) {
        std::panic::resume_unwind((self.payload)());
    }
}

struct Slow(Duration);

impl Drop for Slow {
    fn drop(&mut self) {
        thread::sleep(self.0);
    }
}

#[derive(Debug)]
struct Never;

impl std::fmt::Display for Never {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}

impl std::error::Error for Never {}

impl ManageConnection for Touchy {
    type Connection = Slow;
    type Error = Never;

    fn connect(&self) -> Result<Slow, Never> {
        Ok(Slow(self.wait))
    }

    fn is_valid(&self, _: &mut Slow) -> Result<(), Never> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Slow) -> bool {
        false
    }
}

/// The manager goes with the last thread of the pool, which is one of its own.
fn manager_panics_in_its_drop(payload: fn() -> Box<dyn Any + Send>) {
    for wait in [ms(0), ms(100)] {
        for _ in 0..5 {
            let pool = Pool::builder().name("touchy").build(Touchy { payload, wait }).unwrap();
            drop(take(&pool, 3));
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pool)));
            assert!(wait_until(Instant::now() + LONG, || threads_named("touchy").is_empty()));
        }
    }
}

#[test]
fn a_manager_that_panics_in_its_drop_ends_no_process() {
    if in_a_process("hard_use_too::a_manager_that_panics_in_its_drop_ends_no_process") {
        manager_panics_in_its_drop(|| Box::new("on purpose"));
    }
}

#[test]
fn a_manager_that_panics_in_its_drop_with_what_panics_in_its_drop_ends_no_process() {
    if in_a_process("hard_use_too::a_manager_that_panics_in_its_drop_with_what_panics_in_its_drop_ends_no_process") {
        manager_panics_in_its_drop(|| Box::new(Bomb(1)));
    }
}

#[derive(Debug)]
struct TouchyHook;

impl Drop for TouchyHook {
    fn drop(&mut self) {
        std::panic::resume_unwind(Box::new("on purpose"));
    }
}

impl millpond::event::HandleEvent for TouchyHook {}

#[test]
fn a_manager_and_a_hook_that_panic_in_their_drops_end_no_process() {
    if in_a_process("hard_use_too::a_manager_and_a_hook_that_panic_in_their_drops_end_no_process") {
        let builder = Pool::builder().name("touchy").event_handler(Box::new(TouchyHook));
        let pool = builder.build(Touchy { payload: || Box::new("on purpose"), wait: ms(50) }).unwrap();
        drop(take(&pool, 3));
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pool)));
        assert!(wait_until(Instant::now() + LONG, || threads_named("touchy").is_empty()));
    }
}

// ---------------------------------------------------------------------------------------------- what grows

#[test]
fn closes_that_hang_do_not_take_all_threads() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().name("many").max_size(2000).parallel_opens(64).max_lifetime(None).max_idle(None);
        let pool = builder.close_timeout(Duration::from_secs(20)).build(fake.r2d2()).unwrap();
        drop(take(&pool, 2000));
        fake.set(Call::Drop, Act::Block);
        pool.recycle();
        let mut most = 0;
        let _ = wait_until(Instant::now() + Duration::from_secs(6), || {
            most = most.max(threads_named("many").len());
            most > 1200
        });
        fake.release(Call::Drop);
        assert!(most <= 1100, "{most} threads");
        assert!(pool.close(LONG).is_complete());
    });
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4
}

#[test]
fn nothing_grows() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).max_lifetime(ms(40)).max_idle(ms(30)).keepalive(ms(10));
        let builder = builder.leak_threshold(ms(1)).min_idle(1).validate(Validate::AfterIdle(ms(1)));
        let builder = builder.error_handler(fake.error_handler()).event_handler(fake.event_handler());
        let pool = builder.build(fake.direct()).unwrap();
        let round = |n: u64| {
            for i in 0..n {
                match i % 70 {
                    0 if i % 700 == 0 => fake.next(Call::Open, [Act::Fail]),
                    1 => fake.next(Call::Validate, [Act::Fail]),
                    2 => fake.next(Call::Returned, [Act::Fail]),
                    3 => pool.resize(1 + (i % 5) as u32).unwrap(),
                    4 => pool.recycle(),
                    _ => {}
                }
                let got = pool.get_timeout(ms(i % 3 * 5));
                drop(pool.try_get());
                let _ = pool.get_timeout(Duration::from_nanos(1));
                if i % 50 == 0 {
                    let pool = pool.clone();
                    thread::spawn(move || drop(pool.get_timeout(ms(2)))).join().unwrap();
                }
                drop(got);
            }
        };
        round(20000);
        let before = resident();
        round(40000);
        let after = resident();
        eprintln!("{before} kB, {after} kB, {}", pool.stats());
        assert!(after < before + 1500, "{before} kB, {after} kB");
        assert!(pool.close(LONG).is_complete());
    });
}

// ---------------------------------------------------------------------------------------------- at once

#[test]
fn closes_at_once_with_everything_else() {
    watched(|| {
        for n in 0..150u64 {
            let fake = Fake::new();
            let name = "rush";
            let builder = Pool::builder().name(name).max_size(1 + (n % 4) as u32).min_idle((n % 2) as u32);
            let builder = builder.validate(if n % 3 == 0 { Validate::Always } else { Validate::AfterIdle(ms(1)) });
            let pool = builder.max_lifetime(ms(20)).build(fake.direct()).unwrap();
            if n % 5 == 0 {
                fake.set(Call::Validate, Act::Last(ms(1)));
                fake.set(Call::Open, Act::Last(ms(1)));
            }
            let late = Arc::new(AtomicU64::new(0));
            let users: Vec<_> = (0..6)
                .map(|i| {
                    let (pool, late) = (pool.clone(), Arc::clone(&late));
                    thread::spawn(move || {
                        for k in 0.. {
                            let was_closed = pool.is_closed();
                            let begun = Instant::now();
                            match pool.get_timeout(ms(500)) {
                                Ok(c) => {
                                    assert!(!was_closed, "handed out by a closed pool");
                                    if k % 7 == i {
                                        c.discard_it();
                                    }
                                }
                                Err(e) if matches!(e.kind(), ErrorKind::Closed(_)) => break,
                                Err(e) => {
                                    eprintln!("{e}: {:?}", begun.elapsed());
                                    late.fetch_add(1, SeqCst);
                                }
                            }
                            match (k + i) % 9 {
                                0 => pool.resize(1 + (k % 4) as u32).unwrap_or(()),
                                1 => pool.recycle(),
                                2 => drop(pool.try_get()),
                                _ => {}
                            }
                        }
                    })
                })
                .collect();
            thread::sleep(ms(3 + n % 7));
            let begun = Instant::now();
            let closers: Vec<_> = (0..2)
                .map(|i| {
                    let pool = pool.clone();
                    thread::spawn(move || match i {
                        0 => pool.close(LONG),
                        _ => pool.guard().close(),
                    })
                })
                .collect();
            let reports: Vec<_> = closers.into_iter().map(|c| c.join().unwrap()).collect();
            assert!(reports.iter().all(|r| r.is_complete()), "{n}: {reports:?}");
            assert!(begun.elapsed() < Duration::from_secs(1), "{n}: {:?}", begun.elapsed());
            assert_eq!(fake.alive(), 0);
            users.into_iter().for_each(|u| u.join().unwrap());
            assert_eq!(late.load(SeqCst), 0, "{n}");
            assert!(
                wait_until(Instant::now() + ms(200), || threads_named(name).is_empty()),
                "{:?}",
                threads_named(name)
            );
        }
    });
}

trait DiscardIt {
    fn discard_it(self);
}

impl<M: Manage> DiscardIt for PooledConnection<M> {
    fn discard_it(self) {
        PooledConnection::discard(self);
    }
}

/// Whatever of the user's hangs, what is idle goes in time.
#[test]
fn whatever_hangs_evictions_are_in_time() {
    watched(|| {
        let calls = [
            Call::Open,
            Call::Validate,
            Call::Reset,
            Call::Close,
            Call::Drop,
            Call::HandleError,
            Call::HandleAcquire,
            Call::HandleRelease,
            Call::Explain,
            Call::ServerId,
            Call::Abort,
            Call::Cancel,
        ];
        for call in calls {
            let fake = Fake::new();
            fake.abortable(matches!(call, Call::Abort | Call::Cancel));
            let builder = Pool::builder().max_size(8).max_idle(ms(250)).validate(Validate::Always);
            let builder = builder.open_timeout(ms(100)).close_timeout(ms(100)).validation_timeout(ms(100));
            let builder = builder.error_handler(fake.error_handler()).event_handler(fake.event_handler());
            let pool = builder.build(fake.direct()).unwrap();
            let mut held = take(&pool, 6);
            match call {
                Call::HandleError | Call::Explain => fake.next(Call::Validate, [Act::Fail]),
                Call::Abort => fake.next(Call::Validate, [Act::Block]),
                Call::Cancel => {
                    fake.verdict(millpond::Returned::Reset);
                    fake.next(Call::Reset, [Act::Block]);
                }
                Call::Reset => fake.verdict(millpond::Returned::Reset),
                _ => {}
            }
            fake.next(call, [Act::Block]);
            drop(held.pop());
            fake.verdict(millpond::Returned::Keep);
            drop(pool.try_get());
            if matches!(call, Call::Close | Call::Drop | Call::HandleRelease) {
                PooledConnection::discard(held.pop().unwrap());
            }
            if matches!(call, Call::Open | Call::HandleAcquire | Call::ServerId) {
                fake.next(Call::Validate, [Act::Fail]);
                drop(pool.get_timeout(ms(20)));
            }
            thread::sleep(ms(150));
            drop(held);
            let begun = Instant::now();
            let gone = wait_until(begun + ms(250) + EPSILON, || pool.stats().idle == 0);
            let late = pool.stats().max_lateness;
            eprintln!("{call:?}: {late:?}, inside {}", fake.inside(call));
            assert!(gone && late < EPSILON, "{call:?}: {late:?} {}", pool.stats());
            fake.release(call);
            let report = pool.close(LONG);
            assert!(report.is_complete(), "{call:?}: {report}");
        }
    });
}

/// At low traffic, for whoever cannot wait, and for all.
#[test]
fn low_traffic_is_served_at_once() {
    watched(|| {
        for validate in [Validate::AfterIdle(ms(50)), Validate::Never, Validate::Always] {
            for way in ["try_get", "zero", "1 ms", "mixed"] {
                let fake = Fake::new();
                let builder = Pool::builder().max_size(8).validate(validate).max_idle(None).max_lifetime(None);
                let pool = builder.build(fake.r2d2()).unwrap();
                drop(take(&pool, 8));
                let mut ok = 0;
                for i in 0..8 {
                    thread::sleep(ms(120));
                    ok += u32::from(match (way, i % 3) {
                        ("try_get", _) | ("mixed", 0) => pool.try_get().is_some(),
                        ("zero", _) | ("mixed", 1) => pool.get_timeout(Duration::ZERO).is_ok(),
                        _ => pool.get_timeout(ms(1)).is_ok(),
                    });
                }
                eprintln!("{validate:?}, {way}: {ok} of 8");
                assert!(ok >= if validate == Validate::Always { 3 } else { 6 }, "{validate:?} {way}: {ok}");
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------- forks

/// Forks in the middle of whatever many threads do with two pools, one of which is closed now and then.
#[test]
fn a_child_forked_in_the_middle_of_everything_ends() {
    if !in_a_process("hard_use_too::a_child_forked_in_the_middle_of_everything_ends") {
        return;
    }
    let fake = Fake::new();
    fake.set(Call::Validate, Act::Last(Duration::from_micros(200)));
    let build = || {
        let builder = Pool::builder().max_size(3).validate(Validate::AfterIdle(ms(1))).max_lifetime(ms(30));
        builder.keepalive(ms(10)).max_idle(ms(20)).build(fake.r2d2()).unwrap()
    };
    let pool = build();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..6)
        .map(|i| {
            let (pool, stop) = (pool.clone(), Arc::clone(&stop));
            thread::spawn(move || {
                let mut k = 0u64;
                while !stop.load(SeqCst) {
                    k += 1;
                    match (i + k) % 8 {
                        0 => drop(pool.stats()),
                        1 => drop(pool.connections()),
                        2 => drop(pool.try_get()),
                        3 => pool.recycle(),
                        4 => pool.resize(1 + (k % 4) as u32).unwrap(),
                        5 => thread::spawn(move || drop(format!("{k}"))).join().unwrap(),
                        6 => drop(pool.get_timeout(Duration::from_micros(100)).map(PooledConnection::detach)),
                        _ => drop(pool.get_timeout(ms(5))),
                    }
                }
            })
        })
        .collect();
    let mut bad = Vec::new();
    for n in 0..200 {
        let held = if n % 2 == 0 { pool.get_timeout(ms(20)).ok() } else { None };
        thread::sleep(ms(12)); // three steps of the coarse clock, by which a thread knows its process
        // SAFETY: for a test.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: it takes and keeps no pointer.
                unsafe { libc::alarm(3) };
                let got = pool.get_timeout(ms(10)).is_ok();
                let tried = pool.try_get().is_some();
                drop((pool.stats(), pool.connections(), pool.state(), pool.is_closed()));
                drop(held);
                pool.recycle();
                let _ = pool.resize(2);
                let report = pool.close(LONG);
                drop(pool.guard());
                let again = pool.clone();
                drop(again);
                // SAFETY: as above.
                unsafe { libc::_exit(i32::from(got) + 2 * i32::from(tried) + 4 * i32::from(report.is_complete())) }
            }
            child => {
                let mut status = 0;
                // SAFETY: as above.
                unsafe { libc::waitpid(child, &mut status, 0) };
                if status != 0 {
                    bad.push((n, status));
                }
            }
        }
        drop(held);
    }
    stop.store(true, SeqCst);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(bad.is_empty(), "{bad:?}");
    pool.resize(3).unwrap();
    let report = pool.close(LONG);
    assert!(report.is_complete(), "{report}");
}

/// What hangs keeps nobody from what is idle, not even if there are to be fewer.
#[test]
fn a_smaller_pool_keeps_what_it_has_rather_than_what_hangs() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).build(fake.r2d2()).unwrap();
        let held = pool.get().unwrap();
        fake.set(Call::Open, Act::Block);
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let pool = pool.clone();
                thread::spawn(move || drop(pool.get_timeout(ms(100))))
            })
            .collect();
        waiters.into_iter().for_each(|w| w.join().unwrap());
        fake.wait_inside(Call::Open, 3);
        drop(held);
        pool.resize(1).unwrap();
        let got = pool.get_timeout(Duration::from_secs(3));
        let stats = pool.stats();
        fake.release(Call::Open);
        assert!(got.is_ok(), "{stats}");
    });
}

// ---------------------------------------------------------------------------------------------- no threads

/// As a user that may have no more threads than it has: nothing is lost, and when there are threads again all is well.
#[test]
fn without_threads_nothing_is_lost() {
    const NAME: &str = "hard_use_too::without_threads_nothing_is_lost";
    if std::env::var_os("HARD_USE").is_none() {
        // The limit does not bind root, and only root can become somebody else.
        if !rustix::process::geteuid().is_root() {
            return eprintln!("SKIPPED: not root");
        }
        let exe = std::env::current_exe().unwrap();
        let copy = std::path::PathBuf::from(format!("/tmp/hard_use_{}", std::process::id()));
        std::fs::copy(exe, &copy).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=64321", "--clear-groups", "prlimit", "--nproc=60"]).arg(&copy);
        command.args(["--exact", NAME, "--nocapture", "--test-threads=1"]).env("HARD_USE", "1").current_dir("/tmp");
        let output = command.output().unwrap();
        let _ = std::fs::remove_file(&copy);
        let text = String::from_utf8_lossy(&output.stderr);
        eprintln!("{text}");
        assert!(output.status.success(), "{:?}: {text}", output.status);
        return;
    }
    for n in 0..12 {
        let fake = Fake::new();
        let builder = Pool::builder().name("poor").max_size(4).max_idle(ms(300)).validate(Validate::Always);
        let builder = builder.validation_timeout(ms(200)).close_timeout(ms(200)).open_timeout(ms(200));
        let pool = builder.build(fake.r2d2()).unwrap();
        let mut held = take(&pool, 3);
        if n == 0 || n == 4 {
            // Until nobody lingers.
            thread::sleep(ms(5200));
        }
        let over = Arc::new(AtomicBool::new(false));
        let mut others = Vec::new();
        loop {
            let over = Arc::clone(&over);
            match thread::Builder::new().stack_size(64 << 10).spawn(move || {
                while !over.load(SeqCst) {
                    thread::sleep(ms(10));
                }
            }) {
                Ok(thread) => others.push(thread),
                Err(_) => break,
            }
        }
        match n / 2 {
            0 => drop(held.pop()),
            1 => PooledConnection::discard(held.pop().unwrap()),
            2 => pool.recycle(),
            3 => {
                fake.next(Call::Returned, [Act::Fail]);
                held.clear();
            }
            4 => fake.next(Call::Drop, [Act::Block]),
            _ => drop(pool.try_get()),
        }
        let begun = Instant::now();
        let got = pool.get_timeout(ms(100));
        let took = begun.elapsed();
        let text = got.as_ref().map(|_| String::new()).unwrap_or_else(ToString::to_string);
        eprintln!("{n}: {took:?} {text}, {} others", others.len());
        assert!(took < ms(100) + EPSILON, "{n}: {took:?}");
        drop(got);
        held.truncate(1);
        thread::sleep(ms(400));
        over.store(true, SeqCst);
        others.into_iter().for_each(|t| t.join().unwrap());
        drop(held);
        fake.release(Call::Drop);
        let held: Vec<_> = (0..4).map(|_| pool.get_timeout(Duration::from_secs(3)).ok()).collect();
        assert_eq!(held.iter().flatten().count(), 4, "{n}: {}", pool.stats());
        drop(held);
        let report = pool.close(LONG);
        assert!(report.is_complete(), "{n}: {report}");
        assert!(wait_until(Instant::now() + LONG, || threads_named("poor").is_empty()));
    }
}
