//! AdamW with moments of 8 bits (Dettmers et al. 2022, as in bitsandbytes): blocks of 256 numbers with one scale each, and
//! codes that are dense where the moments are small.
//!
//! A number is `scale · code`, where the scale is the block's largest absolute value. The arithmetic is that of
//! [`adamw`](fn@super::adamw) in f32: a step reads the codes, updates θ from moments that are not yet rounded, and rounds the moments
//! to the nearest codes. Differing from bitsandbytes, a v above 0 never becomes 0, since a number whose m is still above 0
//! would then take a step that is many times too large.

use std::sync::LazyLock;

use super::{AdamStep, LoopFactors, adamw_reference};
use crate::flex::{compact, elements, is_cpu_f32};
use crate::simd::vectorize_closure;
use crate::team::{DisjointChunks, run_tasks};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// Numbers that share a scale.
pub const BLOCK: usize = 256;
/// Number of codes.
const CODES: usize = 256;
/// Blocks per task.
const TASK: usize = 256;

/// The moment m or v of a parameter in 8 bits.
#[derive(Debug, Clone)]
pub struct ByteMoment {
    /// Indices into [`dynamic_codes`], `[numbers]`, of type [`DType::U8`].
    pub codes_n: Tensor<1, Int>,
    /// The largest absolute value of each block, `[⌈numbers / 256⌉]`, f32.
    pub scales_b: Tensor<1>,
}

impl ByteMoment {
    /// A moment of zeros; `signed` for m.
    #[must_use]
    pub fn zeros(numbers: usize, signed: bool, device: &Device) -> Self {
        let zero = codes(signed).zero as u8;
        let codes = TensorData::new(vec![zero; numbers], [numbers]);
        let scales = TensorData::new(
            vec![0.0f32; numbers.div_ceil(BLOCK)],
            [numbers.div_ceil(BLOCK)],
        );
        Self {
            codes_n: Tensor::from_data(codes, (device, DType::U8)),
            scales_b: Tensor::from_data(scales, (device, DType::F32)),
        }
    }
}

/// Returns the 256 codes of bitsandbytes' dynamic map in rising order: for i from 0 to 6 the centres of 2^i equal parts of
/// 0.1 to 1 (2^(i+1) parts if unsigned), times 10^(i−6), with both signs if signed; and 0 and 1.
#[must_use]
pub fn dynamic_codes(signed: bool) -> [f32; CODES] {
    let mut codes = vec![0.0, 1.0];
    for i in 0..7 {
        let parts = 1 << if signed { i } else { i + 1 };
        for part in 0..parts {
            let centre = 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
            let code = centre * 10f64.powi(i - 6);
            codes.push(code);
            if signed {
                codes.push(-code);
            }
        }
    }
    codes.sort_by(f64::total_cmp);
    std::array::from_fn(|index| codes[index] as f32)
}

/// The codes, and between each two of them the number from which on the upper one is nearer.
struct CodeTable {
    codes: [f32; CODES],
    borders: [f32; CODES - 1],
    /// Index of the code 0.
    zero: usize,
}

fn codes(signed: bool) -> &'static CodeTable {
    static TABLES: LazyLock<[CodeTable; 2]> = LazyLock::new(|| {
        [false, true].map(|signed| {
            let codes = dynamic_codes(signed);
            let mut borders = std::array::from_fn(|i| {
                ((f64::from(codes[i]) + f64::from(codes[i + 1])) / 2.0) as f32
            });
            if !signed {
                // Numbers above 0 do not become 0.
                borders[0] = 0.0;
            }
            let zero = codes.iter().position(|&code| code == 0.0).unwrap_or(0);
            CodeTable {
                codes,
                borders,
                zero,
            }
        })
    });
    &TABLES[usize::from(signed)]
}

/// Computes θ and the moments `[m, v]` after one AdamW step. θ and the gradient are f32.
///
/// # Panics
/// Panics on shapes and types that differ, as burn's own operations do.
#[must_use]
pub fn adamw_8bit<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [ByteMoment; 2],
    step: &AdamStep,
) -> (Tensor<D>, [ByteMoment; 2]) {
    assert_eq!(theta.dims(), gradient.dims(), "adamw: θ and its gradient");
    if ![&theta, &gradient].into_iter().all(is_cpu_f32) {
        return adamw_8bit_reference(theta, gradient, moments, step);
    }
    let [m, v] = moments;
    let (theta, m, m_scales, v, v_scales) = <Dispatch as ByteAdamOps>::adamw_8bit(
        theta.into_dispatch(),
        gradient.into_dispatch(),
        m.codes_n.into_dispatch(),
        m.scales_b.into_dispatch(),
        v.codes_n.into_dispatch(),
        v.scales_b.into_dispatch(),
        *step,
    );
    let moment = |codes, scales| ByteMoment {
        codes_n: Tensor::from_dispatch(codes),
        scales_b: Tensor::from_dispatch(scales),
    };
    (
        Tensor::from_dispatch(theta),
        [moment(m, m_scales), moment(v, v_scales)],
    )
}

