//! Limits of one endpoint: requests in flight, requests and tokens a minute, and whether it is used at all.
//!
//! The concurrency limit begins at what the run file allows, and grows by one with each limit's worth of answers. What a
//! server says about its limits (`Retry-After`, the headers of its rate limits) is followed. Beyond that, the throttle has
//! to tell a limit from noise, which are refusals and faults that have nothing to do with load:
//!
//! - A server that does not reply in time is overloaded, and the limit is halved.
//! - When more requests are refused or fail than the tolerated share gives by chance, the limit is halved on trial. If half
//!   the concurrency does not make requests fail less often, the halving is undone, and from then on that share is
//!   tolerated. Without this rule, one response in a hundred that fails by chance would keep a limit of 512 at about 12.
//! - A halving that helped has found a ceiling. When requests fail near a known ceiling again, the limit goes down by a
//!   small step, without a trial.
//!
//! The limit is lowered once for all requests that were sent before, and not below a sixteenth of what is allowed.
//!
//! A server accepts connections at its own pace, and a connection that does not fit into its queue is tried again by the
//! operating system after 1 s, 3 s and 7 s. So the number of requests in flight begins at a few, and grows with each
//! answer, or slowly with time ([`Opening`]).

mod rate_bucket;

use std::time::{Duration, Instant};

use self::rate_bucket::RateBucket;

use super::wire::RateState;
use super::{Endpoint, Failure, FailureReason};

/// Consecutive refusals of key, path or model that take an endpoint out of use before its first answer.
const MAX_REFUSALS_BEFORE_ANSWER: u32 = 8;

/// Consecutive refusals of key, path or model that take an endpoint out of use after its first answer.
const MAX_REFUSALS: u32 = 40;

/// Factor by which the share of successful requests has to grow for a halving to be kept.
const CURE_FACTOR: f64 = 1.25;

/// Share of successful requests up to which halvings are kept in any case.
const BROKEN_SHARE: f64 = 0.5;

/// Smallest number of requests in a round. A round has as many requests as the concurrency limit.
const MIN_ROUND: f64 = 8.0;

/// Smallest concurrency limit, as a share of what is allowed.
const MIN_LIMIT_SHARE: f64 = 1.0 / 16.0;

/// Factor by which the limit goes down near a known ceiling.
const CEILING_STEP: f64 = 0.85;

/// Range around a known ceiling in which it is believed, as shares of it.
const NEAR_CEILING: std::ops::RangeInclusive<f64> = 0.8..=1.3;

/// Number of steps after which a ceiling is found anew.
const CEILING_STEPS: u32 = 16;

/// Requests in flight to a server from which no answer has come.
const FIRST_REQUESTS: f64 = 4.0;

/// Time without a new answer after which more requests are sent to a server, though its answers take long.
const OPENING_INTERVAL: Duration = Duration::from_millis(100);

/// Time without a request after which the connections to a server are taken as closed.
const CONNECTION_IDLE: Duration = Duration::from_secs(3);

/// Class of a failure, by its meaning for the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureClass {
    /// The endpoint does not reply in time.
    Overload,
    /// The endpoint fails or refuses a request, with or without relation to load.
    Fault,
    /// The endpoint refuses key, path or model.
    Refused,
    /// There is no connection to the endpoint.
    Unreachable,
    /// The failure has nothing to do with the endpoint.
    Unrelated,
}

fn failure_class(failure: &Failure) -> FailureClass {
    match failure.reason {
        FailureReason::RequestTimeout
        | FailureReason::FirstByteTimeout
        | FailureReason::IdleTimeout
        | FailureReason::TotalTimeout => FailureClass::Overload,
        FailureReason::RateLimited | FailureReason::ServerError | FailureReason::Overloaded => {
            FailureClass::Fault
        }
        FailureReason::Connect => FailureClass::Unreachable,
        reason if reason.concerns_endpoint() => FailureClass::Refused,
        _ => FailureClass::Unrelated,
    }
}

