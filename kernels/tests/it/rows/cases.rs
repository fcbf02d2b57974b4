//! Test cases of the row statistics, their results by the definitions, and functions that compare results.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, MASKED, RowStats, TAIL_FLOOR_NATS};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

pub(crate) struct Case {
    pub(crate) n: usize,
    pub(crate) v: usize,
    pub(crate) k: usize,
    pub(crate) logits: Vec<f64>,
    /// Token ids in no order, with empty slots in some rows.
    pub(crate) support: Vec<i64>,
    /// Gradients with respect to log q, log z and Σ log q.
    pub(crate) weights: Vec<f64>,
    pub(crate) head: LogitTransform,
    pub(crate) sum: LogQSum,
}

impl Case {
    /// Number of columns of the statistics.
    pub(crate) fn width(&self) -> usize {
        self.k + if self.sum == LogQSum::Included { 3 } else { 2 }
    }

    pub(crate) fn vocab(&self) -> usize {
        self.head.vocab.unwrap_or(self.v)
    }
}

/// Makes a case. Supports are unordered, some with empty slots; every fourth row is masked; every fifth logit of the third
/// row is −∞.
pub(crate) fn case(n: usize, v: usize, k: usize, head: LogitTransform, sum: LogQSum) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64((n * 1_000_003 + v * 101 + k) as u64);
    let mut logits: Vec<f64> = (0..n * v).map(|_| rng.random_range(-8.0..8.0)).collect();
    if n > 2 && sum == LogQSum::Omitted {
        let row = logits[2 * v..3 * v].iter_mut();
        row.skip(1).step_by(5).for_each(|z| *z = f64::NEG_INFINITY);
    }
    let vocab = head.vocab.unwrap_or(v);
    let mut support = Vec::new();
    for row in 0..n {
        let mut ids: Vec<i64> = (0..vocab as i64).collect();
        ids.shuffle(&mut rng);
        ids.truncate(k);
        if k > 2 && k < v && row % 2 == 1 {
            ids[1] = -1;
            ids[2] = vocab as i64 + 5;
        }
        if row % 4 == 3 {
            ids[0] = i64::from(MASKED);
        }
        support.extend(ids);
    }
    let mut case = Case {
        n,
        v,
        k,
        logits,
        support,
        weights: Vec::new(),
        head,
        sum,
    };
    let weights = (0..n * case.width()).map(|_| rng.random_range(-1.0..1.0));
    case.weights = weights.collect();
    case
}

pub(crate) fn cases() -> Vec<Case> {
    let plain = LogitTransform::default();
    let full = LogitTransform {
        scale: 0.7,
        softcap: Some(5.0),
        temperature: 2.0,
        vocab: None,
    };
    let padded = |vocab| LogitTransform {
        vocab: Some(vocab),
        ..plain
    };
    use LogQSum::{Included, Omitted};
    vec![
        case(1, 5, 1, plain, Omitted),
        case(5, 37, 4, plain, Omitted),
        case(3, 37, 37, plain, Omitted),
        case(2, 2048, 7, plain, Included),
        case(5, 2051, 64, full, Omitted),
        case(4, 2051, 64, full, Included),
        case(4, 4099, 64, padded(4001), Omitted),
        case(4, 4099, 3, padded(4001), Included),
        case(2, 49_153, 130, plain, Omitted),
        case(2, 300, 300, full, Omitted),
        case(3, 1024, 512, plain, Omitted),
        // These rows have more columns than a kernel marks at a time.
        case(4, 140_004, 200, padded(140_003), Omitted),
        case(2, 70_000, 33, full, Included),
    ]
}

/// The devices and float types on which the op is tested, each with its tolerance.
pub(crate) fn devices() -> Vec<(Device, DType, f64)> {
    let flex = Device::flex();
    let mut devices = vec![(flex.clone(), DType::F64, 1e-12), (flex, DType::F32, 1e-5)];
    if cfg!(feature = "cube") {
        devices.push((gpu(), DType::F32, 5e-5));
    }
    devices
}

/// Returns the GPU that the features and the environment choose.
pub(crate) fn gpu() -> Device {
    let device = Device::default();
    let name = format!("{device:?}");
    assert!(!name.contains("Flex"), "no GPU backend was selected");
    device
}

pub(crate) type Form = fn(Tensor<2>, Tensor<2, Int>, &LogitTransform, LogQSum) -> RowStats;

/// Computes the statistics by row, and the gradient `[n · v]` of Σ weights · statistics.
pub(crate) fn run(case: &Case, device: &Device, dtype: DType, form: Form) -> (Vec<f64>, Vec<f64>) {
    let device = device.clone().autodiff();
    let floats = |values: &[f64], shape: [usize; 2]| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), (&device, dtype))
    };
    let logits_nv = floats(&case.logits, [case.n, case.v]).require_grad();
    let support_nk = Tensor::<2, Int>::from_data(
        TensorData::new(case.support.clone(), [case.n, case.k]),
        &device,
    );
    let all = form(logits_nv.clone(), support_nk, &case.head, case.sum).all();
    let weights = floats(&case.weights, [case.n, case.width()]).cast(all.dtype());
    let mut gradients = (all.clone() * weights).sum().backward();
    let gradient = logits_nv.grad_remove(&mut gradients).unwrap();
    (numbers(all.inner()), numbers(gradient))
}

