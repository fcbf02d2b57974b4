//! Loops over a block of a row, which the compiler makes as wide as the processor's vectors.
//!
//! Every sum is a fixed tree over the columns of a block, and the sums of blocks are added in order,
//! so that the bits do not depend on how wide the vectors are.

use crate::rows::flex::Wide;

/// Columns of a block.
pub(super) const BLOCK: usize = 64;

/// What blocks are made of: f32, or f64 for f64 logits.
pub(super) trait Lane: Wide + Default {
    const LOWEST: Self;
}

macro_rules! lane {
    ($t:ty) => {
        impl Lane for $t {
            const LOWEST: $t = <$t>::NEG_INFINITY;
        }
    };
}
lane!(f32);
lane!(f64);

/// The largest of a block; NaN counts for nothing.
#[inline(always)]
pub(super) fn largest<W: Lane>(block: &[W; BLOCK]) -> W {
    const HALF: usize = BLOCK / 2;
    let larger = |a: W, b: W| if b > a { b } else { a };
    let mut m = [W::LOWEST; HALF];
    for i in 0..HALF {
        m[i] = larger(larger(W::LOWEST, block[i]), block[i + HALF]);
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

/// exp((s − shift) · factor) of each column.
#[inline(always)]
pub(super) fn exponentials<W: Lane>(block: &[W; BLOCK], shift: W, factor: W) -> [W; BLOCK] {
    let mut out = [W::default(); BLOCK];
    for i in 0..BLOCK {
        out[i] = block[i].sub(shift).mul(factor).exp();
    }
    out
}

/// Σ exp(s − shift) and Σ exp(s − shift) (s − shift).
#[inline(always)]
pub(super) fn sums<W: Lane>(block: &[W; BLOCK], shift: W) -> (W, W) {
    let e = exponentials(block, shift, W::of(1.0));
    let least = W::of(-1e3);
    let mut weighted = [W::default(); BLOCK];
    for i in 0..BLOCK {
        let x = block[i].sub(shift);
        // exp(−∞) · −∞ is 0 here.
        let x = if x > least { x } else { least };
        weighted[i] = e[i].mul(x);
    }
    (sum(e), sum(weighted))
}

/// The sum of a block, as a tree.
#[inline(always)]
pub(super) fn sum<W: Lane>(mut block: [W; BLOCK]) -> W {
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

    struct Sums<'a>(&'a [f32; BLOCK]);

    impl Sums<'_> {
        #[inline(always)]
        fn bits(self) -> [u32; 3] {
            let (total, weighted) = sums(self.0, 3.0);
            [total, weighted, largest(self.0)].map(f32::to_bits)
        }
    }

    impl WithSimd for Sums<'_> {
        type Output = [u32; 3];

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> [u32; 3] {
            self.bits()
        }
    }

    #[test]
    fn wide_vectors_change_no_bit() {
        for row in 0..100 {
            let block = std::array::from_fn(|i| ((row * BLOCK + i) as f32 * 7.3).sin() * 3.0);
            assert_eq!(vectorize(Sums(&block)), Sums(&block).bits());
        }
    }
}
