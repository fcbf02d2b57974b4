//! The output, with a running maximum and Σ exp a row.

use cubecl::prelude::*;

use super::block::{
    BLOCK, GRID, LOWEST, ROW, STAGED, TILE, TILE_ROW, filled, mix, part, products, score, write,
};

/// Cubes `[heads, blocks of rows]`.
#[cube(launch)]
pub(super) fn forward_kernel<F: Float>(
    q: &Tensor<F>,              // [n, heads · e]
    k: &Tensor<F>,              // [n, key_heads · e]
    v: &Tensor<F>,              // [n, key_heads · e]
    bounds: &Tensor<i32>,       // [2, n]
    output: &mut Tensor<F>,     // [n, heads · e]
    log_sums: &mut Tensor<f32>, // [n, heads]
    scale: f32,
    softcap: f32,
    #[comptime] capped: bool,
    #[comptime] e: usize,
    #[comptime] staged_rows: usize,
    #[define(F)] _dtype: ElemType,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    let n = q.shape(0);
    let (head, heads) = (CUBE_POS_X as usize, CUBE_COUNT_X as usize);
    let key_heads = k.shape(1) / e;
    let key_head = head / (heads / key_heads);
    // The last rows of a long document see most: first, so that they are not left for the end.
    let start = ((n - 1) / BLOCK - CUBE_POS_Y as usize) * BLOCK;
    let end = usize::min(start + BLOCK, n);
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut tile = Shared::<[f32]>::new_slice(TILE);

    let sum_count = comptime!(4 * e.div_ceil(GRID));
    let mut mixed = filled(f32::new(0.0), sum_count);
    let mut maxima = filled(f32::new(LOWEST), 4usize);
    let mut sums = filled(f32::new(0.0), 4usize);
    let mut scores = Array::<f32>::new(16usize);
    let rows = part(head, heads, start, end - start, e);
    let mut key = bounds[start] as usize;
    while key < end {
        let keys = part(key_head, key_heads, key, usize::min(BLOCK, end - key), e);
        products::<F>(q, &rows, k, &keys, &mut staged, &mut scores, e);
        sync_cube();
        #[unroll]
        for i in 0..4usize {
            let row = start + 4 * y + i;
            let first = bounds[usize::min(row, n - 1)] as usize;
            let mut max = f32::new(LOWEST);
            #[unroll]
            for j in 0..4usize {
                let column = key + x + j * GRID;
                let mut s = f32::new(LOWEST);
                if column >= first && column <= row {
                    s = score(scores[4 * i + j], scale, softcap, capped);
                }
                scores[4 * i + j] = s;
                max = f32::max(max, s);
            }
            staged[(4 * y + i) * ROW + x] = max;
        }
        sync_cube();
        #[unroll]
        for i in 0..4usize {
            let mut max = maxima[i];
            for other in 0..GRID {
                max = f32::max(max, staged[(4 * y + i) * ROW + other]);
            }
            let shrunk = (maxima[i] - max).exp();
            maxima[i] = max;
            let mut sum = sums[i] * shrunk;
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
            for c in 0..comptime!(e.div_ceil(GRID)) {
                mixed[4 * c + i] *= shrunk;
            }
        }
        mix::<F>(&tile, v, &keys, &mut staged, &mut mixed, e, staged_rows);
        key += BLOCK;
    }

    // Until here a unit has summed its own columns alone.
    sync_cube();
    #[unroll]
    for i in 0..4usize {
        staged[(4 * y + i) * ROW + x] = sums[i];
    }
    sync_cube();
    let mut shares = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let mut sum = f32::new(0.0);
        for other in 0..GRID {
            sum += staged[(4 * y + i) * ROW + other];
        }
        shares[i] = f32::new(1.0) / sum;
        let row = start + 4 * y + i;
        if x == 0 && row < end {
            log_sums[row * heads + head] = maxima[i] + sum.ln();
        }
    }
    write::<F>(&mixed, &shares, output, &rows, e);
}
