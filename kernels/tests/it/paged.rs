//! Paged attention: the plain loops and the tensor operations agree with the definition in f64, and the bits of a row
//! depend on that row only.

use burn::backend::Flex;
use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::{
    AttentionOptions, PagedOptions, PagedRow, paged_attention, paged_attention_reference,
    write_slots,
};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

#[derive(Clone)]
struct Case {
    options: PagedOptions,
    /// Width of a key, and numbers of a key head in a slot of the values' pool.
    widths: [usize; 2],
    queries: Vec<f64>,
    keys: Vec<f64>,
    /// `None` where the values are columns of the keys' pool.
    values: Option<Vec<f64>>,
    sinks: Option<Vec<f64>>,
    rows: Vec<Row>,
}

#[derive(Clone)]
struct Row {
    pages: Vec<u32>,
    first: usize,
    length: usize,
}

/// Makes a case of full causal attention with these numbers of query heads, of key heads and of columns of a head. Each
/// length is that of a sequence, whose last `rows` positions are the rows.
fn case(heads: [usize; 3], page_size: usize, lengths: &[usize], rows: usize) -> Case {
    let [h, g, e] = heads;
    let mut rng = ChaCha8Rng::seed_from_u64((h * 1009 + g * 101 + e * 11 + page_size) as u64);
    let pages_of = |length: usize| length.div_ceil(page_size) + 1;
    let pages: usize = lengths.iter().copied().map(pages_of).sum();
    let mut order: Vec<u32> = (0..pages as u32).collect();
    order.shuffle(&mut rng);
    let rows_of = |&length: &usize| {
        let pages = order.split_off(order.len() - pages_of(length));
        let row = move |length| Row {
            pages: pages.clone(),
            first: 0,
            length,
        };
        (length.saturating_sub(rows) + 1..=length).map(row)
    };
    let rows: Vec<Row> = lengths.iter().flat_map(rows_of).collect();
    let slots = pages * page_size;
    let mut numbers = |count: usize| (0..count).map(|_| rng.random_range(-2.0..2.0)).collect();
    Case {
        options: PagedOptions {
            attention: AttentionOptions {
                heads: h,
                key_heads: g,
                scale: 1.0 / (e as f64).sqrt(),
                softcap: None,
                window: None,
            },
            page_size,
            value_width: e,
        },
        widths: [e, e],
        queries: numbers(rows.len() * h * e),
        keys: numbers(slots * g * e),
        values: Some(numbers(slots * g * e)),
        sinks: None,
        rows,
    }
}

impl Case {
    fn with_softcap(mut self, softcap: f64) -> Self {
        self.options.attention.softcap = Some(softcap);
        // Larger scores, so that the cap matters.
        self.options.attention.scale *= 3.0;
        self
    }

    /// Sets a window, and drops the pages behind it from some of the rows.
    fn with_window(mut self, window: usize) -> Self {
        self.options.attention.window = Some(window);
        for (index, row) in self.rows.iter_mut().enumerate() {
            // Blocks of rows on equal pages stay.
            let first = index / 9 * 9;
            if first % 2 == 0 {
                continue;
            }
            let behind = row.length.saturating_sub(window + index - first);
            let dropped = behind / self.options.page_size;
            row.pages.drain(..dropped);
            row.first = dropped * self.options.page_size;
        }
        self
    }

    fn with_sinks(mut self) -> Self {
        let sinks = (0..self.options.attention.heads).map(|head| 3.0 - head as f64 * 1.5);
        self.sinks = Some(sinks.collect());
        self
    }

    /// Reads only the first columns of each head's share of the values.
    fn with_value_width(mut self, width: usize) -> Self {
        self.options.value_width = width;
        self
    }

    /// Takes the values from the keys' pool.
    fn with_values_in_keys(mut self, width: usize) -> Self {
        self.values = None;
        self.with_value_width(width)
    }

    fn slot(&self, row: &Row, position: usize) -> usize {
        let (index, size) = (position - row.first, self.options.page_size);
        row.pages[index / size] as usize * size + index % size
    }

    fn seen(&self, row: &Row) -> std::ops::Range<usize> {
        let window = self.options.attention.window.unwrap_or(row.length);
        row.length.saturating_sub(window)..row.length
    }
}

fn cases() -> Vec<Case> {
    vec![
        case([1, 1, 1], 1, &[1], 1),
        case([6, 2, 4], 4, &[1, 9, 4, 17, 3], 1),
        case([3, 3, 20], 16, &[16, 33, 1], 1),
        case([9, 3, 64], 16, &[100, 5, 16, 17, 257, 1, 31], 1),
        case([4, 1, 80], 8, &[40, 64, 7], 2).with_sinks(),
        case([2, 2, 128], 32, &[700, 90], 1),
        case([4, 2, 24], 4, &[70, 3, 41], 50),
        case([4, 2, 32], 8, &[90, 30], 60).with_window(8),
        case([4, 2, 16], 3, &[64, 20], 33)
            .with_window(10)
            .with_sinks(),
        case([4, 4, 33], 16, &[130], 130).with_softcap(2.5),
        case([8, 4, 24], 16, &[50, 9], 20).with_value_width(13),
        case([16, 1, 72], 16, &[50, 9, 77], 9).with_values_in_keys(64),
        case([3, 1, 70], 5, &[55], 40)
            .with_values_in_keys(7)
            .with_sinks()
            .with_softcap(4.0)
            .with_window(21),
    ]
}

