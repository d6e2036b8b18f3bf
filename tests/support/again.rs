//! This test program once more, as a process that can be killed.

use std::process::{Child, Command, Stdio};

/// A process that runs one test of this program. Killed, and waited for, when it is dropped.
pub struct Again(Child);

impl Again {
    /// Runs `test`, with its path, which is to be `#[ignore]`, for it proves nothing by itself. It finds `task` in the
    /// environment variable [`TASK`](Again::TASK); nobody else has that.
    pub fn run(test: &str, task: &str) -> Again {
        Again::run_by(&[], test, task)
    }

    /// As [`run`](Again::run), by a program that runs others, such as `unshare --pid --fork`. [`id`](Again::id) is that
    /// program's then.
    pub fn run_by(runner: &[&str], test: &str, task: &str) -> Again {
        let program = std::env::current_exe().expect("the path of this program");
        let mut command = match runner {
            [] => Command::new(program),
            [runner, args @ ..] => {
                let mut command = Command::new(runner);
                command.args(args).arg(program);
                command
            }
        };
        command.args(["--exact", test, "--ignored", "--nocapture"]).env(Again::TASK, task);
        Again(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("this program, once more"))
    }

    pub const TASK: &str = "MILLPOND_TEST_TASK";

    /// What this process was run for.
    ///
    /// # Panics
    ///
    /// If it is not one of these.
    pub fn task() -> String {
        std::env::var(Again::TASK).expect("this is the work of a process that another test starts")
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// SIGKILL. It is dead soon after, and a zombie.
    pub fn kill(&mut self) {
        self.0.kill().expect("it can be killed");
    }

    /// Waits until it ends by itself, and says whether it ended well.
    pub fn finish(&mut self) -> bool {
        self.0.wait().expect("its end").success()
    }

    /// SIGKILL, and waits for its end.
    pub fn end(&mut self) {
        self.kill();
        self.0.wait().expect("its end");
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
