//! Potstill's measurement of the loss alone: from hidden states and head to the loss and both gradients,
//! the three products by themselves, and the kernels' passes over one chunk of logits.
//!
//! The inputs come from a formula in integers that `benches/peer.py` evaluates too. Both implementations
//! start from the same bits without sending tensors of this size.

use std::ops::Range;
use std::time::Instant;

use anyhow::Context as _;
use potstill::kernels::{
    LogQSum, LogitTransform, RowStats, linear, linear_input_gradient, linear_into,
    linear_weight_gradient_f32, row_gradient, row_stats, trim_heap,
};
use potstill::model::{DType, Device, Int, Tensor, TensorData, device};
use potstill::student::{Form, HeadGradient, HeadLossOptions, head_loss, loss::forward_kl};
use rayon::prelude::*;

use super::inputs::{dtype, loss_form, wait};
use crate::machine::{reset_peak, resident_bytes};
use crate::request::{LossShape, MeasurementReply, MeasurementRequest};

/// Standard deviation of the logits. The hidden states have a standard deviation of 1.
const SPREAD: f64 = 2.5;
/// First indices of the states, the head and the support in the sequence of numbers.
const SEEDS: [u64; 3] = [1_000_000_007, 1_300_000_033, 1_700_000_009];
/// The modulus of the formula, 2³¹ − 1.
const PRIME: u64 = (1 << 31) - 1;
/// Number of measured passes over one chunk; the fastest counts.
const CALLS: usize = 5;

/// Measures the whole loss and its products in turn, in seconds, and the peak memory of one evaluation.
///
/// # Errors
/// When the device does not run, or does not finish its work.
pub(crate) fn loss(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let case = LossCase::new(request)?;
    // The first warm-up gives the numbers that are compared.
    let check = case.check()?;
    for _ in 1..request.warm_up {
        case.run()?;
    }
    let above_bytes = case.most_above()?;
    let (mut seconds, mut products) = (Vec::new(), Vec::new());
    while seconds.len() < request.repetitions {
        seconds.push(timed(|| case.run().map(drop))?);
        products.push(timed(|| case.products())?);
        if seconds.iter().sum::<f64>() > request.budget_s && seconds.len() >= 2 {
            break;
        }
    }
    let reserved = "memory is what the allocator reserved for one evaluation, including what it keeps afterwards";
    Ok(MeasurementReply {
        seconds,
        products,
        check,
        note: match case.device.memory_pool_usage() {
            Some(_) => reserved.to_owned(),
            None => String::new(),
        },
        above_bytes,
        parts: case.passes()?,
        ..MeasurementReply::default()
    })
}

/// Measures the memory of one evaluation in a fresh process.
///
/// # Errors
/// Those of [`loss`].
pub(crate) fn loss_memory(request: &MeasurementRequest) -> anyhow::Result<MeasurementReply> {
    let case = LossCase::new(request)?;
    let began = Instant::now();
    let above_bytes = case.most_above()?;
    Ok(MeasurementReply {
        seconds: vec![began.elapsed().as_secs_f64()],
        above_bytes,
        ..MeasurementReply::default()
    })
}

/// Inputs of the loss.
struct LossCase {
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    /// Log-probabilities [n, k+1], nats, the tail last.
    log_p_nk: Tensor<2>,
    shape: LossShape,
    form: Form,
    device: Device,
}

impl LossCase {
    fn new(request: &MeasurementRequest) -> anyhow::Result<LossCase> {
        let device = device(&request.device)?;
        let (shape, dtype) = (request.loss, dtype(request));
        let (n, d) = (shape.rows, shape.width);
        let root = 12f64.sqrt();
        let head_scale = SPREAD * (12.0 / d as f64).sqrt();
        let log_p = request
            .logprobs
            .first()
            .context("the request has no log-probabilities")?;
        let mass: f64 = log_p.iter().map(|log| f64::from(*log).exp()).sum();
        let mut log_p = log_p.clone();
        log_p.push((1.0 - mass).ln() as f32);
        let k = log_p.len() - 1;
        let support = TensorData::new(support(n, k, shape.vocab), [n, k]);
        let log_p = TensorData::new(log_p.repeat(n), [n, k + 1]);
        Ok(LossCase {
            hidden_nd: numbers([n, d], SEEDS[0], root, dtype, &device),
            head_vd: numbers([shape.vocab, d], SEEDS[1], head_scale, dtype, &device),
            support_nk: Tensor::from_data(support, &device),
            log_p_nk: Tensor::from_data(log_p, (&device, DType::F32)),
            shape,
            form: loss_form(request),
            device,
        })
    }

