//! Downloads that are cut, repeated and falsified.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use potstill_teacher::hub::{FetchEvent, HubError};

use super::server::Fault;
use super::support::{MODEL, Setup, TOKEN, walk, weights};

const WEIGHTS: &str = "cdn/org/name/resolve/";

#[test]
fn a_cut_body_is_resumed_where_it_ended() {
    let setup = Setup::new();
    setup.server.fail(
        WEIGHTS,
        [Fault::Cut(40_000), Fault::Cut(0), Fault::Cut(20_000)],
    );
    setup.assert_whole(&setup.fetch().unwrap());
    let seen = setup.server.seen();
    let ranges = seen.iter().filter(|seen| seen.line.contains(WEIGHTS));
    let ranges: Vec<&str> = ranges
        .map(|seen| seen.range.as_deref().unwrap_or(""))
        .collect();
    assert_eq!(ranges, ["", "bytes=40000-", "bytes=40000-", "bytes=60000-"]);
}

#[test]
fn a_server_that_ignores_the_range_starts_anew() {
    let setup = Setup::new();
    setup
        .server
        .fail(WEIGHTS, [Fault::Cut(40_000), Fault::IgnoreRange]);
    setup.assert_whole(&setup.fetch().unwrap());
}

#[test]
fn a_later_process_resumes_and_a_wrong_beginning_is_thrown_away() {
    let setup = Setup::new();
    let cut = [
        Fault::Cut(30_000),
        Fault::Cut(0),
        Fault::Cut(0),
        Fault::Cut(0),
        Fault::Cut(0),
    ];
    setup.server.fail(WEIGHTS, cut);
    let error = setup.error();
    assert!(matches!(error, HubError::Unavailable { .. }), "{error}");
    assert_eq!(setup.leftovers().len(), 1);
    setup.assert_unused();
    setup.assert_whole(&setup.fetch().unwrap());
    let seen = setup.server.seen();
    assert_eq!(seen.last().unwrap().range.as_deref(), Some("bytes=30000-"));

    let wrong = Setup::new();
    let blob = super::server::etag(&weights(100_000));
    let partial = wrong.cached("blobs").join(format!("{blob}.incomplete"));
    std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
    for beginning in [vec![7; 5000], vec![7; 200_000]] {
        std::fs::write(&partial, beginning).unwrap();
        wrong.assert_whole(&wrong.fetch().unwrap());
        std::fs::remove_file(wrong.cached("blobs").join(&blob)).unwrap();
    }
}

#[test]
fn wrong_content_and_wrong_size_are_never_used() {
    for (fault, size) in [(Fault::WrongContent, false), (Fault::WrongSize, true)] {
        for file in [WEIGHTS, "/config.json"] {
            let setup = Setup::new();
            setup.server.fail(file, [fault.clone(), fault.clone()]);
            let error = setup.error();
            assert_eq!(matches!(error, HubError::WrongSize { .. }), size, "{error}");
            assert_eq!(
                matches!(error, HubError::WrongHash { .. }),
                !size,
                "{error}"
            );
            if file == WEIGHTS {
                setup.assert_unused();
            }
        }
    }
}

#[test]
fn failures_that_pass_are_repeated_and_shown() {
    let setup = Setup::new();
    setup.server.fail(
        "/api/",
        [
            Fault::Status(500, ""),
            Fault::Status(429, "Retry-After: 1\r\n"),
        ],
    );
    setup
        .server
        .fail(WEIGHTS, [Fault::Status(503, ""), Fault::Status(502, "")]);
    let mut pauses = Vec::new();
    let began = Instant::now();
    let mut last = (0, 0);
    let snapshot = setup.fetch_as(MODEL, "main", &mut |event| {
        match event {
            FetchEvent::Waiting { why, seconds, .. } => pauses.push((why, seconds)),
            FetchEvent::Progress { done, total, .. } => last = (done, total),
            _ => {}
        }
        ControlFlow::Continue(())
    });
    setup.assert_whole(&snapshot.unwrap());
    assert_eq!(last, (100_005, 100_005));
    assert!(began.elapsed() >= Duration::from_secs(1));
    let statuses: Vec<&str> = pauses
        .iter()
        .map(|(why, _)| &why[why.len() - 10..])
        .collect();
    assert_eq!(pauses.len(), 4, "{statuses:?}");
    assert!(
        pauses[1].0.contains("429") && pauses[1].1 == 1.0,
        "{pauses:?}"
    );
}

#[test]
fn a_server_that_always_fails_or_asks_for_hours_is_given_up() {
    let setup = Setup::new();
    setup.server.fail("/api/", vec![Fault::Status(500, ""); 9]);
    let error = setup.error();
    assert!(
        matches!(error, HubError::Unavailable { attempts: 4, .. }),
        "{error}"
    );
    assert_eq!(setup.server.count("/api/"), 4);

    let setup = Setup::new();
    setup
        .server
        .fail("/api/", [Fault::Status(429, "Retry-After: 3600\r\n")]);
    let error = setup.error();
    assert!(
        matches!(error, HubError::AskedToWait { seconds: 3600, .. }),
        "{error}"
    );
}

#[test]
fn a_silent_server_is_asked_again_and_an_absent_one_is_named() {
    let mut setup = Setup::new();
    setup.settings.idle = Duration::from_millis(300);
    setup
        .server
        .fail(WEIGHTS, [Fault::Pause(Duration::from_secs(2))]);
    setup.assert_whole(&setup.fetch().unwrap());

    let mut setup = Setup::new();
    setup.settings.endpoint = "http://127.0.0.1:1".to_owned();
    let error = setup.error().to_string();
    assert!(
        error.contains("refused") && error.contains("127.0.0.1"),
        "{error}"
    );
}

#[test]
fn the_token_goes_to_the_endpoint_alone() {
    let setup = Setup::new();
    setup.assert_whole(&setup.fetch().unwrap());
    let seen = setup.server.seen();
    let (own, other): (Vec<_>, Vec<_>) = seen
        .iter()
        .partition(|seen| seen.host.starts_with("127.0.0.1"));
    assert!(own.len() >= 4 && other.len() == 1);
    let bearer = format!("Bearer {TOKEN}");
    assert!(
        own.iter()
            .all(|seen| seen.authorization.as_deref() == Some(&bearer))
    );
    assert!(
        other
            .iter()
            .all(|seen| seen.authorization.is_none() && seen.host.starts_with("localhost"))
    );
    walk(&setup.settings.cache, &mut |path| {
        let content = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
        assert!(!content.contains(TOKEN), "{}", path.display());
    });
}

#[test]
fn redirects_without_an_end_or_an_address_are_refused() {
    for to in [
        "/org/name/resolve/main/config.json",
        "ftp://127.0.0.1/x",
        "http://[",
    ] {
        let setup = Setup::new();
        setup
            .server
            .fail("config.json", vec![Fault::Redirect(to.to_owned()); 20]);
        let error = setup.error();
        assert!(matches!(error, HubError::Redirect { .. }), "{error}");
    }
}

#[test]
fn a_stop_keeps_what_was_received() {
    let setup = Setup::new();
    setup
        .server
        .fail(WEIGHTS, [Fault::Pause(Duration::from_secs(3))]);
    let error = setup.fetch_as(MODEL, "main", &mut |event| match event {
        FetchEvent::Progress { done, .. } if done > 10_000 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(error, Err(HubError::Stopped)));
    setup.assert_unused();
    assert_eq!(setup.leftovers().len(), 1);
    setup.assert_whole(&setup.fetch().unwrap());
    assert!(setup.server.seen().last().unwrap().range.is_some());
}
