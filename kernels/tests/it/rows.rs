//! Row statistics: plain loops, CubeCL kernels and tensor operations agree in values and gradients.

use burn::backend::{Autodiff, Backend, Flex, ops::*};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, try_read_sync};
use potstill_kernels::{
    EMPTY_NATS, LogQSum, LogitTransform, MASKED, RowOps, TAIL_FLOOR_NATS, row_gradient, row_stats,
    row_stats_reference,
};

mod cases;

use cases::*;

#[test]
fn plain_loops_in_f64_agree_with_the_definitions() {
    compare("plain loops", &Device::flex(), DType::F64, row_stats, 1e-12);
}

/// The tolerance is 1e-8 because burn's tanh has a gradient of f32 accuracy even in f64, which the cases with a softcap
/// use.
#[test]
fn tensor_operations_in_f64_agree_with_the_definitions() {
    compare(
        "tensor operations",
        &Device::flex(),
        DType::F64,
        row_stats_reference,
        1e-8,
    );
}

#[test]
fn plain_loops_in_f32_agree_with_the_definitions() {
    compare("plain loops", &Device::flex(), DType::F32, row_stats, 5e-6);
}

#[test]
fn half_precision_results_are_within_rounding() {
    for (device, _, _) in devices() {
        // The logits are rounded before the comparison, so only the rounding of the gradient remains.
        for (dtype, tolerance) in [(DType::F16, 1e-3), (DType::BF16, 8e-3)] {
            if !device.supports_dtype(dtype) {
                println!("skipped: {device:?} has no {dtype:?}");
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
fn the_gradient_equals_finite_differences() {
    let eps = 1e-5;
    for mut case in cases()
        .into_iter()
        .filter(|case| case.v < 100 || case.k == case.v)
    {
        let (_, gradient) = run(&case, &Device::flex(), DType::F64, row_stats);
        let loss = |case: &Case| -> f64 {
            let (stats, _) = run(case, &Device::flex(), DType::F64, row_stats);
            // Statistics at the lower bound are constant and so large that the sum would lose digits of the others.
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
            // The exponential of an empty slot's log q is 0.
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
    let mut case = case(1, 4, 1, LogitTransform::default(), LogQSum::Omitted);
    case.logits = vec![200.0, 0.0, 0.0, 0.0];
    case.support = vec![0];
    case.weights = vec![0.0, 1.0, 0.0];
    // An f32 near 200 has a rounding error of 8e-6.
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

/// The gradient may be written over the logits only if their storage is not shared.
#[test]
fn logits_whose_storage_is_shared_are_not_overwritten() {
    for (device, dtype, tolerance) in devices() {
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
            let shared = logits_nv.clone();
            let gradient_beside = row_gradient(
                logits_nv,
                support_nk.clone(),
                &stats,
                weights.clone(),
                &case.head,
            );
            let gradient_beside = numbers(gradient_beside);
            assert!(worst(&gradient_beside, &want) <= tolerance);
            assert!(numbers(shared.clone()) == before, "{device:?}");
            let gradient_over = row_gradient(shared, support_nk, &stats, weights, &case.head);
            assert!(numbers(gradient_over) == gradient_beside, "{device:?}");
        }
    }
}

/// The inputs are slices of larger tensors, with gaps between their rows, and transposed tensors.
#[test]
fn strided_tensors_are_read_with_their_strides() {
    for (device, dtype, tolerance) in devices() {
        // With gaps of a multiple of 64 numbers, a device may read the slice without a copy.
        for (v, k, beside) in [(2051, 64, 2051), (2048, 9, 64), (2050, 9, 62)] {
            let case = case(5, v, k, LogitTransform::default(), LogQSum::Omitted);
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
            let transposed = |values: &[f64], columns: usize| {
                let transposed = floats(values, columns).transpose() + 0.0;
                transposed.transpose()
            };
            let support_nk = Tensor::<2, Int>::from_data(
                TensorData::new(case.support.clone(), [case.n, case.k]),
                &device,
            );
            let support_nk = (support_nk.transpose() + 0).transpose();
            for (logits_nv, weights) in [
                (wide(&case.logits, v), wide(&case.weights, case.width())),
                (
                    transposed(&case.logits, v),
                    transposed(&case.weights, case.width()),
                ),
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

/// The case has more rows than WebGPU allows cubes along a dimension.
#[test]
fn rows_beyond_one_launch_are_computed() {
    let case = case(66_000, 6, 2, LogitTransform::default(), LogQSum::Omitted);
    let (want, want_gradient) = by_definition(&case);
    for (device, dtype, tolerance) in devices() {
        let (got, gradient) = run(&case, &device, dtype, row_stats);
        assert!(worst(&got, &want) <= tolerance, "{device:?}");
        assert!(worst(&gradient, &want_gradient) <= tolerance, "{device:?}");
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    for (device, dtype, _) in devices() {
        for case in cases() {
            let twice = [(); 2].map(|()| run(&case, &device, dtype, row_stats));
            assert!(twice[0] == twice[1], "{device:?}");
        }
    }
}

#[test]
fn rows_of_negative_infinity_pass_no_gradient() {
    let mut forms: Vec<_> = devices()
        .into_iter()
        .map(|(device, dtype, _)| (device, dtype, row_stats as Form))
        .collect();
    forms.push((Device::flex(), DType::F64, row_stats_reference));
    for (device, dtype, form) in forms {
        let mut case = case(2, 40, 3, LogitTransform::default(), LogQSum::Omitted);
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

/// The rows begin and end with many logits of −∞, in the support and outside.
#[test]
fn blocks_of_negative_infinity_add_nothing() {
    for (device, dtype, tolerance) in devices() {
        let mut case = case(2, 4096, 4, LogitTransform::default(), LogQSum::Omitted);
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

#[test]
fn a_nan_logit_makes_the_statistics_of_its_row_nan_and_no_others() {
    for (device, dtype, _) in devices() {
        for column in [3, 1500] {
            let mut case = case(2, 2048, 3, LogitTransform::default(), LogQSum::Omitted);
            case.support[..3].copy_from_slice(&[3, 9, 11]);
            case.logits[column] = f64::NAN;
            let (stats, gradient) = run(&case, &device, dtype, row_stats);
            // WGSL does not guarantee that NaN is preserved.
            let wgsl = format!("{device:?}").contains("Wgpu");
            assert!(wgsl || stats[4].is_nan(), "{device:?}");
            assert!(stats[5..].iter().all(|s| !s.is_nan()), "{device:?}");
            assert!(gradient[2048..].iter().all(|g| !g.is_nan()), "{device:?}");
        }
    }
}

#[test]
fn a_masked_row_is_not_read() {
    for (device, dtype, _) in devices() {
        let mut case = case(4, 2048, 3, LogitTransform::default(), LogQSum::Included);
        case.logits[3 * 2048..].fill(f64::NAN);
        let (stats, gradient) = run(&case, &device, dtype, row_stats);
        let (want, _) = by_definition(&case);
        assert!(worst(&stats, &want) < 5e-5, "{device:?}");
        assert!(gradient[3 * 2048..].iter().all(|g| *g == 0.0));
    }
}

/// Computes the results of [`run`] on a backend type directly, without the device dispatch and so without operator
/// fusion.
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
fn plain_loops_without_dispatch_agree_with_the_definitions() {
    compare_on::<Flex>("plain loops, no dispatch", &Default::default(), 5e-6);
}

#[cfg(feature = "cube")]
#[test]
fn kernels_without_fusion_agree_with_the_definitions() {
    use burn_cubecl::{CubeBackend, CubeDevice};
    compare_on::<CubeBackend>(
        "kernels, no dispatch, no fusion",
        &CubeDevice::default(),
        5e-5,
    );
}

/// If the logits' storage is not shared, the gradient is in their memory.
#[cfg(feature = "cube")]
#[test]
fn the_kernel_writes_over_the_logits() {
    use burn_cubecl::{CubeBackend, CubeDevice, tensor::CubeTensor};
    let device = CubeDevice::default();
    // The location of a buffer is assigned later; the rest of the handle identifies the buffer.
    let memory = |tensor: &CubeTensor| {
        let handle = format!("{:?}", tensor.handle);
        handle.split(", location").next().unwrap().to_owned()
    };
    for (n, v, k) in [(4, 2048, 64), (4, 2051, 64), (66_000, 8, 2)] {
        let case = case(n, v, k, LogitTransform::default(), LogQSum::Omitted);
        let floats = |values: &[f64], columns: usize| {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            CubeBackend::float_from_data(TensorData::new(values, [case.n, columns]), &device)
        };
        let ids: Vec<i32> = case.support.iter().map(|&id| id as i32).collect();
        let support = CubeBackend::int_from_data(TensorData::new(ids, [case.n, case.k]), &device);
        let weights = floats(&case.weights, case.width());
        let logits = floats(&case.logits, v);
        let stats = CubeBackend::row_stats(logits.clone(), support.clone(), case.head, case.sum);
        let logits_memory = memory(&logits);
        let gradient = |logits| {
            let (support, stats, weights) = (support.clone(), stats.clone(), weights.clone());
            let gradient = CubeBackend::row_gradient(logits, support, stats, weights, case.head);
            let gradient_memory = memory(&gradient);
            let data = try_read_sync(CubeBackend::float_into_data(gradient)).unwrap();
            (
                gradient_memory,
                data.unwrap().iter::<f64>().collect::<Vec<_>>(),
            )
        };
        let (beside, values) = gradient(logits.clone());
        assert_ne!(beside, logits_memory);
        assert!(worst(&values, &by_definition(&case).1) <= 5e-5);
        let (over, values_over) = gradient(logits);
        assert_eq!(over, logits_memory);
        assert!(values_over == values, "{n}×{v}");
    }
}

#[cfg(feature = "cube")]
#[test]
fn kernels_and_tensor_operations_on_the_gpu_agree_with_the_definitions() {
    let device = gpu();
    println!("device: {device:?}, fusion: {}", cfg!(feature = "fusion"));
    compare("kernels on the GPU", &device, DType::F32, row_stats, 5e-5);
    // burn 0.22.1 computes wrong sums of longer rows on llvmpipe.
    for case in cases().iter().filter(|case| case.v < 65_536) {
        let name = "tensor operations on the GPU";
        compare_case(name, case, &device, DType::F32, row_stats_reference, 1e-4);
    }
}
