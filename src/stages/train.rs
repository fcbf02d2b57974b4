//! `train`: the student and its controls, in place below `students/`.
//!
//! The trainer keeps its own checkpoints and resumes from the newest. `started.json` says
//! what a folder is being trained from; a folder that was begun from anything else is
//! kept as `students/NAME.old-N`. `students/NAME_manifest.json` comes last, when all steps
//! are done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail};
use potstill_datasets::{
    Manifest, SCHEMA_VERSION, Variant, hash_files, read_footer, replace_file, shards,
};
use potstill_model::{Config, DType, Device, Llama};
use potstill_student::{Settings, StepMetrics};
use rayon::ThreadPoolBuilder;
use serde_json::{Value, json};

use super::rows::Rows;
use super::{Context, StageOutcome, checkpoint, counts, for_each_model, score};
use crate::events::Event;
use crate::interrupt;
use crate::run_dir::{LedgerLine, StagePlan, now, settings_of, short};
use crate::run_file::{Loaded, RunFile};

const STARTED_FILE: &str = "started.json";
/// Parameters up to which a step is too little work to be shared among cores: one of 0.1 million
/// takes 10,400 tokens a second on one core and 8,400 on two, one of 0.7 million 4,600 and 4,000.
const SMALL: u64 = 2_000_000;
/// Of a thread that trains, as the system gives the main thread; those of a pool have less.
const STACK: usize = 8 << 20;

