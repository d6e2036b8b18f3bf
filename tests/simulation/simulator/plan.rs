//! What is to happen in one execution: drawn from a seed, and nothing else.

use fastrand::Rng;
use millpond::Validate;
use std::fmt;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// The coarse clock's step in nanoseconds.
    pub tick: u64,
    /// See [`Order`](super::order::Order).
    pub stay: f64,
    pub haste: f64,
    pub limits: Limits,
    pub manager: Manager,
    pub faults: Faults,
    pub users: usize,
    /// What users and the one who makes trouble do, each in this order.
    pub steps: Vec<Step>,
}

/// The pool's settings.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_size: u32,
    pub min_idle: u32,
    pub max_idle: Option<Duration>,
    pub max_lifetime: Option<Duration>,
    pub lifetime_jitter: f64,
    pub connection_timeout: Duration,
    pub validate: Validate,
    pub validation_timeout: Duration,
    pub open_timeout: Duration,
    pub close_timeout: Duration,
    pub parallel_opens: u32,
    pub max_waiting: Option<u32>,
    pub keepalive: Option<Duration>,
    pub leak_threshold: Option<Duration>,
    pub fair_after: Duration,
}

/// What the manager can do.
#[derive(Clone, Debug)]
pub struct Manager {
    pub keeps_limits: bool,
    pub peeks: bool,
    pub abortable: bool,
    pub customizer: bool,
    pub events: bool,
    pub undoes_on_acquire: bool,
}

/// How often a call goes wrong, and how, in thousandths.
#[derive(Clone, Debug, Default)]
pub struct Odds {
    pub fail: u32,
    pub refuse: u32,
    pub panic: u32,
    /// Until it is aborted, or the faults stop.
    pub hang: u32,
    /// Longer than its limit, and then well.
    pub late: u32,
    /// The longest time that a call takes otherwise.
    pub slow: Duration,
}

/// The faults of a time.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub open: Odds,
    pub validate: Odds,
    pub reset: Odds,
    pub close: Odds,
    pub hooks: Odds,
    /// How often a connection is returned for a reset, to be discarded, or outdated, in thousandths.
    pub returned: [u32; 3],
}

#[derive(Clone, Debug)]
pub struct Step {
    /// Its place in the whole plan.
    pub number: usize,
    /// 0: the one who makes trouble. A user otherwise.
    pub who: usize,
    pub act: Act,
}

