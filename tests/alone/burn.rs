//! P10: a call that hangs or fails keeps no processor busy.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use crate::fake::{Act, Call, Fake, ends_well, take};
use crate::support::{ms, watched_alone};
use millpond::{Pool, PooledConnection, Validate};

fn cpu() -> Duration {
    // utime and stime, in hundredths of a second.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ms(ticks * 10)
}

/// Whatever goes wrong, nobody spins.
#[test]
fn nothing_that_hangs_or_fails_burns_a_processor() {
    watched_alone(|| {
        type Prepare = fn(&Fake, &Pool<crate::fake::R2d2Fake>) -> Vec<PooledConnection<crate::fake::R2d2Fake>>;
        let scenes: [(&str, Prepare); 9] = [
            ("open hangs", |fake, _| {
                fake.set(Call::Open, Act::Block);
                vec![]
            }),
            ("open fails", |fake, _| {
                fake.set(Call::Open, Act::Fail);
                vec![]
            }),
            ("check hangs", |fake, pool| {
                drop(take(pool, 3));
                thread::sleep(ms(30));
                fake.set(Call::Validate, Act::Block);
                vec![]
            }),
            ("check fails", |fake, pool| {
                drop(take(pool, 3));
                thread::sleep(ms(30));
                fake.set(Call::Validate, Act::Fail);
                vec![]
            }),
            ("check slow", |fake, pool| {
                drop(take(pool, 3));
                thread::sleep(ms(30));
                fake.set(Call::Validate, Act::Last(ms(300)));
                vec![]
            }),
            ("close hangs", |fake, pool| {
                fake.set(Call::Drop, Act::Block);
                take(pool, 3).into_iter().for_each(PooledConnection::discard);
                vec![]
            }),
            ("recycled, close hangs", |fake, pool| {
                drop(take(pool, 3));
                fake.set(Call::Drop, Act::Block);
                pool.recycle();
                vec![]
            }),
            ("all in use", |_, pool| take(pool, 3)),
            ("all in use, suspect", |fake, pool| {
                let mut checked_out = take(pool, 3);
                fake.next(Call::Returned, [Act::Fail]);
                drop(checked_out.pop());
                fake.set(Call::Validate, Act::Fail);
                checked_out
            }),
        ];
        for validate in [Validate::AfterIdle(ms(20)), Validate::Always] {
            for (name, prepare) in scenes {
                for ask in ["get", "try_get", "floor"] {
                    let fake = Fake::new();
                    let builder = Pool::builder().max_size(3).min_idle(if ask == "floor" { 3 } else { 0 });
                    let builder = builder.max_idle(ms(700)).keepalive(ms(200)).max_lifetime(ms(900));
                    let builder = builder.open_timeout(ms(400)).close_timeout(ms(400)).validation_timeout(ms(400));
                    let pool = builder.validate(validate).build(fake.r2d2()).unwrap();
                    let checked_out = prepare(&fake, &pool);
                    let stop = Arc::new(AtomicBool::new(false));
                    let before = (cpu(), fake.calls(Call::Open) + fake.calls(Call::Validate));
                    let asks: Vec<_> = (0..if ask == "get" { 3 } else { 1 })
                        .map(|_| {
                            let (pool, stop) = (pool.clone(), Arc::clone(&stop));
                            thread::spawn(move || {
                                while !stop.load(SeqCst) {
                                    match ask {
                                        "get" => drop(pool.get_timeout(ms(500))),
                                        "try_get" => drop(pool.try_get()),
                                        _ => {}
                                    }
                                    thread::sleep(ms(20));
                                }
                            })
                        })
                        .collect();
                    thread::sleep(ms(200));
                    let used = cpu() - before.0;
                    let calls = fake.calls(Call::Open) + fake.calls(Call::Validate) - before.1;
                    stop.store(true, SeqCst);
                    let text = format!("{validate:?}, {name}, {ask}: {used:?} of CPU, {calls} calls, {}", pool.stats());
                    // One that spins uses all of it.
                    assert!(used < ms(100), "{text}");
                    for call in [Call::Open, Call::Validate, Call::Drop] {
                        fake.release(call);
                    }
                    asks.into_iter().for_each(|t| t.join().unwrap());
                    drop(checked_out);
                    ends_well(pool, &fake);
                }
            }
        }
    });
}