    /// Computes the mean forward KL over the rows, with a tail bucket, and its gradients.
    fn run(&self) -> anyhow::Result<(Tensor<1>, HeadGradient)> {
        let heads = [LogitTransform::default()];
        let options = HeadLossOptions {
            heads: &heads,
            sum: LogQSum::Omitted,
            train_head: true,
            chunk_rows: self.shape.chunk_rows,
            form: self.form,
        };
        let mut values = Vec::new();
        let share = 1.0 / self.shape.rows as f64;
        let mut divergence = |rows: Range<usize>, stats: &[RowStats]| {
            let log_q_nk = stats[0].log_q_nk();
            let kl = forward_kl(self.log_p_nk.clone().slice(rows), log_q_nk).sum() * share;
            values.push(kl.clone().inner());
            kl
        };
        let [hidden_nd, head_vd] = [&self.hidden_nd, &self.head_vd].map(Tensor::clone);
        let support_nk = self.support_nk.clone();
        let gradient = head_loss(hidden_nd, head_vd, support_nk, &options, &mut divergence);
        wait(&self.device)?;
        Ok((Tensor::cat(values, 0).sum(), gradient))
    }

    /// Numbers to compare: the loss, both gradients' norms, and some entries of each gradient in units of
    /// its root mean square.
    fn check(&self) -> anyhow::Result<Vec<f64>> {
        let (loss, gradient) = self.run()?;
        let head_vd = gradient.head_vd.context("the head has no gradient")?;
        let root = (self.shape.rows as f64).sqrt();
        let mut check = vec![value(loss)];
        // Rows on the teacher's support, where the gradient of the head is large.
        let some = 0..self.shape.rows.min(4);
        let ids = self
            .support_nk
            .clone()
            .slice([some.clone(), 0..1])
            .into_data();
        let first: Vec<usize> = ids.iter::<i64>().map(|id| id as usize).collect();
        for (gradient, rows) in [(gradient.hidden_nd, some.collect()), (head_vd, first)] {
            let [rows_of, columns] = gradient.dims();
            // Squares are summed by row first: one f32 sum over all entries would lose digits.
            let squares = gradient.clone().cast(DType::F32).square().sum_dim(1);
            let norm = squares.into_data().iter::<f64>().sum::<f64>().sqrt();
            check.push(norm * root);
            let unit = norm / ((rows_of * columns) as f64).sqrt();
            for row in rows {
                let entry = gradient.clone().slice([row..row + 1, 0..1]);
                check.push(value(entry.reshape([1])) / unit);
            }
        }
        Ok(check)
    }

    /// Most bytes of one evaluation beyond its inputs and gradients. On a GPU: what the allocator reserved
    /// in addition, which also contains what it keeps for later.
    fn most_above(&self) -> anyhow::Result<Option<u64>> {
        trim_heap();
        self.device.memory_cleanup();
        wait(&self.device)?;
        let reserved = || self.device.memory_pool_usage().map(|u| u.bytes_reserved);
        let (before, counted) = match reserved() {
            Some(bytes) => (Some(bytes), true),
            None => (resident_bytes().0, reset_peak()),
        };
        let (_, gradient) = self.run()?;
        let most = reserved().or(resident_bytes().1).filter(|_| counted);
        let size = |tensor: &Tensor<2>| {
            (tensor.dims().iter().product::<usize>() * tensor.dtype().size()) as u64
        };
        let gradients = size(&gradient.hidden_nd) + gradient.head_vd.as_ref().map_or(0, size);
        let above = |(most, before): (u64, u64)| most.saturating_sub(before + gradients);
        Ok(most.zip(before).map(above))
    }

    /// Computes the three products of each chunk.
    fn products(&self) -> anyhow::Result<()> {
        let n = self.shape.rows;
        let (mut sum_vd, mut block_nv) = (None, None);
        for start in (0..n).step_by(self.shape.chunk_rows) {
            let rows = start..n.min(start + self.shape.chunk_rows);
            let chunk_nd = self.hidden_nd.clone().slice(rows);
            let head_vd = self.head_vd.clone();
            let logits_nv = linear_into(block_nv.take(), chunk_nd.clone(), head_vd.clone());
            drop(linear_input_gradient(logits_nv.clone(), head_vd));
            let gradient_vd = linear_weight_gradient_f32(logits_nv.clone(), chunk_nd, sum_vd);
            (sum_vd, block_nv) = (Some(gradient_vd), Some(logits_nv));
        }
        wait(&self.device)
    }

