//! How fast an endpoint is asked: how much at once, how much a minute, and whether at all.
//!
//! The window of requests in flight begins at what the run file allows, is halved when the server fails, is
//! overloaded or does not reply in time, and grows by one with each window of answers. It is halved once for what
//! was sent before the last halving, and not below a sixteenth of what is allowed: faults that have nothing to do
//! with load must not bring a collection to a stop. For the same reason a halving for 5xx is a trial: where half as
//! many requests fail as often as before, it is taken back, and so many failures are put up with from then on. One
//! reply in a hundred that fails by chance would else hold a window of 512 at about 12.

use std::time::{Duration, Instant};

use super::{Endpoint, Failure, FailureReason};

/// Refusals of key, path or model in a row that put an endpoint down before it has answered once.
const REFUSALS_BEFORE_AN_ANSWER: u32 = 8;

/// And after it has.
const REFUSALS_LATER: u32 = 40;

/// A halving stays where the share of requests that do not fail has grown by this factor.
const CURED: f64 = 1.25;

/// Where no larger share does not fail, halvings stay whatever they cure.
const BROKEN: f64 = 0.5;

/// A round has as many requests as the window, and at least so many.
const SMALLEST_ROUND: f64 = 8.0;

/// The window is not halved below this share of what is allowed.
const SMALLEST_SHARE: f64 = 1.0 / 16.0;

/// A bucket holds what comes in so many seconds.
const BURST_SECONDS: f64 = 1.0;

/// A server that wants to be left alone for longer than this is asked again after it.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// What a failure says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureClass {
    /// It wants to be asked less, or does not reply in time.
    Overload,
    /// It fails, which may have to do with load or not.
    Fault,
    /// It refuses key, path or model.
    Refused,
    /// There is no connection to it.
    Unreachable,
    /// It says nothing about the endpoint.
    None,
}

/// The sign that a failure is.
pub(super) fn failure_class(failure: &Failure) -> FailureClass {
    match failure.reason {
        FailureReason::RateLimited
        | FailureReason::RequestTimeout
        | FailureReason::FirstByteTimeout
        | FailureReason::IdleTimeout
        | FailureReason::TotalTimeout => FailureClass::Overload,
        FailureReason::ServerError | FailureReason::Overloaded => FailureClass::Fault,
        FailureReason::Connect => FailureClass::Unreachable,
        reason if reason.concerns_endpoint() => FailureClass::Refused,
        _ => FailureClass::None,
    }
}

/// So many a second on average, and no more at once than come in [`BURST_SECONDS`].
#[derive(Debug)]
struct RateBucket {
    per_second: f64,
    burst: f64,
    level: f64,
    at: Instant,
}

impl RateBucket {
    fn new(per_minute: f64, now: Instant) -> RateBucket {
        let per_second = per_minute / 60.0;
        let burst = (per_second * BURST_SECONDS).max(1.0);
        RateBucket {
            per_second,
            burst,
            level: burst,
            at: now,
        }
    }

    /// How long until `n` may be taken. More than a burst holds is waited for as a burst and leaves a debt.
    fn wait(&mut self, n: f64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + passed * self.per_second).min(self.burst);
        self.at = now;
        let missing = n.min(self.burst) - self.level;
        if missing <= 1e-9 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((missing / self.per_second).min(86_400.0))
    }
}

/// Requests that ended, and those of them that were faults of the server.
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

    fn share(self) -> f64 {
        f64::from(self.faults) / f64::from(self.ended.max(1))
    }
}

/// A halving whose use is not known yet.
#[derive(Debug, Clone, Copy)]
struct Trial {
    /// The window before it.
    window: f64,
    /// What was sent before it.
    before: RequestCounts,
}

/// One endpoint's pace.
#[derive(Debug)]
pub(super) struct Throttle {
    weight: f64,
    largest: f64,
    window: f64,
    in_flight: u32,
    sent: u64,
    halved: Instant,
    /// Of what was sent since the last halving, as much as has not been judged.
    round: RequestCounts,
    trial: Option<Trial>,
    /// The share of faults that halving does not cure.
    usual: f64,
    requests: Option<RateBucket>,
    tokens: Option<RateBucket>,
    paused_until: Instant,
    has_answered: bool,
    refusals: u32,
    unreachable: u32,
    unreachable_since: Instant,
    down: Option<Failure>,
}

/// Where the next request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndpointChoice {
    /// To this endpoint.
    Go(usize),
    /// Nowhere for now: until a request ends, or this long.
    Wait(Option<Duration>),
    /// Nowhere: all are down.
    Down,
}

impl Throttle {
    /// The pace that the run file allows.
    pub(super) fn new(endpoint: &Endpoint, now: Instant) -> Throttle {
        let largest = f64::from(endpoint.max_in_flight);
        Throttle {
            weight: endpoint.weight,
            largest,
            window: largest,
            in_flight: 0,
            sent: 0,
            halved: now,
            round: RequestCounts::default(),
            trial: None,
            usual: 0.0,
            requests: endpoint
                .requests_per_minute
                .map(|r| RateBucket::new(r, now)),
            tokens: endpoint.tokens_per_minute.map(|r| RateBucket::new(r, now)),
            paused_until: now,
            has_answered: false,
            refusals: 0,
            unreachable: 0,
            unreachable_since: now,
            down: None,
        }
    }

