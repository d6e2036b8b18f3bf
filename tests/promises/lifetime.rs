//! P2: lifetime is an upper bound. No connection is handed out past it; an idle one is closed at it, one in use when it
//! is returned; and a connection of the floor is replaced before it is closed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::stock::{Manager, SEEN, SOON, assert_gone, burst, finish, manager, pid, take};
use crate::support::{
    Database, EPSILON, History, Proxy, Server, alone, beside_others, ms, slack, sleep_until, wait_until,
};
use millpond::{Builder, CloseReason, ConnectionState, Pool, PooledConnection};

const LIFETIME: Duration = Duration::from_secs(3);
/// How long before its end a floor connection is replaced: a twentieth of its life.
const LEAD: Duration = LIFETIME.checked_div(20).unwrap();
/// The longest that one use of a connection takes here.
const USE: Duration = EPSILON;

fn pool(max_size: u32) -> Builder<Manager> {
    Pool::builder().max_size(max_size).max_lifetime(LIFETIME).lifetime_jitter(0.0)
}

/// A use of a connection that may not be older than `lifetime` when it is handed out: by the pool's account, which
/// begins with the attempt to connect, and by the server's, which begins a little later.
fn use_young(pool: &Pool<Manager>, lifetime: Duration) -> i32 {
    let asked = Instant::now();
    let mut conn = pool.get().expect("a connection");
    let age = PooledConnection::info(&conn).age;
    let at_most = lifetime + asked.elapsed();
    assert!(age < at_most, "handed out {:?} past its life", age - at_most);

    let sql = "SELECT pg_backend_pid(), extract(epoch FROM clock_timestamp() - backend_start)::float8 \
               FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let row = conn.query_one(sql, &[]).expect("a working connection");
    let age = Duration::from_secs_f64(row.get::<_, f64>(1).max(0.0));
    let at_most = lifetime + asked.elapsed();
    assert!(age < at_most, "handed out {:?} past its life, says the server", age - at_most);
    row.get(0)
}

/// No backend was ever seen older than this.
fn assert_none_older(seen: &History, limit: Duration) {
    let oldest = seen.0.iter().flat_map(|sample| &sample.backends).max_by_key(|backend| backend.age);
    let oldest = oldest.expect("a backend that was seen");
    assert!(oldest.age < limit, "older than {limit:?}: {oldest:?}");
}

/// How old each backend was when it was missed: not less than when it went. The youngest first.
fn ages_at_death(seen: &History) -> Vec<Duration> {
    let age = |pid: i32| {
        let rows = seen.0.iter().flat_map(|sample| &sample.backends).filter(|backend| backend.pid == pid);
        let (there, gone) = seen.gone(pid);
        rows.map(|backend| backend.age).max().expect("a backend that was seen") + (gone - there)
    };
    let mut ages: Vec<Duration> = seen.pids().into_iter().map(age).collect();
    ages.sort();
    ages
}

#[test]
fn in_silence() {
    let _others = beside_others();
    let watch = Database::get().watch("old-silence");
    let pool = pool(5).max_idle(None).build(manager("old-silence")).unwrap();
    burst(&pool, 5);
    let born = Instant::now();
    assert!(wait_until(born + LIFETIME + EPSILON, || pool.state().connections == 0), "{}", pool.stats());
    assert_gone("old-silence");

    let seen = watch.end();
    assert_none_older(&seen, LIFETIME + SEEN);
    // Without jitter they live to their end.
    let youngest = ages_at_death(&seen)[0];
    assert!(youngest > LIFETIME - EPSILON, "{youngest:?}");
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Lifetime)), (5, 5), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "old-silence");
}

#[test]
fn under_a_trickle() {
    let _others = beside_others();
    let watch = Database::get().watch("old-trickle");
    let pool = pool(5).build(manager("old-trickle")).unwrap();
    let start = Instant::now();
    let mut used = BTreeSet::new();
    for tick in 1..=64 {
        sleep_until(start + ms(100) * tick);
        used.insert(use_young(&pool, LIFETIME));
    }
    assert_eq!(used.len(), 3, "one after the other");

    let seen = watch.end();
    assert_eq!(seen.pids(), used);
    assert_none_older(&seen, LIFETIME + SEEN);
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Lifetime)), (3, 2), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "old-trickle");
}

