//! P9: broken is never handed out twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake, ends_well};
use crate::support::{
    Database, EPSILON, Proxy, SEEN, SOON, Server, alone, ms, slack, threads_named, wait_until, watched_alone, within,
};
use millpond::{Builder, CloseReason, Manage, Pool, PooledConnection, Returned, Validate};
use parking_lot::Mutex;
use postgres::{Client, NoTls};

type Pg = r2d2_postgres::PostgresConnectionManager<NoTls>;

/// So long that nothing is checked for its idleness alone.
const HOUR: Duration = Duration::from_secs(3_600);

fn stock(conninfo: &str) -> Pg {
    Pg::new(conninfo.parse().expect("an address"), NoTls)
}

fn builder(name: &str) -> Builder<Pg> {
    Pool::builder().name(name).connection_timeout(SOON)
}

fn works(c: &mut Client) -> bool {
    c.simple_query("").is_ok()
}

/// `n` connections at once, and all of them back.
fn fill<M: Manage>(pool: &Pool<M>, n: usize) {
    let all: Vec<_> = (0..n).map(|_| pool.get().unwrap()).collect();
    drop(all);
    assert_eq!(pool.stats().idle as usize, n);
}

/// Has the server end all of a pool's connections. Returns when they are gone.
fn end_all(server: &Database, app: &str, n: usize) {
    assert_eq!(server.terminate(app), n);
    assert_eq!(server.wait_for(app, 0, within(SOON)), 0);
}

fn close(pool: Pool<Pg>, server: &Database, app: &str) {
    assert!(pool.close(SOON).is_complete());
    assert_eq!(server.wait_for(app, 0, within(SEEN)), 0);
    assert!(wait_until(within(SEEN), || threads_named(&format!("{}-", pool.name())).is_empty()));
}

/// Dead connections among `n` that are checked out one after the other, each found out and returned before the next
/// is asked for.
fn dead_among(pool: &Pool<Pg>, n: usize) -> usize {
    let (mut dead, mut alive) = (0, Vec::new());
    while alive.len() < n {
        let mut c = pool.get().unwrap();
        if works(&mut c) {
            alive.push(c);
        } else {
            dead += 1;
        }
    }
    dead
}

#[test]
fn the_first_user_finds_it_and_nobody_after_him() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-first");
    // By the default all may be checked, if this machine is slow; with an hour only suspicion has them checked.
    for (builder, dead) in [(builder("first"), 0..=1), (builder("first").validate(Validate::AfterIdle(HOUR)), 1..=1)] {
        let pool = builder.build(stock(&server.conninfo(app))).unwrap();
        fill(&pool, 6);
        end_all(server, app, 6);
        let found = dead_among(&pool, 6);
        assert!(dead.contains(&found), "{found} were handed out dead");
        let stats = pool.stats();
        assert_eq!(stats.closed_for(CloseReason::Broken), found as u64, "{stats}");
        assert_eq!(stats.closed_for(CloseReason::Broken) + stats.closed_for(CloseReason::Invalid), 6, "{stats}");
        close(pool, server, app);
    }
}

/// Found by a check instead of a user: nobody is handed a dead one.
#[test]
fn what_was_idle_for_long_is_checked_first() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-idle");
    for builder in [builder("idle").validate(Validate::AfterIdle(ms(100))), builder("idle").test_on_check_out(true)] {
        let pool = builder.build(stock(&server.conninfo(app))).unwrap();
        fill(&pool, 6);
        end_all(server, app, 6);
        thread::sleep(ms(100) + EPSILON); // to be idle for long, by a clock that is behind
        assert_eq!(dead_among(&pool, 6), 0);
        close(pool, server, app);
    }
}

/// One that was out when another was found dead is suspect when it comes back, though just used.
#[test]
fn what_was_in_use_meanwhile_is_suspect_too() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-out");
    let pool = builder("out").validate(Validate::AfterIdle(HOUR)).build(stock(&server.conninfo(app))).unwrap();
    let (mut finds, unaware) = (pool.get().unwrap(), pool.get().unwrap());
    end_all(server, app, 2);
    assert!(!works(&mut finds));
    drop(finds);
    drop(unaware);
    assert_eq!(dead_among(&pool, 2), 0);
    assert_eq!(pool.stats().closed_for(CloseReason::Invalid), 1);
    close(pool, server, app);
}

