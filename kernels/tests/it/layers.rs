//! The ops of layers in f32 are compared with the same formulas in f64: values and gradients, on ragged shapes, with
//! each choice of frozen operands, on one thread and on several.

mod half;
mod moments;
mod slopes;

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::{
    AdamStep, AttentionOptions, GateActivation, adamw, adamw_reference, add_bias, add_rows,
    attention, attention_reference, gated, gated_linear, gated_reference, linear, linear_biased,
    linear_pair, rms_norm, rms_norm_as, rms_norm_reference, rotary, rotary_reference,
    sum_of_squares,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// An op on matrices; a closure holds its other arguments.
type Op<'a> = &'a (dyn Fn(Vec<Tensor<2>>) -> Tensor<2> + Send + Sync);

fn random(shape: [usize; 2], seed: u64) -> TensorData {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape[0] * shape[1])
        .map(|_| f64::from(generator.random_range(-2.0f32..2.0)))
        .collect();
    TensorData::new(values, shape)
}

/// Computes the output, and the gradient of Σ output · weights with respect to each tracked input.
fn run(op: Op<'_>, shapes: &[[usize; 2]], tracked: &[bool], dtype: DType) -> Vec<Option<Vec<f64>>> {
    let device = Device::flex().autodiff();
    let inputs: Vec<Tensor<2>> = shapes
        .iter()
        .zip(tracked)
        .enumerate()
        .map(|(index, (shape, tracked))| {
            let data = random(*shape, index as u64);
            if *tracked {
                Tensor::from_data(data, (&device, dtype)).require_grad()
            } else {
                Tensor::from_data(data, (&Device::flex(), dtype))
            }
        })
        .collect();
    let output = op(inputs.clone());
    let weights = Tensor::<2>::from_data(random(output.dims(), 99), (&Device::flex(), dtype));
    let mut found = vec![Some(host(output.clone().inner()))];
    if tracked.contains(&true) {
        let mut gradients = (output * Tensor::from_inner(weights)).sum().backward();
        found.extend(inputs.iter().zip(tracked).map(|(input, tracked)| {
            tracked.then(|| host(input.grad_remove(&mut gradients).unwrap()))
        }));
    }
    found
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.try_into_vec_as::<f64>().unwrap()
}

/// Returns the largest difference, relative to the largest number of the same result.
fn difference(found: &[Option<Vec<f64>>], exact: &[Option<Vec<f64>>]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let mut worst = 0.0f64;
    for (found, exact) in found.iter().flatten().zip(exact.iter().flatten()) {
        assert_eq!(found.len(), exact.len());
        let size = exact.iter().fold(1.0f64, |size, x| size.max(x.abs()));
        for (found, exact) in found.iter().zip(exact) {
            assert!(found.is_finite());
            worst = worst.max((found - exact).abs() / size);
        }
    }
    worst
}

/// Asserts that `op` in f32 is within `tolerance` of `exact` in f64 for every choice of frozen inputs, and that it gives
/// the same bits on other numbers of threads.
fn check(what: &str, op: Op<'_>, exact: Op<'_>, shapes: &[[usize; 2]], tolerance: f64) {
    for choice in 0..1 << shapes.len() {
        let tracked: Vec<bool> = (0..shapes.len())
            .map(|input| choice >> input & 1 == 1)
            .collect();
        let found = run(op, shapes, &tracked, DType::F32);
        let wide = run(exact, shapes, &tracked, DType::F64);
        let worst = difference(&found, &wide);
        assert!(
            worst < tolerance,
            "{what} {shapes:?} {tracked:?}: {worst:e}"
        );
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let again = pool.install(|| run(op, shapes, &tracked, DType::F32));
            assert!(
                again == found,
                "{what} {shapes:?} differs on {threads} threads"
            );
        }
    }
}

#[test]
fn linear_layers_equal_matrix_products_in_f64() {
    for [n, width, columns] in [
        [1, 7, 5],
        [2, 64, 48],
        [4, 33, 9],
        [5, 100, 17],
        [40, 12, 130],
        [300, 65, 97],
    ] {
        let op: Op = &|mut inputs| {
            let weight = inputs.pop().unwrap();
            linear(inputs.pop().unwrap(), weight)
        };
        let exact: Op = &|mut inputs| {
            let weight = inputs.pop().unwrap();
            inputs.pop().unwrap().matmul(weight.transpose())
        };
        check("linear", op, exact, &[[n, width], [columns, width]], 3e-6);
    }
}

