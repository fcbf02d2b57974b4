//! Products of bf16 matrices: C = A·B, or C += A·B, summed in f32 and, if C is bf16, rounded once, to the nearest.
//!
//! There are two kernels. With AVX-512 BF16 the operands stay bf16, and [`pairs`] multiplies two steps of k in one
//! instruction. On other processors [`WidenedKernel`] widens the operands to f32 while they are packed and uses the
//! f32 tile. In both, an element of C is one chain over k, from the first step to the last, which does not depend on
//! the element's position, on the number of threads or on the other rows. The kernels differ in the order within a
//! pair of steps, so the last bit of C may differ between processors.
//!
//! Traffic: a block of A and one of B are packed as in [`gemm`](super::gemm), in words of four bytes that hold one
//! step of k (widened) or two (pairs). The f32 sums belong to the task that computes them; if k takes more than one
//! block, at most [`BlockLimits::sums`] of them are kept at once. Neither a whole operand nor all of C is ever held
//! in f32.

mod pack;
mod pairs;
mod task;
#[cfg(target_arch = "x86_64")]
mod transpose;

use std::mem::MaybeUninit;

use burn::tensor::bf16;
use pulp::{Simd, WithSimd};

use super::pack::{PackedPanels, give_back, take_buffer};
use super::tile::{Tile, whole_tile};
use super::{
    BLOCK, MIN_PARALLEL_WORK, Matrix, PACKED_BYTES, SharedOutput, TASK_COLUMNS, TASK_ROWS,
    equal_width,
};
use crate::float::StoredFloat;
use crate::simd::vectorize;
use pack::pack;
use task::{HalfOutputBlock, UnpackedB};

const LIMITS: BlockLimits = BlockLimits {
    block: BLOCK,
    packed: PACKED_BYTES / size_of::<u32>(),
    sums: 1 << 20,
};
/// Columns of C per task if tasks pack B themselves: few, so that a narrow C still has enough tasks.
const SELF_PACKED_COLUMNS: usize = 48;

/// Computes `out` = A·B and initialises all of `out`, whose rows are contiguous.
pub(crate) fn product<E: StoredFloat<f32>>(
    out: &mut [MaybeUninit<E>],
    a: Matrix<'_, bf16>,
    b: Matrix<'_, bf16>,
) {
    run_product(HalfProduct::new(out, a, b, false));
}

/// Computes `out` = A·B over other numbers; the rows of `out` are contiguous.
pub(crate) fn product_into<E: StoredFloat<f32>>(
    out: &mut [E],
    a: Matrix<'_, bf16>,
    b: Matrix<'_, bf16>,
) {
    product(as_uninit(out), a, b);
}

/// Computes `out` += A·B; the rows of `out` are contiguous.
pub(crate) fn add_product<E: StoredFloat<f32>>(
    out: &mut [E],
    a: Matrix<'_, bf16>,
    b: Matrix<'_, bf16>,
) {
    run_product(HalfProduct::new(as_uninit(out), a, b, true));
}

/// Views numbers as memory to write numbers to.
fn as_uninit<E: StoredFloat<f32>>(out: &mut [E]) -> &mut [MaybeUninit<E>] {
    let numbers: *mut [E] = out;
    // SAFETY: the layouts are equal, and products write nothing but numbers.
    unsafe { &mut *(numbers as *mut [MaybeUninit<E>]) }
}

fn run_product<E: StoredFloat<f32>>(product: Option<HalfProduct<'_, E>>) {
    if let Some(product) = product {
        #[cfg(target_arch = "x86_64")]
        if let Some(dot) = pairs::Avx512Bf16::try_new() {
            product.multiply_with_pairs(dot);
            return;
        }
        vectorize(product);
    }
}

/// The operations of a product that depend on the processor.
trait HalfKernel: Copy + Send + Sync {
    /// Steps of k in a packed word of 32 bits.
    const STEPS: usize;
    /// Rows of a tile.
    const ROWS: usize;
    /// Columns of a tile.
    const COLUMNS: usize;

