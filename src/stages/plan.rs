//! `plan`: what a run will take on this device: memory, time and money, from the settings and a short calibration, and
//! what to change if it does not fit. Nothing is written into the run directory.

mod calibrate;
mod rows;
mod text;

use potstill_datasets::{AnswerSource, Imported, SequenceLength};
use potstill_eval::cost::TrainingCost;
use potstill_student::{
    ModelOperations, Overlong, Schedule, TrainSettings, TrainedNumbers, TrainingMemory,
};

use self::calibrate::{MeasuredAnswers, MeasuredSteps};
use self::rows::PlannedRows;
use super::memory::{self, TrainingFit};
use super::sources::{self, Extent, Needed, Sources};
use super::training::is_small;
use super::{Context, StageOutcome, checkpoint, gpu, import, served, start};
use crate::events::Event;
use crate::run_file::{ConfigError, Loaded};

/// Largest share of `max_new_tokens` that an answer is taken to have if no answer is known.
const ANSWER_SHARE: f64 = 0.5;

/// Options of `plan` besides those of all stages.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PlanOptions {
    /// Memory that there is, GB; the machine's if `None`.
    pub memory_gb: Option<f64>,
    /// USD for an hour of a device; that of the run file if `None`.
    pub usd_per_hour: Option<f64>,
    /// Tokens of an answer that is not there yet.
    pub answer_tokens: Option<usize>,
}

/// Memory, time and cost of a run to come.
struct Plan {
    device: String,
    numbers: TrainedNumbers,
    fit: TrainingFit,
    rows: RowFacts,
    schedule: Schedule,
    /// Number of trainings: arms, seeds and learning rates.
    trainings: usize,
    /// Number of trainings at a time.
    at_a_time: usize,
    /// Sequences of an optimizer step.
    batch: usize,
    /// Measured steps; `None` if the training does not fit.
    steps: Option<MeasuredSteps>,
    collecting: Collecting,
    devices: usize,
    usd_per_hour: Option<f64>,
    /// Operations of the model for a token.
    token_operations: f64,
    /// Operations that the device computes in a second at most, if it is a known GPU.
    peak_flops: Option<f64>,
}

/// Facts about the sequences of a training.
struct RowFacts {
    origin: String,
    sequences: usize,
    mean_tokens: f64,
    longest: usize,
}

/// Time and cost of collecting answers.
enum Collecting {
    /// The answers are in the data, or collected.
    Nothing,
    /// A local teacher gives so many answers of about so many tokens.
    Local(MeasuredAnswers, usize, f64),
    /// Lines about a teacher behind a server.
    Served(String),
}

/// Prints the plan of a run.
///
/// # Errors
/// Mistakes in the run file and the files it names, and failures of the calibration.
pub fn plan(context: &mut Context, options: &PlanOptions) -> anyhow::Result<StageOutcome> {
    let dir = context.dir.path("");
    let (needed, extent) = (Needed::Everything, Extent::Nothing);
    let state = sources::resolve(&mut context.run, &dir, &context.console, needed, extent)?;
    if state != Sources::Complete {
        context.console.note(&format!(
            "the plan needs the models' weights\nhint: `potstill run {}` fetches them first",
            context.run.path.display()
        ));
        return Ok(StageOutcome::WouldRun);
    }
    let plan = make(context, options)?;
    context.console.output(&text::lines(&plan));
    context.console.emit(&plan.event());
    Ok(StageOutcome::Done)
}