#[test]
fn a_row_of_a_linear_layer_does_not_depend_on_the_other_rows() {
    let device = Device::flex();
    let weight = Tensor::<2>::from_data(random([200, 90], 1), (&device, DType::F32));
    let x = Tensor::<2>::from_data(random([300, 90], 2), (&device, DType::F32));
    let all = linear(x.clone(), weight.clone());
    for (start, rows) in [(0, 1), (17, 2), (100, 5), (203, 97), (299, 1)] {
        let part = linear(x.clone().slice(start..start + rows), weight.clone());
        assert_eq!(host(part), host(all.clone().slice(start..start + rows)));
    }
}

#[test]
fn a_pair_of_linear_layers_equals_two_single_ones() {
    for (n, dtype) in [
        (1, DType::F32),
        (3, DType::F32),
        (70, DType::F32),
        (9, DType::BF16),
    ] {
        let single = |i: Vec<Tensor<2>>| {
            let outputs = [&i[1], &i[2]].map(|weight| linear(i[0].clone(), weight.clone()));
            Tensor::cat(outputs.to_vec(), 1)
        };
        let pair = |i: Vec<Tensor<2>>| {
            let outputs = linear_pair(i[0].clone(), [i[1].clone(), i[2].clone()]);
            Tensor::cat(outputs.to_vec(), 1)
        };
        let shapes = [[n, 33], [100, 33], [7, 33]];
        for tracked in [
            [true, true, true],
            [true, false, true],
            [false, true, false],
        ] {
            let found = run(&pair, &shapes, &tracked, dtype);
            assert_eq!(
                found,
                run(&single, &shapes, &tracked, dtype),
                "{n} {dtype:?}"
            );
        }
    }
}

/// The first row of a matrix as a vector.
fn vector(matrix: &Tensor<2>) -> Tensor<1> {
    matrix.clone().flatten(0, 1)
}

#[test]
fn biased_linear_layers_equal_the_formula_in_f64() {
    for [n, width, columns] in [[1, 7, 5], [5, 33, 9], [300, 12, 333], [40, 5, 1]] {
        let op: Op = &|i| linear_biased(i[0].clone(), i[1].clone(), Some(vector(&i[2])));
        let exact: Op = &|i| i[0].clone().matmul(i[1].clone().transpose()) + i[2].clone();
        let shapes = [[n, width], [columns, width], [1, columns]];
        check("linear_biased", op, exact, &shapes, 3e-6);
    }
}

#[test]
fn a_shared_tensor_is_not_changed_in_place() {
    let tensor =
        |shape, seed| Tensor::<2>::from_data(random(shape, seed), (&Device::flex(), DType::F32));
    let (x, angles) = (tensor([5, 24], 1), tensor([5, 4], 2));
    let shared = x.clone();
    let sum = add_bias(shared.clone(), vector(&tensor([1, 24], 3)));
    let rotated = rotary(shared, angles.clone(), angles, 8);
    assert_eq!(host(x), host(tensor([5, 24], 1)));
    assert!(host(sum) != host(tensor([5, 24], 1)) && host(rotated) != host(tensor([5, 24], 1)));
}

#[test]
fn norms_equal_the_formula_in_f64() {
    for [n, d] in [[1, 1], [3, 7], [5, 64], [130, 33], [70, 576]] {
        for offset in [0.0, 1.0] {
            let op: Op = &|i| rms_norm(i[0].clone(), vector(&i[1]), 1e-5, offset);
            let exact: Op = &|i| rms_norm_reference(i[0].clone(), vector(&i[1]), 1e-5, offset);
            check("rms_norm", op, exact, &[[n, d], [1, d]], 3e-6);
        }
    }
}

/// Activations whose kinks are within the range of [`random`].
const ACTIVATIONS: [GateActivation; 3] = [
    GateActivation::Silu,
    GateActivation::GeluTanh,
    GateActivation::ClampedSwish {
        alpha: 1.702,
        limit: 1.25,
    },
];

#[test]
fn gated_activations_equal_the_formulas_in_f64() {
    for activation in ACTIVATIONS {
        for [n, w] in [[1, 1], [3, 7], [130, 333]] {
            let op: Op = &|i| gated(i[0].clone(), i[1].clone(), activation);
            let exact: Op = &|i| gated_reference(i[0].clone(), i[1].clone(), activation);
            let what = format!("{activation:?}");
            check(&what, op, exact, &[[n, w], [n, w]], 2e-6);
            let op: Op = &|i| gated_linear(i[0].clone(), i[1].clone(), i[2].clone(), activation);
            let exact: Op = &|i| {
                let x = gated_reference(i[0].clone(), i[1].clone(), activation);
                x.matmul(i[2].clone().transpose())
            };
            let what = format!("{activation:?}, linear");
            check(&what, op, exact, &[[n, w], [n, w], [12, w]], 3e-6);
        }
    }
}

