//! Teachers behind a server: the real binary with a small test server on loopback.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use potstill::datasets::{Completion, Failed, read_shard, shard_name};
use serde_json::{Value, json};

use crate::fixture::{Run, interrupt};

pub(crate) const KEY: &str = "sk-very-secret-0123456789";

/// Returns status and body of the response to the n-th request, from the text of the last message, or
/// from the prompt as JSON.
type Answer = fn(u64, &str) -> (u16, Value);

/// A server that counts its requests and tokens.
struct Server {
    port: u16,
    requests: Arc<AtomicU64>,
    /// Tokens of prompts and of answers that the server has reported as usage.
    tokens: Arc<Mutex<(u64, u64)>>,
    closed: Arc<AtomicBool>,
}

impl Server {
    fn start(answer: Answer) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Server {
            port: listener.local_addr().unwrap().port(),
            requests: Arc::default(),
            tokens: Arc::default(),
            closed: Arc::default(),
        };
        let (requests, tokens) = (server.requests.clone(), server.tokens.clone());
        let closed = server.closed.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if closed.load(Ordering::SeqCst) {
                    return;
                }
                let (requests, tokens) = (requests.clone(), tokens.clone());
                std::thread::spawn(move || serve(stream, answer, &requests, &tokens));
            }
        });
        server
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn serve(stream: TcpStream, answer: Answer, requests: &AtomicU64, tokens: &Mutex<(u64, u64)>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut length, mut head) = (0, String::new());
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
        head += &line;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let number = requests.fetch_add(1, Ordering::SeqCst);
    let asked = body["messages"].as_array().and_then(|m| m.last());
    let asked = match asked.and_then(|m| m["content"].as_str()) {
        Some(words) => words.to_owned(),
        None => body["prompt"].to_string(),
    };
    let (status, mut reply) = answer(number, &asked);
    if status == 200 {
        let usage = json!({ "prompt_tokens": asked.len(), "completion_tokens": 2,
                            "total_tokens": asked.len() + 2 });
        reply["usage"] = usage;
        let mut tokens = tokens.lock().unwrap();
        *tokens = (tokens.0 + asked.len() as u64, tokens.1 + 2);
    } else if status == 401 {
        // Some servers and proxies repeat the request in their error message.
        reply["error"]["message"] = json!(format!("not you: {head}"));
    }
    let text = reply.to_string();
    let _ = write!(
        &stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
}

/// Answers "ok", with two alternatives per token.
fn ok(_: u64, _: &str) -> (u16, Value) {
    let token = |byte: u8, other: u8| {
        let top = |byte: u8, logprob: f64| json!({ "token": char::from(byte).to_string(), "logprob": logprob, "bytes": [byte] });
        json!({ "token": char::from(byte).to_string(), "logprob": -0.25, "bytes": [byte],
                "top_logprobs": [top(byte, -0.25), top(other, -2.0)] })
    };
    let choice = json!({
        "index": 0, "finish_reason": "stop",
        "message": { "role": "assistant", "content": "ok" },
        "logprobs": { "content": [token(b'o', b'a'), token(b'k', b'b')] },
    });
    let reply = json!({ "id": "1", "object": "chat.completion", "created": 1, "model": "m",
                        "choices": [choice] });
    (200, reply)
}

/// Refuses story 3 permanently and answers all others.
fn story_3_refused(number: u64, asked: &str) -> (u16, Value) {
    match asked.contains("Story 3:") {
        true => (400, json!({ "error": { "message": "no third story" } })),
        false => ok(number, asked),
    }
}

fn refused(_: u64, _: &str) -> (u16, Value) {
    (401, json!({ "error": { "message": "" } }))
}

/// Builds a run with this server as the teacher.
fn run(server: &Server, signals: &str) -> Run {
    run_at(&format!("http://127.0.0.1:{}/v1", server.port), signals)
}

