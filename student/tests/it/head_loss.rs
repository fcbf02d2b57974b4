//! The gradients of `head_loss`: both implementations, all chunk sizes, frozen heads, bf16.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{EMPTY_NATS, LogQSum, LogitTransform, RowStats};
use potstill_student::loss::{cross_entropy, forward_kl, jsd};
use potstill_student::{Form, HeadGradient, HeadLossOptions, head_loss};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::relative;

struct Case {
    n: usize,
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    log_p_nk: Tensor<2>,
}

/// A case with ragged supports, so that some slots are empty.
fn case(n: usize, d: usize, v: usize, k: usize, dtype: DType) -> Case {
    let device = Device::flex();
    let mut random = ChaCha8Rng::seed_from_u64((n * 31 + v) as u64);
    let mut floats = |shape: [usize; 2], dtype: DType| {
        let values = (0..shape[0] * shape[1]).map(|_| random.random_range(-1.0..1.0));
        let data = TensorData::new(values.collect::<Vec<f64>>(), shape);
        Tensor::<2>::from_data(data, (&device, dtype))
    };
    let hidden_nd = floats([n, d], dtype);
    let head_vd = floats([v, d], dtype);
    let (mut ids, mut log_p) = (Vec::new(), Vec::new());
    for row in 0..n {
        let filled = 1 + row % k;
        let slots = (0..k).map(|slot| match slot < filled {
            true => ((row * 7 + slot * 5) % v) as i32,
            false => -1,
        });
        ids.extend(slots);
        let mass = |slot| 0.8 / filled as f64 / (1.0 + f64::from(slot));
        let p = (0..k as u32).map(|slot| match (slot as usize) < filled {
            true => mass(slot),
            false => 0.0,
        });
        let p: Vec<f64> = p.collect();
        let tail = 1.0 - p.iter().sum::<f64>();
        log_p.extend(p.iter().chain([&tail]).map(|p| p.ln().max(EMPTY_NATS)));
    }
    let wide = match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    Case {
        n,
        hidden_nd,
        head_vd,
        support_nk: Tensor::from_data(TensorData::new(ids, [n, k]), (&device, DType::I32)),
        log_p_nk: Tensor::from_data(TensorData::new(log_p, [n, k + 1]), (&device, wide)),
    }
}

/// Computes the gradient of JSD at temperature 2 plus the cross-entropy of the first slot at temperature 1, each a
/// mean over rows.
fn gradient(case: &Case, form: Form, chunk_rows: usize, train_head: bool) -> HeadGradient {
    let plain = LogitTransform::default();
    let tempered = LogitTransform {
        temperature: 2.0,
        softcap: Some(4.0),
        ..plain
    };
    let options = HeadLossOptions {
        heads: &[tempered, plain],
        sum: LogQSum::Omitted,
        train_head,
        chunk_rows,
        form,
    };
    let mut loss = |rows: std::ops::Range<usize>, stats: &[RowStats]| {
        let log_p_nk = case.log_p_nk.clone().slice(rows);
        let distance_n = jsd(log_p_nk, stats[0].log_q_nk(), 0.3);
        let nll_n = cross_entropy(stats[1].log_q_nk().narrow(1, 0, 1));
        (distance_n + nll_n * 0.5).sum() / case.n as f64
    };
    head_loss(
        case.hidden_nd.clone(),
        case.head_vd.clone(),
        case.support_nk.clone(),
        &options,
        &mut loss,
    )
}

fn numbers(tensor: &Tensor<2>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

fn apart(a: &HeadGradient, b: &HeadGradient) -> f64 {
    let hidden = relative(&numbers(&a.hidden_nd), &numbers(&b.hidden_nd));
    let [a, b] = [a, b].map(|of| numbers(of.head_vd.as_ref().unwrap()));
    hidden.max(relative(&a, &b))
}

#[test]
fn chunks_and_forms_agree() {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        for (n, d, v, k) in [(1, 3, 5, 1), (13, 8, 37, 4), (70, 24, 2051, 64)] {
            let case = case(n, d, v, k, dtype);
            let plain = gradient(&case, Form::Plain, 1, true);
            for chunk_rows in [1, 5, 64, 4096] {
                let off = apart(&gradient(&case, Form::Fused, chunk_rows, true), &plain);
                println!("{dtype:?} n={n} d={d} v={v} k={k}, {chunk_rows} rows: {off:.1e}");
                assert!(off < tolerance, "{off:.1e}");
            }
        }
    }
}

#[test]
fn a_frozen_head_has_no_gradient_and_the_states_have_the_same() {
    let case = case(13, 8, 37, 4, DType::F32);
    for form in [Form::Fused, Form::Plain] {
        let (trained, frozen) = (
            gradient(&case, form, 5, true),
            gradient(&case, form, 5, false),
        );
        assert!(frozen.head_vd.is_none());
        assert_eq!(numbers(&frozen.hidden_nd), numbers(&trained.hidden_nd));
    }
}

/// The head's gradient is summed over chunks in f32: in bf16 the sum over 512 rows would lose most of the
/// contribution of late rows.
#[test]
fn bf16_is_summed_in_f32() {
    let case = case(512, 16, 97, 4, DType::BF16);
    let as_f64 = |tensor: &Tensor<2>| tensor.clone().cast(DType::F64);
    let exact = Case {
        hidden_nd: as_f64(&case.hidden_nd),
        head_vd: as_f64(&case.head_vd),
        log_p_nk: as_f64(&case.log_p_nk),
        support_nk: case.support_nk.clone(),
        ..case
    };
    let want = gradient(&exact, Form::Plain, 1, true);
    let head = |of: &HeadGradient| numbers(of.head_vd.as_ref().unwrap());
    for chunk_rows in [1, 512] {
        let got = gradient(&case, Form::Fused, chunk_rows, true);
        assert_eq!(got.head_vd.as_ref().unwrap().dtype(), DType::F32);
        assert_eq!(got.hidden_nd.dtype(), DType::BF16);
        let off = relative(&head(&got), &head(&want));
        println!("bf16, chunks of {chunk_rows}: {off:.1e}");
        assert!(off < 6e-3, "{off:.1e}");
    }
}

/// A small step against the gradient makes the loss smaller, so all signs are correct.
#[test]
fn the_gradient_points_uphill() {
    let case = case(13, 8, 37, 4, DType::F64);
    let value = |hidden_nd: &Tensor<2>| {
        let mut sum = 0.0;
        let options = HeadLossOptions {
            heads: &[LogitTransform::default()],
            sum: LogQSum::Omitted,
            train_head: true,
            chunk_rows: 4,
            form: Form::Fused,
        };
        let mut loss = |rows: std::ops::Range<usize>, stats: &[RowStats]| {
            let kl_n = forward_kl(case.log_p_nk.clone().slice(rows), stats[0].log_q_nk());
            sum += kl_n.to_data().iter::<f64>().sum::<f64>();
            kl_n.sum()
        };
        let (head_vd, support_nk) = (case.head_vd.clone(), case.support_nk.clone());
        let gradient = head_loss(hidden_nd.clone(), head_vd, support_nk, &options, &mut loss);
        (sum, gradient.hidden_nd)
    };
    let (before, gradient_nd) = value(&case.hidden_nd);
    let step = 1e-6;
    let (after, _) = value(&(case.hidden_nd.clone() - gradient_nd.clone() * step));
    let square: f64 = numbers(&gradient_nd).iter().map(|g| g * g).sum();
    let ratio = (before - after) / (step * square);
    assert!((ratio - 1.0).abs() < 1e-4, "{ratio}");
}
