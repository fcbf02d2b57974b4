//! Settings of `curate`: the table `[curate]` of the run file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::range::Share;

/// `[curate]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CurateSettings {
    /// Answers to keep.
    pub keep: KeptAnswers,
    /// Treatment of answers that `[grade]` finds wrong.
    pub wrong: WrongAnswers,
    /// Share of prompts to hold out, chosen by a hash of seed and prompt.
    #[serde(with = "Share")]
    pub heldout: f64,
}

impl Default for CurateSettings {
    fn default() -> Self {
        CurateSettings {
            keep: KeptAnswers::Finished,
            wrong: WrongAnswers::Drop,
            heldout: 0.1,
        }
    }
}

/// `keep` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeptAnswers {
    /// Answers that the teacher ended by itself.
    Finished,
    /// All answers, also those that were cut.
    All,
}

/// `wrong` of `[curate]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WrongAnswers {
    /// Wrong answers are neither trained on nor held out.
    Drop,
    /// Wrong answers are kept.
    Keep,
}
