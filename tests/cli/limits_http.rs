//! Hostile and limited servers: deep JSON, long waits, echoed keys, absurd token counts, and the most that a run costs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::fixture::{CommandOutput, Run};
use crate::served::{KEY, run_at};

/// Status, further headers and body of the reply to the n-th request.
type Reply = fn(u64) -> (u16, &'static str, String);

/// Starts a server, and builds a run with the server as the teacher. Returns the number of requests, too.
fn served(reply: Reply) -> (Run, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let requests: Arc<AtomicU64> = Arc::default();
    let counter = requests.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let counter = counter.clone();
            std::thread::spawn(move || serve(&stream, reply, &counter));
        }
    });
    let run = run_at(&format!("http://127.0.0.1:{port}/v1"), "");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    (run, requests)
}

fn serve(mut stream: &TcpStream, reply: Reply, requests: &AtomicU64) {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let (status, headers, text) = reply(requests.fetch_add(1, Ordering::SeqCst));
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
}

fn answer(usage: &Value) -> String {
    let message = json!({ "role": "assistant", "content": "ok" });
    let choice = json!({ "index": 0, "finish_reason": "stop", "message": message });
    json!({ "choices": [choice], "usage": usage }).to_string()
}

fn ok() -> (u16, &'static str, String) {
    let usage = json!({ "prompt_tokens": 9, "completion_tokens": 2 });
    (200, "", answer(&usage))
}

fn potstill(run: &Run, arguments: &[&str]) -> CommandOutput {
    run.output(run.command(arguments).env("TEST_KEY", KEY))
}

#[test]
fn deep_json_is_one_malformed_reply() {
    let (run, requests) = served(|number| match number {
        0 => (200, "", "[".repeat(1_000_000)),
        1 => (200, "", "{\"error\":".to_owned() + &"[".repeat(1_000_000)),
        2 => (500, "", "[".repeat(1_000_000)),
        _ => ok(),
    });
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert_eq!(requests.load(Ordering::SeqCst), 12 + 3);
    let log = std::fs::read_to_string(run.path("runs/tiny/requests.jsonl")).unwrap();
    assert_eq!(log.matches("\"malformed\"").count(), 2, "{log}");
}

#[test]
fn a_wait_above_the_longest_is_a_refusal_that_names_the_setting() {
    let (run, _) = served(|_| {
        (
            429,
            "retry-after: 99999999999\r\n",
            "{\"error\":\"slow\"}".into(),
        )
    });
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_ne!(collected.code, 0);
    for part in ["99999999999 s", "`longest_wait` of [teacher] is 600 s"] {
        assert!(collected.stderr.contains(part), "{}", collected.stderr);
    }
    // A shorter wait is followed, and said.
    let (run, _) = served(|number| match number {
        0 => (429, "retry-after: 3\r\n", "{}".into()),
        _ => ok(),
    });
    let began = std::time::Instant::now();
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert!(began.elapsed().as_secs_f64() > 2.5);
    assert!(
        collected.stderr.contains("asks to wait 3 s"),
        "{}",
        collected.stderr
    );
}

#[test]
fn check_does_not_run_the_command_for_the_key() {
    let (run, requests) = served(|_| ok());
    run.edit(
        "key_env = \"TEST_KEY\"",
        "key_command = \"touch ran; echo key-0123456789\"",
    );
    let checked = potstill(&run, &["check", "run.toml"]);
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    assert!(
        checked.stdout.contains("`key_command` was not run"),
        "{}",
        checked.stdout
    );
    assert!(!run.path("ran").exists());
    assert_eq!(requests.load(Ordering::SeqCst), 0);
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert!(run.path("ran").exists());
}

#[test]
fn an_echoed_key_is_removed_in_every_encoding() {
    // printf 'sk-very-secret-0123456789' | base64
    const BASE64: &str = "c2stdmVyeS1zZWNyZXQtMDEyMzQ1Njc4OQ";
    assert_eq!(KEY, "sk-very-secret-0123456789");
    let (run, _) = served(|number| {
        let echoed = match number % 4 {
            0 => BASE64.to_owned(),
            1 => "the key that ends in 456789".to_owned(),
            2 => KEY.chars().rev().collect(),
            _ => KEY.bytes().map(|byte| format!("%{byte:02x}")).collect(),
        };
        (
            400,
            "",
            json!({ "error": { "message": format!("wrong: {echoed}.") } }).to_string(),
        )
    });
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_ne!(collected.code, 0);
    let log = std::fs::read_to_string(run.path("runs/tiny/requests.jsonl")).unwrap();
    for shown in [&collected.stderr, &collected.stdout, &log] {
        for piece in [
            &BASE64[..20],
            "456789",
            "9876543210",
            "%73%6b%2d",
            "very-secret",
        ] {
            assert!(!shown.contains(piece), "{piece}: {shown}");
        }
    }
}

#[test]
fn token_counts_that_cannot_be_right_are_charged_in_full_and_counted() {
    let (run, _) = served(|number| {
        let completion = match number % 3 {
            0 => json!(-5),
            1 => json!(u64::MAX),
            _ => json!(1_000_000),
        };
        let usage = json!({ "prompt_tokens": 9, "completion_tokens": completion });
        (200, "", answer(&usage))
    });
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert!(
        collected.stderr.contains("12 replies state token counts"),
        "{}",
        collected.stderr
    );
    let log = std::fs::read_to_string(run.path("runs/tiny/requests.jsonl")).unwrap();
    assert_eq!(
        log.matches("\"charge\":\"implausible\"").count(),
        12,
        "{log}"
    );
}

#[test]
fn the_most_that_a_run_costs_is_at_least_what_is_reserved() {
    for tokenizer in ["tokenizer = \"model\"\n", ""] {
        let (run, _) = served(|_| ok());
        run.edit("tokenizer = \"model\"\n", tokenizer);
        let dry = potstill(&run, &["collect", "run.toml", "--dry-run"]);
        assert_eq!(dry.code, 0, "{}", dry.stderr);
        let (_, after) = dry.stdout.rsplit_once("at most $").unwrap();
        let most: f64 = after.split_once(' ').unwrap().0.parse().unwrap();
        assert!(dry.stdout.contains(": about "), "{}", dry.stdout);
        assert_eq!(potstill(&run, &["collect", "run.toml"]).code, 0);
        let log = std::fs::read_to_string(run.path("runs/tiny/requests.jsonl")).unwrap();
        let lines = log
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let reserved = lines.filter_map(|line| line.pointer("/sent/reserved_usd")?.as_f64());
        let reserved: f64 = reserved.sum();
        assert!(
            reserved > 0.0 && reserved <= most + 1e-12,
            "{reserved} {most}"
        );
        assert!(most < reserved + 0.0011, "{reserved} {most}");
    }
}
