//! The property test: whatever happens, in whatever order, the rules hold. And a year of a large pool.

use super::world::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Get,
    /// A `get` of a caller that can check a connection for itself.
    GetHere,
    TryGet,
    /// The nth connection in use is returned.
    Return(usize, Condition),
    Detach(usize),
    /// The nth waiter leaves.
    Leave(usize),
    Run(u64),
    /// Microseconds pass, in which notified waiters come or do not come yet.
    Blink(u64),
    /// How long notified waiters take to come, in microseconds.
    Sleepy(u64),
    Resize(u32),
    Recycle,
    Close,
    /// The grace of a close is over.
    Abandon,
    /// From now on the server accepts connections, or attempts to connect to it get so far.
    Server(Option<Reach>),
    /// Whether an open that fails leaves a connection behind, for its job to close.
    Leaves(bool),
    /// How long the parts of a job take, if they begin from now on.
    Network(Takes),
    /// Jobs and checks that hang end now.
    Release,
    /// How far behind the true time is what threads tell the ledger, in microseconds.
    Skew(u64),
    /// Whether the system starts threads.
    Threads(bool),
    /// The nth connection dies, and only its next check finds out.
    Kill(usize),
}

/// Up to `most` milliseconds, often hardly any time, sometimes for ever.
fn takes(most: u64) -> impl Strategy<Value = Duration> {
    prop_oneof![3 => (0..20u64).prop_map(ms), 3 => (0..most).prop_map(ms), 1 => Just(Duration::MAX)]
}

fn op() -> impl Strategy<Value = Op> {
    let back = prop_oneof![
        12 => Just(Condition::Keep),
        2 => Just(Condition::Reset),
        1 => Just(Condition::Broken),
        1 => Just(Condition::Outdated),
        1 => Just(Condition::Discard(CloseReason::Discarded)),
        1 => Just(Condition::Discard(CloseReason::Panicked)),
    ];
    let start = prop_oneof![3 => Just(Duration::ZERO), 3 => (0..200u64).prop_map(ms), 1 => (0..3_000u64).prop_map(ms)];
    let network = (start, takes(12_000), takes(3_000), takes(15_000), takes(8_000))
        .prop_map(|(start, open, check, handler, close)| Takes { start, open, check, handler, close });
    let one_of_each = prop_oneof![
        1 => (1u32..8).prop_map(Op::Resize),
        1 => Just(Op::Recycle),
        1 => prop_oneof![6 => Just(None), 1 => Just(Some(Reach::Nobody)), 1 => Just(Some(Reach::Server)), 1 => Just(Some(Reach::Refusal))].prop_map(Op::Server),
        1 => any::<bool>().prop_map(Op::Leaves),
        1 => (0u64..4_000).prop_map(Op::Skew),
        1 => (0u64..3_000).prop_map(Op::Sleepy),
        1 => prop::bool::weighted(0.7).prop_map(Op::Threads),
        1 => Just(Op::Release),
    ];
    let the_end = prop_oneof![1 => Just(Op::Close), 2 => Just(Op::Abandon)];
    prop_oneof![
        100 => Just(Op::Get),
        50 => Just(Op::GetHere),
        30 => Just(Op::TryGet),
        120 => (any::<usize>(), back).prop_map(|(n, back)| Op::Return(n, back)),
        10 => any::<usize>().prop_map(Op::Detach),
        30 => any::<usize>().prop_map(Op::Leave),
        80 => (0u64..3_000).prop_map(Op::Run),
        60 => (0u64..2_000).prop_map(Op::Blink),
        80 => one_of_each,
        40 => network.prop_map(Op::Network),
        30 => any::<usize>().prop_map(Op::Kill),
        1 => the_end,
    ]
}

fn some_settings() -> impl Strategy<Value = Settings> {
    let validate =
        prop_oneof![Just(Validate::Never), Just(Validate::Always), Just(Validate::AfterIdle(Duration::from_secs(1)))];
    let some = |range| prop_oneof![1 => Just(None), 3 => Strategy::prop_map(range, |n| Some(ms(n)))];
    let fair_after = prop_oneof![Just(0), Just(1_000), 1u64..50_000];
    let limits = (1u32..8, 0u32..8, some(0u64..10_000), some(10u64..20_000));
    (limits, validate, 1u32..5, some(10u64..5_000), fair_after).prop_map(
        |((max_size, min_idle, max_idle, max_lifetime), validate, parallel_opens, keepalive, fair_after)| Settings {
            max_size,
            min_idle: if max_idle == Some(Duration::ZERO) { 0 } else { min_idle.min(max_size) },
            max_idle,
            max_lifetime,
            validate,
            parallel_opens,
            keepalive,
            leak_threshold: Some(secs(2)),
            fair_after: us(fair_after),
            ..settings()
        },
    )
}

