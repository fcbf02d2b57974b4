//! Cases to check a loss on: a small random model with generated signals, or a run's own student and signals.

use burn::tensor::{DType, Device, Tensor};
use potstill_datasets::{Signal, SignalRow};
use potstill_model::{Config, Decoder, MapParameters, ParameterName, map_parameters};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::error::Error;

/// A student and a global batch.
#[derive(Debug, Clone)]
pub struct LossCase {
    /// Student in f32, on the CPU.
    pub model: Decoder,
    /// The same student in f32, on the device whose kernels are checked.
    pub on_device: Decoder,
    /// Global batch. If the temperature is not 1, `log_z_at` of each row holds one number, its normaliser.
    pub signals: Vec<Signal>,
    /// Number of parameters that finite differences are computed for.
    pub parameters: usize,
}

/// Vocabulary size of the random model.
const VOCAB: usize = 47;
/// Number of tail draws of each generated row.
const DRAWS: u32 = 6;

impl LossCase {
    /// Creates a model of two layers with grouped queries, a tied head and 47 tokens, and five sequences of
    /// different lengths, masks and supports, with draws and the normaliser for `temperature`. Every call returns
    /// the same case.
    ///
    /// # Errors
    /// If the device does not support f32.
    pub fn random(temperature: f64, device: &Device) -> Result<Self, Error> {
        Self::of_model(small(), temperature, device)
    }

    /// Creates the same with a model whose logits have a softcap, and whose embedding has six rows of padding: a small
    /// Gemma 2.
    ///
    /// # Errors
    /// If the device does not support f32.
    pub fn softcapped(temperature: f64, device: &Device) -> Result<Self, Error> {
        let mut keys = small();
        let capped = json!({
            "model_type": "gemma2",
            "vocab_size": VOCAB + 6,
            "sliding_window": 8,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        });
        for (key, value) in capped.as_object().into_iter().flatten() {
            keys[key] = value.clone();
        }
        Self::of_model(keys, temperature, device)
    }

    /// Creates a case with a random model of this configuration.
    fn of_model(keys: Value, temperature: f64, device: &Device) -> Result<Self, Error> {
        let mut random = ChaCha8Rng::seed_from_u64(17);
        let config = Config::from_json(&keys)?;
        let model = |device: &Device| -> Result<Decoder, Error> {
            let model = Decoder::init(&config, 3, DType::F32, device)?;
            Ok(map_parameters(model, &mut Larger).with_token_count(VOCAB))
        };
        Ok(Self {
            model: model(&Device::flex())?,
            on_device: model(device)?,
            signals: (0..5)
                .map(|index| signal(index, temperature, &mut random))
                .collect(),
            parameters: usize::MAX,
        })
    }
}

/// The configuration of the random model.
fn small() -> Value {
    json!({
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": [2],
    })
}

/// Multiplies weight matrices: with weights of standard deviation 0.02 all distributions are nearly uniform, and larger
/// weights test more.
struct Larger;

impl MapParameters for Larger {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if D == 2 { tensor * 15.0 } else { tensor }
    }
}

fn signal(index: usize, temperature: f64, random: &mut ChaCha8Rng) -> Signal {
    let len = random.random_range(6..24);
    let token_ids: Vec<u32> = (0..len)
        .map(|_| random.random_range(0..VOCAB as u32))
        .collect();
    let prompt = random.random_range(1..len - 2);
    // One token of the answer carries no loss, as between two turns of a conversation.
    let hole = random.random_range(prompt..len);
    let loss_mask: Vec<bool> = (0..len).map(|t| t >= prompt && t != hole).collect();
    let loss_positions = (1..len).filter(|t| loss_mask[*t]);
    let rows = loss_positions.map(|t| row(token_ids[t], temperature, random));
    Signal {
        prompt_id: format!("check-{index}"),
        sample_index: 0,
        rows: rows.collect(),
        token_ids,
        loss_mask,
        provenance: 0,
    }
}

/// Generates a row from a random distribution over the vocabulary: a few of the likeliest tokens, the target
/// token, the tail's mass, and draws from the tail.
fn row(target_token: u32, temperature: f64, random: &mut ChaCha8Rng) -> SignalRow {
    let scores: Vec<f64> = (0..VOCAB).map(|_| random.random_range(-3.0..3.0)).collect();
    let log_z = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
    let log_p: Vec<f64> = scores.iter().map(|s| s - log_z).collect();
    let mut order: Vec<u32> = (0..VOCAB as u32).collect();
    order.sort_by(|a, b| log_p[*b as usize].total_cmp(&log_p[*a as usize]));
    let k = random.random_range(2..7);
    let kept = |(rank, id): &(usize, u32)| *rank < k || *id == target_token;
    let ids: Vec<u32> = (order.iter().copied().enumerate())
        .filter(kept)
        .map(|(_, id)| id)
        .collect();
    let outside: Vec<u32> = (0..VOCAB as u32).filter(|id| !ids.contains(id)).collect();
    let tail: f64 = outside.iter().map(|id| log_p[*id as usize].exp()).sum();
    let mut counts = vec![0u32; outside.len()];
    for _ in 0..DRAWS {
        let point = random.random_range(0.0..tail);
        let mut below = 0.0;
        let drawn = outside.iter().position(|id| {
            below += log_p[*id as usize].exp();
            point < below
        });
        counts[drawn.unwrap_or(outside.len() - 1)] += 1;
    }
    let drawn = || outside.iter().zip(&counts).filter(|(_, count)| **count > 0);
    let at: f64 = log_p.iter().map(|l| (l / temperature).exp()).sum();
    SignalRow {
        logprobs: ids.iter().map(|id| log_p[*id as usize] as f32).collect(),
        ids,
        tail_logprob: tail.ln() as f32,
        entropy: log_p.iter().map(|l| -l.exp() * l).sum::<f64>() as f32,
        log_z_at: vec![Some(at.ln() as f32)],
        draw_ids: drawn().map(|(id, _)| *id).collect(),
        draw_counts: drawn().map(|(_, count)| *count).collect(),
    }
}
