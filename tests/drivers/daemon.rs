//! A private server of another kind than PostgreSQL, made for one test and gone with it.
//!
//! As with the PostgreSQL of `../support`, a watchdog reads from a pipe that only this process holds, so the server goes
//! however this process ends.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use tempfile::TempDir;

use crate::support::programs::{self, User};
use crate::support::{Stopped, listen, skipped, wait_until, within};

/// Far longer than a start takes anywhere.
const PATIENCE: Duration = Duration::from_secs(30);

/// Told the server's pid, one per line, the last one counts; an empty line: none runs. SIGKILL ends a process that is stopped, too.
const WATCHDOG: &str = r#"
    trap '' HUP INT TERM
    while read -r line; do pid=$line; done
    [ -n "$pid" ] && kill -KILL "$pid"
    cd /
    rm -rf "$1" || { sleep 1; rm -rf "$1"; }
"#;

/// A running server on a loopback port.
pub(crate) struct Daemon {
    port: u16,
    process: Option<Child>,
    watchdog: Child,
    /// Removed by the watchdog; a second time here, in case somebody killed that.
    dir: TempDir,
}

impl Daemon {
    /// Starts a server in an empty folder of its own, which is also its current one. `None`, and the test is skipped, if
    /// the program is not on this machine.
    ///
    /// # Panics
    ///
    /// If it does not start, with what it says.
    pub(crate) fn start(
        program: &str,
        arguments: impl Fn(u16) -> Vec<String>,
        answers: impl Fn(u16) -> bool,
    ) -> Option<Daemon> {
        let Some(program) = find(program) else {
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            skipped(&test, &format!("no {program} found; on Debian: bash .ci/setup tests"));
            return None;
        };
        // Such a server refuses to be run by root, or warns of it.
        let user = User::for_server();
        let parent = user.map_or_else(std::env::temp_dir, |_| PathBuf::from("/tmp"));
        let dir = tempfile::Builder::new().prefix("millpond-").tempdir_in(parent).expect("a folder for the server");
        if let Some(User { uid, gid }) = user {
            chown(dir.path(), Some(uid), Some(gid)).expect("a folder for the server's user");
        }
        let watchdog = programs::command("/bin/sh", dir.path(), user)
            .args(["-c", WATCHDOG, "watchdog"])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the watchdog");
        // Made before anything can go wrong, so that its `Drop` cleans up.
        let mut daemon = Daemon { port: 0, process: None, watchdog, dir };
        // Between finding a port free and listening on it somebody else may take it.
        for _ in 0..5 {
            daemon.port = listen().local_addr().expect("a listener's address").port();
            if daemon.launch(&program, arguments(daemon.port), user, &answers) {
                return Some(daemon);
            }
        }
        panic!("{} does not start:\n{}", program.display(), daemon.log());
    }

    /// Whether it answers in the end.
    fn launch(
        &mut self,
        program: &Path,
        arguments: Vec<String>,
        user: Option<User>,
        answers: impl Fn(u16) -> bool,
    ) -> bool {
        let log = File::create(self.dir.path().join("log")).expect("a log");
        let process = programs::command(program, self.dir.path(), user)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle on the log"))
            .stderr(log)
            .spawn();
        let process = self.process.insert(process.expect("a program that can be run"));
        let pipe = self.watchdog.stdin.as_mut().expect("the watchdog's pipe");
        // A watchdog that was killed has no ear; then there is only `Drop`.
        let _ = writeln!(pipe, "{}", process.id());
        let mut ended = false;
        let up = wait_until(within(PATIENCE), || {
            ended = process.try_wait().expect("the server is our child").is_some();
            ended || answers(self.port)
        });
        if !up || ended {
            self.kill();
            return false;
        }
        true
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
            // Its number may soon be somebody else's.
            let pipe = self.watchdog.stdin.as_mut().expect("the watchdog's pipe");
            let _ = writeln!(pipe);
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// What it says.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Stops it in the middle of whatever it does. The kernel still accepts connections for it, and what is sent.
    pub(crate) fn freeze(&self) -> Stopped {
        Stopped::stop([Pid::from_child(self.process.as_ref().expect("a server that runs"))])
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}

/// Debian keeps servers out of an ordinary user's PATH.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = ["/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/opt/homebrew/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(folders).map(|folder| folder.join(program)).find(|program| program.is_file())
}
