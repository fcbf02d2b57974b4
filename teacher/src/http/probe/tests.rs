use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::http::{Api, Caps, Endpoint, OnBreak, OnLength, RequestSettings, Spending, Timeouts};

fn settings(url: &str, model: &str) -> ClientSettings {
    ClientSettings {
        request: RequestSettings {
            model: model.into(),
            dialect: Dialect::Openai,
            api: Api::Chat,
            reasoning_model: false,
            max_tokens: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            stop: Vec::new(),
            seed: None,
            logprobs: None,
            stream: false,
            reasoning: None,
        },
        endpoints: vec![Endpoint {
            name: "probed".into(),
            url: url.into(),
            key: None,
            weight: 1.0,
            requests_per_minute: None,
            tokens_per_minute: None,
            max_in_flight: 4,
            allow_plain_http: false,
        }],
        timeouts: Timeouts::default(),
        attempts: 1,
        first_backoff_seconds: 0.0,
        max_backoff_seconds: 0.0,
        max_body_bytes: 64 << 20,
        caps: Caps::default(),
        spent: Spending::default(),
        price: None,
        on_length: OnLength::Keep,
        on_break: OnBreak::Retry,
        jitter_seed: 1,
        offline: false,
    }
}

/// One exchange of a recording; a response is JSON, or the text of a stream.
struct Exchange {
    method: String,
    path: String,
    request: Value,
    status: u64,
    response: Value,
}

/// A recording: exchanges side by side, or with the request in an object of its own.
fn recording(path: &Path) -> Vec<Exchange> {
    let text = std::fs::read_to_string(path).unwrap();
    let list: Vec<Value> = serde_json::from_str(&text).unwrap();
    let exchange = |entry: &Value| {
        let nested = &entry["request"];
        let is_nested = nested.get("path").is_some();
        let client = if is_nested { nested } else { entry };
        Exchange {
            method: client["method"].as_str().unwrap().into(),
            path: client["path"].as_str().unwrap().into(),
            request: client[if is_nested { "body" } else { "request" }].clone(),
            status: entry["status"].as_u64().unwrap(),
            response: entry["response"].clone(),
        }
    };
    list.iter().map(exchange).collect()
}

/// Answers as recorded; the n-th time a request comes, its n-th record. What was not recorded is refused with 404,
/// and noted.
fn replay(exchanges: Vec<Exchange>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let unknown = Arc::new(Mutex::new(Vec::new()));
    let noted = unknown.clone();
    std::thread::spawn(move || {
        let mut times = std::collections::HashMap::new();
        for stream in listener.incoming().flatten() {
            let _ = serve(stream, &exchanges, &mut times, &noted);
        }
    });
    (url, unknown)
}

