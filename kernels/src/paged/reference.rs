//! Paged attention in tensor operations, which devices other than the CPU run and which the tests compare the loops
//! with. Every row gets a copy of the keys and values that it sees, `[n, longest, columns]` each.

use super::{PagedOptions, PagedRow};
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// Computes [`paged_attention`](super::paged_attention) in tensor operations, on any device and with the same shapes.
#[must_use]
pub fn paged_attention_reference(
    q_nc: Tensor<2>,
    keys_sc: Tensor<2>,
    values_sc: Tensor<2>,
    sinks_h: Option<Tensor<1>>,
    rows: &[PagedRow<'_>],
    options: &PagedOptions,
) -> Tensor<2> {
    let ([n, c], device, dtype) = (q_nc.dims(), q_nc.device(), q_nc.dtype());
    let (heads, g) = (options.attention.heads, options.attention.key_heads);
    let (r, e) = (heads / g, c / heads);
    let sums = match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    };
    let (slots, bias) = seen_slots(rows, options);
    let longest = slots.len() / n.max(1);
    let slots = indices(&slots, &device);
    let heads_of = |pool_sc: Tensor<2>| {
        let stride = pool_sc.dims()[1] / g;
        let seen = pool_sc.select(0, slots.clone());
        seen.reshape([n, longest, g, stride]).swap_dims(1, 2)
    };
    let k_ngue = heads_of(keys_sc);
    let v_ngue = heads_of(values_sc).narrow(3, 0, options.value_width);
    let q_ngre = (q_nc * options.attention.scale).reshape([n, g, r, e]);
    let scores = q_ngre.matmul(k_ngue.swap_dims(2, 3)).cast(sums);
    let scores = match options.attention.softcap {
        Some(c) => (scores / c).tanh() * c,
        None => scores,
    };
    let bias = TensorData::new(bias, [n, 1, 1, longest]);
    let scores = scores + Tensor::<4>::from_data(bias, (&device, sums));
    let weights = match sinks_h {
        Some(sinks_h) => {
            let sinks = sinks_h.cast(sums).reshape([1, g, r, 1]);
            let scores = Tensor::cat(vec![scores, sinks.repeat_dim(0, n)], 3);
            softmax(scores, 3).narrow(3, 0, longest)
        }
        None => softmax(scores, 3),
    };
    let out = weights.cast(dtype).matmul(v_ngue);
    out.reshape([n, heads * options.value_width])
}

/// Returns the slots that each row sees, padded with slot 0 to whole pages of the row that sees most, and the bias on the
/// scores that masks the padding. GPUs compile and tune products by shape, and a text that grows meets few of them so.
fn seen_slots(rows: &[PagedRow<'_>], options: &PagedOptions) -> (Vec<usize>, Vec<f32>) {
    let seen = |row: &PagedRow<'_>| row.seen(options.attention.window).len();
    let longest = rows.iter().map(seen).max().unwrap_or(0);
    let longest = longest.next_multiple_of(options.page_size);
    let mut slots = Vec::with_capacity(rows.len() * longest);
    let mut bias = Vec::with_capacity(rows.len() * longest);
    for (row, end) in rows.iter().zip((1..).map(|row| row * longest)) {
        let seen = row.seen(options.attention.window);
        slots.extend(seen.map(|position| row.slot(position, options.page_size)));
        bias.resize(slots.len(), 0f32);
        slots.resize(end, 0);
        bias.resize(end, f32::NEG_INFINITY);
    }
    (slots, bias)
}

pub(super) fn write_slots(pool_sc: Tensor<2>, rows_nc: Tensor<2>, slots: &[usize]) -> Tensor<2> {
    let slots = indices(slots, &pool_sc.device());
    pool_sc.select_assign(0, slots, rows_nc, IndexingUpdateOp::Assign)
}

fn indices(slots: &[usize], device: &Device) -> Tensor<1, Int> {
    let slots: Vec<i32> = slots.iter().map(|slot| *slot as i32).collect();
    let length = slots.len();
    Tensor::from_data(TensorData::new(slots, [length]), device)
}
