//! The paged KV cache of all layers, and the forward pass of one step over it.

use burn::tensor::{Int, Tensor, TensorData};
use potstill_kernels::{
    AttentionOptions, PagedOptions, PagedRow, linear, paged_attention, write_slots,
};

use super::pages::LayerGroup;
use super::schedule::{Schedule, Sequence, StepRow};
use crate::Decoder;
use crate::attend::{Attend, Heads, LatentHeads};
use crate::plan::{AttentionPlan, GroupedPlan, LatentPlan};
use crate::rotary::RowPosition;

/// The cache of all layers.
pub(super) struct KvCache {
    layers: Vec<LayerCache>,
    page_size: usize,
}

/// The cache of a layer.
struct LayerCache {
    /// Index of the layer's group, whose layers have their pages at the same places.
    group: usize,
    pools: LayerPools,
}

/// The pools of a layer.
// There is one for each layer, so the difference in size between the variants costs nothing.
#[allow(clippy::large_enum_variant)]
enum LayerPools {
    /// Keys and values, `[s, g·e]` each.
    Grouped(Tensor<2>, Tensor<2>),
    /// Latent vectors and the rotated part of the keys beside one another, `[s, key_rank + rotary_width]`.
    Latent(Tensor<2>),
}

impl KvCache {
    pub(super) fn new(model: &Decoder, schedule: &Schedule<'_>, page_size: usize) -> Self {
        let pool = |group: &LayerGroup, columns: usize| {
            let shape = [group.page_count() * page_size, columns];
            Tensor::zeros(shape, (&model.device(), model.dtype()))
        };
        let layers = model.config().plan.layers.iter();
        let layers = layers.zip(&schedule.layer_groups).map(|(layer, &group)| {
            let pool = |columns| pool(&schedule.groups[group], columns);
            let pools = match &layer.attention {
                AttentionPlan::Grouped(plan) => {
                    LayerPools::Grouped(pool(plan.key_columns()), pool(plan.key_columns()))
                }
                AttentionPlan::Latent(plan) => {
                    LayerPools::Latent(pool(plan.key_rank + plan.rotary_width))
                }
            };
            LayerCache { group, pools }
        });
        Self {
            layers: layers.collect(),
            page_size,
        }
    }

    /// Computes `rows` of the schedule's running sequences, and writes their keys and values. Returns the hidden states
    /// `[m, d]` after the final norm of the rows whose next token is drawn.
    pub(super) fn step(
        &mut self,
        model: &Decoder,
        rows: &[StepRow],
        schedule: &Schedule<'_>,
    ) -> Tensor<2> {
        let running = &schedule.running;
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
        let groups = 0..schedule.groups.len();
        let groups = groups.map(|group| GroupRows::new(rows, running, group, self.page_size));
        let mut step = CacheStep {
            layers: &mut self.layers,
            groups: groups.collect(),
        };
        let x_nd = model.forward(embedded_nd, &positions, &mut step);
        model.norm.forward(drawing_rows(x_nd, rows, running))
    }
}

/// The rows of one step in a group of layers: what they see, and the slots that their keys and values are written to.
struct GroupRows<'a> {
    page_size: usize,
    seen: Vec<PagedRow<'a>>,
    slots: Vec<usize>,
}

impl<'a> GroupRows<'a> {
    fn new(rows: &[StepRow], running: &'a [Sequence], group: usize, page_size: usize) -> Self {
        let seen_and_slot = |row: &StepRow| {
            let pages = running.get(row.sequence)?.pages.get(group)?;
            let index = row.position - pages.first;
            let page = pages.pages.get(index / page_size)?;
            let seen = PagedRow {
                pages: &pages.pages,
                first: pages.first,
                length: row.position + 1,
            };
            Some((seen, *page as usize * page_size + index % page_size))
        };
        // The schedule has given every row a page, so none is left out.
        let (seen, slots) = rows.iter().filter_map(seen_and_slot).unzip();
        Self {
            page_size,
            seen,
            slots,
        }
    }
}

/// The cache and the rows of one step.
struct CacheStep<'a> {
    layers: &'a mut [LayerCache],
    groups: Vec<GroupRows<'a>>,
}

impl<'a> CacheStep<'a> {
    /// Returns the pools of a layer, and the rows in its group.
    fn layer(&mut self, layer: usize) -> (&mut LayerPools, &GroupRows<'a>) {
        let layer = &mut self.layers[layer];
        (&mut layer.pools, &self.groups[layer.group])
    }
}

impl Attend for CacheStep<'_> {
    fn grouped(&mut self, layer: usize, heads: Heads, plan: &GroupedPlan) -> Tensor<2> {
        let (LayerPools::Grouped(keys, values), rows) = self.layer(layer) else {
            unreachable!("the pools of a layer follow its plan");
        };
        keys.inplace(|keys| write_slots(keys, heads.k_nc, &rows.slots));
        values.inplace(|values| write_slots(values, heads.v_nc, &rows.slots));
        let options = PagedOptions {
            attention: plan.options(),
            page_size: rows.page_size,
            value_width: plan.head_dim,
        };
        let (keys, values) = (keys.clone(), values.clone());
        paged_attention(
            heads.q_nc,
            keys,
            values,
            heads.sinks_h,
            &rows.seen,
            &options,
        )
    }

    /// Computes latent attention without the keys and values of the heads: the projection to a head's keys is applied to
    /// its queries instead, and that to its values to the weighted sum of latent vectors.
    fn latent(&mut self, layer: usize, heads: LatentHeads<'_>, plan: &LatentPlan) -> Tensor<2> {
        let (LayerPools::Latent(pool), rows) = self.layer(layer) else {
            unreachable!("the pools of a layer follow its plan");
        };
        let [n, h, _] = heads.q_plain_nhe.dims();
        let new_nc = Tensor::cat(vec![heads.latent_nr, heads.key_rotary_nr], 1);
        pool.inplace(|pool| write_slots(pool, new_nc, &rows.slots));
        let up_her =
            (heads.up.matrix)().reshape([h, plan.plain_width + plan.value_width, plan.key_rank]);
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
            page_size: rows.page_size,
            value_width: plan.key_rank,
        };
        let (keys, values) = (pool.clone(), pool.clone());
        let sums_nc = paged_attention(q_nc, keys, values, None, &rows.seen, &options);
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
