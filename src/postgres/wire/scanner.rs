//! [`Scanner`]: follows the messages of one connection, and knows what the server still has to answer.
//!
//! A scanner is given every byte that went out and came in, in pieces of any size. It looks at the headers of all
//! messages and at the bodies of four short kinds from the server; it keeps nothing that the user sends. It cannot
//! fail: bytes that are not the protocol only make it *poisoned*. Until the login is over anybody
//! may be at the other end, so until then it also says which messages must not be passed on ([`Scanner::fault`]). So it
//! does while the pool itself asks.
//!
//! It relies on two facts of the protocol. Answers come in the order of the requests, so a queue of requests shows
//! which request a message answers. And every request ends with one `ReadyForQuery`, so an empty queue means that
//! nothing is under way.

use super::frames::{BadLength, Frames, STARTUP};
use crate::leaf::text::CUT;
use std::collections::VecDeque;
use std::fmt;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

/// The longest message before the login is over, in bytes. libpq takes 2,000 bytes of what a login needs and 30,000 of
/// an error; a notice of a trigger on login may be longer.
const LONGEST_LOGIN_MESSAGE: usize = 64 * 1024;
/// The most that a server may send before the login is over, in bytes: its parameters and notices are many, and short.
const LONGEST_LOGIN: usize = 1024 * 1024;
/// The most that a server may send before it has answered a question of the pool's, in bytes. The answer is short. But
/// once a caller has asked for them, before it come the notifications that nobody has read: of an idle connection as many
/// as the sockets of both sides hold, which is up to 10 MB (`tcp_rmem`, `tcp_wmem` of Linux as they come).
const LONGEST_ANSWER: usize = 16 * 1024 * 1024;
/// The same, as long as nobody but the pool has asked for anything.
const LONGEST_FIRST_ANSWER: usize = LONGEST_LOGIN;
/// How much of an error is kept, in bytes. Its severity and SQLSTATE come first.
const ERROR_PREFIX: usize = 1024;

/// Where the session stands, by the server's last `ReadyForQuery`.
///
/// After an error that message is often still under way when the caller already has its `Err`; while
/// [`Scanner::is_busy`] the status may be one request old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::postgres) enum Status {
    /// The server has sent no `ReadyForQuery` yet, or one with a status that the protocol does not have.
    Unknown,
    Idle,
    InTransaction,
    /// In a transaction that can only be rolled back.
    Failed,
}

/// How long the message is with which a server tells the pid and the secret of a backend, its header included.
const KEY_DATA: usize = 13;

/// The pid of a backend, and the secret that makes a request to cancel its query valid. It is never shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(#[cfg_attr(not(unix), allow(dead_code))] [u8; 8]);

#[cfg(unix)]
impl Key {
    /// The request to cancel what the backend is doing.
    pub(super) fn cancel_request(self) -> [u8; 16] {
        let mut request = [0, 0, 0, 16, 0x04, 0xd2, 0x16, 0x2e, 0, 0, 0, 0, 0, 0, 0, 0];
        request[8..].copy_from_slice(&self.0);
        request
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// A request that the server has not answered to its end, by what it still awaits before its `ReadyForQuery`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    /// The startup packet, a simple query or a function call, which awaits its answer.
    Simple,
    /// A batch of the extended protocol, which awaits its answer.
    Batch,
    /// A batch that began with a `Bind`, of a statement that was prepared before, and awaits its `BindComplete`. Until
    /// that comes nothing of the statement has run; from then on it is a [`Batch`](Request::Batch) like any other.
    Bind,
    /// A batch of nothing but `Close`, which is what `postgres` sends when a statement is dropped. Nobody waits for it.
    Close,
    /// A request that has failed, and awaits nothing else.
    Failed,
    /// A batch of nothing but `Close` that has failed.
    FailedClose,
}

impl Request {
    /// The same request, once it has failed.
    fn failed(self) -> Request {
        match self {
            Request::Close | Request::FailedClose => Request::FailedClose,
            Request::Simple | Request::Batch | Request::Bind | Request::Failed => Request::Failed,
        }
    }
}

/// What the server has answered to a request whose last byte has not been sent: a write may end inside a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Early {
    Nothing,
    /// `BindComplete`.
    Bound,
    /// An error.
    Failed,
}

