//! As much of HTTP/1.1 as this server needs: one request on each connection, with bounds to its size and its time.
//!
//! What is not understood is refused, above all a length that is not one plain number: two servers that count
//! differently where a request ends are what request smuggling is made of.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long a client may take for the head of its request. (A browser opens connections that it may never use.)
const HEAD_TIME: Duration = Duration::from_secs(2);

/// How long a client may take for the rest of its request, and then to take the answer.
const BODY_TIME: Duration = Duration::from_secs(5);

/// The longest head, in bytes, and the most header lines.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// Takes requests, one for each thread that asks for the [`next`](Listener::next).
pub(crate) struct Listener {
    socket: TcpListener,
    stopping: AtomicBool,
}

impl Listener {
    /// Listens on the loopback interface only.
    pub(crate) fn bind(port: u16) -> io::Result<Listener> {
        Ok(Listener { socket: TcpListener::bind((Ipv4Addr::LOCALHOST, port))?, stopping: AtomicBool::new(false) })
    }

    pub(crate) fn addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits for a request. `None`: it is time to end.
    pub(crate) fn next(&self) -> Option<Request> {
        while !self.stopping.load(Ordering::SeqCst) {
            match self.socket.accept() {
                Ok((stream, _)) => match Request::read(stream) {
                    Ok(Some(request)) => return Some(request),
                    Ok(None) => {}
                    Err(e) => log::debug!("no request: {e}"),
                },
                // The client has gone before it was served, or this process has too many files open. Neither is a
                // reason to stop, and the second must not turn into a busy loop.
                Err(e) => {
                    log::warn!("a client cannot be accepted: {e}");
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
        None
    }

    /// Has the threads leave that wait for a request, at most as many as `threads`.
    pub(crate) fn stop(&self, threads: usize) {
        self.stopping.store(true, Ordering::SeqCst);
        // Nothing but a client ends an `accept`. Where none gets through, enough clients are there already.
        let Ok(addr) = self.addr() else { return };
        for _ in 0..threads {
            let _ = TcpStream::connect_timeout(&addr, Duration::from_millis(100));
        }
    }
}

/// A request whose head has been read.
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) query: String,
    headers: Vec<(String, String)>,
    /// How long the body is.
    length: usize,
    /// What of the body has come with the head.
    begun: Vec<u8>,
    stream: TcpStream,
}

impl Request {
    /// `None`: the client said nothing, or nothing that can be served, and has its answer.
    fn read(mut stream: TcpStream) -> io::Result<Option<Request>> {
        // Some systems have an accepted socket inherit what the listener is.
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(BODY_TIME))?;
        let deadline = Instant::now() + HEAD_TIME;
        let mut bytes = Vec::new();
        loop {
            if read_some(&mut stream, &mut bytes, MAX_HEAD, deadline)? == 0 {
                return Ok(None);
            }
            match Head::parse(&bytes) {
                Ok(Some((head, end))) => {
                    let Head { method, path, query, headers, length } = head;
                    let begun = bytes.split_off(end);
                    return Ok(Some(Request { method, path, query, headers, length, begun, stream }));
                }
                Ok(None) if bytes.len() < MAX_HEAD => {}
                Ok(None) => return Reply::text(431, "too long a head").send(stream).map(|()| None),
                Err(refusal) => return refusal.send(stream).map(|()| None),
            }
        }
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Reads the body, to its end. `Ok(None)`: it is longer than `limit`, and was not read.
    pub(crate) fn body(&mut self, limit: usize) -> io::Result<Option<Vec<u8>>> {
        if self.length > limit {
            return Ok(None);
        }
        let deadline = Instant::now() + BODY_TIME;
        let mut body = std::mem::take(&mut self.begun);
        if body.is_empty() && self.header("Expect").is_some_and(|what| what.eq_ignore_ascii_case("100-continue")) {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        while body.len() < self.length {
            if read_some(&mut self.stream, &mut body, self.length, deadline)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        body.truncate(self.length);
        Ok(Some(body))
    }

    pub(crate) fn respond(self, reply: Reply) -> io::Result<()> {
        let Request { method, stream, .. } = self;
        if method == "HEAD" { reply.send_head(stream) } else { reply.send(stream) }
    }
}

struct Head {
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    length: usize,
}

impl Head {
    /// The head, and where it ends. `Ok(None)`: it goes on.
    fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, Reply> {
        let bad = |what: &str| Reply::text(400, what);
        let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut lines);
        let end = match request.parse(bytes) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => return Err(Reply::text(431, "too many headers")),
            Err(e) => return Err(bad(&format!("no HTTP: {e}"))),
        };
        let (method, target) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let text = |value: &[u8]| String::from_utf8_lossy(value).trim().to_owned();
        let headers: Vec<_> = request.headers.iter().map(|h| (h.name.to_owned(), text(h.value))).collect();
        let all = |name: &str| headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).collect::<Vec<_>>();
        if !all("Transfer-Encoding").is_empty() {
            return Err(Reply::text(411, "say the length: Content-Length"));
        }
        let length = match all("Content-Length").as_slice() {
            [] => 0,
            [(_, n)] if n.bytes().all(|b| b.is_ascii_digit()) => n.parse().map_err(|_| bad("what length?"))?,
            _ => return Err(bad("what length?")),
        };
        let (method, path, query) = (method.to_owned(), path.to_owned(), query.to_owned());
        Ok(Some((Head { method, path, query, headers, length }, end)))
    }
}

