//! The users of a pool: each checks a connection out, looks whether it knows anything of a former user, does something
//! with it, and returns it in one of the ways there are.

use std::fmt;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::journal::Dice;
use crate::lane::Lane;
use crate::support::ms;
use crate::world::{LATE, World};
use millpond::ErrorKind;
use millpond::postgres::{PooledConnection, Reset};
use postgres::fallible_iterator::FallibleIterator;
use postgres::{SimpleQueryMessage, error::SqlState};

/// A connection that is returned by another thread, later.
pub(crate) type Late = (Instant, PooledConnection);

/// A user, on a thread of its own until its lane is over.
pub(crate) struct User<'a> {
    pub(crate) world: &'a World,
    pub(crate) lane: &'a Lane,
    pub(crate) name: String,
    pub(crate) dice: Dice,
    pub(crate) late: mpsc::Sender<Late>,
    /// Counts its turns.
    pub(crate) turns: u64,
}

/// Why a use failed: the connection broke, which faults do; or something that must not be.
enum Failed {
    Broken,
    Flaw(String),
}

impl From<postgres::Error> for Failed {
    fn from(error: postgres::Error) -> Failed {
        let text = || match error.as_db_error() {
            Some(db) => format!("{} {}", db.code().code(), db.message()),
            None => format!("{error}: {:?}", std::error::Error::source(&error)),
        };
        match error.code() {
            // The server, or an administrator, has ended the connection.
            Some(code) if [&SqlState::ADMIN_SHUTDOWN, &SqlState::CRASH_SHUTDOWN].contains(&code) => Failed::Broken,
            Some(code) if *code == SqlState::CANNOT_CONNECT_NOW => Failed::Broken,
            // A cancel that was meant for somebody else, a failed transaction that is another's, ...
            Some(_) => Failed::Flaw(text()),
            None if error.to_string().contains("unexpected message") => Failed::Flaw(text()),
            None => Failed::Broken,
        }
    }
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Failed {
        match error.into_inner().map(|inner| inner.downcast::<postgres::Error>()) {
            Some(Ok(error)) => Failed::from(*error),
            _ => Failed::Broken,
        }
    }
}

type Used = Result<(), Failed>;

fn expect<T: PartialEq + fmt::Debug>(what: &str, found: T, expected: T) -> Used {
    if found == expected { Ok(()) } else { Err(Failed::Flaw(format!("{what}: {found:?}, not {expected:?}"))) }
}

/// What is done with a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Program {
    Ask,
    AskCached,
    Commit,
    Autocommit,
    LeaveOpen,
    LeaveFailed,
    Rollback,
    Panic,
    Session,
    Prepare,
    CopyIn,
    CopyInBrokenOff,
    CopyOut,
    HalfRead,
    Slow,
    Long,
    CancelLate,
    CancelOwn,
    Discard,
    Detach,
    ReturnLate,
    Second,
    Nothing,
}

/// What is drawn from, beside as many short uses again.
const PROGRAMS: &[Program] = &[
    Program::Commit,
    Program::Autocommit,
    Program::LeaveOpen,
    Program::LeaveFailed,
    Program::Rollback,
    Program::Panic,
    Program::Session,
    Program::Prepare,
    Program::CopyIn,
    Program::CopyInBrokenOff,
    Program::CopyOut,
    Program::HalfRead,
    Program::Slow,
    Program::Long,
    Program::CancelLate,
    Program::CancelOwn,
    Program::Discard,
    Program::Detach,
    Program::ReturnLate,
    Program::Second,
    Program::Nothing,
];

