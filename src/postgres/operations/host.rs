//! [`Host`]: what the kernel of this host says of TCP connections, their two ends, and which process holds each.
//!
//! It decides whether a backend may be called orphaned. So only what the kernel says in Linux's `/proc` counts, and
//! only where that is about this very network and these very processes. Whatever cannot be read, or could be read
//! wrongly (another namespace's `/proc`), is an error that says why.
//!
//! It reads `/proc` by hand, not with the crate `procfs`. There are five small files, and each way in which reading one
//! can fail has an answer of its own, since a doubt must never pass for a proof.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// One look at this host, in this order: the sockets of this process, the connections of the network, the sockets of
/// the backends. The look comes after the server was asked, so every backend in its answer already had its connection.
#[derive(Debug, Default)]
pub(super) struct Host {
    /// The numbers (inodes) of the sockets that this process holds.
    own: HashSet<u64>,
    /// The TCP sockets of this network namespace, by their two addresses: the near one first.
    sockets: HashMap<(SocketAddr, SocketAddr), Socket>,
    /// The backends in question, by their process ids.
    backends: HashMap<i32, Result<Process, &'static str>>,
    /// Whether packets between loopback addresses may come from, or go to, another machine.
    routes_loopback: bool,
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    state: State,
    /// The number of the socket; 0 if no process holds it.
    inode: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Closed at this end, which the other end's system knows: `FIN_WAIT2`.
    Closed,
    /// Closed at the other end: `CLOSE_WAIT`.
    PeerClosed,
    Other,
}

#[derive(Debug)]
struct Process {
    sockets: HashSet<u64>,
    /// When the process was started, to a second or so.
    started: SystemTime,
}

/// Who holds the client's end of a backend's connection, once it is certain that the backend holds the server's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// This process.
    Us,
    /// A process of this host that is not this one, or a child that was forked from it.
    Others,
    /// No process, for ever: the end is closed.
    Nobody,
}

/// How far the server's and the kernel's times of a process's start may lie apart. The kernel keeps whole seconds, and
/// the server notes its time a little later.
const SAME_TIME: Duration = Duration::from_secs(3);

const ELSEWHERE: &str = "the server is not on this host, or something stands in between";
const ENDED: &str = "it has ended meanwhile";

impl Host {
    /// Looks at this host, and at these backends.
    pub(super) fn look(backends: impl Iterator<Item = i32>) -> Result<Host, &'static str> {
        // A /proc of another namespace has other numbers.
        let own_pid = std::process::id().to_string();
        let status = fs::read_to_string("/proc/self/status").map_err(|_| "there is no /proc here")?;
        if fs::read_link("/proc/self").ok().as_deref() != Some(Path::new(&own_pid)) || is_nested(&status) {
            return Err("the /proc here is that of another pid namespace");
        }
        let own = sockets_of(Path::new("/proc/self/fd")).map_err(|_| "/proc/self/fd cannot be read")?;
        let sockets = connections().map_err(|_| "/proc/net/tcp cannot be read")?;
        let booted = booted().ok_or("/proc/stat cannot be read")?;
        let backends = backends.map(|pid| (pid, Process::look(pid, booted))).collect();
        Ok(Host { own, sockets, backends, routes_loopback: routes_loopback() })
    }

    /// Whether the server of this backend runs on this host, so that the kernel knows its backends. It does if the
    /// backend answered over a connection whose client's end, `peer`, is this process's, and whose other end is the
    /// backend's.
    pub(super) fn has_server(
        &self,
        backend: i32,
        start: Option<SystemTime>,
        peer: SocketAddr,
    ) -> Result<(), &'static str> {
        let ours = self.sockets.iter().filter(|((near, _), socket)| *near == peer && self.own.contains(&socket.inode));
        let mut ends = ours.filter_map(|(&(near, far), _)| self.sockets.get(&(far, near))).peekable();
        if ends.peek().is_none() {
            return Err(ELSEWHERE);
        }
        let process = self.backend(backend).map_err(|why| if why == ENDED { ELSEWHERE } else { why })?;
        if !ends.any(|end| process.holds(end.inode)) {
            return Err(ELSEWHERE);
        }
        match start {
            Some(start) if distance(start, process.started) <= SAME_TIME => Ok(()),
            _ => Err("the server's time and this host's are not the same"),
        }
    }

    /// Who holds the client's end of this backend's connection. Its server [is here](Host::has_server), and says that
    /// the client's address is `client`.
    pub(super) fn holder(&self, backend: i32, client: SocketAddr) -> Result<Holder, &'static str> {
        let process = self.backend(backend)?;
        let mut ends = self.sockets.iter().filter(|((_, far), end)| *far == client && process.holds(end.inode));
        let (&(server, _), servers_end) = ends.next().ok_or("the server's end of its connection is not to be seen")?;
        let peer_closed = servers_end.state == State::PeerClosed;
        match self.sockets.get(&(client, server)) {
            Some(end) if end.inode != 0 && self.own.contains(&end.inode) => Ok(Holder::Us),
            Some(end) if end.inode != 0 => Ok(Holder::Others),
            // A socket without a number may also wait to be accepted, but not if it was closed.
            Some(end) if end.state == State::Closed && peer_closed => Ok(Holder::Nobody),
            Some(_) => Err("its connection is being opened or closed"),
            // The system forgets a closed end after a minute, but the other end still knows that it was closed. Between
            // loopback addresses the missing end cannot be on another machine.
            None if peer_closed && is_loopback(client) && is_loopback(server) && !self.routes_loopback => {
                Ok(Holder::Nobody)
            }
            None => Err("the client's end of its connection is not on this host, or in another network namespace"),
        }
    }

    /// Whether this process holds a connection from here to there.
    pub(super) fn is_ours(&self, near: SocketAddr, far: SocketAddr) -> bool {
        self.sockets.get(&(near, far)).is_some_and(|socket| self.own.contains(&socket.inode))
    }

    /// Whether this process holds a connection from here to wherever.
    pub(super) fn is_from_us(&self, near: SocketAddr) -> bool {
        let mut from_here = self.sockets.iter().filter(|((from, to), _)| *from == near && to.port() != 0);
        from_here.any(|(_, socket)| self.own.contains(&socket.inode))
    }

    fn backend(&self, pid: i32) -> Result<&Process, &'static str> {
        self.backends.get(&pid).unwrap_or(&Err(ENDED)).as_ref().map_err(|why| *why)
    }
}

