//! Capture: the plain loops and the tensor operations agree with the definitions, and the draws are unbiased.

use burn::tensor::{DType, Device, Tensor, TensorData, TensorReadError};
use potstill_kernels::{
    CaptureOptions, CaptureRow, Captured, LogitTransform, capture, capture_reference,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

struct Case {
    n: usize,
    v: usize,
    /// Raw logits, many of them equal.
    logits: Vec<f64>,
    rows: Vec<CaptureRow>,
    top_k: usize,
    temperatures: Vec<f32>,
    draws: u32,
    head: LogitTransform,
}

impl Case {
    fn options(&self) -> CaptureOptions<'_> {
        CaptureOptions {
            head: self.head,
            top_k: self.top_k,
            temperatures: &self.temperatures,
            draws: self.draws,
        }
    }

    fn logits(&self, dtype: DType) -> Tensor<2> {
        let data = TensorData::new(self.logits.clone(), [self.n, self.v]);
        Tensor::from_data(data, (&Device::flex(), dtype))
    }
}

fn case(n: usize, v: usize, top_k: usize, draws: u32, head: LogitTransform) -> Case {
    let mut rng = ChaCha8Rng::seed_from_u64((n * 1_000_003 + v * 101 + top_k) as u64);
    let vocab = head.vocab.unwrap_or(v) as u32;
    // The logits are multiples of 1/64 below 4, which bf16 represents exactly, so that every row has ties.
    let logits = (0..n * v)
        .map(|_| f64::from(rng.random_range(-255..256)) / 64.0)
        .collect();
    let row = |row: usize, rng: &mut ChaCha8Rng| CaptureRow {
        kept: (0..row % 4).map(|_| rng.random_range(0..vocab)).collect(),
        seed: 7,
        position: row as u64,
    };
    let mut rows: Vec<CaptureRow> = (0..n).map(|at| row(at, &mut rng)).collect();
    // The last row has a repeated extra id and the first and last ids of the vocabulary.
    rows[n - 1].kept.extend([vocab - 1, 0, vocab - 1]);
    Case {
        n,
        v,
        logits,
        rows,
        top_k,
        temperatures: vec![1.0, 2.0, 0.25],
        draws,
        head,
    }
}

fn cases() -> Vec<Case> {
    let plain = LogitTransform::default();
    let full = LogitTransform {
        scale: 0.7,
        softcap: Some(5.0),
        temperature: 0.5,
        vocab: Some(2040),
    };
    let padded = LogitTransform {
        vocab: Some(4001),
        ..plain
    };
    vec![
        case(1, 1, 1, 3, plain),
        case(2, 7, 3, 1, plain),
        case(5, 64, 1, 5, plain),
        case(3, 65, 8, 40, plain),
        case(3, 37, 37, 4, plain),
        case(2, 37, 100, 4, plain),
        case(3, 300, 299, 7, plain),
        case(3, 300, 0, 7, plain),
        case(6, 2051, 64, 32, full),
        case(4, 4099, 30, 0, padded),
        case(4, 4099, 64, 100, padded),
        case(3, 49_153, 64, 32, plain),
    ]
}

/// Computes a row by the definitions in f64, without optimisations, together with the row's log-probabilities.
fn by_definition(case: &Case, row: usize) -> (Captured, Vec<f64>) {
    let vocab = case.head.vocab.unwrap_or(case.v);
    let z = &case.logits[row * case.v..row * case.v + vocab];
    let head = &case.head;
    let capped = |y: f64| head.softcap.map_or(y, |c| c * (y / c).tanh());
    let s: Vec<f64> = z
        .iter()
        .map(|z| capped(z * head.scale) / head.temperature)
        .collect();
    let largest = s.iter().copied().fold(f64::MIN, f64::max);
    let log_z = largest + s.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
    let log_p: Vec<f64> = s.iter().map(|s| s - log_z).collect();
    let mut order: Vec<usize> = (0..vocab).collect();
    // Raw logits are compared, because rounding in the transform could make equal logits differ.
    order.sort_by(|a, b| z[*b].total_cmp(&z[*a]).then(a.cmp(b)));
    let mut support = vec![false; vocab];
    order
        .iter()
        .take(case.top_k)
        .for_each(|id| support[*id] = true);
    let kept = &case.rows[row].kept;
    kept.iter().for_each(|id| support[*id as usize] = true);
    let ids: Vec<usize> = order.iter().copied().filter(|id| support[*id]).collect();
    let tail: f64 = (0..vocab)
        .filter(|id| !support[*id])
        .map(|id| log_p[id].exp())
        .sum();
    let at = |t: &f32| {
        let t = f64::from(*t);
        log_p.iter().map(|l| (l / t).exp()).sum::<f64>().ln() as f32
    };
    let expected = Captured {
        ids: ids.iter().map(|id| *id as u32).collect(),
        logprobs: ids.iter().map(|id| log_p[*id] as f32).collect(),
        tail_logprob: tail.ln() as f32,
        entropy: -log_p.iter().map(|l| l * l.exp()).sum::<f64>() as f32,
        log_z_at: case.temperatures.iter().map(at).collect(),
        ..Captured::default()
    };
    (expected, log_p)
}

