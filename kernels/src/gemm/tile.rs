//! A tile of C in registers: `ROWS` rows of `VECTORS` vectors.

use pulp::Simd;

/// A tile's operands. Step s of B is `VECTORS` vectors at `b + s · b_step`; step s of row r of A is at
/// `a + r · a_row + s · a_step`. C has `rows` × `columns` of the tile's own, rows `stride` apart.
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
    /// Whether the chains go on from what C holds.
    pub(super) add: bool,
}

/// The widest tile: 12 rows of two vectors of 16.
pub(super) const LARGEST: usize = 12 * 32;

/// # Safety
/// A and B must hold `k` steps of a whole tile, and C the tile's own rows and columns, which no one else
/// touches.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile) {
    let width = VECTORS * S::F32_LANES;
    if tile.rows == ROWS && tile.columns == width {
        // SAFETY: as the caller says, and the tile is whole.
        unsafe { whole::<S, ROWS, VECTORS>(simd, &tile) };
        return;
    }
    // A tile at the edge is computed beside its place.
    let mut beside = [0f32; LARGEST];
    let place = beside.as_mut_ptr();
    // SAFETY: only the tile's own rows and columns of C are touched; `beside` holds a whole tile.
    unsafe {
        if tile.add {
            for row in 0..tile.rows {
                let from = tile.c.add(row * tile.stride);
                std::ptr::copy_nonoverlapping(from, place.add(row * width), tile.columns);
            }
        }
        let inner = Tile {
            c: place,
            stride: width,
            ..tile
        };
        whole::<S, ROWS, VECTORS>(simd, &inner);
        for row in 0..tile.rows {
            let to = tile.c.add(row * tile.stride);
            std::ptr::copy_nonoverlapping(place.add(row * width), to, tile.columns);
        }
    }
}

/// # Safety
/// As for [`tile`], with room for a whole tile in C.
#[inline(always)]
pub(super) unsafe fn whole<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: &Tile) {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    // SAFETY: all pointers stay within what the caller vouches for.
    unsafe {
        if tile.add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = load::<S>(tile.c.add(row * tile.stride + vector * lanes));
                }
            }
        }
        let (mut a, mut b) = (tile.a, tile.b);
        // Four steps a turn: the counting is not seen then.
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

/// # Safety
/// Each row of A must hold a number and `b` the vectors.
#[inline(always)]
unsafe fn step<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    a: *const f32,
    a_row: usize,
    b: *const f32,
    sums: &mut [[S::f32s; VECTORS]; ROWS],
) {
    let mut columns = [simd.splat_f32s(0.0); VECTORS];
    // SAFETY: as the caller says.
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

/// # Safety
/// `from` must hold a vector.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(from: *const f32) -> S::f32s {
    // SAFETY: as the caller says; a vector is plain numbers.
    unsafe { from.cast::<S::f32s>().read_unaligned() }
}

/// # Safety
/// `to` must have room for a vector.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(to: *mut f32, vector: S::f32s) {
    // SAFETY: as the caller says.
    unsafe { to.cast::<S::f32s>().write_unaligned(vector) }
}
