//! A linear layer: y = x·Wᵀ + b, or with an adapter y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{
    BlockMatrix, GateActivation, add_bias, gated, gated_linear, linear, linear_blocks, linear_pair,
};

use super::{MapLayers, Shapes};
use crate::parameters::{Role, map_parameter};

/// A weight `[out, in]`, a bias `[out]` or none, and an adapter or none.
#[derive(Module, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Param<Tensor<1>>>,
    pub(crate) adapter: Option<Adapter>,
}

/// The weight of a linear layer, `[out, in]`.
#[derive(Module, Debug)]
pub(crate) enum Weight {
    Dense(Param<Tensor<2>>),
    /// A constant, and no parameter.
    Blocks(FrozenBlocks),
}

/// A frozen weight in blocks.
#[derive(Module, Debug)]
pub(crate) struct FrozenBlocks {
    #[module(skip)]
    pub(crate) matrix: BlockMatrix,
}

impl Weight {
    /// Outputs and inputs.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) if weight.is_initialized() => weight.val().dims(),
            Self::Dense(weight) => {
                let shape = weight.lazy_shape();
                [shape[0], shape[1]]
            }
            Self::Blocks(blocks) => blocks.matrix.dims(),
        }
    }

    /// Returns the weight as a tensor. Blocks are dequantised to this type and device.
    pub(crate) fn dense(&self, dtype: DType, device: &Device) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.val(),
            Self::Blocks(blocks) => Tensor::from_data(blocks.matrix.dequantized(), (device, dtype)),
        }
    }

    fn forward(&self, x_ni: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Dense(weight) => linear(x_ni, weight.val()),
            Self::Blocks(blocks) => linear_blocks(x_ni, &blocks.matrix),
        }
    }

    fn map(self, function: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Self {
        Self::Dense(match self {
            Self::Dense(weight) => weight.map(function),
            Self::Blocks(_) => {
                Param::from_tensor(function(self.dense(DType::F32, &Device::flex())))
            }
        })
    }
}

/// A low-rank adapter (Hu et al. 2021): the matrix s·B·A that is added to a weight, without ever being formed.
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    /// A, `[r, in]`.
    pub(crate) down: Param<Tensor<2>>,
    /// B, `[out, r]`.
    pub(crate) up: Param<Tensor<2>>,
    #[module(skip)]
    pub(crate) scale: AdapterScale,
}

/// The scale s of an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AdapterScale {
    pub(crate) alpha: f64,
    /// Whether s is α / √r in place of α / r.
    pub(crate) rslora: bool,
}

impl AdapterScale {
    /// Returns s for a rank.
    pub(crate) fn factor(self, rank: usize) -> f64 {
        match self.rslora {
            true => self.alpha / (rank as f64).sqrt(),
            false => self.alpha / rank as f64,
        }
    }
}

impl Adapter {
    /// The rank r.
    pub(crate) fn rank(&self) -> usize {
        self.down.val().dims()[0]
    }

    /// The scale s.
    pub(crate) fn factor(&self) -> f64 {
        self.scale.factor(self.rank())
    }

    /// Adds s·(x·Aᵀ)·Bᵀ to `y_no`, given x·Aᵀ.
    fn add_to(&self, y_no: Tensor<2>, low_nr: Tensor<2>) -> Tensor<2> {
        y_no + linear(low_nr * self.factor(), self.up.val())
    }

    fn map_parameters(self, name: &str, mapper: &mut impl MapLayers) -> Self {
        let role = Role::Adapter;
        Self {
            down: map_parameter(mapper, format!("{name}.lora_A.weight"), role, self.down),
            up: map_parameter(mapper, format!("{name}.lora_B.weight"), role, self.up),
            scale: self.scale,
        }
    }
}

impl Linear {
    pub(crate) fn unset([outputs, inputs]: [usize; 2], bias: bool, shapes: &Shapes) -> Self {
        Self {
            weight: Weight::Dense(shapes.zeros([outputs, inputs])),
            bias: bias.then(|| shapes.zeros([outputs])),
            adapter: None,
        }
    }

    /// Computes the layer: `[n, in]` → `[n, out]`.
    pub(crate) fn forward(&self, x_ni: Tensor<2>) -> Tensor<2> {
        let y_no = self.biased(self.weight.forward(x_ni.clone()));
        self.adapted(y_no, x_ni)
    }

