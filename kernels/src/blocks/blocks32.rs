//! Blocks of 32 numbers: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.
//!
//! A block holds the scale d (f16), for `_1` types the minimum m (f16), for 5 bits one fifth bit for each number (u32),
//! and 16 bytes with the low 4 bits: those of number j in the low half of byte j, those of number j + 16 in its high
//! half. Numbers are d·(q − 2^(bits − 1)), or d·q + m.

use burn::tensor::f16;

use super::block_type::BlockType;

/// Quantises to Q4_0 or Q5_0. The number of largest magnitude becomes the code 0, so its sign selects the sign of d.
pub(super) fn quantize_signed(values: &[f32], block: &mut [u8], bits: u32) {
    let mut extreme = 0.0f32;
    for value in values {
        if value.abs() > extreme.abs() {
            extreme = *value;
        }
    }
    let middle = (1 << (bits - 1)) as f32;
    let scale = extreme / -middle;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    // The cast truncates, so a half more than the middle rounds to the nearest.
    write_codes(values, &mut block[2..], bits, |value| {
        (value * inverse + (middle + 0.5)) as u8
    });
}

/// Quantises to Q4_1 or Q5_1.
pub(super) fn quantize_ranged(values: &[f32], block: &mut [u8], bits: u32) {
    let (mut min, mut max) = (f32::MAX, f32::MIN);
    for value in values {
        min = if *value < min { *value } else { min };
        max = if *value > max { *value } else { max };
    }
    let scale = (max - min) / ((1 << bits) - 1) as f32;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    block[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    write_codes(values, &mut block[4..], bits, |value| {
        ((value - min) * inverse + 0.5) as u8
    });
}

/// Quantises to Q8_0.
pub(super) fn quantize_q8_0(values: &[f32], block: &mut [u8]) {
    let extreme = values
        .iter()
        .fold(0.0f32, |most, value| most.max(value.abs()));
    let scale = extreme / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
    for (code, value) in block[2..].iter_mut().zip(values) {
        *code = (value * inverse).round() as i8 as u8;
    }
}

/// Writes the fifth bits, if there are any, and the low bits of the codes.
fn write_codes(values: &[f32], out: &mut [u8], bits: u32, code: impl Fn(f32) -> u8) {
    let most = (1u8 << bits) - 1;
    let mut codes = [0u8; 32];
    for (slot, value) in codes.iter_mut().zip(values) {
        *slot = code(*value).min(most);
    }
    let low = match bits {
        4 => out,
        _ => {
            let mut fifth = 0u32;
            for (index, code) in codes.iter().enumerate() {
                fifth |= u32::from(code >> 4) << index;
            }
            let (high, low) = out.split_at_mut(4);
            high.copy_from_slice(&fifth.to_le_bytes());
            low
        }
    };
    for (index, byte) in low.iter_mut().enumerate() {
        *byte = (codes[index] & 15) | (codes[index + 16] & 15) << 4;
    }
}

/// Converts a block of Q4_0, Q4_1, Q5_0 or Q5_1 to numbers.
pub(super) fn dequantize(kind: BlockType, block: &[u8], values: &mut [f32]) {
    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
    let is_ranged = matches!(kind, BlockType::Q4_1 | BlockType::Q5_1);
    let has_fifth = matches!(kind, BlockType::Q5_0 | BlockType::Q5_1);
    let mut at = 2;
    let mut min = 0.0;
    if is_ranged {
        min = f16::from_le_bytes([block[2], block[3]]).to_f32();
        at = 4;
    }
    let mut fifth = 0;
    if has_fifth {
        fifth = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        at += 4;
    }
    let middle = match (is_ranged, has_fifth) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
    for (index, value) in values.iter_mut().enumerate() {
        let byte = block[at + index % 16];
        let low = if index < 16 { byte & 15 } else { byte >> 4 };
        let code = i32::from(low) | ((fifth >> index & 1) << 4) as i32;
        let product = scale * (code - middle) as f32;
        *value = if is_ranged { product + min } else { product };
    }
}
