//! Weights in safetensors: one file, or shards with an index.
//!
//! Files are read at offsets and not mapped: a mapped file would count a second time in the memory of the process, and a
//! file that shrinks would end it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use crate::Error;
use crate::dtype::from_safetensors;
use crate::files::{open_regular, read_text};
use crate::limits::SAFETENSORS_HEADER_BYTES;
use crate::number::read_values;
use crate::weights::{InStack, Weights, in_stack, inside};

pub(crate) const SINGLE_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Prefixes of the text decoder's names in checkpoints of models that also take images.
const TEXT_PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// Open weight files.
pub(crate) struct SafetensorsFiles {
    /// The single file, or the index; errors about an absent tensor name it.
    root: PathBuf,
    files: Vec<OpenFile>,
    /// File and stored name of each tensor.
    tensors: BTreeMap<String, (usize, String)>,
    /// Rows and columns of a block of 8-bit numbers that share a scale.
    block: [usize; 2],
}

/// An open file whose header was read.
pub(crate) struct OpenFile {
    path: PathBuf,
    file: File,
    /// Offset of the data behind the header.
    start: u64,
    metadata: Metadata,
}

/// The contents of the index that loading uses.
#[derive(Deserialize)]
struct ShardIndex {
    /// The shard of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// Returns the weight files of the checkpoint in `dir`, the single file or the shards in order of name, and the file that
/// names them; `None` if there are none.
pub(crate) fn find(dir: &Path) -> Result<Option<(PathBuf, Vec<PathBuf>)>, Error> {
    let single = dir.join(SINGLE_FILE);
    if single.exists() {
        return Ok(Some((single.clone(), vec![single])));
    }
    let root = dir.join(INDEX_FILE);
    if !root.exists() {
        return Ok(None);
    }
    let text = read_text(&root)?;
    let index: ShardIndex = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: root.clone(),
        what: "safetensors index",
        source,
    })?;
    let mut shards = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        shards.entry(inside(dir, &root, &shard)?).or_insert(tensor);
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
    Ok(Some((root, shards.into_keys().collect())))
}

impl SafetensorsFiles {
    /// Opens weight files and reads their headers. `block` is the size of the blocks of 8-bit numbers.
    pub(crate) fn open(
        root: PathBuf,
        files: Vec<PathBuf>,
        block: [usize; 2],
    ) -> Result<Self, Error> {
        let files = files.into_iter().map(OpenFile::open);
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let mut tensors = BTreeMap::new();
        for (file, open) in files.iter().enumerate() {
            for stored in open.metadata.offset_keys() {
                let text = (TEXT_PREFIXES.iter()).find_map(|(prefix, plain)| {
                    Some(format!("{plain}{}", stored.strip_prefix(prefix)?))
                });
                tensors.insert(text.unwrap_or_else(|| stored.clone()), (file, stored));
            }
        }
        Ok(Self {
            root,
            files,
            tensors,
            block,
        })
    }

    fn find(&self, name: &str) -> Option<(&OpenFile, &TensorInfo)> {
        let (file, stored) = self.tensors.get(name)?;
        let file = self.files.get(*file)?;
        Some((file, file.metadata.info(stored)?))
    }

    /// Finds a tensor that is stored by itself, or as a part of stacked experts.
    fn locate(&self, name: &str) -> Option<Located<'_>> {
        if let Some((file, info)) = self.find(name) {
            return Some(Located {
                file,
                info,
                shape: info.shape.clone(),
                first: 0,
            });
        }
        let InStack {
            stack,
            expert,
            part,
            parts,
        } = in_stack(name)?;
        let (file, info) = self.find(&stack)?;
        let &[experts, rows, columns] = info.shape.as_slice() else {
            return None;
        };
        let rows_of_part = rows / parts;
        (expert < experts).then(|| Located {
            file,
            info,
            shape: vec![rows_of_part, columns],
            first: (expert * rows + part * rows_of_part) * columns,
        })
    }

    /// Reads the scales of a tensor of 8-bit numbers, one for each block.
    fn scales(&self, name: &str, shape: &[usize]) -> Result<Scales, Error> {
        let scale_name = name.replace(".weight", ".weight_scale_inv");
        let missing = || Error::MissingTensor {
            path: self.file(name),
            tensor: scale_name.clone(),
        };
        let located = self.locate(&scale_name).ok_or_else(missing)?;
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<usize>() / columns.max(1);
        let expected = vec![
            rows.div_ceil(self.block[0]),
            columns.div_ceil(self.block[1]),
        ];
        if located.shape != expected {
            return Err(Error::Shape {
                path: located.file.path.clone(),
                tensor: scale_name,
                found: located.shape,
                expected,
            });
        }
        let data = self.read(&scale_name, DType::F32)?;
        Ok(Scales {
            values: data.iter::<f32>().collect(),
            block: self.block,
            columns,
        })
    }
}

