//! The training loop.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use potstill_datasets::{Order, Signal};
use potstill_model::Decoder;
use serde::Serialize;

use crate::batch::Batch;
use crate::control::ControlData;
use crate::error::{Error, SequenceId};
use crate::metrics::StepMetrics;
use crate::settings::{Overlong, TrainSettings};
use crate::trainer::{Trainer, TrainingPlan};

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
    /// The trained model in f32, without autodiff.
    pub model: Decoder,
    /// With `keep_best`, the step whose checkpoint had the lowest KL on dev so far.
    pub best_step: Option<u64>,
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

/// What a training reads, and what it calls.
pub struct TrainingInputs<'a> {
    /// Number of rows.
    pub len: usize,
    /// Reads a row by its position below `len`. If the loss has a temperature other than 1, `log_z_at` of each row holds one
    /// number, the normaliser for this temperature.
    pub row: &'a mut (dyn FnMut(usize) -> Result<Signal, potstill_datasets::Error> + Send),
    /// Measures a model, without autodiff, on dev: the mean KL, in nats. Needed for `keep_best` and for `ema`.
    pub dev: Option<&'a mut dyn FnMut(&Decoder) -> Result<f64, Error>>,
    /// Called after each step; when it breaks, a checkpoint is saved and the result is not finished.
    pub on_step: &'a mut dyn FnMut(&StepMetrics) -> ControlFlow<()>,
}

/// Trains `start` as `plan` says on the rows of `inputs`, and writes into `dir`: `checkpoints/`, `metrics.jsonl`, and
/// the same metrics for TensorBoard in `tensorboard/`.
///
/// Resumes from the newest checkpoint in `dir` and ends in the same weights as without the interruption, bit
/// for bit.
///
/// # Errors
/// An error of a row or of `dev`; nothing to train on; a loss that is not finite; a checkpoint that is damaged or has other
/// settings; a full disk (what was saved before stays).
pub fn train(
    start: Decoder,
    inputs: TrainingInputs<'_>,
    plan: &TrainingPlan<'_>,
    dir: &Path,
) -> Result<TrainingResult, Error> {
    let TrainingInputs {
        len,
        row,
        mut dev,
        on_step,
    } = inputs;
    let (settings, steps) = (plan.settings, plan.schedule.steps);
    settings.objective.check()?;
    if settings.keep_best && dev.is_none() {
        return Err(Error::NoDev { key: "keep_best" });
    }
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
        let is_regular = step == steps || step.is_multiple_of(settings.checkpoint_every.max(1));
        if stop || is_regular {
            // The model is measured at regular steps alone, so that the best one does not depend on interruptions.
            let dev = dev
                .as_deref_mut()
                .filter(|_| is_regular && settings.keep_best);
            trainer.save(dir, &model, dev)?;
        }
        if stop {
            break;
        }
    }
    Ok(TrainingResult {
        model: trainer.masters(&model),
        best_step: trainer.state.best_step(),
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
