use potstill_datasets::range::{CountOrZero, Positive, Share};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a training does about a loss that is not finite or that jumps: the table `[train.guard]` of the run file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSettings {
    /// Steps that may be skipped in a row because their loss or gradient is not finite or jumps. After that, training goes
    /// back to the last checkpoint.
    #[serde(with = "CountOrZero")]
    pub skips: u64,
    /// How often training may go back to a checkpoint before it stops with an error.
    #[serde(with = "CountOrZero")]
    pub returns: u64,
    /// Factor on the learning rate after each return.
    #[serde(with = "Share")]
    pub rate_factor: f64,
    /// A step jumps if its gradient norm is more than this many times the running mean of the norms.
    #[serde(with = "Positive")]
    pub spike: f64,
}

impl Default for GuardSettings {
    fn default() -> Self {
        Self {
            skips: 3,
            returns: 2,
            rate_factor: 0.5,
            spike: 100.0,
        }
    }
}
