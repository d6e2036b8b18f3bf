//! P4: after a fork the child has the pool's memory and sockets, and none of its threads: it is told so, and does the
//! parent no harm.

use std::os::unix::process::{CommandExt, parent_id};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::direct::Direct;
use crate::fake::{Act, Call, Fake};
use crate::support::{Database, EPSILON, SOON, alone, beside_others, ms, threads_named, wait_until, within};
use log::{LevelFilter, Log, Metadata, Record};
use millpond::{ConnectionState, Error, Manage, Opening, Pool, PoolGuard, PooledConnection, Returned, Validate};
use postgres::{Client, Config, NoTls};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, waitpid};

/// How to connect to the server, in the environment of a process that forks.
const CONNINFO: &str = "FORK_TEST_CONNINFO";

/// Runs a test of this file again, alone in a process of its own: there it finds `Some` way to connect. A process that
/// does not end is ended, with whatever it forked. Meanwhile this process holds `lock`.
fn in_a_process<L>(test: &str, lock: impl FnOnce() -> L) -> Option<Config> {
    if let Ok(conninfo) = std::env::var(CONNINFO) {
        return Some(conninfo.parse().unwrap());
    }
    let _lock = lock();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CONNINFO, Database::get().conninfo(test))
        .process_group(0)
        .spawn()
        .unwrap();
    let mut status = None;
    let ended = wait_until(within(2 * SOON), || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    if !ended {
        let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
        let _ = child.wait();
    }
    assert!(status.is_some_and(|s| s.success()), "{test}, in its own process: {status:?}");
    assert_eq!(Database::get().wait_for(test, 0, within(SOON)), 0);
    None
}

/// Forks this process. `None` in the child, which is to end with [`end`].
fn fork() -> Option<Pid> {
    // SAFETY: the child has this thread only, and must not wait for a lock that another held when it was made. There
    // are two others, which sleep by then (see `at_rest`), and the C library sees to its own locks.
    match unsafe { libc::fork() } {
        0 => None,
        child => Some(Pid::from_raw(child).expect("a fork")),
    }
}

/// The life of a child: `code`, and no return to what the parent does.
fn end(code: impl FnOnce()) -> ! {
    let passed = catch_unwind(AssertUnwindSafe(code)).is_ok();
    std::process::exit(if passed { 0 } else { 1 })
}

fn assert_passed(child: Pid) {
    let (_, status) = waitpid(Some(child), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(0), "the forked child");
}

/// Whether the thread of this name waits for something.
fn is_asleep(name: &str) -> bool {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc").flatten();
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
    // "number (name) state ..."
    stats.into_iter().any(|stat| stat.contains(&format!("({name}) S ")))
}

/// Waits until nobody is left but this thread, the test harness, which waits for it, and the one that keeps the pool's
/// time: those that linger after their work have left.
fn at_rest<M: Manage>(pool: &Pool<M>) {
    let mut threads = Vec::new();
    let alone = wait_until(within(SOON), || {
        threads = threads_named("");
        threads.len() == 3
    });
    assert!(alone && threads.contains(&format!("{}-reaper", pool.name())), "{threads:?}");
    // It does nothing from now on, and so holds no lock.
    assert!(wait_until(within(SOON), || is_asleep("fork-reaper")), "the reaper does not rest");
}

fn number(c: &mut Client) -> i32 {
    c.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

#[track_caller]
fn assert_forked(result: Result<impl Sized, Error>, began: Instant) {
    let Err(error) = result else { panic!("a connection in the child") };
    assert!(began.elapsed() <= EPSILON, "at once: {:?}", began.elapsed());
    let (text, me) = (error.to_string(), std::process::id());
    let start = format!("pool: 'fork' belongs to process {}, of which this process ({me}) is a fork: ", parent_id());
    assert!(error.is_config() && text.starts_with(&start), "{text}");
    assert!(text.ends_with("Build a pool after the fork"), "{text}");
}

struct Printing;

impl Log for Printing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if record.target() != "millpond" {
            return;
        }
        println!("[{}] {}", std::process::id(), record.args());
    }

    fn flush(&self) {}
}

