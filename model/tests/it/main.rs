//! Tests of the public API: checkpoints, gradients, generation, and agreement with transformers.

// The lints' exceptions for tests cover test functions only, not the functions that they call.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod adapters;
mod bad_input;
mod checkpoints;
mod families;
mod generation;
mod gradients;
mod packing;
mod reference;
mod width;

use std::path::PathBuf;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_model::{
    Config, Decoder, MapParameters, Parameter, ParameterName, map_parameters, named_parameters,
};
use serde_json::json;

/// Makes a model of a few thousand parameters: 4 layers, grouped heads, a vocabulary of 23.
fn small(tied: bool, dtype: DType) -> Decoder {
    let config = Config::from_json(&json!({
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": tied,
    "bos_token_id": 1,
    "eos_token_id": [2]
    }))
    .unwrap();
    Decoder::init(&config, 7, dtype, &Device::flex()).unwrap()
}

/// Multiplies all matrices by a factor.
struct Grow(f64);

impl MapParameters for Grow {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if D == 2 { tensor * self.0 } else { tensor }
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
        .map(|(ParameterName { name, .. }, parameter)| {
            let shape = parameter.shape();
            let data = parameter.try_into_data().unwrap();
            (name, shape, data.iter::<f64>().collect())
        })
        .collect()
}

/// Returns the gradient of a parameter of a tracked model.
fn gradient_of(parameter: &Parameter, gradients: &burn::tensor::Gradients) -> Vec<f64> {
    match parameter {
        Parameter::Matrix(tensor) => host(tensor.grad(gradients).unwrap()),
        Parameter::Vector(tensor) => host(tensor.grad(gradients).unwrap()),
        Parameter::Stack(tensor) => host(tensor.grad(gradients).unwrap()),
    }
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
