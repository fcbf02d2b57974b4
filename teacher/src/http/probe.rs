//! What an endpoint can do, found out before money is spent on it.
//!
//! Some thirty short questions, each worth a few tokens. Nothing is taken from what a server is known for: that it
//! says to be vLLM decides only which of its fields are tried.

mod answers;
mod ask;
mod prompts;
mod read;
mod told;

use potstill_datasets::{ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::transport::EndpointClient;
use super::{ClientSettings, Dialect, Failure, FailureReason, TokenUsage};
use crate::Error;
use ask::{ProbeClient, ask};

/// What a few cheap questions told of an endpoint. `None` is what could not be found out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Probe {
    /// The endpoint's base URL.
    pub url: String,
    /// The model that was asked.
    pub model: String,
    /// What the server seems to be.
    pub dialect: Option<Dialect>,
    /// Engine and version, as the server says.
    pub engine: Option<String>,
    /// Longest prompt and answer together, tokens.
    pub context: Option<u32>,
    /// Whether it answers chats.
    pub chat: bool,
    /// Whether it completes text.
    pub completions: bool,
    /// Log-probabilities of answers.
    pub logprobs: AnswerLogprobs,
    /// Log-probabilities of prompts.
    pub prompt_logprobs: PromptScoring,
    /// Tokens: ids, bytes, and whether they are those of the local tokenizer.
    pub tokens: TokenFindings,
    /// The largest difference of a log-probability between two equal questions at temperature 0, nats.
    pub repeat_difference: Option<f64>,
    /// Whether two equal questions at temperature 0 get the same text.
    pub deterministic: Option<bool>,
    /// What `usage` counts.
    pub usage: UsageFindings,
    /// How fast it answers one question at a time.
    pub speeds: Vec<AnswerSpeed>,
    /// What it does otherwise than one would think, a sentence each.
    pub quirks: Vec<String>,
    /// What to use it for.
    pub recommended: Recommendation,
    /// Why not more, and which flags of the server to change, a sentence each.
    pub change: Vec<String>,
    /// What the questions cost.
    pub spent: TokenUsage,
    /// How many questions there were.
    pub requests: u64,
}

/// Log-probabilities of sampled tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AnswerLogprobs {
    /// Whether they are numbers that a model could have given.
    pub kind: LogprobKind,
    /// The largest number of likeliest tokens that came, of those that were tried.
    pub largest_k: u32,
    /// What the server said to a larger one.
    pub limit_said: Option<String>,
    /// Whether they are of the model's own distribution or of what is left after temperature.
    pub temperature: SamplingStage,
    /// The same for penalties on repeated tokens.
    pub penalties: SamplingStage,
    /// Whether a penalty on repeated tokens is on unless the request turns it off.
    pub penalty_by_default: Option<bool>,
}

/// What log-probabilities are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobKind {
    /// None came.
    #[default]
    Missing,
    /// They are all 0, all alike or −9999: a field that is filled in, not measured.
    Placeholder,
    /// They are above 0, or hold more mass than 1.
    Impossible,
    /// They are those of a distribution.
    Real,
}

/// At which point of sampling log-probabilities are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplingStage {
    /// It could not be told.
    #[default]
    Unknown,
    /// Before: the model's own.
    Raw,
    /// After.
    Processed,
}

/// Log-probabilities of given text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PromptScoring {
    /// How they are had.
    pub through: ScoringApi,
    /// The largest number of likeliest tokens that came, of those that were tried.
    pub largest_k: u32,
    /// What the server said to a larger one.
    pub limit_said: Option<String>,
    /// By how many positions they are late: 0 is right, at −1 the distribution that predicts a token stands at the
    /// token before. `None` where they fit those of answers nowhere.
    pub shift: Option<i32>,
    /// How far they are at that shift from those of the answer with the same text, on average, nats.
    pub difference: Option<f64>,
    /// Whether the same text, asked again while it is cached, gets other values or fewer.
    pub stale: Option<bool>,
    /// The largest difference between the two, nats.
    pub stale_difference: Option<f64>,
}

/// How log-probabilities of a prompt are had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringApi {
    /// Not at all.
    #[default]
    Nothing,
    /// `prompt_logprobs`, as vLLM has it.
    PromptLogprobs,
    /// `echo` with `logprobs`.
    Echo,
    /// SGLang's `/generate`.
    Generate,
}

/// What is known of tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TokenFindings {
    /// Whether the ids of an answer come.
    pub ids: bool,
    /// Whether the ids of the likeliest tokens come.
    pub top_ids: bool,
    /// Whether tokens come as bytes, so that parts of characters survive.
    pub bytes: bool,
    /// Whether a prompt may be token ids.
    pub id_prompts: bool,
    /// Whether the server's tokens are those of the local tokenizer.
    pub same_as_local: Option<bool>,
    /// Whether the server renders a chat as the local template does.
    pub same_template: Option<bool>,
}

/// What `usage` counts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UsageFindings {
    /// Whether there is one.
    pub present: bool,
    /// Whether streams have one where it is asked for.
    pub in_streams: Option<bool>,
    /// Whether the prompt's tokens are as many as the local tokenizer finds.
    pub prompt_right: Option<bool>,
    /// Whether the answer's tokens are as many as came.
    pub completion_right: Option<bool>,
    /// Whether all of several prompts are counted.
    pub counts_all_prompts: Option<bool>,
}

