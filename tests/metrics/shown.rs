//! Which pools are shown: those that are there, each under a name of its own; and none is kept open by being shown.

use crate::fake::{Act, Call, Fake, ends_well};
use crate::page::{Page, collected, recorder, reported};
use crate::support::{SOON, beside_others, ms, wait_until, watched, within};
use millpond::metrics::Pools;
use millpond::{Health, Manage, Pool, PooledConnection};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const NAME: &str = "db_client_connection_pool_name";

/// The names of the pools on a page, in their order.
fn names(pools: &Pools) -> Vec<String> {
    let page = Page::parse(&collected(pools));
    let max = page.samples.into_iter().filter(|(name, ..)| name == "db_client_connection_max");
    max.map(|(_, labels, _)| labels[NAME].clone()).collect()
}

#[test]
fn who_shows_a_pool_does_not_keep_it() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let (pools, recorder) = (Pools::of(&pool), recorder());
    drop(pool.get().unwrap());
    assert_eq!(names(&pools), ["orders"]);
    let page = Page::parse(&reported(&pools, &recorder));
    assert_eq!(page.value("db_client_connection_count", &[("db_client_connection_state", "idle")]), 1.0);

    drop(pool);
    fake.wait_alive(0);
    // The pool's threads hold it for a moment more.
    assert!(wait_until(within(SOON), || names(&pools).is_empty()), "{:?}", names(&pools));
    assert_eq!(collected(&pools), "# EOF\n");
    assert_eq!(format!("{pools:?}"), r#"["orders"]"#, "the facade has to be told");
    // The facade cannot take a metric back: what is now is nothing, and what was counted stays.
    let page = Page::parse(&reported(&pools, &recorder));
    for gauge in ["db_client_connection_count", "db_client_connection_max", "millpond_health"] {
        let values = page.values(gauge, &[]);
        assert!(!values.is_empty() && values.iter().all(|&value| value == 0.0), "{gauge}: {values:?}");
    }
    assert_eq!(page.value("millpond_checkouts_total", &[]), 1.0);
    assert_eq!(format!("{pools:?}"), "[]", "the facade was told, and it is forgotten");
}

#[test]
fn many_pools_share_their_families() {
    let fake = Fake::new();
    let build = |name: &str| Pool::builder().name(name).build(fake.direct()).unwrap();
    let (orders, users, namesake) = (build("orders"), build("users"), build("orders"));
    let pools = Pools::of(&orders);
    pools.add(&users);
    pools.add(&namesake);
    pools.add(&users.clone());
    // (To parse a page fails if a family stands there twice.)
    assert_eq!(names(&pools), ["orders", "users", "orders-2"]);
    assert_eq!(Page::parse(&reported(&pools, &recorder())).values("db_client_connection_max", &[]).len(), 3);

    // A closed pool is shown as closed, and leaves its name to the next.
    assert!(orders.close(SOON).is_complete());
    let page = Page::parse(&collected(&pools));
    assert_eq!(page.value("millpond_health", &[(NAME, "orders"), ("state", "closed")]), 1.0);
    let again = build("orders");
    pools.add(&again);
    assert_eq!(names(&pools), ["users", "orders-2", "orders"]);
    [users, namesake, again].into_iter().for_each(drop);
    fake.wait_alive(0);
}

/// Others, which make a look at all last longer.
fn others(fake: &Fake) -> Vec<Pool<impl Manage + use<>>> {
    (0..20).map(|n| Pool::builder().name(format!("other {n}")).build_unchecked(fake.direct())).collect()
}

