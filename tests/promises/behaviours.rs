//! What the tests of other pools check, and what no other file here shows. `docs/behaviours.md` lists their tests, each
//! with the test that shows the same of this pool.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Act, Call, DirectFake, Fake, ends_well, run, take};
use crate::support::{SOON, alone, beside_others, ms, slack, sleep_until, wait_until, watched, within};
use millpond::{CloseReason, Pool, PooledConnection, Returned, Validate};

/// Waits until so many callers wait.
#[track_caller]
fn waiting(pool: &Pool<DirectFake>, n: u32) {
    assert!(wait_until(within(SOON), || pool.stats().waiting == n), "{}", pool.stats());
}

// ---------------------------------------------------------------------------------------------------- r2d2

#[test]
fn max_size_opens_are_enough_for_max_size_connections() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.next(Call::Open, vec![Act::Succeed; 5]);
    fake.set(Call::Open, Act::Fail);
    let pool = Pool::builder().max_size(5).build(fake.r2d2()).unwrap();
    let all = take(&pool, 5);
    assert_eq!((fake.calls(Call::Open), fake.alive()), (5, 5), "no open is wasted");
    assert!(pool.get_timeout(Duration::ZERO).unwrap_err().is_exhausted());
    drop(all);
    ends_well(pool, &fake);
}

#[test]
fn try_get_takes_what_is_idle_and_no_more() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(2).min_idle(2).build(fake.r2d2()).unwrap();
    let (first, second) = (pool.try_get(), pool.try_get());
    assert!(first.is_some() && second.is_some() && pool.try_get().is_none());
    drop(first);
    assert!(pool.try_get().is_some());
    drop(second);
    ends_well(pool, &fake);
}

/// A check holds no lock, whichever thread makes it: another caller is served before this one has ended.
#[test]
fn a_check_that_blocks_keeps_no_caller_from_another_connection() {
    for on_the_caller in [false, true] {
        watched(move || {
            let fake = Fake::new();
            fake.keeps_limits(on_the_caller);
            let builder = Pool::builder().max_size(2).min_idle(2).validate(Validate::Always);
            let pool = builder.build(fake.direct()).unwrap();
            fake.next(Call::Validate, [Act::Block]);
            thread::scope(|s| {
                let checked = s.spawn(|| pool.get_timeout(SOON).map(drop));
                fake.wait_inside(Call::Validate, 1);
                let got = pool.get_timeout(SOON).map(|conn| (conn.id, fake.inside(Call::Validate)));
                fake.release(Call::Validate);
                assert!(got.is_ok_and(|(_, inside)| inside == 1), "served after the check");
                checked.join().unwrap().unwrap();
            });
            ends_well(pool, &fake);
        });
    }
}

/// No connection is opened before a caller asks for one, and the caller is told why there is none.
#[test]
fn a_pool_that_is_built_unchecked_says_what_is_wrong_to_its_first_caller() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.set(Call::Open, Act::Fail);
    let pool = Pool::builder().connection_timeout(ms(200)).build_unchecked(fake.r2d2());
    assert_eq!(fake.calls(Call::Open), 0);
    let error = pool.get().expect_err("no server yet");
    assert!(error.is_timeout() && error.to_string().contains("Open failed on purpose"), "{error}");
    // And when there is a server, there is a connection.
    fake.release(Call::Open);
    drop(pool.get_timeout(SOON).unwrap());
    ends_well(pool, &fake);
}

#[test]
fn a_hook_that_always_fails_is_the_cause_and_leaves_no_connection() {
    let _beside = beside_others();
    let fake = Fake::new();
    fake.set(Call::OnAcquire, Act::Fail);
    let builder = Pool::builder().connection_timeout(ms(200)).connection_customizer(fake.customizer());
    let error = builder.build(fake.r2d2()).expect_err("none is as it is wanted");
    assert!(error.to_string().contains("OnAcquire failed on purpose"), "{error}");
    fake.wait_alive(0);
    assert!(fake.opened() > 1, "it was tried again");
    assert_eq!(fake.calls(Call::OnRelease), 0, "what was never acquired is not released");
}