#[test]
fn under_a_steady_load() {
    let _alone = alone();
    let watch = Database::get().watch("old-steady");
    let pool = pool(4).build(manager("old-steady")).unwrap();
    let end = Instant::now() + LIFETIME * 2 + EPSILON * 4;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while Instant::now() < end {
                    use_young(&pool, LIFETIME);
                }
            });
        }
    });

    let seen = watch.end();
    // Never idle at its time, it goes when it comes back.
    assert_none_older(&seen, LIFETIME + USE + SEEN);
    assert!((3..=12).contains(&seen.pids().len()), "three generations: {}", seen.counts(seen.0[0].asked));
    let stats = pool.stats();
    assert_eq!(stats.closes, stats.closed_for(CloseReason::Lifetime), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "old-steady");
}

/// Short lives, so that the moment between the last use and the end comes often.
#[test]
fn none_is_handed_out_past_its_life() {
    let _alone = alone();
    const SHORT: Duration = ms(50);
    let pool = pool(3).max_lifetime(SHORT).build(manager("short")).unwrap();
    let end = Instant::now() + ms(1500);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while Instant::now() < end {
                    use_young(&pool, SHORT);
                }
            });
        }
    });
    let stats = pool.stats();
    assert!(stats.closed_for(CloseReason::Lifetime) > 30, "{stats}");
    finish(pool, "short");
}

#[test]
fn a_floor_is_replaced_before_it_goes() {
    let _others = beside_others();
    let pool = pool(10).min_idle(4).build(manager("old-floor")).unwrap();
    let watch = Database::get().watch("old-floor");
    let start = Instant::now();
    let end = start + LIFETIME * 2 + EPSILON;
    let mut least = 4;
    while Instant::now() < end {
        let rows = pool.connections();
        let ready = rows.iter().filter(|row| row.state == ConnectionState::Idle).count();
        // Ordered in time, but this machine takes longer to open it than there is.
        let overdue =
            rows.iter().filter(|row| row.state == ConnectionState::Opening && row.age > LEAD - EPSILON).count();
        assert!(ready + overdue >= 4, "{ready} ready after {:?}:\n{rows}", start.elapsed());
        least = least.min(ready);
        std::thread::sleep(ms(1));
    }

    let seen = watch.end();
    assert!(seen.0.iter().all(|sample| (least..=8).contains(&sample.count())), "{}", seen.counts(start));
    assert_none_older(&seen, LIFETIME + SEEN);
    assert_eq!(seen.pids().len(), 12, "three generations: {}", seen.counts(start));
    // The next generation is born when the last has a twentieth of its life to live.
    let side_by_side = seen.0.windows(2).filter(|pair| pair[0].count() > 4);
    let side_by_side: Duration = side_by_side.map(|pair| pair[1].asked - pair[0].asked).sum();
    assert!(side_by_side < (LEAD + SEEN) * 2, "{side_by_side:?}: {}", seen.counts(start));
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closed_for(CloseReason::Lifetime), stats.closes), (12, 8, 8), "{stats}");
    assert!(stats.max_lateness < slack(), "{stats}");
    finish(pool, "old-floor");
}

#[test]
fn one_in_use_lives_until_it_is_returned() {
    let _others = beside_others();
    const SHORT: Duration = ms(400);
    let pool = pool(2).max_lifetime(SHORT).build(manager("old-out")).unwrap();
    let watch = Database::get().watch("old-out");
    let mut conn = pool.get().unwrap();
    let start = Instant::now();
    let old = pid(&mut conn);
    sleep_until(start + SHORT * 2);
    assert_eq!(pid(&mut conn), old, "it still works");
    let age = PooledConnection::info(&conn).age;
    assert!(age >= SHORT * 2, "{age:?}");
    let returned = Instant::now();
    drop(conn);
    // Closed at once, and not for having been idle.
    assert_eq!(pool.stats().closed_for(CloseReason::Lifetime), 1, "{}", pool.stats());
    assert_ne!(use_young(&pool, SHORT), old);

    sleep_until(returned + SEEN);
    let seen = watch.end();
    let (there, gone) = seen.gone(old);
    assert!(gone > start + SHORT * 2, "gone while it was out");
    assert!(there < returned + SEEN, "{:?} after its return", there - returned);
    finish(pool, "old-out");
}

