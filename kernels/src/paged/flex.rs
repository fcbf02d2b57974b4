//! The plain-loop form: pairs of a row and a key head in parallel, and the positions of a pair in order. There are two
//! passes over the scores, and sums are in f32, or in f64 for f64.
//!
//! All scores of a pair are held at once (r · length numbers per thread), so every sum runs over the positions in order
//! and page boundaries do not affect the bits. Traffic: the keys and values of a row are read once for each key head.

use super::{PagedOptions, PagedRow};
use crate::attention::AttentionOptions;
use crate::flex::{compact, elements};
use crate::float::{ComputeFloat, StoredFloat};
use crate::simd::vectorize;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, TensorData, bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Independent partial sums: one 512-bit register of f32.
const LANES: usize = 16;
/// Columns of the values that are summed in one pass over the positions.
const BLOCK: usize = 64;
/// Multiplications below which one thread is faster than several.
const MIN_PARALLEL_WORK: usize = 1 << 16;

pub(super) fn attend(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    sinks: Option<&FlexTensor>,
    rows: &[PagedRow<'_>],
    options: &PagedOptions,
) -> FlexTensor {
    match q.dtype() {
        DType::F64 => attend_as::<f64, f64>(q, keys, values, sinks, rows, options),
        DType::F32 => attend_as::<f32, f32>(q, keys, values, sinks, rows, options),
        DType::F16 => attend_as::<f16, f32>(q, keys, values, sinks, rows, options),
        DType::BF16 => attend_as::<bf16, f32>(q, keys, values, sinks, rows, options),
        other => unreachable!("burn's float tensors are never {other:?}"),
    }
}

pub(super) fn write_slots(pool: FlexTensor, rows: &FlexTensor, slots: &[usize]) -> FlexTensor {
    match pool.dtype() {
        DType::F64 => write_slots_as::<f64>(pool, rows, slots),
        DType::F32 => write_slots_as::<f32>(pool, rows, slots),
        DType::F16 => write_slots_as::<f16>(pool, rows, slots),
        DType::BF16 => write_slots_as::<bf16>(pool, rows, slots),
        other => unreachable!("burn's float tensors are never {other:?}"),
    }
}

fn write_slots_as<S: Element + bytemuck::Pod>(
    pool: FlexTensor,
    rows: &FlexTensor,
    slots: &[usize],
) -> FlexTensor {
    let mut pool = compact(pool);
    let c = pool.layout().shape()[1];
    let rows = rows.to_contiguous();
    let rows = elements::<S>(&rows);
    // The storage is copied first if it is shared.
    let pool_slots = pool.storage_mut::<S>();
    for (slot, row) in slots.iter().zip(rows.chunks_exact(c.max(1))) {
        pool_slots[slot * c..(slot + 1) * c].copy_from_slice(row);
    }
    pool
}

/// Dot products of numbers in the computing type and numbers in memory.
trait DotProduct<W: ComputeFloat>: StoredFloat<W> {
    /// Computes Σ a_i b_i.
    #[inline(always)]
    fn dot<V: Simd>(_: V, a: &[W], b: &[Self]) -> W {
        dot(a, b)
    }
}

impl DotProduct<f32> for f16 {}
impl DotProduct<f32> for bf16 {}
impl DotProduct<f64> for f64 {}
impl DotProduct<f32> for f32 {
    #[inline(always)]
    fn dot<V: Simd>(simd: V, a: &[f32], b: &[f32]) -> f32 {
        dot_f32(simd, a, b)
    }
}

/// The KV cache that all rows read.
struct Pool<'a, S> {
    keys: &'a [S],
    values: &'a [S],
    /// Numbers in a slot of the keys and of the values.
    columns: [usize; 2],
    /// Width of a key.
    e: usize,
    options: &'a PagedOptions,
}

