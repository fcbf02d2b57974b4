use potstill_datasets::range::{Count, FilePath, Optional};
use potstill_datasets::{TemplateArguments, TemplateSource};
use potstill_model::Config;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::layers::Layers;

/// The model that training starts from: the table `[student]` of the run file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StudentSettings {
    /// Checkpoint that the student starts from: a folder, a GGUF file, or a repository of the Hugging Face Hub
    /// (`org/name`). Default: the teacher's.
    pub path: Option<FilePath>,
    /// Branch, tag or commit of the repository that `path` names. A run keeps the commit that it used first. Default:
    /// `main`.
    pub revision: Option<String>,
    /// Chat template for a run without a teacher: `"plain"` or a `.jinja` file. Default: the checkpoint's own chat
    /// template.
    pub template: Option<TemplateSource>,
    /// Arguments of the student's chat template, where the student learns from text and where it answers in the
    /// evaluation. Default: the teacher's.
    pub template_arguments: Option<TemplateArguments>,
    /// Layer pruning: layers of the checkpoint to keep. A list, such as `[0, 2, 5]`; or `{ every = 2 }`; or the ends of
    /// the checkpoint, such as `{ first = 8, last = 7 }`.
    pub layers: Option<Layers>,
    /// Random weights of this shape in place of the checkpoint's. The vocabulary is the checkpoint's.
    pub random: Option<RandomShape>,
}

/// Largest learning rate of a student with random weights, if the run file sets none.
const RANDOM_RATE: f64 = 1.5e-3;
/// The same of a pruned checkpoint.
const PRUNED_RATE: f64 = 5e-4;
/// The same of a whole checkpoint.
const WHOLE_RATE: f64 = 1e-4;

impl StudentSettings {
    /// The learning rate of a run file that sets none: the further the student's start is from a trained model, the
    /// larger it is.
    #[must_use]
    pub fn default_learning_rate(&self) -> f64 {
        match (&self.random, &self.layers) {
            (Some(_), _) => RANDOM_RATE,
            (None, Some(_)) => PRUNED_RATE,
            (None, None) => WHOLE_RATE,
        }
    }
}

/// `random` of `[student]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomShape {
    /// Width of the model (hidden size).
    #[serde(with = "Count")]
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    #[serde(with = "Count")]
    pub intermediate_size: usize,
    /// Number of decoder layers.
    #[serde(with = "Count")]
    pub layers: usize,
    /// Number of query heads.
    #[serde(with = "Count")]
    pub heads: usize,
    /// Number of key and value heads. Default: the number of query heads.
    #[serde(with = "Optional::<Count>", default)]
    pub key_value_heads: Option<usize>,
}

impl RandomShape {
    /// Number of key and value heads.
    #[must_use]
    pub fn key_value_heads(&self) -> usize {
        self.key_value_heads.unwrap_or(self.heads)
    }

    /// The configuration of a model of this shape; all else is as in `checkpoint`.
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_json`] for a shape that the checkpoint's family cannot have.
    pub fn config(&self, checkpoint: &Config) -> Result<Config, potstill_model::Error> {
        checkpoint.with_keys([
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("num_hidden_layers", json!(self.layers)),
            ("num_attention_heads", json!(self.heads)),
            ("num_key_value_heads", json!(self.key_value_heads())),
            ("head_dim", json!(self.hidden_size / self.heads)),
            ("layer_types", Value::Null),
            ("no_rope_layers", Value::Null),
        ])
    }
}
