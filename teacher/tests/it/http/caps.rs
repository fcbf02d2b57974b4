//! No cap is passed by the server's own count, with many requests in flight.

use std::time::Duration;

use potstill_teacher::Error;
use potstill_teacher::http::{
    BudgetSettings, ChargeBasis, ClientSettings, CollectionEnd, Spending, Timeouts,
};

use super::server::{Counts, Fault, Plan};
use super::support::{PRICE, run, settings, start};

/// The most that a request of these tests can cost, USD.
const MOST: f64 = (5.0 * 1.0 + 16.0 * 4.0) / 1e6;

fn usd(counts: &Counts) -> f64 {
    (counts.worked_prompt_tokens as f64 * PRICE.input
        + counts.worked_completion_tokens as f64 * PRICE.output)
        / 1e6
}

fn many(url: String, cap: f64) -> ClientSettings {
    let mut settings = settings(url);
    settings.endpoints[0].max_in_flight = Some(200);
    settings.caps.usd = Some(cap);
    settings
}

/// The server counts all work, including answers that it then cuts or sends too late.
#[test]
fn ten_caps_in_usd_hold_with_200_requests_in_flight_and_faults() {
    for step in 1..=10_u32 {
        let cap = 0.0037 * f64::from(step);
        let running = start(Plan {
            seed: u64::from(step),
            faulty: 0.3,
            faults: vec![
                Fault::Reset,
                Fault::Truncated,
                Fault::Status(500),
                Fault::Status(429),
                Fault::HangBeforeHeaders,
                Fault::WrongShape,
            ],
            latency: Duration::from_millis(5),
            latency_spread: 8.0,
            hang: Duration::from_secs(1),
            ..Plan::default()
        });
        let mut settings = many(running.server.url(), cap);
        settings.timeouts = Timeouts {
            first_byte: Duration::from_millis(400),
            ..settings.timeouts
        };
        let record = run(&settings, 5_000);
        assert!(
            matches!(record.end, Ok(CollectionEnd::CapReached { .. })),
            "{:?}",
            record.end
        );
        let counts = running.server.counts();
        assert!(
            counts.in_flight_most > 20,
            "{} in flight",
            counts.in_flight_most
        );
        assert!(
            usd(&counts) <= cap,
            "the server counts {} of {cap}",
            usd(&counts)
        );
        let spent = record.progress.spent.usd;
        assert!(spent <= cap && spent > cap - MOST, "spent {spent} of {cap}");
        let ledger: f64 = record.attempts.iter().map(|a| a.usd).sum();
        assert!((ledger - spent).abs() < 1e-9);
        assert_eq!(record.attempts.len(), record.sent.len());
    }
}

/// Without cut responses, the ledger equals the server's count.
#[test]
fn the_ledger_equals_the_servers_count_and_a_cap_is_used_up() {
    let running = start(Plan {
        faulty: 0.2,
        faults: vec![Fault::Status(429), Fault::Status(503), Fault::Status(404)],
        ..Plan::default()
    });
    let cap = 0.02;
    let record = run(&many(running.server.url(), cap), 5_000);
    assert!(matches!(record.end, Ok(CollectionEnd::CapReached { .. })));
    let counts = running.server.counts();
    let ledger: f64 = record.attempts.iter().map(|a| a.usd).sum();
    assert!((ledger - usd(&counts)).abs() < 1e-9);
    assert!(ledger <= cap && ledger > cap - MOST, "{ledger}");
    assert_eq!(counts.answers, record.answers() as u64);
}

#[test]
fn unknown_usage_is_charged_in_full() {
    let running = start(Plan {
        usage: false,
        ..Plan::default()
    });
    let record = run(&many(running.server.url(), 10.0 * MOST + 1e-9), 100);
    assert_eq!(record.answers(), 10);
    assert!(
        record
            .attempts
            .iter()
            .all(|a| a.charge == ChargeBasis::Reserved)
    );
}

#[test]
fn caps_on_requests_tokens_and_time_hold_and_earlier_sessions_count() {
    let running = start(Plan::default());
    let url = running.server.url();
    let capped = |caps: BudgetSettings, spent: Spending| {
        let record = run(
            &ClientSettings {
                caps,
                spent,
                ..settings(url.clone())
            },
            1_000_000,
        );
        let Ok(CollectionEnd::CapReached { cap }) = record.end else {
            panic!("{:?}", record.end)
        };
        (cap, record.attempts.len())
    };
    let none = Spending::default();
    let requests = BudgetSettings {
        requests: Some(50),
        ..BudgetSettings::default()
    };
    assert_eq!(capped(requests, none), ("50 requests".into(), 50));
    let earlier = Spending {
        requests: 30,
        ..none
    };
    assert_eq!(capped(requests, earlier), ("50 requests".into(), 20));
    // An answer has 12 tokens and its prompt 5; 21 are reserved.
    let tokens = BudgetSettings {
        tokens: Some(17 * 40 + 4),
        ..BudgetSettings::default()
    };
    assert_eq!(capped(tokens, none), ("684 tokens".into(), 40));
    let time = BudgetSettings {
        hours: Some(1.0 / 3600.0),
        ..BudgetSettings::default()
    };
    assert_eq!(capped(time, none).0, "0.0002777777777777778 hours");
}

#[test]
fn a_cap_without_price_or_answer_limit_is_an_error() {
    let mut settings = settings("http://127.0.0.1:9/v1".into());
    settings.caps.usd = Some(1.0);
    settings.price = None;
    assert!(matches!(
        run(&settings, 1).end,
        Err(Error::Collection { .. })
    ));
    settings.price = Some(PRICE);
    settings.request.max_tokens = None;
    let record = run(&settings, 1);
    assert!(
        matches!(record.end, Err(Error::Collection { .. })),
        "{:?}",
        record.end
    );
    assert!(record.sent.is_empty());
}
