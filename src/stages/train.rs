//! `train`: trains the student and its controls in their folders below `students/`.
//!
//! The trainer writes its own checkpoints and resumes from the newest. `started.json` holds the key of
//! the settings and inputs of a training; a folder with another key is kept as `students/NAME.old-N`. `students/NAME_manifest.json`
//! is written last, when all steps are done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Arm, Manifest, SCHEMA_VERSION, Variant, hash_files, read_footer, replace_file, shards,
};
use potstill_model::{Config, DType, Device, Llama};
use potstill_student::{StepMetrics, TrainSettings, TrainingResult};
use rayon::ThreadPoolBuilder;
use serde_json::{Value, json};

use super::rows::SelectedRows;
use super::{Context, StageOutcome, checkpoint, counts, for_each_model, score};
use crate::events::Event;
use crate::interrupt;
use crate::run_dir::{Counts, LedgerLine, StagePlan, now, settings_of, short};
use crate::run_file::{Loaded, RunFile};

const STARTED_FILE: &str = "started.json";
/// Largest number of parameters at which one core trains a student as fast as several: 0.1 million
/// parameters take 10,400 tokens/s on one core and 8,400 on two, 0.7 million 4,600 and 4,000.
const SMALL_PARAMETERS: u64 = 2_000_000;
/// Stack size of a training thread, equal to the usual stack size of a main thread; the default of a
/// thread pool is smaller.
const STACK_BYTES: usize = 8 << 20;

/// Trains each student of the run file that is not yet trained.
///
/// # Errors
/// When nothing was curated, the signals belong to another tokenizer than the student's, or the trainer
/// fails. Checkpoints are kept in all cases.
pub fn train(context: &Context) -> anyhow::Result<StageOutcome> {
    let mut plans = Vec::new();
    for variant in context.variants() {
        let plan = plan(context, variant)?;
        match outcome_without_training(context, &plan)? {
            Some(StageOutcome::UpToDate) => {}
            Some(outcome) => return Ok(outcome),
            None => plans.push((variant, plan)),
        }
    }
    let one = |(variant, plan): &(Variant, StagePlan)| train_one(context, *variant, plan);
    match is_small(context)? {
        true => side_by_side(&plans, one),
        false => for_each_model(&plans, one),
    }
}

/// Returns the outcome if nothing has to be trained: all steps are done, or this is a dry run.
fn outcome_without_training(
    context: &Context,
    plan: &StagePlan,
) -> anyhow::Result<Option<StageOutcome>> {
    let (stage, home, key) = (&plan.stage, &plan.home, plan.key());
    context
        .console
        .detail(&format!("{stage}: key {}", short(&key)));
    let published = context.dir.published(home)?;
    if let Some(manifest) = published.filter(|m| m.key == key) {
        context
            .console
            .emit(&Event::up_to_date(stage, manifest.counts));
        return Ok(Some(StageOutcome::UpToDate));
    }
    if context.dry_run {
        context.console.emit(&Event::would_run(stage));
        return Ok(Some(StageOutcome::WouldRun));
    }
    Ok(None)
}

/// Returns whether one processor core trains the student about as fast as all cores together.
fn is_small(context: &Context) -> anyhow::Result<bool> {
    let folder = checkpoint::student(&context.run)?;
    let config = match start_config(&context.run, &folder)? {
        Some(config) => config,
        None => Config::from_dir(&folder)?,
    };
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
    let mut all = StageOutcome::UpToDate;
    for outcome in outcomes {
        match (all, outcome?) {
            (_, StageOutcome::Stopped) | (StageOutcome::Stopped, _) => all = StageOutcome::Stopped,
            (_, StageOutcome::UpToDate) => {}
            (_, outcome) => all = outcome,
        }
    }
    Ok(all)
}

