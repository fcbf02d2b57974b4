//! The plain-loop form: blocks of rows of one sequence, and the key heads of each block, in parallel.
//!
//! A task copies the keys that its rows see to one matrix, in the type of the sums, and holds all scores of its rows at
//! once. Every product is one chain of fused multiply-adds, over the columns of a head for a score and over the
//! positions for an output, and positions that a row does not see have weight 0. So the bits of a row depend neither on
//! the rows that are computed with it nor on the pages.
//!
//! Traffic: the keys and values of a sequence are read once for each block of [`BLOCK_QUERIES`] queries of a key head.

use std::ops::Range;

use super::{PagedOptions, PagedRow};
use crate::attention::AttentionOptions;
use crate::flex::{compact, elements};
use crate::float::{ComputeFloat, StoredFloat};
use crate::gemm::{Matrix, Threads, gemm, multiply_by_rows};
use crate::simd::vectorize_closure;
use crate::team::map_tasks_with;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, TensorData, bf16, f16};

/// Number of queries that a task computes at once, if the rows of a sequence have as many.
const BLOCK_QUERIES: usize = 96;
/// Number of queries from which on the values are copied to one matrix for a matrix product.
const MIN_PRODUCT_QUERIES: usize = 6;
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

/// Products of matrices whose elements are one chain of fused multiply-adds each.
trait ChainedProduct: ComputeFloat {
    /// Computes `out` `[m, n]` = A·Bᵀ from A `[m, k]` and B `[n, k]`.
    fn multiply_by_rows(out: &mut [Self], a: &[Self], b: &[Self], k: usize);

    /// Computes `out` `[m, n]` = A·B from A `[m, k]` and B `[k, n]`.
    fn multiply(out: &mut [Self], a: &[Self], b: &[Self], k: usize);
}

impl ChainedProduct for f32 {
    fn multiply_by_rows(out: &mut [Self], a: &[Self], b: &[Self], k: usize) {
        let [a, b] = [a, b].map(|matrix| Matrix::new(matrix, matrix.len() / k, k));
        multiply_by_rows(out, a, b);
    }

    fn multiply(out: &mut [Self], a: &[Self], b: &[Self], k: usize) {
        let (m, n) = (a.len() / k, b.len() / k);
        let (a, b) = (Matrix::new(a, m, k), Matrix::new(b, k, n));
        gemm(out, n, a, b, false, Threads::One);
    }
}

impl ChainedProduct for f64 {
    fn multiply_by_rows(out: &mut [Self], a: &[Self], b: &[Self], k: usize) {
        let pairs = a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| (a, b)));
        for (out, (a, b)) in out.iter_mut().zip(pairs) {
            *out = a.iter().zip(b).fold(0.0, |sum, (a, b)| a.mul_add(*b, sum));
        }
    }

    fn multiply(out: &mut [Self], a: &[Self], b: &[Self], k: usize) {
        let n = b.len() / k;
        out.fill(0.0);
        for (out, a) in out.chunks_mut(n).zip(a.chunks(k)) {
            for (a, b) in a.iter().zip(b.chunks(n)) {
                out.iter_mut()
                    .zip(b)
                    .for_each(|(out, b)| *out = a.mul_add(*b, *out));
            }
        }
    }
}

/// The inputs of all tasks.
struct PagedInputs<'a, S> {
    q: &'a [S],
    keys: &'a [S],
    values: &'a [S],
    /// Numbers in a slot of the keys.
    key_columns: usize,
    /// Numbers in a slot of the values.
    value_columns: usize,
    /// One for each query head, or empty.
    sinks: &'a [S],
    rows: &'a [PagedRow<'a>],
    options: &'a PagedOptions,
    /// Number of query heads that share a key head.
    shared: usize,
    /// Width of a key.
    e: usize,
}

/// Buffers that a thread reuses from task to task.
#[derive(Default)]
struct TaskBuffers<W> {
    /// Slots of the positions that the block's rows see.
    slots: Vec<usize>,
    /// Queries `[m, e]` of the block, times the scale.
    queries: Vec<W>,
    /// Keys `[positions, e]`.
    keys: Vec<W>,
    /// Values `[positions, u]`.
    values: Vec<W>,
    /// Scores `[m, positions]`, and then weights.
    weights: Vec<W>,
    /// Sum of the weights of each query.
    totals: Vec<W>,
    /// Outputs `[m, u]`.
    out: Vec<W>,
}

