//! One pool of a soak, from its beginning to its end, and what is known of it from outside.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::journal::Dice;
use crate::support::{SOON, ms, threads_named, wait_until, within};
use crate::world::{LATE, World};
use millpond::postgres::{Connection, Error, Pool, PostgresManager, Reset, ServerGuards};
use millpond::{Builder, CloseReason, CustomizeConnection, Validate};
use postgres::NoTls;

/// How many connections a pool may be told to have.
const MOST: u64 = 8;

/// The settings of a pool, drawn.
#[derive(Clone, Debug)]
pub(crate) struct Drawn {
    pub(crate) max_size: u32,
    pub(crate) min_idle: u32,
    pub(crate) max_idle: Option<Duration>,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) connection_timeout: Duration,
    pub(crate) validate: Validate,
    pub(crate) validation_timeout: Duration,
    pub(crate) open_timeout: Duration,
    pub(crate) close_timeout: Duration,
    pub(crate) parallel_opens: u32,
    pub(crate) max_waiting: Option<u32>,
    pub(crate) fair_after: Duration,
    pub(crate) keepalive: Option<Duration>,
    pub(crate) leak_threshold: Option<Duration>,
    pub(crate) reset: Reset,
    pub(crate) observe: bool,
    pub(crate) statement_cache: usize,
    pub(crate) guards: bool,
    pub(crate) customized: bool,
}

impl Drawn {
    fn new(dice: &mut Dice) -> Drawn {
        let max_size = 1 + dice.roll(MOST) as u32;
        let reset = dice.pick(&[Reset::Rollback, Reset::DiscardAll]);
        Drawn {
            max_size,
            min_idle: dice.pick(&[0, 0, 1, max_size / 2, max_size]).min(max_size),
            max_idle: dice.pick(&[None, Some(ms(80)), Some(ms(400)), Some(ms(1500))]),
            max_lifetime: dice.pick(&[None, Some(ms(300)), Some(ms(1000)), Some(ms(3000))]),
            connection_timeout: dice.pick(&[ms(300), ms(1000), ms(2500)]),
            validate: dice.pick(&[
                Validate::Always,
                Validate::Never,
                Validate::AfterIdle(ms(20)),
                Validate::AfterIdle(ms(300)),
            ]),
            validation_timeout: dice.pick(&[ms(150), ms(600)]),
            open_timeout: dice.pick(&[ms(600), ms(1500)]),
            close_timeout: dice.pick(&[ms(300), ms(1000)]),
            parallel_opens: dice.pick(&[1, 2, 4]),
            max_waiting: dice.pick(&[None, None, Some(2)]),
            fair_after: dice.pick(&[ms(0), Duration::from_micros(700), ms(20)]),
            keepalive: dice.pick(&[None, Some(ms(50)), Some(ms(500))]),
            leak_threshold: dice.pick(&[None, Some(ms(100))]),
            reset,
            observe: !dice.one_in(4),
            statement_cache: dice.pick(&[0, 2, 256]),
            guards: dice.one_in(3),
            customized: dice.one_in(2),
        }
    }

    fn manager(&self, conninfo: &str) -> PostgresManager<NoTls> {
        let mut guards = ServerGuards::default();
        if self.guards {
            guards.client_connection_check_interval = Some(ms(500));
        }
        let manager = PostgresManager::parse(conninfo, NoTls).expect("a connection string");
        manager.reset(self.reset).observe(self.observe).statement_cache(self.statement_cache).server_guards(guards)
    }

    fn builder(&self, name: &str) -> Builder<PostgresManager<NoTls>> {
        let builder = Builder::new();
        let builder = if self.customized { builder.connection_customizer(Box::new(Marks)) } else { builder };
        builder
            .name(name)
            .max_size(self.max_size)
            .min_idle(self.min_idle)
            .max_idle(self.max_idle)
            .max_lifetime(self.max_lifetime)
            .connection_timeout(self.connection_timeout)
            .validate(self.validate)
            .validation_timeout(self.validation_timeout)
            .open_timeout(self.open_timeout)
            .close_timeout(self.close_timeout)
            .parallel_opens(self.parallel_opens)
            .max_waiting(self.max_waiting)
            .fair_after(self.fair_after)
            .keepalive(self.keepalive)
            .leak_threshold(self.leak_threshold)
    }
}

