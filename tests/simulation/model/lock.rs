//! Locks and condition variables.

use super::time::{Instant, Sleeper, now};
use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LockResult, TryLockError};
use std::time::Duration;

/// A mutex with `parking_lot`'s methods.
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

pub struct MutexGuard<'a, T> {
    /// `None` only within a wait.
    guard: Option<shuttle::sync::MutexGuard<'a, T>>,
    mutex: &'a shuttle::sync::Mutex<T>,
}

fn lock<T>(mutex: &shuttle::sync::Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic in between leaves behind concerns the pool, not the lock: `parking_lot` knows no poison.
    let guard = mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    MutexGuard { guard: Some(guard), mutex }
}

fn try_lock<T>(mutex: &shuttle::sync::Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(MutexGuard { guard: Some(guard), mutex }),
        Err(TryLockError::Poisoned(e)) => Some(MutexGuard { guard: Some(e.into_inner()), mutex }),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl<T> Mutex<T> {
    #[track_caller]
    pub const fn new(value: T) -> Self {
        Mutex(shuttle::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        lock(&self.0)
    }

    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        try_lock(&self.0)
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Mutex::new(T::default())
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex")
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.guard.as_ref().expect("locked")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_mut().expect("locked")
    }
}

/// `std::sync::Condvar`, for both kinds of mutexes.
#[derive(Default)]
pub struct Condvar {
    // Of the standard library: no task is switched while it is locked.
    sleepers: std::sync::Mutex<VecDeque<Arc<Sleeper>>>,
}

impl fmt::Debug for Condvar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Condvar")
    }
}

impl Condvar {
    pub const fn new() -> Condvar {
        Condvar { sleepers: std::sync::Mutex::new(VecDeque::new()) }
    }

    fn sleepers(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Sleeper>>> {
        self.sleepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn sleep<'a, T>(&self, mut guard: MutexGuard<'a, T>, until: Option<Instant>) -> MutexGuard<'a, T> {
        let me = Sleeper::new();
        self.sleepers().push_back(Arc::clone(&me));
        let mutex = guard.mutex;
        drop(guard.guard.take());
        me.sleep(until);
        self.sleepers().retain(|other| !Arc::ptr_eq(other, &me));
        lock(mutex)
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        Ok(self.sleep(guard, None))
    }

    pub fn wait_timeout<'a, T>(&self, guard: MutexGuard<'a, T>, d: Duration) -> LockResult<(MutexGuard<'a, T>, ())> {
        Ok((self.sleep(guard, now().checked_add(d)), ()))
    }

    pub fn notify_one(&self) {
        loop {
            let next = self.sleepers().pop_front();
            if next.is_none_or(|sleeper| sleeper.wake()) {
                return;
            }
        }
    }

    pub fn notify_all(&self) {
        let all = std::mem::take(&mut *self.sleepers());
        for sleeper in all {
            sleeper.wake();
        }
    }
}

/// The standard library's mutex, which knows poison.
pub mod std_like {
    use std::sync::{LockResult, TryLockError, TryLockResult};

    pub use super::{Condvar, MutexGuard};

    #[derive(Debug)]
    pub struct Mutex<T>(super::Mutex<T>);

    impl<T> Mutex<T> {
        #[track_caller]
        pub const fn new(value: T) -> Self {
            Mutex(super::Mutex::new(value))
        }

        pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            Ok(self.0.lock())
        }

        pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
            self.0.try_lock().ok_or(TryLockError::WouldBlock)
        }
    }
}
