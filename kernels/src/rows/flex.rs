//! The plain-loop form: rows in parallel, and the columns of a row in order.
//!
//! A row is read in blocks that stay in the first-level cache. A block is converted to the computing type, the logits
//! of support tokens are taken out, and the rest enters a running maximum and sum. The sum within a block is in the
//! computing type, in several lanes; the sums of blocks are added in f64.

use super::{
    EMPTY_NATS, LogQSum, LogitTransform, MASKED, RowOps, TAIL_FLOOR_NATS, TransformConstants,
    extra_columns, stats_dtype,
};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, TensorData, bf16, f16};

use crate::flex::{compact, elements, shape2};
use crate::float::{ComputeFloat, StoredFloat};
use crate::simd::vectorize_closure;
use crate::team::for_each_chunk;

impl RowOps for Flex {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        transform: LogitTransform,
        sum: LogQSum,
    ) -> FloatTensor<Self> {
        let constants = transform.constants(logits.shape()[1]);
        let logits = logits.to_contiguous();
        let support = support.to_contiguous();
        match logits.dtype() {
            DType::F64 => all_stats::<f64, f64>(&logits, &support, constants, sum),
            DType::F32 => all_stats::<f32, f32>(&logits, &support, constants, sum),
            DType::F16 => all_stats::<f16, f32>(&logits, &support, constants, sum),
            DType::BF16 => all_stats::<bf16, f32>(&logits, &support, constants, sum),
            other => unreachable!("burn's float tensors are never {other:?}"),
        }
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        transform: LogitTransform,
    ) -> FloatTensor<Self> {
        let constants = transform.constants(logits.shape()[1]);
        let inputs = [support, stats, gradient].map(|t| t.to_contiguous());
        match logits.dtype() {
            DType::F64 => all_gradients::<f64, f64>(logits, &inputs, constants),
            DType::F32 => all_gradients::<f32, f32>(logits, &inputs, constants),
            DType::F16 => all_gradients::<f16, f32>(logits, &inputs, constants),
            DType::BF16 => all_gradients::<bf16, f32>(logits, &inputs, constants),
            other => unreachable!("burn's float tensors are never {other:?}"),
        }
    }
}

impl TransformConstants {
    /// Computes the softmax logit s and ds/dz from the raw logit z.
    #[inline(always)]
    pub(crate) fn apply<W: ComputeFloat>(&self, z: W) -> (W, W) {
        let y = z.mul(W::from_f64(self.scale));
        let slope = W::from_f64(self.scale * self.inv_temperature);
        if self.softcap == 0.0 {
            return (y.mul(W::from_f64(self.inv_temperature)), slope);
        }
        let t = y.mul(W::from_f64(1.0 / self.softcap)).tanh();
        let s = t.mul(W::from_f64(self.softcap * self.inv_temperature));
        (s, slope.mul(W::from_f64(1.0).sub(t.mul(t))))
    }

    /// Computes ds/dz from the softmax logit s.
    fn slope_at(&self, s: f64) -> f64 {
        let slope = self.scale * self.inv_temperature;
        if self.softcap == 0.0 {
            return slope;
        }
        let t = s / (self.softcap * self.inv_temperature);
        slope * (1.0 - t * t)
    }
}

/// Columns per block.
const BLOCK: usize = 1024;
/// Independent partial sums: a sum in order could not be vectorised.
const LANES: usize = 16;

/// Computes the statistics of all rows.
fn all_stats<S: StoredFloat<W>, W: ComputeFloat>(
    logits: &FlexTensor,
    support: &FlexTensor,
    transform: TransformConstants,
    sum: LogQSum,
) -> FlexTensor {
    let ([n, v], [_, k]) = (shape2(logits), shape2(support));
    let (logits, support) = (elements::<S>(logits), elements::<i32>(support));
    let width = k + extra_columns(sum);
    let mut out = vec![W::from_f64(0.0); n * width];
    for_each_chunk(&mut out, width, |row, out| {
        let support = &support[row * k..(row + 1) * k];
        if support.first() == Some(&MASKED) {
            out[..=k].fill(W::from_f64(EMPTY_NATS));
            return;
        }
        let mut sorted: Vec<_> = filled_slots(support, transform.vocab).collect();
        sorted.sort_unstable_by_key(|(_, id)| *id);
        let z = &logits[row * v..row * v + transform.vocab];
        row_stats(z, &sorted, transform, sum, out);
    });
    FlexTensor::from_data(TensorData::new(out, [n, width]))
}