    /// Seconds of each kernel on one chunk of logits. On a GPU, where memory limits both, also those of a
    /// pass that reads and writes as much as a copy: a negation, since burn's clone shares memory.
    fn passes(&self) -> anyhow::Result<Vec<(String, f64)>> {
        let rows = 0..self.shape.rows.min(self.shape.chunk_rows);
        let support_nk = self.support_nk.clone().slice(rows.clone());
        let chunk_nd = self.hidden_nd.clone().slice(rows);
        let head = LogitTransform::default();
        let mut parts = vec![("statistics", f64::INFINITY), ("gradient", f64::INFINITY)];
        if self.device.memory_pool_usage().is_some() {
            parts.push(("copy", f64::INFINITY));
        }
        for _ in 0..CALLS {
            let logits_nv = linear(chunk_nd.clone(), self.head_vd.clone());
            wait(&self.device)?;
            let mut stats = None;
            let forward = timed(|| {
                let support_nk = support_nk.clone();
                stats = Some(row_stats(
                    logits_nv.clone(),
                    support_nk,
                    &head,
                    LogQSum::Omitted,
                ));
                wait(&self.device)
            })?;
            let copy = match parts.len() {
                2 => f64::INFINITY,
                _ => timed(|| {
                    drop(-logits_nv.clone());
                    wait(&self.device)
                })?,
            };
            let stats = stats.context("the kernel did not run")?;
            let gradient = stats.all();
            let backward = timed(|| {
                let support_nk = support_nk.clone();
                drop(row_gradient(logits_nv, support_nk, &stats, gradient, &head));
                wait(&self.device)
            })?;
            for ((_, least), seconds) in parts.iter_mut().zip([forward, backward, copy]) {
                *least = least.min(seconds);
            }
        }
        let named = parts.into_iter();
        Ok(named
            .map(|(name, seconds)| (name.to_owned(), seconds))
            .collect())
    }
}

fn timed(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64())
}

fn value(scalar: Tensor<1>) -> f64 {
    scalar.into_data().iter::<f64>().next().unwrap_or(f64::NAN)
}

/// The cube of a number's index, modulo a prime.
fn hashed(index: u64, seed: u64) -> u64 {
    let x = (index + seed) % PRIME;
    x * x % PRIME * x % PRIME
}

/// Uniformly distributed numbers between −`scale`/2 and `scale`/2.
fn numbers(
    [rows, columns]: [usize; 2],
    seed: u64,
    scale: f64,
    dtype: DType,
    device: &Device,
) -> Tensor<2> {
    let number = |index: usize| {
        let share = hashed(index as u64, seed) as f64 / PRIME as f64;
        ((share - 0.5) * scale) as f32
    };
    let values: Vec<f32> = (0..rows * columns).into_par_iter().map(number).collect();
    let data = TensorData::new(values, [rows, columns]);
    Tensor::from_data(data, (device, dtype))
}

/// `k` token ids for each row, all different and evenly spaced.
fn support(n: usize, k: usize, v: usize) -> Vec<i32> {
    let stride = v / (k + 1);
    let row = |row: usize| {
        let first = hashed(row as u64, SEEDS[2]) as usize % v;
        (0..k).map(move |slot| ((first + slot * stride) % v) as i32)
    };
    (0..n).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Implementation;
    use crate::request::tests::loss_request;

    /// The expected numbers are those of `benches/peer.py`, computed with Python's integers:
    /// `x = 1_000_000_007 + i; x**3 % (2**31 - 1)`.
    #[test]
    fn numbers_are_those_of_the_peer() {
        let found: Vec<u64> = (0..3).map(|i| hashed(i, SEEDS[0])).collect();
        assert_eq!(found, [1_887_548_037, 875_003_258, 1_567_491_233]);
    }

    #[test]
    fn logits_have_the_documented_spread_and_chunks_do_not_matter() {
        let request = loss_request();
        let case = LossCase::new(&request).unwrap();
        let logits_nv = linear(case.hidden_nd.clone(), case.head_vd.clone());
        let spread = value(logits_nv.square().mean()).sqrt();
        assert!((spread - SPREAD).abs() < 0.1, "{spread}");
        // Chunks of 7 rows give the same as all rows at once.
        let plain = MeasurementRequest {
            implementation: Implementation::Plain,
            ..request
        };
        let fused = case.check().unwrap();
        let plain = LossCase::new(&plain).unwrap().check().unwrap();
        for (a, b) in fused.iter().zip(&plain) {
            let difference = (a - b).abs();
            assert!(difference < 1e-4 * b.abs().max(1.0), "{fused:?} {plain:?}");
        }
    }

    #[test]
    fn tokens_of_a_row_are_unique() {
        for (k, v) in [(1, 2), (4, 9), (64, 49_152)] {
            for row in support(20, k, v).chunks(k) {
                let mut unique = row.to_vec();
                unique.sort_unstable();
                unique.dedup();
                assert_eq!(unique.len(), k);
                assert!(unique.iter().all(|id| (0..v as i32).contains(id)));
            }
        }
    }
}
