//! Weights in Hugging Face layout: `model.safetensors`, or shards with `model.safetensors.index.json`.
//!
//! Reading maps the files into memory and copies one tensor at a time. Writing streams one tensor at a time to a
//! temporary file, which is synced and renamed, so a folder never holds a partly written file.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::Deserialize;
use serde_json::json;

use crate::dtype::{check_model_dtype, from_safetensors, to_safetensors};
use crate::files::{map_file, write_json, write_whole};
use crate::parameters::{MapParameters, Parameter, map_parameters, named_parameters};
use crate::{Config, Decoder, Error};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const CONFIG_FILE: &str = "config.json";

/// Largest size of a weight file in bytes: 5 GB, as in transformers 4. Larger models are saved in shards.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Loads the checkpoint in `dir` and converts its weights to `dtype`.
///
/// # Errors
/// Returns the errors of [`Config::from_dir`], and an error for absent weights, for an absent shard that the index names,
/// for a truncated file, and for a tensor that is absent, has another shape, or is stored in another type than F64, F32,
/// F16 and BF16.
pub fn load(dir: &Path, dtype: DType, device: &Device) -> Result<Decoder, Error> {
    let config = Config::from_dir(dir)?;
    check_model_dtype(dtype)?;
    let weight_files = find_weight_files(dir)?;
    let maps = weight_files
        .files
        .iter()
        .map(|path| map_file(path))
        .collect::<Result<Vec<_>, _>>()?;
    let mut reader = ParameterReader {
        root: &weight_files.root,
        files: Vec::with_capacity(maps.len()),
        dtype,
        device,
        error: None,
    };
    for (path, bytes) in weight_files.files.iter().zip(&maps) {
        let tensors = SafeTensors::deserialize(bytes).map_err(|source| Error::Safetensors {
            path: path.clone(),
            source,
        })?;
        reader.files.push((path, tensors));
    }
    let model = map_parameters(Decoder::unset(&config, dtype, device), &mut reader);
    match reader.error {
        None => Ok(model),
        Some(error) => Err(error),
    }
}

/// Returns the files that hold the weights of the checkpoint in `dir`: one file, or the shards in order of name.
///
/// # Errors
/// Returns an error for absent weights, for a broken index, and for an absent shard that the index names.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(find_weight_files(dir)?.files)
}

/// Saves `model` to `dir` as `config.json` and weights of type `dtype`, in shards of at most [`MAX_SHARD_BYTES`]. The
/// folder is created if it is absent. transformers loads it unchanged.
///
/// # Errors
/// Returns an error for a type that models are not stored in, and for a failure of the file system.
pub fn save(model: &Decoder, dir: &Path, dtype: DType) -> Result<(), Error> {
    save_sharded(model, dir, dtype, MAX_SHARD_BYTES)
}

/// Saves as [`save`] does, in shards of at most `max_shard_bytes`; a larger tensor has its own shard.
///
/// # Errors
/// Returns the errors of [`save`].
pub fn save_sharded(
    model: &Decoder,
    dir: &Path,
    dtype: DType,
    max_shard_bytes: u64,
) -> Result<(), Error> {
    let stored = to_safetensors(dtype)?;
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let shards = split(named_parameters(model), stored, max_shard_bytes);
    let outdated = match shards.as_slice() {
        [single] => {
            write_weights(&dir.join(SINGLE_FILE), single, dtype, stored)?;
            INDEX_FILE
        }
        shards => {
            write_shards(dir, shards, dtype, stored)?;
            SINGLE_FILE
        }
    };
    // An earlier save may have left a file of the other form (one file, or an index), which a reader might prefer.
    let outdated = dir.join(outdated);
    match std::fs::remove_file(&outdated) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &outdated)(error));
        }
        _ => {}
    }
    write_json(&dir.join(CONFIG_FILE), &model.config().to_json(dtype))
}

/// The weight files of a checkpoint.
struct WeightFiles {
    /// The single file, or the index; errors about an absent tensor name it.
    root: PathBuf,
    files: Vec<PathBuf>,
}

/// The contents of `model.safetensors.index.json` that loading uses.
#[derive(Deserialize)]
struct ShardIndex {
    /// The shard of each tensor.
    weight_map: BTreeMap<String, String>,
}

fn find_weight_files(dir: &Path) -> Result<WeightFiles, Error> {
    let single = dir.join(SINGLE_FILE);
    if single.exists() {
        return Ok(WeightFiles {
            files: vec![single.clone()],
            root: single,
        });
    }
    let root = dir.join(INDEX_FILE);
    if !root.exists() {
        return Err(Error::NoWeights {
            dir: dir.to_path_buf(),
        });
    }
    let text = std::fs::read_to_string(&root).map_err(Error::io("read", &root))?;
    let index: ShardIndex = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: root.clone(),
        what: "safetensors index",
        source,
    })?;
    let mut shards = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        shards.entry(dir.join(shard)).or_insert(tensor);
    }
    for (shard, tensor) in &shards {
        if !shard.exists() {
            return Err(Error::MissingShard {
                shard: shard.clone(),
                index: root,
                tensor: tensor.clone(),
            });
        }
    }
    Ok(WeightFiles {
        root,
        files: shards.into_keys().collect(),
    })
}

