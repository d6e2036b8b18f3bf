//! The thread registry: a number for each thread, which costs a checkout next to nothing, and the name that belongs to
//! the number, for the errors and tables that show it later.

use crate::leaf::sync::{thread, thread_local};
use crate::leaf::text::{NAME, brief, is_harmful};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

thread_local! {
    // It has no destructor, so that it can be read to the very end of its thread.
    static ID: Cell<u64> = const { Cell::new(0) };
    /// Deregisters the thread when it ends.
    static DEREGISTER: Deregister = const { Deregister(Cell::new(0)) };
}

/// The number of this thread, not used again within the process.
#[inline]
pub(crate) fn id() -> u64 {
    match ID.get() {
        0 => register(),
        id => id,
    }
}

/// The name of a thread by its number.
pub(crate) fn name(id: u64) -> String {
    let known = names().known.get(&id).cloned();
    // A thread without a name here may have been registered by the process from which this one was forked.
    known.unwrap_or_else(|| if id == ID.get() { own_name(id) } else { format!("unnamed-{id} (ended)") })
}

fn own_name(id: u64) -> String {
    thread::current().name().map_or_else(|| format!("unnamed-{id}"), |name| format!("'{}'", brief(name, NAME)))
}

/// How many threads that have ended are still known by name: a connection may outlive the thread that checked it out.
const ENDED: usize = 256;

static NEXT: AtomicU64 = AtomicU64::new(1);
static REGISTRY: Registry = Registry::new();

/// The names of one process, and the registry of its forked child.
struct Registry {
    /// 0: no process has this registry yet.
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

/// The names of this process. Each process has its own, since the parent's may be locked for ever in a child.
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

struct Deregister(Cell<u64>);

#[cold]
fn register() -> u64 {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    ID.set(id);
    let name = own_name(id);
    let mut names = names();
    names.known.insert(id, name);
    // A thread that has begun to end has no destructor left that would deregister it: it counts as ended at once.
    if DEREGISTER.try_with(|f| f.0.set(id)).is_err() {
        names.end(id);
    }
    id
}

impl Names {
    fn end(&mut self, id: u64) {
        if let Some(name) = self.known.get_mut(&id) {
            name.push_str(" (ended)");
        }
        self.ended.push_back(id);
        if self.ended.len() > ENDED {
            if let Some(old) = self.ended.pop_front() {
                self.known.remove(&old);
            }
        }
    }
}

impl Drop for Deregister {
    fn drop(&mut self) {
        if self.0.get() != 0 {
            names().end(self.0.get());
        }
    }
}

/// The name of a thread of the pool `pool`: cut to the 15 bytes that Linux shows, with its whole suffix, and without a
/// harmful character.
pub(crate) fn thread_name(pool: &str, suffix: &str) -> String {
    let mut end = pool.len().min(15 - suffix.len());
    while !pool.is_char_boundary(end) {
        end -= 1;
    }
    // A NUL would make `spawn` panic, and there is no room to escape the others.
    format!("{}{suffix}", &pool[..end]).replace(is_harmful, "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These tests run one at a time: where many threads end, earlier ones are forgotten.
    static ENDINGS: Mutex<()> = Mutex::new(());

    #[test]
    fn a_thread_has_one_number_and_a_name() {
        let _alone = ENDINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, name_there) = thread::Builder::new()
            .name("worker".into())
            .spawn(|| {
                assert_eq!(id(), id());
                (id(), name(id()))
            })
            .unwrap()
            .join()
            .unwrap();
        assert_ne!(id, super::id());
        assert_eq!(name_there, "'worker'");
        assert_eq!(name(id), "'worker' (ended)");
    }

    #[test]
    fn threads_that_ended_are_forgotten_in_time() {
        let _alone = ENDINGS.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..ENDED * 2 {
            thread::spawn(id).join().unwrap();
        }
        let names = names();
        assert!(names.ended.len() <= ENDED);
        assert!(names.known.len() < ENDED + 100, "and those alive");
    }

    #[test]
    fn names_fit_and_keep_their_suffix() {
        assert_eq!(thread_name("orders", "-exec"), "orders-exec");
        assert_eq!(thread_name("a-very-long-name", "-reaper"), "a-very-l-reaper");
        assert_eq!(thread_name("ääääääääää", "-exec"), "äääää-exec");
        assert_eq!(thread_name("a\0b", "-exec"), "a?b-exec");
        assert_eq!(thread_name("a\x1b[2J\n\u{202e}", "-exec"), "a?[2J??-exec");
    }
}
