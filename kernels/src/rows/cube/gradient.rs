//! The kernel of the gradient with respect to the logits, which is written over the logits or to another tensor.

use cubecl::prelude::*;

use super::row::{
    CubeTransform, SEGMENT, SupportRow, UNITS, WORDS, capped_logits, mark_support, marks_of_vector,
    sum_over_cube, support_row, token_of_slot,
};
use crate::rows::{EMPTY_NATS, TAIL_FLOOR_NATS};

/// Numbers that a unit reads before it writes.
const READ_AHEAD: usize = 16;

/// Constants of a row's gradient; see [`CubeTransform`] for y.
///
/// Outside the support, ∂L/∂z is exp(outer · y − shift) · factor + u. On the support, it is
/// (h − exp(log q) · h_sum) · slope + u. With a softcap, both are multiplied by 1 − y².
#[derive(CubeType, Clone, Copy)]
struct GradientConstants {
    shift: f32,
    factor: f32,
    u: f32,
    h_sum: f32,
    log_z: f32,
    slope: f32,
    transform: CubeTransform,
}

/// A segment of a row: the part whose support tokens are marked.
#[derive(CubeType, Clone, Copy)]
struct GradientSegment {
    /// First column of the segment.
    column: usize,
    /// Columns from there on that are read; the rest is padding, or a masked row.
    live: usize,
    /// Index of the segment's first vector in the logits.
    from: usize,
    /// Index of the segment's first vector in the gradient.
    to: usize,
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
    let row = (first_row + CUBE_POS_X) as usize;
    let v = logits.shape(1);
    let logits_start = CUBE_POS_X as usize * (logits.stride(0) / lanes);
    let out_start = CUBE_POS_X as usize * (out.stride(0) / lanes);
    let ids = support_row(support, row, vocab);
    let marks = Shared::<[Atomic<u32>]>::new_slice(WORDS);
    let transform = CubeTransform {
        inner,
        outer,
        capped,
    };
    let constants = gradient_constants::<I, W>(
        support, &ids, stats, gradient, row, vocab, transform, planes,
    );

    let ahead = comptime!((READ_AHEAD / lanes).clamp(1, 4));
    let mut column = 0usize;
    while column < v {
        mark_support(&marks, support, &ids, column);
        let vectors = usize::min(v - column, SEGMENT).div_ceil(lanes);
        let mut live = 0usize;
        if column < ids.live {
            live = ids.live - column;
        }
        let segment = GradientSegment {
            column,
            live,
            from: logits_start + column / lanes,
            to: out_start + column / lanes,
        };
        let mut i = UNIT_POS_X as usize;
        while i + (ahead - 1) * UNITS < vectors {
            write_without_support::<F, N>(logits, out, &segment, i, &marks, &constants, ahead);
            i += ahead * UNITS;
        }
        while i < vectors {
            write_without_support::<F, N>(logits, out, &segment, i, &marks, &constants, 1usize);
            i += UNITS;
        }
        write_with_support::<F, I, W, N>(
            logits, out, &segment, support, &ids, stats, gradient, row, &marks, &constants,
        );
        column += SEGMENT;
    }
}

/// Computes the constants of a row. All units take part, and every unit gets the result.
#[cube]
fn gradient_constants<I: Int, W: Float>(
    support: &Tensor<I>,
    ids: &SupportRow,
    stats: &Tensor<W>,
    gradient: &Tensor<W>,
    row: usize,
    vocab: u32,
    transform: CubeTransform,
    #[comptime] planes: bool,
) -> GradientConstants {
    let mut scratch = Shared::<[f32]>::new_slice(2 * UNITS);
    let mut own = f32::new(0.0);
    let mut slot = UNIT_POS_X as usize;
    while slot < ids.k {
        if token_of_slot(support, ids, slot) < ids.live {
            own += slot_gradient(stats, gradient, row, slot).h;
        }
        slot += UNITS;
    }
    let on_support = sum_over_cube(own, &mut scratch, planes);
    let log_q_tail = number(stats, row, ids.k);
    let log_z = number(stats, row, ids.k + 1);
    let mut u = f32::new(0.0);
    if gradient.shape(1) > ids.k + 2 {
        u = number(gradient, row, ids.k + 2);
    }
    let mut h_sum = on_support - number(gradient, row, ids.k + 1) + f32::cast_from(vocab) * u;
    let mut shift = log_z;
    let mut factor = f32::new(0.0) - h_sum;
    // q_j h_tail / q_tail − q_j H = exp(s_j − lse_tail) (h_tail − q_tail H) takes one exponential and does not overflow
    // if the tail is tiny.
    if log_q_tail != f32::new(TAIL_FLOOR_NATS as f32) {
        let h_tail = number(gradient, row, ids.k);
        h_sum += h_tail;
        shift = log_z + log_q_tail;
        factor = h_tail - log_q_tail.exp() * h_sum;
    }
    let mut slope = transform.outer;
    if comptime!(transform.capped) {
        slope = transform.outer * transform.inner;
    }
    GradientConstants {
        shift,
        factor: factor * slope,
        u: u * slope,
        h_sum,
        log_z,
        slope,
        transform,
    }
}

