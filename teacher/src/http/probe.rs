//! Finds out what an endpoint can do before money is spent on it.
//!
//! A probe sends some thirty short requests of a few tokens each. Nothing is assumed about a server's abilities: the
//! engine that the server names decides only which fields are tried.

mod advice;
mod answers;
mod client;
mod mode;
mod positions;
mod prompts;
mod report;

use potstill_datasets::{ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::transport::EndpointClient;
use super::{ClientSettings, Dialect, Failure, FailureReason, TextKind, TokenUsage};
use crate::Error;
use client::{ProbeClient, ProbeResponse};

pub use mode::LogprobsMode;

/// Findings of a probe of an endpoint; `None` for what could not be found out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Probe {
    /// Base URL of the endpoint.
    pub url: String,
    /// Name of the model.
    pub model: String,
    /// The server's variant of the protocol, as far as it is known.
    pub dialect: Option<Dialect>,
    /// Engine and version that the server names.
    pub engine: Option<String>,
    /// Context length: prompt and answer together, tokens.
    pub context: Option<u32>,
    /// Whether the chat API answers.
    pub chat: bool,
    /// Whether the completions API answers.
    pub completions: bool,
    /// Log-probabilities of answers.
    pub logprobs: AnswerLogprobs,
    /// Log-probabilities of prompts.
    pub prompt_logprobs: PromptScoring,
    /// Findings about tokens: ids, bytes, and whether they are those of the local tokenizer.
    pub tokens: TokenFindings,
    /// Largest difference of a log-probability between two equal requests at temperature 0, nats.
    pub repeat_difference: Option<f64>,
    /// Whether two equal requests at temperature 0 get the same text.
    pub deterministic: Option<bool>,
    /// Findings about `usage`.
    pub usage: UsageFindings,
    /// Speed with one request at a time.
    pub speeds: Vec<AnswerSpeed>,
    /// Unexpected behaviour, a sentence each.
    pub quirks: Vec<String>,
    /// Recommended use.
    pub recommended: Recommendation,
    /// Obstacles to a better use and how to remove them, a sentence each.
    pub change: Vec<String>,
    /// Token counts of the probe.
    pub spent: TokenUsage,
    /// Number of requests of the probe.
    pub requests: u64,
}

/// Log-probabilities of sampled tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AnswerLogprobs {
    /// Class of the values.
    pub kind: LogprobKind,
    /// Largest number of most likely tokens that was received, among the numbers tried.
    pub largest_k: u32,
    /// The server's error message for a larger number.
    pub limit_said: Option<String>,
    /// Whether the values are taken before or after temperature.
    pub temperature: SamplingStage,
    /// Whether the values are taken before or after penalties on repeated tokens.
    pub penalties: SamplingStage,
    /// Whether a penalty on repeated tokens is on unless the request turns it off.
    pub penalty_by_default: Option<bool>,
    /// The quantity in terms of vLLM's `--logprobs-mode`, measured or else stated by the server.
    pub mode: Option<LogprobsMode>,
}

impl AnswerLogprobs {
    /// Whether the values depend on the sampling settings of the request.
    #[must_use]
    pub fn is_processed(&self) -> bool {
        self.mode.is_some_and(LogprobsMode::is_processed)
            || self.temperature == SamplingStage::Processed
            || self.penalties == SamplingStage::Processed
    }
}

/// Class of the values that a server gives as log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobKind {
    /// There are no values.
    #[default]
    Missing,
    /// All values are 0, equal or −9999: a field that is filled in, not measured.
    Placeholder,
    /// Values are above 0, or have a mass above 1.
    Impossible,
    /// The values are ordered as those of a model, but not normalised.
    Logits,
    /// The values are log-probabilities of a distribution.
    Real,
}

impl LogprobKind {
    /// Whether the values come from a model.
    pub(super) fn is_measured(self) -> bool {
        matches!(self, LogprobKind::Real | LogprobKind::Logits)
    }
}

/// Whether log-probabilities are taken before or after a step of sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingStage {
    /// The measurement was not conclusive.
    #[default]
    Unknown,
    /// Before the step.
    Raw,
    /// After the step.
    Processed,
}

