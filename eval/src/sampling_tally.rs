//! Sums of the sampling test over signals, in memory that does not grow with them.

use potstill_datasets::{DistributionRow, Signal};

use crate::sampling::{SamplingCheck, SamplingLaw};

/// Largest surprisal that is counted, nats. A smaller probability is 0 in f64.
const MAX_SURPRISAL: f64 = 690.0;

/// Sums of the sampling test ([`SamplingCheck`]).
#[derive(Debug, Clone)]
pub struct SamplingTally {
    law: SamplingLaw,
    /// Number of most likely tokens that are stored at each position.
    top_k: usize,
    entropy: f64,
    plain: MartingaleSums,
    under_law: MartingaleSums,
    floor: f64,
    cut_mass: f64,
    /// Log-probabilities of the buckets' tokens, kept for its memory.
    tokens: Vec<f64>,
    /// Weights of the same tokens under the law, kept for its memory.
    weights: Vec<f64>,
}

/// Sums of differences with expectation 0 and of their variances.
#[derive(Debug, Clone, Copy, Default)]
struct MartingaleSums {
    positions: u64,
    difference: f64,
    /// Sum of the variances that the distributions give.
    variance: f64,
    /// Sum of the squared differences.
    squares: f64,
}

impl MartingaleSums {
    fn add(&mut self, difference: f64, variance: f64) {
        self.positions += 1;
        self.difference += difference;
        self.variance += variance.max(0.0);
        self.squares += difference * difference;
    }

    fn mean(&self) -> f64 {
        self.difference / self.positions.max(1) as f64
    }

    /// The sum in standard errors, by the larger of the expected and the observed variance. If every position is certain,
    /// so that nothing varies, it is 0.
    fn z(&self) -> f64 {
        let variance = self.variance.max(self.squares);
        match variance > 0.0 {
            true => self.difference / variance.sqrt(),
            false => 0.0,
        }
    }
}

/// A row, reduced to its k most likely tokens and a bucket for all others. Which tokens these are does not depend on the
/// target token.
struct Buckets<'a> {
    /// Log-probabilities of the k most likely tokens, the most likely first; with the rest their mass is 1.
    tokens: &'a [f64],
    /// Probability of all other tokens.
    rest: f64,
    /// Index of the target token; `None` if it is one of the others.
    target: Option<usize>,
}

/// Tokens that a law can draw.
struct Kept {
    /// Number of the most likely tokens that are kept.
    tokens: usize,
    /// Largest share of the probability of all other tokens that may be kept.
    rest: f64,
    /// Whether `tokens` is known. It is not if the end of the nucleus depends on the unknown tail.
    is_known: bool,
}

impl SamplingTally {
    /// Creates empty sums for text that was drawn by `law`, with signals of the `top_k` most likely tokens.
    pub fn new(law: SamplingLaw, top_k: usize) -> SamplingTally {
        SamplingTally {
            law,
            top_k,
            entropy: 0.0,
            plain: MartingaleSums::default(),
            under_law: MartingaleSums::default(),
            floor: 0.0,
            cut_mass: 0.0,
            tokens: Vec::new(),
            weights: Vec::new(),
        }
    }

    /// Adds the positions of a text. `temperatures` are those of the rows' `log_z_at`.
    pub fn add(&mut self, signal: &Signal, temperatures: &[f32]) {
        let top_k = stored_tokens(signal, self.top_k);
        let mut tokens = std::mem::take(&mut self.tokens);
        for (position, row) in signal.loss_positions().zip(&signal.rows) {
            let target = signal.token_ids.get(position).copied();
            let buckets = Buckets::new(row, target, top_k, &mut tokens);
            self.add_plain(&buckets);
            if let SamplingLaw::Sampled { temperature, .. } = self.law {
                let log_z = log_z(row, temperatures, temperature);
                self.add_under_law(&buckets, log_z);
            }
        }
        self.tokens = tokens;
    }

    fn add_plain(&mut self, buckets: &Buckets<'_>) {
        let rest = buckets.rest * buckets.surprisal(None);
        let (mut entropy, mut square) = (rest, rest * buckets.surprisal(None));
        for logprob in buckets.tokens {
            let part = -logprob * logprob.exp();
            entropy += part;
            square -= part * logprob;
        }
        self.entropy += entropy;
        let difference = buckets.surprisal(buckets.target) - entropy;
        self.plain.add(difference, square - entropy * entropy);
    }

