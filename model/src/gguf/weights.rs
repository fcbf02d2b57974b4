//! The weights of a GGUF file under Hugging Face names and in Hugging Face layout.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};

use super::architecture::{Architecture, interleaved_target};
use super::config::{architecture, head_width};
use super::file::GgufFile;
use crate::Error;
use crate::weights::Weights;
use potstill_kernels::{BlockMatrix, dequantize_into};

/// Numbers that are read at a time: whole blocks of every type.
const CHUNK: usize = 1 << 22;

/// Tensors that are not weights of the model: divisors of the rotary frequencies, which `config.json` describes.
const ROTARY: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// The weights of a GGUF file: dequantised, and with rows and norms as in Hugging Face files.
pub(crate) struct GgufWeights {
    file: GgufFile,
    architecture: &'static Architecture,
    head_width: usize,
    places: BTreeMap<String, WeightPlace>,
}

/// The place of a tensor with a Hugging Face name.
struct WeightPlace {
    /// Name of the tensor in the file.
    name: String,
    shape: Vec<usize>,
    /// Number of the matrix within stacked experts.
    expert: usize,
}

impl GgufWeights {
    /// Opens a file.
    ///
    /// # Errors
    /// Returns the errors of [`GgufFile::open`], and an error for an architecture or a tensor that is not known.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = GgufFile::open(path)?;
        let architecture = architecture(&file)?;
        let head_width = head_width(&file, architecture)?;
        let mut places = BTreeMap::new();
        for name in file.tensor_names() {
            if ROTARY.contains(&name.as_str()) {
                continue;
            }
            let known = architecture.hugging_face_name(name);
            let (Some(own), Some(tensor)) = (known, file.tensor(name)) else {
                let what = format!(
                    "it has a tensor `{name}`, which models of the architecture {} do not have here",
                    architecture.name
                );
                return Err(file.broken(what));
            };
            let (experts, shape) = match (own.contains('*'), tensor.shape.as_slice()) {
                (true, [experts, rows, columns]) => (*experts, vec![*rows, *columns]),
                (false, shape) if shape.len() <= 2 => (1, shape.to_vec()),
                (_, shape) => {
                    let what = format!("the tensor `{name}` has the shape {shape:?}");
                    return Err(file.broken(what));
                }
            };
            let is_interleaved = is_interleaved(architecture, name);
            if is_interleaved && !shape[0].is_multiple_of(head_width) {
                let what = format!(
                    "the tensor `{name}` has {} rows, which are not whole heads of {head_width}",
                    shape[0]
                );
                return Err(file.broken(what));
            }
            for expert in 0..experts {
                let place = WeightPlace {
                    name: name.clone(),
                    shape: shape.clone(),
                    expert,
                };
                places.insert(own.replace('*', &expert.to_string()), place);
            }
        }
        Ok(Self {
            file,
            architecture,
            head_width,
            places,
        })
    }

    /// Reads the numbers of a tensor and converts each. Stored bytes are read in chunks.
    fn numbers<T: Send + Copy + Default>(
        &self,
        place: &WeightPlace,
        convert: impl Fn(f32) -> T + Sync,
    ) -> Result<Vec<T>, Error> {
        let Some(tensor) = self.file.tensor(&place.name) else {
            return Ok(Vec::new());
        };
        let count: usize = place.shape.iter().product();
        let offset = self.architecture.offset(&place.name);
        let convert = |number: f32| convert(number - offset);
        let mut out = vec![T::default(); count];
        let mut at = place.expert * tensor.kind.bytes(count);
        let mut bytes = Vec::new();
        for out in out.chunks_mut(CHUNK) {
            bytes.resize(tensor.kind.bytes(out.len()), 0);
            self.file.read_tensor(tensor, at, &mut bytes)?;
            at += bytes.len();
            dequantize_into(tensor.kind, &bytes, out, convert);
        }
        if is_interleaved(self.architecture, &place.name) {
            restore_rows(&mut out, place.shape[0], self.head_width);
        }
        Ok(out)
    }
}