/// Replaces every parameter by its tensor in the files. It stops reading at the first error and keeps the error.
struct ParameterReader<'a> {
    /// The file that an error about an absent tensor names.
    root: &'a Path,
    files: Vec<(&'a PathBuf, SafeTensors<'a>)>,
    dtype: DType,
    device: &'a Device,
    error: Option<Error>,
}

impl ParameterReader<'_> {
    fn read<const D: usize>(&mut self, name: &str, unset: Tensor<D>) -> Tensor<D> {
        if self.error.is_none() {
            match self.data(name, &unset.dims()) {
                Ok(data) => return Tensor::from_data(data, (self.device, self.dtype)),
                Err(error) => self.error = Some(error),
            }
        }
        unset
    }

    fn data(&self, name: &str, expected: &[usize]) -> Result<TensorData, Error> {
        let found = self
            .files
            .iter()
            .find_map(|(path, file)| Some((path, file.tensor(name).ok()?)));
        let Some((path, view)) = found else {
            return Err(Error::MissingTensor {
                path: self.root.to_path_buf(),
                tensor: name.to_owned(),
            });
        };
        if view.shape() != expected {
            return Err(Error::Shape {
                path: path.to_path_buf(),
                tensor: name.to_owned(),
                found: view.shape().to_vec(),
                expected: expected.to_vec(),
            });
        }
        let dtype = from_safetensors(view.dtype()).ok_or_else(|| Error::StoredType {
            path: path.to_path_buf(),
            tensor: name.to_owned(),
            dtype: format!("{:?}", view.dtype()),
        })?;
        TensorData::try_from_bytes_vec(view.data().to_vec(), expected.to_vec(), dtype)
            .and_then(|data| data.try_cast(self.dtype))
            .map_err(|error| Error::Device {
                what: "a stored tensor",
                why: error.to_string(),
            })
    }
}

impl MapParameters for ParameterReader<'_> {
    fn matrix(&mut self, name: &str, unset: Tensor<2>) -> Tensor<2> {
        self.read(name, unset)
    }

    fn vector(&mut self, name: &str, unset: Tensor<1>) -> Tensor<1> {
        self.read(name, unset)
    }
}

/// A parameter that is to be written to a file.
struct ShardEntry {
    name: String,
    parameter: Parameter,
    shape: Vec<usize>,
    bytes: usize,
}

/// Divides the parameters, in order, into shards of at most `max_bytes`.
fn split(
    parameters: Vec<(String, Parameter)>,
    stored: Dtype,
    max_bytes: u64,
) -> Vec<Vec<ShardEntry>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0u64;
    for (name, parameter) in parameters {
        let shape = match &parameter {
            Parameter::Matrix(tensor) => tensor.dims().to_vec(),
            Parameter::Vector(tensor) => tensor.dims().to_vec(),
        };
        let bytes = shape.iter().product::<usize>() * stored.bitsize() / 8;
        if filled > 0 && filled + bytes as u64 > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes as u64;
        if let Some(shard) = shards.last_mut() {
            shard.push(ShardEntry {
                name,
                parameter,
                shape,
                bytes,
            });
        }
    }
    shards
}

fn write_shards(
    dir: &Path,
    shards: &[Vec<ShardEntry>],
    dtype: DType,
    stored: Dtype,
) -> Result<(), Error> {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_weights(&dir.join(&file), shard, dtype, stored)?;
        for entry in shard {
            weight_map.insert(entry.name.clone(), file.clone());
            total_size += entry.bytes;
        }
    }
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    write_json(&dir.join(INDEX_FILE), &index)
}

fn write_weights(
    path: &Path,
    entries: &[ShardEntry],
    dtype: DType,
    stored: Dtype,
) -> Result<(), Error> {
    let mut offset = 0;
    let infos = entries.iter().map(|entry| {
        let start = offset;
        offset += entry.bytes;
        let info = TensorInfo {
            dtype: stored,
            shape: entry.shape.clone(),
            data_offsets: (start, offset),
        };
        (entry.name.clone(), info)
    });
    let infos = infos.collect();
    // transformers refuses a file whose metadata do not name the framework.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|source| Error::Safetensors {
        path: path.to_path_buf(),
        source,
    })?;
    let mut header = serde_json::to_vec(&metadata).map_err(|source| Error::Json {
        path: path.to_path_buf(),
        what: "safetensors header",
        source,
    })?;
    header.resize(header.len().next_multiple_of(8), b' ');
    write_whole(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| file.write_all(&header))
            .map_err(Error::io("write", path))?;
        for entry in entries {
            let bytes = entry.values(dtype)?;
            file.write_all(bytes.as_bytes())
                .map_err(Error::io("write", path))?;
        }
        Ok(())
    })
}

impl ShardEntry {
    fn values(&self, dtype: DType) -> Result<TensorData, Error> {
        let read = match &self.parameter {
            Parameter::Matrix(tensor) => tensor.clone().without_autodiff().try_into_data(),
            Parameter::Vector(tensor) => tensor.clone().without_autodiff().try_into_data(),
        };
        let read_error = |why: String| Error::Device {
            what: "a parameter",
            why: format!("`{}`: {why}", self.name),
        };
        read.map_err(|error| read_error(error.to_string()))?
            .try_cast(dtype)
            .map_err(|error| read_error(error.to_string()))
    }
}
