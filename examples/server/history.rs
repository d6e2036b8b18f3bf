//! What the page shows: the pool's last minutes, looked at four times a second, and what the server says of it.

use crate::Db;
use crate::weather::{Kind, Requests, Weather};
use millpond::postgres::{Audit, Owner};
use millpond::{CloseReason, ConnectionState, Health, Stats};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The time between two looks, and how many are kept: five minutes.
const STEP: Duration = Duration::from_millis(250);
const KEPT: usize = 5 * 60 * 4;

/// How long ago the look is that "the last minute" is counted from.
const MINUTE: Duration = Duration::from_secs(60);

/// By how much the close of an idle or aged connection may be late: what the pool promises.
const ALLOWED: Duration = Duration::from_millis(50);

/// The server is asked while somebody reads its answers, and for this long after.
const WATCHED: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub(crate) struct History(Arc<Shared>);

struct Shared {
    begun: Instant,
    /// No other run of this program has the same.
    run: String,
    pool: Db,
    weather: Weather,
    past: Mutex<Past>,
    changed: Condvar,
}

struct Past {
    over: bool,
    /// The number of the newest sample.
    number: u64,
    samples: VecDeque<Sample>,
    /// One look a second, for a minute.
    looks: VecDeque<Look>,
    journal: VecDeque<(u64, String)>,
    /// The most slots that were ever in use at once, of those that were seen.
    most: u32,
    watched: Option<Instant>,
    audit: Option<(Instant, Result<Audit, String>)>,
}

/// All times are milliseconds since the beginning.
struct Sample {
    at: u64,
    idle: u32,
    in_use: u32,
    opening: u32,
    /// Being checked or closed.
    other: u32,
    waiting: u32,
    size: u32,
    max_size: u32,
    serves: bool,
    /// What was closed since the sample before.
    closed: Vec<(CloseReason, u64)>,
}

struct Look {
    at: Instant,
    stats: Stats,
    requests: Requests,
}

