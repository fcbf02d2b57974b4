//! Causal grouped-query attention and its rotary positions.
//!
//! Dimensions: b batch, t positions of the queries, u positions of the keys, h query heads, g key and
//! value heads (h is a multiple of g), e the width of a head. Query head i uses key head i / (h / g),
//! as in transformers' `repeat_kv`; keys and values are never repeated in memory.

use burn::tensor::activation::softmax;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};

/// Cosines and sines of the rotary positions, `[b or 1, t, 1, e/2]` each.
///
/// The angles are computed in f32 whatever the model's type, as transformers does, then cast.
pub(crate) struct Rotary {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotary {
    /// Tables for rows of positions: `positions[row]` has t entries; one row serves a whole batch.
    pub(crate) fn new(
        positions: &[Vec<usize>],
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
            .flatten()
            .flat_map(|&position| inverse.iter().map(move |freq| position as f32 * freq))
            .collect();
        let columns = positions.first().map_or(0, Vec::len);
        let table = |of: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle)).collect();
            let data = TensorData::new(values, [positions.len(), columns, 1, half]);
            Tensor::from_data(data, (device, dtype))
        };
        Self {
            cos: table(f32::cos),
            sin: table(f32::sin),
        }
    }

    /// Turns each pair (x_i, x_{i + e/2}) by its position's angle: `[b, t, h, e]` → the same.
    pub(crate) fn turn(&self, x_bthe: Tensor<4>) -> Tensor<4> {
        let half = x_bthe.dims()[3] / 2;
        let first = x_bthe.clone().narrow(3, 0, half);
        let second = x_bthe.narrow(3, half, half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos + first * sin,
            ],
            3,
        )
    }
}

/// Attention of a whole text to itself, without autodiff: position i sees the positions up to i.
///
/// `q_bhte`, `k_bgte`, `v_bgte` → `[b, h, t, e]`. It is burn's own, which never holds all scores at once
/// and shares keys among heads.
pub(crate) fn causal(q_bhte: Tensor<4>, k_bgte: Tensor<4>, v_bgte: Tensor<4>) -> Tensor<4> {
    let options = AttentionModuleOptions {
        is_causal: true,
        ..Default::default()
    };
    attention(q_bhte, k_bgte, v_bgte, None, None, options)
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

/// The bias of rows of positions: 0 from where a position's document begins, which is where positions
/// were last 0, up to itself, and −∞ elsewhere. One row of positions gives `[1, 1, t, t]`.
pub(crate) fn document_bias(positions: &[Vec<usize>], dtype: DType, device: &Device) -> Tensor<4> {
    let t = positions.first().map_or(0, Vec::len);
    let mut bias = vec![f32::NEG_INFINITY; positions.len() * t * t];
    let places = positions.iter().flat_map(|row| row.iter().enumerate());
    for (seen, (column, position)) in bias.chunks_mut(t.max(1)).zip(places) {
        if let Some(document) = seen.get_mut(column.saturating_sub(*position)..=column) {
            document.fill(0.0);
        }
    }
    let data = TensorData::new(bias, [positions.len(), 1, t, t]);
    Tensor::from_data(data, (device, dtype))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    #[test]
    fn the_trained_and_the_inference_path_agree() {
        let device = Device::flex();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-13)] {
            for length in [1, 2, 7, 65] {
                let random = |heads| {
                    Tensor::<4>::random(
                        [2, heads, length, 8],
                        Distribution::Normal(0.0, 2.0),
                        (&device, dtype),
                    )
                };
                let (q, k, v) = (random(6), random(2), random(2));
                let fast = causal(q.clone(), k.clone(), v.clone());
                let bias = document_bias(&[(0..length).collect()], dtype, &device);
                let slow = attend(q, k, v, bias);
                let largest: f64 = (fast - slow).abs().max().into_scalar();
                assert!(largest < tolerance, "{dtype:?} {length}: {largest}");
            }
        }
    }

    #[test]
    fn a_bias_shows_each_position_its_document_so_far() {
        let positions = [vec![0, 1, 2, 0, 1], vec![0, 0, 1, 2, 3]];
        let bias = document_bias(&positions, DType::F32, &Device::flex());
        assert_eq!(bias.dims(), [2, 1, 5, 5]);
        let seen: String = bias
            .into_data()
            .iter::<f32>()
            .map(|bias| if bias == 0.0 { '1' } else { '.' })
            .collect();
        let rows: Vec<&str> = (0..10).map(|row| &seen[row * 5..row * 5 + 5]).collect();
        assert_eq!(
            rows,
            [
                "1....", "11...", "111..", "...1.", "...11", // two documents, of 3 and of 2
                "1....", ".1...", ".11..", ".111.", ".1111", // of 1 and of 4
            ]
        );
    }
}
