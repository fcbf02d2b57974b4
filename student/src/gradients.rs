//! Sums of gradients by parameter.

use std::collections::BTreeMap;

use burn::tensor::{DType, Tensor};
use potstill_model::{Parameter, TensorOperation};

/// Gradients by the parameter's Hugging Face name, without autodiff; in f32 if the model is in a half precision.
pub type Gradients = BTreeMap<String, Parameter>;

/// Adds a gradient to the sum for its parameter, which is in f32 if the gradient is in a half precision.
pub(crate) fn add_gradient(sums: &mut Gradients, name: &str, gradient: Parameter) {
    struct Add(Option<Parameter>);
    impl TensorOperation for Add {
        type Output = Parameter;
        fn apply<const D: usize>(self, gradient: Tensor<D>) -> Parameter {
            let gradient = widened(gradient);
            match self.0.and_then(Parameter::tensor) {
                Some(sum) => Parameter::new(sum + gradient),
                None => Parameter::new(gradient),
            }
        }
    }
    let sum = gradient.apply(Add(sums.remove(name)));
    sums.insert(name.to_owned(), sum);
}

/// Casts half precisions to f32, the type of sums of their gradients.
pub(crate) fn widened<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.dtype() {
        DType::BF16 | DType::F16 => tensor.cast(DType::F32),
        _ => tensor,
    }
}
