//! The control `same_token`: each position learns the teacher's distribution of another position that has the same
//! target token. The target then tells which tokens are alike, but nothing about the context.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};

use potstill_datasets::{Distributions, Signal, SignalRow};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Largest number of distributions in memory, unless [`ROWS_PER_TOKEN`] for each token of the vocabulary are more. With
/// 64 tokens each they take about 150 MB.
const ROWS: usize = 1 << 18;
/// Smallest number of distributions that are kept for a token, if it occurs as often.
const ROWS_PER_TOKEN: usize = 8;

/// Distributions of the training set by target token: for each token a uniform sample of its positions (reservoir
/// sampling, Vitter 1985, algorithm R).
#[derive(Debug)]
pub(crate) struct SameTokenRows {
    seed: u64,
    generator: ChaCha8Rng,
    rows_per_token: usize,
    tokens: BTreeMap<u32, Reservoir>,
}

#[derive(Debug, Default)]
struct Reservoir {
    /// Number of positions with this target token.
    positions: u64,
    kept: Vec<KeptRow>,
}

#[derive(Debug)]
struct KeptRow {
    /// Hash of the tokens before the position.
    context: u64,
    row: SignalRow,
}

impl SameTokenRows {
    pub(crate) fn new(seed: u64, vocab: usize) -> Self {
        Self {
            seed,
            generator: ChaCha8Rng::seed_from_u64(seed),
            rows_per_token: (ROWS / vocab.max(1)).max(ROWS_PER_TOKEN),
            tokens: BTreeMap::new(),
        }
    }

    /// Adds the distributions of a training row.
    pub(crate) fn read(&mut self, signal: &Signal) {
        for ((token, context), row) in loss_tokens(signal).into_iter().zip(&signal.rows) {
            let reservoir = self.tokens.entry(token).or_default();
            reservoir.positions += 1;
            let kept = || KeptRow {
                context,
                row: row.to_row(),
            };
            if reservoir.kept.len() < self.rows_per_token {
                reservoir.kept.push(kept());
                continue;
            }
            let slot = self.generator.random_range(0..reservoir.positions);
            if let Some(place) = reservoir.kept.get_mut(slot as usize) {
                *place = kept();
            }
        }
    }

    /// Replaces each distribution by one that is drawn from those of the same target token in another context. A
    /// position without one gets all mass on its target token.
    ///
    /// Positions with the same tokens before them, such as the same position of an equal answer, have the same
    /// distribution, so they are not drawn. The draws are a function of the seed and `order_position`, so a
    /// training that was resumed repeats them.
    pub(crate) fn replace_rows(&self, signal: &mut Signal, order_position: u64) {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(order_position);
        let tokens = loss_tokens(signal);
        let mut rows = Distributions::default();
        for ((token, context), row) in tokens.into_iter().zip(&signal.rows) {
            let reservoir = self.tokens.get(&token);
            let other = reservoir.and_then(|of| draw(&of.kept, context, &mut generator));
            match other {
                Some(other) => rows.push_row(other.view()),
                None => rows.push_row(point_mass(token, row.log_z_at.len()).view()),
            }
        }
        signal.rows = rows;
    }

    /// Number of positions whose target token has no kept distribution of another context.
    pub(crate) fn unique_positions(&self) -> u64 {
        let one_context = |reservoir: &&Reservoir| {
            let contexts = reservoir.kept.windows(2);
            contexts.into_iter().all(|w| w[0].context == w[1].context)
        };
        let unique = self.tokens.values().filter(one_context);
        unique.map(|reservoir| reservoir.positions).sum()
    }
}

/// Draws one of the distributions of another context, each with the same probability; `None` if there is none.
fn draw<'a>(
    kept: &'a [KeptRow],
    context: u64,
    generator: &mut ChaCha8Rng,
) -> Option<&'a SignalRow> {
    // Most distributions are of another context, so the first draw is nearly always one of them.
    for _ in 0..4 {
        let drawn = kept.get(generator.random_range(0..kept.len().max(1)))?;
        if drawn.context != context {
            return Some(&drawn.row);
        }
    }
    let others: Vec<&KeptRow> = kept.iter().filter(|row| row.context != context).collect();
    let drawn = others.get(generator.random_range(0..others.len().max(1)))?;
    Some(&drawn.row)
}

/// Returns the target token of each loss position and a hash of the tokens before it.
fn loss_tokens(signal: &Signal) -> Vec<(u32, u64)> {
    let mut hasher = DefaultHasher::new();
    let mut tokens = Vec::with_capacity(signal.rows.len());
    for (position, (&token, &loss)) in signal.token_ids.iter().zip(&signal.loss_mask).enumerate() {
        if loss && position > 0 {
            tokens.push((token, hasher.finish()));
        }
        hasher.write_u32(token);
    }
    tokens
}

