//! The kernels of the gradients. They compute the scores again from q and k, and the weights from the log-sums that the
//! forward pass kept.

use cubecl::prelude::*;

use super::block::{
    BLOCK, GRID, QueryBlock, STAGED, ScoreFunction, TILE, TILE_ROW, UNITS, add_weighted_rows,
    block_products, filled_array, head_rows, head_rows_within, query_block, score, score_slope,
    write_rows,
};

/// Writes log Z and D = Σ ∂L/∂o · o of each row and head next to each other; one unit for each pair.
#[cube(launch)]
pub(super) fn row_constants_kernel<F: Float>(
    gradient: &Tensor<F>,            // [n, heads · w], ∂L/∂o
    output: &Tensor<F>,              // [n, heads · w]
    log_sums: &Tensor<f32>,          // [n, heads]
    row_constants: &mut Tensor<f32>, // [n, heads, 2]
    #[comptime] w: usize,
    #[define(F)] _dtype: ElemType,
) {
    let index = (CUBE_POS_X * UNITS + UNIT_POS_X) as usize;
    if index < log_sums.shape(0) * log_sums.shape(1) {
        let mut product = f32::new(0.0);
        for d in 0..w {
            product +=
                f32::cast_from(gradient[index * w + d]) * f32::cast_from(output[index * w + d]);
        }
        row_constants[2 * index] = log_sums[index];
        row_constants[2 * index + 1] = product;
    }
}

