//! The paged KV cache of all layers, and the forward pass of one step over it.

use burn::tensor::{Int, Tensor, TensorData};
use potstill_kernels::{
    AttentionOptions, PagedOptions, PagedRow, linear, paged_attention, write_slots,
};

use super::schedule::{Sequence, StepRow};
use crate::Decoder;
use crate::attend::{Attend, Heads, LatentHeads};
use crate::plan::{AttentionPlan, GroupedPlan, LatentPlan};
use crate::rotary::RowPosition;

/// The pools of each layer.
pub(super) struct KvCache {
    layers: Vec<LayerPools>,
    page_size: usize,
}

/// The pools of a layer.
enum LayerPools {
    /// Keys and values, `[s, g·e]` each.
    Grouped(Tensor<2>, Tensor<2>),
    /// Latent vectors and the rotated part of the keys beside one another, `[s, key_rank + rotary_width]`.
    Latent(Tensor<2>),
}

impl KvCache {
    pub(super) fn new(model: &Decoder, page_count: usize, page_size: usize) -> Self {
        let pool = |columns| {
            let shape = [page_count * page_size, columns];
            Tensor::zeros(shape, (&model.device(), model.dtype()))
        };
        let plans = model.config().plan.layers.iter();
        let pools = plans.map(|layer| match &layer.attention {
            AttentionPlan::Grouped(plan) => {
                LayerPools::Grouped(pool(plan.key_columns()), pool(plan.key_columns()))
            }
            AttentionPlan::Latent(plan) => {
                LayerPools::Latent(pool(plan.key_rank + plan.rotary_width))
            }
        });
        Self {
            layers: pools.collect(),
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
        let positions: Vec<RowPosition> = rows
            .iter()
            .map(|row| RowPosition {
                position: row.position,
                length: running.get(row.sequence).map_or(0, |s| s.longest),
            })
            .collect();
        let ids: Vec<i32> = rows.iter().map(|row| row.id as i32).collect();
        let ids = TensorData::new(ids, [rows.len(), 1]);
        let embedded_nd = model.embedded(Tensor::from_data(ids, &model.device()));
        let (seen, slots) = self.seen_and_slots(rows, running);
        let mut step = CacheStep {
            page_size: self.page_size,
            layers: &mut self.layers,
            seen,
            slots,
        };
        let x_nd = model.forward(embedded_nd, &positions, &mut step);
        model.norm.forward(drawing_rows(x_nd, rows, running))
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

/// The rows of one step: what they see, and where their keys and values are written.
struct CacheStep<'a> {
    layers: &'a mut [LayerPools],
    page_size: usize,
    seen: Vec<PagedRow<'a>>,
    slots: Vec<usize>,
}

impl Attend for CacheStep<'_> {
    fn grouped(&mut self, layer: usize, heads: Heads, plan: &GroupedPlan) -> Tensor<2> {
        let Some(LayerPools::Grouped(keys, values)) = self.layers.get_mut(layer) else {
            unreachable!("the pools of a layer follow its plan");
        };
        keys.inplace(|keys| write_slots(keys, heads.k_nc, &self.slots));
        values.inplace(|values| write_slots(values, heads.v_nc, &self.slots));
        let options = PagedOptions {
            attention: plan.options(),
            page_size: self.page_size,
            value_width: plan.head_dim,
        };
        let (keys, values) = (keys.clone(), values.clone());
        paged_attention(
            heads.q_nc,
            keys,
            values,
            heads.sinks_h,
            &self.seen,
            &options,
        )
    }

    /// Computes latent attention without the keys and values of the heads: the projection to a head's keys is applied to
    /// its queries instead, and that to its values to the weighted sum of latent vectors.
    fn latent(&mut self, layer: usize, heads: LatentHeads<'_>, plan: &LatentPlan) -> Tensor<2> {
        let Some(LayerPools::Latent(pool)) = self.layers.get_mut(layer) else {
            unreachable!("the pools of a layer follow its plan");
        };
        let [n, h, _] = heads.q_plain_nhe.dims();
        let new_nc = Tensor::cat(vec![heads.latent_nr, heads.key_rotary_nr], 1);
        pool.inplace(|pool| write_slots(pool, new_nc, &self.slots));
        let up_her =
            heads
                .up
                .weight
                .val()
                .reshape([h, plan.plain_width + plan.value_width, plan.key_rank]);
        let up = |head: usize, first: usize, width: usize| {
            let up_er = up_her.clone().narrow(0, head, 1).narrow(1, first, width);
            up_er.reshape([width, plan.key_rank])
        };
        let query = |head: usize| {
            let of_head = |x_nhe: &Tensor<3>, width: usize| {
                x_nhe.clone().narrow(1, head, 1).reshape([n, width])
            };
            let plain_ne = of_head(&heads.q_plain_nhe, plan.plain_width);
            let latent_nr = linear(plain_ne, up(head, 0, plan.plain_width).transpose());
            let rotary_ne = of_head(&heads.q_rotary_nhe, plan.rotary_width);
            [latent_nr, rotary_ne]
        };
        let q_nc = Tensor::cat((0..h).flat_map(query).collect(), 1);
        let options = PagedOptions {
            attention: AttentionOptions {
                key_heads: 1,
                ..plan.options()
            },
            page_size: self.page_size,
            value_width: plan.key_rank,
        };
        let (keys, values) = (pool.clone(), pool.clone());
        let sums_nc = paged_attention(q_nc, keys, values, None, &self.seen, &options);
        let value = |head: usize| {
            let sum_nr = sums_nc
                .clone()
                .narrow(1, head * plan.key_rank, plan.key_rank);
            linear(sum_nr, up(head, plan.plain_width, plan.value_width))
        };
        Tensor::cat((0..h).map(value).collect(), 1)
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
