//! The plain-loop form: rows in parallel, each row in order.
//!
//! A row is read in blocks that stay in the first-level cache. A block is widened, what the support has
//! in it is put aside, and the rest goes into a running maximum and sum: within a block the sum is in
//! the computing type over lanes, and blocks are added up in f64.

use super::{
    EMPTY_NATS, Head, HeadNumbers, MASKED, RowOps, Sum, TAIL_FLOOR_NATS, columns, stats_dtype,
};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Element, TensorData, bf16, f16};
use rayon::prelude::*;

use crate::simd::vectorize_closure;

impl RowOps for Flex {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
        sum: Sum,
    ) -> FloatTensor<Self> {
        let head = head.numbers(logits.shape()[1]);
        let logits = logits.to_contiguous();
        let support = support.to_contiguous();
        match logits.dtype() {
            DType::F64 => stats::<f64, f64>(&logits, &support, head, sum),
            DType::F32 => stats::<f32, f32>(&logits, &support, head, sum),
            DType::F16 => stats::<f16, f32>(&logits, &support, head, sum),
            DType::BF16 => stats::<bf16, f32>(&logits, &support, head, sum),
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
        let [support, stats, gradient] = [support, stats, gradient].map(|t| t.to_contiguous());
        match logits.dtype() {
            DType::F64 => grad::<f64, f64>(logits, &support, &stats, &gradient, head),
            DType::F32 => grad::<f32, f32>(logits, &support, &stats, &gradient, head),
            DType::F16 => grad::<f16, f32>(logits, &support, &stats, &gradient, head),
            DType::BF16 => grad::<bf16, f32>(logits, &support, &stats, &gradient, head),
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
    /// Of what is at most 88.
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
}

macro_rules! wide {
    ($t:ty, $exp:path, $tanh:path) => {
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
                $tanh(self)
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
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
wide!(f32, crate::exp::exp_to_most, crate::exp::tanh);
wide!(f64, f64::exp, f64::tanh);

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

    /// ds/dz, from s.
    fn slope_at(&self, s: f64) -> f64 {
        let slope = self.scale * self.inv_temperature;
        if self.softcap == 0.0 {
            return slope;
        }
        let t = s / (self.softcap * self.inv_temperature);
        slope * (1.0 - t * t)
    }
}

/// Columns that are worked on at a time.
const BLOCK: usize = 1024;
/// Sums that are kept beside one another: a sum in order could not be vectorised.
const LANES: usize = 16;

fn stats<S: Stored<W>, W: Wide>(
    logits: &FlexTensor,
    support: &FlexTensor,
    head: HeadNumbers,
    sum: Sum,
) -> FlexTensor {
    let (n, v) = dims(logits);
    let (_, k) = dims(support);
    let (logits, support) = (values::<S>(logits, n * v), values::<i32>(support, n * k));
    let width = k + columns(sum);
    let mut out = vec![W::of(0.0); n * width];
    let rows = out.par_chunks_mut(width.max(1)).enumerate();
    rows.for_each_init(Vec::new, |sorted, (row, out)| {
        let support = &support[row * k..(row + 1) * k];
        if support.first() == Some(&MASKED) {
            out[..=k].fill(W::of(EMPTY_NATS));
            return;
        }
        sorted.clear();
        sorted.extend(present(support, head.vocab));
        sorted.sort_unstable_by_key(|(_, id)| *id);
        let z = &logits[row * v..row * v + head.vocab];
        stats_row(z, sorted, head, sum, out);
    });
    FlexTensor::from_data(TensorData::new(out, [n, width]))
}

/// `sorted`: slots of the support and their ids, by id.
fn stats_row<S: Stored<W>, W: Wide>(
    z: &[S],
    sorted: &[(usize, usize)],
    head: HeadNumbers,
    sum: Sum,
    out: &mut [W],
) {
    let k = out.len() - columns(sum);
    out[..k].fill(W::of(EMPTY_NATS));
    let walk = vectorize_closure(
        #[inline(always)]
        || walk(z, sorted, head, sum, out),
    );
    let mut on_support = Running::default();
    for (slot, _) in sorted {
        on_support.add(out[*slot].f64(), 1.0);
    }
    let mut whole = walk.tail;
    whole.add(on_support.largest, on_support.total);
    let log_z = floored(whole.log());
    for (slot, _) in sorted {
        out[*slot] = W::of(floored(out[*slot].f64() - log_z));
    }
    out[k] = W::of(if walk.tail.total == 0.0 {
        TAIL_FLOOR_NATS
    } else {
        walk.tail.log() - log_z
    });
    out[k + 1] = W::of(log_z);
    if sum == Sum::WithLogQ {
        out[k + 2] = W::of(walk.sum - z.len() as f64 * log_z);
    }
}

/// NaN stays, so that it is seen.
fn floored(log: f64) -> f64 {
    if log < EMPTY_NATS { EMPTY_NATS } else { log }
}

/// Σ exp(s), against the largest s so far.
#[derive(Clone, Copy)]
struct Running {
    largest: f64,
    total: f64,
}

impl Default for Running {
    fn default() -> Self {
        Self {
            largest: f64::NEG_INFINITY,
            total: 0.0,
        }
    }
}

impl Running {
    /// Adds exp(largest) · total.
    #[inline(always)]
    fn add(&mut self, largest: f64, total: f64) {
        if total.is_nan() || largest.is_nan() {
            self.total = f64::NAN;
        } else if largest > self.largest {
            // exp(−∞) = 0: before the first there is nothing.
            self.total = self.total * (self.largest - largest).exp() + total;
            self.largest = largest;
        } else if largest > f64::NEG_INFINITY {
            self.total += total * (largest - self.largest).exp();
        }
    }

    /// −∞ for nothing.
    fn log(&self) -> f64 {
        self.largest + self.total.ln()
    }
}

struct Walk {
    tail: Running,
    /// Σ s over all columns.
    sum: f64,
}

/// Reads a row once: leaves s of the support in its slots of `out`, and adds up the rest.
#[inline(always)]
fn walk<S: Stored<W>, W: Wide>(
    z: &[S],
    sorted: &[(usize, usize)],
    head: HeadNumbers,
    sum: Sum,
    out: &mut [W],
) -> Walk {
    let mut tail = Running::default();
    let mut all = 0.0;
    let mut rest = sorted.iter().peekable();
    let lowest = W::of(f64::NEG_INFINITY);
    let mut block = [lowest; BLOCK];
    let plain = head.is_plain();
    for (start, z) in (0..).step_by(BLOCK).zip(z.chunks(BLOCK)) {
        let len = z.len();
        if plain {
            for (s, z) in block.iter_mut().zip(z) {
                *s = z.widen();
            }
        } else {
            for (s, z) in block.iter_mut().zip(z) {
                *s = head.apply(z.widen()).0;
            }
        }
        // Lanes past the end add nothing.
        let padded = len.next_multiple_of(LANES);
        if sum == Sum::WithLogQ {
            block[len..padded].fill(W::of(0.0));
            all += lanes(&block[..padded], W::of(0.0), W::add);
        }
        block[len..padded].fill(lowest);
        while let Some((slot, id)) = rest.next_if(|(_, id)| *id < start + len) {
            out[*slot] = block[id - start];
            block[id - start] = lowest;
        }
        let block = &block[..padded];
        let largest = lanes_largest(block);
        if largest.f64() != f64::NEG_INFINITY {
            let mut sums = [W::of(0.0); LANES];
            for columns in block.chunks_exact(LANES) {
                for (sum, s) in sums.iter_mut().zip(columns) {
                    *sum = sum.add(s.sub(largest).exp());
                }
            }
            tail.add(largest.f64(), sums.iter().map(|sum| sum.f64()).sum());
        }
    }
    Walk { tail, sum: all }
}

#[inline(always)]
fn lanes<W: Wide>(block: &[W], first: W, add: impl Fn(W, W) -> W) -> f64 {
    let mut sums = [first; LANES];
    for columns in block.chunks_exact(LANES) {
        for (sum, s) in sums.iter_mut().zip(columns) {
            *sum = add(*sum, *s);
        }
    }
    sums.iter().map(|sum| sum.f64()).sum()
}

/// NaN if there is one.
#[inline(always)]
fn lanes_largest<W: Wide>(block: &[W]) -> W {
    let lowest = W::of(f64::NEG_INFINITY);
    let larger = |m: W, s: W| if m >= s { m } else { s };
    let mut largest = [lowest; LANES];
    for columns in block.chunks_exact(LANES) {
        for (largest, s) in largest.iter_mut().zip(columns) {
            *largest = larger(*largest, *s);
        }
    }
    largest.into_iter().fold(lowest, larger)
}

fn grad<S: Stored<W>, W: Wide>(
    logits: FlexTensor,
    support: &FlexTensor,
    stats: &FlexTensor,
    gradient: &FlexTensor,
    head: HeadNumbers,
) -> FlexTensor {
    debug_assert_eq!(stats.dtype(), stats_dtype(logits.dtype()));
    let (n, v) = dims(&logits);
    let (_, k) = dims(support);
    let (_, width) = dims(stats);
    let support = values::<i32>(support, n * k);
    let stats = values::<W>(stats, n * width);
    let gradient = values::<W>(gradient, n * width);
    let mut logits = alone(logits);
    // Copies what somebody else holds too.
    let rows = logits.storage_mut::<S>().par_chunks_mut(v.max(1));
    rows.enumerate().for_each(|(row, z)| {
        let of_row = row * width..(row + 1) * width;
        let (z, padding) = z.split_at_mut(head.vocab);
        padding.fill(S::narrow(W::of(0.0)));
        let support = &support[row * k..(row + 1) * k];
        if support.first() == Some(&MASKED) {
            z.fill(S::narrow(W::of(0.0)));
        } else {
            grad_row(z, support, &stats[of_row.clone()], &gradient[of_row], head);
        }
    });
    logits
}

/// Writes the gradient over the logits.
fn grad_row<S: Stored<W>, W: Wide>(
    z: &mut [S],
    support: &[i32],
    stats: &[W],
    h: &[W],
    head: HeadNumbers,
) {
    let (k, vocab) = (support.len(), z.len());
    let log_z = stats[k + 1].f64();
    let has_tail = stats[k].f64() != W::of(TAIL_FLOOR_NATS).f64();
    let h_tail = if has_tail { h[k].f64() } else { 0.0 };
    // What lies at the floor passes no gradient.
    let empty = W::of(EMPTY_NATS).f64();
    let above = |slot: usize| stats[slot].f64() > empty;
    let on_support: f64 = present(support, vocab)
        .filter(|(slot, _)| above(*slot))
        .map(|(slot, _)| h[slot].f64())
        .sum();
    let u = h.get(k + 2).map_or(0.0, |u| u.f64());
    let h_sum = on_support + h_tail - h[k + 1].f64() + vocab as f64 * u;
    // q_j h_tail / q_tail − q_j H = exp(s_j − lse_tail) (h_tail − q_tail H): one exponential, and
    // nothing that overflows when the tail is tiny.
    let (shift, factor) = if has_tail {
        let log_q_tail = stats[k].f64();
        (log_z + log_q_tail, h_tail - log_q_tail.exp() * h_sum)
    } else {
        (log_z, -h_sum)
    };
    vectorize_closure(
        #[inline(always)]
        || everywhere(z, head, shift, factor, u),
    );
    for (slot, id) in present(support, vocab) {
        let log_q = stats[slot].f64();
        let own = if above(slot) { h[slot].f64() } else { 0.0 };
        let ds = own - log_q.exp() * h_sum + u;
        z[id] = S::narrow(W::of(ds * head.slope_at(log_q + log_z)));
    }
}

/// As if every column were in the tail.
#[inline(always)]
fn everywhere<S: Stored<W>, W: Wide>(
    z: &mut [S],
    head: HeadNumbers,
    shift: f64,
    factor: f64,
    u: f64,
) {
    let (shift, factor, u) = (W::of(shift), W::of(factor), W::of(u));
    if head.is_plain() {
        for z in z {
            *z = S::narrow(z.widen().sub(shift).exp().mul(factor).add(u));
        }
    } else {
        for z in z {
            let (s, slope) = head.apply(z.widen());
            *z = S::narrow(s.sub(shift).exp().mul(factor).add(u).mul(slope));
        }
    }
}

/// The filled slots of a support and their ids.
fn present(support: &[i32], vocab: usize) -> impl Iterator<Item = (usize, usize)> {
    support.iter().enumerate().filter_map(move |(slot, &id)| {
        let id = usize::try_from(id).ok()?;
        (id < vocab).then_some((slot, id))
    })
}

/// A tensor whose memory is its numbers, one row behind the other.
fn alone(tensor: FlexTensor) -> FlexTensor {
    let numbers = tensor.layout().num_elements();
    let whole = tensor.is_contiguous() && tensor.bytes().len() == numbers * tensor.dtype().size();
    if whole {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

fn dims(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.layout().shape();
    (shape[0], shape[1])
}

fn values<E: Element + bytemuck::Pod>(tensor: &FlexTensor, len: usize) -> &[E] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<E>()[start..start + len]
}