type Form = fn(
    Tensor<2>,
    &[CaptureRow],
    &CaptureOptions<'_>,
) -> Result<Vec<Option<Captured>>, TensorReadError>;

fn compare(name: &str, dtype: DType, form: Form, tolerance: f64) {
    for case in cases() {
        let found = form(case.logits(dtype), &case.rows, &case.options()).unwrap();
        let mut worst = 0.0_f64;
        for (row, found) in found.into_iter().enumerate() {
            let found = found.unwrap();
            let (expected, log_p) = by_definition(&case, row);
            assert_eq!(found.ids, expected.ids, "{name}, row {row}");
            let numbers = |row: &Captured| -> Vec<f64> {
                let mut all = row.logprobs.clone();
                all.extend([row.tail_logprob, row.entropy]);
                all.extend(&row.log_z_at);
                all.into_iter().map(f64::from).collect()
            };
            for (a, b) in numbers(&found).iter().zip(numbers(&expected)) {
                let equal = *a == b || (a - b).abs() < tolerance;
                assert!(equal, "{name} {dtype:?} v={} row {row}: {a}, {b}", case.v);
                worst = worst.max(if *a == b { 0.0 } else { (a - b).abs() });
            }
            check_draws(&case, row, &found, &log_p, tolerance);
        }
        let (n, v, k) = (case.n, case.v, case.top_k);
        println!("{name} {dtype:?} n={n} v={v} k={k}: {worst:.1e}");
    }
}

/// Asserts that the counts are those of the points (u + j) / m in the tail's cumulative distribution in order of ids. A
/// point that is within the tolerance of a boundary may fall on either side.
fn check_draws(case: &Case, row: usize, found: &Captured, log_p: &[f64], tolerance: f64) {
    let mut generator = ChaCha8Rng::seed_from_u64(case.rows[row].seed);
    generator.set_stream(case.rows[row].position);
    let uniform: f64 = generator.random();
    let m = f64::from(case.draws);
    let counts: Vec<u32> = {
        let mut counts = vec![0; log_p.len()];
        for (id, count) in found.draw_ids.iter().zip(&found.draw_counts) {
            assert!(*count > 0 && !found.ids.contains(id));
            counts[*id as usize] = *count;
        }
        counts
    };
    assert!(found.draw_ids.is_sorted_by(|a, b| a < b));
    let has_tail = found.tail_logprob > f32::NEG_INFINITY;
    let total = if has_tail { case.draws } else { 0 };
    assert_eq!(counts.iter().sum::<u32>(), total);
    if !has_tail || case.draws == 0 {
        return;
    }
    let tail = |id: usize| match found.ids.contains(&(id as u32)) {
        true => 0.0,
        false => log_p[id].exp(),
    };
    let mass: f64 = (0..log_p.len()).map(tail).sum();
    let below = |share: f64| (m * share - uniform).ceil().clamp(0.0, m);
    let mut share = 0.0;
    for (id, count) in counts.iter().enumerate() {
        let next = share + tail(id) / mass;
        let least = below(next - tolerance) - below(share + tolerance);
        let most = below(next + tolerance) - below(share - tolerance);
        let count = f64::from(*count);
        assert!(
            (least..=most).contains(&count),
            "{count} of {least}..={most}"
        );
        share = next;
    }
}