impl User<'_> {
    pub(crate) fn work(mut self) {
        while !self.lane.over.load(SeqCst) && !self.world.journal.is_flawed() {
            if self.lane.hushed.load(SeqCst) {
                thread::sleep(ms(5));
                continue;
            }
            if !self.dice.one_in(3) {
                thread::sleep(self.dice.pick(&[ms(0), ms(1), ms(5), ms(30)]));
            }
            if self.dice.one_in(150) {
                // Long enough for connections to be idle for too long.
                thread::sleep(self.dice.between(100, 800));
            }
            self.turns += 1;
            self.turn();
        }
    }

    fn turn(&mut self) {
        let Some(connection) = self.check_out() else { return };
        let program = match self.dice.one_in(2) {
            true => self.dice.pick(&[Program::Ask, Program::AskCached, Program::Nothing, Program::Commit]),
            false => self.dice.pick(PROGRAMS),
        };
        let (token, kind) = (format!("{}-{}", self.name, self.turns), format!("{program:?}"));
        let used = self.use_it(connection, program, &token);
        let outcome = match &used {
            Ok(()) => "done".to_owned(),
            Err(Failed::Broken) => "broken".to_owned(),
            Err(Failed::Flaw(text)) => text.clone(),
        };
        self.world.journal.turn(&self.name, &kind, &outcome);
        match used {
            Ok(()) => {}
            Err(Failed::Broken) => self.world.journal.count("uses that met a broken connection", 1),
            // When its grace is over the close of a pool cancels what still runs.
            Err(Failed::Flaw(text)) if self.lane.is_closing() && text.starts_with("57014") => {}
            Err(Failed::Flaw(text)) => self.world.journal.flaw(format_args!("{token}, {program:?}: {text}")),
        }
    }

    // ------------------------------------------------------------------------------------------ the checkout

    fn check_out(&mut self) -> Option<PooledConnection> {
        let pool = self.lane.pool()?;
        let (begun, how) = (Instant::now(), self.dice.roll(10));
        let timeout = match how {
            0 => Duration::ZERO,
            1 => ms(1 + self.dice.roll(5)),
            2..6 => self.dice.between(20, 800),
            _ => pool.connection_timeout(),
        };
        if how == 9 {
            let got = pool.try_get();
            self.in_time("try_get", begun, Duration::ZERO);
            return got;
        }
        let got = if how >= 6 { pool.get() } else { pool.get_timeout(timeout) };
        let took = self.in_time("get", begun, timeout);
        drop(pool);
        let error = match got {
            Ok(connection) => {
                self.is_young(&connection);
                return Some(connection);
            }
            Err(error) => error,
        };
        let flaw = |what: &str| self.world.journal.flaw(format_args!("{}: {what}: {error}", self.name));
        match error.kind() {
            ErrorKind::Timeout(_) => {
                self.world.journal.count("get/timeout", 1);
                if took + ms(5) < timeout {
                    flaw(&format!("a timeout of {timeout:?} after {took:?}"));
                }
            }
            ErrorKind::Closed(_) => {
                self.world.journal.count("get/closed", 1);
                if !self.lane.is_closing() {
                    flaw("closed by nobody");
                }
                // As a server that goes down, rather than to ask again at once.
                thread::sleep(ms(20));
            }
            ErrorKind::Connect(_) => {
                self.world.journal.count("get/refused", 1);
                if !self.world.refused.load(SeqCst) {
                    flaw("refused by nobody");
                }
                thread::sleep(ms(5));
            }
            ErrorKind::TooManyWaiting(_) => {
                self.world.journal.count("get/too many wait", 1);
                if self.lane.drawn.max_waiting.is_none() {
                    flaw("as many may wait as like");
                }
                thread::sleep(ms(1));
            }
            _ => flaw("an error that cannot be"),
        }
        None
    }

    /// P3: within its deadline.
    fn in_time(&self, what: &str, begun: Instant, timeout: Duration) -> Duration {
        let took = begun.elapsed();
        let late = took.saturating_sub(timeout);
        self.world.journal.most("a get was late by", late);
        if late > LATE + self.world.heart.stood_still_since(begun) {
            self.world.journal.flaw(format_args!("{}: {what} with {timeout:?} took {took:?}", self.name));
        }
        took
    }

    /// P2: not handed out past its lifetime.
    fn is_young(&self, connection: &PooledConnection) {
        let (asked, age) = (Instant::now(), PooledConnection::info(connection).age);
        if let Some(life) = self.lane.drawn.max_lifetime {
            self.world.journal.most("a connection was handed out past its lifetime by", age.saturating_sub(life));
            if age > life + LATE + self.world.heart.stood_still_since(asked - LATE) {
                self.world.journal.flaw(format_args!("{}: handed out at an age of {age:?}, {life:?}", self.name));
            }
        }
    }

    /// Nothing of a former user's, as far as the pool promises it.
    fn look(&mut self, connection: &mut PooledConnection) -> Used {
        // A new transaction begins with its first statement.
        const SQL: &str = "SELECT now() = statement_timestamp(), pg_backend_pid(), \
            coalesce(current_setting('soak.local', true), ''), \
            coalesce(current_setting('soak.home', true), ''), coalesce(current_setting('soak.mark', true), ''), \
            (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()), \
            (SELECT count(*) FROM pg_listening_channels()), (SELECT count(*) FROM pg_cursors WHERE name = 'soak_cursor'), \
            (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND pid = pg_backend_pid()), \
            (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 2 AND pid = pg_backend_pid())";
        let known = connection.backend_pid().map(|pid| pid.to_string()).unwrap_or_default();
        let answer = connection.simple_query(SQL)?;
        let Some(row) = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        }) else {
            return Err(Failed::Flaw("an answer without a row".into()));
        };
        let column = |n: usize| row.get(n).unwrap_or("null").to_owned();
        expect("a transaction of its own", column(0), "t".into())?;
        expect("its backend", column(1), known.clone())?;
        expect("a setting of another's transaction", column(2), String::new())?;
        if self.lane.drawn.customized {
            expect("the session that was marked as it was opened", column(3), known.clone())?;
        }
        expect("a cursor of another's transaction", column(7), "0".into())?;
        expect("a lock of another's transaction", column(8), "0".into())?;
        if self.lane.drawn.reset == Reset::DiscardAll {
            expect("a mark of another's", column(4), String::new())?;
            expect("temporary tables of another's", column(5), "0".into())?;
            expect("channels of another's", column(6), "0".into())?;
            expect("advisory locks of another's", column(9), "0".into())
        } else if !column(4).is_empty() {
            // It stays, and stays with its own session.
            expect("the mark of a session", column(4), known)
        } else {
            Ok(())
        }
    }

    // ------------------------------------------------------------------------------------------ the uses

    fn use_it(&mut self, mut connection: PooledConnection, program: Program, token: &str) -> Used {
        self.look(&mut connection)?;
        ask(&mut connection, token)?;
        let lane = self.lane.name.clone();
        let insert = "INSERT INTO soak (lane, kind, token) VALUES ($1, 'kept', $2)";
        match program {
            Program::Nothing => {}
            Program::Ask => {
                for n in 0..self.dice.roll(5) {
                    ask(&mut connection, &format!("{token}-{n}"))?;
                }
            }
            Program::AskCached => {
                for n in 0..self.dice.roll(8) {
                    let sql = ["SELECT $1::text", "SELECT $1::text || ''", "SELECT coalesce($1::text, 'x')"];
                    let token = format!("{token}-{n}");
                    let row = connection.query_one_cached(self.dice.pick(&sql), &[&token])?;
                    expect("an answer of one's own", row.get(0), token)?;
                }
            }
            Program::Autocommit => {
                self.tried(token);
                connection.execute_cached(insert, &[&lane, &token])?;
                self.kept(token);
            }
            Program::Commit => {
                self.tried(token);
                let mut transaction = connection.begin()?;
                transaction.execute_cached(insert, &[&lane, &token])?;
                if self.dice.one_in(3) {
                    thread::sleep(self.dice.between(0, 30));
                }
                transaction.commit()?;
                self.kept(token);
            }
            Program::Rollback => {
                let mut transaction = connection.begin()?;
                transaction.execute_cached(insert, &[&lane, &token])?;
                if self.dice.one_in(2) {
                    transaction.rollback()?;
                }
            }
            Program::LeaveOpen => connection.batch_execute(&leave(&lane, token))?,
            Program::LeaveFailed => {
                connection.batch_execute(&leave(&lane, token))?;
                match connection.batch_execute("SELECT 1 / 0").map_err(|e| (e.code().cloned(), e)) {
                    Err((Some(SqlState::DIVISION_BY_ZERO), _)) => {}
                    Err((_, error)) => return Err(error.into()),
                    Ok(()) => return Err(Failed::Flaw("somebody answered 1 / 0".into())),
                }
            }
            Program::Panic => {
                connection.batch_execute(&leave(&lane, token))?;
                let unwound = catch_unwind(AssertUnwindSafe(move || {
                    let _connection = connection;
                    resume_unwind(Box::new("on purpose, and quietly"));
                }));
                assert!(unwound.is_err());
            }
            Program::Session => connection.batch_execute(
                "SELECT set_config('soak.mark', pg_backend_pid()::text, false); LISTEN soak; \
                 CREATE TEMP TABLE IF NOT EXISTS soak_temp (n int); SELECT pg_try_advisory_lock(pg_backend_pid(), 2)",
            )?,
            Program::Prepare => {
                let statement = connection.prepare("SELECT $1::text, $2::int8[]")?;
                let row = connection.query_one(&statement, &[&token, &vec![self.turns as i64]])?;
                expect("an answer of one's own", row.get(0), token.to_owned())?;
                expect("a number of one's own", row.get(1), vec![self.turns as i64])?;
            }
            Program::CopyIn => {
                self.tried(token);
                let mut writer = connection.copy_in("COPY soak (lane, kind, token) FROM STDIN")?;
                writeln!(writer, "{lane}\tkept\t{token}")?;
                writer.finish()?;
                self.kept(token);
            }
            Program::CopyInBrokenOff => {
                let mut writer = connection.copy_in("COPY soak (lane, kind, token) FROM STDIN")?;
                writeln!(writer, "{lane}\tlost\t{token}")?;
                if self.dice.one_in(2) {
                    // The server has some of it, and hears of something else after that.
                    writer.flush()?;
                    drop(writer);
                    connection.batch_execute("BEGIN")?;
                }
            }
            Program::CopyOut => {
                let mut reader = connection.copy_out("COPY (SELECT generate_series(1, 20000)) TO STDOUT")?;
                let mut buffer = [0; 512];
                for _ in 0..=self.dice.roll(5) {
                    reader.read_exact(&mut buffer)?;
                }
            }
            Program::HalfRead => {
                let sql = "SELECT $1::text || generate_series(1, 50000)::text";
                let mut rows = connection.query_raw(sql, [&token])?;
                for n in 1..=self.dice.roll(10) {
                    let Some(row) = rows.next()? else { return Err(Failed::Flaw("an answer with no end".into())) };
                    expect("a row of one's own", row.get(0), format!("{token}{n}"))?;
                }
            }
            Program::Slow => {
                let seconds = self.dice.between(10, 200).as_secs_f64();
                connection.query_one("SELECT pg_sleep($1)::text", &[&seconds])?;
            }
            Program::Long => {
                thread::sleep(self.dice.between(50, 700));
                ask(&mut connection, token)?;
            }
            Program::CancelLate => {
                let canceller = connection.canceller();
                drop(connection);
                // It must not reach whoever has the connection by now.
                let _ = canceller.cancel();
            }
            Program::CancelOwn => {
                let canceller = connection.canceller();
                let time = self.dice.between(0, 60);
                let cancelled = thread::scope(|scope| {
                    scope.spawn(move || {
                        thread::sleep(time);
                        let _ = canceller.cancel();
                    });
                    connection.query_one("SELECT pg_sleep(0.2)::text", &[])
                });
                match cancelled.map_err(|e| (e.code().cloned(), e)) {
                    Ok(_) | Err((Some(SqlState::QUERY_CANCELED), _)) => {}
                    Err((_, error)) => return Err(error.into()),
                }
            }
            Program::Discard => {
                connection.batch_execute(&leave(&lane, token))?;
                PooledConnection::discard(connection);
            }
            Program::Detach => {
                let pid = connection.backend_pid();
                self.lane.detached.lock().extend(pid);
                let mut own = PooledConnection::detach(connection);
                let answer = own.query_one("SELECT $1::text", &[&token]);
                drop(own);
                expect("an answer of one's own", answer?.get(0), token.to_owned())?;
            }
            Program::ReturnLate => {
                if self.dice.one_in(2) {
                    connection.batch_execute(&leave(&lane, token))?;
                }
                let due = Instant::now() + self.dice.between(0, 900);
                let _ = self.late.send((due, connection));
            }
            Program::Second => {
                if let Some(mut second) = self.check_out() {
                    ask(&mut second, &format!("{token}-second"))?;
                    ask(&mut connection, &format!("{token}-first"))?;
                    if self.dice.one_in(2) {
                        drop(connection);
                        ask(&mut second, &format!("{token}-last"))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn tried(&self, token: &str) {
        self.lane.tried.lock().insert(token.to_owned());
    }

    fn kept(&self, token: &str) {
        self.lane.kept.lock().insert(token.to_owned());
    }
}

fn ask(connection: &mut PooledConnection, token: &str) -> Used {
    let row = connection.query_one("SELECT $1::text", &[&token])?;
    expect("an answer of one's own", row.get(0), token.to_owned())
}

/// Begins a transaction that its user does not end.
fn leave(lane: &str, token: &str) -> String {
    format!(
        "BEGIN; INSERT INTO soak (lane, kind, token) VALUES ('{lane}', 'lost', '{token}'); \
         SET LOCAL soak.local = 'mine'; DECLARE soak_cursor CURSOR FOR SELECT generate_series(1, 9); \
         CREATE TEMP TABLE soak_gone (n int) ON COMMIT DROP; SELECT pg_try_advisory_xact_lock(pg_backend_pid(), 1)"
    )
}

/// Returns connections when their time has come, and at the end those that are left.
pub(crate) fn return_late(late: mpsc::Receiver<Late>, over: &AtomicBool) {
    let mut kept: Vec<Late> = Vec::new();
    while !over.load(SeqCst) {
        if let Ok(one) = late.recv_timeout(ms(5)) {
            kept.push(one);
        }
        let now = Instant::now();
        kept.retain(|(due, _)| *due > now);
    }
}
