//! P8: errors say why, in the words an operator needs.

use std::thread;
use std::time::{Duration, Instant};

use crate::direct::Direct;
use crate::fake::{Act, Call, DirectFake, Fake};
use crate::support::picky::{picky, refused_logins, set_password, with_password};
use crate::support::{
    EPSILON, Proxy, SEEN, SOON, Server, Silent, alone, beside_others, ms, slack, wait_until, watched, within,
};
use crossbeam_channel::{Sender, unbounded};
use millpond::error::Timeout;
use millpond::{Builder, Error, ErrorKind, HandleError, Manage, Pool, PooledConnection, Validate};
use postgres::{Config, NoTls};

type Pg = r2d2_postgres::PostgresConnectionManager<NoTls>;

fn stock(config: Config) -> Pg {
    Pg::new(config, NoTls)
}

#[track_caller]
fn assert_within(what: Duration, from: Duration, to: Duration) {
    assert!(from <= what && what <= to, "{what:?} is not within {from:?} and {to:?}");
}

#[track_caller]
fn refusal<T>(result: Result<T, Error>) -> Error {
    match result {
        Ok(_) => panic!("it came to be"),
        Err(error) => error,
    }
}

#[track_caller]
fn timeout(error: &Error) -> &Timeout {
    match error.kind() {
        ErrorKind::Timeout(timeout) => timeout,
        _ => panic!("no timeout, but: {error}"),
    }
}

/// Durations become `T`, positions in the source `FILE:L`, other numbers `N`.
fn masked(text: &impl ToString) -> String {
    let text = text.to_string().replace(file!(), "FILE");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, from) = rest.split_at(at);
        let end = from.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(from.len());
        let (_, after) = from.split_at(end);
        let unit = [" ns", " us", " ms", " min", " s", " h", " d"].into_iter().find(|unit| {
            let rest = after.strip_prefix(unit);
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
        });
        out += before;
        rest = match unit {
            Some(unit) => {
                out += "T";
                &after[unit.len()..]
            }
            None => {
                out += "N";
                after
            }
        };
    }
    (out + rest).replace("FILE:N:N", "FILE:L")
}

const WORDS: &str = r#"password authentication failed for user "picky""#;

// ---------------------------------------------------------------------------------------------------- refusals

/// r2d2's traits cannot tell what is for good: the cause comes at the deadline, and nobody hammers the server.
#[test]
fn wrong_password_with_the_stock_manager() {
    let _alone = alone();
    let server = picky();
    let before = refused_logins(server);
    let began = Instant::now();
    let manager = stock(with_password(server, "errors-stock", "wrong"));
    let error = refusal(Pool::builder().connection_timeout(ms(1_000)).build(manager));
    assert_within(began.elapsed(), ms(1_000), ms(1_000) + slack());
    assert!(timeout(&error).cause.is_some() && !error.is_exhausted(), "{error}");
    assert!(error.to_string().contains(WORDS), "{error}");
    assert!(error.cause().is_some_and(|c| c.to_string().contains(WORDS) && !c.is_permanent()), "{error:?}");
    // At 0, 50, 150, 350 and 750 ms, or a little later each.
    let logins = refused_logins(server) - before;
    assert!((4..=5).contains(&logins), "{logins} logins in a second");
    thread::sleep(ms(1_200));
    assert_eq!(refused_logins(server) - before, logins, "the pool that could not be built has ended");
}

#[test]
fn wrong_password_with_a_manager_that_can_tell() {
    let _alone = alone();
    let server = picky();
    let before = refused_logins(server);
    let began = Instant::now();
    let error = refusal(Pool::builder().name("p").build(Direct::new(with_password(server, "errors-direct", "wrong"))));
    assert!(began.elapsed() <= SEEN, "after {:?}", began.elapsed());
    assert!(error.is_connect() && error.cause().is_some_and(|c| c.is_permanent()), "{error:?}");
    assert_eq!(error.to_string(), format!("pool 'p' cannot connect: db error: FATAL: {WORDS}"));
    assert_eq!(refused_logins(server) - before, 1);
}

