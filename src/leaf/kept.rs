//! Keeps a pool's lock alive while a connection is returned under it, without counting owners at every return.
//!
//! A connection in use keeps the pool's memory alive, and may be the last that does. As it is returned it moves into
//! what the lock guards, but the lock has to outlive its own release. To count one more owner for that moment would
//! take two atomic instructions, and a whole checkout and return has only four. So each thread stays an owner of the
//! lock to which it returned a connection last, and counts only when it returns one to another pool.
//!
//! Until then, or until the thread ends, it keeps the lock and the emptied ledger of a pool that is gone. It keeps no
//! connection, no manager, no hook and nothing else of the user's: those are dropped with the pool.

use crate::leaf::sync::thread_local;
use std::any::Any;
use std::cell::Cell;
use std::sync::Arc;

thread_local! {
    static KEPT: Cell<Option<Arc<dyn Any + Send + Sync>>> = const { Cell::new(None) };
}

/// An owner of what `of` owns: the one that this thread keeps, if that owns the same.
#[inline]
pub(crate) fn take<T: Any + Send + Sync>(of: &Arc<T>) -> Arc<T> {
    let kept = KEPT.try_with(Cell::take).ok().flatten();
    match kept.map(Arc::downcast) {
        Some(Ok(kept)) if Arc::ptr_eq(&kept, of) => kept,
        _ => Arc::clone(of),
    }
}

/// Keeps `owner` for the next return, instead of the owner kept before. (A thread that has begun to end drops it.)
#[inline]
pub(crate) fn keep<T: Any + Send + Sync>(owner: Arc<T>) {
    // The owner kept before is dropped after the cell is free again, since its drop may use the cell.
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
        // A second owner is taken meanwhile, as when a connection is returned from within the drop of another.
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
