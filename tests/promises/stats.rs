//! P8: what a pool can be seen doing: counters and gauges, rows, warnings of leaks, log records.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

use crate::direct::Direct;
use crate::fake::{Act, Call, Fake};
use crate::support::{
    Database, EPSILON, Logged, Proxy, SEEN, SOON, Server, alone, beside_others, capture, logged, ms, slack, wait_until,
    within,
};
use crossbeam_channel::{Sender, bounded, unbounded};
use log::{Level, LevelFilter};
use millpond::event::{CheckinEvent, CheckoutEvent, HandleEvent};
use millpond::{CloseReason, ConnectionState, Manage, Pool, PooledConnection, Returned, Stats, Validate};
use postgres::NoTls;

#[track_caller]
fn assert_within(what: Duration, from: Duration, to: Duration) {
    assert!(from <= what && what <= to, "{what:?} is not within {from:?} and {to:?}");
}

/// Waits for a fact of the statistics.
#[track_caller]
fn see<M: Manage>(pool: &Pool<M>, fact: impl Fn(&Stats) -> bool) {
    assert!(wait_until(within(SOON), || fact(&pool.stats())), "{}", pool.stats());
}

// ---------------------------------------------------------------------------------------------------- numbers

/// All that a pool does, once or so, and each of it counted where it belongs.
#[test]
fn counters() {
    let _beside = beside_others();
    let fake = Fake::new();
    let builder = Pool::builder().name("counters").max_size(3).max_waiting(1).validate(Validate::Always);
    let pool = builder.connection_timeout(SOON).build(fake.direct()).unwrap();
    let s = pool.stats();
    assert_eq!((s.name.as_str(), s.max_size, s.closed), ("counters", 3, false));
    // What `build` did to get there is nobody's use.
    assert_eq!((s.checkouts, s.waits, s.opens, s.idle, s.size()), (0, 0, 1, 1, 1));
    assert_eq!((s.wait_time.count(), s.usage_time.count(), s.open_time.count()), (0, 0, 1));

    // Checked out: the first after a check, the others after an open.
    let [a, b, c] = [0; 3].map(|_| pool.get().unwrap());
    let s = pool.stats();
    assert_eq!((s.checkouts, s.waits, s.opens, s.in_use, s.idle), (3, 3, 3, 3, 0));

    // One waits in vain, and one more is not let in.
    thread::scope(|s| {
        let waits = s.spawn(|| pool.get_timeout(ms(100)).map(drop));
        see(&pool, |s| s.waiting == 1);
        assert!(pool.get().unwrap_err().is_too_many_waiting());
        assert!(waits.join().unwrap().unwrap_err().is_timeout());
    });
    let s = pool.stats();
    assert_eq!((s.waits, s.timeouts, s.rejected, s.waiting, s.checkouts), (4, 1, 1, 0, 3));
    assert_eq!(s.wait_time.count(), 4);
    assert_within(s.wait_time.max(), ms(100), ms(100) + slack());

    // Each way back.
    let lose = |reason, lose: &dyn Fn(PooledConnection<_>)| {
        let c = pool.get().unwrap();
        let before = pool.stats();
        lose(c);
        see(&pool, |s| s.closing == 0 && s.closes > before.closes);
        let after = pool.stats();
        let one_more = [after.closes - before.closes, after.closed_for(reason) - before.closed_for(reason)];
        assert_eq!(one_more, [1, 1], "{reason:?}: {after}");
    };
    drop((a, b));
    PooledConnection::discard(c);
    see(&pool, |s| s.closing == 0 && s.closed_for(CloseReason::Discarded) == 1);
    pool.resize(1).unwrap();
    see(&pool, |s| (s.idle, s.closing, s.closed_for(CloseReason::Resized)) == (1, 0, 1));
    for verdict in [Returned::Broken, Returned::Discard, Returned::Outdated] {
        let reason = match verdict {
            Returned::Broken => CloseReason::Broken,
            Returned::Discard => CloseReason::Discarded,
            _ => CloseReason::Outdated,
        };
        lose(reason, &|c| {
            fake.verdict(verdict);
            drop(c);
            fake.verdict(Returned::Keep);
        });
    }
    lose(CloseReason::ResetFailed, &|c| {
        fake.verdict(Returned::Reset);
        fake.next(Call::Reset, [Act::Fail]);
        drop(c);
        see(&pool, |s| s.checking == 0);
        fake.verdict(Returned::Keep);
    });
    lose(CloseReason::Panicked, &|c| {
        let user = AssertUnwindSafe(|| {
            let _c = c;
            resume_unwind(Box::new("a user's panic"));
        });
        assert!(catch_unwind(user).map(|(): ()| ()).is_err());
    });
    lose(CloseReason::Recycled, &|c| {
        pool.recycle();
        drop(c);
    });
    drop(pool.get().unwrap());
    fake.next(Call::Validate, [Act::Fail]);
    drop(pool.get().unwrap());
    see(&pool, |s| (s.closing, s.closed_for(CloseReason::Invalid)) == (0, 1));
    let s = pool.stats();
    assert_eq!((s.opens, s.closes, s.failed_opens), (10, 9, 0), "{s}");
    assert_eq!(s.opens, fake.opened());

    // One that fails to open, one that leaves the pool.
    PooledConnection::discard(pool.get().unwrap());
    fake.next(Call::Open, [Act::Fail]);
    let taken = PooledConnection::detach(pool.get().unwrap());
    let s = pool.stats();
    assert_eq!((s.failed_opens, s.detached, s.closes, s.size()), (1, 1, 10, 0), "{s}");
    drop(taken);

    // And the end.
    drop(pool.get().unwrap());
    let before = pool.stats();
    assert!(pool.close(SOON).is_complete());
    let s = pool.stats();
    assert_eq!((s.closed, s.size(), s.closed_for(CloseReason::Closed)), (true, 0, 1), "{s}");
    assert_eq!(s.closes + s.detached, s.opens, "what was opened is accounted for: {s}");
    assert_eq!(s.closes, CloseReason::ALL.map(|r| s.closed_for(r)).iter().sum::<u64>());
    assert_eq!((s.usage_time.count(), before.checkouts), (s.checkouts, s.checkouts));
    assert_eq!((fake.alive(), fake.opened()), (0, s.opens));
}