/// Computes attention of all rows.
fn attend_as<S: DotProduct<W>, W: ComputeFloat>(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    sinks: Option<&FlexTensor>,
    rows: &[PagedRow<'_>],
    options: &PagedOptions,
) -> FlexTensor {
    let [q, keys, values] = [q, keys, values].map(FlexTensor::to_contiguous);
    let sinks = sinks.map(FlexTensor::to_contiguous);
    let sinks = sinks.as_ref().map(elements::<S>).unwrap_or_default();
    let (heads, g) = (options.attention.heads, options.attention.key_heads);
    let (shared, u) = (heads / g, options.value_width);
    let pool = Pool {
        keys: elements::<S>(&keys),
        values: elements::<S>(&values),
        columns: [&keys, &values].map(|pool| pool.layout().shape()[1]),
        e: q.layout().shape()[1] / heads,
        options,
    };
    let (q, inputs) = (elements::<S>(&q), shared * pool.e);
    let mut out = vec![S::narrow(W::from_f64(0.0)); rows.len() * heads * u];
    let attend_pair = |buffers: &mut PairBuffers<W>, pair: usize, out: &mut [S]| {
        let (row, head) = (&rows[pair / g], pair % g);
        vectorize(RowHeadPair {
            pool: &pool,
            row,
            head,
            q: &q[pair * inputs..(pair + 1) * inputs],
            sinks: sinks.get(head * shared..(head + 1) * shared),
            out,
            buffers,
        });
    };
    let seen = rows
        .iter()
        .map(|row| row.seen(options.attention.window).len());
    let work = seen.sum::<usize>() * heads * (pool.e + u);
    if work < MIN_PARALLEL_WORK {
        let mut buffers = PairBuffers::default();
        let pairs = out.chunks_mut(shared * u).enumerate();
        pairs.for_each(|(pair, out)| attend_pair(&mut buffers, pair, out));
    } else {
        let pairs = out.par_chunks_mut(shared * u).enumerate();
        pairs.for_each_init(PairBuffers::default, |buffers, (pair, out)| {
            attend_pair(buffers, pair, out);
        });
    }
    FlexTensor::from_data(TensorData::new(out, [rows.len(), heads * u]))
}

/// Buffers that a thread reuses from pair to pair.
#[derive(Default)]
struct PairBuffers<W> {
    /// Queries `[r, e]`, times the scale.
    queries: Vec<W>,
    /// Weights `[r, positions]`.
    weights: Vec<W>,
    /// Index of the first number of the key and of the value of each position.
    starts: [Vec<usize>; 2],
}

/// A row and a key head: the r = h / g queries `[r, e]` that share the key head, and their outputs `[r, u]`.
struct RowHeadPair<'a, S, W> {
    pool: &'a Pool<'a, S>,
    row: &'a PagedRow<'a>,
    head: usize,
    q: &'a [S],
    sinks: Option<&'a [S]>,
    out: &'a mut [S],
    buffers: &'a mut PairBuffers<W>,
}

impl<S: DotProduct<W>, W: ComputeFloat> WithSimd for RowHeadPair<'_, S, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<V: Simd>(self, simd: V) {
        attend_pair(simd, self);
    }
}

