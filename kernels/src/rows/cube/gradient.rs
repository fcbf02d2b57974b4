//! The gradient with respect to the logits, over the logits or beside them.

use cubecl::prelude::*;

use super::row::{STRETCH, UNITS, WORDS, capped_logits, id, ids, mark, marks_at, sum_over_cube};
use crate::rows::{EMPTY_NATS, TAIL_FLOOR_NATS};

/// Numbers that a unit reads before it writes.
const AHEAD: usize = 16;

/// ∂L/∂z outside the support is exp(outer · y − shift) · factor + u, on it (h − exp(log q) · h_sum) · slope
/// + u; with a softcap, all of that times 1 − y².
#[derive(CubeType, Clone, Copy)]
struct Slopes {
    shift: f32,
    factor: f32,
    u: f32,
    h_sum: f32,
    log_z: f32,
    inner: f32,
    outer: f32,
    slope: f32,
}

#[cube(launch_unchecked)]
pub(super) fn gradient_kernel<F: Float, I: Int, W: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,  // [rows of this launch, v]
    support: &Tensor<I>,            // [n, k]
    stats: &Tensor<W>,              // [n, k+2] or [n, k+3]
    gradient: &Tensor<W>,           // as wide, with respect to the statistics
    out: &mut Tensor<Vector<F, N>>, // [rows of this launch, v]
    first_row: u32,
    inner: f32,
    outer: f32,
    vocab: u32,
    #[comptime] capped: bool,
    #[comptime] planes: bool,
    #[define(F, I, W)] _dtypes: [ElemType; 3],
) {
    let lanes = N::value();
    let unit = UNIT_POS_X as usize;
    let row = (first_row + CUBE_POS_X) as usize;
    let v = logits.shape(1);
    let logits_at = CUBE_POS_X as usize * (logits.stride(0) / lanes);
    let out_at = CUBE_POS_X as usize * (out.stride(0) / lanes);
    let ids = ids(support, row, vocab);
    let k = ids.k;
    let marks = Shared::<[Atomic<u32>]>::new_slice(WORDS);
    let mut scratch = Shared::<[f32]>::new_slice(2 * UNITS);

    let mut own = f32::new(0.0);
    let mut slot = unit;
    while slot < k {
        if id(support, &ids, slot) < ids.live {
            own += of_slot(stats, gradient, row, slot).h;
        }
        slot += UNITS;
    }
    let on_support = sum_over_cube(own, &mut scratch, planes);
    let log_q_tail = number(stats, row, k);
    let log_z = number(stats, row, k + 1);
    let mut u = f32::new(0.0);
    if gradient.shape(1) > k + 2 {
        u = number(gradient, row, k + 2);
    }
    let mut h_sum = on_support - number(gradient, row, k + 1) + f32::cast_from(vocab) * u;
    let mut shift = log_z;
    let mut factor = f32::new(0.0) - h_sum;
    // q_j h_tail / q_tail − q_j H = exp(s_j − lse_tail) (h_tail − q_tail H): one exponential, and
    // nothing that overflows when the tail is tiny.
    if log_q_tail != f32::new(TAIL_FLOOR_NATS as f32) {
        let h_tail = number(gradient, row, k);
        h_sum += h_tail;
        shift = log_z + log_q_tail;
        factor = h_tail - log_q_tail.exp() * h_sum;
    }
    let mut slope = outer;
    if comptime!(capped) {
        slope = outer * inner;
    }
    let slopes = Slopes {
        shift,
        factor: factor * slope,
        u: u * slope,
        h_sum,
        log_z,
        inner,
        outer,
        slope,
    };

    let ahead = comptime!((AHEAD / lanes).clamp(1, 4));
    let mut start = 0usize;
    while start < v {
        mark(&marks, support, &ids, start);
        let vectors = usize::min(v - start, STRETCH).div_ceil(lanes);
        let mut live = 0usize;
        if start < ids.live {
            live = ids.live - start;
        }
        let (from, to) = (logits_at + start / lanes, out_at + start / lanes);
        let mut i = unit;
        while i + (ahead - 1) * UNITS < vectors {
            without_support::<F, N>(
                logits, from, out, to, i, live, &marks, &slopes, capped, ahead,
            );
            i += ahead * UNITS;
        }
        while i < vectors {
            without_support::<F, N>(
                logits, from, out, to, i, live, &marks, &slopes, capped, 1usize,
            );
            i += UNITS;
        }
        let mut slot = unit;
        while slot < k {
            let token = id(support, &ids, slot);
            if token >= start && token < ids.live && token - start < STRETCH {
                let column = token - start;
                let first = column / lanes * lanes;
                let marked = marks_at(&marks, first, lanes);
                // The vector's first token does all of it.
                if marked & ((1u32 << (column - first) as u32) - 1) == 0 {
                    let i = first / lanes;
                    let z = Vector::cast_from(logits[from + i]);
                    let mut dz = outside::<N>(z, live - first, &slopes, capped);
                    let alone = marked == 1u32 << (column - first) as u32;
                    let mut other = slot;
                    let mut end = slot + 1;
                    if !alone {
                        other = 0usize;
                        end = k;
                    }
                    while other < end {
                        let token = id(support, &ids, other);
                        if token < ids.live && token / lanes == (start + first) / lanes {
                            let own = on_support_slot(stats, gradient, row, other, &slopes, capped);
                            #[unroll]
                            for lane in 0..lanes {
                                if lane == token % lanes {
                                    dz.insert(lane, own);
                                }
                            }
                        }
                        other += 1;
                    }
                    out[to + i] = Vector::cast_from(dz);
                }
            }
            slot += UNITS;
        }
        start += STRETCH;
    }
}

