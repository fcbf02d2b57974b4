//! The kernel of the row statistics: one pass over a row.

use cubecl::prelude::*;
use std::f32::consts::LOG2_E;

use super::row::{
    ABSENT, CubeTransform, LOWEST, LogSumExp, SEGMENT, SupportRow, UNITS, WORDS, add,
    add_over_cube, capped_logits, empty_sum, mark_support, marks_of_vector, sum_over_cube,
    support_row, token_of_slot,
};
use crate::rows::{EMPTY_NATS, TAIL_FLOOR_NATS};

/// Numbers that a unit reads before it computes with them.
const READ_AHEAD: usize = 16;

/// A unit's sums over its columns; see [`CubeTransform`] for y.
#[derive(CubeType)]
struct UnitSums<N: Size> {
    /// The largest y of the tail.
    max: f32,
    /// Σ exp(outer · (y − max)) over the tail.
    tail: Vector<f32, N>,
    /// Σ y over all columns, if it is computed.
    all: Vector<f32, N>,
}

/// The part of a row whose support tokens are marked.
#[derive(CubeType)]
struct Segment {
    /// First column of the segment.
    column: usize,
    /// Index of its first vector in the tensor.
    start: usize,
}

#[cube(launch_unchecked)]
pub(super) fn stats_kernel<F: Float, I: Int, N: Size>(
    logits: &Tensor<Vector<F, N>>, // [rows of this launch, v]
    support: &Tensor<I>,           // [n, k]
    out: &mut Tensor<f32>,         // [n, k+2] or [n, k+3]
    first_row: u32,
    inner: f32,
    outer: f32,
    vocab: u32,
    #[comptime] capped: bool,
    #[comptime] summed: bool,
    #[comptime] planes: bool,
    #[comptime] ptx: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = (first_row + CUBE_POS_X) as usize;
    let logits_start = CUBE_POS_X as usize * (logits.stride(0) / N::value());
    let out_start = row * out.stride(0);
    let ids = support_row(support, row, vocab);
    let transform = CubeTransform {
        inner,
        outer,
        capped,
    };
    let mut scratch = Shared::<[f32]>::new_slice(2 * UNITS);

    let on_support = gather_support::<F, I, N>(
        logits,
        logits_start,
        support,
        &ids,
        &transform,
        out,
        out_start,
    );
    let own = sum_columns::<F, I, N>(
        logits,
        logits_start,
        support,
        &ids,
        &transform,
        vocab,
        summed,
        ptx,
    );
    let own_tail = LogSumExp {
        max: own.max * outer,
        sum: sum_of_lanes(own.tail),
    };
    let tail = add_over_cube(own_tail, &mut scratch, planes);
    let mut all = add_over_cube(on_support, &mut scratch, planes);
    add(&mut all, tail.max, tail.sum);
    let log_z = write_stats(out, out_start, &ids, &all, &tail);
    if comptime!(summed) {
        let sum = sum_over_cube(sum_of_lanes(own.all) * outer, &mut scratch, planes);
        if UNIT_POS_X == 0 {
            out[out_start + ids.k + 2] = sum - f32::cast_from(vocab) * log_z;
        }
    }
}

/// Writes the softmax logits of the support tokens to their slots of the result, where they stay until the row's
/// log-sum-exp is known, and returns the unit's sum over them.
#[cube]
fn gather_support<F: Float, I: Int, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    logits_start: usize,
    support: &Tensor<I>,
    ids: &SupportRow,
    transform: &CubeTransform,
    out: &mut Tensor<f32>,
    out_start: usize,
) -> LogSumExp {
    let lanes = N::value();
    let mut on_support = empty_sum();
    let mut slot = UNIT_POS_X as usize;
    while slot < ids.k {
        let token = token_of_slot(support, ids, slot);
        let mut s = f32::new(ABSENT);
        if token < ids.live {
            let z = Vector::<f32, N>::cast_from(logits[logits_start + token / lanes]);
            let y = capped_logits(z, transform);
            #[unroll]
            for lane in 0..lanes {
                if lane == token % lanes {
                    s = y.extract(lane) * transform.outer;
                }
            }
            add(&mut on_support, s, f32::new(1.0));
        }
        out[out_start + slot] = s;
        slot += UNITS;
    }
    on_support
}

/// Sums a unit's columns of the row, segment by segment.
#[cube]
fn sum_columns<F: Float, I: Int, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    logits_start: usize,
    support: &Tensor<I>,
    ids: &SupportRow,
    transform: &CubeTransform,
    vocab: u32,
    #[comptime] summed: bool,
    #[comptime] ptx: bool,
) -> UnitSums<N> {
    let lanes = N::value();
    let marks = Shared::<[Atomic<u32>]>::new_slice(WORDS);
    let mut sums = UnitSums::<N> {
        max: f32::new(LOWEST),
        tail: Vector::new(f32::new(0.0)),
        all: Vector::new(f32::new(0.0)),
    };
    let ahead = comptime!((READ_AHEAD / lanes).clamp(1, 8));
    let mut column = 0usize;
    while column < vocab as usize {
        mark_support(&marks, support, ids, column);
        let mut vectors = 0usize;
        if column < ids.live {
            vectors = usize::min(ids.live - column, SEGMENT).div_ceil(lanes);
        }
        let segment = Segment {
            column,
            start: logits_start + column / lanes,
        };
        let mut i = UNIT_POS_X as usize;
        while i + (ahead - 1) * UNITS < vectors {
            add_vectors::<F, N>(
                logits, &segment, i, &marks, ids, transform, &mut sums, summed, ptx, ahead,
            );
            i += ahead * UNITS;
        }
        while i < vectors {
            add_vectors::<F, N>(
                logits, &segment, i, &marks, ids, transform, &mut sums, summed, ptx, 1usize,
            );
            i += UNITS;
        }
        column += SEGMENT;
    }
    sums
}

