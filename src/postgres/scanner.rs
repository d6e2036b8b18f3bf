//! Reads along with a PostgreSQL connection and knows whose turn it is.
//!
//! A [`Scanner`] is told every byte that went out and came in, cut into pieces of any size, and knows the transaction
//! status, the backend's pid and what is still unanswered. It looks at the headers of all messages and at the bodies of
//! four short kinds from the server; nothing the user sends is kept. It cannot fail: bytes that are not the protocol only
//! make it [poisoned](Scanner::is_poisoned). Until the login is over it also says what must not be passed on
//! ([`Scanner::intolerable`]), for until then it is anybody who speaks.
//!
//! Two facts of the protocol carry it. Answers come in the order of the requests, so a queue of requests tells which one
//! a message answers. And every request ends with one `ReadyForQuery`, so an empty queue means: nothing is under way.

use crate::leaf::text::CUT;
use std::collections::VecDeque;
use std::fmt;

#[cfg(test)]
mod tests;

/// The longest message before the login is over, in bytes. libpq takes 2,000 bytes of what a login needs and 30,000 of an
/// error; a notice of a trigger on login may be longer.
const LOGIN_MESSAGE: usize = 64 * 1024;
/// The most that a server may say before the login is over, in bytes: its parameters and notices are many, and short.
const LOGIN: usize = 1024 * 1024;
/// How much of an error is kept, in bytes.
const ERROR: usize = 1024;

/// Where the session stands, by the server's last word (`ReadyForQuery`).
///
/// After an error that word is often still under way when the caller already has its `Err`; while
/// [`Scanner::is_busy`] it may be one request old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The server has not spoken yet, or said something unheard of.
    Unknown,
    Idle,
    InTransaction,
    /// In a transaction that can only be rolled back.
    Failed,
}

/// What the server owes a `ReadyForQuery` for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    /// The startup packet, a simple query or a function call.
    Simple,
    /// A `Sync` that ends a batch of the extended protocol.
    Sync,
    /// A `Sync` that ends a batch which began with a `Bind`: of a statement that was prepared before.
    Bind,
    /// A `Sync` after nothing but `Close`: what `postgres` sends when a statement is dropped.
    Close,
}

/// Knows one connection by the bytes that pass; see the [module](self).
#[derive(Debug)]
pub(crate) struct Scanner {
    backend: Frames,
    frontend: Frames,
    /// Requests not yet answered, oldest first.
    pending: VecDeque<Request>,
    /// The messages of the frontend since its last `Sync` or query: none, only `Close`, a `Bind` first, or others.
    batch: Option<Request>,
    status: Status,
    pid: Option<i32>,
    /// From `CopyInResponse` to the next `ReadyForQuery`.
    copy_in: bool,
    poisoned: bool,
    /// The stream makes no sense any more and is no longer read.
    garbled: bool,
    /// The server's side ended, by its own close or by an error of the socket.
    ended: bool,
    fatal: Option<[u8; 5]>,
    /// The text that came with `fatal`, or its beginning.
    last_words: Option<String>,
    refused_write: bool,
    /// Of the request that is being answered: what it runs has parameters and a plan, and is about to run.
    bound: bool,
    refused_statement: bool,
    missed_statement: bool,
    /// From an error to the next `ReadyForQuery`.
    failing: bool,
    /// There was an error since it was last forgiven.
    erred: bool,
    in_hot_standby: Option<bool>,
    read_only_by_default: Option<bool>,
    /// How much the server may still say until the login is over; `None` once it is.
    login: Option<usize>,
    intolerable: Option<Intolerable>,
}

/// What a server says before the login is over that must not be believed, nor waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Intolerable {
    /// A message with this tag and of so many bytes.
    TooLong(u8, usize),
    /// Message after message.
    TooMuch,
    /// An error by the second version of the protocol, a text without a length. That is how a server speaks which cannot
    /// even start a process for a client.
    Plain(String),
    /// A transaction status with which no session begins.
    Status(u8),
}

impl fmt::Display for Intolerable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Intolerable::TooLong(tag, length) => {
                let tag = char::from(*tag).escape_default();
                write!(
                    f,
                    "a message ('{tag}') of {length} bytes before the login was over, where {LOGIN_MESSAGE} are the most"
                )
            }
            Intolerable::TooMuch => write!(f, "more than {LOGIN} bytes before the login was over"),
            Intolerable::Plain(text) => write!(f, "the server said, before the login was over: {}", text.trim_end()),
            Intolerable::Status(status) => {
                let status = char::from(*status).escape_default();
                write!(f, "the login ended in the transaction status '{status}', and no session begins like that")
            }
        }
    }
}

