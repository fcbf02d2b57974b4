//! The start of training, also called the base: random weights, a checkpoint, or a pruned checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::bail;
use potstill_datasets::SequenceLength;
use potstill_model::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, BlockType, Config, DType, Decoder, Device,
};
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
    let mut settings: Value = json!({
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
    let mut inputs = BTreeMap::from([("checkpoint".to_owned(), hash)]);
    if let Some(adapter) = &run.settings.train.adapter {
        settings["adapter_base"] = settings_of(&adapter.base)?;
        if let Some(path) = &adapter.path {
            inputs.insert("adapter".to_owned(), adapter_hash(path.as_path())?);
        }
    }
    Ok(potstill_datasets::stage_key("start", &settings, &inputs))
}

/// Loads or initialises the base in f32 on the run's device.
pub(crate) fn start(context: &Context, seed_index: u32) -> anyhow::Result<Decoder> {
    start_on(&context.run, seed_index, &context.device)
}

/// Loads or initialises the base in f32 on `device`, with the adapter that is trained, if there is one.
pub(crate) fn start_on(run: &Loaded, seed_index: u32, device: &Device) -> anyhow::Result<Decoder> {
    adapted(run, without_adapter(run, seed_index, device)?, seed_index)
}

/// Loads or initialises the base in f32 on `device`, without an adapter. With `base` of `[train.adapter]`, the weights of
/// linear layers are in blocks.
pub(super) fn without_adapter(
    run: &Loaded,
    seed_index: u32,
    device: &Device,
) -> anyhow::Result<Decoder> {
    let adapter = run.settings.train.adapter.as_ref();
    let blocks = adapter.and_then(|adapter| Some(adapter.base?.block_type()));
    let folder = checkpoint::student(run)?;
    check_training_memory(run, device, &[])?;
    let model = match random_config(run, &folder)? {
        Some(config) => {
            let seed = seed(&run.settings, seed_index);
            let tokens = checkpoint::tokenizer(&folder)?.vocab_size();
            let model = Decoder::init(&config, seed, DType::F32, device)?;
            model.with_token_count(tokens)
        }
        None => pruned(run, whole(&folder, blocks, device)?)?,
    };
    Ok(match blocks {
        Some(kind) => potstill_model::quantized(model, kind),
        None => model,
    })
}

/// Loads a whole checkpoint, with the weights of linear layers in blocks if a type is given.
fn whole(folder: &Path, blocks: Option<BlockType>, device: &Device) -> anyhow::Result<Decoder> {
    let Some(kind) = blocks else {
        return checkpoint::load(folder, folder, DType::F32, device);
    };
    let tokens = checkpoint::tokenizer(folder)?.vocab_size();
    let model = potstill_model::load_quantized(folder, DType::F32, device, kind)?;
    Ok(model.with_token_count(tokens))
}

/// Gives the base the adapter that is trained, if `[train.adapter]` is set.
///
/// # Errors
/// [`crate::run_file::ConfigError`] at `[train.adapter]` for an adapter that does not fit the model.
fn adapted(run: &Loaded, model: Decoder, seed_index: u32) -> anyhow::Result<Decoder> {
    let Some(adapter) = &run.settings.train.adapter else {
        return Ok(model);
    };
    let (key, with_adapter): (&[&str], _) = match &adapter.path {
        Some(path) => (
            &["train", "adapter", "path"],
            potstill_model::load_adapter(model, path.as_path()),
        ),
        None => (
            &["train", "adapter"],
            potstill_model::with_adapter(model, &adapter.plan(), seed(&run.settings, seed_index)),
        ),
    };
    with_adapter.map_err(|error| run.problem(key, full_message(&error)).into())
}

/// Computes the SHA-256 of the files of an adapter.
fn adapter_hash(folder: &Path) -> anyhow::Result<String> {
    let files = [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE];
    checkpoint::hash_of(files.into_iter().map(|file| folder.join(file)))
}

/// The message of an error and of what caused it.
fn full_message(error: &potstill_model::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
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
    let fit = TrainingFit::of(run, &config(run)?, device, lengths, limit)?;
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
