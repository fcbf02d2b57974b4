//! The training loop.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use potstill_datasets::{Arm, Order, Signal};
use potstill_model::Decoder;
use serde::Serialize;

use crate::batch::Batch;
use crate::checkpoint::{self, Checkpoint, TrainingState};
use crate::control::ControlData;
use crate::error::{Error, SequenceId};
use crate::gradient::gradient_of;
use crate::loss::Divergence;
use crate::metrics::{MetricsFile, StepMetrics};
use crate::not_finite::check_finite;
use crate::objective::Objective;
use crate::optimizer::{AdamW, clip_global_norm};
use crate::schedule::Schedule;
use crate::settings::{Overlong, TrainSettings};
use crate::tensorboard::EventFile;

/// Numbers of training rows that are longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct OverlongRows {
    /// Rows that were left out.
    pub dropped: u64,
    /// Rows whose end was cut off.
    pub cut: u64,
}

/// Model and progress at the end of a call of [`train`].
#[derive(Debug)]
pub struct TrainingResult {
    /// The trained model, without autodiff.
    pub model: Decoder,
    /// Number of steps made since the start, earlier calls included.
    pub step: u64,
    /// Whether all steps are made. If not, the next call resumes from the checkpoint.
    pub finished: bool,
    /// Rows longer than `max_length`.
    pub overlong: OverlongRows,
    /// Number of training positions whose target token occurs in no other context, so that the control `same_token`
    /// learns them as SFT does; 0 for the other arms.
    pub unique_positions: u64,
    /// Label smoothing of the control `smoothing`; `None` for the other arms.
    pub label_smoothing: Option<f64>,
}

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

/// Trains `start` as `plan` says on `row(0..len)`, and writes into `dir`: `checkpoints/`, `metrics.jsonl`, and
/// the same metrics for TensorBoard in `tensorboard/`.
///
/// If the loss has a temperature other than 1, `log_z_at` of each row holds one number, the normaliser for
/// this temperature.
///
/// Resumes from the newest checkpoint in `dir` and ends in the same weights as without the interruption, bit
/// for bit. `on_step` is called after each step; when it breaks, a checkpoint is saved and the result is not
/// finished.
///
/// # Errors
/// An error of `row`; nothing to train on; a loss that is not finite; a checkpoint that is damaged or has other
/// settings; a full disk (what was saved before stays).
pub fn train(
    start: Decoder,
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    plan: &TrainingPlan<'_>,
    dir: &Path,
    on_step: &mut dyn FnMut(&StepMetrics) -> ControlFlow<()>,
) -> Result<TrainingResult, Error> {
    let (settings, steps) = (plan.settings, plan.schedule.steps);
    settings.objective.check()?;
    let mut control = ControlData::new(plan.arm, settings.seed, start.token_count());
    let (usable, overlong) = usable_rows(row, len, settings, &mut control)?;
    let label_smoothing = control.label_smoothing();
    let settings = &with_label_smoothing(settings, label_smoothing);
    let plan = TrainingPlan { settings, ..*plan };
    let (mut trainer, mut model) = Trainer::open(start, usable.len(), plan, dir)?;
    let mut order = Order::new(settings.seed, usable.len())?;
    while trainer.state.step < steps {
        let began = Instant::now();
        let mut signals = Vec::with_capacity(settings.batch);
        let first = trainer.state.position;
        for position in first..first + settings.batch as u64 {
            let mut signal = row(usable[order.item(position)])?;
            cut(&mut signal, settings.max_length);
            control.replace_rows(&mut signal, position);
            signals.push(signal);
        }
        let metrics;
        let step = trainer.state.step + 1;
        let batch = Batch::new(signals, plan.arm, settings, step, model.token_count())?;
        (model, metrics) = trainer.step(model, &batch, began)?;
        let step = metrics.step;
        let stop = on_step(&metrics).is_break() && step < steps;
        if stop || step == steps || step.is_multiple_of(settings.checkpoint_every.max(1)) {
            trainer.save(dir, &model)?;
        }
        if stop {
            break;
        }
    }
    Ok(TrainingResult {
        model: model.valid(),
        step: trainer.state.step,
        finished: trainer.state.step >= steps,
        overlong,
        unique_positions: control.unique_positions(),
        label_smoothing,
    })
}

