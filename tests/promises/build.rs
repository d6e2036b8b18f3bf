//! P9: what `build` opens is in nobody's hands before the first caller's; `build` waits for it and checks nothing out.

use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake};
use crate::support::{Database, SOON, alone, ms, slack, wait_until, within};
use millpond::{CustomizeConnection, Pool, Validate};

/// Nobody has had the connection: not by the events, nor the manager's, nor the pool's own count.
#[test]
fn what_build_opens_was_in_nobodys_hands() {
    let _beside = crate::support::beside_others();
    for min_idle in [0, 1, 3] {
        let fake = Fake::new();
        let builder = Pool::builder().min_idle(min_idle).validate(Validate::Always);
        let builder = builder.event_handler(fake.event_handler()).connection_customizer(fake.customizer());
        let pool = builder.build(fake.direct()).unwrap();
        let opened = u64::from(min_idle.max(1));
        let calls = [Call::OnAcquire, Call::HandleAcquire, Call::HandleCheckout, Call::Returned, Call::HandleCheckin];
        assert_eq!(calls.map(|call| fake.calls(call)), [opened, opened, 0, 0, 0], "min_idle {min_idle}");
        assert_eq!((fake.calls(Call::Validate), fake.calls(Call::Started)), (0, 1));
        let stats = pool.stats();
        assert_eq!((stats.opens, stats.checkouts, stats.waits, stats.closes), (opened, 0, 0, 0), "{stats}");
        assert_eq!((stats.wait_time.count(), stats.usage_time.count()), (0, 0), "{stats}");
        assert_eq!(u64::from(stats.idle), opened, "{stats}");
        assert!(pool.connections().iter().all(|row| row.uses == 0), "{}", pool.connections());
        assert!(pool.close(SOON).is_complete());
    }
}

/// The recipe for tests that leave nothing behind: every connection of the pool lives in a transaction.
#[test]
#[cfg(feature = "postgres")]
fn a_transaction_that_on_acquire_began_is_there_for_the_first_user() {
    let _beside = crate::support::beside_others();
    use millpond::postgres::{Connection, Error};

    #[derive(Debug)]
    struct Begin;

    impl CustomizeConnection<Connection, Error> for Begin {
        fn on_acquire(&self, c: &mut Connection) -> Result<(), Error> {
            Ok(c.batch_execute("BEGIN; CREATE TABLE build_first_user (n int)")?)
        }
    }

    let (server, app) = (Database::get(), "build-begin");
    let builder = millpond::postgres::builder(&server.conninfo(app)).unwrap().max_size(1);
    let pool = builder.connection_customizer(Box::new(Begin)).open().unwrap();
    let mut client = pool.get().unwrap();
    let rows = client.query_one("SELECT count(*) FROM build_first_user", &[]);
    assert_eq!(rows.expect("what on_acquire began was rolled back").get::<_, i64>(0), 0);
    drop(client);
    assert!(pool.close(SOON).is_complete());
    let mut other = server.config(app).connect(postgres::NoTls).unwrap();
    let there = other.query_one("SELECT to_regclass('build_first_user') IS NOT NULL", &[]).unwrap();
    assert!(!there.get::<_, bool>(0), "and nothing of it stays");
}

/// It keeps nothing idle; that one could be opened is known all the same.
#[test]
fn a_pool_that_keeps_nothing_idle_is_built() {
    let _beside = crate::support::beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_idle(Duration::ZERO).build(fake.direct()).unwrap();
    fake.wait_alive(0);
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.checkouts, fake.calls(Call::Started)), (1, 0, 1), "{stats}");
    assert!(wait_until(within(SOON), || pool.stats().closes == 1), "{}", pool.stats());
    drop(pool.get().unwrap());
    assert!(pool.close(SOON).is_complete());
}

#[test]
fn what_cannot_be_opened_is_tried_again_until_the_deadline() {
    let _alone = alone();
    let fake = Fake::new();
    fake.set(Call::Open, Act::Fail);
    let builder = || Pool::builder().name("vain").connection_timeout(ms(500)).event_handler(fake.event_handler());
    let began = Instant::now();
    let error = builder().build(fake.direct()).unwrap_err();
    let took = began.elapsed();
    assert!(ms(500) <= took && took <= ms(500) + slack(), "{took:?}");
    assert!(error.is_timeout() && error.cause().is_some(), "{error}");
    assert_eq!(
        error.to_string(),
        "pool 'vain': no connection within 500 ms: none can be opened: Open failed on purpose",
        "{error:?}"
    );
    // After 50 ms, 100 ms, 200 ms, each less a fifth at most.
    assert!((4..=5).contains(&fake.calls(Call::Open)), "{} attempts", fake.calls(Call::Open));
    assert_eq!(fake.calls(Call::HandleTimeout), 0, "nobody asked for a connection");

    fake.set(Call::Open, Act::Refuse);
    let began = Instant::now();
    let error = builder().build(fake.direct()).unwrap_err();
    assert!(error.is_connect() && began.elapsed() <= slack(), "at once: {error}");

    fake.next(Call::Open, [Act::Fail, Act::Fail, Act::Succeed]);
    let pool = builder().build(fake.direct()).unwrap();
    assert!(pool.close(SOON).is_complete());
    assert_eq!(fake.alive(), 0);
}
