//! `[teacher]` and `[budget]`: who answers, and what that may cost.

use potstill_datasets::range::FilePath;
use potstill_datasets::{FloatType, TemplateSource};
use potstill_teacher::http;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ranges::{Amount, Count, NonNegative, Positive};

/// `[teacher]`: a checkpoint that runs here (`path`), or a model behind a server (`provider`, `url`
/// or `endpoints`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Teacher {
    /// Folder of a checkpoint in Hugging Face layout, which runs here.
    pub path: Option<FilePath>,
    /// What a checkpoint computes in.
    #[serde(default)]
    pub dtype: FloatType,
    /// `"plain"`, or a `.jinja` file; by default the checkpoint's own chat template.
    pub template: Option<TemplateSource>,
    /// Licence of the teacher's answers, recorded with them.
    pub licence: Option<String>,
    /// A model at a provider, by its name in the table of providers, such as `deepseek-r1`: address,
    /// price, context and kind of server come from there, and the keys below override them.
    pub provider: Option<String>,
    /// A table of providers of your own, which adds to the built-in one and overrides it.
    pub providers: Option<FilePath>,
    /// The model's name at the server.
    pub model: Option<String>,
    /// Base URL of a server, such as `http://localhost:8000/v1`.
    pub url: Option<String>,
    /// Environment variable that holds the key.
    pub key_env: Option<String>,
    /// Command that prints the key, run by `sh`.
    pub key_command: Option<String>,
    /// Several servers of the same model, in place of `url`.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// What kind of server it is; by default the provider's, or `openai`.
    pub dialect: Option<Dialect>,
    /// Through which door answers are asked for.
    #[serde(default)]
    pub method: Method,
    /// Whether it takes requests as OpenAI's reasoning models do: `max_completion_tokens`, no
    /// temperature.
    pub reasoning_model: Option<bool>,
    /// Folder with the model's `tokenizer.json`: for distributions over token ids, exact counts of
    /// prompts, and the chat template.
    pub tokenizer: Option<FilePath>,
    /// Longest prompt and answer together at the server, tokens.
    pub context: Option<Count>,
    /// What the server's tokens cost.
    pub price: Option<Price>,
    /// Open no socket: what is there is used, and asking is an error.
    #[serde(default)]
    pub offline: bool,
}

impl Teacher {
    /// Whether it is behind a server.
    pub fn is_served(&self) -> bool {
        self.path.is_none()
    }
}

/// One of `endpoints` of `[teacher]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Base URL, such as `http://localhost:8000/v1`.
    pub url: String,
    /// Environment variable that holds the key.
    pub key_env: Option<String>,
    /// Command that prints the key, run by `sh`.
    pub key_command: Option<String>,
    /// Its share of the requests, beside the other endpoints' weights.
    #[serde(default = "one")]
    pub weight: Positive,
    /// Most requests a minute.
    pub requests_per_minute: Option<Positive>,
    /// Most tokens a minute, prompts and answers together.
    pub tokens_per_minute: Option<Positive>,
    /// Most requests at a time; by default `concurrency` of `[collect]`.
    pub max_in_flight: Option<Count>,
    /// Send over plain HTTP to another machine, where anybody between can read along.
    #[serde(default)]
    pub allow_plain_http: bool,
}

/// `price` of `[teacher]`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// USD for a million tokens of prompts.
    pub input: NonNegative,
    /// USD for a million tokens of prompts that were cached; by default as `input`.
    pub cached_input: Option<NonNegative>,
    /// USD for a million tokens of answers, reasoning included.
    pub output: NonNegative,
}

impl From<Price> for http::Price {
    fn from(price: Price) -> Self {
        http::Price {
            input: price.input.get(),
            cached_input: price.cached_input.map(NonNegative::get),
            output: price.output.get(),
        }
    }
}

/// `dialect` of `[teacher]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// OpenAI's own API and those that copy it.
    Openai,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// The `llama-server` of llama.cpp.
    LlamaServer,
    /// The server of `llama-cpp-python`.
    LlamaCppPython,
}

impl From<Dialect> for http::Dialect {
    fn from(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Openai => http::Dialect::Openai,
            Dialect::Vllm => http::Dialect::Vllm,
            Dialect::Sglang => http::Dialect::Sglang,
            Dialect::LlamaServer => http::Dialect::LlamaServer,
            Dialect::LlamaCppPython => http::Dialect::LlamaCppPython,
        }
    }
}

/// `method` of `[teacher]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Messages, which the server renders with its template.
    #[default]
    Chat,
    /// Token ids, which are rendered here with the template of `tokenizer`.
    Completions,
}

impl From<Method> for http::Api {
    fn from(method: Method) -> Self {
        match method {
            Method::Chat => http::Api::Chat,
            Method::Completions => http::Api::Completions,
        }
    }
}

/// `on_length` of `[collect]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
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

impl From<OnLength> for http::OnLength {
    fn from(policy: OnLength) -> Self {
        match policy {
            OnLength::Keep => http::OnLength::Keep,
            OnLength::Drop => http::OnLength::Drop,
            OnLength::Continue => http::OnLength::Continue,
        }
    }
}

/// `on_break` of `[collect]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBreak {
    /// It is asked for anew.
    #[default]
    Retry,
    /// The server is asked to go on from where it broke.
    Continue,
}

impl From<OnBreak> for http::OnBreak {
    fn from(policy: OnBreak) -> Self {
        match policy {
            OnBreak::Retry => http::OnBreak::Retry,
            OnBreak::Continue => http::OnBreak::Continue,
        }
    }
}

/// `timeouts` of `[collect]`, in seconds
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Until there is a connection.
    pub connect: Positive,
    /// Until the first byte of a reply.
    pub first_byte: Positive,
    /// Between two pieces of a reply.
    pub idle: Positive,
    /// The whole request.
    pub whole: Positive,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect: super::default_of(10.0),
            first_byte: super::default_of(600.0),
            idle: super::default_of(120.0),
            whole: super::default_of(1800.0),
        }
    }
}

/// `[budget]`: what a teacher behind a server may cost. Everything that the run directory's
/// `requests.jsonl` lists counts, and each request in flight counts with the most that it can cost.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Most USD.
    pub usd: Option<Positive>,
    /// Most tokens, prompts and answers together.
    pub tokens: Option<Amount>,
    /// Most requests, failed ones too.
    pub requests: Option<Amount>,
    /// Most bytes that answers and the list of requests take before they are published.
    pub disk_bytes: Option<Amount>,
    /// Most hours of asking.
    pub hours: Option<Positive>,
}

impl Budget {
    /// Whether nothing is capped.
    pub fn is_empty(&self) -> bool {
        *self == Budget::default()
    }
}

fn one() -> Positive {
    super::default_of(1.0)
}
