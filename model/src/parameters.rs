//! Parameters by their Hugging Face names: for optimizers, training checkpoints and saving.
//!
//! # Training
//! `let model = model.train();` tracks every parameter. After `let mut gradients = loss.backward();` the gradient of a
//! parameter is `tensor.grad_remove(&mut gradients)`, where `tensor` comes from [`named_parameters`] or from
//! [`map_parameters`]; the gradient is not tracked by autodiff. A mapper computes with `tensor.inner()` and may return a
//! plain tensor: on a tracked model the result becomes a new tracked leaf, so the mapped model is ready for the next
//! step.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::Decoder;
use crate::decoder::DecoderLayer;

/// The tensor of a parameter.
#[derive(Debug, Clone)]
pub enum Parameter {
    /// A projection or an embedding, `[out, in]` or `[v, d]`.
    Matrix(Tensor<2>),
    /// The gain of a norm, `[d]`.
    Vector(Tensor<1>),
}

/// A function that replaces parameters; see [`map_parameters`].
pub trait MapParameters {
    /// Returns the new value of the projection or embedding `name`, of the same shape and type.
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2>;
    /// Returns the new value of the norm gain `name`, of the same shape and type.
    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1>;
}

/// Returns every parameter with its Hugging Face name, in a fixed order: embedding, layers from the first, final norm,
/// and the head if it is not tied. The tensors are shared with the model, not copied.
#[must_use]
pub fn named_parameters(model: &Decoder) -> Vec<(String, Parameter)> {
    let mut list = ParameterList(Vec::new());
    let _unchanged = map_parameters(model.clone(), &mut list);
    list.0
}

struct ParameterList(Vec<(String, Parameter)>);

impl MapParameters for ParameterList {
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2> {
        self.0
            .push((name.to_owned(), Parameter::Matrix(tensor.clone())));
        tensor
    }

    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1> {
        self.0
            .push((name.to_owned(), Parameter::Vector(tensor.clone())));
        tensor
    }
}

/// Passes every parameter through `mapper`, in the order of [`named_parameters`].
///
/// Each tensor is moved to the mapper, which may change it in place if its storage is not shared.
#[must_use]
pub fn map_parameters(model: Decoder, mapper: &mut impl MapParameters) -> Decoder {
    let embed = matrix(mapper, "model.embed_tokens.weight", model.embed);
    let layers = model
        .layers
        .into_iter()
        .enumerate()
        .map(|(index, layer)| map_layer(layer, &format!("model.layers.{index}"), mapper))
        .collect();
    let norm = vector(mapper, "model.norm.weight", model.norm);
    let head = model
        .head
        .map(|head| matrix(mapper, "lm_head.weight", head));
    Decoder {
        embed,
        layers,
        norm,
        head,
        config: model.config,
        tokens: model.tokens,
    }
}

fn map_layer(layer: DecoderLayer, prefix: &str, mapper: &mut impl MapParameters) -> DecoderLayer {
    let name = |part: &str| format!("{prefix}.{part}.weight");
    // Rust evaluates the fields in the order written here, which is the order of the parameters in a file.
    DecoderLayer {
        attention_norm: vector(mapper, &name("input_layernorm"), layer.attention_norm),
        query: matrix(mapper, &name("self_attn.q_proj"), layer.query),
        key: matrix(mapper, &name("self_attn.k_proj"), layer.key),
        value: matrix(mapper, &name("self_attn.v_proj"), layer.value),
        output: matrix(mapper, &name("self_attn.o_proj"), layer.output),
        feed_norm: vector(mapper, &name("post_attention_layernorm"), layer.feed_norm),
        gate: matrix(mapper, &name("mlp.gate_proj"), layer.gate),
        up: matrix(mapper, &name("mlp.up_proj"), layer.up),
        down: matrix(mapper, &name("mlp.down_proj"), layer.down),
    }
}

fn matrix(
    mapper: &mut impl MapParameters,
    name: &str,
    parameter: Param<Tensor<2>>,
) -> Param<Tensor<2>> {
    parameter.map(|tensor| map_as_leaf(tensor, |tensor| mapper.matrix(name, tensor)))
}

fn vector(
    mapper: &mut impl MapParameters,
    name: &str,
    parameter: Param<Tensor<1>>,
) -> Param<Tensor<1>> {
    parameter.map(|tensor| map_as_leaf(tensor, |tensor| mapper.vector(name, tensor)))
}

/// Maps a tensor, and makes the result of a tracked tensor a new leaf, so that the mapping is not differentiated.
fn map_as_leaf<const D: usize>(
    tensor: Tensor<D>,
    map: impl FnOnce(Tensor<D>) -> Tensor<D>,
) -> Tensor<D> {
    let tracked = tensor.is_require_grad();
    let mapped = map(tensor);
    if tracked {
        Tensor::from_inner(mapped.without_autodiff()).require_grad()
    } else {
        mapped
    }
}
