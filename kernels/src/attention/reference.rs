//! The same in tensor operations: documents are laid beside one another, filled up to the longest.

use burn::tensor::activation::softmax;
use burn::tensor::module::attention as fused;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::Attention;

/// [`attention`](super::attention) in tensor operations, for any type and device. Softmax of the half
/// precisions is taken in f32. All scores `[documents, heads, longest, longest]` exist at once where
/// gradients are kept. No document may be empty.
#[must_use]
pub fn attention_reference(
    q_nc: Tensor<2>,
    k_nc: Tensor<2>,
    v_nc: Tensor<2>,
    documents: &[usize],
    how: &Attention,
) -> Tensor<2> {
    let [n, columns] = q_nc.dims();
    let longest = documents.iter().copied().max().unwrap_or(0);
    if longest == 0 {
        return q_nc;
    }
    let (b, e) = (documents.len(), columns / how.heads);
    let equal = documents.iter().all(|length| *length == longest);
    let device = q_nc.device();
    let lay = |rows: Tensor<2>, heads: usize| {
        let rows = if equal {
            rows
        } else {
            rows.select(0, filled_up(documents, longest, &device))
        };
        rows.reshape([b, longest, heads, e]).swap_dims(1, 2)
    };
    let q_bhte = lay(q_nc, how.heads);
    let (k_bgte, v_bgte) = (lay(k_nc, how.key_heads), lay(v_nc, how.key_heads));
    let plain = how.softcap.is_none() && how.window.is_none() && usual_scale(how, e);
    let tracked = [&q_bhte, &k_bgte, &v_bgte]
        .into_iter()
        .any(Tensor::is_autodiff);
    let mixed_bhte = if plain && !tracked {
        // burn's own, which never holds all scores; it has no gradient.
        let options = AttentionModuleOptions {
            is_causal: true,
            ..Default::default()
        };
        fused(q_bhte, k_bgte, v_bgte, None, None, options)
    } else {
        scored(q_bhte, k_bgte, v_bgte, how)
    };
    let mixed = mixed_bhte.swap_dims(1, 2).reshape([b * longest, columns]);
    if equal {
        mixed
    } else {
        mixed.select(0, taken_back(documents, longest, n, &device))
    }
}

fn usual_scale(how: &Attention, e: usize) -> bool {
    (how.scale * (e as f64).sqrt() - 1.0).abs() < 1e-12
}

fn scored(q_bhte: Tensor<4>, k_bgte: Tensor<4>, v_bgte: Tensor<4>, how: &Attention) -> Tensor<4> {
    let [b, h, t, e] = q_bhte.dims();
    let (g, device, dtype) = (how.key_heads, q_bhte.device(), q_bhte.dtype());
    let q_bgre = (q_bhte * how.scale).reshape([b, g, h / g * t, e]);
    let scores = q_bgre.matmul(k_bgte.swap_dims(2, 3)).reshape([b, h, t, t]);
    let half = matches!(dtype, DType::F16 | DType::BF16);
    let scores = if half {
        scores.cast(DType::F32)
    } else {
        scores
    };
    let scores = match how.softcap {
        Some(c) => (scores / c).tanh() * c,
        None => scores,
    };
    let weights = softmax(
        scores.clone() + bias(t, how.window, scores.dtype(), &device),
        3,
    );
    let weights = if half { weights.cast(dtype) } else { weights };
    weights
        .reshape([b, g, h / g * t, t])
        .matmul(v_bgte)
        .reshape([b, h, t, e])
}

/// `[1, 1, t, t]`: 0 where row i sees column j, and −∞ elsewhere.
fn bias(t: usize, window: Option<usize>, dtype: DType, device: &Device) -> Tensor<4> {
    let window = window.unwrap_or(t);
    let mut bias = vec![f32::NEG_INFINITY; t * t];
    for (row, bias) in bias.chunks_mut(t).enumerate() {
        bias[(row + 1).saturating_sub(window)..=row].fill(0.0);
    }
    Tensor::from_data(TensorData::new(bias, [1, 1, t, t]), (device, dtype))
}

/// For each place of `[documents, longest]` its row; filling repeats a document's last row, behind all of
/// its own rows, so none of them sees it.
fn filled_up(documents: &[usize], longest: usize, device: &Device) -> Tensor<1, Int> {
    let mut rows = Vec::with_capacity(documents.len() * longest);
    let mut start = 0;
    for length in documents {
        let last = start + length.saturating_sub(1);
        rows.extend((0..longest).map(|column| (start + column).min(last) as i32));
        start += length;
    }
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), (device, DType::I32))
}

/// For each row its place in `[documents, longest]`.
fn taken_back(documents: &[usize], longest: usize, n: usize, device: &Device) -> Tensor<1, Int> {
    let places = documents.iter().enumerate().flat_map(|(document, length)| {
        (0..*length).map(move |column| (document * longest + column) as i32)
    });
    let places: Vec<i32> = places.collect();
    Tensor::from_data(TensorData::new(places, [n]), (device, DType::I32))
}
