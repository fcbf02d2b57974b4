//! The run file: one TOML table for each stage, with hyperparameters and nothing operational.
//!
//! Each table is a type of the crate that reads it, with ranges, defaults and documentation. The
//! parser points at a value that is out of its range; rules between keys are in `rules` and are
//! reported together. Parsing reads no file besides the text and no device, only the environment,
//! for `${NAME}` in paths.

mod hub_source;
mod loaded;
mod name;
mod problem;
mod rules;

pub use hub_source::HubSource;
pub use loaded::{Loaded, expand_path, parse};
pub use name::RunName;
use potstill_datasets::range::{NonNegative, Optional, Positive};
use potstill_datasets::{CurateSettings, FloatType, ImportSettings};
use potstill_eval::{EvalSettings, GradeSettings};
use potstill_student::{StudentSettings, TrainSettings};
use potstill_teacher::http::BudgetSettings;
use potstill_teacher::{CollectSettings, ScoreSettings, SignalSettings, TeacherSettings};
pub use problem::{ConfigError, Problem};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The settings of a run: a run file that breaks no rule, with defaults filled in and paths resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// Name and seed of the run, and the price of a device.
    pub run: RunSettings,
    /// Source of the prompts.
    pub import: ImportSettings,
    /// Model that answers the prompts, or that scores the answers of the data.
    pub teacher: Option<TeacherSettings>,
    /// Limits on what a teacher behind a server may cost.
    #[serde(default)]
    pub budget: BudgetSettings,
    /// Settings of answers.
    #[serde(default)]
    pub collect: CollectSettings,
    /// Distributions over answers that were collected without them.
    pub score: Option<ScoreSettings>,
    /// Decision which answers are right.
    pub grade: Option<GradeSettings>,
    /// Split of the prompts into train, dev and test, and selection of answers to train on.
    #[serde(default)]
    pub curate: CurateSettings,
    /// Model that training starts from.
    #[serde(default)]
    pub student: StudentSettings,
    /// Settings of training.
    #[serde(default)]
    pub train: TrainSettings,
    /// Form of the exported models.
    #[serde(default)]
    pub export: ExportSettings,
    /// Settings of the evaluation.
    #[serde(default)]
    pub eval: EvalSettings,
}

impl RunFile {
    /// Whether distributions are stored for the answers.
    pub fn has_signals(&self) -> bool {
        self.collect.signals.is_some() || self.score.is_some()
    }

    /// Parts of each distribution to store, and the name of the table that sets them.
    pub fn signals(&self) -> Option<(SignalSettings, &'static str)> {
        let collected = self.collect.signals.clone();
        let collected = collected.map(|signals| (signals, "`signals` of [collect]"));
        let scored = || Some((self.score.as_ref()?.signals(), "[score]"));
        collected.or_else(scored)
    }

    /// The teacher, if it is behind a server.
    pub fn served(&self) -> Option<&TeacherSettings> {
        self.teacher.as_ref().filter(|teacher| teacher.is_served())
    }

    /// The teacher, if it runs in this process.
    pub fn local(&self) -> Option<&TeacherSettings> {
        self.teacher.as_ref().filter(|teacher| !teacher.is_served())
    }
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunSettings {
    /// Name of the run, whose folder is `runs/<name>`.
    pub name: RunName,
    /// Seed of all random choices: answers, splits, order of training, bootstrap intervals.
    #[serde(default)]
    pub seed: u32,
    /// USD for an hour of a device, for the costs that `plan` and the report give. On a CPU the device is the machine.
    #[serde(
        with = "Optional::<NonNegative>",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub usd_per_hour: Option<f64>,
    /// Operations that a GPU computes in a second at most, 10¹², in the type of `precision`, for the model FLOP utilisation
    /// (`mfu`) in the metrics and in `plan`. Default: by the name that NVIDIA's driver gives, if it is a known one.
    #[serde(
        with = "Optional::<Positive>",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub peak_tflops: Option<f64>,
}

/// `[export]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ExportSettings {
    /// Type of the exported weights in safetensors.
    pub dtype: FloatType,
    /// Files to write. `"gguf"` writes a file for llama.cpp, `<run>-<type>.gguf`, beside the safetensors, which later
    /// stages read.
    pub format: ExportFormat,
    /// Type of the weights in GGUF; the default is `"f16"`. The blocks of quantised types, and the choice which tensors
    /// get more bits, are those of `llama-quantize`.
    #[serde(rename = "type")]
    pub gguf_type: Option<GgufTypeName>,
    /// Form of a student that was trained with `[train.adapter]`.
    pub adapter: AdapterExport,
    /// Weights that are exported and evaluated: those that were trained, or with `ema` of `[train]` their running mean
    /// (`"mean"`). With `keep_best`, those of the checkpoint at which they were best on dev.
    pub weights: ExportedWeights,
}

/// Weights that are exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportedWeights {
    /// The weights that were trained.
    #[default]
    Trained,
    /// The running mean of the weights.
    Mean,
}

/// Form of an exported student that has an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdapterExport {
    /// A whole model, whose weights have the adapter merged in.
    #[default]
    Merged,
    /// The adapter alone, in PEFT's layout. It names the checkpoint that it belongs to.
    Separate,
}

/// Format of the exported models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportFormat {
    /// A folder in Hugging Face layout.
    #[default]
    Safetensors,
    /// A folder in Hugging Face layout, and a file for llama.cpp.
    Gguf,
}

/// Type of the weights of a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum GgufTypeName {
    /// 16 bits, IEEE 754 half precision.
    #[default]
    #[serde(rename = "f16")]
    F16,
    /// 16 bits with the exponent range of `f32`.
    #[serde(rename = "bf16")]
    Bf16,
    /// 8.5 bits for each weight.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4.5 bits for each weight.
    #[serde(rename = "q4_0")]
    Q4_0,
    /// About 4.8 bits for each weight: 4 bits, and 6 bits for the tensors that matter most.
    #[serde(rename = "q4_k_m")]
    Q4KM,
}

#[cfg(test)]
mod tests;
