//! P4: close closes, and the guard does it whatever way it goes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crate::direct::Direct;
use crate::fake::{Act, Call, DirectFake, Fake, run, take};
use crate::support::{
    Database, EPSILON, Proxy, SEEN, SOON, Server, beside_others, ms, slack, threads_named, wait_until, watched,
    watched_alone, within,
};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use millpond::error::Closed;
use millpond::{
    CloseReport, ConnectionState, Error, ErrorKind, HandleError, Pool, PoolGuard, PooledConnection, Validate,
};
use postgres::NoTls;
use postgres::error::SqlState;

type Pg = r2d2_postgres::PostgresConnectionManager<NoTls>;

fn stock(conninfo: &str) -> Pg {
    Pg::new(conninfo.parse().expect("an address"), NoTls)
}

#[track_caller]
fn closed(error: Error) -> Closed {
    match error.kind() {
        ErrorKind::Closed(closed) => closed.clone(),
        _ => panic!("not closed, but: {error}"),
    }
}

/// A thread takes a moment to end, and the system to say so.
#[track_caller]
fn assert_threads(pool: &str, expected: &[&str]) {
    let mut seen = Vec::new();
    let there = wait_until(within(SEEN), || {
        seen = threads_named(&format!("{pool}-"));
        seen == expected
    });
    assert!(there, "threads of the pool: {seen:?}, expected {expected:?}");
}

#[track_caller]
fn assert_within(what: Duration, from: Duration, to: Duration) {
    assert!(from <= what && what <= to, "{what:?} is not within {from:?} and {to:?}");
}

// ---------------------------------------------------------------------------------------------------- the guard goes

/// How the guard goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    OnReturn,
    OnPanic,
    FromAnotherThread,
    OwningJoinHandles,
    OwningRayon,
    OwningEndless,
}

/// What becomes of the connections in use.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Returned,
    Kept,
}

const GRACE: Duration = ms(800);
/// How long those who use the pool take to end when they are told to.
const LAST_WORK: Duration = ms(100);

/// Threads that work until `jobs` is gone, and a little longer. Each then says when it ended and whether it found the
/// pool closed.
struct Team {
    jobs: Option<Sender<()>>,
    queue: Receiver<()>,
    ended: Sender<(Instant, bool)>,
    ends: Receiver<(Instant, bool)>,
}

impl Team {
    fn new() -> Team {
        let ((jobs, queue), (ended, ends)) = (unbounded(), unbounded());
        Team { jobs: Some(jobs), queue, ended, ends }
    }

    fn work(&self, pool: &Pool<Pg>) -> impl FnOnce() + Send + 'static {
        let (pool, queue, ended) = (pool.clone(), self.queue.clone(), self.ended.clone());
        move || {
            for () in queue {}
            thread::sleep(LAST_WORK);
            let _ = ended.send((Instant::now(), pool.is_closed()));
        }
    }
}

