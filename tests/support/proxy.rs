//! A network that fails on command.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::database::with_name;
use super::server::{address, listen};
use super::wait::ms;

/// A TCP proxy on a loopback port of its own. All of its threads have ended when it is dropped.
pub struct Proxy {
    line: Arc<Line>,
    addr: SocketAddr,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

/// What befalls a connection. Bytes are counted from when the fault began, and are those of the server's answers, unless
/// it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None: it ends an earlier one.
    Pass,
    /// It is reset, at both ends. One that is yet to come is reset as soon as it is accepted.
    Reset,
    /// Nothing passes in either direction, and nobody is told. One that is yet to come is accepted and not served.
    Pause,
    /// Whatever the server says is lost.
    SwallowAnswers,
    /// Whatever the client says is lost.
    SwallowRequests,
    /// So many bytes pass, and the others do not, as if the server stopped in the middle of a message.
    StallAfter(usize),
    /// So many bytes pass, and then it is reset.
    ResetAfter(usize),
    /// This end is told that the other one has no more to say. What the other one does say is lost.
    CloseHalf(End),
    /// The server's words pass this much later.
    Latency(Duration),
    /// The server's words pass so many bytes at a time, with a pause after each piece.
    Trickle(usize, Duration),
    /// The byte after so many is another one.
    Corrupt(usize),
    /// It is served, and answered, only once the connection with this number was answered.
    Behind(usize),
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Client,
    Server,
}

/// What the proxy's threads share.
struct Line {
    to: SocketAddr,
    mode: Mutex<Mode>,
    /// Something in `mode`, or a link's `cut`, has changed.
    changed: Condvar,
    /// The listener is to go.
    deaf: AtomicBool,
    accepted: AtomicUsize,
    open: AtomicUsize,
    /// The last bytes that passed came from a client.
    asked: AtomicBool,
    turns: AtomicUsize,
}

#[derive(Default)]
struct Mode {
    paused: bool,
    silent: bool,
    delay: Duration,
    latency: Duration,
    links: Vec<(Weak<Link>, JoinHandle<()>)>,
    /// Of those that mean one connection the last one counts.
    rules: Vec<Rule>,
    /// How many rules there ever were.
    ruled: usize,
    /// The connections that were answered.
    answered: HashSet<usize>,
}

/// What befalls the connections with these numbers.
struct Rule {
    id: usize,
    connections: (Bound<usize>, Bound<usize>),
    fault: Fault,
}

/// How far one direction of a connection has come under a rule.
struct Under {
    rule: usize,
    passed: usize,
    last: Instant,
}

/// What becomes of bytes that came: so many of them pass, or all are lost.
enum Step {
    Send(usize),
    Lose,
}

/// One client's connection. Its sockets close when its thread, which alone holds it, ends.
struct Link {
    /// How many were accepted before it.
    number: usize,
    client: TcpStream,
    server: OnceLock<TcpStream>,
    cut: AtomicBool,
}

impl Proxy {
    /// A proxy that forwards to `to`.
    pub fn to(to: SocketAddr) -> Proxy {
        Proxy::between(listen(), to)
    }