/// Trains one model, or resumes its training, and publishes it if all steps are made.
fn train_one(
    context: &Context,
    variant: Variant,
    plan: &StagePlan,
) -> anyhow::Result<StageOutcome> {
    let stage = &plan.stage;
    let Context {
        dir, console, run, ..
    } = context;
    let folder = dir.path(&plan.home);
    prepare_folder(context, plan, &folder)?;
    if run.settings.has_signals() {
        check_tokenizer(run, &dir.path("signals"))?;
    }
    console.emit(&Event::started(stage));
    let (began, started) = (Instant::now(), now());
    let (trained, sequences) = run_training(context, variant, stage, &folder)?;
    let seconds = began.elapsed().as_secs_f64();
    let mut counts = counts([
        ("steps", trained.step as usize),
        ("sequences", sequences - trained.overlong.dropped as usize),
        ("sequences too long", trained.overlong.dropped as usize),
        ("sequences cut", trained.overlong.cut as usize),
    ]);
    if variant.arm == Arm::SameToken {
        counts.insert("unique positions".to_owned(), trained.unique_positions);
    }
    if let Some(smoothing) = trained.label_smoothing {
        console.note(&format!(
            "{stage}: label smoothing of {smoothing:.4} has the mean entropy of the teacher's distributions"
        ));
    }
    dir.log(&LedgerLine {
        stage: stage.clone(),
        started_unix_seconds: started,
        seconds,
        finished: trained.finished,
        counts: counts.clone(),
    })?;
    if !trained.finished {
        console.note(&format!(
            "{stage}: training state saved at step {}",
            trained.step
        ));
        console.emit(&Event::stopped(stage));
        return Ok(StageOutcome::Stopped);
    }
    publish(context, variant, plan, counts.clone())?;
    console.emit(&Event::finished(stage, counts, seconds));
    Ok(StageOutcome::Done)
}

/// Creates the folder of a model and notes the key of its training. A folder of another training is kept if it has a
/// checkpoint.
fn prepare_folder(context: &Context, plan: &StagePlan, folder: &Path) -> anyhow::Result<()> {
    let key = plan.key();
    let started = folder.join(STARTED_FILE);
    let started_key = fs::read_to_string(&started).unwrap_or_default();
    if started_key != key && folder.join("checkpoints").exists() {
        let old = context.dir.move_aside(&plan.home)?;
        let kept = context.dir.path(&old);
        context.console.emit(&Event::kept(&plan.stage, &kept));
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(replace_file(&started, key.as_bytes())?)
}

/// Runs the training loop with progress output. Also returns the number of sequences in the training set.
fn run_training(
    context: &Context,
    variant: Variant,
    stage: &str,
    folder: &Path,
) -> anyhow::Result<(TrainingResult, usize)> {
    let mut rows = SelectedRows::open(context, "train")?.at_temperature(context)?;
    let settings = settings(&context.run.settings, variant.seed_index);
    let progress = RefCell::new(context.console.progress(stage, "steps", 0, settings.steps));
    let mut tokens = 0;
    let has_stepped = Cell::new(false);
    let mut on_step = |metrics: &StepMetrics| {
        has_stepped.set(true);
        tokens += metrics.tokens;
        let note = format!("loss {:.4}", metrics.loss);
        progress.borrow_mut().update(metrics.step, tokens, &note);
        interrupt::control_flow()
    };
    let len = rows.list.len();
    let mut row = |i: usize| {
        // Before the first step the trainer reads all rows once, for their lengths.
        if !has_stepped.get() && i.is_multiple_of(1000) {
            let note = format!("measuring the length of answer {i} of {len}");
            progress.borrow_mut().update(0, 0, &note);
        }
        rows.get(i)
    };
    let trained = potstill_student::train(
        start(context, variant.seed_index)?,
        &mut row,
        len,
        variant.arm,
        &settings,
        folder,
        &mut on_step,
    )?;
    Ok((trained, len))
}

/// Writes the manifest of a trained model, with the files of its last checkpoint.
fn publish(
    context: &Context,
    variant: Variant,
    plan: &StagePlan,
    counts: Counts,
) -> anyhow::Result<()> {
    let last = last_checkpoint(context, variant);
    let mut files = hash_files(&context.dir.path(&last))?;
    // `state.json` has the size of `metrics.jsonl`, which varies with the speeds that it records.
    files.remove("state.json");
    let manifest = Manifest {
        stage: plan.stage.clone(),
        schema: SCHEMA_VERSION,
        key: plan.key(),
        settings: plan.settings.clone(),
        inputs: plan.inputs.clone(),
        files: files
            .into_iter()
            .map(|(file, hash)| (format!("{last}/{file}"), hash))
            .collect(),
        counts,
    };
    Ok(manifest.write(&context.dir.path(&plan.home))?)
}

fn plan(context: &Context, variant: Variant) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let curation = context.dir.require("train", "curate", run)?;
    Ok(StagePlan {
        stage: format!("train {variant}"),
        home: format!("students/{variant}"),
        outputs: vec![format!("students/{variant}")],
        settings: json!({
            "method": variant.arm.name(),
            "train": settings(&run.settings, variant.seed_index).identity(),
        }),
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("train".to_owned(), curation.content_hash()),
            ("start".to_owned(), start_key(run, variant.seed_index)?),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    })
}

