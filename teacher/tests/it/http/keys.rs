//! Keys and prompts are sent to the endpoint and nowhere else.

use potstill_teacher::Error;
use potstill_teacher::http::{ApiKey, CollectionEnd, FailureReason};

use super::server::{Fault, Plan};
use super::support::{run, settings, start};

const KEY: &str = "sk-loop-0123456789abcdef";

#[test]
fn a_key_that_the_server_repeats_is_removed_from_all_results() {
    for (stream, faulty, logprobs) in [
        (false, 0.0, None),
        (true, 0.0, None),
        (false, 0.0, Some(2)),
        (true, 0.0, Some(2)),
        (false, 1.0, None),
    ] {
        let running = start(Plan {
            echo: true,
            faulty,
            faults: vec![Fault::Status(500), Fault::Status(400), Fault::Status(429)],
            ..Plan::default()
        });
        let mut settings = settings(running.server.url());
        settings.endpoints[0].key = Some(ApiKey::new(KEY.into()));
        settings.request.stream = stream;
        settings.request.logprobs = logprobs;
        let record = run(&settings, 20);
        assert_eq!(record.completed.len(), 20);
        assert_eq!(running.server.counts().authorized, record.sent.len() as u64);
        for shown in [
            format!("{:?}", record.completed),
            format!("{:?} {:?}", record.attempts, record.sent),
            format!("{settings:?}"),
        ] {
            assert!(
                !shown.contains(KEY) && !shown.contains("0123456789abcdef"),
                "{shown}"
            );
        }
        for completed in &record.completed {
            let Ok(response) = &completed.result else {
                continue;
            };
            let spelled: Vec<u8> = response
                .completion
                .tokens
                .iter()
                .flat_map(|t| t.bytes.to_vec())
                .collect();
            assert!(!String::from_utf8_lossy(&spelled).contains(KEY));
            assert!(
                response.completion.answer.contains("***"),
                "{}",
                response.completion.answer
            );
        }
    }
}

#[test]
fn a_redirect_to_another_host_is_not_followed() {
    for status in [301, 302, 307, 308] {
        let other = start(Plan::default());
        let running = start(Plan {
            redirect: Some((status, format!("{}/chat/completions", other.server.url()))),
            ..Plan::default()
        });
        let mut settings = settings(running.server.url());
        settings.endpoints[0].key = Some(ApiKey::new(KEY.into()));
        let record = run(&settings, 40);
        let Ok(CollectionEnd::EndpointsDown { last }) = record.end else {
            panic!("{:?}", record.end)
        };
        assert_eq!(last.reason, FailureReason::Redirected);
        assert!(!last.message.contains(KEY));
        assert_eq!(other.server.counts().requests, 0);
    }
}

#[test]
fn endpoints_that_would_leak_secrets_are_refused_and_offline_mode_opens_no_socket() {
    let running = start(Plan::default());
    let refused = |url: &str, offline| {
        let mut settings = settings(url.into());
        settings.offline = offline;
        run(&settings, 1).end.unwrap_err()
    };
    for url in [
        "http://example.com/v1",
        "http://127.0.0.1.example.com/v1",
        "http://name:word@127.0.0.1/v1",
        "https://api.example.com/v1?key=abc",
        "ftp://127.0.0.1/v1",
        "127.0.0.1:80",
    ] {
        assert!(
            matches!(refused(url, false), Error::Endpoint { .. }),
            "{url}"
        );
    }
    assert!(matches!(
        refused(&running.server.url(), true),
        Error::Offline
    ));
    assert_eq!(running.server.counts().requests, 0);
}
