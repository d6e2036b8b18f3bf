//! P3: `get` keeps its deadline, whatever hangs; a job that hangs is abandoned at its limit; and a short deadline
//! closes nothing.

use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, FakeConn, FakeError, ends_well, take};
use crate::support::{EPSILON, Proxy, SOON, Server, Silent, ms, slack, threads_named, wait_until, watched, within};
use millpond::{Builder, CloseReason, Error, ErrorKind, Manage, Pool, PooledConnection, Returned, Validate};
use postgres::NoTls;
use r2d2_postgres::PostgresConnectionManager;

const HOUR: Duration = Duration::from_secs(3600);

/// What a caller is ready to wait.
const PATIENT: Duration = ms(200);

fn timed<T>(code: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    let value = code();
    (value, begun.elapsed())
}

/// No connection within `PATIENT`, and not later than that.
#[track_caller]
fn nothing_in_time<M: Manage>(pool: &Pool<M>) -> Error {
    let (got, took) = timed(|| pool.get_timeout(PATIENT).map(drop));
    let error = got.expect_err("everything hangs");
    assert!(error.is_timeout(), "{error}");
    assert!(took >= PATIENT && took < PATIENT + slack(), "timed out after {took:?}");
    error
}

/// A connection, without having to wait long for it.
#[track_caller]
fn at_once<M: Manage>(pool: &Pool<M>) -> PooledConnection<M> {
    let (got, took) = timed(|| pool.get_timeout(SOON));
    assert!(took < slack(), "it took {took:?}");
    got.unwrap()
}

/// All that is idle was used last at `since`: it goes in time.
#[track_caller]
fn evicted_in_time<M: Manage>(pool: &Pool<M>, since: Instant, max_idle: Duration) {
    let gone = wait_until(since + max_idle + EPSILON, || pool.state().idle_connections == 0);
    assert!(gone, "after {:?}: {}", since.elapsed(), pool.connections());
    let late = pool.stats().max_lateness;
    assert!(late < slack(), "{late:?} late");
}

// -------------------------------------------------------------------------------------------------- what hangs

/// No attempt to open gets anywhere, from now on.
fn opens_hang<M: Manage<Connection = FakeConn, Error = FakeError>>(
    fake: &Fake,
    call: Call,
    builder: Builder<M>,
    manager: M,
) {
    let max_idle = ms(300);
    let pool = builder.max_size(4).max_idle(max_idle).open_timeout(HOUR).build(manager).unwrap();
    let checked_out = take(&pool, 2);
    fake.set(call, Act::Block);

    nothing_in_time(&pool);
    assert!(fake.inside(call) <= 2, "what was begun for that caller goes on, for the next");
    nothing_in_time(&pool);
    assert!(fake.inside(call) <= 2, "one more, once the first takes longer than usual, and no third");

    // What is returned is checked out again, by a waiter for an open as well.
    thread::scope(|s| {
        let waiter = s.spawn(|| pool.get_timeout(SOON).map(|c| (c.id, Instant::now())));
        assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
        let returned = Instant::now();
        drop(checked_out);
        let (id, got) = waiter.join().unwrap().unwrap();
        assert!(id <= 2 && got < returned + slack(), "#{id}, {:?} after the return", got - returned);
    });
    drop(at_once(&pool));
    evicted_in_time(&pool, Instant::now(), max_idle);
    nothing_in_time(&pool);

    // What arrives in the end is as good as any.
    fake.release(call);
    drop(pool.get_timeout(SOON).unwrap());
    assert_eq!(pool.stats().abandonments, 0);
    ends_well(pool, fake);
}

#[test]
fn a_connect_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        opens_hang(&fake, Call::Open, Pool::builder(), fake.r2d2());
    });
}

#[test]
fn an_open_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        opens_hang(&fake, Call::Open, Pool::builder(), fake.direct());
    });
}