/// The child drops all that it has of the pool, in every way there is; the parent's connections live on.
#[test]
fn drops_in_the_child() {
    let Some(config) = in_a_process("fork::drops_in_the_child", beside_others) else { return };
    // A pool that says something of what the child does would need a thread for it.
    log::set_logger(&Printing).map(|()| log::set_max_level(LevelFilter::Trace)).unwrap();
    let manager = r2d2_postgres::PostgresConnectionManager::new(config, NoTls);
    let pool = Pool::builder().name("fork").max_size(4).build(manager).unwrap();
    let mut in_use = [0; 3].map(|_| pool.get().unwrap());
    let mut idle = pool.get().unwrap();
    let (of_those_in_use, of_idle) = (in_use.each_mut().map(|c| number(c)), number(&mut idle));
    drop(idle);
    let guard = pool.guard();
    at_rest(&pool);

    let Some(child) = fork() else {
        end(|| {
            let [a, b, c] = in_use;
            drop(a);
            PooledConnection::discard(b);
            let panics = AssertUnwindSafe(|| {
                let _c = c;
                resume_unwind(Box::new("in the child"));
            });
            assert!(catch_unwind(panics).map(|(): ()| ()).is_err());
            pool.recycle();
            pool.resize(1).unwrap();
            let began = Instant::now();
            drop(guard);
            let report = pool.close(SOON);
            assert!(began.elapsed() <= EPSILON, "there is nothing to wait for: {report}");
            drop(pool);
            assert_eq!(threads_named("").len(), 1, "no thread is started: {:?}", threads_named(""));
        })
    };
    assert_passed(child);
    assert!(!pool.is_closed());
    assert_eq!(in_use.each_mut().map(|c| number(c)), of_those_in_use, "what was in use works, and is the same");
    assert_eq!(number(&mut pool.get().unwrap()), of_idle, "and so is what was idle");
    drop(in_use);
    assert_eq!(pool.stats().idle, 4);
    let report = guard.close();
    assert!(report.is_complete(), "{report}");
}

/// What a scrape sees of these pools.
#[cfg(feature = "prometheus-client")]
fn metrics(pools: &millpond::metrics::Pools) -> String {
    let mut registry = prometheus_client::registry::Registry::default();
    registry.register_collector(Box::new(pools.clone()));
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &registry).unwrap();
    page
}

/// What would need a thread of the pool's says so at once.
#[test]
fn gets_in_the_child() {
    let Some(config) = in_a_process("fork::gets_in_the_child", beside_others) else { return };
    let manager = Direct::new(config);
    let pool = Pool::builder().name("fork").max_size(2).validate(Validate::Always).build(manager).unwrap();
    let mut in_use = pool.get().unwrap();
    let mut idle = pool.get().unwrap();
    let numbers = [number(&mut in_use.0), number(&mut idle.0)];
    drop(idle);
    #[cfg(feature = "prometheus-client")]
    let pools = millpond::metrics::Pools::of(&pool);
    #[cfg(feature = "prometheus-client")]
    assert!(metrics(&pools).contains("{"));
    at_rest(&pool);
    let Some(child) = fork() else {
        end(|| {
            // It would be validated first, on this very thread: over the parent's socket.
            let began = Instant::now();
            assert_forked(pool.get(), began);
            // And now there is none left.
            assert_forked(pool.get_timeout(SOON), began);
            assert!(pool.try_get().is_none() && !pool.health().serves());
            #[cfg(feature = "prometheus-client")]
            assert!(!metrics(&pools).contains("{"), "the parent's pool is not shown: {}", metrics(&pools));
            assert_eq!(threads_named("").len(), 1);
        })
    };
    assert_passed(child);
    assert_eq!([number(&mut in_use.0), number(&mut pool.get().unwrap().0)], numbers);
    assert_eq!(pool.stats().failed_opens, 0);
    drop(in_use);
    assert!(pool.close(SOON).is_complete());
}

/// A pool that is built in the child is a pool.
#[test]
fn a_pool_of_the_childs_own() {
    let Some(_) = in_a_process("fork::a_pool_of_the_childs_own", beside_others) else { return };
    let fake = Fake::new();
    let pool = Pool::builder().name("fork").build(fake.direct()).unwrap();
    at_rest(&pool);
    let Some(child) = fork() else {
        end(|| {
            let own = Pool::builder().name("own").build(fake.direct()).unwrap();
            drop(own.get().unwrap());
            assert!(own.close(SOON).is_complete());
            assert_eq!((fake.calls(Call::Close), fake.alive()), (1, 1), "its own is closed, and the parent's is not");
        })
    };
    assert_passed(child);
    assert!(pool.close(SOON).is_complete());
}

/// A manager without a lock of its own, which another thread might hold at the fork.
struct Plain(Arc<AtomicUsize>);

impl Manage for Plain {
    type Connection = ();
    type Error = std::convert::Infallible;

    fn open(&self, _: &Opening) -> Result<(), Self::Error> {
        self.0.fetch_add(1, SeqCst);
        Ok(())
    }

    fn validate(&self, _: &mut (), _: Duration) -> Result<(), Self::Error> {
        Ok(())
    }

    fn returned(&self, _: &mut ()) -> Returned {
        Returned::Keep
    }

    fn close(&self, _: (), _: Duration) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// What a child does with the parent's pool.
struct Legacy<'a> {
    pool: &'a Pool<Plain>,
    in_use: Option<PooledConnection<Plain>>,
    guard: Option<PoolGuard<Vec<thread::JoinHandle<()>>>>,
}

