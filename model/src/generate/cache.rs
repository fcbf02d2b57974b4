//! The paged KV cache of all layers, and the forward pass of one step over it.

use burn::tensor::{Int, Tensor, TensorData};
use potstill_kernels::{PagedOptions, PagedRow, paged_attention, write_slots};

use super::schedule::{Sequence, StepRow};
use crate::Decoder;

/// A pool of keys and a pool of values `[s, g·e]` for each layer.
pub(super) struct KvCache {
    layers: Vec<(Tensor<2>, Tensor<2>)>,
    page_size: usize,
}

impl KvCache {
    pub(super) fn new(model: &Decoder, page_count: usize, page_size: usize) -> Self {
        let config = model.config();
        let shape = [
            page_count * page_size,
            config.num_key_value_heads * config.head_dim,
        ];
        let pool = || Tensor::zeros(shape, (&model.device(), model.dtype()));
        let layers = model.layers.iter();
        Self {
            layers: layers.map(|_| (pool(), pool())).collect(),
            page_size,
        }
    }

    /// Computes `rows`, whose sequences are in `running`, and writes their keys and values. Returns the hidden states
    /// `[m, d]` after the final norm of the rows whose next token is drawn.
    pub(super) fn step(
        &mut self,
        model: &Decoder,
        rows: &[StepRow],
        running: &[Sequence],
    ) -> Tensor<2> {
        let config = model.config();
        let options = PagedOptions {
            attention: config.attention(),
            page_size: self.page_size,
            value_width: config.head_dim,
        };
        let (seen, slots) = self.seen_and_slots(rows, running);
        let positions: Vec<usize> = rows.iter().map(|row| row.position).collect();
        let rotary = model.rotary(&positions);
        let ids: Vec<i32> = rows.iter().map(|row| row.id as i32).collect();
        let ids = TensorData::new(ids, [rows.len(), 1]);
        let mut x_nd = model.embedded(Tensor::from_data(ids, &model.device()));
        for (layer, (keys, values)) in model.layers.iter().zip(&mut self.layers) {
            let (q_nc, k_nc, v_nc) = layer.project(config, x_nd.clone(), &rotary);
            keys.inplace(|keys| write_slots(keys, k_nc, &slots));
            values.inplace(|values| write_slots(values, v_nc, &slots));
            let (keys, values) = (keys.clone(), values.clone());
            let heads_nc = paged_attention(q_nc, keys, values, None, &seen, &options);
            x_nd = layer.finish(config, x_nd, heads_nc);
        }
        model.final_norm(drawing_rows(x_nd, rows, running))
    }

    /// Returns the positions that each row sees, and the slot that its keys and values are written to.
    fn seen_and_slots<'a>(
        &self,
        rows: &[StepRow],
        running: &'a [Sequence],
    ) -> (Vec<PagedRow<'a>>, Vec<usize>) {
        let seen_and_slot = |row: &StepRow| {
            let pages = running.get(row.sequence).map(|sequence| &sequence.pages);
            let pages = pages.map(Vec::as_slice).unwrap_or_default();
            let page = pages.get(row.position / self.page_size).copied();
            let slot = page.unwrap_or(0) as usize * self.page_size + row.position % self.page_size;
            let length = row.position + 1;
            let row = PagedRow {
                pages,
                first: 0,
                length,
            };
            (row, slot)
        };
        rows.iter().map(seen_and_slot).unzip()
    }
}

/// Selects the last row of each sequence whose next token is drawn: `[n, d]` → `[m, d]`.
fn drawing_rows(x_nd: Tensor<2>, rows: &[StepRow], running: &[Sequence]) -> Tensor<2> {
    let last = |(index, row): (usize, &StepRow)| {
        let sequence = running.get(row.sequence)?;
        let is_last = sequence.is_drawing() && row.position + 1 == sequence.ids.len();
        is_last.then_some(index as i32)
    };
    let last: Vec<i32> = rows.iter().enumerate().filter_map(last).collect();
    if last.len() == rows.len() {
        return x_nd;
    }
    let count = last.len();
    let last = Tensor::<1, Int>::from_data(TensorData::new(last, [count]), &x_nd.device());
    x_nd.select(0, last)
}
