//! Writes a folder in Hugging Face layout as a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::DType;

use super::architecture::{Architecture, interleaved_source};
use super::metadata::{ModelMetadata, model_metadata};
use super::mix::GgufType;
use super::source::ExportSource;
use super::tokens::tokenizer_metadata;
use super::write::{Metadata, TensorEntry, Value, write_gguf};
use crate::Error;
use crate::safetensors_files::{SafetensorsFiles, find};
use crate::weights::Weights;
use potstill_kernels::BlockType;
use potstill_kernels::quantize;

/// The description that an export has of itself.
#[derive(Debug, Clone, Default)]
pub struct GgufLabels {
    /// Name of the model.
    pub name: String,
    /// Licence of the model, as a SPDX identifier.
    pub licence: Option<String>,
}

/// Writes the checkpoint in `dir` as the file `path`, with its tokenizer and chat template, in one pass over the weights:
/// one tensor at a time is in memory. llama.cpp loads the file.
///
/// Types of tensors are chosen as `llama-quantize` chooses them, except for models of 8 experts or 80 layers, for which
/// `llama-quantize` has rules of its own.
///
/// # Errors
/// Returns an error for an architecture, a value of `config.json`, a tensor or a tokenizer that llama.cpp does not have,
/// for weights that cannot be read, and for a failure of the file system.
pub fn export_gguf(
    dir: &Path,
    path: &Path,
    kind: GgufType,
    labels: &GgufLabels,
) -> Result<(), Error> {
    let source = ExportSource::open(dir)?;
    let config = source.config();
    let Some(architecture) = Architecture::by_model_type(config.model_type()) else {
        return Err(source.refused(format!(
            "the architecture {:?} of config.json is not one of {}",
            config.model_type(),
            Architecture::model_types()
        )));
    };
    let model = model_metadata(&source, architecture)?;
    let (root, files) = find(dir)?.ok_or_else(|| Error::NoWeights {
        dir: dir.to_path_buf(),
    })?;
    // Weights of 8 bits, which have blocks, were refused with their key of config.json.
    let weights = SafetensorsFiles::open(root, files, [1, 1])?;
    let planned = plan(&source, architecture, &model, &weights)?;
    let mut entries = Vec::new();
    for (name, planned) in &planned {
        let kind = kind.of_tensor(
            name,
            &planned.shape,
            config.num_hidden_layers(),
            config.tie_word_embeddings,
        );
        entries.push(TensorEntry {
            name: name.clone(),
            kind,
            shape: planned.shape.clone(),
        });
    }
    for (name, divisors) in &model.divisors {
        entries.push(TensorEntry {
            name: name.clone(),
            kind: BlockType::F32,
            shape: vec![divisors.len()],
        });
    }
    let parameters: usize = planned
        .values()
        .map(|one| one.shape.iter().product::<usize>())
        .sum();
    let mut metadata = general(architecture, kind, labels, parameters);
    metadata.extend(model.keys.iter().cloned());
    metadata.extend(tokenizer_metadata(&source, config.vocab_size)?);
    write_gguf(path, &metadata, &entries, |number| {
        let entry = &entries[number];
        let values = match planned.get(&entry.name) {
            Some(planned) => planned.read(&weights)?,
            None => {
                let divisors = model.divisors.iter().find(|(name, _)| *name == entry.name);
                divisors
                    .map(|(_, divisors)| divisors.clone())
                    .unwrap_or_default()
            }
        };
        // Every type that `of_tensor` returns can be written.
        Ok(quantize(entry.kind, &values).unwrap_or_default())
    })
}

/// A tensor of the file, and what it is made of.
struct PlannedTensor {
    shape: Vec<usize>,
    /// Names of the Hugging Face tensors that are stacked.
    sources: Vec<String>,
    /// Width of the heads whose rows are interleaved.
    interleaved: Option<usize>,
    /// The numbers are (stored + offset) · factor.
    offset: f32,
    factor: f32,
}

