//! The plain-loop form: rows in parallel, each row in order, sums in f64.

use super::{Head, HeadNumbers, RowOps, TAIL_FLOOR_NATS, stats_dtype};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Element, TensorData, bf16, f16};
use rayon::prelude::*;

use crate::simd::vectorize;

impl RowOps for Flex {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self> {
        let head = head.numbers(logits.shape()[1]);
        let logits = logits.to_contiguous();
        let support = support.to_contiguous();
        match logits.dtype() {
            DType::F64 => stats::<f64, f64>(&logits, &support, head),
            DType::F32 => stats::<f32, f32>(&logits, &support, head),
            DType::F16 => stats::<f16, f32>(&logits, &support, head),
            DType::BF16 => stats::<bf16, f32>(&logits, &support, head),
            other => unreachable!("burn's float tensors are never {other:?}"),
        }
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self> {
        let head = head.numbers(logits.shape()[1]);
        let [logits, support, stats, gradient] =
            [logits, support, stats, gradient].map(|t| t.to_contiguous());
        match logits.dtype() {
            DType::F64 => grad::<f64, f64>(&logits, &support, &stats, &gradient, head),
            DType::F32 => grad::<f32, f32>(&logits, &support, &stats, &gradient, head),
            DType::F16 => grad::<f16, f32>(&logits, &support, &stats, &gradient, head),
            DType::BF16 => grad::<bf16, f32>(&logits, &support, &stats, &gradient, head),
            other => unreachable!("burn's float tensors are never {other:?}"),
        }
    }
}

/// What a logit is stored as, and what it is computed in.
pub(crate) trait Stored<W>: Element + bytemuck::Pod + Send + Sync {
    fn widen(self) -> W;
    fn narrow(value: W) -> Self;
}

/// The type that a row is computed in: f32, or f64 for f64 logits.
pub(crate) trait Wide: Element + bytemuck::Pod + Send + Sync + PartialOrd {
    fn of(value: f64) -> Self;
    fn f64(self) -> f64;
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
}

macro_rules! wide {
    ($t:ty, $exp:path) => {
        impl Wide for $t {
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
        }
        impl Stored<$t> for $t {
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(value: $t) -> $t {
                value
            }
        }
    };
}
wide!(f32, crate::exp::exp);
wide!(f64, f64::exp);

macro_rules! stored_as_half {
    ($t:ty) => {
        impl Stored<f32> for $t {
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(value: f32) -> $t {
                <$t>::from_f32(value)
            }
        }
    };
}
stored_as_half!(f16);
stored_as_half!(bf16);

impl HeadNumbers {
    /// The softmax logit s, and ds/dz.
    #[inline(always)]
    pub(crate) fn apply<W: Wide>(&self, z: W) -> (W, W) {
        let y = z.mul(W::of(self.scale));
        let slope = W::of(self.scale * self.inv_temperature);
        if self.softcap == 0.0 {
            return (y.mul(W::of(self.inv_temperature)), slope);
        }
        let t = y.mul(W::of(1.0 / self.softcap)).tanh();
        let s = t.mul(W::of(self.softcap * self.inv_temperature));
        (s, slope.mul(W::of(1.0).sub(t.mul(t))))
    }
}

fn stats<S: Stored<W>, W: Wide>(
    logits: &FlexTensor,
    support: &FlexTensor,
    head: HeadNumbers,
) -> FlexTensor {
    let (n, v) = dims(logits);
    let (_, k) = dims(support);
    let (logits, support) = (values::<S>(logits, n * v), values::<i32>(support, n * k));
    let mut out = vec![W::of(0.0); n * (k + 2)];
    out.par_chunks_mut(k + 2).enumerate().for_each_init(
        Vec::new,
        |s_row: &mut Vec<W>, (row, out)| {
            let logits = &logits[row * v..row * v + head.vocab];
            s_row.clear();
            s_row.extend(logits.iter().map(|&z| head.apply(z.widen()).0));
            stats_row(s_row, &support[row * k..(row + 1) * k], out);
        },
    );
    FlexTensor::from_data(TensorData::new(out, [n, k + 2]))
}

fn stats_row<W: Wide>(s: &[W], support: &[i32], out: &mut [W]) {
    let k = support.len();
    let mut sorted: Vec<usize> = present(support, s.len()).map(|(_, id)| id).collect();
    sorted.sort_unstable();
    // The tail is what lies between the support's ids, so no column is tested for membership.
    let starts = std::iter::once(0).chain(sorted.iter().map(|id| id + 1));
    let ends = sorted.iter().copied().chain([s.len()]);
    let gaps: Vec<&[W]> = starts
        .zip(ends)
        .map(|(start, end)| &s[start..end])
        .collect();
    let on_support: Vec<W> = sorted.iter().map(|&id| s[id]).collect();
    let log_tail = log_sum_exp(&gaps);
    let log_support = log_sum_exp(&[&on_support]);
    let (low, high) = (log_tail.min(log_support), log_tail.max(log_support));
    let log_z = high + (low - high).exp().ln_1p();
    for (slot, id) in present(support, s.len()) {
        out[slot] = W::of(s[id].f64() - log_z);
    }
    out[k] = W::of(if log_tail.is_finite() {
        log_tail - log_z
    } else {
        TAIL_FLOOR_NATS
    });
    out[k + 1] = W::of(log_z);
}

/// Sums that are kept beside one another: a sum in order could not be vectorised.
const LANES: usize = 16;

/// Over all parts together, against their own maximum; −∞ for no columns. The sum is kept in f64.
fn log_sum_exp<W: Wide>(parts: &[&[W]]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let mut largest = [W::of(f64::NEG_INFINITY); LANES];
            for columns in parts.iter().flat_map(|part| part.chunks(LANES)) {
                for (largest, x) in largest.iter_mut().zip(columns) {
                    *largest = if *x > *largest { *x } else { *largest };
                }
            }
            let first = W::of(f64::NEG_INFINITY);
            let max = largest
                .into_iter()
                .fold(first, |m, x| if x > m { x } else { m });
            if max.f64() == f64::NEG_INFINITY {
                return f64::NEG_INFINITY;
            }
            let mut sums = [0.0f64; LANES];
            for columns in parts.iter().flat_map(|part| part.chunks(LANES)) {
                for (sum, x) in sums.iter_mut().zip(columns) {
                    *sum += x.sub(max).exp().f64();
                }
            }
            max.f64() + sums.iter().sum::<f64>().ln()
        },
    )
}

