//! P6: a panic ends no process; and the pool needs little of what a process has only so much of: threads and memory.

use std::any::Any;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, take};
use crate::support::{
    EPSILON, SOON, beside_others, in_a_process, ms, skipped, threads_named, wait_until, watched_alone,
};
use millpond::{ManageConnection, Pool, PooledConnection, Validate};

// ---------------------------------------------------------------------------------------------- what ends a process

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
            assert!(wait_until(Instant::now() + SOON, || threads_named("touchy").is_empty()));
        }
    }
}

#[test]
fn a_manager_that_panics_in_its_drop_ends_no_process() {
    if in_a_process("process::a_manager_that_panics_in_its_drop_ends_no_process", &[]) {
        manager_panics_in_its_drop(|| Box::new("on purpose"));
    }
}

#[test]
fn a_manager_that_panics_in_its_drop_with_what_panics_in_its_drop_ends_no_process() {
    if in_a_process("process::a_manager_that_panics_in_its_drop_with_what_panics_in_its_drop_ends_no_process", &[]) {
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
    if in_a_process("process::a_manager_and_a_hook_that_panic_in_their_drops_end_no_process", &[]) {
        let builder = Pool::builder().name("touchy").event_handler(Box::new(TouchyHook));
        let pool = builder.build(Touchy { payload: || Box::new("on purpose"), wait: ms(50) }).unwrap();
        drop(take(&pool, 3));
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pool)));
        assert!(wait_until(Instant::now() + SOON, || threads_named("touchy").is_empty()));
    }
}

// ---------------------------------------------------------------------------------------------- what grows

#[test]
fn closes_that_hang_do_not_take_all_threads() {
    watched_alone(|| {
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
        assert!(pool.close(SOON).is_complete());
    });
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4
}

#[test]
fn nothing_grows() {
    watched_alone(|| {
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
        assert!(pool.close(SOON).is_complete());
    });
}

// ---------------------------------------------------------------------------------------------- no threads

/// As a user that may have no more threads than it has: nothing is lost, and when there are threads again all is well.
#[test]
fn without_threads_nothing_is_lost() {
    const NAME: &str = "process::without_threads_nothing_is_lost";
    if std::env::var_os("MILLPOND_TEST_CHILD").is_none() {
        // The limit does not bind root, and only root can become somebody else.
        if !rustix::process::geteuid().is_root() {
            return skipped(NAME, "only root can become a user that may have few threads");
        }
        let _beside = beside_others();
        let exe = std::env::current_exe().unwrap();
        let copy = std::path::PathBuf::from(format!("/tmp/millpond_process_{}", std::process::id()));
        std::fs::copy(exe, &copy).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=64321", "--clear-groups", "prlimit", "--nproc=60"]).arg(&copy);
        command
            .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
            .env("MILLPOND_TEST_CHILD", "1")
            .current_dir("/tmp");
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
        let mut checked_out = take(&pool, 3);
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
            0 => drop(checked_out.pop()),
            1 => PooledConnection::discard(checked_out.pop().unwrap()),
            2 => pool.recycle(),
            3 => {
                fake.next(Call::Returned, [Act::Fail]);
                checked_out.clear();
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
        checked_out.truncate(1);
        thread::sleep(ms(400));
        over.store(true, SeqCst);
        others.into_iter().for_each(|t| t.join().unwrap());
        drop(checked_out);
        fake.release(Call::Drop);
        let checked_out: Vec<_> = (0..4).map(|_| pool.get_timeout(Duration::from_secs(3)).ok()).collect();
        assert_eq!(checked_out.iter().flatten().count(), 4, "{n}: {}", pool.stats());
        drop(checked_out);
        let report = pool.close(SOON);
        assert!(report.is_complete(), "{n}: {report}");
        assert!(wait_until(Instant::now() + SOON, || threads_named("poor").is_empty()));
    }
}