impl World {
    /// When each idle connection was last used, sorted, by the world's own account. Idle is a connection that the
    /// server sees, and that no caller and no job has.
    fn naive_idle(&self) -> Vec<Moment> {
        let at_work = self.jobs.values().map(|(_, job)| job.conn).chain(self.own.values().map(|own| own.conn));
        let at_work = at_work.chain(self.backlog.iter().map(|&(_, conn)| conn));
        let taken: Vec<Conn> = self.in_use.values().map(|o| o.1).chain(at_work).collect();
        let mut used: Vec<_> =
            self.server.iter().filter(|(conn, _)| !taken.contains(conn)).map(|(_, &(_, used))| used).collect();
        used.sort();
        used
    }

    fn check_against_naive(&self) {
        let (l, limits) = (&self.ledger, &self.ledger.rules);
        let idle: Vec<_> = l.idle.iter().map(|&(i, _)| l.slots[i as usize].since).collect();
        let naive = self.naive_idle();
        assert_eq!(idle, naive, "the stack, by last use");
        // P1: above the floor no idle connection is due.
        if let Some(max) = limits.max_idle {
            let due = naive.iter().skip(limits.min_idle as usize).filter(|used| used.plus(max) <= self.now);
            assert_eq!(due.count(), 0, "idle for too long");
        }
        // P2: no idle connection is past the end of its life.
        assert!(l.slots().all(|r| r.as_seen() != ConnectionState::Idle || r.dies > self.now), "too old");
        // P5: the server sees at most the connections that are counted and those of abandoned jobs.
        let counts = self.counts();
        assert!(self.server.len() <= (counts.total() + counts.abandoned) as usize);
        // A waiter has something to wait for: a return, a job, or a time to dial.
        if counts.waiting > 0 {
            let hope = counts.total() > 0 || l.alarm < Moment::NEVER;
            assert!(hope, "waiting for nothing: {counts:?}");
        }
        // P1, counted to the moment a close begins: four at once, and at least four more each time that those before
        // take long.
        if self.starts_at_once {
            let late = self.most_skew + CLOSE_PATIENCE * (l.slots.len() / CLOSERS) as u32;
            assert!(l.tally.lateness.max() <= late, "{:?} late, of {late:?}", l.tally.lateness.max());
        }
    }
}

fn nth<T: Copy + Ord>(mut of: Vec<T>, n: usize) -> Option<T> {
    of.sort();
    if of.is_empty() { None } else { Some(of[n % of.len()]) }
}