/// A stored tensor, or a part of one.
struct Located<'a> {
    file: &'a OpenFile,
    info: &'a TensorInfo,
    shape: Vec<usize>,
    /// Index of the first value within the stored tensor.
    first: usize,
}

/// Scales of blocks of 8-bit numbers.
struct Scales {
    values: Vec<f32>,
    block: [usize; 2],
    columns: usize,
}

impl Scales {
    fn at(&self, index: usize) -> f32 {
        let (row, column) = (index / self.columns, index % self.columns);
        let blocks = self.columns.div_ceil(self.block[1]);
        self.values[row / self.block[0] * blocks + column / self.block[1]]
    }
}

impl Weights for SafetensorsFiles {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.locate(name).map(|located| located.shape)
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let Some(Located {
            file,
            info,
            shape,
            first,
        }) = self.locate(name)
        else {
            return Err(Error::MissingTensor {
                path: self.file(name),
                tensor: name.to_owned(),
            });
        };
        let scales = match info.dtype {
            Dtype::F8_E4M3 => Some(self.scales(name, &shape)?),
            _ => None,
        };
        let start = file.start + info.data_offsets.0 as u64;
        let start = start + (first * info.dtype.bitsize() / 8) as u64;
        let read = |bytes: &mut [u8], at: u64| file.file.read_exact_at(bytes, start + at);
        let scale = scales
            .as_ref()
            .map(|scales| |index: usize| scales.at(index));
        let scale = scale
            .as_ref()
            .map(|scale| scale as &(dyn Fn(usize) -> f32 + Sync));
        let values = read_values(&read, &shape, info.dtype, dtype, scale);
        let values = values.ok_or_else(|| Error::StoredType {
            path: file.path.clone(),
            tensor: name.to_owned(),
            dtype: format!("{:?}", info.dtype),
        })?;
        values.map_err(Error::io("read", &file.path))
    }

    fn file(&self, name: &str) -> PathBuf {
        match self.locate(name) {
            Some(located) => located.file.path.clone(),
            None => self.root.clone(),
        }
    }
}

impl OpenFile {
    /// Names of the tensors, in the order of their bytes.
    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Reads a tensor in its stored type.
    pub(crate) fn read(&self, name: &str) -> Result<TensorData, Error> {
        let Some(info) = self.metadata.info(name) else {
            return Err(Error::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            });
        };
        let dtype = match info.dtype {
            Dtype::U8 => Some(DType::U8),
            stored => from_safetensors(stored),
        };
        let dtype = dtype.ok_or_else(|| Error::StoredType {
            path: self.path.clone(),
            tensor: name.to_owned(),
            dtype: format!("{:?}", info.dtype),
        })?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        (self.file)
            .read_exact_at(&mut bytes, self.start + start as u64)
            .map_err(Error::io("read", &self.path))?;
        let shape = info.shape.clone();
        Ok(TensorData::from_bytes_vec(bytes, shape, dtype))
    }

    pub(crate) fn open(path: PathBuf) -> Result<Self, Error> {
        let (file, length) = open_regular(&path)?;
        let truncated = |source| Error::Safetensors {
            path: path.clone(),
            source,
        };
        let incomplete = || truncated(safetensors::SafeTensorError::MetadataIncompleteBuffer);
        let mut size = [0; 8];
        if length < 8 {
            return Err(truncated(safetensors::SafeTensorError::HeaderTooSmall));
        }
        file.read_exact_at(&mut size, 0)
            .map_err(Error::io("read", &path))?;
        let size = u64::from_le_bytes(size);
        if size > SAFETENSORS_HEADER_BYTES {
            return Err(truncated(safetensors::SafeTensorError::HeaderTooLarge));
        }
        if size > length - 8 {
            return Err(incomplete());
        }
        let mut header = vec![0; size as usize];
        file.read_exact_at(&mut header, 8)
            .map_err(Error::io("read", &path))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| {
            truncated(safetensors::SafeTensorError::InvalidHeaderDeserialization(
                error,
            ))
        })?;
        if metadata.data_len() as u64 != length - 8 - size {
            return Err(incomplete());
        }
        Ok(Self {
            path,
            file,
            start: 8 + size,
            metadata,
        })
    }
}
