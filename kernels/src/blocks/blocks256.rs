//! Blocks of 256 numbers: Q4_K, Q5_K and Q6_K.
//!
//! A block of Q4_K or Q5_K holds d and m (f16), for 8 parts of 32 numbers a scale s and a minimum t of 6 bits in 12 bytes,
//! for Q5_K the fifth bits, and the low 4 bits: numbers are d·s·q − m·t. A block of Q6_K holds the low 4 bits, the high
//! 2 bits, for 16 parts of 16 numbers a scale s (i8), and d (f16): numbers are d·s·(q − 32).

use burn::tensor::f16;

/// Parts whose largest magnitude is below this count as zero.
const SMALLEST: f32 = 1e-15;

/// Rounds to the nearest whole number, halves to even, for magnitudes below 2^22: adding 1.5·2^23 leaves no fraction.
fn nearest(value: f32) -> i32 {
    let shifted = (value + 12_582_912.0).to_bits();
    (shifted & 0x7f_ffff) as i32 - 0x40_0000
}

/// A scale and a minimum: numbers are scale·q − minimum.
#[derive(Clone, Copy, Default)]
struct Fit {
    scale: f32,
    minimum: f32,
}

/// Quantises to Q4_K.
pub(super) fn quantize_q4_k(values: &[f32], block: &mut [u8]) {
    let mut fits = [Fit::default(); 8];
    let mut codes = [0u8; 256];
    let (mut most_scale, mut most_minimum) = (0.0f32, 0.0f32);
    for (part, (values, codes)) in values
        .chunks_exact(32)
        .zip(codes.chunks_exact_mut(32))
        .enumerate()
    {
        fits[part] = fit_ranged(values, codes);
        most_scale = most_scale.max(fits[part].scale);
        most_minimum = most_minimum.max(fits[part].minimum);
    }
    let inverse = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
    let (scale, minimum) = (inverse(most_scale), inverse(most_minimum));
    let (sixes, six) = (
        f16::from_f32(most_scale / 63.0),
        f16::from_f32(most_minimum / 63.0),
    );
    block[..2].copy_from_slice(&sixes.to_le_bytes());
    block[2..4].copy_from_slice(&six.to_le_bytes());
    let mut packed = [(0u8, 0u8); 8];
    for (pair, fit) in packed.iter_mut().zip(&fits) {
        // The cast to u8 wraps as in C before the code is limited.
        let code = |number: f32| (nearest(number) as u8).min(63);
        *pair = (code(scale * fit.scale), code(minimum * fit.minimum));
    }
    block[4..16].copy_from_slice(&pack_scales(&packed));
    for (part, (values, codes)) in values
        .chunks_exact(32)
        .zip(codes.chunks_exact_mut(32))
        .enumerate()
    {
        let d = sixes.to_f32() * f32::from(packed[part].0);
        if d == 0.0 {
            continue;
        }
        let m = six.to_f32() * f32::from(packed[part].1);
        for (code, value) in codes.iter_mut().zip(values) {
            *code = nearest((value + m) / d).clamp(0, 15) as u8;
        }
    }
    for (out, codes) in block[16..].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        for (index, byte) in out.iter_mut().enumerate() {
            *byte = codes[index] | codes[index + 32] << 4;
        }
    }
}

