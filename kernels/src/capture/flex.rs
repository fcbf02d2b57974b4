//! The plain-loop form: rows in parallel, each row in order.

use burn::tensor::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::vectors::{BLOCK, Lane, exponentials, largest, sum, sums};
use super::{Capture, CaptureRow, Captured, TailSums, points_below, summary};
use crate::rows::flex::Stored;
use crate::simd::vectorize;

/// What logits are stored as.
pub(super) trait Logit<W>: Stored<W> {
    /// The row as it is computed with, where that is how it is stored.
    fn as_computed(row: &[Self]) -> Option<&[W]>;
}

macro_rules! computed_as_stored {
    ($t:ty) => {
        impl Logit<$t> for $t {
            fn as_computed(row: &[$t]) -> Option<&[$t]> {
                Some(row)
            }
        }
    };
}
computed_as_stored!(f32);
computed_as_stored!(f64);

macro_rules! computed_wider {
    ($t:ty) => {
        impl Logit<f32> for $t {
            fn as_computed(_: &[$t]) -> Option<&[f32]> {
                None
            }
        }
    };
}
computed_wider!(f16);
computed_wider!(bf16);

/// What a thread keeps from row to row.
#[derive(Default)]
struct Scratch<W> {
    /// The softmax logits, where they are not the logits as they are stored.
    s: Vec<W>,
    /// The largest of each block.
    maxima: Vec<W>,
    /// The same, in another order.
    order: Vec<W>,
    /// The likeliest columns.
    candidates: Vec<(W, u32)>,
    /// The support's ids, ascending.
    support: Vec<u32>,
    /// The tail's sum up to the end of each block.
    cumulative: Vec<f64>,
}

/// `logits` holds `rows.len()` rows of v columns.
pub(super) fn capture_rows<S: Logit<W>, W: Lane>(
    logits: &[S],
    v: usize,
    rows: &[CaptureRow],
    capture: &Capture<'_>,
) -> Vec<Option<Captured>> {
    let head = capture.head.numbers(v);
    let of_row = |scratch: &mut Scratch<W>, (logits, row): (&[S], &CaptureRow)| {
        let logits = logits.get(..head.vocab)?;
        if let Some(s) = S::as_computed(logits).filter(|_| head.is_plain()) {
            return capture_row(s, row, capture, scratch);
        }
        let mut s = std::mem::take(&mut scratch.s);
        s.clear();
        s.extend(logits.iter().map(|&z| head.apply(z.widen()).0));
        let captured = capture_row(&s, row, capture, scratch);
        scratch.s = s;
        captured
    };
    let rows = logits.par_chunks(v).zip(rows);
    rows.map_init(Scratch::default, of_row).collect()
}

fn capture_row<W: Lane>(
    s: &[W],
    row: &CaptureRow,
    capture: &Capture<'_>,
    scratch: &mut Scratch<W>,
) -> Option<Captured> {
    let maxima = &mut scratch.maxima;
    vectorize(Maxima { s, maxima });
    likeliest(s, capture.top_k, row.kept.len(), scratch);
    let (support, tail_largest) = support(s, row, capture.top_k, scratch)?;
    let rest = Tail {
        s,
        support: &scratch.support,
        shift: tail_largest,
    };
    let mut tail = TailSums::empty(capture.temperatures.len());
    if tail_largest > W::LOWEST {
        tail.largest = tail_largest.f64();
        let cumulative = &mut scratch.cumulative;
        let sums = Sums {
            tail: &rest,
            cumulative: (capture.draws > 0).then_some(cumulative),
        };
        (tail.total, tail.weighted) = vectorize(sums);
        for (temperature, at) in capture.temperatures.iter().zip(&mut tail.at) {
            if *temperature != 1.0 {
                let factor = W::of(1.0 / f64::from(*temperature));
                *at = vectorize(SumAt {
                    tail: &rest,
                    factor,
                });
            }
        }
    }
    // A NaN is never among the largest: it shows in the sum, where there is one.
    let is_nan = match tail_largest > W::LOWEST {
        true => tail.total.is_nan(),
        false => s.iter().any(|s| s.f64().is_nan()),
    };
    if is_nan {
        return None;
    }
    let mut captured = summary(&support, &tail, capture.temperatures)?;
    if capture.draws > 0 && tail.total > 0.0 {
        let points = Points {
            draws: capture.draws,
            uniform: row.uniform(),
            total: tail.total,
        };
        draw(&rest, &scratch.cumulative, &points, &mut captured);
    }
    Some(captured)
}

/// The largest of each block.
struct Maxima<'a, W> {
    s: &'a [W],
    maxima: &'a mut Vec<W>,
}

impl<W: Lane> WithSimd for Maxima<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut buffer = [W::LOWEST; BLOCK];
        self.maxima.clear();
        for start in (0..self.s.len()).step_by(BLOCK) {
            let block = block_at(self.s, start, &mut buffer);
            self.maxima.push(largest(block));
        }
    }
}

/// The columns of a block; beyond the row's end nothing but −∞.
#[inline(always)]
fn block_at<'a, W: Lane>(s: &'a [W], start: usize, buffer: &'a mut [W; BLOCK]) -> &'a [W; BLOCK] {
    let rest = s.get(start..).unwrap_or_default();
    if let Some(block) = rest.first_chunk::<BLOCK>() {
        return block;
    }
    *buffer = [W::LOWEST; BLOCK];
    for (to, from) in buffer.iter_mut().zip(rest) {
        *to = *from;
    }
    buffer
}

