//! Faults of a server, one at a time and all together.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use potstill_teacher::http::{
    ClientSettings, CollectionEnd, Dialect, FailureReason, OnBreak, OnLength, Timeouts,
};

use super::server::{FAULTS, Fault, Plan, fault};
use super::support::{RunRecord, call, first_word, key, run, run_calls, settings, start};

/// Reasons that a fault may be reported with; none if it does not prevent the answer.
fn reasons(fault: Fault, stream: bool) -> &'static [FailureReason] {
    match fault {
        Fault::Status(400) => &[FailureReason::BadRequest],
        Fault::Status(401) => &[FailureReason::Unauthorized],
        Fault::Status(403) => &[FailureReason::Forbidden],
        Fault::Status(404) => &[FailureReason::NotFound],
        Fault::Status(408) => &[FailureReason::RequestTimeout],
        Fault::Status(429) | Fault::RetryAfter(_) => &[FailureReason::RateLimited],
        Fault::Status(500) => &[FailureReason::ServerError],
        Fault::Status(_) => &[FailureReason::Overloaded],
        Fault::HangBeforeHeaders => &[FailureReason::FirstByteTimeout],
        Fault::HangBetweenChunks | Fault::HangForEver | Fault::Drip => {
            &[FailureReason::IdleTimeout]
        }
        Fault::Reset => &[FailureReason::Cut],
        Fault::Truncated if stream => &[FailureReason::Cut],
        Fault::Truncated | Fault::InvalidUtf8 | Fault::WrongShape => &[FailureReason::Malformed],
        Fault::NotANumber => &[FailureReason::Malformed, FailureReason::BadLogprobs],
        Fault::ErrorInside => &[FailureReason::ErrorInside, FailureReason::ServerError],
        Fault::NoChoice if stream => &[FailureReason::Cut, FailureReason::Empty],
        Fault::NoChoice | Fault::Empty => &[FailureReason::Empty],
        // In a stream, this fault is a response without a choice.
        Fault::FewerLogprobs | Fault::IdsOutOfRange if stream => {
            &[FailureReason::Cut, FailureReason::Empty]
        }
        Fault::FewerLogprobs | Fault::IdsOutOfRange => &[FailureReason::BadLogprobs],
        Fault::Huge => &[FailureReason::TooLarge],
        Fault::Twice => &[],
    }
}

fn impatient(settings: ClientSettings) -> ClientSettings {
    ClientSettings {
        timeouts: Timeouts {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_millis(1500),
            idle: Duration::from_millis(700),
            whole: Duration::from_secs(20),
        },
        ..settings
    }
}

fn one(fault: Fault, stream: bool) -> RunRecord {
    let running = start(Plan {
        faulty: 1.0,
        faults: vec![fault],
        hang: Duration::from_secs(4),
        ..Plan::default()
    });
    let mut settings = impatient(settings(running.server.url()));
    settings.request.stream = stream;
    settings.request.logprobs = Some(2);
    settings.attempts = 2;
    run(&settings, 1)
}

#[test]
fn every_fault_has_its_reason() {
    for stream in [false, true] {
        std::thread::scope(|scope| {
            for &fault in FAULTS {
                scope.spawn(move || {
                    let record = one(fault, stream);
                    let what = format!("{fault:?}, streamed: {stream}");
                    assert_eq!(record.end.unwrap(), CollectionEnd::Finished, "{what}");
                    let [completed] = &record.completed[..] else {
                        panic!("{what}: {:?}", record.completed)
                    };
                    let expected = reasons(fault, stream);
                    match &completed.result {
                        Ok(_) => assert!(expected.is_empty(), "{what}: an answer"),
                        Err(f) => assert!(expected.contains(&f.reason), "{what}: {f:?}"),
                    }
                    let tries = completed.result.as_ref().err().map_or(1, |f| {
                        1 + u32::from(f.reason.is_transient() || f.reason.concerns_endpoint())
                    });
                    assert_eq!(completed.attempts, tries, "{what}");
                    assert_eq!(record.attempts.len() as u32, tries, "{what}");
                });
            }
        });
    }
}

