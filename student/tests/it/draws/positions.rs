//! Distributions of teacher and student at a few positions of a text, over 512 tokens.

use std::path::Path;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_model::{Decoder, prune_layers};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::plain::{constant, log_softmax, numbers};
use crate::support::log_probs;

pub(super) struct Setup {
    name: &'static str,
    /// The student's head.
    pub(super) head_vd: Tensor<2>,
    head: Vec<f64>,
    pub(super) positions: Vec<Position>,
}

pub(super) struct Position {
    /// The teacher's log p.
    pub(super) log_p: Vec<f64>,
    /// The student's hidden state.
    hidden: Vec<f64>,
    logits: Vec<f64>,
    pub(super) q: Vec<f64>,
    /// Σ q_i head_i, `[d]`.
    pub(super) mean_head: Vec<f64>,
    pub(super) target_token: u32,
}

impl Position {
    fn new(log_p: Vec<f64>, hidden: &[f64], head: &[f64], target_token: u32) -> Self {
        let dot = |row: &[f64]| row.iter().zip(hidden).map(|(w, x)| w * x).sum();
        let logits: Vec<f64> = head.chunks_exact(hidden.len()).map(dot).collect();
        let q: Vec<f64> = log_softmax(&logits).iter().map(|l| l.exp()).collect();
        Self {
            log_p,
            mean_head: at_hidden(&q, head),
            q,
            logits,
            hidden: hidden.to_vec(),
            target_token,
        }
    }

    /// The student's logits, repeated n times.
    pub(super) fn logits_nv(&self, n: usize) -> Tensor<2> {
        constant(&vec![self.logits.clone()]).repeat_dim(0, n)
    }

    /// The student's state, repeated n times.
    pub(super) fn hidden_nd(&self, n: usize) -> Tensor<2> {
        constant(&vec![self.hidden.clone()]).repeat_dim(0, n)
    }

    pub(super) fn mass_outside(&self, support: &[u32]) -> f64 {
        let all = self.log_p.iter().enumerate();
        let outside = all.filter(|(id, _)| !support.contains(&(*id as u32)));
        outside.map(|(_, l)| l.exp()).sum()
    }

    /// Entropy of the teacher, nats.
    pub(super) fn entropy(&self) -> f64 {
        -self.log_p.iter().map(|l| l * l.exp()).sum::<f64>()
    }

    /// D(p ‖ q), nats, over the whole vocabulary.
    pub(super) fn kl(&self) -> f64 {
        let both = self.log_p.iter().zip(&self.q);
        both.map(|(l, q)| l.exp() * (l - q.ln())).sum()
    }
}

impl Setup {
    fn new(name: &'static str, head_vd: Tensor<2>, positions: Vec<Position>) -> Self {
        let head = numbers(head_vd.clone());
        Self {
            name,
            head_vd,
            head,
            positions,
        }
    }

    pub(super) fn head_row(&self, id: usize) -> &[f64] {
        let d = self.head_vd.dims()[1];
        &self.head[id * d..(id + 1) * d]
    }

    /// Computes the dense gradient: q − p, `[v]`, and (q − p) · head, `[d]`.
    pub(super) fn dense(&self, position: &Position) -> (Vec<f64>, Vec<f64>) {
        let both = position.q.iter().zip(&position.log_p);
        let dense_v: Vec<f64> = both.map(|(q, l)| q - l.exp()).collect();
        let dense_d = at_hidden(&dense_v, &self.head);
        (dense_v, dense_d)
    }

    pub(super) fn describe(&self) {
        let entropies: Vec<f64> = self.positions.iter().map(Position::entropy).collect();
        let kls: Vec<f64> = self.positions.iter().map(Position::kl).collect();
        let squares = |gradient: &[f64]| gradient.iter().map(|g| g * g).sum::<f64>();
        let dense: Vec<_> = self.positions.iter().map(|p| self.dense(p)).collect();
        let n = dense.len() as f64;
        println!(
            "{}: entropy {entropies:.2?}, KL {kls:.2?} nats; ‖dense gradient‖² {:.2e} at the logits, {:.2e} at hidden",
            self.name,
            dense.iter().map(|(v, _)| squares(v)).sum::<f64>() / n,
            dense.iter().map(|(_, d)| squares(d)).sum::<f64>() / n
        );
    }
}

