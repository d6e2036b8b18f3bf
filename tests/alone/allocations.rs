//! What is allocated while threads wait for a connection: each waiter, before it takes the lock, and nothing else. So
//! nothing is allocated under the lock.

use std::alloc::{GlobalAlloc, Layout, System};
use std::convert::Infallible;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use crate::support::in_a_process;
use millpond::{Pool, Validate};

/// The system's allocator, and how often it was asked for each size.
struct Counting;

/// The last one counts all that are larger.
const SIZES: usize = 1024;
static ALLOCATIONS: [AtomicU64; SIZES] = [const { AtomicU64::new(0) }; SIZES];

// SAFETY: everything is left to the system's allocator, with the same arguments. `realloc` is made of the others.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS[layout.size().min(SIZES - 1)].fetch_add(1, SeqCst);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nils;

impl r2d2::ManageConnection for Nils {
    type Connection = u64;
    type Error = Infallible;

    fn connect(&self) -> Result<u64, Infallible> {
        Ok(0)
    }

    fn is_valid(&self, _: &mut u64) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, _: &mut u64) -> bool {
        false
    }
}

/// Allocations of the most frequent size, allocations of other sizes, and waits, while 8 threads share two connections.
fn shared(fair_after: Duration) -> (u64, u64, u64) {
    const THREADS: usize = 8;
    const TIMES: usize = 2_000;
    let builder = Pool::builder().max_size(2).validate(Validate::Never).fair_after(fair_after);
    let pool = builder.leak_threshold(Duration::from_secs(60)).keepalive(Duration::from_secs(60)).build(Nils).unwrap();
    let barrier = Barrier::new(THREADS + 1);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let work = || {
                    for _ in 0..TIMES {
                        let mut connection = pool.get().unwrap();
                        *connection += 1;
                        thread::yield_now();
                    }
                };
                // In the first round lists and queue become as long as they will be.
                work();
                (0..2).for_each(|_| _ = barrier.wait());
                work();
                (0..2).for_each(|_| _ = barrier.wait());
            });
        }
        let count = || {
            barrier.wait();
            let counts = ALLOCATIONS.each_ref().map(|count| count.load(SeqCst));
            let waits = pool.stats().waits;
            barrier.wait();
            (counts, waits)
        };
        let (before, after) = (count(), count());
        let counts = after.0.iter().zip(before.0).map(|(after, before)| after - before);
        let (all, most) = counts.fold((0, 0), |(all, most), count| (all + count, most.max(count)));
        (most, all - most, after.1 - before.1)
    })
}

#[test]
fn a_hand_off_allocates_nothing_under_the_lock() {
    if !in_a_process("allocations::a_hand_off_allocates_nothing_under_the_lock", &[]) {
        return;
    }
    // Everything is handed off; most is left to threads that run, and waiters are notified; both.
    for fair_after in [Duration::ZERO, Duration::MAX, Duration::from_micros(50)] {
        // What `stats` itself allocates.
        let (waiters, others, waits) = shared(fair_after);
        eprintln!("{fair_after:?}: {waiters} waiters, {others} other allocations, {waits} waits");
        assert!(waits > 1_000, "{waits} waits");
        // (A waiter is made before it is known that it has to wait.)
        assert!(waiters >= waits, "{waiters} waiters for {waits} waits");
        // The look at the counts itself allocates.
        assert!(others <= 3, "{others} other allocations");
    }
}
