//! Row statistics: plain loops, CubeCL kernel and tensor operations agree, values and gradients.

use burn::backend::{Autodiff, Backend, Flex, ops::*};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, try_read_sync};
use potstill_kernels::{
    EMPTY_NATS, Head, MASKED, RowOps, Sum, TAIL_FLOOR_NATS, row_gradient, row_stats,
    row_stats_reference,
};

mod cases;

use cases::*;

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
