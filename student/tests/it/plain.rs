//! Comparison of tensor functions with the same formula in plain f64 loops, and of their gradients with finite
//! differences of that formula.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(crate) type Rows = Vec<Vec<f64>>;

pub(crate) fn tensor(rows: &Rows, dtype: DType, device: &Device) -> Tensor<2> {
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, (device, dtype))
}

/// Creates an untracked tensor in f64 on the CPU.
pub(crate) fn constant(rows: &Rows) -> Tensor<2> {
    tensor(rows, DType::F64, &Device::flex())
}

pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Computes the value of `loss` at `x` and the gradient of Σ_r (r + 1)·value_r with respect to `x`.
pub(crate) fn value_and_gradient(
    x: &Rows,
    dtype: DType,
    loss: &impl Fn(Tensor<2>) -> Tensor<1>,
) -> (Vec<f64>, Vec<f64>) {
    let device = Device::flex().autodiff();
    let x_nk = tensor(x, dtype, &device).require_grad();
    let value_n = loss(x_nk.clone());
    let [n] = value_n.dims();
    let weights: Vec<f64> = (0..n).map(|row| row as f64 + 1.0).collect();
    let weights_n = Tensor::<1>::from_data(TensorData::new(weights, [n]), (&device, dtype));
    let gradients = (value_n.clone() * weights_n).sum().backward();
    let gradient = x_nk.grad(&gradients).unwrap();
    (numbers(value_n.inner()), numbers(gradient))
}

/// Compares `loss` with `reference` at `x`: values in f64 to 1e-12 and in f32 to 1e-5 (relative if above 1), and
/// gradients with central differences of the reference.
pub(crate) fn check(
    name: &str,
    x: &Rows,
    loss: impl Fn(Tensor<2>) -> Tensor<1>,
    reference: impl Fn(&Rows) -> Vec<f64>,
) {
    let (value, gradient) = value_and_gradient(x, DType::F64, &loss);
    near(&format!("{name}, value"), &value, &reference(x), 1e-12);
    let weighted = |x: &Rows| {
        let values = reference(x);
        let terms = values.iter().enumerate();
        terms.map(|(row, v)| (row as f64 + 1.0) * v).sum::<f64>()
    };
    let step = 1e-6;
    let mut slopes = Vec::new();
    for row in 0..x.len() {
        for column in 0..x[row].len() {
            let at = |by: f64| {
                let mut x = x.clone();
                x[row][column] += by;
                weighted(&x)
            };
            slopes.push((at(step) - at(-step)) / (2.0 * step));
        }
    }
    near(&format!("{name}, gradient"), &gradient, &slopes, 1e-7);
    let (value_f32, gradient_f32) = value_and_gradient(x, DType::F32, &loss);
    near(&format!("{name}, f32 value"), &value_f32, &value, 1e-5);
    near(
        &format!("{name}, f32 gradient"),
        &gradient_f32,
        &gradient,
        1e-5,
    );
}

pub(crate) fn near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * b.abs().max(1.0),
            "{what}: {a} for {b} at {i}"
        );
    }
}

pub(crate) fn random(n: usize, columns: usize, spread: f64, seed: u64) -> Rows {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut row = || {
        (0..columns)
            .map(|_| rng.random_range(-spread..spread))
            .collect()
    };
    (0..n).map(|_| row()).collect()
}

pub(crate) fn log_softmax(row: &[f64]) -> Vec<f64> {
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_z = largest + row.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
    row.iter().map(|z| z - log_z).collect()
}

pub(crate) fn log_softmaxes(rows: &Rows) -> Rows {
    rows.iter().map(|row| log_softmax(row)).collect()
}
