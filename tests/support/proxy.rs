//! A network that fails on command.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
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
}

/// One client's connection. Its sockets close when its thread, which alone holds it, ends.
struct Link {
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
                return;
            }
            let Ok(client) = client else {
                thread::sleep(ms(10)); // Out of file descriptors, as a rule.
                continue;
            };
            let link = Arc::new(Link { client, server: OnceLock::new(), cut: AtomicBool::new(false) });
            let watched = Arc::downgrade(&link);
            // Before it is counted, so that a cut by one who has seen the count does not miss it.
            let mut mode = self.mode.lock();
            self.accepted.fetch_add(1, SeqCst);
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
        thread::scope(|scope| {
            let back = thread::Builder::new().name("proxy-back".into());
            back.spawn_scoped(scope, || self.pump(link, server, &link.client)).expect("a thread for the way back");
            self.pump(link, &link.client, server);
        });
    }

    /// Forwards in one direction, until its source ends or the link is cut.
    fn pump(&self, link: &Link, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let mut rest = match from.read(&mut buffer) {
                Ok(n) => &buffer[..n],
                Err(_) => return self.cut(link),
            };
            let asks = std::ptr::eq(from, &link.client);
            let latency = if asks { Duration::ZERO } else { self.mode.lock().latency };
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
                match to.write(rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(e) if e.kind() == ErrorKind::WouldBlock && !link.cut.load(SeqCst) => {}
                    Err(_) => return self.cut(link),
                }
            }
        }
    }

    /// Waits while the line is paused and until `from`; `false` if the link was cut.
    fn pass(&self, link: &Link, from: Instant) -> bool {
        let mut mode = self.mode.lock();
        loop {
            if link.cut.load(SeqCst) {
                return false;
            }
            if mode.paused {
                self.changed.wait(&mut mode);
            } else if Instant::now() < from {
                self.changed.wait_until(&mut mode, from);
            } else {
                return true;
            }
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
