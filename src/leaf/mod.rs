//! Small tools that import nothing of the other layers: each could be a crate of its own.

pub(crate) mod clock;
pub(crate) mod defect;
pub(crate) mod failures;
pub(crate) mod histogram;
pub(crate) mod in_hand;
pub(crate) mod kept;
pub(crate) mod process;
pub(crate) mod shield;
pub(crate) mod sync;
pub(crate) mod text;
pub(crate) mod threads;
pub(crate) mod time;
