//! A soak: pools of PostgreSQL connections under load and faults, for as long as one likes, from a seed.
//!
//! Rounds follow each other. In each one or two pools are built with settings that are drawn, used by threads that do
//! what users do, good and bad, while faults strike and operators give orders; then all is calm, and every slot must
//! serve; or it is closed in the midst of it. A judge compares what the server sees with what the pools say throughout.
//! After each round this process has not a thread, a file descriptor or (after a warm-up) a page of memory more than
//! before, and the server not a connection.
//!
//! `MILLPOND_SOAK_SECONDS=3600` goes on for so long (default 45), `MILLPOND_SOAK_SEED=7` draws as that seed does. Threads
//! being what they are, the same seed draws the same and need not meet the same.

#![cfg(all(feature = "postgres", target_os = "linux"))]

#[path = "../support/mod.rs"]
mod support;

mod faults;
mod journal;
mod judge;
mod lane;
mod process;
mod users;
mod world;

use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use journal::{Dice, Journal};
use lane::Lane;
use process::Process;
use support::{SOON, alone, ms, wait_until, within};
use users::User;
use world::World;

/// For how long it goes on, unless told.
const SECONDS: u64 = 45;
/// So much more memory than the most of the first third of the rounds, three at least, means a leak, in kB. Until then
/// all that is kept for good is there, and the allocator has met most of what it will have to keep.
const GROWTH: u64 = 2 * 1024;
/// Has the allocator of the GNU C library keep one arena, instead of one for each of many threads, and give back what is
/// free, whatever was large before. Else the memory grows in steps for hundreds of rounds.
const FRUGAL: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")];
/// Says to the process that soaks that it is that process.
const CHILD: &str = "MILLPOND_SOAK_CHILD";
/// How often a long soak says what it has seen so far.
const ACCOUNT: Duration = Duration::from_secs(600);
/// A round that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// Soaks in a process of its own, since the allocator reads its environment as the process begins.
#[test]
fn pools_under_load_and_faults_keep_every_promise_and_leave_nothing() {
    const NAME: &str = "pools_under_load_and_faults_keep_every_promise_and_leave_nothing";
    if std::env::var_os(CHILD).is_some() {
        return soak_here();
    }
    let _alone = alone();
    let mut command = Command::new(std::env::current_exe().expect("the path of this program"));
    command.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1").envs(FRUGAL);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("this program, once more");
    let lines = BufReader::new(child.stderr.take().expect("its output")).lines();
    lines.map_while(Result::ok).for_each(|line| eprintln!("{line}"));
    let status = child.wait().expect("its end");
    assert!(status.success(), "{status}: its output has the seed");
}

/// Ends this process when the one that started it is gone.
fn end_with_the_parent() {
    let parent = thread::Builder::new().name("parent".into()).spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    parent.expect("a thread that waits for the parent's end");
}

fn soak_here() {
    end_with_the_parent();
    let number =
        |name: &str| std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{name}: a number")));
    let seed = number("MILLPOND_SOAK_SEED").unwrap_or_else(|| RandomState::new().hash_one(0u8) % 1_000_000_000);
    let length = Duration::from_secs(number("MILLPOND_SOAK_SECONDS").unwrap_or(SECONDS));
    let journal = Journal::new(seed);
    listen_for_panics(&journal);
    eprintln!("MILLPOND_SOAK_SEED={seed} MILLPOND_SOAK_SECONDS={}", length.as_secs());
    let (progress, rounds) = mpsc::channel();
    let soak = thread::Builder::new().name("soak".into()).spawn({
        let journal = Arc::clone(&journal);
        move || soak(&journal, length, &progress)
    });
    let mut hangs = false;
    loop {
        match rounds.recv_timeout(PATIENCE) {
            Ok(text) => eprintln!("{text}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                journal.flaw("it hangs");
                hangs = true;
                break;
            }
        }
    }
    if !hangs && soak.expect("a thread for the soak").join().is_err() {
        journal.flaw("the soak itself panicked");
    }
    eprintln!("{}", journal.account());
    if journal.is_flawed() {
        journal.show();
        panic!("MILLPOND_SOAK_SEED={seed} failed");
    }
}

/// A thread of a pool that panics may end the process: then this is all that is seen.
fn listen_for_panics(journal: &Arc<Journal>) {
    let (before, journal) = (std::panic::take_hook(), Arc::clone(journal));
    std::panic::set_hook(Box::new(move |info| {
        if thread::current().name().is_some_and(|name| name.starts_with("soak-")) {
            journal.flaw(format_args!("a thread of a pool panicked: {info}"));
            journal.show();
        }
        before(info);
    }));
}

