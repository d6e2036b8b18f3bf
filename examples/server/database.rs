//! A PostgreSQL server of this program's own, which goes when the program does, however that ends.
//!
//! A shell keeps it: it is told over a pipe to start and to stop the server, and when the pipe ends, as it does with
//! this process, it stops the server and removes its folder.

use crate::Failure;
use postgres::{Client, Config, NoTls};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

/// Far longer than the server takes to start on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers each order with one line. `$1`: the server's folder, `$2`: its program, `$3`: its port.
const KEEPER: &str = r#"
    cd "$1" || exit
    while read -r order; do
        case $order in
        start)
            "$2" -D data -k "$1" -p "$3" -c listen_addresses=127.0.0.1 -c shared_buffers=16MB -c fsync=off \
                -c dynamic_shared_memory_type=mmap >>log 2>&1 </dev/null &
            pid=$! ;;
        stop) kill -INT $pid; wait $pid; pid= ;;
        esac
        echo done
    done
    if [ -n "$pid" ]; then kill -QUIT $pid; wait $pid; fi
    cd / && rm -rf "$1"
"#;

/// Fast instead of safe: nothing in it is meant to last.
const INITDB: &[&str] = &[
    "--pgdata=data",
    "--username=postgres",
    "--auth-local=trust",
    "--auth-host=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
];

/// A server that listens on a loopback port, with a role and a database `notes`.
pub(crate) struct Private {
    /// Where its data, its log and its unix socket are. Nobody else may look into it.
    dir: PathBuf,
    port: u16,
    password: String,
    keeper: Mutex<Keeper>,
}

struct Keeper {
    shell: Child,
    /// `None` only when it is dropped.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Private {
    pub(crate) fn start() -> Result<Private, Failure> {
        let programs = programs()?;
        let user = user()?;
        let dir = folder(user)?;
        let made = run_as(user, &programs.join("initdb"), &dir).args(INITDB).output();
        let made = made.map_err(|e| format!("initdb does not run: {e}"))?;
        if !made.status.success() {
            let _ = fs::remove_dir_all(&dir);
            return Err(format!("initdb failed: {}", String::from_utf8_lossy(&made.stderr)).into());
        }
        let port = free_port()?;
        let mut shell = run_as(user, Path::new("/bin/sh"), &dir)
            .args(["-c", KEEPER, "keeper"])
            .args([&dir, &programs.join("postgres")])
            .arg(port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let orders = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().ok_or("a shell without output")?);
        let keeper = Mutex::new(Keeper { shell, orders, answers });
        let private = Private { dir, port, password: secret()?, keeper };
        private.start_again()?;
        let password = &private.password;
        private.admin()?.batch_execute(&format!("CREATE ROLE notes LOGIN PASSWORD '{password}'"))?;
        private.admin()?.batch_execute("CREATE DATABASE notes OWNER notes")?;
        Ok(private)
    }

    /// How to connect to it as `notes`.
    pub(crate) fn url(&self) -> String {
        format!("postgres://notes:{}@127.0.0.1:{}/notes", self.password, self.port)
    }

