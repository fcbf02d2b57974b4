//! Frozen weights in blocks under adapters (QLoRA, Dettmers et al. 2023).

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use potstill_kernels::{BlockMatrix, BlockType};

use super::can_have_adapter;
use crate::Decoder;
use crate::layers::{FrozenBlocks, Linear, MapLayers, Weight};
use crate::parameters::{MapParameters, ParameterName, Role};

/// Types that are tried in place of one whose blocks do not fit into rows, as `llama-quantize` chooses them.
fn smaller(kind: BlockType) -> BlockType {
    match kind {
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        other => other,
    }
}

/// Quantises the weights of the linear layers that may have adapters. Rows that are not whole blocks take the smaller block
/// that `llama-quantize` takes, and otherwise stay as they are. Weights in blocks stay too.
#[must_use]
pub fn quantized(model: Decoder, kind: BlockType) -> Decoder {
    model.map_layers(&mut Quantise(kind))
}

/// Quantises the weight of a linear layer.
pub(crate) fn quantized_layer(name: &str, role: Role, linear: Linear, kind: BlockType) -> Linear {
    let Weight::Dense(weight) = &linear.weight else {
        return linear;
    };
    if !can_have_adapter(name, role) {
        return linear;
    }
    match [kind, smaller(kind)]
        .into_iter()
        .find_map(|kind| blocks(weight, kind))
    {
        Some(matrix) => Linear {
            weight: Weight::Blocks(FrozenBlocks { matrix }),
            ..linear
        },
        None => linear,
    }
}

fn blocks(weight: &Param<Tensor<2>>, kind: BlockType) -> Option<BlockMatrix> {
    let weight_oi = weight.val();
    let shape = weight_oi.dims();
    if !shape[1].is_multiple_of(kind.block_len()) {
        return None;
    }
    let values = weight_oi.without_autodiff().cast(DType::F32);
    let values = values.try_into_vec_as::<f32>().ok()?;
    BlockMatrix::quantized(kind, shape, &values)
}

struct Quantise(BlockType);

impl MapParameters for Quantise {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        tensor
    }
}

impl MapLayers for Quantise {
    fn map_linear(&mut self, name: &str, role: Role, linear: Linear) -> Linear {
        quantized_layer(name, role, linear, self.0)
    }
}