#[inline(always)]
fn attend_pair<V: Simd, S: DotProduct<W>, W: ComputeFloat>(simd: V, pair: RowHeadPair<'_, S, W>) {
    let RowHeadPair {
        pool,
        row,
        head,
        q,
        sinks,
        out,
        buffers,
    } = pair;
    let AttentionOptions {
        key_heads,
        scale,
        softcap,
        window,
        ..
    } = pool.options.attention;
    let (e, u, positions) = (pool.e, pool.options.value_width, row.seen(window).len());
    let scale = W::from_f64(scale);
    buffers.queries.clear();
    let scaled = q.iter().map(|q| q.widen().mul(scale));
    buffers.queries.extend(scaled);
    buffers.weights.clear();
    let zero = W::from_f64(0.0);
    buffers.weights.resize(q.len() / e * positions, zero);
    let [key_starts, value_starts] = &mut buffers.starts;
    for (starts, columns) in [&mut *key_starts, &mut *value_starts]
        .into_iter()
        .zip(pool.columns)
    {
        starts.clear();
        let slots = row.slots(pool.options);
        starts.extend(slots.map(|slot| slot * columns + head * (columns / key_heads)));
    }
    for (p, start) in key_starts.iter().enumerate() {
        let key = &pool.keys[*start..start + e];
        for (r, query) in buffers.queries.chunks_exact(e).enumerate() {
            buffers.weights[r * positions + p] = S::dot(simd, query, key);
        }
    }
    let weights = buffers.weights.chunks_exact_mut(positions);
    for (index, (weights, out)) in weights.zip(out.chunks_exact_mut(u)).enumerate() {
        if let Some(c) = softcap.map(W::from_f64) {
            weights.iter_mut().for_each(|s| *s = s.div(c).tanh().mul(c));
        }
        let sink = sinks.map(|sinks| sinks[index].widen());
        let total = softmax_weights(weights, sink);
        let mut first = 0;
        while first < u {
            // Whole blocks come first, then whole registers, then single columns.
            let columns = [BLOCK, LANES].into_iter().find(|n| first + n <= u);
            let columns = columns.unwrap_or(1);
            let starts = value_starts.iter().map(|start| start + first);
            let out = &mut out[first..first + columns];
            match columns {
                BLOCK => weighted_sum::<S, W, BLOCK>(pool.values, starts, weights, total, out),
                LANES => weighted_sum::<S, W, LANES>(pool.values, starts, weights, total, out),
                _ => weighted_sum::<S, W, 1>(pool.values, starts, weights, total, out),
            }
            first += columns;
        }
    }
}

/// Computes Σ a_i b_i in lanes that are added as a tree.
#[inline(always)]
fn dot<S: StoredFloat<W>, W: ComputeFloat>(a: &[W], b: &[S]) -> W {
    let mut lanes = [W::from_f64(0.0); LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i].widen(), lanes[i]);
        }
    }
    let mut sum = tree_sum(lanes);
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum = a.mul_add(b.widen(), sum);
    }
    sum
}

/// Computes [`dot`] with explicit vectors, because the compiler vectorises the generic loop for two numbers at a time
/// only.
#[inline(always)]
fn dot_f32<V: Simd>(simd: V, a: &[f32], b: &[f32]) -> f32 {
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

/// Sums lanes as a tree.
#[inline(always)]
fn tree_sum<W: ComputeFloat>(mut lanes: [W; LANES]) -> W {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = lanes[i].add(lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Returns the largest score, ignoring NaN.
#[inline(always)]
fn largest<W: ComputeFloat>(scores: &[W]) -> W {
    let larger = |a: W, b: W| if b > a { b } else { a };
    let mut lanes = [W::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    let all = lanes.iter().chain(rest).copied();
    all.fold(W::NEG_INFINITY, larger)
}

/// Replaces scores by exp(score − largest) and returns their sum. The sink is one more score, which has a share of the
/// sum only.
#[inline(always)]
fn softmax_weights<W: ComputeFloat>(scores: &mut [W], sink: Option<W>) -> W {
    let mut largest = largest(scores);
    if let Some(sink) = sink.filter(|sink| *sink > largest) {
        largest = sink;
    }
    let mut lanes = [W::from_f64(0.0); LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = chunk[i].sub(largest).exp();
            lanes[i] = lanes[i].add(chunk[i]);
        }
    }
    let mut sum = tree_sum(lanes);
    for score in rest {
        *score = score.sub(largest).exp();
        sum = sum.add(*score);
    }
    sink.map_or(sum, |sink| sum.add(sink.sub(largest).exp()))
}

/// Computes Σ_p w_p v_p / total over N columns, position by position.
#[inline(always)]
fn weighted_sum<S: StoredFloat<W>, W: ComputeFloat, const N: usize>(
    values: &[S],
    starts: impl Iterator<Item = usize>,
    weights: &[W],
    total: W,
    out: &mut [S],
) {
    let mut sums = [W::from_f64(0.0); N];
    for (start, weight) in starts.zip(weights) {
        let value = &values[start..start + N];
        for i in 0..N {
            sums[i] = weight.mul_add(value[i].widen(), sums[i]);
        }
    }
    let inverse = W::from_f64(1.0).div(total);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = S::narrow(sum.mul(inverse));
    }
}