impl std::error::Error for Intolerable {}

/// How much of a message's body is worth keeping. Of an error, severity and SQLSTATE come first; the longest parameter
/// of interest is `default_transaction_read_only`.
fn worth(tag: u8) -> usize {
    match tag {
        b'Z' => 1,
        b'K' => 4,
        b'S' => 64,
        b'E' => ERROR,
        _ => 0,
    }
}

impl Scanner {
    pub(crate) fn new() -> Scanner {
        Scanner {
            backend: Frames::new(),
            frontend: Frames::untagged_first(),
            pending: VecDeque::new(),
            batch: None,
            status: Status::Unknown,
            pid: None,
            copy_in: false,
            poisoned: false,
            garbled: false,
            ended: false,
            fatal: None,
            last_words: None,
            refused_write: false,
            bound: false,
            refused_statement: false,
            missed_statement: false,
            failing: false,
            erred: false,
            in_hot_standby: None,
            read_only_by_default: None,
            login: Some(LOGIN),
            intolerable: None,
        }
    }

    /// These bytes went to the server. Only what the stream accepted may be told, or a retry is counted twice.
    pub(crate) fn sent(&mut self, mut bytes: &[u8]) {
        while !self.garbled {
            match self.frontend.next(&mut bytes, |_| 0, usize::MAX) {
                Ok(Some(tag)) => self.said(tag),
                Ok(None) => return,
                Err(Garbled) => self.garble(),
            }
        }
    }

    /// These bytes came from the server.
    pub(crate) fn received(&mut self, mut bytes: &[u8]) {
        while !self.garbled {
            match self.backend.next(&mut bytes, worth, self.login.map_or(usize::MAX, |left| left.min(LOGIN_MESSAGE))) {
                Ok(Some(tag)) => self.heard(tag),
                Ok(None) => return,
                Err(Garbled) => {
                    if let Some(left) = self.login {
                        self.intolerable = self.verdict(left, bytes);
                    }
                    self.garble();
                }
            }
        }
    }

    /// What is wrong with the message whose header has just come, before the login is over; `rest` came behind it.
    fn verdict(&self, left: usize, rest: &[u8]) -> Option<Intolerable> {
        let [tag, length @ ..] = self.backend.header;
        if tag == b'E' && left == LOGIN && !length.iter().any(u8::is_ascii_control) {
            // As libpq tells them apart: no error is as long as a text is when its first letters are read as a length.
            let text =
                length.iter().chain(rest).take(ERROR).take_while(|&&byte| byte != 0).copied().collect::<Vec<_>>();
            return Some(Intolerable::Plain(String::from_utf8_lossy(&text).into_owned()));
        }
        match u32::from_be_bytes(length) as usize {
            // Of that `postgres` makes an error of its own.
            ..4 => None,
            length if length - 4 <= LOGIN_MESSAGE => Some(Intolerable::TooMuch),
            length => Some(Intolerable::TooLong(tag, length)),
        }
    }

    /// The stream ended or failed.
    pub(crate) fn ended(&mut self) {
        self.ended = true;
    }

    fn said(&mut self, tag: u8) {
        match tag {
            STARTUP | b'Q' | b'F' => {
                self.pending.push_back(Request::Simple);
                self.batch = None;
            }
            b'S' => self.pending.push_back(self.batch.take().unwrap_or(Request::Sync)),
            b'C' if self.batch.is_none() => self.batch = Some(Request::Close),
            b'C' => {}
            b'B' if matches!(self.batch, None | Some(Request::Close)) => self.batch = Some(Request::Bind),
            // Poison, rule 1. `postgres` queues the end of a COPY even when the server refused the COPY. The server skips
            // it but answers the `Sync` that follows, and from then on every call gets the answer to the one before it
            // (rust-postgres #789).
            b'd' | b'c' | b'f' => self.poisoned |= !self.copy_in,
            _ if self.batch == Some(Request::Bind) => {}
            _ => self.batch = Some(Request::Sync),
        }
    }

