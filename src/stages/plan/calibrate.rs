//! Measurements on this device before a run: real optimizer steps, and answers of a local teacher.

use std::cell::RefCell;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use potstill_datasets::{Arm, Prompt, SequenceLength, Signal};
use potstill_student::{StepMetrics, TrainSettings, TrainingInputs, TrainingPlan};
use potstill_teacher::{Ask, Scoring};
use rayon::ThreadPoolBuilder;

use crate::interrupt;
use crate::stages::collect::open_local;
use crate::stages::training::{is_small, settings};
use crate::stages::{Context, checkpoint, memory, start};

/// Time after which no further step is begun.
const STEPS_SECONDS: f64 = 25.0;
/// Largest number of steps, of which the first does not count.
const MOST_STEPS: usize = 12;
/// Time after which a local teacher is not asked further.
const ANSWERS_SECONDS: f64 = 12.0;
/// Number of operations for a parameter and a token: two forward and four backward.
const OPERATIONS: f64 = 6.0;
/// Operations of a step above which the calibration makes steps of a smaller batch: about ten seconds on two cores.
const MOST_OPERATIONS: f64 = 1.5e12;
/// Operations of all steps of the calibration, of which there are at least three.
const ALL_OPERATIONS: f64 = 5e12;
const FEWEST_STEPS: usize = 3;
/// Stack size of a training thread, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

/// Optimizer steps that were measured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MeasuredSteps {
    /// Number of steps that count.
    pub(super) steps: usize,
    /// Seconds of these steps.
    pub(super) seconds: f64,
    /// Tokens of these steps, prompts included.
    pub(super) tokens: f64,
    /// Seconds of the first step beyond those of a later one: compilation of kernels, first use of memory.
    pub(super) first_seconds: f64,
    /// Seconds of loading the start.
    pub(super) load_seconds: f64,
    /// Largest resident memory of the process, bytes, if the system tells.
    pub(super) peak: Option<u64>,
    /// Sequences of a step.
    pub(super) batch: usize,
}

/// Answers of a local teacher that were measured.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MeasuredAnswers {
    /// Mean number of tokens of an answer; `None` if the first answers did not end in time.
    pub(super) answer_tokens: Option<f64>,
    /// Tokens of answers for each second.
    pub(super) tokens_per_second: f64,
}

/// Number of sequences of a step of the calibration: as many as the settings say, unless such a step takes long.
pub(super) fn batch(settings: &TrainSettings, parameters: u64, mean_tokens: f64) -> usize {
    let operations = OPERATIONS * parameters as f64 * mean_tokens.max(1.0);
    let most = (MOST_OPERATIONS / operations) as usize;
    let least = (2 * settings.micro_batch * settings.replicas.max(1)).min(settings.batch);
    settings.batch.min(most.max(least))
}

/// Number of steps of the calibration, as many as take half a minute on two cores.
pub(super) fn step_count(batch: usize, parameters: u64, mean_tokens: f64) -> usize {
    let operations = OPERATIONS * parameters as f64 * mean_tokens.max(1.0) * batch as f64;
    ((ALL_OPERATIONS / operations) as usize).clamp(FEWEST_STEPS, MOST_STEPS)
}