/// A connection that is in use for longer than `max_idle` is not closed for it. Its idle time begins when it is
/// returned.
#[test]
fn what_is_in_use_does_not_age_as_idle() {
    const MAX_IDLE: Duration = ms(300);
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(5).max_idle(MAX_IDLE).build(fake.r2d2()).unwrap();
    let mut all = take(&pool, 5);
    let in_use = all.pop().unwrap();
    drop(all);
    let returned = Instant::now();
    sleep_until(returned + MAX_IDLE * 2);
    fake.wait_alive(1);
    assert_eq!(pool.stats().closed_for(CloseReason::Idle), 4, "{}", pool.stats());
    let id = in_use.id;
    drop(in_use);
    assert_eq!(pool.state().idle_connections, 1, "not closed on its return");
    let again = pool.get().unwrap();
    assert_eq!((again.id, fake.opened()), (id, 5));
    drop(again);
    ends_well(pool, &fake);
}

#[test]
fn the_floor_stands_beside_what_is_in_use() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(5).min_idle(2).build(fake.direct()).unwrap();
    let sizes = || (pool.state().idle_connections, pool.state().connections);
    assert_eq!(sizes(), (2, 2));
    let all = take(&pool, 3);
    assert!(wait_until(within(SOON), || sizes() == (2, 5)), "{}", pool.stats());
    drop(all);
    assert_eq!(sizes(), (5, 5), "what is returned is kept until it has been idle for too long");
    ends_well(pool, &fake);
}

#[test]
fn numbers_of_connections_count_up_and_are_never_used_again() {
    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.r2d2()).unwrap();
    let numbers: Vec<u64> = (0..4)
        .map(|n| {
            let conn = pool.get_timeout(SOON).unwrap();
            let number = PooledConnection::info(&conn).id;
            if n % 2 == 0 {
                fake.next(Call::Returned, [Act::Fail]);
            } else {
                PooledConnection::discard(conn);
            }
            number
        })
        .collect();
    assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
    ends_well(pool, &fake);
}

// ---------------------------------------------------------------------------------------------------- HikariCP

/// The server refuses new connections. A connection that is returned serves the waiter.
#[test]
fn a_return_serves_a_waiter_while_opens_fail() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(2).build(fake.direct()).unwrap();
        let in_use = pool.get().unwrap();
        fake.set(Call::Open, Act::Fail);
        thread::scope(|s| {
            let waiter = s.spawn(|| pool.get_timeout(SOON).map(|conn| conn.id));
            assert!(wait_until(within(SOON), || pool.stats().failed_opens > 0), "{}", pool.stats());
            waiting(&pool, 1);
            let id = in_use.id;
            drop(in_use);
            assert_eq!(waiter.join().unwrap().unwrap(), id);
        });
        ends_well(pool, &fake);
    });
}

/// First more threads than the pool can serve in time, so that many time out; then as many as it has connections.
#[test]
fn after_saturation_every_caller_is_served_at_once() {
    let _alone = alone();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(2).build(fake.direct()).unwrap();
    thread::scope(|s| {
        for _ in 0..12 {
            s.spawn(|| {
                let over = within(ms(300));
                while Instant::now() < over {
                    if let Ok(_conn) = pool.get_timeout(ms(5)) {
                        thread::sleep(ms(2));
                    }
                }
            });
        }
    });
    let saturated = pool.stats();
    assert!(saturated.timeouts > 10, "no saturation: {saturated}");
    assert_eq!((saturated.waiting, saturated.in_use, fake.opened()), (0, 0, 2), "{saturated}");
    thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                for _ in 0..50 {
                    let asked = Instant::now();
                    let conn = pool.get().unwrap();
                    assert!(asked.elapsed() < slack(), "after {:?}", asked.elapsed());
                    thread::sleep(ms(1));
                    drop(conn);
                }
            });
        }
    });
    let after = pool.stats();
    assert_eq!((after.timeouts, after.waits), (saturated.timeouts, saturated.waits), "{after}");
    ends_well(pool, &fake);
}

