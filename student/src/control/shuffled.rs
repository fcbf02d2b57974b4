//! The control `shuffled`, whose distributions are at wrong positions.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::target::Target;

/// Moves each distribution of a global batch to another position: a random cyclic permutation (Sattolo
/// 1986), in which no distribution keeps its position unless it is the only one.
///
/// The permutation is within the global batch, so that only the batch has to be in memory, and is a function
/// of seed and step.
pub(crate) fn shuffle(targets: &mut [Target], seed: u64, step: u64) {
    let mut positions: Vec<(usize, usize)> = Vec::new();
    for (sequence, target) in targets.iter().enumerate() {
        positions.extend((0..target.rows.len()).map(|row| (sequence, row)));
    }
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(step);
    for i in (1..positions.len()).rev() {
        let (a, b) = (positions[i], positions[generator.random_range(0..i)]);
        swap(targets, a, b);
    }
}

fn swap(targets: &mut [Target], a: (usize, usize), b: (usize, usize)) {
    if a.0 == b.0 {
        targets[a.0].rows.swap(a.1, b.1);
    } else {
        let (low, high) = if a.0 < b.0 { (a, b) } else { (b, a) };
        let (left, right) = targets.split_at_mut(high.0);
        std::mem::swap(&mut left[low.0].rows[low.1], &mut right[0].rows[high.1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::TargetRow;

    fn numbered(sizes: &[usize]) -> Vec<Target> {
        let mut next = 0;
        let mut target = |n| {
            let rows = (0..n).map(|_| {
                next += 1;
                TargetRow {
                    ids: vec![next],
                    p: vec![1.0],
                    tail: 0.0,
                    entropy: 0.0,
                }
            });
            Target {
                rows: rows.collect(),
            }
        };
        sizes.iter().map(|&n| target(n)).collect()
    }

    fn ids(targets: &[Target]) -> Vec<u32> {
        targets
            .iter()
            .flat_map(|t| t.rows.iter().map(|row| row.ids[0]))
            .collect()
    }

    #[test]
    fn no_distribution_keeps_its_position_and_none_is_lost() {
        for seed in 0..20 {
            let before = numbered(&[3, 1, 7, 0, 2]);
            let mut after = before.clone();
            shuffle(&mut after, seed, seed * 3);
            assert!(ids(&before).iter().zip(ids(&after)).all(|(a, b)| *a != b));
            let mut sorted = ids(&after);
            sorted.sort_unstable();
            assert_eq!(sorted, ids(&before));
        }
    }

    #[test]
    fn the_permutation_is_a_function_of_seed_and_step() {
        let run = |seed, step| {
            let mut targets = numbered(&[5, 6]);
            shuffle(&mut targets, seed, step);
            ids(&targets)
        };
        assert_eq!(run(1, 2), run(1, 2));
        assert_ne!(run(1, 2), run(1, 3));
        assert_ne!(run(1, 2), run(2, 2));
    }
}
