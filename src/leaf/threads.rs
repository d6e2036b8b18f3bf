//! The thread registry: a number for each thread, which costs a checkout next to nothing, and the thread's name for those who
//! ask later.

use crate::leaf::text::{NAME, brief, is_harmful};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

thread_local! {
    // Without a destructor, so that it can be read to the very end of its thread.
    static TAG: Cell<u64> = const { Cell::new(0) };
    static FAREWELL: Farewell = const { Farewell(Cell::new(0)) };
}

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

/// The name of a thread of the pool `pool`: cut to what Linux shows (15 bytes), with its suffix kept, and with nothing in it
/// that does something to a terminal.
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

    #[test]
    fn names_fit_and_keep_their_suffix() {
        assert_eq!(thread_name("orders", "-crew"), "orders-crew");
        assert_eq!(thread_name("a-very-long-name", "-reaper"), "a-very-l-reaper");
        assert_eq!(thread_name("ääääääääää", "-crew"), "äääää-crew");
        assert_eq!(thread_name("a\0b", "-crew"), "a?b-crew");
        assert_eq!(thread_name("a\x1b[2J\n\u{202e}", "-crew"), "a?[2J??-crew");
    }
}
