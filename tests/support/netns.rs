//! A network that swallows packets: two network namespaces, joined by a cable that can be cut without either end
//! noticing.
//!
//! A namespace lives as long as a shell that was started in it, which reads from a pipe that only this process holds.
//! So nothing of it outlives this process, however that ends. It needs root, and `ip`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Two namespaces and the cable between them.
pub struct Cable {
    pub near: Namespace,
    pub far: Namespace,
}

/// One end of the cable, and a `lo` of its own. Or one without both.
pub struct Namespace {
    /// Its address on the cable.
    pub address: &'static str,
    holder: Child,
    net: File,
}

/// The addresses of the two ends. (TEST-NET-1: nobody has them.)
const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";
/// Nobody's hardware address.
const NOBODY: &str = "02:00:00:00:00:01";

impl Cable {
    /// Lays the cable; or says why that cannot be done here.
    pub fn lay() -> Result<Cable, String> {
        let cable = Cable { near: Namespace::make(NEAR)?, far: Namespace::make(FAR)? };
        let far = cable.far.holder.id().to_string();
        cable.near.ip(&["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", &far])?;
        for end in [&cable.near, &cable.far] {
            end.ip(&["address", "add", &format!("{}/24", end.address), "dev", "cable"])?;
            end.ip(&["link", "set", "cable", "up"])?;
            end.ip(&["link", "set", "lo", "up"])?;
        }
        Ok(cable)
    }

    /// From now on every packet is lost, in both directions, and nobody is told: each end sends to a machine that is
    /// not there.
    pub fn cut(&self) {
        for (end, other) in self.ends() {
            end.ip(&["neighbour", "replace", other.address, "lladdr", NOBODY, "dev", "cable", "nud", "permanent"])
                .expect("a cable that was laid");
        }
    }

    /// Packets pass again.
    pub fn mend(&self) {
        for (end, other) in self.ends() {
            end.ip(&["neighbour", "delete", other.address, "dev", "cable"]).expect("a cable that was laid");
        }
    }

    fn ends(&self) -> [(&Namespace, &Namespace); 2] {
        [(&self.near, &self.far), (&self.far, &self.near)]
    }
}

impl Namespace {
    /// One without any network, the loopback interface included; or says why that cannot be had here.
    pub fn without_network() -> Result<Namespace, String> {
        Namespace::make("")
    }

    fn make(address: &'static str) -> Result<Namespace, String> {
        let mut holder = Command::new("unshare")
            .args(["--net", "/bin/sh", "-c", "echo; read _"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot run unshare: {e}"))?;
        let mut line = String::new();
        let said = BufReader::new(holder.stdout.take().expect("a pipe")).read_line(&mut line);
        if !matches!(said, Ok(1..)) {
            let mut reason = String::new();
            let _ = holder.stderr.take().expect("a pipe").read_to_string(&mut reason);
            let _ = holder.wait();
            return Err(reason.trim().to_owned());
        }
        let net = File::open(format!("/proc/{}/ns/net", holder.id())).map_err(|e| format!("no namespace: {e}"))?;
        Ok(Namespace { address, holder, net })
    }

    /// Does `work` on a thread inside. The sockets, threads and processes that it makes belong inside as well.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            move_into_link_name_space(self.net.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("whoever made a namespace may enter it");
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn ip(&self, args: &[&str]) -> Result<(), String> {
        let output = self.run(|| Command::new("ip").args(args).output()).map_err(|e| format!("cannot run ip: {e}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("ip {}: {}", args.join(" "), said.trim())) }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}
