//! What this host can tell of other processes: which live, and which TCP connections somebody holds.
//!
//! Read from Linux's `/proc`. To be believed dead is dangerous, so whatever cannot be read, or could be read wrongly (another
//! namespace's `/proc`, one that hides processes), is an error that says why, and nobody is called dead.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// One look at this host. What began after it is not in it: look after asking the server, not before.
#[derive(Debug, Default)]
pub(super) struct Host {
    /// The near ends of the TCP connections in this network namespace that some process holds.
    held: HashSet<SocketAddr>,
    /// Those that this process holds.
    ours: HashSet<SocketAddr>,
    /// The living, by the number they have here and by the one they know themselves, in a container, say.
    living: HashSet<u32>,
    /// Whether every process of the machine can be seen.
    everybody: bool,
}

/// The initial namespace of processes has had this number since Linux 3.8 (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

impl Host {
    pub(super) fn look() -> Result<Host, &'static str> {
        if fs::read_link("/proc/self").ok().as_deref() != Some(Path::new(&std::process::id().to_string())) {
            return Err("there is no /proc of its own here");
        }
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|_| "/proc cannot be read")?;
        if hides_processes(&mounts) {
            return Err("/proc hides processes (hidepid)");
        }
        let living = living().map_err(|_| "/proc cannot be read")?;
        let (held, ours) = sockets().map_err(|_| "/proc/net/tcp cannot be read")?;
        let everybody = fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns == Path::new(INITIAL_PID_NAMESPACE));
        Ok(Host { held, ours, living, everybody })
    }

    #[cfg(test)]
    pub(super) fn with(held: &[&str], ours: &[&str], living: &[u32], everybody: bool) -> Host {
        let parse = |all: &[&str]| all.iter().map(|a| a.parse().unwrap()).collect();
        Host { held: parse(held), ours: parse(ours), living: living.iter().copied().collect(), everybody }
    }

    /// Whether a process that has or knows itself by this number lives.
    pub(super) fn lives(&self, pid: u32) -> bool {
        self.living.contains(&pid)
    }

    /// Whether some process, in whatever container on this network, holds the connection with this near end.
    pub(super) fn is_held(&self, near: SocketAddr) -> bool {
        self.held.contains(&near)
    }

    /// Whether it is this very process that holds it: then nothing stands between it and what sees it so.
    pub(super) fn is_ours(&self, near: SocketAddr) -> bool {
        self.ours.contains(&near)
    }

    /// Whether every process of the machine can be seen, containers included.
    pub(super) fn sees_everybody(&self) -> bool {
        self.everybody
    }
}

/// Whether `/proc` is mounted so that the processes of other users are not listed.
fn hides_processes(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let options = match fields[..] {
            [_, "/proc", "proc", options, ..] => options,
            _ => return false,
        };
        options.split(',').any(|o| o.strip_prefix("hidepid=").is_some_and(|mode| !["0", "off"].contains(&mode)))
    })
}

fn living() -> io::Result<HashSet<u32>> {
    let mut living = HashSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        match fs::read_to_string(entry.path().join("status")) {
            Ok(status) => living.extend(numbers(pid, &status)),
            // It has ended since the list was read.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(ESRCH) => {}
            Err(_) => {
                living.insert(pid);
            }
        }
    }
    Ok(living)
}

/// No such process.
const ESRCH: i32 = 3;

/// The numbers of a process by its `status`; none if it is dead. A dead process that nobody has buried holds nothing any
/// more; unless only its first thread has ended.
fn numbers(pid: u32, status: &str) -> Vec<u32> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let ended = field("State").is_some_and(|state| state.starts_with(['Z', 'X']));
    let threads = field("Threads").and_then(|n| n.parse::<u32>().ok()).unwrap_or(1);
    if ended && threads <= 1 {
        return Vec::new();
    }
    let innermost = field("NSpid").and_then(|pids| pids.split_whitespace().next_back()?.parse().ok());
    [Some(pid), innermost].into_iter().flatten().collect()
}

/// The near ends of all TCP connections that are held, and of this process's own.
fn sockets() -> io::Result<(HashSet<SocketAddr>, HashSet<SocketAddr>)> {
    let own: HashSet<u64> = fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| {
            let target = fs::read_link(entry.ok()?.path()).ok()?;
            target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        })
        .collect();
    let mut table = fs::read_to_string("/proc/self/net/tcp")?;
    match fs::read_to_string("/proc/self/net/tcp6") {
        Ok(six) => table += &six,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let (mut held, mut ours) = (HashSet::new(), HashSet::new());
    for line in table.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.first() == Some(&"sl") {
            continue;
        }
        let (near, inode) = socket(&fields).ok_or(io::ErrorKind::InvalidData)?;
        // The system keeps what nobody holds for a while, without an inode.
        if inode != 0 {
            held.insert(near);
            if own.contains(&inode) {
                ours.insert(near);
            }
        }
    }
    Ok((held, ours))
}

fn socket(fields: &[&str]) -> Option<(SocketAddr, u64)> {
    let (address, port) = fields.get(1)?.split_once(':')?;
    // Words in the order of the network, each printed as a number of this machine's.
    let words = |n: usize| u32::from_str_radix(address.get(n * 8..n * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(words(0)?).into(),
        32 => {
            let bytes: Vec<u8> = [words(0)?, words(1)?, words(2)?, words(3)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some((SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?), fields.get(9)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_dead_have_no_number() {
        assert_eq!(numbers(7, "Name:\tx\nState:\tS (sleeping)\nNSpid:\t7\t1\nThreads:\t1\n"), [7, 1]);
        assert_eq!(numbers(7, "State:\tR (running)\nThreads:\t1\n"), [7]);
        assert_eq!(numbers(7, "State:\tZ (zombie)\nNSpid:\t7\nThreads:\t1\n"), []);
        assert_eq!(numbers(7, "State:\tZ (zombie)\nNSpid:\t7\nThreads:\t3\n"), [7, 7], "other threads go on");
    }

    #[test]
    fn a_hiding_proc_is_seen() {
        assert!(!hides_processes("proc /proc proc rw,relatime 0 0\n/dev/x / ext4 hidepid=2 0 0"));
        assert!(!hides_processes("proc /proc proc rw,hidepid=off 0 0"));
        assert!(hides_processes("proc /proc proc rw,hidepid=invisible 0 0"));
        assert!(hides_processes("proc /proc proc rw,relatime,hidepid=2 0 0"));
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_line_of_the_table() {
        let line = |near, inode| ["0:", near, "x", "01", "x", "x", "x", "0", "0", inode];
        let near = |s| socket(&line(s, "4711")).map(|(near, _)| near.to_string());
        assert_eq!(near("0100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(near("00000000000000000000000001000000:1F90").as_deref(), Some("[::1]:8080"));
        assert_eq!(near("0000000000000000FFFF00000100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(near("0100007F"), None);
        assert_eq!(socket(&line("0100007F:1F90", "x")), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_host() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let address = near.local_addr().unwrap();
        let host = Host::look().unwrap();
        assert!(host.is_held(address) && host.is_ours(address));
        assert!(host.lives(std::process::id()));
        drop(near);
        let host = Host::look().unwrap();
        assert!(!host.is_held(address) && !host.is_ours(address), "half closed, and nobody's");
        drop(far);

        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(Host::look().unwrap().lives(child.id()));
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while Host::look().unwrap().lives(child.id()) {
            assert!(std::time::Instant::now() < deadline, "dead, though not buried");
        }
        child.wait().unwrap();
    }
}
