//! An example that runs: what it prints, its signals, its end.

use crate::support::programs::example;
use crate::support::{SOON, wait_until, within};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;

/// A running example. It does not survive its test.
pub(crate) struct Program {
    child: Child,
    lines: Receiver<String>,
    /// What it has printed and was looked at, for messages.
    seen: String,
}

impl Program {
    fn command(name: &str, database: &str) -> Command {
        let mut command = Command::new(example(name));
        command.env("DATABASE_URL", database).env("PORT", "0").env("RUST_BACKTRACE", "0");
        command
    }

    /// Runs an example whose output nobody reads, to its end: the first thing that it prints makes it panic.
    #[track_caller]
    pub(crate) fn panics(name: &str, database: &str) {
        let (reader, writer) = UnixStream::pair().expect("a pipe");
        drop(reader);
        let mut command = Program::command(name, database);
        let child = command
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(writer))
            .stderr(Stdio::null())
            .spawn()
            .expect("the example");
        let program = Program { child, lines: channel().1, seen: String::new() };
        let (status, _) = program.end();
        assert_eq!(status.code(), Some(101), "it does not panic: {status}");
    }

    /// Starts an example on this database, with `PORT=0`.
    pub(crate) fn start(name: &str, database: &str) -> Program {
        let mut command = Program::command(name, database);
        let (reader, writer) = UnixStream::pair().expect("a pipe");
        let error = writer.try_clone().expect("a second end");
        let child = command
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(writer))
            .stderr(OwnedFd::from(error))
            .spawn()
            .expect("the example");
        // Only the example and what it starts hold the other end of the pipe now.
        drop(command);
        let (sender, lines) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(reader).lines();
            lines.map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Program { child, lines, seen: String::new() }
    }

    /// Waits for a line with this text, and returns it. It is the first one since the last that was waited for.
    #[track_caller]
    pub(crate) fn line(&mut self, text: &str) -> String {
        let deadline = within(SOON);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(e) => panic!("no line with `{text}` ({e}):\n{}", self.seen),
            };
            self.seen += &format!("{line}\n");
            if line.contains(text) {
                return line;
            }
        }
    }

    /// The address that it prints when it listens.
    pub(crate) fn address(&mut self) -> std::net::SocketAddr {
        let line = self.line("listening on ");
        line.rsplit(['/', ' ']).next().and_then(|a| a.parse().ok()).expect("an address at the line's end")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a process to signal");
    }

    /// Waits for the end of the example and of all that it has started: with which status, and after which words.
    #[track_caller]
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        let mut status = None;
        let ended = wait_until(within(SOON), || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        assert!(ended, "it does not end:\n{}", self.all());
        // Whatever it has started holds the pipe as well.
        let all = self.all();
        (status.expect("it has ended"), all)
    }

    /// What it prints until its end.
    #[track_caller]
    fn all(&mut self) -> String {
        let deadline = within(SOON);
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen += &format!("{line}\n"),
                Err(RecvTimeoutError::Disconnected) => return self.seen.clone(),
                Err(RecvTimeoutError::Timeout) => panic!("somebody still holds its output:\n{}", self.seen),
            }
        }
    }

    /// Waits for a clean end: exit code 0, and a pool that says that nothing is left.
    #[track_caller]
    pub(crate) fn ends_cleanly(self) -> String {
        let (status, words) = self.end();
        assert!(status.success() && words.contains("nothing is left"), "{status}:\n{words}");
        words
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
