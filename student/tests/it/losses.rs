//! Value and gradient at the logits of every divergence on every target, compared with the definitions and with
//! finite differences, in f64 and f32.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, row_stats};
use potstill_student::loss::{
    CustomDivergence, Divergence, Tail, adaptive_kl, cross_entropy, forward_kl, reverse_kl,
    smoothed_cross_entropy,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::losses_cases::{Case, Loss, V, cases, distributions, losses};
use crate::losses_reference::head_weight;

fn floats(rows: &[Vec<f64>], dtype: DType) -> Tensor<2> {
    let shape = [rows.len(), rows[0].len()];
    let data = TensorData::new(rows.concat(), shape);
    Tensor::from_data(data, (&Device::flex(), dtype))
}

fn leaf(tensor: Tensor<2>) -> Tensor<2> {
    Tensor::from_inner(tensor).require_grad()
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Computes log q on the support and in the tail, [n, k+1].
pub(crate) fn log_q(logits_nv: Tensor<2>, support_nk: Tensor<2, Int>) -> Tensor<2> {
    row_stats(
        logits_nv,
        support_nk,
        &LogitTransform::default(),
        LogQSum::Omitted,
    )
    .log_q_nk()
}

/// Returns log p and log q, the arguments of the divergence.
fn sides(case: &Case, logits_nv: Tensor<2>, dtype: DType) -> (Tensor<2>, Tensor<2>) {
    let log_p_nk = floats(&case.log_p, dtype);
    let Some(tail) = case.tail else {
        return (log_p_nk, log_softmax(logits_nv, 1));
    };
    let ids: Vec<i32> = case
        .slots
        .iter()
        .flatten()
        .map(|slot| slot.map_or(-1, |i| i as i32))
        .collect();
    let ids = TensorData::new(ids, [case.slots.len(), case.slots[0].len()]);
    let support_nk = Tensor::<2, Int>::from_data(ids, (&Device::flex(), DType::I32));
    tail.apply(log_p_nk, log_q(logits_nv, support_nk))
}

/// Computes the value of each row and the gradient at the logits.
fn run(case: &Case, loss: &Loss, dtype: DType) -> (Vec<f64>, Vec<f64>) {
    let logits_nv = leaf(floats(&case.logits, dtype));
    let (log_p_nk, log_q_nk) = sides(case, logits_nv.clone(), dtype);
    let values_n = loss.rows(log_p_nk, log_q_nk);
    let mut tape = values_n.clone().sum().backward();
    let gradient_nv = logits_nv.grad_remove(&mut tape).unwrap();
    (numbers(values_n), numbers(gradient_nv))
}

/// Computes central differences of the tensor function's value. Rows do not depend on each other, so all rows are
/// changed at once.
fn finite_differences(case: &mut Case, loss: &Loss) -> Vec<f64> {
    let step = 1e-5;
    // The weight of adaptive KL is a constant.
    let constant = match loss {
        Loss::Of(Divergence::AdaptiveKl { head_mass }) => {
            let (log_p_nk, log_q_nk) = sides(case, floats(&case.logits, DType::F64), DType::F64);
            let columns = log_p_nk.dims()[1];
            let (log_p, q) = (numbers(log_p_nk), numbers(log_q_nk.exp()));
            let rows = log_p.chunks(columns).zip(q.chunks(columns));
            let weights: Vec<f64> = rows
                .map(|(log_p, q)| head_weight(log_p, q, *head_mass))
                .collect();
            Some(weights)
        }
        _ => None,
    };
    let values = |case: &Case| -> Vec<f64> {
        let (log_p_nk, log_q_nk) = sides(case, floats(&case.logits, DType::F64), DType::F64);
        match &constant {
            None => numbers(loss.rows(log_p_nk, log_q_nk)),
            Some(weights) => {
                let forward = numbers(forward_kl(log_p_nk.clone(), log_q_nk.clone()));
                let reverse = numbers(reverse_kl(log_p_nk, log_q_nk));
                let both = weights.iter().zip(forward.iter().zip(&reverse));
                both.map(|(w, (forward, reverse))| w * forward + (1.0 - w) * reverse)
                    .collect()
            }
        }
    };
    let mut slopes = vec![0.0; case.logits.len() * V];
    for i in 0..V {
        let mut moved = |by: f64| {
            case.logits.iter_mut().for_each(|row| row[i] += by);
            values(case)
        };
        let (up, down) = (moved(step), moved(-2.0 * step));
        moved(step);
        for (row, (up, down)) in up.iter().zip(&down).enumerate() {
            slopes[row * V + i] = (up - down) / (2.0 * step);
        }
    }
    slopes
}

/// Computes the largest difference, relative to the row's largest number if that is above 1.
fn worst(got: &[f64], want: &[f64], columns: usize) -> f64 {
    assert_eq!(got.len(), want.len());
    let row = |(got, want): (&[f64], &[f64])| {
        let scale = want.iter().fold(1.0, |scale: f64, x| scale.max(x.abs()));
        let off = got.iter().zip(want).map(|(a, b)| (a - b).abs() / scale);
        off.fold(0.0, |worst: f64, off| {
            if off.is_nan() {
                f64::INFINITY
            } else {
                worst.max(off)
            }
        })
    };
    got.chunks(columns)
        .zip(want.chunks(columns))
        .map(row)
        .fold(0.0, f64::max)
}

fn against_definitions(dtype: DType, tolerance: f64) {
    let mut overall = [0.0_f64; 2];
    for case in cases() {
        for loss in losses().iter().filter(|loss| loss.works_on(&case)) {
            let rows = 0..case.logits.len();
            let (want, want_gradient): (Vec<f64>, Vec<Vec<f64>>) =
                rows.map(|row| loss.by_definition(&case, row)).unzip();
            let (got, gradient) = run(&case, loss, dtype);
            let value = worst(&got, &want, 1);
            let slope = worst(&gradient, &want_gradient.concat(), V);
            println!(
                "{}, {loss:?}, {dtype:?}: value {value:.1e}, gradient {slope:.1e}",
                case.name
            );
            assert!(
                value <= tolerance,
                "{} {loss:?}: {got:?}, {want:?}",
                case.name
            );
            assert!(slope <= tolerance, "{} {loss:?}: {gradient:?}", case.name);
            overall = [overall[0].max(value), overall[1].max(slope)];
        }
    }
    println!(
        "{dtype:?}, worst of all: value {:.1e}, gradient {:.1e}",
        overall[0], overall[1]
    );
}

#[test]
fn every_divergence_on_every_target_in_f64() {
    against_definitions(DType::F64, 1e-12);
}

/// In f32 a logit of 9 has an error of up to 5e-7, and log q a similar one.
#[test]
fn every_divergence_on_every_target_in_f32() {
    against_definitions(DType::F32, 2e-6);
}

#[test]
fn gradients_equal_finite_differences() {
    let mut overall: f64 = 0.0;
    for mut case in cases() {
        for loss in losses() {
            if !loss.works_on(&case) {
                continue;
            }
            let (_, gradient) = run(&case, &loss, DType::F64);
            let off = worst(&gradient, &finite_differences(&mut case, &loss), V);
            assert!(off < 5e-8, "{} {loss:?}: {off:.1e}", case.name);
            overall = overall.max(off);
        }
    }
    println!("finite differences, worst of all: {overall:.1e}");
}

#[test]
fn cross_entropies_of_the_target_token() {
    let case = cases().pop().unwrap();
    let tokens: Vec<usize> = (0..case.logits.len())
        .map(|row| (7 * row + 3) % V)
        .collect();
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 5e-6)] {
        for smoothing in [0.0, 0.1, 1.0] {
            let logits_nv = leaf(floats(&case.logits, dtype));
            let log_q_nv = log_softmax(logits_nv.clone(), 1);
            let ids: Vec<i32> = tokens.iter().map(|&token| token as i32).collect();
            let ids = TensorData::new(ids, [tokens.len(), 1]);
            let ids_n1 = Tensor::<2, Int>::from_data(ids, (&Device::flex(), DType::I32));
            let log_q_n1 = log_q(logits_nv.clone(), ids_n1).narrow(1, 0, 1);
            let plain = numbers(cross_entropy(log_q_n1.clone()));
            let values_n = smoothed_cross_entropy(log_q_n1, log_q_nv.sum_dim(1), V, smoothing);
            let mut tape = values_n.clone().sum().backward();
            let gradient = numbers(logits_nv.grad_remove(&mut tape).unwrap());
            let values = numbers(values_n);

            let (mut want, mut want_gradient, mut want_plain) =
                (Vec::new(), Vec::new(), Vec::new());
            for (logits, &token) in case.logits.iter().zip(&tokens) {
                let z: f64 = logits.iter().map(|z| z.exp()).sum();
                let nll = |i: usize| z.ln() - logits[i];
                let uniform = (0..V).map(nll).sum::<f64>() / V as f64;
                want_plain.push(nll(token));
                want.push((1.0 - smoothing) * nll(token) + smoothing * uniform);
                want_gradient.extend((0..V).map(|i| {
                    let hard = if i == token { 1.0 - smoothing } else { 0.0 };
                    logits[i].exp() / z - hard - smoothing / V as f64
                }));
            }
            assert!(worst(&plain, &want_plain, 1) <= tolerance, "{dtype:?}");
            assert!(
                worst(&values, &want, 1) <= tolerance,
                "{dtype:?} {smoothing}"
            );
            assert!(
                worst(&gradient, &want_gradient, V) <= tolerance,
                "{dtype:?} {smoothing}"
            );
        }
    }
}

