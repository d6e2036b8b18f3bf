//! P4 and P6: the user's code may block, or call the pool from where the pool calls it: no deadlock.
//!
//! Every test runs on a thread that is watched, so that one that hangs fails instead.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::Call::{
    self, Abort, Cancel, Close, Explain, HandleAcquire, HandleCheckin, HandleCheckout, HandleRelease, HandleTimeout,
    OnAcquire, OnRelease, Open, Reset, ServerId, Validate,
};
use crate::fake::{Act, Fake, FakeConn, FakeError, R2d2Fake, run};
use crate::support::{EPSILON, SOON, ms, threads_named, wait_until, within};
use crossbeam_channel::bounded;
use millpond::{Builder, CloseReport, Manage, Pool, PooledConnection, Returned};
use parking_lot::{Condvar, Mutex};

const MAX_IDLE: Duration = ms(100);

/// Runs a test, watched, with the logger installed.
#[track_caller]
fn watched(body: impl FnOnce() + Send + 'static) {
    crate::support::watched_alone(|| {
        LOG.install();
        body();
    });
}

fn builder<M: Manage>(name: &str) -> Builder<M> {
    Pool::builder().name(name).max_size(3).max_idle(MAX_IDLE).validate(millpond::Validate::Always)
}

/// With every hook and handler of the fake's.
fn hooked<M: Manage<Connection = FakeConn, Error = FakeError>>(
    name: &str,
    fake: &Fake,
    customizer: bool,
) -> Builder<M> {
    let builder = builder(name).error_handler(fake.error_handler()).event_handler(fake.event_handler());
    if customizer { builder.connection_customizer(fake.customizer()) } else { builder }
}

/// All the slots are there.
#[track_caller]
fn whole<M: Manage>(pool: &Pool<M>) {
    let checked_out: Vec<_> = (0..3).map(|_| pool.get_timeout(SOON).unwrap()).collect();
    assert_eq!((pool.stats().in_use, pool.stats().size()), (3, 3), "{}", pool.stats());
    // A close that took its time after a recycle may have been abandoned for a waiter, and comes back.
    assert!(wait_until(within(SOON), || pool.stats().abandoned == 0), "{}", pool.stats());
    drop(checked_out);
}

/// A closed pool leaves nothing behind.
#[track_caller]
fn nothing_is_left(name: &str, fake: &Fake) {
    fake.wait_alive(0);
    assert!(wait_until(within(SOON), || threads_named(name).is_empty()), "{:?}", threads_named(name));
}

// -------------------------------------------------------------------------------------------------- a logger

/// The logger of this program.
static LOG: Logger = Logger { state: Mutex::new(LogState::new()), changed: Condvar::new() };

struct Logger {
    state: Mutex<LogState>,
    changed: Condvar,
}

struct LogState {
    blocks: bool,
    inside: usize,
    records: Vec<String>,
    also: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl LogState {
    const fn new() -> LogState {
        LogState { blocks: false, inside: 0, records: Vec::new(), also: None }
    }
}

/// Lets the logger go on when dropped.
struct Gate;

impl Drop for Gate {
    fn drop(&mut self) {
        let mut state = LOG.state.lock();
        state.blocks = false;
        state.also = None;
        LOG.changed.notify_all();
    }
}

impl Logger {
    /// As the program's logger, with nothing in it.
    fn install(&'static self) {
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(|| {
            log::set_logger(self).expect("no other logger");
            log::set_max_level(log::LevelFilter::Trace);
        });
        self.state.lock().records.clear();
    }

    /// From now on every record blocks, until the gate is dropped.
    fn block(&self) -> Gate {
        self.state.lock().blocks = true;
        Gate
    }

    /// From now on every record does this as well.
    fn also(&self, code: impl Fn() + Send + Sync + 'static) -> Gate {
        self.state.lock().also = Some(Arc::new(code));
        Gate
    }

    fn wait_inside(&self) {
        let deadline = within(SOON);
        let mut state = self.state.lock();
        while state.inside == 0 {
            assert!(!self.changed.wait_until(&mut state, deadline).timed_out(), "nothing is logged");
        }
    }

