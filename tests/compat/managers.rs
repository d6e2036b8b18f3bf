//! Managers as other crates write them, and code that is generic over them. No database here, and no feature: this is
//! what `--no-default-features` leaves.

use crate::support::SOON;
use millpond::{Cause, CloseReason, Manage, Opening, Pool, PooledConnection, Returned};
use r2d2::ManageConnection;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

// -------------------------------------------------------------------------------- an r2d2 manager, error `!Send`

/// An error that cannot leave its thread, with a source as well.
#[derive(Debug)]
struct Local(Rc<str>, Option<Box<Local>>);

impl fmt::Display for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Local {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.1.as_deref().map(|source| source as _)
    }
}

/// A store of key and value; what is connected is a view of it.
#[derive(Clone, Default)]
struct Store {
    rows: Arc<Mutex<HashMap<String, String>>>,
    down: Arc<AtomicBool>,
}

struct View {
    rows: Arc<Mutex<HashMap<String, String>>>,
    alive: bool,
}

impl ManageConnection for Store {
    type Connection = View;
    type Error = Local;

    fn connect(&self) -> Result<View, Local> {
        if self.down.load(Ordering::SeqCst) {
            return Err(Local("no view".into(), Some(Box::new(Local("the store is down".into(), None)))));
        }
        Ok(View { rows: Arc::clone(&self.rows), alive: true })
    }

    fn is_valid(&self, view: &mut View) -> Result<(), Local> {
        if view.alive { Ok(()) } else { Err(Local("blind".into(), None)) }
    }

    fn has_broken(&self, view: &mut View) -> bool {
        !view.alive
    }
}

/// Keeps the texts of errors that it cannot keep themselves, and on which thread it got them.
#[derive(Clone, Debug, Default)]
struct Texts(Arc<Mutex<Vec<(String, String)>>>);

impl r2d2::HandleError<Local> for Texts {
    fn handle_error(&self, error: Local) {
        let thread = thread::current().name().unwrap_or_default().to_owned();
        self.0.lock().unwrap().push((error.to_string(), thread));
    }
}

#[test]
fn an_error_need_not_be_send() {
    let (store, texts) = (Store::default(), Texts::default());
    let pool = Pool::builder()
        .name("store")
        .max_size(2)
        .connection_timeout(Duration::from_secs(1))
        .error_handler(Box::new(texts.clone()))
        .build(store.clone())
        .unwrap();
    thread::scope(|scope| {
        for n in 0..10 {
            let pool = &pool;
            scope.spawn(move || pool.get_timeout(SOON).unwrap().rows.lock().unwrap().insert(n.to_string(), "x".into()));
        }
    });
    assert_eq!(pool.get_timeout(SOON).unwrap().rows.lock().unwrap().len(), 10);
    assert_eq!(*texts.0.lock().unwrap(), []);

    let mut all = [pool.get_timeout(SOON).unwrap(), pool.get_timeout(SOON).unwrap()];
    store.down.store(true, Ordering::SeqCst);
    all.iter_mut().for_each(|view| view.alive = false);
    drop(all);
    let error = pool.get().expect_err("there is no store to connect to");
    // The whole chain, across threads, as text.
    assert!(error.is_timeout() && error.to_string().contains("no view: the store is down"), "{error}");
    assert!(!error.is_exhausted(), "{error}");
    let (text, thread) = texts.0.lock().unwrap()[0].clone();
    assert!(text == "no view" && thread.starts_with("store"), "{text} on {thread}");
    assert!(pool.stats().closed_for(CloseReason::Broken) > 0, "{}", pool.stats());

    store.down.store(false, Ordering::SeqCst);
    assert!(pool.get_timeout(SOON).is_ok(), "it comes back by itself");
}

// ------------------------------------------------------------------------------------------------- generic code

/// What a crate for any r2d2 manager looks like: it names r2d2's trait, and `millpond::Pool` instead of r2d2's.
struct Repository<M: ManageConnection> {
    pool: Pool<M>,
}

impl<M> Repository<M>
where
    M: ManageConnection,
    M::Connection: Rows,
{
    fn new(manager: M) -> Result<Self, millpond::Error> {
        Ok(Repository { pool: Pool::builder().max_size(2).min_idle(Some(1)).build(manager)? })
    }

    fn check_out(&self) -> Result<PooledConnection<M>, millpond::Error> {
        self.pool.get()
    }

    fn put(&self, key: &str, value: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut connection = self.check_out()?;
        let connection: &mut M::Connection = &mut connection;
        connection.insert(key, value);
        Ok(())
    }

    fn get(&self, key: &str) -> Option<String> {
        self.pool.try_get()?.find(key)
    }

    fn idle(&self) -> u32 {
        let millpond::State { connections: _, idle_connections, .. } = self.pool.state();
        idle_connections
    }
}

/// What such a crate asks of the connections.
trait Rows {
    fn insert(&mut self, key: &str, value: &str);
    fn find(&self, key: &str) -> Option<String>;
}

impl Rows for View {
    fn insert(&mut self, key: &str, value: &str) {
        self.rows.lock().unwrap().insert(key.into(), value.into());
    }

    fn find(&self, key: &str) -> Option<String> {
        self.rows.lock().unwrap().get(key).cloned()
    }
}