fn grad<S: Stored<W>, W: Wide>(
    logits: &FlexTensor,
    support: &FlexTensor,
    stats: &FlexTensor,
    gradient: &FlexTensor,
    head: HeadNumbers,
) -> FlexTensor {
    debug_assert_eq!(stats.dtype(), stats_dtype(logits.dtype()));
    let (n, v) = dims(logits);
    let (_, k) = dims(support);
    let (logits, support) = (values::<S>(logits, n * v), values::<i32>(support, n * k));
    let stats = values::<W>(stats, n * (k + 2));
    let gradient = values::<W>(gradient, n * (k + 2));
    let mut out = vec![S::narrow(W::of(0.0)); n * v];
    out.par_chunks_mut(v).enumerate().for_each(|(row, out)| {
        grad_row(
            &logits[row * v..row * v + head.vocab],
            &support[row * k..(row + 1) * k],
            &stats[row * (k + 2)..(row + 1) * (k + 2)],
            &gradient[row * (k + 2)..(row + 1) * (k + 2)],
            head,
            &mut out[..head.vocab],
        );
    });
    FlexTensor::from_data(TensorData::new(out, [n, v]))
}

fn grad_row<S: Stored<W>, W: Wide>(
    z: &[S],
    support: &[i32],
    stats: &[W],
    h: &[W],
    head: HeadNumbers,
    out: &mut [S],
) {
    let k = support.len();
    let log_z = stats[k + 1].f64();
    let has_tail = stats[k].f64() != W::of(TAIL_FLOOR_NATS).f64();
    let h_tail = if has_tail { h[k].f64() } else { 0.0 };
    let on_support: f64 = present(support, z.len())
        .map(|(slot, _)| h[slot].f64())
        .sum();
    let h_sum = on_support + h_tail - h[k + 1].f64();
    // q_j h_tail / q_tail − q_j H = exp(s_j − lse_tail) (h_tail − q_tail H): one exponential, and
    // nothing that overflows when the tail is tiny.
    let (shift, factor) = if has_tail {
        let log_q_tail = stats[k].f64();
        (log_z + log_q_tail, h_tail - log_q_tail.exp() * h_sum)
    } else {
        (log_z, -h_sum)
    };
    let (shift, factor) = (W::of(shift), W::of(factor));
    vectorize(
        #[inline(always)]
        || {
            for (out, &z) in out.iter_mut().zip(z) {
                let (s, slope) = head.apply(z.widen());
                *out = S::narrow(s.sub(shift).exp().mul(factor).mul(slope));
            }
        },
    );
    for (slot, id) in present(support, z.len()) {
        let (s, slope) = head.apply(z[id].widen());
        let q = (s.f64() - log_z).exp();
        out[id] = S::narrow(W::of((h[slot].f64() - q * h_sum) * slope.f64()));
    }
}

/// The filled slots of a support and their ids.
fn present(support: &[i32], vocab: usize) -> impl Iterator<Item = (usize, usize)> {
    support.iter().enumerate().filter_map(move |(slot, &id)| {
        let id = usize::try_from(id).ok()?;
        (id < vocab).then_some((slot, id))
    })
}

fn dims(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.layout().shape();
    (shape[0], shape[1])
}

fn values<E: Element + bytemuck::Pod>(tensor: &FlexTensor, len: usize) -> &[E] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<E>()[start..start + len]
}
