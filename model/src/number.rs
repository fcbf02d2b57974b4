//! Conversion of stored numbers to the float types that models run in.

use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::Dtype;

/// A float type that models run in.
trait Float: bytemuck::Pod + Send + Sync + burn::tensor::Element {
    fn from_f64(value: f64) -> Self;
}

impl Float for f64 {
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl Float for f32 {
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Float for f16 {
    fn from_f64(value: f64) -> Self {
        f16::from_f32(value as f32)
    }
}

impl Float for bf16 {
    fn from_f64(value: f64) -> Self {
        bf16::from_f32(value as f32)
    }
}

/// Number of values that are read and converted at a time.
const CHUNK: usize = 1 << 20;

/// A function that fills bytes with those of a stored tensor from an offset on.
pub(crate) type ReadAt<'a> = dyn Fn(&mut [u8], u64) -> std::io::Result<()> + 'a;

/// Reads stored numbers of one type and converts them to `dtype`. `scale` gives a factor for the value of an index.
///
/// Returns `None` if either type is not supported.
pub(crate) fn read_values(
    read: &ReadAt<'_>,
    shape: &[usize],
    stored: Dtype,
    dtype: DType,
    scale: Option<&(dyn Fn(usize) -> f32 + Sync)>,
) -> Option<std::io::Result<TensorData>> {
    Some(match dtype {
        DType::F64 => read_as::<f64>(read, shape, stored, scale)?,
        DType::F32 => read_as::<f32>(read, shape, stored, scale)?,
        DType::F16 => read_as::<f16>(read, shape, stored, scale)?,
        DType::BF16 => read_as::<bf16>(read, shape, stored, scale)?,
        _ => return None,
    })
}

fn read_as<T: Float>(
    read: &ReadAt<'_>,
    shape: &[usize],
    stored: Dtype,
    scale: Option<&(dyn Fn(usize) -> f32 + Sync)>,
) -> Option<std::io::Result<TensorData>> {
    let width = stored_bytes(stored)?;
    let count: usize = shape.iter().product();
    let mut values = vec![T::zeroed(); count];
    if T::dtype() == burn_type(stored) {
        let filled = read(bytemuck::cast_slice_mut(&mut values), 0);
        return Some(filled.map(|()| TensorData::new(values, shape.to_vec())));
    }
    let mut bytes = vec![0; width * CHUNK.min(count)];
    for (chunk, values) in values.chunks_mut(CHUNK).enumerate() {
        let first = chunk * CHUNK;
        let bytes = &mut bytes[..width * values.len()];
        if let Err(error) = read(bytes, (first * width) as u64) {
            return Some(Err(error));
        }
        let pairs = values.par_iter_mut().zip(bytes.par_chunks_exact(width));
        pairs
            .enumerate()
            .with_min_len(4096)
            .for_each(|(at, (value, bytes))| {
                let number = number(stored, bytes);
                let number =
                    scale.map_or(number, |scale| f64::from(number as f32 * scale(first + at)));
                *value = T::from_f64(number);
            });
    }
    Some(Ok(TensorData::new(values, shape.to_vec())))
}

/// Number of bytes of a stored number of a type that is read.
fn stored_bytes(stored: Dtype) -> Option<usize> {
    match stored {
        Dtype::F64 => Some(8),
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        Dtype::F8_E4M3 => Some(1),
        _ => None,
    }
}

fn burn_type(stored: Dtype) -> DType {
    match stored {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => DType::U8,
    }
}

/// Reads one little-endian number.
#[inline(always)]
fn number(stored: Dtype, bytes: &[u8]) -> f64 {
    match (stored, bytes) {
        (Dtype::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (Dtype::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (_, &[byte]) => f64::from(e4m3(byte)),
        _ => f64::NAN,
    }
}

/// Value of an 8-bit number with 4 bits of exponent (bias 7) and 3 of mantissa, without infinities (Micikevicius et al.
/// 2022, section 3).
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_numbers_have_the_values_of_the_format() {
        let cases = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb9, -1.125),
        ];
        for (byte, value) in cases {
            assert_eq!(e4m3(byte), value, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        let mut magnitudes: Vec<f32> = (0..0x7f).map(e4m3).collect();
        let ascending = magnitudes.clone();
        magnitudes.sort_by(f32::total_cmp);
        assert_eq!(magnitudes, ascending);
    }
}