/// Not even if an open that succeeded before it is slow to say so.
#[test]
fn a_refusal_keeps_its_words() {
    let _alone = alone();
    for _ in 0..500 {
        let fake = Fake::new();
        fake.next(Call::Open, [Act::Succeed]);
        fake.set(Call::Open, Act::Refuse);
        let error = refusal(Pool::builder().name("floor").min_idle(3).build(fake.direct()));
        assert_eq!(error.to_string(), "pool 'floor' cannot connect: Open refused on purpose");
        fake.wait_alive(0);
    }
}

/// An open that is abandoned, and fails late, says more than that it was abandoned.
#[test]
fn a_cause_that_comes_late_is_told() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.set(Call::Open, Act::FailAfter(ms(300)));
    let pool = Pool::builder().name("late").open_timeout(ms(100)).build_unchecked(fake.direct());
    let cause = || timeout(&pool.get_timeout(ms(200)).unwrap_err()).cause.as_ref().map(ToString::to_string);
    assert_eq!(cause().as_deref(), Some("no answer to an attempt to connect within 100 ms"));
    assert!(wait_until(within(SOON), || cause().as_deref() == Some("Open failed on purpose")));
}

/// A password is changed under a pool that works.
#[test]
fn a_refusal_is_remembered_and_told_to_all_waiters() {
    let _alone = alone();
    let (server, app) = (picky(), "errors-changed");
    let proxy = Proxy::to(server.addr());
    let mut config: Config = proxy.conninfo(app).parse().unwrap();
    config.user("picky").password("right");
    let pool = || {
        set_password(server, "right");
        let pool = Pool::builder().name("changed").build(Direct::new(config.clone())).unwrap();
        set_password(server, "changed");
        pool
    };

    // While one is alive, they wait for its return.
    let (first, before) = (pool(), refused_logins(server));
    let in_use = first.get().unwrap();
    let (told, tells) = unbounded();
    thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| told.send(first.get_timeout(SOON).map(drop).map_err(|e| e.to_string())).unwrap());
        }
        assert!(wait_until(within(SOON), || refused_logins(server) > before && first.stats().opening == 0));
        let error = refusal(first.get_timeout(ms(100)));
        let holder = &timeout(&error).longest_in_use[0];
        assert_eq!((holder.server_id, timeout(&error).checked_out_here), (Some(in_use.1), 1), "{error}");
        assert!(
            error.to_string().contains("the last attempt to open one failed: db error: FATAL: password"),
            "{error}"
        );
        assert!(tells.is_empty(), "while a connection is alive nobody is sent away");
        drop(in_use);
        (0..3).for_each(|_| assert_eq!(tells.recv_timeout(SOON), Ok(Ok(()))));
    });
    assert!(first.close(SOON).is_complete());

    // The last one dies. All who wait hear of it at once, from one round of logins.
    let (pool, before) = (pool(), refused_logins(server));
    proxy.delay(ms(200));
    let in_use = pool.get().unwrap();
    assert_eq!(server.wait_for(app, 1, within(SOON)), 1);
    assert_eq!(server.terminate(app), 1);
    thread::scope(|s| {
        let wait = || {
            let error = refusal(pool.get_timeout(SOON));
            (Instant::now(), error)
        };
        let waiters: Vec<_> = (0..8).map(|_| s.spawn(wait)).collect();
        assert!(wait_until(within(SOON), || pool.stats().waiting == 8));
        PooledConnection::discard(in_use);
        let told = waiters.into_iter().map(|w| w.join().unwrap());
        let times: Vec<_> = told
            .map(|(at, error)| {
                assert!(error.is_connect() && error.to_string().contains(WORDS), "{error}");
                at
            })
            .collect();
        let spread = *times.iter().max().unwrap() - *times.iter().min().unwrap();
        assert!(spread <= slack(), "{spread:?} between the first and the last");
    });
    assert!(wait_until(within(SOON), || pool.stats().size() == 0));
    let round = refused_logins(server) - before;
    assert!((1..=4).contains(&round), "{round} logins: one round of parallel opens");

    // And during the back-off it is remembered, however many ask.
    let (began, logins) = (Instant::now(), refused_logins(server));
    let mut asked = 0;
    while began.elapsed() < ms(500) {
        let error = refusal(pool.get());
        assert!(error.is_connect(), "{error}");
        assert!(pool.try_get().is_none());
        asked += 1;
    }
    assert!(asked > 100, "{asked}: at once, each of them");
    assert_eq!(refused_logins(server), logins, "no further login");
    assert_eq!(proxy.open(), 0);

    // The password is mended. The operator says so, and need not wait for the back-off's end.
    proxy.delay(Duration::ZERO);
    set_password(server, "right");
    pool.recycle();
    let began = Instant::now();
    pool.get().map(drop).unwrap();
    assert!(began.elapsed() <= ms(100) + slack(), "after {:?}", began.elapsed());
    assert!(pool.close(SOON).is_complete());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

