use super::pairs::{Dot, LANES};
use super::task::narrow;
use super::*;

/// [`Dot`] as the manual has it, on any processor.
#[derive(Clone, Copy)]
struct Emulated;

// SAFETY: arrays of sixteen numbers.
unsafe impl Dot for Emulated {
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

    fn run<J: Job>(self, job: J) {
        job.run();
    }
}

fn fma(factors: [f32; 2], sum: f32) -> f32 {
    let [x, y] = factors.map(flushed);
    flushed(x.mul_add(y, flushed(sum)))
}

fn flushed(number: f32) -> f32 {
    if number.is_subnormal() {
        0f32.copysign(number)
    } else {
        number
    }
}

type Way = fn(&mut [bf16], Matrix<'_, bf16>, Matrix<'_, bf16>, bool, Limits);
/// One step, or two, of a chain over k.
type Chain = fn(&[[f32; 2]], f32) -> f32;

fn portable(out: &mut [bf16], a: Matrix<'_, bf16>, b: Matrix<'_, bf16>, add: bool, limits: Limits) {
    if let Some(product) = Product::new(out, a, b, add) {
        vectorize(Product { limits, ..product });
    }
}

fn emulated(out: &mut [bf16], a: Matrix<'_, bf16>, b: Matrix<'_, bf16>, add: bool, limits: Limits) {
    if let Some(product) = Product::new(out, a, b, add) {
        Product { limits, ..product }.by_pairs(Emulated);
    }
}

/// The definitions: what each arm computes for one element.
const ARMS: [(&str, Way, Chain); 2] = [
    ("portable", portable, |factors, start| {
        factors.iter().fold(start, |sum, [x, y]| x.mul_add(*y, sum))
    }),
    ("emulated", emulated, |factors, start| {
        factors.chunks(2).fold(start, |sum, pair| {
            let late = pair.get(1).copied().unwrap_or_default();
            fma(pair[0], fma(late, sum))
        })
    }),
];

/// Blocks that products of a few thousand multiply-adds need many of.
const SMALL: Limits = Limits {
    block: 34,
    packed: 1500,
    sums: 700,
};

/// Numbers that look random, between −1 and 1.
fn numbers(count: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed + 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// What is multiplied for element `index` of C.
fn factors(a: Matrix<'_, bf16>, b: Matrix<'_, bf16>, index: usize) -> Vec<[f32; 2]> {
    let (i, j) = (index / b.columns, index % b.columns);
    let at = |matrix: Matrix<'_, bf16>, row: usize, column: usize| {
        matrix.data[row * matrix.row_stride + column * matrix.column_stride].to_f32()
    };
    (0..a.columns).map(|k| [at(a, i, k), at(b, k, j)]).collect()
}

/// Holds one element to its sum in f64: half a unit of the last place of a bf16, and what `k` roundings
/// of f32 make of the magnitudes that were added.
fn within_rounding(found: bf16, factors: &[[f32; 2]], start: f32) -> bool {
    let products = factors.iter().map(|[x, y]| f64::from(*x) * f64::from(*y));
    let (exact, size) = products.fold(
        (f64::from(start), f64::from(start.abs())),
        |(sum, size), x| (sum + x, size + x.abs()),
    );
    let sum_error = (factors.len() + 1) as f64 * 2f64.powi(-24) * size;
    let binade = (exact.abs() + sum_error).max(1e-30).log2().floor();
    (found.to_f64() - exact).abs() <= (binade - 8.0).exp2() + sum_error
}

fn lying(rows: usize, columns: usize, data: &[bf16]) -> [Matrix<'_, bf16>; 2] {
    [
        Matrix::new(data, rows, columns),
        Matrix::new(data, columns, rows).transposed(),
    ]
}