/// What closes by itself is counted by its reason, and how late it was is known.
#[test]
fn evictions() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_idle(ms(100)).build(fake.direct()).unwrap();
    see(&pool, |s| s.closed_for(CloseReason::Idle) == 1);
    let late = pool.stats().max_lateness;
    assert!(late <= slack(), "{late:?}");
    drop(pool);
    let pool = Pool::builder().max_lifetime(ms(100)).lifetime_jitter(0.0).build(fake.direct()).unwrap();
    see(&pool, |s| s.closed_for(CloseReason::Lifetime) == 1);
    let late = pool.stats().max_lateness;
    assert!(Duration::ZERO < late && late <= slack(), "{late:?}");
    assert!(pool.stats().to_string().contains("  evictions  at most "), "{}", pool.stats());
}

/// Every state is seen while it lasts, by the counts and by the rows.
#[test]
fn gauges() {
    let _beside = beside_others();
    let fake = Fake::new();
    let builder = Pool::builder().name("gauges").max_size(8).close_timeout(ms(500)).open_timeout(SOON);
    let pool = builder.build(fake.direct()).unwrap();
    let [idle, out, checks, closes] = [0; 4].map(|_| pool.get().unwrap());
    fake.set(Call::Open, Act::Block);
    assert!(pool.get_timeout(ms(50)).unwrap_err().is_timeout());
    fake.wait_inside(Call::Open, 1);
    drop(idle);
    fake.set(Call::Close, Act::Block);
    PooledConnection::discard(closes);
    fake.set(Call::Reset, Act::Block);
    fake.verdict(Returned::Reset);
    drop(checks);
    fake.verdict(Returned::Keep);
    fake.wait_inside(Call::Reset, 1);
    fake.wait_inside(Call::Close, 1);
    assert_eq!(pool.state().connections, 3, "r2d2 counts what is open");
    assert_eq!(pool.state().idle_connections, 1);
    let s = pool.stats();
    assert_eq!((s.idle, s.in_use, s.checking, s.opening, s.closing, s.abandoned), (1, 1, 1, 1, 1, 0), "{s}");
    assert_eq!((s.size(), s.waiting), (5, 0));
    let rows: Vec<_> = pool.connections().iter().map(|row| (row.id, row.state)).collect();
    use ConnectionState::*;
    assert_eq!(rows, [(1, Idle), (2, InUse), (3, Checking), (4, Closing), (5, Opening)]);

    // What takes longer than its limit is abandoned.
    see(&pool, |s| (s.checking, s.closing, s.abandoned, s.abandonments) == (0, 0, 2, 2));
    assert_eq!(pool.stats().closed_for(CloseReason::Abandoned), 1);
    fake.release(Call::Close);
    fake.release(Call::Reset);
    fake.release(Call::Open);
    see(&pool, |s| (s.abandoned, s.idle, s.in_use, s.opening) == (0, 2, 1, 0));
    drop(out);
    assert!(pool.close(SOON).is_complete());
}