/// Leaves the likeliest columns in `candidates`, the lower id first among equals: one more than the
/// support can hold, so that the likeliest of the tail is among them.
fn likeliest<W: Lane>(s: &[W], top_k: usize, kept: usize, scratch: &mut Scratch<W>) {
    let Scratch {
        maxima,
        order,
        candidates,
        ..
    } = scratch;
    let wanted = top_k.saturating_add(kept).saturating_add(1);
    let mut floor = W::LOWEST;
    if wanted <= maxima.len() {
        // So many blocks have a column of at least this.
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

/// Of numbers that are not NaN.
fn descending<W: Lane>(a: W, b: W) -> std::cmp::Ordering {
    b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal)
}

/// The support with its logits, and the largest logit outside it, −∞ where nothing is; `None` where
/// a kept id is not in the vocabulary. The support's ids are left in the scratch, ascending.
fn support<W: Lane>(
    s: &[W],
    row: &CaptureRow,
    top_k: usize,
    scratch: &mut Scratch<W>,
) -> Option<(Vec<(f64, u32)>, W)> {
    let Scratch {
        candidates,
        support: ids,
        ..
    } = scratch;
    ids.clear();
    ids.extend(candidates.iter().take(top_k).map(|(_, id)| *id));
    ids.extend(&row.kept);
    ids.sort_unstable();
    ids.dedup();
    let mut rest = candidates.iter().skip(top_k);
    let tail_largest = rest.find(|(_, id)| !row.kept.contains(id));
    let with_logit = |id: &u32| s.get(*id as usize).map(|s| (s.f64(), *id));
    let support: Option<Vec<_>> = ids.iter().map(with_logit).collect();
    Some((support?, tail_largest.map_or(W::LOWEST, |(s, _)| *s)))
}

/// A row without its support, against the largest logit of what is left.
struct Tail<'a, W> {
    s: &'a [W],
    /// Ascending.
    support: &'a [u32],
    shift: W,
}

impl<W: Lane> Tail<'_, W> {
    /// The block from `start` on, with −∞ in place of the support, whose next id is `next`.
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
        let mut end = [W::LOWEST; BLOCK];
        *buffer = *block_at(self.s, start, &mut end);
        for id in ahead {
            if !is_here(id) {
                break;
            }
            if let Some(column) = buffer.get_mut((*id as usize).wrapping_sub(start)) {
                *column = W::LOWEST;
            }
            *next += 1;
        }
        buffer
    }
}

/// Σ exp(s − shift) and Σ exp(s − shift) (s − shift); the first up to each block's end beside them.
struct Sums<'a, W> {
    tail: &'a Tail<'a, W>,
    cumulative: Option<&'a mut Vec<f64>>,
}

impl<W: Lane> WithSimd for Sums<'_, W> {
    type Output = (f64, f64);

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> (f64, f64) {
        let (mut total, mut weighted, mut next) = (0.0, 0.0, 0);
        let mut buffer = [W::LOWEST; BLOCK];
        if let Some(cumulative) = &mut self.cumulative {
            cumulative.clear();
        }
        for start in (0..self.tail.s.len()).step_by(BLOCK) {
            let block = self.tail.block(start, &mut next, &mut buffer);
            let (of_block, of_block_weighted) = sums(block, self.tail.shift);
            total += of_block.f64();
            weighted += of_block_weighted.f64();
            if let Some(cumulative) = &mut self.cumulative {
                cumulative.push(total);
            }
        }
        (total, weighted)
    }
}

/// Σ exp((s − shift) · factor).
struct SumAt<'a, W> {
    tail: &'a Tail<'a, W>,
    factor: W,
}

impl<W: Lane> WithSimd for SumAt<'_, W> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let (mut total, mut next) = (0.0, 0);
        let mut buffer = [W::LOWEST; BLOCK];
        for start in (0..self.tail.s.len()).step_by(BLOCK) {
            let block = self.tail.block(start, &mut next, &mut buffer);
            total += sum(exponentials(block, self.tail.shift, self.factor)).f64();
        }
        total
    }
}

/// Where the draws lie.
struct Points {
    draws: u32,
    uniform: f64,
    /// The tail's mass, against its own largest logit.
    total: f64,
}

impl Points {
    /// How many lie below a part of the tail's mass.
    fn below(&self, mass: f64) -> u32 {
        points_below(mass / self.total, self.draws, self.uniform)
    }
}

/// Looks the points up: the block of each by the sums up to the ends of blocks, then the column.
fn draw<W: Lane>(tail: &Tail<'_, W>, cumulative: &[f64], points: &Points, captured: &mut Captured) {
    let (mut before, mut taken) = (0.0, 0);
    for (block, end) in cumulative.iter().enumerate() {
        let below = points.below(*end);
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

/// The points of one block, by their numbers; `mass` is the tail's before and after it.
fn draw_in_block<W: Lane>(
    tail: &Tail<'_, W>,
    start: usize,
    mass: std::ops::Range<f64>,
    numbers: std::ops::Range<u32>,
    points: &Points,
    captured: &mut Captured,
) {
    let mut next = tail.support.partition_point(|id| (*id as usize) < start);
    let mut buffer = [W::LOWEST; BLOCK];
    let columns = tail.block(start, &mut next, &mut buffer);
    let weights = exponentials(columns, tail.shift, W::of(1.0)).map(W::f64);
    // This sum and the tree's, which `mass` is made of, differ in their last bits.
    let stretch = (mass.end - mass.start) / weights.iter().sum::<f64>();
    let last = weights.iter().rposition(|weight| *weight > 0.0);
    let (mut within, mut taken) = (0.0, numbers.start);
    for (column, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        within += weight;
        let below = match Some(column) == last {
            true => numbers.end,
            false => points.below(mass.start + within * stretch).min(numbers.end),
        };
        if below > taken {
            captured.draw_ids.push((start + column) as u32);
            captured.draw_counts.push(below - taken);
            taken = below;
        }
    }
}
