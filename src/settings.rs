//! [`Settings`]: the limits of a pool, and which of them cannot be.

use crate::error::Error;
use crate::leaf::text::Short;
use crate::ledger::{Rules, Validate};
use std::time::Duration;

/// The shortest that the limit of a call may be, and a checkout that is called a leak. Anything shorter would fail every
/// call before it could be made, or warn of every checkout: a wake-up of a thread alone takes some 50 us.
const SHORTEST_LIMIT: Duration = Duration::from_millis(1);
/// The shortest period of what the pool does over and over by itself. Anything shorter would do nothing else.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);
/// The most connections that are opened at the same time: each has a thread, and a process that has no thread left for
/// others ends. Far more than a server lets in at once.
const MOST_OPENS: u32 = 1024;

/// The limits of a pool: what the [`Builder`](crate::Builder) was told, checked and complete.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// See [`Builder::name`](crate::Builder::name).
    pub name: String,
    /// See [`Builder::max_size`](crate::Builder::max_size). As it was built: [`Pool::max_size`](crate::Pool::max_size) follows `resize`.
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
    pub(crate) fn rules(&self, resolution: Duration) -> Rules {
        Rules {
            max_size: self.max_size,
            // The floor is laid once the first connection is known to work.
            min_idle: 0,
            max_idle: self.max_idle,
            max_lifetime: self.max_lifetime,
            lifetime_jitter: self.lifetime_jitter,
            validate: match self.validate {
                Validate::AfterIdle(Duration::ZERO) => Validate::Always,
                validate => validate,
            },
            validation_timeout: self.validation_timeout,
            open_timeout: self.open_timeout,
            close_timeout: self.close_timeout,
            parallel_opens: self.parallel_opens,
            max_waiting: self.max_waiting,
            keepalive: self.keepalive,
            leak_threshold: self.leak_threshold,
            fair_after: self.fair_after,
            resolution,
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
        // However short, it gets what is ready.
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

/// The one place for this rule, which `resize` keeps as well.
pub(crate) fn check_floor(min_idle: u32, max_size: u32) -> Result<(), Error> {
    if min_idle > max_size {
        return Err(Error::config("min_idle", format!("is {min_idle}, and max_size is {max_size}")));
    }
    Ok(())
}