/// Times have count, sum, greatest and quantiles, and are about right.
#[test]
fn times() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.set(Call::Open, Act::Last(ms(50)));
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    for _ in 0..9 {
        drop(pool.get().unwrap());
    }
    let checked_out = pool.get().unwrap();
    thread::scope(|s| {
        let waits = s.spawn(|| pool.get().map(drop));
        see(&pool, |s| s.waiting == 1);
        thread::sleep(ms(100));
        drop(checked_out);
        waits.join().unwrap().unwrap();
    });
    let s = pool.stats();
    assert_eq!((s.open_time.count(), s.wait_time.count(), s.usage_time.count()), (1, 1, 11));
    assert_within(s.open_time.max(), ms(50), ms(50) + slack());
    assert_within(s.wait_time.max(), ms(100), ms(100) + slack());
    assert_eq!(s.wait_time.sum(), s.wait_time.mean());
    // In steps of the coarse clock, which are at most 10 ms, unless a busy machine comes late to take one.
    assert_within(s.usage_time.max(), ms(100) - EPSILON, ms(100) + slack());
    assert!(s.usage_time.quantile(0.5) <= ms(20) && s.usage_time.quantile(1.0) == s.usage_time.max(), "{s}");
    assert_within(s.usage_time.sum(), s.usage_time.max(), s.usage_time.max() + slack());
}

// ---------------------------------------------------------------------------------------------------- rows

/// Who has what, since when and from which line of source; what the server calls it.
#[test]
fn rows() {
    let _beside = beside_others();
    let (server, app) = (Database::get(), "stats-rows");
    let pool = Pool::builder().name("rows").max_size(4).build(Direct::new(server.config(app))).unwrap();
    let began = Instant::now();
    let line = line!() + 1;
    let mine = pool.get().unwrap();
    let (give, given) = bounded(0);
    let (end, at_end) = bounded::<()>(0);
    let of_worker = pool.clone();
    let worker = move || {
        let line = line!() + 1;
        let c = of_worker.get_timeout(SOON).unwrap();
        give.send((line, c.1)).unwrap();
        let _ = at_end.recv();
    };
    let worker = thread::Builder::new().name("worker-7".into()).spawn(worker).unwrap();
    let (their_line, theirs) = given.recv().unwrap();
    drop(pool.get().unwrap());
    let try_line = line!() + 1;
    let tried = pool.try_get().unwrap();
    thread::sleep(ms(100));

    let rows = pool.connections();
    let of = |id: u64| rows.iter().find(|row| row.server_id == Some(id)).unwrap();
    let pids: Vec<_> = server.backends(app).iter().map(|b| Some(b.pid as u64)).collect();
    assert_eq!(rows.iter().map(|row| row.server_id).collect::<Vec<_>>(), pids, "the server's own numbers");
    assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [1, 2, 3]);
    let me = thread::current().name().map(|name| format!("'{name}'"));
    for (row, thread, line, uses) in [
        (of(mine.1), me.as_deref(), line, 1),
        (of(theirs), Some("'worker-7'"), their_line, 1),
        (of(tried.1), me.as_deref(), try_line, 2),
    ] {
        assert_eq!((row.state, row.thread.as_deref(), row.uses), (ConnectionState::InUse, thread, uses), "{row}");
        assert_eq!(row.location.map(|at| (at.file(), at.line())), Some((file!(), line)), "{row}");
        // Since a tick of the coarse clock, which is behind.
        assert_within(row.in_use_for().unwrap(), ms(100), began.elapsed() + slack());
        assert!(row.age >= ms(100) && row.idle_for().is_none(), "{row}");
    }
    let info = PooledConnection::info(&mine);
    assert_eq!((info.id, info.server_id, info.location.unwrap().line()), (1, Some(mine.1), line));

    let began = Instant::now();
    drop(tried);
    drop(end);
    worker.join().unwrap();
    thread::sleep(ms(100));
    let rows = pool.connections();
    let row = rows.iter().find(|row| row.server_id == Some(theirs)).unwrap();
    assert_eq!((row.state, row.uses), (ConnectionState::Idle, 1), "{row}");
    assert!(row.thread.is_none() && row.location.is_none() && row.in_use_for().is_none(), "{row}");
    assert_within(row.idle_for().unwrap(), ms(100), began.elapsed() + slack());
    drop(mine);
    assert!(pool.close(SOON).is_complete());
    assert!(pool.connections().is_empty());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

