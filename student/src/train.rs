//! The training loop.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use potstill_datasets::SequenceLength;
use potstill_model::Decoder;

use crate::collective::{Alone, Collective, thread_ranks};
use crate::control::ControlData;
use crate::error::Error;
use crate::loader::{BatchQueue, BatchSettings, Loader, Place, queues};
use crate::loader::{OverlongRows, ReadRow};
use crate::metrics::StepMetrics;
use crate::settings::TrainSettings;
use crate::trainer::{TrainedModel, Trainer, TrainingPlan};

/// Model and progress at the end of a call of [`train`].
#[derive(Debug)]
pub struct TrainingResult {
    trained: TrainedModel,
    /// With `keep_best`, the step whose checkpoint had the lowest KL on dev so far.
    pub best_step: Option<u64>,
    /// The same of the running mean of the weights, with `ema`.
    pub best_step_of_mean: Option<u64>,
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

impl TrainingResult {
    /// Returns the trained model in f32, without autodiff. Parameters that were computed in another type are copied, so this
    /// is called only where the model is used.
    #[must_use]
    pub fn model(&self) -> Decoder {
        self.trained.masters()
    }
}

/// Stack size of a replica's threads, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

/// The rows that a training reads, and the functions that it calls.
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
    /// The other processes that train the same model, as many as `replicas`; `None` if this process is alone. It then trains
    /// with `replicas` threads.
    pub collective: Option<&'a mut dyn Collective>,
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
        collective,
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
    let ranks = match &collective {
        Some(collective) => check_ranks(collective.size(), settings)?,
        None => settings.replicas.max(1),
    };
    let (sender, mut queues) = queues(ranks);
    let run = Run {
        start,
        rows,
        plan,
        dir,
    };
    let trained = std::thread::scope(|scope| {
        let reading = scope.spawn(move || loader.run(sender, batches));
        // The queues are dropped at the end of the steps, which ends the thread.
        let calls = Calls { dev, on_step };
        let trained = match (collective, queues.pop()) {
            (Some(collective), Some(queue)) => run.steps(queue, calls, collective),
            (None, Some(queue)) if ranks == 1 => run.steps(queue, calls, &mut Alone),
            (_, queue) => {
                queues.extend(queue);
                run.in_threads(queues, calls)
            }
        };
        reading.join().unwrap_or_else(|panic| resume_unwind(panic));
        trained
    })?;
    Ok(TrainingResult {
        trained: trained.model,
        best_step: trained.best_step,
        best_step_of_mean: trained.best_step_of_mean,
        step: trained.step,
        finished: trained.step >= plan.schedule.steps,
        overlong,
        unique_positions,
        label_smoothing,
    })
}

/// Checks the number of processes that train together. Returns the number of replicas in this one.
fn check_ranks(processes: usize, settings: &TrainSettings) -> Result<usize, Error> {
    match settings.replicas == processes {
        true => Ok(1),
        false => Err(Error::Replicas(format!(
            "{processes} processes were started, and `replicas` of [train] is {}\nhint: set `replicas = {processes}`, or start {} processes",
            settings.replicas, settings.replicas
        ))),
    }
}

/// The functions that a training calls.
struct Calls<'a> {
    dev: Option<MeasureDev<'a>>,
    on_step: OnStep<'a>,
}

/// The model and the settings that every replica trains.
#[derive(Clone)]
struct Run<'a> {
    start: Decoder,
    rows: usize,
    plan: TrainingPlan<'a>,
    dir: &'a Path,
}

/// The end of [`Run::steps`].
struct Trained {
    model: TrainedModel,
    step: u64,
    best_step: Option<u64>,
    best_step_of_mean: Option<u64>,
}

