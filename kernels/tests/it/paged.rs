//! Paged attention: the plain loops and the tensor operations agree with the definition in f64, and the bits of a row
//! depend on that row only.

use burn::backend::Flex;
use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::{PagedRow, paged_attention, paged_attention_reference, write_slots};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

struct Case {
    /// Number of query heads, number of key heads, width of a head.
    heads: [usize; 3],
    page_size: usize,
    slots: usize,
    queries: Vec<f64>,
    keys: Vec<f64>,
    values: Vec<f64>,
    /// Pages and length of each row.
    rows: Vec<(Vec<u32>, usize)>,
}

fn case(heads: [usize; 3], page_size: usize, lengths: &[usize]) -> Case {
    let [h, g, e] = heads;
    let mut rng = ChaCha8Rng::seed_from_u64((h * 1009 + g * 101 + e * 11 + page_size) as u64);
    let pages = lengths
        .iter()
        .map(|length| length.div_ceil(page_size) + 1)
        .sum::<usize>();
    let mut order: Vec<u32> = (0..pages as u32).collect();
    order.shuffle(&mut rng);
    let rows = lengths.iter().map(|length| {
        let own = order.split_off(order.len() - length.div_ceil(page_size) - 1);
        (own, *length)
    });
    let rows = rows.collect();
    let slots = pages * page_size;
    let mut numbers = |count: usize| (0..count).map(|_| rng.random_range(-2.0..2.0)).collect();
    Case {
        heads,
        page_size,
        slots,
        queries: numbers(lengths.len() * h * e),
        keys: numbers(slots * g * e),
        values: numbers(slots * g * e),
        rows,
    }
}

fn cases() -> Vec<Case> {
    vec![
        case([1, 1, 1], 1, &[1]),
        case([6, 2, 4], 4, &[1, 9, 4, 17, 3]),
        case([3, 3, 20], 16, &[16, 33, 1]),
        case([9, 3, 64], 16, &[100, 5, 16, 17, 257, 1, 31]),
        case([4, 1, 80], 8, &[40, 64, 7]),
        case([2, 2, 128], 32, &[700, 90]),
    ]
}

