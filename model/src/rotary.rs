//! The angles of the rotary positions of a batch's rows.

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::rotary;

/// Cosines and sines of the rotary positions of n rows, `[n, e/2]` each.
///
/// The angles are computed in f32 and then cast to the model's type, as in transformers.
pub(crate) struct RotaryAngles {
    cos_nf: Tensor<2>,
    sin_nf: Tensor<2>,
}

impl RotaryAngles {
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
        let table = |function: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| function(angle)).collect();
            let data = TensorData::new(values, [positions.len(), half]);
            Tensor::from_data(data, (device, dtype))
        };
        Self {
            cos_nf: table(f32::cos),
            sin_nf: table(f32::sin),
        }
    }

    /// Rotates each pair (x_i, x_{i + e/2}) of every head by its row's angle: `[n, heads·e]` → `[n, heads·e]`.
    pub(crate) fn rotate(&self, x_nc: Tensor<2>) -> Tensor<2> {
        rotary(
            x_nc,
            self.cos_nf.clone(),
            self.sin_nf.clone(),
            2 * self.cos_nf.dims()[1],
        )
    }
}
