//! What keeps a pool's lock alive while a connection is returned behind it.
//!
//! A connection in use is what keeps the pool's memory alive: nothing else need be left of the pool when the connection
//! is returned. But on its way back it moves into what the lock guards, and the lock has to outlive its own release. To
//! count one more owner up and down again for that is two locked instructions, where the whole of a checkout and return
//! has four. So each thread stays an owner of the lock to which it returned a connection last, and counts only when
//! that changes.
//!
//! What a thread keeps so, until it returns a connection to another pool or ends, is the lock and the emptied ledger:
//! no connection, no manager, no hook, nothing of the user's. Those go when the pool goes.

use std::any::Any;
use std::cell::Cell;
use std::sync::Arc;

thread_local! {
    static KEPT: Cell<Option<Arc<dyn Any + Send + Sync>>> = const { Cell::new(None) };
}

/// An owner of what `of` owns: the one that this thread keeps, if it is of the same.
#[inline]
pub(crate) fn take<T: Any + Send + Sync>(of: &Arc<T>) -> Arc<T> {
    let kept = KEPT.try_with(Cell::take).ok().flatten();
    match kept.map(Arc::downcast) {
        Some(Ok(kept)) if Arc::ptr_eq(&kept, of) => kept,
        _ => Arc::clone(of),
    }
}

/// Keeps it for the next time, instead of what was kept before. (Or drops it, on a thread that has begun to end.)
#[inline]
pub(crate) fn keep<T: Any + Send + Sync>(owner: Arc<T>) {
    // Dropped after the cell is free again.
    let _before = KEPT.try_with(move |kept| kept.replace(Some(owner)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_kept_for_each_thread() {
        let (a, b) = (Arc::new(1), Arc::new("b"));
        let owners = || (Arc::strong_count(&a), Arc::strong_count(&b));
        keep(take(&a));
        assert_eq!(owners(), (2, 1));
        let taken = take(&a);
        assert_eq!(owners(), (2, 1), "the kept one, not one more");
        // Meanwhile, as when a connection is returned from within the drop of another.
        keep(take(&a));
        keep(taken);
        assert_eq!(owners(), (2, 1));
        keep(take(&Arc::new(2)));
        keep(take(&b));
        assert_eq!(owners(), (1, 2));
        std::thread::scope(|s| s.spawn(|| keep(take(&a))).join().unwrap());
        assert_eq!(owners(), (1, 2), "and ends with its thread");
    }
}
