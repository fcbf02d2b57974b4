//! Parts that both row kernels use: the bitmap of the support, sums over a cube, the logit transform.

use crate::rows::MASKED;
use cubecl::prelude::*;

pub(super) const UNITS: usize = 256;
/// Columns whose support tokens are marked at a time.
pub(super) const SEGMENT: usize = 65_536;
/// Words of the bitmap: 8 KiB, half of the shared memory that WebGPU guarantees.
pub(super) const WORDS: usize = SEGMENT / 32;
/// Initial value of a running maximum: below every logit, and finite, so that exp(s − max) is 0 for s = −∞ and for
/// [`ABSENT`], and never NaN. Logits below it count as −∞.
pub(super) const LOWEST: f32 = -1.0e30;
/// Logit of a column that is left out. (WGSL has no literal for −∞.)
pub(super) const ABSENT: f32 = -3.0e38;
/// Units whose sums one unit adds, if the device has no planes.
const GROUP: usize = 16;

/// Σ exp(s), stored as exp(max) · sum.
#[derive(CubeType, Clone, Copy)]
pub(super) struct LogSumExp {
    pub max: f32,
    pub sum: f32,
}

/// A sum without terms.
#[cube]
pub(super) fn empty_sum() -> LogSumExp {
    LogSumExp {
        max: f32::new(LOWEST),
        sum: f32::new(0.0),
    }
}

/// Adds exp(max) · sum to the total.
#[cube]
pub(super) fn add(total: &mut LogSumExp, max: f32, sum: f32) {
    let top = f32::max(total.max, max);
    total.sum = total.sum * (total.max - top).exp() + sum * (max - top).exp();
    total.max = top;
}

/// Adds the sums of all units of the cube; every unit gets the result.
#[cube]
pub(super) fn add_over_cube(
    own: LogSumExp,
    scratch: &mut Shared<[f32]>,
    #[comptime] planes: bool,
) -> LogSumExp {
    let unit = UNIT_POS_X as usize;
    // All units have read the previous content of the scratch memory.
    sync_cube();
    let mut groups = (UNITS / GROUP).runtime();
    if comptime!(planes) {
        groups = UNITS / PLANE_DIM as usize;
        let max = plane_max(own.max);
        let sum = plane_sum(own.sum * (own.max - max).exp());
        if UNIT_POS_PLANE == 0 {
            let group = unit / PLANE_DIM as usize;
            scratch[2 * group] = max;
            scratch[2 * group + 1] = sum;
        }
    } else {
        scratch[2 * unit] = own.max;
        scratch[2 * unit + 1] = own.sum;
        sync_cube();
        let mut group_total = empty_sum();
        if unit < groups {
            for i in 0..GROUP {
                let at = 2 * (unit * GROUP + i);
                add(&mut group_total, scratch[at], scratch[at + 1]);
            }
        }
        sync_cube();
        if unit < groups {
            scratch[2 * unit] = group_total.max;
            scratch[2 * unit + 1] = group_total.sum;
        }
    }
    sync_cube();
    let mut total = empty_sum();
    for group in 0..groups {
        add(&mut total, scratch[2 * group], scratch[2 * group + 1]);
    }
    total
}

/// Adds one number of each unit of the cube; every unit gets the result.
#[cube]
pub(super) fn sum_over_cube(
    own: f32,
    scratch: &mut Shared<[f32]>,
    #[comptime] planes: bool,
) -> f32 {
    let own = LogSumExp {
        max: f32::new(0.0),
        sum: own,
    };
    add_over_cube(own, scratch, planes).sum
}

/// The support of one row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct SupportRow {
    /// Index of the first id in the support tensor.
    pub start: usize,
    /// Distance between ids.
    pub step: usize,
    pub k: usize,
    /// Number of columns that are read: the vocabulary, or 0 in a masked row.
    pub live: usize,
}

#[cube]
pub(super) fn support_row<I: Int>(support: &Tensor<I>, row: usize, vocab: u32) -> SupportRow {
    let start = row * support.stride(0);
    let mut live = vocab as usize;
    if i32::cast_from(support[start]) == MASKED {
        live = 0usize;
    }
    SupportRow {
        start,
        step: support.stride(1),
        k: support.shape(1),
        live,
    }
}

/// Returns the token of a slot, or `row.live` for an empty slot.
#[cube]
pub(super) fn token_of_slot<I: Int>(support: &Tensor<I>, row: &SupportRow, slot: usize) -> usize {
    let id = i32::cast_from(support[row.start + slot * row.step]);
    let mut token = row.live;
    if id >= 0 && (id as usize) < row.live {
        token = id as usize;
    }
    token
}

/// Marks the support tokens of the segment that begins at column `start`. All units take part, and the marks are
/// visible to all units afterwards.
#[cube]
pub(super) fn mark_support<I: Int>(
    marks: &Shared<[Atomic<u32>]>,
    support: &Tensor<I>,
    row: &SupportRow,
    start: usize,
) {
    let unit = UNIT_POS_X as usize;
    // All units have read the marks of the previous segment.
    sync_cube();
    let mut word = unit;
    while word < WORDS {
        marks[word].store(0u32);
        word += UNITS;
    }
    sync_cube();
    let mut slot = unit;
    while slot < row.k {
        let token = token_of_slot(support, row, slot);
        if token >= start && token < row.live && token - start < SEGMENT {
            let column = (token - start) as u32;
            marks[column as usize / 32].fetch_or(1u32 << (column % 32));
        }
        slot += UNITS;
    }
    sync_cube();
}

/// Returns the marks of the vector that begins at `column` of the segment: bit i for lane i.
#[cube]
pub(super) fn marks_of_vector(
    marks: &Shared<[Atomic<u32>]>,
    column: usize,
    #[comptime] lanes: usize,
) -> u32 {
    let word = marks[column / 32].load() >> (column as u32 % 32);
    word & comptime!((1u32 << lanes as u32) - 1)
}

/// The logit transform: the softmax logit of z is outer · y, where y is z, or tanh(inner · z) with a softcap.
#[derive(CubeType, Clone, Copy)]
pub(super) struct CubeTransform {
    pub inner: f32,
    pub outer: f32,
    #[cube(comptime)]
    pub capped: bool,
}

/// Computes y of the logits z; see [`CubeTransform`].
#[cube]
pub(super) fn capped_logits<N: Size>(
    z: Vector<f32, N>,
    transform: &CubeTransform,
) -> Vector<f32, N> {
    if comptime!(transform.capped) {
        (z * Vector::new(transform.inner)).tanh()
    } else {
        z
    }
}