/// Creates the distribution with all mass on one token, with normalisers for so many temperatures.
fn point_mass(token: u32, temperatures: usize) -> SignalRow {
    SignalRow {
        ids: vec![token],
        logprobs: vec![0.0],
        tail_logprob: f32::NEG_INFINITY,
        entropy: 0.0,
        log_z_at: vec![Some(0.0); temperatures],
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A signal in which every position from 1 carries loss; the distribution at position t of sequence i has entropy
    /// 100 · i + t.
    fn signal(index: usize, token_ids: &[u32]) -> Signal {
        let rows = token_ids
            .iter()
            .enumerate()
            .skip(1)
            .map(|(t, &token)| SignalRow {
                ids: vec![token, 99],
                logprobs: vec![0.5f32.ln(); 2],
                tail_logprob: f32::NEG_INFINITY,
                entropy: (100 * index + t) as f32,
                log_z_at: Vec::new(),
                draw_ids: Vec::new(),
                draw_counts: Vec::new(),
            });
        Signal {
            prompt_id: format!("p{index}"),
            sample_index: 0,
            token_ids: token_ids.to_vec(),
            loss_mask: (0..token_ids.len()).map(|t| t > 0).collect(),
            rows: rows.collect(),
            provenance: 0,
        }
    }

    fn rows_of(data: &[Signal], seed: u64, vocab: usize) -> SameTokenRows {
        let mut rows = SameTokenRows::new(seed, vocab);
        data.iter().for_each(|signal| rows.read(signal));
        rows
    }

    fn replaced(rows: &SameTokenRows, signal: &Signal, order_position: u64) -> Signal {
        let mut signal = signal.clone();
        rows.replace_rows(&mut signal, order_position);
        signal.validate().unwrap();
        signal
    }

    /// Tokens 7 and 8 are in several contexts, token 6 in one only; sequences 0 and 1 are equal.
    fn data() -> Vec<Signal> {
        [[1, 7, 8, 7], [1, 7, 8, 7], [2, 7, 6, 8]]
            .iter()
            .enumerate()
            .map(|(index, ids)| signal(index, ids))
            .collect()
    }

    #[test]
    fn a_distribution_comes_from_the_same_token_in_another_context() {
        let data = data();
        let rows = rows_of(&data, 5, 10);
        let mut seen: BTreeMap<(usize, usize), Vec<f32>> = BTreeMap::new();
        for order_position in 0..200 {
            for (index, signal) in data.iter().enumerate() {
                let after = replaced(&rows, signal, order_position);
                for (t, row) in after.rows.rows().enumerate() {
                    assert!(row.ids.contains(&signal.token_ids[t + 1]));
                    seen.entry((index, t + 1)).or_default().push(row.entropy);
                }
            }
        }
        let mut entropies = |index: usize, t: usize| {
            let mut all = seen.remove(&(index, t)).unwrap();
            all.sort_by(f32::total_cmp);
            all.dedup();
            all
        };
        // Token 7 after 1: never itself, and never the same context in the other, equal sequence.
        assert_eq!(entropies(0, 1), [3.0, 103.0, 201.0]);
        assert_eq!(entropies(1, 3), [1.0, 101.0, 201.0]);
        assert_eq!(entropies(2, 1), [1.0, 3.0, 101.0, 103.0]);
        assert_eq!(entropies(0, 2), [203.0]);
        // Token 6 is in one context: all mass is on it.
        assert_eq!(entropies(2, 2), [0.0]);
        assert_eq!(replaced(&rows, &data[2], 3).rows.row(1).logprobs, [0.0]);
        assert_eq!(rows.unique_positions(), 1);
    }

    #[test]
    fn the_draws_are_a_function_of_seed_and_position() {
        let data = data();
        let run = |seed, position| {
            let rows = rows_of(&data, seed, 10);
            (data.iter())
                .map(|signal| replaced(&rows, signal, position))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1, 2), run(1, 2));
        assert!((0..20).any(|position| run(1, position) != run(1, 2)));
        assert!((0..20).any(|seed| run(seed, 2) != run(1, 2)));
    }

    /// With 8 of 400 positions kept, each position is kept in about 2 % of the seeds.
    #[test]
    fn memory_is_bounded_and_the_sample_is_uniform() {
        let data: Vec<Signal> = (0..400).map(|i| signal(i, &[i as u32, 7])).collect();
        let mut counts = [0u32; 4];
        for seed in 0..200 {
            let rows = rows_of(&data, seed, ROWS);
            let kept = &rows.tokens[&7].kept;
            assert_eq!((kept.len(), rows.tokens[&7].positions), (8, 400));
            for kept in kept {
                counts[kept.row.entropy as usize / 10_000] += 1;
            }
        }
        // 1,600 kept rows, 400 expected in each quarter with a standard deviation of 17.
        assert!(counts.iter().all(|n| (320..480).contains(n)), "{counts:?}");
    }
}
