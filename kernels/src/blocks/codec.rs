//! Conversion between f32 and the stored types. Blocks are independent, so rows are converted in parallel.
//!
//! The results are those of llama.cpp's reference functions bit for bit, so sums keep their order and products are not
//! fused: a comment says where that matters.

use burn::tensor::{bf16, f16};
use rayon::prelude::*;

use super::block_type::BlockType;
use super::{blocks32, blocks256};

/// Blocks that one task converts.
const BLOCKS_PER_TASK: usize = 1024;

/// Converts whole blocks of numbers to the stored type; a rest that is not a whole block is left out.
///
/// Q4_1 and Q5_K are written by no export and are quantised only as their kin are: Q4_1 as Q5_1 with 15 levels. Q5_K
/// returns `None`.
#[must_use]
pub fn quantize(kind: BlockType, values: &[f32]) -> Option<Vec<u8>> {
    if kind == BlockType::Q5K {
        return None;
    }
    let (numbers, bytes) = (kind.block_len(), kind.block_bytes());
    let mut out = vec![0; kind.bytes(values.len())];
    out.par_chunks_mut(bytes * BLOCKS_PER_TASK)
        .zip(values.par_chunks(numbers * BLOCKS_PER_TASK))
        .for_each(|(out, values)| {
            for (block, values) in out
                .chunks_exact_mut(bytes)
                .zip(values.chunks_exact(numbers))
            {
                quantize_block(kind, values, block);
            }
        });
    Some(out)
}

/// Converts stored blocks to numbers; a rest that is not a whole block is left out.
#[must_use]
pub fn dequantize(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let count = bytes.len() / kind.block_bytes() * kind.block_len();
    let mut out = vec![0.0; count];
    dequantize_into(kind, bytes, &mut out, |number| number);
    out
}

/// Converts stored blocks to numbers and applies `convert` to each number, without a copy of all numbers in f32.
pub fn dequantize_into<T: Send>(
    kind: BlockType,
    bytes: &[u8],
    out: &mut [T],
    convert: impl Fn(f32) -> T + Sync,
) {
    let (numbers, width) = (kind.block_len(), kind.block_bytes());
    out.par_chunks_mut(numbers * BLOCKS_PER_TASK)
        .zip(bytes.par_chunks(width * BLOCKS_PER_TASK))
        .for_each(|(out, bytes)| {
            let mut values = [0.0; 256];
            let values = &mut values[..numbers];
            for (block, out) in bytes.chunks_exact(width).zip(out.chunks_exact_mut(numbers)) {
                dequantize_block(kind, block, values);
                for (out, value) in out.iter_mut().zip(values.iter()) {
                    *out = convert(*value);
                }
            }
        });
}

fn quantize_block(kind: BlockType, values: &[f32], block: &mut [u8]) {
    match kind {
        BlockType::F32 => block.copy_from_slice(&values[0].to_le_bytes()),
        BlockType::F16 => block.copy_from_slice(&f16::from_f32(values[0]).to_le_bytes()),
        BlockType::BF16 => block.copy_from_slice(&bf16::from_f32(values[0]).to_le_bytes()),
        BlockType::Q4_0 => blocks32::quantize_signed(values, block, 4),
        BlockType::Q5_0 => blocks32::quantize_signed(values, block, 5),
        BlockType::Q4_1 => blocks32::quantize_ranged(values, block, 4),
        BlockType::Q5_1 => blocks32::quantize_ranged(values, block, 5),
        BlockType::Q8_0 => blocks32::quantize_q8_0(values, block),
        BlockType::Q4K => blocks256::quantize_q4_k(values, block),
        BlockType::Q6K => blocks256::quantize_q6_k(values, block),
        // `quantize` returns before this type gets here.
        BlockType::Q5K => {}
    }
}

fn dequantize_block(kind: BlockType, block: &[u8], values: &mut [f32]) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    match kind {
        BlockType::F32 => {
            values[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        }
        BlockType::F16 => values[0] = half(0),
        BlockType::BF16 => values[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q4_1 | BlockType::Q5_1 => {
            blocks32::dequantize(kind, block, values);
        }
        BlockType::Q8_0 => {
            for (value, code) in values.iter_mut().zip(&block[2..]) {
                *value = f32::from(*code as i8) * half(0);
            }
        }
        BlockType::Q4K => blocks256::dequantize_ranged(block, values, false),
        BlockType::Q5K => blocks256::dequantize_ranged(block, values, true),
        BlockType::Q6K => blocks256::dequantize_q6_k(block, values),
    }
}
