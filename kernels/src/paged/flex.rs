//! The plain-loop form: (row, key head) pairs in parallel, each in order; two passes over the keys'
//! scores, sums in f32 (f64 for f64).
//!
//! A pair's scores are held at once (r · length numbers a thread), so every sum runs over positions in
//! their order and no page boundary shows in the bits. Traffic: keys and values of a row once for
//! each key head.

use super::PagedRow;
use crate::exp::exp_to_most;
use crate::simd::vectorize;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, TensorData, bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Numbers of a sum that are kept apart until its end: one 512-bit register of f32.
const LANES: usize = 16;
/// Columns of the values that are summed up in one walk over the positions.
const BLOCK: usize = 64;
/// Multiplications below which one thread does all of it.
const FEW: usize = 1 << 16;

pub(super) fn attend(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) -> FlexTensor {
    match q.dtype() {
        DType::F64 => all_rows::<f64, f64>(q, keys, values, rows, page_size, heads),
        DType::F32 => all_rows::<f32, f32>(q, keys, values, rows, page_size, heads),
        DType::F16 => all_rows::<f16, f32>(q, keys, values, rows, page_size, heads),
        DType::BF16 => all_rows::<bf16, f32>(q, keys, values, rows, page_size, heads),
        other => unreachable!("burn's float tensors are never {other:?}"),
    }
}

pub(super) fn write(pool: FlexTensor, rows: &FlexTensor, slots: &[usize]) -> FlexTensor {
    match pool.dtype() {
        DType::F64 => write_as::<f64>(pool, rows, slots),
        DType::F32 => write_as::<f32>(pool, rows, slots),
        DType::F16 => write_as::<f16>(pool, rows, slots),
        DType::BF16 => write_as::<bf16>(pool, rows, slots),
        other => unreachable!("burn's float tensors are never {other:?}"),
    }
}

fn write_as<S: Element + bytemuck::Pod>(
    pool: FlexTensor,
    rows: &FlexTensor,
    slots: &[usize],
) -> FlexTensor {
    let whole = pool.is_contiguous() && pool.layout().start_offset() == 0;
    let mut pool = match whole {
        true => pool,
        false => pool.to_contiguous(),
    };
    let c = pool.layout().shape()[1];
    let rows = rows.to_contiguous();
    let rows = elements::<S>(&rows);
    // Copies first where something else holds the pool.
    let all = pool.storage_mut::<S>();
    for (slot, row) in slots.iter().zip(rows.chunks_exact(c.max(1))) {
        all[slot * c..(slot + 1) * c].copy_from_slice(row);
    }
    pool
}

/// What numbers are stored as, and what they are computed in.
trait Stored<W: Wide>: Element + bytemuck::Pod + Send + Sync {
    fn widen(self) -> W;
    fn narrow(value: W) -> Self;

    /// Σ a_i b_i.
    #[inline(always)]
    fn dot<V: Simd>(_: V, a: &[W], b: &[Self]) -> W {
        dot(a, b)
    }
}

/// The type of all sums.
trait Wide: Element + bytemuck::Pod + Send + Sync + PartialOrd {
    fn of(value: f64) -> Self;
    fn exp(self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn mul_add(self, factor: Self, addend: Self) -> Self;
}

macro_rules! wide {
    ($t:ty, $exp:expr, $dot:expr) => {
        impl Wide for $t {
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
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
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                self / other
            }
            #[inline(always)]
            fn mul_add(self, factor: Self, addend: Self) -> Self {
                <$t>::mul_add(self, factor, addend)
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
            #[inline(always)]
            fn dot<V: Simd>(simd: V, a: &[$t], b: &[$t]) -> $t {
                $dot(simd, a, b)
            }
        }
    };
}
wide!(f32, exp_to_most, vector_dot);
wide!(f64, f64::exp, |_, a, b| dot(a, b));

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

/// What is the same for all rows.
struct Pool<'a, S> {
    keys: &'a [S],
    values: &'a [S],
    /// Elements of a slot, g·e.
    wide: usize,
    /// Width of a head.
    e: usize,
    page_size: usize,
}

