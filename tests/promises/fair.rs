//! P7: first come, first served, and a waiter that times out takes nothing with it.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, DirectFake, Fake};
use crate::support::{EPSILON, alone, ms, slack, wait_until, within};
use crossbeam_channel::{Receiver, bounded, unbounded};
use millpond::{ErrorKind, Pool};

/// Far longer than what it is given to takes anywhere.
const LONG: Duration = Duration::from_secs(60);

/// Waits until `n` have ever had to wait. The count goes up in the order of arrival, and never down.
#[track_caller]
fn arrived(pool: &Pool<DirectFake>, n: u64) {
    let deadline = within(LONG);
    while pool.stats().waits < n {
        assert!(Instant::now() < deadline, "the {n}th does not arrive: {}", pool.stats());
        // Not a yield: that is an invitation to the thread that keeps this core busy.
        thread::sleep(Duration::from_micros(20));
    }
}

/// Everything that a channel still yields.
fn all<T>(from: Receiver<T>) -> Vec<T> {
    from.try_iter().collect()
}

#[test]
fn in_order_of_arrival_whichever_waiter_times_out() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    let checked_out = pool.get().unwrap();
    let before = pool.stats().waits;
    let (tell, told) = unbounded();
    thread::scope(|s| {
        for n in 0..60 {
            let (pool, tell) = (&pool, tell.clone());
            s.spawn(move || {
                // Two of three are patient.
                let timeout = if n % 3 == 1 { ms(100) } else { LONG };
                let got = pool.get_timeout(timeout);
                match n % 3 {
                    1 => assert!(got.unwrap_err().is_timeout()),
                    _ => tell.send((n, got.unwrap().id)).unwrap(),
                }
            });
            arrived(pool, before + n + 1);
        }
        assert!(wait_until(within(ms(100) + EPSILON), || pool.stats().waiting == 40), "{}", pool.stats());
        drop(checked_out);
    });
    let expected: Vec<_> = (0..60).filter(|n| n % 3 != 1).map(|n| (n, 1)).collect();
    assert_eq!(all(told), expected);
    assert_eq!((pool.stats().timeouts, fake.opened()), (20, 1));
    assert!(pool.close(LONG).is_complete());
}

#[test]
fn a_timeout_at_the_moment_of_the_return_loses_nothing() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    // Every waiter times out after about as long as the others use it: thousands of times these are one moment.
    let over = within(Duration::from_secs(2));
    thread::scope(|s| {
        for n in 0..6 {
            let pool = &pool;
            s.spawn(move || {
                while Instant::now() < over {
                    if let Ok(got) = pool.get_timeout(Duration::from_micros(50 + 20 * n)) {
                        let until = Instant::now() + Duration::from_micros(60);
                        while Instant::now() < until {
                            std::hint::spin_loop();
                        }
                        drop(got);
                    }
                }
            });
        }
    });
    let stats = pool.stats();
    assert!(stats.timeouts > 1_000 && stats.checkouts > 1_000, "{stats}");
    assert_eq!((stats.in_use, stats.idle, stats.waiting, fake.opened(), fake.dropped()), (0, 1, 0, 1, 0), "{stats}");
    drop(pool.get_timeout(LONG).unwrap());
    assert!(pool.close(LONG).is_complete());
}

/// With `fair_after` zero nobody barges: callers that ask all the time get nothing until the last waiter is served.
#[test]
fn nobody_barges_past_a_waiter() {
    const WAITERS: u64 = 60;
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).fair_after(Duration::ZERO).build(fake.direct()).unwrap();
    let checked_out = pool.get().unwrap();
    let before = pool.stats().waits;
    let over = AtomicBool::new(false);
    // The thread that has the connection says which it is: a waiter its number, a barger nothing.
    let (tell, told) = unbounded();
    thread::scope(|s| {
        let waiters: Vec<_> = (0..WAITERS)
            .map(|n| {
                let (pool, tell) = (&pool, tell.clone());
                let waiter = s.spawn(move || {
                    let got = pool.get_timeout(LONG).unwrap();
                    tell.send(Some(n)).unwrap();
                    thread::sleep(ms(1));
                    drop(got);
                });
                arrived(pool, before + n + 1);
                waiter
            })
            .collect();
        for _ in 0..2 {
            let (pool, tell, over) = (&pool, tell.clone(), &over);
            s.spawn(move || {
                while !over.load(SeqCst) {
                    if let Some(got) = pool.try_get() {
                        tell.send(None).unwrap();
                        drop(got);
                    }
                }
            });
        }
        drop(checked_out);
        waiters.into_iter().for_each(|w| w.join().unwrap());
        over.store(true, SeqCst);
    });
    let order: Vec<_> = all(told).into_iter().take(WAITERS as usize).collect();
    assert!(order.iter().copied().eq((0..WAITERS).map(Some)), "{order:?}");
    assert!(pool.close(LONG).is_complete());
}

