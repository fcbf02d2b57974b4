//! AdamW with masters, and with moments in bf16 and in 8 bits.

use burn::tensor::{DType, Device, Tensor};
use potstill_kernels::{
    AdamStep, BLOCK, ByteMoment, adamw, adamw_8bit, adamw_8bit_reference, adamw_master,
    dynamic_codes,
};

use super::{host, random};

fn step(t: u64) -> AdamStep {
    AdamStep {
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        learning_rate: 1e-2,
        weight_decay: 0.1,
        step: t,
        scale: 0.7,
    }
}

fn tensor(shape: [usize; 2], seed: u64) -> Tensor<2> {
    Tensor::from_data(random(shape, seed), (&Device::flex(), DType::F32))
}

fn zeros(shape: [usize; 2], dtype: DType) -> [Tensor<2>; 2] {
    [0, 1].map(|_| Tensor::zeros(shape, (&Device::flex(), dtype)))
}

#[test]
fn a_master_is_updated_as_an_f32_parameter_and_its_parameter_is_rounded_from_it() {
    let shape = [37, 53];
    for dtype in [DType::F32, DType::BF16] {
        let (mut theta, mut moments) = (tensor(shape, 1), zeros(shape, dtype));
        let (mut master, mut master_moments) = (theta.clone(), moments.clone());
        let mut parameter = theta.clone().cast(DType::BF16);
        for t in 1..=4 {
            let gradient = tensor(shape, 10 + t);
            (theta, moments) = adamw(theta, gradient.clone(), moments, &step(t));
            (parameter, master, master_moments) =
                adamw_master(parameter, master, gradient, master_moments, &step(t));
        }
        assert_eq!(host(master.clone()), host(theta));
        let rounded = host(master.cast(DType::BF16).cast(DType::F32));
        assert_eq!(host(parameter.cast(DType::F32)), rounded);
    }
}

/// Moves a parameter by 20 steps, and returns how far the mean of |Δ − Δ₃₂| is from 0 as a share of the mean of |Δ₃₂|, where
/// Δ₃₂ is the change with f32 moments.
fn error_of(narrow: &dyn Fn(Tensor<2>, &[Tensor<2>]) -> Tensor<2>) -> f64 {
    let shape = [60, 100];
    let start = tensor(shape, 1);
    // Gradients with a direction, and rows of very different sizes.
    let direction = tensor(shape, 2);
    let sizes = tensor([60, 1], 3).exp();
    let gradients: Vec<Tensor<2>> = (0..20)
        .map(|t| (tensor(shape, 10 + t) + direction.clone()) * sizes.clone())
        .collect();
    let (mut theta, mut moments) = (start.clone(), zeros(shape, DType::F32));
    for (t, gradient) in (1..).zip(&gradients) {
        (theta, moments) = adamw(theta, gradient.clone(), moments, &step(t));
    }
    let found = host(narrow(start.clone(), &gradients) - start.clone());
    let exact = host(theta - start);
    let wrong: f64 = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).sum();
    wrong / exact.iter().map(|x| x.abs()).sum::<f64>()
}

#[test]
fn moments_in_fewer_bits_change_updates_by_a_few_per_cent() {
    let bf16 = error_of(&|mut theta, gradients| {
        let mut moments = zeros([60, 100], DType::BF16);
        for (t, gradient) in (1..).zip(gradients) {
            (theta, moments) = adamw(theta, gradient.clone(), moments, &step(t));
        }
        theta
    });
    let bytes = error_of(&|mut theta, gradients| {
        let mut moments = [true, false].map(|m| ByteMoment::zeros(6000, m, &Device::flex()));
        for (t, gradient) in (1..).zip(gradients) {
            (theta, moments) = adamw_8bit(theta, gradient.clone(), moments, &step(t));
        }
        theta
    });
    println!("error of the change by 20 steps: moments in bf16 {bf16:.4}, in 8 bits {bytes:.4}");
    assert!(bf16 < 0.01 && bytes < 0.05);
    assert!(bf16 > 0.0 && bytes > bf16);
}

#[test]
fn loops_with_8_bit_moments_equal_the_tensor_operations() {
    // The last block is not full.
    let shape = [3, 2 * BLOCK + 7];
    let n = shape[0] * shape[1];
    let start = || [true, false].map(|m| ByteMoment::zeros(n, m, &Device::flex()));
    let (mut theta, mut moments) = (tensor(shape, 1), start());
    let (mut exact, mut exact_moments) = (tensor(shape, 1), start());
    for t in 1..=5 {
        let gradient = tensor(shape, 10 + t);
        (theta, moments) = adamw_8bit(theta, gradient.clone(), moments, &step(t));
        (exact, exact_moments) = adamw_8bit_reference(exact, gradient, exact_moments, &step(t));
    }
    let pairs = host(theta).into_iter().zip(host(exact));
    let apart = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart < 1e-4, "{apart:e}");
    for (found, wanted) in moments.into_iter().zip(exact_moments) {
        let codes =
            |moment: ByteMoment| -> Vec<i64> { moment.codes_n.into_data().iter::<i64>().collect() };
        let pairs = codes(found).into_iter().zip(codes(wanted));
        let other = pairs.filter(|(a, b)| a != b).count();
        assert!(other * 200 < n, "{other} of {n} codes differ");
    }
}

/// The sums are those of `create_dynamic_map` of bitsandbytes, computed by torch.
#[test]
fn codes_have_the_sums_of_bitsandbytes() {
    for (signed, sum, weighted) in [
        (false, 75.105_263_24, 15_267.451_11),
        (true, 75.105_263_17, 7_779.626_864),
    ] {
        let codes = dynamic_codes(signed).map(f64::from);
        let found: f64 = codes.iter().map(|code| code.abs()).sum();
        let ranked: f64 = (0..).zip(codes).map(|(i, code)| f64::from(i) * code).sum();
        assert!((found / sum - 1.0).abs() < 1e-6, "{found}");
        assert!((ranked / weighted - 1.0).abs() < 1e-6, "{ranked}");
    }
}
