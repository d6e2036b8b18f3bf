//! One waiting thread's [`Seat`].
//!
//! It is filled under the ledger's lock, by whoever has something for this thread, and woken after that lock is
//! released. So at its deadline the thread asks the ledger, and is either still queued, and leaves, or its seat is full.
//! A call, which promises nothing, may come to a seat at any time.

use crate::leaf::process::Home;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where one thread waits for one `T`. (On the standard library's lock, for the reason that [`Bell`](crate::bell) gives.)
pub(crate) struct Seat<T> {
    home: Home,
    news: Mutex<News<T>>,
    bell: Condvar,
}

/// What a thread in its seat hears.
#[derive(Debug)]
pub(crate) enum News<T> {
    /// Nothing, until its deadline had come.
    None,
    /// There is something to be had, first come, first served.
    Called,
    /// This is for it.
    Full(T),
}

impl<T> Seat<T> {
    /// A seat of this process, `home`: a forked child does nothing to it.
    pub(crate) fn new(home: Home) -> Self {
        Seat { home, news: Mutex::new(News::None), bell: Condvar::new() }
    }

    /// Puts `what` there for the thread to find. Does not wake it.
    pub(crate) fn fill(&self, what: T) {
        let Some(mut news) = self.home.lock(&self.news) else { return std::mem::forget(what) };
        let before = std::mem::replace(&mut *news, News::Full(what));
        drop(news);
        debug_assert!(!matches!(before, News::Full(_)), "a seat is filled once");
    }

    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    /// Tells the thread that there is something, and wakes it.
    pub(crate) fn call(&self) {
        let Some(mut news) = self.home.lock(&self.news) else { return };
        if let News::None = *news {
            *news = News::Called;
            drop(news);
            self.wake();
        }
    }

    /// Sleeps until there is news or the deadline has come; `None`: without a deadline.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> News<T> {
        let mut news = self.lock();
        while let News::None = *news {
            news = match deadline {
                None => self.bell.wait(news).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.bell.wait_timeout(news, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::replace(&mut *news, News::None)
    }

    /// What the seat holds.
    pub(crate) fn take(&self) -> Option<T> {
        match std::mem::replace(&mut *self.lock(), News::None) {
            News::Full(what) => Some(what),
            News::None | News::Called => None,
        }
    }

    /// It holds one thing or another, whatever its last caller came to.
    fn lock(&self) -> MutexGuard<'_, News<T>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