    /// Runs `job` compiled for the processor's vectors.
    fn run<J: VectorJob>(self, job: J);

    /// Computes a tile of sums; `tile.k` counts words.
    ///
    /// # Safety
    /// A and B must hold `k` words of a whole tile, packed for this kernel, and C must have room for a whole tile.
    unsafe fn tile(self, tile: &Tile);
}

/// A piece of work that is compiled for the processor's vectors; implementations mark `run` `#[inline(always)]`.
trait VectorJob {
    fn run(self);
}

/// Multiplies operands that are widened to f32, with the tile of [`gemm`](super::gemm).
#[derive(Clone, Copy)]
struct WidenedKernel<S, const ROWS: usize, const VECTORS: usize>(S);

impl<S: Simd, const ROWS: usize, const VECTORS: usize> HalfKernel
    for WidenedKernel<S, ROWS, VECTORS>
{
    const STEPS: usize = 1;
    const ROWS: usize = ROWS;
    const COLUMNS: usize = VECTORS * S::F32_LANES;

    fn run<J: VectorJob>(self, job: J) {
        struct Run<J>(J);
        impl<J: VectorJob> WithSimd for Run<J> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                self.0.run();
            }
        }
        self.0.vectorize(Run(job));
    }

    #[inline(always)]
    unsafe fn tile(self, tile: &Tile) {
        // SAFETY: the caller guarantees the operands.
        unsafe { whole_tile::<S, ROWS, VECTORS>(self.0, tile) };
    }
}

/// Limits of what is packed and kept at once. Tests use small ones, so that small products have several blocks.
#[derive(Clone, Copy)]
struct BlockLimits {
    /// Largest number of rows of A, and of steps of k, in a block; even.
    block: usize,
    /// Largest number of words of B in a block.
    packed: usize,
    /// Largest number of f32 sums of C that are kept until the next block of k.
    sums: usize,
}

struct HalfProduct<'a, E> {
    out: SharedOutput<E>,
    a: Matrix<'a, bf16>,
    b: Matrix<'a, bf16>,
    add: bool,
    threads: usize,
    limits: BlockLimits,
}

impl<E: StoredFloat<f32>> WithSimd for HalfProduct<'_, E> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        // Tiles of few rows are wider, so that enough independent chains hide the latency of an addition.
        match self.a.rows {
            1 => self.multiply_blocks(WidenedKernel::<S, 1, 4>(simd)),
            2 => self.multiply_blocks(WidenedKernel::<S, 2, 4>(simd)),
            3 | 4 => self.multiply_blocks(WidenedKernel::<S, 4, 2>(simd)),
            // A tile of twelve rows needs 24 registers for its sums.
            _ if S::REGISTER_COUNT >= 32 && S::F32_LANES >= 16 => {
                self.multiply_blocks(WidenedKernel::<S, 12, 2>(simd));
            }
            _ => self.multiply_blocks(WidenedKernel::<S, 6, 2>(simd)),
        }
    }
}

impl<'a, E: StoredFloat<f32>> HalfProduct<'a, E> {
    /// Checks the shapes and zeroes C if k is 0; returns `None` if there is nothing to compute. With `add`, C must be
    /// initialised.
    fn new(
        out: &'a mut [MaybeUninit<E>],
        a: Matrix<'a, bf16>,
        b: Matrix<'a, bf16>,
        add: bool,
    ) -> Option<Self> {
        assert_eq!(a.columns, b.rows, "a product of {a:?} and {b:?}");
        assert_eq!(out.len(), a.rows * b.columns, "the output of {a:?} · {b:?}");
        a.check();
        b.check();
        if a.columns == 0 && !add {
            out.fill(MaybeUninit::new(E::narrow(0.0)));
        }
        let work = out.len() * a.columns;
        let threads = if work >= MIN_PARALLEL_WORK {
            rayon::current_num_threads()
        } else {
            1
        };
        (work > 0).then_some(Self {
            out: SharedOutput(out.as_mut_ptr().cast()),
            a,
            b,
            add,
            threads,
            limits: LIMITS,
        })
    }

