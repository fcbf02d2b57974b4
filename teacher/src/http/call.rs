//! What is asked of a server and what comes of it, as plain data.

use std::sync::Arc;

use potstill_datasets::{Completion, Prompt, Reasoning};
use serde::{Deserialize, Serialize};

/// What kind of server it is: which fields it knows, and which of its habits have to be dealt with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// OpenAI's own API and those that copy it: nothing beyond its fields is sent.
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

/// Through which door an answer is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Messages, rendered by the server's template.
    #[default]
    Chat,
    /// Text or token ids that are rendered here.
    Completions,
}

/// What every request of a collection has in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Asking {
    /// The model's name at the server.
    pub model: String,
    /// What kind of server it is.
    pub dialect: Dialect,
    /// Which door.
    pub method: Method,
    /// Whether the limit is called `max_completion_tokens`, and temperature and `top_p` are refused: OpenAI's
    /// reasoning models.
    pub reasoning_model: bool,
    /// Longest answer, tokens; `None` leaves it to the server.
    pub max_tokens: Option<u32>,
    /// Sampling temperature; `None` leaves it to the server.
    pub temperature: Option<f64>,
    /// Smallest set of tokens with this mass is sampled from.
    pub top_p: Option<f64>,
    /// So many of the likeliest tokens are sampled from.
    pub top_k: Option<u32>,
    /// Tokens with less than this share of the likeliest one's probability are not sampled.
    pub min_p: Option<f64>,
    /// Penalty on repeated tokens; sent as 1 where the server has another default.
    pub repetition_penalty: Option<f64>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Each answer's own seed follows from this, its prompt and its sample index; `None` sends none.
    pub seed: Option<u64>,
    /// How many likeliest tokens are asked for at each position; `None` for text alone, 0 for the sampled
    /// token's own log-probability.
    pub logprobs: Option<u32>,
    /// Whether answers are streamed.
    pub stream: bool,
    /// Marks around reasoning that comes inline; `None` looks for `<think>` and `</think>`.
    pub reasoning: Option<Reasoning>,
}

/// What one call is for.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// An answer, through messages.
    Answer,
    /// An answer to a prompt that is token ids already ([`Method::Completions`]).
    AnswerIds(Vec<u32>),
    /// Distributions over a given text through prompt log-probabilities: no answer is sampled but the one
    /// token that a server insists on.
    Score {
        /// Prompt and answer as token ids.
        token_ids: Vec<u32>,
        /// How many likeliest tokens at each position.
        top_k: u32,
        /// Distributions are wanted from this position on.
        from: usize,
    },
}

/// One thing to be asked. It lands once, whatever number of requests that takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The caller's number for it; unique in a collection.
    pub number: u64,
    /// The prompt.
    pub prompt: Arc<Prompt>,
    /// Which sample of the prompt, from 0.
    pub sample_index: u32,
    /// What for.
    pub task: Task,
    /// The rendered prompt has at most so many tokens: what a reservation is reckoned with.
    pub prompt_tokens_at_most: u32,
}

/// What a server says it counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Billed {
    /// Tokens of the prompt, cached ones too.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Tokens of the answer, reasoning included.
    pub completion_tokens: u64,
    /// Those of them that were reasoning.
    pub reasoning_tokens: u64,
}

/// The distributions a server gave for the positions of a text.
///
/// `positions[i]` belongs to token `i` of the text; `None` where the server gives none, as for the first
/// token. Unsorted and unchecked; see `signal`.
pub type PromptLogprobs = Vec<Option<Vec<(u32, f32)>>>;

/// What a server answered, in our terms.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// The answer. Its `provenance` is 0; its `usage` is the server's, or what can be counted, or 0.
    pub completion: Completion,
    /// What the server says it counted.
    pub billed: Option<Billed>,
    /// The prompt as the server tokenized it, where it says.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Distributions over the prompt, for [`Task::Score`].
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// The model's name and the server's fingerprint, as the reply has them.
    pub served_by: Option<String>,
}