fn all_rows<S: Stored<W>, W: Wide>(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) -> FlexTensor {
    let [q, keys, values] = [q, keys, values].map(FlexTensor::to_contiguous);
    let (c, wide) = (q.layout().shape()[1], keys.layout().shape()[1]);
    let e = c / heads;
    let (g, shared) = (wide / e, heads * e / wide);
    let pool = Pool {
        keys: elements::<S>(&keys),
        values: elements::<S>(&values),
        wide,
        e,
        page_size,
    };
    let q = elements::<S>(&q);
    let mut out = vec![S::narrow(W::of(0.0)); rows.len() * c];
    let one = |scratch: &mut Scratch<W>, pair: usize, out: &mut [S]| {
        let q = &q[pair * shared * e..(pair + 1) * shared * e];
        let (row, head) = (&rows[pair / g], pair % g);
        vectorize(Pair {
            pool: &pool,
            row,
            head,
            q,
            out,
            scratch,
        });
    };
    let work: usize = rows.iter().map(|row| 2 * row.length * c).sum();
    if work < FEW {
        let mut scratch = Scratch::default();
        let pairs = out.chunks_mut(shared * e).enumerate();
        pairs.for_each(|(pair, out)| one(&mut scratch, pair, out));
    } else {
        let pairs = out.par_chunks_mut(shared * e).enumerate();
        pairs.for_each_init(Scratch::default, |scratch, (pair, out)| {
            one(scratch, pair, out);
        });
    }
    FlexTensor::from_data(TensorData::new(out, [rows.len(), c]))
}

/// What a thread keeps between pairs.
struct Scratch<W> {
    /// Queries `[r, e]`, times 1 / √e.
    queries: Vec<W>,
    /// Weights `[r, length]`.
    weights: Vec<W>,
    /// Where the keys and values of each position begin.
    starts: Vec<usize>,
}

impl<W> Default for Scratch<W> {
    fn default() -> Self {
        Self {
            queries: Vec::new(),
            weights: Vec::new(),
            starts: Vec::new(),
        }
    }
}

/// The r = h / g queries of one row that share a key head, and what comes of them: `[r, e]` each.
struct Pair<'a, S, W> {
    pool: &'a Pool<'a, S>,
    row: &'a PagedRow<'a>,
    head: usize,
    q: &'a [S],
    out: &'a mut [S],
    scratch: &'a mut Scratch<W>,
}

impl<S: Stored<W>, W: Wide> WithSimd for Pair<'_, S, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<V: Simd>(self, simd: V) {
        attend_pair(simd, self);
    }
}

#[inline(always)]
fn attend_pair<V: Simd, S: Stored<W>, W: Wide>(simd: V, pair: Pair<'_, S, W>) {
    let Pair {
        pool,
        row,
        head,
        q,
        out,
        scratch,
    } = pair;
    let (e, length) = (pool.e, row.length);
    let scale = W::of(1.0 / (e as f64).sqrt());
    scratch.queries.clear();
    scratch
        .queries
        .extend(q.iter().map(|q| q.widen().mul(scale)));
    scratch.weights.clear();
    scratch.weights.resize(q.len() / e * length, W::of(0.0));
    scratch.starts.clear();
    let slots = row.slots(pool.page_size);
    scratch
        .starts
        .extend(slots.map(|slot| slot * pool.wide + head * e));
    for (p, start) in scratch.starts.iter().enumerate() {
        let key = &pool.keys[*start..start + e];
        for (r, query) in scratch.queries.chunks_exact(e).enumerate() {
            scratch.weights[r * length + p] = S::dot(simd, query, key);
        }
    }
    let weights = scratch.weights.chunks_exact_mut(length);
    for (weights, out) in weights.zip(out.chunks_exact_mut(e)) {
        let total = softmax_weights(weights);
        let mut first = 0;
        while first < e {
            // Whole blocks first, then whole registers, then what is left one by one.
            let columns = [BLOCK, LANES].into_iter().find(|n| first + n <= e);
            let columns = columns.unwrap_or(1);
            let starts = scratch.starts.iter().map(|start| start + first);
            let out = &mut out[first..first + columns];
            match columns {
                BLOCK => mix::<S, W, BLOCK>(pool.values, starts, weights, total, out),
                LANES => mix::<S, W, LANES>(pool.values, starts, weights, total, out),
                _ => mix::<S, W, 1>(pool.values, starts, weights, total, out),
            }
            first += columns;
        }
    }
}

