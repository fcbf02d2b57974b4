//! `train`: the student and its controls, in place below `students/`.
//!
//! The trainer keeps its own checkpoints and resumes from the newest. `started.json` says
//! what a folder is being trained from; a folder that was begun from anything else is
//! kept as `students/NAME.old-N`. `manifest.json` comes last, when all steps are done.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use potstill_datasets::{Manifest, SCHEMA_VERSION, hash_files, read_footer, replace_file, shards};
use potstill_model::{Config, DType, Llama};
use potstill_student::{Method, Overlong, Settings, StepMetrics};
use serde_json::{Value, json};

use super::rows::Rows;
use super::{Context, Outcome, checkpoint, counts, each, score, seed_of};
use crate::events::Event;
use crate::interrupt;
use crate::run_dir::{LedgerLine, Plan, now, settings_of, short};
use crate::run_file::{Loaded, Overlong as RunOverlong, RunFile};

const STARTED_FILE: &str = "started.json";

/// Trains every student of the run file that is not trained yet.
///
/// # Errors
/// When nothing was curated, the signals are of another tokenizer than the student's, or
/// the trainer fails; checkpoints stay.
pub fn train(context: &Context) -> anyhow::Result<Outcome> {
    each(&context.trained(), |name| train_one(context, name))
}

fn train_one(context: &Context, name: &str) -> anyhow::Result<Outcome> {
    let plan = plan(context, name)?;
    let key = plan.key();
    let stage = &plan.stage;
    let Context { dir, talk, run, .. } = context;
    talk.detail(&format!("{stage}: key {}", short(&key)));
    let published = dir.published(&plan.home)?;
    if let Some(manifest) = published.filter(|m| m.key == key) {
        talk.say(&Event::up_to_date(stage, manifest.counts));
        return Ok(Outcome::UpToDate);
    }
    if context.dry_run {
        talk.say(&Event::would_run(stage));
        return Ok(Outcome::WouldRun);
    }
    let folder = dir.path(&plan.home);
    let started = folder.join(STARTED_FILE);
    let of = fs::read_to_string(&started).unwrap_or_default();
    // Without a checkpoint there is nothing to keep: it was begun and cut short.
    if of != key && folder.join("checkpoints").exists() {
        let old = dir.keep_old(&plan.home)?;
        talk.say(&Event::kept(stage, &dir.path(&old)));
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    replace_file(&started, key.as_bytes())?;
    if run.file.has_signals() {
        check_tokenizer(run, &dir.path("signals"))?;
    }

    talk.say(&Event::started(stage));
    let (began, started) = (Instant::now(), now());
    let mut rows = Rows::open(context, "train")?;
    let settings = settings(&run.file, name);
    let mut work = talk.work(stage, "steps", 0, settings.steps);
    let mut tokens = 0;
    let mut on_step = |metrics: &StepMetrics| {
        tokens += metrics.tokens;
        work.show(metrics.step, tokens, &format!("loss {:.4}", metrics.loss));
        interrupt::flow()
    };
    let len = rows.list.len();
    let trained = potstill_student::train(
        start(context, name)?,
        &mut |i| rows.get(i),
        len,
        method(name),
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
        talk.line(&format!("{stage}: saved at step {}", trained.step));
        talk.say(&Event::stopped(stage));
        return Ok(Outcome::Stopped);
    }
    let last = last_checkpoint(context, name);
    let mut files = hash_files(&dir.path(&last))?;
    // It counts bytes of `metrics.jsonl`, which tells speeds.
    files.remove("state.json");
    talk.say(&Event::finished(stage, counts.clone(), seconds));
    Manifest {
        stage: stage.clone(),
        schema: SCHEMA_VERSION,
        key,
        settings: plan.settings,
        inputs: plan.inputs,
        files: files
            .into_iter()
            .map(|(file, hash)| (format!("{last}/{file}"), hash))
            .collect(),
        counts,
    }
    .write(&folder)?;
    Ok(Outcome::Done)
}

fn plan(context: &Context, name: &str) -> anyhow::Result<Plan> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let curation = context.dir.require("train", "curate", run)?;
    Ok(Plan {
        stage: format!("train {name}"),
        home: format!("students/{name}"),
        outputs: vec![format!("students/{name}")],
        settings: json!({
            "method": seed_of(name).0,
            "train": settings_of(&settings(&run.file, name))?,
        }),
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("train".to_owned(), curation.content_hash()),
            ("start".to_owned(), start_key(run, name)?),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    })
}

