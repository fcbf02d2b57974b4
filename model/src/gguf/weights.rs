//! The weights of a GGUF file under Hugging Face names and in Hugging Face layout.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};

use super::architecture::{Architecture, interleaved_target};
use super::codec::dequantize_into;
use super::config::{architecture, head_width};
use super::file::GgufFile;
use crate::Error;

/// Tensors that are not weights of the model: divisors of the rotary frequencies, which `config.json` describes.
const ROTARY: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
];

/// The weights of a GGUF file: dequantised, and with rows and norms as in Hugging Face files.
pub struct GgufWeights {
    file: GgufFile,
    architecture: &'static Architecture,
    head_width: usize,
    places: BTreeMap<String, Place>,
}

/// Where a tensor with a Hugging Face name is.
struct Place {
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
    pub fn open(path: &Path) -> Result<Self, Error> {
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
                let place = Place {
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

    /// The Hugging Face names of all tensors.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    /// The shape of a tensor.
    #[must_use]
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.places.get(name).map(|place| place.shape.clone())
    }

    /// The file that holds a tensor.
    #[must_use]
    pub fn file(&self, _name: &str) -> &Path {
        self.file.path()
    }

    /// Reads a tensor and converts it to `dtype`.
    ///
    /// # Errors
    /// Returns an error for an absent tensor and for a type that models do not run in.
    pub fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let Some(place) = self.places.get(name) else {
            return Err(Error::MissingTensor {
                path: self.file.path().to_path_buf(),
                tensor: name.to_owned(),
            });
        };
        let shape = place.shape.clone();
        Ok(match dtype {
            DType::F32 => TensorData::new(self.numbers(place, |number| number), shape),
            DType::F64 => TensorData::new(self.numbers(place, f64::from), shape),
            DType::F16 => TensorData::new(self.numbers(place, f16::from_f32), shape),
            DType::BF16 => TensorData::new(self.numbers(place, bf16::from_f32), shape),
            _ => return Err(Error::FloatType { dtype }),
        })
    }

    fn numbers<T: Send + Copy + Default>(
        &self,
        place: &Place,
        convert: impl Fn(f32) -> T + Sync,
    ) -> Vec<T> {
        let Some(tensor) = self.file.tensor(&place.name) else {
            return Vec::new();
        };
        let count: usize = place.shape.iter().product();
        let size = tensor.kind.bytes(count);
        let bytes = &self.file.tensor_bytes(tensor)[place.expert * size..(place.expert + 1) * size];
        let offset = self.architecture.offset(&place.name);
        let mut out = vec![T::default(); count];
        let convert = |number: f32| convert(number - offset);
        if is_interleaved(self.architecture, &place.name) {
            let columns = count / place.shape[0];
            let size = tensor.kind.bytes(columns);
            match columns {
                // The numbers of a bias are its rows.
                1 => {
                    let mut stored = vec![T::default(); count];
                    dequantize_into(tensor.kind, bytes, &mut stored, convert);
                    for (row, out) in out.iter_mut().enumerate() {
                        *out = stored[interleaved_target(row, self.head_width)];
                    }
                }
                _ => {
                    for (row, out) in out.chunks_exact_mut(columns).enumerate() {
                        let source = interleaved_target(row, self.head_width) * size;
                        dequantize_into(tensor.kind, &bytes[source..source + size], out, &convert);
                    }
                }
            }
        } else {
            dequantize_into(tensor.kind, bytes, &mut out, convert);
        }
        out
    }
}

/// Whether a tensor's rows are interleaved: weights and biases of q and k.
fn is_interleaved(architecture: &Architecture, gguf_name: &str) -> bool {
    let part = gguf_name.rsplit('.').nth(1);
    architecture.is_interleaved && matches!(part, Some("attn_q" | "attn_k"))
}
