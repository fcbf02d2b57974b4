//! Helpers to run a collection against a test server, and to record its results.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use potstill_datasets::{Message, Prompt, Role};
use potstill_teacher::Error;
use potstill_teacher::http::{
    Api, Attempt, BudgetSettings, Call, CallEvent, CallTask, ClientSettings, CollectProgress,
    CollectionEnd, CompletedCall, Dialect, Endpoint, OnBreak, OnLength, Price, RequestSettings,
    Reservation, Spending, Timeouts, collect,
};
use tokio::runtime::Runtime;

use super::server::{Plan, Server, hash};

/// A test server with the threads that it runs on.
pub(crate) struct Running {
    pub(crate) server: Server,
    _runtime: Runtime,
}

pub(crate) fn start(plan: Plan) -> Running {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    Running {
        server: runtime.block_on(Server::start(plan)).unwrap(),
        _runtime: runtime,
    }
}

pub(crate) const PRICE: Price = Price {
    input: 1.0,
    cached_input: None,
    output: 4.0,
};

pub(crate) fn endpoint(url: String) -> Endpoint {
    Endpoint {
        max_in_flight: Some(32),
        ..Endpoint::new(url)
    }
}

/// Settings with short waits.
pub(crate) fn settings(url: String) -> ClientSettings {
    ClientSettings {
        request: RequestSettings {
            model: "faulty".into(),
            dialect: Dialect::Openai,
            api: Api::Chat,
            reasoning_model: false,
            max_tokens: Some(16),
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
        endpoints: vec![endpoint(url)],
        timeouts: Timeouts {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(20),
            idle: Duration::from_secs(20),
            whole: Duration::from_secs(60),
        },
        attempts: 4,
        first_backoff_seconds: 0.01,
        max_backoff_seconds: 0.1,
        max_body_bytes: 1 << 20,
        caps: BudgetSettings::default(),
        spent: Spending::default(),
        price: Some(PRICE),
        on_length: OnLength::Keep,
        on_break: OnBreak::Retry,
        jitter_seed: 7,
        offline: false,
    }
}

/// Number of words of every prompt, which the server counts as tokens.
pub(crate) const PROMPT_TOKENS: u32 = 5;

pub(crate) fn text(n: u64) -> String {
    format!("this is prompt number {n}")
}

pub(crate) fn call(n: u64) -> Call {
    let messages = vec![Message::text(Role::User, text(n))];
    Call {
        number: n,
        prompt: Arc::new(Prompt::new(messages, None, None, format!("test:{n}"))),
        sample_index: 0,
        task: CallTask::Answer,
        max_prompt_tokens: PROMPT_TOKENS,
    }
}

/// The server's key of a prompt.
pub(crate) fn key(n: u64) -> u64 {
    hash(&[text(n).as_bytes(), b""])
}

/// First word of the answer to a prompt.
pub(crate) fn first_word(n: u64) -> String {
    let drawn = hash(&[&key(n).to_le_bytes(), &0_u64.to_le_bytes()]);
    format!("{drawn:016x}")[..7].to_owned()
}

/// Record of all that a collection reported.
pub(crate) struct RunRecord {
    pub(crate) end: Result<CollectionEnd, Error>,
    pub(crate) completed: Vec<CompletedCall>,
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) sent: Vec<Reservation>,
    pub(crate) progress: CollectProgress,
}

impl RunRecord {
    pub(crate) fn answers(&self) -> usize {
        self.completed.iter().filter(|c| c.result.is_ok()).count()
    }
}

pub(crate) fn run(settings: &ClientSettings, calls: u64) -> RunRecord {
    run_until(settings, calls, |_| false)
}

pub(crate) fn run_calls(settings: &ClientSettings, calls: Vec<Call>) -> RunRecord {
    let mut calls = calls.into_iter();
    run_with(settings, || calls.next(), |_| false)
}

/// Runs a collection until `stop` returns true for the number of completed calls.
pub(crate) fn run_until(
    settings: &ClientSettings,
    calls: u64,
    stop: impl Fn(usize) -> bool,
) -> RunRecord {
    let mut numbers = 1..=calls;
    run_with(settings, || numbers.next().map(call), stop)
}

fn run_with(
    settings: &ClientSettings,
    mut next: impl FnMut() -> Option<Call>,
    stop: impl Fn(usize) -> bool,
) -> RunRecord {
    let (mut completed, mut attempts) = (Vec::new(), Vec::new());
    let sent = Mutex::new(Vec::new());
    let mut progress = CollectProgress::default();
    let count = std::cell::Cell::new(0);
    let ended = collect(
        settings,
        &mut || Ok(next()),
        &|s| {
            sent.lock().unwrap().push(s.clone());
            Ok(())
        },
        &mut |events| {
            for event in events {
                match event {
                    CallEvent::Attempt(attempt) => attempts.push(attempt),
                    CallEvent::Completed(one) => completed.push(*one),
                }
            }
            count.set(completed.len());
            Ok(ControlFlow::Continue(()))
        },
        &mut |p| progress = *p,
        &|| stop(count.get()),
    );
    RunRecord {
        end: ended,
        completed,
        attempts,
        sent: sent.into_inner().unwrap(),
        progress,
    }
}