/// Two connections are in use, eight threads wait, one connect hangs, and a guard is dropped.
fn the_guard_goes(way: Way, fate: Fate) {
    println!("{way:?}, {fate:?}");
    let (server, app) = (Server::shared(), format!("close-{way:?}-{fate:?}"));
    let proxy = Proxy::to(server.addr());
    let name = format!("guard{}{}", way as u8, fate as u8);
    let pool = Pool::builder().name(&name).max_size(3).build(stock(&proxy.conninfo(&app))).unwrap();

    let (hears, heard) = unbounded();
    let (end, at_end) = bounded::<()>(0);
    let (ready, is_ready) = bounded(0);
    let of_holder = pool.clone();
    let holder = move || {
        let line = line!() + 1;
        let both = [0; 2].map(|_| of_holder.get().unwrap());
        ready.send((line, both.each_ref().map(|c| PooledConnection::info(c).id))).unwrap();
        match fate {
            Fate::Returned => {
                heard.recv().unwrap();
                thread::sleep(LAST_WORK);
            }
            Fate::Kept => assert!(at_end.recv().is_err()),
        }
    };
    let holder = thread::Builder::new().name("holder".into()).spawn(holder).unwrap();
    let (held_at, checked_out) = is_ready.recv().unwrap();

    proxy.silent(true);
    let wait = || {
        let (pool, hears) = (pool.clone(), hears.clone());
        move || {
            let error = pool.get().map(drop).expect_err("a connection out of nowhere");
            let at = Instant::now();
            hears.send(()).unwrap();
            (at, error)
        }
    };
    let waiters: Vec<_> = (0..8).map(|_| thread::spawn(wait())).collect();
    let staged = || {
        let s = pool.stats();
        (s.in_use, s.waiting, s.opening, proxy.accepted()) == (2, 8, 1, 3)
    };
    assert!(wait_until(within(SOON), staged), "{}", pool.stats());

    // ---- the guard goes
    let guard_line = line!() + 1;
    let guard = || pool.guard().grace(GRACE);
    let mut team = Team::new();
    // When it began to go, when it was gone, and when the pool began to close.
    let (began, gone, closing) = match way {
        Way::OnReturn => {
            let main = || {
                let _guard = guard();
                Instant::now()
            };
            let began = main();
            (began, Instant::now(), began)
        }
        Way::OnPanic => {
            let main = || {
                let _guard = guard();
                resume_unwind(Box::new(Instant::now()))
            };
            let payload = catch_unwind(AssertUnwindSafe(main)).map(|_: ()| ()).unwrap_err();
            let gone = Instant::now();
            let began = *payload.downcast().unwrap();
            (began, gone, began)
        }
        Way::FromAnotherThread => {
            let guard = guard();
            let elsewhere = thread::spawn(move || {
                let began = Instant::now();
                drop(guard);
                (began, Instant::now())
            });
            let (began, gone) = elsewhere.join().unwrap();
            (began, gone, began)
        }
        Way::OwningJoinHandles => {
            let threads: Vec<_> = (0..2).map(|_| thread::spawn(team.work(&pool))).collect();
            let guard = guard().owning(threads);
            assert_eq!(guard.len(), 2, "it derefs to what it owns");
            team.jobs = None;
            let began = Instant::now();
            drop(guard);
            let gone = Instant::now();
            let ends: Vec<_> = team.ends.try_iter().collect();
            assert!(ends.len() == 2 && !ends[0].1 && !ends[1].1, "the pool was open to the workers' end: {ends:?}");
            (began, gone, ends[1].0)
        }
        Way::OwningRayon => {
            let rayon = rayon::ThreadPoolBuilder::new().num_threads(2).thread_name(|i| format!("my-rayon-{i}"));
            let rayon = rayon.build().unwrap();
            (0..2).for_each(|_| rayon.spawn(team.work(&pool)));
            let (told, ends) = unbounded();
            let owned = (team.jobs.take(), rayon);
            let of_team = team.ends.clone();
            let guard = guard().owning_with(owned, move |(jobs, _), deadline| {
                *jobs = None;
                let ends: Vec<_> = (0..2).map_while(|_| of_team.recv_deadline(deadline).ok()).collect();
                let all = ends.len() == 2;
                told.send(ends).unwrap();
                all
            });
            let began = Instant::now();
            drop(guard);
            let gone = Instant::now();
            let ends: Vec<_> = ends.recv().unwrap();
            assert!(ends.len() == 2 && !ends[0].1 && !ends[1].1, "the pool was open to the workers' end: {ends:?}");
            let dropped = wait_until(within(EPSILON), || threads_named("my-rayon").is_empty());
            assert!(dropped, "the workers are dropped last");
            (began, gone, ends[1].0)
        }
        Way::OwningEndless => {
            let endless: Vec<_> = (0..2).map(|_| thread::spawn(team.work(&pool))).collect();
            let guard = guard().owning(endless);
            let began = Instant::now();
            drop(guard);
            let gone = Instant::now();
            assert!(team.ends.is_empty());
            (began, gone, began + GRACE.mul_f64(0.75))
        }
    };

    // ---- and what is left of the pool
    let left = if fate == Fate::Returned { 0 } else { 2 };
    assert_within(gone - began, GRACE, GRACE + slack());
    assert_eq!(server.wait_for(&app, left, began + GRACE + SEEN), left, "backends after the grace");
    assert_threads(&name, &[&format!("{name}-exec")]);
    for waiter in waiters {
        let (at, error) = waiter.join().unwrap();
        assert!(at >= closing || way == Way::OwningEndless, "closed before its workers had finished");
        let late = at.saturating_duration_since(closing);
        assert!(late <= slack(), "a waiter was told only after {late:?}");
        let closed = closed(error);
        assert_eq!((closed.pool.as_str(), closed.by), (name.as_str(), "its guard was dropped"));
        assert_eq!(closed.at.map(|at| (at.file(), at.line())), Some((file!(), guard_line)));
    }
    let report = pool.close(Duration::ZERO);
    let rows: Vec<_> = report.left.iter().map(|row| (row.state, row.id)).collect();
    let hung = (ConnectionState::Opening, 3);
    match fate {
        Fate::Returned => assert_eq!(rows, [hung], "{report}"),
        Fate::Kept => {
            assert_eq!(
                rows,
                [(ConnectionState::InUse, checked_out[0]), (ConnectionState::InUse, checked_out[1]), hung],
                "{report}"
            );
            for row in &report.left[..2] {
                assert_eq!(row.location.map(|at| (at.file(), at.line())), Some((file!(), held_at)), "{row}");
                assert_eq!(row.thread.as_deref(), Some("'holder'"), "{row}");
            }
        }
    }
    assert_eq!((report.threads, report.abandoned, report.is_complete()), (1, 0, false), "{report}");
    let closed = closed(pool.get().map(drop).unwrap_err());
    assert_eq!(closed.by, "its guard was dropped", "the first to close is named");

    // ---- and in the end nothing is
    drop(end);
    holder.join().unwrap();
    assert_eq!(server.wait_for(&app, 0, within(SEEN)), 0, "backends after the return");
    assert_threads(&name, &[&format!("{name}-exec")]);
    proxy.cut();
    assert_threads(&name, &[]);
    assert!(pool.close(Duration::ZERO).is_complete());
    team.jobs = None;
}