#[derive(Clone, Debug)]
pub enum Act {
    Sleep(Duration),
    // A user's:
    Get {
        timeout: Duration,
        hold: Duration,
        end: End,
    },
    TryGet {
        hold: Duration,
        end: End,
    },
    /// A second connection is asked for while one is in use.
    Two {
        timeout: Duration,
        hold: Duration,
    },
    // Trouble's:
    Faults(Faults),
    /// So many of the living connections die, from the oldest.
    Kill(usize),
    /// The server is gone for so long: all connections die, and no connect succeeds.
    Down(Duration),
    Resize(u32),
    Recycle,
    /// For so long no thread can be started.
    NoThreads(Duration),
    /// What was held for too long is returned.
    ReturnLate,
    Look,
    /// Anybody's.
    Close {
        grace: Duration,
        by: Closer,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum End {
    Return,
    Discard,
    Detach,
    Panic,
    /// Somebody else returns it, later.
    Late,
    /// It dies in use.
    Dies,
}

#[derive(Clone, Copy, Debug)]
pub enum Closer {
    Call,
    Guard,
    /// The guard is dropped by a panic.
    Unwinding,
    /// A hook, at the next connection that is opened or checked out.
    Hook,
}

fn duration(dice: &mut Rng, from: Duration, to: Duration) -> Duration {
    // As likely in each decade.
    let (from, to) = (from.as_secs_f64().max(1e-9).ln(), to.as_secs_f64().ln());
    Duration::from_secs_f64((from + (to - from) * dice.f64()).exp())
}

const fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn maybe<T>(dice: &mut Rng, one_in: u32, what: impl FnOnce(&mut Rng) -> T) -> Option<T> {
    (dice.u32(0..one_in) == 0).then(|| what(dice))
}

impl Plan {
    /// The plan of a seed.
    pub fn draw(seed: u64) -> Plan {
        let dice = &mut Rng::with_seed(seed);
        let mut limits = Limits::draw(dice);
        // In some lives a crowd of busy users is in each other's way, and threads are slow.
        let crowd = dice.u32(0..5) == 0;
        let users = if crowd { 8 } else { dice.usize(1..=8) };
        let mut steps = Vec::new();
        let faults = if crowd || dice.u32(0..3) == 0 { Faults::default() } else { Faults::draw(dice) };
        // Some lives are busy for a moment, and some are long and mostly quiet.
        let paces = [us(20), ms(2), ms(200), s(10), s(600), s(20_000)];
        let pace = if crowd { paces[0] } else { *dice.choice(paces.iter()).expect("some") };
        if crowd {
            (limits.max_size, limits.min_idle) = (dice.u32(2..=3), 0);
            (limits.max_waiting, limits.validate) = (None, Validate::AfterIdle(s(1)));
            limits.fair_after = *dice.choice([us(200), us(700), ms(5)].iter()).expect("some");
        }
        // What the pool does over and over by itself has no shorter period than a hundredth of that, or a life would
        // consist of it.
        for period in [&mut limits.keepalive, &mut limits.max_lifetime].into_iter().flatten() {
            *period = (*period).max(pace / 100).max(limits.max_idle.unwrap_or_default() / 100);
        }
        let close = dice.u32(0..3) == 0;
        let length = if crowd { dice.usize(200..400) } else { dice.usize(10..150) };
        for _ in 0..length {
            let who = if !crowd && dice.u32(0..4) == 0 { 0 } else { dice.usize(1..=users) };
            let act = if dice.u32(0..if crowd { 20 } else { 3 }) == 0 {
                Act::Sleep(duration(dice, pace / 100, pace * 4))
            } else if who == 0 {
                Act::trouble(dice, &limits, close)
            } else {
                Act::of_a_user(dice, &limits, pace)
            };
            steps.push(Step { number: steps.len(), who, act });
        }
        Plan {
            seed,
            tick: *dice.choice([1_000_000, 4_000_000, 10_000_000].iter()).expect("some"),
            stay: *dice.choice([0.0, 0.5, 0.9, 0.98].iter()).expect("some"),
            haste: if crowd {
                *dice.choice([0.01, 0.05].iter()).expect("some")
            } else {
                *dice.choice([0.0, 0.0, 0.0, 0.003].iter()).expect("some")
            },
            limits,
            manager: Manager {
                keeps_limits: dice.bool(),
                peeks: dice.bool(),
                abortable: dice.bool(),
                customizer: dice.u32(0..3) == 0,
                events: dice.u32(0..3) == 0,
                undoes_on_acquire: dice.bool(),
            },
            faults,
            users,
            steps,
        }
    }

    /// The same plan with these steps only.
    pub fn keep(mut self, numbers: &[usize]) -> Plan {
        self.steps.retain(|step| numbers.contains(&step.number));
        self
    }
}

impl Limits {
    fn draw(dice: &mut Rng) -> Limits {
        let max_size = dice.u32(1..=6);
        let max_idle = match dice.u32(0..5) {
            0 => None,
            1 => Some(ms(20)),
            _ => Some(duration(dice, ms(50), s(3600))),
        };
        let min_idle = if dice.bool() { 0 } else { dice.u32(0..=max_size) };
        let validate = match dice.u32(0..4) {
            0 => Validate::Always,
            1 => Validate::Never,
            _ => Validate::AfterIdle(duration(dice, ms(1), s(60))),
        };
        Limits {
            max_size,
            min_idle,
            max_idle,
            max_lifetime: maybe(dice, 2, |dice| duration(dice, ms(100), s(7200))),
            lifetime_jitter: dice.f64() * 0.5,
            connection_timeout: s(30),
            validate,
            validation_timeout: duration(dice, ms(5), s(5)),
            open_timeout: duration(dice, ms(20), s(15)),
            close_timeout: duration(dice, ms(10), s(6)),
            parallel_opens: dice.u32(1..=4),
            max_waiting: maybe(dice, 4, |dice| dice.u32(0..6)),
            keepalive: maybe(dice, 3, |dice| duration(dice, ms(50), s(600))),
            leak_threshold: maybe(dice, 3, |dice| duration(dice, ms(10), s(600))),
            fair_after: *dice.choice([Duration::ZERO, us(700), ms(50)].iter()).expect("some"),
        }
    }
}

impl Odds {
    fn draw(dice: &mut Rng) -> Odds {
        let mut odds = Odds { slow: duration(dice, us(50), ms(200)), ..Odds::default() };
        let share = |dice: &mut Rng| if dice.u32(0..3) == 0 { dice.u32(0..400) } else { 0 };
        odds.fail = share(dice);
        odds.refuse = share(dice) / 4;
        odds.panic = share(dice) / 4;
        odds.hang = share(dice) / 2;
        odds.late = share(dice) / 4;
        odds
    }
}

impl Faults {
    fn draw(dice: &mut Rng) -> Faults {
        let calm = |dice: &mut Rng| if dice.bool() { Odds::default() } else { Odds::draw(dice) };
        Faults {
            open: Odds::draw(dice),
            validate: calm(dice),
            reset: calm(dice),
            close: calm(dice),
            hooks: Odds { panic: if dice.u32(0..3) == 0 { 50 } else { 0 }, ..Odds::default() },
            returned: if dice.bool() { [0; 3] } else { [dice.u32(0..300), dice.u32(0..50), dice.u32(0..20)] },
        }
    }
}

impl Act {
    fn of_a_user(dice: &mut Rng, limits: &Limits, pace: Duration) -> Act {
        let hold = if dice.bool() { Duration::ZERO } else { duration(dice, us(1), pace) };
        let timeout = match dice.u32(0..6) {
            0 => Duration::ZERO,
            1 => duration(dice, us(10), ms(20)),
            2 => limits.validation_timeout / 2,
            _ => duration(dice, ms(1), s(30)),
        };
        let end = match dice.u32(0..30) {
            0 => End::Discard,
            1 => End::Detach,
            2 => End::Panic,
            3 => End::Late,
            4 => End::Dies,
            _ => End::Return,
        };
        match dice.u32(0..12) {
            0 => Act::TryGet { hold, end },
            1 => Act::Two { timeout, hold },
            _ => Act::Get { timeout, hold, end },
        }
    }

    fn trouble(dice: &mut Rng, limits: &Limits, close: bool) -> Act {
        match dice.u32(0..22) {
            0..4 => Act::Faults(if dice.u32(0..3) == 0 { Faults::default() } else { Faults::draw(dice) }),
            4..7 => Act::Kill(dice.usize(1..4)),
            7 => Act::Kill(usize::MAX),
            8..11 => Act::Down(duration(dice, ms(1), s(600))),
            11..14 => Act::Resize(dice.u32(limits.min_idle.max(1)..=limits.max_size + 3)),
            14..16 => Act::Recycle,
            16..18 => Act::NoThreads(duration(dice, ms(1), s(5))),
            18 => Act::ReturnLate,
            19 if close => Act::Close {
                grace: duration(dice, ms(1), s(20)),
                by: *dice.choice([Closer::Call, Closer::Guard, Closer::Unwinding, Closer::Hook].iter()).expect("some"),
            },
            _ => Act::Look,
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {:?}\n  {:?}\n  {:?}", self.limits, self.manager, self.faults)?;
        writeln!(f, "  {} users; tick {} ns, stay {}, haste {}", self.users, self.tick, self.stay, self.haste)?;
        for Step { number, who, act } in &self.steps {
            let who = if *who == 0 { "trouble".into() } else { format!("user {who}") };
            writeln!(f, "  {number:>4} {who}: {act:?}")?;
        }
        Ok(())
    }
}