    fn heard(&mut self, tag: u8) {
        let body = &*self.backend.kept;
        if let Some(left) = &mut self.login {
            *left = left.saturating_sub(self.backend.length());
        }
        match tag {
            b'Z' => {
                self.status = match body {
                    b"I" => Status::Idle,
                    b"T" => Status::InTransaction,
                    b"E" => Status::Failed,
                    _ => Status::Unknown,
                };
                if self.login.take().is_some() && self.status != Status::Idle {
                    self.intolerable = Some(Intolerable::Status(body.first().copied().unwrap_or(0)));
                }
                self.copy_in = false;
                self.bound = false;
                self.failing = false;
                // Poison, rule 2: an answer that nobody asked for.
                self.poisoned |= self.pending.pop_front().is_none();
            }
            b'2' => self.bound = true,
            b'K' => self.pid = body.try_into().ok().map(i32::from_be_bytes),
            b'G' => {
                self.copy_in = true;
                // In the extended protocol the batch's own `Sync` is already on its way; in COPY the server ignores it.
                if matches!(self.pending.front(), Some(Request::Sync | Request::Bind)) {
                    self.pending.pop_front();
                }
            }
            b'E' => {
                self.failing = true;
                self.erred = true;
                // Poison, rule 3: whether that `Sync` was ignored now depends on when the COPY failed.
                self.poisoned |= self.copy_in;
                let code = field(body, b'C').and_then(|code| code.try_into().ok());
                self.refused_write |= code == Some(*b"25006");
                if !self.bound && self.pending.front() == Some(&Request::Bind) {
                    self.refused_statement |= matches!(code.as_ref(), Some(b"26000" | b"0A000"));
                    self.missed_statement |= code == Some(*b"26000");
                }
                // `S` may be translated; `V` is not, but PgBouncer and servers before 9.6 have only `S`.
                if let Some(b"FATAL" | b"PANIC") = field(body, b'V').or_else(|| field(body, b'S')) {
                    self.fatal = code;
                    self.last_words = field(body, b'M').map(|text| {
                        let is_cut = body.len() == ERROR && body.ends_with(text);
                        let (kept, end) =
                            if is_cut { (text.len().saturating_sub(CUT.len()), CUT) } else { (text.len(), "") };
                        String::from_utf8_lossy(&text[..kept]).into_owned() + end
                    });
                }
            }
            b'S' => {
                let mut words = body.split(|&byte| byte == 0);
                let known = match words.next() {
                    Some(b"in_hot_standby") => &mut self.in_hot_standby,
                    Some(b"default_transaction_read_only") => &mut self.read_only_by_default,
                    _ => return,
                };
                *known = words.next().map(|value| value == b"on");
            }
            _ => {}
        }
    }

    fn garble(&mut self) {
        self.garbled = true;
        self.poisoned = true;
    }

    /// As of the last `ReadyForQuery`.
    pub(crate) fn status(&self) -> Status {
        self.status
    }

    /// What the server, or a pooler in its place, calls this backend: a name for logs. PgBouncer's are its own and may be negative.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Requests that the server has not finished answering.
    pub(crate) fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// The server waits for the user's rows, or for the end of them.
    pub(crate) fn in_copy(&self) -> bool {
        self.copy_in
    }