/// Log-probabilities of prompts.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PromptScoring {
    /// API that gives the values.
    pub through: ScoringApi,
    /// Class of the values.
    pub kind: LogprobKind,
    /// Largest number of most likely tokens that was received, among the numbers tried.
    pub largest_k: u32,
    /// The server's error message for a larger number.
    pub limit_said: Option<String>,
    /// Number of positions by which the values are late: 0 is right; at −1 the distribution that predicts a token is at
    /// the token before. `None` if the values match those of answers at no position.
    pub shift: Option<i32>,
    /// Mean difference at that shift from the values of the answer with the same text, nats.
    pub difference: Option<f64>,
    /// Whether the same text gets other values, or fewer, while it is cached.
    pub stale: Option<bool>,
    /// Largest difference between the two, nats.
    pub stale_difference: Option<f64>,
}

/// The API that gives log-probabilities of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringApi {
    /// No API gives them.
    #[default]
    Nothing,
    /// The field `prompt_logprobs`, as in vLLM.
    PromptLogprobs,
    /// The field `echo` with `logprobs`.
    Echo,
    /// SGLang's `/generate`.
    Generate,
}

/// Findings about tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TokenFindings {
    /// Whether responses contain the ids of an answer.
    pub ids: bool,
    /// Whether responses contain the ids of the most likely tokens.
    pub top_ids: bool,
    /// Whether responses contain tokens as bytes, so that parts of characters are preserved.
    pub bytes: bool,
    /// Whether a prompt may be token ids.
    pub id_prompts: bool,
    /// Whether the server's tokens are those of the local tokenizer.
    pub same_as_local: Option<bool>,
    /// Whether the server renders a chat as the local template does.
    pub same_template: Option<bool>,
}

/// Findings about `usage`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UsageFindings {
    /// Whether responses contain it.
    pub present: bool,
    /// Whether streams contain it if it is requested.
    pub in_streams: Option<bool>,
    /// Whether the number of the prompt's tokens is that of the local tokenizer.
    pub prompt_right: Option<bool>,
    /// Whether the number of the answer's tokens is that of the tokens received.
    pub completion_right: Option<bool>,
    /// Whether the answers of several prompts in one request are all counted.
    pub counts_all_prompts: Option<bool>,
}

/// Speed of answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AnswerSpeed {
    /// Number of most likely tokens that was requested; `None` for text alone.
    pub k: Option<u32>,
    /// Tokens a second of one answer.
    pub tokens_per_second: f64,
    /// Bytes of the response for each token.
    pub bytes_per_token: f64,
}

/// Recommended use of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recommendation {
    /// Train on the text, by cross-entropy.
    #[default]
    Traces,
    /// Train on the log-probabilities, by a divergence.
    Logits,
}

/// Probes the first endpoint of `settings`. `local` is the teacher's tokenizer and template, if they are available;
/// without them tokens and templates are not compared. `show_step` receives the name of each step.
///
/// # Errors
/// An endpoint with wrong settings, one that cannot be reached, or one that refuses the key. Other refusals and defects of
/// a server are findings.
pub fn probe(
    settings: &ClientSettings,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    show_step: &mut dyn FnMut(&str),
) -> Result<Probe, Error> {
    if settings.offline {
        return Err(Error::Offline);
    }
    let Some(endpoint) = settings.endpoints.first() else {
        return Err(Error::Collection {
            why: "no endpoint is given\nhint: set `url`".into(),
        });
    };
    let refused = |why: String| Error::Endpoint {
        endpoint: endpoint.name().to_owned(),
        why,
    };
    let mut client = ProbeClient {
        endpoint: EndpointClient::new(endpoint, settings.timeouts, settings.max_body_bytes)?,
        settings: &settings.request,
        nonce: settings.jitter_seed,
        spent: TokenUsage::default(),
        requests: 0,
    };
    let mut probe = Probe {
        url: endpoint.url.clone(),
        model: settings.request.model.clone(),
        ..Probe::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| refused(format!("cannot start a runtime: {error}")))?;
    runtime
        .block_on(run_steps(&mut client, &mut probe, local, show_step))
        .map_err(|failure| refused(format!("{}: {}", failure.reason.name(), failure.message)))?;
    if let Some(key) = &endpoint.key {
        for text in probe.engine.iter_mut().chain(&mut probe.quirks) {
            key.scrub(text, TextKind::Message);
        }
    }
    probe.spent = client.spent;
    probe.requests = client.requests;
    advice::conclude(&mut probe, &settings.request);
    Ok(probe)
}

