//! Comparison with PyTorch: `ref/kd.json` below `POTSTILL_REAL` (SmolLM2-135M as teacher, its layers
//! 0, 2, …, 28 as student, GSM8K text, f32).

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::{Signal, SignalRow};
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, row_stats};
use potstill_model::Decoder;
use potstill_student::loss::{Divergence, Tail, cross_entropy};
use potstill_student::{
    Arm, DecayedRole, Gradients, Objective, Optimizer, Target, TrainSettings, batch_gradient,
    clip_global_norm,
};
use serde_json::Value;

use crate::gradients::check_masked;
use crate::support::{log_probs, real, settings, top_k};

struct Reference {
    json: Value,
    teacher: Decoder,
    student: Decoder,
}

fn reference() -> Option<Reference> {
    let json = real("ref/kd.json")?;
    let dir = real("models/SmolLM2-135M-Instruct/model.safetensors")?;
    let json = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let teacher = potstill_model::load(dir.parent().unwrap(), DType::F32, &Device::flex()).unwrap();
    let student =
        potstill_model::prune_layers(&teacher, &(0..30).step_by(2).collect::<Vec<_>>()).unwrap();
    Some(Reference {
        json,
        teacher,
        student,
    })
}

impl Reference {
    fn batch(&self, step: usize) -> Vec<Vec<u32>> {
        serde_json::from_value(self.json["batch_ids"][step].clone()).unwrap()
    }
}

fn check(name: &str, got: f64, want: &Value, tolerance: f64) {
    let want = want.as_f64().unwrap();
    let error = (got - want).abs() / want.abs();
    println!("{name}: {got:.6}, PyTorch {want:.6}, relative {error:.1e}");
    assert!(error <= tolerance, "{name}: {got} against {want}");
}

/// Computes the mean over rows of the objective's divergence, and the norm of its gradient at the logits.
fn at_logits(logits_nv: &Tensor<2>, rows: &[SignalRow], objective: &Objective) -> (f64, f64) {
    let leaf_nv = Tensor::from_inner(logits_nv.clone()).require_grad();
    let (n, k) = (rows.len(), rows[0].ids.len());
    let ids: Vec<i32> = rows
        .iter()
        .flat_map(|row| &row.ids)
        .map(|&id| id as i32)
        .collect();
    let signal = Signal {
        prompt_id: String::new(),
        sample_index: 0,
        token_ids: std::iter::once(0)
            .chain(rows.iter().map(|row| row.ids[0]))
            .collect(),
        loss_mask: (0..=n).map(|t| t > 0).collect(),
        rows: rows.iter().cloned().collect(),
        provenance: 0,
    };
    let (target, _) = Target::new(&signal, objective.tail, objective.temperature).unwrap();
    let log_p: Vec<f64> = target
        .rows
        .iter()
        .flat_map(|row| row.p.iter().copied().chain([row.tail]))
        .map(|p| p.ln().max(EMPTY_NATS))
        .collect();
    let device = leaf_nv.device();
    let log_p_nk =
        Tensor::<2>::from_data(TensorData::new(log_p, [n, k + 1]), (&device, DType::F32));
    let support_nk =
        Tensor::<2, Int>::from_data(TensorData::new(ids, [n, k]), (&device, DType::I32));
    let head = LogitTransform {
        temperature: objective.temperature,
        ..LogitTransform::default()
    };
    let stats = row_stats(leaf_nv.clone(), support_nk, &head, LogQSum::Omitted);
    let (log_p_nk, log_q_nk) = objective.tail.apply(log_p_nk, stats.log_q_nk());
    let rows_n = objective.divergences()[0]
        .divergence
        .rows(log_p_nk, log_q_nk);
    finish(rows_n.sum() / n as f64, &leaf_nv)
}

/// Creates a row of the k likeliest tokens with the normaliser for temperature `t`.
fn stored(log_p: &[f64], k: usize, t: f64) -> SignalRow {
    let z: f64 = log_p.iter().map(|l| (l / t).exp()).sum();
    SignalRow {
        log_z_at: vec![Some(z.ln() as f32)],
        ..top_k(log_p, k)
    }
}

