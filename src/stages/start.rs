//! The start of training, also called the base: random weights, a checkpoint, or a pruned checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use potstill_model::{Config, DType, Decoder, Device};
use potstill_student::SequenceLength;
use serde_json::{Value, json};

use super::memory::{self, TrainingFit};
use super::{Context, checkpoint};
use crate::run_dir::settings_of;
use crate::run_file::{Loaded, RunFile};

/// Seed of a model's training and, if the student starts from random weights, of these weights.
pub(crate) fn seed(file: &RunFile, seed_index: u32) -> u64 {
    u64::from(file.run.seed) + u64::from(seed_index)
}

/// Computes the hash that identifies the base.
pub(crate) fn start_key(run: &Loaded, seed_index: u32) -> anyhow::Result<String> {
    let student = &run.settings.student;
    let folder = checkpoint::student(run)?;
    let settings: Value = json!({
        "layers": pruned_layers(run, &Config::from_dir(&folder)?)?,
        "intermediate_size": student.intermediate_size,
        "random": settings_of(&student.random)?,
        "seed": student.random.as_ref().map(|_| seed(&run.settings, seed_index)),
    });
    // A random student needs only the small files; the folder may have no weights.
    let hash = match &student.random {
        Some(_) => checkpoint::small_files_hash(&folder)?,
        None => checkpoint::content_hash(&folder)?,
    };
    let inputs = BTreeMap::from([("checkpoint".to_owned(), hash)]);
    Ok(potstill_datasets::stage_key("start", &settings, &inputs))
}

/// Loads or initialises the base in f32 on the run's device.
pub(crate) fn start(context: &Context, seed_index: u32) -> anyhow::Result<Decoder> {
    start_on(&context.run, seed_index, &context.device)
}

/// Loads or initialises the base in f32 on `device`.
pub(crate) fn start_on(run: &Loaded, seed_index: u32, device: &Device) -> anyhow::Result<Decoder> {
    let folder = checkpoint::student(run)?;
    check_training_memory(run, device, &[])?;
    if let Some(config) = random_config(run, &folder)? {
        let seed = seed(&run.settings, seed_index);
        let tokens = checkpoint::tokenizer(&folder)?.vocab_size();
        let model = Decoder::init(&config, seed, DType::F32, device)?;
        return Ok(model.with_token_count(tokens));
    }
    let whole = checkpoint::load(&folder, &folder, DType::F32, device)?;
    pruned(run, whole)
}

/// Refuses models that do not fit into memory: a local teacher with its weights, and a student that is trained.
///
/// # Errors
/// When a configuration cannot be read, or a model does not fit.
pub(crate) fn check_memory(run: &Loaded, device: &Device) -> anyhow::Result<()> {
    if let Some(teacher) = run.settings.local() {
        let folder = checkpoint::teacher(run)?;
        let dtype = checkpoint::dtype(teacher.dtype);
        checkpoint::check_memory(&folder, dtype, device)?;
    }
    // `collect` alone needs no student, so its files may not be here yet.
    match checkpoint::student(run) {
        Ok(folder) if folder.join("config.json").is_file() => {
            check_training_memory(run, device, &[])
        }
        _ => Ok(()),
    }
}

/// Refuses to train a student that does not fit into memory on sequences of these lengths, before anything is allocated.
/// Without lengths, only what does not depend on them is counted.
///
/// # Errors
/// When the configuration cannot be read; when the training does not fit, with what to change.
pub(crate) fn check_training_memory(
    run: &Loaded,
    device: &Device,
    lengths: &[SequenceLength],
) -> anyhow::Result<()> {
    let limit = memory::of_device(device)?;
    let fit = TrainingFit::of(run, device, lengths, limit)?;
    match (fit.problem(), &run.settings.student.random) {
        (None, _) => Ok(()),
        (Some(problem), Some(_)) => Err(run.problem(&["student", "random"], problem).into()),
        (Some(problem), None) => bail!(problem),
    }
}

/// Returns the configuration of the student.
pub(crate) fn config(run: &Loaded) -> anyhow::Result<Config> {
    let folder = checkpoint::student(run)?;
    if let Some(config) = random_config(run, &folder)? {
        return Ok(config);
    }
    let whole = Config::from_dir(&folder)?;
    let cut = match pruned_layers(run, &whole)? {
        Some(layers) => whole.with_layers(&layers).map_err(layers_problem(run))?,
        None => whole,
    };
    Ok(match run.settings.student.intermediate_size {
        Some(width) => cut.with_width(width).map_err(width_problem(run))?,
        None => cut,
    })
}

/// Returns the configuration of a random student, with the vocabulary of the tokenizer in `folder`; `None` if the student
/// is not random.
///
/// # Errors
/// [`crate::run_file::ConfigError`] at the key of `random` that cannot be used.
pub(crate) fn random_config(run: &Loaded, folder: &Path) -> anyhow::Result<Option<Config>> {
    let Some(random) = &run.settings.student.random else {
        return Ok(None);
    };
    let tokens = checkpoint::tokenizer(folder)?.vocab_size();
    let config = random.config(&Config::from_dir(folder)?, tokens);
    let problem = |error: potstill_student::RandomShapeError| {
        run.problem(&["student", "random", &error.key], error.why)
    };
    Ok(Some(config.map_err(problem)?))
}

/// Cuts layers and width of a checkpoint, as the run file says. The tensors are shared where they are not cut.
///
/// # Errors
/// [`crate::run_file::ConfigError`] at the key that the checkpoint does not allow.
pub(crate) fn pruned(run: &Loaded, whole: Decoder) -> anyhow::Result<Decoder> {
    let cut = match pruned_layers(run, whole.config())? {
        Some(layers) => {
            potstill_model::prune_layers(&whole, &layers).map_err(layers_problem(run))?
        }
        None => whole,
    };
    Ok(match run.settings.student.intermediate_size {
        Some(width) => potstill_model::prune_width(&cut, width).map_err(width_problem(run))?,
        None => cut,
    })
}

fn layers_problem(run: &Loaded) -> impl Fn(potstill_model::Error) -> anyhow::Error {
    |error| {
        run.problem(&["student", "layers"], error.to_string())
            .into()
    }
}

fn width_problem(run: &Loaded) -> impl Fn(potstill_model::Error) -> anyhow::Error {
    |error| {
        let key = ["student", "intermediate_size"];
        run.problem(&key, error.to_string()).into()
    }
}

/// Returns the layers that a pruned student keeps of the checkpoint with this configuration; `None` if no layer is cut.
///
/// # Errors
/// [`crate::run_file::ConfigError`] at `layers` if the checkpoint does not have these layers.
pub(crate) fn pruned_layers(
    run: &Loaded,
    checkpoint: &Config,
) -> anyhow::Result<Option<Vec<usize>>> {
    let student = &run.settings.student;
    let Some(layers) = &student.layers else {
        return Ok(None);
    };
    let count = checkpoint.num_hidden_layers();
    let key = ["student", "layers"];
    let indices = layers
        .indices(count)
        .map_err(|what| run.problem(&key, what))?;
    if indices.len() == count && student.path.is_none() && student.intermediate_size.is_none() {
        let what = format!(
            "all {count} layers are kept, so the student would be the teacher itself\nhint: keep fewer layers"
        );
        return Err(run.problem(&key, what).into());
    }
    Ok(Some(indices))
}
