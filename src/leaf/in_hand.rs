//! Which connections the pool itself works on, on this very thread, at this moment. A `close` that is called from
//! within that work, by a hook or the manager, must not wait for the end of it.
//!
//! Such work is a job, a validation, or a look at a connection by a hook or the manager during its checkout or return.
//! A connection in use is not part of it: the caller may have moved it to another thread.

use crate::leaf::sync::thread_local;
use std::cell::{Cell, RefCell};
use std::mem;

/// A pool, by the address of its `Shared`, and the number of the connection in hand. On a thread of the pool's executor
/// the number is [`EXECUTOR`].
type Work = (usize, u64);

const NOTHING: Work = (0, 0);
/// No connection has this number.
const EXECUTOR: u64 = 0;

thread_local! {
    /// The innermost work. It has no destructor, so that it can be read to the very end of its thread.
    static TOP: Cell<Work> = const { Cell::new(NOTHING) };
    /// The work from within which the innermost one was called, where a hook uses a pool; the outermost first.
    static BELOW: RefCell<Vec<Work>> = const { RefCell::new(Vec::new()) };
}

/// The work goes on until this is dropped. It has the work from within which it was called.
#[must_use]
pub(crate) struct InHand(Work);

/// This thread has the connection `id` of `pool` in hand.
#[inline]
pub(crate) fn with(pool: usize, id: u64) -> InHand {
    let before = TOP.replace((pool, id));
    if before != NOTHING {
        push(before);
    }
    InHand(before)
}

/// This thread belongs to the executor of `pool`, and runs a job.
pub(crate) fn on_the_executor(pool: usize) -> InHand {
    with(pool, EXECUTOR)
}

#[cold]
fn push(before: Work) {
    // A thread that has begun to end has no list any more, and knows of the innermost work only.
    let _ = BELOW.try_with(|below| below.borrow_mut().push(before));
}

impl Drop for InHand {
    #[inline]
    fn drop(&mut self) {
        let before = mem::replace(&mut self.0, NOTHING);
        TOP.set(before);
        if before != NOTHING {
            let _ = BELOW.try_with(|below| below.borrow_mut().pop());
        }
    }
}

/// Whether this thread belongs to the executor of `pool`, and the numbers of that pool's connections that it has in
/// hand.
pub(crate) fn of(pool: usize) -> (bool, Vec<u64>) {
    let mut ids = vec![TOP.get()];
    let _ = BELOW.try_with(|below| ids.extend_from_slice(&below.borrow()));
    let mut ids: Vec<u64> = ids.into_iter().filter(|&(of, _)| of == pool).map(|(_, id)| id).collect();
    let executor = ids.contains(&EXECUTOR);
    ids.retain(|&id| id != EXECUTOR);
    (executor, ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_within_the_other() {
        assert_eq!(of(1), (false, vec![]));
        let executor = on_the_executor(1);
        let job = with(1, 7);
        {
            let _other = with(2, 8);
            let _hook = with(1, 9);
            assert_eq!(of(1), (true, vec![9, 7]));
            assert_eq!(of(2), (false, vec![8]));
        }
        assert_eq!(of(1), (true, vec![7]));
        drop((job, executor));
        assert_eq!(of(1), (false, vec![]));
    }
}
