//! What the pool does about a panic in its own code, on one of its own threads. Such a panic is a defect of the pool,
//! since a panic of the user's code is caught where that code is called.
//!
//! A defect costs the task at hand and nothing else: the thread goes on, and the log has a record. In the tests of this
//! repository a defect ends the process, since no test would notice it otherwise.

use crate::leaf::shield::panic_text;
use std::any::Any;
use std::io::{Write, stderr};
use std::process::abort;

/// If this variable is in the environment, a defect ends the process. `.cargo/config.toml` sets it for what cargo runs
/// in this repository. (`cfg(test)` would not do, since the library has it in no test of `tests/`. Nor would debug
/// assertions: a release has none, and a user's debug build must not end.)
const ABORT: &str = "MILLPOND_ABORT_ON_DEFECT";

/// The log record of a defect: `what`, of the pool `name`, has panicked.
pub(crate) fn describe(name: &str, what: &str, panic: &(dyn Any + Send)) -> String {
    let text = panic_text(panic);
    if std::env::var_os(ABORT).is_some() {
        // Written to stderr itself: the test harness would capture what `eprintln!` prints, and the process ends here.
        let _ =
            writeln!(stderr(), "pool '{name}': {what} panicked: {text} (`--nocapture` shows where): {ABORT} is set");
        abort();
    }
    format!("{what} panicked, a defect of millpond's: {text}")
}
