//! Debian's `promtool` and `prometheus`, and what they are given to scrape.

use crate::support::{SOON, wait_until, within};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use tempfile::TempDir;

/// Where this program is, or why the test cannot be made.
pub(crate) fn find(program: &str) -> Result<PathBuf, String> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| path.is_file());
    found.ok_or_else(|| format!("there is no `{program}`: apt-get install prometheus"))
}

/// Runs `promtool` with this input: whether it was content, and what it said.
pub(crate) fn promtool(program: &Path, arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    pipe.write_all(input.as_bytes()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// A file of this repository.
pub(crate) fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

// -------------------------------------------------------------------------------------------------- a target

/// Serves a page over HTTP, until it is dropped.
pub(crate) struct Endpoint {
    pub(crate) addr: SocketAddr,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    pub(crate) fn serve(kind: &'static str, page: impl Fn() -> String + Send + 'static) -> Endpoint {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (addr, over) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let is_over = Arc::clone(&over);
        let thread = thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let _ = answer(stream, kind, &page);
            }
        });
        Endpoint { addr, over, thread: Some(thread) }
    }
}

fn answer(mut stream: TcpStream, kind: &str, page: &impl Fn() -> String) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SOON))?;
    let head = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    if head.count() == 0 {
        return Ok(());
    }
    let body = page();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body.as_bytes())
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the loop.
        let _ = TcpStream::connect(self.addr);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// What is served there.
pub(crate) fn fetch(addr: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let body = reply.split_once("\r\n\r\n").map(|(_, body)| body.to_string());
    body.ok_or_else(|| std::io::Error::other("no HTTP"))
}

// -------------------------------------------------------------------------------------------------- the server

/// Starts `prometheus`, and ends it when its own input ends: however this process does.
const WATCHDOG: &str = r#"
    trap '' HUP INT TERM
    "$@" >"$LOG" 2>&1 </dev/null &
    pid=$!
    read -r _
    kill -KILL "$pid"
    wait "$pid"
"#;

/// A Prometheus on a loopback port, with a folder of its own.
pub(crate) struct Prometheus {
    addr: SocketAddr,
    watchdog: Child,
    dir: TempDir,
}

impl Prometheus {
    /// Starts one that scrapes these targets, each under its name as the job, twice a second, and alerts by these rules.
    ///
    /// # Panics
    ///
    /// If it does not start: with its own words.
    pub(crate) fn start(program: &Path, rules: &str, targets: &[(&str, SocketAddr)]) -> Prometheus {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut config = "global: { scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms }\n\
                          rule_files: [rules.yml]\nscrape_configs:\n"
            .to_string();
        for (job, addr) in targets {
            config += &format!("  - {{ job_name: {job}, static_configs: [{{ targets: ['{addr}'] }}] }}\n");
        }
        std::fs::write(path("rules.yml"), rules).unwrap();
        std::fs::write(path("prometheus.yml"), config).unwrap();
        // (Between this and its start another could take the port. It then says so, and the test fails.)
        let addr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "sh"])
            .arg(program)
            .arg(format!("--config.file={}", path("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .arg(format!("--web.listen-address={addr}"))
            .env("LOG", path("log"))
            .stdin(Stdio::piped())
            // (A shell says that what it waits for was killed.)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Prometheus { addr, watchdog, dir };
        let is_ready = || fetch(addr, "/-/ready").is_ok_and(|body| body.contains("is Ready"));
        assert!(wait_until(within(SOON), is_ready), "Prometheus does not start: {}", prometheus.log());
        prometheus
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn ask(&self, path: &str) -> Value {
        let reply = fetch(self.addr, path).unwrap_or_else(|e| panic!("{path}: {e}: {}", self.log()));
        let reply: Value = serde_json::from_str(&reply).unwrap_or_else(|e| panic!("{path}: {e}: {reply}"));
        assert_eq!(reply["status"], "success", "{path}: {reply}");
        reply["data"].clone()
    }

    /// The alerts that fire: by name, and the job that they fire for.
    pub(crate) fn alerts(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let data = self.ask("/api/v1/alerts");
        let firing = data["alerts"].as_array().unwrap().iter().filter(|alert| alert["state"] == "firing");
        firing.map(|alert| (text(&alert["labels"]["alertname"]), text(&alert["labels"]["job"]))).collect()
    }

    /// What the alerts of this name say that fire or are about to.
    pub(crate) fn descriptions(&self, name: &str) -> Vec<String> {
        let data = self.ask("/api/v1/alerts");
        let of_name = data["alerts"].as_array().unwrap().iter().filter(|alert| alert["labels"]["alertname"] == name);
        of_name.map(|alert| alert["annotations"]["description"].as_str().unwrap().to_string()).collect()
    }

    /// How many series this finds now.
    pub(crate) fn series(&self, query: &str) -> usize {
        let encoded: String = query.bytes().map(|b| format!("%{b:02x}")).collect();
        self.ask(&format!("/api/v1/query?query={encoded}"))["result"].as_array().unwrap().len()
    }

    /// Why a target cannot be scraped, as it sees it.
    pub(crate) fn complaints(&self) -> String {
        let data = self.ask("/api/v1/targets");
        let targets = data["activeTargets"].as_array().unwrap().iter();
        targets.map(|t| format!("{}: {}\n", t["labels"]["job"], t["lastError"])).collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}
