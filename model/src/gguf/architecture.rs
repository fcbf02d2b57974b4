//! The architectures that are read and written: their names in both formats, the names of their tensors, and what
//! llama.cpp's form of a tensor differs in.

/// An architecture of GGUF and the families of Hugging Face models that it holds.
#[derive(Debug, PartialEq)]
pub(super) struct Architecture {
    /// Value of `general.architecture`, and the prefix of its keys.
    pub(super) name: &'static str,
    /// Values of `model_type` in `config.json` that are written as this architecture. A file is read as the first.
    pub(super) model_types: &'static [&'static str],
    /// Value of `architectures` in `config.json`.
    pub(super) class: &'static str,
    /// Names of a layer's parts: in Hugging Face files, in GGUF files.
    parts: &'static [&'static [(&'static str, &'static str)]],
    /// Whether the rows of each head of q and k are interleaved: llama.cpp rotates neighbours in this architecture, and
    /// Hugging Face models rotate halves.
    pub(super) is_interleaved: bool,
    /// Number that is added to the gains of norms: Gemma's norms multiply by 1 + w, and llama.cpp stores the sum.
    pub(super) norm_offset: f32,
}

const ATTENTION: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
];
const HEAD_NORMS: &[(&str, &str)] = &[
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
];
const FEED_FORWARD: &[(&str, &str)] = &[
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
const NORM_BEFORE: &[(&str, &str)] = &[("post_attention_layernorm", "ffn_norm")];
const NORMS_BEHIND: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];
const NORM_BETWEEN: &[(&str, &str)] = &[("pre_feedforward_layernorm", "ffn_norm")];
const FUSED: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];
/// Experts are separate in Hugging Face files and stacked in GGUF files.
const EXPERTS: &[(&str, &str)] = &[
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.experts.*.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.*.up_proj", "ffn_up_exps"),
    ("mlp.experts.*.down_proj", "ffn_down_exps"),
];
const OUTSIDE: &[(&str, &str)] = &[
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// All architectures.
pub(super) const ARCHITECTURES: [Architecture; 9] = [
    Architecture {
        name: "llama",
        model_types: &["llama", "mistral"],
        class: "LlamaForCausalLM",
        parts: &[ATTENTION, NORM_BEFORE, FEED_FORWARD],
        is_interleaved: true,
        norm_offset: 0.0,
    },
    Architecture {
        name: "qwen2",
        model_types: &["qwen2"],
        class: "Qwen2ForCausalLM",
        parts: &[ATTENTION, NORM_BEFORE, FEED_FORWARD],
        is_interleaved: false,
        norm_offset: 0.0,
    },
    Architecture {
        name: "qwen3",
        model_types: &["qwen3"],
        class: "Qwen3ForCausalLM",
        parts: &[ATTENTION, HEAD_NORMS, NORM_BEFORE, FEED_FORWARD],
        is_interleaved: false,
        norm_offset: 0.0,
    },
    Architecture {
        name: "qwen3moe",
        model_types: &["qwen3_moe"],
        class: "Qwen3MoeForCausalLM",
        parts: &[ATTENTION, HEAD_NORMS, NORM_BEFORE, EXPERTS],
        is_interleaved: false,
        norm_offset: 0.0,
    },
    Architecture {
        name: "gemma2",
        model_types: &["gemma2"],
        class: "Gemma2ForCausalLM",
        parts: &[ATTENTION, NORMS_BEHIND, NORM_BETWEEN, FEED_FORWARD],
        is_interleaved: false,
        norm_offset: 1.0,
    },
    Architecture {
        name: "gemma3",
        model_types: &["gemma3_text"],
        class: "Gemma3ForCausalLM",
        parts: &[
            ATTENTION,
            HEAD_NORMS,
            NORMS_BEHIND,
            NORM_BETWEEN,
            FEED_FORWARD,
        ],
        is_interleaved: false,
        norm_offset: 1.0,
    },
    Architecture {
        name: "phi3",
        model_types: &["phi3"],
        class: "Phi3ForCausalLM",
        parts: &[FUSED, NORM_BEFORE],
        is_interleaved: false,
        norm_offset: 0.0,
    },
    Architecture {
        name: "olmo2",
        model_types: &["olmo2"],
        class: "Olmo2ForCausalLM",
        parts: &[ATTENTION, HEAD_NORMS, NORMS_BEHIND, FEED_FORWARD],
        is_interleaved: false,
        norm_offset: 0.0,
    },
    Architecture {
        name: "smollm3",
        model_types: &["smollm3"],
        class: "SmolLM3ForCausalLM",
        parts: &[ATTENTION, NORM_BEFORE, FEED_FORWARD],
        is_interleaved: true,
        norm_offset: 0.0,
    },
];

/// A tensor's place in a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GgufName {
    pub(super) name: String,
    /// Number of the expert whose matrix this is within the stacked tensor.
    pub(super) expert: Option<usize>,
}