#[test]
fn code_for_any_r2d2_manager() {
    fn handle<T: Clone + Send + Sync + fmt::Debug + 'static>(_: &T) {}
    let repository = Repository::new(Store::default()).unwrap();
    handle(&repository.pool);
    repository.put("wheel", "greased").unwrap();
    assert_eq!(repository.get("wheel").as_deref(), Some("greased"));
    // The floor was filled while the only one was in use, perhaps.
    assert!((1..=2).contains(&repository.idle()), "{:?}", repository.pool.state());
    // Through the traits this crate re-exports, which are r2d2's own.
    fn connect<M: millpond::ManageConnection>(manager: &M) -> Result<M::Connection, M::Error> {
        manager.connect()
    }
    assert!(connect(repository.pool.manager()).is_ok());
}

/// A manager that wraps another one, as those that count or trace do.
struct Counted<M>(M, Arc<AtomicU32>);

impl<M: ManageConnection> ManageConnection for Counted<M> {
    type Connection = M::Connection;
    type Error = M::Error;

    fn connect(&self) -> Result<M::Connection, M::Error> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.connect()
    }

    fn is_valid(&self, connection: &mut M::Connection) -> Result<(), M::Error> {
        self.0.is_valid(connection)
    }

    fn has_broken(&self, connection: &mut M::Connection) -> bool {
        self.0.has_broken(connection)
    }
}

#[test]
fn a_manager_around_a_manager() {
    let count = Arc::new(AtomicU32::new(0));
    let repository = Repository::new(Counted(Store::default(), Arc::clone(&count))).unwrap();
    repository.put("a", "b").unwrap();
    drop([repository.check_out().unwrap(), repository.check_out().unwrap()]);
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

/// r2d2's traits as objects, and its do-nothing implementations of them.
#[test]
fn hooks_of_r2d2s_own() {
    let builder: millpond::Builder<Store> = millpond::Builder::default();
    let pool = builder
        .error_handler(Box::new(r2d2::NopErrorHandler))
        .connection_customizer(Box::new(r2d2::NopConnectionCustomizer))
        .event_handler(Box::new(millpond::event::NopEventHandler))
        .build_unchecked(Store::default());
    assert!(pool.get().is_ok());
    drop(pool);
    let pool = Pool::builder().error_handler(Box::new(r2d2::LoggingErrorHandler)).build_unchecked(Store::default());
    assert!(pool.get().is_ok());
}

// --------------------------------------------------------------------------------------- a `Manage` from outside

/// A manager that says more than r2d2's three methods can.
#[derive(Default)]
struct Sluice {
    opened: AtomicU32,
    reset: AtomicU32,
    closed: Arc<AtomicU32>,
    locked: bool,
}

struct Gate {
    number: u32,
    dirty: bool,
    after: Returned,
}

#[derive(Debug)]
struct Jammed;

impl fmt::Display for Jammed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the gate is jammed")
    }
}

impl std::error::Error for Jammed {}

impl Manage for Sluice {
    type Connection = Gate;
    type Error = Jammed;

    fn open(&self, opening: &Opening) -> Result<Gate, Jammed> {
        assert!(opening.pool() == "sluice" && opening.limit() == Duration::from_secs(10), "{opening:?}");
        if self.locked {
            return Err(Jammed);
        }
        let number = self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Gate { number, dirty: false, after: Returned::Keep })
    }

    fn validate(&self, _: &mut Gate, _: Duration) -> Result<(), Jammed> {
        Ok(())
    }

    fn keeps_limits(&self) -> bool {
        true
    }

    fn returned(&self, gate: &mut Gate) -> Returned {
        if gate.dirty { Returned::Reset } else { gate.after }
    }

    fn reset(&self, gate: &mut Gate, _: Duration) -> Result<(), Jammed> {
        self.reset.fetch_add(1, Ordering::SeqCst);
        gate.dirty = false;
        Ok(())
    }

    fn close(&self, _: Gate, _: Duration) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    fn server_id(&self, gate: &Gate) -> Option<u64> {
        Some(1000 + u64::from(gate.number))
    }

    fn explain(&self, error: &Jammed) -> Cause {
        Cause::text(error).permanent()
    }
}

#[test]
fn a_manager_of_this_crates_own_trait() {
    let closed = Arc::new(AtomicU32::new(0));
    let sluice = Sluice { closed: Arc::clone(&closed), ..Sluice::default() };
    let pool = Pool::builder().name("sluice").max_size(2).build(sluice).unwrap();

    let mut gate = pool.get().unwrap();
    assert_eq!(PooledConnection::info(&gate).server_id, Some(1000));
    gate.dirty = true;
    drop(gate);
    let gate = pool.get().unwrap();
    assert!(!gate.dirty && gate.number == 0, "cleaned, not replaced");
    assert_eq!(pool.manager().reset.load(Ordering::SeqCst), 1);

    let mut other = pool.get().unwrap();
    other.after = Returned::Discard;
    drop((gate, other));
    let mut gate = pool.get().unwrap();
    gate.after = Returned::Outdated;
    drop(gate);
    assert_eq!(pool.get().unwrap().number, 2);

    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    assert_eq!(closed.load(Ordering::SeqCst), 3);
    let stats = pool.stats();
    for reason in [CloseReason::Discarded, CloseReason::Outdated, CloseReason::Closed] {
        assert_eq!(stats.closed_for(reason), 1, "{stats}");
    }
}

#[test]
fn a_permanent_refusal_ends_build_at_once() {
    let begun = Instant::now();
    let error = Pool::builder().name("sluice").build(Sluice { locked: true, ..Sluice::default() }).unwrap_err();
    assert!(error.is_connect() && error.to_string().contains("the gate is jammed"), "{error}");
    assert!(error.cause().is_some_and(Cause::is_permanent) && begun.elapsed() < SOON, "{error}");
}