/// Computes attention of all rows.
fn attend_as<S: StoredFloat<W>, W: ChainedProduct>(
    q: &FlexTensor,
    keys: &FlexTensor,
    values: &FlexTensor,
    sinks: Option<&FlexTensor>,
    rows: &[PagedRow<'_>],
    options: &PagedOptions,
) -> FlexTensor {
    let [q, keys, values] = [q, keys, values].map(FlexTensor::to_contiguous);
    let sinks = sinks.map(FlexTensor::to_contiguous);
    let AttentionOptions {
        heads,
        key_heads,
        window,
        ..
    } = options.attention;
    let inputs = PagedInputs {
        q: elements::<S>(&q),
        keys: elements::<S>(&keys),
        values: elements::<S>(&values),
        key_columns: keys.layout().shape()[1],
        value_columns: values.layout().shape()[1],
        sinks: sinks.as_ref().map(elements::<S>).unwrap_or_default(),
        rows,
        options,
        shared: heads / key_heads,
        e: q.layout().shape()[1] / heads,
    };
    let blocks = row_blocks(rows, BLOCK_QUERIES.div_ceil(inputs.shared));
    let tasks = blocks.len() * key_heads;
    let run = |buffers: &mut TaskBuffers<W>, task: usize| {
        inputs.attend_block(&blocks[task / key_heads], task % key_heads, buffers)
    };
    let seen: usize = rows.iter().map(|row| row.seen(window).len()).sum();
    let width = options.value_width;
    let outputs: Vec<Vec<S>> = if seen * heads * (inputs.e + width) < MIN_PARALLEL_WORK {
        let mut buffers = TaskBuffers::default();
        (0..tasks).map(|task| run(&mut buffers, task)).collect()
    } else {
        map_tasks_with(tasks, TaskBuffers::default, run)
    };
    let columns = inputs.shared * width;
    let mut out = Vec::with_capacity(rows.len() * heads * width);
    for outputs in outputs.chunks(key_heads) {
        for row in 0..outputs.first().map_or(0, |head| head.len() / columns) {
            for head in outputs {
                out.extend_from_slice(&head[row * columns..(row + 1) * columns]);
            }
        }
    }
    FlexTensor::from_data(TensorData::new(out, [rows.len(), heads * width]))
}

/// Divides the rows into blocks of at most `longest` consecutive positions on the same pages.
fn row_blocks(rows: &[PagedRow<'_>], longest: usize) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let follows = |block: &&mut Range<usize>| {
            let before = &rows[block.end - 1];
            block.len() < longest
                && before.length + 1 == row.length
                && before.first == row.first
                && before.pages == row.pages
        };
        match blocks.last_mut().filter(follows) {
            Some(block) => block.end += 1,
            None => blocks.push(index..index + 1),
        }
    }
    blocks
}

impl<S> PagedInputs<'_, S> {
    /// Computes the outputs `[rows, shared · u]` of a block of rows for the query heads that share a key head.
    fn attend_block<W: ChainedProduct>(
        &self,
        block: &Range<usize>,
        head: usize,
        buffers: &mut TaskBuffers<W>,
    ) -> Vec<S>
    where
        S: StoredFloat<W>,
    {
        let (rows, e, u) = (&self.rows[block.clone()], self.e, self.options.value_width);
        // The first row sees the earliest position, and the last row the latest.
        let seen = rows[0].seen(self.options.attention.window).start..rows[rows.len() - 1].length;
        let slot = |position| rows[0].slot(position, self.options.page_size);
        buffers.slots.clear();
        buffers.slots.extend(seen.clone().map(slot));
        self.copy_queries(block, head, &mut buffers.queries);
        let keys = self.head_columns(self.keys, self.key_columns, head, e);
        keys.gather(&buffers.slots, &mut buffers.keys);
        let m = rows.len() * self.shared;
        set_len(&mut buffers.weights, m * seen.len());
        W::multiply_by_rows(&mut buffers.weights, &buffers.queries, &buffers.keys, e);
        self.softmax(rows, seen.start, head, buffers);
        let values = self.head_columns(self.values, self.value_columns, head, u);
        set_len(&mut buffers.out, m * u);
        if m < MIN_PRODUCT_QUERIES {
            vectorize_closure(
                #[inline(always)]
                || weighted_sums(values, buffers),
            );
        } else {
            values.gather(&buffers.slots, &mut buffers.values);
            let (weights, values) = (&buffers.weights, &buffers.values);
            W::multiply(&mut buffers.out, weights, values, seen.len());
        }
        let mut outputs = Vec::with_capacity(m * u);
        for (out, total) in buffers.out.chunks(u).zip(&buffers.totals) {
            let inverse = W::from_f64(1.0).div(*total);
            outputs.extend(out.iter().map(|x| S::narrow(x.mul(inverse))));
        }
        outputs
    }

    /// Copies the queries `[m, e]` that read a key head, times the scale.
    fn copy_queries<W: ComputeFloat>(&self, block: &Range<usize>, head: usize, to: &mut Vec<W>)
    where
        S: StoredFloat<W>,
    {
        let AttentionOptions { heads, scale, .. } = self.options.attention;
        let scale = W::from_f64(scale);
        to.clear();
        for row in block.clone() {
            let from = (row * heads + head * self.shared) * self.e;
            let queries = &self.q[from..from + self.shared * self.e];
            to.extend(queries.iter().map(|q| q.widen().mul(scale)));
        }
    }

    /// Returns the first `width` columns of a key head in a pool.
    fn head_columns<'b>(
        &self,
        pool: &'b [S],
        columns: usize,
        head: usize,
        width: usize,
    ) -> HeadColumns<'b, S> {
        let first = head * (columns / self.options.attention.key_heads);
        HeadColumns {
            pool: &pool[first.min(pool.len())..],
            columns,
            width,
        }
    }

    /// Replaces the scores of each query by its weights, which are 0 at positions that its row does not see, and writes
    /// their sums. `first` is the position of the first score.
    fn softmax<W: ChainedProduct>(
        &self,
        rows: &[PagedRow<'_>],
        first: usize,
        head: usize,
        buffers: &mut TaskBuffers<W>,
    ) where
        S: StoredFloat<W>,
    {
        let AttentionOptions {
            softcap, window, ..
        } = self.options.attention;
        let sinks = self.sinks.iter().skip(head * self.shared);
        let sinks: Vec<Option<W>> = match self.sinks {
            [] => vec![None; self.shared],
            _ => sinks
                .take(self.shared)
                .map(|sink| Some(sink.widen()))
                .collect(),
        };
        let queries = rows
            .iter()
            .flat_map(|row| sinks.iter().map(move |sink| (row, sink)));
        let positions = buffers.slots.len();
        buffers.totals.clear();
        for (scores, (row, sink)) in buffers.weights.chunks_mut(positions).zip(queries) {
            let seen = row.seen(window);
            let (before, scores) = scores.split_at_mut(seen.start - first);
            let (scores, after) = scores.split_at_mut(seen.len());
            before.fill(W::from_f64(0.0));
            after.fill(W::from_f64(0.0));
            let total = vectorize_closure(
                #[inline(always)]
                || softmax_weights(scores, softcap.map(W::from_f64), *sink),
            );
            buffers.totals.push(total);
        }
    }
}

