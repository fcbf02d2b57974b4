//! The run file: one TOML table a stage, hyperparameters and nothing operational.
//!
//! Parsing touches no file and no device; the only thing it reads besides the text is
//! the environment, for `${NAME}` in paths. Range rules live in [`ranges`], so that the
//! parser points at the value; rules between keys are in `rules` and are reported
//! together.

mod loaded;
mod loss;
mod place;
pub mod ranges;
mod rules;
mod teacher;

pub use loaded::{Loaded, parse};
pub use loss::{Adaptive, Alpha, Jsd, Loss, Skew, Tail};
pub use place::{ConfigError, Problem};
use ranges::{Count, CountOrZero, Fraction, Mass, NonNegative, Positive, RunName, RunPath, Share};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use teacher::{Budget, Dialect, Endpoint, Method, OnBreak, OnLength, Price, Teacher, Timeouts};

/// A parsed run file that breaks no rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// The run itself.
    pub run: Run,
    /// Where prompts come from.
    pub import: Import,
    /// Who answers them, or scores the answers that the data has.
    pub teacher: Option<Teacher>,
    /// What a teacher behind a server may cost.
    #[serde(default)]
    pub budget: Budget,
    /// How they are answered.
    #[serde(default)]
    pub collect: Collect,
    /// Distributions over answers that were collected without.
    pub score: Option<Score>,
    /// Which answers are right.
    pub grade: Option<Grade>,
    /// Which answers are kept, and which are held out.
    #[serde(default)]
    pub curate: Curate,
    /// The model that learns.
    #[serde(default)]
    pub student: Student,
    /// How it learns.
    #[serde(default)]
    pub train: Train,
    /// How it is written.
    #[serde(default)]
    pub export: Export,
    /// How it is measured.
    #[serde(default)]
    pub eval: Eval,
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
    /// Name of the run: its folder is `runs/<name>`.
    pub name: RunName,
    /// Seed of everything that is drawn: answers, the held-out split, orders, intervals.
    #[serde(default)]
    pub seed: u32,
}

/// `[import]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// A file of prompts: JSONL, JSON, CSV, TSV (each also as `.gz`) or Parquet, by the end of its name.
    pub path: RunPath,
    /// Take the first so many lines only.
    pub limit: Option<Count>,
    /// Which columns hold the prompt.
    pub columns: Columns,
    /// A system message to put before every prompt.
    pub system: Option<String>,
    /// Whose answers are learned from.
    #[serde(default)]
    pub answers: Answers,
}

/// `answers` of `[import]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Answers {
    /// The teacher is asked.
    #[default]
    Teacher,
    /// Those that the data has.
    Given,
}

/// `columns` of `[import]`: exactly one of `text`, `question`, `messages` or `instruction`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// Column with the prompt as one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Column with a question, which becomes one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// Column with the reference answer, beside `question`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Column with the part of the data that a row belongs to, beside any of the others; accuracy is
    /// given for each part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Column with a list of chat messages, in OpenAI's form or ShareGPT's. If the last is the
    /// assistant's, it is an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// Column with an instruction, which becomes one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// Column with what the instruction is about, beside `instruction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// Column with the answer, beside `instruction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// A floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the range of `f32`.
    Bf16,
    /// 16 bits, IEEE.
    F16,
    /// 64 bits.
    F64,
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

/// `reasoning` of `[collect]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Reasoning {
    /// Text that opens it, such as `<think>`.
    pub open: String,
    /// Text that closes it, such as `</think>`.
    pub close: String,
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

/// `[grade]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Grade {
    /// How an answer is compared with its prompt's reference.
    pub grader: Grader,
}

/// How an answer is compared with its prompt's reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Grader {
    /// The final answer is the reference, but for white space.
    Exact,
    /// The last number of the final answer is the reference's.
    Number,
}

impl From<Grader> for potstill_eval::Grader {
    fn from(grader: Grader) -> Self {
        match grader {
            Grader::Exact => potstill_eval::Grader::Exact,
            Grader::Number => potstill_eval::Grader::Number,
        }
    }
}

/// `[curate]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Curate {
    /// Which answers are kept.
    pub keep: Keep,
    /// What happens to answers that `[grade]` finds wrong.
    pub wrong: Wrong,
    /// Share of prompts held out, by a hash of seed and prompt.
    pub heldout: Share,
}

impl Default for Curate {
    fn default() -> Self {
        Curate {
            keep: Keep::Finished,
            wrong: Wrong::Drop,
            heldout: default_of(0.1),
        }
    }
}

