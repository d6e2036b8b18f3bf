//! [`Effects`]: what a method of the ledger wants done for others than its caller. The thread that has the lock takes
//! the effects out before it releases the lock, and so without allocating.

use super::values::{Order, Outcome};

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Effects<C, W> {
    /// Waiters that have left the queue, and their outcome, which is to be filled in under the lock.
    pub(crate) served: Vec<(W, Outcome<C>)>,
    /// Waiters to be woken, so that they come to [`take_notified`](super::Ledger::take_notified).
    pub(crate) notified: Vec<W>,
    pub(crate) orders: Vec<Order<C>>,
    /// The reaper is to be woken, since it means to sleep past the alarm.
    pub(crate) wake_reaper: bool,
    /// Something has changed that `build` or `close` may be waiting for.
    pub(crate) changed: bool,
}

impl<C, W> Default for Effects<C, W> {
    fn default() -> Self {
        Effects { served: Vec::new(), notified: Vec::new(), orders: Vec::new(), wake_reaper: false, changed: false }
    }
}

impl<C, W> Effects<C, W> {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // One test instead of five, since this is asked after every checkout and return. The answer is nearly always
        // yes.
        (self.notified.len() | self.served.len() | self.orders.len() | usize::from(self.wake_reaper | self.changed))
            == 0
    }

    #[inline]
    pub(crate) fn is_empty_but_for_notified(&self) -> bool {
        (self.served.len() | self.orders.len() | usize::from(self.wake_reaper | self.changed)) == 0
    }

    /// Takes the effects out.
    pub(crate) fn take(&mut self) -> Taken<C, W> {
        Taken {
            served: Few::take(&mut self.served),
            notified: Few::take(&mut self.notified),
            orders: Few::take(&mut self.orders),
            wake_reaper: std::mem::take(&mut self.wake_reaper),
            changed: std::mem::take(&mut self.changed),
        }
    }
}

/// The effects that were taken out.
pub(crate) struct Taken<C, W> {
    pub(crate) served: Few<(W, Outcome<C>)>,
    pub(crate) notified: Few<W>,
    pub(crate) orders: Few<Order<C>>,
    pub(crate) wake_reaper: bool,
    pub(crate) changed: bool,
}

/// What was in a list. What was alone in it is popped, so that the list keeps its memory, and the next step allocates
/// nothing under the lock. In a busy pool nearly every step has one effect of a kind at most. Of several the list itself
/// is taken, to be freed without the lock.
#[derive(Debug)]
pub(crate) struct Few<T> {
    one: Option<T>,
    many: Vec<T>,
}

impl<T> Few<T> {
    fn take(list: &mut Vec<T>) -> Self {
        match list.len() {
            0 | 1 => Few { one: list.pop(), many: Vec::new() },
            _ => Few { one: None, many: std::mem::take(list) },
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.one.iter_mut().chain(&mut self.many)
    }
}

impl<T> IntoIterator for Few<T> {
    type Item = T;
    type IntoIter = std::iter::Chain<std::option::IntoIter<T>, std::vec::IntoIter<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.one.into_iter().chain(self.many)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_alone_leaves_the_list_its_memory() {
        for len in 0..5 {
            let mut list: Vec<usize> = Vec::with_capacity(8);
            list.extend(0..len);
            let mut few = Few::take(&mut list);
            assert!(list.is_empty());
            assert_eq!(list.capacity() >= 8, len < 2, "{len}");
            few.iter_mut().for_each(|n| *n += 10);
            assert!(few.into_iter().eq(10..10 + len));
        }
    }
}
