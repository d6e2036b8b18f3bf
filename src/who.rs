//! Which thread: a number that costs a checkout next to nothing, and its name for those who ask later.

use crate::text::{NAME, brief};
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
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
    NAMES.lock().known.get(&tag).cloned().unwrap_or_else(|| format!("unnamed-{tag} (ended)"))
}

/// How many threads that have ended are still known by name: a connection may outlive the thread that took it.
const ENDED: usize = 256;

static NEXT: AtomicU64 = AtomicU64::new(1);
static NAMES: Mutex<Names> = Mutex::new(Names { known: BTreeMap::new(), ended: VecDeque::new() });

struct Names {
    known: BTreeMap<u64, String>,
    ended: VecDeque<u64>,
}

struct Farewell(Cell<u64>);

#[cold]
fn introduce() -> u64 {
    let tag = NEXT.fetch_add(1, Ordering::Relaxed);
    TAG.set(tag);
    let thread = thread::current();
    let name = thread.name().map_or_else(|| format!("unnamed-{tag}"), |name| format!("'{}'", brief(name, NAME)));
    let mut names = NAMES.lock();
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
            NAMES.lock().end(self.0.get());
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
        let _alone = ENDINGS.lock();
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
        let _alone = ENDINGS.lock();
        for _ in 0..ENDED * 2 {
            thread::spawn(tag).join().unwrap();
        }
        let names = NAMES.lock();
        assert!(names.ended.len() <= ENDED);
        assert!(names.known.len() < ENDED + 100, "and those alive");
    }
}