// ---------------------------------------------------------------------------------------------------- build

#[test]
fn build_says_why_not() {
    let _alone = alone();
    // Nobody listens.
    let nobody = Proxy::to(([127, 0, 0, 1], 1).into());
    nobody.refuse();
    let began = Instant::now();
    let builder = Pool::builder().name("nobody").connection_timeout(ms(300));
    let error = refusal(builder.build(stock(nobody.conninfo("errors-nobody").parse().unwrap())));
    assert_within(began.elapsed(), ms(300), ms(300) + slack());
    let text = error.to_string();
    assert!(text.starts_with("pool 'nobody': no connection within 300 ms: "), "{text}");
    assert!(text.contains("onnection refused"), "{text}");
    assert!(!error.is_exhausted());

    // Somebody listens and says nothing.
    let silent = Silent::listen();
    let began = Instant::now();
    let builder = Pool::builder().name("silent").connection_timeout(ms(300));
    let error = refusal(builder.build(stock(silent.conninfo("errors-silent").parse().unwrap())));
    assert_within(began.elapsed(), ms(300), ms(300) + slack());
    assert_eq!(timeout(&error).opening, 1);
    assert_eq!(masked(&error), "pool 'silent': no connection within T: N of N in use, N being opened");
    assert!(!error.is_exhausted());

    // And once it is known that nobody answers, that is the cause.
    let builder = Pool::builder().name("silent").connection_timeout(ms(300)).open_timeout(ms(100));
    let error = refusal(builder.build(stock(silent.conninfo("errors-silent").parse().unwrap())));
    assert!(error.to_string().contains("no answer to an attempt to connect within 100 ms"), "{error}");
    drop(silent);

    // The first connection is not what the manager wants to start with.
    let fake = Fake::new();
    fake.set(Call::Started, Act::Fail);
    let began = Instant::now();
    let error = refusal(Pool::builder().name("started").build(fake.direct()));
    assert!(began.elapsed() <= slack(), "at once, for it will not change: {:?}", began.elapsed());
    assert_eq!(error.to_string(), "pool 'started' cannot connect: Started failed on purpose");
    fake.wait_alive(0);

    // The first one opens, and the rest of the floor does not.
    let fake = Fake::new();
    fake.next(Call::Open, [Act::Succeed]);
    fake.set(Call::Open, Act::Fail);
    let began = Instant::now();
    let builder = Pool::builder().name("floor").min_idle(3).connection_timeout(ms(300));
    let error = refusal(builder.build(fake.direct()));
    assert_within(began.elapsed(), ms(300), ms(300) + slack());
    assert!(timeout(&error).cause.as_ref().is_some_and(|c| c.to_string() == "Open failed on purpose"), "{error}");
    fake.wait_alive(0);
    let fake = Fake::new();
    fake.next(Call::Open, [Act::Succeed]);
    fake.set(Call::Open, Act::Refuse);
    let error = refusal(Pool::builder().name("floor").min_idle(3).build(fake.direct()));
    assert_eq!(error.to_string(), "pool 'floor' cannot connect: Open refused on purpose");
    fake.wait_alive(0);
}

// ---------------------------------------------------------------------------------------------------- settings

const NANOSECOND: Duration = Duration::from_nanos(1);