    fn records(&self, pool: &str) -> Vec<String> {
        let begin = format!("pool '{pool}': ");
        self.state.lock().records.iter().filter(|r| r.starts_with(&begin)).cloned().collect()
    }
}

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target() != "millpond" {
            return;
        }
        let mut state = self.state.lock();
        state.inside += 1;
        self.changed.notify_all();
        while state.blocks {
            self.changed.wait(&mut state);
        }
        state.inside -= 1;
        state.records.push(record.args().to_string());
        let also = state.also.clone();
        drop(state);
        if let Some(also) = also {
            also();
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_logger_that_blocks() {
    watched(|| {
        let fake = Fake::new();
        let gate = LOG.block();
        let pool = builder("mum").build(fake.r2d2()).unwrap();
        LOG.wait_inside();

        // Connections come and go.
        let begun = Instant::now();
        whole(&pool);
        for _ in 0..20 {
            PooledConnection::discard(pool.get_timeout(SOON).unwrap());
        }
        fake.next(Call::Open, [Act::Fail, Act::Panic]);
        whole(&pool);
        let last_use = Instant::now();
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        let gone = wait_until(last_use + MAX_IDLE + EPSILON, || pool.state().connections == 0);
        assert!(gone, "no evictions: {}", pool.connections());
        // With it the slot is free, and that it was closed is on record.
        assert!(wait_until(within(SOON), || pool.stats().size() == 0), "{}", pool.stats());
        assert_eq!(fake.alive(), 0);
        assert!(pool.stats().max_lateness < EPSILON, "{}", pool.stats());

        // As many records wait as may; the rest is counted.
        assert_eq!(pool.stats().dropped_records, 0);
        let deadline = within(SOON);
        while pool.stats().dropped_records == 0 {
            assert!(Instant::now() < deadline, "records are kept without bound");
            pool.recycle();
        }
        (0..500).for_each(|_| pool.recycle());
        assert_eq!(pool.stats().dropped_records, 501);
        assert!(pool.stats().to_string().contains("log        501 dropped: the logger blocked"), "{}", pool.stats());
        // Hundreds of records wait for one thread. (How many the connections took depends on how fast theirs finished.)
        assert!(threads_named("mum").len() <= 20, "{:?}", threads_named("mum"));

        // The close waits for the logger as long as it waits for anything.
        let begun = Instant::now();
        let report = pool.close(ms(200));
        assert!(begun.elapsed() < ms(200) + EPSILON, "{:?}", begun.elapsed());
        assert_eq!((report.left.len(), report.abandoned, report.threads), (0, 0, 1), "{report}");
        drop(gate);
        nothing_is_left("mum", &fake);
        let records = LOG.records("mum");
        assert_eq!(records.len(), 1 + 1024);
        assert!(records[0].starts_with("pool 'mum': open (max_size 3"), "{}", records[0]);
    });
}

#[test]
fn a_logger_that_panics() {
    watched(|| {
        let fake = Fake::new();
        let _gate = LOG.also(|| std::panic::resume_unwind(Box::new(crate::fake::PANIC)));
        let pool = builder("wrath").build(fake.r2d2()).unwrap();
        fake.live(&pool);
        whole(&pool);
        assert!(pool.close(SOON).is_complete());
        assert!(LOG.records("wrath").len() > 10);
        nothing_is_left("wrath", &fake);
    });
}

#[test]
fn a_logger_that_uses_and_closes_the_pool_it_logs_for() {
    watched(|| {
        let fake = Fake::new();
        let pool = builder("eager").build(fake.direct()).unwrap();
        let gate = LOG.also({
            let pool = pool.clone();
            move || everything(&pool)
        });
        fake.live(&pool);
        whole(&pool);
        drop(gate);
        let (tell, told) = bounded(1);
        let it = Mutex::new(Some(pool.clone()));
        // Once: the close is logged as well.
        let _gate = LOG.also(move || {
            let it = it.lock().take();
            it.iter().for_each(|pool| tell.send(pool.close(SOON)).unwrap());
        });
        pool.recycle();
        let report = told.recv_timeout(SOON).unwrap();
        assert!(report.elapsed < ms(1000), "it waited for itself: {report}");
        drop(pool);
        nothing_is_left("eager", &fake);
    });
}

// -------------------------------------------------------------------------------------------------- calls from calls

/// All that a handle can be asked, but to close.
fn everything<M: Manage>(pool: &Pool<M>) {
    drop(pool.get_timeout(ms(20)));
    drop(pool.try_get());
    let _ = (pool.stats().to_string(), pool.connections().to_string(), format!("{pool:?}"));
    let _ = pool.resize(3);
    drop(pool.clone());
}

/// Does something in every call of the pool's, but not in those that this makes in turn.
fn once_at_a_time(code: impl Fn() + Send + Sync + 'static) -> (Act, Arc<AtomicU64>) {
    let (busy, times) = (AtomicBool::new(false), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&times);
    let act = run(move || {
        if !busy.swap(true, SeqCst) {
            code();
            counted.fetch_add(1, SeqCst);
            busy.store(false, SeqCst);
        }
    });
    (act, times)
}

type Handle<M> = Arc<Mutex<Option<Pool<M>>>>;

/// The pool itself, for code that is made before it.
fn handle<M: Manage>(to: &Handle<M>) -> Option<Pool<M>> {
    to.lock().clone()
}

/// Uses the pool from one of its calls.
fn uses<M: Manage<Connection = FakeConn, Error = FakeError>>(call: Call, fake: &Fake, builder: Builder<M>, manager: M) {
    println!("{call:?}");
    let pool = builder.build(manager).unwrap();
    let it: Handle<M> = Arc::new(Mutex::new(Some(pool.clone())));
    let (act, times) = once_at_a_time({
        let it = Arc::clone(&it);
        move || handle(&it).iter().for_each(everything)
    });
    fake.set(call, act);
    fake.live(&pool);
    // (On a thread of the pool's, which has a life of its own.)
    assert!(wait_until(within(SOON), || times.load(SeqCst) > 0), "{call:?} did not happen");
    whole(&pool);
    fake.release(call);
    let report = pool.close(SOON);
    assert!(report.is_complete(), "{report}");
    it.lock().take();
    nothing_is_left(pool.name(), fake);
}

/// Closes the pool from one of its calls.
fn closes<M: Manage<Connection = FakeConn, Error = FakeError>>(
    call: Call,
    fake: &Fake,
    builder: Builder<M>,
    manager: M,
) {
    println!("{call:?}");
    let pool = builder.build(manager).unwrap();
    let it: Handle<M> = Arc::new(Mutex::new(Some(pool.clone())));
    let (tell, told) = bounded::<CloseReport>(1);
    let user = thread::current().id();
    let (act, _) = once_at_a_time(move || {
        if let Some(pool) = it.lock().take() {
            // Those that the user's own thread holds beside the one that the call is about cost the grace.
            let grace = if thread::current().id() == user { ms(300) } else { SOON };
            tell.send(pool.close(grace)).unwrap();
        }
    });
    fake.set(call, act);
    fake.live(&pool);
    let report = told.recv_timeout(SOON).unwrap_or_else(|_| panic!("{call:?} did not happen"));
    // What others hold may take its time: 20 ms at most, in this life.
    assert!(report.elapsed < ms(1000), "it waited for itself: {report}");
    assert!(pool.get().unwrap_err().is_closed());
    let name = pool.name().to_owned();
    drop(pool);
    nothing_is_left(&name, fake);
}

const OF_R2D2: [Call; 4] = [Open, Validate, Call::Returned, Call::Drop];
const OF_ITS_OWN: [Call; 8] = [Open, Validate, Call::Returned, Reset, Close, Call::Drop, Explain, ServerId];
const HOOKS: [Call; 8] = [
    OnAcquire,
    OnRelease,
    Call::HandleError,
    HandleAcquire,
    HandleRelease,
    HandleCheckout,
    HandleTimeout,
    HandleCheckin,
];

#[test]
fn every_call_may_use_the_pool() {
    watched(|| {
        for call in OF_R2D2 {
            let fake = Fake::new();
            uses(call, &fake, hooked("using", &fake, false), fake.r2d2());
        }
        for call in OF_ITS_OWN {
            let fake = Fake::new();
            uses(call, &fake, hooked("using", &fake, false), fake.direct());
        }
        for call in HOOKS {
            let fake = Fake::new();
            uses(call, &fake, hooked("using", &fake, true), fake.r2d2());
        }
        let fake = Fake::new();
        fake.keeps_limits(true);
        uses(Validate, &fake, hooked("using", &fake, false).validation_timeout(ms(10)), fake.direct());
    });
}

#[test]
fn every_call_may_close_the_pool() {
    watched(|| {
        for call in OF_R2D2 {
            let fake = Fake::new();
            closes(call, &fake, hooked("closing", &fake, false), fake.r2d2());
        }
        for call in OF_ITS_OWN {
            let fake = Fake::new();
            closes(call, &fake, hooked("closing", &fake, false), fake.direct());
        }
        for call in HOOKS {
            let fake = Fake::new();
            closes(call, &fake, hooked("closing", &fake, true), fake.r2d2());
        }
    });
}

#[test]
fn a_validation_on_the_callers_thread_may_close_the_pool() {
    watched(|| {
        let fake = Fake::new();
        fake.keeps_limits(true);
        closes(Validate, &fake, hooked("closing", &fake, false).validation_timeout(ms(10)), fake.direct());
    });
}

/// Aborts and cancels happen to what is stuck, not in the life of a healthy pool.
#[test]
fn an_abort_or_a_cancel_may_use_and_close_the_pool() {
    watched(|| {
        let fake = Fake::new();
        fake.abortable(true);
        let pool = builder("cutting").open_timeout(ms(50)).build(fake.direct()).unwrap();
        let it: Handle<_> = Arc::new(Mutex::new(Some(pool.clone())));
        let (using, used) = once_at_a_time({
            let it = Arc::clone(&it);
            move || handle(&it).iter().for_each(everything)
        });
        fake.set(Abort, using);
        let checked_out = pool.get().unwrap();
        fake.next(Open, [Act::Block]);
        let another = pool.get_timeout(SOON).unwrap();
        // More often, if this machine takes longer than the limit to open one.
        assert!(wait_until(within(SOON), || used.load(SeqCst) >= 1));
        drop((checked_out, another));
        whole(&pool);

        let (tell, told) = bounded::<CloseReport>(1);
        fake.set(Cancel, run(move || drop(it.lock().take().map(|pool| tell.send(pool.close(ms(100)))))));
        let checked_out = thread::scope(|s| s.spawn(|| pool.get_timeout(SOON).unwrap()).join().unwrap());
        assert_eq!(pool.close(ms(50)).left.len(), 1);
        assert_eq!(told.recv_timeout(SOON).unwrap().left.len(), 1);
        drop(checked_out);
        drop(pool);
        nothing_is_left("cutting", &fake);
    });
}

// -------------------------------------------------------------------------------------------------- the last handle

/// The last handle of the pool is dropped by one of its calls.
fn last_handle_goes_in<M: Manage<Connection = FakeConn, Error = FakeError>>(
    call: Call,
    fake: &Fake,
    builder: Builder<M>,
    manager: M,
) {
    println!("{call:?}");
    // What is idle stays until the call is made, however long this machine takes to come to that.
    let pool = builder.max_idle(None).build(manager).unwrap();
    let name = pool.name().to_owned();
    let it: Handle<M> = Arc::new(Mutex::new(None));
    let (go, gone) = bounded::<()>(0);
    fake.set(call, {
        let it = Arc::clone(&it);
        run(move || {
            // Until this is the last one, or no longer there.
            let _ = gone.recv();
            let last = it.lock().take();
            drop(last);
        })
    });
    // Something happens on the executor, and `call` in it.
    match call {
        Open | OnAcquire | HandleAcquire | ServerId => {
            let checked_out = pool.get_timeout(SOON).unwrap();
            assert!(pool.try_get().is_none());
            *it.lock() = Some(pool);
            fake.wait_inside(call, 1);
            drop(checked_out);
        }
        Explain | Call::HandleError => {
            let checked_out = pool.get_timeout(SOON).unwrap();
            fake.next(Open, [Act::Fail]);
            assert!(pool.try_get().is_none());
            *it.lock() = Some(pool);
            fake.wait_inside(call, 1);
            drop(checked_out);
        }
        Validate => {
            assert!(pool.try_get().is_none());
            *it.lock() = Some(pool);
            fake.wait_inside(call, 1);
        }
        Reset => {
            fake.verdict(Returned::Reset);
            drop(pool.get_timeout(SOON).unwrap());
            *it.lock() = Some(pool);
            fake.wait_inside(call, 1);
        }
        _ => {
            PooledConnection::discard(pool.get_timeout(SOON).unwrap());
            *it.lock() = Some(pool);
            fake.wait_inside(call, 1);
        }
    }
    drop(go);
    nothing_is_left(&name, fake);
    assert!(it.lock().is_none(), "it was dropped, and not by the test");
}

#[test]
fn the_last_handle_is_dropped_on_the_executor() {
    watched(|| {
        for call in [Open, Validate, Call::Drop] {
            let fake = Fake::new();
            last_handle_goes_in(call, &fake, hooked("lasting", &fake, false), fake.r2d2());
        }
        for call in [Open, Validate, Reset, Close, Call::Drop, Explain, ServerId] {
            let fake = Fake::new();
            last_handle_goes_in(call, &fake, hooked("lasting", &fake, false), fake.direct());
        }
        for call in [OnAcquire, OnRelease, Call::HandleError, HandleAcquire, HandleRelease] {
            let fake = Fake::new();
            last_handle_goes_in(call, &fake, hooked("lasting", &fake, true), fake.r2d2());
        }
    });
}

/// A connection that owns a handle of its own pool, and one of another.
struct Owning(Option<Pool<OwningManager>>, FakeConn);

struct OwningManager(R2d2Fake, Handle<OwningManager>);

impl millpond::ManageConnection for OwningManager {
    type Connection = Owning;
    type Error = FakeError;

    fn connect(&self) -> Result<Owning, FakeError> {
        Ok(Owning(handle(&self.1), self.0.connect()?))
    }

    fn is_valid(&self, c: &mut Owning) -> Result<(), FakeError> {
        self.0.is_valid(&mut c.1)
    }

    fn has_broken(&self, c: &mut Owning) -> bool {
        self.0.has_broken(&mut c.1)
    }
}

#[test]
fn a_connection_that_owns_a_handle() {
    watched(|| {
        let fake = Fake::new();
        let it: Handle<OwningManager> = Arc::default();
        let pool = builder("owning").max_idle(None).build_unchecked(OwningManager(fake.r2d2(), Arc::clone(&it)));
        *it.lock() = Some(pool.clone());
        let checked_out = [pool.get_timeout(SOON).unwrap(), pool.get_timeout(SOON).unwrap()];
        assert!(checked_out.iter().all(|c| c.0.is_some()));
        let [one, mut other] = checked_out;
        PooledConnection::extensions_mut(&mut other).insert(pool.clone());
        drop((one, other));
        // Nobody but the pool itself has a handle then, so nobody but a connection closes it.
        it.lock().take();
        let mut last = pool.get_timeout(SOON).unwrap();
        drop(pool);
        let its_own = last.0.take().unwrap();
        drop(last);
        assert!(!its_own.is_closed());
        its_own.close(Duration::ZERO);
        drop(its_own);
        nothing_is_left("owning", &fake);
    });
}

#[test]
fn the_last_handle_is_in_a_connection() {
    watched(|| {
        let fake = Fake::new();
        let it: Handle<OwningManager> = Arc::default();
        let pool = builder("inside").build_unchecked(OwningManager(fake.r2d2(), Arc::clone(&it)));
        *it.lock() = Some(pool.clone());
        drop(pool.get_timeout(SOON).unwrap());
        it.lock().take();
        drop(pool);
        // It is evicted, on the executor, and with it goes the pool.
        nothing_is_left("inside", &fake);
    });
}

// -------------------------------------------------------------------------------------------------- a thread's end

thread_local! {
    static HELD: RefCell<Option<PooledConnection<R2d2Fake>>> = const { RefCell::new(None) };
    static AT_THE_END: RefCell<Option<AtTheEnd>> = const { RefCell::new(None) };
}

struct AtTheEnd(Pool<R2d2Fake>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        everything(&self.0);
        drop(self.0.get_timeout(SOON).unwrap());
    }
}

#[test]
fn returned_from_the_destructor_of_a_thread_local() {
    watched(|| {
        let fake = Fake::new();
        let pool = builder("locals").event_handler(fake.event_handler()).build(fake.r2d2()).unwrap();
        for early in [true, false] {
            let before = fake.calls(Call::Returned);
            let it = pool.clone();
            let checked_out = move || {
                if early {
                    // Registered before anything of the pool's on this thread, so it is destroyed after all of that.
                    HELD.with(|_| ());
                }
                let conn = it.get_timeout(SOON).unwrap();
                HELD.with_borrow_mut(|checked_out| *checked_out = Some(conn));
                assert_eq!(it.stats().in_use, 1);
            };
            thread::spawn(checked_out).join().unwrap();
            assert_eq!((pool.stats().in_use, fake.calls(Call::Returned) - before), (0, 1));
        }
        whole(&pool);
        assert!(pool.close(SOON).is_complete());
        nothing_is_left("locals", &fake);
    });
}

#[test]
fn used_and_closed_from_the_destructor_of_a_thread_local() {
    watched(|| {
        let fake = Fake::new();
        let pool = builder("farewell").build(fake.r2d2()).unwrap();
        for early in [true, false] {
            let it = pool.clone();
            let last_words = move || {
                if early {
                    AT_THE_END.with(|_| ());
                }
                drop(it.get_timeout(SOON).unwrap());
                AT_THE_END.with_borrow_mut(|last| *last = Some(AtTheEnd(it)));
            };
            thread::spawn(last_words).join().unwrap();
            assert_eq!(pool.stats().in_use, 0);
        }
        whole(&pool);
        // The last handle goes there as well.
        thread::spawn(move || AT_THE_END.with_borrow_mut(|last| *last = Some(AtTheEnd(pool)))).join().unwrap();
        nothing_is_left("farewell", &fake);
    });
}
