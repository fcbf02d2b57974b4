//! A linear layer: y = x·Wᵀ + b.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, TensorData};
use potstill_kernels::{add_bias, linear_biased, linear_pair};

use super::Shapes;
use crate::parameters::{MapParameters, Role, map_parameter};

/// A weight `[out, in]`, and a bias `[out]` or none.
#[derive(Module, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Param<Tensor<2>>,
    pub(crate) bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    pub(crate) fn unset([outputs, inputs]: [usize; 2], bias: bool, shapes: &Shapes) -> Self {
        Self {
            weight: shapes.zeros([outputs, inputs]),
            bias: bias.then(|| shapes.zeros([outputs])),
        }
    }

    /// Computes the layer: `[n, in]` → `[n, out]`.
    pub(crate) fn forward(&self, x_ni: Tensor<2>) -> Tensor<2> {
        linear_biased(x_ni, self.weight.val(), self.bias())
    }

    /// Computes two layers of the same input, which is read once.
    pub(crate) fn forward_pair(layers: [&Self; 2], x_ni: Tensor<2>) -> [Tensor<2>; 2] {
        let [a, b] = linear_pair(x_ni, layers.map(|layer| layer.weight.val()));
        [(a, layers[0]), (b, layers[1])].map(|(y_no, layer)| match layer.bias() {
            Some(bias_o) => add_bias(y_no, bias_o),
            None => y_no,
        })
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    /// Returns the layer with the given outputs only.
    pub(crate) fn with_outputs(self, rows: &[i32]) -> Self {
        Self {
            weight: self.weight.map(|weight_oi| select(weight_oi, 0, rows)),
            bias: (self.bias).map(|bias| bias.map(|bias_o| select(bias_o, 0, rows))),
        }
    }

    /// Returns the layer with the given inputs only.
    pub(crate) fn with_inputs(self, columns: &[i32]) -> Self {
        Self {
            weight: self.weight.map(|weight_oi| select(weight_oi, 1, columns)),
            bias: self.bias,
        }
    }

    pub(crate) fn map_parameters(self, name: &str, mapper: &mut impl MapParameters) -> Self {
        self.map_with_role(name, Role::Projection, mapper)
    }

    /// Maps a layer whose weight is no plain projection.
    pub(crate) fn map_with_role(
        self,
        name: &str,
        role: Role,
        mapper: &mut impl MapParameters,
    ) -> Self {
        let weight = map_parameter(mapper, format!("{name}.weight"), role, self.weight);
        let role = match role {
            Role::Router => Role::Router,
            _ => Role::Bias,
        };
        let bias = self.bias;
        Self {
            weight,
            bias: bias.map(|bias| map_parameter(mapper, format!("{name}.bias"), role, bias)),
        }
    }
}

fn select<const D: usize>(tensor: Tensor<D>, along: usize, indices: &[i32]) -> Tensor<D> {
    let data = TensorData::new(indices.to_vec(), [indices.len()]);
    let indices = Tensor::<1, Int>::from_data(data, &tensor.device());
    tensor.select(along, indices)
}