/// Writes the vectors of a segment that hold support tokens. Each vector is written by the unit of its first token.
#[cube]
fn write_with_support<F: Float, I: Int, W: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    segment: &GradientSegment,
    support: &Tensor<I>,
    ids: &SupportRow,
    stats: &Tensor<W>,
    gradient: &Tensor<W>,
    row: usize,
    marks: &Shared<[Atomic<u32>]>,
    constants: &GradientConstants,
) {
    let lanes = N::value();
    let start = segment.column;
    let mut slot = UNIT_POS_X as usize;
    while slot < ids.k {
        let token = token_of_slot(support, ids, slot);
        if token >= start && token < ids.live && token - start < SEGMENT {
            let column = token - start;
            let first = column / lanes * lanes;
            let marked = marks_of_vector(marks, first, lanes);
            if marked & ((1u32 << (column - first) as u32) - 1) == 0 {
                let i = first / lanes;
                let z = Vector::cast_from(logits[segment.from + i]);
                let mut dz = tail_gradient::<N>(z, segment.live - first, constants);
                // If the vector has other support tokens, all slots are searched for them.
                let is_only_token = marked == 1u32 << (column - first) as u32;
                let mut other = slot;
                let mut end = slot + 1;
                if !is_only_token {
                    other = 0usize;
                    end = ids.k;
                }
                while other < end {
                    let token = token_of_slot(support, ids, other);
                    if token < ids.live && token / lanes == (start + first) / lanes {
                        let own = support_gradient(stats, gradient, row, other, constants);
                        #[unroll]
                        for lane in 0..lanes {
                            if lane == token % lanes {
                                dz.insert(lane, own);
                            }
                        }
                    }
                    other += 1;
                }
                out[segment.to + i] = Vector::cast_from(dz);
            }
        }
        slot += UNITS;
    }
}

/// A slot's log q, and the gradient with respect to it.
#[derive(CubeType, Clone, Copy)]
struct SlotGradient {
    log_q: f32,
    h: f32,
}

/// Reads a slot. No gradient passes through log q at its lower bound.
#[cube]
fn slot_gradient<W: Float>(
    stats: &Tensor<W>,
    gradient: &Tensor<W>,
    row: usize,
    slot: usize,
) -> SlotGradient {
    let log_q = number(stats, row, slot);
    let mut h = f32::new(0.0);
    if log_q > f32::new(EMPTY_NATS as f32) {
        h = number(gradient, row, slot);
    }
    SlotGradient { log_q, h }
}

#[cube]
fn number<W: Float>(tensor: &Tensor<W>, row: usize, column: usize) -> f32 {
    f32::cast_from(tensor[row * tensor.stride(0) + column * tensor.stride(1)])
}

/// Computes ∂L/∂z of a support token from the statistics, because its logit may be overwritten already.
#[cube]
fn support_gradient<W: Float>(
    stats: &Tensor<W>,
    gradient: &Tensor<W>,
    row: usize,
    slot: usize,
    constants: &GradientConstants,
) -> f32 {
    let own = slot_gradient(stats, gradient, row, slot);
    let mut dz = (own.h - own.log_q.exp() * constants.h_sum) * constants.slope + constants.u;
    if comptime!(constants.transform.capped) {
        let y = (own.log_q + constants.log_z) / constants.transform.outer;
        dz *= f32::new(1.0) - y * y;
    }
    dz
}

/// Computes ∂L/∂z of a vector outside the support. Lanes from `left` on are beyond the vocabulary and get 0.
#[cube]
fn tail_gradient<N: Size>(
    z: Vector<f32, N>,
    left: usize,
    constants: &GradientConstants,
) -> Vector<f32, N> {
    let y = capped_logits(z, &constants.transform);
    let q = (y * Vector::new(constants.transform.outer) - Vector::new(constants.shift)).exp();
    let mut dz = q * Vector::new(constants.factor) + Vector::new(constants.u);
    if comptime!(constants.transform.capped) {
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

/// Writes `count` vectors of a unit, `first`, `first` + 256, …, of a segment, except those with support tokens.
#[cube]
fn write_without_support<F: Float, N: Size>(
    logits: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    segment: &GradientSegment,
    first: usize,
    marks: &Shared<[Atomic<u32>]>,
    constants: &GradientConstants,
    #[comptime] count: usize,
) {
    let lanes = N::value();
    let mut block = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        let mut z = Vector::new(f32::new(0.0));
        // Padding and masked rows are not read.
        if (first + i * UNITS) * lanes < segment.live {
            z = Vector::cast_from(logits[segment.from + first + i * UNITS]);
        }
        block[i] = z;
    }
    #[unroll]
    for i in 0..count {
        let column = (first + i * UNITS) * lanes;
        let mut left = 0usize;
        if column < segment.live {
            left = segment.live - column;
        }
        if marks_of_vector(marks, column, lanes) == 0 {
            out[segment.to + first + i * UNITS] =
                Vector::cast_from(tail_gradient::<N>(block[i], left, constants));
        }
    }
}