/// Marks each session with its backend.
#[derive(Debug)]
struct Marks;

impl CustomizeConnection<Connection, Error> for Marks {
    fn on_acquire(&self, connection: &mut Connection) -> Result<(), Error> {
        Ok(connection.batch_execute("SELECT set_config('soak.home', pg_backend_pid()::text, false)")?)
    }
}

/// A pool, and what its users and the judge know of it.
pub(crate) struct Lane {
    pub(crate) name: String,
    pub(crate) drawn: Drawn,
    /// `None` once its last handle is dropped.
    pool: Mutex<Option<Pool>>,
    /// The most slots that there may be just now: what `max_size` is, or what was there when it was last lowered.
    pub(crate) ceiling: Mutex<u32>,
    /// Somebody has begun to close it.
    pub(crate) closing: AtomicBool,
    /// Its users do nothing, so that what is idle stays idle.
    pub(crate) hushed: AtomicBool,
    /// Its users are to end.
    pub(crate) over: AtomicBool,
    /// The backends of connections that were detached.
    pub(crate) detached: Mutex<HashSet<i32>>,
    /// What was written in transactions of which the server has said that they are committed; and all that was tried.
    pub(crate) kept: Mutex<HashSet<String>>,
    pub(crate) tried: Mutex<HashSet<String>>,
}

impl Lane {
    /// Builds a pool in fair weather.
    pub(crate) fn build(world: &World, name: String, dice: &mut Dice) -> Lane {
        let drawn = Drawn::new(dice);
        world.journal.event(format_args!("built {name}: {drawn:?}"));
        let conninfo = world.conninfo();
        let pool = if dice.one_in(3) {
            drawn.builder(&name).build_unchecked(drawn.manager(&conninfo))
        } else {
            let mut built = Err(String::new());
            let _ = wait_until(within(SOON), || {
                built = drawn.builder(&name).build(drawn.manager(&conninfo)).map_err(|e| e.to_string());
                built.is_ok()
            });
            built.unwrap_or_else(|e| panic!("no pool in fair weather: {e}"))
        };
        Lane {
            name,
            ceiling: Mutex::new(drawn.max_size),
            drawn,
            pool: Mutex::new(Some(pool)),
            closing: AtomicBool::new(false),
            hushed: AtomicBool::new(false),
            over: AtomicBool::new(false),
            detached: Mutex::default(),
            kept: Mutex::default(),
            tried: Mutex::default(),
        }
    }

    pub(crate) fn pool(&self) -> Option<Pool> {
        self.pool.lock().clone()
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(SeqCst)
    }

    /// P5, as the pool counts: the slots are at most `max_size`, and those that are too many after a resize only become
    /// fewer.
    pub(crate) fn look(&self, world: &World) -> Option<millpond::Stats> {
        let pool = self.pool()?;
        let mut ceiling = self.ceiling.lock();
        let stats = pool.stats();
        if stats.size() > *ceiling {
            world.journal.flaw(format_args!("{} slots, at most {}: {stats}", stats.size(), *ceiling));
        }
        *ceiling = stats.size().max(stats.max_size).min(*ceiling);
        world.journal.most("an eviction was late by", stats.max_lateness);
        Some(stats)
    }

    pub(crate) fn resize(&self, world: &World, dice: &mut Dice) {
        let Some(pool) = self.pool() else { return };
        let size = (1 + dice.roll(MOST) as u32).max(self.drawn.min_idle);
        world.journal.event(format_args!("resize {} to {size}", self.name));
        let mut ceiling = self.ceiling.lock();
        *ceiling = size.max(*ceiling);
        pool.resize(size).expect("a size that is allowed");
    }

    pub(crate) fn recycle(&self, world: &World) {
        let Some(pool) = self.pool() else { return };
        world.journal.event(format_args!("recycle {}", self.name));
        pool.recycle();
    }

    // ------------------------------------------------------------------------------------------ its end

