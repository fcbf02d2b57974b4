use std::collections::BTreeMap;

use potstill_datasets::Arm;
use potstill_datasets::range::{Count, Each, NonNegative, Optional, Positive, Share, ShareOrCount};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::adapter::{ADAPTER_RATE, AdapterSettings};
use crate::guard::GuardSettings;
use crate::head_loss::Form;
use crate::objective::Objective;
use crate::optimizer_settings::{DecayedRole, MomentType, OptimizerKind};
use crate::precision::Precision;
use crate::schedule::{Schedule, ScheduleShape};

/// Passes over the training sequences if the run file sets neither `steps` nor `epochs`.
const DEFAULT_EPOCHS: f64 = 3.0;

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

/// Order of the training sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum SequenceOrder {
    /// At random, anew in each pass.
    #[default]
    #[serde(rename = "random")]
    Random,
    /// Batches of sequences of similar length, in random order, so that a device sees few shapes and little padding.
    #[serde(rename = "by_length")]
    ByLength,
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
    /// Number of optimizer steps. Default: as many as `epochs` takes.
    #[serde(with = "Optional::<Count>")]
    pub steps: Option<u64>,
    /// Number of passes over the training sequences, if `steps` is not set; may be a fraction. Default: 3.
    #[serde(with = "Optional::<Positive>")]
    pub epochs: Option<f64>,
    /// Sequences of an optimizer step (the global batch).
    #[serde(with = "Count")]
    pub batch: usize,
    /// Sequences of a forward pass, or with `packing` packed rows of a forward pass. Changes memory, not the gradient.
    #[serde(with = "Count")]
    pub micro_batch: usize,
    /// Whether several sequences share a packed row of up to `max_length` tokens. No sequence attends to another.
    /// Changes speed and memory, not the gradient.
    pub packing: bool,
    /// Largest learning rate, which is reached after warm-up. Default: 1.5e-3 for a student with random weights, 5e-4 for
    /// a pruned one, 1e-4 for a whole checkpoint, and 2e-4 for an adapter.
    #[serde(with = "Optional::<Positive>")]
    pub learning_rate: Option<f64>,
    /// Learning rates to choose from, in place of `learning_rate`. Every arm is trained at each of them with the first
    /// seed for all steps, and keeps the rate with the lowest KL (without distributions: negative log-likelihood) on
    /// the prompts of `dev`.
    #[serde(with = "Each::<Positive>")]
    pub learning_rates: Vec<f64>,
    /// Steps over which the learning rate rises linearly from 0: below 1 a share of all steps, otherwise their number.
    #[serde(with = "ShareOrCount")]
    pub warmup: f64,
    /// Learning rate at the last step, where the cosine schedule ends.
    #[serde(with = "NonNegative")]
    pub min_learning_rate: f64,
    /// Decoupled weight decay of the parameters that `weight_decay_on` names.
    #[serde(with = "NonNegative")]
    pub weight_decay: f64,
    /// Parameters that decay.
    pub weight_decay_on: Vec<DecayedRole>,
    /// Largest global gradient norm. A larger gradient is scaled down to it.
    #[serde(with = "Positive")]
    pub clip: f64,
    /// Loss to minimise.
    #[serde(rename = "loss")]
    pub objective: Objective,
    /// Implementation of the loss. Changes speed, memory and the last digits.
    #[serde(rename = "loss_form")]
    pub form: Form,
    /// Number type of the computation.
    pub precision: Precision,
    /// Whether the activations of a layer are computed again in the backward pass instead of being kept. Changes memory and
    /// speed, not the result.
    pub recompute: bool,
    /// Parameters that are not trained: names as in the checkpoint, whole, up to a dot, or with `*` for any characters,
    /// such as `["model.embed_tokens", "model.layers.*.mlp"]`.
    pub freeze: Vec<String>,
    /// Low-rank adapter that is trained in place of the weights. Default: none.
    pub adapter: Option<AdapterSettings>,
    /// Optimizer.
    pub optimizer: OptimizerKind,
    /// Number type of AdamW's moments. Changes memory and the result.
    pub moments: MomentType,
    /// Course of the learning rate after warm-up.
    #[serde(rename = "schedule")]
    pub schedule_shape: ScheduleShape,
    /// Last steps over which the schedule `wsd` lets the learning rate fall: below 1 a share of all steps, otherwise their
    /// number.
    #[serde(with = "ShareOrCount")]
    pub decay: f64,
    /// Factors on the learning rate of some parameters, by pattern as in `freeze`; the first pattern that fits counts.
    pub rate_factors: BTreeMap<String, f64>,
    /// Decay of a running mean of the weights that is kept beside them and measured on dev, such as 0.999. Default: none.
    #[serde(with = "Optional::<Share>")]
    pub ema: Option<f64>,
    /// Longest sequence, tokens.
    #[serde(with = "Count")]
    pub max_length: usize,
    /// Treatment of sequences that are longer than `max_length`.
    pub overlong: Overlong,
    /// Steps between checkpoints.
    #[serde(with = "Count")]
    pub checkpoint_every: u64,
    /// Number of last checkpoints that are kept.
    #[serde(with = "Count")]
    pub keep_checkpoints: usize,
    /// Whether the model is measured on `dev` at each checkpoint, and the best checkpoint is kept and exported instead of the
    /// last.
    pub keep_best: bool,
    /// Order of the training sequences.
    pub order: SequenceOrder,
    /// Replicas of the model on a CPU, each of which computes a part of each batch, in threads of its own or under `mpirun` in a
    /// process of its own. Changes the last digits of the result.
    #[serde(with = "Count")]
    pub replicas: usize,
    /// Treatment of steps whose loss is not finite or jumps.
    pub guard: GuardSettings,
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
    /// Hash that identifies the model that training starts from. A checkpoint of a training with frozen weights does not
    /// hold them, so it names them by this hash. Not part of `[train]`.
    #[serde(skip)]
    pub base: String,
    /// Operations that a device computes in a second at most, in the type of `precision`, from which metrics get the MFU.
    /// Not part of `[train]`.
    #[serde(skip)]
    pub peak_flops: Option<f64>,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            steps: None,
            epochs: None,
            batch: 8,
            micro_batch: 4,
            packing: false,
            learning_rate: None,
            learning_rates: Vec::new(),
            warmup: 0.05,
            min_learning_rate: 0.0,
            weight_decay: 0.01,
            weight_decay_on: DecayedRole::DEFAULT.to_vec(),
            clip: 1.0,
            objective: Objective::default(),
            form: Form::Fused,
            precision: Precision::default(),
            recompute: false,
            freeze: Vec::new(),
            adapter: None,
            optimizer: OptimizerKind::default(),
            moments: MomentType::default(),
            schedule_shape: ScheduleShape::default(),
            decay: 0.1,
            rate_factors: BTreeMap::new(),
            ema: None,
            max_length: 1024,
            overlong: Overlong::Drop,
            checkpoint_every: 50,
            keep_checkpoints: 2,
            keep_best: false,
            order: SequenceOrder::default(),
            replicas: 1,
            guard: GuardSettings::default(),
            controls: vec![Control::Sft],
            seeds: 1,
            chunk_rows: 256,
            seed: 0,
            base: String::new(),
            peak_flops: None,
        }
    }
}