    /// Requests and answers no longer match, or soon will not: the next call may get another call's answer.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Something is under way that may still change the status: [something was asked](Scanner::is_asked), or half a message
    /// has come.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_asked() || self.is_half_told()
    }

    /// The beginning of a message has come, and its end has not.
    pub(crate) fn is_half_told(&self) -> bool {
        self.backend.is_inside()
    }

    /// A request is half sent or not yet answered to its end, or there is a COPY. Not so the closing of a dropped statement,
    /// which cannot fail.
    pub(crate) fn is_asked(&self) -> bool {
        self.copy_in || self.frontend.is_inside() || self.pending.iter().any(|&request| request != Request::Close)
    }

    /// The oldest request has failed, and its `ReadyForQuery` has not come.
    pub(crate) fn is_failing(&self) -> bool {
        self.failing
    }

    /// A request has failed since the last [`forgive`](Scanner::forgive).
    pub(crate) fn has_erred(&self) -> bool {
        self.erred
    }

    /// Whatever has failed until now left nothing behind.
    pub(crate) fn forgive(&mut self) {
        self.erred = false;
    }

    /// Nothing more can come of it: poisoned, hung up or told so by the server.
    pub(crate) fn is_lost(&self) -> bool {
        self.poisoned || self.ended || self.fatal.is_some()
    }

    /// What came must not be passed on, nor anything after it.
    pub(crate) fn intolerable(&self) -> Option<&Intolerable> {
        self.intolerable.as_ref()
    }

    /// [`take_refused_write`](Scanner::take_refused_write) has something to tell.
    pub(crate) fn has_refused_write(&self) -> bool {
        self.refused_write
    }

    /// The SQLSTATE with which the server ended the connection.
    pub(crate) fn fatal(&self) -> Option<[u8; 5]> {
        self.fatal
    }

    /// What it said when it did.
    pub(crate) fn last_words(&self) -> Option<&str> {
        self.last_words.as_deref()
    }

    /// A statement failed with 25006 since the last call: the node is read-only, or the transaction was.
    pub(crate) fn take_refused_write(&mut self) -> bool {
        std::mem::take(&mut self.refused_write)
    }

    /// A prepared statement was refused before it ran, since the last call: it is missing (26000), or its result has
    /// changed (0A000).
    pub(crate) fn take_refused_statement(&mut self) -> bool {
        std::mem::take(&mut self.refused_statement)
    }

    /// A prepared statement was asked for that the server does not have, at any time. Whatever removed it may have removed
    /// those of the `postgres` crate as well, which it does not notice.
    pub(crate) fn has_missed_a_statement(&self) -> bool {
        self.missed_statement
    }

    /// Whether the server is a standby; reported since PostgreSQL 14.
    pub(crate) fn in_hot_standby(&self) -> Option<bool> {
        self.in_hot_standby
    }

    /// The session's `default_transaction_read_only`; reported since PostgreSQL 14.
    pub(crate) fn read_only_by_default(&self) -> Option<bool> {
        self.read_only_by_default
    }
}

/// The field of an error message that begins with `key`.
fn field(body: &[u8], key: u8) -> Option<&[u8]> {
    body.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(&[key]))
}

/// Stands for the tag that the first message of a frontend does not have.
const STARTUP: u8 = 0;

/// A length that cannot be.
#[derive(Debug)]
struct Garbled;

/// Cuts one direction into messages: a tag, a length that counts itself, a body.
#[derive(Debug)]
struct Frames {
    header: [u8; 5],
    /// How much of the header is there.
    got: usize,
    /// How much of the body is still to come, once the header is there.
    left: usize,
    /// The beginning of the body.
    kept: Vec<u8>,
}

impl Frames {
    fn new() -> Frames {
        Frames { header: [0; 5], got: 0, left: 0, kept: Vec::new() }
    }

    /// The frontend's direction, whose first message has no tag: as if a [`STARTUP`] had been seen.
    fn untagged_first() -> Frames {
        Frames { header: [STARTUP; 5], got: 1, ..Frames::new() }
    }

    /// Takes bytes up to the end of a message, and returns its tag if the end was among them. No body may have more than
    /// `most` bytes.
    fn next(&mut self, bytes: &mut &[u8], worth: impl Fn(u8) -> usize, most: usize) -> Result<Option<u8>, Garbled> {
        if self.got < 5 {
            let piece = split_off(bytes, 5 - self.got);
            self.header[self.got..][..piece.len()].copy_from_slice(piece);
            self.got += piece.len();
            if self.got < 5 {
                return Ok(None);
            }
            let [_, length @ ..] = self.header;
            // Signed, as `postgres` reads it.
            let body = i32::from_be_bytes(length).checked_sub(4).and_then(|body| usize::try_from(body).ok());
            self.left = body.filter(|&body| body <= most).ok_or(Garbled)?;
            self.kept.clear();
        }
        let tag = self.header[0];
        let piece = split_off(bytes, self.left);
        self.left -= piece.len();
        let room = worth(tag).saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&piece[..piece.len().min(room)]);
        if self.left > 0 {
            return Ok(None);
        }
        self.got = 0;
        Ok(Some(tag))
    }

    /// How long the last message was, its header included.
    fn length(&self) -> usize {
        let [_, length @ ..] = self.header;
        u32::from_be_bytes(length) as usize + 1
    }

    /// Between the first and the last byte of a message.
    fn is_inside(&self) -> bool {
        self.got > 0
    }
}

/// Takes up to `at_most` bytes off the front.
fn split_off<'a>(bytes: &mut &'a [u8], at_most: usize) -> &'a [u8] {
    let (piece, rest) = bytes.split_at(at_most.min(bytes.len()));
    *bytes = rest;
    piece
}