/// What the frontend has sent since its last query or `Sync`. The next `Sync` makes a request of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batch {
    Empty,
    /// Only `Close`.
    Closes,
    /// A `Bind`, perhaps after some `Close`, and any messages after it.
    BindFirst,
    Other,
}

/// What is known of one connection by its bytes; see the [module](self).
#[derive(Debug)]
#[cfg_attr(test, derive(PartialEq))]
pub(super) struct Scanner {
    backend: Frames,
    frontend: Frames,
    /// The requests that are not answered to their end, the oldest first.
    pending: VecDeque<Request>,
    /// What was answered while nothing was pending. It belongs to the next request.
    early: Early,
    batch: Batch,
    status: Status,
    pid: Option<i32>,
    /// With which a request to cancel proves who it is from; `None` if it has another length than that of version 3.0
    /// of the protocol, which `postgres` speaks.
    #[cfg_attr(not(unix), allow(dead_code))]
    key: Option<Key>,
    /// From `CopyInResponse` to the `CommandComplete` of the COPY, or the next `ReadyForQuery`.
    copy_in: bool,
    poisoned: bool,
    /// A message had a length that cannot be. So it is not known where the next one begins, and nothing is read any
    /// more.
    unreadable: bool,
    /// The server's side ended, by its own close or by an error of the socket.
    ended: bool,
    /// The SQLSTATE of the error by which the server ended the connection.
    fatal: Option<[u8; 5]>,
    /// The text that came with `fatal`, or its beginning.
    fatal_text: Option<String>,
    refused_write: bool,
    refused_statement: bool,
    missed_statement: bool,
    /// A request has failed since the failures were last forgotten.
    failed_request: bool,
    in_hot_standby: Option<bool>,
    read_only_by_default: Option<bool>,
    reader: Reader,
    /// A caller has asked for something, such as notifications.
    was_used: bool,
    fault: Option<Fault>,
}

/// For whom the server sends, and how many bytes it still may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    /// For the login, which ends with the first `ReadyForQuery`.
    Login { left: usize },
    /// For a question of the pool's, a simple query. `answers`: with so many more answers it is answered, the last of
    /// which is its own; `None`: it was not sent yet.
    Question { left: usize, answers: Option<usize> },
    /// For a caller, who may ask for anything.
    Caller,
}

/// What is wrong with a message that must not be passed on. But for the last one, it came before the login was over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The message has this tag and so many bytes, which are too many.
    TooLong(u8, usize),
    /// All messages together have too many bytes.
    TooMuch,
    /// An error by the second version of the protocol: a text without a length. A server that cannot even start a
    /// process for a client speaks like that.
    PlainText(String),
    /// A transaction status with which no session begins.
    Status(u8),
    /// The answer to a question of the pool's has more than so many bytes.
    LongAnswer(usize),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::TooLong(tag, length) => {
                let tag = char::from(*tag).escape_default();
                write!(
                    f,
                    "a message ('{tag}') of {length} bytes before the login was over, where {LONGEST_LOGIN_MESSAGE} are \
                     the most"
                )
            }
            Fault::TooMuch => write!(f, "more than {LONGEST_LOGIN} bytes before the login was over"),
            Fault::PlainText(text) => {
                write!(f, "the server said, before the login was over: {}", text.trim_end())
            }
            Fault::Status(status) => {
                let status = char::from(*status).escape_default();
                write!(f, "the login ended in the transaction status '{status}', and no session begins like that")
            }
            Fault::LongAnswer(most) => write!(f, "more than {most} bytes in answer to a question of the pool's"),
        }
    }
}

