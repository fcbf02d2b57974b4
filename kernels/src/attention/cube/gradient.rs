//! The gradients: the scores are computed again, from q, k and what the forward pass kept of each row.

use cubecl::prelude::*;

use super::block::{
    BLOCK, GRID, STAGED, TILE, TILE_ROW, UNITS, filled, mix, part, products, score, slope, write,
};

/// log Σ exp(s) and D = Σ ∂L/∂o · o of each row and head, beside one another; one unit each.
#[cube(launch)]
pub(super) fn row_numbers_kernel<F: Float>(
    gradient: &Tensor<F>,          // [n, heads · e], ∂L/∂o
    output: &Tensor<F>,            // [n, heads · e]
    log_sums: &Tensor<f32>,        // [n, heads]
    row_numbers: &mut Tensor<f32>, // [n, heads, 2]
    #[comptime] e: usize,
    #[define(F)] _dtype: ElemType,
) {
    let place = (CUBE_POS_X * UNITS + UNIT_POS_X) as usize;
    if place < log_sums.shape(0) * log_sums.shape(1) {
        let mut shared = f32::new(0.0);
        for d in 0..e {
            shared +=
                f32::cast_from(gradient[place * e + d]) * f32::cast_from(output[place * e + d]);
        }
        row_numbers[2 * place] = log_sums[place];
        row_numbers[2 * place + 1] = shared;
    }
}

/// ∂L/∂k, and behind it ∂L/∂v. Cubes `[key heads, blocks of keys]`; a block's rows are keys here, its
/// columns queries.
#[cube(launch)]
pub(super) fn key_gradient_kernel<F: Float>(
    q: &Tensor<F>,             // [n, heads · e]
    k: &Tensor<F>,             // [n, key_heads · e]
    v: &Tensor<F>,             // [n, key_heads · e]
    gradient: &Tensor<F>,      // [n, heads · e], ∂L/∂o
    row_numbers: &Tensor<f32>, // [n, heads, 2]
    bounds: &Tensor<i32>,      // [2, n]
    out: &mut Tensor<F>,       // [2, n, key_heads · e]
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
    let heads = q.shape(1) / e;
    let (key_head, key_heads) = (CUBE_POS_X as usize, CUBE_COUNT_X as usize);
    let group = heads / key_heads;
    let start = CUBE_POS_Y as usize * BLOCK;
    let end = usize::min(start + BLOCK, n);
    let seen_until = bounds[n + end - 1] as usize;
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut tile = Shared::<[f32]>::new_slice(TILE);

    let sum_count = comptime!(4 * e.div_ceil(GRID));
    let mut key_sums = filled(f32::new(0.0), sum_count);
    let mut value_sums = filled(f32::new(0.0), sum_count);
    let mut scores = Array::<f32>::new(16usize);
    let mut slopes = Array::<f32>::new(16usize);
    let keys = part(key_head, key_heads, start, end - start, e);
    for member in 0..group {
        let head = key_head * group + member;
        let mut query = start;
        while query < seen_until {
            let rows = part(head, heads, query, usize::min(BLOCK, seen_until - query), e);
            products::<F>(k, &keys, q, &rows, &mut staged, &mut scores, e);
            products::<F>(v, &keys, gradient, &rows, &mut staged, &mut slopes, e);
            #[unroll]
            for j in 0..4usize {
                let row = query + x + j * GRID;
                let known = usize::min(row, n - 1);
                let first = bounds[known] as usize;
                let log_sum = row_numbers[2 * (known * heads + head)];
                let shared = row_numbers[2 * (known * heads + head) + 1];
                #[unroll]
                for i in 0..4usize {
                    let column = start + 4 * y + i;
                    let mut weight = f32::new(0.0);
                    let mut change = f32::new(0.0);
                    if row < seen_until && column >= first && column <= row {
                        let s = score(scores[4 * i + j], scale, softcap, capped);
                        weight = (s - log_sum).exp();
                        change = weight
                            * (slopes[4 * i + j] - shared)
                            * slope(s, scale, softcap, capped);
                    }
                    tile[(4 * y + i) * TILE_ROW + x + j * GRID] = weight;
                    slopes[4 * i + j] = change;
                }
            }
            mix::<F>(
                &tile,
                gradient,
                &rows,
                &mut staged,
                &mut value_sums,
                e,
                staged_rows,
            );
            sync_cube();
            #[unroll]
            for i in 0..4usize {
                #[unroll]
                for j in 0..4usize {
                    tile[(4 * y + i) * TILE_ROW + x + j * GRID] = slopes[4 * i + j];
                }
            }
            mix::<F>(&tile, q, &rows, &mut staged, &mut key_sums, e, staged_rows);
            query += BLOCK;
        }
    }
    let ones = filled(f32::new(1.0), 4usize);
    write::<F>(&key_sums, &ones, out, &keys, e);
    let behind = part(key_head, key_heads, n + start, end - start, e);
    write::<F>(&value_sums, &ones, out, &behind, e);
}

/// ∂L/∂q. Cubes `[heads, blocks of rows]`.
#[cube(launch)]
pub(super) fn query_gradient_kernel<F: Float>(
    q: &Tensor<F>,             // [n, heads · e]
    k: &Tensor<F>,             // [n, key_heads · e]
    v: &Tensor<F>,             // [n, key_heads · e]
    gradient: &Tensor<F>,      // [n, heads · e], ∂L/∂o
    row_numbers: &Tensor<f32>, // [n, heads, 2]
    bounds: &Tensor<i32>,      // [2, n]
    out: &mut Tensor<F>,       // [n, heads · e]
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
    let start = ((n - 1) / BLOCK - CUBE_POS_Y as usize) * BLOCK;
    let end = usize::min(start + BLOCK, n);
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut tile = Shared::<[f32]>::new_slice(TILE);

    let sum_count = comptime!(4 * e.div_ceil(GRID));
    let mut sums = filled(f32::new(0.0), sum_count);
    let mut scores = Array::<f32>::new(16usize);
    let mut slopes = Array::<f32>::new(16usize);
    let rows = part(head, heads, start, end - start, e);
    let mut key = bounds[start] as usize;
    while key < end {
        let keys = part(key_head, key_heads, key, usize::min(BLOCK, end - key), e);
        products::<F>(q, &rows, k, &keys, &mut staged, &mut scores, e);
        products::<F>(gradient, &rows, v, &keys, &mut staged, &mut slopes, e);
        #[unroll]
        for i in 0..4usize {
            let row = start + 4 * y + i;
            let known = usize::min(row, n - 1);
            let first = bounds[known] as usize;
            let log_sum = row_numbers[2 * (known * heads + head)];
            let shared = row_numbers[2 * (known * heads + head) + 1];
            #[unroll]
            for j in 0..4usize {
                let column = key + x + j * GRID;
                let mut change = f32::new(0.0);
                if row < end && column >= first && column <= row {
                    let s = score(scores[4 * i + j], scale, softcap, capped);
                    change = (s - log_sum).exp()
                        * (slopes[4 * i + j] - shared)
                        * slope(s, scale, softcap, capped);
                }
                tile[(4 * y + i) * TILE_ROW + x + j * GRID] = change;
            }
        }
        mix::<F>(&tile, k, &keys, &mut staged, &mut sums, e, staged_rows);
        key += BLOCK;
    }
    let ones = filled(f32::new(1.0), 4usize);
    write::<F>(&sums, &ones, out, &rows, e);
}
