//! KL with a teacher of another tokenizer, over the spans of the text that both cut at both ends.
//!
//! `potstill_datasets::align` gives the spans. Where one holds a token on each side, the teacher's row
//! goes over to the student's ids ([`in_student_ids`]) and is a sparse target like any other. Where it
//! holds more, there are two buckets, "the text goes on with exactly this span" and everything else:
//!
//! ```text
//! P = Π p(teacher's tokens)    Q = Π q(student's tokens)    each given the tokens before it
//! D = P (log P − log Q) + (1 − P) (log(1 − P) − log(1 − Q))
//! ∂D/∂log Q = −P      ∂D/∂log(1 − Q) = −(1 − P)      1 − Q = Σ_i (1 − q_i) Π_{j<i} q_j
//! ```
//!
//! Direction: p is the teacher, q the student. Reduction: none, nats by span; a span of several tokens
//! is one term, so divide by spans or weigh by bytes, not by tokens. Source: the two buckets are the
//! binarised f-divergence of approximate likelihood matching (Minixhofer, Vulić and Ponti 2025), at its
//! temperature 1.
//!
//! What is claimed. P and Q are the probabilities that each model writes the span with these very
//! tokens, after the same text. D is the KL of two distributions on two buckets: at least 0, and 0 if
//! and only if P = Q. Where both buckets stand for the same set of texts, D is the KL of a coarsening of
//! the texts' distributions, so at most the KL of the texts that follow. What is not: other tokenisations
//! of the same bytes are ignored on both sides; and a text that begins with the span's bytes may be cut
//! across the span's end by one tokenizer and not by the other, so the sets are the same only up to such
//! texts. The same holds for one-token spans: "the next token is ` the`" leaves ` there` to another
//! token, which may exist in one vocabulary alone. So D = 0 is not needed for equal distributions of
//! texts, and the bound is no theorem for real tokenizers.
//!
//! Special cases: P = 1 (log(1 − P) has the floor 2⁻⁶⁰) gives −log Q; a span of one token is the KL of
//! [its token, the rest]. Time and memory: the student's rows, and as many tensor operations as the
//! longest span has tokens.

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, TAIL_FLOOR_NATS};

use crate::loss::forward_kl;
use crate::target::TargetRow;

/// The teacher's row over the student's ids. `student_id[i]` is the student's token for the teacher's
/// token i (`potstill_datasets::ids_by_bytes`, with the ends of sequence matched by role); tokens
/// without one go to the tail, and those that share one are added up. The result has the order of the
/// teacher's row and sums to what it summed to.
#[must_use]
pub fn in_student_ids(row: &TargetRow, student_id: &[Option<u32>]) -> TargetRow {
    let (mut ids, mut p, mut tail): (Vec<u32>, Vec<f64>, f64) = (Vec::new(), Vec::new(), row.tail);
    for (&teacher_id, &mass) in row.ids.iter().zip(&row.p) {
        let Some(id) = student_id.get(teacher_id as usize).copied().flatten() else {
            tail += mass;
            continue;
        };
        match ids.iter().position(|&known| known == id) {
            Some(slot) => p[slot] += mass,
            None => {
                ids.push(id);
                p.push(mass);
            }
        }
    }
    let entropy = row.entropy;
    TargetRow {
        ids,
        p,
        tail,
        entropy,
    }
}

/// The teacher's two buckets of a span, [log P, log(1 − P)] in nats, from the log probabilities of its
/// tokens, each given the ones before.
#[must_use]
pub fn span_log_p(log_p: &[f64]) -> [f64; 2] {
    let log_p = log_p.iter().sum::<f64>().clamp(EMPTY_NATS, 0.0);
    // ln(1 − eˣ) as Mächler 2012 ("log1mexp") splits it: expm1 for P near 1, log1p for P near 0.
    let log_rest = if log_p > -std::f64::consts::LN_2 {
        (-log_p.exp_m1()).ln()
    } else {
        (-log_p.exp()).ln_1p()
    };
    [log_p, log_rest.max(TAIL_FLOOR_NATS)]
}

/// The student's two buckets of each span, [log Q, log(1 − Q)], [m, 2] in nats.
///
/// `log_q_n2` is [n, 2]: of each row the log probability of the realised token and that of everything
/// else, as row statistics give them for a support of one token. `spans` has the rows of each span, one
/// or more, and there is one span or more. log(1 − Q) is summed up from the rows' second column, never
/// taken from 1 − Q: a student that is nearly certain keeps its gradient in f32.
///
/// # Panics
/// As burn's own operations do, on rows beyond n.
#[must_use]
pub fn span_log_q(log_q_n2: Tensor<2>, spans: &[Range<usize>]) -> Tensor<2> {
    let longest = spans.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    // The i-th row of each span; where a span has none, log q is 0 and nothing is left to leave with.
    let at = |i: usize| {
        let rows: Vec<Option<usize>> = spans.iter().map(|span| span.clone().nth(i)).collect();
        let row_m = ids(rows.iter().map(|row| row.unwrap_or(0)), &log_q_n2.device());
        let ended: Vec<bool> = rows.iter().map(Option::is_none).collect();
        let ended_m1 = Tensor::<2, Bool>::from_data(
            TensorData::new(ended, [rows.len(), 1]),
            &log_q_n2.device(),
        );
        let log_q_m2 = log_q_n2.clone().select(0, row_m);
        [(0, 0.0), (1, EMPTY_NATS)].map(|(column, nothing)| {
            log_q_m2
                .clone()
                .narrow(1, column, 1)
                .mask_fill(ended_m1.clone(), nothing)
        })
    };
    // The text leaves the span at its first token, or at the second after the first, and so on.
    let [mut log_q_m1, first_rest_m1] = at(0);
    let mut leaves = vec![first_rest_m1];
    for i in 1..longest {
        let [next_m1, rest_m1] = at(i);
        leaves.push(log_q_m1.clone() + rest_m1);
        log_q_m1 = log_q_m1 + next_m1;
    }
    let leaves_ml = Tensor::cat(leaves, 1);
    let largest_m1 = leaves_ml.clone().detach().max_dim(1);
    let log_rest_m1 = (leaves_ml - largest_m1.clone()).exp().sum_dim(1).log() + largest_m1;
    Tensor::cat(vec![log_q_m1, log_rest_m1], 1)
}

/// KL by span, `[m]` in nats, from the teacher's buckets [m, 2] ([`span_log_p`]) and the student's rows
/// as [`span_log_q`] takes them. For another divergence give those two to any of [`loss`](crate::loss).
#[must_use]
pub fn span_kl(log_p_m2: Tensor<2>, log_q_n2: Tensor<2>, spans: &[Range<usize>]) -> Tensor<1> {
    let log_q_m2 = span_log_q(log_q_n2, spans);
    forward_kl(log_p_m2, log_q_m2)
}

fn ids(values: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.map(|value| value as i32).collect();
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}