    /// Computes two layers of the same input, which is read once.
    pub(crate) fn forward_pair(layers: [&Self; 2], x_ni: Tensor<2>) -> [Tensor<2>; 2] {
        let [Weight::Dense(a), Weight::Dense(b)] = layers.map(|layer| &layer.weight) else {
            return layers.map(|layer| layer.forward(x_ni.clone()));
        };
        let [a, b] = linear_pair(x_ni.clone(), [a.val(), b.val()]);
        [(a, layers[0]), (b, layers[1])]
            .map(|(y_no, layer)| layer.adapted(layer.biased(y_no), x_ni.clone()))
    }

    /// Adds what the adapter computes to `y_no`.
    fn adapted(&self, y_no: Tensor<2>, x_ni: Tensor<2>) -> Tensor<2> {
        match &self.adapter {
            Some(adapter) => adapter.add_to(y_no, linear(x_ni, adapter.down.val())),
            None => y_no,
        }
    }

    /// Computes the layer of a gated activation, which is computed again in the backward pass: two `[n, in]` → `[n, out]`.
    pub(crate) fn forward_gated(
        &self,
        gate_ni: Tensor<2>,
        up_ni: Tensor<2>,
        activation: GateActivation,
    ) -> Tensor<2> {
        let Weight::Dense(weight) = &self.weight else {
            return self.forward(gated(gate_ni, up_ni, activation));
        };
        let (gate, up) = (gate_ni.clone(), up_ni.clone());
        let y_no = self.biased(gated_linear(gate, up, weight.val(), activation));
        let Some(adapter) = &self.adapter else {
            return y_no;
        };
        let low_nr = gated_linear(gate_ni, up_ni, adapter.down.val(), activation);
        adapter.add_to(y_no, low_nr)
    }

    /// Returns the matrix that the layer multiplies by: W, or W + s·B·A. Blocks are dequantised to this type and device.
    pub(crate) fn merged_weight(&self, dtype: DType, device: &Device) -> Tensor<2> {
        let weight_oi = self.weight.dense(dtype, device);
        match &self.adapter {
            Some(adapter) => {
                weight_oi + adapter.up.val().matmul(adapter.down.val()) * adapter.factor()
            }
            None => weight_oi,
        }
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(Param::val)
    }

    fn biased(&self, y_no: Tensor<2>) -> Tensor<2> {
        match self.bias() {
            Some(bias_o) => add_bias(y_no, bias_o),
            None => y_no,
        }
    }

    /// Returns the layer with the given outputs only.
    pub(crate) fn with_outputs(self, rows: &[i32]) -> Self {
        Self {
            weight: self.weight.map(|weight_oi| select(weight_oi, 0, rows)),
            bias: (self.bias).map(|bias| bias.map(|bias_o| select(bias_o, 0, rows))),
            adapter: self.adapter.map(|adapter| Adapter {
                up: adapter.up.map(|up_or| select(up_or, 0, rows)),
                ..adapter
            }),
        }
    }

    /// Returns the layer with the given inputs only.
    pub(crate) fn with_inputs(self, columns: &[i32]) -> Self {
        Self {
            weight: self.weight.map(|weight_oi| select(weight_oi, 1, columns)),
            bias: self.bias,
            adapter: self.adapter.map(|adapter| Adapter {
                down: adapter.down.map(|down_ri| select(down_ri, 1, columns)),
                ..adapter
            }),
        }
    }

    pub(crate) fn map_parameters(self, name: &str, mapper: &mut impl MapLayers) -> Self {
        self.map_with_role(name, Role::Projection, mapper)
    }

    /// Maps a layer whose weight is no plain projection.
    pub(crate) fn map_with_role(self, name: &str, role: Role, mapper: &mut impl MapLayers) -> Self {
        mapper.map_linear(name, role, self)
    }

    /// Maps the parameters of the layer itself; see [`MapLayers`].
    pub(crate) fn map_own_parameters(
        self,
        name: &str,
        role: Role,
        mapper: &mut impl MapLayers,
    ) -> Self {
        let weight = match self.weight {
            Weight::Dense(weight) => Weight::Dense(map_parameter(
                mapper,
                format!("{name}.weight"),
                role,
                weight,
            )),
            blocks @ Weight::Blocks(_) => blocks,
        };
        let role = match role {
            Role::Router => Role::Router,
            _ => Role::Bias,
        };
        let (bias, adapter) = (self.bias, self.adapter);
        Self {
            weight,
            bias: bias.map(|bias| map_parameter(mapper, format!("{name}.bias"), role, bias)),
            adapter: adapter.map(|adapter| adapter.map_parameters(name, mapper)),
        }
    }
}

fn select<const D: usize>(tensor: Tensor<D>, along: usize, indices: &[i32]) -> Tensor<D> {
    let data = TensorData::new(indices.to_vec(), [indices.len()]);
    let indices = Tensor::<1, Int>::from_data(data, &tensor.device());
    tensor.select(along, indices)
}
