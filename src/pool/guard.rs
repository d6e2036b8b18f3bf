//! [`PoolGuard`]: closes the pool when it is dropped, after the workers that it owns have finished.

use crate::leaf::shield::catch;
use crate::leaf::sync::Instant;
use crate::leaf::sync::thread::{self, JoinHandle};
use crate::manage::Manage;
use crate::pool::Pool;
use crate::pool::close::{Close, CloseReport, Closer};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

impl<M: Manage> Pool<M> {
    /// A guard that closes the pool when it is dropped. See [`PoolGuard`].
    #[track_caller]
    pub fn guard(&self) -> PoolGuard {
        PoolGuard::new(Arc::new(self.clone()), Location::caller())
    }
}

/// The grace of a guard that was not told another.
const GRACE: Duration = Duration::from_secs(5);

/// Closes the pool when it is dropped: when `main` returns, and when it unwinds. Made by
/// [`Pool::guard`](crate::Pool::guard).
///
/// ```
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/example_manager.rs")); }
/// # use doc::DocManager;
/// # use millpond::Pool;
/// let pool = Pool::new(DocManager)?;
/// let _guard = pool.guard(); // `_guard`, not `_`, which would drop it here
/// // ... the program ...
/// # Ok::<(), millpond::Error>(())
/// // here the pool is closed, and within 5 seconds all its connections
/// ```
///
/// # Workers
///
/// A guard can own the threads that use the pool, and see to it that they finish before the pool closes. (Dropping a
/// `Vec<JoinHandle>`, a `rayon::ThreadPool` or a `threadpool::ThreadPool` ends no thread.) It then derefs to them.
///
/// ```
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/example_manager.rs")); }
/// # use doc::DocManager;
/// # use millpond::Pool;
/// # use std::thread;
/// # let pool = Pool::new(DocManager)?;
/// let (jobs, queue) = crossbeam_channel::unbounded::<u32>();
/// let workers: Vec<_> = (0..4)
///     .map(|_| {
///         let (pool, queue) = (pool.clone(), queue.clone());
///         thread::spawn(move || {
///             for job in queue {
///                 let _client = pool.get(); // ... do the job
///             }
///         })
///     })
///     .collect();
/// // The workers end when the sender is gone: the closure drops it, then waits for them.
/// let guard = pool.guard().owning_with((Some(jobs), workers), |(jobs, workers), deadline| {
///     drop(jobs.take());
///     millpond::Workers::finish(workers, deadline)
/// });
/// # drop(guard);
/// # Ok::<(), millpond::Error>(())
/// ```
///
/// There is one deadline, the [grace](PoolGuard::grace). The workers have the first three quarters of it to finish,
/// with the pool still open, so that they can end what they have begun. Then the pool is closed with the rest of the
/// grace. Then the workers are dropped.
///
/// The guard also waits for a connection that its own thread has checked out, since the pool cannot know that the
/// connection is not with another thread by now. So make the guard first: what is declared after it is dropped before
/// it.
///
/// # Where `Drop` does not run
///
/// | case | what to do |
/// |---|---|
/// | `let _ = pool.guard();` | drops the guard at once. Give it a name: `let _guard`. |
/// | a guard in a `static` | statics are never dropped. Keep it in `main`. |
/// | `std::process::exit` | ends the process without unwinding. Return from `main` (with an `ExitCode`), or drop the guard first. |
/// | `panic = "abort"` | no unwinding either: only a return from `main` drops the guard. |
/// | SIGTERM, SIGINT (Ctrl-C) | end the process unless handled. Handle them (crate `signal-hook`): wake `main`, let it return. `examples/server/main.rs` does. |
/// | SIGKILL, a crash, power | nothing runs. The server notices by itself: at once if the machine still lives (its sockets are closed), else by TCP keepalive (`tcp_keepalives_idle` on PostgreSQL). |
/// | `std::mem::forget`, a cycle of `Arc`s | do not. |
#[must_use = "the pool is closed when the guard is dropped: bind it to a name, such as `_guard`"]
pub struct PoolGuard<W = ()> {
    /// `None` once it has closed the pool.
    pool: Option<Arc<dyn Close>>,
    at: &'static Location<'static>,
    grace: Duration,
    /// `None` only after `into_parts`.
    workers: Option<W>,
    finish: Finish<W>,
}

/// How workers are told to finish, and waited for.
type Finish<W> = Box<dyn FnMut(&mut W, Instant) -> bool + Send>;

impl PoolGuard {
    pub(crate) fn new(pool: Arc<dyn Close>, at: &'static Location<'static>) -> Self {
        PoolGuard { pool: Some(pool), at, grace: GRACE, workers: Some(()), finish: Box::new(|_, _| true) }
    }