/// Losses computed by PyTorch and TRL: name, k (0 for the whole vocabulary), temperature, divergence, tail.
fn reference_losses() -> Vec<(&'static str, usize, f64, Divergence, Tail)> {
    use Divergence::{ForwardKl, Jsd, ReverseKl, SkewKl, SkewReverseKl, TotalVariation};
    use Tail::{Bucket, Ignore, Renormalize};
    // Share α of the mixture: the teacher's in skew KL, the student's in skew reverse KL.
    let alpha = 0.1;
    vec![
        ("fkl_tau1.0", 0, 1.0, ForwardKl, Bucket),
        ("fkl_tau2.0", 0, 2.0, ForwardKl, Bucket),
        ("fkl_tau4.0", 0, 4.0, ForwardKl, Bucket),
        ("rkl_tau1.0", 0, 1.0, ReverseKl, Bucket),
        ("rkl_tau2.0", 0, 2.0, ReverseKl, Bucket),
        ("rkl_tau4.0", 0, 4.0, ReverseKl, Bucket),
        ("jsd_beta0.1", 0, 1.0, Jsd { beta: 0.1 }, Bucket),
        ("jsd_beta0.5", 0, 1.0, Jsd { beta: 0.5 }, Bucket),
        ("jsd_beta0.9", 0, 1.0, Jsd { beta: 0.9 }, Bucket),
        ("skl_0.1", 0, 1.0, SkewKl { alpha }, Bucket),
        ("srkl_0.1", 0, 1.0, SkewReverseKl { alpha }, Bucket),
        ("tvd", 0, 1.0, TotalVariation, Bucket),
        ("fkl_top8_tail", 8, 1.0, ForwardKl, Bucket),
        ("fkl_top64_tail", 64, 1.0, ForwardKl, Bucket),
        ("fkl_top8_truncated", 8, 1.0, ForwardKl, Ignore),
        ("fkl_top64_truncated", 64, 1.0, ForwardKl, Ignore),
        ("fkl_top8_renorm_both", 8, 1.0, ForwardKl, Renormalize),
        ("fkl_top64_renorm_both", 64, 1.0, ForwardKl, Renormalize),
    ]
}

fn finish(loss: Tensor<1>, leaf_nv: &Tensor<2>) -> (f64, f64) {
    let value = loss.to_data().iter::<f64>().next().unwrap();
    let mut tape = loss.backward();
    let gradient = leaf_nv.grad_remove(&mut tape).unwrap();
    let squares: f64 = gradient.into_data().iter::<f64>().map(|g| g * g).sum();
    (value, squares.sqrt())
}

#[test]
fn losses_and_gradients_at_the_logits() {
    let Some(reference) = reference() else { return };
    let batch = reference.batch(0);
    let log_p = log_probs(&reference.teacher, &batch);
    let log_q = log_probs(&reference.student, &batch);
    let (n, v) = (log_q.len(), log_q[0].len());
    let flat: Vec<f32> = log_q.iter().flatten().map(|&l| l as f32).collect();
    // Log-probabilities are valid logits: a softmax does not change with a shift.
    let logits_nv =
        Tensor::<2>::from_data(TensorData::new(flat, [n, v]), (&Device::flex(), DType::F32));

    let losses = &reference.json["losses"];
    for (name, k, temperature, divergence, tail) in reference_losses() {
        let k = if k == 0 { v } else { k };
        let rows: Vec<_> = log_p
            .iter()
            .map(|row| stored(row, k, temperature))
            .collect();
        let objective = Objective {
            tail,
            temperature,
            ..Objective::of(divergence)
        };
        let (loss, norm) = at_logits(&logits_nv, &rows, &objective);
        let want = &losses[name];
        check(name, loss, &want["loss"], 1e-4);
        // The reference's norms are sums of nine million squares in f32, which are too small if the squares are
        // similar: for reverse KL at τ = 4 the reference has 0.00028278, and f64 has 0.00028322, as here.
        let tolerance = if temperature > 1.0 { 2e-3 } else { 1e-4 };
        let name = format!("{name}, gradient norm");
        check(&name, norm, &want["grad_logits_l2"], tolerance);
    }

    let t = batch[0].len();
    let predicting: Vec<i32> = (0..n)
        .filter(|i| i % t != t - 1)
        .map(|i| i as i32)
        .collect();
    let labels: Vec<i32> = batch
        .iter()
        .flat_map(|ids| &ids[1..])
        .map(|&id| id as i32)
        .collect();
    let leaf_nv = Tensor::from_inner(logits_nv).require_grad();
    let device = leaf_nv.device();
    let count = labels.len();
    let index_n =
        Tensor::<1, Int>::from_data(TensorData::new(predicting, [count]), (&device, DType::I32));
    let labels_n1 =
        Tensor::<2, Int>::from_data(TensorData::new(labels, [count, 1]), (&device, DType::I32));
    let stats = row_stats(
        leaf_nv.clone().select(0, index_n),
        labels_n1,
        &LogitTransform::default(),
        LogQSum::Omitted,
    );
    let loss = cross_entropy(stats.log_q_nk().narrow(1, 0, 1)).sum() / count as f64;
    let (loss, norm) = finish(loss, &leaf_nv);
    check("cross-entropy", loss, &losses["ce_shifted"]["loss"], 1e-4);
    check(
        "cross-entropy, gradient norm",
        norm,
        &losses["ce_shifted"]["grad_logits_l2"],
        1e-4,
    );
}