    /// A proxy behind this listener. If that is in another network namespace, the proxy must be dropped there.
    pub fn between(listener: TcpListener, to: SocketAddr) -> Proxy {
        let proxy = Proxy {
            line: Arc::new(Line {
                to,
                mode: Mutex::default(),
                changed: Condvar::new(),
                deaf: AtomicBool::new(false),
                accepted: AtomicUsize::new(0),
                open: AtomicUsize::new(0),
                asked: AtomicBool::new(false),
                turns: AtomicUsize::new(0),
            }),
            addr: listener.local_addr().expect("a listener's address"),
            acceptor: Mutex::new(None),
        };
        proxy.serve(listener);
        proxy
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    /// How to connect through it, under the name of `app`, to the private server.
    pub fn conninfo(&self, app: &str) -> String {
        with_name(&address(self.port()), app)
    }

    /// From now on nothing passes, in either direction; bytes on their way are kept for [`resume`](Proxy::resume).
    /// Connections stay open, new ones are accepted, and each side's system acknowledges what the other sends:
    /// nobody gets an error. A client that hangs up is not noticed meanwhile.
    pub fn pause(&self) {
        self.line.change(|mode| mode.paused = true);
    }

    /// Ends a [`pause`](Proxy::pause): what was kept back passes, and what connected meanwhile is served.
    pub fn resume(&self) {
        self.line.change(|mode| mode.paused = false);
    }

    /// While `true`, new connections are accepted and never answered, not even later. Older ones are served.
    pub fn silent(&self, silent: bool) {
        self.line.change(|mode| mode.silent = silent);
    }

    /// Each new connection is served only this long after it was accepted.
    pub fn delay(&self, delay: Duration) {
        self.line.change(|mode| mode.delay = delay);
    }

    /// Whatever the server says passes this much later.
    pub fn latency(&self, latency: Duration) {
        self.line.change(|mode| mode.latency = latency);
    }

    /// Resets every connection, at both ends; new ones are served. Returns when they are closed.
    pub fn cut(&self) {
        let links = std::mem::take(&mut self.line.mode.lock().links);
        for (link, _) in &links {
            if let Some(link) = link.upgrade() {
                self.line.cut(&link);
            }
        }
        for (_, thread) in links {
            let _ = thread.join();
        }
    }

    /// New connections are refused: nobody listens any more. Older ones are served.
    pub fn refuse(&self) {
        let Some(acceptor) = self.acceptor.lock().take() else { return };
        self.line.deaf.store(true, SeqCst);
        // Wakes it from its accept.
        while !acceptor.is_finished() {
            let _ = TcpStream::connect_timeout(&self.addr, ms(100));
        }
        let _ = acceptor.join();
    }

    /// Listens again, on the same port, after [`refuse`](Proxy::refuse).
    pub fn accept(&self) {
        if self.acceptor.lock().is_none() {
            self.serve(TcpListener::bind(self.addr).expect("the proxy's own port"));
        }
    }

    /// From now on this befalls the connections with these numbers: those that are open, and those that are yet to come.
    /// The first one ever accepted has the number 0, so `..` means all, `n..` with [`accepted`](Proxy::accepted) those to
    /// come, and `..n` those that are there, which is how a firewall forgets them. The last fault of a connection counts.
    pub fn fault(&self, connections: impl RangeBounds<usize>, fault: Fault) {
        let connections = (connections.start_bound().cloned(), connections.end_bound().cloned());
        let mut befallen = Vec::new();
        self.line.change(|mode| {
            mode.ruled += 1;
            mode.rules.push(Rule { id: mode.ruled, connections, fault });
            let links = mode.links.iter().filter_map(|(link, _)| link.upgrade());
            befallen.extend(links.filter(|link| connections.contains(&link.number)));
        });
        for link in befallen {
            self.line.befall(&link, fault);
        }
    }

    /// Ends all that was begun by [`fault`](Proxy::fault): what was kept back passes. What is lost stays lost.
    pub fn heal(&self) {
        self.line.change(|mode| mode.rules.clear());
    }

    /// How many connections were ever accepted.
    pub fn accepted(&self) -> usize {
        self.line.accepted.load(SeqCst)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.line.open.load(SeqCst)
    }

    /// How many round trips there were: how often bytes from a client followed bytes from the server. For one
    /// connection at a time. Where a client does not wait for an answer before it goes on, give it time by a
    /// [`latency`](Proxy::latency).
    pub fn turns(&self) -> usize {
        self.line.turns.load(SeqCst)
    }

    fn serve(&self, listener: TcpListener) {
        self.line.deaf.store(false, SeqCst);
        let line = Arc::clone(&self.line);
        let acceptor = thread::Builder::new().name("proxy-accept".into()).spawn(move || line.accept(&listener));
        *self.acceptor.lock() = Some(acceptor.expect("a thread for the proxy"));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.refuse();
        self.cut();
    }
}

impl Line {
    fn change(&self, change: impl FnOnce(&mut Mode)) {
        change(&mut self.mode.lock());
        self.changed.notify_all();
    }

