//! Weights in Hugging Face layout: `model.safetensors`, or shards with `model.safetensors.index.json`.
//!
//! Reading copies one tensor at a time. Writing streams one tensor at a time to a temporary file, which is synced and
//! renamed, so a folder never holds a partly written file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::BlockType;
use serde_json::json;

use crate::adapter::{can_have_adapter, merged, quantized_layer};
use crate::device::check_device_dtype;
use crate::dtype::check_model_dtype;
use crate::files::write_json;
use crate::gguf::{GGUF_FILE, GgufWeights};
use crate::layers::{FrozenBlocks, Linear, MapLayers, Weight};
use crate::named_parameters::named_parameters;
use crate::parameters::{MapParameters, Parameter, ParameterName, Role};
use crate::safetensors_files::{self, INDEX_FILE, SINGLE_FILE, SafetensorsFiles};
use crate::tensor_files::{StoredTensor, StoredValues, write_tensors};
use crate::weights::{Weights, in_stack};
use crate::{Config, Decoder, Error};

const CONFIG_FILE: &str = "config.json";

/// Largest size of a weight file in bytes: 5 GB, as in transformers 4. Larger models are saved in shards.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Loads the checkpoint in `dir` and converts its weights to `dtype`. Each stored tensor is read once, straight into
/// its place.
///
/// Multi-token-prediction layers ([`Config::prediction_layers`]) and parts for images are left out.
///
/// # Errors
/// Returns the errors of [`Config::from_dir`], and an error for absent weights, for an absent shard that the index names,
/// for a truncated file, for a tensor that is absent, has another shape, or is stored in another type than F64, F32, F16,
/// BF16 and F8_E4M3, and for a tensor that the configuration has no place for.
pub fn load(dir: &Path, dtype: DType, device: &Device) -> Result<Decoder, Error> {
    load_with(dir, dtype, device, None)
}

/// Loads as [`load`] does, and keeps the weights of the linear layers that may have adapters in blocks: those that a GGUF
/// file holds, and otherwise blocks of type `kind`, as [`quantized`](crate::quantized) makes them. Each weight is quantised
/// when it is read, so only one at a time is dense.
///
/// # Errors
/// Returns the errors of [`load`].
pub fn load_quantized(
    dir: &Path,
    dtype: DType,
    device: &Device,
    kind: BlockType,
) -> Result<Decoder, Error> {
    load_with(dir, dtype, device, Some(kind))
}

fn load_with(
    dir: &Path,
    dtype: DType,
    device: &Device,
    blocks: Option<BlockType>,
) -> Result<Decoder, Error> {
    let config = Config::from_dir(dir)?;
    check_model_dtype(dtype)?;
    check_device_dtype(device, dtype)?;
    let weights = open(dir, &config)?;
    let mut reader = ParameterReader {
        weights: weights.as_ref(),
        device,
        blocks,
        read: BTreeSet::new(),
        error: None,
    };
    let model = Decoder::unset(&config, dtype, device).map_layers(&mut reader);
    if let Some(error) = reader.error {
        return Err(error);
    }
    check_all_read(&config, weights.as_ref(), &reader.read)?;
    Ok(model)
}

/// Opens the weights of the checkpoint in `dir`.
fn open(dir: &Path, config: &Config) -> Result<Box<dyn Weights>, Error> {
    match safetensors_files::find(dir)? {
        Some((root, files)) => {
            let files = SafetensorsFiles::open(root, files, config.weight_block())?;
            Ok(Box::new(files))
        }
        None if dir.join(GGUF_FILE).exists() => {
            let weights = GgufWeights::open(&dir.join(GGUF_FILE))?;
            Ok(Box::new(weights))
        }
        None => Err(Error::NoWeights {
            dir: dir.to_path_buf(),
        }),
    }
}

/// Checks that the files hold no tensor that should be a part of the decoder but has no place in it.
fn check_all_read(
    config: &Config,
    weights: &dyn Weights,
    read: &BTreeSet<String>,
) -> Result<(), Error> {
    let layers = config.num_hidden_layers();
    let is_extra_layer = |name: &str| {
        let rest = name.strip_prefix("model.layers.");
        let index = rest.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        index.is_some_and(|index| index >= layers && index < layers + config.prediction_layers())
    };
    let has_no_place = |name: &String| {
        let is_decoder = name.starts_with("model.") || name.starts_with("lm_head.");
        let is_image_part = ["model.vision", "model.multi_modal", "model.visual"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        let is_known = name.ends_with("rotary_emb.inv_freq")
            || name.ends_with("_scale_inv")
            || (name == "lm_head.weight" && config.tie_word_embeddings)
            || is_extra_layer(name);
        is_decoder && !is_image_part && !is_known && !read.contains(name)
    };
    let spare: Vec<String> = weights.names().into_iter().filter(has_no_place).collect();
    match spare.first() {
        None => Ok(()),
        Some(first) => Err(Error::SpareTensors {
            path: weights.file(first),
            tensor: first.clone(),
            count: spare.len(),
        }),
    }
}

/// Returns the files that hold the weights of the checkpoint in `dir`: one file, or the shards in order of name.
///
/// # Errors
/// Returns an error for absent weights, for a broken index, and for an absent shard that the index names.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    match safetensors_files::find(dir)? {
        Some((_, files)) => Ok(files),
        None if dir.join(GGUF_FILE).exists() => Ok(vec![dir.join(GGUF_FILE)]),
        None => Err(Error::NoWeights {
            dir: dir.to_path_buf(),
        }),
    }
}

