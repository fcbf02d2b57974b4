//! Targets and losses of every kind, each loss with its definition.

use burn::tensor::{Bool, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, TAIL_FLOOR_NATS};
use potstill_student::loss::{Divergence, Tail, contrastive, soft_cross_entropy};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::losses_reference::{Bucket, at_logits};

/// A target, and students to compare with it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// The students' logits, one row for each position.
    pub(crate) logits: Vec<Vec<f64>>,
    /// Token in each slot of each row; `None` is an empty slot.
    pub(crate) slots: Vec<Vec<Option<usize>>>,
    /// Log p of the slots, with the tail last, as in a target.
    pub(crate) log_p: Vec<Vec<f64>>,
    /// Treatment of the tail; `None` for a dense target, which has no support and log p of the vocabulary.
    pub(crate) tail: Option<Tail>,
}

pub(crate) const V: usize = 24;

/// Returns distributions of the teacher and logits of students that are difficult in different ways.
pub(crate) fn distributions(rng: &mut ChaCha8Rng) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let mut logits =
        |scale: f64| -> Vec<f64> { (0..V).map(|_| rng.random_range(-scale..scale)).collect() };
    let mut teacher = [
        logits(2.0),
        logits(9.0),
        logits(3.0),
        logits(3.0),
        logits(1.0),
        logits(1.0),
    ];
    let mut student = vec![
        logits(2.0),
        logits(3.0),
        teacher[2].clone(),
        logits(2.0),
        logits(3.0),
        logits(9.0),
    ];
    let noise = logits(1e-3);
    student[2]
        .iter_mut()
        .zip(noise)
        .for_each(|(z, noise)| *z += noise);
    teacher[3][5] = f64::NEG_INFINITY;
    let p = |row: &Vec<f64>| -> Vec<f64> {
        let sum: f64 = row.iter().map(|z| z.exp()).sum();
        row.iter().map(|z| z.exp() / sum).collect()
    };
    (teacher.iter().map(p).collect(), student)
}

fn log(p: f64) -> f64 {
    if p > 0.0 { p.ln() } else { EMPTY_NATS }
}

/// Returns supports of 6, 5, 8, 4, all and 3 tokens, in random order, with empty slots in between.
fn supports(p: &[Vec<f64>], rng: &mut ChaCha8Rng) -> Vec<Vec<Option<usize>>> {
    let support = |(row, &size): (&Vec<f64>, &usize)| {
        let mut ids: Vec<usize> = (0..V).collect();
        ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        if size == 4 {
            ids.swap(3, V - 1); // The token that the teacher never says.
        }
        let mut slots: Vec<_> = (0..V)
            .map(|slot| (slot < size).then(|| ids[slot]))
            .collect();
        slots.shuffle(rng);
        slots
    };
    p.iter().zip(&[6, 5, 8, 4, V, 3]).map(support).collect()
}

pub(crate) fn cases() -> Vec<Case> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (p, logits) = distributions(&mut rng);
    let slots = supports(&p, &mut rng);
    let sparse = |name, tail| {
        let log_p = |(p, slots): (&Vec<f64>, &Vec<Option<usize>>)| {
            let rest = (0..V)
                .filter(|&i| !slots.contains(&Some(i)))
                .map(|i| p[i])
                .sum::<f64>();
            let on_slots = slots
                .iter()
                .map(|slot| slot.map_or(EMPTY_NATS, |i| log(p[i])));
            on_slots.chain([log(rest).max(TAIL_FLOOR_NATS)]).collect()
        };
        Case {
            name,
            logits: logits.clone(),
            slots: slots.clone(),
            log_p: p.iter().zip(&slots).map(log_p).collect(),
            tail: Some(tail),
        }
    };
    let mut draws = sparse("draws", Tail::Draws);
    let mut head_and_draws = sparse("head and draws", Tail::Draws);
    for (case, exact) in [(&mut draws, 0), (&mut head_and_draws, V / 2)] {
        for log_weight in case.log_p.iter_mut().flat_map(|row| &mut row[exact..V]) {
            if *log_weight > EMPTY_NATS {
                *log_weight += rng.random_range(-1.0..1.5);
            }
        }
    }
    vec![
        sparse("bucket", Tail::Bucket),
        sparse("renormalize", Tail::Renormalize),
        sparse("ignore", Tail::Ignore),
        draws,
        head_and_draws,
        Case {
            name: "target token",
            slots: slots
                .iter()
                .map(|row| vec![row.iter().copied().flatten().next()])
                .collect(),
            log_p: vec![vec![0.0, TAIL_FLOOR_NATS]; p.len()],
            logits: logits.clone(),
            tail: Some(Tail::Bucket),
        },
        Case {
            name: "dense",
            slots: vec![(0..V).map(Some).collect(); p.len()],
            log_p: p
                .iter()
                .map(|p| p.iter().copied().map(log).collect())
                .collect(),
            logits,
            tail: None,
        },
    ]
}