/// Numbers of requests that ended, and of those that ended in a fault of the server.
#[derive(Debug, Clone, Copy, Default)]
struct RequestCounts {
    ended: u32,
    faults: u32,
}

impl RequestCounts {
    fn count(&mut self, is_fault: bool) {
        self.ended += 1;
        self.faults += u32::from(is_fault);
    }

    fn fault_share(self) -> f64 {
        f64::from(self.faults) / f64::from(self.ended.max(1))
    }
}

/// A halving of which it is not known yet whether it helps.
#[derive(Debug, Clone, Copy)]
struct HalvingTrial {
    /// Concurrency limit before the halving.
    limit: f64,
    /// Requests that were sent before the halving.
    before: RequestCounts,
}

/// A concurrency limit at which requests failed, and below which they did not.
#[derive(Debug, Clone, Copy)]
struct Ceiling {
    limit: f64,
    /// Number of steps down that were made because of it.
    steps: u32,
}

/// Growth of the number of requests in flight to a server, so that connections are not opened faster than the server
/// accepts them.
#[derive(Debug)]
struct Opening {
    limit: f64,
    grown: Instant,
    used: Instant,
}

impl Opening {
    fn new(now: Instant) -> Opening {
        Opening {
            limit: FIRST_REQUESTS,
            grown: now,
            used: now,
        }
    }

    /// Time until one more request may be sent beside `in_flight` others.
    fn wait(&mut self, in_flight: u32, now: Instant) -> Duration {
        if in_flight == 0 && now.saturating_duration_since(self.used) > CONNECTION_IDLE {
            *self = Opening::new(now);
        }
        if f64::from(in_flight) < self.limit.floor() {
            return Duration::ZERO;
        }
        let next = self.grown + OPENING_INTERVAL;
        if now >= next {
            self.limit += (self.limit / 8.0).max(1.0);
            self.grown = now;
            return Duration::ZERO;
        }
        next - now
    }

    /// Notes that the server has answered.
    fn answered(&mut self, largest: f64, now: Instant) {
        self.limit = (self.limit + 1.0).min(largest.max(FIRST_REQUESTS));
        self.grown = now;
    }
}

/// Requests that a server still accepts, by its own account.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    requests: u64,
    until: Instant,
}

/// The end of a request.
pub(super) struct RequestEnd<'a> {
    pub(super) result: Result<(), &'a Failure>,
    /// The state of the rate limits, as the server reports it.
    pub(super) rates: RateState,
    /// Time of sending.
    pub(super) sent: Instant,
    pub(super) now: Instant,
}

/// Limits and state of one endpoint.
#[derive(Debug)]
pub(super) struct Throttle {
    longest_wait: Duration,
    opening: Opening,
    ceiling: Option<Ceiling>,
    allowance: Option<Allowance>,
    /// End of the pause that the server asks for.
    server_pause: Instant,
    weight: f64,
    /// Concurrency limit of the run file.
    max_limit: f64,
    /// Present concurrency limit.
    limit: f64,
    in_flight: u32,
    sent: u64,
    halved: Instant,
    /// Requests of the present round: those sent since the last halving and ended since the last round.
    round: RequestCounts,
    trial: Option<HalvingTrial>,
    /// Share of faults that halving does not cure.
    tolerated_faults: f64,
    request_rate: Option<RateBucket>,
    token_rate: Option<RateBucket>,
    paused_until: Instant,
    has_answered: bool,
    refusals: u32,
    failed_connections: u32,
    last_failed_connection: Instant,
    down: Option<Failure>,
}

/// Endpoint of the next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndpointChoice {
    /// Send the request to the endpoint of this index.
    Use(usize),
    /// No endpoint accepts the request now: wait for this time, or for the end of a request.
    Wait(Option<Duration>),
    /// No endpoint is available: all have failed.
    AllDown,
}