/// Many users at once, and idle ones beside, while the server ends all connections again and again: once a dead one has
/// come back, a `get` that begins later is given no dead one.
#[test]
fn many_users_at_once() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-many");
    let builder = builder("many").max_size(20).validate(Validate::AfterIdle(HOUR));
    let pool = builder.build(stock(&server.conninfo(app))).unwrap();
    let over = AtomicBool::new(false);
    // Of every dead one: when the `get` that gave it began, and when it was back.
    let failures = Mutex::new(Vec::new());
    let mut rounds = Vec::new();
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while !over.load(SeqCst) {
                    let begun = Instant::now();
                    let mut c = pool.get().unwrap();
                    if !works(&mut c) {
                        drop(c);
                        failures.lock().push((begun, Instant::now()));
                    }
                }
            });
        }
        for _ in 0..10 {
            let all: Vec<_> = (0..10).map(|_| pool.get().unwrap()).collect();
            drop(all);
            // With all that they need, so that no connection comes between the two questions that follow.
            assert!(wait_until(within(SOON), || pool.stats().opening == 0));
            let mine: Vec<_> = server.backends(app).iter().map(|b| b.pid).collect();
            let from = Instant::now();
            assert!(server.terminate(app) >= 10);
            let gone = || !server.backends(app).iter().any(|b| mine.contains(&b.pid));
            assert!(wait_until(within(SOON), gone));
            rounds.push((from, Instant::now()));
            thread::sleep(ms(30)); // of work
        }
        over.store(true, SeqCst);
    });
    let failures = failures.into_inner();
    let ends = rounds.iter().skip(1).map(|&(next, _)| next).chain([Instant::now()]);
    for (&(_, all_gone), next) in rounds.iter().zip(ends) {
        let of_round = failures.iter().filter(|&&(_, back)| back > all_gone && back < next);
        let Some(&(_, first)) = of_round.clone().min_by_key(|&&(_, back)| back) else { continue };
        let late: Vec<_> = of_round.filter(|&&(begun, _)| begun > first).map(|&(begun, _)| begun - first).collect();
        assert!(late.is_empty(), "dead ones were handed out {late:?} after the first had come back");
    }
    assert!(failures.len() >= 10, "the server did end some that were in use: {failures:?}");
    close(pool, server, app);
}

/// Six stale connections and a healthy server: one connect and a few pings.
#[test]
fn six_stale_ones_cost_one_connect() {
    let _alone = alone();
    let (server, app) = (Server::shared(), "broken-six");
    for max_size in [6, 12] {
        let proxy = Proxy::to(server.addr());
        let builder = builder("six").max_size(max_size).validate(Validate::Always);
        let pool = builder.build(stock(&proxy.conninfo(app))).unwrap();
        let all: Vec<_> = (0..6).map(|_| pool.get().unwrap()).collect();
        drop(all);
        assert!(wait_until(within(SOON), || pool.stats().idle == 6));
        end_all(server, app, 6);
        let dialled = proxy.accepted();
        let began = Instant::now();
        let mut c = pool.get().unwrap();
        let took = began.elapsed();
        assert!(works(&mut c));
        assert!(took <= ms(100) + slack(), "{took:?}");
        assert!(wait_until(within(SOON), || pool.stats().size() - pool.stats().idle == 1));
        assert_eq!(proxy.accepted() - dialled, 1, "connects");
        drop(c);
        close(pool, server, app);
    }
}

/// Six that do not answer at all cost one `validation_timeout`, and not six in a row.
#[test]
fn six_that_hang_cost_one_timeout() {
    let _alone = alone();
    let fake = Fake::new();
    let builder = Pool::builder().max_size(12).validate(Validate::Always).validation_timeout(ms(200));
    let pool = builder.build(fake.r2d2()).unwrap();
    let all: Vec<_> = (0..6).map(|_| pool.get().unwrap()).collect();
    drop(all);
    fake.set(Call::Validate, Act::Block);
    let began = Instant::now();
    let served = pool.get().unwrap();
    let took = began.elapsed();
    assert!(ms(200) <= took && took < ms(400) - EPSILON, "less than a second timeout: {took:?}");
    assert_eq!((served.id, fake.opened()), (7, 7), "one connect");
    drop(served);
    drop(fake);
    assert!(pool.close(SOON).is_complete());
}

#[test]
fn a_restart() {
    let _alone = alone();
    let (server, app) = (Server::start(), "broken-restart");
    let pool = builder("restart").validate(Validate::AfterIdle(HOUR)).build(stock(&server.conninfo(app))).unwrap();
    for stop in [Server::stop_fast, Server::stop_immediate, Server::kill] {
        fill(&pool, 4);
        stop(&server);
        server.start_again();
        let began = Instant::now();
        assert_eq!(dead_among(&pool, 4), 1, "found by its first user, and then no more");
        assert!(began.elapsed() <= ms(1_000), "{:?}", began.elapsed());
    }
    close(pool, &server, app);
}

#[test]
fn never_means_never() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-never");
    let pool = builder("never").validate(Validate::Never).build(stock(&server.conninfo(app))).unwrap();
    fill(&pool, 3);
    end_all(server, app, 3);
    assert_eq!(dead_among(&pool, 3), 3, "each by its own first user");
    assert_eq!(pool.stats().closed_for(CloseReason::Broken), 3);
    close(pool, server, app);

    let fake = Fake::new();
    let pool = Pool::builder().validate(Validate::Never).build(fake.direct()).unwrap();
    fill(&pool, 3);
    fake.next(Call::Returned, [Act::Fail]);
    drop(pool.get().unwrap());
    thread::sleep(ms(1_100)); // past the default of `AfterIdle`
    fill(&pool, 3);
    assert_eq!((fake.calls(Call::Validate), pool.stats().closed_for(CloseReason::Broken)), (0, 1));
}