/// Finds the scale and the minimum of 32 numbers by weighted least squares over 21 guesses of the scale, and writes the
/// codes from 0 to 15. A guess starts from the best minimum so far.
fn fit_ranged(values: &[f32], codes: &mut [u8]) -> Fit {
    const LEVELS: f32 = 15.0;
    let weights = magnitude_weights(values);
    let (mut min, mut max) = (values[0], values[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * values[0]);
    for (value, weight) in values.iter().zip(&weights).skip(1) {
        min = if *value < min { *value } else { min };
        max = if *value > max { *value } else { max };
        sum_w += weight;
        sum_x += weight * value;
    }
    min = if min > 0.0 { 0.0 } else { min };
    if max == min {
        codes.fill(0);
        return Fit {
            scale: 0.0,
            minimum: -min,
        };
    }
    let inverse = LEVELS / (max - min);
    let mut scale = 1.0 / inverse;
    round_codes(values, codes, inverse, min);
    let mut least = weighted_error(values, &weights, codes, scale, min);
    let mut guess = [0u8; 32];
    for step in 0..=20 {
        let inverse = (-1.0 + 0.1 * step as f32 + LEVELS) / (max - min);
        round_codes(values, &mut guess, inverse, min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((code, value), weight) in guess.iter().zip(values).zip(&weights) {
            let level = f32::from(*code);
            sum_l += weight * level;
            sum_l2 += weight * level * level;
            sum_xl += weight * level * value;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant.is_nan() || determinant <= 0.0 {
            continue;
        }
        let mut slope = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if offset > 0.0 {
            offset = 0.0;
            slope = sum_xl / sum_l2;
        }
        let error = weighted_error(values, &weights, &guess, slope, offset);
        if error < least {
            codes.copy_from_slice(&guess);
            (least, scale, min) = (error, slope, offset);
        }
    }
    Fit {
        scale,
        minimum: -min,
    }
}

/// Weights of 32 numbers: the root of their mean square, plus the magnitude of each.
fn magnitude_weights(values: &[f32]) -> [f32; 32] {
    let mut squares = 0.0f32;
    for value in values {
        squares += value * value;
    }
    let mean = (squares / 32.0).sqrt();
    let mut weights = [0.0f32; 32];
    for (weight, value) in weights.iter_mut().zip(values) {
        *weight = mean + value.abs();
    }
    weights
}

fn round_codes(values: &[f32], codes: &mut [u8], inverse: f32, min: f32) {
    for (code, value) in codes.iter_mut().zip(values) {
        *code = nearest(inverse * (value - min)).clamp(0, 15) as u8;
    }
}

fn weighted_error(values: &[f32], weights: &[f32], codes: &[u8], scale: f32, min: f32) -> f32 {
    let mut sum = 0.0f32;
    for ((code, value), weight) in codes.iter().zip(values).zip(weights) {
        let difference = scale * f32::from(*code) + min - value;
        sum += weight * (difference * difference);
    }
    sum
}

/// Packs 8 pairs of 6 bits into 12 bytes: the low 6 bits of bytes 0 to 3 and 4 to 7 are the first four scales and minima,
/// bytes 8 to 11 hold the low 4 bits of the others, whose high 2 bits fill up bytes 0 to 7.
fn pack_scales(pairs: &[(u8, u8); 8]) -> [u8; 12] {
    let mut packed = [0u8; 12];
    for index in 0..4 {
        let (scale, minimum) = pairs[index];
        let (later_scale, later_minimum) = pairs[index + 4];
        packed[index] = scale | later_scale >> 4 << 6;
        packed[index + 4] = minimum | later_minimum >> 4 << 6;
        packed[index + 8] = (later_scale & 15) | (later_minimum & 15) << 4;
    }
    packed
}

/// Returns the scale and the minimum of a part, the inverse of [`pack_scales`].
fn unpack_scale(packed: &[u8], part: usize) -> (u8, u8) {
    match part {
        0..4 => (packed[part] & 63, packed[part + 4] & 63),
        _ => {
            let low = packed[part + 4];
            let scale = (low & 15) | packed[part - 4] >> 6 << 4;
            let minimum = low >> 4 | packed[part] >> 6 << 4;
            (scale, minimum)
        }
    }
}

/// Converts a block of Q4_K or, with fifth bits, of Q5_K to numbers.
pub(super) fn dequantize_ranged(block: &[u8], values: &mut [f32], has_fifth: bool) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (scale, minimum) = (half(0), half(2));
    let packed = &block[4..16];
    let (fifth, low) = match has_fifth {
        true => block[16..].split_at(32),
        false => (&block[..0], &block[16..]),
    };
    for (part, values) in values.chunks_exact_mut(32).enumerate() {
        let (s, t) = unpack_scale(packed, part);
        let (d, m) = (scale * f32::from(s), minimum * f32::from(t));
        for (index, value) in values.iter_mut().enumerate() {
            let byte = low[part / 2 * 32 + index];
            let mut code = if part % 2 == 0 { byte & 15 } else { byte >> 4 };
            if has_fifth {
                code |= (fifth[index] >> part & 1) << 4;
            }
            *value = d * f32::from(code) - m;
        }
    }
}

/// Quantises to Q6_K.
pub(super) fn quantize_q6_k(values: &[f32], block: &mut [u8]) {
    let mut scales = [0.0f32; 16];
    let mut codes = [0u8; 256];
    let (mut extreme, mut most) = (0.0f32, 0.0f32);
    for (part, (values, codes)) in values
        .chunks_exact(16)
        .zip(codes.chunks_exact_mut(16))
        .enumerate()
    {
        scales[part] = fit_signed(values, codes);
        if scales[part].abs() > most {
            most = scales[part].abs();
            extreme = scales[part];
        }
    }
    if most < SMALLEST {
        block.fill(0);
        return;
    }
    let inverse = -128.0 / extreme;
    let d = f16::from_f32(1.0 / inverse);
    for (part, (values, codes)) in values
        .chunks_exact(16)
        .zip(codes.chunks_exact_mut(16))
        .enumerate()
    {
        let scale = nearest(inverse * scales[part]).min(127) as i8;
        block[192 + part] = scale as u8;
        let step = d.to_f32() * f32::from(scale);
        if step == 0.0 {
            continue;
        }
        for (code, value) in codes.iter_mut().zip(values) {
            *code = (nearest(value / step).clamp(-32, 31) + 32) as u8;
        }
    }
    block[208..].copy_from_slice(&d.to_le_bytes());
    for (half, codes) in codes.chunks_exact(128).enumerate() {
        for index in 0..32 {
            let quarter = |number: usize| codes[index + 32 * number];
            block[64 * half + index] = (quarter(0) & 15) | (quarter(2) & 15) << 4;
            block[64 * half + 32 + index] = (quarter(1) & 15) | (quarter(3) & 15) << 4;
            let high = |number: usize| quarter(number) >> 4 << (2 * number);
            block[128 + 32 * half + index] = high(0) | high(1) | high(2) | high(3);
        }
    }
}

/// Finds the scale of 16 numbers by least squares over 19 guesses, and writes the codes from 0 to 63. Numbers are weighted
/// by their square.
fn fit_signed(values: &[f32], codes: &mut [u8]) -> f32 {
    let mut extreme = 0.0f32;
    for value in values {
        if value.abs() > extreme.abs() {
            extreme = *value;
        }
    }
    if extreme.abs() < SMALLEST {
        codes.fill(0);
        return 0.0;
    }
    let round = |inverse: f32, value: f32| nearest(inverse * value).clamp(-32, 31);
    let sums = |inverse: f32| {
        let (mut sum_lx, mut sum_l2) = (0.0f32, 0.0f32);
        for value in values {
            let level = round(inverse, *value) as f32;
            let weight = value * value;
            sum_lx += weight * value * level;
            sum_l2 += weight * level * level;
        }
        (sum_lx, sum_l2)
    };
    let mut write = |inverse: f32| {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = (round(inverse, *value) + 32) as u8;
        }
    };
    let inverse = -32.0 / extreme;
    let (sum_lx, sum_l2) = sums(inverse);
    write(inverse);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_lx / sum_l2 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(32.0 + 0.1 * step as f32) / extreme;
        let (sum_lx, sum_l2) = sums(inverse);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            write(inverse);
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

/// Converts a block of Q6_K to numbers.
pub(super) fn dequantize_q6_k(block: &[u8], values: &mut [f32]) {
    let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
    for (index, value) in values.iter_mut().enumerate() {
        let (half, inside) = (index / 128, index % 128);
        let (quarter, column) = (inside / 32, inside % 32);
        let byte = block[64 * half + 32 * (quarter % 2) + column];
        let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
        let high = block[128 + 32 * half + column] >> (2 * quarter) & 3;
        let code = i32::from(low | high << 4) - 32;
        let scale = f32::from(block[192 + index / 16] as i8);
        *value = d * scale * code as f32;
    }
}
