//! Keys and values of all layers in pages, and the forward pass of one step over them.

use burn::tensor::{Int, Tensor, TensorData};
use potstill_kernels::{PagedRow, paged_attention, write_slots};

use super::schedule::{Row, Sequence};
use crate::Llama;

/// Pools of keys and values `[s, g·e]` of each layer; slots are not set until they are written.
pub(super) struct Cache {
    layers: Vec<(Tensor<2>, Tensor<2>)>,
    page_size: usize,
}

impl Cache {
    pub(super) fn new(model: &Llama, page_count: usize, page_size: usize) -> Self {
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

    /// Computes `rows`, whose sequences are in `running`, and writes their keys and values: the hidden
    /// states `[m, d]`, after the final norm, of the rows that a token is drawn after.
    pub(super) fn step(&mut self, model: &Llama, rows: &[Row], running: &[Sequence]) -> Tensor<2> {
        let config = model.config();
        let heads = config.num_attention_heads;
        let (seen, slots) = self.places(rows, running);
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
            let mixed_nc = paged_attention(q_nc, keys, values, &seen, self.page_size, heads);
            x_nd = layer.finish(config, x_nd, mixed_nc);
        }
        model.final_norm(drawn_after(x_nd, rows, running))
    }

    /// What each row sees, and the slot that it is written to.
    fn places<'a>(&self, rows: &[Row], running: &'a [Sequence]) -> (Vec<PagedRow<'a>>, Vec<usize>) {
        let place = |row: &Row| {
            let pages = running.get(row.sequence).map(|sequence| &sequence.pages);
            let pages = pages.map(Vec::as_slice).unwrap_or_default();
            let page = pages.get(row.position / self.page_size).copied();
            let slot = page.unwrap_or(0) as usize * self.page_size + row.position % self.page_size;
            let length = row.position + 1;
            (PagedRow { pages, length }, slot)
        };
        rows.iter().map(place).unzip()
    }
}

/// The last row of each sequence whose next token is drawn: `[n, d]` → `[m, d]`.
fn drawn_after(x_nd: Tensor<2>, rows: &[Row], running: &[Sequence]) -> Tensor<2> {
    let last = |(at, row): (usize, &Row)| {
        let sequence = running.get(row.sequence)?;
        let last = sequence.draws() && row.position + 1 == sequence.text.len();
        last.then_some(at as i32)
    };
    let last: Vec<i32> = rows.iter().enumerate().filter_map(last).collect();
    if last.len() == rows.len() {
        return x_nd;
    }
    let count = last.len();
    let last = Tensor::<1, Int>::from_data(TensorData::new(last, [count]), &x_nd.device());
    x_nd.select(0, last)
}
