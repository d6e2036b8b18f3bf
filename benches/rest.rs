//! What a pool costs while nobody uses it: memory per idle connection, threads, and how often they wake up.
//! `cargo bench --bench rest [-- --quick]`; a bit over a minute, in which nothing happens.

mod common;

use common::peers::{self, Nil, Nils};
use common::report::Part;
use common::{Store, Subject, is_quick, ms};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

fn main() {
    if !common::is_bench() {
        return;
    }
    let mut part = Part::new("rest", "At rest");
    memory(&mut part);
    wakeups(&mut part);
    part.finish();
}

// -------------------------------------------------------------------------------------------------- memory

/// The system's allocator, and how much of it is in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator, with the same arguments. `realloc` is made of the others.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes in use because of what `make` made.
fn weigh<T>(make: impl FnOnce() -> T) -> (T, isize) {
    let before = IN_USE.load(Ordering::SeqCst);
    let made = make();
    // Threads that opened connections have their last frees behind them.
    thread::sleep(ms(200));
    (made, IN_USE.load(Ordering::SeqCst).wrapping_sub(before) as isize)
}

fn memory(part: &mut Part) {
    const MANY: usize = 10_000;
    let per = |bytes: isize| format!("{:.0}", bytes as f64 / MANY as f64);
    let mut rows = Vec::new();
    let mut row = |name: &str, empty: isize, full: isize| {
        rows.push(vec![name.to_owned(), empty.to_string(), per(full - empty)]);
    };

    let (_, list) = weigh(|| black_box((0..MANY as u64).map(Nil).collect::<Vec<_>>()));
    row("a list", 0, list);
    // What a process needs once, however many pools it has. They are kept, so that what they would free is not counted.
    let _first = (peers::millpond_pool(1, |b| b), peers::r2d2_pool(1, false));
    thread::sleep(ms(200));

    let small = weigh(|| peers::millpond_pool(1, |b| b));
    let large = weigh(|| {
        let pool = peers::millpond_pool(MANY as u32, |b| b);
        fill(&pool, MANY);
        pool
    });
    row("millpond", small.1, large.1);
    let small = weigh(|| peers::r2d2_pool(1, false));
    let large = weigh(|| peers::r2d2_pool(MANY as u32, false));
    row("r2d2", small.1, large.1);
    type Make = fn(u32) -> Box<dyn Subject>;
    let tasks: [(&str, Make); 2] =
        [("bb8", |size| peers::bb8("", size, false)), ("deadpool", |size| peers::deadpool("", size))];
    for (name, make) in tasks {
        let _first = make(1);
        let filled = |size: usize| {
            let pool = make(size as u32);
            pool.fill(size);
            pool
        };
        let (small, large) = (weigh(|| filled(1)), weigh(|| filled(MANY)));
        row(name, small.1, large.1);
    }

    part.say(&format!(
        "Memory in use, by a counting allocator: a pool with one connection, and what each of {MANY} idle ones adds, itself \
         included ({} bytes here).\n",
        size_of::<Nil>()
    ));
    part.table(&["", "pool of 1, bytes", "bytes per connection"], &rows);
}

fn fill<S: Store>(store: &S, n: usize) {
    let in_use: Vec<_> = (0..n).map(|worker| store.get(worker)).collect();
    drop(in_use);
}

// -------------------------------------------------------------------------------------------------- threads

/// The threads of this process, and how often each yielded or lost its processor.
fn switches() -> BTreeMap<u32, u64> {
    let tasks = fs::read_dir("/proc/self/task").expect("threads are listed in /proc, on Linux only");
    let count = |tid: u32| {
        let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name))?.trim().parse::<u64>().ok();
        Some(field("voluntary_ctxt_switches:")? + field("nonvoluntary_ctxt_switches:")?)
    };
    let tids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    tids.filter_map(|tid| Some((tid, count(tid)?))).collect()
}

fn wakeups(part: &mut Part) {
    if !cfg!(target_os = "linux") {
        return;
    }
    /// Longer than a thread without work lingers, and than any limit of what was done before.
    const SETTLE: Duration = Duration::from_secs(12);
    let time = Duration::from_secs(if is_quick() { 5 } else { 60 });

    let idle_for = Duration::from_secs(1);
    let millpond = millpond::Pool::<Nils>::builder;
    let r2d2 = r2d2::Pool::<Nils>::builder;
    /// What keeps a pool alive, whatever it is.
    type Kept = Box<dyn std::any::Any>;
    let full = |pool: millpond::Pool<Nils>| {
        fill(&pool, 10);
        Box::new(pool) as Kept
    };
    type Make<'a> = Box<dyn Fn() -> Kept + 'a>;
    let pools: [(&str, Make<'_>); 6] = [
        ("millpond, empty", Box::new(|| full(millpond().max_idle(idle_for).build(Nils).expect("a pool")))),
        ("millpond, 10 idle", Box::new(|| full(millpond().build(Nils).expect("a pool")))),
        ("millpond, floor of 10", Box::new(|| full(millpond().min_idle(10).build(Nils).expect("a pool")))),
        ("r2d2, no floor", Box::new(|| Box::new(r2d2().min_idle(Some(0)).build(Nils).expect("a pool")))),
        ("r2d2, defaults", Box::new(|| Box::new(r2d2().build(Nils).expect("a pool")))),
        ("nothing", Box::new(|| Box::new(()))),
    ];
    let mut kept = Vec::new();
    let mut owners = Vec::new();
    for (name, make) in &pools {
        let before = switches();
        kept.push(make());
        thread::sleep(ms(50));
        let own: Vec<u32> = switches().into_keys().filter(|tid| !before.contains_key(tid)).collect();
        owners.push((name, own));
    }
    thread::sleep(SETTLE);
    let before = switches();
    thread::sleep(time);
    let after = switches();
    let rows = owners.iter().map(|(name, own)| {
        let alive: Vec<u32> = own.iter().copied().filter(|tid| after.contains_key(tid)).collect();
        let woken: u64 = alive.iter().map(|tid| after[tid] - before.get(tid).copied().unwrap_or(0)).sum();
        vec![name.to_string(), alive.len().to_string(), woken.to_string()]
    });
    let rows: Vec<_> = rows.collect();
    part.say(&format!(
        "Threads that are left {} s after the last use, and how often they woke up in the next {} s. Default limits, but for \
         the empty pool, whose connections were allowed {} s.\n",
        SETTLE.as_secs(),
        time.as_secs(),
        idle_for.as_secs()
    ));
    part.table(&["", "threads", "wake-ups"], &rows);
    drop(kept);
}