/// Computes the statistics of one row. `sorted` holds the filled slots of the support and their ids, ordered by id.
fn row_stats<S: StoredFloat<W>, W: ComputeFloat>(
    z: &[S],
    sorted: &[(usize, usize)],
    transform: TransformConstants,
    sum: LogQSum,
    out: &mut [W],
) {
    let k = out.len() - extra_columns(sum);
    out[..k].fill(W::from_f64(EMPTY_NATS));
    let sums = vectorize_closure(
        #[inline(always)]
        || row_sums(z, sorted, transform, sum, out),
    );
    let mut on_support = RunningSum::default();
    for (slot, _) in sorted {
        on_support.add(out[*slot].into_f64(), 1.0);
    }
    let mut all = sums.tail;
    all.add(on_support.largest, on_support.total);
    let log_z = floored(all.log());
    for (slot, _) in sorted {
        out[*slot] = W::from_f64(floored(out[*slot].into_f64() - log_z));
    }
    out[k] = W::from_f64(if sums.tail.total == 0.0 {
        TAIL_FLOOR_NATS
    } else {
        sums.tail.log() - log_z
    });
    out[k + 1] = W::from_f64(log_z);
    if sum == LogQSum::Included {
        out[k + 2] = W::from_f64(sums.logits - z.len() as f64 * log_z);
    }
}

/// Raises a log-probability to at least [`EMPTY_NATS`]. NaN stays NaN, so that it is noticed.
fn floored(log: f64) -> f64 {
    if log < EMPTY_NATS { EMPTY_NATS } else { log }
}

/// Σ exp(s), stored as `total` = Σ exp(s − `largest`) with the largest s so far.
#[derive(Clone, Copy)]
struct RunningSum {
    largest: f64,
    total: f64,
}

impl Default for RunningSum {
    fn default() -> Self {
        Self {
            largest: f64::NEG_INFINITY,
            total: 0.0,
        }
    }
}

impl RunningSum {
    /// Adds exp(largest) · total.
    #[inline(always)]
    fn add(&mut self, largest: f64, total: f64) {
        if total.is_nan() || largest.is_nan() {
            self.total = f64::NAN;
        } else if largest > self.largest {
            // Before the first addition, `self.largest` is −∞ and its exponential is 0.
            self.total = self.total * (self.largest - largest).exp() + total;
            self.largest = largest;
        } else if largest > f64::NEG_INFINITY {
            self.total += total * (largest - self.largest).exp();
        }
    }

    /// The logarithm of the sum; −∞ if nothing was added.
    fn log(&self) -> f64 {
        self.largest + self.total.ln()
    }
}

struct RowSums {
    /// Σ exp(s) over the tail.
    tail: RunningSum,
    /// Σ s over all columns, if requested.
    logits: f64,
}

/// Reads a row once: writes the logits s of support tokens to their slots of `out`, and sums the rest.
#[inline(always)]
fn row_sums<S: StoredFloat<W>, W: ComputeFloat>(
    z: &[S],
    sorted: &[(usize, usize)],
    transform: TransformConstants,
    sum: LogQSum,
    out: &mut [W],
) -> RowSums {
    let mut tail = RunningSum::default();
    let mut all = 0.0;
    let mut support = sorted.iter().peekable();
    let lowest = W::NEG_INFINITY;
    let mut block = [lowest; BLOCK];
    let is_identity = transform.is_identity();
    for (start, z) in (0..).step_by(BLOCK).zip(z.chunks(BLOCK)) {
        let len = z.len();
        if is_identity {
            for (s, z) in block.iter_mut().zip(z) {
                *s = z.widen();
            }
        } else {
            for (s, z) in block.iter_mut().zip(z) {
                *s = transform.apply(z.widen()).0;
            }
        }
        // Lanes beyond the end of the row are set to values that add nothing.
        let padded = len.next_multiple_of(LANES);
        if sum == LogQSum::Included {
            block[len..padded].fill(W::from_f64(0.0));
            all += block_sum(&block[..padded]);
        }
        block[len..padded].fill(lowest);
        while let Some((slot, id)) = support.next_if(|(_, id)| *id < start + len) {
            out[*slot] = block[id - start];
            block[id - start] = lowest;
        }
        let block = &block[..padded];
        let largest = block_largest(block);
        if largest.into_f64() != f64::NEG_INFINITY {
            let mut sums = [W::from_f64(0.0); LANES];
            for columns in block.chunks_exact(LANES) {
                for (sum, s) in sums.iter_mut().zip(columns) {
                    *sum = sum.add(s.sub(largest).exp());
                }
            }
            let total = sums.iter().map(|sum| sum.into_f64()).sum();
            tail.add(largest.into_f64(), total);
        }
    }
    RowSums { tail, logits: all }
}

/// Sums a block of whole lanes.
#[inline(always)]
fn block_sum<W: ComputeFloat>(block: &[W]) -> f64 {
    let mut sums = [W::from_f64(0.0); LANES];
    for columns in block.chunks_exact(LANES) {
        for (sum, s) in sums.iter_mut().zip(columns) {
            *sum = sum.add(*s);
        }
    }
    sums.iter().map(|sum| sum.into_f64()).sum()
}

