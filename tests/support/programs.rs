//! Where PostgreSQL's programs are, and as whom they run.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names the folder of the server's programs, for tests on another version than the one that is installed.
pub const POSTGRES: &str = "MILLPOND_POSTGRES";

/// The folder that holds `initdb` and `postgres`: the one that [`POSTGRES`] names, or else the first of the usual ones.
///
/// # Panics
///
/// If there is none, with the command that installs PostgreSQL and the folders that were looked into. A folder that is
/// named must be right: a test of one version that runs on another would say nothing.
pub fn find() -> PathBuf {
    if let Some(folder) = named(POSTGRES) {
        return find_in(&[folder]);
    }
    let mut candidates = Vec::new();
    if let Some(path) = std::env::var_os("PATH") {
        candidates.extend(std::env::split_paths(&path));
    }
    // Debian keeps the server's programs out of PATH.
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output() {
        candidates.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    for (parent, prefix, rest) in [
        ("/usr/lib/postgresql", "", "bin"),         // Debian, Ubuntu
        ("/usr", "pgsql-", "bin"),                  // PostgreSQL's own RPMs
        ("/usr/libexec", "postgresql", ""),         // Alpine
        ("/opt/homebrew/opt", "postgresql", "bin"), // Homebrew
        ("/usr/local/opt", "postgresql", "bin"),    // Homebrew on Intel
        ("/usr/local/pgsql", "bin", ""),            // built from source
    ] {
        candidates.extend(newest_first(Path::new(parent), prefix).map(|folder| folder.join(rest)));
        candidates.push(Path::new(parent).join(format!("{prefix}*")).join(rest)); // for the message
    }
    find_in(&candidates)
}

/// What this variable names. It may be set and empty, which names nothing.
pub fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|name| !name.is_empty()).map(PathBuf::from)
}

/// As [`find`], in these folders only.
pub fn find_in(candidates: &[PathBuf]) -> PathBuf {
    let complete = |folder: &&PathBuf| ["initdb", "postgres"].iter().all(|program| folder.join(program).is_file());
    candidates.iter().find(complete).cloned().unwrap_or_else(|| {
        let looked_in: Vec<_> = candidates.iter().map(|folder| folder.display().to_string()).collect();
        panic!(
            "no PostgreSQL server found. Install one, on Debian and Ubuntu with\n\n    apt-get install postgresql\n\n\
             or name a database in DATABASE_URL, for the tests that do not stop its server. \
             Looked for `initdb` and `postgres` in: {}",
            looked_in.join(", ")
        )
    })
}

/// The entries of `parent` that begin with `prefix`, the highest version first.
fn newest_first(parent: &Path, prefix: &str) -> impl Iterator<Item = PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches(['-', '@']);
            Some((version.parse().unwrap_or(0), entry.path()))
        })
        .collect();
    found.sort();
    found.into_iter().rev().map(|(_, path)| path)
}

/// A user's numbers in `/etc/passwd`.
#[derive(Clone, Copy, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

impl User {
    /// Whom the server runs as: `None` for whoever runs the tests, somebody harmless if that is root, because
    /// PostgreSQL refuses to be run by root.
    pub fn for_server() -> Option<User> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd says whom the server may run as");
        let user = ["postgres", "nobody"].into_iter().find_map(|name| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut numbers = line.split(':').skip(2).map(str::parse);
            Some(User { uid: numbers.next()?.ok()?, gid: numbers.next()?.ok()? })
        });
        Some(user.expect("root cannot run PostgreSQL, and /etc/passwd knows neither `postgres` nor `nobody`"))
    }
}

/// A command of the server's: run in `dir` as `user`, deaf to the environment's PostgreSQL settings and to the
/// terminal's Ctrl-C, which is meant for the tests.
pub fn command(program: impl AsRef<Path>, dir: &Path, user: Option<User>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.current_dir(dir).env("LC_ALL", "C").process_group(0);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    if let Some(User { uid, gid }) = user {
        command.uid(uid).gid(gid);
    }
    command
}

/// An example of this crate, which `cargo test` has built beside the tests.
///
/// # Panics
///
/// If it was not built, or before its sources were last changed: an old one would be tested in vain.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program");
    let folder = test.ancestors().nth(2).expect("target/debug").join("examples");
    let program = folder.join(name);
    let again = "`cargo test` builds the examples, `cargo test --test NAME` does not: run `cargo build --examples --all-features`";
    let built = |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified());
    let when = built(&program).unwrap_or_else(|e| panic!("{}: {e}. {again}", program.display()));
    // Beside a program cargo leaves the list of what it was built from.
    let sources = fs::read_to_string(folder.join(format!("{name}.d"))).unwrap_or_default();
    for source in sources.split_whitespace().skip(1).map(PathBuf::from) {
        assert!(!built(&source).is_ok_and(|t| t > when), "{} is newer than {name}. {again}", source.display());
    }
    program
}