/// Returns the settings of `[train]` with one of the seeds.
pub(crate) fn settings(file: &RunFile, seed_index: u32) -> TrainSettings {
    TrainSettings {
        seed: seed(file, seed_index),
        ..file.train.clone()
    }
}

/// Seed of a model's training and, if the student starts from random weights, of these weights.
pub(crate) fn seed(file: &RunFile, seed_index: u32) -> u64 {
    u64::from(file.run.seed) + u64::from(seed_index)
}

/// Computes the hash that identifies the base, the model that training starts from.
pub(crate) fn start_key(run: &Loaded, seed_index: u32) -> anyhow::Result<String> {
    let student = &run.settings.student;
    let settings: Value = json!({
        "every": student.every,
        "random": settings_of(&student.random)?,
        "seed": student.random.as_ref().map(|_| seed(&run.settings, seed_index)),
    });
    let folder = checkpoint::student(run)?;
    // A random student needs only the small files; the folder may have no weights.
    let hash = match &student.random {
        Some(_) => checkpoint::small_files_hash(&folder)?,
        None => checkpoint::content_hash(&folder)?,
    };
    let inputs = BTreeMap::from([("checkpoint".to_owned(), hash)]);
    Ok(potstill_datasets::stage_key("start", &settings, &inputs))
}

/// Loads or initialises the base, the model that training starts from, in f32 on the run's device.
pub(crate) fn start(context: &Context, seed_index: u32) -> anyhow::Result<Llama> {
    start_on(&context.run, seed_index, &context.device)
}

/// Loads or initialises the base in f32 on `device`.
pub(crate) fn start_on(run: &Loaded, seed_index: u32, device: &Device) -> anyhow::Result<Llama> {
    let folder = checkpoint::student(run)?;
    if let Some(config) = start_config(run, &folder)? {
        let seed = seed(&run.settings, seed_index);
        return Ok(Llama::init(&config, seed, DType::F32, device)?);
    }
    let whole = potstill_model::load(&folder, DType::F32, device)?;
    match run.settings.student.every {
        Some(every) => Ok(potstill_model::prune_layers(&whole, every)?),
        None => Ok(whole),
    }
}

/// Returns the configuration of a random student, with the checkpoint's vocabulary; `None` if the student
/// is not random.
pub(crate) fn start_config(run: &Loaded, folder: &Path) -> anyhow::Result<Option<Config>> {
    Ok(match &run.settings.student.random {
        Some(random) => Some(random.config(Config::from_dir(folder)?)),
        None => None,
    })
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

/// Folder of the checkpoint after the last step, in Hugging Face layout.
pub(crate) fn last_checkpoint(context: &Context, variant: Variant) -> String {
    let steps = context.run.settings.train.steps;
    format!("students/{variant}/checkpoints/step-{steps:08}")
}