    fn multiply_with_pairs<D: pairs::PairDot>(&self, dot: D) {
        match self.a.rows {
            1 => self.multiply_blocks(pairs::PairKernel::<D, 1, 4>(dot)),
            2 => self.multiply_blocks(pairs::PairKernel::<D, 2, 4>(dot)),
            3 | 4 => self.multiply_blocks(pairs::PairKernel::<D, 4, 4>(dot)),
            _ => self.multiply_blocks(pairs::PairKernel::<D, 12, 2>(dot)),
        }
    }

    /// Walks over blocks of rows and columns of C, and of k, and packs the operands of each.
    fn multiply_blocks<K: HalfKernel>(&self, kernel: K) {
        let Self { a, b, threads, .. } = *self;
        let (k, max_steps) = (a.columns, self.limits.block);
        let task_panels_a = (TASK_ROWS / K::ROWS).max(1);
        // If all rows of A fit into one task, each part of B is needed by one task only. That task then packs it, and
        // the packed words stay in the task's cache.
        let tasks_pack_b = a.rows <= task_panels_a * K::ROWS;
        let task_columns = if tasks_pack_b {
            SELF_PACKED_COLUMNS
        } else {
            TASK_COLUMNS
        };
        let task_panels = (task_panels_a, (task_columns / K::COLUMNS).max(1));
        let (mut packed_a, mut packed_b) = (take_buffer(), take_buffer());
        let mut sums = take_buffer();
        for row in (0..a.rows).step_by(max_steps) {
            let rows = max_steps.min(a.rows - row);
            let width = self.block_width::<K>(rows, tasks_pack_b);
            for column in (0..b.columns).step_by(width) {
                let columns = width.min(b.columns - column);
                for depth in (0..k).step_by(max_steps) {
                    let steps = max_steps.min(k - depth);
                    // If k is one block, the packed rows of A serve all columns.
                    if column == 0 || k > max_steps {
                        let span = ((row, rows), (depth, steps));
                        pack(kernel, &mut packed_a, K::ROWS, a, span, threads);
                    }
                    let b = b.transposed();
                    let span = ((column, columns), (depth, steps));
                    if !tasks_pack_b {
                        pack(kernel, &mut packed_b, K::COLUMNS, b, span, threads);
                    }
                    let words = steps.div_ceil(K::STEPS);
                    let block = HalfOutputBlock {
                        a: PackedPanels::new(&packed_a, K::ROWS, words, rows),
                        b: PackedPanels::new(&packed_b, K::COLUMNS, words, columns),
                        unpacked_b: tasks_pack_b.then_some(UnpackedB { b, span }),
                        out: SharedOutput(self.out.at(row * self.b.columns + column)),
                        stride: self.b.columns,
                        add: self.add,
                        is_first: depth == 0,
                        is_last: depth + steps == k,
                        task_panels,
                    };
                    block.run_tasks(kernel, &mut sums, threads);
                }
            }
        }
        give_back(sums);
        give_back(packed_b);
        give_back(packed_a);
    }

    /// Width of the blocks of columns of C for `rows` rows, so that the packed words of B and the sums that are kept
    /// stay within their limits.
    fn block_width<K: HalfKernel>(&self, rows: usize, tasks_pack_b: bool) -> usize {
        let (k, columns, limits) = (self.a.columns, self.b.columns, self.limits);
        let mut max_columns = columns;
        if !tasks_pack_b {
            let words = k.min(limits.block).div_ceil(K::STEPS);
            max_columns = max_columns.min(limits.packed / words);
        }
        if k > limits.block {
            max_columns = max_columns.min(limits.sums / rows);
        }
        equal_width(columns, max_columns.max(1), K::COLUMNS)
    }
}

#[cfg(test)]
mod tests;