/// Closed forms of the activations, at numbers where they saturate too.
#[test]
fn gated_activations_are_finite_and_right_far_from_zero() {
    let gates = [-1e30f64, -200.0, -9.0, -1.0, 0.0, 1.0, 9.0, 200.0];
    let ups = [3.0f64, -8.0, 0.5, 2.0, 1.0, -1.0, 7.5, -0.25];
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for activation in ACTIVATIONS {
        let row = |numbers: [f64; 8]| {
            let data = TensorData::new(numbers.to_vec(), [1, 8]);
            Tensor::<2>::from_data(data, (&Device::flex(), DType::F32))
        };
        let found = host(gated(row(gates), row(ups), activation));
        for (found, (gate, up)) in found.into_iter().zip(gates.into_iter().zip(ups)) {
            let exact = match activation {
                GateActivation::Silu => gate * sigmoid(gate) * up,
                GateActivation::GeluTanh => {
                    let argument =
                        (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                    0.5 * gate * (1.0 + argument.tanh()) * up
                }
                GateActivation::ClampedSwish { alpha, limit } => {
                    let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
                    (up + 1.0) * gate * sigmoid(alpha * gate)
                }
            };
            let error = (found - exact).abs() / exact.abs().max(1.0);
            assert!(error < 1e-6, "{activation:?} of {gate}, {up}: {found}");
        }
    }
}

#[test]
fn rotary_positions_equal_the_formula_in_f64() {
    for [n, heads, f, width] in [
        [1, 1, 1, 2],
        [5, 3, 4, 8],
        [150, 9, 32, 64],
        [5, 3, 4, 11],
        [70, 2, 3, 32],
    ] {
        let angles = |function: fn(f64) -> f64, like: &Tensor<2>| {
            let values: Vec<f64> = (0..n * f).map(|i| function(i as f64 * 0.37)).collect();
            let data = TensorData::new(values, [n, f]);
            Tensor::<2>::from_data(data, (&Device::flex(), like.dtype()))
        };
        let op: Op = &|i| {
            let (cos, sin) = (angles(f64::cos, &i[0]), angles(f64::sin, &i[0]));
            rotary(i[0].clone(), cos, sin, width)
        };
        let exact: Op = &|i| {
            let (cos, sin) = (angles(f64::cos, &i[0]), angles(f64::sin, &i[0]));
            rotary_reference(i[0].clone(), cos, sin, width)
        };
        check("rotary", op, exact, &[[n, heads * width]], 1e-6);
    }
}

#[test]
fn attention_within_documents_equals_the_formula_in_f64() {
    let plain = AttentionOptions {
        heads: 6,
        key_heads: 2,
        scale: 8f64.powf(-0.5),
        softcap: None,
        window: None,
    };
    let kinds = [
        plain,
        AttentionOptions {
            softcap: Some(1.5),
            ..plain
        },
        AttentionOptions {
            window: Some(5),
            ..plain
        },
        AttentionOptions {
            softcap: Some(2.0),
            window: Some(140),
            scale: 0.2,
            ..plain
        },
        AttentionOptions {
            key_heads: 6,
            ..plain
        },
    ];
    for options in kinds {
        for documents in [
            vec![1],
            vec![9],
            vec![3, 1, 40],
            vec![260],
            vec![130, 0, 129, 1],
        ] {
            let n = documents.iter().sum();
            let exact_documents: Vec<usize> =
                documents.iter().copied().filter(|d| *d > 0).collect();
            let op: Op = &|inputs| {
                let [q, k, v] = inputs.try_into().unwrap();
                attention(q, k, v, None, &documents, &options)
            };
            let exact: Op = &|inputs| {
                let [q, k, v] = inputs.try_into().unwrap();
                attention_reference(q, k, v, None, &exact_documents, &options)
            };
            let keys = [n, options.key_heads * 8];
            check("attention", op, exact, &[[n, 48], keys, keys], 1e-5);
        }
    }
}

#[test]
fn attention_with_sinks_and_other_value_widths_equals_the_formula_in_f64() {
    let documents = [3, 1, 140];
    let n = documents.iter().sum();
    for (key_heads, value_width, softcap, window) in [
        (2, 8, None, None),
        (2, 5, None, Some(5)),
        (6, 1, Some(1.5), None),
        (1, 19, None, None),
    ] {
        let options = AttentionOptions {
            heads: 6,
            key_heads,
            scale: 8f64.powf(-0.5),
            softcap,
            window,
        };
        let op: Op = &|i| {
            let sinks = Some(vector(&i[3]));
            let [q, k, v] = [0, 1, 2].map(|input| i[input].clone());
            attention(q, k, v, sinks, &documents, &options)
        };
        let exact: Op = &|i| {
            let sinks = Some(vector(&i[3]));
            let [q, k, v] = [0, 1, 2].map(|input| i[input].clone());
            attention_reference(q, k, v, sinks, &documents, &options)
        };
        let shapes = [
            [n, 48],
            [n, key_heads * 8],
            [n, key_heads * value_width],
            [1, 6],
        ];
        check("attention with sinks", op, exact, &shapes, 1e-5);
    }
}

/// Without tracked inputs the reference uses burn's own attention, which must agree with the one that computes scores.
#[test]
fn the_reference_without_gradients_equals_the_reference_with_gradients() {
    let options = AttentionOptions {
        heads: 4,
        key_heads: 2,
        scale: 0.5,
        softcap: None,
        window: None,
    };
    let inputs: Vec<Tensor<2>> = [[30, 16], [30, 8], [30, 8]]
        .into_iter()
        .map(|shape| Tensor::from_data(random(shape, 5), (&Device::flex(), DType::F64)))
        .collect();
    let [q, k, v] = inputs.try_into().unwrap();
    let tracked = Tensor::from_inner(q.clone()).require_grad();
    let with = attention_reference(tracked, k.clone(), v.clone(), None, &[13, 17], &options);
    let without = attention_reference(q, k, v, None, &[13, 17], &options);
    let pairs = host(with.inner()).into_iter().zip(host(without));
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn adamw_steps_and_sums_of_squares_equal_the_formulas_in_f64() {
    for shape in [[1, 1], [7, 33], [300, 500]] {
        let run = |dtype| {
            let tensor =
                |seed| Tensor::<2>::from_data(random(shape, seed), (&Device::flex(), dtype));
            let mut theta = tensor(1);
            let mut moments = [tensor(2).zeros_like(), tensor(2).zeros_like()];
            for t in 1..=4 {
                let step = AdamStep {
                    betas: (0.9, 0.999),
                    epsilon: 1e-8,
                    learning_rate: 1e-2,
                    weight_decay: 0.1,
                    step: t,
                    scale: 0.7,
                };
                let gradient = tensor(10 + t);
                (theta, moments) = match dtype {
                    DType::F32 => adamw(theta, gradient, moments, &step),
                    _ => adamw_reference(theta, gradient, moments, &step),
                };
            }
            let [m, v] = moments;
            let squares = sum_of_squares(tensor(3));
            (
                vec![Some(host(theta)), Some(host(m)), Some(host(v))],
                squares,
            )
        };
        let ((found, squares), (exact, exact_squares)) = (run(DType::F32), run(DType::F64));
        assert!(difference(&found, &exact) < 2e-6);
        assert!((squares / exact_squares - 1.0).abs() < 1e-12);
    }
}

#[test]
fn rows_are_added_to_the_rows_with_their_ids() {
    let device = Device::flex();
    let (sum, rows) = (random([7, 5], 0), random([6, 5], 1));
    let ids = [3, 0, 3, 6, 3, 0];
    let [table, added]: [Vec<f64>; 2] =
        [&sum, &rows].map(|data| data.clone().try_into_vec::<f64>().unwrap());
    let mut exact = table;
    for (row, id) in ids.into_iter().enumerate() {
        for column in 0..5 {
            exact[id * 5 + column] += added[row * 5 + column];
        }
    }
    for (dtype, tolerance) in [
        (DType::F64, 1e-15),
        (DType::F32, 1e-6),
        (DType::BF16, 5e-2),
        (DType::F16, 1e-2),
    ] {
        let tensor = |data: &TensorData| Tensor::<2>::from_data(data.clone(), (&device, dtype));
        let found = host(add_rows(tensor(&sum), &ids, tensor(&rows)));
        let worst = found.iter().zip(&exact).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0, f64::max);
        assert!(worst <= tolerance, "{dtype:?}: {worst}");
        // A sum whose storage is shared is copied, not changed.
        let shared = tensor(&sum);
        let _ = add_rows(shared.clone(), &ids, tensor(&rows));
        assert_eq!(host(shared), host(tensor(&sum)), "{dtype:?}");
    }
}