    /// The faults and the users have ended: soon every slot serves, at the same time, and no query fails.
    pub(crate) fn heals(&self, world: &World) {
        let Some(pool) = self.pool() else { return };
        let begun = Instant::now();
        let mut why = String::new();
        let well = wait_until(within(SOON), || {
            let mut connections = Vec::new();
            for _ in 0..pool.max_size() {
                match pool.get_timeout(ms(2000)) {
                    Ok(connection) => connections.push(connection),
                    Err(e) => {
                        why = e.to_string();
                        return false;
                    }
                }
            }
            // All of them are asked: each that is dead is found.
            let failures: Vec<_> =
                connections.iter_mut().filter_map(|connection| connection.simple_query("SELECT 1").err()).collect();
            why = failures.iter().map(ToString::to_string).collect();
            failures.is_empty()
        });
        world.journal.most("a pool healed after", begun.elapsed());
        if !well {
            world.journal.flaw(format_args!("{} does not heal: {why}; {}", self.name, pool.stats()));
        }
        // What the server sees is what the pool says, and the floor stands.
        let mut seen = String::new();
        let agrees = wait_until(within(SOON), || {
            let backends: HashSet<u64> = world.backends(&self.name).into_iter().collect();
            let rows = pool.connections();
            let known: HashSet<u64> = rows.iter().filter_map(|row| row.server_id).collect();
            let idle = pool.stats().idle;
            seen = format!("the server has {backends:?}, the pool\n{rows}");
            known == backends && rows.len() == known.len() && idle >= self.drawn.min_idle
        });
        if !agrees {
            world.journal.flaw(format_args!("{}: {seen}", self.name));
        }
        // P1: what nobody uses goes, but for the floor.
        let Some(idle) = self.drawn.max_idle else { return };
        let begun = Instant::now();
        let slack = || LATE + world.heart.stood_still_since(begun);
        let mut left;
        loop {
            left = world.backends(&self.name).len();
            if left <= self.drawn.min_idle as usize {
                break;
            }
            if begun.elapsed() > idle + slack() {
                world.journal.flaw(format_args!("{}: {left} backends after {idle:?} of rest", self.name));
                return;
            }
            thread::sleep(ms(5));
        }
        world.journal.most("what nobody used went late by", begun.elapsed().saturating_sub(idle));
    }

    /// Closes the pool in one of the ways there are. It may be under load, in a fault.
    pub(crate) fn close(&self, world: &World, dice: &mut Dice) {
        let Some(pool) = self.pool.lock().take() else { return };
        let grace = dice.between(0, 1500);
        let way = dice.roll(3);
        world.journal.event(format_args!(
            "close {} {}",
            self.name,
            ["by close", "by a guard", "by its last handle"][way as usize]
        ));
        self.closing.store(true, SeqCst);
        for reason in CloseReason::ALL {
            world.journal.count(&format!("closed/{reason}"), pool.stats().closed_for(reason));
        }
        let stats = pool.stats();
        world.journal.count("checkouts", stats.checkouts);
        world.journal.count("opens", stats.opens);
        world.journal.count("failed opens", stats.failed_opens);
        world.journal.count("abandonments", stats.abandonments);
        let begun = Instant::now();
        match way {
            0 => {
                let report = pool.close(grace);
                world.journal.event(format_args!("closed {report}"));
            }
            1 => drop(pool.guard().grace(grace)),
            _ => {}
        }
        drop(pool);
        let (took, slack) = (begun.elapsed(), LATE + world.heart.stood_still_since(begun));
        world.journal.most("a close took longer than its grace by", took.saturating_sub(grace));
        let limit = if way == 2 { slack } else { grace + slack };
        if took > limit {
            world.journal.flaw(format_args!("the close of {} with {grace:?} took {took:?}", self.name));
        }
    }

    /// It is closed, its users have ended, and the faults: nothing is left of it.
    pub(crate) fn is_gone(&self, world: &World) {
        let mut left = String::new();
        let gone = wait_until(within(SOON), || {
            let (backends, threads) = (world.backends(&self.name), threads_named(&self.name));
            left = format!("backends {backends:?}, threads {threads:?}");
            backends.is_empty() && threads.is_empty()
        });
        if !gone {
            world.journal.flaw(format_args!("{} has left {left}", self.name));
        }
        let (kept, tried) = (self.kept.lock(), self.tried.lock());
        let present: HashSet<String> = world.written(&self.name).into_iter().collect();
        if let Some(lost) = kept.difference(&present).next() {
            world.journal.flaw(format_args!("{lost} was committed, and is not there"));
        }
        if let Some(strange) = present.difference(&tried).next() {
            world.journal.flaw(format_args!("{strange} was never to be committed"));
        }
        world.journal.count("rows committed", kept.len() as u64);
    }
}