#[test]
fn plain_loops_agree_with_the_definitions() {
    compare("plain loops", DType::F64, capture, 1e-6);
    compare("plain loops", DType::F32, capture, 5e-6);
    compare("plain loops", DType::F16, capture, 5e-6);
    compare("plain loops", DType::BF16, capture, 5e-6);
}

#[test]
fn tensor_operations_agree_with_the_definitions() {
    compare("tensor operations", DType::F64, capture_reference, 1e-6);
    compare("tensor operations", DType::F32, capture_reference, 2e-5);
    compare("tensor operations", DType::BF16, capture_reference, 2e-5);
}

#[test]
fn a_row_does_not_depend_on_the_other_rows_or_on_threads() {
    let mut case = case(9, 3001, 40, 20, LogitTransform::default());
    for logit in &mut case.logits {
        *logit = (*logit * 1.37).sin() * 6.0;
    }
    let logits = case.logits(DType::F32);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let run = || capture(logits.clone(), &case.rows, &case.options()).unwrap();
        pool.unwrap().install(run)
    };
    let all = on(1);
    assert_eq!(all, on(5));
    for (at, expected) in all.iter().enumerate() {
        let one = logits.clone().narrow(0, at, 1);
        let alone = capture(one, &case.rows[at..=at], &case.options()).unwrap();
        assert_eq!(&alone[0], expected);
    }
    // The draws depend on seed and position, and nothing else does.
    let mut rows = case.rows.clone();
    rows.iter_mut().for_each(|row| row.position += 100);
    let moved = capture(logits, &rows, &case.options()).unwrap();
    for (a, b) in all.iter().flatten().zip(moved.iter().flatten()) {
        assert_ne!(a.draw_ids, b.draw_ids);
        assert_eq!((&a.logprobs, a.entropy), (&b.logprobs, b.entropy));
    }
}

/// For these tails 1 − Σ would be 0 or noise, and exp(−200) is below the range of f32.
#[test]
fn a_tiny_tail_keeps_its_digits() {
    for form in [capture as Form, capture_reference] {
        for depth in [60.0, 200.0] {
            let mut logits = vec![-depth; 1000];
            logits[3] = 0.0;
            let row = one_row(form, &logits, &[], 1, 10).unwrap();
            assert_eq!(row.ids, [3]);
            let expected = 999f64.ln() - f64::from(depth);
            assert!((f64::from(row.tail_logprob) - expected).abs() < 2e-5);
            assert_eq!(row.draw_counts, [1; 10]);
        }
    }
}

#[test]
fn rows_that_are_no_distribution_are_refused() {
    let lowest = f32::NEG_INFINITY;
    for form in [capture as Form, capture_reference] {
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 70, 99] {
                let mut logits = vec![0.0; 100];
                logits[at] = bad;
                assert!(one_row(form, &logits, &[], 2, 2).is_none(), "{bad} at {at}");
            }
        }
        assert!(one_row(form, &[lowest; 3], &[], 2, 2).is_none());
        // A token of probability 0 may be in the tail, but not in the support.
        let row = one_row(form, &[0.0, lowest], &[], 1, 2).unwrap();
        assert_eq!((row.tail_logprob, row.draw_ids), (lowest, vec![]));
        assert!(one_row(form, &[0.0, lowest], &[1], 1, 2).is_none());
        assert!(one_row(form, &[0.0, lowest], &[], 2, 2).is_none());
        // Extra id 2 is outside the vocabulary.
        assert!(one_row(form, &[0.0, 1.0], &[2], 1, 2).is_none());
        // A row that is no distribution does not affect the other rows.
        let logits = Tensor::<2>::from_data([[0.0, 1.0], [f32::NAN, 0.0]], &Device::flex());
        let rows = vec![CaptureRow::default(); 2];
        let found = form(logits, &rows, &options(1, 0)).unwrap();
        assert!(found[0].is_some() && found[1].is_none());
    }
}

#[test]
fn among_equals_the_lower_id_comes_first() {
    for form in [capture as Form, capture_reference] {
        let row = one_row(form, &[1.0; 500], &[400, 7], 5, 0).unwrap();
        assert_eq!(row.ids, [0, 1, 2, 3, 4, 7, 400]);
        let row = one_row(form, &[0.0, -0.0, 0.0, -1.0], &[], 2, 0).unwrap();
        assert_eq!(row.ids, [0, 1]);
    }
}