#[test]
fn an_on_acquire_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        opens_hang(&fake, Call::OnAcquire, Pool::builder().connection_customizer(fake.customizer()), fake.r2d2());
    });
}

/// One of three idle connections hangs when it is validated, and the pool may not call that off.
fn a_check_hangs<M: Manage<Connection = FakeConn, Error = FakeError>>(fake: &Fake, manager: M) {
    let max_idle = ms(400);
    let builder = Pool::builder().max_size(4).max_idle(max_idle).validate(Validate::Always);
    let pool = builder.validation_timeout(HOUR).build(manager).unwrap();
    drop(take(&pool, 3));
    fake.next(Call::Validate, [Act::Block]);
    // A waiter does not count on it for long: another is checked beside it.
    drop(pool.get_timeout(PATIENT).expect("the others are well"));
    // (Perhaps more than one, if this machine is slow, but no other hangs.)
    let one_hangs = || (fake.inside(Call::Validate), pool.stats().checking) == (1, 1);
    assert!(wait_until(within(EPSILON), one_hangs), "{}", pool.connections());

    // And so it is with two who wait.
    thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| drop(pool.get_timeout(SOON).unwrap()));
        }
    });
    evicted_in_time(&pool, Instant::now(), max_idle);
    fake.wait_alive(1);
    assert_eq!((pool.state().connections, pool.stats().closed_for(CloseReason::Idle)), (1, 2), "the one that hangs");

    fake.release(Call::Validate);
    drop(pool.get_timeout(SOON).unwrap());
    assert_eq!(pool.stats().abandonments, 0);
    ends_well(pool, fake);
}

#[test]
fn an_is_valid_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        a_check_hangs(&fake, fake.r2d2());
    });
}

#[test]
fn a_validate_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        a_check_hangs(&fake, fake.direct());
    });
}

#[test]
fn a_validate_that_promised_not_to_hang_and_does() {
    watched(|| {
        let fake = Fake::new();
        fake.keeps_limits(true);
        // The promised limit is longer than what the caller of `get` has: it is not relied upon.
        a_check_hangs(&fake, fake.direct());
    });
}

/// Whatever is closed hangs in it, from now on.
fn closes_hang<M: Manage<Connection = FakeConn, Error = FakeError>>(
    fake: &Fake,
    call: Call,
    builder: Builder<M>,
    manager: M,
) {
    let max_idle = ms(200);
    // Without a connection that could be evicted before there is something to see.
    let pool = builder.max_size(6).max_idle(max_idle).close_timeout(HOUR).build_unchecked(manager);
    fake.set(call, Act::Block);
    let mut checked_out = take(&pool, 3);
    let ((), took) = timed(|| PooledConnection::discard(checked_out.pop().unwrap()));
    assert!(took < slack(), "to discard one took {took:?}");
    drop(checked_out);
    evicted_in_time(&pool, Instant::now(), max_idle);
    fake.wait_inside(call, 3);

    // Its slots are taken, the others are not.
    let checked_out = take(&pool, 3);
    let error = nothing_in_time(&pool);
    let ErrorKind::Timeout(why) = error.kind() else { panic!("{error}") };
    assert_eq!((why.in_use, why.closing), (3, 3), "{error}");
    drop(checked_out);
    drop(at_once(&pool));
    evicted_in_time(&pool, Instant::now(), max_idle);
    nothing_in_time(&pool);
    fake.wait_inside(call, 6);
    assert_eq!((fake.inside(call), fake.alive()), (6, 6), "four that hang hold up no fifth");

    fake.release(call);
    drop(pool.get_timeout(SOON).unwrap());
    assert_eq!((fake.most_alive(), pool.stats().abandonments), (6, 0));
    ends_well(pool, fake);
}

#[test]
fn a_drop_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        closes_hang(&fake, Call::Drop, Pool::builder(), fake.r2d2());
    });
}

