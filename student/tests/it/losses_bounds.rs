//! Properties of every f-divergence, on 10⁶ random rows: values are not negative, and coarse ≤ full.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_student::loss::Divergence;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::losses::log_q;

const ROWS: usize = 1_000_000;
const BATCH: usize = 50_000;
const V: usize = 12;
const K: usize = 4;

fn f_divergences() -> Vec<Divergence> {
    let mut all = vec![
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::TotalVariation,
    ];
    all.extend([0.1, 0.5, 0.9].map(|beta| Divergence::Jsd { beta }));
    all.extend([0.1, 0.5].map(|alpha| Divergence::SkewKl { alpha }));
    all.extend([0.1, 0.5].map(|alpha| Divergence::SkewReverseKl { alpha }));
    all.extend([0.1, 0.5, 0.9].map(|alpha| Divergence::Alpha { alpha }));
    all
}

/// Generates logits of teacher and student, [BATCH · V]: flat to peaked, far apart to equal, and with random shifts,
/// which do not change a softmax but lose digits in f32.
fn logits(rng: &mut ChaCha8Rng) -> (Vec<f64>, Vec<f64>) {
    let (mut teacher, mut student) = (Vec::new(), Vec::new());
    for row in 0..BATCH {
        let scale = [0.1, 1.0, 4.0, 15.0][row % 4];
        let shift = rng.random_range(-20.0..20.0);
        // Ten of sixteen rows are close: within 0.1, 0.01, …, 1e-7, or equal.
        let closeness = match row / 4 % 16 {
            far @ 0..6 => [1.0, 3.0][far % 2] * scale,
            near @ 6..13 => 10f64.powi(5 - near as i32),
            13 => 3e-4,
            14 => 3e-6,
            _ => 0.0,
        };
        for _ in 0..V {
            let z = shift + rng.random_range(-scale..scale);
            teacher.push(z);
            student.push(z + closeness * rng.random_range(-1.0..1.0));
        }
    }
    (teacher, student)
}

/// Returns a support of the first K tokens, which are random tokens since the logits have no order.
fn support() -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..BATCH).flat_map(|_| 0..K as i32).collect();
    Tensor::from_data(
        TensorData::new(ids, [BATCH, K]),
        (&Device::flex(), DType::I32),
    )
}

/// Computes dense and coarse log probabilities. The teacher's are computed in f64 and rounded, like those of a target;
/// the student's are computed in `dtype`, like those of a training step.
fn sides(values: Vec<f64>, dtype: DType, teacher: bool) -> [Tensor<2>; 2] {
    let computed = if teacher { DType::F64 } else { dtype };
    let data = TensorData::new(values, [BATCH, V]);
    let logits_nv = Tensor::<2>::from_data(data, (&Device::flex(), computed));
    let dense_nv = log_softmax(logits_nv.clone(), 1);
    [dense_nv, log_q(logits_nv, support())].map(|side| side.cast(dtype))
}

fn numbers(tensor: Tensor<1>) -> impl Iterator<Item = f64> {
    tensor
        .into_data()
        .iter::<f64>()
        .collect::<Vec<_>>()
        .into_iter()
}

/// Checks that values are at least `floor`, and that coarse exceeds full by at most `slack`, relative for values
/// above 1.
fn bounds(dtype: DType, floor: f64, slack: f64) {
    let divergences = f_divergences();
    let mut lowest = vec![f64::INFINITY; divergences.len()];
    let mut highest = vec![f64::NEG_INFINITY; divergences.len()];
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for batch in 0..ROWS / BATCH {
        let (teacher, student) = logits(&mut rng);
        let [dense_p, coarse_p] = sides(teacher, dtype, true);
        let [dense_q, coarse_q] = sides(student, dtype, false);
        for (i, divergence) in divergences.iter().enumerate() {
            let full = numbers(divergence.rows(dense_p.clone(), dense_q.clone()));
            let coarse = numbers(divergence.rows(coarse_p.clone(), coarse_q.clone()));
            for (full, coarse) in full.zip(coarse) {
                assert!(full.is_finite() && coarse.is_finite());
                lowest[i] = lowest[i].min(full).min(coarse);
                highest[i] = highest[i].max((coarse - full) / full.max(1.0));
            }
            if batch == 0 {
                // Uses the same numbers on both sides, since two computations rarely give equal bits.
                let equal = numbers(divergence.rows(dense_p.clone(), dense_p.clone()));
                lowest[i] = equal.fold(lowest[i], f64::min);
            }
        }
    }
    for (divergence, (lowest, highest)) in divergences.iter().zip(lowest.iter().zip(&highest)) {
        println!("{divergence:?}, {dtype:?}: lowest {lowest:.1e}, coarse − full {highest:.1e}");
        assert!(*lowest >= -floor, "{divergence:?}: {lowest:.1e}");
        assert!(*highest <= slack, "{divergence:?}: {highest:.1e}");
    }
}

#[test]
fn f_divergences_in_f64() {
    bounds(DType::F64, 1e-12, 1e-12);
}

#[test]
fn f_divergences_in_f32() {
    bounds(DType::F32, 1e-6, 1e-6);
}