impl Process {
    fn look(pid: i32, booted: SystemTime) -> Result<Process, &'static str> {
        // If the pid was given to another process since the server was asked, the time of that process's start shows
        // it.
        let folder = format!("/proc/{}", u32::try_from(pid).map_err(|_| ENDED)?);
        let folder = Path::new(&folder);
        let status = fs::read_to_string(folder.join("status")).map_err(|_| ENDED)?;
        if is_nested(&status) {
            return Err("a process with the server's number is in another pid namespace");
        }
        let stat = fs::read_to_string(folder.join("stat")).map_err(|_| ENDED)?;
        let sockets = sockets_of(&folder.join("fd")).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => {
                "this process may not see what the server's processes hold: that takes root, or the server's user"
            }
            _ => ENDED,
        })?;
        let started = booted + since_boot(&stat).ok_or(ENDED)?;
        Ok(Process { sockets, started })
    }

    fn holds(&self, inode: u64) -> bool {
        inode != 0 && self.sockets.contains(&inode)
    }
}

fn distance(a: SystemTime, b: SystemTime) -> Duration {
    a.duration_since(b).unwrap_or_else(|e| e.duration())
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().is_loopback()
}

/// Whether a process, by its `status`, is in a namespace within the one that this `/proc` shows.
fn is_nested(status: &str) -> bool {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.is_some_and(|numbers| numbers.split_whitespace().count() != 1)
}

/// When a process was started, by its `stat`, counted from the start of the system.
fn since_boot(stat: &str) -> Option<Duration> {
    /// The unit of the times in `/proc`, on every architecture but two that have gone.
    const TICKS_PER_SECOND: u64 = 100;
    // The name before that field, in brackets, may contain anything.
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks.checked_mul(1000)? / TICKS_PER_SECOND))
}

/// When the system was started, in whole seconds.
fn booted() -> Option<SystemTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Whether any network device lets packets of 127.0.0.0/8 in or out (`route_localnet`). With address translation a
/// client on another machine can then look like a client on this one. For ::1 there is no such setting.
fn routes_loopback() -> bool {
    let is_off = |entry: io::Result<fs::DirEntry>| {
        let value = fs::read_to_string(entry.ok()?.path().join("route_localnet")).ok()?;
        (value.trim() == "0").then_some(())
    };
    match fs::read_dir("/proc/sys/net/ipv4/conf") {
        Ok(mut devices) => !devices.all(|entry| is_off(entry).is_some()),
        Err(_) => true,
    }
}

