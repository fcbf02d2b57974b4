//! The plain-loop form: rows in parallel, and the columns of a row in order.

use pulp::{Simd, WithSimd};

use super::vectors::{BLOCK, exponentials, largest, tree_sum, weight_sums};
use super::{CaptureOptions, CaptureRow, Captured, TailSums, points_below, summarize};
use crate::float::{ComputeFloat, StoredFloat};
use crate::rows::TransformConstants;
use crate::simd::{vectorize, vectorize_closure};
use crate::team::map_tasks_with;

/// Buffers that a thread reuses from row to row.
#[derive(Default)]
struct RowBuffers<W> {
    /// The softmax logits, if they differ from the stored logits.
    s: Vec<W>,
    /// The largest logit of each block.
    maxima: Vec<W>,
    /// A copy of `maxima` that selection reorders.
    order: Vec<W>,
    /// The likeliest columns.
    candidates: Vec<(W, u32)>,
    /// Ids of the support, ascending.
    support: Vec<u32>,
    /// The tail's sum up to the end of each block.
    cumulative: Vec<f64>,
}

/// Captures `rows.len()` rows of v columns.
pub(super) fn capture_rows<S: StoredFloat<W>, W: ComputeFloat>(
    logits: &[S],
    v: usize,
    rows: &[CaptureRow],
    options: &CaptureOptions<'_>,
) -> Vec<Option<Captured>> {
    let transform = options.head.constants(v);
    let capture = |buffers: &mut RowBuffers<W>, index: usize| {
        let logits = logits[index * v..(index + 1) * v].get(..transform.vocab)?;
        let row = &rows[index];
        if let Some(s) = S::as_computed(logits).filter(|_| transform.is_identity()) {
            return capture_row(s, row, options, buffers);
        }
        let mut s = std::mem::take(&mut buffers.s);
        s.resize(logits.len(), W::NEG_INFINITY);
        vectorize_closure(
            #[inline(always)]
            || softmax_logits(logits, &transform, &mut s),
        );
        let captured = capture_row(&s, row, options, buffers);
        buffers.s = s;
        captured
    };
    map_tasks_with(rows.len(), RowBuffers::default, capture)
}

/// Writes the softmax logits of a row in the computing type.
#[inline(always)]
fn softmax_logits<S: StoredFloat<W>, W: ComputeFloat>(
    logits: &[S],
    transform: &TransformConstants,
    s: &mut [W],
) {
    if transform.is_identity() {
        for (s, z) in s.iter_mut().zip(logits) {
            *s = z.widen();
        }
    } else {
        for (s, z) in s.iter_mut().zip(logits) {
            *s = transform.apply(z.widen()).0;
        }
    }
}

/// Captures a row from its softmax logits.
fn capture_row<W: ComputeFloat>(
    s: &[W],
    row: &CaptureRow,
    options: &CaptureOptions<'_>,
    buffers: &mut RowBuffers<W>,
) -> Option<Captured> {
    let maxima = &mut buffers.maxima;
    vectorize(BlockMaxima { s, maxima });
    select_candidates(s, options.top_k, row.kept.len(), buffers);
    let (support, tail_largest) = select_support(s, row, options.top_k, buffers)?;
    let tail_row = TailRow {
        s,
        support: &buffers.support,
        shift: tail_largest,
    };
    let mut tail = TailSums::empty(options.temperatures.len());
    if tail_largest > W::NEG_INFINITY {
        tail.largest = tail_largest.into_f64();
        let cumulative = &mut buffers.cumulative;
        let sums = TailWeightSums {
            tail: &tail_row,
            cumulative: (options.draws > 0).then_some(cumulative),
        };
        (tail.total, tail.weighted) = vectorize(sums);
        for (temperature, at) in options.temperatures.iter().zip(&mut tail.at) {
            if *temperature != 1.0 {
                *at = vectorize(TailSumAt {
                    tail: &tail_row,
                    factor: W::from_f64(1.0 / f64::from(*temperature)),
                });
            }
        }
    }
    // A NaN is never selected as a maximum, but it makes the tail's sum NaN, if the tail was summed.
    let is_nan = match tail_largest > W::NEG_INFINITY {
        true => tail.total.is_nan(),
        false => s.iter().any(|s| s.into_f64().is_nan()),
    };
    if is_nan {
        return None;
    }
    let mut captured = summarize(&support, &tail, options.temperatures)?;
    if options.draws > 0 && tail.total > 0.0 {
        let points = DrawPoints {
            draws: options.draws,
            uniform: row.uniform(),
            total: tail.total,
        };
        draw(&tail_row, &buffers.cumulative, &points, &mut captured);
    }
    Some(captured)
}

