//! The pools, and what takes the place of one, on connections that are nothing: what a checkout itself costs.
//!
//! Every pool waits for at most 30 seconds, and takes the connection used last. bb8 and deadpool are made for tasks; here
//! they serve threads, each of which enters their runtime once per `get`. That is what they cost a threaded server, not
//! what they cost a task: [`entering`] is the part that is tokio's.

use super::{Store, Subject, ms, named};
use crossbeam_utils::atomic::AtomicCell;
use parking_lot::{Condvar, Mutex};
use std::convert::Infallible;
use std::ops::{Deref, DerefMut};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};

/// How long a checkout may wait.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection without I/O. Small, so that a pool that moves it about is not charged for its size.
#[derive(Debug, Default)]
pub struct Nil(pub u64);

/// What opens and checks it: in no time.
#[derive(Debug)]
pub struct Nils;

impl r2d2::ManageConnection for Nils {
    type Connection = Nil;
    type Error = Infallible;

    fn connect(&self) -> Result<Nil, Infallible> {
        Ok(Nil(0))
    }

    fn is_valid(&self, _: &mut Nil) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Nil) -> bool {
        false
    }
}

impl bb8::ManageConnection for Nils {
    type Connection = Nil;
    type Error = Infallible;

    async fn connect(&self) -> Result<Nil, Infallible> {
        Ok(Nil(0))
    }

    async fn is_valid(&self, _: &mut Nil) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Nil) -> bool {
        false
    }
}

impl deadpool::managed::Manager for Nils {
    type Type = Nil;
    type Error = Infallible;

    async fn create(&self) -> Result<Nil, Infallible> {
        Ok(Nil(0))
    }

    async fn recycle(
        &self,
        _: &mut Nil,
        _: &deadpool::managed::Metrics,
    ) -> deadpool::managed::RecycleResult<Infallible> {
        Ok(())
    }
}

/// Where [`everybody`] has r2d2 without its test, the 1.00 of every comparison.
pub const R2D2: usize = 1;

/// All that a contended checkout is measured on, each with `size` connections.
pub fn everybody(size: u32) -> Vec<Box<dyn Subject>> {
    let all = vec![
        millpond("millpond", size, |b| b),
        r2d2("r2d2 untested", size, false),
        r2d2("r2d2 defaults", size, true),
        bb8("bb8 untested", size, false),
        deadpool("deadpool", size),
        barging(size),
    ];
    all.iter().for_each(|subject| subject.fill(size as usize));
    all
}

// -------------------------------------------------------------------------------------------------- the pools

impl<M: millpond::Manage> Store for millpond::Pool<M> {
    type Conn = M::Connection;
    type CheckedOut<'a> = millpond::PooledConnection<M>;

    #[inline]
    fn get(&self, _: usize) -> Self::CheckedOut<'_> {
        millpond::Pool::get(self).expect("a connection")
    }
}

/// Millpond's defaults, and what `with` sets otherwise.
pub fn millpond(
    name: &str,
    size: u32,
    with: impl FnOnce(millpond::Builder<Nils>) -> millpond::Builder<Nils>,
) -> Box<dyn Subject> {
    named(name, millpond_pool(size, with))
}

/// [`millpond`] as itself.
pub fn millpond_pool(
    size: u32,
    with: impl FnOnce(millpond::Builder<Nils>) -> millpond::Builder<Nils>,
) -> millpond::Pool<Nils> {
    let builder = millpond::Pool::builder().max_size(size).connection_timeout(PATIENCE);
    with(builder).build(Nils).expect("a pool")
}

/// Does `what` while another thread reads the pool's counts every 10 ms.
pub fn watched<R>(pool: &millpond::Pool<Nils>, what: impl FnOnce() -> R) -> R {
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|s| {
        s.spawn(move || {
            while stopped.recv_timeout(ms(10)) == Err(mpsc::RecvTimeoutError::Timeout) {
                std::hint::black_box(pool.stats());
            }
        });
        let done = what();
        drop(stop);
        done
    })
}

impl<M: r2d2::ManageConnection> Store for r2d2::Pool<M> {
    type Conn = M::Connection;
    type CheckedOut<'a> = r2d2::PooledConnection<M>;

    #[inline]
    fn get(&self, _: usize) -> Self::CheckedOut<'_> {
        r2d2::Pool::get(self).expect("a connection")
    }
}

/// r2d2's defaults, with its test before each checkout or without.
pub fn r2d2(name: &str, size: u32, test: bool) -> Box<dyn Subject> {
    named(name, r2d2_pool(size, test))
}

