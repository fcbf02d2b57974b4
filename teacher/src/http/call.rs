//! Calls, requests and their results as plain data.

use std::sync::Arc;

use potstill_datasets::{Completion, Prompt, Reasoning, TemplateArguments};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A server's variant of the protocol: the request fields that the server knows, and its peculiarities.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// OpenAI's own API and its copies: no fields beyond OpenAI's are sent.
    #[default]
    Openai,
    /// vLLM: `top_k`, `min_p`, `repetition_penalty`, `prompt_logprobs`, `return_token_ids`, prompts as
    /// token ids, `continue_final_message`.
    Vllm,
    /// SGLang: its `/generate` with `top_logprobs_num` and `input_top_logprobs`.
    Sglang,
    /// Upstream llama.cpp's `llama-server`.
    LlamaServer,
    /// The server of `llama-cpp-python`.
    LlamaCppPython,
}

impl Dialect {
    /// Whether servers of this dialect take arguments of the chat template with a request, as `chat_template_kwargs`.
    #[must_use]
    pub fn takes_template_arguments(self) -> bool {
        matches!(self, Dialect::Vllm | Dialect::Sglang | Dialect::LlamaServer)
    }
}

/// API of a server that answers are requested through: `method` of `[teacher]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Api {
    /// Messages, which the server renders with its template.
    #[default]
    Chat,
    /// Token ids, which Potstill renders with the chat template of `tokenizer`.
    Completions,
}

/// Settings that all requests of a collection share.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestSettings {
    /// Name of the model at the server.
    pub model: String,
    /// The server's variant of the protocol.
    pub dialect: Dialect,
    /// The API that answers are requested through.
    pub api: Api,
    /// Whether the token limit is called `max_completion_tokens`, and temperature and `top_p` are refused, as by
    /// OpenAI's reasoning models.
    pub reasoning_model: bool,
    /// Longest answer, tokens; `None` leaves the limit to the server.
    pub max_tokens: Option<u32>,
    /// Sampling temperature; `None` leaves it to the server.
    pub temperature: Option<f64>,
    /// Mass of the smallest set of tokens that is sampled from.
    pub top_p: Option<f64>,
    /// Number of most likely tokens that are sampled from.
    pub top_k: Option<u32>,
    /// Smallest probability of a sampled token, as a share of the most likely token's.
    pub min_p: Option<f64>,
    /// Penalty on repeated tokens; sent as 1 if unset and the server has another default.
    pub repetition_penalty: Option<f64>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Seed from which, with the prompt and the sample index, each answer's own seed is derived; `None` sends none.
    pub seed: Option<u64>,
    /// Number of most likely tokens whose log-probabilities are requested at each position; `None` requests text
    /// alone, 0 the sampled token's log-probability.
    pub logprobs: Option<u32>,
    /// Whether answers are streamed.
    pub stream: bool,
    /// Marks around reasoning inside the answer's text; `None` stands for `<think>` and `</think>`.
    pub reasoning: Option<Reasoning>,
    /// Arguments of the server's chat template, sent as `chat_template_kwargs` with messages.
    pub template_arguments: TemplateArguments,
}

/// The task of a call.
#[derive(Debug, Clone, PartialEq)]
pub enum CallTask {
    /// Answer the prompt, given as messages.
    Answer,
    /// Answer the prompt, given as token ids ([`Api::Completions`]).
    AnswerIds(Vec<u32>),
    /// Give distributions over a text through prompt log-probabilities. The server samples one token, since it must
    /// sample at least one.
    Score {
        /// Token ids of prompt and answer.
        token_ids: Vec<u32>,
        /// Number of most likely tokens at each position.
        top_k: u32,
        /// First position whose distribution is needed.
        from: usize,
    },
}

/// One answer or score to get from a server. A call is completed once, after one or more requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The caller's number of the call, unique in a collection.
    pub number: u64,
    /// The prompt.
    pub prompt: Arc<Prompt>,
    /// Index of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Task for the server.
    pub task: CallTask,
    /// Upper bound of the rendered prompt's tokens, for the reservation.
    pub max_prompt_tokens: u32,
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TokenUsage {
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Cached tokens of the prompt.
    pub cached_tokens: u64,
    /// Tokens of the answer, reasoning included.
    pub completion_tokens: u64,
    /// Reasoning tokens of the answer.
    pub reasoning_tokens: u64,
}

impl TokenUsage {
    /// Tokens of prompt and answer.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }

    pub(super) fn plus(&self, other: &TokenUsage) -> TokenUsage {
        TokenUsage {
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            cached_tokens: self.cached_tokens.saturating_add(other.cached_tokens),
            completion_tokens: self
                .completion_tokens
                .saturating_add(other.completion_tokens),
            reasoning_tokens: self.reasoning_tokens.saturating_add(other.reasoning_tokens),
        }
    }
}

/// Distributions that a server gave for the positions of a text, as pairs of token id and log-probability.
///
/// `positions[i]` is the distribution of token `i` of the text; `None` where the server gives none, as for the first
/// token. The pairs are unsorted and unchecked; `signal` checks them.
pub type PromptLogprobs = Vec<Option<Vec<(u32, f32)>>>;