/// It says how long a `get` waits, and a caller that does not want to wait says so.
#[test]
fn the_shortest_wait_gets_what_is_ready() {
    let _beside = beside_others();
    let fake = Fake::new();
    let builder = || Pool::builder().connection_timeout(NANOSECOND).validate(Validate::Never);
    // What has opened before anybody looks would be taken, however short the wait.
    fake.set(Call::Open, Act::Block);
    let error = refusal(builder().build(fake.direct()));
    assert!(error.is_timeout() && error.to_string().contains("no connection within 1 ns"), "{error}");
    fake.release(Call::Open);
    let pool = builder().min_idle(1).build_unchecked(fake.direct());
    assert!(wait_until(Instant::now() + SOON, || pool.state().idle_connections == 1));
    drop(pool.get().expect("one is ready"));
}

#[test]
fn settings_that_cannot_be() {
    let _beside = beside_others();
    type Set = fn(Builder<DirectFake>) -> Builder<DirectFake>;
    let table: &[(&str, &str, Set)] = &[
        ("max_size", "max_size: is 0, and must be at least 1", |b| b.max_size(0)),
        ("min_idle", "min_idle: is 11, and max_size is 10", |b| b.min_idle(11)),
        ("max_idle", "max_idle: is zero, which keeps nothing idle, and min_idle is 2", |b| {
            b.min_idle(2).max_idle(Duration::ZERO)
        }),
        ("max_lifetime", "max_lifetime: is zero, and must be longer", |b| b.max_lifetime(Duration::ZERO)),
        ("lifetime_jitter", "lifetime_jitter: is 1.5, and must be between 0 and 1", |b| b.lifetime_jitter(1.5)),
        ("lifetime_jitter", "lifetime_jitter: is NaN, and must be between 0 and 1", |b| b.lifetime_jitter(f64::NAN)),
        ("connection_timeout", "connection_timeout: is zero, and must be longer", |b| {
            b.connection_timeout(Duration::ZERO)
        }),
        ("validation_timeout", "validation_timeout: is zero, and must be longer", |b| {
            b.validation_timeout(Duration::ZERO)
        }),
        ("open_timeout", "open_timeout: is zero, and must be longer", |b| b.open_timeout(Duration::ZERO)),
        ("close_timeout", "close_timeout: is zero, and must be longer", |b| b.close_timeout(Duration::ZERO)),
        ("parallel_opens", "parallel_opens: is 0, and must be at least 1", |b| b.parallel_opens(0)),
        ("keepalive", "keepalive: is zero, and must be longer", |b| b.keepalive(Duration::ZERO)),
        ("leak_threshold", "leak_threshold: is zero, and must be longer", |b| b.leak_threshold(Duration::ZERO)),
        // What can be, and cannot be meant.
        ("keepalive", "keepalive: is 1 ns, and must be at least 10.0 ms", |b| b.keepalive(NANOSECOND)),
        ("keepalive", "keepalive: is 9.00 ms, and must be at least 10.0 ms", |b| b.keepalive(ms(9))),
        ("max_lifetime", "max_lifetime: is 1 ns, and must be at least 10.0 ms", |b| b.max_lifetime(NANOSECOND)),
        ("validation_timeout", "validation_timeout: is 1 ns, and must be at least 1.00 ms", |b| {
            b.validation_timeout(NANOSECOND)
        }),
        ("open_timeout", "open_timeout: is 1 ns, and must be at least 1.00 ms", |b| b.open_timeout(NANOSECOND)),
        ("close_timeout", "close_timeout: is 1 ns, and must be at least 1.00 ms", |b| b.close_timeout(NANOSECOND)),
        ("leak_threshold", "leak_threshold: is 1 ns, and must be at least 1.00 ms", |b| b.leak_threshold(NANOSECOND)),
        ("parallel_opens", "parallel_opens: is 1025, and must be at most 1024", |b| b.parallel_opens(1025)),
        ("parallel_opens", "parallel_opens: is 4294967295, and must be at most 1024", |b| {
            b.max_size(100_000).min_idle(100_000).parallel_opens(u32::MAX)
        }),
    ];
    for (setting, text, set) in table {
        let fake = Fake::new();
        let error = refusal(set(Pool::builder()).build(fake.direct()));
        let ErrorKind::Config(config) = error.kind() else { panic!("{setting}: {error}") };
        assert_eq!((config.setting, error.to_string().as_str()), (*setting, *text));
        assert!(error.is_config() && fake.calls(Call::Open) == 0, "before anything is opened");
    }
    // And those that mean something at zero or none are taken.
    let edges: &[Set] = &[
        |b| b.max_idle(Duration::ZERO),
        |b| b.max_idle(None).max_lifetime(None).keepalive(None).leak_threshold(None),
        |b| b.max_waiting(1),
        |b| b.min_idle(None).lifetime_jitter(0.0),
        |b| b.max_size(1).min_idle(1).lifetime_jitter(1.0),
        |b| b.validate(Validate::AfterIdle(Duration::ZERO)),
        |b| b.max_idle(Duration::MAX).max_lifetime(Duration::MAX).connection_timeout(Duration::MAX),
        |b| b.open_timeout(Duration::MAX).close_timeout(Duration::MAX).validation_timeout(Duration::MAX),
        |b| b.keepalive(Duration::MAX).leak_threshold(Duration::MAX),
        |b| b.keepalive(ms(10)).leak_threshold(ms(1)).parallel_opens(1024),
        |b| b.max_idle(NANOSECOND).fair_after(NANOSECOND).validate(Validate::AfterIdle(NANOSECOND)),
        |b| b.max_idle(NANOSECOND).min_idle(2),
    ];
    for (i, set) in edges.iter().enumerate() {
        let fake = Fake::new();
        let pool = set(Pool::builder()).build(fake.direct()).unwrap_or_else(|e| panic!("edge {i}: {e}"));
        drop(pool.get().unwrap());
        drop(pool.get_timeout(Duration::MAX).unwrap());
        assert!(pool.close(SOON).is_complete(), "edge {i}");
    }
}

