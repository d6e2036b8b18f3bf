//! Many more threads than connections.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::Fake;
use crate::support::{SOON, alone};
use millpond::{Pool, Validate};

#[test]
fn of_two_thousand_threads_on_ten_connections_each_is_served_every_time() {
    const THREADS: usize = 2_000;
    const TIMES: usize = 5;
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(10).validate(Validate::Never).max_idle(None).max_lifetime(None);
    let pool = pool.connection_timeout(SOON * 6).build(fake.r2d2()).unwrap();
    let (in_use, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let begun = Instant::now();
    thread::scope(|scope| {
        for n in 0..THREADS {
            let (pool, in_use, served) = (&pool, &in_use, &served);
            let user = move || {
                for round in 0..TIMES {
                    let connection = pool.get().unwrap();
                    assert!(in_use.fetch_add(1, SeqCst) < 10, "more than there are");
                    // Some return at once, some while others run.
                    match (n + round) % 4 {
                        0 => {}
                        1 => thread::sleep(Duration::from_micros(50)),
                        _ => thread::yield_now(),
                    }
                    in_use.fetch_sub(1, SeqCst);
                    drop(connection);
                    served.fetch_add(1, SeqCst);
                }
            };
            thread::Builder::new().stack_size(128 << 10).spawn_scoped(scope, user).unwrap();
        }
    });
    eprintln!("{THREADS} threads on 10: {:?}, {}", begun.elapsed(), pool.stats().wait_time);
    assert_eq!(served.load(SeqCst), THREADS * TIMES);
    let stats = pool.stats();
    assert_eq!((stats.timeouts, stats.waiting, stats.in_use), (0, 0, 0), "{stats}");
    assert!(pool.close(SOON).is_complete());
    fake.wait_alive(0);
    assert!(begun.elapsed() < SOON * 6, "{:?}", begun.elapsed());
}
