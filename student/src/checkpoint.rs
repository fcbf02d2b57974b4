//! Training checkpoints: `checkpoints/step-00000010/` with the model in Hugging Face layout, the
//! optimizer's moments, and the state of the training loop. A checkpoint is written beside its place and
//! renamed, so a folder with that name is complete. `files.json` has the sizes and hashes of all other files, and its
//! own hash; files are compared with it before they are read.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_datasets::{Arm, FileHash, hash_file, hash_files, read_sealed, write_sealed};
use potstill_model::{
    ADAPTER_WEIGHTS_FILE, Decoder, MapParameters, ParameterName, StoredTensor, StoredValues,
    load_adapter, map_parameters, named_parameters, read_tensors, save_adapter, write_tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::Error;
use crate::guard::Guard;
use crate::optimizer::{EMA, Optimizer};
use crate::settings::TrainSettings;
use crate::trainable::Trainable;

const FILES_FILE: &str = "files.json";
const STATE_FILE: &str = "state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The trained parameters of a model with frozen ones.
const TRAINED_FILE: &str = "trained.safetensors";

/// Content of `files.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointFiles {
    /// Every other file of the checkpoint by its name.
    files: BTreeMap<String, FileHash>,
}

/// State from which the training loop resumes. The order of the data is a function of seed and position, so
/// there is no other random state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainingState {
    pub step: u64,
    /// Number of sequences read since the start.
    pub position: u64,
    /// Length of `metrics.jsonl` at this step. Bytes behind it are of steps that will run again.
    pub metrics_bytes: u64,
    /// Length of TensorBoard's event file at this step.
    pub events_bytes: u64,
    #[serde(rename = "method", with = "Method")]
    pub arm: Arm,
    /// [`TrainSettings::identity`](crate::TrainSettings::identity) of the run.
    pub settings: Value,
    /// Number of rows that can be trained on.
    pub rows: u64,
    /// Memory of the guard.
    pub guard: Guard,
    /// Mean KL on dev after the steps at which it was measured, nats.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dev: BTreeMap<u64, f32>,
    /// The same of the running mean of the weights.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub dev_of_mean: BTreeMap<u64, f32>,
}

impl TrainingState {
    /// The step with the lowest KL on dev, the first of equal ones.
    pub(crate) fn best_step(&self) -> Option<u64> {
        lowest(&self.dev)
    }

    /// The step at which the running mean of the weights has the lowest KL on dev, the first of equal ones.
    pub(crate) fn best_step_of_mean(&self) -> Option<u64> {
        lowest(&self.dev_of_mean)
    }
}

fn lowest(figures: &BTreeMap<u64, f32>) -> Option<u64> {
    let best = figures.iter().min_by(|a, b| a.1.total_cmp(b.1));
    best.map(|(step, _)| *step)
}

/// Figures on dev at the step of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DevFigures {
    /// Step of the checkpoint.
    pub step: u64,
    /// Mean KL of the weights, or without distributions mean negative log-likelihood, nats.
    pub trained: f32,
    /// The same of the running mean of the weights.
    pub mean: f32,
}

/// Reads the figures on dev of the checkpoint in `dir`; `None` if the weights or their running mean were not measured.
///
/// # Errors
/// A file that cannot be read or was changed.
pub fn dev_figures(dir: &Path) -> Result<Option<DevFigures>, Error> {
    let path = dir.join(STATE_FILE);
    if let Some(expected) = recorded_files(dir)?.files.get(STATE_FILE) {
        compare(&path, Some(&hash_file(&path)?), expected)?;
    }
    let state = read_state(&path)?;
    let step = state.step;
    let figures = state.dev.get(&step).zip(state.dev_of_mean.get(&step));
    Ok(figures.map(|(trained, mean)| DevFigures {
        step,
        trained: *trained,
        mean: *mean,
    }))
}

fn read_state(path: &Path) -> Result<TrainingState, Error> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|why| damaged(path, why))
}

/// Names of the arms in `state.json`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Arm", rename_all = "snake_case")]
enum Method {
    #[serde(rename = "distill")]
    Student,
    Sft,
    SameToken,
    Smoothing,
    Shuffled,
}

pub(crate) struct Checkpoint {
    pub state: TrainingState,
    /// The model in f32.
    pub model: Decoder,
    pub optimizer: Optimizer,
}

