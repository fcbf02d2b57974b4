//! Capture in tensor operations, which devices other than the CPU run and which the tests compare the plain loops
//! with. It allocates several tensors of the logits' size, and reads `[n, k + c]`, `[n, m]` and a few columns `[n, 1]`
//! back.

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData, TensorReadError};

use super::{CaptureOptions, CaptureRow, Captured, TailSums, summarize};
use crate::rows::reference::ABSENT;

/// Computes [`capture`](super::capture) in tensor operations, on any device.
///
/// # Errors
/// Returns an error if the device fails to return its results.
pub fn capture_reference(
    logits_nv: Tensor<2>,
    rows: &[CaptureRow],
    options: &CaptureOptions<'_>,
) -> Result<Vec<Option<Captured>>, TensorReadError> {
    let [_, v] = logits_nv.dims();
    let vocab = options.head.vocab.map_or(v, |vocab| vocab.min(v));
    let dtype = match logits_nv.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let s_nv = logits_nv.inner().narrow(1, 0, vocab).cast(dtype);
    let s_nv = options.head.apply(s_nv);

    let kept = rows.iter().map(|row| row.kept.len()).max().unwrap_or(0);
    let in_support_nv = top_k_indicator(&s_nv, options.top_k) + kept_indicator(&s_nv, rows, kept);
    let in_support_nv = in_support_nv.greater_elem(0.5);
    let support_s_nv = s_nv
        .clone()
        .mask_fill(in_support_nv.clone().bool_not(), ABSENT);
    let slots = options.top_k.saturating_add(kept).clamp(1, vocab);
    let (support_nk, ids_nk) = support_s_nv.topk_with_indices(slots, 1);
    let count_n1 = in_support_nv.clone().int().sum_dim(1);

    let tail_nv = s_nv.clone().mask_fill(in_support_nv, ABSENT);
    let largest_n1 = tail_nv.clone().max_dim(1);
    // For absent columns, the exponential of the bound is 0, and so is its product with the bound.
    let shifted_nv = (tail_nv - largest_n1.clone()).clamp_min(-1e4);
    let exp_nv = shifted_nv.clone().exp();
    let mut columns = vec![
        s_nv.is_nan().int().sum_dim(1).float().cast(dtype),
        count_n1.float().cast(dtype),
        largest_n1,
        exp_nv.clone().sum_dim(1),
        (exp_nv.clone() * shifted_nv.clone()).sum_dim(1),
    ];
    for temperature in options.temperatures {
        columns.push((shifted_nv.clone() / *temperature).exp().sum_dim(1));
    }
    let results = HostResults {
        vocab,
        slots,
        width: columns.len(),
        columns: read(Tensor::cat(columns, 1))?,
        support: read(support_nk)?,
        ids: ids_nk.try_into_vec_as::<i64>()?,
        draws: match options.draws {
            0 => None,
            draws => Some(draw(exp_nv, rows, draws)?),
        },
    };
    let rows = rows.iter().enumerate();
    let captured = rows.map(|(index, row)| results.captured(index, row, options.temperatures));
    Ok(captured.collect())
}

/// The results of all rows, read back from the device.
struct HostResults {
    vocab: usize,
    /// Columns of `support` and `ids`.
    slots: usize,
    support: Vec<f64>,
    ids: Vec<i64>,
    /// Columns of `columns`.
    width: usize,
    /// For each row: the number of NaN, the size of the support, and the sums over the tail.
    columns: Vec<f64>,
    draws: Option<Vec<Vec<(u32, u32)>>>,
}

impl HostResults {
    /// Assembles one row; `None` if it is no distribution.
    fn captured(&self, index: usize, row: &CaptureRow, temperatures: &[f32]) -> Option<Captured> {
        let range = index * self.slots..(index + 1) * self.slots;
        let filled = self.support.get(range.clone())?.iter();
        let filled = filled.zip(self.ids.get(range)?);
        let filled = filled.filter(|(s, _)| **s > ABSENT / 2.0);
        let filled: Vec<(f64, u32)> = filled.map(|(s, id)| (*s, *id as u32)).collect();
        let columns = index * self.width..(index + 1) * self.width;
        let [nan, count, largest, total, weighted, at @ ..] = self.columns.get(columns)? else {
            return None;
        };
        let in_vocabulary = |id: &u32| (*id as usize) < self.vocab;
        let are_legal = row.kept.iter().all(in_vocabulary);
        if *nan > 0.0 || filled.len() != *count as usize || !are_legal {
            return None;
        }
        let tail = match *largest > ABSENT / 2.0 {
            true => TailSums {
                largest: *largest,
                total: *total,
                weighted: *weighted,
                at: at.to_vec(),
            },
            false => TailSums::empty(at.len()),
        };
        let mut captured = summarize(&filled, &tail, temperatures)?;
        if let Some(draws) = self.draws.as_ref().filter(|_| tail.total > 0.0) {
            let pairs = draws.get(index)?.iter().copied();
            (captured.draw_ids, captured.draw_counts) = pairs.unzip();
        }
        Some(captured)
    }
}

