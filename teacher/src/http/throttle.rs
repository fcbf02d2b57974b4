//! Limits of one endpoint: requests in flight, requests and tokens a minute, and whether it is used at all.
//!
//! The concurrency limit follows AIMD. It begins at what the run file allows, is halved when the server fails, is
//! overloaded or does not reply in time, and grows by one with each limit's worth of answers. It is halved once for all
//! requests that were sent before the last halving, and not below a sixteenth of what is allowed: faults that have
//! nothing to do with load must not bring a collection to a stop. For the same reason a halving for 5xx is a trial. If
//! half the concurrency does not make requests fail less often, the halving is undone, and from then on that share of
//! failures is tolerated. Without this rule, one response in a hundred that fails by chance would keep a limit of 512
//! at about 12.

use std::time::{Duration, Instant};

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

/// Time whose worth of requests or tokens may be sent at once, seconds.
const BURST_SECONDS: f64 = 1.0;

/// Longest pause. A server that asks for a longer one is asked again after this time.
const MAX_PAUSE: Duration = Duration::from_secs(3600);

/// Class of a failure, by its meaning for the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureClass {
    /// The endpoint accepts fewer requests, or does not reply in time.
    Overload,
    /// The endpoint fails, with or without relation to load.
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
        FailureReason::RateLimited
        | FailureReason::RequestTimeout
        | FailureReason::FirstByteTimeout
        | FailureReason::IdleTimeout
        | FailureReason::TotalTimeout => FailureClass::Overload,
        FailureReason::ServerError | FailureReason::Overloaded => FailureClass::Fault,
        FailureReason::Connect => FailureClass::Unreachable,
        reason if reason.concerns_endpoint() => FailureClass::Refused,
        _ => FailureClass::Unrelated,
    }
}

/// A token bucket: a rate limit with bursts of [`BURST_SECONDS`].
#[derive(Debug)]
struct RateBucket {
    per_second: f64,
    burst: f64,
    level: f64,
    updated: Instant,
}

impl RateBucket {
    fn new(per_minute: f64, now: Instant) -> RateBucket {
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
    fn wait(&mut self, n: f64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.updated).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.burst);
        self.updated = now;
        let missing = n.min(self.burst) - self.level;
        if missing <= 1e-9 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((missing / self.per_second).min(86_400.0))
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

/// Limits and state of one endpoint.
#[derive(Debug)]
pub(super) struct Throttle {
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
        if let Some(bucket) = &mut self.request_rate {
            wait = wait.max(bucket.wait(1.0, now));
        }
        if let Some(bucket) = &mut self.token_rate {
            wait = wait.max(bucket.wait(tokens as f64, now));
        }
        Some(wait)
    }

    /// Notes that a request of `tokens` tokens is sent.
    pub(super) fn begin(&mut self, tokens: u64) {
        self.in_flight += 1;
        self.sent += 1;
        if let Some(bucket) = &mut self.request_rate {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.token_rate {
            bucket.level -= tokens as f64;
        }
    }

    /// Notes that a request that was sent at `sent` has ended. Failures to connect pause the endpoint for `pause(n)`,
    /// and take it out of use after `max_pauses` consecutive pauses.
    pub(super) fn end(
        &mut self,
        result: Result<(), &Failure>,
        sent: Instant,
        now: Instant,
        max_pauses: u32,
        pause: impl FnOnce(u32) -> Duration,
    ) {
        self.in_flight -= 1;
        let class = result.map_or_else(failure_class, |()| FailureClass::Unrelated);
        self.adjust_limit(class, sent, now);
        let Err(failure) = result else {
            self.limit = (self.limit + 1.0 / self.limit).min(self.max_limit);
            self.has_answered = true;
            self.refusals = 0;
            self.failed_connections = 0;
            return;
        };
        if let Some(seconds) = failure.retry_after_seconds {
            self.pause(now + retry_after_wait(seconds));
        }
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
            self.halve(now, Some(self.round));
        } else if f64::from(self.round.ended) >= self.limit.max(MIN_ROUND) {
            self.end_round(now);
        }
    }