/// What is checked, and what is not, after one came back in each of the ways it can.
#[test]
fn suspicion_falls_on_what_was_there() {
    let _alone = alone();
    for (verdict, checks) in [(Returned::Broken, 2), (Returned::Discard, 0), (Returned::Keep, 0)] {
        let fake = Fake::new();
        let pool = Pool::builder().validate(Validate::AfterIdle(HOUR)).build(fake.direct()).unwrap();
        fill(&pool, 3);
        let c = pool.get().unwrap();
        fake.verdict(verdict);
        drop(c);
        fake.verdict(Returned::Keep);
        // One that is opened now is not suspect, and the others no longer once they have been checked.
        for _ in 0..3 {
            let all: Vec<_> = (0..3).map(|_| pool.get().unwrap()).collect();
            drop(all);
        }
        assert_eq!(fake.calls(Call::Validate), checks, "{verdict:?}");
    }
    // To be discarded by its user says nothing of others either.
    let fake = Fake::new();
    let pool = Pool::builder().validate(Validate::AfterIdle(HOUR)).build(fake.direct()).unwrap();
    fill(&pool, 3);
    PooledConnection::discard(pool.get().unwrap());
    let all: Vec<_> = (0..3).map(|_| pool.get().unwrap()).collect();
    assert_eq!(fake.calls(Call::Validate), 0);
    drop(all);
}

/// While nobody asks: the dead are found one after the other, and the floor is restored.
#[test]
fn keepalive_finds_the_dead() {
    let _alone = alone();
    let (server, app) = (Database::get(), "broken-alive");
    for min_idle in [0, 3] {
        let builder = builder("alive").max_idle(None).min_idle(min_idle).keepalive(ms(200));
        let pool = builder.build(stock(&server.conninfo(app))).unwrap();
        if min_idle == 0 {
            fill(&pool, 3);
        }
        let alive: Vec<_> = server.backends(app).iter().map(|b| b.pid).collect();
        thread::sleep(ms(500));
        let still: Vec<_> = server.backends(app).iter().map(|b| b.pid).collect();
        assert_eq!((alive.len(), &still), (3, &alive), "the living stay");
        let pings = server.backends(app);
        assert!(pings.iter().all(|b| b.since <= ms(200) + slack()), "all are kept alive: {pings:?}");

        assert_eq!(server.terminate(app), 3);
        let deadline = within(ms(200) + 2 * EPSILON);
        let found = || pool.stats().closed_for(CloseReason::Invalid) == 3;
        assert!(wait_until(deadline, found), "{}", pool.stats());
        let floor = i64::from(min_idle);
        assert_eq!(server.wait_for(app, floor, within(SEEN)), floor);
        assert!(wait_until(within(EPSILON), || pool.stats().idle == min_idle), "{}", pool.stats());
        close(pool, server, app);
    }
}

/// One user whose connections all come back broken, and others that work.
#[test]
fn one_whose_connections_all_break_does_not_starve_the_others() {
    watched_alone(|| {
        for validate in [Validate::AfterIdle(Duration::from_secs(1)), Validate::Always] {
            let fake = Arc::new(Fake::new());
            let builder = Pool::builder().max_size(4).validate(validate);
            let pool = builder.build(fake.direct()).unwrap();
            fake.set(Call::Open, Act::Last(ms(3)));
            fake.set(Call::Validate, Act::Last(ms(3)));
            let stop = Arc::new(AtomicBool::new(false));
            let spoilers: Vec<_> = (0..2)
                .map(|_| {
                    let (pool, stop, broken) = (pool.clone(), Arc::clone(&stop), Arc::clone(&fake));
                    thread::spawn(move || {
                        while !stop.load(SeqCst) {
                            if let Ok(c) = pool.get_timeout(ms(200)) {
                                // (Another's may get it: one is as good as the other.)
                                broken.next(Call::Returned, [Act::Fail]);
                                drop(c);
                            }
                        }
                    })
                })
                .collect();
            let users: Vec<_> = (0..4)
                .map(|_| {
                    let (pool, stop) = (pool.clone(), Arc::clone(&stop));
                    thread::spawn(move || {
                        let (mut ok, mut bad) = (0, 0);
                        while !stop.load(SeqCst) {
                            match pool.get_timeout(ms(500)) {
                                Ok(_) => {
                                    ok += 1;
                                    thread::sleep(ms(1));
                                }
                                Err(_) => bad += 1,
                            }
                        }
                        (ok, bad)
                    })
                })
                .collect();
            thread::sleep(Duration::from_secs(2));
            stop.store(true, SeqCst);
            let served: Vec<(u32, u32)> = users.into_iter().map(|u| u.join().unwrap()).collect();
            spoilers.into_iter().for_each(|s| s.join().unwrap());
            eprintln!("{validate:?}: {served:?} {}", pool.stats());
            assert!(served.iter().all(|&(ok, bad)| ok > 20 && bad == 0), "{served:?}");
            ends_well(pool, &fake);
        }
    });
}
