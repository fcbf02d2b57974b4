//! Parameters by their Hugging Face names and roles: for optimizers, training checkpoints and saving.
//!
//! # Training
//! `let model = model.train();` tracks every parameter. After `let mut gradients = loss.backward();` the gradient of a
//! parameter is `tensor.grad_remove(&mut gradients)`, where `tensor` comes from [`crate::named_parameters`] or from
//! [`crate::map_parameters`]; the gradient is not tracked by autodiff. A mapper computes with `tensor.inner()` and may return a
//! plain tensor: on a tracked model the result becomes a new tracked leaf, so the mapped model is ready for the next
//! step.

use std::any::Any;

use burn::backend::ExecutionError;
use burn::module::Param;
use burn::tensor::{Tensor, TensorData};

/// The name and the role of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterName {
    /// Name in a Hugging Face checkpoint.
    pub name: String,
    /// Role in the decoder.
    pub role: Role,
}

/// The part that a parameter has in a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The embedding of the tokens, and the head if the two are tied.
    Embedding,
    /// The head of a model whose head and embedding are not tied.
    Head,
    /// The gain of a norm.
    Norm,
    /// A bias, or the sinks of an attention.
    Bias,
    /// The weight of a linear layer.
    Projection,
    /// The weight or the bias of a router, whose logits choose and weight experts.
    Router,
    /// Numbers that are added to a router's scores for the choice alone. They are f32 in every model and every file, and
    /// no gradient reaches them.
    Correction,
    /// One of the two matrices of a low-rank adapter of a linear layer.
    Adapter,
}

/// The tensor of a parameter, of any rank that decoders have.
#[derive(Debug, Clone)]
pub enum Parameter {
    /// The gain of a norm, or a bias.
    Vector(Tensor<1>),
    /// A projection or an embedding, `[out, in]` or `[v, d]`.
    Matrix(Tensor<2>),
    /// Stacked projections of experts, `[experts, in, out]`.
    Stack(Tensor<3>),
}

impl Parameter {
    /// Wraps a tensor of rank 1, 2 or 3, the ranks that parameters of decoders have.
    #[must_use]
    pub fn new<const D: usize>(tensor: Tensor<D>) -> Self {
        // A change of type alone: a reshaped tensor would not be the leaf that a gradient belongs to.
        let tensor: Box<dyn Any> = Box::new(tensor);
        let tensor = match tensor.downcast() {
            Ok(vector) => return Self::Vector(*vector),
            Err(tensor) => tensor,
        };
        let tensor = match tensor.downcast() {
            Ok(matrix) => return Self::Matrix(*matrix),
            Err(tensor) => tensor,
        };
        match tensor.downcast() {
            Ok(stack) => Self::Stack(*stack),
            Err(_) => unreachable!("no parameter of a decoder has rank {D}"),
        }
    }

    /// Returns the tensor if the parameter has this rank.
    #[must_use]
    pub fn tensor<const D: usize>(self) -> Option<Tensor<D>> {
        let tensor: Box<dyn Any> = match self {
            Self::Vector(tensor) => Box::new(tensor),
            Self::Matrix(tensor) => Box::new(tensor),
            Self::Stack(tensor) => Box::new(tensor),
        };
        tensor.downcast().ok().map(|tensor| *tensor)
    }

    /// Returns the shape.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Vector(tensor) => tensor.dims().to_vec(),
            Self::Matrix(tensor) => tensor.dims().to_vec(),
            Self::Stack(tensor) => tensor.dims().to_vec(),
        }
    }

    /// Applies an operation to the tensor.
    pub fn apply<O: TensorOperation>(self, operation: O) -> O::Output {
        match self {
            Self::Vector(tensor) => operation.apply(tensor),
            Self::Matrix(tensor) => operation.apply(tensor),
            Self::Stack(tensor) => operation.apply(tensor),
        }
    }

    /// Reads the values from the device.
    ///
    /// # Errors
    /// Returns the error of the device.
    pub fn try_into_data(self) -> Result<TensorData, ExecutionError> {
        match self {
            Self::Vector(tensor) => tensor.without_autodiff().try_into_data(),
            Self::Matrix(tensor) => tensor.without_autodiff().try_into_data(),
            Self::Stack(tensor) => tensor.without_autodiff().try_into_data(),
        }
    }
}

/// An operation on a tensor of any rank; see [`Parameter::apply`].
pub trait TensorOperation {
    /// The result.
    type Output;
    /// Computes the result.
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Self::Output;
}

/// A function that replaces parameters; see [`crate::map_parameters`].
pub trait MapParameters {
    /// Returns the new value of a parameter, of the same shape and type.
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D>;

    /// Whether a parameter of this shape that has no value yet is mapped. If not, it stays without one, and no memory is
    /// taken for it.
    fn accepts(&mut self, _parameter: &ParameterName, _shape: &[usize]) -> bool {
        true
    }
}

/// Maps one parameter.
pub(crate) fn map_parameter<const D: usize>(
    mapper: &mut impl MapParameters,
    name: String,
    role: Role,
    parameter: Param<Tensor<D>>,
) -> Param<Tensor<D>> {
    let name = ParameterName { name, role };
    if !parameter.is_initialized() && !mapper.accepts(&name, &parameter.lazy_shape()) {
        return parameter;
    }
    parameter.map(|tensor| {
        // The result of a tracked tensor becomes a new leaf, so that the mapping is not differentiated.
        let tracked = tensor.is_require_grad();
        let mapped = mapper.map(&name, tensor);
        if tracked {
            Tensor::from_inner(mapped.without_autodiff()).require_grad()
        } else {
            mapped
        }
    })
}