// ---------------------------------------------------------------------------------------------------- psycopg_pool

/// A function that leaves early with an error returns its connection; only a panic costs it.
#[test]
fn an_error_that_leaves_a_function_costs_no_connection() {
    fn fails(pool: &Pool<DirectFake>) -> Result<(), Box<dyn std::error::Error>> {
        let conn = pool.get()?;
        Err(format!("not with #{}", conn.id))?;
        drop(conn);
        Ok(())
    }

    let _beside = beside_others();
    let fake = Fake::new();
    let pool = Pool::builder().max_size(1).build(fake.direct()).unwrap();
    for _ in 0..3 {
        assert_eq!(fails(&pool).unwrap_err().to_string(), "not with #1");
    }
    assert_eq!((fake.opened(), pool.state().idle_connections), (1, 1));
    ends_well(pool, &fake);
}

/// Each open waits for another beside it, so that one at a time would never end. The most at a time are counted.
#[test]
fn a_floor_is_opened_side_by_side_up_to_parallel_opens() {
    watched(|| {
        let fake = Fake::new();
        let (now, most, pairs) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)), Barrier::new(2));
        let seen = Arc::clone(&most);
        fake.set(
            Call::Open,
            run(move || {
                seen.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                pairs.wait();
                // A third would have time to come.
                thread::sleep(ms(5));
                now.fetch_sub(1, SeqCst);
            }),
        );
        let pool = Pool::builder().max_size(6).min_idle(6).parallel_opens(2).build(fake.direct()).unwrap();
        assert_eq!((pool.state().idle_connections, most.load(SeqCst)), (6, 2));
        ends_well(pool, &fake);
    });
}

/// Fifty requests of 2 ms come at once, the pool has five connections, and the server takes 150 ms for another. The
/// five serve all of them. The opens that began for the first waiters are the only ones.
#[test]
fn a_spike_opens_no_more_than_parallel_opens() {
    const CONNECT: Duration = ms(150);
    let _alone = alone();
    for parallel in [1, 4] {
        let fake = Fake::new();
        let builder = Pool::builder().max_size(50).min_idle(5).parallel_opens(parallel);
        let pool = builder.build(fake.direct()).unwrap();
        fake.set(Call::Open, Act::Last(CONNECT));
        let begun = Instant::now();
        thread::scope(|s| {
            for _ in 0..50 {
                s.spawn(|| {
                    let _conn = pool.get().unwrap();
                    thread::sleep(ms(2));
                });
            }
        });
        let took = begun.elapsed();
        assert!(took < CONNECT, "they waited for opens: {took:?}");
        assert!(wait_until(within(SOON), || pool.stats().opening == 0), "{}", pool.stats());
        let opened = fake.calls(Call::Open) - 5;
        println!("{opened} opened beside five, fifty served in {took:?}, with parallel_opens {parallel}");
        assert!(opened <= u64::from(parallel), "{opened} opened");
        ends_well(pool, &fake);
    }
}

#[test]
fn a_timeout_of_its_own_may_be_longer_than_the_pools() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(1).connection_timeout(ms(50)).build(fake.direct()).unwrap();
        let in_use = pool.get().unwrap();
        thread::scope(|s| {
            let patient = s.spawn(|| pool.get_timeout(SOON).map(drop));
            waiting(&pool, 1);
            let asked = Instant::now();
            let error = pool.get().expect_err("the pool's own timeout is short");
            let took = asked.elapsed();
            assert!(error.is_timeout() && (ms(50)..ms(50) + slack()).contains(&took), "{error}, after {took:?}");
            assert_eq!(pool.stats().waiting, 1, "and the other waits on");
            drop(in_use);
            patient.join().unwrap().unwrap();
        });
        ends_well(pool, &fake);
    });
}