impl std::error::Error for Fault {}

/// How many bytes of a message's body are kept until its end has come. Of a parameter (`S`) 64 are enough: the longest
/// of interest is `default_transaction_read_only`. Of a `ReadyForQuery` (`Z`), one more byte than it has.
fn body_prefix(tag: u8) -> usize {
    match tag {
        b'Z' => 2,
        b'K' => 8,
        b'S' => 64,
        b'E' => ERROR_PREFIX,
        _ => 0,
    }
}

impl Scanner {
    pub(super) fn new() -> Scanner {
        Scanner {
            backend: Frames::new(),
            frontend: Frames::untagged_first(),
            pending: VecDeque::new(),
            early: Early::Nothing,
            batch: Batch::Empty,
            status: Status::Unknown,
            pid: None,
            key: None,
            copy_in: false,
            poisoned: false,
            unreadable: false,
            ended: false,
            fatal: None,
            fatal_text: None,
            refused_write: false,
            refused_statement: false,
            missed_statement: false,
            failed_request: false,
            in_hot_standby: None,
            read_only_by_default: None,
            reader: Reader::Login { left: LONGEST_LOGIN },
            was_used: false,
            fault: None,
        }
    }

    /// These bytes went to the server. Only the bytes that the stream accepted may be given, or a retry counts twice.
    pub(super) fn sent(&mut self, mut bytes: &[u8]) {
        while !self.unreadable && !bytes.is_empty() {
            match self.frontend.next(&mut bytes, |_| 0, usize::MAX) {
                Ok(Some(tag)) => self.on_frontend(tag),
                Ok(None) => return,
                Err(BadLength) => self.stop_reading(),
            }
        }
    }

    /// These bytes came from the server.
    pub(super) fn received(&mut self, mut bytes: &[u8]) {
        while !self.unreadable && !bytes.is_empty() {
            let longest = match self.reader {
                Reader::Login { left } => left.min(LONGEST_LOGIN_MESSAGE),
                Reader::Question { left, .. } => left,
                Reader::Caller => usize::MAX,
            };
            match self.backend.next(&mut bytes, body_prefix, longest) {
                Ok(Some(tag)) => self.on_backend(tag),
                Ok(None) => return,
                Err(BadLength) => {
                    self.fault = self.fault_of_length(bytes);
                    self.stop_reading();
                }
            }
        }
    }

    /// What is wrong with the length of the message whose header has just come. `rest` came behind it.
    fn fault_of_length(&self, rest: &[u8]) -> Option<Fault> {
        let (tag, length) = self.backend.header();
        let is_first = self.reader == Reader::Login { left: LONGEST_LOGIN };
        if tag == b'E' && is_first && !length.iter().any(u8::is_ascii_control) {
            // As in libpq: if the first letters of a text are read as a length, it is longer than any error.
            let text = length.iter().chain(rest).take(ERROR_PREFIX).take_while(|&&byte| byte != 0);
            let text = text.copied().collect::<Vec<_>>();
            return Some(Fault::PlainText(String::from_utf8_lossy(&text).into_owned()));
        }
        match (self.reader, u32::from_be_bytes(length) as usize) {
            // `postgres` itself refuses such a length.
            (_, ..4) | (Reader::Caller, _) => None,
            (Reader::Question { .. }, _) => Some(Fault::LongAnswer(self.longest_answer())),
            (Reader::Login { .. }, length) if length - 4 <= LONGEST_LOGIN_MESSAGE => Some(Fault::TooMuch),
            (Reader::Login { .. }, length) => Some(Fault::TooLong(tag, length)),
        }
    }

    /// The next simple query is a question of the pool's. `postgres` keeps notifications and parameters, and would keep
    /// any number of them; so until the answer has come, no more may come than [`LONGEST_ANSWER`].
    pub(super) fn expect_little(&mut self) {
        let left = self.longest_answer();
        self.reader = Reader::Question { left, answers: None };
        // The length of a message that has begun was looked at while nobody asked.
        if self.backend.body_left() > left {
            self.fault = Some(Fault::LongAnswer(left));
            self.stop_reading();
        }
    }