impl Throttle {
    pub(super) fn new(endpoint: &Endpoint, now: Instant) -> Throttle {
        let max_limit = f64::from(endpoint.in_flight_limit());
        let bucket = |rate: Option<f64>| rate.map(|rate| RateBucket::new(rate, now));
        Throttle {
            longest_wait: endpoint.longest_wait(),
            opening: Opening::new(now),
            ceiling: None,
            allowance: None,
            server_pause: now,
            weight: endpoint.weight,
            max_limit,
            limit: max_limit,
            in_flight: 0,
            sent: 0,
            halved: now,
            round: RequestCounts::default(),
            trial: None,
            tolerated_faults: 0.0,
            request_rate: bucket(endpoint.requests_per_minute),
            token_rate: bucket(endpoint.tokens_per_minute),
            paused_until: now,
            has_answered: false,
            refusals: 0,
            failed_connections: 0,
            last_failed_connection: now,
            down: None,
        }
    }

    /// The present concurrency limit; 0 once the endpoint is out of use.
    pub(super) fn limit(&self) -> u32 {
        if self.down.is_some() {
            0
        } else {
            self.limit as u32
        }
    }

    /// The failure that took the endpoint out of use.
    pub(super) fn down(&self) -> Option<&Failure> {
        self.down.as_ref()
    }

    /// Time until a request of `tokens` tokens may be sent; `None` if it has to wait for the end of another request.
    fn wait(&mut self, tokens: u64, now: Instant) -> Option<Duration> {
        if self.in_flight >= self.limit() {
            return None;
        }
        let mut wait = self.paused_until.saturating_duration_since(now);
        wait = wait.max(self.opening.wait(self.in_flight, now));
        self.allowance = self.allowance.filter(|allowance| allowance.until > now);
        if let Some(Allowance { requests: 0, until }) = self.allowance {
            wait = wait.max(until - now);
        }
        if let Some(bucket) = &mut self.request_rate {
            wait = wait.max(bucket.wait(1.0, now));
        }
        if let Some(bucket) = &mut self.token_rate {
            wait = wait.max(bucket.wait(tokens as f64, now));
        }
        Some(wait)
    }

    /// Notes that a request of `tokens` tokens is sent.
    pub(super) fn begin(&mut self, tokens: u64, now: Instant) {
        self.in_flight += 1;
        self.opening.used = now;
        if let Some(allowance) = &mut self.allowance {
            allowance.requests = allowance.requests.saturating_sub(1);
        }
        self.sent += 1;
        if let Some(bucket) = &mut self.request_rate {
            bucket.take(1.0);
        }
        if let Some(bucket) = &mut self.token_rate {
            bucket.take(tokens as f64);
        }
    }

    /// Longest wait that the server may ask for.
    pub(super) fn longest_wait(&self) -> Duration {
        self.longest_wait
    }

    /// Notes the end of a request. Failures to connect pause the endpoint for `pause(n)`, and take it out of use after
    /// `max_pauses` consecutive pauses.
    pub(super) fn end(
        &mut self,
        end: RequestEnd<'_>,
        max_pauses: u32,
        pause: impl FnOnce(u32) -> Duration,
    ) {
        let RequestEnd {
            result,
            rates,
            sent,
            now,
        } = end;
        self.in_flight -= 1;
        self.opening.used = now;
        if result.is_ok() || result.is_err_and(|failure| failure.status.is_some()) {
            self.opening.answered(self.max_limit, now);
        }
        let class = result.map_or_else(failure_class, |()| FailureClass::Unrelated);
        self.adjust_limit(class, sent, now);
        self.follow_rates(result.err(), rates, now);
        let Err(failure) = result else {
            self.limit = (self.limit + 1.0 / self.limit).min(self.max_limit);
            self.has_answered = true;
            self.refusals = 0;
            self.failed_connections = 0;
            return;
        };
        match class {
            FailureClass::Refused => {
                self.refusals += 1;
                let most = if self.has_answered {
                    MAX_REFUSALS
                } else {
                    MAX_REFUSALS_BEFORE_ANSWER
                };
                if self.refusals >= most || failure.reason == FailureReason::OutOfCredit {
                    self.down.get_or_insert_with(|| failure.clone());
                }
            }
            // Requests that were sent before the last pause tell nothing new.
            FailureClass::Unreachable if sent >= self.last_failed_connection => {
                self.failed_connections += 1;
                self.last_failed_connection = now;
                if self.failed_connections > max_pauses {
                    self.down.get_or_insert_with(|| failure.clone());
                }
                self.pause(now + pause(self.failed_connections));
            }
            FailureClass::Overload
            | FailureClass::Fault
            | FailureClass::Unreachable
            | FailureClass::Unrelated => {}
        }
    }

