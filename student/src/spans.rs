//! KL with a teacher of another tokenizer, over the spans of text at whose two ends both tokenizers have a token
//! boundary.
//!
//! `potstill_datasets::align` finds the spans. If a span is one token for each tokenizer, the teacher's row is
//! converted to the student's ids ([`in_student_ids`]) and is a sparse target like any other. If a span is more
//! tokens, there are two buckets: the text continues with exactly this span, or with anything else:
//!
//! ```text
//! P = Π p(teacher's tokens)    Q = Π q(student's tokens)    each given the tokens before it
//! D = P (log P − log Q) + (1 − P) (log(1 − P) − log(1 − Q))
//! ∂D/∂log Q = −P      ∂D/∂log(1 − Q) = −(1 − P)      1 − Q = Σ_i (1 − q_i) Π_{j<i} q_j
//! ```
//!
//! Direction: p is the teacher, q the student. Reduction: none, nats for each span. A span of several
//! tokens is one term, so divide by the number of spans or weight by bytes, not by tokens. Source: the two buckets are the
//! binarised f-divergence of approximate likelihood matching (Minixhofer, Vulić and Ponti 2025), at its
//! temperature 1.
//!
//! What holds: P and Q are the probabilities that each model writes the span with exactly these tokens, after the
//! same text. D is the KL of two distributions on two buckets: at least 0, and 0 if and only if P = Q. If the
//! buckets of both sides stand for the same sets of texts, D is the KL of a coarsening of the texts'
//! distributions, and so at most the KL of the texts that follow.
//!
//! What does not hold: other tokenisations of the same bytes are ignored on both sides. A text that begins with
//! the span's bytes may have a token across the span's end in one tokenizer and not in the other, so the sets are
//! the same only up to these texts. The same is true of one-token spans: "the next token is ` the`" excludes
//! ` there`, which may be a token in only one vocabulary. So equal distributions of texts do not need D = 0, and
//! the bound is not a theorem for real tokenizers.
//!
//! Special cases: P = 1 (log(1 − P) has the floor 2⁻⁶⁰) gives −log Q; a span of one token is the KL of
//! [its token, the rest]. Time and memory: the student's rows, and as many tensor operations as the
//! longest span has tokens.

use std::ops::Range;

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, TAIL_FLOOR_NATS};

use crate::loss::forward_kl;
use crate::target::TargetRow;

/// Converts the teacher's row to the student's ids. `student_id[i]` is the student's token for the teacher's
/// token i (`potstill_datasets::ids_by_bytes`, with the end-of-sequence tokens matched by role). Mass of tokens
/// without a student's token goes to the tail, and mass of tokens with the same student's token is added up. The
/// result keeps the order and the sum of the teacher's row.
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

/// Computes the teacher's two buckets of a span, [log P, log(1 − P)] in nats, from the log probabilities of its
/// tokens, each given the tokens before.
#[must_use]
pub fn span_log_p(log_p: &[f64]) -> [f64; 2] {
    let log_p = log_p.iter().sum::<f64>().clamp(EMPTY_NATS, 0.0);
    // ln(1 − eˣ) after Mächler 2012 ("log1mexp"): expm1 for P near 1, log1p for P near 0.
    let log_rest = if log_p > -std::f64::consts::LN_2 {
        (-log_p.exp_m1()).ln()
    } else {
        (-log_p.exp()).ln_1p()
    };
    [log_p, log_rest.max(TAIL_FLOOR_NATS)]
}

/// Computes the student's two buckets of each span, [log Q, log(1 − Q)], [m, 2] in nats.
///
/// `log_q_n2` is [n, 2]: the log probability of the target token and that of everything else, for each row, as
/// row statistics have them for a support of one token. `spans` has the rows of each span; there is at least one
/// span, and each has at least one row. log(1 − Q) is a sum over the rows' second column and is never computed as
/// 1 − Q, so that a nearly certain student keeps its gradient in f32.
///
/// # Panics
/// On rows beyond n, as burn's operations do.
#[must_use]
pub fn span_log_q(log_q_n2: Tensor<2>, spans: &[Range<usize>]) -> Tensor<2> {
    let longest = spans.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    // The i-th row of each span. A shorter span gets log q = 0 and no probability of leaving the span.
    let at = |i: usize| {
        let rows: Vec<Option<usize>> = spans.iter().map(|span| span.clone().nth(i)).collect();
        let row_m = ids(rows.iter().map(|row| row.unwrap_or(0)), &log_q_n2.device());
        let ended: Vec<bool> = rows.iter().map(Option::is_none).collect();
        let ended_m1 = Tensor::<2, Bool>::from_data(
            TensorData::new(ended, [rows.len(), 1]),
            &log_q_n2.device(),
        );
        let log_q_m2 = log_q_n2.clone().select(0, row_m);
        [(0, 0.0), (1, EMPTY_NATS)].map(|(column, neutral)| {
            log_q_m2
                .clone()
                .narrow(1, column, 1)
                .mask_fill(ended_m1.clone(), neutral)
        })
    };
    // The text leaves the span at the first token, or after the first token at the second, and so on.
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

/// Computes the KL of each span, `[m]` in nats, from the teacher's buckets [m, 2] ([`span_log_p`]) and the
/// student's rows, the argument of [`span_log_q`]. For another divergence, pass the two buckets to a function of
/// [`loss`](crate::loss).
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
