use super::super::tests::{both_layouts, on_threads};
use super::pairs::{LANES, PairDot};
use super::*;
use crate::test_numbers::bf16_numbers as numbers;

/// An emulation of [`PairDot`] for any processor, as the manual of the instruction defines it.
#[derive(Clone, Copy)]
struct EmulatedDot;

// SAFETY: both types are arrays of sixteen words that are valid for all bit patterns.
unsafe impl PairDot for EmulatedDot {
    type Sums = [f32; LANES];
    type Pairs = [u32; LANES];

    fn splat(self, pair: u32) -> [u32; LANES] {
        [pair; LANES]
    }

    fn dot(self, sums: [f32; LANES], a: [u32; LANES], b: [u32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| {
            let late = [a[lane], b[lane]].map(|pair| f32::from_bits(pair & 0xFFFF_0000));
            let early = [a[lane], b[lane]].map(|pair| f32::from_bits(pair << 16));
            fma(early, fma(late, sums[lane]))
        })
    }

    fn run<J: VectorJob>(self, job: J) {
        job.run();
    }
}

/// Computes a fused multiply-add whose denormal inputs and results count as zero.
fn fma(factors: [f32; 2], sum: f32) -> f32 {
    let [x, y] = factors.map(flush_denormal);
    flush_denormal(x.mul_add(y, flush_denormal(sum)))
}

fn flush_denormal(number: f32) -> f32 {
    if number.is_subnormal() {
        0f32.copysign(number)
    } else {
        number
    }
}

type Multiply = fn(&mut [bf16], Matrix<'_, bf16>, Matrix<'_, bf16>, bool, BlockLimits);
/// Computes one element of C by the definition, from its factors and its starting value.
type Chain = fn(&[[f32; 2]], f32) -> f32;

fn multiply_widened(
    out: &mut [bf16],
    a: Matrix<'_, bf16>,
    b: Matrix<'_, bf16>,
    add: bool,
    limits: BlockLimits,
) {
    if let Some(product) = HalfProduct::new(as_uninit(out), a, b, add) {
        vectorize(HalfProduct { limits, ..product });
    }
}

fn multiply_emulated(
    out: &mut [bf16],
    a: Matrix<'_, bf16>,
    b: Matrix<'_, bf16>,
    add: bool,
    limits: BlockLimits,
) {
    if let Some(product) = HalfProduct::new(as_uninit(out), a, b, add) {
        HalfProduct { limits, ..product }.multiply_with_pairs(EmulatedDot);
    }
}

/// The kernels, each with the definition of one element.
const KERNELS: [(&str, Multiply, Chain); 2] = [
    ("widened", multiply_widened, |factors, start| {
        factors.iter().fold(start, |sum, [x, y]| x.mul_add(*y, sum))
    }),
    ("emulated pairs", multiply_emulated, |factors, start| {
        factors.chunks(2).fold(start, |sum, pair| {
            let late = pair.get(1).copied().unwrap_or_default();
            fma(pair[0], fma(late, sum))
        })
    }),
];

/// Limits so small that products of a few thousand multiply-adds have many blocks.
const SMALL_LIMITS: BlockLimits = BlockLimits {
    block: 34,
    packed: 1500,
    sums: 700,
};

/// The pairs of numbers whose products are summed for element `index` of C.
fn factors(a: Matrix<'_, bf16>, b: Matrix<'_, bf16>, index: usize) -> Vec<[f32; 2]> {
    let (i, j) = (index / b.columns, index % b.columns);
    let at = |matrix: Matrix<'_, bf16>, row: usize, column: usize| {
        matrix.data[row * matrix.row_stride + column * matrix.column_stride].to_f32()
    };
    (0..a.columns).map(|k| [at(a, i, k), at(b, k, j)]).collect()
}

/// Whether an element is within rounding of its sum in f64: half a unit in the last place of bf16, plus k roundings
/// to f32 of a sum of these magnitudes.
fn is_within_rounding(found: bf16, factors: &[[f32; 2]], start: f32) -> bool {
    let products = factors.iter().map(|[x, y]| f64::from(*x) * f64::from(*y));
    let (exact, size) = products.fold(
        (f64::from(start), f64::from(start.abs())),
        |(sum, size), x| (sum + x, size + x.abs()),
    );
    let sum_error = (factors.len() + 1) as f64 * 2f64.powi(-24) * size;
    let binade = (exact.abs() + sum_error).max(1e-30).log2().floor();
    (found.to_f64() - exact).abs() <= (binade - 8.0).exp2() + sum_error
}

/// m, n and k: the sizes around the edges of tiles, panels and blocks.
const SIZES: [(usize, usize, usize); 15] = [
    (1, 1, 1),
    (1, 150, 7),
    (2, 8, 8),
    (2, 130, 2051),
    (3, 100, 64),
    (4, 17, 33),
    (5, 16, 300),
    (6, 49, 257),
    (13, 48, 12),
    (16, 33, 90),
    (33, 65, 513),
    (70, 30, 35),
    (97, 193, 31),
    (130, 40, 65),
    (2060, 18, 9),
];