/// Returns the largest number of a block of whole lanes; NaN if the block has one.
#[inline(always)]
fn block_largest<W: ComputeFloat>(block: &[W]) -> W {
    let larger = |m: W, s: W| if m >= s { m } else { s };
    let mut largest = [W::NEG_INFINITY; LANES];
    for columns in block.chunks_exact(LANES) {
        for (largest, s) in largest.iter_mut().zip(columns) {
            *largest = larger(*largest, *s);
        }
    }
    largest.into_iter().fold(W::NEG_INFINITY, larger)
}

/// Writes the gradient of all rows over the logits, which are copied first if their storage is shared.
fn all_gradients<S: StoredFloat<W>, W: ComputeFloat>(
    logits: FlexTensor,
    [support, stats, gradient]: &[FlexTensor; 3],
    transform: TransformConstants,
) -> FlexTensor {
    debug_assert_eq!(stats.dtype(), stats_dtype(logits.dtype()));
    let ([_, v], [_, k], [_, width]) = (shape2(&logits), shape2(support), shape2(stats));
    let support = elements::<i32>(support);
    let (stats, gradient) = (elements::<W>(stats), elements::<W>(gradient));
    let mut logits = compact(logits);
    for_each_chunk(logits.storage_mut::<S>(), v, |row, z| {
        let columns = row * width..(row + 1) * width;
        let (z, padding) = z.split_at_mut(transform.vocab);
        padding.fill(S::narrow(W::from_f64(0.0)));
        let support = &support[row * k..(row + 1) * k];
        if support.first() == Some(&MASKED) {
            z.fill(S::narrow(W::from_f64(0.0)));
        } else {
            let (stats, gradient) = (&stats[columns.clone()], &gradient[columns]);
            row_gradient(z, support, stats, gradient, transform);
        }
    });
    logits
}

/// Writes the gradient of one row over its logits; `h` is the gradient with respect to the statistics.
fn row_gradient<S: StoredFloat<W>, W: ComputeFloat>(
    z: &mut [S],
    support: &[i32],
    stats: &[W],
    h: &[W],
    transform: TransformConstants,
) {
    let (k, vocab) = (support.len(), z.len());
    let log_z = stats[k + 1].into_f64();
    let has_tail = stats[k].into_f64() != W::from_f64(TAIL_FLOOR_NATS).into_f64();
    let h_tail = if has_tail { h[k].into_f64() } else { 0.0 };
    // No gradient passes through log q at its lower bound.
    let empty = W::from_f64(EMPTY_NATS).into_f64();
    let is_above_floor = |slot: usize| stats[slot].into_f64() > empty;
    let on_support: f64 = filled_slots(support, vocab)
        .filter(|(slot, _)| is_above_floor(*slot))
        .map(|(slot, _)| h[slot].into_f64())
        .sum();
    let u = h.get(k + 2).map_or(0.0, |u| u.into_f64());
    let h_sum = on_support + h_tail - h[k + 1].into_f64() + vocab as f64 * u;
    // q_j h_tail / q_tail − q_j H = exp(s_j − lse_tail) (h_tail − q_tail H) takes one exponential and does not overflow
    // if the tail is tiny.
    let (shift, factor) = if has_tail {
        let log_q_tail = stats[k].into_f64();
        (log_z + log_q_tail, h_tail - log_q_tail.exp() * h_sum)
    } else {
        (log_z, -h_sum)
    };
    vectorize_closure(
        #[inline(always)]
        || write_tail_gradient(z, transform, shift, factor, u),
    );
    for (slot, id) in filled_slots(support, vocab) {
        let log_q = stats[slot].into_f64();
        let h_slot = if is_above_floor(slot) {
            h[slot].into_f64()
        } else {
            0.0
        };
        let ds = h_slot - log_q.exp() * h_sum + u;
        z[id] = S::narrow(W::from_f64(ds * transform.slope_at(log_q + log_z)));
    }
}

/// Writes the gradient of a tail token over every column of a row.
#[inline(always)]
fn write_tail_gradient<S: StoredFloat<W>, W: ComputeFloat>(
    z: &mut [S],
    transform: TransformConstants,
    shift: f64,
    factor: f64,
    u: f64,
) {
    let [shift, factor, u] = [shift, factor, u].map(W::from_f64);
    if transform.is_identity() {
        for z in z {
            *z = S::narrow(z.widen().sub(shift).exp().mul(factor).add(u));
        }
    } else {
        for z in z {
            let (s, slope) = transform.apply(z.widen());
            *z = S::narrow(s.sub(shift).exp().mul(factor).add(u).mul(slope));
        }
    }
}

/// The filled slots of a support and their ids.
fn filled_slots(support: &[i32], vocab: usize) -> impl Iterator<Item = (usize, usize)> {
    support.iter().enumerate().filter_map(move |(slot, &id)| {
        let id = usize::try_from(id).ok()?;
        (id < vocab).then_some((slot, id))
    })
}
