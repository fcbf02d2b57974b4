//! The trainer: model, optimizer and files between two steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use potstill_datasets::Arm;
use potstill_model::Decoder;

use crate::batch::Batch;
use crate::checkpoint::{self, Checkpoint, TrainingState};
use crate::error::Error;
use crate::gradient::gradient_of;
use crate::loss::Divergence;
use crate::metrics::{MetricsFile, StepMetrics, peak_bytes};
use crate::not_finite::check_finite;
use crate::objective::Objective;
use crate::optimizer::{Optimizer, clip_global_norm};
use crate::precision::{Precision, cast};
use crate::schedule::Schedule;
use crate::settings::TrainSettings;
use crate::tensorboard::EventFile;
use crate::trainable::{Trainable, track};

/// Settings of a training, resolved for one arm.
#[derive(Debug, Clone, Copy)]
pub struct TrainingPlan<'a> {
    /// Arm to train.
    pub arm: Arm,
    /// Settings of `[train]`, and the seed.
    pub settings: &'a TrainSettings,
    /// Number of steps and their learning rates.
    pub schedule: Schedule,
}

/// The training loop's state besides the model, and the files that it writes.
pub(crate) struct Trainer<'a> {
    plan: TrainingPlan<'a>,
    trainable: Trainable,
    pub(crate) state: TrainingState,
    optimizer: Optimizer,
    metrics: MetricsFile,
    events: EventFile,
}

impl<'a> Trainer<'a> {
    /// Opens the newest checkpoint in `dir`, or begins at `start`. The model that is returned is tracked.
    pub(crate) fn open(
        start: Decoder,
        rows: usize,
        plan: TrainingPlan<'a>,
        dir: &Path,
    ) -> Result<(Self, Decoder), Error> {
        let settings = plan.settings;
        let fresh = TrainingState {
            step: 0,
            position: 0,
            metrics_bytes: 0,
            events_bytes: 0,
            arm: plan.arm,
            settings: settings.identity(&plan.schedule),
            rows: rows as u64,
            dev: BTreeMap::new(),
            dev_of_mean: BTreeMap::new(),
        };
        let trainable = Trainable::of(&start, settings)?;
        let checkpoint = checkpoint::newest(dir, &start, &fresh, settings, &trainable)?;
        let Checkpoint {
            mut state,
            mut model,
            mut optimizer,
        } = checkpoint.unwrap_or_else(|| Checkpoint {
            state: fresh,
            model: start,
            optimizer: Optimizer::new(settings),
        });
        if settings.precision == Precision::Bf16 {
            // A frozen part is a few routers in a training of the whole model, which its export takes from the masters.
            let has_master = |name: &str| trainable.is_whole() || trainable.contains(name);
            optimizer.begin(&model, &has_master);
            model = cast(model, settings.precision.dtype());
        }
        let metrics = MetricsFile::open(dir, state.metrics_bytes)?;
        let (events, events_bytes) = EventFile::open(dir, state.events_bytes)?;
        state.events_bytes = events_bytes;
        let model = track(model, &trainable);
        let trainer = Self {
            plan,
            trainable,
            state,
            optimizer,
            metrics,
            events,
        };
        Ok((trainer, model))
    }

    /// Makes one optimizer step and writes its metrics. `began` is the time at which waiting for the batch began, and
    /// `stall_seconds` the time until the batch was there.
    pub(crate) fn step(
        &mut self,
        model: Decoder,
        batch: &Batch,
        began: Instant,
        stall_seconds: f64,
    ) -> Result<(Decoder, StepMetrics), Error> {
        let TrainingPlan {
            settings, schedule, ..
        } = self.plan;
        let step = self.state.step + 1;
        let result = gradient_of(&model, batch, settings);
        let (norm, scale) = clip_global_norm(&result.gradients, settings.clip);
        check_finite(&model, batch, (result.loss, norm), settings, step)?;
        let rate = schedule.at(step);
        let model = self.optimizer.step(model, result.gradients, scale, rate);

        let sums = &result.sums;
        let per_row = 1.0 / sums.rows.max(1) as f64;
        let metrics = StepMetrics {
            step,
            loss: result.loss,
            forward_kl: sums.forward_kl * per_row,
            cross_entropy: sums.cross_entropy * per_row,
            divergences: other_divergences(&settings.objective, &sums.divergences, per_row),
            teacher_nll: result.teacher_nll * per_row,
            gradient_norm: norm,
            learning_rate: rate,
            loss_tokens: sums.rows as u64,
            tokens: batch.tokens as u64,
            tokens_per_second: batch.tokens as f64 / began.elapsed().as_secs_f64(),
            stall_seconds,
            peak_bytes: peak_bytes(),
        };
        self.state.metrics_bytes += self.metrics.write(&metrics)?;
        self.state.events_bytes += self.events.write(&metrics)?;
        self.state.step = step;
        self.state.position += settings.batch as u64;
        Ok((model, metrics))
    }

    /// Saves a checkpoint after the metrics that it counts are on the disk. With `dev`, the model is measured first.
    pub(crate) fn save(
        &mut self,
        dir: &Path,
        model: &Decoder,
        dev: Option<&mut (dyn FnMut(&Decoder) -> Result<f64, Error> + '_)>,
    ) -> Result<(), Error> {
        self.metrics.sync()?;
        self.events.sync()?;
        let mean = self.optimizer.mean_model(model);
        let model = self.masters(model);
        if let Some(dev) = dev {
            let step = self.state.step;
            let state = &mut self.state;
            // A figure in f32 is the same after it was written as text and read back.
            state.dev.insert(step, dev(&model)? as f32);
            if let Some(mean) = mean {
                state.dev_of_mean.insert(step, dev(&mean)? as f32);
            }
        }
        let TrainingPlan { settings, .. } = self.plan;
        checkpoint::save(
            dir,
            &self.state,
            &model,
            &self.optimizer,
            settings,
            &self.trainable,
        )
    }

    /// Returns the model in f32 with the weights that are trained, without autodiff.
    pub(crate) fn masters(&self, model: &Decoder) -> Decoder {
        match self.plan.settings.precision {
            Precision::F32 => model.valid(),
            Precision::Bf16 => self.optimizer.masters(model),
        }
    }
}

/// Means of the divergences that have no field of their own in [`StepMetrics`].
fn other_divergences(objective: &Objective, sums: &[f64], per_row: f64) -> BTreeMap<String, f64> {
    let terms = objective.divergences();
    let named = terms.iter().zip(sums);
    named
        .filter(|(term, _)| term.divergence != Divergence::ForwardKl)
        .map(|(term, sum)| (term.divergence.name().to_owned(), sum * per_row))
        .collect()
}