fn method(name: &str) -> Method {
    match seed_of(name).0 {
        "sft" => Method::Sft,
        "shuffled" => Method::Shuffled,
        _ => Method::Distill,
    }
}

/// `[train]` as the trainer takes it for one of the students.
pub(crate) fn settings(file: &RunFile, name: &str) -> Settings {
    let train = &file.train;
    Settings {
        steps: train.steps.get() as u64,
        batch: train.batch.get(),
        micro_batch: train.micro_batch.get(),
        packing: train.packing,
        learning_rate: train.learning_rate.get(),
        warmup: train.warmup.get() as u64,
        min_learning_rate: train.min_learning_rate.get(),
        weight_decay: train.weight_decay.get(),
        clip: train.clip.get(),
        forward_kl: train.loss.forward_kl.get(),
        cross_entropy: train.loss.cross_entropy.get(),
        max_length: train.max_length.get(),
        overlong: match train.overlong {
            RunOverlong::Drop => Overlong::Drop,
            RunOverlong::Cut => Overlong::Cut,
        },
        checkpoint_every: train.checkpoint_every.get() as u64,
        chunk_rows: train.chunk_rows.get(),
        seed: seed(file, name),
    }
}

/// The seed of a model's start, where it is random, and of its training.
pub(crate) fn seed(file: &RunFile, name: &str) -> u64 {
    u64::from(file.run.seed) + u64::from(seed_of(name).1)
}

/// What identifies the model that a student's training starts from.
pub(crate) fn start_key(run: &Loaded, name: &str) -> anyhow::Result<String> {
    let student = &run.file.student;
    let settings: Value = json!({
        "every": student.every.map(|e| e.get()),
        "random": settings_of(&student.random)?,
        "seed": student.random.as_ref().map(|_| seed(&run.file, name)),
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

/// The model that a student's training starts from, in f32.
pub(crate) fn start(context: &Context, name: &str) -> anyhow::Result<Llama> {
    let run = &context.run;
    let folder = checkpoint::student(run)?;
    if let Some(config) = start_config(run, &folder)? {
        let seed = seed(&run.file, name);
        return Ok(Llama::init(&config, seed, DType::F32, &context.device)?);
    }
    let whole = potstill_model::load(&folder, DType::F32, &context.device)?;
    match run.file.student.every {
        Some(every) => Ok(potstill_model::cut(&whole, every.get())?),
        None => Ok(whole),
    }
}

/// The shape of a random student: that of the run file, with the checkpoint's vocabulary.
pub(crate) fn start_config(run: &Loaded, folder: &Path) -> anyhow::Result<Option<Config>> {
    let Some(random) = &run.file.student.random else {
        return Ok(None);
    };
    let heads = random.heads.get();
    Ok(Some(Config {
        hidden_size: random.hidden_size.get(),
        intermediate_size: random.intermediate_size.get(),
        num_hidden_layers: random.layers.get(),
        num_attention_heads: heads,
        num_key_value_heads: random.key_value_heads.map_or(heads, |h| h.get()),
        head_dim: random.hidden_size.get() / heads,
        ..Config::from_dir(folder)?
    }))
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
pub(crate) fn last_checkpoint(context: &Context, name: &str) -> String {
    let steps = context.run.file.train.steps.get();
    format!("students/{name}/checkpoints/step-{steps:08}")
}