/// With the default a running thread may barge for a moment: nobody waits for long all the same, and each gets turns.
#[test]
fn bargers_leave_turns_to_everybody() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    let (stop, stopped) = bounded::<()>(0);
    thread::scope(|s| {
        // Three who take it again as soon as they have returned it.
        let busy: Vec<_> = (0..3)
            .map(|_| {
                let (pool, stopped) = (&pool, stopped.clone());
                s.spawn(move || {
                    let mut mine = 0u64;
                    while stopped.try_recv() == Err(crossbeam_channel::TryRecvError::Empty) {
                        drop(pool.get_timeout(LONG).unwrap());
                        mine += 1;
                    }
                    mine
                })
            })
            .collect();
        thread::sleep(ms(500));
        drop(stop);
        let turns: Vec<u64> = busy.into_iter().map(|b| b.join().unwrap()).collect();
        let (least, most) = (turns.iter().min().unwrap(), turns.iter().max().unwrap());
        assert!(*least * 4 > *most, "{turns:?}");
    });
    assert!(pool.stats().wait_time.max() < slack(), "{}", pool.stats());
    assert!(pool.close(LONG).is_complete());
}

#[test]
fn five_thousand() {
    const WAITERS: u64 = 5_000;
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    let checked_out = pool.get().unwrap();
    let before = pool.stats().waits;
    let (tell, told) = unbounded();
    let begun = Instant::now();
    let waiters: Vec<_> = (0..WAITERS)
        .map(|n| {
            let (pool_too, tell) = (pool.clone(), tell.clone());
            let waiter = thread::Builder::new().stack_size(64 * 1024).spawn(move || {
                let got = pool_too.get_timeout(LONG).unwrap();
                // While one has it, so that nobody else can come in between.
                tell.send(n).unwrap();
                drop(got);
            });
            arrived(&pool, before + n + 1);
            waiter.unwrap()
        })
        .collect();
    assert_eq!(pool.stats().waiting, WAITERS as u32);
    println!("{WAITERS} wait after {:?}", begun.elapsed());

    // One connection serves them all.
    let begun = Instant::now();
    drop(checked_out);
    waiters.into_iter().for_each(|w| w.join().unwrap());
    println!("{WAITERS} served after {:?}", begun.elapsed());
    let order = all(told);
    assert!(order.iter().copied().eq(0..WAITERS), "{order:?}");
    assert_eq!((fake.opened(), pool.stats().timeouts, pool.stats().waiting), (1, 0, 0));
    assert!(pool.close(LONG).is_complete());
}

#[test]
fn five_thousand_refused_at_once_by_a_close() {
    const WAITERS: u64 = 5_000;
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    let checked_out = pool.get().unwrap();
    let waiters: Vec<_> = (0..WAITERS)
        .map(|_| {
            let pool = pool.clone();
            thread::Builder::new().stack_size(64 * 1024).spawn(move || pool.get_timeout(LONG).unwrap_err().is_closed())
        })
        .collect();
    arrived(&pool, WAITERS);
    let report = pool.close(Duration::ZERO);
    assert_eq!((report.waiters, report.left.len()), (WAITERS as u32, 1), "{report}");
    assert!(waiters.into_iter().all(|w| w.unwrap().join().unwrap()));
    drop(checked_out);
    fake.wait_alive(0);
}

