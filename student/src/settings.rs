use potstill_datasets::Arm;
use potstill_datasets::range::{Count, CountOrZero, NonNegative, Positive};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::head_loss::Form;
use crate::objective::Objective;

/// Treatment of sequences that are longer than `max_length`. Both kinds are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// Longer sequences are left out.
    #[default]
    Drop,
    /// Longer sequences are cut at the end, so that they lose their EOS token.
    Cut,
}

/// A control: a model that is trained like the student except for one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// The same text by cross-entropy only.
    Sft,
    /// The teacher's distributions, each replaced by that of another training position with the same target token.
    SameToken,
    /// The same text by cross-entropy with label smoothing, whose share gives the smoothed targets the mean entropy of
    /// the teacher's distributions.
    Smoothing,
    /// The teacher's distributions, each moved to another position.
    Shuffled,
}

impl Control {
    /// The arm that trains this control.
    #[must_use]
    pub fn arm(self) -> Arm {
        match self {
            Control::Sft => Arm::Sft,
            Control::SameToken => Arm::SameToken,
            Control::Smoothing => Arm::Smoothing,
            Control::Shuffled => Arm::Shuffled,
        }
    }
}

/// Settings of a training: the table `[train]` of the run file, and a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSettings {
    /// Number of optimizer steps.
    #[serde(with = "Count")]
    pub steps: u64,
    /// Sequences of an optimizer step (the global batch).
    #[serde(with = "Count")]
    pub batch: usize,
    /// Sequences of a forward pass, or with `packing` packed rows of a forward pass. Changes memory, not the gradient.
    #[serde(with = "Count")]
    pub micro_batch: usize,
    /// Whether several sequences share a packed row of up to `max_length` tokens. No sequence attends to another.
    /// Changes speed and memory, not the gradient.
    pub packing: bool,
    /// Largest learning rate, which is reached after warmup.
    #[serde(with = "Positive")]
    pub learning_rate: f64,
    /// Steps over which the learning rate rises linearly from 0.
    #[serde(with = "CountOrZero")]
    pub warmup: u64,
    /// Learning rate at the last step, where the cosine schedule ends.
    #[serde(with = "NonNegative")]
    pub min_learning_rate: f64,
    /// Decoupled weight decay of the weight matrices. Norms and embeddings have none.
    #[serde(with = "NonNegative")]
    pub weight_decay: f64,
    /// Largest global gradient norm. A larger gradient is scaled down to it.
    #[serde(with = "Positive")]
    pub clip: f64,
    /// Loss to minimise.
    #[serde(rename = "loss")]
    pub objective: Objective,
    /// Implementation of the loss. Changes speed, memory and the last digits.
    #[serde(rename = "loss_form")]
    pub form: Form,
    /// Longest sequence, tokens.
    #[serde(with = "Count")]
    pub max_length: usize,
    /// Treatment of sequences that are longer than `max_length`.
    pub overlong: Overlong,
    /// Steps between checkpoints.
    #[serde(with = "Count")]
    pub checkpoint_every: u64,
    /// Controls to train beside the student. Without distributions (`signals` or `[score]`) the default is none, because
    /// the controls would equal the student.
    pub controls: Vec<Control>,
    /// Number of seeds with which the student and every control are trained. With more than one, the report's intervals include
    /// the variation between seeds.
    #[serde(with = "Count")]
    pub seeds: u32,
    /// Rows of logits that are in memory at a time. Changes memory and the last digits.
    #[serde(with = "Count")]
    pub chunk_rows: usize,
    /// Seed of the order of the data and of the draws of the controls `same_token` and `shuffled`. Not part of `[train]`.
    #[serde(skip)]
    pub seed: u64,
}

impl Default for TrainSettings {
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
            controls: vec![Control::Sft],
            seeds: 1,
            chunk_rows: 256,
            seed: 0,
        }
    }
}

impl TrainSettings {
    /// Returns all settings that a trained model depends on, in the form of checkpoints, manifests and their keys:
    /// without `controls` and `seeds`, and with `packing` only if it is on.
    #[must_use]
    pub fn identity(&self) -> Value {
        let mut identity = json!({
            "steps": self.steps,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
        });
        if self.packing {
            identity["packing"] = json!(true);
        }
        let rest = json!({
            "learning_rate": self.learning_rate,
            "warmup": self.warmup,
            "min_learning_rate": self.min_learning_rate,
            "weight_decay": self.weight_decay,
            "clip": self.clip,
            "objective": self.objective.identity(),
            "form": self.form,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "checkpoint_every": self.checkpoint_every,
            "chunk_rows": self.chunk_rows,
            "seed": self.seed,
        });
        if let (Some(identity), Value::Object(rest)) = (identity.as_object_mut(), rest) {
            identity.extend(rest);
        }
        identity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checkpoints and keys of published models hold this text.
    #[test]
    fn the_identity_of_a_training_is_pinned() {
        assert_eq!(
            TrainSettings::default().identity().to_string(),
            r#"{"steps":100,"batch":8,"micro_batch":4,"learning_rate":0.0001,"warmup":0,"min_learning_rate":0.0,"weight_decay":0.01,"clip":1.0,"objective":{"divergences":[{"divergence":"forward_kl","weight":1.0}],"cross_entropy":0.0,"label_smoothing":0.0,"tail":"bucket","temperature":1.0,"temperature_squared":false},"form":"fused","max_length":1024,"overlong":"drop","checkpoint_every":50,"chunk_rows":256,"seed":0}"#
        );
        let packed = TrainSettings {
            packing: true,
            ..TrainSettings::default()
        };
        let text = packed.identity().to_string();
        assert!(text.contains(r#""micro_batch":4,"packing":true,"learning_rate""#));
    }
}
