//! The CubeCL form, for any GPU that CubeCL reaches; statistics in f32.
//!
//! One cube a row. Forward: the row is walked in tiles; a tile's support columns are flagged in
//! shared memory, so that each unit keeps a running (max, Σ exp) over its tail columns alone, and
//! the cube reduces those pairs as a tree. Backward: one launch writes every column as if it were
//! in the tail, a second one overwrites the k support columns. No atomics: the same input gives the
//! same bits. Traffic: forward n·v reads; backward n·v reads and n·v writes.

use super::{Head, HeadNumbers, RowOps, TAIL_FLOOR_NATS};
use burn::backend::TensorMetadata;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous, ops::numeric::empty_device_dtype, tensor::CubeTensor,
};
use cubecl::prelude::*;

const UNITS: u32 = 256;
/// Columns that are flagged at a time: 8 a unit.
const TILE: u32 = 2048;
/// Below every logit: WGSL has no literal −∞.
const LOWEST: f32 = -3.0e38;

impl RowOps for CubeBackend {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self> {
        let head = head.numbers(logits.shape()[1]);
        stats(into_contiguous(logits), into_contiguous(support), head)
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self> {
        let head = head.numbers(logits.shape()[1]);
        let [logits, support, stats, gradient] =
            [logits, support, stats, gradient].map(into_contiguous);
        grad(logits, support, stats, gradient, head)
    }
}

fn stats(logits: CubeTensor, support: CubeTensor, head: HeadNumbers) -> CubeTensor {
    let (n, k) = (logits.shape()[0], support.shape()[1]);
    let out = empty_device_dtype(
        logits.client.clone(),
        logits.device.clone(),
        Shape::new([n, k + 2]),
        DType::F32,
    );
    let dtypes = [
        dtype_to_storage_type(logits.dtype),
        dtype_to_storage_type(support.dtype),
    ];
    stats_kernel::launch(
        &out.client,
        CubeCount::Static(n as u32, 1, 1),
        CubeDim::new_1d(UNITS),
        logits.into_tensor_arg(),
        support.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        head.scale as f32,
        head.softcap as f32,
        head.inv_temperature as f32,
        head.vocab as u32,
        k as u32,
        TAIL_FLOOR_NATS as f32,
        head.softcap != 0.0,
        dtypes,
    );
    out
}

fn grad(
    logits: CubeTensor,
    support: CubeTensor,
    stats: CubeTensor,
    gradient: CubeTensor,
    head: HeadNumbers,
) -> CubeTensor {
    let (n, k) = (logits.shape()[0], support.shape()[1]);
    let v = logits.shape()[1];
    let out = empty_device_dtype(
        logits.client.clone(),
        logits.device.clone(),
        logits.shape(),
        logits.dtype,
    );
    let dtypes = [
        dtype_to_storage_type(logits.dtype),
        dtype_to_storage_type(support.dtype),
    ];
    for on_support in [false, true] {
        gradient_kernel::launch(
            &out.client,
            CubeCount::Static(n as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            logits.clone().into_tensor_arg(),
            support.clone().into_tensor_arg(),
            stats.clone().into_tensor_arg(),
            gradient.clone().into_tensor_arg(),
            out.clone().into_tensor_arg(),
            head.scale as f32,
            head.softcap as f32,
            head.inv_temperature as f32,
            head.vocab as u32,
            v as u32,
            k as u32,
            TAIL_FLOOR_NATS as f32,
            head.softcap != 0.0,
            on_support,
            dtypes,
        );
    }
    out
}

/// The softmax logit s of a raw logit.
#[cube]
fn softmax_logit(
    z: f32,
    scale: f32,
    softcap: f32,
    inv_temperature: f32,
    #[comptime] capped: bool,
) -> f32 {
    let y = z * scale;
    if comptime!(capped) {
        (y / softcap).tanh() * softcap * inv_temperature
    } else {
        y * inv_temperature
    }
}

/// ds/dz.
#[cube]
fn slope(z: f32, scale: f32, softcap: f32, inv_temperature: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        let t = (z * scale / softcap).tanh();
        (f32::new(1.0) - t * t) * scale * inv_temperature
    } else {
        scale * inv_temperature
    }
}

#[cube(launch)]
fn stats_kernel<F: Float, I: Int>(
    logits: &Tensor<F>,    // [n, v]
    support: &Tensor<I>,   // [n, k]
    out: &mut Tensor<f32>, // [n, k+2]
    scale: f32,
    softcap: f32,
    inv_temperature: f32,
    vocab: u32,
    k: u32,
    tail_floor: f32,
    #[comptime] capped: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS_X as usize;
    let unit = UNIT_POS_X as usize;
    let units = UNITS as usize;
    let tile = TILE as usize;
    let (v, k, vocab) = (logits.shape(1), k as usize, vocab as usize);
    let mut flags = Shared::<[u32]>::new_slice(2048usize);
    let mut maxima = Shared::<[f32]>::new_slice(256usize);
    let mut sums = Shared::<[f32]>::new_slice(256usize);

    let mut max = f32::new(LOWEST);
    let mut sum = f32::new(0.0);
    let mut start = 0usize;
    while start < vocab {
        let mut i = unit;
        while i < tile {
            flags[i] = 0u32;
            i += units;
        }
        sync_cube();
        let mut j = unit;
        while j < k {
            let id = i32::cast_from(support[row * k + j]);
            if id >= start as i32 && id < (start + tile) as i32 {
                flags[id as usize - start] = 1u32;
            }
            j += units;
        }
        sync_cube();
        let mut i = unit;
        while i < tile {
            if start + i < vocab && flags[i] == 0u32 {
                let z = f32::cast_from(logits[row * v + start + i]);
                let s = softmax_logit(z, scale, softcap, inv_temperature, capped);
                let next = f32::max(max, s);
                sum = sum * (max - next).exp() + (s - next).exp();
                max = next;
            }
            i += units;
        }
        sync_cube();
        start += tile;
    }
    maxima[unit] = max;
    sums[unit] = sum;
    reduce_pairs(&mut maxima, &mut sums);
    let tail_max = maxima[0usize];
    let tail_sum = sums[0usize];
    sync_cube();

    max = f32::new(LOWEST);
    sum = f32::new(0.0);
    let mut j = unit;
    while j < k {
        let id = i32::cast_from(support[row * k + j]);
        if id >= 0 && id < vocab as i32 {
            let z = f32::cast_from(logits[row * v + id as usize]);
            let s = softmax_logit(z, scale, softcap, inv_temperature, capped);
            let next = f32::max(max, s);
            sum = sum * (max - next).exp() + (s - next).exp();
            max = next;
        }
        j += units;
    }
    maxima[unit] = max;
    sums[unit] = sum;
    reduce_pairs(&mut maxima, &mut sums);

    let top = f32::max(maxima[0usize], tail_max);
    let total = sums[0usize] * (maxima[0usize] - top).exp() + tail_sum * (tail_max - top).exp();
    let log_z = top + total.ln();
    let mut j = unit;
    while j < k {
        let id = i32::cast_from(support[row * k + j]);
        let mut log_q = f32::new(0.0);
        if id >= 0 && id < vocab as i32 {
            let z = f32::cast_from(logits[row * v + id as usize]);
            log_q = softmax_logit(z, scale, softcap, inv_temperature, capped) - log_z;
        }
        out[row * (k + 2) + j] = log_q;
        j += units;
    }
    if unit == 0 {
        let mut log_tail = tail_floor;
        if tail_sum > f32::new(0.0) {
            log_tail = tail_max + tail_sum.ln() - log_z;
        }
        out[row * (k + 2) + k] = log_tail;
        out[row * (k + 2) + k + 1] = log_z;
    }
}

/// Tree reduction of 256 (max, Σ exp(s − max)) pairs into the first.
#[cube]
fn reduce_pairs(maxima: &mut Shared<[f32]>, sums: &mut Shared<[f32]>) {
    let unit = UNIT_POS_X as usize;
    sync_cube();
    let mut width = 128usize;
    while width > 0 {
        if unit < width {
            let (a, b) = (maxima[unit], maxima[unit + width]);
            let top = f32::max(a, b);
            sums[unit] = sums[unit] * (a - top).exp() + sums[unit + width] * (b - top).exp();
            maxima[unit] = top;
        }
        sync_cube();
        width /= 2;
    }
}

#[cube(launch)]
fn gradient_kernel<F: Float, I: Int>(
    logits: &Tensor<F>,     // [n, v]
    support: &Tensor<I>,    // [n, k]
    stats: &Tensor<f32>,    // [n, k+2]
    gradient: &Tensor<f32>, // [n, k+2], with respect to the statistics
    out: &mut Tensor<F>,    // [n, v]
    scale: f32,
    softcap: f32,
    inv_temperature: f32,
    vocab: u32,
    v: u32,
    k: u32,
    tail_floor: f32,
    #[comptime] capped: bool,
    #[comptime] on_support: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS_X as usize;
    let unit = UNIT_POS_X as usize;
    let units = UNITS as usize;
    let (v, k, vocab) = (v as usize, k as usize, vocab as usize);
    let base = row * (k + 2);
    let log_z = stats[base + k + 1];
    let log_q_tail = stats[base + k];
    let has_tail = log_q_tail != tail_floor;

    // Each unit adds the k terms itself, in the same order: k is small beside v.
    let mut h_sum = f32::new(0.0) - gradient[base + k + 1];
    let mut j = 0usize;
    while j < k {
        let id = i32::cast_from(support[row * k + j]);
        if id >= 0 && id < vocab as i32 {
            h_sum += gradient[base + j];
        }
        j += 1;
    }
    let mut h_tail = f32::new(0.0);
    if has_tail {
        h_tail = gradient[base + k];
        h_sum += h_tail;
    }

    if comptime!(on_support) {
        let mut j = unit;
        while j < k {
            let id = i32::cast_from(support[row * k + j]);
            if id >= 0 && id < vocab as i32 {
                let at = row * v + id as usize;
                let z = f32::cast_from(logits[at]);
                let s = softmax_logit(z, scale, softcap, inv_temperature, capped);
                let d = slope(z, scale, softcap, inv_temperature, capped);
                out[at] = F::cast_from((gradient[base + j] - (s - log_z).exp() * h_sum) * d);
            }
            j += units;
        }
    } else {
        let mut shift = log_z;
        let mut factor = f32::new(0.0) - h_sum;
        if has_tail {
            shift = log_z + log_q_tail;
            factor = h_tail - log_q_tail.exp() * h_sum;
        }
        let mut i = unit;
        while i < v {
            let at = row * v + i;
            let mut dz = f32::new(0.0);
            if i < vocab {
                let z = f32::cast_from(logits[at]);
                let s = softmax_logit(z, scale, softcap, inv_temperature, capped);
                // A support column may lie far above the tail; the second launch overwrites it.
                let q = f32::min(s - shift, f32::new(0.0)).exp();
                dz = q * factor * slope(z, scale, softcap, inv_temperature, capped);
            }
            out[at] = F::cast_from(dz);
            i += units;
        }
    }
}
