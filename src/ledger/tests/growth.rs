//! How the work of one step grows with the pool. What is counted is the slots that a step looks at. The table of times is
//! a test as well, which is run when it is asked for:
//!
//! ```sh
//! cargo test --release --lib growth -- --ignored --nocapture
//! ```

use std::collections::VecDeque;
use std::time::Instant;

use super::world::*;

/// A ledger whose jobs end at once, and what its steps cost: the time that the lock would be held, and the slots looked
/// at.
struct Large {
    l: Ledger<Conn, Thread>,
    now: Moment,
    in_use: Vec<(Token, Conn)>,
    jobs: VecDeque<SlotJob<Conn>>,
    leaks: usize,
    greatest: Duration,
    total: Duration,
    most_looks: usize,
    all_looks: usize,
    steps: usize,
}

/// From one open or return to the next.
const EACH: Duration = Duration::from_nanos(1_000);

impl Large {
    /// A pool of `n` connections in use, which were opened a microsecond apart.
    fn in_use(n: u32, with: impl FnOnce(&mut Settings)) -> Large {
        let mut settings = Settings { max_size: n, parallel_opens: 4, fair_after: ms(1), ..settings() };
        with(&mut settings);
        let mut w = Large {
            l: Ledger::new(settings, ms(8)),
            now: Moment::BIRTH,
            in_use: Vec::new(),
            jobs: VecDeque::new(),
            leaks: 0,
            greatest: Duration::ZERO,
            total: Duration::ZERO,
            most_looks: 0,
            all_looks: 0,
            steps: 0,
        };
        for thread in 0..u64::from(n) {
            w.now = w.now.plus(EACH);
            w.step(|l, now| _ = l.join(now, here(), None, false, thread));
            w.do_jobs();
        }
        assert_eq!(w.in_use.len(), n as usize);
        w.begin()
    }

    /// A pool of `n` idle connections, which were returned a microsecond apart.
    fn idle(n: u32, with: impl FnOnce(&mut Settings)) -> Large {
        let mut w = Large::in_use(n, with);
        w.return_all();
        assert_eq!(w.l.counts().idle, n);
        w.begin()
    }

    fn return_all(&mut self) {
        for (token, conn) in std::mem::take(&mut self.in_use) {
            self.now = self.now.plus(EACH);
            self.step(|l, now| l.returned(now, token, conn, Condition::Keep));
        }
    }

    /// Costs count from here on.
    fn begin(mut self) -> Large {
        (self.greatest, self.total, self.most_looks) = (Duration::ZERO, Duration::ZERO, 0);
        (self.all_looks, self.steps) = (0, 0);
        self
    }

    fn step<R>(&mut self, act: impl FnOnce(&mut Ledger<Conn, Thread>, Moment) -> R) -> R {
        self.l.slots.looks.set(0);
        let begun = Instant::now();
        let answer = act(&mut self.l, self.now);
        let effects = self.l.effects.take();
        let held = begun.elapsed();
        let looks = self.l.slots.looks.get();
        (self.greatest, self.total) = (self.greatest.max(held), self.total + held);
        (self.most_looks, self.all_looks) = (self.most_looks.max(looks), self.all_looks + looks);
        self.steps += 1;
        for (_, outcome) in effects.served {
            let Outcome::Connection(token, conn) = outcome else { panic!("{outcome:?}") };
            self.in_use.push((token, conn));
        }
        for order in effects.orders {
            match order {
                Order::Job(job) => self.jobs.push_back(job),
                Order::Leak { .. } => self.leaks += 1,
                Order::Slow { .. } | Order::Recovered { .. } => {}
                Order::Abandon { .. } => panic!("{order:?}"),
            }
        }
        answer
    }

