//! Weights in Hugging Face layout: `model.safetensors`, or shards with `model.safetensors.index.json`.
//!
//! Reading maps the files into memory and copies one tensor at a time. Writing streams one tensor at a
//! time into a temporary file, which is synced and renamed, so a folder never holds half a file.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::Deserialize;
use serde_json::json;

use crate::parameters::{MapParameters, Parameter, map_parameters, named_parameters};
use crate::{Config, Error, Llama};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";

/// Weights beyond this many bytes are saved in shards, as transformers 4 does: 5 GB.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Loads the checkpoint in `dir` and converts its weights to `dtype`.
///
/// # Errors
/// What [`Config::from_dir`] refuses; absent weights; a shard that the index names and that is absent;
/// a truncated file; a tensor that is absent, of another shape, or stored in a type that is no float.
pub fn load(dir: &Path, dtype: DType, device: &Device) -> Result<Llama, Error> {
    let config = Config::from_dir(dir)?;
    stored_type(dtype)?;
    let listing = list(dir)?;
    let mapped = listing
        .files
        .iter()
        .map(|path| map_file(path))
        .collect::<Result<Vec<_>, _>>()?;
    let mut reader = Reader {
        listing: &listing,
        files: Vec::with_capacity(mapped.len()),
        dtype,
        device,
        error: None,
    };
    for (path, bytes) in listing.files.iter().zip(&mapped) {
        let tensors = SafeTensors::deserialize(bytes).map_err(|source| Error::Safetensors {
            path: path.clone(),
            source,
        })?;
        reader.files.push((path, tensors));
    }
    let model = map_parameters(Llama::unset(&config, dtype, device), &mut reader);
    match reader.error {
        None => Ok(model),
        Some(error) => Err(error),
    }
}

/// The files that hold the weights of the checkpoint in `dir`: one, or the shards in order of name.
///
/// # Errors
/// Absent weights, a broken index, and a shard that the index names and that is absent.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    Ok(list(dir)?.files)
}

/// Saves `model` into `dir` as `config.json` and weights of type `dtype`, sharded beyond
/// [`MAX_SHARD_BYTES`]. The folder is created where it is absent; transformers loads it as it is.
///
/// # Errors
/// A type that models are not stored in, and what the file system refuses.
pub fn save(model: &Llama, dir: &Path, dtype: DType) -> Result<(), Error> {
    save_sharded(model, dir, dtype, MAX_SHARD_BYTES)
}

/// As [`save`], with shards of at most `max_shard_bytes`; a tensor that is larger has its own shard.
///
/// # Errors
/// As [`save`].
pub fn save_sharded(
    model: &Llama,
    dir: &Path,
    dtype: DType,
    max_shard_bytes: u64,
) -> Result<(), Error> {
    let stored = stored_type(dtype)?;
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let shards = split(named_parameters(model), stored, max_shard_bytes);
    let other = match shards.as_slice() {
        [single] => {
            write_weights(&dir.join(SINGLE), single, dtype, stored)?;
            INDEX
        }
        shards => {
            write_shards(dir, shards, dtype, stored)?;
            SINGLE
        }
    };
    // A reader would prefer what an earlier save in the other form left here.
    let other = dir.join(other);
    match std::fs::remove_file(&other) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &other)(error));
        }
        _ => {}
    }
    write_json(&dir.join(CONFIG), &model.config().to_json(dtype))
}

/// The files of a checkpoint, and for shards which tensor the index says is in which.
struct Listing {
    /// What to name when a tensor is absent: the one file, or the index.
    root: PathBuf,
    files: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn list(dir: &Path) -> Result<Listing, Error> {
    let single = dir.join(SINGLE);
    if single.exists() {
        return Ok(Listing {
            files: vec![single.clone()],
            root: single,
        });
    }
    let root = dir.join(INDEX);
    if !root.exists() {
        return Err(Error::NoWeights {
            dir: dir.to_path_buf(),
        });
    }
    let text = std::fs::read_to_string(&root).map_err(Error::io("read", &root))?;
    let index: Index = serde_json::from_str(&text).map_err(|source| Error::Json {
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
    Ok(Listing {
        root,
        files: shards.into_keys().collect(),
    })
}

#[allow(unsafe_code)]
fn map_file(path: &Path) -> Result<Mmap, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is read only and lives for one `load`. Should another process change the file
    // meanwhile, the values read are undefined but every access stays within the checked offsets of the
    // map; a file that is cut short meanwhile stops the process with SIGBUS, as with any mmap reader.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// Gives every parameter its tensor from the files; stops reading at the first error and keeps it.
struct Reader<'a> {
    listing: &'a Listing,
    files: Vec<(&'a PathBuf, SafeTensors<'a>)>,
    dtype: DType,
    device: &'a Device,
    error: Option<Error>,
}

impl Reader<'_> {
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
                path: self.listing.root.clone(),
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
        let dtype = match view.dtype() {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(Error::StoredType {
                    path: path.to_path_buf(),
                    tensor: name.to_owned(),
                    dtype: format!("{other:?}"),
                });
            }
        };
        TensorData::try_from_bytes_vec(view.data().to_vec(), expected.to_vec(), dtype)
            .and_then(|data| data.try_cast(self.dtype))
            .map_err(|error| Error::Device {
                what: "a stored tensor",
                why: error.to_string(),
            })
    }
}

impl MapParameters for Reader<'_> {
    fn matrix(&mut self, name: &str, unset: Tensor<2>) -> Tensor<2> {
        self.read(name, unset)
    }

    fn vector(&mut self, name: &str, unset: Tensor<1>) -> Tensor<1> {
        self.read(name, unset)
    }
}

/// The safetensors name of a type that models run in.
pub(crate) fn stored_type(dtype: DType) -> Result<Dtype, Error> {
    match dtype {
        DType::F64 => Ok(Dtype::F64),
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        dtype => Err(Error::FloatType { dtype }),
    }
}

/// A parameter on its way into a file.
struct Entry {
    name: String,
    parameter: Parameter,
    shape: Vec<usize>,
    bytes: usize,
}

/// Parameters in their order, in groups of at most `max_bytes`.
fn split(parameters: Vec<(String, Parameter)>, stored: Dtype, max_bytes: u64) -> Vec<Vec<Entry>> {
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
            shard.push(Entry {
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
    shards: &[Vec<Entry>],
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
    write_json(&dir.join(INDEX), &index)
}

fn write_weights(path: &Path, entries: &[Entry], dtype: DType, stored: Dtype) -> Result<(), Error> {
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
    // transformers refuses a file without the framework's name.
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

impl Entry {
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

fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), Error> {
    write_whole(path, |file| {
        writeln!(file, "{value:#}").map_err(Error::io("write", path))
    })
}

/// Writes beside `path`, syncs, and renames: a reader sees the old file or the whole new one.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file
        .into_inner()
        .map_err(|error| Error::io("write", path)(error.into_error()))?;
    file.sync_all().map_err(Error::io("sync", &temporary))?;
    std::fs::rename(&temporary, path).map_err(Error::io("rename to", path))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync", dir))
}