    /// Requests that it takes at once, as found so far; 0 once it is down.
    pub(super) fn limit(&self) -> u32 {
        if self.down.is_some() {
            0
        } else {
            self.window as u32
        }
    }

    /// Why it is down.
    pub(super) fn down(&self) -> Option<&Failure> {
        self.down.as_ref()
    }

    /// How long until it may be asked for so many tokens; `None` when only the end of a request can say.
    fn wait(&mut self, tokens: u64, now: Instant) -> Option<Duration> {
        if self.in_flight >= self.limit() {
            return None;
        }
        let mut wait = self.paused_until.saturating_duration_since(now);
        if let Some(bucket) = &mut self.requests {
            wait = wait.max(bucket.wait(1.0, now));
        }
        if let Some(bucket) = &mut self.tokens {
            wait = wait.max(bucket.wait(tokens as f64, now));
        }
        Some(wait)
    }

    /// A request for so many tokens is sent.
    pub(super) fn begin(&mut self, tokens: u64) {
        self.in_flight += 1;
        self.sent += 1;
        if let Some(bucket) = &mut self.requests {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.level -= tokens as f64;
        }
    }

    /// A request that was sent at `sent` is over. Failures to connect pause the endpoint for `pause(n)`, and put it
    /// down after `rounds` such pauses in a row.
    pub(super) fn end(
        &mut self,
        outcome: Result<(), &Failure>,
        sent: Instant,
        now: Instant,
        rounds: u32,
        pause: impl FnOnce(u32) -> Duration,
    ) {
        self.in_flight -= 1;
        let sign = outcome.map_or_else(sign, |()| FailureClass::None);
        let is_new = sent >= self.halved;
        if is_new {
            self.round.count(sign == FailureClass::Fault);
        } else if let Some(trial) = &mut self.trial {
            trial.before.count(sign == FailureClass::Fault);
        }
        match sign {
            FailureClass::Overload if is_new => self.halve(now, None),
            FailureClass::Fault if is_new && self.trial.is_none() && self.is_unusual() => {
                self.halve(now, Some(self.round));
            }
            _ if f64::from(self.round.ended) >= self.window.max(SMALLEST_ROUND) => self.judge(now),
            _ => {}
        }
        let Err(failure) = outcome else {
            self.window = (self.window + 1.0 / self.window).min(self.largest);
            self.has_answered = true;
            self.refusals = 0;
            self.unreachable = 0;
            return;
        };
        if let Some(seconds) = failure.retry_after_seconds {
            self.pause(now + retry_after_wait(seconds));
        }
        match sign {
            FailureClass::Refused => {
                self.refusals += 1;
                let most = if self.has_answered {
                    REFUSALS_LATER
                } else {
                    REFUSALS_BEFORE_AN_ANSWER
                };
                if self.refusals >= most || failure.reason == FailureReason::OutOfCredit {
                    self.down.get_or_insert_with(|| failure.clone());
                }
            }
            // What was sent before the last pause says nothing new.
            FailureClass::Unreachable if sent >= self.unreachable_since => {
                self.unreachable += 1;
                self.unreachable_since = now;
                if self.unreachable > rounds {
                    self.down.get_or_insert_with(|| failure.clone());
                }
                self.pause(now + pause(self.unreachable));
            }
            FailureClass::Overload
            | FailureClass::Fault
            | FailureClass::Unreachable
            | FailureClass::None => {}
        }
    }

    /// Halves the window: on trial where it is for the faults of a round.
    fn halve(&mut self, now: Instant, faults: Option<RequestCounts>) {
        self.trial = faults.map(|before| Trial {
            window: self.window,
            before,
        });
        self.window = (self.window / 2.0).max((self.largest * SMALLEST_SHARE).max(1.0));
        self.round = RequestCounts::default();
        self.halved = now;
    }

    /// Whether this round has more faults than chance makes of the usual share.
    fn is_unusual(&self) -> bool {
        let usual = self.usual * self.window.max(SMALLEST_ROUND);
        f64::from(self.round.faults) > usual + 2.0 * usual.sqrt()
    }

    /// At the end of a round: was the halving of use?
    fn judge(&mut self, now: Instant) {
        let round = std::mem::take(&mut self.round);
        let Some(trial) = self.trial.take() else {
            // It rises by a trial alone: following a window that grows, it would put up with anything.
            self.usual -= (self.usual - round.share()).max(0.0) / 8.0;
            return;
        };
        let good = 1.0 - round.share();
        if good > BROKEN && good < CURED * (1.0 - trial.before.share()) {
            self.usual = RequestCounts {
                ended: trial.before.ended + round.ended,
                faults: trial.before.faults + round.faults,
            }
            .share();
            self.window = self.window.max(trial.window);
        } else if round.faults > 0 {
            self.halve(now, Some(round));
        }
    }