    /// Each job begins and ends at this moment.
    fn do_jobs(&mut self) {
        while let Some(job) = self.jobs.pop_front() {
            match job {
                SlotJob::Open(token) => {
                    let (id, begun) = (token.id(), self.step(|l, now| l.begin(now, token, 1.0)));
                    if let Some(token) = begun {
                        assert!(matches!(self.step(|l, now| l.opened(now, token, id)), Ok(true)));
                    }
                }
                SlotJob::Check(token, conn) => {
                    let token = self.step(|l, now| l.begin(now, token, 1.0)).expect("a check is always wanted");
                    assert!(self.step(|l, now| l.checked(now, now, token, conn)).is_ok());
                }
                SlotJob::Close(token, ..) => {
                    self.step(|l, now| l.begin_close(now, &token));
                    self.step(|l, now| l.free(now, token));
                }
                SlotJob::Reset(..) => unreachable!("nothing is reset"),
            }
        }
    }

    /// The reaper looks, as long as it wants to look at this moment.
    fn look(&mut self) -> usize {
        let mut looks = 0;
        loop {
            self.step(|l, now| l.reap(now, 0.0));
            looks += 1;
            if self.l.alarm() > self.now {
                return looks;
            }
        }
    }

    /// Time goes on to the next alarm, so often.
    fn alarms(&mut self, n: usize) {
        for _ in 0..n {
            if self.l.alarm() == Moment::NEVER {
                return;
            }
            self.now = self.now.max(self.l.alarm());
            self.step(|l, now| l.reap(now, 0.0));
            self.do_jobs();
        }
    }

    fn wait(&mut self, time: Duration) {
        self.now = self.now.plus(time);
    }

    /// All connections are checked out, one after the other. Those that need it their caller checks.
    fn take_all(&mut self) {
        while self.l.counts().idle > 0 {
            self.now = self.now.plus(EACH);
            let taken = match self.step(|l, now| l.take(now, here(), true)) {
                Take::Ready(token, conn) => (token, conn),
                Take::Check(token, conn, _) => {
                    let passed = self.step(|l, now| l.own_check_passed(now, now, token, conn, here()));
                    passed.expect("fresh")
                }
                Take::Nothing => panic!("{:?}", self.l.counts()),
            };
            self.in_use.push(taken);
        }
    }
}

const FAR: Duration = Duration::from_secs(3_600);

fn rest(s: &mut Settings) {
    (s.max_idle, s.max_lifetime) = (Some(FAR), Some(FAR));
}

fn keepalive(s: &mut Settings) {
    s.keepalive = Some(secs(60));
}

fn leaks(s: &mut Settings) {
    s.leak_threshold = Some(secs(60));
}

fn idle_limit(s: &mut Settings) {
    s.max_idle = Some(secs(60));
}

/// All connections end at the same moment, but for the microseconds between their opens.
fn lifetime(s: &mut Settings) {
    (s.max_idle, s.max_lifetime) = (None, Some(secs(60)));
}

fn suspicion(s: &mut Settings) {
    s.validate = Validate::AfterIdle(secs(30));
}

/// One is found dead while all others are idle.
fn one_dies(w: &mut Large) {
    let (token, conn) = match w.step(|l, now| l.take(now, here(), true)) {
        Take::Ready(token, conn) => (token, conn),
        other => panic!("{other:?}"),
    };
    w.step(|l, now| l.returned(now, token, conn, Condition::Broken));
    w.do_jobs();
}

/// What one look at rest may look at, however large the pool.
const HANDFUL: usize = 16;

#[test]
fn a_look_at_rest_looks_at_a_handful_of_slots() {
    for n in [10, 1_000, 30_000] {
        let mut w = Large::idle(n, |s| (rest(s), keepalive(s), leaks(s)).0);
        // What is out of date is corrected once.
        (0..n / 100 + 2).for_each(|_| w.step(|l, now| l.reap(now, 0.0)));
        let mut w = w.begin();
        for _ in 0..100 {
            w.wait(us(1));
            w.step(|l, now| l.reap(now, 0.0));
        }
        assert!(w.most_looks <= HANDFUL, "{} of {n} idle", w.most_looks);

        let mut w = Large::in_use(n, |s| (rest(s), keepalive(s), leaks(s)).0);
        w.look();
        let mut w = w.begin();
        for _ in 0..100 {
            w.wait(us(1));
            w.step(|l, now| l.reap(now, 0.0));
        }
        assert!(w.most_looks <= HANDFUL, "{} of {n} in use", w.most_looks);
    }
}