impl Run<'_> {
    /// Makes the steps that are left.
    fn steps(
        self,
        mut queue: BatchQueue,
        calls: Calls<'_>,
        collective: &mut dyn Collective,
    ) -> Result<Trained, Error> {
        let Calls { mut dev, on_step } = calls;
        let plan = self.plan;
        let (settings, steps) = (plan.settings, plan.schedule.steps);
        let (mut trainer, mut model) =
            Trainer::open(self.start, self.rows, plan, self.dir, None, collective)?;
        while trainer.state.step < steps {
            let began = Instant::now();
            let place = Place {
                step: trainer.state.step + 1,
                position: trainer.state.position,
            };
            let Some((batch, stall_seconds)) = queue.next(place) else {
                return Err(Error::Replicas("rank 0 reads no further rows".to_owned()));
            };
            let batch = batch?;
            let metrics;
            (model, metrics) = trainer.step(model, &batch, (began, stall_seconds), collective)?;
            let step = metrics.step;
            // A stop that one replica is asked for stops all.
            let mut stops = [f64::from(u8::from(on_step(&metrics).is_break()))];
            collective.sum_f64(&mut stops)?;
            let stop = stops[0] > 0.0 && (step < steps || trainer.must_return());
            if trainer.must_return() {
                if stop {
                    // The next call makes the steps since the checkpoint again, and goes back as well.
                    break;
                }
                (trainer, model) = trainer.go_back(model, self.dir, collective)?;
                continue;
            }
            let is_regular = step == steps || step.is_multiple_of(settings.checkpoint_every.max(1));
            if stop || is_regular {
                // The model is measured at regular steps alone, so that the best one does not depend on interruptions.
                let dev = dev
                    .as_deref_mut()
                    .filter(|_| is_regular && settings.measures_dev());
                trainer.save(self.dir, &model, dev, collective)?;
            }
            if stop {
                break;
            }
        }
        let (state, model) = trainer.end(model, collective)?;
        Ok(Trained {
            model,
            step: state.step,
            best_step: state.best_step(),
            best_step_of_mean: state.best_step_of_mean(),
        })
    }

    /// Trains with a replica in a thread for each queue. Each has its share of the processor's cores. What is called outside
    /// of the training is called on this thread.
    fn in_threads(self, queues: Vec<BatchQueue>, calls: Calls<'_>) -> Result<Trained, Error> {
        let replicas = queues.len();
        let cores = (rayon::current_num_threads() / replicas).max(1);
        let has_dev = calls.dev.is_some();
        let (asker, asked) = channel::<Question>();
        let mut asker = Some(asker);
        std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(replicas);
            for (queue, mut rank) in queues.into_iter().zip(thread_ranks(replicas)) {
                let (run, asker) = (self.clone(), asker.take());
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(cores)
                    .stack_size(STACK_BYTES)
                    .build()
                    .map_err(|why| Error::Replicas(format!("cannot start threads: {why}")))?;
                threads.push(scope.spawn(move || {
                    pool.install(move || match asker {
                        Some(asker) => run.asking(queue, &asker, has_dev, &mut rank),
                        None => {
                            let on_step = &mut |_: &StepMetrics| ControlFlow::Continue(());
                            run.steps(queue, Calls { dev: None, on_step }, &mut rank)
                        }
                    })
                }));
            }
            // Ends when rank 0 ends.
            asked.into_iter().fold(calls, answer);
            let results = (threads.into_iter())
                .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
            first_result(results.collect())
        })
    }

    /// Makes the steps, and asks the thread at the other end of a channel for what is outside of the training.
    fn asking(
        self,
        queue: BatchQueue,
        asker: &Sender<Question>,
        has_dev: bool,
        collective: &mut dyn Collective,
    ) -> Result<Trained, Error> {
        let on_step = &mut |metrics: &StepMetrics| {
            let (answer, answered) = channel();
            let stop = ControlFlow::Break(());
            let sent = asker.send(Question::Step(Box::new(metrics.clone()), answer));
            sent.map_or(stop, |()| answered.recv().unwrap_or(stop))
        };
        let mut dev = |model: &Decoder| {
            let (answer, answered) = channel();
            let gone = || Error::Replicas("the training ended while dev was measured".to_owned());
            let sent = asker.send(Question::Dev(Box::new(model.clone()), answer));
            sent.map_err(|_| gone())?;
            answered.recv().map_err(|_| gone())?
        };
        let dev: Option<MeasureDev<'_>> = match has_dev {
            true => Some(&mut dev),
            false => None,
        };
        self.steps(queue, Calls { dev, on_step }, collective)
    }
}

/// A question of rank 0 to the thread that called [`train`], with the place for the answer.
enum Question {
    Step(Box<StepMetrics>, Sender<ControlFlow<()>>),
    Dev(Box<Decoder>, Sender<Result<f64, Error>>),
}

/// Answers a question. A replica that is gone needs no answer.
fn answer<'a>(mut calls: Calls<'a>, question: Question) -> Calls<'a> {
    match question {
        Question::Step(metrics, answer) => {
            let _ = answer.send((calls.on_step)(&metrics));
        }
        Question::Dev(model, answer) => {
            if let Some(dev) = &mut calls.dev {
                let _ = answer.send(dev(&model));
            }
        }
    }
    calls
}

/// The result of rank 0, or the error of a replica that did not only wait for another one.
fn first_result<T>(results: Vec<Result<T, Error>>) -> Result<T, Error> {
    let mut first = None;
    for result in results {
        match (&first, result) {
            (_, Err(error)) if !matches!(error, Error::LostRank { .. }) => return Err(error),
            (None, result) => first = Some(result),
            _ => {}
        }
    }
    first.unwrap_or_else(|| Err(Error::Replicas("there is no replica".to_owned())))
}

/// Returns the settings with the label smoothing that a control needs.
fn with_label_smoothing(settings: &TrainSettings, smoothing: Option<f64>) -> TrainSettings {
    let mut settings = settings.clone();
    if let Some(smoothing) = smoothing {
        settings.objective.label_smoothing = smoothing;
    }
    settings
}