    /// Counts a request that has ended, and halves the limit or ends the round if that is due.
    fn adjust_limit(&mut self, class: FailureClass, sent: Instant, now: Instant) {
        let is_fault = class == FailureClass::Fault;
        let is_new = sent >= self.halved;
        if is_new {
            self.round.count(is_fault);
        } else if let Some(trial) = &mut self.trial {
            trial.before.count(is_fault);
        }
        if class == FailureClass::Overload && is_new {
            self.halve(now, None);
        } else if is_fault && is_new && self.trial.is_none() && self.has_unusual_faults() {
            match self.near_ceiling() {
                Some(steps) => self.step_down(steps, now),
                None => self.halve(now, Some(self.round)),
            }
        } else if f64::from(self.round.ended) >= self.limit.max(MIN_ROUND) {
            self.end_round(now);
        }
    }

    /// Follows what the server says about its limits. A wait above the longest allowed takes the endpoint out of use.
    fn follow_rates(&mut self, failure: Option<&Failure>, rates: RateState, now: Instant) {
        let asked = failure.and_then(|failure| failure.retry_after_seconds);
        // A limit with nothing left is the cause of a refusal.
        let is_limited = failure.is_some_and(|f| f.reason == FailureReason::RateLimited);
        let reset = rates
            .reset_seconds
            .filter(|_| rates.remaining_requests == Some(0));
        let wait = asked.or(rates.retry_after_seconds.filter(|_| is_limited));
        let wait = wait.or(reset.filter(|_| is_limited));
        if let (Some(seconds), Some(failure)) = (wait, failure) {
            match Duration::try_from_secs_f64(seconds) {
                Ok(wait) if wait <= self.longest_wait => {
                    self.server_pause = self.server_pause.max(now + wait);
                    self.pause(now + wait);
                }
                _ => {
                    let down = refused_wait(failure, seconds, self.longest_wait);
                    self.down.get_or_insert(down);
                }
            }
        }
        let (Some(requests), Some(seconds)) = (rates.remaining_requests, rates.reset_seconds)
        else {
            return;
        };
        // A longer one is followed when the server refuses a request.
        if let Ok(reset) = Duration::try_from_secs_f64(seconds)
            && reset <= self.longest_wait
        {
            let until = now + reset;
            self.allowance = Some(Allowance { requests, until });
        }
    }

    /// Number of steps made at the known ceiling, if the limit is near it.
    fn near_ceiling(&self) -> Option<u32> {
        let ceiling = self.ceiling?;
        let is_near = NEAR_CEILING.contains(&(self.limit / ceiling.limit));
        (is_near && ceiling.steps < CEILING_STEPS).then_some(ceiling.steps)
    }

    /// Lowers the limit a little below the known ceiling.
    fn step_down(&mut self, steps: u32, now: Instant) {
        self.ceiling = Some(Ceiling {
            limit: self.limit,
            steps: steps + 1,
        });
        self.limit = (self.limit * CEILING_STEP).max(self.smallest_limit());
        self.round = RequestCounts::default();
        self.halved = now;
    }

    fn smallest_limit(&self) -> f64 {
        (self.max_limit * MIN_LIMIT_SHARE).max(1.0)
    }

    /// Halves the limit; on trial if that is for the faults of a round.
    fn halve(&mut self, now: Instant, faults: Option<RequestCounts>) {
        self.trial = faults.map(|before| HalvingTrial {
            limit: self.limit,
            before,
        });
        self.limit = (self.limit / 2.0).max(self.smallest_limit());
        self.round = RequestCounts::default();
        self.halved = now;
    }