/// Creates signals with the teacher's full distribution at every position. A token is appended so that the last
/// position predicts a token, as in the reference.
fn dense_signals(teacher: &Decoder, batch: &[Vec<u32>]) -> Vec<Signal> {
    let log_p = log_probs(teacher, batch);
    let t = batch[0].len();
    let signal = |(ids, rows): (&Vec<u32>, &[Vec<f64>])| Signal {
        prompt_id: String::new(),
        sample_index: 0,
        token_ids: ids.iter().copied().chain([0]).collect(),
        loss_mask: (0..=t).map(|position| position > 0).collect(),
        rows: rows.iter().map(|row| top_k(row, row.len())).collect(),
        provenance: 0,
    };
    batch.iter().zip(log_p.chunks(t)).map(signal).collect()
}

fn norm_of(gradients: &Gradients, name: &str, scale: f64) -> f64 {
    let one = Gradients::from([(name.to_owned(), gradients[name].clone())]);
    clip_global_norm(&one, 0.0).0 * scale
}

#[test]
fn ten_steps_of_adamw() {
    let Some(reference) = reference() else { return };
    let settings = TrainSettings {
        batch: 2,
        micro_batch: 2,
        objective: Objective::default(),
        chunk_rows: 96,
        weight_decay: 0.01,
        weight_decay_on: vec![
            DecayedRole::Projections,
            DecayedRole::Embedding,
            DecayedRole::Norms,
        ],
        ..settings()
    };
    let mut optimizer = Optimizer::new(&settings);
    let mut model = reference.student.clone().train();
    let steps = reference.json["trajectory"]["steps"].as_array().unwrap();
    for (step, want) in steps.iter().enumerate() {
        let signals = dense_signals(&reference.teacher, &reference.batch(step));
        let result = batch_gradient(&model, &signals, Arm::Student, &settings, 0).unwrap();
        let (norm, scale) = clip_global_norm(&result.gradients, 1.0);
        check(
            &format!("step {step}, forward KL"),
            result.loss,
            &want["fkl"],
            1e-3,
        );
        check(
            &format!("step {step}, gradient norm"),
            norm,
            &want["grad_norm"],
            1e-3,
        );
        if let Some(norms) = want["grad_norm_per_param_first20"].as_object() {
            for (name, want) in norms {
                check(name, norm_of(&result.gradients, name, scale), want, 1e-3);
            }
        }
        model = optimizer.step(model, result.gradients, scale, 1e-4);
    }
    let signals = dense_signals(&reference.teacher, &reference.batch(0));
    let after = batch_gradient(&model, &signals, Arm::Student, &settings, 0).unwrap();
    check(
        "after ten steps, batch 0",
        after.loss,
        &reference.json["after10_on_batch0"]["fkl"],
        1e-3,
    );
}

#[test]
fn masked_positions_of_gsm8k_get_a_gradient_of_exactly_zero() {
    let Some(reference) = reference() else { return };
    let (Some(data), Some(dir)) = (
        real("data/gsm8k/train.jsonl"),
        real("models/SmolLM2-135M-Instruct"),
    ) else {
        return;
    };
    let tokenizer = potstill_datasets::Tokenizer::from_dir(&dir).unwrap();
    let text = std::fs::read_to_string(data).unwrap();
    let signals = text.lines().take(2).map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        let question = tokenizer
            .encode(row["question"].as_str().unwrap(), false)
            .unwrap();
        let answer = tokenizer
            .encode(row["answer"].as_str().unwrap(), false)
            .unwrap();
        let token_ids: Vec<u32> = question.iter().chain(&answer).copied().collect();
        let log_p = log_probs(&reference.teacher, std::slice::from_ref(&token_ids));
        let from = question.len();
        let row = |position: usize| with_target_token(&log_p[position - 1], token_ids[position]);
        Signal {
            prompt_id: String::new(),
            sample_index: 0,
            loss_mask: (0..token_ids.len())
                .map(|position| position >= from)
                .collect(),
            rows: (from..token_ids.len()).map(row).collect(),
            token_ids,
            provenance: 0,
        }
    });
    check_masked(&reference.student, &signals.collect::<Vec<_>>());
}

/// Creates a row of the 64 likeliest tokens. If the target token is not among them, it replaces the last.
fn with_target_token(log_p: &[f64], target_token: u32) -> potstill_datasets::SignalRow {
    let mut row = top_k(log_p, 64);
    if !row.ids.contains(&target_token) {
        row.ids[63] = target_token;
        row.logprobs[63] = log_p[target_token as usize] as f32;
    }
    row
}
