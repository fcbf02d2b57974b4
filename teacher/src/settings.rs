//! The run file's tables that a teacher reads: `[teacher]`, `[collect]` and `[score]`. `[budget]` is
//! [`http::BudgetSettings`](crate::http::BudgetSettings).

use potstill_datasets::range::{
    Count, CountOrZero, Each, FilePath, Fraction, Mass, NonNegative, Optional, Positive,
};
use potstill_datasets::{FloatType, Reasoning, TemplateArguments, TemplateSource};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::http::{
    Api, DEFAULT_CONCURRENCY, Dialect, Endpoint, OnBreak, OnLength, Price, Timeouts,
};

/// `[teacher]`: a checkpoint in this process (`path`), or a model behind a server (`provider`, `url`
/// or `endpoints`).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TeacherSettings {
    /// Checkpoint that runs in this process: a folder in Hugging Face layout, a GGUF file, or a repository of the Hugging
    /// Face Hub (`org/name`, or `org/name/file.gguf`). A folder or file that exists wins over a repository.
    pub path: Option<FilePath>,
    /// Branch, tag or commit of the repository that `path` or `tokenizer` names. A run keeps the commit that it used
    /// first. Default: `main`.
    pub revision: Option<String>,
    /// Type in which a checkpoint computes.
    #[serde(default)]
    pub dtype: FloatType,
    /// Chat template: `"plain"` or a `.jinja` file. Default: the checkpoint's own chat template.
    pub template: Option<TemplateSource>,
    /// Arguments of the chat template: variables that it reads beside the conversation, such as `enable_thinking`. A
    /// server gets them as `chat_template_kwargs`.
    #[serde(default)]
    pub template_arguments: TemplateArguments,
    /// Licence of the teacher's answers, which is recorded with them.
    pub licence: Option<String>,
    /// Name of a model in the table of providers, such as `deepseek-r1`. The table gives address, price, context and
    /// dialect; the keys below override them.
    pub provider: Option<String>,
    /// File with your own table of providers, whose entries add to the built-in ones and override them.
    pub providers: Option<FilePath>,
    /// Name of the model at the server.
    pub model: Option<String>,
    /// Base URL of a server, such as `http://localhost:8000/v1`.
    pub url: Option<String>,
    /// Environment variable that holds the API key.
    pub key_env: Option<String>,
    /// Command that prints the API key; `sh` runs it.
    pub key_command: Option<String>,
    /// Several servers of the same model, instead of `url`.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// The server's variant of the protocol. Default: the provider's, or `openai`.
    pub dialect: Option<Dialect>,
    /// API that answers are requested through.
    #[serde(default)]
    pub method: Api,
    /// Whether the model takes requests as OpenAI's reasoning models do: with `max_completion_tokens`, without
    /// temperature. Default: the provider's, or `false`.
    pub reasoning_model: Option<bool>,
    /// Folder with the model's `tokenizer.json`, or repository of the Hugging Face Hub that has it (`org/name`).
    /// Distributions over token ids, exact counts of prompts and the chat template need it.
    pub tokenizer: Option<FilePath>,
    /// Context length at the server: prompt and answer together, tokens.
    #[serde(with = "Optional::<Count>", default)]
    pub context: Option<u32>,
    /// Longest wait that a server may ask for, by `Retry-After` or the headers of a rate limit, seconds. A server that asks
    /// for a longer one counts as refusing. Default: 600.
    #[serde(with = "Optional::<Positive>", default)]
    pub longest_wait: Option<f64>,
    /// Price of the server's tokens.
    pub price: Option<Price>,
    /// Opens no socket: existing answers are used, and a missing answer is an error.
    #[serde(default)]
    pub offline: bool,
}

impl TeacherSettings {
    /// Whether the teacher is behind a server.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.path.is_none()
    }
}