type Form = fn(Tensor<2>, Tensor<2>, Tensor<2>, &[PagedRow<'_>], usize, usize) -> Tensor<2>;

fn run(case: &Case, dtype: DType, form: Form) -> Vec<f64> {
    let rows: Vec<usize> = (0..case.rows.len()).collect();
    run_rows(case, dtype, form, &rows)
}

/// Runs some of the rows.
fn run_rows(case: &Case, dtype: DType, form: Form, which: &[usize]) -> Vec<f64> {
    let [h, g, e] = case.heads;
    let device = Device::flex();
    let tensor = |values: &[f64], columns: usize| {
        let data = TensorData::new(values.to_vec(), [values.len() / columns, columns]);
        Tensor::<2>::from_data(data, (&device, dtype))
    };
    let queries: Vec<f64> = which
        .iter()
        .flat_map(|row| &case.queries[row * h * e..(row + 1) * h * e])
        .copied()
        .collect();
    let rows: Vec<PagedRow<'_>> = which
        .iter()
        .map(|row| PagedRow {
            pages: &case.rows[*row].0,
            length: case.rows[*row].1,
        })
        .collect();
    let out = form(
        tensor(&queries, h * e),
        tensor(&case.keys, g * e),
        tensor(&case.values, g * e),
        &rows,
        case.page_size,
        h,
    );
    assert_eq!(out.dims(), [which.len(), h * e]);
    assert_eq!(out.dtype(), dtype);
    out.try_into_vec_as::<f64>().unwrap()
}

/// Computes softmax attention by the definition.
fn by_definition(case: &Case) -> Vec<f64> {
    let [h, g, e] = case.heads;
    let mut out = Vec::new();
    for (row, (pages, length)) in case.rows.iter().enumerate() {
        for head in 0..h {
            let query = &case.queries[(row * h + head) * e..][..e];
            let start = |p: usize| {
                let slot = pages[p / case.page_size] as usize * case.page_size + p % case.page_size;
                (slot * g + head / (h / g)) * e
            };
            let score = |p: usize| {
                let key = &case.keys[start(p)..][..e];
                let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                dot / (e as f64).sqrt()
            };
            let weights: Vec<f64> = (0..*length).map(|p| score(p).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..e).map(|i| {
                let term = |(p, weight): (usize, &f64)| weight * case.values[start(p) + i];
                weights.iter().enumerate().map(term).sum::<f64>() / total
            }));
        }
    }
    out
}

#[test]
fn both_forms_agree_with_the_definition() {
    for case in cases() {
        let exact = by_definition(&case);
        for (dtype, tolerance) in [
            (DType::F64, 1e-13),
            (DType::F32, 2e-6),
            (DType::F16, 8e-3),
            (DType::BF16, 6e-2),
        ] {
            for form in [paged_attention as Form, paged_attention_reference] {
                let found = run(&case, dtype, form);
                for (a, b) in found.iter().zip(&exact) {
                    assert!(
                        (a - b).abs() < tolerance,
                        "{:?} {dtype:?}: {a} {b}",
                        case.heads
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_other_rows_or_on_threads() {
    for case in cases() {
        let together = run(&case, DType::F32, paged_attention);
        let columns = case.heads[0] * case.heads[2];
        for row in 0..case.rows.len() {
            let alone = run_rows(&case, DType::F32, paged_attention, &[row, row]);
            assert_eq!(
                alone[..columns],
                together[row * columns..(row + 1) * columns]
            );
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let found = pool
                .unwrap()
                .install(|| run(&case, DType::F32, paged_attention));
            assert_eq!(found, together);
        }
    }
}

#[test]
fn the_page_size_does_not_change_the_bits() {
    for case in cases() {
        let expected = run(&case, DType::F32, paged_attention);
        let width = case.heads[1] * case.heads[2];
        for page_size in [1, 5, 64] {
            // The same positions are copied to pages of another size, row after row.
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            let mut rows = Vec::new();
            for (pages, length) in &case.rows {
                let first = keys.len() / width / page_size;
                for p in 0..*length {
                    let page = pages[p / case.page_size] as usize;
                    let slot = page * case.page_size + p % case.page_size;
                    keys.extend_from_slice(&case.keys[slot * width..(slot + 1) * width]);
                    values.extend_from_slice(&case.values[slot * width..(slot + 1) * width]);
                }
                let last = first + length.div_ceil(page_size);
                keys.resize(last * page_size * width, 7.0);
                values.resize(last * page_size * width, 7.0);
                rows.push(((first as u32..last as u32).collect(), *length));
            }
            let again = Case {
                heads: case.heads,
                page_size,
                slots: keys.len() / width,
                queries: case.queries.clone(),
                keys,
                values,
                rows,
            };
            assert_eq!(run(&again, DType::F32, paged_attention), expected);
        }
    }
}

#[test]
fn rows_are_written_in_place_unless_the_pool_is_shared() {
    for dtype in [DType::F32, DType::BF16] {
        let device = Device::flex();
        let pool = Tensor::<2>::zeros([6, 3], (&device, dtype));
        let rows = Tensor::<2>::from_data([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], (&device, dtype));
        let address = |pool: Tensor<2>| {
            let pool = pool.try_into_primitive::<Flex>().unwrap();
            pool.bytes().as_ptr() as usize
        };
        let before = address(pool.clone());
        let pool = write_slots(pool, rows.clone(), &[4, 1]);
        assert_eq!(address(pool.clone()), before);
        let expected = [
            [0.0; 3],
            [4.0, 5.0, 6.0],
            [0.0; 3],
            [0.0; 3],
            [1.0, 2.0, 3.0],
            [0.0; 3],
        ];
        let host = |pool: Tensor<2>| pool.try_into_vec_as::<f64>().unwrap();
        assert_eq!(host(pool.clone()), expected.concat());
        let kept = pool.clone();
        let changed = write_slots(pool, rows, &[0, 5]);
        assert_eq!(host(kept), expected.concat());
        assert_eq!(host(changed)[..3], [1.0, 2.0, 3.0]);
    }
}

#[test]
#[should_panic(expected = "row 0 sees 5 positions of 1 pages")]
fn positions_outside_the_pages_are_refused() {
    let mut case = case([2, 1, 4], 4, &[4]);
    case.rows = vec![(vec![0], 5)];
    assert!(case.slots >= 4);
    run(&case, DType::F32, paged_attention);
}