#[test]
fn a_refused_resize_changes_nothing() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(4).min_idle(2).build(fake.direct()).unwrap();
    let errors = [pool.resize(0), pool.resize(1)].map(|r| r.unwrap_err().to_string());
    assert_eq!(errors, ["max_size: is 0, and must be at least 1", "min_idle: is 2, and max_size is 1"]);
    assert_eq!((pool.max_size(), pool.state().idle_connections), (4, 2));
    let all: Vec<_> = (0..4).map(|_| pool.get().unwrap()).collect();
    assert!(refusal(pool.get_timeout(Duration::ZERO)).is_exhausted());
    drop(all);
    pool.resize(2).unwrap();
    assert_eq!(pool.max_size(), 2);
    fake.wait_alive(2);
    assert!(pool.close(SOON).is_complete());
}

// ---------------------------------------------------------------------------------------------------- timeouts

#[test]
fn a_timeout_names_the_holders() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "errors-holders");
    let pool = Pool::builder().name("orders").max_size(3).build(stock(server.config(app))).unwrap();
    let line = line!() + 1;
    let mine = pool.get().unwrap();
    thread::sleep(EPSILON); // more than the coarse clock is behind, so that the order is known
    let lend = || pool.get().unwrap();
    let (theirs, others) = thread::scope(|s| {
        let worker = |n: u32| thread::Builder::new().name(format!("worker-{n}"));
        let theirs = worker(1).spawn_scoped(s, lend).unwrap().join().unwrap();
        thread::sleep(EPSILON);
        (theirs, worker(2).spawn_scoped(s, lend).unwrap().join().unwrap())
    });
    let began = Instant::now();
    let error = refusal(pool.get_timeout(ms(100)));
    assert_within(began.elapsed(), ms(100), ms(100) + slack());

    assert!(error.is_timeout() && error.is_exhausted() && error.cause().is_none());
    let t = timeout(&error);
    assert_eq!((t.pool.as_str(), t.timeout, t.max_size, t.in_use, t.waiting), ("orders", ms(100), 3, 3, 0));
    assert_eq!(t.checked_out_here, 1);
    let threads: Vec<_> = t.longest_in_use.iter().map(|row| row.thread.clone().unwrap()).collect();
    let me = format!("'{}'", thread::current().name().unwrap());
    assert_eq!(threads, [&me, "'worker-1' (ended)", "'worker-2' (ended)"], "the longest first");
    let lines: Vec<_> = t.longest_in_use.iter().map(|row| row.location.unwrap().line()).collect();
    assert_eq!(lines, [line, line + 2, line + 2]);
    assert!(t.longest_in_use[0].in_use_for().unwrap() >= ms(100) + 2 * EPSILON);
    assert_eq!(
        masked(&error),
        "pool 'orders': no connection within T: all N are in use; N of them checked out by this very thread; \
         in use the longest: #N for T by 'errors::a_timeout_names_the_holders' at FILE:L, #N for T by 'worker-N' (ended) at \
         FILE:L, #N for T by 'worker-N' (ended) at FILE:L"
    );
    drop((mine, theirs, others));
    assert!(pool.close(SOON).is_complete());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