/// Returns the settings with the label smoothing that a control needs.
fn with_label_smoothing(settings: &TrainSettings, smoothing: Option<f64>) -> TrainSettings {
    let mut settings = settings.clone();
    if let Some(smoothing) = smoothing {
        settings.objective.label_smoothing = smoothing;
    }
    settings
}

/// The training loop's state besides the model, and the files that it writes.
struct Trainer<'a> {
    plan: TrainingPlan<'a>,
    state: TrainingState,
    optimizer: AdamW,
    metrics: MetricsFile,
    events: EventFile,
}

impl<'a> Trainer<'a> {
    /// Opens the newest checkpoint in `dir`, or begins at `start`. The model that is returned is tracked.
    fn open(
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
        };
        let checkpoint = checkpoint::newest(dir, &start, &fresh, settings.weight_decay)?;
        let Checkpoint {
            mut state,
            model,
            optimizer,
        } = checkpoint.unwrap_or_else(|| Checkpoint {
            state: fresh,
            model: start,
            optimizer: AdamW::new(settings.weight_decay),
        });
        let metrics = MetricsFile::open(dir, state.metrics_bytes)?;
        let (events, events_bytes) = EventFile::open(dir, state.events_bytes)?;
        state.events_bytes = events_bytes;
        let trainer = Self {
            plan,
            state,
            optimizer,
            metrics,
            events,
        };
        Ok((trainer, model.train()))
    }

    /// Makes one optimizer step and writes its metrics. `began` is the time at which reading the batch began.
    fn step(
        &mut self,
        model: Decoder,
        batch: &Batch,
        began: Instant,
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
        };
        self.state.metrics_bytes += self.metrics.write(&metrics)?;
        self.state.events_bytes += self.events.write(&metrics)?;
        self.state.step = step;
        self.state.position += settings.batch as u64;
        Ok((model, metrics))
    }

    /// Saves a checkpoint after the metrics that it counts are on the disk.
    fn save(&self, dir: &Path, model: &Decoder) -> Result<(), Error> {
        self.metrics.sync()?;
        self.events.sync()?;
        checkpoint::save(dir, &self.state, &model.valid(), &self.optimizer)
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

/// Returns the indices of the rows that can be trained on. Reads every row once, because only the row itself
/// has its length, and shows every usable row to `control`.
fn usable_rows(
    row: &mut dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error>,
    len: usize,
    settings: &TrainSettings,
    control: &mut ControlData,
) -> Result<(Vec<usize>, OverlongRows), Error> {
    let mut usable = Vec::with_capacity(len);
    let mut overlong = OverlongRows::default();
    for index in 0..len {
        let mut signal = row(index)?;
        if signal.token_ids.len() > settings.max_length {
            if settings.overlong == Overlong::Drop {
                overlong.dropped += 1;
                continue;
            }
            cut(&mut signal, settings.max_length);
            if signal.rows.is_empty() {
                overlong.dropped += 1;
                continue;
            }
            overlong.cut += 1;
        }
        if signal.rows.is_empty() {
            return Err(Error::NoLossPositions {
                row: index,
                sequence: SequenceId::of(&signal),
            });
        }
        control.read(&signal);
        usable.push(index);
    }
    if usable.is_empty() {
        return Err(Error::NothingToTrain {
            rows: len,
            dropped: overlong.dropped as usize,
            max_length: settings.max_length,
        });
    }
    Ok((usable, overlong))
}

/// Cuts a sequence to `max_length` tokens. The end-of-sequence token that is cut off is not replaced.
fn cut(signal: &mut Signal, max_length: usize) {
    if signal.token_ids.len() > max_length {
        signal.token_ids.truncate(max_length);
        signal.loss_mask.truncate(max_length);
        let positions = signal.loss_positions().count();
        signal.rows.truncate(positions);
    }
}