#[test]
fn guard_on_return() {
    let _beside = beside_others();
    the_guard_goes(Way::OnReturn, Fate::Returned);
    the_guard_goes(Way::OnReturn, Fate::Kept);
}

#[test]
fn guard_on_panic() {
    let _beside = beside_others();
    the_guard_goes(Way::OnPanic, Fate::Returned);
    the_guard_goes(Way::OnPanic, Fate::Kept);
}

#[test]
fn guard_from_another_thread() {
    let _beside = beside_others();
    the_guard_goes(Way::FromAnotherThread, Fate::Returned);
    the_guard_goes(Way::FromAnotherThread, Fate::Kept);
}

#[test]
fn guard_owning_join_handles() {
    let _beside = beside_others();
    the_guard_goes(Way::OwningJoinHandles, Fate::Returned);
    the_guard_goes(Way::OwningJoinHandles, Fate::Kept);
}

#[test]
fn guard_owning_rayon() {
    let _beside = beside_others();
    the_guard_goes(Way::OwningRayon, Fate::Returned);
    the_guard_goes(Way::OwningRayon, Fate::Kept);
}

#[test]
fn guard_owning_workers_that_never_end() {
    let _beside = beside_others();
    the_guard_goes(Way::OwningEndless, Fate::Returned);
    the_guard_goes(Way::OwningEndless, Fate::Kept);
}

#[test]
fn guard_reports() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("reports").build(fake.direct()).unwrap();
    let (end, at_end) = bounded::<()>(0);
    let endless = thread::spawn(move || at_end.recv());
    let report = pool.guard().grace(ms(200)).owning(Some(endless)).close();
    assert!(!report.workers_finished && !report.is_complete(), "{report}");
    assert!(report.left.is_empty() && report.threads == 0, "{report}");
    // They had three quarters of the grace, and nothing else was left to wait for.
    assert_within(report.elapsed, ms(150), ms(150) + slack());
    drop(end);
    assert_eq!(fake.alive(), 0);
}

#[test]
fn a_panic_in_what_ends_the_workers_is_a_no() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("finish").build(fake.direct()).unwrap();
    struct Grumpy;
    impl Drop for Grumpy {
        fn drop(&mut self) {
            resume_unwind(Box::new("even at the end"));
        }
    }
    let finish = |_: &mut Grumpy, _| resume_unwind(Box::new("not now"));
    // While unwinding already, where a second panic would end the process.
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let _guard = pool.guard().owning_with(Grumpy, finish);
        resume_unwind(Box::new("the first"));
    }));
    let payload = unwound.map(|_: ()| ()).unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&"the first"));
    assert!(pool.is_closed() && fake.alive() == 0);
}

#[test]
fn a_guard_is_one_of_many() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("many").build(fake.direct()).unwrap();
    let (first, second) = (pool.guard(), pool.guard());
    assert!(first.close().is_complete());
    assert!(second.close().is_complete(), "closed before, and still closed");
    let keeps: PoolGuard = Pool::builder().name("keeps").build(fake.direct()).unwrap().guard();
    assert_eq!(fake.alive(), 1, "a guard keeps a pool open that has no other handle");
    drop(keeps);
    assert_eq!(fake.alive(), 0);
}

/// A guard that is told to close says so, and is not said to have been dropped.
#[test]
fn a_guard_that_was_closed_was_not_dropped() {
    let _beside = beside_others();
    let fake = Fake::new();
    for (closed_by, text) in [(true, "its guard was closed"), (false, "its guard was dropped")] {
        let pool = Pool::builder().name("guard").build(fake.direct()).unwrap();
        let line = line!() + 1;
        let guard = pool.guard();
        if closed_by {
            assert!(guard.close().is_complete());
        } else {
            drop(guard);
        }
        let closed = closed(pool.get().map(drop).unwrap_err());
        assert_eq!(closed.by, text);
        assert_eq!(closed.at.map(|at| (at.file(), at.line())), Some((file!(), line)));
    }
}

/// What is left keeps a report from saying that the pool was closed.
#[test]
fn what_is_not_wholly_closed_is_not_called_closed() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("half").build(fake.direct()).unwrap();
    let (end, at_end) = bounded::<()>(0);
    let endless = thread::spawn(move || at_end.recv());
    let report = pool.guard().grace(ms(100)).owning(Some(endless)).close();
    let text = report.to_string();
    assert!(text.starts_with("pool 'half' not wholly closed after "), "{text}");
    assert!(text.ends_with("; workers still run") && !report.is_complete(), "{text}");
    drop(end);
    let text = pool.close(SOON).to_string();
    assert!(text.starts_with("pool 'half' closed in ") && text.ends_with("; nothing is left"), "{text}");
}

