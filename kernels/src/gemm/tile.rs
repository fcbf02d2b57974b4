//! A tile of C in registers: `ROWS` rows of `VECTORS` vectors.

use pulp::Simd;

/// The operands of a tile. Step s of B is the vectors from `b + s · VECTORS · lanes` on; step s of row r of A is
/// at `a + r · a_row + s · a_step`. The tile's part of C has `rows` × `columns` elements in rows that start
/// `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) k: usize,
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_step: usize,
    pub(super) b: *const f32,
    pub(super) c: *mut f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Whether the sums start from the values in C instead of 0.
    pub(super) add: bool,
}

/// Number of elements of the largest tile: 12 rows of two vectors of 16.
pub(super) const MAX_TILE: usize = 12 * 32;

/// Computes a tile, which may be cut off at the edge of C.
///
/// # Safety
/// A and B must hold `k` steps of a whole tile, and C the tile's rows and columns, which no other task may access
/// during the call.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile) {
    let width = VECTORS * S::F32_LANES;
    if tile.rows == ROWS && tile.columns == width {
        // SAFETY: the caller guarantees the operands, and the tile is whole.
        unsafe { whole_tile::<S, ROWS, VECTORS>(simd, &tile) };
        return;
    }
    // A tile at the edge of C is computed in a buffer of its own and copied.
    assert!(
        ROWS * width <= MAX_TILE && tile.rows <= ROWS && tile.columns <= width,
        "a tile of {} × {}",
        tile.rows,
        tile.columns
    );
    let mut buffer = [0f32; MAX_TILE];
    let start = buffer.as_mut_ptr();
    // SAFETY: only the tile's rows and columns of C are accessed, which the caller guarantees. The buffer holds a whole tile
    // and is not C, so the copies do not overlap.
    unsafe {
        if tile.add {
            for row in 0..tile.rows {
                let from = tile.c.add(row * tile.stride);
                std::ptr::copy_nonoverlapping(from, start.add(row * width), tile.columns);
            }
        }
        let in_buffer = Tile {
            c: start,
            stride: width,
            ..tile
        };
        whole_tile::<S, ROWS, VECTORS>(simd, &in_buffer);
        for row in 0..tile.rows {
            let to = tile.c.add(row * tile.stride);
            std::ptr::copy_nonoverlapping(start.add(row * width), to, tile.columns);
        }
    }
}

/// Computes a tile of which C has all rows and columns.
///
/// # Safety
/// The conditions of [`tile`] must hold, with room for a whole tile in C.
#[inline(always)]
pub(super) unsafe fn whole_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &Tile,
) {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    // SAFETY: C is accessed in ROWS rows of VECTORS vectors, A at k steps of ROWS rows and B at k steps of VECTORS vectors,
    // which the caller guarantees. No access needs an alignment beyond that of f32.
    unsafe {
        if tile.add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = load::<S>(tile.c.add(row * tile.stride + vector * lanes));
                }
            }
        }
        let (mut a, mut b) = (tile.a, tile.b);
        // Four steps per iteration hide the cost of the loop counter.
        for _ in 0..tile.k / 4 {
            for _ in 0..4 {
                step(simd, a, tile.a_row, b, &mut sums);
                a = a.add(tile.a_step);
                b = b.add(VECTORS * lanes);
            }
        }
        for _ in 0..tile.k % 4 {
            step(simd, a, tile.a_row, b, &mut sums);
            a = a.add(tile.a_step);
            b = b.add(VECTORS * lanes);
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, sum) in sums.iter().enumerate() {
                store::<S>(tile.c.add(row * tile.stride + vector * lanes), *sum);
            }
        }
    }
}

/// Adds the products of one step of k to the sums.
///
/// # Safety
/// Each row of A must hold a number at `a`, and `b` must hold `VECTORS` vectors.
#[inline(always)]
unsafe fn step<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    sums: &mut [[S::f32s; VECTORS]; ROWS],
) {
    let mut columns = [simd.splat_f32s(0.0); VECTORS];
    // SAFETY: the caller guarantees the operands.
    unsafe {
        for (vector, column) in columns.iter_mut().enumerate() {
            *column = load::<S>(b.add(vector * S::F32_LANES));
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = simd.splat_f32s(*a.add(row * a_row));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = simd.mul_add_f32s(x, column, *sum);
            }
        }
    }
}

/// Reads a vector, aligned or not.
///
/// # Safety
/// `from` must point to a vector's numbers.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(from: *const f32) -> S::f32s {
    // SAFETY: the caller guarantees the memory; a vector consists of plain numbers.
    unsafe { from.cast::<S::f32s>().read_unaligned() }
}

/// Writes a vector, aligned or not.
///
/// # Safety
/// `to` must have room for a vector.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(to: *mut f32, vector: S::f32s) {
    // SAFETY: the caller guarantees the memory.
    unsafe { to.cast::<S::f32s>().write_unaligned(vector) }
}
