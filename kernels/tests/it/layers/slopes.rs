//! The gradients of the references.

use super::*;

/// The gradients of the references, with which the other tests compare, against central differences in f64.
#[test]
fn gradients_of_the_references_equal_central_differences() {
    let options = AttentionOptions {
        heads: 4,
        key_heads: 2,
        scale: 0.6,
        softcap: Some(2.0),
        window: Some(4),
    };
    let with_sinks: Op = &|i| {
        let [q, k, v] = [0, 1, 2].map(|input| i[input].clone());
        attention_reference(q, k, v, Some(vector(&i[3])), &[5, 2], &options)
    };
    let attention_shapes = vec![[7, 12], [7, 6], [7, 4], [1, 4]];
    let norm: Op = &|i| rms_norm_reference(i[0].clone(), vector(&i[1]), 1e-5, 1.0);
    let partial: Op = &|i| rotary_reference(i[0].clone(), i[1].clone(), i[2].clone(), 5);
    let biased: Op = &|i| linear_biased(i[0].clone(), i[1].clone(), Some(vector(&i[2])));
    let [silu, gelu, clamped] = ACTIVATIONS.map(|activation| {
        move |i: Vec<Tensor<2>>| gated_reference(i[0].clone(), i[1].clone(), activation)
    });
    // The angles of rotary positions are constants to its own gradient, so only x is tracked.
    let cases: [(&str, Op<'_>, Vec<[usize; 2]>, usize); 7] = [
        ("attention", with_sinks, attention_shapes, 4),
        ("norm", norm, vec![[3, 6], [1, 6]], 2),
        ("rotary", partial, vec![[3, 10], [3, 2], [3, 2]], 1),
        ("bias", biased, vec![[3, 4], [5, 4], [1, 5]], 3),
        ("silu", &silu, vec![[3, 4], [3, 4]], 2),
        ("gelu", &gelu, vec![[3, 4], [3, 4]], 2),
        ("clamped", &clamped, vec![[3, 4], [3, 4]], 2),
    ];
    for (what, op, shapes, tracked) in cases {
        let choice: Vec<bool> = (0..shapes.len()).map(|input| input < tracked).collect();
        let found = run(op, &shapes, &choice, DType::F64);
        for input in 0..tracked {
            let gradient = found[input + 1].as_ref().unwrap();
            for (index, found) in gradient.iter().enumerate() {
                let slope = central_difference(op, &shapes, input, index);
                assert!(
                    (found - slope).abs() < 1e-7 * slope.abs().max(1.0),
                    "{what}, input {input}, number {index}: {found}, and the difference says {slope}"
                );
            }
        }
    }
}

/// Computes the slope of the sum that [`run`] differentiates, in one number of one input.
fn central_difference(op: Op<'_>, shapes: &[[usize; 2]], input: usize, index: usize) -> f64 {
    const STEP: f64 = 1e-5;
    let value = |change: f64| {
        let tensors = shapes.iter().enumerate().map(|(seed, shape)| {
            let mut numbers = random(*shape, seed as u64).try_into_vec::<f64>().unwrap();
            if seed == input {
                numbers[index] += change;
            }
            let data = TensorData::new(numbers, *shape);
            Tensor::<2>::from_data(data, (&Device::flex(), DType::F64))
        });
        let output = op(tensors.collect());
        let weights = random(output.dims(), 99).try_into_vec::<f64>().unwrap();
        let pairs = host(output).into_iter().zip(weights);
        pairs.map(|(output, weight)| output * weight).sum::<f64>()
    };
    (value(STEP) - value(-STEP)) / (2.0 * STEP)
}
