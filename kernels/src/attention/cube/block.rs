//! Parts of the attention kernels: 16 × 16 units share a block of 64 × 64 scores, and each computes 4 × 4 of them.
//!
//! The unit at (y, x) has rows 4y + i of the block, i < 4. Of the scores it has columns x + 16j, j < 4; of sums over a
//! block, such as the output, it has columns x + 16c. So a row belongs to 16 adjacent units. The rows of a block of
//! scores are rows of `a`, and its columns are rows of `b`.

use cubecl::prelude::*;

/// Rows and columns of a block of scores.
pub(super) const BLOCK: usize = 64;
/// Units along one side of a block.
pub(super) const GRID: usize = 16;
pub(super) const UNITS: u32 = 256;
/// Numbers of a row that `block_products` stages at a time.
const DEPTH: usize = 16;
/// Distance between staged rows: odd, so that rows begin in different banks.
pub(super) const ROW: usize = 17;
/// Distance between rows of the tile: units with neighbouring y access different banks.
pub(super) const TILE_ROW: usize = 68;
/// Numbers of shared memory that stage operands: two blocks of `DEPTH` numbers per row.
pub(super) const STAGED: usize = 2 * BLOCK * ROW;
/// Numbers of shared memory for the tile, a block of weights.
pub(super) const TILE: usize = BLOCK * TILE_ROW;
/// Value below every score. (WGSL has no literal for −∞.)
pub(super) const LOWEST: f32 = -3.0e38;

/// The columns of one head in up to a block of rows of a matrix.
#[derive(CubeType, Clone, Copy)]
pub(super) struct HeadRows {
    /// Index of the first number.
    start: usize,
    /// Distance between rows.
    stride: usize,
    /// Number of rows.
    pub rows: usize,
}

/// Rows of a head that are staged at a time: a power of two, and so a divisor of a block.
fn staged_rows(width: usize) -> usize {
    let fit = (STAGED / width.next_multiple_of(GRID)).min(BLOCK);
    1 << fit.ilog2()
}

#[cube]
pub(super) fn head_rows(
    head: usize,
    heads: usize,
    row: usize,
    rows: usize,
    #[comptime] width: usize,
) -> HeadRows {
    HeadRows {
        start: (row * heads + head) * width,
        stride: heads * width,
        rows,
    }
}

/// The columns of a head in rows of a matrix whose rows hold `row_width` numbers; the first head's columns start at
/// `column`.
#[cube]
pub(super) fn head_rows_within(
    head: usize,
    row: usize,
    rows: usize,
    column: usize,
    row_width: usize,
    #[comptime] width: usize,
) -> HeadRows {
    HeadRows {
        start: row * row_width + column + head * width,
        stride: row_width,
        rows,
    }
}

/// The head and the block of query rows that a cube processes. Cubes are `[heads, blocks of rows]`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct QueryBlock {
    pub n: usize,
    pub head: usize,
    pub heads: usize,
    /// The head of the keys and values that the query head uses.
    pub key_head: usize,
    pub key_heads: usize,
    /// First row.
    pub start: usize,
    /// Row after the last.
    pub end: usize,
}

#[cube]
pub(super) fn query_block<F: Float>(
    q: &Tensor<F>,
    k: &Tensor<F>,
    #[comptime] e: usize,
) -> QueryBlock {
    let n = q.shape(0);
    let (head, heads) = (CUBE_POS_X as usize, CUBE_COUNT_X as usize);
    let key_heads = k.shape(1) / e;
    let key_head = head / (heads / key_heads);
    // The last rows of a long document see most keys. They come first, so that no long cube is left at the end.
    let start = ((n - 1) / BLOCK - CUBE_POS_Y as usize) * BLOCK;
    let end = usize::min(start + BLOCK, n);
    QueryBlock {
        n,
        head,
        heads,
        key_head,
        key_heads,
        start,
        end,
    }
}

