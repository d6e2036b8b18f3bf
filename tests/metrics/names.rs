//! Names, kinds and units are those of OpenTelemetry's convention, in its own notation (which the facade is told) and in Prometheus'.

use crate::fake::{Act, Call, Fake};
use crate::page::{Page, collected, recorder, reported};
use crate::support::{SOON, beside_others, ms, wait_until, within};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use millpond::metrics::{BUCKETS, Pools};
use millpond::{CloseReason, Pool, PooledConnection};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;

/// The convention as of version 1.42: <https://opentelemetry.io/docs/specs/semconv/db/database-metrics/#connection-pools>.
const CONVENTION: [(&str, &str, &str); 9] = [
    ("db.client.connection.count", "UpDownCounter", "{connection}"),
    ("db.client.connection.idle.max", "UpDownCounter", "{connection}"),
    ("db.client.connection.idle.min", "UpDownCounter", "{connection}"),
    ("db.client.connection.max", "UpDownCounter", "{connection}"),
    ("db.client.connection.pending_requests", "UpDownCounter", "{request}"),
    ("db.client.connection.timeouts", "Counter", "{timeout}"),
    ("db.client.connection.create_time", "Histogram", "s"),
    ("db.client.connection.wait_time", "Histogram", "s"),
    ("db.client.connection.use_time", "Histogram", "s"),
];

/// Writes down what the facade is told.
#[derive(Default)]
struct Told(Mutex<BTreeMap<String, Family>>);

/// Its kind and unit, and the series that were registered.
type Family = (&'static str, Option<Unit>, Vec<Key>);

impl Told {
    fn described(&self, kind: &'static str, name: KeyName, unit: Option<Unit>) {
        let mut all = self.0.lock().unwrap();
        let told = all.entry(name.as_str().to_string()).or_insert((kind, unit, Vec::new()));
        assert_eq!(told.0, kind, "{name:?}");
    }

    fn registered(&self, kind: &'static str, key: &Key) {
        let mut all = self.0.lock().unwrap();
        let told = all.get_mut(key.name()).expect("it was described");
        assert_eq!(told.0, kind, "{key:?}");
        told.2.push(key.clone());
    }
}

impl Recorder for Told {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.described("Counter", name, unit);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.described("UpDownCounter", name, unit);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, _: SharedString) {
        self.described("Histogram", name, unit);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.registered("Counter", key);
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.registered("UpDownCounter", key);
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.registered("Histogram", key);
        Histogram::noop()
    }
}

/// The name in Prometheus, by OpenTelemetry's rules.
fn in_prometheus(name: &str, kind: &str, unit: &str) -> String {
    let name = name.replace('.', "_");
    match (kind, unit) {
        (_, "s") => name + "_seconds",
        ("Counter", _) => name + "_total",
        _ => name,
    }
}

#[test]
fn the_facade_is_told_the_names_of_the_convention() {
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let told = Told::default();
    metrics::with_local_recorder(&told, || Pools::of(&pool).report());
    let told = told.0.into_inner().unwrap();
    for (name, kind, unit) in CONVENTION {
        let (told_kind, told_unit, keys) = &told[name];
        let unit = if unit == "s" { Unit::Seconds } else { Unit::Count };
        assert_eq!((*told_kind, *told_unit), (kind, Some(unit)), "{name}");
        let named =
            |key: &Key| key.labels().any(|l| (l.key(), l.value()) == ("db.client.connection.pool.name", "orders"));
        assert!(!keys.is_empty() && keys.iter().all(named), "{name}: {keys:?}");
        let mut states: Vec<_> = keys
            .iter()
            .flat_map(Key::labels)
            .filter(|l| l.key() == "db.client.connection.state")
            .map(|l| l.value())
            .collect();
        states.sort_unstable();
        assert_eq!(states, if name.ends_with(".count") { &["idle", "used"][..] } else { &[] }, "{name}");
    }
    let conventional = told.keys().filter(|name| !name.starts_with("millpond.")).count();
    assert_eq!(conventional, CONVENTION.len(), "a name in the convention's space that is not of the convention");
}

