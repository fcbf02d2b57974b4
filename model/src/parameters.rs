//! Parameters by their Hugging Face names: for optimizers, training checkpoints and saving.
//!
//! # Training
//! `let model = model.train();` tracks every parameter. After `let mut gradients = loss.backward();` the
//! gradient of a parameter is `tensor.grad_remove(&mut gradients)`, where `tensor` is what
//! [`named_parameters`] lists or what [`map_parameters`] hands over; it comes without autodiff.
//! Arithmetic on the weights belongs on `tensor.inner()`. A mapper may return a plain tensor: on a
//! tracked model it becomes a new tracked leaf, so the mapped model is ready for the next step.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::Llama;
use crate::llama::Layer;

/// A parameter's tensor.
#[derive(Debug, Clone)]
pub enum Parameter {
    /// A projection or an embedding, `[out, in]` or `[v, d]`.
    Matrix(Tensor<2>),
    /// The gain of a norm, `[d]`.
    Vector(Tensor<1>),
}

/// Replaces parameters; see [`map_parameters`].
pub trait MapParameters {
    /// The new value of the projection or embedding `name`; shape and type should stay.
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2>;
    /// The new value of the norm gain `name`; shape and type should stay.
    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1>;
}

/// Every parameter with its Hugging Face name, in a fixed order: embedding, layers from the first,
/// final norm, then the head where it is not tied. The tensors are shared with the model, not copied.
#[must_use]
pub fn named_parameters(model: &Llama) -> Vec<(String, Parameter)> {
    let mut list = List(Vec::new());
    let _unchanged = map_parameters(model.clone(), &mut list);
    list.0
}

struct List(Vec<(String, Parameter)>);

impl MapParameters for List {
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
/// Each tensor is moved, so a mapper that owns no other copy may work in place.
#[must_use]
pub fn map_parameters(model: Llama, mapper: &mut impl MapParameters) -> Llama {
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
    Llama {
        embed,
        layers,
        norm,
        head,
        config: model.config,
    }
}

fn map_layer(layer: Layer, prefix: &str, to: &mut impl MapParameters) -> Layer {
    let name = |part: &str| format!("{prefix}.{part}.weight");
    // Fields are evaluated as written here: this is the order of the file.
    Layer {
        attention_norm: vector(to, &name("input_layernorm"), layer.attention_norm),
        query: matrix(to, &name("self_attn.q_proj"), layer.query),
        key: matrix(to, &name("self_attn.k_proj"), layer.key),
        value: matrix(to, &name("self_attn.v_proj"), layer.value),
        output: matrix(to, &name("self_attn.o_proj"), layer.output),
        feed_norm: vector(to, &name("post_attention_layernorm"), layer.feed_norm),
        gate: matrix(to, &name("mlp.gate_proj"), layer.gate),
        up: matrix(to, &name("mlp.up_proj"), layer.up),
        down: matrix(to, &name("mlp.down_proj"), layer.down),
    }
}

fn matrix(
    mapper: &mut impl MapParameters,
    name: &str,
    parameter: Param<Tensor<2>>,
) -> Param<Tensor<2>> {
    parameter.map(|tensor| {
        let tracked = tensor.is_require_grad();
        as_leaf(mapper.matrix(name, tensor), tracked)
    })
}

fn vector(
    mapper: &mut impl MapParameters,
    name: &str,
    parameter: Param<Tensor<1>>,
) -> Param<Tensor<1>> {
    parameter.map(|tensor| {
        let tracked = tensor.is_require_grad();
        as_leaf(mapper.vector(name, tensor), tracked)
    })
}

/// A parameter is a leaf of the graph: what the mapper did to it is not differentiated.
fn as_leaf<const D: usize>(tensor: Tensor<D>, tracked: bool) -> Tensor<D> {
    if tracked {
        Tensor::from_inner(tensor.without_autodiff()).require_grad()
    } else {
        tensor
    }
}
