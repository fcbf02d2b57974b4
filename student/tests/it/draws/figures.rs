//! Statistics of the gradients of many records of the same positions.

use potstill_datasets::SignalRow;
use potstill_student::loss::Tail;

use super::learned::{Learned, by_hand, learn};
use super::positions::{Position, Setup};
use super::records::{self, Sampler};

/// Smallest variance of a token's count, summed over the seeds, at which its logit is compared by itself.
const EVENTS: f64 = 100.0;

/// Treatments of the tail that the draws are compared with. They get as many of the likeliest tokens as a record
/// with draws has entries on average, rounded up: a token with its log-probability takes as many bytes as a token
/// with its count.
pub(super) const PLAIN: [Tail; 3] = [Tail::Renormalize, Tail::Ignore, Tail::Bucket];

/// The largest of several values of z, and their number.
#[derive(Default)]
pub(super) struct Largest {
    pub(super) z: f64,
    pub(super) count: usize,
}

impl Largest {
    fn add(&mut self, error: f64, variance_of_mean: f64) {
        self.z = self.z.max(error.abs() / variance_of_mean.sqrt());
        self.count += 1;
    }

    pub(super) fn join(&mut self, other: &Self) {
        self.z = self.z.max(other.z);
        self.count += other.count;
    }
}

/// Statistics of one sampler's draws over all positions. A variance is that of one record's gradient, summed over
/// logits or over the width, as a mean over positions.
#[derive(Default)]
pub(super) struct DrawStatistics {
    pub(super) logits: Largest,
    /// z of the sum over logits of rare tokens.
    pub(super) pooled: Largest,
    pub(super) hidden: Largest,
    pub(super) value: Largest,
    /// Largest |mean − dense| among the logits without variance.
    pub(super) exact: f64,
    pub(super) variance: f64,
    /// Variance by theory.
    pub(super) expected_variance: f64,
    pub(super) hidden_variance: f64,
    /// Largest |gradient − dense| / SE of the draws' mean, for each of [`PLAIN`], at the logits that are compared by
    /// themselves.
    pub(super) plain: [f64; 3],
    /// Mean over positions of ‖gradient − dense‖² at hidden, for each of [`PLAIN`].
    pub(super) plain_hidden: [f64; 3],
}

pub(super) fn draw_statistics(
    setup: &Setup,
    top_k: usize,
    draws: u32,
    sampler: Sampler,
) -> DrawStatistics {
    let mut shown = DrawStatistics::default();
    let share = 1.0 / setup.positions.len() as f64;
    let mut pool = (0.0, 0.0);
    for (index, position) in setup.positions.iter().enumerate() {
        let rows = records::records(position, index as u64, top_k, draws, sampler);
        let n = rows.len() as f64;
        let count_variance = records::count_variance(position, &rows[0], draws, sampler);
        let weight = position.mass_outside(&rows[0].ids) / f64::from(draws);
        let of_counts: f64 = count_variance.iter().flatten().sum();
        shown.expected_variance += share * of_counts * weight * weight;
        let entries = entries(&rows);
        let learned = match sampler {
            Sampler::Stored => learn(setup, position, rows, Tail::Draws),
            Sampler::Permuted | Sampler::Independent => by_hand(setup, position, &rows),
        };
        let (dense_v, dense_d) = setup.dense(position);
        let measured_v = moments(&learned.logits_nv, dense_v.len());
        let one_by_one = |id: usize| count_variance[id].is_some_and(|c| c * n >= EVENTS);
        let rare = |id: usize| count_variance[id].is_some_and(|c| c * n < EVENTS);
        for (id, (mean, variance)) in measured_v.iter().enumerate() {
            if one_by_one(id) {
                shown.logits.add(mean - dense_v[id], variance / n);
            } else if !rare(id) {
                shown.exact = shown.exact.max((mean - dense_v[id]).abs());
                assert!(variance.sqrt() < 1e-12, "{id}: {variance:e}");
            }
        }
        let of_rare = |row: &[f64]| -> f64 {
            let all = row.iter().enumerate();
            all.filter(|(id, _)| rare(*id)).map(|(_, x)| x).sum()
        };
        let rows_v = learned.logits_nv.chunks_exact(dense_v.len());
        let (mean, variance) = moments(&rows_v.map(of_rare).collect::<Vec<_>>(), 1)[0];
        pool = (pool.0 + mean - of_rare(&dense_v), pool.1 + variance / n);

        let measured_d = moments(&learned.hidden_nd, dense_d.len());
        for ((mean, variance), dense) in measured_d.iter().zip(&dense_d) {
            shown.hidden.add(mean - dense, variance / n);
        }
        let (mean, variance) = moments(&learned.value_n, 1)[0];
        shown.value.add(mean - position.kl(), variance / n);
        shown.variance += share * measured_v.iter().map(|(_, variance)| variance).sum::<f64>();
        shown.hidden_variance += share * measured_d.iter().map(|(_, v)| v).sum::<f64>();

        if sampler == Sampler::Stored {
            for (at, tail) in PLAIN.into_iter().enumerate() {
                let Learned {
                    logits_nv,
                    hidden_nd,
                    ..
                } = plain(setup, position, entries, tail);
                for id in (0..dense_v.len()).filter(|id| one_by_one(*id)) {
                    let bias = (logits_nv[id] - dense_v[id]).abs();
                    shown.plain[at] = shown.plain[at].max(bias / (measured_v[id].1 / n).sqrt());
                }
                let both = hidden_nd.iter().zip(&dense_d);
                shown.plain_hidden[at] += share * both.map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            }
        }
    }
    shown.pooled.add(pool.0, pool.1);
    shown
}

/// Computes the mean number of tokens of a record, rounded up.
fn entries(rows: &[SignalRow]) -> usize {
    let of_row = |row: &SignalRow| row.ids.len() + row.draw_ids.len();
    rows.iter().map(of_row).sum::<usize>().div_ceil(rows.len())
}

fn plain(setup: &Setup, position: &Position, entries: usize, tail: Tail) -> Learned {
    learn(
        setup,
        position,
        vec![records::plain(position, entries)],
        tail,
    )
}

/// Computes mean and sample variance of each column of values `[n, columns]`.
fn moments(values: &[f64], columns: usize) -> Vec<(f64, f64)> {
    let n = (values.len() / columns) as f64;
    let mut sums = vec![(0.0, 0.0); columns];
    // Differences to the first row lose no digits if the columns hardly vary.
    let (first, _) = values.split_at(columns);
    for row in values.chunks_exact(columns) {
        for ((sum, x), first) in sums.iter_mut().zip(row).zip(first) {
            sum.0 += x - first;
            sum.1 += (x - first) * (x - first);
        }
    }
    let moments = sums.iter().zip(first).map(|((sum, squares), first)| {
        let variance = (squares - sum * sum / n) / (n - 1.0);
        (first + sum / n, variance.max(0.0))
    });
    moments.collect()
}