/// Writes a checkpoint of `model`, whose trained parameters are in f32 (or f64), and deletes the oldest.
pub(crate) fn save(
    dir: &Path,
    state: &TrainingState,
    model: &Decoder,
    optimizer: &Optimizer,
    settings: &TrainSettings,
    trainable: &Trainable,
) -> Result<(), Error> {
    let checkpoints = dir.join("checkpoints");
    let place = checkpoints.join(format!("step-{:08}", state.step));
    let beside = checkpoints.join(format!(".step-{:08}.tmp", state.step));
    if beside.exists() {
        fs::remove_dir_all(&beside).map_err(Error::io(&beside))?;
    }
    fs::create_dir_all(&beside).map_err(Error::io(&beside))?;
    save_trained(model, &beside, settings, trainable)?;
    let path = beside.join(OPTIMIZER_FILE);
    write_tensors(&path, &optimizer.tensors()?, None)?;
    let path = beside.join(STATE_FILE);
    let text = serde_json::to_vec_pretty(state).map_err(|why| damaged(&path, why))?;
    write_synced(&path, &text)?;
    let files = hash_files(&beside)?;
    write_sealed(&beside.join(FILES_FILE), &CheckpointFiles { files })?;
    if place.exists() {
        fs::remove_dir_all(&place).map_err(Error::io(&place))?;
    }
    fs::rename(&beside, &place).map_err(Error::io(&place))?;
    sync_dir(&checkpoints)?;
    prune(dir, settings, state)
}

/// Deletes the checkpoints after a step, to which training goes back.
pub(crate) fn discard_after(dir: &Path, step: u64) -> Result<(), Error> {
    for (later, place) in list(dir)? {
        if later > step {
            discard(later, &place)?;
        }
    }
    Ok(())
}

/// Deletes a checkpoint, which is renamed before, so that a folder with a checkpoint's name is complete.
fn discard(step: u64, place: &Path) -> Result<(), Error> {
    let aside = place.with_file_name(format!(".step-{step:08}.old"));
    fs::rename(place, &aside).map_err(Error::io(place))?;
    fs::remove_dir_all(&aside).map_err(Error::io(&aside))
}

/// Writes what is trained: a whole model in Hugging Face layout, an adapter in PEFT's, and otherwise the parameters alone.
fn save_trained(
    model: &Decoder,
    dir: &Path,
    settings: &TrainSettings,
    trainable: &Trainable,
) -> Result<(), Error> {
    if trainable.is_whole() {
        return Ok(potstill_model::save(model, dir, model.dtype())?);
    }
    if settings.adapter.is_some() {
        return Ok(save_adapter(model, dir, &settings.base, None)?);
    }
    let path = dir.join(TRAINED_FILE);
    let mut tensors = Vec::new();
    for (ParameterName { name, .. }, parameter) in named_parameters(model) {
        if trainable.contains(&name) {
            tensors.push(StoredTensor::new(name, StoredValues::Float(parameter))?);
        }
    }
    Ok(write_tensors(&path, &tensors, None)?)
}

/// Loads the model of a checkpoint in f32. `start` gives the model that the training began at; it is called if the checkpoint
/// does not hold the whole model. A whole model has no [token count](Decoder::with_token_count) yet.
///
/// # Errors
/// An error of `start`, a file that cannot be read, and a checkpoint that does not fit the start.
pub fn checkpoint_model<E: From<Error>>(
    dir: &Path,
    device: &Device,
    start: impl FnOnce() -> Result<Decoder, E>,
) -> Result<Decoder, E> {
    if dir.join(ADAPTER_WEIGHTS_FILE).exists() || dir.join(TRAINED_FILE).exists() {
        return Ok(with_trained(dir, start()?)?);
    }
    let model = potstill_model::load(dir, DType::F32, device).map_err(Error::from)?;
    Ok(model)
}

/// Puts what a checkpoint holds of a model in place of its parameters.
fn with_trained(dir: &Path, start: Decoder) -> Result<Decoder, Error> {
    if dir.join(ADAPTER_WEIGHTS_FILE).exists() {
        return Ok(load_adapter(start, dir)?);
    }
    let path = dir.join(TRAINED_FILE);
    let mut stored = BTreeMap::new();
    read_tensors(&path, &mut |name, data| {
        stored.insert(name, data);
        Ok::<(), Error>(())
    })?;
    with_stored(path, start, stored)
}