/// With two pools of one kind: whichever thread drops a connection, it goes back to its own pool.
#[test]
fn a_connection_goes_back_to_the_pool_it_came_from() {
    let _beside = beside_others();
    let fake = Fake::new();
    let [one, two] = [(); 2].map(|()| Pool::builder().max_size(1).build(fake.direct()).unwrap());
    let (mut of_one, mut of_two) = (one.get().unwrap(), two.get().unwrap());
    let ids = (of_one.id, of_two.id);
    std::mem::swap(&mut of_one, &mut of_two);
    drop(of_one);
    assert_eq!((one.state().idle_connections, two.state().idle_connections), (0, 1));
    thread::spawn(move || drop(of_two)).join().unwrap();
    assert_eq!((one.get().unwrap().id, two.get().unwrap().id), ids);
    assert!(one.close(SOON).is_complete());
    ends_well(two, &fake);
}

/// A hand-off looks at the age as well. The waiter gets another connection, when the first has made room for it.
#[test]
fn what_comes_back_past_its_life_is_not_handed_to_a_waiter() {
    const LIFE: Duration = ms(150);
    watched(|| {
        for max_idle in [None, Some(Duration::ZERO)] {
            let fake = Fake::new();
            let builder = Pool::builder().max_size(1).max_idle(max_idle).max_lifetime(LIFE).lifetime_jitter(0.0);
            let pool = builder.build(fake.direct()).unwrap();
            let in_use = pool.get().unwrap();
            let (id, checked_out) = (in_use.id, Instant::now());
            thread::scope(|s| {
                let waiter = s.spawn(|| pool.get_timeout(SOON).map(|conn| conn.id));
                waiting(&pool, 1);
                sleep_until(checked_out + LIFE);
                drop(in_use);
                assert_eq!(waiter.join().unwrap().unwrap(), id + 1, "with max_idle {max_idle:?}");
            });
            assert_eq!(fake.most_alive(), 1, "one after the other");
            assert_eq!(pool.stats().closed_for(CloseReason::Lifetime), 1, "{}", pool.stats());
            ends_well(pool, &fake);
        }
    });
}

/// A connection that must be reset is reset before the waiter gets it. If the reset fails, the waiter gets another.
#[test]
fn a_waiter_gets_what_was_reset_or_another_where_the_reset_failed() {
    watched(|| {
        for max_idle in [None, Some(Duration::ZERO)] {
            for (act, same) in [(Act::Succeed, true), (Act::Fail, false), (Act::Panic, false)] {
                let fake = Fake::new();
                let pool = Pool::builder().max_size(1).max_idle(max_idle).build(fake.direct()).unwrap();
                let in_use = pool.get().unwrap();
                let id = in_use.id;
                thread::scope(|s| {
                    let (tell, told) = mpsc::channel();
                    let (pool, fake) = (&pool, &fake);
                    s.spawn(move || {
                        let conn = pool.get_timeout(SOON).unwrap();
                        tell.send((conn.id, fake.calls(Call::Reset))).unwrap();
                        fake.verdict(Returned::Keep);
                    });
                    waiting(pool, 1);
                    fake.verdict(Returned::Reset);
                    fake.next(Call::Reset, [act]);
                    drop(in_use);
                    let got = told.recv_timeout(SOON).unwrap();
                    assert_eq!(got, (if same { id } else { id + 1 }, 1), "with max_idle {max_idle:?}");
                });
                assert_eq!(fake.most_alive(), 1);
                ends_well(pool, &fake);
            }
        }
    });
}

/// All connections of the floor break while the server is away. When the server is back, the first caller is served,
/// and the floor is refilled without another call.
#[test]
fn the_floor_is_refilled_after_an_outage() {
    watched(|| {
        let fake = Fake::new();
        let pool = Pool::builder().max_size(4).min_idle(4).build(fake.direct()).unwrap();
        fake.set(Call::Open, Act::Fail);
        take(&pool, 4).into_iter().for_each(PooledConnection::discard);
        assert!(pool.get_timeout(ms(100)).unwrap_err().is_timeout());
        assert_eq!(fake.alive(), 0);
        fake.release(Call::Open);
        drop(pool.get_timeout(SOON).unwrap());
        assert!(wait_until(within(SOON), || pool.state().idle_connections == 4), "{}", pool.stats());
        ends_well(pool, &fake);
    });
}