/// What one has waited for in vain the next does not wait for again.
#[test]
fn two_guards_in_a_row_take_one_grace() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("row").build(fake.direct()).unwrap();
    let (kept, back) = thread::scope(|s| s.spawn(|| (pool.get().unwrap(), pool.get().unwrap())).join().unwrap());
    let guards = [pool.guard(), pool.guard(), pool.guard()].map(|guard| guard.grace(ms(400)));
    let long = pool.guard().grace(ms(600));
    let [first, second, third] = guards;
    let began = Instant::now();
    let report = first.close();
    assert_within(report.elapsed, ms(400), ms(400) + slack());
    assert_eq!(report.left.len(), 2, "{report}");
    drop(second);
    assert_within(began.elapsed(), ms(400), ms(400) + 2 * EPSILON);

    // What has come back since is another matter.
    fake.set(Call::Close, Act::Last(ms(100)));
    drop(back);
    let report = third.close();
    assert_within(report.elapsed, ms(100), ms(100) + slack());
    assert_eq!((report.left.len(), report.is_complete()), (1, false), "{report}");
    // And so is a longer grace, which is longer by as much.
    let report = long.close();
    assert_within(report.elapsed, ms(200), ms(200) + slack());
    // A closer that asks for a grace of its own has it.
    assert_within(pool.close(ms(100)).elapsed, ms(100), ms(100) + slack());
    drop(kept);
    assert!(pool.close(SOON).is_complete());
    assert_threads("row", &[]);
}

// ---------------------------------------------------------------------------------------------------- close

#[test]
fn idle_ones_go_at_once() {
    let _beside = beside_others();
    let (server, app) = (Database::get(), "close-idle");
    let pool = Pool::builder().name("idle").max_size(17).build(stock(&server.conninfo(app))).unwrap();
    let all: Vec<_> = (0..17).map(|_| pool.get().unwrap()).collect();
    drop(all);
    assert_eq!((pool.stats().idle, server.count(app)), (17, 17));
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
    assert_threads("idle", &[]);
}

#[test]
fn says_who_and_where() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("where").build(fake.direct()).unwrap();
    let line = line!() + 2;
    let closer = pool.clone();
    let closer = move || closer.close(SOON);
    thread::Builder::new().name("janitor".into()).spawn(closer).unwrap().join().unwrap();
    thread::sleep(ms(20));
    let errors = [pool.get(), pool.get_timeout(Duration::ZERO), pool.get_timeout(SOON)];
    for error in errors.map(Result::unwrap_err) {
        let text = error.to_string();
        let closed = closed(error);
        assert_eq!((closed.pool.as_str(), closed.by), ("where", "`close` was called"));
        assert_eq!(closed.at.map(|at| (at.file(), at.line())), Some((file!(), line)));
        assert_eq!(closed.thread, "'janitor' (ended)");
        assert_within(closed.ago, ms(20), ms(20) + slack());
        let start = format!("pool 'where' is closed: `close` was called ({}:{line}:", file!());
        assert!(text.starts_with(&start) && text.contains(") on thread 'janitor' (ended), "), "{text}");
    }
    assert!(pool.try_get().is_none());
}

#[test]
fn twice() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("twice").max_size(1).build(fake.direct()).unwrap();
    let in_use = pool.get().unwrap();
    let (told, is_told) = unbounded();
    let waiter = thread::spawn({
        let pool = pool.clone();
        move || told.send(pool.get().map(drop).unwrap_err()).unwrap()
    });
    assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
    let (first, second) = thread::scope(|s| {
        // One with a short grace, which is over; then one that waits for the return, and then one for which there is
        // nothing left to do.
        let short = s.spawn(|| pool.close(ms(100))).join().unwrap();
        let long = s.spawn(|| (pool.close(SOON), Instant::now()));
        assert!(closed(is_told.recv().unwrap()).by.contains("close"));
        thread::sleep(ms(50));
        let back = Instant::now();
        drop(in_use);
        let (long, at) = long.join().unwrap();
        assert!(at >= back, "it has waited for the return");
        (short, long)
    });
    assert_within(first.elapsed, ms(100), ms(100) + slack());
    assert_eq!((first.waiters, first.left.len(), first.is_complete()), (1, 1, false), "{first}");
    assert!(second.elapsed <= ms(50) + 2 * EPSILON, "{second}");
    assert_eq!((second.waiters, second.is_complete()), (0, true), "{second}");
    let third = pool.close(SOON);
    assert!(third.is_complete() && third.elapsed <= slack(), "{third}");
    waiter.join().unwrap();
    assert_threads("twice", &[]);
}

#[test]
fn two_at_a_time() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("two").max_size(1).build(fake.direct()).unwrap();
    let in_use = pool.get().unwrap();
    let line_up = Barrier::new(3);
    thread::scope(|s| {
        let close = || {
            line_up.wait();
            pool.close(SOON)
        };
        let closers = [s.spawn(close), s.spawn(close)];
        line_up.wait();
        assert!(wait_until(within(SOON), || pool.is_closed()));
        drop(in_use);
        for report in closers.map(|c| c.join().unwrap()) {
            assert!(report.is_complete() && report.elapsed < ms(1_000), "{report}");
        }
    });
    assert_eq!(fake.alive(), 0);
}