    fn add_under_law(&mut self, buckets: &Buckets<'_>, log_z: Option<f64>) {
        let SamplingLaw::Sampled {
            temperature,
            repetition_penalty,
            ..
        } = self.law
        else {
            return;
        };
        let (Some(first), Some(last)) = (buckets.tokens.first(), buckets.tokens.last()) else {
            return;
        };
        if temperature == 0.0 {
            self.cut_mass += 1.0 - first.exp();
            return;
        }
        self.weights.clear();
        let weight = |logprob: &f64| ((logprob - first) / temperature).exp();
        self.weights.extend(buckets.tokens.iter().map(weight));
        let sum: f64 = self.weights.iter().sum();
        // If each of the other tokens was as likely as the least likely stored one, their weight would be `flat`: at
        // most that at temperatures below 1, and at least that above.
        let flat = buckets.rest * ((last - first) / temperature - last).exp();
        let (low, high) = match (log_z, temperature < 1.0) {
            _ if temperature == 1.0 || buckets.rest == 0.0 => (flat, flat),
            (Some(log_z), _) => {
                let exact = ((log_z - first / temperature).exp() - sum).max(0.0);
                (exact, exact)
            }
            (None, true) => (0.0, flat),
            (None, false) => (flat, f64::INFINITY),
        };
        let rest = if low == high { low } else { flat };
        self.floor += buckets.divergence(&self.weights, rest);
        let kept = self.kept(buckets, low, high);
        let cut: f64 = buckets
            .tokens
            .iter()
            .skip(kept.tokens)
            .map(|l| l.exp())
            .sum();
        self.cut_mass += cut + buckets.rest * (1.0 - kept.rest);
        if let Some(target) = buckets.target
            && kept.is_known
            && repetition_penalty == 1.0
        {
            let drawn = self.weights.iter().zip(buckets.tokens).take(kept.tokens);
            let (mut mass, mut mean, mut square) = (0.0, 0.0, 0.0);
            for (weight, logprob) in drawn {
                mass += weight;
                mean -= weight * logprob;
                square += weight * logprob * logprob;
            }
            let mean = mean / mass;
            let difference = buckets.surprisal(Some(target)) - mean;
            self.under_law.add(difference, square / mass - mean * mean);
        }
    }

    /// The tokens that the law keeps: first top-k, then the nucleus among these, then `min_p`, as the generator of a
    /// local teacher does. The weight of the other tokens is between `low` and `high`.
    fn kept(&self, buckets: &Buckets<'_>, low: f64, high: f64) -> Kept {
        let all = self.weights.len();
        let mut kept = Kept {
            tokens: all,
            rest: 1.0,
            is_known: true,
        };
        let SamplingLaw::Sampled {
            top_k,
            top_p,
            min_p,
            ..
        } = self.law
        else {
            return kept;
        };
        let last = self.weights.last().copied().unwrap_or(0.0);
        let (mut low, mut high) = (low, high);
        if let Some(k) = top_k {
            let more = k.saturating_sub(all) as f64;
            let least = self.weights.get(k.wrapping_sub(1)).copied().unwrap_or(0.0);
            kept.tokens = self.weights.iter().filter(|w| **w >= least).count();
            let most = more * buckets.tokens.last().map_or(0.0, |l| l.exp());
            kept.rest = (most / buckets.rest).min(1.0);
            (low, high) = (if more > 0.0 { 0.0 } else { low }, high.min(more * last));
            low = low.min(high);
        }
        if top_p < 1.0 {
            let sum: f64 = self.weights.iter().take(kept.tokens).sum();
            let end = |rest: f64| {
                let (mut reached, enough) = (0.0, top_p * (sum + rest));
                let mut weights = self.weights.iter().take(kept.tokens);
                weights.position(|weight| {
                    reached += weight;
                    reached >= enough
                })
            };
            let (first, second) = (end(low), end(high));
            kept.is_known = first == second;
            match second {
                Some(at) => (kept.tokens, kept.rest) = (at + 1, 0.0),
                None if high.is_finite() => {
                    kept.rest = kept.rest.min((top_p * (sum + high) - sum) / high);
                }
                None => {}
            }
        }
        let enough = self.weights.iter().filter(|weight| **weight >= min_p);
        let enough = enough.count();
        if enough < all {
            kept.tokens = kept.tokens.min(enough);
            kept.rest = 0.0;
        }
        kept
    }

