//! What the kernels are made of: 16 × 16 units share a block of 64 × 64 scores, 4 × 4 of them each.
//!
//! A unit's place is (y, x). It has the block's rows 4y + i and, of scores, columns x + 16j; of what is
//! summed over a block, columns x + 16c of the same rows. So a row is 16 units' that lie beside one
//! another. Names: `a` rows and `b` columns of a block of scores.

use cubecl::prelude::*;

/// Rows and columns of a block of scores.
pub(super) const BLOCK: usize = 64;
/// Units along one side of a block.
pub(super) const GRID: usize = 16;
pub(super) const UNITS: u32 = 256;
/// Numbers of a row that `products` stages at a time.
const DEPTH: usize = 16;
/// From a staged row to the next: odd, so that rows begin in banks of their own.
pub(super) const ROW: usize = 17;
/// From a row of `tile` to the next: two neighbouring y fall into different banks.
pub(super) const TILE_ROW: usize = 68;
/// Numbers of shared memory that operands pass through: two blocks of `DEPTH`.
pub(super) const STAGED: usize = 2 * BLOCK * ROW;
/// Numbers of shared memory for a block of weights.
pub(super) const TILE: usize = BLOCK * TILE_ROW;
/// Below every score: WGSL has no literal −∞.
pub(super) const LOWEST: f32 = -3.0e38;

/// A head's part of rows of a matrix.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Part {
    /// Where its first number lies.
    at: usize,
    /// From a row to the next.
    stride: usize,
    /// How many there are, at most a block.
    rows: usize,
}

#[cube]
pub(super) fn part(
    head: usize,
    heads: usize,
    row: usize,
    rows: usize,
    #[comptime] e: usize,
) -> Part {
    Part {
        at: (row * heads + head) * e,
        stride: heads * e,
        rows,
    }
}

/// The unit's 4 × 4 of a · b, over a head's width.
#[cube]
pub(super) fn products<F: Float>(
    a: &Tensor<F>,
    a_part: &Part,
    b: &Tensor<F>,
    b_part: &Part,
    staged: &mut Shared<[f32]>,
    sums: &mut Array<f32>, // [4, 4]
    #[comptime] e: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for i in 0..16usize {
        sums[i] = f32::new(0.0);
    }
    let mut a_four = Array::<f32>::new(4usize);
    let mut from = 0usize;
    while from < e {
        // What lay there before has been read.
        sync_cube();
        let mut at = unit;
        while at < BLOCK * DEPTH {
            let (row, d) = (at / DEPTH, at % DEPTH);
            let mut a_number = f32::new(0.0);
            let mut b_number = f32::new(0.0);
            if from + d < e {
                if row < a_part.rows {
                    a_number = f32::cast_from(a[a_part.at + row * a_part.stride + from + d]);
                }
                if row < b_part.rows {
                    b_number = f32::cast_from(b[b_part.at + row * b_part.stride + from + d]);
                }
            }
            staged[row * ROW + d] = a_number;
            staged[(BLOCK + row) * ROW + d] = b_number;
            at += UNITS as usize;
        }
        sync_cube();
        for d in 0..DEPTH {
            #[unroll]
            for i in 0..4usize {
                a_four[i] = staged[(4 * y + i) * ROW + d];
            }
            #[unroll]
            for j in 0..4usize {
                let b_number = staged[(BLOCK + x + j * GRID) * ROW + d];
                #[unroll]
                for i in 0..4usize {
                    sums[4 * i + j] += a_four[i] * b_number;
                }
            }
        }
        from += DEPTH;
    }
}

/// Adds tile · rows of b to the unit's four rows of `sums`.
#[cube]
pub(super) fn mix<F: Float>(
    tile: &Shared<[f32]>,
    b: &Tensor<F>,
    b_part: &Part,
    staged: &mut Shared<[f32]>,
    sums: &mut Array<f32>, // [columns of a unit, 4]
    #[comptime] e: usize,
    #[comptime] staged_rows: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    let columns = comptime!(e.div_ceil(GRID));
    let width = comptime!(columns * GRID);
    let mut weights = Array::<f32>::new(4usize);
    let mut from = 0usize;
    while from < b_part.rows {
        // The tile has been written, and what was staged has been read.
        sync_cube();
        let mut at = unit;
        while at < staged_rows * width {
            let (row, d) = (from + at / width, at % width);
            let mut number = f32::new(0.0);
            if d < e && row < b_part.rows {
                number = f32::cast_from(b[b_part.at + row * b_part.stride + d]);
            }
            staged[at] = number;
            at += UNITS as usize;
        }
        sync_cube();
        for row in 0..staged_rows {
            #[unroll]
            for i in 0..4usize {
                weights[i] = tile[(4 * y + i) * TILE_ROW + from + row];
            }
            #[unroll]
            for c in 0..columns {
                let number = staged[row * width + c * GRID + x];
                #[unroll]
                for i in 0..4usize {
                    sums[4 * c + i] += weights[i] * number;
                }
            }
        }
        from += staged_rows;
    }
}

/// The score of q · k.
#[cube]
pub(super) fn score(product: f32, scale: f32, softcap: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        (product * scale / softcap).tanh() * softcap
    } else {
        product * scale
    }
}

/// ∂s/∂(q · k), from the score s.
#[cube]
pub(super) fn slope(score: f32, scale: f32, softcap: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        let t = score / softcap;
        (f32::new(1.0) - t * t) * scale
    } else {
        scale
    }
}

/// Writes the unit's four rows of sums, each times a factor of its own.
#[cube]
pub(super) fn write<F: Float>(
    sums: &Array<f32>,    // [columns of a unit, 4]
    factors: &Array<f32>, // [4]
    out: &mut Tensor<F>,
    out_part: &Part,
    #[comptime] e: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for c in 0..comptime!(e.div_ceil(GRID)) {
        let d = x + c * GRID;
        #[unroll]
        for i in 0..4usize {
            let row = 4 * y + i;
            if d < e && row < out_part.rows {
                out[out_part.at + row * out_part.stride + d] =
                    F::cast_from(sums[4 * c + i] * factors[i]);
            }
        }
    }
}

#[cube]
pub(super) fn filled(value: f32, #[comptime] len: usize) -> Array<f32> {
    let mut array = Array::<f32>::new(len);
    #[unroll]
    for i in 0..len {
        array[i] = value;
    }
    array
}
