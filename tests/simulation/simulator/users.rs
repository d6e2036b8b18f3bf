//! Those who use the pool, and the one who makes trouble.

use super::plan::{Act, Closer, End, Plan, Step};
use super::promises::{Judge, close_was_in_time};
use super::server::{Conn, Fake, Hooks, Server};
use super::{broken, is_broken, note};
use millpond::model::thread::{self, catch, panic_now};
use millpond::model::time::now;
use millpond::{Pool, PooledConnection};
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

thread_local! {
    static DETACHED: Cell<usize> = const { Cell::new(0) };
    static HOOK_CLOSES: Cell<bool> = const { Cell::new(false) };
}

/// Whether a hook has begun to close the pool.
pub fn hook_closes() -> bool {
    HOOK_CLOSES.get()
}

/// How many connections are detached and alive.
pub fn detached() -> usize {
    DETACHED.get()
}

/// What a task that uses the pool has.
#[derive(Clone)]
struct Scene {
    pool: Pool<Fake>,
    server: Arc<Server>,
    judge: Arc<Judge>,
    /// Connections that somebody returns later.
    late: Arc<Mutex<Vec<PooledConnection<Fake>>>>,
}

/// The life of the pool is over, but for its end.
pub struct Ends {
    scene: Scene,
}

/// Closes the pool.
pub fn close(pool: &Pool<Fake>, grace: Duration, by: Closer) -> bool {
    let begun = now();
    // More than may be, if there is room for more at the moment.
    let most_cancels = pool.max_size().max(pool.connections().len() as u32);
    HOOK_CLOSES.set(HOOK_CLOSES.get() || matches!(by, Closer::Hook));
    let complete = match by {
        Closer::Call | Closer::Hook => pool.close(grace).is_complete(),
        Closer::Guard => pool.guard().grace(grace).close().is_complete(),
        Closer::Unwinding => {
            let guard = pool.guard().grace(grace);
            let _ = catch(move || {
                let _guard = guard;
                panic_now()
            });
            false
        }
    };
    close_was_in_time(begun, grace, most_cancels);
    if !pool.is_closed() {
        broken("P4", "it is open after a close");
    }
    complete
}

/// All steps are done by those who do them.
pub fn live(plan: &Plan, server: &Arc<Server>) -> Ends {
    DETACHED.set(0);
    HOOK_CLOSES.set(false);
    let limits = &plan.limits;
    let mut builder = Pool::builder()
        .name("simulated")
        .max_size(limits.max_size)
        .min_idle(limits.min_idle)
        .max_idle(limits.max_idle.filter(|max| limits.min_idle == 0 || !max.is_zero()))
        .max_lifetime(limits.max_lifetime)
        .lifetime_jitter(limits.lifetime_jitter)
        .connection_timeout(limits.connection_timeout)
        .validate(limits.validate)
        .validation_timeout(limits.validation_timeout)
        .open_timeout(limits.open_timeout)
        .close_timeout(limits.close_timeout)
        .parallel_opens(limits.parallel_opens)
        .max_waiting(limits.max_waiting)
        .keepalive(limits.keepalive)
        .leak_threshold(limits.leak_threshold)
        .fair_after(limits.fair_after)
        .error_handler(Box::new(Hooks(Arc::clone(server))));
    if plan.manager.customizer {
        builder = builder.connection_customizer(Box::new(Hooks(Arc::clone(server))));
    }
    if plan.manager.events {
        builder = builder.event_handler(Box::new(Hooks(Arc::clone(server))));
    }
    let pool = builder.build_unchecked(Fake(Arc::clone(server)));
    let scene = Scene { pool, server: Arc::clone(server), judge: Judge::new(plan), late: Arc::default() };
    let (seen, haste) = (scene.clone(), plan.haste > 0.0);
    // The handles that this has are dropped with `at_rest`.
    let at_rest: Arc<dyn Fn()> = Arc::new(move || seen.judge.look(&seen.server, &seen.pool, haste));
    millpond::model::world(|world| world.at_rest = Some(at_rest));
    let mut all = Vec::new();
    for who in 0..=plan.users {
        let steps: Vec<Step> = plan.steps.iter().filter(|step| step.who == who).cloned().collect();
        let scene = scene.clone();
        all.push(thread::spawn(move || {
            steps.into_iter().take_while(|_| !is_broken()).for_each(|step| scene.act(step))
        }));
    }
    for thread in all {
        let _ = thread.join();
    }
    Ends { scene }
}

