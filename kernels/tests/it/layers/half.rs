//! The ops of layers in half precisions.

use super::*;

#[test]
fn half_precision_ops_are_within_rounding_of_f32() {
    let options = AttentionOptions {
        heads: 2,
        key_heads: 1,
        scale: 0.5,
        softcap: None,
        window: None,
    };
    let activation = ACTIVATIONS[1];
    let attend: Op = &|i| {
        let [q, k, v] = [0, 1, 2].map(|input| i[input].clone());
        attention(q, k, v, Some(vector(&i[3])), &[4, 5], &options)
    };
    let biased: Op = &|i| linear_biased(i[0].clone(), i[1].clone(), Some(vector(&i[2])));
    let norm: Op = &|i| rms_norm(i[0].clone(), vector(&i[1]), 1e-5, 1.0);
    let turn: Op = &|i| {
        let [cos, sin] = [1, 2].map(|input| i[input].clone().detach());
        rotary(i[0].clone(), cos, sin, 10)
    };
    let gate: Op = &|i| gated(i[0].clone(), i[1].clone(), activation);
    let feed: Op = &|i| gated_linear(i[0].clone(), i[1].clone(), i[2].clone(), activation);
    let ops: [(&str, Op<'_>, Vec<[usize; 2]>, usize); 6] = [
        ("linear", biased, vec![[9, 40], [7, 40], [1, 7]], 3),
        ("rms_norm", norm, vec![[9, 40], [1, 40]], 2),
        ("rotary", turn, vec![[9, 40], [9, 4], [9, 4]], 1),
        ("gated", gate, vec![[9, 40], [9, 40]], 2),
        ("gated_linear", feed, vec![[9, 40], [9, 40], [7, 40]], 3),
        ("attention", attend, vec![[9, 8], [9, 4], [9, 2], [1, 2]], 4),
    ];
    for (what, op, shapes, tracked) in ops {
        let tracked: Vec<bool> = (0..shapes.len()).map(|input| input < tracked).collect();
        for dtype in [DType::BF16, DType::F16] {
            let rounded = |inputs: Vec<Tensor<2>>| {
                let inputs = inputs.into_iter().map(|x| x.cast(dtype)).collect();
                op(inputs).cast(DType::F32)
            };
            let found = run(&rounded, &shapes, &tracked, DType::F32);
            let exact = run(op, &shapes, &tracked, DType::F32);
            let worst = difference(&found, &exact);
            assert!(worst < 0.02, "{what} in {dtype:?}: {worst:e}");
            assert!(worst > 0.0, "{what} in {dtype:?} was not rounded");
        }
    }
}

/// An op on `[9, 40]`, `[9, 40]` and `[1, 40]`.
type SmallOp<'a> = &'a dyn Fn(&[Tensor<2>; 3]) -> Tensor<2>;

/// The small ops of half precisions are the f32 ops of the same numbers, rounded once.
#[test]
fn small_ops_of_half_precisions_round_once() {
    let gate = |activation| move |i: &[Tensor<2>; 3]| gated(i[0].clone(), i[1].clone(), activation);
    let [silu, gelu, clamped] = ACTIVATIONS.map(gate);
    let norm = |i: &[Tensor<2>; 3]| rms_norm(i[0].clone(), vector(&i[2]), 1e-6, 1.0);
    let bias = |i: &[Tensor<2>; 3]| add_bias(i[0].clone(), vector(&i[2]));
    let turn = |i: &[Tensor<2>; 3]| {
        let angles = i[1].clone().slice([0..9, 0..4]);
        rotary(i[0].clone(), angles.clone(), angles, 20)
    };
    let ops: [SmallOp<'_>; 6] = [&silu, &gelu, &clamped, &norm, &bias, &turn];
    for dtype in [DType::BF16, DType::F16] {
        let mut seed = 0;
        let inputs = [[9, 40], [9, 40], [1, 40]].map(|shape| {
            seed += 1;
            Tensor::<2>::from_data(random(shape, seed), (&Device::flex(), dtype))
        });
        let wide = inputs.clone().map(|input| input.cast(DType::F32));
        for (index, op) in ops.iter().enumerate() {
            let exact = op(&wide).cast(dtype);
            assert_eq!(host(op(&inputs)), host(exact), "op {index} in {dtype:?}");
        }
    }
}

/// A step and a sum in half precision are those of the same numbers in f32, rounded once.
#[test]
fn adamw_steps_of_half_precisions_round_once() {
    let step = AdamStep {
        betas: (0.9, 0.999),
        epsilon: 1e-8,
        learning_rate: 1e-2,
        weight_decay: 0.1,
        step: 3,
        scale: 0.7,
    };
    for dtype in [DType::BF16, DType::F16] {
        let inputs = [1, 2, 3, 4]
            .map(|seed| Tensor::<2>::from_data(random([7, 33], seed), (&Device::flex(), dtype)));
        let run = |[theta, gradient, m, v]: [Tensor<2>; 4]| {
            let squares = sum_of_squares(gradient.clone());
            let (theta, [m, v]) = adamw(theta, gradient, [m, v.abs()], &step);
            let results = [theta, m, v].map(|tensor| host(tensor.cast(dtype)));
            (results, squares)
        };
        let wide = inputs.clone().map(|tensor| tensor.cast(DType::F32));
        assert!(run(inputs) == run(wide), "{dtype:?}");
    }
}

/// A norm of f32 rows whose output is bf16 is the f32 norm, rounded once; its gradients are those of the rounded output.
#[test]
fn a_norm_rounds_to_another_type_once() {
    let options = (&Device::flex(), DType::F32);
    let tensor = |shape, seed| Tensor::<2>::from_data(random(shape, seed), options);
    let (x, gain) = (tensor([70, 96], 1), tensor([1, 96], 2));
    let found = rms_norm_as(x.clone(), vector(&gain), 1e-6, 0.0, DType::BF16);
    let exact = rms_norm(x, vector(&gain), 1e-6, 0.0);
    assert_eq!(found.dtype(), DType::BF16);
    assert_eq!(host(found), host(exact.cast(DType::BF16)));

    let norm: Op =
        &|i| rms_norm_as(i[0].clone(), vector(&i[1]), 1e-6, 0.0, DType::BF16).cast(DType::F32);
    let cast: Op = &|i| {
        let y = rms_norm(i[0].clone(), vector(&i[1]), 1e-6, 0.0);
        y.cast(DType::BF16).cast(DType::F32)
    };
    let shapes = [[70, 96], [1, 96]];
    let [found, exact] = [norm, cast].map(|op| run(op, &shapes, &[true, true], DType::F32));
    assert_eq!(difference(&found, &exact), 0.0);
}