#[test]
fn jitter_shortens_lives_and_spreads_their_ends() {
    let _others = beside_others();
    const SHORT: Duration = ms(1000);
    let pool = pool(20).max_lifetime(SHORT).lifetime_jitter(0.5).max_idle(None).parallel_opens(20);
    let pool = pool.build(manager("jitter")).unwrap();
    burst(&pool, 20);
    let born = Instant::now();
    let watch = Database::get().watch("jitter");
    assert!(wait_until(born + SHORT + EPSILON, || pool.state().connections == 0), "{}", pool.stats());
    assert_gone("jitter");

    let seen = watch.end();
    assert_none_older(&seen, SHORT + SEEN);
    let ages = ages_at_death(&seen);
    assert_eq!(ages.len(), 20);
    // The server sees a connection later than its age counts.
    assert!(ages[0] > SHORT / 2 - SEEN, "{ages:?}");
    // Twenty drawn from 500 ms lie within 150 ms of each other about once in a hundred million runs.
    assert!(ages[19] - ages[0] > ms(150), "{ages:?}");
    assert!(pool.stats().max_lateness < slack(), "{}", pool.stats());
    finish(pool, "jitter");
}

#[test]
fn recycle_replaces_what_is_older() {
    let _others = beside_others();
    let pool = pool(6).min_idle(2).max_lifetime(None).build(manager("recycled")).unwrap();
    let server = Database::get();
    let mut conns = take(&pool, 5);
    let before: BTreeSet<i32> = conns.iter_mut().map(|conn| pid(conn)).collect();
    let mut busy = conns.pop().unwrap();
    drop(conns);
    // The server has one before the pool has it.
    let all = || server.count("recycled") == 6 && pool.stats().opening == 0;
    assert!(wait_until(Instant::now() + SOON, all), "{}", pool.stats());
    let busy_pid = pid(&mut busy);

    pool.recycle();
    let recycled = Instant::now();
    // Of the old ones only the busy one is left, and the floor is laid anew.
    let old_now = || server.backends("recycled").iter().filter(|b| before.contains(&b.pid)).count();
    assert!(wait_until(recycled + SEEN, || old_now() == 1), "{}", pool.stats());
    assert_eq!(pid(&mut busy), busy_pid, "it still works");
    assert!(wait_until(Instant::now() + SOON, || pool.state().idle_connections == 2), "{}", pool.stats());
    let mut new = take(&pool, 3);
    assert!(new.iter_mut().all(|conn| !before.contains(&pid(conn))), "none of the old is handed out");

    let returned = Instant::now();
    drop(busy);
    assert!(wait_until(returned + SEEN, || old_now() == 0), "{}", pool.stats());
    assert_eq!(pool.stats().closed_for(CloseReason::Recycled), 6, "{}", pool.stats());
    drop(new);

    // What is younger than the order stays.
    let kept = || pool.stats().opening == 0 && server.count("recycled") == i64::from(pool.state().connections);
    assert!(wait_until(Instant::now() + SOON, kept), "{}", pool.stats());
    assert_eq!(pool.stats().closes, 6, "{}", pool.stats());
    finish(pool, "recycled");
}

#[test]
fn one_that_arrives_too_old_is_not_handed_out() {
    let _others = beside_others();
    let server = Server::shared();
    let proxy = Proxy::to(server.addr());
    proxy.delay(ms(150));
    let config = proxy.conninfo("late").parse().unwrap();
    let pool = pool(1).max_lifetime(ms(100)).build_unchecked(Manager::new(config, postgres::NoTls));
    let asked = Instant::now();
    let error = pool.get_timeout(ms(1000)).expect_err("an error");
    assert!(error.is_timeout(), "{error}");
    assert!((ms(1000)..ms(1000) + slack()).contains(&asked.elapsed()), "{:?}", asked.elapsed());
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.closes, stats.checkouts), (0, 0, 0), "{stats}");
    assert!(stats.failed_opens >= 2, "{stats}");
    assert_eq!(error.cause().unwrap().error_type(), "too_old");
    assert_eq!(stats.failed_opens_of("too_old"), stats.failed_opens, "{stats}");

    // A network that is quick again is all that was missing.
    proxy.delay(Duration::ZERO);
    assert!(pool.get_timeout(SOON).is_ok());
    finish(pool, "late");
}