#[test]
fn every_path_rounds_the_chain_of_its_kernel_once() {
    for threads in [1, 3] {
        on_threads(threads, || {
            for (m, n, k) in SIZES {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let before = numbers(m * n, 3);
                for (name, multiply, chain) in KERNELS {
                    for (add, limits) in [(false, LIMITS), (true, LIMITS), (true, SMALL_LIMITS)] {
                        let start = |index: usize| if add { before[index].to_f32() } else { 0.0 };
                        let expected: Vec<bf16> = (0..m * n)
                            .map(|index| {
                                let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
                                let factors = factors(a, b, index);
                                let sum = bf16::from_f32(chain(&factors, start(index)));
                                assert!(is_within_rounding(sum, &factors, start(index)));
                                sum
                            })
                            .collect();
                        let transposed =
                            |data: &[bf16], rows: usize, columns: usize| -> Vec<bf16> {
                                (0..rows * columns)
                                    .map(|i| data[i % rows * columns + i / rows])
                                    .collect()
                            };
                        let (a_km, b_nk) = (transposed(&a, m, k), transposed(&b, k, n));
                        for a in [both_layouts(m, k, &a)[0], both_layouts(m, k, &a_km)[1]] {
                            for b in [both_layouts(k, n, &b)[0], both_layouts(k, n, &b_nk)[1]] {
                                let mut out = before.clone();
                                multiply(&mut out, a, b, add, limits);
                                assert!(
                                    out == expected,
                                    "{name} {m} {n} {k} on {threads} threads, added: {add}"
                                );
                            }
                        }
                    }
                }
            }
        });
    }
}

#[test]
fn a_row_does_not_depend_on_the_other_rows() {
    let (m, n, k) = (203, 210, 301);
    let (x, weight) = (numbers(m * k, 1), numbers(n * k, 2));
    let weight = Matrix::new(&weight, n, k).transposed();
    for (name, multiply, _) in KERNELS {
        let mut all = vec![bf16::NAN; m * n];
        multiply(&mut all, Matrix::new(&x, m, k), weight, false, LIMITS);
        for (start, rows) in [(0, 1), (17, 2), (90, 3), (100, 5), (70, 97), (202, 1)] {
            let mut part = vec![bf16::NAN; rows * n];
            let x = Matrix::new(&x[start * k..], rows, k);
            multiply(&mut part, x, weight, false, LIMITS);
            assert!(
                part == all[start * n..][..rows * n],
                "{name}: {rows} rows from {start}"
            );
        }
    }
}

#[test]
fn the_kernel_that_is_chosen_is_within_rounding() {
    for (m, n, k) in SIZES {
        let (x, weight) = (numbers(m * k, 1), numbers(n * k, 2));
        let x = Matrix::new(&x, m, k);
        let weight = Matrix::new(&weight, n, k).transposed();
        let mut out = vec![bf16::NAN; m * n];
        product_into(&mut out, x, weight);
        for (index, found) in out.iter().enumerate() {
            assert!(
                is_within_rounding(*found, &factors(x, weight, index), 0.0),
                "{m} {n} {k}: element {index}"
            );
        }
    }
}

#[test]
fn a_product_over_no_steps_is_zero() {
    let nothing = |rows, columns| Matrix::new(&[], rows, columns);
    let mut out = [bf16::ONE; 6];
    add_product(&mut out, nothing(2, 0), nothing(0, 3));
    assert_eq!(out, [bf16::ONE; 6]);
    product_into(&mut out, nothing(2, 0), nothing(0, 3));
    assert_eq!(out, [bf16::ZERO; 6]);
    let b = [bf16::ONE; 12];
    product_into::<bf16>(&mut [], nothing(0, 4), Matrix::new(&b, 4, 3));
}

/// The processor's instruction agrees with the emulation bit for bit where sums are exact, and within rounding
/// elsewhere. The test prints whether the latter agree bit for bit too.
#[cfg(target_arch = "x86_64")]
#[test]
// The line that says that the test was skipped must be seen.
#[allow(clippy::print_stdout)]
fn the_processors_instruction_agrees_with_its_emulation() {
    let Some(instruction) = pairs::Avx512Bf16::try_new() else {
        println!("skipped: this processor has no AVX-512 BF16");
        return;
    };
    let mut equal = true;
    for (m, n, k) in SIZES {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let integers = |data: &[bf16]| -> Vec<bf16> {
            data.iter()
                .map(|x| bf16::from_f32((x.to_f32() * 8.0).round()))
                .collect()
        };
        let multiply = |a: &[bf16], b: &[bf16]| {
            let (a, b) = (Matrix::new(a, m, k), Matrix::new(b, k, n));
            let [mut found, mut expected] = [vec![bf16::NAN; m * n], vec![bf16::NAN; m * n]];
            if let Some(product) = HalfProduct::new(as_uninit(&mut found), a, b, false) {
                product.multiply_with_pairs(instruction);
            }
            multiply_emulated(&mut expected, a, b, false, LIMITS);
            for (index, found) in found.iter().enumerate() {
                assert!(is_within_rounding(*found, &factors(a, b, index), 0.0));
            }
            found == expected
        };
        assert!(
            multiply(&integers(&a), &integers(&b)),
            "{m} {n} {k}: exact sums"
        );
        equal &= multiply(&a, &b);
    }
    println!("random numbers agree to the bit: {equal}");
}

/// Few enough steps for Miri, which `scripts/sanitize.sh` runs this test with.
#[test]
fn small_products_of_bf16() {
    for (m, n, k) in [(1, 1, 1), (2, 5, 3), (13, 33, 36)] {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
        for (name, multiply, chain) in KERNELS {
            for limits in [LIMITS, SMALL_LIMITS] {
                let mut out = vec![bf16::NAN; m * n];
                multiply(&mut out, a, b, false, limits);
                for (index, found) in out.iter().enumerate() {
                    let sum = bf16::from_f32(chain(&factors(a, b, index), 0.0));
                    assert_eq!(*found, sum, "{name} {m} {n} {k}");
                }
            }
        }
    }
}
