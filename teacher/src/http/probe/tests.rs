use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::http::{
    Api, BudgetSettings, Endpoint, OnBreak, OnLength, RequestSettings, Spending, Timeouts,
};

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
            template_arguments: Default::default(),
        },
        endpoints: vec![Endpoint {
            max_in_flight: Some(4),
            ..Endpoint::new(url)
        }],
        timeouts: Timeouts::default(),
        attempts: 1,
        first_backoff_seconds: 0.0,
        max_backoff_seconds: 0.0,
        max_body_bytes: 64 << 20,
        caps: BudgetSettings::default(),
        spent: Spending::default(),
        price: None,
        on_length: OnLength::Keep,
        on_break: OnBreak::Retry,
        jitter_seed: 1,
        offline: false,
    }
}

/// A recorded request and its response, which is JSON or the text of a stream.
#[derive(Clone)]
struct Exchange {
    method: String,
    path: String,
    request: Value,
    status: u64,
    response: Value,
}

/// Reads a recording. The fields of the request are in the exchange, or in an object of their own.
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

/// Serves recorded responses: the n-th time that a request is received, its n-th record. Requests without a record get
/// 404 and are noted.
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

/// The folder with recorded exchanges and models. Without it these tests print a note and check nothing.
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

/// The three quirks of llama-cpp-python that would spoil a training set unnoticed are found in its recorded responses.
#[test]
fn the_quirks_of_llama_cpp_python_are_found() {
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

/// Probes a replay of a real probe, and checks that no other request is sent than was recorded.
#[track_caller]
fn replayed(name: &str, model: &str) -> Probe {
    let (url, unknown) = replay(recording(&fixture(name)));
    let found = probe(&settings(&url, model), None, &mut |_| {}).unwrap();
    assert_eq!(*unknown.lock().unwrap(), Vec::<String>::new());
    // A saved probe is read back the same.
    let saved = serde_json::to_string(&found).unwrap();
    let read: Probe = serde_json::from_str(&saved).unwrap();
    assert_eq!(read.lines(), found.lines());
    assert_eq!(read.prompt_logprobs.through, found.prompt_logprobs.through);
    found
}

#[test]
fn vllm_is_recommended_for_logits() {
    let found = replayed("probe_vllm.json", "smollm2");
    let lines = found.lines().join("\n");
    assert_eq!(found.dialect, Some(Dialect::Vllm));
    assert_eq!(found.context, Some(2048));
    assert_eq!(found.logprobs.largest_k, 64, "{lines}");
    assert_eq!(found.logprobs.temperature, SamplingStage::Raw, "{lines}");
    assert_eq!(found.logprobs.penalty_by_default, Some(false), "{lines}");
    assert_eq!(
        found.logprobs.mode,
        Some(LogprobsMode::RawLogprobs),
        "{lines}"
    );
    assert!(!lines.contains("vllm serve"), "{lines}");
    assert_eq!(
        found.prompt_logprobs.through,
        ScoringApi::PromptLogprobs,
        "{lines}"
    );
    assert_eq!(found.prompt_logprobs.shift, Some(0), "{lines}");
    assert_eq!(found.prompt_logprobs.largest_k, 64, "{lines}");
    assert_eq!(found.prompt_logprobs.stale, Some(false), "{lines}");
    // The recording has one response for both requests.
    assert_eq!(found.prompt_logprobs.stale_difference, Some(0.0), "{lines}");
    assert!(found.tokens.ids, "{lines}");
    assert_eq!(found.usage.in_streams, Some(true), "{lines}");
    assert_eq!(found.usage.counts_all_prompts, Some(true), "{lines}");
    assert_eq!(found.recommended, Recommendation::Logits, "{lines}");
}

#[test]
fn the_quirks_of_llama_server_are_found() {
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

/// The recording of vLLM with the values of an answer's tokens as another `--logprobs-mode` gives them. Values of prompts
/// are never processed, and older versions give log-probabilities of them in every mode.
fn in_mode(mode: LogprobsMode, mut exchanges: Vec<Exchange>) -> Vec<Exchange> {
    for exchange in &mut exchanges {
        let logprobs = exchange.response.pointer_mut("/choices/0/logprobs");
        let Some(logprobs) = logprobs.filter(|logprobs| logprobs.is_object()) else {
            continue;
        };
        let temperature = exchange.request["temperature"].as_f64().unwrap();
        let has_penalty = exchange.request["frequency_penalty"] == 2;
        if let Some(content) = logprobs["content"].as_array_mut() {
            for (at, entry) in content.iter_mut().enumerate() {
                let mut top: Vec<f64> = entry["top_logprobs"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|top| top["logprob"].as_f64().unwrap())
                    .collect();
                let sampled = top
                    .iter()
                    .position(|v| entry["logprob"].as_f64() == Some(*v))
                    .unwrap();
                convert(mode, at, temperature, has_penalty, &mut top);
                entry["logprob"] = top[sampled].into();
                for (entry, value) in entry["top_logprobs"]
                    .as_array_mut()
                    .unwrap()
                    .iter_mut()
                    .zip(top)
                {
                    entry["logprob"] = value.into();
                }
            }
            continue;
        }
        let positions = logprobs["top_logprobs"].as_array().unwrap().clone();
        for (at, position) in positions.iter().enumerate() {
            let (names, mut top): (Vec<String>, Vec<f64>) = position
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, value)| (name.clone(), value.as_f64().unwrap()))
                .unzip();
            let sampled = names
                .iter()
                .position(|name| logprobs["tokens"][at] == **name)
                .unwrap();
            convert(mode, at, temperature, has_penalty, &mut top);
            logprobs["token_logprobs"][at] = top[sampled].into();
            logprobs["top_logprobs"][at] = names.into_iter().zip(top).collect();
        }
    }
    exchanges
}