/// Every call from which a user may close the pool: it does not wait for the job that it is part of.
#[test]
fn from_a_hook() {
    let _beside = beside_others();
    let calls = [
        Call::Open,
        Call::OnAcquire,
        Call::ServerId,
        Call::HandleAcquire,
        Call::HandleCheckout,
        Call::Returned,
        Call::HandleCheckin,
        Call::Reset,
        Call::Validate,
        Call::HandleRelease,
        Call::OnRelease,
        Call::Close,
        Call::Drop,
        Call::Explain,
        Call::HandleError,
        Call::HandleTimeout,
    ];
    for call in calls {
        let fake = Fake::new();
        fake.verdict(millpond::Returned::Reset);
        let builder = Pool::builder().name("hook").max_size(1).validate(Validate::Always);
        let builder = builder.error_handler(fake.error_handler()).event_handler(fake.event_handler());
        // With a customizer the manager is not asked to close.
        let builder = if call == Call::Close { builder } else { builder.connection_customizer(fake.customizer()) };
        let pool = builder.build_unchecked(fake.direct());

        let (reports, reported) = unbounded();
        let of_hook: Arc<OnceLock<Pool<DirectFake>>> = Arc::default();
        let _ = of_hook.set(pool.clone());
        fake.set(call, run(move || drop(reports.send(of_hook.get().unwrap().close(SOON)))));
        let _ = pool.get_timeout(ms(500)).map(drop);
        assert!(wait_until(within(SOON), || pool.is_closed() || pool.stats().idle == 1));
        let _ = pool.get_timeout(ms(500)).map(PooledConnection::discard);
        fake.next(Call::Open, [const { Act::Fail }; 10]);
        let _ = pool.get_timeout(ms(20));
        let report: CloseReport = reported.recv_timeout(SOON).unwrap_or_else(|_| panic!("{call:?} was not called"));
        assert!(report.elapsed <= slack(), "from {call:?}: {report}");
        let again = pool.close(SOON);
        assert!(again.is_complete() && again.elapsed <= slack(), "after {call:?}: {again}");
        assert_eq!(fake.alive(), 0, "{call:?}");
        assert_threads("hook", &[]);
        fake.set(call, Act::Succeed); // the hook has a handle of the pool
    }
}

/// The job it is part of was abandoned: there is no slot that it would have to wait for, nor one too few.
#[test]
fn from_a_hook_that_was_abandoned() {
    let _beside = beside_others();
    let fake = Fake::new();
    let builder = Pool::builder().name("late").max_size(2).open_timeout(ms(50));
    let pool = builder.connection_customizer(fake.customizer()).build(fake.direct()).unwrap();
    let in_use = pool.get().unwrap();
    let (reports, reported) = unbounded();
    let of_hook = Arc::new(OnceLock::new());
    let _ = of_hook.set(pool.clone());
    fake.set(Call::OnAcquire, Act::Block);
    assert!(pool.get_timeout(ms(50)).unwrap_err().is_timeout());
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 1));
    // What it closes in the end is the pool.
    fake.set(Call::OnRelease, run(move || drop(reports.send(of_hook.get().unwrap().close(ms(300))))));
    fake.release(Call::OnAcquire);
    let report: CloseReport = reported.recv_timeout(SOON).unwrap();
    assert_within(report.elapsed, ms(300), ms(300) + slack());
    assert_eq!(
        (report.left.len(), report.left[0].state),
        (1, ConnectionState::InUse),
        "the one that is in use: {report}"
    );
    fake.set(Call::OnRelease, Act::Succeed);
    drop(in_use);
    assert!(pool.close(SOON).is_complete());
    assert_eq!(fake.alive(), 0);
    assert_threads("late", &[]);
}

/// Who checked a connection out is not who has it: the pool cannot see it move to another thread.
#[test]
fn waits_for_what_the_closing_thread_had_checked_out() {
    let _beside = beside_others();
    for by_guard in [false, true] {
        let fake = Fake::new();
        let pool = Pool::builder().name("given").build(fake.direct()).unwrap();
        let guard = pool.guard().grace(SOON);
        let given = pool.get().unwrap();
        let (go, going) = bounded::<()>(0);
        let worker = thread::spawn(move || {
            going.recv().unwrap();
            thread::sleep(LAST_WORK);
            let back = Instant::now();
            drop(given);
            back
        });
        go.send(()).unwrap();
        let report = if by_guard { guard.close() } else { pool.close(SOON) };
        let at = Instant::now();
        assert!(at >= worker.join().unwrap(), "it has not waited for the worker (by a guard: {by_guard}): {report}");
        assert!(report.is_complete() && report.elapsed <= LAST_WORK + slack(), "{report}");
        assert_eq!(fake.alive(), 0);
        assert_threads("given", &[]);
    }
}

/// So what the thread still holds itself costs the grace, and no more than that.
#[test]
fn waits_no_longer_than_its_grace_for_what_its_own_thread_holds() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.abortable(true);
    let pool = Pool::builder().name("own").build(fake.direct()).unwrap();
    let line = line!() + 1;
    let mine = pool.get().unwrap();
    let report = pool.close(ms(200));
    assert_within(report.elapsed, ms(200), ms(200) + slack());
    assert_eq!((report.left.len(), report.is_complete()), (1, false), "{report}");
    assert_eq!(report.left[0].location.map(|at| (at.file(), at.line())), Some((file!(), line)), "{report}");
    assert_eq!(report.aborted, [report.left[0].id], "{report}");
    drop(mine);
    fake.wait_alive(0);
    assert_threads("own", &[]);
}

