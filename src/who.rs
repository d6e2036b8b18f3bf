//! Which thread and which process: numbers that cost a checkout next to nothing, and the thread's name for those who ask
//! later.
//!
//! A forked child has its parent's memory and none of its other threads. What one of these had locked at that moment is
//! locked for ever there, so whoever may be in a child looks at the process before it waits for a lock.

use crate::text::{NAME, brief};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

thread_local! {
    // Without a destructor, so that it can be read to the very end of its thread.
    static TAG: Cell<u64> = const { Cell::new(0) };
    static FAREWELL: Farewell = const { Farewell(Cell::new(0)) };
    /// When this thread looked at its process last, and what it saw.
    static PROCESS: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

// ---------------------------------------------------------------------------------------------------- the process

/// How long a thread relies on what it saw. To look is a system call, which takes longer than a checkout.
const LOOK_AGAIN: u64 = 1_000_000;

/// The process in which something was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home(u32);

impl Home {
    pub(crate) fn here() -> Home {
        Home(process::id())
    }

    pub(crate) fn pid(self) -> u32 {
        self.0
    }

    /// Whether this is another process: a child forked from it.
    pub(crate) fn is_elsewhere(self) -> bool {
        process::id() != self.0
    }

    /// The same, for next to nothing: of a thread that has looked within the last millisecond (and one step of the coarse
    /// clock) it relies on that. `at` is the time in nanoseconds since the [`origin`].
    #[inline]
    pub(crate) fn seems_elsewhere(self, at: u64) -> bool {
        let (looked, seen) = PROCESS.get();
        // (What is before the last look was read off a clock that lies behind the one then: nothing is relied on.)
        (at.wrapping_sub(looked) >= LOOK_AGAIN || seen != self.0) && self.look(at)
    }

    #[cold]
    fn look(self, at: u64) -> bool {
        let pid = process::id();
        PROCESS.set((at, pid));
        pid != self.0
    }

    /// Locks. `None`: this is a child, in which nobody will unlock it.
    pub(crate) fn lock<T>(self, mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
        match mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) if self.is_elsewhere() => None,
            Err(TryLockError::WouldBlock) => Some(mutex.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// The nanoseconds since some moment that is the same for the whole process, at this one.
pub(crate) fn origin() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    // Far from zero, at which nobody has looked yet.
    let since = ORIGIN.get_or_init(Instant::now).elapsed() + Duration::from_secs(1);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

// ---------------------------------------------------------------------------------------------------- the thread

/// The number of this thread, not used again within the process.
#[inline]
pub(crate) fn tag() -> u64 {
    match TAG.get() {
        0 => introduce(),
        tag => tag,
    }
}

/// The name of a thread by its number.
pub(crate) fn name(tag: u64) -> String {
    let known = names().known.get(&tag).cloned();
    // It may have been introduced in the process from which this one was forked.
    known.unwrap_or_else(|| if tag == TAG.get() { own_name(tag) } else { format!("unnamed-{tag} (ended)") })
}

fn own_name(tag: u64) -> String {
    thread::current().name().map_or_else(|| format!("unnamed-{tag}"), |name| format!("'{}'", brief(name, NAME)))
}

/// How many threads that have ended are still known by name: a connection may outlive the thread that took it.
const ENDED: usize = 256;

static NEXT: AtomicU64 = AtomicU64::new(1);
static REGISTRY: Registry = Registry::new();

/// The names of one process, and the next for a child of it.
struct Registry {
    /// 0: nobody's yet.
    pid: AtomicU32,
    names: Mutex<Names>,
    next: OnceLock<Box<Registry>>,
}

impl Registry {
    const fn new() -> Self {
        let names = Names { known: BTreeMap::new(), ended: VecDeque::new() };
        Registry { pid: AtomicU32::new(0), names: Mutex::new(names), next: OnceLock::new() }
    }
}

/// The names of this process. Those of its parent may be locked for ever.
fn names() -> MutexGuard<'static, Names> {
    let pid = process::id();
    let mut registry = &REGISTRY;
    while registry.pid.compare_exchange(0, pid, Ordering::Relaxed, Ordering::Relaxed).is_err()
        && registry.pid.load(Ordering::Relaxed) != pid
    {
        registry = registry.next.get_or_init(|| Box::new(Registry::new()));
    }
    registry.names.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Names {
    known: BTreeMap<u64, String>,
    ended: VecDeque<u64>,
}

struct Farewell(Cell<u64>);

#[cold]
fn introduce() -> u64 {
    let tag = NEXT.fetch_add(1, Ordering::Relaxed);
    TAG.set(tag);
    let name = own_name(tag);
    let mut names = names();
    names.known.insert(tag, name);
    // A thread that has begun to end cannot say farewell: it is counted as ended at once.
    if FAREWELL.try_with(|f| f.0.set(tag)).is_err() {
        names.end(tag);
    }
    tag
}

impl Names {
    fn end(&mut self, tag: u64) {
        if let Some(name) = self.known.get_mut(&tag) {
            name.push_str(" (ended)");
        }
        self.ended.push_back(tag);
        if self.ended.len() > ENDED {
            if let Some(old) = self.ended.pop_front() {
                self.known.remove(&old);
            }
        }
    }
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if self.0.get() != 0 {
            names().end(self.0.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One at a time: many that end have those before them forgotten.
    static ENDINGS: Mutex<()> = Mutex::new(());

    #[test]
    fn a_thread_has_one_tag_and_a_name() {
        let _alone = ENDINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let (tag, name_there) = thread::Builder::new()
            .name("worker".into())
            .spawn(|| {
                assert_eq!(tag(), tag());
                (tag(), name(tag()))
            })
            .unwrap()
            .join()
            .unwrap();
        assert_ne!(tag, super::tag());
        assert_eq!(name_there, "'worker'");
        assert_eq!(name(tag), "'worker' (ended)");
    }

    #[test]
    fn the_ended_are_forgotten_in_time() {
        let _alone = ENDINGS.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..ENDED * 2 {
            thread::spawn(tag).join().unwrap();
        }
        let names = names();
        assert!(names.ended.len() <= ENDED);
        assert!(names.known.len() < ENDED + 100, "and those alive");
    }
}