    /// Returns the result; `None` if there was no position.
    pub fn check(&self) -> Option<SamplingCheck> {
        if self.plain.positions == 0 {
            return None;
        }
        let positions = self.plain.positions as f64;
        let (mean_nats, z) = (self.plain.mean(), self.plain.z());
        let under_law = match self.law.is_plain() {
            true => Some((mean_nats, z)),
            false if self.under_law.positions == 0 => None,
            false => Some((self.under_law.mean(), self.under_law.z())),
        };
        let (has_floor, cuts) = match self.law {
            SamplingLaw::Sampled {
                temperature,
                top_k,
                top_p,
                min_p,
                ..
            } => (
                temperature != 1.0 && temperature != 0.0,
                temperature == 0.0 || top_k.is_some() || top_p < 1.0 || min_p > 0.0,
            ),
            SamplingLaw::Given => (false, false),
        };
        Some(SamplingCheck {
            positions: self.plain.positions,
            mean_nats,
            entropy_nats: self.entropy / positions,
            z,
            law: self.law,
            law_mean_nats: under_law.map(|(mean, _)| mean),
            law_z: under_law.map(|(_, z)| z),
            floor_nats: has_floor.then(|| self.floor / positions),
            cut_mass: cuts.then(|| self.cut_mass / positions),
        })
    }
}

/// Number of most likely tokens that every row of a text is known to hold besides the target token. It is `top_k`, unless
/// the server gave fewer: a row may then hold the target token as one more, so one less than the shortest row is sure.
fn stored_tokens(signal: &Signal, top_k: usize) -> usize {
    let is_short =
        |row: &DistributionRow<'_>| row.ids.len() <= top_k && row.tail_logprob > f32::NEG_INFINITY;
    let short = signal.rows.rows().filter(is_short);
    match short.map(|row| row.ids.len()).min() {
        Some(shortest) if shortest < top_k => shortest.saturating_sub(1),
        _ => top_k,
    }
}

/// log Σ exp(logprob / T) over the whole vocabulary, if it is stored for this temperature.
fn log_z(row: DistributionRow<'_>, temperatures: &[f32], temperature: f64) -> Option<f64> {
    let mut stored = temperatures.iter().zip(row.log_z_at);
    let found = stored.find(|(stored, _)| **stored == temperature as f32);
    found.and_then(|(_, log_z)| *log_z).map(f64::from)
}

impl<'a> Buckets<'a> {
    fn new(
        row: DistributionRow<'_>,
        target: Option<u32>,
        top_k: usize,
        tokens: &'a mut Vec<f64>,
    ) -> Buckets<'a> {
        let logprobs = || row.logprobs.iter().map(|logprob| f64::from(*logprob));
        let others: f64 = logprobs().skip(top_k).map(f64::exp).sum();
        let rest = others + f64::from(row.tail_logprob).exp();
        let total = logprobs().take(top_k).map(f64::exp).sum::<f64>() + rest;
        tokens.clear();
        tokens.extend(logprobs().take(top_k).map(|logprob| logprob - total.ln()));
        let place = row.ids.iter().position(|id| Some(*id) == target);
        Buckets {
            tokens,
            rest: rest / total,
            target: place.filter(|place| *place < top_k),
        }
    }

    /// −log of the probability of a bucket; `None` is the bucket of all other tokens.
    fn surprisal(&self, token: Option<usize>) -> f64 {
        let surprisal = match token.and_then(|token| self.tokens.get(token)) {
            Some(logprob) => -logprob,
            None => -self.rest.ln(),
        };
        surprisal.min(MAX_SURPRISAL)
    }

    /// KL of the buckets from the law with these unnormalised weights, nats.
    fn divergence(&self, weights: &[f64], rest: f64) -> f64 {
        let sum = weights.iter().sum::<f64>() + rest;
        let part = |p: f64, weight: f64| match p > 0.0 && weight > 0.0 {
            true => p * (p / weight).ln(),
            false => 0.0,
        };
        let tokens = self.tokens.iter().zip(weights);
        let tokens: f64 = tokens
            .map(|(logprob, weight)| part(logprob.exp(), *weight))
            .sum();
        tokens + part(self.rest, rest) + sum.ln()
    }
}

#[cfg(test)]
mod tests;