    /// Halves the limit; on trial if that is for the faults of a round.
    fn halve(&mut self, now: Instant, faults: Option<RequestCounts>) {
        self.trial = faults.map(|before| HalvingTrial {
            limit: self.limit,
            before,
        });
        self.limit = (self.limit / 2.0).max((self.max_limit * MIN_LIMIT_SHARE).max(1.0));
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
        } else if round.faults > 0 {
            self.halve(now, Some(round));
        }
    }

    fn pause(&mut self, until: Instant) {
        self.paused_until = self.paused_until.max(until);
    }
}

/// The wait that a server asked for, from 0 to [`MAX_PAUSE`].
pub(super) fn retry_after_wait(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0))
        .unwrap_or(MAX_PAUSE)
        .min(MAX_PAUSE)
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
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn endpoint(max_in_flight: u32) -> Endpoint {
        Endpoint {
            max_in_flight: Some(max_in_flight),
            ..Endpoint::new("http://127.0.0.1/v1")
        }
    }

    fn fail(throttle: &mut Throttle, reason: FailureReason, sent: Instant, now: Instant) {
        throttle.begin(1);
        throttle.end(Err(&Failure::new(reason, "")), sent, now, 3, |_| {
            Duration::from_secs(1)
        });
    }

    #[test]
    fn the_limit_is_halved_once_for_all_in_flight_and_grows_by_one_a_limit_of_answers() {
        let start = Instant::now();
        let mut throttle = Throttle::new(&endpoint(64), start);
        let later = start + Duration::from_secs(1);
        for _ in 0..10 {
            fail(&mut throttle, FailureReason::Overloaded, start, later);
        }
        assert_eq!(
            throttle.limit(),
            32,
            "all ten were sent before the first halving"
        );
        fail(&mut throttle, FailureReason::RateLimited, later, later);
        assert_eq!(throttle.limit(), 16);
        for _ in 0..17 {
            throttle.begin(1);
            throttle.end(Ok(()), later, later, 3, |_| Duration::ZERO);
        }
        assert_eq!(throttle.limit(), 17);
        for n in 0..50 {
            let at = later + Duration::from_secs(n);
            fail(&mut throttle, FailureReason::IdleTimeout, at, at);
        }
        assert_eq!(throttle.limit(), 4);
    }

    /// Mean limit over the second half of `rounds`. All requests of a round are sent and end together;
    /// `fails(limit, n)` says whether the n-th of a round fails.
    fn mean_limit(largest: u32, rounds: u64, mut fails: impl FnMut(u32, u32) -> bool) -> f64 {
        let start = Instant::now();
        let mut throttle = Throttle::new(&endpoint(largest), start);
        let mut sum = 0;
        for round in 0..rounds {
            let (sent, ended) = (
                start + Duration::from_secs(2 * round),
                start + Duration::from_secs(2 * round + 1),
            );
            let limit = throttle.limit();
            (0..limit).for_each(|_| throttle.begin(1));
            for n in 0..limit {
                let failure = Failure::new(FailureReason::ServerError, "");
                let result = if fails(limit, n) {
                    Err(&failure)
                } else {
                    Ok(())
                };
                throttle.end(result, sent, ended, 3, |_| Duration::ZERO);
            }
            if round >= rounds / 2 {
                sum += limit;
            }
        }
        f64::from(sum) / (rounds - rounds / 2) as f64
    }

    #[test]
    fn faults_unrelated_to_load_do_not_keep_the_limit_low() {
        for per_thousand in [1, 10, 100, 300] {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
            let mean = mean_limit(512, 400, |_, _| rng.random_range(0..1000) < per_thousand);
            assert!(mean > 0.8 * 512.0, "{per_thousand} in a thousand: {mean}");
        }
    }

    #[test]
    fn faults_of_overload_keep_the_limit_low() {
        // The server answers 40 requests at once and refuses the rest.
        let mean = mean_limit(512, 400, |_, n| n >= 40);
        assert!((25.0..70.0).contains(&mean), "{mean}");
        // Nearly all requests fail above 100 at once.
        let mean = mean_limit(512, 400, |limit, n| limit > 100 && n % 10 != 0);
        assert!((40.0..105.0).contains(&mean), "{mean}");
        let mean = mean_limit(512, 400, |_, _| true);
        assert!(mean < 33.0, "every request fails: {mean}");
    }

    #[test]
    fn consecutive_refusals_take_an_endpoint_out_of_use_and_an_answer_resets_their_count() {
        let now = Instant::now();
        let mut throttle = Throttle::new(&endpoint(64), now);
        for _ in 0..7 {
            fail(&mut throttle, FailureReason::Unauthorized, now, now);
        }
        throttle.begin(1);
        throttle.end(Ok(()), now, now, 3, |_| Duration::ZERO);
        for _ in 0..39 {
            fail(&mut throttle, FailureReason::NotFound, now, now);
        }
        assert!(throttle.down().is_none());
        fail(&mut throttle, FailureReason::NotFound, now, now);
        assert_eq!(
            throttle.down().map(|f| f.reason),
            Some(FailureReason::NotFound)
        );

        let mut throttle = Throttle::new(&endpoint(64), now);
        fail(&mut throttle, FailureReason::OutOfCredit, now, now);
        assert_eq!(
            choose_endpoint(&mut [throttle], 1, now, None),
            EndpointChoice::AllDown
        );
    }

    #[test]
    fn an_unreachable_endpoint_is_paused_and_then_out_of_use() {
        let mut now = Instant::now();
        let mut throttle = Throttle::new(&endpoint(64), now);
        for round in 1..=4 {
            for _ in 0..20 {
                fail(
                    &mut throttle,
                    FailureReason::Connect,
                    now,
                    now + Duration::from_millis(1),
                );
            }
            now += Duration::from_secs(2);
            assert_eq!(throttle.down().is_some(), round == 4, "round {round}");
        }
    }

    #[test]
    fn rate_limits_hold_over_a_minute_and_large_requests_leave_a_debt() {
        let mut now = Instant::now();
        let end = now + Duration::from_secs(60);
        let mut throttles = [Throttle::new(
            &Endpoint {
                requests_per_minute: Some(120.0),
                tokens_per_minute: Some(60_000.0),
                ..endpoint(1000)
            },
            now,
        )];
        let mut sent = 0;
        while now < end {
            match choose_endpoint(&mut throttles, 1000, now, None) {
                EndpointChoice::Use(_) => {
                    throttles[0].begin(1000);
                    sent += 1;
                }
                EndpointChoice::Wait(Some(wait)) => now += wait.max(Duration::from_micros(1)),
                other => panic!("{other:?}"),
            }
        }
        assert!((59..=61).contains(&sent), "1000 tokens a second: {sent}");
    }

    #[test]
    fn calls_are_shared_by_weight_and_a_paused_endpoint_gets_none() {
        let now = Instant::now();
        let mut throttles = [
            Throttle::new(&endpoint(400), now),
            Throttle::new(
                &Endpoint {
                    weight: 3.0,
                    ..endpoint(400)
                },
                now,
            ),
        ];
        for _ in 0..400 {
            let EndpointChoice::Use(i) = choose_endpoint(&mut throttles, 1, now, None) else {
                panic!("room")
            };
            throttles[i].begin(1);
        }
        assert_eq!(throttles[0].in_flight, 100);
        let mut failure = Failure::new(FailureReason::RateLimited, "");
        failure.retry_after_seconds = Some(7.0);
        throttles[1].end(Err(&failure), now, now, 3, |_| Duration::ZERO);
        assert_eq!(
            choose_endpoint(&mut throttles, 1, now, None),
            EndpointChoice::Use(0)
        );
        throttles[0].down = Some(failure);
        assert_eq!(
            choose_endpoint(&mut throttles, 1, now, None),
            EndpointChoice::Wait(None),
            "the concurrency limit is reached after the halving"
        );
        throttles[1].in_flight = 0;
        assert_eq!(
            choose_endpoint(&mut throttles, 1, now, None),
            EndpointChoice::Wait(Some(Duration::from_secs(7)))
        );
    }
}
