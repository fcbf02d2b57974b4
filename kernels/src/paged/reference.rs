//! Paged attention in tensor operations, which devices other than the CPU run and which the tests compare the loops
//! with. Every row gets a copy of the keys and values that it sees, `[n, longest, g·e]` each.

use super::PagedRow;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// Computes [`paged_attention`](super::paged_attention) in tensor operations, on any device and with the same shapes.
pub fn paged_attention_reference(
    q_nc: Tensor<2>,
    keys_sc: Tensor<2>,
    values_sc: Tensor<2>,
    rows: &[PagedRow<'_>],
    page_size: usize,
    heads: usize,
) -> Tensor<2> {
    let ([n, c], [_, width], device) = (q_nc.dims(), keys_sc.dims(), q_nc.device());
    let (dtype, e) = (q_nc.dtype(), c / heads);
    let (g, longest) = (width / e, rows.iter().map(|row| row.length).max());
    let longest = longest.unwrap_or(0);
    // Each row has its slots, padded with slot 0, which the bias masks.
    let mut slots = Vec::with_capacity(n * longest);
    let mut bias = Vec::with_capacity(n * longest);
    for (row, end) in rows.iter().zip((1..).map(|row| row * longest)) {
        slots.extend(row.slots(page_size));
        bias.resize(slots.len(), 0f32);
        slots.resize(end, 0);
        bias.resize(end, f32::NEG_INFINITY);
    }
    let slots = indices(&slots, &device);
    let heads_of = |pool_sc: Tensor<2>| {
        let seen = pool_sc.select(0, slots.clone());
        seen.reshape([n, longest, g, e]).swap_dims(1, 2)
    };
    let (k_ngue, v_ngue) = (heads_of(keys_sc), heads_of(values_sc));
    let q_ngre = (q_nc * (1.0 / (e as f64).sqrt())).reshape([n, g, heads / g, e]);
    let scores = q_ngre.matmul(k_ngue.swap_dims(2, 3));
    let sums = match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        other => other,
    };
    let bias = TensorData::new(bias, [n, 1, 1, longest]);
    let bias = Tensor::<4>::from_data(bias, (&device, sums));
    let weights = softmax(scores.cast(sums) + bias, 3).cast(dtype);
    weights.matmul(v_ngue).reshape([n, c])
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
