use super::*;
use crate::flex::written;

/// Numbers that look random, between −1 and 1.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The definition: one chain of fused multiply-adds over k for every element.
fn chains(start: &[f32], a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let element = |index: usize| {
        let (i, j) = (index / b.columns, index % b.columns);
        (0..a.columns).fold(start[index], |sum, k| {
            let x = a.data[i * a.row_stride + k * a.column_stride];
            x.mul_add(b.data[k * b.row_stride + j * b.column_stride], sum)
        })
    };
    (0..a.rows * b.columns).map(element).collect()
}

const SIZES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (1, 50, 7),
    (2, 8, 8),
    (3, 100, 64),
    (4, 17, 33),
    (5, 16, 300),
    (6, 49, 257),
    (16, 48, 12),
    (33, 65, 513),
    (97, 193, 31),
    (130, 40, 2100),
    (2060, 18, 9),
];

#[test]
fn every_path_gives_the_chain_of_the_definition_bit_for_bit() {
    let pool = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
    };
    for threads in [1, 3] {
        pool(threads).install(|| {
            for (m, n, k) in SIZES {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let lying = |rows, columns, data| {
                    [
                        Matrix::new(data, rows, columns),
                        Matrix::new(data, columns, rows).transposed(),
                    ]
                };
                for a in lying(m, k, &a) {
                    for b in lying(k, n, &b) {
                        let before = numbers(m * n, 3);
                        let mut out = before.clone();
                        gemm(&mut out, n, a, b, true, Threads::All);
                        assert_eq!(
                            out,
                            chains(&before, a, b),
                            "{m} {n} {k} on {threads}, added"
                        );
                        gemm(&mut out, n, a, b, false, Threads::All);
                        let zeros = vec![0.0; m * n];
                        assert_eq!(out, chains(&zeros, a, b), "{m} {n} {k} on {threads}");
                    }
                }
                let (x, weight) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k));
                let one = |weight| {
                    let write = |out: &mut _| rows_by_rows(x, [Output { weight, out }]);
                    // SAFETY: a product writes all of its output.
                    unsafe { written(x.rows * weight.rows, write) }
                };
                let out = one(weight);
                assert_eq!(
                    out,
                    chains(&vec![0.0; m * n], x, weight.transposed()),
                    "by rows {m} {n} {k}"
                );
            }
        });
    }
}

#[test]
fn rows_of_c_may_lie_apart() {
    let (a, b) = (numbers(7 * 20, 1), numbers(20 * 19, 2));
    let (a, b) = (Matrix::new(&a, 7, 20), Matrix::new(&b, 20, 19));
    let mut apart = vec![5.0; 6 * 30 + 19];
    gemm(&mut apart, 30, a, b, false, Threads::One);
    let whole = chains(&vec![0.0; 7 * 19], a, b);
    for (index, value) in apart.iter().enumerate() {
        let (row, column) = (index / 30, index % 30);
        let expected = if column < 19 {
            whole[row * 19 + column]
        } else {
            5.0
        };
        assert_eq!(*value, expected);
    }
}

#[test]
fn without_steps_a_product_is_zero() {
    let mut out = vec![3.0; 6];
    gemm(
        &mut out,
        3,
        Matrix::new(&[], 2, 0),
        Matrix::new(&[], 0, 3),
        true,
        Threads::All,
    );
    assert_eq!(out, [3.0; 6]);
    gemm(
        &mut out,
        3,
        Matrix::new(&[], 2, 0),
        Matrix::new(&[], 0, 3),
        false,
        Threads::All,
    );
    assert_eq!(out, [0.0; 6]);
}
