//! Tests of the public API: checkpoints, gradients, generation, and agreement with transformers.

// The lints' exceptions for tests cover test functions only, not the functions that they call.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod checkpoints;
mod generation;
mod gradients;
mod packing;
mod reference;

use std::path::PathBuf;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_model::{Config, Decoder, MapParameters, Parameter, map_parameters, named_parameters};

/// Makes a model of a few thousand parameters: 4 layers, grouped heads, a vocabulary of 23.
fn small(tied: bool, dtype: DType) -> Decoder {
    let config = Config {
        vocab_size: 23,
        hidden_size: 12,
        intermediate_size: 20,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        max_position_embeddings: 64,
        tie_word_embeddings: tied,
        bos_token_id: Some(1),
        eos_token_id: vec![2],
    };
    Decoder::init(&config, 7, dtype, &Device::flex()).unwrap()
}

/// Multiplies all matrices by a factor.
struct Grow(f64);

impl MapParameters for Grow {
    fn matrix(&mut self, _: &str, tensor: Tensor<2>) -> Tensor<2> {
        tensor * self.0
    }

    fn vector(&mut self, _: &str, tensor: Tensor<1>) -> Tensor<1> {
        tensor
    }
}

/// Makes a small model with weights so large that its distributions are not flat.
fn lively(dtype: DType) -> Decoder {
    map_parameters(small(false, dtype), &mut Grow(20.0))
}

/// Returns name, shape and values of every parameter, in f64.
fn values(model: &Decoder) -> Vec<(String, Vec<usize>, Vec<f64>)> {
    named_parameters(model)
        .into_iter()
        .map(|(name, parameter)| match parameter {
            Parameter::Matrix(tensor) => (name, tensor.dims().to_vec(), host(tensor)),
            Parameter::Vector(tensor) => (name, tensor.dims().to_vec(), host(tensor)),
        })
        .collect()
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.without_autodiff().try_into_vec_as::<f64>().unwrap()
}

fn ids(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let columns = rows[0].len();
    let flat: Vec<i32> = rows
        .iter()
        .flat_map(|row| row.iter().map(|id| *id as i32))
        .collect();
    Tensor::from_data(TensorData::new(flat, [rows.len(), columns]), device)
}

/// Returns a path in the folder of real models, or `None` after printing why the test is skipped.
fn real(part: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return None;
    };
    let path = PathBuf::from(root).join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: POTSTILL_REAL has no {part}");
    None
}