#[test]
fn a_close_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        closes_hang(&fake, Call::Close, Pool::builder(), fake.direct());
    });
}

#[test]
fn an_on_release_that_hangs() {
    watched(|| {
        let fake = Fake::new();
        closes_hang(&fake, Call::OnRelease, Pool::builder().connection_customizer(fake.customizer()), fake.r2d2());
    });
}

// -------------------------------------------------------------------------------------------------- the limits

/// How long any kind of job may take here.
const LIMIT: Duration = ms(100);

/// A job that began at `begun` is the `nth` to be abandoned, at its limit.
#[track_caller]
fn abandoned<M: Manage>(pool: &Pool<M>, nth: u64, begun: Instant) {
    let done = wait_until(begun + LIMIT + EPSILON, || pool.stats().abandonments == nth);
    assert!(done, "not by {:?}: {}", begun.elapsed(), pool.stats());
}

/// What was abandoned has come back, and is gone.
#[track_caller]
fn found_again<M: Manage>(pool: &Pool<M>, fake: &Fake) {
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());
    assert!(fake.alive() <= u64::from(pool.stats().size()), "{} alive, {}", fake.alive(), pool.stats());
}

#[test]
fn an_open_past_its_limit() {
    watched(|| {
        let fake = Fake::new();
        fake.set(Call::Open, Act::Block);
        let pool = Pool::builder().name("op-limit").max_size(2).open_timeout(LIMIT).build_unchecked(fake.r2d2());
        let error = thread::scope(|s| {
            let getter = s.spawn(|| nothing_in_time(&pool));
            fake.wait_inside(Call::Open, 1);
            abandoned(&pool, 1, Instant::now());
            getter.join().unwrap()
        });
        let cause = error.cause().expect("the reason").to_string();
        assert_eq!(cause, "no answer to an attempt to connect within 100 ms", "{error}");
        assert!(!error.is_exhausted());

        // A second one is tried, and then no more: what was abandoned may be alive on the server.
        assert!(pool.get_timeout(ms(1000)).unwrap_err().is_timeout());
        nothing_in_time(&pool);
        assert_eq!((fake.calls(Call::Open), pool.stats().abandoned, pool.stats().abandonments), (2, 2, 2));
        assert_eq!((pool.stats().failed_opens, pool.stats().size()), (2, 0));

        // Too late to be taken: closed on arrival. The next get opens anew.
        fake.release(Call::Open);
        found_again(&pool, &fake);
        assert_eq!((fake.opened(), fake.alive()), (2, 0));
        drop(pool.get_timeout(SOON).unwrap());
        assert_eq!((pool.stats().opens, fake.alive()), (1, 1));
        ends_well(pool, &fake);
        assert!(
            wait_until(within(EPSILON), || threads_named("op-limit").is_empty()),
            "{:?}",
            threads_named("op-limit")
        );
    });
}

#[test]
fn an_open_that_can_be_aborted_is_back_at_once() {
    watched(|| {
        let fake = Fake::new();
        fake.abortable(true);
        fake.set(Call::Open, Act::Block);
        let pool = Pool::builder().max_size(2).open_timeout(LIMIT).build_unchecked(fake.direct());
        nothing_in_time(&pool);
        assert!(fake.calls(Call::Abort) >= 1);
        fake.set(Call::Open, Act::Succeed);
        drop(pool.get_timeout(SOON).unwrap());
        found_again(&pool, &fake);
        assert_eq!(fake.opened(), 1);
        ends_well(pool, &fake);
    });
}