/// One life of a pool. At its end the server is well again, and every waiter must be served.
fn live(settings: Settings, ops: Vec<Op>) {
    let max = settings.max_size;
    let floor = settings.min_idle;
    let mut w = World::with_resolution(settings, ms(4));
    w.strict = true;
    // So that there are batches at all in so small a pool.
    w.ledger.least_batch = 1 + ops.len() % 4;
    w.ledger.set_min_idle(w.now, floor);
    w.apply();
    for op in ops {
        match op {
            Op::Get => {
                w.get();
            }
            Op::GetHere => {
                w.get_or_check(true);
            }
            Op::TryGet => {
                w.sees = !w.sees;
                w.try_get();
            }
            Op::Return(n, back) => {
                if let Some(thread) = nth(w.in_use.keys().copied().collect(), n) {
                    w.returned_as(thread, back);
                }
            }
            Op::Detach(n) => {
                if let Some(thread) = nth(w.in_use.keys().copied().collect(), n) {
                    let (token, conn) = w.in_use.remove(&thread).unwrap();
                    w.server.remove(&conn);
                    w.ledger.detach(w.read(), token);
                }
            }
            Op::Leave(n) => {
                if let Some(thread) = nth(w.waiting.iter().map(|x| x.0).collect(), n) {
                    assert!(w.leave(thread));
                }
            }
            Op::Run(n) => w.run(ms(n)),
            Op::Blink(n) => w.run(us(n)),
            Op::Sleepy(n) => w.wake_time = us(n),
            Op::Resize(n) if n >= floor => {
                w.greatest = w.greatest.max(w.ledger.rules.max_size);
                w.ledger.resize(w.read(), n);
            }
            Op::Resize(_) => {}
            Op::Recycle => {
                w.replaced = w.event();
                w.ledger.recycle(w.read());
            }
            Op::Close => {
                w.ledger.close(w.read());
            }
            Op::Abandon if w.ledger.closed => w.ledger.abandon_opens(w.read()),
            Op::Abandon => {}
            Op::Server(refuse) => w.refuse = refuse,
            Op::Leaves(one) => w.leaves_one = one,
            Op::Network(takes) => {
                w.takes = takes;
                w.starts_at_once &= takes.start == Duration::ZERO;
            }
            Op::Release => w.release(),
            Op::Skew(n) => w.set_skew(us(n)),
            Op::Threads(spawns) => {
                w.spawns = spawns;
                w.starts_at_once &= spawns;
            }
            Op::Kill(n) => {
                if let Some(conn) = nth(w.server.keys().copied().collect(), n) {
                    w.dead.push(conn);
                }
            }
        }
        w.apply();
        w.run(Duration::ZERO);
        w.check_against_naive();
        w.check_no_waiter_is_forgotten();
    }
    // The server is well again, nothing takes long, what hung ends, and every caller returns its connection.
    (w.refuse, w.leaves_one, w.spawns, w.skew) = (None, false, true, Duration::ZERO);
    w.takes = Takes { open: ms(1), ..QUICK };
    w.release();
    w.ledger.rules.change(|s| s.max_lifetime = Some(secs(1_000_000)));
    for _ in 0..200 {
        for thread in w.in_use.keys().copied().collect::<Vec<_>>() {
            w.returned(thread);
        }
        w.run(secs(1));
    }
    assert_eq!(w.counts().waiting, 0, "a waiter was forgotten");
    assert!(w.counts().total() <= max.max(w.ledger.rules.max_size));
    assert!(w.ledger.closed || w.counts().idle >= floor.min(w.ledger.rules.max_size));
    w.ledger.close(w.now);
    w.apply();
    w.run(secs(60));
    assert_eq!(w.counts().total(), 0, "every slot is freed");
    assert_eq!(w.counts().abandoned, 0);
    assert!(w.server.is_empty());
    assert_eq!(w.ledger.lifetimes.len() + w.ledger.limits.len(), 0);
    assert!(w.posted.is_empty() && w.closers.is_empty() && w.backlog.is_empty(), "the executor has nothing left to do");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    /// Whatever happens, in whatever order: after each step the rules hold and no waiter is forgotten. A pool whose
    /// server is well again serves every waiter, and in the end every slot is freed.
    #[test]
    fn anything_goes(settings in some_settings(), ops in prop::collection::vec(op(), 1..120)) {
        live(settings, ops);
    }
}

#[test]
fn a_year_with_two_thousand_connections() {
    let mut w = World::new(Settings {
        max_size: 2_000,
        min_idle: 10,
        max_idle: Some(secs(600)),
        max_lifetime: Some(secs(1_800)),
        lifetime_jitter: 0.1,
        validate: Validate::AfterIdle(secs(1)),
        parallel_opens: 100,
        ..settings()
    });
    w.takes.open = ms(3);
    w.takes.check = ms(1);
    w.ledger.set_min_idle(w.now, 10);
    w.apply();
    let day = secs(86_400);
    for n in 0..365u64 {
        // A rush in the morning, a trickle until the evening, silence at night.
        let rush: Vec<_> = (0..if n % 73 == 0 { 2_000 } else { 60 }).map(|_| w.get()).collect();
        w.run(secs(1));
        rush.into_iter().for_each(|thread| w.returned(thread));
        for _ in 0..36 {
            w.run(secs(1_200));
            let thread = w.get();
            w.run(secs(1));
            w.returned(thread);
        }
        w.run_to(Moment::BIRTH.plus(day.saturating_mul(n as u32 + 1)));
        assert!((10..=11).contains(&w.counts().idle), "{:?} on day {n}", w.counts());
    }
    assert_eq!(w.ledger.tally.lateness.max(), Duration::ZERO);
    assert!(w.most <= 2_000);
}