/// Puts the running mean of the weights, which a checkpoint of a training with `ema` has, in place of the parameters of its
/// model.
///
/// # Errors
/// A file that cannot be read, and a checkpoint without a mean or with one of another model.
pub fn with_mean(dir: &Path, model: Decoder) -> Result<Decoder, Error> {
    let path = dir.join(OPTIMIZER_FILE);
    let mut stored = BTreeMap::new();
    read_tensors(&path, &mut |name, data| {
        if let Some((EMA, parameter)) = name.split_once('.') {
            stored.insert(parameter.to_owned(), data);
        }
        Ok::<(), Error>(())
    })?;
    if stored.is_empty() {
        return Err(damaged(&path, "it has no running mean of the weights"));
    }
    with_stored(path, model, stored)
}

/// Puts tensors of a file in place of the parameters with their names.
fn with_stored(
    path: PathBuf,
    start: Decoder,
    stored: BTreeMap<String, TensorData>,
) -> Result<Decoder, Error> {
    struct Replace {
        path: PathBuf,
        stored: BTreeMap<String, TensorData>,
        error: Option<Error>,
    }
    impl MapParameters for Replace {
        fn map<const D: usize>(&mut self, name: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            match self.stored.remove(&name.name) {
                Some(data) if data.shape() == &tensor.shape() => {
                    Tensor::from_data(data, (&tensor.device(), tensor.dtype()))
                }
                Some(data) => {
                    let reason = format!("{} has the shape {:?}", name.name, data.shape());
                    self.error = Some(damaged(&self.path, reason));
                    tensor
                }
                None => tensor,
            }
        }
    }
    let mut replace = Replace {
        path,
        stored,
        error: None,
    };
    let model = map_parameters(start, &mut replace);
    match (replace.error, replace.stored.into_keys().next()) {
        (Some(error), _) => Err(error),
        (None, Some(name)) => {
            let reason = format!("the model that training started from has no parameter {name}");
            Err(damaged(&replace.path, reason))
        }
        (None, None) => Ok(model),
    }
}

/// Deletes all but the newest checkpoints, the best one and that with the best running mean, and the one to which the guard returns, and the incomplete
/// folders that a crash left.
fn prune(dir: &Path, settings: &TrainSettings, state: &TrainingState) -> Result<(), Error> {
    for rest in entries(dir)? {
        if name_of(&rest).starts_with(".step-") {
            fs::remove_dir_all(&rest).map_err(Error::io(&rest))?;
        }
    }
    let mut steps = list(dir)?;
    let kept = settings.keep_checkpoints.max(1);
    steps.truncate(steps.len().saturating_sub(kept));
    let best = [state.best_step(), state.best_step_of_mean()];
    let best = best.map(|step| step.filter(|_| settings.keep_best));
    for (step, old) in steps {
        if !best.contains(&Some(step)) && state.guard.checkpoint() != Some(step) {
            discard(step, &old)?;
        }
    }
    Ok(())
}

/// Loads the newest checkpoint of a training that began at `start`; without one, the training begins at `start` with the
/// state `fresh`. A checkpoint of another run is an error.
pub(crate) fn newest(
    dir: &Path,
    start: Decoder,
    fresh: TrainingState,
    settings: &TrainSettings,
    trainable: &Trainable,
) -> Result<Checkpoint, Error> {
    let mut optimizer = Optimizer::new(settings);
    let Some((_, place)) = list(dir)?.pop() else {
        return Ok(Checkpoint {
            state: fresh,
            model: start,
            optimizer,
        });
    };
    check_files(&place)?;
    let path = place.join(STATE_FILE);
    let state = read_state(&path)?;
    check_same(&path, &state, &fresh)?;
    prune(dir, settings, &state)?;
    let (device, tokens, dtype) = (&start.device(), start.token_count(), start.dtype());
    let model = match trainable.is_whole() {
        true => {
            // The weights of both would be in memory otherwise.
            drop(start);
            potstill_model::load(&place, dtype, device)?
        }
        false => with_trained(&place, start)?,
    };
    let path = place.join(OPTIMIZER_FILE);
    read_tensors(&path, &mut |name, data| {
        let restored = optimizer.restore(&name, data, device);
        restored.map_err(|why| damaged(&path, format!("{name}: {why}")))
    })?;
    Ok(Checkpoint {
        state,
        model: model.with_token_count(tokens),
        optimizer,
    })
}

