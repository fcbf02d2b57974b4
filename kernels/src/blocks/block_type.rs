//! The types in which ggml stores numbers, and their sizes.

/// A type of numbers that ggml stores: floats, or blocks of numbers that share scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE 754 half precision.
    F16,
    /// 16 bits with the exponent range of F32.
    BF16,
    /// 32 numbers of 4 bits and a scale.
    Q4_0,
    /// 32 numbers of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 numbers of 5 bits and a scale.
    Q5_0,
    /// 32 numbers of 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 numbers of 8 bits and a scale.
    Q8_0,
    /// 256 numbers of 4 bits, with scales and minima of 6 bits for each 32.
    Q4K,
    /// 256 numbers of 5 bits, with scales and minima of 6 bits for each 32.
    Q5K,
    /// 256 numbers of 6 bits, with scales of 8 bits for each 16.
    Q6K,
}

/// One row for each type: its code in files, its name in llama.cpp, the numbers in a block and the bytes of a block.
const TYPES: [(BlockType, u32, &str, usize, usize); 11] = [
    (BlockType::F32, 0, "F32", 1, 4),
    (BlockType::F16, 1, "F16", 1, 2),
    (BlockType::Q4_0, 2, "Q4_0", 32, 18),
    (BlockType::Q4_1, 3, "Q4_1", 32, 20),
    (BlockType::Q5_0, 6, "Q5_0", 32, 22),
    (BlockType::Q5_1, 7, "Q5_1", 32, 24),
    (BlockType::Q8_0, 8, "Q8_0", 32, 34),
    (BlockType::Q4K, 12, "Q4_K", 256, 144),
    (BlockType::Q5K, 13, "Q5_K", 256, 176),
    (BlockType::Q6K, 14, "Q6_K", 256, 210),
    (BlockType::BF16, 30, "BF16", 1, 2),
];

impl BlockType {
    /// Returns the type with a code of GGUF files, or `None` for a type that has no codec here.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        let row = TYPES.iter().find(|row| row.1 == code);
        row.map(|row| row.0)
    }

    fn row(self) -> (Self, u32, &'static str, usize, usize) {
        let row = TYPES.iter().find(|row| row.0 == self);
        // The table has each type; a test checks that.
        row.copied().unwrap_or(TYPES[0])
    }

    /// The code in GGUF files.
    #[must_use]
    pub fn code(self) -> u32 {
        self.row().1
    }

    /// The name in llama.cpp, such as `Q4_K`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Number of numbers in a block.
    #[must_use]
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Number of bytes of a block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Whether numbers are stored in blocks with scales, and not one by one.
    #[must_use]
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Number of bytes of `count` numbers, which must be whole blocks.
    #[must_use]
    pub fn bytes(self, count: usize) -> usize {
        count / self.block_len() * self.block_bytes()
    }

    /// The names of all types, for messages.
    #[must_use]
    pub fn names() -> String {
        let names: Vec<&str> = TYPES.iter().map(|row| row.2).collect();
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_in_the_table() {
        use BlockType::*;
        for kind in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            assert_eq!(BlockType::from_code(kind.code()), Some(kind));
        }
        assert_eq!(BlockType::from_code(39), None);
    }
}
