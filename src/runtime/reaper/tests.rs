//! A panic of the reaper does not stop its clock, and in this repository it ends the process.

use super::*;
use crate::doc_manager::DocManager;
use crate::{Pool, Validate};
use parking_lot::Mutex;
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

static STRIKE: AtomicBool = AtomicBool::new(false);

/// Called before each look of a reaper. Panics once if [`STRIKE`] is set.
pub(super) fn strike() {
    if STRIKE.swap(false, Ordering::SeqCst) {
        panic!("a defect on purpose");
    }
}

/// Runs [`its_reaper_panics`] in a process of its own: the panic may end it, and its pool must be the only one there.
fn pool_whose_reaper_panics(aborts: bool) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let module = module_path!().split_once("::").unwrap().1;
    command.args(["--exact", &format!("{module}::its_reaper_panics"), "--ignored"]).env("RUST_BACKTRACE", "0");
    match aborts {
        true => command.env("MILLPOND_ABORT_ON_DEFECT", "1"),
        false => command.env_remove("MILLPOND_ABORT_ON_DEFECT"),
    };
    command.output().unwrap()
}

struct Log(Mutex<Vec<String>>);

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().push(format!("{} {}", record.level(), record.args()));
    }

    fn flush(&self) {}
}

static LOG: Log = Log(Mutex::new(Vec::new()));

#[test]
#[ignore = "the other tests of this file run it, in a process of its own"]
fn its_reaper_panics() {
    log::set_logger(&LOG).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let pool =
        Pool::builder().name("p").max_idle(Duration::from_millis(100)).validate(Validate::Never).build(DocManager);
    let pool = pool.unwrap();
    drop(pool.get().unwrap());
    STRIKE.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(20);
    while pool.stats().size() > 0 || STRIKE.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "nothing is evicted any more");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(pool.close(Duration::from_secs(20)).is_complete());
    let told = "ERROR pool 'p': the reaper panicked, a defect of millpond's: a defect on purpose";
    assert_eq!(*LOG.0.lock(), [told]);
}

#[test]
fn a_panic_does_not_stop_the_clock() {
    let output = pool_whose_reaper_panics(false);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
}

#[test]
fn a_panic_ends_what_cargo_runs_in_this_repository() {
    assert!(std::env::var_os("MILLPOND_ABORT_ON_DEFECT").is_some(), "see .cargo/config.toml");
    let output = pool_whose_reaper_panics(true);
    assert!(!output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("the reaper panicked: a defect on purpose"), "{text}");
}