/// Converts the log-probabilities of the most likely tokens at position `at` to the values of a mode.
fn convert(mode: LogprobsMode, at: usize, temperature: f64, has_penalty: bool, top: &mut [f64]) {
    if mode.is_processed() {
        let scale = if temperature > 0.0 { temperature } else { 1.0 };
        // Frequency penalties act on tokens that the answer has already, so not at its beginning.
        let penalty = if has_penalty && at > 0 { 3.0 } else { 0.0 };
        let last = top.len() - 1;
        for (rank, value) in top.iter_mut().enumerate() {
            *value = (*value - if rank == last { penalty } else { 0.0 }) / scale;
        }
        let mass: f64 = top.iter().map(|value| value.exp()).sum();
        if temperature != 1.0 && temperature > 0.0 {
            top.iter_mut().for_each(|value| *value -= mass.ln());
        }
    }
    if matches!(
        mode,
        LogprobsMode::RawLogits | LogprobsMode::ProcessedLogits
    ) {
        // The normaliser differs from position to position.
        top.iter_mut().for_each(|value| *value += 20.0 + at as f64);
    }
}

#[track_caller]
fn probed_in_mode(mode: LogprobsMode, temperature: Option<f64>) -> Probe {
    let (url, unknown) = replay(in_mode(mode, recording(&fixture("probe_vllm.json"))));
    let mut settings = settings(&url, "smollm2");
    settings.request.temperature = temperature;
    let found = probe(&settings, None, &mut |_| {}).unwrap();
    assert_eq!(*unknown.lock().unwrap(), Vec::<String>::new());
    assert_eq!(
        found.logprobs.mode,
        Some(mode),
        "{}",
        found.lines().join("\n")
    );
    found
}

#[test]
fn raw_logprobs_are_recommended_at_any_temperature() {
    for temperature in [None, Some(0.7), Some(1.0)] {
        let found = probed_in_mode(LogprobsMode::RawLogprobs, temperature);
        assert_eq!(found.recommended, Recommendation::Logits);
    }
}

#[test]
fn processed_logprobs_are_the_models_own_at_temperature_1_only() {
    let found = probed_in_mode(LogprobsMode::ProcessedLogprobs, Some(1.0));
    let lines = found.lines().join("\n");
    assert_eq!(found.logprobs.kind, LogprobKind::Real, "{lines}");
    assert_eq!(found.recommended, Recommendation::Logits, "{lines}");
    assert!(!lines.contains("vllm serve"), "{lines}");
    assert!(
        lines.contains("the loss has to use temperature 1"),
        "{lines}"
    );
    let found = probed_in_mode(LogprobsMode::ProcessedLogprobs, Some(0.7));
    let lines = found.lines().join("\n");
    assert_eq!(found.recommended, Recommendation::Traces, "{lines}");
    for text in [
        "processed_logprobs: the distribution after penalties",
        "set `temperature = 1.0`",
        "start the server with `vllm serve smollm2 --logprobs-mode raw_logprobs`",
    ] {
        assert!(lines.contains(text), "{text}: {lines}");
    }
}

#[test]
fn logits_are_recognised_and_not_recommended() {
    for mode in [LogprobsMode::RawLogits, LogprobsMode::ProcessedLogits] {
        let found = probed_in_mode(mode, Some(1.0));
        let lines = found.lines().join("\n");
        assert_eq!(found.logprobs.kind, LogprobKind::Logits, "{lines}");
        assert_eq!(found.recommended, Recommendation::Traces, "{lines}");
        assert!(lines.contains("--logprobs-mode raw_logprobs"), "{lines}");
        // The values of the prompts are log-probabilities, and found at their positions in spite of the difference.
        assert_eq!(found.prompt_logprobs.kind, LogprobKind::Real, "{lines}");
        assert_eq!(found.prompt_logprobs.shift, Some(0), "{lines}");
    }
}