#[test]
fn prometheus_sees_the_names_of_the_convention() {
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").max_size(7).min_idle(2).build(fake.direct()).unwrap();
    let pools = Pools::of(&pool);
    let (collected, reported) = (Page::parse(&collected(&pools)), Page::parse(&reported(&pools, &recorder())));
    for (name, kind, unit) in CONVENTION {
        let full = in_prometheus(name, kind, unit);
        let is = match kind {
            "UpDownCounter" => "gauge",
            "Counter" => "counter",
            _ => "histogram",
        };
        // OpenMetrics describes a counter without its suffix, and says the unit.
        let described = full.trim_end_matches("_total");
        let unit = if unit == "s" { "seconds" } else { "" };
        assert_eq!(collected.families[described][..2], [is.to_string(), unit.to_string()], "{name}");
        assert_eq!(reported.families[&full][0], is, "{name}");
        let sample = if kind == "Histogram" { format!("{full}_count") } else { full };
        for page in [&collected, &reported] {
            assert!(!page.values(&sample, &[("db_client_connection_pool_name", "orders")]).is_empty(), "{sample}");
        }
    }
    for (name, value) in [("max", 7.0), ("idle_max", 7.0), ("idle_min", 2.0)] {
        assert_eq!(collected.value(&format!("db_client_connection_{name}"), &[]), value);
    }
    assert!(
        collected
            .families
            .keys()
            .all(|name| name.starts_with("db_client_connection_") || name.starts_with("millpond_"))
    );
}

/// A pool that has done a bit of everything, and does nothing now.
fn a_life(fake: &Fake) -> Pool<impl millpond::Manage> {
    let builder = Pool::builder().name("orders").max_size(2).max_idle(ms(50)).max_waiting(1).leak_threshold(ms(100));
    let pool = builder.build(fake.direct()).unwrap();
    let mut both = vec![pool.get().unwrap(), pool.get().unwrap()];
    // One caller times out, one is refused while it waits, one is served.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.get_timeout(ms(200)).is_err());
        assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
        assert!(pool.get_timeout(ms(1)).is_err());
        assert!(waiting.join().unwrap());
        let served = scope.spawn(|| pool.get_timeout(SOON).is_ok());
        assert!(wait_until(within(SOON), || pool.stats().waiting == 1));
        both.pop();
        assert!(served.join().unwrap());
    });
    PooledConnection::discard(both.pop().unwrap());
    fake.next(Call::Open, [Act::Fail]);
    drop([pool.get().unwrap(), pool.get().unwrap()]);
    assert!(wait_until(within(SOON), || pool.stats().size() == 0), "{}", pool.stats());
    pool
}

#[test]
fn the_page_says_what_the_stats_say() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = a_life(&fake);
    let page = Page::parse(&collected(&Pools::of(&pool)));
    let stats = pool.stats();
    assert!(stats.rejected == 1 && stats.timeouts == 1 && stats.leaks > 0 && stats.failed_opens == 1, "{stats}");
    for (name, count) in [
        ("db_client_connection_timeouts_total", stats.timeouts),
        ("millpond_connections_opened_total", stats.opens),
        ("millpond_connections_open_failures_total", stats.failed_opens_of("_OTHER")),
        ("millpond_connections_detached_total", 0),
        ("millpond_checkouts_total", stats.checkouts),
        ("millpond_checkouts_waited_total", stats.waits),
        ("millpond_checkouts_rejected_total", stats.rejected),
        ("millpond_checkouts_barged_total", stats.barged),
        ("millpond_checkouts_leaked_total", stats.leaks),
        ("millpond_evictions_late_total", 0),
        ("millpond_jobs_abandoned_total", 0),
        ("millpond_log_records_dropped_total", stats.dropped_records),
        ("db_client_connection_create_time_seconds_count", stats.open_time.count()),
        ("db_client_connection_use_time_seconds_count", stats.usage_time.count()),
        ("db_client_connection_wait_time_seconds_count", stats.checkouts),
        ("millpond_eviction_lateness_seconds_count", stats.lateness.count()),
    ] {
        assert_eq!(page.value(name, &[]), count as f64, "{name}");
    }
    for (reason, key) in [(CloseReason::Discarded, "discarded"), (CloseReason::Idle, "idle")] {
        let closed = page.value("millpond_connections_closed_total", &[("reason", key)]);
        assert!(closed > 0.0 && closed == stats.closed_for(reason) as f64, "{key}: {closed}");
    }
    let closed = page.values("millpond_connections_closed_total", &[]);
    assert_eq!((closed.len(), closed.iter().sum()), (CloseReason::ALL.len(), stats.closes as f64));
    assert_eq!(page.value("millpond_eviction_lateness_max_seconds", &[]), stats.max_lateness.as_secs_f64());
    let health = page.values("millpond_health", &[]);
    assert_eq!((health.len(), health.iter().sum::<f64>()), (5, 1.0));
    assert_eq!(page.value("millpond_health", &[("state", pool.health().as_str())]), 1.0);
}