/// Computes Σ_i x_i head_i, `[d]`.
fn at_hidden(x: &[f64], head: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; head.len() / x.len()];
    for (x, row) in x.iter().zip(head.chunks_exact(sums.len())) {
        for (sum, w) in sums.iter_mut().zip(row) {
            *sum += x * w;
        }
    }
    sums
}

/// The model as teacher and its layers 0, 2 and 4 as student, on a text that the teacher samples, at the positions of
/// six quantiles of the teacher's entropy.
pub(super) fn stories260k(dir: &Path) -> Setup {
    let teacher = potstill_model::load(dir, DType::F64, &Device::flex()).unwrap();
    let student = prune_layers(&teacher, &[0, 2, 4]).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut text = vec![1];
    while text.len() < 96 {
        let log_p = log_probs(&teacher, std::slice::from_ref(&text));
        text.push(drawn(log_p.last().unwrap(), &mut rng));
    }
    let head = numbers(student.head());
    let states = hidden(&student, &text);
    let log_p = log_probs(&teacher, std::slice::from_ref(&text));
    let of_position = |(at, log_p): (usize, Vec<f64>)| {
        Some(Position::new(log_p, &states[at], &head, *text.get(at + 1)?))
    };
    let all = log_p.into_iter().enumerate().filter_map(of_position);
    let mut all: Vec<Position> = all.collect();
    all.sort_by(|a, b| a.entropy().total_cmp(&b.entropy()));
    let sixth = all.len() / 6;
    let positions = all.into_iter().skip(sixth / 2).step_by(sixth).take(6);
    Setup::new("stories260K", student.head(), positions.collect())
}

fn drawn(log_p: &[f64], rng: &mut ChaCha8Rng) -> u32 {
    let mut left: f64 = rng.random();
    let place = log_p.iter().position(|l| {
        left -= l.exp();
        left < 0.0
    });
    place.unwrap_or(0) as u32
}

/// Computes the hidden states of a text, [t][d].
fn hidden(model: &Decoder, text: &[u32]) -> Vec<Vec<f64>> {
    let ids: Vec<i32> = text.iter().map(|id| *id as i32).collect();
    let data = TensorData::new(ids, [1, text.len()]);
    let hidden = model.hidden(Tensor::<2, Int>::from_data(
        data,
        (&model.device(), DType::I32),
    ));
    let d = hidden.dims()[2];
    numbers(hidden)
        .chunks_exact(d)
        .map(<[f64]>::to_vec)
        .collect()
}

/// Random states and a random head; the teacher's logits are the student's logits with noise.
pub(super) fn made_up() -> Setup {
    const V: usize = 512;
    const D: usize = 32;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut random = |n: usize, spread: f64| -> Vec<f64> {
        (0..n).map(|_| rng.random_range(-spread..spread)).collect()
    };
    let head = random(V * D, 0.5);
    let positions = [0.5, 1.0, 2.0, 4.0].map(|spread| {
        let hidden = random(D, spread);
        let noise = random(V, 1.0);
        let student = Position::new(Vec::new(), &hidden, &head, 0);
        let teacher: Vec<f64> = student
            .logits
            .iter()
            .zip(noise)
            .map(|(s, e)| s + e)
            .collect();
        let target_token = (random(1, 1.0)[0] + 1.0) * (V / 2) as f64;
        Position {
            log_p: log_softmax(&teacher),
            target_token: target_token as u32,
            ..student
        }
    });
    let rows = head.chunks_exact(D).map(<[f64]>::to_vec).collect();
    Setup::new("made up", constant(&rows), positions.into())
}
