//! The order in which training reads its rows: a seeded permutation for each epoch.
//!
//! The row at a position is a function of the seed, the number of rows and the position alone, so a checkpoint has to
//! keep only the position. The generator and the shuffle are implemented here, because the result of a library's
//! `shuffle` may change between versions.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::Error;

/// An endless order over `len` rows, one permutation after another.
///
/// The permutation of the current epoch takes 8 bytes a row.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    epoch: u64,
    rows: Vec<usize>,
}

impl Order {
    /// Creates the order over `len` rows for a seed.
    ///
    /// # Errors
    /// [`Error::NoRows`] if `len` is 0.
    pub fn new(seed: u64, len: usize) -> Result<Self, Error> {
        if len == 0 {
            return Err(Error::NoRows);
        }
        Ok(Self {
            seed,
            epoch: 0,
            rows: permutation(seed, 0, len),
        })
    }

    /// The row at `position`, counted from the start of training and over all epochs.
    ///
    /// A position in another epoch than the last one costs one shuffle.
    pub fn item(&mut self, position: u64) -> usize {
        let len = self.rows.len();
        let epoch = position / len as u64;
        if epoch != self.epoch {
            self.rows = permutation(self.seed, epoch, len);
            self.epoch = epoch;
        }
        self.rows[(position % len as u64) as usize]
    }
}

/// Fisher and Yates' shuffle of `0..len` (Knuth, TAOCP vol. 2, algorithm 3.4.2P).
fn permutation(seed: u64, epoch: u64, len: usize) -> Vec<usize> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    let mut rows: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        rows.swap(i, below(&mut random, i as u64 + 1) as usize);
    }
    rows
}

/// Draws a number in `0..bound` without bias: Lemire, "Fast random integer generation in an interval"
/// (2019), §4. `bound` is at least 1.
fn below(random: &mut ChaCha8Rng, bound: u64) -> u64 {
    let unfair = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(random.next_u64()) * u128::from(bound);
        if product as u64 >= unfair {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut Order, epoch: u64, len: u64) -> Vec<usize> {
        (0..len).map(|i| order.item(epoch * len + i)).collect()
    }

    #[test]
    fn every_epoch_is_another_permutation() {
        for len in [1, 2, 3, 7, 97, 1000] {
            let mut order = Order::new(17, len).unwrap();
            let first = epoch(&mut order, 0, len as u64);
            let second = epoch(&mut order, 1, len as u64);
            for rows in [&first, &second] {
                let mut sorted = rows.clone();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..len).collect::<Vec<_>>());
            }
            assert!(len < 7 || first != second);
        }
    }

    #[test]
    fn a_position_is_enough_to_resume() {
        let mut walked = Order::new(5, 11).unwrap();
        let rows: Vec<usize> = (0..100).map(|p| walked.item(p)).collect();
        for p in [0, 99, 3, 57, 58, 12] {
            assert_eq!(Order::new(5, 11).unwrap().item(p), rows[p as usize]);
            assert_eq!(walked.item(p), rows[p as usize]);
        }
        let mut other = Order::new(6, 11).unwrap();
        assert_ne!((0..100).map(|p| other.item(p)).collect::<Vec<_>>(), rows);
    }

    /// Runs that were started with an older version have to continue in the same order.
    #[test]
    fn the_order_never_changes() {
        let mut order = Order::new(17, 8).unwrap();
        insta::assert_compact_debug_snapshot!(epoch(&mut order, 0, 8), @"[6, 2, 5, 4, 7, 0, 1, 3]");
        insta::assert_compact_debug_snapshot!(epoch(&mut order, 3, 8), @"[4, 6, 7, 1, 0, 2, 3, 5]");
    }

    #[test]
    fn first_rows_are_uniform() {
        let mut counts = [0_u32; 5];
        for seed in 0..5000 {
            counts[Order::new(seed, 5).unwrap().item(0)] += 1;
        }
        assert!(
            counts.iter().all(|&c| (850..1150).contains(&c)),
            "{counts:?}"
        );
    }

    #[test]
    fn an_order_over_no_rows_is_an_error() {
        assert!(matches!(Order::new(1, 0), Err(Error::NoRows)));
    }
}
