//! A password that changes while the pool lives.

use crate::support::picky::{picky, refused_logins, set_password, with_password};
use crate::support::{SOON, alone, capture, logged, ms, slack, threads_named, wait_until, within};
use millpond::postgres::{Error, PostgresManager};
use millpond::{Pool, PooledConnection};
use parking_lot::Mutex;
use postgres::NoTls;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A manager of which the configuration has a wrong password.
fn manager(app: &str) -> PostgresManager<NoTls> {
    PostgresManager::new(with_password(picky(), app, "wrong"), NoTls)
}

/// For the other tests, however this one ends.
struct RightAgain;

impl Drop for RightAgain {
    fn drop(&mut self) {
        set_password(picky(), "right");
    }
}

#[test]
fn a_password_is_rotated() {
    let _alone = alone();
    let (server, app) = (picky(), "rotated");
    let (known, asked) = (Arc::new(Mutex::new("right".to_string())), Arc::new(AtomicUsize::new(0)));
    let source = {
        let (known, asked) = (Arc::clone(&known), Arc::clone(&asked));
        move || {
            asked.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Error>(known.lock().clone())
        }
    };
    let pool = manager(app).password_with(source).builder().max_size(2).open().unwrap();
    let refused = refused_logins(server);
    drop([pool.get().unwrap(), pool.get().unwrap()]);
    assert_eq!((asked.load(Ordering::SeqCst), pool.stats().opens), (2, 2));

    // Nobody is logged out, and nobody is logged in again.
    let _right = RightAgain;
    set_password(server, "other");
    let mut both = [pool.get().unwrap(), pool.get().unwrap()];
    both.iter_mut().for_each(|client| client.batch_execute("SELECT 1").unwrap());
    assert_eq!(pool.stats().opens, 2);

    // Whoever has to log in is refused.
    both.into_iter().for_each(PooledConnection::discard);
    let error = pool.get().map(drop).unwrap_err();
    assert!(error.is_connect() && error.to_string().contains("password authentication failed"), "{error}");
    assert_eq!(error.cause().unwrap().error_type(), "28P01");

    // The refusal is forgotten.
    *known.lock() = "other".into();
    pool.recycle();
    let both = [pool.get().unwrap(), pool.get().unwrap()];
    let stats = pool.stats();
    assert_eq!((stats.opens, stats.failed_opens_of("28P01")), (4, stats.failed_opens), "{stats}");
    assert_eq!(asked.load(Ordering::SeqCst) as u64, stats.opens + stats.failed_opens, "asked for each login: {stats}");
    assert_eq!((refused_logins(server) - refused) as u64, stats.failed_opens, "{stats}");
    drop(both);
    assert!(pool.close(SOON).is_complete());
}

#[test]
fn a_source_that_fails_is_asked_again() {
    let _alone = alone();
    let sealed = Arc::new(Mutex::new(true));
    let source = {
        let sealed = Arc::clone(&sealed);
        move || if *sealed.lock() { Err("the vault is sealed\u{1b}") } else { Ok("right") }
    };
    let manager = manager("sealed").password_with(source);
    let pool = Pool::builder().build_unchecked(manager);
    let error = pool.get_timeout(ms(100)).map(drop).unwrap_err();
    assert!(error.is_timeout() && error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("cannot get a password: the vault is sealed\\u{1b}"), "{error}");
    assert_eq!(error.cause().unwrap().error_type(), "no_password");
    *sealed.lock() = false;
    drop(pool.get_timeout(SOON).unwrap());
    assert!(pool.close(SOON).is_complete());
}

#[test]
fn a_source_that_hangs_or_panics_holds_up_nobody() {
    let _alone = alone();
    let gate = Arc::new(Mutex::new(()));
    let held = gate.lock();
    let source = {
        let gate = Arc::clone(&gate);
        move || {
            drop(gate.lock());
            Ok::<_, Error>("right")
        }
    };
    let manager = manager("hanging").password_with(source);
    let pool = Pool::builder().open_timeout(ms(200)).build_unchecked(manager);
    let begun = Instant::now();
    let error = pool.get_timeout(ms(500)).map(drop).unwrap_err();
    let took = begun.elapsed();
    assert!(took < ms(500) + slack(), "{took:?}");
    assert!(error.to_string().contains("no answer to an attempt to connect within 200 ms"), "{error}");
    assert_eq!(error.cause().unwrap().error_type(), "timeout");

    // Nor whoever makes an audit.
    for _ in 0..5 {
        let begun = Instant::now();
        let error = millpond::postgres::audit(&pool).map(drop).unwrap_err();
        let took = begun.elapsed();
        assert!(took < ms(200) + slack(), "{took:?}");
        assert!(error.to_string().contains("no answer to an attempt to connect within 200 ms"), "{error}");
    }

    // Who was abandoned logs in no more, and says so.
    let _log = capture();
    drop(held);
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());
    assert!(wait_until(within(SOON), || threads_named("millpond-errand").is_empty()));
    assert!(!logged(|record| record.text.contains("the password came only after ")).is_empty());
    drop(pool.get_timeout(SOON).unwrap());
    let logins = || picky().log().lines().filter(|line| line.ends_with("application_name=hanging")).count();
    assert_eq!(logins() as u64, pool.stats().opens, "{}", pool.stats());
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());
    assert!(pool.close(SOON).is_complete());
    assert_eq!(picky().wait_for("hanging", 0, within(SOON)), 0);

    let manager = self::manager("panicking").password_with(|| -> Result<&str, Error> { panic!("no password today") });
    let pool = Pool::builder().build_unchecked(manager);
    let error = pool.get_timeout(ms(200)).map(drop).unwrap_err();
    assert!(error.to_string().contains("no password today"), "{error}");
    let audit = millpond::postgres::audit(&pool).map(drop).unwrap_err();
    assert!(audit.to_string().contains("no password today"), "{audit}");
    assert_eq!(error.cause().unwrap().error_type(), "panic");
    assert!(pool.close(Duration::from_secs(5)).is_complete());
}
