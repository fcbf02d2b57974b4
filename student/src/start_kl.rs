//! The distance between a teacher and the model that training starts from, before anything is collected.

use burn::tensor::{DType, Int, Tensor, TensorData};
use potstill_model::Decoder;

/// Rows of logits that are in memory at a time.
const CHUNK_ROWS: usize = 64;

/// Mean divergences from the teacher over the positions of a few texts, nats per token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StartKl {
    /// KL(teacher ‖ start) over the whole vocabulary.
    pub start: f64,
    /// KL(teacher ‖ uniform): log V minus the teacher's entropy.
    pub uniform: f64,
    /// Number of positions.
    pub tokens: usize,
}

/// Measures the distributions of the next token at every position of `texts`, which are token ids. The sums are in f64.
/// Returns `None` if there are no tokens.
///
/// The caller ensures that both models have the same tokens, and that each text fits into their contexts.
#[must_use]
pub fn start_kl(teacher: &Decoder, start: &Decoder, texts: &[Vec<u32>]) -> Option<StartKl> {
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let ids: Vec<i32> = texts.concat().iter().map(|&id| id as i32).collect();
    let tokens = ids.len();
    if tokens == 0 {
        return None;
    }
    let hidden_nd = |model: &Decoder| {
        let data = TensorData::new(ids.clone(), [1, tokens]);
        let ids_bt = Tensor::<2, Int>::from_data(data, (&model.device(), DType::I32));
        model.hidden_from(model.embedded(ids_bt), &lengths)
    };
    let (teacher_nd, start_nd) = (hidden_nd(teacher), hidden_nd(start));
    let vocabulary = teacher.token_count();
    let (mut start_sum, mut uniform_sum) = (0.0, 0.0);
    for first in (0..tokens).step_by(CHUNK_ROWS) {
        let rows = first..tokens.min(first + CHUNK_ROWS);
        let log_p = log_softmax(&teacher.logits(teacher_nd.clone().slice(rows.clone())));
        let log_q = log_softmax(&start.logits(start_nd.clone().slice(rows)));
        for (log_p, log_q) in log_p.iter().zip(&log_q) {
            for (log_p, log_q) in log_p.iter().zip(log_q) {
                let p = log_p.exp();
                start_sum += p * (log_p - log_q);
                uniform_sum += p * (log_p + (vocabulary as f64).ln());
            }
        }
    }
    Some(StartKl {
        start: start_sum / tokens as f64,
        uniform: uniform_sum / tokens as f64,
        tokens,
    })
}

/// Log-probabilities of each row.
fn log_softmax(logits_nv: &Tensor<2>) -> Vec<Vec<f64>> {
    let [_, v] = logits_nv.dims();
    let logits: Vec<f64> = logits_nv.to_data().iter::<f64>().collect();
    let normalised = |row: &[f64]| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_z = max + row.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        row.iter().map(|z| z - log_z).collect()
    };
    logits.chunks(v).map(normalised).collect()
}

#[cfg(test)]
mod tests {
    use potstill_model::{Config, Device};
    use serde_json::json;

    use super::*;

    fn model(seed: u64) -> Decoder {
        let config = Config::from_json(&json!({
        "model_type": "llama",
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 48,
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": [2]
        }))
        .unwrap();
        Decoder::init(&config, seed, DType::F32, &Device::flex()).unwrap()
    }

    /// Log-probabilities of each position of one text, which is run by itself.
    fn alone(model: &Decoder, text: &[u32]) -> Vec<Vec<f64>> {
        let ids: Vec<i32> = text.iter().map(|&id| id as i32).collect();
        let data = TensorData::new(ids, [1, text.len()]);
        let ids_bt = Tensor::<2, Int>::from_data(data, (&model.device(), DType::I32));
        let hidden_btd = model.hidden(ids_bt);
        log_softmax(&model.logits(hidden_btd.reshape([text.len(), 16])))
    }

    #[test]
    fn packed_texts_have_the_divergence_that_each_has_alone() {
        let (teacher, start) = (model(1), model(2));
        let texts = vec![vec![1, 5, 9, 30, 2, 7], vec![4], vec![36, 0, 12]];
        let found = start_kl(&teacher, &start, &texts).unwrap();
        let (mut kl, mut entropy) = (0.0, 0.0);
        for text in &texts {
            for (p, q) in alone(&teacher, text).iter().zip(alone(&start, text)) {
                kl += (0..37).map(|v| p[v].exp() * (p[v] - q[v])).sum::<f64>();
                entropy -= (0..37).map(|v| p[v].exp() * p[v]).sum::<f64>();
            }
        }
        assert_eq!(found.tokens, 10);
        assert!(kl > 1e-3 && (found.start - kl / 10.0).abs() < 1e-6, "{kl}");
        assert!((found.uniform - (37f64.ln() - entropy / 10.0)).abs() < 1e-6);
        let same = start_kl(&teacher, &teacher, &texts).unwrap();
        assert!(same.start.abs() < 1e-12 && same.uniform == found.uniform);
        assert_eq!(start_kl(&teacher, &start, &[]), None);
    }
}