/// [`r2d2`] as itself.
pub fn r2d2_pool(size: u32, test: bool) -> r2d2::Pool<Nils> {
    let builder = r2d2::Pool::builder().max_size(size).connection_timeout(PATIENCE);
    builder.test_on_check_out(test).build(Nils).expect("a pool")
}

/// A runtime with one thread of its own, which does next to nothing here: threads that enter it run their futures
/// themselves.
fn runtime() -> &'static Handle {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let start = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("tokio");
    RUNTIME.get_or_init(start).handle()
}

struct Bb8(bb8::Pool<Nils>);

impl Store for Bb8 {
    type Conn = Nil;
    type CheckedOut<'a> = bb8::PooledConnection<'a, Nils>;

    fn get(&self, _: usize) -> Self::CheckedOut<'_> {
        runtime().block_on(self.0.get()).expect("a connection")
    }
}

/// bb8, entered once per `get`.
pub fn bb8(name: &str, size: u32, test: bool) -> Box<dyn Subject> {
    let builder = bb8::Pool::builder().max_size(size).connection_timeout(PATIENCE).test_on_check_out(test);
    named(name, Bb8(runtime().block_on(builder.build(Nils)).expect("a pool")))
}

struct Deadpool(deadpool::managed::Pool<Nils>);

impl Store for Deadpool {
    type Conn = Nil;
    type CheckedOut<'a> = deadpool::managed::Object<Nils>;

    fn get(&self, _: usize) -> Self::CheckedOut<'_> {
        runtime().block_on(self.0.get()).expect("a connection")
    }
}

/// deadpool, entered once per `get`. Its test is up to its manager, which here has none.
pub fn deadpool(name: &str, size: u32) -> Box<dyn Subject> {
    let pool = deadpool::managed::Pool::builder(Nils)
        .max_size(size as usize)
        .wait_timeout(Some(PATIENCE))
        .runtime(deadpool::Runtime::Tokio1)
        .build();
    named(name, Deadpool(pool.expect("a pool")))
}

// -------------------------------------------------------------------------------------------------- the least

/// The least that can share connections between threads: a lock and a list.
struct Least<C> {
    idle: Mutex<Vec<C>>,
    returned: Condvar,
    /// Whether a thread that finds it empty waits, and a return wakes one. Otherwise there must be enough.
    waits: bool,
}

struct InUse<'a, C> {
    conn: Option<C>,
    of: &'a Least<C>,
}

impl<C: Send> Store for Least<C> {
    type Conn = C;
    type CheckedOut<'a>
        = InUse<'a, C>
    where
        C: 'a;

    #[inline]
    fn get(&self, _: usize) -> Self::CheckedOut<'_> {
        let mut idle = self.idle.lock();
        let conn = loop {
            match idle.pop() {
                Some(conn) => break conn,
                None => {
                    assert!(self.waits, "what does not wait needs a connection per thread");
                    self.returned.wait(&mut idle);
                }
            }
        };
        drop(idle);
        InUse { conn: Some(conn), of: self }
    }
}

impl<C> Drop for InUse<'_, C> {
    #[inline]
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            self.of.idle.lock().push(conn);
            if self.of.waits {
                self.of.returned.notify_one();
            }
        }
    }
}

impl<C> Deref for InUse<'_, C> {
    type Target = C;

    #[inline]
    fn deref(&self) -> &C {
        self.conn.as_ref().expect("in use until dropped")
    }
}

impl<C> DerefMut for InUse<'_, C> {
    #[inline]
    fn deref_mut(&mut self) -> &mut C {
        self.conn.as_mut().expect("in use until dropped")
    }
}

fn least(name: &str, size: u32, waits: bool) -> Box<dyn Subject> {
    let idle = (0..size).map(|i| Nil(u64::from(i))).collect();
    named(name, Least { idle: Mutex::new(idle), returned: Condvar::new(), waits })
}

/// A lock and a list, for no more threads than connections.
pub fn bare(size: u32) -> Box<dyn Subject> {
    least("lock and list", size, false)
}

