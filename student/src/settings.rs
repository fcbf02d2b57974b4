use serde::{Deserialize, Serialize};

use crate::head_loss::Form;
use crate::objective::Objective;

/// What is done with a row that is longer than `max_length`. Either way it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// It is left out.
    #[default]
    Drop,
    /// Its end is cut off, and with it the EOS token.
    Cut,
}

/// A training run, but for its data and its start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a step: the accumulation window.
    pub batch: usize,
    /// Sequences a forward pass, or rows of them with `packing`; changes memory, not the gradient.
    pub micro_batch: usize,
    /// Whether sequences share rows of up to `max_length` tokens, where each sees itself alone; changes
    /// speed and memory, not the gradient. Left out of what is stored when off, as it was before it existed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packing: bool,
    /// The peak, after warm-up.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Where the cosine ends.
    pub min_learning_rate: f64,
    /// Decoupled decay of the matrices; norms and embeddings have none.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 for none.
    pub clip: f64,
    /// What is minimised.
    pub objective: Objective,
    /// How it is computed; changes speed and memory, and the last digits.
    pub form: Form,
    /// Longest sequence, in tokens.
    pub max_length: usize,
    /// What becomes of longer ones.
    pub overlong: Overlong,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Rows of logits that exist at a time.
    pub chunk_rows: usize,
    /// Decides the order of the data and the permutation of the control `shuffled`.
    pub seed: u64,
}

impl Default for Settings {
    /// As the run file has them, with 100 steps.
    fn default() -> Self {
        Self {
            steps: 100,
            batch: 8,
            micro_batch: 4,
            packing: false,
            learning_rate: 1e-4,
            warmup: 0,
            min_learning_rate: 0.0,
            weight_decay: 0.01,
            clip: 1.0,
            objective: Objective::default(),
            form: Form::Fused,
            max_length: 1024,
            overlong: Overlong::Drop,
            checkpoint_every: 50,
            chunk_rows: 256,
            seed: 0,
        }
    }
}
