//! Products of bf16 matrices: C = A·B, or C += A·B, summed in f32 and rounded once, to the nearest bf16.
//!
//! Two arms. With AVX-512 BF16 the operands stay bf16: [`pairs`] multiplies two steps of k in one
//! instruction. Elsewhere [`Wide`] widens the operands while they are packed, and the tile of f32 does the
//! rest. Either way an element of C is one chain over k, from the first step to the last, which depends
//! neither on the place of the element nor on threads nor on the rows beside it. The two arms differ in
//! the order within a pair, so C may differ in its last place from one processor to another.
//!
//! Traffic: a block of A and one of B are packed as in [`gemm`](super::gemm), four bytes for one step of k
//! (widened) or two (pairs). Sums lie in f32 beside the task that computes them; where k takes more than
//! one block, [`Limits::sums`] of them at once. Nothing of a whole operand or of all of C is ever f32.

mod pack;
mod pairs;
mod task;
#[cfg(target_arch = "x86_64")]
mod turn;

use burn::tensor::bf16;
use pulp::{Simd, WithSimd};

use super::tile::{Tile, whole};
use super::{
    BLOCK, Matrix, PACKED_BYTES, Shared, TASK_COLUMNS, TASK_ROWS, WORTH_SHARING, pack as wide,
};
use crate::simd::vectorize;
use pack::{Panels, pack};
use task::Part;

/// What is packed and what waits at once.
const LIMITS: Limits = Limits {
    block: BLOCK,
    packed: PACKED_BYTES / size_of::<u32>(),
    sums: 1 << 20,
};
/// Columns of C that one task computes where it packs B itself: enough tasks for few columns.
const LONE_COLUMNS: usize = 48;

/// `out` `[n, out]` = `x` `[n, in]` · `weight` `[out, in]`ᵀ.
pub(crate) fn rows_by_rows(out: &mut [bf16], x: Matrix<'_, bf16>, weight: Matrix<'_, bf16>) {
    product(out, x, weight.transposed(), false);
}

/// `out` = A·B, or += where `add`, its rows behind one another.
pub(crate) fn product(out: &mut [bf16], a: Matrix<'_, bf16>, b: Matrix<'_, bf16>, add: bool) {
    if let Some(product) = Product::new(out, a, b, add) {
        #[cfg(target_arch = "x86_64")]
        if let Some(dot) = pairs::Hardware::try_new() {
            product.by_pairs(dot);
            return;
        }
        vectorize(product);
    }
}

/// What a product takes from the processor.
trait Arm: Copy + Send + Sync {
    /// Steps of k in a packed word of 32 bits.
    const STEPS: usize;
    /// Rows and columns of a tile.
    const ROWS: usize;
    const COLUMNS: usize;

    /// Runs `job` compiled for the processor.
    fn run<J: Job>(self, job: J);

    /// A tile of sums; `k` counts words.
    ///
    /// # Safety
    /// A and B must hold `k` words of a whole tile, packed for this arm, and C must have room for it.
    unsafe fn tile(self, tile: &Tile);
}

/// What is compiled for the processor: `run` is to be inlined.
trait Job {
    fn run(self);
}

/// Operands widened to f32, by the tile of [`gemm`](super::gemm).
#[derive(Clone, Copy)]
struct Wide<S, const ROWS: usize, const VECTORS: usize>(S);

impl<S: Simd, const ROWS: usize, const VECTORS: usize> Arm for Wide<S, ROWS, VECTORS> {
    const STEPS: usize = 1;
    const ROWS: usize = ROWS;
    const COLUMNS: usize = VECTORS * S::F32_LANES;

    fn run<J: Job>(self, job: J) {
        struct Run<J>(J);
        impl<J: Job> WithSimd for Run<J> {
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
        // SAFETY: as the caller says.
        unsafe { whole::<S, ROWS, VECTORS>(self.0, tile) };
    }
}

/// Tests have them smaller than products need.
#[derive(Clone, Copy)]
struct Limits {
    /// Rows of A, and steps of k: an even number.
    block: usize,
    /// Words of B.
    packed: usize,
    /// Numbers of C whose sums wait in f32 for the next block of k.
    sums: usize,
}

struct Product<'a> {
    out: Shared<bf16>,
    a: Matrix<'a, bf16>,
    b: Matrix<'a, bf16>,
    add: bool,
    threads: usize,
    limits: Limits,
}