#[test]
fn a_check_past_its_limit() {
    watched(|| {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(4).validate(Validate::Always).validation_timeout(LIMIT);
        let pool = builder.build(fake.r2d2()).unwrap();
        drop(take(&pool, 3));
        fake.next(Call::Validate, [Act::Block]);
        // A waiter has to wait for no more than that.
        let begun = Instant::now();
        let (got, took) = timed(|| pool.get_timeout(SOON).unwrap());
        assert!(took >= LIMIT && took < LIMIT + slack(), "{took:?}");
        // The patience of a waiter ends at that moment, too, and it may be served first.
        abandoned(&pool, 1, begun);
        let stats = pool.stats();
        assert_eq!((stats.abandonments, stats.abandoned, stats.closed_for(CloseReason::Abandoned)), (1, 1, 1));
        drop(got);
        fake.release(Call::Validate);
        found_again(&pool, &fake);
        assert!(fake.most_alive() <= 4 + 1, "the bound, and one that was lost");
        ends_well(pool, &fake);
    });
}

#[test]
fn a_reset_past_its_limit() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).close_timeout(LIMIT).build(fake.direct()).unwrap();
        fake.verdict(Returned::Reset);
        fake.set(Call::Reset, Act::Block);
        let checked_out = pool.get().unwrap();
        let begun = Instant::now();
        let ((), took) = timed(|| drop(checked_out));
        assert!(took < slack(), "to return it took {took:?}");
        // A waiter waits for no more than that.
        let checked_out = pool.get_timeout(SOON).unwrap();
        assert!(begun.elapsed() < LIMIT + slack(), "{:?}", begun.elapsed());
        abandoned(&pool, 1, begun);
        assert_eq!(
            (checked_out.id, pool.stats().closed_for(CloseReason::Abandoned), pool.stats().abandoned),
            (2, 1, 1)
        );
        fake.release(Call::Reset);
        found_again(&pool, &fake);
        drop(checked_out);
        ends_well(pool, &fake);
    });
}

#[test]
fn a_close_past_its_limit() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(3).close_timeout(LIMIT).build(fake.r2d2()).unwrap();
        fake.set(Call::Drop, Act::Block);
        let mut checked_out = take(&pool, 3);
        let begun = Instant::now();
        checked_out.drain(..2).for_each(PooledConnection::discard);
        // There is no slot, until two are abandoned.
        let got = pool.get_timeout(SOON).unwrap();
        let took = begun.elapsed();
        assert!(took >= LIMIT && took < LIMIT + slack(), "{took:?}");
        abandoned(&pool, 2, begun);
        assert_eq!((pool.stats().abandoned, fake.alive()), (2, 4), "the bound, and two that are lost");
        drop((got, checked_out));
        fake.release(Call::Drop);
        found_again(&pool, &fake);
        ends_well(pool, &fake);
    });
}

#[test]
fn more_closes_than_closers_are_all_abandoned() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(12).close_timeout(LIMIT).build(fake.r2d2()).unwrap();
        let checked_out = take(&pool, 9);
        fake.set(Call::Drop, Act::Block);
        checked_out.into_iter().for_each(PooledConnection::discard);
        // Four at a time, each for as long as it may: the ninth begins when eight were abandoned.
        fake.wait_calls(Call::Drop, 9);
        assert!(wait_until(within(LIMIT + EPSILON), || pool.stats().abandonments == 9), "{}", pool.stats());
        assert_eq!((pool.stats().abandoned, pool.stats().size()), (9, 0));
        drop(pool.get_timeout(SOON).unwrap());
        fake.release(Call::Drop);
        found_again(&pool, &fake);
        assert_eq!(fake.alive(), 1);
        ends_well(pool, &fake);
    });
}

// -------------------------------------------------------------------------------------------------- whose thread

#[test]
fn only_a_validation_that_fits_into_the_deadline_runs_on_the_caller() {
    watched(|| {
        let fake = Fake::new();
        fake.keeps_limits(true);
        let builder = Pool::builder().name("whose").validate(Validate::Always).validation_timeout(ms(300));
        let pool = builder.build(fake.direct()).unwrap();
        let (tell, told) = crossbeam_channel::unbounded();
        fake.set(
            Call::Validate,
            crate::fake::run(move || tell.send(thread::current().name().map(str::to_owned)).unwrap()),
        );
        let me = thread::current().name().map(str::to_owned);
        drop(pool.get_timeout(ms(300)).unwrap());
        assert_eq!(told.recv().unwrap(), me);
        drop(pool.get_timeout(ms(299)).unwrap());
        assert_eq!(told.recv().unwrap().as_deref(), Some("whose-exec"));
        ends_well(pool, &fake);
    });
}

