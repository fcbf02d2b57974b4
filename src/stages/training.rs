//! A training: of a model below `students/`, or at one of the rates of `learning_rates` below `tuning/`.
//!
//! The trainer writes its own checkpoints and resumes from the newest. `started.json` holds the key of
//! the settings and inputs of a training; a folder with another key is kept in `earlier/`, finished or not, and is taken
//! back from there. The manifest is written last, when all steps are done.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail};
use potstill_datasets::{Arm, FileHash, Split, Variant, hash_files, read_footer, shards};
use potstill_eval::Metric;
use potstill_model::Decoder;
use potstill_student::{
    Collective, MpiRank, Schedule, SignalKind, StepMetrics, TrainSettings, TrainingInputs,
    TrainingPlan, TrainingResult, evaluate,
};
use rayon::ThreadPoolBuilder;
use serde_json::json;

use super::rows::SelectedRows;
use super::{
    Context, StageOutcome, checkpoint, counts, curate, for_each_model, gpu, memory, restore, rows,
    say_kept, score, start, would_run,
};
use crate::events::Event;
use crate::interrupt;
use crate::ranks::{Order, TrainingOrder};
use crate::run_dir::{Counts, EarlierOutput, LedgerLine, StagePlan, now, short};
use crate::run_file::{ExportedWeights, Loaded, RunFile};

/// Largest number of parameters at which one core trains a student as fast as several: 0.1 million
/// parameters take 10,400 tokens/s on one core and 8,400 on two, 0.7 million 4,600 and 4,000.
const SMALL_PARAMETERS: u64 = 2_000_000;
/// Count of a training's manifest: the step of the checkpoint with the lowest figure on dev, if the run keeps it.
const BEST_STEP: &str = "best step";
/// The same of the running mean of the weights.
const BEST_STEP_OF_MEAN: &str = "best step of the mean";
/// Stack size of a training thread, equal to the usual stack size of a main thread; the default of a
/// thread pool is smaller.
const STACK_BYTES: usize = 8 << 20;

/// A training of the run.
pub(super) struct Training {
    /// Name of the stage, such as `train student`.
    pub(super) stage: String,
    /// Folder of the training, below the run directory.
    pub(super) home: String,
    /// Arm and seed that are trained.
    pub(super) variant: Variant,
    /// Steps and learning rates.
    pub(super) schedule: Schedule,
}

impl Training {
    /// Settings and inputs that the training depends on.
    pub(super) fn plan(&self, context: &Context) -> anyhow::Result<StagePlan> {
        let run = &context.run;
        let seed_index = self.variant.seed_index;
        let completions = context.dir.require("completions", "collect", run)?;
        let curation = context.dir.require("train", "curate", run)?;
        Ok(StagePlan {
            stage: self.stage.clone(),
            home: self.home.clone(),
            outputs: vec![self.home.clone()],
            settings: json!({
                "method": self.variant.arm.name(),
                "train": settings(&run.settings, seed_index).identity(&self.schedule),
                "text": rows::text_settings(run)?,
            }),
            inputs: BTreeMap::from([
                ("completions".to_owned(), completions.content_hash()),
                ("train".to_owned(), curation.content_hash()),
                ("start".to_owned(), start::start_key(run, seed_index)?),
            ])
            .into_iter()
            .chain(score::input(context)?)
            .collect(),
        })
    }

    /// Trains, or resumes, and publishes if all steps are made.
    ///
    /// # Errors
    /// When the signals belong to another tokenizer than the student's, or the trainer fails. Checkpoints are kept in
    /// all cases.
    pub(super) fn run(&self, context: &Context, plan: &StagePlan) -> anyhow::Result<StageOutcome> {
        let stage = &self.stage;
        let Context {
            dir, console, run, ..
        } = context;
        self.prepare_folder(context, plan)?;
        if run.settings.has_signals() {
            check_tokenizer(run, &dir.verified("signals")?)?;
        }
        console.emit(&Event::started(stage));
        let (began, started) = (Instant::now(), now());
        let (trained, sequences) = self.steps(context)?;
        let seconds = began.elapsed().as_secs_f64();
        let mut counts = counts([
            ("steps", trained.step as usize),
            ("sequences", sequences - trained.overlong.dropped as usize),
            ("sequences too long", trained.overlong.dropped as usize),
            ("sequences cut", trained.overlong.cut as usize),
        ]);
        if self.variant.arm == Arm::SameToken {
            counts.insert("unique positions".to_owned(), trained.unique_positions);
        }
        if run.settings.train.keep_best {
            let best = [
                (BEST_STEP, trained.best_step),
                (BEST_STEP_OF_MEAN, trained.best_step_of_mean),
            ];
            let best = best.map(|(name, step)| Some((name.to_owned(), step?)));
            counts.extend(best.into_iter().flatten());
        }
        if let Some(smoothing) = trained.label_smoothing {
            console.note(&format!(
                "{stage}: label smoothing of {smoothing:.4} has the mean entropy of the teacher's distributions"
            ));
        }
        let mut worked = counts.clone();
        let peak = memory::peak_bytes(&context.device)?;
        worked.extend(peak.map(|bytes| (memory::PEAK_COUNT.to_owned(), bytes)));
        dir.log(&LedgerLine {
            stage: stage.clone(),
            started_unix_seconds: started,
            seconds,
            verify_seconds: context.verify_seconds(stage),
            finished: trained.finished,
            counts: worked,
        })?;
        if !trained.finished {
            console.note(&format!(
                "{stage}: training state saved at step {}",
                trained.step
            ));
            console.emit(&Event::stopped(stage));
            return Ok(StageOutcome::Stopped);
        }
        self.publish(context, plan, counts.clone())?;
        console.emit(&Event::finished(stage, counts, seconds));
        Ok(StageOutcome::Done)
    }

