//! All parameters of a decoder, with their names.

use burn::tensor::{DType, Device, Tensor};

use crate::layers::EachParameter;
use crate::parameters::{MapParameters, Parameter, ParameterName};
use crate::{Config, Decoder};

/// Returns every parameter with its name, in a fixed order: embedding, layers from the first, final norm, and the head
/// if it is not tied. The tensors are shared with the model, not copied.
#[must_use]
pub fn named_parameters(model: &Decoder) -> Vec<(ParameterName, Parameter)> {
    let mut list = ParameterList(Vec::new());
    let _unchanged = map_parameters(model.clone(), &mut list);
    list.0
}

struct ParameterList(Vec<(ParameterName, Parameter)>);

impl MapParameters for ParameterList {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        self.0
            .push((parameter.clone(), Parameter::new(tensor.clone())));
        tensor
    }
}

/// Returns the name and the shape of every parameter of a model of this configuration, in the order of
/// [`named_parameters`]. Nothing is allocated for the parameters.
#[must_use]
pub fn parameter_shapes(config: &Config) -> Vec<(ParameterName, Vec<usize>)> {
    let mut list = ShapeList(Vec::new());
    let model = Decoder::unset(config, DType::F32, &Device::flex());
    let _without_values = map_parameters(model, &mut list);
    list.0
}

struct ShapeList(Vec<(ParameterName, Vec<usize>)>);

impl MapParameters for ShapeList {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        self.0.push((parameter.clone(), tensor.dims().to_vec()));
        tensor
    }

    fn accepts(&mut self, parameter: &ParameterName, shape: &[usize]) -> bool {
        self.0.push((parameter.clone(), shape.to_vec()));
        false
    }
}

/// Passes every parameter through `mapper`, in the order of [`named_parameters`].
///
/// Each tensor is moved to the mapper, which may change it in place if its storage is not shared.
#[must_use]
pub fn map_parameters(model: Decoder, mapper: &mut impl MapParameters) -> Decoder {
    model.map_layers(&mut EachParameter(mapper))
}
