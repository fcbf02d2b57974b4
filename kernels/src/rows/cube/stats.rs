//! The statistics: one walk over a row.

use cubecl::prelude::*;
use std::f32::consts::LOG2_E;

use super::row::{
    ABSENT, Ids, LOWEST, Running, STRETCH, UNITS, WORDS, add, capped_logits, id, ids, mark,
    marks_at, nothing, over_cube, sum_over_cube,
};
use crate::rows::{EMPTY_NATS, TAIL_FLOOR_NATS};

/// Numbers that a unit reads before it works on them.
const AHEAD: usize = 16;

/// A unit's sums over its columns of the tail, of y where the softmax logits are outer · y, outer > 0.
#[derive(CubeType)]
struct Tail<N: Size> {
    max: f32,
    /// Σ exp(outer · (y − max)).
    sums: Vector<f32, N>,
    /// Σ y, of the support too.
    all: Vector<f32, N>,
}

/// Where a stretch begins, in the row and in the tensor.
#[derive(CubeType)]
struct Stretch {
    start: usize,
    at: usize,
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
    let lanes = N::value();
    let unit = UNIT_POS_X as usize;
    let row = (first_row + CUBE_POS_X) as usize;
    let logits_at = CUBE_POS_X as usize * (logits.stride(0) / lanes);
    let out_at = row * out.stride(0);
    let ids = ids(support, row, vocab);
    let k = ids.k;
    let marks = Shared::<[Atomic<u32>]>::new_slice(WORDS);
    let mut scratch = Shared::<[f32]>::new_slice(2 * UNITS);

    // The support's logits wait in the result until the row's log-sum-exp is known.
    let mut on_support = nothing();
    let mut slot = unit;
    while slot < k {
        let token = id(support, &ids, slot);
        let mut s = f32::new(ABSENT);
        if token < ids.live {
            let z = Vector::<f32, N>::cast_from(logits[logits_at + token / lanes]);
            let y = capped_logits(z, inner, capped);
            #[unroll]
            for lane in 0..lanes {
                if lane == token % lanes {
                    s = y.extract(lane) * outer;
                }
            }
            add(&mut on_support, s, f32::new(1.0));
        }
        out[out_at + slot] = s;
        slot += UNITS;
    }

    let mut tail = Tail::<N> {
        max: f32::new(LOWEST),
        sums: Vector::new(f32::new(0.0)),
        all: Vector::new(f32::new(0.0)),
    };
    let ahead = comptime!((AHEAD / lanes).clamp(1, 8));
    let mut start = 0usize;
    while start < vocab as usize {
        mark(&marks, support, &ids, start);
        let mut vectors = 0usize;
        if start < ids.live {
            vectors = usize::min(ids.live - start, STRETCH).div_ceil(lanes);
        }
        let stretch = Stretch {
            start,
            at: logits_at + start / lanes,
        };
        let mut i = unit;
        while i + (ahead - 1) * UNITS < vectors {
            take::<F, N>(
                logits, &stretch, i, &marks, &ids, inner, outer, &mut tail, capped, summed, ptx,
                ahead,
            );
            i += ahead * UNITS;
        }
        while i < vectors {
            take::<F, N>(
                logits, &stretch, i, &marks, &ids, inner, outer, &mut tail, capped, summed, ptx,
                1usize,
            );
            i += UNITS;
        }
        start += STRETCH;
    }

    let own = Running {
        max: tail.max * outer,
        sum: lanes_sum(tail.sums),
    };
    let tail_all = over_cube(own, &mut scratch, planes);
    let mut whole = over_cube(on_support, &mut scratch, planes);
    add(&mut whole, tail_all.max, tail_all.sum);
    let empty = f32::new(EMPTY_NATS as f32);
    let mut log_z = empty;
    if whole.sum != f32::new(0.0) {
        log_z = floored(whole.max + whole.sum.ln());
    }
    let mut slot = unit;
    while slot < k {
        out[out_at + slot] = floored(out[out_at + slot] - log_z);
        slot += UNITS;
    }
    let mut log_tail = f32::new(TAIL_FLOOR_NATS as f32);
    if tail_all.sum != f32::new(0.0) {
        log_tail = tail_all.max + tail_all.sum.ln() - log_z;
    }
    let masked = ids.live == 0;
    if masked {
        log_tail = empty;
        log_z = f32::new(0.0);
    }
    if unit == 0 {
        out[out_at + k] = log_tail;
        out[out_at + k + 1] = log_z;
    }
    if comptime!(summed) {
        let sum = sum_over_cube(lanes_sum(tail.all) * outer, &mut scratch, planes);
        if unit == 0 {
            out[out_at + k + 2] = sum - f32::cast_from(vocab) * log_z;
        }
    }
}

/// Adds a unit's vectors i, i + 256, … of a stretch, `count` of them.
#[cube]
fn take<F: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    stretch: &Stretch,
    first: usize,
    marks: &Shared<[Atomic<u32>]>,
    ids: &Ids,
    inner: f32,
    outer: f32,
    tail: &mut Tail<N>,
    #[comptime] capped: bool,
    #[comptime] summed: bool,
    #[comptime] ptx: bool,
    #[comptime] count: usize,
) {
    let lanes = N::value();
    let mut block = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        block[i] = Vector::cast_from(logits[stretch.at + first + i * UNITS]);
    }
    let mut max = tail.max;
    #[unroll]
    for i in 0..count {
        let column = (first + i * UNITS) * lanes;
        let mut y = capped_logits(block[i], inner, capped);
        let marked = marks_at(marks, column, lanes);
        let left = ids.live - stretch.start - column;
        if comptime!(summed) {
            let mut summands = y;
            if left < lanes {
                #[unroll]
                for lane in 0..lanes {
                    if lane >= left {
                        summands.insert(lane, f32::new(0.0));
                    }
                }
            }
            tail.all += summands;
        }
        if marked != 0 || left < lanes {
            #[unroll]
            for lane in 0..lanes {
                if (marked >> lane as u32) & 1 != 0 || lane >= left {
                    y.insert(lane, f32::new(ABSENT));
                }
            }
        }
        #[unroll]
        for lane in 0..lanes {
            max = f32::max(max, y.extract(lane));
        }
        block[i] = y;
    }
    let mut rate = outer;
    if comptime!(ptx) {
        rate = outer * f32::new(LOG2_E);
    }
    let shift = max * rate;
    tail.sums *= Vector::new(exponential(tail.max * rate - shift, ptx));
    #[unroll]
    for i in 0..count {
        let mut weights = block[i] * Vector::new(rate) - Vector::new(shift);
        #[unroll]
        for lane in 0..lanes {
            weights.insert(lane, exponential(weights.extract(lane), ptx));
        }
        tail.sums += weights;
    }
    tail.max = max;
}

/// exp(x), or 2^x in one instruction of PTX: CUDA's exponential takes eight, and bf16 logits would wait
/// for those rather than for memory.
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
fn lanes_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for lane in 0..N::value() {
        sum += vector.extract(lane);
    }
    sum
}

/// What is not a number stays, so that it is seen.
#[cube]
fn floored(log: f32) -> f32 {
    let mut floored = log;
    if log < f32::new(EMPTY_NATS as f32) {
        floored = f32::new(EMPTY_NATS as f32);
    }
    floored
}
