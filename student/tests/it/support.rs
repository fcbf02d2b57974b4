//! Models and signals that the tests share.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::{Signal, SignalRow};
use potstill_model::{Config, Decoder, Parameter, ParameterName, TensorOperation};
use potstill_student::{
    Arm, Error, Form, Gradients, Objective, Overlong, StepMetrics, TrainSettings, TrainingInputs,
    TrainingPlan, TrainingResult, train,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Returns a file or folder below `POTSTILL_REAL`; without it, prints that the test is skipped.
pub(crate) fn real(path: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return None;
    };
    let path = PathBuf::from(root).join(path);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

pub(crate) fn settings() -> TrainSettings {
    TrainSettings {
        steps: Some(6),
        batch: 4,
        micro_batch: 2,
        packing: false,
        learning_rate: Some(1e-2),
        warmup: 2.0,
        min_learning_rate: 0.0,
        weight_decay: 0.01,
        clip: 1.0,
        objective: Objective::mixed(0.7, 0.3),
        form: Form::Fused,
        max_length: 64,
        overlong: Overlong::Drop,
        checkpoint_every: 2,
        chunk_rows: 7,
        seed: 5,
        ..TrainSettings::default()
    }
}

/// Trains at the learning rate of the settings, breaks after the step `stop_at`, and also returns the metrics of the steps.
pub(crate) fn train_on(
    start: Decoder,
    data: &[Signal],
    arm: Arm,
    settings: &TrainSettings,
    dir: &Path,
    stop_at: u64,
) -> (Result<TrainingResult, Error>, Vec<StepMetrics>) {
    let mut steps = Vec::new();
    let mut on_step = |metrics: &StepMetrics| {
        steps.push(metrics.clone());
        match metrics.step == stop_at {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let result = train(
        start,
        TrainingInputs {
            len: data.len(),
            row: &mut |index: usize| Ok(data[index].clone()),
            lengths: None,
            dev: None,
            collective: None,
            on_step: &mut on_step,
        },
        &TrainingPlan {
            arm,
            settings,
            schedule: settings.schedule(data.len(), settings.learning_rate.unwrap()),
        },
        dir,
    );
    (result, steps)
}

/// A random model of two layers with grouped queries, a tied head and 47 tokens.
pub(crate) fn tiny(dtype: DType) -> Decoder {
    tiny_with_rows(dtype, 47)
}

/// The same with another number of rows of the embedding.
pub(crate) fn tiny_with_rows(dtype: DType, rows: usize) -> Decoder {
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2}"#;
    let config = config.replace("ROWS", &rows.to_string());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    let config = Config::from_dir(dir.path()).unwrap();
    let model = Decoder::init(&config, 3, dtype, &Device::flex()).unwrap();
    // With weights of standard deviation 0.02 all distributions are nearly uniform; larger weights test more.
    scaled(model, 15.0)
}

/// Replaces the first rows of the embedding by those of `source`, and all other parameters by those of `source`.
pub(crate) fn with_parameters_of(model: Decoder, source: &Decoder) -> Decoder {
    struct Copy(std::collections::BTreeMap<String, Parameter>);
    impl potstill_model::MapParameters for Copy {
        fn map<const D: usize>(&mut self, name: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            let Some(from) = self.0.remove(&name.name) else {
                return tensor;
            };
            let from: Tensor<D> = from.tensor().unwrap();
            let rows = from.dims()[0];
            match tensor.dims()[0] - rows {
                0 => from,
                rest => Tensor::cat(vec![from, tensor.narrow(0, rows, rest)], 0),
            }
        }
    }
    let parameters = potstill_model::named_parameters(source).into_iter();
    let parameters = parameters.map(|(name, parameter)| (name.name, parameter));
    potstill_model::map_parameters(model, &mut Copy(parameters.collect()))
}

/// Multiplies all weight matrices by a factor.
pub(crate) fn scaled(model: Decoder, factor: f64) -> Decoder {
    struct Scale(f64);
    impl potstill_model::MapParameters for Scale {
        fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            if D == 2 { tensor * self.0 } else { tensor }
        }
    }
    potstill_model::map_parameters(model, &mut Scale(factor))
}

/// Signals with ragged lengths, masks and supports; each is a valid coarse distribution.
pub(crate) fn signals(count: usize, vocab: u32, seed: u64) -> Vec<Signal> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|i| signal(i, vocab, &mut rng)).collect()
}

