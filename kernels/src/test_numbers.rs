//! Pseudo-random numbers for unit tests.

use burn::tensor::bf16;

/// `count` numbers between −1 and 1 from a linear congruential generator (Knuth's MMIX constants).
pub(crate) fn f32_numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The numbers of [`f32_numbers`], rounded.
pub(crate) fn bf16_numbers(count: usize, seed: u64) -> Vec<bf16> {
    let numbers = f32_numbers(count, seed).into_iter();
    numbers.map(bf16::from_f32).collect()
}