/// Reads once, until the deadline at most and never beyond `limit`. 0: the client sends no more.
fn read_some(stream: &mut TcpStream, into: &mut Vec<u8>, limit: usize, deadline: Instant) -> io::Result<usize> {
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
    stream.set_read_timeout(Some(left.ok_or(ErrorKind::TimedOut)?))?;
    let mut chunk = [0; 4096];
    let room = chunk.len().min(limit - into.len());
    let n = stream.read(&mut chunk[..room])?;
    into.extend_from_slice(&chunk[..n]);
    Ok(n)
}

pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(status: u16, kind: &str, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, headers: String::new(), body: body.into() }.with("Content-Type", kind)
    }

    pub(crate) fn text(status: u16, text: &str) -> Reply {
        Reply::new(status, "text/plain; charset=utf-8", format!("{text}\n"))
    }

    /// # Panics
    ///
    /// If the value would end the line: then a client's text has got into a header.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Reply {
        assert!(!value.contains(['\r', '\n']), "the value of {name} has a line of its own");
        write!(self.headers, "{name}: {value}\r\n").expect("a string takes all");
        self
    }

    fn send(mut self, stream: TcpStream) -> io::Result<()> {
        let body = std::mem::take(&mut self.body);
        self.write(stream, body.len(), &body)
    }

    /// Says how long the body is, which is not sent.
    fn send_head(self, stream: TcpStream) -> io::Result<()> {
        let length = self.body.len();
        self.write(stream, length, &[])
    }

    fn write(self, mut stream: TcpStream, length: usize, body: &[u8]) -> io::Result<()> {
        let reason = match self.status {
            200 => "OK",
            201 => "Created",
            202 => "Accepted",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            409 => "Conflict",
            411 => "Length Required",
            413 => "Content Too Large",
            429 => "Too Many Requests",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let Reply { status, headers, .. } = self;
        let mut bytes = format!(
            "HTTP/1.1 {status} {reason}\r\n{headers}Content-Length: {length}\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )
        .into_bytes();
        bytes.extend_from_slice(body);
        stream.write_all(&bytes)?;
        // To close a connection on which something was not read cuts off the answer that is under way.
        stream.shutdown(Shutdown::Write)?;
        let deadline = Instant::now() + Duration::from_millis(500);
        let mut rest = Vec::new();
        while matches!(read_some(&mut stream, &mut rest, 4096, deadline), Ok(n) if n > 0) {
            rest.clear();
        }
        Ok(())
    }
}
