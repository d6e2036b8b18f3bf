//! [`Earliest`]: of the moments that slots have, the earliest, found without a look at every slot.
//!
//! To note a moment costs a comparison as a rule, and nothing has to be told when a slot's moment grows or ends: a
//! bound that no longer holds is corrected when it comes up as the first. So a checkout or a return, which may come
//! a million times before anybody asks for the earliest, touches no tree.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use crate::leaf::clock::Moment;

/// The earliest of the slots' moments.
///
/// Invariant: a slot that has a moment has a bound, which is not later than the moment. Who gives a slot a moment
/// [notes](Earliest::note) it.
pub(super) struct Earliest {
    bounds: BinaryHeap<Reverse<(Moment, u32)>>,
    /// The bound of each slot, by index; `NEVER`: it has none. (What else the heap has for the slot is out of date.)
    of_slot: Vec<Moment>,
}

impl Earliest {
    pub(super) const fn new() -> Self {
        Earliest { bounds: BinaryHeap::new(), of_slot: Vec::new() }
    }

    /// The slot has this moment from now on. Whether the earliest may have changed: if not, the slot's bound is earlier
    /// still.
    #[inline]
    pub(super) fn note(&mut self, index: u32, at: Moment) -> bool {
        match self.of_slot.get(index as usize) {
            Some(&bound) if bound <= at => false,
            _ => {
                self.add(index, at);
                true
            }
        }
    }

    #[inline(never)]
    fn add(&mut self, index: u32, at: Moment) {
        let least = index as usize + 1;
        if self.of_slot.len() < least {
            self.of_slot.resize(least, Moment::NEVER);
        }
        self.of_slot[index as usize] = at;
        // (A moment is as a rule the latest of all when it is noted: then this takes no longer in a large pool.)
        self.bounds.push(Reverse((at, index)));
    }

    /// The earliest moment, and the slot that has it. `moment` says what moment a slot has. `looks`: how many bounds
    /// may be corrected. When they are used up, the answer has no slot, and the earliest is not before that moment.
    /// `NEVER`: no slot has a moment.
    pub(super) fn first(&mut self, looks: &mut usize, moment: impl Fn(u32) -> Option<Moment>) -> (Moment, Option<u32>) {
        loop {
            let Some(mut first) = self.bounds.peek_mut() else { return (Moment::NEVER, None) };
            let Reverse((bound, index)) = *first;
            let now = if self.of_slot[index as usize] == bound { moment(index) } else { None };
            if now == Some(bound) {
                return (bound, Some(index));
            }
            if *looks == 0 {
                return (bound, None);
            }
            *looks -= 1;
            match now {
                Some(at) => {
                    self.of_slot[index as usize] = at;
                    *first = Reverse((at, index));
                }
                None => {
                    if self.of_slot[index as usize] == bound {
                        self.of_slot[index as usize] = Moment::NEVER;
                    }
                    PeekMut::pop(first);
                }
            }
        }
    }

    /// How many bounds there are, for the tests.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.bounds.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;
    use std::time::Duration;

    fn at(n: u64) -> Moment {
        Moment::BIRTH.plus(Duration::from_nanos(n))
    }

    proptest! {
        /// Whatever moments slots have, earlier or later than before, or none: the earliest is as found by a search.
        #[test]
        fn is_as_a_search_finds_it(ops in prop::collection::vec((0..8u32, 0..3u8, 0..100u64), 1..300)) {
            let (mut earliest, mut moments) = (Earliest::new(), [None; 8]);
            for (slot, op, n) in ops {
                let moment = &mut moments[slot as usize];
                match op {
                    0 => *moment = None,
                    _ => {
                        *moment = Some(at(n));
                        earliest.note(slot, at(n));
                    }
                }
                let naive = moments.iter().flatten().min().copied().unwrap_or(Moment::NEVER);
                // With few looks it may be said too early, and never too late.
                let (bound, found) = earliest.first(&mut (n as usize % 2), |slot| moments[slot as usize]);
                assert!(if found.is_some() { bound == naive } else { bound <= naive });
                if n % 3 == 0 {
                    let (first, found) = earliest.first(&mut 1_000, |slot| moments[slot as usize]);
                    assert_eq!(first, naive);
                    assert_eq!(found.and_then(|slot| moments[slot as usize]), moments.iter().flatten().min().copied());
                }
            }
        }
    }

    #[test]
    fn a_slot_that_is_used_over_and_over_has_one_bound() {
        let mut earliest = Earliest::new();
        let moment = Cell::new(0);
        for n in 1..1_000 {
            moment.set(n);
            assert_eq!(earliest.note(3, at(n)), n == 1);
        }
        assert_eq!(earliest.len(), 1);
        let mut looks = 5;
        assert_eq!(earliest.first(&mut looks, |_| Some(at(moment.get()))), (at(999), Some(3)));
        assert_eq!((looks, earliest.len()), (4, 1));
        assert_eq!(earliest.first(&mut looks, |_| None), (Moment::NEVER, None));
        assert_eq!(earliest.len(), 0);
    }
}
