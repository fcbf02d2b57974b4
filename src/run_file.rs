//! The run file: one TOML table a stage, hyperparameters and nothing operational.
//!
//! Parsing touches no file and no device; the only thing it reads besides the text is
//! the environment, for `${NAME}` in paths. Range rules live in [`ranges`], so that the
//! parser points at the value; rules between keys are in `rules` and are reported
//! together.

mod loaded;
mod place;
pub mod ranges;
mod rules;
mod teacher;

pub use loaded::{Loaded, parse};
pub use place::{ConfigError, Problem};
use potstill_datasets::{CurateSettings, FloatType, ImportSettings, Reasoning};
use potstill_eval::{EvalSettings, GradeSettings};
use potstill_student::{Settings, StudentSettings};
use ranges::{Count, CountOrZero, Fraction, Mass, NonNegative, Positive, RunName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use teacher::{Budget, Dialect, Endpoint, Method, OnBreak, OnLength, Price, Teacher, Timeouts};

/// A parsed run file that breaks no rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// Name and seed of the run.
    pub run: Run,
    /// Source of the prompts.
    pub import: ImportSettings,
    /// Model that answers the prompts, or that scores the answers of the data.
    pub teacher: Option<Teacher>,
    /// Limits on what a teacher behind a server may cost.
    #[serde(default)]
    pub budget: Budget,
    /// Settings of answers.
    #[serde(default)]
    pub collect: Collect,
    /// Distributions over answers that were collected without them.
    pub score: Option<Score>,
    /// Decision which answers are right.
    pub grade: Option<GradeSettings>,
    /// Selection of answers to train on and to hold out.
    #[serde(default)]
    pub curate: CurateSettings,
    /// Model that training starts from.
    #[serde(default)]
    pub student: StudentSettings,
    /// Settings of training.
    #[serde(default)]
    pub train: Settings,
    /// Form of the exported models.
    #[serde(default)]
    pub export: Export,
    /// Settings of the evaluation.
    #[serde(default)]
    pub eval: EvalSettings,
}

impl RunFile {
    /// Whether distributions are stored beside the answers.
    pub fn has_signals(&self) -> bool {
        self.collect.signals.is_some() || self.score.is_some()
    }

    /// The teacher, where it is behind a server.
    pub fn served(&self) -> Option<&Teacher> {
        self.teacher.as_ref().filter(|teacher| teacher.is_served())
    }

    /// The teacher, where it runs here.
    pub fn local(&self) -> Option<&Teacher> {
        self.teacher.as_ref().filter(|teacher| !teacher.is_served())
    }
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Name of the run, whose folder is `runs/<name>`.
    pub name: RunName,
    /// Seed of all random choices: answers, held-out split, order of training, bootstrap intervals.
    #[serde(default)]
    pub seed: u32,
}

/// `[collect]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Collect {
    /// Answers to each prompt.
    pub samples: Count,
    /// Longest answer, tokens.
    pub max_new_tokens: Count,
    /// Sampling temperature; 0 takes the most likely token.
    pub temperature: NonNegative,
    /// So many of the likeliest tokens are sampled from; by default all.
    pub top_k: Option<Count>,
    /// Smallest set of tokens with this mass is sampled from.
    pub top_p: Mass,
    /// Tokens with less than this share of the likeliest one's probability are not sampled.
    pub min_p: Fraction,
    /// Divides the logits of tokens that are in the prompt or in the answer so far where they are
    /// positive, and multiplies them where they are negative.
    pub repetition_penalty: Positive,
    /// Texts that end an answer, which then stops before them.
    pub stop: Vec<String>,
    /// Sequences asked together. Part of what makes answers reproducible.
    pub batch: Count,
    /// Distributions to store beside the text. Without them, and without `[score]`, the text alone
    /// can be trained on.
    pub signals: Option<Signals>,
    /// Marks around the reasoning in the text of the teacher, or of the data's own answers.
    pub reasoning: Option<Reasoning>,
    /// Of a teacher behind a server: whether answers come in pieces as they are made.
    pub stream: bool,
    /// Of a teacher behind a server: what becomes of an answer that was cut at `max_new_tokens`.
    pub on_length: OnLength,
    /// Of a teacher behind a server: what becomes of a stream that breaks in the middle.
    pub on_break: OnBreak,
    /// Of a teacher behind a server: most requests for one answer.
    pub attempts: Count,
    /// Of a teacher behind a server: most requests at a time to an endpoint. Fewer where it fails or
    /// wants to be asked less.
    pub concurrency: Count,
    /// Of a teacher behind a server: how long is waited, seconds.
    pub timeouts: Timeouts,
    /// Of a teacher behind a server: the first pause before a request is tried again, seconds. Each
    /// further one is up to twice as long.
    pub backoff: Positive,
    /// Of a teacher behind a server: the longest such pause, seconds.
    pub longest_backoff: Positive,
}

impl Default for Collect {
    fn default() -> Self {
        Collect {
            samples: default_of(1.0),
            max_new_tokens: default_of(256.0),
            temperature: default_of(1.0),
            top_k: None,
            top_p: default_of(1.0),
            min_p: default_of(0.0),
            repetition_penalty: default_of(1.0),
            stop: Vec::new(),
            batch: default_of(16.0),
            signals: None,
            reasoning: None,
            stream: true,
            on_length: OnLength::Keep,
            on_break: OnBreak::Retry,
            attempts: default_of(6.0),
            concurrency: default_of(64.0),
            timeouts: Timeouts::default(),
            backoff: default_of(1.0),
            longest_backoff: default_of(60.0),
        }
    }
}

/// `signals` of `[collect]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signals {
    /// Most likely tokens stored at each position.
    pub top_k: Count,
    /// Temperatures other than 1 that a later training may use.
    #[serde(default)]
    pub temperatures: Vec<Positive>,
    /// Tokens drawn at each position from outside of `top_k`, each with its share of what is left. A
    /// training can then follow the teacher's whole distribution.
    #[serde(default = "none")]
    pub tail_draws: CountOrZero,
}

/// `[score]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Most likely tokens stored at each position.
    pub top_k: Count,
    /// Temperatures other than 1 that a later training may use.
    #[serde(default)]
    pub temperatures: Vec<Positive>,
    /// Tokens drawn at each position from outside of `top_k`, each with its share of what is left. A
    /// training can then follow the teacher's whole distribution.
    #[serde(default = "none")]
    pub tail_draws: CountOrZero,
    /// Answers scored together.
    #[serde(default = "sixteen")]
    pub batch: Count,
    /// Of a teacher behind a server: most tokens that are sent at once. A longer text is sent in parts
    /// that overlap by half, so that the server's memory holds. By default all of its context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Count>,
}

/// `[export]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Type of the exported weights.
    pub dtype: FloatType,
}

/// A default, which is in range because it is written here.
#[allow(clippy::expect_used)]
fn default_of<T: TryFrom<f64, Error = String>>(value: f64) -> T {
    T::try_from(value).expect("defaults are in range")
}

fn sixteen() -> Count {
    default_of(16.0)
}

fn none() -> CountOrZero {
    default_of(0.0)
}

#[cfg(test)]
mod tests;