impl WithSimd for Product<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        // Few rows fill their tile with columns, so that its chains hide each other's latency.
        match self.a.rows {
            1 => self.blocks(Wide::<S, 1, 4>(simd)),
            2 => self.blocks(Wide::<S, 2, 4>(simd)),
            3 | 4 => self.blocks(Wide::<S, 4, 2>(simd)),
            // Twelve rows need 24 registers for the tile.
            _ if S::REGISTER_COUNT >= 32 && S::F32_LANES >= 16 => {
                self.blocks(Wide::<S, 12, 2>(simd));
            }
            _ => self.blocks(Wide::<S, 6, 2>(simd)),
        }
    }
}

impl<'a> Product<'a> {
    /// Checks the shapes; none where nothing is left to be done.
    fn new(
        out: &'a mut [bf16],
        a: Matrix<'a, bf16>,
        b: Matrix<'a, bf16>,
        add: bool,
    ) -> Option<Self> {
        assert_eq!(a.columns, b.rows, "a product of {a:?} and {b:?}");
        assert_eq!(out.len(), a.rows * b.columns, "the output of {a:?} · {b:?}");
        a.check();
        b.check();
        if a.columns == 0 && !add {
            out.fill(bf16::ZERO);
        }
        let work = out.len() * a.columns;
        let threads = if work >= WORTH_SHARING {
            rayon::current_num_threads()
        } else {
            1
        };
        (work > 0).then_some(Self {
            out: Shared(out.as_mut_ptr()),
            a,
            b,
            add,
            threads,
            limits: LIMITS,
        })
    }

    fn by_pairs<D: pairs::Dot>(&self, dot: D) {
        match self.a.rows {
            1 => self.blocks(pairs::Pairs::<D, 1, 4>(dot)),
            2 => self.blocks(pairs::Pairs::<D, 2, 4>(dot)),
            3 | 4 => self.blocks(pairs::Pairs::<D, 4, 4>(dot)),
            _ => self.blocks(pairs::Pairs::<D, 12, 2>(dot)),
        }
    }

    /// Walks over blocks of rows and columns of C, and of k, and packs the operands of each.
    fn blocks<A: Arm>(&self, arm: A) {
        let Self { a, b, threads, .. } = *self;
        let Limits {
            block,
            packed,
            sums: waiting,
        } = self.limits;
        let k = a.columns;
        let high = (TASK_ROWS / A::ROWS).max(1);
        // One task high, nothing of B is packed twice if the tasks do it, and it stays in their cache.
        let lone = a.rows <= high * A::ROWS;
        let wide = (if lone { LONE_COLUMNS } else { TASK_COLUMNS } / A::COLUMNS).max(1);
        let region = high.min(a.rows.div_ceil(A::ROWS)) * A::ROWS * wide * A::COLUMNS;
        let (mut packed_a, mut packed_b) = (wide::buffer(), wide::buffer());
        let mut sums = wide::buffer();
        for row in (0..a.rows).step_by(block) {
            let rows = block.min(a.rows - row);
            let mut room = b.columns;
            if !lone {
                let words = k.min(block).div_ceil(A::STEPS);
                room = room.min(packed / words);
            }
            if k > block {
                room = room.min(waiting / rows);
            }
            // Blocks of equal width, as many as there must be.
            let width = b
                .columns
                .div_ceil(b.columns.div_ceil(room.max(1)))
                .next_multiple_of(A::COLUMNS);
            for column in (0..b.columns).step_by(width) {
                let columns = width.min(b.columns - column);
                for depth in (0..k).step_by(block) {
                    let steps = block.min(k - depth);
                    // One block of k serves all the columns.
                    if column == 0 || k > block {
                        let span = ((row, rows), (depth, steps));
                        pack(arm, &mut packed_a, A::ROWS, a, span, threads);
                    }
                    let b = b.transposed();
                    let span = ((column, columns), (depth, steps));
                    if !lone {
                        pack(arm, &mut packed_b, A::COLUMNS, b, span, threads);
                    }
                    let words = steps.div_ceil(A::STEPS);
                    let part = Part {
                        a: Panels::new(&packed_a, A::ROWS, words, rows),
                        b: Panels::new(&packed_b, A::COLUMNS, words, columns),
                        lone: lone.then_some((b, column, depth, steps)),
                        out: Shared(self.out.at(row * self.b.columns + column)),
                        stride: self.b.columns,
                        add: self.add,
                        first: depth == 0,
                        last: depth + steps == k,
                        region,
                    };
                    part.tasks(arm, (high, wide), &mut sums, threads);
                }
            }
        }
        wide::give_back(sums);
        wide::give_back(packed_b);
        wide::give_back(packed_a);
    }
}

#[cfg(test)]
mod tests;