/// Σ a_i b_i, in lanes that are added as a tree.
#[inline(always)]
fn dot<S: Stored<W>, W: Wide>(a: &[W], b: &[S]) -> W {
    let mut lanes = [W::of(0.0); LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i].widen(), lanes[i]);
        }
    }
    let mut sum = tree(lanes);
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum = a.mul_add(b.widen(), sum);
    }
    sum
}

/// [`dot`] in the processor's vectors: the compiler takes two numbers at a time for it.
#[inline(always)]
fn vector_dot<V: Simd>(simd: V, a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (V::as_simd_f32s(a), V::as_simd_f32s(b));
    let mut sums = [simd.splat_f32s(0.0); 4];
    let ((a, a_few), (b, b_few)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..4 {
            sums[i] = simd.mul_add_f32s(a[i], b[i], sums[i]);
        }
    }
    for (a, b) in a_few.iter().zip(b_few) {
        sums[0] = simd.mul_add_f32s(*a, *b, sums[0]);
    }
    let halves = [
        simd.add_f32s(sums[0], sums[1]),
        simd.add_f32s(sums[2], sums[3]),
    ];
    let sum = simd.reduce_sum_f32s(simd.add_f32s(halves[0], halves[1]));
    let rest = a_rest.iter().zip(b_rest);
    rest.fold(sum, |sum, (a, b)| a.mul_add(*b, sum))
}

#[inline(always)]
fn tree<W: Wide>(mut lanes: [W; LANES]) -> W {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = lanes[i].add(lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn largest<W: Wide>(scores: &[W]) -> W {
    let larger = |a: W, b: W| if b > a { b } else { a };
    let mut lanes = [W::of(f64::NEG_INFINITY); LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    let all = lanes.iter().chain(rest).copied();
    all.fold(W::of(f64::NEG_INFINITY), larger)
}

/// Scores to exp(score − largest); gives their sum.
#[inline(always)]
fn softmax_weights<W: Wide>(scores: &mut [W]) -> W {
    let largest = largest(scores);
    let mut lanes = [W::of(0.0); LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = chunk[i].sub(largest).exp();
            lanes[i] = lanes[i].add(chunk[i]);
        }
    }
    let mut sum = tree(lanes);
    for score in rest {
        *score = score.sub(largest).exp();
        sum = sum.add(*score);
    }
    sum
}

/// Σ_p w_p v_p / total over N columns, position by position.
#[inline(always)]
fn mix<S: Stored<W>, W: Wide, const N: usize>(
    values: &[S],
    starts: impl Iterator<Item = usize>,
    weights: &[W],
    total: W,
    out: &mut [S],
) {
    let mut sums = [W::of(0.0); N];
    for (start, weight) in starts.zip(weights) {
        let value = &values[start..start + N];
        for i in 0..N {
            sums[i] = weight.mul_add(value[i].widen(), sums[i]);
        }
    }
    let inverse = W::of(1.0).div(total);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = S::narrow(sum.mul(inverse));
    }
}

fn elements<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<E>()[start..start + tensor.layout().num_elements()]
}