/// A hook within a hook: all that goes on on this thread is known to it.
#[test]
fn from_a_hook_within_a_hook() {
    let _beside = beside_others();
    let fake = Fake::new();
    let builder = Pool::builder().name("nested").max_size(2).event_handler(fake.event_handler());
    let pool = builder.connection_customizer(fake.customizer()).build(fake.direct()).unwrap();
    let (reports, reported) = unbounded();
    // The second connection's `on_acquire`, on the executor, checks out the first, of which an event tells.
    let of_hook: Arc<OnceLock<Pool<DirectFake>>> = Arc::default();
    let _ = of_hook.set(pool.clone());
    let of_event = Arc::clone(&of_hook);
    let in_use = pool.get().unwrap();
    fake.set(Call::OnAcquire, run(move || drop(of_hook.get().unwrap().get().unwrap())));
    fake.next(Call::HandleCheckout, [run(move || drop(reports.send(of_event.get().unwrap().close(SOON))))]);
    assert!(pool.try_get().is_none(), "but a second is opened");
    fake.wait_inside(Call::OnAcquire, 1);
    drop(in_use);
    let report: CloseReport = reported.recv_timeout(SOON).unwrap();
    assert!(report.elapsed <= slack(), "{report}");
    fake.set(Call::OnAcquire, Act::Succeed);
    assert!(pool.close(SOON).is_complete());
    assert_eq!(fake.alive(), 0);
}

#[test]
fn grace_zero_waits_for_nothing() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("zero").max_size(3).build(fake.direct()).unwrap();
    let elsewhere = thread::scope(|s| s.spawn(|| pool.get().unwrap()).join().unwrap());
    fake.set(Call::Open, Act::Block);
    let pool = &pool;
    thread::scope(|s| {
        let waiter = s.spawn(|| pool.get().map(drop));
        fake.wait_inside(Call::Open, 1);
        let report = pool.close(Duration::ZERO);
        assert!(report.elapsed <= slack(), "{report}");
        let states: Vec<_> = report.left.iter().map(|row| row.state).collect();
        assert_eq!(states, [ConnectionState::InUse, ConnectionState::Opening], "{report}");
        assert_eq!((report.waiters, report.is_complete()), (1, false), "{report}");
        assert!(report.threads >= 1, "{report}");
        closed(waiter.join().unwrap().unwrap_err());
    });
    let began = Instant::now();
    drop(pool.guard().grace(Duration::ZERO));
    assert!(began.elapsed() <= slack());
    // A second call may wait longer.
    fake.release(Call::Open);
    drop(elsewhere);
    assert!(pool.close(SOON).is_complete());
    assert_eq!(fake.alive(), 0);
}

#[test]
fn the_last_handle_closes_without_waiting() {
    let _beside = beside_others();
    let (server, app) = (Database::get(), "close-last");
    let pool = Pool::builder().name("last").build(stock(&server.conninfo(app))).unwrap();
    let mut in_use = pool.get().unwrap();
    drop(pool.get().unwrap());
    let other = pool.clone();
    drop(pool);
    assert_eq!(server.count(app), 2, "there is another handle");
    let began = Instant::now();
    drop(other);
    assert!(began.elapsed() <= slack());
    assert_eq!(server.wait_for(app, 1, began + SEEN), 1, "the idle one goes");

    // The other one outlives the pool, and works.
    assert_eq!(in_use.query_one("SELECT 7", &[]).unwrap().get::<_, i32>(0), 7);
    assert_threads("last", &[]);
    drop(in_use);
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0, "closed as it came back");
    assert_threads("last", &[]);
}

#[test]
fn a_connection_outlives_its_pool() {
    let _beside = beside_others();
    let (server, app) = (Database::get(), "close-outlives");
    let pool = Pool::builder().name("outlives").build(stock(&server.conninfo(app))).unwrap();
    let (lend, in_use) = bounded(1);
    thread::scope(|s| s.spawn(|| lend.send(pool.get().unwrap()).unwrap()).join().unwrap());
    let mut in_use = in_use.recv().unwrap();
    let report = pool.close(ms(100));
    drop(pool);
    assert_eq!(report.left.len(), 1, "{report}");
    assert!(report.aborted.is_empty(), "the stock manager has nothing to cut it with");
    for n in 0..3 {
        assert_eq!(in_use.query_one("SELECT $1::int4", &[&n]).unwrap().get::<_, i32>(0), n);
    }
    assert_eq!(PooledConnection::info(&in_use).state, ConnectionState::InUse);
    drop(in_use);
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
    assert_threads("outlives", &[]);
}

