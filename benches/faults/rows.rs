//! The faults: one row each.

use super::ms;
use super::world::World;
use crate::support::Server;
use std::time::Duration;

/// One fault.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) front: Front,
    pub(crate) settings: &'static [(&'static str, &'static str)],
    /// Before there is a pool.
    pub(crate) prepare: Option<fn(&World)>,
    pub(crate) strike: fn(&World),
    /// From the strike to the heal.
    pub(crate) lasts: Duration,
    /// What is never healed has no recovery.
    pub(crate) heal: Option<fn(&World)>,
    pub(crate) crowd: Crowd,
    pub(crate) query: &'static str,
    /// How long is watched from the heal on, unless all is steady before.
    pub(crate) watch: Duration,
    pub(crate) is_long: bool,
}

/// What the pool connects to.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Front {
    Server,
    Proxy,
    Bouncer,
    /// A proxy before a PgBouncer.
    ProxiedBouncer,
    /// A primary, and a standby as the second choice.
    Pair,
}

/// How the users come.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Crowd {
    /// Each every 20 ms or so, one after the other.
    Steady,
    /// All together, every 2.5 s.
    Bursts,
}

impl Crowd {
    /// Between two calls of one user.
    pub(crate) const fn pause(self) -> Duration {
        match self {
            Crowd::Steady => ms(20),
            Crowd::Bursts => ms(2_500),
        }
    }

    /// Between the first calls of two users.
    pub(crate) fn stagger(self, users: usize) -> Duration {
        match self {
            Crowd::Steady => self.pause() / users as u32,
            Crowd::Bursts => Duration::ZERO,
        }
    }
}

/// Long enough that eight users need all four connections, and that some are in a query at any time.
const BUSY: &str = "SELECT pg_sleep(0.02)";
const WRITE: &str = "INSERT INTO t DEFAULT VALUES";

pub(crate) const END_ALL: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
const END_SOME: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' LIMIT 2";

/// Struck and healed at once, and what most rows have in common.
const fn row(name: &'static str, what: &'static str, strike: fn(&World)) -> Row {
    Row {
        name,
        what,
        front: Front::Server,
        settings: &[],
        prepare: None,
        strike,
        lasts: Duration::ZERO,
        heal: Some(|_| {}),
        crowd: Crowd::Steady,
        query: "SELECT 1",
        watch: Duration::from_secs(12),
        is_long: false,
    }
}

const fn stopped_fast(name: &'static str, what: &'static str, lasts: Duration) -> Row {
    row(name, what, |w| w.server.stop_fast()).healed(lasts, |w| w.server.start_again())
}

const fn stopped_at_once(name: &'static str, what: &'static str, lasts: Duration) -> Row {
    row(name, what, |w| w.server.stop_immediate()).healed(lasts, |w| w.server.start_again())
}

const fn failover(name: &'static str, what: &'static str, strike: fn(&World)) -> Row {
    let row = row(name, what, strike).before(Front::Pair).with(Server::STREAMING).asking(WRITE);
    row.healed(ms(500), |w| w.standby.as_ref().expect("a standby").promote())
}

impl Row {
    /// Whether it needs nothing of its server that other rows do not, and leaves it as it was.
    pub(crate) fn is_plain(&self) -> bool {
        self.settings.is_empty() && self.prepare.is_none() && self.front != Front::Pair
    }

    const fn healed(self, lasts: Duration, heal: fn(&World)) -> Row {
        Row { lasts, heal: Some(heal), ..self }
    }

    const fn before(self, front: Front) -> Row {
        Row { front, ..self }
    }

    const fn with(self, settings: &'static [(&'static str, &'static str)]) -> Row {
        Row { settings, ..self }
    }

    const fn prepared(self, prepare: fn(&World)) -> Row {
        Row { prepare: Some(prepare), ..self }
    }

    const fn asking(self, query: &'static str) -> Row {
        Row { query, ..self }
    }

    /// Used by all users at once, and idle between.
    const fn in_bursts(self) -> Row {
        Row { crowd: Crowd::Bursts, query: BUSY, ..self }
    }

    const fn long(self) -> Row {
        Row { is_long: true, watch: Duration::from_secs(90), ..self }
    }
}

