//! A PostgreSQL server of this program's own, which goes when the program does, however that ends.
//!
//! A shell keeps it: it makes a folder, is told over a pipe to start and to stop the server, and when the pipe ends, as
//! it does with this process, it stops the server and removes the folder.

use crate::Failure;
use postgres::{Client, Config, NoTls};
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Far longer than the server takes to start on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers each order with one line. `$1`: the server's folder, `$2`: that of its programs, `$3`: its port; what follows
/// is for `initdb`. An answer that nobody reads any more must not end the shell before it has removed the folder.
const KEEPER: &str = r#"
    trap '' PIPE
    dir=$1 programs=$2 port=$3 pid=
    shift 3
    # Nobody else may look into it.
    umask 077
    mkdir "$dir" && cd "$dir" || exit
    while read -r order; do
        answer=done
        case $order in
        init) "$programs/initdb" "$@" >log 2>&1 </dev/null || answer=failed ;;
        start)
            "$programs/postgres" -D data -k "$dir" -p "$port" -c listen_addresses=127.0.0.1 -c shared_buffers=16MB \
                -c fsync=off -c dynamic_shared_memory_type=mmap >>log 2>&1 </dev/null &
            pid=$! ;;
        stop) kill -INT $pid; wait $pid; pid= ;;
        esac
        echo $answer
    done
    if [ -n "$pid" ]; then
        # One that has only begun to start does not hear it. (`wait` is over when it has ended, and then so is the loop.)
        while kill -QUIT $pid; do sleep 0.1; done 2>/dev/null &
        wait $pid
        wait
    fi
    cd / && rm -rf "$dir"
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
    /// What whoever logs in is told.
    password: Arc<Mutex<String>>,
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
        // Short, for a unix socket's path has little room; and a folder of root's is closed to the server's user.
        let dir = PathBuf::from(format!("/tmp/notes-{}", secret()?));
        let port = free_port()?;
        let mut shell = shell(user)
            .args(["-c", KEEPER, "keeper"])
            .args([&dir, &programs])
            .arg(port.to_string())
            .args(INITDB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let orders = shell.stdin.take();
        let answers = BufReader::new(shell.stdout.take().ok_or("a shell without output")?);
        let keeper = Mutex::new(Keeper { shell, orders, answers });
        let private = Private { dir, port, password: Arc::new(Mutex::new(secret()?)), keeper };
        private.keeper().order("init").map_err(|e| format!("initdb: {e}\n{}", private.log()))?;
        private.start_again()?;
        let password = private.password();
        private.admin()?.batch_execute(&format!("CREATE ROLE notes LOGIN PASSWORD '{password}'"))?;
        private.admin()?.batch_execute("CREATE DATABASE notes OWNER notes")?;
        Ok(private)
    }

    /// How to connect to it as `notes`.
    pub(crate) fn url(&self) -> String {
        format!("postgres://notes:{}@127.0.0.1:{}/notes", self.password(), self.port)
    }

    fn password(&self) -> String {
        self.password.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Tells the password to whoever logs in, as a store of secrets does.
    pub(crate) fn secrets(&self) -> impl Fn() -> Result<String, Infallible> + Send + Sync + 'static {
        let password = Arc::clone(&self.password);
        move || Ok(password.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone())
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
                return Err(format!("PostgreSQL does not start: {e}\n{}", self.log()).into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Gives the role `notes` a new password, which nobody is told yet.
    pub(crate) fn rotate_password(&self) -> Result<String, Failure> {
        let password = secret()?;
        self.admin()?.batch_execute(&format!("ALTER ROLE notes PASSWORD '{password}'"))?;
        Ok(password)
    }

    /// Whoever logs in is told this one from now on.
    pub(crate) fn tell_password(&self, password: String) {
        *self.password.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = password;
    }

    /// The superuser, over the unix socket, whose folder only the server's user may enter.
    fn admin(&self) -> Result<Client, postgres::Error> {
        Config::new().host_path(&self.dir).port(self.port).user("postgres").dbname("postgres").connect(NoTls)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
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
        self.answers.read_line(&mut answer)?;
        match answer.trim_end() {
            "" => Err("the shell that keeps the database has ended".into()),
            "done" => Ok(()),
            other => Err(other.into()),
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

/// A shell as the server's user, deaf to the terminal's Ctrl-C, and to the environment's settings for PostgreSQL.
fn shell(user: Option<User>) -> Command {
    let mut command = Command::new("/bin/sh");
    command.current_dir("/").env("LC_ALL", "C").process_group(0);
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