/// Compares the files of a checkpoint with its `files.json`.
fn check_files(place: &Path) -> Result<(), Error> {
    let CheckpointFiles { files } = recorded_files(place)?;
    let found = hash_files(place)?;
    for (name, expected) in &files {
        compare(&place.join(name), found.get(name), expected)?;
    }
    // A further file could change what is read, such as another index of the weights.
    let further = |name: &&String| *name != FILES_FILE && !files.contains_key(*name);
    match found.keys().find(further) {
        Some(name) => Err(damaged(
            &place.join(name),
            format!("{FILES_FILE} does not name it, so it is not part of the checkpoint"),
        )),
        None => Ok(()),
    }
}

/// Reads the hashes of a checkpoint's files.
fn recorded_files(place: &Path) -> Result<CheckpointFiles, Error> {
    let list = place.join(FILES_FILE);
    let hint = format!(
        "remove the folder {}, and training resumes from the checkpoint before it, with the same result",
        place.display()
    );
    let recorded: Option<CheckpointFiles> = read_sealed(&list, &hint)?;
    let Some(recorded) = recorded else {
        let reason = "it is absent, so the other files of the checkpoint cannot be checked";
        return Err(damaged(&list, reason));
    };
    Ok(recorded)
}

/// Compares a file of a checkpoint with the hash that `files.json` has of it.
fn compare(path: &Path, found: Option<&FileHash>, expected: &FileHash) -> Result<(), Error> {
    let reason = match found {
        Some(hash) if hash == expected => return Ok(()),
        Some(hash) if hash.bytes == expected.bytes => format!(
            "it was changed or damaged: its SHA-256 is {}, and {FILES_FILE} says {}",
            hash.sha256, expected.sha256
        ),
        Some(hash) => format!(
            "it was changed or damaged: it is {} bytes long, and {FILES_FILE} says {}",
            hash.bytes, expected.bytes
        ),
        None => format!("it is absent, and {FILES_FILE} names it"),
    };
    Err(damaged(path, reason))
}

fn check_same(path: &Path, found: &TrainingState, expected: &TrainingState) -> Result<(), Error> {
    let other = |key: &str| Error::OtherSettings {
        path: path.to_path_buf(),
        key: key.to_owned(),
    };
    if found.arm != expected.arm {
        return Err(other("method"));
    }
    if found.rows != expected.rows {
        return Err(other("the number of training rows"));
    }
    // A number may change in its last digit when it is written as text and read back. The found settings
    // were, so the expected ones are too before the comparison.
    let expected = serde_json::from_str::<Value>(&expected.settings.to_string())
        .map_err(|why| damaged(path, why))?;
    match first_difference(&found.settings, &expected) {
        Some(key) => Err(other(&key)),
        None => Ok(()),
    }
}

/// Returns the first key at which two settings differ, with those of inner tables behind a dot.
fn first_difference(found: &Value, expected: &Value) -> Option<String> {
    // Settings that are off may be absent on either side.
    let tables = [expected, found].into_iter().filter_map(Value::as_object);
    let mut keys = tables.flat_map(|settings| settings.keys());
    let key = keys.find(|key| found.get(key.as_str()) != expected.get(key.as_str()))?;
    let inner = found.get(key).zip(expected.get(key));
    Some(
        match inner.and_then(|(found, expected)| first_difference(found, expected)) {
            Some(inner) => format!("{key}.{inner}"),
            None => key.clone(),
        },
    )
}

/// Lists the checkpoints with their steps, oldest first.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let mut found = Vec::new();
    for path in entries(dir)? {
        let step = name_of(&path).strip_prefix("step-");
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Lists the entries of `checkpoints/` in no order.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let checkpoints = dir.join("checkpoints");
    let entries = match fs::read_dir(&checkpoints) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(&checkpoints)(error)),
    };
    let path = |entry: std::io::Result<fs::DirEntry>| entry.map(|entry| entry.path());
    entries
        .map(path)
        .collect::<Result<_, _>>()
        .map_err(Error::io(&checkpoints))
}

fn name_of(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

fn damaged(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::DamagedCheckpoint {
        path: path.to_path_buf(),
        reason: reason.to_string(),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(Error::io(path))?;
    sync_file(path)
}

fn sync_file(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(path))
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io(dir))
}