/// Two threads add one pool each, at the same time, again and again.
#[test]
fn pools_of_one_name_that_are_added_at_once_have_two_names() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pools = [(); 2].map(|()| Pool::builder().name("orders").build_unchecked(fake.direct()));
    let others = others(&fake);
    let shown: Vec<_> = (0..500).map(|_| Pools::default()).collect();
    shown.iter().for_each(|all| others.iter().for_each(|other| all.add(other)));
    let begin = Barrier::new(2);
    thread::scope(|scope| {
        for pool in &pools {
            scope.spawn(|| {
                for all in &shown {
                    begin.wait();
                    all.add(pool);
                }
            });
        }
    });
    let wrong = shown.iter().filter(|all| !format!("{all:?}").ends_with(r#", "orders", "orders-2"]"#));
    assert_eq!(wrong.count(), 0);
    pools.into_iter().for_each(drop);
    drop(others);
    fake.wait_alive(0);
}

#[test]
fn a_name_may_be_anything() {
    let fake = Fake::new();
    let pool = Pool::builder().name("a \"b\"\\\nc").build(fake.direct()).unwrap();
    let page = collected(&Pools::of(&pool));
    assert!(page.contains(r#"{db_client_connection_pool_name="a \"b\"\\\nc"}"#), "{page}");
    ends_well(pool, &fake);
}

#[test]
fn counts_go_on_when_a_pool_is_built_again() {
    let _beside = beside_others();
    let fake = Fake::new();
    let (pools, recorder) = (Pools::default(), recorder());
    for n in 1..=3 {
        let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
        pools.add(&pool);
        drop(pool.get().unwrap());
        let page = Page::parse(&reported(&pools, &recorder));
        assert_eq!(page.value("millpond_checkouts_total", &[]), f64::from(n));
        assert_eq!(page.value("db_client_connection_wait_time_seconds_count", &[]), f64::from(n));
        assert_eq!(page.value("db_client_connection_max", &[]), f64::from(pool.max_size()));
        ends_well(pool, &fake);
    }
}

#[test]
fn what_a_pool_counted_before_another_took_its_name_is_told() {
    [true, false].into_iter().for_each(told_of_both);
}

fn told_of_both(is_told_before: bool) {
    let _beside = beside_others();
    let fake = Fake::new();
    let (pools, recorder) = (Pools::default(), recorder());
    let first = Pool::builder().name("orders").max_size(3).build(fake.direct()).unwrap();
    pools.add(&first);
    drop(first.get().unwrap());
    if is_told_before {
        reported(&pools, &recorder);
    }
    // Not told before its end, ...
    let late = first.get().unwrap();
    drop(first.get().unwrap());
    let _ = first.close(ms(10));
    let second = Pool::builder().name("orders").max_size(5).build(fake.direct()).unwrap();
    pools.add(&second);
    pools.add(&first); // which changes nothing
    drop(second.get().unwrap());
    let page = Page::parse(&reported(&pools, &recorder));
    assert_eq!(page.value("millpond_checkouts_total", &[]), 4.0);
    // ... and what is now is the other one's.
    assert_eq!(page.value("db_client_connection_max", &[]), 5.0);
    assert_eq!(page.value("millpond_health", &[("state", "closed")]), 0.0);
    assert_eq!(Page::parse(&collected(&pools)).value("db_client_connection_max", &[]), 5.0, "and it alone is shown");
    drop((first, late));
    let is_told = || {
        let page = Page::parse(&reported(&pools, &recorder));
        assert_eq!(page.value("db_client_connection_max", &[]), 5.0);
        format!("{pools:?}") == "[\"orders\"]"
    };
    assert!(wait_until(within(SOON), is_told), "the first is gone, and forgotten: {pools:?}");
    ends_well(second, &fake);
}

/// A recorder that adds a pool while it is told of one.
struct Adds<'a>(metrics_exporter_prometheus::PrometheusRecorder, &'a (dyn Fn() + Sync));

impl metrics::Recorder for Adds<'_> {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, key: &metrics::Key, metadata: &metrics::Metadata<'_>) -> metrics::Counter {
        (self.1)();
        self.0.register_counter(key, metadata)
    }

    fn register_gauge(&self, key: &metrics::Key, metadata: &metrics::Metadata<'_>) -> metrics::Gauge {
        (self.1)();
        self.0.register_gauge(key, metadata)
    }

    fn register_histogram(&self, key: &metrics::Key, metadata: &metrics::Metadata<'_>) -> metrics::Histogram {
        self.0.register_histogram(key, metadata)
    }
}

