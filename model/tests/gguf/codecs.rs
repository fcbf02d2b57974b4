//! Codecs against the blocks and numbers that gguf-py and llama-quantize make.

use potstill_model::{BlockType, dequantize, quantize};

use crate::golden;

fn floats(name: &str) -> Vec<f32> {
    let bytes = std::fs::read(golden(name)).unwrap();
    let numbers = bytes.chunks_exact(4);
    numbers
        .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

const TYPES: [BlockType; 10] = [
    BlockType::F16,
    BlockType::BF16,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q4K,
    BlockType::Q5K,
    BlockType::Q6K,
];

#[test]
fn blocks_are_those_of_llama_cpp_bit_for_bit() {
    let values = floats("gguf-values.bin");
    for kind in TYPES {
        let expected =
            std::fs::read(golden(&format!("gguf-{}.bin", kind.name().to_lowercase()))).unwrap();
        let Some(blocks) = quantize(kind, &values) else {
            assert_eq!(kind, BlockType::Q5K);
            continue;
        };
        assert_eq!(blocks.len(), expected.len());
        let size = kind.block_bytes();
        for (number, (found, expected)) in
            blocks.chunks(size).zip(expected.chunks(size)).enumerate()
        {
            assert_eq!(found, expected, "block {number} of {}", kind.name());
        }
    }
}

#[test]
fn numbers_are_those_of_gguf_py_bit_for_bit() {
    for kind in TYPES {
        let name = kind.name().to_lowercase();
        let blocks = std::fs::read(golden(&format!("gguf-{name}.bin"))).unwrap();
        let expected = floats(&format!("gguf-{name}-values.bin"));
        let found = dequantize(kind, &blocks);
        assert_eq!(bits(&found), bits(&expected), "{name}");
    }
}