    fn accept(self: &Arc<Line>, listener: &TcpListener) {
        for client in listener.incoming() {
            if self.deaf.load(SeqCst) {
                // A child of another test, between its fork and its exec, has the listener as well, and it would listen
                // on. This ends it for all who have it.
                let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
                return;
            }
            let Ok(client) = client else {
                thread::sleep(ms(10)); // Out of file descriptors, as a rule.
                continue;
            };
            // Before it is counted, so that a cut by one who has seen the count does not miss it.
            let mut mode = self.mode.lock();
            let number = self.accepted.fetch_add(1, SeqCst);
            let link = Arc::new(Link { number, client, server: OnceLock::new(), cut: AtomicBool::new(false) });
            let watched = Arc::downgrade(&link);
            self.open.fetch_add(1, SeqCst);
            let (silent, served_from) = (mode.silent, Instant::now() + mode.delay);
            let line = Arc::clone(self);
            let thread = thread::Builder::new().name("proxy-link".into()).spawn(move || {
                line.carry(&link, silent, served_from);
                drop(link);
                line.open.fetch_sub(1, SeqCst);
            });
            mode.links.retain(|(_, thread)| !thread.is_finished());
            mode.links.push((watched, thread.expect("a thread for a connection")));
        }
    }

    /// The life of one connection.
    fn carry(&self, link: &Link, silent: bool, served_from: Instant) {
        if silent {
            let mut ignored = [0; 4096];
            while matches!((&link.client).read(&mut ignored), Ok(1..)) {}
            return;
        }
        let fault = self.mode.lock().fault_of(link.number).1;
        if fault == Fault::Reset {
            return self.cut(link);
        }
        if !self.pass(link, served_from) {
            return;
        }
        let Ok(server) = TcpStream::connect_timeout(&self.to, Duration::from_secs(5)) else {
            return self.cut(link);
        };
        for socket in [&link.client, &server] {
            let _ = socket.set_nodelay(true);
            // A write to somebody who does not read has to notice a cut.
            let _ = socket.set_write_timeout(Some(ms(20)));
        }
        let server = link.server.get_or_init(|| server);
        // A cut from before it was there has not woken its reader.
        if link.cut.load(SeqCst) {
            return;
        }
        // What began before there was a server could not reach it.
        let fault = self.mode.lock().fault_of(link.number).1;
        self.befall(link, fault);
        thread::scope(|scope| {
            let back = thread::Builder::new().name("proxy-back".into());
            back.spawn_scoped(scope, || self.pump(link, server, &link.client)).expect("a thread for the way back");
            self.pump(link, &link.client, server);
        });
    }

