//! The type of each tensor of an export: the choices of `llama-quantize`.

use potstill_kernels::BlockType;

/// The type of a GGUF export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    /// 16 bits, IEEE 754 half precision.
    F16,
    /// 16 bits with the exponent range of F32.
    Bf16,
    /// 8.5 bits for each weight.
    Q8_0,
    /// 4.5 bits for each weight.
    Q4_0,
    /// About 4.8 bits for each weight: 4 bits, and 6 bits for the tensors that matter most.
    Q4KM,
}

impl GgufType {
    /// The name in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4KM => "q4_k_m",
        }
    }

    /// The value of `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Bf16 => 32,
            Self::Q8_0 => 7,
            Self::Q4_0 => 2,
            Self::Q4KM => 15,
        }
    }

    /// Whether weights are stored in blocks.
    pub(super) fn is_quantized(self) -> bool {
        !matches!(self, Self::F16 | Self::Bf16)
    }

    /// Returns the type of a tensor with this name in the GGUF file. `layers` is the number of layers.
    pub(super) fn of_tensor(
        self,
        name: &str,
        shape: &[usize],
        layers: usize,
        is_tied: bool,
    ) -> BlockType {
        let row = shape.last().copied().unwrap_or_default();
        let is_weight = name.ends_with("weight") && !name.ends_with("_norm.weight");
        if shape.len() < 2 || !is_weight || name.ends_with("ffn_gate_inp.weight") {
            return BlockType::F32;
        }
        // A tied embedding is the head, whose errors go to the logits directly.
        let is_head = name == "output.weight" || is_tied && name == "token_embd.weight";
        let wanted = match self {
            Self::F16 => BlockType::F16,
            Self::Bf16 => BlockType::BF16,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q4_0 if is_head && row.is_multiple_of(32) => BlockType::Q6K,
            Self::Q4_0 if is_head => BlockType::Q8_0,
            Self::Q4_0 => BlockType::Q4_0,
            Self::Q4KM if is_head && row.is_multiple_of(256) => BlockType::Q6K,
            Self::Q4KM if is_head => BlockType::Q8_0,
            Self::Q4KM if has_more_bits(name, layers) => BlockType::Q6K,
            Self::Q4KM => BlockType::Q4K,
        };
        fitting(wanted, row)
    }
}

/// Whether Q4_K_M stores a tensor in Q6_K: v and the second matrix of the feed-forward block, in the first and last eighth
/// of the layers and in every third layer between them.
fn has_more_bits(name: &str, layers: usize) -> bool {
    let mut parts = name.split('.').skip(1);
    let layer = parts.next().and_then(|layer| layer.parse::<usize>().ok());
    let (Some(layer), Some(part)) = (layer, parts.next()) else {
        return false;
    };
    let is_sensitive = matches!(part, "attn_v" | "attn_qkv" | "ffn_down" | "ffn_down_exps");
    let eighth = layers / 8;
    is_sensitive && (layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2)
}

/// Returns a type whose blocks fill rows of this width: the wanted one, a similar one of smaller blocks, or F16.
fn fitting(wanted: BlockType, row: usize) -> BlockType {
    let smaller = match wanted {
        BlockType::Q4K => BlockType::Q5_0,
        BlockType::Q5K => BlockType::Q5_1,
        BlockType::Q6K => BlockType::Q8_0,
        other => other,
    };
    let fits = |kind: &BlockType| row.is_multiple_of(kind.block_len());
    let found = [wanted, smaller].into_iter().find(fits);
    found.unwrap_or(BlockType::F16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_of_q4_k_m_is_that_of_llama_quantize() {
        let kind = |name: &str, shape: &[usize]| GgufType::Q4KM.of_tensor(name, shape, 28, false);
        assert_eq!(kind("output.weight", &[512, 1536]), BlockType::Q6K);
        assert_eq!(kind("token_embd.weight", &[512, 1536]), BlockType::Q4K);
        assert_eq!(kind("blk.0.attn_norm.weight", &[1536]), BlockType::F32);
        assert_eq!(kind("blk.0.attn_q.bias", &[1536]), BlockType::F32);
        // 28 layers: 0 to 2, 24 to 27, and 5, 8, … between them.
        let deep: Vec<usize> = (0..28)
            .filter(|layer| {
                kind(&format!("blk.{layer}.ffn_down.weight"), &[1536, 8960]) == BlockType::Q6K
            })
            .collect();
        assert_eq!(deep, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]);
    }

    #[test]
    fn rows_that_are_not_whole_blocks_get_a_type_of_smaller_blocks() {
        let kind = |kind: GgufType, name: &str, row| kind.of_tensor(name, &[64, row], 24, true);
        for (of, name, row, expected) in [
            (GgufType::Q4KM, "blk.3.attn_q.weight", 896, BlockType::Q5_0),
            (GgufType::Q4KM, "blk.0.attn_v.weight", 896, BlockType::Q8_0),
            (GgufType::Q4KM, "token_embd.weight", 896, BlockType::Q8_0),
            (GgufType::Q4KM, "blk.3.attn_q.weight", 40, BlockType::F16),
            (GgufType::Q4_0, "token_embd.weight", 896, BlockType::Q8_0),
            (GgufType::Q4_0, "token_embd.weight", 512, BlockType::Q6K),
            (GgufType::Q8_0, "blk.3.ffn_up.weight", 40, BlockType::F16),
        ] {
            assert_eq!(kind(of, name, row), expected, "{name} of {row}");
        }
    }
}