pub(crate) const ROWS: &[Row] = &[
    stopped_fast("stop-fast-0.2", "the server is stopped fast and is back after 0.2 s", ms(200)),
    stopped_fast("stop-fast-2", "the same, back after 2 s", ms(2_000)),
    stopped_fast("stop-fast-8", "the same, back after 8 s", ms(8_000)),
    stopped_fast("stop-fast-60", "the same, back after 60 s", ms(60_000)).long(),
    stopped_at_once("stop-immediate-0.2", "the server is stopped at once, and is back after 0.2 s", ms(200)),
    stopped_at_once("stop-immediate-2", "the same, back after 2 s", ms(2_000)),
    stopped_at_once("stop-immediate-8", "the same, back after 8 s", ms(8_000)),
    stopped_at_once("stop-immediate-60", "the same, back after 60 s", ms(60_000)).long(),
    row("terminate-some", "`pg_terminate_backend` on two of the connections", |w| w.admin(END_SOME)).asking(BUSY),
    row("terminate-all", "`pg_terminate_backend` on all connections", |w| w.admin(END_ALL)).asking(BUSY),
    row("kill-backend", "`kill -9` of one backend: the server ends all of them and recovers", World::kill_one_backend)
        .asking(BUSY),
    Row {
        lasts: Duration::from_secs(10),
        heal: None,
        ..row("idle-session-timeout", "`idle_session_timeout` is 1 s, and users come every 2.5 s, for 11 s", |_| {})
            .prepared(|w| w.admin("ALTER ROLE app SET idle_session_timeout = '1s'"))
            .in_bursts()
    },
    row("starting-up", "the server is restarted and says for 2 s that it is starting up (57P03)", World::start_slowly)
        .with(Server::STREAMING),
    row("max-connections", "the connections are cut, and others use up `max_connections` for 3 s", |w| {
        w.crowd_out(w.server.port());
    })
    .before(Front::Proxy)
    .with(&[("max_connections", "12")])
    .healed(ms(3_000), |w| w.others.lock().clear()),
    row("password", "the password is changed and all connections are ended; 3 s later it is what it was", |w| {
        w.admin("ALTER ROLE app PASSWORD 'new'");
        w.admin(END_ALL);
    })
    .prepared(|w| {
        w.require_password();
        w.admin("ALTER ROLE app PASSWORD 'old'");
    })
    .healed(ms(3_000), |w| w.admin("ALTER ROLE app PASSWORD 'old'")),
    row("sigstop", "the server's processes are stopped by SIGSTOP for 4 s", World::freeze)
        .healed(ms(4_000), World::thaw),
    row("silence", "for 4 s nothing passes, then all that was sent does", |w| w.proxy().pause())
        .before(Front::Proxy)
        .healed(ms(4_000), |w| w.proxy().resume()),
    row("answers-lost", "for 2 s nothing passes, then the connections are reset: answers are lost", |w| {
        w.proxy().pause();
    })
    .before(Front::Proxy)
    .asking(BUSY)
    .healed(ms(2_000), |w| {
        w.proxy().cut();
        w.proxy().resume();
    }),
    row(
        "black-hole-query",
        "a firewall forgets the flows while users wait for answers: old connections are silent for good, new ones work",
        World::forget_flows,
    )
    .before(Front::Proxy)
    .asking(BUSY),
    row("black-hole-idle", "the same while all connections are idle; users come every 2.5 s", World::forget_flows)
        .before(Front::Proxy)
        .in_bursts(),
    row(
        "black-hole-connect",
        "the connections are reset, and for 4 s new ones are accepted and never answered, not even later",
        |w| {
            w.proxy().silent(true);
            w.proxy().cut();
        },
    )
    .before(Front::Proxy)
    .healed(ms(4_000), |w| w.proxy().silent(false)),
    row("bouncer-restart", "PgBouncer is killed and is back after 1 s", |w| w.bouncer().kill())
        .before(Front::Bouncer)
        .healed(ms(1_000), |w| w.bouncer().start_again()),
    row("bouncer-paused", "PgBouncer is told to PAUSE, and to RESUME after 4 s", |w| drop(w.bouncer().admin("PAUSE")))
        .before(Front::Bouncer)
        .healed(ms(4_000), |w| drop(w.bouncer().admin("RESUME"))),
    row("bouncer-full", "the connections are cut, and others use up PgBouncer's `max_client_conn` for 3 s", |w| {
        w.crowd_out(w.bouncer().port());
    })
    .before(Front::ProxiedBouncer)
    .healed(ms(3_000), |w| w.others.lock().clear()),
    failover(
        "failover-killed",
        "the primary dies, and 0.5 s later the standby is promoted (`target_session_attrs=read-write`)",
        |w| w.server.kill(),
    ),
    failover(
        "failover-read-only",
        "the primary turns read-only and lives on, and 0.5 s later the standby is promoted",
        |w| {
            w.admin("ALTER SYSTEM SET default_transaction_read_only = on");
            w.admin("SELECT pg_reload_conf()");
        },
    ),
];