// ---------------------------------------------------------------------------------------------------- texts

/// Numbers become `N`, durations `T`, and the spaces of a table one.
fn masked(text: impl ToString) -> String {
    let text = text.to_string().replace(file!(), "FILE");
    let words = |line: &str| {
        let mut words: Vec<String> = Vec::new();
        for word in line.split_whitespace() {
            let bare = word.trim_end_matches([',', ';', ':', ')']);
            let (number, end) = (bare.trim_start_matches(['#', '(']), &word[bare.len()..]);
            if ["ns", "us", "ms", "s", "min"].contains(&bare) && words.last().is_some_and(|w| w == "N") {
                *words.last_mut().unwrap() = format!("T{end}");
            } else if !number.is_empty() && number.trim_end_matches(')').parse::<f64>().is_ok() {
                words.push(word.replace(number.trim_end_matches(')'), "N"));
            } else if let Some(at) = word.find("FILE:") {
                words.push(format!("{}FILE:L{end}", &word[..at]));
            } else {
                words.push(word.to_owned());
            }
        }
        words.join(" ")
    };
    text.lines().map(words).collect::<Vec<_>>().join("\n")
}

/// What an operator reads.
#[test]
fn texts() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").max_size(4).build(fake.direct()).unwrap();
    assert_eq!(
        masked(pool.stats()),
        "pool 'orders': N of N connections, built T ago\n\
         health ready\n\
         now N idle, N in use; N waiting\n\
         checkouts N; N had to wait, N timed out\n\
         opened N; N failed\n\
         closed N\n\
         waited never\n\
         in use never\n\
         to open N time, mean T, pN T, pN T, max T\n\
         evictions never late"
            .replace("pN T, pN T", "p50 T, p99 T")
    );
    let (a, b) = (pool.get().unwrap(), pool.get().unwrap());
    thread::sleep(ms(20));
    fake.set(Call::Open, Act::Block);
    assert!(pool.get_timeout(ms(10)).unwrap_err().is_timeout());
    drop(a);
    let rows = pool.connections();
    println!("{}\n{rows}", pool.stats());
    assert_eq!(
        masked(&rows),
        "id server id state for age uses thread checked out at\n\
         N N idle T T N - -\n\
         N N in use T T N 'stats::texts' FILE:L\n\
         N - opening T T N - -"
    );
    let lines: Vec<_> = rows.iter().map(masked).collect();
    assert_eq!(
        lines,
        [
            "#N (server id N) idle for T, age T, used N time",
            "#N (server id N) in use for T, age T, used N time, by 'stats::texts' at FILE:L",
            "#N opening for T, age T, used N times"
        ]
    );
    // The columns of the table stand below each other.
    let table = rows.to_string();
    let at = |line: usize, word: &str| table.lines().nth(line).unwrap().find(word).unwrap();
    assert_eq!([at(0, "state"), at(0, "thread")], [at(1, "idle"), at(2, "'stats::texts'")]);

    let report = pool.close(ms(50));
    println!("{report}");
    assert_eq!(
        masked(&report),
        "pool 'orders' not wholly closed after T; threads that have not ended: N; left: \
         #N (server id N) in use for T, age T, used N time, by 'stats::texts' at FILE:L, #N opening for T, age T, used N times"
    );
    drop(b);
    fake.release(Call::Open);
    assert_eq!(masked(pool.close(SOON)), "pool 'orders' closed in T; nothing is left");
    println!("{}", pool.stats());
    assert_eq!(
        masked(pool.stats()),
        "pool 'orders': N of N connections, built T ago, closed\n\
         now N idle, N in use; N waiting\n\
         checkouts N; N had to wait, N timed out\n\
         opened N; N failed\n\
         closed N: N pool closed\n\
         waited N times, mean T, p50 T, p99 T, max T\n\
         in use N times, mean T, p50 T, p99 T, max T\n\
         to open N times, mean T, p50 T, p99 T, max T\n\
         evictions never late"
    );
    assert_eq!(pool.connections().to_string(), "no connections\n");
    for line in pool.stats().to_string().lines() {
        assert!(line.len() <= 120, "too long for a terminal: {line}");
    }
}