/// A connect that is in flight when the pool is closed: before and after the end of the grace.
#[test]
fn a_connect_in_flight_is_closed_when_it_arrives() {
    let _beside = beside_others();
    for (app, grace, complete) in [("close-arrives", SOON, true), ("close-late", ms(50), false)] {
        let server = Server::shared();
        let proxy = Proxy::to(server.addr());
        let pool = Pool::builder().name("flight").build_unchecked(stock(&proxy.conninfo(app)));
        proxy.pause();
        thread::scope(|s| {
            let waiter = s.spawn(|| pool.get().map(drop));
            assert!(wait_until(within(SOON), || proxy.accepted() == 1));
            let closer = s.spawn(|| pool.close(grace));
            closed(waiter.join().unwrap().unwrap_err());
            if complete {
                proxy.resume();
            }
            let report = closer.join().unwrap();
            assert_eq!(report.is_complete(), complete, "{report}");
            if !complete {
                assert_eq!(report.left[0].state, ConnectionState::Opening, "{report}");
                assert_threads("flight", &["flight-exec"]);
                proxy.resume();
            }
        });
        assert_threads("flight", &[]);
        assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
        assert_eq!((pool.stats().opening, pool.stats().opens), (0, 1), "it did arrive");
    }
}

/// A manager that can tell how to abort a connection: what is in use is cancelled and aborted when the grace is over.
#[test]
fn what_is_in_use_is_aborted_after_the_grace() {
    let _beside = beside_others();
    let (server, app) = (Database::get(), "close-cut");
    let manager = Direct::new(server.config(app));
    let aborts = Arc::clone(&manager.aborts);
    let pool = Pool::builder().name("cut").build(manager).unwrap();
    let (ready, is_ready) = bounded(0);
    let busy = thread::spawn({
        let pool = pool.clone();
        move || {
            let mut c = pool.get().unwrap();
            ready.send(c.1).unwrap();
            let error = c.0.batch_execute("SELECT pg_sleep(60)").unwrap_err();
            (Instant::now(), error)
        }
    });
    let pid = is_ready.recv().unwrap();
    let running = || server.backends(app).iter().any(|b| b.state == "active");
    assert!(wait_until(within(SOON), running));
    let began = Instant::now();
    let report = pool.close(ms(200));
    assert_within(report.elapsed, ms(200), ms(200) + slack());
    assert_eq!(report.left.iter().map(|row| row.server_id).collect::<Vec<_>>(), [Some(pid)], "{report}");
    assert_eq!(report.aborted, [report.left[0].id], "{report}");
    assert!(report.to_string().ends_with(" (aborted)"), "{report}");
    let (at, error) = busy.join().unwrap();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED), "{error:?}");
    // A process of the server's that is started for it brings the cancel to the one that sleeps.
    assert_within(at - began, ms(200), SOON);
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
    assert!(wait_until(within(SEEN), || aborts.load(SeqCst) == 1), "cancelled first, and then aborted");
    assert_threads("cut", &[]);
}

/// So is whatever hangs in a call of the manager's, if it can be.
#[test]
fn what_hangs_is_aborted_after_the_grace() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.abortable(true);
    let pool = Pool::builder().name("hangs").build(fake.direct()).unwrap();
    let in_use = pool.get().unwrap();
    fake.set(Call::Open, Act::Block);
    assert!(pool.get_timeout(ms(50)).unwrap_err().is_timeout());
    fake.wait_inside(Call::Open, 1);
    fake.set(Call::Close, Act::Block);
    PooledConnection::discard(in_use);
    fake.wait_inside(Call::Close, 1);
    let report = pool.close(ms(100));
    let rows: Vec<_> = report.left.iter().map(|row| (row.id, row.state)).collect();
    assert_eq!(rows, [(1, ConnectionState::Closing), (2, ConnectionState::Opening)], "{report}");
    assert_eq!(report.aborted, [1, 2], "{report}");
    fake.wait_calls(Call::Abort, 2);
    assert_eq!((fake.calls(Call::Abort), fake.calls(Call::Cancel)), (2, 0), "only what is in use is cancelled");
    assert!(pool.close(SOON).is_complete());
    assert_threads("hangs", &[]);
}

/// One close that hangs holds up neither the others nor, past its grace, the caller.
#[test]
fn a_close_that_hangs() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("stuck").max_size(17).build(fake.direct()).unwrap();
    let all: Vec<_> = (0..17).map(|_| pool.get().unwrap()).collect();
    drop(all);
    fake.next(Call::Close, [Act::Block]);
    let report = pool.close(ms(200));
    assert_within(report.elapsed, ms(200), ms(200) + slack());
    assert_eq!((fake.alive(), report.left.len(), report.threads), (1, 1, 1), "{report}");
    assert_eq!(report.left[0].state, ConnectionState::Closing, "{report}");
    fake.release(Call::Close);
    assert!(pool.close(SOON).is_complete());
    assert_eq!(fake.alive(), 0);
    assert_threads("stuck", &[]);
}

