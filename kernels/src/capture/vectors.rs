//! Loops over a block of a row, which the compiler vectorises.
//!
//! The sum of a block is a fixed tree over its columns, and the sums of blocks are added in order, so that the bits do
//! not depend on the width of the vectors.

use crate::float::ComputeFloat;

/// Columns of a block.
pub(super) const BLOCK: usize = 64;

/// Returns the largest number of a block, ignoring NaN.
#[inline(always)]
pub(super) fn largest<W: ComputeFloat>(block: &[W; BLOCK]) -> W {
    const HALF: usize = BLOCK / 2;
    let larger = |a: W, b: W| if b > a { b } else { a };
    let mut m = [W::NEG_INFINITY; HALF];
    for i in 0..HALF {
        m[i] = larger(larger(W::NEG_INFINITY, block[i]), block[i + HALF]);
    }
    let mut width = HALF;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            m[i] = larger(m[i], m[i + width]);
        }
    }
    m[0]
}

/// Computes exp((s − shift) · factor) of each column.
#[inline(always)]
pub(super) fn exponentials<W: ComputeFloat>(block: &[W; BLOCK], shift: W, factor: W) -> [W; BLOCK] {
    let mut out = [W::default(); BLOCK];
    for i in 0..BLOCK {
        out[i] = block[i].sub(shift).mul(factor).exp();
    }
    out
}

/// Computes Σ exp(s − shift) and Σ exp(s − shift) (s − shift).
#[inline(always)]
pub(super) fn weight_sums<W: ComputeFloat>(block: &[W; BLOCK], shift: W) -> (W, W) {
    let e = exponentials(block, shift, W::from_f64(1.0));
    let least = W::from_f64(-1e3);
    let mut weighted = [W::default(); BLOCK];
    for i in 0..BLOCK {
        let x = block[i].sub(shift);
        // The bound makes exp(−∞) · −∞ zero instead of NaN.
        let x = if x > least { x } else { least };
        weighted[i] = e[i].mul(x);
    }
    (tree_sum(e), tree_sum(weighted))
}

/// Sums a block as a tree.
#[inline(always)]
pub(super) fn tree_sum<W: ComputeFloat>(mut block: [W; BLOCK]) -> W {
    let mut width = BLOCK;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            block[i] = block[i].add(block[i + width]);
        }
    }
    block[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::vectorize;
    use pulp::{Simd, WithSimd};

    struct BlockSums<'a>(&'a [f32; BLOCK]);

    impl BlockSums<'_> {
        #[inline(always)]
        fn bits(self) -> [u32; 3] {
            let (total, weighted) = weight_sums(self.0, 3.0);
            [total, weighted, largest(self.0)].map(f32::to_bits)
        }
    }

    impl WithSimd for BlockSums<'_> {
        type Output = [u32; 3];

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> [u32; 3] {
            self.bits()
        }
    }

    #[test]
    fn the_width_of_the_vectors_does_not_change_the_bits() {
        for row in 0..100 {
            let block = std::array::from_fn(|i| ((row * BLOCK + i) as f32 * 7.3).sin() * 3.0);
            assert_eq!(vectorize(BlockSums(&block)), BlockSums(&block).bits());
        }
    }
}
