//! The device code: 16 × 16 units share a block of 64 × 64 scores, 4 × 4 of them each.
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
const ROW: usize = 17;
/// From a row of `tile` to the next: two neighbouring y fall into different banks.
const TILE_ROW: usize = 68;
/// Numbers of shared memory that operands pass through: two blocks of `DEPTH`.
pub(super) const STAGED: usize = 2 * BLOCK * ROW;
/// Numbers of shared memory for a block of weights.
pub(super) const TILE: usize = BLOCK * TILE_ROW;
/// Below every score: WGSL has no literal −∞.
const LOWEST: f32 = -3.0e38;

/// A head's part of rows of a matrix.
#[derive(CubeType, Clone, Copy)]
struct Part {
    /// Where its first number lies.
    at: usize,
    /// From a row to the next.
    stride: usize,
    /// How many there are, at most a block.
    rows: usize,
}

#[cube]
fn part(head: usize, heads: usize, row: usize, rows: usize, #[comptime] e: usize) -> Part {
    Part {
        at: (row * heads + head) * e,
        stride: heads * e,
        rows,
    }
}

/// The unit's 4 × 4 of a · b, over a head's width.
#[cube]
fn products<F: Float>(
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
fn mix<F: Float>(
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
fn score(product: f32, scale: f32, softcap: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        (product * scale / softcap).tanh() * softcap
    } else {
        product * scale
    }
}

/// ∂s/∂(q · k), from the score s.
#[cube]
fn slope(score: f32, scale: f32, softcap: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        let t = score / softcap;
        (f32::new(1.0) - t * t) * scale
    } else {
        scale
    }
}

/// Writes the unit's four rows of sums, each times a factor of its own.
#[cube]
fn write<F: Float>(
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
fn filled(value: f32, #[comptime] len: usize) -> Array<f32> {
    let mut array = Array::<f32>::new(len);
    #[unroll]
    for i in 0..len {
        array[i] = value;
    }
    array
}

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