fn on_threads(threads: usize, run: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap()
        .install(run);
}

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
fn every_path_rounds_the_chain_of_its_arm_once() {
    for threads in [1, 3] {
        on_threads(threads, || {
            for (m, n, k) in SIZES {
                let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
                let before = numbers(m * n, 3);
                for (what, way, chain) in ARMS {
                    for (add, limits) in [(false, LIMITS), (true, LIMITS), (true, SMALL)] {
                        let start = |index: usize| if add { before[index].to_f32() } else { 0.0 };
                        let expected: Vec<bf16> = (0..m * n)
                            .map(|index| {
                                let [a, b] = [lying(m, k, &a)[0], lying(k, n, &b)[0]];
                                let factors = factors(a, b, index);
                                let sum = bf16::from_f32(chain(&factors, start(index)));
                                assert!(within_rounding(sum, &factors, start(index)));
                                sum
                            })
                            .collect();
                        let turned = |data: &[bf16], rows: usize, columns: usize| -> Vec<bf16> {
                            (0..rows * columns)
                                .map(|i| data[i % rows * columns + i / rows])
                                .collect()
                        };
                        let (across_a, across_b) = (turned(&a, m, k), turned(&b, k, n));
                        for a in [lying(m, k, &a)[0], lying(m, k, &across_a)[1]] {
                            for b in [lying(k, n, &b)[0], lying(k, n, &across_b)[1]] {
                                let mut out = before.clone();
                                way(&mut out, a, b, add, limits);
                                assert!(
                                    out == expected,
                                    "{what} {m} {n} {k} on {threads}, added: {add}"
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
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (m, n, k) = (203, 210, 301);
    let (x, weight) = (numbers(m * k, 1), numbers(n * k, 2));
    let weight = Matrix::new(&weight, n, k).transposed();
    for (what, way, _) in ARMS {
        let mut all = vec![bf16::NAN; m * n];
        way(&mut all, Matrix::new(&x, m, k), weight, false, LIMITS);
        for (start, rows) in [(0, 1), (17, 2), (90, 3), (100, 5), (70, 97), (202, 1)] {
            let mut part = vec![bf16::NAN; rows * n];
            let x = Matrix::new(&x[start * k..], rows, k);
            way(&mut part, x, weight, false, LIMITS);
            assert!(
                part == all[start * n..][..rows * n],
                "{what}: {rows} rows from {start}"
            );
        }
    }
}

#[test]
fn the_way_chosen_is_within_rounding() {
    for (m, n, k) in SIZES {
        let (x, weight) = (numbers(m * k, 1), numbers(n * k, 2));
        let (x, weight) = (Matrix::new(&x, m, k), Matrix::new(&weight, n, k));
        let mut out = vec![bf16::NAN; m * n];
        rows_by_rows(&mut out, x, weight);
        for (index, found) in out.iter().enumerate() {
            assert!(
                within_rounding(*found, &factors(x, weight.transposed(), index), 0.0),
                "{m} {n} {k}: element {index}"
            );
        }
    }
}

#[test]
fn without_steps_a_product_is_zero() {
    let nothing = |rows, columns| Matrix::new(&[], rows, columns);
    let mut out = [bf16::ONE; 6];
    product(&mut out, nothing(2, 0), nothing(0, 3), true);
    assert_eq!(out, [bf16::ONE; 6]);
    product(&mut out, nothing(2, 0), nothing(0, 3), false);
    assert_eq!(out, [bf16::ZERO; 6]);
    product(
        &mut [],
        nothing(0, 4),
        Matrix::new(&[bf16::ONE; 12], 4, 3),
        false,
    );
}

#[test]
fn narrowing_is_rounding_to_nearest_even() {
    let edges = [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
    for high in 0..=u16::MAX {
        for low in edges {
            let number = f32::from_bits(u32::from(high) << 16 | low);
            let (found, expected) = (bf16::from_bits(narrow(number)), bf16::from_f32(number));
            assert_eq!(found.to_bits(), expected.to_bits(), "{number:e}");
        }
    }
}

/// What can be said of the processor's own instruction: the pairs and lanes are the emulation's, to the
/// bit where sums are exact, and for the rest two roundings apart at most. Whether those agree to the bit
/// as well is printed.
#[cfg(target_arch = "x86_64")]
#[test]
// Whoever runs the test must see that it could not.
#[allow(clippy::print_stdout)]
fn the_instruction_is_its_emulation() {
    let Some(hardware) = pairs::Hardware::try_new() else {
        println!("skipped: this processor has no AVX-512 BF16");
        return;
    };
    let mut equal = true;
    for (m, n, k) in SIZES {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let whole = |data: &[bf16]| -> Vec<bf16> {
            data.iter()
                .map(|x| bf16::from_f32((x.to_f32() * 8.0).round()))
                .collect()
        };
        let multiply = |a: &[bf16], b: &[bf16]| {
            let (a, b) = (Matrix::new(a, m, k), Matrix::new(b, k, n));
            let [mut found, mut expected] = [vec![bf16::NAN; m * n], vec![bf16::NAN; m * n]];
            if let Some(product) = Product::new(&mut found, a, b, false) {
                product.by_pairs(hardware);
            }
            emulated(&mut expected, a, b, false, LIMITS);
            for (index, found) in found.iter().enumerate() {
                assert!(within_rounding(*found, &factors(a, b, index), 0.0));
            }
            found == expected
        };
        assert!(multiply(&whole(&a), &whole(&b)), "{m} {n} {k}: exact sums");
        equal &= multiply(&a, &b);
    }
    println!("random numbers agree to the bit: {equal}");
}
