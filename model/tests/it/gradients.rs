//! The model is differentiable in every parameter, and a mapped model can be trained further.

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor};
use potstill_model::{Decoder, MapParameters, ParameterName, map_parameters, named_parameters};

use crate::{Grow, gradient_of, host, ids, small};

const ROWS: [&[u32]; 2] = [&[1, 5, 9, 5, 22, 0, 7], &[3, 3, 4, 17, 2, 11, 20]];

/// Computes a smooth function of all logits: Σ over rows and ids of log q · sin(index).
fn loss(model: &Decoder) -> Tensor<1> {
    let hidden_btd = model.hidden(ids(&ROWS, &model.device()));
    let [b, t, d] = hidden_btd.dims();
    let logq_nv = log_softmax(model.logits(hidden_btd.reshape([b * t, d])), 1);
    let [n, v] = logq_nv.dims();
    let weights: Vec<f64> = (0..n * v).map(|index| (index as f64).sin()).collect();
    let data = burn::tensor::TensorData::new(weights, [n, v]);
    (logq_nv.clone() * Tensor::from_data(data, (&logq_nv.device(), DType::F64))).sum()
}

/// Adds `by` to one value of one parameter.
struct Nudge<'a> {
    name: &'a str,
    at: usize,
    by: f64,
}

impl MapParameters for Nudge<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if parameter.name != self.name {
            return tensor;
        }
        let (shape, options) = (tensor.dims(), (&tensor.device(), DType::F64));
        let mut values = host(tensor);
        values[self.at] += self.by;
        Tensor::from_data(burn::tensor::TensorData::new(values, shape), options)
    }
}

/// Compares the gradients of all parameters with central differences of fourth order.
pub(crate) fn check_finite_differences(plain: &Decoder, what: &str) {
    let model = plain.clone().train();
    let gradients = loss(&model).backward();
    let mut largest = 0f64;
    for (ParameterName { name, .. }, parameter) in named_parameters(&model) {
        let gradient = gradient_of(&parameter, &gradients);
        let scale = gradient.iter().fold(0f64, |max, g| max.max(g.abs()));
        assert!(scale > 0.0, "{name} has no gradient");
        for at in [0, gradient.len() / 3, gradient.len() - 1] {
            let at_distance = |by| {
                let name = name.as_str();
                let nudged = map_parameters(plain.clone(), &mut Nudge { name, at, by });
                host(loss(&nudged))[0]
            };
            let h = 1e-4;
            let expected = (8.0 * (at_distance(h) - at_distance(-h))
                - (at_distance(2.0 * h) - at_distance(-2.0 * h)))
                / (12.0 * h);
            let difference = (gradient[at] - expected).abs() / scale;
            largest = largest.max(difference);
            assert!(
                difference < 1e-8,
                "{name}[{at}]: {} {expected}",
                gradient[at]
            );
        }
    }
    eprintln!("largest relative difference, {what}: {largest:.2e}");
}

#[test]
fn gradients_equal_finite_differences() {
    for tied in [true, false] {
        let plain = small(tied, DType::F64);
        // The weights are large enough that every path contributes to the loss.
        let plain = map_parameters(plain, &mut Grow(15.0));
        check_finite_differences(&plain, &format!("tied {tied}"));
    }
}

#[test]
fn a_mapped_model_can_be_trained_further() {
    struct Descend<'a>(&'a mut burn::tensor::Gradients);
    impl MapParameters for Descend<'_> {
        fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            let gradient = tensor.grad_remove(self.0).unwrap();
            tensor.inner() - gradient * 1e-3
        }
    }
    let mut model = small(true, DType::F64).train();
    let mut losses = Vec::new();
    for _ in 0..3 {
        let value = loss(&model);
        let mut gradients = value.backward();
        losses.push(host(value)[0]);
        model = map_parameters(model, &mut Descend(&mut gradients));
    }
    assert!(losses[2] < losses[1] && losses[1] < losses[0], "{losses:?}");
    assert!(!model.valid().device().is_autodiff());
}
