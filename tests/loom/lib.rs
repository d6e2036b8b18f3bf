//! The parts of the pool that put threads to sleep and wake them, with loom's primitives: sources of the crate, and stand-ins
//! for what they import.

#![allow(dead_code, missing_debug_implementations, unreachable_pub)]

pub mod leaf {
    pub mod sync {
        /// A moment. Loom knows no time: one has come, or never comes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub struct Instant(pub u64);

        impl Instant {
            /// Always the same, so that the deadline 0 has come.
            pub fn now() -> Instant {
                Instant(0)
            }

            pub fn checked_duration_since(&self, earlier: Instant) -> Option<std::time::Duration> {
                self.0.checked_sub(earlier.0).map(std::time::Duration::from_nanos)
            }

            pub fn saturating_duration_since(&self, earlier: Instant) -> std::time::Duration {
                self.checked_duration_since(earlier).unwrap_or_default()
            }
        }

        pub mod blocking {
            pub use loom::sync::{Condvar, Mutex, MutexGuard};
        }
    }

    pub mod process {
        use super::sync::blocking::{Mutex, MutexGuard};

        /// Loom does not fork.
        #[derive(Clone, Copy, Debug)]
        pub struct Home;

        impl Home {
            pub fn here() -> Home {
                Home
            }

            pub fn lock<T>(self, mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
                Some(mutex.lock().unwrap())
            }
        }
    }
}

#[path = "../../src/runtime/event_count.rs"]
mod event_count_source;
#[path = "../../src/runtime/waiter.rs"]
mod waiter_source;

pub mod runtime {
    pub mod event_count {
        /// The event count, for a test outside of this crate.
        #[derive(Debug)]
        pub struct EventCount(crate::event_count_source::EventCount);

        impl EventCount {
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                EventCount(crate::event_count_source::EventCount::new())
            }

            pub fn count(&self) -> u64 {
                self.0.count()
            }

            pub fn notify(&self) {
                self.0.notify();
            }

            pub fn wait(&self, seen: u64) {
                self.0.wait(seen, None);
            }
        }
    }

    pub mod waiter {
        use crate::leaf::process::Home;
        use crate::leaf::sync::Instant;
        use crate::waiter_source as source;

        /// The waiter, for a test outside of this crate.
        pub struct Waiter<T>(source::Waiter<T>);

        #[derive(Debug, PartialEq)]
        pub enum Signal<T> {
            None,
            Notified,
            Served(T),
        }

        impl<T> Waiter<T> {
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Waiter(source::Waiter::new(Home))
            }

            pub fn serve(&self, what: T) {
                self.0.serve(what);
            }

            pub fn wake(&self) {
                self.0.wake();
            }

            pub fn notify(&self) {
                self.0.notify();
            }

            /// `over`: the deadline has come; otherwise it never comes.
            pub fn wait(&self, over: bool) -> Signal<T> {
                match self.0.wait(over.then_some(Instant(0))) {
                    source::Signal::None => Signal::None,
                    source::Signal::Notified => Signal::Notified,
                    source::Signal::Served(what) => Signal::Served(what),
                }
            }

            pub fn take(&self) -> Option<T> {
                self.0.take()
            }
        }
    }
}