/// What an operator reads, with the numbers masked. One line each, for the log.
#[test]
fn texts() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().name("t").max_size(7).build(fake.direct()).unwrap();

    // Many hold, and some wait beside.
    let all: Vec<_> = (0..7).map(|_| pool.get().unwrap()).collect();
    thread::scope(|s| {
        let waiter = s.spawn(|| pool.get_timeout(SOON).map(drop));
        assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
        let text = masked(&refusal(pool.get_timeout(Duration::ZERO)));
        let holder = "#N for T by 'errors::texts' at FILE:L";
        assert_eq!(
            text,
            format!(
                "pool 't': no connection within N: all N are in use; N of them checked out by this very thread; in use \
                 the longest: {holder}, {holder}, {holder}, {holder}, {holder}; N more wait"
            )
        );
        drop(all);
        waiter.join().unwrap().unwrap();
    });
    assert_eq!(Timeout::MOST_SHOWN, 5);

    // Not all are in use, and what comes next fails.
    fake.set(Call::Open, Act::Fail);
    let in_use = pool.get().unwrap();
    while let Some(c) = pool.try_get() {
        PooledConnection::discard(c);
    }
    fake.wait_alive(1);
    // One that is asked for as soon as there is a slot for it.
    assert!(wait_until(within(SOON), || pool.try_get().is_none() && pool.stats().failed_opens > 0));
    assert_eq!(
        masked(&refusal(pool.get_timeout(ms(30)))),
        "pool 't': no connection within T: N of N in use; N of them checked out by this very thread; in use the longest: #N \
         for T by 'errors::texts' at FILE:L; the last attempt to open one failed: Open failed on purpose"
    );
    PooledConnection::discard(in_use);
    let error = refusal(pool.get_timeout(ms(30)));
    assert_eq!(masked(&error), "pool 't': no connection within T: none can be opened: Open failed on purpose");
    assert!(!error.is_exhausted());
    assert!(pool.close(SOON).is_complete());
    assert_eq!(
        masked(&refusal(pool.get())),
        "pool 't' is closed: `close` was called (FILE:L) on thread 'errors::texts', T ago"
    );

    // Too many wait.
    let fake = Fake::new();
    let pool = Pool::builder().name("t").max_size(1).max_waiting(0).build_unchecked(fake.direct());
    let error = refusal(pool.get());
    assert_eq!(masked(&error), "pool 't': N wait already, and max_waiting is N");
    assert!(error.is_too_many_waiting() && error.is_exhausted());
}

// ---------------------------------------------------------------------------------------------------- outages

/// The server goes and comes back while somebody waits. At its worst: back right after an attempt failed, when the
/// pause between attempts has grown to its greatest.
#[test]
fn served_within_a_second_of_the_return() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "errors-outage");
    let proxy = Proxy::to(server.addr());
    let (fails, failed) = unbounded();
    #[derive(Debug)]
    struct Tell(Sender<()>);
    impl<E> HandleError<E> for Tell {
        fn handle_error(&self, _: E) {
            let _ = self.0.send(());
        }
    }
    let builder = Pool::builder().name("outage").error_handler(Box::new(Tell(fails)));
    let pool = builder.build(stock(proxy.conninfo(app).parse().unwrap())).unwrap();
    proxy.refuse();
    proxy.cut();
    thread::scope(|s| {
        let serve = || {
            // The first finds the connection dead.
            let mut c = pool.get().unwrap();
            if c.simple_query("").is_err() {
                drop(c);
                c = pool.get_timeout(SOON).unwrap();
                c.simple_query("").unwrap();
            }
            Instant::now()
        };
        let waiters: Vec<_> = (0..4).map(|_| s.spawn(serve)).collect();
        // After 0, 50, 150, 350, 750 and 1550 ms or a little later each; then once a second.
        let began = Instant::now();
        while began.elapsed() < ms(2_000) {
            failed.recv_timeout(SOON).unwrap();
        }
        proxy.accept();
        let back = Instant::now();
        for waiter in waiters {
            let late = waiter.join().unwrap().saturating_duration_since(back);
            assert!(late <= ms(1_000) + SEEN, "served only {late:?} after the server's return");
        }
    });
    assert!(pool.close(SOON).is_complete());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

