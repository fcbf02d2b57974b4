//! The rate limit of an endpoint.

use std::time::{Duration, Instant};

/// Time whose worth of requests or tokens may be sent at once, seconds.
const BURST_SECONDS: f64 = 1.0;

/// A token bucket: a rate limit with bursts of [`BURST_SECONDS`].
#[derive(Debug)]
pub(super) struct RateBucket {
    per_second: f64,
    burst: f64,
    level: f64,
    updated: Instant,
}

impl RateBucket {
    pub(super) fn new(per_minute: f64, now: Instant) -> RateBucket {
        let per_second = per_minute / 60.0;
        let burst = (per_second * BURST_SECONDS).max(1.0);
        RateBucket {
            per_second,
            burst,
            level: burst,
            updated: now,
        }
    }

    /// Time until `n` may be taken. An amount larger than a burst waits for a full burst, and leaves a debt.
    pub(super) fn wait(&mut self, n: f64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.updated).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.burst);
        self.updated = now;
        let missing = n.min(self.burst) - self.level;
        if missing <= 1e-9 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((missing / self.per_second).min(86_400.0))
    }
    /// Takes `n` from the bucket, which may leave a debt.
    pub(super) fn take(&mut self, n: f64) {
        self.level -= n;
    }
}
