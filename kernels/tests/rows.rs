//! Row statistics: plain loops, CubeCL kernel and tensor operations agree, values and gradients.
//!
//! The default build tests Flex. With the feature `wgpu` the same bodies run on the GPU that CubeCL
//! finds too; `scripts/gpu.sh` and `.ci/run` say how (software Vulkan serves).

// Lints know test functions, not the functions they share.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use burn::backend::{Autodiff, Backend, Flex, ops::*};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, try_read_sync};
use potstill_kernels::{
    EMPTY_NATS, Head, MASKED, RowOps, RowStats, Sum, TAIL_FLOOR_NATS, row_gradient, row_stats,
    row_stats_reference,
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

struct Case {
    n: usize,
    v: usize,
    k: usize,
    logits: Vec<f64>,
    /// Unsorted, with an empty slot here and there.
    support: Vec<i64>,
    /// Gradients that are put on log q, on log z and on Σ log q.
    weights: Vec<f64>,
    head: Head,
    sum: Sum,
}

impl Case {
    /// Columns of the statistics.
    fn width(&self) -> usize {
        self.k + if self.sum == Sum::WithLogQ { 3 } else { 2 }
    }

    fn vocab(&self) -> usize {
        self.head.vocab.unwrap_or(self.v)
    }
}

/// Supports without order, with an empty slot here and there; every fourth row is masked, and every
/// fifth logit of the third row is −∞.
fn case(n: usize, v: usize, k: usize, head: Head, sum: Sum) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64((n * 1_000_003 + v * 101 + k) as u64);
    let mut logits: Vec<f64> = (0..n * v).map(|_| rng.random_range(-8.0..8.0)).collect();
    if n > 2 && sum == Sum::Without {
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

fn cases() -> Vec<Case> {
    let plain = Head::default();
    let full = Head {
        scale: 0.7,
        softcap: Some(5.0),
        temperature: 2.0,
        vocab: None,
    };
    let padded = |vocab| Head {
        vocab: Some(vocab),
        ..plain
    };
    use Sum::{WithLogQ, Without};
    vec![
        case(1, 5, 1, plain, Without),
        case(5, 37, 4, plain, Without),
        case(3, 37, 37, plain, Without),
        case(2, 2048, 7, plain, WithLogQ),
        case(5, 2051, 64, full, Without),
        case(4, 2051, 64, full, WithLogQ),
        case(4, 4099, 64, padded(4001), Without),
        case(4, 4099, 3, padded(4001), WithLogQ),
        case(2, 49_153, 130, plain, Without),
        case(2, 300, 300, full, Without),
        case(3, 1024, 512, plain, Without),
        // More columns than a kernel marks at a time.
        case(4, 140_004, 200, padded(140_003), Without),
        case(2, 70_000, 33, full, WithLogQ),
    ]
}

/// Where the op itself is tested: devices, types that they compute in, and how far off each may be.
fn grounds() -> Vec<(Device, DType, f64)> {
    let flex = Device::flex();
    let mut grounds = vec![(flex.clone(), DType::F64, 1e-12), (flex, DType::F32, 1e-5)];
    if cfg!(feature = "cube") {
        grounds.push((gpu(), DType::F32, 5e-5));
    }
    grounds
}

/// The device that the features and the environment choose.
fn gpu() -> Device {
    let device = Device::default();
    let name = format!("{device:?}");
    assert!(!name.contains("Flex"), "no GPU backend was selected");
    device
}

type Form = fn(Tensor<2>, Tensor<2, Int>, &Head, Sum) -> RowStats;

/// Statistics, by row, and the gradient [n · v] of Σ weights · statistics.
fn run(case: &Case, device: &Device, dtype: DType, form: Form) -> (Vec<f64>, Vec<f64>) {
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

/// The same by the definitions, in f64 and with nothing clever: a dense softmax, and
/// ∂L/∂s_i = Σ_b h_b ∂(log q_b)/∂s_i bucket by bucket.
fn by_definition(case: &Case) -> (Vec<f64>, Vec<f64>) {
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

fn row_by_definition(case: &Case, row: usize, stats: &mut Vec<f64>, gradient: &mut Vec<f64>) {
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
    if case.sum == Sum::WithLogQ {
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
        let of_sum = u * (1.0 - vocab as f64 * q);
        let ds = own - q * (h_support + h_tail) + q * h[k + 1] + of_sum;
        gradient.push(ds * slope * head.scale / head.temperature);
    }
}

fn numbers(tensor: Tensor<2>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// The largest difference, relative to values over 1.
fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs() / y.abs().max(1.0))
        .fold(0.0, |m, d| {
            assert!(!d.is_nan());
            f64::max(m, d)
        })
}

fn compare(name: &str, device: &Device, dtype: DType, form: Form, tolerance: f64) {
    for case in cases() {
        compare_case(name, &case, device, dtype, form, tolerance);
    }
}

fn compare_case(
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

#[test]
fn plain_loops_in_f64() {
    compare("plain loops", &Device::flex(), DType::F64, row_stats, 1e-12);
}

/// burn's tanh differentiates with f32 accuracy even in f64, hence the softcapped cases' 1e-8.
#[test]
fn tensor_operations_in_f64() {
    compare(
        "tensor operations",
        &Device::flex(),
        DType::F64,
        row_stats_reference,
        1e-8,
    );
}

#[test]
fn plain_loops_in_f32() {
    compare("plain loops", &Device::flex(), DType::F32, row_stats, 5e-6);
}

#[test]
fn half_precision() {
    for (device, _, _) in grounds() {
        // The logits are rounded before the comparison, so only the gradient's own rounding is left.
        for (dtype, tolerance) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            if !device.supports_dtype(dtype) {
                println!("{device:?} has no {dtype:?}");
                continue;
            }
            for mut case in cases() {
                let rounded = Tensor::<1>::from_data(
                    TensorData::new(case.logits.clone(), [case.logits.len()]),
                    (&Device::flex(), dtype),
                );
                case.logits = rounded.into_data().iter::<f64>().collect();
                let (want, want_gradient) = by_definition(&case);
                let (got, gradient) = run(&case, &device, dtype, row_stats);
                let (values, gradients) = (worst(&got, &want), worst(&gradient, &want_gradient));
                assert!(values < 1e-3, "{device:?} {dtype:?}: {values}");
                assert!(gradients < tolerance, "{device:?} {dtype:?}: {gradients}");
            }
        }
    }
}

#[test]
fn gradient_equals_finite_differences() {
    let eps = 1e-5;
    for mut case in cases()
        .into_iter()
        .filter(|case| case.v < 100 || case.k == case.v)
    {
        let (_, gradient) = run(&case, &Device::flex(), DType::F64, row_stats);
        let loss = |case: &Case| -> f64 {
            let (stats, _) = run(case, &Device::flex(), DType::F64, row_stats);
            // What stands for −∞ does not move, and would take the others' last digits.
            let moving = stats.iter().zip(&case.weights);
            moving
                .filter(|(s, _)| **s != EMPTY_NATS)
                .map(|(s, w)| s * w)
                .sum()
        };
        for i in (0..case.logits.len()).step_by(1 + case.logits.len() / 40) {
            let z = case.logits[i];
            if z == f64::NEG_INFINITY {
                assert_eq!(gradient[i], 0.0);
                continue;
            }
            case.logits[i] = z + eps;
            let up = loss(&case);
            case.logits[i] = z - eps;
            let down = loss(&case);
            case.logits[i] = z;
            let difference = (up - down) / (2.0 * eps);
            assert!(
                (difference - gradient[i]).abs() < 1e-8,
                "{difference} against {}",
                gradient[i]
            );
        }
    }
}

#[test]
fn buckets_sum_to_one_and_an_empty_tail_is_the_floor() {
    for case in cases() {
        let (stats, _) = run(&case, &Device::flex(), DType::F64, row_stats);
        for (row, stats) in stats.chunks(case.width()).enumerate() {
            if case.support[row * case.k] == i64::from(MASKED) {
                continue;
            }
            // What stands in an empty slot adds nothing.
            let mass: f64 = stats[..=case.k].iter().map(|log_q| log_q.exp()).sum();
            assert!((mass - 1.0).abs() < 1e-12, "{mass}");
            if case.k == case.v {
                assert_eq!(stats[case.k], TAIL_FLOOR_NATS);
            }
        }
    }
}

#[test]
fn a_tiny_tail_neither_overflows_nor_vanishes() {
    // The support token holds all but e^-200 of the mass: 1 − Σ would be 0.
    let mut case = case(1, 4, 1, Head::default(), Sum::Without);
    case.logits = vec![200.0, 0.0, 0.0, 0.0];
    case.support = vec![0];
    case.weights = vec![0.0, 1.0, 0.0];
    // At 200, an f32 is off by 8e-6 to begin with.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-14)] {
        let (stats, gradient) = run(&case, &Device::flex(), dtype, row_stats);
        assert!((stats[1] - (3f64.ln() - 200.0)).abs() < 1e-4, "{stats:?}");
        assert!(
            gradient
                .iter()
                .skip(1)
                .all(|g| (g - 1.0 / 3.0).abs() < tolerance),
            "{gradient:?}"
        );
    }
}

/// The gradient may be written over the logits, but not where somebody else holds them.
#[test]
fn logits_that_are_held_stay() {
    for (device, dtype, tolerance) in grounds() {
        for case in cases() {
            let floats = |values: &[f64], columns: usize| {
                let data = TensorData::new(values.to_vec(), [case.n, columns]);
                Tensor::<2>::from_data(data, (&device, dtype))
            };
            let logits_nv = floats(&case.logits, case.v);
            let support_nk = Tensor::<2, Int>::from_data(
                TensorData::new(case.support.clone(), [case.n, case.k]),
                &device,
            );
            let weights = floats(&case.weights, case.width());
            let before = numbers(logits_nv.clone());
            let (_, want) = by_definition(&case);
            let stats = row_stats(logits_nv.clone(), support_nk.clone(), &case.head, case.sum);
            let kept = logits_nv.clone();
            let held = row_gradient(
                logits_nv,
                support_nk.clone(),
                &stats,
                weights.clone(),
                &case.head,
            );
            let held = numbers(held);
            assert!(worst(&held, &want) <= tolerance);
            assert!(numbers(kept.clone()) == before, "{device:?}");
            let alone = row_gradient(kept, support_nk, &stats, weights, &case.head);
            assert!(numbers(alone) == held, "{device:?}");
        }
    }
}

/// Parts of larger tensors: rows that do not lie behind one another, and columns turned around.
#[test]
fn strided_tensors_are_read_as_what_they_are() {
    for (device, dtype, tolerance) in grounds() {
        // 64 numbers between, and a device may read the part where it lies.
        for (v, k, beside) in [(2051, 64, 2051), (2048, 9, 64), (2050, 9, 62)] {
            let case = case(5, v, k, Head::default(), Sum::Without);
            let (want, want_gradient) = by_definition(&case);
            let floats = |values: &[f64], columns: usize| {
                let data = TensorData::new(values.to_vec(), [case.n, columns]);
                Tensor::<2>::from_data(data, (&device, dtype))
            };
            let wide = |values: &[f64], columns: usize| {
                let beside = floats(&vec![3.0; case.n * beside], beside);
                Tensor::cat(
                    vec![beside.clone(), floats(values, columns), beside.clone()],
                    1,
                )
                .narrow(1, beside.dims()[1], columns)
            };
            let turned = |values: &[f64], columns: usize| {
                let turned = floats(values, columns).transpose() + 0.0;
                turned.transpose()
            };
            let support_nk = Tensor::<2, Int>::from_data(
                TensorData::new(case.support.clone(), [case.n, case.k]),
                &device,
            );
            let support_nk = (support_nk.transpose() + 0).transpose();
            for (logits_nv, weights) in [
                (wide(&case.logits, v), wide(&case.weights, case.width())),
                (turned(&case.logits, v), turned(&case.weights, case.width())),
            ] {
                let stats = row_stats(logits_nv.clone(), support_nk.clone(), &case.head, case.sum);
                assert!(worst(&numbers(stats.all()), &want) <= tolerance);
                let support_nk = support_nk.clone();
                let gradient = row_gradient(logits_nv, support_nk, &stats, weights, &case.head);
                assert!(worst(&numbers(gradient), &want_gradient) <= tolerance);
            }
        }
    }
}

/// More rows than WebGPU starts cubes along a dimension.
#[test]
fn many_rows() {
    let case = case(66_000, 6, 2, Head::default(), Sum::Without);
    let (want, want_gradient) = by_definition(&case);
    for (device, dtype, tolerance) in grounds() {
        let (got, gradient) = run(&case, &device, dtype, row_stats);
        assert!(worst(&got, &want) <= tolerance, "{device:?}");
        assert!(worst(&gradient, &want_gradient) <= tolerance, "{device:?}");
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    for (device, dtype, _) in grounds() {
        for case in cases() {
            let twice = [(); 2].map(|()| run(&case, &device, dtype, row_stats));
            assert!(twice[0] == twice[1], "{device:?}");
        }
    }
}

#[test]
fn rows_of_negative_infinity_pass_nothing_on() {
    let mut forms: Vec<_> = grounds()
        .into_iter()
        .map(|(device, dtype, _)| (device, dtype, row_stats as Form))
        .collect();
    forms.push((Device::flex(), DType::F64, row_stats_reference));
    for (device, dtype, form) in forms {
        let mut case = case(2, 40, 3, Head::default(), Sum::Without);
        case.logits[..40].fill(f64::NEG_INFINITY);
        case.support = vec![4, 0, 39, 4, 0, 39];
        let (stats, gradient) = run(&case, &device, dtype, form);
        let floor = TAIL_FLOOR_NATS;
        let want = [EMPTY_NATS, EMPTY_NATS, EMPTY_NATS, floor, EMPTY_NATS];
        assert!(worst(&stats[..5], &want) < 1e-6, "{:?}", &stats[..5]);
        assert!(gradient[..40].iter().all(|g| *g == 0.0), "{gradient:?}");
        assert!(gradient[40..].iter().any(|g| *g != 0.0));
    }
}

/// Whole stretches of −∞ before and behind what counts, in the support and outside.
#[test]
fn stretches_of_negative_infinity() {
    for (device, dtype, tolerance) in grounds() {
        let mut case = case(2, 4096, 4, Head::default(), Sum::Without);
        for row in case.logits.chunks_mut(4096) {
            row[..1500].fill(f64::NEG_INFINITY);
            row[1600..].fill(f64::NEG_INFINITY);
        }
        case.support = vec![3, 1501, 1502, 4000, 1599, 1600, 1500, 1499];
        let (want, want_gradient) = by_definition(&case);
        let (got, gradient) = run(&case, &device, dtype, row_stats);
        assert!(worst(&got, &want) <= tolerance, "{device:?}");
        assert!(worst(&gradient, &want_gradient) <= tolerance, "{device:?}");
    }
}

/// A logit that is no number shows in its row's statistics, and nowhere else.
#[test]
fn not_a_number_is_not_hidden() {
    for (device, dtype, _) in grounds() {
        for column in [3, 1500] {
            let mut case = case(2, 2048, 3, Head::default(), Sum::Without);
            case.support[..3].copy_from_slice(&[3, 9, 11]);
            case.logits[column] = f64::NAN;
            let (stats, gradient) = run(&case, &device, dtype, row_stats);
            // WGSL does not promise that it is kept.
            let wgsl = format!("{device:?}").contains("Wgpu");
            assert!(wgsl || stats[4].is_nan(), "{device:?}");
            assert!(stats[5..].iter().all(|s| !s.is_nan()), "{device:?}");
            assert!(gradient[2048..].iter().all(|g| !g.is_nan()), "{device:?}");
        }
    }
}

#[test]
fn a_masked_row_is_not_read() {
    for (device, dtype, _) in grounds() {
        let mut case = case(4, 2048, 3, Head::default(), Sum::WithLogQ);
        case.logits[3 * 2048..].fill(f64::NAN);
        let (stats, gradient) = run(&case, &device, dtype, row_stats);
        let (want, _) = by_definition(&case);
        assert!(worst(&stats, &want) < 5e-5, "{device:?}");
        assert!(gradient[3 * 2048..].iter().all(|g| *g == 0.0));
    }
}

/// As [`run`], on a backend by its type: past the device dispatch, hence without operator fusion
/// even where that is compiled in.
fn run_on<B: Backend + RowOps>(case: &Case, device: &B::Device) -> (Vec<f64>, Vec<f64>) {
    let floats = |values: &[f64], columns: usize| {
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        Autodiff::<B>::float_from_data(TensorData::new(values, [case.n, columns]), device)
    };
    let ids: Vec<i32> = case.support.iter().map(|&id| id as i32).collect();
    let support = B::int_from_data(TensorData::new(ids, [case.n, case.k]), device);
    let logits = floats(&case.logits, case.v).require_grad();
    let stats = <Autodiff<B> as RowOps>::row_stats(logits.clone(), support, case.head, case.sum);
    let weighted = Autodiff::<B>::float_mul(stats.clone(), floats(&case.weights, case.width()));
    let gradients = Autodiff::<B>::float_sum(weighted).backward();
    let read = |tensor| -> Vec<f64> {
        let data = try_read_sync(B::float_into_data(tensor)).unwrap().unwrap();
        data.iter::<f64>().collect()
    };
    (
        read(stats.into_primitive()),
        read(logits.grad(&gradients).unwrap()),
    )
}

fn compare_on<B: Backend + RowOps>(name: &str, device: &B::Device, tolerance: f64) {
    for case in cases() {
        let (want, want_gradient) = by_definition(&case);
        let (got, gradient) = run_on::<B>(&case, device);
        let (values, gradients) = (worst(&got, &want), worst(&gradient, &want_gradient));
        let (n, v, k) = (case.n, case.v, case.k);
        println!("{name} F32 n={n} v={v} k={k}: values {values:.1e}, gradient {gradients:.1e}");
        assert!(
            values <= tolerance && gradients <= tolerance,
            "{name} {n}×{v}, k={k}"
        );
    }
}

#[test]
fn plain_loops_by_backend_type() {
    compare_on::<Flex>("plain loops, no dispatch", &Default::default(), 5e-6);
}

#[cfg(feature = "cube")]
#[test]
fn kernel_without_fusion() {
    use burn_cubecl::{CubeBackend, CubeDevice};
    compare_on::<CubeBackend>(
        "kernel, no dispatch, no fusion",
        &CubeDevice::default(),
        5e-5,
    );
}

/// Where nobody else holds the logits, the gradient lies in their memory.
#[cfg(feature = "cube")]
#[test]
fn kernel_writes_over_the_logits() {
    use burn_cubecl::{CubeBackend, CubeDevice, tensor::CubeTensor};
    let device = CubeDevice::default();
    // Where it lies becomes known later; which it is does not change.
    let memory = |tensor: &CubeTensor| {
        let handle = format!("{:?}", tensor.handle);
        handle.split(", location").next().unwrap().to_owned()
    };
    for (n, v, k) in [(4, 2048, 64), (4, 2051, 64), (66_000, 8, 2)] {
        let case = case(n, v, k, Head::default(), Sum::Without);
        let floats = |values: &[f64], columns: usize| {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            CubeBackend::float_from_data(TensorData::new(values, [case.n, columns]), &device)
        };
        let ids: Vec<i32> = case.support.iter().map(|&id| id as i32).collect();
        let support = CubeBackend::int_from_data(TensorData::new(ids, [case.n, case.k]), &device);
        let weights = floats(&case.weights, case.width());
        let logits = floats(&case.logits, v);
        let stats = CubeBackend::row_stats(logits.clone(), support.clone(), case.head, case.sum);
        let of_logits = memory(&logits);
        let gradient = |logits| {
            let (support, stats, weights) = (support.clone(), stats.clone(), weights.clone());
            let gradient = CubeBackend::row_gradient(logits, support, stats, weights, case.head);
            let of_gradient = memory(&gradient);
            let data = try_read_sync(CubeBackend::float_into_data(gradient)).unwrap();
            (of_gradient, data.unwrap().iter::<f64>().collect::<Vec<_>>())
        };
        let (beside, values) = gradient(logits.clone());
        assert_ne!(beside, of_logits);
        assert!(worst(&values, &by_definition(&case).1) <= 5e-5);
        let (over, values_over) = gradient(logits);
        assert_eq!(over, of_logits);
        assert!(values_over == values, "{n}×{v}");
    }
}

#[cfg(feature = "cube")]
#[test]
fn kernel_equals_plain_loops() {
    let device = gpu();
    println!("device: {device:?}, fusion: {}", cfg!(feature = "fusion"));
    compare("kernel on the GPU", &device, DType::F32, row_stats, 5e-5);
    // Of longer rows, burn 0.22.1 gives wrong sums on llvmpipe.
    for case in cases().iter().filter(|case| case.v < 65_536) {
        let name = "tensor operations on the GPU";
        compare_case(name, case, &device, DType::F32, row_stats_reference, 1e-4);
    }
}