#[test]
fn a_keepalive_looks_at_a_handful_of_slots_and_at_those_of_its_age() {
    let n = 10_000;
    let mut w = Large::idle(n, keepalive);
    w.wait(secs(60));
    w.look();
    w.do_jobs();
    let mut w = w.begin();
    w.alarms(1_000);
    assert!(w.steps >= 3_000, "{} steps", w.steps);
    // (To find a place in the stack takes a look at one slot for each power of two.)
    assert!(w.most_looks <= HANDFUL + 2 * 14, "{}", w.most_looks);
}

#[test]
fn every_leak_is_reported_and_no_look_reports_all() {
    let n = 30_000;
    let mut w = Large::in_use(n, leaks);
    w.wait(secs(60));
    assert!(w.look() > 100);
    assert_eq!(w.leaks, n as usize);
    assert!(w.most_looks <= 6 * w.l.least_batch, "{} in one look", w.most_looks);
    assert!(w.all_looks <= 6 * n as usize, "{} in all", w.all_looks);
}

/// Checkouts leave bounds behind that are out of date. They are corrected in batches, and each once.
#[test]
fn what_traffic_leaves_behind_is_corrected_in_batches() {
    let n = 10_000;
    let mut w = Large::idle(n, |s| (keepalive(s), leaks(s)).0);
    for _ in 0..3 {
        w.take_all();
        w.return_all();
    }
    assert!(w.l.in_use_since.len() <= n as usize && w.l.unproven_since.len() <= n as usize);
    let mut w = w.begin();
    w.look();
    w.do_jobs();
    assert!(w.most_looks <= 4 * w.l.least_batch, "{} in one look", w.most_looks);
    assert_eq!(w.leaks, 0);
}

#[test]
fn mass_evictions_come_in_batches_and_are_complete() {
    let n = 30_000;
    for with in [idle_limit, lifetime] {
        let mut w = Large::idle(n, with);
        w.wait(secs(60));
        let looks = w.look();
        assert_eq!((w.l.counts().idle, w.l.counts().closing), (0, n));
        // With no more than 256 in each look it would be 118, in which those that stay are moved.
        assert!((10..90).contains(&looks), "{looks} looks");
        assert!(w.most_looks <= n as usize / 2, "{} in one look", w.most_looks);
        assert!(w.all_looks <= 20 * n as usize, "{} in all", w.all_looks);
        w.do_jobs();
        assert_eq!(w.l.counts().total(), 0);
        // So long the opens and the returns took.
        assert!(w.l.tally.lateness.max() <= EACH * 2 * n, "{:?} late", w.l.tally.lateness.max());
    }
}

/// A caller that comes when all have expired, as far as the clock can tell, and before the reaper is to look, closes a
/// batch, and no more. The reaper looks at once, and the caller is served.
#[test]
fn a_caller_that_finds_all_expired_closes_a_batch() {
    let n = 5_000;
    let mut w = Large::idle(n, lifetime);
    w.look();
    w.now = Moment::BIRTH.plus(ms(59_998));
    assert!(w.l.alarm() > w.now);
    assert!(matches!(w.step(|l, now| l.take(now, here(), false)), Take::Nothing));
    let closed = w.l.counts().closing;
    assert!(closed > 0 && closed <= n / 16, "{closed}");
    assert!(w.l.alarm() <= w.now);
    w.step(|l, now| _ = l.join(now, here(), None, false, 1));
    assert!(w.l.counts().closing <= n / 4);
    w.look();
    assert_eq!(w.l.counts().idle, 0);
    w.do_jobs();
    assert_eq!((w.in_use.len(), w.l.counts().total()), (1, 1));
}

#[test]
fn after_a_suspicion_each_step_looks_at_a_handful_of_slots() {
    let mut w = Large::idle(10_000, suspicion);
    one_dies(&mut w);
    let mut w = w.begin();
    w.take_all();
    assert_eq!(w.in_use.len(), 9_999);
    assert!(w.most_looks <= 2 * HANDFUL, "{}", w.most_looks);
}