async fn run_steps(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    show_step: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    show_step("the server's engine");
    identify(client, probe).await?;
    show_step("a chat with log-probabilities");
    let first = answers::first(client, probe).await?;
    let mut begin = |step: &'static str| {
        show_step(step);
        step
    };
    let step = begin("a continuation");
    let result = prompts::continuation(client, probe).await;
    let answer = noted(probe, step, result)?.unwrap_or_default();
    if probe.logprobs.kind.is_measured() {
        let step = begin("the number of most likely tokens");
        let result = answers::largest_k(client, probe).await;
        noted(probe, step, result)?;
        let step = begin("temperature");
        let result = answers::temperature(client, probe).await;
        noted(probe, step, result)?;
    }
    let step = begin("penalties");
    let result = answers::penalties(client, probe).await;
    noted(probe, step, result)?;
    let step = begin("log-probabilities of prompts");
    let result = prompts::prompt_logprobs(client, probe, &answer).await;
    noted(probe, step, result)?;
    let step = begin("tokens and template");
    let result = prompts::tokens(client, probe, local, &first, &answer).await;
    noted(probe, step, result)?;
    let step = begin("usage");
    let result = answers::counts(client, probe).await;
    noted(probe, step, result)?;
    let step = begin("speed");
    let result = answers::speeds(client, probe).await;
    noted(probe, step, result)?;
    Ok(())
}

/// Turns the failure of a step into a finding, unless it means that no further request can succeed.
fn noted<T>(
    probe: &mut Probe,
    step: &str,
    result: Result<T, Failure>,
) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(failure)
            if failure.reason.concerns_endpoint() || failure.reason == FailureReason::Connect =>
        {
            Err(failure)
        }
        Err(failure) => {
            probe.quirks.push(format!(
                "the step `{step}` failed ({}): {}",
                failure.reason.name(),
                failure.message
            ));
            Ok(None)
        }
    }
}

/// Reads engine, model and context from the server's own description.
async fn identify(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let models = client.request("/models", false, None).await?;
    let list = models.json.get("data").and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    let id =
        |model: &Value| model.get("id").and_then(Value::as_str) == Some(&client.settings.model);
    let model = list.iter().find(|model| id(model)).or(list.first());
    let Some(model) = model else {
        return Ok(());
    };
    let context = model
        .get("max_model_len")
        .or_else(|| model.pointer("/meta/n_ctx"));
    probe.context = context
        .and_then(Value::as_u64)
        .and_then(|n| u32::try_from(n).ok());
    probe.dialect = match model.get("owned_by").and_then(Value::as_str) {
        Some("vllm") => Some(Dialect::Vllm),
        Some("sglang") => Some(Dialect::Sglang),
        Some("llamacpp") => Some(Dialect::LlamaServer),
        // llama-cpp-python alone names its owner "me".
        Some("me") => Some(Dialect::LlamaCppPython),
        Some(owner) if owner.contains("openai") || owner == "system" => Some(Dialect::Openai),
        _ => None,
    };
    let field = |response: ProbeResponse, name: &str| {
        let text = response.json.get(name).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let engine = match probe.dialect {
        Some(Dialect::Vllm) => {
            let version = client.request("/version", true, None).await?;
            // Servers answer it in development mode alone (`VLLM_SERVER_DEV_MODE=1`).
            let config = "/server_info?config_format=json";
            let config = client.request(config, true, None).await?;
            if config.is_success() {
                probe.logprobs.mode = LogprobsMode::stated_in(&config.text);
            }
            Some(format!("vLLM {}", field(version, "version")))
        }
        Some(Dialect::Sglang) => Some("SGLang".to_owned()),
        Some(Dialect::LlamaServer) => {
            let properties = client.request("/props", true, None).await?;
            Some(format!("llama-server {}", field(properties, "build_info")))
        }
        Some(Dialect::LlamaCppPython) => Some("llama-cpp-python".to_owned()),
        _ => None,
    };
    probe.engine = engine.map(|engine| engine.trim().to_owned());
    Ok(())
}

#[cfg(test)]
mod tests;
