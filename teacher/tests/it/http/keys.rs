//! Keys and prompts go to the endpoint and nowhere else.

use potstill_teacher::Error;
use potstill_teacher::http::{ApiKey, CollectionEnd, FailureReason};

use super::server::{Fault, Plan};
use super::support::{run, settings, start};

const KEY: &str = "sk-loop-0123456789abcdef";

#[test]
fn a_key_that_the_server_repeats_is_in_nothing_that_comes_back() {
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
        let came = run(&settings, 20);
        assert_eq!(came.landed.len(), 20);
        assert_eq!(running.server.counts().authorized, came.sent.len() as u64);
        for said in [
            format!("{:?}", came.landed),
            format!("{:?} {:?}", came.attempts, came.sent),
            format!("{settings:?}"),
        ] {
            assert!(
                !said.contains(KEY) && !said.contains("0123456789abcdef"),
                "{said}"
            );
        }
        for landed in &came.landed {
            let Ok(reply) = &landed.result else { continue };
            let spelled: Vec<u8> = reply
                .completion
                .tokens
                .iter()
                .flat_map(|t| t.bytes.to_vec())
                .collect();
            assert!(!String::from_utf8_lossy(&spelled).contains(KEY));
            assert!(
                reply.completion.answer.contains("****"),
                "{}",
                reply.completion.answer
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
        let came = run(&settings, 40);
        let Ok(CollectionEnd::EndpointsDown { last }) = came.ended else {
            panic!("{:?}", came.ended)
        };
        assert_eq!(last.reason, FailureReason::Redirected);
        assert!(!last.message.contains(KEY));
        assert_eq!(other.server.counts().requests, 0);
    }
}

#[test]
fn endpoints_that_would_give_secrets_away_are_refused_and_offline_opens_nothing() {
    let running = start(Plan::default());
    let refused = |url: &str, offline| {
        let mut settings = settings(url.into());
        settings.offline = offline;
        run(&settings, 1).ended.unwrap_err()
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
