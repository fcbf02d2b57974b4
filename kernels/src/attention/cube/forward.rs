//! The kernel of the output, with a running maximum and Σ exp of each row.

use cubecl::prelude::*;

use super::block::{
    BLOCK, GRID, LOWEST, QueryBlock, ROW, STAGED, ScoreFunction, TILE, TILE_ROW, add_weighted_rows,
    block_products, filled_array, head_rows, query_block, score, write_rows,
};

/// Computes the output and log Z of a block of rows. Cubes are `[heads, blocks of rows]`.
#[cube(launch)]
pub(super) fn forward_kernel<F: Float>(
    q: &Tensor<F>,              // [n, heads · e]
    k: &Tensor<F>,              // [n, key_heads · e]
    v: &Tensor<F>,              // [n, key_heads · w]
    sinks: &Tensor<f32>,        // [heads]
    bounds: &Tensor<i32>,       // [2, n]
    output: &mut Tensor<F>,     // [n, heads · w]
    log_sums: &mut Tensor<f32>, // [n, heads]
    scale: f32,
    softcap: f32,
    #[comptime] capped: bool,
    #[comptime] e: usize,
    #[comptime] w: usize,
    #[define(F)] _dtype: ElemType,
) {
    let block = query_block::<F>(q, k, e);
    let function = ScoreFunction {
        scale,
        softcap,
        capped,
    };
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut tile = Shared::<[f32]>::new_slice(TILE);
    let columns = comptime!(w.div_ceil(GRID));
    let mut weighted = filled_array(f32::new(0.0), comptime!(4 * columns));
    let sink = sinks[block.head];
    let mut maxima = filled_array(sink, 4usize);
    let mut sums = filled_array(f32::new(0.0), 4usize);
    let mut scores = Array::<f32>::new(16usize);
    let row_count = block.end - block.start;
    let rows = head_rows(block.head, block.heads, block.start, row_count, e);
    let mut key = bounds[block.start] as usize;
    while key < block.end {
        let key_rows = usize::min(BLOCK, block.end - key);
        let keys = head_rows(block.key_head, block.key_heads, key, key_rows, e);
        block_products::<F>(q, &rows, k, &keys, &mut staged, &mut scores, e);
        sync_cube();
        mask_scores(&block, key, bounds, &function, &mut scores, &mut staged);
        sync_cube();
        add_weights(
            &scores,
            &staged,
            &mut maxima,
            &mut sums,
            &mut weighted,
            &mut tile,
            columns,
        );
        let values = head_rows(block.key_head, block.key_heads, key, key_rows, w);
        add_weighted_rows::<F>(&tile, v, &values, &mut staged, &mut weighted, w);
        key += BLOCK;
    }
    let inverse_sums = finish_sums(&block, sink, &maxima, &sums, &mut staged, log_sums);
    let output_rows = head_rows(block.head, block.heads, block.start, row_count, w);
    write_rows::<F>(&weighted, &inverse_sums, output, &output_rows, w);
}

/// Replaces the unit's products q · k by scores, or by [`LOWEST`] for keys that a row does not see, and stages the
/// largest score of each of its rows.
#[cube]
fn mask_scores(
    block: &QueryBlock,
    key: usize,
    bounds: &Tensor<i32>,
    function: &ScoreFunction,
    scores: &mut Array<f32>,
    staged: &mut Shared<[f32]>,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for i in 0..4usize {
        let row = block.start + 4 * y + i;
        let first = bounds[usize::min(row, block.n - 1)] as usize;
        let mut max = f32::new(LOWEST);
        #[unroll]
        for j in 0..4usize {
            let column = key + x + j * GRID;
            let mut s = f32::new(LOWEST);
            if column >= first && column <= row {
                s = score(scores[4 * i + j], function);
            }
            scores[4 * i + j] = s;
            max = f32::max(max, s);
        }
        staged[(4 * y + i) * ROW + x] = max;
    }
}

/// Updates the running maxima from the staged ones, rescales the unit's sums to them, and writes the weights
/// exp(s − max) to the tile and adds them to the unit's sums.
#[cube]
fn add_weights(
    scores: &Array<f32>,
    staged: &Shared<[f32]>,
    maxima: &mut Array<f32>,
    sums: &mut Array<f32>,
    weighted: &mut Array<f32>,
    tile: &mut Shared<[f32]>,
    #[comptime] columns: usize,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for i in 0..4usize {
        let mut max = maxima[i];
        for other in 0..GRID {
            max = f32::max(max, staged[(4 * y + i) * ROW + other]);
        }
        let rescale = (maxima[i] - max).exp();
        maxima[i] = max;
        let mut sum = sums[i] * rescale;
        #[unroll]
        for j in 0..4usize {
            let mut weight = (scores[4 * i + j] - max).exp();
            if scores[4 * i + j] <= f32::new(LOWEST) {
                weight = f32::new(0.0);
            }
            tile[(4 * y + i) * TILE_ROW + x + j * GRID] = weight;
            sum += weight;
        }
        sums[i] = sum;
        #[unroll]
        for c in 0..columns {
            weighted[4 * c + i] *= rescale;
        }
    }
}

/// Adds the sums of the 16 units of each row and the sink's part, writes log Z, and returns 1 / Z of the unit's rows,
/// relative to their maxima.
#[cube]
fn finish_sums(
    block: &QueryBlock,
    sink: f32,
    maxima: &Array<f32>,
    sums: &Array<f32>,
    staged: &mut Shared<[f32]>,
    log_sums: &mut Tensor<f32>,
) -> Array<f32> {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    sync_cube();
    #[unroll]
    for i in 0..4usize {
        staged[(4 * y + i) * ROW + x] = sums[i];
    }
    sync_cube();
    let mut inverse_sums = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let mut sum = (sink - maxima[i]).exp();
        for other in 0..GRID {
            sum += staged[(4 * y + i) * ROW + other];
        }
        inverse_sums[i] = f32::new(1.0) / sum;
        let row = block.start + 4 * y + i;
        if x == 0 && row < block.end {
            log_sums[row * block.heads + block.head] = maxima[i] + sum.ln();
        }
    }
    inverse_sums
}
