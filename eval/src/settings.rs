use potstill_datasets::range::Count;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Grader;

/// `[grade]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GradeSettings {
    /// Comparison of an answer with the reference of its prompt.
    pub grader: Grader,
}

/// `[eval]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSettings {
    /// Number of bootstrap resamples for the interval of the calibration error. All other intervals need none.
    #[serde(with = "Count")]
    pub resamples: usize,
    /// Lets every model answer the prompts of test, and grades the answers. Default: no answers.
    pub answers: Option<EvalAnswers>,
    /// Lets the base and every trained model answer test prompts at temperature 1, and measures their divergence from a
    /// local teacher on these answers. Default: no own text.
    pub own_text: Option<EvalOwnText>,
}

impl Default for EvalSettings {
    fn default() -> Self {
        EvalSettings {
            resamples: 2000,
            answers: None,
            own_text: None,
        }
    }
}

/// `answers` of `[eval]`: greedy answers to prompts of test that have a reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalAnswers {
    /// Comparison of an answer with the reference of its prompt.
    pub grader: Grader,
    /// Longest answer, tokens.
    #[serde(with = "Count")]
    pub max_new_tokens: usize,
    /// Prompts that a model answers at a time.
    #[serde(with = "Count", default = "sixteen")]
    pub batch: usize,
}

/// `own_text` of `[eval]`: answers to test prompts at temperature 1, scored by a local teacher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalOwnText {
    /// Largest number of test prompts to answer.
    #[serde(with = "Count")]
    pub prompts: usize,
    /// Longest answer, tokens.
    #[serde(with = "Count")]
    pub max_new_tokens: usize,
    /// Prompts that a model answers at a time.
    #[serde(with = "Count", default = "sixteen")]
    pub batch: usize,
}

fn sixteen() -> usize {
    16
}
