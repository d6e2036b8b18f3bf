//! What becomes of a panic of the pool's own, on a thread of its own: a defect, since whatever a user's code panics
//! with is caught where that code is called.
//!
//! A defect costs what was being done, and nothing else: the thread goes on, and the log is told. Where the pool's own
//! tests run it ends the process, or they would pass over it.

use crate::leaf::shield::panic_text;
use std::any::Any;
use std::io::{Write, stderr};
use std::process::abort;

/// If this is in the environment, a defect ends the process. `.cargo/config.toml` puts it there, for what cargo runs in
/// this repository. (Not a `cfg(test)`, which the tests in `tests/` do not have; not debug assertions, which a release
/// has not, and which must not end a user's program.)
const ABORT: &str = "MILLPOND_ABORT_ON_DEFECT";

/// What the log is to be told: that `what`, of the pool `name`, has panicked.
pub(crate) fn describe(name: &str, what: &str, panic: &(dyn Any + Send)) -> String {
    let text = panic_text(panic);
    if std::env::var_os(ABORT).is_some() {
        // Past the test harness, which keeps for itself what a test prints, until it ends.
        let _ =
            writeln!(stderr(), "pool '{name}': {what} panicked: {text} (`--nocapture` shows where): {ABORT} is set");
        abort();
    }
    format!("{what} panicked, a defect of millpond's: {text}")
}
