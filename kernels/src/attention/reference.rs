//! Attention in tensor operations: documents become the rows of a batch, padded to the longest document.

use burn::tensor::activation::softmax;
use burn::tensor::module::attention as fused_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::AttentionOptions;

/// Computes [`attention`](super::attention) in tensor operations, for every float type and device.
///
/// The softmax of half precisions is computed in f32. If gradients are tracked, all scores
/// `[documents, heads, longest, longest]` are allocated at once. No document may be empty.
#[must_use]
pub fn attention_reference(
    q_nc: Tensor<2>,
    k_nc: Tensor<2>,
    v_nc: Tensor<2>,
    sinks_h: Option<Tensor<1>>,
    documents: &[usize],
    options: &AttentionOptions,
) -> Tensor<2> {
    let ([n, columns], [_, value_columns]) = (q_nc.dims(), v_nc.dims());
    let e = columns / options.heads;
    let value_width = value_columns / options.key_heads;
    let longest = documents.iter().copied().max().unwrap_or(0);
    if longest == 0 {
        return Tensor::zeros(
            [0, options.heads * value_width],
            (&q_nc.device(), q_nc.dtype()),
        );
    }
    let b = documents.len();
    let equal = documents.iter().all(|length| *length == longest);
    let device = q_nc.device();
    let to_batch = |rows: Tensor<2>, heads: usize| {
        let width = rows.dims()[1] / heads;
        let rows = if equal {
            rows
        } else {
            rows.select(0, padded_rows(documents, longest, &device))
        };
        rows.reshape([b, longest, heads, width]).swap_dims(1, 2)
    };
    let q_bhte = to_batch(q_nc, options.heads);
    let [k_bgte, v_bgte] = [k_nc, v_nc].map(|rows| to_batch(rows, options.key_heads));
    let is_plain = options.softcap.is_none()
        && options.window.is_none()
        && sinks_h.is_none()
        && value_width == e
        && (options.scale * (e as f64).sqrt() - 1.0).abs() < 1e-12;
    let tracked = [&q_bhte, &k_bgte, &v_bgte]
        .into_iter()
        .any(Tensor::is_autodiff);
    let output_bhte = if is_plain && !tracked {
        // burn's own attention does not allocate all scores, but it has no gradient.
        let options = AttentionModuleOptions {
            is_causal: true,
            ..Default::default()
        };
        fused_attention(q_bhte, k_bgte, v_bgte, None, None, options)
    } else {
        attention_by_scores(q_bhte, k_bgte, v_bgte, sinks_h, options)
    };
    let output = output_bhte
        .swap_dims(1, 2)
        .reshape([b * longest, options.heads * value_width]);
    if equal {
        output
    } else {
        output.select(0, unpadded_rows(documents, longest, n, &device))
    }
}

/// Computes attention of a batch of documents from all its scores.
fn attention_by_scores(
    q_bhte: Tensor<4>,
    k_bgte: Tensor<4>,
    v_bgtw: Tensor<4>,
    sinks_h: Option<Tensor<1>>,
    options: &AttentionOptions,
) -> Tensor<4> {
    let ([b, h, t, e], [.., w]) = (q_bhte.dims(), v_bgtw.dims());
    let (g, device, dtype) = (options.key_heads, q_bhte.device(), q_bhte.dtype());
    let q_bgre = (q_bhte * options.scale).reshape([b, g, h / g * t, e]);
    let scores = q_bgre.matmul(k_bgte.swap_dims(2, 3)).reshape([b, h, t, t]);
    let half = matches!(dtype, DType::F16 | DType::BF16);
    let scores = if half {
        scores.cast(DType::F32)
    } else {
        scores
    };
    let scores = match options.softcap {
        Some(c) => (scores / c).tanh() * c,
        None => scores,
    };
    let scores = scores.clone() + bias(t, options.window, scores.dtype(), &device);
    let weights = match sinks_h {
        None => softmax(scores, 3),
        Some(sinks_h) => {
            let sinks_h = sinks_h.cast(scores.dtype());
            let sinks = sinks_h.reshape([1, h, 1, 1]).expand([b, h, t, 1]);
            softmax(Tensor::cat(vec![scores, sinks], 3), 3).narrow(3, 0, t)
        }
    };
    let weights = if half { weights.cast(dtype) } else { weights };
    weights
        .reshape([b, g, h / g * t, t])
        .matmul(v_bgtw)
        .reshape([b, h, t, w])
}

/// Returns the mask `[1, 1, t, t]`: 0 where row i sees column j, and −∞ elsewhere.
fn bias(t: usize, window: Option<usize>, dtype: DType, device: &Device) -> Tensor<4> {
    let window = window.unwrap_or(t);
    let mut bias = vec![f32::NEG_INFINITY; t * t];
    for (row, bias) in bias.chunks_mut(t).enumerate() {
        bias[(row + 1).saturating_sub(window)..=row].fill(0.0);
    }
    Tensor::from_data(TensorData::new(bias, [1, 1, t, t]), (device, dtype))
}

/// Returns the row for each position of the batch `[documents, longest]`. The padding repeats a document's last row;
/// it comes after all rows of the document, so none of them sees it.
fn padded_rows(documents: &[usize], longest: usize, device: &Device) -> Tensor<1, Int> {
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

/// Returns the position in the batch `[documents, longest]` for each row.
fn unpadded_rows(documents: &[usize], longest: usize, n: usize, device: &Device) -> Tensor<1, Int> {
    let positions = documents.iter().enumerate().flat_map(|(document, length)| {
        (0..*length).map(move |column| (document * longest + column) as i32)
    });
    let positions: Vec<i32> = positions.collect();
    Tensor::from_data(TensorData::new(positions, [n]), (device, DType::I32))
}
