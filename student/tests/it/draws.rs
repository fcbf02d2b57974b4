//! Draws that replace the tail: the mean gradient over many seeds equals the gradient of the whole distribution. Its
//! variance is compared with that of other samplers.
//!
//! Each position is captured once for each seed, and each record becomes a row: `capture`, `Target::new`, row
//! statistics, loss, gradient. Draws of samplers that the product does not have are computed in plain loops. The
//! dense gradient is q − p at the logits, and (q − p) · head at the hidden state.
//!
//! z is |mean − dense| / SE, where SE is the sample's standard deviation divided by √seeds. The count of a token that
//! is drawn only a few times is not normally distributed, so logits of rare tokens are compared by their sum over
//! all positions.

mod figures;
mod learned;
mod positions;
mod records;

use std::ops::Range;

use potstill_kernels::{LogQSum, LogitTransform, RowStats};
use potstill_student::loss::Tail;
use potstill_student::{Form, HeadLossOptions, head_loss};

use self::figures::{Largest, PLAIN, draw_statistics};
use self::learned::{Rows, by_hand, learn};
use self::positions::Setup;
use self::records::Sampler;
use crate::plain::{near, numbers};
use crate::support::real;

const TOP_K: [usize; 3] = [0, 8, 16];
const DRAWS: [u32; 3] = [12, 24, 50];
const SAMPLERS: [Sampler; 3] = [Sampler::Stored, Sampler::Permuted, Sampler::Independent];

fn check(setup: &Setup) {
    setup.describe();
    println!("z at logits / summed over rare logits / at hidden / of the KL");
    let mut all: [Largest; 3] = Default::default();
    let (mut plain, mut exact) = ([0.0_f64; 3], 0.0_f64);
    for (top_k, draws) in TOP_K.iter().flat_map(|k| DRAWS.map(|draws| (*k, draws))) {
        let cells = SAMPLERS.map(|sampler| draw_statistics(setup, top_k, draws, sampler));
        for ((sampler, shown), all) in SAMPLERS.iter().zip(&cells).zip(&mut all) {
            let of = [&shown.logits, &shown.pooled, &shown.hidden, &shown.value];
            println!(
                "top-{top_k} + {draws} {sampler:?}: z {:.2?} of {}, variance {:.3e} at the logits, by theory {:.3e}, {:.3e} at hidden",
                of.map(|largest| largest.z),
                shown.logits.count,
                shown.variance,
                shown.expected_variance,
                shown.hidden_variance
            );
            let ratio = shown.variance / shown.expected_variance;
            assert!((ratio - 1.0).abs() < 0.05, "{sampler:?}: {ratio}");
            of.iter().for_each(|largest| all.join(largest));
            exact = exact.max(shown.exact);
        }
        let [stored, permuted, independent] = &cells;
        // The order is known for the variance of single counts only, not for sums of counts as at hidden.
        assert!(stored.variance < independent.variance);
        assert!(permuted.variance < independent.variance);
        println!(
            "    top-k at the same bytes, {PLAIN:?}: bias / SE {:.0?}, squared bias at hidden {:?}",
            stored.plain,
            stored.plain_hidden.map(|square| format!("{square:.2e}"))
        );
        for (largest, z) in plain.iter_mut().zip(stored.plain) {
            *largest = largest.max(z);
        }
    }
    let tests: usize = all.iter().map(|largest| largest.count).sum();
    let quantile = normal_quantile(1e-6 / (2 * tests) as f64);
    println!(
        "largest z {:.2?} of {:?} for {SAMPLERS:?}, quantile {quantile:.2}; exact logits off by {exact:.1e}; {PLAIN:?} {plain:.0?}",
        all.each_ref().map(|largest| largest.z),
        all.each_ref().map(|largest| largest.count)
    );
    assert!(all.iter().all(|largest| largest.z < quantile));
    assert!(exact < 1e-7);
    let [renormalized, ignored, _] = plain;
    assert!(renormalized > 10.0 * quantile && ignored > 10.0 * quantile);
}

#[test]
fn the_mean_over_draws_is_the_dense_gradient() {
    check(&positions::made_up());
}

#[test]
fn the_mean_over_draws_is_the_dense_gradient_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    check(&positions::stories260k(&dir));
}

/// Checks that the fused op of training gives the states the gradient at the logits times the head.
#[test]
fn the_fused_op_gives_the_same_gradient() {
    let setup = positions::made_up();
    for (index, position) in setup.positions.iter().enumerate() {
        let rows = records::records(position, index as u64, 8, 24, Sampler::Stored)[..50].to_vec();
        let learned = learn(&setup, position, rows.clone(), Tail::Draws);
        let by_hand = by_hand(&setup, position, &rows);
        let rows = Rows::new(position, rows, Tail::Draws);
        let options = HeadLossOptions {
            heads: &[LogitTransform::default()],
            sum: LogQSum::Omitted,
            train_head: false,
            chunk_rows: 16,
            form: Form::Fused,
        };
        let (hidden_nd, head_vd) = (position.hidden_nd(50), setup.head_vd.clone());
        let mut loss = |at: Range<usize>, stats: &[RowStats]| rows.loss_n(at, &stats[0]).sum();
        let support_nk = rows.support_nk.clone();
        let gradient = head_loss(hidden_nd, head_vd, support_nk, &options, &mut loss);
        let fused_nd = numbers(gradient.hidden_nd);
        near("fused", &fused_nd, &learned.hidden_nd, 1e-12);
        // The numbers of a record are f32.
        near("logits", &learned.logits_nv, &by_hand.logits_nv, 1e-7);
        near("hidden", &learned.hidden_nd, &by_hand.hidden_nd, 1e-6);
        near("value", &learned.value_n, &by_hand.value_n, 1e-6);
    }
}

/// Computes z with P(Z > z) = p for a small p, by bisection on φ(z)/z · (1 − 1/z² + 3/z⁴ − 15/z⁶).
fn normal_quantile(p: f64) -> f64 {
    let upper = |z: f64| {
        let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        density / z * (1.0 - z.powi(-2) + 3.0 * z.powi(-4) - 15.0 * z.powi(-6))
    };
    let (mut low, mut high) = (4.0, 20.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match upper(middle) > p {
            true => low = middle,
            false => high = middle,
        }
    }
    low
}