/// `keep` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// Answers that the teacher ended by itself.
    Finished,
    /// Every answer, cut ones too.
    All,
}

/// `wrong` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Wrong {
    /// They are left out of training and of the held-out answers.
    Drop,
    /// They stay.
    Keep,
}

/// `[student]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Student {
    /// Checkpoint it starts from; by default the teacher's.
    pub path: Option<RunPath>,
    /// `"plain"`, or a `.jinja` file, where there is no teacher whose template serves; by default the
    /// checkpoint's own chat template.
    pub template: Option<RunPath>,
    /// Keep layers 0, n, 2n, … of that checkpoint.
    pub every: Option<Count>,
    /// Start from random weights of this shape, with the checkpoint's vocabulary.
    pub random: Option<Random>,
}

/// `random` of `[student]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Random {
    /// Model width.
    pub hidden_size: Count,
    /// Width inside the feed-forward layers.
    pub intermediate_size: Count,
    /// Decoder layers.
    pub layers: Count,
    /// Query heads.
    pub heads: Count,
    /// Key and value heads; by default as many as query heads.
    pub key_value_heads: Option<Count>,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Optimizer steps.
    pub steps: Count,
    /// Sequences a step.
    pub batch: Count,
    /// Sequences a forward pass, or rows of them with `packing`.
    pub micro_batch: Count,
    /// Put several sequences into one row of up to `max_length` tokens; none sees the others.
    pub packing: bool,
    /// Highest learning rate.
    pub learning_rate: Positive,
    /// Steps over which it rises from 0.
    pub warmup: CountOrZero,
    /// Where the cosine ends.
    pub min_learning_rate: NonNegative,
    /// Decoupled weight decay; none on norms and embeddings.
    pub weight_decay: NonNegative,
    /// Largest global gradient norm.
    pub clip: Positive,
    /// What is made small.
    pub loss: Loss,
    /// How it is computed.
    pub loss_form: LossForm,
    /// Longest sequence, tokens.
    pub max_length: Count,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// Steps between checkpoints.
    pub checkpoint_every: Count,
    /// Controls trained beside the student.
    pub controls: Vec<Control>,
    /// Times that the student and `sft` are trained, each time with the next seed: what seeds do is
    /// then part of the report's intervals.
    pub seeds: Count,
    /// Rows of logits held at once; bounds memory, and is part of what is reproducible.
    pub chunk_rows: Count,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            steps: default_of(100.0),
            batch: default_of(8.0),
            micro_batch: default_of(4.0),
            packing: false,
            learning_rate: default_of(1e-4),
            warmup: default_of(0.0),
            min_learning_rate: default_of(0.0),
            weight_decay: default_of(0.01),
            clip: default_of(1.0),
            loss: Loss::default(),
            loss_form: LossForm::Auto,
            max_length: default_of(1024.0),
            overlong: Overlong::Drop,
            checkpoint_every: default_of(50.0),
            controls: vec![Control::Sft, Control::Shuffled],
            seeds: default_of(1.0),
            chunk_rows: default_of(256.0),
        }
    }
}

/// `loss_form` of `[train]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LossForm {
    /// What suits the device.
    #[default]
    Auto,
    /// In chunks of `chunk_rows`, by the kernels.
    Fused,
    /// All positions of a micro-batch at once, by tensor operations: slower, and in several times the
    /// memory.
    Plain,
}

/// `overlong` of `[train]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Leave it out, and count it.
    Drop,
    /// Keep its beginning, and count it.
    Cut,
}

/// A control: trained as the student is, but for one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// Same text, cross-entropy only.
    Sft,
    /// Each position gets the distribution of another.
    Shuffled,
}

/// `[export]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// The type of the exported weights.
    pub dtype: Dtype,
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Bootstrap draws behind an interval.
    pub resamples: Count,
    /// Let every model answer the held-out prompts, and grade the answers.
    pub answers: Option<EvalAnswers>,
}

/// `answers` of `[eval]`: greedy answers to held-out prompts that have a reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalAnswers {
    /// How an answer is compared with its prompt's reference.
    pub grader: Grader,
    /// Longest answer, tokens.
    pub max_new_tokens: Count,
    /// Prompts answered together.
    #[serde(default = "sixteen")]
    pub batch: Count,
}

impl Default for Eval {
    fn default() -> Self {
        Eval {
            resamples: default_of(2000.0),
            answers: None,
        }
    }
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
