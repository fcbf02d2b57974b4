//! Loss and gradients from records: with the functions of the training step, and in plain loops.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::{Signal, SignalRow};
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, RowStats, row_stats};
use potstill_student::Target;
use potstill_student::loss::{Tail, forward_kl, soft_cross_entropy};

use super::positions::{Position, Setup};
use crate::plain::numbers;

/// KL in nats, `[n]`, and its gradients, with one row for each record of a position.
#[derive(Default)]
pub(super) struct Learned {
    pub(super) value_n: Vec<f64>,
    pub(super) logits_nv: Vec<f64>,
    pub(super) hidden_nd: Vec<f64>,
}

/// Targets of records as the training step has them: the support, and the loss of each row from log q on the support.
pub(super) struct Rows {
    pub(super) support_nk: Tensor<2, Int>,
    log_p_nk: Tensor<2>,
    entropy_n: Tensor<1>,
    tail: Tail,
}

impl Rows {
    pub(super) fn new(position: &Position, rows: Vec<SignalRow>, tail: Tail) -> Self {
        let n = rows.len();
        let signal = Signal {
            prompt_id: String::new(),
            sample_index: 0,
            token_ids: vec![position.target_token; n + 1],
            loss_mask: (0..=n).map(|t| t > 0).collect(),
            rows: rows.into_iter().collect(),
            provenance: 0,
        };
        let (Target { rows }, rescaled) = Target::new(&signal, tail, 1.0).unwrap();
        assert_eq!(rescaled, 0);
        let k = rows.iter().map(|row| row.ids.len()).max().unwrap();
        let (mut ids, mut log_p) = (vec![-1; n * k], vec![EMPTY_NATS; n * (k + 1)]);
        for (at, row) in rows.iter().enumerate() {
            for (slot, (id, p)) in row.ids.iter().zip(&row.p).enumerate() {
                ids[at * k + slot] = *id as i32;
                log_p[at * (k + 1) + slot] = p.ln();
            }
            log_p[at * (k + 1) + k] = row.tail.ln().max(EMPTY_NATS);
        }
        let entropy: Vec<f64> = rows.iter().map(|row| row.entropy).collect();
        let at = (&Device::flex(), DType::F64);
        let ids = TensorData::new(ids, [n, k]);
        Self {
            support_nk: Tensor::from_data(ids, (&Device::flex(), DType::I32)),
            log_p_nk: Tensor::from_data(TensorData::new(log_p, [n, k + 1]), at),
            entropy_n: Tensor::from_data(TensorData::new(entropy, [n]), at),
            tail,
        }
    }

    pub(super) fn loss_n(&self, rows: Range<usize>, stats: &RowStats) -> Tensor<1> {
        let log_p_nk = self.log_p_nk.clone().slice(rows.clone());
        let (log_p_nk, log_q_nk) = self.tail.apply(log_p_nk, stats.log_q_nk());
        match self.tail {
            Tail::Draws => {
                soft_cross_entropy(log_p_nk, log_q_nk) - self.entropy_n.clone().slice(rows)
            }
            _ => forward_kl(log_p_nk, log_q_nk),
        }
    }
}

/// Computes loss and gradients with the functions of the training step.
pub(super) fn learn(
    setup: &Setup,
    position: &Position,
    rows: Vec<SignalRow>,
    tail: Tail,
) -> Learned {
    let n = rows.len();
    let rows = Rows::new(position, rows, tail);
    let logits_nv = Tensor::from_inner(position.logits_nv(n)).require_grad();
    let support_nk = rows.support_nk.clone();
    let stats = row_stats(
        logits_nv.clone(),
        support_nk,
        &LogitTransform::default(),
        LogQSum::Omitted,
    );
    let value_n = rows.loss_n(0..n, &stats);
    let gradients = value_n.clone().sum().backward();
    let gradient_nv = logits_nv.grad(&gradients).unwrap();
    Learned {
        value_n: numbers(value_n.inner()),
        hidden_nd: numbers(gradient_nv.clone().matmul(setup.head_vd.clone())),
        logits_nv: numbers(gradient_nv),
    }
}

/// Computes loss and gradients from records with draws by the formulas: q − p on the support, q − mass · count / m
/// outside.
pub(super) fn by_hand(setup: &Setup, position: &Position, rows: &[SignalRow]) -> Learned {
    let mut learned = Learned::default();
    let p = |id: &u32| position.log_p[*id as usize].exp();
    let on_support: Vec<(u32, f64)> = rows[0].ids.iter().map(|id| (*id, p(id))).collect();
    let mass = position.mass_outside(&rows[0].ids);
    for row in rows {
        let m: u32 = row.draw_counts.iter().sum();
        let drawn = row.draw_ids.iter().zip(&row.draw_counts);
        let drawn = drawn.map(|(id, count)| (*id, mass * f64::from(*count) / f64::from(m)));
        let mut value = -position.entropy();
        let mut at_logits = position.q.clone();
        let mut at_hidden = position.mean_head.clone();
        for (id, weight) in on_support.iter().copied().chain(drawn) {
            let id = id as usize;
            value -= weight * position.q[id].ln();
            at_logits[id] -= weight;
            for (sum, w) in at_hidden.iter_mut().zip(setup.head_row(id)) {
                *sum -= weight * w;
            }
        }
        learned.value_n.push(value);
        learned.logits_nv.extend(at_logits);
        learned.hidden_nd.extend(at_hidden);
    }
    learned
}
