//! The forward pass from embeddings to hidden states, and the way back, part by part: with the activations of each part kept,
//! or with only the input of each part kept and the rest computed again (Chen et al. 2016), which gives the same bits.
//!
//! Each part has a graph of its own, so a part's gradients are added to the sums before those of the next part exist.

use burn::module::Module;
use burn::tensor::Tensor;
use potstill_model::{
    Decoder, Layerwise, Parameter, ParameterName, Role, TensorOperation, named_parameters,
};

use crate::gradients::{Gradients, add_gradient};
use crate::head_loss::leaf;

/// The parameters of a tracked model that have gradients.
pub(crate) struct TrackedParameters {
    /// Whether the embedding is one of them.
    pub(crate) embedding: bool,
    /// Whether the head is one of them; if it is tied, whether the embedding is.
    pub(crate) head: bool,
    /// All others by part: the scaling of the embeddings, which has none, the layers, and the last norm.
    parts: Vec<Vec<(String, Parameter)>>,
}

impl TrackedParameters {
    pub(crate) fn of(model: &Decoder) -> Self {
        let layers = model.config().num_hidden_layers();
        let mut parts: Vec<_> = (0..layers + 2).map(|_| Vec::new()).collect();
        let (mut embedding, mut head) = (false, false);
        for (ParameterName { name, role }, parameter) in named_parameters(model) {
            if !parameter.clone().apply(IsTracked) {
                continue;
            }
            match role {
                Role::Embedding => {
                    embedding = true;
                    head |= model.config().tie_word_embeddings;
                }
                Role::Head => head = true,
                // The choice of experts stays as it is: without the losses that balance experts, a trained router would
                // send all rows to a few.
                Role::Router | Role::Correction => {}
                _ => parts[part_of(&name, layers)].push((name, parameter)),
            }
        }
        Self {
            embedding,
            head,
            parts,
        }
    }

    /// The first part that a gradient must reach; the number of parts if none must.
    fn first(&self) -> usize {
        match self.embedding {
            true => 0,
            false => {
                (self.parts.iter().position(|part| !part.is_empty())).unwrap_or(self.parts.len())
            }
        }
    }

    /// Returns the input of a part, as a leaf if its gradient is needed.
    fn input(&self, part: usize, input_nd: Tensor<2>) -> Tensor<2> {
        match self.embedding || part > self.first() {
            true => leaf(input_nd),
            false => Tensor::from_inner(input_nd),
        }
    }
}

/// Returns the part of a parameter: a layer counted from 1, or else the last norm.
fn part_of(name: &str, layers: usize) -> usize {
    let layer = name.strip_prefix("model.layers.");
    let layer = layer.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.map_or(layers + 1, |layer| layer + 1)
}

/// A forward pass whose gradient is still to be computed.
pub(crate) struct ForwardPass {
    /// Parts from the first that a gradient must reach.
    parts: Vec<PartPass>,
    /// Hidden states without autodiff, `[n, d]`.
    pub(crate) hidden_nd: Tensor<2>,
}

/// The values of a part that its backward pass needs.
struct PartPass {
    /// The input; in the graph of the output, if that is kept.
    input_nd: Tensor<2>,
    /// The output in a graph. `None` if the part is computed again.
    output_nd: Option<Tensor<2>>,
}

impl ForwardPass {
    /// Computes the hidden states of a tracked model, from embeddings without autodiff.
    pub(crate) fn new(
        model: &Decoder,
        embedded_nd: Tensor<2>,
        documents: &[usize],
        tracked: &TrackedParameters,
        recompute: bool,
    ) -> Self {
        let plain = model.valid();
        let pass = Layerwise::new(&plain, documents);
        let with_graph = (!recompute).then(|| Layerwise::new(model, documents));
        let mut x_nd = embedded_nd;
        let mut parts = Vec::new();
        for part in 0..tracked.parts.len() {
            if part < tracked.first() {
                x_nd = compute(&pass, part, x_nd);
                continue;
            }
            let Some(with_graph) = &with_graph else {
                parts.push(PartPass {
                    input_nd: x_nd.clone(),
                    output_nd: None,
                });
                x_nd = compute(&pass, part, x_nd);
                continue;
            };
            let input_nd = tracked.input(part, x_nd);
            let output_nd = compute(with_graph, part, input_nd.clone());
            x_nd = output_nd.clone().inner();
            parts.push(PartPass {
                input_nd,
                output_nd: Some(output_nd),
            });
        }
        Self {
            parts,
            hidden_nd: x_nd,
        }
    }

    /// Propagates ∂L/∂hidden, `[n, d]`, back through the tracked model and adds the gradients of its parameters to `sums`.
    /// Returns ∂L/∂embeddings, `[n, d]`, if the embedding is trained.
    pub(crate) fn backward(
        self,
        model: &Decoder,
        documents: &[usize],
        gradient_nd: Tensor<2>,
        tracked: TrackedParameters,
        sums: &mut Gradients,
    ) -> Option<Tensor<2>> {
        drop(self.hidden_nd);
        let pass = Layerwise::new(model, documents);
        let mut gradient_nd = Some(gradient_nd);
        let mut parts = self.parts;
        for part in (tracked.first()..tracked.parts.len()).rev() {
            let (values, gradient) = parts.pop().zip(gradient_nd)?;
            let input_nd = values.input_nd;
            let [input_nd, output_nd] = match values.output_nd {
                Some(output_nd) => [input_nd, output_nd],
                None => {
                    let input_nd = tracked.input(part, input_nd);
                    let output_nd = compute(&pass, part, input_nd.clone());
                    [input_nd, output_nd]
                }
            };
            let mut tape = (output_nd * Tensor::from_inner(gradient)).sum().backward();
            gradient_nd = input_nd.grad_remove(&mut tape);
            for (name, parameter) in &tracked.parts[part] {
                if let Some(gradient) = parameter.clone().apply(TakeGradient(&mut tape)) {
                    add_gradient(sums, name, gradient);
                }
            }
        }
        gradient_nd.filter(|_| tracked.embedding)
    }
}

/// Computes a part: the scaling of the embeddings, a layer, or the last norm: `[n, d]` → `[n, d]`.
fn compute(pass: &Layerwise<'_>, part: usize, x_nd: Tensor<2>) -> Tensor<2> {
    match part {
        0 => pass.first_input(x_nd),
        part if part <= pass.layers() => pass.layer(part - 1, x_nd),
        _ => pass.last_norm(x_nd),
    }
}

/// Returns whether a tensor has a gradient.
struct IsTracked;

impl TensorOperation for IsTracked {
    type Output = bool;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> bool {
        tensor.is_require_grad()
    }
}

/// Removes the gradient of a tensor from the tape.
struct TakeGradient<'a>(&'a mut burn::tensor::Gradients);

impl TensorOperation for TakeGradient<'_> {
    type Output = Option<Parameter>;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Option<Parameter> {
        tensor.grad_remove(self.0).map(Parameter::new)
    }
}