    /// Stops it as an operator would: sessions are told, and ended.
    pub(crate) fn stop(&self) -> Result<(), Failure> {
        self.keeper().order("stop")
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn start_again(&self) -> Result<(), Failure> {
        self.keeper().order("start")?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(e) = self.admin() {
            if Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                return Err(format!("PostgreSQL does not start: {e}\n{log}").into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Gives the role `notes` a password that nobody is told.
    pub(crate) fn rotate_password(&self) -> Result<(), Failure> {
        Ok(self.admin()?.batch_execute(&format!("ALTER ROLE notes PASSWORD '{}'", secret()?))?)
    }

    /// Gives it back the one that is known.
    pub(crate) fn restore_password(&self) -> Result<(), Failure> {
        Ok(self.admin()?.batch_execute(&format!("ALTER ROLE notes PASSWORD '{}'", self.password))?)
    }

    /// The superuser, over the unix socket, whose folder only the server's user may enter.
    fn admin(&self) -> Result<Client, postgres::Error> {
        Config::new().host_path(&self.dir).port(self.port).user("postgres").dbname("postgres").connect(NoTls)
    }

    fn keeper(&self) -> std::sync::MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Keeper {
    fn order(&mut self, order: &str) -> Result<(), Failure> {
        let orders = self.orders.as_mut().ok_or("the shell has ended")?;
        writeln!(orders, "{order}")?;
        let mut answer = String::new();
        match self.answers.read_line(&mut answer)? {
            0 => Err("the shell that keeps the database has ended".into()),
            _ => Ok(()),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.shell.wait();
    }
}

/// The folder that holds `initdb` and `postgres`. Debian and others keep them out of `PATH`.
fn programs() -> Result<PathBuf, Failure> {
    let mut folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        folders.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    for (parent, begins, rest) in [
        ("/usr/lib/postgresql", "", "bin"),         // Debian, Ubuntu
        ("/usr", "pgsql-", "bin"),                  // PostgreSQL's own RPMs
        ("/usr/libexec", "postgresql", ""),         // Alpine
        ("/opt/homebrew/opt", "postgresql", "bin"), // Homebrew
        ("/usr/local/opt", "postgresql", "bin"),    // Homebrew on Intel
        ("/usr/local", "pgsql", "bin"),             // from source
    ] {
        let mut versions: Vec<_> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(begins))
            .collect();
        let number = |name: &String| name[begins.len()..].trim_start_matches(['-', '@']).parse().unwrap_or(0_u32);
        versions.sort_by_key(|name| std::cmp::Reverse(number(name)));
        folders.extend(versions.iter().map(|version| Path::new(parent).join(version).join(rest)));
    }
    let complete = |folder: &PathBuf| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    folders.into_iter().find(complete).ok_or_else(|| {
        "no PostgreSQL server is installed (on Debian: `apt-get install postgresql`); or name one in DATABASE_URL"
            .into()
    })
}

/// The numbers of a user and its group.
#[derive(Clone, Copy)]
struct User(u32, u32);

/// Whom the server runs as, if not as who runs this: PostgreSQL refuses to be run by root.
fn user() -> Result<Option<User>, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd")?;
    let find = |name: &&str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2).map(|n| n.parse().ok());
        Some(User(numbers.next()??, numbers.next()??))
    };
    let user = ["postgres", "nobody"].iter().find_map(find);
    user.map(Some).ok_or_else(|| "root may not run PostgreSQL, and there is no user `postgres` or `nobody`".into())
}

/// A folder that only the server's user may enter.
fn folder(user: Option<User>) -> Result<PathBuf, Failure> {
    use std::os::unix::fs::{DirBuilderExt, chown};
    // Short, for a unix socket's path has little room; and a folder of root's is closed to the server's user.
    let dir = PathBuf::from(format!("/tmp/notes-{}", secret()?));
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    if let Some(User(uid, gid)) = user {
        chown(&dir, Some(uid), Some(gid))?;
    }
    Ok(dir)
}

/// A command of the server's: in its folder, as its user, deaf to the terminal's Ctrl-C, and to the environment's
/// settings for PostgreSQL.
fn run_as(user: Option<User>, program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env("LC_ALL", "C").process_group(0).stdin(Stdio::null());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    if let Some(User(uid, gid)) = user {
        command.uid(uid).gid(gid);
    }
    command
}

/// Below the ports that the system gives to clients: while the server is stopped, a client that keeps trying could
/// otherwise be given this very port, and so connect to itself.
fn free_port() -> Result<u16, Failure> {
    let first = std::process::id() % 10_000;
    let mut ports = (0..10_000).map(|i| 20_000 + ((first + i) % 10_000) as u16);
    ports.find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()).ok_or_else(|| "no free port".into())
}

/// What nobody can guess, in letters and digits.
fn secret() -> Result<String, Failure> {
    let mut bytes = [0; 12];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
