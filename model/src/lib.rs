//! Causal language models that run in burn: checkpoints in Hugging Face layout, KV cache, sampling.
//!
//! | file | contents |
//! |---|---|
//! | `config`, `keys` | [`Config`]: reads and writes `config.json` |
//! | `families`, `plan`, `rotary_table` | the model families: from `config.json` to the plan of a decoder |
//! | `decoder`, `layers` | [`Decoder`]: [`Decoder::hidden`] and [`Decoder::logits`] are differentiable in the weights |
//! | `attend` | what rows see: their documents, or the KV cache |
//! | `rotary` | angles of the rotary positions |
//! | `init` | [`Decoder::init`]: random weights |
//! | `parameters`, `named_parameters` | [`named_parameters`] and [`map_parameters`]: read and replace parameters by name and role |
//! | `adapter` | [`with_adapter`], [`merged`], [`load_adapter`] and [`save_adapter`]: low-rank adapters, in PEFT's layout |
//! | `checkpoint` | [`load`] and [`save`] |
//! | `weights`, `safetensors_files`, `number` | stored weights, and their conversion to the model's type |
//! | `gguf` | [`lay_out_gguf`] and [`export_gguf`]: files of llama.cpp |
//! | `prune` | [`prune_layers`]: a model with some of the layers of another |
//! | `generate` | [`generate()`]: answers many prompts at a time |
//! | `generate/schedule` | which rows a step computes |
//! | `generate/pages`, `generate/cache` | pages of the KV cache, and the forward pass over them |
//! | `generate/sampling`, `generate/draw` | sampling settings, and the choice of a token from logits |
//! | `files` | maps files into memory, and writes files as a whole |
//! | `device`, `dtype` | devices by name, and the float types of models |
//! | `error` | [`Error`]: all errors of the crate |
//!
//! Tensors carry their dimensions as a suffix: b batch, t position, n = b·t rows, m rows whose next token is drawn, v
//! vocabulary, d model width, w width inside the feed-forward block, h query heads, g key and value heads, e width of
//! a head, c columns of all heads, s slots of the KV cache.
//!
//! Models compute in F64, F32, F16 or BF16, the type that the caller chooses. The one exception, as in transformers, is
//! that norms and softmax of the half precisions are computed in F32.

mod activations;
mod adapter;
mod attend;
mod checkpoint;
mod config;
mod decoder;
mod device;
mod dtype;
mod error;
mod families;
mod files;
mod generate;
mod gguf;
mod init;
mod keys;
mod layers;
mod layerwise;
pub mod limits;
mod named_parameters;
mod number;
mod parameters;
mod plan;
mod prune;
mod rotary;
mod rotary_table;
mod safetensors_files;
mod tensor_files;
mod weights;

pub use adapter::{
    ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterLayers, AdapterPlan, adapted_layers,
    load_adapter, merged, quantized, save_adapter, with_adapter,
};
pub use burn::module::Module;
pub use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use activations::{ActivationColumns, AttentionColumns};
pub use checkpoint::{MAX_SHARD_BYTES, load, load_quantized, save, save_sharded, weight_files};
pub use config::Config;
pub use decoder::{Decoder, document_lengths};
pub use device::{DEVICES, check_device_dtype, device};
pub use error::Error;
pub use generate::{BatchLimits, GeneratedAnswer, Sampling, StopConditions, StopReason, generate};
pub use gguf::{GgufLabels, GgufType, export_gguf, lay_out_gguf};
pub use layerwise::Layerwise;
pub use named_parameters::{map_parameters, named_parameters, parameter_shapes};
pub use parameters::{MapParameters, Parameter, ParameterName, Role, TensorOperation};
pub use potstill_kernels::{BlockType, dequantize, quantize};
pub use prune::{prune_layers, prune_width};
pub use tensor_files::{StoredTensor, StoredValues, read_tensors, write_tensors};
