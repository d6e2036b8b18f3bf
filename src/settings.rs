//! [`Settings`]: the limits of a pool, their defaults, and which of them are refused.

use crate::error::Error;
use crate::leaf::text::Short;
use std::time::Duration;

/// The least limit of a call, and the shortest checkout that is called a leak. A shorter limit would fail every call
/// before it was made, or warn of every checkout: to wake a thread takes some 50 us alone.
const SHORTEST_LIMIT: Duration = Duration::from_millis(1);
/// The least period of what the pool does over and over by itself. With a shorter one the pool would do nothing else.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);
/// The most connections that are opened at the same time. Each takes a thread, and a process that cannot start a thread
/// any more may end. A server accepts far fewer at once.
const MOST_OPENS: u32 = 1024;

/// When a connection is checked before it is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validate {
    /// Before every checkout, as r2d2's `test_on_check_out(true)` does.
    Always,
    /// When it was neither used nor checked for at least this long, or when another connection has been found dead
    /// since it was last known to be well. The default, with one second. Zero is the same as `Always`.
    ///
    /// For callers that wait. [`try_get`](crate::Pool::try_get) and a timeout of zero cannot wait for a check: what has been
    /// unused for this long they get after a mere look at it; where the manager cannot look, if it was used or checked since
    /// the last such call. So there, and not in `get`, a caller may find that the connection has gone dead without a word.
    /// One under suspicion they get only after a check. (`tests/promises/at_once.rs::a_look_is_enough_for_what_is_only_stale`,
    /// `tests/promises/at_once.rs::what_one_call_had_checked_serves_the_next_however_late`)
    AfterIdle(Duration),
    /// Never, not even on suspicion.
    Never,
}

/// The limits of a pool: what the [`Builder`](crate::Builder) was told, checked and complete.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// See [`Builder::name`](crate::Builder::name).
    pub name: String,
    /// See [`Builder::max_size`](crate::Builder::max_size). As it was built: [`Pool::max_size`](crate::Pool::max_size)
    /// follows `resize`.
    pub max_size: u32,
    /// See [`Builder::min_idle`](crate::Builder::min_idle).
    pub min_idle: u32,
    /// See [`Builder::max_idle`](crate::Builder::max_idle).
    pub max_idle: Option<Duration>,
    /// See [`Builder::max_lifetime`](crate::Builder::max_lifetime).
    pub max_lifetime: Option<Duration>,
    /// See [`Builder::lifetime_jitter`](crate::Builder::lifetime_jitter).
    pub lifetime_jitter: f64,
    /// See [`Builder::connection_timeout`](crate::Builder::connection_timeout).
    pub connection_timeout: Duration,
    /// See [`Builder::validate`](crate::Builder::validate).
    pub validate: Validate,
    /// See [`Builder::validation_timeout`](crate::Builder::validation_timeout).
    pub validation_timeout: Duration,
    /// See [`Builder::open_timeout`](crate::Builder::open_timeout).
    pub open_timeout: Duration,
    /// See [`Builder::close_timeout`](crate::Builder::close_timeout).
    pub close_timeout: Duration,
    /// See [`Builder::parallel_opens`](crate::Builder::parallel_opens).
    pub parallel_opens: u32,
    /// See [`Builder::max_waiting`](crate::Builder::max_waiting).
    pub max_waiting: Option<u32>,
    /// See [`Builder::keepalive`](crate::Builder::keepalive).
    pub keepalive: Option<Duration>,
    /// See [`Builder::leak_threshold`](crate::Builder::leak_threshold).
    pub leak_threshold: Option<Duration>,
    /// See [`Builder::fair_after`](crate::Builder::fair_after).
    pub fair_after: Duration,
}

impl Settings {
    /// The default of every setting. (Not the trait `Default`: users make settings with a `Builder` only.)
    pub(crate) fn default() -> Settings {
        Settings {
            name: String::new(),
            max_size: 10,
            min_idle: 0,
            max_idle: Some(Duration::from_secs(10 * 60)),
            max_lifetime: Some(Duration::from_secs(30 * 60)),
            lifetime_jitter: 0.1,
            connection_timeout: Duration::from_secs(30),
            validate: Validate::AfterIdle(Duration::from_secs(1)),
            validation_timeout: Duration::from_secs(2),
            open_timeout: Duration::from_secs(10),
            close_timeout: Duration::from_secs(5),
            parallel_opens: 4,
            max_waiting: None,
            keepalive: None,
            leak_threshold: None,
            fair_after: Duration::from_micros(700),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.max_size == 0 {
            return Err(Error::config("max_size", "is 0, and must be at least 1"));
        }
        check_floor(self.min_idle, self.max_size)?;
        if self.min_idle > 0 && self.max_idle == Some(Duration::ZERO) {
            return Err(Error::config(
                "max_idle",
                format!("is zero, which keeps nothing idle, and min_idle is {}", self.min_idle),
            ));
        }
        if self.parallel_opens == 0 {
            return Err(Error::config("parallel_opens", "is 0, and must be at least 1"));
        }
        if self.parallel_opens > MOST_OPENS {
            let problem = format!("is {}, and must be at most {MOST_OPENS}", self.parallel_opens);
            return Err(Error::config("parallel_opens", problem));
        }
        if !(0.0..=1.0).contains(&self.lifetime_jitter) {
            let problem = format!("is {}, and must be between 0 and 1", self.lifetime_jitter);
            return Err(Error::config("lifetime_jitter", problem));
        }
        at_least(SHORTEST_PERIOD, "max_lifetime", self.max_lifetime)?;
        // However short this timeout is, the caller gets a connection that is ready.
        at_least(Duration::from_nanos(1), "connection_timeout", Some(self.connection_timeout))?;
        at_least(SHORTEST_LIMIT, "validation_timeout", Some(self.validation_timeout))?;
        at_least(SHORTEST_LIMIT, "open_timeout", Some(self.open_timeout))?;
        at_least(SHORTEST_LIMIT, "close_timeout", Some(self.close_timeout))?;
        at_least(SHORTEST_PERIOD, "keepalive", self.keepalive)?;
        at_least(SHORTEST_LIMIT, "leak_threshold", self.leak_threshold)
    }
}

fn at_least(shortest: Duration, setting: &'static str, duration: Option<Duration>) -> Result<(), Error> {
    match duration {
        Some(Duration::ZERO) => Err(Error::config(setting, "is zero, and must be longer")),
        Some(d) if d < shortest => {
            Err(Error::config(setting, format!("is {}, and must be at least {}", Short(d), Short(shortest))))
        }
        _ => Ok(()),
    }
}

/// Refuses a floor above `max_size`. `resize` asks as well.
pub(crate) fn check_floor(min_idle: u32, max_size: u32) -> Result<(), Error> {
    if min_idle > max_size {
        return Err(Error::config("min_idle", format!("is {min_idle}, and max_size is {max_size}")));
    }
    Ok(())
}