impl TrainSettings {
    /// Learning rates that are trained: `learning_rates`, or the one rate of `learning_rate` or its default, which is that of
    /// the student's start or that of adapters.
    #[must_use]
    pub fn rates(&self, default_learning_rate: f64) -> Vec<f64> {
        let default = match self.adapter {
            Some(_) => ADAPTER_RATE,
            None => default_learning_rate,
        };
        match self.learning_rates.is_empty() {
            true => vec![self.learning_rate.unwrap_or(default)],
            false => self.learning_rates.clone(),
        }
    }

    /// Whether the model is measured on dev at regular checkpoints.
    #[must_use]
    pub fn measures_dev(&self) -> bool {
        self.keep_best || self.ema.is_some()
    }

    /// Resolves the number of steps and the warm-up for a number of training sequences.
    #[must_use]
    pub fn schedule(&self, sequences: usize, learning_rate: f64) -> Schedule {
        let batches = sequences as f64 / self.batch.max(1) as f64;
        let epochs = self.epochs.unwrap_or(DEFAULT_EPOCHS);
        let steps = self.steps.unwrap_or_else(|| whole(epochs * batches));
        let steps = steps.max(1);
        let count = |share: f64| match share < 1.0 {
            true => whole(share * steps as f64),
            false => share as u64,
        };
        Schedule {
            steps,
            warmup_steps: count(self.warmup).min(steps),
            learning_rate,
            min_learning_rate: self.min_learning_rate,
            shape: self.schedule_shape,
            decay_steps: match self.schedule_shape {
                ScheduleShape::WarmupStableDecay => count(self.decay).min(steps),
                _ => 0,
            },
        }
    }

