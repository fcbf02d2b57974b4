//! The angles of the rotary positions of a batch's rows.

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::rotary;

use crate::rotary_table::RotaryTable;

/// The position of a row in its document, and the length of the document. In generation, the length is that of the
/// longest text that the document may become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowPosition {
    pub(crate) position: usize,
    pub(crate) length: usize,
}

impl RowPosition {
    /// Returns the positions of the rows of consecutive documents.
    pub(crate) fn of_documents(documents: &[usize]) -> Vec<Self> {
        let rows = documents
            .iter()
            .flat_map(|&length| (0..length).map(move |position| Self { position, length }));
        rows.collect()
    }
}

/// Cosines and sines of the rotary positions of n rows, `[n, r/2]` each.
///
/// The angles are computed in f32 and then cast to the model's type, as in transformers.
#[derive(Debug, Clone)]
pub(crate) struct RotaryAngles {
    cos_nf: Tensor<2>,
    sin_nf: Tensor<2>,
}

impl RotaryAngles {
    pub(crate) fn new(
        table: &RotaryTable,
        rows: &[RowPosition],
        dtype: DType,
        device: &Device,
    ) -> Self {
        let angles = rows.iter().flat_map(|row| {
            let long = table.long.as_ref().filter(|long| row.length > long.limit);
            let frequencies = long.map_or(&table.frequencies, |long| &long.frequencies);
            frequencies.iter().map(|f| row.position as f32 * f)
        });
        let angles: Vec<f32> = angles.collect();
        let factor = table.factor;
        let values = |function: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&a| function(a) * factor).collect();
            let data = TensorData::new(values, [rows.len(), table.frequencies.len()]);
            Tensor::from_data(data, (device, dtype))
        };
        Self {
            cos_nf: values(f32::cos),
            sin_nf: values(f32::sin),
        }
    }

    /// Rotates the pairs (x_i, x_{i + r/2}) in the first r columns of every head of this width: `[n, heads · width]` →
    /// `[n, heads · width]`.
    pub(crate) fn rotate(&self, x_nc: Tensor<2>, head_width: usize) -> Tensor<2> {
        rotary(x_nc, self.cos_nf.clone(), self.sin_nf.clone(), head_width)
    }
}