    /// Makes the guard own `workers`, which it [finishes](Workers::finish) before it closes the pool.
    pub fn owning<W: Workers + 'static>(self, workers: W) -> PoolGuard<W> {
        self.owning_with(workers, |w, deadline| w.finish(deadline))
    }

    /// Makes the guard own `workers`, with `finish` to end them. `finish` is called once. It should tell the workers to
    /// stop, wait for them until the deadline at most, and return whether they have all finished. A panic in it counts
    /// as `false`.
    pub fn owning_with<W>(
        mut self,
        workers: W,
        finish: impl FnMut(&mut W, Instant) -> bool + Send + 'static,
    ) -> PoolGuard<W> {
        PoolGuard {
            pool: self.pool.take(),
            at: self.at,
            grace: self.grace,
            workers: Some(workers),
            finish: Box::new(finish),
        }
    }
}

impl<W> PoolGuard<W> {
    /// How long the drop may take. Default 5 seconds. Zero: `finish` is called, the pool is closed, and nothing is
    /// waited for.
    ///
    /// If another guard of the same pool, or a `close`, has waited in vain, its wait counts against this grace: two
    /// guards in a row take the longer of two graces, not both. (Workers have their part of the grace in any case.)
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Does now what the drop would do, and reports.
    pub fn close(mut self) -> CloseReport {
        self.finish_and_close("its guard was closed").expect("a guard closes once, and this one is still here")
    }

    fn finish_and_close(&mut self, by: &'static str) -> Option<CloseReport> {
        let pool = self.pool.take()?;
        if pool.is_forked() {
            // The workers belong to the parent process as well. Their threads do not run here, and their drop might
            // wait for them.
            std::mem::forget(self.workers.take());
            return Some(pool.close_by(Closer::new(by, self.at, Duration::ZERO)));
        }
        let mut closer = Closer { joins: true, ..Closer::new(by, self.at, self.grace) };
        // A grace too long for the clock means no deadline. The workers must be given one: a year.
        let far = closer.begun + Duration::from_secs(365 * 86_400);
        let workers_until = closer.begun.checked_add(self.grace.mul_f64(0.75)).unwrap_or(far);
        let finish = &mut self.finish;
        closer.workers_finished = match &mut self.workers {
            Some(workers) => catch(|| finish(workers, workers_until)).unwrap_or(false),
            None => true,
        };
        Some(pool.close_by(closer))
    }
}

impl<W> Drop for PoolGuard<W> {
    fn drop(&mut self) {
        let _ = catch(|| self.finish_and_close("its guard was dropped"));
        // The workers are dropped last. A panic of their drop is caught: during an unwinding it would end the process.
        if let Some(workers) = self.workers.take() {
            let _ = catch(|| drop(workers));
        }
    }
}

impl<W> Deref for PoolGuard<W> {
    type Target = W;

    fn deref(&self) -> &W {
        self.workers.as_ref().expect("owned until the drop")
    }
}

impl<W> DerefMut for PoolGuard<W> {
    fn deref_mut(&mut self) -> &mut W {
        self.workers.as_mut().expect("owned until the drop")
    }
}

impl<W> fmt::Debug for PoolGuard<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolGuard")
            .field("pool", &self.pool.as_ref().map(|p| p.name()))
            .field("grace", &self.grace)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

/// Threads that use a pool, and can be waited for.
pub trait Workers {
    /// Waits until the workers have finished, at most until `deadline`. Returns whether they have.
    ///
    /// The implementations in this crate do not tell the workers to stop: they must know it from elsewhere (a channel
    /// that is closed, a flag, the pool's [`Closed`](crate::ErrorKind::Closed)). To tell them, use
    /// [`owning_with`](PoolGuard::owning_with).
    fn finish(&mut self, deadline: Instant) -> bool;
}

impl Workers for () {
    fn finish(&mut self, _: Instant) -> bool {
        true
    }
}

impl<T> Workers for JoinHandle<T> {
    fn finish(&mut self, deadline: Instant) -> bool {
        // The standard library can wait for a thread, or until a deadline, but not for both. So this looks again and
        // again, at growing pauses: 0.1 ms, which a worker that is about to end needs, up to 10 ms, which is little
        // beside a grace.
        let mut pause = Duration::from_micros(100);
        while !self.is_finished() {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                return false;
            };
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        true
    }
}

impl<W: Workers> Workers for [W] {
    fn finish(&mut self, deadline: Instant) -> bool {
        // All workers are waited for, also after one that has not finished.
        let unfinished = self.iter_mut().filter_map(|w| (!w.finish(deadline)).then_some(())).count();
        unfinished == 0
    }
}

impl<W: Workers> Workers for Vec<W> {
    fn finish(&mut self, deadline: Instant) -> bool {
        self.as_mut_slice().finish(deadline)
    }
}

impl<W: Workers, const N: usize> Workers for [W; N] {
    fn finish(&mut self, deadline: Instant) -> bool {
        self.as_mut_slice().finish(deadline)
    }
}

impl<W: Workers> Workers for Option<W> {
    fn finish(&mut self, deadline: Instant) -> bool {
        self.as_mut().is_none_or(|w| w.finish(deadline))
    }
}

impl<W: Workers + ?Sized> Workers for Box<W> {
    fn finish(&mut self, deadline: Instant) -> bool {
        (**self).finish(deadline)
    }
}
