//! What keeps a pool's lock alive while a connection goes back behind it.
//!
//! A borrowed connection is what keeps the pool's memory: nothing else need be left of the pool when it is returned. But
//! on its way back it moves into what the lock guards, and the lock has to outlive its own release. To count one more
//! owner up and down again for that is two locked instructions, where the whole of a checkout and its return has four. So
//! each thread stays an owner of the
//! [`Core`](crate::runtime::shared::Core) to which it returned a connection last, and counts only when that changes.
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
pub(crate) fn hold<T: Any + Send + Sync>(of: &Arc<T>) -> Arc<T> {
    let kept = KEPT.try_with(Cell::take).ok().flatten();
    match kept.map(Arc::downcast) {
        Some(Ok(kept)) if Arc::ptr_eq(&kept, of) => kept,
        _ => Arc::clone(of),
    }
}

/// Keeps it for the next time, instead of what was kept before. (Or drops it, on a thread that has begun to end.)
#[inline]
pub(crate) fn stow<T: Any + Send + Sync>(held: Arc<T>) {
    // Dropped after the cell is free again.
    let _before = KEPT.try_with(move |kept| kept.replace(Some(held)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_kept_for_each_thread() {
        let (a, b) = (Arc::new(1), Arc::new("b"));
        let owners = || (Arc::strong_count(&a), Arc::strong_count(&b));
        stow(hold(&a));
        assert_eq!(owners(), (2, 1));
        let held = hold(&a);
        assert_eq!(owners(), (2, 1), "the kept one, not one more");
        // Meanwhile, as when a connection is returned from within the drop of another.
        stow(hold(&a));
        stow(held);
        assert_eq!(owners(), (2, 1));
        stow(hold(&Arc::new(2)));
        stow(hold(&b));
        assert_eq!(owners(), (1, 2));
        std::thread::scope(|s| s.spawn(|| stow(hold(&a))).join().unwrap());
        assert_eq!(owners(), (1, 2), "and ends with its thread");
    }
}