impl Weights for GgufWeights {
    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.places.get(name).map(|place| place.shape.clone())
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let Some(place) = self.places.get(name) else {
            return Err(Error::MissingTensor {
                path: self.file.path().to_path_buf(),
                tensor: name.to_owned(),
            });
        };
        let shape = place.shape.clone();
        Ok(match dtype {
            DType::F32 => TensorData::new(self.numbers(place, |number| number)?, shape),
            DType::F64 => TensorData::new(self.numbers(place, f64::from)?, shape),
            DType::F16 => TensorData::new(self.numbers(place, f16::from_f32)?, shape),
            DType::BF16 => TensorData::new(self.numbers(place, bf16::from_f32)?, shape),
            _ => return Err(Error::FloatType { dtype }),
        })
    }

    fn blocks(&self, name: &str) -> Result<Option<BlockMatrix>, Error> {
        let Some((place, tensor)) = self.places.get(name).and_then(|place| {
            let tensor = self.file.tensor(&place.name)?;
            Some((place, tensor))
        }) else {
            return Ok(None);
        };
        let &[rows, columns] = place.shape.as_slice() else {
            return Ok(None);
        };
        if !tensor.kind.is_quantized() || self.architecture.offset(&place.name) != 0.0 {
            return Ok(None);
        }
        let mut bytes = vec![0; tensor.kind.bytes(rows * columns)];
        let at = place.expert * bytes.len();
        self.file.read_tensor(tensor, at, &mut bytes)?;
        if is_interleaved(self.architecture, &place.name) {
            restore_rows(&mut bytes, rows, self.head_width);
        }
        Ok(BlockMatrix::new(tensor.kind, [rows, columns], bytes))
    }

    fn file(&self, _: &str) -> PathBuf {
        self.file.path().to_path_buf()
    }
}

/// Brings the rows of each head back into the order of Hugging Face files, one head at a time.
fn restore_rows<T: Copy>(values: &mut [T], rows: usize, width: usize) {
    let columns = values.len() / rows;
    for head in values.chunks_exact_mut(width * columns) {
        let stored = head.to_vec();
        for (row, out) in head.chunks_exact_mut(columns).enumerate() {
            let source = interleaved_target(row, width) * columns;
            out.copy_from_slice(&stored[source..source + columns]);
        }
    }
}

/// Whether a tensor's rows are interleaved: weights and biases of q and k.
fn is_interleaved(architecture: &Architecture, gguf_name: &str) -> bool {
    let part = gguf_name.rsplit('.').nth(1);
    architecture.is_interleaved && matches!(part, Some("attn_q" | "attn_k"))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::safetensors_files::{SafetensorsFiles, find};

    /// Compares each tensor of a real file with that of the folder that was made from it, rounded to BF16. The folder's
    /// embedding is the finer of embedding and head where the file has both.
    fn check(name: &str) {
        let Some(root) = std::env::var_os("POTSTILL_REAL").map(PathBuf::from) else {
            eprintln!("skipped: POTSTILL_REAL is not set");
            return;
        };
        let file = root.join(format!("models/gguf/{name}.gguf"));
        let folder = root.join("models").join(name);
        if !file.exists() || !folder.exists() {
            eprintln!("skipped: POTSTILL_REAL has no {name}");
            return;
        }
        let weights = GgufWeights::open(&file).unwrap();
        let (index, files) = find(&folder).unwrap().unwrap();
        let expected = SafetensorsFiles::open(index, files, [128, 128]).unwrap();
        let is_tied = weights.shape("lm_head.weight").is_none();
        assert!(weights.names().len() >= expected.names().len());
        for name in expected.names() {
            let own = match name == "model.embed_tokens.weight" && !is_tied {
                true => "lm_head.weight",
                false => &name,
            };
            assert_eq!(weights.shape(own), expected.shape(&name), "{name}");
            let found = weights.read(own, DType::BF16).unwrap();
            let expected = expected.read(&name, DType::BF16).unwrap();
            assert!(found.as_bytes() == expected.as_bytes(), "{name}");
        }
    }

    #[test]
    fn weights_of_gemma_3_are_those_of_the_folder() {
        check("gemma-3-270m");
    }

    #[test]
    fn weights_of_qwen_2_are_those_of_the_folder() {
        check("Qwen2.5-Coder-0.5B-Instruct");
    }

    #[test]
    fn weights_of_llama_are_those_of_the_folder() {
        check("SmolLM2-135M-Instruct");
    }

    #[test]
    fn rows_are_restored_in_matrices_and_biases() {
        let width = 4;
        let mut matrix: Vec<u32> = (0..2 * 8).collect();
        restore_rows(&mut matrix, 8, width);
        let rows: Vec<u32> = matrix.chunks(2).map(|row| row[0] / 2).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
        let mut bias: Vec<u32> = (0..8).collect();
        restore_rows(&mut bias, 8, width);
        assert_eq!(bias, rows);
    }
}