/// Computes the results of [`run`] by the definitions in f64, without optimisations: a dense softmax, and
/// ∂L/∂s_i = Σ_b h_b ∂(log q_b)/∂s_i bucket by bucket.
pub(crate) fn by_definition(case: &Case) -> (Vec<f64>, Vec<f64>) {
    let (mut stats, mut gradient) = (Vec::new(), Vec::new());
    for row in 0..case.n {
        if case.support[row * case.k] == i64::from(MASKED) {
            stats.extend(vec![EMPTY_NATS; case.k + 1]);
            stats.extend(vec![0.0; case.width() - case.k - 1]);
            gradient.extend(vec![0.0; case.v]);
        } else {
            row_by_definition(case, row, &mut stats, &mut gradient);
        }
    }
    (stats, gradient)
}

pub(crate) fn row_by_definition(
    case: &Case,
    row: usize,
    stats: &mut Vec<f64>,
    gradient: &mut Vec<f64>,
) {
    let (k, head, vocab) = (case.k, &case.head, case.vocab());
    let z = &case.logits[row * case.v..row * case.v + vocab];
    let support = &case.support[row * k..(row + 1) * k];
    let h = &case.weights[row * case.width()..(row + 1) * case.width()];
    let capped: Vec<f64> = z
        .iter()
        .map(|z| z * head.scale)
        .map(|y| head.softcap.map_or(y, |c| c * (y / c).tanh()))
        .collect();
    let s: Vec<f64> = capped.iter().map(|y| y / head.temperature).collect();
    let max = s.iter().copied().fold(f64::MIN, f64::max);
    let log_z = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
    let in_tail: Vec<bool> = (0..vocab).map(|i| !support.contains(&(i as i64))).collect();
    let tail: f64 = (0..vocab)
        .filter(|&i| in_tail[i])
        .map(|i| (s[i] - log_z).exp())
        .sum();
    let present = |id: i64| id >= 0 && (id as usize) < vocab;
    let log_q = |id: i64| match present(id) {
        true => (s[id as usize] - log_z).max(EMPTY_NATS),
        false => EMPTY_NATS,
    };
    stats.extend(support.iter().map(|&id| log_q(id)));
    stats.extend([
        if tail > 0.0 {
            tail.ln()
        } else {
            TAIL_FLOOR_NATS
        },
        log_z,
    ]);
    let mut u = 0.0;
    if case.sum == LogQSum::Included {
        stats.push(s.iter().map(|s| s - log_z).sum());
        u = h[k + 2];
    }
    let h_tail = if tail > 0.0 { h[k] } else { 0.0 };
    let passes = |j: &usize| log_q(support[*j]) > EMPTY_NATS;
    let h_support: f64 = (0..k).filter(passes).map(|j| h[j]).sum();
    for i in 0..case.v {
        if i >= vocab {
            gradient.push(0.0);
            continue;
        }
        let q = (s[i] - log_z).exp();
        let own = match support.iter().position(|&id| id == i as i64) {
            Some(slot) if passes(&slot) => h[slot],
            Some(_) => 0.0,
            None => h_tail * q / tail,
        };
        let slope = head.softcap.map_or(1.0, |c| 1.0 - (capped[i] / c).powi(2));
        let sum_term = u * (1.0 - vocab as f64 * q);
        let ds = own - q * (h_support + h_tail) + q * h[k + 1] + sum_term;
        gradient.push(ds * slope * head.scale / head.temperature);
    }
}

pub(crate) fn numbers(tensor: Tensor<2>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Returns the largest difference, relative for values over 1.
pub(crate) fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs() / y.abs().max(1.0))
        .fold(0.0, |m, d| {
            assert!(!d.is_nan());
            f64::max(m, d)
        })
}

pub(crate) fn compare(name: &str, device: &Device, dtype: DType, form: Form, tolerance: f64) {
    for case in cases() {
        compare_case(name, &case, device, dtype, form, tolerance);
    }
}

pub(crate) fn compare_case(
    name: &str,
    case: &Case,
    device: &Device,
    dtype: DType,
    form: Form,
    tolerance: f64,
) {
    let (want, want_gradient) = by_definition(case);
    let (got, gradient) = run(case, device, dtype, form);
    let (values, gradients) = (worst(&got, &want), worst(&gradient, &want_gradient));
    let (n, v, k) = (case.n, case.v, case.k);
    println!("{name} {dtype:?} n={n} v={v} k={k}: values {values:.1e}, gradient {gradients:.1e}");
    assert!(
        values <= tolerance && gradients <= tolerance,
        "{name} {n}×{v}, k={k}"
    );
}