impl Scene {
    fn act(&self, step: Step) {
        let Step { number, who, act } = step;
        note(|| format!("{who}: {number} {act:?}"));
        match act {
            Act::Sleep(d) => thread::sleep(d),
            Act::Get { timeout, hold, end } => {
                if let Some(conn) = self.get(who, timeout) {
                    self.use_it(who, conn, hold, end);
                }
            }
            Act::TryGet { hold, end } => {
                self.judge.begins_to_wait(who, Duration::ZERO);
                let conn = self.pool.try_get();
                let begun = self.judge.ends_to_wait(who).expect("it began");
                if let Some(conn) = conn {
                    self.judge.is_handed(&self.server, who, begun, &conn);
                    self.use_it(who, conn, hold, end);
                }
            }
            Act::Two { timeout, hold } => {
                if let Some(first) = self.get(who, timeout) {
                    if let Some(second) = self.get(who, timeout) {
                        self.use_it(who, second, hold, End::Return);
                    }
                    self.use_it(who, first, hold, End::Return);
                }
            }
            Act::Faults(faults) => self.server.set_faults(faults),
            Act::Kill(n) => self.server.kill(n),
            Act::Down(d) => {
                self.server.set_down(true);
                thread::sleep(d);
                self.server.set_down(false);
            }
            Act::Resize(n) => {
                // Told before, since the pool may be seen with either in between.
                self.judge.is_resized(n);
                if self.pool.resize(n).is_err() {
                    broken("P5", format!("resize({n}) was refused"));
                }
            }
            Act::Recycle => {
                let called = now();
                self.pool.recycle();
                self.judge.was_recycled(called);
            }
            Act::NoThreads(d) => {
                millpond::model::world(|world| world.threads = false);
                thread::sleep(d);
                millpond::model::world(|world| world.threads = true);
            }
            Act::ReturnLate => self.return_late(),
            Act::Look => {
                let (stats, rows) = (self.pool.stats().to_string(), self.pool.connections().to_string());
                note(|| format!("{stats}\n{rows}"));
                let _ = (self.pool.state(), self.pool.is_closed(), format!("{:?}", self.pool));
            }
            Act::Close { grace, by } => {
                if let Closer::Hook = by {
                    let mut state = self.server.state();
                    state.hook_closes = Some((grace, Arc::clone(&self.judge)));
                    state.pool = Some(self.pool.clone());
                } else {
                    self.judge.is_closing();
                    close(&self.pool, grace, by);
                }
            }
        }
    }

    fn get(&self, who: usize, timeout: Duration) -> Option<PooledConnection<Fake>> {
        self.judge.begins_to_wait(who, timeout);
        let result = self.pool.get_timeout(timeout);
        let begun = self.judge.ends_to_wait(who)?;
        match result {
            Ok(conn) => {
                note(|| format!("{who}: got {}", conn.id));
                self.judge.is_handed(&self.server, who, begun, &conn);
                Some(conn)
            }
            Err(error) => {
                note(|| format!("{who}: {error}"));
                self.judge.is_told(who, begun, &error);
                None
            }
        }
    }

    /// A user uses a connection, and finds out if it is dead.
    fn use_it(&self, who: usize, conn: PooledConnection<Fake>, hold: Duration, end: End) {
        thread::sleep(hold);
        if let Some(link) = self.server.state().links.get_mut(&conn.id) {
            if let End::Dies = end {
                link.alive = false;
            }
            link.found = !link.alive;
        }
        note(|| format!("{who}: returns {}", conn.id));
        match end {
            End::Late => return self.late.lock().unwrap_or_else(PoisonError::into_inner).push(conn),
            _ => self.judge.returns(&self.server, &conn),
        }
        match end {
            End::Discard => PooledConnection::discard(conn),
            End::Detach => {
                DETACHED.set(DETACHED.get() + 1);
                let conn: Conn = PooledConnection::detach(conn);
                thread::sleep(hold);
                drop(conn);
                DETACHED.set(DETACHED.get() - 1);
            }
            End::Panic => {
                let _ = catch(move || {
                    let _conn = conn;
                    panic_now()
                });
            }
            End::Return | End::Late | End::Dies => drop(conn),
        }
    }

    fn return_late(&self) {
        let late = std::mem::take(&mut *self.late.lock().unwrap_or_else(PoisonError::into_inner));
        for conn in late {
            self.judge.returns(&self.server, &conn);
            drop(conn);
        }
    }
}

impl Ends {
    /// The faults stop. Then the pool must be as good as new, and its close complete.
    pub fn check(self, plan: &Plan, server: &Arc<Server>) {
        let Ends { scene } = self;
        note(|| "the faults stop".into());
        server.calm_down();
        scene.return_late();
        {
            // A hook that did not come to close the pool does not do so any more.
            let mut state = server.state();
            let pool = state.pool.take();
            state.hook_closes = None;
            drop(state);
            drop(pool);
        }
        if !scene.pool.is_closed() && !is_broken() {
            scene.judge.comes_back(&scene.pool);
        }
        if is_broken() {
            return;
        }
        // What was abandoned or hung has to come back first: its calls take up to 1.5 times their limits.
        let grace = 2 * (plan.limits.open_timeout + plan.limits.close_timeout + plan.limits.validation_timeout)
            + Duration::from_secs(1);
        scene.judge.is_closing();
        let report = scene.pool.close(grace);
        note(|| report.to_string());
        if !report.is_complete() {
            broken("P4", format!("without a fault: {report}"));
        }
        let alive = server.state().links.len();
        if alive > 0 {
            broken("P4", format!("{alive} connections are left after a complete close"));
        }
        if scene.pool.get_timeout(Duration::from_secs(1)).is_ok() || scene.pool.try_get().is_some() {
            broken("P4", "a connection was had after the close");
        }
    }
}