/// Computes the largest logit of each block.
struct BlockMaxima<'a, W> {
    s: &'a [W],
    maxima: &'a mut Vec<W>,
}

impl<W: ComputeFloat> WithSimd for BlockMaxima<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut buffer = [W::NEG_INFINITY; BLOCK];
        self.maxima.clear();
        for start in (0..self.s.len()).step_by(BLOCK) {
            let block = block_at(self.s, start, &mut buffer);
            self.maxima.push(largest(block));
        }
    }
}

/// Returns the columns of a block, with −∞ beyond the end of the row.
#[inline(always)]
fn block_at<'a, W: ComputeFloat>(
    s: &'a [W],
    start: usize,
    buffer: &'a mut [W; BLOCK],
) -> &'a [W; BLOCK] {
    let rest = s.get(start..).unwrap_or_default();
    if let Some(block) = rest.first_chunk::<BLOCK>() {
        return block;
    }
    *buffer = [W::NEG_INFINITY; BLOCK];
    for (to, from) in buffer.iter_mut().zip(rest) {
        *to = *from;
    }
    buffer
}

/// Writes the likeliest columns to `buffers.candidates`, the lower id first among equals: one more than the support can
/// hold, so that the likeliest token of the tail is among them.
fn select_candidates<W: ComputeFloat>(
    s: &[W],
    top_k: usize,
    kept: usize,
    buffers: &mut RowBuffers<W>,
) {
    let RowBuffers {
        maxima,
        order,
        candidates,
        ..
    } = buffers;
    let wanted = top_k.saturating_add(kept).saturating_add(1);
    let mut floor = W::NEG_INFINITY;
    if wanted <= maxima.len() {
        // At least `wanted` columns, one in each of `wanted` blocks, are no smaller than this maximum.
        order.clear();
        order.extend_from_slice(maxima);
        let (_, nth, _) = order.select_nth_unstable_by(wanted - 1, |a, b| descending(*a, *b));
        floor = *nth;
    }
    candidates.clear();
    let blocks = maxima.iter().zip(s.chunks(BLOCK)).enumerate();
    for (block, (_, columns)) in blocks.filter(|(_, (largest, _))| **largest >= floor) {
        let first = (block * BLOCK) as u32;
        let ids = first..first + BLOCK as u32;
        let large = columns.iter().copied().zip(ids);
        candidates.extend(large.filter(|(s, _)| *s >= floor));
    }
    let order = |a: &(W, u32), b: &(W, u32)| descending(a.0, b.0).then(a.1.cmp(&b.1));
    if wanted < candidates.len() {
        candidates.select_nth_unstable_by(wanted, order);
        candidates.truncate(wanted);
    }
    candidates.sort_unstable_by(order);
}

/// Compares two numbers for descending order; a NaN counts as equal to everything.
fn descending<W: ComputeFloat>(a: W, b: W) -> std::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal)
}

/// Returns the support with its logits, and the largest logit outside it, or −∞ if there is none. Writes the support's
/// ids to `buffers.support`, ascending. Returns `None` if an extra id is not in the vocabulary.
fn select_support<W: ComputeFloat>(
    s: &[W],
    row: &CaptureRow,
    top_k: usize,
    buffers: &mut RowBuffers<W>,
) -> Option<(Vec<(f64, u32)>, W)> {
    let RowBuffers {
        candidates,
        support: ids,
        ..
    } = buffers;
    ids.clear();
    ids.extend(candidates.iter().take(top_k).map(|(_, id)| *id));
    ids.extend(&row.kept);
    ids.sort_unstable();
    ids.dedup();
    let mut rest = candidates.iter().skip(top_k);
    let tail_largest = rest.find(|(_, id)| !row.kept.contains(id));
    let with_logit = |id: &u32| s.get(*id as usize).map(|s| (s.into_f64(), *id));
    let support: Option<Vec<_>> = ids.iter().map(with_logit).collect();
    Some((support?, tail_largest.map_or(W::NEG_INFINITY, |(s, _)| *s)))
}

/// A row without its support.
struct TailRow<'a, W> {
    s: &'a [W],
    /// Ids of the support, ascending.
    support: &'a [u32],
    /// The largest logit of the tail, which is subtracted before exponentials.
    shift: W,
}