/// Builds a run with the teacher at this URL. The student learns from text alone if `signals` is empty.
pub(crate) fn run_at(url: &str, signals: &str) -> Run {
    let run = Run::new();
    run.edit(
        "path = \"model\"\ntemplate = \"plain\"\n",
        &format!(
            "url = \"{url}\"\nmodel = \"m\"\nkey_env = \"TEST_KEY\"\ntokenizer = \"model\"\ntemplate = \"plain\"\nprice = {{ input = 1000.0, output = 10000.0 }}\n"
        ),
    );
    run.edit(
        "samples = 2\n",
        "stream = false\nbackoff = 0.01\nlongest_backoff = 0.05\n",
    );
    run.edit("signals = { top_k = 6 }\n", signals);
    run.edit("[student]\n", "[student]\npath = \"model\"\n");
    if signals.is_empty() {
        run.edit(
            "[train]\n",
            "[train]\nloss = { forward_kl = 0.0, cross_entropy = 1.0 }\ncontrols = []\n",
        );
    }
    run
}

fn potstill(run: &Run, arguments: &[&str]) -> crate::fixture::CommandOutput {
    run.output(run.command(arguments).env("TEST_KEY", KEY))
}

fn answers(run: &Run) -> Vec<Completion> {
    let shard = run.path("runs/tiny/completions").join(shard_name(0));
    read_shard(&shard).unwrap().map(Result::unwrap).collect()
}

fn failures(run: &Run) -> Vec<Failed> {
    let shard = run.path("runs/tiny/failures").join(shard_name(0));
    read_shard(&shard).unwrap().map(Result::unwrap).collect()
}

/// Sums USD and tokens of all completed requests, and counts the requests.
fn ledger(run: &Run) -> (f64, u64, u64) {
    let text = std::fs::read_to_string(run.path("runs/tiny/requests.jsonl")).unwrap();
    let (mut usd, mut tokens, mut count) = (0.0, 0, 0);
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let over = &line["over"];
        if over.is_null() {
            continue;
        }
        usd += over["usd"].as_f64().unwrap();
        count += 1;
        if over["charge"] != "nothing" {
            let billed = &over["billed"];
            tokens += billed["prompt_tokens"].as_u64().unwrap();
            tokens += billed["completion_tokens"].as_u64().unwrap();
        }
    }
    (usd, tokens, count)
}

