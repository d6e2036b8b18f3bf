//! A pool of nothing in particular does what a pool does.

use millpond::{Manage, Opening, Pool, PooledConnection, Returned};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

struct Counting(AtomicU32);

impl Manage for Counting {
    type Connection = u32;
    type Error = Infallible;

    fn open(&self, _: &Opening) -> Result<u32, Infallible> {
        Ok(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn validate(&self, _: &mut u32, _: Duration) -> Result<(), Infallible> {
        Ok(())
    }

    fn returned(&self, _: &mut u32) -> Returned {
        Returned::Keep
    }
}

fn pool(max_size: u32) -> Pool<Counting> {
    Pool::builder().max_size(max_size).build(Counting(AtomicU32::new(0))).unwrap()
}

#[test]
fn get_and_return() {
    let pool = pool(2);
    assert_eq!(pool.state().connections, 1);
    let (a, b) = (pool.get().unwrap(), pool.get().unwrap());
    assert_eq!((*a, *b), (0, 1));
    let e = pool.get_timeout(Duration::from_millis(20)).unwrap_err();
    assert!(e.is_timeout() && e.is_exhausted(), "{e}");
    println!("{e}");
    println!("{}", pool.connections());
    drop(a);
    assert_eq!(*pool.get().unwrap(), 0);
    assert_eq!(PooledConnection::info(&b).uses, 1);
    drop(b);
    println!("{}", pool.stats());
    let report = pool.close(Duration::from_secs(5));
    println!("{report}");
    assert!(report.is_complete(), "{report}");
    let e = pool.get().unwrap_err();
    println!("{e}");
    assert!(e.is_closed());
}

#[test]
fn a_waiter_is_served_by_a_return() {
    let pool = pool(1);
    let checked_out = pool.get().unwrap();
    std::thread::scope(|s| {
        let waiter = s.spawn(|| *pool.get().unwrap());
        while pool.stats().waiting == 0 {
            std::thread::yield_now();
        }
        drop(checked_out);
        assert_eq!(waiter.join().unwrap(), 0);
    });
}

#[test]
fn the_guard_closes() {
    let pool = pool(3);
    let guard = pool.guard();
    let report = guard.close();
    assert!(report.is_complete(), "{report}");
    assert!(pool.is_closed());
}
