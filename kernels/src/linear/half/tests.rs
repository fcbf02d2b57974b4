use burn::tensor::{DType, Device, Tensor, TensorData};

use super::*;
use crate::test_numbers::bf16_numbers;
use crate::{
    linear, linear_input_gradient, linear_into, linear_weight_gradient, linear_weight_gradient_f32,
};

fn numbers(shape: [usize; 2], seed: u64) -> TensorData {
    TensorData::new(bf16_numbers(shape[0] * shape[1], seed), shape)
}

/// The rows of a matrix in f64.
struct ExactMatrix(Vec<Vec<f64>>);

impl ExactMatrix {
    fn new(data: &TensorData) -> Self {
        let values: Vec<f64> = data.iter::<f64>().collect();
        let columns = data.shape()[1];
        Self(values.chunks(columns).map(<[f64]>::to_vec).collect())
    }

    fn transposed(&self) -> Self {
        let columns = 0..self.0[0].len();
        Self(
            columns
                .map(|j| self.0.iter().map(|row| row[j]).collect())
                .collect(),
        )
    }

    /// Asserts that `found` is within rounding of `start` + self · otherᵀ: half a unit in the last place of bf16, plus
    /// the roundings of a sum of these magnitudes in f32.
    fn check(&self, other: &Self, start: Option<&Self>, found: Tensor<2>, what: &str) {
        assert_eq!(found.dtype(), DType::BF16, "{what}");
        assert_eq!(found.dims(), [self.0.len(), other.0.len()], "{what}");
        let found = Self::new(&found.into_data());
        for (i, a) in self.0.iter().enumerate() {
            for (j, b) in other.0.iter().enumerate() {
                let start = start.map_or(0.0, |start| start.0[i][j]);
                let products = || a.iter().zip(b).map(|(a, b)| a * b);
                let exact = start + products().sum::<f64>();
                let size = start.abs() + products().map(f64::abs).sum::<f64>();
                let sum_error = (a.len() + 1) as f64 * 2f64.powi(-24) * size;
                let binade = (exact.abs() + sum_error).max(1e-30).log2().floor();
                let error = (found.0[i][j] - exact).abs();
                assert!(
                    error <= (binade - 8.0).exp2() + sum_error,
                    "{what}, element {i}, {j}: {} for {exact}",
                    found.0[i][j]
                );
            }
        }
    }
}

/// Each choice of tracked operands is tested on one thread and on three.
#[test]
fn linear_layers_and_their_gradients_are_within_rounding() {
    for [n, width, columns] in [
        [1, 7, 5],
        [2, 64, 48],
        [4, 33, 9],
        [5, 100, 17],
        [40, 13, 130],
        [70, 65, 97],
        [300, 35, 101],
    ] {
        let [x, weight, dy] = [[n, width], [columns, width], [n, columns]].map(|shape| {
            let data = numbers(shape, shape[0] as u64);
            (ExactMatrix::new(&data), data)
        });
        let mut first: Option<TensorData> = None;
        for choice in 0..8 {
            let (track_x, track_weight) = (choice & 1 == 1, choice & 2 == 2);
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(if choice & 4 == 4 { 3 } else { 1 })
                .build()
                .unwrap();
            let tensor = |data: &TensorData, tracked: bool| {
                let options = (&Device::flex(), DType::BF16);
                let inner = Tensor::<2>::from_data(data.clone(), options);
                if tracked {
                    Tensor::from_inner(inner).require_grad()
                } else {
                    inner
                }
            };
            let inputs = [tensor(&x.1, track_x), tensor(&weight.1, track_weight)];
            let run = || {
                let y = linear(inputs[0].clone(), inputs[1].clone());
                let found = y.clone().inner();
                let gradients = (track_x || track_weight).then(|| {
                    let mut gradients = (y * tensor(&dy.1, true).detach()).sum().backward();
                    let mut take = |index: usize, tracked: bool| {
                        tracked.then(|| inputs[index].grad_remove(&mut gradients).unwrap())
                    };
                    (take(0, track_x), take(1, track_weight))
                });
                (found, gradients)
            };
            let (y, gradients) = pool.install(run);
            let what = format!("{n} {width} {columns}, {choice}");
            x.0.check(&weight.0, None, y.clone(), &what);
            if let Some((dx, dw)) = gradients {
                if let Some(dx) = dx {
                    dy.0.check(&weight.0.transposed(), None, dx, &what);
                }
                if let Some(dw) = dw {
                    dy.0.transposed().check(&x.0.transposed(), None, dw, &what);
                }
            }
            let y = y.into_data();
            assert!(first.as_ref().is_none_or(|first| *first == y), "{what}");
            first = Some(y);
        }
        let plain = |data: &TensorData| {
            Tensor::<2>::from_data(data.clone(), (&Device::flex(), DType::BF16))
        };
        let dx = linear_input_gradient(plain(&dy.1), plain(&weight.1));
        dy.0.check(&weight.0.transposed(), None, dx, "dx");
        let (dy_t, x_t) = (dy.0.transposed(), x.0.transposed());
        let dw = linear_weight_gradient(plain(&dy.1), plain(&x.1), None);
        dy_t.check(&x_t, None, dw, "dW");
        let sum = Some(plain(&weight.1));
        let dw = linear_weight_gradient(plain(&dy.1), plain(&x.1), sum);
        dy_t.check(&x_t, Some(&weight.0), dw, "dW added to a sum");
    }
}