// ---------------------------------------------------------------------------------------------------- the log

/// What the pool of this name has logged, without its name and the numbers, and checked for what a record never does.
fn records(pool: &str) -> Vec<(Level, String)> {
    let start = format!("pool '{pool}': ");
    logged(|logged| logged.target.starts_with("millpond"))
        .iter()
        .inspect(|logged| assert_eq!(logged.target, "millpond"))
        .filter_map(|logged| Some((logged, logged.text.strip_prefix(&start)?)))
        .map(|(Logged { level, thread, .. }, text)| {
            assert!(thread.ends_with("-exec"), "`{text}` was logged on {thread}");
            assert!(!text.contains(SECRET) && !text.contains("password="), "a password: {text}");
            assert!(!text.contains("host=") && !text.contains("dbname="), "a connection string: {text}");
            (*level, masked(text))
        })
        .collect()
}

#[track_caller]
fn see_record(pool: &str, level: Level, text: &str) {
    let there = wait_until(within(SOON), || records(pool).contains(&(level, text.to_owned())));
    assert!(there, "no {level} `{text}` in {:#?}", records(pool));
}

const SECRET: &str = "hunter2-s3cret";

/// Once per checkout, with the line of source and the thread; and nothing of those who come back in time.
#[test]
fn leaks() {
    let _beside = beside_others();
    let _log = capture();
    let fake = Fake::new();
    let pool = Pool::builder().name("leaky").leak_threshold(ms(200)).build(fake.direct()).unwrap();
    let of_culprit = pool.clone();
    let line = line!() + 1;
    let culprit = move || of_culprit.get().unwrap();
    let leaked = thread::Builder::new().name("culprit".into()).spawn(culprit).unwrap().join().unwrap();
    let began = Instant::now();
    while began.elapsed() < ms(800) {
        drop(pool.get().unwrap()); // these are none
        thread::sleep(ms(1));
    }
    let warned = || logged(|logged| logged.text.ends_with(": a leak?"));
    let warnings = warned();
    assert_eq!((warnings.len(), pool.stats().leaks), (1, 1), "once: {warnings:?}");
    let Logged { level, text, thread, at, .. } = &warnings[0];
    // Counted from a tick of the coarse clock, which is up to 10 ms behind; the thread had to end, too.
    assert_within(*at - began, ms(200) - EPSILON, ms(200) + slack());
    assert_eq!((*level, thread.as_str()), (Level::Warn, "leaky-exec"));
    let start = "pool 'leaky': #1 has been checked out for ";
    let end = format!(" by thread 'culprit' (ended) at {}:{line}:", file!());
    assert!(text.starts_with(start) && text.contains(&end), "{text}");

    // Once more for the next checkout that lasts too long, of the same connection.
    drop(leaked);
    let again = [pool.get().unwrap(), pool.get().unwrap()];
    see(&pool, |s| s.leaks == 3);
    assert!(wait_until(within(SOON), || warned().len() == 3));
    assert!(warned()[1..].iter().all(|logged| logged.text.contains("by thread 'stats::leaks' at ")), "{:?}", warned());
    assert!(pool.stats().to_string().contains("3 in use for too long"), "{}", pool.stats());
    drop(again);
    assert!(pool.close(SOON).is_complete());
}