/// The thread that returned a connection last keeps nothing of the user's alive: hooks and manager go with the pool.
#[test]
fn hooks_and_manager_go_with_the_pool() {
    let _beside = crate::support::beside_others();
    #[derive(Debug)]
    struct Hook(#[expect(dead_code, reason = "counted")] Arc<()>);
    impl<E> HandleError<E> for Hook {
        fn handle_error(&self, _: E) {}
    }
    let fake = Fake::new();
    let alive = Arc::new(());
    let pools = ["first", "second"].map(|name| {
        let hook = Box::new(Hook(Arc::clone(&alive)));
        Pool::builder().name(name).error_handler(hook).build(fake.direct()).unwrap()
    });
    let late = pools[0].get().unwrap();
    // By turns, and on another thread as well, which does not end before.
    let (go, going) = bounded::<()>(0);
    thread::scope(|s| {
        let [first, second] = pools;
        s.spawn(move || {
            drop(first.get().unwrap());
            drop(second.get().unwrap());
            drop(first.get().unwrap());
            assert!(second.close(SOON).is_complete());
            drop((first, second));
            let _ = going.recv();
        });
        assert!(wait_until(within(SOON), || Arc::strong_count(&alive) == 2), "{}", Arc::strong_count(&alive));
        drop(late);
        assert!(wait_until(within(SOON), || Arc::strong_count(&alive) == 1), "{}", Arc::strong_count(&alive));
        drop(go);
    });
}

/// Two hooks on two threads of the executor, each of which closes the pool.
#[test]
fn two_hooks_that_close_do_not_wait_for_each_other() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).connection_customizer(fake.customizer()).build(fake.r2d2()).unwrap();
        let checked_out = take(&pool, 2);
        let gate = Arc::new(std::sync::Barrier::new(2));
        let reports = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (p, g, r) = (pool.clone(), gate, Arc::clone(&reports));
        fake.set(
            Call::OnRelease,
            run(move || {
                g.wait();
                let report = p.close(Duration::from_secs(3));
                r.lock().unwrap().push(report);
            }),
        );
        checked_out.into_iter().for_each(PooledConnection::discard);
        assert!(wait_until(Instant::now() + SOON, || reports.lock().unwrap().len() == 2));
        fake.release(Call::OnRelease);
        let reports = reports.lock().unwrap();
        assert!(reports.iter().all(|r| r.elapsed < Duration::from_secs(1)), "{reports:#?}");
    });
}

#[test]
fn closes_at_once_with_everything_else() {
    watched_alone(|| {
        for n in 0..150u64 {
            let fake = Fake::new();
            let name = "rush";
            let builder = Pool::builder().name(name).max_size(1 + (n % 4) as u32).min_idle((n % 2) as u32);
            let builder = builder.validate(if n % 3 == 0 { Validate::Always } else { Validate::AfterIdle(ms(1)) });
            let pool = builder.max_lifetime(ms(20)).build(fake.direct()).unwrap();
            if n % 5 == 0 {
                fake.set(Call::Validate, Act::Last(ms(1)));
                fake.set(Call::Open, Act::Last(ms(1)));
            }
            let late = Arc::new(AtomicU64::new(0));
            let users: Vec<_> = (0..6)
                .map(|i| {
                    let (pool, late) = (pool.clone(), Arc::clone(&late));
                    thread::spawn(move || {
                        for k in 0.. {
                            let was_closed = pool.is_closed();
                            let begun = Instant::now();
                            match pool.get_timeout(ms(500)) {
                                Ok(c) => {
                                    assert!(!was_closed, "handed out by a closed pool");
                                    if k % 7 == i {
                                        PooledConnection::discard(c);
                                    }
                                }
                                Err(e) if matches!(e.kind(), ErrorKind::Closed(_)) => break,
                                Err(e) => {
                                    eprintln!("{e}: {:?}", begun.elapsed());
                                    late.fetch_add(1, SeqCst);
                                }
                            }
                            match (k + i) % 9 {
                                0 => pool.resize(1 + (k % 4) as u32).unwrap_or(()),
                                1 => pool.recycle(),
                                2 => drop(pool.try_get()),
                                _ => {}
                            }
                        }
                    })
                })
                .collect();
            thread::sleep(ms(3 + n % 7));
            let begun = Instant::now();
            let closers: Vec<_> = (0..2)
                .map(|i| {
                    let pool = pool.clone();
                    thread::spawn(move || match i {
                        0 => pool.close(SOON),
                        _ => pool.guard().close(),
                    })
                })
                .collect();
            let reports: Vec<_> = closers.into_iter().map(|c| c.join().unwrap()).collect();
            assert!(reports.iter().all(|r| r.is_complete()), "{n}: {reports:?}");
            assert!(begun.elapsed() < Duration::from_secs(1), "{n}: {:?}", begun.elapsed());
            assert_eq!(fake.alive(), 0);
            users.into_iter().for_each(|u| u.join().unwrap());
            assert_eq!(late.load(SeqCst), 0, "{n}");
            assert!(
                wait_until(Instant::now() + ms(200), || threads_named(name).is_empty()),
                "{:?}",
                threads_named(name)
            );
        }
    });
}

/// Two workers find out at the same time that all is lost, each in a hook of its own.
#[test]
fn two_hooks_of_users_that_close_do_not_wait_for_each_other() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(2).event_handler(fake.event_handler()).build(fake.direct()).unwrap();
    let gate = Arc::new(std::sync::Barrier::new(2));
    let (p, g) = (pool.clone(), gate);
    fake.set(
        Call::HandleCheckin,
        crate::fake::run(move || {
            g.wait();
            drop(p.close(Duration::from_secs(3)));
        }),
    );
    let begun = Instant::now();
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let c = pool.get().unwrap();
            thread::spawn(move || drop(c))
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let took = begun.elapsed();
    fake.release(Call::HandleCheckin);
    assert!(took < Duration::from_secs(1), "{took:?}");
}