    /// Returns all settings that a trained model depends on, in the form of checkpoints, manifests and their keys:
    /// with the resolved schedule, without `controls` and `seeds`.
    #[must_use]
    pub fn identity(&self, schedule: &Schedule) -> Value {
        json!({
            "schedule": schedule,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "packing": self.packing,
            "order": self.order,
            "weight_decay": self.weight_decay,
            "weight_decay_on": self.weight_decay_on,
            "clip": self.clip,
            "objective": self.objective.identity(),
            "form": self.form,
            "precision": self.precision,
            "recompute": self.recompute,
            "freeze": self.freeze,
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "moments": self.moments,
            "rate_factors": self.rate_factors,
            "ema": self.ema,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "checkpoint_every": self.checkpoint_every,
            "keep_best": self.keep_best,
            "replicas": self.replicas,
            "guard": self.guard,
            "chunk_rows": self.chunk_rows,
            "seed": self.seed,
            "base": self.base,
        })
    }
}

/// Rounds up to a whole number; a product that rounding made slightly larger than a whole number is not raised.
fn whole(value: f64) -> u64 {
    (value - 1e-9).ceil().max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_from_epochs_and_warmup_from_steps() {
        let resolved = |settings: &TrainSettings, sequences| {
            let schedule = settings.schedule(sequences, 1.0);
            (schedule.steps, schedule.warmup_steps)
        };
        let mut settings = TrainSettings::default();
        assert_eq!(resolved(&settings, 8), (3, 1));
        assert_eq!(resolved(&settings, 9), (4, 1));
        assert_eq!(resolved(&settings, 1600), (600, 30));
        settings.epochs = Some(0.7);
        // 0.7 · 240 / 8 is 21, and 0.07 · 100 is slightly above 7 in f64.
        assert_eq!(resolved(&settings, 240).0, 21);
        assert_eq!(resolved(&settings, 1), (1, 1));
        settings.steps = Some(100);
        settings.warmup = 0.07;
        assert_eq!(resolved(&settings, 240), (100, 7));
        settings.warmup = 0.0;
        assert_eq!(resolved(&settings, 240), (100, 0));
        settings.warmup = 1.0;
        assert_eq!(resolved(&settings, 240), (100, 1));
        settings.warmup = 200.0;
        assert_eq!(resolved(&settings, 240), (100, 100));
    }

    #[test]
    fn rates_are_those_of_the_run_file_or_the_default() {
        let mut settings = TrainSettings::default();
        assert_eq!(settings.rates(2e-3), [2e-3]);
        settings.learning_rate = Some(1e-3);
        assert_eq!(settings.rates(2e-3), [1e-3]);
        settings.learning_rate = None;
        settings.adapter = Some(AdapterSettings::default());
        assert_eq!(settings.rates(2e-3), [2e-4]);
        settings.learning_rates = vec![1e-4, 1e-5];
        assert_eq!(settings.rates(2e-3), [1e-4, 1e-5]);
    }

    #[test]
    fn the_identity_of_a_training_has_its_settings_without_those_of_other_trainings() {
        let mut settings = TrainSettings::default();
        let schedule = settings.schedule(267, 1e-4);
        let before = settings.identity(&schedule);
        assert_eq!(before["schedule"]["steps"], 101);
        settings.seeds = 3;
        settings.controls = vec![Control::Shuffled];
        assert_eq!(settings.identity(&schedule), before);
        settings.precision = Precision::Bf16;
        assert_ne!(settings.identity(&schedule), before);
    }
}