/// At p = q every f-divergence has value and gradient 0, also if there are ties of the maximum and of |p − q|.
#[test]
fn an_equal_student_is_at_the_minimum() {
    for mut case in cases() {
        if case.tail == Some(Tail::Draws) || case.name == "target token" {
            continue;
        }
        // In the third row the student is near the teacher; every row becomes that row with p = q.
        let (p, _) = distributions(&mut ChaCha8Rng::seed_from_u64(5));
        let equal: Vec<f64> = p[2].iter().map(|p| p.ln()).collect();
        case.logits
            .iter_mut()
            .for_each(|row| row.clone_from(&equal));
        case.slots = vec![case.slots[2].clone(); case.logits.len()];
        case.log_p = vec![case.log_p[2].clone(); case.logits.len()];
        for loss in losses() {
            if matches!(loss, Loss::SoftCrossEntropy) {
                continue;
            }
            let (values, gradient) = run(&case, &loss, DType::F64);
            // The sign of a tiny difference is 1 or −1, so the gradient of total variation is not 0.
            let flat = !matches!(loss, Loss::Of(Divergence::TotalVariation));
            // A sum over the support only has its minimum elsewhere.
            let flat = flat && case.tail != Some(Tail::Ignore);
            assert!(
                values.iter().all(|value| value.abs() < 1e-13),
                "{} {loss:?}",
                case.name
            );
            let steepest = gradient
                .iter()
                .fold(0.0, |worst: f64, g| worst.max(g.abs()));
            assert!(
                !flat || steepest < 1e-13,
                "{} {loss:?}: {steepest:.1e}",
                case.name
            );
        }
    }
}

