//! The unigram against plain sums over whole distributions.

use std::ops::ControlFlow;

use potstill_datasets::{DistributionRow, Encoded, SequenceValues, Signal};
use potstill_student::{SignalKind, Unigram};

use crate::support::signals;

const VOCAB: usize = 47;

fn fit(data: &[Signal], kind: SignalKind) -> Unigram {
    let mut row = |index: usize| Ok(data[index].clone());
    Unigram::fit(&mut row, data.len(), VOCAB, kind).unwrap()
}

fn values(unigram: &Unigram, data: &[Signal], kind: SignalKind) -> Vec<SequenceValues> {
    let mut row = |index: usize| Ok(data[index].clone());
    let mut on_row = |_| ControlFlow::Continue(());
    unigram
        .evaluate(&mut row, data.len(), kind, &mut on_row)
        .unwrap()
        .unwrap()
}

/// The probabilities of the support and of the tail, which sum to 1.
fn buckets(row: DistributionRow<'_>) -> (Vec<f64>, f64) {
    let p: Vec<f64> = row.logprobs.iter().map(|l| f64::from(*l).exp()).collect();
    let tail = f64::from(row.tail_logprob).exp();
    let sum = p.iter().sum::<f64>() + tail;
    (p.iter().map(|p| p / sum).collect(), tail / sum)
}

/// The whole distribution of each loss position, with the tail spread over the tokens outside the support.
fn whole(signal: &Signal) -> Vec<Vec<f64>> {
    let rows = signal.rows.rows().map(|row| {
        let (p, tail) = buckets(row);
        let tail = tail / (VOCAB - p.len()) as f64;
        let mut whole = vec![tail; VOCAB];
        for (&id, &p) in row.ids.iter().zip(&p) {
            whole[id as usize] = p;
        }
        whole
    });
    rows.collect()
}

#[test]
fn it_is_the_mean_of_the_distributions_and_is_measured_like_a_model() {
    let (train, test) = (signals(20, 47, 5), signals(6, 47, 6));
    let unigram = fit(&train, SignalKind::Distributions);
    let all: Vec<Vec<f64>> = train.iter().flat_map(whole).collect();
    for (id, found) in unigram.probabilities().iter().enumerate() {
        let mean = all.iter().map(|p| p[id]).sum::<f64>() / all.len() as f64;
        assert!((found - mean).abs() < 1e-12, "token {id}: {found}, {mean}");
    }
    let q = unigram.probabilities();
    let top1 = (0..VOCAB).max_by(|&a, &b| q[a].total_cmp(&q[b])).unwrap();
    let measured = values(&unigram, &test, SignalKind::Distributions);
    for (values, signal) in measured.iter().zip(&test) {
        let (mut kl, mut nll, mut agree) = (0.0, 0.0, 0);
        let mut confidence = Vec::new();
        for (position, row) in signal.loss_positions().zip(&signal.rows) {
            let (p, tail) = buckets(row);
            let mut q_in = 0.0;
            for (&id, &p) in row.ids.iter().zip(&p) {
                let q = q[id as usize];
                kl += p * (p / q).ln();
                q_in += q;
            }
            kl += tail * (tail / (1.0 - q_in)).ln();
            nll -= q[signal.token_ids[position] as usize].ln();
            agree += u32::from(row.ids[0] as usize == top1);
            confidence.push(q[row.ids[0] as usize] as f32);
        }
        assert!((values.kl_nats - kl).abs() < 1e-9 * kl, "{values:?}");
        assert!((values.nll_nats - nll).abs() < 1e-9 * nll);
        assert_eq!((values.agree, &values.confidence), (agree, &confidence));
        let expected: Vec<f32> = signal.rows.rows().map(|r| r.logprobs[0].exp()).collect();
        for (found, expected) in values.expected.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6);
        }
    }
}

/// With whole distributions, Σ KL(p‖mean) is n times the entropy of the mean, minus the sum of the entropies (Lin 1991).
#[test]
fn on_its_own_training_set_its_kl_is_the_jensen_shannon_divergence() {
    let mut data = signals(12, 47, 8);
    let entropy = |p: &[f64]| -> f64 { p.iter().map(|p| -p * p.ln()).sum() };
    let mut entropies = 0.0;
    for signal in &mut data {
        let whole = whole(signal);
        signal.rows.change_rows(|index, row| {
            let whole = &whole[index];
            let mut ids: Vec<usize> = (0..VOCAB).collect();
            ids.sort_by(|&a, &b| whole[b].total_cmp(&whole[a]).then(a.cmp(&b)));
            row.ids = ids.iter().map(|id| *id as u32).collect();
            row.logprobs = ids.iter().map(|id| whole[*id].ln() as f32).collect();
            row.tail_logprob = f32::NEG_INFINITY;
            entropies += entropy(whole);
        });
    }
    let unigram = fit(&data, SignalKind::Distributions);
    let measured = values(&unigram, &data, SignalKind::Distributions);
    let kl: f64 = measured.iter().map(|values| values.kl_nats).sum();
    let positions: u32 = measured.iter().map(|values| values.tokens).sum();
    let expected = f64::from(positions) * entropy(unigram.probabilities()) - entropies;
    assert!(
        (kl - expected).abs() < 1e-4 * expected,
        "{kl} and {expected}"
    );
}

#[test]
fn without_distributions_it_has_the_frequencies_of_the_tokens() {
    let text = |token_ids: &[u32]| {
        let encoded = Encoded {
            token_ids: token_ids.to_vec(),
            loss_mask: (0..token_ids.len()).map(|t| t > 0).collect(),
        };
        Signal::of_text("p".to_owned(), 0, encoded)
    };
    let data = [text(&[9, 3, 3, 5]), text(&[3, 5, 3])];
    let unigram = fit(&data, SignalKind::Text);
    let total = (5 + VOCAB) as f64;
    for (id, p) in unigram.probabilities().iter().enumerate() {
        let count = [(3, 3.0), (5, 2.0)].iter().find(|(token, _)| *token == id);
        let expected = (count.map_or(0.0, |(_, n)| *n) + 1.0) / total;
        assert!((p - expected).abs() < 1e-12);
    }
    let measured = values(&unigram, &data[..1], SignalKind::Text).remove(0);
    let nll = -(2.0 * (4.0 / total).ln() + (3.0 / total).ln());
    assert!((measured.nll_nats - nll).abs() < 1e-12);
    assert_eq!(measured.expected, [1.0, 1.0, 0.0]);
    assert_eq!(measured.confidence, [(4.0 / total) as f32; 3]);
    assert_eq!(measured.agree, 2);
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error() {
    let data = signals(4, 60, 31);
    let mut row = |index: usize| Ok(data[index].clone());
    let error = Unigram::fit(&mut row, 4, VOCAB, SignalKind::Distributions).unwrap_err();
    assert!(error.to_string().contains("vocabulary of 47"), "{error}");
}