/// Why a call failed, or a request on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// The server refused the request as it is (400, 413, 422).
    BadRequest,
    /// The prompt does not fit into the model's context.
    ContextTooLong,
    /// The key is missing or wrong (401).
    Unauthorized,
    /// The key may not do this (403).
    Forbidden,
    /// No such model or path (404).
    NotFound,
    /// 402, or 429 that says the credit is used up: waiting does not help.
    OutOfCredit,
    /// Too many requests or tokens (429).
    RateLimited,
    /// The server gave up waiting (408).
    RequestTimeout,
    /// The server failed (500 and other 5xx).
    ServerError,
    /// The server or its proxy is overloaded (502, 503, 504, 529).
    Overloaded,
    /// A redirect to somewhere else, which is not followed with a key.
    Redirected,
    /// No connection.
    Connect,
    /// No first byte in time.
    FirstByteTimeout,
    /// Too long between bytes.
    IdleTimeout,
    /// The whole request took too long.
    TotalTimeout,
    /// The connection ended in the middle of a reply.
    Cut,
    /// More bytes than a reply may have.
    TooLarge,
    /// The body is not JSON, not UTF-8, or not of the protocol's shape.
    Malformed,
    /// An error inside a reply of status 200.
    ErrorInside,
    /// No choice, or one with neither text nor reasoning nor a tool call.
    Empty,
    /// Log-probabilities are missing, not numbers, above 0, fewer than tokens, or name ids that do not exist.
    BadLogprobs,
    /// The server withheld the answer.
    ContentFilter,
    /// The answer was cut at the limit, and the run file says that such answers are dropped.
    Length,
}

impl Reason {
    /// The name in tables and ledgers.
    #[must_use]
    pub fn name(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Whether asking again may help.
    #[must_use]
    pub fn is_transient(self) -> bool {
        !matches!(
            self,
            Reason::BadRequest
                | Reason::ContextTooLong
                | Reason::OutOfCredit
                | Reason::Redirected
                | Reason::TooLarge
                | Reason::ContentFilter
                | Reason::Length
        )
    }

    /// Whether it says something of the endpoint and its key rather than of the request.
    #[must_use]
    pub fn is_endpoints(self) -> bool {
        matches!(
            self,
            Reason::Unauthorized
                | Reason::Forbidden
                | Reason::NotFound
                | Reason::OutOfCredit
                | Reason::Redirected
        )
    }
}

/// A request that gave no answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// Why, in a word.
    pub reason: Reason,
    /// The status, where there was one.
    pub status: Option<u16>,
    /// What the server says, at most 500 bytes, without control characters and without any key.
    pub message: String,
    /// When the server wants to be asked again, seconds from now.
    pub retry_after_seconds: Option<f64>,
    /// What the server says it counted before it failed.
    pub billed: Option<Billed>,
}

impl Failure {
    /// A failure that is known by its reason and a sentence.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>) -> Failure {
        Failure {
            reason,
            status: None,
            message: message.into(),
            retry_after_seconds: None,
            billed: None,
        }
    }
}

/// How a charge is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Charge {
    /// The server's own count.
    Reported,
    /// The whole reservation, since the server may have worked and did not say how much.
    Reserved,
    /// Nothing: the server refused before it worked.
    Nothing,
}

/// One request, over: a line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Number of the request, unique in a collection.
    pub request: u64,
    /// The prompt's id.
    pub prompt_id: String,
    /// Which sample of the prompt.
    pub sample_index: u32,
    /// Which attempt at this call, from 1.
    pub attempt: u32,
    /// The endpoint's name.
    pub endpoint: String,
    /// When it was sent, milliseconds since 1970.
    pub sent_unix_ms: u64,
    /// From sending to the end.
    pub seconds: f64,
    /// The status, where there was one.
    pub status: Option<u16>,
    /// Bytes of the body as they came, decoded.
    pub bytes: u64,
    /// What it failed for; `None` for an answer.
    pub failed: Option<Reason>,
    /// What the server counted, or the reservation.
    pub billed: Billed,
    /// What it costs.
    pub usd: f64,
    /// How that is known.
    pub charge: Charge,
}

/// What becomes of an answer that was cut at the limit on tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLength {
    /// It is kept as it is, and counted.
    #[default]
    Keep,
    /// It becomes a failure.
    Drop,
    /// The server is asked to go on from its end, until it ends or the context is full.
    Continue,
}

/// What becomes of a stream that breaks in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBreak {
    /// It is asked for anew.
    #[default]
    Retry,
    /// The server is asked to go on from where it broke.
    Continue,
}