impl<W: ComputeFloat> TailRow<'_, W> {
    /// Returns the block from `start` on with −∞ in place of the support. `next` is the index of the first support id at
    /// or after `start`, and is moved beyond the block.
    #[inline(always)]
    fn block<'b>(
        &'b self,
        start: usize,
        next: &mut usize,
        buffer: &'b mut [W; BLOCK],
    ) -> &'b [W; BLOCK] {
        let ahead = self.support.get(*next..).unwrap_or_default();
        let is_here = |id: &u32| (*id as usize) < start + BLOCK;
        if !ahead.first().is_some_and(is_here) {
            return block_at(self.s, start, buffer);
        }
        let mut end = [W::NEG_INFINITY; BLOCK];
        *buffer = *block_at(self.s, start, &mut end);
        for id in ahead {
            if !is_here(id) {
                break;
            }
            if let Some(column) = buffer.get_mut((*id as usize).wrapping_sub(start)) {
                *column = W::NEG_INFINITY;
            }
            *next += 1;
        }
        buffer
    }
}

/// Computes Σ exp(s − shift) and Σ exp(s − shift) (s − shift) over the tail, and the first sum up to the end of each
/// block if `cumulative` is given.
struct TailWeightSums<'a, W> {
    tail: &'a TailRow<'a, W>,
    cumulative: Option<&'a mut Vec<f64>>,
}

impl<W: ComputeFloat> WithSimd for TailWeightSums<'_, W> {
    type Output = (f64, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> (f64, f64) {
        let (mut total, mut weighted, mut next) = (0.0, 0.0, 0);
        let mut buffer = [W::NEG_INFINITY; BLOCK];
        if let Some(cumulative) = &mut self.cumulative {
            cumulative.clear();
        }
        for start in (0..self.tail.s.len()).step_by(BLOCK) {
            let block = self.tail.block(start, &mut next, &mut buffer);
            let (block_total, block_weighted) = weight_sums(block, self.tail.shift);
            total += block_total.into_f64();
            weighted += block_weighted.into_f64();
            if let Some(cumulative) = &mut self.cumulative {
                cumulative.push(total);
            }
        }
        (total, weighted)
    }
}

/// Computes Σ exp((s − shift) · factor) over the tail.
struct TailSumAt<'a, W> {
    tail: &'a TailRow<'a, W>,
    factor: W,
}

impl<W: ComputeFloat> WithSimd for TailSumAt<'_, W> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let (mut total, mut next) = (0.0, 0);
        let mut buffer = [W::NEG_INFINITY; BLOCK];
        for start in (0..self.tail.s.len()).step_by(BLOCK) {
            let block = self.tail.block(start, &mut next, &mut buffer);
            total += tree_sum(exponentials(block, self.tail.shift, self.factor)).into_f64();
        }
        total
    }
}

/// The points of systematic resampling.
struct DrawPoints {
    draws: u32,
    uniform: f64,
    /// Mass of the tail relative to its largest logit.
    total: f64,
}

impl DrawPoints {
    /// Counts the points below a part of the tail's mass.
    fn count_below(&self, mass: f64) -> u32 {
        points_below(mass / self.total, self.draws, self.uniform)
    }
}

/// Looks up the token of each point: first its block, by the sums up to the ends of blocks, then its column.
fn draw<W: ComputeFloat>(
    tail: &TailRow<'_, W>,
    cumulative: &[f64],
    points: &DrawPoints,
    captured: &mut Captured,
) {
    let (mut before, mut taken) = (0.0, 0);
    for (block, end) in cumulative.iter().enumerate() {
        let below = points.count_below(*end);
        if below > taken {
            draw_in_block(
                tail,
                block * BLOCK,
                before..*end,
                taken..below,
                points,
                captured,
            );
            taken = below;
        }
        before = *end;
    }
}

/// Draws the points with the given numbers in one block. `mass` is the tail's mass before and after the block.
fn draw_in_block<W: ComputeFloat>(
    tail: &TailRow<'_, W>,
    start: usize,
    mass: std::ops::Range<f64>,
    numbers: std::ops::Range<u32>,
    points: &DrawPoints,
    captured: &mut Captured,
) {
    let mut next = tail.support.partition_point(|id| (*id as usize) < start);
    let mut buffer = [W::NEG_INFINITY; BLOCK];
    let columns = tail.block(start, &mut next, &mut buffer);
    let weights = exponentials(columns, tail.shift, W::from_f64(1.0)).map(W::into_f64);
    // This factor corrects for the last bits in which the sum in order differs from the tree sums in `mass`.
    let correction = (mass.end - mass.start) / weights.iter().sum::<f64>();
    let last = weights.iter().rposition(|weight| *weight > 0.0);
    let (mut within, mut taken) = (0.0, numbers.start);
    for (column, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        within += weight;
        let below = match Some(column) == last {
            true => numbers.end,
            false => points
                .count_below(mass.start + within * correction)
                .min(numbers.end),
        };
        if below > taken {
            captured.draw_ids.push((start + column) as u32);
            captured.draw_counts.push(below - taken);
            taken = below;
        }
    }
}
