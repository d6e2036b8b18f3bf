//! [`Rules`]: the settings as the ledger asks for them, which is at every checkout and return.

use std::ops::Deref;
use std::time::Duration;

use crate::leaf::clock::nanos;
use crate::settings::{Settings, Validate};

/// The [`Settings`] as they are now, with spans of time in nanoseconds, as the clock counts them: to convert them takes
/// longer than to compare. The spans are made of the settings, which only the methods here change.
pub(super) struct Rules {
    settings: Settings,
    resolution: u64,
    max_idle: u64,
    check_after: u64,
}

impl Rules {
    /// `resolution`: how far behind the true time a `now` may be.
    pub(super) fn new(settings: Settings, resolution: Duration) -> Rules {
        let validate = match settings.validate {
            Validate::AfterIdle(Duration::ZERO) => Validate::Always,
            validate => validate,
        };
        Rules {
            resolution: nanos(resolution),
            // For ever is what is added to a moment and makes it `NEVER`.
            max_idle: settings.max_idle.map_or(u64::MAX, nanos),
            check_after: match validate {
                Validate::Never => u64::MAX,
                Validate::Always => 0,
                Validate::AfterIdle(limit) => nanos(limit),
            },
            settings: Settings { validate, ..settings },
        }
    }

    pub(super) fn set_max_size(&mut self, max_size: u32) {
        self.settings.max_size = max_size;
    }

    pub(super) fn set_min_idle(&mut self, min_idle: u32) {
        self.settings.min_idle = min_idle;
    }

    /// How far behind the true time a `now` may be. Every test of age adds it, so that no connection is handed out late.
    #[inline]
    pub(super) fn resolution(&self) -> u64 {
        self.resolution
    }

    /// [`Settings::max_idle`]; without one, for ever.
    #[inline]
    pub(super) fn max_idle(&self) -> u64 {
        self.max_idle
    }

    /// For how long a connection that was used or found well is handed out without a check.
    #[inline]
    pub(super) fn check_after(&self) -> u64 {
        self.check_after
    }

    /// Changes what no pool changes.
    #[cfg(test)]
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings.clone();
        change(&mut settings);
        *self = Rules { resolution: self.resolution, ..Rules::new(settings, Duration::ZERO) };
    }
}

impl Deref for Rules {
    type Target = Settings;

    #[inline]
    fn deref(&self) -> &Settings {
        &self.settings
    }
}
