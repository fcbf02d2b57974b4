//! The losses by their definitions, in f64 and plain loops, as reference for the tensor functions.
//!
//! Values are computed from probabilities, and gradients from g_b = ∂D/∂q_b, written out by hand, and
//! ∂q_b/∂z_i = q_i (1[i in b] − q_b), so no code is shared with the functions under test.

use potstill_kernels::TAIL_FLOOR_NATS;
use potstill_student::loss::Divergence;

/// A bucket: its tokens, and the teacher's log probability of the bucket.
pub(crate) struct Bucket {
    pub(crate) log_p: f64,
    pub(crate) tokens: Vec<usize>,
}

/// Computes value and gradient at the logits. `among` are the tokens over which the student's softmax is computed.
pub(crate) fn at_logits(
    logits: &[f64],
    among: &[usize],
    buckets: &[Bucket],
    divergence: &Divergence,
) -> (f64, Vec<f64>) {
    let max = among.iter().map(|&i| logits[i]).fold(f64::MIN, f64::max);
    let z: f64 = among.iter().map(|&i| (logits[i] - max).exp()).sum();
    let token = |i: usize| (logits[i] - max).exp() / z;
    let log_p: Vec<f64> = buckets.iter().map(|bucket| bucket.log_p).collect();
    let mass = |bucket: &Bucket| -> f64 { bucket.tokens.iter().map(|&i| token(i)).sum() };
    let q: Vec<f64> = buckets
        .iter()
        .map(|bucket| {
            if bucket.tokens.is_empty() {
                TAIL_FLOOR_NATS.exp()
            } else {
                mass(bucket)
            }
        })
        .collect();
    let (value, g) = value_and_slope(divergence, &log_p, &q);
    let mean: f64 = g.iter().zip(&q).map(|(g, q)| g * q).sum();
    let mut gradient = vec![0.0; logits.len()];
    for &i in among {
        let own = buckets.iter().position(|bucket| bucket.tokens.contains(&i));
        gradient[i] = token(i) * (own.map_or(0.0, |b| g[b]) - mean);
    }
    (value, gradient)
}

/// Computes D and ∂D/∂q_b.
fn value_and_slope(divergence: &Divergence, log_p: &[f64], q: &[f64]) -> (f64, Vec<f64>) {
    let by_bucket = |f: &dyn Fn(f64, f64, f64) -> (f64, f64)| {
        let each = log_p
            .iter()
            .zip(q)
            .map(|(&log_p, &q)| f(log_p.exp(), log_p, q));
        let (values, slopes): (Vec<f64>, Vec<f64>) = each.unzip();
        (values.iter().sum::<f64>(), slopes)
    };
    let forward = |p: f64, log_p: f64, q: f64| (p * (log_p - q.ln()), -p / q);
    let reverse = |_: f64, log_p: f64, q: f64| (q * (q.ln() - log_p), q.ln() - log_p + 1.0);
    // 0 log 0 = 0, by definition.
    let kl = |a: f64, b: f64| if a > 0.0 { a * (a / b).ln() } else { 0.0 };
    match *divergence {
        Divergence::ForwardKl => by_bucket(&forward),
        Divergence::ReverseKl => by_bucket(&reverse),
        Divergence::Jsd { beta: 0.0 } => by_bucket(&forward),
        Divergence::Jsd { beta: 1.0 } => by_bucket(&reverse),
        Divergence::Jsd { beta } => by_bucket(&|p, _, q| {
            let m = beta * p + (1.0 - beta) * q;
            let value = beta * kl(p, m) + (1.0 - beta) * kl(q, m);
            (value, (1.0 - beta) * (q / m).ln())
        }),
        Divergence::SkewKl { alpha } => by_bucket(&|p, _, q| {
            let m = alpha * p + (1.0 - alpha) * q;
            (kl(p, m), -(1.0 - alpha) * p / m)
        }),
        // At p = 0 the formula is infinite, but log p has a floor.
        Divergence::SkewReverseKl { alpha: 0.0 } => by_bucket(&reverse),
        Divergence::SkewReverseKl { alpha } => by_bucket(&|p, _, q| {
            let m = (1.0 - alpha) * p + alpha * q;
            (kl(q, m), (q / m).ln() + (1.0 - alpha) * p / m)
        }),
        Divergence::TotalVariation => by_bucket(&|p, _, q| {
            let sign = if q == p { 0.0 } else { (q - p).signum() };
            (0.5 * (p - q).abs(), 0.5 * sign)
        }),
        Divergence::Alpha { alpha: 1.0 } => by_bucket(&forward),
        Divergence::Alpha { alpha: 0.0 } => by_bucket(&reverse),
        Divergence::Alpha { alpha } => by_bucket(&|p, _, q| {
            let term = alpha * p + (1.0 - alpha) * q - p.powf(alpha) * q.powf(1.0 - alpha);
            let slope = (1.0 - (p / q).powf(alpha)) / alpha;
            (term / (alpha * (1.0 - alpha)), slope)
        }),
        Divergence::AdaptiveKl { head_mass } => {
            let weight = head_weight(log_p, q, head_mass);
            let (a, slopes_a) = by_bucket(&forward);
            let (b, slopes_b) = by_bucket(&reverse);
            let mixed = |(a, b): (&f64, &f64)| weight * a + (1.0 - weight) * b;
            let slopes = slopes_a.iter().zip(&slopes_b).map(mixed).collect();
            (mixed((&a, &b)), slopes)
        }
        Divergence::Custom(_) => unreachable!("a custom divergence has no definition"),
    }
}

/// Computes the weight of forward KL in adaptive KL: adds up the teacher's buckets, largest first, until their mass
/// reaches the head's.
pub(crate) fn head_weight(log_p: &[f64], q: &[f64], head_mass: f64) -> f64 {
    let p: Vec<f64> = log_p.iter().map(|log_p| log_p.exp()).collect();
    let mut falling = p.clone();
    falling.sort_by(|a, b| b.total_cmp(a));
    let (mut mass, mut smallest) = (0.0, f64::INFINITY);
    for p in falling {
        if mass >= head_mass {
            break;
        }
        mass += p;
        smallest = p;
    }
    let (mut head, mut rest) = (0.0, 0.0);
    for (p, q) in p.iter().zip(q) {
        *if *p >= smallest { &mut head } else { &mut rest } += (p - q).abs();
    }
    head / (head + rest)
}
