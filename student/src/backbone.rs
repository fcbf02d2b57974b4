//! The forward pass from embeddings to hidden states, and the way back: with all activations kept, or with only the input
//! of each layer kept and the rest computed again (Chen et al. 2016), which gives the same bits.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients as Tape, Tensor};
use potstill_model::{Decoder, Layerwise, Parameter, TensorOperation, named_parameters};

use crate::head_loss::leaf;

/// A forward pass whose gradient is still to be computed.
pub(crate) enum ForwardPass {
    /// One graph of the whole model.
    Kept {
        /// Embeddings, a leaf of the graph.
        embedded_nd: Tensor<2>,
        /// Hidden states in the graph.
        hidden_nd: Tensor<2>,
    },
    /// Values without a graph.
    Inputs {
        /// Embeddings.
        embedded_nd: Tensor<2>,
        /// Input of each layer.
        layers_nd: Vec<Tensor<2>>,
        /// Input of the last norm.
        norm_nd: Tensor<2>,
        /// Hidden states.
        hidden_nd: Tensor<2>,
    },
}

/// Gradients of everything between embeddings and hidden states.
pub(crate) struct BackboneGradients {
    /// ∂L/∂embeddings, `[n, d]`.
    pub(crate) embedded_nd: Option<Tensor<2>>,
    /// Gradients of parameters by name. Embedding and head are not among them.
    pub(crate) parameters: BTreeMap<String, Parameter>,
}

impl ForwardPass {
    /// Computes the hidden states of a tracked model, from embeddings without autodiff.
    pub(crate) fn new(
        model: &Decoder,
        embedded_nd: Tensor<2>,
        documents: &[usize],
        recompute: bool,
    ) -> Self {
        if !recompute {
            let embedded_nd = leaf(embedded_nd);
            let hidden_nd = model.hidden_from(embedded_nd.clone(), documents);
            return Self::Kept {
                embedded_nd,
                hidden_nd,
            };
        }
        let model = model.valid();
        let pass = Layerwise::new(&model, documents);
        let mut layers_nd = Vec::with_capacity(pass.layers());
        let mut x_nd = pass.first_input(embedded_nd.clone());
        for index in 0..pass.layers() {
            layers_nd.push(x_nd.clone());
            x_nd = pass.layer(index, x_nd);
        }
        Self::Inputs {
            embedded_nd,
            layers_nd,
            hidden_nd: pass.last_norm(x_nd.clone()),
            norm_nd: x_nd,
        }
    }

    /// Hidden states without autodiff, `[n, d]`.
    pub(crate) fn hidden_nd(&self) -> Tensor<2> {
        match self {
            Self::Kept { hidden_nd, .. } => hidden_nd.clone().inner(),
            Self::Inputs { hidden_nd, .. } => hidden_nd.clone(),
        }
    }

    /// Propagates ∂L/∂hidden, `[n, d]`, back to the embeddings of the tracked model.
    pub(crate) fn backward(
        self,
        model: &Decoder,
        documents: &[usize],
        gradient_nd: Tensor<2>,
    ) -> BackboneGradients {
        let mut gradients = BackboneGradients {
            embedded_nd: None,
            parameters: BTreeMap::new(),
        };
        match self {
            Self::Kept {
                embedded_nd,
                hidden_nd,
            } => {
                let mut tape = backward_from(hidden_nd, gradient_nd);
                gradients.embedded_nd = embedded_nd.grad_remove(&mut tape);
                gradients.take(model, tape);
            }
            Self::Inputs {
                embedded_nd,
                mut layers_nd,
                norm_nd,
                hidden_nd,
            } => {
                drop(hidden_nd);
                let pass = Layerwise::new(model, documents);
                let mut back =
                    |input_nd: Tensor<2>,
                     gradient_nd: Tensor<2>,
                     part: &dyn Fn(Tensor<2>) -> Tensor<2>| {
                        let input_nd = leaf(input_nd);
                        let mut tape = backward_from(part(input_nd.clone()), gradient_nd);
                        let gradient_nd = input_nd.grad_remove(&mut tape);
                        gradients.take(model, tape);
                        gradient_nd.unwrap_or_else(|| input_nd.inner().zeros_like())
                    };
                let mut gradient_nd = back(norm_nd, gradient_nd, &|x_nd| pass.last_norm(x_nd));
                for index in (0..pass.layers()).rev() {
                    if let Some(input_nd) = layers_nd.pop() {
                        gradient_nd = back(input_nd, gradient_nd, &|x_nd| pass.layer(index, x_nd));
                    }
                }
                let first = |x_nd| pass.first_input(x_nd);
                gradients.embedded_nd = Some(back(embedded_nd, gradient_nd, &first));
            }
        }
        gradients
    }
}

/// Propagates a gradient of a tensor through the graph of the tensor.
fn backward_from(value_nd: Tensor<2>, gradient_nd: Tensor<2>) -> Tape {
    (value_nd * Tensor::from_inner(gradient_nd))
        .sum()
        .backward()
}

impl BackboneGradients {
    /// Takes the gradients of all parameters that a graph has.
    fn take(&mut self, model: &Decoder, mut tape: Tape) {
        for (name, parameter) in named_parameters(model) {
            if let Some(gradient) = parameter.apply(TakeGradient(&mut tape)) {
                self.parameters.insert(name.name, gradient);
            }
        }
    }
}

/// Removes the gradient of a tensor from the tape.
struct TakeGradient<'a>(&'a mut Tape);

impl TensorOperation for TakeGradient<'_> {
    type Output = Option<Parameter>;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Option<Parameter> {
        tensor.grad_remove(self.0).map(Parameter::new)
    }
}
