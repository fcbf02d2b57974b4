use rand::{Rng, SeedableRng};

use super::*;

fn endpoint(max_in_flight: u32) -> Endpoint {
    Endpoint {
        max_in_flight: Some(max_in_flight),
        ..Endpoint::new("http://127.0.0.1/v1")
    }
}

fn fail(throttle: &mut Throttle, reason: FailureReason, sent: Instant, now: Instant) {
    end(throttle, Err(&Failure::new(reason, "")), sent, now);
}

fn end(throttle: &mut Throttle, result: Result<(), &Failure>, sent: Instant, now: Instant) {
    throttle.begin(1, now);
    throttle.end(ended(result, sent, now), 3, |_| Duration::from_secs(1));
}

fn ended(result: Result<(), &Failure>, sent: Instant, now: Instant) -> RequestEnd<'_> {
    RequestEnd {
        result,
        rates: RateState::default(),
        sent,
        now,
    }
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
    fail(&mut throttle, FailureReason::IdleTimeout, later, later);
    assert_eq!(throttle.limit(), 16);
    for _ in 0..17 {
        end(&mut throttle, Ok(()), later, later);
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
        let (sent, now) = (
            start + Duration::from_secs(2 * round),
            start + Duration::from_secs(2 * round + 1),
        );
        let limit = throttle.limit();
        (0..limit).for_each(|_| throttle.begin(1, sent));
        for n in 0..limit {
            let failure = Failure::new(FailureReason::ServerError, "");
            let result = if fails(limit, n) {
                Err(&failure)
            } else {
                Ok(())
            };
            throttle.end(super::tests::ended(result, sent, now), 3, |_| {
                Duration::ZERO
            });
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
    end(&mut throttle, Ok(()), now, now);
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
                throttles[0].begin(1000, now);
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
    for throttle in &mut throttles {
        throttle.opening.limit = 400.0;
    }
    for _ in 0..400 {
        let EndpointChoice::Use(i) = choose_endpoint(&mut throttles, 1, now, None) else {
            panic!("room")
        };
        throttles[i].begin(1, now);
    }
    assert_eq!(throttles[0].in_flight, 100);
    let mut failure = Failure::new(FailureReason::RateLimited, "");
    failure.retry_after_seconds = Some(7.0);
    throttles[1].end(ended(Err(&failure), now, now), 3, |_| Duration::ZERO);
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

/// Results of a simulated collection: answers a second and mean number of requests in flight over the second half.
struct Simulated {
    per_second: f64,
    in_flight: f64,
    refused: f64,
}

/// Simulates a collection of `seconds` in virtual time. `serve(now, in_flight, rng)` is the server: whether it accepts
/// the request that arrives beside others that it works at, and how long its reply takes.
fn simulate(
    seconds: u64,
    mut serve: impl FnMut(f64, u32, &mut rand_chacha::ChaCha8Rng) -> (bool, f64),
) -> Simulated {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(9);
    let start = Instant::now();
    let mut throttles = [Throttle::new(&endpoint(64), start)];
    // Requests in flight: time of their end, time of sending, whether they were accepted.
    let mut running: Vec<(Duration, Duration, bool)> = Vec::new();
    let mut now = Duration::ZERO;
    let (end, half) = (
        Duration::from_secs(seconds),
        Duration::from_secs(seconds / 2),
    );
    let (mut answers, mut refused, mut area) = (0, 0, 0.0);
    while now < end {
        let wait = match choose_endpoint(&mut throttles, 1, start + now, None) {
            EndpointChoice::Use(_) => {
                let working = running.iter().filter(|(_, _, accepted)| *accepted);
                let working = working.count() as u32;
                let (accepted, takes) = serve(now.as_secs_f64(), working, &mut rng);
                running.push((now + Duration::from_secs_f64(takes), now, accepted));
                throttles[0].begin(1, start + now);
                continue;
            }
            EndpointChoice::Wait(wait) => wait,
            EndpointChoice::AllDown => panic!("down"),
        };
        running.sort_by_key(|(ends, _, _)| std::cmp::Reverse(*ends));
        let next = running.last().map(|(ends, _, _)| *ends);
        let next = next
            .into_iter()
            .chain(wait.map(|wait| now + wait))
            .min()
            .unwrap();
        if now >= half {
            area += (next - now).as_secs_f64() * running.len() as f64;
        }
        now = next.max(now + Duration::from_nanos(1));
        while let Some((_, sent, accepted)) = running.pop_if(|(ends, _, _)| *ends <= now) {
            let failure = Failure {
                status: Some(429),
                ..Failure::new(FailureReason::RateLimited, "")
            };
            let result = if accepted { Ok(()) } else { Err(&failure) };
            throttles[0].end(ended(result, start + sent, start + now), 3, |_| {
                Duration::ZERO
            });
            if now >= half {
                answers += u32::from(accepted);
                refused += u32::from(!accepted);
            }
        }
    }
    let half = half.as_secs_f64();
    Simulated {
        per_second: f64::from(answers) / half,
        in_flight: area / half,
        refused: f64::from(refused) / f64::from(answers + refused),
    }
}

#[test]
fn refusals_by_chance_do_not_lower_the_concurrency() {
    for percent in [1, 4, 10] {
        let run = simulate(400, |_, _, rng| {
            (
                rng.random_range(0..100) >= percent,
                rng.random_range(0.5..1.5),
            )
        });
        assert!(run.in_flight > 0.8 * 64.0, "{percent} %: {}", run.in_flight);
    }
}

#[test]
fn a_limit_on_concurrency_is_found_and_kept() {
    for percent in [0, 4] {
        let run = simulate(600, |_, working, rng| {
            let accepted = working < 8 && rng.random_range(0..100) >= percent;
            (
                accepted,
                if accepted {
                    rng.random_range(0.8..1.2)
                } else {
                    0.02
                },
            )
        });
        assert!(
            run.per_second > 0.8 * 8.0,
            "{percent} %: {}",
            run.per_second
        );
        assert!(run.in_flight < 1.2 * 8.0, "{percent} %: {}", run.in_flight);
    }
}

#[test]
fn a_limit_on_the_rate_is_found_and_kept() {
    let mut bucket = (20.0, 0.0);
    let run = simulate(600, |now, _, rng| {
        bucket = (f64::min(20.0, bucket.0 + (now - bucket.1) * 20.0), now);
        let accepted = bucket.0 >= 1.0;
        bucket.0 -= if accepted { 1.0 } else { 0.0 };
        (
            accepted,
            if accepted {
                rng.random_range(0.4..0.6)
            } else {
                0.02
            },
        )
    });
    assert!(run.per_second > 16.0, "{}", run.per_second);
    assert!(run.in_flight < 12.0, "{}", run.in_flight);
    assert!(run.refused < 0.5, "{}", run.refused);
}

#[test]
fn an_overloaded_server_is_relieved() {
    // Replies take longer with each request, and above 20 at once most fail after a while.
    let run = simulate(600, |_, working, rng| {
        let accepted = working < 20 || rng.random_range(0..100) < 10;
        (accepted, 0.2 + 0.05 * f64::from(working))
    });
    assert!(run.in_flight < 30.0, "{}", run.in_flight);
    assert!(run.per_second > 8.0, "{}", run.per_second);
}

#[test]
fn a_wait_that_is_too_long_takes_the_endpoint_out_of_use() {
    let now = Instant::now();
    let wait = |seconds: f64, longest_wait| {
        let endpoint = Endpoint {
            longest_wait,
            ..endpoint(64)
        };
        let mut throttle = Throttle::new(&endpoint, now);
        let mut failure = Failure::new(FailureReason::RateLimited, "slow");
        failure.retry_after_seconds = Some(seconds);
        super::tests::end(&mut throttle, Err(&failure), now, now);
        throttle
    };
    assert!(wait(600.0, None).down().is_none());
    let waited = server_wait_seconds(&[wait(120.0, None)], now);
    assert_eq!(waited, Some(120.0));
    for (seconds, longest) in [
        (99_999_999_999.0, None),
        (601.0, None),
        (2.0, Some(1.5)),
        (1e300, None),
    ] {
        let throttle = wait(seconds, longest);
        let message = &throttle.down().unwrap().message;
        assert!(
            message.contains("longest_wait") && message.contains("slow"),
            "{message}"
        );
        assert_eq!(server_wait_seconds(&[throttle], now), None);
    }
}

#[test]
fn what_a_server_says_about_its_rate_is_followed() {
    let now = Instant::now();
    let mut throttles = [Throttle::new(&endpoint(64), now)];
    throttles[0].begin(1, now);
    let rates = RateState {
        remaining_requests: Some(2),
        reset_seconds: Some(7.0),
        retry_after_seconds: None,
    };
    throttles[0].end(
        RequestEnd {
            rates,
            ..ended(Ok(()), now, now)
        },
        3,
        |_| Duration::ZERO,
    );
    for _ in 0..2 {
        assert_eq!(
            choose_endpoint(&mut throttles, 1, now, None),
            EndpointChoice::Use(0)
        );
        throttles[0].begin(1, now);
    }
    let seven = Duration::from_secs(7);
    assert_eq!(
        choose_endpoint(&mut throttles, 1, now, None),
        EndpointChoice::Wait(Some(seven))
    );
    assert_eq!(
        choose_endpoint(&mut throttles, 1, now + seven, None),
        EndpointChoice::Use(0)
    );
}

#[test]
fn requests_in_flight_grow_with_answers_or_slowly_with_time() {
    let start = Instant::now();
    let mut throttles = [Throttle::new(&endpoint(64), start)];
    let fill = |throttles: &mut [Throttle; 1], now| {
        while choose_endpoint(throttles, 1, now, None) == EndpointChoice::Use(0) {
            throttles[0].begin(1, now);
        }
        throttles[0].in_flight
    };
    assert_eq!(fill(&mut throttles, start), 4);
    for _ in 0..4 {
        throttles[0].end(ended(Ok(()), start, start), 3, |_| Duration::ZERO);
    }
    assert_eq!(fill(&mut throttles, start), 8);
    // A server whose answers take long is asked by all after some seconds.
    let mut now = start;
    while fill(&mut throttles, now) < 64 {
        now += Duration::from_millis(10);
    }
    let took = now - start;
    assert!((1.0..3.0).contains(&took.as_secs_f64()), "{took:?}");
}