#[test]
fn a_stated_mode_is_used_without_measurements_and_compared_with_them() {
    let stated = |mode: &str, remove_logprobs: bool| {
        let mut exchanges = recording(&fixture("probe_vllm.json"));
        for exchange in &mut exchanges {
            if exchange.path.starts_with("/server_info") {
                exchange.status = 200;
                exchange.response = serde_json::json!({ "vllm_config": { "model_config": { "logprobs_mode": mode } } });
            } else if remove_logprobs && exchange.response.pointer("/choices/0").is_some() {
                exchange.response["choices"][0]["logprobs"] = Value::Null;
            }
        }
        let (url, _) = replay(exchanges);
        probe(&settings(&url, "smollm2"), None, &mut |_| {}).unwrap()
    };
    let found = stated("processed_logprobs", false);
    assert_eq!(found.logprobs.mode, Some(LogprobsMode::RawLogprobs));
    let lines = found.lines().join("\n");
    assert!(
        lines.contains("the server states `--logprobs-mode processed_logprobs`"),
        "{lines}"
    );
    let found = stated("raw_logits", true);
    assert_eq!(found.logprobs.mode, Some(LogprobsMode::RawLogits));
}

/// Logits below 0 have a tiny mass that differs between positions.
#[test]
fn logits_are_told_from_log_probabilities() {
    let position = |values: &[f64]| positions::PositionLogprobs {
        logprob: values.first().copied(),
        top: values
            .iter()
            .map(|value| (value.to_string(), *value))
            .collect(),
        ..positions::PositionLogprobs::default()
    };
    let kind = |tops: &[&[f64]]| {
        let positions: Vec<_> = tops.iter().map(|top| position(top)).collect();
        positions::kind(&positions)
    };
    assert_eq!(
        kind(&[&[21.5, 20.25, 3.0], &[17.0, 16.5, 2.0]]),
        LogprobKind::Logits
    );
    assert_eq!(
        kind(&[&[-31.0, -32.5], &[-35.0, -36.5]]),
        LogprobKind::Logits
    );
    assert_eq!(
        kind(&[&[20.25, 21.5], &[17.0, 16.5]]),
        LogprobKind::Impossible
    );
    assert_eq!(kind(&[&[-6.0, -7.5], &[-0.2, -3.5]]), LogprobKind::Real);
}

/// An unreachable server and offline mode are errors; filled-in log-probabilities are a finding.
#[test]
fn an_unreachable_server_is_an_error_and_filled_in_values_are_a_finding() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let error = probe(
        &settings(&format!("http://{free}/v1"), "m"),
        None,
        &mut |_| {},
    );
    let message = error.unwrap_err().to_string();
    assert!(
        message.starts_with(&format!("endpoint `{free}/v1`: connect")),
        "{message}"
    );
    let mut offline = settings("http://127.0.0.1:9/v1", "m");
    offline.offline = true;
    assert!(matches!(
        probe(&offline, None, &mut |_| {}),
        Err(Error::Offline)
    ));
    let position = |values: [f64; 2]| positions::PositionLogprobs {
        logprob: Some(values[0]),
        top: vec![("a".into(), values[0]), ("b".into(), values[1])],
        ..positions::PositionLogprobs::default()
    };
    assert_eq!(positions::kind(&[]), LogprobKind::Missing);
    assert_eq!(
        positions::kind(&[position([0.0, 0.0])]),
        LogprobKind::Placeholder
    );
    assert_eq!(
        positions::kind(&[position([0.0, -9999.0])]),
        LogprobKind::Placeholder
    );
    assert_eq!(
        positions::kind(&[position([-0.1, 0.5])]),
        LogprobKind::Impossible
    );
    assert_eq!(
        positions::kind(&[position([-0.1, -0.2])]),
        LogprobKind::Impossible
    );
    assert_eq!(
        positions::kind(&[position([-0.1, -3.0])]),
        LogprobKind::Real
    );
}

/// Temperature 0.5 doubles differences of log-probabilities if it acts on them.
#[test]
fn temperature_is_recognised_from_differences() {
    let position = |values: &[f64]| {
        let named = values
            .iter()
            .enumerate()
            .map(|(at, value)| (at.to_string(), *value));
        positions::PositionLogprobs {
            top: named.collect(),
            ..positions::PositionLogprobs::default()
        }
    };
    let one = position(&[-0.5, -1.5, -3.0, -4.0]);
    let slope = |values: &[f64]| positions::slope(&one, &position(values)).unwrap();
    assert!((slope(&[-0.45, -1.5, -3.02, -4.0]) - 1.0).abs() < 0.05);
    assert!((slope(&[-0.2, -2.2, -5.2, -7.2]) - 2.0).abs() < 1e-9);
}

/// Probes the server that POTSTILL_PROBE names as `url model`, and prints the findings.
#[test]
fn a_real_server_is_probed() {
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