fn serve(
    mut stream: TcpStream,
    exchanges: &[Exchange],
    times: &mut std::collections::HashMap<String, usize>,
    noted: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        if header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    let mut same = exchanges
        .iter()
        .filter(|e| e.method == method && e.path == path && e.request == request);
    let time = times
        .entry(format!("{method} {path} {request}"))
        .or_default();
    let (status, response) = match same.clone().nth(*time).or(same.next_back()) {
        Some(exchange) => (exchange.status, exchange.response.clone()),
        None => {
            noted
                .lock()
                .unwrap()
                .push(format!("{method} {path} {request}"));
            (
                404,
                serde_json::json!({ "error": { "message": "not recorded" } }),
            )
        }
    };
    *time += 1;
    let body = match response {
        Value::String(text) => text,
        json => json.to_string(),
    };
    write!(
        stream,
        "HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The folder with recorded exchanges and models; without it these tests say so and check nothing.
fn real() -> Option<PathBuf> {
    let folder = std::env::var_os("POTSTILL_REAL").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: POTSTILL_REAL names no folder with recorded exchanges");
    }
    folder
}

fn local(real: &Path) -> Option<(Tokenizer, ChatTemplate)> {
    let models = std::env::var_os("POTSTILL_MODELS").map(PathBuf::from);
    let folders = models.into_iter().chain([real.join("models")]);
    let dir = folders
        .map(|models| models.join("SmolLM2-135M-Instruct"))
        .find(|dir| dir.join("tokenizer.json").exists())?;
    let template = ChatTemplate::from_dir(&dir).unwrap()?;
    Some((Tokenizer::from_dir(&dir).unwrap(), template))
}

/// The three quirks of llama-cpp-python that ruin a training set unseen, from what it really answered.
#[test]
fn llama_cpp_python_is_seen_through() {
    let Some(real) = real() else { return };
    let (url, _) = replay(recording(&real.join("ref/llamacpp_responses.json")));
    let local = local(&real);
    let given = local
        .as_ref()
        .map(|(tokenizer, template)| (tokenizer, template));
    let found = probe(&settings(&url, "smollm2-135m"), given, &mut |_| {}).unwrap();
    let lines = found.lines().join("\n");
    assert_eq!(found.dialect, Some(Dialect::LlamaCppPython));
    assert!(found.chat && found.completions, "{lines}");
    assert_eq!(found.logprobs.kind, LogprobKind::Real, "{lines}");
    assert_eq!(found.logprobs.largest_k, 64, "{lines}");
    assert_eq!(found.logprobs.penalty_by_default, Some(true), "{lines}");
    assert_eq!(found.prompt_logprobs.through, ScoringApi::Echo, "{lines}");
    assert_eq!(found.prompt_logprobs.shift, Some(-1), "{lines}");
    assert!(
        !found.tokens.ids && !found.tokens.bytes && !found.tokens.id_prompts,
        "{lines}"
    );
    if local.is_some() {
        assert_eq!(found.tokens.same_as_local, Some(true), "{lines}");
        assert_eq!(found.tokens.same_template, Some(true), "{lines}");
    }
    assert!(
        found.quirks.iter().any(|quirk| quirk.contains("`n = 2`")),
        "{lines}"
    );
    assert_eq!(found.recommended, Recommendation::Logits, "{lines}");
}

/// The exchanges of a real probe, replayed: nothing else is asked than what was then.
#[track_caller]
fn replayed(name: &str, model: &str) -> Probe {
    let (url, unknown) = replay(recording(&fixture(name)));
    let found = probe(&settings(&url, model), None, &mut |_| {}).unwrap();
    assert_eq!(*unknown.lock().unwrap(), Vec::<String>::new());
    // What is saved is what is checked later.
    let saved = serde_json::to_string(&found).unwrap();
    let read: Probe = serde_json::from_str(&saved).unwrap();
    assert_eq!(read.lines(), found.lines());
    assert_eq!(read.prompt_logprobs.through, found.prompt_logprobs.through);
    found
}

#[test]
fn vllm_is_found_good_for_logits() {
    let found = replayed("probe_vllm.json", "smollm2");
    let lines = found.lines().join("\n");
    assert_eq!(found.dialect, Some(Dialect::Vllm));
    assert_eq!(found.context, Some(2048));
    assert_eq!(found.logprobs.largest_k, 64, "{lines}");
    assert_eq!(found.logprobs.temperature, SamplingStage::Raw, "{lines}");
    assert_eq!(found.logprobs.penalty_by_default, Some(false), "{lines}");
    assert_eq!(
        found.prompt_logprobs.through,
        ScoringApi::PromptLogprobs,
        "{lines}"
    );
    assert_eq!(found.prompt_logprobs.shift, Some(0), "{lines}");
    assert_eq!(found.prompt_logprobs.largest_k, 64, "{lines}");
    assert_eq!(found.prompt_logprobs.stale, Some(false), "{lines}");
    // The two replies are the same one.
    assert_eq!(found.prompt_logprobs.stale_difference, Some(0.0), "{lines}");
    assert!(found.tokens.ids, "{lines}");
    assert_eq!(found.usage.in_streams, Some(true), "{lines}");
    assert_eq!(found.usage.counts_all_prompts, Some(true), "{lines}");
    assert_eq!(found.recommended, Recommendation::Logits, "{lines}");
}

#[test]
fn llama_server_is_seen_through() {
    let found = replayed("probe_llama_server.json", "smollm2-135m");
    let lines = found.lines().join("\n");
    assert_eq!(found.dialect, Some(Dialect::LlamaServer));
    assert_eq!(found.logprobs.kind, LogprobKind::Real, "{lines}");
    assert!(found.logprobs.largest_k >= 64, "{lines}");
    assert_eq!(
        found.prompt_logprobs.through,
        ScoringApi::Nothing,
        "{lines}"
    );
    assert_eq!(found.usage.counts_all_prompts, Some(false), "{lines}");
    assert!(
        found.tokens.ids && found.tokens.top_ids && found.tokens.bytes,
        "{lines}"
    );
    assert_eq!(found.recommended, Recommendation::Logits, "{lines}");
}

/// A server that nobody listens at, and one that lets nobody in, are errors; a field that is filled in is none.
#[test]
fn what_cannot_be_asked_is_an_error_and_what_is_filled_in_is_a_finding() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = probe(
        &settings(&format!("http://{free}/v1"), "m"),
        None,
        &mut |_| {},
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .starts_with("endpoint `probed`: connect")
    );
    let mut offline = settings("http://127.0.0.1:9/v1", "m");
    offline.offline = true;
    assert!(matches!(
        probe(&offline, None, &mut |_| {}),
        Err(Error::Offline)
    ));
    let position = |values: [f64; 2]| read::PositionLogprobs {
        logprob: Some(values[0]),
        top: vec![("a".into(), values[0]), ("b".into(), values[1])],
        ..read::PositionLogprobs::default()
    };
    assert_eq!(read::kind(&[]), LogprobKind::Missing);
    assert_eq!(
        read::kind(&[position([0.0, 0.0])]),
        LogprobKind::Placeholder
    );
    assert_eq!(
        read::kind(&[position([0.0, -9999.0])]),
        LogprobKind::Placeholder
    );
    assert_eq!(
        read::kind(&[position([-0.1, 0.5])]),
        LogprobKind::Impossible
    );
    assert_eq!(
        read::kind(&[position([-0.1, -0.2])]),
        LogprobKind::Impossible
    );
    assert_eq!(read::kind(&[position([-0.1, -3.0])]), LogprobKind::Real);
}

