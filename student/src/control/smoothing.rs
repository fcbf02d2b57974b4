//! The control `smoothing`: label smoothing whose targets have the teacher's mean entropy.

use potstill_datasets::Signal;

/// Mean entropy of the teacher's distributions at the loss positions that were read.
#[derive(Debug, Default)]
pub(crate) struct MeanEntropy {
    /// Sum of the entropies, nats.
    sum: f64,
    positions: u64,
}

impl MeanEntropy {
    /// Adds the distributions of a training row.
    pub(crate) fn read(&mut self, signal: &Signal) {
        let entropies = signal.rows.rows().map(|row| f64::from(row.entropy));
        self.sum += entropies.sum::<f64>();
        self.positions += signal.rows.len() as u64;
    }

    /// Returns the label smoothing, in 0..=1, at which a target over `vocab` tokens has the mean entropy.
    pub(crate) fn label_smoothing(&self, vocab: usize) -> f64 {
        smoothing_of_entropy(self.sum / self.positions.max(1) as f64, vocab)
    }
}

/// Solves [`smoothed_entropy`] = `entropy` for the smoothing by bisection; the entropy rises with the smoothing, from 0
/// to ln `vocab`.
fn smoothing_of_entropy(entropy: f64, vocab: usize) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    // After 60 halvings the interval is as small as the spacing of f64 at 1.
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if smoothed_entropy(middle, vocab) < entropy {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// Computes the entropy, in nats, of 1 − ε on one token plus ε spread evenly over all `vocab` tokens.
fn smoothed_entropy(smoothing: f64, vocab: usize) -> f64 {
    let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    let each = smoothing / vocab as f64;
    term(1.0 - smoothing + each) + (vocab as f64 - 1.0) * term(each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smoothed_target_has_the_entropy_asked_for() {
        for vocab in [2, 31, 49_152] {
            for share in [1e-6, 0.01, 0.3, 0.9, 0.999] {
                let entropy = share * (vocab as f64).ln();
                let smoothing = smoothing_of_entropy(entropy, vocab);
                // Sum over the whole vocabulary, term by term.
                let p = |token: usize| {
                    smoothing / vocab as f64 + if token == 0 { 1.0 - smoothing } else { 0.0 }
                };
                let found: f64 = (0..vocab).map(|token| -p(token) * p(token).ln()).sum();
                assert!(
                    (found - entropy).abs() < 1e-9 * entropy.max(1.0),
                    "{vocab} tokens: {found} nats at {smoothing}, not {entropy}"
                );
            }
        }
    }

    #[test]
    fn certain_teachers_need_no_smoothing_and_uniform_ones_all() {
        assert!(smoothing_of_entropy(0.0, 100) < 1e-15);
        assert!(smoothing_of_entropy(100f64.ln() + 0.1, 100) > 1.0 - 1e-15);
    }
}