#[test]
fn a_pool_can_be_added_in_the_middle_of_a_report() {
    watched(|| {
        let fake = Fake::new();
        let (first, second) = (Pool::builder().name("orders"), Pool::builder().name("users"));
        let (first, second) = (first.build(fake.direct()).unwrap(), second.build(fake.direct()).unwrap());
        let pools = Pools::default();
        // One that is gone when the report comes to it.
        let gone = Pool::builder().name("gone").build(fake.direct()).unwrap();
        pools.add(&gone);
        pools.add(&first);
        reported(&pools, &recorder());
        drop(gone);
        assert!(wait_until(within(SOON), || names(&pools) == ["orders"]));
        let add = || pools.add(&second);
        let adds = Adds(recorder(), &add);
        metrics::with_local_recorder(&adds, || pools.report());
        assert_eq!(format!("{pools:?}"), "[\"orders\", \"users\"]");
        drop(second);
        ends_well(first, &fake);
    });
}

/// Three threads report while one checks out: each checkout is told once.
#[test]
fn reports_at_once_count_once() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let (pools, recorder, others) = (Pools::default(), recorder(), others(&fake));
    others.iter().for_each(|other| pools.add(other));
    pools.add(&pool);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    metrics::with_local_recorder(&recorder, || pools.report());
                }
            });
        }
        let served = (0..20_000).all(|_| pool.get().is_ok());
        over.store(true, Ordering::Relaxed);
        assert!(served, "{}", pool.stats());
    });
    let page = Page::parse(&reported(&pools, &recorder));
    assert_eq!(page.value("millpond_checkouts_total", &[(NAME, "orders")]), pool.stats().checkouts as f64);
    drop(others);
    ends_well(pool, &fake);
}

#[test]
fn a_look_at_a_pool_that_is_down_brings_it_back() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    fake.set(Call::Open, Act::Fail);
    let pools = Pools::of(&pool);
    PooledConnection::discard(pool.get().unwrap());
    assert!(pool.get_timeout(ms(100)).is_err());
    let down = || Page::parse(&collected(&pools)).value("millpond_health", &[("state", "down")]) == 1.0;
    assert!(down(), "{}", pool.stats());
    assert!(Page::parse(&collected(&pools)).value("millpond_failing_time_seconds", &[]) > 0.0);
    fake.release(Call::Open);
    // Nobody asks for a connection.
    assert!(wait_until(within(SOON), || !down()), "{}", pool.stats());
    assert!(matches!(pool.stats().health, Health::Ready), "{}", pool.stats());
    assert!(pool.stats().last_error.is_some(), "{}", pool.stats());
    ends_well(pool, &fake);
}

#[test]
fn the_exporter_needs_neither_tokio_nor_hyper() {
    let rustc = std::process::Command::new("rustc").arg("-vV").output().unwrap();
    let host = String::from_utf8(rustc.stdout).unwrap();
    let host = host.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc says what it runs on");
    let tree = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--all-features", "--format-version", "1"])
        // Of other systems nothing need be here.
        .args(["--filter-platform", host])
        .args(["--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")])
        .output()
        .unwrap();
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree: serde_json::Value = serde_json::from_slice(&tree.stdout).unwrap();
    let nodes = tree["resolve"]["nodes"].as_array().unwrap();
    let mut wanted = vec!["metrics-exporter-prometheus"];
    let mut seen = Vec::new();
    while let Some(name) = wanted.pop() {
        if seen.contains(&name) {
            continue;
        }
        seen.push(name);
        for node in nodes.iter().filter(|node| id_is(&node["id"], name)) {
            for dep in node["deps"].as_array().unwrap() {
                let is_normal = |kind: &serde_json::Value| kind["kind"].is_null() && kind["target"].is_null();
                if dep["dep_kinds"].as_array().unwrap().iter().any(is_normal) {
                    wanted.push(name_of(&dep["pkg"]));
                }
            }
        }
    }
    assert!(seen.contains(&"metrics-util") && seen.contains(&"quanta"), "{seen:?}");
    assert!(!seen.iter().any(|name| name.starts_with("tokio") || name.starts_with("hyper")), "{seen:?}");
}

/// The name of a package in its id: `registry+...#name@version`, or `path+...#version` where the folder says the name.
fn name_of(id: &serde_json::Value) -> &str {
    let id = id.as_str().unwrap().rsplit_once('#').unwrap().1;
    id.split('@').next().unwrap()
}

fn id_is(id: &serde_json::Value, name: &str) -> bool {
    name_of(id) == name
}