/// Computes ∂L/∂sink of each head. Cubes are `[heads]`.
#[cube(launch)]
pub(super) fn sink_gradient_kernel(
    row_constants: &Tensor<f32>, // [n, heads, 2]
    sinks: &Tensor<f32>,         // [heads]
    out: &mut Tensor<f32>,       // [heads]
) {
    let (head, heads) = (CUBE_POS_X as usize, CUBE_COUNT_X as usize);
    let unit = UNIT_POS_X as usize;
    let n = row_constants.shape(0);
    let sink = sinks[head];
    let mut sum = f32::new(0.0);
    let mut row = unit;
    while row < n {
        let index = 2 * (row * heads + head);
        sum -= (sink - row_constants[index]).exp() * row_constants[index + 1];
        row += UNITS as usize;
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
    sums[unit] = sum;
    sync_cube();
    if unit == 0 {
        let mut total = f32::new(0.0);
        let mut other = 0usize;
        while other < UNITS as usize {
            total += sums[other];
            other += 1;
        }
        out[head] = total;
    }
}

/// The constants of a query row in the gradients.
#[derive(CubeType, Clone, Copy)]
struct RowConstants {
    /// First key that the row sees.
    first: usize,
    /// log Z.
    log_sum: f32,
    /// D = Σ ∂L/∂o · o.
    output_dot_gradient: f32,
}

/// Reads the constants of a row; those of the last row for a row beyond it.
#[cube]
fn read_row_constants(
    row_constants: &Tensor<f32>,
    bounds: &Tensor<i32>,
    row: usize,
    n: usize,
    head: usize,
    heads: usize,
) -> RowConstants {
    let row = usize::min(row, n - 1);
    RowConstants {
        first: bounds[row] as usize,
        log_sum: row_constants[2 * (row * heads + head)],
        output_dot_gradient: row_constants[2 * (row * heads + head) + 1],
    }
}

/// Computes ∂L/∂k and ∂L/∂v, next to each other in each row. Cubes are `[key heads, blocks of keys]`. Here the rows of a block of scores are
/// keys, and its columns are query rows.
#[cube(launch)]
pub(super) fn key_gradient_kernel<F: Float>(
    q: &Tensor<F>,               // [n, heads · e]
    k: &Tensor<F>,               // [n, key_heads · e]
    v: &Tensor<F>,               // [n, key_heads · w]
    gradient: &Tensor<F>,        // [n, heads · w], ∂L/∂o
    row_constants: &Tensor<f32>, // [n, heads, 2]
    bounds: &Tensor<i32>,        // [2, n]
    out: &mut Tensor<F>,         // [n, key_heads · (e + w)]
    scale: f32,
    softcap: f32,
    #[comptime] capped: bool,
    #[comptime] e: usize,
    #[comptime] w: usize,
    #[define(F)] _dtype: ElemType,
) {
    let function = ScoreFunction {
        scale,
        softcap,
        capped,
    };
    let block = key_block::<F>(q, bounds, e);
    let group = block.heads / block.key_heads;
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut tile = Shared::<[f32]>::new_slice(TILE);
    let mut key_sums = filled_array(f32::new(0.0), comptime!(4 * e.div_ceil(GRID)));
    let mut value_sums = filled_array(f32::new(0.0), comptime!(4 * w.div_ceil(GRID)));
    let mut scores = Array::<f32>::new(16usize);
    let mut slopes = Array::<f32>::new(16usize);
    let key_count = block.end - block.start;
    let keys = head_rows(block.key_head, block.key_heads, block.start, key_count, e);
    let values = head_rows(block.key_head, block.key_heads, block.start, key_count, w);
    for member in 0..group {
        let head = block.key_head * group + member;
        let mut query = block.start;
        while query < block.seen_until {
            let row_count = usize::min(BLOCK, block.seen_until - query);
            let rows = head_rows(head, block.heads, query, row_count, e);
            let output_rows = head_rows(head, block.heads, query, row_count, w);
            block_products::<F>(k, &keys, q, &rows, &mut staged, &mut scores, e);
            block_products::<F>(
                v,
                &values,
                gradient,
                &output_rows,
                &mut staged,
                &mut slopes,
                w,
            );
            write_key_weights(
                &block,
                head,
                query,
                bounds,
                row_constants,
                &function,
                &scores,
                &mut slopes,
                &mut tile,
            );
            add_weighted_rows::<F>(
                &tile,
                gradient,
                &output_rows,
                &mut staged,
                &mut value_sums,
                w,
            );
            sync_cube();
            write_tile(&slopes, &mut tile);
            add_weighted_rows::<F>(&tile, q, &rows, &mut staged, &mut key_sums, e);
            query += BLOCK;
        }
    }
    write_key_gradients::<F>(&block, &key_sums, &value_sums, out, e, w);
}

/// Writes the unit's sums for ∂L/∂k and ∂L/∂v.
#[cube]
fn write_key_gradients<F: Float>(
    block: &KeyBlock,
    key_sums: &Array<f32>,
    value_sums: &Array<f32>,
    out: &mut Tensor<F>,
    #[comptime] e: usize,
    #[comptime] w: usize,
) {
    let ones = filled_array(f32::new(1.0), 4usize);
    let (head, rows) = (block.key_head, block.end - block.start);
    let row_width = block.key_heads * comptime!(e + w);
    let keys = head_rows_within(head, block.start, rows, 0usize, row_width, e);
    write_rows::<F>(key_sums, &ones, out, &keys, e);
    let value_column = block.key_heads * e;
    let values = head_rows_within(head, block.start, rows, value_column, row_width, w);
    write_rows::<F>(value_sums, &ones, out, &values, w);
}

/// The head and the block of keys that a cube of [`key_gradient_kernel`] processes.
#[derive(CubeType, Clone, Copy)]
struct KeyBlock {
    n: usize,
    heads: usize,
    key_head: usize,
    key_heads: usize,
    /// First key.
    start: usize,
    /// Key after the last.
    end: usize,
    /// Row after the last that sees a key of the block.
    seen_until: usize,
}

#[cube]
fn key_block<F: Float>(q: &Tensor<F>, bounds: &Tensor<i32>, #[comptime] e: usize) -> KeyBlock {
    let n = q.shape(0);
    let heads = q.shape(1) / e;
    let (key_head, key_heads) = (CUBE_POS_X as usize, CUBE_COUNT_X as usize);
    let start = CUBE_POS_Y as usize * BLOCK;
    let end = usize::min(start + BLOCK, n);
    KeyBlock {
        n,
        heads,
        key_head,
        key_heads,
        start,
        end,
        seen_until: bounds[n + end - 1] as usize,
    }
}

/// Writes the unit's weights p to the tile, and replaces its products v · ∂L/∂o by ∂L/∂(q · k).
#[cube]
fn write_key_weights(
    block: &KeyBlock,
    head: usize,
    query: usize,
    bounds: &Tensor<i32>,
    row_constants: &Tensor<f32>,
    function: &ScoreFunction,
    scores: &Array<f32>,
    slopes: &mut Array<f32>,
    tile: &mut Shared<[f32]>,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for j in 0..4usize {
        let row = query + x + j * GRID;
        let constants = read_row_constants(row_constants, bounds, row, block.n, head, block.heads);
        #[unroll]
        for i in 0..4usize {
            let column = block.start + 4 * y + i;
            let mut weight = f32::new(0.0);
            let mut change = f32::new(0.0);
            if row < block.seen_until && column >= constants.first && column <= row {
                let s = score(scores[4 * i + j], function);
                weight = (s - constants.log_sum).exp();
                change = weight
                    * (slopes[4 * i + j] - constants.output_dot_gradient)
                    * score_slope(s, function);
            }
            tile[(4 * y + i) * TILE_ROW + x + j * GRID] = weight;
            slopes[4 * i + j] = change;
        }
    }
}

/// Writes the unit's 4 × 4 numbers to the tile.
#[cube]
fn write_tile(numbers: &Array<f32>, tile: &mut Shared<[f32]>) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for i in 0..4usize {
        #[unroll]
        for j in 0..4usize {
            tile[(4 * y + i) * TILE_ROW + x + j * GRID] = numbers[4 * i + j];
        }
    }
}