fn make(context: &Context, options: &PlanOptions) -> anyhow::Result<Plan> {
    let run = &context.run;
    let settings = &run.settings.train;
    let imported = import::read(run, context.limit)?;
    let limit = match options.memory_gb {
        Some(gigabytes) => Some((gigabytes * 1e9) as u64),
        None => memory::of_device(&context.device)?,
    };
    let collecting = collecting(context, &imported, limit)?;
    let mut rows = PlannedRows::open(
        context,
        &imported,
        answer_tokens(context, &collecting, options),
    )?;
    rows.lengths = usable(&rows.lengths, settings);
    if rows.lengths.is_empty() {
        let what = "no prompt is left for training, so there is nothing to plan\nhint: add prompts, or lower `dev` and `test` in [curate]";
        return Err(ConfigError::plain(what.to_owned()).into());
    }
    let fit = TrainingFit::of(
        run,
        &start::config(run)?,
        &context.device,
        &rows.lengths,
        limit,
    )?;
    let facts = RowFacts {
        origin: rows.origin.clone(),
        sequences: rows.count,
        mean_tokens: mean(rows.lengths.iter().map(|length| length.tokens)),
        longest: rows
            .lengths
            .iter()
            .map(|length| length.tokens)
            .max()
            .unwrap_or(0),
    };
    let numbers = TrainedNumbers::of(&start::config(run)?, settings);
    let tokens = || rows.lengths.iter().map(|length| length.tokens);
    let operations = ModelOperations::of(&start::config(run)?, settings).of_lengths(tokens());
    let token_operations = operations / tokens().sum::<usize>().max(1) as f64;
    let batch = calibrate::batch(settings, numbers.all, facts.mean_tokens);
    let steps = match fit.fits() {
        true => {
            let signals = rows.read((4 * batch).max(16), run)?;
            let count = calibrate::step_count(batch, numbers.all, facts.mean_tokens);
            Some(calibrate::steps(context, &signals, batch, count)?)
        }
        false => None,
    };
    let rates = settings.rates(run.settings.student.default_learning_rate());
    let trainings = context.arms().len() * (rates.len() + settings.seeds as usize - 1);
    let is_cpu = context.device == potstill_model::device("cpu")?;
    Ok(Plan {
        device: if is_cpu { "machine" } else { "GPU" }.to_owned(),
        at_a_time: match is_small(context)? {
            true => trainings.min(rayon::current_num_threads()),
            false => 1,
        },
        schedule: settings.schedule(rows.count, rates.first().copied().unwrap_or_default()),
        batch: settings.batch,
        devices: if is_cpu { 1 } else { settings.replicas },
        usd_per_hour: options.usd_per_hour.or(run.settings.run.usd_per_hour),
        token_operations,
        peak_flops: gpu::peak_flops(context)?,
        rows: facts,
        numbers,
        fit,
        trainings,
        steps,
        collecting,
    })
}

/// Lengths of sequences like those that a training will have, before there are any.
pub(super) fn expected_lengths(
    run: &Loaded,
    imported: &Imported,
) -> anyhow::Result<Vec<SequenceLength>> {
    let most = run.settings.collect.max_new_tokens as f64;
    let answer_tokens = (most * ANSWER_SHARE).ceil() as usize;
    Ok(PlannedRows::made(run, imported, answer_tokens)?.lengths)
}

/// Refuses to train on the published rows if the training does not fit into memory.
///
/// # Errors
/// When the training does not fit, with what to change, and when a row cannot be read.
pub(super) fn check_fits(context: &Context) -> anyhow::Result<()> {
    let lengths = PlannedRows::published(context)?.lengths;
    start::check_training_memory(&context.run, &context.device, &lengths)
}

/// Predicts the peak of memory of a training on the published rows, bytes.
pub(super) fn predicted_bytes(context: &Context) -> anyhow::Result<u64> {
    let lengths = PlannedRows::published(context)?.lengths;
    let fit = TrainingFit::of(
        &context.run,
        &start::config(&context.run)?,
        &context.device,
        &lengths,
        None,
    )?;
    Ok(fit.memory.peak())
}

/// The lengths that a training has: longer sequences are left out or cut, as `overlong` says.
fn usable(lengths: &[SequenceLength], settings: &TrainSettings) -> Vec<SequenceLength> {
    let is_used = |length: &&SequenceLength| {
        length.tokens <= settings.max_length || settings.overlong == Overlong::Cut
    };
    let used = lengths.iter().filter(is_used);
    used.map(|length| SequenceLength {
        tokens: length.tokens.min(settings.max_length),
        ..*length
    })
    .collect()
}

/// Measures or forecasts what collecting will take.
fn collecting(
    context: &Context,
    imported: &Imported,
    limit: Option<u64>,
) -> anyhow::Result<Collecting> {
    let run = &context.run;
    let is_given = run.settings.import.answers == AnswerSource::Given;
    if context.dir.published("completions")?.is_some() || run.settings.teacher.is_none() {
        return Ok(Collecting::Nothing);
    }
    if run.settings.served().is_some() {
        return Ok(Collecting::Served(served::check(run, imported)?));
    }
    if is_given {
        return Ok(Collecting::Nothing);
    }
    let teacher = checkpoint::teacher_table(run)?;
    let folder = checkpoint::teacher(run)?;
    let parameters = potstill_model::Config::from_dir(&folder)?.parameters();
    let weights = parameters * checkpoint::dtype(teacher.dtype).size() as u64;
    let answers = imported.prompts.len() * run.settings.collect.samples;
    if imported.prompts.is_empty() || limit.is_some_and(|limit| weights > limit) {
        return Ok(Collecting::Nothing);
    }
    let measured = calibrate::answers(context, &imported.prompts)?;
    let tokens = run.settings.collect.max_new_tokens as f64;
    let tokens = measured.answer_tokens.unwrap_or(tokens);
    Ok(Collecting::Local(measured, answers, tokens))
}