    fn longest_answer(&self) -> usize {
        if self.was_used { LONGEST_ANSWER } else { LONGEST_FIRST_ANSWER }
    }

    /// The stream ended or failed.
    pub(super) fn ended(&mut self) {
        self.ended = true;
    }

    /// The frontend has sent a message to its end.
    fn on_frontend(&mut self, tag: u8) {
        self.was_used |= self.reader == Reader::Caller;
        match tag {
            STARTUP | b'Q' | b'F' => {
                self.push(Request::Simple);
                self.batch = Batch::Empty;
                if let Reader::Question { answers: answers @ None, .. } = &mut self.reader {
                    *answers = Some(self.pending.len());
                }
            }
            b'S' => {
                self.push(match self.batch {
                    Batch::Closes => Request::Close,
                    Batch::BindFirst => Request::Bind,
                    Batch::Empty | Batch::Other => Request::Batch,
                });
                self.batch = Batch::Empty;
            }
            b'C' if self.batch == Batch::Empty => self.batch = Batch::Closes,
            b'C' => {}
            b'B' if matches!(self.batch, Batch::Empty | Batch::Closes) => self.batch = Batch::BindFirst,
            // Poison, rule 1. `postgres` queues the end of a COPY even when the server refused the COPY. The server
            // skips it but answers the `Sync` that follows, and from then on every call gets the answer to the one
            // before it (rust-postgres #789).
            b'd' | b'c' | b'f' => self.poisoned |= !self.copy_in,
            // A password, which belongs to the login; and the end of the connection, which nobody answers.
            b'p' | b'X' => {}
            _ if self.batch == Batch::BindFirst => {}
            _ => self.batch = Batch::Other,
        }
    }

    /// The frontend has sent a request to its end.
    fn push(&mut self, request: Request) {
        let early = std::mem::replace(&mut self.early, Early::Nothing);
        self.pending.push_back(match (early, request) {
            (Early::Nothing, request) => request,
            (Early::Bound, Request::Bind) => Request::Batch,
            (Early::Bound, request) => request,
            (Early::Failed, request) => request.failed(),
        });
    }