/// Computes ∂L/∂q. Cubes are `[heads, blocks of rows]`.
#[cube(launch)]
pub(super) fn query_gradient_kernel<F: Float>(
    q: &Tensor<F>,               // [n, heads · e]
    k: &Tensor<F>,               // [n, key_heads · e]
    v: &Tensor<F>,               // [n, key_heads · w]
    gradient: &Tensor<F>,        // [n, heads · w], ∂L/∂o
    row_constants: &Tensor<f32>, // [n, heads, 2]
    bounds: &Tensor<i32>,        // [2, n]
    out: &mut Tensor<F>,         // [n, heads · e]
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
    let mut sums = filled_array(f32::new(0.0), comptime!(4 * e.div_ceil(GRID)));
    let mut scores = Array::<f32>::new(16usize);
    let mut slopes = Array::<f32>::new(16usize);
    let row_count = block.end - block.start;
    let rows = head_rows(block.head, block.heads, block.start, row_count, e);
    let output_rows = head_rows(block.head, block.heads, block.start, row_count, w);
    let mut key = bounds[block.start] as usize;
    while key < block.end {
        let key_rows = usize::min(BLOCK, block.end - key);
        let keys = head_rows(block.key_head, block.key_heads, key, key_rows, e);
        block_products::<F>(q, &rows, k, &keys, &mut staged, &mut scores, e);
        let values = head_rows(block.key_head, block.key_heads, key, key_rows, w);
        block_products::<F>(
            gradient,
            &output_rows,
            v,
            &values,
            &mut staged,
            &mut slopes,
            w,
        );
        write_query_slopes(
            &block,
            key,
            bounds,
            row_constants,
            &function,
            &scores,
            &slopes,
            &mut tile,
        );
        add_weighted_rows::<F>(&tile, k, &keys, &mut staged, &mut sums, e);
        key += BLOCK;
    }
    let ones = filled_array(f32::new(1.0), 4usize);
    write_rows::<F>(&sums, &ones, out, &rows, e);
}

/// Writes the unit's ∂L/∂(q · k) to the tile, from its products q · k and ∂L/∂o · v.
#[cube]
fn write_query_slopes(
    block: &QueryBlock,
    key: usize,
    bounds: &Tensor<i32>,
    row_constants: &Tensor<f32>,
    function: &ScoreFunction,
    scores: &Array<f32>,
    slopes: &Array<f32>,
    tile: &mut Shared<[f32]>,
) {
    let unit = UNIT_POS_X as usize;
    let (y, x) = (unit / GRID, unit % GRID);
    #[unroll]
    for i in 0..4usize {
        let row = block.start + 4 * y + i;
        let constants =
            read_row_constants(row_constants, bounds, row, block.n, block.head, block.heads);
        #[unroll]
        for j in 0..4usize {
            let column = key + x + j * GRID;
            let mut change = f32::new(0.0);
            if row < block.end && column >= constants.first && column <= row {
                let s = score(scores[4 * i + j], function);
                change = (s - constants.log_sum).exp()
                    * (slopes[4 * i + j] - constants.output_dot_gradient)
                    * score_slope(s, function);
            }
            tile[(4 * y + i) * TILE_ROW + x + j * GRID] = change;
        }
    }
}