/// Saves `model` to `dir` as `config.json` and weights of type `dtype`, in shards of at most [`MAX_SHARD_BYTES`]. The
/// folder is created if it is absent. transformers loads it unchanged. Adapters are merged into the weights.
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
    check_model_dtype(dtype)?;
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let model = merged(model.clone());
    let shards = split(named_parameters(&model), dtype, max_shard_bytes)?;
    let outdated = match shards.as_slice() {
        [single] => {
            write_weights(&dir.join(SINGLE_FILE), single)?;
            INDEX_FILE
        }
        shards => {
            write_shards(dir, shards)?;
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

/// Replaces every parameter by its stored tensor. It stops reading at the first error and keeps the error.
struct ParameterReader<'a> {
    weights: &'a dyn Weights,
    device: &'a Device,
    /// The type of blocks in which the weights of linear layers are kept.
    blocks: Option<BlockType>,
    /// Names of the tensors that were read.
    read: BTreeSet<String>,
    error: Option<Error>,
}

impl ParameterReader<'_> {
    /// Checks that a tensor is stored in the shape that the configuration requires.
    fn check(&self, name: &str, expected: &[usize]) -> Result<(), Error> {
        match self.weights.shape(name) {
            None => Err(Error::MissingTensor {
                path: self.weights.file(name),
                tensor: name.to_owned(),
            }),
            Some(found) if found != expected => Err(Error::Shape {
                path: self.weights.file(name),
                tensor: name.to_owned(),
                found,
                expected: expected.to_vec(),
            }),
            Some(_) => Ok(()),
        }
    }

    fn accepts_shape(&mut self, name: &str, shape: &[usize]) -> bool {
        if self.error.is_none() {
            self.error = self.check(name, shape).err();
        }
        self.error.is_none()
    }

    fn data(&mut self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let stack = in_stack(name).map(|part| part.stack);
        self.read.extend(stack);
        self.read.insert(name.to_owned());
        self.weights.read(name, dtype)
    }
}

impl MapParameters for ParameterReader<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, unset: Tensor<D>) -> Tensor<D> {
        let dtype = unset.dtype();
        // The unset tensor is freed before its successor is read.
        drop(unset);
        match self.data(&parameter.name, dtype) {
            Ok(data) => Tensor::from_data(data, (self.device, dtype)),
            Err(error) => {
                self.error = Some(error);
                Tensor::zeros([1; D], (self.device, dtype))
            }
        }
    }

    fn accepts(&mut self, parameter: &ParameterName, shape: &[usize]) -> bool {
        self.accepts_shape(&parameter.name, shape)
    }
}

impl MapLayers for ParameterReader<'_> {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        let Some(kind) = self.blocks.filter(|_| can_have_adapter(name, role)) else {
            return linear.map_own_parameters(name, role, self);
        };
        let stored = format!("{name}.weight");
        let blocks = match self.accepts_shape(&stored, &linear.weight.dims()) {
            true => self.weights.blocks(&stored),
            false => Ok(None),
        };
        let linear = match blocks {
            Ok(Some(matrix)) => {
                self.read.insert(stored);
                Linear {
                    weight: Weight::Blocks(FrozenBlocks { matrix }),
                    ..linear
                }
            }
            Ok(None) => linear,
            Err(error) => {
                self.error = Some(error);
                return linear;
            }
        };
        let linear = linear.map_own_parameters(name, role, self);
        match self.error {
            None => quantized_layer(name, role, linear, kind),
            Some(_) => linear,
        }
    }
}

/// Divides the parameters, in order, into shards of at most `max_bytes`.
fn split(
    parameters: Vec<(ParameterName, Parameter)>,
    dtype: DType,
    max_bytes: u64,
) -> Result<Vec<Vec<StoredTensor>>, Error> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0u64;
    for (ParameterName { name, role }, parameter) in parameters {
        let dtype = match (role, dtype) {
            (Role::Correction, DType::F16 | DType::BF16) => DType::F32,
            _ => dtype,
        };
        let entry = StoredTensor::cast(name, StoredValues::Float(parameter), dtype)?;
        let bytes = entry.bytes() as u64;
        if filled > 0 && filled + bytes > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(entry);
        }
    }
    Ok(shards)
}

fn write_shards(dir: &Path, shards: &[Vec<StoredTensor>]) -> Result<(), Error> {
    let mut weight_map = BTreeMap::new();
    let mut total_size = 0;
    for (number, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
        write_weights(&dir.join(&file), shard)?;
        for entry in shard {
            weight_map.insert(entry.name.clone(), file.clone());
            total_size += entry.bytes();
        }
    }
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    write_json(&dir.join(INDEX_FILE), &index)
}

/// Writes a safetensors file of a model's weights.
pub(crate) fn write_weights(path: &Path, tensors: &[StoredTensor]) -> Result<(), Error> {
    // transformers refuses a file whose metadata do not name the framework.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_tensors(path, tensors, Some(format))
}