#[test]
fn a_validation_that_fails_late_leaves_the_caller_its_deadline() {
    watched(|| {
        let fake = Fake::new();
        fake.keeps_limits(true);
        let builder = Pool::builder().max_size(3).validate(Validate::Always).validation_timeout(ms(150));
        let pool = builder.build(fake.direct()).unwrap();
        drop(take(&pool, 3));
        fake.set(Call::Validate, Act::FailAfter(ms(140)));
        fake.set(Call::Open, Act::Block);
        nothing_in_time(&pool);
        fake.release(Call::Open);
        fake.release(Call::Validate);
        drop(pool.get_timeout(SOON).unwrap());
        ends_well(pool, &fake);
    });
}

// -------------------------------------------------------------------------------------------------- short deadlines

/// Asks again and again for at most 1 ms, until there is a connection, and does something else in between.
#[track_caller]
fn in_small_steps<M: Manage>(pool: &Pool<M>) -> PooledConnection<M> {
    let deadline = within(SOON);
    loop {
        match pool.get_timeout(ms(1)) {
            Ok(got) => return got,
            Err(e) => assert!(e.is_timeout() && Instant::now() < deadline, "{e}"),
        }
        thread::sleep(ms(5));
    }
}

#[test]
fn a_millisecond_at_a_time_repeats_no_open() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(5).build_unchecked(fake.r2d2());
        fake.set(Call::Open, Act::Last(ms(150)));
        let first = in_small_steps(&pool);
        assert_eq!((fake.calls(Call::Open), fake.opened(), fake.dropped()), (1, 1, 0));
        // Eight at the same time want one each, and there are four to be opened.
        thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| drop(in_small_steps(&pool)));
            }
        });
        assert!(fake.calls(Call::Open) <= 5, "{} attempts", fake.calls(Call::Open));
        drop(first);
        assert_eq!((fake.dropped(), pool.stats().closes, pool.stats().failed_opens), (0, 0, 0));
        assert!(pool.stats().timeouts > 20);
        ends_well(pool, &fake);
    });
}

#[test]
fn a_millisecond_at_a_time_closes_nothing_that_is_checked() {
    watched(|| {
        for keeps_limits in [false, true] {
            let fake = Fake::new();
            fake.keeps_limits(keeps_limits);
            let builder = Pool::builder().max_size(3).validate(Validate::AfterIdle(ms(300)));
            let pool = builder.build(fake.direct()).unwrap();
            drop(take(&pool, 3));
            thread::sleep(ms(300) + EPSILON); // by a clock that is behind
            fake.set(Call::Validate, Act::Block);
            for _ in 0..8 {
                assert!(pool.get_timeout(ms(1)).unwrap_err().is_timeout());
                thread::sleep(ms(5));
            }
            fake.release(Call::Validate);
            // The check outlives the ones it was begun for, and serves the next.
            drop(in_small_steps(&pool));
            assert!(pool.stats().timeouts >= 8);
            assert_eq!((fake.dropped(), fake.opened(), pool.stats().closes), (0, 3, 0));
            assert!(fake.calls(Call::Validate) <= 3, "{} checks", fake.calls(Call::Validate));
            ends_well(pool, &fake);
        }
    });
}