#[test]
fn who_did_not_wait_waited_no_time_and_who_left_is_not_counted() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = a_life(&fake);
    let (page, stats) = (Page::parse(&collected(&Pools::of(&pool))), pool.stats());
    let name = "db_client_connection_wait_time_seconds";
    let buckets = page.values(&format!("{name}_bucket"), &[]);
    assert_eq!(buckets.len(), BUCKETS.len() + 1);
    assert!(buckets.is_sorted(), "{buckets:?}");
    assert_eq!(*buckets.last().unwrap(), stats.checkouts as f64);
    let served = stats.wait_time.since(&stats.left_time);
    assert_eq!(stats.wait_time.count() - served.count(), 1, "one left");
    assert!(buckets[0] >= (stats.checkouts - served.count()) as f64, "{buckets:?}");
    assert_eq!(page.value(&format!("{name}_sum"), &[]), served.sum().as_secs_f64());
}

#[test]
fn both_features_show_the_same() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = a_life(&fake);
    let (pools, recorder) = (Pools::of(&pool), recorder());
    // Twice, so that what was told is not told again.
    drop(reported(&pools, &recorder));
    drop(pool.get().unwrap());
    let (mut ours, mut theirs) = (Page::parse(&collected(&pools)), Page::parse(&reported(&pools, &recorder)));
    for page in [&mut ours, &mut theirs] {
        // The one writes "1.0", the other "1".
        let number = |le: &mut String| *le = le.parse::<f64>().unwrap().to_string();
        page.samples.iter_mut().filter_map(|(_, labels, _)| labels.get_mut("le")).for_each(number);
        // What changes from one look to the next.
        page.samples.retain(|(name, ..)| name != "millpond_failing_time_seconds");
        page.samples.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    }
    assert_eq!(ours.samples.len(), theirs.samples.len());
    for (a, b) in ours.samples.iter().zip(&theirs.samples) {
        assert_eq!((&a.0, &a.1), (&b.0, &b.1));
        // The facade is told the end of each bucket in place of the time.
        let most = if a.0.ends_with("_sum") { a.2 * 1.125 } else { a.2 };
        assert!(b.2 >= a.2 - 1e-9 && b.2 <= most + 1e-9, "{a:?}, {b:?}");
    }
    for (name, [kind, _, help]) in &ours.families {
        let theirs = theirs.families.get(name).or(theirs.families.get(&format!("{name}_total"))).expect(name);
        assert_eq!((kind, help), (&theirs[0], &theirs[2]), "{name}");
    }
}

#[test]
fn a_report_has_a_bound() {
    let fake = Fake::new();
    let pool = Pool::builder().name("orders").build(fake.direct()).unwrap();
    let (pools, recorder) = (Pools::of(&pool), recorder());
    (0..150_000).for_each(|_| drop(pool.get().unwrap()));
    let page = Page::parse(&reported(&pools, &recorder));
    assert_eq!(page.value("millpond_checkouts_total", &[]), 150_000.0);
    // (A bucket with anything in it is told at least once.)
    let told = page.value("db_client_connection_wait_time_seconds_count", &[]);
    assert!((100_000.0..100_400.0).contains(&told), "{told}");
    drop(pool.get().unwrap());
    let page = Page::parse(&reported(&pools, &recorder));
    assert_eq!(page.value("db_client_connection_wait_time_seconds_count", &[]), told + 1.0);
}