/// Tokens of a placeholder for an answer.
fn answer_tokens(context: &Context, collecting: &Collecting, options: &PlanOptions) -> usize {
    let most = context.run.settings.collect.max_new_tokens;
    let known = match collecting {
        Collecting::Local(_, _, tokens) => tokens.round() as usize,
        _ => (most as f64 * ANSWER_SHARE).ceil() as usize,
    };
    options.answer_tokens.unwrap_or(known).max(1)
}

fn mean(values: impl ExactSizeIterator<Item = usize>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<usize>() as f64 / count
}

impl Plan {
    /// Tokens of one training.
    fn tokens(&self) -> f64 {
        self.schedule.steps as f64 * self.batch as f64 * self.rows.mean_tokens
    }

    /// Tokens for each second of a training.
    fn tokens_per_second(&self) -> Option<f64> {
        let steps = self.steps.as_ref()?;
        (steps.seconds > 0.0 && steps.tokens > 0.0).then(|| steps.tokens / steps.seconds)
    }

    /// Model FLOP utilisation of a device, if its peak is known.
    fn utilisation(&self) -> Option<f64> {
        Some(self.tokens_per_second()? * self.token_operations / self.peak_flops?)
    }

    /// Seconds of an optimizer step.
    fn step_seconds(&self) -> Option<f64> {
        Some(self.batch as f64 * self.rows.mean_tokens / self.tokens_per_second()?)
    }

    /// Hours of one training.
    fn training_hours(&self) -> Option<f64> {
        let steps = self.steps.as_ref()?;
        let seconds = self.tokens() / self.tokens_per_second()?;
        Some((seconds + steps.first_seconds + steps.load_seconds) / 3600.0)
    }

    /// Hours of all trainings on the clock.
    fn all_hours(&self) -> Option<f64> {
        Some(self.training_hours()? * self.trainings as f64 / self.at_a_time.max(1) as f64)
    }

    /// Cost of all trainings.
    fn cost(&self) -> Option<TrainingCost> {
        Some(TrainingCost {
            device_hours: self.all_hours()? * self.devices.max(1) as f64,
            tokens: self.tokens() * self.trainings as f64,
            usd_per_hour: self.usd_per_hour,
        })
    }

    /// Hours of collecting from a local teacher.
    fn collect_hours(&self) -> Option<f64> {
        match &self.collecting {
            Collecting::Local(measured, answers, tokens) if measured.tokens_per_second > 0.0 => {
                Some(*answers as f64 * tokens / measured.tokens_per_second / 3600.0)
            }
            _ => None,
        }
    }

    fn event(&self) -> Event {
        let TrainingFit {
            memory,
            limit,
            advice,
        } = &self.fit;
        let parts = memory.parts().into_iter();
        let cost = self.cost();
        Event::Plan {
            parameters: self.numbers.all,
            trained_parameters: self.numbers.trained,
            memory: parts
                .map(|(part, bytes)| (part.to_owned(), bytes))
                .collect(),
            memory_bytes: memory.peak(),
            available_bytes: *limit,
            fits: self.fit.fits(),
            calibration_bytes: self.steps.and_then(|steps| steps.peak),
            advice: advice.iter().map(|advice| advice.change.clone()).collect(),
            advice_bytes: advice.iter().map(|advice| advice.memory.peak()).collect(),
            sequences: self.rows.sequences as u64,
            tokens_per_sequence: self.rows.mean_tokens,
            steps: self.schedule.steps,
            trainings: self.trainings as u64,
            tokens: self.tokens() * self.trainings as f64,
            step_seconds: self.step_seconds(),
            tokens_per_second: self.tokens_per_second(),
            flops_per_token: self.token_operations,
            mfu: self.utilisation(),
            train_hours: self.all_hours(),
            collect_hours: self.collect_hours(),
            device_hours: cost.map(|cost| cost.device_hours),
            usd: cost.and_then(|cost| cost.usd()),
            usd_per_million_tokens: cost.and_then(|cost| cost.usd_per_million()),
        }
    }
}

/// Names and bytes of the parts that a person wants to see, largest first.
fn shown_parts(memory: &TrainingMemory) -> Vec<(&'static str, u64)> {
    let parts = memory.parts().into_iter();
    let mut parts: Vec<_> = parts.filter(|(_, bytes)| *bytes > 0).collect();
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    parts
}