#[test]
fn max_waiting() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().name("full").max_size(1).max_waiting(3).build(fake.direct()).unwrap();
    let checked_out = pool.get().unwrap();
    thread::scope(|s| {
        let waiters: Vec<_> = (0..3).map(|_| s.spawn(|| pool.get_timeout(LONG).map(drop))).collect();
        arrived(&pool, 3);
        let begun = Instant::now();
        let error = pool.get_timeout(LONG).unwrap_err();
        assert!(begun.elapsed() < slack(), "refused after {:?}", begun.elapsed());
        assert!(error.is_too_many_waiting() && error.is_exhausted(), "{error}");
        assert_eq!(error.to_string(), "pool 'full': 3 wait already, and max_waiting is 3");
        let ErrorKind::TooManyWaiting(crowd) = error.kind() else { panic!("{error:?}") };
        assert_eq!((crowd.waiting, crowd.max_waiting), (3, 3));
        assert_eq!((pool.stats().rejected, pool.stats().waiting), (1, 3));
        drop(checked_out);
        waiters.into_iter().for_each(|w| w.join().unwrap().unwrap());
    });
    drop(pool.get().unwrap());

    // A waiter that timed out makes room.
    let checked_out = pool.get().unwrap();
    thread::scope(|s| {
        let waits = pool.stats().waits;
        let impatient = s.spawn(|| pool.get_timeout(ms(20)).is_err());
        let patient = [s.spawn(|| pool.get_timeout(LONG).is_ok()), s.spawn(|| pool.get_timeout(LONG).is_ok())];
        arrived(&pool, waits + 3);
        assert!(impatient.join().unwrap());
        let third = s.spawn(|| pool.get_timeout(LONG).is_ok());
        arrived(&pool, waits + 4);
        assert!(pool.get_timeout(LONG).unwrap_err().is_too_many_waiting());
        drop(checked_out);
        assert!(patient.into_iter().chain([third]).all(|w| w.join().unwrap()));
    });
    assert!(pool.close(LONG).is_complete());
}

#[test]
fn max_waiting_zero() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(2).max_waiting(0).build_unchecked(fake.direct());
    fake.set(Call::Open, Act::Block);
    // Nobody waits, but what would have been waited for is made ready: once, however often somebody asks.
    for _ in 0..10 {
        assert!(pool.get_timeout(LONG).unwrap_err().is_too_many_waiting());
    }
    fake.wait_inside(Call::Open, 1);
    assert_eq!(fake.calls(Call::Open), 1);
    fake.release(Call::Open);
    assert!(wait_until(within(LONG), || pool.state().idle_connections == 1));
    let checked_out = pool.get().unwrap();
    assert!(pool.get().unwrap_err().is_too_many_waiting());
    assert!(wait_until(within(LONG), || pool.state().idle_connections == 1));
    drop((pool.get().unwrap(), checked_out));
    assert!(pool.close(LONG).is_complete());
}

/// A running thread may check out again what it has just returned, or it may not, as `fair_after` says.
#[test]
fn fair_after_is_what_was_set() {
    let _alone = alone();
    let fake = Fake::new();
    for (limit, may_barge) in [(Duration::ZERO, false), (LONG, true)] {
        let pool = Pool::builder().max_size(1).fair_after(limit).build(fake.direct()).unwrap();
        let mut barged = false;
        for n in 0..200 {
            let checked_out = pool.get().unwrap();
            let waits = pool.stats().waits;
            let (done, over) = bounded::<()>(0);
            thread::scope(|s| {
                let waiter = s.spawn(|| {
                    let got = pool.get_timeout(LONG).unwrap();
                    // Until the thread that returned it has tried to take it again.
                    let _ = over.recv();
                    drop(got);
                });
                arrived(&pool, waits + 1);
                drop(checked_out);
                barged |= pool.try_get().is_some();
                drop(done);
                waiter.join().unwrap();
            });
            if barged {
                assert!(may_barge, "a caller barged past the {n}th waiter, with {limit:?}");
                break;
            }
        }
        assert_eq!(barged, may_barge, "{limit:?}");
        assert!(pool.close(LONG).is_complete());
    }
}