type Deed = fn(&mut Legacy<'_>);

const DEEDS: [(&str, Deed); 10] = [
    ("get", |l| {
        let began = Instant::now();
        assert_forked(l.pool.get_timeout(SOON), began);
        assert_forked(l.pool.get_timeout(Duration::ZERO), began);
    }),
    ("try_get", |l| assert!(l.pool.try_get().is_none())),
    ("look", |l| {
        let _ = (l.pool.stats(), l.pool.state(), l.pool.connections(), l.pool.max_size(), l.pool.settings());
        assert!(!l.pool.is_closed() && format!("{:?} {}", l.pool, l.pool.stats()).contains("fork"));
    }),
    ("change", |l| {
        l.pool.resize(3).unwrap();
        l.pool.recycle();
    }),
    ("close", |l| {
        let report = l.pool.close(SOON);
        let text = "pool 'fork' is another process's, of which this one is a fork: nothing was done";
        assert_eq!((report.to_string().as_str(), report.is_complete()), (text, false));
    }),
    ("return", |l| drop(l.in_use.take())),
    ("discard", |l| PooledConnection::discard(l.in_use.take().unwrap())),
    ("detach", |l| {
        assert_eq!(PooledConnection::info(l.in_use.as_ref().unwrap()).state, ConnectionState::InUse);
        PooledConnection::detach(l.in_use.take().unwrap());
    }),
    ("guard", |l| drop((l.guard.take(), l.pool.clone(), l.pool.guard()))),
    ("own", |_| {
        let fake = Fake::new();
        let own = Pool::builder().name("own").max_size(2).build(fake.direct()).unwrap();
        thread::scope(|s| (0..2).for_each(|_| drop(s.spawn(|| drop(own.get().unwrap())))));
        let checked_out = [own.get().unwrap(), own.get().unwrap()];
        let error = own.get_timeout(ms(1)).unwrap_err().to_string();
        assert!(error.contains("by 'fork::children_of_a_busy_parent'"), "{error}");
        drop(checked_out);
        assert!(own.close(SOON).is_complete());
    }),
];

/// A child that does not end is ended.
fn assert_ends(child: Pid, what: &str) {
    let mut status = None;
    let ended = wait_until(within(SOON / 2), || {
        status = waitpid(Some(child), WaitOptions::NOHANG).unwrap();
        status.is_some()
    });
    if !ended {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitpid(Some(child), WaitOptions::empty());
        panic!("a child hangs in '{what}'");
    }
    assert_eq!(status.unwrap().1.exit_status(), Some(0), "a child fails in '{what}'");
}

/// Others were in the middle of anything when it was made: what they had locked is locked for ever.
#[test]
fn children_of_a_busy_parent() {
    let Some(_) = in_a_process("fork::children_of_a_busy_parent", alone) else { return };
    let alive = Arc::new(AtomicUsize::new(0));
    let pool = Pool::builder().name("fork").max_size(4).build(Plain(Arc::clone(&alive))).unwrap();
    let in_use = Some(pool.get().unwrap());
    let over = Arc::new(AtomicBool::new(false));
    let workers = (0..4).map(|_| {
        let (pool, over) = (pool.clone(), Arc::clone(&over));
        thread::spawn(move || {
            while !over.load(SeqCst) {
                drop(pool.get_timeout(SOON).unwrap());
                let _ = pool.stats();
            }
        })
    });
    let guard = Some(pool.guard().owning(workers.collect::<Vec<_>>()));
    let mut legacy = Legacy { pool: &pool, in_use, guard };
    for n in 0..20 {
        for (what, deed) in DEEDS {
            // More than a step of the coarse clock since this thread looked whose process this is, whatever it did
            // then.
            thread::sleep(ms(12));
            let Some(child) = fork() else { end(|| deed(&mut legacy)) };
            assert_ends(child, what);
        }
        // One that was forked by a thread which used the pool at that very moment may take itself for its parent, and
        // be handed what is the parent's. But it does not hang.
        drop(pool.get().unwrap());
        let Some(child) = fork() else {
            end(|| {
                let some = [pool.get_timeout(SOON), pool.get_timeout(SOON)];
                if n % 2 == 0 { std::mem::forget(some) } else { drop(some) }
            })
        };
        assert_ends(child, "use it at that very moment");
    }
    over.store(true, SeqCst);
    drop(legacy.in_use.take());
    let report = legacy.guard.take().unwrap().close();
    assert!(report.is_complete(), "{report}");
    assert_eq!(alive.load(SeqCst), 0);
}

/// Forks in the middle of whatever many threads do with two pools, one of which is closed now and then.
#[test]
fn a_child_forked_in_the_middle_of_everything_ends() {
    let Some(_) = in_a_process("fork::a_child_forked_in_the_middle_of_everything_ends", alone) else { return };
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
        let checked_out = if n % 2 == 0 { pool.get_timeout(ms(20)).ok() } else { None };
        thread::sleep(ms(12)); // three steps of the coarse clock, by which a thread knows its process
        // SAFETY: for a test.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: it takes and keeps no pointer.
                unsafe { libc::alarm(3) };
                let got = pool.get_timeout(ms(10)).is_ok();
                let tried = pool.try_get().is_some();
                drop((pool.stats(), pool.connections(), pool.state(), pool.is_closed()));
                drop(checked_out);
                pool.recycle();
                let _ = pool.resize(2);
                let report = pool.close(SOON);
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
        drop(checked_out);
    }
    stop.store(true, SeqCst);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(bad.is_empty(), "{bad:?}");
    pool.resize(3).unwrap();
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
}