/// The least that a pool could cost one thread that kept the connection returned last outside the lock: an atomic cell,
/// and two looks at the coarse clock with an account in the connection's own box.
pub fn swapped() -> Box<dyn Subject> {
    struct Swapped(AtomicCell<Option<Box<Account>>>);

    #[derive(Default)]
    struct Account {
        conn: Nil,
        since: u64,
        checkouts: u64,
        usage_time: u64,
    }

    struct Swapping<'a> {
        account: Option<Box<Account>>,
        of: &'a Swapped,
    }

    impl Store for Swapped {
        type Conn = Nil;
        type CheckedOut<'a> = Swapping<'a>;

        #[inline]
        fn get(&self, _: usize) -> Swapping<'_> {
            let now = coarse();
            let mut account = self.0.take().expect("what does not wait needs a connection per thread");
            account.since = now;
            account.checkouts += 1;
            Swapping { account: Some(account), of: self }
        }
    }

    impl Drop for Swapping<'_> {
        #[inline]
        fn drop(&mut self) {
            if let Some(mut account) = self.account.take() {
                let now = coarse();
                account.usage_time += now - account.since;
                account.since = now;
                self.of.0.swap(Some(account));
            }
        }
    }

    impl Deref for Swapping<'_> {
        type Target = Nil;

        #[inline]
        fn deref(&self) -> &Nil {
            &self.account.as_ref().expect("in use until dropped").conn
        }
    }

    impl DerefMut for Swapping<'_> {
        #[inline]
        fn deref_mut(&mut self) -> &mut Nil {
            &mut self.account.as_mut().expect("in use until dropped").conn
        }
    }

    named("swaps and accounts", Swapped(AtomicCell::new(Some(Box::default()))))
}

/// The coarse clock, in nanoseconds.
#[inline]
fn coarse() -> u64 {
    #[cfg(target_os = "linux")]
    {
        use rustix::time::{ClockId, clock_gettime};
        let t = clock_gettime(ClockId::MonotonicCoarse);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
    #[cfg(not(target_os = "linux"))]
    0
}

/// A lock, a list, and what no pool that keeps time can do without: a look at the coarse clock before each lock, and
/// under it an account of which thread uses what since when.
pub fn accounted(size: u32) -> Box<dyn Subject> {
    struct Accounted(Mutex<Accounts>);

    struct Accounts {
        idle: Vec<(usize, Box<Nil>)>,
        /// Since when, and by which thread.
        rows: Vec<(u64, Option<usize>)>,
        checkouts: u64,
        usage_time: u64,
    }

    struct Accounting<'a> {
        conn: Option<(usize, Box<Nil>)>,
        of: &'a Accounted,
    }

    impl Store for Accounted {
        type Conn = Nil;
        type CheckedOut<'a> = Accounting<'a>;

        #[inline]
        fn get(&self, worker: usize) -> Accounting<'_> {
            let now = coarse();
            let mut accounts = self.0.lock();
            let (row, conn) = accounts.idle.pop().expect("what does not wait needs a connection per thread");
            accounts.rows[row] = (now, Some(worker));
            accounts.checkouts += 1;
            Accounting { conn: Some((row, conn)), of: self }
        }
    }

    impl Drop for Accounting<'_> {
        #[inline]
        fn drop(&mut self) {
            if let Some((row, conn)) = self.conn.take() {
                let now = coarse();
                let mut accounts = self.of.0.lock();
                accounts.usage_time += now - accounts.rows[row].0;
                accounts.rows[row] = (now, None);
                accounts.idle.push((row, conn));
            }
        }
    }

    impl Deref for Accounting<'_> {
        type Target = Nil;

        #[inline]
        fn deref(&self) -> &Nil {
            &self.conn.as_ref().expect("in use until dropped").1
        }
    }

    impl DerefMut for Accounting<'_> {
        #[inline]
        fn deref_mut(&mut self) -> &mut Nil {
            &mut self.conn.as_mut().expect("in use until dropped").1
        }
    }

    let idle = (0..size as usize).map(|i| (i, Box::new(Nil(i as u64)))).collect();
    let accounts = Accounts { idle, rows: vec![(0, None); size as usize], checkouts: 0, usage_time: 0 };
    named("lock, list, accounts", Accounted(Mutex::new(accounts)))
}

/// A lock, a list and a condition: the thread that comes first takes it, as unfair as that may be.
pub fn barging(size: u32) -> Box<dyn Subject> {
    least("lock, list, condvar", size, true)
}

/// One for each, without any pool.
pub struct PerThread<C>(pub Vec<Mutex<C>>);

impl<C: Send> Store for PerThread<C> {
    type Conn = C;
    type CheckedOut<'a>
        = parking_lot::MutexGuard<'a, C>
    where
        C: 'a;

    #[inline]
    fn get(&self, worker: usize) -> Self::CheckedOut<'_> {
        // No other thread locks it: 10 ns, for the borrow checker.
        self.0[worker].lock()
    }
}

/// Entering and leaving tokio's runtime for nothing: what no pool for tasks can do without on a thread.
pub fn entering() -> Box<dyn Subject> {
    struct Entering;
    impl Store for Entering {
        type Conn = Nil;
        type CheckedOut<'a> = Box<Nil>;

        fn get(&self, _: usize) -> Box<Nil> {
            runtime().block_on(async { Box::new(Nil(0)) })
        }
    }
    named("tokio's block_on", Entering)
}