type Form = fn(
    Tensor<2>,
    Tensor<2>,
    Tensor<2>,
    Option<Tensor<1>>,
    &[PagedRow<'_>],
    &PagedOptions,
) -> Tensor<2>;

fn run(case: &Case, dtype: DType, form: Form) -> Vec<f64> {
    let rows: Vec<usize> = (0..case.rows.len()).collect();
    run_rows(case, dtype, form, &rows)
}

/// Runs some of the rows.
fn run_rows(case: &Case, dtype: DType, form: Form, which: &[usize]) -> Vec<f64> {
    let AttentionOptions {
        heads, key_heads, ..
    } = case.options.attention;
    let device = Device::flex();
    let [e, stride] = case.widths;
    let tensor = |values: &[f64], columns: usize| {
        let data = TensorData::new(values.to_vec(), [values.len() / columns, columns]);
        Tensor::<2>::from_data(data, (&device, dtype))
    };
    let of_row = |row: &usize| &case.queries[row * heads * e..(row + 1) * heads * e];
    let queries: Vec<f64> = which.iter().flat_map(of_row).copied().collect();
    let paged_row = |row: &usize| PagedRow {
        pages: &case.rows[*row].pages,
        first: case.rows[*row].first,
        length: case.rows[*row].length,
    };
    let rows: Vec<PagedRow<'_>> = which.iter().map(paged_row).collect();
    let keys = tensor(&case.keys, key_heads * e);
    let values = case.values.as_ref();
    let values = values.map_or(keys.clone(), |values| tensor(values, key_heads * stride));
    let sinks = case.sinks.as_ref().map(|sinks| {
        Tensor::<1>::from_data(TensorData::new(sinks.clone(), [heads]), (&device, dtype))
    });
    let queries = tensor(&queries, heads * e);
    let out = form(queries, keys, values, sinks, &rows, &case.options);
    assert_eq!(out.dims(), [which.len(), heads * case.options.value_width]);
    assert_eq!(out.dtype(), dtype);
    out.try_into_vec_as::<f64>().unwrap()
}

/// Computes softmax attention by the definition.
fn by_definition(case: &Case) -> Vec<f64> {
    let options = &case.options.attention;
    let (h, g, [e, stride]) = (options.heads, options.key_heads, case.widths);
    let values = case.values.as_ref().unwrap_or(&case.keys);
    let mut out = Vec::new();
    for (index, row) in case.rows.iter().enumerate() {
        for head in 0..h {
            let query = &case.queries[(index * h + head) * e..][..e];
            let of_head = |p: usize| case.slot(row, p) * g + head / (h / g);
            let score = |p: usize| {
                let key = &case.keys[of_head(p) * e..][..e];
                let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                let score = dot * options.scale;
                options.softcap.map_or(score, |c| c * (score / c).tanh())
            };
            let weights: Vec<f64> = case.seen(row).map(|p| score(p).exp()).collect();
            let sink = case.sinks.as_ref().map_or(0.0, |sinks| sinks[head].exp());
            let total: f64 = weights.iter().sum::<f64>() + sink;
            out.extend((0..case.options.value_width).map(|i| {
                let term = |(p, weight): (usize, &f64)| weight * values[of_head(p) * stride + i];
                case.seen(row).zip(&weights).map(term).sum::<f64>() / total
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
            (DType::F32, 3e-6),
            (DType::F16, 8e-3),
            (DType::BF16, 6e-2),
        ] {
            for form in [paged_attention as Form, paged_attention_reference] {
                let found = run(&case, dtype, form);
                for (a, b) in found.iter().zip(&exact) {
                    assert!(
                        (a - b).abs() < tolerance,
                        "{:?} {dtype:?}: {a} {b}",
                        case.options
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
        let columns = case.options.attention.heads * case.options.value_width;
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
fn pages_and_their_size_do_not_change_the_bits() {
    for case in cases() {
        let expected = run(&case, DType::F32, paged_attention);
        let g = case.options.attention.key_heads;
        let [e, stride] = case.widths.map(|width| width * g);
        for page_size in [1, 5, 64] {
            // The positions that a row sees are copied to pages of another size, row after row.
            let mut again = case.clone();
            again.options.page_size = page_size;
            again.keys.clear();
            again.values = case.values.as_ref().map(|_| Vec::new());
            for (row, of_row) in case.rows.iter().zip(&mut again.rows) {
                let first_page = again.keys.len() / e / page_size;
                of_row.first = case.seen(row).start / page_size * page_size;
                let last_page = first_page + (row.length - of_row.first).div_ceil(page_size);
                of_row.pages = (first_page as u32..last_page as u32).collect();
                again.keys.resize(last_page * page_size * e, 7.0);
                if let Some(values) = &mut again.values {
                    values.resize(last_page * page_size * stride, 7.0);
                }
                for p in case.seen(row) {
                    let from = case.slot(row, p);
                    let to = first_page * page_size + p - of_row.first;
                    let key = &case.keys[from * e..(from + 1) * e];
                    again.keys[to * e..(to + 1) * e].copy_from_slice(key);
                    if let (Some(values), Some(from_values)) = (&mut again.values, &case.values) {
                        let value = &from_values[from * stride..(from + 1) * stride];
                        values[to * stride..(to + 1) * stride].copy_from_slice(value);
                    }
                }
            }
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
#[should_panic(expected = "row 0 sees positions 0..5 of 1 pages from position 0")]
fn positions_outside_the_pages_are_refused() {
    let mut case = case([2, 1, 4], 4, &[4], 1);
    case.rows[0].pages = vec![0];
    case.rows[0].length = 5;
    run(&case, DType::F32, paged_attention);
}

#[test]
#[should_panic(expected = "row 0 sees positions 3..8 of 2 pages from position 4")]
fn positions_on_dropped_pages_are_refused() {
    let mut case = case([2, 1, 4], 4, &[8], 1).with_window(5);
    case.rows[0].pages.remove(0);
    case.rows[0].first = 4;
    run(&case, DType::F32, paged_attention);
}