/// Finds the place of each tensor. The order is that of the names.
fn plan(
    source: &ExportSource,
    architecture: &Architecture,
    model: &ModelMetadata,
    weights: &dyn Weights,
) -> Result<BTreeMap<String, PlannedTensor>, Error> {
    let mut experts: BTreeMap<String, BTreeMap<usize, String>> = BTreeMap::new();
    for name in weights.names() {
        let is_unused = name.ends_with("rotary_emb.inv_freq");
        if is_unused || source.config().tie_word_embeddings && name == "lm_head.weight" {
            continue;
        }
        let Some(place) = architecture
            .gguf_name(&name)
            .filter(|place| has(architecture, &place.name))
        else {
            return Err(source.refused(format!(
                "llama.cpp has no place for the tensor `{name}` in the architecture {}",
                architecture.name
            )));
        };
        let parts = experts.entry(place.name).or_default();
        parts.insert(place.expert.unwrap_or(0), name);
    }
    let mut planned = BTreeMap::new();
    for (name, parts) in experts {
        let sources: Vec<String> = parts.into_values().collect();
        let mut shape = weights.shape(&sources[0]).unwrap_or_default();
        if let Some(other) = sources
            .iter()
            .find(|source| weights.shape(source).as_ref() != Some(&shape))
        {
            let what = format!("the tensors `{}` and `{other}` differ in shape", sources[0]);
            return Err(source.refused(what));
        }
        if name.ends_with("_exps.weight") {
            shape.insert(0, sources.len());
        }
        let part = name.rsplit('.').nth(1).unwrap_or_default();
        let is_rotated = matches!(part, "attn_q" | "attn_k");
        let factor = match (part, architecture.name) {
            // Norms of q come after the projection, so the factor of q is theirs where they exist.
            ("attn_q_norm", "gemma3") | ("attn_q", "gemma2") => model.query_factor,
            _ => 1.0,
        };
        let planned_tensor = PlannedTensor {
            interleaved: (architecture.is_interleaved && is_rotated).then_some(model.head_width),
            offset: architecture.offset(&name),
            factor,
            shape,
            sources,
        };
        planned.insert(name, planned_tensor);
    }
    match planned
        .get("token_embd.weight")
        .map(|tensor| tensor.shape[0])
    {
        Some(rows) if rows == source.config().vocab_size => Ok(planned),
        Some(rows) => Err(source.refused(format!(
            "`vocab_size` in config.json is {}, but the embedding has {rows} rows",
            source.config().vocab_size
        ))),
        None => Err(source.refused("it has no tensor `model.embed_tokens.weight`".to_owned())),
    }
}

/// Whether llama.cpp reads a tensor: biases of q, k and v in all architectures, the others in `llama` only.
fn has(architecture: &Architecture, name: &str) -> bool {
    let Some(part) = name.strip_suffix(".bias") else {
        return true;
    };
    let is_projection = ["attn_q", "attn_k", "attn_v"]
        .iter()
        .any(|own| part.ends_with(own));
    is_projection || architecture.name == "llama"
}

impl PlannedTensor {
    fn read(&self, weights: &dyn Weights) -> Result<Vec<f32>, Error> {
        let mut values = Vec::new();
        for source in &self.sources {
            let data = weights.read(source, DType::F32)?;
            let read = data.try_into_vec::<f32>().map_err(|error| Error::Device {
                what: "a stored tensor",
                why: error.to_string(),
            })?;
            match values.is_empty() {
                true => values = read,
                false => values.extend(read),
            }
        }
        if self.offset != 0.0 || self.factor != 1.0 {
            for value in &mut values {
                *value = (*value + self.offset) * self.factor;
            }
        }
        if let Some(width) = self.interleaved {
            values = interleave(&values, self.shape[0], width);
        }
        Ok(values)
    }
}

/// Brings the rows of each head into llama.cpp's order.
fn interleave(values: &[f32], rows: usize, width: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let source = interleaved_source(row, width) * columns;
        out.extend_from_slice(&values[source..source + columns]);
    }
    out
}

/// The metadata about the file itself.
fn general(
    architecture: &Architecture,
    kind: GgufType,
    labels: &GgufLabels,
    parameters: usize,
) -> Metadata {
    let size = match parameters {
        0..1_000_000 => format!("{}K", parameters.div_ceil(1000)),
        1_000_000..1_000_000_000 => format!("{}M", (parameters + 500_000) / 1_000_000),
        _ => format!("{:.1}B", parameters as f64 / 1e9),
    };
    let text = |text: &str| Value::Text(text.to_owned());
    let mut out = vec![
        ("general.architecture", text(architecture.name)),
        ("general.type", text("model")),
        ("general.name", text(&labels.name)),
        ("general.size_label", text(&size)),
        ("general.file_type", Value::Count(kind.file_type())),
    ];
    if let Some(licence) = &labels.licence {
        out.push(("general.license", text(licence)));
    }
    if kind.is_quantized() {
        out.push(("general.quantization_version", Value::Count(2)));
    }
    out.into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}