/// As above, with a server that really stops and starts, and says on the way that it is starting up.
#[test]
fn served_within_a_second_of_a_restart() {
    let _alone = alone();
    let (server, app) = (Server::start(), "errors-restart");
    let pool = Pool::builder().name("restart").build(stock(server.config(app))).unwrap();
    server.stop_fast();
    thread::scope(|s| {
        let serve = || {
            let mut c = pool.get().unwrap();
            if c.simple_query("").is_err() {
                drop(c);
                c = pool.get_timeout(SOON).unwrap();
                c.simple_query("").unwrap();
            }
            Instant::now()
        };
        let waiters: Vec<_> = (0..4).map(|_| s.spawn(serve)).collect();
        thread::sleep(ms(1_000)); // the outage
        assert_eq!(pool.stats().waiting, 4);
        let error = refusal(pool.get_timeout(ms(1)));
        assert!(error.to_string().contains("none can be opened: error connecting to server"), "{error}");
        server.start_again();
        let back = Instant::now();
        for waiter in waiters {
            let late = waiter.join().unwrap().saturating_duration_since(back);
            assert!(late <= ms(1_000) + SEEN, "served only {late:?} after the server's return");
        }
    });
    let stats = pool.stats();
    assert!(stats.failed_opens >= 4 && stats.opens <= 5, "{stats}");
    assert!(pool.close(SOON).is_complete());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
}

/// An error is told apart by what it is, and each of its kinds by one question only.
#[test]
fn kinds() {
    let _beside = beside_others();
    fn kind<M: Manage>(result: Result<impl Sized, Error>, _: &Pool<M>) -> [bool; 5] {
        let e = refusal(result);
        // For a server that answers 503: with a `Retry-After`, or without.
        assert_eq!(e.is_timeout() || e.is_too_many_waiting(), e.is_unavailable() || e.is_exhausted(), "{e}");
        assert!(!(e.is_unavailable() && e.is_exhausted()), "{e}");
        [e.is_timeout(), e.is_connect(), e.is_closed(), e.is_too_many_waiting(), e.is_config()]
    }
    let fake = Fake::new();
    fake.set(Call::Open, Act::Fail);
    let pool = Pool::builder().max_waiting(1).build_unchecked(fake.direct());
    assert_eq!(kind(pool.get_timeout(ms(1)), &pool), [true, false, false, false, false]);
    fake.set(Call::Open, Act::Refuse);
    assert_eq!(kind(pool.get_timeout(SOON), &pool), [false, true, false, false, false]);
    assert_eq!(kind(pool.resize(0), &pool), [false, false, false, false, true]);
    pool.close(SOON);
    assert_eq!(kind(pool.get(), &pool), [false, false, true, false, false]);
    let pool = Pool::builder().max_waiting(0).build_unchecked(fake.direct());
    assert_eq!(kind(pool.get(), &pool), [false, false, false, true, false]);
}

/// The shortest lifetime that is accepted, of which a coarse clock leaves nothing, and a server that takes 3 ms to
/// answer.
#[test]
fn one_that_is_too_old_when_it_arrives_says_so() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).max_lifetime(ms(10)).connection_timeout(Duration::from_secs(2));
        fake.set(Call::Open, Act::Last(ms(3)));
        let pool = builder.build_unchecked(fake.r2d2());
        let got = pool.get();
        let error = got.unwrap_err().to_string();
        assert!(error.contains("when its life of at most 10.0 ms was over or about to be"), "{error}");
    });
}
