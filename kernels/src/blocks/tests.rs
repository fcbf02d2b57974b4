use burn::tensor::{Device, Tensor};

use super::*;
use crate::linear::{linear, linear_input_gradient};
use crate::test_numbers::f32_numbers;

const KINDS: [BlockType; 4] = [
    BlockType::Q8_0,
    BlockType::Q4_0,
    BlockType::Q5_0,
    BlockType::Q4K,
];

/// Rows of x, outputs, inputs: one chunk of rows of the weight, and several with a ragged end.
const SIZES: [[usize; 3]; 4] = [[1, 5, 256], [7, 40, 512], [33, 700, 2048], [0, 3, 256]];

fn weight(kind: BlockType, rows: usize, columns: usize) -> BlockMatrix {
    let values = f32_numbers(rows * columns, 3);
    BlockMatrix::quantized(kind, [rows, columns], &values).unwrap()
}

fn tensor(shape: [usize; 2], seed: u64, dtype: DType) -> Tensor<2> {
    let data = TensorData::new(f32_numbers(shape[0] * shape[1], seed), shape);
    Tensor::from_data(data, (&Device::flex(), dtype))
}

fn dense(weight: &BlockMatrix, dtype: DType) -> Tensor<2> {
    Tensor::from_data(weight.dequantized(), (&Device::flex(), dtype))
}

fn largest_difference(a: Tensor<2>, b: Tensor<2>) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let [a, b] = [a, b].map(|x| x.try_into_vec_as::<f64>().unwrap());
    a.iter()
        .zip(b)
        .fold(0.0, |most, (a, b)| (a - b).abs().max(most))
}

#[test]
fn products_with_blocks_are_products_with_the_dequantised_weight() {
    for kind in KINDS {
        for [n, outputs, inputs] in SIZES {
            for (dtype, tolerance) in [(DType::F32, 0.0), (DType::BF16, 0.0), (DType::F64, 1e-12)] {
                let weight = weight(kind, outputs, inputs);
                let (x, dy) = (
                    tensor([n, inputs], 1, dtype),
                    tensor([n, outputs], 2, dtype),
                );
                let found = linear_blocks(x.clone(), &weight);
                let expected = linear(x.clone(), dense(&weight, dtype));
                let what = format!("{kind:?} {n} {outputs} {inputs} {dtype:?}");
                assert_eq!(found.dtype(), dtype, "{what}");
                let difference = largest_difference(found, expected);
                assert!(difference <= tolerance, "{what}: y differs by {difference}");
                if n == 0 {
                    continue;
                }
                let expected = linear_input_gradient(dy.clone(), dense(&weight, dtype));
                let x = Tensor::from_inner(x).require_grad();
                let y = linear_blocks(x.clone(), &weight) * Tensor::from_inner(dy);
                let found = x.grad(&y.sum().backward()).unwrap();
                let difference = largest_difference(found, expected);
                assert!(
                    difference <= tolerance,
                    "{what}: ∂x differs by {difference}"
                );
            }
        }
    }
}

#[test]
fn the_reference_is_the_same_product() {
    let weight = weight(BlockType::Q4_0, 40, 320);
    let x = tensor([6, 320], 1, DType::F32);
    let found = linear_blocks(x.clone(), &weight);
    let difference = largest_difference(found, linear_blocks_reference(x, &weight));
    assert!(difference < 1e-4, "{difference}");
}

#[test]
fn a_matrix_takes_whole_blocks_only() {
    let bytes = vec![0; 2 * 3 * 34];
    assert!(BlockMatrix::new(BlockType::Q8_0, [2, 96], bytes.clone()).is_some());
    assert!(BlockMatrix::new(BlockType::Q8_0, [3, 96], bytes.clone()).is_none());
    assert!(BlockMatrix::new(BlockType::Q8_0, [2, 97], bytes.clone()).is_none());
    assert!(BlockMatrix::new(BlockType::Q4K, [2, 96], bytes).is_none());
    assert!(BlockMatrix::quantized(BlockType::Q4K, [1, 32], &[0.0; 32]).is_none());
    assert!(BlockMatrix::quantized(BlockType::Q5K, [1, 256], &[0.0; 256]).is_none());
}