    /// Creates the folder and notes the key of the training. A folder of another training is kept in `earlier/`, and an
    /// unfinished training with this key is taken back from there.
    pub(super) fn prepare_folder(&self, context: &Context, plan: &StagePlan) -> anyhow::Result<()> {
        let dir = &context.dir;
        if dir.started_key(&self.home)?.as_ref() == Some(&plan.key()) {
            return Ok(());
        }
        if let Some(entry) = dir.find_earlier(plan)? {
            restore(context, plan, &entry)?;
            return Ok(());
        }
        let kept = dir.move_aside(plan)?;
        say_kept(context, &self.stage, &kept);
        dir.start(plan)
    }

    /// The training whose steps rank 0 lets this process make as well.
    pub(super) fn ordered(context: &Context, order: &TrainingOrder) -> anyhow::Result<Training> {
        Ok(Training {
            stage: order.stage.clone(),
            home: order.home.clone(),
            variant: order.variant.parse()?,
            schedule: schedule(context, f64::from_bits(order.learning_rate))?,
        })
    }

    /// Lets the other processes make the steps of this training.
    fn order(&self, run: &Loaded, rank: MpiRank) -> anyhow::Result<()> {
        let order = Order::Train(TrainingOrder {
            run_file: run.text.clone(),
            stage: self.stage.clone(),
            home: self.home.clone(),
            variant: self.variant.to_string(),
            learning_rate: self.schedule.learning_rate.to_bits(),
        });
        order.send(rank)
    }

    /// Makes the steps with progress output, together with the other processes if there are any. Also returns the number of
    /// sequences in the training set.
    pub(super) fn steps(&self, context: &Context) -> anyhow::Result<(TrainingResult, usize)> {
        let mut rows = SelectedRows::open(context, Split::Train)?.at_temperature(context)?;
        let settings = TrainSettings {
            base: start::start_key(&context.run, self.variant.seed_index)?,
            peak_flops: gpu::peak_flops(context)?,
            ..settings(&context.run.settings, self.variant.seed_index)
        };
        if settings.replicas > 1 && context.device != potstill_model::device("cpu")? {
            let message = "replicas are threads on a CPU, and `--device` is another device\nhint: set `replicas = 1`, or run with `--device cpu`";
            let key = ["train", "replicas"];
            return Err(context.run.problem(&key, message.to_owned()).into());
        }
        let mut dev_rows = match settings.measures_dev() {
            true => Some(SelectedRows::open(context, Split::Dev)?),
            false => None,
        };
        let mut dev_rows = dev_rows.as_mut().filter(|rows| !rows.list.is_empty());
        let is_measurable = dev_rows.is_some();
        let mut dev = |model: &Decoder| mean_on_dev(context, dev_rows.as_deref_mut(), model);
        let steps = self.schedule.steps;
        let progress = RefCell::new(context.console.progress(&self.stage, "steps", 0, steps));
        let mut tokens = 0;
        let mut on_step = |metrics: &StepMetrics| {
            tokens += metrics.tokens;
            if let Some(text) = &metrics.skipped {
                let text = format!("{}: {text}", self.stage);
                context.console.emit(&Event::Warning { text });
            }
            let note = format!("loss {:.4}", metrics.loss);
            progress.borrow_mut().update(metrics.step, tokens, &note);
            interrupt::control_flow()
        };
        let len = rows.list.len();
        let lengths = rows.lengths()?;
        let mut row = |i: usize| rows.get(i);
        let start = start::start(context, self.variant.seed_index)?;
        let mut ranks = context.ranks;
        if let Some(rank) = ranks.filter(|rank| rank.rank() == 0) {
            self.order(&context.run, rank)?;
        }
        let trained = potstill_student::train(
            start,
            TrainingInputs {
                len,
                row: &mut row,
                lengths: lengths.as_deref(),
                dev: is_measurable.then_some(&mut dev),
                collective: ranks.as_mut().map(|rank| rank as &mut dyn Collective),
                on_step: &mut on_step,
            },
            &TrainingPlan {
                arm: self.variant.arm,
                settings: &settings,
                schedule: self.schedule,
            },
            &context.dir.path(&self.home),
        )?;
        Ok((trained, len))
    }

