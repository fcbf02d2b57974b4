//! What an endpoint can do, found out before money is spent on it.

use serde::{Deserialize, Serialize};

use super::Dialect;

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
    pub logprobs: Logprobs,
    /// Log-probabilities of prompts.
    pub prompt_logprobs: Prompted,
    /// Tokens: ids, bytes, and whether they are those of the local tokenizer.
    pub tokens: Tokens,
    /// The largest difference of a log-probability between two equal questions at temperature 0, nats.
    pub repeat_difference: Option<f64>,
    /// Whether two equal questions at temperature 0 get the same text.
    pub deterministic: Option<bool>,
    /// What `usage` counts.
    pub usage: Counted,
    /// How fast it answers one question at a time.
    pub speeds: Vec<Speed>,
    /// What it does otherwise than one would think, a sentence each.
    pub quirks: Vec<String>,
    /// What to use it for.
    pub recommended: Recommended,
    /// Why not more, and which flags of the server to change, a sentence each.
    pub change: Vec<String>,
    /// What the questions cost.
    pub spent: super::Billed,
    /// How many questions there were.
    pub requests: u64,
}

/// Log-probabilities of sampled tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Logprobs {
    /// Whether they are numbers that a model could have given.
    pub kind: Kind,
    /// The largest number of likeliest tokens that came, of those that were tried.
    pub largest_k: u32,
    /// What the server said to a larger one.
    pub limit_said: Option<String>,
    /// Whether they are of the model's own distribution or of what is left after temperature.
    pub temperature: Scale,
    /// The same for penalties on repeated tokens.
    pub penalties: Scale,
    /// Whether a penalty on repeated tokens is on unless the request turns it off.
    pub penalty_by_default: Option<bool>,
}

/// What log-probabilities are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
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
pub enum Scale {
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
pub struct Prompted {
    /// How they are had.
    pub through: Through,
    /// The largest number of likeliest tokens that came, of those that were tried.
    pub largest_k: u32,
    /// What the server said to a larger one.
    pub limit_said: Option<String>,
    /// By how many positions they are late (−1: an entry belongs to the token before); `None` where they fit
    /// those of answers nowhere.
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
pub enum Through {
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
pub struct Tokens {
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
pub struct Counted {
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
pub struct Speed {
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
pub enum Recommended {
    /// Text alone: train by cross-entropy.
    #[default]
    Traces,
    /// Log-probabilities too: train by a divergence.
    Logits,
}