/// Returns one token, with log-probabilities of each prompt token and of one other token.
fn scored(_: u64, asked: &str) -> (u16, Value) {
    let ids: Vec<u32> = serde_json::from_str(asked).unwrap();
    let of = |id: &u32| {
        let other = if *id == 7 { 8 } else { 7 };
        let entry = |rank: u32| json!({ "logprob": -0.5 * f64::from(rank), "rank": rank, "decoded_token": "x" });
        json!({ id.to_string(): entry(1 + id % 2), other.to_string(): entry(2 - id % 2) })
    };
    let mut prompt: Vec<Value> = ids.iter().map(of).collect();
    prompt[0] = Value::Null;
    let choice =
        json!({ "index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": prompt });
    (
        200,
        json!({ "id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice] }),
    )
}

/// Builds a run in which the server scores the data's own answers.
fn scoring(server: &Server) -> Run {
    let run = run(server, "");
    let line = |i| {
        let answer = format!("and then {i}");
        json!({ "question": format!("Story {i}: once"), "answer": answer }).to_string() + "\n"
    };
    run.write("prompts.jsonl", &(0..12).map(line).collect::<String>());
    run.edit(
        "columns = { text = \"text\" }\n",
        "columns = { instruction = \"question\", output = \"answer\" }\nanswers = \"given\"\n",
    );
    run.edit("model = \"m\"\n", "model = \"m\"\ndialect = \"vllm\"\n");
    run.edit(
        "[curate]",
        "[score]\ntop_k = 2\n\n[budget]\nusd = 30\n\n[curate]",
    );
    run
}

fn signals(run: &Run) -> Vec<potstill::datasets::Signal> {
    let shard = run.path("runs/tiny/signals").join(shard_name(0));
    read_shard(&shard).unwrap().map(Result::unwrap).collect()
}

#[test]
fn given_answers_are_scored_whole_or_in_parts() {
    let server = Server::start(scored);
    let whole = scoring(&server);
    for stage in ["import", "collect"] {
        assert_eq!(potstill(&whole, &[stage, "run.toml"]).code, 0);
    }
    let dry = potstill(&whole, &["score", "run.toml", "--dry-run"]);
    assert_eq!((dry.code, server.requests()), (0, 0), "{}", dry.stderr);
    let begin = "12 answers to have scored by m: about ";
    assert!(dry.stdout.starts_with(begin), "{}", dry.stdout);
    let end = " without retries; capped at $30.00";
    assert!(dry.stdout.trim().ends_with(end), "{}", dry.stdout);
    let checked = potstill(&whole, &["check", "run.toml"]);
    assert!(
        checked.stdout.contains(dry.stdout.trim()),
        "{}",
        checked.stdout
    );
    let first = potstill(&whole, &["score", "run.toml"]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert_eq!(server.requests(), 12);
    let (usd, _, requests) = ledger(&whole);
    assert!(usd > 0.0 && requests == 12);
    let signals_of_whole = signals(&whole);
    assert_eq!(signals_of_whole.len(), 12);
    for signal in &signals_of_whole {
        signal.validate().unwrap();
        assert!(signal.rows.len() >= 10 && signal.rows.rows().all(|row| row.ids.len() == 2));
    }
    // This server's log-probabilities do not depend on the preceding tokens.
    let parts = scoring(&server);
    parts.edit("[score]\n", "[score]\nwindow = 8\n");
    for stage in ["import", "collect", "score"] {
        assert_eq!(potstill(&parts, &[stage, "run.toml"]).code, 0, "{stage}");
    }
    assert!(server.requests() > 12 + 24, "{}", server.requests());
    assert!(signals(&parts) == signals_of_whole);
}

#[test]
fn a_student_learns_from_a_served_teacher() {
    let server = Server::start(ok);
    let run = run(&server, "signals = { top_k = 2 }\n");
    let first = potstill(&run, &["run", "run.toml"]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert!(
        first.stderr.contains("12 answers to ask m for"),
        "{}",
        first.stderr
    );
    assert_eq!(server.requests(), 12);
    assert!(
        answers(&run)
            .iter()
            .all(|a| a.answer == "ok" && a.tokens.len() == 2)
    );
    let published = run.published();
    assert!(published.contains_key("signals/shard-00000.parquet"));
    let second = potstill(&run, &["run", "run.toml"]);
    assert_eq!(
        (second.code, server.requests()),
        (0, 12),
        "{}",
        second.stderr
    );
    // After prompts are added, only these are sent.
    run.write_prompts(15);
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let third = potstill(&run, &["collect", "run.toml"]);
    assert_eq!((third.code, server.requests()), (0, 15), "{}", third.stderr);
    assert_eq!(answers(&run).len(), 15);
}

#[test]
fn requests_jsonl_agrees_with_the_server() {
    let server = Server::start(ok);
    let run = run(&server, "");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let collected = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    let (prompt, answer) = *server.tokens.lock().unwrap();
    let (usd, tokens, requests) = ledger(&run);
    assert_eq!((tokens, requests), (prompt + answer, 12));
    let cost = prompt as f64 * 1e-3 + answer as f64 * 1e-2;
    assert!((usd - cost).abs() < 1e-9, "{usd} for {cost}");
}

#[test]
fn a_failure_is_a_row_and_can_be_retried() {
    let server = Server::start(story_3_refused);
    let run = run(&server, "");
    let first = potstill(&run, &["run", "run.toml"]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert!(first.stderr.contains("1 bad_request"), "{}", first.stderr);
    let failed = failures(&run);
    assert_eq!((answers(&run).len(), failed.len()), (11, 1));
    assert_eq!(failed[0].reason, "bad_request");
    assert!(
        failed[0].message.contains("no third story"),
        "{}",
        failed[0].message
    );
    let again = potstill(&run, &["collect", "run.toml"]);
    assert_eq!((again.code, server.requests()), (0, 12), "{}", again.stderr);
    let before = run.published();
    let retried = potstill(&run, &["collect", "run.toml", "--retry-failures"]);
    assert_eq!(
        (retried.code, server.requests()),
        (0, 13),
        "{}",
        retried.stderr
    );
    // `assert_eq` would print all bytes.
    assert!(run.published() == before);
}

/// Answers after 300 ms.
fn slow(number: u64, asked: &str) -> (u16, Value) {
    std::thread::sleep(Duration::from_millis(300));
    ok(number, asked)
}

/// Requests in flight complete and their answers are kept; no prompt is sent twice.
#[test]
fn ctrl_c_waits_for_requests_in_flight() {
    let server = Server::start(slow);
    let run = run(&server, "");
    run.edit("max_new_tokens", "concurrency = 3\nmax_new_tokens");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let mut command = run.command(&["collect", "run.toml"]);
    command.env("TEST_KEY", KEY).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let began = Instant::now();
    while server.requests() == 0 {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "no request was sent"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let (code, stderr) = interrupt(child);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains("hint: `potstill run run.toml` resumes"),
        "{stderr}"
    );
    let asked = server.requests();
    assert!((1..12).contains(&asked), "{asked}");
    let rest = potstill(&run, &["collect", "run.toml"]);
    assert_eq!((rest.code, server.requests()), (0, 12), "{}", rest.stderr);
    assert!(
        rest.stderr
            .contains(&format!("{asked} of 12 answers are there")),
        "{}",
        rest.stderr
    );
    assert_eq!(answers(&run).len(), 12);
}

/// The server's error message repeats the key, and becomes part of errors, tables and requests.jsonl.
#[test]
fn no_written_file_contains_the_key() {
    for answer in [refused, story_3_refused] {
        let server = Server::start(answer);
        let run = run(&server, "");
        assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
        let collected = potstill(&run, &["collect", "run.toml", "-v"]);
        assert!(server.requests() > 0);
        assert!(!collected.stderr.contains(KEY) && !collected.stdout.contains(KEY));
        let root = run.path("");
        let mut folders = vec![root];
        let mut files = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                files += 1;
                let bytes = std::fs::read(&path).unwrap();
                let has_key = bytes.windows(KEY.len()).any(|part| part == KEY.as_bytes());
                assert!(!has_key, "{}", path.display());
            }
        }
        assert!(files > 5);
    }
}

#[test]
fn a_run_stops_at_a_cap_and_resumes_after_it_is_raised() {
    let server = Server::start(ok);
    let run = run(&server, "");
    // 15 tokens of a prompt and 2 of an answer are 0.035 USD; 31 and 12 are reserved for each.
    run.edit("[curate]", "[budget]\nusd = 0.3\n\n[curate]");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let capped = potstill(&run, &["collect", "run.toml"]);
    assert_eq!(capped.code, 1, "{}", capped.stderr);
    assert!(
        capped.stderr.contains("the budget is used up"),
        "{}",
        capped.stderr
    );
    assert!(
        capped.stderr.contains("raise [budget]"),
        "{}",
        capped.stderr
    );
    let asked = server.requests();
    assert!((1..12).contains(&asked), "{asked}");
    let (usd, _, _) = ledger(&run);
    assert!(usd <= 0.3, "{usd}");
    run.edit("usd = 0.3", "usd = 3");
    let rest = potstill(&run, &["collect", "run.toml"]);
    assert_eq!((rest.code, server.requests()), (0, 12), "{}", rest.stderr);
    assert_eq!(answers(&run).len(), 12);
}

#[test]
fn a_dry_run_prints_a_forecast_and_sends_nothing() {
    let server = Server::start(ok);
    let run = run(&server, "");
    run.edit("[curate]", "[budget]\nusd = 3\nhours = 2\n\n[curate]");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let dry = potstill(&run, &["collect", "run.toml", "--dry-run"]);
    assert_eq!((dry.code, server.requests()), (0, 0), "{}", dry.stderr);
    let parts = [
        "12 answers to ask m for: about ",
        " tokens of prompts (at most ",
        "), at most 144 of answers, at most $",
        " without retries; capped at $3.000, 2 h",
    ];
    for part in parts {
        assert!(dry.stdout.contains(part), "{}", dry.stdout);
    }
    let checked = potstill(&run, &["check", "run.toml"]);
    assert_eq!(
        (checked.code, server.requests()),
        (0, 0),
        "{}",
        checked.stderr
    );
    assert!(
        checked.stdout.contains("12 answers to ask m for"),
        "{}",
        checked.stdout
    );
}

/// Progress output shows the caps and how much of them is used.
#[test]
fn progress_output_shows_cost_and_caps() {
    let server = Server::start(ok);
    let run = run(&server, "");
    run.edit("[curate]", "[budget]\nusd = 3\nrequests = 1000\n\n[curate]");
    assert_eq!(potstill(&run, &["import", "run.toml"]).code, 0);
    let collected = potstill(&run, &["collect", "run.toml", "--json"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    let note = collected.stdout.lines().find_map(|line| {
        let event: Value = serde_json::from_str(line).unwrap();
        (event["event"] == "progress").then(|| event["note"].as_str().unwrap().to_owned())
    });
    let note = note.unwrap_or_default();
    for part in ["of $3.000 spent", "of 1000 requests", "in flight"] {
        assert!(note.contains(part), "{note}");
    }
}

#[test]
fn settings_that_do_not_fit_a_server_are_refused() {
    let server = Server::start(ok);
    let cases: [(&str, &str, &[&str]); 8] = [
        ("model = \"m\"\n", "", &["[teacher]", "add `model`"]),
        (
            "tokenizer = \"model\"\n",
            "",
            &["name the folder of the model's tokenizer"],
        ),
        (
            "key_env = \"TEST_KEY\"",
            "key_env = \"sk-abc-def\"",
            &["`key_env` in [teacher]", "write the variable's name here"],
        ),
        (
            "[curate]",
            "[budget]\nusd = 1\n\n[curate]",
            &["`usd` in [budget]", "add `price"],
        ),
        (
            "top_k = 2 }",
            "top_k = 2, tail_draws = 5 }",
            &["leave `tail_draws` out"],
        ),
        ("top_k = 2 }", "top_k = 21 }", &["at most 20"]),
        (
            "model = \"m\"\n",
            "model = \"m\"\ntemplate_arguments = { enable_thinking = false }\n",
            &[
                "`template_arguments` in [teacher]",
                "name the server's `dialect`",
            ],
        ),
        (
            "model = \"m\"\n",
            "model = \"m\"\ndtype = \"bf16\"\n",
            &["`dtype` in [teacher]"],
        ),
    ];
    for (from, to, says) in cases {
        let run = run(&server, "signals = { top_k = 2 }\n");
        if to.contains("usd") {
            run.edit("price = { input = 1000.0, output = 10000.0 }\n", "");
        }
        run.edit(from, to);
        let checked = potstill(&run, &["check", "run.toml"]);
        assert_eq!(checked.code, 2, "{to}: {}", checked.stderr);
        for part in says {
            assert!(checked.stderr.contains(part), "{to}: {}", checked.stderr);
        }
        assert!(!checked.stderr.contains("sk-abc-def"), "{}", checked.stderr);
    }
    assert_eq!(server.requests(), 0);
}