impl Architecture {
    /// Returns the architecture with a name in GGUF files.
    pub(super) fn by_name(name: &str) -> Option<&'static Self> {
        ARCHITECTURES.iter().find(|known| known.name == name)
    }

    /// Returns the architecture that holds models of a type of `config.json`.
    pub(super) fn by_model_type(model_type: &str) -> Option<&'static Self> {
        let holds = |known: &&Self| known.model_types.contains(&model_type);
        ARCHITECTURES.iter().find(holds)
    }

    /// Returns the name in GGUF files of a tensor with a Hugging Face name, or `None` if the architecture has none.
    pub(super) fn gguf_name(&self, name: &str) -> Option<GgufName> {
        if let Some((_, name)) = OUTSIDE.iter().find(|(outside, _)| *outside == name) {
            return Some(GgufName {
                name: (*name).to_owned(),
                expert: None,
            });
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (part, expert) = match part.strip_prefix("mlp.experts.") {
            Some(rest) => {
                let (expert, matrix) = rest.split_once('.')?;
                let expert = expert.parse().ok()?;
                (format!("mlp.experts.*.{matrix}"), Some(expert))
            }
            None => (part.to_owned(), None),
        };
        let (_, part) = self.all_parts().find(|(own, _)| *own == part)?;
        Some(GgufName {
            name: format!("blk.{layer}.{part}.{kind}"),
            expert,
        })
    }

    /// Returns the Hugging Face name of a tensor of a GGUF file; the name of stacked experts has `*` for their number.
    pub(super) fn hugging_face_name(&self, name: &str) -> Option<String> {
        if let Some((outside, _)) = OUTSIDE.iter().find(|(_, own)| *own == name) {
            return Some((*outside).to_owned());
        }
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (part, _) = self.all_parts().find(|(_, own)| *own == part)?;
        Some(format!("model.layers.{layer}.{part}.{kind}"))
    }

    fn all_parts(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.parts.iter().flat_map(|parts| parts.iter().copied())
    }

    /// Returns what is added to the numbers of a tensor with this name in GGUF files.
    pub(super) fn offset(&self, gguf_name: &str) -> f32 {
        match gguf_name.ends_with("norm.weight") {
            true => self.norm_offset,
            false => 0.0,
        }
    }

    /// Returns the names of all architectures and model types, for messages.
    pub(super) fn model_types() -> String {
        let all = ARCHITECTURES.iter().flat_map(|known| known.model_types);
        all.copied().collect::<Vec<_>>().join(", ")
    }
}

/// Returns the row of the Hugging Face matrix that is row `row` of an interleaved one, for heads of width `width`.
pub(super) fn interleaved_source(row: usize, width: usize) -> usize {
    let (head, inside) = (row / width, row % width);
    head * width + inside % 2 * (width / 2) + inside / 2
}

/// Returns the row of an interleaved matrix that is row `row` of the Hugging Face one: the inverse of
/// [`interleaved_source`].
pub(super) fn interleaved_target(row: usize, width: usize) -> usize {
    let (head, inside) = (row / width, row % width);
    head * width + inside % (width / 2) * 2 + inside / (width / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_both_ways() {
        let gemma = Architecture::by_model_type("gemma3_text").unwrap();
        for (name, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            (
                "model.layers.11.post_attention_layernorm.weight",
                "blk.11.post_attention_norm.weight",
            ),
            (
                "model.layers.0.self_attn.q_norm.weight",
                "blk.0.attn_q_norm.weight",
            ),
        ] {
            assert_eq!(gemma.gguf_name(name).unwrap().name, gguf);
            assert_eq!(gemma.hugging_face_name(gguf).unwrap(), name);
        }
        let experts = Architecture::by_name("qwen3moe").unwrap();
        let name = experts.gguf_name("model.layers.1.mlp.experts.7.up_proj.weight");
        assert_eq!(name.unwrap().expert, Some(7));
        assert_eq!(
            experts
                .hugging_face_name("blk.1.ffn_up_exps.weight")
                .unwrap(),
            "model.layers.1.mlp.experts.*.up_proj.weight"
        );
        assert_eq!(gemma.gguf_name("model.layers.0.mlp.gate.weight"), None);
        assert_eq!(gemma.hugging_face_name("blk.0.attn_qkv.weight"), None);
    }

    #[test]
    fn interleaving_is_undone() {
        let width = 8;
        let first: Vec<usize> = (0..width)
            .map(|row| interleaved_source(row, width))
            .collect();
        assert_eq!(first, [0, 4, 1, 5, 2, 6, 3, 7]);
        for row in 0..3 * width {
            assert_eq!(
                interleaved_target(interleaved_source(row, width), width),
                row
            );
        }
    }
}