    /// Whether this round has more faults than the tolerated share gives by chance (two standard deviations of a
    /// Poisson count).
    fn has_unusual_faults(&self) -> bool {
        let expected = self.tolerated_faults * self.limit.max(MIN_ROUND);
        f64::from(self.round.faults) > expected + 2.0 * expected.sqrt()
    }

    /// Ends a round, and with it a trial: the halving is kept if it helped, and undone otherwise.
    fn end_round(&mut self, now: Instant) {
        let round = std::mem::take(&mut self.round);
        let Some(trial) = self.trial.take() else {
            // The share rises through trials alone. If it followed a growing limit, it would tolerate any failures.
            self.tolerated_faults -= (self.tolerated_faults - round.fault_share()).max(0.0) / 8.0;
            return;
        };
        let success = 1.0 - round.fault_share();
        if success > BROKEN_SHARE && success < CURE_FACTOR * (1.0 - trial.before.fault_share()) {
            let both = RequestCounts {
                ended: trial.before.ended + round.ended,
                faults: trial.before.faults + round.faults,
            };
            self.tolerated_faults = both.fault_share();
            self.limit = self.limit.max(trial.limit);
            return;
        }
        self.ceiling = Some(Ceiling {
            limit: trial.limit,
            steps: 0,
        });
        if f64::from(round.faults) > 0.0 && round.fault_share() > self.tolerated_faults {
            self.halve(now, Some(round));
        }
    }

    fn pause(&mut self, until: Instant) {
        self.paused_until = self.paused_until.max(until);
    }
}

/// The failure of a request after which the server asks for a wait that is longer than allowed.
fn refused_wait(failure: &Failure, seconds: f64, longest: Duration) -> Failure {
    Failure {
        message: format!(
            "the server asks to wait {seconds} s, and `longest_wait` of [teacher] is {} s{}{}",
            longest.as_secs_f64(),
            if failure.message.is_empty() { "" } else { "; " },
            failure.message
        ),
        ..failure.clone()
    }
}

/// Time until the first endpoint may be asked again, seconds, if the servers of all that are in use ask for a wait.
pub(super) fn server_wait_seconds(throttles: &[Throttle], now: Instant) -> Option<f64> {
    let used = throttles.iter().filter(|throttle| throttle.down.is_none());
    let waits = used.map(|throttle| {
        let allowance = throttle
            .allowance
            .filter(|allowance| allowance.requests == 0);
        let until = allowance.map_or(throttle.server_pause, |a| {
            a.until.max(throttle.server_pause)
        });
        until.saturating_duration_since(now)
    });
    let wait = waits.min().unwrap_or_default();
    (!wait.is_zero()).then_some(wait.as_secs_f64())
}

/// Chooses the endpoint that has the fewest requests in flight for its weight, among those that accept a request of
/// `tokens` tokens now. The endpoint `avoid` is chosen only if there is no other.
pub(super) fn choose_endpoint(
    throttles: &mut [Throttle],
    tokens: u64,
    now: Instant,
    avoid: Option<usize>,
) -> EndpointChoice {
    let mut best: Option<(bool, f64, f64, usize)> = None;
    let mut soonest: Option<Duration> = None;
    let mut all_down = true;
    for (i, throttle) in throttles.iter_mut().enumerate() {
        if throttle.down.is_some() {
            continue;
        }
        all_down = false;
        match throttle.wait(tokens, now) {
            Some(wait) if wait.is_zero() => {
                let rank = (
                    avoid == Some(i),
                    f64::from(throttle.in_flight + 1) / throttle.weight,
                    throttle.sent as f64 / throttle.weight,
                    i,
                );
                if best.is_none_or(|b| rank < b) {
                    best = Some(rank);
                }
            }
            Some(wait) => soonest = Some(soonest.map_or(wait, |s| s.min(wait))),
            None => {}
        }
    }
    match best {
        Some((_, _, _, i)) => EndpointChoice::Use(i),
        None if all_down => EndpointChoice::AllDown,
        None => EndpointChoice::Wait(soonest),
    }
}

#[cfg(test)]
mod tests;