#[test]
fn a_caller_that_does_not_wait_looks_at_a_handful_of_slots() {
    let mut w = Large::in_use(10_000, |_| {});
    for _ in 0..10 {
        assert!(matches!(w.step(|l, now| l.take_at_once(now, here())), Take::Nothing));
        w.step(|l, now| l.prepare(now));
    }
    assert!(w.most_looks <= HANDFUL, "{}", w.most_looks);
}

// ------------------------------------------------------------------------------------------ the table

type Scenario = (&'static str, fn(u32) -> Large);

const SCENARIOS: [Scenario; 12] = [
    ("a checkout and its return, 1,000 times", |n| {
        let mut w = Large::idle(n, rest);
        for _ in 0..1_000 {
            let Take::Ready(token, conn) = w.step(|l, now| l.take(now, here(), true)) else { panic!("all idle") };
            w.step(|l, now| l.returned(now, token, conn, Condition::Keep));
        }
        w
    }),
    ("looks at rest, 100 of them", |n| {
        let mut w = Large::idle(n, rest);
        for _ in 0..100 {
            w.wait(us(1));
            w.step(|l, now| l.reap(now, 0.0));
        }
        w
    }),
    ("keepalive, 1,000 checks", |n| {
        let mut w = Large::idle(n, keepalive);
        w.alarms(1_000);
        w
    }),
    ("leak detection, 100 looks at all in use", |n| {
        let mut w = Large::in_use(n, leaks);
        w.step(|l, now| l.reap(now, 0.0));
        let mut w = w.begin();
        for _ in 0..100 {
            w.wait(us(1));
            w.step(|l, now| l.reap(now, 0.0));
        }
        w
    }),
    ("all are leaks", |n| {
        let mut w = Large::in_use(n, leaks);
        w.wait(secs(60));
        w.look();
        w
    }),
    ("all are evicted, by `max_idle`", |n| {
        let mut w = Large::idle(n, idle_limit);
        w.wait(secs(60));
        w.look();
        w
    }),
    ("all expire, by `max_lifetime`", |n| {
        let mut w = Large::idle(n, lifetime);
        w.wait(secs(60));
        w.look();
        w
    }),
    ("... and the closes", |n| {
        let mut w = Large::idle(n, lifetime);
        w.wait(secs(60));
        w.look();
        let mut w = w.begin();
        w.do_jobs();
        w
    }),
    ("all are suspect: each is checked by its caller", |n| {
        let mut w = Large::idle(n, suspicion);
        one_dies(&mut w);
        let mut w = w.begin();
        w.take_all();
        w
    }),
    ("`recycle`", |n| {
        let mut w = Large::idle(n, rest);
        w.step(|l, now| l.recycle(now));
        w
    }),
    ("`resize` to a tenth", |n| {
        let mut w = Large::idle(n, rest);
        w.step(|l, now| l.resize(now, n / 10));
        w
    }),
    ("`close`", |n| {
        let mut w = Large::idle(n, rest);
        w.step(|l, now| l.close(now));
        w
    }),
];

#[test]
#[ignore = "prints a table of times"]
fn table_of_times() {
    let sizes = [10, 100, 1_000, 10_000, 100_000];
    let text = |time: Duration| match time.as_nanos() as f64 / 1e3 {
        us if us < 10.0 => format!("{us:.2} µs"),
        us if us < 1_000.0 => format!("{us:.0} µs"),
        us => format!("{:.2} ms", us / 1e3),
    };
    println!(
        "| the longest that the lock is held; in all |{} |",
        sizes.map(|n| format!(" {n} |")).concat().trim_end_matches('|')
    );
    println!("|---|{}", "---:|".repeat(sizes.len()));
    for (name, scenario) in SCENARIOS {
        let cells = sizes.map(|n| {
            // The best of a few, since the machine has other things to do.
            let runs: Vec<_> = (0..3).map(|_| scenario(n)).map(|w| (w.greatest, w.total)).collect();
            let greatest = runs.iter().map(|run| run.0).min().unwrap_or_default();
            let total = runs.iter().map(|run| run.1).min().unwrap_or_default();
            format!(" {}; {} |", text(greatest), text(total))
        });
        println!("| {name} |{}", cells.concat());
    }
}
