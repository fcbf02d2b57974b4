//! The training loop.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::time::Instant;

use potstill_datasets::SequenceLength;
use potstill_model::Decoder;

use crate::control::ControlData;
use crate::error::Error;
use crate::loader::{BatchQueue, BatchSettings, Loader, Place, queue};
use crate::loader::{OverlongRows, ReadRow};
use crate::metrics::StepMetrics;
use crate::settings::TrainSettings;
use crate::trainer::{Trainer, TrainingPlan};

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
    pub row: ReadRow<'a>,
    /// Lengths of the rows, if they are known without reading the rows. Only the controls `same_token` and `smoothing` then
    /// read all rows before the first step.
    pub lengths: Option<&'a [SequenceLength]>,
    /// Measures a model, without autodiff, on dev: the mean KL, in nats. Needed for `keep_best` and for `ema`.
    pub dev: Option<MeasureDev<'a>>,
    /// Called after each step; when it breaks, a checkpoint is saved and the result is not finished.
    pub on_step: OnStep<'a>,
}

/// Measures a model, without autodiff, on dev.
type MeasureDev<'a> = &'a mut dyn FnMut(&Decoder) -> Result<f64, Error>;

/// Called after each step.
type OnStep<'a> = &'a mut dyn FnMut(&StepMetrics) -> ControlFlow<()>;

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
        lengths,
        dev,
        on_step,
    } = inputs;
    let (settings, arm) = (plan.settings, plan.arm);
    settings.objective.check()?;
    if settings.keep_best && dev.is_none() {
        return Err(Error::NoDev { key: "keep_best" });
    }
    let vocab = start.token_count();
    let control = ControlData::new(arm, settings.seed, vocab);
    let mut loader = Loader::new(row, len, lengths, control, settings)?;
    let (rows, overlong) = (loader.len(), loader.overlong);
    let unique_positions = loader.control.unique_positions();
    let label_smoothing = loader.control.label_smoothing();
    let settings = &with_label_smoothing(settings, label_smoothing);
    let plan = TrainingPlan { settings, ..*plan };
    let batches = BatchSettings {
        arm,
        settings,
        vocab,
        steps: plan.schedule.steps,
    };
    let (sender, queue) = queue();
    let trained = std::thread::scope(|scope| {
        let reading = scope.spawn(move || loader.run(sender, batches));
        // The queue is dropped at the end of the steps, which ends the thread.
        let trained = run_steps(start, rows, queue, (dev, on_step), plan, dir);
        reading.join().unwrap_or_else(|panic| resume_unwind(panic));
        trained
    })?;
    Ok(TrainingResult {
        model: trained.model,
        best_step: trained.best_step,
        step: trained.step,
        finished: trained.step >= plan.schedule.steps,
        overlong,
        unique_positions,
        label_smoothing,
    })
}

/// The end of [`run_steps`].
struct Trained {
    model: Decoder,
    step: u64,
    best_step: Option<u64>,
}

/// Makes the steps that are left.
fn run_steps(
    start: Decoder,
    rows: usize,
    mut queue: BatchQueue,
    (mut dev, on_step): (Option<MeasureDev<'_>>, OnStep<'_>),
    plan: TrainingPlan<'_>,
    dir: &Path,
) -> Result<Trained, Error> {
    let (settings, steps) = (plan.settings, plan.schedule.steps);
    let (mut trainer, mut model) = Trainer::open(start, rows, plan, dir, None)?;
    while trainer.state.step < steps {
        let began = Instant::now();
        let place = Place {
            step: trainer.state.step + 1,
            position: trainer.state.position,
        };
        let Some((batch, stall_seconds)) = queue.next(place) else {
            break;
        };
        let batch = batch?;
        let metrics;
        (model, metrics) = trainer.step(model, &batch, began, stall_seconds)?;
        let step = metrics.step;
        let stop = on_step(&metrics).is_break() && (step < steps || trainer.must_return());
        if trainer.must_return() {
            if stop {
                // The next call makes the steps since the checkpoint again, and goes back as well.
                break;
            }
            (trainer, model) = trainer.go_back(model, dir)?;
            continue;
        }
        let is_regular = step == steps || step.is_multiple_of(settings.checkpoint_every.max(1));
        if stop || is_regular {
            // The model is measured at regular steps alone, so that the best one does not depend on interruptions.
            let dev = dev
                .as_deref_mut()
                .filter(|_| is_regular && (settings.keep_best || settings.ema.is_some()));
            trainer.save(dir, &model, dev)?;
        }
        if stop {
            break;
        }
    }
    Ok(Trained {
        model: trainer.masters(&model),
        step: trainer.state.step,
        best_step: trainer.state.best_step(),
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
