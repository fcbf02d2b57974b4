use super::*;
use crate::flex::vec_written_by;
use crate::test_numbers::f32_numbers as numbers;

/// Computes `start` + A·B by the definition: one chain of fused multiply-adds over k for every element.
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

/// Views the same data as a row-major and as a column-major matrix.
pub(super) fn both_layouts<E>(rows: usize, columns: usize, data: &[E]) -> [Matrix<'_, E>; 2] {
    [
        Matrix::new(data, rows, columns),
        Matrix::new(data, columns, rows).transposed(),
    ]
}

/// Runs `test` on a thread pool of its own.
pub(super) fn on_threads(threads: usize, test: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(test);
}

/// m, n and k: the sizes around the edges of tiles, panels and blocks.
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
    for threads in [1, 3] {
        on_threads(threads, || {
            for (m, n, k) in SIZES {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                for a in both_layouts(m, k, &a) {
                    for b in both_layouts(k, n, &b) {
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
                let write = |out: &mut _| multiply_by_weights(x, [WeightOutput { weight, out }]);
                // SAFETY: the product writes all of its output.
                let out = unsafe { vec_written_by(m * n, write) };
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
fn the_rows_of_c_may_have_gaps_between_them() {
    let (a, b) = (numbers(7 * 20, 1), numbers(20 * 19, 2));
    let (a, b) = (Matrix::new(&a, 7, 20), Matrix::new(&b, 20, 19));
    let mut out = vec![5.0; 6 * 30 + 19];
    gemm(&mut out, 30, a, b, false, Threads::One);
    let product = chains(&vec![0.0; 7 * 19], a, b);
    for (index, value) in out.iter().enumerate() {
        let (row, column) = (index / 30, index % 30);
        let expected = if column < 19 {
            product[row * 19 + column]
        } else {
            5.0
        };
        assert_eq!(*value, expected);
    }
}

#[test]
fn a_product_over_no_steps_is_zero() {
    let (a, b) = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 3));
    let mut out = vec![3.0; 6];
    gemm(&mut out, 3, a, b, true, Threads::All);
    assert_eq!(out, [3.0; 6]);
    gemm(&mut out, 3, a, b, false, Threads::All);
    assert_eq!(out, [0.0; 6]);
}

/// Few enough steps for Miri, which `scripts/sanitize.sh` runs this test with.
#[test]
fn small_products_on_one_thread() {
    for (m, n, k) in [(1, 1, 1), (2, 5, 3), (7, 9, 4), (13, 3, 2), (3, 4, 0)] {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let before = numbers(m * n, 3);
        for a in both_layouts(m, k, &a) {
            for b in both_layouts(k, n, &b) {
                for (add, start) in [(true, before.clone()), (false, vec![0.0; m * n])] {
                    let mut out = before.clone();
                    gemm(&mut out, n, a, b, add, Threads::One);
                    assert_eq!(out, chains(&start, a, b), "{m} {n} {k}");
                }
            }
        }
        let (x, weight) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k));
        let write = |out: &mut _| multiply_by_weights(x, [WeightOutput { weight, out }]);
        // SAFETY: the product writes all of its output.
        let out = unsafe { vec_written_by(m * n, write) };
        assert_eq!(out, chains(&vec![0.0; m * n], x, weight.transposed()));
    }
}