/// How fast answers come.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AnswerSpeed {
    /// Likeliest tokens asked for; `None` for text alone.
    pub k: Option<u32>,
    /// Tokens of one answer a second.
    pub tokens_per_second: f64,
    /// Bytes of the reply for each token.
    pub bytes_per_token: f64,
}

/// What an endpoint is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recommendation {
    /// Text alone: train by cross-entropy.
    #[default]
    Traces,
    /// Log-probabilities too: train by a divergence.
    Logits,
}

/// Asks the first endpoint of `settings` what it can do. `local` is the teacher's tokenizer and template, where they
/// are here; without them nothing is said of tokens and templates. `tell` is told what is being asked.
///
/// # Errors
/// An endpoint that is not described rightly, cannot be reached, or lets nobody in. What a server refuses or does
/// badly is no error but a finding.
pub fn probe(
    settings: &ClientSettings,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    tell: &mut dyn FnMut(&str),
) -> Result<Probe, Error> {
    if settings.offline {
        return Err(Error::Offline);
    }
    let Some(endpoint) = settings.endpoints.first() else {
        return Err(Error::Collection {
            why: "there is no endpoint to ask: set `url`".into(),
        });
    };
    let refused = |why: String| Error::Endpoint {
        endpoint: endpoint.name.clone(),
        why,
    };
    let mut client = ProbeClient {
        endpoint: EndpointClient::new(endpoint, settings.timeouts, settings.max_body_bytes)?,
        request: &settings.request,
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
        .map_err(|error| refused(format!("no runtime can be started: {error}")))?;
    runtime
        .block_on(all(&mut client, &mut probe, local, tell))
        .map_err(|failure| refused(format!("{}: {}", failure.reason.name(), failure.message)))?;
    probe.spent = client.spent;
    probe.requests = client.requests;
    told::conclude(&mut probe);
    Ok(probe)
}

async fn all(
    client: &mut ProbeClient<'_>,
    probe: &mut Probe,
    local: Option<(&Tokenizer, &ChatTemplate)>,
    tell: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    tell("who it is");
    identify(client, probe).await?;
    tell("a chat with log-probabilities");
    let first = answers::first(client, probe).await?;
    tell("a continuation");
    let begun = prompts::continuation(client, probe).await;
    let answer = noted(probe, "a continuation", begun)?.unwrap_or_default();
    if probe.logprobs.kind == LogprobKind::Real {
        tell("how many likeliest tokens");
        let done = answers::largest_k(client, probe).await;
        noted(probe, "how many likeliest tokens", done)?;
        tell("temperature");
        let done = answers::temperature(client, probe).await;
        noted(probe, "temperature", done)?;
    }
    tell("penalties");
    let done = answers::penalties(client, probe).await;
    noted(probe, "penalties", done)?;
    tell("log-probabilities of prompts");
    let done = prompts::prompted(client, probe, &answer).await;
    noted(probe, "log-probabilities of prompts", done)?;
    tell("tokens and template");
    let done = prompts::tokens(client, probe, local, &first, &answer).await;
    noted(probe, "tokens and template", done)?;
    tell("what is counted");
    let done = answers::counts(client, probe).await;
    noted(probe, "what is counted", done)?;
    tell("how fast it is");
    let done = answers::speeds(client, probe).await;
    noted(probe, "how fast it is", done)?;
    Ok(())
}

/// A question that got no answer at all is a finding, unless nothing can be asked any more.
fn noted<T>(probe: &mut Probe, what: &str, done: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(failure)
            if failure.reason.concerns_endpoint() || failure.reason == FailureReason::Connect =>
        {
            Err(failure)
        }
        Err(failure) => {
            probe.quirks.push(format!(
                "client for {what} it failed ({}): {}",
                failure.reason.name(),
                failure.message
            ));
            Ok(None)
        }
    }
}

/// What the server says of itself.
async fn identify(client: &mut ProbeClient<'_>, probe: &mut Probe) -> Result<(), Failure> {
    let models = ask(client, "/models", false, None).await?;
    let list = models.json.get("data").and_then(Value::as_array);
    let list = list.map(Vec::as_slice).unwrap_or_default();
    let id = |model: &Value| model.get("id").and_then(Value::as_str) == Some(&client.request.model);
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
        // Nothing else calls itself so.
        Some("me") => Some(Dialect::LlamaCppPython),
        Some(owner) if owner.contains("openai") || owner == "system" => Some(Dialect::Openai),
        _ => None,
    };
    let engine = match probe.dialect {
        Some(Dialect::Vllm) => {
            let version = ask(client, "/version", true, None).await?;
            let version = version
                .json
                .get("version")
                .and_then(Value::as_str)
                .map(str::to_owned);
            Some(format!("vLLM {}", version.unwrap_or_default()))
        }
        Some(Dialect::Sglang) => Some("SGLang".to_owned()),
        Some(Dialect::LlamaServer) => {
            let props = ask(client, "/props", true, None).await?;
            let build = props
                .json
                .get("build_info")
                .and_then(Value::as_str)
                .map(str::to_owned);
            Some(format!("llama-server {}", build.unwrap_or_default()))
        }
        Some(Dialect::LlamaCppPython) => Some("llama-cpp-python".to_owned()),
        _ => None,
    };
    probe.engine = engine.map(|engine| engine.trim().to_owned());
    Ok(())
}

#[cfg(test)]
mod tests;