/// A life in the log, with a real server: the levels, the words, and never a password.
#[test]
fn a_life_in_the_log() {
    let _beside = beside_others();
    let _log = capture();
    let (server, app) = (Server::shared(), "stats-log");
    let proxy = Proxy::to(server.addr());
    let mut config: postgres::Config = proxy.conninfo(app).parse().unwrap();
    config.password(SECRET);
    let builder = Pool::builder().name("life").max_size(3).open_timeout(ms(200)).connection_timeout(SOON);
    let pool = builder.build(Direct::new(config.clone())).unwrap();
    see_record("life", Level::Info, "open (max_size N, min_idle N, max_idle T, max_lifetime T)");
    see_record("life", Level::Debug, "opened #N (server id N) in T");

    PooledConnection::discard(pool.get().unwrap());
    see_record("life", Level::Debug, "closed #N: discarded, age T");
    drop(pool.get().unwrap());
    server.terminate(app);
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
    let mut c = pool.get().unwrap();
    assert!(c.0.simple_query("").is_err());
    drop(c);
    see_record("life", Level::Debug, "closed #N: broken, age T");
    pool.recycle();
    see_record("life", Level::Info, "recycled: every connection is replaced");

    // Nobody listens, nobody answers.
    proxy.refuse();
    assert!(pool.get_timeout(ms(20)).is_err());
    let refused = |(level, text): &(Level, String)| {
        *level == Level::Warn && text.starts_with("cannot open #N: error connecting to server: ")
    };
    assert!(wait_until(within(SOON), || records("life").iter().any(refused)), "{:#?}", records("life"));
    // In this order: nobody is let in who would be served.
    proxy.silent(true);
    proxy.accept();
    assert!(pool.get_timeout(ms(300)).is_err());
    see_record("life", Level::Warn, "abandoned opening #N, which took longer than T");
    proxy.silent(false);
    proxy.cut();

    // The end is told, and what is left of the pool.
    let in_use = pool.get_timeout(SOON).unwrap();
    let line = line!() + 1;
    thread::scope(|s| s.spawn(|| pool.close(ms(50))).join().unwrap());
    let closing = format!("closing: `close` was called ({}:{line}:", file!());
    let told = |start: &str| !logged(|l| l.level == Level::Info && l.text.contains(start)).is_empty();
    assert!(wait_until(within(SOON), || told(&closing)), "{:#?}", records("life"));
    let left = "not wholly closed after T; left: #N (server id N) in use for T, age T, used N time, by 'stats::a_life_in_the_log' at FILE:L (aborted)";
    see_record("life", Level::Warn, left);
    drop(in_use);
    see_record("life", Level::Debug, "closed #N: pool closed, age T");
    assert!(pool.close(SOON).is_complete());
    see_record("life", Level::Info, "closed in T; nothing is left");
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);

    // In order, as far as it is one.
    let all = records("life");
    assert!(all[0].1.starts_with("open (") && all[1].1.starts_with("opened #N"), "{all:#?}");
    assert!(all.iter().all(|(level, _)| *level <= Level::Debug), "{all:#?}");

    // The same, with a server that wants a password: it is wrong, and said to be; not what it is.
    let hba = server.socket_dir().join("data/pg_hba.conf");
    let trusting = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(&hba, format!("host all guarded 127.0.0.1/32 password\n{trusting}")).unwrap();
    server.connect().batch_execute("CREATE ROLE guarded LOGIN PASSWORD 'right'; SELECT pg_reload_conf()").unwrap();
    config.user("guarded");
    assert!(wait_until(within(SOON), || config.connect(NoTls).is_err()), "the server does not ask for passwords");
    for permanent in [true, false] {
        let error = if permanent {
            Pool::builder().name("guarded").build(Direct::new(config.clone())).map(drop).unwrap_err()
        } else {
            let manager = r2d2_postgres::PostgresConnectionManager::new(config.clone(), NoTls);
            Pool::builder().name("guarded").connection_timeout(ms(100)).build(manager).map(drop).unwrap_err()
        };
        assert!(!error.to_string().contains(SECRET) && !format!("{error:?}").contains(SECRET), "{error:?}");
        let text = "cannot open #N: db error: FATAL: password authentication failed for user \"guarded\"";
        let text = if permanent { format!("{text} (will not be tried again soon)") } else { text.to_owned() };
        see_record("guarded", Level::Warn, &text);
    }
    std::fs::write(&hba, trusting).unwrap();
    server.connect().batch_execute("DROP ROLE guarded; SELECT pg_reload_conf()").unwrap();
}