/// Over 20,000 seeds, no count's mean deviates by more than chance allows, and counts vary no more than those of
/// independent draws.
#[test]
fn draws_are_unbiased_and_vary_less_than_independent_ones() {
    const V: usize = 512;
    const SEEDS: usize = 20_000;
    const DRAWS: u32 = 16;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut worst, mut tests) = (0.0_f64, 0);
    let rows = [(0.3, 64, 0.0), (0.7, 8, 0.0), (0.3, 0, 5.5), (0.0, 1, 0.0)];
    for (position, (spread, top_k, peak)) in rows.into_iter().enumerate() {
        let mut logits: Vec<f32> = (0..V)
            .map(|_| rng.random_range(-1.0..1.0) * spread)
            .collect();
        logits[300] += peak;
        let repeated: Vec<f32> = logits.iter().copied().cycle().take(V * SEEDS).collect();
        let data = TensorData::new(repeated, [SEEDS, V]);
        let row = |seed: usize| CaptureRow {
            kept: vec![11],
            seed: seed as u64,
            position: position as u64,
        };
        let rows: Vec<CaptureRow> = (0..SEEDS).map(row).collect();
        let logits_nv = Tensor::from_data(data, &Device::flex());
        let captured = capture(logits_nv, &rows, &options(top_k, DRAWS)).unwrap();
        let (mut sums, mut squares) = (vec![0.0; V], vec![0.0; V]);
        for row in captured.iter().flatten() {
            for (id, count) in row.draw_ids.iter().zip(&row.draw_counts) {
                sums[*id as usize] += f64::from(*count);
                squares[*id as usize] += f64::from(*count).powi(2);
            }
        }
        let support = &captured[0].as_ref().unwrap().ids;
        let tail: Vec<usize> = (0..V)
            .filter(|id| !support.contains(&(*id as u32)))
            .collect();
        let mass: f64 = tail.iter().map(|id| f64::from(logits[*id]).exp()).sum();
        let (mut variance, mut independent) = (0.0, 0.0);
        for id in &tail {
            let p = f64::from(logits[*id]).exp() / mass;
            let expected = f64::from(DRAWS) * p;
            let mean = sums[*id] / SEEDS as f64;
            let fraction = expected.fract();
            let error = (fraction * (1.0 - fraction) / SEEDS as f64).sqrt();
            worst = worst.max((mean - expected).abs() / error);
            variance += squares[*id] / SEEDS as f64 - mean * mean;
            independent += expected * (1.0 - p);
        }
        tests += tail.len();
        let n = tail.len() as f64;
        println!(
            "{} tokens: mean variance of a count {:.5}, of independent draws {:.5}",
            tail.len(),
            variance / n,
            independent / n
        );
        assert!(variance <= independent);
    }
    let quantile = normal_quantile(1e-6 / (2 * tests) as f64);
    println!("largest |mean − p| / SE of {tests}: {worst:.2}, quantile {quantile:.2}");
    assert!(worst < quantile);
}

/// Computes z with P(Z > z) = p for a small p, by bisection on φ(z)/z · (1 − 1/z² + 3/z⁴ − 15/z⁶).
fn normal_quantile(p: f64) -> f64 {
    let upper = |z: f64| {
        let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        density / z * (1.0 - z.powi(-2) + 3.0 * z.powi(-4) - 15.0 * z.powi(-6))
    };
    let (mut low, mut high) = (4.0, 20.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match upper(middle) > p {
            true => low = middle,
            false => high = middle,
        }
    }
    low
}

fn options(top_k: usize, draws: u32) -> CaptureOptions<'static> {
    CaptureOptions {
        head: LogitTransform::default(),
        top_k,
        temperatures: &[],
        draws,
    }
}

fn one_row(form: Form, logits: &[f32], kept: &[u32], top_k: usize, draws: u32) -> Option<Captured> {
    let data = TensorData::new(logits.to_vec(), [1, logits.len()]);
    let row = CaptureRow {
        kept: kept.to_vec(),
        seed: 3,
        position: 4,
    };
    let logits_nv = Tensor::from_data(data, &Device::flex());
    let mut found = form(logits_nv, &[row], &options(top_k, draws)).unwrap();
    found.remove(0)
}