    /// Writes the manifest, with the files of the checkpoints that may be exported.
    pub(super) fn publish(
        &self,
        context: &Context,
        plan: &StagePlan,
        counts: Counts,
    ) -> anyhow::Result<()> {
        let mut files = BTreeMap::new();
        for folder in exported_checkpoints(&self.home, &counts) {
            let mut found = hash_files(&context.dir.path(&folder))?;
            // `state.json` has the size of `metrics.jsonl`, which varies with the speeds that it records, and `files.json`
            // has its hash.
            found.remove("state.json");
            found.remove("files.json");
            let found = found.into_iter();
            files.extend(found.map(|(file, hash)| (format!("{folder}/{file}"), hash)));
        }
        self.write_manifest(context, plan, files, counts)
    }

    /// Writes a manifest of these files.
    pub(super) fn write_manifest(
        &self,
        context: &Context,
        plan: &StagePlan,
        files: BTreeMap<String, FileHash>,
        counts: Counts,
    ) -> anyhow::Result<()> {
        let manifest = plan.manifest(files, counts, BTreeMap::new());
        manifest.write(&context.dir.path(&self.home))?;
        context.dir.remember(&manifest.files);
        Ok(())
    }
}

/// Folder of the checkpoint that is exported of the training in the folder `home`: the best one if the run keeps it, and
/// otherwise the last. `counts` are those of the training's manifest.
pub(super) fn exported_checkpoint(home: &str, counts: &Counts, weights: ExportedWeights) -> String {
    let best = match weights {
        ExportedWeights::Trained => counts.get(BEST_STEP),
        ExportedWeights::Mean => counts.get(BEST_STEP_OF_MEAN),
    };
    let step = best.or(counts.get("steps")).copied().unwrap_or_default();
    format!("{home}/checkpoints/step-{step:08}")
}

/// Folders of the checkpoints that [`exported_checkpoint`] may choose.
pub(super) fn exported_checkpoints(home: &str, counts: &Counts) -> BTreeSet<String> {
    let choices = [ExportedWeights::Trained, ExportedWeights::Mean];
    choices
        .map(|weights| exported_checkpoint(home, counts, weights))
        .into()
}

/// Loads the model that is exported of the training in the folder `home`, in f32, with its adapter, if it has one.
pub(super) fn exported_model(
    context: &Context,
    seed_index: u32,
    home: &str,
    counts: &Counts,
) -> anyhow::Result<Decoder> {
    let (run, device) = (&context.run, &context.device);
    let weights = run.settings.export.weights;
    let folder = (context.dir).verified(&exported_checkpoint(home, counts, weights))?;
    let model = potstill_student::checkpoint_model(&folder, device, || {
        start::without_adapter(run, seed_index, device)
    })?;
    let model = match weights {
        ExportedWeights::Trained => model,
        ExportedWeights::Mean => potstill_student::with_mean(&folder, model)?,
    };
    let tokens = checkpoint::tokenizer(&checkpoint::student(run)?)?.vocab_size();
    Ok(model.with_token_count(tokens))
}

/// Measures a model on dev: mean KL per token, or without distributions mean negative log-likelihood, nats.
fn mean_on_dev(
    context: &Context,
    rows: Option<&mut SelectedRows>,
    model: &Decoder,
) -> Result<f64, potstill_student::Error> {
    let Some(rows) = rows else {
        return Ok(f64::INFINITY);
    };
    let (kind, metric) = match context.run.settings.has_signals() {
        true => (SignalKind::Distributions, Metric::Kl),
        false => (SignalKind::Text, Metric::Nll),
    };
    let chunk_rows = context.run.settings.train.chunk_rows;
    let len = rows.list.len();
    let mut row = |i: usize| rows.get(i);
    let mut on_row = |_| ControlFlow::Continue(());
    let values = evaluate(model, &mut row, len, kind, chunk_rows, &mut on_row)?;
    let values = values.unwrap_or_default();
    let tokens: f64 = values.iter().map(|v| f64::from(v.tokens)).sum();
    Ok(metric.total(&values) / tokens.max(1.0))
}

/// Resolves steps and warm-up for the sequences that `curate` selected.
pub(super) fn schedule(context: &Context, learning_rate: f64) -> anyhow::Result<Schedule> {
    let sequences = curate::selected_count(context, Split::Train)?;
    let train = &context.run.settings.train;
    Ok(train.schedule(sequences, learning_rate))
}

