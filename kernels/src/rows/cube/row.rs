//! What both kernels are made of: the bitmap of the support, sums over a cube, the head.

use crate::rows::MASKED;
use cubecl::prelude::*;

pub(super) const UNITS: usize = 256;
/// Columns whose support is marked at a time.
pub(super) const STRETCH: usize = 65_536;
/// 8 KiB: half of what WebGPU promises.
pub(super) const WORDS: usize = STRETCH / 32;
/// Below every logit, and finite: exp(s − m) is 0 for s = −∞ and for what is put aside, and never not a
/// number. Logits below it count as −∞.
pub(super) const LOWEST: f32 = -1.0e30;
/// Stands for the logit of a column that is put aside. (WGSL has no literal −∞.)
pub(super) const ABSENT: f32 = -3.0e38;
/// Groups of units where the device has no planes.
const GROUP: usize = 16;

/// Σ exp(s) as exp(max) · sum.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Running {
    pub max: f32,
    pub sum: f32,
}

/// Nothing yet.
#[cube]
pub(super) fn nothing() -> Running {
    Running {
        max: f32::new(LOWEST),
        sum: f32::new(0.0),
    }
}

/// Adds exp(max) · sum.
#[cube]
pub(super) fn add(running: &mut Running, max: f32, sum: f32) {
    let top = f32::max(running.max, max);
    running.sum = running.sum * (running.max - top).exp() + sum * (max - top).exp();
    running.max = top;
}

/// The pairs of all units as one, for every unit.
#[cube]
pub(super) fn over_cube(
    own: Running,
    scratch: &mut Shared<[f32]>,
    #[comptime] planes: bool,
) -> Running {
    let unit = UNIT_POS_X as usize;
    // What lay there before has been read.
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
        let mut running = nothing();
        if unit < groups {
            for i in 0..GROUP {
                let at = 2 * (unit * GROUP + i);
                add(&mut running, scratch[at], scratch[at + 1]);
            }
        }
        sync_cube();
        if unit < groups {
            scratch[2 * unit] = running.max;
            scratch[2 * unit + 1] = running.sum;
        }
    }
    sync_cube();
    let mut all = nothing();
    for group in 0..groups {
        add(&mut all, scratch[2 * group], scratch[2 * group + 1]);
    }
    all
}

/// Σ over the cube of a number of each unit.
#[cube]
pub(super) fn sum_over_cube(
    own: f32,
    scratch: &mut Shared<[f32]>,
    #[comptime] planes: bool,
) -> f32 {
    let own = Running {
        max: f32::new(0.0),
        sum: own,
    };
    over_cube(own, scratch, planes).sum
}

/// A row's ids.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Ids {
    pub at: usize,
    pub step: usize,
    pub k: usize,
    /// Columns that count: the vocabulary, and none in a masked row.
    pub live: usize,
}

#[cube]
pub(super) fn ids<I: Int>(support: &Tensor<I>, row: usize, vocab: u32) -> Ids {
    let at = row * support.stride(0);
    let mut live = vocab as usize;
    if i32::cast_from(support[at]) == MASKED {
        live = 0usize;
    }
    Ids {
        at,
        step: support.stride(1),
        k: support.shape(1),
        live,
    }
}

/// The token of a slot; `live` or more for an empty one.
#[cube]
pub(super) fn id<I: Int>(support: &Tensor<I>, ids: &Ids, slot: usize) -> usize {
    let id = i32::cast_from(support[ids.at + slot * ids.step]);
    let mut token = ids.live;
    if id >= 0 && (id as usize) < ids.live {
        token = id as usize;
    }
    token
}

/// Marks the support within `start..end`. All units take part; what is read behind it sees the marks.
#[cube]
pub(super) fn mark<I: Int>(
    marks: &Shared<[Atomic<u32>]>,
    support: &Tensor<I>,
    ids: &Ids,
    start: usize,
) {
    let unit = UNIT_POS_X as usize;
    // What lay there before has been read.
    sync_cube();
    let mut word = unit;
    while word < WORDS {
        marks[word].store(0u32);
        word += UNITS;
    }
    sync_cube();
    let mut slot = unit;
    while slot < ids.k {
        let token = id(support, ids, slot);
        if token >= start && token < ids.live && token - start < STRETCH {
            let column = (token - start) as u32;
            marks[column as usize / 32].fetch_or(1u32 << (column % 32));
        }
        slot += UNITS;
    }
    sync_cube();
}

/// The marks of the vector that begins at a stretch's `column`: bit i for its lane i.
#[cube]
pub(super) fn marks_at(
    marks: &Shared<[Atomic<u32>]>,
    column: usize,
    #[comptime] lanes: usize,
) -> u32 {
    let word = marks[column / 32].load() >> (column as u32 % 32);
    word & comptime!((1u32 << lanes as u32) - 1)
}

/// What the softmax logits are a multiple of: the logits as they are, or tanh(inner · z).
#[cube]
pub(super) fn capped_logits<N: Size>(
    z: Vector<f32, N>,
    inner: f32,
    #[comptime] capped: bool,
) -> Vector<f32, N> {
    if comptime!(capped) {
        (z * Vector::new(inner)).tanh()
    } else {
        z
    }
}