/// Computes [`adamw_8bit`] in tensor operations.
#[must_use]
pub fn adamw_8bit_reference<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [ByteMoment; 2],
    step: &AdamStep,
) -> (Tensor<D>, [ByteMoment; 2]) {
    let shape = theta.dims();
    let n = theta.shape().num_elements();
    let [m, v] = moments;
    let wide = [decoded(m, true), decoded(v, false)];
    let (theta, gradient) = (theta.reshape([n]), gradient.reshape([n]));
    let (theta, [m, v]) = adamw_reference(theta, gradient, wide, step);
    (theta.reshape(shape), [encoded(m, true), encoded(v, false)])
}

/// Reads a moment as `[n]` in f32.
fn decoded(moment: ByteMoment, signed: bool) -> Tensor<1> {
    let ([n], [blocks]) = (moment.codes_n.dims(), moment.scales_b.dims());
    let table = Tensor::<1>::from_data(codes(signed).codes, &moment.scales_b.device());
    let scales_n = (moment.scales_b.reshape([blocks, 1]))
        .repeat_dim(1, BLOCK)
        .reshape([blocks * BLOCK])
        .narrow(0, 0, n);
    table.select(0, moment.codes_n.cast(DType::I32)) * scales_n
}

/// Rounds a moment `[n]` to codes, by eight halvings of the list of borders.
fn encoded(moment_n: Tensor<1>, signed: bool) -> ByteMoment {
    let (table, device) = (codes(signed), moment_n.device());
    let [n] = moment_n.dims();
    let blocks = n.div_ceil(BLOCK);
    let padding = Tensor::zeros([blocks * BLOCK - n], (&device, DType::F32));
    let moment_bk = Tensor::cat(vec![moment_n, padding], 0).reshape([blocks, BLOCK]);
    let scales_b1 = moment_bk.clone().abs().max_dim(1);
    // A block of zeros has the scale 0, and any other divisor.
    let divisor_b1 = scales_b1.clone() + scales_b1.clone().equal_elem(0.0).float();
    let shares = (moment_bk / divisor_b1)
        .reshape([blocks * BLOCK])
        .narrow(0, 0, n);
    let borders = Tensor::<1>::from_data(table.borders, &device);
    let mut index = Tensor::<1, Int>::zeros([n], &device);
    for half in [128i64, 64, 32, 16, 8, 4, 2, 1] {
        let border = borders.clone().select(0, index.clone() + (half - 1));
        index = index + border.lower(shares.clone()).int() * half;
    }
    ByteMoment {
        codes_n: index.cast(DType::U8),
        scales_b: scales_b1.reshape([blocks]),
    }
}

/// The CPU form.
#[backend_extension(Flex)]
pub(crate) trait ByteAdamOps: Backend {
    /// Returns the new θ, and codes and scales of m and v.
    // The macro has to see the tuple.
    #[allow(clippy::type_complexity)]
    fn adamw_8bit(
        theta: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m_codes: IntTensor<Self>,
        m_scales: FloatTensor<Self>,
        v_codes: IntTensor<Self>,
        v_scales: FloatTensor<Self>,
        step: AdamStep,
    ) -> (
        FloatTensor<Self>,
        IntTensor<Self>,
        FloatTensor<Self>,
        IntTensor<Self>,
        FloatTensor<Self>,
    );
}