#[derive(CubeType, Clone, Copy)]
struct Slot {
    log_q: f32,
    h: f32,
}

/// What lies at the floor passes no gradient.
#[cube]
fn of_slot<W: Float>(stats: &Tensor<W>, gradient: &Tensor<W>, row: usize, slot: usize) -> Slot {
    let log_q = number(stats, row, slot);
    let mut h = f32::new(0.0);
    if log_q > f32::new(EMPTY_NATS as f32) {
        h = number(gradient, row, slot);
    }
    Slot { log_q, h }
}

#[cube]
fn number<W: Float>(tensor: &Tensor<W>, row: usize, column: usize) -> f32 {
    f32::cast_from(tensor[row * tensor.stride(0) + column * tensor.stride(1)])
}

/// ∂L/∂z of a token of the support, from the statistics: its logit may be gone already.
#[cube]
fn on_support_slot<W: Float>(
    stats: &Tensor<W>,
    gradient: &Tensor<W>,
    row: usize,
    slot: usize,
    slopes: &Slopes,
    #[comptime] capped: bool,
) -> f32 {
    let own = of_slot(stats, gradient, row, slot);
    let mut dz = (own.h - own.log_q.exp() * slopes.h_sum) * slopes.slope + slopes.u;
    if comptime!(capped) {
        let y = (own.log_q + slopes.log_z) / slopes.outer;
        dz *= f32::new(1.0) - y * y;
    }
    dz
}

/// ∂L/∂z of a vector outside the support, whose first `left` lanes count; 0 in the others.
#[cube]
fn outside<N: Size>(
    z: Vector<f32, N>,
    left: usize,
    slopes: &Slopes,
    #[comptime] capped: bool,
) -> Vector<f32, N> {
    let y = capped_logits(z, slopes.inner, capped);
    let q = (y * Vector::new(slopes.outer) - Vector::new(slopes.shift)).exp();
    let mut dz = q * Vector::new(slopes.factor) + Vector::new(slopes.u);
    if comptime!(capped) {
        dz *= Vector::new(f32::new(1.0)) - y * y;
    }
    if left < N::value() {
        #[unroll]
        for lane in 0..N::value() {
            if lane >= left {
                dz.insert(lane, f32::new(0.0));
            }
        }
    }
    dz
}

/// Writes a unit's vectors i, i + 256, … of a stretch, `count` of them, but for those with support.
#[cube]
fn without_support<F: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    from: usize,
    out: &mut Tensor<Vector<F, N>>,
    to: usize,
    first: usize,
    live: usize,
    marks: &Shared<[Atomic<u32>]>,
    slopes: &Slopes,
    #[comptime] capped: bool,
    #[comptime] count: usize,
) {
    let lanes = N::value();
    let mut block = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        let mut z = Vector::new(f32::new(0.0));
        // Neither padding nor a masked row is read.
        if (first + i * UNITS) * lanes < live {
            z = Vector::cast_from(logits[from + first + i * UNITS]);
        }
        block[i] = z;
    }
    #[unroll]
    for i in 0..count {
        let column = (first + i * UNITS) * lanes;
        let mut left = 0usize;
        if column < live {
            left = live - column;
        }
        if marks_at(marks, column, lanes) == 0 {
            out[to + first + i * UNITS] =
                Vector::cast_from(outside::<N>(block[i], left, slopes, capped));
        }
    }
}
