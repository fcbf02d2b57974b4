//! Choice of endpoints, concurrency, and collections that end before all calls are completed.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use potstill_teacher::Error;
use potstill_teacher::http::{CallEvent, CollectionEnd, FailureReason, collect};

use super::server::{Fault, Plan, fault};
use super::support::{call, endpoint, key, run, run_until, settings, start};

#[test]
fn a_wrong_key_ends_the_collection_without_completing_calls() {
    let running = start(Plan {
        faulty: 1.0,
        faults: vec![Fault::Status(401)],
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.attempts = 100;
    let record = run(&settings, 1_000);
    assert!(
        matches!(&record.end, Ok(CollectionEnd::EndpointsDown { last }) if last.reason == FailureReason::Unauthorized),
        "{:?}",
        record.end
    );
    assert!(record.completed.is_empty());
    assert!(
        (8..=40).contains(&record.sent.len()),
        "{} requests",
        record.sent.len()
    );
}

#[test]
fn an_unreachable_server_ends_the_collection_without_completing_calls() {
    // The port was free a moment ago, so nothing listens there.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", gone.local_addr().unwrap());
    drop(gone);
    let record = run(&settings(url), 1_000);
    assert!(
        matches!(&record.end, Ok(CollectionEnd::EndpointsDown { last }) if last.reason == FailureReason::Connect),
        "{:?}",
        record.end
    );
    assert!(record.completed.is_empty());
    assert!(record.attempts.iter().all(|a| a.usd == 0.0));
}

#[test]
fn a_call_that_one_endpoint_refuses_is_answered_by_another() {
    let good = start(Plan::default());
    let bad = start(Plan {
        faulty: 1.0,
        faults: vec![Fault::Status(403)],
        ..Plan::default()
    });
    let mut settings = settings(good.server.url());
    let bad_endpoint = endpoint(bad.server.url());
    let bad_name = bad_endpoint.name().to_owned();
    settings.endpoints.push(bad_endpoint);
    let record = run(&settings, 300);
    assert_eq!(record.end.as_ref().unwrap(), &CollectionEnd::Finished);
    assert_eq!(record.answers(), 300);
    assert!(record.sent.iter().any(|s| s.endpoint == bad_name));
}

#[test]
fn a_retry_waits_for_retry_after() {
    let plan = Plan {
        faulty: 0.5,
        faults: vec![Fault::RetryAfter(1)],
        ..Plan::default()
    };
    // A prompt of which only the first request is refused.
    let n = (1..)
        .find(|&n| fault(&plan, key(n), 1).is_some() && fault(&plan, key(n), 2).is_none())
        .unwrap();
    let running = start(plan);
    let mut calls = Some(call(n));
    let times = std::sync::Mutex::new(Vec::new());
    let ended = collect(
        &settings(running.server.url()),
        &mut || Ok(calls.take()),
        &|s| {
            times.lock().unwrap().push(s.sent_unix_ms);
            Ok(())
        },
        &mut |_| Ok(ControlFlow::Continue(())),
        &mut |_| {},
        &|| false,
    );
    assert_eq!(ended.unwrap(), CollectionEnd::Finished);
    let times = times.into_inner().unwrap();
    assert_eq!(times.len(), 2);
    assert!(times[1] - times[0] >= 990, "{times:?}");
}

#[test]
fn the_concurrency_limit_is_kept_and_used() {
    let running = start(Plan {
        latency: Duration::from_millis(30),
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.endpoints[0].max_in_flight = Some(40);
    let record = run(&settings, 400);
    assert_eq!(record.answers(), 400);
    let most = running.server.counts().in_flight_most;
    assert!((30..=40).contains(&most), "{most}");
}

#[test]
fn stopping_completes_the_requests_in_flight() {
    let running = start(Plan {
        latency: Duration::from_millis(20),
        ..Plan::default()
    });
    let record = run_until(&settings(running.server.url()), 1_000_000, |completed| {
        completed >= 100
    });
    assert_eq!(record.end.unwrap(), CollectionEnd::Stopped);
    assert_eq!(record.completed.len(), record.sent.len());
    let counts = running.server.counts();
    assert_eq!(
        (counts.answers, counts.in_flight),
        (record.sent.len() as u64, 0)
    );
}

#[test]
fn errors_and_a_break_of_the_callbacks_end_the_collection() {
    let running = start(Plan::default());
    let settings = settings(running.server.url());
    let completed = AtomicU64::new(0);
    let run = |at_call: u64, at_completion: u64, at_sending: u64| {
        completed.store(0, Ordering::Relaxed);
        let mut n = 0;
        let sent = AtomicU64::new(0);
        collect(
            &settings,
            &mut || {
                n += 1;
                if n == at_call {
                    Err("no more to read".into())
                } else {
                    Ok(Some(call(n)))
                }
            },
            &|_| {
                if sent.fetch_add(1, Ordering::Relaxed) + 1 == at_sending {
                    return Err(std::io::Error::other("the disk is full"));
                }
                Ok(())
            },
            &mut |events| {
                let here = events
                    .iter()
                    .filter(|e| matches!(e, CallEvent::Completed(_)))
                    .count();
                let all = completed.fetch_add(here as u64, Ordering::Relaxed) + here as u64;
                Ok(if all >= at_completion {
                    ControlFlow::Break("enough".into())
                } else {
                    ControlFlow::Continue(())
                })
            },
            &mut |_| {},
            &|| false,
        )
    };
    let never = u64::MAX;
    assert_eq!(
        run(never, 10, never).unwrap(),
        CollectionEnd::StoppedByCaller {
            why: "enough".into()
        }
    );
    assert!(matches!(run(500, never, never), Err(Error::Caller { .. })));
    assert!(
        completed.load(Ordering::Relaxed) > 0,
        "the requests in flight were completed"
    );
    assert!(matches!(run(never, never, 50), Err(Error::Caller { .. })));
    assert_eq!(
        completed.load(Ordering::Relaxed),
        49,
        "every reserved request was sent and completed"
    );
}
