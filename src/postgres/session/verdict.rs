//! What the pool does with a connection that a caller returns: a table from the facts to the verdict.
//!
//! The table is a pure function. [`Connection`](super::Connection) gathers the facts, once for each return.

use super::reset::Reset;
use crate::Returned;

/// What is found about a connection that is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Facts {
    /// The client has seen the end of its connection, or found it dead when it sent what was queued.
    Dead,
    /// A call has panicked, and the caller has caught that: half a message may be left in the client.
    Unwound,
    /// The caller has sent a request to cancel, which may arrive late.
    CancelSent,
    /// The server no longer has the statements with which `postgres` looks up types.
    LookupsLost,
    /// The connection is not observed, and a call may have left something behind or begun a transaction. So the server
    /// has to be asked.
    Unobserved,
    /// No call has left anything behind, and the connection is [clean](crate::postgres::wire::Watch::is_clean), or not
    /// observed and no call can have begun a transaction.
    Clean,
    /// An answer is under way, in a COPY to the server or not. To read it may take long.
    Answering { in_copy: bool },
    /// No answer is under way, and nothing is queued.
    AtRest(AtRest),
}

/// What is found about a connection on which no answer is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AtRest {
    /// The server has ended the connection, with an error.
    pub(super) ended: bool,
    /// A node that takes writes was asked for. This one has refused a write, and does not say that it takes any.
    pub(super) read_only_node: bool,
    /// The connection must not be used again: it is lost, in a COPY, or a prepared statement of it was missing.
    pub(super) unusable: bool,
    /// The connection is idle, outside of a transaction.
    pub(super) idle: bool,
}

/// What the pool does with a connection with these facts. If two rows match, the upper one counts.
#[rustfmt::skip]
pub(super) fn verdict(facts: Facts, reset: Reset) -> Returned {
    match (facts, reset) {
        (Facts::Dead,                                              _) => Returned::Broken,
        (Facts::AtRest(AtRest { ended: true, .. }),                _) => Returned::Broken,

        (Facts::Unwound | Facts::CancelSent | Facts::LookupsLost,  _) => Returned::Discard,
        (Facts::Answering { in_copy: true },                       _) => Returned::Discard,

        (Facts::AtRest(AtRest { read_only_node: true, .. }),       _) => Returned::Outdated,
        (Facts::AtRest(AtRest { unusable: true, .. }),             _) => Returned::Discard,

        (Facts::Unobserved,                              Reset::None) => Returned::Keep,
        (Facts::Unobserved,                                        _) => Returned::Reset,
        (Facts::Answering { in_copy: false },                      _) => Returned::Reset,

        (Facts::Clean | Facts::AtRest(_),          Reset::DiscardAll) => Returned::Reset,
        (Facts::Clean | Facts::AtRest(_),                Reset::None) => Returned::Keep,
        (Facts::Clean,                               Reset::Rollback) => Returned::Keep,
        (Facts::AtRest(AtRest { idle: true, .. }),   Reset::Rollback) => Returned::Keep,
        (Facts::AtRest(AtRest { idle: false, .. }),  Reset::Rollback) => Returned::Reset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Returned::{Broken, Discard, Keep, Outdated};

    const RESET: Returned = Returned::Reset;

    fn at_rest([ended, read_only_node, unusable, idle]: [u8; 4]) -> Facts {
        let is = |n| n == 1;
        Facts::AtRest(AtRest {
            ended: is(ended),
            read_only_node: is(read_only_node),
            unusable: is(unusable),
            idle: is(idle),
        })
    }

    #[test]
    fn every_row() {
        // What is found, and what is to be done with `Rollback`, `DiscardAll` and `None`.
        let mut table = vec![
            (Facts::Dead, [Broken, Broken, Broken]),
            (Facts::Unwound, [Discard, Discard, Discard]),
            (Facts::CancelSent, [Discard, Discard, Discard]),
            (Facts::LookupsLost, [Discard, Discard, Discard]),
            (Facts::Unobserved, [RESET, RESET, Keep]),
            (Facts::Clean, [Keep, RESET, Keep]),
            (Facts::Answering { in_copy: true }, [Discard, Discard, Discard]),
            (Facts::Answering { in_copy: false }, [RESET, RESET, RESET]),
        ];
        // Ended, on a read-only node, unusable, idle.
        for (bits, verdicts) in [
            ([0, 0, 0, 0], [RESET, RESET, Keep]),
            ([0, 0, 0, 1], [Keep, RESET, Keep]),
            ([0, 0, 1, 0], [Discard, Discard, Discard]),
            ([0, 0, 1, 1], [Discard, Discard, Discard]),
            ([0, 1, 0, 0], [Outdated, Outdated, Outdated]),
            ([0, 1, 0, 1], [Outdated, Outdated, Outdated]),
            ([0, 1, 1, 0], [Outdated, Outdated, Outdated]),
            ([0, 1, 1, 1], [Outdated, Outdated, Outdated]),
            ([1, 0, 0, 0], [Broken, Broken, Broken]),
            ([1, 0, 0, 1], [Broken, Broken, Broken]),
            ([1, 0, 1, 0], [Broken, Broken, Broken]),
            ([1, 0, 1, 1], [Broken, Broken, Broken]),
            ([1, 1, 0, 0], [Broken, Broken, Broken]),
            ([1, 1, 0, 1], [Broken, Broken, Broken]),
            ([1, 1, 1, 0], [Broken, Broken, Broken]),
            ([1, 1, 1, 1], [Broken, Broken, Broken]),
        ] {
            table.push((at_rest(bits), verdicts));
        }
        for (facts, verdicts) in table {
            for (reset, expected) in [Reset::Rollback, Reset::DiscardAll, Reset::None].into_iter().zip(verdicts) {
                assert_eq!(verdict(facts, reset), expected, "{facts:?}, {reset:?}");
            }
        }
    }
}