#[test]
fn what_try_get_had_checked_it_gets() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(3).validate(Validate::AfterIdle(ms(300))).build(fake.r2d2()).unwrap();
        drop(pool.get().unwrap());
        thread::sleep(ms(300) + EPSILON); // by a clock that is behind
        assert!(pool.try_get().is_none(), "idle for too long to be trusted");
        fake.wait_calls(Call::Validate, 1);
        assert!(wait_until(within(EPSILON), || pool.try_get().is_some()), "{}", pool.connections());
        assert_eq!((fake.calls(Call::Validate), fake.opened()), (1, 1));
        ends_well(pool, &fake);
    });
}

// -------------------------------------------------------------------------------------------------- a silent server

fn postgres_manager(conninfo: &str) -> PostgresConnectionManager<NoTls> {
    PostgresConnectionManager::new(conninfo.parse().unwrap(), NoTls)
}

#[test]
fn a_server_that_accepts_and_says_nothing() {
    watched(|| {
        let silent = Silent::listen();
        let manager = postgres_manager(&silent.conninfo("mute"));
        let pool = Pool::builder().name("mute").max_size(3).open_timeout(LIMIT).build_unchecked(manager);
        let mut most_threads = 0;
        let over = within(Duration::from_secs(2));
        thread::scope(|s| {
            let getters: Vec<_> = (0..4)
                .map(|_| {
                    s.spawn(|| {
                        while Instant::now() < over {
                            nothing_in_time(&pool);
                        }
                    })
                })
                .collect();
            while getters.iter().any(|g| !g.is_finished()) {
                most_threads = most_threads.max(threads_named("mute").len());
                thread::sleep(ms(30));
            }
        });
        // The reaper, those abandoned, and one that is about to be or lingers.
        assert!(most_threads <= 1 + 3 + 1, "{most_threads} threads");
        assert_eq!((silent.accepted(), pool.stats().abandoned), (3, 3));
        let error = nothing_in_time(&pool);
        assert_eq!(error.cause().unwrap().error_type(), "timeout");
        assert_eq!(pool.stats().failed_opens_of("timeout"), pool.stats().failed_opens, "{}", pool.stats());
        assert!(error.to_string().contains("no answer to an attempt to connect within 100 ms"), "{error}");

        // Nothing can be done about them but to say so; when the server lets go of them they end.
        let report = pool.close(ms(100));
        assert_eq!((report.abandoned, report.threads, report.left.len()), (3, 3, 0), "{report}");
        drop(silent);
        assert!(wait_until(within(SOON), || threads_named("mute").is_empty()), "{:?}", threads_named("mute"));
    });
}

#[test]
fn a_server_that_finds_its_voice_again() {
    watched(|| {
        let proxy = Proxy::to(Server::shared().addr());
        let builder = Pool::builder().name("hoarse").max_size(3).open_timeout(LIMIT).close_timeout(LIMIT);
        let builder = builder.validate(Validate::Always).validation_timeout(LIMIT);
        let pool = builder.build(postgres_manager(&proxy.conninfo("hoarse"))).unwrap();
        drop(take(&pool, 3));

        // Nothing passes any more: pings, connects and drops hang.
        proxy.pause();
        let over = within(Duration::from_secs(2));
        let mut most_threads = 0;
        while Instant::now() < over {
            nothing_in_time(&pool);
            most_threads = most_threads.max(threads_named("hoarse").len());
        }
        assert!(most_threads <= 1 + 3 + 3 + 1, "{most_threads} threads");
        assert!(pool.stats().abandoned <= 3, "{}", pool.stats());

        proxy.cut();
        proxy.resume();
        let mut client = pool.get_timeout(SOON).unwrap();
        assert_eq!(client.query_one("SELECT 1", &[]).unwrap().get::<_, i32>(0), 1);
        drop(client);
        assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());
        let report = pool.close(SOON);
        assert!(report.is_complete(), "{report}");
        assert_eq!(Server::shared().wait_for("hoarse", 0, within(SOON)), 0);
        assert!(wait_until(within(EPSILON), || threads_named("hoarse").is_empty()), "{:?}", threads_named("hoarse"));
    });
}
