//! Everything that a server can do wrong, one by one and all at once.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use potstill_teacher::http::{
    ClientSettings, CollectionEnd, Dialect, FailureReason, OnBreak, OnLength, Timeouts,
};

use super::server::{FAULTS, Fault, Plan, fault};
use super::support::{Came, call, first_word, key, run, run_calls, settings, start};

/// What a fault may be called; nothing for an answer.
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
        // A streamed fault of this kind is a reply without a choice.
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

fn one(fault: Fault, stream: bool) -> Came {
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
                    let came = one(fault, stream);
                    let what = format!("{fault:?}, streamed: {stream}");
                    assert_eq!(came.ended.unwrap(), CollectionEnd::Finished, "{what}");
                    let [landed] = &came.landed[..] else {
                        panic!("{what}: {:?}", came.landed)
                    };
                    let expected = reasons(fault, stream);
                    match &landed.result {
                        Ok(_) => assert!(expected.is_empty(), "{what}: an answer"),
                        Err(f) => assert!(expected.contains(&f.reason), "{what}: {f:?}"),
                    }
                    let tries = landed.result.as_ref().err().map_or(1, |f| {
                        1 + u32::from(f.reason.is_transient() || f.reason.concerns_endpoint())
                    });
                    assert_eq!(landed.attempts, tries, "{what}");
                    assert_eq!(came.attempts.len() as u32, tries, "{what}");
                });
            }
        });
    }
}

#[test]
fn a_body_that_only_drips_is_given_up_in_the_end() {
    let running = start(Plan {
        faulty: 1.0,
        faults: vec![Fault::Drip],
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.timeouts.whole = Duration::from_millis(2500);
    settings.attempts = 1;
    let came = run(&settings, 1);
    let failure = came.landed[0].result.clone().unwrap_err();
    assert_eq!(failure.reason, FailureReason::TotalTimeout);
}

/// Must show 3: every prompt ends once, in an answer that is its own or in a typed failure.
#[test]
fn ten_thousand_prompts_of_which_three_in_ten_replies_are_faulty() {
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
    let came = run(&settings, CALLS);
    assert_eq!(came.ended.as_ref().unwrap(), &CollectionEnd::Finished);
    assert!(
        begun.elapsed() < Duration::from_secs(300),
        "{:?}",
        begun.elapsed()
    );

    let numbers: HashSet<u64> = came.landed.iter().map(|c| c.call.number).collect();
    assert_eq!(
        (came.landed.len() as u64, numbers.len() as u64),
        (CALLS, CALLS)
    );
    for landed in &came.landed {
        assert!((1..=4).contains(&landed.attempts), "{landed:?}");
        match &landed.result {
            Ok(reply) => {
                let word = first_word(landed.call.number);
                assert!(
                    reply.completion.answer.starts_with(&word),
                    "another's answer: {landed:?}"
                );
                assert_eq!(reply.completion.prompt_id, landed.call.prompt.id);
            }
            Err(f) => assert!(!f.message.is_empty() && f.message.len() <= 500, "{f:?}"),
        }
    }
    let requests: HashSet<u64> = came.attempts.iter().map(|a| a.request).collect();
    assert_eq!(requests.len(), came.attempts.len());
    assert_eq!(came.sent.len(), came.attempts.len());
    let counts = running.server.counts();
    assert_eq!(counts.requests, came.sent.len() as u64);
    let good = came.attempts.iter().filter(|a| a.failed.is_none()).count();
    assert_eq!(good, came.answers());
    assert!(counts.answers >= good as u64);
    // Faults that may help to ask again: a prompt fails for good in one of some fifty cases.
    assert!(came.answers() > 9_500, "{} answers", came.answers());
}

#[test]
fn an_answer_at_the_limit_is_kept_dropped_or_made_longer() {
    let running = start(Plan {
        answer_tokens: 40,
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    let came = run(&settings, 3);
    assert_eq!(came.answers(), 3);
    settings.on_length = OnLength::Drop;
    let came = run(&settings, 3);
    assert!(came.landed.iter().all(|c| {
        c.result
            .as_ref()
            .is_err_and(|f| f.reason == FailureReason::Length && f.billed.is_some())
    }));
    assert_eq!(came.attempts.len(), 3, "request again would not help");
    // OpenAI's own API cannot go on from the end: what is paid for is kept.
    settings.on_length = OnLength::Continue;
    let came = run(&settings, 3);
    assert_eq!(came.answers(), 3);
}

/// A stream that breaks is asked for anew, or gone on from: then its beginning is that of the first reply.
#[test]
fn a_broken_stream_is_retried_or_gone_on_from() {
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
        let came = run_calls(&settings, vec![call(n)]);
        let [landed] = &came.landed[..] else {
            panic!("{:?}", came.landed)
        };
        let answer = &landed.result.as_ref().unwrap().completion.answer;
        assert!(landed.attempts >= 2);
        assert!(answer.starts_with(&first_word(n)), "{answer}");
        let count = answer.split_whitespace().count();
        assert!(words.contains(&count), "{on_break:?}: {count} words");
    }
}

/// The server gives 16 tokens whenever it is asked to go on, so it is the number of times that ends this.
#[test]
fn an_answer_that_never_ends_is_made_longer_for_a_bounded_time() {
    let running = start(Plan {
        answer_tokens: 40,
        ..Plan::default()
    });
    let mut settings = settings(running.server.url());
    settings.request.dialect = Dialect::Vllm;
    settings.on_length = OnLength::Continue;
    let came = run(&settings, 1);
    assert_eq!((came.answers(), came.attempts.len()), (1, 65));
    let reply = came.landed[0].result.as_ref().unwrap();
    assert_eq!(reply.completion.answer.split_whitespace().count(), 65 * 16);
    assert_eq!(reply.billed.map(|b| b.completion_tokens), Some(65 * 16));
}