/// All rounds, and what they leave.
fn soak(journal: &Arc<Journal>, length: Duration, progress: &mpsc::Sender<String>) {
    let mut dice = Dice::new(journal.seed);
    let world = World::begin(journal);
    let mut measured = Vec::new();
    world.order("SELECT 1");
    let before = Process::now();
    let mut told = Duration::ZERO;
    while journal.elapsed() < length && !journal.is_flawed() {
        let n = measured.len();
        // Several rounds in a short soak; longer and shorter ones in a long one.
        let longest = if length > Duration::from_secs(300) && dice.one_in(4) { 40_000 } else { 6_000 };
        let time = dice.between(3_000, longest).min(length.saturating_sub(journal.elapsed()));
        round(&world, n, time, &mut dice);
        world.order("TRUNCATE soak");
        world.proxy.cut();
        let mut now = Process::now();
        let as_before = wait_until(within(SOON), || {
            now = Process::now();
            (now.threads, now.files, world.proxy.open()) == (before.threads, before.files, 0)
        });
        if !as_before {
            journal.flaw(format_args!("{now:?}, at first {before:?}, links {}", world.proxy.open()));
        }
        measured.push(now);
        let _ = progress.send(format!("round {n} of {time:.1?}: {now:?}"));
        if journal.elapsed() > told + ACCOUNT {
            told = journal.elapsed();
            let _ = progress.send(format!("after {told:.0?}\n{}", journal.account()));
        }
    }
    let warm = measured.iter().take(measured.len().div_ceil(3).max(3)).map(|process| process.resident).max();
    if let (Some(warm), Some(last)) = (warm, measured.last()) {
        let _ = progress.send(format!("at first {before:?}, at the end {last:?}, {warm} kB in the first third"));
        if last.resident > warm + GROWTH {
            journal.flaw(format_args!("{} kB of memory, in the first third {warm} kB", last.resident));
        }
    }
    journal.most("the machine stood still for", world.heart.longest());
}

/// One or two pools, from their beginning to their end.
fn round(world: &World, n: usize, time: Duration, dice: &mut Dice) {
    world.refused.store(false, SeqCst);
    let names: &[&str] = if dice.one_in(3) { &["a", "b"] } else { &["a"] };
    let lanes: Vec<Lane> = names.iter().map(|name| Lane::build(world, format!("soak-{n}{name}"), dice)).collect();
    let (begun, judged, returned) = (Instant::now(), AtomicBool::new(false), AtomicBool::new(false));
    // Whether they end in calm, or in the midst of it.
    let calm = !dice.one_in(3);
    thread::scope(|scope| {
        let (judge, faults) = (thread::Builder::new().name("judge".into()), thread::Builder::new());
        judge.spawn_scoped(scope, || judge::watch(world, &lanes, &judged)).expect("a thread for the judge");
        let (late, kept) = mpsc::channel();
        let late_thread = thread::Builder::new().name("late".into());
        let late_thread = late_thread.spawn_scoped(scope, || users::return_late(kept, &returned)).expect("a thread");
        let mut threads = Vec::new();
        for lane in &lanes {
            for user in 0..3 + dice.roll(4) {
                let name = format!("{}-{user}", lane.name);
                let user = User { world, lane, name, dice: dice.other(), late: late.clone(), turns: 0 };
                let thread = thread::Builder::new().name("user".into());
                threads.push(thread.spawn_scoped(scope, || user.work()).expect("a thread for a user"));
            }
        }
        drop(late);
        let struck = AtomicBool::new(false);
        let (mut own, mut closing) = (dice.other(), dice.other());
        thread::scope(|inner| {
            let faults = faults.name("faults".into()).spawn_scoped(inner, || {
                while !struck.load(SeqCst) && !world.journal.is_flawed() {
                    thread::sleep(own.between(30, 400));
                    faults::strike(world, &lanes, &mut own);
                }
            });
            let _ = wait_until(begun + time, || world.journal.is_flawed());
            if !calm {
                lanes.iter().for_each(|lane| lane.close(world, &mut closing));
                thread::sleep(ms(100));
            }
            struck.store(true, SeqCst);
            faults.expect("a thread for the faults").join().expect("the faults");
        });
        lanes.iter().for_each(|lane| lane.over.store(true, SeqCst));
        threads.into_iter().for_each(|thread| thread.join().expect("a user"));
        returned.store(true, SeqCst);
        late_thread.join().expect("what was returned late");
        if calm && !world.journal.is_flawed() {
            lanes.iter().for_each(|lane| lane.heals(world));
        }
        judged.store(true, SeqCst);
    });
    lanes.iter().for_each(|lane| lane.close(world, dice));
    if !world.journal.is_flawed() {
        lanes.iter().for_each(|lane| lane.is_gone(world));
    }
}
