//! The draw of one token from one row of logits, by thresholds and selection, in time linear in the vocabulary.

use std::cell::RefCell;
use std::cmp::Ordering;

use potstill_kernels::{largest_logit, softmax_weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Sampling;

/// Buffers that a thread reuses from token to token.
#[derive(Default)]
struct DrawBuffers {
    /// Logits after the repetition penalty.
    logits_v: Vec<f32>,
    weights_v: Vec<f64>,
    /// Sums or maxima of blocks of weights.
    blocks: Vec<f64>,
    /// Weights among which the k-th largest is selected.
    candidates: Vec<f64>,
    /// Tokens of the nucleus.
    nucleus: Vec<WeightedToken>,
}

thread_local! {
    static BUFFERS: RefCell<DrawBuffers> = RefCell::new(DrawBuffers::default());
}

/// A token id and its weight.
type WeightedToken = (usize, f64);

/// Orders tokens by weight, the heaviest first and the lower id first among equals.
fn heaviest_first(a: &WeightedToken, b: &WeightedToken) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Draws the token of one step. Returns its id and its log-probability at temperature 1 without repetition penalty.
///
/// The repetition penalty applies to the ids in `seen`, which may be in any order and repeated.
pub(super) fn draw(
    logits_v: &[f32],
    seen: &[u32],
    sampling: &Sampling,
    seed: u64,
    step: u64,
) -> (u32, f32) {
    BUFFERS.with_borrow_mut(|buffers| {
        let largest = largest_logit(logits_v);
        let mass = softmax_weights(logits_v, largest, 1.0, &mut buffers.weights_v);
        let randomness = (seed, step);
        let index = draw_index(logits_v, largest, mass, seen, sampling, randomness, buffers);
        let logit = logits_v.get(index).copied().unwrap_or(largest);
        let logprob = f64::from(logit - largest) - mass.ln();
        (index as u32, logprob as f32)
    })
}

/// Draws a token id. On entry, `buffers.weights_v` holds the weights of `logits_v` at temperature 1, and `mass` is their
/// sum.
fn draw_index(
    logits_v: &[f32],
    largest: f32,
    mass: f64,
    seen: &[u32],
    sampling: &Sampling,
    (seed, step): (u64, u64),
    buffers: &mut DrawBuffers,
) -> usize {
    let penalised = sampling.repetition_penalty != 1.0;
    if penalised {
        penalise(
            logits_v,
            seen,
            sampling.repetition_penalty,
            &mut buffers.logits_v,
        );
    }
    let (logits_v, largest) = match penalised {
        true => (
            buffers.logits_v.as_slice(),
            largest_logit(&buffers.logits_v),
        ),
        false => (logits_v, largest),
    };
    if sampling.temperature == 0.0 {
        return logits_v.iter().position(|z| *z == largest).unwrap_or(0);
    }
    let total = match penalised || sampling.temperature != 1.0 {
        true => softmax_weights(
            logits_v,
            largest,
            sampling.temperature,
            &mut buffers.weights_v,
        ),
        false => mass,
    };
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(step);
    let uniform = generator.random();
    let weights = &buffers.weights_v;
    let floor = sampling
        .top_k
        .and_then(|k| kth_largest(weights, k, &mut buffers.blocks, &mut buffers.candidates));
    // The likeliest token has weight 1, so `min_p` is a bound on weights.
    let least = floor.unwrap_or(0.0).max(sampling.min_p);
    if sampling.top_p < 1.0 {
        let total = floor.map_or(total, |floor| sum_from(weights, floor));
        let nucleus = &mut buffers.nucleus;
        let floor = floor.unwrap_or(0.0);
        select_nucleus(weights, floor, total, sampling.top_p, nucleus);
        nucleus.retain(|(_, weight)| *weight >= least);
        let total: f64 = nucleus.iter().map(|(_, weight)| weight).sum();
        let at = first_reaching(nucleus, |reached| reached > uniform * total);
        return nucleus.get(at).map_or(0, |(id, _)| *id);
    }
    draw_in_id_order(weights, least, uniform, &mut buffers.blocks)
}

/// Writes the logits after the repetition penalty to `out`.
fn penalise(logits_v: &[f32], seen: &[u32], penalty: f64, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(logits_v);
    let penalty = penalty as f32;
    for &id in seen {
        // The original logit is used, so that a token that was seen twice is penalised once.
        if let (Some(logit), Some(out)) = (logits_v.get(id as usize), out.get_mut(id as usize)) {
            *out = if *logit < 0.0 {
                logit * penalty
            } else {
                logit / penalty
            };
        }
    }
}

/// Weights per block.
const BLOCK: usize = 64;

/// Returns the k-th largest of `weights`, counting equal weights separately; `None` if there are at most k weights.
///
/// The k-th largest of the blocks' maxima is at most the k-th largest weight, so only weights that are not below it are
/// candidates.
fn kth_largest(
    weights: &[f64],
    k: usize,
    maxima: &mut Vec<f64>,
    candidates: &mut Vec<f64>,
) -> Option<f64> {
    if k >= weights.len() {
        return None;
    }
    let at = k.checked_sub(1)?;
    let largest = |block: &[f64]| block.iter().copied().fold(0.0, f64::max);
    maxima.clear();
    maxima.extend(weights.chunks(BLOCK).map(largest));
    let least = match k <= maxima.len() {
        true => *maxima.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1,
        false => 0.0,
    };
    candidates.clear();
    candidates.extend(weights.iter().filter(|weight| **weight >= least));
    if at >= candidates.len() {
        return None;
    }
    Some(
        *candidates
            .select_nth_unstable_by(at, |a, b| b.total_cmp(a))
            .1,
    )
}

/// Sums the weights that are not below `floor`.
fn sum_from(weights: &[f64], floor: f64) -> f64 {
    let from = |weight: &f64| if *weight >= floor { *weight } else { 0.0 };
    weights.iter().map(from).sum()
}

/// Selects the fewest tokens whose weight reaches `top_p` · `total`: the heaviest, and the lower ids among equals. `total`
/// is the sum of the weights that are not below `floor`; lighter tokens are not selected. The selection is unordered.
fn select_nucleus(
    weights: &[f64],
    floor: f64,
    total: f64,
    top_p: f64,
    nucleus: &mut Vec<WeightedToken>,
) {
    // The tokens below this weight have together less than the share 1 − top_p that may be excluded. The last factor
    // allows for rounding.
    let least = (1.0 - top_p) * total / weights.len() as f64 * 0.999;
    let least = least.max(floor);
    nucleus.clear();
    let all = weights.iter().copied().enumerate();
    nucleus.extend(all.filter(|(_, weight)| *weight >= least));
    let at = first_reaching(nucleus, |reached| reached >= top_p * total);
    nucleus.truncate(at + 1);
}

/// Largest number of tokens for which sorting is faster than selection.
const MAX_SORTED: usize = 32;

/// Returns the index of the first token, in the order [`heaviest_first`], at which `enough` is true of the sum of weights
/// up to it; of the last token if there is none. Reorders the tokens so that all earlier ones are before the index.
fn first_reaching(tokens: &mut [WeightedToken], enough: impl Fn(f64) -> bool) -> usize {
    let weight = |tokens: &[WeightedToken]| tokens.iter().map(|(_, weight)| weight).sum::<f64>();
    let (mut start, mut end, mut reached) = (0, tokens.len(), 0.0);
    while end - start > MAX_SORTED {
        let Some(part) = tokens.get_mut(start..end) else {
            break;
        };
        let middle = part.len() / 2;
        let (front, _, _) = part.select_nth_unstable_by(middle, heaviest_first);
        let with_front = reached + weight(front);
        if enough(with_front) {
            end = start + middle;
        } else {
            reached = with_front;
            start += middle;
        }
    }
    let part = tokens.get_mut(start..end).unwrap_or_default();
    part.sort_unstable_by(heaviest_first);
    for (at, (_, weight)) in part.iter().enumerate() {
        reached += weight;
        if enough(reached) {
            return start + at;
        }
    }
    end.saturating_sub(1)
}

/// Returns the first id at which the running sum of the weights that are not below `least` exceeds the share `uniform`
/// of their sum.
fn draw_in_id_order(weights: &[f64], least: f64, uniform: f64, sums: &mut Vec<f64>) -> usize {
    sums.clear();
    sums.extend(weights.chunks(BLOCK).map(|block| sum_from(block, least)));
    let wanted = uniform * sums.iter().sum::<f64>();
    let mut reached = 0.0;
    for (block, (sum, part)) in sums.iter().zip(weights.chunks(BLOCK)).enumerate() {
        if reached + sum > wanted {
            let mut inside = reached;
            for (at, weight) in part.iter().enumerate() {
                if *weight >= least {
                    inside += weight;
                }
                if inside > wanted {
                    return block * BLOCK + at;
                }
            }
        }
        reached += sum;
    }
    // Rounding may keep the running sum below the wanted sum. Then the last token with a weight is drawn.
    let has_weight = |weight: &f64| *weight >= least && *weight > 0.0;
    weights.iter().rposition(has_weight).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling {
            temperature,
            top_p,
            ..Sampling::default()
        }
    }

    /// Returns the ids of the nucleus, heaviest first.
    fn nucleus_ids(weights: &[f64], top_p: f64) -> Vec<usize> {
        let mut nucleus = Vec::new();
        select_nucleus(weights, 0.0, weights.iter().sum(), top_p, &mut nucleus);
        nucleus.sort_by(heaviest_first);
        nucleus.iter().map(|(id, _)| *id).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let (id, logprob) = draw(&[0.0, 2.0, 2.0, -1.0], &[], &sampling(0.0, 1.0), 0, 0);
        assert_eq!(id, 1);
        let mass: f64 = [0f64, 2.0, 2.0, -1.0].iter().map(|z| z.exp()).sum();
        assert!((f64::from(logprob) - (2.0 - mass.ln())).abs() < 1e-6);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.5f32, 1.5, -0.3, 0.0];
        for (temperature, top_p) in [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)] {
            let weights: Vec<f64> = logits
                .iter()
                .map(|z| (f64::from(*z) / temperature).exp())
                .collect();
            let allowed = if top_p < 1.0 {
                nucleus_ids(&weights, top_p)
            } else {
                vec![0, 1, 2, 3]
            };
            let total: f64 = allowed.iter().map(|id| weights[*id]).sum();
            let mut counts = [0usize; 4];
            let draws = 20_000;
            for seed in 0..draws {
                counts[draw(&logits, &[], &sampling(temperature, top_p), seed, 3).0 as usize] += 1;
            }
            for id in 0..4 {
                let expected = if allowed.contains(&id) {
                    weights[id] / total
                } else {
                    0.0
                };
                let found = counts[id] as f64 / draws as f64;
                assert!((found - expected).abs() < 0.015, "{id}: {found} {expected}");
            }
        }
    }

    #[test]
    fn the_nucleus_equals_that_of_a_full_sort() {
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        for length in [1usize, 63, 64, 65, 500, 3000] {
            // There are few distinct values, so that ties are common.
            let weights: Vec<f64> = (0..length)
                .map(|_| f64::from(generator.random_range(1..40u32)))
                .collect();
            let mut order: Vec<usize> = (0..length).collect();
            order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
            for top_p in [0.01, 0.5, 0.95, 1.0] {
                let wanted = top_p * weights.iter().sum::<f64>();
                let mut reached = 0.0;
                let mut expected = Vec::new();
                for id in &order {
                    expected.push(*id);
                    reached += weights[*id];
                    if reached >= wanted {
                        break;
                    }
                }
                assert_eq!(nucleus_ids(&weights, top_p), expected);
            }
        }
    }

    /// The expected distributions are those of transformers' logits processors for fixed logits; `make.py` wrote the file.
    #[test]
    fn draws_follow_the_distributions_of_transformers() {
        #[derive(serde::Deserialize)]
        struct Case {
            logits: Vec<f32>,
            temperature: f64,
            top_k: Option<usize>,
            top_p: f64,
            min_p: f64,
            #[serde(default)]
            seen: Vec<u32>,
            #[serde(default)]
            repetition_penalty: Option<f64>,
            probabilities: Vec<f64>,
        }
        let golden = include_str!("../../tests/data/sampling/golden.json");
        let cases: Vec<Case> = serde_json::from_str(golden).unwrap();
        assert!(cases.len() >= 35);
        for case in cases {
            let sampling = Sampling {
                max_new_tokens: 1,
                temperature: case.temperature,
                top_k: case.top_k,
                top_p: case.top_p,
                min_p: case.min_p,
                repetition_penalty: case.repetition_penalty.unwrap_or(1.0),
            };
            let draws = 20_000;
            let mut counts = vec![0usize; case.logits.len()];
            for seed in 0..draws {
                counts[draw(&case.logits, &case.seen, &sampling, seed, 3).0 as usize] += 1;
            }
            for (id, expected) in case.probabilities.iter().enumerate() {
                let found = counts[id] as f64 / draws as f64;
                // The tolerance is five standard deviations, and 0 for a token that is excluded.
                let spread = 5.0 * (expected * (1.0 - expected) / draws as f64).sqrt();
                assert!(
                    (found - expected).abs() <= spread,
                    "{sampling:?}, token {id}: {found}, transformers {expected}"
                );
            }
        }
    }

    #[test]
    fn settings_that_exclude_no_token_change_no_draw() {
        let logits: Vec<f32> = (0..60).map(|id| (id * 37 % 23) as f32 * 0.2).collect();
        let wide = Sampling {
            top_k: Some(60),
            min_p: 0.0,
            ..sampling(0.9, 1.0)
        };
        for seed in 0..200 {
            assert_eq!(
                draw(&logits, &[], &wide, seed, 0),
                draw(&logits, &[], &sampling(0.9, 1.0), seed, 0)
            );
        }
        let one = Sampling {
            top_k: Some(1),
            ..sampling(5.0, 1.0)
        };
        let share = Sampling {
            min_p: 1.0,
            ..sampling(5.0, 1.0)
        };
        let logits = [0.5f32, 3.0, 2.9];
        for seed in 0..50 {
            assert_eq!(draw(&logits, &[], &one, seed, 0).0, 1);
            assert_eq!(draw(&logits, &[], &share, seed, 0).0, 1);
        }
    }

    #[test]
    fn draws_depend_on_the_seed_and_the_step() {
        let logits: Vec<f32> = (0..100).map(|id| (id % 7) as f32 * 0.1).collect();
        let at = |seed, step| draw(&logits, &[], &sampling(1.0, 1.0), seed, step).0;
        assert_eq!(at(3, 4), at(3, 4));
        let distinct: std::collections::BTreeSet<u32> = (0..20)
            .flat_map(|seed| [at(seed, 0), at(seed, 1)])
            .collect();
        assert!(distinct.len() > 15);
    }

    #[test]
    fn draws_by_selection_equal_draws_by_sorting() {
        let mut generator = ChaCha8Rng::seed_from_u64(11);
        for length in [1usize, 5, 33, 64, 65, 1000, 5000] {
            // There are few distinct values, so that ties are common.
            let logits: Vec<f32> = (0..length)
                .map(|_| generator.random_range(-30..30i32) as f32 * 0.15)
                .collect();
            for (top_k, top_p, min_p) in [
                (None, 1.0, 0.0),
                (None, 1.0, 0.01),
                (Some(1), 1.0, 0.0),
                (Some(40), 1.0, 0.0),
                (Some(700), 0.9, 0.0),
                (None, 0.3, 0.0),
                (None, 0.99, 0.02),
                (Some(50), 0.5, 0.7),
            ] {
                for temperature in [0.6, 1.0, 2.5] {
                    let sampling = Sampling {
                        temperature,
                        top_k,
                        top_p,
                        min_p,
                        ..Sampling::default()
                    };
                    for seed in 0..20 {
                        let (id, _) = draw(&logits, &[], &sampling, seed, 1);
                        assert_eq!(id as usize, sorted_draw(&logits, &sampling, seed, 1));
                    }
                }
            }
        }
    }

    /// Draws a token by sorting all tokens.
    fn sorted_draw(logits: &[f32], sampling: &Sampling, seed: u64, step: u64) -> usize {
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let weight = |z: &f32| (f64::from(z - largest) / sampling.temperature).exp();
        let mut tokens: Vec<WeightedToken> = logits.iter().map(weight).enumerate().collect();
        tokens.sort_by(heaviest_first);
        if let Some(kth) = sampling.top_k.and_then(|k| tokens.get(k - 1)).copied() {
            tokens.retain(|(_, weight)| *weight >= kth.1 * (1.0 - 1e-12));
        }
        if sampling.top_p < 1.0 {
            let wanted = sampling.top_p * tokens.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut reached = 0.0;
            tokens.retain(|(_, weight)| {
                let before = reached;
                reached += weight;
                before < wanted
            });
        }
        tokens.retain(|(_, weight)| *weight >= sampling.min_p);
        if sampling.top_p == 1.0 {
            tokens.sort_by_key(|(id, _)| *id);
        }
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(step);
        let total = tokens.iter().map(|(_, weight)| weight).sum::<f64>();
        let (wanted, mut reached) = (generator.random::<f64>() * total, 0.0);
        for (id, weight) in &tokens {
            reached += weight;
            if reached > wanted {
                return *id;
            }
        }
        tokens.last().unwrap().0
    }

    #[test]
    fn a_penalty_changes_the_greedy_choice_and_not_the_logprob() {
        let logits = [0.5f32, 3.0, 2.9, -1.0];
        let mut greedy = sampling(0.0, 1.0);
        let (plain, _) = draw(&logits, &[1, 1], &greedy, 0, 0);
        greedy.repetition_penalty = 1.1;
        let (id, logprob) = draw(&logits, &[1, 1], &greedy, 0, 0);
        assert_eq!((plain, id), (1, 2));
        let mass: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        assert!((f64::from(logprob) - (f64::from(2.9f32) - mass.ln())).abs() < 1e-6);
    }
}