/// The numbers of the sockets in a process's folder of file descriptors.
fn sockets_of(folder: &Path) -> io::Result<HashSet<u64>> {
    let number = |path: &Path| -> Option<u64> {
        fs::read_link(path).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    let mut sockets = HashSet::new();
    for entry in fs::read_dir(folder)? {
        sockets.extend(number(&entry?.path()));
    }
    Ok(sockets)
}

/// The TCP sockets of this thread's network namespace.
fn connections() -> io::Result<HashMap<(SocketAddr, SocketAddr), Socket>> {
    let mut table = fs::read_to_string("/proc/thread-self/net/tcp")?;
    match fs::read_to_string("/proc/thread-self/net/tcp6") {
        Ok(six) => table += &six,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut sockets = HashMap::new();
    for line in table.lines() {
        // Sockets that wait for late packets are skipped: there may be tens of thousands, and none is of interest.
        if matches!(line.split_whitespace().nth(3), Some("st" | TIME_WAIT)) {
            continue;
        }
        let fields: Vec<_> = line.split_whitespace().collect();
        let (ends, socket) = socket(&fields).ok_or(io::ErrorKind::InvalidData)?;
        let known = sockets.entry(ends).or_insert(socket);
        // If the table changes while it is read, it may have two lines for one pair of ends. The line of a socket that
        // a process holds counts.
        if known.inode == 0 {
            *known = socket;
        }
    }
    Ok(sockets)
}

const TIME_WAIT: &str = "06";

fn socket(fields: &[&str]) -> Option<((SocketAddr, SocketAddr), Socket)> {
    let state = match *fields.get(3)? {
        "05" => State::Closed,
        "08" => State::PeerClosed,
        _ => State::Other,
    };
    let socket = Socket { state, inode: fields.get(9)?.parse().ok()? };
    Some(((address(fields.get(1)?)?, address(fields.get(2)?)?), socket))
}

fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    // The address is in words in network order, each printed as a number in this machine's byte order.
    let words = |n: usize| u32::from_str_radix(address.get(n * 8..n * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(words(0)?).into(),
        32 => {
            let bytes: Vec<u8> = [words(0)?, words(1)?, words(2)?, words(3)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// A host as a test wants it.
#[cfg(test)]
#[derive(Default)]
pub(super) struct Staged(Host);

#[cfg(test)]
impl Staged {
    /// A socket from `near` to `far`, in this state of `/proc/net/tcp`, with this number.
    pub(super) fn socket(mut self, near: &str, far: &str, state: &str, inode: u64) -> Staged {
        let near_and_far = (near.parse().unwrap(), far.parse().unwrap());
        let state = socket(&["", "0100007F:1", "0100007F:1", state, "", "", "", "", "", "0"]).unwrap().1.state;
        self.0.sockets.insert(near_and_far, Socket { state, inode });
        self
    }

    pub(super) fn own(mut self, inodes: &[u64]) -> Staged {
        self.0.own.extend(inodes);
        self
    }

    pub(super) fn backend(mut self, pid: i32, started: SystemTime, sockets: &[u64]) -> Staged {
        let sockets = sockets.iter().copied().collect();
        self.0.backends.insert(pid, Ok(Process { sockets, started }));
        self
    }

    pub(super) fn hidden(mut self, pid: i32, why: &'static str) -> Staged {
        self.0.backends.insert(pid, Err(why));
        self
    }

    pub(super) fn routing_loopback(mut self) -> Staged {
        self.0.routes_loopback = true;
        self
    }

    pub(super) fn host(self) -> Host {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_os = "linux")]
    use std::net::{Shutdown, TcpListener, TcpStream};
    #[cfg(target_os = "linux")]
    use std::process::{Child, Command, Stdio};

    const CLIENT: &str = "127.0.0.1:2000";
    const SERVER: &str = "127.0.0.1:5432";

    fn holder(host: Staged) -> Result<Holder, &'static str> {
        host.host().holder(7, CLIENT.parse().unwrap())
    }

    /// The server's end of backend 7's connection, in this state, and the client's.
    fn ends(server: &str, client: Option<(&str, u64)>) -> Staged {
        let staged = Staged::default().own(&[1]).backend(7, SystemTime::UNIX_EPOCH, &[70, 71]);
        let staged = staged.socket(SERVER, CLIENT, server, 70);
        match client {
            Some((state, inode)) => staged.socket(CLIENT, SERVER, state, inode),
            None => staged,
        }
    }

    #[test]
    fn who_holds_the_client_s_end() {
        assert_eq!(holder(ends("01", Some(("01", 1)))), Ok(Holder::Us));
        assert_eq!(holder(ends("01", Some(("01", 2)))), Ok(Holder::Others));
        assert_eq!(holder(ends("08", Some(("05", 2)))), Ok(Holder::Others), "half closed, and still held");
        assert_eq!(holder(ends("08", Some(("05", 0)))), Ok(Holder::Nobody));
        assert_eq!(holder(ends("08", None)), Ok(Holder::Nobody), "closed a minute ago");
    }

    #[test]
    fn without_proof_no_client_counts_as_gone() {
        let not = |host: Staged, why: &str| assert!(holder(host).unwrap_err().contains(why), "{why}");
        not(ends("01", Some(("01", 0))), "being opened or closed");
        not(ends("08", Some(("04", 0))), "being opened or closed");
        not(ends("01", Some(("05", 0))), "being opened or closed");
        not(ends("01", None), "not on this host");
        not(ends("08", None).routing_loopback(), "not on this host");
        not(ends("08", None).backend(7, SystemTime::UNIX_EPOCH, &[71]), "the server's end");
        not(ends("08", None).hidden(7, "because"), "because");
        not(Staged::default(), "ended meanwhile");
        // The server's end is another process's: a relay's, say.
        not(
            Staged::default().backend(7, SystemTime::UNIX_EPOCH, &[0, 1]).socket(SERVER, CLIENT, "08", 0),
            "server's end",
        );

        let far = Staged::default().backend(7, SystemTime::UNIX_EPOCH, &[70]);
        let far = far.socket("10.0.0.1:5432", "10.0.0.2:2000", "08", 70);
        let lost = far.host().holder(7, "10.0.0.2:2000".parse().unwrap());
        assert!(lost.unwrap_err().contains("not on this host"), "another machine's, perhaps half closed");
    }

    #[test]
    fn a_server_that_is_here() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let here = || {
            let staged = Staged::default().own(&[1]).backend(7, start, &[70]);
            staged.socket(CLIENT, SERVER, "01", 1).socket(SERVER, CLIENT, "01", 70)
        };
        let is_here = |host: Staged, start| host.host().has_server(7, start, CLIENT.parse().unwrap());
        assert_eq!(is_here(here(), Some(start + Duration::from_secs(1))), Ok(()));
        assert!(is_here(here(), Some(start + Duration::from_secs(10))).is_err(), "an earlier process with its number");
        assert!(is_here(here(), None).is_err());
        assert!(is_here(here().backend(7, start, &[71]), Some(start)).is_err(), "a relay has the other end");
        assert!(is_here(here().own(&[]).socket(CLIENT, SERVER, "01", 2), Some(start)).is_err(), "not our end");
        assert_eq!(is_here(here().hidden(7, "because"), Some(start)), Err("because"));
    }

    #[test]
    fn a_process_in_a_namespace_below() {
        assert!(!is_nested("Name:\tx\nNSpid:\t7\nThreads:\t1\n") && !is_nested("Name:\tx\n"));
        assert!(is_nested("Name:\tx\nNSpid:\t7\t1\nThreads:\t1\n"));
    }

    #[test]
    fn when_a_process_was_started() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 67 8 9";
        assert_eq!(since_boot(stat), Some(Duration::from_millis(123_450)));
        assert_eq!(since_boot("7 (a) S 1"), None);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_line_of_the_table() {
        let near = |s| address(s).map(|near| near.to_string());
        assert_eq!(near("0100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(near("00000000000000000000000001000000:1F90").as_deref(), Some("[::1]:8080"));
        assert_eq!(near("0000000000000000FFFF00000100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(near("0100007F"), None);
        let line = |inode| ["0:", "0100007F:1F90", "0100007F:1F91", "08", "x", "x", "x", "0", "0", inode];
        assert_eq!(socket(&line("4711")).unwrap().1, Socket { state: State::PeerClosed, inode: 4711 });
        assert_eq!(socket(&line("x")), None);
    }

    /// A process that holds the server's end of a connection until it is dropped.
    #[cfg(target_os = "linux")]
    struct Server(Child);

    #[cfg(target_os = "linux")]
    impl Server {
        fn holding(end: TcpStream) -> Server {
            Server(Command::new("sleep").arg("60").stdin(Stdio::from(std::os::fd::OwnedFd::from(end))).spawn().unwrap())
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }
    }

    #[cfg(target_os = "linux")]
    impl Drop for Server {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_host() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let started = SystemTime::now();
        let server = Server::holding(listener.accept().unwrap().0);
        let (near, far) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let look = || Host::look([server.pid()].into_iter()).unwrap();
        let holder = || look().holder(server.pid(), near);

        assert_eq!(look().has_server(server.pid(), Some(started), near), Ok(()));
        assert!(look().has_server(server.pid(), Some(started - Duration::from_secs(60)), near).is_err());
        assert_eq!(holder(), Ok(Holder::Us));
        assert!(look().is_ours(near, far) && look().is_from_us(near) && !look().is_from_us(far));
        // Half closed: the client may still wait for the answer.
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(holder(), Ok(Holder::Us));
        let other = Server::holding(client.try_clone().unwrap());
        drop(client);
        assert_eq!(holder(), Ok(Holder::Others));
        assert!(!look().is_ours(near, far) && !look().is_from_us(near));
        drop(other);
        assert_eq!(holder(), Ok(Holder::Nobody));

        let gone = server.pid();
        drop(server);
        assert_eq!(Host::look([gone].into_iter()).unwrap().holder(gone, near), Err(ENDED));
    }
}
