//! Causal language models that run in burn: checkpoints in Hugging Face layout, KV cache, sampling.
//!
//! - [`Config`] reads and writes `config.json`; [`load`] and [`save`] read and write weights.
//! - [`Llama`] is the model: [`Llama::hidden`] and [`Llama::logits`] are differentiable in the weights.
//! - [`named_parameters`] and [`map_parameters`] give and replace parameters by Hugging Face names.
//! - [`device`] finds what computes by name.
//! - [`generate`] answers prompts, many at a time; [`cut`] makes a shallower model.
//!
//! Tensors carry their dimensions as a suffix: b batch, t position, n = b·t rows, v vocabulary, d model
//! width, h query heads, g key and value heads, e width of a head.
//!
//! Models compute in F64, F32, F16 or BF16, and nothing is promoted behind the caller's back: norms
//! and softmax of the half precisions are taken in F32, as transformers does.

mod attention;
mod checkpoint;
mod config;
mod cut;
mod device;
mod error;
mod generate;
mod llama;
mod parameters;

pub use burn::module::Module;
pub use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use checkpoint::{MAX_SHARD_BYTES, load, save, save_sharded, weight_files};
pub use config::Config;
pub use cut::cut;
pub use device::{DEVICES, device};
pub use error::Error;
pub use generate::{End, Generated, Limits, Sampling, Stop, generate};
pub use llama::{Llama, documents};
pub use parameters::{MapParameters, Parameter, map_parameters, named_parameters};