#[test]
fn ties_at_the_edge_are_part_of_the_head() {
    let p = [0.3, 0.3, 0.2, 0.1, 0.1];
    let q = [0.1, 0.2, 0.3, 0.2, 0.2];
    let log = |p: &[f64]| floats(&[p.iter().map(|p| p.ln()).collect()], DType::F64);
    let forward = numbers(forward_kl(log(&p), log(&q)))[0];
    let reverse = numbers(reverse_kl(log(&p), log(&q)))[0];
    // Gaps: 0.2, 0.1, 0.1, 0.1, 0.1.
    for (head_mass, weight) in [
        (0.2, 0.3 / 0.6),
        (0.5, 0.3 / 0.6),
        (0.75, 0.4 / 0.6),
        (0.85, 1.0),
    ] {
        let got = numbers(adaptive_kl(log(&p), log(&q), head_mass))[0];
        let want = weight * forward + (1.0 - weight) * reverse;
        assert!((got - want).abs() < 1e-14, "{head_mass}: {got}, {want}");
    }
}

#[test]
fn a_custom_divergence_is_called_and_is_nan_without_its_function() {
    let log_p_nk = floats(&[vec![-0.5, -1.0]], DType::F64);
    let function: fn(Tensor<2>, Tensor<2>) -> Tensor<1> = |log_p_nk, log_q_nk| {
        (log_p_nk - log_q_nk)
            .powf_scalar(2.0)
            .sum_dim(1)
            .squeeze_dim(1)
    };
    let mut custom = CustomDivergence {
        name: "squares".to_owned(),
        function: Some(function),
    };
    let divergence = Divergence::Custom(custom.clone());
    assert_eq!(divergence.name(), "squares");
    let rows = divergence.rows(log_p_nk.clone(), log_p_nk.clone() - 2.0);
    assert_eq!(numbers(rows), [8.0]);
    custom.function = None;
    let lost = Divergence::Custom(custom);
    assert_eq!(lost, divergence, "what a checkpoint holds is the name");
    assert!(numbers(lost.rows(log_p_nk.clone(), log_p_nk))[0].is_nan());
}

#[test]
fn names_in_files() {
    let json = |divergence: Divergence| serde_json::to_string(&divergence).unwrap();
    assert_eq!(json(Divergence::ForwardKl), r#""forward_kl""#);
    assert_eq!(
        json(Divergence::Jsd { beta: 0.5 }),
        r#"{"jsd":{"beta":0.5}}"#
    );
    assert_eq!(
        serde_json::to_string(&Tail::Renormalize).unwrap(),
        r#""renormalize""#
    );
    for loss in losses() {
        let Loss::Of(divergence) = loss else { continue };
        let text = json(divergence.clone());
        assert!(text.contains(divergence.name()), "{text}");
        assert_eq!(
            serde_json::from_str::<Divergence>(&text).unwrap(),
            divergence
        );
    }
}

/// A row whose slots are all empty, the tail included, on both sides.
#[test]
fn a_row_of_empty_slots_has_loss_zero() {
    for dtype in [DType::F32, DType::F64] {
        for tail in [Tail::Bucket, Tail::Renormalize, Tail::Ignore, Tail::Draws] {
            for loss in losses() {
                let empty = || floats(&[vec![EMPTY_NATS; 4], vec![EMPTY_NATS; 4]], dtype);
                let leaf_nk = leaf(empty());
                let (log_p_nk, log_q_nk) = tail.apply(empty(), leaf_nk.clone());
                let values_n = loss.rows(log_p_nk, log_q_nk);
                let mut tape = values_n.clone().sum().backward();
                let gradient_nk = leaf_nk.grad_remove(&mut tape).unwrap();
                assert_eq!(numbers(values_n), [0.0; 2], "{tail:?} {loss:?}");
                assert_eq!(numbers(gradient_nk), [0.0; 8], "{tail:?} {loss:?}");
            }
        }
    }
}