/// Returns 1 for the k largest columns, the lower id first among equals, and 0 for the others: `[n, v]`.
fn top_k_indicator(s_nv: &Tensor<2>, k: usize) -> Tensor<2> {
    let [_, v] = s_nv.dims();
    match k {
        0 => s_nv.zeros_like(),
        k if k >= v => s_nv.ones_like(),
        k => {
            let kth_n1 = s_nv.clone().topk(k, 1).min_dim(1);
            let above_nv = s_nv.clone().greater(kth_n1.clone().expand(s_nv.dims()));
            let equal_nv = s_nv.clone().equal(kth_n1.expand(s_nv.dims()));
            let wanted_n1 = (above_nv.clone().int().sum_dim(1) - k as i64).neg();
            let order_nv = equal_nv.clone().int().cumsum(1);
            let early_nv = order_nv.lower_equal(wanted_n1.expand(s_nv.dims()));
            let chosen_nv = above_nv.bool_or(equal_nv.bool_and(early_nv));
            chosen_nv.float().cast(s_nv.dtype())
        }
    }
}

/// Returns at least 1 for the extra ids of a row and 0 for the others: `[n, v]`.
fn kept_indicator(s_nv: &Tensor<2>, rows: &[CaptureRow], kept: usize) -> Tensor<2> {
    let [n, v] = s_nv.dims();
    let device = (&s_nv.device(), s_nv.dtype());
    if kept == 0 {
        return s_nv.zeros_like();
    }
    // An empty slot adds 0 to column 0.
    let slot = |row: &CaptureRow, slot: usize| {
        let id = row.kept.get(slot).copied().unwrap_or(u32::MAX);
        ((id as usize) < v).then_some(id)
    };
    let slots = || {
        rows.iter()
            .flat_map(|row| (0..kept).map(move |at| slot(row, at)))
    };
    let ids: Vec<i32> = slots().map(|id| id.unwrap_or(0) as i32).collect();
    let ones: Vec<f32> = slots().map(|id| f32::from(id.is_some())).collect();
    let ids_nc = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, kept]), device.0);
    let ones_nc = Tensor::<2>::from_data(TensorData::new(ones, [n, kept]), device);
    Tensor::zeros([n, v], device).scatter(1, ids_nc, ones_nc, IndexingUpdateOp::Add)
}

/// Draws from the tail of each row, and returns the ids with their counts. With N(F) = ⌈m F − u⌉ points below a share F of
/// the mass, column j is drawn N(F_j) − N(F_{j−1}) times.
fn draw(
    exp_nv: Tensor<2>,
    rows: &[CaptureRow],
    draws: u32,
) -> Result<Vec<Vec<(u32, u32)>>, TensorReadError> {
    let [n, v] = exp_nv.dims();
    let uniforms: Vec<f64> = rows.iter().map(CaptureRow::uniform).collect();
    let device = (&exp_nv.device(), exp_nv.dtype());
    let uniforms_n1 = Tensor::<2>::from_data(TensorData::new(uniforms, [n, 1]), device);
    let mass_nv = exp_nv.cumsum(1);
    let total_n1 = mass_nv.clone().narrow(1, v - 1, 1);
    let share_nv = mass_nv / total_n1;
    let below_nv = (share_nv * f64::from(draws) - uniforms_n1)
        .ceil()
        .clamp(0.0, f64::from(draws));
    let zero_n1 = Tensor::zeros([n, 1], device);
    let before_nv = Tensor::cat(vec![zero_n1, below_nv.clone()], 1).narrow(1, 0, v);
    let slots = v.min(draws as usize);
    let (counts_nm, ids_nm) = (below_nv - before_nv).topk_with_indices(slots, 1);
    let (counts, ids) = (read(counts_nm)?, ids_nm.try_into_vec_as::<i64>()?);
    let of_row = |(counts, ids): (&[f64], &[i64])| {
        let pairs = counts.iter().zip(ids).filter(|(count, _)| **count > 0.5);
        let mut pairs: Vec<_> = pairs.map(|(c, id)| (*id as u32, *c as u32)).collect();
        pairs.sort_unstable();
        pairs
    };
    Ok(counts
        .chunks(slots)
        .zip(ids.chunks(slots))
        .map(of_row)
        .collect())
}

fn read(tensor: Tensor<2>) -> Result<Vec<f64>, TensorReadError> {
    tensor.try_into_vec_as::<f64>()
}
