//! P7: where nothing hangs and nothing fails for long, nobody waits for long, whatever else goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, Fake};
use crate::support::ms;
use millpond::{Pool, PooledConnection, Returned, Validate};

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

fn life(seed: u64) -> Result<(), String> {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1);
    dice.roll(2);
    let fake = Fake::new();
    fake.keeps_limits(dice.roll(3) == 0);
    fake.peeks(dice.roll(2) == 0);
    let max = 1 + dice.roll(4) as u32;
    let validate = match dice.roll(4) {
        0 => Validate::Never,
        1 => Validate::Always,
        2 => Validate::AfterIdle(ms(1 + dice.roll(3))),
        _ => Validate::AfterIdle(ms(50)),
    };
    let mut builder = Pool::builder().max_size(max).validate(validate).parallel_opens(1 + dice.roll(4) as u32);
    let floor = if dice.roll(2) == 0 { 0 } else { dice.roll(u64::from(max) + 1) as u32 };
    builder = builder.min_idle(floor);
    if floor == 0 && dice.roll(4) == 0 {
        builder = builder.max_idle(Duration::ZERO);
    } else if dice.roll(2) == 0 {
        builder = builder.max_idle(Duration::from_micros(1 + dice.roll(20_000)));
    }
    if dice.roll(2) == 0 {
        builder = builder.max_lifetime(ms(30 + dice.roll(100)));
    }
    if dice.roll(3) == 0 {
        builder = builder.fair_after([Duration::ZERO, Duration::MAX, ms(5)][dice.roll(3) as usize]);
    }
    if dice.roll(3) == 0 {
        builder = builder.keepalive(ms(10 + dice.roll(20)));
    }
    builder = builder.event_handler(fake.event_handler()).error_handler(fake.error_handler());
    let lazy = |dice: &mut Dice| match dice.roll(3) {
        0 => Act::Succeed,
        _ => Act::Last(Duration::from_micros(dice.roll(3000))),
    };
    for call in [Call::Open, Call::Validate, Call::Reset, Call::Close, Call::Drop, Call::HandleRelease] {
        let act = lazy(&mut dice);
        fake.set(call, act);
    }
    let fake = Arc::new(fake);
    let pool = builder.build_unchecked(fake.direct());
    let until = Instant::now() + ms(400);
    let over = Arc::new(AtomicBool::new(false));
    let users: Vec<_> = (0..2 + dice.roll(10))
        .map(|n| {
            let (pool, fake, mut dice) = (pool.clone(), Arc::clone(&fake), Dice(seed ^ (n + 1) << 32));
            dice.roll(2);
            thread::spawn(move || {
                let mut worst = Duration::ZERO;
                while Instant::now() < until {
                    let begun = Instant::now();
                    match dice.roll(8) {
                        0 => drop(pool.try_get()),
                        1 => drop(pool.get_timeout(Duration::from_micros(dice.roll(2000)))),
                        _ => match pool.get_timeout(Duration::from_secs(3)) {
                            Ok(c) => {
                                worst = worst.max(begun.elapsed());
                                if dice.roll(2) == 0 {
                                    thread::sleep(Duration::from_micros(dice.roll(2000)));
                                }
                                match dice.roll(60) {
                                    0 => fake.next(Call::Returned, [Act::Fail]),
                                    1 => fake.verdict(Returned::Reset),
                                    2 => fake.verdict(Returned::Keep),
                                    3 if dice.roll(3) == 0 => {
                                        fake.verdict(Returned::Outdated);
                                        drop(c);
                                        fake.verdict(Returned::Keep);
                                        continue;
                                    }
                                    4 => fake.next(Call::Validate, [Act::Fail]),
                                    5 => {
                                        PooledConnection::discard(c);
                                        continue;
                                    }
                                    6 => fake.next(Call::Open, [Act::Fail]),
                                    _ => {}
                                }
                                drop(c);
                            }
                            Err(e) => return Err(format!("{e}: {}", pool.stats())),
                        },
                    }
                    if dice.roll(10) == 0 {
                        thread::sleep(ms(dice.roll(8)));
                    }
                }
                Ok(worst)
            })
        })
        .collect();
    let ruler = {
        let (pool, over, mut dice) = (pool.clone(), Arc::clone(&over), Dice(seed ^ 77));
        thread::spawn(move || {
            while !over.load(SeqCst) {
                thread::sleep(ms(dice.roll(20)));
                match dice.roll(6) {
                    0 => pool.recycle(),
                    1 => drop(pool.resize(floor.max(1) + dice.roll(4) as u32)),
                    _ => {}
                }
            }
        })
    };
    let mut worst = Duration::ZERO;
    let mut flaw = None;
    for user in users {
        match user.join().unwrap() {
            Ok(time) => worst = worst.max(time),
            Err(e) => flaw = Some(e),
        }
    }
    over.store(true, SeqCst);
    ruler.join().unwrap();
    let text = format!("{:?}", pool.settings());
    let stats = pool.stats();
    let report = pool.close(Duration::from_secs(5));
    if let Some(flaw) = flaw {
        return Err(format!("{flaw}\n{text}"));
    }
    if worst > ms(1500) {
        return Err(format!("waited for {worst:?}: {stats} {text}"));
    }
    if !report.is_complete() || fake.alive() > 0 {
        return Err(format!("{report} {text}"));
    }
    Ok(())
}

#[test]
fn nobody_waits_for_long() {
    let _beside = crate::support::beside_others();
    let n = std::env::var("MILLPOND_WAITS_SEEDS").ok().map_or(20, |n| n.parse().unwrap());
    let first = std::env::var("MILLPOND_WAITS_SEED").ok().map_or(1, |n| n.parse().unwrap());
    let mut bad = Vec::new();
    for seed in first..first + n {
        if let Err(e) = life(seed) {
            eprintln!("{seed}: {e}");
            bad.push(seed);
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}
