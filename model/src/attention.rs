//! Causal grouped-query attention and its rotary positions.
//!
//! Dimensions: b batch, t positions of the queries, u positions of the keys, h query heads, g key and
//! value heads (h is a multiple of g), e the width of a head. Query head i uses key head i / (h / g),
//! as in transformers' `repeat_kv`; keys and values are never repeated in memory.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::rotary;

/// Cosines and sines of the rotary positions of n rows, `[n, e/2]` each.
///
/// The angles are computed in f32 whatever the model's type, as transformers does, then cast.
pub(crate) struct Rotary {
    cos_nf: Tensor<2>,
    sin_nf: Tensor<2>,
}

impl Rotary {
    pub(crate) fn new(
        positions: &[usize],
        head_dim: usize,
        theta: f64,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let half = head_dim / 2;
        let inverse: Vec<f32> = (0..half)
            .map(|pair| 1.0 / (theta as f32).powf((2 * pair) as f32 / head_dim as f32))
            .collect();
        let angles: Vec<f32> = positions
            .iter()
            .flat_map(|&position| inverse.iter().map(move |freq| position as f32 * freq))
            .collect();
        let table = |of: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle)).collect();
            let data = TensorData::new(values, [positions.len(), half]);
            Tensor::from_data(data, (device, dtype))
        };
        Self {
            cos_nf: table(f32::cos),
            sin_nf: table(f32::sin),
        }
    }

    /// Turns each pair (x_i, x_{i + e/2}) of every head by its row's angle: `[n, heads·e]` → the same.
    pub(crate) fn turn(&self, x_nc: Tensor<2>) -> Tensor<2> {
        rotary(x_nc, self.cos_nf.clone(), self.sin_nf.clone())
    }
}

/// Attention with an additive bias: 0 where a key is seen and −∞ where it is not.
///
/// `q_bhte`, `k_bgue`, `v_bgue`, a bias that broadcasts to `[b, h, t, u]` → `[b, h, t, e]`. Every row
/// of the bias must leave at least one key. Keys and values may be views.
pub(crate) fn attend(
    q_bhte: Tensor<4>,
    k_bgue: Tensor<4>,
    v_bgue: Tensor<4>,
    bias: Tensor<4>,
) -> Tensor<4> {
    let [b, h, t, e] = q_bhte.dims();
    let [_, g, u, _] = k_bgue.dims();
    let scale = 1.0 / (e as f64).sqrt();
    let q_bgre = (q_bhte * scale).reshape([b, g, h / g * t, e]);
    let scores_bgru = q_bgre.matmul(k_bgue.swap_dims(2, 3));
    let dtype = scores_bgru.dtype();
    // A softmax in half precision is taken in f32, as transformers does.
    let weights_bhtu = match statistics_dtype(dtype) {
        same if same == dtype => softmax(scores_bgru.reshape([b, h, t, u]) + bias, 3),
        wide => softmax((scores_bgru.reshape([b, h, t, u]) + bias).cast(wide), 3).cast(dtype),
    };
    weights_bhtu
        .reshape([b, g, h / g * t, u])
        .matmul(v_bgue)
        .reshape([b, h, t, e])
}

/// The type in which sums over many numbers are taken: f32 for the half precisions.
pub(crate) fn statistics_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    }
}
