//! [`Waiters`]: the queue itself, in the order of the tickets. Each waiter is notified or not, and the next one to
//! notify is found without a search. No list gives memory back, so a queue that has been as long before allocates
//! nothing.

use std::collections::VecDeque;

use super::values::{Caller, Ticket};

pub(super) struct Waiter<W> {
    pub(super) ticket: Ticket,
    pub(super) handle: W,
    pub(super) caller: Caller,
    is_notified: bool,
}

impl<W> Waiter<W> {
    pub(super) fn new(ticket: Ticket, handle: W, caller: Caller) -> Self {
        Waiter { ticket, handle, caller, is_notified: false }
    }
}

/// The waiters, sorted by ticket.
pub(super) struct Waiters<W> {
    waiters: VecDeque<Waiter<W>>,
    /// How far the notifications have come: no waiter at this place or behind it is notified.
    reached: usize,
    /// The waiters before that place that are not notified, the last one first. They joined late with an early ticket,
    /// or were notified in vain.
    passed_over: Vec<Ticket>,
}

impl<W> Waiters<W> {
    pub(super) fn new() -> Self {
        Waiters { waiters: VecDeque::new(), reached: 0, passed_over: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.waiters.len()
    }

    /// How many of them are notified.
    pub(super) fn notified(&self) -> usize {
        self.reached - self.passed_over.len()
    }

    pub(super) fn first(&self) -> Option<&Waiter<W>> {
        self.waiters.front()
    }

    /// Queues a waiter, nearly always at the end.
    pub(super) fn insert(&mut self, waiter: Waiter<W>) {
        let ticket = waiter.ticket;
        if self.waiters.back().is_none_or(|last| last.ticket < ticket) {
            return self.waiters.push_back(waiter);
        }
        let at = self.waiters.partition_point(|other| other.ticket < ticket);
        self.waiters.insert(at, waiter);
        if at < self.reached {
            self.reached += 1;
            self.pass_over(ticket);
        }
    }

    /// Takes a waiter out of the queue.
    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Waiter<W>> {
        let at = self.place(ticket)?;
        let waiter = self.waiters.remove(at)?;
        if at < self.reached {
            self.reached -= 1;
            if !waiter.is_notified {
                let at = self.passed_over.partition_point(|&other| other > ticket);
                self.passed_over.remove(at);
            }
        }
        Some(waiter)
    }

    /// The waiter was notified and has come: it is not notified any longer. `None`: it was not, or does not wait.
    pub(super) fn has_come(&mut self, ticket: Ticket) -> Option<Caller> {
        let at = self.place(ticket)?;
        let waiter = &mut self.waiters[at];
        if !std::mem::take(&mut waiter.is_notified) {
            return None;
        }
        let caller = waiter.caller;
        self.pass_over(ticket);
        Some(caller)
    }

    /// Marks the first waiter that is not notified as notified.
    pub(super) fn notify_next(&mut self) -> Option<&W> {
        let at = match self.passed_over.pop() {
            Some(ticket) => self.place(ticket).expect("passed over, and still queued"),
            None if self.reached < self.waiters.len() => {
                self.reached += 1;
                self.reached - 1
            }
            None => return None,
        };
        let waiter = &mut self.waiters[at];
        waiter.is_notified = true;
        Some(&waiter.handle)
    }

    fn place(&self, ticket: Ticket) -> Option<usize> {
        // Most often it is the first one.
        match self.waiters.front() {
            Some(first) if first.ticket == ticket => Some(0),
            _ => self.waiters.binary_search_by_key(&ticket, |waiter| waiter.ticket).ok(),
        }
    }

    fn pass_over(&mut self, ticket: Ticket) {
        let at = self.passed_over.partition_point(|&other| other > ticket);
        self.passed_over.insert(at, ticket);
    }

    /// The tickets of those that are notified, for the tests: by the marks alone.
    #[cfg(test)]
    pub(super) fn marked(&self) -> Vec<Ticket> {
        self.waiters.iter().filter(|waiter| waiter.is_notified).map(|waiter| waiter.ticket).collect()
    }

    #[cfg(test)]
    pub(super) fn tickets(&self) -> Vec<Ticket> {
        self.waiters.iter().map(|waiter| waiter.ticket).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leaf::clock::Moment;
    use proptest::prelude::*;
    use std::panic::Location;

    fn ticket(number: u64) -> Ticket {
        Ticket { number, since: Moment::BIRTH }
    }

    /// Each waiter's number, and whether it is notified: what [`Waiters`] must say.
    type Naive = std::collections::BTreeMap<u64, bool>;

    fn compare(waiters: &Waiters<u64>, naive: &Naive) {
        let tickets: Vec<_> = naive.keys().map(|&number| ticket(number)).collect();
        assert_eq!(waiters.tickets(), tickets);
        let notified: Vec<_> = naive.iter().filter(|&(_, &notified)| notified).map(|(&n, _)| ticket(n)).collect();
        assert_eq!((waiters.marked(), waiters.notified()), (notified.clone(), notified.len()));
        assert_eq!((waiters.len(), waiters.first().map(|w| w.ticket)), (tickets.len(), tickets.first().copied()));
    }

    proptest! {
        /// Whoever joins, comes, leaves and is notified, in whatever order: the queue is as a naive one.
        #[test]
        fn is_as_a_naive_queue(ops in prop::collection::vec((0..4u8, 0..24u64), 1..200)) {
            let caller = Caller { at: Location::caller(), thread: 1 };
            let (mut waiters, mut naive) = (Waiters::new(), Naive::new());
            for (op, number) in ops {
                match op {
                    0 if !naive.contains_key(&number) => {
                        waiters.insert(Waiter::new(ticket(number), number, caller));
                        naive.insert(number, false);
                    }
                    1 => {
                        let removed = waiters.remove(ticket(number)).map(|waiter| waiter.handle);
                        assert_eq!(removed, naive.remove(&number).map(|_| number));
                    }
                    2 => {
                        let was = naive.get_mut(&number).is_some_and(std::mem::take);
                        assert_eq!(waiters.has_come(ticket(number)).is_some(), was);
                    }
                    _ => {
                        let next = naive.iter_mut().find(|(_, notified)| !**notified);
                        let next = next.map(|(&number, notified)| { *notified = true; number });
                        assert_eq!(waiters.notify_next().copied(), next);
                    }
                }
                compare(&waiters, &naive);
            }
        }
    }
}
