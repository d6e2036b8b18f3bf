//! Every order of the threads that wait for a connection, hand it over, barge and give up; and of those that sleep on an
//! event count. A lost wake-up is a deadlock, which loom finds.

use loom::sync::{Arc, Mutex};
use loom::thread;
use millpond_loom::runtime::event_count::EventCount;
use millpond_loom::runtime::waiter::{Signal, Waiter};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tries all orders in which at most so many threads are taken off while they could go on; `None`: all orders. (The last
/// scenario has 592,253 of them, which take more than a minute: `MILLPOND_LOOM_ALL` has them tried as well.)
fn model_with(name: &str, preemptions: Option<usize>, scenario: fn()) {
    let orders = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&orders);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions.filter(|_| std::env::var_os("MILLPOND_LOOM_ALL").is_none());
    let bound = model.preemption_bound.map(|n| format!(" with at most {n} preemptions")).unwrap_or_default();
    model.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        scenario();
    });
    println!("{name}: all {} orders{bound}", orders.load(Ordering::Relaxed));
}

fn model(name: &str, scenario: fn()) {
    model_with(name, None, scenario);
}

// -------------------------------------------------------------------------------------------------- event count

#[test]
fn a_sleeper_misses_no_event() {
    model("a sleeper", || {
        let (events, state) = (Arc::new(EventCount::new()), Arc::new(Mutex::new(false)));
        let changer = {
            let (events, state) = (Arc::clone(&events), Arc::clone(&state));
            thread::spawn(move || {
                *state.lock().unwrap() = true;
                events.notify();
            })
        };
        loop {
            let seen = events.count();
            if *state.lock().unwrap() {
                break;
            }
            events.wait(seen);
        }
        changer.join().unwrap();
    });
}

#[test]
fn one_event_wakes_two_sleepers() {
    model("two sleepers", || {
        let (events, state) = (Arc::new(EventCount::new()), Arc::new(Mutex::new(false)));
        let sleepers: Vec<_> = (0..2)
            .map(|_| {
                let (events, state) = (Arc::clone(&events), Arc::clone(&state));
                thread::spawn(move || {
                    let seen = events.count();
                    if !*state.lock().unwrap() {
                        events.wait(seen);
                    }
                })
            })
            .collect();
        *state.lock().unwrap() = true;
        events.notify();
        sleepers.into_iter().for_each(|sleeper| sleeper.join().unwrap());
    });
}

// -------------------------------------------------------------------------------------------------- the hand-off

/// The pool's lock, with what of the ledger the hand-off needs: who waits, and what is idle.
#[derive(Default)]
struct Pool {
    queue: Vec<Arc<Waiter<u32>>>,
    idle: Option<u32>,
}

/// A return that hands the connection off: the waiter is served under the lock, and woken after it.
fn hand_off(pool: &Mutex<Pool>, conn: u32) {
    let mut pool = pool.lock().unwrap();
    if pool.queue.is_empty() {
        pool.idle = Some(conn);
        return;
    }
    let waiter = pool.queue.remove(0);
    waiter.serve(conn);
    drop(pool);
    waiter.wake();
}

/// A return that lets others barge: the connection is idle, and the first waiter is told.
fn make_idle(pool: &Mutex<Pool>, conn: u32) {
    let mut pool = pool.lock().unwrap();
    pool.idle = Some(conn);
    let first = pool.queue.first().cloned();
    drop(pool);
    if let Some(waiter) = first {
        waiter.notify();
    }
}

/// A caller that waits: for ever, or only until a deadline that has come.
fn get(pool: &Mutex<Pool>, over: bool) -> Option<u32> {
    let waiter = Arc::new(Waiter::new());
    {
        let mut pool = pool.lock().unwrap();
        if let Some(conn) = pool.idle.take() {
            return Some(conn);
        }
        pool.queue.push(Arc::clone(&waiter));
    }
    loop {
        let is_over = match waiter.wait(over) {
            Signal::Served(conn) => return Some(conn),
            Signal::Notified => false,
            Signal::None => true,
        };
        let mut pool = pool.lock().unwrap();
        let place = pool.queue.iter().position(|other| Arc::ptr_eq(other, &waiter));
        let Some(place) = place else {
            // Served, under the same lock: at the deadline the connection is there, and otherwise the signal is.
            match (is_over, waiter.take()) {
                (_, Some(conn)) => return Some(conn),
                (true, None) => panic!("neither queued nor served"),
                (false, None) => continue,
            }
        };
        if let Some(conn) = pool.idle.take() {
            pool.queue.remove(place);
            return Some(conn);
        }
        if is_over {
            pool.queue.remove(place);
            return None;
        }
    }
}

fn start<T: 'static>(pool: &Arc<Mutex<Pool>>, body: impl FnOnce(&Mutex<Pool>) -> T + 'static) -> thread::JoinHandle<T> {
    let pool = Arc::clone(pool);
    thread::spawn(move || body(&pool))
}

#[test]
fn a_waiter_is_served() {
    model("a waiter", || {
        let pool = Arc::new(Mutex::new(Pool::default()));
        let waiter = start(&pool, |pool| get(pool, false));
        hand_off(&pool, 1);
        assert_eq!(waiter.join().unwrap(), Some(1));
    });
}

#[test]
fn at_the_deadline_the_connection_is_the_waiters_or_the_pools() {
    model("a deadline", || {
        let pool = Arc::new(Mutex::new(Pool::default()));
        let waiter = start(&pool, |pool| get(pool, true));
        hand_off(&pool, 1);
        let got = waiter.join().unwrap();
        let idle = pool.lock().unwrap().idle;
        assert_eq!(got.xor(idle), Some(1), "one of them has it: {got:?}, {idle:?}");
    });
}

#[test]
fn a_notified_waiter_comes() {
    model("a notified waiter", || {
        let pool = Arc::new(Mutex::new(Pool::default()));
        let waiter = start(&pool, |pool| get(pool, false));
        make_idle(&pool, 1);
        assert_eq!(waiter.join().unwrap(), Some(1));
    });
}

#[test]
fn a_waiter_that_was_barged_is_notified_again() {
    model_with("a barged waiter", Some(3), || {
        let pool = Arc::new(Mutex::new(Pool::default()));
        let waiter = start(&pool, |pool| get(pool, false));
        let barger = start(&pool, |pool| {
            let taken = pool.lock().unwrap().idle.take();
            if let Some(conn) = taken {
                make_idle(pool, conn);
            }
        });
        make_idle(&pool, 1);
        barger.join().unwrap();
        assert_eq!(waiter.join().unwrap(), Some(1));
    });
}