/// With the log off nothing is logged, and nothing has to be.
#[test]
fn silence() {
    let _alone = alone();
    let _log = capture();
    log::set_max_level(LevelFilter::Warn);
    let fake = Fake::new();
    let pool = Pool::builder().name("quiet").build(fake.direct()).unwrap();
    PooledConnection::discard(pool.get().unwrap());
    fake.next(Call::Open, [Act::Fail]);
    drop(pool.get().unwrap());
    assert!(pool.close(SOON).is_complete());
    see_record("quiet", Level::Warn, "cannot open #N: Open failed on purpose");
    assert_eq!(records("quiet").len(), 1, "{:?}", records("quiet"));
}

/// What an error of a pool of secrets prints, in every form.
#[test]
fn no_secret_in_an_error_or_in_debug() {
    let _beside = beside_others();
    let mut config = postgres::Config::new();
    config.user("somebody").password(SECRET).host("127.0.0.1").port(1);
    let pool = Pool::builder().name("secret").build_unchecked(Direct::new(config));
    let error = pool.get_timeout(ms(50)).map(drop).unwrap_err();
    let texts = [
        error.to_string(),
        format!("{error:?}"),
        format!("{:?}", error.cause()),
        format!("{pool:?}"),
        format!("{:?}", pool.guard().grace(Duration::ZERO)),
        format!("{:?}", pool.stats()),
        pool.close(ms(1)).to_string(),
    ];
    assert!(texts.iter().all(|text| !text.contains(SECRET)), "{texts:?}");
}

/// An event of a checkout says how long it was waited for, and one of a return for how long it was in use.
#[test]
fn events_tell_the_wait_and_the_hold() {
    #[derive(Debug)]
    struct Tell(Sender<(&'static str, Duration)>);
    impl HandleEvent for Tell {
        fn handle_checkout(&self, event: CheckoutEvent) {
            let _ = self.0.send(("out", event.duration()));
        }
        fn handle_checkin(&self, event: CheckinEvent) {
            let _ = self.0.send(("in", event.duration()));
        }
    }
    const HOLD: Duration = ms(200);
    let _beside = beside_others();
    let fake = Fake::new();
    let (tell, told) = unbounded();
    let pool = Pool::builder().max_size(1).event_handler(Box::new(Tell(tell))).build(fake.direct()).unwrap();
    // Longer than anything is waited for or in use, were it counted from the pool's birth.
    thread::sleep(HOLD * 3);
    let first = pool.get().unwrap();
    let while_told: Vec<_> = told.try_iter().collect();
    assert_eq!(while_told.last(), Some(&("out", Duration::ZERO)), "{while_told:?}");
    let before = pool.stats().waits;
    thread::scope(|s| {
        let second = s.spawn(|| {
            let got = pool.get().unwrap();
            thread::sleep(HOLD);
            drop(got);
        });
        while pool.stats().waits == before {
            thread::yield_now();
        }
        thread::sleep(HOLD);
        drop(first);
        second.join().unwrap();
    });
    let told: Vec<_> = told.try_iter().collect();
    let kinds: Vec<_> = told.iter().map(|event| event.0).collect();
    // The second may take it before the first has told that it was returned.
    assert!([["in", "out", "in"], ["out", "in", "in"]].contains(&kinds[..].try_into().unwrap()), "{told:?}");
    for (kind, duration) in told {
        let about = HOLD - EPSILON..=HOLD * 2;
        assert!(about.contains(&duration), "{kind} after {duration:?}");
    }
    assert!(pool.close(ms(1_000)).is_complete());
}