impl ByteAdamOps for Flex {
    fn adamw_8bit(
        theta: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m_codes: IntTensor<Self>,
        m_scales: FloatTensor<Self>,
        v_codes: IntTensor<Self>,
        v_scales: FloatTensor<Self>,
        step: AdamStep,
    ) -> (
        FloatTensor<Self>,
        IntTensor<Self>,
        FloatTensor<Self>,
        IntTensor<Self>,
        FloatTensor<Self>,
    ) {
        let gradient: FlexTensor = gradient.to_contiguous();
        let mut theta = compact(theta);
        let [mut m_codes, mut m_scales] = [m_codes, m_scales].map(compact);
        let [mut v_codes, mut v_scales] = [v_codes, v_scales].map(compact);
        let factors = LoopFactors::new(&step);
        let numbers = TASK * BLOCK;
        {
            let theta = DisjointChunks::new(theta.storage_mut::<f32>(), numbers);
            let codes = [&mut m_codes, &mut v_codes]
                .map(|codes| DisjointChunks::new(codes.storage_mut::<u8>(), numbers));
            let scales = [&mut m_scales, &mut v_scales]
                .map(|scales| DisjointChunks::new(scales.storage_mut::<f32>(), TASK));
            let gradient = elements::<f32>(&gradient);
            run_tasks(theta.count(), rayon::current_num_threads(), |task| {
                // SAFETY: each task runs once.
                let theta = unsafe { theta.get(task) };
                let [m, v] = [0, 1].map(|moment| {
                    // SAFETY: as above.
                    let (codes, scales) =
                        unsafe { (codes[moment].get(task), scales[moment].get(task)) };
                    codes.chunks_mut(BLOCK).zip(scales)
                });
                let gradient = gradient[task * numbers..].chunks(BLOCK);
                let blocks = theta.chunks_mut(BLOCK).zip(gradient).zip(m).zip(v);
                for (((theta, gradient), m), v) in blocks {
                    update_block(theta, gradient, m, v, &factors);
                }
            });
        }
        (theta, m_codes, m_scales, v_codes, v_scales)
    }
}

/// Updates up to 256 numbers, and codes and scale of their moments.
fn update_block(
    theta: &mut [f32],
    gradient: &[f32],
    m: (&mut [u8], &mut f32),
    v: (&mut [u8], &mut f32),
    factors: &LoopFactors,
) {
    let [unsigned, signed] = [codes(false), codes(true)];
    let [mut wide_m, mut wide_v] = [[0.0f32; BLOCK]; 2];
    let n = theta.len();
    vectorize_closure(
        #[inline(always)]
        || {
            signed.decode(m.0, *m.1, &mut wide_m);
            unsigned.decode(v.0, *v.1, &mut wide_v);
            let numbers = theta.iter_mut().zip(&mut wide_m).zip(&mut wide_v);
            for (((theta, m), v), gradient) in numbers.zip(gradient) {
                *theta = factors.update(*theta, m, v, *gradient);
            }
            *m.1 = signed.encode(&wide_m[..n], m.0);
            *v.1 = unsigned.encode(&wide_v[..n], v.0);
        },
    );
}

impl CodeTable {
    #[inline(always)]
    fn decode(&self, codes: &[u8], scale: f32, numbers: &mut [f32; BLOCK]) {
        for (number, &code) in numbers.iter_mut().zip(codes) {
            *number = self.codes[usize::from(code)] * scale;
        }
    }

    /// Writes the nearest codes and returns the scale.
    #[inline(always)]
    fn encode(&self, numbers: &[f32], codes: &mut [u8]) -> f32 {
        let scale = numbers
            .iter()
            .fold(0.0f32, |largest, x| largest.max(x.abs()));
        let divisor = if scale == 0.0 { 1.0 } else { scale };
        for (code, number) in codes.iter_mut().zip(numbers) {
            let share = number / divisor;
            let mut index = 0;
            for half in [128, 64, 32, 16, 8, 4, 2, 1] {
                index += if self.borders[index + half - 1] < share {
                    half
                } else {
                    0
                };
            }
            *code = index as u8;
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_bitsandbytes() {
        for signed in [false, true] {
            let codes = dynamic_codes(signed);
            assert!(codes.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(codes[255], 1.0);
        }
        // create_dynamic_map(signed = True): the first codes, those around 0, and the last.
        let signed = dynamic_codes(true);
        let close = |found: f32, wanted: f32| {
            assert!(
                (found - wanted).abs() <= wanted.abs() * 1e-6,
                "{found} {wanted}"
            )
        };
        close(signed[0], -0.992_968_8);
        close(signed[126], -5.5e-7);
        close(signed[127], 0.0);
        close(signed[128], 5.5e-7);
        close(signed[254], 0.992_968_8);
        let unsigned = dynamic_codes(false);
        close(unsigned[0], 0.0);
        close(unsigned[1], 3.25e-7);
        close(unsigned[2], 7.75e-7);
        close(unsigned[254], 0.996_484_4);
    }
}