    fn pause(&mut self, until: Instant) {
        self.paused_until = self.paused_until.max(until);
    }
}

/// The wait that a server asked for, within reason.
pub(super) fn retry_after_wait(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0))
        .unwrap_or(LONGEST_PAUSE)
        .min(LONGEST_PAUSE)
}

/// The endpoint that is least busy for its weight, of those that may be asked for so many tokens now. `avoid` is
/// taken only where there is no other.
pub(super) fn choose_endpoint(
    throttles: &mut [Throttle],
    tokens: u64,
    now: Instant,
    avoid: Option<usize>,
) -> EndpointChoice {
    let mut best: Option<(bool, f64, f64, usize)> = None;
    let mut soonest: Option<Duration> = None;
    let mut is_down = true;
    for (i, throttle) in throttles.iter_mut().enumerate() {
        if throttle.down.is_some() {
            continue;
        }
        is_down = false;
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
        None if is_down => EndpointChoice::AllDown,
        None => EndpointChoice::Wait(soonest),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};

    use super::*;

    fn endpoint(max_in_flight: u32) -> Endpoint {
        Endpoint {
            name: "a".into(),
            url: "http://127.0.0.1/v1".into(),
            key: None,
            weight: 1.0,
            requests_per_minute: None,
            tokens_per_minute: None,
            max_in_flight,
            allow_plain_http: false,
        }
    }

    fn fail(throttle: &mut Throttle, reason: FailureReason, sent: Instant, now: Instant) {
        throttle.begin(1);
        throttle.end(Err(&Failure::new(reason, "")), sent, now, 3, |_| {
            Duration::from_secs(1)
        });
    }

    #[test]
    fn trouble_halves_once_for_what_was_in_flight_and_answers_add_one_a_window() {
        let start = Instant::now();
        let mut throttle = Throttle::new(&endpoint(64), start);
        let later = start + Duration::from_secs(1);
        for _ in 0..10 {
            fail(&mut throttle, FailureReason::Overloaded, start, later);
        }
        assert_eq!(
            throttle.limit(),
            32,
            "all ten were sent before the first ended"
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

    /// The mean window over the second half of `rounds`, with all requests of a round sent and ended together;
    /// `fails(window, n)` says whether the n-th of a round does.
    fn mean_window(largest: u32, rounds: u64, mut fails: impl FnMut(u32, u32) -> bool) -> f64 {
        let start = Instant::now();
        let mut throttle = Throttle::new(&endpoint(largest), start);
        let mut sum = 0;
        for round in 0..rounds {
            let (sent, over) = (
                start + Duration::from_secs(2 * round),
                start + Duration::from_secs(2 * round + 1),
            );
            let window = throttle.limit();
            (0..window).for_each(|_| throttle.begin(1));
            for n in 0..window {
                let failure = Failure::new(FailureReason::ServerError, "");
                let outcome = if fails(window, n) {
                    Err(&failure)
                } else {
                    Ok(())
                };
                throttle.end(outcome, sent, over, 3, |_| Duration::ZERO);
            }
            if round >= rounds / 2 {
                sum += window;
            }
        }
        f64::from(sum) / (rounds - rounds / 2) as f64
    }

    #[test]
    fn faults_that_have_nothing_to_do_with_load_do_not_keep_the_window_small() {
        for per_thousand in [1, 10, 100, 300] {
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
            let mean = mean_window(512, 400, |_, _| rng.random_range(0..1000) < per_thousand);
            assert!(mean > 0.8 * 512.0, "{per_thousand} in a thousand: {mean}");
        }
    }

    #[test]
    fn faults_of_overload_do() {
        // It serves 40 at once and refuses the rest.
        let mean = mean_window(512, 400, |_, n| n >= 40);
        assert!((25.0..70.0).contains(&mean), "{mean}");
        // Above 100 at once nearly all fail.
        let mean = mean_window(512, 400, |window, n| window > 100 && n % 10 != 0);
        assert!((40.0..105.0).contains(&mean), "{mean}");
        let mean = mean_window(512, 400, |_, _| true);
        assert!(mean < 33.0, "it is down: {mean}");
    }

    #[test]
    fn refusals_in_a_row_put_it_down_and_an_answer_begins_anew() {
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
    fn an_endpoint_that_cannot_be_reached_is_paused_and_then_down() {
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
    fn rates_hold_over_a_minute_and_large_requests_leave_a_debt() {
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
    fn calls_are_shared_by_weight_and_a_paused_endpoint_is_left_alone() {
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
            "its window is full after the halving"
        );
        throttles[1].in_flight = 0;
        assert_eq!(
            choose_endpoint(&mut throttles, 1, now, None),
            EndpointChoice::Wait(Some(Duration::from_secs(7)))
        );
    }
}