    /// Forwards in one direction, until its source ends or the link is cut.
    fn pump(&self, link: &Link, mut from: &TcpStream, mut to: &TcpStream) {
        let asks = std::ptr::eq(from, &link.client);
        let mut under = Under { rule: 0, passed: 0, last: Instant::now() };
        let mut buffer = [0; 16 * 1024];
        loop {
            let mut rest = match from.read(&mut buffer) {
                Ok(n) => &mut buffer[..n],
                Err(_) => return self.cut(link),
            };
            let latency = if asks { Duration::ZERO } else { self.mode.lock().latency_of(link.number) };
            if !self.pass(link, Instant::now() + latency) {
                return;
            }
            if !rest.is_empty() && asks != self.asked.swap(asks, SeqCst) && asks {
                self.turns.fetch_add(1, SeqCst);
            }
            if rest.is_empty() {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            while !rest.is_empty() {
                let mut piece = match self.step(link, asks, &mut under, rest) {
                    Some(Step::Send(n)) => &rest[..n],
                    Some(Step::Lose) => break,
                    None => return,
                };
                let sent = piece.len();
                while !piece.is_empty() {
                    match to.write(piece) {
                        Ok(n) => piece = &piece[n..],
                        Err(e) if e.kind() == ErrorKind::WouldBlock && !link.cut.load(SeqCst) => {}
                        Err(_) => return self.cut(link),
                    }
                }
                rest = &mut rest[sent..];
            }
        }
    }

    /// What becomes of bytes that came, by the fault of their connection, which may have them wait. `None`: the link is
    /// cut.
    fn step(&self, link: &Link, asks: bool, under: &mut Under, bytes: &mut [u8]) -> Option<Step> {
        let mut mode = self.mode.lock();
        loop {
            if link.cut.load(SeqCst) {
                return None;
            }
            let (rule, fault) = mode.fault_of(link.number);
            if under.rule != rule {
                *under = Under { rule, passed: 0, last: under.last };
            }
            let mut not_before = None;
            let n = match fault {
                _ if mode.keeps_waiting(link.number) => 0,
                Fault::SwallowRequests | Fault::CloseHalf(End::Server) if asks => return Some(Step::Lose),
                _ if asks => bytes.len(),
                Fault::SwallowAnswers | Fault::CloseHalf(End::Client) => return Some(Step::Lose),
                Fault::StallAfter(after) => after.saturating_sub(under.passed),
                Fault::ResetAfter(after) if after <= under.passed => {
                    drop(mode);
                    self.cut(link);
                    return None;
                }
                Fault::ResetAfter(after) => after - under.passed,
                Fault::Corrupt(at) => {
                    if let Some(byte) = at.checked_sub(under.passed).and_then(|at| bytes.get_mut(at)) {
                        *byte = !*byte;
                    }
                    bytes.len()
                }
                Fault::Trickle(n, pause) => {
                    not_before = (under.passed > 0).then(|| under.last + pause);
                    n
                }
                _ => bytes.len(),
            };
            let n = n.min(bytes.len());
            match not_before {
                Some(at) if Instant::now() < at => drop(self.changed.wait_until(&mut mode, at)),
                _ if n == 0 => self.changed.wait(&mut mode),
                _ => {
                    *under = Under { rule, passed: under.passed + n, last: Instant::now() };
                    if !asks && mode.answered.insert(link.number) {
                        self.changed.notify_all();
                    }
                    return Some(Step::Send(n));
                }
            }
        }
    }

    /// Waits while the link is kept waiting and until `from`; `false` if the link was cut.
    fn pass(&self, link: &Link, from: Instant) -> bool {
        let mut mode = self.mode.lock();
        loop {
            if link.cut.load(SeqCst) {
                return false;
            }
            if mode.keeps_waiting(link.number) {
                self.changed.wait(&mut mode);
            } else if Instant::now() < from {
                self.changed.wait_until(&mut mode, from);
            } else {
                return true;
            }
        }
    }

    /// Does at once what a fault does at its beginning.
    fn befall(&self, link: &Link, fault: Fault) {
        match fault {
            Fault::Reset => self.cut(link),
            Fault::CloseHalf(End::Client) => drop(link.client.shutdown(Shutdown::Write)),
            Fault::CloseHalf(End::Server) => drop(link.server.get().map(|server| server.shutdown(Shutdown::Write))),
            _ => {}
        }
    }

    /// Has a link's threads end, and its sockets be reset when they close.
    fn cut(&self, link: &Link) {
        // Under the lock, so that nobody in `pass` misses it.
        self.change(|_| link.cut.store(true, SeqCst));
        for socket in [Some(&link.client), link.server.get()].into_iter().flatten() {
            let _ = rustix::net::sockopt::set_socket_linger(socket, Some(Duration::ZERO));
            // Wakes a reader and sends nothing, unlike a shutdown of both directions.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }
}

impl Mode {
    /// The rule that counts for this connection, and what it says.
    fn fault_of(&self, number: usize) -> (usize, Fault) {
        let rule = self.rules.iter().rev().find(|rule| rule.connections.contains(&number));
        rule.map_or((0, Fault::Pass), |rule| (rule.id, rule.fault))
    }

    fn latency_of(&self, number: usize) -> Duration {
        match self.fault_of(number).1 {
            Fault::Latency(latency) => self.latency.max(latency),
            _ => self.latency,
        }
    }

    /// Nothing passes for the time being.
    fn keeps_waiting(&self, number: usize) -> bool {
        self.paused
            || match self.fault_of(number).1 {
                Fault::Pause => true,
                Fault::Behind(other) => !self.answered.contains(&other),
                _ => false,
            }
    }
}

/// A server that accepts and never says a word, until it is dropped.
pub struct Silent(Proxy);

impl Silent {
    pub fn listen() -> Silent {
        // It never gets as far as to connect to anybody.
        let proxy = Proxy::to(SocketAddr::from(([127, 0, 0, 1], 1)));
        proxy.silent(true);
        Silent(proxy)
    }

    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    pub fn port(&self) -> u16 {
        self.0.port()
    }

    /// How to try to connect to it, under the name of `app`, as if it were the private server.
    pub fn conninfo(&self, app: &str) -> String {
        self.0.conninfo(app)
    }

    /// How many connections were ever accepted.
    pub fn accepted(&self) -> usize {
        self.0.accepted()
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.0.open()
    }
}