impl History {
    /// Begins to look, on two threads, until [`stop`](History::stop).
    pub(crate) fn start(pool: Db, weather: Weather) -> std::io::Result<(History, Vec<JoinHandle<()>>)> {
        let past = Past {
            over: false,
            number: 0,
            samples: VecDeque::with_capacity(KEPT),
            looks: VecDeque::new(),
            journal: VecDeque::new(),
            most: 0,
            watched: None,
            audit: None,
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let run = format!("{}-{}", std::process::id(), since.as_millis());
        let shared =
            Shared { begun: Instant::now(), run, pool, weather, past: Mutex::new(past), changed: Condvar::new() };
        let history = History(Arc::new(shared));
        let (sampler, auditor) = (Arc::clone(&history.0), Arc::clone(&history.0));
        let threads = vec![
            thread::Builder::new().name("sampler".into()).spawn(move || sampler.sample())?,
            thread::Builder::new().name("auditor".into()).spawn(move || auditor.audit())?,
        ];
        Ok((history, threads))
    }

    pub(crate) fn stop(&self) {
        self.0.past().over = true;
        self.0.changed.notify_all();
    }

    /// All that the page shows, with the samples that are newer than `after`.
    pub(crate) fn status(&self, after: u64) -> String {
        let shared = &*self.0;
        // Before the stats: nothing is served that was not checked out.
        let requests = shared.weather.requests();
        let stats = shared.pool.stats();
        let connections = shared.pool.connections();
        let (health, now) = (shared.pool.health(), Instant::now());
        let settings = shared.pool.settings();
        let mut past = shared.past();
        past.watched = Some(now);
        shared.changed.notify_all();

        let first = past.number.saturating_sub(past.samples.len() as u64);
        let new = past.samples.iter().skip(after.saturating_sub(first) as usize);
        // (As long as nothing is older than a minute, all is of the last one.)
        let minute = past.looks.front().filter(|_| shared.begun.elapsed() > MINUTE);
        let recent = minute.map_or_else(|| stats.clone(), |look| stats.since(&look.stats));
        let before = minute.map_or(Requests::default(), |look| look.requests);
        let reasons: Map<_, _> = CloseReason::ALL
            .into_iter()
            .filter(|&reason| stats.closed_for(reason) > 0)
            .map(|reason| (reason.as_str().to_owned(), json!(stats.closed_for(reason))))
            .collect();
        let late = stats.max_lateness;
        let evicted = stats.closed_for(CloseReason::Idle) + stats.closed_for(CloseReason::Lifetime);
        let most = past.most.max(stats.size());
        // What was once broken is told for ever, but judged for a minute.
        let recently_late = recent.max_lateness.min(late);
        let begin = ms(shared.begun.elapsed().saturating_sub(MINUTE));
        let recently = past.samples.iter().filter(|s| s.at >= begin);
        let too_many = recently.map(|s| s.size).chain([stats.size()]).any(|size| size > stats.max_size);

        let audit = past.audit.as_ref();
        let answer = audit.and_then(|(_, answer)| answer.as_ref().ok());
        let of_server: BTreeMap<u64, Value> = answer
            .into_iter()
            .flat_map(|audit| &audit.backends)
            .filter_map(|b| {
                let connection = b.connection.as_ref()?;
                Some((
                    connection.id,
                    json!({
                        "state": b.state, "since": b.since.map(ms), "in_tx": b.in_transaction_for.map(ms),
                        "waiting_on": b.waiting_on,
                    }),
                ))
            })
            .collect();
        let others: Vec<_> = answer
            .into_iter()
            .flat_map(|audit| &audit.backends)
            // What belongs to the pool may have been closed since, and the question itself is nobody's concern.
            .filter(|b| !matches!(b.owner, Owner::Pool | Owner::Audit | Owner::ThisProcess))
            .map(|b| {
                json!({
                    "pid": b.pid, "state": b.state, "age": b.age.map(ms),
                    "owner": match b.owner {
                        Owner::Other => "another process",
                        Owner::Orphaned => "orphaned: no client",
                        _ => "unknown",
                    },
                })
            })
            .collect();
        let rows: Vec<_> = connections
            .iter()
            .map(|c| json!({
                "id": c.id, "pid": c.server_id, "state": c.state.to_string(), "since": ms(c.since), "age": ms(c.age),
                "uses": c.uses, "thread": c.thread, "at": c.location.map(ToString::to_string),
                "long": c.state == ConnectionState::InUse && settings.leak_threshold.is_some_and(|t| c.since >= t),
                "server": of_server.get(&c.id),
            }))
            .collect();

        json!({
            "now": ms(shared.begun.elapsed()),
            "run": shared.run,
            "number": past.number,
            "pool": {
                "name": stats.name, "age": ms(stats.age), "max_size": stats.max_size,
                "max_idle": settings.max_idle.map(ms), "private": shared.weather.is_private(),
            },
            "health": { "state": health.as_str(), "serves": health.serves(), "text": health.to_string() },
            "failing": stats.failing.map(|failing| json!({
                "since": ms(failing.since), "attempts": failing.attempts, "next_try": failing.next_try.map(ms),
                "text": failing.to_string(),
            })),
            "last_error": stats.last_error.as_ref().map(|error| json!({
                "ago": ms(error.ago), "text": error.cause.to_string(),
            })),
            "promises": {
                "hold": recently_late <= ALLOWED && !too_many,
                "late": us(late), "allowed": us(ALLOWED), "evicted": evicted, "most": most,
            },
            "counts": {
                "idle": stats.idle, "in_use": stats.in_use, "opening": stats.opening,
                "other": stats.checking + stats.closing, "waiting": stats.waiting, "abandoned": stats.abandoned,
            },
            "minute": {
                "span": minute.map_or_else(|| ms(stats.age), |look| ms(now - look.at)),
                "checkouts": recent.checkouts, "waits": recent.waits, "opens": recent.opens,
                "wait_p50": us(recent.wait_time.quantile(0.5)), "wait_p99": us(recent.wait_time.quantile(0.99)),
                "use_p50": us(recent.usage_time.quantile(0.5)), "open_p50": us(recent.open_time.quantile(0.5)),
                "served": requests.served - before.served, "exhausted": requests.exhausted - before.exhausted,
                "unavailable": requests.unavailable - before.unavailable, "refused": requests.refused - before.refused,
                "failed": requests.failed - before.failed,
            },
            "closed": reasons,
            "weather": shared.weather.kinds().into_iter().map(Kind::as_str).collect::<Vec<_>>(),
            "connections": rows,
            "others": others,
            "server": audit.map(|(at, answer)| json!({
                "ago": ms(now - *at), "error": answer.as_ref().err(),
                "backends": answer.as_ref().ok().map(|a| a.backends.iter().filter(|b| b.owner == Owner::Pool).count()),
            })),
            "journal": past.journal.iter().map(|(at, what)| json!([at, what])).collect::<Vec<_>>(),
            "samples": new.map(Sample::json).collect::<Vec<_>>(),
        })
        .to_string()
    }
}

impl Shared {
    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn sample(&self) {
        let mut before = self.pool.stats();
        let mut serves = true;
        let mut next = Instant::now();
        loop {
            next += STEP;
            let past = self.past();
            let pause = next.saturating_duration_since(Instant::now());
            let waited = self.changed.wait_timeout_while(past, pause, |past| !past.over);
            let (mut past, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
            if past.over {
                return;
            }
            let at = Instant::now();
            // Looks that a busy machine has missed are not made up for.
            next = next.max(at.checked_sub(STEP).unwrap_or(at));
            let stats = self.pool.stats();
            let health = self.pool.health();

            for (when, what) in self.weather.take_journal() {
                past.tell(ms(when - self.begun), what);
            }
            if health.serves() != serves {
                serves = health.serves();
                let what = match &health {
                    Health::Down { cause, .. } => format!("down: {cause}"),
                    Health::Ready | Health::Busy => "it serves again".to_owned(),
                    other => other.as_str().to_owned(),
                };
                past.tell(ms(at - self.begun), what);
            }
            let since = stats.since(&before);
            let closed: Vec<_> =
                CloseReason::ALL.into_iter().map(|r| (r, since.closed_for(r))).filter(|&(_, n)| n > 0).collect();
            past.most = past.most.max(stats.size());
            past.number += 1;
            if past.samples.len() == KEPT {
                past.samples.pop_front();
            }
            past.samples.push_back(Sample {
                at: ms(at - self.begun),
                idle: stats.idle,
                in_use: stats.in_use,
                opening: stats.opening,
                other: stats.checking + stats.closing,
                waiting: stats.waiting,
                size: stats.size(),
                max_size: stats.max_size,
                serves: health.serves(),
                closed,
            });
            if past.looks.back().is_none_or(|look| at - look.at >= Duration::from_secs(1)) {
                let requests = self.weather.requests();
                past.looks.push_back(Look { at, stats: stats.clone(), requests });
                while past.looks.front().is_some_and(|look| at - look.at > MINUTE) {
                    past.looks.pop_front();
                }
            }
            before = stats;
        }
    }

    /// Asks the server, once a second, while somebody looks at the page.
    fn audit(&self) {
        loop {
            let past = self.past();
            let unwatched = |past: &mut Past| !past.over && past.watched.is_none_or(|at| at.elapsed() > WATCHED);
            let past = self.changed.wait_while(past, unwatched).unwrap_or_else(|poisoned| poisoned.into_inner());
            if past.over {
                return;
            }
            drop(past);
            let answer = millpond::postgres::audit(&self.pool).map_err(|e| e.to_string());
            let mut past = self.past();
            past.audit = Some((Instant::now(), answer));
            let pause = Duration::from_secs(1);
            drop(self.changed.wait_timeout_while(past, pause, |past| !past.over));
        }
    }
}

impl Past {
    fn tell(&mut self, at: u64, what: String) {
        if self.journal.len() == 50 {
            self.journal.pop_front();
        }
        self.journal.push_back((at, what));
    }
}

impl Sample {
    /// In short: there are many.
    fn json(&self) -> Value {
        let closed: Map<_, _> = self.closed.iter().map(|(r, n)| (r.as_str().to_owned(), json!(n))).collect();
        json!([
            self.at,
            self.idle,
            self.in_use,
            self.opening,
            self.other,
            self.waiting,
            self.max_size,
            self.serves,
            closed
        ])
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