    /// The backend's message has come to its end.
    fn on_backend(&mut self, tag: u8) {
        let unasked = !self.has_asked();
        let body = self.backend.prefix();
        if let Reader::Login { left } | Reader::Question { left, .. } = &mut self.reader {
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
                match &mut self.reader {
                    Reader::Login { .. } => {
                        if self.status != Status::Idle {
                            self.fault = Some(Fault::Status(body.first().copied().unwrap_or(0)));
                        }
                        self.reader = Reader::Caller;
                    }
                    // What was sent behind the question, such as the end of a dropped statement, is not waited for: the
                    // next answer may be a caller's.
                    Reader::Question { answers: Some(1), .. } => self.reader = Reader::Caller,
                    Reader::Question { answers: Some(more), .. } => *more -= 1,
                    Reader::Question { answers: None, .. } | Reader::Caller => {}
                }
                self.copy_in = false;
                self.early = Early::Nothing;
                // Poison, rule 2: an answer to no request.
                self.poisoned |= self.pending.pop_front().is_none();
            }
            b'2' => match self.pending.front_mut() {
                Some(oldest @ Request::Bind) => *oldest = Request::Batch,
                Some(_) => {}
                None if self.early == Early::Nothing => self.early = Early::Bound,
                None => {}
            },
            b'K' => {
                self.pid = body.first_chunk().copied().map(i32::from_be_bytes);
                let is_whole = self.backend.length() == KEY_DATA;
                self.key = body.try_into().ok().filter(|_| is_whole).map(Key);
            }
            b'G' => {
                // After an error the server skips to the `Sync`. If it does not, nobody knows which `Sync` it ignores.
                self.poisoned |= self.has_oldest_failed();
                self.copy_in = true;
                // In the extended protocol the batch's own `Sync` is already on its way; in COPY the server ignores it.
                if matches!(self.pending.front(), Some(Request::Batch | Request::Bind)) {
                    self.pending.pop_front();
                }
            }
            // The COPY has taken all rows, and is over. What is still to come is the answer to the `Sync` behind it, which
            // may not be sent yet.
            b'C' if self.copy_in => {
                self.copy_in = false;
                if self.pending.is_empty() {
                    self.batch = Batch::Other;
                }
            }
            b'E' => {
                self.failed_request = true;
                // Poison, rule 3: whether that `Sync` was ignored now depends on when the COPY failed.
                self.poisoned |= self.copy_in;
                let code = field(body, b'C').and_then(|code| code.try_into().ok());
                self.refused_write |= code == Some(*b"25006");
                match self.pending.front_mut() {
                    Some(oldest) => {
                        if *oldest == Request::Bind {
                            self.refused_statement |= matches!(code.as_ref(), Some(b"26000" | b"0A000"));
                            self.missed_statement |= code == Some(*b"26000");
                        }
                        *oldest = oldest.failed();
                    }
                    None => self.early = Early::Failed,
                }
                // `S` may be translated; `V` is not, but PgBouncer and servers before 9.6 have only `S`.
                // (A field that the end of the prefix cuts off is not read.)
                let whole = body.iter().rposition(|&byte| byte == 0).map_or(&[][..], |end| &body[..end]);
                let severity = field(whole, b'V').or_else(|| field(whole, b'S'));
                // Every error says how bad it is, first of all, and which it is. What does not may be the worst.
                let is_fatal = matches!(severity, None | Some(b"FATAL" | b"PANIC"));
                if is_fatal && code.is_none() {
                    self.ended = true;
                } else if is_fatal {
                    self.fatal = code;
                    self.fatal_text = field(body, b'M').map(|text| {
                        let is_cut = body.len() == ERROR_PREFIX && body.ends_with(text);
                        let (kept, end) =
                            if is_cut { (text.len().saturating_sub(CUT.len()), CUT) } else { (text.len(), "") };
                        String::from_utf8_lossy(&text[..kept]).into_owned() + end
                    });
                } else {
                    self.poisoned |= unasked;
                }
            }
            b'S' => {
                let mut words = body.split(|&byte| byte == 0);
                let parameter = match words.next() {
                    Some(b"in_hot_standby") => &mut self.in_hot_standby,
                    Some(b"default_transaction_read_only") => &mut self.read_only_by_default,
                    _ => return,
                };
                *parameter = words.next().map(|value| value == b"on");
            }
            _ => {}
        }
        // Poison, rule 5: the beginning of an answer to no request. These three come unasked; an error may do so if it
        // ends the connection.
        self.poisoned |= unasked && !matches!(tag, b'N' | b'A' | b'S' | b'E');
    }

    fn stop_reading(&mut self) {
        self.unreadable = true;
        // Poison, rule 4: bytes that are not the protocol.
        self.poisoned = true;
    }

    /// The status as of the last `ReadyForQuery`.
    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// The pid by which the server, or a pooler in its place, calls this backend. PgBouncer's numbers are its own and
    /// may be negative.
    pub(super) fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// The key of this backend, for a request to cancel.
    #[cfg(unix)]
    pub(super) fn key(&self) -> Option<Key> {
        self.key
    }

    /// How many requests the server has not finished answering.
    #[cfg(test)]
    pub(super) fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// The server waits for the user's rows, or for the end of them.
    pub(super) fn in_copy(&self) -> bool {
        self.copy_in
    }

    /// Requests and answers no longer match, or soon will not: the next call may get another call's answer.
    #[cfg(test)]
    pub(super) fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// Something is under way that may still change the status: a request is [unanswered](Scanner::has_unanswered), or
    /// the beginning of a message has come.
    pub(super) fn is_busy(&self) -> bool {
        self.has_unanswered() || self.is_mid_message()
    }

    /// The beginning of a message from the server has come, and its end has not.
    pub(super) fn is_mid_message(&self) -> bool {
        self.backend.is_inside()
    }

    /// A request is half sent or not yet answered to its end, or there is a COPY. The `Close` of a dropped statement
    /// does not count, since it cannot fail.
    pub(super) fn has_unanswered(&self) -> bool {
        let counts = |request: &Request| !matches!(request, Request::Close | Request::FailedClose);
        let begun = self.frontend.is_inside() || matches!(self.batch, Batch::BindFirst | Batch::Other);
        self.copy_in || begun || self.pending.iter().any(counts)
    }

    /// The server may have something to answer.
    fn has_asked(&self) -> bool {
        self.copy_in || self.frontend.is_inside() || self.batch != Batch::Empty || !self.pending.is_empty()
    }

    /// The oldest request has failed, perhaps before its end was sent, and its `ReadyForQuery` has not come.
    pub(super) fn has_oldest_failed(&self) -> bool {
        match self.pending.front() {
            Some(oldest) => matches!(oldest, Request::Failed | Request::FailedClose),
            None => self.early == Early::Failed,
        }
    }

    /// A request has failed since the failures were last [forgotten](Scanner::forget_failures).
    pub(super) fn has_failed_request(&self) -> bool {
        self.failed_request
    }

    /// The requests that have failed until now left nothing behind.
    pub(super) fn forget_failures(&mut self) {
        self.failed_request = false;
    }

    /// The connection is of no use any more: it is poisoned, or the server has hung up, or sent an error with which it
    /// does.
    pub(super) fn is_lost(&self) -> bool {
        self.poisoned || self.ended || self.fatal.is_some()
    }

    /// Nothing is under way, no transaction is open, and the connection is not lost.
    pub(super) fn is_idle(&self) -> bool {
        self.status == Status::Idle && !self.is_busy() && !self.is_lost()
    }

    /// [Idle](Scanner::is_idle), without a refused write or a missing statement: as a connection is after most uses.
    pub(super) fn is_clean(&self) -> bool {
        self.is_idle() && !self.refused_write && !self.missed_statement
    }

    /// The message that came must not be passed on, nor anything after it.
    pub(super) fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// The SQLSTATE with which the server ended the connection.
    pub(super) fn fatal(&self) -> Option<[u8; 5]> {
        self.fatal
    }

    /// The text with which the server ended the connection.
    pub(super) fn fatal_text(&self) -> Option<&str> {
        self.fatal_text.as_deref()
    }

    /// A statement failed with 25006 since the last call: the node is read-only, or the transaction was.
    pub(super) fn take_refused_write(&mut self) -> bool {
        std::mem::take(&mut self.refused_write)
    }

    /// A prepared statement was refused before it ran, since the last call: it is missing (26000), or its result has
    /// changed (0A000).
    pub(super) fn take_refused_statement(&mut self) -> bool {
        std::mem::take(&mut self.refused_statement)
    }

    /// At any time a prepared statement was asked for that the server did not have. Whatever removed it may have
    /// removed the statements of the `postgres` crate as well, which does not notice.
    pub(super) fn has_missed_a_statement(&self) -> bool {
        self.missed_statement
    }

    /// Whether the server is a standby; reported since PostgreSQL 14.
    pub(super) fn in_hot_standby(&self) -> Option<bool> {
        self.in_hot_standby
    }

    /// The session's `default_transaction_read_only`; reported since PostgreSQL 14.
    pub(super) fn read_only_by_default(&self) -> Option<bool> {
        self.read_only_by_default
    }
}

/// The field of an error message that begins with `key`.
fn field(body: &[u8], key: u8) -> Option<&[u8]> {
    body.split(|&byte| byte == 0).find_map(|field| field.strip_prefix(&[key]))
}