/// Trains every student of the run file that is not trained yet.
///
/// # Errors
/// When nothing was curated, the signals are of another tokenizer than the student's, or
/// the trainer fails; checkpoints stay.
pub fn train(context: &Context) -> anyhow::Result<StageOutcome> {
    let mut plans = Vec::new();
    for variant in context.variants() {
        let plan = plan(context, variant)?;
        match settled(context, &plan)? {
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

/// How it ends where there is nothing to train: all steps are made, or this is a dry run.
fn settled(context: &Context, plan: &StagePlan) -> anyhow::Result<Option<StageOutcome>> {
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

/// Whether one processor core trains the student about as fast as all of them do.
fn is_small(context: &Context) -> anyhow::Result<bool> {
    let folder = checkpoint::student(&context.run)?;
    let config = match start_config(&context.run, &folder)? {
        Some(config) => config,
        None => Config::from_dir(&folder)?,
    };
    let cpu = context.device == potstill_model::device("cpu")?;
    Ok(cpu && config.parameters() <= SMALL)
}

/// Runs a stage for each student, each in a thread of its own: up to two a core, so that three on two
/// cores end together instead of one after the others. No more are begun once one has failed or a
/// stop was asked for.
fn side_by_side<S: Sync>(
    students: &[S],
    one: impl Fn(&S) -> anyhow::Result<StageOutcome> + Sync,
) -> anyhow::Result<StageOutcome> {
    let cores = rayon::current_num_threads();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> anyhow::Result<StageOutcome> {
        // What runs within it is parallel over its one thread.
        let core = ThreadPoolBuilder::new()
            .num_threads(1)
            .stack_size(STACK)
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

fn train_one(
    context: &Context,
    variant: Variant,
    plan: &StagePlan,
) -> anyhow::Result<StageOutcome> {
    let key = plan.key();
    let stage = &plan.stage;
    let Context {
        dir, console, run, ..
    } = context;
    let folder = dir.path(&plan.home);
    let started = folder.join(STARTED_FILE);
    let of = fs::read_to_string(&started).unwrap_or_default();
    // Without a checkpoint there is nothing to keep: it was begun and cut short.
    if of != key && folder.join("checkpoints").exists() {
        let old = dir.move_aside(&plan.home)?;
        console.emit(&Event::kept(stage, &dir.path(&old)));
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    replace_file(&started, key.as_bytes())?;
    if run.file.has_signals() {
        check_tokenizer(run, &dir.path("signals"))?;
    }

    console.emit(&Event::started(stage));
    let (began, started) = (Instant::now(), now());
    let mut rows = Rows::open(context, "train")?.at_temperature(context)?;
    let settings = settings(&run.file, variant.seed_index);
    let work = RefCell::new(console.progress(stage, "steps", 0, settings.steps));
    let mut tokens = 0;
    let stepped = Cell::new(false);
    let mut on_step = |metrics: &StepMetrics| {
        stepped.set(true);
        tokens += metrics.tokens;
        let note = format!("loss {:.4}", metrics.loss);
        work.borrow_mut().update(metrics.step, tokens, &note);
        interrupt::control_flow()
    };
    let len = rows.list.len();
    let mut row = |i: usize| {
        // Before the first step all rows are read once, for their lengths.
        if !stepped.get() && i.is_multiple_of(1000) {
            let note = format!("measuring answer {i} of {len}");
            work.borrow_mut().update(0, 0, &note);
        }
        rows.get(i)
    };
    let trained = potstill_student::train(
        start(context, variant.seed_index)?,
        &mut row,
        len,
        variant.arm,
        &settings,
        &folder,
        &mut on_step,
    )?;
    drop(work);
    let seconds = began.elapsed().as_secs_f64();
    let counts = counts([
        ("steps", trained.step as usize),
        ("sequences", len - trained.overlong.dropped as usize),
        ("sequences too long", trained.overlong.dropped as usize),
        ("sequences cut", trained.overlong.cut as usize),
    ]);
    dir.log(&LedgerLine {
        stage: stage.clone(),
        started_unix_seconds: started,
        seconds,
        finished: trained.finished,
        counts: counts.clone(),
    })?;
    if !trained.finished {
        console.note(&format!("{stage}: saved at step {}", trained.step));
        console.emit(&Event::stopped(stage));
        return Ok(StageOutcome::Stopped);
    }
    let last = last_checkpoint(context, variant);
    let mut files = hash_files(&dir.path(&last))?;
    // It counts bytes of `metrics.jsonl`, which tells speeds.
    files.remove("state.json");
    console.emit(&Event::finished(stage, counts.clone(), seconds));
    Manifest {
        stage: stage.clone(),
        schema: SCHEMA_VERSION,
        key,
        settings: plan.settings.clone(),
        inputs: plan.inputs.clone(),
        files: files
            .into_iter()
            .map(|(file, hash)| (format!("{last}/{file}"), hash))
            .collect(),
        counts,
    }
    .write(&folder)?;
    Ok(StageOutcome::Done)
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
            "train": settings(&run.file, variant.seed_index).identity(),
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

/// `[train]` with one of the seeds.
pub(crate) fn settings(file: &RunFile, seed_index: u32) -> Settings {
    Settings {
        seed: seed(file, seed_index),
        ..file.train.clone()
    }
}

/// Seed of a model's training and, if the student starts from random weights, of these weights.
pub(crate) fn seed(file: &RunFile, seed_index: u32) -> u64 {
    u64::from(file.run.seed) + u64::from(seed_index)
}

/// Key that identifies the base, the model that training starts from.
pub(crate) fn start_key(run: &Loaded, seed_index: u32) -> anyhow::Result<String> {
    let student = &run.file.student;
    let settings: Value = json!({
        "every": student.every,
        "random": settings_of(&student.random)?,
        "seed": student.random.as_ref().map(|_| seed(&run.file, seed_index)),
    });
    let folder = checkpoint::student(run)?;
    // A random student takes no weights from it, and there need not be any.
    let hash = match &student.random {
        Some(_) => checkpoint::shell_hash(&folder)?,
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
        let seed = seed(&run.file, seed_index);
        return Ok(Llama::init(&config, seed, DType::F32, device)?);
    }
    let whole = potstill_model::load(&folder, DType::F32, device)?;
    match run.file.student.every {
        Some(every) => Ok(potstill_model::cut(&whole, every)?),
        None => Ok(whole),
    }
}

/// The shape of a random student: that of the run file, with the checkpoint's vocabulary.
pub(crate) fn start_config(run: &Loaded, folder: &Path) -> anyhow::Result<Option<Config>> {
    Ok(match &run.file.student.random {
        Some(random) => Some(random.config(Config::from_dir(folder)?)),
        None => None,
    })
}

/// Refuses signals over another vocabulary than the student's.
fn check_tokenizer(run: &Loaded, signals: &Path) -> anyhow::Result<()> {
    let folder = checkpoint::student(run)?;
    let tokenizer = checkpoint::tokenizer(&folder)?;
    for shard in shards(signals)? {
        for provenance in read_footer(&shard)?.provenance {
            if provenance.tokenizer != tokenizer.fingerprint() {
                bail!(
                    "the signals in {} are over the vocabulary of {}, and the student's tokenizer in {} is another one: distributions cannot be carried over; train a student with the teacher's tokenizer (leave `path` of [student] out, or name a checkpoint of the same family)",
                    signals.display(),
                    provenance.teacher,
                    folder.display()
                );
            }
        }
    }
    Ok(())
}

/// The folder of the checkpoint that the last step wrote: a model in Hugging Face layout.
pub(crate) fn last_checkpoint(context: &Context, variant: Variant) -> String {
    let steps = context.run.file.train.steps;
    format!("students/{variant}/checkpoints/step-{steps:08}")
}