/// Makes a buffer of `len` numbers of unspecified content.
fn set_len<W: ComputeFloat>(buffer: &mut Vec<W>, len: usize) {
    buffer.resize(len, W::from_f64(0.0));
}

/// Columns of one head in a pool.
#[derive(Clone, Copy)]
struct HeadColumns<'a, S> {
    /// The pool from the head's first number in slot 0 on.
    pool: &'a [S],
    /// Numbers of a slot.
    columns: usize,
    /// Numbers of the head in a slot.
    width: usize,
}

impl<S> HeadColumns<'_, S> {
    /// Copies the head's columns in some slots to a matrix, in the type of the sums.
    fn gather<W: ComputeFloat>(&self, slots: &[usize], to: &mut Vec<W>)
    where
        S: StoredFloat<W>,
    {
        let Self {
            pool,
            columns,
            width,
        } = *self;
        set_len(to, slots.len() * width);
        vectorize_closure(
            #[inline(always)]
            || {
                for (to, slot) in to.chunks_exact_mut(width).zip(slots) {
                    let from = &pool[slot * columns..][..width];
                    match S::as_computed(from) {
                        Some(from) => to.copy_from_slice(from),
                        None => to.iter_mut().zip(from).for_each(|(to, x)| *to = x.widen()),
                    }
                }
            },
        );
    }
}

/// Computes the weighted sums of the values of each query, read in place.
#[inline(always)]
fn weighted_sums<S: StoredFloat<W>, W: ComputeFloat>(
    values: HeadColumns<'_, S>,
    buffers: &mut TaskBuffers<W>,
) {
    let HeadColumns {
        pool,
        columns,
        width,
    } = values;
    let weights = buffers.weights.chunks_exact(buffers.slots.len());
    for (weights, out) in weights.zip(buffers.out.chunks_exact_mut(width)) {
        let mut first = 0;
        while first < width {
            // Whole blocks come first, then whole registers, then single columns.
            let block = [BLOCK, LANES].into_iter().find(|n| first + n <= width);
            let block = block.unwrap_or(1);
            let starts = buffers.slots.iter().map(|slot| slot * columns + first);
            let out = &mut out[first..first + block];
            match block {
                BLOCK => weighted_sum::<S, W, BLOCK>(pool, starts, weights, out),
                LANES => weighted_sum::<S, W, LANES>(pool, starts, weights, out),
                _ => weighted_sum::<S, W, 1>(pool, starts, weights, out),
            }
            first += block;
        }
    }
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

/// Replaces scores by exp(score − largest), after the softcap, and returns their sum. The sink is one more score, which
/// has a share of the sum only.
#[inline(always)]
fn softmax_weights<W: ComputeFloat>(scores: &mut [W], softcap: Option<W>, sink: Option<W>) -> W {
    if let Some(c) = softcap {
        scores.iter_mut().for_each(|s| *s = s.div(c).tanh().mul(c));
    }
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

/// Computes Σ_p w_p v_p over N columns, position by position.
#[inline(always)]
fn weighted_sum<S: StoredFloat<W>, W: ComputeFloat, const N: usize>(
    values: &[S],
    starts: impl Iterator<Item = usize>,
    weights: &[W],
    out: &mut [W],
) {
    let mut sums = [W::from_f64(0.0); N];
    for (start, weight) in starts.zip(weights) {
        let value = &values[start..start + N];
        for i in 0..N {
            sums[i] = weight.mul_add(value[i].widen(), sums[i]);
        }
    }
    out.copy_from_slice(&sums);
}