#[derive(Debug)]
pub(crate) enum Loss {
    Of(Divergence),
    SoftCrossEntropy,
    /// Contrastive pair; the odd rows are the student's own text.
    Contrastive(f64),
}

pub(crate) fn losses() -> Vec<Loss> {
    let divergences = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.0 },
        Divergence::Jsd { beta: 0.1 },
        Divergence::Jsd { beta: 0.5 },
        Divergence::Jsd { beta: 0.9 },
        Divergence::Jsd { beta: 1.0 },
        Divergence::SkewKl { alpha: 0.0 },
        Divergence::SkewKl { alpha: 0.1 },
        Divergence::SkewReverseKl { alpha: 0.0 },
        Divergence::SkewReverseKl { alpha: 0.1 },
        Divergence::AdaptiveKl { head_mass: 0.5 },
        Divergence::TotalVariation,
        Divergence::Alpha { alpha: 0.0 },
        Divergence::Alpha { alpha: 0.3 },
        Divergence::Alpha { alpha: 0.5 },
        Divergence::Alpha { alpha: 1.0 },
    ];
    let mut losses: Vec<_> = divergences.into_iter().map(Loss::Of).collect();
    losses.extend([Loss::SoftCrossEntropy, Loss::Contrastive(0.1)]);
    losses
}

impl Loss {
    pub(crate) fn works_on(&self, case: &Case) -> bool {
        let linear = match self {
            Self::Of(divergence) => divergence.works_on_draws(),
            Self::SoftCrossEntropy => true,
            Self::Contrastive(_) => false,
        };
        linear || case.tail != Some(Tail::Draws)
    }

    pub(crate) fn rows(&self, log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
        match self {
            Self::Of(divergence) => divergence.rows(log_p_nk, log_q_nk),
            Self::SoftCrossEntropy => soft_cross_entropy(log_p_nk, log_q_nk),
            Self::Contrastive(alpha) => {
                let own: Vec<bool> = (0..log_p_nk.dims()[0]).map(|row| row % 2 == 1).collect();
                let count = own.len();
                let own_n = TensorData::new(own, [count]);
                let own_n = Tensor::<1, Bool>::from_data(own_n, &log_p_nk.device());
                contrastive(log_p_nk, log_q_nk, own_n, *alpha)
            }
        }
    }

    /// Computes value and gradient of one row by the definition.
    pub(crate) fn by_definition(&self, case: &Case, row: usize) -> (f64, Vec<f64>) {
        let (logits, slots, log_p) = (&case.logits[row], &case.slots[row], &case.log_p[row]);
        let support: Vec<usize> = slots.iter().copied().flatten().collect();
        let rest = (0..V).filter(|i| !support.contains(i)).collect();
        let filled = slots
            .iter()
            .zip(log_p)
            .filter_map(|(slot, &log_p)| Some((slot.as_ref()?, log_p)));
        let mut buckets: Vec<Bucket> = filled
            .map(|(&token, log_p)| Bucket {
                log_p,
                tokens: vec![token],
            })
            .collect();
        let mut among: Vec<usize> = (0..V).collect();
        match case.tail {
            Some(Tail::Bucket) => buckets.push(Bucket {
                log_p: log_p[slots.len()],
                tokens: rest,
            }),
            Some(Tail::Renormalize) => {
                let sum: f64 = buckets.iter().map(|bucket| bucket.log_p.exp()).sum();
                for bucket in &mut buckets {
                    if bucket.log_p > EMPTY_NATS {
                        bucket.log_p -= sum.ln();
                    }
                }
                among = support;
            }
            Some(Tail::Ignore | Tail::Draws) | None => {}
        }
        let at = |divergence: &Divergence| at_logits(logits, &among, &buckets, divergence);
        match self {
            Self::Of(divergence) => at(divergence),
            Self::SoftCrossEntropy => {
                let (kl, gradient) = at(&Divergence::ForwardKl);
                let entropy: f64 = buckets.iter().map(|b| -b.log_p.exp() * b.log_p).sum();
                (kl + entropy, gradient)
            }
            &Self::Contrastive(alpha) if row % 2 == 1 => at(&Divergence::SkewReverseKl { alpha }),
            &Self::Contrastive(alpha) => at(&Divergence::SkewKl { alpha }),
        }
    }
}