/// A folder for temporary files, which is deleted when it goes out of scope.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new() -> anyhow::Result<TemporaryFolder> {
        let path = std::env::temp_dir().join(format!("potstill-plan-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(TemporaryFolder(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // A folder of temporary files that stays does no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes optimizer steps on `rows` with the settings of the run. Nothing is written into the run directory.
///
/// # Errors
/// Those of the trainer.
pub(super) fn steps(
    context: &Context,
    rows: &[Signal],
    batch: usize,
    steps: usize,
) -> anyhow::Result<MeasuredSteps> {
    let folder = TemporaryFolder::new()?;
    memory::reset_peak();
    let work = || train(context, rows, (batch, steps), &folder.0);
    let measured = match is_small(context)? {
        // Small students are trained side by side, each on a core of its own.
        true => {
            let core = ThreadPoolBuilder::new()
                .num_threads(1)
                .stack_size(STACK_BYTES)
                .build()?;
            core.install(work)
        }
        false => work(),
    };
    let measured = measured?;
    Ok(MeasuredSteps {
        peak: memory::peak_bytes(&context.device)?,
        batch,
        ..measured
    })
}

fn train(
    context: &Context,
    rows: &[Signal],
    (batch, steps): (usize, usize),
    folder: &Path,
) -> anyhow::Result<MeasuredSteps> {
    let began = Instant::now();
    let start = start::start(context, 0)?;
    let load_seconds = began.elapsed().as_secs_f64();
    let settings = TrainSettings {
        batch,
        checkpoint_every: u64::MAX,
        ..settings(&context.run.settings, 0)
    };
    let times = RefCell::new(vec![(Instant::now(), 0)]);
    let (done, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut on_step = |metrics: &StepMetrics| {
        times.borrow_mut().push((Instant::now(), metrics.tokens));
        done.fetch_add(1, Ordering::SeqCst);
        ControlFlow::Continue(())
    };
    let mut left = steps * batch;
    let mut row = |index: usize| {
        let has_step = done.load(Ordering::SeqCst) > 1;
        let is_late = has_step && began.elapsed().as_secs_f64() - load_seconds > STEPS_SECONDS;
        if left == 0 || is_late || interrupt::is_requested() {
            // A training ends without a checkpoint if it cannot read a row.
            is_over.store(true, Ordering::SeqCst);
            return Err(potstill_datasets::Error::NoRows);
        }
        left -= 1;
        Ok(rows[index].clone())
    };
    let lengths: Vec<SequenceLength> = rows.iter().map(SequenceLength::of).collect();
    let mut schedule = settings.schedule(rows.len(), settings.learning_rate.unwrap_or(1e-4));
    schedule.steps = u64::MAX / 4;
    let trained = potstill_student::train(
        start,
        TrainingInputs {
            len: rows.len(),
            row: &mut row,
            lengths: Some(&lengths),
            dev: None,
            collective: None,
            on_step: &mut on_step,
        },
        &TrainingPlan {
            arm: Arm::Student,
            settings: &settings,
            schedule,
        },
        folder,
    );
    if !is_over.load(Ordering::SeqCst) {
        trained?;
    }
    Ok(MeasuredSteps {
        load_seconds,
        ..measured(&times.into_inner())
    })
}

/// Sums up times at the ends of steps, each with the tokens of the step.
fn measured(times: &[(Instant, u64)]) -> MeasuredSteps {
    let steps = times.windows(2).filter_map(|pair| match pair {
        [(from, _), (to, tokens)] => {
            let seconds = (to.saturating_duration_since(*from)).max(Duration::from_nanos(1));
            Some((seconds.as_secs_f64(), *tokens as f64))
        }
        _ => None,
    });
    let steps: Vec<(f64, f64)> = steps.collect();
    let (first, later) = match steps.as_slice() {
        [first, later @ ..] if !later.is_empty() => (Some(first), later),
        all => (None, all),
    };
    let seconds: f64 = later.iter().map(|(seconds, _)| seconds).sum();
    let tokens: f64 = later.iter().map(|(_, tokens)| tokens).sum();
    MeasuredSteps {
        steps: later.len(),
        seconds,
        tokens,
        first_seconds: first.map_or(0.0, |(first, of)| {
            (first - of * seconds / tokens.max(1.0)).max(0.0)
        }),
        ..MeasuredSteps::default()
    }
}

/// Asks the local teacher for answers to some prompts.
///
/// # Errors
/// Those of the teacher.
pub(super) fn answers(context: &Context, prompts: &[Prompt]) -> anyhow::Result<MeasuredAnswers> {
    let folder = checkpoint::teacher(&context.run)?;
    let collect = &context.run.settings.collect;
    let local = open_local(context, &folder)?;
    let step = (prompts.len() / collect.batch.max(1)).max(1);
    let asked: Vec<&Prompt> = prompts.iter().step_by(step).take(collect.batch).collect();
    let asks: Vec<Ask<'_>> = asked
        .iter()
        .map(|prompt| Ask {
            prompt,
            sample_index: 0,
        })
        .collect();
    let began = Instant::now();
    let mut tokens = 0;
    let mut progress = |drawn: usize| {
        tokens = drawn;
        let is_late = began.elapsed().as_secs_f64() > ANSWERS_SECONDS;
        match is_late || interrupt::is_requested() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let seed = u64::from(context.run.settings.run.seed);
    let sampling = collect.sampling();
    let answers = local.sample(&asks, &sampling, &collect.stop, seed, &mut progress)?;
    let Some(answers) = answers else {
        return Ok(MeasuredAnswers {
            answer_tokens: None,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64(),
        });
    };
    let sampled: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    if let Some(signals) = &collect.signals {
        let texts = asked.iter().zip(&answers);
        let texts: Result<Vec<_>, _> = texts
            .map(|(prompt, answer)| local.text(prompt, answer, true))
            .collect();
        let scoring = Scoring {
            signals: signals.clone(),
            seed,
            chunk_rows: 256,
        };
        local.score(&texts?, &scoring, &mut |_| interrupt::control_flow())?;
    }
    Ok(MeasuredAnswers {
        answer_tokens: Some(sampled as f64 / answers.len().max(1) as f64),
        tokens_per_second: sampled as f64 / began.elapsed().as_secs_f64(),
    })
}