/// A server's response to a call, the same for all dialects.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// The answer. Its `provenance` is 0. Its `usage` is the server's, or else what can be counted, or 0.
    pub completion: Completion,
    /// Token counts that the server reports; `None` if it reports none, or some that cannot be right.
    pub billed: Option<TokenUsage>,
    /// Whether the server reports token counts that cannot be right, such as −5.
    pub is_usage_implausible: bool,
    /// Token ids of the prompt, if the server gives them.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Distributions over the text of [`CallTask::Score`].
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// The model's name and the server's fingerprint in the response.
    pub served_by: Option<String>,
}

/// Why a call or a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureReason {
    /// The server refused the request as it is (400, 413, 422).
    BadRequest,
    /// The prompt does not fit into the model's context.
    ContextTooLong,
    /// The key is missing or wrong (401).
    Unauthorized,
    /// The key lacks the permission (403).
    Forbidden,
    /// The server has no such model or path (404).
    NotFound,
    /// The credit is used up (402, or a 429 that says it), so waiting does not help.
    OutOfCredit,
    /// Too many requests or tokens were sent (429).
    RateLimited,
    /// The server stopped waiting for the request (408).
    RequestTimeout,
    /// The server failed (500 and other 5xx).
    ServerError,
    /// The server or its proxy is overloaded (502, 503, 504, 529).
    Overloaded,
    /// The server redirects to another host, to which the key is not sent.
    Redirected,
    /// No connection could be made.
    Connect,
    /// The first byte did not arrive in time.
    FirstByteTimeout,
    /// The time between two bytes was too long.
    IdleTimeout,
    /// The whole request took too long.
    TotalTimeout,
    /// The connection ended in the middle of a response.
    Cut,
    /// The response has more bytes than allowed.
    TooLarge,
    /// The body is not JSON, not UTF-8, or not of the protocol's form.
    Malformed,
    /// A response of status 200 contains an error.
    ErrorInside,
    /// The response has no choice, or one with neither text nor reasoning nor a tool call.
    Empty,
    /// Log-probabilities are missing, not numbers, above 0, fewer than tokens, or of ids that do not exist.
    BadLogprobs,
    /// The server withheld the answer.
    ContentFilter,
    /// The answer was cut at the token limit, and the run file drops such answers.
    Length,
}

impl FailureReason {
    /// Name of the reason in tables and ledgers.
    #[must_use]
    pub fn name(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Whether a retry may succeed.
    #[must_use]
    pub fn is_transient(self) -> bool {
        !matches!(
            self,
            FailureReason::BadRequest
                | FailureReason::ContextTooLong
                | FailureReason::OutOfCredit
                | FailureReason::Redirected
                | FailureReason::TooLarge
                | FailureReason::ContentFilter
                | FailureReason::Length
        )
    }

    /// Whether the failure is due to the endpoint or its key and not to the request.
    #[must_use]
    pub fn concerns_endpoint(self) -> bool {
        matches!(
            self,
            FailureReason::Unauthorized
                | FailureReason::Forbidden
                | FailureReason::NotFound
                | FailureReason::OutOfCredit
                | FailureReason::Redirected
        )
    }
}

/// A request that gave no answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The kind of failure.
    pub reason: FailureReason,
    /// Status of the response, if there was one.
    pub status: Option<u16>,
    /// The server's message: at most 500 bytes, without control characters and without any key.
    pub message: String,
    /// Time after which the server accepts a retry, seconds from now.
    pub retry_after_seconds: Option<f64>,
    /// Token counts that the server reported before it failed.
    pub billed: Option<TokenUsage>,
    /// Whether the server reported token counts that cannot be right, such as −5.
    pub is_usage_implausible: bool,
}

impl Failure {
    /// A failure of which only the reason and a message are known.
    #[must_use]
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Failure {
        Failure {
            reason,
            status: None,
            message: message.into(),
            retry_after_seconds: None,
            billed: None,
            is_usage_implausible: false,
        }
    }
}

/// Basis of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChargeBasis {
    /// The server's own count.
    Reported,
    /// The whole reservation, since the server may have worked and did not report a count.
    Reserved,
    /// The whole reservation, since the server's own count cannot be right.
    Implausible,
    /// No charge, since the server refused before it worked.
    Nothing,
}

/// A request that has ended: a line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Number of the request, unique in a collection.
    pub request: u64,
    /// Id of the prompt.
    pub prompt_id: String,
    /// Index of the sample among those of its prompt.
    pub sample_index: u32,
    /// Number of the attempt at this call, from 1.
    pub attempt: u32,
    /// Name of the endpoint.
    pub endpoint: String,
    /// Time of sending, milliseconds since 1970.
    pub sent_unix_ms: u64,
    /// Time from sending to the end, seconds.
    pub seconds: f64,
    /// Status of the response, if there was one.
    pub status: Option<u16>,
    /// Size of the decoded body, bytes.
    pub bytes: u64,
    /// Why the request failed; `None` for an answer.
    pub failed: Option<FailureReason>,
    /// Tokens that are charged: the server's count, or the reservation.
    pub billed: TokenUsage,
    /// Cost of these tokens, USD.
    pub usd: f64,
    /// Basis of the charge.
    pub charge: ChargeBasis,
}

/// Treatment of an answer that was cut at the token limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnLength {
    /// The answer is kept as it is, and counted.
    #[default]
    Keep,
    /// The answer becomes a failure.
    Drop,
    /// The rest of the answer is requested, until it ends or the context is full.
    Continue,
}

/// Treatment of a stream that breaks off in the middle of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBreak {
    /// The answer is requested again from its beginning.
    #[default]
    Retry,
    /// The rest of the answer is requested from where the stream broke.
    Continue,
}
