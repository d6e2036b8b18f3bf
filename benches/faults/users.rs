//! Users of a pool who note how each of their calls went: in this process, or in a program that says so line by line.

use parking_lot::{Condvar, Mutex};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What a call was doing when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Checkout,
    Query,
}

/// Why a call failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn at(stage: Stage) -> impl Fn(&dyn std::error::Error) -> Failure {
        move |error| {
            let mut text = error.to_string();
            if let Some(source) = error.source() {
                text += &format!(": {source}");
            }
            Failure { stage, text }
        }
    }
}

/// One call that has ended: a checkout, a query, a return.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) user: usize,
    pub(crate) begun: Instant,
    pub(crate) ended: Instant,
    pub(crate) failure: Option<Failure>,
}

/// What the users have noted so far.
#[derive(Clone, Default)]
pub(crate) struct Notes {
    pub(crate) calls: Vec<Call>,
    /// By user: when the call began that has not ended.
    pub(crate) under_way: Vec<Option<Instant>>,
}

/// Where they note it.
#[derive(Default)]
struct Book {
    notes: Mutex<Notes>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Book {
    fn new(users: usize) -> Arc<Book> {
        let notes = Notes { calls: Vec::new(), under_way: vec![None; users] };
        Arc::new(Book { notes: Mutex::new(notes), ..Book::default() })
    }

    fn begun(&self, user: usize, at: Instant) {
        self.notes.lock().under_way[user] = Some(at);
    }

    fn ended(&self, user: usize, ended: Instant, failure: Option<Failure>) {
        let mut notes = self.notes.lock();
        let begun = notes.under_way[user].take().expect("a call that has begun");
        notes.calls.push(Call { user, begun, ended, failure });
    }

    fn stop(&self) {
        *self.stop.lock() = true;
        self.stopped.notify_all();
    }

    /// `false`: there was a call to stop meanwhile.
    fn sleep(&self, pause: Duration) -> bool {
        let deadline = Instant::now() + pause;
        let mut stop = self.stop.lock();
        while !*stop && !self.stopped.wait_until(&mut stop, deadline).timed_out() {}
        !*stop
    }
}

/// What each user does again and again.
#[derive(Clone, Debug)]
pub(crate) struct Habit {
    pub(crate) users: usize,
    /// How many connections the pool may have.
    pub(crate) size: u32,
    /// How long a checkout may wait.
    pub(crate) timeout: Duration,
    /// Between two calls.
    pub(crate) pause: Duration,
    /// Between the first calls of one user and the next.
    pub(crate) stagger: Duration,
    pub(crate) query: &'static str,
}

/// A pool and its users.
pub(crate) trait Party: Send {
    /// From now on the users call.
    fn go(&mut self);

    fn notes(&self) -> Notes;

    /// The users make no further calls.
    fn stop(&mut self);

    /// Closes the pool as its documentation says. Does not wait for the end of that.
    fn close(&mut self);

    /// Waits until nothing is left of it in this process. What could hold it up must be gone by then.
    fn end(self: Box<Self>);
}

/// One call: a checkout, a query, a return.
pub(crate) type Use = Box<dyn Fn() -> Result<(), Failure> + Send + Sync>;

/// A pool in this process, a thread per user.
pub(crate) struct Threads {
    habit: Habit,
    book: Arc<Book>,
    call: Option<Arc<Use>>,
    close: Option<Box<dyn FnOnce() + Send>>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    pub(crate) fn new(habit: &Habit, call: Use, close: impl FnOnce() + Send + 'static) -> Threads {
        Threads {
            habit: habit.clone(),
            book: Book::new(habit.users),
            call: Some(Arc::new(call)),
            close: Some(Box::new(close)),
            threads: Vec::new(),
        }
    }
}

impl Party for Threads {
    fn go(&mut self) {
        let call = self.call.take().expect("users who have not begun");
        for user in 0..self.habit.users {
            let (call, book, pause) = (Arc::clone(&call), Arc::clone(&self.book), self.habit.pause);
            let first = self.habit.stagger * user as u32;
            self.threads.push(thread::spawn(move || {
                if !book.sleep(first) {
                    return;
                }
                loop {
                    book.begun(user, Instant::now());
                    let failure = call().err();
                    book.ended(user, Instant::now(), failure);
                    if !book.sleep(pause) {
                        return;
                    }
                }
            }));
        }
    }

    fn notes(&self) -> Notes {
        self.book.notes.lock().clone()
    }

    fn stop(&mut self) {
        self.book.stop();
    }

    fn close(&mut self) {
        self.threads.extend(self.close.take().map(thread::spawn));
    }

    fn end(self: Box<Self>) {
        self.book.stop();
        for thread in self.threads {
            thread.join().expect("a user");
        }
    }
}

/// A pool and its users in another program. Ends when dropped.
pub(crate) struct Program {
    child: Child,
    input: ChildStdin,
    book: Arc<Book>,
    reader: Option<JoinHandle<()>>,
}

impl Program {
    /// Returns when its pool stands. It is to say `ready`; when told `go`, `now` with its clock; then `begun USER TIME`
    /// and `ended USER TIME ok|checkout|query TEXT`. It is told `stop` and `close`, and ends when its input does.
    pub(crate) fn start(mut command: Command, users: usize) -> Program {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a program that is there");
        let input = child.stdin.take().expect("its input");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        let mut line = String::new();
        output.read_line(&mut line).expect("a word");
        assert_eq!(line.trim(), "ready", "the program has failed");
        let book = Book::new(users);
        let reader = {
            let book = Arc::clone(&book);
            thread::spawn(move || note(&book, output.lines().map_while(Result::ok)))
        };
        Program { child, input, book, reader: Some(reader) }
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.input, "{word}").expect("the program listens");
    }
}

/// Writes down what the program says, by this process's clock.
fn note(book: &Book, lines: impl Iterator<Item = String>) {
    let mut origin = None;
    for line in lines {
        let mut words = line.splitn(5, ' ');
        let mut word = || words.next().unwrap_or_default();
        let what = word();
        if what == "now" {
            let now: f64 = word().parse().expect("a time");
            origin = Some((Instant::now(), now));
            continue;
        }
        let user: usize = word().parse().expect("a user");
        let time: f64 = word().parse().expect("a time");
        let (instant, then) = origin.expect("a clock to read times by");
        let at = instant + Duration::from_secs_f64((time - then).max(0.0));
        if what == "begun" {
            book.begun(user, at);
            continue;
        }
        let stage = match word() {
            "ok" => None,
            "checkout" => Some(Stage::Checkout),
            _ => Some(Stage::Query),
        };
        book.ended(user, at, stage.map(|stage| Failure { stage, text: word().to_owned() }));
    }
}

impl Party for Program {
    fn go(&mut self) {
        self.tell("go");
    }

    fn notes(&self) -> Notes {
        self.book.notes.lock().clone()
    }

    fn stop(&mut self) {
        self.tell("stop");
    }

    fn close(&mut self) {
        self.tell("close");
    }

    fn end(self: Box<Self>) {}
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
