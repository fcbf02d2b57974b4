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
    /// Lengths by which each batch is chosen; `None` for an order at random.
    lengths: Option<BatchLengths>,
}

/// Lengths of all rows, and the number of rows in a batch.
#[derive(Debug, Clone)]
struct BatchLengths {
    lengths: Vec<usize>,
    batch: usize,
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
            lengths: None,
        })
    }

    /// Creates an order in which rows of similar length are in the same batch, and the batches are at random. `lengths`
    /// has the length of each row; a batch takes `batch` positions, the first one from position 0 on.
    ///
    /// Each row occurs once in an epoch. If `batch` does not divide the number of rows, one batch holds the end of an
    /// epoch and the beginning of the next, whose lengths may differ.
    ///
    /// # Errors
    /// As [`Order::new`].
    pub fn by_length(seed: u64, lengths: Vec<usize>, batch: usize) -> Result<Self, Error> {
        let mut order = Self::new(seed, lengths.len())?;
        let batch = batch.max(1);
        order.lengths = Some(BatchLengths { lengths, batch });
        order.rows = order.epoch_rows(0);
        Ok(order)
    }

    fn epoch_rows(&self, epoch: u64) -> Vec<usize> {
        let rows = permutation(self.seed, epoch, self.rows.len());
        match &self.lengths {
            Some(lengths) => lengths.batches(rows, self.seed, epoch),
            None => rows,
        }
    }

    /// The row at `position`, counted from the start of training and over all epochs.
    ///
    /// A position in another epoch than the last one costs one shuffle.
    pub fn item(&mut self, position: u64) -> usize {
        let len = self.rows.len();
        let epoch = position / len as u64;
        if epoch != self.epoch {
            self.rows = self.epoch_rows(epoch);
            self.epoch = epoch;
        }
        self.rows[(position % len as u64) as usize]
    }
}

impl BatchLengths {
    /// Sorts the rows of an epoch by length, divides them into batches, and orders the batches at random. `rows` are in
    /// random order, which remains among rows of equal length.
    fn batches(&self, mut rows: Vec<usize>, seed: u64, epoch: u64) -> Vec<usize> {
        let (len, batch) = (rows.len(), self.batch);
        rows.sort_by_key(|row| self.lengths[*row]);
        let mut random = generator(seed, epoch, 1);
        // The last batch of the epoch before takes its missing rows from the beginning of this one.
        let begun = (u128::from(epoch) * len as u128 % batch as u128) as usize;
        let first = ((batch - begun) % batch).min(len);
        let (whole, last) = ((len - first) / batch, (len - first) % batch);
        // The incomplete batches take rows of any length.
        let mut sizes = vec![batch; whole];
        let at_first = below(&mut random, whole as u64 + 1) as usize;
        sizes.insert(at_first, first);
        let at_last = below(&mut random, whole as u64 + 2) as usize;
        sizes.insert(at_last, last);
        let at_first = at_first + usize::from(at_last <= at_first);
        let mut batches = Vec::with_capacity(sizes.len());
        let mut rest = rows.as_slice();
        for size in sizes {
            let (part, after) = rest.split_at(size);
            batches.push(part);
            rest = after;
        }
        let mut middle: Vec<usize> = (0..batches.len())
            .filter(|&at| at != at_first && at != at_last)
            .collect();
        shuffle(&mut middle, &mut random);
        let ordered = [at_first].into_iter().chain(middle).chain([at_last]);
        ordered.flat_map(|at| batches[at]).copied().collect()
    }
}

/// The generator of an epoch. Each `stream` has other numbers.
fn generator(seed: u64, epoch: u64, stream: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    key[16..24].copy_from_slice(&stream.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Fisher and Yates' shuffle of `0..len` (Knuth, TAOCP vol. 2, algorithm 3.4.2P).
fn permutation(seed: u64, epoch: u64, len: usize) -> Vec<usize> {
    let mut rows: Vec<usize> = (0..len).collect();
    shuffle(&mut rows, &mut generator(seed, epoch, 0));
    rows
}

fn shuffle(rows: &mut [usize], random: &mut ChaCha8Rng) {
    for i in (1..rows.len()).rev() {
        rows.swap(i, below(random, i as u64 + 1) as usize);
    }
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

    #[test]
    fn batches_by_length_hold_similar_rows_and_each_row_once_an_epoch() {
        for (len, batch) in [(24, 4), (23, 4), (9, 4), (3, 8), (1, 1), (17, 1), (40, 7)] {
            let lengths: Vec<usize> = (0..len).map(|row| 1 + row * 7919 % 31).collect();
            let mut order = Order::by_length(3, lengths.clone(), batch).unwrap();
            let epochs = 5;
            let walked: Vec<usize> = (0..epochs * len as u64).map(|p| order.item(p)).collect();
            for epoch in walked.chunks(len) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                assert_eq!(sorted, (0..len).collect::<Vec<_>>());
            }
            // A batch within an epoch holds consecutive rows of the sorted list: no row of another batch lies strictly
            // between its shortest and longest.
            let mut sorted = lengths.clone();
            sorted.sort_unstable();
            for (at, rows) in walked.chunks(batch).enumerate() {
                if rows.len() < batch || at * batch / len != (at * batch + batch - 1) / len {
                    continue;
                }
                let mut of: Vec<usize> = rows.iter().map(|&row| lengths[row]).collect();
                assert!(of.is_sorted(), "{len} rows, batch {batch}: {of:?}");
                of.dedup();
                assert!(sorted.windows(batch).any(|window| {
                    let mut window = window.to_vec();
                    window.dedup();
                    window == of
                }));
            }
            // The position alone decides.
            for p in [0, 5, 11, 2 * len as u64 + 1] {
                let mut again = Order::by_length(3, lengths.clone(), batch).unwrap();
                let mut far = again.clone();
                far.item(4 * len as u64);
                assert_eq!(again.item(p), far.item(p));
            }
        }
        let lengths: Vec<usize> = (0..64).collect();
        let epoch = |seed| {
            let mut order = Order::by_length(seed, lengths.clone(), 4).unwrap();
            (0..64).map(|p| order.item(p)).collect::<Vec<_>>()
        };
        assert_ne!(epoch(1), epoch(2));
        assert!(!epoch(1).is_sorted());
        assert!(matches!(
            Order::by_length(1, Vec::new(), 4),
            Err(Error::NoRows)
        ));
    }
}
