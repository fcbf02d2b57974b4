//! Collects many answers from a server, and prints speed and processor time as one line of JSON.
//!
//! `collect_many URL REQUESTS IN_FLIGHT PROMPT_BYTES MAX_TOKENS TOP_LOGPROBS` with -1 for no log-probabilities.
//! `benches/http_throughput.py` runs this program beside OpenAI's Python client.

// The program prints its measurements.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use potstill_datasets::{Message, Prompt, Role};
use potstill_teacher::http::{
    Api, BudgetSettings, Call, CallEvent, CallTask, ClientSettings, Dialect, Endpoint, OnBreak,
    OnLength, Price, RequestSettings, Spending, Timeouts, collect,
};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [url, requests, in_flight, prompt_bytes, max_tokens, top] = &args[..] else {
        return Err("URL REQUESTS IN_FLIGHT PROMPT_BYTES MAX_TOKENS TOP_LOGPROBS".into());
    };
    let requests: u64 = requests.parse()?;
    let prompt_bytes: usize = prompt_bytes.parse()?;
    let settings = settings(
        url,
        in_flight.parse()?,
        max_tokens.parse()?,
        top.parse::<i64>()?,
    );
    let begun = Instant::now();
    let (mut n, mut answers, mut failures, mut groups, mut tokens) = (0, 0_u64, 0_u64, 0_u64, 0);
    let ended = collect(
        &settings,
        &mut || {
            n += 1;
            Ok((n <= requests).then(|| call(n, prompt_bytes)))
        },
        &|_| Ok(()),
        &mut |events| {
            groups += 1;
            for event in events {
                match event {
                    CallEvent::Completed(completed) => match completed.result {
                        Ok(reply) => {
                            answers += 1;
                            tokens += reply.completion.tokens.len();
                        }
                        Err(failure) => {
                            if failures == 0 {
                                eprintln!("{failure:?}");
                            }
                            failures += 1;
                        }
                    },
                    CallEvent::Attempt(_) => {}
                }
            }
            Ok(ControlFlow::Continue(()))
        },
        &mut |_| {},
        &|| false,
    )?;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = cpu_seconds().unwrap_or(f64::NAN);
    println!(
        "{{\"ended\": \"{ended:?}\", \"answers\": {answers}, \"failures\": {failures}, \"tokens\": {tokens}, \"groups\": {groups}, \"seconds\": {seconds:.3}, \"cpu_seconds\": {cpu:.2}, \"requests_per_second\": {:.0}, \"cpu_us_per_request\": {:.1}}}",
        answers as f64 / seconds,
        cpu * 1e6 / answers as f64
    );
    Ok(())
}

fn call(n: u64, bytes: usize) -> Call {
    let text = format!("prompt {n}: {}", "words and words ".repeat(bytes / 16));
    Call {
        number: n,
        prompt: Arc::new(Prompt::new(
            vec![Message::text(Role::User, text)],
            None,
            None,
            format!("bench:{n}"),
        )),
        sample_index: 0,
        task: CallTask::Answer,
        max_prompt_tokens: bytes as u32,
    }
}

fn settings(url: &str, in_flight: u32, max_tokens: u32, top: i64) -> ClientSettings {
    ClientSettings {
        request: RequestSettings {
            model: "faulty".into(),
            dialect: Dialect::Openai,
            api: Api::Chat,
            reasoning_model: false,
            max_tokens: Some(max_tokens),
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            stop: Vec::new(),
            seed: None,
            logprobs: u32::try_from(top).ok(),
            stream: false,
            reasoning: None,
            template_arguments: Default::default(),
        },
        endpoints: vec![Endpoint {
            max_in_flight: Some(in_flight),
            ..Endpoint::new(url)
        }],
        timeouts: Timeouts::default(),
        attempts: 3,
        first_backoff_seconds: 0.5,
        max_backoff_seconds: 30.0,
        max_body_bytes: 64 << 20,
        caps: BudgetSettings {
            usd: Some(1e9),
            ..BudgetSettings::default()
        },
        spent: Spending::default(),
        price: Some(Price {
            input: 1.0,
            cached_input: None,
            output: 1.0,
        }),
        on_length: OnLength::Keep,
        on_break: OnBreak::Retry,
        jitter_seed: 0,
        offline: false,
    }
}

/// User and system time of this process, seconds, from Linux's `/proc`, which counts hundredths of a second.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}