/// Temperature 0.5 doubles differences where it acts on log-probabilities.
#[test]
fn the_scale_is_told_from_differences() {
    let position = |values: &[f64]| {
        let named = values
            .iter()
            .enumerate()
            .map(|(at, value)| (at.to_string(), *value));
        read::PositionLogprobs {
            top: named.collect(),
            ..read::PositionLogprobs::default()
        }
    };
    let one = position(&[-0.5, -1.5, -3.0, -4.0]);
    let slope = |values: &[f64]| read::slope(&one, &position(values)).unwrap();
    assert!((slope(&[-0.45, -1.5, -3.02, -4.0]) - 1.0).abs() < 0.05);
    assert!((slope(&[-0.2, -2.2, -5.2, -7.2]) - 2.0).abs() < 1e-9);
}

/// Asks the server that POTSTILL_PROBE names as `url model`, and shows what it finds.
#[test]
fn a_real_server_is_asked() {
    let Ok(named) = std::env::var("POTSTILL_PROBE") else {
        eprintln!("skipped: POTSTILL_PROBE names no server (`http://127.0.0.1:8140/v1 smollm2`)");
        return;
    };
    let (url, model) = named.split_once(' ').unwrap();
    let local = real().as_deref().and_then(local);
    let given = local
        .as_ref()
        .map(|(tokenizer, template)| (tokenizer, template));
    let found = probe(&settings(url, model), given, &mut |what| {
        eprintln!("{what}")
    })
    .unwrap();
    eprintln!("{}", found.lines().join("\n"));
    assert!(found.chat || found.completions);
}