/// Returns the outcome if nothing has to be trained: all steps are done, now or earlier, or this is a dry run.
pub(super) fn outcome_without_training(
    context: &Context,
    plan: &StagePlan,
) -> anyhow::Result<Option<StageOutcome>> {
    let (stage, home, key) = (&plan.stage, &plan.home, plan.key());
    let Context { dir, console, .. } = context;
    console.detail(&format!("{stage}: key {}", short(&key)));
    if let Some(manifest) = dir.published(home)?.filter(|m| m.key == key) {
        console.emit(&Event::up_to_date(stage, manifest.counts));
        return Ok(Some(StageOutcome::UpToDate));
    }
    let earlier = dir.find_earlier(plan)?;
    if let Some(entry) = earlier.as_ref().filter(|e| e.manifest.is_some()) {
        return restore(context, plan, entry).map(Some);
    }
    if !context.dry_run {
        return Ok(None);
    }
    if let Some(entry) = &earlier {
        restore(context, plan, entry)?;
    }
    let is_begun = dir.started_key(home)?.as_ref() == Some(&key);
    let from_step = match is_begun {
        true => newest_step(&dir.path(home))?,
        false => None,
    };
    would_run(context, plan, EarlierOutput::Keep, None, from_step).map(Some)
}

/// The step of the newest checkpoint in a training's folder.
fn newest_step(folder: &Path) -> anyhow::Result<Option<u64>> {
    let checkpoints = folder.join("checkpoints");
    let entries = match fs::read_dir(&checkpoints) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot list {}", checkpoints.display())),
    };
    let steps = entries.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.strip_prefix("step-")?.parse().ok()
    });
    Ok(steps.max())
}

/// Runs trainings: those of small students on a CPU in parallel, others and those of several processes one after the other.
pub(super) fn train_each<S: Sync>(
    context: &Context,
    trainings: &[S],
    one: impl Fn(&S) -> anyhow::Result<StageOutcome> + Sync,
) -> anyhow::Result<StageOutcome> {
    match is_small(context)? && !context.dry_run && context.ranks.is_none() {
        true => side_by_side(trainings, one),
        false => for_each_model(trainings, one),
    }
}

/// Returns whether one processor core trains the student about as fast as all cores together.
pub(super) fn is_small(context: &Context) -> anyhow::Result<bool> {
    let config = start::config(&context.run)?;
    let cpu = context.device == potstill_model::device("cpu")?;
    Ok(cpu && config.parameters() <= SMALL_PARAMETERS)
}

/// Trains the students in parallel, each in a thread of its own. Up to two threads share a core, so that
/// three students on two cores end at about the same time. After a failure or an interrupt no further
/// student is started.
fn side_by_side<S: Sync>(
    students: &[S],
    one: impl Fn(&S) -> anyhow::Result<StageOutcome> + Sync,
) -> anyhow::Result<StageOutcome> {
    let cores = rayon::current_num_threads();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> anyhow::Result<StageOutcome> {
        // Parallel loops of the training use the single thread of this pool.
        let core = ThreadPoolBuilder::new()
            .num_threads(1)
            .stack_size(STACK_BYTES)
            .build()?;
        core.install(|| {
            let mine = std::iter::from_fn(|| {
                let student = students.get(next.fetch_add(1, Ordering::SeqCst))?;
                (!failed.load(Ordering::SeqCst)).then_some(student)
            });
            let done = for_each_model(mine, &one);
            failed.fetch_or(done.is_err(), Ordering::SeqCst);
            done
        })
    };
    let outcomes: Vec<anyhow::Result<StageOutcome>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..students.len().min(2 * cores))
            .map(|_| scope.spawn(work))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    let mut outcomes = outcomes.into_iter();
    outcomes.try_fold(StageOutcome::UpToDate, |all, outcome| Ok(all.and(outcome?)))
}

/// Returns the settings of `[train]` with one of the seeds.
pub(super) fn settings(file: &RunFile, seed_index: u32) -> TrainSettings {
    TrainSettings {
        seed: start::seed(file, seed_index),
        ..file.train.clone()
    }
}

/// Checks that the signals belong to the student's tokenizer.
fn check_tokenizer(run: &Loaded, signals: &Path) -> anyhow::Result<()> {
    let folder = checkpoint::student(run)?;
    let tokenizer = checkpoint::tokenizer(&folder)?;
    for shard in shards(signals)? {
        for provenance in read_footer(&shard)?.provenance {
            if provenance.tokenizer != tokenizer.fingerprint() {
                bail!(
                    "the signals in {} belong to the tokenizer of {}, and the student's tokenizer in {} differs, so the student cannot learn from them\nhint: remove `path` of [student], or name a checkpoint of the teacher's family",
                    signals.display(),
                    provenance.teacher,
                    folder.display()
                );
            }
        }
    }
    Ok(())
}