/// `[collect]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CollectSettings {
    /// Number of answers to each prompt.
    #[serde(with = "Count")]
    pub samples: usize,
    /// Longest answer, tokens.
    #[serde(with = "Count")]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 takes the most likely token.
    #[serde(with = "NonNegative")]
    pub temperature: f64,
    /// Number of most likely tokens to sample from. Default: all tokens.
    #[serde(with = "Optional::<Count>")]
    pub top_k: Option<usize>,
    /// Probability mass of the most likely tokens to sample from.
    #[serde(with = "Mass")]
    pub top_p: f64,
    /// Smallest probability of a token to sample, as a share of the most likely token's probability.
    #[serde(with = "Fraction")]
    pub min_p: f64,
    /// Penalty on tokens that the prompt or the answer so far contains: divides their positive logits and multiplies
    /// their negative ones.
    #[serde(with = "Positive")]
    pub repetition_penalty: f64,
    /// Texts that end an answer. They are not part of the answer.
    pub stop: Vec<String>,
    /// Prompts that a teacher in this process answers at a time.
    #[serde(with = "Count")]
    pub batch: usize,
    /// Distributions to store beside the answers. Without them and without `[score]`, a student can be trained on the text
    /// only.
    pub signals: Option<SignalSettings>,
    /// Marks around the reasoning in the answers of the teacher or of the data.
    pub reasoning: Option<Reasoning>,
    /// Whether a server streams its answers.
    pub stream: bool,
    /// Treatment of a server's answer that was cut at `max_new_tokens`.
    pub on_length: OnLength,
    /// Treatment of a server's stream that breaks off in the middle of an answer.
    pub on_break: OnBreak,
    /// Largest number of requests to a server for one answer.
    #[serde(with = "Count")]
    pub attempts: u32,
    /// Largest number of requests in flight to an endpoint. The concurrency limit falls below it when the endpoint fails
    /// or asks for fewer requests.
    #[serde(with = "Count")]
    pub concurrency: u32,
    /// Time limits of a request to a server, seconds.
    pub timeouts: Timeouts,
    /// Longest pause before the first retry of a request to a server, seconds. The pause is random, and its upper bound
    /// doubles with each retry.
    #[serde(with = "Positive")]
    pub backoff: f64,
    /// Largest value of that upper bound, seconds.
    #[serde(with = "Positive")]
    pub longest_backoff: f64,
}

impl Default for CollectSettings {
    fn default() -> Self {
        CollectSettings {
            samples: 1,
            max_new_tokens: 256,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            batch: 16,
            signals: None,
            reasoning: None,
            stream: true,
            on_length: OnLength::Keep,
            on_break: OnBreak::Retry,
            attempts: 6,
            concurrency: DEFAULT_CONCURRENCY,
            timeouts: Timeouts::default(),
            backoff: 1.0,
            longest_backoff: 60.0,
        }
    }
}

#[cfg(feature = "local")]
impl CollectSettings {
    /// The settings of the generator.
    #[must_use]
    pub fn sampling(&self) -> potstill_model::Sampling {
        potstill_model::Sampling {
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

/// `signals` of `[collect]`: what to store of each distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignalSettings {
    /// Number of most likely tokens to store at each position. More than the vocabulary stores all tokens.
    #[serde(with = "Count")]
    pub top_k: usize,
    /// Temperatures other than 1 at which a later training may use the distributions.
    #[serde(with = "Each::<Positive>", default)]
    pub temperatures: Vec<f64>,
    /// Number of tail draws at each position: tokens drawn from outside `top_k`, in proportion to their probability. With
    /// them a training can follow the whole distribution of the teacher.
    #[serde(with = "CountOrZero", default)]
    pub tail_draws: u32,
}

/// `[score]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScoreSettings {
    /// Number of most likely tokens to store at each position. More than the vocabulary stores all tokens.
    #[serde(with = "Count")]
    pub top_k: usize,
    /// Temperatures other than 1 at which a later training may use the distributions.
    #[serde(with = "Each::<Positive>", default)]
    pub temperatures: Vec<f64>,
    /// Number of tail draws at each position: tokens drawn from outside `top_k`, in proportion to their probability. With
    /// them a training can follow the whole distribution of the teacher.
    #[serde(with = "CountOrZero", default)]
    pub tail_draws: u32,
    /// Answers that a teacher in this process scores at a time.
    #[serde(with = "Count", default = "sixteen")]
    pub batch: usize,
    /// Largest number of tokens to send to a server at once. A longer text is sent in parts that overlap by half, which
    /// bounds the server's memory. Default: the server's context length.
    #[serde(
        with = "Optional::<Count>",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub window: Option<usize>,
}

impl ScoreSettings {
    /// Parts of each distribution to store.
    #[must_use]
    pub fn signals(&self) -> SignalSettings {
        SignalSettings {
            top_k: self.top_k,
            temperatures: self.temperatures.clone(),
            tail_draws: self.tail_draws,
        }
    }
}

fn sixteen() -> usize {
    16
}