fn signal(index: usize, vocab: u32, rng: &mut ChaCha8Rng) -> Signal {
    let len = rng.random_range(5..24);
    let token_ids: Vec<u32> = (0..len).map(|_| rng.random_range(0..vocab)).collect();
    let prompt = rng.random_range(1..len - 2);
    let loss_mask: Vec<bool> = (0..len).map(|t| t >= prompt).collect();
    let rows = (prompt..len)
        .map(|t| row(token_ids[t], vocab, rng))
        .collect();
    Signal {
        prompt_id: format!("p{index}"),
        sample_index: 0,
        token_ids,
        loss_mask,
        rows,
        provenance: 0,
    }
}

fn row(target_token: u32, vocab: u32, rng: &mut ChaCha8Rng) -> SignalRow {
    let mut ids = vec![target_token];
    while ids.len() < 3 + (target_token as usize % 4) {
        let id = rng.random_range(0..vocab);
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    let weights: Vec<f64> = ids.iter().map(|_| rng.random_range(0.1..1.0)).collect();
    let tail = rng.random_range(0.05..0.5);
    let total: f64 = weights.iter().sum::<f64>() + tail;
    let mut pairs: Vec<(f32, u32)> = weights
        .iter()
        .zip(&ids)
        .map(|(w, &id)| ((w / total).ln() as f32, id))
        .collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    SignalRow {
        ids: pairs.iter().map(|pair| pair.1).collect(),
        logprobs: pairs.iter().map(|pair| pair.0).collect(),
        tail_logprob: (tail / total).ln() as f32,
        entropy: 1.0,
        log_z_at: Vec::new(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    }
}

/// Computes log-probabilities [n][v] of a model over each position of sequences of equal length, in f64.
pub(crate) fn log_probs(model: &Decoder, sequences: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let t = sequences[0].len();
    let ids: Vec<i32> = sequences.iter().flatten().map(|&id| id as i32).collect();
    let ids_bt = Tensor::<2, Int>::from_data(
        TensorData::new(ids, [sequences.len(), t]),
        (&model.device(), DType::I32),
    );
    let hidden_btd = model.hidden(ids_bt);
    let [b, t, d] = hidden_btd.dims();
    let logits_nv = model.logits(hidden_btd.reshape([b * t, d]));
    let [_, v] = logits_nv.dims();
    let logits: Vec<f64> = logits_nv.into_data().iter::<f64>().collect();
    let normalised = |row: &[f64]| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_z = max + row.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        row.iter().map(|z| z - log_z).collect()
    };
    logits.chunks(v).map(normalised).collect()
}

/// Creates a row with the k likeliest tokens as support and the rest as tail.
pub(crate) fn top_k(log_p: &[f64], k: usize) -> SignalRow {
    let mut ids: Vec<u32> = (0..log_p.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        log_p[b as usize]
            .total_cmp(&log_p[a as usize])
            .then(a.cmp(&b))
    });
    let tail: f64 = ids[k..].iter().map(|&id| log_p[id as usize].exp()).sum();
    ids.truncate(k);
    SignalRow {
        logprobs: ids.iter().map(|&id| log_p[id as usize] as f32).collect(),
        ids,
        tail_logprob: tail.ln() as f32,
        entropy: 1.0,
        log_z_at: Vec::new(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    }
}

pub(crate) fn flat(gradients: &Gradients) -> Vec<f64> {
    gradients.values().flat_map(numbers).collect()
}

/// Returns the values of a parameter.
pub(crate) fn numbers(parameter: &Parameter) -> Vec<f64> {
    let data = parameter.clone().try_into_data().unwrap();
    data.iter::<f64>().collect()
}

/// Returns the bits of all parameters, in order.
pub(crate) fn bits(model: &Decoder) -> Vec<u32> {
    let parameters = potstill_model::named_parameters(model);
    let values = parameters
        .iter()
        .flat_map(|(_, parameter)| numbers(parameter));
    values.map(|value| (value as f32).to_bits()).collect()
}

/// Multiplies a parameter by a factor.
pub(crate) fn times(parameter: Parameter, factor: f64) -> Parameter {
    struct Times(f64);
    impl TensorOperation for Times {
        type Output = Parameter;
        fn apply<const D: usize>(self, tensor: Tensor<D>) -> Parameter {
            Parameter::new(tensor * self.0)
        }
    }
    parameter.apply(Times(factor))
}

/// Computes ‖a − b‖ / ‖b‖.
pub(crate) fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut a.iter().zip(b).map(|(x, y)| x - y)) / norm(&mut b.iter().copied())
}