#[test]
fn a_sum_that_is_not_shared_is_updated_in_place() {
    let tensor = |shape, seed| FlexTensor::from_data(numbers(shape, seed));
    let (dy, x) = (tensor([9, 4], 1), tensor([9, 5], 2));
    let sum = tensor([4, 5], 3);
    let address = sum.bytes().as_ptr();
    let updated = add_transposed_product(sum, &dy, &x);
    assert_eq!(updated.bytes().as_ptr(), address);
    let shared = tensor([4, 5], 3);
    let before = shared.bytes().to_vec();
    let updated = add_transposed_product(shared.clone(), &dy, &x);
    assert_eq!(shared.bytes(), before);
    assert_ne!(updated.bytes(), before);
}

#[test]
fn weight_gradients_in_f32_are_not_rounded() {
    let tensor =
        |shape, seed, dtype| Tensor::<2>::from_data(numbers(shape, seed), (&Device::flex(), dtype));
    for [n, width, columns] in [[1, 7, 5], [40, 13, 130], [300, 35, 101]] {
        let (dy, x) = ([n, columns], [n, width]);
        let gradient = |sum: Option<Tensor<2>>| {
            linear_weight_gradient_f32(tensor(dy, 1, DType::BF16), tensor(x, 2, DType::BF16), sum)
        };
        let first = gradient(None);
        assert_eq!(first.dtype(), DType::F32);
        let exact = tensor(dy, 1, DType::F64)
            .transpose()
            .matmul(tensor(x, 2, DType::F64));
        for (found, times) in [(first.clone(), 1.0), (gradient(Some(first)), 2.0)] {
            let difference = found.cast(DType::F64) - exact.clone() * times;
            let worst: f64 = difference.abs().max().into_scalar();
            let size: f64 = exact.clone().abs().max().into_scalar();
            assert!(worst < 1e-6 * size.max(1.0) * n as f64, "{n}: {worst}");
        }
    }
}

#[test]
fn a_product_reuses_the_memory_of_a_buffer_that_fits() {
    let tensor = |shape, seed| FlexTensor::from_data(numbers(shape, seed));
    let (x, weight) = (tensor([9, 40], 1), tensor([17, 40], 2));
    let expected = forward(&x, &weight);
    let mut buffer = tensor([9, 17], 3);
    let address = buffer.bytes().as_ptr();
    forward_into(&mut buffer, &x, &weight);
    assert_eq!(buffer.bytes().as_ptr(), address);
    assert_eq!(buffer.bytes(), expected.bytes());
    // A buffer of another shape, or a shared one, is not written to.
    let device = Device::flex();
    let plain = |shape: [usize; 2], seed| {
        Tensor::<2>::from_data(numbers(shape, seed), (&device, DType::BF16))
    };
    let y = linear(plain([9, 40], 1), plain([17, 40], 2)).into_data();
    let shared = plain([9, 17], 3);
    for buffer in [plain([9, 16], 3), plain([9, 17], 3), shared.clone()] {
        let found = linear_into(Some(buffer), plain([9, 40], 1), plain([17, 40], 2));
        assert_eq!(found.into_data(), y);
    }
    assert_eq!(shared.into_data(), plain([9, 17], 3).into_data());
}