#[test]
fn a_body_that_arrives_too_slowly_times_out() {
    let running = start(Plan {
        faulty: 1.0,
        faults: vec![Fault::Drip],
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.timeouts.whole = Duration::from_millis(2500);
    settings.attempts = 1;
    let record = run(&settings, 1);
    let failure = record.completed[0].result.clone().unwrap_err();
    assert_eq!(failure.reason, FailureReason::TotalTimeout);
}

/// Every call is completed once, with its own answer or with a typed failure.
#[test]
fn ten_thousand_prompts_with_faults_in_three_of_ten_responses() {
    const CALLS: u64 = 10_000;
    let running = start(Plan {
        seed: 3,
        faulty: 0.3,
        latency: Duration::from_millis(2),
        latency_spread: 10.0,
        hang: Duration::from_secs(3),
        ..Plan::default()
    });
    let mut settings = impatient(settings(running.server.url()));
    settings.endpoints[0].max_in_flight = Some(256);
    let begun = Instant::now();
    let record = run(&settings, CALLS);
    assert_eq!(record.end.as_ref().unwrap(), &CollectionEnd::Finished);
    assert!(
        begun.elapsed() < Duration::from_secs(300),
        "{:?}",
        begun.elapsed()
    );

    let numbers: HashSet<u64> = record.completed.iter().map(|c| c.call.number).collect();
    assert_eq!(
        (record.completed.len() as u64, numbers.len() as u64),
        (CALLS, CALLS)
    );
    for completed in &record.completed {
        assert!((1..=4).contains(&completed.attempts), "{completed:?}");
        match &completed.result {
            Ok(response) => {
                let word = first_word(completed.call.number);
                assert!(
                    response.completion.answer.starts_with(&word),
                    "the answer to another prompt: {completed:?}"
                );
                assert_eq!(response.completion.prompt_id, completed.call.prompt.id);
            }
            Err(f) => assert!(!f.message.is_empty() && f.message.len() <= 500, "{f:?}"),
        }
    }
    let requests: HashSet<u64> = record.attempts.iter().map(|a| a.request).collect();
    assert_eq!(requests.len(), record.attempts.len());
    assert_eq!(record.sent.len(), record.attempts.len());
    let counts = running.server.counts();
    assert_eq!(counts.requests, record.sent.len() as u64);
    let good = record
        .attempts
        .iter()
        .filter(|a| a.failed.is_none())
        .count();
    assert_eq!(good, record.answers());
    assert!(counts.answers >= good as u64);
    // Most faults are cured by a retry; about one prompt in fifty fails finally.
    assert!(record.answers() > 9_500, "{} answers", record.answers());
}

#[test]
fn an_answer_at_the_token_limit_is_kept_dropped_or_continued() {
    let running = start(Plan {
        answer_tokens: 40,
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    let record = run(&settings, 3);
    assert_eq!(record.answers(), 3);
    settings.on_length = OnLength::Drop;
    let record = run(&settings, 3);
    assert!(record.completed.iter().all(|c| {
        c.result
            .as_ref()
            .is_err_and(|f| f.reason == FailureReason::Length && f.billed.is_some())
    }));
    assert_eq!(record.attempts.len(), 3, "a retry would not help");
    // OpenAI's own API cannot continue an answer, so the paid answer is kept.
    settings.on_length = OnLength::Continue;
    let record = run(&settings, 3);
    assert_eq!(record.answers(), 3);
}

/// A broken stream is requested again, or continued after the beginning that was received.
#[test]
fn a_broken_stream_is_retried_or_continued() {
    let plan = Plan {
        faulty: 0.4,
        faults: vec![Fault::Truncated],
        ..Plan::default()
    };
    let n = (1..).find(|&n| fault(&plan, key(n), 1).is_some()).unwrap();
    for (on_break, words) in [(OnBreak::Retry, 12..=12), (OnBreak::Continue, 13..=200)] {
        let running = start(plan.clone());
        let mut settings = settings(running.server.url());
        settings.request.stream = true;
        settings.request.dialect = Dialect::Vllm;
        settings.on_break = on_break;
        settings.attempts = 20;
        let record = run_calls(&settings, vec![call(n)]);
        let [completed] = &record.completed[..] else {
            panic!("{:?}", record.completed)
        };
        let answer = &completed.result.as_ref().unwrap().completion.answer;
        assert!(completed.attempts >= 2);
        assert!(answer.starts_with(&first_word(n)), "{answer}");
        let count = answer.split_whitespace().count();
        assert!(words.contains(&count), "{on_break:?}: {count} words");
    }
}

/// The server gives 16 tokens for every continuation, so only the limit on continuations ends the answer.
#[test]
fn an_endless_answer_is_continued_a_bounded_number_of_times() {
    let running = start(Plan {
        answer_tokens: 40,
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.request.dialect = Dialect::Vllm;
    settings.on_length = OnLength::Continue;
    let record = run(&settings, 1);
    assert_eq!((record.answers(), record.attempts.len()), (1, 65));
    let response = record.completed[0].result.as_ref().unwrap();
    assert_eq!(
        response.completion.answer.split_whitespace().count(),
        65 * 16
    );
    assert_eq!(response.billed.map(|b| b.completion_tokens), Some(65 * 16));
}