/// Computes the unit's 4 × 4 dot products of rows of a and rows of b over a head's width.
#[cube]
pub(super) fn block_products<F: Float>(
    a: &Tensor<F>,
    a_rows: &HeadRows,
    b: &Tensor<F>,
    b_rows: &HeadRows,
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
    let mut a_numbers = Array::<f32>::new(4usize);
    let mut from = 0usize;
    while from < e {
        // All units have read what was staged before.
        sync_cube();
        let mut at = unit;
        while at < BLOCK * DEPTH {
            let (row, d) = (at / DEPTH, at % DEPTH);
            let mut a_number = f32::new(0.0);
            let mut b_number = f32::new(0.0);
            if from + d < e {
                if row < a_rows.rows {
                    a_number = f32::cast_from(a[a_rows.start + row * a_rows.stride + from + d]);
                }
                if row < b_rows.rows {
                    b_number = f32::cast_from(b[b_rows.start + row * b_rows.stride + from + d]);
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
                a_numbers[i] = staged[(4 * y + i) * ROW + d];
            }
            #[unroll]
            for j in 0..4usize {
                let b_number = staged[(BLOCK + x + j * GRID) * ROW + d];
                #[unroll]
                for i in 0..4usize {
                    sums[4 * i + j] += a_numbers[i] * b_number;
                }
            }
        }
        from += DEPTH;
    }
}

/// Adds the product of the tile and rows of b to the unit's four rows of `sums`.
#[cube]
pub(super) fn add_weighted_rows<F: Float>(
    tile: &Shared<[f32]>,
    b: &Tensor<F>,
    b_rows: &HeadRows,
    staged: &mut Shared<[f32]>,
    sums: &mut Array<f32>, // [columns of a unit, 4]
    #[comptime] head_width: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    let columns = comptime!(head_width.div_ceil(GRID));
    let width = comptime!(columns * GRID);
    let row_count = comptime!(staged_rows(head_width));
    let mut weights = Array::<f32>::new(4usize);
    let mut from = 0usize;
    while from < b_rows.rows {
        // All units have written the tile and read what was staged before.
        sync_cube();
        let mut at = unit;
        while at < row_count * width {
            let (row, d) = (from + at / width, at % width);
            let mut number = f32::new(0.0);
            if d < head_width && row < b_rows.rows {
                number = f32::cast_from(b[b_rows.start + row * b_rows.stride + d]);
            }
            staged[at] = number;
            at += UNITS as usize;
        }
        sync_cube();
        for row in 0..row_count {
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
        from += row_count;
    }
}

/// The function from q · k to the score.
#[derive(CubeType, Clone, Copy)]
pub(super) struct ScoreFunction {
    pub scale: f32,
    pub softcap: f32,
    #[cube(comptime)]
    pub capped: bool,
}

/// Computes the score of q · k.
#[cube]
pub(super) fn score(product: f32, function: &ScoreFunction) -> f32 {
    if comptime!(function.capped) {
        (product * function.scale / function.softcap).tanh() * function.softcap
    } else {
        product * function.scale
    }
}

/// Computes ∂s/∂(q · k) from the score s.
#[cube]
pub(super) fn score_slope(score: f32, function: &ScoreFunction) -> f32 {
    if comptime!(function.capped) {
        let t = score / function.softcap;
        (f32::new(1.0) - t * t) * function.scale
    } else {
        function.scale
    }
}

/// Writes the unit's four rows of sums, each multiplied by its factor.
#[cube]
pub(super) fn write_rows<F: Float>(
    sums: &Array<f32>,    // [columns of a unit, 4]
    factors: &Array<f32>, // [4]
    out: &mut Tensor<F>,
    out_rows: &HeadRows,
    #[comptime] width: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for c in 0..comptime!(width.div_ceil(GRID)) {
        let d = x + c * GRID;
        #[unroll]
        for i in 0..4usize {
            let row = 4 * y + i;
            if d < width && row < out_rows.rows {
                out[out_rows.start + row * out_rows.stride + d] =
                    F::cast_from(sums[4 * c + i] * factors[i]);
            }
        }
    }
}

#[cube]
pub(super) fn filled_array(value: f32, #[comptime] len: usize) -> Array<f32> {
    let mut array = Array::<f32>::new(len);
    #[unroll]
    for i in 0..len {
        array[i] = value;
    }
    array
}