/// Adds `count` vectors of a unit, `first`, `first` + 256, …, to its sums.
#[cube]
fn add_vectors<F: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    segment: &Segment,
    first: usize,
    marks: &Shared<[Atomic<u32>]>,
    ids: &SupportRow,
    transform: &CubeTransform,
    sums: &mut UnitSums<N>,
    #[comptime] summed: bool,
    #[comptime] ptx: bool,
    #[comptime] count: usize,
) {
    let lanes = N::value();
    let mut block = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        block[i] = Vector::cast_from(logits[segment.start + first + i * UNITS]);
    }
    let mut max = sums.max;
    #[unroll]
    for i in 0..count {
        let column = (first + i * UNITS) * lanes;
        let mut y = capped_logits(block[i], transform);
        let marked = marks_of_vector(marks, column, lanes);
        let left = ids.live - segment.column - column;
        if comptime!(summed) {
            let mut summands = y;
            if left < lanes {
                summands = replace_lanes(summands, 0u32, left, 0.0f32);
            }
            sums.all += summands;
        }
        if marked != 0 || left < lanes {
            y = replace_lanes(y, marked, left, ABSENT);
        }
        #[unroll]
        for lane in 0..lanes {
            max = f32::max(max, y.extract(lane));
        }
        block[i] = y;
    }
    let mut rate = transform.outer;
    if comptime!(ptx) {
        rate = transform.outer * f32::new(LOG2_E);
    }
    let shift = max * rate;
    sums.tail *= Vector::new(exponential(sums.max * rate - shift, ptx));
    #[unroll]
    for i in 0..count {
        let mut weights = block[i] * Vector::new(rate) - Vector::new(shift);
        #[unroll]
        for lane in 0..lanes {
            weights.insert(lane, exponential(weights.extract(lane), ptx));
        }
        sums.tail += weights;
    }
    sums.max = max;
}

/// Replaces the marked lanes of a vector, and those from lane `left` on, by a constant.
#[cube]
fn replace_lanes<N: Size>(
    vector: Vector<f32, N>,
    marked: u32,
    left: usize,
    #[comptime] value: f32,
) -> Vector<f32, N> {
    let mut replaced = vector;
    #[unroll]
    for lane in 0..N::value() {
        if (marked >> lane as u32) & 1 != 0 || lane >= left {
            replaced.insert(lane, f32::new(value));
        }
    }
    replaced
}

/// Writes the log-probabilities and the log-sum-exp of a row from its sums over all columns and over the tail; returns
/// the log-sum-exp.
#[cube]
fn write_stats(
    out: &mut Tensor<f32>,
    out_start: usize,
    ids: &SupportRow,
    all: &LogSumExp,
    tail: &LogSumExp,
) -> f32 {
    let empty = f32::new(EMPTY_NATS as f32);
    let mut log_z = empty;
    if all.sum != f32::new(0.0) {
        log_z = floored(all.max + all.sum.ln());
    }
    let mut slot = UNIT_POS_X as usize;
    while slot < ids.k {
        out[out_start + slot] = floored(out[out_start + slot] - log_z);
        slot += UNITS;
    }
    let mut log_tail = f32::new(TAIL_FLOOR_NATS as f32);
    if tail.sum != f32::new(0.0) {
        log_tail = tail.max + tail.sum.ln() - log_z;
    }
    if ids.live == 0 {
        log_tail = empty;
        log_z = f32::new(0.0);
    }
    if UNIT_POS_X == 0 {
        out[out_start + ids.k] = log_tail;
        out[out_start + ids.k + 1] = log_z;
    }
    log_z
}

/// Computes exp(x), or 2^x in one PTX instruction. CUDA's exponential takes eight instructions, and with bf16 logits
/// the kernel would be limited by them instead of by memory.
#[cube]
fn exponential(x: f32, #[comptime] ptx: bool) -> f32 {
    if comptime!(ptx) {
        let power: f32;
        gpu_asm!("ex2.approx.ftz.f32 {}, {};", out(_) power, in(_) x, options(pure, nomem));
        power
    } else {
        x.exp()
    }
}

#[cube]
fn sum_of_lanes<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for lane in 0..N::value() {
        sum += vector.extract(lane);
    }
    sum
}

/// Raises a log-probability to at least [`EMPTY_NATS`]. NaN stays NaN, so that it is noticed.
#[cube]
fn floored(log: f32) -> f32 {
    let mut floored = log;
    if log < f32::new(EMPTY_NATS as f32) {
        floored = f32::new(EMPTY_NATS as f32);
    }
    floored
}
